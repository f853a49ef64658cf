"""Auto-encoders trained by a variant of the bound: judged as they end, with their KL term split in three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from annealed_core.judging.likelihood import importance_sampling
from annealed_core.kernels import DiagonalGaussian
from annealed_core.running.mnist import Mnist, MnistProblem
from annealed_core.variants import tc_terms

PART_IMAGES = 1000


class Varied(Mnist):
    """An `Mnist` whose last weights are kept, since the bound on validation images is not what a variant is after.

    Where all latents are Gaussian, `metrics` has beside those of `Mnist` the parts of the KL term in nats,
    `information`, `correlation` and `dimensionwise` as of `tc_terms`, with q(z) of the first 1,000 test images: the
    information is at most log 1000 = 6.9. Where there is an `adaptive_nll` of a few test images, `adaptive_nll_all`
    is it and what all `nll_images` have more on average, by importance sampling of both.
    """

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> VariedProblem:
        """See `Experiment`."""
        (spec,) = specs
        return VariedProblem(spec, device)


class VariedProblem(MnistProblem):
    """One such auto-encoder."""

    def record(self) -> list[dict[str, float]]:
        """As of `MnistProblem`; the newest weights take the place of those before."""
        self.best["elbo"] = -float("inf")
        return super().record()

    @torch.no_grad()
    def metrics(self) -> list[dict[str, Any]]:
        """See `Varied`."""
        (found,) = super().metrics()
        x = self.test[:PART_IMAGES]
        base = self.network.posterior(x).base
        if found and isinstance(base, DiagonalGaussian):
            noise = torch.randn(base.loc.shape, generator=torch.Generator().manual_seed(self.spec.seed + 2)).to(x)
            parts = tc_terms(base, noise, self.network.joint(x).log_prior(base.rsample(noise)))
            names = ("information", "correlation", "dimensionwise")
            found |= {name: float(each.double().mean()) for name, each in zip(names, parts, strict=True)}
        if found and (images := self.spec.bounds_images):
            generator = torch.Generator().manual_seed(self.spec.seed + 3)
            some = importance_sampling(self.network, self.test[:images], self.spec.nll_samples, generator)
            found["adaptive_nll_all"] = found["adaptive_nll"] + found["nll"] + float(some.log_px.double().mean())
        return [found]
