"""What the README tells a stranger to do works."""

import math
import re
import subprocess
import sys
from pathlib import Path

from annealed_core import results
from annealed_core.comparison import (
    difference,
    interval,
    loses_a_mode,
    mean_metric,
    paired,
    paired_difference,
    paired_shares,
    select,
    spread,
    verdict,
)
from annealed_core.earlier import FAULTS
from annealed_core.noise_runs import metrics_of
from annealed_core.studies import CHANGES, CHOSEN, MNIST_LINES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_your_own_target_in_ten_lines(store, tmp_path):
    example = re.search(r"<!-- executed by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    script = tmp_path / "own_target.py"
    script.write_text(example + "\nassert z.shape == (1000, 2)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path)
    log_z, ess, total_variation = map(float, done.stdout.split())
    assert abs(log_z - math.log(math.pi / 2 * (1 + math.exp(-1)))) < 0.1
    assert 0.05 < ess <= 1 and 0 <= total_variation < 0.3


def test_links_and_commands_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_results_are_those_of_the_committed_runs():
    toy = select(results.load("full", "grid"), kernel="gated")
    mnist = select(results.load("full", "mnist"), epochs=25, schedule="linear")
    for name in "ABCDEF":
        gain = difference(toy, "total_variation", "avo", "elbo", target=name)
        means = [mean_metric(toy, "total_variation", target=name, method=m).text(3) for m in ("elbo", "avo")]
        assert f"| {name} | {means[0]} | {means[1]} | {gain.text(3)} | {verdict(gain, -1, 0.02)} |" in README
    start = results.load("full", "initialisation")
    residual = select(results.load("full", "kernels"), kernel="residual")
    for records, words in (
        (toy, "the ELBO loses a mode (keeps under a fifth of its mass) in {} and in {} of ten seeds"),
        (start, "started near the identity, the same chain loses a mode under the ELBO in {} and in {} of ten seeds"),
        (residual, "with residual transitions in {} and in {} of ten seeds"),
    ):
        counts = [sum(map(loses_a_mode, select(records, target=name, method="elbo"))) for name in "AD"]
        assert words.format(*counts) in " ".join(README.split())
    assert not any(map(loses_a_mode, [run for name in "AD" for run in select(toy, target=name, method="avo")]))
    for name, method in (("VAE", "vae"), ("HVI", "hvi"), ("HVI-AVO", "avo")):
        assert re.search(
            rf"^\| {name} \|.*\| {re.escape(mean_metric(mnist, 'nll', method=method).text())} \|$", README, re.M
        )
    for theirs in ("hvi", "vae"):
        gain = difference(mnist, "nll", "avo", theirs)
        assert f"{gain.text()} nats" in README
    draws = [select(mnist, method="iwae", iwae_samples=k) for k in (50, 1)]
    more_draws, flow = paired(*draws, "nll"), difference(mnist, "nll", "iaf", "vae")
    assert more_draws.n == flow.n == 3
    words = f"changes the NLL by {more_draws.text()}, and an inverse autoregressive flow instead of the VAE's"
    assert f"{words} Gaussian by {flow.text()}." in " ".join(README.split())
    for fields in MNIST_LINES.values():  # “for every method”
        [bounded] = [run.metrics for run in select(mnist, **fields) if run.metrics.get("bounds_images")]
        assert 0.8 < -bounded["is_minus_ais"] < 1.5


def test_the_noise_models_figures_are_those_of_the_committed_runs():
    noise, words = results.load("full", "noise_model"), " ".join(README.split())
    plans = ({}, {"method": "avo"}, {"method": "iwae", "iwae_samples": 5})
    found = [metrics_of(noise, 0.1, **plan) for plan in plans]
    assert [len(each) for each in found] == [10, 10, 10]
    one_mode = [sum(m["left"] * m["right"] < 0 for m in each) for each in found]
    assert "one mode in {} of ten seeds, by AVO in {} and by IWAE with five samples in {};".format(*one_mode) in words
    losses = [interval([m["loss"] for m in each]).text(3) for each in found]
    assert "they lose {}, {} and {} nats of likelihood".format(*losses) in words
    more = paired_shares(*([m["left"] * m["right"] < 0 for m in each] for each in (found[1], found[0])))
    assert more.low < 0 < more.high and f"its share of models with one mode ({more.text()} more)" in words


def test_what_the_search_found_is_what_the_committed_runs_say():
    search, chosen = (results.load("full", name) for name in ("regime", "chosen"))
    afar = select(search, initialisation="default")
    light, heavy = (
        paired(select(afar, method="avo", avo_weight=weight), select(afar, method="hvi"), "valid_elbo").text()
        for weight in (0.2, 1.0)
    )
    hvi, vae = (difference(chosen, "nll", "avo", theirs) for theirs in ("hvi", "vae"))
    prior = select(search, base="prior")
    from_prior = paired(select(prior, method="avo"), select(prior, method="hvi"), "valid_elbo").text()
    words = f"weights HVI-AVO's bound is {light} nats from HVI's (AVO at weight 0.2; at weight 1 {heavy}),"
    words = f"{words} from the prior {from_prior}, and with the change that does best, {CHOSEN},"
    words = f"{words} HVI-AVO − HVI is {hvi.text()} and HVI-AVO − VAE {vae.text()} nats of test NLL on fresh seeds"
    assert words in " ".join(README.split()) and "None of eleven changes" in README and len(CHANGES) == 11 + 1


def test_the_cost_of_the_earlier_faults_is_that_of_the_committed_runs():
    both_starts = select(results.load("full", "anatomy"), method="mixture", avo_weight=0.2)
    anatomy = select(both_starts, initialisation="identity")
    every, clean = tuple(FAULTS), select(anatomy, faults=())
    costs = [paired(select(anatomy, faults=faults), clean, "nll").text() for faults in (every, every[1:])]
    assert "all of them cost {} nats beside none, all but the first {}:".format(*costs) in " ".join(README.split())
    grey = [
        mean_metric(both_starts, "grey_nll", initialisation="default", faults=faults).text()
        for faults in (every[1:], every)
    ]
    assert "ours is {} without the sum and {} with it.".format(*grey) in " ".join(README.split())
    starts = [select(both_starts, initialisation=start, faults=every[1:]) for start in ("default", "identity")]
    afar = paired(*starts, "nll").text()
    words = f"Torch's initial weights, which the earlier code had too, cost another {afar} with all but the first."
    assert words in " ".join(README.split())


def test_how_far_sampling_is_from_annealing_is_what_the_committed_runs_say():
    first = [r.metrics for r in results.load("full", "mnist") if r.metrics.get("bounds_images")]
    short = [-metrics["is_minus_ais"] for metrics in first]
    assert min(short) > 0.75 and sum(short) / len(short) < 1.25
    fitted = [r.metrics for r in results.load("full", "agreement")]
    farthest = max(abs(metrics["adaptive_minus_ais"]) for metrics in fitted)
    words = f"they and annealing differ by at most {math.ceil(100 * farthest) / 100:.2f} nats in any of nine further"
    assert words in " ".join(README.split()) and len(fitted) == 9


def test_what_schedules_change_is_what_the_committed_runs_say():
    found, words = results.load("full", "schedules"), " ".join(README.split())
    rise, none = {"schedule": "linear", "path": None, "anneals": "beta"}, {"schedule": "constant", "anneals": "beta"}

    def shift(method, ours, theirs):
        return paired(select(found, method=method, **ours), select(found, method=method, **theirs), "nll").text()

    along = [{"schedule": name, "path": "linear"} for name in ("linear", "constant")]
    values = shift("vae", rise, none), shift("iaf", rise, none), shift("avo", *along)
    assert "{} nats for the VAE, {} for an inverse autoregressive flow and {} for HVI-AVO,".format(*values) in words
    cycles = shift("vae", {"schedule": "cyclical", "shape": "linear"}, rise)
    alpha = shift("vae", {"anneals": "alpha"}, none)
    assert f"make {cycles} nats of difference to the VAE, and tempering the whole energy costs it {alpha}." in words
    collapse = results.load("full", "collapse")
    kl = [
        mean_metric(collapse, "kl", **plan).text()
        for plan in ({"schedule": "constant"}, {"schedule": "linear"}, {"schedule": "cyclical", "shape": "linear"})
    ]
    assert "the KL is {} nats without annealing, {} after one rise and {} after four cycles".format(*kl) in words


def test_how_much_the_grid_varies_is_what_the_committed_runs_say():
    robust, words = results.load("full", "robustness"), " ".join(README.split())
    ours, theirs = (list(spread(select(robust, method=method), "nll").values()) for method in ("avo", "hvi"))
    varies = paired_difference(ours, theirs)
    said = f"by {interval(ours).text()} nats and that of HVI by {interval(theirs).text()}"
    end = f"that AVO minds the schedule less is {verdict(varies, -1, 0.05)} ("
    assert f"{said}, a difference of {varies.text()}: {end}" in words


def test_what_two_hundred_epochs_change_is_what_the_committed_runs_say():
    long = results.load("full", "long")
    words = " ".join(README.split())
    against = [difference(long, "nll", "avo", theirs).text() for theirs in ("hvi", "vae")]
    assert "more (three seeds: NLL HVI-AVO − HVI {} and HVI-AVO − VAE {}, all three at 87.9).".format(*against) in words
    for method in ("vae", "hvi", "avo"):
        assert len(select(long, method=method)) == 3
        assert f"{mean_metric(long, 'nll', method=method).mean:.1f}" == "87.9"
