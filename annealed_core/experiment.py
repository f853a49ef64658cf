"""Experiments: `run(spec)` trains, or finds what was trained before, and goes on where a killed run stopped."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from annealed_core.chain import Chain
from annealed_core.problems import PROBLEMS, Problem, Toy
from annealed_core.spec import Spec, check_parameter
from annealed_core.store import Folder
from annealed_core.vae import VAE

__all__ = ["Run", "Spec", "TrainingError", "check_parameter", "run"]

SECONDS_BETWEEN_CHECKPOINTS = 2.0


class TrainingError(RuntimeError):
    """Training came to a value that is not finite; the message says where."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        spec: what was run.
        metrics: final figures, in nats where they are log-densities.
        history: lines recorded through training.
        seconds: time spent training and judging, over all interruptions.
        model: the trained modules, in evaluation mode: a ModuleList of kernels (toys) or a `VAE` (MNIST).
        chain: toys: the trained chain; None for MNIST, whose `model.posterior(x)` makes one for each batch.
    """

    spec: Spec
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    seconds: float
    model: nn.Module
    chain: Chain | None

    @property
    def vae(self) -> VAE:
        """The auto-encoder of an MNIST run."""
        if not isinstance(self.model, VAE):
            raise AttributeError(f"a run of experiment {self.spec.experiment!r} has no auto-encoder")
        return self.model


def progress(total: int, description: str) -> tqdm:
    """A progress bar that vanishes when done, and is silent where $ANNEALED_PROGRESS is 0."""
    return tqdm(total=total, desc=description, leave=False, disable=os.environ.get("ANNEALED_PROGRESS") == "0" or None)


@contextmanager
def _own_random_state(seed: int, device: str) -> Iterator[None]:
    """A random state of the run's own, float32, and one thread.

    Small models are fastest so, and sums don't depend on the number of the machine's cores.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices):
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


def _random_state(device: str) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.startswith("cuda") else state


def _set_random_state(state: dict[str, torch.Tensor], device: str) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _train(problem: Problem, folder: Folder, spec: Spec, device: str) -> tuple[list[dict[str, float]], float]:
    parameters = list(problem.model.parameters())
    if not parameters:  # a chain of length 0 has nothing to train
        return [], 0.0
    optimiser = torch.optim.Adam(parameters, lr=spec.lr or 0.0, betas=(spec.beta1 or 0.0, 0.999), fused=True)
    history: list[dict[str, float]] = []
    seconds, step = 0.0, 0
    saved = folder.load("checkpoint.pt")
    if saved is not None:
        problem.model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        problem.load(saved["problem"])
        history, seconds, step = saved["history"], saved["seconds"], saved["step"]
        _set_random_state(saved["random"], device)
    begun = written = time.perf_counter()
    with progress(problem.steps, spec.label) as bar:
        bar.update(step)
        while step < problem.steps:
            loss = -problem.objective(step).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step % problem.steps_per_record and step < problem.steps:
                continue
            history.append({"step": step, **problem.record()})
            bar.update(step - bar.n)
            _check_finite(history[-1], spec)
            now = time.perf_counter()
            if now - written > SECONDS_BETWEEN_CHECKPOINTS and step < problem.steps:
                checkpoint = {
                    "model": problem.model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "problem": problem.state(),
                    "random": _random_state(device),
                    "history": history,
                    "seconds": seconds + now - begun,
                    "step": step,
                }
                folder.save("checkpoint.pt", checkpoint)
                written = now
    return history, seconds + time.perf_counter() - begun


def _check_finite(line: dict[str, float], spec: Spec) -> None:
    for name, value in line.items():
        if not math.isfinite(value):
            causes = f"lr {spec.lr} may be too large, or log_prob not finite somewhere"
            raise TrainingError(f"{spec.label}: {name} became {value} by step {line['step']}: {causes}")


def run(spec: Spec, device: str = "cpu") -> Run:
    """Train what the spec says, or find it in the store.

    The store is keyed by everything that the result depends on, the code included. A run killed at any moment goes on
    from its last checkpoint and ends with exactly the figures of an undisturbed one. Of two processes that ask for
    the same run, one trains and the other waits.

    Args:
        spec: what to run.
        device: "cpu" or a CUDA device.

    Raises TrainingError where training diverges.
    """
    folder = Folder.of(spec, device)
    problem: Problem
    with _own_random_state(spec.seed, device):
        problem = PROBLEMS[spec.experiment](spec, device)
        weights = folder.load("weights.pt") if folder.result() else None
        if weights is None:
            with folder.lock():
                weights = folder.load("weights.pt") if folder.result() else None
                if weights is None:
                    history, seconds = _train(problem, folder, spec, device)
                    begun = time.perf_counter()
                    torch.manual_seed(spec.seed + 1)
                    problem.model.eval()
                    metrics = problem.metrics()
                    seconds += time.perf_counter() - begun
                    weights = problem.model.state_dict()
                    folder.save("weights.pt", weights)
                    folder.write_result({"metrics": metrics, "history": history, "seconds": seconds})
        result = folder.result()
        assert result is not None
        problem.model.load_state_dict(weights)
    problem.model.eval().requires_grad_(False)
    chain = problem.chain if isinstance(problem, Toy) else None
    return Run(spec, result["metrics"], result["history"], result["seconds"], problem.model, chain)


def find(spec: Spec, device: str = "cpu") -> bool:
    """Whether the store already has that run's result."""
    return Folder.of(spec, device).result() is not None
