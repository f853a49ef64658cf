"""Annealed importance sampling against quadrature, and what must hold of it whatever the target."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from annealed_core import evidence
from annealed_core.ais import ais, conditional_effective_sample_size, reverse_ais
from annealed_core.kernels import DiagonalGaussian
from annealed_core.targets import ENERGIES, Energy, GeometricAlphas, geometric_alphas, linear_alphas

MOVES = ("hamiltonian", "langevin", "metropolis")
every_move = pytest.mark.parametrize("move", MOVES)


def gaussian(loc, scale):
    return DiagonalGaussian(*torch.tensor([loc, scale], dtype=torch.float64))


def base(scale=1.0, dim=2):
    return gaussian([0.0] * dim, [scale] * dim)


def narrow():
    """A Gaussian off the base's centre: log Z is known."""
    inner = gaussian([1.0, -1.0], [0.4, 0.8])
    return Energy("narrow", lambda z: inner.log_prob(z) + 0.7)


@pytest.mark.parametrize("name", list("ABCDEF"))
def test_a_thousand_particles_and_sixty_temperatures_find_log_z_within_a_twentieth(name):
    target, generator = ENERGIES[name], torch.Generator().manual_seed(1)
    start = DiagonalGaussian.isotropic(2, target.base_scale)
    particles = ais(target, start, n_particles=1000, n_temperatures=60, generator=generator)
    assert abs(float(particles.log_z) - evidence.log_normalizer_quadrature(target)) < 0.05
    assert particles.log_z_se < 0.03 and particles.ess > 0.5
    assert len(particles.alphas) == 61 and particles.acceptance.shape == (60,)


@every_move
def test_one_temperature_is_importance_sampling(move):
    torch.manual_seed(0)
    particles = ais(narrow(), base(), 500, n_temperatures=1, move=move)
    torch.manual_seed(0)
    z = base().rsample(torch.randn(500, 2, dtype=torch.float64))
    log_weights = narrow().log_prob(z) - base().log_prob(z)
    torch.testing.assert_close(particles.log_weights, log_weights)
    estimate, error = evidence.log_mean_weight(log_weights)
    assert particles.log_z == estimate and particles.log_z_se == error
    assert particles.ess == evidence.effective_sample_size(log_weights)


@every_move
@pytest.mark.parametrize("given", [{"n_temperatures": 7}, {"threshold": 0.9}])
def test_from_an_exact_base_all_weights_are_equal(move, given):
    torch.manual_seed(0)
    target = Energy("3 N", lambda z: base(2.0).log_prob(z) + math.log(3))
    particles = ais(target, base(2.0), 100, move=move, **given)
    torch.testing.assert_close(particles.log_weights, torch.full((100,), math.log(3), dtype=torch.float64))
    assert particles.ess == pytest.approx(1) and particles.log_z_se < 1e-9
    if "threshold" in given:
        assert particles.alphas.tolist() == [0, 1]


@every_move
@pytest.mark.parametrize("step_size", [None, 0.3])
def test_the_weights_estimate_the_evidence_of_a_gaussian_and_the_particles_its_moments(move, step_size):
    torch.manual_seed(0)
    particles = ais(narrow(), base(), 4000, n_temperatures=40, move=move, step_size=step_size)
    assert particles.log_z_se < 0.05 and abs(particles.log_z - 0.7) < 4 * particles.log_z_se
    shares = torch.softmax(particles.log_weights, 0).unsqueeze(-1)
    mean = (shares * particles.z).sum(0)
    spread = (shares * (particles.z - mean).square()).sum(0).sqrt()
    assert mean.tolist() == pytest.approx([1, -1], abs=0.1) and spread.tolist() == pytest.approx([0.4, 0.8], abs=0.1)


@every_move
def test_the_step_size_is_adapted_towards_the_acceptance_of_its_move(move):
    torch.manual_seed(0)
    particles = ais(ENERGIES["D"], base(10.0), 400, n_temperatures=60, move=move)
    wanted = {"hamiltonian": 0.8, "langevin": 0.574, "metropolis": 0.234}[move]
    assert float(particles.acceptance[20:].mean()) == pytest.approx(wanted, abs=0.05)
    fixed = ais(ENERGIES["D"], base(10.0), 400, n_temperatures=60, move=move, step_size=3.0)
    assert fixed.acceptance[-1] < 0.15 < 0.3 < fixed.acceptance[0]


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_every_step_of_the_adaptive_path_has_the_conditional_effective_sample_size_asked_for(threshold):
    torch.manual_seed(0)
    seen, target = [], ENERGIES["A"]
    calls = lambda z: seen.append(z) or target.log_prob(z)
    particles = ais(Energy("seen", calls), base(), 500, threshold=threshold, move="metropolis", n_moves=1)
    alphas = particles.alphas
    assert alphas[0] == 0 and alphas[-1] == 1 and (alphas.diff() > 0).all()
    states = seen[::3]  # the weights' call, then the move's two
    log_weights, sizes = torch.zeros(500, dtype=torch.float64), []
    for z, step in zip(states, alphas.diff(), strict=True):
        increments = step * (target.log_prob(z) - base().log_prob(z))
        sizes.append(float(conditional_effective_sample_size(log_weights, increments)))
        log_weights = log_weights + increments
    torch.testing.assert_close(log_weights, particles.log_weights)
    assert min(sizes) >= threshold - 1e-9
    assert sizes[:-1] == pytest.approx([threshold] * (len(sizes) - 1), abs=1e-6)


def test_conditional_effective_sample_size_is_its_formula_and_that_of_equal_weights_the_usual_one():
    torch.manual_seed(0)
    log_weights, increments = torch.randn(2, 50, 3, dtype=torch.float64)
    shares, v = torch.softmax(log_weights, 0), increments.exp()
    by_hand = (shares * v).sum(0) ** 2 / (shares * v**2).sum(0)
    torch.testing.assert_close(conditional_effective_sample_size(log_weights + 900, increments - 900), by_hand)
    torch.testing.assert_close(conditional_effective_sample_size(log_weights, increments + 1e6), by_hand)
    even = conditional_effective_sample_size(torch.zeros_like(log_weights), increments)
    torch.testing.assert_close(even, evidence.effective_sample_size(increments))


@pytest.mark.parametrize("given", [{"n_temperatures": 60}, {"threshold": 0.99}])
def test_each_element_of_a_batch_is_annealed_for_itself(given):
    torch.manual_seed(0)
    inner = gaussian([[0.0, 0.0]] * 3, [[0.02, 0.02], [0.3, 0.3], [1.0, 1.0]])
    shifts = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    target = SimpleNamespace(dim=2, log_prob=lambda z: inner.log_prob(z) + shifts)
    start = gaussian([[0.0, 0.0]] * 3, [[1.0, 1.0]] * 3)
    particles = ais(target, start, 500, **given)
    assert particles.z.shape == (500, 3, 2) and particles.log_weights.shape == (500, 3)
    for each in (particles.log_z, particles.log_z_se, particles.ess):
        assert each.shape == (3,)
    assert ((particles.log_z - shifts).abs() < 5 * particles.log_z_se + 1e-6).all()
    assert 0.7 < float(particles.acceptance[-10:].mean()) < 0.95


@every_move
@pytest.mark.parametrize("given", [{"n_temperatures": 20}, {"threshold": 0.9}])
def test_a_target_that_is_zero_somewhere_loses_the_particles_there(move, given):
    torch.manual_seed(0)
    half = Energy("half", lambda z: torch.where(z[..., 0] > 0, base().log_prob(z), -torch.inf))
    particles = ais(half, base(), 1000, move=move, **given)
    alive = particles.log_weights > -math.inf
    assert 400 < alive.sum() < 600 and not particles.log_weights[alive].any()
    assert float(particles.log_z) == pytest.approx(math.log(0.5), abs=0.2)


@pytest.mark.parametrize("constant, dtype", [(-1e6, torch.float32), (1e6, torch.float32), (-1e6, torch.float64)])
def test_a_large_constant_in_the_log_density_leaves_log_z_right(constant, dtype):
    target = Energy("steep", lambda z: -0.5 * ((z - 1) / 0.5).square().sum(-1) + constant)
    start = DiagonalGaussian(torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    given = {"n_temperatures": 150, "n_moves": 1, "move": "langevin", "generator": generator}
    found = ais(target, start, 500, **given)
    assert found.z.dtype == dtype and found.log_weights.dtype == torch.float64
    assert found.log_z_se < 0.03
    assert abs(float(found.log_z) - constant - math.log(math.pi / 2)) < 4 * found.log_z_se
    exact = (1 + 0.5 * torch.randn(500, 2, generator=generator)).to(dtype)
    back = reverse_ais(target, start, exact, found.step_sizes, **given)
    assert abs(float(back.log_z) - constant - math.log(math.pi / 2)) < 4 * back.log_z_se + 1e-3


@every_move
def test_all_randomness_comes_from_the_generator(move):
    before, found = torch.get_rng_state(), []
    for seed in (5, 5, 6):
        generator = torch.Generator().manual_seed(seed)
        forwards = ais(narrow(), base(), 20, n_temperatures=3, move=move, generator=generator)
        exact = torch.tensor([1.0, -1.0]).expand(5, 2)
        back = reverse_ais(narrow(), base(), exact, 0.3, n_temperatures=3, move=move, generator=generator)
        found.append(torch.cat([forwards.log_weights, back.log_weights]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "alphas",
    [
        [0, 0.25, 1],
        (0.0, 0.25, 1.0),
        np.array([0, 0.25, 1], np.float32),
        torch.tensor([0, 0.25, 1], dtype=torch.float16),
        torch.tensor([0, 0.25, 1], dtype=torch.float64),
        lambda n: torch.tensor([0, 0.25, 1], requires_grad=True),
    ],
)
def test_exponents_are_taken_in_any_real_type(alphas):
    found = ais(narrow(), base(), 10, alphas=alphas, generator=torch.Generator().manual_seed(0))
    assert found.alphas.tolist() == [0, 0.25, 1] and found.alphas.dtype == torch.float64
    assert found.acceptance.shape == (2,)


@pytest.mark.parametrize("alphas", [None, linear_alphas(4), linear_alphas, GeometricAlphas(0.1)])
def test_exponents_are_equally_spaced_unless_they_are_given_or_described(alphas):
    found = ais(narrow(), base(), 10, alphas=alphas, n_temperatures=4)
    expected = geometric_alphas(4, 0.1) if isinstance(alphas, GeometricAlphas) else linear_alphas(4)
    torch.testing.assert_close(found.alphas, expected.double())


def test_no_particle_where_the_target_is_above_zero_is_an_error_that_names_the_base():
    far = Energy("far", lambda z: torch.where(z[..., 0] > 1e3, base().log_prob(z), -torch.inf))
    one_of_two = DiagonalGaussian(torch.tensor([[0.0, 0.0], [2e3, 0.0]]), torch.ones(2, 2))
    said = "^base must reach where target far is above 0, got log_prob = -inf at all 10 particles"
    for start in (base(), one_of_two):
        with pytest.raises(ValueError, match=said):
            ais(far, start, 10, n_temperatures=3)
    with pytest.raises(ValueError, match=r"^z must be samples of target far, got log_prob = -inf from one of them$"):
        reverse_ais(far, base(), torch.zeros(5, 2), 0.1, n_temperatures=3)


def test_no_gradient_reaches_the_particles_or_the_target():
    loc = torch.zeros(2, requires_grad=True)
    drawn = ais(DiagonalGaussian(loc, torch.ones(2)), DiagonalGaussian.isotropic(2, 2.0), 20, n_temperatures=3)
    assert not drawn.z.requires_grad and not drawn.log_z.requires_grad and loc.grad is None


@pytest.mark.filterwarnings("error")
def test_a_single_particle_has_an_estimate_without_an_error():
    torch.manual_seed(0)
    particles = ais(narrow(), base(), 1, n_temperatures=3)
    assert particles.log_z == particles.log_weights[0] and particles.log_z_se.isnan() and particles.ess == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"n_particles": 0}, "n_particles must be a whole number from 1, got 0"),
        ({"n_temperatures": 2.5}, "n_temperatures must be a whole number from 1, got 2.5"),
        ({"n_moves": True}, "n_moves must be a whole number from 1, got True"),
        ({"n_leapfrog": -1}, "n_leapfrog must be a whole number from 1, got -1"),
        ({"move": "gibbs"}, "unknown move 'gibbs': choose one of hamiltonian, langevin, metropolis"),
        ({"threshold": 1.0}, r"threshold must lie in \(0, 1\), got 1.0"),
        ({"threshold": math.nan}, r"threshold must lie in \(0, 1\), got nan"),
        ({"threshold": 0.5, "alphas": [0, 1]}, "alphas and threshold exclude each other: a threshold chooses"),
        ({"step_size": 0}, "step_size must be finite and above 0, got 0"),
        ({"step_size": torch.ones(2), "n_temperatures": 3}, r"step_size must have shape \(3,\), got \(2,\)"),
        ({"step_size": torch.ones(2), "threshold": 0.9}, "step_size must be a number or None with a threshold"),
        ({"alphas": [0.0, 0.5]}, r"alphas must rise from 0 to 1, got \[0.0, 0.5\]"),
        ({"base": base(dim=3)}, "base must have the target's dim 2, got 3"),
        (
            {"target": SimpleNamespace(dim=2, log_prob=lambda z: z)},
            r"target SimpleNamespace: log_prob of z \(10, 2\) must have shape \(10,\), got \(10, 2\)",
        ),
        (
            {"target": Energy("log", lambda z: z[..., 0].log())},
            "target log: log_prob must be finite or -inf, got NaN or \\+inf at a particle",
        ),
        (
            {"target": narrow(), "base": base(1e9), "threshold": 0.999_999_999_999},
            "threshold 0.999999999999 cannot be kept at alpha = 0: take a base nearer the target",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(given, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"^{message}") as refusal:
        ais(**{"target": ENERGIES["A"], "base": base(), "n_particles": 10, **given})
    assert "\n" not in str(refusal.value)


def test_backwards_samples_and_step_sizes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^z must have shape \(n, 2\), got \(5, 3\)$"):
        reverse_ais(narrow(), base(), torch.zeros(5, 3), 0.1)
    with pytest.raises(ValueError, match=r"^step_size must be finite and above 0, got 0.0$"):
        reverse_ais(narrow(), base(), torch.zeros(5, 2), 0.0)


@every_move
@pytest.mark.parametrize("n_temperatures", [1, 4])
def test_backwards_from_exact_samples_the_mean_inverse_weight_is_unbiased(move, n_temperatures):
    torch.manual_seed(0)
    # Wider than the base, so that the inverse weights have a finite variance.
    wide = gaussian([0.8, -0.8], [1.2, 1.6])
    exact = wide.rsample(torch.randn(20_000, 2, dtype=torch.float64))
    steps = torch.full((n_temperatures,), 0.4, dtype=torch.float64)
    target = Energy("wide", lambda z: wide.log_prob(z) + 0.7)
    found = reverse_ais(target, base(), exact, steps, n_temperatures=n_temperatures, move=move)
    inverse = (0.7 - found.log_weights).exp()
    error = inverse.std() / len(inverse) ** 0.5
    assert error < 0.02 and abs(inverse.mean() - 1) < 4 * error
    assert found.log_z == pytest.approx(0.7 - float(inverse.mean().log())) and found.log_z_se < 0.02
    assert found.log_weights.mean() > 0.7 + 0.1


def test_backwards_goes_through_the_same_temperatures_and_ends_at_the_base():
    torch.manual_seed(0)
    exact = torch.tensor([1.0, -1.0]) + torch.tensor([0.4, 0.8]) * torch.randn(4000, 2, dtype=torch.float64)
    forwards = ais(narrow(), base(), 500, n_temperatures=60)
    backwards = reverse_ais(narrow(), base(), exact, forwards.step_sizes, n_temperatures=60)
    assert torch.equal(forwards.alphas, backwards.alphas) and torch.equal(forwards.step_sizes, backwards.step_sizes)
    torch.testing.assert_close(forwards.acceptance[10:], backwards.acceptance[10:], rtol=0, atol=0.1)
    assert backwards.z.mean(0).abs().max() < 0.1 and backwards.z.std(0).tolist() == pytest.approx([1, 1], abs=0.1)
    assert backwards.log_z == pytest.approx(0.7, abs=0.03) and backwards.ess > 0.8


def test_from_an_exact_base_the_weights_are_equal_backwards_too():
    torch.manual_seed(0)
    target = Energy("3 N", lambda z: base(2.0).log_prob(z) + math.log(3))
    found = reverse_ais(target, base(2.0), 2 * torch.randn(50, 2, dtype=torch.float64), 0.3, n_temperatures=5)
    torch.testing.assert_close(found.log_weights, torch.full((50,), math.log(3), dtype=torch.float64))
    assert found.ess == pytest.approx(1)


@every_move
def test_the_step_sizes_found_once_can_be_used_again_and_the_mean_weight_is_then_unbiased(move):
    torch.manual_seed(0)
    found = ais(narrow(), base(), 100, n_temperatures=3, move=move).step_sizes
    assert found.shape == (3,) and found[0] == 0.5 and len(found.unique()) == 3
    again = ais(narrow(), base(), 20_000, n_temperatures=3, move=move, step_size=found)
    weights = again.log_weights.exp()
    error = weights.std() / len(weights) ** 0.5
    assert torch.equal(again.step_sizes, found) and abs(weights.mean() - math.exp(0.7)) < 4 * error


def test_a_step_size_for_each_temperature_and_element_moves_just_that():
    torch.manual_seed(0)
    start = gaussian([[0.0, 0.0]] * 2, [[1.0, 1.0]] * 2)
    tiny = torch.tensor([[1e-12, 0.3], [1e-12, 0.3]], dtype=torch.float64)
    found = ais(narrow(), start, 200, n_temperatures=2, step_size=tiny)
    torch.manual_seed(0)
    begun = torch.randn(200, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(found.z[:, 0], begun[:, 0])
    assert ((found.z - begun)[:, 1].abs().amax(-1) > 1e-3).float().mean() > 0.9
    assert ais(narrow(), start, 5, n_temperatures=4).step_sizes.shape == (4, 2)
