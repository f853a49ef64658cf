"""Evidence: what is true of a target, and how well a chain covers it. Log-densities and log-weights in nats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from annealed_core.chain import Chain


def grid(half_width: float, points: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, float]:
    """Midpoints of points x points equal cells of a square around 0, and the area of a cell.

    The midpoints are (points, points, 2), the first index running along z1.
    """
    step = 2 * half_width / points
    axis = -half_width + step * (torch.arange(points, dtype=dtype) + 0.5)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1), step**2


def _evaluate(target: Any, z: Tensor) -> Tensor:
    """Log f(z) in double precision, where the target can: a network with float32 weights is given float32."""
    try:
        return target.log_prob(z)
    except RuntimeError:
        return target.log_prob(z.float()).to(z)


def _two_dimensional(target: Any) -> None:
    if target.dim != 2:
        raise ValueError(f"quadrature needs a target of dim 2, got dim {target.dim}")


@torch.no_grad()
def log_normalizer_quadrature(target: Any, half_width: float | None = None, points: int = 1200) -> float:
    """Log Z of a two-dimensional target in nats, by the midpoint rule in double precision.

    Args:
        target: with `log_prob` and `dim` = 2.
        half_width: of the square that is integrated; the target's `support`, or 12, unless told.
        points: cells along each side.

    Raises ValueError for a target that is not two-dimensional, as all functions here that integrate do.
    """
    _two_dimensional(target)
    z, area = grid(half_width or float(getattr(target, "support", 12.0)), points)
    return float(torch.logsumexp(_evaluate(target, z).flatten(), 0)) + math.log(area)


@torch.no_grad()
def find_box(target: Any, half_width: float = 12.0, mass: float = 0.999) -> float:
    """Half-width of the smallest square around 0 that holds that share of a two-dimensional target's mass."""
    _two_dimensional(target)
    z, _ = grid(half_width, 400)
    order = z.abs().amax(-1).flatten().argsort()
    share = torch.softmax(_evaluate(target, z).flatten(), 0)[order].cumsum(0)
    outermost = min(int((share < mass).sum()), len(order) - 1)
    return math.ceil(10 * float(z.abs().amax(-1).flatten()[order][outermost])) / 10


@torch.no_grad()
def cell_masses(target: Any, half_width: float, bins: int = 24, refine: int = 10) -> Tensor:
    """Share of a two-dimensional target's mass in each cell of a square: (bins, bins), with a sum of at most 1."""
    z, area = grid(half_width, bins * refine)
    known = getattr(target, "log_normalizer", None)
    log_normalizer = log_normalizer_quadrature(target, points=600) if known is None else known
    mass = (_evaluate(target, z) - log_normalizer).exp() * area
    return mass.view(bins, refine, bins, refine).sum((1, 3))


def total_variation(z: Tensor, target: Any, half_width: float | None = None, bins: int = 24) -> float:
    """Total variation in [0, 1] between a histogram of samples and the target integrated over the same cells.

    All that lies outside the square counts as one more cell.

    Args:
        z: samples, (n, 2).
        target: two-dimensional; its `box` is the square's half-width unless `half_width` is given.
        half_width: of the square.
        bins: cells along each side.
    """
    half_width = half_width or getattr(target, "box", None) or find_box(target)
    truth = cell_masses(target, half_width, bins)
    index = ((z.to(truth) / half_width + 1) * (bins / 2)).floor().long()
    inside = ((index >= 0) & (index < bins)).all(-1)
    counts = torch.bincount(index[inside][:, 0] * bins + index[inside][:, 1], minlength=bins * bins)
    drawn = counts.view(bins, bins).to(truth) / len(z)
    outside = (drawn.sum() - truth.sum()).abs()
    return float(0.5 * ((drawn - truth).abs().sum() + outside))


def mode_masses(z: Tensor, centres: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Share of the samples z (n, dim) nearest to each centre (M, dim): (M,); weighted if log_weights (n,) are given."""
    nearest = torch.cdist(z, centres.to(z)).argmin(-1)
    share = torch.full_like(z[:, 0], 1 / len(z)) if log_weights is None else torch.softmax(log_weights, 0)
    return torch.zeros(len(centres), dtype=z.dtype, device=z.device).index_add_(0, nearest, share)


def log_mean_weight(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean weight over the first dimension, and its standard error: (n, *batch) -> two of (*batch,).

    The standard error is that of the delta method.
    """
    n = len(log_weights)
    estimate = torch.logsumexp(log_weights, 0) - math.log(n)
    relative = (log_weights - estimate).exp()
    return estimate, (relative.var(0) / n).sqrt()


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) in [1/n, 1], over the first dimension: (n, *batch) -> (*batch,)."""
    return (2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0)).exp() / len(log_weights)


@torch.no_grad()
def importance_sampling(chain: Chain, target: Any, n_samples: int, chunk: int = 4096) -> Tensor:
    """Log-weights of n_samples trajectories for each element of the chain's batch: (n_samples, *batch), in nats.

    At most about `chunk` trajectories are held at a time.
    """
    each = max(1, chunk // max(1, chain.base.batch_shape.numel()))
    sizes = [min(each, n_samples - done) for done in range(0, n_samples, each)]
    return torch.cat([chain.log_weight(target, chain.rsample(size)) for size in sizes])
