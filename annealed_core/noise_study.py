"""Does a posterior that keeps to one mode bias the model? Model and posterior of `noise_model` learned together.

A `Case` is one run. `train(cases)` trains those that differ in seed and true noise alone as one batch, and `judge`
compares each with what is exact; `noise_runs` has the study's cases, and keeps what they gave.

Objectives are those of the report: the ELBO, AVO (Huang et al. 2018, arXiv 1809.01818), both weighed, and IWAE (Burda
et al. 2016, arXiv 1509.00519). The posterior starts from an encoder's q_0(z | x), or from the prior.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from annealed_core import objectives
from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair
from annealed_core.noise_model import FoldedLine, maximum_likelihood
from annealed_core.targets import linear_alphas
from annealed_core.vae import with_frozen_kernels

METHODS = ("elbo", "avo", "calibrated", "iwae")
#: Offset, right, left and noise that learning starts from: a symmetric model with too much noise, one whose posterior
#: has one mode, and the truth, with its own noise.
STARTS = {"symmetric": (0.0, 1.0, 1.0, 0.5), "slanted": (0.6, 0.9, -0.4, 0.5), "truth": (0.0, 1.0, 1.0, math.nan)}
HELD_OUT = 2000
_LINES = 25  # of a history


@dataclass(frozen=True)
class Case:
    """Everything that a run depends on.

    Attributes:
        noise: of the true model.
        method: "elbo"; "avo": the kernels by AVO, encoder and model by the ELBO; "calibrated": avo_weight * AVO +
            (1 - avo_weight) * ELBO; "iwae": the bound of iwae_samples samples.
        n_transitions: gated pairs of Gaussians after the base; 0 is the Gaussian posterior.
        base: "encoder", or "prior": the chain starts from N(0, 1) and its kernels alone see x.
        initialisation: of the kernels, torch's "default" or near the "identity".
        start: of the model, a name of STARTS.
        measurements: R, how often each |z| is measured.
        n_train, batch: observations, and how many of them a step sees.
        hidden: units of each hidden layer, of the encoder and of the kernels.
        steps, lr: of Adam, whose rate falls to 0 as a cosine.
        hold: further steps before these, in which the posterior learns and the model stands still.
        seed: of data, initial weights and draws.

    Raises ValueError in one line for values that do not fit.
    """

    experiment: ClassVar[str] = "noise_model"
    noise: float = 0.25
    method: str = "elbo"
    n_transitions: int = 4
    base: str = "encoder"
    initialisation: str = "default"
    start: str = "symmetric"
    avo_weight: float | None = None
    iwae_samples: int | None = None
    measurements: int = 2
    n_train: int = 4000
    batch: int = 100
    hidden: int = 24
    steps: int = 5000
    hold: int = 0
    lr: float = 5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name, known in {
            "method": METHODS,
            "base": ("encoder", "prior"),
            "initialisation": ("default", "identity"),
            "start": tuple(STARTS),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        lowest = {
            "n_transitions": 0,
            "measurements": 1,
            "n_train": 1,
            "batch": 1,
            "hidden": 1,
            "steps": 1,
            "hold": 0,
            "seed": 0,
        }
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("noise", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.n_transitions == 0 and (self.method in ("avo", "calibrated") or self.base == "prior"):
            raise ValueError(f"n_transitions must be at least 1 for method {self.method} from the {self.base}, got 0")
        weight, samples = self.avo_weight, self.iwae_samples
        if (weight is not None) != (self.method == "calibrated") or (weight is not None and not 0 <= weight <= 1):
            raise ValueError(f"avo_weight must lie in [0, 1] for method calibrated and be None else, got {weight}")
        if (samples is not None) != (self.method == "iwae") or (samples is not None and samples < 1):
            raise ValueError(f"iwae_samples must be at least 1 for method iwae and None else, got {samples}")

    def fields(self) -> dict[str, Any]:
        """The experiment and all fields but those that this method does not take, as `from_fields` takes them."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {"experiment": self.experiment, **given}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Case:
        """The case that has these fields."""
        return cls(**{name: value for name, value in fields.items() if name != "experiment"})

    def replace(self, **changes: Any) -> Case:
        """The same case with other values."""
        return dataclasses.replace(self, **changes)

    @property
    def line(self) -> str:
        """What a table calls it: all but seed and noise."""
        weight = self.avo_weight or 0.0
        how = {"elbo": "ELBO", "avo": "AVO", "iwae": f"IWAE-{self.iwae_samples}"}
        name = how.get(self.method, f"{weight:g} AVO + {1 - weight:g} ELBO")
        family = f"HVI T={self.n_transitions}" if self.n_transitions else "Gaussian"
        extra = ", from the prior" * (self.base == "prior") + ", near the identity" * (self.initialisation != "default")
        extra += ", model held first" * (self.hold > 0) + f", {self.steps} steps" * (self.steps != Case.steps)
        return f"{family}, {name}{extra}" + f", {self.start} start" * (self.start != "symmetric")


@dataclass(frozen=True)
class Result:
    """A case that was run.

    `metrics`: offset, right, left, noise as learned (right >= left) and of the maximum-likelihood estimate for the
    same data (`*_ml`); `noise_ratio` of the two noises; `tilt` = (right - left) / 2 and `tilt_ml`; `loss`, how much
    lower the exact mean log-likelihood of held-out data is than the estimate's, and `loss_train`, in nats; `gap`, the
    exact log-likelihood minus the chain's ELBO, in nats; `posterior_share`, the mean over x of the exact posterior's
    mass on its smaller side of 0 in the learned model, and `chain_share`, that of the chain's draws; `two_modes`, the
    share of x whose posterior has two modes. The gap is KL(q || p(z | x)) for the Gaussian posterior, and for chains
    the divergence of their whole path, which is at least that.
    """

    spec: Case
    metrics: dict[str, float]
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


@functools.lru_cache(maxsize=64)
def data(noise: float, measurements: int, n_train: int, seed: int) -> tuple[Tensor, Tensor, FoldedLine]:
    """Training data (n_train, R), held-out data (HELD_OUT, R) and the estimate from the former, in double precision."""
    truth = FoldedLine.of(noise=noise)
    train, held_out = (
        truth.sample(n, measurements, torch.Generator().manual_seed(1000 * seed + which))
        for which, n in ((1, n_train), (2, HELD_OUT))
    )
    return train, held_out, maximum_likelihood(train)


class Joint:
    """The target log p(x, z) of one model for a batch x (batch, R); see `vae.Joint`."""

    dim = 1

    def __init__(self, model: FoldedLine, x: Tensor) -> None:
        self.model, self.x = model, x

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log p(x | z) in nats; z: (*sample, batch, 1) -> (*sample, batch)."""
        return self.model.log_likelihood(self.x, z)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log N(z; 0, 1) in nats; z: (*sample, batch, 1) -> (*sample, batch)."""
        return -0.5 * (z.square().sum(-1) + math.log(2 * math.pi))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(x, z) in nats; z: (*sample, batch, 1) -> (*sample, batch)."""
        return self.log_likelihood(z) + self.log_prior(z)

    def frozen(self) -> Joint:
        """The same target without its model's gradients."""
        return Joint(FoldedLine(*(value.detach() for value in self.model.fields)), self.x)


class StackedLinear(nn.Module):
    """The layers of M models as one: x (*sample, M, batch, in) -> (*sample, M, batch, out)."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.stack(biases)) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        flat = x.movedim(-3, 0).flatten(1, -2)  # (M, sample * batch, in)
        if self.bias is None:
            values = torch.bmm(flat, self.weight.mT)
        else:
            values = torch.baddbmm(self.bias.unsqueeze(-2), flat, self.weight.mT)
        return values.unflatten(1, (*x.shape[:-3], x.shape[-2])).movedim(0, -3)


class Learner(nn.Module):
    """Model, encoder and kernels of one case; initial weights depend on the seed alone where shapes agree."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        self.case, width = case, case.hidden
        self.features = nn.Sequential(
            nn.Linear(case.measurements, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.outputs = nn.Linear(width, 2)
        near = case.initialisation == "identity"
        self.kernels = nn.ModuleList(
            GatedGaussianPair(1, width, width, near_identity=near) for _ in range(case.n_transitions)
        )
        offset, right, left, noise = STARTS[case.start]
        self.line = nn.Parameter(
            torch.tensor([offset, right, left, math.log(case.noise if math.isnan(noise) else noise)])
        )

    def model(self) -> FoldedLine:
        """The model as learned so far; of a stack, with parameters (M, 1, 1)."""
        line = self.line if self.line.ndim == 1 else self.line.unsqueeze(-2).unsqueeze(-2)
        return FoldedLine(line[..., 0], line[..., 1], line[..., 2], line[..., 3].exp())

    def posterior(self, x: Tensor) -> Chain:
        """The chain that approximates p(z | x); x: (batch, R)."""
        features = self.features(x)
        loc, scale = self.outputs(features).chunk(2, -1)
        if self.case.base == "prior":
            return Chain(DiagonalGaussian(torch.zeros_like(loc), torch.ones_like(scale)), self.kernels, features)
        return Chain(DiagonalGaussian(loc, softplus(scale) + 1e-4), self.kernels, features)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """The objective of each observation, to be maximised; x: (batch, R), noise: (T + 1, *sample, batch, 1).

        Values (*sample, batch), without the samples of IWAE; of a stack, x (M, batch, R) gives (*sample, M, batch).
        """
        case, chain, target = self.case, self.posterior(x), Joint(self.model(), x)
        if case.method == "iwae":
            return objectives.iwae(chain, target, case.iwae_samples or 1, noise=noise)
        if case.method == "elbo":
            return objectives.elbo(chain, target, noise=noise)
        alphas = linear_alphas(case.n_transitions)
        if case.method == "calibrated":
            return objectives.calibrated_avo(chain, target, alphas, case.avo_weight or 0.0, noise=noise)
        bound = objectives.elbo(with_frozen_kernels(chain), target, noise=noise)
        local = objectives.avo(chain, target, alphas, noise=noise)
        return bound + local - local.detach()  # the ELBO's value, and for the kernels AVO's gradient


def stacked(learners: Sequence[Learner]) -> Learner:
    """Learners of one shape as one; element m of its weights is the weight of learner m."""
    found = copy.deepcopy(learners[0])
    for name, layer in learners[0].named_modules():
        if isinstance(layer, nn.Linear):
            found.set_submodule(name, StackedLinear([each.get_submodule(name) for each in learners]))  # type: ignore
    found.line = nn.Parameter(torch.stack([learner.line.detach() for learner in learners]))
    return found


def train(cases: Sequence[Case]) -> tuple[list[Learner], list[list[dict[str, float]]]]:
    """Train cases that are equal but for seed and noise, side by side.

    Returns the learners with their weights, and their histories: step and the four parameters. Raises ValueError for
    cases that differ in more, and for training that goes astray.
    """
    case = cases[0]
    if any(each.replace(seed=case.seed, noise=case.noise) != case for each in cases):
        raise ValueError("cases to be trained side by side must be equal but for seed and noise")
    learners = [Learner(each) for each in cases]
    stack = stacked(learners)
    seen = [data(each.noise, each.measurements, each.n_train, each.seed)[0].float() for each in cases]
    batches, draws = ([torch.Generator().manual_seed(1000 * each.seed + which) for each in cases] for which in (3, 4))
    shape = (case.n_transitions + 1, *([case.iwae_samples or 1] if case.method == "iwae" else []), case.batch, 1)

    optimiser = torch.optim.Adam(stack.parameters(), lr=case.lr, fused=True)
    history: list[list[dict[str, float]]] = [[] for _ in cases]
    steps = case.hold + case.steps
    every = max(1, steps // _LINES)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = case.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        pairs = zip(seen, batches, strict=True)
        x = torch.stack([own[torch.randint(len(own), (case.batch,), generator=g)] for own, g in pairs])
        noise = torch.stack([torch.randn(shape, generator=g) for g in draws], -3)
        optimiser.zero_grad()
        (-len(cases) * stack(x, noise).mean()).backward()  # the sum of each model's own mean
        if step < case.hold:
            stack.line.grad = None
        optimiser.step()
        if (step + 1) % every == 0:
            for own, values in zip(history, stack.line.tolist(), strict=True):
                offset, right, left, log_noise = values
                own.append(
                    {"step": step + 1, "offset": offset, "right": right, "left": left, "noise": math.exp(log_noise)}
                )
    for place, learner in enumerate(learners):
        learner.load_state_dict({name: value[place].detach() for name, value in stack.state_dict().items()})
        if not learner.line.isfinite().all():
            raise ValueError(f"lr must be small enough to learn with, got {case.lr}: {cases[place]} became not finite")
    return learners, history


@torch.no_grad()
def judge(learner: Learner) -> dict[str, float]:
    """What `Result` describes, of one trained learner."""
    case = learner.case
    train_x, held_out, best = data(case.noise, case.measurements, case.n_train, case.seed)
    torch.manual_seed(case.seed + 1)
    model = learner.model().double()
    exact = model.log_prob_quadrature(held_out)
    chain, some = learner.posterior(held_out.float()), held_out[:200].float()
    bound = chain.log_weight(Joint(learner.model(), held_out.float()), chain.rsample(20)).double().mean(0)
    right = (learner.posterior(some).rsample(1000).z[-1] > 0).double().mean(0).squeeze(-1)
    slopes, slopes_ml = (sorted(map(float, (m.right, m.left))) for m in (model, best))
    return {
        "offset": float(model.offset),
        "right": slopes[1],
        "left": slopes[0],
        "noise": float(model.noise),
        "offset_ml": float(best.offset),
        "right_ml": slopes_ml[1],
        "left_ml": slopes_ml[0],
        "noise_ml": float(best.noise),
        "noise_ratio": float(model.noise / best.noise),
        "tilt": (slopes[1] - slopes[0]) / 2,
        "tilt_ml": (slopes_ml[1] - slopes_ml[0]) / 2,
        "loss": float((best.log_prob_quadrature(held_out) - exact).mean()),
        "loss_train": float((best.log_prob(train_x) - model.log_prob(train_x)).mean()),
        "gap": float((exact - bound).mean()),
        "posterior_share": float(model.smaller_share(held_out).mean()),
        "chain_share": float(torch.minimum(right, 1 - right).mean()),
        "two_modes": float((model.count_modes(held_out[:500]) > 1).double().mean()),
    }
