"""Posteriors fitted to a decoder that stands still, so that methods of inference are compared and nothing else.

`Posterior` takes the decoder of a trained VAE. All pixels of an image may be seen, or its top left quarter alone: then
the other three quarters leave several answers open, and p(z | x) has several modes. With two latents everything about
it is known by quadrature: `truth`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from annealed_core.chain import Chain
from annealed_core.description import Check, Choice, Whole
from annealed_core.evidence import log_mean_weight
from annealed_core.flows import IAF
from annealed_core.judging.images import means_and_errors, slices
from annealed_core.judging.inference import kernels_at_work
from annealed_core.kernels import Gated, Residual
from annealed_core.objectives import AVO, ELBO, IWAE
from annealed_core.running.data import batches
from annealed_core.running.density import (
    Kernels,
    Objectives,
    built,
    check_objective,
    copied,
    of_draws_alone,
    short_name,
)
from annealed_core.running.experiment import Experiment, Problem, run
from annealed_core.running.mnist import Mnist, images
from annealed_core.schedules import Linear, Then, objective_at
from annealed_core.vae import VAE, Joint

#: The pixels of the top left quarter.
QUARTER = torch.arange(784).view(28, 28)[:14, :14].flatten()
#: Of the grid that a posterior over two latents is integrated on: it reaches so far, with so many points a side.
REACH, POINTS = 5.0, 201
#: What counts as a mode: its mass, and the nats between its peak and the pass to a higher one.
MASS, BARRIER = 0.1, 3.0
#: How many images with two modes or more the methods are judged on, of the first test images that have them.
TWO_MODES = 300
_VALID = 2000  # validation images of a history
_SAMPLES = {"all": 4, "quarter": 200}  # for each image, of the bounds


class _Vae(Check):
    takes = "an Mnist without a kernel"

    def __call__(self, value: Any) -> Any:
        return value if isinstance(value, Mnist) and value.kernel is None else None


class Posterior(Experiment):
    """A posterior fitted to a decoder that stands still.

    `metrics` of a run, on the test images, in nats: `elbo`, and its standard error over images; where kernels are,
    what they earn. Where a quarter is seen and there are two latents, of the first 300 images with two modes or more:
    `gap`, log p(x_seen) less the bound, which is the divergence of the chain's path from the posterior; `iw_gap`, that
    of the importance-weighted bound of all 200 samples; `mode_error`, the total variation between the modes' masses
    and their shares of the samples; and `gap_all`, the gap over all images up to the last of these.

    Attributes:
        model: the VAE whose decoder is taken.
        seen: "all" pixels of an image, or the top left "quarter".
        encoder: what sees the image, gives the base and the kernels' context: the model's own, "free" to learn or
            "frozen"; or a "fresh" one that learns.
        base: where the chain starts: from the "encoder"'s q_0(z | x), or the "prior".
        kernel, n_transitions, objective: as of `Mnist`.
        steps, batch: of training, and images in a step.
        seed, name, lr, lr_schedule, beta1, clip: see `Experiment`.
    """

    model: Annotated[Any, _Vae()] = Mnist()
    seen: Annotated[str, Choice("all", "quarter")] = "all"
    encoder: Annotated[str, Choice("free", "frozen", "fresh")] = "free"
    base: Annotated[str, Choice("encoder", "prior")] = "encoder"
    kernel: Kernels | None = None
    n_transitions: Annotated[int, Whole(0, 1000)] = 0
    objective: Objectives = ELBO()
    steps: Annotated[int, Whole(1)] = 4000
    batch: Annotated[int, Whole(2)] = 64
    lr_schedule: Annotated[str, Choice("constant", "cosine")] = "cosine"

    def check(self) -> None:
        """Refuse fields that do not fit each other."""
        super().check()
        if bool(self.n_transitions) != (self.kernel is not None):
            raise ValueError(f"impossible n_transitions {self.n_transitions} of Posterior with kernel {self.kernel!r}")
        if self.kernel is None and (self.encoder == "frozen" or self.base == "prior"):
            raise ValueError("impossible kernel None of Posterior: nothing would learn")
        check_objective(self.objective, self.n_transitions, self.steps)
        if of_draws_alone(self.objective):
            takes = "it takes many draws of one density, and not one of each image"
            raise ValueError(f"impossible objective {self.objective!r} of Posterior: {takes}")

    @property
    def label(self) -> str:
        """Such as posterior-gated-avo-s0."""
        kernel = "gaussian" if self.kernel is None else type(self.kernel).__name__.lower()
        return f"posterior-{self.seen}-{kernel}-{short_name(self.objective)}-s{self.seed}"

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> PosteriorProblem:
        """See `Experiment`; `compile` changes nothing."""
        (spec,) = specs
        return PosteriorProblem(spec, device)

    def network(self) -> Fitted:
        """Encoder and kernels, with weights drawn from torch's random state, and the model's decoder."""
        trained = decoder_of(self.model)
        found = Fitted(self.model.latents, self.model.width, self.base, self.seen)
        found.decoder.load_state_dict(trained.decoder.state_dict())
        if self.encoder != "fresh":
            found.encoder.load_state_dict(trained.encoder.state_dict())
        if self.seen == "quarter":
            found.decoder.outputs = _rows(found.decoder.outputs, QUARTER)
        found.decoder.requires_grad_(False)
        found.encoder.requires_grad_(self.encoder != "frozen")
        if self.kernel is not None:
            made = self.kernel.build(self.model.latents, self.n_transitions, self.model.width)
            found.kernels = nn.ModuleList(copied(made))
        return found

    def restore(self, weights: dict[str, Tensor], device: str = "cpu") -> tuple[nn.Module, None]:
        """See `Experiment`."""
        found = self.network()
        found.load_state_dict(weights)
        return found.to(device).eval().requires_grad_(False), None


@functools.cache
def decoder_of(model: Mnist) -> VAE:
    """The trained VAE, found in the store or trained."""
    return run(model).vae


def _rows(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    """The layer with some of its outputs."""
    found = nn.Linear(layer.in_features, len(rows))
    found.load_state_dict({"weight": layer.weight[rows], "bias": layer.bias[rows]})
    return found


class Fitted(VAE):
    """A `VAE` that may see a quarter of an image, with a decoder that is never in training mode."""

    mask: Tensor

    def __init__(self, latents: int, width: int, base: str, seen: str) -> None:
        super().__init__(latents, width, base=base)
        self.seen = QUARTER if seen == "quarter" else torch.arange(784)
        self.register_buffer("mask", one_hot(self.seen, 784).sum(0).float(), persistent=False)

    def train(self, mode: bool = True) -> Fitted:
        """As of every module; what doesn't learn stays in evaluation mode."""
        super().train(mode)
        for part in (self.encoder, self.decoder):
            part.train(mode and any(each.requires_grad for each in part.parameters()))
        return self

    def posterior(self, x: Tensor, generator: torch.Generator | None = None) -> Chain:
        """As of `VAE`; x: (batch, 784), of which the seen pixels count."""
        return super().posterior(x * self.mask, generator)

    def joint(self, x: Tensor) -> Joint:
        """As of `VAE`, of the seen pixels."""
        return Joint(self.decoder, x[:, self.seen], self.latents)


class PosteriorProblem(Problem):
    """One posterior on binarised MNIST."""

    def __init__(self, spec: Posterior, device: str = "cpu") -> None:
        self.spec, self.failures = spec, dict[int, str]()
        torch.manual_seed(spec.seed)
        self.images, self.valid, self.test = images(device)
        self.network = spec.network().to(device)
        self.objective, learned = built(spec.objective, len(self.network.kernels))
        self.module: nn.Module = nn.ModuleList([self.network, *learned]).to(device)
        self.steps, self.steps_per_record = spec.steps, max(1, spec.steps // 8)
        self.order, self.noise = (torch.Generator().manual_seed(1000 * spec.seed + which) for which in (3, 4))
        self._epoch: Iterator[Tensor] = iter(())
        self._recent: list[Tensor] = []

    def values(self, step: int) -> Tensor:
        """The mean objective of a batch of images, (1,)."""
        if step % self.steps_per_record == 0:  # where checkpoints are, and so a continued run finds the same batches
            self.network.train()
            self._epoch = self._batches()
        x = next(self._epoch)
        mean = self.network.objective(objective_at(self.objective, step), x, self.noise).mean().unsqueeze(0)
        self._recent.append(mean.detach())
        return mean

    def _batches(self) -> Iterator[Tensor]:
        while True:
            for x in batches(self.images, self.spec.batch, self.order):
                if len(x) == self.spec.batch:
                    yield x

    @torch.no_grad()
    def _bounds(self, x: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The mean and the log of the mean of the weights of each image, in nats: two of (n_images,)."""
        model, found = self.network.eval(), []
        for part in slices(len(x), samples):
            chain, joint = model.posterior(x[part], generator), model.joint(x[part])
            weights = chain.log_weight(joint, chain.rsample(samples)).double()
            found.append(torch.stack([weights.mean(0), log_mean_weight(weights)[0]]))
        mean, log_mean = torch.cat(found, 1)
        return mean, log_mean

    def record(self) -> list[dict[str, float]]:
        """The mean objective since the last line, and the bound of the validation images."""
        line = {"train_objective": float(torch.stack(self._recent).mean())}
        self._recent.clear()
        valid = self._bounds(self.valid[:_VALID], 1, torch.Generator().manual_seed(self.spec.seed))[0]
        return [line | {"elbo": float(valid.mean())}]

    def metrics(self) -> list[dict[str, Any]]:
        """See `Posterior`."""
        spec, generator = self.spec, torch.Generator().manual_seed(self.spec.seed + 1)
        samples = _SAMPLES["all"]
        bound, _ = self._bounds(self.test, samples, generator)
        found: dict[str, Any] = dict(means_and_errors(elbo=bound))
        if len(self.network.kernels):
            found |= kernels_at_work(self.network, self.test[:2000], samples, generator)
        if spec.seen == "quarter" and spec.model.latents == 2:
            found |= self._against_the_truth(generator)
        return [found]

    def _against_the_truth(self, generator: torch.Generator) -> dict[str, Any]:
        known, samples = truth(spec_of_truth(self.spec)), _SAMPLES["quarter"]
        some = torch.tensor(known.chosen)
        bound, weighted = self._bounds(self.test[some], samples, generator)
        first = self.test[: len(known.log_px)]
        bound_all, _ = self._bounds(first, 20, generator)
        log_px = known.log_px[some]
        errors = []
        for number, image in enumerate(known.chosen):
            z = self.network.posterior(self.test[[image]], generator).rsample(1000).z[-1, :, 0]
            shares = known.shares(number, z)
            errors.append(0.5 * (shares - known.masses[number]).abs().sum())
        return {
            **means_and_errors(gap=log_px - bound, iw_gap=log_px - weighted, mode_error=torch.stack(errors)),
            "gap_all": float((known.log_px - bound_all).mean()),
            "images": len(some),
        }

    def weights(self) -> list[dict[str, Tensor]]:
        """The weights as they are."""
        return [self.network.state_dict()]

    def state(self) -> dict[str, Any]:
        """See `Problem`."""
        return {"order": self.order.get_state(), "noise": self.noise.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        """See `Problem`."""
        self.order.set_state(state["order"])
        self.noise.set_state(state["noise"])


# ---- the truth of a posterior over two latents


@dataclass(frozen=True)
class Truth:
    """What is known of test images of which a quarter is seen.

    Attributes:
        log_px: log p(x_seen) in nats of the first test images, (n,).
        chosen: numbers of images with two modes or more.
        labels: of each chosen image, the mode that each point of the grid belongs to, (chosen, POINTS^2).
        masses: of its modes, with what belongs to none of them left in the largest; one tensor for each chosen image.
    """

    log_px: Tensor
    chosen: list[int]
    labels: Tensor
    masses: list[Tensor]

    def shares(self, number: int, z: Tensor) -> Tensor:
        """The shares of draws z (n, 2) in each mode of a chosen image."""
        place = ((z.double() + REACH) / (2 * REACH) * (POINTS - 1)).round().long().clamp(0, POINTS - 1)
        labels = self.labels[number][place[:, 0] * POINTS + place[:, 1]].long()
        return torch.bincount(labels, minlength=len(self.masses[number])).double() / len(z)


def grid() -> Tensor:
    """The points of the grid, (POINTS^2, 2), in double precision."""
    axis = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def spec_of_truth(spec: Posterior) -> Posterior:
    """A description that all posteriors with the same truth share."""
    return Posterior(model=spec.model, seen=spec.seen)


@functools.cache
@torch.no_grad()
def truth(spec: Posterior) -> Truth:
    """By quadrature on the grid, of the first test images until 300 of them have two modes; ValueError for fewer."""
    test, model, z = images()[2], spec.network().eval(), grid()
    logits = model.decoder(z.float().unsqueeze(1)).squeeze(1).double()
    constant = -softplus(logits).sum(1) - 0.5 * z.square().sum(1) - math.log(2 * math.pi)
    log_area = 2 * math.log(2 * REACH / (POINTS - 1))
    log_px, chosen, labels, masses = [], list[int](), [], []
    for part in slices(len(test), at_once=50):
        log_f = test[part][:, model.seen].double() @ logits.T + constant
        log_px.append(torch.logsumexp(log_f, 1) + log_area)
        for number, each in enumerate(log_f, part.start):
            found = modes(each.view(POINTS, POINTS))
            if found is not None and len(chosen) < TWO_MODES:
                chosen.append(number)
                labels.append(found[0].flatten().to(torch.uint8))
                masses.append(found[1])
        if len(chosen) == TWO_MODES:
            return Truth(torch.cat(log_px), chosen, torch.stack(labels), masses)
    raise ValueError(f"of {len(test)} images {len(chosen)} have two modes, and {TWO_MODES} are asked for")


def modes(log_f: Tensor) -> tuple[Tensor, Tensor] | None:
    """The modes of a density on a grid: label of each point, and the masses; None where there is one alone.

    Each point climbs to a peak. Peaks whose pass to a higher one lies less than BARRIER nats below them belong to that
    one; so do modes of less than MASS.
    """
    size = len(log_f)
    padded = torch.nn.functional.pad(log_f[None, None], (1, 1, 1, 1), value=-torch.inf)
    around = torch.nn.functional.unfold(padded, 3).squeeze(0)  # (9, size^2)
    rows, columns = torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij")
    steps = (rows * size + columns).flatten()
    up = torch.arange(size * size) + steps[around.argmax(0)]
    while not torch.equal(higher := up[up], up):
        up = higher
    peaks, basin = up.unique(return_inverse=True)
    values = log_f.flatten()
    mass = torch.zeros(len(peaks), dtype=torch.float64).index_add_(0, basin, torch.softmax(values, 0))
    owner = _merged(values[peaks], mass, _passes(values, basin, size))
    kept, label = owner.unique(return_inverse=True)
    if len(kept) < 2:
        return None
    return label[basin].view(size, size), torch.zeros(len(kept), dtype=torch.float64).index_add_(0, label, mass)


def _passes(values: Tensor, basin: Tensor, size: int) -> list[tuple[float, int, int]]:
    """The highest pass between each two basins that touch, highest first."""
    place, best = torch.arange(size * size).view(size, size), dict[tuple[int, int], float]()
    for a, b in ((place[:-1], place[1:]), (place[:, :-1], place[:, 1:])):
        a, b = a.flatten(), b.flatten()
        border = basin[a] != basin[b]
        a, b = a[border], b[border]
        heights = torch.minimum(values[a], values[b]).tolist()
        for one, other, height in zip(basin[a].tolist(), basin[b].tolist(), heights, strict=True):
            pair = min(one, other), max(one, other)
            best[pair] = max(height, best.get(pair, -math.inf))
    return sorted(((height, *pair) for pair, height in best.items()), reverse=True)


def _merged(peaks: Tensor, mass: Tensor, passes: list[tuple[float, int, int]]) -> Tensor:
    """To which basin each belongs in the end."""
    owner, weight = list(range(len(peaks))), mass.tolist()

    def find(each: int) -> int:
        while owner[each] != each:
            each = owner[each]
        return each

    for smallest in (False, True):  # first what has no barrier, then what has no mass
        for height, a, b in passes:
            low, high = sorted((find(a), find(b)), key=lambda each: float(peaks[each]))
            if low != high and (weight[low] < MASS if smallest else float(peaks[low]) - height < BARRIER):
                owner[low] = high
                weight[high] += weight[low]
    return torch.tensor([find(each) for each in range(len(peaks))])


# ---- the studies

_WARM_UP = Linear(0.2, 2e-4)
#: The VAEs whose decoders stand still: the one of the study `long`, and one with two latents.
VAE_40 = Mnist(objective=ELBO(_WARM_UP), epochs=200, batch=128, lr_schedule="cosine")
VAE_2 = VAE_40.replace(epochs=50, latents=2)
KERNELS = {
    "near the identity": Gated(hidden=40, start="identity"),
    "torch's weights": Gated(hidden=40),
    "residual": Residual(hidden=40),
}
OBJECTIVES = {"ELBO": ELBO(), "0.2 AVO": AVO(0.2), "AVO": AVO(), "AVO, then ELBO": Then(AVO(), ELBO(), switch=2000)}
SEEDS = range(5)


def posterior_alone() -> list[Posterior]:
    """Is AVO the better inference where the decoder stands still? Seed by seed, that each is a whole comparison."""
    lines: list[dict[str, Any]] = [{}]
    for encoder in ("free", "frozen"):
        chains = [(IAF(hidden=40), ELBO()), *itertools.product(KERNELS.values(), OBJECTIVES.values())]
        lines += [{"encoder": encoder, "kernel": k, "n_transitions": 5, "objective": o} for k, o in chains]
    return [Posterior(model=VAE_40, seed=seed, **fields) for seed in SEEDS for fields in lines]


def quarter() -> list[Posterior]:
    """Truly many modes, the truth known: two latents, of each digit the top left quarter seen."""
    lines: list[dict[str, Any]] = [{}, {"objective": IWAE(samples=8)}]
    for base, length, kernel in itertools.product(("encoder", "prior"), (5, 20), list(KERNELS.values())[1:]):
        if length == 5 or kernel == KERNELS["torch's weights"]:
            chain = {"base": base, "n_transitions": length, "kernel": kernel}
            lines += [{**chain, "objective": objective} for objective in (ELBO(), AVO())]
    lines += [{"base": base, "n_transitions": 5, "kernel": IAF(hidden=40)} for base in ("encoder", "prior")]
    shared: dict[str, Any] = {"model": VAE_2, "seen": "quarter", "encoder": "fresh"}
    return [Posterior(seed=seed, **shared, **fields) for seed in SEEDS for fields in lines]
