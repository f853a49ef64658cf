"""What page 08 shows of the folded line: why the ELBO prefers a wrong model, rows of the tables, and the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from annealed_core.objectives import AVO, IWAE
from annealed_report.folded_line import (
    BY_AVO,
    BY_IWAE,
    EIGHT,
    GAUSSIAN,
    HELD,
    NEAR,
    PRIOR,
    TRUTH,
    LineModel,
    metrics_of,
)
from annealed_report.plotting import COLOURS, DARK, intervals, label_panel, panels
from annealed_report.statistics import interval, paired_difference, text
from annealed_report.tables import Row, mean, worded

#: The methods whose models are judged, by name.
JUDGED: dict[str, dict[str, Any]] = {
    "Gaussian, ELBO": GAUSSIAN,
    "HVI, ELBO": {},
    "HVI, ELBO, 10,000 steps": {"steps": 10_000},
    "HVI, AVO": BY_AVO,
    "HVI, AVO, from the prior": BY_AVO | PRIOR,
    "Gaussian, IWAE-5": BY_IWAE | GAUSSIAN,
    "Gaussian, IWAE-50": GAUSSIAN | {"objective": IWAE(50)},
    "HVI, IWAE-5": BY_IWAE,
}
SHOWN = ("Gaussian, ELBO", "HVI, ELBO", "HVI, AVO", "HVI, AVO, from the prior", "Gaussian, IWAE-50", "HVI, IWAE-5")
#: What might mend the model: both sides of each difference.
MENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AVO − ELBO": (BY_AVO, {}),
    "… near the identity": (BY_AVO | NEAR, NEAR),
    "… from the prior": (BY_AVO | PRIOR, PRIOR),
    "… 8 transitions": (BY_AVO | EIGHT, EIGHT),
    "… model starts at the truth": (BY_AVO | TRUTH, TRUTH),
    "… and is held there first": (BY_AVO | HELD, HELD),
    "0.2 AVO + 0.8 ELBO − ELBO": ({"objective": AVO(0.2)}, {}),
    "ELBO: 8 transitions − 4": (EIGHT, {}),
    "ELBO: 10,000 steps − 5,000": ({"steps": 10_000}, {}),
    "IWAE-5 − ELBO": (BY_IWAE, {}),
    "Gaussian: IWAE-5 − ELBO": (BY_IWAE | GAUSSIAN, GAUSSIAN),
    "Gaussian: IWAE-50 − ELBO": (JUDGED["Gaussian, IWAE-50"], GAUSSIAN),
}
NOISES = (0.1, 0.3)


def has_one_mode(metrics: Mapping[str, float]) -> bool:
    """Whether z → x is monotone in the learned model, so that p(z | x) has one mode for every x."""
    return metrics["left"] * metrics["right"] < 0


def with_one_mode(found: Sequence[Mapping[str, float]]) -> str:
    """How many of the models have a posterior of one mode."""
    return f"{sum(map(has_one_mode, found))} of {len(found)}" if found else "–"


# ---- why the ELBO prefers the wrong model


def one_sided(model: LineModel, x: Tensor) -> Tensor:
    """The largest ELBO that a q on one side of 0 can have, exactly; x: (n, R) -> (n,).

    That q is p(z | x) cut off to the side with more mass, and its KL to p(z | x) minus the log of that mass.
    """
    right = model.right_share(x)
    return model.log_prob(x) + torch.maximum(right, 1 - right).log()


def profile(bound: Callable[[LineModel, Tensor], Tensor], x: Tensor, tilts: Tensor) -> tuple[LineModel, Tensor]:
    """For each tilt (right - left) / 2 the model that maximises the mean of a bound over x, all else free.

    Returns the models, each of their parameters (tilts, 1), and the means, (tilts,): the better ones of two starts, at
    the truth and at a model whose posterior has one mode.
    """
    ends = []
    for offset, slope in ((0.0, 1.0), (0.5, 0.3)):
        start = torch.tensor([offset, slope, math.log(0.1)], dtype=torch.float64)
        raw = start.repeat(len(tilts), 1).requires_grad_()
        optimiser = torch.optim.LBFGS([raw], max_iter=100, line_search_fn="strong_wolfe")

        def model(raw: Tensor = raw) -> LineModel:
            offset, slope, log_noise = raw.unsqueeze(1).unbind(-1)
            return LineModel(offset, slope + tilts.unsqueeze(-1), slope - tilts.unsqueeze(-1), log_noise.exp())

        def loss(optimiser: torch.optim.Optimizer = optimiser, model: Callable[[], LineModel] = model) -> Tensor:
            optimiser.zero_grad()
            value = -bound(model(), x).mean(-1).sum()
            value.backward()
            return value

        optimiser.step(loss)
        with torch.no_grad():
            ends.append((model(), bound(model(), x).mean(-1)))
    (one, first), (other, second) = ends
    better = second > first
    pairs = zip(one, other, strict=True)
    return LineModel(*(torch.where(better.unsqueeze(-1), b, a).detach() for a, b in pairs)), torch.maximum(
        first, second
    )


# ---- rows


def judged(runs: Sequence[Any]) -> list[Row]:
    """By method and noise, how many models have a one-mode posterior, and the likelihood lost, with its word."""
    found = []
    for name, plan in JUDGED.items():
        row: Row = {"method": name}
        for noise in NOISES:
            own = metrics_of(runs, noise, **plan)
            row[f"σ = {noise:g}: one mode"] = with_one_mode(own)
            row[f"σ = {noise:g}: nats lost"] = worded(mean(m["loss"] for m in own), 1, 0.02, 3)
        found.append(row)
    return found


def mended(runs: Sequence[Any]) -> list[Row]:
    """By difference and noise, how much less likelihood is lost, with its word, and how many models have one mode."""
    found = []
    for name, plans in MENDS.items():
        row: Row = {"difference": name}
        for noise in NOISES:
            ours, theirs = (metrics_of(runs, noise, **plan) for plan in plans)
            lost = paired_difference(*([m["loss"] for m in side] for side in (ours, theirs))) if ours else None
            row[f"σ = {noise:g}: nats lost"] = worded(lost, -1, 0.02, 3)
            counts = (sum(map(has_one_mode, side)) for side in (ours, theirs))
            row[f"σ = {noise:g}: one mode"] = "{} and {}".format(*counts)
        found.append(row)
    return found


def gaps(runs: Sequence[Any]) -> list[Row]:
    """By method and noise, the likelihood lost by the model, and how far the bound lies below the likelihood."""
    found = []
    for name in ("Gaussian, ELBO", "Gaussian, IWAE-50", "HVI, ELBO", "HVI, IWAE-5"):
        row: Row = {"method": name}
        for noise in NOISES:
            own = metrics_of(runs, noise, **JUDGED[name])
            row[f"σ = {noise:g}: nats lost"] = text(mean(m["loss"] for m in own), 3)
            row[f"σ = {noise:g}: gap of the bound"] = text(mean(m["gap"] for m in own))
        found.append(row)
    return found


def settled(runs: Sequence[Any]) -> tuple[float, int]:
    """In the last third of training: how far the median run still moves, and how many runs change kind."""
    moved, turned = [], 0
    for run in runs:
        end = run.history[-1]
        then = min(run.history, key=lambda line: abs(line["step"] - 2 / 3 * end["step"]))
        moved.append(max(abs(end[name] - then[name]) for name in ("left", "right", "noise")))
        turned += has_one_mode(end) != has_one_mode(then)
    return float(torch.tensor(moved).median()), turned


# ---- figures


def two_models(models: Mapping[str, LineModel], x: float) -> Figure:
    """What each model expects of x at z, and its exact posterior p(z | x) at one x."""
    figure, axes = panels(2, len(models), 7, 4.6, sharex=True, sharey="row")
    z = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    for (above, below), (name, model) in zip(axes.T, models.items(), strict=True):
        above.plot(z, model.mean(z), color=DARK)
        above.axhline(x, color=DARK, lw=0.8, ls=":")
        above.set_title(name)
        log_p = model.log_joint_at(z, torch.full((1, 2), x, dtype=torch.float64))[0]
        density = (log_p - torch.logsumexp(log_p, 0)).exp() / (z[1] - z[0])
        below.fill_between(z, density, color=COLOURS["target"], alpha=0.3, linewidth=0)
        below.plot(z, density, color=COLOURS["target"])
        below.set_xlabel("z")
    axes[0, 0].set_ylabel("E[x | z]")
    axes[1, 0].set_ylabel(f"p(z | x = {x:g})")
    return figure


def preferred(tilts: Tensor, likelihood: Tensor, bound: Tensor, one_mode: Tensor) -> Figure:
    """Mean log-likelihood and one-sided ELBO of the best model at each tilt, less the highest likelihood.

    `one_mode` says which of the models that the bound prefers have a posterior of one mode.
    """
    figure, ((axes,),) = panels(1, 1, 6.5, 3.6)
    curves = {"log-likelihood": (likelihood, DARK, "-"), "ELBO of a q on one side": (bound, COLOURS["elbo"], "--")}
    for name, (values, colour, style) in curves.items():
        values, best = values - likelihood.max(), int(values.argmax())
        axes.plot(tilts, values, style, color=colour, label=name)
        axes.plot(tilts[best], values[best], "o", color=colour, ms=8)
    axes.axvspan(float(tilts[one_mode].min()), float(tilts.max()), color=DARK, alpha=0.08, linewidth=0)
    axes.text(0.98, 0.97, "one mode", transform=axes.transAxes, ha="right", va="top", fontsize="small")
    axes.set(xlabel="tilt of the model, (a − b) / 2", ylabel="nats an observation", xlim=(0, float(tilts.max())))
    axes.legend(loc="lower right")
    return figure


def learned_lines(runs: Sequence[Any], noise: float) -> Figure:
    """What the model expects of x at each z, as learned with ten seeds, by method."""
    figure, axes = panels(2, 3, 9, 5, sharex=True, sharey=True)
    z = torch.linspace(-3, 3, 121, dtype=torch.float64)
    for place, (ax, name) in enumerate(zip(axes.flat, SHOWN, strict=True)):
        own = metrics_of(runs, noise, **JUDGED[name])
        ax.plot(z, z.abs(), color=DARK, lw=1, ls="--")
        for m in own:
            model = LineModel.of(m["offset"], m["right"], m["left"], m["noise"])
            colour = COLOURS["avo" if "AVO" in name else "other" if "IWAE" in name else "elbo"]
            ax.plot(z, model.mean(z), color=colour, alpha=0.6, lw=1.2)
        label_panel(ax, f"one mode: {with_one_mode(own)}")
        ax.set(title=name, xlabel="z" if place > 2 else "", ylabel="" if place % 3 else "E[x | z]", ylim=(-1.2, 4.2))
    return figure


def biased(runs: Sequence[Any]) -> Figure:
    """Tilt, noise and likelihood lost against maximum likelihood, by method and noise."""
    figure, (axes,) = panels(1, 3, 9, 3.9, sharey=True)
    signs: dict[str, tuple[str, Callable[[dict[str, float]], float]]] = {
        "tilt": ("tilt − ML", lambda m: m["tilt"] - m["tilt_ml"]),
        "noise": ("noise / ML − 1", lambda m: m["noise_ratio"] - 1),
        "loss": ("likelihood lost (nats)", lambda m: m["loss"]),
    }
    for ax, (label, value) in zip(axes, signs.values(), strict=True):
        groups = {}
        for name, plan in JUDGED.items():
            found = {
                size: metrics_of(runs, noise, **plan) for size, noise in zip(("less", "more"), NOISES, strict=True)
            }
            groups[name] = {size: interval([value(m) for m in own]) for size, own in found.items() if own}
        intervals(ax, groups, label, zero=True, names={"less": "σ = 0.1", "more": "σ = 0.3"})
        ax.get_legend().remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
