"""The version of the code that computes a run: a hash of the definitions that it reaches, and of nothing else.

    code_version(Density(target="D"), train)      # "3f0c9a52b7de"

Every name that a definition mentions is followed through the imports of its module. What counts is the set of the
definitions found so, each as text without comments and docstrings and with imported names written out: in which file
and order they stand, and under which name they are imported, makes no difference.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from annealed_core.description import Description

PACKAGES = ("annealed_core", "annealed_report")
#: What keeps, names, schedules or shows runs, and computes nothing of them.
LEFT_OUT = ("description", *(f"running.{name}" for name in ("store", "code", "sweep", "system", "former")))

_ONE_AT_A_TIME = threading.Lock()  # reading changes trees, and Python 3.11 can't parse in two threads at once


def code_version(*roots: Any) -> str:
    """Hash, 12 hexadecimal digits, of the code that is reached from some objects.

    Args:
        roots: classes, functions, or instances of classes; a description stands for its class and for those of all
            descriptions in its fields. What is not of `annealed_core` or `annealed_report` doesn't count. Of
            `annealed_report` only the modules that define a root are followed.
    """
    return _version(*sorted({name for root in roots for name in _names(root)}))


@functools.cache
def _version(*roots: str) -> str:
    with _ONE_AT_A_TIME:
        return _INSTALLED.version(*roots)


def _names(root: Any) -> Iterator[str]:
    """The dotted names of what a root stands for."""
    definition = root if hasattr(root, "__qualname__") else type(root)
    if definition.__module__.partition(".")[0] in PACKAGES:
        yield f"{definition.__module__}.{definition.__qualname__}"
    fields = root if isinstance(root, tuple) else root.fields().values() if isinstance(root, Description) else ()
    for each in fields:
        yield from _names(each)


class Code:
    """The Python files of our packages in a folder, as they are when this is made."""

    def __init__(self, folder: Path) -> None:
        self._texts = {}
        for path in (path for package in PACKAGES for path in (folder / package).rglob("*.py")):
            name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            self._texts[name] = path.read_text(encoding="utf-8")
        self._modules: dict[str, _Module] = {}
        self._read: dict[tuple[str, int], tuple[str, set[tuple[str, str]]]] = {}

    def version(self, *roots: str) -> str:
        """Hash of what is reached from dotted names, `annealed_core.objectives.AVO`; ValueError for unknown ones."""
        todo = []
        for root in roots:
            place = self.find(root)[1]
            if place is None or not place[1]:
                raise ValueError(f"the source of {root} is not there, and runs are named by their code")
            todo.append(place)
        left_out = tuple(f"annealed_core.{name}." for name in LEFT_OUT)
        reports = {module for module, _ in todo}
        digests: set[str] = set()
        seen = set()
        while todo:
            module, name = place = todo.pop()
            shows = module.startswith("annealed_report") and module not in reports
            if place in seen or shows or f"{module}.".startswith(left_out):
                continue
            seen.add(place)
            for number in self.module(module).numbers(name):
                text, reached = self._statement(module, number)
                digests |= {hashlib.sha256(text.encode()).hexdigest()} if text else set()
                todo.extend(reached)
        return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:12]

    def find(self, dotted: str) -> tuple[str, tuple[str, str] | None]:
        """What a dotted name leads to: how it is written, and its module and name; None outside of our packages.

        The name is empty for a module as a whole.
        """
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            name, rest = ".".join(parts[:length]), parts[length:]
            if name in self._texts:
                module = self.module(name)
                if not rest or rest[0] in module.bound:
                    return ".".join(rest or parts[-1:]), (name, rest[0] if rest else "")
                if rest[0] in module.imports:  # passed on from elsewhere
                    return self.find(".".join([module.imports[rest[0]], *rest[1:]]))
                return ".".join(rest), (name, "")
        return dotted, None

    def module(self, name: str) -> _Module:
        """A module of ours, parsed when first asked for."""
        if name not in self._modules:
            self._modules[name] = _Module(ast.parse(self._texts[name]))
        return self._modules[name]

    def _statement(self, module: str, number: int) -> tuple[str, set[tuple[str, str]]]:
        """A statement of a module as text, and what of our packages it mentions."""
        if (module, number) not in self._read:  # once: reading changes the tree
            reader = _Reader(self, module)
            tree = reader.visit(self.module(module).statements[number])
            self._read[module, number] = ast.unparse(tree) if tree else "", reader.reached
        return self._read[module, number]


class _Module:
    """The statements of a module, which of them bind a name, and what imported names stand for."""

    def __init__(self, tree: ast.Module) -> None:
        self.statements, self.imports = tree.body, dict[str, str]()
        self.bound: dict[str, list[int]] = {}
        self.always: list[int] = []  # with whatever of the module is reached: a loop that registers, say
        for node in ast.walk(tree):  # those within functions too
            if isinstance(node, ast.Import):
                for each in node.names:
                    first = each.name.partition(".")[0]
                    self.imports[each.asname or first] = each.name if each.asname else first
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        for number, statement in enumerate(tree.body):
            names = _bound([statement])
            for name in names:
                self.bound.setdefault(name, []).append(number)
            defines = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.AugAssign
            if not (isinstance(statement, defines) and names):  # `table["name"] = value` names nothing
                self.always.append(number)

    def numbers(self, name: str) -> Sequence[int]:
        """Which statements count where a name is mentioned; for an empty one all."""
        return [*self.bound[name], *self.always] if name else range(len(self.statements))


def _bound(statements: Sequence[ast.AST]) -> set[str]:
    """The names that statements bind, other than by imports, outside of the functions and classes among them."""
    names: set[str] = set()
    elsewhere: set[str] = set()
    todo = list(statements)
    while todo:
        match todo.pop():
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Global(names=several) | ast.Nonlocal(names=several):
                elsewhere |= set(several)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                pass
            case node:
                todo.extend(ast.iter_child_nodes(node))
    return names - elsewhere


class _Reader(ast.NodeTransformer):
    """Writes imported names out, leaves docstrings and imports out, and notes what of our packages is mentioned."""

    def __init__(self, code: Code, name: str) -> None:
        self.code, self.name, self.module = code, name, code.module(name)
        self.reached: set[tuple[str, str]] = set()
        self.local: list[set[str]] = []  # the names of each function that the reader is in

    def _written(self, first: str, *rest: str) -> ast.Name:
        """A name, with attributes of it."""
        origin = f"{self.name}.{first}" if first in self.module.bound else self.module.imports.get(first)
        if origin is None or any(first in names for names in self.local):
            return ast.Name(".".join([first, *rest]))
        text, place = self.code.find(".".join([origin, *rest]))
        self.reached |= {place} if place else set()
        return ast.Name(text)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._written(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        attributes, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            attributes, inner = [inner.attr, *attributes], inner.value
        return self._written(inner.id, *attributes) if isinstance(inner, ast.Name) else self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def _nothing(self, node: ast.AST) -> None:
        return None

    def _function(self, node: Any) -> ast.AST:
        body, node.body = node.body, []
        self.generic_visit(node)  # decorators, defaults and annotations belong to what is around the function
        statements = body if isinstance(body, list) else [body]
        arguments = {each.arg for each in ast.iter_child_nodes(node.args) if isinstance(each, ast.arg)}
        self.local.append(arguments | _bound(statements))
        read = [each for each in map(self.visit, statements) if each is not None]
        self.local.pop()
        node.body = read if isinstance(body, list) else read[0]
        return node

    visit_Import = visit_ImportFrom = visit_Pass = _nothing
    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function


_INSTALLED = Code(Path(__file__).parents[2])  # now, while the code that was imported is what stands in the files
