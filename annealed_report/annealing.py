"""What page 04 says of schedules: comparisons, and the rows of its tables.

Differences are paired over seeds; where they are between AVO and HVI there is a word only where kernels earn something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from annealed_core.objectives import AVO
from annealed_core.schedules import SHAPES, Linear
from annealed_core.targets import GeometricAlphas, LearnedAlphas, LinearAlphas
from annealed_report.claims import EXPLORES, IN_USE, least_earned, warmed
from annealed_report.comparison import mean_metric, paired, select, spread
from annealed_report.folded_line import BY_IWAE, metrics_of
from annealed_report.statistics import Interval, interval, paired_difference, text, word
from annealed_report.studies import GRID, GRID_METHODS, MNIST_LINES, RISES, SCHEDULED, SHORT_WARM_UP, method, of_method
from annealed_report.tables import Row, worded

CALLED = {"constant": "none", "linear": "one linear rise", "geometric": "one geometric rise"}
CALLED |= {f"cyclical, {shape}": f"four {shape} cycles" for shape in SHAPES}
CALLED |= {"alpha": "energy tempered", "capacity": "capacity"}
FAMILIES = ("VAE", "planar flow", "Householder flow", "IAF", "HVI", "HVI-AVO")
#: What is measured of exploring: the metric, the sign of "it explores more", and the smallest effect worth having.
MEASURES = {"latents in use": EXPLORES["latents in use of 40"], "active units": EXPLORES["active units of 40"]}
MEASURES |= {"KL (nats)": ("mean_kl", 1, 0.2)}
MEASURES |= {"aggregate's KL (nats)": EXPLORES["aggregate posterior's KL to the prior (Gaussian part)"]}
MEASURES |= {"coverage": EXPLORES["coverage of test digits by prior samples"]}


# ---- schedules


def trained(runs: Sequence[Any], name: str, schedule: str) -> list[Any]:
    """The runs of the VAE or of HVI by one of the schedules."""
    return select(runs, kernel=MNIST_LINES[name]["kernel"], objective=SCHEDULED[schedule])


def shift(runs: Sequence[Any], name: str, schedule: str, rival: str) -> Interval | None:
    """What one schedule changes in a method's NLL against another."""
    return paired(trained(runs, name, schedule), trained(runs, name, rival), "nll")


def side_by_side(runs: Sequence[Any]) -> list[Row]:
    """By schedule, the VAE's figures and its NLL less that without annealing and that after one linear rise."""
    found = []
    for schedule in SCHEDULED:
        own = trained(runs, "VAE", schedule)
        row: Row = {"annealing": CALLED[schedule], "NLL": mean_metric(own, "nll"), "ELBO": mean_metric(own, "elbo")}
        row["KL"] = text(mean_metric(own, "mean_kl"), 1)
        for label, rival in (("NLL − none's", "constant"), ("NLL − one rise's", "linear")):
            row[label] = "–" if schedule == rival else worded(shift(runs, "VAE", schedule, rival), -1, 0.2)
        found.append(row)
    return found


def questions(runs: Sequence[Any]) -> list[Row]:
    """Does HVI-AVO need a rise, and is it better than HVI? On the NLL; no word on AVO where kernels earn nothing."""
    without, risen = ({p: _along(runs, p, beta) for p in _PATHS} for beta in (1.0, SHORT_WARM_UP))
    hvi = {name: trained(runs, "HVI", name) for name in SCHEDULED}
    asked = {
        "HVI-AVO: a rise − none": (risen["linear"], without["linear"], False),
        "HVI-AVO − HVI, both without a rise": (without["linear"], hvi["constant"], True),
        "HVI-AVO − HVI, both with a rise": (risen["linear"], hvi["linear"], True),
        "HVI-AVO without a rise − HVI with one": (without["linear"], hvi["linear"], True),
        "geometric path − linear path": (risen["geometric"], risen["linear"], True),
        "learned path − linear path": (risen["learned"], risen["linear"], True),
    }
    found = []
    for asks, (ours, theirs, of_kernels) in asked.items():
        d = paired(ours, theirs, "nll")
        least = least_earned(ours, theirs)
        said = word(None if of_kernels and not (least and least.low > 0) else d, -1, 0.2)
        found.append(
            {"difference of": asks, "ELBO": text(paired(ours, theirs, "elbo")), "NLL": text(d), "verdict": said}
        )
    return found


_PATHS = {"linear": LinearAlphas(), "geometric": GeometricAlphas(), "learned": LearnedAlphas()}


def _along(runs: Sequence[Any], path: str, beta: Any) -> list[Any]:
    return select(runs, objective=AVO(0.2, beta, _PATHS[path]))


def explored(runs: Sequence[Any]) -> list[Row]:
    """By method, what a linear rise changes in each measure of exploring, with the word on "it explores more"."""
    return [
        {"method": name}
        | {
            label: worded(warmed(runs, name, metric), sign, smallest, 3 if metric == "coverage" else 2)
            for label, (metric, sign, smallest) in MEASURES.items()
        }
        for name in FAMILIES
    ]


def spreads(runs: Sequence[Any]) -> list[Row]:
    """By method, the standard deviation of NLL and ELBO over the sixteen warm-ups, and from the worst to the best."""
    found, ours = [], list(spread(of_method(runs, "HVI-AVO"), "nll").values())
    for name in GRID_METHODS:
        own = of_method(runs, name)
        by_seed = spread(own, "nll")
        row: Row = {"method": name, "spread of NLL": interval(list(by_seed.values()))}
        row["spread of ELBO"] = interval(list(spread(own, "elbo").values()))
        nlls = [[run.metrics["nll"] for run in select(own, seed=seed)] for seed in by_seed]
        row["worst − best NLL"] = interval([max(each) - min(each) for each in nlls])
        d = None if name == "HVI-AVO" else paired_difference(ours, list(by_seed.values()))
        found.append(row | {"HVI-AVO's spread − this": d})
    return found


def collapsed(runs: Sequence[Any]) -> list[Row]:
    """By rise, what a VAE with an autoregressive decoder keeps, and how it differs from one linear rise."""
    found = []
    for name in RISES:
        own, once = (select(runs, objective=RISES[each]) for each in (name, "linear"))
        row: Row = {
            "annealing": CALLED[name],
            "KL": mean_metric(own, "kl"),
            "latents in use": mean_metric(own, "in use"),
        }
        row |= {"ELBO": mean_metric(own, "elbo"), "NLL": mean_metric(own, "nll")}
        for label, metric, sign in (("KL − one rise's", "kl", 1), ("NLL − one rise's", "nll", -1)):
            row[label] = "–" if name == "linear" else worded(paired(own, once, metric), sign, 0.2)
        found.append(row)
    return found


def kept(runs: Sequence[Any], steps: Sequence[int] = (100, 500, 1000, 3130)) -> list[Row]:
    """By rise, how many latents are in use at some steps, and of those out of use at step 1,000 how many come back."""
    found = []
    for name in ("constant", "linear"):
        use = {run.spec.seed: in_use(run) for run in select(runs, objective=SCHEDULED[name])}
        row: Row = {"annealing": CALLED[name]}
        row |= {f"step {step:,}": interval([sum(each[step]) for each in use.values()]) for step in steps}
        out = [(then, end) for each in use.values() for then, end in zip(each[1000], each[steps[-1]], strict=True)]
        back = [end for then, end in out if not then]
        found.append(row | {"of those out at 1,000, come back": f"{sum(back)} of {len(back)}"})
    return found


def in_use(run: Any) -> dict[int, list[bool]]:
    """By step, which latents are in use."""
    lines = zip(run.metrics["steps"], run.metrics["latent_kl"], strict=True)
    return {step: [kl > IN_USE for kl in values] for step, values in lines}


def live(runs: Sequence[Any], plans: Mapping[str, dict[str, Any]]) -> list[Row]:
    """By schedule, figures of runs trained just now, and their NLL less that under the first schedule."""
    first = select(runs, **next(iter(plans.values())))
    found: list[Row] = []
    for name, plan in plans.items():
        own = select(runs, **plan)
        row: Row = {"annealing": CALLED.get(name, "four cycles")}
        row |= {label: mean_metric(own, metric) for label, metric in (("ELBO", "elbo"), ("KL", "kl"), ("NLL", "nll"))}
        changed = paired(own, first, "nll") if len(found) else None
        found.append(row | {"NLL − the first's": worded(changed, -1, 0.2)})
    return found


# ---- advice


def advice(studies: Mapping[str, Sequence[Any]]) -> list[Row]:
    """What to do, each piece with the difference that it rests on, and the word on that.

    `studies` has the records of schedules, robustness, collapse (each with the metric "in use") and folded_line.
    """
    annealed, slow, fast = studies["schedules"], GRID["rate"][0], GRID["rate"][-1]

    def corners(name: str, ours: tuple[float, float], theirs: tuple[float, float]) -> Interval | None:
        one, other = (select(studies["robustness"], **method(name, Linear(*side))) for side in (ours, theirs))
        return paired(one, other, "nll")

    def kept_kl(ours: str, theirs: str) -> Interval | None:
        one, other = (select(studies["collapse"], objective=RISES[name]) for name in (ours, theirs))
        return paired(one, other, "kl")

    ours, theirs = ([m["loss"] for m in metrics_of(studies["folded_line"], 0.1, **plan)] for plan in (BY_IWAE, {}))
    given: list[tuple[str, str, Interval | None, int, float]] = [
        ("Let β rise, whatever the method", "VAE, a rise − none: NLL", warmed(annealed, "VAE", "nll"), -1, 0.2),
        ("", "IAF, the same", warmed(annealed, "IAF", "nll"), -1, 0.2),
        ("", "HVI-AVO, the same", warmed(annealed, "HVI-AVO", "nll"), -1, 0.2),
        ("Start it low", "VAE, from 0 − from 0.8: NLL", corners("VAE", (0.0, slow), (0.8, slow)), -1, 0.2),
        ("Let it rise slowly", "VAE, slowest − fastest: NLL", corners("VAE", (0.2, slow), (0.2, fast)), -1, 0.2),
    ]
    given += [
        (
            "One rise is enough: cycles add nothing" if shape == "linear" else "",
            f"VAE, {shape} cycles − one rise: NLL",
            *(shift(annealed, "VAE", f"cyclical, {shape}", "linear"), -1, 0.2),
        )
        for shape in SHAPES
    ]
    given += [
        (
            "Don't temper the whole energy",
            "VAE, tempered − none: NLL",
            shift(annealed, "VAE", "alpha", "constant"),
            1,
            0.2,
        ),
        (
            "A capacity replaces no rise",
            "VAE, capacity − a rise: NLL",
            shift(annealed, "VAE", "capacity", "linear"),
            1,
            0.2,
        ),
        ("Expect no wider samples", "VAE, a rise − none: coverage", warmed(annealed, "VAE", "coverage"), -1, 0.01),
        (
            "A decoder that can do without z: let β rise once",
            "a rise − none: KL",
            kept_kl("linear", "constant"),
            1,
            0.2,
        ),
        ("… not in cycles", "linear cycles − a rise: KL", kept_kl("cyclical, linear", "linear"), -1, 0.2),
        (
            "A model whose posterior has two modes: weigh draws",
            "[small model](08_one_mode.ipynb), IWAE-5 − ELBO: loss",
            *(paired_difference(ours, theirs) if ours and theirs else None, -1, 0.02),
        ),
    ]
    return [
        {
            "advice": each,
            "rests on": what,
            "difference": text(d, 3 if "NLL" not in what and "KL" not in what and "same" not in what else 2),
            "claimed": f"{'<' if sign < 0 else '>'} 0 ({smallest:g})",
            "verdict": word(d, sign, smallest),
        }
        for each, what, d, sign, smallest in given
    ]
