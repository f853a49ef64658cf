"""Time of an epoch of MNIST: a plain loop in torch, this package, and the matrix products alone.

    python bench/mnist.py [--methods vae hvi avo] [--batches 64 256] [--both] [--json PATH]

An epoch is 50,000 images; it is measured over some of its steps and scaled. What is compared, and how to read it, is in
bench/README.md.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal
from torch.utils.data import DataLoader, Subset
from turns import Entry, Ratio, Work, about, measure, parser, save, table

from annealed_core import AVO, ELBO, IAF, IWAE, VAE, Gated, Householder, Linear, Mnist, Planar
from annealed_core.fit import adam, maximise
from annealed_core.judging.likelihood import importance_sampling
from annealed_core.running import data
from annealed_core.running.mnist import images
from annealed_core.running.system import cores, keep_memory
from annealed_core.vae import PIXELS

EPOCH = data.TRAIN_SIZE
LATENTS, WIDTH = 40, 300
TEST_IMAGES, TEST_SAMPLES = 10_000, 5_000  # of the likelihood to which what is measured is scaled
SOME_IMAGES, DECODED_ROWS = 4, 2560
BETA, PAIRS = Linear(0.2, 2e-4), Gated(hidden=LATENTS, start="identity")

METHODS: dict[str, Mnist] = {
    "vae": Mnist(),
    "hvi": Mnist(kernel=PAIRS, objective=ELBO(beta=BETA)),
    "avo": Mnist(kernel=PAIRS, objective=AVO(weight=0.2, beta=BETA)),
    "planar": Mnist(kernel=Planar()),
    "householder": Mnist(kernel=Householder()),
    "iaf": Mnist(kernel=IAF(hidden=320)),
    "iwae": Mnist(objective=IWAE(samples=5, beta=BETA)),
}

#: Inputs and outputs of the layers, in order, and whether their inputs need a gradient.
ENCODER = [(PIXELS, WIDTH, False), (WIDTH, WIDTH, True), (WIDTH, 2 * LATENTS, True)]
DECODER = [(LATENTS, WIDTH, True), (WIDTH, WIDTH, True), (WIDTH, PIXELS, True)]


# The plain way: a DataLoader, modules, torch.distributions, Adam as it comes.


def plain_network(*sizes: int) -> nn.Sequential:
    first, second, third, last = sizes
    return nn.Sequential(
        *(nn.Linear(first, second), nn.BatchNorm1d(second), nn.LeakyReLU()),
        *(nn.Linear(second, third), nn.BatchNorm1d(third), nn.LeakyReLU()),
        nn.Linear(third, last),
    )


class PlainVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = plain_network(PIXELS, WIDTH, WIDTH, 2 * LATENTS)
        self.decoder = plain_network(LATENTS, WIDTH, WIDTH, PIXELS)
        self.prior = Normal(torch.zeros(LATENTS), torch.ones(LATENTS))

    def loss(self, x: Tensor, beta: float) -> Tensor:
        loc, scale = self.encoder(x).chunk(2, -1)
        q = Normal(loc, nn.functional.softplus(scale) + 1e-4)
        z = q.rsample()
        log_likelihood = Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        return -(log_likelihood + beta * (self.prior.log_prob(z) - q.log_prob(z)).sum(-1)).mean()


def plain_loop(batch: int) -> Work:
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    kept = tempfile.TemporaryDirectory()  # torchvision reads unpacked files
    raw = Path(kept.name) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in data.SHA256:
        (raw / name).write_bytes(gzip.decompress((data.REPOSITORY_DATA / "MNIST" / "raw" / f"{name}.gz").read_bytes()))
    loader = DataLoader(Subset(MNIST(kept.name, transform=ToTensor()), range(EPOCH)), batch_size=batch, shuffle=True)
    model = PlainVAE()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def forever() -> Iterator[Tensor]:
        while True:
            for grey, _ in loader:
                yield grey

    batches, losses = forever(), []

    def train(steps: int) -> None:
        for _ in range(steps):
            x = torch.bernoulli(next(batches).flatten(1))
            optimiser.zero_grad()
            loss = model.loss(x, 1.0)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())

    return train


def check() -> float:
    """The relative error of the plain loop's loss and gradients against this package's, for equal weights and noise."""
    vae, plain = VAE(LATENTS, WIDTH), PlainVAE()
    x = images()[2][:64]
    with torch.no_grad():
        for mine, theirs in zip(plain.parameters(), vae.parameters(), strict=True):
            mine.copy_(theirs)
    torch.manual_seed(0)
    loss = plain.loss(x, 0.5)
    torch.manual_seed(0)
    noise = torch.normal(torch.zeros(1, 64, LATENTS), torch.ones(1, 64, LATENTS))
    expected = -ELBO(beta=0.5)(vae.posterior(x), vae.joint(x), noise=noise).mean()
    for each in (loss, expected):
        each.backward()
    pairs = [(loss, expected), *((a.grad, b.grad) for a, b in zip(plain.parameters(), vae.parameters(), strict=True))]
    # Batch normalisation takes away the biases before it: their gradients are rounding errors.
    pairs = [(a, b) for a, b in pairs if b.abs().max() > 1e-4]
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


# This package, as `run` trains and judges.


def ours(method: str, batch: int) -> Work:
    return trained(METHODS[method].replace(batch=batch))


def trained(spec: Mnist) -> Work:
    keep_memory()
    problem = Mnist.problem([spec])
    optimiser = adam(problem.parameters(), 1e-3)
    done = 0

    def train(steps: int) -> None:
        nonlocal done
        first, done = done, done + steps
        maximise(problem.values, problem.parameters(), done, lr=1e-3, first=first, optimiser=optimiser)

    return train


def likelihood(method: str) -> Work:
    """One unit is TEST_SAMPLES samples for each of SOME_IMAGES images."""
    keep_memory()
    model, x = METHODS[method].auto_encoder().eval(), images()[2][:SOME_IMAGES]
    generator = torch.Generator()

    def estimate(times: int) -> None:
        for _ in range(times):
            importance_sampling(model, x, TEST_SAMPLES, generator=generator)

    return estimate


# The matrix products alone.


def training_products(batch: int) -> Work:
    """The products of a step of the VAE: outputs, gradients of the weights, of the inputs where they are needed."""
    calls: list[Callable[[], Any]] = []
    for size_in, size_out, needs_gradient in ENCODER + DECODER:
        x, weight, gradient = torch.randn(batch, size_in), torch.randn(size_out, size_in), torch.randn(batch, size_out)
        products = [(x, weight.t()), (gradient.t(), x), (gradient, weight)]
        calls += [product(left, right) for left, right in (products if needs_gradient else products[:2])]
    return repeat(calls)


def decoding_products(method: str) -> Work:
    """The products of decoding DECODED_ROWS latents, with those of the kernels there and back."""
    sizes = [(size_in, size_out) for size_in, size_out, _ in DECODER]
    for pair in METHODS[method].auto_encoder().kernels:
        layers = [layer for side in (pair.forwards, pair.reverse) for layer in (side.hidden, side.outputs)]
        sizes += [(layer.in_features, layer.out_features) for layer in layers]
    keep_memory()
    return repeat([product(torch.randn(DECODED_ROWS, a), torch.randn(b, a).t()) for a, b in sizes])


def product(left: Tensor, right: Tensor) -> Callable[[], Any]:
    out = torch.empty(len(left), right.shape[1])
    return lambda: torch.mm(left, right, out=out)


def repeat(calls: list[Callable[[], Any]]) -> Work:
    @torch.no_grad()
    def work(times: int) -> None:
        for _ in range(times):
            for call in calls:
                call()

    return work


def entries(methods: list[str], batch: int | None, processes: int) -> dict[str, Entry]:
    """What is measured with that batch, in seconds an epoch; or the likelihood of the test set (None)."""
    if batch is None:
        rows, scale = SOME_IMAGES * TEST_SAMPLES, TEST_IMAGES * TEST_SAMPLES
        some: dict[str, Any] = {"processes": processes, "alone": "ours"}
        found = {}
        for name in [name for name in ("vae", "hvi") if name in methods]:
            found[name] = Entry(f"likelihood, {name}", likelihood, (name,), scale=scale / rows, **some)
            products = f"products of decoding, {name}"
            found[f"products {name}"] = Entry(products, decoding_products, (name,), scale=scale / DECODED_ROWS, **some)
        return found
    some = {"arguments": (batch,), "processes": processes, "scale": EPOCH / batch}
    found = {
        "plain": Entry(f"plain loop, batch {batch}", plain_loop, alone="plain", **some),
        "products": Entry(f"products, batch {batch}", training_products, alone="ours", **some),
    }
    if processes > 1:  # the plain loop as it comes: one model, all cores
        some |= {"processes": 1, "threads": processes}
        found["threads"] = Entry(f"plain loop, batch {batch}", plain_loop, alone="plain", **some)
    some = {"processes": processes, "scale": EPOCH / batch, "alone": "ours"}
    found |= {name: Entry(f"{name}, batch {batch}", ours, (name, batch), **some) for name in methods}
    return found


def ratios(each: dict[str, Entry], where: str) -> list[Ratio]:
    """What is asked, of those that were measured."""
    asked = [
        ("plain loop / vae", "plain", "vae", "at least", 1.7),
        ("avo / hvi", "avo", "hvi", "at most", 2.5),
        ("likelihood of the vae / its products", "vae", "products vae", "at most", 1.7),
    ]
    return [
        Ratio(f"{name}{where}", each[above], each[below], side, bound)
        for name, above, below, side, bound in asked
        if above in each and below in each
    ]


def main() -> None:
    asked = parser("Time of an epoch of MNIST, and of the likelihood of its test set.")
    asked.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    asked.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    asked.add_argument("--both", action="store_true", help="also with a process for each core, at the same time")
    arguments = asked.parse_args()
    machine = about()
    print("; ".join(f"{name} {value}" for name, value in machine.items()))
    error = check()
    if not error < 1e-4:
        raise SystemExit(f"the plain loop's loss and gradients are not annealed_core's: relative error {error:.0e}")
    print(f"the plain loop's loss and gradients agree with annealed_core's, largest error {error:.0e}\n")
    places = [(b, p) for p in ([1, cores()] if arguments.both else [1]) for b in (*arguments.batches, None)]
    groups = [(batch, processes, entries(arguments.methods, batch, processes)) for batch, processes in places]
    everything = [entry for _, _, each in groups for entry in each.values()]
    measure(everything, arguments.seconds, arguments.rounds)
    print(table(everything, "seconds") + "\n")
    found = []
    for batch, processes, each in groups:
        found += ratios(each, f" ({f'batch {batch}, ' if batch else ''}{processes} x 1)")
    print("\n".join(map(str, found)))
    save(arguments.json, machine, everything, found)


if __name__ == "__main__":
    main()
