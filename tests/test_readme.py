"""What the README tells a stranger to do works, and its figures are those of the committed runs."""

import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from annealed_core import AVO, ELBO, Gated, Residual
from annealed_report import results
from annealed_report.claims import rows
from annealed_report.comparison import difference, loses_a_mode, mean_metric, of_specs, paired, select, spread
from annealed_report.earlier import FAULTS, faulty
from annealed_report.folded_line import BY_AVO, metrics_of
from annealed_report.statistics import interval, paired_difference, paired_shares, word
from annealed_report.studies import (
    CHANGES,
    CHOSEN,
    FAR,
    MNIST_LINES,
    NEAR,
    RISES,
    SCHEDULED,
    SHORT_WARM_UP,
    THREE,
    WARM_UP,
    method,
    of_method,
    searched,
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(README.split())
EXAMPLES = re.findall(r"<!-- executed by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)

load = functools.cache(functools.partial(results.load, "full"))


def lines(example):
    return len([line for line in example.splitlines() if line.strip()])


def executed(example, store, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example)
    return subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path).stdout


def test_your_own_target_in_ten_lines(store, tmp_path):
    assert lines(EXAMPLES[0]) <= 10
    said = executed(EXAMPLES[0] + "\nassert z.shape == (1000, 2)\n", store, tmp_path)
    log_z, ess, total_variation = map(float, said.split())
    assert abs(log_z - math.log(math.pi / 2 * (1 + math.exp(-1)))) < 0.1
    assert 0.05 < ess <= 1 and 0 <= total_variation < 0.3


def test_an_own_kernel_and_an_own_objective_in_fifteen_lines(store, tmp_path):
    """The mean of D is (.4, .4): there the moved Gaussian's bound is highest."""
    assert lines(EXAMPLES[1]) <= 15
    by = executed(EXAMPLES[1] + "\nprint(*r.chain.kernels[0].by.tolist())\n", store, tmp_path)
    assert torch.tensor([float(each) for each in by.split()]).norm() > 0.1


def test_links_and_commands_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_results_are_those_of_the_committed_runs():
    gated = select(load("grid"), kernel=Gated())
    for name in "ABCDEF":
        gain = difference(gated, "total_variation", AVO(), ELBO(), target=name)
        means = [mean_metric(gated, "total_variation", target=name, objective=o).text(3) for o in (ELBO(), AVO())]
        assert f"| {name} | {means[0]} | {means[1]} | {gain.text(3)} | {word(gain, -1, 0.02)} |" in README
    for records, words in (
        (gated, "the ELBO loses a mode (keeps under a fifth of its mass) in {} and in {} of ten seeds"),
        (
            load("initialisation"),
            "started near the identity, the same chain loses a mode under the ELBO in {} and in {} of ten seeds",
        ),
        (select(load("kernels"), kernel=Residual()), "with residual transitions in {} and in {} of ten seeds"),
    ):
        counts = [sum(map(loses_a_mode, select(records, target=name, objective=ELBO()))) for name in "AD"]
        assert words.format(*counts) in WORDS
    assert not any(map(loses_a_mode, [run for name in "AD" for run in select(gated, target=name, objective=AVO())]))
    mnist = {name: of_method(load("mnist"), name) for name in MNIST_LINES}
    for name in THREE:
        assert re.search(rf"^\| {name} \|.*\| {re.escape(mean_metric(mnist[name], 'nll').text())} \|$", README, re.M)
    for theirs in ("HVI", "VAE"):
        assert f"{paired(mnist['HVI-AVO'], mnist[theirs], 'nll').text()} nats" in README
    more_draws = paired(mnist["IWAE, K = 50"], mnist["IWAE, K = 1"], "nll")
    flow = paired(mnist["IAF"], mnist["VAE"], "nll")
    assert more_draws.n == flow.n == 3
    words = f"changes the NLL by {more_draws.text()}, and an inverse autoregressive flow instead of the VAE's"
    assert f"{words} Gaussian by {flow.text()}." in WORDS
    for runs in mnist.values():  # “for every method”
        [bounded] = [run.metrics for run in runs if run.metrics.get("bounds_images")]
        assert 0.8 < -bounded["is_minus_ais"] < 1.5


def test_the_small_models_figures_are_those_of_the_committed_runs():
    from annealed_core import IWAE

    found = [metrics_of(load("folded_line"), 0.1, **plan) for plan in ({}, BY_AVO, {"objective": IWAE(5)})]
    assert [len(each) for each in found] == [10, 10, 10]
    one_mode = [sum(m["left"] * m["right"] < 0 for m in each) for each in found]
    assert "one mode in {} of ten seeds, by AVO in {} and by IWAE with five samples in {};".format(*one_mode) in WORDS
    losses = [interval([m["loss"] for m in each]).text(3) for each in found]
    assert "they lose {}, {} and {} nats of likelihood".format(*losses) in WORDS
    more = paired_shares(*([m["left"] * m["right"] < 0 for m in each] for each in (found[1], found[0])))
    assert more.low < 0 < more.high and f"its share of models with one mode ({more.text()} more)" in WORDS


def test_what_the_search_found_is_what_the_committed_runs_say():
    search, chosen = load("regime"), load("chosen")

    def shift(change, beside=None):
        sides = [of_specs(search, searched(n, c)) for n, c in (("HVI-AVO", change), ("HVI", beside or change))]
        return paired(*sides, "valid_elbo").text()

    light = shift("torch's initial weights")
    heavy = shift("torch's initial weights, weight 1", "torch's initial weights")
    from_prior = shift("from the prior, hidden 200")
    hvi, vae = (paired(of_method(chosen, "HVI-AVO"), of_method(chosen, m), "nll").text() for m in ("HVI", "VAE"))
    words = f"weights HVI-AVO's bound is {light} nats from HVI's (AVO at weight 0.2; at weight 1 {heavy}),"
    words = f"{words} from the prior {from_prior}, and with the change that does best, {CHOSEN},"
    words = f"{words} HVI-AVO − HVI is {hvi} and HVI-AVO − VAE {vae} nats of test NLL on fresh seeds"
    assert words in WORDS and "None of eleven changes" in README and len(CHANGES) == 11 + 1


def test_the_cost_of_the_earlier_faults_is_that_of_the_committed_runs():
    every = tuple(FAULTS)

    def trained_with(kernel, *faults):
        return select(load("anatomy"), kernel=kernel, **faulty(*faults, beta=WARM_UP))

    clean = trained_with(NEAR)
    costs = [paired(trained_with(NEAR, *faults), clean, "nll").text() for faults in (every, every[1:])]
    assert "all of them cost {} nats beside none, all but the first {}:".format(*costs) in WORDS
    grey = [mean_metric(trained_with(FAR, *faults), "grey_nll").text() for faults in (every[1:], every)]
    assert "ours is {} without the sum and {} with it.".format(*grey) in WORDS
    afar = paired(*(trained_with(kernel, *every[1:]) for kernel in (FAR, NEAR)), "nll").text()
    assert (
        f"Torch's initial weights, which the earlier code had too, cost another {afar} with all but the first" in WORDS
    )


def test_how_far_sampling_is_from_annealing_is_what_the_committed_runs_say():
    short = [-r.metrics["is_minus_ais"] for r in load("mnist") if r.metrics.get("bounds_images")]
    assert min(short) > 0.75 and sum(short) / len(short) < 1.25
    fitted = [abs(r.metrics["adaptive_minus_ais"]) for r in load("agreement")]
    words = f"they and annealing differ by at most {math.ceil(100 * max(fitted)) / 100:.2f} nats in any of nine further"
    assert words in WORDS and len(fitted) == 9


def test_what_schedules_change_is_what_the_committed_runs_say():
    found = load("schedules")

    def shift(ours, theirs):
        return paired(select(found, **ours), select(found, **theirs), "nll").text()

    warmed = [shift(method(name, SHORT_WARM_UP), method(name, 1.0)) for name in ("VAE", "IAF", "HVI-AVO")]
    assert "{} nats for the VAE, {} for an inverse autoregressive flow and {} for HVI-AVO,".format(*warmed) in WORDS
    vae = {name: {"kernel": None, "objective": objective} for name, objective in SCHEDULED.items()}
    cycles, alpha = shift(vae["cyclical, linear"], vae["linear"]), shift(vae["alpha"], vae["constant"])
    assert f"make {cycles} nats of difference to the VAE, and tempering the whole energy costs it {alpha}." in WORDS
    names = ("constant", "linear", "cyclical, linear")
    kl = [mean_metric(load("collapse"), "kl", objective=RISES[name]).text() for name in names]
    assert "the KL is {} nats without annealing, {} after one rise and {} after four cycles".format(*kl) in WORDS


def test_how_much_the_grid_varies_is_what_the_committed_runs_say():
    sides = (of_method(load("robustness"), name) for name in ("HVI-AVO", "HVI"))
    ours, theirs = (list(spread(side, "nll").values()) for side in sides)
    varies = paired_difference(ours, theirs)
    said = f"by {interval(ours).text()} nats and that of HVI by {interval(theirs).text()}"
    end = "that AVO minds the schedule less is not tested by kernels that earn nothing ("
    assert f"{said}, a difference of {varies.text()}: {end}" in WORDS
    assert {row.word for row in rows("full") if row.claim.study == "robustness"} == {"not tested"}


def test_what_two_hundred_epochs_change_is_what_the_committed_runs_say():
    long = {name: of_method(load("long"), name) for name in THREE}
    against = [paired(long["HVI-AVO"], long[theirs], "nll").text() for theirs in ("HVI", "VAE")]
    assert "more (three seeds: NLL HVI-AVO − HVI {} and HVI-AVO − VAE {}, all three at 87.9).".format(*against) in WORDS
    for runs in long.values():
        assert len(runs) == 3 and f"{mean_metric(runs, 'nll').mean:.1f}" == "87.9"


@pytest.mark.parametrize("old", re.findall(r"^\| `(Spec\(.*?\))`", README, re.MULTILINE))
def test_an_earlier_call_names_the_new_one(old):
    import annealed_core

    with pytest.raises(TypeError, match="write") as caught:
        eval(old, vars(annealed_core))
    new = re.search(r"write (.*); the README", str(caught.value))[1]
    assert eval(new, vars(annealed_core)).seed == 0
