"""Parameters of a notebook: what its `parameters` cell offers, what a profile asks for, and whether the two agree.

A notebook offers parameters by assigning literals in one cell tagged `parameters`, each with a trailing `# help`. A
profile is a YAML file with one section a notebook. All is compared before anything runs; what is wrong is said in one
line.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from annealed_core.fields import suggest


class ReportError(ValueError):
    """Something the reader of the report can put right; its message is one line."""

    def _render_traceback_(self) -> list[str]:
        # IPython shows this instead of a traceback: the line says all there is to say.
        return [f"{type(self).__name__}: {self}"]


class ParameterError(ReportError):
    """A parameter that the notebook does not have, or a value that it cannot take."""


@dataclass(frozen=True)
class Parameter:
    """One assignment of a parameters cell; `default` is None where `literal` is not a literal."""

    name: str
    literal: str
    default: Any
    help: str


def read_parameters(source: str) -> dict[str, Parameter]:
    """Read the assignments of a cell, by name.

    >>> read_parameters("seeds = 2  # runs a method")
    {'seeds': Parameter(name='seeds', literal='2', default=2, help='runs a method')}
    """
    try:
        statements = ast.parse(source).body
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):  # magics, or a cell that is being typed
        return {}
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        else:
            continue
        if isinstance(target, ast.Name):
            try:
                default = ast.literal_eval(value)
            except ValueError:
                default = None
            lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            help_text = " ".join(comments[line] for line in lines if line in comments)
            found[target.id] = Parameter(target.id, ast.get_source_segment(source, value) or "", default, help_text)
    return found


def check_values(offered: Mapping[str, Parameter], given: Mapping[str, Any]) -> None:
    """Raise ParameterError unless every given name is offered, has the type of its default, and a possible value."""
    for name, value in given.items():
        if name not in offered:
            takes = f"it takes {', '.join(sorted(offered))}" if offered else "the notebook takes no parameters"
            raise ParameterError(f"unknown parameter {name!r}: {suggest(name, offered)}{takes}")
        parameter = offered[name]
        if not _agrees(value, parameter.default):
            raise ParameterError(f"{name} takes a value like {parameter.literal}, got {value!r}")
        _check_possible(name, value)


def _agrees(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple) and all(
            not default or any(_agrees(entry, example) for example in default) for entry in value
        )
    return isinstance(value, type(default))


def _check_possible(name: str, value: Any) -> None:
    from annealed_core import fields  # late: it imports torch, which other refusals need not wait for

    try:
        fields.check_parameter(name, value)
    except ValueError as error:
        raise ParameterError(str(error)) from None


@dataclass(frozen=True)
class Profile:
    """How long and how thoroughly the notebooks run: a section of parameters for each of them."""

    name: str
    description: str
    sections: dict[str, dict[str, Any]]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; here it is a number."""


_Loader.yaml_implicit_resolvers = {**yaml.SafeLoader.yaml_implicit_resolvers}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """The value that `text` has in a profile."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ParameterError(f"cannot read the value {text!r}: write it as in a profile") from None


def load_profile(name: str, folder: Path, notebooks: Iterable[str]) -> Profile:
    """Read `<folder>/<name>.yaml`; `notebooks` are the names that its sections may have."""
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ReportError(f"unknown profile {name!r}: choose one of {', '.join(known) or 'none'}")
    try:
        content = yaml.load((folder / f"{name}.yaml").read_text(encoding="utf-8"), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise ReportError(f"profile {name!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ReportError(f"profile {name!r} takes a section for each notebook, got {content!r}")
    description = str(content.pop("description", "")).strip()
    for section, values in content.items():
        if section not in notebooks:
            choices = ", ".join(notebooks)
            raise ReportError(
                f"profile {name!r}: section {section!r} names no notebook: "
                f"{suggest(str(section), notebooks)}choose from {choices}"
            )
        if not isinstance(values, dict | None):
            raise ReportError(f"profile {name!r}: section {section!r} takes names and values, got {values!r}")
    return Profile(name, description, {section: dict(values or {}) for section, values in content.items()})


def check_parameters() -> None:
    """Check, inside a notebook, the parameters that papermill injected, or else those of the notebook itself.

    Called in the cell after the parameters. Papermill only warns about a name that the notebook does not have, as in
    `papermill notebook.ipynb out.ipynb -p lerning_rate 1`; this makes it an error of one line. Outside IPython nothing
    happens.

    Raises:
        ParameterError: for an unknown name or an impossible value.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return
    history: list[str] = list(shell.user_ns.get("In", []))
    injected = [number for number, source in enumerate(history) if source.split("\n", 1)[0] == "# Parameters"]
    if injected and injected[-1] > 1:
        before = history[: injected[-1]]
        offered = {name: entry for source in before for name, entry in read_parameters(source).items()}
        given = read_parameters(history[injected[-1]])
    else:
        # Whoever works by hand changes the cell and runs it again: its last execution counts.
        offered = given = read_parameters(history[1]) if len(history) > 1 else {}
        again = [entries for entries in map(read_parameters, history[1:]) if entries.keys() == offered.keys()]
        given = again[-1] if again else given
    check_values(offered, {name: entry.default for name, entry in given.items()})
