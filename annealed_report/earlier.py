"""The earlier reproduction's objective, with each of its faults as a switch.

Its HVI-AVO came to 108.67 nats on MNIST. What its code (github.com/alexey-pronkin/annealed) did differently from
`LocalAVO` is taken apart here, so that each fault can be trained with alone, or all but it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from annealed_core.chain import Chain
from annealed_core.description import Boolean, Share
from annealed_core.objectives import ELBO, Alphas, LocalAVO, Objective
from annealed_core.schedules import Annealing, Mixed
from annealed_core.targets import LinearAlphas, exponents

#: What each fault does. The first three are `EarlierAVO`'s, the last two `Mnist(grey=True, shuffled=False)`.
FAULTS = {
    "summed": "the likelihood is summed over the batch, everything else is per image",
    "live_base": "the encoder is not cut off: f_0 is its q_0 with live parameters, rewarded for chasing the states, "
    "and without beta; the kernels' context has a gradient too",
    "decoder": "the decoder, its batch statistics included, learns from the states on the way too",
    "grey": "trained and selected on grey pixels, of which a Bernoulli decoder gives no likelihood",
    "unshuffled": "the images come in the same order in every epoch, and the last weights are kept, not the best",
}


class EarlierAVO(Objective):
    """AVO with some of the earlier faults; without any it has the gradient of `LocalAVO`.

    Terms without a gradient are left out, so that only the gradient means something. The target is a joint density,
    such as `vae.Joint`, and the chain's batch the images.

    Attributes:
        weight: of this objective in a sum with the ELBO on the same noise; 1 for it alone.
        beta, alphas: as for `LocalAVO`, with exponents that do not learn.
        summed, live_base, decoder: see `FAULTS`.
    """

    weight: Share = 1.0
    beta: Annealing = 1.0
    alphas: Alphas = LinearAlphas()
    summed: Boolean = False
    live_base: Boolean = False
    decoder: Boolean = False

    def check(self) -> None:
        """Refuse exponents that would have to learn."""
        if hasattr(self.alphas, "build"):
            raise ValueError(f"impossible alphas {self.alphas!r} of EarlierAVO: its path does not learn")

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch)."""
        if self.weight == 1:
            return self._steps(chain, target, noise)
        # The ELBO first: it updates batch statistics, and the steps' backward pass must find those that it used.
        whole = ELBO()._with(beta=self.beta).values(chain, target, noise)
        return self.weight * self._steps(chain, target, noise) + (1 - self.weight) * whole

    def _steps(self, chain: Chain, joint: Any, noise: Tensor) -> Tensor:
        cut = chain.detach()
        context = chain.context if self.live_base else cut.context
        trajectory = type(chain)(cut.base, chain.kernels, context, chain.generator).rsample(noise=noise, local=True)
        moved = trajectory.z[1:]
        log_f0 = chain.base.log_prob(moved) if self.live_base else self.beta * cut.base.log_prob(moved)
        if self.decoder:  # decoded one after another, with statistics of its own for each
            likelihood = torch.stack([joint.log_likelihood(z) for z in moved])
        else:
            likelihood = joint.frozen().log_likelihood(moved)
        if self.summed:
            likelihood = likelihood.sum(-1, keepdim=True)
        alpha = exponents(self.alphas, len(chain))[1:].to(likelihood).view(-1, *[1] * (likelihood.ndim - 1))
        log_f = alpha * (likelihood + self.beta * joint.log_prior(moved)) + (1 - alpha) * log_f0
        return (log_f + self.beta * trajectory.log_ratios).sum(0)


def faulty(*faults: str, beta: Any = 1.0, chance: float = 0.2) -> dict[str, Any]:
    """The fields of an `Mnist` that trains as the earlier code did, AVO in some of the batches, with these faults.

    Args:
        faults: names in `FAULTS`.
        beta: of the deterministic warm-up, a number or a schedule.
        chance: of AVO in a batch, else the ELBO is taken.

    Raises ValueError for an unknown fault.
    """
    for fault in faults:
        if fault not in FAULTS:
            raise ValueError(f"unknown fault {fault!r}: choose some of {', '.join(FAULTS)}")
    switches = {name: True for name in ("summed", "live_base", "decoder") if name in faults}
    avo = EarlierAVO(beta=beta, **switches) if switches else LocalAVO(beta)
    return {
        "objective": Mixed(avo, ELBO(beta), chance),
        "grey": "grey" in faults,
        "shuffled": "unshuffled" not in faults,
    }
