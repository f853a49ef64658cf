"""Time of one training step on a density, per model: the plain way in torch, this package, and JAX.

    python bench/toy.py [--method avo|elbo|both] [--models 64] [--json PATH]

A step is noise, forward, backward and Adam on energy D. What is compared, and how to read it, is in bench/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from turns import Entry, Ratio, Work, about, measure, parser, save, table

from annealed_core import AVO, ELBO, Chain, Density, DiagonalGaussian, Gated
from annealed_core.fit import adam, maximise
from annealed_core.kernels import GatedGaussianPair
from annealed_core.running.system import cores, keep_memory
from annealed_core.speed.stack import StackedBase, StackedChain, stack
from annealed_core.targets import ENERGIES, linear_alphas

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

TARGET = ENERGIES["D"]
DIM, BATCH, TRANSITIONS, HIDDEN = TARGET.dim, 128, 4, 32
LEARNING_RATE, BETA1, BETA2, EPSILON = 1e-3, 0.9, 0.999, 1e-8
SCAN = 50  # steps that JAX compiles into one scan
SIDES = ("forwards", "reverse")
OBJECTIVES: dict[str, Any] = {"avo": AVO(), "elbo": ELBO()}


# The plain way: a module a kernel, torch.distributions, one model after another.


class Conditional(nn.Module):
    """A gated Gaussian conditional with a layer for each of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(DIM, HIDDEN)
        self.mean = nn.Linear(HIDDEN, DIM)
        self.gate = nn.Linear(HIDDEN, DIM)
        self.scale = nn.Linear(HIDDEN, DIM)

    def forward(self, z: Tensor) -> Independent:
        h = torch.relu(self.hidden(z))
        gate = torch.sigmoid(self.gate(h))
        loc = gate * self.mean(h) + (1 - gate) * z
        scale = nn.functional.softplus(self.scale(h)) + 1e-6
        return Independent(Normal(loc, scale), 1)


class PlainModel(nn.Module):
    """T transitions and their reverses, from a standard normal base."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = nn.ModuleList(Conditional() for _ in range(TRANSITIONS))
        self.reverse = nn.ModuleList(Conditional() for _ in range(TRANSITIONS))
        self.base = Independent(Normal(torch.zeros(DIM), torch.ones(DIM)), 1)
        self.alphas = linear_alphas(TRANSITIONS).tolist()

    def elbo(self) -> Tensor:
        z = self.base.sample((BATCH,))
        value = -self.base.log_prob(z)
        for forward, reverse in zip(self.forwards, self.reverse, strict=True):
            q = forward(z)
            z_next = q.rsample()
            value = value + reverse(z_next).log_prob(z) - q.log_prob(z_next)
            z = z_next
        return value + TARGET.log_prob(z)

    def avo(self) -> Tensor:
        z = self.base.sample((BATCH,))
        value, log_f_before = torch.zeros(BATCH), self.base.log_prob(z)
        for forward, reverse, alpha in zip(self.forwards, self.reverse, self.alphas[1:], strict=True):
            z_before = z.detach()
            q = forward(z_before)
            z = q.rsample()
            log_f = alpha * TARGET.log_prob(z) + (1 - alpha) * self.base.log_prob(z)
            value = value + log_f + reverse(z).log_prob(z_before) - q.log_prob(z) - log_f_before
            log_f_before = log_f.detach()
        return value


def module_loop(method: str) -> Work:
    """One model: those of many are trained one after another."""
    model = PlainModel()
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimiser.zero_grad()
            loss = -getattr(model, method)().mean()
            loss.backward()
            optimiser.step()

    return train


# This package, as `run` and `sweep` train.


def ours(method: str, n_models: int, compile: bool) -> Work:
    keep_memory()
    shape: dict[str, Any] = {"n_transitions": TRANSITIONS, "batch": BATCH, "kernel": Gated(HIDDEN), "lr": LEARNING_RATE}
    specs = [Density(target=TARGET.name, objective=OBJECTIVES[method], seed=seed, **shape) for seed in range(n_models)]
    problem = Density.problem(specs, compile=compile)
    optimiser = adam(problem.parameters(), LEARNING_RATE, BETA1)
    done = 0

    def after(step: int) -> bool:
        if step % problem.steps_per_record == 0:
            problem.record()
        return False

    def train(steps: int) -> None:
        nonlocal done
        first, done = done, done + steps
        loop: dict[str, Any] = {"lr": LEARNING_RATE, "first": first, "optimiser": optimiser, "after": after}
        maximise(problem.values, problem.parameters(), done, **loop)

    return train


# JAX: the same mathematics, compiled. States are (dim, batch), so that vectors run along the samples: measured 1.5 to
# 2 times as fast as (batch, dim) on a CPU.


def jax_normal_log_prob(noise: Any, scale: Any) -> Any:
    return (-0.5 * noise**2 - jnp.log(scale) - 0.5 * math.log(2 * math.pi)).sum(0)


def jax_log_target(z: Any) -> Any:
    mixture: Any = TARGET.log_density
    centres, weights = mixture.centres.numpy(), mixture.weights.numpy()
    distance = sum((z[d] - centres[:, d, None]) ** 2 for d in range(DIM))
    log_height = np.log(weights)[:, None] - 0.5 * DIM * math.log(2 * math.pi * mixture.variance)
    return jax.nn.logsumexp(log_height - 0.5 / mixture.variance * distance, 0)


def jax_conditional(weights: Any, z: Any) -> tuple[Any, Any]:
    hidden = jax.nn.relu(weights["hidden.weight"] @ z + weights["hidden.bias"][:, None])
    outputs = weights["outputs.weight"] @ hidden + weights["outputs.bias"][:, None]
    move, gate, scale = jnp.split(outputs, 3)
    return z + jax.nn.sigmoid(gate) * (move - z), jax.nn.softplus(scale) + 1e-6


def jax_log_reverse(weights: Any, z: Any, z_next: Any) -> Any:
    loc, scale = jax_conditional(weights, z_next)
    return jax_normal_log_prob((z - loc) / scale, scale)


def jax_log_path(alpha: Any, z: Any) -> Any:
    return alpha * jax_log_target(z) + (1 - alpha) * jax_normal_log_prob(z, 1.0)


def jax_objective(weights: Any, noise: Any, method: str, at_once: bool) -> Any:
    """Values (batch,) of one model, for noise (T + 1, dim, batch).

    `at_once` computes what need not go transition by transition as one batch: faster for one model, slower for many.
    """
    alphas = [t / TRANSITIONS for t in range(1, TRANSITIONS + 1)]
    kernels = [jax.tree.map(lambda value, t=t: value[t], weights) for t in range(TRANSITIONS)]
    z, before, after = noise[0], [], []
    value = -jax_normal_log_prob(z, 1.0)
    for kernel, fresh in zip(kernels, noise[1:], strict=True):
        before.append(jax.lax.stop_gradient(z) if method == "avo" else z)
        loc, scale = jax_conditional(kernel["forwards"], before[-1])
        z = loc + scale * fresh
        after.append(z)
        value -= jax_normal_log_prob(fresh, scale)
    if at_once:
        value += jax.vmap(jax_log_reverse)(weights["reverse"], jnp.stack(before), jnp.stack(after)).sum(0)
    else:
        value += sum(jax_log_reverse(k["reverse"], a, b) for k, a, b in zip(kernels, before, after, strict=True))
    if method == "elbo":
        return value + jax_log_target(after[-1])
    if at_once:
        log_f = list(jax.vmap(jax_log_path)(jnp.array(alphas), jnp.stack(after)))
    else:
        log_f = [jax_log_path(alpha, z) for alpha, z in zip(alphas, after, strict=True)]
    return value + sum(log_f) - jax.lax.stop_gradient(sum(log_f[:-1]))


def jax_scan(method: str, n_models: int) -> Work:
    many = n_models > 1
    objective = jax.value_and_grad(lambda weights, noise: -jax_objective(weights, noise, method, not many).mean())

    def step(state: Any, key: Any) -> tuple[Any, Any]:
        weights, mean, square, count = state
        loss, gradient = objective(weights, jax.random.normal(key, (TRANSITIONS + 1, DIM, BATCH)))
        count += 1
        mean = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, mean, gradient)
        square = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g**2, square, gradient)
        scale_mean, scale_square = 1 / (1 - BETA1**count), 1 / (1 - BETA2**count)

        def move(w: Any, m: Any, s: Any) -> Any:
            return w - LEARNING_RATE * m * scale_mean / (jnp.sqrt(s * scale_square) + EPSILON)

        return (jax.tree.map(move, weights, mean, square), mean, square, count), loss

    def chunk(state: Any, key: Any) -> tuple[Any, Any, Any]:
        key, fresh = jax.random.split(key)
        state, losses = jax.lax.scan(step, state, jax.random.split(fresh, SCAN))
        return state, key, losses

    def start(weights: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return weights, zeros, zeros, jnp.float32(0)

    models = [jax_weights(common(reference_model(seed))) for seed in range(n_models)]
    keys = jax.random.split(jax.random.key(0), n_models)
    if many:
        held = [jax.vmap(start)(jax.tree.map(lambda *values: jnp.stack(values), *models)), keys]
        compiled = jax.jit(jax.vmap(chunk))
    else:
        held = [start(models[0]), keys[0]]
        compiled = jax.jit(chunk)

    def train(steps: int) -> None:
        for _ in range(steps // SCAN):
            held[0], held[1], losses = compiled(*held)
        jax.block_until_ready((held, losses))

    return train


def jax_weights(weights: dict[str, Tensor]) -> Any:
    """What `common` gives as a tree of arrays, side -> layer.name -> (T, ...)."""
    return {
        side: {name.partition(".")[2]: jnp.asarray(v.numpy()) for name, v in weights.items() if name.startswith(side)}
        for side in SIDES
    }


# Whether all compute the same.


def reference_model(seed: int) -> nn.ModuleList:
    """The kernels of one model, as the package draws them."""
    torch.manual_seed(seed)
    return nn.ModuleList(GatedGaussianPair(DIM, HIDDEN) for _ in range(TRANSITIONS))


def common(model: Any, gradient: bool = False) -> dict[str, Tensor]:
    """Weights, or their gradients, of any torch model here: "side.layer.name" -> (T, ...), outputs joined."""
    plain = isinstance(model, PlainModel)
    layers = {"hidden": ("hidden",), "outputs": ("mean", "gate", "scale") if plain else ("outputs",)}
    found = {}
    for side in SIDES:
        row = getattr(model, side) if plain else [getattr(pair, side) for pair in model]
        for layer, parts in layers.items():
            for name in ("weight", "bias"):
                each = [[getattr(getattr(one, part), name) for part in parts] for one in row]
                values = [torch.cat([p.grad if gradient else p.detach() for p in some]) for some in each]
                found[f"{side}.{layer}.{name}"] = torch.stack(values)
    return found


def plain_check(method: str, model: nn.ModuleList) -> tuple[Tensor, dict[str, Tensor]]:
    plain = PlainModel()
    with torch.no_grad():
        for side in SIDES:
            for conditional, pair in zip(getattr(plain, side), model, strict=True):
                source = getattr(pair, side)
                conditional.hidden.load_state_dict(source.hidden.state_dict())
                for number, layer in enumerate((conditional.mean, conditional.gate, conditional.scale)):
                    layer.weight.copy_(source.outputs.weight[DIM * number : DIM * (number + 1)])
                    layer.bias.copy_(source.outputs.bias[DIM * number : DIM * (number + 1)])
    torch.manual_seed(1)
    values = getattr(plain, method)()
    values.mean().backward()
    return values, common(plain, gradient=True)


def ours_check(method: str, model: nn.ModuleList, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """From a stack of one; a compiled step compares itself with that when it is first taken."""
    chain = StackedChain(StackedBase(torch.zeros(1, DIM), torch.ones(1, DIM)), stack([model]))
    values = OBJECTIVES[method].values(chain, TARGET, noise.unsqueeze(2)).squeeze(1)
    values.mean().backward()
    return values, {name.replace("/", "."): p.grad[:, 0] for name, p in chain.kernels.named_parameters()}


def jax_check(method: str, model: nn.ModuleList, noise: Tensor, at_once: bool) -> tuple[Tensor, dict[str, Tensor]]:
    fresh, weights = jnp.asarray(noise.mT.numpy()), jax_weights(common(model))
    values = jax_objective(weights, fresh, method, at_once)
    gradient = jax.grad(lambda weights: jax_objective(weights, fresh, method, at_once).mean())(weights)
    by_name = {f"{s}.{name}": torch.tensor(np.asarray(v)) for s in SIDES for name, v in gradient[s].items()}
    return torch.tensor(np.asarray(values)), by_name


def check(methods: Sequence[str]) -> float:
    """The largest error of values and gradients against a plain chain in float64, relative to the largest of each."""
    errors = []
    for method in methods:
        model, exact = reference_model(0), reference_model(0).double()
        torch.manual_seed(1)  # the same noise as the plain model draws from this seed
        loc, scale = torch.zeros(BATCH, DIM), torch.ones(BATCH, DIM)
        noise = torch.stack([torch.normal(loc, scale) for _ in range(TRANSITIONS + 1)])
        chain = Chain(DiagonalGaussian(loc[0].double(), scale[0].double()), exact)
        expected = OBJECTIVES[method].values(chain, TARGET, noise.double())
        expected.mean().backward()
        expected_gradient = common(exact, gradient=True)
        found = [plain_check(method, model), ours_check(method, model, noise)]
        found += [jax_check(method, model, noise, at_once) for at_once in (False, True)] if jax else []
        for values, gradient in found:
            pairs = [(values.detach(), expected.detach())]
            pairs += [(gradient[key], expected_gradient[key]) for key in expected_gradient]
            errors += [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    return max(errors)


def entries(method: str, n_models: int) -> dict[str, Entry]:
    """All that is measured, in microseconds per model and step; "both cores" are as many processes as cores."""
    n, loop = cores(), {"scale": 1e6, "chunk": 10, "alone": "plain"}
    us = {**loop, "alone": "ours"}
    found = {
        "loop": Entry("module loop", module_loop, (method,), **loop),
        "loop, both cores": Entry("module loop", module_loop, (method,), n, **loop),
    }
    for name, compile in (("ours", False), ("compiled", True)):
        label = f"ours{', compiled' * compile}"
        found[name] = Entry(f"{label}, 1 model", ours, (method, 1, compile), **us)
        many = us | {"scale": 1e6 * n / n_models}
        found[f"{name}, many"] = Entry(f"{label}, {n_models} models", ours, (method, n_models // n, compile), n, **many)
    if jax:
        us |= {"chunk": SCAN, "alone": "jax"}
        found["jax"] = Entry("jax, 1 model", jax_scan, (method, 1), **us)
        many = us | {"scale": 1e6 * n / n_models}
        found["jax, many"] = Entry(f"jax, {n_models} models", jax_scan, (method, n_models // n), n, **many)
    return found


def main() -> None:
    asked = parser("Time of one training step on a density, per model.", seconds=3.0, rounds=9)
    asked.add_argument("--models", type=int, default=64, help="trained side by side (default 64)")
    asked.add_argument("--method", choices=("avo", "elbo", "both"), default="both")
    arguments = asked.parse_args()
    if arguments.models < 2 or arguments.models % cores():
        asked.error(f"--models must be a multiple of the {cores()} cores, and at least 2, got {arguments.models}")
    methods = ("avo", "elbo") if arguments.method == "both" else (arguments.method,)
    machine = about() | ({"jax": jax.__version__} if jax else {})
    print("; ".join(f"{name} {value}" for name, value in machine.items()) + ("" if jax else "; no jax"))
    error = check(methods)
    if not error < 1e-4:
        raise SystemExit(f"contestants have other values or gradients than a plain chain: relative error {error:.0e}")
    print(f"values and gradients are those of a plain chain, largest error {error:.0e}")
    found = {method: entries(method, arguments.models) for method in methods}
    everything = [entry for each in found.values() for entry in each.values()]
    measure(everything, arguments.seconds, arguments.rounds)
    ratios = []
    for method, each in found.items():
        print(f"\n{method.upper()}\n{table(list(each.values()), 'microseconds per model and step')}")
        bars = {"ours": 1.8, "ours, many": 25, "compiled": 4, "compiled, many": 60}
        ratios += [
            Ratio(f"{method}, loop / {name}", each["loop"], each[name], "at least", k) for name, k in bars.items()
        ]
        ratios.append(Ratio(f"{method}, ours / compiled", each["ours, many"], each["compiled, many"], "at least", 1.25))
    print("\n" + "\n".join(map(str, ratios)))
    save(arguments.json, machine, everything, ratios)


if __name__ == "__main__":
    main()
