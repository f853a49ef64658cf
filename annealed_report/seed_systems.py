"""The other systems that the seed names, each as a part: its study, and what it claims.

Iterative inference on a decoder that stands still, and trained with one; variants of the bound, on digits and on
sprites whose factors are known; cycles of beta against restarts of the learning rate; locally masked convolutions with
latents and without. Of one core they take about 2, 1.5, half an hour and, measured while others worked, 5.5 hours.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch

from annealed_core.decoders import Autoregressive, LocallyMasked
from annealed_core.description import Whole
from annealed_core.judging.images import means_and_errors
from annealed_core.judging.inference import inference_gaps
from annealed_core.objectives import ELBO, IWAE
from annealed_core.running.experiment import Experiment
from annealed_core.running.mnist import Mnist
from annealed_core.schedules import Between, Cyclical, Geometric, Linear
from annealed_core.vae import IterativeVAE
from annealed_core.variants import MIWAE, BetaELBO, BetaTC, CapacityELBO, FreeBits, JointCapacity, Relaxed
from annealed_report.comparison import paired, select
from annealed_report.posterior import Fitted, Posterior, PosteriorProblem
from annealed_report.sprites import Sprites
from annealed_report.statistics import Interval, paired_difference
from annealed_report.varied import Varied

if TYPE_CHECKING:
    from annealed_report.claims import Claim, Contrast

# ---- iterative inference

ITERATIONS, GAP_IMAGES, GAP_STEPS, STAGE_IMAGES = 5, 200, 500, 1000
#: Of an iteration one draw gives the gradient by lambda and one the bound, so that an encoder has as many draws a step.
SAMPLES = 2 * ITERATIONS
#: The VAE whose decoder stands still.
TRAINED = Mnist(objective=ELBO(Linear(0.2, 4e-4)), batch=128, epochs=50, lr_schedule="cosine")


class _Refined(Fitted, IterativeVAE):
    """Iterative inference with a decoder that stands still."""


class Amortised(Posterior):
    """A fresh encoder for a decoder that stands still, or iterative inference.

    Beside the metrics of `Posterior` there are, in nats, `best_elbo`, of the best Gaussian for each of 200 test images,
    and `amortisation`, what the encoder's lacks of it; and of iterative inference `stage_elbos`, the bound after each
    iteration, of 1,000 test images with ten draws, the same in each.

    Attributes:
        iterations: how often the base is refined; 0 for an encoder that gives it at once.
    """

    iterations: Annotated[int, Whole(0, 100)] = 0

    @property
    def label(self) -> str:
        """Such as amortised-5-elbo-s0."""
        return f"amortised-{self.iterations}-{super().label.partition('gaussian-')[2]}"

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> AmortisedProblem:
        """See `Experiment`."""
        (spec,) = specs
        return AmortisedProblem(spec, device)

    def network(self) -> Fitted:
        """As of `Posterior`, with a refiner in the encoder's place where there are iterations."""
        found = super().network()
        if self.iterations:
            refined = _Refined(self.model.latents, self.model.width, self.base, self.seen)
            refined.iterations, refined.decoder = self.iterations, found.decoder
            return refined
        return found


class AmortisedProblem(PosteriorProblem):
    """One encoder, of either kind."""

    def metrics(self) -> list[dict[str, Any]]:
        """See `Amortised`."""
        (found,) = super().metrics()
        spec, network = cast(Amortised, self.spec), cast(Any, self.network.eval())
        x, generator = self.test[:GAP_IMAGES], torch.Generator().manual_seed(spec.seed + 2)
        known = {"not asked for": torch.zeros(len(x))}
        gaps = inference_gaps(network, x, GAP_STEPS, n_samples=1000, log_px=known, generator=generator)
        found |= means_and_errors(best_elbo=gaps.best_bound, amortisation=gaps.amortisation)
        if spec.iterations:
            x, joint = self.test[:STAGE_IMAGES], network.joint(self.test[:STAGE_IMAGES])
            with torch.no_grad():
                chains = network.stages(x, generator)
                noise = chains[0].noise(10)
                found["stage_elbos"] = [float(ELBO()(chain, joint, noise=noise).mean()) for chain in chains]
        return [found]


def refined() -> list[Experiment]:
    """Encoder and iterative inference, with equal steps and draws: the decoder fixed, and trained together with it."""
    fixed: dict[str, Any] = {"model": TRAINED, "encoder": "fresh", "steps": 10_000}
    both: dict[str, Any] = {"epochs": 10, "nll_samples": 500, "nll_images": 2000, "lr_schedule": "cosine"}
    beta, found = Linear(0.2, 2e-4), list[Experiment]()
    for seed in range(3):
        found += [Amortised(seed=seed, objective=MIWAE(1, 1.0, SAMPLES), **fixed)]
        found += [Amortised(seed=seed, iterations=ITERATIONS, **fixed)]
        found += [Mnist(seed=seed, objective=MIWAE(1, beta, SAMPLES), **both)]
        found += [Mnist(seed=seed, iterations=ITERATIONS, objective=ELBO(beta), **both)]
    return found


# ---- variants of the bound

STEPS = 3130
RISE = Linear(0.0, 2 / STEPS)
FALL = Geometric(0.0, 4 / STEPS)  # to a fiftieth of the way that is left
#: What VAEs are trained by; those with categories have 10 of 10 values beside 20 Gaussian latents, or 20 alone.
VARIANTS: dict[str, Any] = {
    "ELBO": ELBO(),
    "warm-up": ELBO(RISE),
    "beta 4": BetaELBO(4.0),
    "beta to 4": BetaELBO(Between(0, 4, RISE)),
    "capacity": CapacityELBO(25.0, RISE),
    "beta-TC 6": BetaTC(),
    "beta-TC to 6": BetaTC(correlation=Between(1, 6, RISE)),
    "beta-TC 6, dimension-wise rising": BetaTC(dimensionwise=RISE),
    "IWAE, 16": IWAE(16),
    "MIWAE, 4 x 4": MIWAE(4, 1.0, 4),
}
CATEGORIES: dict[str, tuple[dict[str, Any], Any]] = {
    "categories, temperature 1": ({"latents": 0, "groups": 20}, Relaxed(ELBO(), 1.0)),
    "categories, temperature 1 to .3": ({"latents": 0, "groups": 20}, Relaxed(ELBO(), Between(1, 0.3, FALL))),
    "two capacities": ({"latents": 20, "groups": 10}, Relaxed(JointCapacity(15, 10, RISE), Between(1, 0.3, FALL))),
}


def variants() -> list[Varied]:
    """Each variant on digits: ten epochs of 20,000, its likelihood, KL term and active units."""
    shared: dict[str, Any] = {"train_images": 20_000, "epochs": 10, "nll_images": 2000, "nll_samples": 500}
    lines: list[Any] = [({}, objective) for objective in VARIANTS.values()] + list(CATEGORIES.values())
    return [Varied(seed=seed, objective=o, **fields, **shared) for seed in range(3) for fields, o in lines]


#: Of the sprites: eight latents, or six and a group of three for the shape.
_SPRITES: dict[str, Any] = {"latents": 8, "width": 200, "epochs": 110, "nll_images": 300, "nll_samples": 100}
DISENTANGLING = [name for name in VARIANTS if "IWAE" not in name]


def disentangling() -> list[Sprites]:
    """What each variant does to the mutual information gap, on sprites."""
    lines: list[Any] = [({}, VARIANTS[name]) for name in DISENTANGLING]
    lines += [({"latents": 6, "groups": 1, "categories": 3}, CATEGORIES["two capacities"][1])]
    return [Sprites(seed=seed, objective=o, **{**_SPRITES, **fields}) for seed in range(5) for fields, o in lines]


# ---- cycles of beta, and restarts of the learning rate

RATES: dict[str, Any] = {"constant": "constant", "restarts": Between(1, 0, Cyclical(STEPS, 4, 1.0, "cosine"))}
STARTS = (0.1, 0.0)  # of beta in the code of Fu et al. 2019, and in their paper


def rises(start: float) -> dict[str, Any]:
    """One rise over a quarter of training, as published, and four cycles that rise over half of each."""
    once = Linear(start, (1 - start) * 4 / STEPS)
    return {"one rise": ELBO(once), "four cycles": ELBO(Cyclical(STEPS, 4, 0.5, "linear", start))}


def restarts() -> list[Mnist]:
    """Is it the cycles or the restarts? Two by two, from either start, with a decoder that can do without latents."""
    shared: dict[str, Any] = {"train_images": 20_000, "epochs": 10, "nll_images": 5000, "width": 200}
    cases = itertools.product(range(5), STARTS, ("one rise", "four cycles"), RATES.values())
    return [
        Mnist(seed=seed, decoder=Autoregressive(), objective=rises(start)[rise], lr_schedule=rate, **shared)
        for seed, start, rise, rate in cases
    ]


# ---- locally masked convolutions

_CONVOLVED: dict[str, Any] = {"lr": 3e-3, "lr_schedule": "cosine"}
#: What a VAE with such a decoder is trained by.
KEPT: dict[str, Any] = {
    "no annealing": ELBO(),
    "warm-up": ELBO(Linear(0.0, 1 / 940)),
    "free bits": FreeBits(10.0),
}


def convolved() -> list[Mnist]:
    """Without latents, along 1, 2 and 8 orders, at equal steps: the likelihood of the mean over orders."""
    return [
        Mnist(seed=seed, latents=0, objective=ELBO(), decoder=LocallyMasked(16, 6, orders), epochs=4, **_CONVOLVED)
        for seed in range(3)
        for orders in (1, 2, 8)
    ]


def convolved_latents() -> list[Mnist]:
    """With latents, along one order, by which it is asked whether annealing or free bits keep them in use."""
    shared: dict[str, Any] = {"train_images": 20_000, "epochs": 6, "latents": 10, "nll_images": 500, "nll_samples": 100}
    decoder = LocallyMasked(8, 4, orders=1)
    return [
        Mnist(seed=seed, objective=objective, decoder=decoder, **shared, **_CONVOLVED)
        for seed in range(3)
        for objective in KEPT.values()
    ]


STUDIES = (refined, variants, disentangling, restarts, convolved, convolved_latents)

# ---- the claims, written before any of it is run


def _closed(runs: Sequence[Any]) -> Interval | None:
    """The share of the encoder's amortisation gap that is closed, less a half: in units of the gap, seed by seed."""
    by_kind = [select(runs, model=TRAINED, iterations=n) for n in (0, ITERATIONS)]
    if not all(by_kind):
        return None
    gaps = [[run.metrics["amortisation"] for run in kind] for kind in by_kind]
    return paired_difference([1 - ours / theirs for theirs, ours in zip(*gaps, strict=True)], [0.5] * len(gaps[0]))


def _with(metric: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Contrast:
    return lambda runs: paired(select(runs, **ours), select(runs, **theirs), metric)


def _variant(metric: str, ours: str, theirs: str = "ELBO") -> Contrast:
    """Between two variants, with or without categories."""

    def fields(name: str) -> dict[str, Any]:
        return {"objective": VARIANTS[name] if name in VARIANTS else CATEGORIES[name][1]}

    return _with(metric, fields(ours), fields(theirs))


def effect(runs: Iterable[Any], start: float, of: str, metric: str = "kl") -> Interval | None:
    """The main effect of cycles, or of restarts, seed by seed: the mean over the two levels of the other."""
    every, once = list(runs), list(RATES.values())

    def mean(rise: Sequence[str], rates: Sequence[Any]) -> list[float]:
        cells = [select(every, objective=rises(start)[name], lr_schedule=rate) for name in rise for rate in rates]
        return [statistics.fmean(run.metrics[metric] for run in seed) for seed in zip(*cells, strict=True)]

    both = list(rises(start))
    if of == "cycles":
        sides = mean(both[1:], once), mean(both[:1], once)
    else:
        sides = mean(both, once[1:]), mean(both, once[:1])
    return paired_difference(*sides) if all(sides) else None


def claims() -> list[Claim]:
    """What these studies decide; contrasts, signs and smallest effects."""
    from annealed_report.claims import Claim

    iterative, bound, cyclical, conv = (
        f"10_other_systems#{section}"
        for section in ("Iterative inference", "Variants of the bound", "Cycles or restarts", "Masked convolutions")
    )
    together = {"iterations": ITERATIONS, "epochs": 10}, {"iterations": 0, "epochs": 10}
    with_free, with_rise, plain = ({"objective": KEPT[n]} for n in ("free bits", "warm-up", "no annealing"))
    orders = {n: {"decoder": LocallyMasked(16, 6, n)} for n in (1, 2, 8)}
    falling = _variant("nll", "categories, temperature 1 to .3", "categories, temperature 1")
    found = [
        Claim(
            "Iterative inference closes at least half of the amortisation gap (decoder fixed, equal steps and draws; "
            "share closed − 1/2)",
            *("refined", _closed, 1, 0.0, iterative),
        ),
        Claim(
            "… and a model trained with it is better (NLL, iterative − encoder, ten epochs)",
            *("refined", _with("nll", *together), -1, 0.2, iterative),
        ),
        Claim(
            "MIWAE's groups cost likelihood (NLL, 4 x 4 − IWAE of 16)",
            *("variants", _variant("nll", "MIWAE, 4 x 4", "IWAE, 16"), 1, 0.1, bound),
        ),
        Claim(
            "A temperature that falls helps categorical latents (NLL, 1 to .3 − 1)",
            *("variants", falling, -1, 0.5, bound),
        ),
        Claim(
            "A weight of 6 on total correlation costs digits likelihood (NLL, beta-TC − ELBO)",
            *("variants", _variant("nll", "beta-TC 6"), 1, 0.5, bound),
        ),
        Claim(
            "… and annealing it costs less (NLL, rising from 1 to 6 − 6 throughout)",
            *("variants", _variant("nll", "beta-TC to 6", "beta-TC 6"), -1, 0.2, bound),
        ),
        *(
            Claim(
                f"Sprites: {name} disentangles (mutual information gap, {name} − ELBO)",
                *("disentangling", _variant("gap", name), 1, 0.05, bound),
            )
            for name in ("beta 4", "capacity", "beta-TC 6", "two capacities")
        ),
    ]
    for start, of in itertools.product(STARTS, ("cycles", "restarts")):
        against = ", against one rise over a quarter of training" if of == "cycles" else ""
        said = f"Autoregressive decoder, beta from {start:g}: {of} keep more in the latents (KL, main effect{against})"
        contrast = functools.partial(effect, start=start, of=of)
        hoped = "hoped for" if of == "cycles" else "–"
        found.append(Claim(said, "restarts", contrast, 1, 0.5, cyclical, earlier=hoped))
    found += [
        Claim(
            "Locally masked convolutions: the mean of eight orders beats one order, at equal steps (NLL, 8 − 1)",
            *("convolved", _with("nll", orders[8], orders[1]), -1, 0.2, conv),
        ),
        Claim(
            "… and so does that of two (NLL, 2 − 1)",
            *("convolved", _with("nll", orders[2], orders[1]), -1, 0.2, conv),
        ),
        Claim(
            "With a convolutional decoder, a rise of beta keeps latents in use (KL, warm-up − none)",
            *("convolved_latents", _with("kl", with_rise, plain), 1, 0.5, conv),
        ),
        Claim(
            "… so do free bits (KL, ten nats free − none)",
            *("convolved_latents", _with("kl", with_free, plain), 1, 0.5, conv),
        ),
        Claim(
            "… and latents in use help the likelihood (NLL, ten nats free − none)",
            *("convolved_latents", _with("nll", with_free, plain), -1, 0.2, conv),
        ),
    ]
    return found
