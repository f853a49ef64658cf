"""Sweeps on the engines of others: the runs of this machine, bit by bit, whatever dies there."""

import os
import random
import signal
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_sweep import SMALL, SPECS, Bowl, Deadly, DeadlyOnce, assert_same

from annealed_core.objectives import ELBO
from annealed_core.running.cluster import connected, deaths, results_of, submit_all
from annealed_core.running.experiment import TrainingError, folder_of, stored
from annealed_core.running.sweep import sweep
from annealed_core.running.workers import WorkerDied

#: So few tasks at a worker that one that is only waiting there is not blamed for its death, and two deaths allowed.
SETTINGS = {"distributed.scheduler.allowed-failures": 1, "distributed.scheduler.worker-saturation": 1.0}
#: A worker that is dead again so long after a death is given up by Dask: not here, where they die every few seconds.
SETTINGS |= {"distributed.deploy.lost-worker-timeout": "1h"}


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    """A scheduler, and two workers with a store of their own."""
    config, distributed = (pytest.importorskip(name) for name in ("dask.config", "distributed"))
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    elsewhere = {"ANNEALED_STORE": str(tmp_path_factory.mktemp("elsewhere")), "PYTHONPATH": paths}
    elsewhere |= {"OMP_NUM_THREADS": "1", "TESTER": str(os.getpid())}
    with config.set(SETTINGS):
        plan = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "env": elsewhere}
        with distributed.LocalCluster(**plan, silence_logs=60) as cluster:
            yield cluster


def pids(cluster):
    """Of the workers that have come to work: one that is killed before is given up by Dask."""
    nannies = [worker for worker in cluster.workers.values() if getattr(worker, "pid", None)]
    return [nanny.pid for nanny in nannies if nanny.worker_address in cluster.scheduler.workers]


def test_the_runs_of_a_cluster_are_those_of_this_machine_and_are_kept_without_a_common_disk(store, dask, monkeypatch):
    runs = sweep(SPECS, executor=dask.scheduler_address)
    assert all((folder_of(spec).path / "result.json").exists() for spec in SPECS)
    monkeypatch.setenv("ANNEALED_STORE", str(store / "here"))
    monkeypatch.setattr("annealed_core.running.sweep.cores", lambda: 1)
    assert_same(runs, sweep(SPECS))


def test_what_a_notebook_defines_travels_to_a_cluster(store, dask, monkeypatch):
    local = type("Local", (Bowl,), {"__module__": "__main__"})
    monkeypatch.setattr("annealed_core.running.sweep.train", lambda *_: pytest.fail("trained here"))
    (run,) = sweep([SMALL.replace(target=local())], executor=dask.scheduler_address)
    assert run.metrics["elbo"] < 2


def test_a_run_that_kills_two_workers_fails_by_name_and_the_others_go_on(store, dask, monkeypatch, caplog):
    monkeypatch.setenv("TESTER", str(os.getpid()))
    deadly = SPECS[1].replace(target=Deadly())
    with pytest.raises(TrainingError, match=r"^density-Deadly-elbo-s1: workers died of it twice or more$"):
        sweep([deadly, SPECS[0], SPECS[2]], executor=dask.scheduler_address)
    assert stored(SPECS[0]) and stored(SPECS[2]) and folder_of(deadly) is None
    said = [record.getMessage() for record in caplog.records if record.name.startswith("annealed_core")]
    assert len(said) == 2 and all("begun again" in line and "\n" not in line for line in said)


@pytest.mark.usefixtures("dask")
def test_a_scheduler_that_goes_away_is_one_line_and_the_same_call_goes_on(store, monkeypatch):
    distributed = pytest.importorskip("distributed")
    specs = [SMALL.replace(objective=ELBO(), target=Bowl(), name=f"n{n}", steps=[30, 10**8][n]) for n in range(2)]
    plan = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 60}
    with distributed.LocalCluster(**plan, processes=False) as cluster, distributed.Client(cluster) as client:
        closed = threading.Thread(target=lambda: (wait_for(specs[0]), client.close()))
        monkeypatch.setattr("annealed_core.running.sweep._train_there", finish_the_first)
        closed.start()
        with pytest.raises(RuntimeError, match=r"^the executor has given up .* the same call goes on from what is"):
            sweep(specs, executor=client)
        closed.join()
    assert stored(specs[0]) and not stored(specs[1])


def test_an_executor_that_is_gone_and_cannot_even_cancel_is_the_same_line(store):
    def gone(*_):
        raise ConnectionError("client is closed")

    def given_up():
        raise CancelledError

    futures = [SimpleNamespace(done=lambda: True, result=given_up, cancel=gone) for _ in range(2)]
    executor = SimpleNamespace(submit=lambda *_: futures.pop(0))
    with pytest.raises(RuntimeError, match=r"^the executor has given up .* the same call goes on from what is stored"):
        sweep([SMALL.replace(seed=seed, steps=30 + seed) for seed in range(2)], executor=executor)


def finish_the_first(message, token):
    import pickle

    from annealed_core.running.experiment import train

    (spec,), *_ = pickle.loads(message)
    if spec.steps > 100:
        time.sleep(5)
        return pickle.dumps(None)
    return pickle.dumps(train([spec]))


def wait_for(spec):
    while not stored(spec):
        time.sleep(0.05)


def test_jobs_of_slurm_give_the_same_and_one_that_kills_twice_fails_by_name(store, monkeypatch, caplog):
    """By submitit's executor of this machine, which speaks as Slurm's does."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TESTER", str(os.getpid()))
    with pytest.raises(TrainingError, match=r"^density-Deadly-elbo-s0: workers died of it twice or more$"):
        sweep([SPECS[0], SMALL.replace(target=Deadly())], executor="local")
    assert stored(SPECS[0]) and any("a worker died; begun again" in record.getMessage() for record in caplog.records)
    wrong = type("Wrong", (Bowl,), {"log_prob": lambda self, z: z.wrong, "__module__": "__main__"})()
    with pytest.raises(ValueError, match=r"log_prob fails .* no attribute 'wrong'$"):
        sweep([SMALL.replace(target=wrong)], executor="local")


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("slrum", ValueError, "unknown cluster 'slrum': choose slurm, or the address of a Dask scheduler, tcp://host"),
        ("tcp://127.0.0.1:9", ConnectionError, "no scheduler of Dask answers at tcp://127.0.0.1:9"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(monkeypatch, name, error, line):
    pytest.importorskip("distributed")
    monkeypatch.setattr("annealed_core.running.cluster.SECONDS_TO_CONNECT", 1)
    with pytest.raises(error, match=f"^{line}"), connected(name):
        pass


def test_errors_of_the_run_itself_are_no_deaths():
    assert [deaths(each) for each in (WorkerDied(), ValueError(), MemoryError())] == [2, 0, 0]


class TwiceDeadly:
    """An executor whose workers die twice of every stack that holds a run of seed 3."""

    def __init__(self):
        self.given = []

    def submit(self, function, message, token):
        import pickle
        from concurrent.futures import Future

        future, (specs, *_) = Future(), pickle.loads(message)
        self.given.append([spec.seed for spec in specs])
        if 3 in self.given[-1]:
            future.set_exception(WorkerDied("its process died twice"))
        else:
            future.set_result(function(message, token))
        return future


class Client:
    """As of Dask: it maps, and gathers what its futures came to, or raises."""

    def __init__(self, broken=False):
        self.broken, self.mapped = broken, []

    def map(self, work, *arguments):
        self.mapped.append(list(zip(*arguments, strict=True)))
        return [SimpleNamespace(status="finished", value=work(*each)) for each in self.mapped[-1]]

    def gather(self, futures):
        if self.broken:
            raise OSError
        return [future.value for future in futures]


def test_dask_is_given_all_calls_at_once_and_asked_at_once_for_what_ended_well():
    client = Client()
    futures = submit_all(client, lambda message, token: message.upper(), ["a", "a", "b"])
    ((first, second, third),) = client.mapped
    assert len({first[1], second[1], third[1]}) == 3  # equal calls are told apart
    futures[1].status = "error"
    assert results_of(client, futures) == {id(futures[0]): "A", id(futures[2]): "B"}
    assert results_of(Client(broken=True), futures) == results_of(object(), futures) == results_of(client, []) == {}


SAID = "the cluster has no worker left: 1 stacks"


def test_a_cluster_without_workers_is_said_and_waited_for(store, dask, monkeypatch, caplog):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("annealed_core.running.sweep.SECONDS_BETWEEN_LOOKS", 0.2)
    said = []
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, silence_logs=60) as empty:

        def add():
            until = time.monotonic() + 20
            while SAID not in caplog.text and time.monotonic() < until:
                time.sleep(0.05)
            said.append(SAID in caplog.text)
            empty.scale(1)

        adding = threading.Thread(target=add)
        adding.start()
        (found,) = sweep([SMALL.replace(steps=20)], executor=empty.scheduler_address)
        adding.join()
    assert said == [True] and found.metrics["elbo"] < 2


def test_of_a_stack_that_kills_the_run_that_does_it_is_found_and_the_others_are_kept(store):
    specs, executor = [SMALL.replace(seed=seed) for seed in range(5)], TwiceDeadly()
    with pytest.raises(TrainingError, match=r"^density-D-elbo-s3: its process died twice$"):
        sweep(specs, executor=executor)
    assert executor.given == [[0, 1, 2, 3, 4], [0], [1], [2], [3], [4]]
    assert [stored(spec) is not None for spec in specs] == [True, True, True, False, True]


def kill_at_random(cluster_pids, number, done):
    """Kill workers at random moments until so many have died or the sweep is done."""
    random.seed(number)
    while number and not done.is_set():
        time.sleep(random.uniform(0.5, 4))
        if alive := cluster_pids():
            os.kill(random.choice(alive), signal.SIGKILL)
            number -= 1


@pytest.mark.parametrize("kills", [1, pytest.param(15, marks=pytest.mark.stress)])
def test_kills_at_random_moments_lose_nothing_over_dask(store, dask, monkeypatch, caplog, kills):
    assert_kills_lose_nothing(store, monkeypatch, lambda: pids(dask), kills, dask.scheduler_address)
    assert any("died: what it was doing" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kills", [1, pytest.param(15, marks=pytest.mark.stress)])
def test_kills_at_random_moments_lose_nothing_among_local_processes(store, monkeypatch, caplog, kills):
    monkeypatch.setattr("annealed_core.running.sweep.cores", lambda: 2)
    assert_kills_lose_nothing(store, monkeypatch, children, kills, None)
    assert any("died with status -9: what it was doing" in record.getMessage() for record in caplog.records)


def children():
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    every = [int(pid) for each in found for pid in each.read_text().split()]
    return [pid for pid in every if b"workers.work" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class DeadlyNever(DeadlyOnce):
    """A target of one's own, so that runs are trained one by one."""

    def log_prob(self, z):
        return Bowl.log_prob(self, z)


def assert_kills_lose_nothing(store, monkeypatch, alive, kills, executor):
    spec = SMALL.replace(target=DeadlyNever(), steps=1000)
    # None beside another in a stack.
    specs = [spec.replace(name=f"n{n}", lr=1e-3 * (1 + n / 1000)) for n in range(2 + 2 * kills)]
    done = threading.Event()
    killer = threading.Thread(target=kill_at_random, args=(alive, kills, done))
    killer.start()
    runs = None
    while runs is None:
        try:
            runs = sweep(specs, executor=executor)
        except TrainingError:  # killed twice in a row by chance: the same call goes on
            assert kills > 1
    done.set()
    killer.join()
    monkeypatch.setenv("ANNEALED_STORE", str(store / "undisturbed"))
    monkeypatch.setattr("annealed_core.running.sweep.cores", lambda: 1)
    assert_same(runs, sweep(specs))
