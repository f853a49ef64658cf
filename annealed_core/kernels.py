"""Kernels: one transition of a chain.

Every kernel is called as `z_next, log_ratio = kernel(z, context, noise)`, where log_ratio = log r(z | z_next) - log
q(z_next | z): what the transition adds to the logarithm of the chain's weight. Trained pairs of Gaussians (Huang et
al. 2018) and Markov moves that are not trained (Neal 2001) answer the same call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from annealed_core.layers import softplus
from annealed_core.products import linear, linear_and_cut

MANY_NUMBERS = 2**14  # from so many on, what has no gradient is computed in parts
SMALLEST_SCALE = 1e-6  # of a conditional: its logarithm must stay finite
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def normal_log_prob(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log N(z; loc, scale^2 I) in nats, summed over the last dimension."""
    return drawn_log_prob((z - loc) / scale, scale)


def drawn_log_prob(noise: Tensor, scale: Tensor) -> Tensor:
    """Log N(z; loc, scale^2 I) in nats at z = loc + scale * noise, summed over the last dimension."""
    return (-0.5 * noise.square() - scale.log() - _HALF_LOG_TWO_PI).sum(-1)


class DiagonalGaussian:
    """N(loc, scale^2) with independent coordinates: the base density of a chain.

    Args:
        loc, scale: (*batch, dim); scale > 0.
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        self.dim = loc.shape[-1]
        self.batch_shape = loc.shape[:-1]

    @classmethod
    def isotropic(cls, dim: int, scale: float = 1.0) -> DiagonalGaussian:
        """N(0, scale^2 I) in `dim` dimensions."""
        return cls(torch.zeros(dim), torch.full((dim,), float(scale)))

    def rsample(self, noise: Tensor) -> Tensor:
        """Loc + scale * noise, with gradients to both; noise: (*sample, *batch, dim), standard normal."""
        return self.loc + self.scale * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density in nats; z: (*sample, *batch, dim) -> (*sample, *batch)."""
        return normal_log_prob(z, self.loc, self.scale)

    def drawn_log_prob(self, noise: Tensor) -> Tensor:
        """`log_prob(rsample(noise))` for less: (*sample, *batch, dim) -> (*sample, *batch)."""
        return drawn_log_prob(noise, self.scale)

    def detach(self) -> DiagonalGaussian:
        """The same density, without a gradient to whatever made its parameters."""
        return type(self)(self.loc.detach(), self.scale.detach())


class Kernel(Protocol):
    """One transition; see the module's docstring."""

    def __call__(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log_ratio (*batch,) in nats."""
        ...


class ConditionalGaussian(nn.Module):
    """A Gaussian conditional N(z' | mu, sigma^2) whose parameters a network with one hidden layer computes.

    h = relu(W [z, context]); what mu and sigma are made of, of z and V h, the kinds differ in: `GatedGaussian`,
    `ResidualGaussian`.

    Args:
        dim: dimensions of z.
        hidden: width of h.
        context_dim: dimensions of the context (0: none), such as an encoder's features.
        near_identity: start close to z' = z instead of with torch's default, whose sigma of 0.69 at every step buries
            a chain of several transitions in noise.
    """

    outputs_per_dim: int

    def __init__(self, dim: int, hidden: int, context_dim: int = 0, near_identity: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden)
        self.context = nn.Linear(context_dim, hidden, bias=False) if context_dim else None
        self.outputs = nn.Linear(hidden, self.outputs_per_dim * dim)
        if near_identity:
            with torch.no_grad():
                self.outputs.weight.mul_(0.3)
                self.outputs.bias[-dim:] = math.log(math.expm1(0.02))  # sigma = 0.02

    @staticmethod
    def locate(z: Tensor, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional's mu and sigma, from z and each of the network's outputs, all of one shape."""
        raise NotImplementedError

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> mu, sigma, both (*batch, dim)."""
        return self.given(z, None if self.context is None else self.context(context))

    def given(self, z: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same from what the context adds to the hidden layer, (*batch, hidden), or None."""
        hidden = self.hidden(z) if features is None else self.hidden(z) + features
        return self.locate(z, *self.outputs(torch.relu(hidden)).chunk(self.outputs_per_dim, -1))

    def evaluated(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """`given` for many draws where no gradient is recorded; z: (n, *batch, dim), features (*batch, hidden)."""
        # One more hidden unit, which is always 1, brings the outputs' biases: no pass over the outputs to add them.
        inwards = nn.functional.pad(self.hidden.weight, (0, 0, 0, 1))
        features = nn.functional.pad(features + self.hidden.bias, (0, 1), value=1.0)
        outwards = torch.cat([self.outputs.weight, self.outputs.bias.unsqueeze(1)], 1)
        hidden = linear(z.reshape(-1, z.shape[-1]), inwards).view(*z.shape[:-1], -1).add_(features).relu_()
        # Each output by a product of its own: where its numbers follow one another, functions of them take a third of
        # the time.
        flat, parts = hidden.flatten(0, -2), outwards.chunk(self.outputs_per_dim)
        return self.locate(z, *(linear(flat, part).view(z.shape) for part in parts))


class GatedGaussian(ConditionalGaussian):
    """A conditional with a gate between staying and moving (Huang et al. 2018).

    mu = g * m + (1 - g) * z with g = sigmoid of the gate, sigma = softplus(s); m, the gate and s are linear in h.
    Arguments as for `ConditionalGaussian`; `near_identity` sets the gate's bias to -4.
    """

    outputs_per_dim = 3

    def __init__(self, dim: int, hidden: int, context_dim: int = 0, near_identity: bool = False) -> None:
        super().__init__(dim, hidden, context_dim, near_identity)
        if near_identity:
            with torch.no_grad():
                self.outputs.bias[dim : 2 * dim] = -4.0

    @staticmethod
    def locate(z: Tensor, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Interpolate between z and the move by the gate."""
        move, gate, scale = outputs
        return torch.lerp(z, move, torch.sigmoid(gate)), softplus(scale).add_(SMALLEST_SCALE)


class ResidualGaussian(ConditionalGaussian):
    """A conditional that adds to z: mu = z + m, sigma = softplus(s), as in NVI (arXiv 2106.11302).

    Arguments as for `ConditionalGaussian`. The output layer starts at 0, as in the paper's later implementation in
    coix: mu = z, and sigma = 0.69 everywhere.
    """

    outputs_per_dim = 2

    def __init__(self, dim: int, hidden: int, context_dim: int = 0, near_identity: bool = False) -> None:
        super().__init__(dim, hidden, context_dim, near_identity)
        with torch.no_grad():
            self.outputs.weight.zero_()
            self.outputs.bias[:dim].zero_()
            if not near_identity:
                self.outputs.bias.zero_()

    @staticmethod
    def locate(z: Tensor, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Add the move to z."""
        move, scale = outputs
        return z + move, softplus(scale).add_(SMALLEST_SCALE)


class GaussianPair(nn.Module):
    """A trained stochastic transition: q(z' | z) and the reverse r(z | z'), conditionals of the same kind.

    Arguments as for `ConditionalGaussian`; `conditional` is that kind.
    """

    conditional: type[ConditionalGaussian]

    def __init__(self, dim: int, hidden: int, context_dim: int = 0, near_identity: bool = False) -> None:
        super().__init__()
        self.forwards = self.conditional(dim, hidden, context_dim, near_identity)
        self.reverse = self.conditional(dim, hidden, context_dim, near_identity)

    def forward(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log r(z | z_next) - log q(z_next | z) (*batch,) in nats."""
        noise = torch.randn_like(z) if noise is None else noise
        loc, scale = self.forwards(z, context)
        z_next = loc + scale * noise
        return z_next, normal_log_prob(z, *self.reverse(z_next, context)) - drawn_log_prob(noise, scale)


class GatedGaussianPair(GaussianPair):
    """Both ways a `GatedGaussian` (Huang et al. 2018)."""

    conditional = GatedGaussian


class ResidualGaussianPair(GaussianPair):
    """Both ways a `ResidualGaussian` (NVI, arXiv 2106.11302)."""

    conditional = ResidualGaussian


def are_alike(kernels: Sequence[Any]) -> bool:
    """Whether all are pairs of Gaussians of one kind and size with a context, so that `run_pairs` takes them."""
    kinds = {type(kernel) for kernel in kernels}
    if len(kinds) != 1 or not issubclass(kinds.pop(), GaussianPair):
        return False
    sizes = {(pair.forwards.hidden.weight.shape, pair.forwards.context is None) for pair in kernels}
    return len(sizes) == 1 and isinstance(kernels[0].forwards.context, nn.Linear)  # and no layer put in its place


def run_pairs(
    pairs: Sequence[Any], start: Tensor, context: Tensor, noise: Tensor, local: bool = False
) -> tuple[Tensor, Tensor]:
    """What T pairs that `are_alike` draw one after another, with what waits for no draw computed at once.

    That is the context's part of all conditionals, and the reverse ones.

    Args:
        pairs: the transitions.
        start: z_0, (*sample, *batch, dim).
        context: (*batch, context_dim).
        noise: standard normal, (T, *sample, *batch, dim).
        local: cut each state off before the next transition.

    Returns the states z_0 ... z_T, (T + 1, *sample, *batch, dim), and the log-ratios, (T, *sample, *batch), in nats.
    """
    features = linear(context.reshape(-1, context.shape[-1]), _context_layers(pairs))
    there, back = _by_conditional(features, len(pairs), context)
    if not torch.is_grad_enabled() and start.numel() >= MANY_NUMBERS:
        return _run_without_gradient(pairs, start, there, back, noise)
    return _run(pairs, start, there, back, noise, local)


def run_pairs_twice(
    pairs: Sequence[Any], start: Tensor, context: Tensor, noise: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What `run_pairs` returns, and what it does with `local`, start and context cut off, for less than both together.

    Both have the same states, so that the second run knows all of them before it begins, and the same products with the
    context. Arguments are those of `run_pairs`.
    """
    features, cut = linear_and_cut(context.reshape(-1, context.shape[-1]), _context_layers(pairs))
    there, back = _by_conditional(features, len(pairs), context)
    states, log_ratios = _run(pairs, start, there, back, noise)
    there, back = _by_conditional(cut, len(pairs), context)
    before = states[:-1].detach()
    loc, scale = _given_together([pair.forwards for pair in pairs], before, there)
    after = loc + scale * noise
    log_reverse = normal_log_prob(before, *_given_together([pair.reverse for pair in pairs], after, back))
    local = torch.cat([before[:1], after]), log_reverse - drawn_log_prob(noise, scale)
    return (states, log_ratios), local


def _context_layers(pairs: Sequence[Any]) -> Tensor:
    conditionals = (*(pair.forwards for pair in pairs), *(pair.reverse for pair in pairs))
    return torch.cat([each.context.weight for each in conditionals])


def _by_conditional(features: Tensor, n_pairs: int, context: Tensor) -> tuple[Tensor, ...]:
    """The context's part, apart for conditionals there and back: (T, *batch, hidden) each."""
    return features.view(*context.shape[:-1], 2 * n_pairs, -1).movedim(-2, 0).chunk(2)


def _run(
    pairs: Sequence[Any],
    start: Tensor,
    features_there: Tensor,
    features_back: Tensor,
    noise: Tensor,
    local: bool = False,
) -> tuple[Tensor, Tensor]:
    drawn, scales = [start], []
    for pair, feature, fresh in zip(pairs, features_there, noise, strict=True):
        loc, scale = pair.forwards.given(drawn[-1].detach() if local else drawn[-1], feature)
        drawn.append(loc + scale * fresh)
        scales.append(scale)
    states = torch.stack(drawn)
    before = states[:-1].detach() if local else states[:-1]
    reverse = _given_together([pair.reverse for pair in pairs], states[1:], features_back)
    return states, normal_log_prob(before, *reverse) - drawn_log_prob(noise, torch.stack(scales))


def _run_without_gradient(
    pairs: Sequence[Any], start: Tensor, features_there: Tensor, features_back: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """What `run_pairs` returns, for many draws: each transition while what it needs is in the processor's cache."""
    states = start.new_empty((len(pairs) + 1, *start.shape))
    log_ratios = start.new_empty((len(pairs), *start.shape[:-1]))
    states[0] = start
    for number, (pair, there, back) in enumerate(zip(pairs, features_there, features_back, strict=True)):
        z, z_next, fresh = states[number], states[number + 1], noise[number].contiguous()
        loc, scale = pair.forwards.evaluated(z, there)
        torch.addcmul(loc, scale, fresh, out=z_next)
        back_loc, back_scale = pair.reverse.evaluated(z_next, back)
        error = torch.sub(z, back_loc, out=back_loc).div_(back_scale)
        squares = error.square_().addcmul_(fresh, fresh, value=-1)  # the constants of the two densities cancel
        difference = scale.div_(back_scale).log_().sub_(squares, alpha=0.5)
        torch.sum(difference, -1, out=log_ratios[number])
    return states, log_ratios


def _given_together(conditionals: Sequence[ConditionalGaussian], z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """`given` of T conditionals at once: z (T, *sample, *batch, dim), features (T, *batch, hidden) -> two like z."""

    def layer(name: str, x: Tensor) -> Tensor:
        layers = [getattr(conditional, name) for conditional in conditionals]
        weights, biases = torch.stack([each.weight for each in layers]), torch.stack([each.bias for each in layers])
        return torch.baddbmm(biases.unsqueeze(1), x.reshape(len(x), -1, x.shape[-1]), weights.mT).view(
            *x.shape[:-1], -1
        )

    per_sample = features.view(len(features), *[1] * (z.ndim - features.ndim), *features.shape[1:])
    hidden = layer("hidden", z) + per_sample
    outputs = layer("outputs", torch.relu(hidden)).chunk(conditionals[0].outputs_per_dim, -1)
    return conditionals[0].locate(z, *outputs)


class Metropolis:
    """A random-walk Metropolis move that leaves `target` invariant: the transition of AIS (Neal 2001).

    Its reverse is its own reversal with respect to `target`, so that log r - log q = log f(z) - log f(z_next): a
    chain of such moves along a path of targets has exactly the AIS weight.

    Args:
        target: what the move leaves invariant.
        step_size: standard deviation of the proposal.
        n_moves: proposals made in one transition.

    The given noise moves the first proposal; acceptance and further proposals draw their own.
    """

    def __init__(self, target: object, step_size: float, n_moves: int = 1) -> None:
        self.target, self.step_size, self.n_moves = target, step_size, n_moves

    def __call__(self, z: Tensor, context: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (*batch, dim) -> z_next (*batch, dim), log f(z) - log f(z_next) (*batch,) in nats."""
        start = log_f = self.target.log_prob(z)  # type: ignore[attr-defined]
        for move in range(self.n_moves):
            fresh = noise if noise is not None and move == 0 else torch.randn_like(z)
            proposal = z + self.step_size * fresh
            log_f_new = self.target.log_prob(proposal)  # type: ignore[attr-defined]
            accept = torch.rand_like(log_f).log() < log_f_new - log_f
            z = torch.where(accept.unsqueeze(-1), proposal, z)
            log_f = torch.where(accept, log_f_new, log_f)
        return z, start - log_f
