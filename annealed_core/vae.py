"""A variational auto-encoder as a chain weighed against a target.

For each image x the encoder gives the chain's base q_0(z | x) and a context for its kernels; prior and decoder give
the target log p(x, z). Network of the earlier report: two hidden layers of 300 with LeakyReLU and batch
normalisation, 40 latents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, Linear

PIXELS = 784


class GatedLinear(nn.Module):
    """(W x + b) * sigmoid(V x + c), the layer of Tomczak & Welling 2016 (arXiv 1611.09630)."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.value_and_gate = Linear(size_in, 2 * size_out)

    def forward(self, x: Tensor) -> Tensor:
        """(*batch, size_in) -> (*batch, size_out)."""
        return nn.functional.glu(self.value_and_gate(x), -1)


def mlp(sizes: Iterable[int], layers: str = "plain") -> nn.Sequential:
    """For each pair of neighbouring sizes Linear, BatchNorm1d and LeakyReLU ("plain"), or a `GatedLinear` ("gated")."""
    found: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        if layers == "gated":
            found.append(GatedLinear(size_in, size_out))
        else:
            found += [Linear(size_in, size_out), nn.BatchNorm1d(size_out), nn.LeakyReLU()]
    return nn.Sequential(*found)


class Encoder(nn.Module):
    """x (batch, 784) -> q_0(z | x) = N(loc, scale^2) with batch shape (batch,), and features (batch, width)."""

    def __init__(self, latents: int, width: int, layers: str = "plain") -> None:
        super().__init__()
        self.features = mlp([PIXELS, width, width], layers)
        self.outputs = Linear(width, 2 * latents)

    def forward(self, x: Tensor) -> tuple[DiagonalGaussian, Tensor]:
        """See the class."""
        features = self.features(x)
        loc, scale = self.outputs(features).chunk(2, -1)
        return DiagonalGaussian(loc, softplus(scale) + 1e-4), features


class Decoder(nn.Module):
    """z (*batch, latents) -> logits of the pixels (*batch, 784)."""

    def __init__(self, latents: int, width: int, layers: str = "plain") -> None:
        super().__init__()
        self.features = mlp([latents, width, width], layers)
        self.outputs = Linear(width, PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        return self.outputs(self.features(z.flatten(0, -2))).unflatten(0, z.shape[:-1])


class Joint:
    """The target log p(x, z) = log p(x | z) + log N(z; 0, I) for a batch of binary images.

    Args:
        decoder: z -> logits.
        x: (batch, 784), values in {0, 1}.
    """

    def __init__(self, decoder: nn.Module, x: Tensor, latents: int) -> None:
        self.decoder, self.x, self.dim = decoder, x, latents

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log p(x | z), Bernoulli, in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        logits = self.decoder(z)
        return (logits * self.x).sum(-1) - softplus(logits).sum(-1)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log N(z; 0, I) in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        return -0.5 * (z.square().sum(-1) + self.dim * math.log(2 * math.pi))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(x, z) in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        return self.log_likelihood(z) + self.log_prior(z)

    def frozen(self) -> Joint:
        """The same target whose decoder neither learns nor updates its batch statistics: gradients still reach z."""
        return Joint(_Frozen(self.decoder), self.x, self.dim)


class _Frozen(nn.Module):
    """A network as it stands: detached parameters, evaluation mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = [network]  # in a list, so that it isn't registered and doesn't change mode with this module
        self.state = {name: value.detach() for name, value in [*network.named_parameters(), *network.named_buffers()]}

    def forward(self, *inputs: Tensor | None) -> Any:
        network = self.network[0]
        was_training = network.training
        network.eval()
        try:
            return torch.func.functional_call(network, self.state, inputs)
        finally:
            network.train(was_training)


def with_frozen_kernels(chain: Chain) -> Chain:
    """The same chain, where gradients pass through the kernels and don't reach their weights."""
    return Chain(chain.base, [_Frozen(kernel) for kernel in chain.kernels], chain.context)  # type: ignore


class VAE(nn.Module):
    """Encoder, decoder and the kernels between them.

    Args:
        latents: dimensions of z.
        width: units of each hidden layer of encoder and decoder.
        kernels: transitions conditioned on the encoder's features (width,); none gives the plain VAE.
        layers: of encoder and decoder, see `mlp`.
        from_prior: the chain starts from N(0, I) instead of the encoder's q_0(z | x), and its kernels alone see x.
    """

    def __init__(
        self,
        latents: int,
        width: int,
        kernels: Iterable[nn.Module] = (),
        layers: str = "plain",
        from_prior: bool = False,
    ) -> None:
        super().__init__()
        self.latents, self.from_prior = latents, from_prior
        self.encoder, self.decoder = Encoder(latents, width, layers), Decoder(latents, width, layers)
        self.kernels = nn.ModuleList(kernels)

    def posterior(self, x: Tensor) -> Chain:
        """The chain that approximates p(z | x); x: (batch, 784) in {0, 1}."""
        base, features = self.encoder(x)
        if self.from_prior:
            base = DiagonalGaussian(torch.zeros_like(base.loc), torch.ones_like(base.scale))
        return Chain(base, self.kernels, features)

    def joint(self, x: Tensor) -> Joint:
        """The target log p(x, z); x: (batch, 784) in {0, 1}."""
        return Joint(self.decoder, x, self.latents)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pixel probabilities: (*batch, latents) -> (*batch, 784)."""
        return torch.sigmoid(self.decoder(z))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Pixel probabilities decoded from one draw of z_T for each image, in evaluation mode: (batch, 784)."""
        return self.decode(self.posterior(x).rsample().z[-1])
