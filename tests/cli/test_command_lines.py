"""Nonsense on the command lines: exit status 2 and one sentence, never a traceback, and nothing is
left behind. Tier: exact.

Both commands are called in this process with arguments put together at random; runs that would be
right are not started.
"""

import argparse
import random
import warnings

import pytest

from tiltjax.cli import demo, images

SEEDS = range(60)
WORDS = [
    "", " ", "-", "--", "---", "-1", "0", "1", "1e400", "-1e400", "nan", "inf", "-inf", "1.5", "1e3", "0x10", "999999999999999999999", "None",
    "true", "quadratic", "gaussian", "banana", "../..", "/", "/dev/null", "/nowhere/at.png", "tilt.png", "a.png/b.png", "\x00", "π", "👍", "%s",
    "{}", "a b", "a=b", "512x", "x512", "16x16x16", "-16", "0x0", "7", "16x8", "none", "weighted", "clip", "0.1,0.2", "1,2,3,4", "tiny",
]  # fmt: skip


class Started(Exception):
    """The command found nothing wrong."""


def start(*arguments, **settings):
    raise Started


def options(parse, monkeypatch):
    """The names of all options of a command."""
    seen = []
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda parser, arguments: start(seen.append(parser))
    )
    with pytest.raises(Started):
        parse([])
    monkeypatch.undo()
    return sorted(name for name in seen[0]._option_string_actions if name not in ("-h", "--help"))


def nonsense(dice, names, most=5):
    """A few options, mostly with a value."""
    arguments = []
    for _ in range(dice.randint(1, most)):
        if dice.random() < 0.85:
            arguments.append(dice.choice(names))
        if dice.random() < 0.85:
            arguments.append(dice.choice(WORDS))
    return arguments


def refused(main, arguments, capsys):
    """Whether a command refused its arguments, in the way it should."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            status = main(arguments)
    except SystemExit as stop:  # the parser's own refusal: its usage and a sentence
        status, said = stop.code, capsys.readouterr().err
        assert status == 2, (arguments, status)
        assert said.splitlines()[-1].startswith("python -m tiltjax"), (arguments, said)
        return True
    except Started:
        return False
    said = capsys.readouterr().err
    assert status == 2, (arguments, status, said)
    assert said.startswith("tiltjax: "), (arguments, said)
    assert said.rstrip("\n").count("\n") == 0, (arguments, said)
    return True


def test_the_demonstration_refuses_nonsense(capsys, tmp_path, monkeypatch):
    names = [name for name in options(demo._parse, monkeypatch) if name != "--list"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_truth", start)
    said_no = [refused(demo.main, nonsense(random.Random(seed), names), capsys) for seed in SEEDS]
    assert sum(said_no) > len(SEEDS) / 2
    assert list(tmp_path.iterdir()) == []
    # Each value for each option, with nothing else wrong.
    for name in names:
        for word in WORDS:
            refused(demo.main, [name, word], capsys)
    assert not refused(demo.main, [], capsys)


def test_pictures_refuse_nonsense(capsys, tmp_path, monkeypatch):
    names = options(images._parse, monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "_make", start)
    said_no = [refused(images.main, nonsense(random.Random(seed), names), capsys) for seed in SEEDS]
    assert sum(said_no) > len(SEEDS) / 2
    required = ["--model", "nowhere", "--prompt", "a fox"]
    assert not refused(images.main, required, capsys)
    for name in names:
        for word in WORDS:
            refused(images.main, [*required, name, word], capsys)


def test_pictures_are_refused_before_weights_are_read(capsys, tmp_path, monkeypatch):
    """Past the parser: a few values for every option of a model that is not there."""
    names = [
        name for name in options(images._parse, monkeypatch) if name not in ("--model", "--quiet")
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures.pipeline.files, "located", start)
    for i, name in enumerate(names):
        for j, word in enumerate(random.Random(i).sample(WORDS, 6)):
            # Each in a folder of its own, as settings that change are refused; not in one outside
            # of this test's.
            folder = ["--output", word.lstrip("./") if name == "--output" else f"{i} {j}"]
            value = [] if name == "--output" else [name, word]
            refused(
                images.main,
                ["--model", "someone/model", "--prompt", "a fox", *folder, *value],
                capsys,
            )
