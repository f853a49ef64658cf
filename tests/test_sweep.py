"""Sweeps: the runs of many specs, whatever the number of processes."""

from dataclasses import dataclass

import pytest
import torch

from annealed_core import experiment, schedules
from annealed_core import sweep as sweep_function
from annealed_core.experiment import TrainingError
from annealed_core.spec import Spec
from annealed_core.sweep import _travels, cores, stacks, sweep

SPECS = [
    Spec(
        experiment="toy", method=method, target="D", seed=seed, n_transitions=2, hidden=4, steps=30, batch=8, samples=99
    )
    for seed in (1, 0)
    for method in ("avo", "elbo")
]


class Bowl:
    """A target that other processes can import."""

    dim = 2

    def log_prob(self, z):
        return -z.square().sum(-1)


@pytest.fixture
def trained(monkeypatch):
    """The specs that this process trains."""
    found, train = [], experiment._train
    monkeypatch.setattr(
        experiment, "_train", lambda problem, *rest: found.extend(problem.specs) or train(problem, *rest)
    )
    return found


def test_runs_come_in_the_order_of_their_specs(store, trained):
    runs = sweep(SPECS, processes=1)
    assert [r.spec for r in runs] == SPECS
    assert sorted(map(str, trained)) == sorted(map(str, SPECS))
    assert len({r.metrics["elbo"] for r in runs}) == len(SPECS)


def test_a_spec_that_occurs_twice_is_run_once(store, trained):
    runs = sweep([SPECS[0], SPECS[1], SPECS[0]], processes=1)
    assert [r.spec for r in runs] == [SPECS[0], SPECS[1], SPECS[0]]
    assert trained == SPECS[:2] and runs[0].metrics == runs[2].metrics


def test_what_the_store_has_is_not_run_again(store, trained):
    sweep(SPECS[:2], processes=1)
    trained.clear()
    sweep(SPECS, processes=1)
    assert trained == SPECS[2:]


def test_two_processes_give_the_metrics_of_one_and_the_error_of_one_is_raised_once_the_others_are_done(
    store, trained, monkeypatch
):
    specs = [SPECS[0], SPECS[1].replace(target=Bowl())]
    alone = sweep(specs, processes=1)
    trained.clear()
    monkeypatch.setenv("ANNEALED_STORE", str(store / "other"))
    with pytest.raises(TrainingError, match="may be too large"):
        sweep([specs[0], SPECS[0].replace(lr=1e30), specs[1]], processes=2)
    together = sweep(specs, processes=2)
    assert not trained, "nothing is left for this process"
    for a, b in zip(alone, together, strict=True):
        assert a.metrics == b.metrics and a.history == b.history
        assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_a_target_that_cannot_travel_is_run_in_this_process(store, trained):
    class Local(Bowl):
        pass

    specs = [SPECS[0].replace(target=Local(), seed=seed) for seed in (0, 1)]
    assert [r.spec for r in sweep(specs, processes=2)] == specs and trained == specs


def test_a_schedule_travels_where_other_processes_can_find_it():
    few = {"experiment": "mnist", "method": "vae", "train_images": 640, "epochs": 1}
    assert all(_travels(Spec(**few, schedule=given)) for given in ("constant", schedules.linear(0.5, 0.1)))
    assert not _travels(Spec(**few, schedule=lambda step: 1.0))


@dataclass
class Plain:
    """A target as a plain dataclass, which has no hash."""

    dim: int = 2

    def log_prob(self, z):
        return -z.square().sum(-1)


@dataclass
class Ramp:
    """A schedule as a plain dataclass, which has no hash."""

    steps: int = 1

    def __call__(self, step):
        return min(1.0, step / self.steps)


def test_a_schedule_without_a_hash_can_be_swept():
    few = {"experiment": "mnist", "method": "vae", "train_images": 640, "epochs": 1}
    assert len(stacks([Spec(**few, schedule=Ramp(), seed=seed) for seed in (0, 1)], 2)) == 2


def test_a_target_without_a_hash_can_be_swept(store):
    assert len(sweep([SPECS[0].replace(target=Plain())], processes=1)) == 1


def test_an_error_of_one_run_is_raised(store):
    bad = SPECS[0].replace(lr=1e30)
    with pytest.raises(TrainingError, match="may be too large"):
        sweep([bad, SPECS[1]], processes=1)


def test_no_specs_are_no_runs(store):
    assert sweep([]) == []


def test_there_is_a_core():
    assert cores() >= 1 and sweep_function is sweep
