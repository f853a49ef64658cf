"""An auto-encoder whose likelihood and posterior are known: z ~ N(0, I), x ~ N(W z + b, s^2 I)."""

import torch
from torch.distributions import MultivariateNormal

from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, normal_log_prob

FLOAT = torch.float64


class LinearTarget:
    def __init__(self, model, x):
        self.model, self.x, self.dim, self.rows = model, x, model.weight.shape[1], []

    def log_likelihood(self, z):
        self.model.rows.append(z[..., 0].numel())
        scale = torch.full_like(self.x[0], self.model.noise)
        return normal_log_prob(self.x, z @ self.model.weight.T + self.model.bias, scale)

    def log_prior(self, z):
        return normal_log_prob(z, torch.zeros_like(z[..., :1]), torch.ones_like(z))

    def log_prob(self, z):
        return self.log_likelihood(z) + self.log_prior(z)


class LinearGaussian:
    """Its posterior's base has the true mean and the best scales of a factorised Gaussian, then shifted and stretched.

    `rows` has how many latents each call of the likelihood had.
    """

    def __init__(self, weight, noise=0.7, shift=0.0, stretch=1.0, kernels=()):
        self.weight, self.noise, self.kernels = weight.to(FLOAT), noise, kernels
        self.bias = torch.linspace(-1, 1, len(weight), dtype=FLOAT)
        self.precision = torch.eye(weight.shape[1], dtype=FLOAT) + self.weight.T @ self.weight / noise**2
        self.shift, self.stretch, self.rows = shift, stretch, []

    def posterior_mean(self, x):
        return torch.linalg.solve(self.precision, ((x - self.bias) @ self.weight / self.noise**2).T).T

    def posterior(self, x):
        loc = self.posterior_mean(x) + self.shift
        scale = self.stretch * self.precision.diagonal().rsqrt()
        return Chain(DiagonalGaussian(loc, scale.expand_as(loc)), self.kernels)

    def joint(self, x):
        return LinearTarget(self, x)

    def simulate(self, n):
        z = torch.randn(n, self.weight.shape[1], dtype=FLOAT)
        return z, z @ self.weight.T + self.bias + self.noise * torch.randn(n, len(self.weight), dtype=FLOAT)

    def log_px(self, x):
        covariance = self.weight @ self.weight.T + self.noise**2 * torch.eye(len(self.weight), dtype=FLOAT)
        return MultivariateNormal(self.bias, covariance).log_prob(x)


def correlated(**given):
    """Three latents whose true posterior is correlated."""
    torch.manual_seed(3)
    shared, own = torch.randn(6, 1, dtype=FLOAT), torch.randn(6, 3, dtype=FLOAT)
    return LinearGaussian(0.4 * shared + 0.3 * own, **given)


def orthogonal(**given):
    """Three latents whose true posterior factorises, so that the base is exactly that."""
    torch.manual_seed(3)
    return LinearGaussian(torch.linalg.qr(torch.randn(6, 3, dtype=FLOAT))[0] * torch.tensor([2.0, 1.0, 0.5]), **given)
