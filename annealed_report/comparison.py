"""Comparisons: paired differences over seeds with their interval, and the verdict that the interval gives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import ndtri, stdtrit

VERDICTS = ("reproduced", "negligible", "not reproduced", "reversed", "inconclusive", "not yet run")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its standard error and Student-t interval.

    Attributes:
        mean: the mean.
        standard_error: of the mean; NaN for a single value.
        low, high: ends of the interval; infinite for a single value.
        n: number of values.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return self.high - self.mean

    def text(self, digits: int = 2) -> str:
        """Mean ± half-width, or the mean alone where one value gives no interval."""
        mean = f"{round(self.mean, digits) + 0.0:.{digits}f}".replace("-", "−")  # no -0.00
        return f"{mean} (1 seed)" if self.n < 2 else f"{mean} ± {self.half_width:.{digits}f}"


def text(found: Interval | None, digits: int = 2) -> str:
    """What an interval says of itself, or a dash where nothing was run."""
    return "–" if found is None else found.text(digits)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent values with its Student-t interval.

    Raises ValueError for no values or values that are not finite.
    """
    n = len(values)
    if n == 0 or not all(math.isfinite(v) for v in values):
        raise ValueError(f"an interval needs at least one value, all finite, got {list(values)}")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, -math.inf, math.inf, 1)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * error
    return Interval(mean, error, mean - half, mean + half, n)


def paired_difference(ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95) -> Interval:
    """The interval of ours - theirs over pairs that share a seed.

    Raises ValueError where the numbers of values differ.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"paired values must be equally many, got {len(ours)} and {len(theirs)}")
    return interval([a - b for a, b in zip(ours, theirs, strict=True)], confidence)


def paired_shares(ours: Sequence[bool], theirs: Sequence[bool]) -> Interval:
    """The 95 % interval of a difference of shares, ours - theirs, over pairs of yes and no.

    Half a pair is added to each of the four kinds of pairs, so that ten pairs which all agree do not pass for certainty
    (Agresti & Min 2005, Statistics in Medicine 24). Raises ValueError where the numbers of values differ.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"paired values must be equally many and at least one, got {len(ours)} and {len(theirs)}")
    n = len(ours) + 2
    more = sum(a > b for a, b in zip(ours, theirs, strict=True)) + 0.5
    less = sum(a < b for a, b in zip(ours, theirs, strict=True)) + 0.5
    mean = (more - less) / n
    error = math.sqrt(more + less - (more - less) ** 2 / n) / n
    half = float(ndtri(0.975)) * error
    return Interval(mean, error, mean - half, mean + half, len(ours))


def verdict(difference: Interval | None, claimed_sign: int, smallest_effect: float = 0.0) -> str:
    """The word for what a paired difference says of a claim.

    Args:
        difference: its interval, or None where nothing was run.
        claimed_sign: +1 where the claim says that the difference is positive, -1 where negative.
        smallest_effect: the smallest difference worth having; with 0, "not reproduced" can't be told from
            "inconclusive".

    Returns "reproduced" where the whole interval lies on the claimed side of 0, "reversed" where it lies on the
    other, but "negligible" where it lies on either and within smallest_effect of 0; "not reproduced" where it includes
    0 but no effect as large as smallest_effect on the claimed side, "inconclusive" where it includes both, "not yet
    run" for None.
    """
    if claimed_sign not in (-1, 1):
        raise ValueError(f"claimed_sign must be +1 or -1, got {claimed_sign}")
    if difference is None:
        return "not yet run"
    low, high = sorted((claimed_sign * difference.low, claimed_sign * difference.high))
    if low > 0:
        return "negligible" if high < smallest_effect else "reproduced"
    if high < 0:
        return "negligible" if low > -smallest_effect else "reversed"
    return "not reproduced" if high < smallest_effect else "inconclusive"


def loses_a_mode(run: Any, below: float = 0.2) -> bool:
    """Whether a run on a density, or its record, leaves a mode less than that share of the samples it should have."""
    from annealed_core.energies import find  # late: it imports torch

    target: Any = find(run.spec.target) if isinstance(run.spec.target, str) else run.spec.target
    shares = run.metrics["mode_shares"]
    return any(share < below * mass for share, mass in zip(shares, target.modes[1], strict=True))


_ABSENT = object()


def select(runs: Iterable[Any], **fields: Any) -> list[Any]:
    """The runs (or committed records) whose spec has these values, in the order of their seeds.

    Values compare by equality, `objective=AVO()`; a class stands for all its instances, `objective=AVO`. A spec without
    the field does not match.
    """

    def matches(spec: Any, name: str, value: Any) -> bool:
        found = getattr(spec, name, _ABSENT)
        return isinstance(found, value) if isinstance(value, type) else bool(found is not _ABSENT and found == value)

    found = [run for run in runs if all(matches(run.spec, name, value) for name, value in fields.items())]
    return sorted(found, key=lambda run: run.spec.seed)


def of_specs(runs: Iterable[Any], specs: Iterable[Any]) -> list[Any]:
    """The runs (or committed records) of these specs, in the order of their seeds."""
    wanted = set(specs)
    return sorted((run for run in runs if run.spec in wanted), key=lambda run: run.spec.seed)


def mean_metric(runs: Iterable[Any], metric: str, **fields: Any) -> Interval | None:
    """The interval of a metric over the runs whose spec has these values; None where there are none."""
    found = select(runs, **fields)
    return interval([run.metrics[metric] for run in found]) if found else None


def difference(runs: Sequence[Any], metric: str, ours: Any, theirs: Any, **fields: Any) -> Interval | None:
    """The paired difference of a metric between two methods, over the seeds that both were run with.

        difference(runs, "total_variation", AVO(), ELBO(), target="D", kernel=Gated())
        difference(runs, "nll", {"kernel": IAF()}, {"kernel": None}, objective=ELBO())

    Args:
        runs: runs or committed records.
        metric: of which the difference is taken.
        ours, theirs: the methods, each an objective or a dictionary of fields; the difference is ours - theirs.
        fields: values that the specs of both must have, as for `select`.

    Returns None where no seed was run with both. Raises ValueError where a method has several runs of one seed.
    """
    mine, other = (side if isinstance(side, dict) else {"objective": side} for side in (ours, theirs))
    return paired(select(runs, **mine, **fields), select(runs, **other, **fields), metric)


def paired(ours: Sequence[Any], theirs: Sequence[Any], metric: str) -> Interval | None:
    """The paired difference of a metric, ours - theirs, over the seeds that both sets of runs or records have.

    Returns None where there is no such seed. Raises ValueError where a set has several runs of one seed.
    """
    values = []
    for found in (ours, theirs):
        by_seed = {run.spec.seed: run.metrics[metric] for run in found}
        if len(by_seed) < len(found):
            raise ValueError(f"{len(found)} runs share {len(by_seed)} seeds: name more fields")
        values.append(by_seed)
    common = sorted(values[0].keys() & values[1].keys())
    return paired_difference([values[0][s] for s in common], [values[1][s] for s in common]) if common else None


def spread(runs: Iterable[Any], metric: str) -> dict[int, float]:
    """By seed, the standard deviation of a metric over all settings that were run with it.

    Raises ValueError where seeds differ in their number of settings, or have fewer than two.
    """
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        by_seed.setdefault(run.spec.seed, []).append(run.metrics[metric])
    if len({len(values) for values in by_seed.values()}) > 1 or any(len(values) < 2 for values in by_seed.values()):
        found = ", ".join(f"{len(values)} of seed {seed}" for seed, values in sorted(by_seed.items()))
        raise ValueError(f"a spread needs as many settings of every seed, and two at least, got {found}")
    return {seed: statistics.stdev(values) for seed, values in sorted(by_seed.items())}
