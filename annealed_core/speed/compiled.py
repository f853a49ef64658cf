"""Steps of training as machine code that `torch.compile` writes, for stacks: they start many small operations.

    step = CompiledStep(lambda objective, noise: objective.values(chain, target, noise).mean(0), chain.parameters())
    values = step(objective.at(number), noise)      # (M,)

Compiling takes some ten seconds for each kind of step, and a step then half to a third of its time. Rounding differs.
"""

from __future__ import annotations

import getpass
import hashlib
import logging
import math
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 0.01  # of compiled values and gradients, relative to the largest: code for another processor is off by nats
_COMPILERS = ("g++", "clang++", "c++", "cl")


class CompiledStep:
    """A function (objective, *tensors) -> values, compiled when it is first called with an objective of a type.

    That call also compares values and gradients with those of the function as it stands; where they differ, or the
    function can't be compiled, it warns, and goes on with the function as it stands. Compiled code watches nothing: so
    when a value or a gradient first is not finite, the step is done again as it stands, for whoever watches there.

    Args:
        function: it must give the same values for the same arguments.
        parameters: what values are differentiated by.

    Raises RuntimeError where there is no C++ compiler.
    """

    def __init__(self, function: Callable[..., Tensor], parameters: Iterable[nn.Parameter]) -> None:
        if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *_COMPILERS)))):
            raise RuntimeError("compile=True takes a C++ compiler, such as g++ or clang++: none was found")
        keep_cache_apart()
        for noisy in ("torch.utils.cpp_extension", "torch._dynamo"):  # of GPUs that aren't there, and of numbers read
            logging.getLogger(noisy).setLevel(logging.ERROR)
        torch.compiler.reset()  # what was compiled for another stack: only a few variants of a function are kept
        self.function, self.parameters = function, list(parameters)
        # Torch 2.15 overwrites what a backward pass still needs, where two tensors kept for it share memory.
        self.compiled = torch.compile(function, dynamic=False, options={"inplace_buffers": False})
        self.known: set[type] = set()
        self.works = True
        self.arguments: tuple[Any, ...] = ()
        self.not_finite = {"value": 0, "gradient": 0}  # how many numbers were so
        # A bias's gradient is a sum over all samples: what goes wrong in one of them shows there.
        smallest = min(self.parameters, key=torch.Tensor.numel)
        smallest.register_hook(lambda gradient: self._look("gradient", gradient))

    def __call__(self, objective: Any, *tensors: Tensor) -> Tensor:
        """As of the function."""
        if hasattr(objective, "alpha"):  # a number that changes with the step would be compiled anew at each
            objective = objective._with(alpha=torch.as_tensor(objective.alpha))
        self.arguments = objective, *tensors
        if self.works and type(objective) not in self.known:
            self.known.add(type(objective))
            self._compare()
        if not self.works:
            return self.function(*self.arguments)
        values: Tensor = self.compiled(*self.arguments)
        self._look("value", values.detach())
        return values

    def _outcome(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """Values and gradients of the present arguments."""
        with torch.enable_grad():
            values = function(*self.arguments)
            gradients = torch.autograd.grad(values.sum(), self.parameters, allow_unused=True)
        return [values.detach(), *(gradient for gradient in gradients if gradient is not None)]

    def _compare(self) -> None:
        self.works = False  # for the hook, which has nothing to look at meanwhile
        expected, name = self._outcome(self.function), type(self.arguments[0]).__name__
        try:
            found = self._outcome(self.compiled)
        except Exception as problem:
            message = str(problem).strip().partition("\n")[0]
            warnings.warn(f"{name} trains uncompiled: torch.compile failed with {message}", stacklevel=4)
            return
        pairs = [(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True)]
        error = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs if b.norm() > 0)
        self.works = error < TOLERANCE
        if not self.works:
            off = f"its values and gradients are off by {error:.1%}"
            warnings.warn(f"{name} trains uncompiled: {off}, compiled in {keep_cache_apart()}", stacklevel=4)

    def _look(self, what: str, numbers: Tensor) -> None:
        if not self.works or math.isfinite(numbers.sum()):
            return
        count = int((~numbers.isfinite()).sum())
        if count > self.not_finite[what]:
            self.not_finite[what] = count
            self.works = False
            self._outcome(self.function)
            self.works = True


def keep_cache_apart() -> Path:
    """Let torch keep what it compiles in a folder for what this processor can do, inside the one that it would take.

    Code for another processor, on a shared disk or after $ATEN_CPU_CAPABILITY has changed, gives wrong numbers or ends
    the process. Sets $TORCHINDUCTOR_CACHE_DIR, and returns it.
    """
    flags = platform.processor()
    with suppress(OSError):  # there is none outside Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    mark = hashlib.sha256(flags.encode()).hexdigest()[:8]
    name = f"{torch.backends.cpu.get_cpu_capability().replace(' ', '-')}-{mark}"
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folder = Path(given) if given else Path(tempfile.gettempdir(), f"torchinductor_{_user()}")
    if folder.name != name:
        folder = folder / name
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return folder


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # without an entry for this user
        return str(os.getuid())
