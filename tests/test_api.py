"""The examples in docstrings run as they stand, and pages are made of them."""

import ast
import doctest
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch

import annealed_core
import annealed_report.parameters
from annealed_core import ENERGIES, Chain, DiagonalGaussian, Gated, ais, dais, smc, vae

ROOT = Path(__file__).parents[1]
EXAMPLES = {}
for path in sorted((ROOT / "annealed_core").glob("*.py")):
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    for number, block in enumerate(re.findall(r"(?:^|\n\n)((?:    .*(?:\n|$))+)", said)):
        EXAMPLES[f"{path.stem} {number}"] = textwrap.dedent(block)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_module_runs(store, name):
    """What it does not make itself is a chain of two kernels on energy D, and four images."""
    example = EXAMPLES[name]
    for long in ("steps=3000", "objective=AVO()", "batch=36"):
        example = example.replace(long, "steps=3" if "steps" in long else f"{long}, steps=3")
    base = DiagonalGaussian.isotropic(2)
    given = {
        **vars(dais),
        **vars(smc),
        **vars(vae),
        **vars(annealed_core),
        "ais": partial(ais.ais, n_particles=50, n_temperatures=5),
        "base": base,
    }
    given |= {"chain": Chain(base, Gated(8).build(2, 2)), "target": ENERGIES["D"], "x": torch.zeros(4, 784)}
    exec(compile(example, name, "exec"), given)


def test_there_are_examples():
    assert len(EXAMPLES) >= 8
    assert (
        doctest.testmod(annealed_report.parameters).attempted > 0 == doctest.testmod(annealed_report.parameters).failed
    )


def test_pages_are_made_of_the_docstrings(tmp_path):
    pytest.importorskip("pdoc")
    subprocess.run(["make", "api", f"PY={sys.executable}", f"API={tmp_path}"], check=True, cwd=ROOT)
    page = (tmp_path / "annealed_core.html").read_text()
    assert all(name in page for name in annealed_core.__all__)
    assert "trajectory" in (tmp_path / "annealed_core" / "chain.html").read_text()
