"""The report: a profile's parameters go into the notebooks, papermill executes them, each becomes an HTML page.

    python -m annealed_core.report --profile quick                      # build/report/quick/index.html
    python -m annealed_core.report 02_toy_energies --set 02_toy_energies.lr=0.01
    python -m annealed_core.report --check build/report/quick           # what is wrong with built pages
    python -m annealed_core.report --store-outputs                      # execute notebooks/ and keep their outputs

Everything that can be refused is refused before anything is executed or written (exit code 2). A failing cell is exit
code 1: its page is written all the same, with the error in it, and the other notebooks run to their end.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from annealed_core.execution import LAST, Job, execute_all, start_workers, store_outputs, write_index
from annealed_core.fields import suggest
from annealed_core.parameters import (
    ParameterError,
    Profile,
    ReportError,
    check_parameters,
    check_values,
    load_profile,
    parse_value,
    read_parameters,
)

__all__ = ["ParameterError", "ReportError", "check_pages", "check_parameters", "main"]


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook file, each source as one string."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError):
        raise ReportError(f"{path.name} is not a notebook") from None
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def plan(arguments: argparse.Namespace) -> tuple[Profile, list[Job]]:
    """Check everything that can be checked without executing, and list what is to be executed, in order of starting."""
    folder: Path = arguments.notebooks
    cells = {path.stem: read_cells(path) for path in sorted(folder.glob("*.ipynb")) if not path.name.startswith(".")}
    if not cells:
        raise ReportError(f"no notebooks in {folder}")
    for stem in arguments.only:
        if stem not in cells:
            raise ReportError(f"unknown notebook {stem!r}: {suggest(stem, cells)}choose from {', '.join(cells)}")
    if arguments.store_outputs:
        profile = Profile("defaults", "", {})
    else:
        profile = load_profile(arguments.profile, arguments.profiles, list(cells))
    sections = {stem: dict(values) for stem, values in profile.sections.items()}
    for setting in arguments.set:
        match = re.fullmatch(r"([^.=]+)\.(\w+)=(.*)", setting)
        if not match or match[1] not in cells:
            raise ReportError(f"--set takes notebook.name=value with one of {', '.join(cells)}, got {setting!r}")
        sections.setdefault(match[1], {})[match[2]] = parse_value(match[3])
    _check_citations(cells, folder / "references.bib")
    for stem, values in sections.items():
        tagged = [cell["source"] for cell in cells[stem] if "parameters" in cell["metadata"].get("tags", [])]
        try:
            check_values(read_parameters(tagged[0]) if tagged else {}, values)
        except ParameterError as error:
            raise ParameterError(f"{stem}: {error}") from None
    titles = {stem: _title(entries, stem) for stem, entries in cells.items()}
    # A profile names first what takes longest; what all the others lead up to comes last.
    order = sorted([*sections, *(stem for stem in cells if stem not in sections)], key=lambda stem: stem == LAST)
    out = arguments.out / profile.name
    wanted = [stem for stem in order if not arguments.only or stem in arguments.only]
    jobs = [Job(stem, folder.resolve(), out.resolve(), profile.name, sections.get(stem, {}), titles) for stem in wanted]
    return profile, jobs


def _title(cells: Sequence[Mapping[str, Any]], stem: str) -> str:
    """The first heading of a notebook, or its file name."""
    for cell in cells:
        if cell["cell_type"] == "markdown" and (match := re.search(r"^# +(.+)$", cell["source"], re.MULTILINE)):
            return match[1].strip()
    return stem


def _check_citations(cells: Mapping[str, Sequence[Mapping[str, Any]]], bibliography: Path) -> None:
    text = bibliography.read_text(encoding="utf-8") if bibliography.exists() else ""
    known = re.findall(r"^\s*@\w+\s*\{\s*([^,\s]+)\s*,", text, re.MULTILINE)
    for stem, entries in cells.items():
        for cell in entries:
            cited = re.findall(r'<cite data-cite="([^"]*)"', cell["source"]) if cell["cell_type"] == "markdown" else []
            for key in (key.strip() for keys in cited for key in keys.split(",")):
                if key not in known:
                    missing = f"{suggest(key, known)}{bibliography.name} has no such entry"
                    raise ReportError(f"{stem}: unknown citation {key!r}: {missing}")


def check_pages(folder: Path | str) -> list[str]:
    """What is wrong with the pages of a built report, one line each; see `annealed_core.pagecheck`."""
    from annealed_core import pagecheck

    return pagecheck.check_pages(Path(folder))


def build(arguments: argparse.Namespace) -> int:
    """Execute what the arguments ask for; return the exit code."""
    profile, jobs = plan(arguments)
    print(f"annealed: {len(jobs)} notebooks with profile {profile.name}, {arguments.jobs} at a time", flush=True)
    errors = []
    pool = start_workers(min(arguments.jobs, len(jobs)))
    try:
        for outcome in execute_all(jobs, pool, with_pages=not arguments.store_outputs):
            print(f"  {outcome.stem:<24}{outcome.seconds:7.1f} s{'  failed' if outcome.error else ''}", flush=True)
            if outcome.error:
                errors.append(outcome.error)
        if not arguments.store_outputs:
            print(f"annealed: {os.path.relpath(pool.submit(write_index, profile, jobs[0]).result())}")
    except BrokenProcessPool:
        errors.append("a process that executes notebooks was killed, perhaps for want of memory")
    finally:
        pool.shutdown(wait=sys.exc_info()[0] is None, cancel_futures=True)
        shutil.rmtree(jobs[0].out / ".partial", ignore_errors=True)
    for error in errors:
        print(f"annealed: {error}", file=sys.stderr)
    if arguments.store_outputs and not errors:
        store_outputs(jobs)
    return 1 if errors else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a number of processes from 1, got {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"annealed: {message}\n")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = _Parser(prog="python -m annealed_core.report", description="Execute the notebooks and build the report.")
    parser.add_argument("only", nargs="*", metavar="NOTEBOOK", help="restrict to these, such as 02_toy_energies")
    parser.add_argument("--profile", default="quick", help="a file in profiles/ (default: quick)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NOTEBOOK.NAME=VALUE", help="another value for one parameter"
    )
    parser.add_argument("--jobs", type=_positive, default=2, help="notebooks at a time (default: 2)")
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"), help="folder of the notebooks")
    parser.add_argument("--profiles", type=Path, default=Path("profiles"), help="folder of the profiles")
    parser.add_argument(
        "--out", type=Path, default=Path("build/report"), help="folder to build in (default: build/report)"
    )
    parser.add_argument(
        "--store-outputs",
        action="store_true",
        help="execute with the notebooks' own values and keep the outputs in them",
    )
    parser.add_argument(
        "--check", type=Path, metavar="FOLDER", help="only check the pages that were built in this folder"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = parse_arguments(argv)
    try:
        if arguments.check:
            problems = check_pages(arguments.check)
            print("\n".join(problems) or f"annealed: the pages in {arguments.check} are sound")
            return 1 if problems else 0
        return build(arguments)
    except ReportError as error:
        print(f"annealed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("annealed: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
