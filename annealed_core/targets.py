"""Targets: unnormalised densities, weighed in nats, and the path that leads to one.

A target is any object with `log_prob(z)` and `dim`; `energies` has the named ones. The geometric path from a base to a
target takes exponents 0 = alpha_0 < ... < alpha_T = 1: `LinearAlphas`, `GeometricAlphas` or, trained, `LearnedAlphas`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn

from annealed_core.description import Description, Number
from annealed_core.energies import ENERGIES, Energy, GaussianMixture, find  # noqa: F401 -- the named ones


class Target(Protocol):
    """What a chain is weighed against: an unnormalised density f over R^dim."""

    dim: int

    def log_prob(self, z: Tensor) -> Tensor:
        """Log f(z) in nats; z: (*batch, dim) -> (*batch,)."""
        ...


def name_of(target: Any) -> str:
    """What messages call a target, in one line: its name where that is text, else its class."""
    name = getattr(target, "name", None)
    shown = " ".join(name.split()) if isinstance(name, str) else ""
    return (shown if len(shown) <= 80 else f"{shown[:76]} ...") or type(target).__name__


def linear_alphas(n: int) -> Tensor:
    """The exponents 0 = alpha_0 < ... < alpha_n = 1 of n transitions, equally spaced: (n + 1,)."""
    return torch.linspace(0, 1, n + 1)


def geometric_alphas(n: int, first: float = 0.01) -> Tensor:
    """The exponents 0, then geometrically spaced from `first` to exactly 1: (n + 1,); 0 and 1 where n = 1.

    The steps are short where the path leaves the base. Raises ValueError for a `first` outside (0, 1).
    """
    if not 0 < first < 1:
        raise ValueError(f"first must lie in (0, 1), got {first}")
    return torch.cat([torch.zeros(1), first ** torch.linspace(0, 1, n).flip(0)])


class LinearAlphas(Description):
    """Exponents that are equally spaced."""

    def __call__(self, n: int) -> Tensor:
        """Of n transitions: (n + 1,)."""
        return linear_alphas(n)


class GeometricAlphas(Description):
    """Exponents whose steps are short where the path leaves the base, see `geometric_alphas`."""

    first: Annotated[float, Number(0, 1, open_low=True, open_high=True)] = 0.01

    def __call__(self, n: int) -> Tensor:
        """Of n transitions: (n + 1,)."""
        return geometric_alphas(n, self.first)


class LearnedAlphas(Description):
    """Exponents with weights to train (Zimmermann et al. 2021, arXiv 2106.11302), which start equally spaced."""

    def __call__(self, n: int) -> Tensor:
        """Where n transitions start: (n + 1,)."""
        return linear_alphas(n)

    def build(self, n: int, batch_shape: Sequence[int] = ()) -> LearnedPath:
        """The exponents of n transitions as a module, for each element of the batch its own."""
        return LearnedPath(self(n), batch_shape)


class LearnedPath(nn.Module):
    """Exponents with weights to train, from the given ones (T + 1,); `objectives.path_fit` is what trains them."""

    SMALLEST = 1e-3  # of the increments, so that they never vanish

    def __init__(self, alphas: Tensor, batch_shape: Sequence[int] = ()) -> None:
        super().__init__()
        start = alphas.diff().log().view(-1, *[1] * len(batch_shape)).expand(-1, *batch_shape)
        self.logits = nn.Parameter(start.clone())

    def forward(self, n: int | None = None) -> Tensor:
        """(T + 1, *batch)."""
        shares = torch.softmax(self.logits, 0) * (1 - self.SMALLEST * len(self.logits)) + self.SMALLEST
        ends = torch.zeros_like(shares[:1])
        return torch.cat([ends, shares.cumsum(0)[:-1], ends + 1])


def check_alphas(alphas: Tensor) -> None:
    """Refuse exponents (T + 1,), or (T + 1, *batch) for a batch of paths, that do not rise from 0 to 1: ValueError."""
    for path in alphas.detach().reshape(len(alphas), -1).T.tolist():
        rises = all(a < b for a, b in itertools.pairwise(path))
        if len(path) < 2 or path[0] != 0 or path[-1] != 1 or not rises:
            raise ValueError(f"alphas must rise from 0 to 1, got {path}")


def exponents(alphas: Tensor | Sequence[float] | Callable[[int], Tensor], n: int) -> Tensor:
    """The exponents of n transitions, from themselves or from a function of n: (n + 1, *batch).

    Raises ValueError for another number of them, and where they do not rise from 0 to 1.
    """
    found = torch.as_tensor(alphas(n) if callable(alphas) else alphas)
    if len(found) != n + 1:
        raise ValueError(f"alphas must have {n + 1} values for {n} transitions, got {len(found)}")
    if not isinstance(alphas, Description | LearnedPath):  # these rise by themselves
        check_alphas(found)
    return found


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
            if not alpha:  # also where the target is 0
                return torch.as_tensor(self.base.log_prob(z))
            return alpha * self.target.log_prob(z) + (1 - alpha) * self.base.log_prob(z)

        declared = getattr(self.target, "support", None)  # torch's own distributions have a constraint there
        support = float(declared) if isinstance(declared, int | float) else 12.0
        if alpha < 1 and hasattr(self.base, "loc") and hasattr(self.base, "scale"):
            support = max(support, float((self.base.loc.abs() + 5 * self.base.scale).max()))
        box = getattr(self.target, "box", 4.0)
        return Energy(f"f_{step % len(self)}", log_density, dim=self.dim, box=box, support=support)
