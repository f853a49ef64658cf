"""The figures of page 04: schedules, what they change, and why a rise helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from annealed_core.schedules import SHAPES, Constant, Cyclical, Geometric, Linear
from annealed_report import figures
from annealed_report.annealing import CALLED, FAMILIES, MEASURES, in_use, shift
from annealed_report.claims import warmed
from annealed_report.comparison import mean_metric, select
from annealed_report.plotting import DARK, SCHEDULE_COLOURS, intervals, panels
from annealed_report.statistics import Interval
from annealed_report.studies import GRID, GRID_METHODS, RISES, SCHEDULED, method


def rises() -> Figure:
    """β over training: two readings of one configuration, and cycles in three shapes."""
    figure, ((left, right),) = panels(1, 2, 9, 2.9, sharey=True)
    steps = range(0, 25_001, 50)
    shown: dict[str, Any] = {"constant": Constant(), "linear": Linear(0.2, 2e-4), "geometric": Geometric(0.2, 2e-4)}
    for name, beta in shown.items():
        left.plot(steps, [beta(n) for n in steps], label=name, color=SCHEDULE_COLOURS[name])
    left.set(title="one rise, from 0.2", xlabel="step", ylabel="β", ylim=(0, 1.3), xticks=range(0, 25_001, 5000))
    left.legend(loc="lower right")
    steps = range(0, 40_001, 50)
    for shape, style in zip(SHAPES, ("-", "--", ":"), strict=True):
        cycle = Cyclical(40_000, 4, 0.5, shape)
        colour = SCHEDULE_COLOURS["cyclical"]
        right.plot(steps, [cycle(n) for n in steps], style, label=shape, color=colour)
    right.set(title="four cycles", xlabel="step", xticks=range(0, 40_001, 10_000), yticks=[0, 0.5, 1])
    right.legend(loc="upper center", ncols=3)
    return figure


def pruned(runs: Sequence[Any], seed: int = 0) -> Figure:
    """KL of each latent over training in one seed, without and with a rise; and in all seeds how many are in use."""
    figure, found = plt.subplot_mosaic("ab;cc", figsize=(6.5, 5.6), height_ratios=(1.5, 1))
    axes = [found[name] for name in "abc"]
    titles = {"constant": "KL, without a rise", "linear": "KL, with a rise"}
    for ax, name in zip(axes, titles, strict=False):
        (run,) = select(runs, objective=SCHEDULED[name], seed=seed)
        steps, kl = run.metrics["steps"][1:], np.array(run.metrics["latent_kl"][1:]).T
        order = np.argsort(-kl[:, -1])
        edges = [*steps, steps[-1] * 1.03]
        image = ax.pcolormesh(edges, np.arange(len(order) + 1), kl[order], vmin=0, vmax=1.5)
        ax.set(xscale="log", title=titles[name], xlabel="step", ylim=(len(order), 0), xlim=(steps[0], edges[-1]))
        ax.set_ylabel("latent, by its KL in the end" if name == "constant" else "")
        if name == "linear":
            ax.axvline(1250, color=DARK, lw=1, ls="--")
    figure.colorbar(image, ax=axes[:2], label="KL (nats)", shrink=0.8, extend="max")
    for name in ("constant", "linear"):
        own = [in_use(run) for run in select(runs, objective=SCHEDULED[name])]
        steps = sorted(own[0])[1:]
        counts = np.array([[sum(use[step]) for step in steps] for use in own])
        colour = SCHEDULE_COLOURS[name]
        axes[2].plot(steps, counts.mean(0), color=colour, label=CALLED[name])
        axes[2].fill_between(steps, counts.min(0), counts.max(0), color=colour, alpha=0.25, linewidth=0)
    axes[2].set(xscale="log", xlabel="step", ylabel="latents in use", ylim=(0, 41))
    axes[2].legend(loc="lower right")
    return figure


def _shown(found: Mapping[str, Mapping[str, Interval | None]]) -> dict[str, dict[str, Interval]]:
    return {group: {name: d for name, d in each.items() if d is not None} for group, each in found.items()}


def shifts(runs: Sequence[Any]) -> Figure:
    """NLL under each schedule less that without annealing, for VAE and HVI."""
    figure, ((axes,),) = panels(1, 1, 7, 3.4)
    found = {
        CALLED[name]: {m: shift(runs, m, name, "constant") for m in ("VAE", "HVI")}
        for name in SCHEDULED
        if name != "constant"
    }
    intervals(axes, _shown(found), "NLL − that without annealing (nats)", zero=True)
    return figure


def explores(runs: Sequence[Any]) -> Figure:
    """What a linear rise changes in latents in use, the aggregate's KL, and coverage, by method."""
    figure, (axes,) = panels(1, 3, 9, 2.9, sharey=True)
    for ax, label in zip(axes, ("latents in use", "aggregate's KL (nats)", "coverage"), strict=True):
        found = {m: {"change": warmed(runs, m, MEASURES[label][0])} for m in FAMILIES}
        intervals(ax, _shown(found), label, zero=True)
    return figure


def grid(runs: Sequence[Any]) -> Figure:
    """Mean NLL of each warm-up of the grid above the method's own best."""
    above = {}
    for name in GRID_METHODS:
        nll = [
            [mean_metric(runs, "nll", **method(name, Linear(start, rate))) for rate in GRID["rate"]]
            for start in GRID["start"]
        ]
        means = np.array([[np.nan if each is None else each.mean for each in line] for line in nll])
        above[name] = (means - means.min()).tolist()
    starts, rates = [f"{start:g}" for start in GRID["start"]], [f"{1e4 * rate:g}" for rate in GRID["rate"]]
    return figures.heat_maps(above, starts, rates, ("$\\beta_0$", "$10^4\\,\\gamma$", "NLL above the best (nats)"))


def kl_left(runs: Sequence[Any]) -> Figure:
    """KL of the posterior with an autoregressive decoder, on validation images by epoch and in the end by rise."""
    figure, ((left, right),) = panels(1, 2, 9, 3)
    for name in ("constant", "linear", "cyclical, linear"):
        kl = np.array([[line["kl"] for line in run.history] for run in select(runs, objective=RISES[name])]).mean(0)
        colour = SCHEDULE_COLOURS[name.partition(",")[0]]
        left.plot(range(1, len(kl) + 1), kl, ".-", color=colour, label=CALLED[name])
    left.set(xlabel="epoch", ylabel="KL (nats)", ylim=(0, None))
    left.legend()
    found = {CALLED[name]: {"KL": mean_metric(runs, "kl", objective=RISES[name])} for name in RISES}
    intervals(right, _shown(found), "KL after training (nats)")
    right.set_xlim(0)
    return figure
