"""What is fast is what is plain: the same values and gradients from the same weights and noise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from annealed_core.chain import Chain
from annealed_core.flows import IAF, Householder, Planar, Spline
from annealed_core.kernels import DiagonalGaussian, Gated, Residual
from annealed_core.objectives import AVO, ELBO, IWAE, AlphaELBO, LocalAVO
from annealed_core.speed import compiled
from annealed_core.speed.compiled import CompiledStep
from annealed_core.speed.stack import GaussianStack, MappedStack, StackedBase, StackedChain, stack
from annealed_core.targets import ENERGIES, GeometricAlphas, LearnedAlphas

KERNELS = {
    "gated": Gated(hidden=8),
    "residual": Residual(hidden=8, start="identity"),
    "planar": Planar(scale=2.0),
    "householder": Householder(),
    "iaf": IAF(hidden=8, scale=1.0),
    "spline": Spline(hidden=8, bins=4, scale=1.0),
}
OBJECTIVES = [ELBO(), AlphaELBO(alpha=0.3), IWAE(samples=5), AVO(alphas=GeometricAlphas()), AVO(weight=0.3), LocalAVO()]
MODELS, STEPS, SAMPLES = 3, 4, 5


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def jitter(module):
    """Away from where training starts: some layers start at 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


# The law.


def gradients(value, by_name):
    """Of a value, 0 where it has none."""
    found = [None] * len(by_name)
    if value.requires_grad:
        found = torch.autograd.grad(value, list(by_name.values()), allow_unused=True)
    pairs = zip(by_name.items(), found, strict=True)
    return {name: torch.zeros_like(of) if gradient is None else gradient for (name, of), gradient in pairs}


def stacked(kernel):
    """M models one by one, and as a stack: two functions (objective, change) -> values and gradients by name."""
    models = [jitter(nn.ModuleList(KERNELS[kernel].build(2, STEPS))) for _ in range(MODELS)]
    base = {"loc": torch.randn(MODELS, 2).requires_grad_(), "scale": (1 + torch.rand(MODELS, 2)).requires_grad_()}
    together = StackedChain(StackedBase(**base), stack(models))
    noise, target = together.noise((SAMPLES, 2)), ENERGIES["D"]

    def plain(objective, change):
        own = [Chain(DiagonalGaussian(base["loc"][m], base["scale"][m]), model) for m, model in enumerate(models)]
        values = [objective.values(change(chain), target, noise[..., m, :]) for m, chain in enumerate(own)]
        by_name = {f"{m}.{name}": each for m, model in enumerate(models) for name, each in model.named_parameters()}
        return torch.stack(values, -1), gradients(sum(value.mean() for value in values), base | by_name)

    def fast(objective, change):
        values = objective.values(change(together), target, noise)
        weights = dict(together.kernels.named_parameters())
        found = gradients(values.flatten(0, -2).mean(0).sum(), base | weights)
        twin = stack(models)  # whose weights are these gradients
        twin.load_state_dict(twin.state_dict() | {name: found[name] for name in weights})
        trained = [name for name, _ in models[0].named_parameters()]
        by_name = {f"{m}.{name}": state[name] for m, state in enumerate(twin.unstack()) for name in trained}
        return values, {name: found[name] for name in base} | by_name

    return plain, fast


CHANGES = {"as it is": lambda chain: chain, "detached": Chain.detach, "frozen": lambda chain: chain.freeze()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_fast_has_the_values_and_gradients_of_what_is_plain(kernel, objective, change):
    torch.manual_seed(0)
    plain, fast = stacked(kernel)
    expected, expected_gradients = plain(objective, CHANGES[change])
    values, found = fast(objective, CHANGES[change])
    torch.testing.assert_close(values, expected)
    assert found.keys() == expected_gradients.keys()
    for name, wanted in expected_gradients.items():
        torch.testing.assert_close(found[name], wanted, msg=lambda text, name=name: f"{name}: {text}")


# Stacks.


@pytest.mark.parametrize("kernel", KERNELS)
def test_unstacking_gives_back_the_weights_of_each_model(kernel):
    models = [nn.ModuleList(KERNELS[kernel].build(2, STEPS)) for _ in range(MODELS)]
    together = stack(models)
    assert isinstance(together, GaussianStack if kernel in ("gated", "residual") else MappedStack)
    for model, found in zip(models, together.unstack(), strict=True):
        state = model.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("kernel", ["gated", "residual"])
def test_a_pair_of_gaussians_is_the_same_bit_by_bit_in_stacks_of_any_size(kernel):
    torch.set_default_dtype(torch.float32)
    models = [jitter(nn.ModuleList(KERNELS[kernel].build(2, STEPS))) for _ in range(MODELS)]
    noise = torch.randn(STEPS + 1, 128, MODELS, 2)

    def outcome(some, noise):
        chain = StackedChain(StackedBase(torch.zeros(len(some), 2), torch.ones(len(some), 2)), stack(some))
        values = AVO(weight=0.5).values(chain, ENERGIES["D"], noise)
        return values, torch.autograd.grad(values.mean(0).sum(), list(chain.parameters()))

    together, gradients_together = outcome(models, noise)
    for m, model in enumerate(models):
        alone, gradients_alone = outcome([model], noise[:, :, m : m + 1])
        assert torch.equal(alone[:, 0], together[:, m])
        assert all(torch.equal(a[:, 0], b[:, m]) for a, b in zip(gradients_alone, gradients_together, strict=True))


@pytest.mark.parametrize("kernel", ["gated", "iaf"])
def test_one_model_does_not_see_what_another_is_given(kernel):
    kernels = stack([KERNELS[kernel].build(2, STEPS) for _ in range(MODELS)])
    chain = StackedChain(StackedBase(torch.zeros(MODELS, 2), torch.ones(MODELS, 2)), kernels)
    noise = chain.noise(SAMPLES)
    spoiled = noise.clone()
    spoiled[:, :, 1] = torch.nan
    clean, other = chain.rsample(noise=noise), chain.rsample(noise=spoiled)
    for m in (0, 2):
        assert torch.equal(clean.z[:, :, m], other.z[:, :, m])
        assert torch.equal(clean.log_ratios[:, :, m], other.log_ratios[:, :, m])
    assert other.z[-1, :, 1].isnan().all()


def test_a_stack_learns_exponents_of_each_models_own():
    torch.manual_seed(0)
    models = [jitter(nn.ModuleList(KERNELS["gated"].build(2, STEPS))) for _ in range(MODELS)]
    chain = StackedChain(StackedBase(torch.zeros(MODELS, 2), torch.ones(MODELS, 2)), stack(models))
    objective = AVO(alphas=LearnedAlphas()).build(STEPS, (MODELS,))
    noise, (path,) = chain.noise(SAMPLES), objective.modules()
    (together,) = torch.autograd.grad(objective.values(chain, ENERGIES["D"], noise).mean(0).sum(), [path.logits])
    for m, model in enumerate(models):
        own = AVO(alphas=LearnedAlphas()).build(STEPS)
        values = own.values(Chain(DiagonalGaussian.isotropic(2), model), ENERGIES["D"], noise[:, :, m])
        torch.testing.assert_close(torch.autograd.grad(values.mean(), own.modules()[0].logits)[0], together[:, m])


def test_a_stack_without_kernels_draws_from_the_base():
    chain = StackedChain(StackedBase(torch.zeros(3, 2), torch.ones(3, 2)), stack([[]] * 3))
    drawn = chain.rsample(7)
    assert drawn.z.shape == (1, 7, 3, 2) and drawn.log_ratios.shape == (0, 7, 3) and drawn.log_q0.shape == (7, 3)
    assert chain.kernels.unstack() == [{}] * 3


def test_what_cannot_be_stacked_is_refused():
    for first, second in [(Gated(8), Gated(9)), (Gated(8), Residual(8)), (Gated(8), Planar(scale=1.0))]:
        with pytest.raises(ValueError, match=r"^models to be stacked must have the same kernels and shapes$"):
            stack([first.build(2, 1), second.build(2, 1)])
    for recipe in (Gated(8), Planar(scale=1.0)):
        with pytest.raises(ValueError, match=r"^models to be stacked must have kernels without a context$"):
            stack([recipe.build(2, 1, 3)] * 2)


# Compiled steps.


@pytest.fixture(scope="module")
def compiler():
    if not any(map(compiled.shutil.which, ("g++", "clang++", "c++", "cl"))):
        pytest.skip("there is no C++ compiler")


def small_stack():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    models = [jitter(nn.ModuleList(KERNELS["gated"].build(2, STEPS))) for _ in range(MODELS)]
    chain = StackedChain(StackedBase(torch.zeros(MODELS, 2), torch.ones(MODELS, 2)), stack(models))
    return chain, list(chain.parameters()), torch.randn(STEPS + 1, MODELS, 2, 64).permute(0, 3, 1, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_steps_have_the_values_and_gradients_of_eager_ones(recwarn):
    chain, parameters, noise = small_stack()
    calls = []

    def function(objective, noise):
        if not torch.compiler.is_compiling():
            calls.append(objective)
        return objective.values(chain, ENERGIES["D"], noise).mean(0)

    step = CompiledStep(function, parameters)
    for objective in (ELBO(), AVO(weight=0.4), AlphaELBO(alpha=0.3), AlphaELBO(alpha=0.6)):
        expected = function(objective, noise)
        expected_gradients = torch.autograd.grad(expected.sum(), parameters)
        values = step(objective, noise)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
        for found, wanted in zip(torch.autograd.grad(values.sum(), parameters), expected_gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert step.works and len(calls) == 4 + 3  # each type's first step was compared, and no other ran as it stands
    assert not [warning for warning in recwarn if "uncompiled" in str(warning.message)]
    assert any(compiled.keep_cache_apart().iterdir())  # torch takes the folder that it is told


def pretending(monkeypatch, compile):
    """A step whose compiled code is what `compile(function)` gives."""
    chain, parameters, noise = small_stack()
    monkeypatch.setattr(compiled.torch, "compile", lambda function, **_: compile(function))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name)
    seen = []

    def function(objective, noise):
        seen.append(objective)
        return objective.values(chain, ENERGIES["D"], noise).mean(0)

    return CompiledStep(function, parameters), parameters, noise, seen, function


def broken(right):
    raise RuntimeError("g++ is broken\nand much more")


@pytest.mark.parametrize(
    "spoiled, said",
    [
        (lambda right: right + 4.26, "its values and gradients are off by .*%"),
        (lambda right: right.detach() + 1.1 * (right - right.detach()), "its values and gradients are off by .*%"),
        (broken, r"torch.compile failed with g\+\+ is broken$"),
    ],
)
def test_compiled_code_that_is_wrong_or_fails_is_said_in_one_line_and_not_used(spoiled, said, monkeypatch):
    compile = lambda function: lambda *arguments: spoiled(function(*arguments))
    step, _, noise, _, function = pretending(monkeypatch, compile)
    with pytest.warns(UserWarning, match=f"^ELBO trains uncompiled: {said}"):
        values = step(ELBO(), noise)
    assert torch.equal(values, function(ELBO(), noise))


def test_a_step_that_is_not_finite_is_done_again_for_whoever_watches_and_once(monkeypatch):
    step, parameters, noise, seen, _ = pretending(monkeypatch, lambda function: function)
    step(ELBO(), noise)
    spoiled = noise.clone()
    spoiled[:, :, 1] = torch.nan
    for expected in (3, 1, 1):  # value and gradient are looked at; what is known to fail is not looked at again
        seen.clear()
        torch.autograd.grad(step(ELBO(), spoiled).sum(), parameters)
        assert len(seen) == expected


def test_compiling_takes_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^compile=True takes a C\+\+ compiler, .*: none was found$"):
        CompiledStep(lambda objective: torch.zeros(1), [])


def test_what_is_compiled_is_kept_apart_for_each_kind_of_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first = compiled.keep_cache_apart()
    assert first.parent == tmp_path and first == compiled.keep_cache_apart()  # as for a process of this one's
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(first)
    monkeypatch.setattr(compiled.torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert compiled.keep_cache_apart() != first
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert compiled.keep_cache_apart().name.startswith("another-")


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_processors_that_share_a_cache_compute_the_same(tmp_path):
    program = (
        Path(__file__).read_text(encoding="utf-8").partition("# The law.")[0]
        + """
torch.manual_seed(0)
models = [KERNELS["gated"].build(2, 2) for _ in range(2)]
chain = StackedChain(StackedBase(torch.zeros(2, 2), torch.ones(2, 2)), stack(models))
step = CompiledStep(lambda objective, noise: objective.values(chain, ENERGIES["D"], noise).mean(0), chain.parameters())
print(step(ELBO(), torch.randn(3, 16, 2, 2)).tolist(), step.works)
"""
    )
    answers = []
    for level in ("avx2", "default"):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": level}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-1000:]
        answers.append(eval(done.stdout.decode().replace(" True", ", True")))
    assert answers[0][1] and answers[1][1]
    torch.testing.assert_close(torch.tensor(answers[0][0]), torch.tensor(answers[1][0]), rtol=1e-4, atol=1e-4)
