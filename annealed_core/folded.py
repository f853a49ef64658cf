"""The densities of an auto-encoder for many images: taken in parts, and in few passes over the pixels.

What `likelihood` and `inference` have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu_

from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian
from annealed_core.layers import sum_centred_softplus
from annealed_core.products import linear
from annealed_core.vae import Decoder, Joint, has_plain_layers, without_norm

CHUNK_ROWS = 2560  # 5,000 samples are two such; the logits of so many images stay in a cache
WEIGHTS = 2**22  # log-weights held at a time


class FoldedJoint(Joint):
    """`vae.Joint` of a decoder as it stands in evaluation mode: the same values and gradients of z in fewer passes.

    Batch normalisation is folded into the linear layers, and one more unit of each hidden layer, which is always 1,
    brings the biases of the layer after it. For a logit l, log p(x | z) = (x - 1/2) l - (softplus(l) - l / 2), and the
    sum over pixels of the first is h . W^T (x - 1/2): a product with the last hidden layer h instead of one with the
    logits.

    Args:
        decoder: with plain layers.
        x: (batch, 784), values in {0, 1}.
        latents: dimensions of z.
    """

    def __init__(self, decoder: FoldedDecoder, x: Tensor, latents: int) -> None:
        super().__init__(decoder, x, latents)
        self.hidden, self.weight = decoder.hidden, decoder.weight
        self.centred_weight = (x - 0.5) @ self.weight

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log p(x | z), Bernoulli, in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        hidden = self.hidden(z.flatten(0, -2))
        logits = linear(hidden, self.weight)
        by_image = hidden.unflatten(0, (-1, z.shape[-2])).transpose(0, 1)  # (batch, samples, width)
        linear_part = (by_image @ self.centred_weight.unsqueeze(-1)).squeeze(-1).mT.reshape(z.shape[:-1])
        return linear_part - sum_centred_softplus(logits).unflatten(0, z.shape[:-1])

    def frozen(self) -> FoldedJoint:
        """Itself: its weights don't learn."""
        return self


class FoldedDecoder(nn.Module):
    """A `Decoder` with plain layers, as it stands in evaluation mode, and with weights of its own that don't learn.

    Attributes:
        weight: of the logits, (784, width and what is added to it).
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        layers: list[Any] = list(decoder.features)
        folded = [without_norm(layer, norm) for layer, norm in zip(layers[::3], layers[1::3], strict=True)]
        self.layers = [(*_with_ones(*each, number > 0), layers[2].negative_slope) for number, each in enumerate(folded)]
        weight, _ = _with_ones(decoder.outputs.weight.detach(), decoder.outputs.bias.detach(), True)
        self.weight = weight[: decoder.outputs.out_features]

    def hidden(self, z: Tensor) -> Tensor:
        """The last hidden layer, and what is added to it: (n, latents) -> (n, more than width)."""
        for number, (weight, bias, slope) in enumerate(self.layers):
            z = leaky_relu_(linear(z, weight, None if number else bias), slope)
        return z

    def forward(self, z: Tensor) -> Tensor:
        """See `Decoder`."""
        return linear(self.hidden(z.flatten(0, -2)), self.weight).unflatten(0, z.shape[:-1])


def _with_ones(weight: Tensor, bias: Tensor, has_ones: bool) -> tuple[Tensor, Tensor]:
    """A layer with some more units, the first always 1, the others 0: weight and bias.

    With `has_ones` its inputs have them already, and bring the bias, which is in the weight then.
    """
    units_out, units_in = weight.shape
    more_out, more_in = (-units % 16 or 16 for units in (units_out, units_in))
    weight, bias = nn.functional.pad(weight, (0, 0, 0, more_out)), nn.functional.pad(bias, (0, more_out))
    bias[units_out] = 1
    if has_ones:
        weight = nn.functional.pad(weight, (0, more_in))
        weight[:, units_in] = bias
    return weight, bias


def refuse_training(model: Any) -> None:
    """ValueError for a model in training mode, in which a look at images changes it."""
    if getattr(model, "training", False):
        raise ValueError("model must be in evaluation mode, got training = True")


@torch.no_grad()
def posterior_of(model: Any, x: Tensor) -> Chain:
    """The posterior of all images, after a look at them and the model's mode."""
    refuse_training(model)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"x must have shape (n_images, pixels), got {tuple(x.shape)}")
    return model.posterior(x)


def targets_of(model: Any, x: Tensor) -> Callable[[slice], Any]:
    """What gives the target of a slice of the images, in its fastest form."""
    joint = model.joint(x)
    if type(joint) is not Joint or not has_plain_layers(joint.decoder):
        return lambda images: model.joint(x[images])
    decoder = FoldedDecoder(joint.decoder)
    return lambda images: FoldedJoint(decoder, x[images], joint.dim)


def part_of(chain: Chain, images: slice) -> Chain:
    """The chain of a slice of the images."""
    base = DiagonalGaussian(chain.base.loc[images], chain.base.scale[images])
    return Chain(base, chain.kernels, None if chain.context is None else chain.context[images])


def slices(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """Slices of at most `size`, and at least 1, that cover start ... stop."""
    size = max(1, size)
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def log_weights_of(
    chains: Sequence[Chain], targets: Callable[[slice], Any], images: slice, n_samples: int, chunk_rows: int
) -> Tensor:
    """Log-weights of each chain on the same noise, in nats: (n_chains, n_samples, n_images)."""
    loc = chains[0].base.loc
    values = loc.new_empty((len(chains), n_samples, images.stop - images.start))
    for part in slices(images.stop, chunk_rows // n_samples, images.start):
        target, pieces = targets(part), [part_of(chain, part) for chain in chains]
        columns = slice(part.start - images.start, part.stop - images.start)
        for samples in slices(n_samples, chunk_rows):
            # Drawn image by image, so that what an image gets does not depend on the chunks, as long as its share is a
            # multiple of the 16 numbers that torch draws at once.
            shape = (part.stop - part.start, samples.stop - samples.start, len(chains[0]) + 1, loc.shape[-1])
            noise = torch.randn(shape, dtype=loc.dtype, device=loc.device).permute(2, 1, 0, 3)
            for row, piece in zip(values, pieces, strict=True):
                row[samples, columns] = piece.log_weight(target, piece.rsample(noise=noise))
    return values


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over images and its standard error, NaN for one image."""
    values = values.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
