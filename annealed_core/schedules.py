"""Schedules of the annealing factor: step -> value in [0, 1], checked once, when they are made.

`linear` and `cyclical` come to 1 and `geometric` approaches it, given enough steps, so that training ends with the
plain objective or near it. All raise ValueError, naming the field, for settings that would leave [0, 1] or never get
there; `checked` does the same for any callable.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

_ROUNDING = 1e-9  # so near to 0 or 1, a callable's value counts as that
_NEAR = 0.95  # a warm-up that ends training below this is warned of


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
    return Schedule(f"constant({value:g})", partial(_constant, value))


def _constant(value: float, step: int) -> float:
    return value


def linear(beta0: float = 0.2, gamma: float = 2e-4) -> Schedule:
    """min(1, beta0 + gamma * step): gamma is added at each step until 1 is reached."""
    _within("beta0", beta0, 0, 1)
    _within("gamma", gamma, 0, 1, open_low=beta0 < 1)
    return Schedule(f"linear({beta0:g}, {gamma:g})", partial(_linear, beta0, gamma))


def _linear(beta0: float, gamma: float, step: int) -> float:
    return min(1.0, beta0 + gamma * step)


def geometric(beta0: float = 0.2, gamma: float = 2e-4) -> Schedule:
    """1 - (1 - beta0) * (1 - gamma)^step: the distance to 1 shrinks by the factor 1 - gamma at each step."""
    _within("beta0", beta0, 0, 1)
    _within("gamma", gamma, 0, 1, open_low=beta0 < 1)
    return Schedule(f"geometric({beta0:g}, {gamma:g})", partial(_geometric, beta0, gamma))


def _geometric(beta0: float, gamma: float, step: int) -> float:
    return 1 - (1 - beta0) * (1 - gamma) ** step


#: How the value rises within a cycle, from the share of the rise that is over; of Fu et al. 2019 and its code. The
#: sigmoid begins at .0025 and jumps from .9975 to 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "sigmoid": lambda share: 1 / (1 + math.exp(6 - 12 * share)),
    "cosine": lambda share: 0.5 - 0.5 * math.cos(math.pi * share),
}


def cyclical(n_steps: int = 40_000, cycles: int = 4, ratio: float = 0.5, shape: str = "linear") -> Schedule:
    """`cycles` times a rise from 0 to 1 over the fraction `ratio` of a cycle, then 1 (Fu et al. 2019).

    arXiv 1903.10145. The rise has a shape of `SHAPES`. 1 after n_steps.
    """
    if not 1 <= n_steps < math.inf:
        raise ValueError(f"n_steps must be a number of steps from 1, got {n_steps!r}")
    _within("cycles", cycles, 1, n_steps)
    _within("ratio", ratio, 0, 1, open_low=True)
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")
    name = f"cyclical({n_steps}, {cycles}, {ratio:g}{'' if shape == 'linear' else f', {shape}'})"
    return Schedule(name, partial(_cyclical, n_steps, cycles, ratio, shape))


def _cyclical(n_steps: int, cycles: int, ratio: float, shape: str, step: int) -> float:
    period = n_steps / cycles
    share = 1.0 if step >= n_steps else (step % period) / (ratio * period)
    return 1.0 if share >= 1 else SHAPES[shape](share)


def checked(schedule: Callable[[int], Any], n_steps: int, may_end_below_one: bool = False) -> Schedule:
    """Any callable step -> number as a schedule of that many steps, looked at in every one of them.

    Args:
        schedule: called with 0 ... n_steps - 1, once each; later steps get the last value.
        n_steps: how long training is.
        may_end_below_one: warn of a last value below 1 instead of refusing it. With beta the model is then trained on
            a weaker penalty than it is judged by, which may be meant; with alpha it would learn another target.

    Raises ValueError, with the value and its step, where the schedule leaves [0, 1] or does not end at 1, each by more
    than rounding does, or gives no number.
    """
    if not callable(schedule):
        raise ValueError(f"schedule must be a function of the step, got {schedule!r}")
    name = str(getattr(schedule, "name", None) or getattr(schedule, "__name__", type(schedule).__name__))
    values = []
    for step in range(n_steps):
        value = schedule(step)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"schedule {name} must give numbers, got {value!r} at step {step:,}") from None
        if not -_ROUNDING <= number <= 1 + _ROUNDING:
            raise ValueError(f"schedule {name} must stay in [0, 1], got {number!r} at step {step:,}")
        values.append(0.0 if number < _ROUNDING else 1.0 if number > 1 - _ROUNDING else number)
    if values and values[-1] < 1:
        said = f"schedule {name} should end at 1, got {values[-1]!r} at step {n_steps - 1:,}, its last"
        if not may_end_below_one:
            raise ValueError(said.replace("should", "must"))
        warn(said)
    return Schedule(name, partial(_table, tuple(values)))


def _table(values: tuple[float, ...], step: int) -> float:
    return values[min(step, len(values) - 1)]


def warn_if_far_from_one(kind: str, beta0: float, gamma: float, n_steps: int) -> None:
    """Warn where "linear" or "geometric" ends training below 0.95, and say which gamma would not."""
    last = n_steps - 1
    value = SCHEDULES[kind](beta0, gamma)(last)
    if value >= _NEAR:
        return
    said = f"schedule {kind!r} should end near 1, where models are judged, got {value:.3g} at step {last:,}, its last"
    if last:
        left = (1 - _NEAR) / (1 - beta0)  # of the distance to 1, at the end
        enough = 1 - left ** (1 / last) if kind == "geometric" else (1 - left) * (1 - beta0) / last
        said += f": gamma {gamma:g} is too small, {1.05 * enough:.2g} would do"  # a little more than comes to _NEAR
    warn(said)


def warn(message: str) -> None:
    """A warning that names the line outside of this package which caused it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "geometric": geometric,
    "cyclical": cyclical,
}
