"""A decoder that does not learn, for likelihoods and for AVO, in fewer passes over its rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import leaky_relu_, linear
from torch.nn.utils.fusion import fuse_linear_bn_weights

from annealed_core.kernels import Frozen
from annealed_core.vae import Decoder


class FoldedDecoder(nn.Module):
    """A `Decoder` as it stands in evaluation mode, with batch normalisation folded into its linear layers.

    It doesn't learn, nor follow the decoder when that goes on learning; gradients reach z.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        layers: list[Any] = list(decoder.features)
        self.layers = [
            (*_without_norm(layer, norm), activation.negative_slope)
            for layer, norm, activation in zip(layers[::3], layers[1::3], layers[2::3], strict=True)
        ]
        self.last = decoder.outputs.weight.detach(), decoder.outputs.bias.detach()

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """As of `Decoder`: (*sample, batch, latents) -> logits (*sample, batch, 784)."""
        hidden = z.flatten(0, -2)
        for weight, bias, slope in self.layers:
            hidden = leaky_relu_(linear(hidden, weight, bias), slope)
        return linear(hidden, *self.last).unflatten(0, z.shape[:-1])


def _without_norm(layer: nn.Linear, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that has the normalisation after it in them."""
    statistics: Any = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    return weight.detach(), bias.detach()


def freeze(decoder: nn.Module) -> Any:
    """What `vae.VAE(freeze=...)` takes: a `FoldedDecoder` of a plain decoder, and `kernels.Frozen` of any other."""
    return FoldedDecoder(decoder) if type(decoder) is Decoder else Frozen(decoder)
