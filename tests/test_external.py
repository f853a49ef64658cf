"""Targets that another system computes: values and gradients are those that it gives."""

import numpy as np
import pytest
import torch

from annealed_core import AVO, Density, External, Leapfrog, run
from annealed_core.ais import ais
from annealed_core.kernels import DiagonalGaussian


def value_and_gradient(z):
    """A normal density around (1, -1) with standard deviations 1 and 0.5, times 2."""
    assert isinstance(z, np.ndarray) and z.dtype == np.float64 and z.ndim == 2
    centred, precision = z - np.array([1.0, -1.0]), np.array([1.0, 4.0])
    log_f = np.log(2) - 0.5 * (centred**2 * precision).sum(1) - np.log(2 * np.pi) - np.log(0.5)
    return log_f, -centred * precision


def same(z):
    centred, precision = z - z.new_tensor([1.0, -1.0]), z.new_tensor([1.0, 4.0])
    return -0.5 * (centred.square() * precision).sum(-1)


TARGET = External(value_and_gradient, dim=2, log_normalizer=float(np.log(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2,), (7, 2), (3, 4, 2)])
def test_values_and_gradients_are_those_of_the_same_in_torch(dtype, shape):
    z = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, expected = TARGET.log_prob(z), same(z)
    assert found.dtype == dtype and found.shape == shape[:-1]
    torch.testing.assert_close(found - found.mean(), expected - expected.mean(), atol=1e-5, rtol=1e-5)
    weights = torch.randn(shape[:-1], dtype=dtype)
    (ours,) = torch.autograd.grad((weights * found).sum(), z)
    (theirs,) = torch.autograd.grad((weights * expected).sum(), z)
    torch.testing.assert_close(ours, theirs)


def test_it_is_trained_on_judged_and_annealed_to(store):
    r = run(Density(target=TARGET, objective=AVO(), n_transitions=2, steps=300, batch=64, samples=4000))
    assert abs(r.metrics["log_z"] - np.log(2)) < 0.1 and r.metrics["total_variation"] < 0.25
    particles = ais(TARGET, DiagonalGaussian.isotropic(2), 500, n_temperatures=30)
    assert abs(float(particles.log_z) - np.log(2)) < 5 * float(particles.log_z_se) + 0.02


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda z: (np.zeros((len(z), 1)), z), r"log f of points \(5, 2\) must have shape \(5,\), got \(5, 1\)"),
        (
            lambda z: (np.zeros(len(z)), z[:, 0]),
            r"its gradient of points \(5, 2\) must have shape \(5, 2\), got \(5,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shapes(function, line):
    with pytest.raises(ValueError, match=line):
        External(function, dim=2).log_prob(torch.zeros(5, 2))


def test_wrong_arguments_and_second_derivatives_are_refused(store):
    with pytest.raises(ValueError, match="impossible dim 0 of External"):
        External(value_and_gradient, dim=0)
    with pytest.raises(TypeError, match="must be a function of an array"):
        External("target", dim=2)
    with pytest.raises(RuntimeError, match="can be differentiated once: this takes a target in torch"):
        run(Density(target=TARGET, kernel=Leapfrog(), n_transitions=2, steps=2, batch=4, samples=10))
