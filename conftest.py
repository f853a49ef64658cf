"""For all tests, `pytest --nbval notebooks` among them: kernels of this environment, without progress bars."""

import os
from pathlib import Path

os.environ.setdefault("ANNEALED_PROGRESS", "0")
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")


def pytest_configure(config):
    """Leave out of nbval's comparison what notebooks/nbval.cfg says."""
    if getattr(config.option, "nbval_sanitize_with", "") is None:
        config.option.nbval_sanitize_with = str(Path(__file__).parent / "notebooks" / "nbval.cfg")
