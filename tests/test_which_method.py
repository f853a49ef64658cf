"""Which method: evaluations are counted and equal, a real posterior is what its reference says, claims read records."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Bernoulli

from annealed_core.dais import Drift, Leapfrog
from annealed_core.description import from_json, to_json
from annealed_core.energies import find
from annealed_core.nested import NVI, TrajectoryBalance
from annealed_core.objectives import AVO, ELBO, IWAE
from annealed_core.running.experiment import run
from annealed_core.running.mnist import Mnist
from annealed_core.smc import Moved
from annealed_core.targets import LearnedAlphas
from annealed_core.vae import Independent
from annealed_report import logistic
from annealed_report.which_method import (
    BARS,
    BUDGETS,
    METHODS,
    SAMPLERS,
    TRAINED,
    Compared,
    Continued,
    Counted,
    Sampled,
    claims,
    exact_of,
    figures,
    line,
    target_of,
    which_bars,
    which_method,
    which_ring,
)

FEW = {"n_transitions": 2, "steps": 10, "batch": 16, "samples": 500}
seeded = lambda seed=0: torch.Generator().manual_seed(seed)


# ---- the real posterior


def test_the_regression_is_the_likelihood_of_its_labels_and_the_prior():
    features, labels = logistic.data()
    assert (
        features.shape == (569, 31)
        and int(labels.sum()) == 212
        and torch.equal(features[:, 0], torch.ones(569).double())
    )
    torch.testing.assert_close(features[:, 1:].mean(0), torch.zeros(30).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(features[:, 1:].var(0, correction=0), torch.ones(30).double())
    z = 0.3 * torch.randn(4, 31, generator=seeded()).double()
    likelihood = Bernoulli(logits=z @ features.T).log_prob(labels).sum(-1)
    prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(logistic.target().log_prob(z), likelihood + prior)


def test_the_reference_is_the_posteriors():
    known, draws, target = logistic.reference(), logistic.draws().double(), logistic.target()
    assert draws.shape == (2000, 31) and known["r_hat"] < 1.01 and known["ess"] > 10_000
    assert abs(known["log_z"] - known["log_z_below"]) < 0.02 > abs(known["log_z"] - known["log_z_above"])
    assert ((draws.mean(0) - known["mean"]).abs() < 5 * known["sd"] / 2000**0.5).all()
    torch.testing.assert_close(draws.std(0), known["sd"], rtol=0.1, atol=0)
    # Independently of NUTS: at draws of the posterior the gradient of log f has mean 0, and E[-z_i d_i log f] is 1.
    z = draws.requires_grad_()
    (slope,) = torch.autograd.grad(target.log_prob(z).sum(), z)
    for found, wanted in ((slope, 0.0), (-(z.detach() - known["mean"]) * slope, 1.0)):
        error = found.std(0) / 2000**0.5
        assert ((found.mean(0) - wanted).abs() < 4.5 * error).all()


def test_the_evidence_of_the_reference_is_that_of_importance_sampling():
    # From Laplace's approximation, which knows nothing of the reference.
    target = logistic.target()
    z = torch.zeros(31).double()
    for _ in range(20):
        hessian = torch.autograd.functional.hessian(target.log_prob, z)
        (slope,) = torch.autograd.grad(target.log_prob(z.requires_grad_()), z)
        z = z.detach() - torch.linalg.solve(hessian, slope)
    laplace = torch.distributions.MultivariateNormal(z, precision_matrix=-0.7 * hessian)  # wider: the tails are heavy
    noise = torch.randn(4000, 31, generator=seeded()).double()
    drawn = z + noise @ torch.linalg.inv(torch.linalg.cholesky(-0.7 * hessian))
    log_weights = target.log_prob(drawn) - laplace.log_prob(drawn)
    estimate = torch.logsumexp(log_weights, 0) - math.log(4000)
    assert float(estimate) == pytest.approx(target.log_normalizer, abs=0.3)


# ---- figures and evaluations


def test_of_exact_draws_the_figures_are_what_they_should_be():
    for name in ("D", "logistic"):
        z = exact_of(name, 2000, seeded())
        target = target_of(name)
        sets = [(each, torch.zeros(1000), target.log_normalizer, 1.0) for each in z.split(1000)]
        found = figures(name, sets, seeded(1))
        assert found["log_z_error_2000"] == 0 and found["ess"] == 1 and abs(found["energy_distance"]) < 0.02
        assert found["coverage"] == pytest.approx(0.9, abs=0.02) and found["coverage_least"] > 0.86
    assert found["mean_error"] < 0.1 and found["sd_error"] < 0.1
    z = exact_of("D", 4000, seeded())
    some = z[z[:, 0] > -1]  # one of four modes is lost, a tenth of the mass
    found = figures("D", [(some, torch.zeros(len(some)), 0.0, 1.0)], seeded(1))
    assert found["modes_found"] == 3 and found["mode_error"] == pytest.approx(0.1, abs=0.02)
    weighted = torch.where(z[:, 0] > -1, 0.0, -torch.inf)
    assert figures("D", [(z, weighted, 0.0, 0.9)], seeded(1))["modes_found"] == 3


@pytest.mark.parametrize(
    ("fields", "evaluations"),
    [
        ({"objective": ELBO()}, 1),
        ({"objective": IWAE(4)}, 4),
        ({"objective": AVO()}, 2),
        ({"objective": NVI()}, 2),
        ({"objective": ELBO(), "kernel": Leapfrog()}, 3),
        ({"objective": AVO(alphas=LearnedAlphas())}, 2),  # its fit looks at the same draws
        ({"objective": NVI(), "kernel": Moved(n_leapfrog=3)}, 1 + 2 * 3),  # the start, and the leaps of each transition
        ({"objective": TrajectoryBalance(), "kernel": Drift()}, 3),  # each state once, for both of its neighbours
    ],
)
def test_evaluations_of_a_step_are_counted(fields, evaluations):
    assert Compared(**FEW, **fields).evaluations_per_sample() == evaluations


def test_every_method_has_the_same_evaluations_on_a_target():
    for target in ("D", "logistic"):
        for method in METHODS:
            spec = line(method, target)
            if method in SAMPLERS:
                found = 5 * spec.particles * spec.n_temperatures
            else:
                found = spec.steps * spec.batch * spec.evaluations_per_sample()
            assert found == pytest.approx(BUDGETS[target], rel=0.1), method
    assert len(which_method()) == len(BUDGETS) * len(METHODS) * 5 and set(METHODS) == {*TRAINED, *SAMPLERS}


def test_the_ring_spends_nvis_samples_and_the_bars_have_fresh_seeds():
    assert all(spec.batch * (spec.n_transitions + 1) == 288 and spec.steps == 20_000 for spec in which_ring())
    assert {spec.seed for spec in which_bars()} == set(range(200, 205)) and set(BARS) < set(BUDGETS)


# ---- runs


@pytest.mark.parametrize("fields", [{}, {"objective": NVI(resample=True), "resample": 0.9}, {"kernel": Leapfrog(0.2)}])
def test_a_chain_is_compared_and_found_again(store, fields):
    spec = Compared(**FEW, **fields)
    found = run(spec)
    assert from_json(to_json(spec)) == spec and run(spec).metrics == found.metrics
    assert found.metrics["log_z_error_2000"] < 3 and found.metrics["evaluations_sampling"] >= 2000
    assert found.metrics["evaluations_training"] == 160 * spec.evaluations_per_sample()
    assert ("eubo" in found.metrics) == (not isinstance(spec.kernel, Leapfrog))
    assert found.metrics.get("eubo", 1.0) > 0 > found.metrics["elbo"] and 0 < found.metrics["ess_100"] <= 1


def test_samplers_are_judged_alike(store):
    for fields in SAMPLERS.values():
        found = run(Sampled(n_temperatures=10, particles=1000, **fields)).metrics
        assert found["log_z_error_2000"] < 0.3 and found["modes_found"] == 4 and found["evaluations_training"] == 0
        assert found["evaluations_sampling"] >= 5 * 10 * 1000
        if not fields:
            assert found["evaluations_sampling"] == (1 + 5 * 10) * 1000 and found["elbo"] < 0


def test_a_counted_target_is_the_target_itself():
    counted = Counted(target_of("D"))
    z = torch.randn(3, 4, 2)
    for again in (z, z[1:].double(), z + 1):
        counted.log_prob(again)
    assert counted.evaluations == 24 and counted.log_normalizer == 0 and counted.dim == 2


@pytest.mark.usefixtures("few")
def test_an_auto_encoder_goes_on_from_a_trained_one(store):
    few = {"train_images": 300, "width": 32, "latents": 4, "nll_images": 50, "nll_samples": 5}
    model = Mnist(decoder=Independent(norm=False), epochs=2, objective=ELBO(), **few)
    spec = Continued(
        model=model, decoder=Independent(norm=False), kernel=Leapfrog(0.05), n_transitions=2, epochs=1, **few
    )
    found, trained = spec.auto_encoder(), run(model).vae
    assert all(torch.equal(a, b) for a, b in zip(found.decoder.parameters(), trained.decoder.parameters(), strict=True))
    assert len(found.kernels) == 2 and from_json(to_json(spec)) == spec
    assert run(spec.replace(objective=ELBO())).metrics["nll"] > 0


# ---- claims


def test_claims_read_records_of_their_studies():
    metrics = {"log_z_error_2000": 0.02, "modes_found": 40, "ess": 0.95, "ess_100": 0.97, "nll": 90.0}
    specs = {"which_bars": which_bars(), "which_ring": which_ring(), "which_method": which_method()}
    for claim in claims():
        assert claim.sign in (-1, 1) and claim.contrast([]) is None, claim.text
        if claim.study in specs:
            found = claim.contrast([SimpleNamespace(spec=spec, metrics=metrics) for spec in specs[claim.study]])
            assert found is not None and math.isfinite(found.mean), claim.text
    by_text = {claim.text.partition(" (")[0]: claim for claim in claims()}
    runs = [SimpleNamespace(spec=spec, metrics=metrics) for spec in which_bars()]
    assert by_text["GMM-40: a trained chain keeps all 40 modes"].contrast(runs).mean > 0
    assert (
        by_text["Many-well-32: a trained chain's log Z from 2,000 samples is off by at most 0.05"].contrast(runs).mean
        < 0
    )
    assert (
        by_text["Funnel-10: a trained chain's log Z from 2,000 samples is off by at most 0.003"].contrast(runs).mean > 0
    )


def test_a_chain_whose_evaluations_are_counted_starts_as_the_one_that_is_trained():
    assert Compared(target="D", base_scale=3.0).untrained(find("D")).base.scale.tolist() == [3.0, 3.0]
    assert Compared(target="ring8").untrained(find("ring8")).base.scale.tolist() == [5.0, 5.0]


def test_the_batch_of_a_method_does_not_depend_on_the_state_of_the_generator():
    found = set()
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        found.add(line("CRAFT", "ring8").evaluations_per_sample())
    assert len(found) == 1
