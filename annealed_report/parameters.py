"""Parameters of a notebook: what its `parameters` cell offers, and whether given values agree with it.

A notebook offers parameters by assigning literals in one cell tagged `parameters`, each with a trailing `# help`. All
is compared before anything runs; what is wrong is said in one line.
"""

import ast
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class ReportError(ValueError):
    """Something the reader of the report can put right; its message is one line."""

    def _render_traceback_(self) -> list[str]:
        # IPython shows this instead of a traceback: the line says all there is to say.
        return [f"{type(self).__name__}: {self}"]


class ParameterError(ReportError):
    """A parameter that the notebook does not have, or a value that it cannot take."""


@dataclass(frozen=True)
class Parameter:
    """One assignment of a parameters cell, as written, with what its comment says."""

    literal: str
    help: str = ""

    @property
    def default(self) -> Any:
        """The value; None where it is not a literal."""
        try:
            return ast.literal_eval(self.literal)
        except (ValueError, SyntaxError):
            return None

    @property
    def shown(self) -> str:
        """As written, on one line: papermill joins the lines of a list."""
        return repr(self.default) if isinstance(self.default, list | tuple | dict) else self.literal


def read_parameters(source: str) -> dict[str, Parameter]:
    """The parameters that a cell offers, by name, as papermill finds them.

    >>> read_parameters("seeds = 2  # runs a method")
    {'seeds': Parameter(literal='2', help='runs a method')}
    """
    from nbformat.v4 import new_code_cell, new_notebook  # late: a notebook that checks its own needs neither
    from papermill import inspect_notebook

    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    found = inspect_notebook(new_notebook(cells=[cell], metadata={"kernelspec": KERNEL}))
    return {name: Parameter(entry["default"], entry["help"]) for name, entry in found.items()}


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? `, or nothing where no known name is close."""
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def check_values(offered: Mapping[str, Parameter], given: Mapping[str, Any]) -> None:
    """Raise ParameterError unless every given name is offered, has the type of its default, and a possible value."""
    for name, value in given.items():
        if name not in offered:
            takes = f"it takes {', '.join(sorted(offered))}" if offered else "the notebook takes no parameters"
            raise ParameterError(f"unknown parameter {name!r}: {suggest(name, offered)}{takes}")
        default = offered[name].default
        if not _agrees(value, default):
            raise ParameterError(f"{name} takes a value like {offered[name].shown}, got {_short(value)}")
        if name in POSSIBLE and value != default:
            words, is_possible = POSSIBLE[name]
            with suppress(TypeError):  # a list in a list, say
                if is_possible(value):
                    continue
            words = words if isinstance(words, str) else f"different ones of {', '.join(words())}"
            raise ParameterError(f"impossible {name} {_short(value)}: {name} takes {words}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _agrees(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, list | tuple):
        examples = default or [None]
        return isinstance(value, list | tuple) and all(
            any(_agrees(entry, each) for each in examples) for entry in value
        )
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def _energies() -> list[str]:
    from annealed_core.energies import ENERGIES  # late, as below: it imports torch

    return list(ENERGIES)


def _studies() -> list[str]:
    from annealed_report.studies import STUDIES

    return ["live", *STUDIES]


Possible = tuple[str | Callable[[], list[str]], Callable[[Any], bool]]


def _whole(low: int, high: int = 2**31 - 1) -> Possible:
    return f"a whole number from {low} to {high:,}", lambda value: low <= value <= high


def _entries(value: Any) -> set[Any]:
    """What a list has, or the value alone; empty where an entry is repeated."""
    entries = value if isinstance(value, list | tuple) else [value]
    return set(entries) if len(set(entries)) == len(entries) else set()


def _some_of(names: Callable[[], list[str]]) -> Possible:
    return names, lambda value: value == [] or (bool(_entries(value)) and _entries(value) <= set(names()))


def _are_seeds(value: Any) -> bool:
    return bool(_entries(value)) and all(0 <= seed < 2**31 for seed in _entries(value))


#: What the parameters of the notebooks take beyond the type of their default: in words, or as names, and as a check.
POSSIBLE: dict[str, Possible] = {
    "seeds": ("different whole numbers from 0", _are_seeds),
    "target": _some_of(_energies),
    "targets": _some_of(_energies),
    "studies": _some_of(_studies),
    "schedules": _some_of(lambda: ["constant", "linear", "geometric", "cyclical"]),
    "lr": ("a number above 0", lambda value: 0 < value < math.inf),
    "gamma": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "beta1": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "n_transitions": _whole(0, 1000),
    "train_images": _whole(2, 50_000),
    "nll_images": _whole(1, 10_000),
    "nll_samples": _whole(2),
} | dict.fromkeys(("steps", "epochs", "batch", "hidden", "samples"), _whole(1))


def _assigned(source: str) -> dict[str, Parameter]:
    """The plain assignments of a cell: all that a check inside a notebook needs, without papermill's two seconds."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # magics
        return {}
    return {
        statement.targets[0].id: Parameter(ast.unparse(statement.value))
        for statement in statements
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }


def check_parameters() -> None:
    """Check, inside a notebook, the parameters that papermill injected, or else the values that they have now.

    Called in the cell after the parameters. Papermill only warns about a name that the notebook does not have, as in
    `papermill notebook.ipynb out.ipynb -p lerning_rate 1`; this makes it an error of one line. Outside IPython nothing
    happens.

    Raises:
        ParameterError: for an unknown name or an impossible value.
    """
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython else None
    history: list[str] = list(shell.user_ns.get("In", [])) if shell else []
    if len(history) < 2:
        return
    offered = _assigned(history[1])
    injected = [source for source in history[2:] if source.split("\n", 1)[0] == "# Parameters"]
    if injected:
        given = {name: parameter.default for name, parameter in _assigned(injected[-1]).items()}
    else:  # whoever works by hand changes the cell and runs it again
        given = {name: shell.user_ns[name] for name in offered if name in shell.user_ns}
    check_values(offered, given)
