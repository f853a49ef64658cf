"""KL of single latents and coverage against closed forms and plain loops."""

import json
import math

import pytest
import torch
from linear_gaussian import FLOAT, Blur, LinearGaussian, correlated, seen, turned
from torch.distributions import Normal, kl_divergence

from annealed_core.flows import HouseholderSequence
from annealed_core.judging import exploration, inference
from annealed_core.judging import images as parts
from annealed_core.kernels import GatedGaussianPair
from annealed_core.vae import VAE

PRIOR = Normal(torch.zeros((), dtype=FLOAT), 1.0)


def latent_kl(model, x, n_samples=256):
    return exploration.latent_information(model, x, n_samples, len(x))[0]


def marginal_kl(loc, scale):
    return kl_divergence(Normal(loc, scale), PRIOR).mean(0)


def test_without_kernels_the_kl_of_each_latent_is_the_closed_form():
    model = correlated(shift=torch.tensor([0.0, 0.5, -2.0], dtype=FLOAT), stretch=0.7)
    x = model.simulate(30)[1]
    base = model.posterior(x).base
    found = latent_kl(model, x)
    torch.testing.assert_close(found, marginal_kl(base.loc, base.scale))
    assert found.sum() == pytest.approx(float(kl_divergence(Normal(base.loc, base.scale), PRIOR).sum(-1).mean()))


@pytest.mark.parametrize("n_samples, bias", [(256, 0.0025), (64, 0.0145)])
def test_with_kernels_the_kl_of_each_latent_has_the_bias_that_is_stated(n_samples, bias):
    torch.manual_seed(0)
    model = correlated(kernels=(Blur(0.3), Blur(0.4)), stretch=0.5)
    x = model.simulate(1000)[1]
    base = model.posterior(x).base
    exact = marginal_kl(base.loc, (base.scale.square() + 0.25).sqrt())
    errors = torch.stack([latent_kl(model, x, n_samples) for _ in range(4)]) - exact
    assert errors.shape == (4, 3) and errors.abs().max() < bias + 0.015
    assert abs(float(errors.mean()) - bias) < 0.0015 + 0.1 * bias


@pytest.mark.parametrize("name", ["householder", "householder sequence"])
def test_the_kl_of_each_latent_is_that_of_the_marginals_of_a_turned_gaussian(name):
    model, x = seen(name, count=200)
    posteriors = turned(model, x)
    exact = marginal_kl(posteriors.loc, posteriors.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt())
    torch.manual_seed(0)
    torch.testing.assert_close(latent_kl(model, x), exact, atol=0.03, rtol=0)
    model.kernels = ()
    assert (latent_kl(model, x) - exact).abs().max() > 0.1


@pytest.mark.parametrize(
    "draw, entropy, bias",
    [
        (lambda n: torch.rand(n, 4000, dtype=FLOAT), 0.0, 0.0),
        (lambda n: -5 + 1e-3 * torch.randn(n, 4000, dtype=FLOAT), 0.5 * math.log(2 * math.pi * math.e * 1e-6), -0.0023),
        (lambda n: torch.empty(n, 4000, dtype=FLOAT).exponential_(), 1.0, 0.0),
        (lambda n: torch.randn(n, 4000, dtype=FLOAT) + 3 * (-1.0) ** (torch.rand(n, 4000) < 0.5), 2.1082, 0.0095),
    ],
)
def test_the_entropy_of_draws_is_that_of_their_density(draw, entropy, bias):
    torch.manual_seed(0)
    found = exploration._entropy(draw(256))
    assert found.shape == (4000,) and found.dtype == FLOAT
    assert abs(float(found.mean()) - entropy - bias) < 5 * float(found.std()) / 4000**0.5 + 0.0005


def test_draws_that_rounding_has_made_equal_have_a_finite_entropy():
    draws = 1 + 1e-9 * torch.randn(256, 3)
    assert (exploration._entropy(draws) < -10).all() and exploration._entropy(draws).isfinite().all()


def plain_loop(real, generated, k):
    """Covered or not, for each real image, and the density, as the paper has them."""
    covered, inside = [], 0
    for i, image in enumerate(real):
        others = sorted(float((image - other).norm()) for j, other in enumerate(real) if j != i)
        within = [float((image - other).norm()) <= others[k - 1] for other in generated]
        covered.append(any(within))
        inside += sum(within)
    return covered, inside / (k * len(generated))


@pytest.mark.parametrize("n, m, k, away", [(30, 20, 1, 0), (30, 50, 5, 0), (7, 3, 6, 0), (60, 60, 2, 2000)])
def test_coverage_is_that_of_a_plain_loop(n, m, k, away, monkeypatch):
    torch.manual_seed(0)
    real, generated, labels = away + torch.randn(n, 4), away + 1.5 * torch.randn(m, 4), torch.arange(n) % 3
    covered, density = plain_loop(real, generated, k)
    found = exploration.coverage(real, generated, labels, k)
    assert 0 < found.coverage < 1 or k == 6
    assert found.coverage == pytest.approx(sum(covered) / n) and found.density == pytest.approx(density)
    assert found.by_class == pytest.approx({c: sum(covered[c::3]) / len(covered[c::3]) for c in range(3)})
    monkeypatch.setattr(exploration, "_DISTANCES", 60)
    assert exploration.coverage(real, generated, labels, k) == found
    assert exploration.coverage(real, generated, k=k).by_class == {}


def test_coverage_is_one_of_the_images_themselves_and_zero_of_far_ones():
    torch.manual_seed(0)
    real = torch.rand(200, 784)
    same, far = exploration.coverage(real, real), exploration.coverage(real, real + 1)
    assert (same.coverage, same.density) == (1, pytest.approx(6 / 5, abs=0.01))  # each lies in its own ball too
    assert (far.coverage, far.density) == (0, 0)
    repeated = real[:40].repeat(5, 1)  # no distance to the four nearest
    assert exploration.coverage(repeated, repeated, k=4).coverage == 1


@pytest.mark.parametrize("n, m, k", [(100, 100, 5), (100, 50, 2), (60, 120, 1)])
def test_coverage_of_the_same_distribution_is_as_expected(n, m, k):
    torch.manual_seed(0)
    found = [exploration.coverage(torch.randn(n, 3), torch.randn(m, 3), k=k) for _ in range(100)]
    covered, density = torch.tensor([each.coverage for each in found]), torch.tensor([each.density for each in found])
    expected = 1 - math.prod((n - i) / (m + n - i) for i in range(1, k + 1))
    assert abs(covered.mean() - expected) < 4 * covered.std() / 10 < 0.05
    assert abs(density.mean() - 1) < 4 * density.std() / 10 < 0.1


def orthogonal(shift=0.0, stretch=1.0, kernels=()):
    """A model whose latents are independent given x too, so that its posterior is exact and q(z) the prior."""
    weight = torch.zeros(6, 3)
    weight[0, 0], weight[2, 1], weight[5, 2] = 1.0, 0.3, 2.0
    return LinearGaussian(weight, shift=shift, stretch=stretch, kernels=kernels)


@pytest.mark.parametrize("kernels", [[], [HouseholderSequence(3).double()]], ids=["plain", "turned"])
def test_the_aggregate_of_an_exact_posterior_has_the_moments_of_the_prior(kernels):
    torch.manual_seed(0)
    model = orthogonal(kernels=kernels)
    _, x = model.simulate(5000)
    kl, entropy = exploration.aggregate_gaussian(model, x)
    assert abs(kl) < 0.002 and entropy == pytest.approx(1.5 * (1 + math.log(2 * math.pi)), abs=0.04)


def test_the_aggregate_is_off_the_prior_by_its_shift_and_has_no_bias_from_few_images():
    torch.manual_seed(0)
    model = orthogonal(shift=0.5)
    found = torch.tensor([exploration.aggregate_gaussian(model, model.simulate(40)[1]) for _ in range(200)])
    (kl, entropy), error = found.mean(0).tolist(), (found.std(0) / 200**0.5).tolist()
    assert kl == pytest.approx(3 * 0.5**2 / 2, abs=3 * error[0] + 0.01)
    assert entropy == pytest.approx(1.5 * (1 + math.log(2 * math.pi)), abs=3 * error[1] + 0.01)


@pytest.mark.parametrize("kernels", [[], [HouseholderSequence(3, length=2).double()]], ids=["plain", "turned twice"])
def test_a_latents_information_is_the_entropy_that_the_image_takes(kernels):
    torch.manual_seed(0)
    model = orthogonal(stretch=0.5, kernels=kernels)
    _, x = model.simulate(5000)
    found = exploration.latent_information(model, x)[1]
    z = model.posterior(x).rsample(50).z[-1]  # Gaussian in every direction
    expected = 0.5 * (z.flatten(0, 1).var(0) / z.var(0).mean(0)).log()
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    if not kernels:  # q(z) is a little narrower than the prior, and given an image half as wide as it should be
        scale = 0.5 * model.precision.diagonal().rsqrt()
        exact = 0.5 * (1 - model.precision.diagonal().reciprocal() * 0.75).log() - scale.log()
        torch.testing.assert_close(found, exact, atol=0.03, rtol=0)


def tiny(kernels=()):
    torch.manual_seed(0)
    return VAE(3, 6, kernels).eval()


def test_prior_samples_are_what_the_decoder_makes_of_normal_draws(monkeypatch):
    model = tiny()
    z = torch.randn((50, 3), generator=torch.Generator().manual_seed(1))
    found = exploration.prior_samples(model, 50, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, model.decode(z))
    assert found.shape == (50, 784) and (found > 0).all() and (found < 1).all() and not found.requires_grad
    monkeypatch.setattr(parts, "CHUNK_ROWS", 7)
    torch.testing.assert_close(exploration.prior_samples(model, 50, torch.Generator().manual_seed(1)), found)
    torch.manual_seed(1)
    first = exploration.prior_samples(model, 50)
    torch.testing.assert_close(first, found)
    assert not torch.equal(exploration.prior_samples(model, 50), first)


@pytest.mark.parametrize("kernels", [list, lambda: [GatedGaussianPair(3, 5, 6)], lambda: [HouseholderSequence(3, 6)]])
def test_explore_is_all_measures_as_plain_values(kernels):
    model = tiny(kernels())
    x, grey, labels = (torch.rand(60, 784) < 0.3).float(), torch.rand(80, 784), torch.arange(80) % 9
    torch.manual_seed(0)
    found = exploration.explore(model, x, grey, labels, n_images=40, n_coverage=70)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    torch.manual_seed(0)
    covered = exploration.coverage(grey[:70], exploration.prior_samples(model, 70), labels[:70])
    assert (found["coverage"], found["density"]) == (covered.coverage, covered.density)
    assert found["coverage_by_digit"] == [*(covered.by_class[digit] for digit in range(9)), None]
    moments = exploration.aggregate_gaussian(model, x)
    kl, information = exploration.latent_information(model, x, n_images=40)
    terms = inference.aggregate_kl(model, x[:40])
    assert (found["aggregate_gaussian_kl"], found["aggregate_gaussian_entropy"]) == moments
    assert {name: found[name] for name in terms} == terms
    assert found["latent_kl"] == kl.tolist() and found["latent_information"] == information.tolist()
    assert found["mean_kl"] == pytest.approx(found["mutual_information"] + found["aggregate_kl"])
    sizes = (found["information_images"], found["coverage_images"], found["coverage_k"])
    assert sizes == (40, 70, 5) and found["information_ceiling"] == math.log(40)
