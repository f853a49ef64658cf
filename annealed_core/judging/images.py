"""Many images taken in parts: what `likelihood`, `inference` and `exploration` have in common.

A model is asked for `posterior(x)`, a chain whose base is a DiagonalGaussian of batch (n_images,), and for `joint(x)`,
a target with `log_prob` and `dim`, in evaluation mode; of both `[images]` gives a slice. No gradient reaches the
model's weights. What is random comes from `generator`, or else from the chain's own, or else from torch's random state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from annealed_core.chain import Chain
from annealed_core.moves import draw_like
from annealed_core.vae import Joint

CHUNK_ROWS = 2560  # latents decoded at a time: 5,000 samples are two such, whose logits stay in a cache
WEIGHTS = 2**22  # log-weights held at a time


def refuse_training(model: Any) -> None:
    """ValueError for a model in training mode, in which a look at images changes it."""
    if getattr(model, "training", False):
        raise ValueError("model must be in evaluation mode, got training = True")


@torch.no_grad()
def posterior_of(model: Any, x: Tensor, generator: torch.Generator | None = None) -> Chain:
    """The posterior of all images, drawing from the generator; ValueError for a model or images that do not fit."""
    refuse_training(model)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"x must have shape (n_images, pixels), got {tuple(x.shape)}")
    return drawing_from(model.posterior(x), generator)


def drawing_from(chain: Chain, generator: torch.Generator | None) -> Chain:
    """The chain, drawing from the generator, or as before where there is none."""
    return chain if generator is None else chain.replace(generator=generator)


def joint_of(model: Any, x: Tensor) -> Any:
    """The target of all images, with a decoder that does not learn where there is one."""
    joint = model.joint(x)
    return joint.frozen() if isinstance(joint, Joint) else joint


def slices(stop: int, each: int = 1, at_once: int | None = None) -> Iterator[slice]:
    """Slices that cover 0 ... stop, of at most `at_once` (or CHUNK_ROWS) things, each of 0 ... stop having `each`."""
    size = max(1, (CHUNK_ROWS if at_once is None else at_once) // each)
    for first in range(0, stop, size):
        yield slice(first, min(first + size, stop))


def log_weights_of(chains: Sequence[Chain], joint: Any, n_samples: int) -> Tensor:
    """Log-weights of each chain on the same noise, in nats: (n_chains, n_samples, n_images)."""
    loc, generator = chains[0].base.loc, chains[0].generator
    values = loc.new_empty((len(chains), n_samples, len(loc)))
    for part in slices(len(loc), n_samples):
        target, pieces = joint[part], [chain[part] for chain in chains]
        for samples in slices(n_samples):
            # Drawn image by image, so that what an image gets does not depend on the chunks, as long as its share is a
            # multiple of the 16 numbers that torch draws at once.
            shape = part.stop - part.start, samples.stop - samples.start, len(chains[0]) + 1, loc.shape[-1]
            noise = draw_like(torch.randn, loc.new_empty(shape), generator).permute(2, 1, 0, 3)
            for row, piece in zip(values, pieces, strict=True):
                row[samples, part] = piece.log_weight(target, piece.rsample(noise=noise))
    return values


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over images and its standard error, NaN for one image."""
    values = values.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def means_and_errors(**values: Tensor) -> dict[str, float]:
    """Of each quantity the mean over images under its name, and its standard error under that and `_se`."""
    found: dict[str, float] = {}
    for name, each in values.items():
        found[name], found[f"{name}_se"] = mean_and_error(each)
    return found
