"""Time of one training step of a toy, per model: the plain way in torch, this package, and JAX.

    python bench/toy.py [--method avo|elbo|both] [--models 64] [--json PATH]

A step is noise, forward, backward and Adam on energy D. What is compared, and how to read it, is in bench/README.md.
All contestants are built first, each in processes of its own, and are then measured in turns, so that a machine whose
load changes slows all of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import random
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from annealed_core import objectives
from annealed_core.chain import Chain
from annealed_core.compiled import compiled
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair
from annealed_core.optimiser import Adam
from annealed_core.results import machine, versions
from annealed_core.spec import Spec
from annealed_core.stack import stack
from annealed_core.system import cores, keep_memory
from annealed_core.targets import ENERGIES, linear_alphas
from annealed_core.toys import Toys

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

TARGET = ENERGIES["D"]
DIM = TARGET.dim
LEARNING_RATE, BETA1, BETA2, EPSILON = 1e-3, 0.9, 0.999, 1e-8
SCAN = 50  # steps that JAX compiles into one scan
CHUNK = 10  # the others are timed over multiples of so many steps
TOLERANCE = 1e-4
SIDES = ("forwards", "reverse")

#: Trains all its models for that many steps, and returns when they are done.
Train = Callable[[int], None]


@dataclass(frozen=True)
class Setting:
    """What all contestants train."""

    batch: int = 128
    transitions: int = 4
    hidden: int = 32


# The plain way: a module a kernel, torch.distributions, one model after another.


class Conditional(nn.Module):
    """A gated Gaussian conditional with a layer for each of its outputs."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden)
        self.mean = nn.Linear(hidden, dim)
        self.gate = nn.Linear(hidden, dim)
        self.scale = nn.Linear(hidden, dim)

    def forward(self, z: Tensor) -> Independent:
        h = torch.relu(self.hidden(z))
        gate = torch.sigmoid(self.gate(h))
        loc = gate * self.mean(h) + (1 - gate) * z
        scale = nn.functional.softplus(self.scale(h)) + 1e-6
        return Independent(Normal(loc, scale), 1)


class PlainModel(nn.Module):
    """T transitions and their reverses, from a standard normal base."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.batch = setting.batch
        self.forwards = nn.ModuleList(Conditional(DIM, setting.hidden) for _ in range(setting.transitions))
        self.reverse = nn.ModuleList(Conditional(DIM, setting.hidden) for _ in range(setting.transitions))
        self.base = Independent(Normal(torch.zeros(DIM), torch.ones(DIM)), 1)
        self.alphas = linear_alphas(setting.transitions).tolist()

    def elbo(self) -> Tensor:
        z = self.base.sample((self.batch,))
        value = -self.base.log_prob(z)
        for forward, reverse in zip(self.forwards, self.reverse, strict=True):
            q = forward(z)
            z_next = q.rsample()
            value = value + reverse(z_next).log_prob(z) - q.log_prob(z_next)
            z = z_next
        return value + TARGET.log_prob(z)

    def avo(self) -> Tensor:
        z = self.base.sample((self.batch,))
        value, log_f_before = torch.zeros(self.batch), self.base.log_prob(z)
        for forward, reverse, alpha in zip(self.forwards, self.reverse, self.alphas[1:], strict=True):
            z_before = z.detach()
            q = forward(z_before)
            z = q.rsample()
            log_f = alpha * TARGET.log_prob(z) + (1 - alpha) * self.base.log_prob(z)
            value = value + log_f + reverse(z).log_prob(z_before) - q.log_prob(z) - log_f_before
            log_f_before = log_f.detach()
        return value


def module_loop(n_models: int, method: str, setting: Setting) -> Train:
    models = [PlainModel(setting) for _ in range(n_models)]
    optimisers = [torch.optim.Adam(model.parameters(), lr=LEARNING_RATE) for model in models]

    def train(steps: int) -> None:
        for model, optimiser in zip(models, optimisers, strict=True):
            for _ in range(steps):
                optimiser.zero_grad()
                loss = -getattr(model, method)().mean()
                loss.backward()
                optimiser.step()

    return train


# JAX: the same mathematics, compiled. States are (dim, batch), so that vectors run along the samples: measured 1.5 to
# 2 times as fast as (batch, dim) on a CPU.


def jax_normal_log_prob(noise: Any, scale: Any) -> Any:
    return (-0.5 * noise**2 - jnp.log(scale) - 0.5 * math.log(2 * math.pi)).sum(0)


def jax_log_target(z: Any) -> Any:
    mixture: Any = TARGET.log_density
    centres, weights = mixture.centres.numpy(), mixture.weights.numpy()
    distance = sum((z[d] - centres[:, d, None]) ** 2 for d in range(DIM))
    log_height = np.log(weights)[:, None] - 0.5 * DIM * math.log(2 * math.pi * mixture.variance)
    return jax.nn.logsumexp(log_height - 0.5 / mixture.variance * distance, 0)


def jax_conditional(weights: Any, z: Any) -> tuple[Any, Any]:
    hidden = jax.nn.relu(weights["hidden.weight"] @ z + weights["hidden.bias"][:, None])
    outputs = weights["outputs.weight"] @ hidden + weights["outputs.bias"][:, None]
    move, gate, scale = jnp.split(outputs, 3)
    return z + jax.nn.sigmoid(gate) * (move - z), jax.nn.softplus(scale) + 1e-6


def jax_log_reverse(weights: Any, z: Any, z_next: Any) -> Any:
    loc, scale = jax_conditional(weights, z_next)
    return jax_normal_log_prob((z - loc) / scale, scale)


def jax_log_path(alpha: Any, z: Any) -> Any:
    return alpha * jax_log_target(z) + (1 - alpha) * jax_normal_log_prob(z, 1.0)


def jax_objective(weights: Any, noise: Any, method: str, at_once: bool) -> Any:
    """Values (batch,) of one model, for noise (T + 1, dim, batch).

    `at_once` computes what need not go transition by transition as one batch: faster for one model, slower for many.
    """
    n = len(noise) - 1
    alphas = [t / n for t in range(1, n + 1)]
    kernels = [jax.tree.map(lambda value, t=t: value[t], weights) for t in range(n)]
    z, before, after = noise[0], [], []
    value = -jax_normal_log_prob(z, 1.0)
    for kernel, fresh in zip(kernels, noise[1:], strict=True):
        before.append(jax.lax.stop_gradient(z) if method == "avo" else z)
        loc, scale = jax_conditional(kernel["forwards"], before[-1])
        z = loc + scale * fresh
        after.append(z)
        value -= jax_normal_log_prob(fresh, scale)
    if at_once:
        value += jax.vmap(jax_log_reverse)(weights["reverse"], jnp.stack(before), jnp.stack(after)).sum(0)
    else:
        for kernel, z, z_next in zip(kernels, before, after, strict=True):
            value += jax_log_reverse(kernel["reverse"], z, z_next)
    if method == "elbo":
        return value + jax_log_target(after[-1])
    if at_once:
        log_f = list(jax.vmap(jax_log_path)(jnp.array(alphas), jnp.stack(after)))
    else:
        log_f = [jax_log_path(alpha, z) for alpha, z in zip(alphas, after, strict=True)]
    return value + sum(log_f) - jax.lax.stop_gradient(sum(log_f[:-1]))


def jax_scan(n_models: int, method: str, setting: Setting) -> Train:
    many = n_models > 1
    shape = (setting.transitions + 1, DIM, setting.batch)
    objective = jax.value_and_grad(lambda weights, noise: -jax_objective(weights, noise, method, not many).mean())

    def step(state: Any, key: Any) -> tuple[Any, Any]:
        weights, mean, square, count = state
        loss, gradient = objective(weights, jax.random.normal(key, shape))
        count += 1
        mean = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, mean, gradient)
        square = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g**2, square, gradient)
        scale_mean, scale_square = 1 / (1 - BETA1**count), 1 / (1 - BETA2**count)

        def move(w: Any, m: Any, s: Any) -> Any:
            return w - LEARNING_RATE * m * scale_mean / (jnp.sqrt(s * scale_square) + EPSILON)

        return (jax.tree.map(move, weights, mean, square), mean, square, count), loss

    def chunk(state: Any, key: Any) -> tuple[Any, Any, Any]:
        key, fresh = jax.random.split(key)
        state, losses = jax.lax.scan(step, state, jax.random.split(fresh, SCAN))
        return state, key, losses

    def start(weights: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return weights, zeros, zeros, jnp.float32(0)

    models = [jax_weights(common_weights(reference_model(setting, seed))) for seed in range(n_models)]
    keys = jax.random.split(jax.random.key(0), n_models)
    if many:
        held = [jax.vmap(start)(jax.tree.map(lambda *values: jnp.stack(values), *models)), keys]
        compiled = jax.jit(jax.vmap(chunk))
    else:
        held = [start(models[0]), keys[0]]
        compiled = jax.jit(chunk)

    def train(steps: int) -> None:
        for _ in range(steps // SCAN):
            held[0], held[1], losses = compiled(*held)
        jax.block_until_ready((held, losses))

    return train


# This package: the two functions to change when its interface does.


def ours(n_models: int, method: str, setting: Setting) -> Train:
    """Train `n_models` models side by side, as the inner loop of `annealed_core.experiment` does."""
    shape = {"n_transitions": setting.transitions, "hidden": setting.hidden, "batch": setting.batch}
    specs = [
        Spec("toy", method, target=TARGET.name, lr=LEARNING_RATE, beta1=BETA1, seed=seed, steps=10**9, **shape)
        for seed in range(n_models)
    ]
    keep_memory()  # as experiment.train does
    problem = Toys(specs)
    optimiser = Adam(problem.model.parameters(), LEARNING_RATE, (BETA1, BETA2))
    done = 0

    def train(steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            loss = -problem.objective(done).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            done += 1
            if done % problem.steps_per_record == 0:
                problem.record()

    return train


def ours_compiled(n_models: int, method: str, setting: Setting) -> Train:
    """The same with $ANNEALED_COMPILE."""
    os.environ["ANNEALED_COMPILE"] = "1"
    return ours(n_models, method, setting)


def ours_check(
    method: str, model: nn.ModuleList, noise: Tensor, is_compiled: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values (batch,) and gradients of their mean, in the form of `common_weights`, from a stack of one model.

    model: T kernels of float32; noise: (T + 1, batch, dim).
    """
    stacked: Any = stack([model])
    chain = Chain(DiagonalGaussian(torch.zeros(1, DIM), torch.ones(1, DIM)), stacked)
    arguments = (linear_alphas(len(model)),) if method == "avo" else ()
    objective = getattr(objectives, method)
    objective = compiled(objective) if is_compiled else objective
    values = objective(chain, TARGET, *arguments, noise=noise.unsqueeze(2)).squeeze(1)
    values.mean().backward()
    gradients = {}
    for side, parts in zip(SIDES, (stacked.weights[:3], stacked.weights[3:]), strict=True):
        inner, outer, bias = (part.grad.squeeze(1) for part in parts)
        gradients |= {f"{side}.hidden.weight": inner[..., :-1], f"{side}.hidden.bias": inner[..., -1]}
        gradients |= {f"{side}.outputs.weight": outer, f"{side}.outputs.bias": bias.squeeze(-1)}
    return values, gradients


CONTESTANTS: dict[str, Callable[[int, str, Setting], Train]] = {
    "module loop": module_loop,
    "ours": ours,
    "ours, compiled": ours_compiled,
    "jax": jax_scan,
}


# Whether all compute the same.


def reference_model(setting: Setting, seed: int) -> nn.ModuleList:
    """The kernels of one model, as the package draws them."""
    torch.manual_seed(seed)
    return nn.ModuleList(GatedGaussianPair(DIM, setting.hidden) for _ in range(setting.transitions))


def common_weights(model: Any, gradient: bool = False) -> dict[str, Tensor]:
    """Weights, or their gradients, of any torch model here: "side.layer.name" -> (T, ...), outputs joined."""
    if isinstance(model, PlainModel):
        rows = {side: list(getattr(model, side)) for side in SIDES}
    else:
        rows = {side: [getattr(pair, side) for pair in model] for side in SIDES}

    def value(conditional: nn.Module, layers: Sequence[str], name: str) -> Tensor:
        parameters = [getattr(getattr(conditional, layer), name) for layer in layers]
        return torch.cat([p.grad if gradient else p.detach() for p in parameters])

    outputs = ("mean", "gate", "scale") if isinstance(model, PlainModel) else ("outputs",)
    layers = {"hidden": ("hidden",), "outputs": outputs}
    return {
        f"{side}.{layer}.{name}": torch.stack([value(conditional, parts, name) for conditional in row])
        for side, row in rows.items()
        for layer, parts in layers.items()
        for name in ("weight", "bias")
    }


def jax_weights(common: dict[str, Tensor]) -> Any:
    """The same as a tree of arrays, side -> layer.name -> (T, ...)."""
    tree: dict[str, Any] = {side: {} for side in SIDES}
    for name, value in common.items():
        side, rest = name.split(".", 1)
        tree[side][rest] = jnp.asarray(value.numpy())
    return tree


def plain_check(method: str, model: nn.ModuleList, setting: Setting, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    plain = PlainModel(setting)
    with torch.no_grad():
        for side in SIDES:
            for conditional, pair in zip(getattr(plain, side), model, strict=True):
                source = getattr(pair, side)
                conditional.hidden.load_state_dict(source.hidden.state_dict())
                for number, layer in enumerate((conditional.mean, conditional.gate, conditional.scale)):
                    layer.weight.copy_(source.outputs.weight[DIM * number : DIM * (number + 1)])
                    layer.bias.copy_(source.outputs.bias[DIM * number : DIM * (number + 1)])
    torch.manual_seed(seed)
    values = getattr(plain, method)()
    values.mean().backward()
    return values, common_weights(plain, gradient=True)


def jax_check(method: str, model: nn.ModuleList, noise: Tensor, at_once: bool) -> tuple[Tensor, dict[str, Tensor]]:
    fresh = jnp.asarray(noise.mT.numpy())
    weights = jax_weights(common_weights(model))
    values = jax_objective(weights, fresh, method, at_once)
    gradient = jax.grad(lambda weights: jax_objective(weights, fresh, method, at_once).mean())(weights)
    common = {f"{s}.{name}": torch.tensor(np.asarray(v)) for s in SIDES for name, v in gradient[s].items()}
    return torch.tensor(np.asarray(values)), common


def check(methods: Sequence[str], setting: Setting) -> dict[str, float]:
    """The largest error of values and gradients against `annealed_core.objectives` in float64, of each contestant.

    Errors are relative to the largest value, or to the largest gradient of the same parameter.
    """
    errors: dict[str, float] = {}
    for method in methods:
        model = reference_model(setting, 0)
        torch.manual_seed(1)  # the same noise as the plain model draws from this seed
        loc, scale = torch.zeros(setting.batch, DIM), torch.ones(setting.batch, DIM)
        noise = torch.stack([torch.normal(loc, scale) for _ in range(setting.transitions + 1)])
        contestants = {
            "module loop": lambda: plain_check(method, model, setting, 1),  # noqa: B023
            "ours": lambda: ours_check(method, model, noise),  # noqa: B023
            "ours, compiled": lambda: ours_check(method, model, noise, True),  # noqa: B023
        }
        if jax:
            contestants["jax"] = lambda: jax_check(method, model, noise, False)  # noqa: B023
            contestants["jax, one model"] = lambda: jax_check(method, model, noise, True)  # noqa: B023
        exact = reference_model(setting, 0).double()
        chain = Chain(DiagonalGaussian(torch.zeros(DIM).double(), torch.ones(DIM).double()), exact)
        arguments = (linear_alphas(setting.transitions),) if method == "avo" else ()
        expected = getattr(objectives, method)(chain, TARGET, *arguments, noise=noise.double())
        expected.mean().backward()
        expected_gradient = common_weights(exact, gradient=True)
        for name, compute in contestants.items():
            values, gradient = compute()
            pairs = [(values.detach(), expected.detach())]
            pairs += [(gradient[key], expected_gradient[key]) for key in expected_gradient]
            errors[f"{method}, {name}"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return errors


# Processes: every contestant has its own, which wait while others are measured.


@dataclass
class Entry:
    """A contestant with the number of models, shared out over processes with so many threads each."""

    contestant: str
    models: int
    processes: int = 1
    threads: int = 1
    rounds: list[float] = field(default_factory=list)  # microseconds per model and step

    @property
    def name(self) -> str:
        return f"{self.contestant}, {self.models} model{'s' * (self.models > 1)}"

    @property
    def chunk(self) -> int:
        """Steps are timed in multiples of so many."""
        return SCAN if self.contestant == "jax" else CHUNK

    @property
    def place(self) -> str:
        return f"{self.processes} x {self.threads}"

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def serve(connection: Any, barrier: Any, entry: Entry, setting: Setting) -> None:
    """A worker process: build, then train whenever told to, and say when that began and ended."""
    os.environ["NPROC"] = str(entry.threads)  # what XLA makes its thread pool by
    os.environ["JAX_PLATFORMS"] = "cpu"
    torch.set_num_threads(entry.threads)
    torch.manual_seed(os.getpid())
    train: Train
    connection.send(None)
    while True:
        try:
            order, value = connection.recv()
        except (EOFError, KeyboardInterrupt):  # whoever started this process is gone
            return
        try:
            if order == "build":
                train = CONTESTANTS[entry.contestant](entry.models // entry.processes, value, setting)
                train(entry.chunk)  # compiles, allocates
                connection.send(None)
            else:
                barrier.wait(60)
                begun = time.perf_counter()
                train(value)
                connection.send((begun, time.perf_counter()))
        except Exception:
            connection.send(RuntimeError(f"{entry.name}:\n{traceback.format_exc()}"))


class Team:
    """The worker processes of one entry."""

    def __init__(self, entry: Entry, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.entry, self.steps = entry, entry.chunk
        self.barrier = context.Barrier(entry.processes)  # must live until the processes have it
        self.connections = []
        for _ in range(entry.processes):
            here, there = context.Pipe()
            context.Process(target=serve, args=(there, self.barrier, entry, setting), daemon=True).start()
            there.close()
            self.connections.append(here)
        self.answers()  # one team after another: starting all at once would load the machine for nothing

    def order(self, order: str, value: Any) -> list[Any]:
        for connection in self.connections:
            connection.send((order, value))
        return self.answers()

    def answers(self) -> list[Any]:
        try:
            answers = [connection.recv() for connection in self.connections]
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"{self.entry.name}: a process ended before it answered") from error
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def microseconds(self) -> float:
        """Per model and step, from when the first process begins to when the last one ends."""
        spans = self.order("train", self.steps)
        wall = max(end for _, end in spans) - min(begin for begin, _ in spans)
        return 1e6 * wall / (self.entry.models * self.steps)

    def calibrate(self, seconds: float) -> None:
        """Choose the number of steps so that one measurement takes about so long."""
        self.microseconds()
        per_chunk = 1e-6 * self.microseconds() * self.entry.models * self.entry.chunk
        self.steps = self.entry.chunk * max(1, round(seconds / per_chunk))


def entries(n_models: int) -> list[Entry]:
    """All that is measured; "both cores in use" are those with as many processes as there are cores."""
    n = cores()
    found = [Entry("module loop", 1), Entry("module loop", n, n), Entry("ours", 1), Entry("ours", n_models)]
    found += [Entry("ours", n_models, n), Entry("ours, compiled", 1), Entry("ours, compiled", n_models, n)]
    if n > 1:
        found.insert(1, Entry("module loop", 1, 1, n))
    if jax:
        found += [Entry("jax", 1), Entry("jax", n_models, n)]
        found += [Entry("jax", 1, 1, n), Entry("jax", n_models, 1, n)] if n > 1 else []
    unique = {(e.contestant, e.models, e.processes, e.threads): e for e in found}
    return list(unique.values())


def measure(method: str, teams: Sequence[Team], seconds: float, rounds: int) -> list[Entry]:
    """Measure all teams in turns."""
    for team in teams:
        team.order("build", method)
        team.entry.rounds, team.steps = [], team.entry.chunk
        team.calibrate(seconds / rounds)
    for number in range(rounds):
        for team in random.Random(number).sample(teams, len(teams)):
            team.entry.rounds.append(team.microseconds())
    return [team.entry for team in teams]


def references(found: Sequence[Entry]) -> tuple[Entry, Entry | None]:
    """What others are compared with: one model of the module loop at a time, and JAX, each at its fastest."""
    loops = [e for e in found if e.contestant == "module loop" and e.processes == 1]
    compiled = [e for e in found if e.contestant == "jax"]
    fastest = lambda group: min(group, key=lambda e: e.median)
    return fastest(loops), fastest(compiled) if compiled else None


def table(method: str, found: Sequence[Entry]) -> str:
    loop, compiled = references(found)
    lines = [
        f"{method.upper()}: microseconds per model and step, and how many times as fast as the references (*)",
        f"{'':24}{'processes':>12}{'':>31}{'times as fast as':>22}",
        f"{'':24}{'x threads':>12}{'median':>10}{'least - most':>21}{'module loop*':>14}{'jax*':>8}",
    ]
    for entry in found:
        mark = "*" if entry in (loop, compiled) else ""
        spread = f"{min(entry.rounds):.1f} - {max(entry.rounds):.1f}"
        against = f"{compiled.median / entry.median:.2f}" if compiled else ""
        lines.append(
            f"{entry.name + mark:24}{entry.place:>12}{entry.median:10.1f}{spread:>21}"
            f"{loop.median / entry.median:14.2f}{against:>8}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of one training step of a toy, per model.")
    parser.add_argument("--models", type=int, default=64, help="trained side by side (default 64)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--transitions", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="to measure each contestant, over all rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--method", choices=("avo", "elbo", "both"), default="both")
    parser.add_argument("--only", choices=CONTESTANTS, nargs="+", help="contestants to measure beside the module loop")
    parser.add_argument("--json", type=Path, help="write the measurements there")
    arguments = parser.parse_args()
    if arguments.models < 2 or arguments.models % cores():
        parser.error(f"--models must be a multiple of the {cores()} cores, and at least 2, got {arguments.models}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    setting = Setting(arguments.batch, arguments.transitions, arguments.hidden)
    methods = ("avo", "elbo") if arguments.method == "both" else (arguments.method,)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    known = versions() | ({"jax": jax.__version__} if jax else {})
    print(f"{machine()}; load before {load}; " + ", ".join(f"{k} {v}" for k, v in known.items()))
    if not jax:
        print("jax is not installed, and left out")
    errors = check(methods, setting)
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    if wrong:
        raise SystemExit(f"not the values and gradients of annealed_core.objectives: {wrong}")
    print(f"values and gradients agree with annealed_core.objectives, largest error {max(errors.values()):.0e}:")
    print("  " + "; ".join(errors))

    measured = {"module loop", *(arguments.only or CONTESTANTS)}
    teams = [Team(entry, setting) for entry in entries(arguments.models) if entry.contestant in measured]
    rows = []
    for method in methods:
        found = measure(method, teams, arguments.seconds, arguments.rounds)
        print(f"\n{table(method, found)}", flush=True)
        loop, compiled = references(found)
        for entry in found:
            ratios = {"module loop": loop.median / entry.median} | (
                {"jax": compiled.median / entry.median} if compiled else {}
            )
            rows.append({"method": method, **asdict(entry), "median": entry.median, "times_as_fast_as": ratios})
    if arguments.json:
        content = {
            "machine": machine(),
            "versions": known,
            "validation": __debug__,
            "load_before": load,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "setting": asdict(setting) | {"target": TARGET.name, "models": arguments.models},
            "errors": errors,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
