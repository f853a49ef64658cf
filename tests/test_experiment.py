"""Runs: found again, continued exactly wherever they were killed, shared by processes, and paired over methods."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from annealed_core import data, experiment, mnist
from annealed_core.experiment import Run, TrainingError, find, run
from annealed_core.fields import METHODS
from annealed_core.mnist import Mnist
from annealed_core.spec import Spec
from annealed_core.store import Folder
from annealed_core.toys import Toys
from annealed_core.vae import VAE

TOY = Spec(experiment="toy", method="avo", target="D", n_transitions=2, hidden=8, steps=600, batch=16, samples=500)
SHORT = TOY.replace(steps=20)
MNIST = Spec(
    experiment="mnist", method="avo", train_images=500, epochs=3, width=32, latents=4, n_transitions=2, hidden=8,
    nll_images=100, nll_samples=5,
)  # fmt: skip
TOY_METRICS = {"elbo", "log_z", "log_z_se", "log_z_error_2000", "log_z_100", "ess", "ess_100", "pareto_k"}
TOY_METRICS |= {"total_variation", "mode_masses", "mode_shares"}
GRID_METRICS = {"kl_reverse", "kl_forward", "gaps"}  # in two dimensions
TOY_METRICS |= GRID_METRICS
MNIST_METRICS = {"best_epoch", "valid_elbo", "elbo", "reconstruction", "kl", "nll", "nll_se", "nll_samples"}
MNIST_METRICS |= {"nll_images", "ess", "grey_nll", "pareto_k", "active_units", "valid_nll", "valid_nll_se"}


LOAD_MNIST = data.load_mnist


@cache
def few_images():
    train, valid, test = LOAD_MNIST()
    return tuple(
        data.Images(part.images[:n], part.labels[:n]) for part, n in ((train, 1000), (valid, 500), (test, 500))
    )


@pytest.fixture
def few(monkeypatch):
    """The first images of each part of MNIST, so that judging a run takes no time."""
    monkeypatch.setattr(data, "load_mnist", few_images)
    for cached in (mnist.images, mnist.grey_images):
        cached.cache_clear()
    yield
    for cached in (mnist.images, mnist.grey_images):
        cached.cache_clear()


@pytest.fixture
def checkpoint_at_every_record(monkeypatch):
    monkeypatch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)


@pytest.fixture
def steps_taken(monkeypatch):
    """The steps that are trained, in order."""
    taken = []
    for problem in (Toys, Mnist):
        objective = problem.objective
        monkeypatch.setattr(
            problem, "objective", lambda self, step, objective=objective: taken.append(step) or objective(self, step)
        )
    return taken


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same(a, b):
    assert a.metrics == b.metrics and a.history == b.history and same_weights(a.model, b.model)


# ---- what a run gives


@pytest.mark.parametrize("method", ["elbo", "avo"])
def test_a_toy_run_has_its_metrics_history_and_chain(store, method):
    r = run(TOY.replace(method=method))
    assert isinstance(r, Run) and r.metrics.keys() == TOY_METRICS
    assert [line["step"] for line in r.history] == [250, 500, 600]
    assert all(math.isfinite(line["elbo"]) for line in r.history)
    assert r.metrics["elbo"] <= r.metrics["log_z"] and 0 < r.metrics["ess"] <= 1
    assert 0 <= r.metrics["total_variation"] <= 1
    for shares in ("mode_masses", "mode_shares"):
        assert len(r.metrics[shares]) == 4 and sum(r.metrics[shares]) == pytest.approx(1, abs=1e-4)
    assert r.chain.rsample(1000).z[-1].shape == (1000, 2)
    assert r.seconds > 0 and not any(p.requires_grad for p in r.model.parameters())
    with pytest.raises(AttributeError, match="a run of experiment 'toy' has no auto-encoder"):
        _ = r.vae


def test_training_raises_the_bound(store):
    first, *_, last = run(TOY.replace(method="elbo", steps=500, lr=0.01)).history
    assert last["elbo"] > first["elbo"]


def test_energies_without_modes_have_no_mode_masses(store):
    assert run(SHORT.replace(target="C")).metrics["mode_masses"] is None


@pytest.mark.parametrize("method", METHODS["mnist"])
def test_an_mnist_run_has_finite_metrics_and_a_line_for_each_epoch(store, few, method):
    r = run(MNIST.replace(method=method, epochs=2, train_images=300))
    assert r.metrics.keys() == MNIST_METRICS
    assert r.metrics["pareto_k"] is None  # five weights have no tail
    assert all(math.isfinite(value) for name, value in r.metrics.items() if name != "pareto_k")
    assert r.metrics["nll_samples"] == 5 and r.metrics["nll_images"] == 100
    assert [(line["step"], line["epoch"]) for line in r.history] == [(5, 1), (10, 2)]
    assert [line["beta"] for line in r.history] == pytest.approx([0.2 + 4 * 2e-4, 0.2 + 9 * 2e-4])
    for line in r.history:
        assert line["elbo"] == pytest.approx(line["reconstruction"] - line["kl"])
    assert r.chain is None and isinstance(r.vae, VAE) and r.vae is r.model and not r.model.training
    assert len(r.vae.kernels) == {"vae": 0, "iwae": 0, "householder": 1}.get(method, 2)
    assert r.vae.decode(torch.randn(3, 4)).shape == (3, 784)


def test_a_tiny_mnist_run_learns_on_all_the_real_images(store):
    r = run(MNIST.replace(train_images=5000, epochs=1, width=64))
    assert -260 < r.metrics["elbo"] < -100


def test_evaluation_is_at_beta_one(store, few):
    """With beta 0 in training the KL is free; the bound that is reported charges it all the same."""
    r = run(MNIST.replace(method="vae", schedule="linear", beta0=0.0, gamma=1e-9, epochs=1))
    assert r.metrics["elbo"] == pytest.approx(r.metrics["reconstruction"] - r.metrics["kl"], abs=1e-3)
    assert r.metrics["kl"] > 0.1 and r.metrics["valid_elbo"] == r.history[0]["elbo"]


def test_the_weights_of_the_best_epoch_are_those_returned(store, few, monkeypatch):
    bounds, snapshots = [-200.0, -150.0, -180.0], []
    judge = Mnist._bound

    def scripted(self, images):
        if images is not self.valid:
            return judge(self, images)
        snapshots.append({name: value.clone() for name, value in self.judged.state_dict().items()})
        self.judged.eval()
        return {"elbo": bounds[len(snapshots) - 1], "reconstruction": -1.0, "kl": 1.0}

    monkeypatch.setattr(Mnist, "_bound", scripted)
    r = run(MNIST)
    assert r.metrics["best_epoch"] == 2 and r.metrics["valid_elbo"] == -150
    weights = r.model.state_dict()
    assert all(torch.equal(weights[name], snapshots[1][name]) for name in weights)
    assert any(not torch.equal(weights[name], snapshots[2][name]) for name in weights)


def test_methods_with_the_same_seed_share_initial_weights_and_data(store, few, monkeypatch):
    seen, started = {}, {}
    posterior = VAE.posterior

    def watched(self, x):
        if self.training:
            seen.setdefault(method, []).append(x)
            started.setdefault(method, {name: value.clone() for name, value in self.state_dict().items()})
        return posterior(self, x)

    monkeypatch.setattr(VAE, "posterior", watched)
    for method in ("vae", "hvi", "avo"):
        run(MNIST.replace(method=method, epochs=2))
    shared = [name for name in started["vae"] if name.startswith(("encoder", "decoder"))]
    assert len(shared) > 10
    for method in ("hvi", "avo"):
        assert all(torch.equal(started["vae"][name], started[method][name]) for name in shared)
        assert len(seen[method]) == len(seen["vae"]) == 16
        assert all(torch.equal(a, b) for a, b in zip(seen["vae"], seen[method], strict=True))
    assert same_initial_kernels(started["hvi"], started["avo"])
    assert not torch.equal(seen["vae"][0], seen["vae"][8])


def same_initial_kernels(a, b):
    names = [name for name in a if name.startswith("kernels")]
    return bool(names) and all(torch.equal(a[name], b[name]) for name in names)


def test_another_seed_gives_other_weights_and_other_data(few):
    first, second = (SimpleNamespace(spec=MNIST.replace(seed=seed)) for seed in (0, 1))
    for each in (first, second):
        torch.manual_seed(each.spec.seed)
        each.problem = Mnist([each.spec])
        each.batch = next(data.batches(each.problem.train, 64, each.problem.generator))
    assert not same_weights(first.problem.model, second.problem.model)
    assert not torch.equal(first.batch, second.batch)
    assert torch.equal(first.problem.test, second.problem.test)


# ---- users' own targets


class Ridge:
    """Two bumps along the first axis, in any number of dimensions: only what the README promises, log_prob and dim."""

    def __init__(self, dim):
        self.dim = dim

    def log_prob(self, z):
        bumps = torch.logaddexp(-((z[..., 0] - 1.5) ** 2), -((z[..., 0] + 1.5) ** 2))
        return bumps - z[..., 1:].square().sum(-1)

    def __call__(self, z):
        return self.log_prob(z)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("method", ["elbo", "avo"])
def test_a_users_own_target_is_trained_and_judged(store, dim, method):
    target = Ridge(dim)
    r = run(SHORT.replace(method=method, target=target, steps=250, samples=2000, lr=0.01))
    assert r.metrics.keys() == TOY_METRICS - (set() if dim == 2 else GRID_METRICS)
    assert r.metrics["log_z"] == pytest.approx(math.log(2) + dim / 2 * math.log(math.pi), abs=0.5)
    assert (r.metrics["total_variation"] is not None) == (dim == 2)
    assert r.metrics["mode_masses"] is None
    assert r.chain.rsample(10).z[-1].shape == (10, dim)
    assert find(SHORT.replace(method=method, target=Ridge(dim), steps=250, samples=2000, lr=0.01))


def test_a_users_target_may_know_its_modes_and_base(store):
    target = Ridge(2)
    target.modes = (torch.tensor([[-1.5, 0.0], [1.5, 0.0]]), torch.tensor([0.5, 0.5]))
    target.base_scale, target.box = 3.0, 5.0
    r = run(SHORT.replace(target=target))
    assert sum(r.metrics["mode_masses"]) == pytest.approx(1, abs=1e-4)
    assert r.chain.base.scale.tolist() == [3.0, 3.0]


# ---- found again


@pytest.mark.parametrize("spec", [SHORT, MNIST.replace(epochs=1)], ids=["toy", "mnist"])
def test_a_run_is_found_again_without_training(store, few, monkeypatch, spec):
    assert not find(spec)
    first = run(spec)
    assert find(spec) and not find(spec.replace(seed=1))

    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(experiment, "_train", fail)
    second = run(spec)
    assert_same(first, second)
    assert second.seconds == first.seconds
    with pytest.raises(AssertionError, match="trained again"):
        run(spec.replace(seed=1))


def test_a_run_depends_on_its_seed_and_on_nothing_around_it(store, monkeypatch):
    torch.manual_seed(1)
    first = run(SHORT)
    monkeypatch.setenv("ANNEALED_STORE", str(store / "other"))
    torch.manual_seed(2)
    torch.randn(7)
    assert_same(first, run(SHORT))
    assert run(SHORT.replace(seed=1)).metrics != first.metrics


@pytest.mark.parametrize("failing", [False, True])
def test_the_callers_random_state_and_threads_are_left_alone(store, failing):
    torch.set_num_threads(2)
    try:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        if failing:
            with pytest.raises(TrainingError):
                run(SHORT.replace(lr=1e30))
        else:
            run(SHORT)
            assert torch.equal(torch.get_rng_state(), before)
            run(SHORT)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_run_does_not_depend_on_the_default_dtype(store, tmp_path, monkeypatch):
    first = run(SHORT)
    torch.set_default_dtype(torch.float64)
    try:
        again = run(SHORT)
        monkeypatch.setenv("ANNEALED_STORE", str(tmp_path / "other"))
        fresh = run(SHORT)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(again, first)
    assert_same(fresh, first)


def test_training_that_diverges_says_so_and_leaves_no_result(store):
    spec = SHORT.replace(lr=1e30)
    with pytest.raises(
        TrainingError, match=r"^toy-D-avo-s0: samples became \S+ at step 1: lr 1e\+30 may be too large$"
    ):
        run(spec)
    assert not find(spec)


# ---- killed and continued


class Killed(BaseException):
    """Stands for a signal: nothing in the package may catch it."""


CONTINUED = [
    TOY,
    MNIST,
    MNIST.replace(method="mixture", ema=0.9, lr_schedule="cosine", faults=["grey"]),
    MNIST.replace(method="avo", path="learned", schedule="cyclical"),
]
WHERE = ["after checkpoint 1", "after checkpoint 2", "within checkpoint 2", "before weights", "before result"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The runs that nothing disturbs, in a store of their own, with the checkpoints that a slow machine would write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANNEALED_STORE", str(tmp_path_factory.mktemp("undisturbed")))
        patch.setattr(data, "load_mnist", few_images)
        return {spec: run(spec) for spec in CONTINUED}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("spec", CONTINUED, ids=["toy", "mnist", "with averages", "with a path"])
def test_a_run_that_was_stopped_ends_as_if_nothing_had_happened(
    store, few, checkpoint_at_every_record, undisturbed, steps_taken, monkeypatch, spec, where
):
    save, write_result, writes = Folder.save, Folder.write_result, []

    def stopping_save(self, name, tensors):
        writes.append(name)
        if (where, name) == ("before weights", "weights.pt"):
            raise Killed
        if where == "within checkpoint 2" and len(writes) == 2:
            (self.path / f".{name}-half").write_bytes(b"half a checkpoint")
            raise Killed
        save(self, name, tensors)
        if where == f"after checkpoint {len(writes)}":
            raise Killed

    def stopping_result(self, result):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save", stopping_save)
        if where == "before result":
            patch.setattr(Folder, "write_result", stopping_result)
        with pytest.raises(Killed):
            run(spec)
    assert not find(spec) and Folder.save is save and Folder.write_result is write_result
    assert (Folder.of(spec).path / "checkpoint.pt").exists()

    steps_taken.clear()
    continued = run(spec)
    assert len(steps_taken) < undisturbed[spec].history[-1]["step"], "it began anew"
    assert_same(continued, undisturbed[spec])
    assert not (Folder.of(spec).path / "checkpoint.pt").exists()


SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from annealed_core import data, experiment, store, toys
from annealed_core.spec import Spec
spec, kill, barrier = Spec(**json.loads(sys.argv[1])), sys.argv[2] == "kill", sys.argv[3:]
experiment.SECONDS_BETWEEN_CHECKPOINTS = -1.0
parts = data.load_mnist() if spec.experiment == "mnist" else ()
data.load_mnist = lambda: [data.Images(p.images[:n], p.labels[:n]) for p, n in zip(parts, (1000, 500, 500))]
save, steps = store.Folder.save, []
def kill_after_the_first_checkpoint(self, name, tensors):
    save(self, name, tensors)
    if kill and name == "checkpoint.pt":
        os.kill(os.getpid(), signal.SIGKILL)
store.Folder.save = kill_after_the_first_checkpoint
objective = toys.Toys.objective
toys.Toys.objective = lambda self, step: steps.append(step) or objective(self, step)
if barrier:
    Path(barrier[0]).touch()
    while not Path(barrier[1]).exists():
        time.sleep(0.01)
r = experiment.run(spec)
print(json.dumps({"metrics": r.metrics, "history": r.history, "steps": len(steps)}))
"""


def child(spec, kill, *barrier):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(spec.fields()), "kill" if kill else "live", *map(str, barrier)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )


@pytest.mark.parametrize("spec", CONTINUED, ids=["toy", "mnist", "with averages", "with a path"])
def test_a_process_that_was_killed_is_continued_by_another(store, few, undisturbed, steps_taken, spec):
    killed = child(spec, True)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert (Folder.of(spec).path / "checkpoint.pt").exists() and not find(spec)
    continued = run(spec)
    assert min(steps_taken) > 0, "it began anew"
    assert_same(continued, undisturbed[spec])


def test_two_processes_at_once_train_once_and_agree(store, tmp_path):
    flags = tmp_path / "first", tmp_path / "second"
    children = [child(TOY, False, *flags), child(TOY, False, *flags[::-1])]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in children)
    assert sorted((first["steps"], second["steps"])) == [0, 600]
    assert first["metrics"] == second["metrics"] and first["history"] == second["history"]
    assert run(TOY).metrics == first["metrics"]


# ---- what others left behind


def test_temporary_files_left_by_a_killed_process_do_no_harm(store):
    folder = Folder.of(SHORT)
    folder.path.mkdir(parents=True)
    (folder.path / ".checkpoint.pt-abc").write_bytes(b"half")
    (folder.path / ".result.json-abc").write_bytes(b'{"metr')
    (folder.path / ".lock").touch()
    assert run(SHORT).metrics.keys() == TOY_METRICS


def test_schedules_of_a_spec_are_those_that_train(few):
    assert Mnist([MNIST]).beta(1000) == pytest.approx(0.4)
    assert Mnist([MNIST.replace(schedule="geometric")]).beta(21_500) == pytest.approx(0.989, abs=1e-3)
    assert Mnist([MNIST.replace(schedule="constant")]).beta(0) == 1
    assert experiment.PROBLEMS.keys() == {"toy", "mnist"}


def test_a_damaged_result_is_made_again(store):
    folder = Folder.of(SHORT)
    folder.path.mkdir(parents=True)
    (folder.path / "result.json").write_text('{"metr')
    assert run(SHORT).metrics.keys() == TOY_METRICS


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_not_used(store, content):
    folder = Folder.of(SHORT)
    folder.path.mkdir(parents=True)
    (folder.path / "checkpoint.pt").write_bytes(content)
    assert run(SHORT).metrics.keys() == TOY_METRICS


def test_a_result_without_its_weights_is_made_again(store):
    first = run(SHORT)
    (Folder.of(SHORT).path / "weights.pt").unlink()
    assert_same(run(SHORT), first)


def test_a_chain_without_transitions_is_judged_as_it_is(store):
    r = run(SHORT.replace(method="elbo", n_transitions=0))
    assert r.metrics["elbo"] < r.metrics["log_z"]


def test_an_epoch_that_would_end_with_a_single_image_is_refused():
    with pytest.raises(ValueError, match=r"^impossible batch \d+: the last of \d+ images would be alone"):
        MNIST.replace(train_images=MNIST.batch + 1)


class Learnt(torch.nn.Module):
    """A target that is itself a network, in torch's default float32."""

    dim = 2

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def log_prob(self, z):
        return -z.square().sum(-1) + self.linear(z).squeeze(-1)


def test_a_users_target_may_be_a_network_in_float32(store):
    assert run(SHORT.replace(target=Learnt())).metrics.keys() == TOY_METRICS
