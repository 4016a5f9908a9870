"""README's first snippet runs as it stands, and its distances come out as its comments say."""

import re
import subprocess
import sys
from pathlib import Path

from helpers import environment

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_snippet_runs_in_a_fresh_interpreter(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    snippet = next(block for block in blocks if "theory.plug_in_law" in block)
    run = subprocess.run(
        [sys.executable, "-c", snippet],
        env=environment.quick(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    naive, damped, better, tilted, best = (float(line) for line in run.stdout.split())
    assert naive > best > max(damped, better, tilted)
    assert tilted < 0.12  # the floor is .07 with a standard deviation of .01


def test_files_that_readme_links_to_exist():
    for name in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / name).exists(), name
