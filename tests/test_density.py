"""Density: what it refuses, all objectives with all kernels, many models at once, targets that fail, what is judged."""

import itertools
import math
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Categorical,
    Dirichlet,
    Exponential,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
)

from annealed_core import targets
from annealed_core.chain import Chain
from annealed_core.description import from_json, to_json
from annealed_core.fit import adam
from annealed_core.flows import IAF, Householder, Planar, Spline
from annealed_core.kernels import DiagonalGaussian, Gated, Residual
from annealed_core.nested import TrajectoryBalance
from annealed_core.objectives import AVO, ELBO, IWAE, AlphaELBO, LocalAVO
from annealed_core.running import experiment
from annealed_core.running.density import Density, DensityProblem, check_objective
from annealed_core.running.experiment import TrainingError, folder_of, run, stored, train
from annealed_core.running.sweep import stacks, sweep
from annealed_core.running.watch import Watched, check_target
from annealed_core.schedules import Between, Linear, Mixed, Then
from annealed_core.targets import ENERGIES, GeometricAlphas, LearnedAlphas
from annealed_core.variants import BetaELBO, CapacityELBO, Relaxed

SMALL = Density(kernel=Gated(hidden=8), n_transitions=2, objective=AVO(), steps=40, batch=16, samples=200, lr=0.01)
KERNELS = [Gated(hidden=8), Residual(hidden=8), Planar(), Householder(), IAF(hidden=8), Spline(hidden=8)]
OBJECTIVES = [
    ELBO(),
    AlphaELBO(alpha=Linear(0.1, 0.05)),
    IWAE(samples=4),
    AVO(),
    LocalAVO(),
    AVO(weight=0.2),
    AVO(alphas=GeometricAlphas()),
    AVO(alphas=LearnedAlphas()),
    Mixed(AVO(), ELBO(), chance=0.2),
    Then(AVO(alphas=LearnedAlphas()), IWAE(samples=2), switch=20),
]
kind = lambda part: repr(part).replace(" ", "")


class Bowl:
    """A Gaussian that can be told to fail: where z_0 is beyond `edge`, `wrong` is added to its log-density."""

    name = "bowl"

    def __init__(self, wrong=0.0, edge=1.5, dim=2):
        self.wrong, self.edge, self.dim = wrong, edge, dim

    def log_prob(self, z):
        return -0.5 * z.square().sum(-1) + torch.where(z[..., 0] > self.edge, self.wrong, 0.0)


class KinkAtOne(Bowl):
    """Finite everywhere, with a gradient that is NaN for z_0 beyond the edge."""

    def log_prob(self, z):
        beyond = (z[..., 0] - self.edge).clamp(min=0)
        return -0.5 * z.square().sum(-1) - torch.where(beyond > 0, (beyond * 0).sqrt() * beyond, 0.0)


def trained(specs, steps=None):
    problem = DensityProblem(specs)
    parameters = problem.parameters()
    optimiser, values = adam(parameters, specs[0].lr), []
    for step in range(steps or problem.steps):
        found = problem.values(step)
        for parameter, gradient in zip(parameters, torch.autograd.grad(-found.sum(), parameters), strict=True):
            parameter.grad = gradient
        optimiser.step()
        values.append(found.detach())
    return problem, torch.stack(values)


def gradients(spec, step=0):
    problem = DensityProblem([spec])
    return torch.autograd.grad(problem.values(step).sum(), problem.parameters(), allow_unused=True)


# ---- what a description refuses


TARGETS = ", ".join(ENERGIES)
BAD = [
    ({"target": "G"}, f"impossible target 'G' of Density: target takes one of {TARGETS}, or an object with log_prob"),
    ({"lr": -1e-3}, "impossible lr -0.001 of Density: lr takes a number above 0"),
    ({"lr_schedule": "step"}, "unknown lr_schedule 'step' of Density: lr_schedule takes one of constant, cosine"),
    ({"batch": 0}, "impossible batch 0 of Density: batch takes a whole number from 1"),
    ({"seed": -1}, "impossible seed -1 of Density: seed takes a whole number from 0 to 2,147,483,647"),
    ({"steps": 10**20}, f"impossible steps {10**20} of Density: steps takes a whole number from 1 to 100,000,000"),
    ({"base_scale": 0}, "impossible base_scale 0 of Density: base_scale takes a number above 0"),
    ({"samples": 1}, "impossible samples 1 of Density: samples takes a whole number from 2"),
    ({"beta1": 1.0}, "impossible beta1 1.0 of Density: beta1 takes a number in [0, 1)"),
    ({"kernel": "gated"}, "impossible kernel 'gated' of Density: kernel takes a description such as Gated(), or an"),
    ({"kernel": Gated}, f"impossible kernel {Gated!r} of Density: kernel takes a description such as Gated()"),
    ({"objective": None}, "impossible objective None of Density: objective takes an objective such as AVO()"),
    ({"objective": ELBO}, f"impossible objective {ELBO!r} of Density: objective takes an objective such as AVO()"),
    ({"n_transitions": 0}, "impossible n_transitions 0: AVO() takes at least 1"),
    (
        {"objective": Then(AVO(), ELBO(), switch=41)},
        "impossible switch 41 of Then(first=AVO(), second=ELBO(), switch=41): there are 40 steps in all",
    ),
    ({"objective": ELBO(beta=0.5)}, "impossible beta 0.5: it takes a target with log_likelihood and log_prior, and D"),
    ({"objective": CapacityELBO()}, "impossible rise 1.0: it takes a target with log_likelihood and log_prior, and D"),
    (
        {"objective": AlphaELBO(alpha=Linear(0.1, 1e-3))},
        "schedule Linear(start=0.1, rate=0.001) must end at 1, got 0.139 at step 39, its last",
    ),
    ({"name": "mine"}, "impossible name 'mine': a name is for objects of your own, and there are none"),
    ({"target": Bowl(), "name": "a/b"}, "impossible name 'a/b' of Density: name takes a name of letters, digits, '.'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message.split(":")[0][:50] for _, message in BAD])
def test_what_is_impossible_is_refused_with_one_line_of_field_value_and_what_it_takes(fields, message):
    with pytest.raises(ValueError) as refusal:
        SMALL.replace(**fields)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("bad", [["D"], 3, object(), Bowl, type("NoDim", (), {"log_prob": print})()])
@pytest.mark.parametrize("dim", [None, 0, -1, 2.0, True, "2"])
def test_a_target_without_log_prob_and_dim_is_refused(bad, dim):
    bad = bad if dim is None else type("Bad", (Bowl,), {"__init__": lambda self: None, "dim": dim})()
    with pytest.raises(ValueError, match=r"^impossible target .* or an object with log_prob and dim(: [^\n]*)?$"):
        Density(target=bad)


class Half(Bowl):
    log_prob = None


LACKING = [
    (Bowl, "Bowl is a class, give an object of it, Bowl(...)"),
    (type("NoDim", (), {"log_prob": print})(), "this NoDim has no dim, the number of dimensions of z"),
    (Half(), "this Half has no log_prob"),
    (Bowl(dim=2.0), "dim takes a whole number from 1, got 2.0"),
    (Bowl(dim=torch.ones(2, 2)), "dim takes a whole number from 1, got tensor([[1., 1.], [1., 1.]])"),
    (
        Normal(torch.zeros(3), 1.0),
        "a distribution of torch takes batch_shape () and event_shape (n,), as Independent(Normal(...), 1) has, "
        "got batch_shape (3,) and event_shape ()",
    ),
    (
        MultivariateNormal(torch.zeros(3, 2), torch.eye(2)),
        "a distribution of torch takes batch_shape () and event_shape (n,), got batch_shape (3,) and event_shape (2,)",
    ),
    (Dirichlet(torch.ones(3)), "Dirichlet is no density over all of R^n, transform it into one"),
    (Independent(Exponential(torch.ones(2)), 1), "Independent is no density over all of R^n, transform it into one"),
]


@pytest.mark.parametrize(("bad", "message"), LACKING, ids=[message for _, message in LACKING])
def test_a_target_that_is_none_is_told_what_it_lacks_in_one_line(bad, message):
    with pytest.raises(ValueError) as refusal:
        Density(target=bad)
    said = str(refusal.value)
    assert said.endswith(f"or an object with log_prob and dim: {message}") and "\n" not in said


def test_a_distribution_of_torch_over_all_of_space_is_taken_however_it_was_made():
    base = Independent(StudentT(torch.full((2,), 3.0)), 1)
    mixture = MixtureSameFamily(Categorical(torch.ones(3)), MultivariateNormal(torch.zeros(3, 2), torch.eye(2)))
    for each in (base, mixture, TransformedDistribution(base, AffineTransform(1.0, 2.0))):
        assert Density(target=each).target.dim == 2


def test_fields_are_taken_by_name_alone():
    with pytest.raises(
        TypeError, match=r"^Density takes fields by name alone, got 'D': write Density\(name=value\), [^\n]*$"
    ):
        Density("D")


def test_a_target_is_the_same_by_its_name_or_as_the_energy():
    assert Density(target=ENERGIES["A"]) == Density(target="A") != Density(target=Bowl())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=kind)
@pytest.mark.parametrize("kernel", KERNELS[:3], ids=kind)
def test_what_a_description_prints_and_writes_is_read_back(kernel, objective):
    spec = Density(target="ring8", kernel=kernel, objective=objective, seed=3, steps=60)
    assert eval(repr(spec)) == spec and from_json(to_json(spec)) == spec


def test_the_label_names_target_objective_and_seed():
    assert Density(target="A", objective=AVO(), seed=2).label == "density-A-avo-s2"
    assert Density(target=Bowl()).label == "density-bowl-elbo-s0"


def test_without_more_words_the_kernels_are_gated_with_32_hidden_units():
    assert Density().kernel == Gated(hidden=32) and Density().n_transitions == 4


# ---- objectives and kernels


@pytest.mark.parametrize("kernel", KERNELS, ids=kind)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=kind)
def test_every_objective_trains_every_kernel(objective, kernel):
    spec = SMALL.replace(objective=objective, kernel=kernel)
    problem = DensityProblem([spec, spec.replace(seed=1)])
    for step in (0, 39):
        values = problem.values(step)
        assert values.shape == (2,) and values.isfinite().all()
        found = torch.autograd.grad(values.sum(), problem.parameters(), allow_unused=True)
        assert any(each is not None and each.any() for each in found)


@pytest.mark.parametrize("kernel", [each for each in KERNELS if each != Householder()], ids=kind)
@pytest.mark.parametrize("objective", [ELBO(), AVO()], ids=kind)
def test_training_raises_the_bound_with_every_kernel(objective, kernel):
    _, values = trained([SMALL.replace(objective=objective, kernel=kernel, target="A", steps=150)])
    assert values[-20:].mean() > values[:20].mean() + 0.1


def test_householder_reflections_of_an_isotropic_base_change_nothing():
    problem, _ = trained([SMALL.replace(objective=ELBO(), kernel=Householder(), steps=20)])
    z = problem.spec.restore(problem.weights()[0])[1].rsample(20_000).z[-1]
    assert z.mean(0).abs().max() < 0.05 and (z.std(0) - 1).abs().max() < 0.05


@pytest.mark.parametrize("kernel", [Gated(hidden=8), Residual(hidden=8), Planar(), Spline(hidden=8)], ids=kind)
def test_with_one_transition_avo_has_the_gradient_of_the_elbo(kernel):
    """NVI's K = 2: two densities, one transition between them."""
    one = SMALL.replace(target="ring8", kernel=kernel, n_transitions=1, batch=144)
    for a, b in zip(gradients(one), gradients(one.replace(objective=ELBO())), strict=True):
        torch.testing.assert_close(a, b)


def test_of_two_objectives_that_of_the_step_is_trained(monkeypatch):
    taken = []
    for kept in (AVO, ELBO):
        values = kept.values
        monkeypatch.setattr(
            kept, "values", lambda self, *args, v=values: taken.append(type(self).__name__) or v(self, *args)
        )
    trained([SMALL.replace(objective=Then(AVO(), ELBO(), switch=25))])
    assert taken == ["AVO"] * 25 + ["ELBO"] * 15


def test_seeds_and_targets_are_paired_over_objectives():
    ours, theirs = (DensityProblem([SMALL.replace(objective=each, seed=3)]) for each in (ELBO(), AVO()))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours._draw(0, (16,)), theirs._draw(0, (16,)))
    assert not torch.equal(ours._draw(0, (16,)), DensityProblem([SMALL.replace(seed=4)])._draw(0, (16,)))


def test_the_path_that_was_learned_is_kept_with_the_metrics(store):
    specs = [SMALL.replace(objective=AVO(alphas=LearnedAlphas()), lr=0.05, seed=seed) for seed in (0, 1)]
    for each in train(specs):
        alphas = each.metrics["alphas"]
        assert alphas[0] == 0 and alphas[-1] == 1 and alphas == sorted(alphas) and abs(alphas[1] - 0.5) > 1e-3


def test_a_chain_starts_as_wide_as_its_target_says_and_its_flows_reach_as_far():
    spec = SMALL.replace(target="ring8", kernel=Spline(hidden=8))
    _, chain = spec.restore(DensityProblem([spec]).weights()[0])
    assert chain.base.scale.tolist() == [5.0, 5.0] and float(chain.kernels[0].scale) == 25 / 5
    assert float(SMALL.replace(target="ring8", kernel=Planar()).kernels()[0].scale) == 5


def test_a_base_scale_of_the_description_comes_before_the_targets(store):
    """Trained, judged and restored as with a target that says so itself."""
    spec = SMALL.replace(target="E", base_scale=3.0)
    declared = SMALL.replace(target=replace(ENERGIES["E"], base_scale=3.0), name="wide")
    ours, theirs = run(spec), run(declared)
    assert ours.metrics == theirs.metrics and ours.chain.base.scale.tolist() == [3.0, 3.0]
    assert ours.metrics != run(SMALL.replace(target="E")).metrics


# ---- many at once


STACKED = [
    SMALL.replace(objective=objective, kernel=kernel, n_transitions=8, target=target, seed=seed)
    for objective, kernel in ((AVO(weight=0.5), Gated(hidden=8)), (ELBO(), IAF(hidden=8)), (IWAE(4), Residual(8)))
    for target in ("D", "A")
    for seed in (0, 1)
]


@pytest.mark.parametrize("first", [0, 4, 8])
def test_a_run_is_the_same_alone_and_in_a_stack(store, monkeypatch, first):
    """Bit by bit for pairs of Gaussians, whose weights here fill whole vectors of a processor; flows to 1e-5."""
    specs = STACKED[first : first + 4]
    together = train(specs)
    monkeypatch.setenv("ANNEALED_STORE", str(store / "alone"))
    exact = not isinstance(specs[0].kernel, IAF)
    for spec, found in zip(specs, together, strict=True):
        alone = run(spec)
        for name, value in alone.model.state_dict().items():
            torch.testing.assert_close(value, found.weights[name], rtol=0, atol=0 if exact else 1e-5)
        assert found.metrics == alone.metrics or not exact
        assert found.history == alone.history or not exact


def test_a_sweep_stacks_what_differs_in_seed_and_target_alone():
    specs = [SMALL.replace(target=target, seed=seed) for seed in range(10) for target in "ABCDEF"]
    groups = stacks([*specs, SMALL.replace(lr=0.1), SMALL.replace(target="funnel")], processes=2)
    assert sorted(map(len, groups)) == [1, 1, 30, 30] and {*specs} < {spec for group in groups for spec in group}
    for group in groups:
        names = [spec.target for spec in group]
        assert len(list(dict.fromkeys(names))) == 1 + sum(a != b for a, b in itertools.pairwise(names))


def test_a_sweep_keeps_all_processes_busy_and_no_stack_too_large():
    specs = [SMALL.replace(seed=seed) for seed in range(100)]
    assert [len(group) for group in stacks(specs, processes=2)] == [25, 25, 25, 25]
    assert [len(group) for group in stacks(specs[:20], processes=2)] == [10, 10]
    assert [len(group) for group in stacks(specs[:10], processes=2)] == [10]


def test_what_has_parts_of_the_users_own_is_trained_alone():
    class Mine(AVO):
        pass

    for part in ({"objective": Mine()}, {"kernel": type("K", (), {"build": Gated().build})()}):
        assert SMALL.replace(**part).stack_key() is None
    ours = SMALL.replace(target=Bowl())
    assert ours.stack_key() == ours.replace(target=Bowl(), seed=1).stack_key() != SMALL.stack_key()
    assert ours.replace(name="bowl").stack_key() == SMALL.stack_key()


# ---- targets that fail


def test_several_targets_are_weighed_each_by_its_own_model():
    watched = Watched([ENERGIES["D"], ENERGIES["D"], ENERGIES["A"]])
    z = torch.randn(5, 4, 3, 2)
    expected = torch.stack([ENERGIES[name].log_prob(z[:, :, m]) for m, name in enumerate("DDA")], -1)
    assert torch.equal(watched.log_prob(z), expected) and not watched.failures


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_reported_with_target_step_and_point(store, wrong):
    with pytest.raises(TrainingError) as caught:
        run(SMALL.replace(target=Bowl(wrong)))
    message = str(caught.value)
    assert message.startswith(f"density-bowl-avo-s0: target bowl: log_prob is {wrong} at step 0, at z = (")
    at, _, more = message.split("z = (")[1].partition(")")
    point = [float(x) for x in at.split(", ")]
    assert len(point) == 2 and point[0] > 1.5 and "\n" not in message
    assert ("a bounded density needs other coordinates" in more) == (wrong == -math.inf)


def test_a_gradient_that_is_not_finite_is_reported_with_target_step_and_point(store):
    with pytest.raises(TrainingError, match=r"target bowl: the gradient of log_prob is nan at step \d+, at z = \("):
        run(SMALL.replace(target=KinkAtOne()))


def test_a_target_whose_shape_is_wrong_for_many_samples_is_refused(store):
    class Odd(Bowl):
        def log_prob(self, z):
            values = super().log_prob(z)
            return values if z.ndim == 2 else values.unsqueeze(-1)

    with pytest.raises(
        ValueError, match=r"^target bowl: log_prob of z \(2, 1, 16, 2\) must have shape \(2, 1, 16\), got"
    ):
        run(SMALL.replace(target=Odd()))


def target(**attributes):
    """A bowl with other attributes."""
    return type("Odd", (Bowl,), {"__init__": lambda self: None, "dim": 2, "wrong": 0.0, "edge": 9.0, **attributes})()


NO_GRADIENT = "log_prob has no gradient with respect to z"
ODD = [
    ({"log_prob": lambda self, z: Bowl().log_prob(z.detach())}, NO_GRADIENT),
    ({"log_prob": lambda self, z: torch.floor(z[..., 0].detach())}, NO_GRADIENT),
    ({"log_prob": lambda self, z: -z.sub_(1).square().sum(-1)}, f"{NO_GRADIENT} (a leaf Variable that requires grad"),
    ({"log_prob": lambda self, z: torch.as_tensor(-z.numpy()).sum(-1)}, f"{NO_GRADIENT} (Can't call numpy() on"),
    (
        {"log_prob": lambda self, z: -np.square(z.numpy()).sum(-1)},
        "log_prob of z (8, 2) must be a tensor of torch of sha",
    ),
    ({"log_prob": lambda self, z: z.nothing}, "log_prob fails for z of shape (8, 2): 'Tensor' object has no"),
    ({"log_prob": lambda self, z: z.sum()}, "log_prob of z (8, 2) must have shape (8,), got ()"),
    ({"log_prob": lambda self, z: z.sum(-1) * math.nan}, "log_prob is nan at z = (-1, -1)"),
    ({"log_prob": lambda self, z: z.abs().sum(-1).sub(2).sqrt().nan_to_num(0)}, "the gradient of log_prob is "),
    ({"base_scale": 0.0}, "base_scale must be a number above 0, got 0.0"),
    ({"base_scale": [1.0, 2.0]}, "base_scale must be a number above 0, got [1.0, 2.0]"),
    ({"support": (1.0, 2.0)}, "support must be a number above 0, got (1.0, 2.0)"),
    ({"box": -1}, "box must be a number above 0, got -1"),
    ({"box": "wide"}, "box must be a number above 0, got 'wide'"),
    ({"log_normalizer": math.nan}, "log_normalizer must be a number, got nan"),
    ({"log_normalizer": lambda self: 0.0}, "log_normalizer must be a number, got <bound method"),
    ({"modes": [[0.0, 0.0]]}, "modes must be centres (M, 2) and masses (M,), got [[0.0, 0.0]]"),
    ({"modes": (torch.zeros(3, 2), torch.ones(2))}, "modes must be centres (M, 2) and masses (M,), got (tensor("),
]


@pytest.mark.parametrize(("attributes", "message"), ODD, ids=[f"{next(iter(a))}-{n}" for n, (a, _) in enumerate(ODD)])
def test_a_target_is_refused_before_training_with_one_line_that_says_what_is_wrong(store, attributes, message):
    with pytest.raises(ValueError) as refusal:
        run(SMALL.replace(target=target(**attributes)))
    assert str(refusal.value).startswith(f"target bowl: {message}") and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [torch.ones(2, 2), "two\nlines", "long" * 100, "", None, 3], ids=repr)
def test_a_target_of_any_name_is_called_something_of_one_line(name):
    odd = target(name=name, support=torch.ones(2, 2))
    with pytest.raises(
        ValueError, match=r"^target \S[^\n]{1,80}: support must be a number above 0, got tensor"
    ) as refusal:
        check_target(odd)
    assert "\n" not in str(refusal.value) + Density(target=odd).label


def test_a_target_may_declare_lists_arrays_and_tensors():
    modes = [[[-1.0, 0.0], [1.0, 0.0]], [0.5, 0.5]]
    for each in (modes, [np.array(part) for part in modes], (torch.tensor(modes[0]).double(), torch.ones(2))):
        check_target(target(modes=each, support=np.float32(9), base_scale=np.float64(2), box=None))


def test_a_run_that_failed_is_kept_as_failed_and_not_trained_again(store, monkeypatch):
    spec = SMALL.replace(lr=1e30)
    with pytest.raises(TrainingError, match=r"^density-D-avo-s0: samples became \S+ at step 1: lr 1e\+30 may be too"):
        run(spec)
    monkeypatch.setattr(experiment, "_maximise", lambda *_: pytest.fail("trained again"))
    with pytest.raises(TrainingError, match="samples became"):
        run(spec)
    assert stored(spec).failure == folder_of(spec).failure()


def test_a_run_whose_last_step_ruins_it_is_kept_as_failed(store):
    spec = SMALL.replace(steps=1, lr=1e30)
    with pytest.raises(TrainingError, match=r"became \S+( by step 1)?: lr 1e\+30 may be too large"):
        run(spec)
    assert stored(spec).failure


@pytest.mark.parametrize("alphas", [targets.LinearAlphas(), LearnedAlphas()], ids=kind)
def test_the_others_of_a_stack_finish_when_one_fails(store, alphas):
    good, bad = (SMALL.replace(target=Bowl(wrong), objective=AVO(alphas=alphas)) for wrong in (0.0, math.nan))
    good, bad = good.replace(name="good"), bad.replace(name="bad")
    first, failed, last = train([good, bad, good.replace(seed=1)])
    assert failed.failure.startswith("density-bowl-avo-s0: target bowl: log_prob is nan")
    assert math.isfinite(first.metrics["log_z"]) and math.isfinite(last.metrics["log_z"]) and stored(good)
    assert first.metrics == run(good).metrics
    with pytest.raises(TrainingError, match="log_prob is nan"):
        sweep([good, bad])


def test_samples_that_diverge_fail_their_own_model_where_a_distribution_refuses_them(store):
    """Torch's distributions raise for NaN: of three models of one target, one whose weights are ruined."""
    spec = SMALL.replace(target=Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
    problem = DensityProblem([spec.replace(seed=seed) for seed in range(3)])
    with torch.no_grad():
        for parameter in problem.parameters():
            parameter[:, 1] = math.nan
    values = problem.values(0)
    assert values.isnan().tolist() == [False, True, False]
    assert list(problem.failures) == [1] and problem.failures[1].startswith("samples became nan at step 0")


# ---- what is judged


def test_the_gaps_along_the_path_end_at_the_bounds_gap(store):
    metrics = run(SMALL.replace(steps=300, samples=20_000)).metrics
    assert len(metrics["gaps"]) == 3 and metrics["gaps"][0] == pytest.approx(0, abs=0.01)
    assert metrics["gaps"][-1] == pytest.approx(0 - metrics["elbo"], abs=0.1)


def test_targets_in_many_dimensions_are_judged_without_a_grid(store):
    metrics = run(SMALL.replace(target="funnel", kernel=IAF(hidden=8))).metrics
    assert metrics["total_variation"] is None and "kl_reverse" not in metrics and math.isfinite(metrics["log_z"])


def test_a_chain_without_transitions_is_judged_as_it_is(store):
    r = run(SMALL.replace(objective=ELBO(), n_transitions=0))
    assert r.metrics["elbo"] < r.metrics["log_z"] and r.history == [] and len(r.chain) == 0


def test_equal_weights_are_no_failure(store):
    """The base itself as the target: all weights are equal, and their tail has no shape."""
    metrics = run(SMALL.replace(target=DiagonalGaussian.isotropic(2), objective=ELBO(), n_transitions=0)).metrics
    assert metrics["ess"] == pytest.approx(1) and metrics["log_z"] == pytest.approx(0, abs=1e-5)
    assert metrics["elbo"] <= metrics["log_z"]


CORNERS = torch.tensor([[20.0, 20.0], [-20.0, 20.0], [20.0, -20.0], [-20.0, -20.0]])


class Four:
    """Four modes far apart; of the corners that are told alone, mass and samples are elsewhere."""

    dim, support, base_scale, modes = 2, 40.0, 15.0, (CORNERS, torch.full((4,), 0.25))

    def log_prob(self, z):
        return torch.logsumexp(-0.5 * (z.unsqueeze(-2) - CORNERS.to(z)).square().sum(-1), -1)


class ToACorner:
    """A kernel that moves all to the first mode."""

    def __call__(self, z, context=None, noise=None):
        return CORNERS[0].to(z) + z / 15, torch.full(z.shape[:-1], -2 * math.log(15))


def test_a_chain_that_keeps_one_mode_of_four_is_three_quarters_off(store):
    lost = type("Lost", (), {"build": lambda self, dim, n, context_dim=0: [ToACorner()]})()
    r = run(Density(target=Four(), kernel=lost, n_transitions=1, steps=1))
    assert r.metrics["total_variation"] == pytest.approx(0.75, abs=0.02) and r.metrics["kl_forward"] > 0.5
    assert r.metrics["mode_shares"] == pytest.approx([1, 0, 0, 0])


def test_a_support_that_misses_the_target_is_no_figure_but_a_note_that_names_it(store):
    narrow = type("Narrow", (Four,), {"support": 12.0})()
    metrics = run(SMALL.replace(target=narrow, objective=ELBO(), n_transitions=0)).metrics
    assert metrics["total_variation"] is None and metrics["kl_reverse"] is None
    assert any("support" in note for note in metrics["notes"])


@pytest.mark.parametrize("constant", [1e6, -1e6])
def test_a_large_constant_changes_no_figure_but_log_z(store, constant):
    def shifted(by):
        log_prob = lambda self, z: -0.5 * ((z - 1) / 0.5).square().sum(-1) + by
        return type("Shifted", (), {"dim": 2, "log_prob": log_prob})()

    spec = SMALL.replace(objective=ELBO(), steps=300, samples=5000)
    plain, far = (run(spec.replace(target=shifted(by))).metrics for by in (0.0, constant))
    truth = math.log(2 * math.pi * 0.25)
    assert far["elbo"] <= far["log_z"] and far["log_z"] - constant == pytest.approx(truth, abs=0.2)
    assert far["total_variation"] == pytest.approx(plain["total_variation"], abs=0.1)


# ---- distributions of torch


@pytest.mark.parametrize(
    "distribution",
    [MultivariateNormal(torch.ones(2), torch.eye(2)), Independent(Normal(torch.zeros(2), torch.ones(2)), 1)],
)
def test_a_distribution_of_torch_is_a_target(store, distribution):
    metrics = run(SMALL.replace(target=distribution, samples=2000, steps=200)).metrics
    assert metrics["log_z"] == pytest.approx(0, abs=0.2) and metrics["total_variation"] is not None
    distribution.dim = 2
    assert Density(target=distribution).target is Density(target=distribution, seed=1).target


def test_a_distribution_of_torch_is_judged_as_the_same_density_of_ones_own(store):
    """Its box is looked for, as nothing declares one."""
    wide = MultivariateNormal(torch.zeros(2), 4 * torch.eye(2))
    own = type("Own", (), {"dim": 2, "log_normalizer": 0.0, "log_prob": lambda self, z: wide.log_prob(z)})()
    spec = SMALL.replace(base_scale=2.0, samples=2000)
    theirs, ours = (run(spec.replace(target=each)).metrics for each in (wide, own))
    assert theirs == ours and theirs["total_variation"] is not None and "notes" not in theirs


def test_a_batch_of_distributions_is_refused():
    with pytest.raises(ValueError, match=r"^impossible target Normal\("):
        Density(target=Normal(torch.zeros(2), torch.ones(2)))


# ---- schedules in objectives


def half_way(step):
    return min(1.0, 0.5 + step / 100)


def test_a_warm_up_that_is_too_slow_is_warned_of_where_it_is_asked_for_and_nowhere_else():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_objective(ELBO(beta=half_way), 2, 60)
        check_objective(ELBO(beta=0.2), 2, 10)
    with pytest.warns(UserWarning, match=r"^schedule half_way should end near 1.* got 0.59 at step 9, its last$"):
        check_objective(Mixed(AVO(beta=half_way), ELBO(), 0.5), 2, 10)


def test_a_number_is_looked_at_once_however_long_training_is():
    check_objective(ELBO(beta=1.0), 2, 100_000_000)


def test_a_schedule_that_leaves_0_1_is_refused_at_construction():
    message = re.escape("schedule <lambda> must stay in [0, 1], got 1.01 at step 51")
    with pytest.raises(ValueError, match=f"^{message}$"):
        Density(objective=AlphaELBO(alpha=lambda step: 0.5 + step / 100), steps=100)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (TrajectoryBalance(lambda s: -1.0), "a number from 0 for exploration of TrajectoryBalance, got -1.0 at step 0"),
        (TrajectoryBalance(lambda s: "x"), "a number from 0 for exploration of TrajectoryBalance, got 'x' at step 0"),
        (Then(ELBO(), BetaELBO(lambda s: 3.0 - s), 5), "a number from 0 for weight of BetaELBO, got -1.0 at step 4"),
        (Relaxed(temperature=lambda s: 0.0), "a number above 0 for temperature of Relaxed, got 0.0 at step 0"),
        (Relaxed(temperature=Linear(0.0)), "a number above 0 for temperature of Relaxed, got 0.0 at step 0"),
    ],
    ids=["below 0", "no number", "within another", "a constant", "from 0"],
)
def test_a_schedule_in_any_field_is_refused_in_one_line_where_the_field_does_not_take_its_numbers(objective, message):
    with pytest.raises(ValueError) as refusal:
        check_objective(objective, 0, 40)
    assert str(refusal.value).startswith("schedule ") and str(refusal.value).endswith(f" must give {message}")


def test_a_schedule_in_any_field_is_taken_where_the_field_takes_its_numbers():
    for good in (lambda step: torch.tensor(0.5), Between(3.0, 0.0, Linear(0.0)), Between(2.0, 1.0, lambda step: 1)):
        check_objective(TrajectoryBalance(good), 2, 100)


# ---- kernels of one's own


class Move(torch.nn.Module):
    """A kernel that adds noise of its own drawing, counts its calls, and gives what `gives` makes of the pair."""

    def __init__(self, gives):
        super().__init__()
        self.gives, self.size = gives, torch.nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, context=None, noise=None):
        self.calls += 1
        return self.gives(z + self.size * torch.randn_like(z), z.new_zeros(z.shape[:-1]))


def moves(gives=lambda z, log_ratio: (z, log_ratio), more=0):
    return type("Moves", (), {"build": lambda self, dim, n, context_dim=0: [Move(gives) for _ in range(n + more)]})()


WANTED = "kernel Move must give z_next of shape (8, 2) and log_ratio of shape (8,) for z of shape (8, 2), got "


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (moves(more=1), "build of the kernel must give n_transitions 2 kernels, got 3"),
        (moves(lambda z, log_ratio: (z, log_ratio.unsqueeze(-1))), f"{WANTED}shape (8, 2) and shape (8, 1)"),
        (moves(lambda z, log_ratio: z), f"{WANTED}shape (8, 2)"),
        (moves(lambda z, log_ratio: (z, 0.0)), f"{WANTED}shape (8, 2) and float"),
        (moves(lambda z, log_ratio: None), f"{WANTED}NoneType"),
        (moves(lambda z, log_ratio: z @ torch.ones(3)), "kernel Move fails for z of shape (8, 2): "),
    ],
    ids=["number", "shape", "state", "float", "nothing", "error"],
)
def test_a_kernel_of_ones_own_that_fits_no_chain_is_refused_in_one_line_before_training(store, kernel, message):
    with pytest.raises(ValueError) as refusal:
        run(SMALL.replace(kernel=kernel))
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


def test_looking_at_kernels_changes_neither_them_nor_the_random_numbers_of_the_run(store, monkeypatch):
    spec = SMALL.replace(kernel=moves())
    looked_at = run(spec)
    assert DensityProblem([spec]).weights()[0]["0.calls"] == 0
    monkeypatch.setattr("annealed_core.running.density.check_kernels", lambda *_: None)
    assert run(spec).metrics == looked_at.metrics


# ---- compiled, and restored


def test_only_pairs_of_gaussians_on_a_cpu_are_compiled_and_kept_apart(store):
    compiled = [SMALL, SMALL.replace(objective=AlphaELBO(Linear(0.1, 0.05))), SMALL.replace(kernel=Residual())]
    plain = [{"kernel": IAF()}, {"objective": IWAE()}, {"objective": ELBO(), "n_transitions": 0}, {"objective": print}]
    for spec in compiled:
        assert spec.compiles() and not spec.compiles("cuda") and folder_of(spec) != folder_of(spec, compile=True)
    for spec in (SMALL.replace(**fields) for fields in plain):
        assert not spec.compiles() and folder_of(spec) == folder_of(spec, compile=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile takes a C++ compiler")
def test_a_compiled_run_is_the_same_but_for_rounding(store):
    spec = SMALL.replace(objective=Then(AVO(alphas=LearnedAlphas()), IWAE(2), switch=20))
    for plain, compiled in zip(
        *(train([spec, spec.replace(seed=1)], compile=each) for each in (False, True)), strict=True
    ):
        assert compiled.metrics["elbo"] == pytest.approx(plain.metrics["elbo"], abs=0.01)
        assert compiled.history[0]["elbo"] == pytest.approx(plain.history[0]["elbo"], abs=1e-3)


def test_the_chain_of_a_run_is_a_plain_one_without_gradients(store):
    r = run(SMALL)
    assert type(r.chain) is Chain and not any(p.requires_grad for p in r.model.parameters()) and not r.model.training
    assert r.chain.rsample(10).z.shape == (3, 10, 2)
