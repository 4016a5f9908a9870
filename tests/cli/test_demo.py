"""The demonstration from its command line: the table and the figure, and a sentence for everything
that is wrong.
"""

import re

import pytest

import tiltjax as tj
from tiltjax.cli.demo import main


def test_the_table_has_every_method_and_the_figure_is_written(tmp_path, capsys):
    figure = tmp_path / "tilt.png"
    assert main(["--num", "200", "--steps", "20", "--output", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    names = [
        "no guidance",
        "exact h",
        "Tilted",
        "plug-in, k = 1",
        "plug-in, k = 8",
        "best of 4",
        "damped, k = 1",
    ]
    names += ["damped best of 4", "Laplace", "DPS", "FMRG"]
    rows = {
        name: re.search(
            rf"^{re.escape(name)} +(-?[\d.]+) ± ([\d.]+) +(\S+) +([\d.]+) +(\S+)", out, re.MULTILINE
        )
        for name in names
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


def test_a_problem_without_closed_forms_says_so_with_dashes(tmp_path, capsys):
    figure = tmp_path / "tilt.svg"
    assert (
        main(
            [
                "--problem",
                "step",
                "--num",
                "50",
                "--steps",
                "5",
                "--seed",
                "3",
                "--output",
                str(figure),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "Tilted" not in out
    assert re.search(r"^plug-in, k = 1 .* -  .* -  .* - ", out, re.MULTILINE)
    assert "<svg" in figure.read_text()


def test_list_names_every_problem(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\w", out, re.MULTILINE) for name in tj.problems.NAMES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--problem", "nothing"], "unknown problem 'nothing': choose one of gaussian, quadratic"),
        (["--scale", "-1"], "scale must not be negative, got -1"),
        (["--scale", "inf"], "scale must be finite"),
        (["--num", "5"], "--num must be at least 10"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--output", "nowhere/tilt.png"], "folder 'nowhere' does not exist"),
        (["--output", "tilt.txt"], r"must end in .png, .pdf or .svg"),
        (["--seed", "-99999999999999999999"], "--seed must lie between"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.startswith("tiltjax: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_words_in_place_of_numbers_are_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--num", "many"])
    assert stop.value.code == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err
