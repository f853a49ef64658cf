"""Tables: rows of the pages' tables, made of runs or records; `plotting.table` shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from annealed_core.flows import IAF
from annealed_report import claims, studies, working
from annealed_report.comparison import mode_error, of_specs, paired, select
from annealed_report.fair import FACTORS, METHODS, SEPARATED, SETTINGS, of_line
from annealed_report.folded_line import BY_AVO, BY_BOTH, BY_IWAE, FIXED, GAUSSIAN, HELD, PRIOR, metrics_of
from annealed_report.posterior import KERNELS, OBJECTIVES
from annealed_report.statistics import Interval, interval, pooled, text, word
from annealed_report.studies import CHANGES

Row = dict[str, Any]


def mean(values: Iterable[float]) -> Interval | None:
    """The interval of values; None of none."""
    found = list(values)
    return interval(found) if found else None


def at_work(groups: Mapping[str, Sequence[Any]]) -> list[Row]:
    """What the kernels of several methods earn and how far they move z; a dash where that was not recorded."""
    rows = []
    for name, runs in groups.items():
        row: Row = {"method": name}
        for label, metric in {"kernels earn (nats)": "kernels_earn", "they move z by": "kernels_move"}.items():
            values = [run.metrics.get(metric) for run in runs]
            row[label] = None if None in values else mean(values)
        earned = row["kernels earn (nats)"]
        rows.append(row | {"at work": "not recorded" if earned is None else "yes" if earned.low > 0 else "no"})
    return rows


def claimed(section: str) -> list[Row]:
    """The claims that a section shows, "04_annealing#Who minds the schedule?", with what the full runs say of them.

    None where none of them has runs.
    """
    found: list[Row] = []
    every = [row for row in claims.rows("full") if row.claim.section == section]
    for row in every if any(row.difference for row in every) else ():
        said = {"paper": row.claim.paper, "earlier report": row.claim.earlier}
        difference = text(row.difference, 3 if row.claim.smallest < 0.1 else 2)
        found.append({"claim": row.claim.text} | said | {"difference": difference, "verdict": f"**{row.said}**"})
    empty = {column for column in ("paper", "earlier report") if all(row[column] == "–" for row in found)}
    return [{column: cell for column, cell in row.items() if column not in empty} for row in found]


def compared(
    ours: Sequence[Any], theirs: Sequence[Any], metric: str, sign: int, smallest: float, digits: int = 2
) -> str:
    """A paired difference with its word; a dash where a side was not run."""
    return worded(paired(ours, theirs, metric) if ours and theirs else None, sign, smallest, digits)


# ---- the energies, fair


def fair(
    runs: Sequence[Any], targets: Iterable[str] = SEPARATED, value: Callable[[Any], float] = mode_error
) -> list[Row]:
    """By target, a value of each tuned method, and AVO's difference to the ELBO of T times the steps."""
    rows, differences = [], dict[str, list[float]]()
    for target in targets:
        errors = {method: [value(run) for run in of_line(runs, method, target)] for method in METHODS}
        if not all(errors.values()):
            continue
        gains = [a - b for a, b in zip(errors["AVO"], errors["ELBO, T times the steps"], strict=True)]
        differences[target] = gains
        row: Row = {"target": target} | {method: interval(errors[method]).text(3) for method in METHODS}
        rows.append(row | {"AVO − ELBO, T times the steps": worded(interval(gains), -1, 0.02, 3)})
    if len(differences) > 1:
        every: Row = {"target": "all, pooled"} | dict.fromkeys(METHODS, "")
        rows.append(every | {"AVO − ELBO, T times the steps": worded(pooled(differences), -1, 0.02, 3)})
    return rows


def worded(found: Interval | None, sign: int, smallest: float, digits: int = 2) -> str:
    """An interval with its word."""
    return "–" if found is None else f"{found.text(digits)} ({word(found, sign, smallest)})"


def settings(runs: Sequence[Any]) -> list[Row]:
    """The setting that tuning chose: by target, learning rate, schedule and cut of each method."""
    rows = []
    for target in SETTINGS:
        row: Row = {"target": target}
        for method in METHODS:
            for run in of_line(runs, method, target)[:1]:
                falls, cut = run.spec.lr_schedule == "cosine", run.spec.clip is not None
                row[method] = f"{run.spec.lr:g}{', cosine' * falls}{', cut' * cut}"
        rows.append(row)
    return rows if all(len(row) > 1 for row in rows) else []


def starts(runs: Sequence[Any], targets: Sequence[str] = "AD") -> list[Row]:
    """The mode-mass error by the ELBO and by AVO for each start of the kernels."""
    rows = []
    for kernel in dict.fromkeys(run.spec.kernel for run in runs):
        levels = {name: getattr(kernel, name) == level[1] for name, level in FACTORS.items()}
        row: Row = {name: "near the identity" if near else "torch's" for name, near in levels.items()}
        for target in targets:
            for name in ("ELBO", "AVO"):
                own = [run for run in select(runs, target=target, kernel=kernel) if _is(run, name)]
                row[f"{target}, {name}"] = mean(map(mode_error, own))
        rows.append(row)
    return rows


def _is(run: Any, name: str) -> bool:
    return type(run.spec.objective).__name__ == name


# ---- posteriors at a fixed decoder


def fitted(runs: Sequence[Any], encoder: str) -> list[Row]:
    """By kernel, the bound by the ELBO, less that of the Gaussian, and what other objectives change; an IAF last."""
    gaussian, rows = select(runs, kernel=None), []
    for name, kernel in KERNELS.items():
        own = {label: select(runs, kernel=kernel, encoder=encoder, objective=o) for label, o in OBJECTIVES.items()}
        if not all(own.values()):
            continue
        row: Row = {"kernels": name, "earn, ELBO": mean(run.metrics["kernels_earn"] for run in own["ELBO"])}
        row["ELBO − Gaussian"] = text(paired(own["ELBO"], gaussian, "elbo"))
        rows.append(
            row | {f"{label} − ELBO": compared(own[label], own["ELBO"], "elbo", 1, 0.2) for label in list(own)[1:]}
        )
    if rows and (flow := select(runs, kernel=IAF, encoder=encoder)):
        earned = mean(run.metrics["kernels_earn"] for run in flow)
        gained = text(paired(flow, gaussian, "elbo"))
        rows.append(dict.fromkeys(rows[0]) | {"kernels": "IAF", "earn, ELBO": earned, "ELBO − Gaussian": gained})
    return rows


def quarter(runs: Sequence[Any], base: str) -> list[Row]:
    """By method, the gap to log p(x) and the mode-mass error where a quarter of a digit is seen."""
    rows = []
    for alike in dict.fromkeys(run.spec.replace(seed=0) for run in select(runs, base=base)):
        own = [run for run in runs if run.spec.replace(seed=0) == alike]
        kernel = type(alike.kernel).__name__ if alike.kernel is not None else "Gaussian"
        row: Row = {"method": f"{kernel}, {type(alike.objective).__name__}"}
        row |= {"T": alike.n_transitions, "gap (nats)": mean(run.metrics["gap"] for run in own)}
        row["gap of 200 weights"] = mean(run.metrics["iw_gap"] for run in own)
        row["mode-mass error"] = text(mean(run.metrics["mode_error"] for run in own), 3)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["T"], row["method"]))


def chains(runs: Sequence[Any]) -> list[Row]:
    """By chain, what HVI's validation bound gains on the VAE with the same decoder, and what its kernels earn."""
    rows = []
    for name, gained in working.gains(runs).items():
        own = select(runs, **working.CHAINS[name])
        row: Row = {"chain": name, "HVI − VAE (nats)": interval(gained)}
        row["kernels earn (nats)"] = mean(run.metrics["kernels_earn"] for run in own)
        rows.append(row | {"they move z by": mean(run.metrics["kernels_move"] for run in own)})
    return rows


def judged(runs: Sequence[Any]) -> list[Row]:
    """VAE, HVI, HVI-AVO and IAF with kernels that earn their keep: likelihood, bound, and differences to the VAE."""
    rows, vae = [], working.of_line(runs, "VAE")
    for name in ("VAE", "HVI", "HVI-AVO", "IAF"):
        own = working.of_line(runs, name)
        row: Row = {"method": name, "NLL": mean(run.metrics["adaptive_nll"] for run in own)}
        row["− VAE"] = None if name == "VAE" else paired(own, vae, "adaptive_nll")
        row["ELBO"] = mean(run.metrics["elbo"] for run in own)
        rows.append(row | {"kernels earn": mean(run.metrics["kernels_earn"] for run in own) if name != "VAE" else None})
    return rows if vae else []


def corners(runs: Sequence[Any]) -> list[Row]:
    """By start and rate of warm-up the NLL of HVI and HVI-AVO, their paired difference, and what AVO's kernels earn."""
    rows = []
    for beta in working.CORNERS if runs else ():
        hvi, avo = ([r for r in working.of_line(runs, n) if r.spec.objective.beta == beta] for n in ("HVI", "HVI-AVO"))
        row: Row = {"β starts at": beta.start, "and rises over": f"{(1 - beta.start) / beta.rate:,.0f} steps"}
        row["AVO − HVI"] = paired(avo, hvi, "nll")
        row |= {name: mean(run.metrics["nll"] for run in own) for name, own in (("HVI", hvi), ("HVI-AVO", avo))}
        rows.append(row | {"kernels earn": mean(run.metrics["kernels_earn"] for run in avo)})
    return rows


def searched(runs: Sequence[Any]) -> list[Row]:
    """What each change of the study `regime` makes of HVI-AVO's validation bound beside HVI's and the VAE's."""
    rows = []
    for name in CHANGES if runs else ():
        avo, hvi, vae = (of_specs(runs, studies.searched(method, name)) for method in ("HVI-AVO", "HVI", "VAE"))
        row: Row = {"change": name, "HVI-AVO": mean(run.metrics["valid_elbo"] for run in avo)}
        row["− HVI"] = paired(avo, hvi, "valid_elbo")
        rows.append(row | {"− VAE": paired(avo, vae, "valid_elbo"), "NLL": mean(run.metrics["nll"] for run in avo)})
    return rows


# ---- the small model, taken apart

_TAUGHT: dict[str, dict[str, Any]] = {
    "Gaussian, ELBO": GAUSSIAN,
    "HVI, ELBO": {},
    "HVI-AVO": BY_AVO,
    "HVI-AVO, model by IWAE-5": BY_BOTH,
    "HVI, IWAE-5": BY_IWAE,
    "HVI from the prior, ELBO": PRIOR,
    "HVI-AVO from the prior": PRIOR | BY_AVO,
    "HVI-AVO from the prior, model by IWAE-5": PRIOR | BY_BOTH,
    "HVI from the prior, IWAE-5": PRIOR | BY_IWAE,
}


def apart(runs: Sequence[Any], noise: float) -> list[Row]:
    """By method, what is missing on the smaller side and the gap at the true model; then released, what is lost."""
    rows = []
    missing: Callable[[Any], float] = lambda m: m["posterior_share"] - m["chain_share"]
    for name, plan in _TAUGHT.items():
        fixed, released = (metrics_of(runs, noise, **plan, **phase) for phase in (FIXED, HELD))
        row: Row = {"method": name, "fixed: mass missing": text(mean(map(missing, fixed)), 3)}
        row["fixed: gap (nats)"] = text(mean(m["gap"] for m in fixed))
        row["released: mass missing"] = text(mean(map(missing, released)), 3)
        row["released: one mode"] = (
            f"{sum(m['left'] * m['right'] < 0 for m in released)} of {len(released)}" if released else "–"
        )
        rows.append(row | {"released: likelihood lost (nats)": text(mean(m["loss"] for m in released), 3)})
    return rows
