"""Kernels: densities against torch.distributions, the start near the identity, Markov moves that keep their target."""

import pytest
import torch
from torch.distributions import Normal

from annealed_core import kernels
from annealed_core.kernels import (
    DiagonalGaussian,
    GatedGaussian,
    GatedGaussianPair,
    Metropolis,
    ResidualGaussianPair,
    are_alike,
    normal_log_prob,
    run_pairs,
)
from annealed_core.products import Linear, linear
from annealed_core.targets import ENERGIES

every_start = pytest.mark.parametrize("near_identity", [False, True])
every_context = pytest.mark.parametrize("context_dim", [0, 5])


def pair(dim=3, hidden=8, context_dim=0, near_identity=False):
    torch.manual_seed(0)
    return GatedGaussianPair(dim, hidden, context_dim, near_identity).double()


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def context_of(context_dim, *batch):
    return draw(*batch, context_dim) if context_dim else None


def test_normal_log_prob_is_that_of_torch_distributions():
    z, loc, scale = draw(7, 3), draw(7, 3), draw(7, 3).exp()
    torch.testing.assert_close(normal_log_prob(z, loc, scale), Normal(loc, scale).log_prob(z).sum(-1))


def test_diagonal_gaussian_samples_what_it_weighs():
    loc, scale = draw(4, 3), draw(4, 3).exp()
    base, noise = DiagonalGaussian(loc, scale), draw(100, 4, 3)
    z = base.rsample(noise)
    torch.testing.assert_close(z, loc + scale * noise)
    torch.testing.assert_close(base.log_prob(z), Normal(loc, scale).log_prob(z).sum(-1))
    assert base.dim == 3 and base.batch_shape == (4,)


def test_isotropic_gaussian_has_that_standard_deviation_everywhere():
    base = DiagonalGaussian.isotropic(5, 2.5)
    assert base.loc.tolist() == [0] * 5 and base.scale.tolist() == [2.5] * 5 and base.batch_shape == ()


def test_a_detached_gaussian_has_the_same_values_and_no_gradient():
    base = DiagonalGaussian(draw(3).requires_grad_(), draw(3).exp().requires_grad_())
    z = draw(3)
    assert base.log_prob(z).requires_grad
    assert not base.detach().log_prob(z).requires_grad and not base.detach().rsample(z).requires_grad
    assert base.detach().log_prob(z) == base.log_prob(z)


@every_start
@every_context
def test_log_ratio_is_log_reverse_minus_log_forward(context_dim, near_identity):
    kernel = pair(3, 8, context_dim, near_identity)
    z, context, noise = draw(6, 3), context_of(context_dim, 6), draw(6, 3)
    z_next, log_ratio = kernel(z, context, noise)
    loc, scale = kernel.forwards(z, context)
    loc_back, scale_back = kernel.reverse(z_next, context)
    by_hand = Normal(loc_back, scale_back).log_prob(z).sum(-1) - Normal(loc, scale).log_prob(z_next).sum(-1)
    torch.testing.assert_close(z_next, loc + scale * noise)
    torch.testing.assert_close(log_ratio, by_hand, atol=1e-9, rtol=1e-9)


@every_context
def test_gated_gaussian_is_the_formula_of_the_paper(context_dim):
    torch.manual_seed(0)
    kernel = GatedGaussian(3, 8, context_dim).double()
    z, context = draw(6, 3), context_of(context_dim, 6)
    before = z @ kernel.hidden.weight.T + kernel.hidden.bias
    if context_dim:
        before = before + context @ kernel.context.weight.T
    out = before.clamp(min=0) @ kernel.outputs.weight.T + kernel.outputs.bias
    m, g, s = out[:, :3], 1 / (1 + (-out[:, 3:6]).exp()), out[:, 6:]
    loc, scale = kernel(z, context)
    torch.testing.assert_close(loc, g * m + (1 - g) * z)
    torch.testing.assert_close(scale, (1 + s.exp()).log(), atol=2e-6, rtol=0)


@every_context
def test_near_identity_starts_close_to_the_identity(context_dim):
    kernel = pair(2, 32, context_dim, near_identity=True)
    z, context = draw(4000, 2), context_of(context_dim, 4000)
    z_next, _ = kernel(z, context)
    assert (z_next - z).abs().mean() < 0.1
    for gaussian in (kernel.forwards, kernel.reverse):
        loc, scale = gaussian(z, context)
        assert 0.017 < scale.mean() < 0.024
        assert (loc - z).abs().mean() < 0.1


def test_the_default_start_buries_the_state_in_noise():
    _, scale = pair(2, 32).forwards(draw(1000, 2))
    assert 0.5 < scale.mean() < 0.9


@every_start
@every_context
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_every_parameter_gets_a_gradient(dim, context_dim, near_identity):
    kernel = pair(dim, 8, context_dim, near_identity)
    z_next, log_ratio = kernel(draw(64, dim), context_of(context_dim, 64))
    (log_ratio.sum() + z_next.square().sum()).backward()
    for name, parameter in kernel.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@every_context
@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_batch_shapes_are_kept_and_context_is_shared_by_all_samples(context_dim, shape):
    kernel = pair(3, 8, context_dim)
    z, noise, context = draw(*shape, 3), draw(*shape, 3), context_of(context_dim, 6)
    z_next, log_ratio = kernel(z, context, noise)
    assert z_next.shape == (*shape, 3) and log_ratio.shape == shape
    for index in torch.cartesian_prod(*[torch.arange(n) for n in shape]).view(-1, len(shape)).tolist():
        one = None if context is None else context[index[-1]]
        alone, alone_ratio = kernel(z[tuple(index)], one, noise[tuple(index)])
        torch.testing.assert_close(z_next[tuple(index)], alone)
        torch.testing.assert_close(log_ratio[tuple(index)], alone_ratio)


def test_context_changes_the_transition():
    kernel, z, noise = pair(3, 8, 5), draw(6, 3), draw(6, 3)
    assert not torch.equal(kernel(z, draw(6, 5), noise)[0], kernel(z, draw(6, 5), noise)[0])


@every_context
def test_saved_and_loaded_kernels_are_the_same(context_dim, tmp_path):
    kernel, other = pair(3, 8, context_dim), GatedGaussianPair(3, 8, context_dim).double()
    z, context, noise = draw(6, 3), context_of(context_dim, 6), draw(6, 3)
    assert not torch.equal(kernel(z, context, noise)[1], other(z, context, noise)[1])
    torch.save(kernel.state_dict(), tmp_path / "kernel.pt")
    other.load_state_dict(torch.load(tmp_path / "kernel.pt", weights_only=True))
    for ours, theirs in zip(kernel(z, context, noise), other(z, context, noise), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n_moves", [1, 5])
def test_metropolis_log_ratio_is_the_fall_of_the_targets_log_density(n_moves):
    torch.manual_seed(0)
    kernel, z = Metropolis(ENERGIES["A"], 0.5, n_moves), draw(200, 2)
    z_next, log_ratio = kernel(z)
    torch.testing.assert_close(log_ratio, ENERGIES["A"].log_prob(z) - ENERGIES["A"].log_prob(z_next))
    assert log_ratio.any()


@pytest.mark.parametrize("n_moves", [1, 4])
def test_metropolis_leaves_its_target_invariant(n_moves):
    torch.manual_seed(0)
    n, scale = 40_000, torch.tensor([0.5, 2.0], dtype=torch.float64)
    target = DiagonalGaussian(torch.tensor([1.0, -1.0], dtype=torch.float64), scale)
    start = z = target.rsample(draw(n, 2))
    for _ in range(12 // n_moves):
        z, _ = Metropolis(target, 1.0, n_moves)(z)
    assert (z != start).any(-1).float().mean() > 0.9
    standard = (z - target.loc) / scale
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = (standard**power).mean(0) - mean
        assert (error.abs() < 5 * (variance / n) ** 0.5).all(), (power, error)


def test_metropolis_finds_its_target_from_elsewhere():
    torch.manual_seed(0)
    target = DiagonalGaussian(torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    z, _ = Metropolis(target, 1.0, 60)(draw(5000, 1))
    assert z.mean() == pytest.approx(2, abs=0.05) and z.std() == pytest.approx(0.5, abs=0.03)


def test_metropolis_uses_the_noise_it_is_given():
    kernel, z = Metropolis(DiagonalGaussian.isotropic(2), 1e-3), torch.zeros(2000, 2)
    noise = torch.randn(2000, 2)
    z_next, _ = kernel(z, None, noise)
    moved = (z_next != z).any(-1)
    assert moved.float().mean() > 0.95
    torch.testing.assert_close(z_next[moved], 1e-3 * noise[moved])


def in_turn(pairs, start, context, noise, local):
    """What `run_pairs` gives, one kernel after another."""
    z, states, log_ratios = start, [start], []
    for pair_, fresh in zip(pairs, noise, strict=True):
        z, log_ratio = pair_(z.detach() if local else z, context, fresh)
        states.append(z)
        log_ratios.append(log_ratio)
    return torch.stack(states), torch.stack(log_ratios)


@pytest.mark.parametrize("kind", [GatedGaussianPair, ResidualGaussianPair])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("sample", [(), (7,), (2, 7)])
@pytest.mark.parametrize("batch", [(4,), (3, 4)])
def test_pairs_run_together_draw_and_learn_what_they_do_in_turn(kind, local, sample, batch):
    torch.manual_seed(0)
    pairs = torch.nn.ModuleList(kind(3, 8, 5, True) for _ in range(4)).double()
    assert are_alike(list(pairs))
    for parameter in pairs.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    start, context = draw(*sample, *batch, 3).requires_grad_(), draw(*batch, 5).requires_grad_()
    noise, weight = draw(4, *sample, *batch, 3), draw(4, *sample, *batch)
    found = []
    for run in (run_pairs, in_turn):
        states, log_ratios = run(list(pairs), start, context, noise, local)
        value = (weight * (log_ratios + states[1:].square().sum(-1))).sum()
        inputs = [start, context, *pairs.parameters()]
        found.append((states, log_ratios, torch.autograd.grad(value, inputs, allow_unused=True)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", [GatedGaussianPair, ResidualGaussianPair])
@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 7, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_draws_without_a_gradient_are_those_drawn_in_turn(kind, shape, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "MANY_NUMBERS", 1)
    torch.manual_seed(0)
    pairs = torch.nn.ModuleList(kind(3, 8, 5, True) for _ in range(4)).double()
    for parameter in pairs.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    start, context, noise = draw(*shape, 3), draw(4, 5), draw(4, *shape, 3)
    expected = in_turn(pairs, start, context, noise, False)
    with torch.no_grad():
        found = run_pairs(list(pairs.to(dtype)), start.to(dtype), context.to(dtype), noise.to(dtype))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(found, tuple(each.detach().to(dtype) for each in expected), **close)


@pytest.mark.parametrize(("numbers", "with_gradient", "taken"), [(12, False, 1), (13, False, 0), (12, True, 0)])
def test_only_many_draws_without_a_gradient_take_the_fast_way(numbers, with_gradient, taken, monkeypatch):
    monkeypatch.setattr(kernels, "MANY_NUMBERS", numbers)
    calls, fast = [], kernels._run_without_gradient
    monkeypatch.setattr(kernels, "_run_without_gradient", lambda *given: calls.append(1) or fast(*given))
    pairs = [pair(context_dim=5) for _ in range(2)]
    with torch.set_grad_enabled(with_gradient):
        run_pairs(pairs, draw(4, 3), draw(4, 5), draw(2, 4, 3))
    assert len(calls) == taken


def test_pairs_that_differ_or_have_no_context_are_not_run_together():
    alike = [pair(context_dim=5), pair(context_dim=5)]
    assert are_alike(alike) and are_alike(alike[:1]) and not are_alike([])
    assert not are_alike([pair(), pair()])
    assert not are_alike([pair(context_dim=5), pair(hidden=9, context_dim=5)])
    assert not are_alike([*alike, ResidualGaussianPair(3, 8, 5)])
    assert not are_alike([Metropolis(ENERGIES["A"], 0.1)])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_the_fast_product_in_float32_is_the_plain_one_in_float64(with_bias, needs):
    torch.manual_seed(0)
    wide = torch.randn(40, 64)
    x = wide.t()[:, :30].requires_grad_(needs[0])  # rows that aren't contiguous
    weight = torch.randn(50, 30, requires_grad=needs[1])
    bias = torch.randn(50, requires_grad=needs[1]) if with_bias else None
    inputs = [each for each in (x, weight, bias) if each is not None]
    scale = torch.randn(64, 1)
    value = linear(*inputs)
    exact_inputs = [each.detach().double().requires_grad_(each.requires_grad) for each in inputs]
    exact = torch.nn.functional.linear(*exact_inputs)
    close = {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(value, exact, **close)
    for result, factor in ((value, scale), (exact, scale.double())):
        (result * factor).sum().backward(retain_graph=True)
        result.sum().backward()  # whose gradient is one number, expanded
    for each, exact_each in zip(inputs, exact_inputs, strict=True):
        assert (each.grad is None) == (exact_each.grad is None)
        if each.grad is not None:
            torch.testing.assert_close(each.grad, exact_each.grad, **close)


def test_a_linear_layer_can_be_differentiated_twice_and_under_torch_func():
    torch.manual_seed(0)
    layer, x = Linear(6, 5), torch.randn(4, 6)

    def value(x, layer=layer):
        return torch.tanh(layer(x)).square().sum()

    exact = torch.nn.Linear(6, 5).double()
    exact.load_state_dict(layer.state_dict())
    expected = torch.autograd.functional.hessian(lambda x: value(x, exact), x.double())
    assert expected.abs().max() > 0.01
    for found in (torch.autograd.functional.hessian(value, x), torch.func.hessian(value)(x)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_layer_takes_what_torchs_own_takes(dtype):
    layer = Linear(6, 5, dtype=dtype)
    for shape in ((6,), (4, 6), (2, 4, 6), (0, 6)):
        x = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
