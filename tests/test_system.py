"""Settings of a run's own, and files that are whole or absent."""

import contextlib
import os
import threading

import pytest
import torch

from annealed_core.running.system import diverted_stderr, own_settings, replace_file, seed_generators


@contextlib.contextmanager
def put_back(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


STATES = [
    torch.get_num_threads,
    torch.get_default_dtype,
    torch.get_float32_matmul_precision,
    torch.get_default_device,
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    lambda: torch.is_autocast_enabled("cpu"),
    lambda: torch.get_rng_state().tolist(),
]
CALLERS = {
    "plain": contextlib.nullcontext,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: put_back(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "medium": lambda: put_back(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "threads": lambda: put_back(torch.get_num_threads, torch.set_num_threads, 2),
    "device": lambda: torch.device("meta"),
    "itself": own_settings,
}


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
def test_a_run_has_settings_of_its_own_and_the_callers_stay(caller):
    with caller():
        before = [get() for get in STATES]
        with own_settings():
            torch.manual_seed(0)
            layer = torch.nn.Linear(3, 3)
            loss = (layer(torch.randn(2, 3)) @ torch.ones(3, 1)).sum()
            loss.backward()
            assert loss.dtype == torch.float32 and layer.weight.grad is not None and not layer.weight.is_inference()
            assert [get() for get in STATES[:3]] == [1, torch.float32, "highest"] and loss.device.type == "cpu"
            value = loss.item()
        assert [get() for get in STATES] == before
    torch.manual_seed(0)
    assert value == torch.nn.Linear(3, 3)(torch.randn(2, 3)).sum().item()


def test_settings_are_put_back_after_an_error():
    before = [get() for get in STATES]
    with pytest.raises(KeyError), own_settings():
        torch.set_default_dtype(torch.float64)
        torch.randn(3)
        raise KeyError
    assert [get() for get in STATES] == before


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="since torch 2.9")
def test_the_precision_of_one_backend_is_put_back():
    matmul = torch.backends.mkldnn.matmul
    with put_back(lambda: matmul.fp32_precision, lambda value: setattr(matmul, "fp32_precision", value), "bf16"):
        with own_settings():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"


def test_threads_take_turns():
    inside, most = [], []

    def enter():
        for _ in range(20):
            with own_settings():
                inside.append(1)
                torch.randn(100).sum()
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 60


def test_what_is_written_to_stderr_is_diverted(capfd):
    with diverted_stderr() as file:
        os.write(2, b"said")
        file.seek(0)
        assert file.read() == b"said"
    assert capfd.readouterr().err == ""


def test_random_state_is_set_as_torch_sets_it():
    torch.manual_seed(3)
    expected = torch.rand(5)
    seed_generators(3)
    assert torch.equal(torch.rand(5), expected)


def test_replace_file_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.json"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two" and [p.name for p in path.parent.iterdir()] == ["b.json"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_replace_file_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch, where, error):
    path = tmp_path / "b.json"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["b.json"]
