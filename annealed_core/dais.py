"""Differentiable annealed importance sampling: kernels that see the target, with few trained numbers.

    chain = AnnealedChain(base, Leapfrog(step=0.1).build(dim=2, n=8), target=target)
    ELBO()(chain, target, 128)

Transition t follows the gradient of log f_t, f_t = f_T^alpha_t f_0^(1 - alpha_t) with f_0 = q_0, by one step of
Hamiltonian dynamics without acceptance. Its reverse is known in closed form, so that the chain's weight is one of AIS,
and the ELBO trains step sizes, exponents and the persistence of the momentum (Geffner & Domke 2021, arXiv 2107.04150,
"UHA"; Zhang et al. 2021, arXiv 2107.10211, "DAIS"; Thin et al. 2021, arXiv 2106.15921, "Monte Carlo VAE").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from annealed_core.chain import Chain, Shape, Trajectory
from annealed_core.description import Description, Positive, Share
from annealed_core.kernels import DiagonalGaussian
from annealed_core.targets import Target


class AnnealedChain(Chain):
    """A chain whose kernels are `LeapfrogStep`s towards a target.

    Args:
        base, kernels, context, generator: as of `Chain`; the context is not used.
        target: f_T, with a `log_prob` that can be differentiated.
    """

    def __init__(
        self,
        base: DiagonalGaussian,
        kernels: Any = (),
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        target: Target,
    ) -> None:
        super().__init__(base, kernels, context, generator)
        self.target, self.learns = target, True

    def exponents(self) -> Tensor:
        """alpha_1 ... alpha_T, rising between 0 and 1: (T,)."""
        gains = torch.stack([*(kernel.gain for kernel in self.kernels), self.kernels[0].shared.last_gain])
        return torch.softmax(gains, 0).cumsum(0)[:-1]

    def rsample(self, sample_shape: Shape = (), noise: Tensor | None = None, local: bool = False) -> Trajectory:
        """As of `Chain`. The log-ratios are those of the momentum: log N(v_t) - log N(v_t before the step).

        Refreshing a momentum in part leaves N(0, I) as it is, and a leapfrog step keeps volumes and can be gone back.
        """
        noise = self.noise(sample_shape) if noise is None else noise
        z, log_q0, v = self.base.rsample(noise[0]), self.base.drawn_log_prob(noise[0]), None
        shared = self.kernels[0].shared
        alphas, steps = self.exponents(), [kernel.log_step.exp() for kernel in self.kernels]
        keep = torch.sigmoid(shared.persistence)
        if not self.learns:
            alphas, keep, steps = alphas.detach(), keep.detach(), [step.detach() for step in steps]
        states, log_ratios = [z], []
        for alpha, step, fresh in zip(alphas, steps, noise[1:], strict=True):
            z, v = (z.detach(), None if v is None else v.detach()) if local else (z, v)
            before = fresh if v is None else keep * v + (1 - keep.square()).sqrt() * fresh
            middle = z + 0.5 * step * before
            v = before + step * self._slope(middle, alpha)
            z = middle + 0.5 * step * v
            states.append(z)
            log_ratios.append(0.5 * (before.square() - v.square()).sum(-1))
        return Trajectory(torch.stack(states), torch.stack(log_ratios), log_q0)

    def _slope(self, z: Tensor, alpha: Tensor) -> Tensor:
        """The gradient of log f_t at z; with a gradient of its own where one is recorded."""
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            point = z if z.requires_grad else z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.target.log_prob(point).sum(), point, create_graph=recorded)
        slope = torch.where(slope.isfinite(), slope, 0.0)
        return alpha * slope - (1 - alpha) * (z - self.base.loc) / self.base.scale.square()

    def detach(self) -> Self:
        """As of `Chain`; nor does the target learn."""
        target: Any = self.target
        return super().detach().replace(target=target.frozen() if hasattr(target, "frozen") else target)

    def freeze(self) -> Self:
        """As of `Chain`."""
        return self.replace(learns=False)

    def __getitem__(self, images: slice) -> Self:
        target: Any = self.target
        return super().__getitem__(images).replace(target=target[images] if hasattr(target, "__getitem__") else target)


class _Shared(nn.Module):
    """What all transitions of a chain have in common."""

    def __init__(self, persistence: float) -> None:
        super().__init__()
        self.persistence = nn.Parameter(torch.tensor(math.log(persistence / (1 - persistence))))
        self.last_gain = nn.Parameter(torch.zeros(()))  # from alpha_T to the target


class LeapfrogStep(nn.Module):
    """The numbers of one transition: a step size for each dimension, and how far alpha rises.

    What they do, an `AnnealedChain` says: alone, without a target, the transition can't be called.
    """

    chain = AnnealedChain

    def __init__(self, dim: int, step: float, shared: _Shared) -> None:
        super().__init__()
        self.shared = shared
        self.log_step = nn.Parameter(torch.full((dim,), math.log(step)))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, *_: Any) -> Any:
        """TypeError: a transition that sees the target is part of an `AnnealedChain`."""
        raise TypeError("a LeapfrogStep needs the target: make an AnnealedChain of it")


class Leapfrog(Description):
    """Leapfrog steps along a path to the target.

    Attributes:
        step: the size of each step at the start, in units of z.
        persistence: how much of the momentum stays from step to step at the start, in (0, 1); near 0, Langevin's
            dynamics.
    """

    step: Positive = 0.1
    persistence: Share = 0.9

    sees_target = True

    def check(self) -> None:
        """Refuse a persistence at either end, where it could not learn."""
        if not 0 < self.persistence < 1:
            raise ValueError(
                f"impossible persistence {self.persistence} of Leapfrog: it takes a number between 0 and 1"
            )

    def build(self, dim: int, n: int, context_dim: int = 0) -> list[nn.Module]:
        """The n transitions for states of `dim` dimensions; the context is not looked at."""
        shared = _Shared(self.persistence)
        return [LeapfrogStep(dim, self.step, shared) for _ in range(n)]


def chain_of(
    base: DiagonalGaussian,
    kernels: Any,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
    target: Callable[[], Any] | None = None,
) -> Chain:
    """The chain that these kernels make: where they see the target, one that does, which is then asked for."""
    if len(kernels) and hasattr(kernels[0], "chain"):
        found: Chain = kernels[0].chain(base, kernels, context, generator, target=target and target())
        return found
    return Chain(base, kernels, context, generator)
