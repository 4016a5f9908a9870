"""`tiltjax demo` from its command line: the table, the figure, and a message for what is wrong.

Tier: statistical (the table), exact (files and messages).
"""

import re

import pytest

import tiltjax as tj
from tiltjax.cli import main

METHODS = [
    "no guidance",
    "exact h",
    "Tilted",
    "plug-in, k = 1",
    "plug-in, k = 8",
    "best of 4",
    "damped, k = 1",
    "damped best of 4",
    "Laplace",
    "DPS",
    "FMRG",
]


@pytest.mark.slow
def test_the_table_has_every_method_and_the_figure_is_written(tmp_path, capsys):
    figure = tmp_path / "tilt.png"
    assert main(["demo", "--num", "200", "--steps", "20", "--output", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    rows = {
        name: re.search(
            rf"^{re.escape(name)} +(-?[\d.]+)±([\d.]+) +(\S+) +([\d.]+) +(\S+)", out, re.MULTILINE
        )
        for name in METHODS
    }
    assert all(rows.values()), out
    distance = {name: float(row[4]) for name, row in rows.items()}
    assert (
        max(distance["exact h"], distance["Tilted"])
        < distance["damped, k = 1"] + 0.1
        < distance["plug-in, k = 1"]
    )
    # The tilt's mean reward is -1.031; two hundred exact samples know it to their standard error.
    for name in ("exact h", "Tilted"):
        assert abs(float(rows[name][1]) + 1.031) < 5 * float(rows[name][2])
        assert rows[name][3] == "-1.031"
    assert "log Z = -10.7613" in out


@pytest.mark.slow
def test_a_problem_without_closed_forms_shows_dashes(tmp_path, capsys):
    figure = tmp_path / "tilt.svg"
    options = {"--problem": "step", "--num": "50", "--steps": "5", "--seed": "3"}
    options |= {"--output": str(figure)}
    assert main(["demo", *(word for option in options.items() for word in option)]) == 0
    out = capsys.readouterr().out
    assert "Tilted" not in out
    assert re.search(r"^plug-in, k = 1 .* - .* - .* - ", out, re.MULTILINE)
    assert "<svg" in figure.read_text()


def test_list_names_every_problem(capsys):
    assert main(["demo", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\w", out, re.MULTILINE) for name in tj.problems.NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "nothing"], "unknown problem 'nothing': choose one of gaussian, quadratic"),
        (["--scale", "inf"], "scale must be finite"),
        (["--output", "nowhere/tilt.png"], "folder 'nowhere' does not exist"),
        (["--output", "tilt.txt"], r"must end in .png, .pdf or .svg"),
    ],
)
def test_a_wrong_argument_gets_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("tiltjax: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
