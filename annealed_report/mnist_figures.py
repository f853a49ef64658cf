"""Figures of the auto-encoders on MNIST, for the pages on training, on likelihoods and on the earlier failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from annealed_core.evidence import log_mean_weight
from annealed_report import figures
from annealed_report.comparison import mean_metric, paired, select
from annealed_report.mnist_tables import PUBLISHED, bounded
from annealed_report.plotting import COLOURS, DARK, intervals, means_and_errors, panels
from annealed_report.posterior import KERNELS, OBJECTIVES
from annealed_report.statistics import interval
from annealed_report.studies import MNIST_LINES, THREE, of_method

KEYS = {"VAE": "vae", "HVI": "hvi", "HVI-AVO": "avo"}  # the colours of the three methods
_FIELDS = {"elbo": "ELBO (nats)", "reconstruction": "reconstruction (nats)", "kl": "KL of the path (nats)"}


# ---- training


def training(groups: Mapping[str, Sequence[Any]]) -> Figure:
    """The validation bound and its two parts after every epoch, by method."""
    figure, axes = panels(1, 3, 9, 3.2)
    histories = {KEYS[name]: [run.history for run in runs] for name, runs in groups.items()}
    for ax, (field, label) in zip(axes[0], _FIELDS.items(), strict=True):
        figures.curves(ax, histories, "epoch", field)
        ax.set_title(label)
    last = max(line["epoch"] for line in next(iter(histories.values()))[0])
    for ax in axes[0]:
        ax.set_xticks(range(1, last + 1, max(1, last // 5)))
    axes[0, 0].legend()
    return figure


def posteriors(runs: Sequence[Any]) -> Figure:
    """The validation bound of posteriors at a fixed decoder over the steps, kernels with torch's weights."""
    figure, axes = panels(1, 2, 6.4, 3.2, sharey=True)
    gaussian = select(runs, kernel=None)
    for ax, (encoder, said) in zip(axes[0], {"free": "encoder learns", "frozen": "encoder fixed"}.items(), strict=True):
        own = select(runs, kernel=KERNELS["torch's weights"], encoder=encoder)
        groups = {"vae": gaussian if encoder == "free" else []}
        groups |= {
            key: select(own, objective=OBJECTIVES[name]) for key, name in {"hvi": "ELBO", "avo": "0.2 AVO"}.items()
        }
        figures.curves(ax, {key: [r.history for r in found] for key, found in groups.items() if found}, "step", "elbo")
        ax.set(title=said, ylim=(-115, -92), xticks=(0, 2000, 4000))
    axes[0, 0].set_ylabel("ELBO (nats)")
    axes[0, 0].legend()
    return figure


def beside_published(full: Sequence[Any]) -> Figure:
    """By method, the paired difference of the NLL to the VAE, and what the paper's figures differ by."""
    figure, axes = panels(1, 1, 7.2, 4.2)
    names = [name for name in MNIST_LINES if name not in ("VAE", "IWAE, K = 1")]
    vae, groups = of_method(full, "VAE"), {}
    for name in names:
        if found := paired(of_method(full, name), vae, "nll"):
            groups[name] = {"other": found}
    intervals(axes[0, 0], groups, "NLL less that of the VAE (nats; left: better)", zero=True)
    for row, name in enumerate(groups):
        if name in PUBLISHED:
            paper = PUBLISHED[name][0] - PUBLISHED["VAE"][0]
            axes[0, 0].plot(paper, row, "D", ms=7, mfc="none", color=DARK, label="the paper", zorder=3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    axes[0, 0].legend([shown["other"], shown["the paper"]], ["ours, full", "the paper"], loc="upper left")
    return figure


def longer(long: Sequence[Any]) -> Figure:
    """The validation bound over long training, and how much higher HVI-AVO's is than the two others' at each epoch."""
    figure, axes = panels(1, 2, 9, 3.4)
    by = {KEYS[name]: of_method(long, name) for name in THREE}
    figures.curves(axes[0, 0], {key: [run.history for run in runs] for key, runs in by.items()}, "epoch", "elbo")
    axes[0, 0].set(title="validation ELBO (nats)", ylim=(-100, None))
    axes[0, 0].legend()
    epochs = [line["epoch"] for line in by["avo"][0].history]
    for place, other in enumerate(("hvi", "vae")):
        pairs = list(zip(by["avo"], by[other], strict=True))
        found = [interval([a.history[n]["elbo"] - b.history[n]["elbo"] for a, b in pairs]) for n in range(len(epochs))]
        figures.band(axes[0, 1], [epoch + 1.5 * place for epoch in epochs], found, other)
    axes[0, 1].axhline(0, color="#999999", lw=1)
    axes[0, 1].set(xlabel="epoch", title="how much higher HVI-AVO's is", ylim=(-1, 1))
    shown, _ = axes[0, 1].get_legend_handles_labels()
    axes[0, 1].legend(shown, ["than HVI's", "than the VAE's"])
    return figure


# ---- likelihoods


def axes_of(u: Tensor) -> Tensor:
    """The two directions in which draws u (n, dim) spread most about 0: (dim, 2)."""
    return torch.linalg.svd(u, full_matrices=False).Vh[:2].T


def too_narrow(encoder: Tensor, posterior: Tensor, log_weights: Mapping[str, Tensor], log_px: float) -> Figure:
    """Why sampling falls short for one image: two clouds of draws in a plane, and the log-weights of two estimates.

    Args:
        encoder, posterior: draws in the plane, in units of the encoder's standard deviations, (n, 2).
        log_weights: by method (the key of its colour), in nats, (n,).
        log_px: what annealing finds.
    """
    figure, axes = panels(1, 2, 9, 3.8)
    clouds = {"ais": ("true posterior (annealed)", posterior), "vae": ("encoder's Gaussian", encoder)}
    for key, (label, z) in clouds.items():
        axes[0, 0].scatter(z[:, 0], z[:, 1], s=9, alpha=0.5, color=COLOURS[key], label=label, linewidths=0)
    limit = 1.05 * float(torch.cat([encoder, posterior]).abs().quantile(0.998))
    axes[0, 0].set(xlim=(-limit, limit), ylim=(-limit, limit * 1.25), aspect="equal", title="draws of z for one image")
    axes[0, 0].set(xlabel="the encoder's standard deviations")
    axes[0, 0].legend(markerscale=2, loc="upper left")
    every = torch.cat(list(log_weights.values())) - log_px
    bins = np.linspace(max(float(every.min()), -25.0), float(every.max()) + 0.5, 46)
    labels = {"vae": "of the encoder's draws", "ais": "of annealing"}
    for key, values in log_weights.items():
        share = np.full(len(values), 1 / len(values))
        shown = (values - log_px).numpy()
        axes[0, 1].hist(shown, bins, weights=share, color=COLOURS[key], alpha=0.65, label=labels[key])
    axes[0, 1].axvline(0, color=DARK, lw=1)
    axes[0, 1].set(title="share of the weights", xlabel="log w − log p(x) (nats)")
    axes[0, 1].legend(loc="upper left")
    return figure


def settling(log_weights: Tensor, annealed: Tensor, fitted: Tensor, fitted_draws: int) -> Figure:
    """The NLL by more and more of an encoder's samples, and by fitted ones, above annealing's line.

    Intervals are those of the paired difference to annealing over images.

    Args:
        log_weights: of the encoder's samples, (n, n_images).
        annealed, fitted: log p(x) of each image, (n_images,).
        fitted_draws: how many draws an image the fits took in all.
    """
    figure, axes = panels(1, 1, 7, 3.8)
    line = -float(annealed.mean())
    counts = [k for k in (1, 10, 100, 1000, 5000, 35_000) if k <= len(log_weights)]
    short = [interval((annealed - shorter(log_weights, k)).tolist()) for k in counts]
    looks = {"vae": (counts, short, "samples from the encoder", "o-")}
    apart = interval((annealed - fitted).tolist())
    looks["target"] = ([fitted_draws], [apart], "proposals fitted to each image", "D")
    for key, (places, found, label, mark) in looks.items():
        mean, error = means_and_errors(found)
        y = [line + each for each in mean]
        axes[0, 0].errorbar(places, y, yerr=error, fmt=mark, ms=6, capsize=3, color=COLOURS[key], label=label)
    axes[0, 0].axhline(line, color=COLOURS["ais"], lw=2, ls="--", label="annealing")
    axes[0, 0].set(xscale="log", xlabel="draws for each image", ylabel="NLL (nats)")
    axes[0, 0].set_xticks(counts, [f"{k:,}" for k in counts])
    axes[0, 0].minorticks_off()
    axes[0, 0].legend()
    return figure


def shorter(log_weights: Tensor, k: int) -> Tensor:
    """The mean over blocks of the estimate from k weights each, (n, n_images) -> (n_images,)."""
    blocks = min(len(log_weights) // k, 100)
    each = log_weights[: blocks * k].view(blocks, k, -1)
    return log_mean_weight(each.transpose(0, 1))[0].mean(0)


def agreement(records: Sequence[Any]) -> Figure:
    """By run, how far two estimates of log p(x) by sampling lie from annealing's, with errors over images."""
    figure, axes = panels(1, 1, 7, 3.9)
    runs = [(f"{name}, seed {run.spec.seed}", run.metrics) for name in THREE for run in of_method(records, name)]
    looks = {"is_minus_ais": ("other", "o", "samples from the encoder")}
    looks["adaptive_minus_ais"] = ("target", "D", "proposals fitted to each image")
    for field, (key, mark, label) in looks.items():
        errors = [1.96 * metrics[f"{field}_se"] for _, metrics in runs]
        means = [metrics[field] for _, metrics in runs]
        look = {"fmt": mark, "ms": 5, "capsize": 3, "color": COLOURS[key], "label": label}
        axes[0, 0].errorbar(means, range(len(runs)), xerr=errors, **look)
    axes[0, 0].axvline(0, color=COLOURS["ais"], lw=2, ls="--")
    axes[0, 0].set_yticks(range(len(runs)), [name for name, _ in runs])
    axes[0, 0].set(ylim=(len(runs) - 0.5, -1.9), xlabel="log p(x), this estimate − annealing (nats)")
    axes[0, 0].legend(loc="upper left", ncols=1)
    return figure


def lost(records: Sequence[Any]) -> Figure:
    """By method, from the annealed NLL to the bound: what the family of posteriors loses, and what the encoder."""
    figure, axes = panels(1, 1, 7, 3.9)
    runs = {name: run.metrics for name in MNIST_LINES for run in of_method(bounded(records), name)}
    gaps = {"approximation_gap": ("the best Gaussian base", "more"), "amortisation_gap": ("the encoder", "less")}
    left = np.zeros(len(runs))
    for field, (label, key) in gaps.items():
        found = np.array([metrics[field] for metrics in runs.values()])
        errors = [1.96 * metrics[f"{field}_se"] for metrics in runs.values()]
        look = {"color": COLOURS[key], "label": label, "error_kw": {"ecolor": DARK, "lw": 1, "capsize": 2}}
        axes[0, 0].barh(list(runs), found, left=left, xerr=errors, **look)
        left += found
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_xlabel("what the bound lacks to log p(x) (nats)")
    axes[0, 0].legend(title="lost by", loc="upper right")
    return figure


# ---- the earlier failure


def waterfall(groups: Mapping[str, Sequence[Any]], metric: str, marks: Mapping[str, float], label: str) -> Figure:
    """A metric of one group after the other, as bars from the one before to its own; `marks` are lines with names."""
    figure, axes = panels(1, 1, 7.2, 3.6)
    found = [mean_metric(runs, metric) for runs in groups.values()]
    values = [each.mean for each in found if each is not None]
    for row, value in enumerate(values):
        before = values[row - 1] if row else min(values) - 8
        axes[0, 0].barh(
            row, value - before, left=before, height=0.62, color=COLOURS["quick"] if row else COLOURS["avo"]
        )
        axes[0, 0].plot([value, value], [row - 0.31, row + 1.31 if row + 1 < len(values) else row + 0.31], color=DARK)
        falls = value < before
        place, side = (value - 0.8, "right") if falls else (value + 0.8, "left")
        axes[0, 0].text(place, row, f"{value:.1f}", va="center", ha=side, fontsize="small")
    for name, place in marks.items():
        axes[0, 0].axvline(place, color=DARK, ls="--", lw=1.5)
        axes[0, 0].text(place + 0.6, len(values) - 0.4, name, color=DARK, fontsize="small", va="bottom")
    axes[0, 0].set_yticks(range(len(groups)), list(groups))
    axes[0, 0].set(ylim=(len(values) - 0.4, -0.6), xlim=(min(values) - 8, max(values) + 8), xlabel=label)
    return figure


def every_run(groups: Mapping[str, Sequence[Any]], metric: str, mark: tuple[str, float], label: str) -> Figure:
    """A metric of every run, one dot each on a logarithmic axis, one line a group, with a line that has a name."""
    figure, axes = panels(1, 1, 7.6, 0.36 * len(groups) + 1.2)
    for row, runs in enumerate(groups.values()):
        values = [run.metrics[metric] for run in runs]
        beyond = max(values) > mark[1]
        look = {"marker": "s"} if beyond else {"marker": "o", "mfc": "none"}
        axes[0, 0].plot(values, [row] * len(values), ls="", ms=6, color=COLOURS["avo"], **look)
    axes[0, 0].axvline(mark[1], color=DARK, ls="--", lw=1.5)
    axes[0, 0].text(mark[1] * 1.01, -0.5, mark[0], color=DARK, fontsize="small", va="bottom")
    axes[0, 0].set(xscale="log", xlabel=label, ylim=(len(groups) - 0.5, -1.2))
    axes[0, 0].set_yticks(range(len(groups)), list(groups))
    axes[0, 0].set_xticks([100, 120, 150, 200, 250], ["100", "120", "150", "200", "250"])
    axes[0, 0].xaxis.set_minor_formatter(plt.NullFormatter())
    return figure
