"""The version of the code that computes: what is reached counts, and nothing else."""

import ast
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from annealed_core import AVO, Density
from annealed_core.running import code
from annealed_core.running.code import Code, code_version

FILES = {
    "annealed_core/__init__.py": "from annealed_core.maths import value\n",
    "annealed_core/maths.py": '''"""Module."""
import math
from annealed_core import parts
from annealed_core.parts import half as part, TABLE

def value(x, scale=parts.SCALE):
    """Docstring."""
    def inner(unused):  # comment
        return part(unused)
    return inner(x) * math.exp(scale) + len(TABLE)

def unreached():
    return 1
''',
    "annealed_core/parts.py": '''from math import log
SCALE = 2.0
TABLE = {}
OTHER = 1

class Base:
    """Docstring."""
    factor = 3

class Half(Base):
    def of(self, x):
        return log(x) / self.factor

def half(x):
    from annealed_core.late import late
    return Half().of(late(x))

for name in ("a", "b"):
    TABLE[name] = 1
''',
    "annealed_core/late.py": "def late(x):\n    return x\n\ndef later(x):\n    return late\n",
    "annealed_core/running/store.py": "def keep(run):\n    return run\n",
    "annealed_core/running/experiment.py": """from annealed_core.maths import value
from annealed_core.running import store

def train(x):
    value = 0
    return store.keep(x + value)

def judge(x, value=value):
    return value(x)
""",
    "annealed_report/__init__.py": "",
    "annealed_report/earlier.py": "from annealed_report.figures import plot\n\nclass Earlier:\n    use = plot\n",
    "annealed_report/figures.py": "def plot():\n    return 1\n",
}


def version(folder, root="annealed_core.maths.value", edits=(), files=FILES):
    """The version after edits (file, old, new) of the files."""
    files = dict(files)
    for name, old, new in edits:
        assert old in files[name]
        files[name] = files[name].replace(old, new)
    number = len(list(folder.iterdir()))
    for name, text in files.items():
        path = folder / str(number) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Code(folder / str(number)).version(root)


MATHS, PARTS, LATE = (f"annealed_core/{name}.py" for name in ("maths", "parts", "late"))
EXPERIMENT, STORE = (f"annealed_core/running/{name}.py" for name in ("experiment", "store"))


@pytest.mark.parametrize(
    "edit",
    [
        (MATHS, "inner(x) *", "inner(x) +"),
        (MATHS, "scale=parts.SCALE", "scale=parts.OTHER"),
        (MATHS, "import math", "import cmath as math"),
        (PARTS, "SCALE = 2.0", "SCALE = 2.5"),
        (PARTS, "factor = 3", "factor = 4"),
        (PARTS, "log(x) /", "log(x) *"),
        (PARTS, "from math", "from cmath"),
        (PARTS, '("a", "b")', '("a", "c")'),
        (LATE, "return x", "return -x"),
    ],
    ids=lambda edit: edit[2],
)
def test_an_edit_of_what_is_reached_changes_the_version(tmp_path, edit):
    assert version(tmp_path, edits=[edit]) != version(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        (MATHS, '"""Docstring."""', '"""Other words."""'),
        (MATHS, '    """Docstring."""\n', ""),
        (MATHS, '"""Module."""\n', ""),
        (MATHS, "  # comment", ""),
        (MATHS, "return 1", "return 2"),
        (PARTS, "class Base:\n    ", "class Base:\n\n    "),
        (PARTS, "OTHER = 1", "OTHER = 2"),
        (LATE, "return late", "return later"),
    ],
    ids=lambda edit: edit[1],
)
def test_an_edit_of_words_or_of_what_is_not_reached_changes_nothing(tmp_path, edit):
    assert version(tmp_path, edits=[edit]) == version(tmp_path)


@pytest.mark.parametrize(
    "edits",
    [
        [(MATHS, "import half as part", "import half as piece"), (MATHS, "part(unused)", "piece(unused)")],
        [(MATHS, "part(unused)", "parts.half(unused)")],
        [(MATHS, "parts.SCALE", "SCALE"), (MATHS, "half as part,", "half as part, SCALE,")],
        [(MATHS, "import math\n", "from math import exp\n"), (MATHS, "math.exp", "exp")],
        [(MATHS, "from annealed_core import p", "import annealed_core.p"), (MATHS, "=parts", "=annealed_core.parts")],
    ],
    ids=["alias", "module", "name", "outside", "dotted"],
)
def test_how_a_name_is_imported_makes_no_difference(tmp_path, edits):
    assert version(tmp_path, edits=edits) == version(tmp_path)


def test_moving_a_definition_to_another_file_changes_nothing(tmp_path):
    late = "def late(x):\n    return x\n\n"
    moved = {**FILES, LATE: FILES[LATE].replace(late, ""), "annealed_core/new.py": late}
    edits = [(PARTS, "annealed_core.late", "annealed_core.new")]
    assert version(tmp_path, files=moved, edits=edits) == version(tmp_path)


def test_the_order_of_definitions_makes_no_difference(tmp_path):
    lines = FILES[PARTS].split("\n\n")
    swapped = "\n\n".join([lines[0], lines[3], lines[1], lines[2], lines[4]])
    assert version(tmp_path, files={**FILES, PARTS: swapped}) == version(tmp_path)


def test_what_only_keeps_runs_does_not_count(tmp_path):
    root = "annealed_core.running.experiment.train"
    assert version(tmp_path, root, [(STORE, "return run", "return None")]) == version(tmp_path, root)


def test_a_local_variable_is_not_the_import_of_the_same_name_but_a_default_is(tmp_path):
    edits = [(LATE, "return x", "return -x")]
    train, judge = (f"annealed_core.running.experiment.{name}" for name in ("train", "judge"))
    assert version(tmp_path, train, edits) == version(tmp_path, train)
    assert version(tmp_path, judge, edits) != version(tmp_path, judge)


def test_of_the_report_only_the_module_of_a_root_counts(tmp_path):
    root = "annealed_report.earlier.Earlier"
    plot = [("annealed_report/figures.py", "return 1", "return 2")]
    assert version(tmp_path, root, plot) == version(tmp_path, root)
    assert version(tmp_path, root, [("annealed_report/earlier.py", "use", "used")]) != version(tmp_path, root)


def test_a_name_passed_on_by_the_package_is_followed(tmp_path):
    assert version(tmp_path, "annealed_core.value") == version(tmp_path)


def test_an_unknown_root_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"annealed_core\.maths\.nothing"):
        version(tmp_path, "annealed_core.maths.nothing")


def test_a_description_stands_for_the_classes_in_it_and_the_users_own_do_not_count():
    from annealed_core.objectives import AVO
    from annealed_core.schedules import Linear

    assert code_version(AVO(beta=Linear())) == code_version(AVO, Linear) == code_version(Linear, AVO, FILES, version)
    assert code_version(AVO()) != code_version(Linear()) and len(code_version(AVO)) == 12


def test_the_code_counts_as_it_was_imported(tmp_path):
    path = tmp_path / "annealed_core" / "maths.py"
    path.parent.mkdir()
    path.write_text("def value():\n    return 1\n")
    now, then = Code(tmp_path), Code(tmp_path)
    path.write_text("def value():\n    return 2\n")
    assert now.version("annealed_core.maths.value") == then.version("annealed_core.maths.value")
    assert now.version("annealed_core.maths.value") != Code(tmp_path).version("annealed_core.maths.value")


def test_our_modules_import_only_in_ways_that_are_followed():
    """No relative or star imports, and no name in one file for two things."""
    for package in code.PACKAGES:
        for path in (Path(code.__file__).parents[2] / package).rglob("*.py"):
            found = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert node.level == 0 and node.names[0].name != "*", path
                    found |= {(each.asname or each.name, f"{node.module}.{each.name}") for each in node.names}
            names = sorted(name for name, _ in found)
            assert not [name for name, again in itertools.pairwise(names) if name == again], path


def test_threads_that_ask_at_once_get_the_same_version(monkeypatch):
    expected = code_version(Density, AVO)
    for _ in range(3):
        monkeypatch.setattr(code, "_INSTALLED", Code(Path(code.__file__).parents[2]))
        code._version.cache_clear()
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: code_version(Density, AVO), range(16))) == {expected}
