"""How well an auto-encoder's likelihood is known.

    importance_sampling(model, x).log_px    # from below, by the model's own posterior
    adaptive_importance_sampling(model, x).log_px  # from below, by a proposal fitted to each image
    ais(model, x).log_px                    # from below, whatever the posterior
    bdmc(model, 100)                        # from both sides, on images that the model draws itself

A model is asked for `posterior(x)`, a chain whose base is a DiagonalGaussian of batch (n_images,), and for `joint(x)`,
a target with `log_prob` and `dim`, in evaluation mode; no gradient reaches its weights. All draw from torch's random
state, and take the images in parts, so that about `chunk_rows` rows of latents are decoded at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from annealed_core import ais as annealing
from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.folded import (
    CHUNK_ROWS,
    WEIGHTS,
    log_weights_of,
    mean_and_error,
    part_of,
    posterior_of,
    refuse_training,
    slices,
    targets_of,
)
from annealed_core.kernels import DiagonalGaussian
from annealed_core.moves import check_positive, check_whole

_STARTS = ("prior", "posterior")
_FREEDOM = 20.0  # degrees, of the Student-t that is fitted to an image's posterior
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
    def from_log_weights(cls, log_weights: Tensor) -> Estimates:
        """Of weights (n, n_images) in nats."""
        estimate = evidence.log_mean_weight(log_weights)
        return cls(*estimate, evidence.effective_sample_size(log_weights), evidence.pareto_k(log_weights))

    @classmethod
    def cat(cls, parts: Sequence[Estimates]) -> Estimates:
        """Of the images of all parts, in their order."""
        names = ("log_px", "se", "ess", "pareto_k")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@torch.no_grad()
def importance_sampling(model: Any, x: Tensor, n_samples: int = 5000, chunk_rows: int = CHUNK_ROWS) -> Estimates:
    """Log p(x) of each image by importance sampling from the posterior (Burda et al. 2016, arXiv 1509.00519).

    Args:
        model: see the module.
        x: images, (n_images, pixels).
        n_samples: drawn for each image.
        chunk_rows: decoded at a time.

    Raises ValueError for a model in training mode, for images that are not (n_images, pixels) and for numbers that are
    not whole and above 0, as all functions here do.
    """
    check_whole(n_samples=n_samples, chunk_rows=chunk_rows)
    chain, targets, parts = posterior_of(model, x), targets_of(model, x), []
    for images in slices(len(x), WEIGHTS // n_samples):
        parts.append(Estimates.from_log_weights(log_weights_of([chain], targets, images, n_samples, chunk_rows)[0]))
    return Estimates.cat(parts)


@torch.no_grad()
def adaptive_importance_sampling(
    model: Any, x: Tensor, n_samples: int = 5000, n_rounds: int = 6, chunk_rows: int = CHUNK_ROWS
) -> Estimates:
    """Log p(x) of each image by importance sampling from a Student-t fitted to the image's own posterior.

    The posterior's draws give a first mean and covariance, and each round's draws, weighted, the next (adaptive
    importance sampling: Oh & Berger 1992; Cappe et al. 2008, arXiv 0710.4242). As long as few weights outweigh the
    others they are tempered, so that a fifth of the draws count. The estimate is of fresh draws from the last
    Student-t, whose support is everywhere, so that the mean weight is unbiased for p(x) whatever the rounds before have
    found. How far it can be trusted is another matter: a mode that no round saw, or a fit to too few draws, leaves it
    low in nearly every try, and its standard error does not show that; `pareto_k` above 0.7 is a warning.

    Args:
        model, x, chunk_rows: as for `importance_sampling`.
        n_samples: drawn for each image in each round, and then for the estimate: n_rounds + 1 times in all. At least 10
            a latent; a good fit in 40 dimensions takes a hundred a latent.
        n_rounds: fits, each to `n_samples` draws.

    Raises ValueError also for log-weights that are not finite.
    """
    check_whole(n_samples=n_samples, n_rounds=n_rounds, chunk_rows=chunk_rows)
    chain, targets, parts = posterior_of(model, x), targets_of(model, x), []
    if n_samples < _FITTED_TO * chain.base.dim:
        least = f"at least {_FITTED_TO * chain.base.dim}, {_FITTED_TO} for each of {chain.base.dim} latents"
        raise ValueError(f"n_samples must be {least}, got {n_samples}")
    for images in slices(len(x), min(chunk_rows, WEIGHTS // n_samples // 8)):
        target, piece = targets(images), part_of(chain, images)
        rows = max(1, chunk_rows // (images.stop - images.start))
        drawn = [_drawn_by(piece, target, len(some)) for some in torch.arange(n_samples).split(rows)]
        for _ in range(n_rounds):
            z, log_weights = (torch.cat(each) for each in zip(*drawn, strict=True))
            fitted = _fitted(z, log_weights)
            drawn = [_drawn_by_student(*fitted, target, len(some)) for some in torch.arange(n_samples).split(rows)]
        parts.append(Estimates.from_log_weights(torch.cat([log_weights for _, log_weights in drawn])))
    return Estimates.cat(parts)


@torch.no_grad()
def ais(
    model: Any,
    x: Tensor,
    n_particles: int = 16,
    n_temperatures: int = 500,
    start: str = "prior",
    alphas: Tensor | Sequence[float] | None = None,
    n_leapfrog: int = 5,
    chunk_rows: int = CHUNK_ROWS,
) -> Estimates:
    """Log p(x) of each image by annealed importance sampling with Hamiltonian moves (Wu et al. 2017, arXiv 1611.04273).

    The path is geometric from N(0, I), or from the base of the model's posterior, to the joint density. Step sizes are
    adapted to each image by a preliminary pass over some of the temperatures and then fixed, so that the mean weight is
    unbiased for p(x) and `log_px` a lower bound in expectation, whatever the number of particles.

    Args:
        model, x, chunk_rows: as for `importance_sampling`.
        n_particles: for each image.
        n_temperatures: T of the path; its exponents are `sigmoid_alphas` unless `alphas` (T + 1,) are given.
        start: "prior" or "posterior".
        n_leapfrog: leapfrog steps of the one move at each temperature.
    """
    alphas = _check_annealing(n_particles, n_temperatures, n_leapfrog, chunk_rows, start, alphas)
    chain, targets, parts = posterior_of(model, x), targets_of(model, x), []
    for images in slices(len(x), chunk_rows // n_particles):
        base, target = _start(chain, images, start), targets(images)
        steps = _step_sizes(target, base, n_particles, alphas, n_leapfrog)
        particles = annealing.ais(target, base, n_particles, alphas, n_moves=1, n_leapfrog=n_leapfrog, step_size=steps)
        parts.append(Estimates.from_log_weights(particles.log_weights))
    return Estimates.cat(parts)


@dataclass(frozen=True)
class Bounds:
    """Log p(x) of each image from both sides, in nats.

    Attributes:
        lower, upper: in expectation below and above log p(x), (n_images,).
        gap: mean of upper - lower; no estimate that goes into either is further than that from log p(x), on average.
        gap_se: its standard error over images; NaN for one image.
    """

    lower: Tensor
    upper: Tensor
    gap: float
    gap_se: float


def simulate_images(model: Any, n: int) -> tuple[Tensor, Tensor]:
    """Draw z ~ N(0, I) and binary images x ~ p(x | z) from a `VAE`: (n, latents), (n, 784)."""
    weight = next(model.parameters())
    z = torch.randn((n, model.latents), dtype=weight.dtype, device=weight.device)
    return z, torch.bernoulli(model.decode(z))


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
    chunk_rows: int = CHUNK_ROWS,
) -> Bounds:
    """Bidirectional Monte Carlo: how far AIS can be from log p(x), on images that the model draws itself.

    An image drawn together with its z has z as an exact posterior sample. AIS forwards gives a lower bound, AIS
    backwards from z an upper one (Grosse et al. 2015, arXiv 1511.02543; Wu et al. 2017, arXiv 1611.04273).

    Args:
        model, n_particles, n_temperatures, start, alphas, n_leapfrog, chunk_rows: as for `ais`.
        n_images: drawn from the model.
        simulate: n -> (z, x), exact draws of latents and images, (n, latents) and (n, pixels); unless given,
            `simulate_images(model, n)`.
    """
    check_whole(n_images=n_images)
    alphas = _check_annealing(n_particles, n_temperatures, n_leapfrog, chunk_rows, start, alphas)
    refuse_training(model)
    z, x = simulate_images(model, n_images) if simulate is None else simulate(n_images)
    chain, targets, lower, upper = posterior_of(model, x), targets_of(model, x), [], []
    for images in slices(n_images, chunk_rows // n_particles):
        base, target = _start(chain, images, start), targets(images)
        # The step sizes come from particles of their own: adapted to those that they move, or to z, they would bias.
        steps = _step_sizes(target, base, n_particles, alphas, n_leapfrog)
        forwards = annealing.ais(target, base, n_particles, alphas, n_moves=1, n_leapfrog=n_leapfrog, step_size=steps)
        # Each chain backwards has E[1 / w] = 1 / p(x) over z ~ p(z | x) and its moves, and so has the mean over chains
        # that share their start. By Jensen, -log of that mean is an upper bound, lower than the mean of log w.
        exact = z[images].expand(n_particles, -1, -1)
        backwards = annealing.reverse_ais(target, base, exact, steps, alphas, n_moves=1, n_leapfrog=n_leapfrog)
        lower.append(forwards.log_z)
        upper.append(backwards.log_z)
    below, above = torch.cat(lower), torch.cat(upper)
    return Bounds(below, above, *mean_and_error(above - below))


def sigmoid_alphas(n_temperatures: int, steepness: float = 4.0) -> Tensor:
    """Exponents of a path that are dense at both ends, alpha_t of sigmoid(steepness * (2 t / T - 1)): (T + 1,).

    Shifted and scaled to go from exactly 0 to exactly 1, as in Wu et al. 2017 (arXiv 1611.04273). Raises ValueError
    for a number of temperatures below 1, and for a steepness that is not above 0.
    """
    check_whole(n_temperatures=n_temperatures)
    check_positive(steepness=steepness)
    values = torch.sigmoid(torch.linspace(-steepness, steepness, n_temperatures + 1, dtype=torch.float64))
    return (values - values[0]) / (values[-1] - values[0])


def _drawn_by(chain: Chain, target: Any, n: int) -> tuple[Tensor, Tensor]:
    """States z_T of a chain and their log-weights: (n, n_images, latents), (n, n_images)."""
    trajectory = chain.rsample(n)
    return trajectory.z[-1], chain.log_weight(target, trajectory)


def _drawn_by_student(loc: Tensor, tril: Tensor, target: Any, n: int) -> tuple[Tensor, Tensor]:
    """Draws from a Student-t of each image and their log-weights, shaped as by `_drawn_by`; loc and tril by image."""
    dim, freedom = loc.shape[-1], _FREEDOM
    noise = torch.randn((n, *loc.shape), dtype=loc.dtype, device=loc.device)
    stretch = torch.distributions.Chi2(loc.new_tensor(freedom)).sample((n, len(loc))).div_(freedom).rsqrt_()
    noise *= stretch.unsqueeze(-1)
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


def _step_sizes(target: Any, base: DiagonalGaussian, n_particles: int, alphas: Tensor, n_leapfrog: int) -> Tensor:
    """Step sizes for each temperature and image, (T, n_images), from a pass over a tenth of them, at least 50."""
    last = len(alphas) - 1
    visited = torch.linspace(0, last, min(last, max(50, last // 10)) + 1).round().long()
    found = annealing.ais(target, base, n_particles, alphas[visited], n_leapfrog=n_leapfrog).step_sizes
    return found[torch.searchsorted(visited[1:], torch.arange(1, last + 1)).to(found.device)]


def _check_annealing(
    n_particles: int,
    n_temperatures: int,
    n_leapfrog: int,
    chunk_rows: int,
    start: str,
    alphas: Tensor | Sequence[float] | None,
) -> Tensor:
    """The exponents, after a look at all numbers."""
    check_whole(n_particles=n_particles, n_temperatures=n_temperatures, n_leapfrog=n_leapfrog, chunk_rows=chunk_rows)
    if start not in _STARTS:
        raise ValueError(f"unknown start {start!r}: choose one of {', '.join(_STARTS)}")
    return sigmoid_alphas(n_temperatures) if alphas is None else torch.as_tensor(alphas)


def _start(chain: Chain, images: slice, start: str) -> DiagonalGaussian:
    """Where AIS starts for these images."""
    base = part_of(chain, images).base
    prior = DiagonalGaussian(torch.zeros_like(base.loc), torch.ones_like(base.loc))
    return prior if start == "prior" else base
