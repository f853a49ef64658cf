"""Evidence: what is true of a target, and how well a chain covers it. Log-densities and log-weights in nats.

What is integrated is the square around 0 whose half-width is the target's `support` (else 12, or its `box` where that
is wider); samples are counted in the square of its `box` (else the one with 99.9 % of the mass). A square that misses
more than 1 % of the mass is refused with ValueError: looked for is mass out to four times the support, and in the cells
where samples lie. A half-width that is given as an argument is taken as it is.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from annealed_core.chain import Chain, Trajectory
from annealed_core.targets import GeometricPath, name_of

MISSED = 0.01  # share of a target's mass that a square may miss
_MOST_CELLS = 1000  # outside a square, in which mass is looked for


def log_prob_double(target: Any, z: Tensor) -> Tensor:
    """Log f(z) in double precision where the target can; z: (*batch, dim) -> (*batch,)."""
    try:
        return target.log_prob(z.double()).double()
    except RuntimeError:  # a network with float32 weights
        return target.log_prob(z.float()).double()


def log_weight_double(chain: Chain, target: Any, trajectory: Trajectory) -> Tensor:
    """`chain.log_weight` summed in double precision, with the target's part evaluated in it: (*sample, *batch)."""
    double = SimpleNamespace(dim=target.dim, log_prob=functools.partial(log_prob_double, target))
    ratios, log_q0 = trajectory.log_ratios.double(), trajectory.log_q0.double()
    return chain.log_weight(double, Trajectory(trajectory.z, ratios, log_q0))


def grid(half_width: float, points: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, float]:
    """Midpoints of equal cells of a square around 0, (points, points, 2) with z1 first, and the area of a cell."""
    step = 2 * half_width / points
    axis = -half_width + step * (torch.arange(points, dtype=dtype) + 0.5)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1), step**2


def _declared(target: Any, name: str) -> float:
    value = getattr(target, name, None)
    if value is None or isinstance(value, Constraint):  # torch's own `support`
        return 0.0
    if isinstance(value, numbers.Real) and 0 < float(value) < math.inf:
        return float(value)
    raise ValueError(f"{name} of {name_of(target)} must be a number above 0, half a square's width, got {value!r}")


def _support(target: Any) -> float:
    if target.dim != 2:
        raise ValueError(f"quadrature needs a target of dim 2, got dim {target.dim}")
    return _declared(target, "support") or max(12.0, _declared(target, "box"))


def _radius(z: Tensor, log_mass: Tensor, share: float = 0.999) -> float:
    """Half-width of the smallest square around 0 that holds that share of the masses (n,) at z (n, 2)."""
    reach = z.abs().amax(-1)
    order = reach.argsort()
    held = torch.softmax(log_mass, 0)[order].cumsum(0)
    return float(reach[order][min(int((held < share).sum()), len(order) - 1)])


def _check_held(target: Any, name: str, width: float, log_z: float, held: float, right: Callable[[], float]) -> None:
    if not abs(held - 1) <= MISSED:
        raise ValueError(
            f"{name} {width:g} of {name_of(target)} holds {held:.1%} of its mass by log Z = {log_z:.6g}: declare a "
            f"{name} of about {right():.3g}, half the width of a square around 0 that holds it, or log_normalizer"
        )


def _check_around(target: Any, log_inside: float, z: Tensor, area: float) -> None:
    """Refuse a support outside of which there is too much mass: looked for at points z (n, 2) of that area each."""
    if not len(z):  # which not every log_prob takes
        return
    log_mass = log_prob_double(target, z) + math.log(area)
    log_mass = torch.where(log_mass.isnan(), -torch.inf, log_mass)
    log_z = float(torch.logsumexp(torch.cat([log_mass, log_mass.new_tensor([log_inside])]), 0))
    held, right = math.exp(log_inside - log_z), lambda: 1.1 * _radius(z, log_mass)
    _check_held(target, "support", _support(target), log_z, held, right)


def _ring(half_width: float) -> tuple[Tensor, float]:
    z, area = grid(4 * half_width, 400)
    return z[z.abs().amax(-1) > half_width], area


def _points_in(cells: Tensor, width: float) -> tuple[Tensor, float]:
    """Points in those of the cells (m, 2), in units of their width, that come most often, and the area of each."""
    cells, counts = cells.unique(dim=0, return_counts=True)
    cells = cells[counts.topk(min(_MOST_CELLS, len(cells))).indices]
    midpoints, area = grid(0.5 * width, 10)
    return (width * (cells.view(-1, 1, 1, 2) + 0.5) + midpoints).view(-1, 2), area


@torch.no_grad()
def log_normalizer_quadrature(target: Any, half_width: float | None = None, points: int = 1200) -> float:
    """Log Z of a two-dimensional target in nats, by the midpoint rule in double precision.

    The square has the half-width that is given, or the target's support, and `points` cells along each side. Raises
    ValueError for a target that is not two-dimensional, as all functions here that integrate do, and for a support that
    misses mass.
    """
    support = _support(target)
    z, area = grid(half_width or support, points)
    found = float(torch.logsumexp(log_prob_double(target, z).flatten(), 0)) + math.log(area)
    if half_width is None:
        _check_around(target, found, *_ring(support))
    return found


@torch.no_grad()
def find_box(target: Any, half_width: float | None = None, mass: float = 0.999) -> float:
    """Half-width of the smallest square around 0 that holds that share of a target's mass, up to its support's."""
    z, _ = grid(half_width or _support(target), 400)
    return math.ceil(10 * _radius(z.view(-1, 2), log_prob_double(target, z).flatten(), mass)) / 10


def _log_normalizer(target: Any) -> float:
    _support(target)
    known = getattr(target, "log_normalizer", None)
    return log_normalizer_quadrature(target, points=600) if known is None else float(known)


@torch.no_grad()
def cell_masses(target: Any, half_width: float, bins: int = 24, refine: int = 10, log_z: float | None = None) -> Tensor:
    """Share of a two-dimensional target's mass in each cell of a square: (bins, bins), with a sum of at most 1."""
    log_z = _log_normalizer(target) if log_z is None else log_z
    z, area = grid(half_width, bins * refine)
    mass = (log_prob_double(target, z) - log_z).exp() * area
    return mass.view(bins, refine, bins, refine).sum((1, 3))


@torch.no_grad()
def _shares(z: Tensor, target: Any, half_width: float | None, bins: int) -> tuple[Tensor, Tensor]:
    """Shares of the samples and of the target's mass in each cell, and last in all that lies outside: (bins^2 + 1,)."""
    if z.shape[1:] != (2,):
        raise ValueError(f"z must have shape (n, 2), got {tuple(z.shape)}")
    support, declared, log_z = _support(target), _declared(target, "box"), _log_normalizer(target)
    box = half_width or declared or find_box(target)
    truth = cell_masses(target, box, bins, log_z=log_z).flatten()
    cells = ((z.to(truth) / box + 1) * (bins / 2)).floor()
    inside = ((cells >= 0) & (cells < bins)).all(-1)
    if half_width is None:
        square = ("box", box) if declared else ("support", support)
        _check_held(target, *square, log_z, float(truth.sum()), lambda: find_box(target, 4 * support))
        outside = cells[~inside & cells.isfinite().all(-1)] - bins / 2
        _check_around(target, log_z, *_points_in(outside, 2 * box / bins))
    index = cells[inside].long()
    counts = torch.bincount(index[:, 0] * bins + index[:, 1], minlength=bins * bins)
    drawn = counts.to(truth) / len(z)
    return torch.cat([drawn, (1 - drawn.sum(0, True)).clamp(min=0)]), torch.cat([truth, 1 - truth.sum(0, True)])


def total_variation(z: Tensor, target: Any, half_width: float | None = None, bins: int = 24) -> float:
    """Total variation in [0, 1] between a histogram of samples and the target integrated over the same cells.

    All that lies outside the square counts as one more cell. Samples are z (n, 2); `half_width` is that of the square,
    `bins` its cells along each side. Raises ValueError for a target that is not two-dimensional, or whose support or
    box misses mass.
    """
    return grid_divergences(z, target, half_width, bins)[0]


def grid_divergences(
    z: Tensor, target: Any, half_width: float | None = None, bins: int = 24
) -> tuple[float, float, float]:
    """`total_variation`, and KL(q || p) and KL(p || q) in nats between samples q and the target p, over the same cells.

    KL(q || p) is large where there are samples and no mass, KL(p || q) where there is mass and no samples: a lost mode.
    KL(q || p) takes the counts as they are. In KL(p || q) half a count is added to each cell (Krichevsky & Trofimov
    1981), so that an empty cell that holds mass costs much, the more the larger n, and not infinity. A mass below
    1e-16, which quadrature cannot tell from 0, counts as that. For n exact samples they are about (occupied cells) / 2n
    and bins^2 / 2n, and not 0. Arguments are those of `total_variation`.
    """
    drawn, truth = _shares(z, target, half_width, bins)
    variation, truth = 0.5 * (drawn - truth).abs().sum(), truth.clamp(min=1e-16)
    smooth = (drawn * len(z) + 0.5) / (len(z) + 0.5 * len(drawn))
    reverse, forward = torch.special.xlogy(drawn, drawn / truth), truth * (truth / smooth).log()
    return float(variation), float(reverse.sum()), float(forward.sum())


def mode_masses(z: Tensor, centres: Any, log_weights: Tensor | None = None) -> Tensor:
    """Share of the samples z (n, dim) nearest to each centre (M, dim): (M,); weighted if log_weights (n,) are given."""
    nearest = torch.cdist(z, torch.as_tensor(centres, dtype=z.dtype, device=z.device)).argmin(-1)
    shares = (torch.zeros_like(z[:, 0]) if log_weights is None else log_weights).double().softmax(0)
    return torch.bincount(nearest, shares, minlength=len(centres)).to(z.dtype)


def _relative(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in double precision in units of the highest, and the logarithm of that: (n, *batch), (*batch,)."""
    highest = log_weights.double().amax(0)
    return (log_weights - highest.clamp(min=-torch.finfo(torch.float64).max)).exp(), highest


def log_mean_weight(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean weight over the first dimension, and its standard error: (n, *batch) -> two of (*batch,)."""
    weights, highest = _relative(log_weights)
    mean = weights.mean(0)
    # By the delta method; a single weight cannot tell.
    error = weights.std(0) / mean / math.sqrt(len(weights)) if len(weights) > 1 else mean * math.nan
    return (highest + mean.log()).to(log_weights), error.to(log_weights)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) in [1/n, 1], over the first dimension: (n, *batch) -> (*batch,)."""
    weights, _ = _relative(log_weights)
    return (weights.mean(0).square() / weights.square().mean(0)).to(log_weights)


def pareto_k(log_weights: Tensor) -> Tensor:
    """Shape k of the generalized Pareto tail of the weights, over the first dimension: (n, *batch) -> (*batch,).

    Below 0.5 the weights have a finite variance; above 0.7 an estimate from them is not to be relied on (PSIS: Vehtari
    et al., arXiv 1507.02646). The tail are the M = min(n / 5, 3 sqrt(n)) largest weights; k is fitted by the profile
    posterior of Zhang & Stephens (2009) and drawn towards 0.5 as if ten more weights said so, as PSIS does. Where the
    tail is level, k = -inf; where fewer than five weights differ from the next below it (the others may be too small
    for a double), k = inf. Twenty weights or fewer say nothing: k = NaN, as where a log-weight is NaN.
    """
    n = len(log_weights)
    tail = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    if tail < 5:
        return torch.full_like(log_weights[0], math.nan)
    largest = log_weights.double().sort(0).values[-tail - 1 :]
    weights, _ = _relative(largest)
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


@torch.no_grad()
def path_gaps(chain: Chain, path: GeometricPath, n: int) -> tuple[Tensor, Tensor]:
    """How much the chain loses up to each step: log Z_t - E[log f_t(z_t) + sum_{s <= t} log r_s / q_s - log q_0(z_0)].

    In nats, from n trajectories, with log Z_t by quadrature: (T + 1,) and their standard errors, (T + 1,); for a chain
    with a batch, (T + 1, *batch). It is the KL divergence of the chain up to z_t from the target f_t extended backwards
    by r_t ... r_1 (Huang et al. 2018): never negative, 0 at t = 0 where the path starts from the chain's base, and at T
    what the ELBO lacks to log Z. Raises ValueError for another number of targets, and as `total_variation` does.
    """
    support = max(_support(path.target), *(path[step].support for step in range(len(path))))
    if len(path) != len(chain) + 1:
        raise ValueError(f"path must have {len(chain) + 1} targets for {len(chain)} transitions, got {len(path)}")
    alphas = path.alphas.tolist()

    def log_f(z: Tensor, alphas: list[float]) -> list[Tensor]:
        log_target, log_base = log_prob_double(path.target, z), log_prob_double(path.base, z)
        return [log_base if a == 0 else a * log_target + (1 - a) * log_base for a in alphas]  # 0 * -inf would be NaN

    inside, area = grid(support, 600)
    log_z = torch.stack([torch.logsumexp(each.flatten(), 0) for each in log_f(inside, alphas)]) + math.log(area)
    _check_around(path.target, float(log_z[-1]), *_ring(support))
    trajectory = chain.rsample(n)
    ratios = torch.cat([-trajectory.log_q0.unsqueeze(0), trajectory.log_ratios]).double().cumsum(0)
    bound = ratios + torch.stack([log_f(z, [alpha])[0] for z, alpha in zip(trajectory.z, alphas, strict=True)])
    return log_z.to(bound).view(-1, *[1] * (bound.ndim - 2)) - bound.mean(1), bound.std(1) / math.sqrt(n)


@torch.no_grad()
def importance_sampling(chain: Chain, target: Any, n_samples: int, chunk: int = 4096) -> Tensor:
    """The `log_weight_double` of n_samples trajectories (n_samples, *batch), about `chunk` at a time at most."""
    each = max(1, chunk // max(1, chain.base.batch_shape.numel()))
    sizes = [min(each, n_samples - done) for done in range(0, n_samples, each)]
    return torch.cat([log_weight_double(chain, target, chain.rsample(size)) for size in sizes])
