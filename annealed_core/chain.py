"""The one idea: every method here is a chain of kernels weighed against a target.

    trajectory = chain.rsample(128)
    log_weight = target.log_prob(trajectory.z[-1]) + trajectory.log_ratios.sum(0) - trajectory.log_q0
    log_weight.mean()       # the ELBO of a hierarchical posterior; logmeanexp instead: an estimate of log Z

A Gaussian posterior is a chain of length 0. Hierarchical variational inference adds stochastic kernels, a normalizing
flow invertible ones, annealed importance sampling Markov kernels that are not trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from annealed_core.kernels import DiagonalGaussian, Frozen
from annealed_core.targets import Target

Shape = int | Sequence[int]


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
        kernels: the T transitions (none: the base alone), called as `kernels` says.
        context: what the kernels are conditioned on, (*batch, context_dim), or None.
        generator: what the chain draws from; torch's global generator unless given.
    """

    def __init__(
        self,
        base: DiagonalGaussian,
        kernels: Sequence[Any] | nn.Module = (),
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.base, self.kernels, self.context, self.generator = base, cast(Any, kernels), context, generator

    def __len__(self) -> int:
        return len(self.kernels)

    def noise(self, sample_shape: Shape = ()) -> Tensor:
        """Standard normal noise for one trajectory: (T + 1, *sample, *batch, dim)."""
        shape = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        loc = self.base.loc
        device = loc.device if self.generator is None else self.generator.device
        shape = (len(self) + 1, *shape, *loc.shape)
        return torch.randn(shape, generator=self.generator, dtype=loc.dtype, device=device).to(loc.device)

    def rsample(self, sample_shape: Shape = (), noise: Tensor | None = None, local: bool = False) -> Trajectory:
        """Draw states z_0 ... z_T with their log-densities; gradients flow through all of them.

        Args:
            sample_shape: how many to draw for each element of the batch.
            noise: as `noise(sample_shape)` gives it, makes the draw repeatable.
            local: cut each state off before the next transition, so that what transition t draws has a gradient to
                kernel t alone: what AVO trains with.
        """
        noise = self.noise(sample_shape) if noise is None else noise
        z, log_q0 = self.base.rsample(noise[0]), self.base.drawn_log_prob(noise[0])
        states, log_ratios = [z], []
        for kernel, fresh in zip(self.kernels, noise[1:], strict=True):
            z, log_ratio = kernel(z.detach() if local else z, self.context, fresh)
            states.append(z)
            log_ratios.append(log_ratio)
        ratios = torch.stack(log_ratios) if log_ratios else log_q0.new_zeros((0, *log_q0.shape))
        return Trajectory(torch.stack(states), ratios, log_q0)

    def log_weight(self, target: Target, trajectory: Trajectory) -> Tensor:
        """Log f(z_T) + sum_t log (r_t / q_t) - log q_0(z_0) in nats, (*sample, *batch).

        Its mean is the hierarchical ELBO, and exp of it has mean Z.
        """
        return target.log_prob(trajectory.z[-1]) + trajectory.log_ratios.sum(0) - trajectory.log_q0

    def replace(self, **changes: Any) -> Self:
        """The same chain with other attributes."""
        found = copy.copy(self)
        vars(found).update(changes)
        return found

    def detach(self) -> Self:
        """The same chain with its base and context cut from whatever computed them; the kernels stay trainable."""
        context = None if self.context is None else self.context.detach()
        return self.replace(base=self.base.detach(), context=context)

    def freeze(self) -> Self:
        """The same chain where gradients pass through the kernels and don't reach their weights."""
        kernels = [Frozen(kernel) if isinstance(kernel, nn.Module) else kernel for kernel in self.kernels]
        return self.replace(kernels=kernels)

    def __getitem__(self, images: slice) -> Self:
        context = None if self.context is None else self.context[images]
        return self.replace(base=self.base[images], context=context)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights of the kernels, each once."""
        yield from nn.ModuleList(kernel for kernel in self.kernels if isinstance(kernel, nn.Module)).parameters()
