"""How well each factor of the data has a latent of its own: the mutual information gap.

mutual_information_gap(model.posterior(x).base.loc, factors)
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 20


def mutual_information(codes: Tensor, factors: Tensor, bins: int = BINS) -> Tensor:
    """Of each latent's code, in equal bins over its range, and each factor, in nats: (latents, n_factors)."""
    low, high = codes.amin(0), codes.amax(0)
    binned = ((codes - low) / (high - low).clamp(min=1e-12) * bins).long().clamp(max=bins - 1)
    found = torch.zeros(codes.shape[1], factors.shape[1], dtype=torch.float64)
    for k, factor in enumerate(factors.T):
        size = int(factor.max()) + 1
        for j, code in enumerate(binned.T):
            joint = torch.bincount(code * size + factor, minlength=bins * size).view(bins, size).double() / len(codes)
            found[j, k] = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.flatten())
    return found


def entropy(shares: Tensor) -> Tensor:
    """In nats, of shares that sum to 1."""
    return -torch.special.xlogy(shares, shares).sum()


def mutual_information_gap(codes: Tensor, factors: Tensor, bins: int = BINS) -> float:
    """The mean over factors of (the most that a latent says of it - the second most) / its entropy, in [0, 1].

    1 where each factor is in one latent alone, 0 where two know as much of it (Chen et al. 2018, arXiv 1802.04942; by
    bins of the codes as in Locatello et al. 2019, arXiv 1811.12359).

    Args:
        codes: such as posterior means, (n, latents) with 2 latents at least.
        factors: whole numbers from 0, (n, n_factors), each of which takes two values at least.
        bins: of each latent.

    Raises ValueError for shapes that do not fit.
    """
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors) or codes.shape[1] < 2:
        shapes = f"got {tuple(codes.shape)} and {tuple(factors.shape)}"
        raise ValueError(f"codes and factors must be (n, latents from 2) and (n, n_factors), {shapes}")
    most, second = mutual_information(codes, factors, bins).topk(2, 0).values
    entropies = torch.stack([entropy(torch.bincount(factor).double() / len(factor)) for factor in factors.T])
    return float(((most - second) / entropies).mean())
