"""The report: what is refused, how notebooks are executed and kept, and what their pages must be."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import IPython
import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from annealed_report import ParameterError, ReportError, check_parameters, execution, pages, planning, search
from annealed_report.__main__ import main
from annealed_report.markdown import load_bibliography
from annealed_report.pagecheck import check_pages
from annealed_report.pages import render_page
from annealed_report.parameters import Parameter, check_values, read_parameters

ROOT = Path(__file__).parent.parent
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BIBLIOGRAPHY = """@inproceedings{huang2018, author = {Huang, Chin-Wei and Tan, Shawn}, year = {2018},
  title = {Improving {Explorability}}, booktitle = {NeurIPS}, eprint = {1809.01818}}
@article{unused1999, author = {Nobody, Ann}, title = {Never cited}, year = {1999}}
"""
SHOW = f"""# plotting helpers
from IPython.display import display
def show(alt, caption):
    image = {{"image/png": "{PIXEL}", "text/plain": "a figure"}}
    display(image, raw=True, metadata={{"image/png": {{"alt": alt}}}})
    display({{"text/markdown": caption, "text/plain": caption}}, raw=True, metadata={{"annealed": "caption"}})
def tabulate(table, caption):
    display({{"text/markdown": caption}}, raw=True, metadata={{"annealed": "table-caption"}})
    display({{"text/markdown": table}}, raw=True)"""
THEORY = r"""## The bound on $\log Z$

It follows from Jensen, $\log Z \ge \mathbb{E}_q[\log f - \log q]$, as
<cite data-cite="huang2018">Huang et al. (2018)</cite> say;
compare [the toys](02_toys.ipynb#What-fails) and [the toys' start](02_toys.ipynb).

\begin{align} a &= b \\ c &= d \end{align}

Five dollars, \$5, and `"$code$"` are no mathematics.

```python
price = "$1 and $2"
```"""


def in_browser(test):
    """For tests that open pages in Chromium, where there is one."""
    return pytest.mark.browser(pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")(test))


def code(source: str, *tags: str) -> nbformat.NotebookNode:
    return new_code_cell(source, metadata={"tags": list(tags)})


def write_notebook(path: Path, *cells: nbformat.NotebookNode) -> None:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=list(cells), metadata={"kernelspec": kernel}), path)


def make_project(folder: Path) -> Path:
    """Three small notebooks, of which one fails, with profiles and a bibliography."""
    notebooks, profiles = folder / "notebooks", folder / "profiles"
    notebooks.mkdir(parents=True)
    profiles.mkdir()
    (notebooks / "references.bib").write_text(BIBLIOGRAPHY)
    quick = "description: two seeds\n02_toys: {steps: 7}\n01_theory: {lr: 1e-2, targets: [C]}\n"
    (profiles / "quick.yaml").write_text(quick)
    (profiles / "full.yaml").write_text("description: everything\n")
    write_notebook(
        notebooks / "00_summary.ipynb",
        new_markdown_cell("# Summary\n\nWhat was claimed."),
        code("from pathlib import Path\nprint('toys ran first:', Path('../trace').exists())"),
        code(SHOW, "hide"),
        code("tabulate('| claim |\\n|---|\\n| [$a > b$ holds](01_theory.ipynb) |', 'Claims.')", "claims", "index"),
    )
    write_notebook(
        notebooks / "01_theory.ipynb",
        new_markdown_cell("# Theory of *chains*\n\nA first paragraph with $x$."),
        code("seeds = [\n    0,\n]  # runs\nlr = 1e-3  # learning rate\ntargets = ['D']  # which", "parameters"),
        code("from annealed_report import check_parameters\ncheck_parameters()", "hide"),
        new_markdown_cell(THEORY),
        code(SHOW, "fold"),
        code("show('a dot', r'The path $f_t$.')"),
        code("show('another dot', 'The same again.')\ntabulate('| a | b |\\n|---|---:|\\n| 1 | 2 |', 'Two numbers.')"),
        code("import os\nprint('progress', os.environ['ANNEALED_PROGRESS'], seeds, lr, targets)"),
    )
    write_notebook(
        notebooks / "02_toys.ipynb",
        new_markdown_cell("# Toys\n\nBriefly."),
        code("seeds = [0, 1]  # seeds\nsteps = 100  # training steps", "parameters"),
        code("from pathlib import Path\nPath('../trace').touch()"),
        code("import atexit, os\natexit.register(os.write, 2, b'the kernel ends noisily')", "hide"),
        new_markdown_cell("## What fails\n\nThis does."),
        code("def train():\n    raise RuntimeError('the chain\\ndiverged at step 3')\ntrain()"),
        new_markdown_cell("The end."),
    )
    return folder


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "annealed_report", *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = make_project(tmp_path_factory.mktemp("a {project}"))
    result = command(folder)
    out = folder / "build/report/quick"
    soups = {path.stem: BeautifulSoup(path.read_text(), "html.parser") for path in out.glob("*.html")}
    return SimpleNamespace(folder=folder, result=result, pages=out, soups=soups)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_project(tmp_path / "project"))
    return Path.cwd()


# ---- what is refused before anything runs

PROFILE, BIB = "profiles/quick.yaml", "notebooks/references.bib"
#: What is said, with which arguments, where which file is another one.
REFUSALS = {
    "unknown profile 'quik': choose one of full, quick": ["--profile", "quik"],
    "unknown notebook '01_thery': did you mean '01_theory'?": ["01_thery"],
    "02_toys: unknown parameter 'stps': did you mean 'steps'? it takes seeds, steps": ["--set", "02_toys.stps=3"],
    "00_summary: unknown parameter 'x': the notebook takes no parameters": ["--set", "00_summary.x=3"],
    "02_toys: steps takes a value like 100, got True": ["--set", "02_toys.steps=true"],
    "02_toys: impossible steps 99999999999": ["--set", f"02_toys.steps={10**20 - 1}"],
    "cannot read the value '[': write it as in a profile": ["--set", "02_toys.seeds=["],
    "--set takes notebook.name=value": ["--set", "lr=3"],
    "argument --jobs: takes a number of notebooks from 1, got 0": ["--jobs", "0"],
    "/proc/x: ": ["--out", "/proc/x"],
    "unknown cluster 'slrum': choose slurm, or the address of a Dask scheduler": ["--cluster", "slrum"],
    "unknown device 'gpu': choose cpu or cuda": ["--device", "gpu"],
    "profile 'quick': section '01_teory' names no notebook: did you mean '01_theory'?": {PROFILE: "01_teory: {}"},
    "profile 'quick': section '01_theory' takes names and values, got 3": {PROFILE: "01_theory: 3"},
    "profile 'quick': '02_toys' stands there 2 times": {PROFILE: "02_toys: {}\n01_theory: {}\n02_toys: {}"},
    "profile 'quick': 'lr' stands there 2 times": {PROFILE: "01_theory: {lr: 1, lr: 2}"},
    "profile 'quick' is not YAML: ": {PROFILE: "01_theory: {lr: [}"},
    "profile 'quick': it takes a section for each notebook, got [1]": {PROFILE: "- 1"},
    "01_theory: unknown citation 'huang2018': did you mean 'hunag2018'? references": {
        BIB: "@misc{hunag2018, title={A}}"
    },
    "references.bib is not BibTeX: ": {BIB: "@book{a, title = "},
    "01_theory.ipynb is not a notebook": {"notebooks/01_theory.ipynb": "<<<<<<<"},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_impossible_requests_are_refused_in_one_line_before_anything_is_executed(message, project, capsys, monkeypatch):
    monkeypatch.setattr(execution, "_execute", lambda *_, **__: pytest.fail("something was executed"))
    arguments = REFUSALS[message]
    if isinstance(arguments, dict):
        for name, text in arguments.items():
            (project / name).write_text(text)
    try:
        status = main([] if isinstance(arguments, dict) else arguments)
    except SystemExit as error:  # argparse
        status = error.code
    said = capsys.readouterr().err
    assert status == 2 and said.startswith(f"annealed: {message}") and said.count("\n") == 1
    assert not Path("build").exists()


def test_an_environment_without_what_a_report_needs_is_told_in_one_line(project):
    hide = "import sys; sys.modules.update(torch=None, annealed_core=None); sys.argv[1:] = []; import runpy; "
    words = [sys.executable, "-c", hide + "runpy.run_module('annealed_report', run_name='__main__')"]
    result = subprocess.run(words, cwd=project, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"annealed: {sys.executable} lacks torch: pip install 'annealed_core[report]'\n"


def test_parameters_are_read_with_their_help():
    assert read_parameters("lr = 1e-3  # rate\nnames = [\n    'ä',\n]  # which\nother = f(3)\n") == {
        "lr": Parameter(0.001, "1e-3", "rate"),
        "names": Parameter(["ä"], "['ä']", "which"),
        "other": Parameter(None, "f(3)"),
    }
    assert read_parameters("%matplotlib inline") == {}


@pytest.mark.parametrize(
    ("written", "value", "message"),
    [
        ("seeds = [0]", [1.5], "seeds takes a value like [0], got [1.5]"),
        ("seeds = [0]", [0, -1], "impossible seeds [0, -1]: seeds takes different ones, each a whole number from 0"),
        ("seeds = [0]", [1, 1], "impossible seeds [1, 1]: seeds takes different ones"),
        ("seeds = [0]", [], "impossible seeds []: "),
        ("lr = 1e-3", -0.001, "impossible lr -0.001: lr takes a number above 0"),
        ("targets = ['D']", ["G"], "impossible targets ['G']: targets takes different ones, each one of A, B, C"),
        ("studies = []", [["live"]], "impossible studies [['live']]: "),  # whose default tells no type
        ("steps = f(3)", "live", "impossible steps 'live': "),
    ],
)
def test_values_of_another_type_and_impossible_ones_are_refused(written, value, message):
    name = written.partition(" ")[0]
    with pytest.raises(ParameterError, match=re.escape(message)):
        check_values(read_parameters(written), {name: value})


def test_the_profile_orders_the_notebooks_and_the_summary_comes_last(project):
    folders = Path("notebooks"), Path("profiles"), Path("build")
    jobs = planning.plan(*folders, "quick", settings=["01_theory.lr=1e-4"])
    assert [job.stem for job in jobs] == ["02_toys", "01_theory", "00_summary"]
    assert [job.parameters for job in jobs] == [{"steps": 7}, {"lr": 1e-4, "targets": ["C"]}, {}]
    jobs = planning.plan(*folders, "full", ["00_summary", "02_toys"])
    assert [(job.stem, job.parameters) for job in jobs] == [("02_toys", {}), ("00_summary", {})]
    assert list(jobs[0].titles) == ["00_summary", "01_theory", "02_toys"]


@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml")))
def test_every_profile_fits_the_notebooks(profile, tmp_path):
    assert planning.plan(ROOT / "notebooks", ROOT / "profiles", tmp_path, profile)


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        (["# Parameters\nlerning_rate = 1\n"], "unknown parameter 'lerning_rate': it takes lr, seeds"),
        (["# Parameters\nlr = -1.0\n"], "impossible lr -1.0: lr takes a number above 0"),
        ([], "impossible lr 0.0: lr takes a number above 0"),  # changed by hand
    ],
)
def test_parameters_are_checked_inside_the_notebook(injected, message, monkeypatch):
    check_parameters()  # outside IPython nothing happens
    user_ns = {"In": ["", "seeds = 2  # runs\nlr = 1e-3", *injected, "check_parameters()"], "seeds": 3, "lr": 0.0}
    exec("".join(injected), user_ns)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(user_ns=user_ns))
    with pytest.raises(ParameterError) as caught:
        check_parameters()
    assert caught.value._render_traceback_() == [f"ParameterError: {message}"]


# ---- execution


def test_a_failing_cell_fails_the_command_and_the_others_run_to_their_end(built):
    assert built.result.returncode == 1
    line = "annealed: 02_toys: code cell 4 failed: RuntimeError: the chain diverged at step 3\n"
    assert built.result.stderr == line  # and nothing of what a kernel says when it ends
    assert sorted(built.soups) == ["00_summary", "01_theory", "02_toys", "index"]
    assert "toys ran first: True" in built.soups["00_summary"].get_text()


def test_what_has_not_changed_is_not_executed_again_unless_one_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "digest_of_code", lambda: "some code")
    count = "with open('../count', 'a') as file:\n    written = file.write('{}')"
    Path("notebooks").mkdir()
    write_notebook(Path("notebooks/01_well.ipynb"), code("seeds = [0]", "parameters"), code(count.format("w")))
    write_notebook(Path("notebooks/02_badly.ipynb"), code(count.format("b")), code("1 / 0"))
    Path("profiles").mkdir()
    Path("profiles/quick.yaml").touch()

    def executed(*arguments: str) -> str:
        """Which notebooks were executed: well, badly."""
        Path("count").write_text("")
        assert main(arguments) == 1
        return "".join(sorted(Path("count").read_text()))

    assert executed() == "bw"
    page = Path("build/report/quick/01_well.html")
    page.unlink()
    assert executed() == "b" and page.exists()
    assert re.search(r"01_well .* s  as before\n", capsys.readouterr().out)
    assert executed("--set", "01_well.seeds=[3]") == executed("--force") == "bw"
    monkeypatch.setattr(planning, "digest_of_code", lambda: "other code")
    assert executed() == "bw"
    monkeypatch.setenv("ANNEALED_RECORD", "1")
    assert executed() == "bw"


def test_the_digest_of_the_code_changes_with_committed_results(tmp_path, monkeypatch):
    monkeypatch.setenv("ANNEALED_RESULTS", str(tmp_path))
    before = planning.digest_of_code()
    assert planning.digest_of_code() == before
    (tmp_path / "full.json").write_text("[]")
    assert planning.digest_of_code() != before


def test_the_page_of_a_failing_notebook_says_where_it_stopped(built):
    page = built.soups["02_toys"]
    assert "code cell 4: RuntimeError: the chain diverged at step 3" in page.select_one(".banner").get_text()
    assert page.select_one(".banner a")["href"] == "#cell-4" and page.select_one("#cell-4 .error") is not None
    assert "papermill" not in page.select_one("main").get_text()
    assert "stopped at code cell 4" in built.soups["index"].get_text()


def test_parameters_reach_the_notebook_and_its_page(built):
    page = built.soups["01_theory"]
    assert "progress 0 [0] 0.01 ['C']" in page.get_text()
    rows = [[cell.get_text(" ", strip=True) for cell in row.select("td")] for row in page.select(".parameters tr")]
    assert rows[1:] == [
        ["seeds", "[0]", "runs"],
        ["lr", "0.01 default 1e-3", "learning rate"],
        ["targets", "['C'] default ['D']", "which"],
    ]


def test_nothing_half_written_and_no_machine_path_is_left_behind(built):
    files = {path.name for path in built.pages.rglob("*") if path.is_file()}
    stems = ("00_summary", "01_theory", "02_toys")
    assert files == {"index.html", *(f"{s}.html" for s in stems), *(f"{s}.ipynb" for s in stems)}
    for stem in ("00_summary", "01_theory", "index"):
        assert str(built.folder) not in (built.pages / f"{stem}.html").read_text()


def one_notebook(folder: Path, source: str) -> Path:
    """A project of one notebook with one cell and no metadata."""
    (folder / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=[new_code_cell(source)]), folder / "notebooks/01_ä.ipynb")
    (folder / "profiles").mkdir()
    (folder / "profiles" / "quick.yaml").write_text("")
    return folder


def test_a_kernel_that_crashes_is_named_and_what_was_said_of_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # a terminal that knows no other letters gets them escaped
    result = command(one_notebook(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"))
    *words, line = result.stderr.splitlines()
    assert result.returncode == 1 and r"01_\xe4" in result.stdout
    assert line.startswith(r"annealed: 01_\xe4: code cell 1 failed: DeadKernelError: ")
    assert any("died" in word for word in words)


def test_an_interrupt_ends_the_command_and_its_kernels_at_once(tmp_path):
    source = "import os, pathlib, time\npathlib.Path('../pid').write_text(str(os.getpid()))\ntime.sleep(3600)"
    words, folder = [sys.executable, "-m", "annealed_report"], one_notebook(tmp_path, source)
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=LONG)[1].startswith("annealed: interrupted")
    assert process.returncode == 130
    wait_until(lambda: has_ended(pid.read_text()))


LONG = 300  # seconds: more than a crowded machine needs, much less than the notebook would sleep


def wait_until(condition) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_ended(pid: str) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()  # nobody may have asked how it ended
    except OSError:
        return True


# ---- pages


def page_of(tmp_path: Path, *cells: nbformat.NotebookNode) -> BeautifulSoup:
    return BeautifulSoup(render_page(new_notebook(cells=list(cells)), "a", {"a": "A"}, tmp_path), "html.parser")


def with_outputs(source: str, *outputs: nbformat.NotebookNode, tags: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    return new_code_cell(source, metadata={"tags": list(tags)}, outputs=list(outputs))


def test_figures_and_tables_are_joined_with_their_captions_and_numbered(built):
    page = built.soups["01_theory"]
    captions = [caption.get_text() for caption in page.select("figure > figcaption > b")]
    assert captions == ["Figure 1.", "Figure 2.", "Table 1."]
    first = page.select_one("#figure-1")
    assert first.img["alt"] == "a dot" and first.img["src"].startswith("data:image/png;base64,")
    assert first.select_one("figcaption .math").get_text() == "$f_t$"
    assert page.select_one("#table-1 table td[style*=right]") is not None


def test_citations_lead_to_the_entries_that_the_page_cites(built):
    page = built.soups["01_theory"]
    assert page.select_one("cite a")["href"] == "#ref-huang2018"
    (entry,) = page.select(".references li")
    text = "C.-W. Huang and S. Tan. Improving Explorability. In NeurIPS. 2018. arXiv:1809.01818."
    assert entry["id"] == "ref-huang2018" and " ".join(entry.get_text().split()) == text
    assert entry.a["href"] == "https://arxiv.org/abs/1809.01818"
    assert built.soups["00_summary"].select_one(".references") is None


def test_every_entry_of_the_bibliography_can_be_shown(tmp_path):
    shutil.copy(ROOT / "notebooks/references.bib", tmp_path)
    keys = list(load_bibliography(tmp_path / "references.bib").entries)
    page = page_of(tmp_path, new_markdown_cell(f'<cite data-cite="{",".join(keys)}">all</cite>'))
    assert sorted(entry["id"] for entry in page.select(".references li")) == sorted(f"ref-{key}" for key in keys)


def test_links_between_notebooks_become_links_between_pages(built):
    page = built.soups["01_theory"]
    assert [link["href"] for link in page.select(".prose a[href^='02']")] == ["02_toys.html#What-fails", "02_toys.html"]
    assert built.soups["02_toys"].select_one("h2#What-fails") is not None
    assert page.select_one("a[rel=prev]")["href"] == "00_summary.html"
    assert page.select_one("a[rel=next]")["href"] == "02_toys.html"
    assert [link["href"] for link in page.select(".toc a")][-1] == "#references"


def test_only_mathematics_is_marked_as_mathematics(built):
    page = built.soups["01_theory"]
    formulas = [formula.get_text() for formula in page.select(".prose .math")]
    bound, equations = r"$\log Z \ge \mathbb{E}_q[\log f - \log q]$", r"\begin{align*} a &= b \\ c &= d \end{align*}"
    assert formulas[1:] == [r"$\log Z$", bound, equations]
    assert "@font-face" in page.select_one("style").get_text()
    assert "@font-face" not in built.soups["02_toys"].select_one("style").get_text()


def test_code_is_folded_or_hidden_and_what_prepares_a_page_stands_at_its_end(built):
    page = built.soups["01_theory"]
    cells = [(cell.summary.get_text(), cell.has_attr("open")) for cell in page.select("details.code")]
    assert cells[0] == ("code: plotting helpers", False) and not any(is_open for _, is_open in cells)
    assert "check_parameters" not in page.select_one("main").get_text()
    heading = page.select_one("h2#How-this-was-run")
    assert heading.find_next(class_="parameters") is not None and heading.find_previous(class_="parameters") is None
    assert len(page.select(".parameters")) == 1 and not built.soups["00_summary"].select("h2#How-this-was-run")


def test_a_page_offers_all_pages_a_search_and_its_notebook(built):
    page = built.soups["01_theory"]
    links = {link["href"]: link.get("aria-current") for link in page.select(".menu a")}
    assert links == {"00_summary.html": None, "01_theory.html": "page", "02_toys.html": None}
    assert page.select_one("form[role=search]")["action"] == "index.html"
    assert page.select_one("a[download]")["href"] == "notebooks/01_theory.ipynb"
    assert page.select_one(page.select_one(".skip")["href"]).name == "main"


def test_the_index_knows_the_words_of_every_section(built):
    sections = json.loads(built.soups["index"].select_one("#sections").get_text())
    found = {(each["page"], each["anchor"]): each for each in sections}
    assert set(found) == {
        *(("00_summary", ""), ("01_theory", ""), ("01_theory", r"The-bound-on-$\log-Z$")),
        *(("02_toys", ""), ("02_toys", "What-fails")),
    }
    assert found["02_toys", "What-fails"]["text"].startswith("This does. The end.")
    assert "Jensen" in found["01_theory", r"The-bound-on-$\log-Z$"]["text"]
    assert search.as_json([{"text": "</script>"}]) == r'[{"text": "\u003c/script>"}]'


def test_the_index_has_a_card_for_each_notebook_and_the_answer(built):
    index = built.soups["index"]
    assert [card.h2.get_text() for card in index.select(".card")] == ["All claims", "Theory of chains", "Toys"]
    assert not index.select(".hero")  # the page on toys has no picture
    assert index.select(".card")[1].img["alt"] == "a dot"
    assert "A first paragraph with" in index.select(".card")[1].get_text()
    assert index.select_one(".answer a")["href"] == "01_theory.html"
    assert "two seeds" in index.get_text()


def test_the_index_shows_the_first_picture_of_the_page_on_energies(built, monkeypatch):
    monkeypatch.setattr(pages, "HERO", "01")
    titles = {"01_theory": "Theory", "02_toys": "Toys"}
    index = BeautifulSoup(
        pages.render_index(built.pages / "notebooks", titles, "quick", "", built.folder), "html.parser"
    )
    assert index.select_one(".hero img")["alt"] == "a dot"


def test_of_what_is_printed_only_the_states_of_a_progress_bar_are_lost(tmp_path):
    printed = ["alpha\r\nbeta", "1/2\r2/2\r\x1b[31mdone\x1b[0m\n", "a < b & c"]
    cells = [with_outputs("work()", new_output("stream", name="stdout", text=text)) for text in printed]
    shown = [output.get_text() for output in page_of(tmp_path, *cells).select("pre.output")]
    assert shown == ["alpha\r\nbeta", "done", "a < b & c"]


def test_stderr_and_widgets_do_not_show(tmp_path):
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "HBox()"}
    table = {"text/html": "<style>td {}</style><table><td>1</td></table>"}
    said = new_output("stream", name="stderr", text="  0%|   |")
    displayed = [new_output("display_data", data=data) for data in (widget, table)]
    page = page_of(tmp_path, with_outputs("work()", said, *displayed))
    assert page.select_one(".stderr").has_attr("hidden") and page.select_one(".html td").get_text() == "1"
    assert "HBox" not in page.get_text() and "td {}" not in page.get_text()


def test_a_cell_that_is_to_be_read_starts_unfolded(tmp_path):
    cells = (new_code_cell("1 + 1", metadata={"tags": tags}) for tags in ([], ["show"]))
    assert [each.has_attr("data-shown") for each in page_of(tmp_path, *cells).select("details.code")] == [False, True]


def test_a_cell_says_what_it_makes(tmp_path):
    sources = ["plotting.table(1)", "plotting.table(1)\nplotting.show(2)", "# so\n1", "x"]
    labels = page_of(tmp_path, *map(new_code_cell, sources)).select("details.code summary")
    assert [label.get_text() for label in labels] == ["code: table", "code: plotting", "code: so", "code"]


def test_a_hidden_cell_shows_when_it_fails(tmp_path):
    error = new_output("error", ename="ParameterError", evalue="unknown", traceback=["ParameterError: unknown"])
    page = page_of(tmp_path, with_outputs("check_parameters()", error, tags=("hide",)))
    assert "ParameterError: unknown" in page.select_one(".error").get_text()


def test_repeated_headings_get_anchors_of_their_own(tmp_path):
    page = page_of(tmp_path, new_markdown_cell("# A\n## The $x$ part\n"), new_markdown_cell("## The $x$ part"))
    assert [heading["id"] for heading in page.select("h2")] == ["The-$x$-part", "The-$x$-part-2"]


ATTACK = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> [b](javascript:x)"
QUOTED = "\"><script>document.title = 'taken'</script>"


def attacked(tmp_path: Path) -> str:
    """A page whose every part tries to run a script."""
    outputs = [
        new_output("display_data", data={"image/png": PIXEL}, metadata={"image/png": {"alt": QUOTED}}),
        new_output("display_data", data={"text/markdown": ATTACK}, metadata={"annealed": "caption"}),
        new_output("display_data", data={"text/html": ATTACK}),
        new_output("display_data", data={"image/png": QUOTED}),
        new_output("stream", name="stdout", text=QUOTED),
        new_output("error", ename=QUOTED, evalue=QUOTED, traceback=[QUOTED]),
    ]
    prose = new_markdown_cell(f"# A\n{ATTACK}\n\n## {ATTACK}\n\n$x$")
    cells = [prose, code(f"seeds = 2  # {ATTACK}", "parameters"), with_outputs(f"# {QUOTED}", *outputs)]
    facts = {"profile": QUOTED, "date": QUOTED, "seconds": 1, "python": QUOTED, "packages": {QUOTED: QUOTED}}
    facts |= {"cores": QUOTED, "failure": {"cell": 1, "error": QUOTED}}
    notebook = new_notebook(cells=cells, metadata={"annealed": facts})
    return render_page(notebook, "a", {"a": f"A {QUOTED}"}, tmp_path)


def test_nothing_that_a_notebook_says_can_run_in_its_page(tmp_path):
    page = BeautifulSoup(attacked(tmp_path), "html.parser")
    assert len(page.select("script")) == 1
    for tag in page.find_all(True):
        assert not [name for name in tag.attrs if name.startswith("on")], tag
        assert not str(tag.get("href", "")).startswith("javascript:"), tag
    policy = page.select_one("meta[http-equiv]")["content"]
    assert re.search(r"script-src 'sha256-[\w+/]{43}='$", policy)


# ---- the check of the pages


def test_the_check_finds_nothing_but_the_failure_in_these_pages(built, capsys):
    problems = check_pages(built.pages)
    assert problems
    assert all(problem.startswith("02_toys.html: error in a cell") for problem in problems)
    assert (main(["--check", str(built.pages)]), capsys.readouterr().out.splitlines()) == (1, problems)


PLANTED = {
    '<script src="https://cdn.example/katex.js"></script>': "<script> loads https://cdn.example/katex.js",
    '<link rel="stylesheet" href="//cdn.example/a.css">': "<link> loads //cdn.example/a.css",
    '<style>@import "a.css"; p { background: url(https://x.example/y.png) }</style>': "style loads",
    '<p style="background: url(a.png)">': "style loads a.png",
    '<img src="data:,">': "image 1 has no alternative text",
    '<img src="a.png" alt="a">': "<img> loads a.png",
    '<a href="notebooks/02_toys.ipynb" download>': "download that is not there: notebooks/02_toys.ipynb",
    '<a href="02_toys.ipynb">': "link to a notebook: 02_toys.ipynb",
    '<a href="nowhere.html">': "link to a page that is not there: nowhere.html",
    '<form action="https://a.example/find"></form>': "form sends to https://a.example/find",
    '<a href="#nowhere">': "link to a section that is not there: #nowhere",
    "<p>$$ x $$</p>": "mathematics left as text: $$ x $$",
    r"<p>the rate \alpha</p>": r"mathematics left as text: the rate \alpha",
    '<span class="math">$x$</span>': "formulas, but no KaTeX to draw them",
    '<span class="katex-error">x</span>': "KaTeX cannot draw x",
    '<pre class="stderr" hidden>cell 1: warning</pre>': "stderr in cell 1: warning",
    '<cite data-cite="none2000">None</cite>': "unresolved citation none2000",
}


@pytest.mark.parametrize("html", PLANTED)
def test_the_check_finds_what_is_planted(html, tmp_path):
    (tmp_path / "index.html").write_text(f"<p id='a'>fine, <a href='#a'>here</a>, <code>$$</code></p>{html}")
    (problem, *_) = check_pages(tmp_path)
    assert problem.startswith(f"index.html: {PLANTED[html]}")


def test_the_check_misses_pages_that_should_be_there(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/01_theory.ipynb").touch()
    assert check_pages(tmp_path) == ["01_theory.html: missing", "index.html: missing"]


# ---- outputs that are committed


def executed(text: str) -> nbformat.NotebookNode:
    outputs = [
        new_output("stream", name="stderr", text="warning"),
        new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}}),
        new_output("execute_result", data={"text/plain": text}, execution_count=7),
    ]
    about = {"papermill": {"duration": 1.0}, "tags": ["fold"]}
    cell = new_code_cell("x", execution_count=7, metadata=about, outputs=outputs)
    metadata = {"papermill": {"start_time": "now"}, "language_info": {"name": "python", "version": "3.11.7"}}
    return new_notebook(cells=[cell], metadata=metadata)


def test_stored_outputs_are_the_same_wherever_they_were_made():
    notebook = execution.clean(executed("1 m/s at 3/4/5, https://a.example/home/x"))
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    (cell,) = notebook.cells
    assert (cell.execution_count, cell.metadata) == (1, {"tags": ["fold"]})
    assert [(output.output_type, output.execution_count) for output in cell.outputs] == [("execute_result", 1)]


LOCAL = ["/".join(["", "home", "someone", "data"]), "saved in /tmp/x.pt", "C:\\Users\\x", "<object at 0x7f0123456789>"]


@pytest.mark.parametrize("text", LOCAL)
def test_outputs_that_are_true_of_one_machine_only_are_not_stored(text):
    with pytest.raises(ReportError, match="code cell 1 prints what is true of one machine only"):
        execution.clean(executed(text))


def test_outputs_are_stored_only_when_every_notebook_succeeds(project):
    before = {path: path.read_bytes() for path in (project / "notebooks").iterdir()}
    assert main(["--store-outputs", "02_toys", "00_summary"]) == 1
    assert {path: path.read_bytes() for path in (project / "notebooks").iterdir()} == before
    assert main(["--store-outputs", "00_summary"]) == 0
    stored = nbformat.read(project / "notebooks/00_summary.ipynb", as_version=4)
    assert [cell.execution_count for cell in stored.cells[1:]] == [1, 2, 3]
    assert stored.cells[1].outputs[0].text == "toys ran first: True\n"
    text = (project / "notebooks/00_summary.ipynb").read_text()
    assert text == nbformat.writes(stored) + "\n" and "injected" not in text


# ---- in a browser


def open_in_browser(page: Path, profile: Path, *more: str) -> tuple[BeautifulSoup, list[str]]:
    """The page as a browser without network draws it, and what its console says."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    options += ["--enable-logging=stderr", "--hide-scrollbars", "--virtual-time-budget=10000", "--dump-dom"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", *more, page.resolve().as_uri()]
    result = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120)
    console = [line for line in result.stderr.splitlines() if re.search(r"CONSOLE|ERR_|Refused", line)]
    return BeautifulSoup(result.stdout, "html.parser"), console


#: In a frame: its width where the page scrolls sideways, the smallest letters in pixels (formulas have their own), and
#: how many labels of cards reach beyond their cell; and how many figures the page's script has not reached.
MEASURE = """frame => {
    const page = frame.contentDocument, view = page.defaultView, seen = [];
    for (const each of page.body.querySelectorAll('*')) {
        const says = [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        if (says && !each.closest('.katex, script, style, [hidden], details:not([open]) > :not(summary)'))
            seen.push(parseFloat(view.getComputedStyle(each).fontSize));
    }
    const label = cell => parseFloat(view.getComputedStyle(cell, '::before').height) || 0;
    const beyond = [...page.querySelectorAll('table.cards td')].filter(cell => label(cell) > cell.offsetHeight);
    const unreached = page.querySelectorAll('figure.figure > img').length;
    return [page.documentElement.scrollWidth, Math.min(...seen), beyond.length, unreached];
}"""


WIDTHS = (390, 768, 1440)  # a phone, a tablet, a desk


def check_at_width(folder: Path, scratch: Path, width: int) -> None:
    names = sorted(page.name for page in folder.glob("*.html"))
    frame = f'<iframe style="width: {width}px; height: 800px; border: 0" src="{{}}"></iframe>'
    frames = "".join(frame.format((folder / name).resolve().as_uri()) for name in names)
    measured = f"JSON.stringify([...document.querySelectorAll('iframe')].map({MEASURE}))"
    script = f"<script>onload = () => {{ document.title = {measured} }}</script>"
    (scratch / "frames.html").write_text(f"<!DOCTYPE html>{frames}{script}")
    drawn, _ = open_in_browser(scratch / "frames.html", scratch, "--allow-file-access-from-files")
    for name, found in zip(names, json.loads(drawn.title.get_text()), strict=True):
        needed, smallest, beyond, unreached = found
        assert not unreached, f"the script of {name} has not run at {width}"
        assert needed == width, f"{name} scrolls sideways at {width} pixels"
        assert not beyond, f"{name} has labels that lie over others at {width}"
        assert smallest >= 11, f"{name} has letters of {smallest} pixels at {width}"


def check_drawn(folder: Path, scratch: Path) -> None:
    for path in sorted(folder.glob("*.html")):
        formulas = len(BeautifulSoup(path.read_text(), "html.parser").select(".math"))
        drawn, console = open_in_browser(path, scratch)
        assert not console, path.name
        assert len(drawn.select(".math > .katex, .math > .katex-display > .katex")) == formulas, path.name
        assert not drawn.select(".katex-error"), path.name
        assert all(image.get("alt") for image in drawn.select("img")), path.name


@in_browser
def test_a_browser_without_network_draws_every_formula_and_complains_of_nothing(built, tmp_path):
    check_drawn(built.pages, tmp_path)
    for width in WIDTHS:
        check_at_width(built.pages, tmp_path, width)


@in_browser
def test_a_browser_runs_the_script_of_a_page_and_nothing_that_its_notebook_says(tmp_path):
    (tmp_path / "a.html").write_text(attacked(tmp_path))
    drawn, _ = open_in_browser(tmp_path / "a.html", tmp_path / "profile")
    assert drawn.select(".math > .katex") and drawn.title.get_text() != "taken"
    planted = "<script>document.title = 'taken'</script></body>"
    (tmp_path / "a.html").write_text(attacked(tmp_path).replace("</body>", planted))
    drawn, console = open_in_browser(tmp_path / "a.html", tmp_path / "profile")
    assert drawn.title.get_text() != "taken" and any("Content Security Policy" in line for line in console)


# ---- the pages of the real report, once they have been built

PAGES = ROOT / os.environ.get("ANNEALED_PAGES", "")
needs_pages = pytest.mark.skipif(PAGES == ROOT, reason="ANNEALED_PAGES names no built report")


@needs_pages
def test_the_built_report_has_every_page_and_is_sound():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} <= {path.stem for path in PAGES.glob("*.html")}
    assert check_pages(PAGES) == []


@needs_pages
@in_browser
def test_a_browser_without_network_draws_the_built_report(tmp_path):
    check_drawn(PAGES, tmp_path)


@needs_pages
@in_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_the_built_report_fits_its_window(tmp_path, width):
    check_at_width(PAGES, tmp_path, width)
