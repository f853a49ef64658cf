"""MNIST: a variational auto-encoder of any method, trained on binarised images and judged by its likelihood."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from annealed_core import data, exploration, inference, likelihood, objectives
from annealed_core.earlier import faulty_avo
from annealed_core.flows import HouseholderSequence, InverseAutoregressive, Planar
from annealed_core.folded import mean_and_error, part_of
from annealed_core.kernels import GatedGaussianPair
from annealed_core.likelihood import importance_sampling
from annealed_core.paths import LearnedPath
from annealed_core.spec import Spec
from annealed_core.targets import geometric_alphas, linear_alphas
from annealed_core.vae import VAE, with_frozen_kernels

BINARISATION_SEED = 20_181  # of the validation and test images, the same for every run
_DATA_SEED = 0x5EED_DA7A  # turns the seed of a run into that of its data, another stream than its weights'
_AVO_COIN_SEED = 20_182  # which steps of a random mixture are AVO's: the same ones for all runs
#: The likelihood of a few validation images, followed through training: every so many epochs, with so many samples.
FOLLOWED_EPOCHS, FOLLOWED_IMAGES, FOLLOWED_SAMPLES = 5, 500, 100
GREY_SAMPLES = 100
VALID_IMAGES, VALID_SAMPLES = 2000, 100  # of the likelihood by which settings can be told apart without the test images
#: Images of a batch, and draws for each, that teach the path in a step. With few draws one outweighs the others and
#: what the later steps of the path do goes unseen: from a base far from its target, in 40 dimensions, the exponents are
#: off by up to 0.18 with 8 draws and 0.09 with 256.
PATH_IMAGES, PATH_SAMPLES = 1, 256
#: How the few images of `bounds` are annealed: from the posterior's base, from which the path is shorter than from the
#: prior; but from the prior where that is the base, or flows carry the posterior far from it.
ANNEALING: dict[str, Any] = {"start": "posterior", "n_particles": 8, "n_temperatures": 300}
ANNEALING_FROM_PRIOR: dict[str, Any] = {"start": "prior", "n_particles": 8, "n_temperatures": 500}


@functools.cache
def images(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Training images as they are (uint8), validation and test images binarised once for all runs (float)."""
    train, valid, test = data.load_mnist()
    fixed = [data.fixed_binarisation(part.images, BINARISATION_SEED + n) for n, part in enumerate((valid, test))]
    return train.images.to(device), fixed[0].to(device), fixed[1].to(device)


@functools.cache
def grey_images(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Validation and test images as grey values from 0 to 1: of those there is no likelihood."""
    _, valid, test = data.load_mnist()
    return valid.images.to(device).float() / 255, test.images.to(device).float() / 255


def auto_encoder(spec: Spec) -> VAE:
    """The untrained model of an MNIST run, with weights drawn from torch's random state."""
    latents, width, length = spec.get("latents"), spec.get("width"), spec.n_transitions or 0
    # Encoder and decoder are drawn before the kernels: methods with the same seed share their initial weights.
    model = VAE(latents, width, (), spec.get("layers"), spec.base == "prior", spec.get("decoder"))
    found: list[nn.Module] = []
    if spec.method == "planar":
        found = [Planar(latents, width) for _ in range(length)]
    elif spec.method == "householder" and length:
        found = [HouseholderSequence(latents, length, width)]
    elif spec.method == "iaf":
        hidden = (spec.get("hidden"),) * 2
        found = [InverseAutoregressive(latents, hidden, t % 2 == 1, width) for t in range(length)]
    elif length:
        identity = spec.initialisation == "identity"
        found = [GatedGaussianPair(latents, spec.get("hidden"), width, identity) for _ in range(length)]
    model.kernels = nn.ModuleList(found)
    return model


def bounds(model: VAE, x: Tensor) -> dict[str, float]:
    """What is known of the likelihood of a few images (n, 784) from both sides, and what the posterior loses, in nats.

    Annealed importance sampling, and importance sampling with 5,000 samples from the posterior and from a proposal that
    is fitted to each image, of the same images; the bidirectional sandwich on as many images that the model draws; the
    approximation and the amortisation gap.
    """
    near = not model.from_prior and all(isinstance(kernel, GatedGaussianPair) for kernel in model.kernels)
    annealing = ANNEALING if near else ANNEALING_FROM_PRIOR
    weighed, annealed = importance_sampling(model, x, 5000), likelihood.ais(model, x, **annealing)
    sandwich = likelihood.bdmc(model, len(x), **annealing)
    gaps = inference.inference_gaps(model, x, log_px={"importance sampling": weighed.log_px, "ais": annealed.log_px})
    adapted = likelihood.adaptive_importance_sampling(model, x, 5000)
    (is_nll, is_se), (ais_nll, ais_se), (differs, differs_se), (adapted_nll, adapted_se), (fits, fits_se) = (
        mean_and_error(values)
        for values in (
            -weighed.log_px,
            -annealed.log_px,
            weighed.log_px - annealed.log_px,
            -adapted.log_px,
            adapted.log_px - annealed.log_px,
        )
    )
    return {
        "bounds_images": len(x),
        "is_nll": is_nll,
        "is_nll_se": is_se,
        "ais_nll": ais_nll,
        "ais_nll_se": ais_se,
        "is_minus_ais": differs,
        "is_minus_ais_se": differs_se,
        "adaptive_nll": adapted_nll,
        "adaptive_nll_se": adapted_se,
        "adaptive_minus_ais": fits,
        "adaptive_minus_ais_se": fits_se,
        "adaptive_pareto_k": float(adapted.pareto_k.median()),
        "bdmc_lower": float(sandwich.lower.double().mean()),
        "bdmc_upper": float(sandwich.upper.double().mean()),
        "bdmc_gap": sandwich.gap,
        "bdmc_gap_se": sandwich.gap_se,
        "approximation_gap": gaps.approximation,
        "approximation_gap_se": gaps.approximation_se,
        "amortisation_gap": gaps.amortisation,
        "amortisation_gap_se": gaps.amortisation_se,
    }


class Mnist:
    """A variational auto-encoder on binarised MNIST, with the best validation bound kept."""

    def __init__(self, specs: Sequence[Spec], device: str = "cpu") -> None:
        (spec,) = specs
        self.specs, self.spec, self.failures = [spec], spec, dict[int, str]()
        self.faults: tuple[str, ...] = spec.faults or ()
        torch.manual_seed(spec.seed)
        train, self.valid, self.test = images(device)
        self.grey = grey_images(device) if "grey" in self.faults else None
        self.train = train[: spec.train_images]
        self.network = auto_encoder(spec).to(device)
        self.average: AveragedModel | None = None
        if spec.get("ema"):
            self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(spec.get("ema")))
            self.average.requires_grad_(False)
        self.path: LearnedPath | None = None
        if spec.method in ("avo", "mixture"):
            spaced = geometric_alphas if spec.path == "geometric" else linear_alphas
            self._spaced = spaced(len(self.network.kernels)).to(device)
            self.path = LearnedPath(self._spaced, 1).to(device) if spec.path == "learned" else None
        # Together, so that all are in a checkpoint; the average has no gradients.
        self.model = nn.ModuleList(m for m in (self.network, self.average, self.path) if m is not None)
        batch = spec.get("batch")
        self.steps_per_record = -(-len(self.train) // batch)
        self.steps: int = self.steps_per_record * spec.get("epochs")
        self.beta = spec.annealing
        coins = torch.rand(self.steps, generator=torch.Generator().manual_seed(_AVO_COIN_SEED))
        self._is_avo = (coins < (spec.avo_weight or 0)).tolist() if spec.method == "mixture" else []
        # Of the data's order and binarisation alone, so that all methods with the same seed see the same batches.
        self.generator = torch.Generator().manual_seed(spec.seed ^ _DATA_SEED)
        self.best: dict[str, Any] = {"elbo": -float("inf"), "epoch": 0, "weights": {}}
        self._epoch: Iterator[Tensor] = iter(())
        self._recent: list[Tensor] = []
        self._step = 0

    @property
    def judged(self) -> VAE:
        """The model whose figures count: the moving average of the weights where there is one."""
        return self.network if self.average is None else cast(VAE, self.average.module)

    def objective(self, step: int) -> Tensor:
        if self.average is not None and step % self.steps_per_record:  # else `record` has done it
            self.average.update_parameters(self.network)  # with the weights of the step before
        if step % self.steps_per_record == 0:
            self.network.train()
            shuffled, binary = "unshuffled" not in self.faults, "grey" not in self.faults
            self._epoch = data.batches(self.train, self.spec.get("batch"), self.generator, shuffled, binary)
        mean = self._values(next(self._epoch), step).mean().unsqueeze(0)
        self._recent.append(mean.detach())
        self._step = step
        return mean

    def _values(self, x: Tensor, step: int) -> Tensor:
        """The objective for each image of a batch, (batch,)."""
        spec, beta, joint = self.spec, self.beta(step), self.network.joint(x)
        if spec.anneals == "alpha":
            return objectives.alpha_elbo(self.network.posterior(x), joint, beta)
        if spec.anneals == "capacity":
            return objectives.capacity_elbo(self.network.posterior(x), joint, beta * spec.get("capacity"))
        if spec.method == "iwae":
            groups = objectives.beta_elbo(self.network.posterior(x), joint, beta, spec.get("iwae_samples"))
            return torch.logsumexp(groups, 0) - math.log(spec.get("iwae_samples"))
        if spec.method == "mixture":
            chain = self.network.posterior(x)
            return self._avo(chain, joint, beta) if self._is_avo[step] else objectives.beta_elbo(chain, joint, beta)
        weight = spec.get("avo_weight") if spec.method == "avo" else 0.0
        chain = self.network.posterior(x)
        if weight == 0:
            return objectives.beta_elbo(chain, joint, beta)
        noise = chain.noise()
        # The ELBO first: it updates the decoder's batch statistics, and AVO's backward pass must find those it used.
        if weight == 1:  # the ELBO then trains encoder and decoder alone
            whole = objectives.beta_elbo(with_frozen_kernels(chain), joint, beta, noise=noise)
            return whole + self._avo(chain, joint, beta, noise)
        if self.faults:
            whole = objectives.beta_elbo(chain, joint, beta, noise=noise)
            return weight * self._avo(chain, joint, beta, noise) + (1 - weight) * whole
        values = objectives.calibrated_avo(chain, joint, self.alphas.detach(), weight, beta, noise=noise)
        return values + weight * self._learning_path(chain, joint)

    @property
    def alphas(self) -> Tensor:
        """The path's exponents, (T + 1,)."""
        if self.path is None:
            return self._spaced
        alphas = self.path().squeeze(-1)
        return torch.where(alphas.isfinite(), alphas, self._spaced)  # of a run that fails: it is found at the record

    def _avo(self, chain: Any, joint: Any, beta: float, noise: Tensor | None = None) -> Tensor:
        alphas = self.alphas.detach()
        if self.faults:
            return faulty_avo(chain, joint, alphas, beta, self.faults, noise) + self._learning_path(chain, joint)
        return objectives.avo(chain, joint, alphas, beta, noise=noise) + self._learning_path(chain, joint)

    def _learning_path(self, chain: Any, joint: Any) -> Tensor | float:
        """What teaches the path, if it learns: 0, with a gradient."""
        if self.path is None:
            return 0.0
        fit = self._path_fit(chain, joint, self.alphas)
        return fit - fit.detach()

    def _path_fit(self, chain: Any, joint: Any, alphas: Tensor) -> Tensor:
        """What teaches the path, from some draws for the first few images: (), with beta at 1 and no other gradient."""
        images = slice(0, PATH_IMAGES)
        few = type(joint)(joint.decoder, joint.x[images], joint.dim).frozen()
        return objectives.path_fit(part_of(chain.detach(), images), few, alphas, PATH_SAMPLES).mean()

    @torch.no_grad()
    def _refresh_statistics(self, model: VAE) -> None:
        """Averaged weights have other batch statistics than those they are the average of: take them anew."""
        layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over all that follows
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(self.spec.seed)
            for x in data.batches(self.train, 500, torch.Generator().manual_seed(self.spec.seed)) if layers else ():
                model.joint(x).log_likelihood(model.posterior(x).rsample().z[-1])
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum

    @torch.no_grad()
    def _bound(self, x: Tensor) -> dict[str, float]:
        """Bound, its reconstruction term and the KL between, averaged over images with one sample each, at beta = 1."""
        model = self.judged.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        for some in x.split(1000):
            chain, joint = model.posterior(some), model.joint(some)
            trajectory = chain.rsample()
            reconstruction = joint.log_likelihood(trajectory.z[-1])
            elbo = reconstruction + joint.log_prior(trajectory.z[-1]) + trajectory.log_ratios.sum(0) - trajectory.log_q0
            totals += torch.stack([elbo.double().sum(), reconstruction.double().sum()]).cpu()
        elbo_mean, reconstruction_mean = (totals / len(x)).tolist()
        return {"elbo": elbo_mean, "reconstruction": reconstruction_mean, "kl": reconstruction_mean - elbo_mean}

    def record(self) -> list[dict[str, float]]:
        epoch = (self._step + 1) // self.steps_per_record
        line = {
            "epoch": epoch,
            "beta": self.beta(self._step),
            "train_objective": float(torch.stack(self._recent).mean()),
        }
        self._recent.clear()
        if self.average is not None:
            self.average.update_parameters(self.network)
            self._refresh_statistics(self.judged)
        line |= self._bound(self.valid if self.grey is None else self.grey[0])
        if epoch % FOLLOWED_EPOCHS == 0:
            followed = importance_sampling(self.judged.eval(), self.valid[:FOLLOWED_IMAGES], FOLLOWED_SAMPLES)
            line["nll"] = -float(followed.log_px.double().mean())
        if line["elbo"] > self.best["elbo"] or "unshuffled" in self.faults:
            weights = {name: value.detach().clone() for name, value in self.judged.state_dict().items()}
            self.best = {"elbo": line["elbo"], "epoch": epoch, "weights": weights}
            if self.path is not None:
                self.best["alphas"] = self.alphas.tolist()
        return [line]

    def metrics(self) -> list[dict[str, Any]]:
        if self.failures:
            return [{}]
        torch.manual_seed(self.spec.seed + 1)
        self.judged.load_state_dict(self.best["weights"])
        found: dict[str, Any] = {
            "best_epoch": self.best["epoch"],
            "valid_elbo": self.best["elbo"],
            **self._bound(self.test),
        }
        model, images = self.judged.eval(), self.test[: self.spec.get("nll_images")]
        if self.path is not None:
            found["alphas"] = self.best["alphas"]
        estimates = importance_sampling(model, images, self.spec.get("nll_samples"))
        nll, nll_se = mean_and_error(-estimates.log_px)
        found |= {
            "nll": nll,
            "nll_se": nll_se if len(images) > 1 else None,
            "nll_samples": self.spec.get("nll_samples"),
            "nll_images": len(images),
            "ess": float(estimates.ess.mean()),
            "pareto_k": None if estimates.pareto_k.isnan().any() else float(estimates.pareto_k.median()),
            "active_units": inference.active_units(model, images[:1000])[0] if len(images) > 1 else None,
        }
        if (
            self.spec.decoder == "independent"
        ):  # what the earlier report called a likelihood, with its number of samples
            grey = grey_images(str(self.test.device))[1][: len(images)]
            found["grey_nll"] = -float(importance_sampling(model, grey, GREY_SAMPLES).log_px.double().mean())
        followed = importance_sampling(model, self.valid[:VALID_IMAGES], VALID_SAMPLES)
        found["valid_nll"], found["valid_nll_se"] = mean_and_error(-followed.log_px)
        if self.spec.explored_images:
            found |= self._explored(model)
        return [found | (bounds(model, self.test[: self.spec.get("bounds_images")]) if self.spec.bounds_images else {})]

    def _explored(self, model: VAE) -> dict[str, Any]:
        """How much the posterior explores.

        An autoregressive decoder draws binary images, which are held against binary ones.
        """
        real = grey_images(str(self.test.device))[1] if self.spec.decoder == "independent" else self.test
        digits = data.load_mnist()[2].labels
        return exploration.explore(model, self.test, real, digits, self.spec.get("explored_images"))

    def weights(self) -> list[dict[str, Tensor]]:
        return [self.judged.state_dict()]

    def state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "best": self.best, "failures": self.failures}

    def load(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.best, self.failures = state["best"], state["failures"]
        self._recent.clear()
