"""Pairs of Gaussians with a context: what waits for no draw is computed at once.

That is the context's part of all conditionals, and the reverse conditionals.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from annealed_core.chain import Chain, Shape, Trajectory
from annealed_core.kernels import Frozen, GaussianPair, drawn_log_prob, normal_log_prob


class PairChain(Chain):
    """A `Chain` that takes less time where all its kernels are pairs of Gaussians of one kind and size with a context.

    With other kernels it is a `Chain`.
    """

    def rsample(self, sample_shape: Shape = (), noise: Tensor | None = None, local: bool = False) -> Trajectory:
        """As of `Chain`."""
        pairs = _alike(self.kernels)
        if not pairs or self.context is None:
            return super().rsample(sample_shape, noise, local)
        noise = self.noise(sample_shape) if noise is None else noise
        forwards, reverse = [pair.forwards for pair in pairs], [pair.reverse for pair in pairs]
        frozen = isinstance(self.kernels[0], Frozen)
        there, back = _from_context([*forwards, *reverse], self.context, frozen).chunk(2)
        z, scales = self.base.rsample(noise[0]), []
        states = [z]
        for conditional, added, fresh in zip(forwards, there, noise[1:], strict=True):
            loc, scale = _conditional(conditional, z.detach() if local else z, added, frozen)
            z = loc + scale * fresh
            states.append(z)
            scales.append(scale)
        drawn = torch.stack(states)
        before = drawn[:-1].detach() if local else drawn[:-1]
        log_reverse = normal_log_prob(before, *_together(reverse, drawn[1:], back, frozen))
        log_ratios = log_reverse - drawn_log_prob(noise[1:], torch.stack(scales))
        return Trajectory(drawn, log_ratios, self.base.drawn_log_prob(noise[0]))


def _alike(kernels: Any) -> list[Any]:
    """The pairs of Gaussians that the kernels are, all frozen or none; an empty list where they aren't alike."""
    pairs: list[Any] = [kernel.network[0] if isinstance(kernel, Frozen) else kernel for kernel in kernels]
    if not all(isinstance(pair, GaussianPair) and type(pair).forward is GaussianPair.forward for pair in pairs):
        return []
    kinds = {(type(kernel), type(pair), _shapes(pair)) for kernel, pair in zip(kernels, pairs, strict=True)}
    return pairs if len(kinds) == 1 and pairs[0].forwards.context is not None else []


def _shapes(pair: nn.Module) -> tuple[Any, ...]:
    return tuple(parameter.shape for parameter in pair.parameters())


def _weights(layers: list[Any], name: str, frozen: bool) -> Tensor:
    """The weights or biases of that name of all layers: (number, ...)."""
    found = torch.stack([getattr(layer, name) for layer in layers])
    return found.detach() if frozen else found


def _from_context(conditionals: list[Any], context: Tensor, frozen: bool) -> Tensor:
    """What the context adds to each conditional's hidden layer, with its bias: (number, *batch, hidden)."""
    weights = _weights([each.context for each in conditionals], "weight", frozen).flatten(0, 1)
    biases = _weights([each.hidden for each in conditionals], "bias", frozen).flatten()
    return linear(context, weights, biases).unflatten(-1, (len(conditionals), -1)).movedim(-2, 0)


def _conditional(conditional: Any, z: Tensor, added: Tensor, frozen: bool) -> tuple[Tensor, Tensor]:
    """Mu and sigma of one conditional, as `kernels.ConditionalGaussian` has them; z (*sample, *batch, dim)."""
    layers = [conditional.hidden.weight, conditional.outputs.weight, conditional.outputs.bias]
    inwards, outwards, bias = (layer.detach() for layer in layers) if frozen else layers
    hidden = torch.relu(linear(z, inwards) + added)
    return conditional.locate(z, *linear(hidden, outwards, bias).chunk(conditional.outputs_per_dim, -1))


def _together(conditionals: list[Any], z: Tensor, added: Tensor, frozen: bool) -> tuple[Tensor, Tensor]:
    """Mu and sigma of all T at once: z (T, *sample, *batch, dim), added (T, *batch, hidden) -> two like z."""
    inwards = _weights([each.hidden for each in conditionals], "weight", frozen)
    outwards = _weights([each.outputs for each in conditionals], "weight", frozen)
    biases = _weights([each.outputs for each in conditionals], "bias", frozen)
    added = added.view(len(z), *[1] * (z.ndim - added.ndim), *added.shape[1:])
    hidden = torch.relu(torch.bmm(z.flatten(1, -2), inwards.mT).view(*z.shape[:-1], -1) + added)
    outputs = torch.baddbmm(biases.unsqueeze(1), hidden.flatten(1, -2), outwards.mT).view(*z.shape[:-1], -1)
    return conditionals[0].locate(z, *outputs.chunk(conditionals[0].outputs_per_dim, -1))
