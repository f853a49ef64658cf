"""Variants of the bound: terms that are held, weighted or split, and latents that are categorical.

    Mnist(objective=BetaTC(correlation=Between(1, 6, Linear(0.0, 1e-3))))
    Mnist(groups=20, objective=Relaxed(ELBO(), temperature=Between(1, 0.1, Geometric(0.0, 1e-3))))

All but `MIWAE` take a joint density, with `log_likelihood` and `log_prior`, such as `vae.Joint`. A weight is a number
from 0 or a schedule, which `schedules.Between` takes above 1.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from annealed_core.chain import Chain, Shape
from annealed_core.description import Annealed, Calls, Number, Size
from annealed_core.kernels import DiagonalGaussian
from annealed_core.objectives import ELBO, IWAE, Objective, log_q
from annealed_core.schedules import Annealing, Between, Weight, objective_at, value_at
from annealed_core.vae import VAE, Joint


class _OfKL(Objective):
    """E[log p(x | z_T)] less something that the KL term becomes, log q_0(z_0) - sum_t log r_t/q_t - log p(z_T)."""

    takes_joint = True

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch), whose mean is the objective."""
        trajectory = chain.rsample(noise=noise)
        z = trajectory.z[-1]
        return target.log_likelihood(z) - self._penalty(log_q(trajectory) - target.log_prior(z))

    def _penalty(self, kl: Tensor) -> Tensor:
        raise NotImplementedError


class BetaELBO(_OfKL):
    """The KL term weighed by a beta that may be above 1: the beta-VAE (Higgins et al. 2017).

    Attributes:
        weight: beta, or a schedule of it. Up to 1 it is `ELBO(beta)`.
    """

    weight: Weight = 4.0

    def _penalty(self, kl: Tensor) -> Tensor:
        return self.weight * kl


class CapacityELBO(_OfKL):
    """The KL term held at a capacity C: E[log p(x | z_T)] - |KL - C| (Burgess et al. 2018, arXiv 1804.03599, weight 1).

    KL is the mean over all samples and the batch. C = 0 is the ELBO as long as that mean is positive.

    Attributes:
        capacity: nats that C comes to.
        rise: in [0, 1], what the capacity is multiplied by.
    """

    capacity: Annotated[float, Number(0)] = 25.0
    rise: Annealing = 1.0

    def _penalty(self, kl: Tensor) -> Tensor:
        return (kl.mean() - self.rise * self.capacity).abs()


class FreeBits(_OfKL):
    """Some nats of the KL term are free: E[log p(x | z_T)] - max(KL, nats), with KL as for `CapacityELBO`.

    Kingma et al. 2016 (arXiv 1606.04934), with all latents in one group. `nats` may be a schedule.
    """

    nats: Weight = 5.0

    alone = True  # the mean is one model's

    def _penalty(self, kl: Tensor) -> Tensor:
        return kl.mean().clamp(min=self.nats)


class MIWAE(IWAE):
    """The mean of `groups` bounds of `samples` importance samples each (Rainforth et al. 2018, arXiv 1802.04537).

    One group is IWAE, one sample the ELBO from so many draws. Noise is for the shape (samples, groups, *sample).
    """

    groups: Size = 8

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch)."""
        return super().values(chain, target, noise).mean(0)

    def draws(self, sample_shape: Shape) -> tuple[int, ...]:
        """As many times `samples` and `groups`, which come first."""
        samples, *rest = super().draws(sample_shape)
        return samples, self.groups, *rest


def tc_terms(base: DiagonalGaussian, noise: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios whose means are mutual information, total correlation and dimension-wise KL; each (*sample, batch).

    log q(z | x) - log q(z), log q(z) - sum_d log q(z_d), sum_d log q(z_d) - log p(z), where q(z) is the batch's mean of
    q(z | x): the information is at most log batch. Published minibatch weights have q(z) N times as small, N the size
    of the data, which changes the terms by constants, and no gradient.
    """
    z = base.rsample(noise).unsqueeze(-2)  # beside each image of the batch: (*sample, batch, batch, dim)
    standard = (z - base.loc) / base.scale
    pairs = -0.5 * standard.square() - base.scale.log() - 0.5 * math.log(2 * math.pi)
    log_n = math.log(len(base.loc))
    whole, each = torch.logsumexp(pairs.sum(-1), -1) - log_n, (torch.logsumexp(pairs, -2) - log_n).sum(-1)
    return base.drawn_log_prob(noise) - whole, whole - each, each - log_prior


class BetaTC(Objective):
    """The KL term in three parts, each with a weight (Chen et al. 2018, arXiv 1802.04942; terms as in `tc_terms`).

    With weights of 1 it is the ELBO. The chain has no kernels, and a batch of images in its base.

    Attributes:
        information, correlation, dimensionwise: weights of mutual information, total correlation and dimension-wise KL.
    """

    information: Weight = 1.0
    correlation: Weight = 6.0
    dimensionwise: Weight = 1.0

    of_images = without_kernels = True

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, batch)."""
        z = chain.base.rsample(noise[0])
        information, correlation, rest = tc_terms(chain.base, noise[0], target.log_prior(z))
        penalty = self.information * information + self.correlation * correlation + self.dimensionwise * rest
        return target.log_likelihood(z) - penalty


# ---- categorical latents


class MixedBase:
    """Independent Gaussian and categorical latents: z = [Gaussian part, one vector of `categories` for each group].

    A category is one-hot. At a temperature above 0 it is relaxed, softmax((log q + Gumbel noise) / temperature), which
    comes to the same draw as that falls (Jang et al. 2017, arXiv 1611.01144; Maddison et al. 2017, arXiv 1611.00712).
    `drawn_log_prob` is log q of a one-hot draw, and of a relaxed one its mean, sum q log q: by log q of what is relaxed
    a bound would have no limit.

    Args:
        gaussian: of the first dimensions, of which there may be none.
        logits: of the categories, (*batch, groups, categories).
        temperature: 0 for one-hot draws.
    """

    def __init__(self, gaussian: DiagonalGaussian, logits: Tensor, temperature: float = 0.0) -> None:
        self.gaussian, self.log_q, self.temperature = gaussian, torch.log_softmax(logits, -1), temperature
        mean = self.log_q.exp()
        self.loc = torch.cat([gaussian.loc, mean.flatten(-2)], -1)
        self.scale = torch.cat([gaussian.scale, (mean * (1 - mean)).sqrt().flatten(-2)], -1)
        self.dim, self.batch_shape = self.loc.shape[-1], self.loc.shape[:-1]

    def _parts(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of the Gaussian part, and the draws of the groups (*sample, *batch, groups, categories)."""
        first, rest = noise.tensor_split([self.gaussian.dim], -1)
        gumbel = -(-torch.special.log_ndtr(rest.unflatten(-1, self.log_q.shape[-2:]))).log()
        scores = self.log_q + gumbel
        if self.temperature > 0:
            return first, torch.softmax(scores / self.temperature, -1)
        return first, one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)

    def rsample(self, noise: Tensor) -> Tensor:
        """Draws from standard normal noise, both (*sample, *batch, dim)."""
        first, drawn = self._parts(noise)
        return torch.cat([self.gaussian.rsample(first), drawn.flatten(-2)], -1)

    def drawn_log_prob(self, noise: Tensor) -> Tensor:
        """See the class; in nats, (*sample, *batch)."""
        if self.temperature > 0:
            first, weights = noise[..., : self.gaussian.dim], self.log_q.exp()
        else:
            first, weights = self._parts(noise)
        return self.gaussian.drawn_log_prob(first) + (weights * self.log_q).sum((-2, -1))

    def divergences(self) -> tuple[Tensor, Tensor]:
        """KL of the Gaussian part to N(0, I), and of the categories to uniform ones, in nats: two of (*batch,)."""
        loc, scale = self.gaussian.loc, self.gaussian.scale
        gaussian = (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum(-1)
        return gaussian, (self.log_q.exp() * (self.log_q + math.log(self.log_q.shape[-1]))).sum((-2, -1))

    def __getitem__(self, images: slice) -> MixedBase:
        return MixedBase(self.gaussian[images], self.log_q[images], self.temperature)


class MixedJoint(Joint):
    """Log p(x, z) where the first `latents` of z are N(0, I), and the rest groups of equally likely categories."""

    groups, categories = 0, 2

    def log_prior(self, z: Tensor) -> Tensor:
        """In nats; z: (*sample, batch, dim) -> (*sample, batch)."""
        return super().log_prior(z[..., : self.dim]) - self.groups * math.log(self.categories)


class MixedVAE(VAE):
    """A `VAE` with categorical latents beside Gaussian ones, or alone (Dupont 2018, arXiv 1804.00104).

    Its posterior draws categories, and `Relaxed`, by which it is trained, relaxes them.

    Args:
        latents: Gaussian ones, or 0.
        groups, categories: how many categorical latents, of how many values each.
        width, decoder: as of `VAE`.
    """

    def __init__(self, latents: int, groups: int, categories: int, width: int, decoder: Any) -> None:
        super().__init__(latents + groups * categories, width, (), decoder)
        self.sizes = latents, latents, groups * categories
        self.groups, self.categories = groups, categories
        self.encoder.outputs = nn.Linear(width, sum(self.sizes))

    def posterior(self, x: Tensor, generator: torch.Generator | None = None) -> Chain:
        """As of `VAE`."""
        features = self.encoder.features(x)
        loc, scale, logits = self.encoder.outputs(features).split(self.sizes, -1)
        gaussian = DiagonalGaussian(loc, softplus(scale) + 1e-4)
        base: Any = MixedBase(gaussian, logits.unflatten(-1, (self.groups, self.categories)))
        return Chain(base, (), features, generator)

    def joint(self, x: Tensor) -> Joint:
        """As of `VAE`."""
        joint = MixedJoint(self.decoder, x, self.sizes[0])
        joint.groups, joint.categories = self.groups, self.categories
        return joint


class Relaxed(Objective):
    """Another objective, of which categories are drawn at a temperature (Gumbel-softmax).

    Attributes:
        objective: of a chain without kernels, with a `MixedBase`.
        temperature: above 0, or a schedule that ends there.
    """

    objective: Annotated[Any, Calls("an objective: what is called with chain, target, sample_shape and noise")] = ELBO()
    temperature: Annotated[Any, Annealed(Number(0, open_low=True))] = Between(1.0, 0.1)

    of_images = without_kernels = mixed = True

    def check(self) -> None:
        """Refuse a temperature that comes to 0, where nothing would be learned, and terms of Gaussians alone."""
        ends = self.temperature
        if isinstance(ends, Between) and not ends.first * ends.last:
            raise ValueError(f"impossible temperature {ends!r} of Relaxed: temperature takes what stays above 0")
        if isinstance(self.objective, BetaTC):
            raise ValueError(f"impossible objective {self.objective!r} of Relaxed: its terms are of Gaussian latents")

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Those of the objective."""
        base: Any = chain.base
        heated: Any = MixedBase(base.gaussian, base.log_q, self.temperature)
        found: Tensor = self.objective(chain.replace(base=heated), target, noise=noise)
        return found

    def draws(self, sample_shape: Shape) -> tuple[int, ...]:
        """Those of the objective."""
        found: tuple[int, ...] = getattr(self.objective, "draws", super().draws)(sample_shape)
        return found

    def at(self, step: int) -> Self:
        """The objective of that step at the temperature of that step."""
        return self._with(objective=objective_at(self.objective, step), temperature=value_at(self.temperature, step))


class JointCapacity(Objective):
    """Two capacities: E[log p(x | z)] - |KL_z - C_z| - |KL_c - C_c|, for a `MixedBase` (Dupont 2018, weight 1).

    Attributes:
        capacity, categorical: nats that the Gaussian latents' KL and the others', means over the batch, are held at;
            the latter at most at the logarithm of the number of values.
        rise: in [0, 1], what both are multiplied by.
    """

    capacity: Annotated[float, Number(0)] = 20.0
    categorical: Annotated[float, Number(0)] = 5.0
    rise: Annealing = 1.0

    of_images = without_kernels = mixed = True

    def values(self, chain: Chain, target: Any, noise: Tensor) -> Tensor:
        """Values (*sample, *batch), whose mean is the objective."""
        base: Any = chain.base
        largest = base.log_q.shape[-2] * math.log(base.log_q.shape[-1])
        held = zip(base.divergences(), (self.capacity, min(self.categorical, largest)), strict=True)
        penalty = sum((kl.mean() - self.rise * capacity).abs() for kl, capacity in held)
        return target.log_likelihood(base.rsample(noise[0])) - penalty
