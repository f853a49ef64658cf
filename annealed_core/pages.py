"""From an executed notebook to one HTML page that stands alone: no script, font, image or style is loaded from anywhere.

Markdown goes through nbconvert's parser, so that it reads as in Jupyter; the rest is arranged here: figures and tables are joined with
the captions that follow them and numbered, citations are resolved against a BibTeX file, links between notebooks become links
between pages. `page/` holds the templates, the style sheet, the script, and KaTeX for the mathematics.
"""

import base64
import re
from collections.abc import Mapping
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import Any

import bibtexparser
import jinja2
import nbformat
from bibtexparser.customization import convert_to_unicode
from nbconvert.filters.ansi import ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from annealed_core.parameters import read_parameters

PAGE = Path(__file__).parent / "page"
CITE = re.compile(r'<cite data-cite="([^"]+)">(.*?)</cite>', re.DOTALL)
RAW_MATH = re.compile(r"(?<![$\\])(\$\$?)(?!\s)([^$<>]+?)(?<![\s\\])\1(?!\$)")


def load_bibliography(path: Path) -> dict[str, dict[str, str]]:
    """The entries of a BibTeX file by key; empty where there is no such file."""
    if not path.exists():
        return {}
    parser = bibtexparser.bparser.BibTexParser(common_strings=True, customization=convert_to_unicode)
    return dict(bibtexparser.loads(path.read_text(encoding="utf-8"), parser).entries_dict)


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
    names = ", ".join(authors[:-1]) + (" and " if authors[1:] and authors[-1] != "et al." else " ") + authors[-1] if authors else ""
    venue = next((entry[field] for field in ("journal", "booktitle", "school", "publisher", "howpublished") if field in entry), "")
    details = [entry[field] for field in ("volume", "pages") if field in entry]
    html = f"{escape(names.strip())} ({escape(entry.get('year', ''))}). {escape(entry.get('title', ''))}. "
    html += f"<i>{escape(venue)}</i>{escape(''.join(f', {detail}' for detail in details))}. " if venue else ""
    html = html.replace("{", "").replace("}", "").replace("--", "–")
    if "eprint" in entry:
        return html + f'<a href="https://arxiv.org/abs/{entry["eprint"]}">arXiv:{entry["eprint"]}</a>'
    if "doi" in entry:
        return html + f'<a href="https://doi.org/{entry["doi"]}">doi:{entry["doi"]}</a>'
    return html + (f'<a href="{escape(entry["url"])}">{escape(entry["url"].split("://")[-1])}</a>' if "url" in entry else "")


class Markdown(IPythonRenderer):
    """nbconvert's markdown, with formulas marked for KaTeX, headings collected, citations and links between pages resolved."""

    def __init__(self, folder: Path, bibliography: Mapping[str, Mapping[str, str]], references_page: str = "") -> None:
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
        return f'<span class="math">{self.escape_html(tex)}</span>'

    def inline_math(self, body: str) -> str:
        return self._math(f"${body}$")

    def block_math(self, body: str) -> str:
        return self._math(f"$${body}$$")

    def latex_environment(self, name: str, body: str) -> str:
        return self._math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def block_html(self, html: str) -> str:
        # Jupyter draws formulas inside HTML blocks too; code in such a block is left alone.
        if not re.search(r"<(pre|code|script|style)\b", html):
            html = RAW_MATH.sub(lambda match: self._math(unescape(match[0])), html)
        return super().block_html(html)

    def heading(self, text: str, level: int, **attributes: Any) -> str:
        plain = unescape(re.sub(r"<[^>]+>", "", text))
        anchor = taken = plain.strip().replace(" ", "-")
        repeats = 1
        while taken in {known for _, known, _ in self.headings}:
            repeats += 1
            taken = f"{anchor}-{repeats}"
        self.headings.append((level, taken, re.sub(r"</?a\b[^>]*>", "", text)))
        link = f'<a class="anchor" href="#{escape(taken)}" aria-label="link to this section">#</a>'
        return f'<h{level} id="{escape(taken)}">{text}{link}</h{level}>\n'


class Page:
    """The body of one page: cells in, HTML out, with figures and tables numbered through the page."""

    def __init__(self, markdown: Markdown) -> None:
        self.markdown = markdown
        self.figures = self.tables = 0

    def body(self, cells: list[Any]) -> str:
        """All cells as HTML, except those tagged `hide` and papermill's own remarks on an error."""
        parts, number = [], 0
        for position, cell in enumerate(cells):
            tags = cell.metadata.get("tags", [])
            number += cell.cell_type == "code" and "injected-parameters" not in tags
            if {"hide", "injected-parameters", "papermill-error-cell-tag"} & set(tags):
                continue
            if cell.cell_type == "markdown":
                parts.append(f'<div class="prose">{self.markdown.to_html(cell.source, cell.get("attachments"))}</div>')
            elif cell.cell_type == "code":
                following = cells[position + 1] if position + 1 < len(cells) else None
                source = self._parameters(cell, following) if "parameters" in tags else self._code(cell.source, "fold" in tags)
                parts.append(f'<div class="cell" id="cell-{number}">{source}{self._outputs(cell.outputs, number)}</div>')
        return "\n".join(parts)

    def _code(self, source: str, folded: bool) -> str:
        if not source.strip():
            return ""
        comment = re.match(r"#\s*([^%\s].*)", source)
        label = f"code: {comment[1]}" if comment else "code: plotting" if folded and re.search(r"plot|show\(", source) else "code"
        code = highlight(source, PythonLexer(), HtmlFormatter(cssclass="highlight"))
        return f'<details class="code"{"" if folded else " open"}><summary>{escape(label)}</summary>{code}</details>'

    def _parameters(self, cell: Any, following: Any) -> str:
        offered = read_parameters(cell.source)
        injected = following is not None and "injected-parameters" in following.metadata.get("tags", [])
        given = read_parameters(following.source) if injected else {}
        rows = ""
        for name, parameter in offered.items():
            literal = given[name].literal if name in given else parameter.literal
            changed = name in given and given[name].default != parameter.default
            note = f' <span class="default">default {escape(parameter.literal)}</span>' if changed else ""
            rows += f"<tr><td><code>{name}</code></td><td><code>{escape(literal)}</code>{note}</td>"
            rows += f"<td>{self.markdown.inline(parameter.help)}</td></tr>"
        table = f"<table><thead><tr><th>name</th><th>value</th><th></th></tr></thead><tbody>{rows}</tbody></table>"
        source = cell.source + (f"\n\n{following.source}" if injected else "")
        return (
            f'<figure class="parameters"><figcaption>Parameters of this page</figcaption><div class="scroll">{table}</div></figure>'
            + self._code(source, folded=True)
        )

    def _outputs(self, outputs: list[Any], number: int) -> str:
        captions: dict[int, str] = {}
        used = set()
        for index, output in enumerate(outputs):
            kind = output.get("metadata", {}).get("annealed")
            before = index > 0 and index - 1 not in used and index - 1 not in captions
            if kind == "caption" and before and "image/png" in outputs[index - 1].get("data", {}):
                owner = index - 1
            elif kind == "table-caption":
                owner = index - 1 if before and _is_table(outputs[index - 1]) else index + 1
            else:
                continue
            captions[owner] = outputs[index].data["text/markdown"]
            used.add(index)
        return "".join(
            self._output(output, captions.get(index), number) for index, output in enumerate(outputs) if index not in used
        )

    def _output(self, output: Any, caption: str | None, number: int) -> str:
        if output.output_type == "stream":
            # A progress bar overwrites its line: only what was left standing counts.
            text = "\n".join(line.split("\r")[-1] for line in output.text.rstrip().split("\n"))
            if output.name == "stderr":
                return f'<pre class="stderr" hidden>cell {number}: {escape(text)}</pre>'
            return f'<pre class="output">{ansi2html(text)}</pre>'
        if output.output_type == "error":
            trace = ansi2html("\n".join(output.traceback))
            message = f"{escape(output.ename)}: {escape(output.evalue)}"
            return f'<div class="error" id="failed"><p>{message}</p><details><summary>traceback</summary><pre>{trace}</pre></details></div>'
        data = output.data
        if "application/vnd.jupyter.widget-view+json" in data:
            return ""
        if "text/html" in data:
            html = f'<div class="html scroll">{data["text/html"]}</div>'
            return html if caption is None else self._table(html, caption)
        if "text/markdown" in data:
            html = self.markdown.to_html(data["text/markdown"])
            return f'<div class="prose">{html}</div>' if caption is None else self._table(html, caption)
        for kind in ("image/svg+xml", "image/png", "image/jpeg"):
            if kind in data:
                return self._figure(kind, data[kind], output.metadata.get(kind, {}).get("alt", ""), caption)
        if "text/latex" in data:
            return f'<div class="prose">{self.markdown.to_html(data["text/latex"])}</div>'
        return f'<pre class="output">{ansi2html(data["text/plain"])}</pre>' if "text/plain" in data else ""

    def _figure(self, kind: str, content: str, alternative: str, caption: str | None) -> str:
        encoded = base64.b64encode(content.encode()).decode() if kind == "image/svg+xml" else content.replace("\n", "")
        image = f'<img src="data:{kind};base64,{encoded}" alt="{escape(alternative)}">'
        if caption is None:
            return f"<figure>{image}</figure>"
        self.figures += 1
        text = f"<b>Figure {self.figures}.</b> {self.markdown.inline(caption)}"
        return f'<figure id="figure-{self.figures}">{image}<figcaption>{text}</figcaption></figure>'

    def _table(self, html: str, caption: str) -> str:
        self.tables += 1
        text = f"<b>Table {self.tables}.</b> {self.markdown.inline(caption)}"
        return f'<figure class="table" id="table-{self.tables}"><figcaption>{text}</figcaption>{html}</figure>'


def _is_table(output: Any) -> bool:
    data = output.get("data", {})
    return "<table" in data.get("text/html", "") or bool(re.search(r"^\s*\|?\s*:?-+:?\s*\|", data.get("text/markdown", ""), re.MULTILINE))


def render_page(notebook: Any, stem: str, titles: Mapping[str, str], folder: Path, bibliography: Mapping[str, Mapping[str, str]]) -> str:
    """One executed notebook as HTML.

    Args:
        notebook: the executed notebook; `metadata.annealed` says how it was executed.
        stem: its file name without `.ipynb`; the page's is the same with `.html`.
        titles: the title of every page of the report by stem, in reading order.
        folder: where images that the markdown names are found.
        bibliography: entries of BibTeX by key.
    """
    markdown = Markdown(folder, bibliography)
    body = Page(markdown).body(notebook.cells)
    title_html = next((text for level, _, text in markdown.headings if level == 1), escape(titles[stem]))
    body = re.sub(r"<h1\b.*?</h1>\s*", "", body, count=1, flags=re.DOTALL)  # it stands in the header
    order = list(titles)
    place = order.index(stem)
    references = sorted((entry for key, entry in bibliography.items() if key in markdown.cited), key=_reference_order)
    return _template("page.html.j2").render(
        **_assets(markdown.has_maths),
        title=titles[stem],
        title_html=title_html,
        body=body,
        headings=[heading for heading in markdown.headings if heading[0] in (2, 3)],
        references=[(entry["ID"], format_reference(entry)) for entry in references],
        previous=order[place - 1] if place else None,
        following=order[place + 1] if place + 1 < len(order) else None,
        titles=titles,
        execution=notebook.metadata.get("annealed", {}),
    )


def render_index(executed: Path, titles: Mapping[str, str], profile: str, description: str, bibliography: Mapping[str, Any]) -> str:
    """The first page: what the report is, a card for each notebook found in `executed`, and the summary's table of claims."""
    cards: list[dict[str, Any]] = []
    claims, has_maths, execution = "", False, {}
    for stem in titles:
        path = executed / f"{stem}.ipynb"
        markdown = Markdown(executed, bibliography, references_page=f"{stem}.html")
        card: dict[str, Any] = {"stem": stem, "title": markdown.inline(titles[stem]), "execution": None}
        if path.exists():
            notebook = nbformat.read(path, as_version=4)
            execution = notebook.metadata.get("annealed", {}) or execution
            prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
            texts = re.sub(r"^#.*$", "", prose, flags=re.MULTILINE).split("\n\n")
            lead = next((text for text in texts if text.strip() and not re.match(r"\s*([|<$-]|!\[)", text)), "")
            card |= {"lead": markdown.inline(lead), "execution": notebook.metadata.get("annealed", {})}
            card["image"] = _first_image(notebook)
            tagged = [cell for cell in notebook.cells if "claims" in cell.metadata.get("tags", [])]
            for cell in tagged if not claims else []:
                claims += Page(markdown)._outputs(cell.outputs, 0)
        cards.append(card)
        has_maths = has_maths or markdown.has_maths
    return _template("index.html.j2").render(
        **_assets(has_maths), cards=cards, claims=claims, profile=profile, description=description, execution=execution
    )


def _first_image(notebook: Any) -> dict[str, str] | None:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                return {"data": output.data["image/png"].replace("\n", ""), "alt": output.metadata.get("image/png", {}).get("alt", "")}
    return None


def _reference_order(entry: Mapping[str, str]) -> tuple[str, str]:
    return entry.get("author", "").lower(), entry.get("year", "")


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE), trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = lambda text: re.sub(r"[`*$\\\\]", "", text)  # a title where no markup can stand
    environment.filters["duration"] = lambda s: f"{s:.0f} s" if s < 100 else f"{s // 60:.0f} min {s % 60:.0f} s"
    return environment.get_template(name)


@cache
def _assets(with_maths: bool) -> dict[str, str]:
    """The style sheet and script of a page; KaTeX, with its fonts, where there are formulas."""
    style, script = (PAGE / "page.css").read_text(encoding="utf-8"), (PAGE / "page.js").read_text(encoding="utf-8")
    if not with_maths:
        return {"style": style, "script": script}

    def embed(match: re.Match[str]) -> str:
        font = base64.b64encode((PAGE / "katex" / match[1]).read_bytes()).decode()
        return f'src:url(data:font/woff2;base64,{font}) format("woff2")'

    katex = (PAGE / "katex/katex.min.css").read_text(encoding="utf-8")
    katex = re.sub(r"src:url\((fonts/[\w-]+\.woff2)\)[^;}]*", embed, katex)
    return {"style": katex + style, "script": (PAGE / "katex/katex.min.js").read_text(encoding="utf-8") + ";\n" + script}
