"""The notebooks are written by their rules: parameters, captions, short functions, figures that the README shows."""

import ast
import base64
from pathlib import Path

import nbformat
import pytest
import yaml

from annealed_report.execution import clean
from annealed_report.parameters import read_parameters

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "profiles").glob("*.yaml")}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, tag=None):
    found = nbformat.read(path, as_version=4).cells
    return [cell for cell in found if tag is None or tag in cell.metadata.get("tags", [])]


def syntax(path):
    """Every code cell with the nodes of its syntax tree."""
    return [(cell, list(ast.walk(ast.parse(cell.source)))) for cell in cells(path) if cell.cell_type == "code"]


def parameters(path):
    (cell,) = cells(path, "parameters")
    return read_parameters(cell.source)


def test_the_pages_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(12)]


@every_notebook
def test_a_notebook_is_committed_as_run_from_top_to_bottom_and_as_every_machine_would(path):
    notebook = nbformat.read(path, as_version=4)
    assert not [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"
    ]
    assert nbformat.writes(clean(notebook)) + "\n" == path.read_text()


@every_notebook
def test_a_notebook_has_at_most_eight_parameters_each_with_its_help(path):
    found, (cell,), assigned = parameters(path), cells(path, "parameters"), {}
    exec(cell.source, {}, assigned)
    assert 1 <= len(found) <= 8 and all(parameter.help for parameter in found.values())
    assert {name: each.default for name, each in found.items()} == assigned, "papermill does not see every parameter"


@every_notebook
def test_the_defaults_of_a_notebook_are_the_quick_profile(path):
    """So that the outputs that are committed, and pytest --nbval, show what `make report` shows."""
    section = PROFILES["quick"].get(path.stem) or {}
    defaults = {name: parameter.default for name, parameter in parameters(path).items()}
    assert section == (defaults if path.stem != "01_theory" else {})


@every_notebook
def test_a_notebook_defines_nothing_longer_than_eight_lines(path):
    for node in (node for _, nodes in syntax(path) for node in nodes):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.body = node.body[bool(ast.get_docstring(node)) :]
            assert len(ast.unparse(node).splitlines()) <= 8, f"{node.name} is too long"


@every_notebook
def test_every_image_has_alternative_text_and_a_caption(path):
    for cell in cells(path):
        outputs = cell.get("outputs", [])
        for n, output in enumerate(outputs):
            for kind in {"image/png", "image/svg+xml"} & set(output.get("data", {})):
                assert output.metadata[kind]["alt"], f"an image without alternative text: {cell.source[:80]}"
                assert outputs[n + 1].metadata["annealed"] == "caption", f"no caption: {cell.source[:80]}"


@every_notebook
def test_outputs_of_cells_that_train_are_not_compared(path):
    """They differ between processors, and show progress to whoever works interactively."""
    for cell, nodes in syntax(path):
        if {"sweep", "run"} & {getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)}:
            assert "nbval-ignore-output" in cell.metadata.get("tags", []), cell.source[:80]


def test_the_readme_shows_the_figure_that_the_notebook_made():
    (cell,) = cells(ROOT / "notebooks" / "02_toy_energies.ipynb", "readme")
    (image,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    figure = ROOT / "notebooks" / "02_toy_energies.png"
    assert figure.read_bytes() == base64.b64decode(image)
    assert f"notebooks/{figure.name}" in (ROOT / "README.md").read_text()


def paragraphs(path):
    """The paragraphs of prose of a notebook, without tables, lists, headings and formulas on lines of their own."""
    texts = [text for cell in cells(path) if cell.cell_type == "markdown" for text in cell.source.split("\n\n")]
    return [text for text in texts if not text.lstrip().startswith(("|", "- ", "#", "$$", "\\begin", "1. "))]


@every_notebook
def test_a_page_is_short_and_so_are_its_paragraphs_and_tables(path):
    assert len(cells(path)) <= 35
    for text in paragraphs(path):
        assert len(text.split()) <= 90, text[:80]
    for cell in cells(path):
        if "claims" in cell.metadata.get("tags", []):
            continue  # the one table of all claims, folded and filterable
        for output in cell.get("outputs", []):
            lines = output.get("data", {}).get("text/markdown", "").splitlines()
            if len(lines) > 2 and lines[0].startswith("| "):
                assert lines[0].count(" | ") < 7 and len(lines) - 2 <= 14, f"{lines[0]}: {len(lines) - 2} rows"
