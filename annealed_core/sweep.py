"""Many runs: those the store has are read, the others trained, one process a core and one thread a process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout

from annealed_core.experiment import Run, find, progress, run, stack_key, train
from annealed_core.spec import Spec
from annealed_core.store import key, root
from annealed_core.system import cores, die_with_parent

LARGEST_STACK, SMALLEST_STACK = 32, 8


@contextmanager
def one_core() -> Iterator[None]:
    """Hold one of as many places as there are cores, which all sweeps with the same store share.

    Two sweeps at a time, of two notebooks say, would else start twice as many processes as there are cores, and all
    would be slower for it. A process that dies gives up its place.
    """
    places = [FileLock(root() / ".cores" / f"{number}.lock") for number in range(cores())]
    (root() / ".cores").mkdir(parents=True, exist_ok=True)
    while True:
        for place in places:
            try:
                place.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield
            finally:
                place.release()
            return
        time.sleep(0.05)


def _train(specs: Sequence[Spec], device: str) -> None:
    os.environ["ANNEALED_PROGRESS"] = "0"
    with one_core():
        train(specs, device)


def _identity(spec: Spec) -> Any:
    return spec.target if isinstance(spec.target, str) else id(spec.target)


def stacks(specs: Sequence[Spec], processes: int) -> list[list[Spec]]:
    """The specs in groups to be trained side by side: as few as keep all processes busy, of 32 models at the most.

    Beyond some ten models a larger stack is no faster.
    """
    alike: dict[Any, list[Spec]] = {}
    for spec in specs:
        shared = stack_key(spec)
        alike.setdefault(id(spec) if shared is None else shared, []).append(spec)
    groups = []
    for members in alike.values():
        targets = list({_identity(spec): None for spec in members})  # in the order of their first
        members = sorted(members, key=lambda spec: targets.index(_identity(spec)))  # equal ones side by side
        number = max(-(-len(members) // LARGEST_STACK), min(processes, len(members) // SMALLEST_STACK), 1)
        size = -(-len(members) // number)
        groups += [members[start : start + size] for start in range(0, len(members), size)]
    return groups


def _travels(spec: Spec) -> bool:
    """Whether a worker process can be given that spec: a target or schedule defined in a notebook can't be."""
    own = [each for each in (spec.target, spec.schedule) if not isinstance(each, str | None)]
    if not own:
        return True
    homes = [getattr(each, "__module__", "") for each in own] + [type(each).__module__ for each in own]
    try:
        return "__main__" not in homes and bool(pickle.dumps(spec))
    except Exception:  # whatever a user's class does when it is pickled
        return False


def sweep(specs: Sequence[Spec], processes: int | None = None, device: str = "cpu") -> list[Run]:
    """Run all the specs and return their runs in the same order.

    Args:
        specs: what to run; a spec that occurs twice is run once.
        processes: at most so many at a time; the number of cores unless told.
        device: as for `run`.

    Raises the first error of a run, once the others that had begun are done.
    """
    processes = processes or cores()
    distinct = {key(spec, device): spec for spec in specs}
    # Grouped before it is asked what the store has: so a sweep that is gone on with trains the stacks it had begun.
    groups = [
        group for group in stacks(list(distinct.values()), processes) if not all(find(spec, device) for spec in group)
    ]
    abroad = [group for group in groups if all(_travels(spec) for spec in group)]
    workers = min(processes, len(abroad))
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent) as pool,
            progress(sum(map(len, abroad)), "runs") as bar,
        ):
            futures = {pool.submit(_train, group, device): group for group in abroad}
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(len(futures[future]))
            except BrokenProcessPool:
                pass  # something of a target or of the script could not be loaded there: train it here
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    for group in groups:  # what can't travel, or would have the one worker to itself
        train(group, device)
    return [run(spec, device) for spec in specs]
