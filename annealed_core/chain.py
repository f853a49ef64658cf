"""The one idea: every method here is a chain of kernels weighed against a target.

    trajectory = chain.rsample(128)
    log_weight = target.log_prob(trajectory.z[-1]) + trajectory.log_ratios.sum(0) - trajectory.log_q0
    log_weight.mean()       # the ELBO of a hierarchical posterior; logmeanexp instead: an estimate of log Z

A Gaussian posterior is a chain of length 0. Hierarchical variational inference adds stochastic kernels, a normalizing
flow invertible ones, annealed importance sampling Markov kernels that are not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from annealed_core.kernels import DiagonalGaussian, Kernel, are_alike, run_pairs, run_pairs_twice
from annealed_core.stack import Stack
from annealed_core.targets import Target


@dataclass(frozen=True)
class Trajectory:
    """What a chain draws.

    Attributes:
        z: the states z_0 ... z_T, (T + 1, *sample, *batch, dim).
        log_ratios: log r_t(z_{t-1} | z_t) - log q_t(z_t | z_{t-1}) of each transition in nats, (T, *sample, *batch).
        log_q0: log q_0(z_0) in nats, (*sample, *batch).
    """

    z: Tensor
    log_ratios: Tensor
    log_q0: Tensor


class Chain:
    """A base density followed by kernels.

    Args:
        base: q_0, with parameters of shape (*batch, dim).
        kernels: the T transitions (none: the base alone), or a `stack.Stack` of the transitions of many models, which
            are then the base's batch.
        context: what the kernels are conditioned on, (*batch, context_dim), or None.
    """

    def __init__(
        self,
        base: DiagonalGaussian,
        kernels: Sequence[Kernel] | torch.nn.ModuleList | Stack = (),
        context: Tensor | None = None,
    ) -> None:
        self.base, self.kernels, self.context = base, kernels, context

    def __len__(self) -> int:
        return len(self.kernels)

    def noise(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Standard normal noise for one trajectory: (T + 1, *sample, *batch, dim)."""
        shape = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        return torch.randn(
            (len(self) + 1, *shape, *self.base.loc.shape), dtype=self.base.loc.dtype, device=self.base.loc.device
        )

    def rsample(
        self, sample_shape: int | Sequence[int] = (), noise: Tensor | None = None, local: bool = False
    ) -> Trajectory:
        """Draw states z_0 ... z_T with their log-densities; gradients flow through all of them.

        Args:
            sample_shape: how many to draw for each element of the batch.
            noise: as `noise(sample_shape)` gives it, makes the draw repeatable.
            local: cut each state off before the next transition, so that what transition t draws has a gradient to
                kernel t alone: what AVO trains with.
        """
        noise = self.noise(sample_shape) if noise is None else noise
        start = self.base.rsample(noise[0])
        log_q0 = self.base.drawn_log_prob(noise[0])
        if not len(self):
            return Trajectory(start.unsqueeze(0), log_q0.new_zeros((0, *log_q0.shape)), log_q0)
        if isinstance(self.kernels, Stack):
            return Trajectory(*self.kernels.rsample(start, noise[1:], local), log_q0)
        if self.context is not None and are_alike(kernels := list(self.kernels)):
            return Trajectory(*run_pairs(kernels, start, self.context, noise[1:], local), log_q0)
        states, log_ratios = [start], []
        for kernel, fresh in zip(self.kernels, noise[1:], strict=True):
            z_next, log_ratio = kernel(states[-1].detach() if local else states[-1], self.context, fresh)
            states.append(z_next)
            log_ratios.append(log_ratio)
        return Trajectory(torch.stack(states), torch.stack(log_ratios), log_q0)

    def rsample_twice(self, noise: Tensor) -> tuple[Trajectory, Trajectory]:
        """`rsample(noise=noise)` for the ELBO, and `detach().rsample(noise=noise, local=True)` for AVO.

        Where the kernels are pairs of Gaussians with a context, the two share what they can; the second is then exact
        up to rounding.
        """
        alike = not isinstance(self.kernels, Stack) and are_alike(kernels := list(self.kernels))
        if self.context is None or not alike or not torch.is_grad_enabled():
            return self.rsample(noise=noise), self.detach().rsample(noise=noise, local=True)
        start = self.base.rsample(noise[0])
        log_q0 = self.base.drawn_log_prob(noise[0])
        whole, local = run_pairs_twice(kernels, start, self.context, noise[1:])
        return Trajectory(*whole, log_q0), Trajectory(*local, log_q0.detach())

    def log_weight(self, target: Target, trajectory: Trajectory) -> Tensor:
        """Log f(z_T) + sum_t log (r_t / q_t) - log q_0(z_0) in nats, (*sample, *batch).

        Its mean is the hierarchical ELBO, and exp of it has mean Z.
        """
        return target.log_prob(trajectory.z[-1]) + trajectory.log_ratios.sum(0) - trajectory.log_q0

    def detach(self) -> Chain:
        """The same chain with its base and context cut from whatever computed them; the kernels stay trainable."""
        return Chain(self.base.detach(), self.kernels, None if self.context is None else self.context.detach())
