"""What a trained chain is worth on a density: `judge(chain, find("D"))["total_variation"]`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from annealed_core import evidence
from annealed_core.chain import Chain, Trajectory
from annealed_core.energies import ENERGIES
from annealed_core.judging.images import drawing_from, means_and_errors
from annealed_core.kernels import DiagonalGaussian
from annealed_core.targets import GeometricPath, LinearAlphas, exponents

LONGEST_WITH_GAPS = 16  # transitions
SAMPLES_OF_GAPS = 5000


def true_log_normalizer(target: Any) -> float | None:
    """Log Z of a target in nats, by quadrature in two dimensions; None if it is not known.

    Raises ValueError, naming `support`, where the square that is integrated does not hold the target.
    """
    known = getattr(target, "log_normalizer", None)
    if known is not None or target.dim != 2:
        return None if known is None else float(known)
    ours = any(target is energy for energy in ENERGIES.values())
    return _quadrature_of_ours(target) if ours else evidence.log_normalizer_quadrature(target)


_quadrature_of_ours = functools.cache(evidence.log_normalizer_quadrature)


def work_of_kernels(
    base: DiagonalGaussian, trajectory: Trajectory, log_f_first: Tensor, log_f_last: Tensor
) -> tuple[Tensor, Tensor]:
    """What the kernels of a chain do for each trajectory, given log f at its z_0 and z_T: two of (*sample, *batch).

    First what the chain's bound has more than that of its base alone at the same z_0, in nats; then |z_T - z_0| in
    units of the base's spread: a move by one standard deviation in every dimension is 1.
    """
    earned = log_f_last - log_f_first + trajectory.log_ratios.to(log_f_last).sum(0)
    distance = torch.linalg.vector_norm(trajectory.z[-1] - trajectory.z[0], dim=-1)
    return earned, distance / torch.linalg.vector_norm(base.scale, dim=-1)


@torch.no_grad()
def judge(
    chain: Chain, target: Any, samples: int = 20_000, alphas: Any = None, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Metrics of a chain on a target as plain values, for a record; in nats, shares in [0, 1].

    `elbo`; `log_z`, `log_z_se`, `ess` and `pareto_k` by importance sampling; `log_z_error_2000`, the mean absolute
    error of log Z from 2,000 samples; `log_z_100` and `ess_100`, means over sets of 100; in two dimensions
    `total_variation`, `kl_reverse`, `kl_forward` and, for at most 16 transitions, `gaps` (`evidence.path_gaps`); where
    the target has `modes`, `mode_masses`, which are weighted, and `mode_shares`, which are not. With kernels
    `kernels_earn`, the mean bound less that of the base alone from the same z_0, its standard error `kernels_earn_se`,
    and `kernels_move`, the mean |z_T - z_0| in units of the base's spread. Where a figure is None and might not be,
    `notes` has a line that says why.

    Args:
        chain: without a batch.
        target: with `log_prob`, which is given double precision if it takes that, and `dim`.
        samples: drawn from the chain.
        alphas: of the path from the base to the target for `gaps`: exponents (T + 1,), or a function of T; linear
            unless given. Those of a module, which has learned them, are among the metrics.
        generator: what is drawn from, or else the chain's own, or else torch's random state.
    """
    if chain.base.batch_shape:
        raise ValueError(f"chain must have no batch, got one of shape {tuple(chain.base.batch_shape)}")
    chain, notes = drawing_from(chain, generator), list[str]()

    def unless_refused(figure: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return figure(*arguments)
        except ValueError as refusal:
            if "of its mass" not in str(refusal):
                raise
            notes.extend({str(refusal)}.difference(notes))
            return None

    def over_sets(size: int, figure: Callable[[Tensor], Tensor]) -> float | None:
        whole = len(log_weights) // size
        return float(figure(log_weights[: whole * size].view(whole, size).T).mean()) if whole else None

    def log_z_of(some: Tensor) -> Tensor:
        return evidence.log_mean_weight(some)[0]

    trajectory = chain.rsample(samples)
    z = trajectory.z[-1].double()
    log_f = evidence.log_prob_double(target, z)
    log_weights = log_f + trajectory.log_ratios.double().sum(0) - trajectory.log_q0.double()
    log_z, log_z_se = (float(each) for each in evidence.log_mean_weight(log_weights))
    truth = unless_refused(true_log_normalizer, target)
    found: dict[str, Any] = {
        "elbo": min(float(log_weights.mean()), log_z),  # where all weights are equal, rounding may say otherwise
        "log_z": log_z,
        "log_z_se": log_z_se,
        "log_z_error_2000": None if truth is None else over_sets(2000, lambda some: (log_z_of(some) - truth).abs()),
        "ess": float(evidence.effective_sample_size(log_weights)),
        "log_z_100": over_sets(100, log_z_of),
        "ess_100": over_sets(100, evidence.effective_sample_size),
        "pareto_k": float(evidence.pareto_k(log_weights)),
        "total_variation": None,
        "mode_masses": None,
        "mode_shares": None,
    }
    if target.dim == 2:
        names = "total_variation", "kl_reverse", "kl_forward"
        divergences = unless_refused(evidence.grid_divergences, z, target) or (None, None, None)
        found |= zip(names, divergences, strict=True)
        if 0 < len(chain) <= LONGEST_WITH_GAPS:
            of_path = exponents(LinearAlphas() if alphas is None else alphas, len(chain))
            path = GeometricPath(chain.base, target, of_path)
            gaps = unless_refused(evidence.path_gaps, chain, path, min(samples, SAMPLES_OF_GAPS))
            found["gaps"] = None if gaps is None else gaps[0].tolist()
    if isinstance(alphas, nn.Module):
        found["alphas"] = exponents(alphas, len(chain)).tolist()
    modes = getattr(target, "modes", None)
    if modes is not None:
        found["mode_masses"] = evidence.mode_masses(z, modes[0], log_weights).tolist()
        found["mode_shares"] = evidence.mode_masses(z, modes[0]).tolist()
    if len(chain):
        log_f_first = evidence.log_prob_double(target, trajectory.z[0])
        earned, moved = work_of_kernels(chain.base, trajectory, log_f_first, log_f)
        if earned.isfinite().all():
            found |= means_and_errors(kernels_earn=earned)
        else:
            found |= {"kernels_earn": None, "kernels_earn_se": None}
            notes.append("kernels_earn is not known: log_prob is not finite at samples of the base or of the chain")
        found["kernels_move"] = float(moved.mean())
    return found | ({"notes": notes} if notes else {})
