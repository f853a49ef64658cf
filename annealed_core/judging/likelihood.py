"""How well an auto-encoder's likelihood is known.

    importance_sampling(model, x).log_px    # from below, by the model's own posterior
    adaptive_importance_sampling(model, x).log_px  # from below, by a proposal fitted to each image
    ais(model, x).log_px                    # from below, whatever the posterior
    bdmc(model, 100)                        # from both sides, on images that the model draws itself

What a model is asked for, and what is random, `images` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from annealed_core import ais as annealing
from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.judging.images import (
    CHUNK_ROWS,
    WEIGHTS,
    joint_of,
    log_weights_of,
    posterior_of,
    refuse_training,
    slices,
)
from annealed_core.kernels import DiagonalGaussian
from annealed_core.moves import check_positive, check_whole, draw_like

_STARTS = ("prior", "posterior")
_FREEDOM = 20  # degrees, of the Student-t that is fitted to an image's posterior
_FITTED_TO = 10  # draws for each dimension at least
_FITTED_SHARE = 0.2  # of its draws that count at least when it is fitted


@dataclass(frozen=True)
class Estimates:
    """Log p(x) of each image, estimated from n weights.

    Attributes:
        log_px: in nats, (n_images,); in expectation a lower bound.
        se: its standard error by the delta method in nats, (n_images,).
        ess: effective sample size as a fraction in [1 / n, 1], (n_images,).
        pareto_k: tail shape of the weights, as `evidence.pareto_k` has it, (n_images,); NaN for twenty or fewer.
    """

    log_px: Tensor
    se: Tensor
    ess: Tensor
    pareto_k: Tensor

    @classmethod
    def from_log_weights(cls, parts: Iterable[Tensor]) -> Estimates:
        """Of weights in nats, each part (n, some of the images)."""
        figures = evidence.log_mean_weight, evidence.effective_sample_size, evidence.pareto_k
        found = [[figure(log_weights) for figure in figures] for log_weights in parts]
        return cls(*map(torch.cat, zip(*((*estimate, ess, k) for estimate, ess, k in found), strict=True)))


@torch.no_grad()
def importance_sampling(
    model: Any, x: Tensor, n_samples: int = 5000, generator: torch.Generator | None = None
) -> Estimates:
    """Log p(x) of each image by importance sampling from the posterior (Burda et al. 2016, arXiv 1509.00519).

    Args:
        model, generator: see `images`.
        x: images, (n_images, pixels).
        n_samples: drawn for each image.

    Raises ValueError for a model in training mode, for images that are not (n_images, pixels) and for numbers that are
    not whole and above 0, as all functions here do.
    """
    check_whole(n_samples=n_samples)
    chain, joint = posterior_of(model, x, generator), joint_of(model, x)
    parts = slices(len(x), n_samples, WEIGHTS)
    return Estimates.from_log_weights(log_weights_of([chain[part]], joint[part], n_samples)[0] for part in parts)


@torch.no_grad()
def adaptive_importance_sampling(
    model: Any, x: Tensor, n_samples: int = 5000, n_rounds: int = 6, generator: torch.Generator | None = None
) -> Estimates:
    """Log p(x) of each image by importance sampling from a Student-t fitted to the image's own posterior.

    The posterior's draws give a first mean and covariance, and each round's draws, weighted, the next (adaptive
    importance sampling: Oh & Berger 1992; Cappe et al. 2008, arXiv 0710.4242). As long as few weights outweigh the
    others they are tempered, so that a fifth of the draws count. The estimate is of fresh draws from the last
    Student-t, whose support is everywhere, so that the mean weight is unbiased for p(x) whatever the rounds before have
    found. How far it can be trusted is another matter: a mode that no round saw, or a fit to too few draws, leaves it
    low in nearly every try, and its standard error does not show that; `pareto_k` above 0.7 is a warning.

    Args:
        model, x, generator: as for `importance_sampling`.
        n_samples: drawn for each image in each round, and then for the estimate: n_rounds + 1 times in all. At least 10
            a latent; a good fit in 40 dimensions takes a hundred a latent.
        n_rounds: fits, each to `n_samples` draws.

    Raises ValueError also for log-weights that are not finite.
    """
    check_whole(n_samples=n_samples, n_rounds=n_rounds)
    chain, joint = posterior_of(model, x, generator), joint_of(model, x)
    if n_samples < _FITTED_TO * chain.base.dim:
        least = f"at least {_FITTED_TO * chain.base.dim}, {_FITTED_TO} for each of {chain.base.dim} latents"
        raise ValueError(f"n_samples must be {least}, got {n_samples}")
    parts = slices(len(x), at_once=min(CHUNK_ROWS, WEIGHTS // n_samples // 8))
    return Estimates.from_log_weights(_adapted(chain[part], joint[part], n_samples, n_rounds) for part in parts)


@torch.no_grad()
def ais(
    model: Any,
    x: Tensor,
    n_particles: int = 16,
    n_temperatures: int = 500,
    start: str = "prior",
    alphas: Tensor | Sequence[float] | None = None,
    n_leapfrog: int = 5,
    generator: torch.Generator | None = None,
) -> Estimates:
    """Log p(x) of each image by annealed importance sampling with Hamiltonian moves (Wu et al. 2017, arXiv 1611.04273).

    The path is geometric from N(0, I), or from the base of the model's posterior, to the joint density. Step sizes are
    adapted to each image by a preliminary pass over some of the temperatures and then fixed, so that the mean weight is
    unbiased for p(x) and `log_px` a lower bound in expectation, whatever the number of particles.

    Args:
        model, x, generator: as for `importance_sampling`.
        n_particles: for each image.
        n_temperatures: T of the path; its exponents are `sigmoid_alphas` unless `alphas` (T + 1,) are given.
        start: "prior" or "posterior".
        n_leapfrog: leapfrog steps of the one move at each temperature.
    """
    parts = _annealed(model, x, n_particles, n_temperatures, start, alphas, n_leapfrog, generator)
    return Estimates.from_log_weights(particles.log_weights for _, particles, _ in parts)


@dataclass(frozen=True)
class Bounds:
    """Log p(x) of each image from both sides, in nats.

    Attributes:
        lower, upper: in expectation below and above log p(x), (n_images,).
        gap: upper - lower; on average no estimate that goes into either is further than that from log p(x).
    """

    lower: Tensor
    upper: Tensor
    gap: Tensor


@torch.no_grad()
def simulate_images(model: Any, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw z ~ N(0, I) and binary images x ~ p(x | z) from a `VAE`: (n, latents), (n, 784)."""
    z = draw_like(torch.randn, next(model.parameters()).new_empty((n, model.latents)), generator)
    probability = model.decode(z, generator)
    return z, (draw_like(torch.rand, probability, generator) < probability).to(z)


@torch.no_grad()
def bdmc(
    model: Any,
    n_images: int = 100,
    n_particles: int = 16,
    n_temperatures: int = 500,
    start: str = "prior",
    alphas: Tensor | Sequence[float] | None = None,
    n_leapfrog: int = 5,
    simulate: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    generator: torch.Generator | None = None,
) -> Bounds:
    """Bidirectional Monte Carlo: how far AIS can be from log p(x), on images that the model draws itself.

    An image drawn together with its z has z as an exact posterior sample. AIS forwards gives a lower bound, AIS
    backwards from z an upper one (Grosse et al. 2015, arXiv 1511.02543; Wu et al. 2017, arXiv 1611.04273).

    Args:
        model, n_particles, n_temperatures, start, alphas, n_leapfrog, generator: as for `ais`.
        n_images: drawn from the model.
        simulate: n -> (z, x), exact draws of latents and images, (n, latents) and (n, pixels); unless given, those of
            `simulate_images`.
    """
    check_whole(n_images=n_images)
    refuse_training(model)
    z, x = simulate_images(model, n_images, generator) if simulate is None else simulate(n_images)
    lower, upper = [], []
    parts = _annealed(model, x, n_particles, n_temperatures, start, alphas, n_leapfrog, generator)
    for part, forwards, backwards in parts:
        lower.append(forwards.log_z)
        # Each chain backwards has E[1 / w] = 1 / p(x) over z ~ p(z | x) and its moves, and so has the mean over chains
        # that share their start. By Jensen, -log of that mean is an upper bound, lower than the mean of log w.
        upper.append(backwards(z[part].expand(n_particles, -1, -1)).log_z)
    below, above = torch.cat(lower), torch.cat(upper)
    return Bounds(below, above, above - below)


def sigmoid_alphas(n_temperatures: int, steepness: float = 4.0) -> Tensor:
    """Exponents of a path that are dense at both ends, alpha_t of sigmoid(steepness * (2 t / T - 1)): (T + 1,).

    Shifted and scaled to go from exactly 0 to exactly 1, as in Wu et al. 2017 (arXiv 1611.04273). Raises ValueError
    for a number of temperatures below 1, and for a steepness that is not above 0.
    """
    check_whole(n_temperatures=n_temperatures)
    check_positive(steepness=steepness)
    values = torch.sigmoid(torch.linspace(-steepness, steepness, n_temperatures + 1, dtype=torch.float64))
    return (values - values[0]) / (values[-1] - values[0])


def _annealed(
    model: Any,
    x: Tensor,
    n_particles: int,
    n_temperatures: int,
    start: str,
    alphas: Tensor | Sequence[float] | None,
    n_leapfrog: int,
    generator: torch.Generator | None,
) -> Iterator[tuple[slice, annealing.Particles, Callable[..., annealing.Particles]]]:
    """For each part of the images `ais` of them, and a function that takes exact z backwards with the same moves.

    The step sizes are from a pass over a tenth of the temperatures, at least 50, with particles of its own: adapted to
    those that they move, or to an exact z, they would bias.
    """
    check_whole(n_particles=n_particles)
    if start not in _STARTS:
        raise ValueError(f"unknown start {start!r}: choose one of {', '.join(_STARTS)}")
    path = sigmoid_alphas(n_temperatures) if alphas is None else torch.as_tensor(alphas)
    last = len(path) - 1
    visited = torch.linspace(0, last, min(last, max(50, last // 10)) + 1).round().long()
    nearest = torch.searchsorted(visited[1:], torch.arange(1, last + 1))
    chain, joint = posterior_of(model, x, generator), joint_of(model, x)
    moves: dict[str, Any] = {"n_leapfrog": n_leapfrog, "generator": chain.generator}
    for part in slices(len(x), n_particles):
        target, base = joint[part], chain[part].base
        if start == "prior":
            base = DiagonalGaussian(torch.zeros_like(base.loc), torch.ones_like(base.scale))
        found = annealing.ais(target, base, n_particles, path[visited], **moves).step_sizes
        same: dict[str, Any] = {"step_size": found[nearest.to(found.device)], "alphas": path, "n_moves": 1, **moves}
        backwards = partial(annealing.reverse_ais, target, base, **same)
        yield part, annealing.ais(target, base, n_particles, **same), backwards


def _adapted(chain: Chain, target: Any, n_samples: int, n_rounds: int) -> Tensor:
    """Log-weights of the last of the Student-ts that are fitted to draws, (n_samples, n_images)."""
    sizes = [part.stop - part.start for part in slices(n_samples, len(chain.base.loc))]
    drawn = [(each.z[-1].clone(), chain.log_weight(target, each)) for each in map(chain.rsample, sizes)]
    for _ in range(n_rounds):
        fitted = _fitted(*(torch.cat(each) for each in zip(*drawn, strict=True)))
        drawn = [_drawn_by_student(*fitted, target, size, chain.generator) for size in sizes]
    return torch.cat([log_weights for _, log_weights in drawn])


def _drawn_by_student(
    loc: Tensor, tril: Tensor, target: Any, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draws from a Student-t of each image and their log-weights: (n, n_images, latents), (n, n_images)."""
    dim, freedom = loc.shape[-1], _FREEDOM
    # A normal vector divided by the root mean square of as many more normal numbers as there are degrees of freedom.
    drawn = draw_like(torch.randn, loc.new_empty((n, len(loc), dim + freedom)), generator)
    noise, more = drawn.split([dim, freedom], -1)
    noise = noise / more.square().mean(-1, keepdim=True).sqrt()
    constant = math.lgamma((freedom + dim) / 2) - math.lgamma(freedom / 2) - dim / 2 * math.log(freedom * math.pi)
    log_noise = constant - (freedom + dim) / 2 * torch.log1p(noise.square().sum(-1) / freedom)
    z = loc + (tril @ noise.unsqueeze(-1)).squeeze(-1)
    return z, target.log_prob(z) - log_noise + tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _fitted(z: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of the covariance of weighted draws of each image: (n_images, dim), (..., dim, dim)."""
    if not log_weights.isfinite().all():
        raise ValueError("x, or what the model makes of it, has log-weights that are not finite")
    low, high = torch.zeros_like(log_weights[0]), torch.ones_like(log_weights[0])
    for _ in range(20):  # the largest exponent up to 1 with which a fifth of the draws count
        middle = (low + high) / 2
        enough = evidence.effective_sample_size(middle * log_weights) >= _FITTED_SHARE
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    weights = torch.softmax(low * log_weights, 0).unsqueeze(-1)
    loc = (weights * z).sum(0)
    centred = z - loc
    covariance = torch.einsum("sni,snj->nij", weights * centred, centred)
    # A twentieth of the correlations is taken for noise, which also keeps the matrix from being singular.
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    return loc, torch.linalg.cholesky(torch.lerp(covariance, diagonal, 0.05))
