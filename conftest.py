"""For all tests, `pytest --nbval notebooks` among them: kernels of this environment, without progress bars."""

import os

os.environ.setdefault("ANNEALED_PROGRESS", "0")
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
