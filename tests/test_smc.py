"""Moves among flows, exponents that fit: weights of AIS, unbiased, right where that is known."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from annealed_core.ais import ais, conditional_divergence
from annealed_core.dais import TargetChain, chain_of
from annealed_core.description import from_json, to_json
from annealed_core.evidence import mode_masses
from annealed_core.fit import fit
from annealed_core.flows import Spline
from annealed_core.kernels import DiagonalGaussian
from annealed_core.nested import NVI, sequential
from annealed_core.objectives import AVO, ELBO
from annealed_core.running.density import Density
from annealed_core.running.experiment import run
from annealed_core.running.mnist import Mnist
from annealed_core.smc import SMC, AdaptiveAlphas, Moved, adaptive_alphas
from annealed_core.targets import ENERGIES, GeometricAlphas
from annealed_core.vae import Independent

D, SPLINE = ENERGIES["D"], Spline(hidden=8, scale=2.0)
seeded = lambda seed=0: torch.Generator().manual_seed(seed)


def chain(kernel, n=4, target=D, seed=1):
    torch.manual_seed(0)
    base = DiagonalGaussian(torch.zeros(2).double(), torch.full((2,), 2.0).double())
    kernels = list(torch.nn.ModuleList(kernel.build(2, n)).double())
    return chain_of(base, kernels, generator=seeded(seed), target=lambda: target)


class Narrow:
    """3 * N((3, 0), diag(0.25, 1)), from N(0, I): f_t is Gaussian too."""

    dim, log_normalizer = 2, math.log(3)

    def log_prob(self, z):
        loc, variance = z.new_tensor([3.0, 0.0]), z.new_tensor([0.25, 1.0])
        return math.log(3) - 0.5 * ((z - loc).square() / variance + variance.log()).sum(-1) - math.log(2 * math.pi)


def divergence(a, b):
    """KL(f_a || f_b) on that path, of its first dimension."""
    (mean_a, precision_a), (mean_b, precision_b) = ((12 * x / (1 + 3 * x), 1 + 3 * x) for x in (a, b))
    ratio = precision_b / precision_a
    return 0.5 * (ratio - 1 - math.log(ratio) + precision_b * (mean_b - mean_a) ** 2)


# ---- moves as kernels


@pytest.mark.parametrize("move", ["metropolis", "langevin", "hamiltonian"])
def test_moves_alone_have_the_weight_of_annealed_importance_sampling(move):
    found = chain(Moved(move=move, step=0.3, alphas=GeometricAlphas(0.1)))
    drawn = found.rsample(200)
    alphas = GeometricAlphas(0.1)(4).double()
    slopes = D.log_prob(drawn.z[:-1]) - found.base.log_prob(drawn.z[:-1])
    torch.testing.assert_close(found.log_weight(D, drawn), (alphas.diff()[:, None] * slopes).sum(0), atol=1e-6, rtol=0)
    assert (drawn.z[1:] != drawn.z[:-1]).double().mean() > 0.2


@pytest.mark.parametrize("move", ["metropolis", "hamiltonian"])
def test_where_the_base_is_exact_all_weights_are_equal(move):
    class Twice:
        dim = 2
        log_prob = staticmethod(lambda z: math.log(2) + found.base.log_prob(z))

    found = chain(Moved(move=move, step=0.3))
    found = found.replace(target=Twice())
    log_weights = found.log_weight(Twice(), found.rsample(50))
    torch.testing.assert_close(log_weights, torch.full_like(log_weights, math.log(2)))


@pytest.mark.parametrize("flow", [None, SPLINE])
def test_resampling_between_flows_and_moves_keeps_the_estimate_of_z_unbiased(flow):
    found = chain(Moved(flow, move="metropolis", step=0.3))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded()))
        estimates = [sequential(found, D, 40, resample=0.9) for _ in range(300)]
    z = torch.stack([each.log_z for each in estimates]).exp()
    assert min(each.resamplings for each in estimates) > 0
    assert abs(float(z.mean()) - 1) < 4 * float(z.std()) / 300**0.5 < 0.4


def test_moves_that_cut_gradients_leave_each_flow_its_local_objective():
    found = chain(Moved(SPLINE, move="hamiltonian"), n=2)
    noise, weights = found.noise(30), list(found.kernels[0].parameters())
    values = ELBO()(found, D, noise=noise)
    y, log_det = found.kernels[0].flow(found.base.rsample(noise[0]))
    local = found.log_prob(y, 0.5) + log_det
    for ours, theirs in zip(
        torch.autograd.grad(values.sum(), weights), torch.autograd.grad(local.sum(), weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_through_metropolis_moves_the_bound_reaches_every_flow():
    found = chain(Moved(SPLINE, move="metropolis", step=1e-3), n=2)
    noise, weights = found.noise(30), list(found.kernels[0].parameters())
    plain = chain_of(found.base, [each.flow for each in found.kernels])  # what moves of no length leave
    ours, theirs = (torch.autograd.grad(ELBO()(each, D, noise=noise).sum(), weights) for each in (found, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=0.3, rtol=0.05)


def test_a_decoder_learns_at_the_end_of_a_chain_of_moves_that_cut_gradients():
    kernel = Moved(move="hamiltonian", step=0.3)
    spec = Mnist(kernel=kernel, n_transitions=3, latents=3, width=8, decoder=Independent(norm=False))
    torch.manual_seed(0)
    vae = spec.auto_encoder().double().eval()  # steps stand still
    x = torch.bernoulli(torch.full((5, 784), 0.3)).double()
    found, joint = vae.posterior(x, seeded()), vae.joint(x)
    noise, state = found.noise(), found.generator.get_state()
    weights = list(vae.decoder.parameters())
    gradients = torch.autograd.grad(ELBO()(found, joint, noise=noise).mean(), weights)
    found.generator.set_state(state)
    last = found.rsample(noise=noise).z[-1].detach()
    for ours, theirs in zip(gradients, torch.autograd.grad(joint.log_prob(last).mean(), weights), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_steps_of_the_moves_adapt_in_training_and_stand_still_after():
    found = chain(Moved(move="metropolis", step=5.0), n=2)
    before = found.kernels[0].log_step.clone()
    with torch.no_grad():
        found.rsample(10)
    found.rsample(10)
    assert found.kernels[0].log_step < before
    for kernel in found.kernels:
        kernel.eval()
    before = found.kernels[0].log_step.clone()
    found.rsample(10)
    assert found.kernels[0].log_step == before


@pytest.mark.parametrize("objective", [NVI(resample=True), ELBO(), AVO()], ids=repr)
def test_flows_train_between_moves(objective):
    found = chain(Moved(SPLINE, move="metropolis" if objective == ELBO() else "hamiltonian", n_leapfrog=2), n=3)
    bound = lambda: float(sequential(found, D, 2000, resample=0.0).log_weights.mean())
    before = bound()
    fit(found, D, objective, steps=60, batch=32, lr=2e-2)
    assert before + 0.5 < bound() < 0


def test_a_density_is_fitted_by_flows_and_moves_and_found_again(store):
    spec = Density(
        target="ring8", kernel=Moved(Spline(hidden=8), n_leapfrog=2), n_transitions=2, objective=NVI(resample=True),
        steps=20, batch=32, samples=500,
    )  # fmt: skip
    assert spec.stack_key() is None and from_json(to_json(spec)) == spec
    found = run(spec)
    assert isinstance(found.chain, TargetChain) and found.chain.kernels[0].flow.scale == 5
    assert run(spec).metrics == found.metrics and found.chain.kernels[0].log_step != math.log(0.1)


# ---- exponents that fit


def test_the_divergence_between_steps_is_that_of_gaussians():
    z = torch.randn(200_000, 2, generator=seeded()).double()
    base = DiagonalGaussian(torch.zeros(2).double(), torch.ones(2).double())
    slope = Narrow().log_prob(z) - base.log_prob(z)
    none = torch.zeros_like(slope)
    for alpha in (0.02, 0.1):
        assert float(conditional_divergence(none, alpha * slope)) == pytest.approx(divergence(0, alpha), rel=0.03)
    assert float(conditional_divergence(none, none + 3)) == pytest.approx(0, abs=1e-12)
    # Of particles that carry the weights of f_a.
    found = float(conditional_divergence(0.1 * slope, 0.1 * slope))
    assert found == pytest.approx(divergence(0.1, 0.2), rel=0.2)


def test_annealing_takes_steps_of_the_divergence_that_it_is_given():
    base = DiagonalGaussian.isotropic(2)
    found = ais(Narrow(), base, 4000, kl=0.2, resample=0.5, generator=seeded())
    steps = [divergence(a, b) for a, b in zip(found.alphas.tolist(), found.alphas[1:].tolist(), strict=False)]
    assert all(0.1 < each < 0.3 for each in steps[:-1]) and steps[-1] < 0.3
    assert abs(float(found.log_z) - math.log(3)) < 0.1
    assert len(ais(Narrow(), base, 4000, kl=0.05, generator=seeded()).alphas) > 1.5 * len(found.alphas)
    for wrong, message in (
        ({"kl": 0.0}, "kl must be above 0, got 0.0"),
        ({"kl": 0.1, "threshold": 0.5}, "threshold and kl exclude each other"),
        ({"kl": 0.1, "alphas": [0.0, 1.0]}, "alphas and kl exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            ais(Narrow(), base, 10, **wrong)


def test_adaptive_exponents_are_as_far_apart_in_divergence():
    alphas = adaptive_alphas(Narrow(), DiagonalGaussian.isotropic(2), 6).tolist()
    steps = [divergence(a, b) for a, b in itertools.pairwise(alphas)]
    linear = [divergence(n / 6, (n + 1) / 6) for n in range(6)]
    assert len(alphas) == 7 and max(steps) / min(steps) < 2.5 < max(linear) / min(linear)
    known = AdaptiveAlphas("ring8")
    assert torch.equal(known(4), known(4)) and from_json(to_json(known)) == known
    with pytest.raises(ValueError, match="unknown target 'ring9'"):
        AdaptiveAlphas("ring9")


# ---- the sampler that others are held against


def test_sequential_monte_carlo_chooses_exponents_resamples_and_moves():
    found = ais(D, DiagonalGaussian.isotropic(2), 2000, threshold=0.9, resample=0.5, generator=seeded())
    assert abs(float(found.log_z)) < 0.1 and float(found.ess) > 0.5 and len(found.alphas) > 3


def test_its_draws_are_kept_for_what_learns_from_them():
    few = {"particles": 500, "n_temperatures": 8, "n_leapfrog": 2, "base_scale": 2.0}
    sampler = SMC("D", **few)
    assert sampler() is SMC("D", **few)() and sampler().shape == (500, 2)
    assert (mode_masses(sampler(), D.modes[0]) - D.modes[1]).abs().max() < 0.1
    assert not torch.equal(sampler.replace(seed=1)(), sampler())
    asked = SimpleNamespace(dim=3, log_prob=DiagonalGaussian.isotropic(3).log_prob)
    assert float(sampler.draw(asked).std()) == pytest.approx(1, abs=0.1) and sampler.draw(asked).shape == (500, 3)


def test_its_draws_come_as_often_as_their_weights_say(monkeypatch):
    weighed = SimpleNamespace(z=torch.arange(4.0).view(4, 1), alphas=torch.tensor([0.0, 1.0]))
    weighed.log_weights = torch.tensor([0.0, 3.0, 0.0, 1.0]).log()
    monkeypatch.setattr("annealed_core.smc.ais", lambda *_, **__: weighed)
    assert SMC("D", particles=4, n_temperatures=1).draw(D).flatten().tolist() == [1, 1, 1, 3]
