"""Differentiable annealed importance sampling: kernels that see the target, with few trained numbers.

    chain = AnnealedChain(base, Leapfrog(step=0.1).build(dim=2, n=8), target=target)
    ELBO()(chain, target, 128)
    chain = TargetChain(base, Drift(step=0.01).build(dim=2, n=8), target=target)
    TrajectoryBalance()(chain, target, 128)

A `Leapfrog` transition t follows the gradient of log f_t, f_t = f_T^alpha_t f_0^(1 - alpha_t) with f_0 = q_0, by one
step of Hamiltonian dynamics without acceptance. Its reverse is known in closed form, so that the chain's weight is one
of AIS, and the ELBO trains step sizes, exponents and the persistence of the momentum (Geffner & Domke 2021, arXiv
2107.04150, "UHA"; Zhang et al. 2021, arXiv 2107.10211, "DAIS"; Thin et al. 2021, arXiv 2106.15921, "Monte Carlo VAE").
`Drift` steps have no momentum, and a network beside the gradient (Vargas et al. 2023, arXiv 2307.01050, "CMCD").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Self

import torch
from torch import Tensor, nn

from annealed_core.chain import Chain, Shape, Trajectory
from annealed_core.description import Description, Positive, Share, Whole
from annealed_core.kernels import DiagonalGaussian, drawn_log_prob, normal_log_prob
from annealed_core.targets import LearnedPath, Target, linear_alphas


class TargetChain(Chain):
    """A chain whose kernels see the target: they are called with the chain itself in the place of a context.

    Args:
        base, kernels, context, generator: as of `Chain`; the context is not looked at.
        target: f_T, with a `log_prob` that can be differentiated.
    """

    requires_grad = False  # as a context: what learns is not in it
    target_learns = True  # until `detach`

    def __init__(
        self,
        base: DiagonalGaussian,
        kernels: Any = (),
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        target: Target,
    ) -> None:
        super().__init__(base, kernels, None, generator)
        self.target = target

    @property
    def context(self) -> Any:
        """The chain."""
        return self

    @context.setter
    def context(self, _: Any) -> None:
        pass

    def log_prob(self, z: Tensor, alpha: Tensor | float) -> Tensor:
        """Log f_t at z, for f_t = f_T^alpha q_0^(1 - alpha), in nats: (*sample, *batch, dim) -> (*sample, *batch)."""
        return alpha * self.target.log_prob(z) + (1 - alpha) * self.base.log_prob(z)

    def slope(self, z: Tensor, alpha: Tensor) -> Tensor:
        """The gradient of log f_t at z; with a gradient of its own where one is recorded."""
        recorded = torch.is_grad_enabled() and (z.requires_grad or self.target_learns)
        with torch.enable_grad():
            point = z if z.requires_grad else z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.target.log_prob(point).sum(), point, create_graph=recorded)
        slope = torch.where(slope.isfinite(), slope, 0.0)
        return alpha * slope - (1 - alpha) * (z - self.base.loc) / self.base.scale.square()

    def detach(self) -> Self:
        """As of `Chain`; nor does the target learn."""
        target: Any = self.target
        target = target.frozen() if hasattr(target, "frozen") else target
        return self.replace(base=self.base.detach(), target=target, target_learns=False)

    def __getitem__(self, images: slice) -> Self:
        target: Any = self.target
        part = target[images] if hasattr(target, "__getitem__") else target
        return self.replace(base=self.base[images], target=part)


class AnnealedChain(TargetChain):
    """A chain whose kernels are `LeapfrogStep`s; arguments are those of `TargetChain`."""

    learns = True

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
        alphas, steps = self.exponents(), [kernel.step() for kernel in self.kernels]
        keep = torch.sigmoid(shared.persistence)
        if not self.learns:
            alphas, keep, steps = alphas.detach(), keep.detach(), [step.detach() for step in steps]
        states, log_ratios = [z], []
        for alpha, step, fresh in zip(alphas, steps, noise[1:], strict=True):
            z, v = (z.detach(), None if v is None else v.detach()) if local else (z, v)
            before = fresh if v is None else keep * v + (1 - keep.square()).sqrt() * fresh
            middle = z + 0.5 * step * before
            v = before + step * self.slope(middle, alpha)
            z = middle + 0.5 * step * v
            states.append(z)
            log_ratios.append(0.5 * (before.square() - v.square()).sum(-1))
        return Trajectory(torch.stack(states), torch.stack(log_ratios), log_q0)

    def freeze(self) -> Self:
        """As of `Chain`."""
        return self.replace(learns=False)


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

    def __init__(self, dim: int, step: float, shared: _Shared, largest: float | None = None) -> None:
        super().__init__()
        self.shared, self.largest = shared, largest
        start = math.log(step if largest is None else step / (largest - step))
        self.unbounded = nn.Parameter(torch.full((dim,), start))  # the log step, or the logit of its share of largest
        self.gain = nn.Parameter(torch.zeros(()))

    def step(self) -> Tensor:
        """The step sizes: (dim,)."""
        return self.unbounded.exp() if self.largest is None else self.largest * torch.sigmoid(self.unbounded)

    def forward(self, *_: Any) -> Any:
        """TypeError: a transition that sees the target is part of an `AnnealedChain`."""
        made = "chain_of(base, kernels, target=lambda: target) makes one, and ELBO and IWAE train it"
        raise TypeError(f"a LeapfrogStep can't be called by itself, but along the path of an AnnealedChain: {made}")


class Leapfrog(Description):
    """Leapfrog steps along a path to the target.

    Attributes:
        step: the size of each step at the start, in units of z.
        persistence: how much of the momentum stays from step to step at the start, in (0, 1); near 0, Langevin's
            dynamics.
        largest: what training can't take a step beyond, more than `step`; None for no bound. Where tails are steep, as
            those of a quartic energy, steps that grow without bound end in states of infinite energy.
    """

    step: Positive = 0.1
    persistence: Share = 0.9
    largest: Positive | None = None

    sees_target = True

    def check(self) -> None:
        """Refuse a persistence at either end, where it could not learn, and a bound below the start."""
        if self.largest is not None and self.largest <= self.step:
            raise ValueError(f"impossible largest {self.largest} of Leapfrog: it takes more than its step, {self.step}")
        if not 0 < self.persistence < 1:
            raise ValueError(
                f"impossible persistence {self.persistence} of Leapfrog: it takes a number between 0 and 1"
            )

    def build(self, dim: int, n: int, context_dim: int = 0) -> list[nn.Module]:
        """The n transitions for states of `dim` dimensions; the context is not looked at."""
        shared = _Shared(self.persistence)
        return [LeapfrogStep(dim, self.step, shared, self.largest) for _ in range(n)]


class DriftStep(nn.Module):
    """q(z' | z) = N(z + e (s(z) + u(z)), 2e) and r(z | z') = N(z' + e (s(z') - u(z')), 2e), s the slope of log f_t.

    At u = 0 it is unadjusted Langevin dynamics and its reversal; u, a network with one hidden layer, starts there.

    Args:
        dim: dimensions of z.
        step: e at the start, of each dimension.
        hidden: width of the network; 0 for none.
        path: the exponents, which the transitions of a chain share.
        place: which transition it is, from 1.
    """

    chain = TargetChain

    def __init__(self, dim: int, step: float, hidden: int, path: LearnedPath, place: int) -> None:
        super().__init__()
        self.path, self.place = path, place
        self.log_step = nn.Parameter(torch.full((dim,), math.log(step)))
        self.network = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) if hidden else None
        for parameter in [] if self.network is None else self.network[2].parameters():
            nn.init.zeros_(parameter)

    def _drifted(self, z: Tensor, chain: TargetChain, sign: int) -> tuple[Tensor, Tensor]:
        step, drift = self.log_step.exp(), chain.slope(z, self.path()[self.place])
        drift = drift if self.network is None else drift + sign * self.network(z)
        return z + step * drift, (2 * step).sqrt().expand_as(z)

    def forwards(self, z: Tensor, chain: TargetChain) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z' | z), both (*batch, dim)."""
        return self._drifted(z, chain, 1)

    def reverse(self, z: Tensor, chain: TargetChain) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of r(z | z')."""
        return self._drifted(z, chain, -1)

    def forward(self, z: Tensor, chain: TargetChain, noise: Tensor) -> tuple[Tensor, Tensor]:
        """As of every kernel."""
        loc, scale = self.forwards(z, chain)
        z_next = loc + scale * noise
        return z_next, normal_log_prob(z, *self.reverse(z_next, chain)) - drawn_log_prob(noise, scale)


class Drift(Description):
    """Langevin steps along a learned path, with a trained drift: "CMCD"; without one, differentiable AIS.

    By `ELBO`, or by `TrajectoryBalance`, the log-variance loss, which needs no second derivatives of the target.
    Both ways of a transition share its network; the authors' code takes the next one's for the way back.

    Attributes:
        step: e of each transition at the start, in units of z squared.
        hidden: width of the network of each transition; 0 for none.
    """

    step: Positive = 0.01
    hidden: Annotated[int, Whole(0)] = 32

    sees_target = True

    def build(self, dim: int, n: int, context_dim: int = 0) -> list[nn.Module]:
        """As of `Leapfrog`."""
        path = LearnedPath(linear_alphas(n))
        return [DriftStep(dim, self.step, self.hidden, path, place) for place in range(1, n + 1)]


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
