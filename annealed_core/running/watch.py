"""What is the user's own: looked at before training, and targets watched while it goes on."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from annealed_core.description import Description, Number, one_line
from annealed_core.schedules import Between, Constant, Cyclical, Geometric, Linear, value_at
from annealed_core.speed.stack import models_last, samples_last
from annealed_core.targets import name_of

_ROUNDING = 1e-9  # so near to 0 or 1, a function's value counts as that
_NEAR = 0.95  # a warm-up that ends training below this is warned of


def check_target(target: Any, device: str = "cpu") -> None:
    """Refuse a target that chains can't be trained on, as far as eight points around 0 tell.

    Its `log_prob` must work there, give values of the right shape that are not NaN or +inf, and have a finite gradient
    with respect to z. What it declares of itself must be what it should. Raises ValueError with one line that names the
    target and what is wrong.
    """
    name = name_of(target)
    _check_declared(target, name)
    z = torch.linspace(-1, 1, 8, device=device).unsqueeze(-1).expand(8, target.dim).contiguous()
    try:
        with torch.no_grad():
            values = target.log_prob(z.clone())
    except Exception as error:
        reason = _first_line(error)
        raise ValueError(f"target {name}: log_prob fails for z of shape (8, {target.dim}): {reason}") from error
    if not isinstance(values, Tensor):
        wanted = f"log_prob of z (8, {target.dim}) must be a tensor of torch of shape (8,)"
        kind = type(values).__name__
        raise ValueError(f"target {name}: {wanted}, got {kind}: a density of NumPy or JAX goes into External")
    shape = tuple(values.shape)
    if shape != (8,):
        raise ValueError(f"target {name}: log_prob of z (8, {target.dim}) must have shape (8,), got {shape}")
    _refuse_points(values.isnan() | (values == torch.inf), values, z, f"target {name}: log_prob")
    reason = ""
    try:
        with torch.enable_grad():
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(target.log_prob(z).sum(), z, allow_unused=True)
    except Exception as error:  # without a gradient it worked: such as numpy(), which refuses a z that needs one
        gradient, reason = None, f" ({_first_line(error)})"
    if gradient is None:
        advice = "compute it with differentiable operations of torch on z, not in place, without detach() or numpy"
        raise ValueError(f"target {name}: log_prob has no gradient with respect to z{reason}: {advice}")
    _refuse_points(~gradient.isfinite().all(-1), gradient.sum(-1), z, f"target {name}: the gradient of log_prob")


def _refuse_points(wrong: Tensor, values: Tensor, z: Tensor, what: str) -> None:
    if wrong.any():
        where = ", ".join(f"{x:.2g}" for x in z[wrong][0].tolist())
        raise ValueError(f"{what} is {float(values[wrong][0])} at z = ({where})")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_declared(target: Any, name: str) -> None:
    """Look at those attributes of a target that may be there."""
    for attribute in ("base_scale", "box", "support", "log_normalizer"):
        value = getattr(target, attribute, None)
        if value is None or isinstance(value, Constraint):  # what torch calls support is no width
            continue
        takes = Number() if attribute == "log_normalizer" else Number(0, open_low=True)
        if takes(value) is None:
            raise ValueError(f"target {name}: {attribute} must be {takes.takes}, got {_short(value)}")
    modes = getattr(target, "modes", None)
    if modes is not None:
        try:
            shapes = [tuple(torch.as_tensor(each).shape) for each in modes]
        except Exception:  # what torch can make no tensor of
            shapes = []
        if len(shapes) != 2 or shapes[0] != (*shapes[1], target.dim) or len(shapes[1]) != 1:
            wanted = f"centres (M, {target.dim}) and masses (M,)"
            raise ValueError(f"target {name}: modes must be {wanted}, got {_short(modes)}")


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 60, placeholder=" ...")


class Watched:
    """The targets of M models as one: element m of the last batch dimension is weighed by the target of model m.

    A value or a gradient that is not finite is noted in `failures`, model -> one line that names target, step and
    sample point: the others train on. Compiled code watches nothing: look at what comes out of it.

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
        return self._each("log_prob", z)

    def log_likelihood(self, z: Tensor) -> Tensor:
        """The same of the targets' log-likelihoods, where they are joint densities."""
        return self._each("log_likelihood", z)

    def log_prior(self, z: Tensor) -> Tensor:
        """The same of the targets' priors."""
        return self._each("log_prior", z)

    def _each(self, what: str, z: Tensor) -> Tensor:
        point = z.detach()
        watching = not torch.compiler.is_compiling()
        if z.requires_grad and watching:
            z = z.view_as(z)  # its own node, whose gradient is that of the target alone
            z.register_hook(lambda gradient: self._watch(f"the gradient of {what}", gradient.detach(), point))
        parts, ordered = [], samples_last(z)
        for start, end in self._slices:
            part, target = ordered[..., start:end, :, :], self.targets[start]
            density = getattr(target, what)
            values = _values(density, part) if watching else density(part)
            if values.shape != part.shape[:-1]:
                shapes = f"{what} of z {tuple(part.shape)} must have shape {tuple(part.shape[:-1])}"
                raise ValueError(f"target {name_of(target)}: {shapes}, got {tuple(values.shape)} at step {self.step}")
            parts.append(values.to(z.dtype))
        values = models_last(parts[0] if len(parts) == 1 else torch.cat(parts, -2), z)
        if watching:
            self._watch(what, values.detach().unsqueeze(-1), point)
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
            bounded = ": chains reach all of R^n, so that a bounded density needs other coordinates" * (
                value == -math.inf
            )
            self.failures[model] = f"target {target}: {what} is {value} at step {self.step}, at z = ({at}){bounded}"


def _values(density: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Values of a density; NaN where samples are not finite and it refuses them, as torch's distributions do."""
    try:
        return density(z)
    except Exception:
        finite = z.isfinite().all(-1)
        if finite.all():
            raise
        return torch.where(finite, density(torch.where(finite.unsqueeze(-1), z, 0.0)), torch.nan)


def check_schedule(schedule: Any, steps: int, must_end_at_one: bool = False) -> None:
    """Look at a number or a schedule of that many steps in every one of them.

    Args:
        schedule: a number, or a function called with 0 ... steps - 1.
        steps: how long training is.
        must_end_at_one: refuse a last value below 1 instead of warning of it. With beta the model is then trained on a
            weaker penalty than it is judged by, which may be meant; with alpha it would learn another target.

    Raises ValueError, with the value and its step, where the schedule gives no number, leaves [0, 1], or does not end
    at 1 although it must. Warns where it ends below 0.95.
    """
    name = _name_of(schedule)
    last: Any = 1.0
    ours = isinstance(schedule, Constant | Linear | Geometric | Cyclical) or not callable(schedule)
    for step in range(steps - 1 if ours else 0, steps):
        last = value_at(schedule, step)
        try:
            inside = -_ROUNDING <= float(last) <= 1 + _ROUNDING
        except (TypeError, ValueError):
            raise ValueError(f"schedule {name} must give numbers, got {last!r} at step {step:,}") from None
        if not inside:
            raise ValueError(f"schedule {name} must stay in [0, 1], got {float(last)!r} at step {step:,}")
    at = f"got {float(last):.3g} at step {steps - 1:,}, its last"
    if must_end_at_one and last < 1 - _ROUNDING:
        raise ValueError(f"schedule {name} must end at 1, {at}")
    if callable(schedule) and last < _NEAR:
        warn(f"schedule {name} should end near 1, where models are judged, {at}")


def check_numbers(schedule: Any, steps: int, name: str, number: Number) -> None:
    """Refuse a schedule for a field of that name whose numbers in so many steps are not what it takes: ValueError."""
    inner = schedule.schedule if isinstance(schedule, Between) else schedule
    ours = isinstance(inner, Constant | Linear | Geometric | Cyclical)  # lowest and highest at the ends
    for step in dict.fromkeys((0, steps - 1)) if ours else range(steps):
        value = schedule(step)
        try:
            fits = not isinstance(value, str) and number(float(value)) is not None
        except (TypeError, ValueError):
            fits = False
        if not fits:
            takes, got = f"must give {number.takes} for {name}", f"got {one_line(value)} at step {step:,}"
            raise ValueError(f"schedule {_name_of(schedule)} {takes}, {got}")


def _name_of(schedule: Any) -> str:
    shown = one_line(schedule)
    return shown if isinstance(schedule, Description) else getattr(schedule, "__name__", shown)


# ---- one's own kernels


def check_kernels(kernels: Sequence[Any], n: int, dim: int, context: Tensor | None = None) -> None:
    """Refuse kernels of the user's own that no chain can be made of, as far as a few draws tell.

    There must be n of them; each must give the next state and a log-ratio for each draw. What is called are copies, on
    draws of their own: neither the kernels nor torch's random state change. What can't be copied, or sees the target,
    is not called.

    Args:
        kernels: as `build` gave them, on the CPU.
        n: how many were asked for.
        dim: of z.
        context: (batch, context_dim), or None.

    Raises ValueError with one line that names the kernel, what it gave, and what would be right.
    """
    if len(kernels) != n:
        raise ValueError(f"build of the kernel must give n_transitions {n} kernels, got {len(kernels)}")
    try:
        copies = [] if any(hasattr(kernel, "chain") for kernel in kernels) else copy.deepcopy(list(kernels))
    except Exception:  # such as one that holds a generator
        return
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, dim), (8, 1, dim)) if context is None else ((len(context), dim), (3, len(context), dim))
    with torch.random.fork_rng([]):
        for kernel, shape in itertools.product(copies, shapes):
            z, noise = (torch.randn(shape, generator=generator) for _ in range(2))
            name = f"kernel {type(kernel).__name__}"
            try:
                found = kernel(z, context, noise)
            except Exception as error:
                raise ValueError(f"{name} fails for z of shape {shape}: {_first_line(error)}") from error
            parts = list(found) if isinstance(found, tuple | list) else [found]
            if [tuple(each.shape) if isinstance(each, Tensor) else None for each in parts] != [shape, shape[:-1]]:
                given = [f"shape {tuple(e.shape)}" if isinstance(e, Tensor) else type(e).__name__ for e in parts]
                wanted = f"z_next of shape {shape} and log_ratio of shape {shape[:-1]}"
                raise ValueError(f"{name} must give {wanted} for z of shape {shape}, got {' and '.join(given)}")


def warn(message: str) -> None:
    """A warning that names the line outside of this package which caused it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "annealed_core":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
