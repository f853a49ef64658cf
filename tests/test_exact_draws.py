"""Draws against exact ones: the figures see what they should, and bounds enclose log Z."""

import math

import pytest
import torch

from annealed_core.chain import Chain
from annealed_core.dais import Drift, Leapfrog, TargetChain, chain_of
from annealed_core.description import from_json, to_json
from annealed_core.evidence import log_mean_weight, mode_masses, total_variation
from annealed_core.fit import fit
from annealed_core.flows import IAF, Planar, Spline
from annealed_core.judging.draws import coverage, energy_distance, exact_draws, parallel_tempering, upper_bound
from annealed_core.kernels import DiagonalGaussian, Gated
from annealed_core.moves import Metropolis
from annealed_core.nested import Inclusive, reverse_log_weights
from annealed_core.objectives import ELBO
from annealed_core.running.density import Density
from annealed_core.running.experiment import run
from annealed_core.smc import SMC, Moved
from annealed_core.targets import ENERGIES

D = ENERGIES["D"]


def drawn(name, n=20_000, seed=0):
    return exact_draws(ENERGIES[name], n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["A", "B", "C", "D", "E", "F", "ring8"])
def test_exact_draws_of_the_plane_are_as_near_as_a_histogram_can_tell(name):
    assert total_variation(drawn(name), ENERGIES[name]) < 0.06


def test_exact_draws_have_the_moments_that_are_known():
    modes = ENERGIES["gmm40"].modes
    assert (mode_masses(drawn("gmm40"), modes[0]) - modes[1]).abs().max() < 0.02
    funnel = drawn("funnel")
    assert float(funnel[:, 0].std()) == pytest.approx(3, rel=0.03)
    assert float((funnel[:, 1:] * (-0.5 * funnel[:, :1]).exp()).std()) == pytest.approx(1, rel=0.02)
    many, energy = drawn("many_well"), ENERGIES["many_well"]
    x = torch.linspace(-4, 4, 20_001).double()
    mass = torch.softmax(-(x**4) + 6 * x**2 + 0.5 * x, 0)
    assert float((many[:, ::2] > 0).double().mean()) == pytest.approx(float(mass[x > 0].sum()), abs=0.005)
    assert float(many[:, ::2].square().mean()) == pytest.approx(float((mass * x**2).sum()), rel=0.01)
    assert float(many[:, 1::2].std()) == pytest.approx(1, rel=0.01) and many.shape[1] == energy.dim
    with pytest.raises(ValueError, match="no exact draws are known"):
        exact_draws(ENERGIES["many_well"].__class__("mine", lambda z: -z.square().sum(-1), dim=3), 5)


def test_the_energy_distance_is_nought_for_the_same_and_known_for_points_apart():
    assert abs(energy_distance(drawn("D", 1500), drawn("D", 1500, 1))) < 0.01
    assert energy_distance(torch.zeros(5, 1), torch.full((7, 1), 3.0)) == pytest.approx(6)
    without = drawn("D", 1500)
    without = without[(without - torch.tensor([-2.0, 0])).norm(dim=1) > 1.5]  # a mode of a tenth of the mass
    assert energy_distance(without, drawn("D", 1500, 1)) > 0.015


def test_coverage_is_the_level_where_draws_are_right_and_less_where_they_are_too_sure():
    z = torch.randn(40_000, 2, generator=torch.Generator().manual_seed(0)).double()
    right, sure = coverage(z[:20_000], z[20_000:]), coverage(z[:20_000] * torch.tensor([1.0, 0.5]), z[20_000:])
    assert (right - 0.9).abs().max() < 0.01
    inside = math.erf(0.5 * 1.6449 / 2**0.5)
    assert float(sure[0]) == pytest.approx(0.9, abs=0.01) and float(sure[1]) == pytest.approx(inside, abs=0.01)
    assert float(coverage(z, z, 0.5)[0]) == pytest.approx(0.5, abs=1e-3)


KERNELS = {
    "gated": Gated(8),
    "spline": Spline(hidden=8, scale=2.0),
    "drift": Drift(0.02, hidden=8),
    "moved": Moved(Spline(hidden=8, scale=2.0), move="metropolis", n_moves=2, step=0.3),
    "hamiltonian": Moved(step=0.3),
}


def shaken(kernel, n=2):
    """A chain towards D whose kernels are neither the identity nor good."""
    torch.manual_seed(0)
    kernels = torch.nn.ModuleList(kernel.build(2, n)).double().eval()
    with torch.no_grad():
        for parameter in kernels.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    base = DiagonalGaussian(torch.zeros(2).double(), torch.full((2,), 2.0).double())
    return chain_of(base, list(kernels), generator=torch.Generator().manual_seed(1), target=lambda: D)


@pytest.mark.parametrize("name", KERNELS)
def test_paths_forwards_and_back_enclose_log_z(name):
    found = shaken(KERNELS[name])
    with torch.no_grad():
        forwards = found.log_weight(D, found.rsample(20_000))
        back = reverse_log_weights(found, D, drawn("D"))
    below, bounds = float(log_mean_weight(forwards)[0]), upper_bound(found, D, drawn("D"))
    assert float(forwards.mean()) < below < bounds["log_z_above"] + 0.2 < bounds["eubo"] + 0.2 and bounds["eubo"] > 0.01
    # Crooks' relation: E w g(w) over paths forwards is Z E g(w) over those back, here with w g(w) = w / (1 + w).
    ours, theirs = torch.sigmoid(forwards), torch.sigmoid(-back)
    error = float((ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt())
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error < 0.02


def test_of_an_exact_chain_the_bounds_meet():
    base = DiagonalGaussian(torch.zeros(2).double(), torch.ones(2).double())
    bounds = upper_bound(Chain(base, []), base, torch.randn(100, 2).double())
    assert bounds == pytest.approx({"eubo": 0.0, "log_z_above": 0.0}, abs=1e-12)


def test_a_kernel_that_can_not_be_gone_back_is_refused():
    base = DiagonalGaussian.isotropic(2)
    with pytest.raises(ValueError, match="kernel Metropolis can't be gone back"):
        upper_bound(Chain(base, [Metropolis(D, 0.1)]), D, torch.zeros(3, 2))
    leaping = chain_of(base, Leapfrog().build(2, 1), target=lambda: D)
    assert isinstance(leaping, TargetChain)
    with pytest.raises(ValueError, match="kernel LeapfrogStep can't be gone back"):
        upper_bound(leaping, D, torch.zeros(3, 2))


# ---- the objective that goes back from draws


def test_backwards_the_gradient_is_that_of_the_flows_log_density():
    found, z = shaken(IAF(hidden=8)), drawn("D", 200)
    objective = Inclusive(lambda: z)
    values = objective(found, D, 4000)
    weights = list(torch.nn.ModuleList(found.kernels).parameters())
    ours = torch.autograd.grad(values.mean(), weights)
    state, log_q = z, torch.zeros(len(z)).double()
    for kernel in reversed(found.kernels):
        state = kernel.inverse(state)
        log_q = log_q - kernel(state)[1]
    theirs = torch.autograd.grad((log_q + found.base.log_prob(state)).mean(), weights)
    assert values.shape == (4000,) and float(values.detach().mean()) < 0.1  # log Z of D is 0
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) < 0.2 * float(b.norm())


def test_of_an_exact_chain_each_value_is_minus_log_z():
    base = DiagonalGaussian(torch.zeros(2).double(), torch.ones(2).double())
    values = Inclusive(lambda: torch.randn(50, 2))(Chain(base, []), base, 64)
    torch.testing.assert_close(values, torch.zeros(64).double())


@pytest.mark.parametrize("kernel", [Gated(hidden=16), Spline(hidden=16, scale=1.5)])
def test_it_finds_again_a_mode_that_is_lost(kernel):
    torch.manual_seed(0)
    kernels = torch.nn.ModuleList(kernel.build(2, 4))
    chain = Chain(DiagonalGaussian.isotropic(2), kernels)
    masses = lambda: mode_masses(chain.rsample(4000).z[-1], D.modes[0])
    fit(chain, DiagonalGaussian(D.modes[0][0], torch.full((2,), 0.5)), ELBO(), steps=300, batch=64, lr=1e-2)
    assert masses()[0] > 0.9
    fit(chain, D, ELBO(), steps=300, batch=64, lr=1e-3)
    assert masses()[[1, 3]].max() < 0.05  # which the ELBO does not
    draws = drawn("D")
    fit(chain, D, Inclusive(lambda: draws), steps=500, batch=64, lr=1e-2)
    assert (masses() - D.modes[1]).abs().max() < 0.12


def test_it_is_run_and_kept_as_others_are(store):
    sampler = SMC("D", particles=300, n_temperatures=4)
    spec = Density(target="D", objective=Inclusive(sampler), kernel=IAF(8), n_transitions=2, steps=10, batch=16)
    assert from_json(to_json(spec)) == spec and spec.stack_key() is None
    assert run(spec).metrics == run(spec).metrics


def test_kernels_without_a_gradient_back_are_refused():
    chain = Chain(DiagonalGaussian.isotropic(2), Planar().build(2, 2))
    with pytest.raises(TypeError, match=r"^the inverse of PlanarFlow gives no gradient"):
        fit(chain, D, Inclusive(lambda: drawn("D", 10)), steps=1)
    with pytest.raises(ValueError, match=r"of Inclusive: sampler takes a function that gives draws"):
        Inclusive(torch.zeros(3, 2))


# ---- a reference where none is known


def test_parallel_tempering_visits_modes_by_their_masses():
    base, centres = DiagonalGaussian.isotropic(2, 2.0), D.modes[0]
    z = parallel_tempering(
        D, base, torch.tensor([0.0, 0.05, 0.3, 1.0]), 700, 32, 100, generator=torch.Generator().manual_seed(0)
    )
    assert z.shape == (700, 32, 2)
    masses = torch.stack([mode_masses(each, centres) for each in z.transpose(0, 1)])
    error = masses.std(0) / 32**0.5
    assert ((masses.mean(0) - D.modes[1]).abs() < 4 * error).all() and error.max() < 0.02
    nearest = z.flatten(0, 1)[torch.cdist(z.flatten(0, 1), centres).min(1).values < 1]
    radius = torch.cdist(nearest, centres).min(1).values
    assert float(radius.square().mean()) == pytest.approx(
        0.4 * (1 - 2.5 * math.exp(-2.5) / (1 - math.exp(-2.5))), rel=0.05
    )
