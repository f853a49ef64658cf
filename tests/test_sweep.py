"""Sweeps: the runs of many specs, in processes of this machine or wherever an executor has them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from annealed_core.kernels import Gated
from annealed_core.objectives import AVO, ELBO
from annealed_core.running import experiment
from annealed_core.running import sweep as module
from annealed_core.running.density import Density
from annealed_core.running.experiment import TrainingError, folder_of, stored
from annealed_core.running.sweep import sweep
from annealed_core.running.system import cores
from annealed_core.running.workers import WorkerDied, Workers

SMALL = Density(kernel=Gated(hidden=4), n_transitions=2, steps=30, batch=8, samples=99)
SPECS = [SMALL.replace(objective=objective, seed=seed) for seed in (1, 0) for objective in (AVO(), ELBO())]


@dataclass
class Bowl:
    """A target that other processes can import, a plain dataclass without a hash."""

    dim: int = 2

    def log_prob(self, z):
        return -z.square().sum(-1)


class Deadly(Bowl):
    """A target that ends the process, unless it is the one that tests."""

    def log_prob(self, z):
        if os.environ.get("TESTER") != str(os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().log_prob(z)


class DeadlyOnce(Bowl):
    """A target that ends the first process that looks at it."""

    def log_prob(self, z):
        flag = Path(os.environ["ANNEALED_STORE"]).parent / "died"
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().log_prob(z)


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """Cores that other sweeps of this machine hold are not waited for."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def trained(monkeypatch):
    """The specs that this process trains."""
    found, maximise = [], experiment._maximise
    monkeypatch.setattr(
        experiment, "_maximise", lambda problem, specs, *rest: found.extend(specs) or maximise(problem, specs, *rest)
    )
    return found


@pytest.fixture
def alone(monkeypatch):
    """No other processes."""
    monkeypatch.setattr(module, "cores", lambda: 1)


@pytest.fixture
def two(monkeypatch):
    """Two processes."""
    monkeypatch.setattr(module, "cores", lambda: 2)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.metrics == b.metrics and a.history == b.history
        assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.mark.usefixtures("alone")
def test_runs_come_in_the_order_of_their_specs_and_each_is_trained_once(store, trained):
    runs = sweep(spec for spec in [*SPECS[:3], SPECS[0]])
    assert [r.spec for r in runs] == [*SPECS[:3], SPECS[0]] and runs[0].metrics == runs[3].metrics
    assert len(trained) == 3 and {*trained} == {*SPECS[:3]} and len({r.metrics["elbo"] for r in runs}) == 3
    trained.clear()
    assert len(sweep(SPECS)) == 4 and trained == SPECS[3:], "what the store has is not trained again"
    assert sweep([]) == [] == sweep(iter(()))


@pytest.mark.usefixtures("two")
def test_processes_give_the_runs_of_this_one_and_the_error_of_one_is_raised_once_the_others_are_done(
    store, trained, monkeypatch
):
    specs = [SPECS[0], SPECS[1].replace(target=Bowl())]
    one_by_one = [*sweep(specs[:1]), *sweep(specs[1:])]
    trained.clear()
    monkeypatch.setenv("ANNEALED_STORE", str(store / "other"))
    with pytest.raises(TrainingError, match="may be too large"):
        sweep([specs[0], SPECS[0].replace(lr=1e30), specs[1]])
    assert not trained and stored(specs[0])
    assert_same(sweep(specs), one_by_one)


@pytest.mark.usefixtures("two")
def test_a_process_that_dies_costs_its_run_alone_which_is_named(store, trained, monkeypatch):
    monkeypatch.setenv("TESTER", str(os.getpid()))
    deadly = SPECS[1].replace(target=Deadly())
    with pytest.raises(TrainingError, match=r"^density-Deadly-elbo-s1: its process died twice, with status -9: for"):
        sweep([SPECS[0], deadly])
    assert stored(SPECS[0]) and not trained
    assert len(sweep([SPECS[0].replace(seed=7), SPECS[1].replace(target=DeadlyOnce())])) == 2 and not trained


@pytest.mark.usefixtures("two")
def test_what_cannot_travel_is_trained_in_this_process(store, trained):
    class Local(Bowl):
        pass

    specs = [SPECS[n].replace(target=Local(), seed=n) for n in range(2)]
    assert [r.spec for r in sweep(specs)] == specs and len(trained) == 2
    assert module._packed(SPECS) and not module._packed([SMALL.replace(objective=lambda *_: 0)])


def test_an_error_of_the_users_own_is_raised_once_the_others_are_done(store):
    wrong = SPECS[1].replace(target=type("Wrong", (Bowl,), {"log_prob": lambda self, z: z.wrong})())
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match=r"log_prob fails .* no attribute 'wrong'$"):
        sweep([SPECS[0], wrong], executor=pool)
    assert stored(SPECS[0])


# ---- executors


def elsewhere(folder: str) -> None:
    os.environ["ANNEALED_STORE"] = folder


def processes(folder: Path) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, context, initializer=elsewhere, initargs=(str(folder),))


@pytest.mark.parametrize("pool", [lambda folder: ThreadPoolExecutor(2), processes], ids=["threads", "processes"])
def test_an_executors_runs_come_back_and_are_kept_without_a_common_store(
    store, tmp_path, trained, monkeypatch, pool: Callable[[Path], ProcessPoolExecutor]
):
    specs = [*SPECS[:2], SPECS[1].replace(target=Bowl())]
    with pool(tmp_path / "elsewhere") as executor:
        runs = sweep(specs, executor=executor)
    assert not trained or isinstance(executor, ThreadPoolExecutor)
    kept = [(folder_of(spec).path / "result.json").exists() for spec in specs[:2]]
    assert kept == [True, True] and folder_of(specs[2]) is None
    trained.clear()
    assert_same(sweep(specs[:2]), runs[:2])
    assert not trained
    monkeypatch.setenv("ANNEALED_STORE", str(tmp_path / "here"))
    monkeypatch.setattr(module, "cores", lambda: 1)
    assert_same(sweep(specs), runs)


class Job:
    """What submitit returns: no future of the standard library, and done after some asking."""

    def __init__(self, function, arguments):
        self.call, self.asked = (function, arguments), 0

    def done(self):
        self.asked += 1
        return self.asked > 3

    def result(self):
        function, arguments = self.call
        return function(*arguments)

    def cancel(self):
        self.asked = 9


def test_anything_that_submits_will_do_and_no_two_calls_are_equal(store):
    calls = []

    class Cluster:
        def submit(self, function, *arguments):
            calls.append((function, *arguments))
            return Job(function, arguments)

    for _ in range(2):
        assert len(sweep([SPECS[1].replace(target=Bowl())], executor=Cluster())) == 1
    assert len({*calls}) == 2


# ---- processes


def test_workers_give_results_and_errors_with_where_they_came_from(capfd):
    with Workers(2) as workers:
        futures = [workers.submit(pow, 2, n) for n in range(5)]
        assert [future.result() for future in futures] == [1, 2, 4, 8, 16]
        assert workers.submit(print, "said").result() is None
        with pytest.raises(ZeroDivisionError) as caught:
            workers.submit(divmod, 1, 0).result()
        assert "divmod" not in str(caught.value) and any("work" in note for note in caught.value.__notes__)
        with pytest.raises(WorkerDied, match=r"^its process died twice, with status 7: for want of memory perhaps$"):
            workers.submit(os._exit, 7).result()
    assert capfd.readouterr().out == "", "what is printed there is no answer"


SCRIPT = """
import sys, threading, time
from annealed_core.kernels import Gated
from annealed_core.objectives import AVO, ELBO
from annealed_core.running import sweep as module
from annealed_core.running.density import Density
print("begins", flush=True)
module.cores = lambda: 2
steps = int(sys.argv[1])
specs = [Density(steps=steps, batch=8, samples=99, objective=each) for each in (AVO(), ELBO())]
print(len(module.sweep(specs)), flush=True)
"""


def script(tmp_path, steps):
    (tmp_path / "script.py").write_text(SCRIPT)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, tmp_path / "script.py", str(steps)], **pipes)


def test_a_script_without_a_main_guard_runs_once_and_without_a_word(store, tmp_path):
    out, err = script(tmp_path, 20).communicate(timeout=300)
    assert (out, err) == ("begins\n2\n", "")


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_is_interrupted_or_killed_ends_at_once_with_its_processes(store, tmp_path, by):
    parent = script(tmp_path, 10_000_000)
    folders = []
    while len(folders) < min(2, cores()):
        time.sleep(0.1)
        folders = list(store.glob("density-*/.lock"))
    children = Path(f"/proc/{parent.pid}/task").glob("*/children")
    workers = [int(pid) for each in children for pid in each.read_text().split()]
    assert len(workers) == 2
    begun = time.monotonic()
    parent.send_signal(by)
    parent.communicate(timeout=60)
    while any(map(running, workers)):
        time.sleep(0.05)
        assert time.monotonic() - begun < 30
    assert parent.returncode in (-by, 1, 130)
