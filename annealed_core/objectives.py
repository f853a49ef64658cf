"""Objectives: a chain and a target in, per-sample values in nats out, to be maximised.

All take chains and targets, not models, so that three numbers are enough to try one. `sample_shape` and `noise` are
those of `Chain.rsample`. Sources: Huang et al. 2018 (arXiv 1809.01818) for AVO; Burda et al. 2016 for IWAE; Bowman et
al. 2016, Sonderby et al. 2016 for beta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from annealed_core.chain import Chain, Trajectory
from annealed_core.targets import Target, check_alphas

Shape = int | Sequence[int]


def elbo(chain: Chain, target: Target, sample_shape: Shape = (), noise: Tensor | None = None) -> Tensor:
    """The (hierarchical) evidence lower bound, E[log f(z_T) + sum_t log r_t/q_t - log q_0(z_0)].

    Values (*sample, *batch).
    """
    return chain.log_weight(target, chain.rsample(sample_shape, noise))


def beta_elbo(chain: Chain, target: Any, beta: float, sample_shape: Shape = (), noise: Tensor | None = None) -> Tensor:
    """Deterministic warm-up: E[log p(x | z_T)] + beta * (log p(z_T) + sum_t log r_t/q_t - log q_0(z_0)).

    `target` is a joint density with `log_likelihood` and `log_prior`, such as `vae.Joint`. beta = 1 is the ELBO; values
    (*sample, *batch).
    """
    return _beta_weight(chain.rsample(sample_shape, noise), target, beta)


def _beta_weight(trajectory: Trajectory, target: Any, beta: float) -> Tensor:
    z = trajectory.z[-1]
    return target.log_likelihood(z) + beta * (target.log_prior(z) + trajectory.log_ratios.sum(0) - trajectory.log_q0)


def alpha_elbo(
    chain: Chain, target: Target, alpha: float | Tensor, sample_shape: Shape = (), noise: Tensor | None = None
) -> Tensor:
    """Alpha-annealing, the energy tempered: E[alpha * log f(z_T) + sum_t log r_t/q_t - log q_0(z_0)].

    alpha = 1 is the ELBO; values (*sample, *batch).
    """
    trajectory = chain.rsample(sample_shape, noise)
    return alpha * target.log_prob(trajectory.z[-1]) + trajectory.log_ratios.sum(0) - trajectory.log_q0


def capacity_elbo(
    chain: Chain, target: Any, capacity: float, sample_shape: Shape = (), noise: Tensor | None = None
) -> Tensor:
    """The KL term held at a capacity C: E[log p(x | z_T)] - |KL - C| (Burgess et al. 2018, arXiv 1804.03599, weight 1).

    KL, log q_0(z_0) - sum_t log r_t/q_t - log p(z_T), is the mean over all samples and the batch. C = 0 is the ELBO as
    long as that mean is positive.

    Args:
        chain, sample_shape, noise: as for `elbo`.
        target: as for `beta_elbo`.
        capacity: C in nats, from 0.

    Values (*sample, *batch), whose mean is the objective. Raises ValueError for a negative capacity.
    """
    if not 0 <= capacity < math.inf:
        raise ValueError(f"capacity must be a number of nats from 0, got {capacity}")
    trajectory = chain.rsample(sample_shape, noise)
    z = trajectory.z[-1]
    kl = trajectory.log_q0 - trajectory.log_ratios.sum(0) - target.log_prior(z)
    return target.log_likelihood(z) - (kl.mean() - capacity).abs()


def avo_steps(
    chain: Chain, target: Any, alphas: Tensor, beta: float = 1.0, sample_shape: Shape = (), noise: Tensor | None = None
) -> Tensor:
    """AVO's T local objectives; values (T, *sample, *batch).

    Step t is log f_t(z_t) + log r_t(z_{t-1} | z_t) - log q_t(z_t | z_{t-1}) - log f_{t-1}(z_{t-1}), on the path f_t =
    f_T^alpha_t f_0^(1 - alpha_t) with f_0 = q_0. Its gradient reaches q_t and r_t alone: z_{t-1}, f_0, the context
    and the target's own parameters are cut off. The last term, constant in q_t and r_t, stands for the log
    q_{t-1}(z_{t-1}) of the paper, which has no closed form; with it the steps sum to the chain's log-weight, so that
    AVO has the ELBO's value and another gradient.

    With beta != 1 (deterministic warm-up) the target is a joint density, and everything but its likelihood carries
    the factor beta.

    Args:
        chain: with T kernels.
        target: f_T; where it has `frozen()`, that gives the same target without its own parameters' gradients.
        alphas: exponents of the path, (T + 1,), rising from exactly 0 to exactly 1; or (T + 1, M), a path for each
            element of the batch.
        beta: in [0, 1].
        sample_shape, noise: as for `Chain.rsample`.

    Raises ValueError for alphas that do not fit.
    """
    chain = chain.detach()
    return _local_steps(chain, target, alphas, beta, chain.rsample(sample_shape, noise, local=True))


def _local_steps(chain: Chain, target: Any, alphas: Tensor, beta: float, trajectory: Trajectory) -> Tensor:
    """`avo_steps` of a detached chain and its trajectory."""
    target = target.frozen() if callable(getattr(target, "frozen", None)) else target
    moved = trajectory.z[1:]
    alpha = _exponents(alphas, trajectory.log_ratios)
    log_target = target.log_prob(moved) if beta == 1 else target.log_likelihood(moved) + beta * target.log_prior(moved)
    log_f = torch.addcmul(alpha * log_target, (1 - alpha) * beta, chain.base.log_prob(moved))
    log_f_before = torch.cat([beta * trajectory.log_q0.unsqueeze(0), log_f[:-1]]).detach()
    return log_f + beta * trajectory.log_ratios - log_f_before


def _exponents(alphas: Tensor, log_ratios: Tensor) -> Tensor:
    """The exponents alpha_1 ... alpha_T of each transition, checked, in the shape of the log-ratios."""
    alphas, n_transitions = torch.as_tensor(alphas), len(log_ratios)
    if len(alphas) != n_transitions + 1:
        takes = f"{n_transitions + 1} values for {n_transitions} transitions"
        raise ValueError(f"alphas must have {takes}, got {len(alphas)}")
    if not torch.compiler.is_compiling():  # which can't look at numbers
        check_alphas(alphas)
    alphas = alphas.to(log_ratios)[1:]
    return alphas.view(n_transitions, *[1] * (log_ratios.ndim - alphas.ndim), *alphas.shape[1:])


def avo(
    chain: Chain, target: Any, alphas: Tensor, beta: float = 1.0, sample_shape: Shape = (), noise: Tensor | None = None
) -> Tensor:
    """Annealed variational objective: the sum of `avo_steps`; values (*sample, *batch).

    Trains the kernels, and nothing else. Arguments and errors are those of `avo_steps`.
    """
    return avo_steps(chain, target, alphas, beta, sample_shape, noise).sum(0)


def calibrated_avo(
    chain: Chain,
    target: Any,
    alphas: Tensor,
    weight: float,
    beta: float = 1.0,
    sample_shape: Shape = (),
    noise: Tensor | None = None,
) -> Tensor:
    """Loss-calibrated AVO: weight * AVO + (1 - weight) * (beta-)ELBO on the same noise; values (*sample, *batch).

    The ELBO trains base, kernels and model; AVO the kernels alone. Arguments are those of `avo_steps`; raises
    ValueError for a weight outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight}")
    noise = chain.noise(sample_shape) if noise is None else noise
    if weight == 0:
        return elbo(chain, target, noise=noise) if beta == 1 else beta_elbo(chain, target, beta, noise=noise)
    trajectory, local = chain.rsample_twice(noise)
    whole = chain.log_weight(target, trajectory) if beta == 1 else _beta_weight(trajectory, target, beta)
    steps = _local_steps(chain.detach(), target, alphas, beta, local)
    return weight * steps.sum(0) + (1 - weight) * whole


def iwae(chain: Chain, target: Target, n_samples: int, sample_shape: Shape = (), noise: Tensor | None = None) -> Tensor:
    """Importance-weighted bound, the log of the mean of `n_samples` weights; values (*sample, *batch).

    n_samples = 1 is the ELBO.
    """
    shape = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
    log_weight = elbo(chain, target, (n_samples, *shape), noise)
    return torch.logsumexp(log_weight, 0) - math.log(n_samples)


def path_fit(
    chain: Chain, target: Target, alphas: Tensor, sample_shape: Shape = (), noise: Tensor | None = None
) -> Tensor:
    """Minus the sum of the local divergences KL(f_{t-1} q_t / Z_{t-1} || f_t r_t / Z_t): what a learned path maximises.

    The idea of nested variational inference (Zimmermann et al. 2021, arXiv 2106.11302): exponents are good where every
    transition has as little to do as possible. Expectations under f_{t-1} are taken over the chain's samples with the
    weights that they have earned so far, and each log(Z_t / Z_{t-1}) is estimated from the same samples. The gradient
    reaches the alphas alone; values (*batch,).

    Arguments are those of `avo_steps`; of the sample shape, at least one dimension.
    """
    with torch.no_grad():
        trajectory = chain.rsample(sample_shape, noise)
        log_target, log_base = target.log_prob(trajectory.z[1:]), chain.base.log_prob(trajectory.z)
    alpha = _exponents(alphas, trajectory.log_ratios)
    log_f = torch.cat([log_base[:1], alpha * log_target + (1 - alpha) * log_base[1:]])
    steps = log_f[1:] + trajectory.log_ratios - log_f[:-1]
    steps = steps.flatten(1, steps.ndim - 1 - len(chain.base.batch_shape))
    earned = torch.log_softmax(torch.cat([torch.zeros_like(steps[:1]), steps[:-1].cumsum(0)]), 1)
    divergences = torch.logsumexp(earned + steps, 1) - (earned.exp() * steps).sum(1)
    return -divergences.sum(0)
