"""Markov moves that leave a target invariant: what annealed importance sampling is made of.

They answer the call of every kernel, `z_next, log_ratio = move(z, context, noise)`. The reverse kernel is the move's
own reversal, so that log_ratio = log f(z) - log f(z_next): a chain of such moves along a path of targets has exactly
the weight of annealed importance sampling (Neal 2001). `Metropolis` walks at random, the others follow the gradient.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_whole(least: int = 1, /, **fields: Any) -> None:
    """Refuse, by name, whatever is not a whole number from `least`: ValueError."""
    for name, value in fields.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")


def check_positive(**fields: Any) -> None:
    """Refuse, by name, a number, or a tensor of numbers, that is not finite and above 0: ValueError."""
    for name, value in fields.items():
        if not isinstance(value, numbers.Real | Tensor) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
        found = torch.as_tensor(value)
        if not bool(((found > 0) & found.isfinite()).all()):
            raise ValueError(f"{name} must be finite and above 0, got {value!r}")


def draw_like(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`torch.randn` or `torch.rand` of a tensor's shape, dtype and device, from a generator or torch's global one."""
    device = like.device if generator is None else generator.device
    return draw(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


class Metropolis:
    """A random walk, Metropolis-corrected: it proposes N(z, step_size^2 I).

    Args:
        target: what the move leaves invariant. A proposal to where log f is -inf, or not a number, is rejected.
        step_size: standard deviation of the proposal: a number, or one for each state, (*batch,).
        n_moves: proposals made in one transition.
        generator: what is drawn from beyond the given noise; torch's global generator unless given.

    `accepted` has the acceptance probabilities of the last call, averaged over its proposals, (*batch,), and
    `acceptance` their mean; both are NaN before the first call. The given noise is that of the first proposal;
    acceptance and further proposals draw their own. Raises ValueError for sizes and numbers that are not above 0.
    """

    def __init__(
        self, target: Any, step_size: float | Tensor, n_moves: int = 1, generator: torch.Generator | None = None
    ) -> None:
        check_whole(n_moves=n_moves)
        check_positive(step_size=step_size)
        self.target, self.step_size, self.n_moves, self.generator = target, step_size, n_moves, generator
        self.accepted = torch.tensor(math.nan)

    @property
    def acceptance(self) -> float:
        """Mean probability of acceptance in the last call, in [0, 1]."""
        return float(self.accepted.mean())

    def __call__(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log f(z) - log f(z_next) (*batch,) in nats."""
        step = torch.as_tensor(self.step_size, dtype=z.dtype, device=z.device).unsqueeze(-1)
        state = self._at(z)
        start, accepted = state[1], torch.zeros_like(state[1])
        for move in range(self.n_moves):
            fresh = noise if noise is not None and move == 0 else draw_like(torch.randn, z, self.generator)
            proposal, log_ratio = self._propose(state, step, fresh)
            log_accept = log_ratio.detach().nan_to_num(-torch.inf, torch.inf, -torch.inf)
            accept = draw_like(torch.rand, log_accept, self.generator).log() < log_accept
            accepts = {accept.ndim: accept, z.ndim: accept.unsqueeze(-1)}
            state = tuple(torch.where(accepts[new.ndim], new, old) for new, old in zip(proposal, state, strict=True))
            accepted += log_accept.clamp(max=0).exp() / self.n_moves
        self.accepted = accepted
        z, log_f = state[:2]
        stays = (start == log_f) | start.isnan()  # a state that stays where log f is -inf, or NaN
        return z, torch.where(stays, 0.0, start - log_f)

    def _at(self, z: Tensor) -> tuple[Tensor, ...]:
        """What is known of a state: z, log f, and what else `_propose` needs."""
        return z, self.target.log_prob(z)

    def _propose(self, state: tuple[Tensor, ...], step: Tensor, noise: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The proposed state, and the logarithm of the ratio that decides on it."""
        proposal = self._at(state[0] + step * noise)
        return proposal, proposal[1] - state[1]


class Hamiltonian(Metropolis):
    """A move of Hamiltonian Monte Carlo with unit masses, Metropolis-corrected (Neal 2011, arXiv 1206.1901).

    A proposal is `n_leapfrog` leapfrog steps of `step_size` from a fresh standard normal momentum; the given noise is
    that of the first. Autograd must find its way through the target's `log_prob`; no gradient reaches the result.
    Other arguments, acceptance and errors are those of `Metropolis`.
    """

    def __init__(
        self,
        target: Any,
        step_size: float | Tensor,
        n_leapfrog: int = 10,
        n_moves: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        check_whole(n_leapfrog=n_leapfrog)
        super().__init__(target, step_size, n_moves, generator)
        self.n_leapfrog = n_leapfrog

    @torch.no_grad()
    def __call__(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log f(z) - log f(z_next) (*batch,) in nats."""
        return super().__call__(z, context, noise)

    def _at(self, z: Tensor) -> tuple[Tensor, ...]:
        """z, log f (*batch,) and its gradient (*batch, dim), 0 where that is not finite; none has a graph."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_f = self.target.log_prob(z)
            gradient = torch.zeros_like(z)
            if log_f.requires_grad:  # else the density is flat where it is not 0
                (gradient,) = torch.autograd.grad(log_f.sum(), z, allow_unused=True, materialize_grads=True)
        # Whatever function of the position stands in for the gradient, the leapfrog stays reversible and keeps volume.
        return z.detach(), log_f.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)

    def _propose(self, state: tuple[Tensor, ...], step: Tensor, noise: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        start, momentum, kick = state, noise, 0.5 * step
        for leap in range(1, self.n_leapfrog + 1):  # half a kick, then drifts with whole kicks between, then half
            momentum = momentum + kick * state[2]
            state = self._at(state[0] + step * momentum)
            kick = step if leap < self.n_leapfrog else 0.5 * step
        momentum = momentum + kick * state[2]
        kinetic = 0.5 * (momentum.square().sum(-1) - noise.square().sum(-1))
        return state, state[1] - start[1] - kinetic


class Langevin(Hamiltonian):
    """The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996): a Hamiltonian move of one leapfrog step.

    It proposes N(z + step_size^2 / 2 * grad log f(z), step_size^2 I) (Neal 2011, arXiv 1206.1901, section 5.2).
    Arguments, noise, acceptance and errors are those of `Metropolis`.
    """

    def __init__(
        self, target: Any, step_size: float | Tensor, n_moves: int = 1, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(target, step_size, 1, n_moves, generator)
