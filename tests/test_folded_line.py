"""The folded line: what is exact about it, that learning is what it says it is, what the committed study holds."""

import math
from types import SimpleNamespace

import pytest
import torch

from annealed_core import run
from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, Gated
from annealed_core.objectives import AVO, ELBO, IWAE, LocalAVO
from annealed_core.running.experiment import train
from annealed_core.schedules import Linear
from annealed_core.targets import LearnedAlphas
from annealed_report import results
from annealed_report.comparison import interval
from annealed_report.folded_line import (
    FoldedLine,
    Learner,
    LineJoint,
    LineModel,
    LineProblem,
    judge,
    maximum_likelihood,
    metrics_of,
    nodes,
    specs_of,
)

SMALL = FoldedLine(n_transitions=2, kernel=Gated(6), hidden=6, steps=20, batch=10, n_train=200)
MODELS = {
    "truth": LineModel.of(),
    "little noise": LineModel.of(noise=0.05),
    "unequal": LineModel.of(0.2, 1.3, 0.6, 0.4),
    "one mode": LineModel.of(0.6, 0.9, -0.4, 0.2),
    "latent unused": LineModel.of(0.8, 0.0, 0.0, 0.6),
}


def draws(model, n=300, measurements=2, seed=0):
    return model.sample(n, measurements, torch.Generator().manual_seed(seed))


def learner_of(spec=SMALL, line=None):
    torch.manual_seed(spec.seed)
    found = Learner(spec)
    if line is not None:
        with torch.no_grad():
            found.line.copy_(torch.stack([*line[:3], line.noise.log()]))
    return found


# ---- what is exact


@pytest.mark.parametrize("noise", [0.1, 0.3])
@pytest.mark.parametrize("measurements", [1, 2])
def test_the_true_posterior_is_symmetric_with_two_modes(noise, measurements):
    truth = LineModel.of(noise=noise)
    x = draws(truth, measurements=measurements)
    assert (truth.right_share(x) - 0.5).abs().max() < 1e-12
    density = truth.log_joint_at(nodes()[0], x)
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
    x = torch.cat([draws(model, 100, measurements), draws(LineModel.of(), 100, measurements)])
    closed = model.log_prob(x)
    torch.testing.assert_close(model.log_prob_quadrature(x), closed, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.log_prob_quadrature(x, count=2400), closed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("slope", [0.0, 0.7])
def test_a_straight_line_is_a_normal_distribution(slope):
    model = LineModel.of(0.3, slope, -slope, 0.5)
    x = draws(LineModel.of(), 50, 3)
    covariance = slope**2 * torch.ones(3, 3, dtype=torch.float64) + 0.25 * torch.eye(3, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.full((3,), 0.3, dtype=torch.float64), covariance)
    torch.testing.assert_close(model.log_prob(x), normal.log_prob(x))
    torch.testing.assert_close(model.log_prob_quadrature(x), normal.log_prob(x))


def test_one_noiseless_measurement_of_the_truth_is_half_normal():
    x = torch.linspace(0.05, 3, 40, dtype=torch.float64).unsqueeze(-1)
    half_normal = torch.distributions.HalfNormal(torch.ones((), dtype=torch.float64)).log_prob(x.squeeze(-1))
    torch.testing.assert_close(LineModel.of(noise=1e-3).log_prob(x), half_normal, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_each_side_holds_the_mass_that_quadrature_finds(name):
    model, x = MODELS[name], draws(LineModel.of(), 40)
    z, log_weights = nodes()
    share = torch.softmax(model.log_joint_at(z, x) + log_weights, -1)
    torch.testing.assert_close(model.right_share(x), share[:, z > 0].sum(-1), rtol=0, atol=1e-9)


# ---- the estimate


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_maximum_likelihood_recovers_the_truth_from_much_data(noise):
    found = maximum_likelihood(draws(LineModel.of(noise=noise), 50_000))
    assert [float(v) for v in found] == pytest.approx([0, 1, 1, noise], abs=0.07)
    assert float(found.noise) == pytest.approx(noise, rel=0.01) and abs(float(found.offset)) < 0.01
    assert float(found.right + found.left) == pytest.approx(2, abs=0.03)


def test_no_model_explains_the_training_data_better_than_the_estimate():
    x = draws(LineModel.of(), 2000)
    best = float(maximum_likelihood(x).log_prob(x).mean())
    assert all(float(model.log_prob(x).mean()) < best for model in MODELS.values())


def surrogate_gradient(x, line):
    """The gradient of the mean of log p(x, z) under the exact posterior, from a grid."""
    raw = torch.stack(line).requires_grad_()
    z, log_weights = nodes()
    joint = LineModel(*raw).log_joint_at(z, x)
    posterior = torch.softmax(joint.detach() + log_weights, -1)
    return torch.autograd.grad((posterior * joint).sum(-1).mean(), raw)[0]


def test_learning_with_the_exact_posterior_has_no_bias():
    """Where the ELBO's posterior is exact, its gradient is the likelihood's: nothing moves the estimate."""
    x = draws(LineModel.of(), 1000)
    assert surrogate_gradient(x, maximum_likelihood(x)).abs().max() < 1e-5
    assert surrogate_gradient(x, MODELS["one mode"]).abs().max() > 0.1
    raw = torch.stack(MODELS["unequal"]).requires_grad_()
    (whole,) = torch.autograd.grad(LineModel(*raw).log_prob(x).mean(), raw)
    torch.testing.assert_close(surrogate_gradient(x, MODELS["unequal"]), whole)


def test_very_many_importance_samples_leave_no_bias():
    x = draws(LineModel.of(), 50)
    one = torch.ones(50, 1, dtype=torch.float64)
    chain = Chain(DiagonalGaussian(0 * one, one), generator=torch.Generator().manual_seed(0))
    for model in (MODELS["truth"], MODELS["unequal"]):
        found = IWAE(samples=20_000)(chain, LineJoint(model, x))
        torch.testing.assert_close(found, model.log_prob(x), rtol=0, atol=0.15)
        assert float((found - model.log_prob(x)).mean()) == pytest.approx(0, abs=0.02)


# ---- learning

OBJECTIVES = [
    SMALL.replace(objective=ELBO(Linear(0.2, 0.1))),
    SMALL.replace(n_transitions=0),
    SMALL.replace(objective=AVO(), base="prior", kernel=Gated(6, "identity")),
    SMALL.replace(objective=AVO(0.5)),
    SMALL.replace(objective=IWAE(samples=3)),
]


def test_a_run_is_the_same_alone_and_side_by_side_but_for_rounding(store, tmp_path, monkeypatch):
    specs = [OBJECTIVES[2], OBJECTIVES[2].replace(seed=1, noise=0.1)]
    assert len({each.stack_key() for each in specs}) == 1
    together = train(specs)
    monkeypatch.setenv("ANNEALED_STORE", str(tmp_path / "other"))
    (alone,) = train(specs[1:])
    torch.testing.assert_close(together[1].weights, alone.weights, rtol=1e-4, atol=1e-5)
    assert not torch.equal(together[0].weights["line"], together[1].weights["line"])


@pytest.mark.parametrize("spec", OBJECTIVES, ids=lambda spec: spec.line)
def test_side_by_side_each_model_has_the_gradient_of_its_own(spec):
    specs = [spec, spec.replace(seed=1)]
    problem = LineProblem(specs)
    found = torch.autograd.grad(problem.values(0).sum(), problem.parameters(), allow_unused=True)
    for number, own in enumerate(specs):
        batches, noise = (torch.Generator().manual_seed(1000 * own.seed + which) for which in (3, 4))
        x = problem.seen[number][torch.randint(own.n_train, (own.batch,), generator=batches)]
        learner, objective = learner_of(own), own.objective.at(0)
        draws = torch.randn((own.n_transitions + 1, *objective.draws(()), own.batch, 1), generator=noise)
        mean = objective(learner.posterior(x), LineJoint(learner.model(), x), noise=draws).mean()
        alone = torch.autograd.grad(mean, list(learner.parameters()), allow_unused=True)
        named = dict(zip(dict(learner.named_parameters()), alone, strict=True))
        for name, stacked in zip(problem.names, found, strict=True):
            assert (stacked is None) == (named[name] is None), name
            if stacked is not None:
                torch.testing.assert_close(stacked[number], named[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["encoder", "prior"])
def test_avo_reaches_the_kernels_alone_and_the_rest_learns_from_the_elbo(base):
    learner = learner_of(SMALL.replace(objective=AVO(), base=base))
    x = draws(LineModel.of(), 10).float()
    noise = learner.posterior(x).noise()

    def gradients(objective):
        values = objective(learner.posterior(x), LineJoint(learner.model(), x), noise=noise)
        found = torch.autograd.grad(values.sum(), list(learner.parameters()), allow_unused=True)
        return dict(zip(dict(learner.named_parameters()), found, strict=True))

    both, local, whole = (gradients(objective) for objective in (AVO(), LocalAVO(), ELBO()))
    for name, gradient in both.items():
        if name.startswith("kernels"):
            torch.testing.assert_close(gradient, local[name])
        else:
            assert local[name] is None, "AVO must not reach encoder, base or model"
            if base == "encoder" or not name.startswith("outputs"):
                torch.testing.assert_close(gradient, whole[name])


def test_the_model_stands_still_while_it_is_held(store):
    spec = SMALL.replace(start="truth", hold=4, steps=6)
    found = run(spec)
    lines = [[line[name] for name in ("offset", "right", "left", "noise")] for line in found.history]
    assert len(lines) == 10 and all(line == pytest.approx([0, 1, 1, spec.noise]) for line in lines[:4])
    assert lines[4] != lines[3] and not torch.equal(found.model.outputs.bias, learner_of(spec).outputs.bias)


def test_the_bias_can_be_seen_in_seconds(store):
    """With a Gaussian posterior the model leaves the truth, though it starts there, and calls half of |z| noise."""
    spec = FoldedLine(n_transitions=0, noise=0.3, start="truth", n_train=2000, steps=500, lr=1e-2)
    metrics = run(spec).metrics
    assert metrics["noise_ratio"] > 1.5 and metrics["loss_train"] > 0.2 and metrics["loss"] > 0.2
    assert metrics["gap"] < 0.2 < math.log(2), "what one mode of two would cost"


def test_a_stopped_run_goes_on_to_the_same_figures(store, tmp_path, monkeypatch, checkpoint_at_every_record):
    whole = run(SMALL)
    monkeypatch.setenv("ANNEALED_STORE", str(tmp_path / "other"))
    seen, record = [], LineProblem.record

    def stopped(problem):
        seen.append(1)
        return record(problem) if len(seen) != 7 else 1 / 0

    monkeypatch.setattr(LineProblem, "record", stopped)
    with pytest.raises(ZeroDivisionError):
        run(SMALL)
    again = run(SMALL)
    assert len(seen) < 2 * SMALL.steps and again.metrics == whole.metrics and again.history == whole.history


# ---- judging


def test_an_exact_posterior_has_no_gap():
    learner = learner_of(SMALL.replace(n_transitions=0), MODELS["latent unused"])  # the posterior is N(0, 1)
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


# ---- descriptions and the committed study


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"noise": 0}, r"^impossible noise 0 of FoldedLine: noise takes a number above 0$"),
        ({"start": "flat"}, r"^unknown start 'flat' of FoldedLine: start takes one of symmetric, truth$"),
        ({"n_transitions": 0, "objective": AVO()}, r"^impossible n_transitions 0: AVO\(\) takes at least 1$"),
        ({"n_transitions": 0, "base": "prior"}, r"^impossible n_transitions 0 of FoldedLine: a chain from the prior "),
        (
            {"objective": AVO(alphas=LearnedAlphas())},
            r"^impossible objective .* of FoldedLine: its path does not learn$",
        ),
    ],
)
def test_what_is_impossible_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        FoldedLine(**changes)
    with pytest.raises(ValueError, match=r"^noise must be positive, got -1$"):
        LineModel.of(noise=-1)


def test_the_committed_study_has_ten_seeds_of_every_method_and_no_model_beats_the_estimate():
    records = results.load("full", "folded_line")
    for noise in (0.1, 0.3):
        own = [record.metrics for record in records if record.spec.noise == noise]
        assert interval([m["noise_ml"] / noise for m in own]).mean == pytest.approx(1, abs=0.02)
        assert all(m["loss_train"] > -1e-6 for m in own)


def test_metrics_are_chosen_by_plan_and_noise_and_come_by_seed():
    specs = specs_of([{}, {"objective": AVO()}], (0.1, 0.3))
    runs = [SimpleNamespace(spec=spec, metrics={"seed": spec.seed, "line": spec.line}) for spec in reversed(specs)]
    found = metrics_of(runs, 0.3, objective=AVO())
    assert [m["seed"] for m in found] == list(range(10))
    assert {m["line"] for m in found} == {"HVI T=4, AVO"} and found != metrics_of(runs, 0.3)
    assert metrics_of([], 0.3) == []
