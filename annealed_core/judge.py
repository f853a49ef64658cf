"""Judging: what a trained chain is worth on a target whose truth is known."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.energies import find
from annealed_core.spec import Spec
from annealed_core.targets import GeometricPath


@functools.cache
def _truth_of_named(name: str) -> float | None:
    return true_log_normalizer(find(name))


def true_log_normalizer(target: Any) -> float | None:
    """Log Z of a target, or of the energy of that name: in closed form, by quadrature in two dimensions, or None."""
    if isinstance(target, str):
        return _truth_of_named(target)
    known = getattr(target, "log_normalizer", None)
    if known is None and target.dim == 2:
        return evidence.log_normalizer_quadrature(target)
    return known


@torch.no_grad()
def judge(chain: Chain, spec: Spec, alphas: Tensor) -> dict[str, Any]:
    """What a trained chain is worth, from `spec.samples` samples; log-densities in nats, shares in [0, 1]."""
    target, n = spec.target_object, spec.get("samples")
    trajectory = chain.rsample(n)
    z, log_weights = trajectory.z[-1], chain.log_weight(target, trajectory)
    log_z, log_z_se = evidence.log_mean_weight(log_weights)
    truth = true_log_normalizer(spec.target)
    found: dict[str, Any] = {
        "elbo": float(log_weights.mean()),
        "log_z": float(log_z),
        "log_z_se": float(log_z_se),
        "log_z_error_2000": _error_of_small_samples(log_weights, truth, 2000),
        "ess": float(evidence.effective_sample_size(log_weights)),
        **_small_samples(log_weights, 100),
        "pareto_k": float(evidence.pareto_k(log_weights)),
        "total_variation": None,
        "mode_masses": None,
        "mode_shares": None,
    }
    if target.dim == 2:
        found["total_variation"] = evidence.total_variation(z, target)
        found["kl_reverse"], found["kl_forward"] = evidence.grid_divergences(z, target)
        if 0 < len(chain) <= 16:
            gaps, _ = evidence.path_gaps(chain, GeometricPath(chain.base, target, alphas), min(n, 5000))
            found["gaps"] = gaps.tolist()
    if spec.path == "learned":
        found["alphas"] = alphas.tolist()
    modes = getattr(target, "modes", None)
    if modes is not None:
        found["mode_masses"] = evidence.mode_masses(z, modes[0], log_weights).tolist()
        found["mode_shares"] = evidence.mode_masses(z, modes[0]).tolist()
    return found


def _small_samples(log_weights: Tensor, size: int) -> dict[str, float | None]:
    """Means of log Z estimates and of ESS over sets of `size` samples: smaller than with many where weights vary."""
    whole = len(log_weights) // size
    if whole == 0:
        return {f"log_z_{size}": None, f"ess_{size}": None}
    sets = log_weights[: whole * size].view(whole, size).T
    log_z, ess = evidence.log_mean_weight(sets)[0], evidence.effective_sample_size(sets)
    return {f"log_z_{size}": float(log_z.mean()), f"ess_{size}": float(ess.mean())}


def _error_of_small_samples(log_weights: Tensor, truth: float | None, size: int) -> float | None:
    """Mean absolute error of log Z estimates from `size` samples each; None where the truth is not known."""
    whole = len(log_weights) // size
    if truth is None or whole == 0:
        return None
    estimates, _ = evidence.log_mean_weight(log_weights[: whole * size].view(whole, size).T)
    return float((estimates - truth).abs().mean())
