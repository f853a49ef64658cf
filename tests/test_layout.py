"""The layout: what imports what, what the mathematics does without, and how much of everything there is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The parts, lowest first: each imports those before it, and none after it.
PARTS = ["description", "mathematics", "speed", "judging", "running", "annealed_core", "annealed_report"]
MATHEMATICS = [
    *("targets", "energies", "kernels", "moves", "flows", "chain"),
    *("objectives", "schedules", "vae", "evidence", "ais", "fit"),
    *("dais", "nested", "smc", "decoders", "variants"),
]
FILES = sorted(path for room in ("annealed_core", "annealed_report") for path in (ROOT / room).rglob("*.py"))
mathematics = pytest.mark.parametrize("name", MATHEMATICS)


def lines(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def part_of(module):
    """Which part a module is in, from its full name."""
    room, _, rest = module.partition(".")
    if room == "annealed_report":
        return room
    first = rest.partition(".")[0]
    if first in ("description", "speed", "judging", "running"):
        return first
    return "mathematics" if first in MATHEMATICS else "annealed_core"


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """The modules of this project that a file imports, wherever it does; those of `from package import module` too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = {module_of(each) for each in FILES}
            found = [name if name in modules else node.module for name in names]
        else:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name for name in found if name.partition(".")[0] in ("annealed_core", "annealed_report"))


def test_the_imports_of_a_file_are_found():
    found = set(imports(ROOT / "annealed_core" / "objectives.py"))
    assert {"annealed_core.chain", "annealed_core.description", "annealed_core.schedules"} <= found
    assert [part_of(name) for name in ("annealed_core.ais", "annealed_core.speed.stack", "annealed_report.pages")] == [
        "mathematics",
        "speed",
        "annealed_report",
    ]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_its_own_part_and_those_below_it(path):
    own = part_of(module_of(path))
    allowed = PARTS[: PARTS.index(own) + 1]
    wrong = [name for name in imports(path) if part_of(name) not in allowed]
    assert not wrong, f"{own} does not import {', '.join(wrong)}"


@mathematics
def test_the_mathematics_holds_no_line_for_speed(name):
    tree = ast.parse((ROOT / "annealed_core" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Attribute) and node.attr in ("Function", "is_compiling", "compile")), name
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            assert "Stack" not in ast.unparse(node.args[1]), name
        words = [getattr(node, field, None) for field in ("id", "attr", "name", "arg")]
        assert not any("fold" in word.lower() for word in words if isinstance(word, str)), name


@mathematics
def test_a_file_of_mathematics_is_a_few_pages(name):
    assert lines([ROOT / "annealed_core" / f"{name}.py"]) <= 300


def test_the_mathematics_is_few_files_and_little_in_all():
    files = sorted((ROOT / "annealed_core").glob("*.py"))
    assert sorted(path.stem for path in files) == sorted(["__init__", *MATHEMATICS])
    assert len(files) <= 18 and lines(files) <= 4000
