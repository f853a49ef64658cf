"""Comparisons: which runs belong together, and their paired differences over seeds.

"Runs" may be committed records too: whatever has `spec` and `metrics`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from annealed_core.energies import find
from annealed_report.statistics import Interval, interval, paired_difference


def _modes_of(run: Any) -> list[tuple[float, float]]:
    """Each mode's share of the samples, and the mass that it should have."""
    target: Any = find(run.spec.target) if isinstance(run.spec.target, str) else run.spec.target
    return list(zip(run.metrics["mode_shares"], map(float, target.modes[1]), strict=True))


def mode_error(run: Any) -> float:
    """The total variation between the shares of the samples in each mode and the modes' masses, in [0, 1]."""
    return 0.5 * sum(abs(share - mass) for share, mass in _modes_of(run))


def total_variation(run: Any) -> float:
    """That of a run on a density from its target, in [0, 1]."""
    return float(run.metrics["total_variation"])


def keeps_modes(run: Any, below: float = 0.2) -> list[bool]:
    """Of each mode, whether a run on a density leaves it that share, at least, of the samples it should have."""
    return [share >= below * mass for share, mass in _modes_of(run)]


def loses_a_mode(run: Any, below: float = 0.2) -> bool:
    """Whether a run on a density leaves a mode less than that share of the samples it should have."""
    return not all(keeps_modes(run, below))


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
