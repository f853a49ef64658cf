"""Kernels that earn their keep: a search for a chain with which HVI beats the VAE, and AVO judged with that chain.

`chains` looks for it on the validation images in short training; `working` trains VAE, HVI, HVI-AVO and IAF with the
chain that the committed records of `chains` chose, in fresh seeds, and `robust` HVI and HVI-AVO with several warm-ups.
Where no chain has a bound of 0.3 nats more than the VAE's, both are empty, and that is the finding. Elements of a
gradient are cut at 1 there, far above what they usually are, since those of a long leapfrog chain can burst: ten
transitions ended in NaN in each of three runs.
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
    name: {"kernel": kernel, "n_transitions": length, "decoder": decoder}
    for name, kernel, length, decoder in (
        ("gated, near the identity", Gated(hidden=40, start="identity"), 5, Independent()),
        ("gated, torch's weights", Gated(hidden=40), 5, Independent()),
        ("residual", Residual(hidden=40), 5, Independent()),
        ("residual, near the identity", Residual(hidden=40, start="identity"), 5, Independent()),
        ("two, residual, near the identity", Residual(hidden=200, start="identity"), 2, Independent()),
        ("Langevin, T = 5", Leapfrog(0.1, 0.01), 5, PLAIN),
        ("leapfrog, T = 2", Leapfrog(0.1, 0.9), 2, PLAIN),
        ("leapfrog, T = 5", Leapfrog(0.1, 0.9), 5, PLAIN),
        ("leapfrog, T = 5, batch normalisation", Leapfrog(0.1, 0.9), 5, Independent()),
    )
}
SMALLEST = 0.3  # nats of bound that a chain has to earn


def chains() -> list[Mnist]:
    """A VAE with each decoder, and HVI with each chain, in three seeds."""
    fields: list[dict[str, Any]] = [{}, {"decoder": PLAIN}, *CHAINS.values()]
    return [Mnist(seed=seed, objective=ELBO(WARM_UP), **SHORT, **each) for seed in range(3) for each in fields]


def bounds(runs: Sequence[Any], **fields: Any) -> list[float]:
    """The validation bounds of runs with these fields, in nats, in the order of their seeds."""
    return [run.metrics["valid_elbo"] for run in select(runs, **fields)]


def gains(runs: Sequence[Any]) -> dict[str, list[float]]:
    """By how much each chain's validation bound beats the VAE's with its decoder, seed by seed, in runs of `chains`."""
    found = {}
    for name, fields in CHAINS.items():
        ours, vae = bounds(runs, **fields), bounds(runs, kernel=None, decoder=fields["decoder"])
        if ours:
            found[name] = [a - b for a, b in zip(ours, vae, strict=True)]
    return found


def chosen_chain(runs: Sequence[Any]) -> str | None:
    """Of the chains that earn 0.3 nats or more on average the one with the highest bound; else None.

    Not the one that earns most: with a worse decoder there is more to earn.
    """
    earning = [name for name, gained in gains(runs).items() if statistics.fmean(gained) >= SMALLEST]
    return max(earning, key=lambda name: statistics.fmean(bounds(runs, **CHAINS[name])), default=None)


def _chosen() -> dict[str, Any] | None:
    name = chosen_chain(results.load("full", "chains"))
    return None if name is None else CHAINS[name]


def working(seeds: Sequence[int] = range(10, 16), **changes: Any) -> list[Mnist]:
    """VAE, HVI, HVI-AVO and IAF with the chain that `chains` chose, in six fresh seeds; none where there is none."""
    chain, warm_up = _chosen(), Linear(0.2, 2e-4)
    if chain is None:
        return []
    decoder = {"decoder": chain["decoder"]}
    lines: dict[str, dict[str, Any]] = {
        "VAE": {"objective": ELBO(warm_up)},
        "HVI": {**chain, "objective": ELBO(warm_up)},
        "HVI-AVO": {**chain, "objective": AVO(0.2, warm_up)},
        "IAF": {"kernel": IAF(hidden=40), "n_transitions": 5, "objective": ELBO(warm_up)},
    }
    shared = {"lr_schedule": "cosine", "batch": 128, "clip": 1.0, "nll_images": 1000, "bounds_images": 1000, **changes}
    found = [Mnist(seed=seed, **{**decoder, **each, **shared}) for seed in seeds for each in lines.values()]
    return [spec if spec.seed == seeds[0] else spec.replace(annealed_images=0) for spec in found]  # minutes a run


#: Corners of the grid of warm-ups of page 04: where beta starts, and what a step adds.
CORNERS = [Linear(start, rate) for start in (0.0, 0.8) for rate in (6.4e-4, 1.28e-2)]


def robust() -> list[Mnist]:
    """HVI and HVI-AVO with that chain at every corner, in short training and three seeds."""
    chain = _chosen()
    objectives = [each(corner) for corner in CORNERS for each in (ELBO, lambda beta: AVO(0.2, beta))]
    shared: dict[str, Any] = {"lr_schedule": "cosine", "batch": 128, "clip": 1.0, **SHORT}
    return [Mnist(seed=s, objective=o, **chain, **shared) for s in range(20, 23) for o in objectives] if chain else []


def of_line(runs: Iterable[Any], name: str) -> list[Any]:
    """The runs (or records) of `working` or `robust` by VAE, HVI, HVI-AVO or IAF, in the order of their seeds."""

    def called(spec: Any) -> str:
        if spec.kernel is None:
            return "VAE"
        return "IAF" if isinstance(spec.kernel, IAF) else "HVI-AVO" if isinstance(spec.objective, AVO) else "HVI"

    return sorted((run for run in runs if called(run.spec) == name), key=lambda run: run.spec.seed)
