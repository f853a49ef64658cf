"""Variants of the bound: their limits and order, beta-TC's terms against exact ones, categories against their sum."""

import itertools
import math

import pytest
import torch
from draws import draw, images
from linear_gaussian import correlated
from torch.distributions import Categorical, Normal, kl_divergence

from annealed_core.chain import Chain
from annealed_core.description import from_json, to_json
from annealed_core.evidence import log_mean_weight
from annealed_core.fit import fit
from annealed_core.kernels import DiagonalGaussian, Gated
from annealed_core.objectives import ELBO, IWAE
from annealed_core.running.density import Density
from annealed_core.running.experiment import run
from annealed_core.running.mnist import Mnist
from annealed_core.schedules import Between, Constant, Cyclical, Geometric, Linear, Then
from annealed_core.vae import Independent
from annealed_core.variants import (
    MIWAE,
    BetaELBO,
    BetaTC,
    FreeBits,
    JointCapacity,
    MixedBase,
    MixedJoint,
    MixedVAE,
    Relaxed,
    tc_terms,
)

SCHEDULES = [Constant(0.5), Linear(0.0, 0.2), Geometric(0.0, 0.5), Cyclical(10, 2), lambda step: step / 10]
FEW = {"train_images": 300, "epochs": 2, "width": 16, "latents": 3, "nll_images": 30, "nll_samples": 5}


def gaussian_problem(n=400, **given):
    model = correlated(**given)
    _, x = model.simulate(n)
    return model, x, model.posterior(x), model.joint(x)


# ---- weights, capacities, importance samples


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 4.0])
def test_beta_weighs_the_kl_term_above_one_too(beta):
    _, _, chain, joint = gaussian_problem(shift=0.4)
    noise = chain.noise(3)
    likelihood, bound = (ELBO(each)(chain, joint, noise=noise) for each in (0, 1))
    torch.testing.assert_close(BetaELBO(beta)(chain, joint, noise=noise), likelihood + beta * (bound - likelihood))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: type(each).__name__)
def test_a_weight_goes_between_any_two_values_by_every_schedule(schedule):
    values = [Between(1, 6, schedule)(step) for step in range(20)]
    assert values == pytest.approx([1 + 5 * schedule(step) for step in range(20)])
    falling = Between(2, 0.5, schedule)
    for objective in (BetaELBO(falling), FreeBits(falling), BetaTC(falling), BetaTC(1, falling), BetaTC(1, 1, falling)):
        (name,) = objective.annealed()
        assert getattr(objective.at(3), name) == falling(3)
    assert Relaxed(BetaELBO(falling), falling).at(3) == Relaxed(BetaELBO(falling(3)), falling(3))


@pytest.mark.parametrize("nats", [0.1, 1e3])
def test_free_bits_weigh_the_kl_term_only_above_them(nats):
    _, _, chain, joint = gaussian_problem(shift=0.4)
    loc, noise = chain.base.loc.requires_grad_(), chain.noise(3)
    likelihood, bound = (ELBO(each)(chain, joint, noise=noise).mean() for each in (0, 1))
    found = FreeBits(nats)(chain, joint, noise=noise).mean()
    torch.testing.assert_close(found, likelihood - (likelihood - bound).clamp(min=nats))
    slopes = [torch.autograd.grad(each, loc, retain_graph=True)[0] for each in (found, bound, likelihood)]
    torch.testing.assert_close(slopes[0], slopes[1 if nats < 1 else 2])
    assert (slopes[1] - slopes[2]).abs().max() > 1e-4


def test_one_group_of_one_sample_is_the_elbo_one_group_iwae_and_groups_of_one_the_elbo_of_all_draws():
    _, _, chain, joint = gaussian_problem()
    noise = torch.randn(1, 5, 4, 400, 3).double()
    for beta in (1.0, 0.3):
        one = noise[:, :1, :1]
        elbo = ELBO(beta)(chain, joint, noise=noise)
        torch.testing.assert_close(MIWAE(1, beta, 1)(chain, joint, noise=one), elbo[0, 0])
        torch.testing.assert_close(
            MIWAE(5, beta, 1)(chain, joint, noise=noise[:, :, :1]), IWAE(5, beta)(chain, joint, noise=noise[:, :, 0])
        )
        torch.testing.assert_close(MIWAE(1, beta, 4)(chain, joint, noise=noise[:, :1]), elbo[0].mean(0))
    assert MIWAE(5, 1.0, 4).draws((2, 3)) == (5, 4, 2, 3) and MIWAE(5, 1.0, 4)(chain, joint, 2).shape == (2, 400)


def test_bounds_are_ordered_elbo_miwae_iwae_likelihood_and_groups_change_the_variance_alone():
    model, x, chain, joint = gaussian_problem(shift=0.3, stretch=1.5)
    torch.manual_seed(0)
    objectives = [ELBO(), MIWAE(2, 1.0, 8), MIWAE(4, 1.0, 4), MIWAE(8, 1.0, 2), IWAE(16)]
    values = [objective(chain, joint, 50) for objective in objectives]
    bounds = [*(float(value.mean()) for value in values), float(model.log_px(x).mean())]
    assert all(higher > lower + 0.01 for lower, higher in itertools.pairwise(bounds)), bounds
    alone = IWAE(4)(chain, joint, 200)
    assert float(alone.mean()) == pytest.approx(bounds[2], abs=0.02)
    assert float(alone.var(0).mean() / values[2].var(0).mean()) == pytest.approx(4, rel=0.2)


# ---- the three terms of beta-TC


class Known:
    """Posteriors N(A x, s^2 I) of x ~ N(0, I): q(z) is N(0, A A' + s^2 I)."""

    gain = torch.tensor([[1.2, 0.0], [0.7, 0.6], [0.0, 0.5]]).double()
    scale = torch.tensor([0.6, 0.8, 0.5]).double()

    def chain(self, n):
        return Chain(DiagonalGaussian(torch.randn(n, 2).double() @ self.gain.T, self.scale.expand(n, 3)))

    def log_likelihood(self, z):
        return -z.square().sum(-1)

    def log_prior(self, z):
        return Normal(0.0, 1.0).log_prob(z).sum(-1)

    def terms(self):
        aggregate = self.gain @ self.gain.T + self.scale.square().diag()
        marginals = aggregate.diagonal()
        information = 0.5 * aggregate.logdet() - self.scale.log().sum()
        correlation = 0.5 * (marginals.log().sum() - aggregate.logdet())
        return float(information), float(correlation), float(0.5 * (marginals - 1 - marginals.log()).sum())


def test_the_three_terms_are_those_of_the_known_aggregate_posterior():
    torch.manual_seed(0)
    known = Known()
    base, noise = known.chain(1000).base, torch.randn(3, 1000, 3).double()
    found = [float(term.mean()) for term in tc_terms(base, noise, known.log_prior(base.rsample(noise)))]
    assert found == pytest.approx(known.terms(), abs=0.05) and min(known.terms()) > 0.15, known.terms()


def test_with_equal_weights_the_three_terms_are_the_kl_term():
    _, _, chain, joint = gaussian_problem(shift=0.4)
    noise = chain.noise(3)
    for weight in (1.0, 2.5):
        found = BetaTC(weight, weight, weight)(chain, joint, noise=noise)
        torch.testing.assert_close(found, BetaELBO(weight)(chain, joint, noise=noise))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: type(each).__name__)
def test_annealing_acts_on_its_own_term_and_on_no_other(place, schedule):
    torch.manual_seed(0)
    known, weights = Known(), [1.0, 1.0, 1.0]
    weights[place] = Between(0, 3, schedule)
    plain, annealed, chain = BetaTC(1, 1, 1), BetaTC(*weights), known.chain(50)
    noise = chain.noise()
    terms = tc_terms(chain.base, noise[0], known.log_prior(chain.base.rsample(noise[0])))
    for step in (0, 4, 30):
        change = annealed.at(step)(chain, known, noise=noise) - plain(chain, known, noise=noise)
        torch.testing.assert_close(change, (1 - 3 * schedule(step)) * terms[place])
    assert terms[place].abs().max() > 0.1


# ---- categorical latents


def three_categories(temperature=0.0, gaussian=0):
    """Two images, a group of three categories each; what they say of an image a table has, and z's own numbers."""
    torch.manual_seed(2)
    logits = torch.tensor([[[0.5, -1.0, 0.3]], [[1.0, 0.0, -2.0]]]).double().requires_grad_()
    base = DiagonalGaussian(draw(2, gaussian), draw(2, gaussian).exp())
    joint = MixedJoint(lambda z, x: z[..., gaussian:] @ table, images(2, 5), gaussian)
    table = 2 * draw(3, 5)
    joint.groups, joint.categories = 1, 3
    return logits, Chain(MixedBase(base, logits, temperature)), joint


def exact_bound(logits, joint):
    q = torch.log_softmax(logits[:, 0], -1)
    likelihood = torch.stack([joint.log_likelihood(one.expand(2, 3)) for one in torch.eye(3).double()], -1)
    return (q.exp() * (likelihood - math.log(3) - q)).sum(-1)


def test_the_relaxed_bound_comes_to_the_exact_one_as_the_temperature_falls():
    logits, chain, joint = three_categories()
    noise, errors = torch.randn(1, 40_000, 2, 3).double(), []
    exact = exact_bound(logits, joint)
    (slope,) = torch.autograd.grad(exact.sum(), logits)
    exact = exact.detach()
    for temperature in (2.0, 0.5, 0.1, 0.02):
        values = Relaxed(ELBO(), temperature)(chain, joint, noise=noise)
        errors.append(float((values.detach().mean(0) - exact).abs().max()))
        if temperature == 0.1:
            (found,) = torch.autograd.grad(values.mean(0).sum(), logits)
            torch.testing.assert_close(found, slope, atol=0.06, rtol=0)
    assert errors[0] > 0.1 and all(after < before for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 4 * float((values.detach().std(0) / 200).max()) + 0.01


def test_one_hot_draws_come_as_often_as_q_says_and_weigh_to_the_exact_likelihood():
    logits, chain, joint = three_categories(gaussian=2)
    trajectory = chain.rsample(50_000)
    z = trajectory.z[-1][..., 2:]
    q = torch.softmax(logits[:, 0], -1)
    assert set(z.unique().tolist()) == {0.0, 1.0} and (z.sum(-1) == 1).all()
    torch.testing.assert_close(z.mean(0), q, atol=0.01, rtol=0)
    gaussian = Normal(chain.base.gaussian.loc, chain.base.gaussian.scale).log_prob(trajectory.z[-1][..., :2]).sum(-1)
    torch.testing.assert_close(trajectory.log_q0 - gaussian, Categorical(q).log_prob(z.argmax(-1)))
    ones = torch.eye(3).double().unsqueeze(1).expand(3, 2, 3)
    exact = torch.logsumexp(joint.log_likelihood(torch.cat([torch.zeros(3, 2, 2).double(), ones], -1)), 0) - math.log(3)
    found, error = log_mean_weight(chain.log_weight(joint, trajectory))
    assert ((found - exact).abs() < 5 * error + 1e-3).all()


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_a_relaxed_draw_is_on_the_simplex_and_near_the_one_hot_one_of_its_noise(temperature):
    _, chain, _ = three_categories()
    noise = torch.randn(500, 2, 3).double()
    soft = MixedBase(chain.base.gaussian, chain.base.log_q, temperature).rsample(noise)
    hard = chain.base.rsample(noise)
    torch.testing.assert_close(soft.sum(-1), torch.ones(500, 2).double())
    assert torch.equal(soft.argmax(-1), hard.argmax(-1)) and float((soft - hard).abs().mean()) < temperature / 2


def test_divergences_are_those_of_the_gaussian_and_of_the_categories():
    logits, chain, _ = three_categories(gaussian=2)
    gaussian, categorical = chain.base.divergences()
    base = chain.base.gaussian
    torch.testing.assert_close(gaussian, kl_divergence(Normal(base.loc, base.scale), Normal(0.0, 1.0)).sum(-1))
    uniform = Categorical(torch.ones(2, 3).double())
    torch.testing.assert_close(categorical, kl_divergence(Categorical(logits=logits[:, 0]), uniform))
    torch.testing.assert_close(chain[1:].base.divergences()[1], categorical[1:])


def test_categories_that_are_sure_of_themselves_gain_no_bound_at_a_high_temperature():
    base = MixedBase(DiagonalGaussian(draw(4, 0), draw(4, 0)), torch.tensor([[[0.0, -50.0]]] * 4).double(), 20.0)
    noise = torch.randn(9, 4, 2).double()
    assert base.rsample(noise)[..., 1].min() > 0.02  # relaxed it is far from sure
    torch.testing.assert_close(base.drawn_log_prob(noise) + math.log(2), base.divergences()[1].expand(9, 4))


@pytest.mark.parametrize("rise", [0.0, 0.5, 1.0])
def test_two_capacities_hold_each_part_of_the_kl_term(rise):
    _, chain, joint = three_categories(temperature=0.3, gaussian=2)
    noise = chain.noise(3)
    likelihood = joint.log_likelihood(chain.base.rsample(noise[0]))
    kls = [float(kl.mean()) for kl in chain.base.divergences()]
    found = JointCapacity(4.0, 50.0, rise)(chain, joint, noise=noise)
    expected = likelihood - abs(kls[0] - rise * 4.0) - abs(kls[1] - rise * math.log(3))
    torch.testing.assert_close(found, expected)


# ---- through `fit` and `run`


def test_fit_trains_categories_and_their_temperature_falls():
    torch.manual_seed(0)
    vae, x, seen = MixedVAE(0, 2, 3, 8, Independent(norm=False)), images(60).float(), []

    class Watched(ELBO):
        def values(self, chain, target, noise):
            seen.append(chain.base.temperature)
            return super().values(chain, target, noise)

    objective = Relaxed(Watched(), Between(1.0, 0.2, Linear(0.0, 0.05)))
    found = fit(
        lambda step: (vae.posterior(x), vae.joint(x)),
        None,
        objective,
        steps=40,
        batch=(),
        lr=1e-2,
        parameters=vae.parameters(),
    )
    assert seen == pytest.approx([1 - 0.8 * min(1, 0.05 * step) for step in range(40)])
    assert found.history[-1]["objective"] > -545
    bound = ELBO()(vae.eval().posterior(x), vae.joint(x), 50).mean()
    assert bound > -0.98 * 784 * math.log(2)


OBJECTIVES = {
    "beta": (BetaELBO(Between(0, 4, Linear(0.0, 0.2))), {"weight": [3.2, 4]}, {}),
    "free": (FreeBits(Between(6, 3, Geometric(0.0, 0.5))), {"nats": [3.1875, 3.005859]}, {}),
    "tc": (BetaTC(1, Between(1, 6, Cyclical(10, 2))), {"information": [1, 1], "correlation": [6, 6]}, {}),
    "miwae": (MIWAE(2, Linear(0.2, 0.1), 3), {"beta": [0.6, 1]}, {}),
    "categories": (Relaxed(ELBO(Linear(0.2, 0.1)), Between(1, 0.1)), {"beta": [0.6, 1]}, {"latents": 0, "groups": 2}),
    "both": (
        Relaxed(JointCapacity(5, 5, Linear(0.1, 0.1)), Between(1, 0.1, Linear(0.0, 0.2))),
        {"rise": [0.5, 1], "temperature": [0.28, 0.1]},
        {"groups": 2, "categories": 4},
    ),
    "then": (
        Then(Relaxed(IWAE(2), 0.5), Relaxed(MIWAE(2, 1, 2), 0.2), 5),
        {"temperature": [0.5, 0.2]},
        {"groups": 1, "categories": 2},
    ),
}


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:schedule")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_auto_encoder_is_trained_by_each_with_what_is_annealed_in_its_history_and_found_again(store, name):
    objective, annealed, fields = OBJECTIVES[name]
    spec = Mnist(objective=objective, **{**FEW, **fields})
    assert from_json(to_json(spec)) == spec and eval(repr(spec)) == spec
    found = run(spec)
    for field, values in annealed.items():
        assert [line[field] for line in found.history] == pytest.approx(values)
    assert found.metrics["nll"] < -found.metrics["elbo"] + 1 and math.isfinite(found.metrics["active_units"])
    assert isinstance(found.vae, MixedVAE) == bool(spec.groups) and run(spec).metrics == found.metrics


BAD = [
    ({"objective": ELBO(), "groups": 2}, "impossible groups 2 of Mnist with ELBO(): it takes an objective such as R"),
    ({"objective": Relaxed()}, "impossible groups 0 of Mnist with Relaxed(): it takes groups of 1 or more"),
    ({"objective": JointCapacity()}, "impossible groups 0 of Mnist with JointCapacity(): it takes groups of 1 or more"),
    ({"objective": Relaxed(), "groups": 2, "iterations": 2}, "impossible iterations 2 of Mnist with latents 40 and gr"),
    ({"objective": BetaTC(), "kernel": Gated()}, "impossible n_transitions 5: BetaTC() takes 0"),
    ({"objective": Relaxed(), "groups": 2, "categories": 1}, "impossible categories 1 of Mnist: categories takes a wh"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_what_does_not_fit_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError) as refusal:
        Mnist(**fields)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Relaxed(temperature=0),
            "impossible temperature 0 of Relaxed: temperature takes a number above 0, or",
        ),
        (
            lambda: Relaxed(temperature=Between(1, 0)),
            "impossible temperature Between(first=1.0, last=0.0) of Relaxed: te",
        ),
        (lambda: Relaxed(BetaTC()), "impossible objective BetaTC() of Relaxed: its terms are of Gaussian latents"),
        (lambda: BetaELBO(-1), "impossible weight -1 of BetaELBO: weight takes a number from 0, or a function of the"),
        (lambda: Between(-1), "impossible first -1 of Between: first takes a number from 0"),
        (lambda: Density(objective=BetaELBO()), "impossible objective BetaELBO() of Density: it is for images"),
        (
            lambda: Density(objective=BetaTC(), n_transitions=0),
            "impossible objective BetaTC() of Density: it is for im",
        ),
    ],
)
def test_impossible_objectives_are_refused(make, message):
    with pytest.raises(ValueError) as refusal:
        make()
    assert str(refusal.value).startswith(message)
