"""Results: figures of long runs, committed with the report.

A reader sees them beside what a short run just computed.
`results/<profile>/<name>.json` is a list of records {spec, metrics, seconds, machine, versions, date, commit, code},
some with a history.
`make record` writes them; `ANNEALED_RECORD=1 python -m annealed_core.noise_runs` writes noise_model.json.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from annealed_core.experiment import Run
from annealed_core.noise_study import Case, Result
from annealed_core.spec import Spec
from annealed_core.store import PACKAGE, code_version, describe
from annealed_core.system import cores, replace_file

FOLDER = PACKAGE.parent / "results"


@dataclass(frozen=True)
class Record:
    """A committed result: what a `Run` says of itself without its weights, and where it was made."""

    spec: Any  # a Spec, or the Case of a study of its own
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


def _commit() -> str:
    try:
        command = ["git", "-C", str(PACKAGE.parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def record(profile: str, name: str, runs: Sequence[Run | Result], every: int = 0) -> None:
    """Add the runs to `results/<profile>/<name>.json`, in place of older records of the same specs.

    With `every`, one line of their histories out of so many is kept too, the last one among them.

    Only `make record` does so, by setting $ANNEALED_RECORD: whoever just looks at a full run changes no committed file.
    Raises ValueError for a run with a target or schedule of one's own, which could not be read back.
    """
    if not os.environ.get("ANNEALED_RECORD"):
        return
    for run in runs:
        for field in ("target", "schedule"):
            if not isinstance(own := getattr(run.spec, field, None), str | None):
                raise ValueError(f"{field} must be one that has a name, to be recorded, got {own!r}")
    path = _folder() / profile / f"{name}.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    known = {json.dumps(old["spec"], sort_keys=True): old for old in records}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = {"machine": machine(), "versions": versions(), "date": today, "commit": _commit()}
    for run in runs:
        spec = describe(run.spec)
        new: dict[str, Any] = {"spec": spec, "metrics": run.metrics, "seconds": round(run.seconds, 1), **made}
        new["code"] = code_version(run.spec.experiment)
        if every:
            new["history"] = run.history[::-1][::every][::-1]
        old = known.setdefault(json.dumps(spec, sort_keys=True), new)
        if _text(old["metrics"]) != _text(run.metrics):
            known[json.dumps(spec, sort_keys=True)] = new
        elif "history" in new:  # a run found again keeps the date and commit it was made at
            old["history"] = new["history"]
    lines = ",\n".join(_text(known[each]) for each in sorted(known))
    replace_file(path, f"[\n{lines}\n]\n".encode())


def _text(value: Any) -> str:
    return json.dumps(_rounded(value), sort_keys=True)


def _rounded(value: Any) -> Any:
    """Numbers to seven significant digits: all that float32 has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def load(profile: str, name: str) -> list[Record]:
    """The committed records of that profile, an empty list where there are none."""
    path = _folder() / profile / f"{name}.json"
    if not path.exists():
        return []
    lines = json.loads(path.read_text(encoding="utf-8"))
    return [Record(**{**line, "spec": spec_of(line["spec"])}) for line in lines]


def spec_of(fields: dict[str, Any]) -> Spec | Case:
    """What a record's spec describes: a `Spec`, or the `Case` of the study of the noise model."""
    return Case.from_fields(fields) if fields.get("experiment") == Case.experiment else Spec(**fields)


def provenance(records: Sequence[Record]) -> str:
    """One line on how many runs there are, with which seeds, where and when they were made."""
    if not records:
        return "not yet run"
    seeds = len({found.spec.seed for found in records})
    dates = sorted({found.date for found in records})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    places = "; ".join(sorted({found.machine for found in records}))
    torches = ", ".join(sorted({found.versions["torch"] for found in records}))
    count = f"{len(records)} run{'s' * (len(records) > 1)}, {seeds} seed{'s' * (seeds > 1)}"
    return f"{count}, {places}, torch {torches}, {span}"


def importance_samples(records: Sequence[Record | Run]) -> str:
    """How many importance samples, of how many images, the likelihoods of MNIST runs were taken with."""
    found = {(each.metrics["nll_samples"], each.metrics["nll_images"]) for each in records}
    return "; ".join(f"{samples:,} on {images:,} images" for samples, images in sorted(found)) or "not yet run"


def _folder() -> Path:
    return Path(os.environ.get("ANNEALED_RESULTS") or FOLDER)
