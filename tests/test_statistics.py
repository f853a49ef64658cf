"""Statistics: intervals against tabulated quantiles, the word for every case, and how often words are wrong."""

import math
import random
import statistics

import pytest

from annealed_report.statistics import (
    WORDS,
    Interval,
    error_rates,
    holm,
    interval,
    paired_shares,
    pooled,
    text,
    word,
)

T_QUANTILES = {2: 12.7062, 3: 4.3027, 5: 2.7764, 10: 2.2622, 30: 2.0452}  # two-sided 95 %, n - 1 degrees of freedom


@pytest.mark.parametrize(("n", "quantile"), T_QUANTILES.items())
def test_the_interval_is_students(n, quantile):
    values = [math.sin(7 * i) for i in range(n)]
    found, error = interval(values), statistics.stdev(values) / n**0.5
    assert (found.mean, found.standard_error, found.n) == (statistics.fmean(values), pytest.approx(error), n)
    assert found.half_width == pytest.approx(quantile * error, rel=1e-4)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    assert found.at(0.95) == (found.low, found.high)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_the_interval_covers_the_mean_as_often_as_it_says(level):
    draw = random.Random(0)
    found = [interval([draw.gauss(1, 2) for _ in range(4)]).at(level) for _ in range(4000)]
    assert sum(low <= 1 <= high for low, high in found) / 4000 == pytest.approx(level, abs=0.015)


def test_a_single_value_has_no_interval_and_equal_values_one_of_no_width():
    found = interval([3.0])
    assert (found.mean, found.low, found.high, found.n, found.p_value) == (3.0, -math.inf, math.inf, 1, 1.0)
    assert math.isnan(found.standard_error)
    assert (found := interval([2.0] * 4)).at(0.9) == (2.0, 2.0) and found.p_value == 0
    assert interval([0.0] * 4).p_value == 1


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [1.0, -math.inf]])
def test_no_interval_of_nothing_or_of_values_that_are_not_finite(values):
    with pytest.raises(ValueError, match="an interval needs at least one value, all finite, got"):
        interval(values)


def test_text_gives_mean_and_half_width():
    assert between(1.034, 1.434).text() == "1.23 ± 0.20"
    assert (between(-0.024, 0.016).text(), between(-0.024, 0.016).text(3)) == ("0.00 ± 0.02", "−0.004 ± 0.020")
    assert between(-0.0026, -0.0014).text() == "−0.002 ± 0.001" and between(-2e-5, 0.0).text() == "0.0000 ± 0.0000"
    assert text(interval([-0.5])) == "−0.50 (1 seed)" and text(None) == "–"


def between(low, high):
    """An interval of the normal distribution."""
    return Interval((low + high) / 2, (high - low) / 2 / 1.9599640, 5, math.inf)


CASES = [
    (between(0.6, 0.9), "holds"),
    (between(0.4, 0.9), "holds, size open"),
    (between(0.1, 0.4), "no difference"),
    (between(-0.4, -0.1), "no difference"),
    (between(-0.49, 0.52), "no difference"),  # its 90 % interval ends at 0.44
    (between(-0.9, 0.4), "gain excluded"),
    (between(-0.9, -0.1), "opposite, size open"),
    (between(-0.9, -0.6), "opposite"),
    (between(-0.2, 0.7), "undetermined"),
    (interval([3.0]), "undetermined"),
    (None, "not tested"),
]


@pytest.mark.parametrize(("difference", "expected"), CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_word_of_every_case(difference, expected, sign):
    if sign == -1 and difference is not None:
        difference = Interval(-difference.mean, difference.standard_error, difference.n, difference.df)
    assert word(difference, sign, 0.5) == expected


def test_every_word_has_a_case_and_a_claim_a_sign():
    assert {expected for _, expected in CASES} == WORDS.keys()
    for sign in (0, 2, -0.5):
        with pytest.raises(ValueError, match="sign must be"):
            word(between(0, 1), sign)


def test_pairs_that_all_agree_are_no_certainty():
    none = paired_shares([False] * 10, [False] * 10)
    assert none.mean == 0 and none.low == -none.high and 0.1 < none.high < 0.31
    assert word(none, -1, smallest=0.1) == "undetermined"


def test_shares_that_differ_in_most_pairs_differ():
    found = paired_shares([False] * 10, [True] * 7 + [False] * 3)
    assert found.mean == pytest.approx(-7 / 12) and found.high < 0 and found.n == 10
    assert paired_shares([True] * 7 + [False] * 3, [False] * 10).low == -found.high
    for ours in ([True], []):
        with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter|at least one pair"):
            paired_shares(ours, [])


# ---- several at once


def test_holm_descends_until_one_reaches_zero():
    clear, some, none = between(0.9, 1.1), between(0.02, 0.98), between(-1, 1)
    found = holm({"none": none, "some": some, "clear": clear})
    assert list(found) == ["none", "some", "clear"]
    assert [found[name].level for name in ("clear", "some", "none")] == pytest.approx([1 - 0.05 / 3] + [0.975] * 2)
    assert some.low > 0 > found["some"].low  # alone it would be told from 0
    assert holm({"one": some})["one"] == some and holm({}) == {}


def test_holm_says_something_of_nothing_in_one_study_of_twenty():
    draw = random.Random(1)
    wrong = 0
    for _ in range(2000):
        found = holm({str(each): interval([draw.gauss(0, 1) for _ in range(6)]) for each in range(6)})
        wrong += any(not each.low <= 0 <= each.high for each in found.values())
    assert wrong / 2000 == pytest.approx(0.05, abs=0.012)


def test_a_pooled_interval_covers_the_mean_of_all_settings_and_not_of_those_that_were_run():
    draw = random.Random(2)
    pooled_covers = naive_covers = 0
    for _ in range(2000):
        settings = {}
        for setting in range(6):
            own = draw.gauss(1, 1)
            settings[str(setting)] = [own + draw.gauss(0, 0.5) for _ in range(5)]
        found = pooled(settings)
        pooled_covers += found.low <= 1 <= found.high
        naive = interval([value for values in settings.values() for value in values])
        naive_covers += naive.low <= 1 <= naive.high
    assert pooled_covers / 2000 == pytest.approx(0.95, abs=0.015) and naive_covers / 2000 < 0.75
    with pytest.raises(ValueError, match="settings are pooled from two on, got 1"):
        pooled({"one": [1.0, 2.0]})


@pytest.mark.parametrize("n", [3, 5, 20])
def test_words_are_wrong_as_seldom_as_they_promise(n):
    under_none = error_rates(0.0, 1.0, 0.8, n)
    assert under_none["holds"] + under_none["holds, size open"] <= 0.025 + 0.008
    assert under_none["opposite"] + under_none["opposite, size open"] <= 0.025 + 0.008
    at_smallest = error_rates(1.0, 1.0, 0.8, n)
    assert at_smallest["holds"] <= 0.025 + 0.008  # "holds" says: larger than that
    assert at_smallest["no difference"] <= 0.05 + 0.01
    assert at_smallest["gain excluded"] + at_smallest["opposite"] + at_smallest["opposite, size open"] <= 0.025 + 0.008
    assert sum(at_smallest.values()) == pytest.approx(1)


def test_twenty_seeds_tell_a_gain_from_none():
    assert error_rates(2.0, 1.0, 0.8, 20)["holds"] > 0.99
    assert error_rates(0.0, 1.0, 0.8, 20)["no difference"] > 0.99
