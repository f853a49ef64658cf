"""Markdown of notebooks as HTML, as Jupyter shows it.

Formulas are marked for KaTeX, citations resolved against a BibTeX file, links between notebooks become links between
pages.
"""

import re
from collections.abc import Iterable, Mapping
from html import escape, unescape
from pathlib import Path
from typing import Any

import bibtexparser
from bibtexparser.customization import convert_to_unicode
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

Bibliography = Mapping[str, Mapping[str, str]]

CITE = re.compile(r'<cite data-cite="([^"]+)">(.*?)</cite>', re.DOTALL)
RAW_MATH = re.compile(r"(?<![$\\])(\$\$?)(?!\s)([^$<>]+?)(?<![\s\\])\1(?!\$)")


class Markdown(IPythonRenderer):
    """nbconvert's markdown with formulas marked, headings collected, citations and links between pages resolved.

    Args:
        folder: where images that the markdown names are found.
        bibliography: entries of BibTeX by key.
        references_page: the page that has the list of references, where it is another one.
    """

    def __init__(self, folder: Path, bibliography: Bibliography, references_page: str = "") -> None:
        super().__init__(escape=False, embed_images=True, path=str(folder), exclude_anchor_links=True)
        self.bibliography, self.references_page = bibliography, references_page
        self.headings: list[tuple[int, str, str]] = []
        self.cited: dict[str, None] = {}
        self.has_maths = False
        self._parser = MarkdownWithMath(renderer=self)

    def to_html(self, source: str, attachments: dict[str, Any] | None = None) -> str:
        """One piece of markdown as HTML."""
        self.attachments = attachments or {}
        html = CITE.sub(self._cite, self._parser.render(source))
        html = re.sub(r'(<a [^>]*?href="[^":]+?)\.ipynb(?=["#])', r"\1.html", html)
        return re.sub(r"(<table.*?</table>)", r'<div class="scroll">\1</div>', html, flags=re.DOTALL)

    def inline(self, source: str) -> str:
        """Markdown of one paragraph without the paragraph's tags."""
        return re.sub(r"\A<p>(.*)</p>\Z", r"\1", self.to_html(source).strip(), flags=re.DOTALL)

    def _cite(self, match: re.Match[str]) -> str:
        keys = [key.strip() for key in match[1].split(",")]
        if any(key not in self.bibliography for key in keys):
            return match[0]  # the check of the pages finds it
        self.cited.update(dict.fromkeys(keys))
        return f'<cite><a href="{self.references_page}#ref-{keys[0]}">{match[2]}</a></cite>'

    def _math(self, tex: str) -> str:
        self.has_maths = True
        # Jupyter does not number equations; KaTeX would.
        tex = re.sub(r"\\(begin|end)\{(align|alignat|equation|gather)\}", r"\\\1{\2*}", tex)
        return f'<span class="math">{self.escape_html(tex)}</span>'

    def inline_math(self, body: str) -> str:
        """Mark `$…$`."""
        return self._math(f"${body}$")

    def block_math(self, body: str) -> str:
        """Mark `$$…$$`."""
        return self._math(f"$${body}$$")

    def latex_environment(self, name: str, body: str) -> str:
        """Mark an environment such as `align`."""
        return self._math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def block_html(self, html: str) -> str:
        """Keep HTML; mark the formulas in it."""
        # Jupyter draws formulas inside HTML blocks too; code in such a block is left alone.
        if not re.search(r"<(pre|code|script|style)\b", html):
            html = RAW_MATH.sub(lambda match: self._math(unescape(match[0])), html)
        return self.inline_html(html)

    def inline_html(self, html: str) -> str:
        """Keep an HTML tag."""
        # The parent parses every piece to embed images, and so closes a lone opening tag.
        return super().inline_html(html) if "<img" in html else html

    def heading(self, text: str, level: int, **attributes: Any) -> str:
        """Give a heading the anchor that it has in Jupyter, and keep it for the table of contents."""
        plain = unescape(re.sub(r"<[^>]+>", "", text))
        anchor = taken = plain.strip().replace(" ", "-")
        repeats = 1
        while taken in {known for _, known, _ in self.headings}:
            repeats += 1
            taken = f"{anchor}-{repeats}"
        self.headings.append((level, taken, re.sub(r"</?a\b[^>]*>", "", text)))
        link = f'<a class="anchor" href="#{escape(taken)}" aria-label="link to this section">#</a>'
        return f'<h{level} id="{escape(taken)}">{text}{link}</h{level}>\n'


def load_bibliography(path: Path) -> dict[str, dict[str, str]]:
    """The entries of a BibTeX file by key; empty where there is no such file."""
    if not path.exists():
        return {}
    parser = bibtexparser.bparser.BibTexParser(common_strings=True, customization=convert_to_unicode)
    return dict(bibtexparser.loads(path.read_text(encoding="utf-8"), parser).entries_dict)


def format_references(keys: Iterable[str], bibliography: Bibliography) -> list[tuple[str, str]]:
    """The list of references of a page, as pairs of key and HTML, by author and year."""
    entries = [bibliography[key] for key in keys]
    entries.sort(key=lambda entry: (entry.get("author", "").lower(), entry.get("year", "")))
    return [(entry["ID"], format_reference(entry)) for entry in entries]


def format_reference(entry: Mapping[str, str]) -> str:
    """One line of the list of references, as HTML: authors, year, title, venue, link."""
    people = [name.strip() for name in re.sub(r"\s+", " ", entry.get("author", "")).split(" and ") if name.strip()]
    authors = []
    for person in people:
        family, _, given = (part.strip() for part in person.partition(","))
        initials = " ".join("-".join(f"{part[0]}." for part in name.split("-") if part) for name in given.split())
        authors.append(f"{initials} {family}".strip())
    if authors[10:]:
        authors[8:] = ["et al."]
    joint = " and " if authors[1:] and authors[-1] != "et al." else " "
    names = ", ".join(authors[:-1]) + joint + "".join(authors[-1:])
    fields = ("journal", "booktitle", "institution", "school", "howpublished", "publisher")
    venue = next((entry[field] for field in fields if field in entry), "")
    details = [entry[field] for field in ("number", "volume", "pages") if field in entry]
    html = f"{escape(names.strip())} ({escape(entry.get('year', ''))}). {escape(entry.get('title', ''))}. "
    html += f"<i>{escape(venue)}</i>{escape(''.join(f', {detail}' for detail in details))}. " if venue else ""
    html = html.replace("{", "").replace("}", "").replace("--", "–")
    if "eprint" in entry:
        return html + f'<a href="https://arxiv.org/abs/{entry["eprint"]}">arXiv:{entry["eprint"]}</a>'
    if "doi" in entry:
        return html + f'<a href="https://doi.org/{entry["doi"]}">doi:{entry["doi"]}</a>'
    if "url" in entry:
        return html + f'<a href="{escape(entry["url"])}">{escape(entry["url"].split("://")[-1])}</a>'
    return html
