"""Executing notebooks in other processes, and keeping what they show: as pages, or in the notebooks themselves."""

import base64
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from annealed_core.parameters import Profile, ReportError
from annealed_core.system import cores, die_with_parent, diverted_stderr, replace_file

LAST = "00_summary"  # reads what the others have stored

#: What differs between machines or between two executions, and so must not stand in a committed output.
PASSING = re.compile(
    r"(?<![\w.:/])/(?:home|Users|root|tmp|private|var|opt|usr|mnt)/[\w.+-]+|[A-Z]:\\Users\\|at 0x[0-9a-f]{6,}"
)


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
        """Where the executed notebook is kept."""
        return self.out / "notebooks" / f"{self.stem}.ipynb"


@dataclass(frozen=True)
class Outcome:
    """How a notebook ended: `error` is None, or the one line that says where and why it stopped."""

    stem: str
    seconds: float
    error: str | None


def _prepare_worker(threads: int) -> None:
    """Set up what kernels inherit, and see to it that this process ends with the one that started it."""
    os.environ |= {
        "ANNEALED_PROGRESS": "0",
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not one registered elsewhere
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    # Small operations are faster with one thread a process than with threads that wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    die_with_parent()  # and the kernels notice in their turn


def execute(job: Job, with_page: bool = True) -> Outcome:
    """Execute one notebook in this process and write its page; files appear whole or not at all."""
    import nbformat
    import papermill

    partial = job.out / ".partial" / job.executed.name
    partial.parent.mkdir(parents=True, exist_ok=True)
    job.executed.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    started, error = time.monotonic(), None
    with diverted_stderr() as said:  # what a kernel says outside its cells matters only when it dies
        try:
            papermill.execute_notebook(
                job.notebooks / job.executed.name,
                partial,
                job.parameters,
                kernel_name="python3",
                cwd=job.notebooks,
                progress_bar=False,
                extra_arguments=["--log-level=CRITICAL"],
            )
        except papermill.PapermillExecutionError:
            pass  # the notebook says where
        except Exception as problem:  # a kernel that died, a notebook that is not valid: said like a failing cell
            error = f"{type(problem).__name__}: {_one_line(problem)}"
        said.seek(0)
        last_words = said.read().decode(errors="replace") if error else ""
    sys.stderr.write(last_words)
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
    """The first code cell that failed, counted as in the source, or the last one started where a kernel died."""
    number, count, last = 0, 0, None
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code":
            continue
        # A kernel may die before it has said that it began, and then the cell has no count.
        began = cell.execution_count is not None or bool(cell.metadata.get("papermill", {}).get("start_time"))
        count = cell.execution_count or count + began
        if "injected-parameters" in tags:
            continue
        number += 1
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags:
                message = f"{output.ename}: {_one_line(output.evalue)}"
                message = re.sub(r"\(\d+\.py, line (\d+)\)$", r"(line \1)", message)  # IPython's name for the cell
                return {"cell": number, "execution_count": cell.execution_count, "error": message}
        if began or last is None:
            last = {"cell": number, "execution_count": count, "error": error}
    return last if error else None


def execution_facts(profile: str, seconds: float) -> dict[str, Any]:
    """What a page says of its making: never where, or by whom."""
    return {
        "profile": profile,
        "date": f"{datetime.now():%d %B %Y}".lstrip("0"),
        "seconds": seconds,
        "python": platform.python_version(),
        "packages": {"torch": version("torch").split("+")[0]},
        "cores": cores(),
    }


def write_page(job: Job, notebook: Any) -> None:
    """Write the page of an executed notebook."""
    from annealed_core import pages

    html = pages.render_page(notebook, job.stem, job.titles, job.notebooks)
    replace_file(job.out / f"{job.stem}.html", html.encode())


def start_workers(number: int) -> ProcessPoolExecutor:
    """Processes to execute notebooks in, which share the cores between them."""
    return ProcessPoolExecutor(number, get_context("spawn"), _prepare_worker, (max(1, cores() // number),))


def execute_all(jobs: Sequence[Job], pool: ProcessPoolExecutor, with_pages: bool = True) -> Iterator[Outcome]:
    """Execute notebooks, the summary after all others; outcomes come in the order of ending."""
    for is_last in (False, True):
        futures = {pool.submit(execute, job, with_pages): job for job in jobs if (job.stem == LAST) == is_last}
        for future in as_completed(futures):
            try:
                yield future.result()
            except Exception as problem:  # one notebook must not take the others with it
                stem = futures[future].stem
                yield Outcome(stem, 0.0, f"{stem}: {type(problem).__name__}: {_one_line(problem)}")


def clean(notebook: Any) -> Any:
    """An executed notebook as it is committed: outputs, and nothing that differs between machines or moments."""
    kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata = type(notebook)({"kernelspec": kernelspec, "language_info": {"name": "python"}})
    count = 0
    for cell in notebook.cells:
        for key in ("papermill", "execution", "lines_to_next_cell"):
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
            for found in (PASSING.search(text) for text in texts):
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

    cleaned: dict[Path, str] = {}
    figures: dict[Path, bytes] = {}
    for job in jobs:
        try:
            notebook = clean(nbformat.read(job.executed, as_version=4))
        except ReportError as error:
            raise ReportError(f"{job.stem}: {error}") from None
        nbformat.validate(notebook)
        lines = nbformat.v4.rwbase.split_lines(notebook)
        cleaned[job.notebooks / f"{job.stem}.ipynb"] = (
            json.dumps(lines, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        )
        figures |= {job.notebooks / f"{job.stem}.png": png for png in readme_figures(notebook)}
    for path, text in cleaned.items():
        replace_file(path, text.encode())
    for path, png in figures.items():
        path.write_bytes(png)


def readme_figures(notebook: Any) -> list[bytes]:
    """The images of cells tagged `readme`, which the README shows."""
    outputs = [o for cell in notebook.cells if "readme" in cell.metadata.get("tags", []) for o in cell.outputs]
    return [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def write_index(profile: Profile, job: Job) -> Path:
    """Write the first page of the report that `job` belongs to."""
    from annealed_core import pages  # in a worker, which has it loaded

    index = job.out / "index.html"
    executed = job.out / "notebooks"
    html = pages.render_index(executed, job.titles, profile.name, profile.description, job.notebooks)
    replace_file(index, html.encode())
    return index
