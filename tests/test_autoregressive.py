"""The autoregressive decoder: what each pixel sees, its probabilities by enumeration, and its draws against them."""

import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli

from annealed_core import evidence, inference, likelihood, objectives
from annealed_core.folded import targets_of
from annealed_core.kernels import GatedGaussianPair
from annealed_core.targets import linear_alphas
from annealed_core.vae import VAE, AutoregressiveDecoder, AutoregressiveJoint, Decoder, Encoder

AUTOREGRESSIVE = {"decoder": "autoregressive"}


def decoder_of(pixels=4, width=6, latents=2):
    """One whose pixels depend clearly on z and on each other."""
    torch.manual_seed(0)
    decoder = AutoregressiveDecoder(latents, width, pixels).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
    return decoder


def tiny(n_transitions=0, width=6):
    torch.manual_seed(0)
    kernels = (GatedGaussianPair(2, 5, width) for _ in range(n_transitions))
    vae = VAE(2, width, kernels, **AUTOREGRESSIVE).double().eval()
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(2)
    return vae


def images(n=4, pixels=784):
    return (torch.rand(n, pixels) < 0.3).double()


def all_images(pixels=4):
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * pixels)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def jacobians(decoder, rows, pixels):
    """Of some logits by x and by z: (len(rows), pixels), (len(rows), latents)."""
    x, z = images(1, pixels).requires_grad_(), draw(1, 2).requires_grad_()
    logits = decoder(z, x)[0]
    found = [torch.autograd.grad(logits[row], (x, z), retain_graph=True) for row in rows]
    return tuple(torch.cat(each) for each in zip(*found, strict=True))


@pytest.mark.parametrize(
    "pixels, width, rows",
    [(6, 1, range(6)), (6, 4, range(6)), (6, 6, range(6)), (6, 20, range(6)), (784, 300, [0, 1, 2, 400, 783])],
)
def test_a_logit_depends_on_z_and_on_all_pixels_before_its_own_and_on_no_other(pixels, width, rows):
    by_x, by_z = jacobians(decoder_of(pixels, width), rows, pixels)
    assert torch.equal(by_x != 0, torch.arange(pixels) < torch.tensor(rows).unsqueeze(1))
    assert (by_z != 0).all()


@pytest.mark.parametrize("pixels, width", [(6, 1), (6, 4), (6, 6), (6, 20)])
def test_through_the_hidden_layers_it_sees_what_units_of_its_degree_at_most_do(pixels, width):
    decoder = decoder_of(pixels, width)
    with torch.no_grad():
        decoder.from_pixels.weight[width:] = 0
    by_x, by_z = jacobians(decoder, range(pixels), pixels)
    degrees = [math.floor(unit * pixels / width) for unit in range(width)]
    highest = torch.tensor([max(degree for degree in degrees if degree <= row) for row in range(pixels)])
    assert torch.equal(by_x != 0, torch.arange(pixels) < highest.unsqueeze(1))
    assert width < pixels or highest.tolist() == list(range(pixels))
    assert (by_z != 0).all()


@pytest.mark.parametrize("width", [2, 6])
def test_the_probabilities_of_all_images_sum_to_one(width):
    joint = AutoregressiveJoint(decoder_of(width=width), all_images(), 2)
    values = joint.log_likelihood(draw(3, 1, 2).expand(3, 16, 2))
    torch.testing.assert_close(values.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert values.std(1).min() > 0.5


@pytest.mark.parametrize("pixels, width", [(4, 2), (4, 6), (30, 20), (784, 5)])
def test_the_likelihood_of_a_drawn_image_is_the_product_of_the_probabilities_it_was_drawn_with(pixels, width):
    decoder, z = decoder_of(pixels, width), draw(3, 5, 2)
    x, logits = decoder.sample(z)
    assert x.shape == logits.shape == (3, 5, pixels) and set(x.unique().tolist()) == {0.0, 1.0}
    product = Bernoulli(logits=logits).log_prob(x).sum(-1)
    joint = AutoregressiveJoint(decoder, x.flatten(0, 1), 2)
    torch.testing.assert_close(joint.log_likelihood(z.flatten(0, 1)), product.flatten())
    assert not logits.requires_grad


@pytest.mark.parametrize("width", [2, 6])
def test_images_are_drawn_as_often_as_their_probability_says(width):
    decoder, n = decoder_of(width=width), 40_000
    z = torch.tensor([[1.0, -0.5], [-1.0, 2.0]], dtype=torch.float64)
    x, _ = decoder.sample(z.expand(n, 2, 2))
    index = (x * torch.tensor([8.0, 4.0, 2.0, 1.0])).sum(-1).long()
    found = torch.stack([torch.bincount(column, minlength=16) for column in index.T]) / n
    joint = AutoregressiveJoint(decoder, all_images(), 2)
    exact = joint.log_likelihood(z.unsqueeze(1).expand(2, 16, 2)).exp()
    assert ((found - exact).abs() < 4.5 * (exact * (1 - exact) / n).sqrt()).all()
    assert (exact[0] - exact[1]).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_every_sample_has_the_likelihood_it_has_alone(shape):
    vae, x = tiny(), images()
    z = draw(*shape, 2)
    values = vae.joint(x).log_likelihood(z)
    assert values.shape == shape
    for index in itertools.product(*map(range, shape)):
        logits = vae.decoder(z[index].unsqueeze(0), x[index[-1]].unsqueeze(0))
        torch.testing.assert_close(values[index], Bernoulli(logits=logits[0]).log_prob(x[index[-1]]).sum())


def test_decoders_come_after_the_encoder_and_before_the_kernels_and_the_independent_one_is_the_default():
    for given, kind in (({}, Decoder), ({"decoder": "independent"}, Decoder), (AUTOREGRESSIVE, AutoregressiveDecoder)):
        torch.manual_seed(3)
        expected = [Encoder(2, 6), kind(2, 6), GatedGaussianPair(2, 5, 6)]
        torch.manual_seed(3)
        vae = VAE(2, 6, (GatedGaussianPair(2, 5, 6) for _ in range(1)), **given)
        assert type(vae.decoder) is kind
        for part, other in zip((vae.encoder, vae.decoder, vae.kernels[0]), expected, strict=True):
            assert all(torch.equal(*pair) for pair in zip(part.parameters(), other.parameters(), strict=True))


def test_masks_take_no_random_numbers_and_are_not_saved():
    torch.manual_seed(1)
    decoder, after = AutoregressiveDecoder(3, 7, 12), torch.rand(1)
    torch.manual_seed(1)
    sizes = [3 * 7, 12 * 19, 19, 7 * 7, 7, 7 * 12]
    for size in sizes:
        torch.rand(size)
    assert torch.equal(after, torch.rand(1))
    assert sorted(decoder.state_dict()) == sorted(dict(decoder.named_parameters()))
    other, z, x = AutoregressiveDecoder(3, 7, 12), torch.randn(4, 3), images(4, 12).float()
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(z, x), decoder(z, x))


def test_an_unknown_decoder_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^unknown decoder 'made': choose one of independent, autoregressive$"):
        VAE(2, 6, decoder="made")


@pytest.mark.parametrize("train", [False, True])
def test_a_frozen_joint_lets_gradients_through_to_z_alone(train):
    vae, x = tiny().train(train), images()
    z = draw(3, 4, 2).requires_grad_()
    plain, frozen = vae.joint(x), vae.joint(x).frozen()
    weights = list(vae.decoder.parameters())
    assert all(found.any() for found in torch.autograd.grad(plain.log_prob(z).sum(), weights))
    torch.testing.assert_close(frozen.log_prob(z), plain.log_prob(z))
    gradients = [torch.autograd.grad(each.log_prob(z).sum(), z)[0] for each in (frozen, plain)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().min() > 0
    value = frozen.log_prob(z).sum()
    assert all(found is None for found in torch.autograd.grad(value, weights, allow_unused=True))


def test_avo_trains_the_kernels_and_has_the_bounds_value():
    vae, x = tiny(3), images()
    chain, joint = vae.posterior(x), vae.joint(x)
    noise = chain.noise()
    value = objectives.avo(chain, joint, linear_alphas(3), noise=noise)
    torch.testing.assert_close(value, objectives.elbo(chain, joint, noise=noise))
    value.sum().backward()
    assert all(parameter.grad.any() for parameter in vae.kernels.parameters())
    assert all(parameter.grad is None for part in (vae.encoder, vae.decoder) for parameter in part.parameters())


def test_decoded_latents_and_reconstructions_are_drawn_images():
    vae, x = tiny(1).float(), images().float()
    for drawn, shape in ((vae.decode(torch.randn(3, 7, 2)), (3, 7)), (vae.reconstruct(x), (4,))):
        assert drawn.shape == (*shape, 784) and set(drawn.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(torch.bernoulli(drawn), drawn)


def test_simulated_images_follow_the_probabilities_given_the_pixels_before():
    vae = tiny()
    with torch.no_grad():
        vae.decoder.from_pixels.weight.mul_(5)
    z, x = likelihood.simulate_images(vae, 200)
    expected = torch.sigmoid(vae.decoder(z, x)).detach()
    for factor in (torch.ones_like(x), expected - 0.5):  # any function of z and the pixels before has no effect
        deviation = ((x - expected) * factor).sum()
        assert deviation.abs() < 4 * (expected * (1 - expected) * factor.square()).sum().sqrt()


def test_importance_sampling_and_ais_agree_with_quadrature_over_two_latents():
    vae, x = tiny(), images(3)
    with torch.no_grad():
        vae.encoder.outputs.bias[2:] = 1  # wider than the true posterior, so that few samples are enough
    weighed = likelihood.importance_sampling(vae, x, 4000)
    annealed = likelihood.ais(vae, x, 16, 60)
    z, area = evidence.grid(6.0, 60)
    for index in range(3):
        with torch.no_grad():
            log_joint = vae.joint(x[index : index + 1]).log_prob(z.flatten(0, 1).unsqueeze(1))
        exact = torch.logsumexp(log_joint.flatten(), 0) + math.log(area)
        assert weighed.se[index] < 0.08 and abs(weighed.log_px[index] - exact) < 5 * weighed.se[index]
        assert annealed.se[index] < 0.4 and abs(annealed.log_px[index] - exact) < 5 * annealed.se[index]


def test_the_parts_do_not_change_the_result():
    vae, x = tiny(1), images(5)
    assert type(targets_of(vae, x)(slice(1, 3))) is AutoregressiveJoint
    results = []
    for chunk_rows in (10**6, 16, 48):
        torch.manual_seed(0)
        results.append(likelihood.importance_sampling(vae, x, 32, chunk_rows).log_px)
    for each in results[1:]:
        torch.testing.assert_close(each, results[0])
    assert not results[0].requires_grad


def test_bidirectional_monte_carlo_closes_on_images_of_its_own_and_weights_get_no_gradient():
    vae = tiny()
    few, many = (likelihood.bdmc(vae, 10, 4, n, chunk_rows=20) for n in (3, 60))
    assert few.lower.shape == few.upper.shape == (10,)
    assert abs(many.gap) < 3 * many.gap_se + 0.2 and few.gap > many.gap
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())


def test_what_the_posterior_says_is_measured_as_for_any_decoder():
    vae, x = tiny(), images(30)
    n, variances = inference.active_units(vae, x)
    assert n == int((variances > 0.01).sum()) and variances.shape == (2,)
    found = inference.aggregate_kl(vae, x, 20)
    assert found.mean_kl == pytest.approx(found.mutual_information + found.aggregate_kl, abs=1e-6)
    gaps = inference.inference_gaps(vae, x[:3], steps=50, n_samples=500, n_particles=4, n_temperatures=20)
    assert gaps.amortisation > 0 and gaps.approximation > -3 * gaps.approximation_se - 0.1
