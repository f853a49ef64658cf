"""Targets: the energies against their known integrals, symmetries and modes; the geometric path and its ends."""

import math
import re

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from annealed_core import evidence
from annealed_core.kernels import DiagonalGaussian
from annealed_core.targets import (
    ENERGIES,
    GeometricAlphas,
    GeometricPath,
    LearnedAlphas,
    LinearAlphas,
    check_alphas,
    exponents,
    find,
    geometric_alphas,
    linear_alphas,
)

LOG_Z = {"A": 1.8775, "B": 3.8146, "C": 3.4502, "D": 0.0, "E": 1.7263, "F": 2.6324, "ring8": math.log(8), "gmm40": 0.0}
DIMENSIONS = dict.fromkeys(LOG_Z, 2) | {"funnel": 10, "many_well": 32}
every_energy = pytest.mark.parametrize("name", ENERGIES)
every_energy_of_the_plane = pytest.mark.parametrize("name", LOG_Z)


def points(energy, n=512, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (2 * torch.rand((n, energy.dim), generator=generator, dtype=dtype) - 1) * energy.box


def test_the_energies_are_those_of_the_report_and_four_of_other_papers():
    assert {name: energy.dim for name, energy in ENERGIES.items()} == DIMENSIONS
    assert all(energy.name == name for name, energy in ENERGIES.items())


@every_energy_of_the_plane
def test_quadrature_gives_the_known_log_normalizer(name):
    points = 400 if name == "gmm40" else 1200  # forty components over a wide square: seconds with the default
    found, stated = evidence.log_normalizer_quadrature(ENERGIES[name], points=points), ENERGIES[name].log_normalizer
    assert found == pytest.approx(LOG_Z[name], abs=1e-4)  # half of the table's last digit, and the square's edge
    assert (stated is not None) == (name in ("D", "ring8", "gmm40"))
    if stated is not None:
        assert found == pytest.approx(stated, abs=1e-5)


@every_energy
def test_gradient_is_finite_at_the_origin_and_everywhere_in_the_box(name):
    z = points(ENERGIES[name])
    z = torch.cat([torch.zeros_like(z[:1]), z]).requires_grad_()
    (gradient,) = torch.autograd.grad(ENERGIES[name].log_prob(z).sum(), z)
    assert gradient.isfinite().all()
    assert gradient[1:].abs().sum(-1).gt(0).all()


SYMMETRIES = [
    *[(name, (signs, False)) for name in "AC" for signs in ((-1, 1), (1, -1))],
    ("E", ((-1, -1), False)),
    *[("ring8", case) for case in (((-1, 1), False), ((1, -1), False), ((1, 1), True))],
]


@pytest.mark.parametrize(("name", "symmetry"), SYMMETRIES)
def test_energies_have_their_symmetries(name, symmetry):
    signs, swapped = symmetry
    z = points(ENERGIES[name])
    image = (z.flip(-1) if swapped else z) * torch.tensor(signs, dtype=z.dtype)
    torch.testing.assert_close(ENERGIES[name].log_prob(image), ENERGIES[name].log_prob(z), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "signs"), [("B", (-1, 1)), ("B", (1, -1)), ("D", (-1, 1)), ("E", (1, -1)), ("F", (-1, -1))]
)
def test_energies_lack_the_symmetries_that_would_betray_a_lost_term(name, signs):
    z = points(ENERGIES[name])
    image = z * torch.tensor(signs, dtype=z.dtype)
    assert (ENERGIES[name].log_prob(image) - ENERGIES[name].log_prob(z)).abs().max() > 1


def test_energy_d_is_the_mixture_of_unequal_gaussians_with_variance_a_fifth():
    centres = torch.tensor([[-2.0, 0], [2, 0], [0, 2], [0, -2]], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=torch.float64)
    z = points(ENERGIES["D"])
    parts = MultivariateNormal(centres, 0.2 * torch.eye(2, dtype=torch.float64)).log_prob(z.unsqueeze(1))
    mixture = torch.logsumexp(parts + weights.log(), 1)
    torch.testing.assert_close(ENERGIES["D"].log_prob(z), mixture, atol=1e-5, rtol=1e-6)


@every_energy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_log_prob_keeps_dtype_and_batch_shape(name, dtype, shape):
    z = points(ENERGIES[name], 12, dtype)[: math.prod(shape)].view(*shape, -1)
    value = ENERGIES[name].log_prob(z)
    assert value.shape == shape and value.dtype == dtype
    torch.testing.assert_close(value.double(), ENERGIES[name](z.double()), rtol=1e-3, atol=1e-3)


@every_energy_of_the_plane
def test_the_box_holds_999_of_1000_and_the_support_everything(name):
    energy = ENERGIES[name]
    box, support, wider = (
        evidence.log_normalizer_quadrature(energy, half_width, points=400)
        for half_width in (energy.box, energy.support, 1.2 * energy.support)
    )
    assert 0.999 <= math.exp(box - wider) <= 1 + 1e-5
    assert support == pytest.approx(wider, abs=5e-4)


@pytest.mark.parametrize("name", ["A", "D", "ring8"])
def test_masses_of_modes_are_the_mass_nearest_to_each_centre(name):
    centres, masses = ENERGIES[name].modes
    z, _ = evidence.grid(ENERGIES[name].support, 400)
    z = z.flatten(0, 1)
    found = evidence.mode_masses(z, centres, ENERGIES[name].log_prob(z))
    torch.testing.assert_close(found, masses.double(), atol=1e-3, rtol=0)
    assert masses.sum() == pytest.approx(1) == ENERGIES["gmm40"].modes[1].sum()


@pytest.mark.parametrize("name", ["D", "ring8"])
def test_modes_are_maxima(name):
    centres = ENERGIES[name].modes[0].double()
    around = torch.tensor([[0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]], dtype=torch.float64)
    nearby = ENERGIES[name].log_prob(centres.unsqueeze(1) + around)
    assert (ENERGIES[name].log_prob(centres).unsqueeze(1) > nearby).all()


def test_find_returns_the_energy_or_names_all_there_are():
    assert find("D") is ENERGIES["D"]
    message = "unknown target 'G': choose one of A, B, C, D, E, F, ring8, gmm40, funnel, many_well"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find("G")


def test_the_funnel_is_neals():
    z = points(ENERGIES["funnel"])
    first, rest = z[:, 0], z[:, 1:]
    by_hand = Normal(0, 3).log_prob(first) + Normal(0, (first / 2).exp().unsqueeze(-1)).log_prob(rest).sum(-1)
    torch.testing.assert_close(ENERGIES["funnel"].log_prob(z), by_hand)


def test_the_many_wells_log_normalizer_is_that_of_one_dimensional_quadrature():
    step = 12 / 4000
    line = -6 + step * (torch.arange(4000, dtype=torch.float64) + 0.5)
    z = torch.zeros(2, 4000, 32, dtype=torch.float64)  # along each of a pair's two coordinates
    z[0, :, 0] = z[1, :, 1] = line
    wells, widths = ENERGIES["many_well"].log_prob(z)
    assert float(wells.exp().sum() * step) == pytest.approx(11784.51, abs=0.005)
    assert float(widths.exp().sum() * step) == pytest.approx(math.sqrt(2 * math.pi))
    pair = torch.logsumexp(wells, 0) + torch.logsumexp(widths, 0) + 2 * math.log(step)
    assert 16 * float(pair) == pytest.approx(ENERGIES["many_well"].log_normalizer, abs=1e-6)
    assert float(torch.softmax(wells, 0)[line > 0].sum()) == pytest.approx(0.844307, abs=1e-6)


def test_the_many_well_is_a_sum_over_pairs_that_do_not_act_on_each_other():
    z = points(ENERGIES["many_well"], 16)
    alone = [torch.where(torch.arange(32) // 2 == pair, z, 0) for pair in range(16)]
    parts = torch.stack([ENERGIES["many_well"].log_prob(each) for each in alone])
    torch.testing.assert_close(parts.sum(0), ENERGIES["many_well"].log_prob(z))
    x1, x2 = z[:, 6], z[:, 7]
    torch.testing.assert_close(parts[3], -(x1**4) + 6 * x1**2 + 0.5 * x1 - 0.5 * x2**2)


EXPONENTS = [LinearAlphas(), GeometricAlphas(), GeometricAlphas(0.2), LearnedAlphas()]


@pytest.mark.parametrize("alphas", EXPONENTS, ids=repr)
@pytest.mark.parametrize("n", [1, 2, 3, 32])
def test_exponents_rise_from_exactly_zero_to_exactly_one(alphas, n):
    check_alphas(alphas(n))
    assert alphas(n).shape == (n + 1,) and torch.equal(exponents(alphas, n), alphas(n))
    assert len(GeometricPath(DiagonalGaussian.isotropic(2), ENERGIES["A"], alphas(n))) == n + 1


def test_linear_alphas_are_equally_spaced_and_geometric_ones_by_a_constant_factor():
    torch.testing.assert_close(linear_alphas(4), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    torch.testing.assert_close(geometric_alphas(3), torch.tensor([0, 0.01, 0.1, 1]))
    factors = geometric_alphas(32, 0.2)[2:] / geometric_alphas(32, 0.2)[1:-1]
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    for described, plain in ((LinearAlphas(), linear_alphas(5)), (GeometricAlphas(0.2), geometric_alphas(5, 0.2))):
        assert torch.equal(described(5), plain)
    assert torch.equal(LearnedAlphas()(5), linear_alphas(5))


@pytest.mark.parametrize("first", [0.0, 1.0, -0.1, math.nan])
def test_geometric_alphas_refuse_a_first_exponent_outside_zero_to_one(first):
    with pytest.raises(ValueError, match=r"^first must lie in \(0, 1\), got"):
        geometric_alphas(4, first)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_learned_exponents_start_equally_spaced_and_rise_whatever_their_weights(batch):
    path = LearnedAlphas().build(4, batch)
    assert path().shape == path(4).shape == (5, *batch)
    torch.testing.assert_close(path(), linear_alphas(4).view(-1, *[1] * len(batch)).expand(5, *batch))
    with torch.no_grad():
        path.logits.copy_(30 * torch.randn(4, *batch, generator=torch.Generator().manual_seed(0)))
    check_alphas(path())
    assert path().diff(dim=0).min() > 0.9 * path.SMALLEST
    (gradient,) = torch.autograd.grad(path()[2].sum(), path.logits)
    assert gradient.isfinite().all() and gradient.any()


WRONG = [[0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.6, 0.4, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0, math.nan, 1.0], [[0.0, 1.0]]]


@pytest.mark.parametrize("alphas", WRONG)
@pytest.mark.parametrize("given", ["path", "numbers", "function"])
def test_exponents_that_do_not_rise_from_zero_to_one_are_refused(alphas, given):
    with pytest.raises(ValueError, match="alphas must rise from 0 to 1, got"):
        if given == "path":
            GeometricPath(DiagonalGaussian.isotropic(2), ENERGIES["A"], alphas)
        else:
            exponents(alphas if given == "numbers" else lambda n: torch.tensor(alphas), len(alphas) - 1)


@pytest.mark.parametrize("alphas", [[0.0, 1.0], lambda n: linear_alphas(n - 1), LearnedAlphas().build(1)])
def test_exponents_of_another_number_of_transitions_are_refused(alphas):
    with pytest.raises(ValueError, match=r"^alphas must have 3 values for 2 transitions, got 2$"):
        exponents(alphas, 2)


@every_energy
def test_the_path_leads_from_base_to_target(name):
    base, z = DiagonalGaussian.isotropic(ENERGIES[name].dim, 3.0), points(ENERGIES[name])
    path = GeometricPath(base, ENERGIES[name], linear_alphas(4))
    assert len(path) == 5 and path.dim == ENERGIES[name].dim
    first, last = base.log_prob(z), ENERGIES[name].log_prob(z)
    torch.testing.assert_close(path[0].log_prob(z), first)
    torch.testing.assert_close(path[4].log_prob(z), last)
    torch.testing.assert_close(path[-1].log_prob(z), last)
    torch.testing.assert_close(path[1].log_prob(z), 0.25 * last + 0.75 * first)


@pytest.mark.parametrize("name", ["A", "F", "ring8"])
def test_quadrature_gives_the_log_normalizer_of_every_intermediate_target(name):
    target, alphas = ENERGIES[name], linear_alphas(16)
    base = DiagonalGaussian.isotropic(2, target.base_scale)
    path = GeometricPath(base, target, alphas)
    z, area = evidence.grid(1.5 * max(target.support, 5 * target.base_scale), 500)
    log_target, log_base = target.log_prob(z).flatten(), base.log_prob(z).flatten()
    for step in (0, 1, 4, 12, 16):
        alpha = float(alphas[step])
        truth = float(torch.logsumexp(alpha * log_target + (1 - alpha) * log_base, 0)) + math.log(area)
        found = evidence.log_normalizer_quadrature(path[step], points=300)
        assert found == pytest.approx(truth, abs=5e-4), step
    assert evidence.log_normalizer_quadrature(path[0], points=300) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_the_support_of_intermediate_targets_holds_a_shifted_and_wide_base(scale):
    base = DiagonalGaussian(torch.tensor([30.0, -5.0]), torch.tensor([scale, 1.0]))
    path = GeometricPath(base, ENERGIES["A"], linear_alphas(2))
    assert evidence.log_normalizer_quadrature(path[0]) == pytest.approx(0, abs=1e-5)
    assert path[2].support == ENERGIES["A"].support


def test_a_path_from_a_base_that_is_no_gaussian_has_the_targets_support():
    assert GeometricPath(ENERGIES["D"], ENERGIES["ring8"], linear_alphas(2))[1].support == ENERGIES["ring8"].support
