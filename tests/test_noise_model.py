"""The noise model: what is exact about it, that learning is what it says it is, what the committed study holds."""

import math
from types import SimpleNamespace

import pytest
import torch

from annealed_core import noise_runs, objectives, results
from annealed_core.chain import Chain
from annealed_core.comparison import interval
from annealed_core.kernels import DiagonalGaussian
from annealed_core.noise_model import FoldedLine, maximum_likelihood, nodes
from annealed_core.noise_runs import cases_of, find, groups, learn, metrics_of
from annealed_core.noise_study import Case, Joint, Learner, judge, train

SMALL = Case(n_transitions=2, hidden=6, steps=20, batch=10, n_train=200)
MODELS = {
    "truth": FoldedLine.of(),
    "little noise": FoldedLine.of(noise=0.05),
    "unequal": FoldedLine.of(0.2, 1.3, 0.6, 0.4),
    "one mode": FoldedLine.of(0.6, 0.9, -0.4, 0.2),
    "latent unused": FoldedLine.of(0.8, 0.0, 0.0, 0.6),
}


def draws(model, n=300, measurements=2, seed=0):
    return model.sample(n, measurements, torch.Generator().manual_seed(seed))


def learner_of(case=SMALL, line=None):
    found = Learner(case)
    if line is not None:
        with torch.no_grad():
            found.line.copy_(torch.stack([*line.fields[:3], line.noise.log()]))
    return found


# ---- what is exact


@pytest.mark.parametrize("noise", [0.1, 0.3])
@pytest.mark.parametrize("measurements", [1, 2])
def test_the_true_posterior_is_symmetric_with_two_modes(noise, measurements):
    truth = FoldedLine.of(noise=noise)
    x = draws(truth, measurements=measurements)
    assert (truth.right_share(x) - 0.5).abs().max() < 1e-12
    z, _ = nodes()
    density = truth.log_joint_at(z, x)
    torch.testing.assert_close(density, density.flip(-1))
    clear = x.mean(-1) > 0.1
    assert (truth.count_modes(x)[clear] == 2).all() and clear.double().mean() > 0.8
    assert (truth.count_modes(x)[x.mean(-1) < 0] == 1).all(), "both sides then fall away from 0"


def test_slopes_of_opposite_sign_leave_one_mode():
    model = MODELS["one mode"]
    assert (model.count_modes(draws(model)) == 1).all()
    assert (MODELS["truth"].count_modes(draws(MODELS["truth"])) == 1).double().mean() < 0.2


@pytest.mark.parametrize("measurements", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_closed_form_is_what_quadrature_finds_on_two_grids(name, measurements):
    model = MODELS[name]
    x = torch.cat([draws(model, 100, measurements), draws(FoldedLine.of(), 100, measurements)])
    closed = model.log_prob(x)
    torch.testing.assert_close(model.log_prob_quadrature(x), closed, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.log_prob_quadrature(x, count=2400), closed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("slope", [0.0, 0.7])
def test_a_straight_line_is_a_normal_distribution(slope):
    model = FoldedLine.of(0.3, slope, -slope, 0.5)
    x = draws(FoldedLine.of(), 50, 3)
    covariance = slope**2 * torch.ones(3, 3, dtype=torch.float64) + 0.25 * torch.eye(3, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.full((3,), 0.3, dtype=torch.float64), covariance)
    torch.testing.assert_close(model.log_prob(x), normal.log_prob(x))
    torch.testing.assert_close(model.log_prob_quadrature(x), normal.log_prob(x))


def test_one_noiseless_measurement_of_the_truth_is_half_normal():
    x = torch.linspace(0.05, 3, 40, dtype=torch.float64).unsqueeze(-1)
    half_normal = torch.distributions.HalfNormal(torch.ones((), dtype=torch.float64)).log_prob(x.squeeze(-1))
    torch.testing.assert_close(FoldedLine.of(noise=1e-3).log_prob(x), half_normal, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_each_side_holds_the_mass_that_quadrature_finds(name):
    model, x = MODELS[name], draws(FoldedLine.of(), 40)
    z, log_weights = nodes()
    share = torch.softmax(model.log_joint_at(z, x) + log_weights, -1)
    torch.testing.assert_close(model.right_share(x), share[:, z > 0].sum(-1), rtol=0, atol=1e-9)
    assert (model.smaller_share(x) <= 0.5).all()


def test_several_models_are_each_weighed_with_their_own_data():
    models = list(MODELS.values())
    x = torch.stack([draws(model, 30) for model in models])
    many = FoldedLine.stack(models)
    torch.testing.assert_close(
        many.log_prob(x), torch.stack([m.log_prob(own) for m, own in zip(models, x, strict=True)])
    )
    assert torch.equal(many[2].right, models[2].right)


# ---- the estimate


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_maximum_likelihood_recovers_the_truth_from_much_data(noise):
    found = maximum_likelihood(draws(FoldedLine.of(noise=noise), 50_000))
    assert [float(v) for v in found.fields] == pytest.approx([0, 1, 1, noise], abs=0.07)
    assert float(found.noise) == pytest.approx(noise, rel=0.01) and abs(float(found.offset)) < 0.01
    assert float(found.right + found.left) == pytest.approx(2, abs=0.03)


def test_no_model_explains_the_training_data_better_than_the_estimate():
    x = draws(FoldedLine.of(), 2000)
    best = float(maximum_likelihood(x).log_prob(x).mean())
    assert all(float(model.log_prob(x).mean()) < best for model in MODELS.values())


def surrogate_gradient(x, line):
    """The gradient of the mean of log p(x, z) under the exact posterior, from a grid."""
    raw = torch.stack(line.fields).requires_grad_()
    model = FoldedLine(*raw)
    z, log_weights = nodes()
    joint = model.log_joint_at(z, x)
    posterior = torch.softmax(joint.detach() + log_weights, -1)
    return torch.autograd.grad((posterior * joint).sum(-1).mean(), raw)[0]


def test_learning_with_the_exact_posterior_has_no_bias():
    """Where the ELBO's posterior is exact, its gradient is the likelihood's: nothing moves the estimate."""
    x = draws(FoldedLine.of(), 1000)
    assert surrogate_gradient(x, maximum_likelihood(x)).abs().max() < 1e-5
    assert surrogate_gradient(x, MODELS["one mode"]).abs().max() > 0.1
    raw = torch.stack(MODELS["unequal"].fields).requires_grad_()
    (whole,) = torch.autograd.grad(FoldedLine(*raw).log_prob(x).mean(), raw)
    torch.testing.assert_close(surrogate_gradient(x, MODELS["unequal"]), whole)


def test_very_many_importance_samples_leave_no_bias():
    x = draws(FoldedLine.of(), 50)
    torch.manual_seed(0)
    base = DiagonalGaussian(torch.zeros(50, 1, dtype=torch.float64), torch.ones(50, 1, dtype=torch.float64))
    for model in (MODELS["truth"], MODELS["unequal"]):
        found = objectives.iwae(Chain(base), Joint(model, x), 20_000)
        torch.testing.assert_close(found, model.log_prob(x), rtol=0, atol=0.15)
        assert float((found - model.log_prob(x)).mean()) == pytest.approx(0, abs=0.02)


# ---- learning


METHODS = [
    SMALL,
    SMALL.replace(n_transitions=0),
    SMALL.replace(method="avo"),
    SMALL.replace(method="avo", base="prior", initialisation="identity"),
    SMALL.replace(method="calibrated", avo_weight=0.5),
    SMALL.replace(method="iwae", iwae_samples=3),
]


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.line)
def test_a_run_is_the_same_alone_and_in_a_stack_but_for_rounding(case):
    cases = [case, case.replace(seed=1), case.replace(noise=0.1)]
    together, histories = train(cases)
    for own, learner, history in zip(cases, together, histories, strict=True):
        (alone,), (own_history,) = train([own])
        for a, b in zip(alone.parameters(), learner.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert history[-1] == pytest.approx(own_history[-1], rel=1e-4, abs=1e-5)
    assert not torch.equal(together[0].line, together[1].line)


def gradients(learner, values):
    found = torch.autograd.grad(values.sum(), list(learner.parameters()), allow_unused=True)
    return dict(zip(dict(learner.named_parameters()), found, strict=True))


@pytest.mark.parametrize("base", ["encoder", "prior"])
def test_avo_reaches_the_kernels_alone_and_the_rest_learns_from_the_elbo(base):
    learner = learner_of(SMALL.replace(method="avo", base=base))
    x = draws(FoldedLine.of(), 10).float()
    chain = learner.posterior(x)
    noise, target = chain.noise(), Joint(learner.model(), x)
    both = gradients(learner, learner(x, noise))
    local = gradients(learner, objectives.avo(chain, target, torch.tensor([0, 0.5, 1]), noise=noise))
    whole = gradients(learner, objectives.elbo(learner.posterior(x), Joint(learner.model(), x), noise=noise))
    for name, gradient in both.items():
        if name.startswith("kernels"):
            torch.testing.assert_close(gradient, local[name])
            # the last step has the whole target, and a reverse kernel no influence on where the chain goes
            alike = name.startswith("kernels.1") or ".reverse." in name
            assert torch.allclose(gradient, whole[name], atol=1e-6) == alike, name
        else:
            assert local[name] is None, "AVO must not reach encoder, base or model"
            if base == "encoder" or not name.startswith("outputs"):
                torch.testing.assert_close(gradient, whole[name])


def test_every_objective_has_the_elbos_value_where_it_must():
    x = draws(FoldedLine.of(), 10).float()
    noise = learner_of().posterior(x).noise()
    expected = learner_of()(x, noise)
    for case in (SMALL.replace(method="avo"), SMALL.replace(method="calibrated", avo_weight=0.2)):
        torch.testing.assert_close(learner_of(case)(x, noise), expected)
    alone = learner_of(SMALL.replace(method="iwae", iwae_samples=1))(x, noise.unsqueeze(1))
    torch.testing.assert_close(alone, expected)


def test_methods_share_data_and_initial_weights():
    ours, theirs = learner_of(), learner_of(SMALL.replace(method="iwae", iwae_samples=5))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    shorter = dict(learner_of(SMALL.replace(n_transitions=0)).named_parameters())
    assert all(torch.equal(value, dict(ours.named_parameters())[name]) for name, value in shorter.items())


def test_the_model_stands_still_while_it_is_held(monkeypatch):
    case = SMALL.replace(start="truth", hold=4, steps=6)
    (learner,), (history,) = train([case])
    lines = [[line[name] for name in ("offset", "right", "left", "noise")] for line in history]
    assert len(lines) == 10 and all(line == pytest.approx([0, 1, 1, case.noise]) for line in lines[:4])
    assert lines[4] != lines[3] and not torch.equal(learner.outputs.bias, Learner(case).outputs.bias)


def test_the_bias_can_be_seen_in_seconds():
    """With a Gaussian posterior the model leaves the truth, though it starts there, and calls half of |z| noise."""
    (learner,), _ = train([Case(n_transitions=0, noise=0.3, start="truth", n_train=2000, steps=1500, lr=1e-2)])
    metrics = judge(learner)
    assert metrics["noise_ratio"] > 1.5 and metrics["loss_train"] > 0.2 and metrics["loss"] > 0.2
    assert metrics["gap"] < 0.2 < math.log(2), "what one mode of two would cost"


# ---- judging


def test_an_exact_posterior_has_no_gap():
    case = SMALL.replace(n_transitions=0)
    learner = learner_of(case, MODELS["latent unused"])  # x says nothing of z: the posterior is N(0, 1)
    with torch.no_grad():
        learner.outputs.weight.zero_()
        learner.outputs.bias.copy_(torch.tensor([0.0, math.log(math.expm1(1 - 1e-4))]))
    metrics = judge(learner)
    assert metrics["gap"] == pytest.approx(0, abs=1e-5)
    assert metrics["posterior_share"] == pytest.approx(0.5) and metrics["chain_share"] == pytest.approx(0.5, abs=0.03)
    assert metrics["loss"] > 0.1 and metrics["noise_ratio"] == pytest.approx(0.6 / metrics["noise_ml"])


def test_the_true_model_loses_nothing():
    metrics = judge(learner_of(SMALL.replace(noise=0.3), MODELS["truth"]))
    assert metrics["loss"] == pytest.approx(0, abs=0.05) and metrics["posterior_share"] == pytest.approx(0.5)


# ---- running it


def test_what_was_learned_is_kept_and_only_the_rest_is_trained(store, monkeypatch):
    cases = cases_of([{}, {"method": "avo"}], seeds=(0, 1), n_train=200, hidden=6, steps=5, n_transitions=1)
    assert len(cases) == 8 and [len(group) for group in groups(cases)] == [4, 4]
    learn(cases[:1])
    told, trained = [], []
    original = train
    monkeypatch.setattr(noise_runs, "train", lambda group: trained.extend(group) or original(group))
    found = learn(cases, say=told.append)
    assert trained == cases[1:] and len(told) == 2 and [result.spec for result in found] == cases
    monkeypatch.setattr(noise_runs, "train", lambda group: pytest.fail("trained again"))
    assert learn(cases) == found
    (folder,) = store.glob(f"{noise_runs._folder(cases[0]).name}")
    (folder / "result.json").write_text("{")
    assert find(cases[0]) is None


def test_cases_that_differ_in_more_than_seed_and_noise_are_not_stacked():
    with pytest.raises(ValueError, match="must be equal but for seed and noise"):
        train([SMALL, SMALL.replace(lr=0.1)])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "em"}, r"^method must be one of elbo, avo, calibrated, iwae, got 'em'$"),
        ({"noise": 0}, r"^noise must be positive, got 0$"),
        ({"n_transitions": -1}, r"^n_transitions must be at least 0, got -1$"),
        ({"n_transitions": 0, "method": "avo"}, r"^n_transitions must be at least 1 for method avo .*, got 0$"),
        ({"method": "iwae"}, r"^iwae_samples must be at least 1 .*, got None$"),
        ({"avo_weight": 0.5}, r"^avo_weight must lie in \[0, 1\] .*, got 0.5$"),
        ({"method": "calibrated", "avo_weight": 1.5}, r"^avo_weight must lie in \[0, 1\] .*, got 1.5$"),
    ],
)
def test_impossible_cases_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        Case(**changes)


def test_a_noise_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"^noise must be positive, got -1$"):
        FoldedLine.of(noise=-1)


def test_records_are_read_back_as_cases(store, tmp_path, monkeypatch):
    monkeypatch.setenv("ANNEALED_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("ANNEALED_RECORD", "1")
    cases = [SMALL, SMALL.replace(method="calibrated", avo_weight=0.2)]
    found = learn(cases)
    results.record("full", "noise", found)
    records = sorted(results.load("full", "noise"), key=lambda record: record.spec.method, reverse=True)
    assert [record.spec for record in records] == cases
    assert records[0].metrics == pytest.approx(found[0].metrics, rel=1e-6, abs=1e-9)


def test_the_committed_study_has_ten_seeds_of_every_method_it_names():
    records = results.load("full", "noise_model")
    recorded = {record.spec for record in records}
    assert len(recorded) == len(records) and recorded <= set(cases_of())
    for group in groups(cases_of()):
        assert recorded.isdisjoint(group) or recorded >= set(group), group[0].line
    for noise in (0.1, 0.3):
        own = [record.metrics for record in records if record.spec.noise == noise]
        assert interval([m["noise_ml"] / noise for m in own]).mean == pytest.approx(1, abs=0.02)
        assert all(m["loss_train"] > -1e-6 for m in own), "no model can beat the estimate on its own data"


def test_metrics_are_chosen_by_plan_and_noise_and_come_by_seed():
    cases = cases_of([{}, {"method": "avo"}], (0.1, 0.3))
    runs = [SimpleNamespace(spec=case, metrics={"seed": case.seed, "line": case.line}) for case in reversed(cases)]
    found = metrics_of(runs, 0.3, method="avo")
    assert [m["seed"] for m in found] == sorted(m["seed"] for m in found) and len(found) == 10
    assert len({m["line"] for m in found}) == 1 and found != metrics_of(runs, 0.3)
    assert metrics_of([], 0.3) == []
