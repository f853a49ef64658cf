"""Contestants in processes of their own, measured in turns: others' work on the machine then slows all of them."""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

#: Does that many units of work, and returns when they are done.
Work = Callable[[int], None]


@dataclass
class Entry:
    """A contestant, in so many processes at the same time with so many threads each.

    Attributes:
        name: what tables call it.
        build: a function of a module, called with the arguments in each process: it gives the work to be timed.
        scale: what the seconds of a unit in one process, shared over all of them, are multiplied by.
        chunk: units are done in multiples of so many.
        alone: a name for the processes, which entries of that name, processes and threads share.
    """

    name: str
    build: Callable[..., Work]
    arguments: tuple[Any, ...]
    processes: int = 1
    threads: int = 1
    scale: float = 1.0
    chunk: int = 1
    alone: str = ""
    rounds: list[float] = field(default_factory=list)
    units: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def place(self) -> str:
        return f"{self.processes} x {self.threads}"


def serve(connection: Any, barrier: Any, threads: int) -> None:
    """A worker process: build what it is asked for at first, then work, and say when that began and ended."""
    os.environ |= {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}  # what XLA makes its thread pool by
    torch.set_num_threads(threads)
    torch.manual_seed(os.getpid())
    built: dict[Any, Work] = {}
    while True:
        try:
            build, arguments, units, chunk = connection.recv()
        except (EOFError, KeyboardInterrupt):  # whoever started this process is gone
            return
        try:
            if (build, arguments) not in built:
                built[build, arguments] = build(*arguments)
                built[build, arguments](chunk)  # compiles, allocates
            barrier.wait(600)
            begun = time.perf_counter()
            built[build, arguments](units * chunk)
            connection.send((begun, time.perf_counter()))
        except Exception:
            connection.send(RuntimeError(f"{build.__name__}{arguments}:\n{traceback.format_exc()}"))


class Team:
    """Processes that work at the same time."""

    def __init__(self, processes: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.barrier, self.connections = context.Barrier(processes), []  # it must live until the processes have it
        for _ in range(processes):
            here, there = context.Pipe()
            context.Process(target=serve, args=(there, self.barrier, threads), daemon=True).start()
            there.close()
            self.connections.append(here)

    def seconds(self, entry: Entry) -> float:
        """Wall time of a unit of work, from when the first process begins to when the last one ends."""
        for connection in self.connections:
            connection.send((entry.build, entry.arguments, entry.units, entry.chunk))
        answers = [connection.recv() for connection in self.connections]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        wall = max(end for _, end in answers) - min(begin for begin, _ in answers)
        return wall / (entry.units * entry.chunk * len(answers))


def measure(entries: Sequence[Entry], seconds: float, rounds: int) -> None:
    """Measure all in turns, in an order that changes, so many seconds each over all rounds."""
    team_of = lambda entry: (entry.alone, entry.processes, entry.threads)
    teams = {kind: Team(*kind[1:]) for kind in dict.fromkeys(map(team_of, entries))}
    for entry in entries:
        teams[team_of(entry)].seconds(entry)
        each = teams[team_of(entry)].seconds(entry) * entry.processes * entry.chunk
        entry.units = max(1, round(seconds / rounds / each))
    for number in range(rounds):
        for entry in random.Random(number).sample(entries, len(entries)):
            entry.rounds.append(teams[team_of(entry)].seconds(entry) * entry.scale)


def table(entries: Sequence[Entry], unit: str) -> str:
    """Median and range of each."""
    lines = [f"{unit:34}{'processes x threads':>20}{'median':>10}{'least - most':>20}"]
    for entry in entries:
        spread = f"{min(entry.rounds):.2f} - {max(entry.rounds):.2f}"
        lines.append(f"{entry.name:34}{entry.place:>20}{entry.median:10.2f}{spread:>20}")
    return "\n".join(lines)


@dataclass
class Ratio:
    """A ratio of two medians, and the bound that it is to keep."""

    name: str
    above: Entry
    below: Entry
    side: str
    bound: float

    def __str__(self) -> str:
        held = self.value >= self.bound if self.side == "at least" else self.value <= self.bound
        verdict = "" if held else "  NOT HELD"
        return f"{self.name}: {self.value:.2f}, asked {self.side} {self.bound:g}{verdict}"

    @property
    def value(self) -> float:
        return self.above.median / self.below.median


def parser(description: str, seconds: float = 4.0, rounds: int = 7) -> argparse.ArgumentParser:
    """What every bench is asked: how long, in how many rounds, and where to write the measurements."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--seconds", type=float, default=seconds, help="to measure each contestant, over all rounds")
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--json", type=Path, help="write the measurements there")
    return found


def about() -> dict[str, Any]:
    """The machine, its load, and what runs on it."""
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return {
        "processor": f"{model}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def save(path: Path | None, machine: dict[str, Any], entries: Sequence[Entry], ratios: Sequence[Ratio]) -> None:
    """Every round as JSON, where that is wanted."""
    if path is not None:
        rows = [
            {k: v for k, v in asdict(entry).items() if k != "build"} | {"median": entry.median} for entry in entries
        ]
        found = [{"ratio": r.name, "value": r.value, "asked": f"{r.side} {r.bound:g}"} for r in ratios]
        content = {**machine, "rows": rows, "ratios": found}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
