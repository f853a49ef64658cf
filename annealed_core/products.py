"""Matrix products in float32: torch's own, or oneDNN's where those take half the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


# Torch multiplies float32 matrices with MKL, which keeps to AVX2 on processors that are not by Intel; oneDNN, which
# torch brings as well, takes AVX512 wherever it is, and half the time. On Intel's own MKL is the faster one.
HAS_FAST_PRODUCT = (
    torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and not _is_intel()
)


def _fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x weight' + bias by oneDNN: (n, a), (b, a), (b,) -> (n, b); float32, in any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _FastLinear(torch.autograd.Function):
    """`_fast_linear` with its gradient, which is made of such products too, and so can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _fast_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        product = _FastLinear.apply if torch.is_grad_enabled() else _fast_linear
        return (
            product(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None,
            product(gradient.t(), x.t(), None) if ctx.needs_input_grad[1] else None,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` at twice its speed on some processors, where all is float32.

    x (n, a), weight (b, a), bias (b,) or None -> (n, b). Under the transforms of torch.func it is torch's own.
    """
    fits = x.ndim == 2 and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if HAS_FAST_PRODUCT and fits and not torch._C._are_functorch_transforms_active():
        return _FastLinear.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


class _LinearAndCut(torch.autograd.Function):
    """`linear_and_cut` with its gradient: one product forwards, and one for the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        product = linear(x, weight)
        return product, product.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, gradient_of_cut: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (
            linear(gradient.contiguous(), weight.t()) if ctx.needs_input_grad[0] else None,
            linear((gradient + gradient_of_cut).t(), x.t()) if ctx.needs_input_grad[1] else None,
        )


def linear_and_cut(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`linear(x, weight)` and `linear(x.detach(), weight)`, for little more than one of them."""
    if torch._C._are_functorch_transforms_active():
        return linear(x, weight), linear(x.detach(), weight)
    return _LinearAndCut.apply(x, weight)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`, for large layers."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_features) -> (n, out_features)."""
        return linear(x, self.weight, self.bias)


_precision: list[str] = []  # of `product`, where `products_in` has set one


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` for large layers where no gradient is recorded, in the precision that `products_in` has set."""
    if _precision:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(_precision[-1])
        try:
            return torch.nn.functional.linear(x, weight, bias)
        finally:
            torch.set_float32_matmul_precision(before)
    if HAS_FAST_PRODUCT and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        return _fast_linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


@contextmanager
def products_in(precision: str | None) -> Iterator[None]:
    """Let `product` multiply float32 matrices in "medium" precision, see `torch.set_float32_matmul_precision`.

    That is bfloat16 where the processor can multiply it, with sums in float32. Small matrices, which conversion would
    cost more than it saves, are no matter of `product`. "highest" and None change nothing.
    """
    if precision in (None, "highest"):
        yield
        return
    _precision.append(precision)
    try:
        yield
    finally:
        _precision.pop()
