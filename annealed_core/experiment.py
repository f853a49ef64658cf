"""Experiments: `run(spec)` trains, or finds what was trained before, and goes on where a killed run stopped."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from annealed_core import toys
from annealed_core.chain import Chain
from annealed_core.fields import check_parameter
from annealed_core.mnist import Mnist, auto_encoder
from annealed_core.optimiser import Adam
from annealed_core.problems import Problem
from annealed_core.products import products_in
from annealed_core.spec import Spec
from annealed_core.store import Folder
from annealed_core.system import keep_memory
from annealed_core.vae import VAE

__all__ = ["Run", "Spec", "TrainingError", "check_parameter", "run"]

SECONDS_BETWEEN_CHECKPOINTS = 2.0
PROBLEMS: dict[str, Callable[[Sequence[Spec], str], Problem]] = {"toy": toys.Toys, "mnist": Mnist}


class TrainingError(RuntimeError):
    """Training came to a value that is not finite; the message says where."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        spec: what was run.
        metrics: final figures, in nats where they are log-densities.
        history: lines recorded through training.
        seconds: time spent training and judging, over all interruptions; of runs trained side by side, the run's share.
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


def _train(problem: Problem, folder: Folder, label: str, device: str) -> tuple[list[list[dict[str, float]]], float]:
    """Train all models of a problem; their histories, and the seconds that it took over all interruptions."""
    spec, parameters = problem.specs[0], [p for p in problem.model.parameters() if p.requires_grad]
    histories: list[list[dict[str, float]]] = [[] for _ in problem.specs]
    if not parameters:  # a chain of length 0 has nothing to train
        return histories, 0.0
    lr: float = spec.get("lr")
    optimiser = Adam(parameters, lr, (spec.get("beta1"), 0.999))
    seconds, step = 0.0, 0
    saved = folder.load("checkpoint.pt")
    if saved is not None:
        problem.model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        problem.load(saved["problem"])
        histories, seconds, step = saved["histories"], saved["seconds"], saved["step"]
        _set_random_state(saved["random"], device)
    begun = written = time.perf_counter()
    with progress(problem.steps, label) as bar:
        bar.update(step)
        while step < problem.steps:
            if spec.lr_schedule == "cosine":
                optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / problem.steps))
            with products_in(spec.precision):
                loss = -problem.objective(step).sum()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            step += 1
            if len(problem.failures) == len(problem.specs):
                break
            if step % problem.steps_per_record and step < problem.steps:
                continue
            for number, line in enumerate(problem.record()):
                histories[number].append({"step": step, **line})
                _check_finite(problem, number, histories[number][-1])
            bar.update(step - bar.n)
            now = time.perf_counter()
            if now - written > SECONDS_BETWEEN_CHECKPOINTS:  # the last one too: judging may still fail
                checkpoint = {
                    "model": problem.model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "problem": problem.state(),
                    "random": _random_state(device),
                    "histories": histories,
                    "seconds": seconds + now - begun,
                    "step": step,
                }
                folder.save("checkpoint.pt", checkpoint)
                written = now
    return histories, seconds + time.perf_counter() - begun


def _check_finite(problem: Problem, number: int, line: dict[str, float]) -> None:
    """Note a model as failed whose record is not finite."""
    spec = problem.specs[number]
    for name, value in line.items():
        if not math.isfinite(value) and number not in problem.failures:
            causes = f"lr {spec.lr} may be too large, or log_prob not finite somewhere"
            problem.failures[number] = f"{name} became {value} by step {line['step']}: {causes}"


def _bounds(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: metrics[name] for name in ("elbo", "log_z", "nll") if metrics.get(name) is not None}


def train(specs: Sequence[Spec], device: str = "cpu") -> None:
    """Train side by side those of the specs that the store lacks; runs that fail are kept as failed.

    Args:
        specs: one, or as many as `stack_key` says can be stacked.
        device: "cpu" or a CUDA device.
    """
    keep_memory()
    asked = {Folder.of(spec, device): spec for spec in specs}
    with ExitStack() as held:
        for folder in sorted(asked, key=lambda folder: folder.path):  # in the same order everywhere: no deadlock
            held.enter_context(folder.lock())
        folders = [folder for folder in asked if not folder.is_done()]
        if not folders:
            return
        if Folder.of_stack(list(asked)).load("checkpoint.pt") is not None:
            folders = list(asked)  # stopped between two results: only whole stacks go on from their checkpoint
        missing = [asked[folder] for folder in folders]
        checkpoints = folders[0] if len(missing) == 1 else Folder.of_stack(folders)
        label = missing[0].label if len(missing) == 1 else f"{len(missing)} x {missing[0].method}"
        with _own_random_state(missing[0].seed, device):
            problem = PROBLEMS[missing[0].experiment](missing, device)
            histories, seconds = _train(problem, checkpoints, label, device)
            begun = time.perf_counter()
            metrics = problem.metrics()
            seconds = (seconds + time.perf_counter() - begun) / len(missing)
        for number, (folder, weights) in enumerate(zip(folders, problem.weights(), strict=True)):
            if folder.is_done():
                continue
            _check_finite(problem, number, {"step": problem.steps, **_bounds(metrics[number])})
            if number in problem.failures:
                folder.write_failure(f"{missing[number].label}: {problem.failures[number]}")
                continue
            folder.save("weights.pt", weights)
            folder.write_result({"metrics": metrics[number], "history": histories[number], "seconds": seconds})
        checkpoints.forget_checkpoint()


def stack_key(spec: Spec) -> Any:
    """What specs must share to be trained side by side; None where a run is trained alone."""
    if spec.experiment != "toy":
        return None
    shared = {name: value for name, value in spec.fields().items() if name not in ("seed", "target")}
    return (spec.target_object.dim, *sorted(shared.items()))


def run(spec: Spec, device: str = "cpu") -> Run:
    """Train what the spec says, or find it in the store.

    The store is keyed by everything that the result depends on, the code included. A run killed at any moment goes on
    from its last checkpoint and ends with exactly the figures of an undisturbed one. Of two processes that ask for
    the same run, one trains and the other waits.

    Args:
        spec: what to run.
        device: "cpu" or a CUDA device.

    Raises TrainingError where training fails, in a value that is not finite say; so it does again when asked again.
    """
    folder = Folder.of(spec, device)
    result, weights = folder.result(), folder.load("weights.pt")
    if result is None or weights is None:
        train([spec], device)
        result, weights = folder.result(), folder.load("weights.pt")
    if result is None or weights is None:
        raise TrainingError(folder.failure() or f"{spec.label}: {folder.path} can't be read")
    model: nn.Module
    with _own_random_state(spec.seed, device):
        if spec.experiment == "toy":
            chain = toys.restore(spec, weights, device)
            model = cast(nn.ModuleList, chain.kernels)
        else:
            chain, model = None, auto_encoder(spec)
            model.load_state_dict(weights)
            model = model.to(device).eval().requires_grad_(False)
    return Run(spec, result["metrics"], result["history"], result["seconds"], model, chain)


def find(spec: Spec, device: str = "cpu") -> bool:
    """Whether the store already has that run's result."""
    return Folder.of(spec, device).result() is not None
