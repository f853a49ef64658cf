"""Chains: the hierarchical bound and its gap, unbiased evidence, and what reaches whom."""

import math

import pytest
import torch
from draws import draw, generator
from torch import nn

from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, Gated, GatedGaussianPair, Residual, normal_log_prob
from annealed_core.targets import ENERGIES, Energy

LOG_Z = {"A": 1.8775, "B": 3.8146, "C": 3.4502, "D": 0.0, "E": 1.7263, "F": 2.6324}


def full(value, dim=2):
    return torch.full((dim,), float(value), dtype=torch.float64)


def gaussian(variance, dim=2):
    return DiagonalGaussian(full(0, dim), full(variance**0.5, dim))


class LinearGaussian:
    """q(z' | z) = N(slope z, variance); r(z | z') exact reverse for z ~ N(0, before), its variance times `wrong`."""

    def __init__(self, slope, variance, before, wrong=1.0):
        self.slope, self.variance, self.after = slope, variance, slope**2 * before + variance
        self.gain = slope * before / self.after
        self.reverse_variance = wrong * before * variance / self.after

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
    return Chain(gaussian(1.7), kernels, generator=generator()), Energy("end", lambda z: end.log_prob(z) + math.log(3))


def random_chain(n_transitions=3, scale=3.0, seed=0, **given):
    torch.manual_seed(seed)
    kernels = nn.ModuleList(GatedGaussianPair(2, 8) for _ in range(n_transitions)).double()
    return Chain(gaussian(scale**2), kernels, generator=generator(seed), **given)


def test_an_inexact_reverse_gives_unequal_weights():
    chain, target = linear_chain(1, wrong=1.5)
    assert evidence.effective_sample_size(chain.log_weight(target, chain.rsample(500))) < 0.99


@pytest.mark.parametrize("wrong", [0.6, 1.5])
@pytest.mark.parametrize("n_transitions", [1, 3])
def test_the_gap_of_the_hierarchical_bound_is_the_kl_of_the_reverse_kernels(n_transitions, wrong):
    chain, target = linear_chain(n_transitions, wrong)
    log_weight = chain.log_weight(target, chain.rsample(20_000))
    gap = n_transitions * 2 * 0.5 * (math.log(wrong) + 1 / wrong - 1)  # both dimensions of every transition
    assert abs(math.log(3) - float(log_weight.mean()) - gap) < 5 * float(log_weight.std()) / 20_000**0.5


CHAINS = {
    "base alone": lambda: Chain(gaussian(9)),
    "inexact reverse": lambda: Chain(gaussian(9), [LinearGaussian(0.9, 2, 9, 0.7), LinearGaussian(-0.8, 3, 9.29, 0.7)]),
}


@pytest.mark.parametrize("name", LOG_Z)
@pytest.mark.parametrize("kind", CHAINS)
def test_the_mean_weight_of_a_wide_chain_is_the_normalizer(name, kind):
    chain = CHAINS[kind]()
    chain.generator = generator(1)
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
    kernels = nn.ModuleList(GatedGaussianPair(2, 8, 3) for _ in range(n_transitions)).double()
    chain = Chain(base, kernels, draw(*batch, 3))
    trajectory = chain.rsample(sample_shape)
    shape = ((sample_shape,) if isinstance(sample_shape, int) else sample_shape) + batch
    assert len(chain) == n_transitions and trajectory.z.shape == (n_transitions + 1, *shape, 2)
    assert trajectory.log_q0.shape == shape and trajectory.log_ratios.shape == (n_transitions, *shape)
    assert chain.log_weight(ENERGIES["A"], trajectory).shape == shape
    assert chain.noise(sample_shape).shape == (n_transitions + 1, *shape, 2)
    assert chain.noise(sample_shape).dtype == torch.float64


def assert_same(first, second):
    for name in ("z", "log_ratios", "log_q0"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_the_same_noise_gives_the_same_trajectory():
    chain = random_chain()
    noise = chain.noise(20)
    assert_same(chain.rsample(20, noise), chain.rsample(noise=noise))
    assert not torch.equal(chain.rsample(20, noise).z[0], chain.rsample(20).z[0])


def test_a_chain_draws_from_its_own_generator_and_from_nothing_else():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = random_chain().rsample(20)
    torch.manual_seed(99)
    chain = Chain(gaussian(9), random_chain().kernels, generator=generator())
    assert_same(first, chain.rsample(20))
    assert not torch.equal(first.z, chain.rsample(20).z)  # the next draw is another one
    for other in (chain.detach(), chain.freeze(), Chain(gaussian(9), (), None, chain.generator)):
        assert other.generator is chain.generator
    torch.manual_seed(0)
    for each in (Chain(gaussian(9), chain.kernels, generator=generator()), chain.detach(), chain.freeze()):
        each.rsample(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_a_chain_draws_from_torchs_own():
    found = [torch.manual_seed(seed) and Chain(gaussian(9)).rsample(5).z for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_gradients_flow_through_the_whole_trajectory():
    loc = full(0).requires_grad_()
    chain = Chain(DiagonalGaussian(loc, full(1)), random_chain().kernels)
    chain.rsample(10).z[-1].sum().backward()
    assert loc.grad.all()
    assert all(p.grad.any() for kernel in chain.kernels for p in kernel.forwards.outputs.parameters())


def conditional_chain(recipe=Gated, n=3, kind=Chain):
    """Of six images, with a base and a context that learn."""
    torch.manual_seed(0)
    kernels = nn.ModuleList(recipe(8, "identity").build(3, n, 5)).double()
    with torch.no_grad():
        for parameter in kernels.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    loc, scale, context = draw(6, 3).requires_grad_(), draw(6, 3).exp().requires_grad_(), draw(6, 5).requires_grad_()
    return kind(DiagonalGaussian(loc, scale), kernels, context, generator())


def gradients(value, inputs):
    return torch.autograd.grad(value.sum(), inputs, allow_unused=True, retain_graph=True)


def total(trajectory):
    return (trajectory.z.square().sum(-1)[1:] + trajectory.log_ratios).cos().sum() + trajectory.log_q0.sum()


@pytest.mark.parametrize("recipe", [Gated, Residual])
@pytest.mark.parametrize(("cut", "learns"), [(Chain.detach, slice(3, None)), (Chain.freeze, slice(3))])
def test_detached_a_chain_teaches_its_kernels_alone_and_frozen_all_but_them(recipe, cut, learns):
    chain = conditional_chain(recipe)
    noise, inputs = chain.noise(4), [chain.base.loc, chain.base.scale, chain.context, *chain.kernels.parameters()]
    whole, part = chain.rsample(noise=noise), cut(chain).rsample(noise=noise)
    assert_same(part, whole)
    found, expected = gradients(total(part), inputs), list(gradients(total(whole), inputs))
    torch.testing.assert_close(found[learns], tuple(expected[learns]))
    assert all(each is not None and each.any() for each in found[learns])
    del expected[learns]
    assert sum(each is None for each in found) == len(expected)


@pytest.mark.parametrize("recipe", [Gated, Residual])
def test_what_a_transition_draws_locally_has_a_gradient_to_its_kernel_alone(recipe):
    chain = conditional_chain(recipe)
    noise = chain.noise(4)
    trajectory = chain.rsample(noise=noise, local=True)
    assert_same(trajectory, chain.rsample(noise=noise))
    for step, kernel in enumerate(chain.kernels):
        others = [chain.base.loc, *(p for k in chain.kernels if k is not kernel for p in k.parameters())]
        value = trajectory.log_ratios[step] + trajectory.z[step + 1].square().sum(-1)
        assert all(each is None or not each.any() for each in gradients(value, others))
        assert all(each.any() for each in gradients(value, list(kernel.parameters())))


def test_a_slice_of_a_chain_draws_what_the_whole_does_there():
    chain = conditional_chain()
    noise = chain.noise(4)
    part, whole = chain[2:5].rsample(noise=noise[:, :, 2:5]), chain.rsample(noise=noise)
    torch.testing.assert_close(part.z, whole.z[:, :, 2:5])
    torch.testing.assert_close(part.log_ratios, whole.log_ratios[:, :, 2:5])
    assert conditional_chain()[2:5].base.batch_shape == (3,) and chain[1:].generator is chain.generator


def test_a_subclass_stays_what_it_is():
    class Own(Chain):
        """A chain of the user's own."""

    chain = conditional_chain(kind=Own)
    assert {type(each) for each in (chain.detach(), chain.freeze(), chain[:2], chain[:2].detach().freeze())} == {Own}


def test_the_weights_of_a_chain_are_those_of_its_kernels_each_once():
    pair = GatedGaussianPair(2, 4)
    chain = Chain(gaussian(1), [pair, LinearGaussian(0.9, 2, 9), pair, GatedGaussianPair(2, 4)])
    expected = [*pair.parameters(), *chain.kernels[3].parameters()]
    assert [id(each) for each in chain.parameters()] == [id(each) for each in expected]
    assert list(Chain(gaussian(1)).parameters()) == []
