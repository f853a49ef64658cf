"""The densities of an auto-encoder for many images: taken in parts, and in few passes over the pixels.

What `likelihood` and `inference` have in common.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, linear
from annealed_core.vae import Decoder, Joint, sum_softplus

CHUNK_ROWS = 2048  # the logits of so many images stay in a processor's cache
WEIGHTS = 2**22  # log-weights held at a time


class FoldedJoint(Joint):
    """`vae.Joint` as it stands in evaluation mode, with the same values and gradients of z, in fewer passes.

    Batch normalisation is folded into the linear layers, and the sum of logits * x over pixels is h . (W^T x) + b . x,
    a product with the last hidden layer h instead of one with the logits.

    Args:
        features: the decoder's hidden layers, as `fold` gives them; `outputs`: its last.
        x: (batch, 784), values in {0, 1}.
        latents: dimensions of z.
    """

    def __init__(self, features: nn.Module, outputs: nn.Linear, x: Tensor, latents: int) -> None:
        super().__init__(nn.Sequential(features, outputs), x, latents)
        self.features, self.weight, self.bias = features, outputs.weight.detach(), outputs.bias.detach()
        self.observed_weight, self.observed_bias = x @ self.weight, x @ self.bias

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log p(x | z), Bernoulli, in nats; z: (*sample, batch, latents) -> (*sample, batch)."""
        hidden = self.features(z.flatten(0, -2))
        logits = linear(hidden, self.weight, self.bias)
        observed = (hidden.unflatten(0, z.shape[:-1]) * self.observed_weight).sum(-1) + self.observed_bias
        return observed - sum_softplus(logits).unflatten(0, z.shape[:-1])

    def frozen(self) -> FoldedJoint:
        """Itself: its weights don't learn."""
        return self


def fold(network: nn.Sequential) -> nn.Sequential:
    """The same function in evaluation mode, with weights of its own that don't learn and no batch normalisation."""
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(network).requires_grad_(False).eval():
        if isinstance(layer, nn.BatchNorm1d) and layers and isinstance(layers[-1], nn.Linear):
            layers[-1] = fuse_linear_bn_eval(layers[-1], layer)
        elif isinstance(layer, nn.LeakyReLU):
            layers.append(nn.LeakyReLU(layer.negative_slope, inplace=True))
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


@torch.no_grad()
def posterior_of(model: Any, x: Tensor) -> Chain:
    """The posterior of all images, after a look at them and the model's mode."""
    if getattr(model, "training", False):
        raise ValueError("model must be in evaluation mode, got training = True")
    if x.ndim != 2 or not len(x):
        raise ValueError(f"x must have shape (n_images, pixels), got {tuple(x.shape)}")
    return model.posterior(x)


def targets_of(model: Any, x: Tensor) -> Callable[[slice], Any]:
    """What gives the target of a slice of the images, in its fastest form."""
    joint = model.joint(x)
    if type(joint) is not Joint or type(joint.decoder) is not Decoder:
        return lambda images: model.joint(x[images])
    features, outputs = fold(joint.decoder.features), joint.decoder.outputs
    return lambda images: FoldedJoint(features, outputs, x[images], joint.dim)


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
