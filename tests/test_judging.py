"""What a chain is worth on a density, and what its kernels do, against problems with known answers."""

import json
import math

import numpy as np
import pytest
import torch
from draws import CORNERS, Four, generator, images
from linear_gaussian import FLOAT, correlated
from torch import distributions

from annealed_core.chain import Chain
from annealed_core.energies import ENERGIES
from annealed_core.evidence import log_normalizer_quadrature
from annealed_core.flows import HouseholderSequence, PlanarFlow
from annealed_core.judging import exploration, inference, likelihood
from annealed_core.judging.density import judge, true_log_normalizer
from annealed_core.judging.images import means_and_errors
from annealed_core.judging.inference import kernels_at_work
from annealed_core.kernels import DiagonalGaussian, Gated, GatedGaussianPair
from annealed_core.moves import Metropolis
from annealed_core.targets import LearnedAlphas, LinearAlphas
from annealed_core.vae import VAE


class Shift(torch.nn.Module):
    """A kernel that adds a constant: it keeps volume."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, z, context=None, noise=None):
        return z + self.by, torch.zeros_like(z[..., 0])


class Normal:
    """N(0, I) times exp(constant), and what a user may declare."""

    def __init__(self, dim=2, constant=0.0, **declared):
        self.dim, self.constant = dim, constant
        vars(self).update(declared)

    def log_prob(self, z):
        return self.constant - 0.5 * z.square().sum(-1) - 0.5 * self.dim * math.log(2 * math.pi)


def normal_chain(*kernels, dim=2, loc=0.0, scale=1.0):
    return Chain(DiagonalGaussian(torch.full((dim,), loc), torch.full((dim,), scale)), kernels)


def gated(name="D", n=2):
    torch.manual_seed(0)
    energy = ENERGIES[name]
    return Chain(
        DiagonalGaussian.isotropic(energy.dim, energy.base_scale), Gated(hidden=8).build(energy.dim, n)
    ), energy


# ---- what the kernels do


@pytest.mark.parametrize("dim", [2, 5])
def test_kernels_earn_and_move_what_a_shift_onto_the_target_does(dim):
    chain = normal_chain(Shift(-1.0), Shift(-1.0), dim=dim, loc=2.0)
    found = judge(chain, Normal(dim), generator=generator())
    assert found["kernels_earn"] == pytest.approx(0.5 * 4 * dim, abs=4 * found["kernels_earn_se"])  # the KL of the base
    assert found["kernels_earn_se"] == pytest.approx(2 * dim**0.5 / 20_000**0.5, rel=0.05)
    assert found["kernels_move"] == pytest.approx(2.0)
    alone = judge(normal_chain(dim=dim, loc=2.0), Normal(dim), generator=generator())["elbo"]
    assert found["elbo"] - alone == pytest.approx(found["kernels_earn"], abs=0.2)


def test_a_move_of_one_standard_deviation_in_every_dimension_is_one():
    scale = torch.tensor([0.1, 3.0, 20.0])
    chain = Chain(DiagonalGaussian(torch.zeros(3), scale), [Shift(scale)])
    assert judge(chain, Normal(3), 100)["kernels_move"] == pytest.approx(1)


def test_kernels_that_do_nothing_earn_nothing_at_all_and_a_rotation_moves_for_nothing():
    found = judge(normal_chain(Shift(0.0), loc=1.0), Normal())
    assert (found["kernels_earn"], found["kernels_earn_se"], found["kernels_move"]) == (0, 0, 0)
    found = judge(normal_chain(HouseholderSequence(2)), Normal())
    assert abs(found["kernels_earn"]) < 1e-6 and found["kernels_earn_se"] < 1e-6 and found["kernels_move"] > 0.5


def test_what_kernels_earn_is_paired_sample_by_sample():
    found = judge(normal_chain(Shift(0.01), scale=2.0), Normal(), 4000, generator=generator())
    paired = 0.01 * 2 * 2**0.5  # each log-weight alone varies by 3
    assert found["kernels_earn_se"] == pytest.approx(paired / 4000**0.5, rel=0.05)


def test_a_chain_without_kernels_has_no_word_about_them():
    assert not [name for name in judge(normal_chain(), Normal(), 100) if name.startswith("kernels")]
    model = correlated()
    assert kernels_at_work(model, model.simulate(3)[1]) == {}


def test_kernels_of_an_auto_encoder_earn_what_their_shift_of_the_posterior_does():
    shift = torch.tensor([0.3, -0.5, 0.1], dtype=FLOAT)
    model = correlated(shift=-shift, kernels=[Shift(0.5 * shift), Shift(0.5 * shift)])
    x = model.simulate(400)[1]
    found = kernels_at_work(model, x, 20, generator())
    exact = 0.5 * float(shift @ model.precision @ shift)
    assert found["kernels_earn"] == pytest.approx(exact, abs=4 * found["kernels_earn_se"])
    slope = (model.precision @ shift) * model.precision.diagonal().rsqrt()  # of a draw's gain, in its noise
    assert found["kernels_earn_se"] == pytest.approx(float(slope.norm()) / (20 * 400) ** 0.5, rel=0.15)
    scale = model.precision.diagonal().rsqrt()
    assert found["kernels_move"] == pytest.approx(float(shift.norm() / scale.norm()))
    assert kernels_at_work(model, x, 20, generator()) == found


def test_kernels_at_work_on_a_vae_are_plain_values():
    vae, x = auto_encoder(), images(7).float()
    found, one = kernels_at_work(vae, x, generator=generator()), kernels_at_work(vae, x[:1], generator=generator())
    assert found["kernels_earn"] < 0 < found["kernels_earn_se"] and found["kernels_move"] > 0
    assert one["kernels_earn_se"] is None and json.dumps([found, one], allow_nan=False)


# ---- the evidence


@pytest.mark.parametrize("constant", [-1e6, 0.0, 1e6])
def test_a_constant_in_the_target_changes_what_it_should_and_nothing_else(constant):
    chain = normal_chain(Shift(0.3), scale=1.2)
    plain, found = (judge(chain, Normal(constant=c), 5000, generator=generator()) for c in (0.0, constant))
    for name, value in plain.items():
        moved = constant if name in ("elbo", "log_z", "log_z_100") else 0.0
        expected = value if value is None else np.array(value) + moved
        assert found[name] == expected if value is None else np.allclose(found[name], expected, rtol=0, atol=1e-6), name
    assert found["log_z"] == pytest.approx(constant, abs=0.05) and found["log_z_error_2000"] < 0.05


@pytest.mark.parametrize("constant", [-1e6, 0.0, 1e6 + 0.1])
def test_with_the_target_itself_as_the_chain_all_weights_are_equal(constant):
    found = judge(normal_chain(), Normal(constant=constant), 4000, generator=generator())
    assert found["elbo"] <= found["log_z"] == pytest.approx(constant, abs=1e-5)
    assert found["elbo"] == pytest.approx(found["log_z"], abs=1e-5) and found["log_z_se"] < 1e-6
    assert found["ess"] == pytest.approx(1) and found["ess_100"] == pytest.approx(1)
    assert found["total_variation"] < 0.15 and found["log_z_error_2000"] < 1e-5 and "notes" not in found


def test_the_gaps_along_the_path_end_where_the_bound_does():
    chain, energy = gated()
    found = judge(chain, energy, generator=generator())
    assert len(found["gaps"]) == 3 and found["gaps"][0] == pytest.approx(0, abs=1e-5)
    assert found["gaps"][-1] == pytest.approx(0 - found["elbo"], abs=0.3)
    other = judge(chain, energy, alphas=[0.0, 0.1, 1.0], generator=generator())
    assert other["gaps"][1] < found["gaps"][1] and "alphas" not in other
    assert judge(chain, energy, alphas=LinearAlphas(), generator=generator()) == found
    learned = judge(chain, energy, alphas=LearnedAlphas().build(2), generator=generator())
    assert learned.pop("alphas") == pytest.approx([0, 0.5, 1]) and learned["gaps"] == pytest.approx(found["gaps"])


def test_estimates_of_small_samples_are_those_of_sets_of_so_many():
    class Steps(Normal):
        def log_prob(self, z):
            return super().log_prob(z) + (torch.arange(len(z)) < 2000 if z.ndim == 2 else 0)

    found = judge(normal_chain(dim=3), Steps(3, log_normalizer=0.0), 6500)
    assert found["log_z_error_2000"] == pytest.approx(1 / 3) and found["log_z_100"] == pytest.approx(20 / 65)
    few = judge(normal_chain(), Normal(), 99)
    assert (few["log_z_error_2000"], few["log_z_100"], few["ess_100"]) == (None, None, None)


def test_targets_in_many_dimensions_are_judged_without_a_grid():
    found = judge(*gated("funnel"), generator=generator())
    assert found["total_variation"] is None and not {"kl_reverse", "gaps", "notes"} & set(found)
    assert math.isfinite(found["log_z"]) and found["mode_masses"] is None


def test_the_truth_is_in_closed_form_or_by_quadrature_or_not_known():
    assert true_log_normalizer(ENERGIES["ring8"]) == pytest.approx(math.log(8))
    assert true_log_normalizer(Normal(constant=3.0)) == pytest.approx(3)
    assert true_log_normalizer(Normal(5)) is None and true_log_normalizer(Normal(5, log_normalizer=0)) == 0
    assert true_log_normalizer(ENERGIES["A"]) == log_normalizer_quadrature(ENERGIES["A"])


# ---- where a grid misses the target


def test_a_chain_that_keeps_one_mode_of_four_is_off_by_three_quarters():
    modes = (CORNERS, torch.full((4,), 0.25))
    found = judge(normal_chain(loc=20.0), Four(support=40.0, modes=modes), generator=generator())
    assert found["total_variation"] == pytest.approx(0.75, abs=0.01) and "notes" not in found
    assert found["mode_shares"] == pytest.approx([1, 0, 0, 0]) and found["log_z_error_2000"] == pytest.approx(
        math.log(4), abs=0.01
    )


@pytest.mark.parametrize("declared", [{}, {"support": 12.0}, {"support": 40.0, "box": 5.0}])
def test_figures_of_a_grid_that_misses_the_target_are_refused_and_the_notes_say_why(declared):
    found = judge(normal_chain(Shift(20.0)), Four(**declared), generator=generator())
    assert found["total_variation"] is None and found["kl_reverse"] is None and found["kl_forward"] is None
    name = "box" if "box" in declared else "support"
    assert 0 < len(found["notes"]) <= 4 and all(f"declare a {name}" in line for line in found["notes"])
    assert all("\n" not in line for line in found["notes"]) and json.dumps(found, allow_nan=False)
    if name == "support":
        assert found["gaps"] is None and found["log_z_error_2000"] is None
    assert found["log_z"] == pytest.approx(math.log(2 * math.pi), abs=0.01)


def test_an_error_that_is_no_refusal_is_not_hidden():
    class Wrong(Normal):
        def log_prob(self, z):
            if z.ndim > 2:
                raise ValueError("z must be a matrix")
            return super().log_prob(z)

    with pytest.raises(ValueError, match=r"^z must be a matrix$"):
        judge(normal_chain(), Wrong(), 100)
    with pytest.raises(ValueError, match=r"^chain must have no batch, got one of shape \(3,\)$"):
        judge(Chain(DiagonalGaussian(torch.zeros(3, 2), torch.ones(3, 2))), Normal(), 100)


# ---- targets and chains of a user's own


def test_samples_where_the_target_is_zero_leave_what_kernels_earn_unknown():
    class Half(Normal):
        def log_prob(self, z):
            return torch.where(z[..., 0] > 0, super().log_prob(z), -torch.inf)

    found = judge(normal_chain(Shift(0.5)), Half(log_normalizer=math.log(0.5)), generator=generator())
    assert found["kernels_earn"] is None and found["notes"][-1].startswith("kernels_earn is not known")
    assert found["log_z"] == pytest.approx(math.log(0.5), abs=0.05) and found["kernels_move"] == pytest.approx(0.5)


def test_a_network_in_single_precision_is_judged_as_it_is():
    class Network(torch.nn.Linear):
        dim = 2

        def log_prob(self, z):
            return -0.5 * self(z).square().sum(-1)

    torch.manual_seed(0)
    network = Network(2, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
        network.bias.zero_()
    found = judge(normal_chain(), network, generator=generator())
    assert found["log_z"] == pytest.approx(math.log(2 * math.pi), abs=0.05) and network.weight.grad is None


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_modes_may_be_lists_or_arrays_and_a_target_in_double_precision(kind):
    target = Normal(modes=(kind([[-1.0, 0.0], [1.0, 0.0]]), kind([0.5, 0.5])))
    target.log_prob = lambda z, plain=target.log_prob: plain(z).double()
    found = judge(normal_chain(), target, generator=generator())
    assert found["mode_masses"] == pytest.approx([0.5, 0.5], abs=0.02) == found["mode_shares"]


def test_a_distribution_of_torch_is_a_target():
    target = distributions.Independent(distributions.Normal(torch.zeros(2), torch.ones(2)), 1)
    target.dim = 2
    found = judge(normal_chain(Shift(0.1)), target, generator=generator())
    assert found["log_z"] == pytest.approx(0, abs=0.01) and found["total_variation"] < 0.15
    assert found["gaps"][-1] == pytest.approx(0.01, abs=0.01)


def test_the_generator_decides_and_the_metrics_are_plain_values():
    chain, energy = gated()
    state = torch.get_rng_state()
    one, same, other = (judge(chain, energy, 2000, generator=generator(seed)) for seed in (0, 0, 1))
    assert one == same != other and torch.equal(torch.get_rng_state(), state)
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    own = Chain(chain.base, chain.kernels, generator=generator())
    assert judge(own, energy, 2000) == one and judge(own, energy, 2000, generator=generator()) == one
    assert all(weight.grad is None for weight in chain.parameters())


def test_means_and_errors_stand_beside_each_other():
    found = means_and_errors(a=torch.tensor([1.0, 3.0]), b=torch.tensor([1.0]))
    assert found.pop("b_se") != 0 and found == {"a": 2.0, "a_se": pytest.approx(1.0), "b": 1.0}


# ---- what holds of all that judges an auto-encoder


def auto_encoder():
    torch.manual_seed(0)
    return VAE(2, 6, [GatedGaussianPair(2, 5, 6)]).eval()


DRAWS = {
    "importance sampling": lambda m, x, g: likelihood.importance_sampling(m, x, 5, g),
    "adaptive": lambda m, x, g: likelihood.adaptive_importance_sampling(m, x, 20, 1, g),
    "ais": lambda m, x, g: likelihood.ais(m, x, 2, 3, generator=g),
    "bdmc": lambda m, x, g: likelihood.bdmc(m, 2, 2, 3, generator=g),
    "simulate": lambda m, x, g: likelihood.simulate_images(m, 3, g),
    "active units": lambda m, x, g: inference.active_units(m, x, n_samples=4, generator=g),
    "gaps": lambda m, x, g: inference.inference_gaps(m, x, 2, n_samples=3, log_px={"known": x[:, 0]}, generator=g),
    "aggregate": lambda m, x, g: inference.aggregate_kl(m, x, generator=g),
    "kernels": lambda m, x, g: kernels_at_work(m, x, generator=g),
    "explore": lambda m, x, g: exploration.explore(m, x, x, torch.arange(20), generator=g),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_generator_decides_and_nothing_else_is_drawn_from_or_changed(name):
    vae, x = auto_encoder(), images(20).float()
    state = torch.get_rng_state()
    one, same, other = (str(DRAWS[name](vae, x, generator(seed))) for seed in (0, 0, 1))
    assert one == same != other and torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None and weight.requires_grad for weight in vae.parameters())


TRAINING = "model must be in evaluation mode, got training = True"
ALIKE = "model must have kernels that are all flows or all pairs of Gaussians, got"
SHAPES = r"real and generated must have shapes \(n, pixels\) and \(m, pixels\), got \(3, 784\) and"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: likelihood.importance_sampling(m, x, 0), "n_samples must be a whole number from 1, got 0"),
        (lambda m, x: likelihood.importance_sampling(m, x[0]), r"x must have shape \(n_images, pixels\), got \(784,\)"),
        (
            lambda m, x: likelihood.adaptive_importance_sampling(m, x, 19),
            "n_samples must be at least 20, 10 for each of 2 latents, got 19",
        ),
        (
            lambda m, x: likelihood.adaptive_importance_sampling(m, x * math.nan, 50),
            "x, or what the model makes of it, has log-weights that are not finite",
        ),
        (lambda m, x: likelihood.ais(m, x[:0]), r"x must have shape \(n_images, pixels\), got \(0, 784\)"),
        (lambda m, x: likelihood.ais(m.train(), x), TRAINING),
        (lambda m, x: likelihood.ais(m, x, 1.5), "n_particles must be a whole number from 1, got 1.5"),
        (lambda m, x: likelihood.ais(m, x, 2, 0), "n_temperatures must be a whole number from 1, got 0"),
        (lambda m, x: likelihood.ais(m, x, start="data"), "unknown start 'data': choose one of prior, posterior"),
        (lambda m, x: likelihood.ais(m, x, alphas=[0.0, 0.5]), r"alphas must rise from 0 to 1, got \[0.0, 0.5\]"),
        (lambda m, x: likelihood.bdmc(m, 0), "n_images must be a whole number from 1, got 0"),
        (lambda m, x: likelihood.sigmoid_alphas(5, -1.0), "steepness must be finite and above 0, got -1.0"),
        (lambda m, x: inference.active_units(m, x[:1]), "x must have at least 2 images, got 1"),
        (lambda m, x: inference.active_units(m, x, threshold=0.0), "threshold must be finite and above 0, got 0.0"),
        (lambda m, x: inference.active_units(m, x, n_samples=1), "n_samples must be a whole number from 2, got 1"),
        (lambda m, x: inference.aggregate_kl(m, x, 0), "n_samples must be a whole number from 1, got 0"),
        (lambda m, x: inference.aggregate_kl(m, x, 1, 0), "n_reverse must be a whole number from 1, got 0"),
        (lambda m, x: inference.inference_gaps(m, x, 0), "steps must be a whole number from 1, got 0"),
        (
            lambda m, x: inference.inference_gaps(m, x, learning_rate=-1.0),
            "learning_rate must be finite and above 0, got -1.0",
        ),
        (lambda m, x: inference.aggregate_kl(m.train(), x), TRAINING),
        (
            lambda m, x: inference.aggregate_kl(VAE(2, 6, [*m.kernels, PlanarFlow(2), PlanarFlow(2)]).eval(), x),
            f"{ALIKE} GatedGaussianPair, PlanarFlow",
        ),
        (
            lambda m, x: inference.aggregate_kl(correlated(kernels=[Metropolis(None, 0.1)]), x[:, :6].double()),
            f"{ALIKE} Metropolis",
        ),
        (lambda m, x: kernels_at_work(m.train(), x), TRAINING),
        (lambda m, x: exploration.latent_information(m, x, 2.5), "n_samples must be a whole number from 2, got 2.5"),
        (lambda m, x: exploration.latent_information(m.train(), x), TRAINING),
        (lambda m, x: exploration.prior_samples(m, 0), "n must be a whole number from 1, got 0"),
        (lambda m, x: exploration.prior_samples(m.train(), 5), TRAINING),
        (lambda m, x: exploration.aggregate_gaussian(m, x), "x must have at least 20 images for 2 latents, got 3"),
        (lambda m, x: exploration.coverage(x, x, k=3), "k must be below the number of real images, 3, got 3"),
        (lambda m, x: exploration.coverage(x, x, k=0), "k must be a whole number from 1, got 0"),
        (lambda m, x: exploration.coverage(x, x[:, :5]), rf"{SHAPES} \(3, 5\)"),
        (lambda m, x: exploration.coverage(x, x[:0]), rf"{SHAPES} \(0, 784\)"),
        (lambda m, x: exploration.explore(m, x, x, None, n_images=0), "n_images must be a whole number from 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call(auto_encoder(), images(3).float())
