"""Schedules of the annealing factor: step -> value in [0, 1], checked once, when they are made.

`linear` and `cyclical` end at 1 and `geometric` approaches it, so that training ends with the plain objective or near
it. All raise ValueError, naming the field, for settings that would leave [0, 1] or never end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Schedule:
    """A callable step -> value in [0, 1], with a name that says how it was made."""

    name: str
    _value: Callable[[int], float] = field(repr=False)

    def __call__(self, step: int) -> float:
        """The value at that step (0, 1, 2, ...)."""
        return self._value(step)


def _within(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        raise ValueError(f"{name} must lie in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")


def constant(value: float = 1.0) -> Schedule:
    """The same value at every step."""
    _within("value", value, 0, 1)
    return Schedule(f"constant({value:g})", lambda step: value)


def linear(beta0: float = 0.2, gamma: float = 2e-4) -> Schedule:
    """min(1, beta0 + gamma * step): gamma is added at each step until 1 is reached."""
    _within("beta0", beta0, 0, 1)
    _within("gamma", gamma, 0, 1, open_low=beta0 < 1)
    return Schedule(f"linear({beta0:g}, {gamma:g})", lambda step: min(1.0, beta0 + gamma * step))


def geometric(beta0: float = 0.2, gamma: float = 2e-4) -> Schedule:
    """1 - (1 - beta0) * (1 - gamma)^step: the distance to 1 shrinks by the factor 1 - gamma at each step."""
    _within("beta0", beta0, 0, 1)
    _within("gamma", gamma, 0, 1, open_low=beta0 < 1)
    return Schedule(f"geometric({beta0:g}, {gamma:g})", lambda step: 1 - (1 - beta0) * (1 - gamma) ** step)


def cyclical(n_steps: int = 40_000, cycles: int = 4, ratio: float = 0.5) -> Schedule:
    """`cycles` times a linear rise from 0 to 1 over the fraction `ratio` of a cycle, then 1 (Fu et al. 2019).

    1 after n_steps.
    """
    if not 1 <= n_steps < math.inf:
        raise ValueError(f"n_steps must be a number of steps from 1, got {n_steps!r}")
    _within("cycles", cycles, 1, n_steps)
    _within("ratio", ratio, 0, 1, open_low=True)
    period = n_steps / cycles

    def value(step: int) -> float:
        return 1.0 if step >= n_steps else min(1.0, (step % period) / (ratio * period))

    return Schedule(f"cyclical({n_steps}, {cycles}, {ratio:g})", value)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "geometric": geometric,
    "cyclical": cyclical,
}
