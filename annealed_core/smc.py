"""Markov moves among trained kernels, exponents that fit a target, and a sampler to hold all against.

    ais(target, base, threshold=0.9, resample=0.5)               # a sequential Monte Carlo sampler: nothing is trained
    chain = chain_of(base, Moved(Spline(), move="hamiltonian").build(dim=2, n=8), target=lambda: target)
    fit(chain, target, NVI(resample=True), batch=36)             # flows between the moves: CRAFT
    sequential(chain, target, 2000)                              # and its particles

With flows between moves a chain is a stochastic normalizing flow (Wu, Köhler & Noé 2020, arXiv 2002.06707), which the
ELBO trains; where each flow is trained under particles that are resampled, by the local divergence, it is annealed flow
transport (AFT: Arbel et al. 2021, arXiv 2102.07501; CRAFT: Matthews et al. 2022, arXiv 2201.13117). Without flows it is
annealed importance sampling.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Annotated, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from annealed_core.ais import ACCEPTANCE, ais
from annealed_core.dais import TargetChain
from annealed_core.description import Calls, Choice, Description, Positive, Size, Whole
from annealed_core.energies import ENERGIES, find
from annealed_core.kernels import DiagonalGaussian
from annealed_core.moves import Hamiltonian, Langevin, Metropolis
from annealed_core.nested import chosen, resampled
from annealed_core.objectives import Alphas
from annealed_core.targets import LinearAlphas, check_alphas, exponents

_RATE = 0.05  # of the adaptation of a step size, in each step of training


class MovedStep(nn.Module):
    """A flow, and moves that leave f_t invariant: log-ratio log |det| + log f_t(z before the moves) - log f_t(z after).

    While it is in training mode and a gradient is recorded, the step size of the moves adapts to their acceptance. By
    Metropolis moves gradients pass, as if acceptance did not depend on anything; others cut them off, and the flow
    then has its local objective alone.

    Args:
        flow: a kernel with an inverse, or None.
        alpha: the exponent of f_t.
        recipe: the moves, and their step size at the start in units of the base's mean standard deviation.
    """

    chain = TargetChain
    log_step: Tensor

    def __init__(self, flow: nn.Module | None, alpha: Tensor, recipe: Moved) -> None:
        super().__init__()
        self.alpha, self.recipe = float(alpha), recipe
        self.flow: Any = flow
        self.register_buffer("log_step", torch.tensor(recipe.step).log())

    def _moves(self, chain: TargetChain) -> Metropolis:
        recipe, tempered = self.recipe, SimpleNamespace(log_prob=functools.partial(chain.log_prob, alpha=self.alpha))
        kinds: Any = {"metropolis": Metropolis, "langevin": Langevin}
        kinds["hamiltonian"] = functools.partial(Hamiltonian, n_leapfrog=recipe.n_leapfrog)
        step = self.log_step.exp() * chain.base.scale.mean(-1)
        found: Metropolis = kinds[recipe.move](tempered, step, n_moves=recipe.n_moves, generator=chain.generator)
        return found

    def forward(self, z: Tensor, chain: TargetChain, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of every kernel."""
        z, log_ratio = (z, z.new_zeros(z.shape[:-1])) if self.flow is None else self.flow(z)
        move = self._moves(chain)
        z_next, moved = move(z, None, noise)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.log_step += _RATE * (move.acceptance - ACCEPTANCE[self.recipe.move])
        if z.requires_grad and not moved.requires_grad:
            target: Any = chain.target  # what it learns, if it does, it learns at the end of the chain
            target = target.frozen() if hasattr(target, "frozen") else target
            start = chain.replace(target=target).log_prob(z, self.alpha)
            moved = moved + start - start.detach()
        return z_next, log_ratio + moved

    def back(self, z_next: Tensor, chain: TargetChain, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A state before, drawn from the reverse kernel, and the log-ratio of going from it to z_next."""
        z, moved = self._moves(chain)(z_next, None, noise)
        if self.flow is None:
            return z, -moved
        before = self.flow.inverse(z)
        return before, self.flow(before)[1] - moved


class Moved(Description):
    """Flows with Markov moves after each, or moves alone; for densities.

    Attributes:
        flow: the description of the flows, or None.
        move: "hamiltonian", "langevin" or "metropolis".
        n_moves, n_leapfrog: moves after each flow, and leapfrog steps of a Hamiltonian one.
        step: their step size at the start, in units of the base's standard deviation.
        alphas: exponents of what they leave invariant; best those of the objective.
    """

    flow: Annotated[Any, Calls("a description such as Spline()", "build")] | None = None
    move: Annotated[str, Choice(*ACCEPTANCE)] = "hamiltonian"
    n_moves: Size = 1
    n_leapfrog: Size = 5
    step: Positive = 0.1
    alphas: Alphas = LinearAlphas()

    sees_target = True

    def for_target(self, base_scale: float, reach: float) -> Self:
        """With flows for that target."""
        flow: Any = self.flow
        return self.replace(flow=flow.for_target(base_scale, reach)) if hasattr(flow, "for_target") else self

    def build(self, dim: int, n: int, context_dim: int = 0) -> list[nn.Module]:
        """The n kernels for states of `dim` dimensions; the context is not looked at."""
        flows = [None] * n if self.flow is None else self.flow.build(dim, n)
        alphas = exponents(self.alphas, n)[1:]
        return [MovedStep(flow, alpha, self) for flow, alpha in zip(flows, alphas, strict=True)]


def adaptive_alphas(target: Any, base: DiagonalGaussian, n: int, kl: float = 0.05, seed: int = 0) -> Tensor:
    """Exponents of n transitions between which the divergence KL(f_{t-1} || f_t) is about the same: (n + 1,).

    A pilot of 1,000 particles takes as many steps of that divergence as it needs (arXiv 2508.12511); these are counted
    off in n equal parts.
    """
    generator = torch.Generator().manual_seed(seed)
    pilot = ais(target, base, 1000, kl=kl, resample=0.5, n_moves=1, n_leapfrog=5, generator=generator).alphas
    places = np.linspace(0, len(pilot) - 1, n + 1)
    found = torch.from_numpy(np.interp(places, np.arange(len(pilot)), pilot.numpy())).to(base.loc)
    check_alphas(found)
    return found


class AdaptiveAlphas(Description):
    """`adaptive_alphas` of a named target, from the base that chains start from there.

    Attributes:
        target: a name in `ENERGIES`.
        kl: of a step of the pilot, in nats.
    """

    target: Annotated[str, Choice(*ENERGIES)] = "D"
    kl: Positive = 0.05

    @functools.cache  # noqa: B019 -- of equal descriptions once
    def __call__(self, n: int) -> Tensor:
        """Of n transitions: (n + 1,)."""
        energy = find(self.target)
        return adaptive_alphas(energy, DiagonalGaussian.isotropic(energy.dim, energy.base_scale), n, self.kl)


class SMC(Description):
    """Draws of a named target by a sequential Monte Carlo sampler, for `nested.Inclusive`: made once, then known.

    Attributes:
        target: a name in `ENERGIES`.
        particles, n_temperatures, n_moves, n_leapfrog, seed: as of `ais`, with exponents by `adaptive_alphas`.
        base_scale: standard deviation of the base.
    """

    target: Annotated[str, Choice(*ENERGIES)] = "D"
    particles: Size = 10_000
    n_temperatures: Size = 32
    n_moves: Size = 3
    n_leapfrog: Size = 3
    seed: Annotated[int, Whole(0)] = 0
    base_scale: Positive = 3.0

    @functools.cache  # noqa: B019 -- of equal descriptions once
    def __call__(self) -> Tensor:
        """The draws (particles, dim), all of one weight."""
        return self.draw(find(self.target))

    def draw(self, target: Any) -> Tensor:
        """The same of any target."""
        base = DiagonalGaussian.isotropic(target.dim, self.base_scale)
        generator = torch.Generator().manual_seed(self.seed)
        alphas = adaptive_alphas(target, base, self.n_temperatures, seed=self.seed)
        moves: dict[str, Any] = {"n_moves": self.n_moves, "n_leapfrog": self.n_leapfrog, "generator": generator}
        found = ais(target, base, self.particles, alphas, self.n_temperatures, resample=0.5, **moves)
        return chosen(found.z, resampled(found.log_weights, generator))
