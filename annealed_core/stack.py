"""Stacks: the transitions of many models as one batch, so that M models cost little more time a step than one.

The models, of different seeds or targets, are the batch of the chain: z is (*sample, M, dim), and element m of the
batch meets the kernels of model m alone. In memory z lies as (M, dim, *sample): every operation then runs along
contiguous samples, and a layer is one batched matrix product.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from annealed_core.fused import Gated, Residual, Transitions, plain_transitions
from annealed_core.kernels import (
    ConditionalGaussian,
    DiagonalGaussian,
    GatedGaussian,
    GaussianPair,
    ResidualGaussian,
    normal_log_prob,
)


def samples_last(z: Tensor) -> Tensor:
    """Z (*sample, M, dim) with the last of its sample dimensions, if there is one, behind M: (..., M, sample, dim).

    What sums over dim then comes out in the order in which it lies in memory, (..., M, sample).
    """
    return z.transpose(-3, -2) if z.ndim > 2 else z.unsqueeze(-2)


class StackedBase(DiagonalGaussian):
    """The bases of M models: loc and scale are (M, dim)."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density in nats; z: (*sample, M, dim) -> (*sample, M)."""
        values = normal_log_prob(samples_last(z), self.loc.unsqueeze(-2), self.scale.unsqueeze(-2))
        return values.mT if z.ndim > 2 else values.squeeze(-1)


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

    Raises ValueError for models that differ in the types of their kernels or the shapes of their weights, and for
    kernels with a context. What else kernels hold that is no parameter or buffer is taken from the first model.
    """
    shapes = [[(name, value.shape) for name, value in model.state_dict().items()] for model in models]
    kinds = [[type(kernel) for kernel in model] for model in models]
    if any(shape != shapes[0] for shape in shapes) or any(kind != kinds[0] for kind in kinds):
        raise ValueError("models to be stacked must have the same kernels and shapes")
    if any(name.split(".")[-2].startswith("context") for name, _ in shapes[0] if "." in name):
        raise ValueError("models to be stacked must have kernels without a context")
    gaussian = [kernel for kernel in models[0] if isinstance(kernel, GaussianPair) and kernel.forwards.context is None]
    alike = len({getattr(kernel, "conditional", None) for kernel in gaussian} & HEADS.keys()) == 1
    if gaussian and len(gaussian) == len(kinds[0]) and len(set(kinds[0])) == 1 and alike:
        return GaussianStack(models)
    return MappedStack(models)


class GaussianStack(Stack):
    """T `GaussianPair`s of M models, all of one kind; `fused.Transitions` computes them.

    Parameters, of the forward and of the reverse conditionals: the hidden layer with its bias as last column
    (T, M, H, dim + 1), the outputs (T, M, parts * dim, H) and their bias (T, M, parts * dim, 1).
    """

    def __init__(self, models: Sequence[Sequence[GaussianPair] | nn.ModuleList]) -> None:
        super().__init__()
        self.conditional = cast(GaussianPair, models[0][0]).conditional
        self.weights = nn.ParameterList()
        for side in ("forwards", "reverse"):
            packed = [[_packed(getattr(pair, side)) for pair in row] for row in zip(*models, strict=True)]
            for part in range(3):
                value = torch.stack([torch.stack([each[part] for each in row]) for row in packed])
                self.weights.append(nn.Parameter(value.clone()))

    def __len__(self) -> int:
        return len(self.weights[0])

    def rsample(self, start: Tensor, noise: Tensor, local: bool = False) -> tuple[Tensor, Tensor]:
        """Run all transitions; see `Stack`."""
        models, dim = start.shape[-2:]
        sample = start.shape[:-2]
        start = start.reshape(-1, models, dim).permute(1, 2, 0)  # (M, dim, S)
        fresh = noise.reshape(len(self), -1, models, dim).permute(0, 2, 3, 1).contiguous()  # (T, M, dim, S)
        if torch.compiler.is_compiling():
            states, log_ratios = plain_transitions(start, fresh, local, self.conditional.locate, list(self.weights))
        else:
            weights = self.weights._parameters.values()  # iterating over the list itself takes as long as a product
            states, log_ratios = Transitions.apply(start, fresh, local, HEADS[self.conditional], *weights)
        z = states.permute(0, 3, 1, 2).reshape(len(states), *sample, models, dim)
        return z, log_ratios.mT.reshape(len(self), *sample, models)

    def unstack(self) -> list[dict[str, Tensor]]:
        """The state dict of each model's own kernels."""
        values = [weight.detach() for weight in self.weights]
        found = []
        for model in range(len(values[0][0])):
            state: dict[str, Tensor] = {}
            for step in range(len(self)):
                for side, (inner, outer, bias) in (("forwards", values[:3]), ("reverse", values[3:])):
                    layers = {"hidden.weight": inner[step, model, :, :-1], "hidden.bias": inner[step, model, :, -1]}
                    layers |= {"outputs.weight": outer[step, model], "outputs.bias": bias[step, model, :, 0]}
                    state |= {f"{step}.{side}.{name}": value.clone() for name, value in layers.items()}
            found.append(state)
        return found


HEADS: dict[type[ConditionalGaussian], Any] = {GatedGaussian: Gated, ResidualGaussian: Residual}


def _packed(conditional: ConditionalGaussian) -> tuple[Tensor, Tensor, Tensor]:
    """The three weights that `fused` takes."""
    hidden, outputs = conditional.hidden, conditional.outputs
    inner = torch.cat([hidden.weight.detach(), hidden.bias.detach().unsqueeze(-1)], -1)
    return inner, outputs.weight.detach(), outputs.bias.detach().unsqueeze(-1)


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
