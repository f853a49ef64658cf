"""What page 11 shows of AVO among its relatives: rows of its tables, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from annealed_core.nested import NVI, chosen, resampled, sequential
from annealed_report.comparison import select
from annealed_report.figures import draw_density, draw_samples
from annealed_report.plotting import intervals, panels
from annealed_report.statistics import Interval, interval, text
from annealed_report.tables import Row, mean
from annealed_report.which_method import BARS, BUDGETS, K8, METHODS, PUBLISHED, SAMPLERS, SAMPLES, line, of_method

TARGETS = {"D": "D", "ring8": "ring of 8", "gmm40": "GMM-40", "funnel": "funnel-10"}
TARGETS |= {"many_well": "many-well-32", "logistic": "regression"}
assert list(TARGETS) == list(BUDGETS)
#: What is drawn: the metric, its name, and whether its logarithm colours it.
DRAWN = {
    "log_z_error_2000": ("error of log Z (nats)", True),
    "mode_error": ("mode-mass error", False),
    "ess": ("effective samples, a share", False),
}


#: What is trained as the page is built, on the ring of eight.
LIVE = ("ELBO", "AVO", "NVIR", "UHA", "SMC")


def live(steps: int, seed: int) -> list[Any]:
    """The experiments of these methods, in so many steps."""
    found = [(name, line(name, "ring8").replace(seed=seed)) for name in LIVE]
    return [spec if name in SAMPLERS else spec.replace(steps=steps) for name, spec in found]


@torch.no_grad()
def particles(axes: Axes, name: str, run: Any, n: int = 1000) -> None:
    """Draws of a trained chain over its target's contours, drawn anew on the way where that is how it is judged."""
    target, z = run.spec.target_object, run.chain.rsample(n).z[-1]
    if run.spec.resample:
        kept = sequential(run.chain, target, n, resample=run.spec.resample)
        z = chosen(kept.z, resampled(kept.log_weights))
    draw_density(axes, target, filled=False)
    draw_samples(axes, z, name.lower(), size=3)
    axes.set_title(name)


def seen(runs: Mapping[str, Any]) -> list[Row]:
    """What such runs are worth, and what they took."""
    shown = {"error of log Z": "log_z_error_2000", "effective": "ess", "mode-mass error": "mode_error"}
    took = {"evaluations, training": "evaluations_training", "… drawing": "evaluations_sampling"}
    return [
        {"method": name}
        | {label: f"{run.metrics[metric]:.3f}" for label, metric in shown.items()}
        | {label: f"{run.metrics[metric]:,}" for label, metric in took.items()}
        for name, run in runs.items()
    ]


def _mean(runs: Sequence[Any], metric: str) -> Interval | None:
    return mean(run.metrics[metric] for run in runs if run.metrics.get(metric) is not None)


def every(runs: Sequence[Any]) -> Figure:
    """Every method on every target: error of log Z, mode-mass error, effective samples; means over seeds."""
    import seaborn as sns

    figure, axes = panels(1, len(DRAWN), 10.0, 5.6, sharey=True)
    for each, (metric, (title, logarithm)) in zip(axes[0], DRAWN.items(), strict=True):
        found = [[_mean(of_method(runs, method, target), metric) for target in TARGETS] for method in METHODS]
        values = np.array([[math.nan if one is None else one.mean for one in row] for row in found])
        colours = np.log10(values) if logarithm else values if metric == "mode_error" else 1 - values
        written = [["" if math.isnan(v) else f"{v:.2g}".replace("0.", ".") for v in row] for row in values]
        style = {"cmap": "mako_r", "cbar": False, "annot_kws": {"size": 7}, "linewidths": 0.5}
        sns.heatmap(colours, annot=np.array(written), fmt="", ax=each, **style)
        each.set_title(title)
        each.set_xticklabels(TARGETS.values(), rotation=60, ha="right")
    axes[0, 0].set_yticklabels(METHODS, rotation=0)
    return figure


def ranked(runs: Sequence[Any]) -> Figure:
    """The methods by their error of log Z: the geometric mean over targets, seed by seed."""
    figure, ((axes,),) = panels(1, 1, 6.5, 4.6)
    groups = {}
    for method in METHODS:
        by_target = [of_method(runs, method, target) for target in TARGETS]
        logs = [
            sum(math.log10(max(1e-4, run.metrics["log_z_error_2000"])) for run in seed) / len(seed)
            for seed in zip(*by_target, strict=True)
        ]
        groups[method] = {"error": interval(logs)}
    best_first = dict(sorted(groups.items(), key=lambda item: item[1]["error"].mean))
    intervals(axes, best_first, "log10 of the error of log Z (nats), mean over targets")
    return figure


#: What each target stands for.
KINDS = {
    "D": "a few modes, two dimensions",
    "ring8": "eight modes in a ring",
    "gmm40": "forty modes, two dimensions",
    "funnel": "scales that differ, ten dimensions",
    "many_well": "two modes in each of 16 dimensions",
    "logistic": "a regression, one mode",
}


def error(runs: Sequence[Any], method: str, target: str) -> float:
    """The geometric mean over seeds of a method's error of log Z."""
    found = [max(1e-4, run.metrics["log_z_error_2000"]) for run in of_method(runs, method, target)]
    return math.exp(sum(map(math.log, found)) / len(found))


def nearest(runs: Sequence[Any], target: str, cheap: bool) -> str:
    """The method with the smallest error of log Z; with `cheap`, among those that evaluate each draw once."""
    once = lambda method: of_method(runs, method, target)[0].metrics["evaluations_sampling"] <= SAMPLES
    return min((m for m in METHODS if once(m) or not cheap), key=lambda method: error(runs, method, target))


def guide(runs: Sequence[Any]) -> list[Row]:
    """For each kind of target the methods that come closest, and AVO and the ELBO beside them."""
    rows = []
    for target, kind in KINDS.items() if runs else ():
        row: Row = {"a posterior with": kind}
        for label, cheap in (("closest of all", False), ("closest, a draw evaluated once", True)):
            best = nearest(runs, target, cheap)
            row[label] = f"{best}: {error(runs, best, target):.2g}"
        rows.append(row | {name: f"{error(runs, name, target):.2g}" for name in ("AVO", "ELBO")})
    return rows


def bars(runs: Sequence[Any]) -> list[Row]:
    """A trained chain on each of the harder targets, beside what was published."""
    rows = []
    for target in BARS:
        found = select(runs, target=target)
        published = "; ".join(f"{value:g} ({who})" for who, value in PUBLISHED.get(target, {}).items()) or "–"
        row: Row = {"target": TARGETS[target], "error of log Z": text(_mean(found, "log_z_error_2000"), 4)}
        row |= {"published": published, "ESS": _mean(found, "ess"), "mode-mass error": _mean(found, "mode_error")}
        took = [_mean(found, f"evaluations_{what}") for what in ("training", "sampling")]
        row["evaluations: training + drawing"] = " + ".join(f"{one.mean:,.0f}" for one in took if one) or None
        minutes = mean(run.seconds / 60 for run in found)  # seeds side by side share their time: no interval
        rows.append(row | {"minutes": f"{minutes.mean:.1f}" if minutes else None})
    return rows


#: Effective samples of 100 and log Z, of Zimmermann et al. 2021, table 1, NVI and NVIR on a linear path.
_RING = {("NVIR", 4): (99, 1.98), ("NVIR", 6): (98, 2.04), ("NVIR", 8): (97, 2.06), ("NVI", 8): (41, 2.06)}


def ring(runs: Sequence[Any]) -> list[Row]:
    """NVIR on the ring of eight with the published budget, and NVI at K = 8, beside what was published."""
    rows = []
    for (name, k), (ess, log_z) in _RING.items():
        found = select(runs, objective=NVI(resample=name == "NVIR"), n_transitions=k - 1)
        row: Row = {"method": name, "K": k, "ESS of 100": mean(100 * run.metrics["ess_100"] for run in found)}
        row |= {"published": ess, "log Z": _mean(found, "log_z_100"), "published log Z": log_z}
        rows.append(row | {"mode-mass error": _mean(found, "mode_error")})
    return rows


def equal_passes(runs: Sequence[Any]) -> list[Row]:
    """UHA, IWAE and the VAE going on alone, from one trained VAE."""
    rows = []
    for name, fields in K8.items():
        found = select(runs, **{"kernel": None, **fields})
        row: Row = {"method": name, "NLL": _mean(found, "nll"), "bound": _mean(found, "elbo")}
        rows.append(row | {"minutes": mean(run.seconds / 60 for run in found)})
    return rows
