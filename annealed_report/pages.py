"""From an executed notebook to one HTML page that stands alone: nothing is loaded from anywhere.

nbconvert exports it with the templates in `page/`, which also holds the style sheet, the script, and KaTeX for the
mathematics. Figures and tables are joined with the captions beside them and numbered; the parameters become a table.
"""

import base64
import copy
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.exporters.html import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from annealed_report import search
from annealed_report.markdown import Markdown, sanitise
from annealed_report.parameters import read_parameters

PAGE = Path(__file__).parent / "page"
HERO = "02"  # whose first picture the index shows
#: Of the page whose answer is the index's own.
SUMMARY = {"title": "All claims", "lead": "As pictures and in a table; how a verdict is made, how often one is wrong."}
WIDGET = "application/vnd.jupyter.widget-view+json"


def render_page(notebook: Any, stem: str, titles: Mapping[str, str], folder: Path) -> str:
    """One executed notebook, whose `metadata.annealed` says how it was executed, as HTML.

    `titles` has those of all pages of the report by stem, in reading order; `folder` is where the notebook stands, with
    `references.bib` and the images that its markdown names.
    """
    order = [None, *titles, None]
    place = order.index(stem)
    about: dict[str, Any] = {"stem": stem, "title": titles[stem], "titles": titles}
    about |= {"previous": order[place - 1], "following": order[place + 1]}
    notebook = _arranged(notebook)
    for cell in notebook.cells:  # the title stands in the header
        if cell.cell_type == "markdown" and re.search(r"^# ", cell.source, re.MULTILINE):
            cell.source = re.sub(r"^# .*\n?", "", cell.source, count=1, flags=re.MULTILINE)
            break
    return _export("page.html.j2", notebook, Markdown(folder), execution=notebook.metadata.get("annealed", {}), **about)


def render_index(executed: Path, titles: Mapping[str, str], profile: str, description: str, folder: Path) -> str:
    """The first page: the answer, a card for each notebook found in `executed`, and a search over all of them.

    The answer is what the cells tagged `index` show.
    """
    markdown, answer, answers_page = Markdown(folder), list[Any](), ""
    cards, found = list[dict[str, Any]](), list[dict[str, str]]()
    execution: dict[str, Any] = {}
    hero = None
    for stem, title in titles.items():
        markdown.references_page = f"{stem}.html"
        card: dict[str, Any] = {"stem": stem, "title": markdown.inline(title)}
        if (path := executed / f"{stem}.ipynb").exists():
            cells = (notebook := nbformat.read(path, as_version=4)).cells
            execution = card["execution"] = notebook.metadata.get("annealed", {})
            outputs = [output for cell in cells for output in cell.get("outputs", [])]
            card["image"] = next((each for each in outputs if _picture(each)), None)
            card["lead"] = markdown.inline(_lead(cells).replace("](#", f"]({stem}.ipynb#"))
            found += search.sections(cells, stem, title, folder)
            hero = hero or (card["image"] if stem.startswith(HERO) else None)
            if tagged := [cell for cell in cells if "index" in cell.metadata.get("tags", [])]:
                answer, answers_page = tagged, markdown.references_page
                card |= SUMMARY
        cards.append(card)
    body = _arranged(nbformat.v4.new_notebook(cells=answer))
    for cell in body.cells:
        if cell.cell_type == "code":
            cell.source = ""
    markdown.references_page = answers_page
    about = {"profile": profile, "description": description, "execution": execution, "titles": titles}
    return _export("index.html.j2", body, markdown, cards=cards, hero=hero, sections=search.as_json(found), **about)


def _picture(output: Any) -> str | None:
    """The kind of image that an output is, if it is one."""
    return next((kind for kind in ("image/svg+xml", "image/png") if kind in output.get("data", {})), None)


def _export(template: str, notebook: Any, markdown: Markdown, **about: Any) -> str:
    exporter = HTMLExporter(template_name="base", template_file=template, extra_template_paths=[str(PAGE)])
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)  # of a progress bar its last state counts
    filters: dict[str, Any] = {
        "markdown": markdown.to_html,
        "prose": markdown.prose,
        "inline": markdown.inline,
        "sanitise": sanitise,
        "picture": _picture,
        "plain": lambda text: escape(re.sub(r"[`*$\\]", "", text)),  # a title where no markup can stand
        "duration": lambda s: f"{s:.0f} s" if s < 100 else f"{s // 60:.0f} min {s % 60:.0f} s",
    }
    exporter.environment.filters |= filters
    exporter.environment.globals |= {"assets": lambda: _assets(markdown.has_maths), "to_page": markdown, **about}
    return str(exporter.from_notebook_node(notebook)[0])


def _arranged(notebook: Any) -> Any:
    """A copy as the templates read it: what does not show left out, and `metadata.page` of code cells and outputs.

    Code cells have their number, the label of their folded code, and the parameters they offer; outputs have the
    caption beside them, and their number as a figure or table. What prepares a page, its parameters and imports, stands
    at its end.
    """
    notebook = copy.deepcopy(notebook)
    numbers: Counter[str] = Counter()
    given: dict[str, Any] = notebook.metadata.get("papermill", {}).get("parameters", {})
    shown, foot = list[Any](), list[Any]()
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:  # part of the notebook's own cell, which stands before
            foot[-1].source += f"\n\n{cell.source}"
        if {"injected-parameters", "papermill-error-cell-tag"} & set(tags):
            continue
        if cell.cell_type == "code":
            numbers["cell"] += 1
            page = {"number": numbers["cell"], "label": _label(cell.source)}
            if "parameters" in tags:
                page["parameters"] = [
                    {
                        "name": name,
                        "value": repr(given[name]) if name in given else parameter.shown,
                        "default": parameter.shown if given.get(name, parameter.default) != parameter.default else None,
                        "help": parameter.help,
                    }
                    for name, parameter in read_parameters(cell.source).items()
                ]
            cell.metadata["page"] = page
            cell.outputs = _captioned(cell.outputs, numbers)
            if "hide" in tags and not any(output.output_type == "error" for output in cell.outputs):
                continue
            if "parameters" in tags or (not cell.outputs and re.match(r"(from|import) ", cell.source)):
                foot.append(cell)
                continue
        shown.append(cell)
    heading = [nbformat.v4.new_markdown_cell("## How this was run")] if foot else []
    notebook.cells = shown + heading + foot
    return notebook


def _captioned(outputs: list[Any], numbers: Counter[str]) -> list[Any]:
    """Outputs without their captions, which become part of what they stand below (figures) or above (tables)."""
    kept: list[Any] = []
    table_caption = None

    def join(output: Any, kind: str, caption: str) -> None:
        numbers[kind] += 1
        output.metadata["page"] = {"kind": kind, "number": numbers[kind], "caption": caption}

    for output in outputs:
        kind = output.get("metadata", {}).get("annealed")
        if kind == "table-caption":
            table_caption = output.data["text/markdown"]
        elif kind == "caption" and kept and (_picture(kept[-1]) or "data-player" in kept[-1].data.get("text/html", "")):
            join(kept[-1], "Figure", output.data["text/markdown"])
        elif WIDGET not in output.get("data", {}):
            if output.output_type == "execute_result":
                output.output_type = "display_data"
            if table_caption and "data" in output:
                join(output, "Table", table_caption)
                table_caption = None
            kept.append(output)
    return kept


def _label(source: str) -> str:
    """What the code of a cell is called: by its first comment, or by what it makes."""
    if comment := re.match(r"#\s*([^%\s].*)", source):
        return f"code: {comment[1]}"
    made = re.findall(r"plotting\.(show|table)\(", source)
    return "code: plotting" if "show" in made else "code: table" if made else "code"


def _lead(cells: list[Any]) -> str:
    """The first paragraph of prose."""
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    texts = re.sub(r"^#.*$", "", prose, flags=re.MULTILINE).split("\n\n")
    return next((text for text in texts if text.strip() and not re.match(r"\s*([|<$-]|!\[)", text)), "")


@cache
def _assets(with_maths: bool) -> dict[str, str]:
    """The style sheet and script of a page, with KaTeX where there are formulas, and the hash of the script."""
    style = (PAGE / "page.css").read_text(encoding="utf-8")
    script = "".join((PAGE / name).read_text(encoding="utf-8") for name in ("page.js", "player.js"))
    if with_maths:

        def embed(match: re.Match[str]) -> str:
            font = base64.b64encode((PAGE / "katex" / match[1]).read_bytes()).decode()
            return f'src:url(data:font/woff2;base64,{font}) format("woff2")'

        katex = (PAGE / "katex/katex.min.css").read_text(encoding="utf-8")
        style = re.sub(r"src:url\((fonts/[\w-]+\.woff2)\)[^;}]*", embed, katex) + style
        script = (PAGE / "katex/katex.min.js").read_text(encoding="utf-8") + f";\n{script}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": style, "script": script, "digest": digest}
