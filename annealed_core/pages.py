"""From an executed notebook to one HTML page that stands alone: nothing is loaded from anywhere.

Figures and tables are joined with the captions beside them and numbered; the parameters become a table. `page/` holds
the templates, the style sheet, the script, and KaTeX for the mathematics.
"""

import base64
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from nbconvert.filters.ansi import ansi2html
from nbconvert.filters.highlight import Highlight2HTML

from annealed_core.markdown import Markdown, format_references, load_bibliography
from annealed_core.parameters import read_parameters

PAGE = Path(__file__).parent / "page"


class Page:
    """The body of one page: cells in, HTML out, with figures and tables numbered through the page."""

    def __init__(self, markdown: Markdown) -> None:
        self.markdown = markdown
        self.figures = self.tables = 0

    def body(self, cells: list[Any]) -> str:
        """All cells as HTML, except those tagged `hide` that did not fail and papermill's own remarks."""
        parts, number = [], 0
        for position, cell in enumerate(cells):
            tags = cell.metadata.get("tags", [])
            number += cell.cell_type == "code" and "injected-parameters" not in tags
            failed = any(output.output_type == "error" for output in cell.get("outputs", []))
            if {"injected-parameters", "papermill-error-cell-tag"} & set(tags) or ("hide" in tags and not failed):
                continue
            if cell.cell_type == "markdown":
                parts.append(f'<div class="prose">{self.markdown.to_html(cell.source, cell.get("attachments"))}</div>')
            elif cell.cell_type == "code":
                following = cells[position + 1] if position + 1 < len(cells) else None
                code = self._parameters(cell, following) if "parameters" in tags else _code(cell.source, "fold" in tags)
                parts.append(f'<div class="cell" id="cell-{number}">{code}{self.outputs(cell.outputs, number)}</div>')
        return "\n".join(parts)

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
        header = "<thead><tr><th>name</th><th>value</th><th>meaning</th></tr></thead>"
        table = f'<div class="scroll"><table>{header}<tbody>{rows}</tbody></table></div>'
        caption = "<figcaption>Parameters of this page</figcaption>"
        source = cell.source + (f"\n\n{following.source}" if injected else "")
        return f'<figure class="parameters">{caption}{table}</figure>{_code(source, folded=True)}'

    def outputs(self, outputs: list[Any], number: int) -> str:
        """The outputs of code cell `number`, each joined with its caption."""
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
        kept = [(output, captions.get(index)) for index, output in enumerate(outputs) if index not in used]
        return "".join(self._output(output, caption, number) for output, caption in kept)

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
            trace = f"<details><summary>traceback</summary><pre>{trace}</pre></details>"
            return f'<div class="error"><p>{message}</p>{trace}</div>'
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


def _code(source: str, folded: bool) -> str:
    if not source.strip():
        return ""
    label = "code"
    if comment := re.match(r"#\s*([^%\s].*)", source):
        label = f"code: {comment[1]}"
    elif folded and re.search(r"plotting\.table\(", source) and not re.search(r"plotting\.show\(", source):
        label = "code: table"
    elif folded and re.search(r"plot|show\(", source):
        label = "code: plotting"
    code = Highlight2HTML(pygments_lexer="ipython3")(source)
    return f'<details class="code"{"" if folded else " open"}><summary>{escape(label)}</summary>{code}</details>'


def _is_table(output: Any) -> bool:
    data = output.get("data", {})
    ruled = re.search(r"^\s*\|?\s*:?-+:?\s*\|", data.get("text/markdown", ""), re.MULTILINE)
    return bool(ruled) or "<table" in data.get("text/html", "")


def render_page(notebook: Any, stem: str, titles: Mapping[str, str], folder: Path) -> str:
    """One executed notebook as HTML.

    Args:
        notebook: the executed notebook; `metadata.annealed` says how it was executed.
        stem: its file name without `.ipynb`; the page's is the same with `.html`.
        titles: the title of every page of the report by stem, in reading order.
        folder: where the notebook stands, with `references.bib` and the images that its markdown names.
    """
    bibliography = load_bibliography(folder / "references.bib")
    markdown = Markdown(folder, bibliography)
    body = Page(markdown).body(notebook.cells)
    title_html = next((text for level, _, text in markdown.headings if level == 1), escape(titles[stem]))
    body = re.sub(r"<h1\b.*?</h1>\s*", "", body, count=1, flags=re.DOTALL)  # it stands in the header
    order = list(titles)
    place = order.index(stem)
    return _template("page.html.j2").render(
        **_assets(markdown.has_maths),
        title=titles[stem],
        title_html=title_html,
        body=body,
        headings=[heading for heading in markdown.headings if heading[0] in (2, 3)],
        references=format_references(markdown.cited, bibliography),
        previous=order[place - 1] if place else None,
        following=order[place + 1] if place + 1 < len(order) else None,
        titles=titles,
        execution=notebook.metadata.get("annealed", {}),
    )


def render_index(executed: Path, titles: Mapping[str, str], profile: str, description: str, folder: Path) -> str:
    """The first page: what the report is, a card for each notebook found in `executed`, and the table of claims."""
    bibliography = load_bibliography(folder / "references.bib")
    cards: list[dict[str, Any]] = []
    execution: dict[str, Any] = {}
    claims, has_maths = "", False
    for stem in titles:
        path = executed / f"{stem}.ipynb"
        markdown = Markdown(folder, bibliography, references_page=f"{stem}.html")
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
                claims += Page(markdown).outputs(cell.outputs, 0)
        cards.append(card)
        has_maths = has_maths or markdown.has_maths
    return _template("index.html.j2").render(
        **_assets(has_maths), cards=cards, claims=claims, profile=profile, description=description, execution=execution
    )


def _first_image(notebook: Any) -> dict[str, str] | None:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alternative = output.metadata.get("image/png", {}).get("alt", "")
                return {"data": output.data["image/png"].replace("\n", ""), "alt": alternative}
    return None


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
    engine = (PAGE / "katex/katex.min.js").read_text(encoding="utf-8")
    return {"style": katex + style, "script": f"{engine};\n{script}"}
