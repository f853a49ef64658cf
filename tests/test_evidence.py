"""Evidence: every measure on problems with known answers."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from draws import CORNERS, Four

from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair
from annealed_core.moves import Metropolis
from annealed_core.targets import ENERGIES, Energy, GeometricPath, linear_alphas


def gaussian(scale=1.0, shift=0.0, **known):
    base = DiagonalGaussian(torch.full((2,), float(shift)), torch.full((2,), float(scale)))
    return Energy("Gaussian", base.log_prob, **known)


def samples_of_d(n, seed=0):
    torch.manual_seed(seed)
    centres, masses = ENERGIES["D"].modes
    return centres[torch.multinomial(masses, n, replacement=True)] + 0.2**0.5 * torch.randn(n, 2)


def test_the_grid_is_of_midpoints_of_equal_cells():
    z, area = evidence.grid(2.0, 4)
    assert z.shape == (4, 4, 2) and area == 1 and z.dtype == torch.float64
    assert z[:, 0, 0].tolist() == [-1.5, -0.5, 0.5, 1.5] and z[0, :, 1].tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert (z[1, :, 0] == -0.5).all()


def test_quadrature_of_a_scaled_gaussian_is_its_scale():
    target = SimpleNamespace(dim=2, log_prob=lambda z: gaussian().log_prob(z) + math.log(7))
    assert evidence.log_normalizer_quadrature(target) == pytest.approx(math.log(7), abs=1e-6)


def test_quadrature_takes_the_half_width_it_is_given():
    half = evidence.log_normalizer_quadrature(gaussian(), half_width=1.0)
    assert half == pytest.approx(2 * math.log(math.erf(1 / 2**0.5)), abs=1e-4)


@pytest.mark.parametrize(
    "judge", [evidence.log_normalizer_quadrature, evidence.find_box, lambda t: evidence.cell_masses(t, 4)]
)
def test_quadrature_refuses_other_dimensions(judge):
    with pytest.raises(ValueError, match="quadrature needs a target of dim 2, got dim 3"):
        judge(SimpleNamespace(dim=3, log_prob=lambda z: -z.square().sum(-1)))


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_find_box_gives_the_smallest_square_with_that_mass(scale):
    box = evidence.find_box(gaussian(scale), mass=0.999)
    exact = scale * float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + 0.999**0.5) / 2)))
    assert exact - 0.01 <= box <= exact + 0.17


def test_cell_masses_sum_to_the_mass_of_the_square():
    masses = evidence.cell_masses(gaussian(), 2.0)
    assert masses.shape == (24, 24)
    assert float(masses.sum()) == pytest.approx(math.erf(2 / 2**0.5) ** 2, abs=1e-4)
    assert float(evidence.cell_masses(ENERGIES["D"], 4.0).sum()) == pytest.approx(1, abs=1e-3)


def test_cell_masses_first_index_runs_along_z1():
    masses = evidence.cell_masses(ENERGIES["D"], 4.0, bins=4)
    found = masses[3:].sum().item(), masses[:1].sum().item()
    assert found == pytest.approx((0.15, 0.05), abs=0.01)  # beyond the centre: half a mode


@pytest.mark.parametrize("n, most", [(20_000, 0.05), (200_000, 0.02)])
def test_total_variation_of_exact_samples_falls_with_their_number(n, most):
    assert evidence.total_variation(samples_of_d(n), ENERGIES["D"]) < most


@pytest.mark.parametrize("away", [3.8, 100.0, -100.0, math.inf, math.nan])
def test_samples_where_there_is_no_mass_count_inside_and_outside_the_square(away):
    z = samples_of_d(5000)
    lost = z.clone()
    lost[:2500, 1] = away
    assert evidence.total_variation(lost, ENERGIES["D"]) == pytest.approx(0.5, abs=0.06)
    assert evidence.total_variation(torch.full((100, 2), away), ENERGIES["D"]) == pytest.approx(1, abs=1e-3)


def test_mass_of_the_target_outside_the_square_counts():
    torch.manual_seed(0)
    z = torch.rand(1_000_000, 2) * 2 - 1  # uniform, inside
    wide = gaussian(1.0)
    inside = math.erf(1 / 2**0.5) ** 2
    assert evidence.total_variation(z, wide, half_width=1.0) == pytest.approx(1 - inside, abs=0.02)
    torch.manual_seed(0)
    assert evidence.total_variation(torch.randn(200_000, 2), wide, half_width=1.0) < 0.03


def around(*corners, n=20_000, scale=1.0):
    torch.manual_seed(0)
    return CORNERS[torch.tensor(corners)[torch.arange(n) % len(corners)]] + scale * torch.randn(n, 2)


@pytest.mark.parametrize(
    "shift, declared",
    [(0.0, {"support": 40.0}), (-1e6, {"support": 40}), (1e6, {"support": 40.0, "box": 24.0}), (0.0, {"box": 26.0})],
)
def test_the_square_follows_what_a_target_declares(shift, declared):
    target = Four(shift, **declared)
    assert evidence.total_variation(around(0), target) == pytest.approx(0.75, abs=0.01)
    assert evidence.total_variation(around(0, 1, 2, 3), target) < 0.06
    _, reverse, forward = evidence.grid_divergences(around(0), target)
    assert reverse == pytest.approx(math.log(4), abs=0.02) and forward > 3
    assert evidence.log_normalizer_quadrature(target) - shift == pytest.approx(math.log(8 * math.pi), abs=1e-6)
    path = GeometricPath(DiagonalGaussian.isotropic(2, 15.0), target, [0.0, 1.0])
    still = Chain(path.base, [lambda z, context, noise: (z, torch.zeros_like(z[..., 0]))])
    gaps, _ = evidence.path_gaps(still, path, 200)
    assert abs(float(gaps[0])) < 1e-3 and gaps[1].isfinite()


REFUSED = {
    "nothing declared": (Four(), "support 12 of Four holds 0.0% of its mass"),
    "a support that is too small": (Four(support=20.0), "support 20 of Four holds 25.0% of its mass"),
    "log Z known": (Four(log_normalizer=math.log(8 * math.pi)), "support 12 of Four holds 0.0% of its mass"),
    "a box that is too small": (Four(support=40.0, box=20.0), "box 20 of Four holds 25.0% of its mass"),
    "a wrong log Z": (Four(support=40.0, log_normalizer=0.0), "support 40 of Four holds 251[0-9.]+% of its mass"),
    "large constants": (Four(1e6), "support 12 of Four holds 0.0% of its mass by log Z = 1"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("z", [around(0), around(0, 1, 2, 3), torch.zeros(100, 2)])
def test_figures_of_a_square_that_misses_the_targets_mass_are_refused(case, z):
    target, said = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{said}.*: declare a (support|box) of about [0-9.]+, half the") as refusal:
        evidence.total_variation(z, target)
    assert "\n" not in str(refusal.value)


def test_a_refusal_says_what_would_be_right():
    for target in (Four(), Four(support=40.0, box=20.0), Four(log_normalizer=math.log(8 * math.pi))):
        with pytest.raises(ValueError) as refusal:
            evidence.total_variation(around(0), target)
        name, right = re.search("declare a (support|box) of about ([0-9.]+)", str(refusal.value)).groups()
        setattr(target, name, float(right))
        assert evidence.total_variation(around(0), target) == pytest.approx(0.75, abs=0.01)


def test_quadrature_and_path_gaps_are_refused_where_the_support_misses_mass():
    with pytest.raises(ValueError, match=r"^support 12 of Four holds 0.0%"):
        evidence.log_normalizer_quadrature(Four())
    with pytest.raises(ValueError, match=r"^support 12 of Four holds 0.0%"):
        evidence.cell_masses(Four(), 24.0)
    base = DiagonalGaussian.isotropic(2)
    with pytest.raises(ValueError, match=r"^support 12 of Four holds 0.0%"):
        evidence.path_gaps(Chain(base, [lambda z, c, n: (z, z[..., 0])]), GeometricPath(base, Four(), [0.0, 1.0]), 10)


def far(z):
    """A mode at the origin and one so far away that no look around the support finds it."""
    return torch.logaddexp(gaussian().log_prob(z), gaussian(shift=300.0).log_prob(z))


def test_samples_find_a_mode_that_no_look_around_the_support_finds():
    target = SimpleNamespace(dim=2, log_prob=far, name="far")
    near = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    assert evidence.total_variation(near, target) < 0.15  # nothing tells of it
    said = r"^support 12 of far holds 6[0-9.]+% of its mass .* declare a support of about 33[0-9],"
    with pytest.raises(ValueError, match=said):
        evidence.total_variation(torch.cat([near, near[:100] + 300]), target)


@pytest.mark.parametrize("scale", [10.0, 1e3, 1e12, math.inf])
def test_a_bad_chain_in_a_right_square_is_not_refused(scale):
    z = samples_of_d(5000)
    z[:4000] = scale * (1 + z[:4000].abs())
    for target in (ENERGIES["D"], SimpleNamespace(dim=2, log_prob=ENERGIES["D"].log_prob)):
        assert evidence.total_variation(z, target) == pytest.approx(0.8, abs=0.06)


def test_a_half_width_that_is_given_is_taken_as_it_is():
    known = Four(log_normalizer=math.log(8 * math.pi))
    assert evidence.total_variation(around(0), known, 24.0) == pytest.approx(0.75, abs=0.01)
    assert evidence.total_variation(torch.zeros(5, 2), Four(support=40.0), 12.0) == pytest.approx(1)


@pytest.mark.parametrize(
    "name, value", [("support", (12.0, 12.0)), ("box", 0.0), ("support", math.nan), ("box", "wide")]
)
def test_a_support_or_box_that_is_no_number_is_refused(name, value):
    target = SimpleNamespace(dim=2, log_prob=gaussian().log_prob, name="odd", **{name: value})
    with pytest.raises(ValueError, match=f"^{name} of odd must be a number above 0, half a square's width, got "):
        evidence.total_variation(torch.zeros(5, 2), target)


@pytest.mark.parametrize("constant", [-1e6, 0.0, 1e6])
def test_large_constants_leave_weights_as_right_as_they_were(constant):
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(2000, dtype=torch.float64, generator=generator)
    large = log_weights + constant
    (log_z, error), (log_z_large, error_large) = map(evidence.log_mean_weight, (log_weights, large))
    assert float(log_z_large - constant) == pytest.approx(float(log_z), abs=1e-8)
    assert float(error_large) == pytest.approx(float(error), rel=1e-8)
    z, centres = torch.randn(2000, 2, generator=generator), [[-1.0, 0.0], [1.0, 0.0]]
    for figure in (evidence.effective_sample_size, evidence.pareto_k, lambda w: evidence.mode_masses(z, centres, w)):
        torch.testing.assert_close(figure(large), figure(log_weights), atol=1e-7, rtol=0)


@pytest.mark.parametrize("constant", [-1e6, 1e6])
def test_importance_sampling_weighs_in_double_precision(constant):
    chain = Chain(DiagonalGaussian.isotropic(2), generator=torch.Generator().manual_seed(0))
    steep = Energy("steep", lambda z: -0.5 * ((z - 1) / 0.5).square().sum(-1) + constant)
    log_weights = evidence.importance_sampling(chain, steep, 20_000)
    estimate, error = evidence.log_mean_weight(log_weights)
    assert log_weights.dtype == torch.float64 and error < 0.02
    assert abs(float(estimate) - constant - math.log(math.pi / 2)) < 4 * error
    assert float(log_weights.mean()) < constant + math.log(math.pi / 2)  # the ELBO
    exact = evidence.log_normalizer_quadrature(steep) - constant
    assert exact == pytest.approx(math.log(math.pi / 2), abs=1e-6)


def test_a_target_that_refuses_double_is_given_float32():
    layer = torch.nn.Linear(2, 1)
    target = SimpleNamespace(dim=2, log_prob=lambda z: layer(z).squeeze(-1))
    z = torch.randn(5, 2, dtype=torch.float64)
    found = evidence.log_prob_double(target, z)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, layer(z.float()).squeeze(-1).double())


def test_all_draws_come_from_the_chains_generator():
    path, _ = annealed(ENERGIES["A"])
    before, found = torch.get_rng_state(), []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        chain = Chain(path.base, [Metropolis(path[t], 1.0, 3, generator) for t in range(1, 5)], generator=generator)
        found.append((evidence.path_gaps(chain, path, 50)[0], evidence.importance_sampling(chain, ENERGIES["A"], 50)))
    assert all(map(torch.equal, *found)) and torch.equal(torch.get_rng_state(), before)


def test_mode_masses_are_weighted():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    z = torch.tensor([[1.0, 0.0], [9.0, 0.0], [9.5, 1.0]])
    torch.testing.assert_close(evidence.mode_masses(z, centres), torch.tensor([1 / 3, 2 / 3, 0]))
    in_double = evidence.mode_masses(z.double(), centres.double())
    assert in_double.tolist() == [1 / 3, 2 / 3, 0]
    log_weights = torch.tensor([2.0, 1.0, 1.0]).log() + 1000
    torch.testing.assert_close(evidence.mode_masses(z, centres, log_weights), torch.tensor([0.5, 0.5, 0]))


@pytest.mark.parametrize("n", [1, 25, 50])
def test_effective_sample_size_counts_the_weights_that_are_equal_and_not_zero(n):
    log_weights = torch.where(torch.arange(50) < n, 7.0, -math.inf)
    assert evidence.effective_sample_size(log_weights) == pytest.approx(n / 50)


def test_effective_sample_size_is_its_formula_for_each_of_a_batch():
    log_weights = torch.randn(40, 3, dtype=torch.float64)
    w = log_weights.exp()
    torch.testing.assert_close(evidence.effective_sample_size(log_weights), w.sum(0) ** 2 / (40 * (w**2).sum(0)))


def test_log_mean_weight_is_the_log_of_the_mean():
    log_weights = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64).log() - 3000
    estimate, error = evidence.log_mean_weight(log_weights)
    torch.testing.assert_close(estimate, torch.tensor([2.0, 5.0], dtype=torch.float64).log() - 3000)
    torch.testing.assert_close(error, torch.tensor([0.5, 0.0], dtype=torch.float64))  # sd sqrt(2), over 2 sqrt(2)


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
def test_importance_sampling_has_a_weight_for_each_sample_whatever_the_chunk(chunk, batch):
    torch.manual_seed(0)
    base = DiagonalGaussian(torch.zeros(*batch, 2), torch.ones(*batch, 2))
    chain = Chain(base, torch.nn.ModuleList([GatedGaussianPair(2, 4)]))
    drawn = []
    target = SimpleNamespace(dim=2, log_prob=lambda z: drawn.append(z.shape[:-1].numel()) or -z.square().sum(-1))
    log_weights = evidence.importance_sampling(chain, target, 50, chunk)
    assert log_weights.shape == (50, *batch) and not log_weights.requires_grad
    assert len(log_weights.unique()) == log_weights.numel()
    size = math.prod(batch)
    assert sum(drawn) == 50 * size and max(drawn) <= max(chunk, size)


@pytest.mark.filterwarnings("error")
def test_a_single_weight_has_no_standard_error_and_no_warning():
    estimate, error = evidence.log_mean_weight(torch.full((1, 3), 2.0))
    assert (estimate == 2).all() and error.shape == (3,) and error.isnan().all()


# What the PSIS of ArviZ 0.23 gives.
@pytest.mark.parametrize("scale, known", [(0.5, 0.1221473), (1.0, 0.3078599), (2.0, 0.6904279), (4.0, 1.4849119)])
def test_pareto_k_is_that_of_psis(scale, known):
    quantiles = torch.special.ndtri((torch.arange(500, dtype=torch.float64) + 0.5) / 500)
    assert float(evidence.pareto_k(scale * quantiles)) == pytest.approx(known, abs=1e-6)


def test_pareto_k_is_the_same_for_shuffled_weights_and_for_each_of_a_batch():
    torch.manual_seed(0)
    log_weights = torch.randn(400, 2, 3, dtype=torch.float64)
    k = evidence.pareto_k(log_weights)
    assert k.shape == (2, 3)
    torch.testing.assert_close(evidence.pareto_k(log_weights[torch.randperm(400)]), k)
    torch.testing.assert_close(evidence.pareto_k(log_weights[:, 1, 2]), k[1, 2])


@pytest.mark.filterwarnings("error")
def test_pareto_k_of_level_weights_is_minus_infinity_and_of_few_is_unknown():
    for level in (0.0, 900.0, -math.inf):
        assert evidence.pareto_k(torch.full((100,), level)) == -math.inf
    tail = torch.cat([torch.full((900,), -3.0), torch.zeros(100)])  # the whole tail is at the highest weight
    assert evidence.pareto_k(tail) == -math.inf
    assert evidence.pareto_k(torch.zeros(20, 2)).isnan().all()


@pytest.mark.filterwarnings("error")
def test_pareto_k_takes_weights_with_zeros_ties_and_giants():
    torch.manual_seed(0)
    log_weights = torch.randn(1000)
    spread = torch.stack(
        [
            torch.where(torch.rand(1000) < 0.5, -math.inf, log_weights),
            torch.where(torch.rand(1000) < 0.95, 0.0, log_weights),
            torch.where(torch.arange(1000) > 3, -math.inf, log_weights),
            1000 * log_weights,
            torch.where(torch.arange(1000) == 7, 800.0, log_weights),
        ],
        1,
    )
    k = evidence.pareto_k(spread)
    assert k[:2].isfinite().all() and k[3] > 20 and (k[[2, 4]] == math.inf).all()
    assert evidence.pareto_k(torch.where(torch.arange(1000) == 7, math.nan, log_weights)).isnan()
    assert evidence.pareto_k(torch.where(torch.arange(1000) == 7, math.inf, log_weights)) == math.inf


@pytest.mark.parametrize("n", [20_000, 200_000])
def test_grid_divergences_of_exact_samples_are_about_the_number_of_cells_over_twice_the_samples(n):
    z = samples_of_d(n)
    occupied = len(((z / 4 + 1) * 12).floor().unique(dim=0))
    _, reverse, forward = evidence.grid_divergences(z, ENERGIES["D"])
    assert 0.5 * occupied < 2 * n * reverse < 1.5 * occupied
    assert 0.5 * 24**2 < 2 * n * forward < 1.5 * 24**2


def test_a_lost_mode_is_its_mass_in_total_variation_and_shows_in_the_divergence_of_the_target_from_the_samples():
    z = samples_of_d(50_000)
    kept = z[z[:, 0] > -1]  # without the mode of mass 0.1: log(1 / 0.9) in the other direction
    variation, reverse, forward = evidence.grid_divergences(kept, ENERGIES["D"])
    assert variation == pytest.approx(0.1, abs=0.02)
    assert reverse == pytest.approx(-math.log(0.9), abs=0.01)
    assert 0.3 < forward < 0.1 * math.log(50_000)


def test_grid_divergences_are_those_of_the_shares_by_hand():
    z = torch.tensor([[0.5, 0.5], [0.5, -0.5], [0.5, -0.5], [3.0, 0.0]])
    truth = evidence.cell_masses(gaussian(), 1.0, bins=2).flatten()
    truth = torch.cat([truth, 1 - truth.sum(0, True)])
    drawn = torch.tensor([0, 0, 2, 1, 1], dtype=torch.float64)  # left, left, right below, right above, outside
    _, reverse, forward = evidence.grid_divergences(z, gaussian(), half_width=1.0, bins=2)
    smooth = (drawn + 0.5) / 6.5
    assert forward == pytest.approx(float((truth * (truth / smooth).log()).sum()))
    q, p = drawn[2:] / 4, truth[2:]
    assert reverse == pytest.approx(float((q * (q / p).log()).sum()))
    _, away, _ = evidence.grid_divergences(torch.full((100, 2), math.nan), ENERGIES["D"])
    assert 10 < away <= -math.log(1e-16)  # where there is no mass, as little as quadrature can tell counts


def test_samples_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"^z must have shape \(n, 2\), got \(100, 3\)$"):
        evidence.total_variation(torch.randn(100, 3), ENERGIES["D"])


def annealed(target, scale=3.0, n_transitions=4, trained=False):
    base = DiagonalGaussian(torch.zeros(2, dtype=torch.float64), torch.full((2,), scale, dtype=torch.float64))
    path = GeometricPath(base, target, linear_alphas(n_transitions))
    if trained:
        torch.manual_seed(3)
        return path, Chain(base, torch.nn.ModuleList([GatedGaussianPair(2, 8) for _ in range(n_transitions)]).double())
    return path, Chain(base, [Metropolis(path[t], 1.0, 3) for t in range(1, n_transitions + 1)])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["A", "D"])
def test_path_gaps_go_from_zero_to_what_the_elbo_lacks_and_are_never_negative(name, trained):
    path, chain = annealed(ENERGIES[name], trained=trained)
    torch.manual_seed(0)
    gaps, errors = evidence.path_gaps(chain, path, 4000)
    torch.manual_seed(0)
    log_weight = chain.log_weight(ENERGIES[name], chain.rsample(4000)).detach()
    lacks = evidence.log_normalizer_quadrature(ENERGIES[name]) - float(log_weight.mean())
    assert float(gaps[-1]) == pytest.approx(lacks, abs=1e-4)
    assert float(errors[-1]) == pytest.approx(float(log_weight.std()) / 4000**0.5)
    assert gaps.shape == errors.shape == (5,)
    assert abs(gaps[0]) < 1e-3 and errors[0] < 1e-9
    assert (gaps[1:] > -4 * errors[1:]).all() and (gaps[1:] > 0.01).all() and (errors[1:] > 0).all()


def test_a_path_gap_is_the_divergence_of_its_gaussians():
    base, target = gaussian(), gaussian(0.5)
    start = DiagonalGaussian(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    still = lambda z, context, noise: (z, torch.zeros_like(z[..., 0]))  # z_1 = z_0: the gap is KL(q_0 || f_t)
    torch.manual_seed(0)
    gaps, errors = evidence.path_gaps(Chain(start, [still] * 3), GeometricPath(base, target, linear_alphas(3)), 20_000)
    precision = 1 + 3 * torch.linspace(0, 1, 4, dtype=torch.float64)
    assert ((gaps - (precision - 1 - precision.log())).abs() <= 4 * errors + 1e-6).all()


def test_path_gaps_take_a_target_that_is_zero_somewhere():
    torch.manual_seed(0)
    half = Energy("half", lambda z: torch.where(z[..., 0] > 0, gaussian().log_prob(z), -torch.inf))
    base = DiagonalGaussian.isotropic(2)
    move = lambda inside: lambda z, context, noise: (inside(z), torch.zeros_like(z[..., 0]))
    path = GeometricPath(base, half, [0.0, 1.0])
    for inside, last in [(lambda z: z, math.inf), (torch.abs, math.log(0.5))]:
        gaps, _ = evidence.path_gaps(Chain(base, [move(inside)]), path, 200)
        assert gaps.tolist() == pytest.approx([0, last], abs=1e-4)


def test_path_gaps_refuse_a_path_of_another_length_or_dimension():
    path, chain = annealed(ENERGIES["A"])
    with pytest.raises(ValueError, match="path must have 4 targets for 3 transitions, got 5"):
        evidence.path_gaps(Chain(chain.base, chain.kernels[:3]), path, 10)
    with pytest.raises(ValueError, match="quadrature needs a target of dim 2, got dim 3"):
        three = GeometricPath(chain.base, SimpleNamespace(dim=3, log_prob=chain.base.log_prob), [0.0, 1.0])
        evidence.path_gaps(chain, three, 10)
