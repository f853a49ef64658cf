"""A model whose posterior has two modes by symmetry, with everything about it known exactly.

    z ~ N(0, 1),     x_r = offset + right * max(z, 0) + left * max(-z, 0) + noise * e_r  for r = 1 ... R,  e_r ~ N(0, 1)

The truth is offset 0 and right = left = 1: x is a noisy measurement of |z|, both sides of z explain it equally well,
and p(z | x) is symmetric with a mode near x and one near -x. All four parameters are learned. Where right and left
come to differ one mode outweighs the other, and where they have opposite signs z -> x is monotone and p(z | x) has a
single mode: a posterior that keeps to one mode can draw the model there, at the cost of likelihood. The construction
is ours: that of Huang et al. 2018 (arXiv 1809.01818), whose claim this is to examine, is not public in code.

What can be said exactly: log p(x) in closed form and, independently of it, by quadrature; the masses of the two sides
of the posterior; the maximum-likelihood estimate. Log-densities in nats.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.special import log_ndtr

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
REACH = 8.0  # of grids over z ~ N(0, 1): 1e-15 of the prior lies beyond


def _normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log N(x; loc, scale^2), element by element."""
    return -0.5 * ((x - loc) / scale).square() - scale.log() - _HALF_LOG_TWO_PI


@functools.cache
def nodes(count: int = 1200, reach: float = REACH) -> tuple[Tensor, Tensor]:
    """Points z, rising, and log-weights of a composite Gauss-Legendre rule, 20 points a panel.

    0, where log p(x, z) has a kink, lies between two panels.
    """
    at, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(20))
    panels = 2 * (count // 40)
    width = 2 * reach / panels
    starts = width * torch.arange(-(panels // 2), panels // 2, dtype=torch.float64)
    z = starts.unsqueeze(-1) + (at + 1) * width / 2
    return z.flatten(), (weights * width / 2).log().repeat(panels)


@dataclass(frozen=True)
class FoldedLine:
    """The model of the module's docstring, or several of them.

    Args:
        offset, right, left, noise: numbers as tensors, all of one shape (*models,).
    """

    offset: Tensor
    right: Tensor
    left: Tensor
    noise: Tensor

    @classmethod
    def of(cls, offset: float = 0.0, right: float = 1.0, left: float = 1.0, noise: float = 0.3) -> FoldedLine:
        """One model from numbers, the truth unless told, in double precision; ValueError for a noise of 0 or less."""
        if not noise > 0:
            raise ValueError(f"noise must be positive, got {noise}")
        return cls(*(torch.tensor(float(v), dtype=torch.float64) for v in (offset, right, left, noise)))

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Offset, right, left, noise."""
        return self.offset, self.right, self.left, self.noise

    def double(self) -> FoldedLine:
        """The same in double precision, without gradients."""
        return FoldedLine(*(value.detach().double() for value in self.fields))

    def __getitem__(self, place: int) -> FoldedLine:
        return FoldedLine(*(value[place] for value in self.fields))

    @classmethod
    def stack(cls, models: list[FoldedLine]) -> FoldedLine:
        """Several models as one, (len(models), *models)."""
        return cls(*(torch.stack(values) for values in zip(*(model.fields for model in models), strict=True)))

    def mean(self, z: Tensor) -> Tensor:
        """What one model expects of x at z, element by element."""
        return self.offset + self.right * z.clamp(min=0) + self.left * (-z).clamp(min=0)

    def sample(self, n: int, measurements: int, generator: torch.Generator) -> Tensor:
        """Draw n observations of one model in double precision: (n, measurements)."""
        z = torch.randn((n, 1), generator=generator, dtype=torch.float64)
        return self.mean(z) + self.noise * torch.randn((n, measurements), generator=generator, dtype=torch.float64)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x | z) of one model; x: (batch, R), z: (*sample, batch, 1) -> (*sample, batch)."""
        return _normal(x, self.mean(z), self.noise).sum(-1)

    def _log_sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the integrals of p(x, z) over z > 0 and over z < 0; x: (*models, n, R) -> two of (*models, n).

        On a side x is linear in |z|, so that p(x, z) is a Gaussian in |z| there, cut off at 0; it meets x by the mean
        of its R measurements alone, but for a factor that does not depend on z.
        """
        repeats = x.shape[-1]
        offset, right, left, noise = (value.unsqueeze(-1) for value in self.fields)
        mean = x.mean(-1)
        spread = (x - mean.unsqueeze(-1)).square().sum(-1)
        around_mean = (1 - repeats) * (noise.log() + _HALF_LOG_TWO_PI) - 0.5 * (math.log(repeats) + spread / noise**2)
        error = noise / math.sqrt(repeats)
        found = []
        for slope in (right, left):
            total = (slope**2 + error**2).sqrt()
            centre, width = slope * (mean - offset) / total**2, error / total  # of |z|, given x
            found.append(_normal(mean, offset, total) + log_ndtr(centre / width) + around_mean)
        return found[0], found[1]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log p(x) in closed form; x: (*models, n, R) -> (*models, n)."""
        return torch.logaddexp(*self._log_sides(x))

    def right_share(self, x: Tensor) -> Tensor:
        """P(z > 0 | x), exactly; x: (*models, n, R) -> (*models, n)."""
        right, left = self._log_sides(x)
        return torch.sigmoid(right - left)

    def smaller_share(self, x: Tensor) -> Tensor:
        """Posterior mass of the side of 0 that has less of it, in [0, 0.5]; x: (*models, n, R) -> (*models, n)."""
        share = self.right_share(x)
        return torch.minimum(share, 1 - share)

    def log_joint_at(self, z: Tensor, x: Tensor) -> Tensor:
        """Log p(x, z) of one model at all pairs of points z (points,) and observations x (n, R): (n, points)."""
        one = torch.ones((), dtype=z.dtype)
        return _normal(x.unsqueeze(-1), self.mean(z), self.noise).sum(-2) + _normal(z, 0 * one, one)

    @torch.no_grad()
    def log_prob_quadrature(self, x: Tensor, count: int = 1200) -> Tensor:
        """Log p(x) of one model by quadrature over z in double precision; x: (n, R) -> (n,)."""
        z, log_weights = nodes(count)
        model = self.double()
        parts = [torch.logsumexp(model.log_joint_at(z, part) + log_weights, -1) for part in x.double().split(500)]
        return torch.cat(parts)

    @torch.no_grad()
    def count_modes(self, x: Tensor, count: int = 1200) -> Tensor:
        """How many local maxima p(z | x) of one model has, counted on a grid; x: (n, R) -> (n,)."""
        values = self.double().log_joint_at(nodes(count)[0], x.double())
        inner = values[:, 1:-1]
        return ((inner > values[:, :-2]) & (inner >= values[:, 2:])).sum(-1)


def maximum_likelihood(x: Tensor) -> FoldedLine:
    """The maximum-likelihood estimate for the data x (n, R), by L-BFGS on the closed form in double precision.

    From a symmetric and two slanted starts; the best end is taken. As z may be called -z, right >= left.
    """
    data, best, best_value = x.double(), None, -math.inf
    for tilt in (0.05, 0.5, 1.2):
        raw = torch.tensor([tilt / 2, 1 + tilt, 1 - tilt, math.log(0.3)], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [raw], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-13, line_search_fn="strong_wolfe"
        )

        def loss(raw: Tensor = raw, optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = -FoldedLine(raw[0], raw[1], raw[2], raw[3].exp()).log_prob(data).mean()
            value.backward()
            return value

        optimiser.step(loss)
        end = raw.detach()
        model = FoldedLine(end[0], end[1:3].max(), end[1:3].min(), end[3].exp())
        value = float(model.log_prob(data).mean())
        if value > best_value:
            best, best_value = model, value
    if best is None:
        raise ValueError("x must be finite: no start of the likelihood's maximum gave a number")
    return best
