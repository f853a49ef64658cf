"""Trajectory balance: the spread of log-weights as an objective, on policy the ELBO's, off policy still right."""

import pytest
import torch

from annealed_core.chain import Chain
from annealed_core.evidence import log_mean_weight
from annealed_core.fit import fit
from annealed_core.kernels import DiagonalGaussian, Gated, Residual
from annealed_core.nested import TrajectoryBalance, explored, path_log_weight
from annealed_core.objectives import ELBO
from annealed_core.running.density import Density
from annealed_core.running.experiment import run
from annealed_core.targets import ENERGIES

D = ENERGIES["D"]


def chain(kernel=Gated, n=3):
    torch.manual_seed(0)
    base = DiagonalGaussian(torch.zeros(2).double(), torch.full((2,), 2.0).double())
    return Chain(base, torch.nn.ModuleList(kernel(8).build(2, n)).double())


def gradient(value, found):
    """By the weights of the forward kernels."""
    weights = [each for pair in found.kernels for each in pair.forwards.parameters()]
    return torch.cat([each.flatten() for each in torch.autograd.grad(value, weights)])


@pytest.mark.parametrize("kernel", [Gated, Residual])
def test_the_weight_of_a_path_is_that_of_the_chain_that_drew_it(kernel):
    found = chain(kernel)
    noise = found.noise(50)
    drawn = found.rsample(noise=noise)
    torch.testing.assert_close(explored(found, noise, 0.0), drawn.z)
    torch.testing.assert_close(path_log_weight(found, D, drawn.z), found.log_weight(D, drawn))


def test_on_policy_its_gradient_is_the_elbos_in_expectation():
    found = chain(n=1)
    noise = found.noise(200_000)
    balance = gradient(TrajectoryBalance()(found, D, noise=noise).mean(), found)
    elbo = gradient(ELBO()(found, D, noise=noise).mean(), found)
    assert torch.cosine_similarity(balance, elbo, 0) > 0.99 and 0.95 < balance.norm() / elbo.norm() < 1.05


def test_paths_drawn_with_more_noise_reach_further_and_their_spread_is_still_zero_where_the_chain_is_exact():
    found = chain()
    noise = found.noise(4000)
    assert explored(found, noise, 2.0)[-1].std() > 1.3 * explored(found, noise, 0.0)[-1].std()

    class Exact:  # the target is what the chain without kernels draws, and its "kernels" are reversals of each other
        dim = 2
        log_prob = staticmethod(found.base.log_prob)

    alone = Chain(found.base, [])
    assert TrajectoryBalance(exploration=1.0)(alone, Exact(), 50).abs().max() < 1e-12


def test_it_trains_with_noise_that_decays(store):
    found = chain()
    with torch.no_grad():
        before = float(found.log_weight(D, found.rsample(4000)).std())
    objective = TrajectoryBalance(exploration=lambda step: max(0.0, 0.5 - step / 200))
    fit(found, D, objective, steps=300, batch=128, lr=3e-3)
    with torch.no_grad():
        log_weights = found.log_weight(D, found.rsample(20_000))
    estimate, error = log_mean_weight(log_weights)
    assert float(log_weights.std()) < 0.7 * before and abs(float(estimate)) < 5 * float(error) + 0.02
    with pytest.raises(TypeError, match="by its exploration: call"):
        objective(found, D, 4)
    spec = Density(target="D", objective=TrajectoryBalance(0.1), n_transitions=2, steps=10, batch=16, samples=500)
    assert spec.stack_key() is None and run(spec).metrics["kernels_earn_se"] > 0
