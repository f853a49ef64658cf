"""Which method: AVO among its relatives, with one chain where that can be, as many steps and evaluations, exact truth.

`which_method` trains every method on every target with the evaluations of `BUDGETS`, and gives as many to samplers that
are not trained. `which_bars`, `which_ring` and `which_mnist` are the settings that are held against published figures.
What each run is judged by, beside `judging.density.judge`: see `figures`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from annealed_core import evidence
from annealed_core.ais import ais
from annealed_core.chain import Chain
from annealed_core.dais import Drift, Leapfrog, TargetChain, chain_of
from annealed_core.description import Boolean, Calls, Choice, Share, Size, Whole
from annealed_core.energies import ENERGIES, find
from annealed_core.flows import IAF, Spline
from annealed_core.judging.draws import coverage, energy_distance, exact_draws, upper_bound
from annealed_core.kernels import DiagonalGaussian, Residual
from annealed_core.nested import NVI, Inclusive, TrajectoryBalance, chosen, resampled, sequential
from annealed_core.objectives import AVO, ELBO, IWAE
from annealed_core.running.density import Density, DensityProblem, base_scale, built, path_of
from annealed_core.running.experiment import Experiment, Problem, run
from annealed_core.running.mnist import Mnist
from annealed_core.schedules import Between, Linear, Then, objective_at
from annealed_core.smc import SMC, AdaptiveAlphas, Moved, adaptive_alphas
from annealed_core.targets import GeometricAlphas, LearnedAlphas, LinearAlphas
from annealed_core.vae import VAE, Independent
from annealed_report import logistic
from annealed_report.comparison import of_specs, paired, select
from annealed_report.statistics import Interval, interval

SAMPLES, SETS, EXACT = 2000, 10, 2000  # samples of an estimate of log Z, such estimates, and exact draws
Name = Annotated[str, Choice(*ENERGIES, "logistic")]


def target_of(name: str) -> Any:
    """The target of that name."""
    return logistic.target() if name == "logistic" else find(name)


def exact_of(name: str, n: int, generator: torch.Generator) -> Tensor:
    """Exact draws of it, or as good as exact: (n, dim)."""
    if name != "logistic":
        return exact_draws(find(name), n, generator)
    return logistic.draws()[torch.randperm(len(logistic.draws()), generator=generator)[:n]]


class Counted:
    """A target that counts the points at which it is evaluated, each once however often it is asked for.

    A value and its gradient are one evaluation. A method need not keep what it knows, as they are written here for the
    reader: so nothing is charged for a point that comes again.
    """

    def __init__(self, target: Any) -> None:
        self.target, self.dim, self.points = target, target.dim, list[Tensor]()

    @property
    def evaluations(self) -> int:
        """How many points there were."""
        self.points = [torch.cat(self.points).unique()] if self.points else []
        return sum(map(len, self.points))

    def log_prob(self, z: Tensor) -> Tensor:
        """As of the target."""
        bits = z.detach().double().contiguous().view(torch.int64)
        self.points.append((bits * _odd(self.dim)).sum(-1).flatten())
        found: Tensor = self.target.log_prob(z)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


@functools.cache
def _odd(n: int) -> Tensor:
    """Random odd numbers (n,), by which the bits of a point become one number."""
    return torch.randint(2**62, (n,), generator=torch.Generator().manual_seed(0)) * 2 + 1


def figures(
    name: str, sets: Sequence[tuple[Tensor, Tensor, float, float]], generator: torch.Generator
) -> dict[str, Any]:
    """What sets of weighted samples are worth, as plain values; a set is z, log-weights, log Z and ESS.

    `log_z`, `ess`, `log_z_error_2000`: means over sets. Of all sets together, weighted: `energy_distance` and
    `coverage` (the mean over dimensions, `coverage_least` the least) of 2,000 draws by the weights; `mode_error`, the
    total variation between the modes' masses, and `modes_found`, those with a fifth of their mass; of the logistic
    regression the largest errors of a mean, `mean_error`, and of a standard deviation as a share of it, `sd_error`.
    """
    target, exact = target_of(name), exact_of(name, EXACT, generator)
    z, log_weights = torch.cat([each[0] for each in sets]).double(), torch.cat([each[1] for each in sets]).double()
    log_z, ess = ([each[place] for each in sets] for place in (2, 3))
    draws = chosen(z, resampled(log_weights, generator))[torch.randperm(len(z), generator=generator)[:SAMPLES]]
    covered = coverage(draws, exact)
    found: dict[str, Any] = {
        "log_z": sum(log_z) / len(sets),
        "ess": sum(ess) / len(sets),
        "energy_distance": energy_distance(draws, exact),
        "coverage": float(covered.mean()),
        "coverage_least": float(covered.min()),
    }
    truth = target.log_normalizer
    if truth is None:
        truth = evidence.log_normalizer_quadrature(target)
    found["log_z_error_2000"] = sum(abs(each - truth) for each in log_z) / len(sets)
    if getattr(target, "modes", None) is not None:
        masses = evidence.mode_masses(z, target.modes[0], log_weights)
        found["mode_error"] = float(0.5 * (masses - target.modes[1]).abs().sum())
        found["modes_found"] = int((masses > 0.2 * target.modes[1]).sum())
    if name == "logistic":
        shares, known = torch.softmax(log_weights, 0).unsqueeze(-1), logistic.reference()
        mean = (shares * z).sum(0)
        sd = (shares * (z - mean).square()).sum(0).sqrt()
        found["mean_error"] = float((mean - known["mean"]).abs().max())
        found["sd_error"] = float((sd / known["sd"] - 1).abs().max())
    return found


# ---- chains that are trained


class Compared(Density):
    """A trained chain that is also judged by `figures`, and whose evaluations of the target are counted.

    Attributes:
        target: a name of `ENERGIES`, or "logistic".
        resample: the share of the particles below which their effective sample size makes them be drawn anew, when it
            is judged; 0 for importance sampling of whole paths.
        kernel, n_transitions, objective, steps, batch, samples, seed: with the others as of `Density`.
    """

    target: Name = "D"
    resample: Share = 0.0

    @property
    def target_object(self) -> Any:
        """The target itself."""
        return target_of(self.target)

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> ComparedProblem:
        """See `Experiment`."""
        return ComparedProblem(specs, device, compile)

    def untrained(self, target: Any) -> Chain:
        """The chain at the start, towards that target."""
        base = DiagonalGaussian.isotropic(target.dim, self.scale)
        return chain_of(base, self.kernels(), target=lambda: target)

    def evaluations_per_sample(self) -> float:
        """Of the target, in a step of training, for each element of `batch`; the mean of the first and the last."""
        counted, drawn = Counted(self.target_object), 64
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of what is drawn anew each point counts once: how many, is chance
            chain, (objective, _) = self.untrained(counted), built(self.objective, self.n_transitions)
            for step in (0, self.steps - 1):
                objective_at(objective, step)(chain, counted, drawn)
        return counted.evaluations / (2 * drawn)

    def evaluations_before(self) -> int:
        """Of the target, by a sampler from whose draws the objective learns: in their number they are a line."""
        sampler, found = getattr(self.objective, "sampler", None), []
        if sampler is None:
            return 0
        for few in (100, 200):
            counted = Counted(self.target_object)
            sampler.replace(particles=few).draw(counted)
            found.append(counted.evaluations)
        return found[0] + (found[1] - found[0]) * (sampler.particles - 100) // 100


class ComparedProblem(DensityProblem):
    """Such chains, trained side by side where they can be."""

    def metrics(self) -> list[dict[str, Any]]:
        """See `Compared`."""
        found = super().metrics()
        for number, (spec, weights) in enumerate(zip(self.specs, self.weights(), strict=True)):
            if found[number]:
                found[number] |= self._compared(spec, spec.restore(weights)[1])
        return found

    @torch.no_grad()
    def _compared(self, spec: Any, chain: Chain) -> dict[str, Any]:
        generator, counted = torch.Generator().manual_seed(spec.seed + 2), Counted(spec.target_object)
        chain = chain.replace(generator=generator)
        if isinstance(chain, TargetChain):
            chain = chain.replace(target=counted)
        path = path_of(self.objective)
        path = LinearAlphas() if path is None or isinstance(path, nn.Module) else path

        def drawn(n: int) -> tuple[Tensor, Tensor, float, float]:
            if spec.resample:
                kept = sequential(chain, counted, n, path, spec.resample)
                return kept.z, kept.log_weights, float(kept.log_z), float(kept.ess)
            trajectory = chain.rsample(n)
            log_weights = evidence.log_weight_double(chain, counted, trajectory)
            log_z, ess = evidence.log_mean_weight(log_weights)[0], evidence.effective_sample_size(log_weights)
            return trajectory.z[-1], log_weights, float(log_z), float(ess)

        found = figures(spec.target, [drawn(SAMPLES) for _ in range(SETS)], generator)
        found["evaluations_sampling"] = counted.evaluations // SETS
        trained = round(spec.steps * spec.batch * spec.evaluations_per_sample())
        found["evaluations_training"] = trained + spec.evaluations_before()
        hundreds = [drawn(100) for _ in range(SETS)]
        found |= {"log_z_100": sum(each[2] for each in hundreds) / SETS, "ess_100": sum(e[3] for e in hundreds) / SETS}
        if not isinstance(spec.kernel, Leapfrog):  # of which no way back is written
            found |= upper_bound(chain, counted, exact_of(spec.target, EXACT, generator))
        return found


# ---- samplers that are not trained


class Sampled(Experiment):
    """Annealed importance sampling, or sequential Monte Carlo, judged by `figures`; the seed is that of the particles.

    Attributes:
        target: a name of `ENERGIES`, or "logistic".
        resample: as of `ais`; 0 for never.
        adaptive: exponents by `adaptive_alphas`, else equally spaced ones.
        n_temperatures, n_leapfrog, particles: their numbers.
    """

    target: Name = "D"
    resample: Share = 0.0
    adaptive: Boolean = False
    n_temperatures: Annotated[int, Whole(1)] = 100
    n_leapfrog: Size = 5
    particles: Annotated[int, Whole(2)] = SAMPLES

    @property
    def label(self) -> str:
        """Such as smc-D-s0."""
        return f"{'smc' if self.resample else 'ais'}-{self.target}-s{self.seed}"

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> SampledProblem:
        """See `Experiment`; `device` and `compile` change nothing."""
        return SampledProblem(specs)

    def restore(self, weights: dict[str, Tensor], device: str = "cpu") -> tuple[nn.Module, None]:
        """Nothing is trained."""
        return nn.Identity(), None


class SampledProblem(Problem):
    """One sampler, with nothing to train."""

    def __init__(self, specs: Sequence[Sampled]) -> None:
        (self.spec,) = specs
        self.module, self.failures, self.steps, self.steps_per_record = nn.Identity(), dict[int, str](), 1, 1

    def metrics(self) -> list[dict[str, Any]]:
        """See `figures`, of as many sets as a trained chain is judged by; and AIS's mean log-weight, its bound."""
        spec, generator = self.spec, torch.Generator().manual_seed(self.spec.seed)
        counted = Counted(target_of(spec.target))
        base = DiagonalGaussian.isotropic(counted.dim, base_scale(counted))
        alphas = adaptive_alphas(counted, base, spec.n_temperatures, seed=spec.seed) if spec.adaptive else None
        shared: dict[str, Any] = {"n_temperatures": spec.n_temperatures, "n_leapfrog": spec.n_leapfrog, "n_moves": 1}
        resample, pilot = spec.resample or None, counted.evaluations
        sets = [
            ais(counted, base, spec.particles, alphas, resample=resample, generator=generator, **shared)
            for _ in range(SETS)
        ]
        found = figures(spec.target, [(s.z, s.log_weights, float(s.log_z), float(s.ess)) for s in sets], generator)
        each = round((counted.evaluations - pilot) / SETS)
        found |= {"evaluations_sampling": pilot + each, "evaluations_training": 0}
        if resample:
            return [found]
        return [found | {"elbo": sum(float(s.log_weights.mean()) for s in sets) / SETS}]

    def weights(self) -> list[dict[str, Tensor]]:
        """None."""
        return [{}]

    def values(self, step: int) -> Tensor:
        """Not asked for: nothing is trained."""
        raise NotImplementedError

    def record(self) -> list[dict[str, float]]:
        """As `values`."""
        return [{}]

    def state(self) -> dict[str, Any]:
        """As `values`."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """As `values`."""


# ---- every method on every target

T, SEEDS = 8, range(5)
#: Evaluations of the target in training, about; a sampler has as many.
BUDGETS = {"D": 500_000, "ring8": 500_000} | dict.fromkeys(("gmm40", "funnel", "many_well", "logistic"), 1_000_000)
#: The step of kernels that follow the target's gradient at the start, about that of its narrowest part.
STEPS = {"D": 0.3, "ring8": 0.4, "gmm40": 1.0, "funnel": 0.1, "many_well": 0.2, "logistic": 0.2}
_NOISE = Between(0.5, 0.0, Linear(0.0, 1 / 1500))  # of exploration, which ends after 1,500 steps
_PAIRS: dict[str, Any] = {"kernel": Residual(hidden=50)}
_SPLINE = Spline(hidden=32, bins=16)
#: What is trained: its fields on a target. Of each 2,000 steps are taken, of dear ones fewer, and the batch is what the
#: budget leaves.
TRAINED: dict[str, Callable[[str], dict[str, Any]]] = {
    "ELBO": lambda _: {**_PAIRS, "objective": ELBO()},
    "AVO": lambda _: {**_PAIRS, "objective": AVO()},
    "AVO, learned path": lambda _: {**_PAIRS, "objective": AVO(alphas=LearnedAlphas())},
    "AVO, adaptive path": lambda t: {**_PAIRS, "objective": AVO(alphas=_fitting(t))},
    "IWAE": lambda _: {**_PAIRS, "objective": IWAE(samples=8)},
    "NVI": lambda _: {**_PAIRS, "objective": NVI()},
    "NVIR": lambda _: {**_PAIRS, "objective": NVI(resample=True), "resample": 0.5},
    "trajectory balance": lambda _: {**_PAIRS, "objective": TrajectoryBalance(_NOISE)},
    "UHA": lambda t: {"kernel": _leapfrog(t), "objective": ELBO(), "lr": 1e-2},
    "CMCD": lambda t: {"kernel": Drift(0.5 * STEPS[t] ** 2, 32), "objective": TrajectoryBalance(), "lr": 3e-3},
    "flow": lambda _: {"kernel": _SPLINE, "objective": ELBO()},
    "flow, AVO on an adaptive path": lambda t: {"kernel": _SPLINE, "objective": AVO(alphas=_fitting(t))},
    "SNF": lambda t: {**_moved(t, "metropolis"), "objective": ELBO()},
    "CRAFT": lambda t: {
        **_moved(t, "hamiltonian"),
        **{"objective": NVI(resample=True, alphas=_fitting(t)), "resample": 0.5},
    },
}
#: What is not: its fields.
SAMPLERS: dict[str, dict[str, Any]] = {"AIS": {}, "SMC": {"resample": 0.5, "adaptive": True}}
METHODS = (*TRAINED, *SAMPLERS)


def _leapfrog(target: str) -> Leapfrog:
    """In the quartic tails of many-well steps without a bound burst after some hundred steps of training."""
    return Leapfrog(0.05, largest=0.1) if target == "many_well" else Leapfrog(STEPS[target])


def _fitting(target: str) -> Any:
    """The exponents that fit a target; for the regression, no named energy, those that are short at the prior."""
    return AdaptiveAlphas(target) if target in ENERGIES else GeometricAlphas()


def _moved(target: str, move: str) -> dict[str, Any]:
    step = STEPS[target] / base_scale(target_of(target))
    return {"kernel": Moved(_SPLINE, move, n_leapfrog=3, step=step, alphas=_fitting(target)), "steps": 400}


@functools.cache
def line(method: str, target: str) -> Experiment:
    """A method on a target at seed 0, with the target's budget."""
    if method in SAMPLERS:
        leaps = 5  # the points of a temperature: its weight and the start of its move are at the end of the one before
        temperatures = BUDGETS[target] // (leaps * SAMPLES)
        return Sampled(target=target, n_temperatures=temperatures, n_leapfrog=leaps, **SAMPLERS[method])
    fields: dict[str, Any] = {"lr": 3e-3, "lr_schedule": "cosine", "steps": 2000} | TRAINED[method](target)
    spec = Compared(target=target, n_transitions=T, batch=8, **fields)
    return spec.replace(batch=max(8, round(BUDGETS[target] / (spec.steps * spec.evaluations_per_sample()))))


def which_method() -> list[Experiment]:
    """Every method on every target in five seeds, at as many evaluations."""
    return [line(method, target).replace(seed=seed) for target in BUDGETS for method in METHODS for seed in SEEDS]


def of_method(runs: Sequence[Any], method: str, target: str) -> list[Any]:
    """The runs (or records) of a method on a target, in the order of their seeds."""
    return of_specs(runs, [line(method, target).replace(seed=seed) for seed in SEEDS])


# ---- what is held against published figures

FRESH = range(200, 205)
_AFFINE: dict[str, Any] = {"kernel": IAF(hidden=64), "objective": ELBO(), "lr": 3e-3}
#: A chain of ours for each of the bars, found by short trials; of GMM-40 its sampler has the seed of the run.
BARS: dict[str, dict[str, Any]] = {
    "gmm40": {
        "kernel": Spline(hidden=64, bins=32),
        "objective": Inclusive(SMC("gmm40", 40_000, n_temperatures=64, base_scale=30.0)),
        **{"base_scale": 30.0, "n_transitions": 4, "steps": 8000, "batch": 512, "lr": 3e-3},
    },
    "funnel": {**_AFFINE, "n_transitions": 1, "steps": 20_000, "batch": 512},
    "many_well": {
        "kernel": Spline(hidden=64, bins=16),
        "objective": Then(AVO(), ELBO(), switch=3000),
        **{"n_transitions": 4, "steps": 6000, "batch": 256, "lr": 2e-3},
    },
    "logistic": {**_AFFINE, "lr": 2e-3, "n_transitions": 3, "steps": 60_000, "batch": 256},
}
#: Published errors of log Z to stand beside: FAB's (Midgley et al. 2023, arXiv 2208.01893), and the smallest of a
#: table of Sendera et al. 2024.
PUBLISHED = {"gmm40": {"FAB": 0.0027}, "many_well": {"FAB": 0.032, "table": 0.02}, "funnel": {"table": 0.206}}


def which_bars() -> list[Compared]:
    """A trained chain on each of the harder targets, five fresh seeds each."""
    found = [Compared(target=t, lr_schedule="cosine", **fields) for t, fields in BARS.items()]
    return [seeded(spec.replace(seed=seed)) for spec in found for seed in FRESH]


def seeded(spec: Any) -> Any:
    """The same, where an objective learns from a sampler with the sampler's seed that of the run."""
    objective: Any = getattr(spec, "objective", None)
    if not isinstance(objective, Inclusive):
        return spec
    return spec.replace(objective=objective.replace(sampler=objective.sampler.replace(seed=spec.seed)))


RING = (4, 6, 8)  # targets on the path, K, and 288 samples of all in a step (Zimmermann et al. 2021, table 1)


def which_ring() -> list[Compared]:
    """NVIR on the ring of eight with NVI's budget, drawing anew at each step; and NVI at K = 8. In ten fresh seeds.

    AVO and learned paths with that budget are in the study `ring8`.
    """
    plans = [(k, NVI(resample=True), 1.0) for k in RING] + [(8, NVI(), 0.0)]
    return [
        Compared(
            target="ring8", objective=objective, resample=resample, seed=seed, steps=20_000, n_transitions=k - 1,
            batch=288 // k, lr_schedule="cosine", **_PAIRS,
        )
        for k, objective, resample in plans
        for seed in range(10, 20)
    ]  # fmt: skip


class Continued(Mnist):
    """An `Mnist` whose encoder and decoder start as those of a trained one.

    Attributes:
        model: that one, with the same decoder, latents and width.
    """

    model: Annotated[Any, Calls("an Mnist", "auto_encoder")] = Mnist()

    def auto_encoder(self) -> VAE:
        """As of `Mnist`, with the weights of the model."""
        found, trained = super().auto_encoder(), run(self.model).vae
        found.encoder.load_state_dict(trained.encoder.state_dict())
        found.decoder.load_state_dict(trained.decoder.state_dict())
        return found


#: A decoder without batch normalisation, a VAE to start from, and 20 epochs more with K = 8.
_PLAIN: dict[str, Any] = {"decoder": Independent(norm=False), "epochs": 20, "batch": 128, "nll_images": 1000}
STARTED = Mnist(objective=ELBO(Linear(0.2, 4e-4)), **_PLAIN)
K8: dict[str, dict[str, Any]] = {
    "VAE": {"objective": ELBO()},
    "IWAE, K = 8": {"objective": IWAE(8, 1.0)},
    "UHA, K = 8": {"objective": ELBO(), "kernel": Leapfrog(0.05, 0.9), "n_transitions": 8},
}


def which_mnist() -> list[Continued]:
    """UHA and IWAE at as many decoder passes, from the same trained VAE, in three seeds; and the VAE going on alone."""
    plans = [{**_PLAIN, "lr": 3e-4, "lr_schedule": "cosine", "nll_samples": 500, **fields} for fields in K8.values()]
    return [Continued(seed=seed, model=STARTED, **plan) for plan in plans for seed in range(3)]


# ---- claims


def _mean(target: str, value: Callable[[dict[str, Any]], float]) -> Callable[..., Interval | None]:
    """The mean over the seeds of a bar's runs."""

    def contrast(runs: Sequence[Any]) -> Interval | None:
        found = select(runs, target=target)
        return interval([value(run.metrics) for run in found]) if found else None

    return contrast


def _ring(k: int, value: Callable[[dict[str, Any]], float]) -> Callable[..., Interval | None]:
    def contrast(runs: Sequence[Any]) -> Interval | None:
        found = select(runs, objective=NVI(resample=True), n_transitions=k - 1)
        return interval([value(run.metrics) for run in found]) if found else None

    return contrast


def _over(ours: str, theirs: str, targets: Sequence[str] = tuple(BUDGETS)) -> Callable[..., Interval | None]:
    """The logarithm of the ratio of the errors of log Z, its mean over targets, seed by seed."""

    def contrast(runs: Sequence[Any]) -> Interval | None:
        by_seed: dict[int, list[float]] = {}
        for target in targets:
            for a, b in zip(of_method(runs, ours, target), of_method(runs, theirs, target), strict=True):
                errors = (max(1e-4, each.metrics["log_z_error_2000"]) for each in (a, b))
                by_seed.setdefault(a.spec.seed, []).append(math.log(next(errors) / next(errors)))
        return interval([sum(each) / len(each) for each in by_seed.values()]) if by_seed else None

    return contrast


def claims() -> list[Any]:
    """The claims of these studies, in the form of `claims.CLAIMS`."""
    from annealed_report.claims import Claim

    ring, bars, every, k8 = (
        f"11_which_method#{section}"
        for section in (
            *("The ring of eight, with NVI's budget", "Harder targets", "Every method"),
            "MNIST, with eight decoder passes",
        )
    )

    def error_less(bar: float) -> Callable[[dict[str, Any]], float]:
        return lambda metrics: metrics["log_z_error_2000"] - bar

    found = [
        Claim(
            f"{name}: a trained chain's log Z from 2,000 samples is off by at most {bar} (mean error, less that)",
            *("which_bars", _mean(target, error_less(bar)), -1, 0.0, bars),
        )
        for target, name, bar in (
            ("gmm40", "GMM-40", 0.01),
            ("funnel", "Funnel-10", 0.003),
            ("many_well", "Many-well-32", 0.05),
        )
    ]
    found += [
        Claim(
            "GMM-40: a trained chain keeps all 40 modes (modes found, less 39.5)",
            *("which_bars", _mean("gmm40", lambda metrics: metrics["modes_found"] - 39.5), 1, 0.0, bars),
        ),
        Claim(
            "Logistic regression, 31 dimensions: a trained chain's ESS is at least 0.9 (ESS less that)",
            *("which_bars", _mean("logistic", lambda metrics: metrics["ess"] - 0.9), 1, 0.0, bars),
        ),
    ]
    found += [
        Claim(
            f"Ring of eight, K = {k}: NVIR's ESS is at least 95 of 100 (ESS less that)",
            *("which_ring", _ring(k, lambda metrics: 100 * metrics["ess_100"] - 95), 1, 0.0, ring),
        )
        for k in RING
    ]
    found += [
        Claim(
            f"At equal evaluations: {ours} has a smaller error of log Z than {theirs} (log of the ratio)",
            *("which_method", _over(ours, theirs), -1, 0.1, every),
        )
        for ours, theirs in (
            ("AVO", "ELBO"), ("NVIR", "AVO"), ("AVO, adaptive path", "AVO"), ("CRAFT", "flow"), ("SMC", "AIS"),
            ("CRAFT", "SMC"),
        )
    ]  # fmt: skip
    return [*found, Claim(
        "MNIST, K = 8, equal decoder passes: UHA's likelihood is better than IWAE's (NLL, UHA − IWAE)",
        *("which_mnist", _k8, -1, 0.2, k8),
    )]  # fmt: skip


def _k8(runs: Sequence[Any]) -> Interval | None:
    ours, theirs = (select(runs, **K8[name]) for name in ("UHA, K = 8", "IWAE, K = 8"))
    return paired(ours, theirs, "nll")
