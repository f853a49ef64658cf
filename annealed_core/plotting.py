"""Plotting: one style, and the two outputs of every figure: its image with alternative text, and its caption."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from annealed_core.comparison import Interval

#: One colour a method, through the whole report (seaborn's colour-blind palette).
_PALETTE = sns.color_palette("colorblind")
COLOURS: dict[str, Any] = {
    "target": "#444444",
    "elbo": _PALETTE[0],
    "hvi": _PALETTE[0],
    "avo": _PALETTE[1],
    "vae": _PALETTE[2],
    "ais": _PALETTE[4],
    "other": _PALETTE[7],
}
SCHEDULE_COLOURS: dict[str, Any] = {
    "constant": _PALETTE[7],
    "linear": _PALETTE[4],
    "geometric": _PALETTE[9],
    "cyclical": _PALETTE[3],
}
COLOURS |= {"quick": _PALETTE[7], "full": _PALETTE[0]}
COLOURS |= SCHEDULE_COLOURS
NAMES = {"elbo": "HVI, ELBO", "hvi": "HVI", "avo": "HVI-AVO", "vae": "VAE"}


def use_style() -> None:
    """Set the report's style; importing this module does it."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.9)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "image.cmap": "mako_r",
        }
    )


use_style()


def panels(
    rows: int, columns: int, width: float = 9.0, height: float | None = None, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns axes, always as an array of that shape; width and height in inches."""
    height = height or width / columns * rows
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)


def show(figure: Figure, caption: str, alt: str) -> None:
    """Show a figure once, as an image of modest size with alternative text, and its caption below.

    Args:
        figure: closed afterwards.
        caption: what to see, in Markdown; the report's pages number it.
        alt: what a reader who can't see the image should know.
    """
    if not caption or not alt:
        raise ValueError("a figure needs a caption and an alternative text")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
    plt.close(figure)
    display(Image(buffer.getvalue(), alt=alt), metadata={"image/png": {"alt": alt}})
    display(Markdown(caption), metadata={"annealed": "caption"})


def table(rows: Sequence[Mapping[str, Any]], caption: str | None = None) -> None:
    """Show rows (one mapping of column to cell each) as a table in Markdown, with its caption above.

    Numbers and `Interval`s are aligned to the right; floats are shown with three significant decimals at most, None
    as a dash.
    """
    if not rows:
        raise ValueError("a table needs at least one row")
    columns = list(rows[0])
    if caption:
        display(Markdown(caption), metadata={"annealed": "table-caption"})
    numeric = {c: all(isinstance(row[c], int | float | Interval | None) for row in rows) for c in columns}
    lines = [columns, [("---:" if numeric[c] else ":---") for c in columns]]
    lines += [[_cell(row[c]) for c in columns] for row in rows]
    display(Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines)))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Interval):
        value = value.text()
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:.1f}"
    text = re.sub(r"(?<![\w–-])-(?=\d)", "−", str(value)).replace(" ± ", "\u00a0±\u00a0")
    return text.replace("|", "\\|")


def label_panel(axes: Axes, text: str) -> None:
    """A short label in the upper left corner of a panel."""
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", ha="left", fontsize="small", bbox=box)


def intervals(
    axes: Axes,
    groups: Mapping[str, Mapping[str, Interval]],
    label: str,
    zero: bool = False,
    names: Mapping[str, str] = NAMES,
) -> None:
    """Dots with their intervals, one line a group and one colour a series.

    Args:
        axes: to draw on.
        groups: group -> series -> interval, groups from top to bottom.
        label: of the horizontal axis, with its unit.
        zero: draw a line at 0, for differences.
        names: of the series in the legend.
    """
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    offsets = np.linspace(-0.2, 0.2, len(series)) if len(series) > 1 else [0.0]
    for name, offset in zip(series, offsets, strict=True):
        found = [(row, group[name]) for row, group in enumerate(groups.values()) if name in group]
        mean = [value.mean for _, value in found]
        error = [value.half_width if value.n > 1 else 0.0 for _, value in found]
        place = [row + offset for row, _ in found]
        axes.errorbar(
            mean,
            place,
            xerr=error,
            fmt="o",
            ms=5,
            capsize=3,
            color=COLOURS.get(name, "#444444"),
            label=names.get(name, name),
        )
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(label)
    if zero:
        axes.axvline(0, color="#444444", lw=0.8)
    if len(series) > 1:
        axes.legend()
