"""Kernels: densities against torch.distributions, the start near the identity, what a frozen network lets through."""

import pytest
import torch
from draws import draw
from torch import nn
from torch.distributions import Normal

from annealed_core.kernels import (
    DiagonalGaussian,
    Frozen,
    Gated,
    GatedGaussian,
    GatedGaussianPair,
    Residual,
    ResidualGaussian,
    ResidualGaussianPair,
)

every_start = pytest.mark.parametrize("start", ["torch", "identity"])
every_context = pytest.mark.parametrize("context_dim", [0, 5])
every_recipe = pytest.mark.parametrize("recipe", [Gated, Residual])


def build(recipe=Gated, dim=3, hidden=8, context_dim=0, start="torch", moved=0.0):
    """A kernel in float64, its weights moved by so much: a residual one starts with an output layer of zeros."""
    torch.manual_seed(0)
    (kernel,) = recipe(hidden, start).build(dim, 1, context_dim)
    with torch.no_grad():
        for parameter in kernel.double().parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    return kernel


def context_of(context_dim, *batch):
    return draw(*batch, context_dim) if context_dim else None


def test_a_gaussian_samples_what_it_weighs():
    loc, scale = draw(4, 3), draw(4, 3).exp()
    base, noise = DiagonalGaussian(loc, scale), draw(100, 4, 3)
    z = base.rsample(noise)
    torch.testing.assert_close(z, loc + scale * noise)
    torch.testing.assert_close(base.log_prob(z), Normal(loc, scale).log_prob(z).sum(-1))
    torch.testing.assert_close(base.drawn_log_prob(noise), base.log_prob(z))
    torch.testing.assert_close(base[1:3].log_prob(z[:, 1:3]), base.log_prob(z)[:, 1:3])
    assert base.dim == 3 and base.batch_shape == (4,) and base[1:3].batch_shape == (2,)


def test_an_isotropic_gaussian_has_that_standard_deviation_everywhere():
    base = DiagonalGaussian.isotropic(5, 2.5)
    assert base.loc.tolist() == [0] * 5 and base.scale.tolist() == [2.5] * 5 and base.batch_shape == ()


def test_a_detached_gaussian_has_the_same_values_and_no_gradient():
    base = DiagonalGaussian(draw(3).requires_grad_(), draw(3).exp().requires_grad_())
    z = draw(3)
    assert base.log_prob(z).requires_grad
    assert not base.detach().log_prob(z).requires_grad and not base.detach().rsample(z).requires_grad
    assert base.detach().log_prob(z) == base.log_prob(z)


@every_recipe
@every_start
@every_context
def test_log_ratio_is_log_reverse_minus_log_forward(recipe, context_dim, start):
    kernel = build(recipe, 3, 8, context_dim, start, moved=0.3)
    z, context, noise = draw(6, 3), context_of(context_dim, 6), draw(6, 3)
    z_next, log_ratio = kernel(z, context, noise)
    loc, scale = kernel.forwards(z, context)
    loc_back, scale_back = kernel.reverse(z_next, context)
    by_hand = Normal(loc_back, scale_back).log_prob(z).sum(-1) - Normal(loc, scale).log_prob(z_next).sum(-1)
    torch.testing.assert_close(z_next, loc + scale * noise)
    torch.testing.assert_close(log_ratio, by_hand, atol=1e-9, rtol=1e-9)


@every_context
@pytest.mark.parametrize("kind", [GatedGaussian, ResidualGaussian])
def test_conditionals_are_the_formulas_of_their_papers(kind, context_dim):
    torch.manual_seed(0)
    kernel = kind(3, 8, context_dim).double()
    nn.init.normal_(kernel.outputs.weight)
    z, context = draw(6, 3), context_of(context_dim, 6)
    before = z @ kernel.hidden.weight.T + kernel.hidden.bias
    if context_dim:
        before = before + context @ kernel.context.weight.T
    out = before.clamp(min=0) @ kernel.outputs.weight.T + kernel.outputs.bias
    m, s, g = out[:, :3], out[:, -3:], 1 / (1 + (-out[:, 3:6]).exp())
    loc, scale = kernel(z, context)
    torch.testing.assert_close(loc, g * m + (1 - g) * z if kind is GatedGaussian else z + m)
    torch.testing.assert_close(scale, (1 + s.exp()).log(), atol=2e-6, rtol=0)


@every_recipe
@every_context
def test_near_the_identity_a_kernel_hardly_moves_and_with_torchs_weights_it_buries_the_state_in_noise(
    recipe, context_dim
):
    z, context = draw(4000, 2), context_of(context_dim, 4000)
    near = build(recipe, 2, 32, context_dim, "identity")
    assert (near(z, context)[0] - z).abs().mean() < 0.1
    for gaussian in (near.forwards, near.reverse):
        loc, scale = gaussian(z, context)
        assert 0.017 < scale.mean() < 0.024 and (loc - z).abs().mean() < 0.1
    loc, scale = build(recipe, 2, 32, context_dim).forwards(z, context)
    assert 0.5 < scale.mean() < 0.9 and (recipe is Gated or torch.equal(loc, z))


@pytest.mark.parametrize(("recipe", "kind"), [(Gated, GatedGaussianPair), (Residual, ResidualGaussianPair)])
def test_a_recipe_builds_as_many_kernels_with_weights_of_their_own_from_torchs_random_state(recipe, kind):
    torch.manual_seed(3)
    built = recipe(6, "identity").build(dim=2, n=3, context_dim=4)
    torch.manual_seed(3)
    by_hand = [kind(2, 6, 4, True) for _ in range(3)]
    assert [type(kernel) for kernel in built] == [kind] * 3 and recipe().build(2, 0) == []
    for ours, theirs in zip(built, by_hand, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(built[0].forwards.hidden.weight, built[1].forwards.hidden.weight)


@pytest.mark.parametrize("train", [False, True])
def test_a_frozen_network_is_that_of_evaluation_mode_as_it_stands_and_gradients_reach_its_input_alone(train):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2)).double()
    network(draw(9, 3))  # batch statistics
    network.train(train)
    network[2].train(not train)  # a part in another mode than the whole
    x = draw(4, 3).requires_grad_()
    before, frozen = {name: value.clone() for name, value in network.state_dict().items()}, Frozen(network)
    value = frozen.train()(x).sin().sum()
    found = torch.autograd.grad(value, [x, *network.parameters()], allow_unused=True)
    assert found[0].any() and all(each is None for each in found[1:])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training == train and network[2].training != train and not list(frozen.parameters())
    torch.testing.assert_close(value, network.eval()(x).sin().sum())
    torch.testing.assert_close(found[0], torch.autograd.grad(network(x).sin().sum(), x)[0])


def test_a_frozen_network_stands_still_where_the_network_goes_on_before_the_backward_pass():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    network(draw(9, 3))
    x = draw(4, 3).requires_grad_()
    (expected,) = torch.autograd.grad(Frozen(network)(x).sin().sum(), x)
    value = Frozen(network)(x).sin().sum()
    network(5 * draw(9, 3))  # its running statistics move, in place
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected, rtol=0, atol=0)


def test_a_frozen_network_gives_back_its_mode_after_an_error():
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    with pytest.raises(RuntimeError):
        Frozen(network)(torch.zeros(4, 2))
    assert all(module.training for module in network.modules())
