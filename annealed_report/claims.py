"""Claims: what the paper, the earlier report and this one say, each as a difference with a sign.

    for row in rows("full"):
        print(row.word, row.claim.text)

`CLAIMS` is what the summary, the README and their tests read. A claim names the study that has its runs, and the
contrast taken of them, whose interval gives the word: see `comparison.verdict`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from annealed_core.schedules import SHAPES
from annealed_report import results
from annealed_report.comparison import (
    Interval,
    interval,
    loses_a_mode,
    of_specs,
    paired,
    paired_difference,
    paired_shares,
    select,
    spread,
    text,
    verdict,
)
from annealed_report.earlier import FAULTS, faulty
from annealed_report.folded_line import BY_AVO, metrics_of
from annealed_report.studies import (
    CHOSEN,
    ENERGIES,
    LINES,
    NEAR,
    RISES,
    SCHEDULED,
    SHORT_WARM_UP,
    WARM_UP,
    method,
    of_method,
    searched,
)

#: What is taken of the runs (or records) of a study: an interval, or None where they are not there.
Contrast = Callable[[Sequence[Any]], Interval | None]


@dataclass(frozen=True)
class Claim:
    """A claim, and what decides it.

    Attributes:
        text: the claim and, in brackets, the difference that it is about.
        study: whose runs decide it, a name of `studies.STUDIES`.
        contrast: what is taken of them.
        sign: +1 where the claim says that the difference is positive, -1 where negative.
        smallest: the smallest effect worth having.
        section: where it is shown, "02_toy_energies#Modes lost".
        paper, earlier: what the paper and the earlier report say of it; a dash for nothing.
        primary: whether it is one of the paper's own claims that this report stands or falls by.
    """

    text: str
    study: str
    contrast: Contrast
    sign: int
    smallest: float
    section: str
    paper: str = "–"
    earlier: str = "–"
    primary: bool = False

    @property
    def source(self) -> str:
        """Whose claim it is: "paper", "earlier report" or "ours"."""
        return "paper" if self.paper != "–" else "earlier report" if self.earlier != "–" else "ours"

    @property
    def page(self) -> str:
        """The notebook that shows it, without its ending."""
        return self.section.partition("#")[0]

    @property
    def link(self) -> str:
        """A link to the section that shows it, in Markdown."""
        stem, _, section = self.section.partition("#")
        return f"[{stem[:2]}: {section}]({stem}.ipynb#{section.replace(' ', '-')})"


@dataclass(frozen=True)
class Row:
    """A claim with what its runs say: `difference`, and `live` where runs of another profile stand beside them."""

    claim: Claim
    difference: Interval | None
    live: Interval | None = None

    @property
    def word(self) -> str:
        """One of `comparison.VERDICTS`."""
        return verdict(self.difference, self.claim.sign, self.claim.smallest)

    def cells(self, profile: str, live: str) -> dict[str, str]:
        """A line of the table of claims; the arguments name the profiles."""
        claim = self.claim
        return {
            "claim": claim.text,
            "paper": claim.paper,
            "earlier report": claim.earlier,
            f"ours, {live}": text(self.live),
            f"ours, {profile}": text(self.difference),
            "claimed": f"{'<' if claim.sign < 0 else '>'} 0 ({claim.smallest:g})",
            "verdict": f"**{self.word}**",
            "shown in": claim.link,
        }


def rows(profile: str = "full", live: Mapping[str, Sequence[Any]] | None = None) -> list[Row]:
    """Every claim with what the committed records of that profile say of it.

    Args:
        profile: whose records are read.
        live: runs to stand beside them, by study.
    """
    records = {name: results.load(profile, name) for name in {claim.study for claim in CLAIMS}}
    beside = live or {}
    return [Row(c, c.contrast(records[c.study]), c.contrast(beside.get(c.study, []))) for c in CLAIMS]


# ---- contrasts


def _lines(target: str, ours: str, theirs: str, metric: str = "total_variation") -> Contrast:
    """Between two lines of the table of all methods, on one energy."""
    return _between({"target": target, **LINES[ours]}, {"target": target, **LINES[theirs]}, metric)


def _lost(target: str, ours: str, theirs: str) -> Contrast:
    """Between the shares of seeds that lose a mode."""

    def contrast(runs: Sequence[Any]) -> Interval | None:
        sides = [select(runs, target=target, **LINES[line]) for line in (ours, theirs)]
        return paired_shares(*([loses_a_mode(run) for run in side] for side in sides)) if all(sides) else None

    return contrast


def _methods(ours: str, theirs: str, metric: str = "nll") -> Contrast:
    """Between two methods on MNIST, at whatever warm-up."""
    return lambda runs: paired(of_method(runs, ours), of_method(runs, theirs), metric)


def _between(ours: dict[str, Any], theirs: dict[str, Any], metric: str) -> Contrast:
    """Between runs with some fields and runs with others."""
    return lambda runs: paired(select(runs, **ours), select(runs, **theirs), metric)


def _searched(change: str) -> Contrast:
    """Between HVI-AVO and HVI with a change of the search."""
    ours, theirs = searched("HVI-AVO", change), searched("HVI", change)
    return lambda runs: paired(of_specs(runs, ours), of_specs(runs, theirs), "valid_elbo")


def _with_faults(*faults: str) -> dict[str, Any]:
    return {"kernel": NEAR, **faulty(*faults, beta=WARM_UP)}


def _short_of_annealing(runs: Sequence[Any]) -> Interval | None:
    found = [run.metrics["is_minus_ais"] for run in of_method(runs, "VAE")]
    return interval(found) if found else None


def _steadier(runs: Sequence[Any]) -> Interval | None:
    """Between the spreads over all warm-ups of HVI-AVO and of HVI, seed by seed."""
    ours, theirs = (list(spread(of_method(runs, name), "nll").values()) for name in ("HVI-AVO", "HVI"))
    return paired_difference(ours, theirs) if ours and theirs else None


def _model(value: Callable[[dict[str, float]], Any], share: bool = False) -> Contrast:
    """Between the models learned by AVO and by the ELBO, at little noise."""

    def contrast(runs: Sequence[Any]) -> Interval | None:
        ours, theirs = ([value(m) for m in metrics_of(runs, 0.1, **plan)] for plan in (BY_AVO, {}))
        return (paired_shares if share else paired_difference)(ours, theirs) if ours and theirs else None

    return contrast


def _tilted(runs: Sequence[Any]) -> Interval | None:
    found = [m["tilt"] - m["tilt_ml"] for m in metrics_of(runs, 0.1)]
    return interval(found) if found else None


def with_latents_in_use(runs: Sequence[Any]) -> list[Any]:
    """The runs (or records) with the metric "in use": latents whose own KL to the prior is above 0.1 nat."""
    used = ({"in use": sum(kl > 0.1 for kl in run.metrics["latent_kl"])} for run in runs)
    return [dataclasses.replace(run, metrics=run.metrics | more) for run, more in zip(runs, used, strict=True)]


def _warmed(name: str, metric: str) -> Contrast:
    """What linear warm-up changes for a method."""
    with_it, without = method(name, SHORT_WARM_UP), method(name, 1.0)
    return lambda runs: _between(with_it, without, metric)(with_latents_in_use(runs))


# ---- the claims

_LOST, _FIT = "02_toy_energies#Modes lost", "02_toy_energies#The full runs"
_TABLE, _LONG, _FAILURE, _SEARCHED, _SIDES = (
    f"03_mnist_vae#{section}"
    for section in (
        "Next to the published figures",
        "Longer training",
        "Anatomy of the failure",
        "What would make the chain earn its cost?",
        "From both sides",
    )
)
_GRID, _LEARNED, _EXPLORED, _SIDE, _COLLAPSE = (
    f"04_annealing#{section}"
    for section in (
        "Who minds the schedule?",
        "Is the learned model biased?",
        "Does warm-up make them explore?",
        "Every schedule, side by side",
        "A decoder that can do without z",
    )
)
_GOOD_STARTS = {
    "gated, near the identity": ("initialisation", "HVI near the identity, AVO", "HVI near the identity, ELBO"),
    "residual": ("kernels", "residual HVI-AVO", "residual HVI, ELBO"),
}


def _on_energies() -> list[Claim]:
    missed, shown = "ELBO-trained HVI misses", ("by figures", "by figures")
    closer = "AVO comes closer than ELBO-trained HVI (total variation, AVO − ELBO)"
    flows = "deterministic flows can't fit separated modes (total variation, IAF − HVI, both by the ELBO)"
    helped = "AVO also helps flows (total variation, IAF-AVO − IAF by the ELBO)"
    hvi, one, well = (
        ("HVI-AVO", "HVI, ELBO"),
        "share of seeds that lose one, AVO − ELBO",
        "when its transitions start well",
    )
    found = [
        Claim(
            f"Energy {t}: {missed} modes that AVO finds ({one})", "grid", _lost(t, *hvi), -1, 0.1, _LOST, *shown, True
        )
        for t in "AD"
    ]
    for start, (study, *lines) in _GOOD_STARTS.items():
        such = f"{missed} such modes also {well} ({start}; the same share)"
        found += [Claim(f"Energy {t}: {such}", study, _lost(t, *lines), -1, 0.1, _LOST) for t in "AD"]
    found += [Claim(f"Energy {t}: {closer}", "grid", _lines(t, *hvi), -1, 0.02, _FIT, *shown) for t in ENERGIES]
    for said, sign, ours, theirs in ((flows, 1, "IAF, ELBO", "HVI, ELBO"), (helped, -1, "IAF-AVO", "IAF, ELBO")):
        found += [
            Claim(f"Energy {t}: {said}", "grid", _lines(t, ours, theirs), sign, 0.02, _FIT, earlier="by a figure")
            for t in "AD"
        ]
    return found


def _on_mnist() -> list[Claim]:
    beats_hvi, beats_vae = _methods("HVI-AVO", "HVI"), _methods("HVI-AVO", "VAE")
    hvi, vae = (
        ("AVO improves HVI (NLL, HVI-AVO − HVI)", "−1.56"),
        ("HVI-AVO beats the VAE (NLL, HVI-AVO − VAE)", "−1.44"),
    )
    best, bound = f"MNIST, HVI-AVO as it does best on validation ({CHOSEN})", "validation bound, HVI-AVO − HVI"
    faults = tuple(FAULTS)
    ruins = _between(_with_faults(*faults), _with_faults(*faults[1:]), "nll")
    others = _between(_with_faults(*faults[1:]), _with_faults(), "nll")
    return [
        Claim(f"MNIST: {hvi[0]}", "mnist", beats_hvi, -1, 0.5, _TABLE, hvi[1], "+12.77 (grey pixels)", True),
        Claim(f"MNIST: {vae[0]}", "mnist", beats_vae, -1, 0.5, _TABLE, vae[1], "+14.51 (grey pixels)", True),
        Claim(
            "MNIST: without AVO, HVI is worse than the VAE (NLL, HVI − VAE)",
            *("mnist", _methods("HVI", "VAE"), 1, 0.12, _TABLE, "+0.12", "+1.74 (grey pixels)"),
        ),
        Claim(
            "MNIST: an IAF beats the Gaussian posterior (NLL, IAF − VAE)",
            *("mnist", _methods("IAF", "VAE"), -1, 0.5, _TABLE, "−0.80"),
        ),
        Claim(
            "MNIST: training by more importance samples helps (NLL, IWAE with K = 50 − K = 1)",
            *("mnist", _methods("IWAE, K = 50", "IWAE, K = 1"), -1, 0.5, _TABLE),
        ),
        Claim(f"MNIST, 200 epochs: {hvi[0]}", "long", beats_hvi, -1, 0.5, _LONG, hvi[1]),
        Claim(f"MNIST, 200 epochs: {vae[0]}", "long", beats_vae, -1, 0.5, _LONG, vae[1]),
        Claim(
            f"MNIST, kernels with torch's initial weights: AVO improves HVI ({bound})",
            *("regime", _searched("torch's initial weights"), 1, 0.5, _SEARCHED),
        ),
        Claim(
            f"MNIST, a chain from the prior: AVO improves HVI ({bound})",
            *("regime", _searched("from the prior, hidden 200"), 1, 0.5, _SEARCHED),
        ),
        Claim(f"{best}: it beats HVI (NLL, HVI-AVO − HVI)", "chosen", beats_hvi, -1, 0.5, _SEARCHED, hvi[1]),
        Claim(f"{best}: it beats the VAE (NLL, HVI-AVO − VAE)", "chosen", beats_vae, -1, 0.5, _SEARCHED, vae[1]),
        Claim(
            "MNIST, the earlier code's faults: a likelihood summed over the batch ruins training "
            "(NLL, all five faults − the other four)",
            *("anatomy", ruins, 1, 1.0, _FAILURE),
        ),
        Claim(
            "MNIST: its other four faults make it worse too (NLL, four faults − none)",
            *("anatomy", others, 1, 0.5, _FAILURE),
        ),
        Claim(
            "MNIST: 5,000 samples from the encoder's posterior fall short of a likelihood (log p(x) of a VAE on a "
            "hundred images, batches of 256, samples − annealing)",
            *("agreement", _short_of_annealing, -1, 0.5, _SIDES),
        ),
    ]


def _on_annealing() -> list[Claim]:
    measures = {
        "latents in use of 40": ("in use", 1, 0.5),
        "active units of 40": ("active_units", 1, 0.5),
        "aggregate posterior's KL to the prior (Gaussian part)": ("aggregate_gaussian_kl", -1, 0.1),
        "coverage of test digits by prior samples": ("coverage", 1, 0.01),
    }
    methods = {"VAE": "the VAE", "planar flow": "planar flows", "IAF": "IAFs"}
    single, plain, cycles = ({"objective": RISES[name]} for name in ("linear", "constant", "cyclical, linear"))
    plain_vae = {"kernel": None, "objective": SCHEDULED["linear"]}
    return [
        Claim(
            "AVO is less sensitive to warm-up than HVI (spread of the NLL over 16 pairs of $\\beta_0$ and $\\gamma$, "
            "HVI-AVO − HVI)",
            *("robustness", _steadier, -1, 0.05, _GRID, "by a figure", "–", True),
        ),
        Claim(
            "A posterior of one mode biases the model: towards true posteriors of one mode "
            "(σ = 0.1; tilt beyond maximum likelihood, HVI by the ELBO)",
            *("folded_line", _tilted, 1, 0.1, _LEARNED, "by a figure"),
        ),
        Claim(
            "… and AVO ends at such a model less often (σ = 0.1; share of seeds, AVO − ELBO)",
            "folded_line",
            _model(lambda m: m["left"] * m["right"] < 0, share=True),
            *(-1, 0.1, _LEARNED, "by a figure"),
        ),
        Claim(
            "… and AVO mends it (σ = 0.1; nats of likelihood lost, AVO − ELBO)",
            *("folded_line", _model(lambda m: m["loss"]), -1, 0.02, _LEARNED, "by a figure", "–", True),
        ),
        *(
            Claim(
                f"Warm-up makes {called} explore: {label}, linear warm-up − none",
                *("schedules", _warmed(name, metric), sign, smallest, _EXPLORED, "–", "expected"),
            )
            for name, called in methods.items()
            for label, (metric, sign, smallest) in measures.items()
        ),
        *(
            Claim(
                f"Cyclical annealing helps the VAE on MNIST (NLL, four {shape} cycles − a single rise)",
                "schedules",
                _between(plain_vae | {"objective": SCHEDULED[f"cyclical, {shape}"]}, plain_vae, "nll"),
                *(-1, 0.2, _SIDE, "–", "hoped for"),
            )
            for shape in SHAPES
        ),
        Claim(
            "With an autoregressive decoder, warm-up keeps the posterior from collapsing (KL, a single rise − none)",
            *("collapse", _between(single, plain, "kl"), 1, 0.2, _COLLAPSE),
        ),
        Claim(
            "… and cycles do so better than a single rise (KL, four linear cycles − a single rise)",
            *("collapse", _between(cycles, single, "kl"), 1, 0.2, _COLLAPSE, "–", "hoped for"),
        ),
    ]


CLAIMS: tuple[Claim, ...] = (*_on_energies(), *_on_mnist(), *_on_annealing())
