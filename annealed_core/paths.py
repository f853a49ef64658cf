"""Learned paths: the exponents of the intermediate targets as weights to train (Zimmermann et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedPath(nn.Module):
    """Exponents 0 = alpha_0 < ... < alpha_T = 1 of M paths with weights to train, from the given ones (T + 1,).

    `objectives.path_fit` is what they are trained by.
    """

    SMALLEST = 1e-3  # of the increments, so that they never vanish

    def __init__(self, alphas: Tensor, n_models: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(alphas.diff().log().unsqueeze(-1).repeat(1, n_models))

    def forward(self) -> Tensor:
        """(T + 1, M)."""
        shares = torch.softmax(self.logits, 0) * (1 - self.SMALLEST * len(self.logits)) + self.SMALLEST
        ends = shares.new_zeros((1, shares.shape[1]))
        return torch.cat([ends, shares.cumsum(0)[:-1], ends + 1])
