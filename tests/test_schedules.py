"""Schedules: the values of the sources, what every schedule obeys, and the two schedules of objectives."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from annealed_core import schedules
from annealed_core.objectives import AVO, ELBO, IWAE
from annealed_core.running.watch import check_schedule
from annealed_core.schedules import SHAPES, Constant, Cyclical, Geometric, Linear, Mixed, Then, objective_at, value_at
from annealed_core.targets import LearnedAlphas, LearnedPath

unit = st.floats(0, 1, allow_nan=False)
steps = st.integers(0, 10**7)
settings.register_profile("schedules", deadline=None, max_examples=100)
settings.load_profile("schedules")


@pytest.mark.parametrize(
    ("schedule", "at", "values"),
    [
        (Constant(0.25), (0, 1, 10**6), (0.25, 0.25, 0.25)),
        (Linear(0.2, 2e-4), (0, 1, 1000, 3999, 4000, 10**6), (0.2, 0.2002, 0.4, 0.9998, 1, 1)),
        (Geometric(0.2, 0.5), (0, 1, 2, 3), (0.2, 0.6, 0.8, 0.9)),
        (Cyclical(40_000, 4, 0.5), (0, 2500, 4999, 5000, 9999, 10_000), (0, 0.5, 0.9998, 1, 1, 0)),
        (Cyclical(40_000, 4, 0.5), (39_999, 40_000, 100_000), (1, 1, 1)),
        (Cyclical(100, 2, 0.5, start=0.4), (0, 10, 25, 60), (0.4, 0.64, 1, 0.64)),
    ],
)
def test_schedules_have_the_values_of_their_formulas(schedule, at, values):
    assert [schedule(step) for step in at] == pytest.approx(values)


def test_the_defaults_are_those_of_the_report():
    assert Linear() == Linear(0.2, 2e-4) and Geometric() == Geometric(0.2, 2e-4) and Constant() == Constant(1)
    assert Cyclical() == Cyclical(40_000, 4, 0.5, "linear", 0)


@pytest.mark.parametrize(
    ("shape", "start", "quarter", "end"),
    [("linear", 0, 0.25, 0.9998), ("sigmoid", 0.002473, 0.047426, 0.997521), ("cosine", 0, 0.146447, 1 - 1e-7)],
)
def test_cyclical_rises_in_the_shapes_of_its_paper(shape, start, quarter, end):
    schedule = Cyclical(40_000, 4, 0.5, shape)
    values = [schedule(step) for step in range(20_000)]
    assert (values[0], values[1250], values[4999]) == pytest.approx((start, quarter, end), abs=1e-5)
    assert values[2500] == pytest.approx(0.5) and values[10_000:] == values[:10_000]
    assert set(values[5000:10_000]) == {1.0}
    assert all(a <= b for a, b in itertools.pairwise(values[:5000]))


@given(start=unit, rate=st.floats(1e-9, 1), step=steps, later=steps)
@pytest.mark.parametrize("kind", [Linear, Geometric])
def test_warm_up_rises_from_its_start_and_stays_in_0_1(kind, start, rate, step, later):
    schedule = kind(start, rate)
    assert schedule(0) == pytest.approx(start, abs=1e-12)
    assert 0 <= schedule(step) <= 1
    assert schedule(step) <= schedule(step + later) + 1e-12


@given(
    n_steps=st.integers(1, 10**6),
    cycles=st.integers(1, 1000),
    ratio=st.floats(1e-3, 1),
    shape=st.sampled_from(list(SHAPES)),
    start=unit,
    step=steps,
)
def test_cyclical_stays_in_0_1_begins_near_its_start_and_ends_at_1(n_steps, cycles, ratio, shape, start, step):
    assume(cycles <= n_steps)
    schedule = Cyclical(n_steps, cycles, ratio, shape, start)
    assert 0 <= schedule(step) <= 1
    assert schedule(0) == pytest.approx(start, abs=0.003) and schedule(n_steps) == schedule(n_steps + step) == 1


def test_more_cycles_than_steps_are_refused():
    with pytest.raises(ValueError, match=r"^impossible cycles 11 of Cyclical: there are 10 steps in all$"):
        Cyclical(10, 11)


outside = st.one_of(st.floats(max_value=-1e-8), st.floats(min_value=1 + 1e-8), st.just(math.nan))


def test_a_schedule_is_looked_at_once_in_every_step():
    asked = []
    check_schedule(lambda step: asked.append(step) or step / 9, 10, must_end_at_one=True)
    assert asked == list(range(10))


@given(n_steps=st.integers(1, 50), at=st.integers(0, 49), value=outside)
def test_a_schedule_that_leaves_0_1_is_refused_with_value_and_step(n_steps, at, value):
    schedule = lambda step: value if step == at else 1
    if at >= n_steps:
        check_schedule(schedule, n_steps)
        return
    with pytest.raises(ValueError, match=r"^schedule <lambda> must stay in \[0, 1\], got ") as refusal:
        check_schedule(schedule, n_steps)
    assert str(refusal.value).endswith(f"{value!r} at step {at}")


@given(end=st.floats(1e-8, 0.999), n_steps=st.integers(1, 50))
def test_a_schedule_that_must_end_at_1_and_does_not_is_refused_with_value_and_step(end, n_steps):
    said = re.escape(f"got {end:.3g} at step {n_steps - 1}, its last")
    with pytest.raises(ValueError, match=f"^schedule <lambda> must end at 1, {said}$"):
        check_schedule(lambda step: end, n_steps, must_end_at_one=True)


def test_a_schedule_that_ends_far_from_1_is_warned_of_and_one_that_ends_near_or_a_number_is_not(recwarn):
    for fine in (lambda step: 0.96, Linear(0.9, 0.05), 0.5):
        check_schedule(fine, 2)
    assert not recwarn.list
    said = r"^schedule Linear\(rate=0.001\) should end near 1, where models are judged, got 0.209 at step 9, its last$"
    with pytest.warns(UserWarning, match=said) as warned:
        check_schedule(Linear(0.2, 1e-3), 10)
    assert warned[0].filename == __file__  # the caller's line, none of the package's


def test_rounding_is_forgiven_and_what_is_no_number_is_not():
    check_schedule(lambda step: sum([0.1] * 10), 2, must_end_at_one=True)
    check_schedule(lambda step: 1 + 1e-12, 2, must_end_at_one=True)
    with pytest.raises(ValueError, match=r"^schedule <lambda> must give numbers, got None at step 0$"):
        check_schedule(lambda step: None, 2)


def test_a_number_or_an_objective_that_does_not_change_is_the_same_at_every_step():
    assert value_at(0.3, 7) == 0.3 and value_at(Linear(0.25, 0.5), 1) == 0.75
    own = lambda chain, target, sample_shape, noise: None
    assert objective_at(own, 7) is own and objective_at(ELBO(Linear(0.25, 0.5)), 1) == ELBO(0.75)


FIRST, SECOND = AVO(beta=Linear(0.2, 0.1)), ELBO(Linear(0.1, 0.1))


def test_then_gives_the_first_objective_until_the_switch_each_as_of_its_step():
    both = Then(FIRST, SECOND, 3)
    assert [both.at(step) for step in range(6)] == [*(FIRST.at(step) for step in range(3)), *map(SECOND.at, (3, 4, 5))]
    assert Then(FIRST, SECOND).at(0) == SECOND.at(0)


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.9, 1.0])
def test_mixed_gives_the_first_objective_by_its_chance_each_as_of_its_step(chance):
    both, n = Mixed(FIRST, SECOND, chance), 4000
    chosen = [both.at(step) for step in range(n)]
    is_first = [each == FIRST.at(step) for step, each in enumerate(chosen)]
    assert all(is_first[step] or each == SECOND.at(step) for step, each in enumerate(chosen))
    assert abs(sum(is_first) - chance * n) <= 4 * (n * chance * (1 - chance)) ** 0.5


def test_mixed_takes_the_same_steps_for_everyone_whatever_was_drawn_or_asked_or_set_before():
    found = []
    for seed, dtype, first in ((0, torch.float32, IWAE()), (1, torch.float64, AVO())):
        schedules._coins.cache_clear()
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            at = range(5000) if seed else reversed(range(5000))
            chosen = {step: Mixed(first, ELBO(), 0.3).at(step) == first for step in at}
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(chosen)
    assert found[0] == found[1] and 0 < sum(found[0].values()) < 5000


@pytest.mark.parametrize("kind", [Mixed, Then])
def test_an_objective_that_depends_on_the_step_refuses_to_be_called_without_one(kind):
    with pytest.raises(TypeError, match=rf"^{kind.__name__} is another objective at each step: call .at\(step\)$"):
        kind(FIRST, SECOND)(None, None)


@pytest.mark.parametrize("kind", [Mixed, Then])
def test_what_the_two_learn_themselves_is_built_once_for_all_steps(kind):
    both = kind(AVO(alphas=LearnedAlphas()), kind(ELBO(), AVO(0.5, alphas=LearnedAlphas()))).build(3)
    paths = both.modules()
    assert len(paths) == 2 and all(isinstance(path, LearnedPath) and len(path()) == 4 for path in paths)
    used = {id(each.alphas) for each in map(both.at, range(40)) if isinstance(each, AVO)}
    assert used <= {id(path) for path in paths} and both.modules() == paths
