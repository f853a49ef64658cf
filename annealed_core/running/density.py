"""`Density`: chains trained on targets whose truth is known, many models of one shape at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from annealed_core.chain import Chain
from annealed_core.dais import chain_of
from annealed_core.description import Calls, Check, Description, Positive, Size, Whole, one_line, own_objects
from annealed_core.energies import ENERGIES, Energy, find
from annealed_core.fit import RECORDED_STEPS
from annealed_core.judging.density import judge
from annealed_core.kernels import DiagonalGaussian, Gated, Pairs
from annealed_core.objectives import ELBO, IWAE, Objective
from annealed_core.running.experiment import Experiment, Problem
from annealed_core.running.watch import Watched, check_kernels, check_numbers, check_schedule, check_target
from annealed_core.schedules import objective_at
from annealed_core.speed.compiled import CompiledStep
from annealed_core.speed.stack import StackedBase, StackedChain, stack
from annealed_core.targets import LinearAlphas, exponents, name_of

#: Steps whose noise is drawn at once; divides the steps between two records, where checkpoints are made.
_NOISE_STEPS = 10


class _Target(Check):
    takes = f"one of {', '.join(ENERGIES)}, or an object with log_prob and dim"

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return value if value in ENERGIES else None
        if isinstance(value, Energy) and ENERGIES.get(value.name) is value:
            return value.name
        if self.lacks(value):
            return None
        if _over_vectors(value):
            return _from_torch(value)
        return value if hasattr(value, "log_prob") else None

    def lacks(self, value: Any) -> str:
        """See `Check`."""
        kind, dim = type(value).__name__, getattr(value, "dim", None)
        if isinstance(value, type):
            return f"{value.__name__} is a class, give an object of it, {value.__name__}(...)"
        if _over_vectors(value):
            return "" if _everywhere(value) else f"{kind} is no density over all of R^n, transform it into one"
        if isinstance(value, Distribution) and dim is None:
            wanted = "" if value.event_shape else f", as Independent({kind}(...), 1) has"
            found = f"batch_shape {tuple(value.batch_shape)} and event_shape {tuple(value.event_shape)}"
            return f"a distribution of torch takes batch_shape () and event_shape (n,){wanted}, got {found}"
        if not callable(getattr(value, "log_prob", None)):
            return "" if dim is None else f"this {kind} has no log_prob"
        if dim is None:
            return f"this {kind} has no dim, the number of dimensions of z"
        return "" if Whole(1)(dim) is not None else f"dim takes a whole number from 1, got {one_line(dim)}"


def _over_vectors(value: Any) -> bool:
    return isinstance(value, Distribution) and len(value.event_shape) == 1 and not value.batch_shape


def _everywhere(distribution: Distribution) -> bool:
    """Whether a distribution of torch has a density at all points, as far as its support tells of four of them."""
    points = torch.tensor([-1e6, -0.3, 0.7, 1e6]).unsqueeze(-1).expand(-1, *distribution.event_shape)
    try:
        return bool(distribution.support.check(points).all())  # type: ignore[union-attr]
    except Exception:  # one that does not say
        return True


@dataclass(frozen=True)
class _FromTorch:
    """A distribution of torch as a target, without its `support`: what torch calls so is no width."""

    name: str
    log_prob: Callable[[Tensor], Tensor]
    dim: int
    log_normalizer: float = 0.0


@functools.cache  # the same one for the same distribution
def _from_torch(distribution: Distribution) -> _FromTorch:
    return _FromTorch(type(distribution).__name__, distribution.log_prob, distribution.event_shape[0])


Kernels = Annotated[Any, Calls("a description such as Gated(), or an object with build(dim, n, context_dim)", "build")]
Objectives = Annotated[Any, Calls("an objective such as AVO(), or what is called as one")]
Steps = Annotated[int, Whole(1, 100_000_000)]


_ANNEALED = ("beta", "alpha", "rise")


def _parts(objective: Any) -> Iterator[tuple[str, Any]]:
    """Every field of an objective, and of the objectives in it, with what stands in it."""
    for name, value in objective.fields().items() if isinstance(objective, Description) else ():
        yield name, value
        if name not in _ANNEALED:
            yield from _parts(value)


def _it_and_parts(objective: Any) -> list[Any]:
    """An objective, and what stands in its fields."""
    return [objective, *(value for _, value in _parts(objective))]


def schedules_in(objective: Any) -> Iterator[tuple[str, Any]]:
    """Every field of an objective that may be annealed, and what stands in it."""
    return ((name, value) for name, value in _parts(objective) if name in _ANNEALED)


def recorded(objective: Any) -> dict[str, Any]:
    """What a history keeps of an objective: every field that may be annealed."""
    parts = [part for part in _it_and_parts(objective) if isinstance(part, Description)]
    return {name: value for part in parts for name, value in part.annealed(True).items()}


def says(objective: Any, attribute: str) -> bool:
    """Whether an objective, or one in it, has that attribute set."""
    return any(getattr(part, attribute, False) for part in _it_and_parts(objective))


def of_draws_alone(objective: Any) -> bool:
    """Whether an objective, or one in it, takes all draws of a batch for those of one density: none of images does."""
    parts = _it_and_parts(objective)
    return any(getattr(part, "alone", False) and not getattr(part, "takes_joint", False) for part in parts)


def path_of(objective: Any) -> Any:
    """What gives an objective's exponents; None where it follows no path."""
    return next((value for name, value in _parts(objective) if name == "alphas"), None)


def check_objective(objective: Any, n_transitions: int, steps: int) -> None:
    """Refuse an objective that this many kernels and steps don't fit, with ValueError."""
    for name, schedule in schedules_in(objective):
        check_schedule(schedule, steps, must_end_at_one=name != "beta")
    for part in _it_and_parts(objective):
        for name, schedule in part.annealed().items() if isinstance(part, Description) else ():
            if name not in _ANNEALED:
                check_numbers(schedule, steps, f"{name} of {type(part).__name__}", part.number_of(name))
    if n_transitions == 0 and path_of(objective) is not None:
        raise ValueError(f"impossible n_transitions 0: {objective!r} takes at least 1")
    if n_transitions and says(objective, "without_kernels"):
        raise ValueError(f"impossible n_transitions {n_transitions}: {objective!r} takes 0")
    if getattr(objective, "switch", 0) > steps:
        raise ValueError(f"impossible switch {objective.switch} of {objective!r}: there are {steps} steps in all")


class Density(Experiment):
    """A chain trained on a target, from N(0, base_scale^2 I).

    Attributes:
        target: a name in `ENERGIES`, an object with `log_prob` and `dim` (and, where it knows them, what an `Energy`
            has), or a distribution of torch.
        kernel: the description of the kernels, or an object with `build(dim, n, context_dim=0)`.
        n_transitions: T, the number of kernels.
        objective: what is maximised.
        steps, batch: length of training, and the sample shape of a step: IWAE draws `samples` times as many.
        samples: drawn for the metrics.
        base_scale: standard deviation of the base; None for what the target says, or else 1.
        seed, name, lr, lr_schedule, beta1, clip: see `Experiment`.
    """

    target: Annotated[Any, _Target()] = "D"
    kernel: Kernels = Gated(hidden=32)
    n_transitions: Annotated[int, Whole(0, 1000)] = 4
    objective: Objectives = ELBO()
    steps: Steps = 3000
    batch: Size = 128
    samples: Annotated[int, Whole(2)] = 20_000
    base_scale: Positive | None = None

    def check(self) -> None:
        """Refuse fields that do not fit each other."""
        super().check()
        check_objective(self.objective, self.n_transitions, self.steps)
        for name, value in schedules_in(self.objective):
            needed = name == "rise" or (name == "beta" and value != 1)
            if needed and not hasattr(self.target_object, "log_likelihood"):
                needs = "takes a target with log_likelihood and log_prior"
                raise ValueError(f"impossible {name} {value!r}: it {needs}, and {name_of(self.target_object)} has none")
        joint = hasattr(self.target_object, "log_likelihood")
        if says(self.objective, "of_images") or (says(self.objective, "takes_joint") and not joint):
            raise ValueError(f"impossible objective {self.objective!r} of Density: it is for images, as Mnist has them")

    @property
    def target_object(self) -> Any:
        """The target itself."""
        return find(self.target) if isinstance(self.target, str) else self.target

    @property
    def scale(self) -> float:
        """The standard deviation of the base."""
        return float(self.base_scale or base_scale(self.target_object))

    @property
    def label(self) -> str:
        """Such as density-D-avo-s0."""
        return "-".join(("density", name_of(self.target_object), short_name(self.objective), f"s{self.seed}"))

    def stack_key(self) -> Hashable | None:
        """All but seed and target.

        A run is trained alone with a kernel or objective of the user's own, with kernels that see the target or an
        objective that says so, and where the objective is none of a model but of all, as a capacity is.
        """
        shared = tuple(value for name, value in self.fields().items() if name not in ("seed", "name", "target"))
        alone = getattr(self.kernel, "sees_target", False) or says(self.objective, "alone")
        if own_objects(shared) or alone or any(name == "rise" for name, _ in schedules_in(self.objective)):
            return None
        return int(self.target_object.dim), self.name is not None or isinstance(self.target, str), shared

    def compiles(self, device: str = "cpu") -> bool:
        """Pairs of Gaussians do, on a CPU, with what changes with the step in few places.

        IWAE's value can be finite where that of a sample is not, so that a target that fails would go unseen.
        """
        changing = any(callable(value) for name, value in schedules_in(self.objective) if name != "alpha")
        pairs = isinstance(self.kernel, Pairs) and self.n_transitions > 0
        fits = pairs and not changing and not isinstance(self.objective, IWAE)
        return device == "cpu" and fits and self.stack_key() is not None

    @classmethod
    def problem(cls, specs: Sequence[Any], device: str = "cpu", compile: bool = False) -> DensityProblem:
        """See `Experiment`."""
        return DensityProblem(specs, device, compile)

    def kernels(self) -> list[Any]:
        """The kernels, untrained; their weights are drawn from torch's random state."""
        recipe, target = self.kernel, self.target_object
        if hasattr(recipe, "for_target"):
            scale = self.scale
            recipe = recipe.for_target(scale, max(float(getattr(target, "box", None) or 0.0), 5 * scale))
        return copied(recipe.build(target.dim, self.n_transitions))

    def restore(self, weights: dict[str, Tensor], device: str = "cpu") -> tuple[nn.Module, Chain]:
        """See `Experiment`."""
        kernels = self.kernels()
        model = _modules(kernels)
        model.load_state_dict(weights)
        model = model.to(device).eval().requires_grad_(False)
        target = self.target_object
        loc = torch.zeros(target.dim, device=device)
        base = DiagonalGaussian(loc, torch.full_like(loc, self.scale))
        return model, chain_of(base, kernels, target=lambda: target)


def short_name(objective: Any) -> str:
    """What labels call an objective."""
    return str(getattr(objective, "__name__", type(objective).__name__)).lower()


def built(objective: Any, n: int, batch_shape: Sequence[int] = ()) -> tuple[Any, list[nn.Module]]:
    """An objective for n kernels, with what it learns itself; a network of the user's own as a copy."""
    if hasattr(objective, "build"):
        objective = objective.build(n, batch_shape)
    if isinstance(objective, nn.Module):
        objective = copy.deepcopy(objective)
        return objective, [objective]
    return objective, getattr(objective, "modules", list)() if isinstance(objective, Description) else []


def copied(kernels: Sequence[Any]) -> list[Any]:
    """Kernels with weights of their own: a recipe of the user's may give the same ones each time."""
    memo: dict[int, Any] = {}
    return [copy.deepcopy(kernel, memo) if isinstance(kernel, nn.Module) else kernel for kernel in kernels]


def base_scale(target: Any) -> float:
    """The standard deviation of the density that chains start from."""
    return float(getattr(target, "base_scale", None) or 1.0)


def _modules(kernels: Sequence[Any]) -> nn.ModuleList:
    """Those of the kernels that have weights, in the places of all."""
    return nn.ModuleList(kernel if isinstance(kernel, nn.Module) else nn.Identity() for kernel in kernels)


class DensityProblem(Problem):
    """M chains trained side by side on their targets, which have the same number of dimensions."""

    def __init__(self, specs: Sequence[Density], device: str = "cpu", compile: bool = False) -> None:
        self.specs, self.spec, self.device = list(specs), specs[0], device
        targets = [spec.target_object for spec in specs]
        models: list[list[Any]] = []
        for spec, target in zip(specs, targets, strict=True):
            for where in dict.fromkeys(("cpu", device)):  # it is judged on the CPU
                check_target(target, where)
            torch.manual_seed(spec.seed)
            models.append(spec.kernels())
            if own_objects(spec.kernel):
                check_kernels(models[-1], spec.n_transitions, target.dim)
        self.target = Watched(targets, f"lr {self.spec.lr} may be too large")
        self.failures = self.target.failures
        scales = torch.tensor([[spec.scale] * spec.target_object.dim for spec in specs], device=device)
        base = StackedBase(torch.zeros_like(scales), scales)
        self.ours = self.spec.stack_key() is not None
        if self.ours:
            self.stack: Any = stack(models).to(device)
            self.chain: Chain = StackedChain(base, self.stack)
        else:  # one model with parts that only it has: plainly, as a batch of one
            self.stack = _modules(models[0]).to(device)
            self.chain = chain_of(base, models[0], target=lambda: self.target)
        self.objective, learned = built(self.spec.objective, len(self.chain), (len(specs),))
        self.module: nn.Module = nn.ModuleList([self.stack, *learned]).to(device)
        self.steps, self.steps_per_record = self.spec.steps, min(self.spec.steps, RECORDED_STEPS)
        self.generators = [torch.Generator().manual_seed(spec.seed) for spec in specs]
        self.chain.generator = self.generators[0]
        self._step: Any = self._means
        if compile and self.spec.compiles(device):
            self._step = CompiledStep(self._means, self.parameters())
        self._noise: Tensor | None = None
        self._recent: list[Tensor] = []

    def _draw(self, step: int, draws: tuple[int, ...]) -> Tensor:
        """Each model's own noise for that step, (T + 1, *draws, M, dim), in memory as stacks like it."""
        place, count = step % _NOISE_STEPS, torch.Size(draws).numel()
        if place == 0 or self._noise is None or self._noise.shape[-1] != count:
            shape = (_NOISE_STEPS, len(self.chain) + 1, self.target.dim, count)
            self._noise = torch.stack([torch.randn(shape, generator=g) for g in self.generators], 2).to(self.device)
        return self._noise[place].permute(0, 3, 1, 2).unflatten(1, draws)

    def values(self, step: int) -> Tensor:
        """The objective of each model, (M,)."""
        self.target.step = step
        objective = objective_at(self.objective, step)
        if isinstance(objective, Objective):
            noise = self._draw(step, objective.draws(self.spec.batch))
            values = (self._means if isinstance(objective, IWAE) else self._step)(objective, noise)
        else:
            values = self._means(objective)
        self._recent.append(values.detach())
        return values

    def _means(self, objective: Any, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            values = objective(self.chain, self.target, self.spec.batch)
        else:
            values = objective.values(self.chain, self.target, noise)
        if not isinstance(values, Tensor) or values.shape[-1:] != (len(self.specs),):
            got = tuple(values.shape) if isinstance(values, Tensor) else repr(values)
            wanted = f"values of shape (*sample, {len(self.specs)}), got {got}"
            raise ValueError(f"objective {short_name(objective)} must give {wanted}")
        return values.reshape(-1, len(self.specs)).T.contiguous().mean(1)  # of each as it would be alone

    def record(self) -> list[dict[str, float]]:
        """The mean objective of each model since the last record."""
        means = torch.stack(self._recent, 1).mean(1).tolist()
        self._recent.clear()
        return [{"elbo": mean} for mean in means]

    def weights(self) -> list[dict[str, Tensor]]:
        """Each model's own weights."""
        return self.stack.unstack() if self.ours else [self.stack.state_dict()]

    def metrics(self) -> list[dict[str, Any]]:
        """What each chain is worth, see `judging.density.judge`."""
        path = path_of(self.objective)
        alphas = exponents(LinearAlphas() if path is None else path, len(self.chain)).detach().cpu()
        found: list[dict[str, Any]] = []
        for number, (spec, weights) in enumerate(zip(self.specs, self.weights(), strict=True)):
            if number in self.failures:
                found.append({})
                continue
            _, chain = spec.restore(weights)  # on the CPU, where grids are
            own = alphas[:, number] if alphas.ndim > 1 else alphas
            generator = torch.Generator().manual_seed(spec.seed + 1)
            try:
                figures = judge(chain, spec.target_object, spec.samples, own, generator)
            except Exception as error:  # of a target of the user's own, beside which others have been trained
                if len(self.specs) == 1:
                    raise
                self.failures[number], figures = f"judging it fails: {str(error).partition(chr(10))[0]}", {}
            found.append(figures | ({"alphas": own.tolist()} if alphas.ndim > 1 else {}))
        return found

    def state(self) -> dict[str, Any]:
        """See `Problem`."""
        return {"generators": [generator.get_state() for generator in self.generators], "failures": self.failures}

    def load(self, state: dict[str, Any]) -> None:
        """See `Problem`."""
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)
        self.failures.update(state["failures"])
        self._recent.clear()
        self._noise = None
