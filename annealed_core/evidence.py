"""Evidence: what is true of a target, and how well a chain covers it. Log-densities and log-weights in nats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from annealed_core.chain import Chain
from annealed_core.targets import GeometricPath


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


def _shares(z: Tensor, target: Any, half_width: float | None, bins: int) -> tuple[Tensor, Tensor]:
    """Shares of the samples and of the target's mass in each cell, and last in all that lies outside: (bins^2 + 1,)."""
    half_width = half_width or getattr(target, "box", None) or find_box(target)
    truth = cell_masses(target, half_width, bins).flatten()
    index = ((z.to(truth) / half_width + 1) * (bins / 2)).floor().long()
    inside = ((index >= 0) & (index < bins)).all(-1)
    counts = torch.bincount(index[inside][:, 0] * bins + index[inside][:, 1], minlength=bins * bins)
    drawn = counts.to(truth) / len(z)
    return torch.cat([drawn, (1 - drawn.sum(0, True)).clamp(min=0)]), torch.cat([truth, 1 - truth.sum(0, True)])


def total_variation(z: Tensor, target: Any, half_width: float | None = None, bins: int = 24) -> float:
    """Total variation in [0, 1] between a histogram of samples and the target integrated over the same cells.

    All that lies outside the square counts as one more cell.

    Args:
        z: samples, (n, 2).
        target: two-dimensional; its `box` is the square's half-width unless `half_width` is given.
        half_width: of the square.
        bins: cells along each side.
    """
    drawn, truth = _shares(z, target, half_width, bins)
    return float(0.5 * (drawn - truth).abs().sum())


def grid_divergences(z: Tensor, target: Any, half_width: float | None = None, bins: int = 24) -> tuple[float, float]:
    """KL(q || p) and KL(p || q) in nats between samples q and the target p, over the cells of `total_variation`.

    The first is large where there are samples and no mass, the second where there is mass and no samples: a lost mode.
    KL(q || p) takes the counts as they are: an empty cell adds nothing. In KL(p || q) half a count is added to each
    cell (Krichevsky & Trofimov 1981), so that an empty cell that holds mass costs much, the more the larger n, and
    not infinity. A mass below 1e-16, which quadrature cannot tell from 0, counts as 1e-16. For n exact samples they are
    about (occupied cells) / 2n and bins^2 / 2n, and not 0. Arguments are those of `total_variation`.
    """
    drawn, truth = _shares(z, target, half_width, bins)
    truth = truth.clamp(min=1e-16)
    smooth = (drawn * len(z) + 0.5) / (len(z) + 0.5 * len(drawn))
    reverse = torch.special.xlogy(drawn, drawn / truth).sum()
    return float(reverse), float((truth * (truth / smooth).log()).sum())


def mode_masses(z: Tensor, centres: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Share of the samples z (n, dim) nearest to each centre (M, dim): (M,); weighted if log_weights (n,) are given."""
    nearest = torch.cdist(z, centres.to(z)).argmin(-1)
    if log_weights is None:
        return torch.bincount(nearest, minlength=len(centres)).to(z.dtype) / len(z)
    return torch.zeros(len(centres), dtype=z.dtype, device=z.device).index_add_(0, nearest, log_weights.softmax(0))


def log_mean_weight(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean weight over the first dimension, and its standard error: (n, *batch) -> two of (*batch,).

    The standard error is that of the delta method; NaN for a single weight, which cannot tell.
    """
    n = len(log_weights)
    estimate = torch.logsumexp(log_weights, 0) - math.log(n)
    if n == 1:
        return estimate, torch.full_like(estimate, math.nan)
    relative = (log_weights - estimate).exp()
    return estimate, (relative.var(0) / n).sqrt()


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) in [1/n, 1], over the first dimension: (n, *batch) -> (*batch,)."""
    return (2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0)).exp() / len(log_weights)


def pareto_k(log_weights: Tensor) -> Tensor:
    """Shape k of the generalized Pareto tail of the weights, over the first dimension: (n, *batch) -> (*batch,).

    Below 0.5 the weights have a finite variance; above 0.7 an estimate from them is not to be relied on (PSIS:
    Vehtari, Simpson, Gelman, Yao & Gabry, arXiv 1507.02646). The tail are the M = min(n / 5, 3 sqrt(n)) largest
    weights, and k is fitted by the profile posterior of Zhang & Stephens (2009) and drawn towards 0.5 as if ten more
    weights said so, as PSIS does. Where the tail is level, the weights are bounded: k = -inf. Where it has fewer than
    five weights that differ from the next below it (the others may be too small for a double): k = inf. Twenty weights
    or fewer say nothing: k = NaN, as where a log-weight is NaN.
    """
    n = len(log_weights)
    tail = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    if tail < 5:
        return torch.full_like(log_weights[0], math.nan)
    largest = log_weights.double().sort(0).values[-tail - 1 :]
    highest = largest[-1].clamp(min=-torch.finfo(torch.float64).max)  # so that weights that are all 0 are level
    weights = (largest - highest).exp()
    level = weights[0] == weights[-1]
    x = torch.where(level, 1.0, weights[1:] - weights[0])
    above = (x > 0).sum(0)  # the zeros are ties with the weight below the tail, and no part of it
    quartile = x.gather(0, (tail - above + (above / 4 + 0.5).long() - 1).unsqueeze(0)).squeeze(0).clamp(min=1e-200)
    points = 30 + above.to(x).sqrt().floor()
    index = torch.arange(1, 31 + math.isqrt(tail)).to(x).view(-1, *[1] * level.ndim)
    theta = 1 / x[-1] + (1 - (points / (index - 0.5)).sqrt()) / (3 * quartile)
    shapes = torch.stack([torch.log1p(-each * x).sum(0) for each in theta]) / above
    log_rate = torch.where(shapes == 0, (above / x.sum(0)).log(), (-theta / shapes).log())  # the limit at theta = 0
    log_posterior = torch.where(index <= points, above * (log_rate - shapes - 1), -torch.inf)
    k = torch.log1p(-(torch.softmax(log_posterior, 0) * theta).sum(0) * x).sum(0) / above
    k = torch.where(above < 5, torch.inf, (above * k + 10 * 0.5) / (above + 10))
    return torch.where(level, -torch.inf, torch.where(largest[-1].isnan(), math.nan, k)).to(log_weights.dtype)


def standard_error(
    statistic: Callable[..., Any], z: Tensor, log_weights: Tensor | None = None, blocks: int = 20
) -> Tensor:
    """Standard error of any statistic of independent samples, by the jackknife that leaves out a block at a time.

    Args:
        statistic: z -> number or tensor, or (z, log_weights) -> one where log_weights are given.
        z: samples, (n, dim).
        log_weights: their weights in nats, (n,).
        blocks: of almost equal size, from 2 to n.

    Returns a tensor of the statistic's shape. The statistic must change smoothly with the shares of the samples, as
    means, weighted means and distances between histograms do. Raises ValueError for blocks that do not fit.
    """
    if not 2 <= blocks <= len(z):
        raise ValueError(f"blocks must lie in [2, {len(z)}], the number of samples, got {blocks}")
    values = []
    for block in torch.arange(len(z), device=z.device).tensor_split(blocks):
        rest = torch.ones(len(z), dtype=torch.bool, device=z.device)
        rest[block] = False
        given = (z[rest],) if log_weights is None else (z[rest], log_weights[rest])
        values.append(torch.as_tensor(statistic(*given), dtype=torch.float64))
    spread = torch.stack(values).var(0, correction=0)
    return ((blocks - 1) * spread).sqrt()


@torch.no_grad()
def path_gaps(chain: Chain, path: GeometricPath, n: int) -> tuple[Tensor, Tensor]:
    """How much the chain loses up to each step: log Z_t - E[log f_t(z_t) + sum_{s <= t} log r_s / q_s - log q_0(z_0)].

    In nats, from n trajectories, with log Z_t by quadrature: (T + 1,) and their standard errors, (T + 1,). It is the
    KL divergence of the chain up to z_t from the target f_t extended backwards by r_t ... r_1 (Huang et al. 2018, the
    bound of each intermediate target): never negative, 0 at t = 0 where the path starts from the chain's base, and at
    T what the ELBO lacks to log Z. A chain with a batch (*batch) gives two of (T + 1, *batch).

    Raises ValueError where the path does not have T + 1 targets, or they are not two-dimensional.
    """
    _two_dimensional(path)
    if len(path) != len(chain) + 1:
        raise ValueError(f"path must have {len(chain) + 1} targets for {len(chain)} transitions, got {len(path)}")
    alphas = path.alphas.tolist()

    def log_f(alpha: float, log_target: Tensor, log_base: Tensor) -> Tensor:
        return log_base if alpha == 0 else alpha * log_target + (1 - alpha) * log_base  # 0 * -inf would be NaN

    z, area = grid(max(path[step].support for step in range(len(path))), 600)
    on_grid = _evaluate(path.target, z).flatten(), _evaluate(path.base, z).flatten()
    log_z = torch.stack([torch.logsumexp(log_f(alpha, *on_grid), 0) for alpha in alphas]) + math.log(area)

    trajectory = chain.rsample(n)
    bounds, so_far = [], -trajectory.log_q0
    for step, (alpha, state) in enumerate(zip(alphas, trajectory.z, strict=True)):
        so_far = so_far if step == 0 else so_far + trajectory.log_ratios[step - 1]
        bounds.append(so_far + log_f(alpha, path.target.log_prob(state), path.base.log_prob(state)))
    bound = torch.stack(bounds).double()
    return log_z.to(bound).view(-1, *[1] * (bound.ndim - 2)) - bound.mean(1), bound.std(1) / math.sqrt(n)


@torch.no_grad()
def importance_sampling(chain: Chain, target: Any, n_samples: int, chunk: int = 4096) -> Tensor:
    """Log-weights of n_samples trajectories for each element of the chain's batch: (n_samples, *batch), in nats.

    At most about `chunk` trajectories are held at a time.
    """
    each = max(1, chunk // max(1, chain.base.batch_shape.numel()))
    sizes = [min(each, n_samples - done) for done in range(0, n_samples, each)]
    return torch.cat([chain.log_weight(target, chain.rsample(size)) for size in sizes])
