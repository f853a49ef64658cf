"""The machine that this runs on: its cores and memory, settings, files that are whole or absent."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

_TURN = threading.RLock()  # number of threads, default dtype and random state are the process's


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def optional(module: str, extra: str) -> Any:
    """A module that one of our extras brings; ImportError of one line where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"{module} is missing: pip install 'annealed_core[{extra}]'") from None


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for its next tensors.

    The C library else gives large pieces back at once, and the system has to clear them anew at each step of training:
    a quarter of the time of a stack of 32 models. Does nothing where the C library is not glibc.
    """
    with suppress(OSError, AttributeError, TypeError):  # on Windows and macOS
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: what is smaller comes from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


@contextmanager
def own_settings(device: str | torch.device = "cpu") -> Iterator[None]:
    """Compute as every run does, whatever the caller has set, and leave all of it as it was.

    One thread, float32 as default, matrix products in full precision, no autocast, gradients recorded, new tensors on
    the CPU, and a state of torch's random generators (of the CPU and of a CUDA device) that is put back. Most of these
    are the process's: so threads take turns here, and a thread may enter again.
    """
    device = torch.device(device)
    with ExitStack() as stack:
        stack.enter_context(_TURN)
        index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        stack.enter_context(torch.random.fork_rng([index] if device.type == "cuda" else []))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)):
            if hasattr(backend, "fp32_precision"):  # since torch 2.9; put back after what the next lines put back
                stack.callback(setattr, backend, "fp32_precision", getattr(backend, "fp32_precision"))  # noqa: B009
        with suppress(RuntimeError):  # the common one can't be read where a backend's own was set
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def seed_generators(seed: int, device: str | torch.device = "cpu") -> None:
    """Set torch's random state on the CPU, and on a CUDA device.

    As `torch.manual_seed`, which without a GPU notes each call, with where it came from, for one that might follow.
    """
    torch.default_generator.manual_seed(seed)
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed_all(seed)


@contextmanager
def diverted_stderr() -> Iterator[IO[bytes]]:
    """Let this process, and those it starts meanwhile, write their stderr to the file that this yields."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield file
            finally:
                sys.stderr.flush()
                os.dup2(terminal, 2)
    finally:
        os.close(terminal)


def replace_file(path: Path, content: bytes, at_once: bool = True) -> None:
    """Write a file so that at any moment either the old or the new one is there, whole.

    Raises OSError where that can't be; a process that is killed meanwhile leaves `.<name>-????????` behind. Without
    `at_once` the disk is not waited for: should the power fail within seconds, the file may be lost or cut off.
    """
    place: dict[str, Any] = {"dir": path.parent, "prefix": f".{path.name}-"}
    try:
        handle, temporary = tempfile.mkstemp(**place)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(**place)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            if at_once:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
