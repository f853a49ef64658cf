"""What a report executes: profiles, notebooks and settings, all compared before anything runs.

A profile is a YAML file with one section of parameters a notebook. What is wrong is a ReportError of one line.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import yaml

from annealed_report.markdown import cited_keys, load_bibliography
from annealed_report.parameters import ParameterError, ReportError, check_values, read_parameters, suggest

LAST = "00_summary"  # reads what the others have stored


@dataclass(frozen=True)
class Profile:
    """How long and how thoroughly the notebooks run: a section of parameters for each of them."""

    name: str
    description: str
    sections: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One notebook to execute with these parameters, and what its page needs to know.

    `titles` has those of all notebooks by stem, in reading order; `key` is a digest of all that the outputs depend on.
    """

    stem: str
    notebooks: Path
    out: Path
    profile: str
    parameters: dict[str, Any]
    titles: dict[str, str]
    key: str

    @property
    def source(self) -> Path:
        """The notebook."""
        return self.notebooks / f"{self.stem}.ipynb"

    @property
    def executed(self) -> Path:
        """Where the executed notebook is kept."""
        return self.out / "notebooks" / f"{self.stem}.ipynb"


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, which YAML 1.1 reads as text, and no name stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping; ReportError where a name is repeated."""
        names = [key.value for key, _ in node.value]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ReportError(f"{repeated[0]!r} stands there {names.count(repeated[0])} times")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {**yaml.SafeLoader.yaml_implicit_resolvers}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """The value that `text` has in a profile."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ParameterError(f"cannot read the value {text[:80]!r}: write it as in a profile") from None


def load_profile(name: str, folder: Path, notebooks: Iterable[str]) -> Profile:
    """Read `<folder>/<name>.yaml`; `notebooks` are the names that its sections may have."""
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ReportError(f"unknown profile {name!r}: choose one of {', '.join(known) or 'none'}")
    try:
        content = yaml.load((folder / f"{name}.yaml").read_text(encoding="utf-8"), Loader=_Loader) or {}
    except ReportError as error:
        raise ReportError(f"profile {name!r}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ReportError(f"profile {name!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ReportError(f"profile {name!r} takes a section for each notebook, got {content!r}")
    description = str(content.pop("description", "")).strip()
    for section, values in content.items():
        if section not in notebooks:
            choices = f"{suggest(str(section), notebooks)}choose from {', '.join(notebooks)}"
            raise ReportError(f"profile {name!r}: section {section!r} names no notebook: {choices}")
        if not isinstance(values, dict | None):
            raise ReportError(f"profile {name!r}: section {section!r} takes names and values, got {values!r}")
    return Profile(name, description, {section: dict(values or {}) for section, values in content.items()})


def read_cells(path: Path) -> list[Any]:
    """The cells of a notebook file."""
    try:
        return list(nbformat.read(path, as_version=4).cells)
    except (ValueError, AttributeError, KeyError):  # nbformat's errors are ValueErrors
        raise ReportError(f"{path.name} is not a notebook") from None


def plan(
    folder: Path, profiles: Path, out: Path, profile: str | None, only: Sequence[str] = (), settings: Sequence[str] = ()
) -> tuple[Profile, list[Job]]:
    """Check everything that can be checked without executing, and list what is to be executed, in order of starting.

    `profile` is None for the notebooks' own values, `only` has the stems of those to execute, none for all; each of
    `settings` is `notebook.name=value`, on top of the profile. The report is built in a folder of `out`.
    """
    cells = {path.stem: read_cells(path) for path in sorted(folder.glob("*.ipynb")) if not path.name.startswith(".")}
    if not cells:
        raise ReportError(f"no notebooks in {folder}")
    for stem in only:
        if stem not in cells:
            raise ReportError(f"unknown notebook {stem!r}: {suggest(stem, cells)}choose from {', '.join(cells)}")
    chosen = load_profile(profile, profiles, list(cells)) if profile else Profile("defaults", "", {})
    sections = {stem: dict(values) for stem, values in chosen.sections.items()}
    for setting in settings:
        match = re.fullmatch(r"([^.=]+)\.(\w+)=(.*)", setting, re.DOTALL)
        if not match or match[1] not in cells:
            raise ReportError(f"--set takes notebook.name=value with one of {', '.join(cells)}, got {setting!r}")
        sections.setdefault(match[1], {})[match[2]] = parse_value(match[3])
    _check_citations(cells, folder / "references.bib")
    for stem, values in sections.items():
        tagged = [cell.source for cell in cells[stem] if "parameters" in cell.metadata.get("tags", [])]
        try:
            check_values(read_parameters(tagged[0]) if tagged else {}, values)
        except ParameterError as error:
            raise ParameterError(f"{stem}: {error}") from None
    titles = {stem: _title(entries, stem) for stem, entries in cells.items()}
    # A profile names first what takes longest; what all the others lead up to comes last.
    order = sorted([*sections, *(stem for stem in cells if stem not in sections)], key=lambda stem: stem == LAST)
    code = digest_of_code()
    jobs = []
    for stem in order:
        if not only or stem in only:
            given = sections.get(stem, {})
            key = _digest(code, given, [[cell.cell_type, cell.source, cell.metadata] for cell in cells[stem]])
            jobs.append(Job(stem, folder.resolve(), (out / chosen.name).resolve(), chosen.name, given, titles, key))
    return chosen, jobs


def _title(cells: Sequence[Any], stem: str) -> str:
    """The first heading of a notebook, or its file name."""
    for cell in cells:
        if cell.cell_type == "markdown" and (match := re.search(r"^# +(.+)$", cell.source, re.MULTILINE)):
            return match[1].strip()
    return stem


def _check_citations(cells: Mapping[str, Sequence[Any]], bibliography: Path) -> None:
    known = list(load_bibliography(bibliography).entries)
    for stem, entries in cells.items():
        for key in cited_keys(cell.source for cell in entries if cell.cell_type == "markdown"):
            if key not in known:
                missing = f"{suggest(key, known)}{bibliography.name} has no such entry"
                raise ReportError(f"{stem}: unknown citation {key!r}: {missing}")


def digest_of_code() -> str:
    """A digest of what all notebooks depend on: the code of both packages, committed results, Python and torch."""
    found = [platform.python_version(), version("torch")]
    roots = [Path(str(find_spec(name).origin)).parent for name in ("annealed_core", "annealed_report")]  # type: ignore[union-attr]
    files = [(root, path) for root in roots for path in root.rglob("*.py")]
    results = Path(os.environ.get("ANNEALED_RESULTS") or roots[1].parent / "results")
    files += [(results, path) for path in results.rglob("*.json")]
    for root, path in sorted(files):
        found += [f"{root.name}/{path.relative_to(root).as_posix()}", hashlib.sha256(path.read_bytes()).hexdigest()]
    return _digest(*found)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
