"""Claims: what the summary says is what the committed records say."""

import collections
import re
from pathlib import Path

import nbformat
import pytest

from annealed_report import claims
from annealed_report.claims import CLAIMS, rows
from annealed_report.comparison import VERDICTS
from annealed_report.studies import STUDIES

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ROWS = rows("full")


def test_every_claim_has_its_runs_and_a_word():
    assert [row.claim for row in ROWS] == list(CLAIMS) and len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    assert {claim.study for claim in CLAIMS} <= STUDIES.keys()
    assert all(row.word in VERDICTS and row.difference is not None for row in ROWS)


def test_the_words_are_those_of_the_committed_records():
    counts = collections.Counter(row.word for row in ROWS)
    assert counts == {"reproduced": 17, "inconclusive": 14, "reversed": 12, "not reproduced": 6, "negligible": 2}


def test_primary_claims_are_few_and_the_papers_own():
    primary = [row for row in ROWS if row.claim.primary]
    assert 3 <= len(primary) <= 8 and all(row.claim.source == "paper" for row in primary)
    assert [row.word for row in primary] == ["reproduced"] * 2 + ["not reproduced"] * 3 + ["inconclusive"]


def test_the_source_of_a_claim_is_who_made_it():
    sources = collections.Counter(claim.source for claim in CLAIMS)
    assert sources == {"paper": 20, "earlier report": 20, "ours": 11}
    assert all(claim.paper == "–" == claim.earlier for claim in CLAIMS if claim.source == "ours")


@pytest.mark.parametrize("section", sorted({claim.section for claim in CLAIMS}))
def test_a_claim_is_shown_where_it_says(section):
    page, _, heading = section.partition("#")
    cells = nbformat.read(NOTEBOOKS / f"{page}.ipynb", as_version=4).cells
    assert any(re.search(rf"^#+ {re.escape(heading)}$", cell.source, re.MULTILINE) for cell in cells), heading


def test_a_profile_without_records_says_not_yet_run_and_live_runs_stand_beside(monkeypatch):
    grid = claims.results.load("full", "grid")
    monkeypatch.setattr(claims.results, "load", lambda profile, name: [])
    found = rows("paper", live={"grid": grid})
    assert {row.word for row in found} == {"not yet run"}
    for row, full in zip(found, ROWS, strict=True):
        assert row.live == (full.difference if row.claim.study == "grid" else None)
    cells = found[0].cells("paper", "quick")
    assert cells["ours, quick"] == "−0.58 ± 0.32" and cells["ours, paper"] == "–"
    assert cells["claimed"] == "< 0 (0.1)" and cells["verdict"] == "**not yet run**"
    assert cells["shown in"] == "[02: Modes lost](02_toy_energies.ipynb#Modes-lost)"
