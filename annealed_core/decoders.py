"""Decoders in which each pixel depends on those before it, in some order: they can do without latents.

Mnist(decoder=Autoregressive())                         # masked layers, pixels in raster order
Mnist(decoder=LocallyMasked(orders=1))                  # masked convolutions, along one S-shaped curve
Mnist(decoder=LocallyMasked(), latents=0)               # no latents, and the mean of eight orders' likelihoods
"""

from __future__ import annotations

import functools
import random
from bisect import bisect_left, bisect_right
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from annealed_core.description import Description, Size, Whole
from annealed_core.moves import draw_like
from annealed_core.vae import PIXELS, mlp


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


def s_curve(which: int, size: int) -> Tensor:
    """The place of each pixel in one of eight orders, 0 to 7: (size, size).

    Row by row from the top, to and fro; turned upside down (1), seen in a mirror (2) and transposed (4).
    """
    rows, columns = torch.arange(size).view(-1, 1), torch.arange(size)
    place = rows * size + torch.where(rows % 2 == 0, columns, size - 1 - columns)
    place = place.flip([axis for axis in (0, 1) if which & 1 << axis])
    return place.T if which & 4 else place


@functools.cache
def local_masks(which: int, size: int, dilation: int = 1, centre: bool = True) -> tuple[Tensor, Tensor]:
    """Which of its 3 x 3 neighbours come before a pixel: the distinct masks (n, 3, 3), and each pixel's (size, size).

    Neighbours outside of the image, which are 0 anyway, are taken as the curve would go on: two masks are enough.
    """
    margin = 2 * dilation  # even, so that rows keep their direction
    place = s_curve(which, size + 2 * margin)
    shifts = [slice(margin + step, margin + step + size) for step in (-dilation, 0, dilation)]
    around = torch.stack([place[rows, columns] for rows in shifts for columns in shifts])
    seen = around <= around[4] if centre else around < around[4]
    masks, chosen = seen.flatten(1).unique(dim=1, return_inverse=True)
    return masks.T.view(-1, 3, 3), chosen.view(size, size)


class LocallyMaskedConv(nn.Conv2d):
    """A convolution 3 x 3 whose mask is another at each pixel: one ordinary convolution for each distinct mask.

    Args:
        size_in, size_out: channels.
        dilation: between neighbours.
        centre: whether a pixel sees itself; not in a first layer.
    """

    def __init__(self, size_in: int, size_out: int, dilation: int = 1, centre: bool = True) -> None:
        super().__init__(size_in, size_out, 3, padding=dilation, dilation=dilation)
        self.centre = centre

    def forward(self, x: Tensor, which: int) -> Tensor:  # type: ignore[override]
        """(n, size_in, size, size) -> (n, size_out, size, size), along that order of `s_curve`."""
        masks, chosen = (each.to(x.device) for each in local_masks(which, x.shape[-1], self.dilation[0], self.centre))
        found = x.new_zeros(())
        for number, mask in enumerate(masks):
            whole = conv2d(x, self.weight * mask, self.bias, 1, self.padding, self.dilation)
            found = torch.where(chosen == number, whole, found)
        return found


class _Block(nn.Module):
    """h + a masked convolution of half the channels."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(2 * channels, channels, 1), nn.Conv2d(channels, 2 * channels, 1)
        self.masked, self.activation = LocallyMaskedConv(channels, channels, dilation), nn.LeakyReLU()

    def forward(self, h: Tensor, which: int) -> Tensor:
        inner = self.masked(self.activation(self.inner(self.activation(h))), which)
        found: Tensor = h + self.outer(self.activation(inner))
        return found


class LocallyMaskedDecoder(nn.Module):
    """Locally masked convolutions: p(x | z) = prod_i Bernoulli(x_i | pixels before it, z), along S-shaped curves.

    Jain, Abbeel & Pathak 2020 (arXiv 2006.12486), in small: a masked convolution of the image and a channel of ones,
    and residual blocks. Each pass in training mode draws one of the orders; in evaluation mode p(x | z) is the mean
    over all of them. z gives an image of its own, which pixels see around them on all sides.

    Args:
        latents: dimensions of z, or 0.
        width: units of the two hidden layers between z and its image.
        channels, blocks: of the convolutions within blocks, half of those between them; every second is dilated.
        orders: how many of the eight.
        size: pixels of a row.
    """

    turn: Tensor

    def __init__(self, latents: int, width: int, channels: int, blocks: int, orders: int, size: int = 28) -> None:
        super().__init__()
        self.orders, self.size = orders, size
        self.first = LocallyMaskedConv(2, 2 * channels, centre=False)
        self.blocks = nn.ModuleList(_Block(channels, 1 + number % 2) for number in range(blocks))
        self.outputs = nn.Sequential(nn.LeakyReLU(), nn.Conv2d(2 * channels, 1, 1))
        if latents:
            self.image = nn.Sequential(mlp([latents, width, width], norm=False), nn.Linear(width, size**2))
            self.from_image = nn.Conv2d(1, 2 * channels, 3, padding=1)
        self.register_buffer("turn", torch.zeros((), dtype=torch.long))  # so that training that goes on draws the same

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Logits (*sample, batch, pixels); in evaluation mode those of each order, (orders, *sample, batch, pixels).

        z (*sample, batch, latents), x (batch, pixels).
        """
        if self.training:
            self.turn += 1
            return self.along(random.Random(int(self.turn)).randrange(self.orders), z, x)
        found = [self.along(which, z, x) for which in range(self.orders)]
        return found[0] if self.orders == 1 else torch.stack(found)

    def along(self, which: int, z: Tensor, x: Tensor) -> Tensor:
        """The logits of one order."""
        x = x.unflatten(-1, (1, self.size, self.size))
        h = self.first(torch.cat([x, torch.ones_like(x)], 1), which)
        if z.shape[-1]:
            image = self.image(z.flatten(0, -2)).unflatten(-1, (1, self.size, self.size))
            h = (h + self.from_image(image).unflatten(0, z.shape[:-1])).flatten(0, -4)
        h = h.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, which)
        logits: Tensor = self.outputs(h).flatten(1)
        return logits.unflatten(0, z.shape[:-1]) if z.shape[-1] else logits.expand(*z.shape[:-1], -1)

    @torch.no_grad()
    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An image of 0 and 1 for each z, drawn pixel by pixel along one of the orders: (*batch, pixels)."""
        flat, device = z.flatten(0, -2), z.device if generator is None else generator.device
        which = int(torch.randint(self.orders, (), generator=generator, device=device))
        x = z.new_zeros(len(flat), self.size**2)
        for pixel in s_curve(which, self.size).flatten().argsort().tolist():
            probability = torch.sigmoid(self.along(which, flat, x)[:, pixel])
            x[:, pixel] = (draw_like(torch.rand, probability, generator) < probability).to(x)
        return x.unflatten(0, z.shape[:-1])


class Autoregressive(Description):
    """The description of an `AutoregressiveDecoder`."""

    def build(self, latents: int, width: int) -> nn.Module:
        """As for `vae.Independent`."""
        return AutoregressiveDecoder(latents, width)


class LocallyMasked(Description):
    """The description of a `LocallyMaskedDecoder`.

    Attributes:
        channels, blocks, orders: as there.
    """

    channels: Size = 24
    blocks: Size = 6
    orders: Annotated[int, Whole(1, 8)] = 8

    without_latents = True

    def build(self, latents: int, width: int) -> nn.Module:
        """As for `vae.Independent`."""
        return LocallyMaskedDecoder(latents, width, self.channels, self.blocks, self.orders)
