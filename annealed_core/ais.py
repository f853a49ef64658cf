"""Annealed importance sampling (Neal 2001, arXiv physics/9803008): evidence of a target without training.

    particles = ais(target, DiagonalGaussian.isotropic(2))
    particles.log_z, particles.log_z_se

Particles drawn from a base follow f_t = target^alpha_t * base^(1 - alpha_t), moved by Markov moves and weighed at each
temperature: given ones, or as many as it takes to keep the weights even. `reverse_ais` goes the other way: the two
bracket log Z (bidirectional Monte Carlo). Densities and weights are in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from annealed_core.evidence import effective_sample_size, log_mean_weight, log_prob_double
from annealed_core.kernels import DiagonalGaussian
from annealed_core.moves import Hamiltonian, Langevin, Metropolis, check_positive, check_whole, draw_like
from annealed_core.nested import chosen, resampled
from annealed_core.targets import check_alphas, name_of

#: The share of accepted proposals that an adapted step size aims at: what is best in many dimensions (Roberts &
#: Rosenthal 2001), but for Hamiltonian moves (0.65, Neal 2011): a step must fit the narrowest part of a target too.
ACCEPTANCE = {"hamiltonian": 0.8, "langevin": 0.574, "metropolis": 0.234}
_JITTER = 0.5
Alphas = Tensor | Sequence[float] | Callable[[int], Tensor] | None


@dataclass(frozen=True)
class Particles:
    """What annealed importance sampling gives; `reverse_ais` says what differs there.

    Attributes:
        z: the particles' last states, (n, *batch, dim); properly weighted samples of the target.
        log_weights: in nats, (n, *batch).
        alphas: the temperatures used, (T + 1,), from 0 to 1.
        acceptance: mean acceptance at each temperature but the first, (T,).
        step_sizes: of the first move at each temperature but the first, (T, *batch).
        log_z, log_z_se: estimate of log Z in nats and its standard error by the delta method, (*batch,).
        ess: effective sample size as a fraction in [1 / n, 1], (*batch,).
    """

    z: Tensor
    log_weights: Tensor
    alphas: Tensor
    acceptance: Tensor
    step_sizes: Tensor
    log_z: Tensor
    log_z_se: Tensor
    ess: Tensor


def conditional_effective_sample_size(log_weights: Tensor, log_increments: Tensor) -> Tensor:
    """(sum W v)^2 / sum W v^2 in (0, 1] over the first dimension: two of (n, *batch) -> (*batch,).

    W are the weights so far, normalised, v the increments that come next (Zhou, Johansen & Aston 2016, arXiv
    1303.3123; here as a fraction).
    """
    log_weights = torch.log_softmax(log_weights, 0)
    log_increments = log_increments - log_increments.amax(0)  # the formula does not see it, but rounding would
    first, second = (torch.logsumexp(log_weights + power * log_increments, 0) for power in (1, 2))
    return (2 * first - second).exp()


def conditional_divergence(log_weights: Tensor, log_increments: Tensor) -> Tensor:
    """KL(f_{t-1} || f_t) in nats over the first dimension, as the same particles estimate it: (n, *batch) -> (*batch,).

    Log sum W v - sum W log v, the arguments as above (the trust region of arXiv 2508.12511 bounds such a divergence).
    """
    log_weights = torch.log_softmax(log_weights, 0)
    return torch.logsumexp(log_weights + log_increments, 0) - (log_weights.exp() * log_increments).sum(0)


def _next_alpha(alpha: float, bound: str, value: float, log_weights: Tensor, slope: Tensor) -> float:
    """The alpha, at most 1, up to which a step of the path keeps the bound: a threshold, or a divergence kl."""
    # A particle outside the support is lost at any step, so that it tells nothing about how far to go.
    inside = slope > -torch.inf
    log_weights, slope = torch.where(inside, log_weights, -torch.inf), torch.where(inside, slope, 0.0)

    def too_far(new: float) -> bool:
        if bound == "kl":
            return bool((conditional_divergence(log_weights, (new - alpha) * slope) > value).any())
        return bool((conditional_effective_sample_size(log_weights, (new - alpha) * slope) < value).any())

    if not too_far(1.0):
        return 1.0
    low, high = alpha, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if too_far(middle) else (middle, high)
    if low == alpha:
        raise ValueError(f"{bound} {value} cannot be kept at alpha = {alpha:g}: take a base nearer the target")
    return low


@dataclass(frozen=True)
class _Annealing:
    """What both directions have in common: arguments that are checked, weights and moves."""

    target: Any
    base: DiagonalGaussian
    move: str
    n_moves: int
    n_leapfrog: int
    step_size: Any
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        check_whole(n_moves=self.n_moves, n_leapfrog=self.n_leapfrog)
        if self.move not in ACCEPTANCE:
            raise ValueError(f"unknown move {self.move!r}: choose one of {', '.join(ACCEPTANCE)}")
        if self.target.dim != self.base.dim:
            raise ValueError(f"base must have the target's dim {self.target.dim}, got {self.base.dim}")

    def steps(self, n_temperatures: int) -> Tensor:
        """The given step size for each temperature but the first and each element of the batch: (T, *batch)."""
        check_positive(step_size=self.step_size)
        shape = (n_temperatures, *self.base.batch_shape)
        if not isinstance(self.step_size, Tensor):
            return self.base.loc.new_full(shape, self.step_size)
        if self.step_size.shape != shape:
            raise ValueError(f"step_size must have shape {shape}, got {tuple(self.step_size.shape)}")
        return self.step_size.to(self.base.loc)

    def slope(self, z: Tensor) -> Tensor:
        """Log f(z) - log q_0(z) in nats, (n, *batch): what a unit of alpha adds to the log-weights."""
        log_f, name = log_prob_double(self.target, z), name_of(self.target)
        if log_f.shape != z.shape[:-1]:
            shapes = f"{tuple(z.shape)} must have shape {tuple(z.shape[:-1])}, got {tuple(log_f.shape)}"
            raise ValueError(f"target {name}: log_prob of z {shapes}")
        if bool((log_f.isnan() | (log_f == torch.inf)).any()):
            raise ValueError(f"target {name}: log_prob must be finite or -inf, got NaN or +inf at a particle")
        return log_f - log_prob_double(self.base, z)

    def moved(self, z: Tensor, alpha: float, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The particles after the moves at that alpha, the step size adapted to them, and their mean acceptance."""
        log_f = lambda z: alpha * log_prob_double(self.target, z) + (1 - alpha) * log_prob_double(self.base, z)
        hamiltonian = partial(Hamiltonian, n_leapfrog=self.n_leapfrog)
        kind: Any = {"hamiltonian": hamiltonian, "langevin": Langevin, "metropolis": Metropolis}[self.move]
        jitter = _JITTER if self.step_size is None or isinstance(self.step_size, Tensor) else 0.0
        tempered, rates = SimpleNamespace(log_prob=log_f), []
        for _ in range(self.n_moves):
            each = step * (1 + jitter * (2 * draw_like(torch.rand, z[..., 0], self.generator) - 1))
            move = kind(tempered, each, generator=self.generator)
            z, _ = move(z)
            rates.append(move.accepted.mean(0))
            if self.step_size is None:
                step = (step * (rates[-1] - ACCEPTANCE[self.move]).exp()).to(z)
        return z, step, torch.stack(rates).mean()


def _checked(alphas: Alphas, n_temperatures: int) -> list[float]:
    check_whole(n_temperatures=n_temperatures)
    linear = torch.linspace(0, 1, n_temperatures + 1, dtype=torch.float64)
    found = linear if alphas is None else alphas(n_temperatures).detach() if callable(alphas) else alphas
    numbers = torch.as_tensor(found, dtype=torch.float64).flatten()
    check_alphas(numbers)
    return numbers.tolist()


@torch.no_grad()
def ais(
    target: Any,
    base: DiagonalGaussian,
    n_particles: int = 1000,
    alphas: Alphas = None,
    n_temperatures: int = 200,
    threshold: float | None = None,
    kl: float | None = None,
    move: str = "hamiltonian",
    n_moves: int = 2,
    n_leapfrog: int = 10,
    step_size: float | Tensor | None = None,
    resample: float | None = None,
    generator: torch.Generator | None = None,
) -> Particles:
    """Weighted samples of a target and an estimate of its log Z, by annealed importance sampling.

    Log w = sum_t (alpha_t - alpha_{t-1}) * (log f(z_{t-1}) - log q_0(z_{t-1})), with z_t from moves that leave f_t
    invariant. Where particles are resampled it is sequential Monte Carlo (Del Moral, Doucet & Jasra 2006). With a given
    step size the mean weight is unbiased for Z. An adapted one learns from the particles it moves, and so does a
    threshold or kl: the estimate is then consistent in their number.

    Args:
        target: with `log_prob` and `dim`; for Hamiltonian and Langevin moves differentiable by autograd.
        base: q_0, with parameters (*batch, dim): wide enough to reach all of the target.
        n_particles: of each element of the base's batch.
        alphas: exponents of the path, (T + 1,), rising from exactly 0 to exactly 1, or a function of T; else linear.
        n_temperatures: T of that function or line; T = 1 is importance sampling.
        threshold: in (0, 1): each next alpha is the one at which the conditional effective sample size (the lowest
            of the batch) equals it, and their number what it takes to reach 1.
        kl: above 0, in nats: the same with the divergence of f_{t-1} from f_t, the highest of the batch.
        move: "hamiltonian", "langevin" or "metropolis".
        n_moves, n_leapfrog: moves at each temperature, and leapfrog steps of a Hamiltonian one.
        step_size: the same for all moves, or one for each temperature and element of the batch, (T, *batch), as
            `Particles.step_sizes` has them; unless given, it follows the path, for each element of the batch, towards
            the acceptance in `ACCEPTANCE`. Unless it is one number, each particle takes a step within half of it, so
            that no number of leapfrog steps brings all back to where they were (Neal 2011, section 3.2).
        resample: in (0, 1): the share of the particles below which their effective sample size makes them be drawn anew
            by their weights, all of which are then the mean weight; never unless given.
        generator: what all is drawn from; torch's global generator unless given.

    Raises ValueError, naming the argument, for those that do not fit, for a target whose log_prob has the wrong shape
    or is NaN or +inf where a particle is, and for a base none of whose particles are where the target is above 0.
    """
    check_whole(n_particles=n_particles)
    annealing = _Annealing(target, base, move, n_moves, n_leapfrog, step_size, generator)
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), got {threshold!r}")
    if kl is not None and not kl > 0:
        raise ValueError(f"kl must be above 0, got {kl!r}")
    if resample is not None and not 0 < resample < 1:
        raise ValueError(f"resample must lie in (0, 1), got {resample!r}")
    bound, value = ("threshold", threshold) if kl is None else ("kl", kl)
    if value is not None and (alphas is not None or (kl and threshold)):
        other = "alphas" if alphas is not None else "threshold"
        raise ValueError(f"{other} and {bound} exclude each other: a {bound} chooses the alphas")
    if value is not None and isinstance(step_size, Tensor):
        raise ValueError(f"step_size must be a number or None with a {bound}, which chooses how many alphas there are")
    given = _checked(alphas, n_temperatures)
    steps = None if step_size is None else annealing.steps(1 if value else len(given) - 1)

    z = base.rsample(draw_like(torch.randn, base.loc.expand(n_particles, *base.loc.shape), generator))
    log_weights = torch.zeros_like(z[..., 0], dtype=torch.float64)
    step = 0.5 * base.scale.mean(-1)
    used, acceptance, step_sizes = [0.0], list[Tensor](), []
    while used[-1] < 1:
        slope = annealing.slope(z)
        if bool((slope == -torch.inf).all(0).any()):
            raise ValueError(
                f"base must reach where target {name_of(target)} is above 0, got log_prob = -inf at all {n_particles} "
                "particles: take a wider or nearer one, or more particles"
            )
        alpha = given[len(used)] if value is None else _next_alpha(used[-1], bound, value, log_weights, slope)
        log_weights = log_weights + (alpha - used[-1]) * slope
        if resample is not None and bool((effective_sample_size(log_weights) < resample).any()):
            z = chosen(z, resampled(log_weights, generator))
            log_weights = log_mean_weight(log_weights)[0].expand_as(log_weights)
        if steps is not None:
            step = steps[0 if value else len(used) - 1]
        used.append(alpha)
        step_sizes.append(step)
        z, step, rate = annealing.moved(z, alpha, step)
        acceptance.append(rate)
    estimates = (*log_mean_weight(log_weights), effective_sample_size(log_weights))
    temperatures = torch.tensor(used, dtype=torch.float64)
    return Particles(z, log_weights, temperatures, torch.stack(acceptance), torch.stack(step_sizes), *estimates)


@torch.no_grad()
def reverse_ais(
    target: Any,
    base: DiagonalGaussian,
    z: Tensor,
    step_size: float | Tensor,
    alphas: Alphas = None,
    n_temperatures: int = 200,
    move: str = "hamiltonian",
    n_moves: int = 2,
    n_leapfrog: int = 10,
    generator: torch.Generator | None = None,
) -> Particles:
    """An estimate of log Z from above: `ais` backwards, from exact samples of the target to the base.

    z_T is an exact sample, z_{t-1} comes from z_t by the moves that leave f_t invariant (each is its own reversal), and
    log w is that of `ais`. The mean of 1 / w is unbiased for 1 / Z, so that `log_z`, which is -log of it, is at least
    log Z in expectation (Grosse, Ghahramani & Adams 2015, arXiv 1511.02543). That needs step sizes that do not depend
    on z: take those of an `ais` with the same moves.

    Args:
        z: exact samples of the target, (n, *batch, dim); they may be n copies of one.
        step_size: as for `ais`, but never adapted.
        target, base, alphas, n_temperatures, move, n_moves, n_leapfrog, generator: as for `ais`, and best the same.

    Returns Particles whose `z` are at the base, and whose `log_z_se` and `ess` are those of the weights 1 / w; the rest
    is in the order of the alphas. Raises ValueError as `ais` does, and for a z where the target is 0.
    """
    annealing = _Annealing(target, base, move, n_moves, n_leapfrog, step_size, generator)
    if z.ndim != base.loc.ndim + 1 or z.shape[1:] != base.loc.shape:
        shape = ", ".join(map(str, base.loc.shape))
        raise ValueError(f"z must have shape (n, {shape}), got {tuple(z.shape)}")
    given = _checked(alphas, n_temperatures)
    steps = annealing.steps(len(given) - 1)
    log_weights, acceptance = torch.zeros_like(z[..., 0], dtype=torch.float64), []
    for t in range(len(given) - 1, 0, -1):
        z, _, rate = annealing.moved(z, given[t], steps[t - 1])
        slope = annealing.slope(z)
        if bool((slope == -torch.inf).any()):
            raise ValueError(f"z must be samples of target {name_of(target)}, got log_prob = -inf from one of them")
        log_weights = log_weights + (given[t] - given[t - 1]) * slope
        acceptance.append(rate)
    log_inverse, log_z_se = log_mean_weight(-log_weights)
    temperatures, ess = torch.tensor(given, dtype=torch.float64), effective_sample_size(-log_weights)
    return Particles(z, log_weights, temperatures, torch.stack(acceptance[::-1]), steps, -log_inverse, log_z_se, ess)
