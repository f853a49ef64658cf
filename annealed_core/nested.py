"""Objectives of particles and of whole paths: nested variational inference, trajectory balance, the inclusive KL.

    fit(chain, target, NVI(resample=True), batch=36)        # and the chain that resamples, sequential Monte Carlo:
    found = sequential(chain, target, 1000)                 # found.log_z, found.z
    fit(chain, target, TrajectoryBalance(exploration=0.1))
    fit(chain, target, Inclusive(SMC("gmm40")))             # from draws of the target, backwards

The first two go one transition at a time, from f_{t-1} to f_t, and each has the increment log f_t(z_t) -
log f_{t-1}(z_{t-1}) + log r_t(z_{t-1} | z_t) - log q_t(z_t | z_{t-1}), AVO's local objective. AVO takes it under
q_{t-1}; nested variational inference (Zimmermann et al. 2021, arXiv 2106.11302) under f_{t-1}, for which particles
carry weights (NVI) or are drawn anew by them (NVIR). With flows for kernels this is what AFT and CRAFT train (Arbel et
al. 2021, arXiv 2102.07501; Matthews et al. 2022, arXiv 2201.13117).

Trajectory balance trains a chain by the spread of its log-weights. Where all paths have the same it is log Z, and the
chain is exact: so this needs no gradient through the draws, and paths may be drawn with more noise than the chain's
own, to find modes that it has lost (VarGrad, on policy: Richter et al. 2020, arXiv 2010.10436; Malkin et al. 2022,
arXiv 2201.13259, and 2023, arXiv 2210.00580, on its relation to variational inference).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from annealed_core.chain import Chain, Shape
from annealed_core.description import Boolean, Calls
from annealed_core.evidence import effective_sample_size, log_mean_weight, log_prob_double
from annealed_core.kernels import drawn_log_prob, normal_log_prob
from annealed_core.moves import draw_like
from annealed_core.objectives import Alphas, Objective
from annealed_core.schedules import Weight
from annealed_core.targets import LinearAlphas, exponents


def resampled(log_weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Which particles go on, by systematic resampling: log-weights (n, *batch) -> indices (n, *batch).

    Each comes n times its normalised weight on average, and never less or more often than that rounded down or up. One
    uniform number is drawn for each element of the batch.
    """
    n = len(log_weights)
    shares = torch.softmax(log_weights.double(), 0).movedim(0, -1).cumsum(-1)
    start = draw_like(torch.rand, shares[..., :1], generator)
    points = (start + torch.arange(n, device=shares.device)) / n
    return torch.searchsorted(shares / shares[..., -1:], points.contiguous()).clamp(max=n - 1).movedim(-1, 0)


def _check_draws(objective: Objective, chain: Chain, noise: Tensor) -> None:
    """Refuse a single draw, which has no other to be held against."""
    drawn = noise.shape[1 : noise.ndim - 1 - len(chain.base.batch_shape)]
    if not drawn or drawn[0] < 2:
        name, got = type(objective).__name__, tuple(drawn)
        raise ValueError(f"{name} must have 2 or more draws of each path, a sample shape such as 128, got {got}")


def chosen(z: Tensor, index: Tensor) -> Tensor:
    """The particles z (n, *batch, dim) of those indices (n, *batch)."""
    return z.gather(0, index.unsqueeze(-1).expand_as(z))


def steps_of(
    chain: Chain, target: Any, alphas: Any, noise: Tensor, resample: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
    """Transition by transition: increments, the log-weights before them, states, and whether all were drawn anew.

    Increments and log-weights are (n, *batch), states (n, *batch, dim). Particles are resampled before a transition
    where their effective sample size is below the share `resample` in any element of the batch. States are cut off
    before each transition.
    """
    alpha = exponents(alphas, len(chain)).detach().to(noise)
    z, log_base = chain.base.rsample(noise[0]).detach(), chain.base.drawn_log_prob(noise[0]).detach()
    log_f, weights = log_base, torch.zeros_like(log_base)
    for t, (kernel, fresh) in enumerate(zip(chain.kernels, noise[1:], strict=True), 1):
        drawn = bool((effective_sample_size(weights) < resample).any())
        if drawn:
            index = resampled(weights, chain.generator)
            z, log_f = chosen(z, index), log_f.gather(0, index)
            weights = log_mean_weight(weights)[0].expand_as(weights)
        moved, log_ratio = kernel(z, chain.context, fresh)
        log_next = alpha[t] * target.log_prob(moved) + (1 - alpha[t]) * chain.base.log_prob(moved)
        increment = log_next + log_ratio - log_f
        yield increment, weights, moved, drawn
        z, log_f, weights = moved.detach(), log_next.detach(), weights + increment.detach()


class NVI(Objective):
    """Nested variational inference's local objectives, each under the density that the step starts from.

    The draws of a batch are its particles: the first dimension of the sample shape, 2 or more.

    Attributes:
        resample: draw particles anew by their weights before each transition (NVIR), instead of weighing them.
        alphas: exponents of the path.
    """

    resample: Boolean = False
    alphas: Alphas = LinearAlphas()

    alone = True  # models are trained one at a time

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch), whose mean is the sum of the weighted local objectives."""
        _check_draws(self, chain, noise)
        target = target.frozen() if hasattr(target, "frozen") else target
        found = torch.zeros_like(noise[0, ..., 0])
        for increment, weights, _, _ in steps_of(chain.detach(), target, self.alphas, noise, 2.0 * self.resample):
            found = found + torch.softmax(weights, 0) * len(weights) * increment
        return found


@dataclass(frozen=True)
class Sequential:
    """What `sequential` gives.

    Attributes:
        z, log_weights: the last states (n, *batch, dim), and their log-weights; all are the mean weight once resampled.
        log_z: estimate of log Z in nats, (*batch,): exp of it is unbiased for Z.
        ess: effective sample size of the last weights as a fraction, (*batch,).
        resamplings: how often particles were drawn anew.
    """

    z: Tensor
    log_weights: Tensor
    log_z: Tensor
    ess: Tensor
    resamplings: int


@torch.no_grad()
def sequential(
    chain: Chain,
    target: Any,
    n: Shape,
    alphas: Any = LinearAlphas(),  # noqa: B008 -- a frozen description
    resample: float = 0.5,
    noise: Tensor | None = None,
) -> Sequential:
    """Sequential Monte Carlo with a chain's own kernels (Del Moral, Doucet & Jasra 2006).

    Args:
        chain: with T kernels, trained or not.
        target: f_T.
        n: particles.
        alphas: exponents of the path, or a function of T.
        resample: the share of the particles below which their effective sample size makes them be drawn anew; 0 for
            never: importance sampling of the whole path.
        noise: as for `Chain.rsample`.
    """
    noise = chain.noise(n) if noise is None else noise
    z, log_weights, resamplings = chain.base.rsample(noise[0]), torch.zeros_like(noise[0, ..., 0]), 0
    for increment, weights, moved, drawn in steps_of(chain, target, alphas, noise, resample):
        z, log_weights, resamplings = moved, weights + increment, resamplings + drawn
    log_weights = log_weights.double()
    return Sequential(z, log_weights, log_mean_weight(log_weights)[0], effective_sample_size(log_weights), resamplings)


def _pairs_of(chain: Chain) -> Any:
    """The kernels; TypeError for those that are no pairs of Gaussians."""
    for kind in (type(kernel).__name__ for kernel in chain.kernels if not hasattr(kernel, "forwards")):
        raise TypeError(f"kernels must be pairs of Gaussians, such as those of Gated() or Drift(), got {kind}")
    return chain.kernels


def path_log_weight(chain: Chain, target: Any, states: Tensor) -> Tensor:
    """The chain's log-weight of given states (T + 1, *sample, *batch, dim), in nats: (*sample, *batch).

    Takes kernels that are pairs of Gaussians, with `forwards` and `reverse`.
    """
    log_weight = target.log_prob(states[-1]) - chain.base.log_prob(states[0])
    for kernel, before, after in zip(_pairs_of(chain), states, states[1:], strict=False):
        log_r = normal_log_prob(before, *kernel.reverse(after, chain.context))
        log_weight = log_weight + log_r - normal_log_prob(after, *kernel.forwards(before, chain.context))
    return log_weight


@torch.no_grad()
def explored(chain: Chain, noise: Tensor, exploration: float) -> Tensor:
    """States of paths whose kernels have the variance sigma^2 + exploration^2: (T + 1, *sample, *batch, dim)."""
    states = [chain.base.rsample(noise[0])]
    for kernel, fresh in zip(_pairs_of(chain), noise[1:], strict=True):
        loc, scale = kernel.forwards(states[-1], chain.context)
        states.append(loc + (scale.square() + exploration**2).sqrt() * fresh)
    return torch.stack(states)


class TrajectoryBalance(Objective):
    """Minus half the squared distance of each path's log-weight from the mean of the batch: VarGrad.

    On policy, without exploration, its gradient by the forward kernels is that of the ELBO in expectation; the reverse
    ones learn by another. Trained are the kernels.

    Attributes:
        exploration: standard deviation that is added to every transition's noise, or a schedule of it: it should end
            at 0.
    """

    exploration: Weight = 0.0

    alone = True  # models are trained one at a time

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch)."""
        _check_draws(self, chain, noise)
        chain, target = chain.detach(), target.frozen() if hasattr(target, "frozen") else target
        log_weight = path_log_weight(chain, target, explored(chain, noise, float(self.exploration)))
        samples = tuple(range(log_weight.ndim - len(chain.base.batch_shape)))
        return -0.5 * (log_weight - log_weight.mean(samples, keepdim=True)).square()


def _before(kernel: Any, z_next: Tensor, context: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A state drawn from the reverse kernel, and log r - log q of the transition from it."""
    if hasattr(kernel, "back"):
        found: tuple[Tensor, Tensor] = kernel.back(z_next, context, noise)
        return found
    if hasattr(kernel, "inverse"):
        z = kernel.inverse(z_next, context)
        if torch.is_grad_enabled() and not z.requires_grad:
            raise TypeError(
                f"the inverse of {type(kernel).__name__} gives no gradient: its chain can't be fitted backwards"
            )
        return z, kernel(z, context)[1]
    if hasattr(kernel, "reverse"):
        loc, scale = kernel.reverse(z_next, context)
        z = loc + scale * noise
        return z, drawn_log_prob(noise, scale) - normal_log_prob(z_next, *kernel.forwards(z, context))
    raise ValueError(f"kernel {type(kernel).__name__} can't be gone back: it has neither reverse, inverse nor back")


def reverse_log_weights(chain: Chain, target: Any, z: Tensor, noise: Tensor | None = None) -> Tensor:
    """Log-weights of paths that go back from exact draws z (n, *batch, dim) of the target, in nats: (n, *batch).

    They are those of `Chain.log_weight`: their mean is at least log Z (EUBO: Blessing et al. 2024, arXiv 2406.07423),
    and -log of the mean of exp of minus them is too, and nearer.
    """
    noise, log_weights = chain.noise(len(z)) if noise is None else noise, log_prob_double(target, z)
    z = z.to(noise)
    for kernel, fresh in reversed(list(zip(chain.kernels, noise[1:], strict=True))):
        z, log_ratio = _before(kernel, z, chain.context, fresh)
        log_weights = log_weights + log_ratio
    return log_weights - chain.base.log_prob(z)


class Inclusive(Objective):
    """Minus the log-weights of paths that go back from draws of the target, minus the EUBO: the inclusive divergence.

    The ELBO is below log Z by KL(q || p), the EUBO above by KL(p || q), which is large wherever q lacks a mode. For
    flows it is the likelihood of the draws. Takes kernels whose inverse or `reverse` has gradients.

    Attributes:
        sampler: a function without arguments that gives draws (m, dim), such as `smc.SMC` or one of draws by NUTS.
    """

    sampler: Annotated[Any, Calls("a function that gives draws, such as SMC()")]

    alone = True  # models are trained one at a time

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch); each has a draw by chance, and of the noise what kernels go back with."""
        draws: Tensor = self.sampler().to(noise)
        places = (draw_like(torch.rand, noise[0, ..., 0].double(), chain.generator) * len(draws)).long()
        return -reverse_log_weights(chain.detach(), target, draws[places], noise)
