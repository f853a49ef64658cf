"""The notebooks are written by their rules: parameters, captions, short functions, figures that the README shows."""

import ast
import base64
from pathlib import Path

import nbformat
import pytest
import yaml

from annealed_report.parameters import read_parameters

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "profiles").glob("*.yaml")}


def cells(path):
    return nbformat.read(path, as_version=4).cells


def tagged(path, tag):
    return [cell for cell in cells(path) if tag in cell.metadata.get("tags", [])]


def parameters(path):
    (cell,) = tagged(path, "parameters")
    return {name: ast.literal_eval(line.split("=", 1)[1]) for name, line in assignments(cell.source).items()}


def assignments(source):
    return {node.targets[0].id: ast.unparse(node) for node in ast.parse(source).body}


def test_the_five_pages_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["00", "01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_at_most_eight_parameters_each_with_its_help(path):
    (cell,) = tagged(path, "parameters")
    found = read_parameters(cell.source)
    assert 1 <= len(found) <= 8 and found.keys() == parameters(path).keys(), "papermill does not see every parameter"
    assert all(parameter.help for parameter in found.values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_defaults_of_a_notebook_are_the_quick_profile(path):
    """So that the outputs that are committed, and pytest --nbval, show what `make report` shows."""
    section = PROFILES["quick"].get(path.stem) or {}
    assert section == {name: value for name, value in parameters(path).items() if name in section}
    if path.stem != "01_theory":
        assert section.keys() == parameters(path).keys()


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_the_summary_reads_the_runs_of_the_other_pages(profile):
    summary, toy, mnist = (PROFILES[profile][stem] for stem in ("00_summary", "02_toy_energies", "03_mnist_vae"))
    live = {name: value for name, value in mnist.items() if name != "studies"}  # those are read from results/
    assert {name: summary[name] for name in live} == live
    assert summary["steps"] == toy["steps"] and set(summary["seeds"]) <= set(toy["seeds"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_defines_nothing_longer_than_eight_lines(path):
    for cell in cells(path):
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    if ast.get_docstring(node):
                        node.body = node.body[1:]
                    written = len(ast.unparse(node).splitlines())
                    assert written <= 8, f"{node.name} has {written} lines"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_image_has_alternative_text_and_a_caption(path):
    for cell in cells(path):
        outputs = cell.get("outputs", [])
        for n, output in enumerate(outputs):
            if "image/png" in output.get("data", {}):
                assert output.metadata["image/png"]["alt"], f"an image without alternative text: {cell.source[:80]}"
                assert outputs[n + 1].metadata["annealed"] == "caption", f"no caption: {cell.source[:80]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_of_cells_that_train_are_not_compared(path):
    """They differ between processors, and show progress to whoever works interactively."""
    for cell in cells(path):
        if cell.cell_type == "code":
            called = {getattr(n.func, "id", "") for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Call)}
            if called & {"sweep", "run"}:
                assert "nbval-ignore-output" in cell.metadata.get("tags", []), cell.source[:80]


def test_the_readme_shows_the_figure_that_the_notebook_made():
    (cell,) = tagged(ROOT / "notebooks" / "02_toy_energies.ipynb", "readme")
    (image,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    figure = ROOT / "notebooks" / "02_toy_energies.png"
    assert figure.read_bytes() == base64.b64decode(image)
    assert f"notebooks/{figure.name}" in (ROOT / "README.md").read_text()
