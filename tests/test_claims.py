"""Claims: what the summary says is what the committed records say."""

import re
from pathlib import Path

import nbformat
import pytest

from annealed_report import claims
from annealed_report.claims import CLAIMS, rows
from annealed_report.statistics import WORDS, Interval
from annealed_report.studies import STUDIES

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ROWS = rows("full")


def test_every_claim_has_its_runs_and_a_word():
    assert [row.claim for row in ROWS] == list(CLAIMS) and len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    assert {claim.study for claim in CLAIMS} <= STUDIES.keys()
    assert all(row.word in WORDS for row in ROWS)


def test_primary_claims_are_few_and_the_papers_own():
    primary = [row for row in ROWS if row.claim.primary]
    assert 3 <= len(primary) <= 8 and all(row.claim.source == "paper" for row in primary)
    levels = sorted(row.difference.level for row in primary if row.tested)
    assert levels[-1] >= 1 - 0.05 / len(levels) - 1e-9 and levels[0] >= 0.95  # Holm
    assert all(row.difference.level == 0.95 for row in ROWS if row.difference and not row.claim.primary)


def test_the_source_of_a_claim_is_who_made_it():
    assert {claim.source for claim in CLAIMS} == {"paper", "earlier report", "ours"}
    assert all(claim.paper == "–" == claim.earlier for claim in CLAIMS if claim.source == "ours")


def test_a_claim_about_kernels_that_earn_nothing_is_not_tested():
    claim = next(claim for claim in CLAIMS if claim.works is not None)
    found = Interval(-9.0, 0.1, 5, 4)
    for earned, tested in [(None, False), (Interval(0.1, 0.1, 5, 4), False), (Interval(9.0, 0.1, 5, 4), True)]:
        row = claims.Row(claim, found, earned)
        assert row.tested is tested and (row.word == "not tested") is not tested
    assert claims.Row(claim, None, Interval(9.0, 0.1, 5, 4)).word == "not tested"
    free = next(claim for claim in CLAIMS if claim.works is None)
    assert claims.Row(free, found).tested


def test_no_word_on_avo_rests_on_kernels_of_which_nothing_is_known():
    for row in ROWS:
        on_mnist = row.claim.study in ("mnist", "long", "regime", "chosen", "robustness", "posterior_alone", "quarter")
        if on_mnist and "AVO" in row.claim.text:
            assert row.claim.works is not None, row.claim.text
            assert row.word == "not tested" or row.earned.low > 0


def test_whether_the_papers_value_lies_in_the_interval_is_said_where_it_gives_one():
    claim = next(claim for claim in CLAIMS if claim.published is not None)
    assert claim.published == float(claim.paper.replace("−", "-"))
    earned = Interval(9.0, 0.1, 5, 4)
    for mean, inside in ((claim.published, True), (claim.published + 9, False)):
        assert claims.Row(claim, Interval(mean, 0.1, 5, 4), earned).includes_published is inside
    assert claims.Row(claim, None, earned).includes_published is None


@pytest.mark.parametrize("section", sorted({claim.section for claim in CLAIMS}))
def test_a_claim_is_shown_where_it_says(section):
    page, _, heading = section.partition("#")
    cells = nbformat.read(NOTEBOOKS / f"{page}.ipynb", as_version=4).cells
    assert any(re.search(rf"^#+ {re.escape(heading)}$", cell.source, re.MULTILINE) for cell in cells), heading


def test_a_profile_without_records_says_not_tested(monkeypatch):
    first = ROWS[0].cells()
    assert first["ours"] == "−0.58 ± 0.32" and first["claimed"] == "< 0 (0.1)" and first["verdict"] == "**holds**"
    assert first["shown in"] == "[02: Modes lost](02_toy_energies.ipynb#Modes-lost)"
    monkeypatch.setattr(claims.results, "load", lambda profile, name: [])
    assert {row.word for row in rows("paper")} == {"not tested"} and rows("paper")[0].cells()["ours"] == "–"
