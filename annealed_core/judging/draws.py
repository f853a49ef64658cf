"""How near draws come to exact ones: figures that a lost mode can't fool.

exact = exact_draws(find("D"), 2000)
energy_distance(z, exact), coverage(z, exact)       # of any sampler's draws
upper_bound(chain, target, exact)                   # of log Z, where exact draws are known: the EUBO
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from annealed_core.chain import Chain
from annealed_core.energies import Energy, GaussianMixture
from annealed_core.evidence import grid, log_mean_weight, log_prob_double
from annealed_core.kernels import drawn_log_prob, normal_log_prob
from annealed_core.moves import draw_like
from annealed_core.targets import name_of


def _on_grid(log_mass: Tensor, points: Tensor, width: float, n: int, generator: torch.Generator | None) -> Tensor:
    """Draws from cells of a grid, uniform within each: masses (m,), midpoints (m, d) -> (n, d)."""
    found = points[torch.multinomial(torch.softmax(log_mass, 0), n, replacement=True, generator=generator)]
    return found + width * (draw_like(torch.rand, found, generator) - 0.5)


@torch.no_grad()
def exact_draws(energy: Energy, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Exact draws of a named energy, (n, dim) in double precision; in two dimensions by the cells of a fine grid.

    Raises ValueError for a target whose draws are not known.
    """
    noise = draw_like(torch.randn, torch.empty(n, energy.dim, dtype=torch.float64), generator)
    density = energy.log_density
    if isinstance(density, GaussianMixture):
        weights, centres = density.weights.double(), density.centres.double()
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        return centres[chosen] + density.variance**0.5 * noise
    if energy.name == "funnel":
        first = 3 * noise[:, :1]
        return torch.cat([first, noise[:, 1:] * (0.5 * first).exp()], 1)
    if energy.name == "many_well":
        x, width = torch.linspace(-4, 4, 8001, dtype=torch.float64).unsqueeze(1), 0.001
        log_mass = energy.log_prob(torch.cat([x, torch.zeros_like(x)], 1)[:, :2]).flatten()
        pairs = energy.dim // 2
        noise[:, ::2] = _on_grid(log_mass, x, width, n * pairs, generator).view(n, pairs)
        return noise
    if energy.dim == 2:
        points, area = grid(energy.support, 1200)
        points = points.view(-1, 2)
        return _on_grid(log_prob_double(energy, points), points, area**0.5, n, generator)
    raise ValueError(f"target {name_of(energy)} of dim {energy.dim}: no exact draws are known")


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, without bias, of draws x (n, dim) and y (m, dim) (Székely & Rizzo 2013).

    It is 0 where the two have the same distribution, and then an estimate may be just below.
    """
    x, y = x.double(), y.double()
    own = [torch.cdist(each, each).sum() / (len(each) * (len(each) - 1)) for each in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - own[0] - own[1])


def coverage(z: Tensor, exact: Tensor, level: float = 0.9) -> Tensor:
    """Share of the exact draws (m, dim) in the central interval of the draws z (n, dim) in each dimension: (dim,).

    It should be `level`; below, the draws are too sure of themselves.
    """
    ends = torch.tensor([0.5 - 0.5 * level, 0.5 + 0.5 * level], dtype=torch.float64)
    low, high = torch.quantile(z.double(), ends, dim=0)
    return ((exact >= low) & (exact <= high)).double().mean(0)


def _before(kernel: Any, z_next: Tensor, context: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A state drawn from the reverse kernel, and log r - log q of the transition from it."""
    if hasattr(kernel, "back"):
        found: tuple[Tensor, Tensor] = kernel.back(z_next, context, noise)
        return found
    if hasattr(kernel, "inverse"):
        z = kernel.inverse(z_next, context)
        return z, kernel(z, context)[1]
    if hasattr(kernel, "reverse"):
        loc, scale = kernel.reverse(z_next, context)
        z = loc + scale * noise
        return z, drawn_log_prob(noise, scale) - normal_log_prob(z_next, *kernel.forwards(z, context))
    raise ValueError(f"kernel {type(kernel).__name__} can't be gone back: it has neither reverse, inverse nor back")


@torch.no_grad()
def reverse_log_weights(chain: Chain, target: Any, z: Tensor) -> Tensor:
    """Log-weights of paths that go back from exact draws z (n, *batch, dim) of the target, in nats: (n, *batch).

    They are those of `Chain.log_weight`: their mean is at least log Z (EUBO: Blessing et al. 2024, arXiv 2406.07423),
    and -log of the mean of exp of minus them is too, and nearer.
    """
    noise, log_weights = chain.noise(len(z)), log_prob_double(target, z)
    z = z.to(noise)
    for kernel, fresh in reversed(list(zip(chain.kernels, noise[1:], strict=True))):
        z, log_ratio = _before(kernel, z, chain.context, fresh)
        log_weights = log_weights + log_ratio
    return log_weights - chain.base.log_prob(z)


def upper_bound(chain: Chain, target: Any, exact: Tensor) -> dict[str, float]:
    """Log Z from above, in nats: `eubo`, the mean of `reverse_log_weights`, and `log_z_above`, which is nearer."""
    log_weights = reverse_log_weights(chain, target, exact)
    return {"eubo": float(log_weights.mean()), "log_z_above": -float(log_mean_weight(-log_weights)[0])}
