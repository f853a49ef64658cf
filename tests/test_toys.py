"""Toys: every objective with every kernel, many models at once, and what is said of targets that fail."""

import math

import pytest
import torch

from annealed_core import experiment, judge, objectives, toys
from annealed_core.chain import Chain
from annealed_core.experiment import TrainingError, find, run
from annealed_core.fields import KERNELS, METHODS
from annealed_core.kernels import DiagonalGaussian
from annealed_core.paths import LearnedPath
from annealed_core.spec import Spec
from annealed_core.store import Folder
from annealed_core.sweep import stacks, sweep
from annealed_core.targets import ENERGIES, Energy
from annealed_core.toys import Toys
from annealed_core.watch import Watched

SMALL = Spec(
    experiment="toy", method="avo", target="D", n_transitions=2, hidden=8, steps=40, batch=16, samples=200, lr=0.01
)


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


def train(specs, steps=None):
    problem = Toys(specs)
    optimiser = torch.optim.Adam(problem.model.parameters(), lr=specs[0].lr)
    for step in range(steps or problem.steps):
        loss = -problem.objective(step).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return problem


# ---- objectives and kernels


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", METHODS["toy"])
def test_every_objective_trains_every_kernel(method, kernel):
    problem = Toys([SMALL.replace(method=method, kernel=kernel, seed=seed) for seed in (0, 1)])
    values = problem.objective(39)
    assert values.shape == (2,) and values.isfinite().all()
    (-values.sum()).backward()
    moved = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in problem.model.parameters()]
    assert any(moved) and (all(moved) or kernel != "gated")


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "householder"])
@pytest.mark.parametrize("method", ["elbo", "avo"])
def test_training_raises_the_bound_with_every_kernel(method, kernel):
    problem = train([SMALL.replace(method=method, kernel=kernel, target="A", steps=150)])
    values = torch.stack(problem._recent).squeeze(-1)
    assert values[-20:].mean() > values[:20].mean() + 0.1


def test_householder_reflections_of_an_isotropic_base_change_nothing():
    problem = train([SMALL.replace(method="elbo", kernel="householder", steps=20)])
    chain = toys.restore(problem.spec, problem.weights()[0])
    z = chain.rsample(20_000).z[-1]
    assert z.mean(0).abs().max() < 0.05 and (z.std(0) - 1).abs().max() < 0.05


def test_a_calibrated_sum_with_weight_1_is_avo_and_with_weight_0_the_elbo():
    for weight, method in ((1.0, "avo"), (0.0, "elbo")):
        ours, theirs = (
            Toys([SMALL.replace(method="calibrated", avo_weight=weight)]),
            Toys([SMALL.replace(method=method)]),
        )
        for problem in (ours, theirs):
            problem.objective(0).sum().backward()
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("kernel", ["gated", "residual", "planar", "spline"])
def test_with_one_transition_avo_has_the_gradient_of_the_elbo(kernel):
    """NVI's K = 2: two densities, one transition between them."""
    one = SMALL.replace(target="ring8", kernel=kernel, n_transitions=1, batch=144)
    both = [Toys([one.replace(method=method)]) for method in ("elbo", "avo")]
    for problem in both:
        problem.objective(0).sum().backward()
    for a, b in zip(*(problem.model.parameters() for problem in both), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_mixture_takes_avo_as_often_as_its_weight_says(monkeypatch):
    taken = []
    for name in ("avo", "elbo"):
        original = getattr(objectives, name)
        monkeypatch.setattr(
            objectives, name, lambda *a, name=name, original=original, **k: taken.append(name) or original(*a, **k)
        )
    problem = Toys([SMALL.replace(method="mixture", avo_weight=0.25, steps=400)])
    for step in range(400):
        problem.objective(step)
    assert 70 <= taken.count("avo") <= 130 and len(taken) == 400


def test_the_last_steps_of_avo_then_elbo_are_the_elbos(monkeypatch):
    taken = []
    original = objectives.elbo
    monkeypatch.setattr(objectives, "elbo", lambda *a, **k: taken.append(problem.target.step) or original(*a, **k))
    problem = Toys([SMALL.replace(elbo_steps=15)])
    for step in range(40):
        problem.objective(step)
    assert taken == list(range(25, 40))


def test_alpha_rises_to_exactly_1_in_the_warm_up(monkeypatch):
    seen = []
    original = objectives.alpha_elbo
    monkeypatch.setattr(
        objectives, "alpha_elbo", lambda c, t, alpha, **k: seen.append(alpha) or original(c, t, alpha, **k)
    )
    problem = Toys([SMALL.replace(method="alpha", warmup=0.5, beta0=0.2)])
    for step in range(40):
        problem.objective(step)
    assert seen[0] == 0.2 and seen[20:] == [1.0] * 20 and seen[10] == pytest.approx(0.6) and seen == sorted(seen)


def test_iwae_with_groups_of_one_is_the_elbo():
    ours = Toys([SMALL.replace(method="iwae", iwae_samples=1)]).objective(0)
    torch.testing.assert_close(ours, Toys([SMALL.replace(method="elbo")]).objective(0))


# ---- the learned path


def test_a_learned_path_starts_at_the_given_one_and_always_rises_from_0_to_1():
    path = LearnedPath(torch.tensor([0.0, 0.25, 0.5, 1.0]), 3)
    assert path().shape == (4, 3)
    torch.testing.assert_close(path()[:, 1], torch.tensor([0.0, 0.25, 0.5, 1.0]), atol=2e-3, rtol=0)
    path.logits.data += 50 * torch.randn(3, 3)
    assert (path().diff(dim=0) > 0).all() and (path()[0] == 0).all() and (path()[-1] == 1).all()


def test_learning_the_path_lessens_the_work_of_the_transitions():
    problem = Toys([SMALL.replace(path="learned", target="ring8", n_transitions=3)])
    noise = problem._draw(0)
    before = objectives.path_fit(problem.chain, problem.target, problem.path(), noise=noise)
    for _ in range(50):
        gradient = torch.autograd.grad(
            objectives.path_fit(problem.chain, problem.target, problem.path(), noise=noise).sum(), problem.path.logits
        )[0]
        problem.path.logits.data += 0.1 * gradient.sign()
    after = objectives.path_fit(problem.chain, problem.target, problem.path(), noise=noise)
    assert before < after <= 0, "minus a sum of divergences"


def test_a_path_that_leaves_the_transitions_nothing_to_do_fits_exactly():
    """Every f_t is the base itself, and kernels that stay where they are move nothing."""
    base = DiagonalGaussian.isotropic(2)
    chain = Chain(base, [lambda z, context, noise: (z, torch.zeros(z.shape[:-1]))] * 3)
    target = Energy("base", base.log_prob)
    assert objectives.path_fit(chain, target, torch.tensor([0.0, 0.2, 0.7, 1.0]), 500).abs() < 1e-6
    other = Energy("narrow", DiagonalGaussian.isotropic(2, 0.5).log_prob)
    assert objectives.path_fit(chain, other, torch.tensor([0.0, 0.2, 0.7, 1.0]), 500) < -0.1


def test_the_path_that_was_learned_is_kept_with_the_metrics(store):
    alphas = run(SMALL.replace(path="learned", lr=0.05)).metrics["alphas"]
    assert alphas[0] == 0 and alphas[-1] == 1 and alphas == sorted(alphas) and alphas[1] != pytest.approx(0.5, abs=1e-3)


# ---- many at once


STACKED = [
    SMALL.replace(method=method, kernel=kernel, target=target, seed=seed)
    for method, kernel in (("avo", "gated"), ("elbo", "iaf"))
    for target in ("D", "A")
    for seed in (0, 1)
]


def test_a_run_is_the_same_alone_and_in_a_stack_but_for_rounding(store, monkeypatch):
    together = sweep(STACKED, processes=1)
    monkeypatch.setenv("ANNEALED_STORE", str(store / "alone"))
    for spec, found in zip(STACKED, together, strict=True):
        alone = run(spec)
        for name, value in alone.metrics.items():
            if value is not None:
                assert found.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-3), (spec.label, name)
        for a, b in zip(alone.model.parameters(), found.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_stack_that_was_stopped_ends_as_if_nothing_had_happened(store, monkeypatch):
    specs = [SMALL.replace(seed=seed, steps=600, path="learned") for seed in (0, 1)]
    experiment.train(specs)
    undisturbed = [run(spec) for spec in specs]
    monkeypatch.setenv("ANNEALED_STORE", str(store / "stopped"))
    monkeypatch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    save, taken = Folder.save, []

    def stop_after_the_second(self, name, tensors):
        save(self, name, tensors)
        taken.append(name)
        if taken == ["checkpoint.pt"] * 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save", stop_after_the_second)
        with pytest.raises(KeyboardInterrupt):
            experiment.train(specs)
    assert not any(map(find, specs)) and len(list((store / "stopped").glob("stack-*/checkpoint.pt"))) == 1
    steps = []
    objective = Toys.objective
    monkeypatch.setattr(Toys, "objective", lambda self, step: steps.append(step) or objective(self, step))
    experiment.train(specs)
    assert steps == list(range(500, 600)), "it began anew"
    assert not list((store / "stopped").glob("stack-*"))
    for spec, before in zip(specs, undisturbed, strict=True):
        after = run(spec)
        assert after.metrics == before.metrics and after.history == before.history
        assert all(torch.equal(a, b) for a, b in zip(after.model.parameters(), before.model.parameters(), strict=True))


def test_a_stack_that_was_stopped_between_two_results_only_judges_again(store, monkeypatch):
    specs = [SMALL.replace(seed=seed, steps=500) for seed in (0, 1, 2)]
    monkeypatch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    write, written = Folder.write_result, []

    def stop_after_the_first(self, result):
        write(self, result)
        written.append(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_result", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            experiment.train(specs)
    assert [find(spec) for spec in specs] == [True, False, False]
    result = Folder.of(specs[0]).path / "result.json"
    first = result.stat().st_mtime_ns
    monkeypatch.setattr(Toys, "objective", lambda *_: pytest.fail("trained again"))
    experiment.train(specs)
    assert all(map(find, specs)) and not list(store.glob("stack-*"))
    assert result.stat().st_mtime_ns == first, "a result that stands is not written again"


def test_a_run_whose_last_step_ruins_it_is_kept_as_failed(store):
    spec = SMALL.replace(steps=1, lr=1e30)
    with pytest.raises(TrainingError, match=r"became \S+ by step 1: lr 1e\+30 may be too large"):
        run(spec)
    assert not find(spec)


def test_a_sweep_stacks_what_differs_in_seed_and_target_alone():
    specs = [SMALL.replace(target=target, seed=seed) for seed in range(10) for target in "ABCDEF"]
    groups = stacks([*specs, SMALL.replace(lr=0.1), SMALL.replace(target="funnel")], processes=2)
    assert sorted(map(len, groups)) == [1, 1, 30, 30]
    assert sorted(
        spec.label for group in groups for spec in group if spec.lr == 0.01 and spec.target != "funnel"
    ) == sorted(spec.label for spec in specs)


def test_a_sweep_keeps_all_processes_busy_and_no_stack_too_large():
    specs = [SMALL.replace(seed=seed) for seed in range(100)]
    assert [len(group) for group in stacks(specs, processes=2)] == [25, 25, 25, 25]
    assert [len(group) for group in stacks(specs[:20], processes=2)] == [10, 10]
    assert [len(group) for group in stacks(specs[:10], processes=2)] == [10]


def test_seeds_and_targets_are_paired_over_methods():
    ours, theirs = (Toys([SMALL.replace(method=method, seed=3)]) for method in ("elbo", "avo"))
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours._draw(0), theirs._draw(0))
    assert not torch.equal(ours._draw(0), Toys([SMALL.replace(seed=4)])._draw(0))


# ---- targets that fail


def test_several_targets_are_weighed_each_by_its_own_model():
    watched = Watched([ENERGIES["D"], ENERGIES["D"], ENERGIES["A"]])
    z = torch.randn(5, 4, 3, 2)
    expected = torch.stack([ENERGIES[name].log_prob(z[:, :, m]) for m, name in enumerate("DDA")], -1)
    assert torch.equal(watched.log_prob(z), expected) and not watched.failures


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_reported_with_target_step_and_point(store, wrong):
    spec = SMALL.replace(target=Bowl(wrong))
    with pytest.raises(TrainingError) as caught:
        run(spec)
    message = str(caught.value)
    assert message.startswith(f"toy-Bowl-avo-s0: target bowl: log_prob is {wrong} at step 0, at z = (")
    point = [float(x) for x in message.split("z = (")[1].rstrip(")").split(", ")]
    assert len(point) == 2 and point[0] > 1.5 and "\n" not in message


def test_a_gradient_that_is_not_finite_is_reported_with_target_step_and_point(store):
    with pytest.raises(TrainingError, match=r"target bowl: the gradient of log_prob is nan at step \d+, at z = \("):
        run(SMALL.replace(target=KinkAtOne()))


def test_a_target_without_a_gradient_is_refused_before_training(store):
    class Detached(Bowl):
        def log_prob(self, z):
            return super().log_prob(z.detach())

    with pytest.raises(ValueError, match=r"^target bowl: log_prob has no gradient with respect to z"):
        run(SMALL.replace(target=Detached()))


def test_a_target_whose_shape_is_wrong_for_many_samples_is_refused(store):
    class Odd(Bowl):
        def log_prob(self, z):
            values = super().log_prob(z)
            return values if z.ndim == 2 else values.unsqueeze(-1)

    with pytest.raises(
        ValueError, match=r"^target bowl: log_prob of z \(2, 1, 16, 2\) must have shape \(2, 1, 16\), got"
    ):
        run(SMALL.replace(target=Odd()))


def test_a_run_that_failed_is_kept_as_failed_and_not_trained_again(store, monkeypatch):
    spec = SMALL.replace(target=Bowl(math.nan))
    with pytest.raises(TrainingError) as first:
        run(spec)
    assert not find(spec) and Folder.of(spec).failure() == str(first.value)
    monkeypatch.setattr(experiment, "_train", lambda *_: pytest.fail("trained again"))
    with pytest.raises(TrainingError, match=r"log_prob is nan at step 0"):
        run(spec)


@pytest.mark.parametrize("path", ["linear", "learned"])
def test_the_others_of_a_stack_finish_when_one_fails(store, path):
    good, bad = (SMALL.replace(target=Bowl(wrong), path=path) for wrong in (0.0, math.nan))
    experiment.train([good, bad, good.replace(seed=1)])
    assert find(good) and find(good.replace(seed=1)) and not find(bad)
    assert Folder.of(bad).failure().startswith("toy-Bowl-avo-s0: target bowl: log_prob is nan")
    assert math.isfinite(run(good).metrics["log_z"])
    with pytest.raises(TrainingError, match="log_prob is nan"):
        sweep([good, bad], processes=1)


# ---- what is judged


def test_the_gaps_along_the_path_end_at_the_bounds_gap(store):
    metrics = run(SMALL.replace(steps=300, samples=20_000)).metrics
    assert len(metrics["gaps"]) == 3 and metrics["gaps"][0] == pytest.approx(0, abs=0.01)
    assert metrics["gaps"][-1] == pytest.approx(0 - metrics["elbo"], abs=0.1)


def test_the_error_of_small_samples_is_that_of_estimates_from_so_many(store):
    log_weights = torch.zeros(6000)
    log_weights[:2000] = 1.0
    assert judge._error_of_small_samples(log_weights, 0.0, 2000) == pytest.approx(1 / 3)
    assert judge._error_of_small_samples(log_weights, None, 2000) is None
    assert judge._error_of_small_samples(log_weights[:100], 0.0, 2000) is None


def test_targets_in_many_dimensions_are_judged_without_a_grid(store):
    metrics = run(SMALL.replace(target="funnel", kernel="iaf")).metrics
    assert metrics["total_variation"] is None and "kl_reverse" not in metrics and math.isfinite(metrics["log_z"])
