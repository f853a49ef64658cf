"""What every test starts from: one thread, no windows, and no access to the runs of the working copy."""

import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it, and so would children
os.environ["MPLBACKEND"] = "Agg"
os.environ["ANNEALED_PROGRESS"] = "0"
torch.set_num_threads(1)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of runs, which this test has to itself."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("ANNEALED_STORE", str(folder))
    return folder


@cache
def few_images():
    """The first images of each part of MNIST."""
    from annealed_core.running import data

    sizes = zip(data.load_mnist(), (1000, 300, 300), strict=True)
    return tuple(data.Images(part.images[:n], part.labels[:n]) for part, n in sizes)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MNIST with few images, so that judging a run takes no time."""
    from annealed_core.running import data, mnist

    parts = few_images()
    monkeypatch.setattr(data, "load_mnist", lambda: parts)
    caches = mnist.images, mnist.grey_images
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def checkpoint_at_every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    from annealed_core.running import experiment

    monkeypatch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
