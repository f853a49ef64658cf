"""Markov moves that leave a target invariant: what annealed importance sampling is made of.

They answer the call of every kernel, `z_next, log_ratio = move(z, context, noise)`. As for the random walk,
`Metropolis`, the reverse kernel is the move's own reversal, so that log_ratio = log f(z) - log f(z_next). The two that
are defined here follow the gradient of log f.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from annealed_core.kernels import Metropolis

__all__ = ["Hamiltonian", "Langevin", "Metropolis", "check_positive", "check_whole"]


def check_whole(least: int = 1, /, **fields: Any) -> None:
    """Refuse, by name, whatever is not a whole number from `least`: ValueError."""
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")


def check_positive(**fields: Any) -> None:
    """Refuse, by name, a number, or a tensor of numbers, that is not finite and above 0: ValueError."""
    for name, value in fields.items():
        if not isinstance(value, int | float | Tensor) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
        numbers = torch.as_tensor(value)
        if not bool(((numbers > 0) & numbers.isfinite()).all()):
            raise ValueError(f"{name} must be finite and above 0, got {value!r}")


def _value_and_gradient(target: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Log f(z) in nats (*batch,) and its gradient (*batch, dim), 0 where that is not finite; neither has a graph."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_f = target.log_prob(z)
        if not log_f.requires_grad:  # a density that is flat where it is not 0
            return log_f, torch.zeros_like(z)
        (gradient,) = torch.autograd.grad(log_f.sum(), z, allow_unused=True, materialize_grads=True)
    # Whatever function of the position stands in for the gradient, the leapfrog stays reversible and keeps volume.
    return log_f.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)


class Hamiltonian:
    """A move of Hamiltonian Monte Carlo with unit masses, Metropolis-corrected (Neal 2011, arXiv 1206.1901).

    A proposal is `n_leapfrog` leapfrog steps from a fresh standard normal momentum. No gradient reaches the result.

    Args:
        target: what the move leaves invariant; autograd must find its way through `log_prob`. A proposal to where
            log f is -inf, or not a number, is rejected.
        step_size: of the leapfrog: a number, or one for each state, (*batch,).
        n_leapfrog: leapfrog steps in a proposal.
        n_moves: proposals made in one transition.

    `accepted` has the acceptance probabilities of the last call, averaged over its proposals, (*batch,), and
    `acceptance` their mean; both are NaN before the first call. The given noise is the momentum of the first proposal;
    acceptance and further proposals draw their own. Raises ValueError for sizes and numbers that are not above 0.
    """

    def __init__(self, target: Any, step_size: float | Tensor, n_leapfrog: int = 10, n_moves: int = 1) -> None:
        check_whole(n_leapfrog=n_leapfrog, n_moves=n_moves)
        check_positive(step_size=step_size)
        self.target, self.step_size, self.n_leapfrog, self.n_moves = target, step_size, n_leapfrog, n_moves
        self.accepted = torch.tensor(math.nan)

    @property
    def acceptance(self) -> float:
        """Mean probability of acceptance in the last call, in [0, 1]."""
        return float(self.accepted.mean())

    @torch.no_grad()
    def __call__(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log f(z) - log f(z_next) (*batch,) in nats."""
        step = torch.as_tensor(self.step_size, dtype=z.dtype, device=z.device).unsqueeze(-1)
        log_f, gradient = _value_and_gradient(self.target, z)
        start, accepted = log_f, torch.zeros_like(log_f)
        for move in range(self.n_moves):
            momentum = noise if noise is not None and move == 0 else torch.randn_like(z)
            log_joint = log_f - 0.5 * momentum.square().sum(-1)
            z_new, gradient_new, kick = z, gradient, 0.5 * step
            for leap in range(1, self.n_leapfrog + 1):  # half a kick, then drifts with whole kicks between, then half
                momentum = momentum + kick * gradient_new
                z_new = z_new + step * momentum
                log_f_new, gradient_new = _value_and_gradient(self.target, z_new)
                kick = step if leap < self.n_leapfrog else 0.5 * step
            momentum = momentum + kick * gradient_new
            log_joint_new = log_f_new - 0.5 * momentum.square().sum(-1)
            log_accept = (log_joint_new - log_joint).nan_to_num(-torch.inf, torch.inf, -torch.inf)
            accept = torch.rand_like(log_f).log() < log_accept
            z, gradient = (
                torch.where(accept.unsqueeze(-1), new, old) for new, old in ((z_new, z), (gradient_new, gradient))
            )
            log_f = torch.where(accept, log_f_new, log_f)
            accepted = accepted + log_accept.clamp(max=0).exp() / self.n_moves
        self.accepted = accepted
        stays = (start == log_f) | start.isnan()  # a state that stays where log f is -inf, or NaN
        return z, torch.where(stays, 0.0, start - log_f)


class Langevin(Hamiltonian):
    """The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996): a Hamiltonian move of one leapfrog step.

    It proposes N(z + step_size^2 / 2 * grad log f(z), step_size^2 I) (Neal 2011, arXiv 1206.1901, section 5.2).
    Arguments, noise, acceptance and errors are those of `Hamiltonian`.
    """

    def __init__(self, target: Any, step_size: float | Tensor, n_moves: int = 1) -> None:
        super().__init__(target, step_size, 1, n_moves)
