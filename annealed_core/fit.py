"""Training: one loop for everything.

    fitted = fit(chain, target, AVO(), steps=3000, batch=128, lr=1e-3, seed=0)
    fitted.chain.rsample(1000).z[-1]

`fit` trains any chain on any target by any objective, in place; `maximise` is the loop underneath, for whatever gives
values to be maximised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from annealed_core.chain import Chain, Shape
from annealed_core.moves import check_positive, check_whole
from annealed_core.objectives import ELBO
from annealed_core.schedules import objective_at

RECORDED_STEPS = 250  # between two lines of a history


@dataclass(frozen=True)
class Fitted:
    """What `fit` trained.

    Attributes:
        chain: the chain that was given, or the function of the step.
        objective: what was maximised, with the weights that it learned itself.
        history: lines {"step", "objective"}: the mean of the values, in nats, over the steps since the line before.
    """

    chain: Any
    objective: Any
    history: list[dict[str, float]] = field(default_factory=list)


@torch.enable_grad()
def fit(
    chain: Chain | Callable[[int], tuple[Chain, Any]],
    target: Any = None,
    objective: Any = ELBO(),  # noqa: B008 -- a frozen description
    *,
    steps: int = 3000,
    batch: Shape = 128,
    lr: float = 1e-3,
    lr_schedule: Any = "constant",
    beta1: float = 0.9,
    clip: float | None = None,
    seed: int = 0,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Fitted:
    """Train a chain on a target: Adam on minus the mean of the objective.

    The weights are changed in place, and nothing else: no gradient is left in a target's network, and torch's random
    state stays as it was, except for what kernels or targets of your own draw themselves, as dropout does.

    Args:
        chain: the chain, or a function of the step that gives chain and target, where these change with the step as
            images do. It is asked once for each step.
        target: what the chain is weighed against; with such a function, left out.
        objective: called with chain, target and batch, after `.at(step)` where it has that.
        steps: of training.
        batch: sample shape of a step, such as 128; () where the chain's batch is enough.
        lr, lr_schedule, beta1: Adam's learning rate, whether it stays "constant" or falls to 0 as a "cosine" (or a
            function of the step, by which it is multiplied), and its first decay rate.
        clip: what each element of the gradient is cut off at; None for no cut.
        seed: of the noise, unless the chain has a generator of its own.
        parameters: what is trained; the weights of the chain's kernels unless given. A function of the step must say.

    Raises FloatingPointError, with the step, where the objective is not finite, and ValueError for nothing to train,
    for impossible numbers and for a target whose values have another shape than they should.
    """
    check_whole(steps=steps)
    check_positive(lr=lr)
    if clip is not None:
        check_positive(clip=clip)
    if not isinstance(batch, Sequence):
        check_whole(batch=batch)
    if isinstance(objective, type):
        raise TypeError(f"objective must be an object such as {objective.__name__}(), got the class")
    if isinstance(chain, Chain):
        _check_target(chain, target)
    generator = torch.Generator().manual_seed(seed)
    pair = chain if not isinstance(chain, Chain) else lambda step: (chain, target)
    waiting = [pair(0)]
    start, _ = waiting[0]
    if hasattr(objective, "build"):
        objective = objective.build(len(start))
    trained = list(start.parameters() if parameters is None else parameters)
    for module in [objective] if isinstance(objective, nn.Module) else getattr(objective, "modules", list)():
        trained += module.parameters()
    trained = [parameter for parameter in trained if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing to train: neither kernels nor parameters have weights that take a gradient")
    history: list[dict[str, float]] = []
    recent: list[Tensor] = []

    def values(step: int) -> Tensor:
        now, weighed = waiting.pop() if waiting else pair(step)
        own, now.generator = now.generator, now.generator or generator
        try:
            found = objective_at(objective, step)(now, weighed, batch)
        finally:
            now.generator = own
        if not isinstance(found, Tensor):
            raise TypeError(f"objective must give a tensor of values to be maximised, got {found!r}")
        recent.append(found.detach().mean())
        return found.mean()

    def after(step: int) -> bool:
        if step % min(steps, RECORDED_STEPS) == 0 or step == steps:
            mean = float(torch.stack(recent).mean())
            if not math.isfinite(mean):
                raise FloatingPointError(f"the objective became {mean} by step {step}: lr {lr} may be too large")
            history.append({"step": step, "objective": mean})
            recent.clear()
        return False

    maximise(values, trained, steps, lr=lr, lr_schedule=lr_schedule, beta1=beta1, clip=clip, after=after)
    return Fitted(chain, objective, history)


@torch.no_grad()
def _check_target(chain: Chain, target: Any) -> None:
    """Refuse a target that is none, or whose values would be broadcast. Those with a network to learn are not asked."""
    if not callable(getattr(target, "log_prob", None)):
        raise TypeError(f"target must have log_prob, got {target!r}")
    if hasattr(target, "frozen"):
        return
    z = chain.base.loc.expand(2, *chain.base.loc.shape)
    found = target.log_prob(z)
    if not isinstance(found, Tensor) or found.shape != z.shape[:-1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        wanted = f"{tuple(z.shape[:-1])} for z of {tuple(z.shape)}"
        raise ValueError(f"target.log_prob must give a tensor with a value for each state, {wanted}, got {got}")


def adam(parameters: Iterable[nn.Parameter], lr: float, beta1: float = 0.9) -> torch.optim.Adam:
    """Adam as everything here is trained with it."""
    return torch.optim.Adam(list(parameters), lr, (beta1, 0.999), fused=True)


def _share(lr_schedule: Any, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at that step."""
    if lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    found = lr_schedule(step)
    try:
        share = float(found)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share < math.inf:
        raise ValueError(f"lr_schedule must give a number from 0 at each step, got {found!r} at step {step}")
    return share


def maximise(
    values: Callable[[int], Tensor],
    parameters: Iterable[nn.Parameter],
    steps: int,
    *,
    lr: float,
    lr_schedule: Any = "constant",
    beta1: float = 0.9,
    clip: float | None = None,
    first: int = 0,
    optimiser: torch.optim.Optimizer | None = None,
    after: Callable[[int], bool] | None = None,
) -> None:
    """The training loop: Adam on minus the sum of what `values` gives.

    Args:
        values: step -> values to be maximised, of any shape.
        parameters: what is trained; only these get a gradient, and only while a step is taken.
        steps, first: training goes from step `first` to step `steps`.
        lr, lr_schedule, beta1, clip: as for `fit`.
        optimiser: one with a state, to go on with.
        after: called with the number of steps taken; True ends training.

    Raises ValueError for an unknown lr_schedule, and for one that gives no number or one below 0.
    """
    if not callable(lr_schedule) and lr_schedule not in ("constant", "cosine"):
        raise ValueError(f"unknown lr_schedule {lr_schedule!r}: choose one of constant, cosine")
    parameters = list(dict.fromkeys(parameters))
    optimiser = adam(parameters, lr, beta1) if optimiser is None else optimiser
    try:
        for step in range(first, steps):
            if lr_schedule != "constant":
                for group in optimiser.param_groups:
                    group["lr"] = lr * _share(lr_schedule, step, steps)
            gradients = torch.autograd.grad(-values(step).sum(), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None and clip is not None:
                    gradient = gradient.clamp(-clip, clip)
                if gradient is not None and gradient.stride() != parameter.stride():
                    # Fused Adam takes both as they lie in memory, whatever their strides are.
                    gradient = torch.empty_like(parameter).copy_(gradient)
                parameter.grad = gradient
            optimiser.step()
            if after is not None and after(step + 1):
                break
    finally:
        optimiser.zero_grad()
