"""Kernels: one transition of a chain.

Every kernel is called as `z_next, log_ratio = kernel(z, context, noise)`, where log_ratio = log r(z | z_next) - log
q(z_next | z): what the transition adds to the logarithm of the chain's weight. Trained pairs of Gaussians (Huang et
al. 2018) and Markov moves that are not trained (Neal 2001) answer the same call.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def normal_log_prob(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log N(z; loc, scale^2 I) in nats, summed over the last dimension."""
    return (-0.5 * ((z - loc) / scale).square() - scale.log() - _HALF_LOG_TWO_PI).sum(-1)


class DiagonalGaussian:
    """N(loc, scale^2) with independent coordinates: the base density of a chain.

    Args:
        loc, scale: (*batch, dim); scale > 0.
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        self.dim = loc.shape[-1]
        self.batch_shape = loc.shape[:-1]

    @classmethod
    def isotropic(cls, dim: int, scale: float = 1.0) -> DiagonalGaussian:
        """N(0, scale^2 I) in `dim` dimensions."""
        return cls(torch.zeros(dim), torch.full((dim,), float(scale)))

    def rsample(self, noise: Tensor) -> Tensor:
        """Loc + scale * noise, with gradients to both; noise: (*sample, *batch, dim), standard normal."""
        return self.loc + self.scale * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density in nats; z: (*sample, *batch, dim) -> (*sample, *batch)."""
        return normal_log_prob(z, self.loc, self.scale)

    def detach(self) -> DiagonalGaussian:
        """The same density, without a gradient to whatever made its parameters."""
        return DiagonalGaussian(self.loc.detach(), self.scale.detach())


class Kernel(Protocol):
    """One transition; see the module's docstring."""

    def __call__(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log_ratio (*batch,) in nats."""
        ...


class GatedGaussian(nn.Module):
    """A Gaussian conditional N(z' | mu, sigma^2) with a gate between staying and moving (Huang et al. 2018).

    h = relu(W [z, context]), mu = g * W_m h + (1 - g) * z with g = sigmoid(W_g h), sigma = softplus(W_s h).

    Args:
        dim: dimensions of z.
        hidden: width of h.
        context_dim: dimensions of the context (0: none), such as an encoder's features.
        near_identity: start close to z' = z (sigma = 0.02, gate bias -4, output weights * 0.3) instead of with
            torch's default, whose sigma of 0.69 at every step buries a chain of several transitions in noise.
    """

    def __init__(self, dim: int, hidden: int, context_dim: int = 0, near_identity: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden)
        self.context = nn.Linear(context_dim, hidden, bias=False) if context_dim else None
        self.outputs = nn.Linear(hidden, 3 * dim)
        if near_identity:
            with torch.no_grad():
                self.outputs.weight.mul_(0.3)
                self.outputs.bias[dim : 2 * dim] = -4.0
                self.outputs.bias[2 * dim :] = math.log(math.expm1(0.02))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> mu, sigma, both (*batch, dim)."""
        hidden = self.hidden(z)
        if self.context is not None:
            hidden = hidden + self.context(context)
        move, gate, scale = self.outputs(torch.relu(hidden)).chunk(3, -1)
        return torch.lerp(z, move, torch.sigmoid(gate)), softplus(scale) + 1e-6


class GatedGaussianPair(nn.Module):
    """A trained stochastic transition: q(z' | z) and the reverse r(z | z'), each a `GatedGaussian` (Huang et al. 2018).

    Arguments as for `GatedGaussian`.
    """

    def __init__(self, dim: int, hidden: int, context_dim: int = 0, near_identity: bool = False) -> None:
        super().__init__()
        self.forwards = GatedGaussian(dim, hidden, context_dim, near_identity)
        self.reverse = GatedGaussian(dim, hidden, context_dim, near_identity)

    def forward(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log r(z | z_next) - log q(z_next | z) (*batch,) in nats."""
        noise = torch.randn_like(z) if noise is None else noise
        loc, scale = self.forwards(z, context)
        z_next = loc + scale * noise
        log_q = (-0.5 * noise.square() - scale.log() - _HALF_LOG_TWO_PI).sum(-1)
        return z_next, normal_log_prob(z, *self.reverse(z_next, context)) - log_q


class Metropolis:
    """A random-walk Metropolis move that leaves `target` invariant: the transition of AIS (Neal 2001).

    Its reverse is its own reversal with respect to `target`, so that log r - log q = log f(z) - log f(z_next): a
    chain of such moves along a path of targets has exactly the AIS weight.

    Args:
        target: what the move leaves invariant.
        step_size: standard deviation of the proposal.
        n_moves: proposals made in one transition.

    The given noise moves the first proposal; acceptance and further proposals draw their own.
    """

    def __init__(self, target: object, step_size: float, n_moves: int = 1) -> None:
        self.target, self.step_size, self.n_moves = target, step_size, n_moves

    def __call__(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log f(z) - log f(z_next) (*batch,) in nats."""
        start = log_f = self.target.log_prob(z)  # type: ignore[attr-defined]
        for move in range(self.n_moves):
            fresh = noise if noise is not None and move == 0 else torch.randn_like(z)
            proposal = z + self.step_size * fresh
            log_f_new = self.target.log_prob(proposal)  # type: ignore[attr-defined]
            accept = torch.rand_like(log_f).log() < log_f_new - log_f
            z = torch.where(accept.unsqueeze(-1), proposal, z)
            log_f = torch.where(accept, log_f_new, log_f)
        return z, start - log_f
