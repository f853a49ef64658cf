"""Experiments: `run(spec)` trains, or finds what was trained before, and goes on where a killed run stopped.

What an experiment is, its description says: `density.Density`, `mnist.Mnist`, or another subclass of `Experiment`.
How it is trained, its `Problem` says; the loop is that of `fit`.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from annealed_core.chain import Chain
from annealed_core.description import Check, Choice, Description, Number, Positive, Whole, own_objects, to_json
from annealed_core.fit import adam, maximise
from annealed_core.running.code import code_version
from annealed_core.running.outcome import ChainDistribution, doubts, to_arviz
from annealed_core.running.store import Folder, key
from annealed_core.running.system import keep_memory, own_settings, seed_generators
from annealed_core.vae import VAE

SECONDS_BETWEEN_CHECKPOINTS = 2.0


class TrainingError(RuntimeError):
    """Training came to a value that is not finite; the message says where."""


class _Name(Check):
    takes = "a name of letters, digits, '.', '_' and '-'"

    def __call__(self, value: Any) -> str | None:
        return value if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,80}", value) else None


class _Rate(Choice):
    def __init__(self) -> None:
        super().__init__("constant", "cosine")
        self.takes += ", or a function of the step"

    def __call__(self, value: Any) -> Any:
        return value if callable(value) and not isinstance(value, type) else super().__call__(value)


class Problem(Protocol):
    """M models trained side by side, each by its own description."""

    module: nn.Module  # all that is trained, for checkpoints
    steps: int
    steps_per_record: int
    failures: dict[int, str]  # models whose training failed, and one line on why

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def values(self, step: int) -> Tensor:
        """The objective of each model at that step, to be maximised: (M,), in nats."""
        ...

    def record(self) -> list[dict[str, float]]:
        """A line of each model's history."""
        ...

    def metrics(self) -> list[dict[str, Any]]:
        """Each model's final figures."""
        ...

    def weights(self) -> list[dict[str, Tensor]]:
        """Each model's own weights."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights and optimiser: generators, say."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take a state that `state` gave."""
        ...


class Experiment(Description):
    """Everything that a run depends on; a subclass adds its fields.

    Attributes:
        seed: of weights, data order and noise.
        name: under which a run with an object of your own (a target, kernel, objective, schedule) is kept. What such an
            object computes can't be known from outside: without a name such a run is trained each time, with one the
            same name finds the same run.
        lr, lr_schedule, beta1, clip: Adam's learning rate, whether it stays, falls to 0 as a cosine or is multiplied by
            a function of the step, its first decay rate, and what each element of the gradient is cut off at; None for
            no cut.
    """

    seed: Annotated[int, Whole(0, 2**31 - 1)] = 0
    name: Annotated[str, _Name()] | None = None
    lr: Positive = 1e-3
    lr_schedule: Annotated[Any, _Rate()] = "constant"
    beta1: Annotated[float, Number(0, 1, open_high=True)] = 0.9
    clip: Positive | None = None

    by_name = True

    @property
    def label(self) -> str:
        """A short readable name, such as density-D-avo-s0."""
        raise NotImplementedError

    def stack_key(self) -> Hashable | None:
        """What descriptions must share to be trained side by side; None where a run is trained alone."""
        return None

    def compiles(self, device: str = "cpu") -> bool:
        """Whether `compile=True` makes a difference."""
        return False

    @classmethod
    def problem(cls, specs: Sequence[Self], device: str = "cpu", compile: bool = False) -> Problem:
        """What trains these, which share their `stack_key`."""
        raise NotImplementedError

    def restore(self, weights: dict[str, Tensor], device: str = "cpu") -> tuple[nn.Module, Chain | None]:
        """The trained modules, in evaluation mode and without gradients, and the chain where there is one for all."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse a name for what has one."""
        if self.name is not None and not own_objects(self):
            raise ValueError(f"impossible name {self.name!r}: a name is for objects of your own, and there are none")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        spec: what was run.
        metrics: final figures, in nats where they are log-densities.
        history: lines recorded through training.
        seconds: time spent training and judging, over all interruptions; of runs trained side by side, the run's share.
        model: the trained modules, in evaluation mode.
        chain: the trained chain; None where there is another for each batch, as `vae.posterior(x)` makes them.
    """

    spec: Any
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    seconds: float
    model: nn.Module
    chain: Chain | None

    @property
    def vae(self) -> VAE:
        """The auto-encoder of an MNIST run."""
        if not isinstance(self.model, VAE):
            raise AttributeError(f"a run of {type(self.spec).__name__} has no auto-encoder")
        return self.model

    @property
    def notes(self) -> list[str]:
        """Why its figures should not be trusted: Pareto k, ESS, bounds, log Z, grids that miss mass, lost modes.

        Modes are seen where the target declares its `modes`, centres and masses: of others that no draw has reached
        draws know nothing.
        """
        target = getattr(self.spec, "target_object", None)
        modes = getattr(target, "modes", None)
        return doubts(self.metrics, getattr(target, "log_normalizer", None), () if modes is None else modes[1].tolist())

    @property
    def distribution(self) -> ChainDistribution:
        """The chain as a distribution of torch: `sample`, `rsample`, and `log_prob` where all kernels are flows."""
        return ChainDistribution(self._chain())

    def to_arviz(self, draws: int = 1000, chains: int = 4) -> Any:
        """Draws for ArviZ: `posterior` with z, or the parameters that the target names, and their `log_weight`.

        The draws are the chain's own, independent and not weighted. Raises ImportError without ArviZ.
        """
        return to_arviz(self._chain(), self.spec.target_object, draws, chains)

    def _chain(self) -> Chain:
        if self.chain is None:
            raise AttributeError(f"a run of {type(self.spec).__name__} has a chain for each batch, and none for all")
        return self.chain


@dataclass(frozen=True)
class Trained:
    """What training gives, or `failure`, one line on why it gave nothing."""

    metrics: dict[str, Any]
    history: list[dict[str, float]]
    seconds: float
    weights: dict[str, Tensor]
    failure: str | None = None


def progress(total: int, description: str) -> tqdm:
    """A progress bar that vanishes when done, and is silent where $ANNEALED_PROGRESS is 0."""
    return tqdm(total=total, desc=description, leave=False, disable=os.environ.get("ANNEALED_PROGRESS") == "0" or None)


def folder_of(spec: Experiment, device: str = "cpu", compile: bool = False) -> Folder | None:
    """Where that run is kept; None where it is not: it has an object of the user's own, and no name."""
    if own_objects(spec) and spec.name is None:
        return None
    code = code_version(spec, maximise)
    label = re.sub(r"[^\w.-]", "_", spec.label)[:80]  # a target's name may be anything
    return Folder.of(label, key(to_json(spec, _own), code, device, compile and spec.compiles(device)))


def _own(value: Any) -> Any:
    """What stands for an object of the user's own in a key: its class, its `dim`, the fields of a description."""
    fields = value.fields() if isinstance(value, Description) else {}
    dim = Whole(1)(getattr(value, "dim", None))  # weights for another number of dimensions don't fit
    fields = fields if dim is None else {"dim": dim, **fields}
    return {"own": type(value).__qualname__, **{name: to_json(each, _own) for name, each in fields.items()}}


def stored(spec: Experiment, device: str = "cpu", compile: bool = False) -> Trained | None:
    """What the store has of that run, a failure too, or None."""
    folder = folder_of(spec, device, compile)
    return None if folder is None else _read(folder)


def _read(folder: Folder) -> Trained | None:
    failure = folder.failure()
    if failure is not None:
        return Trained({}, [], 0.0, {}, failure)
    result = folder.result()
    weights = None if result is None else folder.load("weights.pt")
    if result is None or weights is None:
        return None
    return Trained(result["metrics"], result["history"], result["seconds"], weights)


def _maximise(
    problem: Problem, specs: Sequence[Experiment], folder: Folder | None, label: str
) -> tuple[list[list[dict[str, float]]], float]:
    """Train all models of a problem; their histories, and the seconds that it took over all interruptions."""
    spec, parameters, histories = specs[0], problem.parameters(), [list[dict[str, float]]() for _ in specs]
    if not parameters:  # a chain of length 0 has nothing to train
        return histories, 0.0
    optimiser, seconds, first = adam(parameters, spec.lr, spec.beta1), 0.0, 0
    like = {"model": problem.module.state_dict(), "histories": [], "step": 0, "seconds": 0.0}
    saved = None if folder is None else folder.load("checkpoint.pt", like=like)
    if saved is not None:
        problem.module.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        problem.load(saved["problem"])
        histories, seconds, first = saved["histories"], saved["seconds"], saved["step"]
    begun = written = time.perf_counter()
    with progress(problem.steps, label) as bar:
        bar.update(first)

        def after(step: int) -> bool:
            nonlocal written
            if len(problem.failures) == len(histories):
                return True
            if step % problem.steps_per_record and step < problem.steps:
                return False
            for number, line in enumerate(problem.record()):
                histories[number].append({"step": step, **line})
                _check_finite(problem, number, histories[number][-1], spec.lr)
            bar.update(step - bar.n)
            now = time.perf_counter()
            # The last one too: judging may fail, and a stack whose results are only half written must go on as a whole.
            due = now - written > SECONDS_BETWEEN_CHECKPOINTS or (step == problem.steps and len(histories) > 1)
            if folder is not None and due:
                checkpoint = {
                    "model": problem.module.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "problem": problem.state(),
                    "histories": histories,
                    "seconds": seconds + now - begun,
                    "step": step,
                }
                folder.save("checkpoint.pt", checkpoint)
                written = now
            return False

        loop: dict[str, Any] = {"lr": spec.lr, "lr_schedule": spec.lr_schedule, "beta1": spec.beta1, "clip": spec.clip}
        maximise(problem.values, parameters, problem.steps, **loop, first=first, optimiser=optimiser, after=after)
    return histories, seconds + time.perf_counter() - begun


def _check_finite(problem: Problem, number: int, line: dict[str, Any], lr: float) -> None:
    """Note a model as failed whose figures are not finite."""
    for name, value in line.items():
        if isinstance(value, float) and not math.isfinite(value):
            causes = f"lr {lr} may be too large, or log_prob not finite somewhere"
            problem.failures.setdefault(number, f"{name} became {value} by step {line['step']}: {causes}")


def train(specs: Sequence[Experiment], device: str = "cpu", compile: bool = False) -> list[Trained]:
    """Train side by side those of the specs that the store lacks, and give what there is of all, failures included.

    Args:
        specs: one, or several that share their `stack_key`.
        device: "cpu" or a CUDA device.
        compile: let `torch.compile` write the code of a step, where the experiment offers it.
    """
    keep_memory()
    folders = [folder_of(spec, device, compile) for spec in specs]
    kept = [folder for folder in folders if folder is not None]
    with ExitStack() as held:
        for folder in sorted(set(kept), key=lambda folder: folder.path):  # in the same order everywhere: no deadlock
            held.enter_context(folder.lock())
        found = {n: trained for n, folder in enumerate(folders) if folder and (trained := _read(folder))}
        missing = [number for number in range(len(specs)) if number not in found]
        if not missing:
            return list(found.values())
        if len(kept) > 1 and Folder.of_stack(kept).load("checkpoint.pt") is not None:
            missing = list(range(len(specs)))  # stopped between two results: only whole stacks go on
        chosen, places = [specs[number] for number in missing], [folders[number] for number in missing]
        checkpoints = places[0] if len(places) == 1 or not kept else Folder.of_stack([p for p in places if p])
        label = chosen[0].label if len(chosen) == 1 else f"{len(chosen)} x {chosen[0].label.rpartition('-')[0]}"
        with own_settings(device):
            seed_generators(chosen[0].seed, device)
            problem = type(chosen[0]).problem(chosen, device, compile)
            histories, seconds = _maximise(problem, chosen, checkpoints, label)
            begun = time.perf_counter()
            weights = [{name: value.cpu() for name, value in each.items()} for each in problem.weights()]
            for model, each in enumerate(weights):
                if not all(value.isfinite().all() for value in each.values()):
                    problem.failures.setdefault(model, f"weights became not finite: lr {chosen[0].lr} may be too large")
            metrics = problem.metrics()
            seconds = (seconds + time.perf_counter() - begun) / len(chosen)
        for model, (number, spec) in enumerate(zip(missing, chosen, strict=True)):
            bounds = {name: metrics[model].get(name) for name in ("elbo", "log_z", "nll")}
            _check_finite(problem, model, {"step": problem.steps, **bounds}, spec.lr)
            failure = f"{spec.label}: {problem.failures[model]}" if model in problem.failures else None
            if number not in found:
                found[number] = Trained(metrics[model], histories[model], seconds, weights[model], failure)
                _write(folders[number], spec, found[number])
        for place in {*places, checkpoints}:
            if place is not None:
                place.forget_checkpoint()
    return [found[number] for number in range(len(specs))]


def _write(folder: Folder | None, spec: Experiment, trained: Trained) -> None:
    if folder is None:
        return
    if trained.failure is None:
        at_once = trained.seconds > 1  # else it is sooner made again, should the power fail, than the disk waited for
        folder.save("weights.pt", trained.weights, at_once)
        result = {"metrics": trained.metrics, "history": trained.history, "seconds": trained.seconds}
        folder.write_result(result, at_once)
    elif not own_objects(spec):  # one's own target may be mended, and keep its name
        folder.write_failure(trained.failure)


def keep(spec: Experiment, trained: Trained, device: str = "cpu", compile: bool = False) -> None:
    """Write into the store what another machine has trained, unless it is there."""
    folder = folder_of(spec, device, compile)
    if folder is not None:
        with folder.lock():
            if _read(folder) is None:
                _write(folder, spec, trained)


def finished(spec: Any, trained: Trained, device: str = "cpu") -> Run:
    """The run that training gave; TrainingError where it failed."""
    if trained.failure is not None:
        raise TrainingError(trained.failure)
    with own_settings(device):
        seed_generators(spec.seed, device)
        model, chain = spec.restore(trained.weights, device)
    return Run(spec, trained.metrics, trained.history, trained.seconds, model, chain)


def device_of(device: str | torch.device | None, here: bool = False) -> str:
    """A device in words, that of $ANNEALED_DEVICE or the CPU for None.

    Raises ValueError where it is none or, with `here`, where this machine has none.
    """
    said = str(os.environ.get("ANNEALED_DEVICE") or "cpu") if device is None else str(device)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", said):
        raise ValueError(f"unknown device {said!r}: choose cpu or cuda")
    kind, _, number = said.partition(":")
    count = torch.cuda.device_count() if here and kind == "cuda" else 0
    if here and kind == "cuda" and int(number or 0) >= count:
        choices = ", ".join(["cpu", *(f"cuda:{n}" for n in range(count))])
        raise ValueError(f"device {said!r} is not there: choose from {choices}, which torch finds on this machine")
    return said


def run(spec: Any, device: str | torch.device | None = None, compile: bool = False) -> Run:
    """Train what the spec says, or find it in the store.

    The store is keyed by everything that the result depends on, the code included. A run killed at any moment goes on
    from its last checkpoint and ends with exactly the figures of an undisturbed one. Of two processes that ask for
    the same run, one trains and the other waits. A run has random state and settings of torch of its own; in one
    process runs take turns.

    Args:
        spec: a `Density`, a `Mnist`, or another `Experiment`.
        device: "cpu" or a CUDA device; $ANNEALED_DEVICE unless given, and the CPU without that.
        compile: let `torch.compile` write the code of a step, where the experiment offers it: some ten seconds, and
            then a step in half the time or less. Its rounding is another, so that its runs are kept apart.

    Raises TrainingError where training fails, in a value that is not finite say; so it does again when asked again.
    """
    if not isinstance(spec, Experiment):
        raise TypeError(f"run takes an experiment such as Density(target='D') or Mnist(), got {spec!r}")
    device = device_of(device, here=True)
    trained = stored(spec, device, compile) or train([spec], device, compile)[0]
    return finished(spec, trained, device)
