"""How good the posterior of an auto-encoder is.

    inference_gaps(model, x)    # what the bound loses by the family, and what by amortisation
    aggregate_kl(model, x)      # what the KL term of the bound consists of
    active_units(model, x)      # how many latents carry information

Models, images and random numbers are those of `likelihood`; no gradient reaches the model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from annealed_core.kernels import DiagonalGaussian, drawn_log_prob, normal_log_prob
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
    check_whole(2, n_samples=n_samples)
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
        aggregate_entropy: -E log q(z).
        mean_kl_se, mutual_information_se, aggregate_kl_se, aggregate_entropy_se: standard errors over images; NaN for
            one image.
    """

    mean_kl: float
    mutual_information: float
    aggregate_kl: float
    aggregate_entropy: float
    mean_kl_se: float
    mutual_information_se: float
    aggregate_kl_se: float
    aggregate_entropy_se: float


@torch.no_grad()
def aggregate_kl(model: Any, x: Tensor, n_samples: int = 1, n_reverse: int = 4) -> AggregateKL:
    """Split the KL term of the ELBO into mutual information and the KL of the aggregate (Hoffman & Johnson 2016).

    q(z) is the mixture of the posteriors of all given images: exact for them, but with few images q(z) is rougher, and
    I(x; z) lower, than for all there are. Where the information comes near its ceiling of log n_images, the images are
    too few to tell, and `aggregate_kl` is little more than `mean_kl` - log n_images.

    Flows give q(z_T | x) exactly: each z_T is taken back through the flows of every image. A chain of pairs of
    Gaussians has no closed form for it. It is estimated by importance sampling of the states before z_T from the
    chain's own reverse kernels, and for the image that z_T was drawn for, the states that led there count as one more
    draw (Sobolev & Vetrov 2019, arXiv 1911.03587). `mean_kl` is then an upper bound in expectation: at most the KL term
    of the ELBO, and the closer to KL(q(z_T | x) || p) the larger `n_reverse`.

    Args:
        model, x: as for `likelihood.importance_sampling`.
        n_samples: drawn from the posterior of each image.
        n_reverse: draws of the reverse kernels for each sample and each image; without them it doesn't matter.

    Takes n_samples * n_images^2 densities, with flows as many transitions back, with pairs n_reverse times as many.
    Raises ValueError for kernels that are neither all pairs of Gaussians nor all flows too.
    """
    check_whole(n_samples=n_samples, n_reverse=n_reverse)
    chain = posterior_of(model, x)
    kind = _kind(chain)
    trajectory = chain.rsample(n_samples)
    z, log_path = trajectory.z[-1].flatten(0, 1), (trajectory.log_q0 - trajectory.log_ratios.sum(0)).flatten()
    image = torch.arange(len(x), device=z.device).repeat(n_samples)
    own, aggregate = [], []
    # For each pair of z and image: what a flow's network takes, or several values a latent of the pairs' networks.
    context_dim = 0 if chain.context is None else chain.context.shape[-1]
    values = {"base": 1, "flows": z.shape[-1] + context_dim, "pairs": n_reverse * 4 * z.shape[-1]}[kind]
    for rows in slices(len(z), WEIGHTS // values // len(x)):
        column = image[rows].unsqueeze(1)
        pairs = _log_densities(chain, z[rows], n_reverse)
        if kind == "flows":  # exactly as it was drawn, without the rounding of the way back
            pairs.scatter_(1, column, log_path[rows, None].double())
        elif kind == "pairs":
            with_path = torch.logaddexp(pairs.gather(1, column) + math.log(n_reverse), log_path[rows, None].double())
            pairs.scatter_(1, column, with_path - math.log(n_reverse + 1))
        own.append(pairs.gather(1, column).squeeze(1))
        aggregate.append(torch.logsumexp(pairs, 1) - math.log(len(x)))
    log_own, log_aggregate = torch.cat(own), torch.cat(aggregate)
    log_prior = DiagonalGaussian(torch.zeros_like(z[0]), torch.ones_like(z[0])).log_prob(z).double()
    terms = (log_own - log_prior, log_own - log_aggregate, log_aggregate - log_prior, -log_aggregate)
    means, errors = zip(*(mean_and_error(term.unflatten(0, (n_samples, -1)).mean(0)) for term in terms), strict=True)
    return AggregateKL(*means, *errors)


def _kind(chain: Chain) -> str:
    """What q(z_T | x) is made of: the "base" alone, "flows" or "pairs" of Gaussians."""
    kernels = list(cast(Sequence[Any], chain.kernels))
    if not kernels:
        return "base"
    for kind, needed in (("flows", ("inverse",)), ("pairs", ("forwards", "reverse"))):
        if all(hasattr(kernel, name) for kernel in kernels for name in needed):
            return kind
    found = ", ".join(dict.fromkeys(type(kernel).__name__ for kernel in kernels))
    raise ValueError(f"model must have kernels that are all flows or all pairs of Gaussians, got {found}")


def _log_densities(chain: Chain, z: Tensor, n_reverse: int) -> Tensor:
    """Log q(z_T | x) in nats of each z (rows, latents) for each image, in double precision: (rows, n_images)."""
    kind = _kind(chain)
    if kind == "base":
        # The square is written out so that all pairs are one product: double precision bears the cancellation.
        loc, scale, z = chain.base.loc.double(), chain.base.scale.double(), z.double()
        precision = scale.square().reciprocal()
        constant = (-0.5 * loc.square() * precision - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        return torch.cat([z.square(), z], 1) @ torch.cat([-0.5 * precision, loc * precision], 1).T + constant
    backwards = list(cast(Sequence[Any], chain.kernels))[::-1]
    if kind == "flows":
        state = z.unsqueeze(1).expand(-1, len(chain.base.loc), -1)
        log_volume = torch.zeros_like(state[..., 0])
        for kernel in backwards:
            state = kernel.inverse(state, chain.context)
            log_volume = log_volume + kernel(state, chain.context)[1]
        return (chain.base.log_prob(state) - log_volume).double()
    state = z.unsqueeze(1).expand(n_reverse, -1, len(chain.base.loc), -1)
    log_ratio = torch.zeros_like(state[..., 0])
    for kernel in backwards:
        loc, scale = kernel.reverse(state, chain.context)
        noise = torch.randn_like(loc)
        before = loc + scale * noise
        log_forwards = normal_log_prob(state, *kernel.forwards(before, chain.context))
        log_ratio = log_ratio + log_forwards - drawn_log_prob(noise, scale)
        state = before
    log_ratio = log_ratio + chain.base.log_prob(state)
    return torch.logsumexp(log_ratio.double(), 0) - math.log(n_reverse)


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
    start: str = "prior",
    chunk_rows: int = CHUNK_ROWS,
    log_px: Mapping[str, Tensor] | None = None,
) -> InferenceGaps:
    """Split log p(x) - ELBO into approximation and amortisation gap (Cremer, Li & Duvenaud 2018, arXiv 1801.03558).

    The best bound of the family is that of a diagonal Gaussian fitted to each image, from where the encoder puts it, by
    Adam with a learning rate that falls as a cosine to 0; both bounds are taken with the same fresh noise. With kernels
    the Gaussian is the chain's base, and kernels and context stay as they are.

    Args:
        model, x, chunk_rows: as for `importance_sampling`.
        steps, learning_rate, n_gradient_samples: of the fit.
        n_samples: of the bounds and of importance sampling.
        n_particles, n_temperatures, start: of AIS.
        log_px: estimates (n_images,) by their names, where they are known already.

    Where the base does not depend on the image, as with `from_prior`, what it lacks counts as amortisation.
    """
    check_whole(steps=steps, n_gradient_samples=n_gradient_samples)
    check_positive(learning_rate=learning_rate)
    estimates = log_px or {
        "importance sampling": importance_sampling(model, x, n_samples, chunk_rows).log_px,
        "ais": ais(model, x, n_particles, n_temperatures, start, chunk_rows=chunk_rows).log_px,
    }
    # The larger for each image would be no lower bound: the noise of both would count upwards.
    estimator, estimate = max(estimates.items(), key=lambda each: float(each[1].mean()))
    chain, targets, bases, bounds = posterior_of(model, x), targets_of(model, x), [], []
    for images in slices(len(x), chunk_rows // n_gradient_samples):
        bases.append(_fit(part_of(chain, images), targets(images), steps, learning_rate, n_gradient_samples))
    base = DiagonalGaussian(torch.cat([each.loc for each in bases]), torch.cat([each.scale for each in bases]))
    best = Chain(base, chain.kernels, chain.context)
    for images in slices(len(x), WEIGHTS // n_samples):
        bounds.append(log_weights_of([best, chain], targets, images, n_samples, chunk_rows).mean(1))
    best_bound, amortised_bound = torch.cat(bounds, 1)
    gaps = mean_and_error(estimate - best_bound), mean_and_error(best_bound - amortised_bound)
    return InferenceGaps(estimate, estimator, best_bound, amortised_bound, *gaps[0], *gaps[1])


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
