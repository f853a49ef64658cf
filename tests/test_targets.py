"""Targets: the energies against their tabulated integrals, symmetries and modes; the geometric path's ends."""

import math
import re

import pytest
import torch
from torch.distributions import MultivariateNormal

from annealed_core import evidence, targets
from annealed_core.kernels import DiagonalGaussian
from annealed_core.targets import ENERGIES, GeometricPath, find, linear_alphas

LOG_Z = {"A": 1.8775, "B": 3.8146, "C": 3.4502, "D": 0.0, "E": 1.7263, "F": 2.6324, "ring8": math.log(8), "gmm40": 0.0}
every_energy = pytest.mark.parametrize("name", ENERGIES)


def points(energy, n=512, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (2 * torch.rand((n, 2), generator=generator, dtype=dtype) - 1) * energy.box


def test_the_energies_are_those_of_the_report_and_two_mixtures():
    assert list(ENERGIES) == list(LOG_Z)
    assert all(energy.name == name and energy.dim == 2 for name, energy in ENERGIES.items())


@every_energy
def test_quadrature_gives_the_known_log_normalizer(name):
    points = 400 if name == "gmm40" else 1200  # forty components over a wide square: seconds with the default
    found, stated = evidence.log_normalizer_quadrature(ENERGIES[name], points=points), ENERGIES[name].log_normalizer
    assert found == pytest.approx(LOG_Z[name], abs=0.002)
    assert (stated is not None) == (name in ("D", "ring8", "gmm40"))
    if stated is not None:
        assert found == pytest.approx(stated, abs=1e-5)


@every_energy
def test_gradient_is_finite_at_the_origin_and_everywhere_in_the_box(name):
    z = torch.cat([torch.zeros(1, 2, dtype=torch.float64), points(ENERGIES[name])]).requires_grad_()
    (gradient,) = torch.autograd.grad(ENERGIES[name].log_prob(z).sum(), z)
    assert gradient.isfinite().all()
    assert gradient[1:].abs().sum(-1).gt(0).all()


@every_energy
def test_gradient_agrees_with_finite_differences(name):
    z = points(ENERGIES[name], 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ENERGIES[name].log_prob(z), z)


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
    torch.testing.assert_close(
        ENERGIES["D"].log_prob(z), torch.logsumexp(parts + weights.log(), 1), atol=1e-5, rtol=1e-6
    )


@every_energy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_log_prob_keeps_dtype_and_batch_shape(name, dtype, shape):
    z = points(ENERGIES[name], 12, dtype)[: math.prod(shape)].view(*shape, 2)
    value = ENERGIES[name].log_prob(z)
    assert value.shape == shape and value.dtype == dtype
    torch.testing.assert_close(value.double(), ENERGIES[name](z.double()), rtol=1e-3, atol=1e-3)


@every_energy
def test_the_box_holds_999_of_1000_and_the_support_everything(name):
    energy = ENERGIES[name]
    box, support, wider = (
        evidence.log_normalizer_quadrature(energy, half_width, points=400)
        for half_width in (energy.box, energy.support, 1.2 * energy.support)
    )
    assert 0.999 <= math.exp(box - wider) <= 1 + 1e-5
    assert support == pytest.approx(wider, abs=5e-4)


@pytest.mark.parametrize("name", ["A", "D", "ring8", "gmm40"])
def test_masses_of_modes_sum_to_one(name):
    centres, masses = ENERGIES[name].modes
    assert centres.shape == (len(masses), 2)
    assert masses.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", ["A", "D", "ring8"])
def test_masses_of_modes_are_the_mass_nearest_to_each_centre(name):
    centres, masses = ENERGIES[name].modes
    z, _ = evidence.grid(ENERGIES[name].support, 400)
    z = z.flatten(0, 1)
    found = evidence.mode_masses(z, centres, ENERGIES[name].log_prob(z))
    torch.testing.assert_close(found, masses.double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["D", "ring8"])
def test_modes_are_maxima(name):
    centres = ENERGIES[name].modes[0].double()
    around = torch.tensor([[0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]], dtype=torch.float64)
    nearby = ENERGIES[name].log_prob(centres.unsqueeze(1) + around)
    assert (ENERGIES[name].log_prob(centres).unsqueeze(1) > nearby).all()


def test_find_returns_the_energy_or_names_all_there_are():
    assert find("D") is ENERGIES["D"]
    message = "unknown target 'G': choose one of A, B, C, D, E, F, ring8, gmm40"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find("G")


def test_energies_are_targets():
    assert all(isinstance(energy, targets.Target) for energy in ENERGIES.values())


def test_linear_alphas_rise_from_zero_to_one():
    torch.testing.assert_close(linear_alphas(4), torch.tensor([0, 0.25, 0.5, 0.75, 1]))


@every_energy
def test_the_path_leads_from_base_to_target(name):
    base, z = DiagonalGaussian.isotropic(2, 3.0), points(ENERGIES[name])
    path = GeometricPath(base, ENERGIES[name], linear_alphas(4))
    assert len(path) == 5 and path.dim == 2
    first, last = base.log_prob(z), ENERGIES[name].log_prob(z)
    torch.testing.assert_close(path[0].log_prob(z), first)
    torch.testing.assert_close(path[4].log_prob(z), last)
    torch.testing.assert_close(path[-1].log_prob(z), last)
    torch.testing.assert_close(path[1].log_prob(z), 0.25 * last + 0.75 * first)


@pytest.mark.parametrize(
    "alphas",
    [[0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.6, 0.4, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0, math.nan, 1.0], [[0.0, 1.0]]],
)
def test_a_path_refuses_alphas_that_do_not_rise_from_zero_to_one(alphas):
    with pytest.raises(ValueError, match="alphas must rise from 0 to 1, got"):
        GeometricPath(DiagonalGaussian.isotropic(2), ENERGIES["A"], alphas)
