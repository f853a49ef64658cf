"""Does a posterior that keeps to one mode bias the model? A model with everything known exactly, and its study.

    z ~ N(0, 1),     x_r = offset + right * max(z, 0) + left * max(-z, 0) + noise * e_r  for r = 1 ... R,  e_r ~ N(0, 1)

The truth is offset 0 and right = left = 1: x is a noisy measurement of |z|, both sides of z explain it equally well,
and p(z | x) is symmetric with a mode near x and one near -x. All four parameters are learned. Where right and left
come to differ one mode outweighs the other, and where they have opposite signs z -> x is monotone and p(z | x) has a
single mode: a posterior that keeps to one mode can draw the model there, at the cost of likelihood. The construction
is ours: that of Huang et al. 2018 (arXiv 1809.01818), whose claim this is to examine, is not public in code.

`LineModel` has what can be said exactly: log p(x) in closed form and, independently of it, by quadrature; the masses of
the two sides of the posterior; the maximum-likelihood estimate. `FoldedLine` is the experiment: model and posterior
learned together. Log-densities in nats.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.functional import softplus
from torch.special import log_ndtr

from annealed_core.chain import Chain
from annealed_core.description import Choice, Positive, Size, Whole, own_objects
from annealed_core.kernels import DiagonalGaussian, Gated
from annealed_core.objectives import AVO, ELBO, IWAE
from annealed_core.running.density import Kernels, Objectives, check_objective, path_of, short_name
from annealed_core.running.experiment import Experiment, Problem
from annealed_core.schedules import objective_at
from annealed_core.vae import Joint

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_REACH = 8.0  # of grids over z ~ N(0, 1): 1e-15 of the prior lies beyond


def _normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log N(x; loc, scale^2), element by element."""
    return -0.5 * ((x - loc) / scale).square() - scale.log() - _HALF_LOG_TWO_PI


@functools.cache
def nodes(count: int = 1200) -> tuple[Tensor, Tensor]:
    """Points z, rising, and log-weights of a composite Gauss-Legendre rule, 20 points a panel.

    0, where log p(x, z) has a kink, lies between two panels.
    """
    at, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(20))
    panels = 2 * (count // 40)
    width = 2 * _REACH / panels
    starts = width * torch.arange(-(panels // 2), panels // 2, dtype=torch.float64)
    z = starts.unsqueeze(-1) + (at + 1) * width / 2
    return z.flatten(), (weights * width / 2).log().repeat(panels)


class LineModel(NamedTuple):
    """The model of the module's docstring: four numbers, each a tensor ()."""

    offset: Tensor
    right: Tensor
    left: Tensor
    noise: Tensor

    @classmethod
    def of(cls, offset: float = 0.0, right: float = 1.0, left: float = 1.0, noise: float = 0.3) -> LineModel:
        """A model from numbers, the truth unless told, in double precision; ValueError for a noise of 0 or less."""
        if not noise > 0:
            raise ValueError(f"noise must be positive, got {noise}")
        return cls(*(torch.tensor(float(v), dtype=torch.float64) for v in (offset, right, left, noise)))

    def double(self) -> LineModel:
        """The same in double precision, without gradients."""
        return LineModel(*(value.detach().double() for value in self))

    def mean(self, z: Tensor) -> Tensor:
        """What the model expects of x at z, element by element."""
        return self.offset + self.right * z.clamp(min=0) + self.left * (-z).clamp(min=0)

    def sample(self, n: int, measurements: int, generator: torch.Generator) -> Tensor:
        """Draw n observations in double precision: (n, measurements)."""
        z = torch.randn((n, 1), generator=generator, dtype=torch.float64)
        return self.mean(z) + self.noise * torch.randn((n, measurements), generator=generator, dtype=torch.float64)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x | z); x: (batch, R), z: (*sample, batch, 1) -> (*sample, batch)."""
        return _normal(x, self.mean(z), self.noise).sum(-1)

    def _log_sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the integrals of p(x, z) over z > 0 and over z < 0; x: (n, R) -> two of (n,).

        On a side x is linear in |z|, so that p(x, z) is a Gaussian in |z| there, cut off at 0; it meets x by the mean
        of its R measurements alone, but for a factor that does not depend on z.
        """
        repeats, mean = x.shape[-1], x.mean(-1)
        spread = (x - mean.unsqueeze(-1)).square().sum(-1)
        factor = (1 - repeats) * (self.noise.log() + _HALF_LOG_TWO_PI)
        factor = factor - 0.5 * (math.log(repeats) + spread / self.noise**2)
        error = self.noise / math.sqrt(repeats)

        def side(slope: Tensor) -> Tensor:
            total = (slope**2 + error**2).sqrt()
            centre, width = slope * (mean - self.offset) / total**2, error / total  # of |z|, given x
            return _normal(mean, self.offset, total) + log_ndtr(centre / width) + factor

        return side(self.right), side(self.left)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log p(x) in closed form; x: (n, R) -> (n,)."""
        return torch.logaddexp(*self._log_sides(x))

    def right_share(self, x: Tensor) -> Tensor:
        """P(z > 0 | x), exactly; x: (n, R) -> (n,)."""
        right, left = self._log_sides(x)
        return torch.sigmoid(right - left)

    def log_joint_at(self, z: Tensor, x: Tensor) -> Tensor:
        """Log p(x, z) at all pairs of points z (points,) and observations x (n, R): (n, points)."""
        log_prior = -0.5 * z.square() - _HALF_LOG_TWO_PI
        return _normal(x.unsqueeze(-1), self.mean(z), self.noise).sum(-2) + log_prior

    @torch.no_grad()
    def log_prob_quadrature(self, x: Tensor, count: int = 1200) -> Tensor:
        """Log p(x) by quadrature over z in double precision; x: (n, R) -> (n,)."""
        z, log_weights = nodes(count)
        model = self.double()
        parts = [torch.logsumexp(model.log_joint_at(z, part) + log_weights, -1) for part in x.double().split(500)]
        return torch.cat(parts)

    @torch.no_grad()
    def count_modes(self, x: Tensor) -> Tensor:
        """How many local maxima p(z | x) has, counted on a grid; x: (n, R) -> (n,)."""
        values = self.double().log_joint_at(nodes()[0], x.double())
        inner = values[:, 1:-1]
        return ((inner > values[:, :-2]) & (inner >= values[:, 2:])).sum(-1)


def maximum_likelihood(x: Tensor) -> LineModel:
    """The maximum-likelihood estimate for the data x (n, R), by L-BFGS on the closed form in double precision.

    From a symmetric and two slanted starts; the best end is taken. As z may be called -z, right >= left.
    """
    data, ends = x.double(), []
    for tilt in (0.05, 0.5, 1.2):
        raw = torch.tensor([tilt / 2, 1 + tilt, 1 - tilt, math.log(0.3)], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [raw], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-13, line_search_fn="strong_wolfe"
        )

        def loss(raw: Tensor = raw, optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = -LineModel(raw[0], raw[1], raw[2], raw[3].exp()).log_prob(data).mean()
            value.backward()
            return value

        optimiser.step(loss)
        offset, right, left, log_noise = raw.detach()
        ends.append(LineModel(offset, torch.maximum(right, left), torch.minimum(right, left), log_noise.exp()))
    if not data.isfinite().all():
        raise ValueError("x must be finite: no start of the likelihood's maximum gave a number")
    return max(ends, key=lambda model: float(model.log_prob(data).mean().nan_to_num(-math.inf)))


# ---- the experiment

HELD_OUT = 2000
_LINES = 25  # of a history


class FoldedLine(Experiment):
    """Model and posterior of the folded line learned together.

    `metrics` of a run: offset, right, left, noise as learned (right >= left) and of the maximum-likelihood estimate for
    the same data (`*_ml`); `noise_ratio` of the two noises; `tilt` = (right - left) / 2 and `tilt_ml`; `loss`, how much
    lower the exact mean log-likelihood of held-out data is than the estimate's, and `loss_train`, in nats; `gap`, the
    exact log-likelihood minus the chain's ELBO, in nats; `posterior_share`, the mean over x of the exact posterior's
    mass on its smaller side of 0 in the learned model, and `chain_share`, that of the chain's draws; `two_modes`, the
    share of x whose posterior has two modes. The gap is KL(q || p(z | x)) for the Gaussian posterior, and for chains
    the divergence of their whole path, which is at least that.

    Attributes:
        noise: of the true model.
        objective: what is maximised.
        kernel, n_transitions: of the chain after the base; 0 of them is the Gaussian posterior.
        base: "encoder", or "prior": the chain starts from N(0, 1) and its kernels alone see x.
        start: of the model: "symmetric", which is the truth with a noise of 0.5, or "truth", with its own noise.
        measurements: R, how often each |z| is measured.
        n_train, batch: observations, and how many of them a step sees.
        hidden: units of each hidden layer of the encoder.
        steps: of training.
        hold: further steps before these, in which the posterior learns and the model stands still.
        seed, name, lr, lr_schedule, beta1, clip: see `Experiment`; the seed is that of the data too.
    """

    noise: Positive = 0.25
    objective: Objectives = ELBO()
    kernel: Kernels = Gated(hidden=24)
    n_transitions: Annotated[int, Whole(0, 1000)] = 4
    base: Annotated[str, Choice("encoder", "prior")] = "encoder"
    start: Annotated[str, Choice("symmetric", "truth")] = "symmetric"
    measurements: Size = 2
    n_train: Size = 4000
    batch: Size = 100
    hidden: Size = 24
    steps: Annotated[int, Whole(0)] = 5000
    hold: Annotated[int, Whole(0)] = 0
    lr: Positive = 5e-3
    lr_schedule: Annotated[str, Choice("constant", "cosine")] = "cosine"

    def check(self) -> None:
        """Refuse fields that do not fit each other."""
        super().check()
        if self.hold + self.steps == 0:
            raise ValueError("impossible steps 0 of FoldedLine: with hold 0 nothing would learn")
        check_objective(self.objective, self.n_transitions, self.hold + self.steps)
        if self.n_transitions == 0 and self.base == "prior":
            raise ValueError("impossible n_transitions 0 of FoldedLine: a chain from the prior takes at least 1")
        if hasattr(path_of(self.objective), "build"):
            raise ValueError(f"impossible objective {self.objective!r} of FoldedLine: its path does not learn")

    @property
    def label(self) -> str:
        """Such as folded_line-avo-s0."""
        return f"folded_line-{short_name(self.objective)}-s{self.seed}"

    @property
    def line(self) -> str:
        """What a table calls it: all but seed and noise."""
        name = type(self.objective).__name__
        if isinstance(self.objective, AVO) and self.objective.weight < 1:
            name = f"{self.objective.weight:g} AVO + {1 - self.objective.weight:g} ELBO"
        elif isinstance(self.objective, IWAE):
            name += f"-{self.objective.samples}"
        family = f"HVI T={self.n_transitions}" if self.n_transitions else "Gaussian"
        near = getattr(self.kernel, "start", None) == "identity"
        extra = ", from the prior" * (self.base == "prior") + ", near the identity" * near
        extra += ", model held first" * (self.hold > 0) + f", {self.steps} steps" * (self.steps != FoldedLine.steps)
        return f"{family}, {name}{extra}" + f", {self.start} start" * (self.start != "symmetric")

    def stack_key(self) -> Hashable | None:
        """All but seed and noise; with a kernel or objective of the user's own a run is trained alone."""
        return None if own_objects(self) else self.replace(seed=0, noise=1.0)

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> LineProblem:
        """See `Experiment`; `compile` changes nothing."""
        return LineProblem(specs, device)

    def restore(self, weights: dict[str, Tensor], device: str = "cpu") -> tuple[nn.Module, None]:
        """See `Experiment`."""
        learner = Learner(self)
        learner.load_state_dict(weights)
        return learner.to(device).eval().requires_grad_(False), None


@functools.lru_cache(maxsize=64)
def data(noise: float, measurements: int, n_train: int, seed: int) -> tuple[Tensor, Tensor, LineModel]:
    """Training data (n_train, R), held-out data (HELD_OUT, R) and the estimate from the former, in double precision."""
    truth = LineModel.of(noise=noise)
    train, held_out = (
        truth.sample(n, measurements, torch.Generator().manual_seed(1000 * seed + which))
        for which, n in ((1, n_train), (2, HELD_OUT))
    )
    return train, held_out, maximum_likelihood(train)


class LineJoint(Joint):
    """The target log p(x, z) of one model for a batch x (batch, R)."""

    def __init__(self, model: LineModel, x: Tensor) -> None:
        self.model, self.x, self.dim = model, x, 1

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log p(x | z) in nats; z: (*sample, batch, 1) -> (*sample, batch)."""
        return self.model.log_likelihood(self.x, z)

    def frozen(self) -> LineJoint:
        """The same target without its model's gradients."""
        return LineJoint(LineModel(*(value.detach() for value in self.model)), self.x)


class Learner(nn.Module):
    """Model, encoder and kernels of one run, untrained; weights from torch's random state."""

    def __init__(self, spec: FoldedLine) -> None:
        super().__init__()
        self.spec, width = spec, spec.hidden
        self.features = nn.Sequential(
            nn.Linear(spec.measurements, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.outputs = nn.Linear(width, 2)
        self.kernels = nn.ModuleList(spec.kernel.build(1, spec.n_transitions, width))
        log_noise = math.log(spec.noise if spec.start == "truth" else 0.5)
        self.line = nn.Parameter(torch.tensor([0.0, 1.0, 1.0, log_noise]))

    def model(self) -> LineModel:
        """The model as learned so far."""
        offset, right, left, log_noise = self.line.unbind()
        return LineModel(offset, right, left, log_noise.exp())

    def posterior(self, x: Tensor, generator: torch.Generator | None = None) -> Chain:
        """The chain that approximates p(z | x); x: (batch, R). It draws from the generator."""
        features = self.features(x)
        loc, scale = self.outputs(features).chunk(2, -1)
        base = DiagonalGaussian(loc, softplus(scale) + 1e-4)
        if self.spec.base == "prior":
            base = DiagonalGaussian(torch.zeros_like(loc), torch.ones_like(scale))
        return Chain(base, self.kernels, features, generator)

    def forward(self, x: Tensor, noise: Tensor | None, objective: Any, held: bool = False) -> Tensor:
        """The mean of an objective over a batch x (batch, R), (); `held`: without a gradient to the model."""
        target = LineJoint(self.model(), x)
        values: Tensor = objective(self.posterior(x), target.frozen() if held else target, noise=noise)
        return values.mean()


class LineProblem(Problem):
    """Learners that are equal but for seed and noise, trained side by side."""

    def __init__(self, specs: Sequence[FoldedLine], device: str = "cpu") -> None:
        self.specs, self.spec, self.failures = list(specs), specs[0], dict[int, str]()
        learners = []
        for each in specs:
            torch.manual_seed(each.seed)
            learners.append(Learner(each))
        weights, _ = stack_module_state(learners)
        self.names, self.one = list(weights), learners[0].to(device)
        self.module = nn.ParameterList(nn.Parameter(value.detach().to(device)) for value in weights.values())
        self.seen = [data(s.noise, s.measurements, s.n_train, s.seed)[0].float().to(device) for s in specs]
        self.generators = [torch.Generator().manual_seed(1000 * s.seed + which) for s in specs for which in (3, 4)]
        self.steps = self.spec.hold + self.spec.steps
        self.steps_per_record = max(1, self.steps // _LINES)

    def values(self, step: int) -> Tensor:
        """The objective of each model, (M,)."""
        spec, objective = self.spec, objective_at(self.spec.objective, step)
        draws = objective.draws(()) if hasattr(objective, "draws") else ()
        shape = (spec.n_transitions + 1, *draws, spec.batch, 1)
        xs, noises = [], []
        for own, batches, noise in zip(self.seen, self.generators[::2], self.generators[1::2], strict=True):
            xs.append(own[torch.randint(len(own), (spec.batch,), generator=batches)])
            noises.append(torch.randn(shape, generator=noise).to(own))

        def value(weights: dict[str, Tensor], x: Tensor, noise: Tensor) -> Tensor:
            found: Tensor = functional_call(self.one, weights, (x, noise, objective, step < spec.hold))
            return found

        weights = dict(zip(self.names, self.module, strict=True))
        return torch.vmap(value)(weights, torch.stack(xs), torch.stack(noises))

    def record(self) -> list[dict[str, float]]:
        """The parameters of each model."""
        lines = self.module[self.names.index("line")].tolist()
        for number, line in enumerate(lines):
            if not all(map(math.isfinite, line)):
                self.failures.setdefault(number, f"the model became not finite: lr {self.spec.lr} may be too large")
        models = ([*line[:3], math.exp(min(line[3], 99.0))] for line in lines)
        return [dict(zip(("offset", "right", "left", "noise"), model, strict=True)) for model in models]

    def weights(self) -> list[dict[str, Tensor]]:
        """Each model's own weights."""
        pairs = list(zip(self.names, self.module, strict=True))
        return [{name: value[number].detach().clone() for name, value in pairs} for number in range(len(self.specs))]

    def metrics(self) -> list[dict[str, Any]]:
        """What `FoldedLine` describes, of each model."""
        pairs = enumerate(zip(self.specs, self.weights(), strict=True))
        return [{} if n in self.failures else judge(spec.restore(weights)[0]) for n, (spec, weights) in pairs]

    def state(self) -> dict[str, Any]:
        """See `Problem`."""
        return {"generators": [each.get_state() for each in self.generators], "failures": self.failures}

    def load(self, state: dict[str, Any]) -> None:
        """See `Problem`."""
        self.failures = state["failures"]
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)


def _described(model: LineModel) -> dict[str, float]:
    """The parameters and the tilt of a model; right is the larger slope."""
    left, right = sorted((float(model.left), float(model.right)))
    offset, noise = float(model.offset), float(model.noise)
    return {"offset": offset, "right": right, "left": left, "noise": noise, "tilt": (right - left) / 2}


@torch.no_grad()
def judge(learner: Any) -> dict[str, float]:
    """What `FoldedLine` describes, of one trained learner."""
    spec, generator = learner.spec, torch.Generator().manual_seed(learner.spec.seed + 1)
    train_x, held_out, best = data(spec.noise, spec.measurements, spec.n_train, spec.seed)
    model = learner.model().double()
    exact = model.log_prob_quadrature(held_out)
    chain = learner.posterior(held_out.float(), generator)
    bound = chain.log_weight(LineJoint(learner.model(), held_out.float()), chain.rsample(20)).double().mean(0)
    draws = learner.posterior(held_out[:200].float(), generator).rsample(1000).z[-1]
    shares = model.right_share(held_out), (draws > 0).double().mean(0)
    posterior_share, chain_share = (float(torch.minimum(right, 1 - right).mean()) for right in shares)
    return {
        **_described(model),
        **{f"{name}_ml": value for name, value in _described(best).items()},
        "noise_ratio": float(model.noise / best.noise),
        "loss": float((best.log_prob_quadrature(held_out) - exact).mean()),
        "loss_train": float((best.log_prob(train_x) - model.log_prob(train_x)).mean()),
        "gap": float((exact - bound).mean()),
        "posterior_share": posterior_share,
        "chain_share": chain_share,
        "two_modes": float((model.count_modes(held_out[:500]) > 1).double().mean()),
    }


# ---- the study

GAUSSIAN: dict[str, Any] = {"n_transitions": 0}
NEAR: dict[str, Any] = {"kernel": Gated(hidden=24, start="identity")}
PRIOR: dict[str, Any] = {"base": "prior"}
TRUTH: dict[str, Any] = {"start": "truth"}
HELD: dict[str, Any] = {"start": "truth", "hold": 2000}
EIGHT: dict[str, Any] = {"n_transitions": 8}
BY_AVO: dict[str, Any] = {"objective": AVO()}
BY_IWAE: dict[str, Any] = {"objective": IWAE(samples=5)}

#: What the study compares, as fields of `FoldedLine`. The first three are the quick version's.
PLANS: tuple[dict[str, Any], ...] = (
    *(GAUSSIAN, {}, BY_AVO, {"objective": AVO(0.2)}, {"objective": AVO(0.5)}),
    *(GAUSSIAN | BY_IWAE, GAUSSIAN | {"objective": IWAE(samples=50)}, BY_IWAE),
    *(plan | objective for plan in (NEAR, PRIOR, TRUTH, HELD, HELD | PRIOR, EIGHT) for objective in ({}, BY_AVO)),
    *(NEAR | {"objective": AVO(0.5)}, GAUSSIAN | TRUTH, {"n_transitions": 1}, {"steps": 10_000}),
)


def specs_of(
    plans: Iterable[dict[str, Any]] = PLANS,
    noises: Sequence[float] = (0.1, 0.3),
    seeds: Sequence[int] = range(10),
    **fields: Any,
) -> list[FoldedLine]:
    """Every plan with every true noise and seed; `fields` are those that all share."""
    return [FoldedLine(**{"noise": n, "seed": s, **fields, **plan}) for plan in plans for n in noises for s in seeds]


def folded_line() -> list[FoldedLine]:
    """Is the model biased, and what mends it? Every plan at two amounts of noise."""
    return specs_of()


#: The study `apart`: the model at the truth, and then released after the posterior has learned it.
FIXED: dict[str, Any] = {"start": "truth", "hold": 5000, "steps": 0}
BY_BOTH: dict[str, Any] = {"objective": AVO(samples=5)}


def apart() -> list[FoldedLine]:
    """Do the kernels or the model's step destroy the second mode? The model fixed, then released by ELBO or IWAE."""
    chains = [{}, BY_AVO, PRIOR, PRIOR | BY_AVO]
    released = [GAUSSIAN, *chains, *(base | by for base in ({}, PRIOR) for by in (BY_BOTH, BY_IWAE))]
    return specs_of([*(plan | FIXED for plan in (GAUSSIAN, *chains)), *(plan | HELD for plan in released)])


def metrics_of(runs: Iterable[Any], noise: float, **plan: Any) -> list[dict[str, float]]:
    """The metrics of those runs or records that a plan made at that true noise, in the order of their seeds."""
    wanted = set(specs_of([plan], (noise,)))
    return [run.metrics for run in sorted(runs, key=lambda run: run.spec.seed) if run.spec in wanted]
