"""A chain as a picture, and what in it the ELBO and AVO train."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from annealed_report.plotting import COLOURS, DARK


def _box(axes: Axes, x: float, y: float, text: str, colour: str, fill: str = "white") -> None:
    rounded = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x - 0.34, y - 0.26), 0.68, 0.52, rounded, ec=colour, fc=fill, lw=1.6))
    axes.text(x, y, text, ha="center", va="center", color=DARK)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 2, "shrinkB": 2})


def chain(width: float = 7.0) -> Figure:
    """A chain of three kernels twice: trained by the ELBO against the last target, and by AVO against one a step."""
    figure, axes = plt.subplots(2, 1, figsize=(width, 0.62 * width))
    last, names = 3, ("ELBO: one target, at the end", "AVO: a target at every step")
    for ax, name, method in zip(axes, names, ("elbo", "avo"), strict=True):
        colour = COLOURS[method]
        for t in range(last + 1):
            _box(ax, 1.7 * t, 0, f"$z_{t}$" if t < last else "$z_T$", DARK)
            if t:
                _arrow(ax, (1.7 * t - 1.34, 0), (1.7 * t - 0.36, 0), DARK)
                ax.text(1.7 * t - 0.85, 0.16, f"$q_{t}$" if t < last else "$q_T$", ha="center", color=DARK)
            if t == last or (method == "avo" and t):
                _box(ax, 1.7 * t, -1.15, f"$f_{t}$" if t < last else "$f_T$", colour, "#f6f6f3")
                _arrow(ax, (1.7 * t, -0.88), (1.7 * t, -0.28), colour)
        if method == "elbo":
            for t in range(last, 0, -1):
                _arrow(ax, (1.7 * t - 0.2, 0.28), (1.7 * t - 0.85, 0.36), colour, 0.4)
                _arrow(ax, (1.7 * t - 0.85, 0.36), (1.7 * (t - 1) + 0.2, 0.28), colour, 0.4)
            ax.text(-0.34, -1.15, "the gradient passes through\nall kernels at once", color=colour, va="center")
        else:
            for t in range(1, last + 1):
                _arrow(ax, (1.7 * t - 0.2, 0.28), (1.7 * t - 0.85, 0.36), colour, 0.4)
                if t < last:
                    ax.plot([1.7 * t - 0.02] * 2, [0.34, 0.62], color=colour, lw=3)
            ax.text(-0.34, -1.15, "the gradient stops\nat each bar", color=colour, va="center")
        ax.set_title(name, color=colour)
        ax.set(xlim=(-0.45, 1.7 * last + 0.45), ylim=(-1.5, 0.75))
        ax.axis("off")
    return figure
