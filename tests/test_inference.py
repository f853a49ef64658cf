"""Inference gaps, aggregate posteriors and active units against auto-encoders for which they are known."""

import copy
import math

import pytest
import torch
from linear_gaussian import FLOAT, FLOWS, Blur, LinearGaussian, correlated, orthogonal, seen, turned
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence
from torch.func import jacrev

from annealed_core import evidence
from annealed_core.flows import IAF
from annealed_core.judging import inference, likelihood
from annealed_core.kernels import Gated, GatedGaussianPair
from annealed_core.vae import VAE


def closed_form_gap(model):
    """KL(best factorised Gaussian || posterior): both have the same mean and the same diagonal of the precision."""
    return 0.5 * float(model.precision.diagonal().log().sum() - torch.logdet(model.precision))


def gaps(model, x, n_samples=4000, n_temperatures=1):
    torch.manual_seed(0)
    weighed, annealed = likelihood.importance_sampling(model, x, n_samples), likelihood.ais(model, x, 4, n_temperatures)
    estimates = {"importance sampling": weighed.log_px, "ais": annealed.log_px}
    return inference.inference_gaps(model, x, 300, n_samples=n_samples, log_px=estimates)


def test_the_gaps_are_the_closed_forms_and_add_up():
    model = correlated(shift=0.3, stretch=1.3)
    torch.manual_seed(0)
    x = model.simulate(10)[1]
    found = gaps(model, x)
    assert found.estimator == "importance sampling"
    assert found.approximation.mean() == pytest.approx(closed_form_gap(model), abs=0.03)
    assert closed_form_gap(model) > 0.3
    shift = torch.full((3,), 0.3, dtype=FLOAT)
    stretched = 3 * (0.5 * (1.3**2 - 1) - math.log(1.3)) + 0.5 * float(shift @ model.precision @ shift)
    assert found.amortisation.mean() == pytest.approx(stretched, abs=0.05)
    total = found.log_px - found.amortised_bound
    torch.testing.assert_close(found.approximation + found.amortisation, total)


def test_perfect_amortisation_has_no_gap():
    model = correlated()
    found = gaps(model, model.simulate(10)[1])
    assert abs(found.amortisation.mean()) < 0.01
    assert found.approximation.mean() == pytest.approx(closed_form_gap(model), abs=0.03)


def test_a_family_that_holds_the_posterior_has_no_approximation_gap():
    model = orthogonal(shift=0.2)
    found = gaps(model, model.simulate(10)[1])
    assert abs(found.approximation.mean()) < 0.02 and found.amortisation.mean() > 0.05


def test_where_the_posterior_is_far_off_ais_gives_the_likelihood():
    model = correlated(shift=3.0, stretch=0.3)
    x = model.simulate(5)[1]
    found = gaps(model, x, n_samples=200, n_temperatures=100)
    assert found.estimator == "ais" and (found.log_px - model.log_px(x)).mean().abs() < 0.2
    assert found.approximation.mean() == pytest.approx(closed_form_gap(model), abs=0.3)


def test_with_kernels_the_base_is_fitted_and_the_models_weights_stay():
    torch.manual_seed(0)
    vae = VAE(2, 6, [GatedGaussianPair(2, 5, 6)]).eval()
    x = (torch.rand(4, 784) < 0.3).float()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    known = likelihood.importance_sampling(vae, x, 20_000).log_px
    found = inference.inference_gaps(vae, x, 100, n_samples=1000, log_px={"known": known})
    assert found.amortisation.mean() > 0 and found.approximation.mean() > -0.05
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.parametrize(("kernels", "base"), [(Gated(5), "encoder"), (Gated(5), "prior"), (IAF(hidden=5), "encoder")])
def test_bounds_bracket_the_likelihood_of_a_model_with_two_latents(kernels, base, monkeypatch):
    """Where importance sampling is good, annealing agrees with it, and the sandwich closes."""
    torch.manual_seed(0)
    model = VAE(2, 6, kernels.build(2, 2, 6), base=base).eval().requires_grad_(False)
    monkeypatch.setitem(inference.ANNEALED, "n_temperatures", 30)
    x = (torch.rand(5, 784) < 0.3).float()
    found = inference.bounds(model, x, 3, torch.Generator().manual_seed(0))
    assert (found["bounds_images"], found["annealed_images"]) == (5, 3)
    assert all(math.isfinite(value) for value in found.values())
    assert found["is_nll"] == pytest.approx(found["ais_nll"], abs=0.2)
    assert found["adaptive_minus_ais"] == pytest.approx(0, abs=0.2)  # of the images that both see
    assert found["bdmc_gap"] == pytest.approx(found["bdmc_upper"] - found["bdmc_lower"], abs=1e-3)
    assert abs(found["bdmc_gap"]) < 0.2 + 2 * found["bdmc_gap_se"] and found["is_minus_ais_se"] > 0
    assert found["approximation_gap"] > -0.1 and found["amortisation_gap"] > 0
    none_annealed = inference.bounds(model, x, 0, torch.Generator().manual_seed(0))
    assert none_annealed.items() < found.items() and "ais_nll" not in none_annealed


def informative(k, kernels=()):
    """Five latents, of which k have a say in the images."""
    torch.manual_seed(0)
    weight = torch.randn(8, 5)
    weight[:, k:] = 0
    return LinearGaussian(weight, kernels=kernels)


@pytest.mark.parametrize("kernels", [(), (Blur(1.0),)])
@pytest.mark.parametrize("k", [0, 2, 5])
def test_the_active_units_are_the_latents_that_the_decoder_uses(k, kernels):
    model = informative(k, kernels)
    x = model.simulate(400)[1]
    number, variances = inference.active_units(model, x, n_samples=40)
    assert number == k and variances.shape == (5,)
    torch.testing.assert_close(variances, model.posterior_mean(x).var(0), rtol=0.1, atol=0.009)


def test_the_noise_of_the_draws_alone_has_no_variance_on_average():
    model = informative(0, (Blur(2.0),))
    x = model.simulate(400)[1]
    found = torch.stack([inference.active_units(model, x, n_samples=16)[1] for _ in range(8)]).flatten()
    assert found.abs().max() > 0.01 and abs(found.mean()) < 4 * found.std() / len(found) ** 0.5


def test_the_threshold_is_of_the_variance():
    model = informative(2)
    x = model.simulate(100)[1]
    variances = inference.active_units(model, x)[1]
    assert inference.active_units(model, x, threshold=float(variances[:2].min()) * 1.001)[0] == 1


@pytest.mark.parametrize("kernels", [(), (Blur(0.3), Blur(0.5))])
def test_the_mean_kl_is_mutual_information_plus_the_kl_of_the_aggregate(kernels):
    model = correlated(kernels=kernels)
    found = inference.aggregate_kl(model, model.simulate(30)[1], 7)
    assert found["mean_kl"] == pytest.approx(found["mutual_information"] + found["aggregate_kl"], abs=1e-12)
    assert 0 < found["mutual_information"] <= math.log(30) and found["aggregate_kl"] > 0


def test_the_terms_are_those_of_the_mixture_over_all_images(monkeypatch):
    model = correlated(stretch=0.8)
    x = model.simulate(40)[1]
    base = model.posterior(x).base
    posteriors = Independent(Normal(base.loc, base.scale), 1)
    mixture = MixtureSameFamily(Categorical(torch.ones(40, dtype=FLOAT)), posteriors)
    prior = Independent(Normal(torch.zeros(3, dtype=FLOAT), 1.0), 1)
    torch.manual_seed(1)
    z = posteriors.sample((5000,))
    torch.manual_seed(0)
    found = inference.aggregate_kl(model, x, 500)
    aggregate = (mixture.log_prob(z) - prior.log_prob(z)).mean()
    assert found["aggregate_kl"] == pytest.approx(float(aggregate), abs=0.02)
    exact = kl_divergence(posteriors, prior)
    assert found["mean_kl"] == pytest.approx(float(exact.mean()), abs=0.02)
    assert found["mean_kl_se"] == pytest.approx(float(exact.std() / 40**0.5), rel=0.05)
    monkeypatch.setattr(inference, "WEIGHTS", 4000)
    torch.manual_seed(0)
    assert inference.aggregate_kl(model, x, 500) == pytest.approx(found)


def test_posteriors_that_do_not_overlap_have_all_the_information_and_equal_ones_none():
    apart = correlated(stretch=1e-6)
    assert inference.aggregate_kl(apart, apart.simulate(20)[1], 5)["mutual_information"] == pytest.approx(math.log(20))
    blind = informative(0)
    found = inference.aggregate_kl(blind, blind.simulate(20)[1])
    assert max(abs(found["mutual_information"]), abs(found["aggregate_kl"]), abs(found["mean_kl"])) < 1e-9


def blurred(x_count=30):
    """A chain of two kernels, images, and the exact q(z_T | x)."""
    model = correlated(kernels=(Blur(0.3), Blur(0.4)))
    x = model.simulate(x_count)[1]
    base = model.posterior(x).base
    return model, x, Independent(Normal(base.loc, (base.scale.square() + 0.25).sqrt()), 1)


def test_with_kernels_the_mean_kl_falls_from_that_of_the_elbo_to_the_exact_one():
    model, x, posteriors = blurred()
    exact = float(kl_divergence(posteriors, Independent(Normal(torch.zeros(3, dtype=FLOAT), 1.0), 1)).mean())
    torch.manual_seed(0)
    trajectory = model.posterior(x).rsample(2000)
    of_elbo = trajectory.log_q0 - trajectory.log_ratios.sum(0) - model.joint(x).log_prior(trajectory.z[-1])
    few, many = (inference.aggregate_kl(model, x, 100, n)["mean_kl"] for n in (1, 50))
    assert exact - 0.02 < many < few - 0.05 < float(of_elbo.mean()) - 0.1 and many < exact + 0.05


def test_with_kernels_the_aggregate_is_the_mixture_of_their_marginals(monkeypatch):
    model, x, posteriors = blurred()
    mixture = MixtureSameFamily(Categorical(torch.ones(30, dtype=FLOAT)), posteriors)
    torch.manual_seed(1)
    z = posteriors.sample((3000,))
    aggregate = (mixture.log_prob(z) - Normal(0.0, 1.0).log_prob(z).sum(-1)).mean()
    information = (posteriors.log_prob(z) - mixture.log_prob(z)).mean()
    monkeypatch.setattr(inference, "WEIGHTS", 2**18)
    found = inference.aggregate_kl(model, x, 100, 50)
    assert found["aggregate_kl"] == pytest.approx(float(aggregate), abs=0.04)
    assert found["mutual_information"] == pytest.approx(float(information), abs=0.04)


every_rotation = pytest.mark.parametrize("name", [name for name in FLOWS if name.startswith("householder")])


@every_rotation
@torch.no_grad()
def test_the_densities_of_turned_gaussians_are_theirs_for_every_pair_of_latents_and_image(name):
    model, x = seen(name)
    z = 2 * torch.randn(7, 3, dtype=FLOAT)
    found = inference._log_densities(model.posterior(x), z, 1)
    torch.testing.assert_close(found, turned(model, x).log_prob(z.unsqueeze(1)))


@pytest.mark.parametrize("name", FLOWS)
def test_the_densities_of_flows_are_those_of_the_change_of_variables(name):
    model, x = seen(name)
    chain = model.posterior(x)

    def push(z, context):
        for kernel in model.kernels:
            z = kernel(z, context)[0]
        return z

    start = 2 * torch.randn(len(x), 3, dtype=FLOAT)  # image by image; every z_T then belongs to one column
    volume = [torch.linalg.slogdet(jacrev(push)(z, image))[1] for z, image in zip(start, x, strict=True)]
    with torch.no_grad():
        found = inference._log_densities(chain, push(start, x), 1)
    expected = chain.base.log_prob(start) - torch.stack(volume).detach()
    torch.testing.assert_close(found.diagonal(), expected)
    assert (found - expected.unsqueeze(1)).abs().fill_diagonal_(1).min() > 1e-4  # the other images' densities differ


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_the_aggregate_of_flows_integrates_to_one(name):
    model, x = seen(name, latents=2, length=2, move=0.05, count=5)
    z, area = evidence.grid(15.0, 150)
    found = inference._log_densities(model.posterior(x), z.flatten(0, 1), 1)
    assert (found.exp().sum(0) * area).tolist() == pytest.approx([1] * 5, abs=0.02)


@every_rotation
def test_with_flows_that_turn_gaussians_all_terms_are_those_of_the_turned_ones(name, monkeypatch):
    model, x = seen(name)
    posteriors, prior = turned(model, x), MultivariateNormal(torch.zeros(3, dtype=FLOAT), torch.eye(3, dtype=FLOAT))
    mixture = MixtureSameFamily(Categorical(torch.ones(12, dtype=FLOAT)), posteriors)
    torch.manual_seed(1)
    z = posteriors.sample((20_000,))
    torch.manual_seed(0)
    found = inference.aggregate_kl(model, x, 2000)
    exact = kl_divergence(posteriors, prior)
    information = (posteriors.log_prob(z) - mixture.log_prob(z)).mean(0)
    assert found["mean_kl"] == pytest.approx(float(exact.mean()), abs=0.03)
    assert found["mean_kl_se"] == pytest.approx(float(exact.std() / 12**0.5), rel=0.1)
    assert found["mutual_information"] == pytest.approx(float(information.mean()), abs=0.02)
    assert found["aggregate_kl"] == pytest.approx(float((exact - information).mean()), abs=0.03)
    assert found["aggregate_entropy"] == pytest.approx(-float(mixture.log_prob(z).mean()), abs=0.03)
    monkeypatch.setattr(inference, "WEIGHTS", 100_000)
    torch.manual_seed(0)
    assert inference.aggregate_kl(model, x, 2000) == pytest.approx(found)


@pytest.mark.parametrize("name", FLOWS)
def test_single_precision_is_enough_for_flows(name):
    torch.manual_seed(0)
    vae = VAE(4, 6, [FLOWS[name](4, context_dim=6) for _ in range(3)]).eval()
    x = (torch.rand(20, 784) < 0.3).float()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        z = vae.posterior(x).rsample().z[-1]
        found = inference._log_densities(vae.posterior(x), z, 1)
        exact = inference._log_densities(copy.deepcopy(vae).double().posterior(x.double()), z.double(), 1)
    torch.testing.assert_close(found, exact, atol=1e-3, rtol=1e-4)
    terms = inference.aggregate_kl(vae, x, 5)
    assert 0 < terms["mutual_information"] <= math.log(20)
    assert terms["mean_kl"] == pytest.approx(terms["mutual_information"] + terms["aggregate_kl"], abs=1e-9)


def test_the_entropy_of_the_aggregate_is_that_of_one_posterior_and_of_which_it_is():
    of_normal = 0.5 * math.log(2 * math.pi * math.e)
    blind = informative(0)
    found = inference.aggregate_kl(blind, blind.simulate(50)[1], 400)
    assert found["aggregate_entropy"] == pytest.approx(5 * of_normal, abs=0.05)
    apart = correlated(stretch=1e-6)
    x = apart.simulate(20)[1]
    found, scale = inference.aggregate_kl(apart, x, 400), apart.posterior(x).base.scale
    of_one = float((of_normal + scale.log()).sum(-1)[0])
    assert found["aggregate_entropy"] == pytest.approx(of_one + math.log(20), abs=0.1)
    assert found["aggregate_entropy_se"] < 0.05


def test_the_errors_are_those_over_images():
    model = correlated()
    x = model.simulate(40)[1]
    found = [inference.aggregate_kl(model, x, 1) for _ in range(300)]
    # Of single draws, each term's spread over repetitions is that within an image; over images it is at least that.
    for name in ("mean_kl", "mutual_information", "aggregate_kl", "aggregate_entropy"):
        spread = torch.tensor([each[name] for each in found]).std()
        claimed = torch.tensor([each[name + "_se"] for each in found]).square().mean().sqrt()
        assert 0.8 * spread < claimed < 2.5 * spread, name
