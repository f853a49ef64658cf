"""Where runs are kept: one folder a run, named by the hash of everything that the run depends on.

Files are whole or absent. One that is damaged, or of another form than ours, is said in one line of the log
`annealed_core.running.store` (on stderr unless logging is set up otherwise), counts as absent, and gives way to the
next that is written. What can't be written is a StoreError of one line. Weights are read without executing anything.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from annealed_core.running.system import replace_file

PACKAGE = Path(__file__).parents[1]
#: What result.json has; `weights` is the SHA-256 of weights.pt.
FORM = {"metrics": dict, "history": list, "seconds": int | float, "weights": str}


class StoreError(RuntimeError):
    """What is kept can't be written where it should be."""


def root() -> Path:
    """$ANNEALED_STORE, else `runs/` beside the package in a clone, else `runs/` in the working directory.

    Raises StoreError where the folder begins with `~` and there is no such home.
    """
    if told := os.environ.get("ANNEALED_STORE"):
        try:
            return Path(told).expanduser().absolute()
        except RuntimeError:
            raise StoreError(f"no home directory for ANNEALED_STORE={told}: give the whole path") from None
    clone = PACKAGE.parent
    return (clone if (clone / "pyproject.toml").exists() else Path.cwd()) / "runs"


_zuko = functools.cache(lambda: version("zuko"))  # it is read from a file


def key(description: Any, code: str, device: str | torch.device = "cpu", compiled: bool = False) -> str:
    """Hash of all that a run's figures depend on, 16 hexadecimal digits.

    Args:
        description: as JSON, of `description.to_json`.
        code: of `code.code_version`.
        device: only its kind counts.
        compiled: whether steps are compiled.
    """
    everything = {
        "description": description,
        "code": code,
        "torch": torch.__version__,
        "zuko": _zuko(),
        "device": torch.device(device).type,
        "compiled": compiled,
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Folder:
    """The folder of one run: weights.pt and, written last, result.json; checkpoint.pt on the way; or failed.json."""

    path: Path

    @classmethod
    def of(cls, label: str, key: str) -> Folder:
        """The folder of a run in the store."""
        return cls(root() / f"{label}-{key}")

    @classmethod
    def of_stack(cls, folders: Sequence[Folder]) -> Folder:
        """Where runs that are trained side by side keep their common checkpoint."""
        names = "\n".join(folder.path.name for folder in folders)
        return cls(root() / f"stack-{hashlib.sha256(names.encode()).hexdigest()[:16]}")

    @contextlib.contextmanager
    def lock(self, timeout: float = -1) -> Iterator[None]:
        """Held by one process, or thread, while it trains; given up when it dies.

        Whoever gets it deletes what a process killed while writing has left. Raises TimeoutError after so many
        seconds, never if below 0, StoreError where there can't be a lock.
        """
        with self._writing(".lock"):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=timeout)
        try:
            self._forget_temporaries()
            yield
        finally:
            lock.release()

    def result(self) -> dict[str, Any] | None:
        """What `write_result` was given, or None where it is missing or damaged, or is not that of these weights."""
        found = self._json("result.json", FORM)
        if found is None or found.pop("weights") == self._digest():
            return found
        return self._odd("weights.pt", "is missing, or not what result.json was written with")

    def write_result(self, result: Mapping[str, Any], at_once: bool = True) -> None:
        """Keep metrics, history and seconds with the weights that were saved before: from now on the run is done."""
        self._write("result.json", json.dumps({**result, "weights": self._digest()}, indent=1).encode(), at_once)
        self._clear("failed.json")

    def failure(self) -> str | None:
        """Why the run failed, or None where it did not."""
        found = self._json("failed.json", {"error": str})
        return None if found is None else found["error"]

    def write_failure(self, error: str) -> None:
        """Keep the run as failed; deleting its folder lets it be tried again."""
        self._clear("result.json")
        self._write("failed.json", json.dumps({"error": error}, indent=1).encode())

    def save(self, name: str, tensors: Mapping[str, Any], at_once: bool = True) -> None:
        """Save a dict of tensors and plain values, nested or not; new weights end an old result."""
        if name == "weights.pt":
            self._clear("result.json")
        buffer = io.BytesIO()
        torch.save(dict(tensors), buffer)
        self._write(name, buffer.getvalue(), at_once)

    def load(self, name: str, like: Mapping[str, Any] | None = None) -> Any | None:
        """What `save` saved, or None where it is missing or damaged; never executes pickled code.

        Args:
            name: of the file; the numbers in weights.pt must be numbers.
            like: what it must look like: all that stands in this, with values of the same type, tensors of the same
                shape; beside tensors nothing else.
        """
        path = self.path / name
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # torch itself looks at no checksum
                    return self._odd(name, "is damaged")
            found = torch.load(path, weights_only=True, map_location="cpu")
            wrong = _unlike(found, like or {}) or (_not_a_number(found) if name == "weights.pt" else None)
        except FileNotFoundError:
            return None
        except Exception as error:  # bytes that are no archive raise whatever they come upon
            return self._odd(name, f"can't be read ({type(error).__name__})")
        return self._odd(name, wrong) if wrong else found

    def forget_checkpoint(self) -> None:
        """Delete the checkpoint, and the folder where it held nothing else."""
        self._clear("checkpoint.pt")
        self._forget_temporaries()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _digest(self) -> str | None:
        """SHA-256 of weights.pt."""
        with contextlib.suppress(OSError):
            return hashlib.sha256((self.path / "weights.pt").read_bytes()).hexdigest()
        return None

    def _json(self, name: str, form: Mapping[str, Any]) -> dict[str, Any] | None:
        """A JSON object with values of these types, or None."""
        try:
            found = json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            return self._odd(name, f"can't be read ({type(error).__name__})")
        ours = isinstance(found, dict) and all(isinstance(found.get(entry), kind) for entry, kind in form.items())
        return found if ours else self._odd(name, f"has not the form of ours, {', '.join(form)}")

    def _odd(self, name: str, what: str) -> Any:
        """None, having said in one line what is wrong with a file."""
        _say(f"{self.path / name}: {what}; it counts as absent")
        return None

    def _write(self, name: str, content: bytes, at_once: bool = True) -> None:
        if (self.path / name).is_dir():
            self._clear(name)
        with self._writing(name):
            replace_file(self.path / name, content, at_once)

    def _clear(self, name: str) -> None:
        """Delete a file; a folder of that name is moved aside."""
        path = self.path / name
        with self._writing(name):
            if path.is_dir():
                path.rename(path.with_name(f"{name}.odd-{time.time_ns()}"))
            path.unlink(missing_ok=True)

    def _forget_temporaries(self) -> None:
        for path in self.path.glob(".*-????????"):
            if path.suffix.startswith((".pt-", ".json-")):
                self._clear(path.name)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """What the disk refuses, as a StoreError of one line."""
        try:
            yield
        except Timeout:
            raise
        except (OSError, NotImplementedError) as error:  # the latter of file systems without locks
            why = getattr(error, "strerror", None) or error
            raise StoreError(f"can't write {name} in {self.path}: {why} (ANNEALED_STORE names another store)") from None


@functools.cache  # once
def _say(line: str) -> None:
    logging.getLogger(__name__).warning(line)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dicts and lists hold, each with where it stands."""
    if isinstance(value, Mapping | list | tuple):
        for name, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _flat(each, f"{path}/{name}")
    else:
        yield path, value


def _unlike(found: Any, like: Mapping[str, Any]) -> str | None:
    """What first sets what was found apart from what was expected, in words; None where nothing does."""
    if not isinstance(found, dict):
        return f"holds a {type(found).__name__}"
    has, asked = ({path: _form(value) for path, value in _flat(each)} for each in (found, like))
    exact = {path.rpartition("/")[0] for path, form in asked.items() if form.startswith("torch.")}
    for path in [*asked, *(path for path in has if path.rpartition("/")[0] in exact)]:
        if has.get(path) != asked.get(path):
            return f"has {has.get(path, 'nothing')} for {path[1:]}, not {asked.get(path, 'nothing')}"
    return None


def _form(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _not_a_number(found: Any) -> str | None:
    """Where the first NaN stands in nested tensors, in words."""
    tensors = ((path, value) for path, value in _flat(found) if isinstance(value, Tensor) and value.is_floating_point())
    return next((f"has NaN in {path[1:]}" for path, value in tensors if bool(value.isnan().any())), None)
