"""The report: a profile's parameters go into the notebooks, papermill executes them, and every notebook becomes an HTML page.

    python -m annealed_core.report --profile quick                      # build/report/quick/index.html
    python -m annealed_core.report 02_toy_energies --set 02_toy_energies.lr=0.01
    python -m annealed_core.report --check build/report/quick           # what is wrong with built pages
    python -m annealed_core.report --store-outputs                      # execute notebooks/ and keep their outputs

Everything that can be refused is refused before anything is executed or written (exit code 2). A failing cell is exit code 1: its page
is written all the same, with the error in it, and the other notebooks run to their end.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from annealed_core.parameters import (
    ParameterError,
    Profile,
    ReportError,
    check_parameters,
    check_values,
    load_profile,
    parse_value,
    read_parameters,
    suggest,
)

__all__ = ["ParameterError", "ReportError", "check_pages", "check_parameters", "main"]

LAST = "00_summary"  # reads what the others have stored
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|private|var|opt|usr|mnt)/[\w.+-]+|[A-Z]:\\Users\\|at 0x[0-9a-f]{6,}")


@dataclass(frozen=True)
class Job:
    """One notebook to execute, and what its page needs to know."""

    stem: str
    notebooks: Path
    out: Path
    profile: str
    parameters: dict[str, Any]
    titles: dict[str, str]

    @property
    def executed(self) -> Path:
        return self.out / "notebooks" / f"{self.stem}.ipynb"


@dataclass(frozen=True)
class Outcome:
    """How a notebook ended: `error` is None, or the one line that says where and why it stopped."""

    stem: str
    seconds: float
    error: str | None


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
                    raise ReportError(f"{stem}: unknown citation {key!r}: {suggest(key, known)}{bibliography.name} has no such entry")


def prepare_worker(threads: int) -> None:
    """Set up the environment that kernels inherit, and end this process as soon as the one that started it has ended."""
    os.environ |= {
        "ANNEALED_PROGRESS": "0",
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not one registered elsewhere
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    # Small operations are faster with one thread a process than with threads that wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

    def follow_parent() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)  # the kernels notice in their turn

    threading.Thread(target=follow_parent, daemon=True).start()


def execute(job: Job, with_page: bool = True) -> Outcome:
    """Execute one notebook in this process and write its page; files appear whole or not at all."""
    import nbformat
    import papermill

    partial = job.out / ".partial" / job.executed.name
    partial.parent.mkdir(parents=True, exist_ok=True)
    job.executed.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    started, error = time.monotonic(), None
    try:
        papermill.execute_notebook(
            job.notebooks / job.executed.name,
            partial,
            job.parameters,
            kernel_name="python3",
            cwd=job.notebooks,
            progress_bar=False,
            extra_arguments=["--log-level=ERROR"],
        )
    except papermill.PapermillExecutionError:
        pass  # the notebook says where
    except Exception as problem:  # a kernel that died, a notebook that is not valid: said like a failing cell
        error = f"{type(problem).__name__}: {_one_line(problem)}"
    seconds = time.monotonic() - started
    if not partial.exists():
        return Outcome(job.stem, seconds, f"{job.stem}: not executed: {error}")
    notebook = nbformat.read(partial, as_version=4)
    failure = find_failure(notebook.cells, error)
    notebook.metadata["annealed"] = execution_facts(job.profile, seconds) | {"failure": failure}
    for place in ("input_path", "output_path"):
        notebook.metadata["papermill"].pop(place, None)
    nbformat.write(notebook, partial)
    partial.replace(job.executed)
    if with_page:
        write_page(job, notebook)
    if failure:
        where = f"code cell {failure['cell']} (In [{failure['execution_count']}])"
        return Outcome(job.stem, seconds, f"{job.stem}: {where} failed: {failure['error']}")
    return Outcome(job.stem, seconds, None)


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())


def find_failure(cells: Sequence[Any], error: str | None) -> dict[str, Any] | None:
    """The first code cell that failed, counted as in the notebook before execution, or the last one started where a kernel died."""
    number, last = 0, None
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "injected-parameters" in tags:
            continue
        number += 1
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags:
                message = f"{output.ename}: {_one_line(output.evalue)}"
                return {"cell": number, "execution_count": cell.execution_count, "error": message}
        if cell.metadata.get("papermill", {}).get("status") in ("running", "completed", "failed"):
            last = {"cell": number, "execution_count": cell.execution_count, "error": error}
    return last if error else None


def execution_facts(profile: str, seconds: float) -> dict[str, Any]:
    """What a page says of its making: never where, or by whom."""
    packages = {}
    for name in ("torch",):
        try:
            packages[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    date = f"{datetime.now():%-d %B %Y}"
    python = platform.python_version()
    return {"profile": profile, "date": date, "seconds": seconds, "python": python, "packages": packages, "cores": CORES}


def write_page(job: Job, notebook: Any) -> None:
    """Write the page of an executed notebook."""
    from annealed_core import pages

    bibliography = pages.load_bibliography(job.notebooks / "references.bib")
    write_whole(job.out / f"{job.stem}.html", pages.render_page(notebook, job.stem, job.titles, job.notebooks, bibliography))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def execute_all(jobs: Sequence[Job], workers: int, with_pages: bool = True) -> Iterator[Outcome]:
    """Execute notebooks, several at a time, the summary after all others; outcomes come in the order of ending."""
    first = [job for job in jobs if job.stem != LAST]
    last = [job for job in jobs if job.stem == LAST]
    threads = max(1, CORES // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), prepare_worker, (threads,)) as pool:
        for batch in (first, last):
            futures = {pool.submit(execute, job, with_pages): job for job in batch}
            try:
                for future in as_completed(futures):
                    try:
                        yield future.result()
                    except Exception as problem:
                        stem = futures[future].stem
                        yield Outcome(stem, 0.0, f"{stem}: {type(problem).__name__}: {_one_line(problem)}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def clean(notebook: Any) -> Any:
    """An executed notebook as it is committed: outputs, and nothing that differs between machines or moments."""
    kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata = type(notebook)({"kernelspec": kernelspec, "language_info": {"name": "python"}})
    count = 0
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = [output for output in cell.outputs if _is_kept(output)]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            for found in (MACHINE_PATH.search(text) for text in texts):
                if found:
                    raise ReportError(f"code cell {count} prints what is true of one machine only: {found[0]!r}")
    return notebook


def _is_kept(output: Any) -> bool:
    if output.output_type == "stream":
        return bool(output.name != "stderr")
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def store_outputs(jobs: Sequence[Job]) -> None:
    """Write executed notebooks back over their sources, all or none."""
    import nbformat

    cleaned = {}
    for job in jobs:
        try:
            notebook = clean(nbformat.read(job.executed, as_version=4))
        except ReportError as error:
            raise ReportError(f"{job.stem}: {error}") from None
        nbformat.validate(notebook)
        lines = nbformat.v4.rwbase.split_lines(notebook)
        cleaned[job] = json.dumps(lines, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    for job, text in cleaned.items():
        write_whole(job.notebooks / f"{job.stem}.ipynb", text)


def check_pages(folder: Path | str) -> list[str]:
    """What is wrong with the pages of a built report, one line each; see `annealed_core.pagecheck`."""
    from annealed_core import pagecheck

    return pagecheck.check_pages(Path(folder))


def build(arguments: argparse.Namespace) -> int:
    """Execute what the arguments ask for; return the exit code."""
    profile, jobs = plan(arguments)
    print(f"annealed: {len(jobs)} notebooks with profile {profile.name}, {arguments.jobs} at a time", flush=True)
    errors = []
    for outcome in execute_all(jobs, arguments.jobs, with_pages=not arguments.store_outputs):
        print(f"  {outcome.stem:<24}{outcome.seconds:7.1f} s{'  failed' if outcome.error else ''}", flush=True)
        if outcome.error:
            errors.append(outcome.error)
    shutil.rmtree(jobs[0].out / ".partial", ignore_errors=True)
    for error in errors:
        print(f"annealed: {error}", file=sys.stderr)
    if arguments.store_outputs:
        if not errors:
            store_outputs(jobs)
    else:
        write_index(profile, jobs[0])
    return 1 if errors else 0


def write_index(profile: Profile, job: Job) -> None:
    from annealed_core import pages

    bibliography = pages.load_bibliography(job.notebooks / "references.bib")
    index = job.out / "index.html"
    write_whole(index, pages.render_index(job.out / "notebooks", job.titles, profile.name, profile.description, bibliography))
    print(f"annealed: {os.path.relpath(index)}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a number of processes from 1, got {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"annealed: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _Parser(prog="python -m annealed_core.report", description="Execute the notebooks and build the report.")
    parser.add_argument("only", nargs="*", metavar="NOTEBOOK", help="restrict to these, such as 02_toy_energies")
    parser.add_argument("--profile", default="quick", help="quick, full or paper (default: quick)")
    parser.add_argument("--set", action="append", default=[], metavar="NOTEBOOK.NAME=VALUE", help="another value for one parameter")
    parser.add_argument("--jobs", type=_positive, default=2, help="notebooks at a time (default: 2)")
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"), help="folder of the notebooks")
    parser.add_argument("--profiles", type=Path, default=Path("profiles"), help="folder of the profiles")
    parser.add_argument("--out", type=Path, default=Path("build/report"), help="folder to build in (default: build/report)")
    parser.add_argument("--store-outputs", action="store_true", help="execute with the notebooks' own values and keep the outputs in them")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only check the pages that were built in this folder")
    arguments = parser.parse_args(argv)
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
