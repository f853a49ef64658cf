"""Stacks: the transitions of many models as one batch, so that M models cost little more time a step than one.

    together = StackedChain(StackedBase(loc, scale), stack(models))     # models: M lists of kernels
    AVO()(together, target, 128)                                        # (128, M)
    together.kernels.unstack()[0]                                       # the state dict of the first model's kernels

The models, of different seeds or targets, are the batch of the chain: z is (*sample, M, dim), and element m of the
batch meets the kernels of model m alone. In memory z lies as (M, dim, *sample): every operation then runs along
contiguous samples, and a layer is one batched matrix product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from annealed_core.chain import Chain, Shape, Trajectory
from annealed_core.kernels import DiagonalGaussian, Frozen, GaussianPair, normal_log_prob


def samples_last(z: Tensor) -> Tensor:
    """Z (*sample, M, dim) with the last of its sample dimensions, if there is one, behind M: (..., M, sample, dim).

    What sums over dim then comes out in the order in which it lies in memory, (..., M, sample).
    """
    return z.transpose(-3, -2) if z.ndim > 2 else z.unsqueeze(-2)


def models_last(values: Tensor, z: Tensor) -> Tensor:
    """What was computed from `samples_last(z)`, (..., M, sample), back in the order of z: (*sample, M)."""
    return values.mT if z.ndim > 2 else values.squeeze(-1)


class StackedBase(DiagonalGaussian):
    """The bases of M models: loc and scale are (M, dim)."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density in nats; z: (*sample, M, dim) -> (*sample, M)."""
        values = normal_log_prob(samples_last(z), self.loc.unsqueeze(-2), self.scale.unsqueeze(-2))
        return models_last(values, z)


class StackedChain(Chain):
    """The chains of M models: the base is of shape (M, dim), and the kernels are what `stack` makes.

    Arguments are those of `Chain`, without a context.
    """

    kernels: Any

    def rsample(self, sample_shape: Shape = (), noise: Tensor | None = None, local: bool = False) -> Trajectory:
        """As of `Chain`; noise of which each number of a model's samples lies beside the next is taken as it is."""
        noise = self.noise(sample_shape) if noise is None else noise
        states, log_ratios = self.kernels(self.base.rsample(noise[0]), noise[1:], local)
        return Trajectory(states, log_ratios, self.base.drawn_log_prob(noise[0]))

    def freeze(self) -> Self:
        """As of `Chain`."""
        return self.replace(kernels=_FrozenStack(self.kernels))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights of the kernels of all models."""
        yield from self.kernels.parameters()

    def __getitem__(self, models: slice) -> Self:
        raise TypeError("a stack of models has no slices: take models from `kernels.unstack()`")


class Stack(nn.Module):
    """T transitions of M models, called with z_0, noise (T, *sample, M, dim) and `local`, as of `Chain.rsample`.

    It returns the states z_0 ... z_T, (T + 1, *sample, M, dim), and the log-ratios, (T, *sample, M), in nats.
    """

    def __init__(self, models: Sequence[nn.ModuleList]) -> None:
        super().__init__()
        self.n_models, self.n_kernels = len(models), len(models[0])

    def __len__(self) -> int:
        return self.n_kernels

    def state_of(self, kernel: int) -> dict[str, Tensor]:
        """The weights and buffers of that transition by name, of all models: (M, ...) each."""
        raise NotImplementedError

    def unstack(self) -> list[dict[str, Tensor]]:
        """The state dict of each model's own kernels, as a `ModuleList` of them takes it."""
        states = [(t, name, value.detach()) for t in range(len(self)) for name, value in self.state_of(t).items()]
        return [{f"{t}.{name}": value[m].clone() for t, name, value in states} for m in range(self.n_models)]


class _FrozenStack(Frozen):
    def __len__(self) -> int:
        return len(cast(Stack, self.network[0]))


def stack(models: Sequence[nn.ModuleList | Sequence[nn.Module]]) -> Stack:
    """One stack of models that have the same kernels with different weights.

    Raises ValueError for models that differ in the types of their kernels or the shapes of their weights, and for
    kernels with a context. What else kernels hold that is no parameter or buffer is taken from the first model.
    """
    lists = [nn.ModuleList(model) for model in models]
    kinds = [
        ([type(kernel) for kernel in model], [(name, value.shape) for name, value in model.state_dict().items()])
        for model in lists
    ]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("models to be stacked must have the same kernels and shapes")
    types, shapes = kinds[0]
    if any("context" in name for name, _ in shapes):
        raise ValueError("models to be stacked must have kernels without a context")
    alike = len(set(types)) == 1 and issubclass(types[0], GaussianPair)
    return GaussianStack(lists) if alike and types[0].forward is GaussianPair.forward else MappedStack(lists)


class GaussianStack(Stack):
    """T `GaussianPair`s of M models, all of one kind. Its parameters are those of a pair, each as (T, M, ...)."""

    def __init__(self, models: Sequence[nn.ModuleList]) -> None:
        super().__init__(models)
        first = cast(GaussianPair, models[0][0])
        self.locate, self.names = first.conditional.locate, [name for name, _ in first.named_parameters()]
        for name in self.names:
            of_steps = [
                torch.stack([model[t].get_parameter(name).detach() for model in models]) for t in range(len(self))
            ]
            self.register_parameter(_key(name), nn.Parameter(torch.stack(of_steps)))

    def state_of(self, kernel: int) -> dict[str, Tensor]:
        """See `Stack`."""
        return {name: self.get_parameter(_key(name))[kernel] for name in self.names}

    def forward(self, start: Tensor, noise: Tensor, local: bool = False) -> tuple[Tensor, Tensor]:
        """Forward conditionals one after another, and then the reverse ones all at once; see `Stack`."""
        *sample, models, dim = start.shape
        z = start = start.reshape(-1, models, dim).permute(1, 2, 0)  # (M, dim, S)
        noise = noise.reshape(len(self), -1, models, dim).permute(0, 2, 3, 1).contiguous()  # (T, M, dim, S)
        weights = [getattr(self, _key(name)) for name in self.names]
        before, after, scales = [], [], []
        for fresh, *layers in zip(noise, *weights[:4], strict=True):
            before.append(z.detach() if local else z)
            loc, scale = self._conditional(before[-1], *layers)
            z = loc + scale * fresh
            after.append(z)
            scales.append(scale)
        seen, drawn = torch.stack(before), torch.stack(after)
        back = self._conditional(drawn.flatten(0, 1), *(weight.flatten(0, 1) for weight in weights[4:]))
        loc, scale = (each.view_as(drawn) for each in back)
        # Log r - log q of two Gaussians: their constants cancel.
        squares = ((seen - loc) / scale).square() - noise.square()
        log_ratios = ((torch.stack(scales) / scale).log() - 0.5 * squares).sum(-2)
        states = torch.stack([start, *after]).permute(0, 3, 1, 2).reshape(len(self) + 1, *sample, models, dim)
        return states, log_ratios.mT.reshape(len(self), *sample, models)

    def _conditional(self, z: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
        """`kernels.ConditionalGaussian` of many models: z (M, dim, S) and the layers' (M, ...) -> mu, sigma."""
        inwards, inward_bias, outwards, outward_bias = layers
        hidden = torch.relu(torch.baddbmm(inward_bias.unsqueeze(-1), inwards, z))
        outputs = torch.baddbmm(outward_bias.unsqueeze(-1), outwards, hidden)
        return self.locate(z, *outputs.chunk(outputs.shape[-2] // z.shape[-2], -2))


class MappedStack(Stack):
    """T kernels of any kind of M models, by `torch.func.vmap`; its parameters and buffers are theirs, as (M, ...)."""

    def __init__(self, models: Sequence[nn.ModuleList]) -> None:
        super().__init__(models)
        # Their code without the weights, which `functional_call` lends them; in a list, as these aren't this module's.
        self.bare = [copy.deepcopy(kernel).to("meta") for kernel in models[0]]
        self.names: list[list[str]] = []
        for t, kernels in enumerate(zip(*models, strict=True)):
            parameters, buffers = stack_module_state(list(kernels))
            self.names.append([*parameters, *buffers])
            for name, value in parameters.items():
                self.register_parameter(_key(f"{t}.{name}"), nn.Parameter(value.detach().clone()))
            for name, value in buffers.items():
                self.register_buffer(_key(f"{t}.{name}"), value.clone())

    def state_of(self, kernel: int) -> dict[str, Tensor]:
        """See `Stack`."""
        return {name: getattr(self, _key(f"{kernel}.{name}")) for name in self.names[kernel]}

    def forward(self, start: Tensor, noise: Tensor, local: bool = False) -> tuple[Tensor, Tensor]:
        """One transition after another; see `Stack`."""
        states, log_ratios = [start], []
        for t, (kernel, fresh) in enumerate(zip(self.bare, noise, strict=True)):

            def call(state: dict[str, Tensor], z: Tensor, fresh: Tensor, kernel: nn.Module = kernel) -> Any:
                return functional_call(kernel, state, (z, None, fresh))

            z = states[-1].detach() if local else states[-1]
            z, log_ratio = vmap(call, in_dims=(0, -2, -2), out_dims=(-2, -1))(self.state_of(t), z, fresh)
            states.append(z)
            log_ratios.append(log_ratio)
        return torch.stack(states), torch.stack(log_ratios) if log_ratios else start.new_zeros((0, *start.shape[:-1]))


def _key(name: str) -> str:
    """The name under which a module may register it."""
    return name.replace(".", "/")
