"""Figures of the page on the energies, drawn from chains and from committed records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.patheffects
import matplotlib.ticker
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from annealed_core.chain import Chain
from annealed_core.energies import ENERGIES
from annealed_core.kernels import DiagonalGaussian
from annealed_core.targets import GeometricPath, linear_alphas
from annealed_report import energy_tables, figures
from annealed_report.comparison import keeps_modes, mean_metric, select
from annealed_report.plotting import COLOURS, DARK, NAMES, intervals, label_panel, means_and_errors, panels
from annealed_report.statistics import Interval, interval, paired_difference
from annealed_report.studies import LINES

_METHODS = {"elbo": LINES["HVI, ELBO"], "avo": LINES["HVI-AVO"]}
_LOST = "#b3261e"


def modes_kept(drawn: Mapping[str, Mapping[str, Tensor]], records: Sequence[Any], target: Any) -> Figure:
    """The square of starts and objectives: samples of one run, and at each mode how many records keep it.

    `drawn` has samples (n, 2) by start of the kernels and objective, "elbo" or "avo".
    """
    figure, axes = panels(len(drawn), 2, 4.6)
    for line, (start, samples) in zip(axes, drawn.items(), strict=True):
        line[0].set_ylabel(start)
        for ax, (method, z) in zip(line, samples.items(), strict=True):
            figures.draw_density(ax, target, filled=False)
            figures.draw_samples(ax, z, method, size=3)
            runs = select(records, target=target.name, **energy_tables.STARTS[start][method])
            for centre, kept in zip(target.modes[0], zip(*map(keeps_modes, runs), strict=True), strict=True):
                colour, weight = (DARK, "normal") if all(kept) else (_LOST, "bold")
                text = ax.text(
                    1.55 * centre[0], 1.7 * centre[1], f"{sum(kept)}/{len(kept)}", color=colour, weight=weight
                )
                text.set(ha="center", va="center", path_effects=_outline())
    for ax, method in zip(axes[0], ("elbo", "avo"), strict=True):
        ax.set_title(f"trained by {'the ELBO' if method == 'elbo' else 'AVO'}", loc="center")
    return figure


def _outline() -> list[Any]:
    return [matplotlib.patheffects.withStroke(linewidth=3, foreground="white")]


def paths(targets: Sequence[str], n_transitions: int, width: float = 7.5) -> Figure:
    """The targets of AVO's path from N(0, I) to each energy, one row an energy."""
    figure, axes = panels(len(targets), n_transitions + 1, width)
    alphas = linear_alphas(n_transitions)
    for line, name in zip(axes, targets, strict=True):
        path = GeometricPath(DiagonalGaussian.isotropic(2), ENERGIES[name], alphas)
        line[0].set_ylabel(name)
        for step, ax in enumerate(line):
            figures.draw_density(ax, path[step])
    for ax, alpha in zip(axes[0], alphas.tolist(), strict=True):
        ax.set_title(f"$\\alpha$ = {alpha:.2f}", loc="center")
    return figure


def methods(records: Sequence[Any], targets: Sequence[str] = "ABCDEF", width: float = 6.6) -> Figure:
    """Every line of `LINES` on every energy: total variation, coloured by the paired difference to the first line.

    White where the interval of the difference includes 0; teal where the method is closer, brown where it is farther.
    """
    reference = next(iter(LINES))
    figure, axes = panels(1, 1, width, 8.2)
    ax, shades = axes[0, 0], np.zeros((len(LINES), len(targets)))
    for row, fields in enumerate(LINES.values()):
        for column, name in enumerate(targets):
            own, other = (select(records, target=name, **each) for each in (fields, LINES[reference]))
            value = interval([run.metrics["total_variation"] for run in own])
            change = paired_difference(*([run.metrics["total_variation"] for run in side] for side in (own, other)))
            shades[row, column] = -change.mean if change.low > 0 or change.high < 0 else 0.0
            ink = {"ha": "center", "color": "white" if abs(shades[row, column]) > 0.22 else "black"}
            ax.text(column, row - 0.03, f"{value.mean:.2f}", va="bottom", fontsize=10.5, **ink)
            ax.text(column, row + 0.06, _half(value), va="top", fontsize=7.5, **ink)
    ax.imshow(shades, cmap="BrBG", vmin=-0.35, vmax=0.35, aspect="auto")
    for end in (8.5, 12.5):  # gated pairs, better starts, flows
        ax.axhline(end, color=DARK, lw=1.2)
    ax.set_xticks(range(len(targets)), targets)
    ax.set_yticks(range(len(LINES)), LINES)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def _half(value: Interval) -> str:
    return f"± {value.half_width:.2f}" if value.half_width >= 0.005 else "± <0.01"


def gains(found: Mapping[str, Mapping[str, Interval]], smallest: float = 0.02, width: float = 6.5) -> Figure:
    """What AVO gains on the ELBO, one line an energy and one colour a comparison; the band is the smallest effect."""
    figure, axes = panels(1, 1, width, 4.4)
    ax = axes[0, 0]
    ax.axvspan(-smallest, smallest, color="#e9e9e4", lw=0)
    intervals(ax, found, "total variation, AVO − ELBO (below 0: AVO closer)", zero=True, names={})
    for drawn, colour in zip(ax.containers, (DARK, COLOURS["less"], COLOURS["more"]), strict=True):
        for part in drawn.get_children():
            # No colour of a method: these are differences. Caps are markers of lines.
            part.set(color=colour, **({"markeredgecolor": colour} if isinstance(part, Line2D) else {}))
    ax.legend(loc="lower left", fontsize="small")
    return figure


@torch.no_grad()
def forgotten(kernels: Mapping[str, Any], n: int = 1500, width: float = 7.5) -> Figure:
    """The first coordinate of z after four untrained kernels against the one they start from, one panel a start."""
    figure, axes = panels(1, len(kernels), width, width / len(kernels) + 0.35, sharey=True)
    for ax, (start, z) in zip(axes[0], started(kernels, n).items(), strict=True):
        ax.scatter(z[0][:, 0], z[-1][:, 0], s=2.5, color=DARK, alpha=0.5, linewidths=0)
        ax.set(title=start, xlabel="$z_0$", xlim=(-4, 4), ylim=(-4, 4), xticks=[-3, 0, 3], yticks=[-3, 0, 3])
        label_panel(ax, f"correlation {correlation(z):.2f}")
    axes[0, 0].set_ylabel(f"$z_{len(z) - 1}$")
    return figure


@torch.no_grad()
def started(kernels: Mapping[str, Any], n: int = 1500) -> dict[str, list[Tensor]]:
    """The states of n particles on their way through four untrained kernels of each description, in two dimensions."""
    base = DiagonalGaussian.isotropic(2)
    return {start: list(Chain(base, kernel.build(dim=2, n=4)).rsample(n).z) for start, kernel in kernels.items()}


def correlation(z: Sequence[Tensor]) -> float:
    """Between the first coordinates of the first and of the last state."""
    return float(torch.corrcoef(torch.stack([z[0][:, 0], z[-1][:, 0]]))[0, 1])


def lengths(records: Sequence[Any], targets: Sequence[str] = "ABCDEF", width: float = 7.5) -> Figure:
    """Total variation against the number of transitions, by the ELBO and by AVO, one panel an energy."""
    figure, axes = panels(2, 3, width, 4.6, sharex=True)
    numbers = sorted({run.spec.n_transitions for run in records})
    for ax, name in zip(axes.flat, targets, strict=True):
        for method, fields in _METHODS.items():
            values = [mean_metric(records, "total_variation", target=name, n_transitions=n, **fields) for n in numbers]
            figures.band(ax, numbers, values, method)
        ax.set_xscale("log", base=2)
        ax.set_xticks(numbers, numbers)
        ax.set_ylim(0)
        label_panel(ax, name)
    axes[1, 2].legend(fontsize="small", loc="lower left")
    _label_outer(axes, "transitions T", "total variation")
    return figure


def gaps(records: Sequence[Any], targets: Sequence[str] = "ABCDEF", width: float = 7.5) -> Figure:
    """The divergence up to each step, by the ELBO and by AVO, one panel an energy; linear below 0.1 nats."""
    figure, axes = panels(2, 3, width, 4.8, sharex=True)
    for ax, name in zip(axes.flat, targets, strict=True):
        for method, fields in _METHODS.items():
            by_step = zip(*(run.metrics["gaps"] for run in select(records, target=name, **fields)), strict=True)
            values = [interval(list(each)) for each in by_step]
            figures.band(ax, range(len(values)), values, method)
        ax.set_yscale("symlog", linthresh=0.1)
        ax.set_ylim(0)
        ax.set_yticks([0, 0.1, 1, 10], minor=False)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        label_panel(ax, name)
    axes[0, 2].legend(fontsize="small")
    _label_outer(axes, "step t", "KL up to t, nats")
    return figure


def _label_outer(axes: Any, x: str, y: str) -> None:
    for ax in axes[-1]:
        ax.set_xlabel(x)
    for ax in axes[:, 0]:
        ax.set_ylabel(y)


def ring(records: Sequence[Any], exact: float, width: float = 7.5) -> Figure:
    """Error of log Z and effective sample size against K for each method, beside NVI's table (open, dashed)."""
    figure, axes = panels(2, len(energy_tables.NVI), width, 4.4, sharex=True, sharey="row")
    for column, (name, (method, theirs)) in zip(axes.T, energy_tables.NVI.items(), strict=True):
        colour = COLOURS.get(method, COLOURS["other"])
        for ax, (metric, values) in zip(column, theirs.items(), strict=True):
            scale = 100.0 if metric == "ess_100" else 1.0
            found = [
                interval([scale * run.metrics[metric] for run in energy_tables.of_ring(records, name, k)])
                for k in energy_tables.DENSITIES
            ]
            means, errors = means_and_errors(found)
            ax.errorbar(energy_tables.DENSITIES, means, yerr=errors, fmt="o-", ms=4, capsize=2.5, lw=1.4, color=colour)
            ax.plot(energy_tables.DENSITIES, values, "s--", ms=4.5, mfc="white", color=DARK, lw=1)
            ax.set_xticks(energy_tables.DENSITIES)
        column[0].axhline(exact, color=DARK, lw=0.8, ls=":")
        column[0].set_title(NAMES.get(name, name), loc="center", fontsize="small")
        column[1].set_xlabel("K")
    axes[0, 0].set_ylabel("log Z of 100 samples")
    axes[1, 0].set_ylabel("ESS of 100 samples")
    axes[1, 0].set_ylim(0, 100)
    return figure
