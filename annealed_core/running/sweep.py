"""Many runs: those the store has are read, the others trained, one process a core and one thread a process."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout

from annealed_core.description import own_objects
from annealed_core.fit import maximise
from annealed_core.running.code import code_version
from annealed_core.running.experiment import Experiment, Run, Trained, finished, keep, progress, stored, train
from annealed_core.running.system import cores
from annealed_core.running.workers import WorkerDied, Workers

LARGEST_STACK, SMALLEST_STACK = 32, 8


@contextmanager
def one_core() -> Iterator[None]:
    """Hold one of as many places as there are cores, which all sweeps on this machine share.

    Two sweeps at a time, of two notebooks say, would else start twice as many processes as there are cores, and all
    would be slower for it. A process that dies gives up its place.
    """
    folder = Path(tempfile.gettempdir()) / f"annealed-cores-{getattr(os, 'getuid', int)()}"
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):  # where there can be no locks, all go at once
            folder.mkdir(exist_ok=True)
            places = [FileLock(folder / f"{number}.lock") for number in range(cores())]
            while not any(map(_taken, places)):
                time.sleep(0.05)
            held.callback(next(place for place in places if place.is_locked).release)
        yield


def _taken(place: BaseFileLock) -> bool:
    try:
        place.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _train_there(message: bytes, token: str = "") -> bytes:
    """What a worker does; it gives None for specs that it can't load."""
    try:
        specs, device, compile, code = pickle.loads(message)
    except Exception:  # whatever a user's module does when it is imported
        return pickle.dumps(None)
    if code_version(*specs, maximise) != code:
        raise RuntimeError("a worker has other code of annealed_core than the process that asks: end it first")
    return pickle.dumps(train(specs, device, compile))


def _train_at_home(message: bytes, token: str = "") -> bytes:
    """What a process of this machine does."""
    with one_core():
        return _train_there(message)


def stacks(specs: Sequence[Experiment], processes: int) -> list[list[Experiment]]:
    """The specs in groups to be trained side by side: as few as keep all processes busy, of 32 models at the most.

    Beyond some ten models a larger stack is no faster.
    """
    alike: dict[Hashable, list[Experiment]] = {}
    for spec in specs:
        shared = spec.stack_key()
        alike.setdefault(("alone", id(spec)) if shared is None else (type(spec), shared), []).append(spec)
    groups = []
    for members in alike.values():
        targets = [_identity(getattr(spec, "target", None)) for spec in members]  # equal ones come side by side
        order = sorted(range(len(members)), key=lambda n: targets.index(targets[n]))
        number = max(-(-len(members) // LARGEST_STACK), min(processes, len(members) // SMALLEST_STACK), 1)
        size = -(-len(members) // number)
        groups += [[members[n] for n in order[start : start + size]] for start in range(0, len(members), size)]
    return groups


def _identity(target: Any) -> Any:
    return target if isinstance(target, str | None) else id(target)


def _packed(group: list[Experiment], *rest: Any) -> bytes | None:
    """What another process is given; None where it can't be given that, as what is defined in a notebook."""
    own = [each for spec in group for each in own_objects(spec).values()]
    homes = [getattr(each, "__module__", "") for each in own] + [type(each).__module__ for each in own]
    try:
        return None if "__main__" in homes else pickle.dumps((group, *rest, code_version(*group, maximise)))
    except Exception:  # whatever a user's class does when it is pickled
        return None


def sweep(
    specs: Iterable[Any], executor: Any = None, device: str | torch.device = "cpu", compile: bool = False
) -> list[Run]:
    """Run all the specs and return their runs in the same order.

    Args:
        specs: what to run; a spec that occurs twice is run once.
        executor: anything with `submit(function, *arguments)` that returns a future with `done`, `result` and `cancel`,
            such as a pool of `concurrent.futures`, a client of Dask or an executor of submitit; processes of this
            machine, one a core, unless given. A worker returns what it made, which is kept here: it needs no store in
            common with this process.
        device, compile: as for `run`.

    What is defined in a notebook or a script is trained in this process. Raises the first error of a run, once the
    others are done or, if they had not begun, cancelled; TypeError for what is no experiment.
    """
    specs, device = list(specs), str(device)
    for spec in specs:
        if not isinstance(spec, Experiment):
            raise TypeError(f"sweep takes experiments such as Density(target='D') or Mnist(), got {spec!r}")
    processes = cores()
    found: dict[Experiment, Trained] = {}
    # Grouped before it is asked what the store has: so a sweep that is gone on with trains the stacks it had begun.
    groups = []
    for group in stacks(list(dict.fromkeys(specs)), processes):
        kept = {spec: one for spec in group if (one := stored(spec, device, compile))}
        if len(kept) < len(group):
            groups.append(group)
        else:
            found |= kept
    if executor is not None or min(processes, len(groups)) > 1:
        packed = [(group, message) for group in groups if (message := _packed(group, device, compile)) is not None]
        with ExitStack() as open_, progress(sum(map(len, groups)), "runs") as bar:
            here = executor is None
            workers = open_.enter_context(Workers(min(processes, len(packed)) or 1)) if here else executor
            for group, trained in _collect(workers, _train_at_home if here else _train_there, packed):
                found |= zip(group, trained, strict=True)
                bar.update(len(group))
                for spec in () if here else group:
                    keep(spec, found[spec], device, compile)
    for group in groups:
        if not all(spec in found for spec in group):
            found |= zip(group, train(group, device, compile), strict=True)
    return [finished(spec, found[spec], device) for spec in specs]


def _collect(
    executor: Any, work: Callable[..., bytes], packed: Iterable[tuple[list[Experiment], bytes]]
) -> Iterator[tuple[list[Experiment], list[Trained]]]:
    """What becomes of the groups, in the order in which they end; nothing of those that can't be loaded there."""
    # The token sets calls apart: Dask takes equal ones for one.
    waiting = [(executor.submit(work, message, uuid.uuid4().hex), group) for group, message in packed]
    failed: Exception | None = None
    try:
        while waiting:
            done = [pair for pair in waiting if pair[0].done()]
            waiting = [pair for pair in waiting if pair not in done]
            for future, group in done:
                try:
                    trained = pickle.loads(future.result())
                except WorkerDied as death:
                    trained = [Trained({}, [], 0.0, {}, f"{spec.label}: {death}") for spec in group]
                except CancelledError:
                    continue
                except Exception as error:
                    failed = failed or error
                    _cancel(waiting)
                    continue
                if trained is not None:
                    yield group, trained
            if not done:
                time.sleep(0.02)
    except BaseException:
        _cancel(waiting)
        raise
    if failed is not None:
        raise failed


def _cancel(waiting: Iterable[tuple[Any, Any]]) -> None:
    for future, _ in waiting:
        future.cancel()
