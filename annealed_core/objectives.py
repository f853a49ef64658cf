"""Objectives: called with a chain and a target, they give values in nats, to be maximised.

    AVO(weight=0.2)(chain, target, 128)     # (128, *batch)

`sample_shape` and `noise` are those of `Chain.rsample`. What changes with the step is a schedule in a field:
`ELBO(beta=Linear(0.2, 2e-4)).at(1000)` is the objective of that step. What is learned, such as the exponents of a path,
`build` makes. A function or object of the reader's own with the same call can take an objective's place. Sources: Huang
et al. 2018 (arXiv 1809.01818) for AVO; Burda et al. 2016 for IWAE; Bowman et al. 2016, Sonderby et al. 2016 for beta.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Any, Self

import torch
from torch import Tensor, nn

from annealed_core.chain import Chain, Shape, Trajectory
from annealed_core.description import Calls, Description, Share, Size
from annealed_core.schedules import Annealing, value_at
from annealed_core.targets import LinearAlphas, Target, exponents

#: Draws that teach a learned path where a batch has one draw for each element. With few one outweighs the others: from
#: a base far from its target, in 40 dimensions, exponents are off by up to 0.18 with 8 draws and 0.09 with 256.
PATH_SAMPLES = 256
Alphas = Annotated[Any, Calls("LinearAlphas(), GeometricAlphas(), LearnedAlphas() or another function of T")]


class Objective(Description):
    """What all objectives here can do beside being called."""

    def __call__(self, chain: Chain, target: Any, sample_shape: Shape = (), noise: Tensor | None = None) -> Tensor:
        """Values (*sample, *batch) in nats, to be maximised. Raises TypeError where a field is still a schedule."""
        if annealed := self.annealed():
            raise TypeError(f"{self!r} is another objective at each step, by its {', '.join(annealed)}: call .at(step)")
        return self.values(chain, target, chain.noise(self.draws(sample_shape)) if noise is None else noise)

    def draws(self, sample_shape: Shape) -> tuple[int, ...]:
        """The sample shape that trajectories are drawn with."""
        return (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """What is maximised on that noise, (*sample, *batch)."""
        raise NotImplementedError

    def at(self, step: int) -> Self:
        """The objective of that step: schedules are replaced by their values."""
        return self._with(**{name: value_at(schedule, step) for name, schedule in self.annealed().items()})

    def build(self, n: int, batch_shape: Sequence[int] = ()) -> Self:
        """The objective for a chain of n kernels, with weights where it learns something itself."""
        alphas: Any = getattr(self, "alphas", None)
        return self._with(alphas=alphas.build(n, batch_shape)) if hasattr(alphas, "build") else self

    def modules(self) -> list[nn.Module]:
        """What it learns itself."""
        return [each for each in self.fields().values() if isinstance(each, nn.Module)]

    def _with(self, **changes: Any) -> Self:
        """With values that are known to be right: they may be tensors or modules."""
        found = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(found, name, value)
        return found


class ELBO(Objective):
    """The (hierarchical) evidence lower bound, E[log f(z_T) + sum_t log r_t/q_t - log q_0(z_0)].

    With beta, deterministic warm-up: E[log p(x | z_T)] + beta * (log p(z_T) + sum_t log r_t/q_t - log q_0(z_0)); the
    target is then a joint density with `log_likelihood` and `log_prior`, such as `vae.Joint`.
    """

    beta: Annealing = 1.0

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch)."""
        trajectory = chain.rsample(noise=noise)
        if self.beta == 1:
            return chain.log_weight(target, trajectory)
        z = trajectory.z[-1]
        return target.log_likelihood(z) + self.beta * (target.log_prior(z) - log_q(trajectory))


def log_q(trajectory: Trajectory) -> Tensor:
    """Log q_0(z_0) - sum_t log r_t/q_t: without kernels the posterior's log-density at z_T."""
    return trajectory.log_q0 - trajectory.log_ratios.sum(0)


class AlphaELBO(Objective):
    """Alpha-annealing, the energy tempered: E[alpha * log f(z_T) + sum_t log r_t/q_t - log q_0(z_0)].

    alpha = 1 is the ELBO.
    """

    alpha: Annealing = 1.0

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch)."""
        trajectory = chain.rsample(noise=noise)
        return self.alpha * target.log_prob(trajectory.z[-1]) - log_q(trajectory)


class IWAE(Objective):
    """Importance-weighted bound, the log of the mean of `samples` weights (Burda et al. 2016, arXiv 1509.00519).

    samples = 1 is the ELBO. Noise, where it is given, is for the sample shape (samples, *sample).
    """

    samples: Size = 8
    beta: Annealing = 1.0

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch)."""
        log_weight = _BOUND._with(beta=self.beta).values(chain, target, noise)
        # Weights below 1e-25 of the largest are as good as 0, and become numbers that processors are slow with.
        floor = log_weight.detach().amax(0) - 57
        return torch.logsumexp(torch.where(log_weight >= floor, log_weight, -torch.inf), 0) - math.log(self.samples)

    def draws(self, sample_shape: Shape) -> tuple[int, ...]:
        """As many times `samples`, which come first."""
        return self.samples, *super().draws(sample_shape)


def avo_steps(
    chain: Chain, target: Any, alphas: Any, beta: float = 1.0, sample_shape: Shape = (), noise: Tensor | None = None
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
        alphas: exponents of the path, (T + 1,), rising from exactly 0 to exactly 1, or a function of T that gives
            them; or (T + 1, *batch), a path for each element of the batch.
        beta: in [0, 1].
        sample_shape, noise: as for `Chain.rsample`.

    Raises ValueError for alphas that do not fit.
    """
    chain, target = chain.detach(), _frozen(target)
    trajectory = chain.rsample(sample_shape, noise, local=True)
    moved, ratios = trajectory.z[1:], trajectory.log_ratios
    alpha = _along(exponents(alphas, len(chain)).detach(), ratios)
    log_target = target.log_prob(moved) if beta == 1 else target.log_likelihood(moved) + beta * target.log_prior(moved)
    log_f = alpha * log_target + (1 - alpha) * beta * chain.base.log_prob(moved)
    log_f_before = torch.cat([beta * trajectory.log_q0.unsqueeze(0), log_f[:-1]]).detach()
    return log_f + beta * ratios - log_f_before


def _frozen(target: Any) -> Any:
    return target.frozen() if callable(getattr(target, "frozen", None)) else target


def _along(alphas: Tensor, log_ratios: Tensor) -> Tensor:
    """The exponents alpha_1 ... alpha_T of each transition, in the shape of the log-ratios."""
    alphas = alphas.to(log_ratios)[1:]
    return alphas.view(len(alphas), *[1] * (log_ratios.ndim - alphas.ndim), *alphas.shape[1:])


class LocalAVO(Objective):
    """The sum of AVO's local objectives, `avo_steps`: it trains the kernels, and nothing else.

    Attributes:
        beta: of the deterministic warm-up.
        alphas: exponents of the path, a function of T. With `LearnedAlphas()` they learn by `path_fit`.
    """

    beta: Annealing = 1.0
    alphas: Alphas = LinearAlphas()

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch)."""
        values = avo_steps(chain, target, self.alphas, self.beta, noise=noise).sum(0)
        if not isinstance(self.alphas, nn.Module):
            return values
        fit = _fit_of_batch(chain, target, self.alphas, noise)
        return values + fit - fit.detach()


class AVO(Objective):
    """Annealed variational objective (Huang et al. 2018, arXiv 1809.01818).

    At weight 1 it trains the kernels by AVO alone, and base and model, where they learn, by the (beta-)ELBO on the
    same noise, whose value it then has. Below 1 it is the loss-calibrated sum weight * AVO + (1 - weight) * ELBO, of
    which the ELBO trains base, kernels and model, and AVO the kernels.

    Attributes:
        weight: of AVO.
        beta, alphas: as for `LocalAVO`.
        samples: above 1, the importance-weighted bound of so many samples takes the ELBO's place.
    """

    weight: Share = 1.0
    beta: Annealing = 1.0
    alphas: Alphas = LinearAlphas()
    samples: Size = 1

    def draws(self, sample_shape: Shape) -> tuple[int, ...]:
        """As many times `samples`, where there are several, which come first."""
        return (self.samples,) * (self.samples > 1) + super().draws(sample_shape)

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch)."""
        bound = _BOUND._with(beta=self.beta) if self.samples == 1 else IWAE(self.samples)._with(beta=self.beta)
        if self.weight == 0 or len(chain) == 0:
            return bound.values(chain, target, noise)
        # The ELBO first: it updates batch statistics, and AVO's backward pass must find those that it used.
        if self.weight < 1:
            whole = bound.values(chain, target, noise)
            return self.weight * self._local(chain, target, noise) + (1 - self.weight) * whole
        learning = (chain.base.loc, chain.base.scale, chain.context)
        if not (hasattr(target, "frozen") or any(each is not None and each.requires_grad for each in learning)):
            return self._local(chain, target, noise)
        whole = bound.values(chain.freeze(), target, noise)
        steps = self._local(chain, target, noise)
        return whole + steps - steps.detach()

    def _local(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        values = _LOCAL._with(beta=self.beta, alphas=self.alphas).values(chain, target, noise)
        return values if self.samples == 1 else values.mean(0)


_BOUND, _LOCAL = ELBO(), LocalAVO()  # what other objectives are made of


def path_fit(
    chain: Chain, target: Target, alphas: Any, sample_shape: Shape = (), noise: Tensor | None = None
) -> Tensor:
    """Minus the sum of the local divergences KL(f_{t-1} q_t / Z_{t-1} || f_t r_t / Z_t): what a learned path maximises.

    The idea of nested variational inference (Zimmermann et al. 2021, arXiv 2106.11302): exponents are good where every
    transition has as little to do as possible. Expectations under f_{t-1} are taken over the chain's samples with the
    weights that they have earned so far, and each log(Z_t / Z_{t-1}) is estimated from the same samples. The gradient
    reaches the alphas alone; values (*batch,).

    Arguments are those of `avo_steps`; of the sample shape, at least one dimension.
    """
    target = _frozen(target)
    with torch.no_grad():
        trajectory = chain.rsample(sample_shape, noise)
        log_target, log_base = target.log_prob(trajectory.z[1:]), chain.base.log_prob(trajectory.z)
    alpha = _along(exponents(alphas, len(chain)), trajectory.log_ratios)
    log_f = torch.cat([log_base[:1], alpha * log_target + (1 - alpha) * log_base[1:]])
    steps = log_f[1:] + trajectory.log_ratios - log_f[:-1]
    steps = steps.flatten(1, steps.ndim - 1 - len(chain.base.batch_shape))
    earned = torch.log_softmax(torch.cat([torch.zeros_like(steps[:1]), steps[:-1].cumsum(0)]), 1)
    divergences = torch.logsumexp(earned + steps, 1) - (earned.exp() * steps).sum(1)
    return -divergences.sum(0)


def _fit_of_batch(chain: Chain, target: Any, alphas: nn.Module, noise: Tensor) -> Tensor:
    """`path_fit` from the draws at hand; where there is one draw for each element of a batch, from more.

    Of a path that all elements share the first one teaches.
    """
    if noise.ndim > 2 + len(chain.base.batch_shape):
        return path_fit(chain, target, alphas, noise=noise)
    if chain.base.batch_shape and alphas(len(chain)).ndim == 1:
        chain, target = chain[:1], target[:1] if hasattr(target, "__getitem__") else target
    return path_fit(chain, target, alphas, PATH_SAMPLES).mean()
