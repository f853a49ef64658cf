"""A wheel in clean environments: Python 3.11 to 3.13, the lowest and the newest torch; by `make stress` alone.

Linux is what this runs on; Windows and macOS are not tried.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_readme import EXAMPLES

ROOT = Path(__file__).parents[1]
#: The last Python that the lowest torch has a build for is 3.13.
LOWEST = next(
    line.removeprefix("torch>=")
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    if line.startswith("torch>=")
)
UV = [sys.executable, "-m", "uv"]


def uv(*arguments):
    return subprocess.run([*UV, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = uv("build", "--wheel", "--out-dir", folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("annealed_core-*.whl")
    return path


@pytest.mark.stress
@pytest.mark.parametrize("torch", [f"torch=={LOWEST}.*", "torch"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_readmes_example_runs_in_a_clean_environment(wheel, tmp_path, python, torch):
    made = uv("venv", "--quiet", "--python", python, tmp_path / "venv")
    if made.returncode:
        pytest.skip(f"no Python {python}: {made.stderr.strip().splitlines()[-1]}")
    binary = tmp_path / "venv" / "bin" / "python"
    installed = uv("pip", "install", "--quiet", "--python", binary, wheel, torch)
    assert installed.returncode == 0, installed.stderr
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[0])
    clean = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "ANNEALED_STORE": str(tmp_path / "runs")}
    ran = subprocess.run([binary, script], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert ran.returncode == 0 and abs(float(ran.stdout.split()[0]) - 0.765) < 0.1, ran.stderr
    missing = [binary, "-c", "from annealed_core import Mnist, run; run(Mnist(epochs=1))"]
    said = subprocess.run(missing, cwd=tmp_path, env=clean, capture_output=True, text=True).stderr.splitlines()[-1]
    assert "DataError" in said and "site-packages" not in said
