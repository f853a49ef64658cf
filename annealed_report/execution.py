"""Executing notebooks in kernels of their own, and keeping what they show: as pages, or in the notebooks themselves.

What was executed before is not executed again while nothing that its outputs depend on has changed.
"""

import base64
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from typing import Any

import nbformat
import papermill

from annealed_core.running.system import cores, diverted_stderr, replace_file
from annealed_report import pages
from annealed_report.parameters import ReportError
from annealed_report.planning import LAST, Job

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
#: What differs between machines or between two executions, and so must not stand in a committed output.
PASSING = re.compile(
    r"(?<![\w.:/])/(?:home|Users|root|tmp|private|var|opt|usr|mnt|work)/[\w.+-]+|[A-Z]:\\Users\\|at 0x[0-9a-f]{6,}"
)


@dataclass(frozen=True)
class Outcome:
    """How a notebook ended, in an error of one line or well; `kept` where it was executed before and not now."""

    stem: str
    seconds: float
    kept: bool = False
    error: str | None = None
    died: bool = False


def execute_all(
    jobs: Sequence[Job], at_once: int = 2, with_pages: bool = True, force: bool = False
) -> Generator[Outcome]:
    """Execute notebooks of one folder, the summary after all others; outcomes come in the order of ending.

    `at_once` kernels share the cores between them; `force` executes also what was executed before.
    """
    os.environ |= {
        "ANNEALED_PROGRESS": "0",
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not one registered elsewhere
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    # Small operations are faster with one thread a kernel than with threads that wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // at_once)))
    partial_folder = jobs[0].out / ".partial"
    for folder in (partial_folder, jobs[0].executed.parent):
        folder.mkdir(parents=True, exist_ok=True)
    died, words = False, b""
    try:
        # Kernels start in this folder. What they say outside their cells matters only where one dies.
        with chdir(jobs[0].notebooks), diverted_stderr() as said, ThreadPool(at_once) as pool:
            for is_last in (False, True):
                started = [job for job in jobs if (job.stem == LAST) == is_last]
                for outcome in pool.imap_unordered(partial(_execute, with_page=with_pages, force=force), started):
                    died = died or outcome.died
                    yield outcome
            said.seek(0)
            words = said.read() if died else b""
    finally:
        sys.stderr.write(words.decode(errors="replace"))
        shutil.rmtree(partial_folder, ignore_errors=True)


def _execute(job: Job, with_page: bool, force: bool) -> Outcome:
    """Execute one notebook where it must be, and write its page; files appear whole or not at all."""
    started = time.monotonic()
    try:
        notebook = None if force else _executed_before(job)
        kept, died = notebook is not None, False
        if notebook is None:
            notebook, died = _run(job)
        if with_page:
            html = pages.render_page(notebook, job.stem, job.titles, job.notebooks)
            replace_file(job.out / f"{job.stem}.html", html.encode())
        failure = notebook.metadata["annealed"]["failure"]
        error = f"{job.stem}: code cell {failure['cell']} failed: {failure['error']}" if failure else None
        return Outcome(job.stem, time.monotonic() - started, kept, error, died)
    except Exception as problem:  # one notebook must not take the others with it
        error = f"{job.stem}: {type(problem).__name__}: {' '.join(str(problem).split())}"
        return Outcome(job.stem, time.monotonic() - started, error=error)


def _executed_before(job: Job) -> Any:
    """The executed notebook, where nothing that its outputs depend on has changed since; else None."""
    try:
        notebook = nbformat.read(job.executed, as_version=4)
    except (OSError, ValueError):
        return None
    return notebook if notebook.metadata.get("annealed", {}).get("key") == job.key else None


def _run(job: Job) -> tuple[Any, bool]:
    """Execute a notebook; how it ended, and whether its kernel died."""
    path, started, problem = job.out / ".partial" / job.executed.name, time.monotonic(), None
    path.unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            *(str(each).replace("{", "{{").replace("}", "}}") for each in (job.source, path)),  # papermill fills in {}
            parameters=job.parameters,
            kernel_name=KERNEL["name"],
            language=KERNEL["language"],
            progress_bar=False,
            extra_arguments=["--log-level=CRITICAL"],
        )
    except Exception as caught:
        if not path.exists():
            raise
        problem = caught
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["annealed"] = {
        "profile": job.profile,
        "date": f"{datetime.now():%d %B %Y}".lstrip("0"),
        "seconds": time.monotonic() - started,
        "python": platform.python_version(),
        "packages": {"torch": version("torch").split("+")[0]},
        "cores": cores(),
        "failure": _failure(notebook.cells, problem) if problem else None,
        "key": None if problem else job.key,
    }
    for place in ("input_path", "output_path"):
        notebook.metadata["papermill"].pop(place, None)
    nbformat.write(notebook, path)
    path.replace(job.executed)
    return notebook, not isinstance(problem, papermill.PapermillExecutionError | None)


def _failure(cells: Sequence[Any], problem: Exception) -> dict[str, Any]:
    """Which code cell failed, counted as in the source, and its error in one line: papermill started none after it."""
    codes = [c for c in cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
    started = [cell for cell in codes if cell.metadata.get("papermill", {}).get("start_time")]
    kind, text = getattr(problem, "ename", type(problem).__name__), getattr(problem, "evalue", problem)
    return {"cell": max(len(started), 1), "error": f"{kind}: {' '.join(str(text).split())}"}


def clean(notebook: Any) -> Any:
    """An executed notebook as it is committed: outputs, and nothing that differs between machines or moments."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = count
        is_kept = lambda output: output.get("name") != "stderr" and pages.WIDGET not in output.get("data", {})
        cell.outputs = [output for output in cell.outputs if is_kept(output)]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            if found := PASSING.search("\n".join(texts)):
                raise ReportError(f"code cell {count} prints what is true of one machine only: {found[0]!r}")
    return notebook


def store_outputs(jobs: Sequence[Job]) -> None:
    """Write executed notebooks back over their sources, all or none, and the figures that the README shows beside them.

    Those are the images of cells tagged `readme`.
    """
    written: dict[Any, bytes] = {}
    for job in jobs:
        try:
            notebook = clean(nbformat.read(job.executed, as_version=4))
        except ReportError as error:
            raise ReportError(f"{job.stem}: {error}") from None
        written[job.source] = f"{nbformat.writes(notebook)}\n".encode()
        shown = [cell for cell in notebook.cells if "readme" in cell.metadata.get("tags", [])]
        for output in (output for cell in shown for output in cell.outputs if "image/png" in output.get("data", {})):
            written[job.source.with_suffix(".png")] = base64.b64decode(output.data["image/png"])
    for path, content in written.items():
        replace_file(path, content)
