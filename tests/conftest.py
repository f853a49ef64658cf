"""What every test starts from: one thread, no windows, and no access to the runs of the working copy."""

import os
from pathlib import Path

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"
os.environ["ANNEALED_PROGRESS"] = "0"
torch.set_num_threads(1)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of runs, which this test has to itself."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("ANNEALED_STORE", str(folder))
    return folder
