"""The auto-encoder: its densities against torch.distributions, its likelihood against quadrature."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import softplus

from annealed_core import evidence
from annealed_core.kernels import GatedGaussianPair
from annealed_core.layers import sum_softplus
from annealed_core.vae import VAE, Decoder, Encoder, Joint, mlp


def tiny(latents=2, width=6, n_transitions=0, seed=0):
    torch.manual_seed(seed)
    vae = VAE(latents, width, (GatedGaussianPair(latents, 5, width) for _ in range(n_transitions)))
    return vae.double().eval()


def images(n=4):
    return (torch.rand(n, 784) < 0.3).double()


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_mlp_is_linear_batch_norm_and_leaky_relu_for_each_pair_of_sizes():
    kinds = [type(layer).__name__ for layer in mlp([7, 5, 3])]
    assert kinds == ["Linear", "BatchNorm1d", "LeakyReLU"] * 2


def test_the_default_network_is_that_of_the_report():
    vae = VAE(40, 300)
    shapes = [tuple(p.shape) for p in vae.parameters() if p.ndim == 2]
    assert shapes == [(300, 784), (300, 300), (80, 300), (300, 40), (300, 300), (784, 300)]


def test_the_encoder_gives_a_base_for_each_image_and_features_for_the_kernels():
    encoder = Encoder(3, 10).double().eval()
    base, features = encoder(images(6))
    assert base.batch_shape == (6,) and base.dim == 3 and features.shape == (6, 10)
    assert (base.scale > 0).all()


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
def test_the_decoder_gives_logits_for_every_sample(shape):
    decoder = Decoder(3, 10).double().eval()
    z = draw(*shape, 3)
    logits = decoder(z)
    assert logits.shape == (*shape, 784)
    last = tuple(n - 1 for n in shape)
    torch.testing.assert_close(logits[last], decoder(z[last].unsqueeze(0)).squeeze(0))


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_the_joint_is_bernoulli_likelihood_times_standard_normal_prior(shape):
    vae, x = tiny(), images()
    z = draw(*shape, 2)
    joint = vae.joint(x)
    likelihood = Bernoulli(logits=vae.decoder(z)).log_prob(x).sum(-1)
    prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(joint.log_likelihood(z), likelihood)
    torch.testing.assert_close(joint.log_prior(z), prior)
    torch.testing.assert_close(joint.log_prob(z), likelihood + prior)


def test_the_likelihood_of_confident_logits_does_not_overflow():
    joint = Joint(lambda z: 1e4 * torch.ones(784, dtype=torch.float64), torch.ones(1, 784, dtype=torch.float64), 2)
    assert joint.log_likelihood(draw(1, 2)) == 0
    joint.x = torch.zeros(1, 784, dtype=torch.float64)
    assert joint.log_likelihood(draw(1, 2)) == pytest.approx(-784e4)


@pytest.mark.parametrize("n_transitions", [0, 2])
def test_importance_sampling_agrees_with_quadrature_over_two_latents(n_transitions):
    vae = tiny(n_transitions=n_transitions)
    with torch.no_grad():
        vae.decoder.outputs.weight.mul_(0.7)  # weights with little spread, so that few samples are enough
    x = images(3)
    torch.manual_seed(1)
    log_weights = evidence.importance_sampling(vae.posterior(x), vae.joint(x), 4000)
    estimate, error = evidence.log_mean_weight(log_weights)
    assert estimate.shape == (3,) and (error < 0.1).all()
    z, area = evidence.grid(7.0, 90)
    for index in range(3):
        with torch.no_grad():
            log_joint = vae.joint(x[index : index + 1]).log_prob(z.flatten(0, 1).unsqueeze(1))
        exact = torch.logsumexp(log_joint.flatten(), 0) + math.log(area)
        assert abs(estimate[index] - exact) < 5 * error[index]
    assert (log_weights.mean(0) < estimate).all()


def test_the_posterior_is_a_chain_over_the_vaes_kernels_conditioned_on_the_features():
    vae, x = tiny(n_transitions=2), images()
    chain = vae.posterior(x)
    base, features = vae.encoder(x)
    assert len(chain) == 2 and chain.kernels is vae.kernels
    assert torch.equal(chain.base.loc, base.loc) and torch.equal(chain.context, features)


@pytest.mark.parametrize("train", [False, True])
def test_a_frozen_joint_has_evaluation_modes_values_and_lets_gradients_through_to_z_alone(train):
    vae, x = tiny(), images()
    z = draw(4, 2).requires_grad_()
    expected = vae.joint(x).log_prob(z)
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    vae.train(train)
    value = vae.joint(x).frozen().log_prob(z)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z, retain_graph=True)[0], gradient)
    assert all(
        found is None for found in torch.autograd.grad(value.sum(), list(vae.decoder.parameters()), allow_unused=True)
    )
    assert vae.decoder.training == train


def test_decoded_latents_and_reconstructions_are_probabilities_of_pixels():
    vae, x = tiny(n_transitions=1).float(), images().float()
    for probabilities, shape in ((vae.decode(torch.randn(3, 7, 2)), (3, 7)), (vae.reconstruct(x), (4,))):
        assert probabilities.shape == (*shape, 784) and not probabilities.requires_grad
        assert ((probabilities > 0) & (probabilities < 1)).all()


@pytest.mark.parametrize("n", [1, 2, 111, 112, 113, 784, 2000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e6])
def test_the_sum_of_softplus_is_that_in_double_precision(n, scale):
    torch.manual_seed(n)
    logits = scale * torch.randn(7, n)
    expected = torch.logaddexp(logits.double(), torch.zeros(())).sum(-1)  # softplus itself is wrong by 2e-9 above 20
    torch.testing.assert_close(sum_softplus(logits).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sum_softplus(logits.double()), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("logit", [0.0, 30.0, -30.0, 88.0, -88.0, 1e4, -1e4])
def test_many_equal_logits_neither_overflow_nor_underflow(logit):
    logits = torch.full((784,), logit)
    torch.testing.assert_close(sum_softplus(logits), softplus(logits.double()).sum().float(), rtol=1e-6, atol=5e-5)


def test_the_sum_of_softplus_of_what_is_not_finite_says_so():
    found = [float(sum_softplus(torch.tensor([1.0, logit]))) for logit in (math.inf, -math.inf, math.nan)]
    assert found[0] == math.inf and found[1] == pytest.approx(math.log1p(math.e)) and math.isnan(found[2])


@pytest.mark.parametrize("shape", [(5,), (3, 130), (2, 3, 4)])
def test_the_sum_of_softplus_has_its_gradient_and_that_of_its_gradient(shape):
    logits = (3 * draw(*shape)).requires_grad_()
    assert torch.autograd.gradcheck(sum_softplus, logits) and torch.autograd.gradgradcheck(sum_softplus, logits)


def test_the_sum_of_softplus_can_be_mapped_and_differentiated_by_torch_func():
    logits = draw(4, 6)
    slopes = torch.func.vmap(torch.func.grad(sum_softplus))(logits)
    torch.testing.assert_close(slopes, torch.sigmoid(logits))


@pytest.mark.parametrize("layers", ["plain", "gated"])
@pytest.mark.parametrize("train", [False, True])
def test_a_frozen_decoder_is_the_one_of_evaluation_mode_as_it_stands(layers, train):
    torch.manual_seed(0)
    vae, x, z = VAE(3, 10, layers=layers).double(), images(), draw(5, 4, 3).requires_grad_()
    for parameter in vae.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    vae.joint(x).log_prob(3 * z)  # batch statistics
    frozen = vae.train(train).joint(x).frozen()
    value = frozen.log_likelihood(z).sum()
    (slope,) = torch.autograd.grad(value, z)
    assert all(module.training == train for module in vae.modules())
    plain = vae.eval().joint(x).log_likelihood(z).sum()
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(slope, torch.autograd.grad(plain, z)[0])
    assert not frozen.frozen().log_likelihood(z.detach()).requires_grad
