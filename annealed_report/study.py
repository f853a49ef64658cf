"""One study by itself, recorded as it goes: `python -m annealed_report.study risen`.

The records of a study that is not done stand in `results/begun/`, which no page reads; when all are there, they go to
`results/full/`. So one that takes days can be committed in between and gone on with on another machine, at the commit
where it was begun.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence

from annealed_core.running.sweep import stacks, sweep
from annealed_core.running.system import cores
from annealed_report import results
from annealed_report.studies import STUDIES, find_study


def go_on(name: str) -> None:
    """Train what is not yet recorded of that study, the first seeds first.

    Raises ValueError where its records are of another commit.
    """
    begun, specs = results.load("begun", name), find_study(name)
    elsewhere = {record.commit for record in begun} - {results.commit()}
    if elsewhere:
        raise ValueError(f"{name} was begun at commit {elsewhere.pop()}, and this is {results.commit()}: go on there")
    done = {record.spec for record in begun}
    groups = [group for group in stacks(specs, cores()) if not done.issuperset(group)]
    groups.sort(key=lambda group: group[0].seed)
    while groups:
        started, together = time.monotonic(), list(itertools.chain(*groups[: cores()]))
        del groups[: cores()]
        results.record("begun", name, sweep(together))
        done.update(together)
        seconds = f"{time.monotonic() - started:.0f} s"
        print(f"{name}: {len(done)} of {len(specs)}, the last in {seconds}", flush=True)
    results.complete(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run studies one after the other, and record them."""
    parser = argparse.ArgumentParser(prog="python -m annealed_report.study", description=main.__doc__)
    parser.add_argument("studies", nargs="+", help=", ".join(STUDIES))
    os.environ["ANNEALED_RECORD"] = "1"
    try:
        for name in parser.parse_args(arguments).studies:
            go_on(name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
