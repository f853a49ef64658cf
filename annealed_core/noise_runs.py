"""The study of the noise model: which cases it compares, running them, and keeping what they gave.

`python -m annealed_core.noise_runs` runs them all and prints the table; with ANNEALED_RECORD=1 it also writes
results/full/noise_model.json.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from annealed_core.noise_study import Case, Result, judge, train
from annealed_core.store import code_version, root
from annealed_core.system import replace_file


def _folder(case: Case) -> Path:
    """Where the case's result is kept: named by a hash of all its fields, the code and torch's version."""
    everything = {**case.fields(), "code": code_version(case.experiment), "torch": torch.__version__}
    key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]
    return root() / f"noise_model-{case.method}-s{case.seed}-{key}"


def find(case: Case) -> Result | None:
    """The result in the store of runs, or None where there is none that can be read."""
    try:
        kept = json.loads((_folder(case) / "result.json").read_text(encoding="utf-8"))
        return Result(case, kept["metrics"], kept["seconds"], kept["history"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def groups(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases that can be trained side by side, in the order of their first ones."""
    found: dict[Case, list[Case]] = {}
    for case in dict.fromkeys(cases):
        found.setdefault(case.replace(seed=0, noise=1.0), []).append(case)
    return list(found.values())


def learn(cases: Sequence[Case], say: Callable[[str], None] | None = None) -> list[Result]:
    """Train and judge every case that the store of runs does not have yet; the results in the cases' order.

    What differs in seed and noise alone is trained side by side, and kept before the next such group begins: a stopped
    call goes on with the group that it was in, which takes a minute or two. `say` is told what was done.
    """
    done: dict[Case, Result] = {}
    for group in groups(cases):
        missing = [case for case in group if find(case) is None]
        if missing:
            begun = time.perf_counter()
            learners, histories = train(missing)
            metrics = [judge(learner) for learner in learners]
            seconds = (time.perf_counter() - begun) / len(missing)
            for case, own, history in zip(missing, metrics, histories, strict=True):
                kept = {"case": case.fields(), "metrics": own, "seconds": seconds, "history": history}
                replace_file(_folder(case) / "result.json", json.dumps(kept, indent=1).encode())
            if say is not None:
                say(f"{group[0].line}: {len(missing)} models in {seconds * len(missing):.0f} s")
        done |= {case: result for case in group if (result := find(case)) is not None}
    return [done[case] for case in cases]


#: What the study compares. The first three are the quick version's.
PLANS: tuple[dict[str, Any], ...] = (
    {"n_transitions": 0},
    {},
    {"method": "avo"},
    {"method": "calibrated", "avo_weight": 0.2},
    {"method": "calibrated", "avo_weight": 0.5},
    {"n_transitions": 0, "method": "iwae", "iwae_samples": 5},
    {"n_transitions": 0, "method": "iwae", "iwae_samples": 50},
    {"initialisation": "identity"},
    {"initialisation": "identity", "method": "avo"},
    {"base": "prior"},
    {"base": "prior", "method": "avo"},
    {"method": "iwae", "iwae_samples": 5},
    {"n_transitions": 0, "start": "truth"},
    {"start": "truth"},
    {"start": "truth", "method": "avo"},
    {"n_transitions": 1},
    {"n_transitions": 8},
    {"n_transitions": 8, "method": "avo"},
    {"start": "truth", "hold": 2000},
    {"start": "truth", "hold": 2000, "method": "avo"},
    {"start": "truth", "hold": 2000, "base": "prior"},
    {"start": "truth", "hold": 2000, "base": "prior", "method": "avo"},
    {"initialisation": "identity", "method": "calibrated", "avo_weight": 0.5},
    {"steps": 10_000},
)


def cases_of(
    plans: Sequence[dict[str, Any]] = PLANS,
    noises: Sequence[float] = (0.1, 0.3),
    seeds: Sequence[int] = tuple(range(10)),
    **fields: Any,
) -> list[Case]:
    """Every plan with every true noise and seed; `fields` are those of `Case` that all share."""
    return [Case(**{"noise": n, "seed": s, **fields, **plan}) for plan in plans for n in noises for s in seeds]


def metrics_of(runs: Sequence[Any], noise: float, **plan: Any) -> list[dict[str, float]]:
    """The metrics of those runs or records that a plan made at that true noise, in the order of their seeds."""
    (group,) = groups(cases_of([plan], (noise,)))
    return [run.metrics for run in sorted(runs, key=lambda run: run.spec.seed) if run.spec in group]


def main() -> None:
    """Run the whole study, record it where $ANNEALED_RECORD says so, and print its table."""
    from annealed_core import results
    from annealed_core.comparison import interval, of_specs

    torch.set_num_threads(1)
    cases = cases_of()
    found = learn(cases, say=lambda text: print(text, flush=True))
    results.record("full", "noise_model", found, every=4)
    for noise in sorted({case.noise for case in cases}):
        print(f"\nnoise {noise}")
        for group in groups([case for case in cases if case.noise == noise]):
            own = [result.metrics for result in of_specs(found, group)]
            columns = ("tilt", "noise_ratio", "loss", "gap", "posterior_share", "chain_share", "two_modes")
            values = "  ".join(f"{name} {interval([m[name] for m in own]).text(3)}" for name in columns)
            print(f"{group[0].line:48s} {values}")


if __name__ == "__main__":
    main()
