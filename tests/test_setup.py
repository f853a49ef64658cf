"""Set-up: the lock has what the packages import, and make installs it once and into nothing of others."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def tracked() -> list[Path]:
    """Files of the repository; none where it is not a git checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    return [file for name in listed.stdout.decode().split("\0") if name and (file := ROOT / name).is_file()]


def locked() -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]
    return {canonicalize_name(r.name): r for r in requirements if r.marker is None or r.marker.evaluate()}


def declared(extra: str) -> list[Requirement]:
    lines = PROJECT["dependencies"] if extra == "" else PROJECT["optional-dependencies"][extra]
    return [r for r in map(Requirement, lines) if r.name != PROJECT["name"]]


def make(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user would: without what a `make test` around this test passes on."""
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PY", "VENV", "PYTHON", "PROFILE", "ARGS")
    environ = {name: value for name, value in os.environ.items() if name not in inherited}
    command = ["make", "--no-print-directory", *map(str, arguments)]
    environ |= {"LC_ALL": "C", **environment}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def fake_uv(tmp_path: Path) -> dict[str, str]:
    """An environment whose `uv` writes its arguments to `calls`, makes empty environments and installs nothing."""
    calls = tmp_path / "calls"
    script(
        tmp_path / "bin" / "uv",
        f'echo "$@" >> "{calls}"\n'
        'if [ "$1" = venv ]; then for last; do :; done; mkdir -p "$last/bin"; echo > "$last/bin/python"; fi\n'
        'if [ "$1" = pip ] && [ -n "$FAIL" ]; then exit 1; fi',
    )
    return {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("extra", ["", "report", "test"])
def test_the_lock_has_every_dependency_within_its_bounds(extra):
    lock = locked()
    for requirement in declared(extra):
        (pin,) = lock[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), f"{requirement}, locked: {pin}"


def imports(file: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        found |= {name.split(".")[0] for name in names}
    return found - sys.stdlib_module_names - {"", "annealed_core", "annealed_report"}


@pytest.mark.parametrize(("package", "extras"), [("annealed_core", [""]), ("annealed_report", ["", "report"])])
def test_what_a_package_imports_is_declared(package, extras):
    known = {canonicalize_name(r.name) for extra in extras for r in declared(extra)}
    providers = metadata.packages_distributions()
    for file in sorted((ROOT / package).rglob("*.py")):
        for imported in imports(file):
            owners = {canonicalize_name(owner) for owner in providers.get(imported, [imported])}
            assert owners & known, f"{file.relative_to(ROOT)} imports {imported}, which {extras} do not declare"


def test_the_lock_pins_versions_and_names_no_host_or_path():
    for line in LOCK.splitlines():
        assert "://" not in line and " @ " not in line and not line.startswith("-")
    assert all(len(requirement.specifier) == 1 for requirement in locked().values())


def test_conda_installs_the_very_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["--requirement requirements.lock", "--editable ."]
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip"}, "every other package is the lock's"
    (python,) = [entry.removeprefix("python=") for entry in conda if entry.startswith("python=")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)


def test_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = make()
    assert listed.returncode == 0 and listed.stderr == ""
    assert re.findall(r"^  (\w+) +\S", listed.stdout, re.MULTILINE) == phony[1].split()


def test_a_python_too_old_is_told_in_one_line(tmp_path):
    old = script(tmp_path / "python3.9", 'case "$*" in *version_info*) echo 309;; *) echo Python 3.9.18;; esac')
    for python in (old, tmp_path / "nonexistent"):
        result = make("setup", f"VENV={tmp_path / 'venv'}", PYTHON=str(python))
        assert result.returncode != 0 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert "needs Python 3.11 or newer" in line and str(python) in line
    assert not (tmp_path / "venv").exists()


def test_set_up_installs_the_lock_once_and_again_only_after_a_change(tmp_path, fake_uv):
    venv, calls = tmp_path / "venv", tmp_path / "calls"
    first = make("setup", f"VENV={venv}", **fake_uv)
    assert first.returncode == 0 and first.stdout.startswith("Installing") and first.stdout.count("\n") == 1
    installed = [line for line in calls.read_text().splitlines() if line.startswith("pip install")]
    assert "--requirement requirements.lock" in installed[0]
    assert "--no-deps --editable ." in installed[1]

    calls.unlink()
    assert "Nothing to be done" in make("setup", f"VENV={venv}", **fake_uv).stdout
    assert not calls.exists() or "pip" not in calls.read_text()

    os.utime(venv / ".annealed-installed", (0, 0))
    (venv / "mine").touch()
    assert make("setup", f"VENV={venv}", **fake_uv).returncode == 0
    assert "pip install" in calls.read_text() and (venv / "mine").exists()


def test_an_interrupted_set_up_is_made_anew_and_foreign_environments_are_kept(tmp_path, fake_uv):
    venv = tmp_path / "venv"
    assert make("setup", f"VENV={venv}", FAIL="1", **fake_uv).returncode != 0
    (venv / "half").touch()
    assert make("setup", f"VENV={venv}", **fake_uv).returncode == 0
    assert (venv / "bin" / "python").exists() and not (venv / "half").exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine").touch()
    for fail in ("1", ""):
        make("setup", f"VENV={foreign}", FAIL=fail, **fake_uv)
        assert (foreign / "mine").exists()


def test_with_an_active_environment_nothing_is_installed():
    commands = make("--dry-run", "report", "PY=python").stdout
    assert commands.strip() == "python -m annealed_report --profile quick"


def test_ci_runs_what_the_readme_tells():
    runner = ROOT / ".ci" / "run"
    assert runner.stat().st_mode & stat.S_IXUSR and "make test" in runner.read_text().splitlines()
    assert subprocess.run([shutil.which("bash") or "bash", "-n", runner]).returncode == 0


def test_a_clone_without_data_is_small():
    files = [file for file in tracked() if ROOT / "data" not in file.parents]
    if not files:
        pytest.skip("not a git checkout")
    assert sum(file.stat().st_size for file in files) <= 12_000_000
