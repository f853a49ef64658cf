"""Answers: sentences rest on claims, are short, and are refused where the runs say something else."""

import dataclasses
import io
import re
import warnings

import pytest

from annealed_core.objectives import AVO
from annealed_report import answers, fair, forest, results
from annealed_report.claims import rows
from annealed_report.comparison import loses_a_mode, of_specs, paired, select
from annealed_report.seed_systems import effect
from annealed_report.statistics import WORDS, Interval
from annealed_report.studies import LINES, searched

ROWS = rows("full")


def test_the_answer_and_its_findings_are_said_by_the_committed_records():
    text = re.sub(r"<.*?>", "", answers.answer(ROWS))
    assert 40 < len(text.split()) <= 120
    lines = answers.findings(ROWS).splitlines()
    assert len(lines) == 5
    for line in lines:
        assert len(re.findall(r"−?[\d.]+ ± [\d.]+", line)) == 1 and len(re.findall(r"\]\(\d\d_", line)) == 1, line


def test_what_is_said_beside_the_claims_is_in_the_records():
    of_d = next(row for row in ROWS if row.claim.text.startswith("Energy D, tuned, at equal evaluations"))
    assert len(fair.SEPARATED) == 3 and of_d.word == "undetermined"  # "three energies", "on one of them alone"
    apart = next(row for row in ROWS if row.claim.primary and row.claim.study == "folded_line")
    assert apart.word == "undetermined"  # "whether AVO's lose less likelihood"
    spline = LINES["spline flow, ELBO"]
    lost = [loses_a_mode(run) for t in "AD" for run in select(results.load("full", "kernels"), target=t, **spline)]
    assert len(lost) == 20 and not any(lost)  # "on two a spline flow does it by the ELBO"
    assert not any(loses_a_mode(r) for r in select(results.load("full", "starts"), objective=AVO))  # "from any start"
    regime = results.load("full", "regime")
    risen, not_risen = (of_specs(regime, searched("VAE", change)) for change in ("none", "no warm-up"))
    assert -0.7 < paired(risen, not_risen, "nll").mean < -0.3  # "half a nat after 25", "the bound gains nothing"
    assert paired(risen, not_risen, "valid_elbo").mean < 0
    quarter = [effect(results.load("full", "restarts"), start, "cycles") for start in (0.0, 0.1)]
    assert min(each.low for each in quarter) > 0  # "cycles keep more than a rise over a quarter"


def test_advice_is_short_and_each_line_has_its_evidence():
    found = answers.advice(ROWS)
    assert len(found) <= 8 and all(each["tested on"] for each in found)
    for each in found:
        assert any(word in each["evidence"] for word in WORDS) and re.search(r"\(\d\d_\w+\.ipynb#", each["evidence"])


def test_a_sentence_is_refused_where_its_claim_says_something_else():
    rests = next(iter(answers.FINDINGS))
    changed = [
        dataclasses.replace(row, difference=Interval(0.0, 1e-6, 9, 8)) if row is rests.row(ROWS) else row
        for row in ROWS
    ]
    with pytest.raises(
        ValueError, match=r"a sentence was written for 'for', and 'Energies, each method tuned.*' is: no difference"
    ):
        answers.answer(changed)
    with pytest.raises(ValueError, match="0 claims of grid begin with 'nothing'"):
        answers.Rests("grid", "nothing", "for").row(ROWS)


@pytest.mark.parametrize("ours", [False, True])
def test_every_claim_is_in_one_group_and_its_picture_says_its_word(ours):
    found = answers.grouped(ROWS, ours)
    assert sum(map(len, found.values())) == sum((row.claim.source == "ours") is ours for row in ROWS)
    for group in found.values():
        figure = forest.forest(group)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a notebook would show it
            for kind in ("svg", "png"):
                figure.savefig(io.BytesIO(), format=kind, bbox_inches="tight")
        axes = figure.axes[0]
        labels, said = ([text.get_text() for text in axes.texts[start::2]] for start in (0, 1))
        assert said == [row.said for row in group]
        assert [label.startswith("★") for label in labels] == [row.claim.primary for row in group]
        assert len(set(labels)) == len(labels)
        marked = sum(line.get_marker() == forest.WORD_MARKS[row.word][1] for line in axes.lines for row in group[:1])
        assert (marked > 0) or not group[0].tested
