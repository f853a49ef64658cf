"""`Mnist`: a variational auto-encoder of any kind, trained on binarised images and judged by its likelihood."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Self

import torch
from torch import Tensor, nn

from annealed_core.description import Boolean, Calls, Choice, Size, Whole, own_objects
from annealed_core.judging import exploration, inference
from annealed_core.judging.images import mean_and_error
from annealed_core.judging.likelihood import importance_sampling
from annealed_core.objectives import ELBO
from annealed_core.running import data
from annealed_core.running.density import (
    Kernels,
    Objectives,
    built,
    check_objective,
    copied,
    of_draws_alone,
    path_of,
    recorded,
    says,
    short_name,
)
from annealed_core.running.experiment import Experiment, Problem
from annealed_core.running.watch import check_kernels
from annealed_core.schedules import Linear, objective_at, value_at
from annealed_core.vae import VAE, Independent, IterativeVAE
from annealed_core.variants import MixedVAE

BINARISATION_SEED = 20_181  # of the validation and test images, the same for every run
_DATA_SEED = 0x5EED_DA7A  # turns the seed of a run into that of its data, another stream than its weights'
#: The likelihood of a few validation images, followed through training: every so many epochs, with so many samples.
FOLLOWED_EPOCHS, FOLLOWED_IMAGES, FOLLOWED_SAMPLES = 5, 500, 100
GREY_SAMPLES = 100
VALID_IMAGES, VALID_SAMPLES = 2000, 100  # at most, of the likelihood that tells settings apart without the test images
KERNEL_IMAGES = 1000  # over which it is measured what the kernels earn


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


class Mnist(Experiment):
    """A variational auto-encoder on MNIST; the weights with the best validation bound are kept.

    Attributes:
        kernel: the description of the kernels between encoder and decoder, or an object with `build(dim, n,
            context_dim)`; None for the plain VAE.
        n_transitions: T, the number of kernels: 5 unless told, 0 without a kernel.
        objective: what is maximised.
        epochs, batch: passes over the training images, and images in a step.
        latents, width: dimensions of z, and units of each hidden layer of encoder and decoder. 0 latents where the
            decoder does without, as `LocallyMasked` can: the bound is the likelihood.
        groups, categories: how many categorical latents there are beside, of how many values each; see
            `variants.MixedVAE`.
        decoder: the description of the decoder.
        base: where the chain starts: from the "encoder"'s q_0(z | x), or the "prior".
        iterations: how often that base is refined by the gradient of the bound, see `vae`; 0 for an encoder that
            gives it at once.
        shuffled: without it the images come in the same order in every epoch, and the last weights are kept.
        grey: train and select on grey pixels, of which a Bernoulli decoder gives no likelihood: to show what that does.
        train_images: how many of the 50,000 training images are used.
        nll_samples, nll_images: importance samples for each image, and how many test images, for the likelihood.
        bounds_images, annealed_images: test images whose likelihood is taken from fitted proposals, and how many of
            them also from both sides.
        explored_images: test images over which it is measured how much the posterior explores, see `exploration`.
        seed, name, lr, lr_schedule, beta1, clip: see `Experiment`.
    """

    kernel: Kernels | None = None
    n_transitions: Annotated[int, Whole(0, 1000)] | None = None
    objective: Objectives = ELBO(beta=Linear(0.2, 2e-4))
    epochs: Annotated[int, Whole(1, 100_000)] = 25
    batch: Annotated[int, Whole(2)] = 64
    latents: Annotated[int, Whole(0)] = 40
    groups: Annotated[int, Whole(0)] = 0
    categories: Annotated[int, Whole(2)] = 10
    width: Size = 300
    decoder: Annotated[Any, Calls("a description such as Independent(), or an object with build", "build")] = (
        Independent()
    )
    base: Annotated[str, Choice("encoder", "prior")] = "encoder"
    iterations: Annotated[int, Whole(0, 100)] = 0
    shuffled: Boolean = True
    grey: Boolean = False
    train_images: Annotated[int, Whole(2, 50_000)] = 50_000
    nll_samples: Annotated[int, Whole(2)] = 100
    nll_images: Annotated[int, Whole(1, 10_000)] = 10_000
    bounds_images: Annotated[int, Whole(2, 10_000, or_zero=True)] = 0
    annealed_images: Annotated[int, Whole(2, 10_000, or_zero=True)] = 100
    explored_images: Annotated[int, Whole(10, 2000, or_zero=True)] = 0

    def check(self) -> None:
        """Refuse fields that do not fit each other."""
        super().check()
        if self.n_transitions is None:
            object.__setattr__(self, "n_transitions", 0 if self.kernel is None else 5)
        if bool(self.n_transitions) != (self.kernel is not None):
            takes = "0 without a kernel" if self.kernel is None else "at least 1 with a kernel"
            raise ValueError(f"impossible n_transitions {self.n_transitions} of Mnist: n_transitions takes {takes}")
        if self.iterations and (self.base == "prior" or getattr(self.kernel, "sees_target", False)):
            raise ValueError(f"impossible iterations {self.iterations} of Mnist: what is refined is an encoder's base")
        if self.base == "prior" and self.kernel is None:
            raise ValueError("impossible base 'prior' of Mnist: it takes a kernel, which alone would see the image")
        if not self.latents and not self.groups and not getattr(self.decoder, "without_latents", False):
            raise ValueError(f"impossible latents 0 of Mnist: {self.decoder!r} takes at least 1")
        if not self.latents or self.groups:
            for name in ("n_transitions", "iterations", "bounds_images", "explored_images"):
                if value := getattr(self, name):
                    said = f"latents {self.latents} and groups {self.groups}"
                    raise ValueError(f"impossible {name} {value} of Mnist with {said}: {name} takes 0")
        if of_draws_alone(self.objective):
            takes = "it takes many draws of one density, as Density has them, and not one of each image"
            raise ValueError(f"impossible objective {self.objective!r} of Mnist: {takes}")
        if bool(self.groups) != says(self.objective, "mixed"):
            takes = "an objective such as Relaxed()" if self.groups else "groups of 1 or more"
            raise ValueError(f"impossible groups {self.groups} of Mnist with {self.objective!r}: it takes {takes}")
        if self.train_images % self.batch == 1:
            alone = f"the last of {self.train_images} images would be alone in its batch"
            raise ValueError(f"impossible batch {self.batch}: {alone}, which batch normalisation can't take")
        if self.explored_images and 10 * self.latents > 10_000:
            raise ValueError(f"impossible latents {self.latents}: with explored_images, latents takes at most 1,000")
        check_objective(self.objective, self.n_transitions or 0, self.n_steps)

    def replace(self, **changes: Any) -> Self:
        """As of every description; where a kernel comes or goes, `n_transitions` is what it is by default."""
        if (changes.get("kernel", self.kernel) is None) != (self.kernel is None):
            changes.setdefault("n_transitions", None)
        return super().replace(**changes)

    @property
    def n_steps(self) -> int:
        """How many steps training takes."""
        return self.epochs * -(-self.train_images // self.batch)

    @property
    def label(self) -> str:
        """Such as mnist-gated-avo-s0."""
        kernel = "vae" if self.kernel is None else type(self.kernel).__name__.lower()
        return f"mnist-{kernel}-{short_name(self.objective)}-s{self.seed}"

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> MnistProblem:
        """See `Experiment`; `compile` changes nothing."""
        (spec,) = specs
        return MnistProblem(spec, device)

    def auto_encoder(self) -> VAE:
        """The untrained model, with weights drawn from torch's random state."""
        # Encoder and decoder are drawn before the kernels: methods with the same seed share their initial weights.
        if self.groups:
            return MixedVAE(self.latents, self.groups, self.categories, self.width, self.decoder)
        if self.iterations:
            model: VAE = IterativeVAE(self.latents, self.width, (), self.decoder, iterations=self.iterations)
        else:
            model = VAE(self.latents, self.width, (), self.decoder, self.base)
        if self.kernel is not None:
            model.kernels = nn.ModuleList(copied(self.kernel.build(self.latents, self.n_transitions, self.width)))
        return model

    def restore(self, weights: dict[str, Tensor], device: str = "cpu") -> tuple[nn.Module, None]:
        """See `Experiment`."""
        model = self.auto_encoder()
        model.load_state_dict(weights)
        return model.to(device).eval().requires_grad_(False), None


class MnistProblem(Problem):
    """One auto-encoder on binarised MNIST."""

    def __init__(self, spec: Mnist, device: str = "cpu") -> None:
        self.spec, self.failures = spec, dict[int, str]()
        torch.manual_seed(spec.seed)
        train, self.valid, self.test = self.images(device)
        self.train = train[: spec.train_images]
        network = spec.auto_encoder()
        if own_objects(spec.kernel):
            check_kernels(list(network.kernels), spec.n_transitions or 0, spec.latents, torch.ones(4, spec.width))
        self.network = network.to(device)
        self.objective, learned = built(spec.objective, len(self.network.kernels))
        self.module: nn.Module = nn.ModuleList([self.network, *learned]).to(device)
        self.steps_per_record = -(-len(self.train) // spec.batch)
        self.steps = spec.n_steps
        # Of the data's order and binarisation alone, so that all methods with the same seed see the same batches.
        self.generator = torch.Generator().manual_seed(spec.seed ^ _DATA_SEED)
        self.noise = torch.Generator()
        self.noise.set_state(torch.get_rng_state())  # it goes on where the weights' draws ended
        self.best: dict[str, Any] = {"elbo": -float("inf"), "epoch": 0, "weights": {}}
        self._epoch: Iterator[Tensor] = iter(())
        self._recent: list[Tensor] = []
        self._step = 0

    def images(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """See the function of that name."""
        return images(device)

    def values(self, step: int) -> Tensor:
        """The mean objective of a batch of images, (1,)."""
        spec = self.spec
        if step % self.steps_per_record == 0:
            self.network.train()
            self._epoch = data.batches(self.train, spec.batch, self.generator, spec.shuffled, not spec.grey)
        x = next(self._epoch)
        mean = self.network.objective(objective_at(self.objective, step), x, self.noise).mean().unsqueeze(0)
        self._recent.append(mean.detach())
        self._step = step
        return mean

    @torch.no_grad()
    def _bound(self, x: Tensor, generator: torch.Generator) -> dict[str, float]:
        """Bound, its reconstruction term and the KL between, averaged over images with one sample each, at beta = 1."""
        model = self.network.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        for some in x.split(1000):
            chain, joint = model.posterior(some, generator), model.joint(some)
            trajectory = chain.rsample()
            reconstruction = joint.log_likelihood(trajectory.z[-1])
            elbo = reconstruction + joint.log_prior(trajectory.z[-1]) + trajectory.log_ratios.sum(0) - trajectory.log_q0
            totals += torch.stack([elbo.double().sum(), reconstruction.double().sum()]).cpu()
        elbo_mean, reconstruction_mean = (totals / len(x)).tolist()
        return {"elbo": elbo_mean, "reconstruction": reconstruction_mean, "kl": reconstruction_mean - elbo_mean}

    def _samples(self, wanted: int) -> int:
        """How many are drawn for each image: without latents all are alike."""
        return wanted if self.network.latents else 1

    def record(self) -> list[dict[str, float]]:
        """The mean objective of an epoch, and what the validation images say."""
        epoch = (self._step + 1) // self.steps_per_record
        annealed = recorded(objective_at(self.objective, self._step))
        line = {"epoch": epoch, **{name: value_at(each, self._step) for name, each in annealed.items()}}
        line["train_objective"] = float(torch.stack(self._recent).mean())
        self._recent.clear()
        line |= self._bound(self.valid if not self.spec.grey else grey_images(str(self.valid.device))[0], self.noise)
        if epoch % FOLLOWED_EPOCHS == 0:
            model = self.network.eval()
            some, samples = self.valid[:FOLLOWED_IMAGES], self._samples(FOLLOWED_SAMPLES)
            followed = importance_sampling(model, some, samples, generator=self.noise)
            line["nll"] = -float(followed.log_px.double().mean())
        if line["elbo"] > self.best["elbo"] or not self.spec.shuffled:
            weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
            self.best = {"elbo": line["elbo"], "epoch": epoch, "weights": weights}
            path = path_of(self.objective)
            if isinstance(path, nn.Module):
                self.best["alphas"] = path(len(self.network.kernels)).tolist()
        return [line]

    def metrics(self) -> list[dict[str, Any]]:
        """The figures of the weights that are kept, on the test images unless their name says otherwise."""
        if self.failures:
            return [{}]
        spec, generator = self.spec, torch.Generator().manual_seed(self.spec.seed + 1)
        self.network.load_state_dict(self.best["weights"])
        model, some = self.network.eval(), self.test[: spec.nll_images]
        found = {"best_epoch": self.best["epoch"], "valid_elbo": self.best["elbo"], **self._bound(self.test, generator)}
        if "alphas" in self.best:
            found["alphas"] = self.best["alphas"]
        estimates = importance_sampling(model, some, self._samples(spec.nll_samples), generator=generator)
        nll, nll_se = mean_and_error(-estimates.log_px)
        found |= {"nll": nll, "nll_se": nll_se, "nll_samples": spec.nll_samples, "nll_images": len(some)}
        found["ess"] = float(estimates.ess.mean())
        found["pareto_k"] = None if estimates.pareto_k.isnan().any() else float(estimates.pareto_k.median())
        if not model.latents:
            found["active_units"] = 0
        elif len(some) > 1:
            found["active_units"], _ = inference.active_units(model, some[:1000], generator=generator)
        else:
            found |= {"nll_se": None, "active_units": None}
        is_independent, grey = isinstance(spec.decoder, Independent), grey_images(str(self.test.device))[1]
        if is_independent:  # what the earlier report called a likelihood, with its number of samples
            looked_at = importance_sampling(model, grey[: len(some)], GREY_SAMPLES, generator=generator)
            found["grey_nll"] = -float(looked_at.log_px.double().mean())
        some, samples = self.valid[: min(VALID_IMAGES, max(2, spec.nll_images))], self._samples(VALID_SAMPLES)
        followed = importance_sampling(model, some, samples, generator=generator)
        found["valid_nll"], found["valid_nll_se"] = mean_and_error(-followed.log_px)
        if len(model.kernels):
            found |= inference.kernels_at_work(model, self.test[:KERNEL_IMAGES], generator=generator)
        if spec.explored_images:  # an autoregressive decoder draws binary images, which are held against binary ones
            real, digits = grey if is_independent else self.test, data.load_mnist()[2].labels
            found |= exploration.explore(model, self.test, real, digits, spec.explored_images, generator=generator)
        if spec.bounds_images:
            some = self.test[: spec.bounds_images]
            found |= inference.bounds(model, some, spec.annealed_images, generator)
        return [found]

    def weights(self) -> list[dict[str, Tensor]]:
        """Those that are kept, once training is done."""
        return [self.best["weights"] or self.network.state_dict()]

    def state(self) -> dict[str, Any]:
        """See `Problem`."""
        generators = {"data": self.generator.get_state(), "noise": self.noise.get_state()}
        return {**generators, "best": self.best, "failures": self.failures}

    def load(self, state: dict[str, Any]) -> None:
        """See `Problem`."""
        self.generator.set_state(state["data"])
        self.noise.set_state(state["noise"])
        self.best, self.failures = state["best"], state["failures"]
        self._recent.clear()
