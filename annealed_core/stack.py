"""Stacks: the transitions of many models as one batch, so that M models cost little more time a step than one.

The models, of different seeds or targets, are the batch of the chain: z is (*sample, M, dim), and element m of the
batch meets the kernels of model m alone. In memory z lies as (M, dim, *sample): every operation then runs along
contiguous samples, and a layer is one batched matrix product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from annealed_core.kernels import ConditionalGaussian, GaussianPair, drawn_log_prob


class Stack(nn.Module):
    """T transitions of M models; `stack` makes the right kind."""

    def rsample(self, start: Tensor, noise: Tensor, local: bool = False) -> tuple[Tensor, Tensor]:
        """Run all transitions.

        Args:
            start: z_0, (*sample, M, dim).
            noise: standard normal, (T, *sample, M, dim).
            local: cut each state off before the next transition.

        Returns the states z_0 ... z_T, (T + 1, *sample, M, dim), and the log-ratios, (T, *sample, M), in nats.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def unstack(self) -> list[dict[str, Tensor]]:
        """The state dict of each model's own kernels, as a `ModuleList` of them takes it."""
        raise NotImplementedError


def stack(models: Sequence[nn.ModuleList]) -> Stack:
    """One stack of models that have the same kernels with different weights.

    Raises ValueError for models that differ in more than their weights.
    """
    shapes = [[(name, value.shape) for name, value in model.state_dict().items()] for model in models]
    kinds = [[type(kernel) for kernel in model] for model in models]
    if any(shape != shapes[0] for shape in shapes) or any(kind != kinds[0] for kind in kinds):
        raise ValueError("models to be stacked must have the same kernels and shapes")
    gaussian = [kernel for kernel in models[0] if isinstance(kernel, GaussianPair) and kernel.forwards.context is None]
    if gaussian and len(gaussian) == len(kinds[0]) and len(set(kinds[0])) == 1:
        return GaussianStack(models)
    return MappedStack(models)


class StackedConditional(nn.Module):
    """The conditionals q, or r, of T transitions of M models: what T x M `ConditionalGaussian`s compute.

    Args:
        conditionals: T lists of M conditionals of one kind.
    """

    NAMES = ("hidden.weight", "hidden.bias", "outputs.weight", "outputs.bias")

    def __init__(self, conditionals: Sequence[Sequence[ConditionalGaussian]]) -> None:
        super().__init__()
        self.locate = type(conditionals[0][0]).locate
        states = [[conditional.state_dict() for conditional in row] for row in conditionals]
        for name in self.NAMES:  # weights (T, M, out, in); biases (T, M, out, 1)
            value = torch.stack([torch.stack([state[name] for state in row]) for row in states])
            value = value.unsqueeze(-1) if name.endswith("bias") else value
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value.clone()))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The four parameters, each (T, M, ...)."""
        return tuple(getattr(self, name.replace(".", "_")) for name in self.NAMES)

    def forward(self, z: Tensor, weights: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """States z (N, dim, S) and weights (N, ...) -> mu, sigma, both (N, dim, S)."""
        hidden_weight, hidden_bias, outputs_weight, outputs_bias = weights
        hidden = torch.baddbmm(hidden_bias, hidden_weight, z).relu_()
        return self.locate(z, torch.baddbmm(outputs_bias, outputs_weight, hidden), 1)

    def unstack(self, step: int, model: int) -> dict[str, Tensor]:
        """The state dict of one conditional."""
        values = (value.detach()[step, model] for value in self.weights)
        return {n: v.squeeze(-1) if n.endswith("bias") else v for n, v in zip(self.NAMES, values, strict=True)}


class GaussianStack(Stack):
    """T `GaussianPair`s of M models, all of one kind.

    Only drawing goes transition by transition: the reverse conditionals see the states when all are there, and where
    the states are cut off from each other (`local`), so do the forward ones, all T x M in one product.
    """

    def __init__(self, models: Sequence[Sequence[GaussianPair] | nn.ModuleList]) -> None:
        super().__init__()
        self.forwards = StackedConditional([[pair.forwards for pair in row] for row in zip(*models, strict=True)])
        self.reverse = StackedConditional([[pair.reverse for pair in row] for row in zip(*models, strict=True)])

    def __len__(self) -> int:
        return len(self.forwards.weights[0])

    def rsample(self, start: Tensor, noise: Tensor, local: bool = False) -> tuple[Tensor, Tensor]:
        """Run all transitions; see `Stack`."""
        n, models, dim = len(self), start.shape[-2], start.shape[-1]
        sample = start.shape[:-2]
        start = start.reshape(-1, models, dim).permute(1, 2, 0)  # (M, dim, S)
        fresh = noise.reshape(n, -1, models, dim).permute(0, 2, 3, 1)  # (T, M, dim, S)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not local):
            states, scales = [start], []
            steps = zip(*(value.unbind() for value in self.forwards.weights), strict=True)
            for weights, each in zip(steps, fresh.unbind(), strict=True):
                loc, scale = self.forwards(states[-1], weights)
                states.append(torch.addcmul(loc, scale, each))
                scales.append(scale)
            before, after, scale = torch.stack(states[:-1]), torch.stack(states[1:]), torch.stack(scales)
        if local and torch.is_grad_enabled():  # again, with gradients, and all at once
            loc, scale = self.forwards(before.flatten(0, 1), _flat(self.forwards.weights))
            loc, scale = loc.view_as(before), scale.view_as(before)
            after = torch.addcmul(loc, scale, fresh)
        loc, back = self.reverse(after.flatten(0, 1), _flat(self.reverse.weights))
        loc, back = loc.view_as(before), back.view_as(before)
        log_ratios = drawn_log_prob((before - loc) / back, back, 2) - drawn_log_prob(fresh, scale, 2)  # (T, M, S)
        z = torch.cat([start.unsqueeze(0), after]).permute(0, 3, 1, 2)
        return z.reshape(n + 1, *sample, models, dim), log_ratios.mT.reshape(n, *sample, models)

    def unstack(self) -> list[dict[str, Tensor]]:
        """The state dict of each model's own kernels."""
        found: list[dict[str, Tensor]] = []
        for model in range(self.forwards.weights[0].shape[1]):
            state: dict[str, Tensor] = {}
            for step in range(len(self)):
                for side in ("forwards", "reverse"):
                    part = getattr(self, side).unstack(step, model)
                    state |= {f"{step}.{side}.{name}": value.clone() for name, value in part.items()}
            found.append(state)
        return found


def _flat(weights: Iterable[Tensor]) -> list[Tensor]:
    return [value.flatten(0, 1) for value in weights]


class MappedStack(Stack):
    """T kernels of any kind of M models, by `torch.func.vmap`."""

    def __init__(self, models: Sequence[nn.ModuleList]) -> None:
        super().__init__()
        self.n_models = len(models)
        self.kernels: list[nn.Module] = [_bare(kernel) for kernel in models[0]]  # a list: not this module's own weights
        self.weights = nn.ModuleList()
        for kernels in zip(*models, strict=True):
            parameters, buffers = stack_module_state(list(kernels))
            held = nn.Module()
            held.names = (list(parameters), list(buffers))  # type: ignore[assignment]
            for place, value in enumerate(parameters.values()):
                held.register_parameter(f"p{place}", nn.Parameter(value.detach().clone()))
            for place, value in enumerate(buffers.values()):
                held.register_buffer(f"b{place}", value.clone())
            self.weights.append(held)

    def __len__(self) -> int:
        return len(self.kernels)

    @staticmethod
    def _named(held: Any) -> dict[str, Tensor]:
        parameters, buffers = held.names
        named = {name: getattr(held, f"p{place}") for place, name in enumerate(parameters)}
        return named | {name: getattr(held, f"b{place}") for place, name in enumerate(buffers)}

    def rsample(self, start: Tensor, noise: Tensor, local: bool = False) -> tuple[Tensor, Tensor]:
        """Run all transitions; see `Stack`."""
        states, log_ratios = [start], []
        for kernel, held, fresh in zip(self.kernels, self.weights, noise, strict=True):

            def call(weights: dict[str, Tensor], z: Tensor, fresh: Tensor, kernel: nn.Module = kernel) -> Any:
                return functional_call(kernel, weights, (z, None, fresh))

            z = states[-1].detach() if local else states[-1]
            if self.n_models == 1:  # the same without vmap's cost
                alone = {name: value[0] for name, value in self._named(held).items()}
                z_next, log_ratio = call(alone, z.squeeze(-2), fresh.squeeze(-2))
                z_next, log_ratio = z_next.unsqueeze(-2), log_ratio.unsqueeze(-1)
            else:
                many = vmap(call, in_dims=(0, -2, -2), out_dims=(-2, -1))
                z_next, log_ratio = many(self._named(held), z, fresh)
            states.append(z_next)
            log_ratios.append(log_ratio)
        return torch.stack(states), torch.stack(log_ratios) if log_ratios else start.new_zeros((0, *start.shape[:-1]))

    def unstack(self) -> list[dict[str, Tensor]]:
        """The state dict of each model's own kernels."""
        return [
            {
                f"{step}.{name}": value.detach()[model].clone()
                for step, held in enumerate(self.weights)
                for name, value in self._named(held).items()
            }
            for model in range(self.n_models)
        ]


def _bare(kernel: nn.Module) -> nn.Module:
    """The kernel's code without its weights, which `functional_call` then lends it."""
    return copy.deepcopy(kernel).to("meta")
