"""Rows of the tables on the energies, and the published figures that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from annealed_core.ais import ais
from annealed_core.energies import ENERGIES
from annealed_core.flows import IAF
from annealed_core.kernels import DiagonalGaussian, Gated, Residual
from annealed_core.objectives import AVO, ELBO
from annealed_core.running.density import Density
from annealed_core.targets import LearnedAlphas
from annealed_report.comparison import loses_a_mode, mean_metric, paired, select
from annealed_report.statistics import interval, paired_shares, text
from annealed_report.studies import LINES
from annealed_report.tables import Row, mean, worded

#: By how stochastic kernels start: their lines by the ELBO and by AVO.
STARTS: dict[str, dict[str, dict[str, Any]]] = {
    "torch's weights": {"elbo": LINES["HVI, ELBO"], "avo": LINES["HVI-AVO"]},
    "near the identity": {"elbo": LINES["HVI near the identity, ELBO"], "avo": LINES["HVI near the identity, AVO"]},
    "residual": {"elbo": LINES["residual HVI, ELBO"], "avo": LINES["residual HVI-AVO"]},
}
#: By transition: the same lines, and those of the flows.
TRANSITIONS = {
    "gated, torch's weights": STARTS["torch's weights"],
    "gated, near the identity": STARTS["near the identity"],
    "residual": STARTS["residual"],
    "planar flow": {"elbo": LINES["planar flow, ELBO"], "avo": LINES["planar flow, AVO"]},
    "IAF": {"elbo": LINES["IAF, ELBO"], "avo": LINES["IAF-AVO"]},
    "spline flow": {"elbo": LINES["spline flow, ELBO"], "avo": LINES["spline flow, AVO"]},
}


def kinds(hidden: int) -> dict[str, dict[str, Any]]:
    """What the page trains itself: gated pairs and an IAF of that width, each by the ELBO and by AVO."""
    objectives: dict[str, Any] = {"elbo": ELBO(), "avo": AVO()}
    gated = {name: {"kernel": Gated(hidden), "objective": each} for name, each in objectives.items()}
    return gated | {f"iaf-{name}": {"kernel": IAF(hidden), "objective": each} for name, each in objectives.items()}


def square(hidden: int, **common: Any) -> dict[str, dict[str, Density]]:
    """Gated pairs from two starts by two objectives: start of `STARTS` -> "elbo" or "avo" -> description."""
    starts = {"torch's weights": Gated(hidden), "near the identity": Gated(hidden, start="identity")}
    return {
        start: {
            "elbo": Density(kernel=k, objective=ELBO(), **common),
            "avo": Density(kernel=k, objective=AVO(), **common),
        }
        for start, k in starts.items()
    }


def lost(records: Sequence[Any], targets: Sequence[str] = "AD") -> list[Row]:
    """By start and energy, how many seeds lose a mode by each objective, and the paired difference of the shares."""
    rows = []
    for start, lines in STARTS.items():
        for name in targets:
            runs = {method: select(records, target=name, **fields) for method, fields in lines.items()}
            found = {method: list(map(loses_a_mode, own)) for method, own in runs.items()}
            row: Row = {"kernels start": start, "energy": name}
            row |= {
                f"lost by {label}": f"{sum(found[method])} of {len(found[method])}"
                for method, label in (("elbo", "the ELBO"), ("avo", "AVO"))
            }
            difference = paired_shares(found["avo"], found["elbo"])
            rows.append(row | {"share of seeds, AVO − ELBO": worded(difference, -1, 0.1)})
    return rows


def within(records: Sequence[Any], targets: Sequence[str] = "ABCDEF") -> list[Row]:
    """By kind of transition and energy, the paired difference of total variation between AVO and the ELBO."""
    rows = []
    for label, lines in TRANSITIONS.items():
        row: Row = {"transitions": label}
        for name in targets:
            avo, elbo = (select(records, target=name, **lines[method]) for method in ("avo", "elbo"))
            row[name] = text(paired(avo, elbo, "total_variation"), 3)
        rows.append(row)
    return rows


def gains(
    records: Sequence[Any], momentum: Sequence[Any], twice: Sequence[Any], targets: Sequence[str] = "ABCDEF"
) -> dict[str, dict[str, Any]]:
    """By energy, AVO − ELBO in total variation: as it is, with the earlier Adam, and against twice the steps."""
    usual, found = STARTS["torch's weights"], {}
    for name in targets:
        avo, elbo = (select(records, target=name, **usual[method]) for method in ("avo", "elbo"))
        avo_then, elbo_then = (select(momentum, target=name, **usual[method]) for method in ("avo", "elbo"))
        found[name] = {
            "equal steps": paired(avo, elbo, "total_variation"),
            "Adam's $\\beta_1$ = 0.999": paired(avo_then, elbo_then, "total_variation"),
            "ELBO of twice the steps": paired(avo, select(twice, target=name), "total_variation"),
        }
    return found


def widened(wide: Sequence[Any], narrow: Sequence[Any]) -> list[Row]:
    """By energy, what a wider base changes for the ELBO and for AVO, and AVO against the ELBO with it."""
    rows = []
    for name in dict.fromkeys(run.spec.target for run in wide):
        own = {method: select(wide, target=name, **fields) for method, fields in STARTS["torch's weights"].items()}
        row: Row = {"energy": name}
        for method, label in (("elbo", "ELBO"), ("avo", "AVO")):
            other = select(narrow, target=name, **STARTS["torch's weights"][method])
            row[f"{label}, wide − narrow"] = text(paired(own[method], other, "total_variation"), 3)
        difference = paired(own["avo"], own["elbo"], "total_variation")
        rows.append(row | {"AVO − ELBO, wide": worded(difference, -1, 0.02, 3)})
    return rows


# ---- beside published figures

DENSITIES = (2, 4, 6, 8)  # K, on the path: one more than transitions

#: Table 1 of Zimmermann et al. (2021) at each K, by our method: its colour, their log Z and effective sample sizes.
NVI: dict[str, tuple[str, dict[str, tuple[float, ...]]]] = {
    "ELBO": ("elbo", {"log_z_100": (1.86, 1.89, 1.92, 1.72), "ess_100": (51, 47, 32, 25)}),
    "AVO": ("avo", {"log_z_100": (1.86, 1.96, 2.01, 2.05), "ess_100": (51, 44, 46, 46)}),
    "AVO, learned path": ("learned", {"log_z_100": (1.86, 2.06, 2.07, 2.07), "ess_100": (51, 51, 54, 54)}),
}
_RING: dict[str, dict[str, Any]] = {
    "ELBO": {"kernel": Residual(hidden=50), "objective": ELBO()},
    "AVO": {"kernel": Residual(hidden=50), "objective": AVO()},
    "AVO, learned path": {"kernel": Residual(hidden=50), "objective": AVO(alphas=LearnedAlphas())},
    "planar flow": LINES["planar flow, AVO"],
}


def of_ring(records: Sequence[Any], method: str, densities: int) -> list[Any]:
    """The records of a method on the ring with so many densities on the path."""
    return select(records, n_transitions=densities - 1, **_RING[method])


#: The mean error of log Z of 2,000 samples by FAB's public code (fab-jax), and the chains of ours beside it.
FAB = {"gmm40": "0.0027", "funnel": "0.0022", "many_well": "0.032"}
_CHOSEN = {"ring8": "spline flow, AVO, T = 6", "funnel": "IAF, ELBO, T = 1"}
_CHOSEN |= {"gmm40": "spline flow, AVO, T = 6", "many_well": "spline flow, AVO, T = 6"}


def harder(records: Sequence[Any]) -> list[Row]:
    """By harder target, the chain of ours that does best and how good it is, beside FAB."""
    rows = []
    for name, label in _CHOSEN.items():
        found, energy = select(records, target=name), ENERGIES[name]
        row: Row = {"target": f"{name} ({energy.dim}-dim.)", "chain": label}
        row["ESS, %"] = interval([100 * run.metrics["ess"] for run in found]).text(1)
        row["error of log Z"] = text(mean_metric(found, "log_z_error_2000"), 4)
        row |= {"FAB's": FAB.get(name, "–"), "Pareto k": text(mean_metric(found, "pareto_k"))}
        rows.append(row | {"ELBO − log Z": text(mean(run.metrics["elbo"] - energy.log_normalizer for run in found), 3)})
    return rows


def annealed(targets: Sequence[str], log_z: Mapping[str, float], particles: int = 1000) -> list[Row]:
    """By energy, log Z by quadrature and by AIS with two hundred temperatures and with as many as the particles ask."""
    rows, base = [], DiagonalGaussian.isotropic(2)
    for name in targets:
        fixed = ais(ENERGIES[name], base, n_particles=particles, n_temperatures=200)
        adaptive = ais(ENERGIES[name], base, n_particles=particles, threshold=0.99)
        row: Row = {"energy": name, "log Z": f"{log_z[name]:.3f}"}
        for label, found in (("200 temperatures", fixed), ("adaptive", adaptive)):
            row[label] = f"{float(found.log_z):.3f} ± {1.96 * float(found.log_z_se):.3f}"
        rows.append(row | {"temperatures chosen": len(adaptive.alphas) - 1})
    return rows
