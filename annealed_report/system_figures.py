"""What page 10 shows of the other systems: rows of its tables, and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from annealed_core.decoders import LocallyMasked, s_curve
from annealed_core.running.mnist import Mnist
from annealed_core.schedules import value_at
from annealed_report.comparison import paired, select
from annealed_report.plotting import COLOURS, DARK, intervals, panels
from annealed_report.seed_systems import (
    CATEGORIES,
    DISENTANGLING,
    ITERATIONS,
    KEPT,
    RATES,
    STARTS,
    STEPS,
    TRAINED,
    VARIANTS,
    rises,
)
from annealed_report.statistics import Interval, interval
from annealed_report.tables import Row, compared, mean

#: The fields by which the runs of a variant are found.
BY_VARIANT: dict[str, dict[str, Any]] = {name: {"objective": objective} for name, objective in VARIANTS.items()}
BY_VARIANT |= {name: {"objective": objective} for name, (_, objective) in CATEGORIES.items()}


def _mean(runs: Sequence[Any], metric: str) -> Interval | None:
    return mean(run.metrics[metric] for run in runs if metric in run.metrics)


# ---- iterative inference


def stages(runs: Sequence[Any]) -> Figure:
    """What the bound lacks of the best Gaussian after each iteration, seed by seed, and what an encoder's lacks of it.

    The last iteration's is known of the 200 images with a best Gaussian, the rise up to there of 1,000.
    """
    figure, ((axes,),) = panels(1, 1, 5.5, 3.4)
    own, encoders = (select(runs, model=TRAINED, iterations=n) for n in (ITERATIONS, 0))
    for run in own:
        bounds = np.array(run.metrics["stage_elbos"]) - run.metrics["stage_elbos"][-1] - run.metrics["amortisation"]
        axes.plot(range(1, ITERATIONS + 1), bounds, "o-", color=COLOURS["more"], ms=4)
    encoder = -float(np.mean([run.metrics["amortisation"] for run in encoders]))
    for label, place, style in (("best Gaussian, each image", 0.0, "--"), ("an encoder", encoder, ":")):
        axes.axhline(place, ls=style, color=DARK, lw=1.2, label=label)
    axes.set_xticks(range(1, ITERATIONS + 1))
    axes.set_xlabel("iteration")
    axes.set_ylabel("less than the best Gaussian (nats)")
    axes.legend(loc="center right")
    return figure


def inferred(runs: Sequence[Any]) -> list[Row]:
    """Encoder and iterative inference, on the decoder that stands still and trained with one."""
    rows = []
    for name, iterations in (("encoder", 0), (f"{ITERATIONS} iterations", ITERATIONS)):
        alone, whole = (
            select(runs, model=TRAINED, iterations=iterations),
            select(runs, epochs=10, iterations=iterations),
        )
        rows.append(
            {"inference": name}
            | {"bound, decoder fixed": _mean(alone, "elbo"), "lacks of the best Gaussian": _mean(alone, "amortisation")}
            | {"NLL, trained together": _mean(whole, "nll"), "bound, together": _mean(whole, "elbo")}
            | {"minutes, together": mean(run.seconds / 60 for run in whole)}
        )
    return rows


# ---- variants of the bound


def varied(runs: Sequence[Any]) -> list[Row]:
    """Likelihood, bound and what the KL term holds, by variant."""
    rows = []
    for name, fields in BY_VARIANT.items():
        found = select(runs, **fields)
        row: Row = {"objective": name, "NLL": _mean(found, "nll"), "bound": _mean(found, "elbo")}
        row |= {"KL": _mean(found, "kl"), "total correlation": _mean(found, "correlation")}
        rows.append(row | {"dimension-wise KL": _mean(found, "dimensionwise"), "active": _mean(found, "active_units")})
    return rows


def means(runs: Sequence[Any], metric: str) -> dict[str, float]:
    """The mean of a metric by variant."""
    found = {name: _mean(select(runs, **fields), metric) for name, fields in BY_VARIANT.items()}
    return {name: each.mean for name, each in found.items() if each}


def annealed_terms() -> Figure:
    """Temperature, capacity and weights over training."""
    figure, ((first, second, third),) = panels(1, 3, 9.0, 2.5)
    steps = range(0, STEPS, 10)
    falling = CATEGORIES["categories, temperature 1 to .3"][1].temperature
    weight, capacity = VARIANTS["beta-TC to 6"].correlation, VARIANTS["capacity"]
    first.plot(steps, [value_at(falling, step) for step in steps], color=COLOURS["less"])
    first.set(title="temperature", ylim=(0, 1.05))
    second.plot(steps, [capacity.capacity * value_at(capacity.rise, step) for step in steps], color=COLOURS["less"])
    second.set(title="capacity C (nats)")
    third.plot(steps, [value_at(VARIANTS["beta to 4"].weight, s) for s in steps], color=COLOURS["more"], label="β")
    third.plot(steps, [value_at(weight, s) for s in steps], color=COLOURS["less"], label="of total correlation")
    third.set(title="weights")
    third.legend()
    for axes in (first, second, third):
        axes.set_xlabel("training step")
    return figure


def disentangled(runs: Sequence[Any]) -> Figure:
    """The mutual information gap on sprites, by variant."""
    figure, ((axes,),) = panels(1, 1, 6.5, 3.6)
    groups = {}
    for name in (*DISENTANGLING, "two capacities"):
        found = select(runs, **BY_VARIANT[name])
        groups[name] = {"gap": interval([run.metrics["gap"] for run in found])}
    intervals(axes, groups, "mutual information gap (0 to 1)")
    return figure


# ---- cycles of beta, and restarts of the learning rate


def crossed() -> Figure:
    """The two rises of beta and the two learning rates over training."""
    figure, axes = panels(1, 2, 8.0, 2.3)
    steps = range(0, STEPS, 5)
    for name, objective in rises(STARTS[0]).items():
        colour = COLOURS["linear" if name == "one rise" else "cyclical"]
        axes[0, 0].plot(steps, [value_at(objective.beta, step) for step in steps], color=colour, label=name)
    for name, rate in RATES.items():
        values = [1.0 if rate == "constant" else value_at(rate, step) for step in steps]
        axes[0, 1].plot(steps, values, color=COLOURS["less" if name == "constant" else "more"], label=name)
    for each, title in zip(axes[0], ("β", "learning rate, as a share of 0.001"), strict=True):
        each.set(title=title, xlabel="training step", ylim=(-0.05, 1.3))
        each.legend(ncols=2, loc="upper center")
    return figure


def cells(runs: Sequence[Any]) -> list[Row]:
    """KL term, likelihood and active units of every cell of the two by two."""
    rows = []
    for start in STARTS:
        for rise, objective in rises(start).items():
            for rate, schedule in RATES.items():
                found = select(runs, objective=objective, lr_schedule=schedule)
                row: Row = {"β from": start, "β": rise, "learning rate": rate, "KL": _mean(found, "kl")}
                rows.append(row | {"active": _mean(found, "active_units"), "NLL": _mean(found, "nll")})
    return rows


def cycled(runs: Sequence[Any], start: float, rate: str, metric: str = "kl") -> Interval | None:
    """What four cycles change against one rise, at one of `RATES`."""
    cells = [select(runs, objective=each, lr_schedule=RATES[rate]) for each in rises(start).values()]
    return paired(cells[1], cells[0], metric)


def restarted(runs: Sequence[Any], start: float, metric: str) -> Interval | None:
    """What restarts change against a constant rate, with one rise."""
    once = rises(start)["one rise"]
    ours, theirs = (select(runs, objective=once, lr_schedule=RATES[rate]) for rate in ("restarts", "constant"))
    return paired(ours, theirs, metric)


# ---- locally masked convolutions


def orders() -> Figure:
    """The eight orders, as paths through an image of 7 x 7 pixels."""
    figure, axes = panels(1, 8, 9.0, 1.4)
    for which, each in enumerate(axes[0]):
        path = s_curve(which, 7).flatten().argsort().numpy()
        each.plot(path % 7, path // 7, color=COLOURS["less"], lw=1.2)
        each.plot(path[0] % 7, path[0] // 7, "o", color=DARK, ms=4)
        each.set(xlim=(-0.7, 6.7), ylim=(6.7, -0.7), aspect="equal")
        each.axis("off")
    return figure


def convolved(runs: Sequence[Any]) -> list[Row]:
    """The decoder without latents, along 1, 2 and 8 orders."""
    rows, one = [], select(runs, decoder=LocallyMasked(16, 6, 1))
    for number in (1, 2, 8):
        found = select(runs, decoder=LocallyMasked(16, 6, number))
        row: Row = {"orders": number, "NLL": _mean(found, "nll"), "minutes": mean(r.seconds / 60 for r in found)}
        rows.append(row | {"− one order": paired(found, one, "nll") if number > 1 else None})
    return rows


def learned(runs: Sequence[Any]) -> Figure:
    """The bound of the validation images over epochs, along 1, 2 and 8 orders."""
    figure, ((axes,),) = panels(1, 1, 5.0, 3.0)
    for number, colour in ((1, COLOURS["vae"]), (2, COLOURS["more"]), (8, COLOURS["less"])):
        for run in select(runs, decoder=LocallyMasked(16, 6, number)):
            lines = [(line["epoch"], -line["elbo"]) for line in run.history]
            label = f"{number} order{'s' * (number > 1)}" if run.spec.seed == 0 else None
            axes.plot(*zip(*lines, strict=True), "o-", ms=3, lw=1.2, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="NLL (nats)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def kept(runs: Sequence[Any]) -> list[Row]:
    """The decoder with latents: what each way of training leaves in them."""
    found: Mapping[str, list[Mnist]] = {name: select(runs, objective=objective) for name, objective in KEPT.items()}
    plain, rows = found["no annealing"], list[Row]()
    for name, own in found.items():
        row: Row = {"trained by": name, "KL": _mean(own, "kl"), "active": _mean(own, "active_units")}
        row |= {"NLL": _mean(own, "nll"), "its change": None}
        if own is not plain:
            row["its change"] = compared(own, plain, "nll", -1, 0.2)
        rows.append(row)
    return rows
