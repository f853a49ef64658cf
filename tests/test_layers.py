"""What training takes in few passes has the values, gradients and side effects of the plain operations."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import leaky_relu

from annealed_core import layers
from annealed_core.layers import (
    can_train,
    frozen_log_likelihood,
    log_likelihood,
    softplus,
    sum_centred_softplus,
    through,
)
from annealed_core.products import products_in
from annealed_core.vae import VAE

FLOATS = [torch.float32, torch.float64]


def network(*sizes, dtype=torch.float64):
    """Hidden layers as `through` takes them, and the last one."""
    torch.manual_seed(0)
    pairs = list(itertools.pairwise(sizes[:-1]))
    found = [(nn.Linear(*pair), nn.BatchNorm1d(pair[1]), 0.01) for pair in pairs]
    for _, norm, _ in found:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    last = nn.Linear(sizes[-2], sizes[-1])
    nn.ModuleList([*(layer for three in found for layer in three[:2]), last]).to(dtype)
    return found, last


def parameters(hidden, last):
    return [p for layer, norm, _ in hidden for p in (*layer.parameters(), *norm.parameters())] + list(last.parameters())


def statistics(hidden):
    return [buffer.clone() for _, norm, _ in hidden for buffer in norm.buffers()]


def plainly(x, hidden, last):
    for layer, norm, slope in hidden:
        x = leaky_relu(norm(layer(x)), slope)
    return last(x), x


def bernoulli(logits, x):
    return (logits * x).sum(-1) - nn.functional.softplus(logits).sum(-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("x_learns", [False, True])
def test_a_network_has_the_values_gradients_and_statistics_of_its_layers(dtype, x_learns):
    hidden, last = network(7, 5, 6, 3, dtype=dtype)
    others = copy.deepcopy((hidden, last))
    x = torch.randn(9, 7, dtype=dtype, requires_grad=x_learns)
    found = []
    for run, (its_hidden, its_last) in ((through, (hidden, last)), (plainly, others)):
        output, features = run(x, its_hidden, its_last)
        value = output.square().sum() + features.sin().sum()
        wanted = [*parameters(its_hidden, its_last), *([x] if x_learns else [])]
        found.append((output, features, torch.autograd.grad(value, wanted), statistics(its_hidden)))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(found[0], found[1], **close)
    assert all(int(norm.num_batches_tracked) == 1 for _, norm, _ in hidden)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_the_likelihood_of_a_decoder_in_training_has_the_gradients_of_its_layers(dtype, shape):
    hidden, last = network(2, 5, 6, 11, dtype=dtype)
    others = copy.deepcopy((hidden, last))
    z, x = torch.randn(*shape, 2, dtype=dtype, requires_grad=True), torch.rand(4, 11).round().to(dtype)
    x[0] = 0.3  # grey images have a figure too
    weight = torch.randn(shape, dtype=dtype)
    values = log_likelihood(z, hidden, last, x)
    logits, _ = plainly(z.flatten(0, -2), *others)
    expected = bernoulli(logits.unflatten(0, shape), x)
    found = torch.autograd.grad((weight * values).sum(), [z, *parameters(hidden, last)])
    wanted = torch.autograd.grad((weight * expected).sum(), [z, *parameters(*others)])
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close((values, found), (expected, wanted), **close)
    torch.testing.assert_close(statistics(hidden), statistics(others[0]))


@pytest.mark.parametrize("rows", [1, 4, 9, 512])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_a_frozen_decoder_gives_its_gradient_with_the_value_in_any_chunks(rows, shape, monkeypatch):
    monkeypatch.setattr(layers, "_ROWS", rows)
    torch.manual_seed(0)
    folded = [(torch.randn(5, 2).double(), torch.randn(5).double(), 0.01), (torch.eye(5).double(), torch.ones(5), 0.2)]
    folded[1] = (folded[1][0], folded[1][1].double(), 0.2)
    last = torch.randn(11, 5).double(), torch.randn(11).double()
    z, x = torch.randn(*shape, 2).double().requires_grad_(), torch.rand(4, 11).round().double()
    hidden = z
    for weight, bias, slope in folded:
        hidden = leaky_relu(hidden @ weight.T + bias, slope)
    expected = bernoulli(hidden @ last[0].T + last[1], x)
    values = frozen_log_likelihood(z, folded, last, x)
    weight = torch.randn(shape).double()
    gradients = [torch.autograd.grad((weight * each).sum(), z)[0] for each in (values, expected)]
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(frozen_log_likelihood(z.detach(), folded, last, x), expected.detach())


def test_training_takes_these_functions_and_evaluation_the_plain_ones(monkeypatch):
    vae, x = VAE(2, 5).double(), torch.rand(6, 784).round().double()
    calls = []
    monkeypatch.setattr("annealed_core.vae.through", lambda *given: calls.append("encoder") or through(*given))
    monkeypatch.setattr("annealed_core.vae.log_likelihood", lambda *g: calls.append("decoder") or log_likelihood(*g))

    def look():
        vae.joint(x).log_likelihood(vae.posterior(x).rsample().z[-1])
        return [calls.pop() for _ in range(len(calls))]

    assert look() == ["decoder", "encoder"]
    with torch.no_grad():
        assert look() == []
    for norm in (vae.encoder.features[1], vae.decoder.features[1]):
        norm.momentum = None  # the plain mean over all that follows
    assert look() == []
    for norm in (vae.encoder.features[1], vae.decoder.features[1]):
        norm.momentum = 0.1
    assert look() == ["decoder", "encoder"]
    vae.eval()
    assert look() == []


def test_a_row_alone_is_refused_in_training():
    hidden, last = network(7, 5, 3)
    with pytest.raises(ValueError, match=r"^batch normalisation in training takes at least 2 rows, got 1$"):
        through(torch.randn(1, 7).double(), hidden, last)


def test_under_torch_func_the_plain_operations_take_their_place():
    hidden, _ = network(7, 5, 3)
    assert can_train(hidden)
    seen = []
    torch.func.vmap(lambda x: seen.append(can_train(hidden)) or x)(torch.zeros(2))
    assert seen == [False]


def test_softplus_has_its_values_and_gradient_to_the_ends():
    x = torch.tensor([-200.0, -30.0, -1.0, 0.0, 3.0, 19.0, 25.0, 90.0, 1e4])
    torch.testing.assert_close(softplus(x), nn.functional.softplus(x.double(), threshold=1e9).clamp_max(1e4).float())
    assert torch.autograd.gradcheck(softplus, torch.linspace(-5, 5, 11).double().requires_grad_())
    assert torch.autograd.gradgradcheck(softplus, torch.linspace(-5, 5, 11).double().requires_grad_())
    assert softplus(torch.tensor(torch.nan)).isnan()
    torch.testing.assert_close(torch.func.vmap(softplus)(x), softplus(x))


@pytest.mark.parametrize("n", [1, 112, 113, 784])
def test_a_centred_softplus_is_the_softplus_less_half(n):
    torch.manual_seed(0)
    logits = 9 * torch.randn(5, n).double()
    expected = (nn.functional.softplus(logits) - logits / 2).sum(-1)
    learning = logits.clone().requires_grad_()
    torch.testing.assert_close(sum_centred_softplus(learning), expected)
    slope = torch.autograd.grad(sum_centred_softplus(learning).sum(), learning)[0]
    torch.testing.assert_close(slope, torch.sigmoid(logits) - 0.5)
    with torch.no_grad():
        torch.testing.assert_close(sum_centred_softplus(logits.clone()), expected)


def test_medium_precision_is_of_these_products_alone_and_ends_with_the_block():
    hidden, last = network(300, 300, 300, 40, dtype=torch.float32)
    x, before = torch.randn(64, 300), torch.get_float32_matmul_precision()
    exact = through(x, hidden, last)[0]
    with products_in("medium"):
        rough = through(x, hidden, last)[0]
        assert torch.get_float32_matmul_precision() == before  # between products it is as it was
    assert torch.equal(through(x, hidden, last)[0], exact)
    error = (rough - exact).abs().max() / exact.abs().max()
    assert error < 0.02
    for nothing in ("highest", None):
        with products_in(nothing):
            assert torch.equal(through(x, hidden, last)[0], exact)


def test_draws_that_count_for_next_to_nothing_teach_nothing():
    hidden, last = network(2, 5, 11, dtype=torch.float32)
    z, x = torch.randn(3, 4, 2, requires_grad=True), torch.rand(4, 11).round()
    weight = torch.tensor([1.0, 1e-20, 1e-37]).unsqueeze(-1)
    # Of each row alone: batch normalisation mixes them.
    slopes = torch.autograd.grad((weight * log_likelihood(z, hidden, last, x)).sum(), last.bias)[0]
    alone = torch.autograd.grad((weight[:2] * log_likelihood(z, hidden, last, x)[:2]).sum(), last.bias)[0]
    assert torch.equal(slopes, alone) and slopes.any()
    tiny = (1e-37 * log_likelihood(z, hidden, last, x)).sum()
    assert not torch.autograd.grad(tiny, last.bias)[0].any()
