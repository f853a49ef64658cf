"""Schedules: what changes with the step of training.

A schedule of a number is a function step -> number, checked when it is made; `Mixed` and `Then` are schedules of
objectives.

`Linear` and `Cyclical` come to 1 and `Geometric` approaches it, given enough steps, so that training ends with the
plain objective or near it. Any other function of the step does as well: `check_schedule` looks at all of its values.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Self

import torch

from annealed_core.description import Annealed, Calls, Choice, Description, Number, Share, Size, Whole

_ROUNDING = 1e-9  # so near to 0 or 1, a function's value counts as that
_COINS_SEED = 20_181  # which steps of a mixture are the first objective's
_NEAR = 0.95  # a warm-up that ends training below this is warned of

#: A number in [0, 1], or a schedule of such numbers.
Annealing = Annotated[Any, Annealed(Number(0, 1))]
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


def check_schedule(schedule: Any, steps: int, must_end_at_one: bool = False) -> None:
    """Look at a number or a schedule of that many steps in every one of them.

    Args:
        schedule: a number, or a function called with 0 ... steps - 1.
        steps: how long training is.
        must_end_at_one: refuse a last value below 1 instead of warning of it. With beta the model is then trained on a
            weaker penalty than it is judged by, which may be meant; with alpha it would learn another target.

    Raises ValueError, with the value and its step, where the schedule gives no number, leaves [0, 1], or does not end
    at 1 although it must. Warns where it ends below 0.95.
    """
    name = repr(schedule) if isinstance(schedule, Description) else getattr(schedule, "__name__", repr(schedule))
    last: Any = 1.0
    for step in range(steps if callable(schedule) else 1):
        last = value_at(schedule, step)
        try:
            inside = -_ROUNDING <= float(last) <= 1 + _ROUNDING
        except (TypeError, ValueError):
            raise ValueError(f"schedule {name} must give numbers, got {last!r} at step {step:,}") from None
        if not inside:
            raise ValueError(f"schedule {name} must stay in [0, 1], got {float(last)!r} at step {step:,}")
    at = f"got {float(last):.3g} at step {steps - 1:,}, its last"
    if must_end_at_one and last < 1 - _ROUNDING:
        raise ValueError(f"schedule {name} must end at 1, {at}")
    if callable(schedule) and last < _NEAR:
        warn(f"schedule {name} should end near 1, where models are judged, {at}")


def warn(message: str) -> None:
    """A warning that names the line outside of this package which caused it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "annealed_core":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
