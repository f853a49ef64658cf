"""Comparisons: paired differences over seeds with their interval, and the verdict that the interval gives.

"Runs" may be committed records too: whatever has `spec` and `metrics`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import ndtri, stdtrit

from annealed_core.energies import find

VERDICTS = ("reproduced", "negligible", "not reproduced", "reversed", "inconclusive", "not yet run")


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds, its standard error, and the ends of its 95 % interval: NaN and infinite for one seed."""

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


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with its 95 % Student-t interval; ValueError for none, or values not finite."""
    n = len(values)
    if n == 0 or not all(math.isfinite(v) for v in values):
        raise ValueError(f"an interval needs at least one value, all finite, got {list(values)}")
    mean = statistics.fmean(values)
    if n == 1:
        return Interval(mean, math.nan, -math.inf, math.inf, 1)
    error = statistics.stdev(values) / math.sqrt(n)
    half = float(stdtrit(n - 1, 0.975)) * error
    return Interval(mean, error, mean - half, mean + half, n)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The interval of ours - theirs over pairs that share a seed; ValueError for different numbers of values."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def paired_shares(ours: Sequence[bool], theirs: Sequence[bool]) -> Interval:
    """The 95 % interval of a difference of shares, ours - theirs, over pairs of yes and no.

    Half a pair is added to each of the four kinds of pairs, so that ten pairs which all agree do not pass for certainty
    (Agresti & Min 2005, Statistics in Medicine 24). ValueError for no pairs, or different numbers of values.
    """
    differences = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
    if not differences:
        raise ValueError("shares are compared over at least one pair")
    n = len(differences) + 2
    more, less = differences.count(1) + 0.5, differences.count(-1) + 0.5
    mean = (more - less) / n
    error = math.sqrt(more + less - (more - less) ** 2 / n) / n
    half = float(ndtri(0.975)) * error
    return Interval(mean, error, mean - half, mean + half, len(differences))


def verdict(difference: Interval | None, claimed_sign: int, smallest_effect: float = 0.0) -> str:
    """The word for what a paired difference says of a claim that it is positive (claimed_sign +1) or negative (-1).

    "reproduced" where the whole interval lies on the claimed side of 0, "reversed" where it lies on the other, but
    "negligible" where it also lies within smallest_effect (the smallest difference worth having) of 0; "not reproduced"
    where it includes 0 but no effect as large as smallest_effect on the claimed side, "inconclusive" where it includes
    both (with 0, the two can't be told apart); "not yet run" for None.
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
    """Whether a run on a density leaves a mode less than that share of the samples it should have."""
    target: Any = find(run.spec.target) if isinstance(run.spec.target, str) else run.spec.target
    shares = run.metrics["mode_shares"]
    return any(share < below * mass for share, mass in zip(shares, target.modes[1], strict=True))


def select(runs: Iterable[Any], **fields: Any) -> list[Any]:
    """The runs whose spec has these values, in the order of their seeds.

    Values compare by equality, `objective=AVO()`; a class stands for all its instances, `objective=AVO`. A spec without
    the field does not match.
    """

    def matches(spec: Any, name: str, value: Any) -> bool:
        if not hasattr(spec, name):
            return False
        found = getattr(spec, name)
        return isinstance(found, value) if isinstance(value, type) else bool(found == value)

    found = [run for run in runs if all(matches(run.spec, name, value) for name, value in fields.items())]
    return sorted(found, key=lambda run: run.spec.seed)


def of_specs(runs: Iterable[Any], specs: Iterable[Any]) -> list[Any]:
    """The runs of these specs, in the order of their seeds."""
    wanted = set(specs)
    return sorted((run for run in runs if run.spec in wanted), key=lambda run: run.spec.seed)


def mean_metric(runs: Iterable[Any], metric: str, **fields: Any) -> Interval | None:
    """The interval of a metric over the runs whose spec has these values; None where there are none."""
    found = select(runs, **fields)
    return interval([run.metrics[metric] for run in found]) if found else None


def difference(runs: Sequence[Any], metric: str, ours: Any, theirs: Any, **fields: Any) -> Interval | None:
    """The paired difference of a metric between two methods, ours - theirs, among runs that also have `fields`.

        difference(runs, "total_variation", AVO(), ELBO(), target="D", kernel=Gated())
        difference(runs, "nll", {"kernel": IAF()}, {"kernel": None}, objective=ELBO())

    A method is an objective or a dictionary of fields, as for `select`; what comes back is that of `paired`.
    """
    mine, other = (side if isinstance(side, dict) else {"objective": side} for side in (ours, theirs))
    return paired(select(runs, **mine, **fields), select(runs, **other, **fields), metric)


def paired(ours: Sequence[Any], theirs: Sequence[Any], metric: str) -> Interval | None:
    """The paired difference of a metric, ours - theirs, over the seeds that both sets of runs have.

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
    for run in sorted(runs, key=lambda run: run.spec.seed):
        by_seed.setdefault(run.spec.seed, []).append(run.metrics[metric])
    numbers = {seed: len(values) for seed, values in by_seed.items()}
    if len(set(numbers.values())) > 1 or 1 in numbers.values():
        raise ValueError(f"a spread needs as many settings of every seed, and two at least, got {numbers}")
    return {seed: statistics.stdev(values) for seed, values in by_seed.items()}
