"""Particles along the path: resampling keeps Z, nested objectives are AVO's under other weights."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal

from annealed_core.ais import ais
from annealed_core.chain import Chain
from annealed_core.dais import Drift, Leapfrog, chain_of
from annealed_core.evidence import log_mean_weight
from annealed_core.fit import fit
from annealed_core.flows import Planar
from annealed_core.kernels import DiagonalGaussian, Gated, normal_log_prob
from annealed_core.moves import Metropolis
from annealed_core.nested import NVI, TrajectoryBalance, chosen, resampled, sequential, steps_of
from annealed_core.objectives import ELBO, avo_steps
from annealed_core.running.density import Density
from annealed_core.running.experiment import run
from annealed_core.running.external import External
from annealed_core.schedules import Mixed, Then
from annealed_core.targets import ENERGIES, GeometricPath, LinearAlphas, linear_alphas

D = ENERGIES["D"]


def chain(n=3, start="identity", batch=()):
    torch.manual_seed(0)
    base = DiagonalGaussian(torch.zeros(*batch, 2).double(), torch.full((*batch, 2), 2.0).double())
    return Chain(base, torch.nn.ModuleList(Gated(8, start).build(2, n)).double())


def walk(z, context=None, noise=None):
    """A step there and back are equally likely: its log-ratio is 0."""
    return z + 0.5 * noise, torch.zeros_like(z[..., 0])


def test_each_particle_goes_on_as_often_as_its_weight_says():
    log_weights = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double() * 2
    expected = 50 * torch.softmax(log_weights, 0)
    mean = torch.zeros(50, 3).double()
    for seed in range(400):
        index = resampled(log_weights, torch.Generator().manual_seed(seed))
        counts = torch.stack([torch.bincount(index[:, m], minlength=50) for m in range(3)], 1)
        assert (counts >= expected.floor()).all() and (counts <= expected.ceil()).all()
        mean += counts / 400
    assert (mean - expected).abs().max() < 0.1
    z = torch.arange(150.0).view(50, 3, 1)
    assert torch.equal(chosen(z, index)[:, 1, 0], z[index[:, 1], 1, 0])


def test_one_transition_is_avos():
    one = chain(1)
    noise = one.noise(64)
    for resample in (False, True):  # of equal weights each comes once
        values = NVI(resample=resample)(one, D, noise=noise)
        torch.testing.assert_close(values, avo_steps(one, D, LinearAlphas(), noise=noise).sum(0))


def test_without_resampling_the_local_objectives_are_weighted_by_what_was_earned_so_far():
    three = chain()
    noise = three.noise(64)
    local = avo_steps(three, D, LinearAlphas(), noise=noise)
    weights = torch.softmax(torch.cat([torch.zeros_like(local[:1]), local[:-1].detach().cumsum(0)]), 1)
    torch.testing.assert_close(NVI()(three, D, noise=noise).mean(), (weights * local).sum())


def test_kernels_that_are_exact_have_increments_of_the_normalisers_alone():
    alphas = torch.linspace(0, 1, 4).double()
    precision = 1 - alphas + 4 * alphas
    loc, scale = 6 * alphas / precision, precision.rsqrt()

    class Far:
        dim = 1

        def log_prob(self, z):
            return math.log(3) + Normal(1.5, 0.5).log_prob(z)[..., 0]

    def exact(t):
        def kernel(z, context=None, noise=None):
            z_next = loc[t] + scale[t] * noise
            return z_next, (Normal(loc[t - 1], scale[t - 1]).log_prob(z) - Normal(loc[t], scale[t]).log_prob(z_next))[
                ..., 0
            ]

        return kernel

    found = Chain(DiagonalGaussian(torch.zeros(1).double(), torch.ones(1).double()), [exact(t) for t in (1, 2, 3)])
    for increment, weights, _, _ in steps_of(found, Far(), alphas, found.noise(20), 0.5):
        assert increment.std() < 1e-9 and weights.std() < 1e-9
    result = sequential(found, Far(), 20, alphas)
    assert float(result.log_z) == pytest.approx(math.log(3)) and float(result.ess) == pytest.approx(1)
    assert result.resamplings == 0


@pytest.mark.parametrize("moves", ["walk", "metropolis"])
def test_resampling_keeps_the_estimate_of_z_unbiased(moves):
    found = chain()
    found = Chain(found.base, [walk] * 4)
    if moves == "metropolis":
        path = GeometricPath(found.base, D, linear_alphas(4))
        found = Chain(found.base, [Metropolis(path[t], step_size=0.8) for t in range(1, 5)])
    with torch.no_grad():
        estimates = [sequential(found, D, 40, resample=0.9) for _ in range(600)]
    z = torch.stack([each.log_z for each in estimates]).exp()
    assert min(each.resamplings for each in estimates) > 0
    assert abs(float(z.mean()) - 1) < 4 * float(z.std()) / 600**0.5 < 0.4


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_annealing_that_resamples_estimates_z_and_keeps_the_particles_even(threshold):
    base, generator = DiagonalGaussian.isotropic(2), torch.Generator().manual_seed(0)
    annealing = {"n_temperatures": 20, "threshold": threshold, "n_leapfrog": 3, "generator": generator}
    kept = ais(D, base, 2000, **annealing, resample=0.9)
    assert abs(float(kept.log_z)) < 0.1 and float(kept.ess) > 0.85
    assert float(kept.ess) > float(ais(D, base, 2000, **annealing).ess)
    with pytest.raises(ValueError, match=r"resample must lie in \(0, 1\), got 1"):
        ais(D, base, resample=1)


def test_annealing_that_resamples_is_unbiased_with_given_steps():
    base = DiagonalGaussian(torch.zeros(2), torch.full((2,), 2.0))
    few = {"n_temperatures": 4, "n_moves": 1, "move": "metropolis", "step_size": 0.8}
    z = torch.stack([ais(D, base, 40, **few, resample=0.9).log_z for _ in range(400)]).exp()
    assert abs(float(z.mean()) - 1) < 4 * float(z.std()) / 400**0.5 < 0.4


def test_without_resampling_it_is_importance_sampling():
    found, noise = chain(), chain().noise(200)
    result = sequential(found, D, 200, resample=0.0, noise=noise)
    log_weights = found.log_weight(D, found.rsample(noise=noise))
    torch.testing.assert_close(result.log_weights, log_weights)
    torch.testing.assert_close(result.log_z, log_mean_weight(log_weights)[0])


def test_a_batch_of_chains_is_resampled_each_by_its_own_weights():
    found = Chain(chain(batch=(3,)).base, [walk] * 3)

    class Three:
        dim = 2

        def log_prob(self, z):
            centres = torch.tensor([[0.0, 0], [1, 1], [-1, 2]]).double()
            return normal_log_prob(z, centres, torch.ones_like(z))

    result = sequential(found, Three(), 4000, resample=0.99)
    assert result.log_z.shape == (3,) and result.log_z.abs().max() < 0.3


@pytest.mark.parametrize("resample", [False, True])
def test_it_trains_kernels_and_nothing_else(resample, store):
    found = chain(start="torch")
    before = float(sequential(found, D, 2000, resample=0.0).ess)
    fit(found, D, NVI(resample=resample), steps=300, batch=64, lr=5e-3)
    assert float(sequential(found, D, 2000, resample=0.0).ess) > before + 0.1
    spec = Density(target="D", objective=NVI(resample=resample), n_transitions=2, steps=10, batch=16, samples=500)
    assert spec.stack_key() is None and run(spec).metrics["kernels_earn_se"] > 0


@pytest.mark.parametrize("objective", [NVI(), TrajectoryBalance()])
@pytest.mark.parametrize("batch", [(), 1])
def test_a_single_draw_is_refused(objective, batch):
    chain = Chain(DiagonalGaussian.isotropic(2), Gated(hidden=8).build(2, 2))
    with pytest.raises(
        ValueError, match=rf"^{type(objective).__name__} must have 2 or more draws .*, got \({batch or ''}"
    ):
        fit(chain, ENERGIES["D"], objective, batch=batch, steps=1)


def test_trajectory_balance_takes_pairs_of_gaussians_and_steps_along_a_path_are_none():
    chain = Chain(DiagonalGaussian.isotropic(2), Planar().build(2, 2))
    with pytest.raises(TypeError, match=r"^kernels must be pairs of Gaussians, such as .* got Planar\w*$"):
        fit(chain, ENERGIES["D"], TrajectoryBalance(), steps=1)
    chain = chain_of(chain.base, Leapfrog().build(2, 2), target=lambda: ENERGIES["D"])
    with pytest.raises(TypeError, match=r"^a LeapfrogStep can't be called by itself, but along the path"):
        fit(chain, ENERGIES["D"], NVI(), steps=1)


def test_trajectory_balance_of_a_drift_needs_no_second_derivatives():
    target = External(lambda z: (-0.5 * (z**2).sum(-1), -z), 2)
    chain = chain_of(DiagonalGaussian.isotropic(2), Drift().build(2, 2), target=lambda: target)
    fitted = fit(chain, target, TrajectoryBalance(), steps=3, batch=8)
    assert math.isfinite(fitted.history[-1]["objective"])


def test_where_the_target_is_0_the_start_of_a_path_is_not():
    target = SimpleNamespace(log_prob=lambda z: torch.full(z.shape[:-1], -torch.inf), dim=2)
    path = GeometricPath(DiagonalGaussian.isotropic(2), target, [0, 0.5, 1])
    assert path[0].log_prob(torch.zeros(3, 2)).isfinite().all() and path[1].log_prob(torch.zeros(2)) == -torch.inf


@pytest.mark.parametrize("objective", [NVI(), Then(NVI(), ELBO(), 5), Mixed(ELBO(), TrajectoryBalance())])
def test_models_are_trained_one_at_a_time_wherever_the_objective_is(objective):
    assert Density(objective=objective).stack_key() is None and Density(objective=ELBO()).stack_key() is not None
