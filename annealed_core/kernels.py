"""Kernels: one transition of a chain.

Every kernel is called as `z_next, log_ratio = kernel(z, context, noise)`, where log_ratio = log r(z | z_next) - log
q(z_next | z): what the transition adds to the logarithm of the chain's weight. Here are trained pairs of Gaussians
(Huang et al. 2018); `flows` and `moves` answer the same call. `Gated` and `Residual` describe such kernels, and
`build(dim, n, context_dim=0)` makes them: any object with that call can take their place.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from annealed_core.description import Choice, Description, Size

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
        """`log_prob(rsample(noise))` from the noise itself: (*sample, *batch, dim) -> (*sample, *batch)."""
        return drawn_log_prob(noise, self.scale)

    def detach(self) -> DiagonalGaussian:
        """The same density, without a gradient to whatever made its parameters."""
        return type(self)(self.loc.detach(), self.scale.detach())

    def __getitem__(self, images: slice) -> DiagonalGaussian:
        return type(self)(self.loc[images], self.scale[images])


class ConditionalGaussian(nn.Module):
    """A Gaussian conditional N(z' | mu, sigma^2) whose parameters a network with one hidden layer computes.

    h = relu(W [z, context]); what mu and sigma are made of, of z and V h, the kinds differ in: `GatedGaussian`,
    `ResidualGaussian`.

    Args:
        dim: dimensions of z.
        hidden: width of h.
        context_dim: dimensions of the context (0: none), such as an encoder's features.
        near_identity: start close to z' = z instead of with torch's weights, whose sigma of 0.69 at every step buries
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
        hidden = self.hidden(z) if self.context is None else self.hidden(z) + self.context(context)
        return self.locate(z, *self.outputs(torch.relu(hidden)).chunk(self.outputs_per_dim, -1))


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
        return torch.lerp(z, move, torch.sigmoid(gate)), softplus(scale) + SMALLEST_SCALE


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
        return z + move, softplus(scale) + SMALLEST_SCALE


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


Start = Annotated[str, Choice("torch", "identity")]


class Pairs(Description):
    """Pairs of Gaussians.

    Attributes:
        hidden: width of each conditional's hidden layer.
        start: "torch", with the initial weights of torch's layers, or near the "identity".
    """

    hidden: Size = 32
    start: Start = "torch"

    pair: ClassVar[type[GaussianPair]]

    def build(self, dim: int, n: int, context_dim: int = 0) -> list[nn.Module]:
        """The n kernels for states of `dim` dimensions, untrained; weights from torch's random state."""
        return [self.pair(dim, self.hidden, context_dim, self.start == "identity") for _ in range(n)]


class Gated(Pairs):
    """Pairs of gated Gaussians (Huang et al. 2018); fields are those of `Pairs`."""

    pair = GatedGaussianPair


class Residual(Pairs):
    """Pairs of residual Gaussians (NVI, arXiv 2106.11302); fields are those of `Pairs`."""

    pair = ResidualGaussianPair


class Frozen(nn.Module):
    """A network as it stands: detached parameters, evaluation mode; gradients still reach what goes in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = [network]  # in a list, so that it isn't registered and doesn't change mode with this module
        self.state = {name: value.detach() for name, value in network.named_parameters()}
        # Batch normalisation changes its statistics in place, unseen by autograd, also before a backward pass.
        self.state |= {name: value.detach().clone() for name, value in network.named_buffers()}

    def forward(self, *inputs: Tensor | None) -> Any:
        """As of the network."""
        network = self.network[0]
        training = [module for module in network.modules() if module.training]
        network.eval()
        try:
            return torch.func.functional_call(network, self.state, inputs)
        finally:
            for module in training:
                module.training = True
