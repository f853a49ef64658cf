"""Problems: what an experiment consists of, and the one on MNIST.

Each builds models from specs, gives one objective a step, and judges the results. Toys are trained many at a time
(`toys.Toys`), auto-encoders one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from annealed_core import data, evidence, objectives
from annealed_core.kernels import GatedGaussianPair
from annealed_core.schedules import SCHEDULES
from annealed_core.spec import Spec
from annealed_core.targets import linear_alphas
from annealed_core.vae import VAE

BINARISATION_SEED = 20_181  # of the validation and test images, the same for every run


class Problem(Protocol):
    """M models trained side by side, each by its own spec."""

    specs: list[Spec]

    @property
    def model(self) -> nn.Module:
        """What is trained: the weights of all models."""
        ...

    @property
    def failures(self) -> dict[int, str]:
        """Models whose training failed, and one line on why."""
        ...

    steps: int
    steps_per_record: int

    def objective(self, step: int) -> Tensor:
        """The objective of each model at that step, to be maximised: (M,), in nats."""
        ...

    def record(self) -> list[dict[str, float]]:
        """A line of each model's history."""
        ...

    def metrics(self) -> list[dict[str, Any]]:
        """Each model's final figures."""
        ...

    def weights(self) -> list[dict[str, Tensor]]:
        """Each model's own weights."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights, optimiser and random state."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take a state that `state` gave."""
        ...


@functools.cache
def _images(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Training images as they are, validation and test images binarised once for all runs."""
    train, valid, test = data.load_mnist()
    fixed = [data.fixed_binarisation(part.images, BINARISATION_SEED + n) for n, part in enumerate((valid, test))]
    return train.images.to(device), fixed[0].to(device), fixed[1].to(device)


def auto_encoder(spec: Spec) -> VAE:
    """The untrained model of an MNIST run, with weights drawn from torch's random state."""
    latents, width = spec.get("latents"), spec.get("width")
    # Encoder and decoder are drawn before the kernels: methods with the same seed share their initial weights.
    model = VAE(latents, width)
    identity = spec.initialisation == "identity"
    model.kernels = nn.ModuleList(
        GatedGaussianPair(latents, spec.get("hidden"), width, identity) for _ in range(spec.n_transitions or 0)
    )
    return model


class Mnist:
    """A variational auto-encoder on binarised MNIST, with the best validation bound kept."""

    def __init__(self, specs: Sequence[Spec], device: str = "cpu") -> None:
        (spec,) = specs
        self.specs, self.spec, self.failures = [spec], spec, dict[int, str]()
        torch.manual_seed(spec.seed)
        train, self.valid, self.test = _images(device)
        self.train = train[: spec.train_images]
        self.model = auto_encoder(spec).to(device)
        batch = spec.get("batch")
        self.steps_per_record = -(-len(self.train) // batch)
        self.steps: int = self.steps_per_record * spec.get("epochs")
        self.beta = _schedule(spec)
        self.alphas = linear_alphas(len(self.model.kernels)) if spec.method == "avo" else torch.zeros(0)
        # Of the data's order and binarisation alone, so that all methods with the same seed see the same batches.
        self.generator = torch.Generator().manual_seed(spec.seed + 2**32)
        self.best: dict[str, Any] = {"elbo": -float("inf"), "epoch": 0, "weights": {}}
        self._epoch: Iterator[Tensor] = iter(())
        self._recent: list[Tensor] = []
        self._step = 0

    def objective(self, step: int) -> Tensor:
        if step % self.steps_per_record == 0:
            self.model.train()
            self._epoch = data.batches(self.train, self.spec.get("batch"), self.generator)
        x = next(self._epoch)
        beta = self.beta(step)
        chain, joint = self.model.posterior(x), self.model.joint(x)
        if self.spec.method == "avo":
            values = objectives.calibrated_avo(chain, joint, self.alphas, self.spec.get("avo_weight"), beta)
        else:
            values = objectives.beta_elbo(chain, joint, beta)
        mean = values.mean().unsqueeze(0)
        self._recent.append(mean.detach())
        self._step = step
        return mean

    @torch.no_grad()
    def _bound(self, images: Tensor) -> dict[str, float]:
        """Bound, its reconstruction term and the KL between, averaged over images with one sample each, at beta = 1."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        for x in images.split(1000):
            chain, joint = self.model.posterior(x), self.model.joint(x)
            trajectory = chain.rsample()
            reconstruction = joint.log_likelihood(trajectory.z[-1])
            elbo = reconstruction + joint.log_prior(trajectory.z[-1]) + trajectory.log_ratios.sum(0) - trajectory.log_q0
            totals += torch.stack([elbo.double().sum(), reconstruction.double().sum()]).cpu()
        elbo_mean, reconstruction_mean = (totals / len(images)).tolist()
        return {"elbo": elbo_mean, "reconstruction": reconstruction_mean, "kl": reconstruction_mean - elbo_mean}

    def record(self) -> list[dict[str, float]]:
        epoch = (self._step + 1) // self.steps_per_record
        line = {
            "epoch": epoch,
            "beta": self.beta(self._step),
            "train_objective": float(torch.stack(self._recent).mean()),
        }
        self._recent.clear()
        line |= self._bound(self.valid)
        if line["elbo"] > self.best["elbo"]:
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best = {"elbo": line["elbo"], "epoch": epoch, "weights": weights}
        return [line]

    @torch.no_grad()
    def metrics(self) -> list[dict[str, Any]]:
        torch.manual_seed(self.spec.seed + 1)
        self.model.eval()
        self.model.load_state_dict(self.best["weights"])
        found: dict[str, Any] = {
            "best_epoch": self.best["epoch"],
            "valid_elbo": self.best["elbo"],
            **self._bound(self.test),
        }
        images, n_samples = self.test[: self.spec.nll_images], self.spec.get("nll_samples")
        log_px, ess = [], []
        for x in images.split(100):
            log_weights = evidence.importance_sampling(self.model.posterior(x), self.model.joint(x), n_samples)
            log_px.append(evidence.log_mean_weight(log_weights)[0])
            ess.append(evidence.effective_sample_size(log_weights))
        nll = -torch.cat(log_px).double()
        found |= {
            "nll": float(nll.mean()),
            "nll_se": float(nll.std() / len(nll) ** 0.5) if len(nll) > 1 else None,
            "nll_samples": n_samples,
            "nll_images": len(nll),
            "ess": float(torch.cat(ess).mean()),
        }
        return [found]

    def weights(self) -> list[dict[str, Tensor]]:
        return [self.model.state_dict()]

    def state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "best": self.best}

    def load(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.best = state["best"]
        self._recent.clear()


def _schedule(spec: Spec) -> Callable[[int], float]:
    make = SCHEDULES[spec.get("schedule")]
    return make() if spec.schedule == "constant" else make(spec.beta0, spec.gamma)
