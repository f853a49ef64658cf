"""Flows: invertible kernels, whose weight is the change of volume.

A flow's reverse is its inverse: log r(z | z_next) - log q(z_next | z) = log |det d z_next / d z|. So flows answer the
call of `kernels`, `z_next, log_ratio = kernel(z, context, noise)`, ignore the noise, and stand in a chain as any other
kernel does; `kernel.inverse(z_next, context)` goes back. The autoregressive ones are the library zuko's
(github.com/probabilists/zuko). `Planar`, `Householder`, `IAF` and `Spline` describe them, as `kernels.Gated` does.
A context (*batch, context_dim) shifts the coefficients of planar and Householder flows, and goes into the networks of
the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import softplus

from annealed_core.description import Description, Positive, Size, Whole

_CHECKED = Distribution._validate_args  # zuko turns torch's checks of arguments off, for the whole process
from zuko.flows.autoregressive import MaskedAutoregressiveTransform  # noqa: E402
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform  # noqa: E402

Distribution.set_default_validate_args(_CHECKED)

# The library bends a_i so that it stays within the logarithm of `slope`; its own 1e-3 is too narrow a funnel.
_AFFINE = partial(MonotonicAffineTransform, slope=1e-8)


class _Coefficients(nn.Module):
    """Numbers that are trained and, given a context, shifted by a linear function of it."""

    def __init__(self, start: Tensor, context_dim: int) -> None:
        super().__init__()
        self.free = nn.Parameter(start)
        self.context = nn.Linear(context_dim, len(start), bias=False) if context_dim else None

    def forward(self, context: Tensor | None) -> Tensor:
        return self.free if self.context is None else self.free + self.context(context)


class PlanarFlow(nn.Module):
    """z' = z + u tanh(w.z + b): squeezes or stretches along one direction (Rezende & Mohamed 2015, arXiv 1505.05770).

    Invertible because u is moved along w until u.w = softplus(c + log(e - 1)) - 1 > -1, where c is their product
    before; the paper has softplus(c) - 1, here u = 0 is the identity. The inverse takes the root of an equation in w.z.

    Args:
        dim: dimensions of z.
        context_dim: dimensions of the context (0: none).
        scale: z is divided by it before, and z' multiplied by it after: about the base's standard deviation.
    """

    scale: Tensor

    def __init__(self, dim: int, context_dim: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", torch.tensor(float(scale)))  # models side by side may differ in it
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


class HouseholderSequence(nn.Module):
    """Reflections z' = z - 2 v (v.z) / |v|^2, which keep volume (Tomczak & Welling 2016, arXiv 1611.09630).

    Each is along a v that is a linear function of the v before it: v_1 = W_1 context + b_1, v_t = W_t v_{t-1} + b_t.

    Args:
        dim, context_dim, length: as for `PlanarFlow`; number of reflections.
    """

    def __init__(self, dim: int, context_dim: int = 0, length: int = 1) -> None:
        super().__init__()
        self.first = _Coefficients(torch.randn(dim), context_dim)
        self.rest = nn.ModuleList(nn.Linear(dim, dim) for _ in range(length - 1))

    def _reflected(self, z: Tensor, context: Tensor | None, backwards: bool = False) -> Tensor:
        vectors = list(itertools.accumulate(self.rest, lambda v, layer: layer(v), initial=self.first(context)))
        for v in reversed(vectors) if backwards else vectors:
            z = z - 2 * v * (v * z).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)
        return z

    def forward(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), zeros (*batch,)."""
        return self._reflected(z, context), z.new_zeros(z.shape[:-1])

    def inverse(self, z_next: Tensor, context: Tensor | None = None) -> Tensor:
        """The z that came to z_next, both (*batch, dim)."""
        return self._reflected(z_next, context, backwards=True)


class AutoregressiveFlow(nn.Module):
    """z_i' = exp(a_i) z_i + m_i, with a_i and m_i from z_1 ... z_{i-1} (Kingma et al. 2016, arXiv 1606.04934).

    One pass through a masked network forwards, `dim` passes back. Starts as the library does, close to the identity.

    Args:
        dim: dimensions of z; in one dimension and without a context it is an affine map.
        hidden: widths of the network; each at least dim - 1, or the last dimensions act on none.
        reverse: take the dimensions from the last to the first.
        context_dim: dimensions of the context (0: none).
        scale: as for `PlanarFlow`.
        univariate, shapes: another monotone map of z_i than the affine one, as the library takes it.
    """

    scale: Tensor

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (32, 32),
        reverse: bool = False,
        context_dim: int = 0,
        scale: float = 1.0,
        univariate: Callable[..., Any] = _AFFINE,
        shapes: Sequence[tuple[int, ...]] = ((), ()),
    ) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))
        order, kind = torch.arange(dim), {"univariate": univariate, "shapes": shapes, "hidden_features": hidden}
        self.transform = MaskedAutoregressiveTransform(
            dim, context_dim, order=order.flip(0) if reverse else order, **kind
        )
        if dim == 1 and not context_dim:  # no network: plain numbers, which the library starts at standard normal
            for parameter in self.transform.parameters():
                parameter.data.mul_(0.1)

    def forward(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log |det d z_next / d z| (*batch,) in nats."""
        z_next, log_ratio = self.transform(context).call_and_ladj(z / self.scale)
        return self.scale * z_next, log_ratio

    def inverse(self, z_next: Tensor, context: Tensor | None = None) -> Tensor:
        """The z that came to z_next, both (*batch, dim)."""
        return self.scale * self.transform(context).inv(z_next / self.scale)


class SplineFlow(AutoregressiveFlow):
    """Each z_i through a monotone rational-quadratic spline given by z_1 ... z_{i-1} (Durkan et al. 2019).

    arXiv 1906.04032. It maps [-bound * scale, bound * scale] to itself and is the identity outside, so that this
    interval must hold both the base and the target.

    Args:
        bins: pieces of each spline.
        bound: half-width of the interval, in units of scale.
        dim, hidden, given: with `reverse`, `context_dim` and `scale`, as for `AutoregressiveFlow`.
    """

    def __init__(
        self, dim: int, hidden: Sequence[int] = (32, 32), bins: int = 8, bound: float = 5.0, **given: Any
    ) -> None:
        shapes = [(bins,), (bins,), (bins - 1,)]
        super().__init__(dim, hidden, univariate=partial(MonotonicRQSTransform, bound=bound), shapes=shapes, **given)


class Flow(Description):
    """What descriptions of flows have in common."""

    def for_target(self, base_scale: float, reach: float) -> Self:
        """The same with a number as its scale where that is None, from the base's and how far from 0 the two reach."""
        return self.replace(scale=self.unit(base_scale, reach)) if self.fields().get("scale", 1.0) is None else self

    @staticmethod
    def unit(base_scale: float, reach: float) -> float:
        """The scale for such a target."""
        return base_scale


class Planar(Flow):
    """Planar flows (Rezende & Mohamed 2015), see `PlanarFlow`.

    Attributes:
        scale: the unit in which they see z; None: what `for_target` is told, or 1.
    """

    scale: Positive | None = None

    def build(self, dim: int, n: int, context_dim: int = 0) -> list[nn.Module]:
        """The n kernels for states of `dim` dimensions, untrained; weights from torch's random state."""
        return [PlanarFlow(dim, context_dim, self.scale or 1.0) for _ in range(n)]


class Householder(Flow):
    """Reflections (Tomczak & Welling 2016)."""

    def build(self, dim: int, n: int, context_dim: int = 0) -> list[nn.Module]:
        """N independent reflections; with a context one `HouseholderSequence` of n, as in the paper."""
        together = context_dim and n
        return [HouseholderSequence(dim, context_dim, n)] if together else [HouseholderSequence(dim) for _ in range(n)]


class IAF(Flow):
    """Inverse autoregressive flows (Kingma et al. 2016); every second one takes the dimensions in reverse.

    Attributes:
        hidden: width of each of the two hidden layers of a kernel's network.
        scale: as for `Planar`.
    """

    hidden: Size = 32
    scale: Positive | None = None

    def build(self, dim: int, n: int, context_dim: int = 0) -> list[nn.Module]:
        """As for `Planar`."""
        hidden, scale = (self.hidden, self.hidden), self.scale or 1.0
        return [AutoregressiveFlow(dim, hidden, t % 2 == 1, context_dim, scale) for t in range(n)]


class Spline(Flow):
    """Autoregressive rational-quadratic splines (Durkan et al. 2019); every second one takes the dimensions in reverse.

    Attributes:
        hidden: as for `IAF`.
        bins: pieces of each spline.
        scale: as for `Planar`; they bend within five of it.
    """

    hidden: Size = 32
    bins: Annotated[int, Whole(2)] = 8
    scale: Positive | None = None

    def build(self, dim: int, n: int, context_dim: int = 0) -> list[nn.Module]:
        """As for `Planar`."""
        given: dict[str, Any] = {"context_dim": context_dim, "scale": self.scale or 1.0}
        hidden = (self.hidden, self.hidden)
        return [SplineFlow(dim, hidden, self.bins, reverse=t % 2 == 1, **given) for t in range(n)]

    @staticmethod
    def unit(base_scale: float, reach: float) -> float:
        """A fifth of the reach, so that they bend as far as that."""
        return reach / 5
