"""Flows: invertible kernels, whose weight is the change of volume.

A flow's reverse is its inverse: log r(z | z_next) - log q(z_next | z) = log |det d z_next / d z|. So flows answer the
call of `kernels`, `z_next, log_ratio = kernel(z, context, noise)`, ignore the noise, and stand in a chain as any other
kernel does. The autoregressive ones are the library zuko's (github.com/probabilists/zuko).

A context (*batch, context_dim), where there is one, decides on the coefficients of planar and Householder flows, and
is one more input of the others' networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform
from zuko.utils import unpack


class _Coefficients(nn.Module):
    """Numbers that are trained and, given a context, shifted by a linear function of it."""

    def __init__(self, start: Tensor, context_dim: int) -> None:
        super().__init__()
        self.free = nn.Parameter(start)
        self.context = nn.Linear(context_dim, len(start), bias=False) if context_dim else None

    def forward(self, context: Tensor | None) -> Tensor:
        return self.free if self.context is None else self.free + self.context(context)


class Planar(nn.Module):
    """z' = z + u tanh(w.z + b): squeezes or stretches along one direction (Rezende & Mohamed 2015, arXiv 1505.05770).

    Invertible because u is moved along w until u.w = softplus(c + log(e - 1)) - 1 > -1, where c is their product
    before. The paper's appendix has softplus(c) - 1; shifted, a kernel with u = 0 is the identity. The inverse has no
    formula, but takes the root of an equation in one number, w.z.

    Args:
        dim: dimensions of z.
        context_dim: dimensions of the context (0: none).
        scale: z is divided by it before, and z' multiplied by it after: about the base's standard deviation.
    """

    scale: Tensor

    def __init__(self, dim: int, context_dim: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", torch.tensor(float(scale)))  # a buffer: stacked models may differ in it
        start = torch.cat([0.1 * torch.randn(dim), torch.randn(dim) / math.sqrt(dim), torch.zeros(1)])
        self.coefficients = _Coefficients(start, context_dim)

    def forward(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log |1 + u.w (1 - tanh^2)| (*batch,) in nats."""
        u, w, b, allowed = self._allowed(context)
        bend = torch.tanh((w * z).sum(-1, keepdim=True) / self.scale + b)
        return z + self.scale * u * bend, torch.log1p(allowed * (1 - bend.square())).squeeze(-1)

    @torch.no_grad()
    def inverse(self, z_next: Tensor, context: Tensor | None = None) -> Tensor:
        """The z that came to z_next, both (*batch, dim); no gradient reaches it."""
        u, w, b, _ = self._allowed(context)
        # The product of the rounded u and w in double precision, not `allowed`, is what forward has made z_next with.
        product, across = ((w.double() * each.double()).sum(-1, keepdim=True) for each in (u, z_next))
        bend = torch.tanh(_unbend(across / self.scale + b, product.clamp_min(-1)))
        return (z_next - self.scale * u * bend).to(z_next)

    def _allowed(self, context: Tensor | None) -> tuple[Tensor, ...]:
        """The u that is allowed, w, b, and u.w."""
        u, w, b = self.coefficients(context).split([self.dim, self.dim, 1], -1)
        product = (u * w).sum(-1, keepdim=True)
        allowed = softplus(product + math.log(math.e - 1)) - 1
        return u + (allowed - product) * w / w.square().sum(-1, keepdim=True), w, b, allowed


def _unbend(bent: Tensor, product: Tensor) -> Tensor:
    """The s with s + product * tanh(s) = bent, for product >= -1, all in double precision.

    For s > 0 the left side is convex where product < 0 and concave where it is > 0. From an s that is too large there,
    or too small here, Newton's steps cannot overshoot.
    """
    size = bent.abs()
    s = torch.where(product > 0, torch.maximum(size - product, size / (1 + product)), size - product)
    for _ in range(100):  # six are typical, fifty where product is -1 and bent 0
        bend = torch.tanh(s)
        step = (s + product * bend - size) / ((1 + product) - product * bend.square())
        s = s - step
        if (step.abs() <= 1e-15 * (1 + s)).all():
            break
    return s.copysign(bent)


class Householder(nn.Module):
    """z' = z - 2 v (v.z) / |v|^2: a reflection, which keeps volume (Tomczak & Welling 2016, arXiv 1611.09630).

    Here v depends on the context alone; `HouseholderSequence` has the paper's way. Without a context it changes nothing
    of an isotropic base. It is its own inverse.

    Args:
        dim: dimensions of z.
        context_dim: dimensions of the context (0: none).
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.coefficients = _Coefficients(torch.randn(dim), context_dim)

    def forward(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), zeros (*batch,)."""
        z_next = _reflect(z, self.coefficients(context))
        return z_next, z_next.new_zeros(z_next.shape[:-1])

    def inverse(self, z_next: Tensor, context: Tensor | None = None) -> Tensor:
        """The z that came to z_next, both (*batch, dim)."""
        return self(z_next, context)[0]


def _reflect(z: Tensor, v: Tensor) -> Tensor:
    return z - 2 * v * (v * z).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)


class HouseholderSequence(nn.Module):
    """Several reflections, each along a v that is a linear function of the v before it, the first of the context.

    As in Tomczak & Welling 2016 (arXiv 1611.09630): v_1 = W_1 context + b_1, v_t = W_t v_{t-1} + b_t.

    Args:
        dim: dimensions of z.
        length: number of reflections, at least 1.
        context_dim: dimensions of the context (0: none, v_1 is trained by itself).
    """

    def __init__(self, dim: int, length: int, context_dim: int = 0) -> None:
        super().__init__()
        self.first = _Coefficients(torch.randn(dim), context_dim)
        self.rest = nn.ModuleList(nn.Linear(dim, dim) for _ in range(length - 1))

    def _directions(self, context: Tensor | None) -> list[Tensor]:
        found = [self.first(context)]
        for layer in self.rest:
            found.append(layer(found[-1]))
        return found

    def forward(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), zeros (*batch,)."""
        for v in self._directions(context):
            z = _reflect(z, v)
        return z, z.new_zeros(z.shape[:-1])

    def inverse(self, z_next: Tensor, context: Tensor | None = None) -> Tensor:
        """The z that came to z_next, both (*batch, dim)."""
        for v in reversed(self._directions(context)):
            z_next = _reflect(z_next, v)
        return z_next


class _Autoregressive(nn.Module):
    """z_i' = g(z_i; h_i(z_1 ... z_{i-1}, context)) with g monotone in z_i: one pass forwards, `dim` passes back.

    Starts as the library does, close to the identity: an output layer of a tenth or a hundredth of the size was no
    consistent gain on energies D and F and the ring.
    """

    scale: Tensor

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        reverse: bool,
        context_dim: int,
        scale: float,
        univariate: Callable[..., Any],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.transform = MaskedAutoregressiveTransform(
            dim,
            context_dim,
            order=torch.arange(dim).flip(0) if reverse else torch.arange(dim),
            univariate=univariate,
            shapes=shapes,
            hidden_features=hidden,
        )
        if dim == 1 and not context_dim:  # no network: plain numbers, which the library starts at standard normal
            with torch.no_grad():
                for parameter in self.transform.parameters():
                    parameter.mul_(0.1)

    def forward(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log |det d z_next / d z| (*batch,) in nats."""
        z_next, log_ratio = self.transform(context).call_and_ladj(z / self.scale)
        return self.scale * z_next, log_ratio

    def inverse(self, z_next: Tensor, context: Tensor | None = None) -> Tensor:
        """The z that came to z_next, both (*batch, dim).

        Takes `dim` passes through the network where gradients are recorded, and the work of one where they are not.
        """
        if torch.is_grad_enabled() or z_next.shape[-1] == 1:
            return self.scale * self.transform(context).inv(z_next / self.scale)
        return self.scale * _inverse_in_one_pass(self.transform, z_next / self.scale, context)


def _inverse_in_one_pass(transform: Any, z_next: Tensor, context: Tensor | None) -> Tensor:
    """The inverse of the library's transform in two dimensions or more: each unit of its network is computed once.

    Latents, and units of each layer, are sorted by how many latents must be known before them: those known are a slice.
    """
    dim, device = z_next.shape[-1], z_next.device
    batch = z_next.shape[:-1] if context is None else torch.broadcast_shapes(z_next.shape[:-1], context.shape[:-1])
    layers: list[Any] = [layer for layer in transform.hyper if isinstance(layer, nn.Linear)]
    by_need, needs = transform.order.argsort(), torch.arange(1, dim + 1, device=device)
    given = z_next.expand(*batch, dim).reshape(-1, dim).T[by_need]
    units, weights, ends = [torch.empty_like(given)], [], [list(range(dim))]
    for layer in layers:
        weight, before, bias = layer.mask * layer.weight, by_need, layer.bias
        needs = (layer.mask[:, before] * needs).amax(1)
        if layer is layers[-1]:
            needs = transform.order.repeat_interleave(transform.total)  # each latent's, all in their turn
        if layer is layers[0] and context is not None:
            bias = nn.functional.linear(context, weight[:, dim:], bias)
        by_need = needs.argsort(stable=True)
        needs = needs[by_need]
        units.append(bias.expand(*batch, -1).reshape(len(given[0]), -1).T[by_need].contiguous())
        weights.append(weight[by_need][:, before])
        ends.append(torch.searchsorted(needs, torch.arange(dim, device=device), right=True).tolist())
    for step in range(dim):
        for depth, weight in enumerate(weights, 1):
            fresh, known = slice(ends[depth][step - 1] if step else 0, ends[depth][step]), ends[depth - 1][step]
            sums = units[depth][fresh].addmm_(weight[fresh, :known], units[depth - 1][:known])
            if depth < len(weights):
                sums.relu_()
        univariate = transform.univariate(*unpack(sums.T, transform.shapes))
        units[0][step] = univariate.inv(given[step])
    return units[0][transform.order].T.reshape(*batch, dim)


class InverseAutoregressive(_Autoregressive):
    """z_i' = exp(a_i) z_i + m_i, with a_i and m_i from z_1 ... z_{i-1} (Kingma et al. 2016, arXiv 1606.04934).

    Args:
        dim: dimensions of z; in one dimension and without a context it is an affine map.
        hidden: widths of the masked network that gives a and m; each at least dim - 1, or the last dimensions act on
            none.
        reverse: take the dimensions from the last to the first.
        context_dim: dimensions of the context (0: none).
        scale: z is divided by it before, and z' multiplied by it after: about the base's standard deviation.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (32, 32),
        reverse: bool = False,
        context_dim: int = 0,
        scale: float = 1.0,
    ) -> None:
        # The library bends a_i so that it stays within the logarithm of `slope`; its own 1e-3 is too narrow a funnel.
        univariate = partial(MonotonicAffineTransform, slope=1e-8)
        super().__init__(dim, hidden, reverse, context_dim, scale, univariate, [(), ()])


class Spline(_Autoregressive):
    """Each z_i through a monotone rational-quadratic spline given by z_1 ... z_{i-1} (Durkan et al. 2019).

    arXiv 1906.04032. It maps [-bound * scale, bound * scale] to itself and is the identity outside, so that this
    interval must hold both the base and the target.

    Args:
        dim: dimensions of z; in one dimension and without a context it is a single spline.
        hidden: widths of the masked network that gives the knots, as for `InverseAutoregressive`.
        bins: pieces of each spline.
        bound: half-width of the interval, in units of scale.
        reverse: take the dimensions from the last to the first.
        context_dim: dimensions of the context (0: none).
        scale: z is divided by it before, and z' multiplied by it after: about the base's standard deviation.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (32, 32),
        bins: int = 8,
        bound: float = 5.0,
        reverse: bool = False,
        context_dim: int = 0,
        scale: float = 1.0,
    ) -> None:
        univariate = partial(MonotonicRQSTransform, bound=bound)
        super().__init__(dim, hidden, reverse, context_dim, scale, univariate, [(bins,), (bins,), (bins - 1,)])
