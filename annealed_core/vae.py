"""A variational auto-encoder as a chain weighed against a target.

For each image x the encoder gives the chain's base q_0(z | x) and a context for its kernels; prior and decoder give
the target log p(x, z). Two hidden layers with LeakyReLU and batch normalisation, as in the earlier report.

The decoder takes the pixels as independent given z, `Independent()`, or each as dependent on those before it,
`Autoregressive()`: descriptions whose `build(latents, width)` makes it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, softplus

from annealed_core.chain import Chain
from annealed_core.dais import chain_of
from annealed_core.description import Boolean, Description
from annealed_core.kernels import DiagonalGaussian, Frozen

PIXELS = 784


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


class MaskedLinear(nn.Linear):
    """(W * mask) x + b.

    Args:
        mask: (size_out, size_in), True where a weight counts. It is made anew with the layer and not saved.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, bias: bool = True) -> None:
        super().__init__(mask.shape[1], mask.shape[0], bias)
        self.register_buffer("mask", mask, persistent=False)

    def masked(self) -> Tensor:
        """The weights that count, others 0: (size_out, size_in)."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """(n, size_in) -> (n, size_out)."""
        return linear(x, self.masked(), self.bias)


class AutoregressiveDecoder(nn.Module):
    """p(x | z) = prod_i Bernoulli(x_i | x_<i, z), pixels in raster order: MADE (Germain et al. 2015, arXiv 1502.03509).

    Two hidden layers, whose units have degrees that rise evenly from 0: a unit of degree d sees the first d pixels, and
    logit i the units of degree i at most. As in the paper, each logit also sees all pixels before its own directly:
    with fewer units than pixels most would not see their left neighbour otherwise. All of z goes to every unit of the
    first hidden layer, and nowhere else: connected to the logits too, it would collapse less.

    Args:
        latents: dimensions of z.
        width: units of each hidden layer.
        pixels: of an image.
    """

    def __init__(self, latents: int, width: int, pixels: int = PIXELS) -> None:
        super().__init__()
        self.pixels, self.degrees = pixels, [unit * pixels // width for unit in range(width)]
        order, degrees = torch.arange(pixels), torch.tensor(self.degrees)
        self.from_latents = nn.Linear(latents, width, bias=False)
        # Of the first hidden layer and, below, of the logits: together, since both are the same for all samples of z.
        self.from_pixels = MaskedLinear(order < torch.cat([degrees, order]).unsqueeze(1))
        self.hidden = MaskedLinear(degrees <= degrees.unsqueeze(1))
        self.outputs = MaskedLinear(degrees <= order.unsqueeze(1), bias=False)
        self.activation = nn.LeakyReLU()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Logits of x (batch, pixels), each given the pixels before it: (*sample, batch, latents) -> (..., pixels)."""
        first, direct = self.from_pixels(x).split([len(self.degrees), self.pixels], -1)
        hidden = self.activation(self.from_latents(z.flatten(0, -2)).unflatten(0, z.shape[:-1]) + first)
        logits = self.outputs(self.activation(self.hidden(hidden.flatten(0, -2))))
        return logits.unflatten(0, hidden.shape[:-1]) + direct

    @torch.no_grad()
    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An image of 0 and 1 for each z, drawn pixel by pixel: (*batch, latents) -> (*batch, pixels)."""
        return self.sample(z, generator)[0]

    @torch.no_grad()
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images of 0 and 1 drawn pixel by pixel, and the logits that each was drawn with.

        (*batch, latents) -> two of (*batch, pixels). A unit is computed once, as soon as all that it sees is drawn.
        """
        hidden_weight, output_weight = self.hidden.masked(), self.outputs.masked()
        first_weight, direct_weight = self.from_pixels.masked().split([len(self.degrees), self.pixels])
        first_bias, direct_bias = self.from_pixels.bias.split([len(self.degrees), self.pixels])
        first = linear(z.flatten(0, -2), self.from_latents.weight, first_bias)
        second, logits = torch.zeros_like(first), direct_bias.repeat(len(first), 1)
        x, device = torch.zeros_like(logits), z.device if generator is None else generator.device
        for pixel in range(self.pixels):
            units = slice(bisect_left(self.degrees, pixel), bisect_right(self.degrees, pixel))
            first[:, units] = self.activation(first[:, units] + x @ first_weight[units].T)
            second[:, units] = self.activation(first @ hidden_weight[units].T + self.hidden.bias[units])
            logits[:, pixel] += second @ output_weight[pixel] + x @ direct_weight[pixel]
            x[:, pixel] = torch.bernoulli(torch.sigmoid(logits[:, pixel]).to(device), generator=generator)
        return x.unflatten(0, z.shape[:-1]), logits.unflatten(0, z.shape[:-1])


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


class Autoregressive(Description):
    """The description of an `AutoregressiveDecoder`."""

    def build(self, latents: int, width: int) -> nn.Module:
        """As for `Independent`."""
        return AutoregressiveDecoder(latents, width)


class Joint:
    """The target log p(x, z) = log p(x | z) + log N(z; 0, I) for a batch of binary images.

    Args:
        decoder: called with z (*sample, batch, latents) and x -> logits of the pixels (*sample, batch, 784).
        x: (batch, 784), values in {0, 1}.
        latents: dimensions of z.
    """

    def __init__(self, decoder: Any, x: Tensor, latents: int) -> None:
        self.decoder, self.x, self.dim = decoder, x, latents

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log p(x | z), Bernoulli, in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        logits = self.decoder(z, self.x)
        return -binary_cross_entropy_with_logits(logits, self.x.expand_as(logits), reduction="none").sum(-1)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log N(z; 0, I) in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        return -0.5 * (z.square().sum(-1) + self.dim * math.log(2 * math.pi))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(x, z) in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        return self.log_likelihood(z) + self.log_prior(z)

    def frozen(self) -> Joint:
        """The same target whose decoder neither learns nor updates its batch statistics: gradients still reach z."""
        decoder = self.decoder if isinstance(self.decoder, Frozen) else Frozen(self.decoder)
        return type(self)(decoder, self.x, self.dim)

    def __getitem__(self, images: slice) -> Joint:
        return type(self)(self.decoder, self.x[images], self.dim)


class VAE(nn.Module):
    """Encoder, decoder and the kernels between them.

    Args:
        latents: dimensions of z.
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
        self.encoder = Encoder(latents, width)
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
        normalised = any(isinstance(module, nn.BatchNorm1d) for module in self.decoder.modules())
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
