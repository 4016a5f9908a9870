"""README's code runs as it stands, and its first example prints what README says.

Tier: exact for the names, 0.05 for distances whose standard deviation is 0.01.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = README.read_text()
ROW = re.compile(r"^(\S.*?\S) +(\d+\.\d\d)$", re.MULTILINE)


@pytest.mark.slow
def test_the_code_runs_in_a_fresh_interpreter_and_prints_what_it_says(tmp_path):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    python = [i for i, (language, _) in enumerate(blocks) if language == "python"]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks[i][1] for i in python)],
        env=environment.quick(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    output = blocks[python[0] + 1][1]
    said, printed = (
        {name: float(distance) for name, distance in ROW.findall(text)}
        for text in (output, run.stdout)
    )
    assert len(said) == 6
    assert said.keys() == printed.keys()
    for name, distance in said.items():
        assert abs(printed[name] - distance) < 0.05, name


def test_readme_is_a_page():
    assert len(TEXT.splitlines()) <= 150


def test_files_that_readme_links_to_exist():
    for name in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (README.parent / name).exists(), name
