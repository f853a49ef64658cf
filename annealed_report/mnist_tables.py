"""Tables of the auto-encoders on MNIST: rows for the pages on training, on likelihoods and on the earlier failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from annealed_core.judging.exploration import aggregate_gaussian
from annealed_report import results
from annealed_report.comparison import mean_metric, of_specs, paired, select
from annealed_report.earlier import FAULTS, faulty
from annealed_report.statistics import Interval, interval, text
from annealed_report.studies import FAR, MNIST_LINES, NEAR, THREE, WARM_UP, of_method, searched
from annealed_report.tables import Row

#: Test NLL in nats: the paper's, and the earlier report's, which is of grey pixels.
PUBLISHED: dict[str, tuple[float, float | None]] = {
    "VAE": (87.50, 94.16),
    "HVI": (87.62, 95.90),
    "HVI-AVO": (86.06, 108.67),
    "IAF": (86.70, None),
}
PAIRS = ("HVI − VAE", "HVI-AVO − VAE", "HVI-AVO − HVI")
#: The faults' short names.
SHORT = dict(zip(FAULTS, ("the sum", "live encoder", "decoder", "grey pixels", "fixed order"), strict=True))
FIFTH, START = "HVI, AVO in a fifth of the steps", "torch's initial weights"

Groups = Mapping[str, Sequence[Any]]


def between(runs: Sequence[Any], pair: str, metric: str = "nll") -> Interval | None:
    """The paired difference of a metric between two methods, such as "HVI − VAE"."""
    ours, theirs = pair.split(" − ")
    return paired(of_method(runs, ours), of_method(runs, theirs), metric)


def means(runs: Sequence[Any], columns: Mapping[str, str], digits: int = 2) -> Row:
    """Cells of a table: column -> mean and interval of a metric."""
    return {column: text(mean_metric(runs, metric), digits) for column, metric in columns.items()}


def origin(records: Sequence[Any], study: str) -> str:
    """Where records come from, and what it means if several states of the code made them."""
    mixed = results.MIXED.get(study) if records else None
    return results.provenance(records) + (f"; the study mixes {mixed}" if mixed else "")


# ---- training


def trained(groups: Groups, x: Tensor) -> list[Row]:
    """What trained models come to, by method; x are images for the aggregate posterior."""
    rows = []
    for name, runs in groups.items():
        row: Row = {"method": name}
        row |= means(runs, {"test ELBO": "elbo", "KL of the path": "kl", "NLL": "nll"})
        row |= means(runs, {"active units": "active_units"}, 1)
        row["aggregate's KL"] = interval([aggregate_gaussian(run.vae, x)[0] for run in runs]).text()
        each = [run.metrics["ess"] * run.metrics["nll_samples"] for run in runs]
        rows.append(row | {"effective": interval(each).text(1)})
    return rows


def beside_published(full: Sequence[Any], live: Sequence[Any], profile: str) -> list[Row]:
    """By method the NLL of the paper, of the earlier report, of live and of full runs; their difference and bound."""
    rows = []
    for name in MNIST_LINES:
        own = of_method(full, name)
        paper, earlier = PUBLISHED.get(name, (None, None))
        row: Row = {"method": name, "paper": _nll(paper), "earlier report": _nll(earlier)}
        row |= means(of_method(live, name), {f"ours, {profile}": "nll"}) | means(own, {"ours, full": "nll"})
        row["− VAE"] = "0" if name == "VAE" else text(between(full, f"{name} − VAE"))
        rows.append(row | means(own, {"ELBO": "elbo"}))
    return rows


def _nll(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def longer(long: Sequence[Any]) -> list[Row]:
    """After long training: likelihood, bound, KL, and the epochs that were kept."""
    rows = []
    for name in THREE:
        own = of_method(long, name)
        row: Row = {"method": name} | means(own, {"NLL": "nll", "ELBO": "elbo", "KL": "kl"})
        rows.append(row | {"epoch kept": ", ".join(str(run.metrics["best_epoch"]) for run in own)})
    return rows


# ---- likelihoods

_BY = {"encoder's samples": "is_nll", "fitted": "adaptive_nll", "annealed": "ais_nll"}


def _with_error(metrics: Mapping[str, float], field: str) -> str:
    return f"{metrics[field]:.2f} ± {1.96 * metrics[f'{field}_se']:.2f}"


def bounded(records: Sequence[Any]) -> list[Any]:
    """The records of which a hundred images were judged from both sides."""
    return [record for record in records if record.metrics.get("bounds_images")]


def sandwich(records: Sequence[Any]) -> list[Row]:
    """By method, the NLL by samples and by annealing, their difference, and the gap between bounds from both sides."""
    columns = {"NLL, 5,000 samples": "is_nll", "NLL, annealed": "ais_nll"}
    columns |= {"log p(x), samples − annealed": "is_minus_ais", "gap of the sandwich": "bdmc_gap"}
    return [
        {"method": name}
        | {column: _with_error(record.metrics, field) for column, field in columns.items()}
        | {"Pareto k": f"{record.metrics['pareto_k']:.2f}"}
        for name in MNIST_LINES
        for record in of_method(bounded(records), name)
    ]


def agreement(records: Sequence[Any]) -> list[Row]:
    """By method, the NLL by three estimates over seeds, how far two are from annealing's, and the fitted's Pareto k."""
    rows = []
    for name in THREE:
        own = of_method(records, name)
        row: Row = {"method": name} | means(own, {f"NLL, {label}": field for label, field in _BY.items()})
        row |= means(own, {"encoder's − annealed": "is_minus_ais", "fitted − annealed": "adaptive_minus_ais"})
        rows.append(row | means(own, {"Pareto k, fitted": "adaptive_pareto_k"}))
    return rows


def by_estimate(mnist: Sequence[Any], agreed: Sequence[Any]) -> list[Row]:
    """What methods differ by according to each estimate, on the same hundred images: three seeds, or one."""
    rows: list[Row] = [
        {"NLL of": pair}
        | {f"by {label}": text(between(agreed, pair, field)) for label, field in _BY.items()}
        | {"seeds": len({record.spec.seed for record in agreed})}
        for pair in PAIRS
    ]
    for name in ("IAF", "IWAE, K = 5", "IWAE, K = 50"):
        row: Row = {"NLL of": f"{name} − VAE"}
        for label, field in _BY.items():
            found = None if field == "adaptive_nll" else between(bounded(mnist), f"{name} − VAE", field)
            row[f"by {label}"] = text(found).replace(" (1 seed)", "")
        rows.append(row | {"seeds": 1})
    return rows


# ---- the earlier failure


def with_faults(records: Sequence[Any], faults: Sequence[str], kernel: Any = NEAR, chance: float = 0.2) -> list[Any]:
    """The records of training with these of the earlier faults."""
    return select(records, kernel=kernel, **faulty(*faults, beta=WARM_UP, chance=chance))


def taken_away(records: Sequence[Any]) -> dict[str, list[Any]]:
    """All five faults, then one after the other taken away, until none is left."""
    names = tuple(FAULTS)
    steps = {"all five faults": names} | {f"… without {SHORT[names[n]]}": names[n + 1 :] for n in range(len(names))}
    return {label: with_faults(records, faults) for label, faults in steps.items()}


def alone(records: Sequence[Any]) -> dict[str, list[Any]]:
    """Each fault alone."""
    return {f"only {short}": with_faults(records, (name,)) for name, short in SHORT.items()}


def started(records: Sequence[Any]) -> dict[str, list[Any]]:
    """The kernels from torch's initial weights, AVO in every batch, and the two ways to mix AVO without a fault."""
    names = tuple(FAULTS)
    return {
        f"all five, {START}": with_faults(records, names, FAR),
        f"without the sum, {START}": with_faults(records, names[1:], FAR),
        f"none, {START}": with_faults(records, (), FAR),
        "all five, AVO in every batch": with_faults(records, names, chance=1.0),
        f"all five, AVO in every batch, {START}": with_faults(records, names, FAR, chance=1.0),
        "none": with_faults(records, ()),
        "none, 0.2 AVO + 0.8 ELBO instead": of_method(records, "HVI-AVO"),
        "none, the ELBO alone (HVI)": of_method(records, "HVI"),
    }


def costs(groups: Groups, clean: Sequence[Any]) -> list[Row]:
    """What training with some faults comes to, and its paired difference to that without any."""
    columns = {"NLL, binarised": "nll", "NLL, grey": "grey_nll", "ELBO": "elbo"}
    return [
        {"faults": label}
        | means(runs, columns)
        | means(runs, {"KL": "kl", "Pareto k": "pareto_k"}, 1)
        | {"costs": "0" if runs == clean else text(paired(runs, clean, "nll"))}
        for label, runs in groups.items()
    ]


def differences(sides: Mapping[str, tuple[Sequence[Any], Sequence[Any]]], metric: str = "nll") -> list[Row]:
    """What pairs of sets of runs differ by, over the seeds that both have."""
    found = {label: paired(*pair, metric) for label, pair in sides.items()}
    return [{"difference": k, "nats": text(v), "seeds": v.n if v else 0} for k, v in found.items()]


def of_the_start(anatomy: Sequence[Any], regime: Sequence[Any]) -> dict[str, tuple[list[Any], list[Any]]]:
    """What torch's initial weights cost: with all faults, without the sum, without any, and in a search of settings."""
    names, found = tuple(FAULTS), dict[str, tuple[list[Any], list[Any]]]()
    for label, faults in {"all five faults": names, "without the sum": names[1:], "no fault": ()}.items():
        found[label] = with_faults(anatomy, faults, FAR), with_faults(anatomy, faults)
    for name in ("HVI-AVO", "HVI"):
        found[f"{name}, no fault, other settings"] = (
            of_specs(regime, searched(name, START)),
            of_specs(regime, searched(name, "none")),
        )
    return found
