"""Descriptions: what a part of an experiment is, in plain values that are checked when it is made.

    class AVO(Description):
        weight: Share = 1.0

is a frozen dataclass that refuses what is impossible in one line, compares and hashes by its fields, prints as what one
would type, and goes to JSON and back. What a field takes stands in its type: `Annotated[float, Number(0, 1)]`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Self, dataclass_transform, get_args, get_type_hints


class Check:
    """What a field takes, in words (`takes`) and as a function: it gives the value as it is kept, or None."""

    takes: str

    def __call__(self, value: Any) -> Any:
        """The value as it is kept; None where it is not taken."""
        raise NotImplementedError

    def lacks(self, value: Any) -> str:
        """What a value that is not taken would need, where more can be said of it than `takes`; else nothing."""
        return ""


class Number(Check):
    """A finite number between two ends, either of which may be left out; NumPy's count."""

    def __init__(
        self, low: float = -math.inf, high: float = math.inf, open_low: bool = False, open_high: bool = False
    ) -> None:
        self.low, self.high, self.open_low, self.open_high = low, high, open_low, open_high
        if high == math.inf:
            self.takes = "a number" if low == -math.inf else f"a number {'above' if open_low else 'from'} {low:g}"
        else:
            self.takes = f"a number in {'[('[open_low]}{low:g}, {high:g}{'])'[open_high]}"

    def __call__(self, value: Any) -> float | None:
        """As a float."""
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            return None
        number = float(str(value)) if type(value).__name__ in ("float16", "float32") else float(value)
        outside = number < self.low or number > self.high
        at_open_end = (self.open_low and number == self.low) or (self.open_high and number == self.high)
        return None if outside or at_open_end else number


class Whole(Check):
    """A whole number between two ends, or 0 where that is taken too; NumPy's count."""

    def __init__(self, low: int = 0, high: float = math.inf, or_zero: bool = False) -> None:
        self.low, self.high, self.or_zero = low, high, or_zero
        self.takes = f"{'0, or ' * or_zero}a whole number from {low}" + (f" to {high:,}" if high < math.inf else "")

    def __call__(self, value: Any) -> int | None:
        """As an int."""
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            return None
        inside = self.low <= int(value) <= self.high or (self.or_zero and value == 0)
        return int(value) if inside else None


class Choice(Check):
    """One of some names."""

    def __init__(self, *names: str) -> None:
        self.names, self.takes = names, "one of " + ", ".join(names)

    def __call__(self, value: Any) -> str | None:
        """As it is."""
        return value if isinstance(value, str) and value in self.names else None


class Flag(Check):
    """True or False; NumPy's count."""

    takes = "True or False"

    def __call__(self, value: Any) -> bool | None:
        """As a bool."""
        return bool(value) if type(value).__name__ in ("bool", "bool_") else None


class Calls(Check):
    """An object that can be called, or has the methods that are named."""

    def __init__(self, takes: str, *methods: str) -> None:
        self.takes, self.methods = takes, methods or ("__call__",)

    def __call__(self, value: Any) -> Any:
        """As it is."""
        fits = all(callable(getattr(value, name, None)) for name in self.methods)
        return value if fits and not isinstance(value, type | str) else None


class Annealed(Check):
    """A number, or a function of the step that gives such numbers: a schedule."""

    def __init__(self, number: Number) -> None:
        self.number, self.takes = number, f"{number.takes}, or a function of the step"

    def __call__(self, value: Any) -> Any:
        """A number as a float, a function as it is."""
        return value if callable(value) and not isinstance(value, type) else self.number(value)


Share = Annotated[float, Number(0, 1)]
Positive = Annotated[float, Number(0, open_low=True)]
Size = Annotated[int, Whole(1)]
Boolean = Annotated[bool, Flag()]

_OURS: dict[str, type[Any]] = {}  # by the names that JSON has for them


@dataclass_transform(frozen_default=True)
class Description:
    """What every description can do; subclasses are frozen dataclasses.

    A subclass may look at its fields together in `check`, which raises ValueError; with `by_name` it takes fields by
    name alone.
    """

    by_name: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, repr=False, eq=False)(cls)
        _refuse_unknown_fields(cls)
        if cls.__module__.partition(".")[0] in ("annealed_core", "annealed_report"):
            _OURS[cls.__name__] = cls

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, (check, may_be_none) in _checks(kind).items():
            value = getattr(self, name)
            if value is None and may_be_none:
                continue
            kept = check(tuple(value) if isinstance(value, list) else value)
            if kept is None:
                said = "unknown" if isinstance(value, str) and isinstance(check, Choice) else "impossible"
                takes = ": ".join(filter(None, (f"{name} takes {check.takes}", check.lacks(value))))
                raise ValueError(f"{said} {name} {one_line(value)} of {type(self).__name__}: {takes}")
            object.__setattr__(self, name, kept)
        self.check()

    def check(self) -> None:
        """Refuse fields that do not fit each other."""

    def replace(self, **changes: Any) -> Self:
        """The same with other values; errors are those of making one."""
        return type(self)(**{**self.fields(), **changes})

    def fields(self) -> dict[str, Any]:
        """All fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def annealed(self, numbers: bool = False) -> dict[str, Any]:
        """The schedules among the fields, by name; with `numbers` also those that might be in their places."""
        kind: Any = type(self)
        names = [name for name, (check, _) in _checks(kind).items() if isinstance(check, Annealed)]
        return {name: getattr(self, name) for name in names if numbers or callable(getattr(self, name))}

    def number_of(self, name: str) -> Number:
        """What the numbers of a schedule in that field must be."""
        kind: Any = type(self)
        check: Any = _checks(kind)[name][0]
        found: Number = check.number
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Description) and _identity(self) == _identity(other)

    def __hash__(self) -> int:
        return hash(_identity(self))

    def __repr__(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        said = [f"{n}={v!r}" for n, v in self.fields().items() if _identity(v) != _identity(defaults[n])]
        return f"{type(self).__name__}({', '.join(said)})"


@functools.cache
def _checks(cls: type[Any]) -> dict[str, tuple[Check, bool]]:
    """The check of each field that has one, and whether None is taken too: `Annotated[...] | None`."""
    found = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        choices = [hint] if hasattr(hint, "__metadata__") else get_args(hint)
        for extra in (extra for choice in choices for extra in getattr(choice, "__metadata__", ())):
            if isinstance(extra, Check):
                found[name] = extra, type(None) in choices
    return found


def _refuse_unknown_fields(cls: Any) -> None:
    """Have a class say which field is unknown, and which may have been meant."""
    initialise, names = cls.__init__, [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(initialise)
    def __init__(self: Any, *values: Any, **fields: Any) -> None:
        if values and cls.by_name:
            choices = f"write {cls.__name__}(name=value), with names from {', '.join(names)}"
            raise TypeError(f"{cls.__name__} takes fields by name alone, got {one_line(values[0])}: {choices}")
        for name, value in fields.items():
            if name not in names:
                meant = suggest(name, names) or f"choose from {', '.join(names)}"
                raise TypeError(f"unknown field {name!r} of {cls.__name__}, got {value!r}: {meant.strip()}")
        initialise(self, *values, **fields)

    cls.__init__ = __init__


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _is_ours(value: Any) -> bool:
    return isinstance(value, Description) and _OURS.get(type(value).__name__) is type(value)


def _identity(value: Any) -> Any:
    """What a value is compared by: a description by its fields, an object of the user's own by its identity."""
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    if isinstance(value, Description):
        return type(value), *(map(_identity, value.fields().values()))
    return (type(value), value) if _is_plain(value) else ("own", id(value))


def one_line(value: Any) -> str:
    """How a value prints, in one line."""
    shown = repr(value)
    return " ".join(shown.split()) if len(shown.splitlines()) > 1 else shown


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? `, or nothing where no known name is close."""
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def own_objects(value: Any, place: str = "") -> dict[str, Any]:
    """What in a description is neither plain nor a description of ours: {where it stands: the user's object}."""
    if _is_ours(value):
        parts = {f"{place}.{name}".lstrip("."): each for name, each in value.fields().items()}
    elif isinstance(value, tuple):
        parts = {f"{place}[{number}]": each for number, each in enumerate(value)}
    else:
        return {} if _is_plain(value) else {place: value}
    return {where: each for name, part in parts.items() for where, each in own_objects(part, name).items()}


def to_json(value: Any, own: Callable[[Any], Any] | None = None) -> Any:
    """A description as nested plain values, `{"AVO": {"weight": 0.2, ...}}`, with all of its fields.

    Args:
        value: a description, or what stands in one.
        own: what stands for an object of the user's own. Without it such an object is refused with ValueError.
    """
    if _is_ours(value):
        return {type(value).__name__: {name: to_json(each, own) for name, each in value.fields().items()}}
    if isinstance(value, tuple):
        return [to_json(each, own) for each in value]
    if _is_plain(value):
        return value
    if own is None:
        raise ValueError(f"{value!r} is an object of your own, which can't be written down")
    return own(value)


def from_json(value: Any) -> Any:
    """The description that `to_json` wrote; fields that are missing take their defaults.

    Raises ValueError for a name that is no description's, and as the description does.
    """
    if isinstance(value, dict):
        ((name, fields),) = value.items()
        if name not in _OURS:
            raise ValueError(f"unknown description {name!r}: {suggest(name, _OURS)}choose from {', '.join(_OURS)}")
        return _OURS[name](**{field: from_json(each) for field, each in fields.items()})
    return tuple(map(from_json, value)) if isinstance(value, list) else value
