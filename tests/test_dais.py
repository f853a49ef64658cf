"""Differentiable annealed importance sampling: weights of AIS, trained numbers, and what learns through the moves."""

import math

import pytest
import torch

from annealed_core.chain import Chain
from annealed_core.dais import AnnealedChain, Drift, Leapfrog, LeapfrogStep, TargetChain, chain_of
from annealed_core.description import from_json, to_json
from annealed_core.evidence import log_mean_weight
from annealed_core.fit import fit
from annealed_core.kernels import DiagonalGaussian
from annealed_core.nested import TrajectoryBalance, path_log_weight
from annealed_core.objectives import AVO, ELBO, IWAE
from annealed_core.running.density import Density
from annealed_core.running.experiment import run
from annealed_core.running.mnist import Mnist
from annealed_core.vae import VAE, Independent


class Gaussian:
    """3 * N((1, -2), diag(0.5, 2))."""

    dim, log_normalizer = 2, math.log(3)

    def log_prob(self, z):
        loc, variance = z.new_tensor([1.0, -2.0]), z.new_tensor([0.5, 2.0])
        squares = (z - loc).square() / variance + variance.log() + math.log(2 * math.pi)
        return math.log(3) - 0.5 * squares.sum(-1)


def chain(n=5, step=0.4, target=None, persistence=0.7):
    torch.manual_seed(0)
    kernels = [kernel.double() for kernel in Leapfrog(step, persistence).build(2, n)]
    base = DiagonalGaussian(torch.zeros(2).double(), torch.ones(2).double())
    return AnnealedChain(base, kernels, target=target or Gaussian())


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("persistence", [0.01, 0.9])
def test_the_mean_weight_is_the_normaliser(n, persistence):
    found = chain(n, 0.3, persistence=persistence)
    with torch.no_grad():
        estimate, error = log_mean_weight(found.log_weight(found.target, found.rsample(40_000)))
    assert abs(estimate - math.log(3)) < 4 * error < 0.5


def test_small_steps_on_a_path_that_stands_still_have_equal_weights():
    target = DiagonalGaussian(torch.zeros(2).double(), torch.ones(2).double())
    spreads = []
    for step in (0.4, 0.2, 0.1):
        found = chain(8, step, target)
        spreads.append(float(found.log_weight(target, found.rsample(2000)).detach().std()))
    assert spreads[2] < 0.005 and spreads[0] / spreads[2] > 8  # the error of a step is of second order


def test_a_step_goes_back_with_its_momentum_turned_and_keeps_volume():
    found, noise = chain(1), torch.randn(2, 2).double()

    def step(z, v):
        alpha, size = found.exponents()[0], found.kernels[0].unbounded.exp()
        middle = z + 0.5 * size * v
        v = v + size * found.slope(middle, alpha)
        return middle + 0.5 * size * v, v

    z, v = step(*noise)
    torch.testing.assert_close(found.rsample(noise=noise).z[1], z)
    back, turned = step(z, -v)
    torch.testing.assert_close(torch.stack([back, -turned]), noise)
    jacobian = torch.autograd.functional.jacobian(lambda both: torch.stack(step(*both)).flatten(), noise).view(4, 4)
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1)


def test_the_gradient_of_the_bound_reaches_every_number_and_is_right():
    found, noise = chain(3), torch.randn(4, 50, 2).double()
    numbers = list(found.parameters())
    assert len(numbers) == 3 * 2 + 2

    def bound():
        return ELBO()(found, found.target, noise=noise).mean()

    for number, gradient in zip(numbers, torch.autograd.grad(bound(), numbers), strict=True):
        flat = number.data.view(-1)
        flat[0] += 1e-5
        up = float(bound())
        flat[0] -= 2e-5
        down = float(bound())
        flat[0] += 1e-5
        assert float(gradient.flatten()[0]) == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-6)


def test_training_raises_the_bound_and_exponents_rise():
    found = chain(6, step=0.1)
    before = float(ELBO()(found, found.target, noise=torch.randn(7, 2000, 2).double()).mean())
    fit(found, found.target, ELBO(), steps=150, batch=64, lr=3e-2)
    after = float(ELBO()(found, found.target, noise=torch.randn(7, 2000, 2).double()).mean())
    alphas = found.exponents()
    assert after > before + 0.5 and (alphas.diff() > 0).all() and alphas[0] > 0 and alphas[-1] < 1
    assert after < math.log(3) + 0.05


@pytest.mark.parametrize("objective", [AVO(), AVO(0.2), IWAE(4)], ids=repr)
def test_other_objectives_train_it_too(objective):
    found = chain(3)
    assert fit(found, found.target, objective, steps=5, batch=16).history[-1]["step"] == 5


def test_a_chain_that_is_frozen_detached_or_sliced_stays_one():
    found = chain(2)
    drawn = found.freeze().rsample(3)
    gradients = torch.autograd.grad(drawn.log_ratios.sum(), list(found.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)
    cut = found.freeze().detach()
    assert isinstance(cut, AnnealedChain) and not cut.rsample(3).log_ratios.requires_grad
    base = DiagonalGaussian(torch.zeros(4, 2).double(), torch.ones(4, 2).double())
    part = found.replace(base=base)[1:3]
    assert isinstance(part, AnnealedChain) and part.rsample(5).z.shape == (3, 5, 2, 2)
    assert type(chain_of(base, [])) is Chain
    with pytest.raises(TypeError, match="a LeapfrogStep can't be called by itself"):
        found.kernels[0](torch.zeros(2))
    with torch.no_grad():
        assert not found.rsample(3).z.requires_grad


def test_its_description_checks_itself_and_comes_back_from_json():
    assert from_json(to_json(Leapfrog(0.2, 0.5))) == Leapfrog(0.2, 0.5)
    for persistence in (0.0, 1.0):
        with pytest.raises(ValueError, match="impossible persistence"):
            Leapfrog(persistence=persistence)


def test_a_step_starts_where_it_is_said_to_and_stays_below_its_bound():
    (kernel,) = Leapfrog(0.1, largest=0.25).build(2, 1)
    torch.testing.assert_close(kernel.step(), torch.full((2,), 0.1))
    with torch.no_grad():
        kernel.unbounded += 100.0
    torch.testing.assert_close(kernel.step(), torch.full((2,), 0.25))
    with pytest.raises(ValueError, match=r"impossible largest .* it takes more than its step"):
        Leapfrog(0.1, largest=0.1)


def test_a_density_is_fitted_judged_and_found_again(store):
    spec = Density(target="D", kernel=Leapfrog(0.3), n_transitions=4, steps=30, batch=32, samples=2000, lr=1e-2)
    assert spec.stack_key() is None
    found = run(spec)
    assert isinstance(found.chain, AnnealedChain) and found.metrics["kernels_earn"] > 0.5
    again = run(spec)
    assert torch.equal(found.chain.kernels[2].unbounded, again.chain.kernels[2].unbounded)
    assert found.chain.kernels[0].shared is found.chain.kernels[3].shared


@pytest.mark.parametrize("norm", [True, False])
def test_a_decoder_learns_through_the_moves_where_it_has_no_batch_normalisation(norm):
    torch.manual_seed(0)
    vae = VAE(3, 16, Leapfrog(0.1).build(3, 2), Independent(norm=norm))
    x, noise = torch.bernoulli(torch.full((6, 784), 0.3)), torch.randn(3, 6, 3)
    assert all(isinstance(kernel, LeapfrogStep) for kernel in vae.kernels)
    moved = vae.posterior(x).rsample(noise=noise).z[-1]
    weight = vae.decoder.features[0].weight
    (gradient,) = torch.autograd.grad(moved.sum(), weight, allow_unused=True)
    assert (gradient is None) == norm
    if norm:
        assert int(vae.decoder.features[1].num_batches_tracked) == 0  # it has not met the states on the way
    objective = AVO()
    values = objective(vae.posterior(x), vae.joint(x), noise=noise)
    assert all(torch.isfinite(each).all() for each in torch.autograd.grad(values.mean(), [weight, vae.kernels[0].gain]))


@pytest.mark.usefixtures("few")
def test_an_auto_encoder_trains_with_kernels_that_see_the_target(store):
    few = {"train_images": 300, "epochs": 2, "width": 32, "latents": 4, "nll_images": 50, "nll_samples": 5}
    spec = Mnist(kernel=Leapfrog(0.05), n_transitions=3, decoder=Independent(norm=False), objective=ELBO(), **few)
    found = run(spec)
    assert found.metrics["kernels_earn_se"] > 0 and found.metrics["nll"] < -found.metrics["elbo"]
    assert run(spec).metrics == found.metrics


# ---- a trained drift


def drifting(n=4, step=0.1, hidden=8, target=None, shake=0.2):
    torch.manual_seed(0)
    kernels = list(torch.nn.ModuleList(Drift(step, hidden).build(2, n)).double())
    with torch.no_grad():
        for parameter in torch.nn.ModuleList(kernels).parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    base = DiagonalGaussian(torch.zeros(2).double(), torch.ones(2).double())
    return TargetChain(base, kernels, target=target or Gaussian())


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm1d(16), torch.nn.BatchNorm2d(4)], ids=["flat", "of maps"])
def test_no_batch_normalisation_of_a_decoder_meets_states_on_the_way(norm):
    class Own:
        def build(self, latents, width):
            return _Own(norm)

    vae = VAE(3, 8, Leapfrog(0.1).build(3, 4), Own()).train()
    vae.posterior(torch.bernoulli(torch.full((5, 784), 0.3))).rsample()
    assert int(norm.num_batches_tracked) == 0


class _Own(torch.nn.Module):
    """A decoder that normalises, as rows or as maps of features."""

    def __init__(self, norm):
        super().__init__()
        self.into, self.norm, self.out = torch.nn.Linear(3, 16), norm, torch.nn.Linear(16, 784)

    def forward(self, z, x):
        maps = self.into(z.reshape(-1, 3))
        maps = maps.unflatten(-1, (4, 2, 2)) if isinstance(self.norm, torch.nn.BatchNorm2d) else maps
        return self.out(self.norm(maps).flatten(1)).view(*z.shape[:-1], 784)


@pytest.mark.parametrize("hidden", [0, 8])
def test_with_any_drift_the_mean_weight_is_the_normaliser(hidden):
    found = drifting(8, 0.2, hidden, shake=0.1)
    with torch.no_grad():
        estimate, error = log_mean_weight(found.log_weight(found.target, found.rsample(40_000)))
    assert abs(estimate - math.log(3)) < 4 * error < 0.5


def test_a_drift_that_the_reverse_kernel_takes_back_costs_nothing():
    # q_t follows the slope and the drift, r_t the slope less the drift: together that of a time-reversal.
    found, z = drifting(n=1), torch.randn(5, 2).double()
    kernel = found.kernels[0]
    (ahead, scale), (back, same) = kernel.forwards(z, found), kernel.reverse(z, found)
    step, alpha = kernel.log_step.exp(), kernel.path()[1]
    torch.testing.assert_close(0.5 * (ahead + back), z + step * found.slope(z, alpha))
    torch.testing.assert_close(0.5 * (ahead - back), step * kernel.network(z))
    assert torch.equal(scale, same) and alpha == 1 and torch.equal(scale[0], (2 * step).sqrt())
    spreads = []
    for size in (0.4, 0.2, 0.1):  # on a path that stands still, without a drift: Langevin's dynamics is reversible
        still = DiagonalGaussian(torch.zeros(2).double(), torch.ones(2).double())
        found = drifting(6, size, 0, still, shake=0.0)
        spreads.append(float(found.log_weight(still, found.rsample(4000)).detach().std()))
    assert spreads[0] / spreads[2] > 4 and spreads[2] < 0.1


def test_the_log_variance_of_its_paths_is_an_objective():
    found = drifting()
    noise = found.noise(50)
    drawn = found.rsample(noise=noise)
    torch.testing.assert_close(path_log_weight(found, found.target, drawn.z), found.log_weight(found.target, drawn))


@pytest.mark.parametrize("objective", [ELBO(), TrajectoryBalance(), TrajectoryBalance(0.1), AVO()], ids=repr)
def test_a_drift_is_trained_by_the_bound_or_the_log_variance(objective):
    found = drifting(shake=0.0, step=0.05)
    noise = torch.randn(5, 4000, 2).double()
    spread = lambda: float(found.log_weight(found.target, found.rsample(noise=noise)).detach().std())
    before = spread()
    fit(found, found.target, objective, steps=60, batch=32, lr=4e-2)
    assert spread() < 0.8 * before


def test_a_drift_is_fitted_to_a_density_and_in_an_auto_encoder(store):
    spec = Density(target="D", kernel=Drift(0.05, 8), n_transitions=3, steps=20, batch=32, samples=500)
    assert spec.stack_key() is None and from_json(to_json(spec)) == spec
    found = run(spec)
    assert isinstance(found.chain, TargetChain) and run(spec).metrics == found.metrics
    assert found.chain.kernels[0].path is found.chain.kernels[2].path
    torch.manual_seed(0)
    vae = VAE(3, 16, Drift(0.01, 4).build(3, 2), Independent(norm=False))
    x, noise = torch.bernoulli(torch.full((6, 784), 0.3)), torch.randn(3, 6, 3)
    values = AVO()(vae.posterior(x), vae.joint(x), noise=noise)
    weights = [vae.decoder.features[0].weight, vae.kernels[0].log_step, vae.kernels[1].network[2].weight]
    assert all(torch.isfinite(each).all() for each in torch.autograd.grad(values.mean(), weights))
    assert vae.posterior(x)[1:3].rsample(2).z.shape == (3, 2, 2, 3)
