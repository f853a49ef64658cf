"""Objectives: whose gradient reaches what, and which of them are the same in which limit."""

import itertools
import math

import pytest
import torch
from draws import draw
from torch import nn

from annealed_core.chain import Chain
from annealed_core.decoders import Autoregressive
from annealed_core.kernels import DiagonalGaussian, Gated, GatedGaussianPair, normal_log_prob
from annealed_core.objectives import (
    AVO,
    ELBO,
    IWAE,
    PATH_SAMPLES,
    AlphaELBO,
    LocalAVO,
    Objective,
    avo_steps,
    path_fit,
)
from annealed_core.schedules import Annealing, Constant, Linear
from annealed_core.targets import ENERGIES, Energy, LearnedAlphas, LearnedPath, linear_alphas
from annealed_core.vae import VAE, Independent
from annealed_core.variants import CapacityELBO

T, INDEPENDENT = 3, Independent()
EXPONENTS = torch.tensor([0, 0.25, 0.75, 1])
PLANE = [name for name, target in ENERGIES.items() if target.dim == 2]
every_energy = pytest.mark.parametrize("name", PLANE)
every_beta = pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
every_start = pytest.mark.parametrize("near_identity", [False, True])
in_both_modes = pytest.mark.parametrize("train", [False, True])

FOR_IMAGES = [ELBO(0.3), AlphaELBO(0.4), IWAE(5, 0.3), LocalAVO(0.3), AVO(1, 0.3), AVO(0.3, 0.3), CapacityELBO(2, 0.5)]


def toy_chain(n_transitions=T, near_identity=False):
    """A chain in float64 whose base has trainable parameters."""
    torch.manual_seed(0)
    base = DiagonalGaussian((0.1 * draw(2)).requires_grad_(), draw(2).exp().requires_grad_())
    kernels = nn.ModuleList(GatedGaussianPair(2, 8, near_identity=near_identity) for _ in range(n_transitions))
    return Chain(base, kernels.double(), generator=torch.Generator().manual_seed(0))


def vae_and_images(n_transitions=T, train=False, batch=6, near_identity=False, decoder=INDEPENDENT):
    """A tiny auto-encoder in float64, its batch statistics not those of its initialisation."""
    torch.manual_seed(0)
    kernels = (GatedGaussianPair(3, 8, 10, near_identity) for _ in range(n_transitions))
    vae = VAE(3, 10, kernels, decoder).double().train()
    x = (torch.rand(batch, 784) < 0.3).double()
    with torch.no_grad():
        vae.joint(x).log_prob(2 * vae.posterior(x).rsample().z[-1])
    return vae.train(train), x


def chain_and_joint(**given):
    vae, x = vae_and_images(**given)
    return vae, vae.posterior(x, torch.Generator().manual_seed(0)), vae.joint(x)


def gradients(value, parameters):
    return torch.autograd.grad(value.sum(), list(parameters), allow_unused=True, retain_graph=True)


def absent(found):
    return all(gradient is None or not gradient.any() for gradient in found)


def present(found):
    return all(gradient is not None and gradient.any() and gradient.isfinite().all() for gradient in found)


def assert_alike(first, second, parameters=()):
    """Of values and, for these parameters, of gradients; where there is none it counts as 0."""
    close, parameters = {"atol": 1e-9, "rtol": 1e-9}, list(parameters)
    torch.testing.assert_close(first, second, **close)
    if parameters:
        ours, theirs = (
            torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in (first, second)
        )
        torch.testing.assert_close(ours, theirs, **close)


def problem(name, n_transitions=T, near_identity=False):
    """An energy's chain, the energy and what learns beside the kernels; or an auto-encoder's, also in "training"."""
    if name in ENERGIES:
        chain = toy_chain(n_transitions, near_identity)
        return chain, ENERGIES[name], [chain.base.loc, chain.base.scale]
    vae, *both = chain_and_joint(n_transitions=n_transitions, train=name == "training", near_identity=near_identity)
    return *both, [*vae.encoder.parameters(), *vae.decoder.parameters()]


BETAS = [("images", 1.0), ("images", 0.3), ("images", 0.0)]
every_problem = pytest.mark.parametrize(("name", "beta"), [*((name, 1.0) for name in PLANE), *BETAS])


@pytest.mark.parametrize(("name", "beta"), [*((name, 1.0) for name in PLANE), *BETAS[:2], ("training", 0.3)])
@every_start
def test_avo_step_has_no_gradient_outside_its_transition(name, beta, near_identity):
    chain, target, others = problem(name, T, near_identity)
    steps = avo_steps(chain, target, linear_alphas(T), beta, sample_shape=16)
    assert steps.shape == (T, 16, *chain.base.batch_shape)
    for t, s in itertools.product(range(T), range(T)):
        kernel = chain.kernels[s]
        if s == t:
            assert present(gradients(steps[t], kernel.parameters()))
        else:
            assert absent(gradients(steps[t], kernel.parameters())), f"step {t + 1} reaches kernel {s + 1}"
        assert absent(gradients(steps[t], others)), f"step {t + 1} reaches base, encoder or decoder"


@every_problem
@every_start
def test_avo_with_one_transition_has_the_gradient_of_the_elbo_for_the_kernel(name, beta, near_identity):
    chain, target, _ = problem(name, 1, near_identity)
    noise, kernel = chain.noise(8), list(chain.kernels.parameters())
    bound = ELBO(beta)(chain, target, noise=noise)
    for objective in (AVO(1, beta), AVO(0.4, beta), LocalAVO(beta)):
        assert_alike(objective(chain, target, noise=noise), bound, kernel)


def test_avo_with_several_transitions_has_another_gradient_than_the_elbo():
    chain = toy_chain()
    noise, parameters = chain.noise(32), list(chain.kernels[0].parameters())
    ours, theirs = (gradients(o(chain, ENERGIES["A"], noise=noise), parameters) for o in (AVO(), ELBO()))
    assert any((a - b).abs().max() > 0.1 for a, b in zip(ours, theirs, strict=True))


@every_problem
@pytest.mark.parametrize("n_transitions", [1, 2, 5])
def test_avo_steps_sum_to_the_elbo(name, beta, n_transitions):
    chain, target, _ = problem(name, n_transitions)
    noise = chain.noise((2, 4))
    whole = ELBO(beta)(chain, target, noise=noise)
    assert_alike(avo_steps(chain, target, linear_alphas, beta, noise=noise).sum(0), whole)
    for objective in (LocalAVO(beta), AVO(1, beta), AVO(0.3, beta)):
        assert_alike(objective(chain, target, noise=noise), whole)


@pytest.mark.parametrize(("name", "beta"), [("B", 1.0), ("images", 0.3)])
def test_avo_step_is_its_formula_in_which_beta_scales_everything_but_the_likelihood(name, beta):
    chain, target, _ = problem(name)
    noise = chain.noise(8)
    trajectory, log_f = chain.rsample(noise=noise), []
    for alpha, z in zip(EXPONENTS, trajectory.z, strict=True):
        tempered = target.log_prob(z) if beta == 1 else target.log_likelihood(z) + beta * target.log_prior(z)
        log_f.append(alpha * tempered + (1 - alpha) * beta * chain.base.log_prob(z))
    by_hand = [log_f[t] + beta * trajectory.log_ratios[t - 1] - log_f[t - 1] for t in range(1, T + 1)]
    assert_alike(avo_steps(chain, target, EXPONENTS, beta, noise=noise), torch.stack(by_hand))


def test_each_element_of_a_batch_may_follow_a_path_of_its_own():
    context, kernels = draw(2, 4), nn.ModuleList(GatedGaussianPair(2, 8, 4) for _ in range(T)).double()
    chain = Chain(DiagonalGaussian(draw(2, 2), draw(2, 2).exp()), kernels, context)
    noise, paths = chain.noise(7), torch.stack([linear_alphas(T), EXPONENTS], -1)
    found = avo_steps(chain, ENERGIES["D"], paths, noise=noise)
    for place in (0, 1):
        alone = avo_steps(chain, ENERGIES["D"], paths[:, place], noise=noise)
        torch.testing.assert_close(found[..., place], alone[..., place])


@every_beta
@pytest.mark.parametrize("weight", [0.0, 0.2, 0.7])
def test_avo_below_weight_one_is_the_weighted_sum_of_both(beta, weight):
    vae, chain, joint = chain_and_joint()
    noise = chain.noise(2)
    local, whole = LocalAVO(beta)(chain, joint, noise=noise), ELBO(beta)(chain, joint, noise=noise)
    found = AVO(weight, beta)(chain, joint, noise=noise)
    assert_alike(found, weight * local + (1 - weight) * whole, vae.parameters())


@in_both_modes
@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("decoder", [Independent(), Autoregressive()], ids=repr)
def test_at_weight_one_avo_trains_the_kernels_and_the_elbo_exactly_encoder_and_decoder(train, beta, decoder):
    found = []
    for objective in (AVO(beta=beta), ELBO(beta), LocalAVO(beta)):
        vae, chain, joint = chain_and_joint(train=train, decoder=decoder)
        if isinstance(objective, LocalAVO):  # it decodes by the batch statistics that the ELBO's states have updated
            ELBO(beta)(chain, joint, 2)
            chain.generator.manual_seed(0)
        value = objective(chain, joint, 2)
        model = gradients(value, [*vae.encoder.parameters(), *vae.decoder.parameters()])
        found.append((value, model, gradients(value, vae.kernels.parameters())))
    (value, model, kernels), (bound, of_bound, _), (_, none, of_steps) = found
    torch.testing.assert_close((value, model, kernels), (bound, of_bound, of_steps), atol=1e-9, rtol=1e-9)
    assert absent(none) and present(kernels)


@pytest.mark.parametrize("learns", ["loc", "scale", "context", "nothing"])
def test_at_weight_one_whatever_learns_beside_the_kernels_has_the_gradient_of_the_elbo(learns):
    torch.manual_seed(0)
    kernels = nn.ModuleList(GatedGaussianPair(2, 8, 4) for _ in range(T)).double()
    parts = {"loc": draw(5, 2), "scale": draw(5, 2).exp(), "context": draw(5, 4)}
    inputs = [part.requires_grad_() for name, part in parts.items() if name == learns]
    chain = Chain(DiagonalGaussian(parts["loc"], parts["scale"]), kernels, parts["context"])
    noise = chain.noise(4)
    found, local, whole = (o(chain, ENERGIES["D"], noise=noise) for o in (AVO(), LocalAVO(), ELBO()))
    assert_alike(found, local, kernels.parameters())
    assert_alike(found, whole, inputs)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("alphas", [linear_alphas, LearnedAlphas()])
@pytest.mark.parametrize("sample_shape", [(), 4])
@in_both_modes
def test_the_states_of_avo_do_not_touch_the_decoder(beta, alphas, sample_shape, train):
    vae, chain, joint = chain_and_joint(train=train)
    before = {name: value.clone() for name, value in vae.decoder.state_dict().items()}
    assert any("running_mean" in name for name in before) and any("num_batches_tracked" in name for name in before)
    LocalAVO(beta, alphas).build(T)(chain, joint, sample_shape).mean().backward()
    for name, value in vae.decoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in vae.decoder.parameters())
    assert all(module.training == train for module in vae.decoder.modules())


@pytest.mark.parametrize("objective", [AVO(), AVO(0.3), AVO(0.3, 0.5)], ids=repr)
def test_the_decoders_batch_statistics_are_those_of_the_elbos_states_alone(objective):
    found = []
    for each in (objective, ELBO()):
        vae, chain, joint = chain_and_joint(train=True)
        before = {name: value.clone() for name, value in vae.decoder.named_buffers()}
        each(chain, joint, 4).mean().backward()
        found.append(dict(vae.decoder.named_buffers()))
        assert all(not torch.equal(value, before[name]) for name, value in found[-1].items())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("limit", "plain"),
    [
        (IWAE(1), ELBO()),
        (IWAE(1, 0.3), ELBO(0.3)),
        (AlphaELBO(1), ELBO()),
        (AlphaELBO(Linear(0.5, 0.5)).at(1), ELBO()),
        (ELBO(Constant(1.0)).at(9), ELBO()),
        (ELBO(Linear(0.1, 0.2)).at(1), ELBO(0.1 + 0.2)),
        (AVO(0), ELBO()),
        (AVO(0, 0.3), ELBO(0.3)),
        (CapacityELBO(0), ELBO()),
        (CapacityELBO(7, 0), ELBO()),
        (CapacityELBO(8, 0.25), CapacityELBO(2)),
    ],
    ids=repr,
)
@in_both_modes
def test_in_their_limits_objectives_are_the_plain_ones_with_all_their_gradients(limit, plain, train):
    vae, chain, joint = chain_and_joint(train=train)
    noise = chain.noise(3)
    assert ELBO()(chain, joint, noise=noise).mean() < ELBO(0)(chain, joint, noise=noise).mean()  # KL is positive
    values = [o(chain, joint, noise=noise.unsqueeze(1) if isinstance(o, IWAE) else noise) for o in (limit, plain)]
    assert_alike(values[0].mean(), values[1].mean(), vae.parameters())
    assert isinstance(limit, CapacityELBO) or torch.equal(values[0], values[1]) or assert_alike(*values) is None


@every_energy
def test_alpha_tempers_the_energy_alone(name):
    chain = toy_chain()
    noise = chain.noise(16)
    energy = ENERGIES[name].log_prob(chain.rsample(noise=noise).z[-1])
    whole = ELBO()(chain, ENERGIES[name], noise=noise)
    assert_alike(AlphaELBO(0.4)(chain, ENERGIES[name], noise=noise), whole - 0.6 * energy, chain.kernels.parameters())


@pytest.mark.parametrize("above", [True, False])
def test_a_capacity_holds_the_mean_kl_from_both_sides(above):
    vae, chain, joint = chain_and_joint()
    noise = chain.noise(3)
    likelihood = ELBO(0.0)(chain, joint, noise=noise)
    kl = (likelihood - ELBO()(chain, joint, noise=noise)).mean()
    capacity = kl.item() - 0.5 if above else kl.item() + 0.5
    values = CapacityELBO(2 * capacity, 0.5)(chain, joint, noise=noise)
    torch.testing.assert_close(values, likelihood - 0.5)
    weights = list(vae.encoder.parameters())
    expected = gradients(likelihood.mean() + (-kl if above else kl), weights)
    torch.testing.assert_close(gradients(values.mean(), weights), expected)


class Halving:
    """q(z' | z) = N(z / 2, 3/4), with the exact reverse for z ~ N(0, 1), which it leaves as it is."""

    def __call__(self, z, context=None, noise=None):
        scale = torch.full_like(z, 0.75**0.5)
        z_next = z / 2 + scale * noise
        return z_next, normal_log_prob(z, z_next / 2, scale) - normal_log_prob(z_next, z / 2, scale)


@pytest.mark.parametrize("n_transitions", [0, 1, 3])
@pytest.mark.parametrize("objective", [ELBO(), AlphaELBO(), IWAE(4), AVO(), AVO(0.3)], ids=repr)
def test_an_exact_proposal_has_equal_weights_and_every_objective_is_log_z_for_each_sample(objective, n_transitions):
    base = DiagonalGaussian(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    target = Energy("three", lambda z: base.log_prob(z) + math.log(3))
    values = objective(Chain(base, [Halving()] * n_transitions), target, 50)
    torch.testing.assert_close(values, torch.full_like(values, math.log(3)), atol=1e-12, rtol=0)


@in_both_modes
@pytest.mark.parametrize("objective", FOR_IMAGES, ids=repr)
def test_duplicating_the_batch_of_an_auto_encoder_changes_no_loss(objective, train):
    if train and isinstance(objective, AVO):
        pytest.skip("its steps are decoded by running variances, which are of n - 1 images")
    values, noise = [], torch.randn((T + 1, 5, 6, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for copies in (1, 2, 5):
        vae, x = vae_and_images(train=train)
        x = x.repeat(copies, 1)
        loss = objective(vae.posterior(x), vae.joint(x), noise=noise.repeat(1, 1, copies, 1)).mean()
        values.append([loss.detach(), *gradients(loss, vae.kernels.parameters())])
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], atol=1e-8, rtol=1e-8)


@every_energy
def test_iwae_is_the_log_of_the_mean_weight_and_rises_with_the_number_of_samples(name):
    """On the same noise the mean over groups can't fall when groups are joined: Jensen's inequality, no statistics."""
    chain = toy_chain()
    noise, bounds = chain.noise(64), []
    for k in (1, 2, 8, 64):
        groups = noise.unflatten(1, (64 // k, k)).transpose(1, 2)
        found = IWAE(k)(chain, ENERGIES[name], noise=groups)
        by_hand = ELBO()(chain, ENERGIES[name], noise=groups).exp().mean(0).log()
        assert_alike(found, by_hand, chain.kernels.parameters())
        bounds.append(found.mean())
    assert all(low < high for low, high in itertools.pairwise(bounds))


@pytest.mark.parametrize("height", [0.0, 1e10, -1e10])
def test_iwae_of_weights_too_small_to_count_has_their_value_and_gradient_and_no_denormal_number(height):
    """Weights of 1, 1e-11, 4e-44 (which float32 can't hold in full) and 1e-87, wherever they lie."""
    seen = []

    def log_prob(z):
        seen.append(z.detach().requires_grad_())
        return 100 * seen[-1].squeeze(-1) - 0.5 * seen[-1].squeeze(-1).square() + height

    noise = torch.tensor([0.0, -0.25, -1.0, -2.0]).view(1, 4, 1)
    value = IWAE(4)(Chain(DiagonalGaussian.isotropic(1)), Energy("steep", log_prob, dim=1), noise=noise)
    log_weights = torch.tensor([0.0, -25, -100, -200], dtype=torch.float64) + 0.5 * math.log(2 * math.pi) + height
    assert value.item() == pytest.approx(float(torch.logsumexp(log_weights, 0) - math.log(4)), rel=1e-6)
    (gradient,) = torch.autograd.grad(value, seen[0])
    if height == 0:
        exact = torch.softmax(log_weights, 0) * (100 - noise.flatten().double())
        torch.testing.assert_close(gradient.flatten().double(), exact, rtol=1e-4, atol=1e-25)
    assert gradient.isfinite().all() and (height or not gradient[0, 2:].any())
    assert gradient.any() and not ((gradient != 0) & (gradient.abs() < torch.finfo().tiny)).any()


@pytest.mark.parametrize("sample_shape", [(), 4, (2, 4)])
@pytest.mark.parametrize("objective", FOR_IMAGES, ids=repr)
def test_objectives_draw_from_the_chain_and_have_a_value_for_each_sample(objective, sample_shape):
    shape = (sample_shape,) if isinstance(sample_shape, int) else sample_shape
    first, second = (chain_and_joint()[1:] for _ in range(2))
    values = objective(*first, sample_shape)
    assert values.shape == (*shape, 6)
    assert torch.equal(values, objective(*second, noise=second[0].noise(objective.draws(sample_shape))))
    if objective in (AlphaELBO(0.4), AVO(0.3)):
        assert objective(toy_chain(), ENERGIES["A"], sample_shape).shape == shape


class Tempered(Objective):
    """A reader's own objective whose `heat` may be a schedule."""

    heat: Annealing = 1.0

    def values(self, chain, target, noise):
        return (1 - self.heat) * ELBO().values(chain, target, noise)


@pytest.mark.parametrize(
    ("objective", "at_three"),
    [
        (ELBO(Linear(0.1, 0.1)), ELBO(0.4)),
        (IWAE(3, Linear(0.1, 0.1)), IWAE(3, 0.4)),
        (AVO(0.2, Linear(0.1, 0.1)), AVO(0.2, 0.4)),
        (LocalAVO(lambda step: step / 4), LocalAVO(0.75)),
        (AlphaELBO(Linear(0.1, 0.1)), AlphaELBO(0.4)),
        (CapacityELBO(20, Linear(0.1, 0.1)), CapacityELBO(20, 0.4)),
        (Tempered(Linear(0.1, 0.1)), Tempered(0.4)),
    ],
    ids=lambda each: type(each).__name__,  # without an address: processes must agree on it
)
def test_an_objective_of_a_step_has_the_schedules_values_there_and_can_not_be_called_without(objective, at_three):
    found = objective.at(3)
    for name in objective.annealed():
        assert getattr(found, name) == pytest.approx(getattr(at_three, name))
        assert found.replace(**{name: 0.5}) == at_three.replace(**{name: 0.5})
        with pytest.raises(TypeError, match=rf"is another objective at each step, by its {name}: call \.at\(step\)$"):
            objective(toy_chain(), ENERGIES["A"], 2)


class Still:
    """A kernel that leaves z as it is."""

    def __call__(self, z, context=None, noise=None):
        return z, z.new_zeros(z.shape[:-1])


class TestLearnedPath:
    """What teaches the exponents, and what that teaches nothing else."""

    @pytest.mark.parametrize("objective", [LocalAVO(0.5), AVO(1, 0.5), AVO(0.3, 0.5)], ids=repr)
    @pytest.mark.parametrize("sample_shape", [(), 4])
    def test_it_is_taught_by_path_fit_alone_and_changes_no_value_or_other_gradient(self, objective, sample_shape):
        vae, chain, joint = chain_and_joint()
        noise, learning = chain.noise(sample_shape), objective.replace(alphas=LearnedAlphas()).build(T)
        path = learning.alphas.double()
        found = learning(chain, joint, noise=noise)
        fixed = objective.replace(alphas=lambda n: path().detach())
        assert_alike(found, fixed(chain, joint, noise=noise), vae.parameters())
        chain.generator = torch.Generator().manual_seed(0)
        chain.noise(sample_shape)  # the draws for the path come after
        if sample_shape:
            fit = path_fit(chain, joint, path, noise=noise)
        else:  # from many draws for the first image
            fit = path_fit(chain[:1], joint[:1], path, PATH_SAMPLES).mean()
        ours, theirs = (gradients(each.mean(), [path.logits])[0] for each in (found, fit))
        torch.testing.assert_close(ours, getattr(objective, "weight", 1.0) * theirs)
        assert ours.any() and absent(gradients(fit, vae.parameters()))

    @pytest.mark.parametrize(("batch", "paths"), [((), ()), ((5,), ()), ((5,), (5,))])
    def test_it_is_taught_where_the_target_has_no_batch_and_one_draw_is_made(self, batch, paths):
        base = DiagonalGaussian(torch.zeros(*batch, 2), torch.ones(*batch, 2))
        chain = Chain(base, [Still()] * T, generator=torch.Generator().manual_seed(0))
        learning = LocalAVO(alphas=LearnedAlphas()).build(T, paths)
        assert present(gradients(learning(chain, ENERGIES["D"]), learning.alphas.parameters()))

    def test_path_fit_has_a_value_for_each_element_of_the_batch(self):
        base, path = DiagonalGaussian(draw(2, 2), 5 * draw(2, 2).exp()), LearnedPath(linear_alphas(T), (2,)).double()
        chain = Chain(base, nn.ModuleList(GatedGaussianPair(2, 8) for _ in range(T)).double())
        noise = chain.noise(64)
        values = path_fit(chain, ENERGIES["ring8"], path, noise=noise)
        alone = path_fit(chain[:1], ENERGIES["ring8"], path()[:, :1], noise=noise[:, :, :1])
        torch.testing.assert_close(alone, values[:1])
        assert (values <= 0).all(), "minus a sum of divergences"

    def test_a_path_that_leaves_the_transitions_nothing_to_do_fits_exactly(self):
        base = DiagonalGaussian.isotropic(2)
        chain = Chain(base, [Still()] * 3, generator=torch.Generator().manual_seed(0))
        assert path_fit(chain, Energy("base", base.log_prob), EXPONENTS, 500).abs() < 1e-6
        narrow = Energy("narrow", DiagonalGaussian.isotropic(2, 0.5).log_prob)
        assert path_fit(chain, narrow, EXPONENTS, 500) < -0.1

    def test_it_is_learned_to_where_its_optimum_is_in_as_many_dimensions(self):
        """From N(0, I) to N(0.5, 1.2^2 I) by kernels that do nothing: the best exponents by numerical optimisation."""
        torch.manual_seed(0)
        path, dim = LearnedPath(linear_alphas(5)).double(), 40
        wide = Energy("wide", lambda z: normal_log_prob(z, torch.full_like(z, 0.5), torch.full_like(z, 1.2)))
        chain = Chain(DiagonalGaussian(torch.zeros(dim).double(), torch.ones(dim).double()), [Still()] * 5)
        optimiser = torch.optim.Adam(path.parameters(), 0.05, maximize=True)
        for _ in range(150):
            optimiser.zero_grad()
            path_fit(chain, wide, path, PATH_SAMPLES).backward()
            optimiser.step()
        exact = torch.tensor([0.0, 0.243, 0.462, 0.659, 0.838, 1.0]).double()
        torch.testing.assert_close(path().detach(), exact, atol=0.12, rtol=0)


def test_with_samples_avo_keeps_the_kernels_and_the_importance_weighted_bound_teaches_the_rest():
    torch.manual_seed(0)
    vae = VAE(3, 8, Gated(4).build(3, 2, 8)).double().eval()
    x, noise = torch.bernoulli(torch.full((5, 784), 0.3)).double(), torch.randn(3, 4, 5, 3).double()
    parts = {"kernels": list(vae.kernels.parameters()), "rest": [*vae.encoder.parameters(), *vae.decoder.parameters()]}

    def gradients(objective, part, change=lambda chain: chain):
        values = objective.values(change(vae.posterior(x)), vae.joint(x), noise)
        found = torch.autograd.grad(values.mean(), parts[part], allow_unused=True)
        return values, [torch.zeros_like(p) if g is None else g for g, p in zip(found, parts[part], strict=True)]

    assert AVO(samples=4).draws(7) == (4, 7) and AVO().draws(7) == (7,)
    values, kernels = gradients(AVO(samples=4), "kernels")
    torch.testing.assert_close(values, gradients(IWAE(4), "rest")[0])
    for found, expected in zip(kernels, gradients(LocalAVO(), "kernels")[1], strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(gradients(AVO(samples=4), "rest")[1], gradients(IWAE(4), "rest")[1], strict=True):
        torch.testing.assert_close(found, expected)
