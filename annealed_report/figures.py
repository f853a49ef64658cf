"""Figures: those that more than one page of the report draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from annealed_core import evidence
from annealed_report.plotting import COLOURS, NAMES, label_panel, means_and_errors, panels
from annealed_report.statistics import Interval


@torch.no_grad()
def draw_density(axes: Axes, target: Any, filled: bool = True, points: int = 160) -> None:
    """A two-dimensional density on its square: filled, or as contour lines to draw samples on."""
    side: float = getattr(target, "box", 4.0)
    z, _ = evidence.grid(side, points, torch.float32)
    density = (log_f := target.log_prob(z)).sub(log_f.max()).exp().numpy()
    x, y = z[..., 0].numpy(), z[..., 1].numpy()
    if filled:
        axes.contourf(x, y, density, levels=np.linspace(0.02, 1, 13))
    else:
        axes.contour(x, y, density, levels=[0.1, 0.4, 0.7], colors="#555555", linewidths=0.7)
    axes.set(xlim=(-side, side), ylim=(-side, side), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#cccccc")


def draw_samples(axes: Axes, z: Tensor, method: str, size: float = 1.5, alpha: float = 0.4) -> None:
    """Samples z (n, 2) as dots in the method's colour."""
    axes.scatter(z[:, 0], z[:, 1], s=size, alpha=alpha, color=COLOURS.get(method, COLOURS["other"]), linewidths=0)


def densities(targets: Mapping[str, Any], columns: int = 6, width: float = 9.0) -> Figure:
    """One filled panel a target, labelled with its name."""
    figure, axes = panels(-(-len(targets) // columns), columns, width)
    for ax, (name, target) in zip(axes.flat, targets.items(), strict=False):
        draw_density(ax, target)
        label_panel(ax, name)
    for ax in axes.flat[len(targets) :]:
        ax.set_axis_off()
    return figure


def samples(rows: Mapping[str, Mapping[str, Tensor]], targets: Mapping[str, Any], width: float = 9.0) -> Figure:
    """Samples over contours: the targets, then one row a method, one column a target: method -> target -> z (n, 2)."""
    figure, axes = panels(len(rows) + 1, len(targets), width)
    for line, (method, drawn) in zip(axes, {"target": {}, **rows}.items(), strict=True):
        line[0].set_ylabel(NAMES.get(method, method))
        for ax, (name, target) in zip(line, targets.items(), strict=True):
            draw_density(ax, target, filled=name not in drawn)
            if name in drawn:
                draw_samples(ax, drawn[name], method)
            else:
                ax.set_title(name, loc="center")
    return figure


def curves(axes: Axes, histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], x: str, y: str) -> None:
    """Mean and range over seeds of a recorded value, one line a method.

    `histories` has one history a seed for each method; `x` and `y` are fields of their lines.
    """
    for method, per_seed in histories.items():
        values = np.array([[line[y] for line in history] for history in per_seed])
        steps = [line[x] for line in per_seed[0]]
        axes.plot(steps, values.mean(0), "o-", ms=3.5, color=COLOURS[method], label=NAMES[method])
        axes.fill_between(steps, values.min(0), values.max(0), color=COLOURS[method], alpha=0.2, linewidth=0)
    axes.set_xlabel(x)


def band(axes: Axes, x: Sequence[float], found: Sequence[Interval | None], method: str) -> None:
    """A line of means with their intervals, in the colour of the method; points without a value are left out."""
    points = {place: value for place, value in zip(x, found, strict=True) if value is not None}
    means, errors = means_and_errors(points.values())
    look = {"color": COLOURS.get(method, COLOURS["other"]), "label": NAMES.get(method, method)}
    axes.errorbar(list(points), means, yerr=errors, fmt="o-", ms=4, capsize=2.5, lw=1.4, **look)


def heat_maps(
    maps: Mapping[str, Sequence[Sequence[float]]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str, str],
    width: float = 9.0,
) -> Figure:
    """One panel a method on a common scale, with the value in each cell, darker where larger.

    `maps` has each method's values, rows from top to bottom; `rows` and `columns` say what each stands for, `labels`
    what the vertical axis, the horizontal axis and the values are.
    """
    wide = min(len(maps), 3)
    high = -(-len(maps) // wide)
    figure, axes = panels(high, wide, width, high * width / wide * 0.72, sharey=True)
    top = np.max([*maps.values()])
    for place, (ax, (method, values)) in enumerate(zip(axes.flat, maps.items(), strict=False)):
        image = ax.imshow(values, vmin=0, vmax=top, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            shade = "white" if value > 0.6 * top else "black"
            ax.text(column, row, f"{value:.1f}", ha="center", va="center", color=shade, fontsize="small")
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.set(title=NAMES.get(method, method), ylabel="" if place % wide else labels[0])
        ax.set_xlabel(labels[1] if place + wide >= len(maps) else "")
        ax.tick_params(length=0)
    for ax in axes.flat[len(maps) :]:
        ax.set_axis_off()
    figure.colorbar(image, ax=axes.ravel().tolist(), label=labels[2], shrink=0.8)
    return figure


def image_grid(rows: Mapping[str, Tensor], width: float = 9.0) -> Figure:
    """Rows of 28 x 28 images; label -> (n, 784) in [0, 1]."""
    n = len(next(iter(rows.values())))
    figure, axes = panels(len(rows), 1, width, width / n * len(rows) * 1.04)
    for ax, (label, images) in zip(axes[:, 0], rows.items(), strict=True):
        ax.imshow(images.view(n, 28, 28).permute(1, 0, 2).reshape(28, 28 * n).numpy(), cmap="gray_r", vmin=0, vmax=1)
        ax.set_xticks([])
        ax.set_yticks([14], [label])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    return figure
