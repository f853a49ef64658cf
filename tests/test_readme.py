"""What the README tells a stranger to do works, and its figures are those of the committed runs."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from annealed_report import answers
from annealed_report.claims import rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- executed by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)


def lines(example):
    return len([line for line in example.splitlines() if line.strip()])


def executed(example, store, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example)
    return subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path).stdout


def test_your_own_target_in_ten_lines(store, tmp_path):
    assert lines(EXAMPLES[0]) <= 10
    said = executed(EXAMPLES[0] + "\nassert z.shape == (1000, 2)\n", store, tmp_path)
    log_z, ess, total_variation = map(float, said.split())
    assert abs(log_z - math.log(math.pi / 2 * (1 + math.exp(-1)))) < 0.1
    assert 0.05 < ess <= 1 and 0 <= total_variation < 0.3


def test_an_own_kernel_and_an_own_objective_in_fifteen_lines(store, tmp_path):
    """The mean of D is (.4, .4): there the moved Gaussian's bound is highest."""
    assert lines(EXAMPLES[1]) <= 15
    by = executed(EXAMPLES[1] + "\nprint(*r.chain.kernels[0].by.tolist())\n", store, tmp_path)
    assert torch.tensor([float(each) for each in by.split()]).norm() > 0.1


def test_links_and_commands_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_answer_and_the_findings_are_those_of_the_claims():
    found = rows("full")
    assert answers.answer(found) in README
    without_links = re.sub(r" \(\[\d\d: .*?\]\(.*?\)\)\.$", ".", answers.findings(found), flags=re.MULTILINE)
    assert without_links in README


def test_every_page_is_linked():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in README


@pytest.mark.parametrize("old", re.findall(r"^\| `(Spec\(.*?\))`", README, re.MULTILINE))
def test_an_earlier_call_names_the_new_one(old):
    import annealed_core

    with pytest.raises(TypeError, match="write") as caught:
        eval(old, vars(annealed_core))
    new = re.search(r"write (.*); the README", str(caught.value))[1]
    assert eval(new, vars(annealed_core)).seed == 0
