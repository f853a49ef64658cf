"""Evidence: every measure on problems with known answers."""

import math
from types import SimpleNamespace

import pytest
import torch

from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair
from annealed_core.targets import ENERGIES, Energy


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
    target = Energy("7 N", lambda z: gaussian().log_prob(z) + math.log(7))
    assert evidence.log_normalizer_quadrature(target) == pytest.approx(math.log(7), abs=1e-6)


def test_quadrature_takes_the_half_width_it_is_given():
    half = evidence.log_normalizer_quadrature(gaussian(), half_width=1.0)
    assert half == pytest.approx(2 * math.log(math.erf(1 / 2**0.5)), abs=1e-4)


def test_quadrature_does_without_a_support():
    target = SimpleNamespace(dim=2, log_prob=gaussian().log_prob)
    assert evidence.log_normalizer_quadrature(target) == pytest.approx(0, abs=1e-6)


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
    right, left = masses[3:].sum(), masses[:1].sum()
    assert right == pytest.approx(0.15, abs=0.01) and left == pytest.approx(
        0.05, abs=0.01
    )  # beyond the centre: half a mode


def test_total_variation_of_exact_samples_is_small():
    assert evidence.total_variation(samples_of_d(20_000), ENERGIES["D"]) < 0.05


def test_total_variation_falls_with_the_number_of_exact_samples():
    assert evidence.total_variation(samples_of_d(200_000), ENERGIES["D"]) < 0.02


def test_total_variation_of_disjoint_samples_is_one():
    z = torch.full((1000, 2), 3.8)
    assert evidence.total_variation(z, ENERGIES["D"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("away", [100.0, -100.0, math.inf, math.nan])
def test_samples_outside_the_square_count(away):
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


def test_total_variation_of_a_lost_mode_is_its_mass():
    z = samples_of_d(200_000)
    kept = z[z[:, 0] > -1]  # without the mode of mass 0.1
    assert evidence.total_variation(kept, ENERGIES["D"]) == pytest.approx(0.1, abs=0.02)


def test_total_variation_tells_a_mirror_image():
    z = samples_of_d(50_000)
    swapped = evidence.total_variation(z.flip(-1), ENERGIES["D"])  # masses .1 .3 .4 .2 become .2 .4 .3 .1
    assert swapped == pytest.approx(0.2, abs=0.03)


def test_total_variation_finds_a_box_where_the_target_has_none():
    torch.manual_seed(0)
    target = SimpleNamespace(dim=2, log_prob=lambda z: gaussian().log_prob(z) + 5)
    assert evidence.total_variation(torch.randn(50_000, 2), target) < 0.05
    assert evidence.total_variation(torch.randn(50_000, 2) + 1, target) > 0.3


def test_mode_masses_of_exact_samples_are_the_masses():
    centres, masses = ENERGIES["D"].modes
    z = samples_of_d(50_000)
    found = evidence.mode_masses(z, centres)
    torch.testing.assert_close(found, masses, atol=5 * (0.25 / 50_000) ** 0.5, rtol=0)
    assert float(found.sum()) == pytest.approx(1, abs=1e-4)


def test_mode_masses_are_weighted():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    z = torch.tensor([[1.0, 0.0], [9.0, 0.0], [9.5, 1.0]])
    torch.testing.assert_close(evidence.mode_masses(z, centres), torch.tensor([1 / 3, 2 / 3, 0]))
    log_weights = torch.tensor([2.0, 1.0, 1.0]).log() + 1000
    torch.testing.assert_close(evidence.mode_masses(z, centres, log_weights), torch.tensor([0.5, 0.5, 0]))


@pytest.mark.parametrize("shift", [-2000.0, 0.0, 2000.0])
def test_effective_sample_size_lies_between_one_weight_and_all(shift):
    equal = torch.zeros(50, dtype=torch.float64) + shift
    assert evidence.effective_sample_size(equal) == pytest.approx(1)
    single = torch.full((50,), -1e6, dtype=torch.float64) + shift
    single[7] = shift
    assert evidence.effective_sample_size(single) == pytest.approx(1 / 50)
    half = torch.cat([torch.zeros(25), torch.full((25,), -math.inf)]).double() + shift
    assert evidence.effective_sample_size(half) == pytest.approx(0.5)


def test_effective_sample_size_is_its_formula_for_each_of_a_batch():
    log_weights = torch.randn(40, 3, dtype=torch.float64)
    w = log_weights.exp()
    torch.testing.assert_close(evidence.effective_sample_size(log_weights), w.sum(0) ** 2 / (40 * (w**2).sum(0)))


def test_log_mean_weight_is_the_log_of_the_mean():
    log_weights = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64).log() - 3000
    estimate, error = evidence.log_mean_weight(log_weights)
    torch.testing.assert_close(estimate, torch.tensor([2.0, 5.0], dtype=torch.float64).log() - 3000)
    torch.testing.assert_close(error, torch.tensor([0.5, 0.0], dtype=torch.float64))  # sd sqrt(2), over 2 sqrt(2)


def test_the_standard_error_of_log_mean_weight_is_calibrated():
    torch.manual_seed(0)
    log_weights = 0.5 * torch.randn(400, 3000, dtype=torch.float64)  # log-normal: mean exp(1/8)
    estimate, error = evidence.log_mean_weight(log_weights)
    standard = (estimate - 1 / 8) / error
    assert abs(float(standard.mean())) < 0.1
    assert float(standard.std()) == pytest.approx(1, abs=0.06)
    assert float((standard.abs() < 1.96).double().mean()) == pytest.approx(0.95, abs=0.015)


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


@pytest.mark.parametrize("chunk", [97, 4096])
def test_importance_sampling_estimates_the_normalizer_whatever_the_chunk(chunk):
    torch.manual_seed(0)
    chain = Chain(DiagonalGaussian.isotropic(2, 3.0))
    estimate, error = evidence.log_mean_weight(evidence.importance_sampling(chain, ENERGIES["A"], 20_000, chunk))
    assert error < 0.05 and abs(estimate - 1.8775) < 5 * error
