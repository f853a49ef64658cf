"""Parameters of a notebook: what its `parameters` cell offers, and whether given values agree with it.

A notebook offers parameters by assigning literals in one cell tagged `parameters`, each with a trailing `# help`, as
papermill reads them. All is compared before anything runs; what is wrong is said in one line.
"""

import ast
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any


class ReportError(ValueError):
    """Something the reader of the report can put right; its message is one line."""

    def _render_traceback_(self) -> list[str]:
        # IPython shows this instead of a traceback: the line says all there is to say.
        return [f"{type(self).__name__}: {self}"]


class ParameterError(ReportError):
    """A parameter that the notebook does not have, or a value that it cannot take."""


@dataclass(frozen=True)
class Parameter:
    """One assignment: its value (None where that is no literal), how a page shows it, and its comment."""

    default: Any
    shown: str
    help: str = ""


def read_parameters(source: str) -> dict[str, Parameter]:
    """The parameters that papermill finds in a cell, by name.

    >>> read_parameters("lr = 1e-3  # learning rate")
    {'lr': Parameter(default=0.001, shown='1e-3', help='learning rate')}
    """
    from papermill.translators import PythonTranslator

    found = {}
    for name, _, written, comment in PythonTranslator.inspect({"source": source}):
        try:
            default = ast.literal_eval(written)
        except (ValueError, SyntaxError):
            default = None
        found[name] = Parameter(default, repr(default) if isinstance(default, list) else written, comment)
    return found


@cache
def possible() -> dict[str, Any]:
    """What the notebooks' parameters, or each entry of one that is a list, take beyond the type of their default."""
    from annealed_core.description import Choice, Number, Whole  # late: torch may be missing
    from annealed_core.energies import ENERGIES
    from annealed_report.studies import STUDIES

    most = 2**31 - 1
    return {
        "seeds": Whole(0, most),
        "targets": Choice(*ENERGIES),
        "studies": Choice("live", *STUDIES),
        "schedules": Choice("constant", "linear", "geometric", "cyclical"),
        "lr": Number(0, open_low=True),
        "gamma": Number(0, 1, open_low=True),
        "beta1": Number(0, 1, open_high=True),
        "n_transitions": Whole(0, 1000),
        "train_images": Whole(2, 50_000),
        "nll_images": Whole(1, 10_000),
        "nll_samples": Whole(2, most),
    } | dict.fromkeys(("steps", "epochs", "batch", "hidden", "samples"), Whole(1, most))


def check_values(offered: Mapping[str, Parameter], given: Mapping[str, Any]) -> None:
    """Raise ParameterError unless every given name is offered, has the type of its default, and a possible value."""
    from annealed_core.description import suggest

    for name, value in given.items():
        if name not in offered:
            takes = f"it takes {', '.join(sorted(offered))}" if offered else "the notebook takes no parameters"
            raise ParameterError(f"unknown parameter {name!r}: {suggest(name, offered)}{takes}")
        if not _agrees(value, offered[name].default):
            raise ParameterError(f"{name} takes a value like {offered[name].shown}, got {reprlib.repr(value)}")
        if name in possible():
            check, is_list = possible()[name], isinstance(value, list | tuple)
            entries = value if is_list else [value]
            is_right = all(check(each) is not None and entries.count(each) == 1 for each in entries)
            if not is_right or (name == "seeds" and not entries):
                takes = f"different ones, each {check.takes}" if is_list else check.takes
                raise ParameterError(f"impossible {name} {reprlib.repr(value)}: {name} takes {takes}")


def _agrees(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, list | tuple):
        examples = default or [None]
        return isinstance(value, list | tuple) and all(any(_agrees(each, one) for one in examples) for each in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def check_parameters() -> None:
    """Check, inside a notebook, the values of the parameters that papermill injected, or else of all.

    Called in the cell after the parameters. Papermill only warns about a name that the notebook does not have, as in
    `papermill notebook.ipynb out.ipynb -p lerning_rate 1`; this raises ParameterError. Outside IPython nothing happens.
    """
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython else None
    history: list[str] = list(shell.user_ns.get("In", [])) if shell else []
    if len(history) < 2:
        return
    offered = read_parameters(history[1])
    injected = [source for source in history[2:] if source.startswith("# Parameters\n")]
    names = read_parameters(injected[-1]) if injected else offered
    check_values(offered, {name: shell.user_ns[name] for name in names})
