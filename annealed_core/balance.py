"""Trajectory balance: a chain trained on paths that may be drawn in any way, by the spread of their log-weights.

Where all paths have the same log-weight it is log Z, and the chain is exact: so the spread of the log-weights is an
objective that needs no gradient through the draws, and paths may be drawn with more noise than the chain's own, to find
modes that it has lost (VarGrad: Richter et al. 2020, arXiv 2010.10436; trajectory balance: Malkin et al. 2022, arXiv
2201.13259, and 2023, arXiv 2210.00580, on its relation to variational inference).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from annealed_core.chain import Chain
from annealed_core.description import Annealed, Number
from annealed_core.kernels import normal_log_prob
from annealed_core.objectives import Objective

Noise = Annotated[Any, Annealed(Number(0))]


def path_log_weight(chain: Chain, target: Any, states: Tensor) -> Tensor:
    """The chain's log-weight of given states (T + 1, *sample, *batch, dim), in nats: (*sample, *batch).

    Takes kernels that are pairs of Gaussians, with `forwards` and `reverse`.
    """
    log_weight = target.log_prob(states[-1]) - chain.base.log_prob(states[0])
    for kernel, before, after in zip(chain.kernels, states, states[1:], strict=False):
        log_r = normal_log_prob(before, *kernel.reverse(after, chain.context))
        log_weight = log_weight + log_r - normal_log_prob(after, *kernel.forwards(before, chain.context))
    return log_weight


@torch.no_grad()
def explored(chain: Chain, noise: Tensor, exploration: float) -> Tensor:
    """States of paths whose kernels have the variance sigma^2 + exploration^2: (T + 1, *sample, *batch, dim)."""
    states = [chain.base.rsample(noise[0])]
    for kernel, fresh in zip(chain.kernels, noise[1:], strict=True):
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

    exploration: Noise = 0.0

    alone = True  # models are trained one at a time

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch)."""
        chain, target = chain.detach(), target.frozen() if hasattr(target, "frozen") else target
        log_weight = path_log_weight(chain, target, explored(chain, noise, float(self.exploration)))
        samples = tuple(range(log_weight.ndim - len(chain.base.batch_shape)))
        return -0.5 * (log_weight - log_weight.mean(samples, keepdim=True)).square()
