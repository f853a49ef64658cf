"""The autoregressive decoder: what each pixel sees, its probabilities by enumeration, and its draws against them."""

import math

import pytest
import torch
from draws import draw, generator, images
from torch.distributions import Bernoulli

from annealed_core.decoders import Autoregressive, AutoregressiveDecoder
from annealed_core.judging import inference, likelihood
from annealed_core.judging.images import mean_and_error
from annealed_core.vae import VAE, Joint


def decoder_of(pixels=4, width=6, latents=2):
    """One whose pixels depend clearly on z and on each other."""
    torch.manual_seed(0)
    decoder = AutoregressiveDecoder(latents, width, pixels).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
    return decoder


def tiny():
    torch.manual_seed(0)
    vae = VAE(2, 6, (), Autoregressive()).double().eval()
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(2)
    return vae


def all_images(pixels=4):
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * pixels)


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
    joint = Joint(decoder_of(width=width), all_images(), 2)
    values = joint.log_likelihood(draw(3, 1, 2).expand(3, 16, 2))
    torch.testing.assert_close(values.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert values.std(1).min() > 0.5


@pytest.mark.parametrize("pixels, width", [(4, 2), (4, 6), (30, 20), (784, 5)])
def test_the_likelihood_of_a_drawn_image_is_the_product_of_the_probabilities_it_was_drawn_with(pixels, width):
    decoder, z = decoder_of(pixels, width), draw(3, 5, 2)
    x, logits = decoder.sample(z)
    assert x.shape == logits.shape == (3, 5, pixels) and set(x.unique().tolist()) == {0.0, 1.0}
    product = Bernoulli(logits=logits).log_prob(x).sum(-1)
    joint = Joint(decoder, x.flatten(0, 1), 2)
    torch.testing.assert_close(joint.log_likelihood(z.flatten(0, 1)), product.flatten())
    assert not logits.requires_grad


@pytest.mark.parametrize("width", [2, 6])
def test_images_are_drawn_as_often_as_their_probability_says(width):
    decoder, n = decoder_of(width=width), 40_000
    z = torch.tensor([[1.0, -0.5], [-1.0, 2.0]], dtype=torch.float64)
    x, _ = decoder.sample(z.expand(n, 2, 2))
    index = (x * torch.tensor([8.0, 4.0, 2.0, 1.0])).sum(-1).long()
    found = torch.stack([torch.bincount(column, minlength=16) for column in index.T]) / n
    joint = Joint(decoder, all_images(), 2)
    exact = joint.log_likelihood(z.unsqueeze(1).expand(2, 16, 2)).exp()
    assert ((found - exact).abs() < 4.5 * (exact * (1 - exact) / n).sqrt()).all()
    assert (exact[0] - exact[1]).abs().max() > 0.1


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


def test_a_generator_of_its_own_decides_on_the_draws():
    decoder, z = decoder_of(6), draw(20, 2)
    before = torch.get_rng_state()
    first, second = (decoder.sample(z, generator()) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(decoder.decode(z, generator()), first[0])
    assert not torch.equal(first[0], decoder.sample(z, generator(1))[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_simulated_images_follow_the_probabilities_given_the_pixels_before():
    vae = tiny()
    with torch.no_grad():
        vae.decoder.from_pixels.weight.mul_(5)
    z, x = likelihood.simulate_images(vae, 200)
    expected = torch.sigmoid(vae.decoder(z, x)).detach()
    for factor in (torch.ones_like(x), expected - 0.5):  # any function of z and the pixels before has no effect
        deviation = ((x - expected) * factor).sum()
        assert deviation.abs() < 4 * (expected * (1 - expected) * factor.square()).sum().sqrt()


def test_annealed_importance_sampling_and_bidirectional_monte_carlo_take_this_decoder_too():
    vae, x = tiny(), images(3)
    weighed, annealed = likelihood.importance_sampling(vae, x, 4000), likelihood.ais(vae, x, 8, 30)
    assert ((weighed.log_px - annealed.log_px).abs() < 5 * (annealed.se + weighed.se)).all()
    assert (annealed.se < 0.4).all()
    few, many = (likelihood.bdmc(vae, 5, 4, n, generator=generator()) for n in (3, 25))
    gap, gap_se = mean_and_error(many.gap)
    assert abs(gap) < 3 * gap_se + 0.2 and few.gap.mean() > gap
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())


def test_what_the_posterior_says_is_measured_as_for_any_decoder():
    vae, x = tiny(), images(30)
    n, variances = inference.active_units(vae, x)
    assert n == int((variances > 0.01).sum()) and variances.shape == (2,)
    found = inference.aggregate_kl(vae, x, 20)
    assert found["mean_kl"] == pytest.approx(found["mutual_information"] + found["aggregate_kl"], abs=1e-6)
    known = {"importance sampling": likelihood.importance_sampling(vae, x[:3], 2000).log_px}
    gaps = inference.inference_gaps(vae, x[:3], steps=50, n_samples=500, log_px=known)
    assert gaps.amortisation.mean() > 0 and gaps.approximation.mean() > -0.5
