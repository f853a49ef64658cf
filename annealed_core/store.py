"""Where runs are kept: one folder a run, named by the hash of everything that the run depends on.

Everything is written to a temporary file and renamed, so that a file is whole or absent. Weights are read back
without executing pickled code.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import os
import pickle
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from annealed_core import compiled
from annealed_core.products import HAS_FAST_PRODUCT
from annealed_core.spec import Spec
from annealed_core.system import replace_file
from annealed_core.targets import check_target

PACKAGE = Path(__file__).parent
_CHAINS = ("energies", "targets", "products", "layers", "kernels", "fused", "stack", "chain", "objectives", "paths")
_ALL = (*_CHAINS, "evidence", "fields", "spec", "optimiser", "experiment")
_MNIST = ("flows", "schedules", "mnist", "earlier", "data", "vae")
_JUDGED = ("likelihood", "inference", "exploration", "folded", "ais", "moves")
#: The modules whose code can change a result of each experiment.
CODE = {
    "toy": (*_ALL, "flows", "toys", "watch", "compiled", "judge"),
    "noise_model": (*_CHAINS, "vae", "noise_model", "noise_study"),
    "mnist": (*_ALL, *_MNIST, *_JUDGED),
}


def root() -> Path:
    """$ANNEALED_STORE, else `runs/` beside the package in a clone, else `runs/` in the working directory."""
    if os.environ.get("ANNEALED_STORE"):
        return Path(os.environ["ANNEALED_STORE"]).absolute()
    clone = PACKAGE.parent
    return (clone if (clone / "pyproject.toml").exists() else Path.cwd()) / "runs"


@functools.cache
def code_version(experiment: str) -> str:
    """Hash of the code that an experiment's results depend on; comments and docstrings don't count."""
    digest = hashlib.sha256()
    for module in CODE[experiment]:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


for _experiment in CODE:  # now, while the code that was imported is still what stands in the files
    code_version(_experiment)


def _plain(value: Any, depth: int = 20) -> Any:
    """What a target holds, as text and numbers: all that can make it another target, down to some depth."""
    if depth == 0:  # an object that leads back to itself
        return type(value).__qualname__
    deeper = functools.partial(_plain, depth=depth - 1)
    if isinstance(value, Tensor | torch.nn.Parameter | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {str(name): deeper(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [deeper(each) for each in (value if isinstance(value, list | tuple) else sorted(value, key=str))]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if inspect.isfunction(value):
        return [
            value.__qualname__,
            value.__code__.co_code.hex(),
            deeper(value.__code__.co_consts),
            deeper(_held(value)),
        ]
    return [type(value).__qualname__, deeper(getattr(value, "__dict__", {}))]


def _held(function: Any) -> Any:
    """What a closure holds, and the defaults of its arguments."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [each for each in (*cells, *(function.__defaults__ or ())) if not inspect.isfunction(each)]


def _fingerprint(target: Any) -> str:
    """What a user's own target is: its source where there is one, what it holds, and its values at 256 fixed points."""
    check_target(target)
    digest = hashlib.sha256(type(target).__qualname__.encode())
    for part in (type(target), getattr(target, "log_prob", None)):
        with contextlib.suppress(OSError, TypeError):  # no source: defined at a prompt, or a closure
            digest.update(inspect.getsource(part).encode())  # type: ignore[arg-type]
    digest.update(json.dumps(_plain(getattr(target, "__dict__", {})), sort_keys=True).encode())
    generator = torch.Generator().manual_seed(0)
    points = torch.randn((256, target.dim), generator=generator) * torch.logspace(-1, 1, 256).unsqueeze(-1)
    with torch.no_grad():
        values = target.log_prob(points)
    digest.update(",".join(f"{value:.4g}" for value in torch.as_tensor(values).flatten().tolist()).encode())
    return digest.hexdigest()


def describe(spec: Any) -> dict[str, Any]:
    """The spec as plain values; a target object is named by its class and its fingerprint, a schedule by its values."""
    fields = spec.fields()
    if "target" in fields and not isinstance(spec.target, str):
        fields["target"] = f"{type(spec.target).__name__}:{_fingerprint(spec.target)[:16]}"
    if not isinstance(fields.get("schedule", ""), str):
        schedule = spec.annealing
        values = ",".join(repr(schedule(step)) for step in range(spec.n_steps))
        fields["schedule"] = f"{schedule.name}:{hashlib.sha256(values.encode()).hexdigest()[:16]}"
    return fields


def key(spec: Spec, device: str = "cpu") -> str:
    """Hash of the spec, the code, torch's version and the kind of device."""
    everything = {
        **describe(spec),
        "code": code_version(spec.experiment),
        "torch": torch.__version__,
        "device": device.split(":")[0],
    }
    if "iaf" in (spec.kernel, spec.method) or spec.kernel == "spline":
        everything["zuko"] = version("zuko")
    if spec.experiment == "mnist":
        everything["fast_product"] = HAS_FAST_PRODUCT  # another rounding
    if compiled.is_asked(spec, device):
        everything["compiled"] = True
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Folder:
    """The folder of one run: weights.pt and, written last, result.json; checkpoint.pt on the way; or failed.json."""

    path: Path

    @classmethod
    def of(cls, spec: Spec, device: str = "cpu") -> Folder:
        """The folder of that spec in the store."""
        return cls(root() / f"{spec.label}-{key(spec, device)}")

    @classmethod
    def of_stack(cls, folders: Sequence[Folder]) -> Folder:
        """Where runs that are trained side by side keep their common checkpoint."""
        names = "\n".join(folder.path.name for folder in folders)
        return cls(root() / f"stack-{hashlib.sha256(names.encode()).hexdigest()[:16]}")

    def lock(self) -> FileLock:
        """A lock that one process holds while it trains; given up when that process dies."""
        self.path.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / ".lock")

    def result(self) -> dict[str, Any] | None:
        """What result.json holds, or None where it is missing or damaged, or has lost its weights."""
        try:
            found = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if (self.path / "weights.pt").exists() else None

    def is_done(self) -> bool:
        """Whether there is a result with weights that can be read, or a failure."""
        return self.failure() is not None or (self.result() is not None and self.load("weights.pt") is not None)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json: from now on the run is done."""
        replace_file(self.path / "result.json", json.dumps(result, indent=1).encode())

    def failure(self) -> str | None:
        """Why the run failed, or None where it did not."""
        try:
            return str(json.loads((self.path / "failed.json").read_text(encoding="utf-8"))["error"])
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def write_failure(self, error: str) -> None:
        """Keep the run as failed; deleting its folder lets it be tried again."""
        replace_file(self.path / "failed.json", json.dumps({"error": error}, indent=1).encode())

    def forget_checkpoint(self) -> None:
        """Delete the checkpoint, and the folder where it held nothing else."""
        (self.path / "checkpoint.pt").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def save(self, name: str, tensors: Any) -> None:
        """Save nested dicts and lists of tensors and plain values under that name."""
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        replace_file(self.path / name, buffer.getvalue())

    def load(self, name: str) -> Any | None:
        """What `save` saved, or None where it is missing or damaged; never executes pickled code."""
        try:
            return torch.load(self.path / name, weights_only=True, map_location="cpu")
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
            return None
