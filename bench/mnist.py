"""Time of an epoch of MNIST: a plain loop in torch, this package, and the matrix products alone.

    python bench/mnist.py [--methods vae hvi avo] [--batches 64 256] [--both] [--json PATH]

An epoch is 50,000 images; it is measured over some of its steps and scaled. What is compared, and how to read it, is in
bench/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal
from torch.utils.data import DataLoader, Subset

from annealed_core import data, evidence, objectives
from annealed_core.fields import METHODS
from annealed_core.mnist import Mnist, auto_encoder, images
from annealed_core.optimiser import Adam
from annealed_core.products import linear, products_in
from annealed_core.results import machine, versions
from annealed_core.spec import Spec
from annealed_core.system import cores, keep_memory
from annealed_core.vae import PIXELS

try:
    from annealed_core import likelihood
except ImportError:
    likelihood = None

EPOCH = data.TRAIN_SIZE
LATENTS, WIDTH = 40, 300
TEST_IMAGES, TEST_SAMPLES = 10_000, 5_000  # of the likelihood to which what is measured is scaled
SOME_IMAGES, SOME_SAMPLES = 4, TEST_SAMPLES
DECODED_ROWS = 4096
TOLERANCE = 1e-4
PLAIN, PRODUCTS, FAST_PRODUCTS = "plain loop", "products, torch.mm", "products, linear"
HVI_PRODUCTS, FAST_HVI_PRODUCTS = "products of hvi, torch.mm", "products of hvi, linear"
MEDIUM = ", medium"  # after the name of a method: its products in bfloat16, as `Spec(precision="medium")` trains
OF_LIKELIHOOD = (PRODUCTS, FAST_PRODUCTS, HVI_PRODUCTS, FAST_HVI_PRODUCTS)

#: Inputs and outputs of the layers, in order, and whether their inputs need a gradient.
ENCODER = [(PIXELS, WIDTH, False), (WIDTH, WIDTH, True), (WIDTH, 2 * LATENTS, True)]
DECODER = [(LATENTS, WIDTH, True), (WIDTH, WIDTH, True), (WIDTH, PIXELS, True)]

#: Does that many units of work (steps, or passes over some images), and returns when they are done.
Work = Callable[[int], None]


# The plain way: a DataLoader, modules, torch.distributions, Adam as it comes.


def plain_network(*sizes: int) -> nn.Sequential:
    first, second, third, last = sizes
    return nn.Sequential(
        *(nn.Linear(first, second), nn.BatchNorm1d(second), nn.LeakyReLU()),
        *(nn.Linear(second, third), nn.BatchNorm1d(third), nn.LeakyReLU()),
        nn.Linear(third, last),
    )


class PlainVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = plain_network(PIXELS, WIDTH, WIDTH, 2 * LATENTS)
        self.decoder = plain_network(LATENTS, WIDTH, WIDTH, PIXELS)
        self.prior = Normal(torch.zeros(LATENTS), torch.ones(LATENTS))

    def loss(self, x: Tensor, beta: float) -> Tensor:
        loc, scale = self.encoder(x).chunk(2, -1)
        q = Normal(loc, nn.functional.softplus(scale) + 1e-4)
        z = q.rsample()
        log_likelihood = Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        return -(log_likelihood + beta * (self.prior.log_prob(z) - q.log_prob(z)).sum(-1)).mean()


def plain_loop(batch: int) -> Work:
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    images()  # so that the files are unpacked
    root = data._unpack(Path(os.environ.get("ANNEALED_DATA") or data.REPOSITORY_DATA).expanduser())
    loader = DataLoader(Subset(MNIST(root, transform=ToTensor()), range(EPOCH)), batch_size=batch, shuffle=True)
    model = PlainVAE()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def forever() -> Iterator[Tensor]:
        while True:
            for grey, _ in loader:
                yield grey

    batches, losses = forever(), []

    def train(steps: int) -> None:
        for _ in range(steps):
            x = torch.bernoulli(next(batches).flatten(1))
            optimiser.zero_grad()
            loss = model.loss(x, 1.0)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())

    return train


def check() -> float:
    """The relative error of the plain loop's loss and gradients against this package's, for equal weights and noise."""
    vae, plain = auto_encoder(Spec("mnist", "vae")), PlainVAE()
    x = images()[2][:64]
    with torch.no_grad():
        for mine, theirs in zip(plain.parameters(), vae.parameters(), strict=True):
            mine.copy_(theirs)
    torch.manual_seed(0)
    loss = plain.loss(x, 0.5)
    torch.manual_seed(0)
    noise = torch.normal(torch.zeros(1, 64, LATENTS), torch.ones(1, 64, LATENTS))
    expected = -objectives.beta_elbo(vae.posterior(x), vae.joint(x), 0.5, noise=noise).mean()
    for each in (loss, expected):
        each.backward()
    pairs = [(loss, expected), *((a.grad, b.grad) for a, b in zip(plain.parameters(), vae.parameters(), strict=True))]
    # Batch normalisation takes away the biases before it: their gradients are rounding errors.
    pairs = [(a, b) for a, b in pairs if b.abs().max() > 1e-4]
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


# This package, as experiment.train does it.


def ours(method: str, batch: int) -> Work:
    keep_memory()
    method, precision = method.removesuffix(MEDIUM), "medium" if method.endswith(MEDIUM) else "highest"
    problem = Mnist([Spec("mnist", method, batch=batch, epochs=1000)])
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    optimiser = Adam(parameters, 1e-3, (0.9, 0.999))
    done = 0

    def train(steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            with products_in(precision):
                loss = -problem.objective(done).sum()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            done += 1

    return train


def ours_likelihood(method: str) -> Work:
    """One unit is SOME_SAMPLES samples for each of SOME_IMAGES images."""
    keep_memory()
    model, x = auto_encoder(Spec("mnist", method)).eval(), images()[2][:SOME_IMAGES]

    @torch.no_grad()
    def estimate(times: int) -> None:
        for _ in range(times):
            if likelihood is not None:
                likelihood.importance_sampling(model, x, SOME_SAMPLES)
            else:
                evidence.importance_sampling(model.posterior(x), model.joint(x), SOME_SAMPLES)

    return estimate


# The matrix products alone.


def training_products(batch: int, fast: bool) -> Work:
    """The products of a step of the VAE: outputs, gradients of the weights, of the inputs where they are needed."""
    calls: list[Callable[[], Any]] = []
    for size_in, size_out, needs_gradient in ENCODER + DECODER:
        x, weight, gradient = torch.randn(batch, size_in), torch.randn(size_out, size_in), torch.randn(batch, size_out)
        products = [(x, weight.t()), (gradient.t(), x), (gradient, weight)]
        for left, right in products if needs_gradient else products[:2]:
            calls.append(product(left, right, fast))
    return repeat(calls)


def likelihood_products(fast: bool, transitions: bool) -> Work:
    """The products of decoding DECODED_ROWS latents; with those of HVI's transitions there and back, if wanted."""
    sizes = [(size_in, size_out) for size_in, size_out, _ in DECODER]
    if transitions:
        for pair in auto_encoder(Spec("mnist", "hvi")).kernels:
            for conditional in (pair.forwards, pair.reverse):
                sizes += [
                    (layer.in_features, layer.out_features) for layer in (conditional.hidden, conditional.outputs)
                ]
    pairs = [(torch.randn(DECODED_ROWS, size_in), torch.randn(size_out, size_in)) for size_in, size_out in sizes]
    return repeat([product(x, weight.t(), fast) for x, weight in pairs])


def product(left: Tensor, right: Tensor, fast: bool) -> Callable[[], Any]:
    if fast:
        return lambda: linear(left, right.t())
    out = torch.empty(len(left), right.shape[1])
    return lambda: torch.mm(left, right, out=out)


def repeat(calls: Sequence[Callable[[], Any]]) -> Work:
    @torch.no_grad()
    def work(times: int) -> None:
        for _ in range(times):
            for call in calls:
                call()

    return work


# Processes: the plain loop has its own, so that nothing of ours changes how it allocates memory.


@dataclass
class Entry:
    """What is measured: `what` with a batch (None: the likelihood)."""

    what: str
    batch: int | None
    processes: int = 1
    threads: int = 1
    rounds: list[float] = field(default_factory=list)  # seconds per epoch, or per likelihood of the test set
    units: int = 1

    @property
    def scale(self) -> float:
        """Units in an epoch, or in the likelihood of the test set."""
        if self.batch is not None:
            return EPOCH / self.batch
        rows = DECODED_ROWS if self.what in OF_LIKELIHOOD else SOME_IMAGES * SOME_SAMPLES
        return TEST_IMAGES * TEST_SAMPLES / rows

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def build(what: str, batch: int | None) -> Work:
    if what in OF_LIKELIHOOD:
        fast, of_hvi = what in (FAST_PRODUCTS, FAST_HVI_PRODUCTS), what in (HVI_PRODUCTS, FAST_HVI_PRODUCTS)
        keep_memory()
        return likelihood_products(fast, of_hvi) if batch is None else training_products(batch, fast)
    if what == PLAIN:
        assert batch is not None
        return plain_loop(batch)
    return ours_likelihood(what) if batch is None else ours(what, batch)


def serve(connection: Any, barrier: Any, threads: int) -> None:
    """A worker process: build what it is asked for at first, then work, and say when that began and ended."""
    torch.set_num_threads(threads)
    torch.manual_seed(os.getpid())
    built: dict[tuple[str, int | None], Work] = {}
    while True:
        try:
            what, batch, units = connection.recv()
        except (EOFError, KeyboardInterrupt):  # whoever started this process is gone
            return
        try:
            if (what, batch) not in built:
                built[what, batch] = build(what, batch)
                built[what, batch](2)  # allocates
            barrier.wait(120)
            begun = time.perf_counter()
            built[what, batch](units)
            connection.send((begun, time.perf_counter()))
        except Exception:
            connection.send(RuntimeError(f"{what}, batch {batch}:\n{traceback.format_exc()}"))


class Team:
    """Processes that work at the same time, each with so many threads."""

    def __init__(self, processes: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.barrier, self.connections = context.Barrier(processes), []
        for _ in range(processes):
            here, there = context.Pipe()
            context.Process(target=serve, args=(there, self.barrier, threads), daemon=True).start()
            there.close()
            self.connections.append(here)

    def seconds(self, entry: Entry) -> float:
        """Wall time of a unit of work, from when the first process begins to when the last one ends."""
        for connection in self.connections:
            connection.send((entry.what, entry.batch, entry.units))
        answers = [connection.recv() for connection in self.connections]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        wall = max(end for _, end in answers) - min(begin for begin, _ in answers)
        return wall / (entry.units * len(answers))


def measure(entries: Sequence[Entry], seconds: float, rounds: int) -> None:
    """Measure all in turns, in an order that changes."""
    kinds = dict.fromkeys((entry.what == PLAIN, entry.processes, entry.threads) for entry in entries)
    teams = {kind: Team(*kind[1:]) for kind in kinds}
    team = lambda entry: teams[entry.what == PLAIN, entry.processes, entry.threads]
    for entry in entries:
        entry.units = 3
        entry.units = max(1, round(seconds / rounds / (team(entry).seconds(entry) * entry.processes)))
    for number in range(rounds):
        for entry in random.Random(number).sample(entries, len(entries)):
            entry.rounds.append(team(entry).seconds(entry) * entry.scale)


# What is printed.


def table(entries: Sequence[Entry]) -> str:
    lines = [f"{'':36}{'batch':>8}{'processes x threads':>21}{'seconds':>10}{'least - most':>18}"]
    for entry in entries:
        spread = f"{min(entry.rounds):.2f} - {max(entry.rounds):.2f}"
        what = entry.what if entry.batch is not None else f"likelihood, {entry.what}"
        team = f"{entry.processes} x {entry.threads}"
        lines.append(f"{what:38}{entry.batch or '':>6}{team:>21}{entry.median:10.2f}{spread:>18}")
    return "\n".join(lines)


def ratios(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """What is asked of this package: the ratio of medians, and the bound that it is to keep."""
    seconds = {(e.what, e.batch, e.processes): e.median for e in entries if e.threads == 1}
    threaded = {e.batch: e.median for e in entries if e.threads > 1}
    asked = [
        ("plain loop / vae", PLAIN, "vae", "at least", 3.0),
        ("vae / products, torch.mm", "vae", PRODUCTS, "at most", 3.0),
        ("vae / products, linear", "vae", FAST_PRODUCTS, "at most", 3.0),
        ("avo / hvi", "avo", "hvi", "at most", 2.2),
        (f"plain loop / vae{MEDIUM}", PLAIN, "vae" + MEDIUM, "at least", 3.0),
    ]
    asked_of_likelihood = [
        (f"likelihood, {method} / {reference}", method, reference, "at most", 2.0)
        for method, references in {"vae": OF_LIKELIHOOD[:2], "hvi": OF_LIKELIHOOD}.items()
        for reference in references
    ]
    found = []
    for batch, processes in dict.fromkeys((e.batch, e.processes) for e in entries):
        for name, above, below, side, bound in asked if batch is not None else asked_of_likelihood:
            if (above, batch, processes) in seconds and (below, batch, processes) in seconds:
                ratio = seconds[above, batch, processes] / seconds[below, batch, processes]
                held = ratio >= bound if side == "at least" else ratio <= bound
                place = {"batch": batch, "processes": processes}
                found.append({"ratio": name, **place, "value": ratio, "asked": f"{side} {bound:g}", "held": held})
    for what, batch, processes in seconds:  # seeds side by side, as a sweep trains them, against one after another
        if what in ("vae", "vae" + MEDIUM) and processes > 1 and batch is not None:
            place = {"batch": batch, "processes": processes}
            for name, loop in (("", seconds[PLAIN, batch, 1]), (" with as many threads as cores", threaded[batch])):
                ratio, name = loop / seconds[what, batch, processes], f"plain loop alone{name} / {what}, on all cores"
                found.append({"ratio": name, **place, "value": ratio, "asked": "at least 3", "held": ratio >= 3})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of an epoch of MNIST, and of the likelihood of its test set.")
    parser.add_argument("--methods", choices=METHODS["mnist"], nargs="+", default=list(METHODS["mnist"]))
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=4.0, help="to measure each contestant, over all rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--both", action="store_true", help="also with a process for each core, at the same time")
    parser.add_argument("--json", type=Path, help="write the measurements there")
    arguments = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print(f"{machine()}; load before {load}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    error = check()
    if not error < TOLERANCE:
        raise SystemExit(f"the plain loop's loss and gradients are not annealed_core's: relative error {error:.0e}")
    print(f"the plain loop's loss and gradients agree with annealed_core's, largest error {error:.0e}\n")

    medium = [method + MEDIUM for method in arguments.methods if method in ("vae", "hvi")]  # of the study `precision`
    contestants = [PLAIN, PRODUCTS, FAST_PRODUCTS, *arguments.methods, *medium]
    judged = [*OF_LIKELIHOOD, *(method for method in ("vae", "hvi") if method in arguments.methods)]
    entries = [
        Entry(what, batch, processes)
        for processes in dict.fromkeys([1, cores()] if arguments.both else [1])
        for batch in (*arguments.batches, None)
        for what in (contestants if batch is not None else judged)
    ]
    if arguments.both and cores() > 1:  # the plain loop as it comes: one model, all cores
        entries += [Entry(PLAIN, batch, 1, cores()) for batch in arguments.batches]
    measure(entries, arguments.seconds, arguments.rounds)
    found = ratios(entries)
    print(table(entries) + "\n")
    for each in found:
        where = f"batch {each['batch']}, " if each["batch"] else ""
        verdict = "" if each["held"] else "  NOT HELD"
        print(f"{each['ratio']} ({where}{each['processes']} x 1): {each['value']:.2f}, asked {each['asked']}{verdict}")
    if arguments.json:
        content = {
            "machine": machine(),
            "versions": versions(),
            "load_before": load,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "likelihood": "likelihood.importance_sampling" if likelihood else "evidence.importance_sampling",
            "error": error,
            "rows": [asdict(entry) | {"median": entry.median} for entry in entries],
            "ratios": found,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
