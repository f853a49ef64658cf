"""An auto-encoder whose likelihood and posterior are known, z ~ N(0, I), x ~ N(W z + b, s^2 I), and kernels for it."""

from functools import partial

import torch
from torch.distributions import MultivariateNormal

from annealed_core.chain import Chain
from annealed_core.flows import AutoregressiveFlow, HouseholderSequence, PlanarFlow, SplineFlow
from annealed_core.kernels import DiagonalGaussian, normal_log_prob

FLOAT = torch.float64


class LinearTarget:
    def __init__(self, model, x):
        self.model, self.x, self.dim = model, x, model.weight.shape[1]

    def __getitem__(self, images):
        return type(self)(self.model, self.x[images])

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

    `rows` has how many latents each call of the likelihood had; kernels that see the image have it as context.
    """

    def __init__(self, weight, noise=0.7, shift=0.0, stretch=1.0, kernels=(), sees=False):
        self.weight, self.noise, self.kernels, self.sees = weight.to(FLOAT), noise, kernels, sees
        self.bias = torch.linspace(-1, 1, len(weight), dtype=FLOAT)
        self.precision = torch.eye(weight.shape[1], dtype=FLOAT) + self.weight.T @ self.weight / noise**2
        self.shift, self.stretch, self.rows = shift, stretch, []

    def posterior_mean(self, x):
        return torch.linalg.solve(self.precision, ((x - self.bias) @ self.weight / self.noise**2).T).T

    def posterior(self, x):
        loc = self.posterior_mean(x) + self.shift
        scale = self.stretch * self.precision.diagonal().rsqrt()
        return Chain(DiagonalGaussian(loc, scale.expand_as(loc)), self.kernels, x if self.sees else None)

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


class Blur(torch.nn.Module):
    """A kernel that adds noise of a given scale: q(z' | z) = N(z, scale^2); r(z | z') = N(0.9 z', (0.9 scale)^2)."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forwards(self, z, context=None):
        return z, torch.full_like(z, self.scale)

    def reverse(self, z, context=None):
        return 0.9 * z, torch.full_like(z, 0.9 * self.scale)

    def forward(self, z, context=None, noise=None):
        z_next = z + self.scale * noise
        return z_next, normal_log_prob(z, *self.reverse(z_next)) - normal_log_prob(z_next, *self.forwards(z))


FLOWS = {
    "planar": PlanarFlow,
    "householder": HouseholderSequence,
    "householder sequence": lambda dim, context_dim: HouseholderSequence(dim, context_dim, 3),
    "iaf": partial(AutoregressiveFlow, hidden=(8, 8)),
    "spline": partial(SplineFlow, hidden=(8, 8)),
}


def seen(name, latents=3, length=3, move=0.3, count=12):
    """A posterior of flows that see the images, and images."""
    torch.manual_seed(0)
    kernels = [FLOWS[name](latents, context_dim=6).double() for _ in range(length)]
    with torch.no_grad():
        for parameter in [parameter for kernel in kernels for parameter in kernel.parameters()]:
            parameter.add_(move * torch.randn_like(parameter))
    model = LinearGaussian(torch.randn(6, latents) * torch.linspace(0.3, 1, latents), kernels=kernels, sees=True)
    return model, model.simulate(count)[1]


def turned(model, x):
    """The exact q(z_T | x) of flows that are linear in z: z_T = R z_0 with an R for each image."""
    base, rows = model.posterior(x).base, torch.eye(3, dtype=FLOAT).unsqueeze(1).expand(3, len(x), 3)
    with torch.no_grad():
        for kernel in model.kernels:
            rows = kernel(rows, x)[0]
    turn = rows.permute(1, 2, 0)
    covariance = turn @ torch.diag_embed(base.scale.square()) @ turn.mT
    return MultivariateNormal((turn @ base.loc.unsqueeze(-1)).squeeze(-1), (covariance + covariance.mT) / 2)
