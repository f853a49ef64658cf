"""Many runs: those the store has are read, the others trained, one process a core and one thread a process."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import torch
from filelock import BaseFileLock, FileLock, Timeout

from annealed_core.description import own_objects
from annealed_core.fit import maximise
from annealed_core.running.cluster import connected, deaths, results_of, submit_all, without_workers
from annealed_core.running.code import code_version
from annealed_core.running.experiment import (
    Experiment,
    Run,
    Trained,
    device_of,
    finished,
    keep,
    progress,
    stored,
    train,
)
from annealed_core.running.system import cores, optional
from annealed_core.running.workers import WorkerDied, Workers, portable

LARGEST_STACK, SMALLEST_STACK = 32, 8
SECONDS_BETWEEN_LOOKS = 60.0
_LOG = logging.getLogger(__name__)


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
    """What a worker does; it gives None for specs that it can't load, and an error instead of raising it."""
    try:
        specs, device, compile, code = pickle.loads(message)
    except Exception:  # whatever a user's module does when it is imported
        return pickle.dumps(None)
    try:
        if code_version(*specs, maximise) != code:
            raise RuntimeError("a worker has other code of annealed_core than the process that asks: end it first")
        return pickle.dumps(train(specs, device, compile))
    except Exception as error:
        return pickle.dumps(portable(error))


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


def _packed(group: list[Experiment], *rest: Any, by_value: bool = False) -> bytes | None:
    """What another process is given; None where it can't be given that, as what is defined in a notebook.

    With `by_value`, what is defined there travels too, where there is `cloudpickle`, as Dask and submitit have it.
    """
    own = [each for spec in group for each in own_objects(spec).values()]
    homes = [getattr(each, "__module__", "") for each in own] + [type(each).__module__ for each in own]
    whole = (group, *rest, code_version(*group, maximise))
    with suppress(Exception):  # whatever a user's class does when it is pickled
        if "__main__" not in homes:
            return pickle.dumps(whole)
    with suppress(Exception):
        return cast(bytes, optional("cloudpickle", "cluster").dumps(whole)) if by_value else None
    return None


def sweep(
    specs: Iterable[Any], executor: Any = None, device: str | torch.device | None = None, compile: bool = False
) -> list[Run]:
    """Run all the specs and return their runs in the same order.

    Args:
        specs: what to run; a spec that occurs twice is run once.
        executor: anything with `submit(function, *arguments)` that returns a future with `done`, `result` and `cancel`,
            such as a pool of `concurrent.futures`, a client of Dask or an executor of submitit; or a name that
            `cluster` knows, `$ANNEALED_CLUSTER` unless given; without one processes of this machine, one a core. A
            worker returns what it made, which is kept here: it needs no store in common with this process, and goes on
            from a checkpoint where it has one.
        device, compile: as for `run`.

    What is defined in a notebook or a script is trained in this process, unless there is an executor and cloudpickle. A
    worker that dies is said in a line, and what it was doing is begun again; what kills workers twice fails by its name
    and is not kept. Raises the first error of a run, once the others are done or, if they had not begun, cancelled;
    TypeError for what is no experiment; RuntimeError where the executor is gone: the same call then goes on.
    """
    specs, executor = list(specs), executor or os.environ.get("ANNEALED_CLUSTER") or None
    device = device_of(device, here=executor is None)
    for spec in specs:
        if not isinstance(spec, Experiment):
            raise TypeError(f"sweep takes experiments such as Density(target='D') or Mnist(), got {spec!r}")
    processes, here = cores(), executor is None
    found: dict[Experiment, Trained] = {}
    # Grouped before it is asked what the store has: so a sweep that is gone on with trains the stacks it had begun.
    groups = []
    for group in stacks(list(dict.fromkeys(specs)), processes):
        kept = {spec: one for spec in group if (one := stored(spec, device, compile))}
        if len(kept) < len(group):
            groups.append(group)
        else:
            found |= kept
    if groups and (not here or min(processes, len(groups)) > 1):
        pack = lambda group: _packed(group, device, compile, by_value=not here)
        packed = [(group, message) for group in groups if (message := pack(group)) is not None]
        with ExitStack() as open_, progress(sum(map(len, groups)), "runs") as bar:
            if here:
                executor = open_.enter_context(Workers(min(processes, len(packed)) or 1))
            elif isinstance(executor, str):
                executor = open_.enter_context(connected(executor, device))
            for group, trained, died in _collect(executor, _train_at_home if here else _train_there, packed, pack):
                found |= zip(group, trained, strict=True)
                bar.update(len(group))
                for spec in () if here or died else group:
                    keep(spec, found[spec], device, compile)
    for group in groups:
        if not all(spec in found for spec in group):
            found |= zip(group, train(group, device, compile), strict=True)
    at_home = device if here or torch.cuda.is_available() else "cpu"
    return [finished(spec, found[spec], at_home) for spec in specs]


def _collect(
    executor: Any,
    work: Callable[..., bytes],
    packed: Sequence[tuple[list[Experiment], bytes]],
    pack: Callable[[list[Experiment]], bytes | None],
) -> Iterator[tuple[list[Experiment], list[Trained], bool]]:
    """What becomes of the groups, in the order in which they end; nothing of those that can't be loaded there.

    Each comes with whether workers died of it. A group that two workers died of is tried once more run by run.
    """

    def submit(groups: list[list[Experiment]], messages: list[Any], died: int = 0) -> list[tuple[Any, Any, int]]:
        futures = submit_all(executor, work, messages)
        return [(future, group, died) for future, group in zip(futures, groups, strict=True)]

    with getattr(executor, "batch", nullcontext)():  # one array of jobs, with submitit
        waiting = submit([group for group, _ in packed], [message for _, message in packed])
    failed: Exception | None = None
    look = time.monotonic() + SECONDS_BETWEEN_LOOKS
    try:
        while waiting:
            if time.monotonic() > look:
                look = time.monotonic() + SECONDS_BETWEEN_LOOKS
                if without_workers(executor):
                    _LOG.warning(f"the cluster has no worker left: {len(waiting)} stacks of runs wait until one comes")
            asked, waiting, begun = waiting, [], time.perf_counter()
            done = [future.done() for future, *_ in asked]  # each may be a look at a file
            looked = time.perf_counter() - begun
            ready = results_of(executor, [each[0] for each, ended in zip(asked, done, strict=True) if ended])
            for number, (future, group, died) in enumerate(asked):
                if not done[number]:
                    waiting.append(asked[number])
                    continue
                try:
                    trained = pickle.loads(ready.pop(id(future), None) or future.result())
                except CancelledError as error:
                    lost = f"the executor has given up {group[0].label}: the same call goes on from what is stored"
                    trained = failed or RuntimeError(f"{lost} ({' '.join(str(error).split())[:200]})")
                except Exception as error:
                    died += deaths(error)
                    again = [group] if died == 1 else [[spec] for spec in group] if len(group) > 1 else []
                    if not deaths(error):
                        trained = error
                    elif again:
                        label = group[0].label + (f" and {len(group) - 1} more" if len(group) > 1 else "")
                        _LOG.warning(f"{label}: a worker died; begun again{' one by one' * (len(again) > 1)}")
                        waiting += submit(again, [pack(each) for each in again], 1)
                        continue
                    else:
                        why = str(error) if isinstance(error, WorkerDied) else "workers died of it twice or more"
                        yield group, [Trained({}, [], 0.0, {}, f"{group[0].label}: {why}")], True
                        continue
                if isinstance(trained, Exception):
                    failed = failed or trained
                    _cancel(waiting + asked[number + 1 :])
                elif trained is not None:
                    yield group, trained, False
            time.sleep(max(0.02, 4 * looked))
    except BaseException:
        _cancel(waiting + asked)
        raise
    if failed is not None:
        raise failed


def _cancel(waiting: Iterable[tuple[Any, ...]]) -> None:
    for future, *_ in waiting:
        with suppress(Exception):  # an executor that is gone can't cancel, and has nothing left to do
            future.cancel()
