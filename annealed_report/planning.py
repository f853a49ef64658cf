"""What a report executes: profiles, notebooks and settings, all compared before anything runs.

A profile is a YAML file with one section of parameters a notebook. What is wrong is a ReportError of one line.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import yaml

import annealed_core
from annealed_core.description import suggest
from annealed_report.markdown import cited_keys, load_bibliography
from annealed_report.parameters import ParameterError, ReportError, check_values, read_parameters

LAST = "00_summary"  # reads what the others have stored


@dataclass(frozen=True)
class Job:
    """One notebook to execute with these parameters of a profile, and what its page needs to know.

    `titles` has those of all notebooks by stem, in reading order; `key` is a digest of all that the outputs depend on.
    """

    stem: str
    notebooks: Path
    out: Path
    profile: str
    description: str
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
            raise ReportError(f"{repeated[0]!r} stands there {len(repeated)} times")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """The value that `text` has in a profile."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        raise ParameterError(f"cannot read the value {text!r}: write it as in a profile") from None


def load_profile(name: str, folder: Path, notebooks: Iterable[str]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The description in `<folder>/<name>.yaml`, and its sections, which may have the names of the notebooks."""
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ReportError(f"unknown profile {name!r}: choose one of {', '.join(known) or 'none'}")
    try:
        content = yaml.load((folder / f"{name}.yaml").read_text(encoding="utf-8"), Loader=_Loader) or {}
        if not isinstance(content, dict):
            raise ReportError(f"it takes a section for each notebook, got {content!r}")
        description = str(content.pop("description", "")).strip()
        for section, values in content.items():
            if section not in notebooks:
                choices = f"{suggest(str(section), notebooks)}choose from {', '.join(notebooks)}"
                raise ReportError(f"section {section!r} names no notebook: {choices}")
            if not isinstance(values, dict | None):
                raise ReportError(f"section {section!r} takes names and values, got {values!r}")
    except ReportError as error:
        raise ReportError(f"profile {name!r}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ReportError(f"profile {name!r} is not YAML: {' '.join(str(error).split())}") from None
    return description, {section: dict(values or {}) for section, values in content.items()}


def read_cells(path: Path) -> list[Any]:
    """The cells of a notebook file."""
    try:
        return list(nbformat.read(path, as_version=4).cells)
    except (ValueError, AttributeError, KeyError):  # nbformat's errors are ValueErrors
        raise ReportError(f"{path.name} is not a notebook") from None


def plan(
    folder: Path, profiles: Path, out: Path, profile: str | None, only: Sequence[str] = (), settings: Sequence[str] = ()
) -> list[Job]:
    """Check everything that can be checked without executing, and list what is to be executed, in order of starting.

    `profile` is None for the notebooks' own values, `only` has the stems of those to execute, none for all; each of
    `settings` is `notebook.name=value`, on top of the profile. The report is built in the profile's folder of `out`.
    """
    cells = {path.stem: read_cells(path) for path in sorted(folder.glob("[!.]*.ipynb"))}
    if not cells:
        raise ReportError(f"no notebooks in {folder}")
    for stem in only:
        if stem not in cells:
            raise ReportError(f"unknown notebook {stem!r}: {suggest(stem, cells)}choose from {', '.join(cells)}")
    description, given = load_profile(profile, profiles, list(cells)) if profile else ("", {})
    given |= {stem: {} for stem in cells if stem not in given}
    for setting in settings:
        match = re.fullmatch(r"([^.=]+)\.(\w+)=(.*)", setting, re.DOTALL)
        if not match or match[1] not in cells:
            raise ReportError(f"--set takes notebook.name=value with one of {', '.join(cells)}, got {setting!r}")
        given[match[1]][match[2]] = parse_value(match[3])
    known = list(load_bibliography(folder / "references.bib").entries)
    for stem, entries in cells.items():
        for key in cited_keys(cell.source for cell in entries if cell.cell_type == "markdown"):
            if key not in known:
                meant = f"{suggest(key, known)}references.bib has no such entry"
                raise ReportError(f"{stem}: unknown citation {key!r}: {meant}")
        offered = [cell.source for cell in entries if "parameters" in cell.metadata.get("tags", [])]
        try:
            check_values(read_parameters("\n".join(offered)), given[stem])
        except ParameterError as error:
            raise ParameterError(f"{stem}: {error}") from None
    about = profile or "defaults", description
    place = folder.resolve(), (out / about[0]).resolve()
    titles, code = {stem: _title(entries, stem) for stem, entries in cells.items()}, digest_of_code()
    jobs = []
    # A profile names first what takes longest; what all the others lead up to comes last.
    for stem in sorted(given, key=lambda stem: stem == LAST):
        if not only or stem in only:
            key = _digest(code, given[stem], [[cell.cell_type, cell.source, cell.metadata] for cell in cells[stem]])
            jobs.append(Job(stem, *place, *about, given[stem], titles, key))
    return jobs


def _title(cells: Sequence[Any], stem: str) -> str:
    """The first heading of a notebook, or its file name."""
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    heading = re.search(r"^# +(.+)$", prose, re.MULTILINE)
    return heading[1].strip() if heading else stem


def digest_of_code() -> str:
    """A digest of what all notebooks depend on: the code of both packages, committed results, Python, torch, device."""
    found = [platform.python_version(), version("torch"), os.environ.get("ANNEALED_DEVICE") or "cpu"]
    roots = [Path(annealed_core.__file__).parent, Path(__file__).parent]
    files = [(root, path) for root in roots for path in root.rglob("*.py")]
    results = Path(os.environ.get("ANNEALED_RESULTS") or roots[1].parent / "results")
    files += [(results, path) for path in results.rglob("*.json")]
    for root, path in sorted(files):
        found += [f"{root.name}/{path.relative_to(root).as_posix()}", hashlib.sha256(path.read_bytes()).hexdigest()]
    return _digest(*found)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
