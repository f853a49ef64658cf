"""Audit: a random twentieth of the committed records run again at the present code, and how far they lie apart.

    python -m annealed_report.audit --seconds 60 --seed 0

Differences are in standard deviations over the seeds of the same setting. Where the random numbers that a run draws
come in another order than when it was recorded, it is as another seed would be.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from annealed_core.running.sweep import sweep
from annealed_report import results
from annealed_report.studies import STUDIES


def sample(records: Sequence[Any], share: float, seconds: float, seed: int) -> list[Any]:
    """A random share of the records, of those whose runs took at most so long; one at least."""
    short = [record for record in records if record.seconds <= seconds]
    return random.Random(seed).sample(short, min(len(short), max(1, round(share * len(records)))))


def differences(record: Any, metrics: dict[str, Any], records: Sequence[Any]) -> dict[str, float]:
    """By metric, how far the new figures lie from a record's, in standard deviations over its setting's seeds."""
    alike = [each for each in records if each.spec.replace(seed=record.spec.seed) == record.spec]
    found = {}
    for name, old in record.metrics.items():
        new, values = metrics.get(name), [each.metrics.get(name) for each in alike]
        if len(values) > 1 and all(isinstance(each, float) and math.isfinite(each) for each in (new, old, *values)):
            found[name] = (new - old) / max(statistics.stdev(values), 1e-6 * abs(old), 1e-12)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each study and metric; 1 where one is off by more than other seeds would explain."""
    parser = argparse.ArgumentParser(prog="python -m annealed_report.audit", description=main.__doc__)
    parser.add_argument("studies", nargs="*", default=list(STUDIES), help="names of studies; all unless given")
    parser.add_argument("--share", type=float, default=0.05, help="of a study's records (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="the longest run to be taken again (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    asked, off = parser.parse_args(arguments), 0
    print(f"seed {asked.seed}: the mean and the largest difference of each metric, in standard deviations over seeds")
    for study in asked.studies:
        records = results.load("full", study)
        chosen = sample(records, asked.share, asked.seconds, asked.seed)
        runs = sweep([record.spec for record in chosen])
        found = [differences(record, run.metrics, records) for record, run in zip(chosen, runs, strict=True)]
        for name in sorted({name for each in found for name in each}):
            values = [each[name] for each in found if name in each]
            is_off = abs(statistics.fmean(values)) > 3 * math.sqrt(2 / len(values))
            off += is_off
            figures = f"{len(values):3d} runs {statistics.fmean(values):+8.2f} {max(values, key=abs):+8.2f}"
            print(f"{study:16s} {name:24s} {figures}{'  more than other seeds would explain' * is_off}", flush=True)
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
