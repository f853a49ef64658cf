"""The auto-encoder with either decoder: densities against torch.distributions, its likelihood against quadrature."""

import itertools
import math

import pytest
import torch
from draws import draw, generator, images
from torch.distributions import Bernoulli, Normal

from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.decoders import Autoregressive, AutoregressiveDecoder
from annealed_core.kernels import GatedGaussianPair
from annealed_core.vae import VAE, Decoder, Encoder, Independent, Joint, mlp

every_decoder = pytest.mark.parametrize("decoder", [Independent(), Autoregressive()], ids=repr)
in_both_modes = pytest.mark.parametrize("train", [False, True])


def tiny(decoder, latents=2, width=6, n_transitions=0, **given):
    torch.manual_seed(0)
    kernels = (GatedGaussianPair(latents, 5, width) for _ in range(n_transitions))
    vae = VAE(latents, width, kernels, decoder, **given).double().eval()
    with torch.no_grad():
        vae.encoder.outputs.bias[latents:] = 1.0  # wider than the true posterior, so that few samples are enough
        for weight in (p for p in vae.decoder.outputs.parameters() if p.ndim == 2):
            weight.mul_(0.7)
    return vae


def test_mlp_is_linear_batch_norm_and_leaky_relu_for_each_pair_of_sizes():
    kinds = [type(layer).__name__ for layer in mlp([7, 5, 3])]
    assert kinds == ["Linear", "BatchNorm1d", "LeakyReLU"] * 2


def test_the_default_network_is_that_of_the_report():
    vae = VAE(40, 300)
    shapes = [tuple(p.shape) for p in vae.parameters() if p.ndim == 2]
    assert shapes == [(300, 784), (300, 300), (80, 300), (300, 40), (300, 300), (784, 300)]


@pytest.mark.parametrize(("given", "kind"), [((), Decoder), ((Autoregressive(),), AutoregressiveDecoder)])
def test_decoders_are_drawn_after_the_encoder_and_before_the_kernels_and_the_independent_one_is_the_default(
    given, kind
):
    torch.manual_seed(3)
    expected = [Encoder(2, 6), kind(2, 6), GatedGaussianPair(2, 5, 6)]
    torch.manual_seed(3)
    vae = VAE(2, 6, (GatedGaussianPair(2, 5, 6) for _ in range(1)), *given)
    assert type(vae.decoder) is kind
    for part, other in zip((vae.encoder, vae.decoder, vae.kernels[0]), expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(part.parameters(), other.parameters(), strict=True))


@every_decoder
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_every_sample_has_the_logits_that_it_has_alone(decoder, shape):
    vae, x = tiny(decoder), images()
    z = draw(*shape, 2)
    logits = vae.decoder(z, x)
    assert logits.shape == (*shape, 784)
    for index in itertools.product(*map(range, shape)):
        alone = vae.decoder(z[index].unsqueeze(0), x[index[-1]].unsqueeze(0))
        torch.testing.assert_close(logits[index], alone.squeeze(0))


@every_decoder
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_the_joint_is_bernoulli_likelihood_times_standard_normal_prior(decoder, shape):
    vae, x = tiny(decoder), images()
    z = draw(*shape, 2)
    joint = vae.joint(x)
    likelihood = Bernoulli(logits=vae.decoder(z, x)).log_prob(x).sum(-1)
    prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(joint.log_likelihood(z), likelihood)
    torch.testing.assert_close(joint.log_prior(z), prior)
    torch.testing.assert_close(joint.log_prob(z), likelihood + prior)
    torch.testing.assert_close(joint[1:3].log_prob(z[..., 1:3, :]), joint.log_prob(z)[..., 1:3])
    assert joint.dim == joint[1:3].dim == 2 and len(joint[1:3].x) == 2


def test_the_likelihood_of_confident_logits_does_not_overflow():
    for pixel, value in ((1.0, 0.0), (0.0, -784e4)):
        x = torch.full((1, 784), pixel)
        joint = Joint(lambda z, x: torch.full((1, 784), 1e4), x, 2)
        assert joint.log_likelihood(torch.zeros(1, 2)) == pytest.approx(value)


@every_decoder
@pytest.mark.parametrize("n_transitions", [0, 2])
def test_importance_sampling_agrees_with_quadrature_over_two_latents(decoder, n_transitions):
    vae, x = tiny(decoder, n_transitions=n_transitions), images(3)
    log_weights = evidence.importance_sampling(vae.posterior(x, generator(1)), vae.joint(x), 4000)
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
    vae, x = tiny(Independent(), n_transitions=2), images()
    chain = vae.posterior(x)
    base, features = vae.encoder(x)
    assert type(chain) is Chain and len(chain) == 2 and chain.kernels is vae.kernels
    assert torch.equal(chain.base.loc, base.loc) and torch.equal(chain.context, features)
    assert torch.equal(vae.posterior(x, generator()).rsample(3).z, vae.posterior(x, generator()).rsample(3).z)


def test_from_the_prior_the_kernels_alone_see_the_image_and_another_base_is_refused():
    vae, x = tiny(Independent(), n_transitions=1, base="prior"), images()
    chain = vae.posterior(x)
    assert not chain.base.loc.any() and (chain.base.scale == 1).all() and chain.base.batch_shape == (4,)
    assert torch.equal(chain.context, vae.encoder(x)[1])
    with pytest.raises(ValueError, match=r"^unknown base 'image': choose one of encoder, prior$"):
        VAE(2, 6, base="image")


@every_decoder
@in_both_modes
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_a_frozen_joint_is_that_of_evaluation_mode_and_lets_gradients_through_to_z_alone(decoder, train, shape):
    vae, x, z = tiny(decoder, 3), images(), draw(*shape, 3).requires_grad_()
    vae.train().joint(x).log_prob(3 * z)  # batch statistics
    frozen, weights = vae.train(train).joint(x).frozen(), list(vae.decoder.parameters())
    value = frozen.log_prob(z)
    found = torch.autograd.grad(value.sum(), [z, *weights], allow_unused=True)
    assert all(module.training == train for module in vae.modules())
    plain = vae.eval().joint(x).log_prob(z)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(found[0], torch.autograd.grad(plain.sum(), z, retain_graph=True)[0])
    assert found[0].abs().min() > 0 and all(each is None for each in found[1:])
    assert all(each.any() for each in torch.autograd.grad(plain.sum(), weights))
    assert not frozen.frozen().log_likelihood(z.detach()).requires_grad


@every_decoder
def test_decoded_latents_and_reconstructions_are_probabilities_of_pixels_or_drawn_images(decoder):
    vae, x, z = tiny(decoder, n_transitions=1).float(), images().float(), torch.randn(3, 7, 2)
    before = torch.get_rng_state()
    for make, shape in ((lambda g: vae.decode(z, g), (3, 7)), (lambda g: vae.reconstruct(x, g), (4,))):
        found = make(generator())
        assert found.shape == (*shape, 784) and not found.requires_grad and torch.equal(found, make(generator()))
        if decoder == Independent():
            assert ((found > 0) & (found < 1)).all()
        else:
            assert set(found.unique().tolist()) == {0.0, 1.0} and torch.equal(torch.bernoulli(found), found)
            torch.set_rng_state(before)
    assert torch.equal(torch.get_rng_state(), before)
