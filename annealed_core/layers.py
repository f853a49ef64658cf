"""What an auto-encoder spends its time on, in few passes and with gradients written out.

    through(x, layers, last)                        # hidden layers with batch normalisation, and a linear one
    log_likelihood(z, layers, last, x)              # such a network as Bernoulli decoder: its log p(x | z)
    frozen_log_likelihood(z, layers, last, x)       # of a decoder that does not learn
    softplus(x), sum_softplus(x)

Values and gradients are those of the plain operations, up to rounding. Gradients are of the first order; under the
transforms of torch.func, which can't look into what is here, the plain operations take its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import leaky_relu, leaky_relu_

from annealed_core.products import linear, product

_ROWS = 512  # of a frozen decoder at a time: their logits stay in a core's cache
_NEXT_TO_NOTHING = 1e-25
_leaky_relu_backward = torch.ops.aten.leaky_relu_backward

#: A linear layer, the normalisation after it, and the slope of the leaky ReLU after that.
Normalised = tuple[nn.Linear, nn.BatchNorm1d, float]
#: Weight, bias, and the slope of the leaky ReLU after them.
Folded = tuple[Tensor, Tensor, float]


def are_transforms_active() -> bool:
    """Whether a transform of torch.func is under way."""
    return bool(torch._C._are_functorch_transforms_active())


def can_train(layers: Sequence[Normalised]) -> bool:
    """Whether `through` and `log_likelihood` take these layers: in training mode, with a moving average, on a CPU."""
    ready = all(
        norm.training
        and norm.momentum is not None
        and norm.running_mean is not None
        and layer.weight.device.type == "cpu"
        for layer, norm, _ in layers
    )
    return ready and torch.is_grad_enabled() and not are_transforms_active()


def _tensors(layers: Sequence[Normalised], last: nn.Linear) -> list[Tensor]:
    """All that has a gradient: (weight, bias, gain, shift) of each layer, then weight and bias of the last one."""
    found = [(linear.weight, linear.bias, norm.weight, norm.bias) for linear, norm, _ in layers]
    return [*(tensor for each in found for tensor in each), last.weight, last.bias]


def through(x: Tensor, layers: Sequence[Normalised], last: nn.Linear) -> tuple[Tensor, Tensor]:
    """A network in training mode: its output (n, size_out) and its last hidden layer (n, width), of x (n, size_in).

    Running statistics move as they do elsewhere. See `can_train`.
    """
    return _Through.apply(x, layers, *_tensors(layers, last))


class _Through(torch.autograd.Function):
    """`through`, with the gradient of all its layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Normalised], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        hidden, kept = _hidden(x, layers)
        weight, bias = tensors[-2:]
        ctx.layers = layers
        ctx.save_for_backward(x, *tensors, *kept)
        return product(hidden, weight, bias), hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor, of_hidden: Tensor) -> tuple[Tensor | None, ...]:
        n_tensors = 4 * len(ctx.layers) + 2
        x, *saved = ctx.saved_tensors
        tensors, kept = saved[:n_tensors], saved[n_tensors:]
        of_output = of_output.contiguous()
        gradient = product(of_output, tensors[-2].t()).add_(of_hidden)
        of_last = product(of_output.t(), kept[-1].t()), of_output.sum(0)
        of_x, of_layers = _hidden_backward(gradient, x, ctx.layers, tensors, kept, ctx.needs_input_grad[0])
        return of_x, None, *of_layers, *of_last


def _hidden(x: Tensor, layers: Sequence[Normalised]) -> tuple[Tensor, list[Tensor]]:
    """The last hidden layer, and of each layer what its gradient takes: before and after it, mean, 1 / deviation."""
    if len(x) < 2:
        raise ValueError(f"batch normalisation in training takes at least 2 rows, got {len(x)}")
    kept: list[Tensor] = []
    for layer, norm, slope in layers:
        assert norm.num_batches_tracked is not None and norm.momentum is not None
        norm.num_batches_tracked.add_(1)
        summed = product(x, layer.weight, layer.bias)
        statistics = norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        normed, mean, inverse = torch.native_batch_norm(summed, norm.weight, norm.bias, *statistics)
        x = leaky_relu_(normed, slope)
        kept += [summed, mean, inverse, x]
    return x, kept


def _hidden_backward(
    gradient: Tensor,
    x: Tensor,
    layers: Sequence[Normalised],
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    wants_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """From the gradient of the last hidden layer that of x, if wanted, and those of weights, biases, gains, shifts."""
    found: list[Tensor] = []
    of_x: Tensor | None = gradient
    for number in reversed(range(len(layers))):
        weight, _, gain, _ = tensors[4 * number : 4 * number + 4]
        summed, mean, inverse, values = kept[4 * number : 4 * number + 4]
        _, norm, slope = layers[number]
        before = kept[4 * number - 1] if number else x
        # The values have the signs of what the leaky ReLU was given.
        gradient = _leaky_relu_backward(gradient, values, slope, True)
        gradient, of_gain, of_shift = torch.ops.aten.native_batch_norm_backward(
            gradient, summed, gain, None, None, mean, inverse, True, norm.eps, [True, True, True]
        )
        found = [product(gradient.t(), before.t()), gradient.sum(0), of_gain, of_shift, *found]
        of_x = gradient = product(gradient, weight.t()) if number or wants_x else gradient
    return of_x if wants_x else None, found


def softplus(x: Tensor) -> Tensor:
    """Log(1 + exp(x)), in a fifth of the time of torch's where x is a part of a larger tensor."""
    if are_transforms_active() or torch.compiler.is_compiling():
        return nn.functional.softplus(x)
    return _Softplus.apply(x)


class _Softplus(torch.autograd.Function):
    """Softplus(x), which is never below x, and beyond 80 is x up to rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        values = x.clamp_max(80).exp_().log1p_()
        return torch.maximum(values, x, out=values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.sigmoid(ctx.saved_tensors[0])


def sum_softplus(logits: Tensor) -> Tensor:
    """Log(1 + exp(logits)) summed over the last dimension, in less time than by softplus: (*batch, n) -> (*batch,)."""
    if are_transforms_active():
        return nn.functional.softplus(logits).sum(-1)
    return _SumSoftplus.apply(logits)


class _SumSoftplus(torch.autograd.Function):
    """Softplus(l) = max(l, 0) - log s, where s = sigmoid(|l|) lies between 1/2 and 1.

    Many s can be multiplied before one logarithm is taken of them all, which is where the time goes else.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            ones = torch.sigmoid(logits)
            ctx.save_for_backward(logits, ones)
            likelier = _likelier(ones)
        else:
            likelier = logits.abs().sigmoid_()
        return logits.clamp_min(0).sum(-1) - _sum_log(likelier)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        logits, ones = ctx.saved_tensors
        slope = torch.sigmoid(logits) if torch.is_grad_enabled() else ones  # anew where it is differentiated again
        return gradient.unsqueeze(-1) * slope


def sum_centred_softplus(logits: Tensor) -> Tensor:
    """Softplus(l) - l / 2 = |l| / 2 - log sigmoid(|l|), summed over the last dimension: (*batch, n) -> (*batch,).

    Where no gradient is recorded it overwrites the logits.
    """
    if torch.is_grad_enabled() or are_transforms_active():
        return sum_softplus(logits) - logits.sum(-1) / 2
    halves = logits.abs_().sum(-1).mul_(0.5)
    return halves.sub_(_sum_log(logits.sigmoid_()))


def _likelier(ones: Tensor) -> Tensor:
    """The probability of the likelier of 1 and 0, where that of 1 is given."""
    zeros = torch.rsub(ones, 1)
    return torch.maximum(ones, zeros, out=zeros)


def _sum_log(halves: Tensor) -> Tensor:
    """The sum over the last dimension of the logarithms of numbers from 1/2 to 1."""
    many = max(1, int(-math.log2(torch.finfo(halves.dtype).tiny)) * 8 // 9)  # so many 1/2 are no underflow
    if halves.shape[-1] % many == 0:  # 784 pixels in float32: seven parts
        return halves.unflatten(-1, (-1, many)).prod(-1).log_().sum(-1)
    return torch.stack([part.prod(-1) for part in halves.split(many, -1)]).log_().sum(0)


def _value_and_slope(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x) in nats, (..., batch), and its gradient with respect to the logits, which are overwritten."""
    ones = torch.sigmoid(logits)
    values = (logits * x).sum(-1) + _sum_log(_likelier(ones))
    values -= logits.clamp_min_(0).sum(-1)
    return values, torch.sub(x, ones, out=ones)


def log_likelihood(z: Tensor, layers: Sequence[Normalised], last: nn.Linear, x: Tensor) -> Tensor:
    """Log p(x | z) in nats of independent Bernoulli pixels, whose logits are what `through` makes of z.

    z (*sample, batch, latents), x (batch, pixels) -> (*sample, batch). See `can_train`.
    """
    return _LogLikelihood.apply(z, layers, x, *_tensors(layers, last))


class _LogLikelihood(torch.autograd.Function):
    """`log_likelihood`: of the logits their gradient, x - sigmoid, is kept, and nothing else."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, layers: Sequence[Normalised], x: Tensor, *tensors: Tensor) -> Tensor:
        rows = z.flatten(0, -2)
        hidden, kept = _hidden(rows, layers)
        values, slope = _value_and_slope(product(hidden, *tensors[-2:]).unflatten(0, z.shape[:-1]), x)
        ctx.layers = layers
        ctx.save_for_backward(rows, slope, *tensors, *kept)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        n_tensors = 4 * len(ctx.layers) + 2
        rows, slope, *saved = ctx.saved_tensors
        tensors, kept = saved[:n_tensors], saved[n_tensors:]
        # Draws that count for next to nothing, as most of an importance-weighted bound do at first, count for nothing:
        # numbers at the end of the floating range take many times as long.
        gradient = torch.where(gradient.abs() < _NEXT_TO_NOTHING, 0.0, gradient)
        of_logits = (slope * gradient.unsqueeze(-1)).flatten(0, -2)
        of_last = product(of_logits.t(), kept[-1].t()), of_logits.sum(0)
        of_hidden = product(of_logits, tensors[-2].t())
        of_z, of_layers = _hidden_backward(of_hidden, rows, ctx.layers, tensors, kept, ctx.needs_input_grad[0])
        return None if of_z is None else of_z.unflatten(0, slope.shape[:-1]), None, None, *of_layers, *of_last


def frozen_log_likelihood(z: Tensor, layers: Sequence[Folded], last: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Log p(x | z) in nats of a decoder that does not learn: (*sample, batch, latents) -> (*sample, batch).

    Its gradient reaches z alone, and is taken at once with the values, while what it needs is in the cache.

    Args:
        z: latents.
        layers: hidden layers, with batch normalisation folded into them.
        last: weight and bias of the logits.
        x: images (batch, pixels).
    """
    if are_transforms_active():
        hidden = z.flatten(0, -2)
        for weight, bias, slope in layers:
            hidden = leaky_relu(linear(hidden, weight, bias), slope)
        logits = linear(hidden, *last).unflatten(0, z.shape[:-1])
        return (logits * x).sum(-1) - sum_softplus(logits)
    return _FrozenLogLikelihood.apply(z, layers, last, x)


class _FrozenLogLikelihood(torch.autograd.Function):
    """`frozen_log_likelihood`: what is kept for the backward pass is the gradient itself."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, layers: Sequence[Folded], last: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        samples = z.reshape(-1, *z.shape[-2:])
        parts = [_decoded(some, layers, last, x, ctx.needs_input_grad[0]) for some in samples.split(_at_a_time(x))]
        values, gradients = zip(*parts, strict=True)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients).view_as(z))
        return torch.cat(values).view(z.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_z,) = ctx.saved_tensors
        return of_z * gradient.unsqueeze(-1), None, None, None


def _at_a_time(x: Tensor) -> int:
    """Samples for each image that are decoded together."""
    return max(1, _ROWS // len(x))


def _decoded(
    z: Tensor, layers: Sequence[Folded], last: tuple[Tensor, Tensor], x: Tensor, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Log p(x | z), (n, batch), of z (n, batch, latents), and its gradient (n * batch, latents), if that is wanted."""
    hidden, kept = z.flatten(0, 1), []
    for weight, bias, slope in layers:
        hidden = leaky_relu_(product(hidden, weight, bias), slope)
        kept.append(hidden)
    values, of_logits = _value_and_slope(product(hidden, *last).unflatten(0, z.shape[:-1]), x)
    if not wants_gradient:
        return values, hidden[:0]
    gradient = product(of_logits.flatten(0, 1), last[0].t())
    for (weight, _, slope), hidden in zip(reversed(layers), reversed(kept), strict=True):
        gradient = product(_leaky_relu_backward(gradient, hidden, slope, True), weight.t())
    return values, gradient
