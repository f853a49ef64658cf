"""Problems: what an experiment consists of.

Each builds its model from a spec, gives one objective a step, and judges the result.
A problem has `model` (what is trained and saved), `steps`, `steps_per_record`, `objective(step)` -> per-sample values
to be maximised, `record()` -> a line of the history, `metrics()` -> the final figures, and `state()`/`load(state)`
for what else a checkpoint needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from annealed_core import data, evidence, objectives
from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair
from annealed_core.schedules import SCHEDULES
from annealed_core.spec import Spec
from annealed_core.targets import check_target, linear_alphas
from annealed_core.vae import VAE

BINARISATION_SEED = 20_181  # of the validation and test images, the same for every run


class Problem(Protocol):
    """See the module's docstring."""

    @property
    def model(self) -> nn.Module:
        """What is trained and saved."""
        ...

    steps: int
    steps_per_record: int

    def objective(self, step: int) -> Tensor:
        """Per-sample values to be maximised at that step, in nats."""
        ...

    def record(self) -> dict[str, float]:
        """A line of the history."""
        ...

    def metrics(self) -> dict[str, Any]:
        """The final figures."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights, optimiser and random state."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take a state that `state` gave."""
        ...


def _kernels(spec: Spec, dim: int, context_dim: int = 0) -> nn.ModuleList:
    n_transitions, hidden = spec.n_transitions or 0, spec.hidden or 1
    identity = spec.initialisation == "identity"
    return nn.ModuleList(GatedGaussianPair(dim, hidden, context_dim, identity) for _ in range(n_transitions))


class Toy:
    """A chain of kernels trained on one target, from N(0, base_scale^2 I)."""

    def __init__(self, spec: Spec, device: str = "cpu") -> None:
        self.spec, self.target = spec, spec.target_object
        check_target(self.target, device)
        self.model = _kernels(spec, self.target.dim).to(device)
        base = DiagonalGaussian.isotropic(self.target.dim, getattr(self.target, "base_scale", 1.0))
        base = DiagonalGaussian(base.loc.to(device), base.scale.to(device))
        self.chain = Chain(base, self.model)
        self.steps = spec.steps or 1
        self.steps_per_record = max(1, min(self.steps, 250))
        self.alphas = linear_alphas(len(self.chain)).to(device) if len(self.chain) else torch.zeros(0)
        self._recent: list[Tensor] = []

    def objective(self, step: int) -> Tensor:
        batch = self.spec.batch or 1
        if self.spec.method == "avo":
            values = objectives.avo(self.chain, self.target, self.alphas, sample_shape=batch)
        else:
            values = objectives.elbo(self.chain, self.target, sample_shape=batch)
        self._recent.append(values.detach().mean())
        return values

    def record(self) -> dict[str, float]:
        mean = float(torch.stack(self._recent).mean())
        self._recent.clear()
        return {"elbo": mean}

    @torch.no_grad()
    def metrics(self) -> dict[str, Any]:
        n = self.spec.samples or 2
        trajectory = self.chain.rsample(n)
        z, log_weights = trajectory.z[-1], self.chain.log_weight(self.target, trajectory)
        log_z, log_z_se = evidence.log_mean_weight(log_weights)
        found: dict[str, Any] = {
            "elbo": float(log_weights.mean()),
            "log_z": float(log_z),
            "log_z_se": float(log_z_se),
            "ess": float(evidence.effective_sample_size(log_weights)),
            "total_variation": evidence.total_variation(z, self.target) if self.target.dim == 2 else None,
            "mode_masses": None,
            "mode_shares": None,
        }
        modes = getattr(self.target, "modes", None)
        if modes is not None:
            found["mode_masses"] = evidence.mode_masses(z, modes[0], log_weights).tolist()
            found["mode_shares"] = evidence.mode_masses(z, modes[0]).tolist()
        return found

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        self._recent.clear()


@functools.cache
def _images(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Training images as they are, validation and test images binarised once for all runs."""
    train, valid, test = data.load_mnist()
    fixed = [data.fixed_binarisation(part.images, BINARISATION_SEED + n) for n, part in enumerate((valid, test))]
    return train.images.to(device), fixed[0].to(device), fixed[1].to(device)


class Mnist:
    """A variational auto-encoder on binarised MNIST, with the best validation bound kept."""

    def __init__(self, spec: Spec, device: str = "cpu") -> None:
        self.spec = spec
        train, self.valid, self.test = _images(device)
        self.train = train[: spec.train_images]
        # Encoder and decoder are drawn before the kernels: methods with the same seed share their initial weights.
        self.model: VAE = VAE(spec.latents or 1, spec.width or 1)
        self.model.kernels = _kernels(spec, spec.latents or 1, spec.width or 1)
        self.model.to(device)
        batch = spec.batch or 2
        self.steps_per_record = -(-len(self.train) // batch)
        self.steps = self.steps_per_record * (spec.epochs or 1)
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
            self._epoch = data.batches(self.train, self.spec.batch or 2, self.generator)
        x = next(self._epoch)
        beta = self.beta(step)
        chain, joint = self.model.posterior(x), self.model.joint(x)
        if self.spec.method == "avo":
            values = objectives.calibrated_avo(chain, joint, self.alphas, self.spec.avo_weight or 0.0, beta)
        else:
            values = objectives.beta_elbo(chain, joint, beta)
        self._recent.append(values.detach().mean())
        self._step = step
        return values

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

    def record(self) -> dict[str, float]:
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
        return line

    @torch.no_grad()
    def metrics(self) -> dict[str, Any]:
        self.model.load_state_dict(self.best["weights"])
        found: dict[str, Any] = {
            "best_epoch": self.best["epoch"],
            "valid_elbo": self.best["elbo"],
            **self._bound(self.test),
        }
        images, n_samples = self.test[: self.spec.nll_images], self.spec.nll_samples or 2
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
        return found

    def state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "best": self.best}

    def load(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.best = state["best"]
        self._recent.clear()


def _schedule(spec: Spec) -> Callable[[int], float]:
    make = SCHEDULES[spec.schedule or "constant"]
    return make() if spec.schedule == "constant" else make(spec.beta0, spec.gamma)


PROBLEMS: dict[str, Callable[..., Problem]] = {"toy": Toy, "mnist": Mnist}
