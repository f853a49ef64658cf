"""How good the posterior of an auto-encoder is.

    inference_gaps(model, x)    # what the bound loses by the family, and what by amortisation
    aggregate_kl(model, x)      # what the KL term of the bound consists of
    active_units(model, x)      # how many latents carry information
    kernels_at_work(model, x)   # what the kernels add to the bound of the chain's base
    bounds(model, x)            # a few images' likelihood from both sides, and the gaps, as plain values

What a model is asked for, and what is random, `images` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from annealed_core.chain import Chain
from annealed_core.fit import maximise
from annealed_core.judging import likelihood
from annealed_core.judging.density import work_of_kernels
from annealed_core.judging.images import WEIGHTS, joint_of, log_weights_of, means_and_errors, posterior_of, slices
from annealed_core.kernels import DiagonalGaussian, drawn_log_prob, normal_log_prob
from annealed_core.moves import check_positive, check_whole, draw_like


@torch.no_grad()
def active_units(
    model: Any, x: Tensor, threshold: float = 0.01, n_samples: int = 256, generator: torch.Generator | None = None
) -> tuple[int, Tensor]:
    """How many latents carry information: Var_x(E[z_T | x]) above the threshold (Burda et al. 2016, arXiv 1509.00519).

    Without kernels the mean is the Gaussian's. With kernels it is that of `n_samples` draws, and the variance that the
    draws alone give the means, (variance of the draws) / n_samples, is subtracted: the estimate has no bias, and can be
    just below 0.

    Returns the number, and the variance of each latent, (latents,). Raises ValueError for fewer than two images too.
    """
    check_whole(2, n_samples=n_samples)
    check_positive(threshold=threshold)
    chain = posterior_of(model, x, generator)
    if len(x) < 2:
        raise ValueError(f"x must have at least 2 images, got {len(x)}")
    if len(chain):
        drawn = (chain[part].rsample(n_samples).z[-1] for part in slices(len(x), n_samples))
        means, noise = zip(*((z.mean(0), z.var(0) / n_samples) for z in drawn), strict=True)
        variances = torch.cat(means).var(0) - torch.cat(noise).mean(0)
    else:
        variances = chain.base.loc.var(0)
    return int((variances > threshold).sum()), variances


@torch.no_grad()
def kernels_at_work(
    model: Any, x: Tensor, n_samples: int = 1, generator: torch.Generator | None = None
) -> dict[str, float | None]:
    """What the kernels do for each image, as plain values; nothing for a chain without.

    `kernels_earn` is the mean bound less that of the base alone on the same noise, in nats, `kernels_earn_se` its
    standard error over images (None for one), `kernels_move` the mean |z_T - z_0| (`density.work_of_kernels`).

    Args:
        model, x, generator: as for `likelihood.importance_sampling`.
        n_samples: for each image.
    """
    check_whole(n_samples=n_samples)
    chain, joint, parts = posterior_of(model, x, generator), joint_of(model, x), []
    if not len(chain):
        return {}
    for part in slices(len(x), n_samples):
        trajectory, target = chain[part].rsample(n_samples), joint[part]
        log_f = target.log_prob(trajectory.z[0]), target.log_prob(trajectory.z[-1])
        parts.append(torch.stack(work_of_kernels(chain[part].base, trajectory, *log_f)).mean(1))
    earned, moved = torch.cat(parts, 1)
    found = means_and_errors(kernels_earn=earned)
    error = found["kernels_earn_se"] if len(x) > 1 else None
    return {**found, "kernels_earn_se": error, "kernels_move": float(moved.double().mean())}


@torch.no_grad()
def aggregate_kl(
    model: Any, x: Tensor, n_samples: int = 1, n_reverse: int = 4, generator: torch.Generator | None = None
) -> dict[str, float]:
    """Split the KL term of the ELBO into mutual information and the KL of the aggregate (Hoffman & Johnson 2016).

    In nats, `mean_kl`, E_x KL(q(z | x) || p(z)), is to rounding the sum of `mutual_information`, I(x; z) under q, and
    `aggregate_kl`, KL(q(z) || p(z)); `aggregate_entropy` is -E log q(z). Each has a standard error over images beside
    it, such as `mean_kl_se`; NaN for one image.

    q(z) is the mixture of the posteriors of all given images: exact for them, but with few images q(z) is rougher, and
    I(x; z) lower, than for all there are. Where the information comes near its ceiling of log n_images, the images are
    too few to tell, and `aggregate_kl` is little more than `mean_kl` - log n_images.

    Flows give q(z_T | x) exactly: each z_T is taken back through the flows of every image. A chain of pairs of
    Gaussians has no closed form for it. It is estimated by importance sampling of the states before z_T from the
    chain's own reverse kernels, and for the image that z_T was drawn for, the states that led there count as one more
    draw (Sobolev & Vetrov 2019, arXiv 1911.03587). `mean_kl` is then an upper bound in expectation: at most the KL term
    of the ELBO, and the closer to KL(q(z_T | x) || p) the larger `n_reverse`.

    Args:
        model, x, generator: as for `likelihood.importance_sampling`.
        n_samples: drawn from the posterior of each image.
        n_reverse: draws of the reverse kernels for each sample and each image; without them it doesn't matter.

    Takes n_samples * n_images^2 densities, with flows as many transitions back, with pairs n_reverse times as many.
    Raises ValueError for kernels that are neither all pairs of Gaussians nor all flows too.
    """
    check_whole(n_samples=n_samples, n_reverse=n_reverse)
    chain = posterior_of(model, x, generator)
    kind = _kind(chain)
    trajectory = chain.rsample(n_samples)
    z, log_path = trajectory.z[-1].flatten(0, 1), (trajectory.log_q0 - trajectory.log_ratios.sum(0)).flatten()
    image = torch.arange(len(x), device=z.device).repeat(n_samples).unsqueeze(1)
    parts = []
    # For each pair of z and image: what a flow's network takes, or several values a latent of the pairs' networks.
    context_dim = 0 if chain.context is None else chain.context.shape[-1]
    values = {"base": 1, "flows": z.shape[-1] + context_dim, "pairs": n_reverse * 4 * z.shape[-1]}[kind]
    for rows in slices(len(z), values * len(x), WEIGHTS):
        column, path = image[rows], log_path[rows, None].double()
        pairs = _log_densities(chain, z[rows], n_reverse)
        if kind == "flows":  # exactly as it was drawn, without the rounding of the way back
            pairs.scatter_(1, column, path)
        elif kind == "pairs":
            with_path = torch.logaddexp(pairs.gather(1, column) + math.log(n_reverse), path)
            pairs.scatter_(1, column, with_path - math.log(n_reverse + 1))
        parts.append((pairs.gather(1, column).squeeze(1), torch.logsumexp(pairs, 1) - math.log(len(x))))
    log_own, log_aggregate = (torch.cat(each) for each in zip(*parts, strict=True))
    log_prior = normal_log_prob(z, torch.zeros_like(z), torch.ones_like(z)).double()
    return means_and_errors(
        mean_kl=(log_own - log_prior).view(n_samples, -1).mean(0),
        mutual_information=(log_own - log_aggregate).view(n_samples, -1).mean(0),
        aggregate_kl=(log_aggregate - log_prior).view(n_samples, -1).mean(0),
        aggregate_entropy=-log_aggregate.view(n_samples, -1).mean(0),
    )


def _kind(chain: Chain) -> str:
    """What q(z_T | x) is made of: the "base" alone, "flows" or "pairs" of Gaussians."""
    if not len(chain):
        return "base"
    for kind, needed in (("flows", "inverse"), ("pairs", "reverse")):
        if all(hasattr(kernel, needed) for kernel in chain.kernels):
            return kind
    found = ", ".join(dict.fromkeys(type(kernel).__name__ for kernel in chain.kernels))
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
    backwards = list(chain.kernels)[::-1]
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
        noise = draw_like(torch.randn, loc, chain.generator)
        after, state = state, loc + scale * noise
        log_forwards = normal_log_prob(after, *kernel.forwards(state, chain.context))
        log_ratio = log_ratio + log_forwards - drawn_log_prob(noise, scale)
    log_ratio = log_ratio + chain.base.log_prob(state)
    return torch.logsumexp(log_ratio.double(), 0) - math.log(n_reverse)


@dataclass(frozen=True)
class InferenceGaps:
    """Where log p(x) - ELBO goes, in nats: all but the estimator (n_images,).

    Attributes:
        log_px: the better estimate.
        estimator: its name, such as "ais": the one that is higher on average, as all are lower bounds.
        best_bound, amortised_bound: of the best Gaussian for each image, and of the encoder's.
        approximation, amortisation: log_px - best_bound, and best_bound - amortised_bound.
    """

    log_px: Tensor
    estimator: str
    best_bound: Tensor
    amortised_bound: Tensor
    approximation: Tensor
    amortisation: Tensor


@torch.no_grad()
def inference_gaps(
    model: Any,
    x: Tensor,
    steps: int = 500,
    learning_rate: float = 0.05,
    n_gradient_samples: int = 16,
    n_samples: int = 5000,
    log_px: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> InferenceGaps:
    """Split log p(x) - ELBO into approximation and amortisation gap (Cremer, Li & Duvenaud 2018, arXiv 1801.03558).

    The best bound of the family is that of a diagonal Gaussian fitted to each image, from where the encoder puts it, by
    Adam with a learning rate that falls as a cosine to 0; both bounds are taken with the same fresh noise. With kernels
    the Gaussian is the chain's base, and kernels and context stay as they are.

    Args:
        model, x, generator: as for `likelihood.importance_sampling`.
        steps, learning_rate, n_gradient_samples: of the fit.
        n_samples: of the bounds and of importance sampling.
        log_px: estimates (n_images,) by their names; by importance sampling and `likelihood.ais` unless given.

    Where the base does not depend on the image, as with `base="prior"`, what it lacks counts as amortisation.
    """
    check_whole(steps=steps, n_gradient_samples=n_gradient_samples)
    check_positive(learning_rate=learning_rate)
    estimates = log_px or {
        "importance sampling": likelihood.importance_sampling(model, x, n_samples, generator).log_px,
        "ais": likelihood.ais(model, x, generator=generator).log_px,
    }
    # The larger for each image would be no lower bound: the noise of both would count upwards.
    estimator, estimate = max(estimates.items(), key=lambda each: float(each[1].mean()))
    chain, joint = posterior_of(model, x, generator), joint_of(model, x)
    parts = slices(len(x), n_gradient_samples)
    bases = [_fit(chain[part], joint[part], steps, learning_rate, n_gradient_samples) for part in parts]
    best = _with_base(chain, torch.cat([each.loc for each in bases]), torch.cat([each.scale for each in bases]))
    parts = slices(len(x), n_samples, WEIGHTS)
    bounds = [log_weights_of([best[part], chain[part]], joint[part], n_samples).mean(1) for part in parts]
    best_bound, amortised_bound = torch.cat(bounds, 1)
    gaps = estimate - best_bound, best_bound - amortised_bound
    return InferenceGaps(estimate, estimator, best_bound, amortised_bound, *gaps)


def _fit(chain: Chain, target: Any, steps: int, learning_rate: float, n_samples: int) -> DiagonalGaussian:
    """The base with which the chain has the highest ELBO for each image, its kernels as they are."""
    loc, log_scale = nn.Parameter(chain.base.loc.clone()), nn.Parameter(chain.base.scale.log())

    def bound(step: int) -> Tensor:
        candidate = _with_base(chain, loc, log_scale.exp())
        return candidate.log_weight(target, candidate.rsample(n_samples)).mean(0)

    with torch.enable_grad():
        maximise(bound, [loc, log_scale], steps, lr=learning_rate, lr_schedule="cosine")
    return DiagonalGaussian(loc.detach(), log_scale.detach().exp())


def _with_base(chain: Chain, loc: Tensor, scale: Tensor) -> Chain:
    return chain.replace(base=DiagonalGaussian(loc, scale))


ANNEALED: dict[str, Any] = {"n_particles": 8, "n_temperatures": 1000}  # from the prior: the same start for every model
WEIGHED, FITTED = 5000, 2000  # samples of the posterior for an image, and in each round of a fitted proposal


def bounds(model: Any, x: Tensor, annealed: int = 100, generator: torch.Generator | None = None) -> dict[str, float]:
    """What is known of the likelihood of some images, and what a `VAE`'s posterior loses, in nats, as plain values.

    Of all images: importance sampling from a proposal that is fitted to each. Of the first `annealed`, at least two or
    none, which takes minutes a hundred: importance sampling with the posterior's samples, annealed importance sampling
    from the prior, the bidirectional sandwich on as many images that the model draws, and the two gaps of inference.
    """
    adapted = likelihood.adaptive_importance_sampling(model, x, FITTED, generator=generator)
    found = {"bounds_images": len(x), "adaptive_samples": FITTED, "adaptive_pareto_k": float(adapted.pareto_k.median())}
    found |= means_and_errors(adaptive_nll=-adapted.log_px)
    few = x[:annealed]
    if not len(few):
        return found
    weighed = likelihood.importance_sampling(model, few, WEIGHED, generator).log_px
    ais = likelihood.ais(model, few, **ANNEALED, generator=generator).log_px
    sandwich = likelihood.bdmc(model, len(few), **ANNEALED, generator=generator)
    estimates = {"importance sampling": weighed, "ais": ais}
    gaps = inference_gaps(model, few, log_px=estimates, generator=generator)
    found |= {"annealed_images": len(few), "bdmc_lower": float(sandwich.lower.double().mean())}
    found |= {"bdmc_upper": float(sandwich.upper.double().mean())}
    return found | means_and_errors(
        is_nll=-weighed,
        ais_nll=-ais,
        is_minus_ais=weighed - ais,
        adaptive_minus_ais=adapted.log_px[: len(few)] - ais,
        bdmc_gap=sandwich.gap,
        approximation_gap=gaps.approximation,
        amortisation_gap=gaps.amortisation,
    )
