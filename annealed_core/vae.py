"""A variational auto-encoder as a chain weighed against a target.

For each image x the encoder gives the chain's base q_0(z | x) and a context for its kernels; prior and decoder give
the target log p(x, z). Network of the earlier report: two hidden layers of 300 with LeakyReLU and batch
normalisation, 40 latents.

The decoder takes the pixels as independent given z, or, autoregressive, each as dependent on those before it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_weights

from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian
from annealed_core.layers import (
    Normalised,
    can_train,
    frozen_log_likelihood,
    log_likelihood,
    softplus,
    sum_softplus,
    through,
)
from annealed_core.products import Linear, linear

PIXELS = 784
DECODERS = ("independent", "autoregressive")


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


def _trained_by_hand(features: nn.Sequential) -> list[Normalised]:
    """The layers of `mlp` as `layers.through` takes them; an empty list where it does not."""
    found: list[Any] = list(features)
    if not isinstance(found[0], nn.Linear):
        return []
    threes = zip(found[::3], found[1::3], found[2::3], strict=True)
    layers = [(layer, norm, activation.negative_slope) for layer, norm, activation in threes]
    return layers if can_train(layers) else []


class Encoder(nn.Module):
    """x (batch, 784) -> q_0(z | x) = N(loc, scale^2) with batch shape (batch,), and features (batch, width)."""

    def __init__(self, latents: int, width: int, layers: str = "plain") -> None:
        super().__init__()
        self.features = mlp([PIXELS, width, width], layers)
        self.outputs = Linear(width, 2 * latents)

    def forward(self, x: Tensor) -> tuple[DiagonalGaussian, Tensor]:
        """See the class."""
        if layers := _trained_by_hand(self.features):
            outputs, features = through(x, layers, self.outputs)
        else:
            features = self.features(x)
            outputs = self.outputs(features)
        loc, scale = outputs.chunk(2, -1)
        return DiagonalGaussian(loc, softplus(scale).add_(1e-4)), features


class Decoder(nn.Module):
    """z (*batch, latents) -> logits of the pixels (*batch, 784)."""

    def __init__(self, latents: int, width: int, layers: str = "plain") -> None:
        super().__init__()
        self.features = mlp([latents, width, width], layers)
        self.outputs = Linear(width, PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        return self.outputs(self.features(z.flatten(0, -2))).unflatten(0, z.shape[:-1])

    def log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """Log p(x | z), Bernoulli, in nats; z: (*sample, batch, latents), x (batch, 784) -> (*sample, batch)."""
        if layers := _trained_by_hand(self.features):
            return log_likelihood(z, layers, self.outputs, x)
        logits = self(z)
        return (logits * x).sum(-1) - sum_softplus(logits)


class MaskedLinear(Linear):
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
        self.from_latents = Linear(latents, width, bias=False)
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
    def sample(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Images of 0 and 1 drawn pixel by pixel, and the logits that each was drawn with.

        (*batch, latents) -> two of (*batch, pixels). A unit is computed once, as soon as all that it sees is drawn.
        """
        hidden_weight, output_weight = self.hidden.masked(), self.outputs.masked()
        first_weight, direct_weight = self.from_pixels.masked().split([len(self.degrees), self.pixels])
        first_bias, direct_bias = self.from_pixels.bias.split([len(self.degrees), self.pixels])
        first = linear(z.flatten(0, -2), self.from_latents.weight, first_bias)
        second, logits = torch.zeros_like(first), direct_bias.repeat(len(first), 1)
        x = torch.zeros_like(logits)
        for pixel in range(self.pixels):
            units = slice(bisect_left(self.degrees, pixel), bisect_right(self.degrees, pixel))
            first[:, units] = self.activation(first[:, units] + x @ first_weight[units].T)
            second[:, units] = self.activation(first @ hidden_weight[units].T + self.hidden.bias[units])
            logits[:, pixel] += second @ output_weight[pixel] + x @ direct_weight[pixel]
            x[:, pixel] = torch.bernoulli(torch.sigmoid(logits[:, pixel]))
        return x.unflatten(0, z.shape[:-1]), logits.unflatten(0, z.shape[:-1])


class Joint:
    """The target log p(x, z) = log p(x | z) + log N(z; 0, I) for a batch of binary images.

    Args:
        decoder: z -> logits.
        x: (batch, 784), values in {0, 1}.
    """

    def __init__(self, decoder: nn.Module, x: Tensor, latents: int) -> None:
        self.decoder, self.x, self.dim = decoder, x, latents

    def logits(self, z: Tensor) -> Tensor:
        """Of the pixels: (*sample, batch, latents) -> (*sample, batch, 784)."""
        return self.decoder(z)

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log p(x | z), Bernoulli, in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        if isinstance(self.decoder, Decoder | _Folded):
            return self.decoder.log_likelihood(z, self.x)
        logits = self.logits(z)
        return (logits * self.x).sum(-1) - sum_softplus(logits)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log N(z; 0, I) in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        return -0.5 * (z.square().sum(-1) + self.dim * math.log(2 * math.pi))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(x, z) in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        return self.log_likelihood(z) + self.log_prior(z)

    def frozen(self) -> Joint:
        """The same target whose decoder neither learns nor updates its batch statistics: gradients still reach z."""
        return type(self)(_frozen(self.decoder), self.x, self.dim)


class AutoregressiveJoint(Joint):
    """The same with a decoder that sees z and x, such as `AutoregressiveDecoder`."""

    def logits(self, z: Tensor) -> Tensor:
        """Of each pixel given those before it: (*sample, batch, latents) -> (*sample, batch, 784)."""
        return self.decoder(z, self.x)


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


class _Folded(nn.Module):
    """A plain decoder as it stands, with its batch normalisation folded into its layers: fewer passes over its rows."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        layers: list[Any] = list(decoder.features)
        self.hidden = [
            (*without_norm(layer, norm), activation.negative_slope)
            for layer, norm, activation in zip(layers[::3], layers[1::3], layers[2::3], strict=True)
        ]
        self.last = decoder.outputs.weight.detach(), decoder.outputs.bias.detach()

    def forward(self, z: Tensor) -> Tensor:
        """See `Decoder`."""
        hidden = z.flatten(0, -2)
        for weight, bias, slope in self.hidden:
            hidden = nn.functional.leaky_relu_(linear(hidden, weight, bias), slope)
        return linear(hidden, *self.last).unflatten(0, z.shape[:-1])

    def log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """See `Decoder`."""
        return frozen_log_likelihood(z, self.hidden, self.last, x)


def without_norm(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that has the normalisation after it in them."""
    of_norm = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, bias = fuse_linear_bn_weights(layer.weight, layer.bias, *of_norm)
    return weight.detach(), bias.detach()


def has_plain_layers(network: nn.Module) -> TypeGuard[Decoder]:
    """Whether it is a `Decoder` with batch normalisation, which can be folded into its linear layers."""
    return isinstance(network, Decoder) and isinstance(network.features[0], nn.Linear)


def _frozen(network: nn.Module) -> nn.Module:
    """The network as it stands, in its fastest form."""
    if isinstance(network, _Folded):
        return network
    if has_plain_layers(network):
        return _Folded(network)
    return _Frozen(network)


def with_frozen_kernels(chain: Chain) -> Chain:
    """The same chain, where gradients pass through the kernels and don't reach their weights."""
    return Chain(chain.base, [_Frozen(kernel) for kernel in chain.kernels], chain.context)  # type: ignore


class VAE(nn.Module):
    """Encoder, decoder and the kernels between them.

    Args:
        latents: dimensions of z.
        width: units of each hidden layer of encoder and decoder.
        kernels: transitions conditioned on the encoder's features (width,); none gives the plain VAE.
        layers: of the encoder and of an independent decoder, see `mlp`.
        from_prior: the chain starts from N(0, I) instead of the encoder's q_0(z | x), and its kernels alone see x.
        decoder: "independent", with pixels that are so given z, or "autoregressive".

    Raises ValueError for another decoder.
    """

    def __init__(
        self,
        latents: int,
        width: int,
        kernels: Iterable[nn.Module] = (),
        layers: str = "plain",
        from_prior: bool = False,
        decoder: str = "independent",
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"unknown decoder {decoder!r}: choose one of {', '.join(DECODERS)}")
        self.latents, self.from_prior = latents, from_prior
        self.encoder = Encoder(latents, width, layers)
        self.decoder: Decoder | AutoregressiveDecoder = (
            Decoder(latents, width, layers) if decoder == "independent" else AutoregressiveDecoder(latents, width)
        )
        self.kernels = nn.ModuleList(kernels)

    def posterior(self, x: Tensor) -> Chain:
        """The chain that approximates p(z | x); x: (batch, 784) in {0, 1}."""
        base, features = self.encoder(x)
        if self.from_prior:
            base = DiagonalGaussian(torch.zeros_like(base.loc), torch.ones_like(base.scale))
        return Chain(base, self.kernels, features)

    def joint(self, x: Tensor) -> Joint:
        """The target log p(x, z); x: (batch, 784) in {0, 1}."""
        joint = AutoregressiveJoint if isinstance(self.decoder, AutoregressiveDecoder) else Joint
        return joint(self.decoder, x, self.latents)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pixel probabilities: (*batch, latents) -> (*batch, 784).

        From an autoregressive decoder an image of 0 and 1, drawn pixel by pixel: the probabilities are those of that
        image alone. With either decoder `torch.bernoulli` of what is returned is a draw from p(x | z).
        """
        if isinstance(self.decoder, AutoregressiveDecoder):
            return self.decoder.sample(z)[0]
        return torch.sigmoid(self.decoder(z))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """What `decode` makes of one draw of z_T for each image, in evaluation mode: (batch, 784)."""
        return self.decode(self.posterior(x).rsample().z[-1])
