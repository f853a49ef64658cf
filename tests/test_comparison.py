"""Comparisons: intervals against tabulated quantiles, and the word for every case."""

import math
import random
import statistics
from types import SimpleNamespace

import pytest

from annealed_core.objectives import AVO, ELBO
from annealed_core.running.density import Density
from annealed_report import comparison
from annealed_report.comparison import Interval, difference, interval, paired_shares, select, spread, verdict

T_QUANTILES = {2: 12.7062, 3: 4.3027, 5: 2.7764, 10: 2.2622, 30: 2.0452}  # two-sided 95 %, n - 1 degrees of freedom


@pytest.mark.parametrize(("n", "quantile"), T_QUANTILES.items())
def test_the_interval_is_students(n, quantile):
    values = [math.sin(7 * i) for i in range(n)]
    found, error = interval(values), statistics.stdev(values) / n**0.5
    assert (found.mean, found.standard_error, found.n) == (statistics.fmean(values), pytest.approx(error), n)
    assert found.half_width == pytest.approx(quantile * error, rel=1e-4)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)


def test_the_interval_covers_the_mean_in_95_of_100_cases():
    generator = random.Random(0)
    found = [interval([generator.gauss(1, 2) for _ in range(4)]) for _ in range(4000)]
    assert sum(i.low <= 1 <= i.high for i in found) / 4000 == pytest.approx(0.95, abs=0.015)


def test_a_single_value_has_no_interval_and_equal_values_one_of_no_width():
    found = interval([3.0])
    assert (found.mean, found.low, found.high, found.n) == (3.0, -math.inf, math.inf, 1)
    assert math.isnan(found.standard_error)
    assert interval([2.0] * 4) == Interval(2.0, 0.0, 2.0, 2.0, 4)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [1.0, -math.inf]])
def test_no_interval_of_nothing_or_of_values_that_are_not_finite(values):
    with pytest.raises(ValueError, match="an interval needs at least one value, all finite, got"):
        interval(values)


def test_text_gives_mean_and_half_width():
    near_zero = Interval(-0.004, 0.01, -0.024, 0.016, 5)
    assert Interval(1.234, 0.1, 1.034, 1.434, 5).text() == "1.23 ± 0.20"
    assert (near_zero.text(), near_zero.text(3)) == ("0.00 ± 0.02", "−0.004 ± 0.020")
    assert comparison.text(interval([-0.5])) == "−0.50 (1 seed)" and comparison.text(None) == "–"


def between(low, high):
    return Interval((low + high) / 2, 1.0, low, high, 5)


CASES = [
    (between(0.1, 0.9), 0.0, "reproduced"),
    (between(0.1, 0.5), 0.5, "reproduced"),
    (between(0.1, 0.4), 0.5, "negligible"),
    (between(-0.9, -0.1), 0.0, "reversed"),
    (between(-0.9, -0.1), 0.9, "reversed"),
    (between(-0.9, -0.1), 1.0, "negligible"),
    (between(-0.2, 0.2), 0.5, "not reproduced"),
    (between(-9.0, 0.2), 0.5, "not reproduced"),
    (between(-0.2, 0.2), 0.0, "inconclusive"),
    (between(-0.2, 0.7), 0.5, "inconclusive"),
    (between(0.0, 0.0), 0.5, "not reproduced"),
    (interval([3.0]), 0.5, "inconclusive"),
    (None, 0.5, "not yet run"),
]


@pytest.mark.parametrize(("difference", "smallest_effect", "word"), CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_verdict_of_every_case(difference, smallest_effect, word, sign):
    if sign == -1 and difference is not None:
        difference = Interval(-difference.mean, 1.0, -difference.high, -difference.low, difference.n)
    assert verdict(difference, sign, smallest_effect) == word


def test_every_word_has_a_case():
    assert {word for *_, word in CASES} == set(comparison.VERDICTS)


@pytest.mark.parametrize("sign", [0, 2, -0.5])
def test_a_claim_needs_a_sign(sign):
    with pytest.raises(ValueError, match="claimed_sign must be"):
        verdict(between(0, 1), sign)


def test_pairs_that_all_agree_are_no_certainty():
    none = paired_shares([False] * 10, [False] * 10)
    assert none.mean == 0 and none.low == -none.high and 0.1 < none.high < 0.31
    assert verdict(none, -1, smallest_effect=0.1) == "inconclusive"


def test_shares_that_differ_in_most_pairs_differ():
    found = paired_shares([False] * 10, [True] * 7 + [False] * 3)
    assert found.mean == pytest.approx(-7 / 12) and found.high < 0 and found.n == 10
    assert paired_shares([True] * 7 + [False] * 3, [False] * 10).low == -found.high
    for ours in ([True], []):
        with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter|at least one pair"):
            paired_shares(ours, [])


# ---- over runs


def runs_of(values, **fields):
    """Runs, or records, of a spec with these fields; values of the metric `ess` by seed."""
    specs = {seed: SimpleNamespace(seed=seed, **fields) for seed in values}
    return [SimpleNamespace(spec=specs[seed], metrics={"ess": value}) for seed, value in values.items()]


def test_a_difference_pairs_the_seeds_that_both_methods_have_and_ignores_what_pairs_share():
    runs = runs_of({2: 205.2, 0: 100.1, 1: 0.4}, objective=AVO()) + runs_of(
        {0: 100.0, 2: 205.0, 7: 9}, objective=ELBO()
    )
    found = difference(runs, "ess", AVO(), ELBO())
    assert found.mean == pytest.approx(0.15) and found.high == pytest.approx(interval([0.1, 0.2]).high)
    assert difference(runs, "ess", {"objective": AVO()}, {"objective": ELBO()}) == found
    assert comparison.paired(runs[:3], runs[3:], "ess") == found
    assert difference(runs, "ess", AVO(), ELBO(), target="A") is None


def test_a_difference_over_runs_that_differ_in_more_than_their_seed_is_refused():
    runs = runs_of({0: 0.3}, objective=AVO(), steps=3000) + runs_of({0: 0.4}, objective=AVO(), steps=7)
    runs += runs_of({0: 0.1}, objective=ELBO(), steps=3000)
    with pytest.raises(ValueError, match="2 runs share 1 seeds: name more fields"):
        difference(runs, "ess", AVO(), ELBO())
    assert difference(runs, "ess", AVO(), ELBO(), steps=3000).mean == pytest.approx(0.2)


def test_runs_are_selected_by_their_fields_in_the_order_of_seeds():
    runs = runs_of({2: 0.5, 0: 0.3}, objective=AVO()) + runs_of({0: 0.1}, objective=ELBO(beta=0.5), kernel=None)
    assert [run.spec.seed for run in select(runs, objective=AVO())] == [0, 2]
    assert comparison.mean_metric(runs, "ess", objective=AVO()).mean == pytest.approx(0.4)
    assert comparison.mean_metric(runs, "ess", objective=AVO(weight=0.2)) is None
    assert select(runs, objective=ELBO()) == [] and select(runs, objective=ELBO) == runs[2:]
    assert select(runs, kernel=None) == runs[2:] and select(runs, target=None) == []  # others lack the field


def test_the_runs_of_given_specs_come_in_the_order_of_their_seeds_without_others():
    runs = [SimpleNamespace(spec=Density(seed=seed)) for seed in (2, 0, 1, 5)]
    assert comparison.of_specs(runs, [Density(seed=seed) for seed in (2, 0, 7)]) == [runs[1], runs[0]]


def test_a_mode_is_lost_with_less_than_a_fifth_of_its_samples():
    spec = SimpleNamespace(target="D")  # masses .1, .3, .4, .2
    cases = {(0.1, 0.3, 0.4, 0.2): False, (0.021, 0.379, 0.4, 0.2): False, (0.019, 0.381, 0.4, 0.2): True}
    for shares, lost in cases.items():
        assert comparison.loses_a_mode(SimpleNamespace(spec=spec, metrics={"mode_shares": shares})) is lost
    own = SimpleNamespace(target=SimpleNamespace(modes=(None, [0.5, 0.5])))
    assert comparison.loses_a_mode(SimpleNamespace(spec=own, metrics={"mode_shares": [0.95, 0.05]}))


def test_the_spread_over_settings_is_taken_within_each_seed():
    runs = [run for offset in (1, 2, 3) for run in runs_of({1: 100 + offset, 0: offset})]
    runs += [run for value in (1, 1, 4) for run in runs_of({2: value})]
    assert spread(runs, "ess") == {0: 1, 1: 1, 2: pytest.approx(3**0.5)}


@pytest.mark.parametrize("seeds", [(0, 0, 1), (0,)])
def test_a_spread_of_too_few_settings_is_refused(seeds):
    with pytest.raises(ValueError, match=r"^a spread needs as many settings of every seed, and two at least, got "):
        spread([run for seed in seeds for run in runs_of({seed: 1.0})], "ess")
