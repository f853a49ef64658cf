"""Many runs: those the store has are read, the others trained, one process a core and one thread a process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

from filelock import FileLock, Timeout

from annealed_core.experiment import Run, find, progress, run
from annealed_core.spec import Spec
from annealed_core.store import key, root
from annealed_core.system import cores, die_with_parent


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


def _train(spec: Spec, device: str) -> None:
    os.environ["ANNEALED_PROGRESS"] = "0"
    with one_core():
        run(spec, device)


def _travels(spec: Spec) -> bool:
    """Whether a worker process can be given that spec: a target defined in a notebook can't be."""
    if isinstance(spec.target, str | None):
        return True
    try:
        return type(spec.target).__module__ != "__main__" and bool(pickle.dumps(spec))
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
    distinct = {key(spec, device): spec for spec in specs}
    missing = [spec for spec in distinct.values() if not find(spec, device)]
    abroad = [spec for spec in missing if _travels(spec)]
    workers = min(processes or cores(), len(abroad))
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent) as pool,
            progress(len(abroad), "runs") as bar,
        ):
            futures = [pool.submit(_train, spec, device) for spec in abroad]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [run(spec, device) for spec in specs]
