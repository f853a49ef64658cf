"""Markov moves: they are those of the textbooks, keep their target, and make annealed importance sampling."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from draws import draw
from torch.distributions import Normal

from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian
from annealed_core.moves import Hamiltonian, Langevin, Metropolis
from annealed_core.targets import ENERGIES, Energy, GeometricPath, linear_alphas

MOVES = {
    "metropolis": lambda target, step, n_moves=1, generator=None: Metropolis(target, step, n_moves, generator),
    "langevin": lambda target, step, n_moves=1, generator=None: Langevin(target, step, n_moves, generator),
    "hamiltonian": lambda target, step, n_moves=1, generator=None: Hamiltonian(target, step, 5, n_moves, generator),
}
every_move = pytest.mark.parametrize("name", MOVES)


def gaussian():
    return DiagonalGaussian(*torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64))


@every_move
@pytest.mark.parametrize("n_moves", [1, 4])
def test_a_move_leaves_a_gaussian_invariant(name, n_moves):
    torch.manual_seed(0)
    n, target = 40_000, gaussian()
    start = z = target.rsample(draw(n, 2))
    move = MOVES[name](target, 0.7, n_moves)
    for _ in range(12 // n_moves):
        z, _ = move(z)
    assert 0.3 < move.acceptance < 0.95 and (z != start).any(-1).float().mean() > 0.9
    standard = (z - target.loc) / target.scale
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = (standard**power).mean(0) - mean
        assert (error.abs() < 5 * (variance / n) ** 0.5).all(), (power, error)


@every_move
@pytest.mark.parametrize("n_moves", [1, 5])
@pytest.mark.parametrize("shape", [(), (7,), (4, 3)])
def test_log_ratio_is_the_fall_of_the_targets_log_density(name, n_moves, shape):
    torch.manual_seed(0)
    z = draw(*shape, 2).requires_grad_()
    z_next, log_ratio = MOVES[name](ENERGIES["A"], 0.3, n_moves)(z)
    assert z_next.shape == z.shape and log_ratio.shape == shape
    fall = ENERGIES["A"].log_prob(z) - ENERGIES["A"].log_prob(z_next)
    torch.testing.assert_close(log_ratio.detach(), fall.detach())
    assert z_next.requires_grad == log_ratio.requires_grad == (name == "metropolis") and z.grad is None


def slope(z):
    """The gradient of B's log-density."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(ENERGIES["B"].log_prob(z).sum(), z)[0]


def walk(z, noise, step):
    """The proposal of a random walk, and log q(z | proposal) - log q(proposal | z)."""
    return z + step * noise, 0.0


def drift(z, noise, step):
    """The same of Langevin's proposal, from the densities."""
    means = Normal(z + 0.5 * step**2 * slope(z), step)
    proposal = means.loc + step * noise
    back = Normal(proposal + 0.5 * step**2 * slope(proposal), step)
    return proposal, back.log_prob(z).sum(-1) - means.log_prob(proposal).sum(-1)


def leap(n_leapfrog):
    """The same of the leapfrog as it is printed in Neal 2011, section 2.3: the momenta's densities are in its place."""

    def steps(z, momentum, step):
        for _ in range(n_leapfrog):
            momentum = momentum + step / 2 * slope(z)
            z = z + step * momentum
            momentum = momentum + step / 2 * slope(z)
        return z, momentum

    def propose(z, noise, step):
        proposal, momentum = steps(z, noise, step)
        back, momentum_back = steps(proposal, -momentum, step)
        torch.testing.assert_close(back, z, atol=1e-6, rtol=0)  # reversible: what the correction relies on
        torch.testing.assert_close(momentum_back, -noise, atol=1e-6, rtol=0)
        return proposal, 0.5 * (noise.square() - momentum.square()).sum(-1)

    return propose


@pytest.mark.parametrize(
    "move, propose",
    [
        (Metropolis(ENERGIES["B"], 0.4), walk),
        (Langevin(ENERGIES["B"], 0.4), drift),
        *((Hamiltonian(ENERGIES["B"], 0.4, n), leap(n)) for n in (1, 2, 7)),
    ],
)
def test_a_proposal_and_its_acceptance_are_those_of_the_textbook(move, propose):
    torch.manual_seed(0)
    z, noise = 1.5 * draw(500, 2), draw(500, 2)
    proposal, correction = propose(z, noise, 0.4)
    by_hand = (ENERGIES["B"].log_prob(proposal) - ENERGIES["B"].log_prob(z) + correction).clamp(max=0).exp()
    assert math.isnan(move.acceptance)
    z_next, _ = move(z, None, noise)
    torch.testing.assert_close(move.accepted, by_hand)
    assert move.acceptance == pytest.approx(float(by_hand.mean()))
    moved = (z_next != z).any(-1)
    torch.testing.assert_close(z_next[moved], proposal[moved])
    assert float(moved.double().mean()) == pytest.approx(move.acceptance, abs=0.06)


@every_move
def test_each_state_has_its_own_step_size(name):
    torch.manual_seed(0)
    z, noise, steps = draw(3, 4, 2), draw(3, 4, 2), 0.1 + 0.3 * torch.rand(3, 4, dtype=torch.float64)
    move = MOVES[name](gaussian(), steps)
    move(z, None, noise)
    for row in range(3):
        for column in range(4):
            alone = MOVES[name](gaussian(), float(steps[row, column]))
            alone(z[row, column], None, noise[row, column])
            torch.testing.assert_close(alone.accepted, move.accepted[row, column])


@every_move
def test_where_the_density_is_zero_a_proposal_is_rejected(name):
    torch.manual_seed(0)
    n, inside = 20_000, Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    half = Energy("half", lambda z: torch.where(z[..., 0] > 0, inside.log_prob(z).sum(-1), -torch.inf), dim=1)
    z = start = draw(n, 1).abs()
    for _ in range(10):
        z, log_ratio = MOVES[name](half, 0.3)(z)
        assert log_ratio.isfinite().all()
    assert (z > 0).all() and (z != start).float().mean() > 0.9
    assert float(z.mean()) == pytest.approx((2 / math.pi) ** 0.5, abs=0.02)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.05)


@every_move
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_state_that_cannot_leave_has_log_ratio_zero_and_one_that_can_minus_infinity(name, value):
    torch.manual_seed(0)
    right = lambda z: torch.where(z[..., 0] > 0, -0.5 * z.square().sum(-1), value)
    outside = Energy("right", right, dim=2)
    far, near = draw(100, 2) - 50, draw(100, 2) * torch.tensor([0.0, 1.0]) - 1e-9
    z_next, log_ratio = MOVES[name](outside, 0.3)(far)
    assert torch.equal(z_next, far)
    if value == -math.inf:
        assert not log_ratio.any()
        z_next, log_ratio = MOVES[name](outside, 0.3)(near)
        came_in = z_next[:, 0] > 0
        assert came_in.any() and (log_ratio[came_in] == -math.inf).all() and not log_ratio[~came_in].any()


@every_move
def test_a_density_without_a_gradient_is_explored_all_the_same(name):
    torch.manual_seed(0)
    square = Energy("square", lambda z: torch.where((z.abs() < 1).all(-1), 0.0, -torch.inf).to(z))
    z = 2 * torch.rand(20_000, 2, dtype=torch.float64) - 1
    for _ in range(10):
        z, _ = MOVES[name](square, 0.2)(z)
    assert (z.abs() < 1).all()
    assert torch.allclose(z.square().mean(0), torch.tensor(1 / 3, dtype=torch.float64), atol=0.01)


@every_move
def test_a_chain_of_moves_has_unbiased_weights(name):
    torch.manual_seed(0)
    base = DiagonalGaussian(torch.zeros(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64))
    target = Energy("5 N", lambda z: gaussian().log_prob(z) + math.log(5))
    path = GeometricPath(base, target, linear_alphas(8))
    chain = Chain(base, [MOVES[name](path[t], 0.5, 6 if name == "metropolis" else 2) for t in range(1, 9)])
    trajectory = chain.rsample(20_000)
    log_weight = chain.log_weight(target, trajectory)
    z = trajectory.z
    textbook = sum(path[t].log_prob(z[t - 1]) - path[t - 1].log_prob(z[t - 1]) for t in range(1, 9))
    torch.testing.assert_close(log_weight, textbook, atol=1e-9, rtol=0)
    estimate, error = evidence.log_mean_weight(log_weight)
    assert error < 0.02 and abs(estimate - math.log(5)) < 4 * error
    alone = Chain(base)
    importance = alone.log_weight(target, alone.rsample(20_000))
    assert evidence.effective_sample_size(log_weight) > 1.5 * evidence.effective_sample_size(importance)


@every_move
def test_beyond_the_given_noise_all_randomness_comes_from_the_generator(name):
    z, noise, found = draw(50, 2), draw(50, 2), []
    before = torch.get_rng_state()
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        found.append(MOVES[name](ENERGIES["A"], 0.5, 3, generator)(z, None, noise)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), before)


@every_move
@pytest.mark.parametrize("constant", [-1e6, 1e6])
def test_a_large_constant_in_the_log_density_changes_nothing(name, constant):
    shifted = Energy("shifted", lambda z: gaussian().log_prob(z) + constant)
    z, found = draw(200, 2), []
    for target in (gaussian(), shifted):
        move = MOVES[name](target, 0.5, 3, torch.Generator().manual_seed(0))
        found.append((*move(z), move.accepted))
    for plain, large in zip(*found, strict=True):
        torch.testing.assert_close(plain, large, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"step_size": 0.0}, "step_size must be finite and above 0, got 0.0"),
        ({"step_size": math.nan}, "step_size must be finite and above 0, got nan"),
        ({"step_size": torch.tensor([0.1, -0.1])}, r"step_size must be finite and above 0, got tensor\("),
        ({"step_size": "large"}, "step_size must be a number above 0, got 'large'"),
        ({"step_size": 0.1, "n_leapfrog": 0}, "n_leapfrog must be a whole number from 1, got 0"),
        ({"step_size": 0.1, "n_moves": 1.5}, "n_moves must be a whole number from 1, got 1.5"),
    ],
)
def test_impossible_sizes_and_numbers_are_refused(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Hamiltonian(SimpleNamespace(dim=2), **given)


def test_the_numbers_of_numpy_are_sizes_and_numbers_too():
    move = Hamiltonian(gaussian(), np.float32(0.5), np.int64(2), np.int32(1))
    assert move(draw(7, 2))[0].shape == (7, 2)
