"""A variational auto-encoder as a chain weighed against a target.

For each image x the encoder gives the chain's base q_0(z | x) and a context for its kernels; prior and decoder give
the target log p(x, z). Two hidden layers with LeakyReLU and batch normalisation, as in the earlier report.

The decoder is what a description's `build(latents, width)` makes: `Independent()` takes the pixels as independent given
z, those of `decoders` each as dependent on the pixels before it.

Iterative inference (Marino et al. 2018) refines the base by a network that sees the gradient of the bound:

    vae = IterativeVAE(40, 300, iterations=5)
    vae.posterior(x)                # a chain whose base was refined five times; kernels may follow
    vae.stages(x)                   # the chain after each iteration

lambda = (mu, log sigma^2) starts at the prior, and an iteration takes it to g * lambda + (1 - g) * f, with f and the
gate g from x, lambda, and the gradient of the bound by lambda, as its logarithm and its sign (arXiv 1807.09356, and the
published code of its authors). The bound is that of the whole chain, kernels included, at the decoder as it stands.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from annealed_core.chain import Chain
from annealed_core.dais import chain_of
from annealed_core.description import Boolean, Description
from annealed_core.kernels import DiagonalGaussian, Frozen
from annealed_core.objectives import ELBO

PIXELS = 784
LARGEST_LOG_VARIANCE = 15.0  # of iterative inference


def mlp(sizes: Sequence[int], norm: bool = True) -> nn.Sequential:
    """For each pair of neighbouring sizes Linear, BatchNorm1d unless told otherwise, and LeakyReLU."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.LeakyReLU()]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """x (batch, 784) -> q_0(z | x) = N(loc, scale^2) with batch shape (batch,), and features (batch, width)."""

    def __init__(self, latents: int, width: int) -> None:
        super().__init__()
        self.features = mlp([PIXELS, width, width])
        self.outputs = nn.Linear(width, 2 * latents)

    def forward(self, x: Tensor) -> tuple[DiagonalGaussian, Tensor]:
        """See the class."""
        features = self.features(x)
        loc, scale = self.outputs(features).chunk(2, -1)
        return DiagonalGaussian(loc, softplus(scale) + 1e-4), features


class NoEncoder(nn.Module):
    """Of a model without latents: a base and features of no dimensions."""

    def forward(self, x: Tensor) -> tuple[DiagonalGaussian, Tensor]:
        """See the class."""
        nothing = x.new_zeros(len(x), 0)
        return DiagonalGaussian(nothing, nothing), nothing


class Decoder(nn.Module):
    """z (*sample, batch, latents) -> logits of the pixels (*sample, batch, 784), independent of each other given z."""

    def __init__(self, latents: int, width: int, norm: bool = True) -> None:
        super().__init__()
        self.features = mlp([latents, width, width], norm)
        self.outputs = nn.Linear(width, PIXELS)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """See the class; x is not looked at."""
        return self.outputs(self.features(z.flatten(0, -2))).unflatten(0, z.shape[:-1])

    @torch.no_grad()
    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixel probabilities: (*batch, latents) -> (*batch, 784)."""
        return torch.sigmoid(self(z))


class Independent(Description):
    """The description of a `Decoder`.

    Attributes:
        norm: with batch normalisation. Kernels that see the target want one without: else it is another target for
            each batch, and they see it as it is in evaluation mode, so that it does not learn through them.
    """

    norm: Boolean = True

    def build(self, latents: int, width: int) -> nn.Module:
        """With hidden layers of that width; weights from torch's random state."""
        return Decoder(latents, width, self.norm)


class Joint:
    """The target log p(x, z) = log p(x | z) + log N(z; 0, I) for a batch of binary images.

    Args:
        decoder: called with z (*sample, batch, latents) and x -> logits of the pixels (*sample, batch, 784), or of
            several decoders (n, *sample, batch, 784), of which p(x | z) is the mean.
        x: (batch, 784), values in {0, 1}.
        latents: dimensions of z.
    """

    def __init__(self, decoder: Any, x: Tensor, latents: int) -> None:
        self.decoder, self.x, self.dim = decoder, x, latents

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log p(x | z), Bernoulli, in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        logits = self.decoder(z, self.x)
        values = -binary_cross_entropy_with_logits(logits, self.x.expand_as(logits), reduction="none").sum(-1)
        return values if logits.ndim == z.ndim else torch.logsumexp(values, 0) - math.log(len(values))

    def log_prior(self, z: Tensor) -> Tensor:
        """Log N(z; 0, I) in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        return -0.5 * (z.square().sum(-1) + self.dim * math.log(2 * math.pi))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(x, z) in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        return self.log_likelihood(z) + self.log_prior(z)

    def frozen(self) -> Joint:
        """The same target whose decoder neither learns nor updates its batch statistics: gradients still reach z."""
        decoder = self.decoder if isinstance(self.decoder, Frozen) else Frozen(self.decoder)
        return self._with(decoder=decoder)

    def __getitem__(self, images: slice) -> Joint:
        return self._with(x=self.x[images])

    def _with(self, **changes: Any) -> Joint:
        found = copy.copy(self)
        vars(found).update(changes)
        return found


class VAE(nn.Module):
    """Encoder, decoder and the kernels between them.

    Args:
        latents: dimensions of z; 0 where the decoder does without.
        width: units of each hidden layer of encoder and decoder.
        kernels: transitions conditioned on the encoder's features (width,); none gives the plain VAE.
        decoder: the description of the decoder.
        base: where the chain starts: the "encoder"'s q_0(z | x), or the "prior" N(0, I), and its kernels alone see x.

    Raises ValueError for another base.
    """

    def __init__(
        self,
        latents: int,
        width: int,
        kernels: Iterable[Any] = (),
        decoder: Any = Independent(),  # noqa: B008 -- a frozen description
        base: str = "encoder",
    ) -> None:
        super().__init__()
        if base not in ("encoder", "prior"):
            raise ValueError(f"unknown base {base!r}: choose one of encoder, prior")
        self.latents, self.base = latents, base
        self.encoder: Any = Encoder(latents, width) if latents else NoEncoder()
        self.decoder = decoder.build(latents, width)
        self.kernels = nn.ModuleList(kernels)

    def posterior(self, x: Tensor, generator: torch.Generator | None = None) -> Chain:
        """The chain that approximates p(z | x); x: (batch, 784) in {0, 1}. It draws from the generator."""
        base, features = self.encoder(x)
        if self.base == "prior":
            base = DiagonalGaussian(torch.zeros_like(base.loc), torch.ones_like(base.scale))
        return chain_of(base, self.kernels, features, generator, lambda: self._seen(x))

    def _seen(self, x: Tensor) -> Joint:
        """The target as kernels see it, whose states no batch normalisation should meet."""
        joint = self.joint(x)
        normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.decoder.modules())
        return joint.frozen() if normalised else joint

    def joint(self, x: Tensor) -> Joint:
        """The target log p(x, z); x: (batch, 784) in {0, 1}."""
        return Joint(self.decoder, x, self.latents)

    def objective(self, objective: Any, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What is maximised of an objective: its values for each image, (batch,)."""
        values: Tensor = objective(self.posterior(x, generator), self.joint(x), ())
        return values

    @torch.no_grad()
    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixel probabilities: (*batch, latents) -> (*batch, 784).

        From an autoregressive decoder an image of 0 and 1, drawn pixel by pixel: the probabilities are those of that
        image alone. With either decoder `torch.bernoulli` of what is returned is a draw from p(x | z).
        """
        decoded: Tensor = self.decoder.decode(z, generator)
        return decoded

    @torch.no_grad()
    def reconstruct(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What `decode` makes of one draw of z_T for each image, in evaluation mode: (batch, 784)."""
        return self.decode(self.posterior(x, generator).rsample().z[-1], generator)


# ---- iterative inference


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
        given = [x - 0.5, lam.detach(), (gradient.abs() + 1e-5).log(), gradient.sign()]
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
