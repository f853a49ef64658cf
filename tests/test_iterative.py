"""Iterative inference: what an iteration sees, what learns by which stage, and that the bound rises with each."""

import copy
import itertools

import pytest
import torch

from annealed_core.fit import maximise
from annealed_core.kernels import Gated
from annealed_core.objectives import AVO, ELBO
from annealed_core.running.experiment import run
from annealed_core.running.mnist import Mnist
from annealed_core.vae import Independent, IterativeVAE

FEW = {"train_images": 300, "epochs": 2, "width": 32, "latents": 4, "nll_images": 50, "nll_samples": 5}


def model(n=0, iterations=3, norm=False):
    torch.manual_seed(0)
    kernels = Gated(8, "identity").build(3, n, 16)
    return IterativeVAE(3, 16, kernels, Independent(norm=norm), iterations=iterations)


def images(n=6):
    return torch.bernoulli(torch.full((n, 784), 0.3), generator=torch.Generator().manual_seed(0))


def seeded():
    return torch.Generator().manual_seed(1)


def test_an_iteration_sees_the_gradient_of_the_whole_chains_bound():
    vae, x = model(2), images()
    lam, features = torch.randn(6, 6), torch.randn(6, 16)
    slope = vae._slope(lam, features, vae.joint(x).frozen(), seeded())
    lam.requires_grad_()
    chain = vae._chain(lam, features, seeded())
    (expected,) = torch.autograd.grad(ELBO()(chain, vae.joint(x)).sum(), lam)
    torch.testing.assert_close(slope, expected)
    assert len(chain) == 2 and not slope.requires_grad


def test_an_iteration_learns_nothing_through_what_it_is_given():
    vae, lam = model(), torch.randn(6, 6, requires_grad=True)
    found, features = vae.encoder(images(), lam, torch.randn(6, 6))
    assert torch.autograd.grad(found.sum() + features.sum(), lam, allow_unused=True) == (None,)


def test_the_first_iteration_starts_at_the_prior_and_a_closed_gate_stays_there():
    vae, x = model(), images()
    with torch.no_grad():
        vae.encoder.outputs.weight.zero_()
        vae.encoder.outputs.bias[6:] = 50.0  # the gate
    for chain in vae.stages(x):
        assert chain.base.loc.abs().max() < 1e-6 and (chain.base.scale - 1).abs().max() < 1e-6


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("objective", [ELBO(), AVO(), AVO(0.2)], ids=repr)
def test_encoder_and_kernels_learn_by_the_mean_over_stages_and_the_decoder_by_the_last(objective, norm):
    vae, x = model(2, norm=norm).train(), images()
    before = copy.deepcopy(vae.state_dict())
    value = vae.objective(objective, x, seeded()).mean()
    found = torch.autograd.grad(value, list(vae.parameters()), allow_unused=True)
    named = dict(zip([name for name, _ in vae.named_parameters()], found, strict=True))
    vae.load_state_dict(before)  # statistics of batches have moved
    generator = seeded()
    chains = vae.stages(x, generator)
    frozen = vae.joint(x).frozen()
    mean = torch.stack([objective(chain, frozen, ()) for chain in chains]).mean(0).mean()
    last = objective(chains[-1].detach(), vae.joint(x), ()).mean()
    torch.testing.assert_close(value, mean)
    for name, parameter in vae.named_parameters():
        by = last if name.startswith("decoder") else mean
        (expected,) = torch.autograd.grad(by, parameter, retain_graph=True)
        torch.testing.assert_close(named[name], expected)


def test_the_bound_rises_over_the_iterations_and_then_stays():
    vae, generator = model(iterations=5), seeded()
    with torch.no_grad():
        for name, weight in vae.decoder.named_parameters():
            weight.mul_(5 if "weight" in name else 1)  # so that z matters
        x = torch.bernoulli(vae.decode(torch.randn(400, 3)), generator=generator)
    weights, noise = list(vae.encoder.parameters()), torch.randn(1, 50, 400, 3)
    maximise(lambda step: vae.objective(ELBO(), x, generator).mean(), weights, 250, lr=3e-3, lr_schedule="cosine")
    with torch.no_grad():
        vae.eval()
        bounds = [float(ELBO()(chain, vae.joint(x), noise=noise).mean()) for chain in vae.stages(x, generator)]
    assert bounds[1] > bounds[0] + 1 and bounds[-1] > bounds[0] + 1, bounds
    assert all(after > before - 0.3 for before, after in itertools.pairwise(bounds)), bounds


def test_a_frozen_decoder_keeps_its_statistics_while_the_base_is_refined():
    vae = model(norm=True).train()
    vae.stages(images())
    assert int(vae.decoder.features[1].num_batches_tracked) == 0


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:schedule")
@pytest.mark.parametrize("fields", [{}, {"kernel": Gated(8, "identity"), "n_transitions": 2, "objective": AVO(0.2)}])
def test_it_is_trained_judged_and_found_again(store, fields):
    spec = Mnist(iterations=3, **FEW, **fields)
    found = run(spec)
    assert isinstance(found.vae, IterativeVAE) and found.vae.iterations == 3
    assert found.metrics["nll"] < -found.metrics["elbo"]
    assert run(spec).metrics == found.metrics


def test_what_has_no_encoders_base_is_not_refined():
    with pytest.raises(ValueError, match="impossible iterations 2 of Mnist: what is refined is an encoder's base"):
        Mnist(iterations=2, base="prior", kernel=Gated())
    with pytest.raises(ValueError, match="impossible iterations 0: at least 1"):
        IterativeVAE(2, 4, iterations=0)
