"""What a run gives to others: its chain as a distribution of torch, its draws for ArviZ, and what speaks against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.running.system import optional

#: Vehtari et al., arXiv 1507.02646, of Pareto k; the others are ours.
LARGEST_K, SMALLEST_ESS, LARGEST_GAP, LARGEST_DIFFERENCE = 0.7, 0.01, 2.0, 0.5
SMALLEST_SHARE = 0.2  # of the samples that a mode should have


class ChainDistribution(Distribution):
    """The last state of a chain as a distribution of torch over R^dim.

    Its `log_prob` is that of the base pushed through the kernels, which all of them must be able to invert: flows do. A
    stochastic kernel leaves only bounds of it, and so TypeError.
    """

    arg_constraints = {}  # noqa: RUF012 -- as torch has it
    has_rsample = True

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        super().__init__(chain.base.batch_shape, torch.Size([chain.base.dim]), validate_args=False)

    @property
    def support(self) -> Any:
        """R^dim."""
        return constraints.real_vector

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """The last states, with gradients: (*sample, *batch, dim)."""
        return self.chain.rsample(sample_shape).z[-1]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats: (*sample, *batch, dim) -> (*sample, *batch)."""
        z, log_volume = value, torch.zeros(value.shape[:-1], dtype=value.dtype)
        for kernel in reversed(list(self.chain.kernels)):
            if not hasattr(kernel, "inverse"):
                raise TypeError(f"{type(kernel).__name__} has no inverse, and so this chain no density: only bounds")
            z = kernel.inverse(z, self.chain.context)
            log_volume = log_volume + kernel(z, self.chain.context)[1]
        return self.chain.base.log_prob(z) - log_volume


def doubts(metrics: Mapping[str, Any], log_normalizer: float | None = None, masses: Sequence[float] = ()) -> list[str]:
    """Why figures of a run should not be trusted, in lines; none where nothing speaks against them.

    Args:
        metrics: of the run.
        log_normalizer: what its target declares of log Z, in nats. It is doubted where log_z is off by more than half a
            nat and five standard errors.
        masses: of its modes, as it declares them. A mode with less than a fifth of its samples is lost.
    """
    found = list(metrics.get("notes", ()))
    k, ess = metrics.get("pareto_k"), metrics.get("ess")
    if k is not None and k > LARGEST_K:
        found.append(
            f"Pareto k is {k:.2f}, above {LARGEST_K}: log_z, ess and all that is weighted are not to be relied on"
        )
    if ess is not None and ess < SMALLEST_ESS:
        found.append(
            f"the effective sample size is {ess:.2%} of the samples: few of them decide log_z and all that is weighted"
        )
    log_z, elbo = metrics.get("log_z"), metrics.get("elbo")
    if log_z is not None and elbo is not None and log_z - elbo > LARGEST_GAP:
        found.append(f"the ELBO lies {log_z - elbo:.1f} nats below log_z: the chain is far from its target")
    if log_z is not None and log_normalizer is not None:
        error = metrics.get("log_z_se") or 0.0
        if abs(log_z - log_normalizer) > max(LARGEST_DIFFERENCE, 5 * error):
            declared = (
                f"log_z is {log_z:.2f} +- {error:.2f}, and the target declares log_normalizer {log_normalizer:.6g}"
            )
            found.append(f"{declared}: either the samples miss mass, or what it declares is wrong")
    for number, (share, mass) in enumerate(zip(metrics.get("mode_shares") or (), masses, strict=False)):
        if share < SMALLEST_SHARE * mass:
            found.append(
                f"mode {number} has {share:.3f} of the samples, and {mass:.3f} of the target's mass: it is lost"
            )
    for name in ("is_minus_ais", "adaptive_minus_ais"):
        if abs(metrics.get(name) or 0) > LARGEST_DIFFERENCE:
            found.append(f"{name} is {metrics[name]:.2f} nats: sampling and annealing disagree on the likelihood")
    return found


@torch.no_grad()
def to_arviz(chain: Chain, target: Any, draws: int, chains: int) -> Any:
    """Draws of a chain as ArviZ has them; see `Run.to_arviz`."""
    arviz = optional("arviz", "arviz")
    trajectory = chain.rsample((chains, draws))
    z, log_weights = trajectory.z[-1], evidence.log_weight_double(chain, target, trajectory)
    named = target.constrained(z) if hasattr(target, "constrained") else {"z": z}
    groups = {
        "posterior": {name: value.numpy() for name, value in named.items()},
        "sample_stats": {"log_weight": log_weights.numpy()},
    }
    return arviz.from_dict(**groups) if arviz.__version__.startswith("0.") else arviz.from_dict(groups)
