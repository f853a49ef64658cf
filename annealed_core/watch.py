"""Watching targets: those of many models as one, and what is said of one that fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from annealed_core.stack import samples_last
from annealed_core.targets import name_of


class Watched:
    """The targets of M models as one: element m of the last batch dimension is weighed by the target of model m.

    A value or a gradient that is not finite is noted in `failures`, model -> one line that names target, step and
    sample point: the others train on. Compiled code watches nothing; `toys.Toys` then looks at what comes out of it.

    Args:
        targets: M targets of one dimension; models of the same target are best side by side.
        hint: what may be wrong where the samples themselves are not finite.
    """

    def __init__(self, targets: Sequence[Any], hint: str = "training diverges") -> None:
        self.targets, self.dim, self.hint = list(targets), targets[0].dim, hint
        starts = [m for m, target in enumerate(targets) if m == 0 or target is not targets[m - 1]]
        self._slices = list(zip(starts, [*starts[1:], len(targets)], strict=True))
        self.failures: dict[int, str] = {}
        self.step = 0

    def log_prob(self, z: Tensor) -> Tensor:
        """Log f_m(z) in nats; z: (*sample, M, dim) -> (*sample, M)."""
        point = z.detach()
        watching = not torch.compiler.is_compiling()
        if z.requires_grad and watching:
            z = z.view_as(z)  # its own node, whose gradient is that of log_prob alone
            z.register_hook(lambda gradient: self._watch("the gradient of log_prob", gradient, point))
        parts, ordered = [], samples_last(z)
        for start, end in self._slices:
            part, target = ordered[..., start:end, :, :], self.targets[start]
            values = target.log_prob(part)
            if values.shape != part.shape[:-1]:
                shapes = f"log_prob of z {tuple(part.shape)} must have shape {tuple(part.shape[:-1])}"
                raise ValueError(f"target {name_of(target)}: {shapes}, got {tuple(values.shape)} at step {self.step}")
            parts.append(values)
        values = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
        values = values.mT if z.ndim > 2 else values.squeeze(-1)
        if watching:
            self._watch("log_prob", values.detach().unsqueeze(-1), point)
        return values

    def _watch(self, what: str, values: Tensor, z: Tensor) -> None:
        if math.isfinite(values.sum()):
            return
        wrong = ~values.isfinite().all(-1)
        for model in wrong.flatten(0, -2).any(0).nonzero().flatten().tolist():
            where = wrong[..., model].flatten().nonzero()[0]
            bad, point = (x[..., model, :].flatten(0, -2)[where].flatten() for x in (values, z))
            value = float(bad[~bad.isfinite()][0])
            if model in self.failures:
                continue
            if not point.isfinite().all():
                self.failures[model] = f"samples became {point.sum():g} at step {self.step}: {self.hint}"
                continue
            target, at = name_of(self.targets[model]), ", ".join(f"{x:.4g}" for x in point.tolist())
            self.failures[model] = f"target {target}: {what} is {value} at step {self.step}, at z = ({at})"
