"""Studies: what the full profile compares is comparable."""

import pytest

from annealed_core import results
from annealed_core.comparison import of_specs, select
from annealed_core.earlier import FAULTS
from annealed_core.spec import Spec
from annealed_core.studies import CHANGES, CHOSEN, LINES, NVI_SAMPLES, SEARCH, STUDIES, find_study, searched

TABLED = ("grid", "objectives", "kernels", "initialisation")
STUDIED = {name: study() for name, study in STUDIES.items()}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_no_spec_twice_and_each_method_every_seed(name):
    specs, varied = STUDIED[name], ("seed", "bounds_images")  # bounds take minutes: one seed has them
    assert len(set(specs)) == len(specs) > 0
    groups = {}
    for spec in specs:
        key = tuple(sorted((k, v) for k, v in spec.fields().items() if k not in varied))
        groups.setdefault(key, set()).add(spec.seed)
    assert len({frozenset(seeds) for seeds in groups.values()}) == 1
    enough = {
        "best": 5,
        "mnist": 3,
        "long": 3,
        "anatomy": 3,
        "faultless": 5,
        "precision": 3,
        "agreement": 3,
        "regime": 3,
        "chosen": 3,
    }
    enough |= {"robustness": 3, "schedules": 5, "collapse": 5}
    assert all(len(seeds) >= enough.get(name, 10) for seeds in groups.values())


def test_studies_share_no_spec():
    every = [spec for specs in STUDIED.values() for spec in specs]
    assert len(set(every)) == len(every)


def test_the_lines_of_the_table_part_the_runs_of_its_studies():
    class Run:
        def __init__(self, spec):
            self.spec = spec

    runs = [Run(spec) for name in TABLED for spec in STUDIED[name]]
    found = [run for fields in LINES.values() for run in select(runs, **fields)]
    assert len(found) == len(runs) == len(set(map(id, found)))
    for name in "ABCDEF":
        for line, fields in LINES.items():
            assert [run.spec.seed for run in select(runs, target=name, **fields)] == list(range(10)), line


def test_the_ring_spends_nvis_budget_in_every_step():
    for spec in STUDIED["ring8"]:
        assert spec.batch * (spec.n_transitions + 1) == NVI_SAMPLES == 288 and spec.steps == 20_000


def test_the_best_chains_are_shown_on_seeds_that_chose_nothing():
    assert {spec.seed for spec in STUDIED["best"]} == set(range(100, 105))


def test_an_unknown_study_is_refused_with_the_known_ones():
    assert find_study("compute") == STUDIED["compute"]
    with pytest.raises(ValueError, match=r"^unknown study 'grit': choose one of grid, objectives, kernels, "):
        find_study("grit")


def test_the_anatomy_takes_the_faults_away_one_by_one_and_shows_each_alone():
    found = {spec.faults for spec in STUDIED["anatomy"] if spec.method == "mixture"}
    names = tuple(FAULTS)
    assert {names, names[1:], names[2:], names[3:], names[4:], ()} <= found
    assert {(name,) for name in names} <= found
    assert {spec.method for spec in STUDIED["anatomy"]} == {"mixture", "hvi", "avo"}


def test_what_the_long_study_compares_differs_in_the_method_alone():
    hvi = [spec for spec in STUDIED["long"] if spec.method == "hvi"]
    for method in ("vae", "avo"):
        assert [s for s in STUDIED["long"] if s.method == method] == [s.replace(method=method) for s in hvi]


def test_what_the_regime_compares_trains_for_as_long_at_the_same_rate():
    assert len({(s.epochs, s.batch, s.lr, s.lr_schedule, s.layers, s.ema) for s in STUDIED["regime"]}) == 1


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_of_the_search_differs_from_the_usual_one_in_its_change_alone(name):
    lacks = {"avo": set(), "hvi": {"avo_weight", "path", "faults"}, "vae": set(CHANGES[name]) - {"schedule"}}
    for method, fields in lacks.items():
        usual = [Spec("mnist", method, seed=seed, **SEARCH) for seed in range(3)]
        change = {key: value for key, value in CHANGES[name].items() if key not in fields}
        wanted = [spec.replace(**change) for spec in usual]
        assert searched(method, name) == wanted and set(wanted) | set(usual) <= set(STUDIED["regime"])


def test_the_chosen_setting_is_the_best_on_validation_and_judged_with_fresh_seeds():
    found = results.load("full", "regime")
    bounds = {}
    for name in CHANGES:
        values = [run.metrics["valid_elbo"] for run in of_specs(found, searched("avo", name))]
        assert len(values) == 3
        bounds[name] = sum(values)
    assert max(bounds, key=bounds.get) == CHOSEN
    assert not {spec.seed for spec in STUDIED["chosen"]} & {spec.seed for spec in STUDIED["regime"]}
    assert {spec.method for spec in STUDIED["chosen"]} == {"vae", "hvi", "avo"}


def test_the_grid_crosses_every_start_with_every_slope_for_each_method():
    settings = {}
    for spec in STUDIED["robustness"]:
        settings.setdefault(spec.method, set()).add((spec.beta0, spec.gamma))
    assert len(settings) == 5 and len({frozenset(found) for found in settings.values()}) == 1
    assert all(len(found) == 16 for found in settings.values())
    assert all(spec.annealing(spec.n_steps) == 1 for spec in STUDIED["robustness"])


@pytest.mark.parametrize("name", ["schedules", "robustness", "collapse"])
def test_rival_schedules_differ_in_the_schedule_alone(name):
    own = {"method", "seed", "schedule", "anneals", "beta0", "gamma", "cycles", "ratio", "shape", "capacity"}
    own |= {"n_transitions", "hidden", "path", "avo_weight", "initialisation", "base", "faults"}  # of the methods
    shared = [{k: v for k, v in spec.fields().items() if k not in own} for spec in STUDIED[name]]
    assert all(each == shared[0] for each in shared)
    assert {"lr", "lr_schedule", "beta1", "batch", "epochs", "train_images"} <= shared[0].keys()
