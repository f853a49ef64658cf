"""Why warm-up helps: a VAE on MNIST whose latents are followed through training, and the study of it.

Without warm-up the KL term pays at once, while the decoder has not yet learned what a latent is good for: most latents
are drawn to the prior in the first steps, and few come back (Sønderby et al. 2016, arXiv 1602.02282).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from annealed_core.running.mnist import Mnist, MnistProblem

IMAGES = 500  # validation images over which a latent's KL is averaged
#: When latents are looked at: often at first.
STEPS = (0, 10, 20, 30, 50, 70, *range(100, 1000, 50), *range(1000, 3131, 100))


class Followed(Mnist):
    """A plain VAE of which only this is judged: the KL of each latent to its prior as training goes on, in nats.

    `metrics` of a run: `steps`, `latent_kl`, at each of these steps that of every latent averaged over validation
    images, in the latents' order; `valid_elbo` and `best_epoch`, as for `Mnist`. Trained as such a run is.
    """

    def check(self) -> None:
        """Refuse kernels: with them a latent has no KL of its own."""
        super().check()
        if self.kernel is not None:
            raise ValueError("impossible kernel of Followed: the latents of a plain VAE are followed")

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> FollowedProblem:
        """See `Experiment`; `compile` changes nothing."""
        (spec,) = specs
        return FollowedProblem(spec, device)


class FollowedProblem(MnistProblem):
    """One auto-encoder, its latents looked at between steps."""

    def __init__(self, spec: Followed, device: str = "cpu") -> None:
        super().__init__(spec, device)
        self.seen: dict[int, list[float]] = {}

    def values(self, step: int) -> Tensor:
        """The mean objective of a batch of images, (1,)."""
        if step in STEPS:
            self.seen[step] = self._latent_kl()
        return super().values(step)

    @torch.no_grad()
    def _latent_kl(self) -> list[float]:
        """Of each latent, in evaluation mode; it draws nothing, so that training goes on as if it were not."""
        training = self.network.training
        q = self.network.eval().posterior(self.valid[:IMAGES]).base
        kl = 0.5 * (q.loc.square() + q.scale.square() - 1) - q.scale.log()
        self.network.train(training)
        return [round(value, 4) for value in kl.mean(0).tolist()]

    def metrics(self) -> list[dict[str, Any]]:
        """What `Followed` describes."""
        if self.failures:
            return [{}]
        seen = self.seen | {self.steps: self._latent_kl()}
        found = {"valid_elbo": self.best["elbo"], "best_epoch": self.best["epoch"]}
        return [found | {"steps": sorted(seen), "latent_kl": [seen[step] for step in sorted(seen)]}]

    def state(self) -> dict[str, Any]:
        """See `Problem`."""
        return super().state() | {"seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        """See `Problem`."""
        super().load(state)
        self.seen = state["seen"]
