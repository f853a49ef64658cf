"""The earlier reproduction's objective, with each of its faults as a switch.

Its HVI-AVO came to 108.67 nats on MNIST. What its code (github.com/alexey-pronkin/annealed) did differently from
`objectives.avo` is taken apart here, so that each fault can be trained with alone, or all but it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from annealed_core.chain import Chain

#: What each fault does. The last two are no matter of the objective: `mnist.Mnist` sees to them.
FAULTS = {
    "summed": "the likelihood is summed over the batch, everything else is per image",
    "live_base": "the encoder is not cut off: f_0 is its q_0 with live parameters, rewarded for chasing the states, "
    "and without beta; the kernels' context has a gradient too",
    "decoder": "the decoder, its batch statistics included, learns from the states on the way too",
    "grey": "trained and selected on grey pixels, of which a Bernoulli decoder gives no likelihood",
    "unshuffled": "the images come in the same order in every epoch, and the last weights are kept, not the best",
}


def check_faults(faults: Collection[str]) -> None:
    """Refuse a fault that is not in `FAULTS` with ValueError."""
    for fault in faults:
        if fault not in FAULTS:
            raise ValueError(f"unknown fault {fault!r}: choose some of {', '.join(FAULTS)}")


def faulty_avo(
    chain: Chain, joint: Any, alphas: Tensor, beta: float, faults: Collection[str], noise: Tensor | None = None
) -> Tensor:
    """AVO with some of the earlier faults; without any it has the gradient of `objectives.avo`. Values (*batch,).

    Terms without a gradient are left out, so that only the gradient means something.

    Args:
        chain: with T kernels, its batch the images.
        joint: the target, such as `vae.Joint`.
        alphas: exponents of the path, (T + 1,), from 0 to 1.
        beta: of the deterministic warm-up, in [0, 1].
        faults: names in `FAULTS`.
        noise: as for `Chain.rsample`.
    """
    check_faults(faults)
    cut = chain.detach()
    if "live_base" in faults:
        trajectory = Chain(cut.base, chain.kernels, chain.context).rsample(noise=noise, local=True)
        log_f0 = chain.base.log_prob(trajectory.z[1:])
    else:
        trajectory = cut.rsample(noise=noise, local=True)
        log_f0 = beta * cut.base.log_prob(trajectory.z[1:])
    moved = trajectory.z[1:]
    if "decoder" in faults:  # decoded one after another, with statistics of its own for each
        likelihood = torch.stack([joint.log_likelihood(z) for z in moved])
    else:
        likelihood = joint.frozen().log_likelihood(moved)
    if "summed" in faults:
        likelihood = likelihood.sum(-1, keepdim=True)
    alpha = alphas[1:].to(likelihood).unsqueeze(-1)
    log_f = alpha * (likelihood + beta * joint.log_prior(moved)) + (1 - alpha) * log_f0
    return (log_f + beta * trajectory.log_ratios).sum(0)
