"""Plotting: one style, and the two outputs of every figure: its image with alternative text, and its caption."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from IPython.display import SVG, Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from annealed_report.statistics import Interval

NAMES = {"elbo": "HVI, ELBO", "hvi": "HVI", "avo": "HVI-AVO", "vae": "VAE", "iaf": "IAF", "planar": "planar flow"}
NAMES |= {"householder": "Householder flow", "iaf-elbo": "IAF, ELBO", "iaf-avo": "IAF-AVO"}
#: The palette "colorblind" of seaborn, which takes two seconds to import: only what draws with it imports it.
PALETTE = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"]
_blue, _orange, _green, _red, _purple, _, _, _grey, _, _cyan = PALETTE
DARK = "#444444"
SCHEDULE_COLOURS: dict[str, Any] = {"constant": _grey, "linear": _purple, "geometric": _cyan, "cyclical": _red}
#: One colour a method, through the whole report, by its key or its name.
COLOURS: dict[str, Any] = {
    "elbo": _blue,
    "hvi": _blue,
    "avo": _orange,
    "vae": _green,
    "iaf-elbo": _cyan,
    "iaf-avo": _red,
}
COLOURS |= {called: COLOURS[name] for name, called in NAMES.items() if name in COLOURS}
COLOURS |= {"target": DARK, "ais": _purple, "other": _grey, **SCHEDULE_COLOURS}
COLOURS |= {"quick": _grey, "full": _blue, "less": "#5b4a8a", "more": "#a99bd0"}

STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 130,
    "svg.hashsalt": "annealed",  # so that the same figure gives the same bytes
    "figure.constrained_layout.use": True,
    "font.size": 10.8,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "axes.linewidth": 1.25,
    "axes.labelsize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "xtick.labelsize": 9.9,
    "ytick.labelsize": 9.9,
    "legend.fontsize": 9.9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "patch.edgecolor": "white",
    "patch.force_edgecolor": True,
    "image.cmap": "GnBu",
}
plt.style.use(["seaborn-v0_8-ticks", STYLE])


def panels(
    rows: int, columns: int, width: float = 9.0, height: float | None = None, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns axes, always as an array of that shape; width and height in inches."""
    height = height or width / columns * rows
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)


#: Bytes above which a figure is shown in pixels, not as lines.
LARGEST_SVG = 100_000


def show(figure: Figure, caption: str, alt: str, lines: bool = True) -> None:
    """Show a figure once with its caption below, as SVG where it is of few lines, else in pixels; it is closed.

    `lines=False` asks for pixels. `caption` says in Markdown what to see, and the report's pages number it; `alt` says
    what a reader who can't see the image should know.
    """
    if not caption or not alt:
        raise ValueError("a figure needs a caption and an alternative text")
    border: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06}
    drawn = _lines(figure, **border) if lines and not any(axes.images for axes in figure.axes) else ""
    if 0 < len(drawn) <= LARGEST_SVG:
        display(SVG(drawn), metadata={"image/svg+xml": {"alt": alt}})
    else:
        display(Image(_pixels(figure, **border), alt=alt), metadata={"image/png": {"alt": alt}})
    plt.close(figure)
    display(Markdown(caption), metadata={"annealed": "caption"})


def _lines(figure: Figure, **border: Any) -> str:
    """As SVG, with places to a hundredth of a point."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None}, **border)
    return shorter(drawn.getvalue().decode())


def shorter(drawn: str) -> str:
    """An SVG whose paths and places have two decimals."""

    def rounded(found: re.Match[str]) -> str:
        return found[1] + re.sub(r"(\.\d\d)\d+", r"\1", found[2])

    return re.sub(r'(\b(?:d|x|y)=)("[^"]*")', rounded, drawn)


def _pixels(figure: Figure, **border: Any) -> bytes:
    """As PNG in 256 colours, which gives a third of the size, and for the eye no difference."""
    drawn, smaller = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", **border)
    picture = PIL.Image.open(drawn).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    picture.save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def table(rows: Sequence[Mapping[str, Any]], caption: str | None = None) -> None:
    """Show rows (one mapping of column to cell each) as a table in Markdown, with its caption above.

    Numbers and `Interval`s are aligned to the right; floats have three decimals at most, None is a dash. Of no rows
    nothing is shown.
    """
    if not rows:
        return
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
    if isinstance(value, float):
        value = f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:.1f}"
    text = value.text() if isinstance(value, Interval) else str(value)
    return re.sub(r"(?<![\w–-])-(?=\d)", "−", text).replace(" ± ", "\u00a0±\u00a0").replace("|", "\\|")


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
    """Dots with their intervals: group -> series -> interval, one line a group and one colour a series.

    Groups stand from top to bottom; `label` is that of the horizontal axis, with its unit, which has a line at 0 where
    `zero` (for differences); `names` has what series are called in the legend.
    """
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    offsets = np.linspace(-0.2, 0.2, len(series)) if len(series) > 1 else [0.0]
    for number, (name, offset) in enumerate(zip(series, offsets, strict=True)):
        found = {row + offset: group[name] for row, group in enumerate(groups.values()) if name in group}
        colour = COLOURS.get(name, f"C{number}" if len(series) > 1 else DARK)
        means, errors = means_and_errors(found.values())
        axes.errorbar(
            means, list(found), xerr=errors, fmt="o", ms=5, capsize=3, color=colour, label=names.get(name, name)
        )
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(label)
    if zero:
        axes.axvline(0, color=DARK, lw=0.8)
    if len(series) > 1:
        axes.legend()


def means_and_errors(found: Iterable[Interval]) -> tuple[list[float], list[float]]:
    """What error bars are drawn from; those of a single value have no length."""
    return [each.mean for each in found], [each.half_width if each.n > 1 else 0.0 for each in found]
