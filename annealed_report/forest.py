"""All claims as a picture: differences in units of what would be worth having, and what is said of them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine

from annealed_report.claims import Row

#: How each word about a claim looks: colour, shape, and whether it is filled.
WORD_MARKS = {
    "holds": ("#1b7837", "o", True),
    "holds, size open": ("#1b7837", "o", False),
    "no difference": ("#555555", "s", True),
    "gain excluded": ("#b35806", "s", False),
    "opposite": ("#b2182b", "D", True),
    "opposite, size open": ("#b2182b", "D", False),
    "undetermined": ("#7a7a7a", "o", False),
    "not tested": ("#767676", "", True),  # has no mark
}


LINE, WIDTH, VERDICT = 0.19, 4.6, 1.52  # inches: a line of text, the figure, and room for a verdict at its right


def forest(rows: Sequence[Row], reach: float = 60.0) -> Figure:
    """Claims from top to bottom, each above its difference with its interval in units of its smallest effect.

    Right of the grey band the claim holds, left of it its opposite does. The axis is linear in the band and logarithmic
    beyond; what lies beyond `reach` ends in an arrow. A bar to be met has no smallest effect: it is in units of its own
    interval's half-width, without a band. Narrow enough for a phone.
    """
    labels = _labels(rows)
    heights = [LINE * (label.count("\n") + 2.3) for label in labels]
    tops, below = np.cumsum([0.0, *heights]), 0.6
    stays = PlaceHolderLayoutEngine(adjust_compatible=True, colorbar_gridspec=True)  # axes stand where they are put
    figure = plt.figure(figsize=(WIDTH, tops[-1] + below), layout=stays)
    share = below / (tops[-1] + below)
    axes = figure.add_axes((0.01, share, (WIDTH - VERDICT) / WIDTH, 1 - share))
    for row, label, top, height in zip(rows, labels, tops, heights, strict=False):
        colour, shape, filled = WORD_MARKS[row.word]
        place, edge = top + height - 0.6 * LINE, -reach * 1.1
        axes.text(edge, top + 0.4 * LINE, label, va="top", fontsize=10.4)
        if row.tested and row.difference is not None:
            if row.claim.smallest:
                axes.fill_between((-1, 1), place - 0.5 * LINE, place + 0.5 * LINE, color="#e9e9e5", lw=0)
            axes.plot((0, 0), (place - 0.5 * LINE, place + 0.5 * LINE), color="#888888", lw=0.8)
            unit = row.claim.sign * (row.claim.smallest or row.difference.half_width or 1.0)
            low, high = sorted(end / unit for end in (row.difference.low, row.difference.high))
            mean = row.difference.mean / unit
            axes.plot([max(low, -reach), min(high, reach)], [place, place], color=colour, lw=1.8)
            for end, arrow in ((low, "<"), (high, ">")):
                if abs(end) > reach:
                    axes.plot(np.sign(end) * reach, place, arrow, color=colour, ms=5)
            fill = colour if filled else "white"
            style: dict[str, Any] = {"color": colour, "mfc": fill, "mec": colour, "mew": 1.5, "clip_on": False}
            axes.plot(min(max(mean, -reach), reach), place, shape, ms=6.5, **style)
            edge = reach * 1.3
        axes.text(edge, place, row.said, va="center", fontsize=10.4, color=colour)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(tops[-1], 0)
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.8)
    axes.set_xlim(-reach * 1.1, reach * 1.1)
    axes.set_xticks([-10, -1, 0, 1, 10], ["−10", "−1", "0", "1", "10"], fontsize=10.4)
    axes.minorticks_off()
    axes.set_xlabel("difference / smallest effect", fontsize=10.4)
    return figure


def _labels(rows: Sequence[Row]) -> list[str]:
    """The claims, with a star where they are primary; without their brackets, unless another reads the same then."""
    brief = [re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)$", "", row.claim.text) for row in rows]
    found = []
    for row, short in zip(rows, brief, strict=True):
        text = short if brief.count(short) == 1 else row.claim.text
        text = re.sub(r"[$\\]", "", f"★ {text}" if row.claim.primary else text)
        found.append("\n".join(textwrap.wrap(text, 58, max_lines=3, placeholder=" …")))
    return found
