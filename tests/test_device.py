"""Other devices: what is made for a run is made there, generators, stacks and noise included."""

import pytest
import torch
from torch import nn

from annealed_core import AVO, ELBO, IAF, Density, Gated, LearnedAlphas, Mnist, run, sweep
from annealed_core.running.density import DensityProblem
from annealed_core.running.experiment import device_of
from annealed_core.running.mnist import MnistProblem

SMALL = Density(kernel=Gated(hidden=8), n_transitions=2, objective=AVO(), steps=20, batch=8, samples=100)
KERNELS = [Gated(hidden=8), IAF(hidden=8)]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def devices(module):
    return {str(each.device) for each in [*module.parameters(), *module.buffers()]}


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("objective", [ELBO(), AVO(), AVO(alphas=LearnedAlphas())], ids=repr)
def test_a_stack_and_its_noise_are_on_the_device_and_the_noise_is_drawn_as_elsewhere(kernel, objective, monkeypatch):
    """On `meta`, where tensors have a device and no numbers: what is made elsewhere would be refused beside them."""
    monkeypatch.setattr("annealed_core.running.density.check_target", lambda *_: None)  # it looks at numbers
    monkeypatch.setattr("annealed_core.running.watch.Watched._watch", lambda *_: None)
    specs = [SMALL.replace(kernel=kernel, objective=objective, seed=seed) for seed in (0, 1)]
    problem = DensityProblem(specs, "meta")
    assert devices(problem.module) == {"meta"}
    values = problem.values(0)
    assert values.device.type == "meta" and values.shape == (2,)
    gradients = torch.autograd.grad(values.sum(), problem.parameters(), allow_unused=True)
    assert {str(each.device) for each in gradients if each is not None} == {"meta"}
    here = DensityProblem(specs)
    here.values(0)
    for ours, theirs in zip(problem.generators, here.generators, strict=True):
        assert torch.equal(ours.get_state(), theirs.get_state()), "another device would draw other noise"


def test_an_auto_encoder_and_its_step_are_on_the_device(few, monkeypatch):
    spec = Mnist(kernel=Gated(hidden=8), n_transitions=2, train_images=200, epochs=1, width=16, latents=4)
    problem = MnistProblem(spec, "meta")
    assert devices(problem.module) == {"meta"} and isinstance(problem.module, nn.Module)


def test_the_device_is_what_is_given_else_the_environments_else_the_cpu(monkeypatch):
    assert device_of(None) == "cpu" and device_of("cuda:1") == "cuda:1" and device_of(torch.device("cpu")) == "cpu"
    monkeypatch.setenv("ANNEALED_DEVICE", "cuda")
    assert device_of(None) == "cuda" and device_of("cpu") == "cpu"


@pytest.mark.parametrize("count", [0, 2])
def test_a_gpu_that_is_not_there_is_refused_in_one_line_where_it_would_be_used(store, monkeypatch, count):
    monkeypatch.delenv("ANNEALED_CLUSTER", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    there = "choose from cpu, cuda:0, cuda:1" if count else "choose from cpu"
    for device in ["cuda:7"] + ["cuda"] * (count == 0):
        for call in (lambda device: run(SMALL, device=device), lambda device: sweep([SMALL], device=device)):
            with pytest.raises(
                ValueError, match=f"^device '{device}' is not there: {there}, which torch finds on this"
            ):
                call(device)
    assert device_of("cuda:7") == "cuda:7", "another machine may have it"


@cuda
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_run_on_a_gpu_is_that_of_the_cpu_but_for_rounding(store, kernel):
    spec = SMALL.replace(kernel=kernel, steps=200, samples=5000)
    there, here = run(spec, device="cuda"), run(spec)
    assert there.history[0]["elbo"] == pytest.approx(here.history[0]["elbo"], abs=1e-3)
    assert there.metrics["log_z"] == pytest.approx(here.metrics["log_z"], abs=0.1)
    assert next(there.model.parameters()).is_cuda and there.chain.rsample(3).z.is_cuda


@cuda
def test_mnist_trains_on_a_gpu(store, few):
    spec = Mnist(kernel=Gated(hidden=8), n_transitions=2, train_images=200, epochs=1, width=16, latents=4)
    spec = spec.replace(nll_images=50, nll_samples=5)
    assert run(spec, device="cuda").metrics["elbo"] == pytest.approx(run(spec).metrics["elbo"], abs=0.5)
