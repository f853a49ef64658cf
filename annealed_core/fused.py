"""Fused transitions: those of a stack of pairs of Gaussians, with their gradient written out by hand.

What `kernels.GaussianPair` computes one by one, T transitions of M models do here in as few operations as eager torch
allows, forwards and backwards: at the sizes of the toys, most time would else go into bookkeeping. Tests compare both.

Arrays are (T, M, features, samples), and every state carries a row of ones below its coordinates, so that a layer's
bias is one more column of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from annealed_core.kernels import SMALLEST_SCALE


class Gated:
    """The head of `kernels.GatedGaussian`: mu = z + g (m - z), sigma = softplus(s), along the features (axis -2)."""

    parts = 3

    @staticmethod
    def locate(z: Tensor, outputs: Tensor, scale: Tensor) -> Tensor:
        """Mu, and sigma into `scale`."""
        move, gate, spread = outputs.chunk(3, -2)
        torch.add(softplus(spread), SMALLEST_SCALE, out=scale)
        return torch.lerp(z, move, torch.sigmoid(gate))

    @staticmethod
    def slopes(z: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of mu, mu, sigma by m, the gate and s, as the outputs are laid out; and of mu by z."""
        move, gate, spread = outputs.chunk(3, -2)
        share = torch.sigmoid(gate)
        stay = 1 - share
        return torch.cat([share, (move - z).mul_(share).mul_(stay), torch.sigmoid(spread)], -2), stay


class Residual:
    """The head of `kernels.ResidualGaussian`: mu = z + m, sigma = softplus(s)."""

    parts = 2

    @staticmethod
    def locate(z: Tensor, outputs: Tensor, scale: Tensor) -> Tensor:
        """As for `Gated`."""
        move, spread = outputs.chunk(2, -2)
        torch.add(softplus(spread), SMALLEST_SCALE, out=scale)
        return z + move

    @staticmethod
    def slopes(z: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """As for `Gated`."""
        one = torch.ones_like(z)
        return torch.cat([one, torch.sigmoid(outputs.chunk(2, -2)[1])], -2), one


def _network(states: Tensor, weights: Sequence[Tensor], hidden: Tensor, outputs: Tensor) -> None:
    """States with their row of ones (N, dim + 1, S) -> hidden layer (N, H, S), outputs (N, parts * dim, S)."""
    inner, outer, bias = weights
    torch.bmm(inner, states, out=hidden).relu_()
    torch.baddbmm(bias, outer, hidden, out=outputs)


def _into_hidden(outer: Tensor, d_outputs: Tensor, hidden: Tensor, d_hidden: Tensor) -> None:
    """The gradient of the outputs -> that of the hidden layer before its rectifier, into `d_hidden`."""
    torch.bmm(outer.mT, d_outputs, out=d_hidden)
    torch.ops.aten.threshold_backward.grad_input(d_hidden, hidden, 0, grad_input=d_hidden)


def _into_weights(states: Tensor, hidden: Tensor, d_hidden: Tensor, d_outputs: Tensor) -> list[Tensor]:
    """Gradients of the three weights, over all transitions at once."""
    states, hidden, d_hidden, d_outputs = (x.flatten(0, 1) for x in (states, hidden, d_hidden, d_outputs))
    return [torch.bmm(d_hidden, states.mT), torch.bmm(d_outputs, hidden.mT), d_outputs.sum(-1, keepdim=True)]


class Transitions(torch.autograd.Function):
    """Start (M, dim, S), noise (T, M, dim, S), six weights -> states (T + 1, M, dim, S), log-ratios (T, M, S).

    The weights are those of the forward and of the reverse conditionals, each of three parts: of the hidden layer with
    its bias as last column (T, M, H, dim + 1), of the outputs (T, M, parts * dim, H) and their bias
    (T, M, parts * dim, 1). With `local`, no gradient passes from one transition to the one before.
    """

    @staticmethod
    def forward(ctx: Any, start: Tensor, noise: Tensor, local: bool, head: Any, *weights: Tensor) -> Any:
        """See the class."""
        steps, models, dim, samples = noise.shape
        width, n_outputs = weights[0].shape[2], weights[1].shape[2]
        states = noise.new_empty((steps + 1, models, dim + 1, samples))
        hidden, back_hidden = (noise.new_empty((steps, models, width, samples)) for _ in range(2))
        outputs, back_outputs = (noise.new_empty((steps, models, n_outputs, samples)) for _ in range(2))
        scale = torch.empty_like(noise)
        states[:, :, dim] = 1
        z = states[:, :, :dim]
        z[0] = start
        parts = (states[:-1], z[:-1], z[1:], hidden, outputs, scale, noise, *weights[:3])
        for inputs, before, after, inner, outer, spread, fresh, *layers in zip(
            *(x.unbind() for x in parts), strict=True
        ):
            _network(inputs, layers, inner, outer)
            loc = head.locate(before, outer, spread)
            torch.addcmul(loc, spread, fresh, out=after)
        _network(
            states[1:].flatten(0, 1),
            [w.flatten(0, 1) for w in weights[3:]],
            back_hidden.flatten(0, 1),
            back_outputs.flatten(0, 1),
        )
        back_scale = torch.empty_like(noise)
        error = torch.sub(z[:-1], head.locate(z[1:], back_outputs, back_scale)).div_(back_scale)
        # log r - log q of two Gaussians: their constants cancel
        squares = torch.addcmul(error * error, noise, noise, value=-1)
        log_ratios = (scale / back_scale).log_().sub_(squares, alpha=0.5).sum(-2)
        ctx.local, ctx.head, ctx.weights = local, head, weights
        # Kept as they are: save_for_backward would guard them against changes in place, for a tenth of the whole time.
        ctx.kept = states, noise, hidden, outputs, scale, back_hidden, back_outputs, back_scale, error
        return z.clone(), log_ratios

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor, d_ratios: Tensor) -> Any:
        """See the class."""
        states, noise, hidden, outputs, scale, back_hidden, back_outputs, back_scale, error = ctx.kept
        weights = ctx.weights
        d_states, d_ratios = d_states.contiguous(), d_ratios.contiguous()  # samples last, whatever came before
        dim, times = noise.shape[2], ctx.head.parts - 1  # all but the last of the outputs make mu
        z, inputs, ratios = states[:, :, :dim], states[:-1], d_ratios.unsqueeze(-2)
        d_hidden, d_back_hidden = torch.empty_like(hidden), torch.empty_like(hidden)

        # The reverse conditionals, all at once. Each sees z_t, and weighs z_{t-1}.
        slopes, stay = ctx.head.slopes(z[1:], back_outputs)
        d_loc = (ratios * error).div_(back_scale)
        d_scale = torch.addcmul(-ratios, ratios, error * error).div_(back_scale)
        d_back_outputs = torch.cat([*[d_loc] * times, d_scale], -2).mul_(slopes)
        inner, outer = weights[3].flatten(0, 1), weights[4].flatten(0, 1)
        _into_hidden(outer, *(x.flatten(0, 1) for x in (d_back_outputs, back_hidden, d_back_hidden)))
        d_seen = torch.bmm(inner[:, :, :dim].mT, d_back_hidden.flatten(0, 1)).view_as(stay).addcmul_(d_loc, stay)
        d_own = torch.cat([d_states[:1], d_states[1:] + d_seen])

        # The forward conditionals: at once where they are cut off from each other, else from the last to the first.
        slopes, stay = ctx.head.slopes(z[:-1], outputs)
        d_scale = ratios / scale
        if ctx.local:
            d_z = d_own[0]
            d_outputs = torch.cat([*[d_own[1:]] * times, d_scale.addcmul_(d_own[1:], noise)], -2).mul_(slopes)
            flat = (x.flatten(0, 1) for x in (weights[1], d_outputs, hidden, d_hidden))
            _into_hidden(*flat)
        else:
            d_own[:-1] -= d_loc
            d_z, d_outputs = d_own[-1], torch.empty_like(outputs)
            parts = (weights[0], weights[1], d_own[:-1], stay, slopes, noise, hidden, d_scale, d_hidden, d_outputs)
            for inner, outer, own, remain, slope, fresh, *places in reversed(
                list(zip(*map(torch.unbind, parts), strict=True))
            ):
                layer, d_sigma, d_layer, d_out = places
                torch.cat([*[d_z] * times, d_sigma.addcmul_(d_z, fresh)], -2, out=d_out).mul_(slope)
                _into_hidden(outer, d_out, layer, d_layer)
                d_z = torch.baddbmm(own, inner[:, :, :dim].mT, d_layer).addcmul_(d_z, remain)
        gradients = _into_weights(inputs, hidden, d_hidden, d_outputs)
        gradients += _into_weights(states[1:], back_hidden, d_back_hidden, d_back_outputs)
        return (d_z, None, None, None, *(each.view_as(w) for each, w in zip(gradients, weights, strict=True)))


def plain_transitions(
    start: Tensor, noise: Tensor, local: bool, locate: Callable[..., tuple[Tensor, Tensor]], weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """What `Transitions` computes, in plain words and with autograd's gradient: this is what `torch.compile` is given.

    `locate` is that of the conditionals in `kernels`; shapes are those of `Transitions`.
    """
    dim = start.shape[-2]

    def conditional(z: Tensor, inner: Tensor, outer: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(torch.baddbmm(inner[:, :, dim:], inner[:, :, :dim], z))
        return locate(z, *torch.baddbmm(bias, outer, hidden).chunk(len(bias[0]) // dim, -2))

    states, log_ratios = [start], []
    for fresh, *layers in zip(noise, *weights, strict=True):
        z = states[-1].detach() if local else states[-1]
        loc, scale = conditional(z, *layers[:3])
        z_next = loc + scale * fresh
        back_loc, back_scale = conditional(z_next, *layers[3:])
        error = (z - back_loc) / back_scale
        log_ratios.append((torch.log(scale / back_scale) - 0.5 * (error.square() - fresh.square())).sum(-2))
        states.append(z_next)
    return torch.stack(states), torch.stack(log_ratios)
