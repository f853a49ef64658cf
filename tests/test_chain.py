"""Chains: exact proposals, the hierarchical bound and its gap, unbiased evidence, annealed importance sampling."""

import math

import pytest
import torch

from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair, Metropolis, ResidualGaussianPair, normal_log_prob
from annealed_core.targets import ENERGIES, Energy, GeometricPath, linear_alphas

LOG_Z = {"A": 1.8775, "B": 3.8146, "C": 3.4502, "D": 0.0, "E": 1.7263, "F": 2.6324}


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def full(value, dim=2):
    return torch.full((dim,), float(value), dtype=torch.float64)


def gaussian(variance, dim=2):
    return DiagonalGaussian(full(0, dim), full(variance**0.5, dim))


class LinearGaussian:
    """q(z' | z) = N(slope z, variance); r(z | z') exact reverse for z ~ N(0, before), its variance times `wrong`."""

    def __init__(self, slope, variance, before, wrong=1.0):
        self.slope, self.variance, self.after = slope, variance, slope**2 * before + variance
        self.gain = slope * before / self.after
        self.exact_reverse_variance = before * variance / self.after
        self.reverse_variance = wrong * self.exact_reverse_variance

    def __call__(self, z, context=None, noise=None):
        z_next = self.slope * z + self.variance**0.5 * noise
        log_q = normal_log_prob(z_next, self.slope * z, torch.full_like(z, self.variance**0.5))
        log_r = normal_log_prob(z, self.gain * z_next, torch.full_like(z, self.reverse_variance**0.5))
        return z_next, log_r - log_q


def linear_chain(n_transitions, wrong=1.0):
    """The chain, and the target 3 N(0, variance of z_T), for which it is exact where `wrong` is 1."""
    variance, kernels = 1.7, []
    for step in range(n_transitions):
        kernels.append(LinearGaussian(0.8 - 0.3 * step, 0.5 + 0.2 * step, variance, wrong))
        variance = kernels[-1].after
    end = gaussian(variance)
    return Chain(gaussian(1.7), kernels), Energy("end", lambda z: end.log_prob(z) + math.log(3))


def random_chain(n_transitions=3, scale=3.0, seed=0):
    torch.manual_seed(seed)
    kernels = torch.nn.ModuleList(GatedGaussianPair(2, 8) for _ in range(n_transitions)).double()
    return Chain(gaussian(scale**2), kernels)


@pytest.mark.parametrize("n_transitions", [0, 1, 3])
def test_an_exact_proposal_gives_equal_weights(n_transitions):
    chain, target = linear_chain(n_transitions)
    log_weight = chain.log_weight(target, chain.rsample(500))
    torch.testing.assert_close(log_weight, torch.full_like(log_weight, math.log(3)), atol=1e-12, rtol=0)
    assert evidence.effective_sample_size(log_weight) == pytest.approx(1, abs=1e-12)


def test_an_inexact_reverse_gives_unequal_weights():
    chain, target = linear_chain(1, wrong=1.5)
    assert evidence.effective_sample_size(chain.log_weight(target, chain.rsample(500))) < 0.99


@pytest.mark.parametrize("wrong", [0.6, 1.5])
@pytest.mark.parametrize("n_transitions", [1, 3])
def test_the_gap_of_the_hierarchical_bound_is_the_kl_of_the_reverse_kernels(n_transitions, wrong):
    torch.manual_seed(0)
    chain, target = linear_chain(n_transitions, wrong)
    log_weight = chain.log_weight(target, chain.rsample(20_000))
    gap = n_transitions * 2 * 0.5 * (math.log(wrong) + 1 / wrong - 1)  # both dimensions of every transition
    assert abs(math.log(3) - float(log_weight.mean()) - gap) < 5 * float(log_weight.std()) / 20_000**0.5


@pytest.mark.parametrize("name", LOG_Z)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_hierarchical_bound_is_no_greater_than_log_z(name, seed):
    chain = random_chain(seed=seed, scale=1.5)
    with torch.no_grad():
        log_weight = chain.log_weight(ENERGIES[name], chain.rsample(4000))
    assert log_weight.isfinite().all()
    assert log_weight.mean() - 5 * log_weight.std() / 4000**0.5 <= LOG_Z[name]


CHAINS = {
    "base alone": lambda: Chain(gaussian(9)),
    "inexact reverse": lambda: Chain(gaussian(9), [LinearGaussian(0.9, 2, 9, 0.7), LinearGaussian(-0.8, 3, 9.29, 0.7)]),
    "gated": lambda: wandering_chain(),
}


def wandering_chain():
    """Gated kernels that stay near z with a standard deviation of 0.7, and a reverse that is a little too sure."""
    chain = random_chain(2)
    for kernel in chain.kernels:
        for gaussian_, spread in ((kernel.forwards, 0.0), (kernel.reverse, -0.1)):
            with torch.no_grad():
                gaussian_.outputs.weight.mul_(0.2)
                gaussian_.outputs.bias[2:4] = -3
                gaussian_.outputs.bias[4:] = spread
    return chain


@pytest.mark.parametrize("name", LOG_Z)
@pytest.mark.parametrize("kind", CHAINS)
def test_the_mean_weight_of_a_wide_chain_is_the_normalizer(name, kind):
    torch.manual_seed(0)
    chain = CHAINS[kind]()
    torch.manual_seed(1)
    with torch.no_grad():
        log_weight = chain.log_weight(ENERGIES[name], chain.rsample(100_000))
    estimate, error = evidence.log_mean_weight(log_weight)
    assert error < 0.03
    assert abs(estimate - LOG_Z[name]) < 5 * error + 1e-4


@pytest.mark.parametrize("n_transitions", [0, 3])
@pytest.mark.parametrize("sample_shape", [(), 5, (5,), (4, 5)])
@pytest.mark.parametrize("batch", [(), (6,)])
def test_shapes_of_a_trajectory(n_transitions, sample_shape, batch):
    base = DiagonalGaussian(draw(*batch, 2), draw(*batch, 2).exp())
    chain = Chain(
        base, torch.nn.ModuleList(GatedGaussianPair(2, 8, 3) for _ in range(n_transitions)).double(), draw(*batch, 3)
    )
    trajectory = chain.rsample(sample_shape)
    shape = ((sample_shape,) if isinstance(sample_shape, int) else sample_shape) + batch
    assert len(chain) == n_transitions and len(trajectory.z) == n_transitions + 1
    assert all(z.shape == (*shape, 2) for z in trajectory.z)
    assert trajectory.log_q0.shape == shape and trajectory.log_ratios.shape == (n_transitions, *shape)
    assert chain.log_weight(ENERGIES["A"], trajectory).shape == shape
    assert chain.noise(sample_shape).shape == (n_transitions + 1, *shape, 2)
    assert chain.noise(sample_shape).dtype == torch.float64


def test_the_same_noise_gives_the_same_trajectory():
    chain = random_chain()
    noise = chain.noise(20)
    first, second = chain.rsample(20, noise), chain.rsample(20, noise)
    assert all(torch.equal(a, b) for a, b in zip(first.z, second.z, strict=True))
    assert torch.equal(first.log_ratios, second.log_ratios) and torch.equal(first.log_q0, second.log_q0)
    assert not torch.equal(first.z[0], chain.rsample(20).z[0])


def test_gradients_flow_through_the_whole_trajectory():
    chain = random_chain()
    loc = full(0).requires_grad_()
    chain = Chain(DiagonalGaussian(loc, full(1)), chain.kernels)
    chain.rsample(10).z[-1].sum().backward()
    assert loc.grad.all()
    assert all(p.grad.any() for kernel in chain.kernels for p in kernel.forwards.outputs.parameters())


def test_a_detached_chain_keeps_values_and_kernels_but_not_what_made_its_base_and_context():
    loc, context = draw(6, 2).requires_grad_(), draw(6, 3).requires_grad_()
    kernels = torch.nn.ModuleList([GatedGaussianPair(2, 8, 3)]).double()
    chain = Chain(DiagonalGaussian(loc, torch.ones(6, 2, dtype=torch.float64)), kernels, context)
    noise = chain.noise()
    assert torch.equal(chain.detach().rsample(noise=noise).z[-1], chain.rsample(noise=noise).z[-1])
    wanted = [loc, context, *kernels.parameters()]
    gradients = torch.autograd.grad(chain.detach().rsample(noise=noise).log_ratios.sum(), wanted, allow_unused=True)
    assert gradients[0] is None and gradients[1] is None and all(g is not None and g.any() for g in gradients[2:])


def conditional_chain(kind, requires_grad=True):
    torch.manual_seed(0)
    kernels = torch.nn.ModuleList(kind(3, 8, 5, True) for _ in range(4)).double()
    for parameter in kernels.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    loc, context = draw(6, 3).requires_grad_(requires_grad), draw(6, 5).requires_grad_(requires_grad)
    return Chain(DiagonalGaussian(loc, torch.ones_like(loc)), kernels, context)


@pytest.mark.parametrize("kind", [GatedGaussianPair, ResidualGaussianPair])
@pytest.mark.parametrize("sample_shape", [(), (7,), (2, 7)])
@pytest.mark.parametrize("used", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.8, 0.2)])
def test_two_trajectories_of_one_noise_are_the_whole_and_the_local_one(kind, sample_shape, used):
    chain = conditional_chain(kind)
    noise, found = chain.noise(sample_shape), []
    inputs = [chain.base.loc, chain.context, *chain.kernels.parameters()]
    apart = chain.rsample(noise=noise), chain.detach().rsample(noise=noise, local=True)
    for both in (chain.rsample_twice(noise), apart):
        parts = [(each.z.square().sum(-1)[1:] + each.log_ratios).cos().sum() + each.log_q0.sum() for each in both]
        value = sum(weight * part for weight, part in zip(used, parts, strict=True))
        states = [(each.z, each.log_ratios, each.log_q0) for each in both]
        found.append((states, torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(found[0], found[1])


def test_two_trajectories_under_a_transform_of_torch_func():
    chain = conditional_chain(GatedGaussianPair, requires_grad=False)
    noise = chain.noise()

    def value(context):
        whole, local = Chain(chain.base, chain.kernels, context).rsample_twice(noise)
        return whole.log_ratios.square().sum() + local.log_ratios.sum()

    context = chain.context.clone().requires_grad_()
    expected = torch.autograd.grad(value(context), context)[0]
    torch.testing.assert_close(torch.func.grad(value)(chain.context), expected)


def test_two_trajectories_without_a_context_or_a_gradient():
    for chain in (random_chain(), conditional_chain(GatedGaussianPair)):
        noise = chain.noise(4)
        with torch.no_grad():
            whole, local = chain.rsample_twice(noise)
        torch.testing.assert_close(local.log_ratios, whole.log_ratios)
        torch.testing.assert_close(whole.z, chain.rsample(noise=noise).z.detach())


def test_two_trajectories_without_a_context_have_the_gradients_of_two_draws():
    chain = random_chain()
    noise, parameters = chain.noise(4), [p for kernel in chain.kernels for p in kernel.parameters()]
    apart = chain.rsample(noise=noise), chain.detach().rsample(noise=noise, local=True)
    for found, expected in zip(chain.rsample_twice(noise), apart, strict=True):
        gradients = [
            torch.autograd.grad(each.log_ratios.sum() + each.z.square().sum(), parameters, retain_graph=True)
            for each in (found, expected)
        ]
        torch.testing.assert_close(*gradients)
        assert any(gradient.any() for gradient in gradients[0])


def metropolis_chain(name, n_transitions=24, n_moves=2):
    base = gaussian(9.0)
    path = GeometricPath(base, ENERGIES[name], linear_alphas(n_transitions))
    return path, Chain(base, [Metropolis(path[t], 0.7, n_moves) for t in range(1, n_transitions + 1)])


@pytest.mark.parametrize("name", ["A", "D"])
def test_a_metropolis_chain_has_the_weight_of_annealed_importance_sampling(name):
    torch.manual_seed(0)
    path, chain = metropolis_chain(name)
    trajectory = chain.rsample(200)
    z = trajectory.z
    textbook = sum(path[t].log_prob(z[t - 1]) - path[t - 1].log_prob(z[t - 1]) for t in range(1, len(path)))
    torch.testing.assert_close(chain.log_weight(ENERGIES[name], trajectory), textbook, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["A", "D"])
def test_annealed_importance_sampling_estimates_log_z(name):
    torch.manual_seed(0)
    _, chain = metropolis_chain(name)
    log_weight = chain.log_weight(ENERGIES[name], chain.rsample(4000))
    estimate, error = evidence.log_mean_weight(log_weight)
    assert error < 0.03 and abs(estimate - LOG_Z[name]) < 5 * error
    base_alone = Chain(chain.base)
    importance = base_alone.log_weight(ENERGIES[name], base_alone.rsample(4000))
    assert evidence.effective_sample_size(log_weight) > 2 * evidence.effective_sample_size(importance)


def test_annealing_with_one_temperature_is_importance_sampling():
    torch.manual_seed(0)
    _, chain = metropolis_chain("D", n_transitions=1)
    trajectory = chain.rsample(100)
    plain = ENERGIES["D"].log_prob(trajectory.z[0]) - trajectory.log_q0
    torch.testing.assert_close(chain.log_weight(ENERGIES["D"], trajectory), plain, atol=1e-9, rtol=0)
