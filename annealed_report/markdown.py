"""Markdown of notebooks as harmless HTML, as Jupyter shows it.

Formulas are marked for KaTeX, citations resolved against a BibTeX file, links between notebooks become links between
pages. HTML in the text keeps what formats it and nothing that could run.
"""

import re
from collections.abc import Iterable
from html import escape, unescape
from pathlib import Path
from typing import Any

import bleach
from bleach.css_sanitizer import CSSSanitizer
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pybtex.database import BibliographyData, parse_file
from pybtex.exceptions import PybtexError
from pybtex.plugin import find_plugin

from annealed_report.glossary import marked
from annealed_report.parameters import ReportError

CITE = re.compile(r'<cite data-cite="([^"]+)">(.*?)</cite>', re.DOTALL)
TAGS = """br cite dd del details div dl dt h1 h2 h3 h4 h5 h6 hr img kbd p pre s small span sub summary sup
    table tbody td tfoot th thead tr"""
ATTRIBUTES = {
    "*": ["class", "id", "style", "title", "aria-label"],
    "a": ["href"],
    "cite": ["data-cite"],
    "details": ["open"],
    "div": ["data-player"],
    "img": ["src", "alt", "width", "height"],
    "td": ["colspan", "rowspan"],
    "th": ["colspan", "rowspan", "scope"],
}


def sanitise(html: str) -> str:
    """HTML without what could run or be fetched by itself: other tags are shown as text."""
    return bleach.clean(
        re.sub(r"<(style|script)\b.*?</\1>", "", html, flags=re.DOTALL),
        tags=[*bleach.ALLOWED_TAGS, *TAGS.split()],
        attributes=ATTRIBUTES,
        protocols=["http", "https", "mailto", "data"],
        css_sanitizer=CSSSanitizer(),
    )


class Markdown(IPythonRenderer):
    """nbconvert's markdown with formulas marked, headings collected, citations and links between pages resolved.

    Images that the markdown names are found in `folder`, whose `references.bib` has what can be cited; the list of
    references stands on `references_page` where that is another page. What was rendered so far had the `headings`
    (level, anchor, HTML), cited the keys of `cited`, and `has_maths` where there was a formula.
    """

    def __init__(self, folder: Path, references_page: str = "") -> None:
        super().__init__(escape=False, embed_images=True, path=str(folder))
        self.bibliography, self.references_page = load_bibliography(folder / "references.bib"), references_page
        self.headings: list[tuple[int, str, str]] = []
        self.cited: dict[str, None] = {}
        self.has_maths = False
        self._explained: set[str] = set()
        self._parser = MarkdownWithMath(renderer=self)

    def to_html(self, source: str, attachments: dict[str, Any] | None = None) -> str:
        """One piece of markdown as HTML."""
        self.attachments = attachments or {}
        html = CITE.sub(self._cite, self._parser.render(source))
        html = re.sub(r'(<a [^>]*?href="[^":]+?)\.ipynb(?=["#])', r"\1.html", html)
        return sanitise(re.sub(r"(<table.*?</table>)", r'<div class="scroll">\1</div>', html, flags=re.DOTALL))

    def prose(self, source: str, attachments: dict[str, Any] | None = None) -> str:
        """As `to_html`, with words of the field explained where a section first uses them."""
        return marked(self.to_html(source, attachments), self._explained)

    def inline(self, source: str) -> str:
        """Markdown of one paragraph without the paragraph's tags."""
        return re.sub(r"\A<p>(.*)</p>\Z", r"\1", self.to_html(source).strip(), flags=re.DOTALL)

    def references(self) -> list[tuple[str, str]]:
        """What was cited, as pairs of key and HTML, by author."""
        style = find_plugin("pybtex.style.formatting", "plain")(abbreviate_names=True)
        html = find_plugin("pybtex.backends", "html")()
        found = style.format_bibliography(self.bibliography, list(self.cited))
        return [(entry.key, sanitise(entry.text.render(html))) for entry in found]

    def _cite(self, match: re.Match[str]) -> str:
        keys = cited_keys([match[0]])
        if any(key not in self.bibliography.entries for key in keys):
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

    def inline_html(self, html: str) -> str:
        """Keep an HTML tag."""
        # The parent parses every piece to embed images, and so closes a lone opening tag.
        return super().inline_html(html) if "<img" in html else html

    def heading(self, text: str, level: int, **attributes: Any) -> str:
        """Give a heading the anchor that it has in Jupyter, and keep it for the table of contents."""
        anchor = taken = unescape(re.sub(r"<[^>]+>", "", text)).strip().replace(" ", "-")
        repeats = 1
        while taken in {known for _, known, _ in self.headings}:
            repeats += 1
            taken = f"{anchor}-{repeats}"
        self.headings.append((level, taken, sanitise(re.sub(r"</?a\b[^>]*>", "", text))))
        link = f'<a class="anchor" href="#{escape(taken)}" aria-label="link to this section">#</a>'
        return f'<h{level} id="{escape(taken)}">{text}{link}</h{level}>\n'


def cited_keys(sources: Iterable[str]) -> list[str]:
    """The keys that pieces of markdown cite."""
    found = [match[1].split(",") for source in sources for match in CITE.finditer(source)]
    return [key.strip() for keys in found for key in keys]


def load_bibliography(path: Path) -> BibliographyData:
    """The entries of a BibTeX file, none where there is no such file; ReportError where it can't be read."""
    if not path.exists():
        return BibliographyData()
    try:
        return parse_file(str(path), bib_format="bibtex", encoding="utf-8")
    except (PybtexError, UnicodeDecodeError) as error:
        raise ReportError(f"{path.name} is not BibTeX: {' '.join(str(error).split())}") from None
