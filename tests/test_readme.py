"""What the README tells a stranger to do works."""

import math
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_your_own_target_in_ten_lines(store, tmp_path):
    example = re.search(r"<!-- executed by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    script = tmp_path / "own_target.py"
    script.write_text(example + "\nassert z.shape == (1000, 2)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path)
    log_z, ess, total_variation = map(float, done.stdout.split())
    assert abs(log_z - math.log(math.pi / 2 * (1 + math.exp(-1)))) < 0.1
    assert 0.05 < ess <= 1 and 0 <= total_variation < 0.3


def test_links_and_commands_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z]+)", README)) - {"and"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
