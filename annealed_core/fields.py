"""What each field of a `Spec` takes, and the check of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from annealed_core import targets
from annealed_core.earlier import FAULTS
from annealed_core.schedules import SCHEDULES, SHAPES
from annealed_core.vae import DECODERS

METHODS = {
    "toy": ("elbo", "alpha", "iwae", "avo", "calibrated", "mixture"),
    "mnist": ("vae", "hvi", "avo", "mixture", "planar", "householder", "iaf", "iwae"),
}
KERNELS = ("gated", "residual", "planar", "householder", "iaf", "spline")
PATHS = ("linear", "geometric", "learned")
ANNEALS = ("beta", "alpha", "capacity")
PRECISIONS = ("highest", "medium")


@dataclass(frozen=True)
class _Field:
    """What a field takes, in words, and the check of it."""

    takes: str
    check: Callable[[Any], bool]


def _whole(low: int, high: float = math.inf) -> _Field:
    takes = f"a whole number from {low}" + (f" to {high:,}" if high < math.inf else "")
    return _Field(takes, lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high)


def _real(low: float, high: float, open_low: bool = False, open_high: bool = False) -> _Field:
    def check(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    if high == math.inf:
        return _Field(f"a number {'above' if open_low else 'from'} {low:g}", check)
    return _Field(f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}", check)


def _choice(*names: str) -> _Field:
    return _Field("one of " + ", ".join(names), lambda v: v in names)


def _is_selection(value: Any) -> bool:
    """Whether it is a list of distinct faults."""
    if not isinstance(value, list | tuple) or not all(isinstance(fault, str) for fault in value):
        return False
    return set(value) <= FAULTS.keys() and len(set(value)) == len(value)


def _is_target(value: Any) -> bool:
    if isinstance(value, str):
        return value in targets.ENERGIES
    dim = getattr(value, "dim", None)
    return (
        not isinstance(value, type) and callable(getattr(value, "log_prob", None)) and isinstance(dim, int) and dim > 0
    )


def _none_or(low: int, high: int) -> _Field:
    whole = _whole(low, high)
    return _Field(f"0, or {whole.takes}", lambda v: whole.check(v) or (v == 0 and not isinstance(v, bool | float)))


FIELDS: dict[str, _Field] = {
    "experiment": _choice(*METHODS),
    "method": _choice(*dict.fromkeys(name for methods in METHODS.values() for name in methods)),
    "seed": _whole(0, 2**31 - 1),
    "target": _Field(f"one of {', '.join(targets.ENERGIES)}, or an object with log_prob and dim", _is_target),
    "kernel": _choice(*KERNELS),
    "n_transitions": _whole(0, 1000),
    "hidden": _whole(1),
    "bins": _whole(2),
    "steps": _whole(1),
    "epochs": _whole(1),
    "batch": _whole(2),
    "lr": _real(0, math.inf, open_low=True),
    "lr_schedule": _choice("constant", "cosine"),
    "beta1": _real(0, 1, open_high=True),
    "initialisation": _choice("default", "identity"),
    "path": _choice(*PATHS),
    "elbo_steps": _whole(0),
    "warmup": _real(0, 1),
    "iwae_samples": _whole(1),
    "samples": _whole(2),
    "latents": _whole(1),
    "width": _whole(1),
    "schedule": _Field(
        f"one of {', '.join(SCHEDULES)}, or a function of the step",
        lambda v: v in SCHEDULES if isinstance(v, str) else callable(v) and not isinstance(v, type),
    ),
    "anneals": _choice(*ANNEALS),
    "cycles": _whole(1),
    "ratio": _real(0, 1, open_low=True),
    "shape": _choice(*SHAPES),
    "capacity": _real(0, math.inf),
    "decoder": _choice(*DECODERS),
    "beta0": _real(0, 1),
    "gamma": _real(0, 1, open_low=True),
    "avo_weight": _real(0, 1),
    "layers": _choice("plain", "gated"),
    "base": _choice("encoder", "prior"),
    "faults": _Field(f"a list of some of {', '.join(FAULTS)}", _is_selection),
    "ema": _real(0, 1, open_high=True),
    "precision": _choice(*PRECISIONS),
    "train_images": _whole(2, 50_000),
    "nll_samples": _whole(2),
    "nll_images": _whole(1, 10_000),
    "bounds_images": _none_or(2, 10_000),
    "explored_images": _none_or(10, 2000),
}

#: Plural names under which notebooks take several values of a field.
PLURALS = {"methods": "method", "seeds": "seed", "targets": "target", "kernels": "kernel", "schedules": "schedule"}


def check_parameter(name: str, value: Any) -> None:
    """Refuse an impossible value of a notebook's parameter with one line; names that are no field of Spec pass.

    A plural (`methods`, `seeds`, `targets`, `kernels`, `schedules`) takes a list of values of its field.
    Raises ValueError.
    """
    if name in PLURALS:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"{name} must be a list of at least one value, got {value!r}")
        for each in value:
            refuse_unless_valid(PLURALS[name], each)
        if len(set(value)) < len(value):
            raise ValueError(f"{name} must differ from each other, got {value!r}")
    elif name in FIELDS:
        refuse_unless_valid(name, value)


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? `, or nothing where no known name is close."""
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def refuse_unless_valid(name: str, value: Any) -> None:
    """ValueError with the field, the value and what it takes, where a field does not take that value."""
    field = FIELDS[name]
    if not field.check(value):
        kind = "unknown" if isinstance(value, str) and "one of" in field.takes else "impossible"
        raise ValueError(f"{kind} {name} {value!r}: {name} takes {field.takes}")
