"""What pages 10 and 11 make of the runs of their studies, tried on made-up ones: which runs stand in which row."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from annealed_core.nested import NVI
from annealed_report import method_figures, seed_systems, system_figures, which_method
from annealed_report.seed_systems import ITERATIONS, KEPT, Amortised


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def made_up(specs, **values):
    """A run for each spec; a value may be a function of the spec."""
    return [
        SimpleNamespace(
            spec=spec,
            metrics={name: value(spec) if callable(value) else value for name, value in values.items()},
            seconds=60.0,
            history=[{"epoch": n, "elbo": -90.0 + n} for n in (1, 2)],
        )
        for spec in specs
    ]


def test_iterative_inference_stands_beside_the_encoder_fixed_and_together():
    def lacks(spec):
        return 4.0 - (3.0 if spec.iterations else 0.0)

    stages = [-95.0, -93.0, -92.0, -91.5, -91.2]
    values = {"elbo": -91.0, "nll": 88.0, "amortisation": lacks, "best_elbo": -90.0, "stage_elbos": stages}
    runs = made_up(seed_systems.refined(), **values)
    encoder, refined = system_figures.inferred(runs)
    assert (encoder["lacks of the best Gaussian"].mean, refined["lacks of the best Gaussian"].mean) == (4, 1)
    assert all(row["NLL, trained together"].n == row["bound, decoder fixed"].n == 3 for row in (encoder, refined))
    lines = system_figures.stages(runs).axes[0].lines
    assert len(lines) == 3 + 2 and list(lines[0].get_ydata()) == pytest.approx([-4.8, -2.8, -1.8, -1.3, -1.0])
    assert [set(line.get_ydata()) for line in lines[3:]] == [{0.0}, {-4.0}]  # the best Gaussian, and an encoder
    assert len([run for run in runs if isinstance(run.spec, Amortised) and run.spec.iterations == ITERATIONS]) == 3


def test_every_variant_has_a_row_and_every_sprite_a_dot():
    runs = made_up(seed_systems.variants(), nll=lambda spec: 90.0 + spec.seed, elbo=-95.0, kl=20.0, active_units=12)
    rows = system_figures.varied(runs)
    assert [row["NLL"].n for row in rows] == [3] * 13 and rows[0]["total correlation"] is None
    sprites = made_up(seed_systems.disentangling(), gap=lambda spec: 0.1 * spec.seed)
    (axes,) = system_figures.disentangled(sprites).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [*seed_systems.DISENTANGLING, "two capacities"]
    assert len(system_figures.annealed_terms().axes) == 3


def test_cells_are_two_by_two_from_either_start():
    def collapsed(spec):
        return 0.0 if spec.lr_schedule == "constant" else 5.0

    runs = made_up(seed_systems.restarts(), kl=collapsed, active_units=3, nll=90.0)
    rows = system_figures.cells(runs)
    assert system_figures.cycled(runs, 0.0, "restarts").mean == 0
    assert system_figures.restarted(runs, 0.1, "kl").mean == 5 and system_figures.restarted(runs, 0.1, "nll").mean == 0
    assert len(rows) == 8 and all(row["KL"].n == 5 for row in rows)
    assert {(row["learning rate"], row["KL"].mean) for row in rows} == {("constant", 0), ("restarts", 5)}
    assert len(system_figures.crossed().axes) == 2


def test_orders_are_compared_with_one_and_latents_with_no_annealing():
    runs = made_up(seed_systems.convolved(), nll=lambda spec: 90.0 - spec.decoder.orders + spec.seed)
    one, two, eight = system_figures.convolved(runs)
    assert one["− one order"] is None and (two["− one order"].mean, eight["− one order"].mean) == (-1, -7)
    assert len(system_figures.learned(runs).axes[0].lines) == 9 and len(system_figures.orders().axes) == 8
    rows = system_figures.kept(made_up(seed_systems.convolved_latents(), kl=1.0, active_units=2, nll=90.0))
    assert [row["trained by"] for row in rows] == list(KEPT) and rows[0]["its change"] is None
    assert all("no difference" in row["its change"] for row in rows[1:])


def test_every_method_is_drawn_on_every_target_and_ranked_by_its_errors():
    def error(spec):
        ours = getattr(spec, "objective", None)
        return 1e-3 if type(ours).__name__ == "AVO" else 0.1

    values = {"log_z_error_2000": error, "mode_error": 0.2, "ess": 0.5}
    runs = made_up(which_method.which_method(), **values)
    assert [len(axes.texts) for axes in method_figures.every(runs).axes] == [16 * 6] * 3
    (axes,) = method_figures.ranked(runs).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert set(names) == set(which_method.METHODS) and all("AVO" in name for name in names[:4])


def test_the_guide_names_the_closest_and_the_closest_of_those_that_draw_at_an_evaluation_each():
    def error(spec):
        return 1e-3 if isinstance(spec, which_method.Sampled) else 0.1

    def drawing(spec):
        return 500_000 if isinstance(spec, which_method.Sampled) else 2000

    ours = {spec: 0.01 for spec in which_method.which_method() if getattr(spec, "objective", None) == NVI()}
    values = {"log_z_error_2000": lambda spec: ours.get(spec, error(spec)), "evaluations_sampling": drawing}
    rows = method_figures.guide(made_up(which_method.which_method(), **values))
    assert len(rows) == 6 and {row["closest of all"] for row in rows} == {"AIS: 0.001"}
    assert {row["closest, a draw evaluated once"] for row in rows} == {"NVI: 0.01"}
    assert {row["AVO"] for row in rows} == {"0.1"} and method_figures.guide([]) == []


def test_bars_stand_beside_what_was_published_and_passes_beside_passes():
    values = {"log_z_error_2000": 0.02, "mode_error": 0.1, "ess": 0.9}
    values |= {"evaluations_training": 2_000_000, "evaluations_sampling": 2000}
    rows = method_figures.bars(made_up(which_method.which_bars(), **values))
    assert rows[0]["published"] == "0.0027 (FAB)" and rows[-1]["published"] == "–"
    assert all(row["error of log Z"] == "0.0200 ± 0.0000" and row["ESS"].n == 5 for row in rows)
    assert {row["evaluations: training + drawing"] for row in rows} == {"2,000,000 + 2,000"}
    rows = method_figures.ring(made_up(which_method.which_ring(), ess_100=0.95, log_z_100=2.0, mode_error=0.0))
    assert [(row["method"], row["K"]) for row in rows] == [("NVIR", 4), ("NVIR", 6), ("NVIR", 8), ("NVI", 8)]
    assert all(row["ESS of 100"].n == 10 and row["ESS of 100"].mean == 95 for row in rows)
    rows = method_figures.equal_passes(made_up(which_method.which_mnist(), nll=88.0, elbo=-92.0))
    assert [row["NLL"].n for row in rows] == [3, 3, 3]


def test_what_is_trained_live_is_short_and_shown_with_what_it_took():
    specs = dict(zip(method_figures.LIVE, method_figures.live(7, 3), strict=True))
    assert {spec.seed for spec in specs.values()} == {3} and {spec.target for spec in specs.values()} == {"ring8"}
    assert all(getattr(spec, "steps", 7) == 7 for spec in specs.values()) and not hasattr(specs["SMC"], "steps")
    metrics = {"log_z_error_2000": 0.0123, "ess": 0.5, "mode_error": 0.25}
    metrics |= {"evaluations_training": 75_000, "evaluations_sampling": 2000}
    (row,) = method_figures.seen({"AVO": SimpleNamespace(metrics=metrics)})
    assert list(row.values()) == ["AVO", "0.012", "0.500", "0.250", "75,000", "2,000"]


def test_the_mean_of_a_variant_is_that_of_its_runs_and_of_no_other():
    specs = seed_systems.variants()[:2]
    runs = [SimpleNamespace(spec=spec, metrics={"nll": 90.0 + n}) for n, spec in enumerate(specs)]
    assert system_figures.means(runs, "nll") == {"ELBO": 90.0, "warm-up": 91.0}
