"""A decoder that does not learn, for likelihoods and for AVO, in fewer passes over its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu_, linear
from torch.nn.utils.fusion import fuse_linear_bn_weights

from annealed_core.kernels import Frozen
from annealed_core.vae import Decoder, Joint


class FoldedDecoder(nn.Module):
    """A `Decoder` as it stands in evaluation mode, with batch normalisation folded into its linear layers.

    Gradients reach z alone. When the decoder has learned, make another.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        layers: list[Any] = list(decoder.features)
        self.layers = [
            (*_without_norm(layer, norm), activation.negative_slope)
            for layer, norm, activation in zip(layers[::3], layers[1::3], layers[2::3], strict=True)
        ]
        self.last = decoder.outputs.weight.detach(), decoder.outputs.bias.detach()

    def hidden(self, z: Tensor) -> Tensor:
        """The last hidden layer: (n, latents) -> (n, width)."""
        for weight, bias, slope in self.layers:
            z = leaky_relu_(linear(z, weight, bias), slope)
        return z

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """As of `Decoder`: (*sample, batch, latents) -> logits (*sample, batch, 784)."""
        return linear(self.hidden(z.flatten(0, -2)), *self.last).unflatten(0, z.shape[:-1])


class FoldedJoint(Joint):
    """`vae.Joint` of a `FoldedDecoder`, which takes fewer passes over the logits where no gradient is recorded."""

    decoder: FoldedDecoder

    def log_likelihood(self, z: Tensor) -> Tensor:
        """As of `Joint`.

        For a logit l, log p(x | z) = (x - 1/2) l - |l| / 2 - log(1 + exp(-|l|)). The first part, summed over pixels, is
        a product with the hidden layer; the logarithms are taken of products of eight numbers between 1 and 2.
        """
        if torch.is_grad_enabled():
            return super().log_likelihood(z)
        weight, bias = self.decoder.last
        hidden, centred = self.decoder.hidden(z.flatten(0, -2)), self.x - 0.5
        size = linear(hidden, weight, bias).abs_()
        by_image = hidden.unflatten(0, z.shape[:-1])
        sums = torch.einsum("...bw,bw->...b", by_image, centred @ weight) + centred @ bias
        sums -= 0.5 * size.sum(-1).view_as(sums)
        factors = size.neg_().exp_().add_(1).unflatten(-1, (8, -1))
        return sums - factors.prod(-2).log_().sum(-1).view_as(sums)

    def frozen(self) -> FoldedJoint:
        """Itself: its decoder doesn't learn."""
        return self


def _without_norm(layer: nn.Linear, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that has the normalisation after it in them."""
    statistics: Any = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    return weight.detach(), bias.detach()


def freeze(decoder: nn.Module) -> Any:
    """What `vae.VAE(freeze=...)` takes: a `FoldedDecoder` of a plain decoder, and `kernels.Frozen` of any other."""
    return FoldedDecoder(decoder) if type(decoder) is Decoder else Frozen(decoder)


def frozen(joint: Joint) -> Joint:
    """A target of images as it stands, whose decoder doesn't learn: a `FoldedJoint` of a plain decoder."""
    if type(joint) is Joint and type(joint.decoder) is Decoder:
        return FoldedJoint(FoldedDecoder(joint.decoder), joint.x, joint.dim)
    return joint.frozen()
