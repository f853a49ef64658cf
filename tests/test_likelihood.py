"""Likelihood estimates against an auto-encoder whose likelihood is known, and Bernoulli ones against the plain form."""

import math

import pytest
import torch
from draws import images
from linear_gaussian import LinearGaussian, correlated, orthogonal

from annealed_core.chain import Chain
from annealed_core.judging import images as parts
from annealed_core.judging import likelihood
from annealed_core.kernels import GatedGaussianPair
from annealed_core.vae import VAE


def tiny(n_transitions=0, latents=2):
    """A VAE whose batch normalisation has statistics and parameters of its own."""
    torch.manual_seed(0)
    vae = VAE(latents, 6, (GatedGaussianPair(latents, 5, 6) for _ in range(n_transitions))).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for _ in range(20):
            vae.decoder(2 * torch.randn(50, latents, dtype=torch.float64) + 1)
    return vae.eval()


def at_a_time(monkeypatch, rows, weights=2**22):
    """Have images taken in other parts."""
    for module in (parts, likelihood):
        monkeypatch.setattr(module, "CHUNK_ROWS", rows)
    monkeypatch.setattr(likelihood, "WEIGHTS", weights)


def test_importance_sampling_finds_the_exact_likelihood_and_how_well_it_does():
    model = correlated(shift=0.2, stretch=1.4)
    x = model.simulate(20)[1]
    torch.manual_seed(0)
    found = likelihood.importance_sampling(model, x, 20_000)
    errors = found.log_px - model.log_px(x)
    assert errors.abs().max() < 0.05 and errors.mean().abs() < 0.02
    assert 0.3 < (errors.square().mean() / found.se.square().mean()).sqrt() < 2
    assert (found.ess < 0.8).all() and (found.ess > 0.1).all() and (found.pareto_k < 0.7).all()


def test_with_the_exact_posterior_all_weights_are_equal():
    model = orthogonal()
    x = model.simulate(3)[1]
    found = likelihood.importance_sampling(model, x, 100)
    torch.testing.assert_close(found.log_px, model.log_px(x))
    torch.testing.assert_close(found.ess, torch.ones_like(found.ess))
    assert (found.se < 1e-9).all()


def test_a_fitted_proposal_finds_the_exact_likelihood_where_the_posterior_is_bad():
    model = correlated(shift=0.8, stretch=0.5)
    x = model.simulate(20)[1]
    torch.manual_seed(0)
    plain = likelihood.importance_sampling(model, x, 2000)
    found = likelihood.adaptive_importance_sampling(model, x, 2000)
    errors = found.log_px - model.log_px(x)
    assert errors.abs().max() < 0.05 and errors.mean().abs() < 0.005
    assert 0.5 < (errors.square().mean() / found.se.square().mean()).sqrt() < 2
    assert (found.ess > 0.6).all() and (found.pareto_k < 0.5).all() and plain.ess.mean() < 0.2


@pytest.mark.parametrize("n_rounds", [1, 4])
def test_a_fitted_proposal_is_unbiased_from_few_draws(n_rounds, monkeypatch):
    at_a_time(monkeypatch, 5000)
    model = correlated(shift=0.3, stretch=1.4)
    x = model.simulate(1)[1].expand(4000, -1)
    torch.manual_seed(0)
    found = likelihood.adaptive_importance_sampling(model, x, 30, n_rounds)
    ratios = (found.log_px - model.log_px(x[:1])).exp()
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / 4000**0.5 < 0.1


def test_a_fitted_proposal_holds_in_forty_dimensions():
    torch.manual_seed(0)
    model = LinearGaussian(torch.randn(60, 40, dtype=torch.float64) * 0.25)
    x = model.simulate(4)[1]
    found = likelihood.adaptive_importance_sampling(model, x, 4000)
    errors = found.log_px - model.log_px(x)
    assert errors.abs().max() < 0.1 and (found.pareto_k < 0.7).all() and (found.ess > 0.2).all()


def test_a_model_in_training_mode_is_not_changed_before_it_is_refused():
    vae = tiny().train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(ValueError, match=r"^model must be in evaluation mode"):
        likelihood.bdmc(vae, 2)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_a_fitted_proposal_takes_the_chains_own_states():
    vae, x = tiny(n_transitions=2), images()
    torch.manual_seed(0)
    found = likelihood.adaptive_importance_sampling(vae, x, 4000)
    axis = torch.linspace(-6, 6, 101, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(1)
    exact = torch.cat([torch.logsumexp(vae.joint(one).log_prob(grid), 0) for one in x.split(1)])
    exact = exact + 2 * (axis[1] - axis[0]).log()
    assert ((found.log_px - exact).abs() < 4 * found.se).all() and (found.se < 0.02).all()
    assert (found.pareto_k < 0.7).all()


@pytest.mark.parametrize("start", ["prior", "posterior"])
def test_ais_finds_the_exact_likelihood_from_the_prior_and_from_a_bad_posterior(start):
    model = correlated(shift=0.5, stretch=0.8)
    x = model.simulate(20)[1]
    torch.manual_seed(0)
    found = likelihood.ais(model, x, n_particles=16, n_temperatures=200, start=start)
    errors = found.log_px - model.log_px(x)
    assert errors.mean().abs() < 0.05 and errors.square().mean().sqrt() < 0.1
    assert (found.ess > 0.5).all() and (found.se < 0.2).all() and found.pareto_k.isnan().all()


def test_ais_of_one_temperature_from_the_posterior_is_importance_sampling():
    model = correlated(shift=0.1, stretch=1.4)
    x = model.simulate(5)[1]
    torch.manual_seed(0)
    one = likelihood.ais(model, x, n_particles=4000, n_temperatures=1, start="posterior")
    other = likelihood.importance_sampling(model, x, 4000)
    assert ((one.log_px - other.log_px).abs() < 4 * (one.se.square() + other.se.square()).sqrt()).all()
    torch.testing.assert_close(one.ess, other.ess, rtol=0, atol=0.1)


@pytest.mark.parametrize("n_particles, n_temperatures, widest", [(8, 100, 0.1), (1, 3, 20.0), (4, 3, 10.0)])
@pytest.mark.parametrize("start", ["prior", "posterior"])
def test_bidirectional_monte_carlo_brackets_the_exact_likelihood(n_particles, n_temperatures, widest, start):
    model = correlated(shift=0.7, stretch=0.7)
    drawn = []
    torch.manual_seed(0)
    given = {"n_particles": n_particles, "n_temperatures": n_temperatures, "start": start}
    bounds = likelihood.bdmc(model, 150, simulate=lambda n: drawn.extend(model.simulate(n)) or drawn, **given)
    exact = model.log_px(drawn[1])
    below, above = exact - bounds.lower, bounds.upper - exact
    for distance in (below, above):
        error = distance.std() / len(distance) ** 0.5
        assert distance.mean() > -3 * error
        if n_temperatures == 3:
            assert distance.mean() > 2 * error
    assert torch.equal(bounds.gap, bounds.upper - bounds.lower) and bounds.gap.mean() < widest


def test_more_particles_bring_both_bounds_closer():
    model = correlated()
    found = []
    for n_particles in (1, 16):
        torch.manual_seed(0)
        z, x = model.simulate(100)
        found.append(likelihood.bdmc(model, 100, n_particles, 3, simulate=lambda n, pair=(z, x): pair))
    exact = model.log_px(x)
    one, many = found
    assert (exact - many.lower).mean() < 0.7 * (exact - one.lower).mean()
    assert (many.upper - exact).mean() < 0.9 * (one.upper - exact).mean()


def test_with_an_exact_base_both_bounds_are_the_likelihood():
    model = orthogonal()
    drawn = model.simulate(4)
    bounds = likelihood.bdmc(model, 4, 2, 5, start="posterior", simulate=lambda n: drawn)
    for bound in (bounds.lower, bounds.upper):
        torch.testing.assert_close(bound, model.log_px(drawn[1]))
    assert (bounds.gap.abs() < 1e-9).all()


def test_bidirectional_monte_carlo_of_a_vae_draws_its_own_images():
    torch.manual_seed(0)
    vae = tiny()
    bounds = likelihood.bdmc(vae, 6, 4, 30)
    assert bounds.lower.shape == bounds.upper.shape == (6,) and -0.5 < bounds.gap.mean() < 2
    z, x = likelihood.simulate_images(vae, 3000)
    assert z.shape == (3000, 2) and x.shape == (3000, 784) and set(x.unique().tolist()) == {0.0, 1.0}
    assert z.mean().abs() < 0.1 and z.std() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(x.mean(), vae.decode(z).mean(), rtol=0, atol=0.002)


@pytest.mark.parametrize("n_transitions", [0, 1])
def test_the_parts_do_not_change_the_result(n_transitions, monkeypatch):
    vae, x = tiny(n_transitions), images(5)
    results = []
    for rows, weights in ((10**6, 10**6), (16, 10**6), (48, 48), (8, 1)):
        at_a_time(monkeypatch, rows, weights)
        torch.manual_seed(0)
        results.append(likelihood.importance_sampling(vae, x, 32))
    for each in results[1:]:
        for name in ("log_px", "se", "ess", "pareto_k"):
            torch.testing.assert_close(getattr(each, name), getattr(results[0], name))


def test_no_more_rows_than_asked_for_are_decoded_at_a_time(monkeypatch):
    model = correlated()
    x = model.simulate(7)[1]
    for rows in (5, 100):
        at_a_time(monkeypatch, rows)
        model.rows.clear()
        likelihood.adaptive_importance_sampling(model, x, 40, 1)
        assert max(model.rows) <= rows and sum(model.rows) == 2 * 40 * 7
    at_a_time(monkeypatch, 25)
    for function, more in ((likelihood.importance_sampling, {}), (likelihood.ais, {"n_temperatures": 2})):
        model.rows.clear()
        function(model, x, 10, **more)
        assert max(model.rows) == 20
    at_a_time(monkeypatch, 4)
    model.rows.clear()
    likelihood.importance_sampling(model, x, 10)
    assert max(model.rows) == 4 and sum(model.rows) == 70


@pytest.mark.parametrize("estimate", [likelihood.importance_sampling, likelihood.ais])
def test_without_a_generator_that_of_the_chain_is_drawn_from(estimate):
    model = correlated()
    x, plain = model.simulate(2)[1], model.posterior
    few = {"n_temperatures": 3} if estimate is likelihood.ais else {}
    expected = estimate(model, x, 4, **few, generator=torch.Generator().manual_seed(0)).log_px
    model.posterior = lambda x: Chain(plain(x).base, generator=torch.Generator().manual_seed(0))
    assert torch.equal(estimate(model, x, 4, **few).log_px, expected)


def test_sigmoid_alphas_rise_from_0_to_1_and_are_dense_at_both_ends():
    alphas = likelihood.sigmoid_alphas(100)
    steps = alphas.diff()
    assert alphas[0] == 0 and alphas[-1] == 1 and (steps > 0).all()
    torch.testing.assert_close(steps, steps.flip(0))
    assert steps[50] > 5 * steps[0]
    by_hand = (1 / (1 + math.exp(4 * 0.5)) - 1 / (1 + math.exp(4))) / (math.tanh(2))
    assert float(alphas[25]) == pytest.approx(by_hand)
