"""Plotting: one style, and the two outputs of every figure: its image with alternative text, and its caption."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import seaborn as sns
from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from annealed_report.comparison import Interval

#: One colour a method, through the whole report (seaborn's colour-blind palette).
_PALETTE = sns.color_palette("colorblind")
COLOURS: dict[str, Any] = {
    "target": "#444444",
    "elbo": _PALETTE[0],
    "hvi": _PALETTE[0],
    "avo": _PALETTE[1],
    "iaf-elbo": _PALETTE[9],
    "iaf-avo": _PALETTE[3],
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
COLOURS |= {"quick": _PALETTE[7], "full": _PALETTE[0], "less": "#5b4a8a", "more": "#a99bd0"}
COLOURS |= SCHEDULE_COLOURS
NAMES = {"elbo": "HVI, ELBO", "hvi": "HVI", "avo": "HVI-AVO", "vae": "VAE"}
NAMES |= {"iaf": "IAF", "planar": "planar flow", "householder": "Householder flow"}
NAMES |= {"iaf-elbo": "IAF, ELBO", "iaf-avo": "IAF-AVO"}


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
    _show_png(smaller(buffer.getvalue()), caption, alt)


def smaller(png: bytes) -> bytes:
    """The same picture in 256 colours: a third of the size, for the eye no difference."""
    buffer = io.BytesIO()
    picture = PIL.Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(256, dither=PIL.Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue() if len(buffer.getvalue()) < len(png) else png


def _show_png(png: bytes, caption: str, alt: str) -> None:
    display(Image(png, alt=alt), metadata={"image/png": {"alt": alt}})
    display(Markdown(caption), metadata={"annealed": "caption"})


def show_animation(
    figure: Figure, draw: Callable[[int], None], frames: int, caption: str, alt: str, milliseconds: int = 90
) -> None:
    """Show an animation once, as an animated PNG, which plays in any browser by itself and without a network.

    Args:
        figure: closed afterwards.
        draw: brings the figure to the state of a frame, 0 to frames - 1.
        frames: how many; the last one is held for two seconds before it begins again.
        caption, alt: as for `show`.
        milliseconds: between two frames.
    """
    if not caption or not alt:
        raise ValueError("a figure needs a caption and an alternative text")
    pictures = []
    for frame in range(frames):
        draw(frame)
        canvas = cast(FigureCanvasAgg, figure.canvas)
        canvas.draw()
        picture = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        pictures.append(picture.quantize(16, dither=PIL.Image.Dither.NONE))  # few colours: a tenth of the size
    plt.close(figure)
    buffer = io.BytesIO()
    durations = [milliseconds] * (frames - 1) + [2000]
    pictures[0].save(
        buffer, "PNG", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True
    )
    _show_png(buffer.getvalue(), caption, alt)


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
    for place_in_palette, (name, offset) in enumerate(zip(series, offsets, strict=True)):
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
            color=COLOURS.get(name, _PALETTE[place_in_palette % 10] if len(series) > 1 else "#444444"),
            label=names.get(name, name),
        )
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(label)
    if zero:
        axes.axvline(0, color="#444444", lw=0.8)
    if len(series) > 1:
        axes.legend()
