"""Runs: found again, continued exactly wherever they were killed, shared by processes and threads; one's own parts."""

import json
import logging
import math
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_system import CALLERS, STATES

from annealed_core.decoders import Autoregressive
from annealed_core.description import Size, to_json
from annealed_core.flows import IAF, Householder, Planar
from annealed_core.kernels import Gated, Residual
from annealed_core.objectives import AVO, ELBO, IWAE, AlphaELBO, LocalAVO, Objective
from annealed_core.running import data, experiment
from annealed_core.running.density import Density, DensityProblem
from annealed_core.running.experiment import Run, TrainingError, folder_of, keep, run, stored, train
from annealed_core.running.former import Spec
from annealed_core.running.mnist import Mnist, MnistProblem
from annealed_core.running.store import Folder
from annealed_core.running.sweep import sweep
from annealed_core.schedules import Cyclical, Linear, Mixed, Then
from annealed_core.targets import GeometricAlphas, LearnedAlphas
from conftest import few_images

DENSITY = Density(kernel=Gated(hidden=8), n_transitions=2, objective=AVO(), steps=510, batch=16, samples=500)
SHORT = DENSITY.replace(steps=20)
FEW = {"train_images": 500, "epochs": 3, "width": 32, "latents": 4, "nll_images": 100, "nll_samples": 5}
BETA = Linear(0.2, 0.05)
MNIST = Mnist(kernel=Gated(hidden=8), n_transitions=2, objective=AVO(weight=0.2, beta=BETA), **FEW)
METRICS = {"elbo", "log_z", "log_z_se", "log_z_error_2000", "log_z_100", "ess", "ess_100", "pareto_k"}
METRICS |= {"total_variation", "mode_masses", "mode_shares", "kernels_earn", "kernels_earn_se", "kernels_move"}
GRID = {"kl_reverse", "kl_forward", "gaps"}  # in two dimensions


@pytest.fixture
def steps_taken(monkeypatch):
    """The steps that are trained, in order."""
    taken = []
    for problem in (DensityProblem, MnistProblem):
        values = problem.values
        monkeypatch.setattr(problem, "values", lambda self, step, v=values: taken.append(step) or v(self, step))
    return taken


@pytest.fixture
def times_trained(monkeypatch):
    """How often this process trained."""
    found, maximise = Counter(), experiment._maximise
    monkeypatch.setattr(experiment, "_maximise", lambda *args: found.update(["trained"]) or maximise(*args))
    return lambda: found["trained"]


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same(a, b):
    assert a.metrics == b.metrics and a.history == b.history and same_weights(a.model, b.model)


# ---- what a run gives


@pytest.mark.parametrize("objective", [ELBO(), AVO()], ids=repr)
def test_a_run_has_metrics_history_and_chain(store, objective):
    r = run(DENSITY.replace(objective=objective))
    assert isinstance(r, Run) and r.metrics.keys() == METRICS | GRID
    assert [line["step"] for line in r.history] == [250, 500, 510]
    assert all(math.isfinite(line["elbo"]) for line in r.history)
    assert r.metrics["elbo"] <= r.metrics["log_z"] and 0 < r.metrics["ess"] <= 1
    assert 0 <= r.metrics["total_variation"] <= 1
    for shares in ("mode_masses", "mode_shares"):
        assert len(r.metrics[shares]) == 4 and sum(r.metrics[shares]) == pytest.approx(1, abs=1e-4)
    assert r.chain.rsample(1000).z[-1].shape == (1000, 2) and r.seconds > 0
    with pytest.raises(AttributeError, match="a run of Density has no auto-encoder"):
        _ = r.vae


@pytest.mark.parametrize("wrong", ["D", None, AVO(), Density], ids=repr)
def test_what_is_no_experiment_is_refused_with_one_line(wrong):
    for call in (run, lambda spec: sweep([spec])):
        with pytest.raises(
            TypeError, match=r"^(run|sweep) takes .*such as Density\(target='D'\) or Mnist\(\), got .*$"
        ):
            call(wrong)


# ---- found again


@pytest.mark.parametrize("spec", [SHORT, MNIST.replace(epochs=1)], ids=["density", "mnist"])
def test_a_run_is_found_again_without_training(store, few, times_trained, spec):
    assert stored(spec) is None
    first = run(spec)
    assert stored(spec) and stored(spec.replace(seed=1)) is None
    assert (stored(spec, compile=True) is None) == spec.compiles() == isinstance(spec, Density)
    second = run(spec)
    assert_same(first, second)
    assert second.seconds == first.seconds and times_trained() == 1
    run(spec.replace(seed=1))
    assert times_trained() == 2


def test_the_key_is_of_the_fields_whatever_their_order_and_changes_with_each(store):
    written = to_json(SHORT)
    ((name, fields),) = written.items()
    again = Density(**dict(reversed(SHORT.fields().items())))
    assert folder_of(again) == folder_of(SHORT) and list(fields) != sorted(fields) and name == "Density"
    changed = {"target": "A", "kernel": Residual(hidden=8), "n_transitions": 3, "objective": ELBO(), "steps": 21}
    changed |= {"batch": 17, "samples": 501, "seed": 1, "lr": 0.01, "lr_schedule": "cosine", "beta1": 0.5, "clip": 1.0}
    changed |= {"base_scale": 2.0}
    assert changed.keys() | {"name"} == fields.keys()
    others = [SHORT.replace(**{field: value}) for field, value in changed.items()]
    others += [SHORT.replace(kernel=Gated(hidden=9)), SHORT.replace(objective=AVO(alphas=GeometricAlphas()))]
    assert len({folder_of(spec).path for spec in [SHORT, *others]}) == len(others) + 1
    assert folder_of(SHORT, device="cuda:1") == folder_of(SHORT, device="cuda") != folder_of(SHORT)


def test_a_damaged_result_is_made_again(store, times_trained):
    first = run(SHORT)
    path = folder_of(SHORT).path
    damages = (lambda: (path / "result.json").write_text('{"metr'), lambda: (path / "weights.pt").unlink())
    for number, damage in enumerate(damages):
        damage()
        assert_same(run(SHORT), first)
        assert times_trained() == number + 2


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_not_used_and_what_a_killed_process_left_does_no_harm(store, content):
    folder = folder_of(SHORT).path
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(content)
    (folder / ".result.json-abcdefgh").write_bytes(b'{"metr')
    (folder / ".lock").touch()
    assert run(SHORT).metrics.keys() == METRICS | GRID
    assert sorted(file.name for file in folder.iterdir() if file.name != ".lock") == ["result.json", "weights.pt"]


def test_a_name_that_is_no_name_of_a_file_is_one_in_the_store(store):
    named = type("Far", (Bump,), {"name": "../a b/\n" + "x" * 300})()
    run(SHORT.replace(target=named, name="far"))
    (folder,) = store.iterdir()
    assert folder.name.startswith("density-.._a_b__xxx") and len(folder.name) < 120


# ---- nothing around a run changes it, and it changes nothing around


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANNEALED_STORE", str(tmp_path_factory.mktemp("plain")))
        return run(SHORT)


@pytest.mark.parametrize("setting", CALLERS.values(), ids=CALLERS)
def test_a_run_does_not_depend_on_the_callers_settings_and_leaves_them_alone(store, plain, setting):
    torch.manual_seed(99)
    with setting():
        before = [get() for get in STATES]
        fresh = run(SHORT)
        found = run(SHORT)
        with pytest.raises(TrainingError):
            run(SHORT.replace(lr=1e30))
        assert [get() for get in STATES] == before
    assert_same(fresh, plain)
    assert_same(found, plain)


def test_runs_in_threads_are_those_of_the_same_runs_alone(store, monkeypatch):
    kernels = (Gated(hidden=8), Residual(hidden=8), Planar(), Householder())
    objectives = (ELBO(), AVO(), IWAE(samples=2), AVO(alphas=LearnedAlphas()), Then(AVO(), ELBO(), switch=10))
    specs = [SHORT.replace(kernel=kernel, objective=each, samples=50) for kernel in kernels for each in objectives]
    specs += [SHORT.replace(objective=own_objective, seed=seed, samples=50) for seed in range(4)]
    assert len(specs) == 24
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(run, specs))
    monkeypatch.setenv("ANNEALED_STORE", str(store / "alone"))
    for spec, found in zip(specs, together, strict=True):
        assert_same(run(spec), found)


# ---- one's own target, kernel, objective and schedule: each in a few lines, through run and sweep


class Bump:
    """Two bumps along the first axis, in any number of dimensions."""

    def __init__(self, dim=2):
        self.dim = dim

    def log_prob(self, z):
        bumps = torch.logaddexp(-((z[..., 0] - 1.5) ** 2), -((z[..., 0] + 1.5) ** 2))
        return bumps - z[..., 1:].square().sum(-1)


class Shift(torch.nn.Module):
    """A kernel: z' = z + shift."""

    def __init__(self, dim):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(dim))

    def forward(self, z, context=None, noise=None):
        return z + self.shift, z.new_zeros(z.shape[:-1])


class Shifts:
    """What makes them."""

    def build(self, dim, n, context_dim=0):
        return [Shift(dim) for _ in range(n)]


def own_objective(chain, target, sample_shape=(), noise=None):
    trajectory = chain.rsample(sample_shape, noise)
    return 2 * chain.log_weight(target, trajectory)


class OwnObjective(Objective):
    """One that is a description, with a field."""

    factor: Size = 2

    def values(self, chain, target, noise):
        return self.factor * ELBO().values(chain, target, noise)


def own_schedule(step):
    return min(1.0, 0.5 + step / 20)


OWN = {
    "target": {"target": Bump()},
    "kernel": {"kernel": Shifts()},
    "objective": {"objective": own_objective},
    "objective as a description": {"objective": OwnObjective()},
    "schedule": {"objective": AlphaELBO(alpha=own_schedule)},
}


@pytest.mark.parametrize("fields", OWN.values(), ids=OWN)
def test_what_has_a_part_of_ones_own_is_trained_each_time_without_a_name_and_kept_with_one(
    store, times_trained, fields
):
    spec = SHORT.replace(target="A", objective=ELBO(), lr=0.05).replace(**fields)
    first = run(spec)
    assert any(value.abs().max() > 0 for value in first.model.state_dict().values())
    assert_same(sweep([spec])[0], first)
    assert times_trained() == 2 and not store.exists()
    named = spec.replace(name="mine")
    assert_same(run(named), first)
    assert_same(run(named), first)
    assert_same(sweep([named])[0], first)
    assert times_trained() == 3 and stored(named) and stored(named.replace(name="other")) is None


def test_the_fields_of_ones_own_description_are_part_of_what_is_kept(store):
    two, three = (SHORT.replace(objective=OwnObjective(factor=n), name="mine") for n in (2, 3))
    assert folder_of(two) != folder_of(three) and folder_of(two) == folder_of(two.replace(objective=OwnObjective()))


def test_an_own_objective_is_the_one_that_is_maximised(store):
    plain = run(SHORT.replace(objective=ELBO())).history[0]["elbo"]
    for objective, rounding in ((own_objective, 0.2), (OwnObjective(), 1e-3)):  # the former draws its noise itself
        ours = run(SHORT.replace(objective=objective)).history[0]["elbo"]
        assert ours == pytest.approx(2 * plain, rel=rounding)
    with pytest.raises(ValueError, match=r"^objective <lambda> must give values of shape \(\*sample, 1\), got \(\)$"):
        run(SHORT.replace(objective=lambda *given: own_objective(*given).mean()))


def test_a_kernel_that_is_built_once_for_all_is_not_changed_by_a_run(store):
    kernels = [Shift(2), Shift(2)]
    once = type("Once", (), {"build": lambda self, dim, n, context_dim=0: kernels})()
    spec = SHORT.replace(kernel=once, objective=ELBO(), target="B", lr=0.05)
    first, second = run(spec), run(spec)
    assert_same(first, second)
    assert not any(kernel.shift.any() for kernel in kernels) and first.chain.kernels[0].shift.any()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_ones_own_target_is_trained_and_judged_in_any_number_of_dimensions(store, dim):
    r = run(DENSITY.replace(target=Bump(dim), steps=250, samples=2000, lr=0.01))
    assert r.metrics.keys() == (METRICS | GRID if dim == 2 else METRICS)
    assert r.metrics["log_z"] == pytest.approx(math.log(2) + dim / 2 * math.log(math.pi), abs=0.5)
    assert (r.metrics["total_variation"] is not None) == (dim == 2) and r.metrics["mode_masses"] is None
    assert r.chain.rsample(10).z[-1].shape == (10, dim)


def test_a_mended_target_does_not_get_the_old_error(store):
    broken = type("Mine", (Bump,), {"log_prob": lambda self, z: z.sum(-1) / (z[..., 0] < 1.2)})()
    with pytest.raises(TrainingError, match=r"^density-Mine-avo-s0: target Mine: log_prob is "):
        run(SHORT.replace(target=broken, name="mine"))
    mended = type("Mine", (Bump,), {})()
    assert math.isfinite(run(SHORT.replace(target=mended, name="mine")).metrics["log_z"])


class Learnt(torch.nn.Module):
    """A target that is itself a network, in torch's default float32."""

    dim = 2

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def log_prob(self, z):
        return -z.square().sum(-1) + self.linear(z).squeeze(-1)


def test_no_gradient_and_no_change_is_left_in_a_network_within_the_target(store):
    network = Learnt()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert run(SHORT.replace(target=network)).metrics.keys() == METRICS | GRID
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()) and network.training


def test_a_device_may_be_an_object_of_torch(store, plain):
    assert_same(run(SHORT, device=torch.device("cpu")), plain)


# ---- killed and continued


class Killed(BaseException):
    """Stands for a signal: nothing in the package may catch it."""


CONTINUED = {
    "density": DENSITY.replace(lr_schedule="cosine"),
    "density of two objectives": DENSITY.replace(objective=Then(AVO(alphas=LearnedAlphas()), IWAE(2), switch=410)),
    "mnist": MNIST,
    "mnist mixed": MNIST.replace(objective=Mixed(LocalAVO(BETA), ELBO(BETA), 0.4), lr_schedule="cosine", grey=True),
    "mnist path": MNIST.replace(objective=AVO(weight=0.2, beta=Cyclical(steps=24), alphas=LearnedAlphas())),
    "mnist autoregressive": MNIST.replace(decoder=Autoregressive(), kernel=IAF(hidden=8), objective=IWAE(2), epochs=2),
}
WHERE = ["after checkpoint 1", "after checkpoint 2", "within checkpoint 2", "before weights", "before result"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The runs that nothing disturbs, in a store of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANNEALED_STORE", str(tmp_path_factory.mktemp("undisturbed")))
        few = few_images()
        patch.setattr(data, "load_mnist", lambda: few)
        return {spec: run(spec) for spec in CONTINUED.values()}


STOPPED = [(name, where) for name in ("density", "mnist") for where in WHERE]
STOPPED += [(name, WHERE[0]) for name in CONTINUED if name not in ("density", "mnist")]


@pytest.mark.parametrize(("name", "where"), STOPPED)
def test_a_run_that_was_stopped_ends_as_if_nothing_had_happened(
    store, few, checkpoint_at_every_record, undisturbed, steps_taken, monkeypatch, name, where
):
    spec, save, writes = CONTINUED[name], Folder.save, []

    def stopping_save(self, name, tensors, at_once=True):
        writes.append(name)
        if (where, name) == ("before weights", "weights.pt"):
            raise Killed
        if where == "within checkpoint 2" and len(writes) == 2:
            (self.path / f".{name}-halfhalf").write_bytes(b"half a checkpoint")
            raise Killed
        save(self, name, tensors)
        if where == f"after checkpoint {len(writes)}":
            raise Killed

    def stopping_result(self, result, at_once=True):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save", stopping_save)
        if where == "before result":
            patch.setattr(Folder, "write_result", stopping_result)
        with pytest.raises(Killed):
            run(spec)
    assert stored(spec) is None and (folder_of(spec).path / "checkpoint.pt").exists()
    steps_taken.clear()
    continued = run(spec)
    assert len(steps_taken) < undisturbed[spec].history[-1]["step"], "it began anew"
    assert_same(continued, undisturbed[spec])
    assert {file.name for file in folder_of(spec).path.iterdir()} == {".lock", "result.json", "weights.pt"}


SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from annealed_core.description import from_json
from annealed_core.running import data, density, experiment, store
spec, kill, barrier = from_json(json.loads(sys.argv[1])), sys.argv[2] == "kill", sys.argv[3:]
experiment.SECONDS_BETWEEN_CHECKPOINTS = -1.0
if type(spec).__name__ == "Mnist":
    parts = [data.Images(p.images[:n], p.labels[:n]) for p, n in zip(data.load_mnist(), (1000, 300, 300))]
    data.load_mnist = lambda: parts
save, steps = store.Folder.save, []
def kill_after_the_first_checkpoint(self, name, tensors, at_once=True):
    save(self, name, tensors)
    if kill and name == "checkpoint.pt":
        os.kill(os.getpid(), signal.SIGKILL)
store.Folder.save = kill_after_the_first_checkpoint
values = density.DensityProblem.values
density.DensityProblem.values = lambda self, step: steps.append(step) or values(self, step)
if barrier:
    Path(barrier[0]).touch()
    while not Path(barrier[1]).exists():
        time.sleep(0.01)
r = experiment.run(spec)
print(json.dumps({"metrics": r.metrics, "history": r.history, "steps": len(steps)}))
"""


def child(spec, kill, *barrier):
    arguments = json.dumps(to_json(spec)), "kill" if kill else "live", *map(str, barrier)
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", ["density", "mnist"])
def test_a_process_that_was_killed_is_continued_by_another(store, few, undisturbed, steps_taken, name):
    spec = CONTINUED[name]
    killed = child(spec, True)
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL and stored(spec) is None
    continued = run(spec)
    assert min(steps_taken) > 0, "it began anew"
    assert_same(continued, undisturbed[spec])


def test_two_processes_at_once_train_once_and_agree(store, tmp_path):
    flags = tmp_path / "first", tmp_path / "second"
    children = [child(DENSITY, False, *flags), child(DENSITY, False, *flags[::-1])]
    first, second = (json.loads(process.communicate(timeout=300)[0]) for process in children)
    assert sorted((first["steps"], second["steps"])) == [0, 510]
    assert first["metrics"] == second["metrics"] and first["history"] == second["history"]
    assert run(DENSITY).metrics == first["metrics"]


PARTS = ["first checkpoint", "first weights", "first result", "second result"]


@pytest.mark.parametrize(
    ("kernel", "where"), [*((Gated(hidden=8), where) for where in PARTS), (IAF(hidden=8), PARTS[0])], ids=repr
)
def test_a_stack_that_was_stopped_ends_as_if_nothing_had_happened(store, monkeypatch, steps_taken, kernel, where):
    spec = DENSITY.replace(kernel=kernel, objective=AVO(alphas=LearnedAlphas()), steps=260, samples=50)
    specs = [spec.replace(seed=seed) for seed in (0, 1, 2)]
    train(specs)
    undisturbed = [run(spec) for spec in specs]
    monkeypatch.setenv("ANNEALED_STORE", str(store / "stopped"))
    number = 2 if "second" in where else 1
    taken, save, write_result = [], Folder.save, Folder.write_result

    def stop(kind, write):
        def stopping(*arguments):
            write(*arguments)
            taken.append(kind if kind == "result" else arguments[1].removesuffix(".pt"))
            if taken.count(where.split()[1]) == number:
                raise KeyboardInterrupt

        return stopping

    with monkeypatch.context() as patch:
        if "checkpoint" in where:
            patch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
        patch.setattr(Folder, "save", stop("save", save))
        patch.setattr(Folder, "write_result", stop("result", write_result))
        with pytest.raises(KeyboardInterrupt):
            train(specs)
    done = {"first result": 1, "second result": 2}.get(where, 0)
    assert [stored(spec) is not None for spec in specs] == [True] * done + [False] * (3 - done)
    kept = [(folder_of(spec).path / "result.json").stat().st_mtime_ns for spec in specs[:done]]
    steps_taken.clear()
    train(specs)
    assert steps_taken == (list(range(250, 260)) if "checkpoint" in where else [])
    assert not list((store / "stopped").glob("stack-*"))
    for spec, before in zip(specs, undisturbed, strict=True):
        assert_same(run(spec), before)
    assert kept == [(folder_of(spec).path / "result.json").stat().st_mtime_ns for spec in specs[:done]]


def test_one_name_with_another_number_of_dimensions_is_another_run(store):
    first, second = (run(SHORT.replace(target=Bump(dim), name="same")) for dim in (2, 3))
    assert len(list(store.iterdir())) == 2 and second.chain.rsample(5).z.shape == (3, 5, 3)
    assert run(SHORT.replace(target=Bump(2), name="same")).metrics == first.metrics


def test_what_another_machine_has_trained_is_kept_here(store, times_trained):
    (trained,) = train([SHORT.replace(target=Bump())])  # nameless, and so not written
    named = SHORT.replace(target=Bump(), name="bump")
    keep(named, trained)
    assert run(named).metrics == trained.metrics and times_trained() == 1
    keep(SHORT.replace(target=Bump()), trained)
    assert len(list(store.iterdir())) == 1


# ---- the call of earlier versions


FORMER = [
    *[{"experiment": "toy", "method": m} for m in ("elbo", "alpha", "iwae", "avo", "calibrated", "mixture")],
    *[{"experiment": "toy", "method": "avo", "kernel": k} for k in ("residual", "planar", "iaf", "spline")],
    {"experiment": "toy", "method": "elbo", "target": "ring8", "seed": 3, "n_transitions": 5},
    *[{"experiment": "mnist", "method": m} for m in ("vae", "hvi", "avo", "mixture", "planar", "iaf", "iwae")],
    {"experiment": "mnist", "method": "householder", "seed": 2, "n_transitions": 8},
]


@pytest.mark.parametrize("fields", FORMER, ids=lambda fields: " ".join(map(str, fields.values())))
@pytest.mark.filterwarnings("ignore:schedule")
def test_the_former_call_names_the_one_that_takes_its_place(fields):
    import annealed_core.flows as flows
    import annealed_core.kernels as kernels
    import annealed_core.objectives as objectives

    with pytest.raises(TypeError, match=r"^Spec is no more: write .*; the README has a table") as refusal:
        Spec(**fields)
    call = str(refusal.value).removeprefix("Spec is no more: write ").partition(";")[0]
    names = {**vars(kernels), **vars(flows), **vars(objectives), "Linear": Linear, "Mixed": Mixed}
    spec = eval(call, {**names, "Density": Density, "Mnist": Mnist})
    assert spec.seed == fields.get("seed", 0) and type(spec).__name__ == {"toy": "Density"}.get(
        fields["experiment"], "Mnist"
    )
    assert spec.n_transitions == fields.get("n_transitions", spec.n_transitions)
    assert fields.get("kernel", "").lower() in type(spec.kernel).__name__.lower()


HEIGHT = 0.0


def helper(z):
    return HEIGHT - 0.5 * ((z - 1) / 0.5).square().sum(-1)


class Spike:
    """A density that reads a helper and a constant from around it."""

    dim = 2

    def log_prob(self, z):
        return torch.logaddexp(-0.5 * z.square().sum(-1), helper(z))


class Odd(Bump):
    """A target that changes when it is called, with a logger and 8 MB of data."""

    def __init__(self):
        super().__init__()
        self.calls, self.logger, self.data = 0, logging.getLogger("odd"), torch.randn(2_000_000)

    def log_prob(self, z):
        self.calls += 1
        return super().log_prob(z) + self.data[0]


def test_a_target_that_reads_what_was_changed_gets_figures_of_its_own(store, monkeypatch):
    spec = SHORT.replace(target=Spike(), samples=5000, objective=ELBO(), n_transitions=0)
    first = run(spec).metrics["log_z"]
    monkeypatch.setitem(globals(), "HEIGHT", 3.0)
    second = run(spec).metrics["log_z"]
    monkeypatch.setitem(globals(), "helper", lambda z: torch.full(z.shape[:-1], -torch.inf))
    third = run(spec).metrics["log_z"]
    assert first == pytest.approx(math.log(2 * math.pi * 1.25), abs=0.1)
    assert second == pytest.approx(math.log(2 * math.pi * (1 + math.exp(3) / 4)), abs=0.1)
    assert third == pytest.approx(math.log(2 * math.pi), abs=0.1)


def test_a_target_that_changes_when_it_is_called_with_a_logger_and_much_data_is_trained_and_kept(store, times_trained):
    target = Odd()
    spec = SHORT.replace(target=target, name="odd")
    assert_same(run(spec), run(spec))
    assert target.calls > 20 and times_trained() == 1
    assert len(sweep([spec.replace(seed=seed) for seed in range(4)])) == 4
