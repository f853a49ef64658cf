"""The store: what a run's key depends on, files that are whole or absent, and weights that execute nothing."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from annealed_core import store as store_module
from annealed_core.spec import Spec
from annealed_core.store import CODE, PACKAGE, Folder, code_version, describe, key, root
from annealed_core.system import replace_file

TOY = Spec(experiment="toy", method="avo", target="D")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package, whose code version is computed afresh at every call."""
    copy = tmp_path / "annealed_core"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(store_module, "PACKAGE", copy)
    code_version.cache_clear()
    yield copy
    code_version.cache_clear()


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    code_version.cache_clear()


def versions():
    code_version.cache_clear()
    return {experiment: code_version(experiment) for experiment in CODE}


def test_code_version_is_the_same_for_a_copy(package, monkeypatch):
    copied = versions()
    monkeypatch.setattr(store_module, "PACKAGE", PACKAGE)
    assert versions() == copied


def test_code_version_ignores_comments_blank_lines_and_docstrings(package):
    before = versions()
    for module in {module for modules in CODE.values() for module in modules}:
        path = package / f"{module}.py"
        path.write_text("# a new comment\n\n" + path.read_text() + "\n\n# and another\n")
    edit(package / "objectives.py", "Objectives: a chain", "Goals: a chain")
    edit(package / "objectives.py", "The (hierarchical) evidence lower bound", "The bound")
    edit(package / "kernels.py", "A trained stochastic transition", "A transition")
    assert versions() == before


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("objectives", "(1 - alpha) * beta", "(2 - alpha) * beta"),
        ("kernels", "= -4.0", "= -3.0"),
        ("energies", "_energy_a, modes=_two_ends(), box=4.0", "_energy_a, modes=_two_ends(), box=5.0"),
        ("toys", "min(self.steps, 250)", "min(self.steps, 251)"),
        ("experiment", "0.999", "0.99"),
        ("spec", '"steps": 3000', '"steps": 3001'),
    ],
)
def test_code_version_sees_a_changed_constant(package, module, old, new):
    before = key(TOY)
    edit(package / f"{module}.py", old, new)
    assert key(TOY) != before


@pytest.mark.parametrize(("experiment", "module"), [(e, module) for e, modules in CODE.items() for module in modules])
def test_code_version_sees_every_module_that_results_depend_on(package, experiment, module):
    before = versions()
    path = package / f"{module}.py"
    path.write_text(path.read_text() + "\n_NEW = 1\n")
    assert versions()[experiment] != before[experiment]


def test_code_version_covers_every_module_that_training_imports():
    """Whatever the modules of a run import from the package is itself covered, or shows results only."""
    for experiment, modules in CODE.items():
        imported = set()
        for module in modules:
            for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("annealed_core"):
                    imported |= {node.module.removeprefix("annealed_core").strip(".")} - {""}
                    imported |= {a.name for a in node.names if node.module == "annealed_core"}
        others = {"toy": {"mnist", "earlier", "schedules", "data", "vae"}, "mnist": {"toys", "compiled"}}
        unseen = imported - set(modules) - {"store", "system", "problems"} - others.get(experiment, set())
        assert not unseen


@pytest.mark.parametrize("module", ["plotting", "figures", "comparison"])
def test_code_that_only_shows_results_does_not_count(package, module):
    before = versions()
    path = package / f"{module}.py"
    path.write_text(path.read_text() + "\n_NEW = 1\n")
    assert versions() == before


def test_every_field_changes_the_key():
    mnist = Spec(experiment="mnist", method="avo")
    changes = {
        TOY: {"seed": 1, "method": "elbo", "target": "A", "n_transitions": 5, "hidden": 33, "steps": 9, "batch": 9}
        | {"lr": 0.1, "beta1": 0.5, "initialisation": "identity", "samples": 9},
        mnist: {"epochs": 1, "latents": 2, "width": 3, "schedule": "geometric", "beta0": 0.1, "gamma": 0.1}
        | {"avo_weight": 0.1, "train_images": 100, "nll_samples": 9, "nll_images": 9, "method": "hvi"},
    }
    for spec, fields in changes.items():
        keys = [key(spec), *(key(spec.replace(**{name: value})) for name, value in fields.items())]
        assert len(set(keys)) == len(keys)
    assert key(TOY) == key(Spec(experiment="toy", method="avo", target="D", steps=3000))


def test_the_kind_of_device_and_torchs_version_change_the_key(monkeypatch):
    before = key(TOY)
    assert key(TOY, "cuda") != before and key(TOY, "cuda:0") == key(TOY, "cuda:1")
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    assert key(TOY) != before


class Holder:
    """A target that holds what the points at which it is compared do not show."""

    dim = 2

    def __init__(self, **held):
        vars(self).update(held)

    def log_prob(self, z):
        return -z.square().sum(-1)


CENTRES = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"modes": (CENTRES, torch.tensor([0.5, 0.5]))}, {"modes": (CENTRES, torch.tensor([0.4, 0.6]))}),
        ({"centres": [30, 30]}, {"centres": [45, 30]}),
        ({"table": {"a": 1}}, {"table": {"a": 2}}),
        ({"known": None}, {"known": 0.0}),
        ({"f": lambda z: 2 * z}, {"f": lambda z: 3 * z}),
    ],
)
def test_targets_that_hold_other_things_have_other_keys(one, other):
    keys = [key(TOY.replace(target=Holder(**held))) for held in (one, other, one)]
    assert keys[0] == keys[2] != keys[1]


def test_a_target_that_leads_back_to_itself_has_a_key():
    target = Holder()
    target.owner = {"target": target}
    assert key(TOY.replace(target=target)) == key(TOY.replace(target=target))


class Bowl:
    def __init__(self, scale=1.0, dim=2):
        self.scale, self.dim = scale, dim

    def log_prob(self, z):
        return -z.square().sum(-1) / self.scale


class Cone(Bowl):
    def log_prob(self, z):
        return -z.norm(dim=-1) / self.scale


class Tensors:
    dim = 2

    def __init__(self, centre):
        self.centre = torch.as_tensor(centre)

    def log_prob(self, z):
        return -(z - self.centre.to(z)).square().sum(-1)


class Lists(Tensors):
    def __init__(self, centre):
        self.centre = centre

    def log_prob(self, z):
        return -(z - torch.tensor(self.centre, dtype=z.dtype)).square().sum(-1)


class Network(torch.nn.Module):
    dim = 2

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(2, 1)

    def log_prob(self, z):
        return -z.square().sum(-1) + self.linear(z).squeeze(-1)


def lambdas(scale):
    return SimpleNamespace(dim=2, log_prob=lambda z: -z.square().sum(-1) / scale)


def key_of(target):
    return key(Spec(experiment="toy", method="elbo", target=target))


MAKERS = [(Bowl, 1.0, 1.001), (Cone, 1.0, 2.0), (Tensors, [0.0, 1.0], [0.0, 1.001]), (Lists, [0.0, 1.0], [0.0, 1.1])]
MAKERS += [(Network, 0, 1), (lambdas, 1.0, 1.1)]


@pytest.mark.parametrize(("make", "value", "other"), MAKERS, ids=[make.__name__ for make, *_ in MAKERS])
def test_the_key_of_a_users_target_depends_on_what_it_holds(make, value, other):
    assert key_of(make(value)) == key_of(make(value))
    assert key_of(make(value)) != key_of(make(other))


def test_the_key_of_a_users_target_depends_on_its_formula_and_dimension():
    assert len({key_of(Bowl()), key_of(Cone()), key_of(Bowl(dim=3))}) == 3


def test_the_key_of_a_users_target_sees_a_formula_redefined_under_the_same_name():
    keys = []
    for power in (2, 3):
        space = {}
        exec(f"class Mine:\n dim = 2\n def log_prob(self, z): return -(z.abs() ** {power}).sum(-1)", space)
        keys.append(key_of(space["Mine"]()))
    assert keys[0] != keys[1]


def test_taking_the_key_of_a_users_target_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    key_of(Bowl())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_spec_is_described_in_plain_values():
    assert describe(TOY) == TOY.fields()
    described = describe(Spec(experiment="toy", method="avo", target=Bowl()))
    assert described["target"].startswith("Bowl:") and json.dumps(described)


def test_a_schedule_of_ones_own_is_known_by_its_values():
    few = {"experiment": "mnist", "method": "vae", "train_images": 640, "epochs": 1}
    one, same, other = (Spec(**few, schedule=lambda step, at=at: float(step >= at)) for at in (3, 3.0, 4))
    assert key(one) == key(same) != key(other)
    assert describe(one)["schedule"].startswith("<lambda>:") and json.dumps(describe(one))


def test_the_store_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("ANNEALED_STORE", str(tmp_path / "there"))
    assert root() == tmp_path / "there"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANNEALED_STORE", "relative")
    assert root() == tmp_path / "relative"


def test_without_a_clone_the_store_is_in_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("ANNEALED_STORE", raising=False)
    assert root() == PACKAGE.parent / "runs"
    monkeypatch.setattr(store_module, "PACKAGE", tmp_path / "site-packages" / "annealed_core")
    monkeypatch.chdir(tmp_path)
    assert root() == tmp_path / "runs"


def test_replace_file_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.json"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two" and [p.name for p in path.parent.iterdir()] == ["b.json"]


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("no space left"), Stopped()])
def test_replace_file_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch, where, error):
    path = tmp_path / "b.json"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_what_is_saved_is_loaded(tmp_path):
    folder = Folder(tmp_path)
    content = {"model": {"w": torch.randn(3)}, "history": [{"step": 1, "elbo": -0.5}], "none": None}
    folder.save("checkpoint.pt", content)
    loaded = folder.load("checkpoint.pt")
    assert torch.equal(loaded["model"]["w"], content["model"]["w"]) and loaded["history"] == content["history"]


def test_what_is_not_there_is_none(tmp_path):
    assert Folder(tmp_path).load("weights.pt") is None and Folder(tmp_path).result() is None


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("save", [lambda thing, path: torch.save({"w": thing}, path), None], ids=["torch", "pickle"])
def test_weights_that_would_execute_code_are_refused(tmp_path, save):
    trace = tmp_path / "executed"
    if save:
        save(Malicious(trace), tmp_path / "weights.pt")
    else:
        (tmp_path / "weights.pt").write_bytes(pickle.dumps(Malicious(trace)))
    assert Folder(tmp_path).load("weights.pt") is None
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists(), "the object must be one that would have executed something"


def test_a_finished_run_keeps_its_result_and_weights_alone(tmp_path):
    folder = Folder(tmp_path)
    folder.save("checkpoint.pt", {})
    folder.save("weights.pt", {})
    folder.write_result({"metrics": {"elbo": -1.0}})
    assert folder.result() == {"metrics": {"elbo": -1.0}}
    folder.forget_checkpoint()
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "weights.pt"}


def test_a_common_checkpoint_leaves_no_folder_behind(store):
    folder = Folder.of_stack([Folder.of(TOY), Folder.of(TOY.replace(seed=1))])
    assert folder != Folder.of_stack([Folder.of(TOY), Folder.of(TOY.replace(seed=2))])
    folder.save("checkpoint.pt", {})
    folder.forget_checkpoint()
    assert not folder.path.exists()


def test_a_failure_is_no_result(tmp_path):
    folder = Folder(tmp_path)
    assert folder.failure() is None
    folder.write_failure("log_prob is nan")
    assert folder.failure() == "log_prob is nan" and folder.result() is None


def test_a_folder_is_named_by_what_was_run(store):
    assert Folder.of(TOY).path == store / f"toy-D-avo-s0-{key(TOY)}"


def test_the_lock_is_held_by_one(store):
    folder = Folder.of(TOY)
    with folder.lock(), pytest.raises(TimeoutError), folder.lock().acquire(timeout=0.05):
        pass
    with folder.lock().acquire(timeout=0.05):
        pass
