"""Executors of a cluster by name, on the engines of others: Dask (`distributed`) and Slurm (`submitit`).

    sweep(specs, executor="tcp://host:8786")    # a scheduler of Dask, which needs no disk in common with its workers
    sweep(specs, executor="slurm")              # jobs of an array; the store's disk must be a common one
    sweep(specs, executor="local")              # the same as processes of this machine, to try it

Partition, account and time of Slurm's jobs are what $SBATCH_PARTITION, $SBATCH_ACCOUNT, $SBATCH_TIMELIMIT ... say.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from annealed_core.running import store
from annealed_core.running.system import optional
from annealed_core.running.workers import WorkerDied

SECONDS_TO_CONNECT = 10


def check_cluster(name: str) -> None:
    """Refuse what is the name of no cluster, with ValueError."""
    if name not in ("slurm", "local") and "://" not in name:
        raise ValueError(f"unknown cluster {name!r}: choose slurm, or the address of a Dask scheduler, tcp://host:8786")


@contextmanager
def connected(name: str, device: str = "cpu") -> Iterator[Any]:
    """What `sweep` takes as an executor.

    Raises ValueError for an unknown name, ImportError where the extra `cluster` is missing, ConnectionError where no
    scheduler answers.
    """
    check_cluster(name)
    if "://" not in name:
        executor = optional("submitit", "cluster").AutoExecutor(store.root() / "jobs", cluster=name)
        executor.update_parameters(name="annealed", timeout_min=24 * 60, cpus_per_task=1)
        executor.update_parameters(gpus_per_node=int(device.startswith("cuda")))
        yield executor
        return
    try:
        client = optional("distributed", "cluster").Client(name, timeout=SECONDS_TO_CONNECT, set_as_default=False)
    except OSError as error:
        raise ConnectionError(f"no scheduler of Dask answers at {name} ({type(error).__name__})") from None
    with client:
        client.subscribe_topic("all", _say_death)
        yield client


def _say_death(event: Any) -> None:
    """Say in a line that Dask lost a worker, which gives what that was doing to another by itself."""
    _, said = event
    if isinstance(said, dict) and said.get("action") == "remove-worker" and not said.get("expected"):
        doing = f"what it was doing ({len(said.get('processing-tasks', ()))}) is begun again"
        logging.getLogger(__name__).warning(f"worker {said.get('worker')} died: {doing}")


def deaths(error: BaseException) -> int:
    """How many workers died of what raised this: 0 for an error of another kind, 2 where the engine has tried again."""
    names = {"KilledWorker": 2, "UncompletedJobError": 1}  # of distributed, of submitit
    return 2 if isinstance(error, WorkerDied) else names.get(type(error).__name__, 0)


def submit_all(executor: Any, work: Callable[..., Any], messages: Sequence[Any]) -> list[Any]:
    """A future for each call of `work` with a message; Dask takes them all in one call, in a third of the time."""
    tokens = [uuid.uuid4().hex for _ in messages]  # they set calls apart: Dask takes equal ones for one
    if messages and hasattr(executor, "gather"):
        found: list[Any] = executor.map(work, messages, tokens)
        return found
    return [executor.submit(work, *call) for call in zip(messages, tokens, strict=True)]


def results_of(executor: Any, futures: Sequence[Any]) -> dict[int, Any]:
    """By the id of a future what it came to, of those of Dask that ended well: fetched at once and not one by one."""
    good = [future for future in futures if getattr(future, "status", "") == "finished"]
    if not good or not hasattr(executor, "gather"):
        return {}
    with suppress(Exception):  # a worker that holds one may die meanwhile: each is then asked by itself
        return dict(zip(map(id, good), executor.gather(good), strict=True))
    return {}


def without_workers(executor: Any) -> bool:
    """Whether a client of Dask has no worker left, so that nothing goes on until one comes."""
    with suppress(Exception):  # a scheduler that is gone says so by itself
        return hasattr(executor, "scheduler_info") and not executor.scheduler_info()["workers"]
    return False
