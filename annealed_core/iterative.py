"""Iterative inference: the chain's base refined by a network that sees the gradient of the bound (Marino et al. 2018).

    vae = IterativeVAE(40, 300, iterations=5)
    vae.posterior(x)                # a chain whose base was refined five times; kernels may follow
    vae.stages(x)                   # the chain after each iteration

lambda = (mu, log sigma^2) starts at the prior, and an iteration takes it to g * lambda + (1 - g) * f, with f and the
gate g from x, lambda, and the gradient of the bound by lambda, as its logarithm and its sign (arXiv 1807.09356, and the
published code of its authors). The bound is that of the whole chain, kernels included, at the decoder as it stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian
from annealed_core.objectives import ELBO
from annealed_core.vae import PIXELS, VAE, Joint

LARGEST_LOG_VARIANCE = 15.0


class Refiner(nn.Module):
    """The network of an iteration.

    Args:
        latents: dimensions of z.
        width: units of each of its two hidden layers.
        pixels: of an image.
    """

    def __init__(self, latents: int, width: int, pixels: int = PIXELS) -> None:
        super().__init__()
        inputs = pixels + 6 * latents
        self.features = nn.Sequential(nn.Linear(inputs, width), nn.ELU(), nn.Linear(width, width), nn.ELU())
        self.outputs = nn.Linear(width, 4 * latents)

    def forward(self, x: Tensor, lam: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """X (batch, pixels), lambda and its gradient (batch, 2 latents) -> the next lambda, features (batch, width)."""
        given = [x - 0.5, lam, (gradient.abs() + 1e-5).log(), gradient.sign()]
        features = self.features(torch.cat(given, -1))
        fresh, gate = self.outputs(features).chunk(2, -1)
        keep = torch.sigmoid(gate)
        loc, log_variance = (keep * lam.detach() + (1 - keep) * fresh).chunk(2, -1)
        limit = LARGEST_LOG_VARIANCE
        return torch.cat([loc, log_variance.clamp(-limit, limit)], -1), features


class IterativeVAE(VAE):
    """A `VAE` whose encoder is a `Refiner`.

    Args:
        latents, width, given: as of `VAE`.
        iterations: how often the base is refined, at least once.
        samples: draws that the gradient by lambda is the mean over.
    """

    def __init__(
        self, latents: int, width: int, *given: Any, iterations: int = 5, samples: int = 1, **more: Any
    ) -> None:
        super().__init__(latents, width, *given, **more)
        if iterations < 1:
            raise ValueError(f"impossible iterations {iterations}: at least 1")
        self.iterations, self.samples = iterations, samples
        self.encoder: Any = Refiner(latents, width)

    def _chain(self, lam: Tensor, features: Tensor, generator: torch.Generator | None) -> Chain:
        loc, log_variance = lam.chunk(2, -1)
        return Chain(DiagonalGaussian(loc, (0.5 * log_variance).exp()), self.kernels, features, generator)

    def _slope(self, lam: Tensor, features: Tensor, joint: Joint, generator: torch.Generator | None) -> Tensor:
        """The gradient of the bound by lambda, of each image; nothing learns from how it came about."""
        with torch.enable_grad():
            point = lam.detach().requires_grad_()
            chain = self._chain(point, features.detach(), generator)
            value = ELBO()(chain, joint, (self.samples,)).sum() / self.samples
            (slope,) = torch.autograd.grad(value, point)
        return slope

    def stages(self, x: Tensor, generator: torch.Generator | None = None) -> list[Chain]:
        """The posterior after each iteration; x: (batch, 784) in {0, 1}."""
        joint, chains = self.joint(x).frozen(), []
        lam = x.new_zeros(len(x), 2 * self.latents)
        features = x.new_zeros(len(x), self.encoder.outputs.in_features)
        for _ in range(self.iterations):
            lam, features = self.encoder(x, lam, self._slope(lam, features, joint, generator))
            chains.append(self._chain(lam, features, generator))
        return chains

    def posterior(self, x: Tensor, generator: torch.Generator | None = None) -> Chain:
        """As of `VAE`: the last stage."""
        return self.stages(x, generator)[-1]

    def objective(self, objective: Any, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As of `VAE`; encoder and kernels learn by the mean over all stages, the decoder by the last."""
        chains, joint = self.stages(x, generator), self.joint(x)
        frozen = joint.frozen()
        whole = torch.stack([objective(chain, frozen, ()) for chain in chains]).mean(0)
        decoded: Tensor = objective(chains[-1].detach().freeze(), joint, ())
        return whole + decoded - decoded.detach()
