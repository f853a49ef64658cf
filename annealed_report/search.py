"""What the index of a report finds its pages' sections by: their words, without a server and without a network."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag

from annealed_report.markdown import Markdown


def sections(cells: Iterable[Any], stem: str, title: str, folder: Path) -> Iterator[dict[str, str]]:
    """Each section of a notebook: `page`, its `title`, the `anchor` and `heading` of the section, and its `text`."""
    markdown, found = Markdown(folder), {"page": stem, "title": title, "anchor": "", "heading": "", "text": ""}
    for cell in cells:
        if cell.cell_type != "markdown" or "papermill-error-cell-tag" in cell.metadata.get("tags", []):
            continue
        for element in BeautifulSoup(markdown.to_html(cell.source), "html.parser").children:
            if isinstance(element, Tag) and element.name in ("h2", "h3"):
                yield found
                for link in element.select(".anchor"):
                    link.decompose()
                found = {**found, "anchor": str(element["id"]), "heading": element.get_text(), "text": ""}
            elif not (isinstance(element, Tag) and element.name == "h1"):
                said = re.sub(r"\\(mathcal|mathbb|text)|[$\\{}]", " ", element.get_text(" "))  # formulas, as words
                found["text"] = " ".join(f"{found['text']} {said}".split())
    yield found


def as_json(found: Iterable[dict[str, str]]) -> str:
    """The sections that say anything, as JSON that can stand inside a `script` element."""
    return json.dumps([each for each in found if each["text"]], ensure_ascii=False).replace("<", "\\u003c")
