"""Studies: the comparisons that the full profile makes, each a list of experiments that differ in what it asks.

All share the report's configuration unless the study says otherwise. Densities: T = 4, hidden 32, batch 128, 3,000
steps of Adam at 1e-3 with beta1 = 0.9, seeds 0 to 9, energies A to F. MNIST: batch 64, 25 epochs of Adam at 1e-3, beta
from 0.2 by 2e-4 a step, five transitions of hidden size 40 that start near the identity, seeds 0 to 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from annealed_core.decoders import Autoregressive
from annealed_core.flows import IAF, Householder, Planar, Spline
from annealed_core.kernels import Gated, Residual
from annealed_core.objectives import AVO, ELBO, IWAE, AlphaELBO, LocalAVO
from annealed_core.running.density import Density
from annealed_core.running.experiment import Experiment
from annealed_core.running.mnist import Mnist
from annealed_core.schedules import SHAPES, Cyclical, Geometric, Linear, Mixed, Then
from annealed_core.targets import GeometricAlphas, LearnedAlphas
from annealed_core.variants import CapacityELBO
from annealed_report import seed_systems
from annealed_report.comparison import select
from annealed_report.earlier import FAULTS, EarlierAVO, faulty
from annealed_report.fair import starts, tuned, tuning
from annealed_report.folded_line import apart, folded_line
from annealed_report.followed import Followed
from annealed_report.posterior import posterior_alone, quarter
from annealed_report.varied import Varied
from annealed_report.which_method import which_bars, which_method, which_mnist, which_ring
from annealed_report.working import chains, robust, working

SEEDS = range(10)
ENERGIES = ("A", "B", "C", "D", "E", "F")
NVI_SAMPLES = 288  # in a step, K targets times the samples drawn for each (Zimmermann et al. 2021, Table 1)

#: The lines of the table of all methods on the energies: what the runs of each have in common.
LINES: dict[str, dict[str, Any]] = {
    "HVI, ELBO": {"kernel": Gated(), "objective": ELBO()},
    "HVI-AVO": {"kernel": Gated(), "objective": AVO()},
    "HVI-AVO, then ELBO": {"kernel": Gated(), "objective": Then(AVO(), ELBO(), switch=1500)},
    "HVI-AVO, geometrically spaced": {"kernel": Gated(), "objective": AVO(alphas=GeometricAlphas())},
    "HVI-AVO, learned path": {"kernel": Gated(), "objective": AVO(alphas=LearnedAlphas())},
    "HVI, 0.2 AVO + 0.8 ELBO": {"kernel": Gated(), "objective": AVO(weight=0.2)},
    "HVI, AVO in a fifth of the steps": {"kernel": Gated(), "objective": Mixed(AVO(), ELBO(), chance=0.2)},
    "HVI, alpha-annealing": {"kernel": Gated(), "objective": AlphaELBO(Linear(start=0.1, rate=6e-4))},
    "HVI, IWAE-8": {"kernel": Gated(), "objective": IWAE(samples=8), "batch": 16},  # groups: 128 samples a step
    "HVI near the identity, ELBO": {"kernel": Gated(start="identity"), "objective": ELBO()},
    "HVI near the identity, AVO": {"kernel": Gated(start="identity"), "objective": AVO()},
    "residual HVI, ELBO": {"kernel": Residual(), "objective": ELBO()},
    "residual HVI-AVO": {"kernel": Residual(), "objective": AVO()},
    "planar flow, ELBO": {"kernel": Planar(), "objective": ELBO()},
    "planar flow, AVO": {"kernel": Planar(), "objective": AVO()},
    "IAF, ELBO": {"kernel": IAF(), "objective": ELBO()},
    "IAF-AVO": {"kernel": IAF(), "objective": AVO()},
    "spline flow, ELBO": {"kernel": Spline(), "objective": ELBO()},
    "spline flow, AVO": {"kernel": Spline(), "objective": AVO()},
}


def _energies(fields: dict[str, Any], seeds: range = SEEDS, targets: Sequence[str] = ENERGIES) -> list[Density]:
    return [Density(target=name, seed=seed, **fields) for name in targets for seed in seeds]


def _lines(*names: str, **changes: Any) -> list[Density]:
    return [spec for name in names for spec in _energies(LINES[name] | changes)]


def grid() -> list[Density]:
    """Does it take AVO, or stochastic kernels, or both? Gated pairs and an IAF, each trained by the ELBO and by AVO."""
    return _lines("HVI, ELBO", "HVI-AVO", "IAF, ELBO", "IAF-AVO")


def objectives() -> list[Density]:
    """Every other objective, with gated pairs."""
    return _lines(*list(LINES)[2:9])


def kernels() -> list[Density]:
    """Every other kernel, by the ELBO and by AVO."""
    return _lines(*(name for name in LINES if name.startswith(("residual", "planar", "spline"))))


def initialisation() -> list[Density]:
    """Gated pairs that start near the identity instead of with torch's weights."""
    return _lines("HVI near the identity, ELBO", "HVI near the identity, AVO")


def momentum() -> list[Density]:
    """Adam's beta1 = 0.999, as in the earlier report, instead of 0.9."""
    return _lines("HVI, ELBO", "HVI-AVO", beta1=0.999)


def length() -> list[Density]:
    """T from 1 to 16; 4 is in the grid."""
    return [spec for n in (1, 2, 8, 16) for spec in _lines("HVI, ELBO", "HVI-AVO", n_transitions=n)]


def compute() -> list[Density]:
    """Twice the steps for the ELBO: more than AVO's dearer steps cost."""
    return _lines("HVI, ELBO", steps=6000)


def wide_base() -> list[Density]:
    """From a base three times as wide, on the two energies whose last step has too much to do."""
    return [spec for spec in _lines("HVI, ELBO", "HVI-AVO", base_scale=3.0) if spec.target in "EF"]


def ring8() -> list[Density]:
    """The ring of eight with NVI's budget, for K = 2, 4, 6, 8 densities on the path: 20,000 steps, residual pairs."""
    residual = {"kernel": Residual(hidden=50)}
    plans: list[dict[str, Any]] = [
        {**residual, "objective": ELBO()},
        {**residual, "objective": AVO()},
        {**residual, "objective": AVO(alphas=LearnedAlphas())},
        LINES["planar flow, AVO"],
    ]
    budgets = [{"n_transitions": k - 1, "batch": NVI_SAMPLES // k, "steps": 20_000} for k in (2, 4, 6, 8)]
    return [spec for budget in budgets for plan in plans for spec in _energies(plan | budget, targets=["ring8"])]


def best() -> list[Density]:
    """The chains of ours that do best on the harder targets, found by trying; five fresh seeds each."""
    cosine = {"lr_schedule": "cosine"}
    spline = {"objective": AVO(), "kernel": Spline(hidden=64, bins=16), "n_transitions": 6, "lr": 2e-3, **cosine}
    iaf = {"objective": ELBO(), "kernel": IAF(hidden=64), "n_transitions": 1, "lr": 3e-3, "batch": 512, **cosine}
    plans: dict[str, dict[str, Any]] = {
        "ring8": {**spline, "kernel": Spline(bins=16), "steps": 40_000},
        "gmm40": {**spline, "steps": 6000},
        "funnel": {**iaf, "steps": 20_000},
        "many_well": {**spline, "steps": 3000},
    }
    return [spec for target, plan in plans.items() for spec in _energies(plan, range(100, 105), [target])]


#: The warm-up of MNIST's runs, and the kernels of HVI.
WARM_UP, NEAR, FAR = Linear(0.2, 2e-4), Gated(hidden=40, start="identity"), Gated(hidden=40)

#: The lines of the table of MNIST, its methods: what the runs of each have in common.
MNIST_LINES: dict[str, dict[str, Any]] = {
    "VAE": {"kernel": None, "objective": ELBO(WARM_UP)},
    "HVI": {"kernel": NEAR, "objective": ELBO(WARM_UP)},
    "HVI-AVO": {"kernel": NEAR, "objective": AVO(0.2, WARM_UP)},
    "HVI, AVO in a fifth of the steps": {"kernel": NEAR, "objective": Mixed(LocalAVO(WARM_UP), ELBO(WARM_UP), 0.2)},
    "planar flow": {"kernel": Planar(), "objective": ELBO(WARM_UP)},
    "Householder flow": {"kernel": Householder(), "objective": ELBO(WARM_UP)},
    "IAF": {"kernel": IAF(hidden=40), "objective": ELBO(WARM_UP)},
    "IWAE, K = 1": {"kernel": None, "objective": IWAE(1, WARM_UP)},
    "IWAE, K = 5": {"kernel": None, "objective": IWAE(5, WARM_UP)},
    "IWAE, K = 50": {"kernel": None, "objective": IWAE(50, WARM_UP)},
}
THREE = ("VAE", "HVI", "HVI-AVO")


def with_beta(objective: Any, beta: Any) -> Any:
    """The objective with another warm-up, where it has one."""
    if isinstance(objective, Mixed):
        return objective.replace(first=with_beta(objective.first, beta), second=with_beta(objective.second, beta))
    return objective.replace(beta=beta) if hasattr(objective, "beta") else objective


def method(name: str, beta: Any = WARM_UP) -> dict[str, Any]:
    """The fields of a line of `MNIST_LINES`, with another warm-up."""
    fields = MNIST_LINES[name]
    return {**fields, "objective": with_beta(fields["objective"], beta)}


def of_method(runs: Iterable[Any], name: str) -> list[Any]:
    """The runs (or records) of a line of `MNIST_LINES` at whatever warm-up, in the order of their seeds."""
    wanted = method(name, beta=1.0)
    found = select(runs, kernel=wanted["kernel"])
    return [run for run in found if with_beta(run.spec.objective, 1.0) == wanted["objective"]]


def _mnist(fields: dict[str, Any], seeds: Iterable[int] = range(3), **shared: Any) -> list[Mnist]:
    return [Mnist(seed=seed, **fields, **shared) for seed in seeds]


def mnist() -> list[Mnist]:
    """Every method on MNIST in the report's configuration, with likelihoods from 5,000 samples."""
    specs = [spec for fields in MNIST_LINES.values() for spec in _mnist(fields, nll_samples=5000)]
    return [spec.replace(bounds_images=100) if spec.seed == 0 else spec for spec in specs]  # minutes a run


def long() -> list[Mnist]:
    """Eight times as many epochs, with a learning rate that falls to 0 as a cosine."""
    shared: dict[str, Any] = {"epochs": 200, "batch": 128, "lr_schedule": "cosine", "nll_samples": 5000}
    return [spec for name in THREE for spec in _mnist(method(name), **shared)]


def likeliest() -> list[Varied]:
    """How likely a VAE with 40 latents makes the digits: IWAE with 5 samples, at the end 20, and twice the usual width.

    The usual width, 100 epochs of the ELBO and then of IWAE with 50 samples, was tried before with another seed and
    left at epoch 128: its validation likelihood no longer rose. The last weights are judged.
    """
    objective = Then(IWAE(5, WARM_UP), IWAE(20), switch=120 * 391)
    shared: dict[str, Any] = {"epochs": 140, "batch": 128, "lr_schedule": "cosine", "width": 600, "bounds_images": 1000}
    found = [Varied(objective=objective, seed=seed, **shared) for seed in range(40, 43)]
    return [spec.replace(annealed_images=0) if spec.seed > 40 else spec for spec in found]


def anatomy() -> list[Mnist]:
    """The earlier report's faults: all, all but the first, all but the first two ...; each alone; none."""
    names = tuple(FAULTS)
    chosen = [names[start:] for start in range(len(names))] + [(name,) for name in names[:-1]] + [()]
    plans = [{"kernel": NEAR, **faulty(*faults, beta=WARM_UP)} for faults in chosen]
    # And from torch's initial weights, as the earlier code started; all by AVO, as an earlier version of it had it.
    plans += [{"kernel": FAR, **faulty(*faults, beta=WARM_UP)} for faults in (names, names[1:], ())]
    plans += [{"kernel": kernel, **faulty(*names, beta=WARM_UP, chance=1.0)} for kernel in (NEAR, FAR)]
    return [spec for plan in [*plans, method("HVI"), method("HVI-AVO")] for spec in _mnist(plan, batch=256)]


def faultless() -> list[Mnist]:
    """Without any fault: AVO in a fifth of the steps against a sum with AVO at that weight, in five more seeds."""
    names = ("HVI, AVO in a fifth of the steps", "HVI-AVO")
    return [spec for name in names for spec in _mnist(method(name), range(3, 8), batch=256)]


def agreement() -> list[Mnist]:
    """Do sampling and annealing agree on log p(x), where the proposal is fitted to each image? In three seeds."""
    return [spec for name in THREE for spec in _mnist(method(name), batch=256, bounds_images=100)]


#: What the search shares: half as many steps as the study `mnist`, in which beta rises twice as fast and the learning
#: rate falls to 0.
SEARCH: dict[str, Any] = {"batch": 128, "lr_schedule": "cosine"}
SEARCH_WARM_UP = Linear(0.2, 4e-4)
#: One change each to the report's HVI-AVO, most of them to HVI too.
CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "AVO at weight 0.5": {"objective": AVO(0.5)},
    "AVO at weight 1": {"objective": AVO(1.0)},
    "geometrically spaced path": {"objective": AVO(0.2, alphas=GeometricAlphas())},
    "decoder learns along the path": {"objective": EarlierAVO(0.2, decoder=True)},
    "torch's initial weights": {"kernel": FAR},
    "torch's initial weights, weight 0.5": {"kernel": FAR, "objective": AVO(0.5)},
    "torch's initial weights, weight 1": {"kernel": FAR, "objective": AVO(1.0)},
    "from the prior, hidden 200": {"base": "prior", "kernel": Gated(hidden=200, start="identity")},
    "two kernels": {"n_transitions": 2},
    "no warm-up": {"beta": 1.0},
    "geometric warm-up": {"beta": Geometric(0.2, 4e-4)},
}


def searched(name: str, change: str, seeds: Sequence[int] = (0, 1, 2), **shared: Any) -> list[Mnist]:
    """The runs of VAE, HVI or HVI-AVO with what that method has of one of `CHANGES`, for each seed."""
    belong = {"VAE": ("beta",), "HVI": ("beta", "kernel", "base", "n_transitions")}.get(name)
    own = {field: value for field, value in CHANGES[change].items() if belong is None or field in belong}
    fields = {**method(name), **own}
    fields["objective"] = with_beta(fields["objective"], fields.pop("beta", SEARCH_WARM_UP))
    return _mnist(fields, seeds, **SEARCH, **shared)


def regime() -> list[Mnist]:
    """What might make the chain earn its cost, one change at a time, judged on the validation images."""
    specs = [spec for name in THREE for change in CHANGES for spec in searched(name, change)]
    return list(dict.fromkeys(specs))  # methods that can't have a change share their runs without it


#: The change with which HVI-AVO had the highest mean validation bound in the study `regime`.
CHOSEN = "no warm-up"


def chosen() -> list[Mnist]:
    """The setting that the search chose, on the test images, with seeds that had no part in choosing it."""
    return [spec for name in THREE for spec in searched(name, CHOSEN, (3, 4, 5), nll_samples=5000)]


#: What the studies of schedules share: 3,130 steps, in which beta rises from 0.2 to 1 in two fifths of them.
SHORT: dict[str, Any] = {"train_images": 20_000, "epochs": 10, "nll_images": 5000, "explored_images": 500}
SHORT_WARM_UP, _SHORT_STEPS = Linear(0.2, 6.4e-4), 3130
_CYCLES: dict[str, Any] = {f"cyclical, {shape}": ELBO(Cyclical(_SHORT_STEPS, shape=shape)) for shape in SHAPES}
#: What a VAE and HVI are trained by in the study `schedules`.
SCHEDULED: dict[str, Any] = {
    "constant": ELBO(),
    "linear": ELBO(SHORT_WARM_UP),
    "geometric": ELBO(Geometric(0.2, 1.6e-3)),
    **_CYCLES,
    "alpha": AlphaELBO(SHORT_WARM_UP),
    "capacity": CapacityELBO(rise=SHORT_WARM_UP),
}


def schedules() -> list[Mnist]:
    """Every schedule for VAE and HVI; with and without warm-up for the flows and AVO, along each of its paths."""
    plans = [{**MNIST_LINES[name], "objective": each} for name in ("VAE", "HVI") for each in SCHEDULED.values()]
    for beta in (1.0, SHORT_WARM_UP):
        plans += [method(name, beta) for name in ("HVI-AVO", "planar flow", "Householder flow", "IAF")]
        plans += [{"kernel": NEAR, "objective": AVO(0.2, beta, path)} for path in (GeometricAlphas(), LearnedAlphas())]
    return [spec for plan in plans for spec in _mnist(plan, range(5), **SHORT)]


def risen() -> list[Mnist]:
    """A VAE without a rise of beta and with one, in fresh seeds: the likelihood of 500 images by fitted proposals."""
    shared = SHORT | {"nll_images": 500, "explored_images": 0, "bounds_images": 500, "annealed_images": 0}
    plans = [method("VAE", beta) for beta in (1.0, SHORT_WARM_UP)]
    found = [spec for plan in plans for spec in _mnist(plan, range(5, 10), **shared)]
    return [spec.replace(annealed_images=100) if spec.seed == 5 else spec for spec in found]  # minutes a run


def pruning() -> list[Followed]:
    """Why a rise helps: the latents of a VAE followed through training, without annealing and with one linear rise."""
    shared = {name: SHORT[name] for name in ("train_images", "epochs")}
    return [Followed(objective=SCHEDULED[name], seed=n, **shared) for name in ("constant", "linear") for n in range(3)]


#: Where warm-up starts, and what is added at each of its 1,570 steps: it lasts all of training, a half, a fifth, or a
#: twentieth of it where it starts at 0.
GRID = {"start": (0.0, 0.2, 0.5, 0.8), "rate": (6.4e-4, 1.28e-3, 3.2e-3, 1.28e-2)}
GRID_METHODS = (*THREE, "IAF", "Householder flow")


def robustness() -> list[Mnist]:
    """A grid of warm-ups for five methods: which of them minds it."""
    shared = SHORT | {"batch": 128, "nll_images": 2000, "explored_images": 200}
    betas = [Linear(start, rate) for start, rate in itertools.product(*GRID.values())]
    return [spec for name in GRID_METHODS for beta in betas for spec in _mnist(method(name, beta), **shared)]


#: What a VAE with an autoregressive decoder is trained by in the study `collapse`.
RISES: dict[str, Any] = {"constant": ELBO(), "linear": ELBO(Linear(0.0, 6.4e-4)), **_CYCLES}


def collapse() -> list[Mnist]:
    """A decoder that can do without z: with beta at 1, rising once, or rising four times; in each shape."""
    shared = SHORT | {"decoder": Autoregressive(), "width": 200}
    return [spec for each in RISES.values() for spec in _mnist({"objective": each}, range(5), **shared)]


_GRIDS = (grid, objectives, kernels, initialisation, momentum, length, compute, wide_base)
_DENSITY = (*_GRIDS, ring8, best, tuning, tuned, starts)
_MNIST = (mnist, long, anatomy, faultless, agreement, regime, chosen, schedules, pruning, robustness, collapse)
DENSITY_STUDIES: dict[str, Callable[[], Sequence[Experiment]]] = {study.__name__: study for study in _DENSITY}
_OTHERS = (
    likeliest,
    risen,
    folded_line,
    apart,
    posterior_alone,
    quarter,
    chains,
    working,
    robust,
    *seed_systems.STUDIES,
)
_WHICH = (which_method, which_bars, which_ring, which_mnist)
STUDIES = DENSITY_STUDIES | {study.__name__: study for study in (*_MNIST, *_OTHERS, *_WHICH)}


def find_study(name: str) -> list[Experiment]:
    """The experiments of that study; ValueError with the known names if there is none."""
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}: choose one of {', '.join(STUDIES)}")
    return list(STUDIES[name]())
