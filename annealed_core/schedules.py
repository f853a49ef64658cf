"""Schedules: what changes with the step of training.

A schedule of a number is a function step -> number, checked when it is made; `Mixed` and `Then` are schedules of
objectives.

`Linear` and `Cyclical` come to 1 and `Geometric` approaches it, given enough steps, so that training ends with the
plain objective or near it. Any other function of the step does as well.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Self

import torch

from annealed_core.description import Annealed, Calls, Choice, Description, Number, Share, Size, Whole

_COINS_SEED = 20_181  # which steps of a mixture are the first objective's

#: A number in [0, 1], or a schedule of such numbers.
Annealing = Annotated[Any, Annealed(Number(0, 1))]
#: A number from 0, or a schedule of such numbers.
Weight = Annotated[Any, Annealed(Number(0))]
_Rate = Annotated[float, Number(0, 1, open_low=True)]


class Constant(Description):
    """The same value at every step."""

    value: Share = 1.0

    def __call__(self, step: int) -> float:
        """The value at that step (0, 1, 2, ...)."""
        return self.value


class Linear(Description):
    """min(1, start + rate * step): deterministic warm-up (Bowman et al. 2016, Sonderby et al. 2016)."""

    start: Share = 0.2
    rate: _Rate = 2e-4

    def __call__(self, step: int) -> float:
        """The value at that step."""
        return min(1.0, self.start + self.rate * step)


class Geometric(Description):
    """1 - (1 - start) * (1 - rate)^step: the distance to 1 shrinks by the factor 1 - rate at each step."""

    start: Share = 0.2
    rate: _Rate = 2e-4

    def __call__(self, step: int) -> float:
        """The value at that step."""
        return 1 - (1 - self.start) * (1 - self.rate) ** step


#: How the value rises within a cycle, from the share of the rise that is over; of Fu et al. 2019 and its code. The
#: sigmoid begins at .0025 and jumps from .9975 to 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "sigmoid": lambda share: 1 / (1 + math.exp(6 - 12 * share)),
    "cosine": lambda share: 0.5 - 0.5 * math.cos(math.pi * share),
}


class Cyclical(Description):
    """`cycles` times a rise from `start` to 1 over the share `ratio` of a cycle, then 1 (Fu et al. 2019).

    arXiv 1903.10145. The rise has a shape of `SHAPES`. 1 after `steps`.
    """

    steps: Size = 40_000
    cycles: Size = 4
    ratio: Annotated[float, Number(0, 1, open_low=True)] = 0.5
    shape: Annotated[str, Choice(*SHAPES)] = "linear"
    start: Share = 0.0

    def check(self) -> None:
        """Refuse more cycles than steps."""
        if self.cycles > self.steps:
            raise ValueError(f"impossible cycles {self.cycles} of Cyclical: there are {self.steps:,} steps in all")

    def __call__(self, step: int) -> float:
        """The value at that step."""
        period = self.steps / self.cycles
        share = 1.0 if step >= self.steps else (step % period) / (self.ratio * period)
        return 1.0 if share >= 1 else self.start + (1 - self.start) * SHAPES[self.shape](share)


class Between(Description):
    """From `first` to `last` as another schedule goes from 0 to 1: a weight above 1, or what falls, as temperatures do.

    `Between(1, 0.1, Geometric(0.0, 1e-3))` falls exponentially, `Between(1, 0, Cyclical(steps, 4, 1.0, "cosine"))` four
    times as a cosine: a learning rate with warm restarts (Loshchilov & Hutter 2017, arXiv 1608.03983).
    """

    first: Annotated[float, Number(0)] = 0.0
    last: Annotated[float, Number(0)] = 1.0
    schedule: Annotated[Any, Calls("a schedule, which goes from 0 to 1")] = Linear(0.0)

    def __call__(self, step: int) -> float:
        """The value at that step."""
        return self.first + (self.last - self.first) * float(self.schedule(step))


_Objective = Annotated[Any, Calls("an objective: what is called with chain, target, sample_shape and noise")]


class _ByStep(Description):
    """One of two objectives, by the step."""

    first: _Objective
    second: _Objective

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refused."""
        raise TypeError(f"{type(self).__name__} is another objective at each step: call .at(step)")

    def build(self, n: int, batch_shape: Sequence[int] = ()) -> Self:
        """With weights where an objective learns something itself."""
        found = copy.copy(self)
        for name in ("first", "second"):
            part = getattr(self, name)
            if hasattr(part, "build"):
                object.__setattr__(found, name, part.build(n, batch_shape))
        return found

    def modules(self) -> list[Any]:
        """What the objectives learn themselves."""
        return [module for part in (self.first, self.second) for module in getattr(part, "modules", list)()]


class Mixed(_ByStep):
    """The first objective by chance, else the second: at the same steps whatever is trained.

    Attributes:
        first, second: the objectives.
        chance: of the first.
    """

    chance: Share = 0.5

    def at(self, step: int) -> Any:
        """The objective of that step."""
        coin = _coins(max(12, step.bit_length()))[step]
        return objective_at(self.first if coin < self.chance else self.second, step)


class Then(_ByStep):
    """The first objective, and from the step `switch` on the second.

    Attributes:
        first, second: the objectives.
        switch: the first step of the second.
    """

    switch: Annotated[int, Whole(0)] = 0

    def at(self, step: int) -> Any:
        """The objective of that step."""
        return objective_at(self.first if step < self.switch else self.second, step)


@functools.cache
def _coins(bits: int) -> list[float]:
    """Of the first 2^bits steps: whatever their number, they begin alike."""
    generator = torch.Generator().manual_seed(_COINS_SEED)
    found: list[float] = torch.rand(2**bits, generator=generator, dtype=torch.float32, device="cpu").tolist()
    return found


def objective_at(objective: Any, step: int) -> Any:
    """The objective of that step; one of the user's own may have no `at`."""
    return objective.at(step) if hasattr(objective, "at") else objective


def value_at(schedule: Any, step: int) -> Any:
    """The value of a number or a schedule at that step."""
    return schedule(step) if callable(schedule) else schedule
