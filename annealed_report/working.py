"""Kernels that earn their keep: a search for a chain with which HVI beats the VAE, and AVO judged with that chain.

`chains` looks for it on the validation images in short training; `working` trains VAE, HVI, HVI-AVO and IAF with the
chain that the committed records of `chains` chose, in fresh seeds. Where no chain has a bound of 0.3 nats more than the
VAE's, `working` is empty, and that is the finding.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from annealed_core.dais import Leapfrog
from annealed_core.flows import IAF
from annealed_core.kernels import Gated, Residual
from annealed_core.objectives import AVO, ELBO
from annealed_core.running.mnist import Mnist
from annealed_core.schedules import Linear
from annealed_core.vae import Independent
from annealed_report import results
from annealed_report.comparison import select

#: Ten epochs of 20,000 images, in which beta rises from 0.2 to 1 in two fifths of the 3,130 steps.
SHORT: dict[str, Any] = {"train_images": 20_000, "epochs": 10, "nll_images": 1000}
WARM_UP = Linear(0.2, 6.4e-4)
PLAIN = Independent(norm=False)

#: The chains that are tried. A decoder with batch normalisation is seen as it is in evaluation mode.
CHAINS: dict[str, dict[str, Any]] = {
    "gated, near the identity": {"kernel": Gated(hidden=40, start="identity"), "n_transitions": 5},
    "gated, torch's weights": {"kernel": Gated(hidden=40), "n_transitions": 5},
    "residual": {"kernel": Residual(hidden=40), "n_transitions": 5},
    "residual, near the identity": {"kernel": Residual(hidden=40, start="identity"), "n_transitions": 5},
    "two, residual, near the identity": {"kernel": Residual(hidden=200, start="identity"), "n_transitions": 2},
    "Langevin, T = 5": {"kernel": Leapfrog(0.1, 0.01), "n_transitions": 5, "decoder": PLAIN},
    "leapfrog, T = 2": {"kernel": Leapfrog(0.1, 0.9), "n_transitions": 2, "decoder": PLAIN},
    "leapfrog, T = 5": {"kernel": Leapfrog(0.1, 0.9), "n_transitions": 5, "decoder": PLAIN},
    "leapfrog, T = 5, batch normalisation": {"kernel": Leapfrog(0.1, 0.9), "n_transitions": 5},
    "leapfrog, T = 10": {"kernel": Leapfrog(0.1, 0.9), "n_transitions": 10, "decoder": PLAIN},
}
SMALLEST = 0.3  # nats of bound that a chain has to earn
LONGEST = 5  # transitions of a chain that may be chosen


def chains() -> list[Mnist]:
    """A VAE with each decoder, and HVI with each chain, in three seeds."""
    fields: list[dict[str, Any]] = [{}, {"decoder": PLAIN}, *CHAINS.values()]
    return [Mnist(seed=seed, objective=ELBO(WARM_UP), **SHORT, **each) for seed in range(3) for each in fields]


def gains(runs: Sequence[Any]) -> dict[str, list[float]]:
    """By how much each chain's validation bound beats the VAE's with its decoder, seed by seed, in runs of `chains`."""

    def bounds(**fields: Any) -> list[float]:
        return [run.metrics["valid_elbo"] for run in select(runs, **fields)]

    found = {}
    for name, fields in CHAINS.items():
        ours, vae = bounds(**fields), bounds(kernel=None, decoder=fields.get("decoder", Independent()))
        if ours:
            found[name] = [a - b for a, b in zip(ours, vae, strict=True)]
    return found


def chosen_chain(runs: Sequence[Any]) -> str | None:
    """The chain that earns most, where that is 0.3 nats or more on average; else None.

    Of at most five transitions, as the paper's are: the longer one only shows what more of them would earn.
    """
    found = gains(runs)
    means = {name: statistics.fmean(found[name]) for name in found if CHAINS[name]["n_transitions"] <= LONGEST}
    best = max(means, key=lambda name: means[name], default=None)
    return best if best is not None and means[best] >= SMALLEST else None


def working(seeds: Sequence[int] = range(10, 16), **changes: Any) -> list[Mnist]:
    """VAE, HVI, HVI-AVO and IAF with the chain that `chains` chose, in six fresh seeds; none where there is none."""
    name = chosen_chain(results.load("full", "chains"))
    if name is None:
        return []
    chain, warm_up = CHAINS[name], Linear(0.2, 2e-4)
    decoder = {"decoder": chain.get("decoder", Independent())}
    lines: dict[str, dict[str, Any]] = {
        "VAE": {"objective": ELBO(warm_up)},
        "HVI": {**chain, "objective": ELBO(warm_up)},
        "HVI-AVO": {**chain, "objective": AVO(0.2, warm_up)},
        "IAF": {"kernel": IAF(hidden=40), "n_transitions": 5, "objective": ELBO(warm_up)},
    }
    shared = {"lr_schedule": "cosine", "bounds_images": 1000, **changes}
    return [Mnist(seed=seed, **{**decoder, **each, **shared}) for seed in seeds for each in lines.values()]


def of_line(runs: Iterable[Any], name: str) -> list[Any]:
    """The runs (or records) of `working` by VAE, HVI, HVI-AVO or IAF, in the order of their seeds."""

    def called(spec: Any) -> str:
        if spec.kernel is None:
            return "VAE"
        return "IAF" if isinstance(spec.kernel, IAF) else "HVI-AVO" if isinstance(spec.objective, AVO) else "HVI"

    return sorted((run for run in runs if called(run.spec) == name), key=lambda run: run.spec.seed)
