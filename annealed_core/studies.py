"""Studies: the comparisons that the full profile makes, each a list of specs that differ in what it asks.

All share the report's configuration unless the study says otherwise. Toys: T = 4, hidden 32, batch 128, 3,000 steps of
Adam at 1e-3 with beta1 = 0.9, seeds 0 to 9, energies A to F. MNIST: batch 64, 25 epochs of Adam at 1e-3, beta from 0.2
by 2e-4 a step, five transitions of hidden size 40 that start near the identity, seeds 0 to 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from annealed_core.earlier import FAULTS
from annealed_core.schedules import SHAPES
from annealed_core.spec import Spec

SEEDS = range(10)
ENERGIES = ("A", "B", "C", "D", "E", "F")
NVI_SAMPLES = 288  # in a step, K targets times the samples drawn for each (Zimmermann et al. 2021, Table 1)


def _toys(seeds: range = SEEDS, targets: tuple[str, ...] = ENERGIES, **fields: Any) -> list[Spec]:
    return [Spec(experiment="toy", target=name, seed=seed, **fields) for name in targets for seed in seeds]


def grid() -> list[Spec]:
    """Does it take AVO, or stochastic kernels, or both? Gated pairs and an IAF, each trained by the ELBO and by AVO."""
    return [s for k in ("gated", "iaf") for m in ("elbo", "avo") for s in _toys(method=m, kernel=k)]


def objectives() -> list[Spec]:
    """Every other objective, with gated pairs."""
    plans: list[dict[str, Any]] = [
        {"method": "alpha"},
        {"method": "iwae"},
        {"method": "calibrated"},
        {"method": "mixture"},
        {"method": "avo", "elbo_steps": 1500},
        {"method": "avo", "path": "geometric"},
        {"method": "avo", "path": "learned"},
    ]
    return [spec for plan in plans for spec in _toys(**plan)]


def kernels() -> list[Spec]:
    """Every other kernel, by the ELBO and by AVO."""
    return [s for k in ("residual", "planar", "spline") for m in ("elbo", "avo") for s in _toys(method=m, kernel=k)]


def initialisation() -> list[Spec]:
    """Gated pairs that start near the identity instead of with torch's weights."""
    return [spec for method in ("elbo", "avo") for spec in _toys(method=method, initialisation="identity")]


def momentum() -> list[Spec]:
    """Adam's beta1 = 0.999, as in the earlier report, instead of 0.9."""
    return [spec for method in ("elbo", "avo") for spec in _toys(method=method, beta1=0.999)]


def length() -> list[Spec]:
    """T from 1 to 16; 4 is in the grid."""
    return [s for T in (1, 2, 8, 16) for m in ("elbo", "avo") for s in _toys(method=m, n_transitions=T)]


def compute() -> list[Spec]:
    """Twice the steps for the ELBO: more than AVO's dearer steps cost."""
    return _toys(method="elbo", steps=6000)


def ring8() -> list[Spec]:
    """The ring of eight with NVI's budget, for K = 2, 4, 6, 8 densities on the path: 20,000 steps, residual pairs."""
    plans: list[dict[str, Any]] = [
        {"method": "elbo", "kernel": "residual", "hidden": 50},
        {"method": "avo", "kernel": "residual", "hidden": 50},
        {"method": "avo", "kernel": "residual", "hidden": 50, "path": "learned"},
        {"method": "avo", "kernel": "planar"},
    ]
    return [
        spec
        for densities in (2, 4, 6, 8)
        for plan in plans
        for spec in _toys(
            targets=("ring8",), n_transitions=densities - 1, batch=NVI_SAMPLES // densities, steps=20_000, **plan
        )
    ]


def best() -> list[Spec]:
    """The chains of ours that do best on the harder targets, found by trying; five fresh seeds each."""
    fresh = range(100, 105)
    spline = {"method": "avo", "kernel": "spline", "bins": 16, "n_transitions": 6, "lr": 2e-3, "lr_schedule": "cosine"}
    iaf = {"method": "elbo", "kernel": "iaf", "hidden": 64, "n_transitions": 1, "lr": 3e-3, "lr_schedule": "cosine"}
    return [
        *_toys(fresh, ("ring8",), **spline, steps=40_000),
        *_toys(fresh, ("gmm40",), **spline, hidden=64, steps=6000),
        *_toys(fresh, ("funnel",), **iaf, batch=512, steps=20_000),
        *_toys(fresh, ("many_well",), **spline, hidden=64, steps=3000),
    ]


def _mnist(seeds: range = range(3), **fields: Any) -> list[Spec]:
    return [Spec(experiment="mnist", seed=seed, **fields) for seed in seeds]


def mnist() -> list[Spec]:
    """Every method on MNIST in the report's configuration, with likelihoods from 5,000 samples."""
    plans: list[dict[str, Any]] = [{"method": m} for m in ("vae", "hvi", "avo", "mixture")]
    plans += [{"method": m} for m in ("planar", "householder", "iaf")]
    plans += [{"method": "iwae", "iwae_samples": k} for k in (1, 5, 50)]
    specs = [spec for plan in plans for spec in _mnist(**plan, nll_samples=5000)]
    return [spec.replace(bounds_images=100) if spec.seed == 0 else spec for spec in specs]  # minutes a run


def long() -> list[Spec]:
    """Eight times as many epochs, with a learning rate that falls to 0 as a cosine."""
    shared: dict[str, Any] = {"epochs": 200, "batch": 128, "lr_schedule": "cosine", "nll_samples": 5000}
    return [spec for method in ("vae", "hvi", "avo") for spec in _mnist(method=method, **shared)]


def anatomy() -> list[Spec]:
    """The earlier report's faults: all, all but the first, all but the first two ...; each alone; none."""
    names = tuple(FAULTS)
    chosen = [names[start:] for start in range(len(names))] + [(name,) for name in names[:-1]] + [()]
    shared: dict[str, Any] = {"batch": 256}
    faulty = [spec for faults in chosen for spec in _mnist(method="mixture", faults=faults, **shared)]
    for faults in (names, names[1:], ()):  # and from torch's initial weights, as the earlier code started
        faulty += _mnist(method="mixture", faults=faults, initialisation="default", **shared)
    for start in ("identity", "default"):  # all by AVO, as an earlier version of that code had it
        faulty += _mnist(method="mixture", faults=names, avo_weight=1.0, initialisation=start, **shared)
    return faulty + [spec for method in ("hvi", "avo") for spec in _mnist(method=method, **shared)]


def faultless() -> list[Spec]:
    """Without any fault: AVO in a fifth of the steps against a sum with AVO at that weight, in five more seeds."""
    return [spec for method in ("mixture", "avo") for spec in _mnist(range(3, 8), method=method, batch=256)]


#: What the search shares: half as many steps as the study `mnist`, in which beta rises twice as fast and the learning
#: rate falls to 0.
SEARCH: dict[str, Any] = {"batch": 128, "gamma": 4e-4, "lr_schedule": "cosine"}
#: One change each to the report's HVI-AVO, most of them to HVI too.
CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "AVO at weight 0.5": {"avo_weight": 0.5},
    "AVO at weight 1": {"avo_weight": 1.0},
    "geometrically spaced path": {"path": "geometric"},
    "decoder learns along the path": {"faults": ("decoder",)},
    "torch's initial weights": {"initialisation": "default"},
    "torch's initial weights, weight 0.5": {"initialisation": "default", "avo_weight": 0.5},
    "torch's initial weights, weight 1": {"initialisation": "default", "avo_weight": 1.0},
    "from the prior, hidden 200": {"base": "prior", "hidden": 200},
    "two kernels": {"n_transitions": 2},
    "no warm-up": {"schedule": "constant"},
    "geometric warm-up": {"schedule": "geometric"},
}


def searched(method: str, change: str, seeds: Sequence[int] = (0, 1, 2), **shared: Any) -> list[Spec]:
    """The runs of `vae`, `hvi` or `avo` with what that method has of one of `CHANGES`, a spec for each seed."""
    usual = Spec("mnist", method, **SEARCH, **shared)
    of_method = {name: value for name, value in CHANGES[change].items() if getattr(usual, name) is not None}
    return [usual.replace(seed=seed, **of_method) for seed in seeds]


def precision() -> list[Spec]:
    """Do products in bfloat16 while training change what is learned? Against float32, seed by seed."""
    plans: list[dict[str, Any]] = [{"method": "vae", "batch": 64}]
    plans += [{"method": m, "batch": 256} for m in ("vae", "hvi")]
    shared: dict[str, Any] = {"nll_images": 5000}
    return [spec for plan in plans for p in ("highest", "medium") for spec in _mnist(**plan, **shared, precision=p)]


def agreement() -> list[Spec]:
    """Do sampling and annealing agree on log p(x), where the proposal is fitted to each image? In three seeds."""
    return [s for m in ("vae", "hvi", "avo") for s in _mnist(method=m, batch=256, bounds_images=100)]


def regime() -> list[Spec]:
    """What might make the chain earn its cost, one change at a time, judged on the validation images."""
    specs = [spec for method in ("vae", "hvi", "avo") for change in CHANGES for spec in searched(method, change)]
    return list(dict.fromkeys(specs))  # methods that can't have a change share their runs without it


#: The change with which HVI-AVO had the highest mean validation bound in the study `regime`.
CHOSEN = "no warm-up"


def chosen() -> list[Spec]:
    """The setting that the search chose, on the test images, with seeds that had no part in choosing it."""
    return [spec for m in ("vae", "hvi", "avo") for spec in searched(m, CHOSEN, (3, 4, 5), nll_samples=5000)]


#: What the studies of schedules share: 3,130 steps, in which beta rises from 0.2 to 1 in two fifths of them.
SHORT: dict[str, Any] = {"train_images": 20_000, "epochs": 10, "gamma": 6.4e-4, "nll_images": 5000}
EXPLORED = 500


def schedules() -> list[Spec]:
    """Every schedule for VAE and HVI; with and without warm-up for the flows and AVO, along each of its paths."""
    annealed: list[dict[str, Any]] = [{"schedule": "constant"}, {}]
    others: list[dict[str, Any]] = [
        {"schedule": "geometric", "gamma": 1.6e-3},
        *[{"schedule": "cyclical", "shape": shape} for shape in SHAPES],
        {"anneals": "alpha"},
        {"anneals": "capacity"},
    ]
    plans: list[dict[str, Any]] = [{"method": m, **plan} for m in ("vae", "hvi") for plan in annealed + others]
    plans += [{"method": m, **plan} for m in ("avo", "planar", "householder", "iaf") for plan in annealed]
    plans += [{"method": "avo", "path": path, **plan} for path in ("geometric", "learned") for plan in annealed]
    return [_short(seed, **plan) for plan in plans for seed in range(5)]


def _short(seed: int, **fields: Any) -> Spec:
    """A spec with what `SHORT` says of the fields that it has."""
    shared = {**SHORT, "explored_images": EXPLORED, **fields}
    if shared.get("schedule") in ("constant", "cyclical"):
        del shared["gamma"]
    return Spec(experiment="mnist", seed=seed, **shared)


#: Where warm-up starts, and what is added at each of its 1,570 steps: it lasts all of training, a half, a fifth, or a
#: twentieth of it where it starts at 0.
GRID = {"beta0": (0.0, 0.2, 0.5, 0.8), "gamma": (6.4e-4, 1.28e-3, 3.2e-3, 1.28e-2)}


def robustness() -> list[Spec]:
    """A grid of warm-ups for five methods: which of them minds it."""
    methods = ("vae", "hvi", "avo", "iaf", "householder")
    shared: dict[str, Any] = {"batch": 128, "nll_images": 2000, "explored_images": 200}
    return [
        _short(seed, method=method, beta0=beta0, gamma=gamma, **shared)
        for method in methods
        for beta0, gamma in itertools.product(*GRID.values())
        for seed in range(3)
    ]


def collapse() -> list[Spec]:
    """A decoder that can do without z: with beta at 1, rising once, or rising four times; in each shape."""
    shared: dict[str, Any] = {"method": "vae", "decoder": "autoregressive", "width": 200, "explored_images": EXPLORED}
    plans: list[dict[str, Any]] = [{"schedule": "constant"}, {"beta0": 0.0}]
    plans += [{"schedule": "cyclical", "shape": shape} for shape in SHAPES]
    return [_short(seed, **shared, **plan) for plan in plans for seed in range(5)]


#: The lines of the table of all methods: what the specs of each have in common, in the studies below.
LINES: dict[str, dict[str, Any]] = {
    "HVI, ELBO": {"kernel": "gated", "method": "elbo", "initialisation": "default"},
    "HVI-AVO": {"kernel": "gated", "method": "avo", "path": "linear", "elbo_steps": 0, "initialisation": "default"},
    "HVI-AVO, then ELBO": {"kernel": "gated", "method": "avo", "path": "linear", "elbo_steps": 1500},
    "HVI-AVO, geometrically spaced": {"kernel": "gated", "method": "avo", "path": "geometric"},
    "HVI-AVO, learned path": {"kernel": "gated", "method": "avo", "path": "learned"},
    "HVI, 0.2 AVO + 0.8 ELBO": {"kernel": "gated", "method": "calibrated"},
    "HVI, AVO in a fifth of the steps": {"kernel": "gated", "method": "mixture"},
    "HVI, alpha-annealing": {"kernel": "gated", "method": "alpha"},
    "HVI, IWAE-8": {"kernel": "gated", "method": "iwae"},
    "HVI near the identity, ELBO": {"kernel": "gated", "method": "elbo", "initialisation": "identity"},
    "HVI near the identity, AVO": {"kernel": "gated", "method": "avo", "initialisation": "identity"},
    "residual HVI, ELBO": {"kernel": "residual", "method": "elbo"},
    "residual HVI-AVO": {"kernel": "residual", "method": "avo"},
    "planar flow, ELBO": {"kernel": "planar", "method": "elbo"},
    "planar flow, AVO": {"kernel": "planar", "method": "avo"},
    "IAF, ELBO": {"kernel": "iaf", "method": "elbo"},
    "IAF-AVO": {"kernel": "iaf", "method": "avo"},
    "spline flow, ELBO": {"kernel": "spline", "method": "elbo"},
    "spline flow, AVO": {"kernel": "spline", "method": "avo"},
}

#: The lines of the table of MNIST: what the specs of each method have in common, in the study of that name.
MNIST_LINES: dict[str, dict[str, Any]] = {
    "VAE": {"method": "vae"},
    "HVI": {"method": "hvi"},
    "HVI-AVO": {"method": "avo"},
    "HVI, AVO in a fifth of the steps": {"method": "mixture"},
    "planar flow": {"method": "planar"},
    "Householder flow": {"method": "householder"},
    "IAF": {"method": "iaf"},
    "IWAE, K = 1": {"method": "iwae", "iwae_samples": 1},
    "IWAE, K = 5": {"method": "iwae", "iwae_samples": 5},
    "IWAE, K = 50": {"method": "iwae", "iwae_samples": 50},
}

_TOYS = (grid, objectives, kernels, initialisation, momentum, length, compute, ring8, best)
_MNIST = (mnist, long, anatomy, faultless, precision, agreement, regime, chosen, schedules, robustness, collapse)
TOY_STUDIES: dict[str, Callable[[], list[Spec]]] = {study.__name__: study for study in _TOYS}
STUDIES = TOY_STUDIES | {study.__name__: study for study in _MNIST}


def find_study(name: str) -> list[Spec]:
    """The specs of that study; ValueError with the known names if there is none."""
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}: choose one of {', '.join(STUDIES)}")
    return STUDIES[name]()
