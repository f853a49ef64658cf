"""Toys: chains trained on targets whose truth is known, many models of one shape at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from annealed_core import compiled, objectives
from annealed_core.chain import Chain
from annealed_core.flows import Householder, InverseAutoregressive, Planar, Spline
from annealed_core.judge import judge
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair, ResidualGaussianPair
from annealed_core.paths import LearnedPath
from annealed_core.spec import Spec
from annealed_core.stack import GaussianStack, StackedBase, stack
from annealed_core.targets import check_target, geometric_alphas, linear_alphas
from annealed_core.watch import Watched

#: Steps whose noise is drawn at once; divides the steps between two records, where checkpoints are made.
_NOISE_STEPS = 10
_AVO_COIN_SEED = 20_181  # which steps of a random mixture are AVO's: the same ones for all models

KERNELS: dict[str, Callable[[Spec, int, int], nn.Module]] = {
    "gated": lambda spec, dim, t: GatedGaussianPair(
        dim, spec.get("hidden"), near_identity=spec.initialisation == "identity"
    ),
    "residual": lambda spec, dim, t: ResidualGaussianPair(
        dim, spec.get("hidden"), near_identity=spec.initialisation == "identity"
    ),
    "planar": lambda spec, dim, t: Planar(dim, scale=_base_scale(spec.target_object)),
    "householder": lambda spec, dim, t: Householder(dim),
    "iaf": lambda spec, dim, t: InverseAutoregressive(
        dim, (spec.get("hidden"),) * 2, reverse=t % 2 == 1, scale=_base_scale(spec.target_object)
    ),
    "spline": lambda spec, dim, t: Spline(
        dim, (spec.get("hidden"),) * 2, spec.get("bins"), reverse=t % 2 == 1, scale=_reach(spec.target_object) / 5
    ),
}


def _base_scale(target: Any) -> float:
    return float(getattr(target, "base_scale", 1.0))


def _reach(target: Any) -> float:
    """How far from 0 a spline must be able to bend: the target's box, or five standard deviations of the base."""
    return max(float(getattr(target, "box", 0.0)), 5 * _base_scale(target))


def kernels(spec: Spec) -> nn.ModuleList:
    """The T kernels of one model, untrained; their weights are drawn from torch's random state."""
    dim = spec.target_object.dim
    return nn.ModuleList(KERNELS[spec.get("kernel")](spec, dim, t) for t in range(spec.get("n_transitions")))


def base(target: Any, device: str = "cpu") -> DiagonalGaussian:
    """Where chains start: N(0, base_scale^2 I), of scale 1 where the target names none."""
    loc = torch.zeros(target.dim, device=device)
    return DiagonalGaussian(loc, torch.full_like(loc, _base_scale(target)))


def initial_alphas(spec: Spec) -> Tensor:
    """The path's exponents at the start of training, (T + 1,)."""
    n = spec.get("n_transitions")
    return geometric_alphas(n) if spec.path == "geometric" else linear_alphas(n)


class Toys:
    """M chains from N(0, base_scale^2 I), trained side by side on their targets.

    Args:
        specs: equal but for seed and target; the targets have the same number of dimensions.
        device: where to train.
    """

    def __init__(self, specs: Sequence[Spec], device: str = "cpu") -> None:
        self.specs, self.spec, self.device = list(specs), specs[0], device
        models = []
        for spec in specs:
            check_target(spec.target_object, device, differentiable=True)
            torch.manual_seed(spec.seed)
            models.append(kernels(spec))
        self.stack = stack(models).to(device)
        self.target = Watched([spec.target_object for spec in specs], f"lr {self.spec.lr} may be too large")
        bases = [base(spec.target_object, device) for spec in specs]
        start = StackedBase(torch.stack([b.loc for b in bases]), torch.stack([b.scale for b in bases]))
        self.chain = Chain(start, self.stack)
        self.alphas = initial_alphas(self.spec) if models[0] else torch.zeros(0)
        self.path = LearnedPath(self.alphas, len(specs)).to(device) if self.spec.path == "learned" else None
        self.model = nn.ModuleList([self.stack] if self.path is None else [self.stack, self.path])
        self.steps: int = self.spec.get("steps")
        self.steps_per_record = min(self.steps, 250)
        self.generators = [torch.Generator().manual_seed(spec.seed) for spec in specs]
        self._noise: Tensor | None = None
        self._recent: list[Tensor] = []
        self.compiles = compiled.is_asked(self.spec, device)
        self._values = compiled.compiled(self._eager_values) if self.compiles else self._eager_values
        if self.compiles:
            self._arguments: tuple[Any, ...] = ()
            bias = cast(GaussianStack, self.stack).weights[2]  # whatever has gone wrong in a gradient comes by here
            bias.register_post_accumulate_grad_hook(lambda parameter: self._look_closer(parameter.grad.sum((0, 2, 3))))
        if self.spec.method == "mixture":
            coins = torch.rand(self.steps, generator=torch.Generator().manual_seed(_AVO_COIN_SEED))
            self._is_avo = (coins < self.spec.get("avo_weight")).tolist()

    @property
    def failures(self) -> dict[int, str]:
        return self.target.failures

    def _draw(self, step: int) -> Tensor:
        """Each model's own noise for that step, (T + 1, batch, M, dim), in memory as stacks like it."""
        place = step % _NOISE_STEPS
        if place == 0 or self._noise is None:
            shape = (_NOISE_STEPS, len(self.chain) + 1, self.target.dim, self.spec.get("batch"))
            self._noise = torch.stack([torch.randn(shape, generator=g) for g in self.generators], 2).to(self.device)
        return self._noise[place].permute(0, 3, 1, 2)

    def objective(self, step: int) -> Tensor:
        self.target.step = step
        alphas = self.alphas if self.path is None else self._learned_alphas()
        arguments = self._kind(step), self._draw(step), alphas, self._temperature(step)
        values = self._values(*arguments)
        if self.compiles:
            self._arguments = arguments
            self._look_closer(values.detach())
        self._recent.append(values.detach())
        return values

    def _kind(self, step: int) -> str:
        """What is maximised at that step."""
        fine_tuning = step >= self.steps - (self.spec.elbo_steps or 0)
        if self.spec.method == "mixture":
            return "avo" if self._is_avo[step] and not fine_tuning else "elbo"
        return "elbo" if fine_tuning else self.spec.method

    def _temperature(self, step: int) -> Tensor | None:
        """Alpha of alpha-annealing at that step; a tensor, as for each new number code would be compiled anew."""
        if self.spec.method != "alpha":
            return None
        start, rise = self.spec.get("beta0"), max(1.0, self.spec.get("warmup") * self.steps)
        return torch.tensor(min(1.0, start + (1 - start) * step / rise))

    def _eager_values(self, kind: str, noise: Tensor, alphas: Tensor, temperature: Tensor | None) -> Tensor:
        """The objective of each model, (M,)."""
        spec, chain, target = self.spec, self.chain, self.target
        if kind == "elbo":
            return objectives.elbo(chain, target, noise=noise).mean(0)
        if kind == "alpha" and temperature is not None:
            return objectives.alpha_elbo(chain, target, temperature, noise=noise).mean(0)
        if kind == "iwae":
            groups = noise.unflatten(1, (spec.get("iwae_samples"), -1))
            return objectives.iwae(chain, target, spec.get("iwae_samples"), noise=groups).mean(0)
        if kind == "calibrated":
            values = objectives.calibrated_avo(chain, target, alphas.detach(), spec.get("avo_weight"), noise=noise)
        else:
            values = objectives.avo(chain, target, alphas.detach(), noise=noise)
        if self.path is None:
            return values.mean(0)
        fit = objectives.path_fit(chain, target, alphas, noise=noise)
        return values.mean(0) + fit - fit.detach()  # the path's gradient, and AVO's value

    def _look_closer(self, outcome: Tensor) -> None:
        """Where what compiled code gave for a model (M,) is not finite, do the step again in code that is watched."""
        if math.isfinite(outcome.sum()):
            return
        wrong = (~outcome.isfinite()).nonzero().flatten().tolist()
        if set(wrong) <= self.failures.keys():
            return
        kind, noise, alphas, temperature = self._arguments
        with torch.enable_grad():
            values = self._eager_values(kind, noise, alphas.detach(), temperature)
            torch.autograd.grad(values.sum(), list(self.stack.parameters()))
        for model in wrong:
            what = f"the objective or its gradient became {float(outcome[model])} at step {self.target.step}"
            self.failures.setdefault(model, f"{what}: {self.target.hint}")

    def _learned_alphas(self) -> Tensor:
        """(T + 1, M); models that failed are left with the path they began with."""
        assert self.path is not None
        alphas = self.path()
        return torch.where(alphas.isfinite(), alphas, self.alphas.to(alphas).unsqueeze(-1)) if self.failures else alphas

    def record(self) -> list[dict[str, float]]:
        means = torch.stack(self._recent).mean(0).tolist()
        self._recent.clear()
        return [{"elbo": mean} for mean in means]

    def weights(self) -> list[dict[str, Tensor]]:
        return self.stack.unstack()

    def metrics(self) -> list[dict[str, Any]]:
        alphas = (
            (self.alphas.unsqueeze(-1).expand(-1, len(self.specs)) if self.path is None else self.path()).detach().cpu()
        )
        found: list[dict[str, Any]] = []
        for number, (spec, weights) in enumerate(zip(self.specs, self.weights(), strict=True)):
            if number in self.failures:
                found.append({})
                continue
            torch.manual_seed(spec.seed + 1)
            found.append(judge(restore(spec, weights), spec, alphas[:, number]))  # on the CPU, where grids are
        return found

    def state(self) -> dict[str, Any]:
        return {"generators": [generator.get_state() for generator in self.generators], "failures": self.failures}

    def load(self, state: dict[str, Any]) -> None:
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)
        self.target.failures = state["failures"]
        self._recent.clear()
        self._noise = None


def restore(spec: Spec, weights: dict[str, Tensor], device: str = "cpu") -> Chain:
    """One model's chain with the weights that `Stack.unstack` gave, not to be trained further."""
    model = kernels(spec)
    model.load_state_dict(weights)
    return Chain(base(spec.target_object, device), model.to(device).eval().requires_grad_(False))
