"""Compiled training: steps of a stack of pairs of Gaussians as machine code that `torch.compile` writes.

$ANNEALED_COMPILE=1 asks for it. Compiling takes some ten seconds for each kind of stack, and every step then less than
half the time: it pays for stacks of many models and for long training. Its rounding is another, so that its runs are
kept apart in the store.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from annealed_core.spec import Spec

KERNELS = ("gated", "residual")
_COMPILERS = ("g++", "clang++", "c++", "cl")


def is_asked(spec: Spec, device: str) -> bool:
    """Whether that spec's training is to be compiled: it must be a toy's with pairs of Gaussians, on the CPU.

    IWAE is not: its objective can be finite where a sample is not, so that a failing target would go unseen.
    """
    wanted = os.environ.get("ANNEALED_COMPILE", "0")
    if wanted not in ("0", "1", ""):
        raise ValueError(f"ANNEALED_COMPILE must be 0 or 1, got {wanted!r}")
    fits = spec.experiment == "toy" and spec.kernel in KERNELS and bool(spec.n_transitions) and spec.method != "iwae"
    return wanted == "1" and fits and device == "cpu"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call for arguments of their shapes.

    Raises RuntimeError where there is no C++ compiler.
    """
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *_COMPILERS)))):
        raise RuntimeError("ANNEALED_COMPILE=1 takes a C++ compiler, such as g++ or clang++: none was found")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # and this one of targets that read numbers
    torch.compiler.reset()  # what was compiled for another stack: only a few variants of a function are kept
    return torch.compile(function, dynamic=False)
