"""What a sweep over a cluster costs beside its runs: measured with runs that train nothing, and simulated.

    python bench/cluster.py --runs 10000                # over Dask, two workers of this machine: minutes
    python bench/cluster.py --scaling 64                # real runs over one worker, two, and without Dask
    python bench/cluster.py --simulate 100000 --workers 1000

The simulation is a queue with one scheduler and one caller, each of which serves one run at a time: a run waits for the
scheduler, trains on a worker as long as a committed run did, and waits for the caller, which writes it to its store.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from torch import nn

from annealed_core.flows import IAF
from annealed_core.kernels import Gated
from annealed_core.running.density import Density
from annealed_core.running.experiment import Experiment, keep, train
from annealed_core.running.sweep import _packed, sweep

RESULTS = Path(__file__).parents[1] / "results" / "full"


class Empty(Experiment):
    """A run that trains nothing."""

    label = "empty"

    @classmethod
    def problem(cls, specs, device="cpu", compile=False):
        return _Nothing()

    def restore(self, weights, device="cpu"):
        return nn.Identity(), None


class _Nothing:
    module, steps, steps_per_record = nn.Identity(), 1, 1

    def __init__(self):
        self.failures = {}

    def parameters(self):
        return []

    def metrics(self):
        return [{"elbo": 0.0}]

    def weights(self):
        return [{}]


def overhead(runs: int) -> dict[str, float]:
    """Seconds a run that `sweep` takes over Dask, and what of it scheduler, caller and its store take."""
    import distributed

    specs = [Empty(seed=n, name="empty") for n in range(runs)]
    plan = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_:
        os.environ["ANNEALED_STORE"] = f"{folder}/workers"
        cluster = open_.enter_context(distributed.LocalCluster(**plan))
        with distributed.Client(cluster) as client:
            os.environ["ANNEALED_STORE"] = f"{folder}/warm"
            sweep(specs[:20], executor=client)  # workers import torch
            os.environ["ANNEALED_STORE"] = f"{folder}/measured"
            begun, cpu = time.perf_counter(), time.process_time()
            sweep(specs, executor=client)
            whole, here = (time.perf_counter() - begun) / runs, (time.process_time() - cpu) / runs
            begun, few = time.perf_counter(), specs[: min(500, runs)]
            answers = client.gather([client.submit(pow, 2, n, pure=False) for n in range(len(few))])
            scheduling = (time.perf_counter() - begun) / len(answers)
        os.environ["ANNEALED_STORE"] = f"{folder}/kept"
        (trained,) = train(specs[:1])
        begun = time.perf_counter()
        for spec in few:
            _packed([spec], "cpu", False)
            keep(spec.replace(name="kept"), trained)
        caller = (time.perf_counter() - begun) / len(few)
    return {"run": whole, "processor time of caller and scheduler": here, "scheduler": scheduling, "caller": caller}


def scaling(runs: int, rounds: int = 3) -> None:
    """Print the seconds of that many runs over one worker of Dask and two, in turns, and what figures differ by."""
    import distributed

    plan: dict = {"target": "D", "steps": 2000, "n_transitions": 4}
    kinds = [{"kernel": Gated(hidden=32)}, {"kernel": IAF(hidden=32)}]
    specs = [Density(seed=n // 2, **plan, **kinds[n % 2]) for n in range(runs)]
    found: dict[int, list] = {}
    for number in (1, 2) * rounds + (0,):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as open_:
            os.environ["ANNEALED_STORE"], client = f"{folder}/workers", None
            if number:
                cluster = distributed.LocalCluster(n_workers=number, threads_per_worker=1, dashboard_address=None)
                client = open_.enter_context(distributed.Client(open_.enter_context(cluster)))
                client.run(import_module, "torch._dynamo")  # what a first step of training imports
            os.environ["ANNEALED_STORE"], begun = f"{folder}/runs", time.perf_counter()
            found[number] = sweep(specs, executor=client)
            print(f"{number or 'no'} workers: {time.perf_counter() - begun:.1f} s", flush=True)
    for kind, name in enumerate(("Gaussian kernels", "flows")):
        pairs = list(zip(found[2], found[0], strict=True))[kind::2]
        apart = max(abs(a.metrics[key] - b.metrics[key]) for a, b in pairs for key in ("elbo", "log_z"))
        print(f"{name}: {apart:.2g} nats at most between Dask and this machine's own processes")


def durations() -> list[float]:
    """The seconds that committed runs took."""
    return [record["seconds"] for path in sorted(RESULTS.glob("*.json")) for record in json.loads(path.read_text())]


def simulate(seconds: list[float], workers: int, scheduler: float, caller: float) -> dict[str, float]:
    """The hours that a sweep takes, and the shares of a worker's and of the caller's time that go by in waiting."""
    free = [0.0] * workers
    sent, ended = 0.0, []
    for each in seconds:
        sent = max(sent + scheduler, heapq.heappop(free))  # a worker that is free is sent the next run
        heapq.heappush(free, sent + each)
        ended.append(sent + each)
    kept = 0.0
    for moment in sorted(ended):
        kept = max(kept, moment) + caller
    best = max(sum(seconds) / workers, max(seconds))
    return {
        "hours": kept / 3600,
        "hours at best": best / 3600,
        "workers busy": sum(seconds) / workers / max(ended),
        "caller busy": caller * len(seconds) / kept,
        "caller behind at the end, s": kept - max(ended),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=0, help="empty runs to measure over Dask")
    parser.add_argument("--scaling", type=int, default=0, help="real runs over one and two workers")
    parser.add_argument("--simulate", type=int, default=0, help="runs of a simulated sweep")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--scheduler", type=float, default=1e-3, help="seconds of the scheduler a run")
    parser.add_argument("--caller", type=float, default=5e-3, help="seconds of the caller a run")
    asked = parser.parse_args()
    if asked.runs:
        print("  ".join(f"{name} {1e3 * value:.2f} ms" for name, value in overhead(asked.runs).items()))
    if asked.scaling:
        scaling(asked.scaling)
    if asked.simulate:
        every, random_ = durations(), random.Random(0)
        drawn = random_.choices(every, k=asked.simulate)
        print(
            f"{len(every)} committed runs of {statistics.median(every):.0f} s in the median, {max(every):.0f} at most"
        )
        for name, seconds in {"runs as committed": drawn, "in a hundredth": [each / 100 for each in drawn]}.items():
            for order, given in {"as they come": seconds, "longest first": sorted(seconds, reverse=True)}.items():
                found = simulate(given, asked.workers, asked.scheduler, asked.caller)
                print(f"{name}, {order}: " + "  ".join(f"{key} {value:.3g}" for key, value in found.items()))


if __name__ == "__main__":
    import cluster  # by its name, so that workers import its classes and need not be sent them with every run

    cluster.main()
