"""How good the posterior of an auto-encoder is.

    inference_gaps(model, x)    # what the bound loses by the family, and what by amortisation
    aggregate_kl(model, x)      # what the KL term of the bound consists of
    active_units(model, x)      # how many latents carry information

Models, images and random numbers are those of `likelihood`; no gradient reaches the model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from annealed_core.chain import Chain
from annealed_core.folded import (
    CHUNK_ROWS,
    WEIGHTS,
    log_weights_of,
    mean_and_error,
    part_of,
    posterior_of,
    slices,
    targets_of,
)
from annealed_core.kernels import DiagonalGaussian
from annealed_core.likelihood import ais, importance_sampling
from annealed_core.moves import check_positive, check_whole


@torch.no_grad()
def active_units(model: Any, x: Tensor, threshold: float = 0.01, n_samples: int = 256) -> tuple[int, Tensor]:
    """How many latents carry information: Var_x(E[z_T | x]) above the threshold (Burda et al. 2016, arXiv 1509.00519).

    Without kernels the mean is the Gaussian's. With kernels it is that of `n_samples` draws, and the variance that the
    draws alone give the means, (variance of the draws) / n_samples, is subtracted: the estimate has no bias, and can be
    just below 0.

    Returns the number, and the variance of each latent, (latents,). Raises ValueError for fewer than two images too.
    """
    check_whole(n_samples=n_samples)
    if n_samples < 2:
        raise ValueError(f"n_samples must be a whole number from 2, got {n_samples}")
    check_positive(threshold=threshold)
    chain = posterior_of(model, x)
    if len(x) < 2:
        raise ValueError(f"x must have at least 2 images, got {len(x)}")
    if not len(chain):
        variances = chain.base.loc.var(0)
    else:
        means, noise = [], []
        for images in slices(len(x), CHUNK_ROWS // n_samples):
            z = part_of(chain, images).rsample(n_samples).z[-1]
            means.append(z.mean(0))
            noise.append(z.var(0) / n_samples)
        variances = torch.cat(means).var(0) - torch.cat(noise).mean(0)
    return int((variances > threshold).sum()), variances


@dataclass(frozen=True)
class AggregateKL:
    """How much a posterior says about the images, and how far all of it together is from the prior; in nats.

    `mean_kl` = `mutual_information` + `aggregate_kl`, to rounding.

    Attributes:
        mean_kl: E_x KL(q(z | x) || p(z)).
        mutual_information: I(x; z) under q, at most log n_images.
        aggregate_kl: KL(q(z) || p(z)), where q(z) is the mean of q(z | x) over the given images.
        mean_kl_se, mutual_information_se, aggregate_kl_se: standard errors over images; NaN for one image.
    """

    mean_kl: float
    mutual_information: float
    aggregate_kl: float
    mean_kl_se: float
    mutual_information_se: float
    aggregate_kl_se: float


@torch.no_grad()
def aggregate_kl(model: Any, x: Tensor, n_samples: int = 10) -> AggregateKL:
    """Split the KL term of the ELBO into mutual information and the KL of the aggregate (Hoffman & Johnson 2016).

    q(z) is the mixture of the posteriors of all given images: exact for them, but with few images q(z) is rougher, and
    I(x; z) lower, than for all there are. Takes time and n_images^2 densities for each sample.

    A chain with kernels has no closed form for q(z_T | x). Here it stands for the mixture of the last kernel's
    densities given `n_samples` draws of z_{T-1}, one of which z_T came from (semi-implicit variational inference, Yin &
    Zhou 2018, arXiv 1805.11183): `mean_kl` is then an upper bound in expectation, which falls to KL(q(z_T | x) || p) as
    `n_samples` grows. Takes n_samples^2 n_images^2 densities.

    Raises ValueError for a chain whose last kernel is no pair of Gaussians too, such as a flow.
    """
    check_whole(n_samples=n_samples)
    chain = posterior_of(model, x)
    if not len(chain):
        components = chain.base.loc.unsqueeze(1), chain.base.scale.unsqueeze(1)  # (n_images, n_components, latents)
    else:
        *first, last = cast(Sequence[Any], chain.kernels)
        if not hasattr(last, "forwards"):
            raise ValueError(f"model must have a Gaussian as its last kernel, got {type(last).__name__}")
        before = Chain(chain.base, first, chain.context).rsample(n_samples).z[-1]
        components = tuple(each.transpose(0, 1) for each in last.forwards(before, chain.context))
    loc, scale = (each.double() for each in components)
    z = loc + scale * torch.randn(len(x), n_samples, loc.shape[-1]).to(loc)
    parts = [
        _log_densities(z[images], images, loc, scale)
        for images in slices(len(x), WEIGHTS // (n_samples * loc[..., 0].numel()))
    ]
    log_own, log_aggregate = (torch.cat(each) for each in zip(*parts, strict=True))
    log_prior = DiagonalGaussian(torch.zeros_like(loc[0, 0]), torch.ones_like(loc[0, 0])).log_prob(z)
    terms = (log_own - log_prior, log_own - log_aggregate, log_aggregate - log_prior)
    means, errors = zip(*(mean_and_error(term.mean(1)) for term in terms), strict=True)
    return AggregateKL(*means, *errors)


def _log_densities(z: Tensor, images: slice, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log q(z | x) of the own image and log q(z) in nats, for z (batch, n_samples, latents): two (batch, n_samples).

    q(z | x_j) is the mean of N(loc[j, m], scale[j, m]^2) over m; both are (n_images, n_components, latents).
    """
    # The square is written out so that all pairs are one product; in double precision the cancellation does not matter.
    precision = scale.square().reciprocal()
    constant = (-0.5 * loc.square() * precision - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    features = torch.cat([-0.5 * precision, loc * precision], -1).flatten(0, 1)
    pairs = torch.cat([z.square(), z], -1).flatten(0, 1) @ features.T + constant.flatten()
    of_each_image = _log_mean(pairs.unflatten(1, loc.shape[:2]), -1).unflatten(0, z.shape[:2])
    own = torch.arange(images.start, images.stop, device=z.device).view(-1, 1, 1).expand(-1, z.shape[1], 1)
    return of_each_image.gather(2, own).squeeze(2), _log_mean(of_each_image, -1)


@dataclass(frozen=True)
class InferenceGaps:
    """Where log p(x) - ELBO goes, in nats.

    Attributes:
        log_px: the better estimate, (n_images,).
        estimator: "importance sampling" or "ais": which of them is higher on average. Both are lower bounds.
        best_bound: of the best Gaussian for each image, (n_images,).
        amortised_bound: of the encoder's Gaussian, (n_images,).
        approximation, approximation_se: mean of log_px - best_bound and its standard error over images.
        amortisation, amortisation_se: mean of best_bound - amortised_bound and its standard error over images.
    """

    log_px: Tensor
    estimator: str
    best_bound: Tensor
    amortised_bound: Tensor
    approximation: float
    approximation_se: float
    amortisation: float
    amortisation_se: float


@torch.no_grad()
def inference_gaps(
    model: Any,
    x: Tensor,
    steps: int = 500,
    learning_rate: float = 0.05,
    n_gradient_samples: int = 16,
    n_samples: int = 5000,
    n_particles: int = 16,
    n_temperatures: int = 500,
    chunk_rows: int = CHUNK_ROWS,
) -> InferenceGaps:
    """Split log p(x) - ELBO into approximation and amortisation gap (Cremer, Li & Duvenaud 2018, arXiv 1801.03558).

    The best bound of the family is that of a diagonal Gaussian fitted to each image, from where the encoder puts it, by
    Adam with a learning rate that falls as a cosine to 0; both bounds are taken with the same fresh noise. With kernels
    the Gaussian is the chain's base, and kernels and context stay as they are.

    Args:
        model, x, chunk_rows: as for `importance_sampling`.
        steps, learning_rate, n_gradient_samples: of the fit.
        n_samples: of the bounds and of importance sampling.
        n_particles, n_temperatures: of AIS.
    """
    check_whole(steps=steps, n_gradient_samples=n_gradient_samples)
    check_positive(learning_rate=learning_rate)
    estimates = {
        "importance sampling": importance_sampling(model, x, n_samples, chunk_rows).log_px,
        "ais": ais(model, x, n_particles, n_temperatures, chunk_rows=chunk_rows).log_px,
    }
    # The larger for each image would be no lower bound: the noise of both would count upwards.
    estimator, log_px = max(estimates.items(), key=lambda each: float(each[1].mean()))
    chain, targets, bases, bounds = posterior_of(model, x), targets_of(model, x), [], []
    for images in slices(len(x), chunk_rows // n_gradient_samples):
        bases.append(_fit(part_of(chain, images), targets(images), steps, learning_rate, n_gradient_samples))
    base = DiagonalGaussian(torch.cat([each.loc for each in bases]), torch.cat([each.scale for each in bases]))
    best = Chain(base, chain.kernels, chain.context)
    for images in slices(len(x), WEIGHTS // n_samples):
        bounds.append(log_weights_of([best, chain], targets, images, n_samples, chunk_rows).mean(1))
    best_bound, amortised_bound = torch.cat(bounds, 1)
    gaps = mean_and_error(log_px - best_bound), mean_and_error(best_bound - amortised_bound)
    return InferenceGaps(log_px, estimator, best_bound, amortised_bound, *gaps[0], *gaps[1])


def _fit(chain: Chain, target: Any, steps: int, learning_rate: float, n_samples: int) -> DiagonalGaussian:
    """The base with which the chain has the highest ELBO for each image, its kernels as they are."""
    loc, log_scale = chain.base.loc.clone().requires_grad_(), chain.base.scale.log().requires_grad_()
    optimiser = torch.optim.Adam([loc, log_scale], learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        with torch.enable_grad():
            candidate = Chain(DiagonalGaussian(loc, log_scale.exp()), chain.kernels, chain.context)
            loss = -candidate.log_weight(target, candidate.rsample(n_samples)).mean(0).sum()
        loc.grad, log_scale.grad = torch.autograd.grad(loss, [loc, log_scale])
        optimiser.step()
        schedule.step()
    return DiagonalGaussian(loc.detach(), log_scale.detach().exp())


def _log_mean(values: Tensor, dim: int) -> Tensor:
    """Log of the mean of exp(values) along a dimension."""
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])
