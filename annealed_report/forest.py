"""All claims as a picture: differences in units of what would be worth having, and what is said of them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

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


def forest(rows: Sequence[Row], width: float = 7.5, reach: float = 60.0) -> Figure:
    """Claims from top to bottom, each difference with its interval in units of its smallest effect.

    Right of the grey band the claim holds, left of it its opposite does. The axis is linear in the band and logarithmic
    beyond; what lies beyond `reach` ends in an arrow.
    """
    labels = _labels(rows)
    line = 0.34 if max(label.count("\n") for label in labels) < 2 else 0.44
    figure, axes = plt.subplots(figsize=(width, line * len(rows) + 0.9))
    axes.axvspan(-1, 1, color="#e9e9e5", lw=0)
    axes.axvline(0, color="#888888", lw=0.8)
    for place, row in enumerate(rows):
        colour, shape, filled = WORD_MARKS[row.word]
        if row.tested and row.difference is not None:
            ends = (row.claim.sign * end / row.claim.smallest for end in (row.difference.low, row.difference.high))
            low, high = sorted(ends)
            mean = row.claim.sign * row.difference.mean / row.claim.smallest
            axes.plot([max(low, -reach), min(high, reach)], [place, place], color=colour, lw=1.8)
            for end, arrow in ((low, "<"), (high, ">")):
                if abs(end) > reach:
                    axes.plot(np.sign(end) * reach, place, arrow, color=colour, ms=5)
            mean = min(max(mean, -reach), reach)
            fill = colour if filled else "white"
            axes.plot(mean, place, shape, ms=6.5, color=colour, mfc=fill, mec=colour, mew=1.5, clip_on=False)
        axes.text(reach * 1.6, place, row.said, va="center", fontsize="small", color=colour)
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.8)
    axes.set_xlim(-reach * 1.1, reach * 1.1)
    axes.set_xticks([-10, -1, 0, 1, 10], ["−10", "−1", "0", "1", "10"])
    axes.minorticks_off()
    axes.set_xlabel("difference / smallest effect (right: the claim holds)", fontsize="small")
    return figure


def _labels(rows: Sequence[Row]) -> list[str]:
    """The claims, with a star where they are primary; without their brackets, unless another reads the same then."""
    brief = [re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)$", "", row.claim.text) for row in rows]
    found = []
    for row, short in zip(rows, brief, strict=True):
        text = short if brief.count(short) == 1 else row.claim.text
        text = re.sub(r"[$\\]", "", f"★ {text}" if row.claim.primary else text)
        found.append("\n".join(textwrap.wrap(text, 62, max_lines=3, placeholder=" …")))
    return found
