"""The store: what a run's key depends on, files that are whole or absent, and what is damaged counts as absent."""

import contextlib
import errno
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch

from annealed_core.running import store as store_module
from annealed_core.running.store import Folder, StoreError, key, root

RESULT = {"metrics": {"elbo": -1.0}, "history": [{"step": 1}], "seconds": 2.0}
WEIGHTS = {"w": torch.arange(3.0), "deep": {"b": torch.ones(2, 2)}}


@pytest.fixture
def done(tmp_path):
    folder = Folder(tmp_path / "run")
    folder.save("weights.pt", WEIGHTS)
    folder.write_result(RESULT)
    return folder


def test_the_key_depends_on_description_code_device_compilation_and_torch(monkeypatch):
    keys = [key({"AVO": {"weight": 1.0}}, "c"), key({"AVO": {"weight": 0.5}}, "c"), key({"AVO": {"weight": 1.0}}, "d")]
    keys += [key({"AVO": {"weight": 1.0}}, "c", "cuda"), key({"AVO": {"weight": 1.0}}, "c", compiled=True)]
    assert key({"AVO": {"weight": 1.0}}, "c", "cuda:0") == key({"AVO": {"weight": 1.0}}, "c", torch.device("cuda", 1))
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    keys.append(key({"AVO": {"weight": 1.0}}, "c"))
    assert len(set(keys)) == 6


def test_the_store_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for told, where in [(str(tmp_path / "a"), tmp_path / "a"), ("b", tmp_path / "b"), ("~/runs", tmp_path / "runs")]:
        monkeypatch.setenv("ANNEALED_STORE", told)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert root() == where


def test_without_a_home_the_error_names_the_folder_and_the_variable(monkeypatch):
    monkeypatch.setenv("ANNEALED_STORE", "~nobody-of-that-name/runs")
    with pytest.raises(StoreError, match="ANNEALED_STORE=~nobody-of-that-name/runs"):
        root()


def test_without_a_clone_the_store_is_in_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("ANNEALED_STORE", raising=False)
    assert root() == store_module.PACKAGE.parent / "runs"
    monkeypatch.setattr(store_module, "PACKAGE", tmp_path / "site-packages" / "annealed_core")
    monkeypatch.chdir(tmp_path)
    assert root() == tmp_path / "runs"


def test_what_is_kept_is_found_again(done):
    weights = done.load("weights.pt", like=WEIGHTS)
    assert done.result() == RESULT and done.failure() is None
    assert torch.equal(weights["w"], WEIGHTS["w"]) and torch.equal(weights["deep"]["b"], WEIGHTS["deep"]["b"])


def test_what_is_not_there_is_none_without_a_word(tmp_path, caplog):
    folder = Folder(tmp_path / "nothing")
    assert folder.result() is folder.failure() is folder.load("weights.pt") is folder.load("checkpoint.pt") is None
    assert not caplog.records


def test_a_failure_is_no_result_and_ends_with_one(done):
    done.write_failure("log_prob is nan")
    assert done.failure() == "log_prob is nan" and done.result() is None
    done.write_result(RESULT)
    assert done.failure() is None and done.result() == RESULT


ODD_JSON = [
    "",
    "{",
    "[]",
    "3",
    "{}",
    '"text"',
    "[" * 100_000,
    '{"metrics": [], "history": [], "seconds": 1, "weights": ""}',
]
NAN = {"w": torch.tensor([0.0, torch.nan, 0.0]), "deep": WEIGHTS["deep"]}
ODD_WEIGHTS = [[1, 2], {"w": torch.zeros(3)}, {**WEIGHTS, "w": torch.zeros(4)}, {**WEIGHTS, "more": torch.ones(1)}, NAN]


def one_line(caplog, path):
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert "\n" not in caplog.text.strip() and caplog.records[0].levelno == logging.WARNING
    return True


@pytest.mark.parametrize("text", ODD_JSON, ids=lambda text: text[:12])
def test_an_odd_result_is_said_in_one_line_and_gives_way_to_the_next(done, caplog, text):
    (done.path / "result.json").write_text(text)
    assert done.result() is done.result() is None and one_line(caplog, done.path / "result.json")
    done.write_result(RESULT)
    assert done.result() == RESULT


@pytest.mark.parametrize("text", ODD_JSON, ids=lambda text: text[:12])
def test_an_odd_failure_is_none(done, caplog, text):
    (done.path / "failed.json").write_text(text)
    assert done.failure() is None and one_line(caplog, done.path / "failed.json")


@pytest.mark.parametrize("name", ["result.json", "weights.pt", "checkpoint.pt", "failed.json"])
def test_a_folder_in_place_of_a_file_is_moved_aside(done, caplog, name):
    (done.path / name).unlink(missing_ok=True)
    (done.path / name / "within").mkdir(parents=True)
    found = {"result.json": done.result, "failed.json": done.failure}.get(name, lambda: done.load(name))()
    assert found is None and one_line(caplog, done.path / name)
    done.save("weights.pt", WEIGHTS)
    done.save("checkpoint.pt", {})
    done.write_result(RESULT)
    assert done.result() == RESULT and done.load("weights.pt", WEIGHTS) and done.load("checkpoint.pt") == {}
    assert [path for path in done.path.glob(f"{name}.odd-*/within")]


@pytest.mark.parametrize("weights", ODD_WEIGHTS, ids=["list", "fewer", "shape", "more", "nan"])
def test_odd_weights_are_said_in_one_line(done, caplog, weights):
    torch.save(weights, done.path / "weights.pt")
    assert done.load("weights.pt", like=WEIGHTS) is None and one_line(caplog, done.path / "weights.pt")


@pytest.mark.parametrize("saved", [[1], {"step": 1}, {"model": [1]}, {"model": {"v": torch.ones(1)}}])
def test_a_checkpoint_of_another_model_is_said_in_one_line(done, caplog, saved):
    torch.save(saved, done.path / "checkpoint.pt")
    assert done.load("checkpoint.pt", like={"model": {"w": torch.ones(1)}}) is None
    assert one_line(caplog, done.path / "checkpoint.pt")


def test_a_checkpoint_may_hold_more_than_the_model_and_one_that_diverged(done):
    done.save("checkpoint.pt", {"model": NAN, "step": 3})
    assert done.load("checkpoint.pt", like={"model": WEIGHTS})["step"] == 3


@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pt"])
def test_one_flipped_bit_of_a_tensor_is_seen(done, caplog, name):
    done.save("checkpoint.pt", WEIGHTS)
    content = (done.path / name).read_bytes()
    place = content.index(torch.arange(3.0).numpy().tobytes())
    (done.path / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert done.load(name) is None and one_line(caplog, done.path / name)
    assert name != "weights.pt" or done.result() is None


def test_weights_of_another_run_are_no_result_nor_are_missing_ones(done):
    torch.save({"w": torch.ones(3)}, done.path / "weights.pt")
    assert done.result() is None
    (done.path / "weights.pt").unlink()
    assert done.result() is None


def test_new_weights_end_the_old_result(done):
    done.save("weights.pt", WEIGHTS)
    assert not (done.path / "result.json").exists()


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_weights_that_would_execute_code_are_refused(done, tmp_path, save):
    trace = tmp_path / "executed"
    save({"w": Malicious(trace)}, done.path / "weights.pt")
    assert done.load("weights.pt") is None and not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists(), "the object must be one that would have executed something"


def test_a_common_checkpoint_leaves_no_folder_behind(store):
    runs = [Folder.of("density-D-avo-s0", "k0"), Folder.of("density-D-avo-s1", "k1")]
    stack = Folder.of_stack(runs)
    assert stack.path.parent == store and stack != Folder.of_stack(runs[:1])
    stack.save("checkpoint.pt", {})
    (stack.path / ".checkpoint.pt-ab12cd_3").touch()
    stack.forget_checkpoint()
    assert not stack.path.exists()


def test_what_a_killed_process_left_goes_with_the_next_lock(done):
    (done.path / ".checkpoint.pt-ab12cd_3").write_bytes(b"half")
    with done.lock():
        assert {path.name for path in done.path.iterdir()} == {".lock", "weights.pt", "result.json"}


def test_the_lock_is_held_by_one(done):
    with done.lock(), pytest.raises(TimeoutError), done.lock(timeout=0.05):
        pass
    with done.lock(timeout=0.05):
        pass


def refuse(number):
    def refused(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize(
    ("where", "error", "name"),
    [
        ("tempfile.mkstemp", errno.EROFS, "result.json"),
        ("os.fsync", errno.ENOSPC, "result.json"),
        ("fcntl.flock", errno.ENOLCK, ".lock"),
        ("pathlib.Path.mkdir", errno.EACCES, ".lock"),
    ],
    ids=["read-only", "full", "no lock", "no folder"],
)
def test_what_the_disk_refuses_is_one_line_with_file_and_folder(done, monkeypatch, where, error, name):
    monkeypatch.setattr(where, refuse(error))
    with pytest.raises(StoreError) as raised, done.lock() if name == ".lock" else contextlib.nullcontext():
        done.write_result(RESULT)
    message = str(raised.value)
    assert f"{name} in {done.path}: {os.strerror(error)}" in message and "\n" not in message
    assert raised.value.__suppress_context__ and done.result() == RESULT
