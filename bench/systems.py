"""Time of a training step of the newer auto-encoders: a plain loop in torch, and this package.

    python bench/systems.py [--models iterative beta-tc categories miwae masked] [--json PATH]

What is compared, and how to read it, is in bench/README.md.
"""

from __future__ import annotations

import copy
import math

import torch
from masked import SIZE, unfolded
from mnist import LATENTS, WIDTH, plain_network, trained
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence
from torch.nn.functional import gumbel_softmax, leaky_relu, softplus
from turns import Entry, Ratio, Work, about, measure, parser, save, table

from annealed_core import ELBO, Mnist
from annealed_core.decoders import LocallyMasked, LocallyMaskedConv
from annealed_core.running import data
from annealed_core.running.mnist import images
from annealed_core.vae import PIXELS
from annealed_core.variants import MIWAE, BetaTC, Relaxed

BATCH = 64
ITERATIONS, BETA = 5, 0.5
CORRELATION = 6.0
GROUPS, CATEGORIES, TEMPERATURE = 20, 10, 1.0
SAMPLES, BOUNDS = 4, 4
FEW, CHANNELS, BLOCKS = 10, 8, 4  # latents, channels and blocks of the locally masked decoder


# The plain way: modules, torch.distributions, Adam as it comes.


class PlainVAE(nn.Module):
    def __init__(self, latents: int = LATENTS, outputs: int = 2 * LATENTS) -> None:
        super().__init__()
        self.encoder = plain_network(PIXELS, WIDTH, WIDTH, outputs)
        self.decoder: nn.Module = plain_network(latents, WIDTH, WIDTH, PIXELS)
        self.prior = Normal(torch.zeros(latents), torch.ones(latents))

    def posterior(self, x: Tensor) -> Normal:
        loc, scale = self.encoder(x).chunk(2, -1)
        return Normal(loc, softplus(scale) + 1e-4)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        logits = self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])
        return Bernoulli(logits=logits).log_prob(x).sum(-1)

    def bound(self, x: Tensor, q: Normal, shape: tuple[int, ...] = (), beta: float = 1.0) -> Tensor:
        z = q.rsample(shape)
        return self.log_likelihood(x, z) + beta * (self.prior.log_prob(z) - q.log_prob(z)).sum(-1)

    def loss(self, x: Tensor) -> Tensor:
        return -self.bound(x, self.posterior(x)).mean()


class PlainIterative(PlainVAE):
    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(PIXELS + 6 * LATENTS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.encoder = nn.Sequential(first, nn.ELU(), second, nn.ELU(), nn.Linear(WIDTH, 4 * LATENTS))

    def bound_at(self, x: Tensor, lam: Tensor, beta: float = 1.0) -> Tensor:
        loc, log_variance = lam.chunk(2, -1)
        return self.bound(x, Normal(loc, (0.5 * log_variance).exp()), beta=beta)

    def refine(self, x: Tensor, lam: Tensor) -> Tensor:
        point = lam.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.bound_at(x, point).sum(), point)
        inputs = torch.cat([x - 0.5, lam.detach(), (slope.abs() + 1e-5).log(), slope.sign()], -1)
        fresh, gate = self.encoder(inputs).chunk(2, -1)
        gate = torch.sigmoid(gate)
        loc, log_variance = (gate * lam.detach() + (1 - gate) * fresh).chunk(2, -1)
        return torch.cat([loc, log_variance.clamp(-15, 15)], -1)

    def loss(self, x: Tensor) -> Tensor:
        learning, self.decoder = self.decoder, copy.deepcopy(self.decoder).eval().requires_grad_(False)
        stages = [x.new_zeros(len(x), 2 * LATENTS)]
        for _ in range(ITERATIONS):
            stages.append(self.refine(x, stages[-1]))
        whole = torch.stack([self.bound_at(x, lam, BETA) for lam in stages[1:]]).mean(0)
        self.decoder = learning
        decoded = self.bound_at(x, stages[-1].detach(), BETA)
        return -(whole + decoded - decoded.detach()).mean()


class PlainBetaTC(PlainVAE):
    def loss(self, x: Tensor) -> Tensor:
        q = self.posterior(x)
        z = q.rsample()
        log_n, pairs = math.log(len(x)), q.log_prob(z.unsqueeze(1))  # (batch, batch, latents)
        log_q, log_product = pairs.sum(-1).logsumexp(1) - log_n, (pairs.logsumexp(1) - log_n).sum(-1)
        information, correlation = q.log_prob(z).sum(-1) - log_q, log_q - log_product
        dimensionwise = log_product - self.prior.log_prob(z).sum(-1)
        return -(self.log_likelihood(x, z) - information - CORRELATION * correlation - dimensionwise).mean()


class PlainCategories(PlainVAE):
    def __init__(self) -> None:
        super().__init__(GROUPS * CATEGORIES, GROUPS * CATEGORIES)

    def loss(self, x: Tensor) -> Tensor:
        logits = self.encoder(x).unflatten(-1, (GROUPS, CATEGORIES))
        z = gumbel_softmax(logits, TEMPERATURE).flatten(1)
        kl = kl_divergence(Categorical(logits=logits), Categorical(logits=torch.zeros(CATEGORIES))).sum(-1)
        return -(self.log_likelihood(x, z) - kl).mean()


class PlainMIWAE(PlainVAE):
    def loss(self, x: Tensor) -> Tensor:
        log_weight = self.bound(x, self.posterior(x), (SAMPLES, BOUNDS))
        return -(log_weight.logsumexp(0) - math.log(SAMPLES)).mean()


class PlainConv(LocallyMaskedConv):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return unfolded(self, x)


class PlainBlock(nn.Module):
    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(2 * CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, 2 * CHANNELS, 1)
        self.masked = PlainConv(CHANNELS, CHANNELS, dilation)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.outer(leaky_relu(self.masked(leaky_relu(self.inner(leaky_relu(h))))))


class PlainMaskedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = PlainConv(2, 2 * CHANNELS, centre=False)
        self.blocks = nn.Sequential(*(PlainBlock(1 + number % 2) for number in range(BLOCKS)))
        self.outputs = nn.Sequential(nn.LeakyReLU(), nn.Conv2d(2 * CHANNELS, 1, 1))
        first, second, third = nn.Linear(FEW, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, PIXELS)
        self.image = nn.Sequential(first, nn.LeakyReLU(), second, nn.LeakyReLU(), third)
        self.from_image = nn.Conv2d(1, 2 * CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x, image = (each.view(-1, 1, SIZE, SIZE) for each in (x, self.image(z)))
        h = self.first(torch.cat([x, torch.ones_like(x)], 1)) + self.from_image(image)
        return self.outputs(self.blocks(h)).flatten(1)


class PlainMasked(PlainVAE):
    def __init__(self) -> None:
        super().__init__(FEW, 2 * FEW)
        self.decoder = PlainMaskedDecoder()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return Bernoulli(logits=self.decoder(x, z)).log_prob(x).sum(-1)


#: Of each model the description, and the plain way.
MODELS: dict[str, tuple[Mnist, type[PlainVAE]]] = {
    "iterative": (Mnist(iterations=ITERATIONS, objective=ELBO(BETA)), PlainIterative),
    "beta-tc": (Mnist(objective=BetaTC(correlation=CORRELATION)), PlainBetaTC),
    "categories": (
        Mnist(latents=0, groups=GROUPS, categories=CATEGORIES, objective=Relaxed(ELBO(), TEMPERATURE)),
        PlainCategories,
    ),
    "miwae": (Mnist(objective=MIWAE(SAMPLES, 1.0, BOUNDS)), PlainMIWAE),
    "masked": (Mnist(latents=FEW, objective=ELBO(), decoder=LocallyMasked(CHANNELS, BLOCKS, orders=1)), PlainMasked),
}


def plain_loop(name: str) -> Work:
    model, train_images, losses = MODELS[name][1](), images()[0], []
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train(steps: int) -> None:
        for _ in range(steps):
            x = data.binarise(train_images[torch.randint(len(train_images), (BATCH,))])
            optimiser.zero_grad()
            loss = model.loss(x)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())

    return train


# This package, as `run` trains.


def ours(name: str) -> Work:
    return trained(MODELS[name][0].replace(batch=BATCH))


def check(name: str) -> float:
    """The relative error of the plain loss and its gradients against this package's, for equal weights and noise.

    In double precision: iterative inference takes signs and logarithms of gradients that may be next to 0.
    """
    (spec, plain_way), x = MODELS[name], images()[2][:BATCH].double()
    plain, model = plain_way().double(), spec.auto_encoder().double()
    with torch.no_grad():
        for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    torch.manual_seed(0)
    loss = plain.loss(x)
    torch.manual_seed(0)
    if spec.groups:  # which makes its Gumbel noise of normal noise
        exponential = x.new_empty(1, BATCH, GROUPS * CATEGORIES).exponential_()
        noise = torch.special.ndtri((-exponential).exp())
        expected = -spec.objective(model.posterior(x), model.joint(x), noise=noise).mean()
    else:
        expected = -model.objective(spec.objective, x).mean()
    for each in (loss, expected):
        each.backward()
    pairs = [(loss, expected), *((a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))]
    # Batch normalisation takes away the biases before it: their gradients are rounding errors.
    pairs = [(a, b) for a, b in pairs if b.abs().max() > 1e-10]
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


def main() -> None:
    asked = parser("Time of a training step of the newer auto-encoders.")
    asked.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    arguments = asked.parse_args()
    machine = about()
    print("; ".join(f"{name} {value}" for name, value in machine.items()))
    for name in arguments.models:
        error = check(name)
        if not error < 1e-4:
            raise SystemExit(f"{name}: plain loss and gradients are not annealed_core's: relative error {error:.0e}")
        print(f"{name}: plain loss and gradients agree with annealed_core's, largest error {error:.0e}")
    entries, found = [], []
    for name in arguments.models:
        plain = Entry(f"{name}, plain", plain_loop, (name,), scale=1e3, alone="plain")
        package = Entry(f"{name}, ours", ours, (name,), scale=1e3, alone="ours")
        entries += [plain, package]
        found.append(Ratio(f"plain / ours, {name}", plain, package, "at least", 1.0))
    measure(entries, arguments.seconds, arguments.rounds)
    print("\n" + table(entries, "milliseconds") + "\n")
    print("\n".join(map(str, found)))
    save(arguments.json, machine, entries, found)


if __name__ == "__main__":
    main()
