"""Results: figures of long runs, committed with the report.

A reader sees them beside what a short run just computed. `results/<profile>/<name>.json` is a list of records {spec,
metrics, seconds, machine, versions, date, commit, code}, some with a history; `spec` is the description's JSON, `code`
the state of the code that computed it. `make record` writes them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from annealed_core.description import from_json, own_objects, to_json
from annealed_core.fit import maximise
from annealed_core.running.code import code_version
from annealed_core.running.experiment import Run
from annealed_core.running.system import cores, replace_file

ROOT = Path(__file__).parents[1]
_PARTS = re.compile(r'{"(\w+)":{')
FOLDER = ROOT / "results"
#: Studies whose records keep one line of a history out of so many; the others keep none.
HISTORIES = {"long": 10, "collapse": 1, "folded_line": 8, "posterior_alone": 1}
HISTORIES |= {"convolved": 1, "convolved_latents": 1}
_JUDGED = ("elbo", "log_z", "ess", "total_variation", "mode_shares")
_EARNED = ("kernels_earn", "kernels_earn_se", "kernels_move")
#: Studies of hundreds of runs, and the metrics of theirs that are kept.
METRICS: dict[str, tuple[str, ...]] = {"tuning": ("total_variation",), "tuned": _JUDGED + _EARNED}
METRICS |= {"starts": _JUDGED + _EARNED, "robustness": ("nll", "nll_samples", "nll_images", "elbo", "kl", "best_epoch")}
_COMPARED = ("log_z_error_2000", "ess", "elbo", "eubo", "mode_error", "modes_found", "mean_error", "sd_error")
METRICS["which_method"] = (*_COMPARED, "energy_distance", "coverage", "evaluations_training", "evaluations_sampling")
_ENERGIES = ("objectives", "kernels", "length", "initialisation", "momentum", "compute", "wide_base")
METRICS |= dict.fromkeys(_ENERGIES, (*_JUDGED, *_EARNED, "log_z_error_2000", "mode_masses"))
METRICS |= {"grid": (*METRICS["length"], "gaps"), "ring8": (*METRICS["length"], "log_z_100", "ess_100")}

#: What runs say of themselves and no page reads: it is not recorded.
UNREAD = {"kl_forward", "kl_reverse", "latent_information", "information_images", "log_z_se"}
UNREAD |= {"coverage_by_digit", "coverage_k", "coverage_images"}
UNREAD |= {"information_ceiling", "mutual_information", "mutual_information_se", "mean_kl_se"}
UNREAD |= {"aggregate_entropy", "aggregate_entropy_se", "aggregate_gaussian_entropy", "aggregate_kl", "aggregate_kl_se"}

#: Studies whose records come from more than one state of the code, and what that means for their tables. All others
#: are of one state each, so that what is paired within them differs in the methods alone.
MIXED = {
    "mnist": "several states of the code: at each seed HVI, HVI-AVO and AVO in a fifth of the steps share one, whereas "
    "VAE, flows and IWAE come from others, so that differences to them may hold what changed in between",
    "regime": "two states of the code: the VAE with another warm-up, and HVI-AVO from torch's initial weights at "
    "weights 0.5 and 1, come from the later one",
    "schedules": "two states of the code: HVI-AVO on learned paths comes from the later one",
    "best": "two states of the code: the ring of eight comes from the later one; nothing in it is paired",
    "which_method": "three states of the code: the two samplers, judged by ten sets of samples as the others are, and "
    "UHA on many-well, whose steps are bounded more closely, come from later ones",
    "initialisation": "two states of the code: one run by the ELBO comes from another than the other 119",
}


@dataclass(frozen=True)
class Record:
    """A committed result: what a `Run` says of itself without its weights, and where it was made."""

    spec: Any
    metrics: dict[str, Any]
    seconds: float
    machine: str
    versions: dict[str, str]
    date: str
    commit: str
    code: str
    history: Sequence[dict[str, float]] = ()


def machine() -> str:
    """The processor and the number of cores, without the name of the computer."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {cores()} core{'s' * (cores() > 1)}"


def versions() -> dict[str, str]:
    """Versions of Python and torch."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def commit() -> str:
    """The commit that the code is at, in short; see `provenance`."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def record(profile: str, name: str, runs: Sequence[Run]) -> None:
    """Add the runs to `results/<profile>/<name>.json`, in place of older records of the same descriptions.

    Of their histories one line out of so many as `HISTORIES` says is kept too, the last one among them.

    Only `make record` does so, by setting $ANNEALED_RECORD: whoever just looks at a full run changes no committed file.
    Raises ValueError for a run with an object of the user's own, which could not be read back.
    """
    if not os.environ.get("ANNEALED_RECORD"):
        return
    for run in runs:
        for field, own in own_objects(run.spec).items():
            raise ValueError(f"{field} must be a description of ours, to be recorded, got {own!r}")
    path, every = _path(profile, name), HISTORIES.get(name)
    known = {from_json(line["spec"]): line for line in _lines(path)}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = {"machine": machine(), "versions": versions(), "date": today, "commit": commit()}
    for run in runs:
        kept = set(METRICS.get(name, run.metrics)) - UNREAD
        metrics = {metric: value for metric, value in run.metrics.items() if metric in kept}
        new: dict[str, Any] = {"metrics": metrics, "seconds": round(run.seconds, 1), **made}
        new["code"] = code_version(run.spec, maximise)
        if every:
            new["history"] = run.history[::-1][::every][::-1]
        old = known.setdefault(run.spec, new)
        if _text(_rounded(old["metrics"])) != _text(_rounded(metrics)):
            known[run.spec] = new
        elif "history" in new:  # a run found again keeps the date and commit it was made at
            old["history"] = new["history"]
    specs = sorted(known, key=lambda spec: json.dumps(to_json(spec)))
    texts = (_text({**_rounded(known[spec]), "spec": to_json(spec)}) for spec in specs)
    replace_file(path, ("[\n" + ",\n".join(texts) + "\n]\n").encode())


def complete(name: str) -> None:
    """Take a study that is done from the records of those begun to those of the full profile."""
    _path("full", name).parent.mkdir(parents=True, exist_ok=True)
    _path("begun", name).replace(_path("full", name))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    """Numbers to seven significant digits: all that float32 has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def load(profile: str, name: str) -> list[Record]:
    """The committed records of that profile, an empty list where there are none."""
    import_module("annealed_report.studies")  # where every description is known by its name
    return [Record(**{**line, "spec": from_json(line["spec"])}) for line in _lines(_path(profile, name))]


def _lines(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _path(profile: str, name: str) -> Path:
    return Path(os.environ.get("ANNEALED_RESULTS") or FOLDER) / profile / f"{name}.json"


def states(records: Sequence[Record]) -> list[str]:
    """The states of the code that made the records.

    A run's code is what its parts import, so that runs of one commit have as many codes as they have kinds of parts.
    """
    commits, codes = {found.commit for found in records}, {found.code for found in records}
    kinds = dict[tuple[str, frozenset[str]], set[str]]()
    for found in records:
        parts = frozenset(_PARTS.findall(_text(to_json(found.spec))))
        kinds.setdefault((found.commit, parts), set()).add(found.code)
    if len(commits) < len(codes) and all(len(each) == 1 for each in kinds.values()):
        return [f"commit {commit}" for commit in sorted(commits)]
    return [f"code {code}" for code in sorted(codes)]


def provenance(records: Sequence[Record]) -> str:
    """One line: how many runs, with how many seeds, where and when they were made, by which states of the code."""
    if not records:
        return "not yet run"
    seeds, dates = len({found.spec.seed for found in records}), sorted({found.date for found in records})
    made_by = states(records)
    parts = [
        f"{len(records)} run{'s' * (len(records) > 1)}",
        f"{seeds} seed{'s' * (seeds > 1)}",
        "; ".join(sorted({found.machine for found in records})),
        "torch " + ", ".join(sorted({found.versions["torch"] for found in records})),
        dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        made_by[0] if len(made_by) == 1 else f"{len(made_by)} states of the code: {', '.join(made_by)}",
    ]
    return ", ".join(parts)


def importance_samples(records: Sequence[Record | Run]) -> str:
    """How many importance samples, of how many images, the likelihoods of MNIST runs were taken with."""
    found = {(each.metrics["nll_samples"], each.metrics["nll_images"]) for each in records}
    return "; ".join(f"{samples:,} on {images:,} images" for samples, images in sorted(found)) or "not yet run"
