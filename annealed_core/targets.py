"""Targets: unnormalised densities, weighed in nats.

A target is any object with `log_prob(z)` and `dim`. This module has the geometric path that leads from a base density
to a target, and the check of a user's own; `energies` has the named ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from annealed_core.energies import ENERGIES, Energy, GaussianMixture, find

__all__ = [
    "ENERGIES",
    "Energy",
    "GaussianMixture",
    "GeometricPath",
    "Target",
    "check_alphas",
    "check_target",
    "find",
    "geometric_alphas",
    "linear_alphas",
    "name_of",
]


class Target(Protocol):
    """What a chain is weighed against: an unnormalised density f over R^dim."""

    dim: int

    def log_prob(self, z: Tensor) -> Tensor:
        """Log f(z) in nats; z: (*batch, dim) -> (*batch,)."""
        ...


def name_of(target: Any) -> str:
    """What messages call a target."""
    return str(getattr(target, "name", type(target).__name__))


def check_target(target: Any, device: str = "cpu", differentiable: bool = False) -> None:
    """Refuse a target whose `log_prob` fails, has the wrong shape, or is NaN or +inf at eight points around 0.

    Nothing is known of it elsewhere. With `differentiable`, what training needs, it must also have a finite gradient
    with respect to z at these points.
    Raises ValueError with one line that names the target and what is wrong.
    """
    name = name_of(target)
    z = torch.linspace(-1, 1, 8, device=device).unsqueeze(-1).expand(8, target.dim).contiguous()
    try:
        with torch.no_grad():
            values = target.log_prob(z)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"target {name}: log_prob fails for z of shape (8, {target.dim}): {reason}") from error
    shape = tuple(getattr(values, "shape", ()))
    if shape != (8,):
        raise ValueError(f"target {name}: log_prob of z (8, {target.dim}) must have shape (8,), got {shape}")
    _refuse_points(values.isnan() | (values == torch.inf), values, z, f"target {name}: log_prob")
    if differentiable:
        gradient = _gradient(target, z)
        if gradient is None:
            advice = "compute it with torch operations on z, without detach() or numpy"
            raise ValueError(f"target {name}: log_prob has no gradient with respect to z: {advice}")
        _refuse_points(~gradient.isfinite().all(-1), gradient.sum(-1), z, f"target {name}: the gradient of log_prob")


def _refuse_points(wrong: Tensor, values: Tensor, z: Tensor, what: str) -> None:
    if wrong.any():
        where = ", ".join(f"{x:.2g}" for x in z[wrong][0].tolist())
        raise ValueError(f"{what} is {float(values[wrong][0])} at z = ({where})")


def _gradient(target: Any, z: Tensor) -> Tensor | None:
    """The gradient of log f at z (n, dim), or None where autograd finds no way to z."""
    z = z.requires_grad_()
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(target.log_prob(z).sum(), z, allow_unused=True)
    except Exception:  # without a gradient it worked: such as numpy(), which refuses a z that needs one
        return None
    return gradient


def linear_alphas(n_transitions: int) -> Tensor:
    """The path's exponents 0 = alpha_0 < ... < alpha_T = 1, equally spaced: (T + 1,)."""
    return torch.linspace(0, 1, n_transitions + 1)


def geometric_alphas(n_transitions: int, first: float = 0.01) -> Tensor:
    """The path's exponents 0, then geometrically spaced from `first` to exactly 1: (T + 1,); 0 and 1 where T = 1.

    The steps are short where the path leaves the base. Raises ValueError for a `first` outside (0, 1).
    """
    if not 0 < first < 1:
        raise ValueError(f"first must lie in (0, 1), got {first}")
    return torch.cat([torch.zeros(1), first ** torch.linspace(0, 1, n_transitions).flip(0)])


def check_alphas(alphas: Tensor) -> None:
    """Refuse exponents (T + 1,), or (T + 1, M) for M paths, that do not rise from 0 to 1 with ValueError."""
    for path in alphas.detach().reshape(len(alphas), -1).T.tolist():  # plain numbers: this is called at every step
        rises = all(a < b for a, b in itertools.pairwise(path))
        if len(path) < 2 or path[0] != 0 or path[-1] != 1 or not rises:
            raise ValueError(f"alphas must rise from 0 to 1, got {path}")


class GeometricPath:
    """Intermediate targets f_t = target^alpha_t * base^(1 - alpha_t) (Huang et al. 2018, as in Neal 2001).

    Args:
        base: f_0, any object with `log_prob`.
        target: f_T.
        alphas: (T + 1,), rising from exactly 0 to exactly 1.

    `path[t]` is the target f_t, whose `support` holds a Gaussian base's mass too; `len(path)` is T + 1. Raises
    ValueError where the alphas do not rise from 0 to 1.
    """

    def __init__(self, base: Any, target: Any, alphas: Tensor | Sequence[float]) -> None:
        self.base, self.target = base, target
        self.alphas = torch.as_tensor(alphas, dtype=torch.get_default_dtype())
        check_alphas(self.alphas)
        self.dim = target.dim

    def __len__(self) -> int:
        return len(self.alphas)

    def __getitem__(self, step: int) -> Energy:
        alpha = float(self.alphas[step])

        def log_density(z: Tensor) -> Tensor:
            return alpha * self.target.log_prob(z) + (1 - alpha) * self.base.log_prob(z)

        support = getattr(self.target, "support", 12.0)
        if alpha < 1 and hasattr(self.base, "loc") and hasattr(self.base, "scale"):
            support = max(support, float((self.base.loc.abs() + 5 * self.base.scale).max()))
        return Energy(
            f"f_{step % len(self)}", log_density, dim=self.dim, box=getattr(self.target, "box", 4.0), support=support
        )
