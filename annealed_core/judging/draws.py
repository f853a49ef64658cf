"""How near draws come to exact ones: figures that a lost mode can't fool.

exact = exact_draws(find("D"), 2000)
energy_distance(z, exact), coverage(z, exact)       # of any sampler's draws
upper_bound(chain, target, exact)                   # of log Z, where exact draws are known: the EUBO
parallel_tempering(target, base, alphas, 1000)      # a reference where none are
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from annealed_core.ais import ACCEPTANCE
from annealed_core.chain import Chain
from annealed_core.energies import Energy, GaussianMixture
from annealed_core.evidence import grid, log_mean_weight, log_prob_double
from annealed_core.kernels import DiagonalGaussian
from annealed_core.moves import Hamiltonian, check_whole, draw_like
from annealed_core.nested import reverse_log_weights
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


@torch.no_grad()
def upper_bound(chain: Chain, target: Any, exact: Tensor) -> dict[str, float]:
    """Log Z from above, in nats: `eubo`, the mean of `reverse_log_weights`, and `log_z_above`, which is nearer."""
    log_weights = reverse_log_weights(chain, target, exact)
    return {"eubo": float(log_weights.mean()), "log_z_above": -float(log_mean_weight(-log_weights)[0])}


@torch.no_grad()
def parallel_tempering(
    target: Any,
    base: DiagonalGaussian,
    alphas: Tensor,
    n_steps: int,
    n_chains: int = 8,
    warm_up: int = 500,
    n_leapfrog: int = 5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """States of chains that leave the target invariant, after a warm-up: (n_steps, n_chains, dim).

    Each chain has a state at each exponent alpha of the path from the base (K of them, rising to 1), moved by
    Hamiltonian moves; then neighbours change places with probability min(1, f_k(z') f_k'(z) / (f_k(z) f_k'(z')))
    (Swendsen & Wang 1986; Geyer 1991). Step sizes adapt to their acceptance in the warm-up.
    """
    check_whole(n_steps=n_steps, n_chains=n_chains, n_leapfrog=n_leapfrog)
    alphas = alphas.double()
    z = base.rsample(draw_like(torch.randn, base.loc.expand(n_chains, len(alphas), base.dim), generator))
    parts = lambda z: (log_prob_double(target, z), log_prob_double(base, z))
    tempered = SimpleNamespace(log_prob=lambda z: sum(w * f for w, f in zip((alphas, 1 - alphas), parts(z))))  # noqa: B905
    log_step, kept = (0.1 * base.scale.mean()).log().expand(len(alphas)), []
    for step in range(-warm_up, n_steps):
        jitter = draw_like(torch.rand, z[..., 0], generator) + 0.5
        move = Hamiltonian(tempered, (log_step.exp() * jitter).to(z), n_leapfrog, generator=generator)
        z, _ = move(z)
        if step < 0:
            log_step = log_step + 0.1 * (move.accepted.mean(0).to(z) - ACCEPTANCE["hamiltonian"])
        slope = torch.sub(*parts(z))
        log_accept = alphas.diff() * (slope[:, :-1] - slope[:, 1:])
        swapped = draw_like(torch.rand, log_accept, generator).log() < log_accept
        swapped[:, step % 2 :: 2] = False  # every second pair, so that no state is in two
        places = torch.arange(len(alphas)).repeat(n_chains, 1)
        places[:, :-1] += swapped.long()
        places[:, 1:] -= swapped.long()
        z = z.gather(1, places.unsqueeze(-1).expand_as(z))
        if step >= 0:
            kept.append(z[:, -1])
    return torch.stack(kept)
