"""How much of its latents, and of the images, an auto-encoder explores.

    latent_information(model, x)         # what each latent says about the images
    coverage(grey, prior_samples(model, 2000), labels)    # which images the decoder can draw
    explore(model, x, grey, labels)      # all of it with `inference`'s measures, as plain values

What a model is asked for, and what is random, `images` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from annealed_core.judging.images import posterior_of, refuse_training, slices
from annealed_core.judging.inference import aggregate_kl
from annealed_core.moves import check_whole, draw_like

NEAREST = 5  # k of `coverage`
_SPACING = 4  # m of Vasicek's estimator
_DISTANCES = 2**22  # held at a time


@torch.no_grad()
def latent_information(
    model: Any, x: Tensor, n_samples: int = 256, n_images: int = 500, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Mean over images of KL(q(z_i | x) || N(0, 1)), and I(x; z_i), of each latent z_i of z_T: two of (latents,), nats.

    In double precision, and of the marginal of z_i, whatever the others are. The sum of the KLs is the KL of z_T where
    latents are independent given x, and less where they are not. I(x; z_i) = H(q(z_i)) - E_x H(q(z_i | x)) has no
    ceiling of log n, unlike the estimate of I(x; z) by a mixture of n posteriors; its sum is not I(x; z): latents may
    repeat each other, or say more together.

    Entropies given x are closed forms without kernels. With kernels, and of the aggregate q(z_i), of which there is one
    draw for each image, they are Vasicek's (1976, Journal of the Royal Statistical Society B 38, 54-59) with m = 4,
    less its expected error for a uniform density, where 2 m spacings of n draws have
    E log = digamma(2 m) - digamma(n + 1). For a Gaussian the KL by 256 draws is then 0.002 nats too high, by 64 draws
    0.014, measured; for two Gaussians six standard deviations apart 0.010 and 0.044 too low.

    Args:
        model, generator: as for `likelihood.importance_sampling`, with its errors.
        x: images; all go into the aggregate, the first `n_images` into what is a mean over images.
        n_samples: drawn for each of these, at least 2.
    """
    check_whole(2, n_samples=n_samples)
    check_whole(n_images=n_images)
    chain = posterior_of(model, x, generator)
    some = chain[:n_images]
    if len(chain):
        drawn = (some[part].rsample(n_samples).z[-1] for part in slices(len(some.base.loc), n_samples))
        squares, entropies = (
            torch.cat(each).mean(0)
            for each in zip(*((z.double().square().mean(0), _entropy(z)) for z in drawn), strict=True)
        )
    else:
        loc, scale = some.base.loc.double(), some.base.scale.double()
        squares = (loc.square() + scale.square()).mean(0)
        entropies = scale.log().mean(0) + 0.5 * (1 + math.log(2 * math.pi))
    return 0.5 * (squares + math.log(2 * math.pi)) - entropies, _entropy(chain.rsample().z[-1]) - entropies


def _entropy(draws: Tensor) -> Tensor:
    """Entropy in nats of each density that n draws are from, (n, *batch) -> (*batch): see `latent_information`."""
    n = len(draws)
    ordered = draws.movedim(0, -1).sort().values
    first = torch.arange(n, device=draws.device)
    below, above = (first - _SPACING).clamp_min(0), (first + _SPACING).clamp_max(n - 1)
    # Draws that rounding has made equal: the density is then as narrow as the numbers can tell.
    smallest = torch.finfo(draws.dtype).eps * ordered.abs().amax(-1, keepdim=True)
    spacings = (ordered[..., above] - ordered[..., below]).maximum(smallest).double().log().mean(-1)
    expected = torch.digamma((above - below).double()).mean() - torch.digamma(torch.tensor(n + 1.0).double())
    return spacings - expected.to(spacings)


@dataclass(frozen=True)
class Coverage:
    """How well generated images cover the real ones (Naeem et al. 2020, arXiv 2002.09797).

    Attributes:
        coverage: share of the real images that have a generated one within the distance to their k-th nearest real one.
        density: how many such balls a generated image lies in on average, divided by k; above 1 where they crowd.
        by_class: `coverage` among the real images of each label, in ascending order; empty without labels.
    """

    coverage: float
    density: float
    by_class: dict[int, float]


@torch.no_grad()
def coverage(real: Tensor, generated: Tensor, labels: Tensor | None = None, k: int = NEAREST) -> Coverage:
    """Coverage and density of generated images, by Euclidean distances.

    If both are n and m draws from the same distribution, the expected coverage is
    1 - (n - 1) ... (n - k) / ((m + n - 1) ... (m + n - k)), for n = m about 1 - 2^-k, and the expected density 1.

    Args:
        real, generated: (n, pixels) and (m, pixels).
        labels: of the real images, whole numbers, (n,).
        k: which neighbour sets the radius, below n.

    Raises ValueError for other shapes and for a k that is no whole number from 1 to n - 1.
    """
    check_whole(k=k)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1] or not len(generated):
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise ValueError(f"real and generated must have shapes (n, pixels) and (m, pixels), got {shapes}")
    if labels is not None and labels.shape != real.shape[:1]:
        raise ValueError(f"labels must have shape ({len(real)},), got {tuple(labels.shape)}")
    if k >= len(real):
        raise ValueError(f"k must be below the number of real images, {len(real)}, got {k}")
    real, generated = real.double(), generated.double()  # for the cancellation in the square that cdist writes out
    counts = []
    for rows in slices(len(real), max(len(real), len(generated)), _DISTANCES):
        others = torch.cdist(real[rows], real)
        others.diagonal(rows.start).fill_(torch.inf)  # no image is its own neighbour
        radius = others.kthvalue(k).values.unsqueeze(1)
        counts.append((torch.cdist(real[rows], generated) <= radius).sum(1))
    inside = torch.cat(counts)
    covered = (inside > 0).double()
    names = [] if labels is None else labels.unique().tolist()
    classes = {int(name): float(covered[labels == name].mean()) for name in names}
    density = float(inside.sum()) / (k * len(generated))
    return Coverage(float(covered.mean()), density, classes)


@torch.no_grad()
def prior_samples(model: Any, n: int, generator: torch.Generator | None = None) -> Tensor:
    """What a `VAE` decodes from n draws of z ~ N(0, I), see `VAE.decode`, in evaluation mode: (n, pixels).

    Raises ValueError for a model in training mode and for an n that is not a whole number from 1.
    """
    check_whole(n=n)
    refuse_training(model)
    z = draw_like(torch.randn, next(model.parameters()).new_empty((n, model.latents)), generator)
    return torch.cat([model.decode(z[part], generator) for part in slices(n)])


@torch.no_grad()
def aggregate_gaussian(model: Any, x: Tensor, generator: torch.Generator | None = None) -> tuple[float, float]:
    """KL(N(m, S) || N(0, I)) and the entropy of N(m, S) in nats, for mean m and covariance S of the aggregate q(z).

    Of one draw for each image. Unlike `inference.aggregate_kl` it has no ceiling in the number of images n: of its KL
    about latents * (latents + 3) / (4 n) is chance, which is subtracted; the entropy is by latents * (latents + 1) /
    (4 n) too low by chance, which is added. The entropy is at least that of q(z); of a q(z) with structure finer than
    its covariance the KL is less than KL(q(z) || p). Raises ValueError for fewer than 10 images a latent.
    """
    z = posterior_of(model, x, generator).rsample().z[-1].double()
    n, latents = z.shape
    if n < 10 * latents:
        raise ValueError(f"x must have at least {10 * latents} images for {latents} latents, got {n}")
    mean, covariance = z.mean(0), z.T.cov()
    log_det = torch.linalg.slogdet(covariance).logabsdet
    chance = latents * (latents + 3) / (4 * n)
    kl = 0.5 * (covariance.trace() + mean.square().sum() - latents - log_det) - chance
    entropy = 0.5 * (log_det + latents * (1 + math.log(2 * math.pi))) + latents * (latents + 1) / (4 * n)
    return float(kl), float(entropy)


def explore(
    model: Any,
    x: Tensor,
    grey: Tensor,
    labels: Tensor,
    n_images: int = 500,
    n_coverage: int = 2000,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """All measures of a `VAE` on MNIST as plain values, for a record; in nats where they are information.

    Args:
        model: in evaluation mode.
        x: binarised images, (n, 784), of which the first `n_images` go into what is said of the posterior, and all into
            the aggregate's moments and `latent_information`'s aggregate.
        grey: images with values from 0 to 1, (m, 784), of which the first `n_coverage` are held against as many decoded
            draws from the prior.
        labels: digits of the grey images, (m,).

    Its keys are those of `aggregate_kl`; `aggregate_gaussian_kl` and `aggregate_gaussian_entropy`; `latent_kl` and
    `latent_information`, in the latents' order; `coverage`, `density` and `coverage_by_digit`, a list in which a digit
    that no image shows is None; and what they were taken with: `information_images`, `information_ceiling`, which is
    the log of that, `coverage_images` and `coverage_k`.
    """
    check_whole(n_images=n_images, n_coverage=n_coverage)
    some, grey = x[:n_images], grey[:n_coverage]
    covered = coverage(grey, prior_samples(model, len(grey), generator), labels[:n_coverage])
    gaussian_kl, gaussian_entropy = aggregate_gaussian(model, x, generator)
    kl, information = latent_information(model, x, n_images=n_images, generator=generator)
    return {
        **aggregate_kl(model, some, generator=generator),
        "aggregate_gaussian_kl": gaussian_kl,
        "aggregate_gaussian_entropy": gaussian_entropy,
        "latent_kl": kl.tolist(),
        "latent_information": information.tolist(),
        "information_images": len(some),
        "information_ceiling": math.log(len(some)),
        "coverage": covered.coverage,
        "density": covered.density,
        "coverage_by_digit": [covered.by_class.get(digit) for digit in range(10)],
        "coverage_images": len(grey),
        "coverage_k": NEAREST,
    }
