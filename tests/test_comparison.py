"""Comparisons: which runs belong together."""

from types import SimpleNamespace

import pytest

from annealed_core.objectives import AVO, ELBO
from annealed_core.running.density import Density
from annealed_report import comparison
from annealed_report.comparison import difference, select, spread
from annealed_report.statistics import interval


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


def test_the_error_of_the_modes_masses_is_their_total_variation_from_the_samples():
    run = SimpleNamespace(spec=SimpleNamespace(target="D"), metrics={"mode_shares": (0.0, 0.3, 0.5, 0.2)})
    assert comparison.mode_error(run) == pytest.approx(0.1)


def test_the_spread_over_settings_is_taken_within_each_seed():
    runs = [run for offset in (1, 2, 3) for run in runs_of({1: 100 + offset, 0: offset})]
    runs += [run for value in (1, 1, 4) for run in runs_of({2: value})]
    assert spread(runs, "ess") == {0: 1, 1: 1, 2: pytest.approx(3**0.5)}


@pytest.mark.parametrize("seeds", [(0, 0, 1), (0,)])
def test_a_spread_of_too_few_settings_is_refused(seeds):
    with pytest.raises(ValueError, match=r"^a spread needs as many settings of every seed, and two at least, got "):
        spread([run for seed in seeds for run in runs_of({seed: 1.0})], "ess")
