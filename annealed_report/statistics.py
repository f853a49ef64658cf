"""Statistics: intervals, and the word that an interval gives.

    difference = paired_difference(ours, theirs)
    word(difference, sign=-1, smallest=0.02)        # "holds"

A claim says that a difference is positive (sign +1) or negative (-1), and beforehand it is written down which effect is
the smallest worth having. The word is computed from the interval alone. Of the paper's claims each has one primary
contrast, whose intervals are widened by Holm's method for their number; everything else is descriptive.
"""

from __future__ import annotations

import collections
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.special import stdtr, stdtrit

WORDS = {
    "holds": "the 95 % interval lies beyond the smallest effect, on the side that is claimed",
    "holds, size open": "the 95 % interval lies on that side, and may be smaller",
    "no difference": "the 90 % interval lies within the smallest effect of 0, on both sides",
    "gain excluded": "the 95 % interval reaches 0 or beyond, and not as far as the smallest effect that is claimed",
    "opposite": "the 95 % interval lies beyond the smallest effect, on the other side",
    "opposite, size open": "the 95 % interval lies on the other side, and may be smaller",
    "undetermined": "the 95 % interval reaches 0 and the smallest effect: there are too few runs to tell",
    "not tested": "there are no runs, or their kernels earn nothing, so that they can't tell",
}


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds and its standard error; with them its interval at any level.

    Attributes:
        mean, standard_error: NaN the error of one value.
        n: how many values.
        df: degrees of freedom of Student's t; infinite for the normal distribution.
        level: of `low` and `high`.
    """

    mean: float
    standard_error: float
    n: int
    df: float
    level: float = 0.95

    def at(self, level: float) -> tuple[float, float]:
        """The ends of the interval at that level; infinite for one value."""
        if math.isnan(self.standard_error):
            return -math.inf, math.inf
        half = float(stdtrit(self.df, 0.5 + level / 2)) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def low(self) -> float:
        """The lower end."""
        return self.at(self.level)[0]

    @property
    def high(self) -> float:
        """The upper end."""
        return self.at(self.level)[1]

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return self.high - self.mean

    @property
    def p_value(self) -> float:
        """Two-sided, of a difference of 0."""
        if math.isnan(self.standard_error):
            return 1.0
        if self.standard_error == 0:
            return float(self.mean == 0)
        return 2 * float(stdtr(self.df, -abs(self.mean / self.standard_error)))

    def text(self, digits: int = 2) -> str:
        """Mean ± half-width, or the mean alone where one value gives no interval; up to four digits of a narrow one."""
        while 0 < self.half_width < 0.5 * 10**-digits and digits < 4:
            digits += 1
        mean = f"{round(self.mean, digits) + 0.0:.{digits}f}".replace("-", "−")  # no -0.00
        return f"{mean} (1 seed)" if self.n < 2 else f"{mean} ± {self.half_width:.{digits}f}"


def text(found: Interval | None, digits: int = 2) -> str:
    """What an interval says of itself, or a dash where nothing was run."""
    return "–" if found is None else found.text(digits)


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with Student's interval; ValueError for none, or values not finite."""
    n = len(values)
    if n == 0 or not all(math.isfinite(v) for v in values):
        raise ValueError(f"an interval needs at least one value, all finite, got {list(values)}")
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(statistics.fmean(values), error, n, n - 1)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The interval of ours - theirs over pairs that share a seed; ValueError for different numbers of values."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def paired_shares(ours: Sequence[bool], theirs: Sequence[bool]) -> Interval:
    """The interval of a difference of shares, ours - theirs, over pairs of yes and no.

    Half a pair is added to each of the four kinds of pairs, so that ten pairs which all agree do not pass for certainty
    (Agresti & Min 2005, Statistics in Medicine 24). ValueError for no pairs, or different numbers of values.
    """
    differences = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
    if not differences:
        raise ValueError("shares are compared over at least one pair")
    n = len(differences) + 2
    more, less = differences.count(1) + 0.5, differences.count(-1) + 0.5
    error = math.sqrt(more + less - (more - less) ** 2 / n) / n
    return Interval((more - less) / n, error, len(differences), math.inf)


def pooled(settings: Mapping[str, Sequence[float]]) -> Interval:
    """The mean over settings that stand for more of their kind, each with its own values, as paired differences.

    The plain equivalent of a mixed model with a random effect of the setting: the interval is that of the settings'
    means, whose spread holds both what differs between settings and what differs between seeds. ValueError for one.
    """
    if len(settings) < 2:
        raise ValueError(f"settings are pooled from two on, got {len(settings)}")
    return interval([interval(values).mean for values in settings.values()])


def holm(intervals: Mapping[str, Interval], level: float = 0.95) -> dict[str, Interval]:
    """The same intervals, each at the level that Holm's method gives it for their number.

    The one of m that is farthest from 0 in standard errors is taken at 1 - (1 - level) / m, the next at m - 1, and so
    on, until one reaches 0, at whose level all others stay (Holm 1979, Scandinavian Journal of Statistics 6).
    """
    order = sorted(intervals, key=lambda name: intervals[name].p_value)
    found = {}
    for rank, name in enumerate(order):
        found[name] = replace(intervals[name], level=1 - (1 - level) / (len(order) - rank))
        if found[name].low <= 0 <= found[name].high:  # the first that isn't told from 0 ends the descent
            found |= {later: replace(intervals[later], level=found[name].level) for later in order[rank:]}
            break
    return {name: found[name] for name in intervals}


def word(difference: Interval | None, sign: int, smallest: float = 0.0) -> str:
    """One of `WORDS` for a claim that the difference is positive (sign +1) or negative (-1).

    Args:
        difference: None where it was not run.
        sign: +1 or -1; ValueError for another.
        smallest: the smallest effect worth having.
    """
    if sign not in (-1, 1):
        raise ValueError(f"sign must be +1 or -1, got {sign}")
    if difference is None:
        return "not tested"
    low, high = sorted(sign * end for end in difference.at(difference.level))
    # Two one-sided tests at 1 - level each: equivalence (Schuirmann 1987).
    inner = sorted(sign * end for end in difference.at(2 * difference.level - 1))
    if low > smallest:
        return "holds"
    if high < -smallest:
        return "opposite"
    if -smallest < inner[0] and inner[1] < smallest:
        return "no difference"
    if low > 0:
        return "holds, size open"
    if high < 0:
        return "opposite, size open"
    return "gain excluded" if high < smallest else "undetermined"


def error_rates(effect: float, smallest: float, spread: float, n: int, repeats: int = 4000) -> dict[str, float]:
    """How often each of `WORDS` is said of a claim that a difference is positive, by simulation.

    Args:
        effect: the true difference.
        smallest: the smallest effect worth having.
        spread: the standard deviation of the differences between seeds.
        n: seeds.
        repeats: simulated studies.
    """
    draw = random.Random(0)
    said = collections.Counter(
        word(interval([draw.gauss(effect, spread) for _ in range(n)]), 1, smallest) for _ in range(repeats)
    )
    return {each: said[each] / repeats for each in WORDS}
