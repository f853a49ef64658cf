"""Schedules: the values of the sources, and what every schedule obeys."""

import itertools
import math
import pickle
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from annealed_core.schedules import SCHEDULES, SHAPES, checked, constant, cyclical, geometric, linear

unit = st.floats(0, 1, allow_nan=False)
steps = st.integers(0, 10**7)
settings.register_profile("schedules", deadline=None, max_examples=100)
settings.load_profile("schedules")


def test_geometric_comes_within_a_hundredth_of_one_after_the_reports_21500_steps():
    assert geometric(beta0=0.2, gamma=2e-4)(21_500) == pytest.approx(0.989, abs=0.001)


def test_geometric_values():
    schedule = geometric(0.2, 0.5)
    assert [schedule(step) for step in range(4)] == pytest.approx([0.2, 0.6, 0.8, 0.9])


def test_linear_rises_by_gamma_until_one():
    schedule = linear(0.2, 2e-4)
    assert [schedule(step) for step in (0, 1, 1000, 4000, 10**6)] == pytest.approx([0.2, 0.2002, 0.4, 1, 1])
    assert schedule(3999) < 1 == schedule(4001)


def test_the_defaults_are_those_of_the_report():
    for make in (linear, geometric):
        assert all(make()(step) == make(0.2, 2e-4)(step) for step in (0, 1, 1000, 5000))


def test_cyclical_has_the_values_of_its_paper():
    schedule = cyclical(40_000, 4, 0.5)
    assert schedule(0) == 0
    assert schedule(2500) == pytest.approx(0.5)
    assert all(schedule(step) == 1 for step in (*range(5000, 10_000, 7), 9999))
    assert schedule(4999) < 1
    assert schedule(10_000) == 0
    assert schedule(39_999) == schedule(40_000) == schedule(100_000) == 1


@pytest.mark.parametrize(
    ("shape", "start", "quarter", "end"),
    [("linear", 0, 0.25, 0.9998), ("sigmoid", 0.002473, 0.047426, 0.997521), ("cosine", 0, 0.146447, 1 - 1e-7)],
)
def test_cyclical_rises_in_the_shapes_of_its_paper(shape, start, quarter, end):
    schedule = cyclical(40_000, 4, 0.5, shape)
    values = [schedule(step) for step in range(20_000)]
    assert (values[0], values[1250], values[4999]) == pytest.approx((start, quarter, end), abs=1e-5)
    assert values[2500] == pytest.approx(0.5) and values[10_000:] == values[:10_000]
    assert set(values[5000:10_000]) == {1.0}
    assert all(a <= b for a, b in itertools.pairwise(values[:5000]))


@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_constant_is_the_same_at_every_step(step):
    assert constant()(step) == 1 and constant(0.25)(step) == 0.25


@given(beta0=unit, gamma=st.floats(1e-9, 1), step=steps, later=steps)
@pytest.mark.parametrize("make", [linear, geometric])
def test_warm_up_rises_from_beta0_and_stays_in_0_1(make, beta0, gamma, step, later):
    schedule = make(beta0, gamma)
    assert schedule(0) == pytest.approx(beta0, abs=1e-12)
    assert 0 <= schedule(step) <= 1
    assert schedule(step) <= schedule(step + later) + 1e-12


@given(
    n_steps=st.integers(1, 10**6),
    cycles=st.integers(1, 1000),
    ratio=st.floats(1e-3, 1),
    shape=st.sampled_from(list(SHAPES)),
    step=steps,
)
def test_cyclical_stays_in_0_1_begins_near_0_and_ends_at_1(n_steps, cycles, ratio, shape, step):
    assume(cycles <= n_steps)
    schedule = cyclical(n_steps, cycles, ratio, shape)
    assert 0 <= schedule(step) <= 1
    assert schedule(0) == (SHAPES[shape](0)) < 0.003 and schedule(n_steps) == schedule(n_steps + step) == 1


@given(value=unit, step=steps)
def test_constant_stays_in_0_1(value, step):
    assert constant(value)(step) == value


outside = st.one_of(st.floats(max_value=-1e-8), st.floats(min_value=1 + 1e-8), st.just(math.nan))


@given(value=outside)
@pytest.mark.parametrize(
    ("make", "field"),
    [
        (constant, "value"),
        (linear, "beta0"),
        (linear, "gamma"),
        (geometric, "beta0"),
        (geometric, "gamma"),
        (cyclical, "ratio"),
    ],
)
def test_a_value_outside_0_1_is_refused_with_its_fields_name(make, field, value):
    with pytest.raises(ValueError, match=rf"^{field} must lie in [\[(]0, 1\], got ") as refusal:
        make(**{field: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "field", "bad"),
    [
        (linear, "gamma", {"gamma": 0.0}),
        (geometric, "gamma", {"gamma": 0.0}),
        (cyclical, "n_steps", {"n_steps": 0}),
        (cyclical, "n_steps", {"n_steps": math.inf}),
        (cyclical, "cycles", {"cycles": 0}),
        (cyclical, "cycles", {"n_steps": 10, "cycles": 11}),
        (cyclical, "ratio", {"ratio": 0}),
    ],
)
def test_a_schedule_that_would_never_end_is_refused_with_its_fields_name(make, field, bad):
    with pytest.raises(ValueError, match=rf"^{field} must (lie in|be a number of steps from 1)"):
        make(**bad)


def test_schedules_are_found_by_name_and_say_how_they_were_made():
    assert {"constant": constant, "linear": linear, "geometric": geometric, "cyclical": cyclical} == SCHEDULES
    assert str(linear(0.2, 2e-4).name) == "linear(0.2, 0.0002)"
    assert cyclical().name == "cyclical(40000, 4, 0.5)"


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^unknown shape 'square': choose one of linear, sigmoid, cosine$"):
        cyclical(shape="square")


@pytest.mark.parametrize("make", SCHEDULES.values())
def test_schedules_go_to_other_processes(make):
    assert [pickle.loads(pickle.dumps(make()))(step) for step in range(5)] == [make()(step) for step in range(5)]


def test_any_callable_is_looked_at_once_in_every_step_and_holds_its_last_value():
    asked = []

    def rising(step):
        asked.append(step)
        return step / 9

    schedule = checked(rising, 10)
    assert [schedule(step) for step in (0, 3, 9, 10, 10**6)] == [0, 3 / 9, 1, 1, 1]
    assert asked == list(range(10)) and schedule.name == "rising"
    assert checked(linear(0.5, 0.5), 3).name == "linear(0.5, 0.5)"


@given(n_steps=st.integers(1, 50), at=st.integers(0, 49), value=st.one_of(outside, st.sampled_from([math.inf, -1.0])))
def test_a_callable_that_leaves_0_1_is_refused_with_value_and_step(n_steps, at, value):
    schedule = lambda step: value if step == at else 1
    if at >= n_steps:
        checked(schedule, n_steps)
        return
    with pytest.raises(ValueError, match=r"^schedule <lambda> must stay in \[0, 1\], got ") as refusal:
        checked(schedule, n_steps)
    assert str(refusal.value).endswith(f"{value!r} at step {at}")


@given(end=st.floats(1e-8, 0.999), n_steps=st.integers(1, 50))
def test_a_callable_that_ends_below_1_is_refused_or_warned_of_with_value_and_step(end, n_steps):
    said = re.escape(f"got {end!r} at step {n_steps - 1}, its last") + "$"
    with pytest.raises(ValueError, match="^schedule <lambda> must end at 1, " + said):
        checked(lambda step: end, n_steps)
    with pytest.warns(UserWarning, match="^schedule <lambda> should end at 1, " + said):
        assert checked(lambda step: end, n_steps, may_end_below_one=True)(n_steps) == end


def test_rounding_is_forgiven_and_what_is_no_number_is_not():
    assert checked(lambda step: sum([0.1] * 10), 2)(1) == 1 and checked(lambda step: 1 + 1e-12, 2)(0) == 1
    with pytest.raises(ValueError, match=r"^schedule <lambda> must give numbers, got None at step 0$"):
        checked(lambda step: None, 2)


def test_what_is_no_function_is_no_schedule():
    with pytest.raises(ValueError, match=r"^schedule must be a function of the step, got 0.5$"):
        checked(0.5, 10)
