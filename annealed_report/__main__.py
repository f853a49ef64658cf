"""The report: a profile's parameters go into the notebooks, papermill executes them, each becomes an HTML page.

    python -m annealed_report --profile quick                      # build/report/quick/index.html
    python -m annealed_report 02_toy_energies --set 02_toy_energies.steps=500
    python -m annealed_report --check build/report/quick           # what is wrong with built pages
    python -m annealed_report --store-outputs                      # execute notebooks/ and keep their outputs

Everything that can be refused is refused before anything is executed or written (exit code 2). A failing cell is exit
code 1: its page is written all the same, with the error in it, and the other notebooks run to their end. Notebooks
whose parameters, code and results are as they were when they were executed last are not executed again.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from annealed_report.parameters import ReportError

NEEDED = ("torch", "bs4", "nbconvert", "nbformat", "papermill", "pybtex", "yaml")


def build(arguments: argparse.Namespace) -> int:
    """Execute what the arguments ask for; return the exit code."""
    from annealed_report import execution, pages, planning  # late: what they need may be missing

    stored = arguments.store_outputs
    chosen = None if stored else arguments.profile, arguments.only, arguments.set
    jobs = planning.plan(arguments.notebooks, arguments.profiles, arguments.out, *chosen)
    at_once = min(arguments.jobs, len(jobs))
    print(f"annealed: {len(jobs)} notebooks with profile {jobs[0].profile}, {at_once} at a time", flush=True)
    errors = []
    force = arguments.force or bool(os.environ.get("ANNEALED_RECORD"))
    with closing(execution.execute_all(jobs, at_once, with_pages=not stored, force=force)) as outcomes:
        for outcome in outcomes:
            note = "  failed" if outcome.error else "  as before" if outcome.kept else ""
            print(f"  {outcome.stem:<24}{outcome.seconds:7.1f} s{note}", flush=True)
            errors += [outcome.error] if outcome.error else []
    if not stored:
        one, index = jobs[0], jobs[0].out / "index.html"
        page = pages.render_index(one.executed.parent, one.titles, one.profile, one.description, one.notebooks)
        execution.replace_file(index, page.encode())
        print(f"annealed: {os.path.relpath(index)}")
    for error in errors:
        print(f"annealed: {error}", file=sys.stderr)
    if stored and not errors:
        execution.store_outputs(jobs)
    return 1 if errors else 0


def choose_machines(cluster: str | None, device: str | None) -> None:
    """Have all kernels train on these; ReportError where there is no such cluster or device."""
    import torch

    from annealed_core.running.cluster import check_cluster
    from annealed_core.running.experiment import device_of

    try:
        if cluster:
            check_cluster(cluster)
            os.environ["ANNEALED_CLUSTER"] = cluster
        if device:
            os.environ["ANNEALED_DEVICE"] = device_of(device)
    except ValueError as error:
        raise ReportError(str(error)) from None
    if (device or "").startswith("cuda") and not cluster and not torch.cuda.is_available():
        raise ReportError(f"device {device!r} is not there: torch finds no GPU on this machine")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"annealed: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal that knows only ASCII
    parser = _Parser(prog="python -m annealed_report", description="Execute the notebooks and build the report.")
    add = parser.add_argument
    add("only", nargs="*", metavar="NOTEBOOK", help="restrict to these, such as 02_toy_energies")
    add("--profile", default="quick", help="a file in profiles/ (default: quick)")
    add("--set", action="append", default=[], metavar="NOTEBOOK.NAME=VALUE", help="another value for one parameter")
    add("--jobs", type=int, default=2, help="notebooks at a time (default: 2)")
    add("--cluster", help="train on a cluster: slurm, or the address of a Dask scheduler, tcp://host:8786")
    add("--device", help="train on cpu or cuda (default: cpu)")
    add("--force", action="store_true", help="execute also what is as it was when executed last")
    for name, default in {"notebooks": "notebooks", "profiles": "profiles", "out": "build/report"}.items():
        add(f"--{name}", type=Path, default=Path(default), help=f"folder (default: {default})")
    add("--store-outputs", action="store_true", help="execute with the notebooks' own values and keep the outputs")
    add("--check", type=Path, metavar="FOLDER", help="only check the pages that were built in this folder")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"argument --jobs: takes a number of notebooks from 1, got {arguments.jobs}")
    try:
        if missing := [name for name in NEEDED if find_spec(name) is None]:
            raise ReportError(f"{sys.executable} lacks {', '.join(missing)}: pip install 'annealed_core[report]'")
        if arguments.check:
            from annealed_report.pagecheck import check_pages

            problems = check_pages(arguments.check)
            print("\n".join(problems) or f"annealed: the pages in {arguments.check} are sound")
            return 1 if problems else 0
        choose_machines(arguments.cluster, arguments.device)
        return build(arguments)
    except ReportError as error:
        print(f"annealed: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"annealed: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("annealed: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if status == 130:
        os._exit(status)  # threads still wait for kernels, which end when they find this process gone
    sys.exit(status)
