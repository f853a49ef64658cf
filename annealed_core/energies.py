"""Energies: the named targets, with what is known of each.

Six in two dimensions, A to F, of github.com/alexey-pronkin/annealed in a version that normalises; four of other papers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

_LOG_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Energy:
    """A named target with what is known about it.

    Attributes:
        name: the name under which `ENERGIES` has it.
        log_density: z (*batch, dim) -> log f(z) (*batch,), in nats.
        dim: number of dimensions.
        log_normalizer: log of the integral of f in nats where it is known in closed form, else None.
        modes: None, or (centres (M, dim), masses (M,)) where the modes and their shares of the mass are known.
        box: half-width of the square in which samples are counted and drawn; it holds all but about 0.1 % of the mass
            (two-dimensional targets, as `support`).
        support: half-width of the square over which densities are integrated.
        base_scale: standard deviation of the base density N(0, base_scale^2 I) that chains start from.
    """

    name: str
    log_density: Callable[[Tensor], Tensor]
    dim: int = 2
    log_normalizer: float | None = None
    modes: tuple[Tensor, Tensor] | None = None
    box: float = 4.0
    support: float = 12.0
    base_scale: float = 1.0

    def log_prob(self, z: Tensor) -> Tensor:
        """Log f(z) in nats; z: (*batch, dim) -> (*batch,)."""
        return self.log_density(z)

    __call__ = log_prob


def _gauss(x: Tensor, scale: float) -> Tensor:
    """Logarithm of a Gaussian bump of height 1."""
    return -0.5 * (x / scale) ** 2


def _lse(*terms: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack(terms), 0)


# vector_norm has gradient 0 at the origin, where the square root of a sum would give NaN.
def _energy_a(z: Tensor) -> Tensor:
    z1 = z[..., 0]
    return _gauss(torch.linalg.vector_norm(z, dim=-1) - 2, 0.4) + _lse(_gauss(z1 - 2, 0.6), _gauss(z1 + 2, 0.6))


def _energy_b(z: Tensor) -> Tensor:
    z1, z2 = z[..., 0], z[..., 1]
    ring = _gauss(torch.linalg.vector_norm(z / 2, dim=-1) - 2, 0.5)
    return ring + _lse(_gauss(z1 - 2, 0.6), _gauss(2 * torch.sin(z1), 1.0), _gauss(z1 + z2 + 2.5, 0.6))


def _energy_c(z: Tensor) -> Tensor:
    return -((2 - torch.linalg.vector_norm(z * z.new_tensor([1.0, math.sqrt(0.5)]), dim=-1)) ** 2)


def _wave(z: Tensor) -> Tensor:
    return torch.sin(0.5 * math.pi * z[..., 0])


def _energy_e(z: Tensor) -> Tensor:
    return _gauss(z[..., 1] - _wave(z), 0.4) - 0.1 * z[..., 0] ** 2


def _energy_f(z: Tensor) -> Tensor:
    z1, offset = z[..., 0], z[..., 1] - _wave(z)
    bump = 3 * torch.exp(_gauss(z1 - 2, 1.0))
    return _lse(_gauss(offset, 0.35), _gauss(offset + bump, 0.35)) - 0.05 * z1**2


@dataclass(frozen=True)
class GaussianMixture:
    """Sum of isotropic Gaussians, log f(z) = log sum_m weights_m N(z; centres_m, variance I).

    `weights` (M,) need not sum to one: f then integrates to their sum. centres: (M, dim).
    """

    centres: Tensor
    weights: Tensor
    variance: float

    def __call__(self, z: Tensor) -> Tensor:
        """Log f(z) in nats; z: (*batch, dim) -> (*batch,)."""
        alone = [1] * (z.ndim - 1)  # the Gaussians come first, so that sums run along the samples
        distance = (z - self.centres.to(z).view(-1, *alone, z.shape[-1])).square().sum(-1)
        log_heights = self._log_heights.to(z).view(-1, *alone)
        return torch.logsumexp(torch.add(log_heights, distance, alpha=-0.5 / self.variance), 0)

    @functools.cached_property
    def _log_heights(self) -> Tensor:
        """Of each Gaussian at its centre."""
        dim = self.centres.shape[-1]
        return self.weights.double().log() - 0.5 * dim * math.log(2 * math.pi * self.variance)


def _mixture(name: str, centres: Tensor, weights: Tensor, variance: float, **known: Any) -> Energy:
    total = float(weights.sum())
    return Energy(
        name,
        GaussianMixture(centres, weights, variance),
        dim=centres.shape[-1],
        log_normalizer=math.log(total),
        modes=(centres, weights / total),
        **known,
    )


def _energy_d() -> Energy:
    centres = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    return _mixture("D", centres, torch.tensor([0.1, 0.3, 0.4, 0.2]), 0.2)


def _ring8() -> Energy:
    """Eight Gaussians on a circle of radius 10 (NVI, arXiv 2106.11302): unnormalised, log Z = log 8."""
    angle = torch.arange(8) * (math.pi / 4)
    centres = 10 * torch.stack([angle.cos(), angle.sin()], -1)
    return _mixture("ring8", centres, torch.ones(8), 0.5, box=14.0, support=18.0, base_scale=5.0)


def _gmm40() -> Energy:
    """Forty Gaussians with centres uniform on [-40, 40]^2, standard deviation softplus(1) (FAB, arXiv 2208.01893)."""
    uniform = torch.rand((40, 2), generator=torch.Generator().manual_seed(0))
    scale = float(softplus(torch.tensor(1.0, dtype=torch.float64)))
    return _mixture(
        "gmm40", (uniform - 0.5) * 80, torch.full((40,), 1 / 40), scale**2, box=46.0, support=52.0, base_scale=20.0
    )


def _funnel(z: Tensor) -> Tensor:
    """Neal's funnel (Neal 2003): z_0 ~ N(0, 3^2), z_i | z_0 ~ N(0, exp(z_0)) for i = 1, 2, ..."""
    first, rest = z[..., 0], z[..., 1:]
    log_first = _gauss(first, 3.0) - math.log(3)
    log_rest = -0.5 * (rest.square().sum(-1) * (-first).exp() + rest.shape[-1] * first)
    return log_first + log_rest - 0.5 * z.shape[-1] * _LOG_TWO_PI


def _many_well(z: Tensor) -> Tensor:
    """Sum over pairs (x1, x2) of -x1^4 + 6 x1^2 + x1 / 2 - x2^2 / 2: double wells (FAB, arXiv 2208.01893)."""
    wells, widths = z[..., ::2], z[..., 1::2]
    return (-wells.pow(4) + 6 * wells.square() + 0.5 * wells - 0.5 * widths.square()).sum(-1)


@dataclass(frozen=True)
class LogisticRegression:
    """Posterior of the coefficients of a logistic regression under N(0, 1), log f(z) = log p(z) + log p(labels | z).

    features: (n, dim), a column of ones among them for an intercept; labels: (n,), of 0 and 1. The integral of f is
    p(labels).
    """

    features: Tensor
    labels: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Log f(z) in nats; z: (*batch, dim) -> (*batch,)."""
        signed = (1 - 2 * self.labels).unsqueeze(-1) * self.features
        log_prior = -0.5 * (z.square().sum(-1) + z.shape[-1] * _LOG_TWO_PI)
        return log_prior - softplus(z @ signed.T.to(z)).sum(-1)


_TWO_ENDS = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([0.5, 0.5])  # A is even in z1

ENERGIES: dict[str, Energy] = {
    energy.name: energy
    for energy in (
        Energy("A", _energy_a, modes=_TWO_ENDS, box=4.0),
        Energy("B", _energy_b, box=7.0),
        Energy("C", _energy_c, box=7.0),
        _energy_d(),
        Energy("E", _energy_e, box=8.0),
        Energy("F", _energy_f, box=11.0),
        _ring8(),
        _gmm40(),
        Energy("funnel", _funnel, dim=10, log_normalizer=0.0),
        Energy("many_well", _many_well, dim=32, log_normalizer=16 * (math.log(11784.50927) + 0.5 * _LOG_TWO_PI)),
    )
}


def find(name: str) -> Energy:
    """The energy of that name; ValueError with the known names if there is none."""
    if name not in ENERGIES:
        raise ValueError(f"unknown target {name!r}: choose one of {', '.join(ENERGIES)}")
    return ENERGIES[name]
