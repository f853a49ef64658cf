"""Words of the field, explained where a section first uses them."""

import re
from pathlib import Path

import nbformat

from annealed_report.glossary import MEANINGS, marked
from annealed_report.markdown import Markdown

FOLDER = Path(__file__).parents[1] / "notebooks"


def words(html):
    return [piece.split("<")[0] for piece in html.split(">") if piece.endswith("</abbr")]


def test_a_word_is_explained_once_in_a_section_and_again_in_the_next():
    page = Markdown(FOLDER)
    first = page.prose("The ELBO in nats; the ELBO again.\n\nHVI-AVO is no HVI.")
    assert words(first) == ["ELBO", "nats", "HVI-AVO", "HVI"]
    assert f'data-meaning="{MEANINGS["ELBO"]}">ELBO</abbr>' in first
    assert words(page.prose("The ELBO, and IWAE.")) == ["IWAE"]
    assert words(page.prose("## The ELBO\n\nThe ELBO.")) == ["ELBO"]


def test_nothing_is_marked_in_code_links_formulas_headings_tables_and_within_longer_words():
    page = Markdown(FOLDER)
    source = "# ELBO\n\n`ELBO` [AVO](x) $ELBO$ IAF-AVO's ungated\n\n| NLL |\n| --- |\n| HVI |\n\n*gated*, the end"
    assert words(page.prose(source)) == []
    assert words(page.prose("after them the ELBO")) == ["ELBO"]  # what was open is closed


def test_marking_changes_no_word_of_any_page():
    for path in sorted(FOLDER.glob("*.ipynb")):
        page, seen = Markdown(FOLDER), set()
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                html = page.to_html(cell.source, cell.get("attachments"))
                with_meanings = marked(html, seen)
                assert "<abbr" not in html and re.sub(r"</?abbr\b[^>]*>", "", with_meanings) == html


def test_every_word_is_used_and_its_meaning_is_short():
    text = "\n".join(path.read_text() for path in FOLDER.glob("*.ipynb"))
    assert all(word in text for word in MEANINGS)
    assert all(len(meaning.split()) <= 22 for meaning in MEANINGS.values())
