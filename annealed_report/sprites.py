"""Sprites: images whose factors are known, made here, and auto-encoders trained on them.

A disc, a diamond or a square, of one of four sizes, at one of 14 x 14 places: 2,352 images of 28 x 28 pixels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from annealed_core.description import Whole
from annealed_core.judging.disentanglement import mutual_information_gap
from annealed_report.varied import Varied, VariedProblem

PLACES, RADII, NORMS = range(7, 21), (2.5, 3.5, 4.5, 5.5), (2.0, 1.0, float("inf"))
_HELD_OUT = 300  # validation images, and as many test images


@functools.cache
def sprites() -> tuple[Tensor, Tensor]:
    """All images, uint8 0 or 255 (2352, 784), and their factors row, column, radius and shape, from 0 (2352, 4)."""
    pixels = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0))
    images, factors = [], []
    for place in itertools.product(*(range(len(each)) for each in (PLACES, PLACES, RADII, NORMS))):
        centre = torch.tensor([PLACES[place[0]], PLACES[place[1]]])
        inside = torch.linalg.vector_norm(pixels - centre, NORMS[place[3]], -1) <= RADII[place[2]]
        images.append(inside.to(torch.uint8) * 255)
        factors.append(place)
    return torch.stack(images), torch.tensor(factors)


class Sprites(Varied):
    """An auto-encoder trained on all sprites but 600; fields as of `Mnist`.

    `metrics` has beside those of `Varied` the `gap`, the mutual information gap over all sprites.
    """

    train_images: Annotated[int, Whole(2, 2352 - 2 * _HELD_OUT)] = 2352 - 2 * _HELD_OUT

    @property
    def label(self) -> str:
        """Such as sprites-vae-elbo-s0."""
        return super().label.replace("mnist", "sprites", 1)

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> SpritesProblem:
        """See `Experiment`."""
        (spec,) = specs
        return SpritesProblem(spec, device)


class SpritesProblem(VariedProblem):
    """One auto-encoder on sprites."""

    def images(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Training images, and 300 each to validate and to test."""
        every = sprites()[0].to(device)
        mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
        valid, test, train = mixed[:_HELD_OUT], mixed[_HELD_OUT : 2 * _HELD_OUT], mixed[2 * _HELD_OUT :]
        return train, valid.float() / 255, test.float() / 255

    @torch.no_grad()
    def metrics(self) -> list[dict[str, Any]]:
        """See `Sprites`."""
        (found,) = super().metrics()
        if found:
            every, factors = sprites()
            codes = self.network.posterior(every.float() / 255).base.loc
            found.pop("grey_nll", None)  # of digits
            found["gap"] = mutual_information_gap(codes, factors)
        return [found]
