"""Studies: what the full profile compares is comparable."""

from types import SimpleNamespace

import pytest

from annealed_core.objectives import AVO, ELBO, AlphaELBO
from annealed_core.schedules import value_at
from annealed_core.variants import CapacityELBO
from annealed_report import results
from annealed_report.comparison import of_specs, select
from annealed_report.earlier import FAULTS, faulty
from annealed_report.studies import (
    CHANGES,
    CHOSEN,
    DENSITY_STUDIES,
    GRID_METHODS,
    LINES,
    MNIST_LINES,
    NEAR,
    NVI_SAMPLES,
    SCHEDULED,
    STUDIES,
    THREE,
    WARM_UP,
    find_study,
    method,
    of_method,
    searched,
    with_beta,
)
from annealed_report.which_method import seeded

#: Studies that are planned, with their claims, and have no records yet: what they are to decide reads "not tested".
NOT_YET_RUN = ("working", "likeliest")
NOT_YET_RUN += ("which_ring", "which_mnist")
NOT_YET_RUN += ("convolved", "convolved_latents")
TABLED = ("grid", "objectives", "kernels", "initialisation")
STUDIED = {name: study() for name, study in STUDIES.items()}
SEEDS = dict.fromkeys(
    ("chains", "robust", "mnist", "long", "anatomy", "agreement", "regime", "chosen", "robustness", "pruning"), 3
)
SEEDS |= dict.fromkeys(("best", "faultless", "schedules", "risen", "collapse", "posterior_alone", "quarter"), 5)
SEEDS |= {"which_method": 5, "which_bars": 5, "which_ring": 10, "which_mnist": 3}
SEEDS |= {"tuning": 3, "tuned": 20, "starts": 20, "working": 6, "likeliest": 3}
SEEDS |= {"refined": 3, "variants": 3, "disentangling": 5, "restarts": 5, "convolved": 3, "convolved_latents": 3}


def runs_of(*names):
    return [SimpleNamespace(spec=spec) for name in names for spec in STUDIED[name]]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_nothing_twice_and_each_method_every_seed(name):
    specs = STUDIED[name]
    assert len(set(specs)) == len(specs) and (specs or name in ("tuned", "working", "robust"))
    if not specs:  # they wait for what another study chooses
        assert not results.load("full", {"tuned": "tuning", "working": "chains", "robust": "chains"}[name])
        return
    groups = {}
    for spec in specs:  # bounds take minutes: one seed has them
        bounds = {name: 0 for name in ("bounds_images", "annealed_images") if hasattr(spec, name)}
        alike = seeded(spec.replace(seed=0, **bounds))
        groups.setdefault(alike, set()).add(spec.seed)
    assert len({frozenset(seeds) for seeds in groups.values()}) == 1
    assert all(len(seeds) == SEEDS.get(name, 10) for seeds in groups.values())


def test_studies_share_nothing():
    # Two studies run some of what others have again, so that each is of one state of the code.
    every = [spec for name, specs in STUDIED.items() for spec in specs if name not in ("apart", "tuning")]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in NOT_YET_RUN])
def test_every_run_of_a_study_is_recorded_once_and_no_other(name):
    recorded = [record.spec for record in results.load("full", name)]
    assert len(recorded) == len(STUDIED[name]) and set(recorded) == set(STUDIED[name])


def test_the_lines_of_the_table_part_the_runs_of_its_studies():
    runs = runs_of(*TABLED)
    found = [run for fields in LINES.values() for run in select(runs, **fields)]
    assert len(found) == len(runs) == len(set(map(id, found)))
    for name in "ABCDEF":
        for line, fields in LINES.items():
            assert [run.spec.seed for run in select(runs, target=name, **fields)] == list(range(10)), line


def test_the_lines_of_mnist_part_its_runs_and_are_found_at_whatever_warm_up():
    runs = runs_of("mnist")
    found = [run for fields in MNIST_LINES.values() for run in select(runs, **fields)]
    assert len(found) == len(runs) == len(set(map(id, found)))
    assert all(of_method(runs, name) == select(runs, **fields) for name, fields in MNIST_LINES.items())
    assert [len(of_method(runs_of("robustness"), name)) for name in GRID_METHODS] == [48] * 5


def test_the_ring_spends_nvis_budget_in_every_step():
    for spec in STUDIED["ring8"]:
        assert spec.batch * (spec.n_transitions + 1) == NVI_SAMPLES == 288 and spec.steps == 20_000


def test_the_best_chains_are_shown_on_seeds_that_chose_nothing():
    assert {spec.seed for spec in STUDIED["best"]} == set(range(100, 105))


def test_what_is_not_yet_run_has_no_records():
    assert all(not results.load("full", name) for name in NOT_YET_RUN)


def test_a_study_begun_is_of_one_commit_and_holds_nothing_else():
    for path in (results.FOLDER / "begun").glob("*.json"):
        begun = results.load("begun", path.stem)
        assert path.stem in NOT_YET_RUN and len({record.commit for record in begun}) == 1
        assert {record.spec for record in begun} <= set(STUDIED[path.stem])


def test_an_unknown_study_is_refused_with_the_known_ones():
    assert find_study("compute") == STUDIED["compute"] and "compute" in DENSITY_STUDIES
    with pytest.raises(ValueError, match=r"^unknown study 'grit': choose one of grid, objectives, kernels, "):
        find_study("grit")


def test_the_anatomy_takes_the_faults_away_one_by_one_and_shows_each_alone():
    names = tuple(FAULTS)
    for faults in [names[start:] for start in range(6)] + [(name,) for name in names]:
        assert len(select(runs_of("anatomy"), kernel=NEAR, **faulty(*faults, beta=WARM_UP))) == 3, faults
    assert all(len(of_method(runs_of("anatomy"), name)) == 3 for name in ("HVI", "HVI-AVO"))


@pytest.mark.parametrize("name", ["mnist", "long", "agreement", "chosen", "schedules", "robustness", "collapse"])
def test_rivals_differ_in_kernel_and_objective_alone(name):
    differ = {"kernel", "n_transitions", "objective", "seed", "bounds_images"}
    shared = [{k: v for k, v in spec.fields().items() if k not in differ} for spec in STUDIED[name]]
    assert all(each == shared[0] for each in shared)


@pytest.mark.parametrize("name", ["long", "agreement"])
def test_three_methods_differ_in_kernel_and_objective_as_their_lines_say(name):
    for line in THREE:
        assert [run.spec for run in select(runs_of(name), **MNIST_LINES[line])] == [
            spec.replace(**MNIST_LINES[line], n_transitions=None)
            for spec in STUDIED[name]
            if spec.objective == AVO(0.2, WARM_UP)
        ]


def test_what_the_regime_compares_trains_for_as_long_at_the_same_rate():
    assert len({(s.epochs, s.batch, s.lr, s.lr_schedule, s.train_images) for s in STUDIED["regime"]}) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_of_the_search_differs_from_the_usual_one_in_its_change_alone(change):
    may = {"VAE": {"beta"}, "HVI": {"beta", "kernel", "base", "n_transitions"}}
    for name in THREE:
        for usual, spec in zip(searched(name, "none"), searched(name, change), strict=True):
            own = {field: value for field, value in CHANGES[change].items() if field in may.get(name, CHANGES[change])}
            beta = own.pop("beta", usual.objective.beta)
            own["objective"] = with_beta(own.get("objective", usual.objective), beta)
            assert spec == usual.replace(**own) and {spec, usual} <= set(STUDIED["regime"])


def test_the_chosen_setting_is_the_best_on_validation_and_judged_with_fresh_seeds():
    found = results.load("full", "regime")
    bounds = {}
    for change in CHANGES:
        values = [run.metrics["valid_elbo"] for run in of_specs(found, searched("HVI-AVO", change))]
        assert len(values) == 3
        bounds[change] = sum(values)
    assert max(bounds, key=bounds.get) == CHOSEN
    assert not {spec.seed for spec in STUDIED["chosen"]} & {spec.seed for spec in STUDIED["regime"]}
    assert all(len(of_method(runs_of("chosen"), name)) == 3 for name in THREE)


def test_the_grid_crosses_every_start_with_every_slope_for_each_method():
    settings = {n: {r.spec.objective.beta for r in of_method(runs_of("robustness"), n)} for n in GRID_METHODS}
    assert len({frozenset(found) for found in settings.values()}) == 1 and len(settings["VAE"]) == 16
    assert all(value_at(spec.objective.beta, spec.n_steps) == 1 for spec in STUDIED["robustness"])


def test_every_schedule_is_run_by_vae_and_hvi_and_comes_to_one():
    (steps,) = {spec.n_steps for spec in STUDIED["schedules"]}
    for objective in SCHEDULED.values():
        assert {r.spec.kernel for r in select(runs_of("schedules"), objective=objective)} >= {None, NEAR}
        annealed = {AlphaELBO: "alpha", CapacityELBO: "rise", ELBO: "beta"}[type(objective)]
        assert value_at(getattr(objective, annealed), steps - 1) > 0.99
    assert {r.spec.objective.alphas for r in select(runs_of("schedules"), objective=AVO)} > {AVO().alphas}
    assert method("HVI-AVO", 1.0)["objective"] == AVO(0.2)
