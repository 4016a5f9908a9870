"""Nonsense on the command lines: exit status 2 and a message, never a traceback, and nothing is
left behind. Tier: exact.

Both commands are called in this process with arguments put together at random; runs that would be
right are not started.
"""

import random
import subprocess
import sys
import warnings
from typing import get_args

import pytest
import typer
from helpers import environment

import tiltjax as tj
from tiltjax.cli import _commands, demo, images, main
from tiltjax.pretrained import files

SEEDS = range(60)
WORDS = """
    - -- --- -1 0 1 1e400 -1e400 nan inf -inf 1.5 1e3 0x10 999999999999999999999 None true quadratic
    gaussian banana ../.. / /dev/null /nowhere/at.png tilt.png a.png/b.png π 👍 %s {} a=b 512x x512
    16x16x16 -16 0x0 7 16x8 none weighted clip 0.1,0.2 1,2,3,4 tiny
"""
WORDS = ["", " ", "\x00", "a b", *WORDS.split()]
REQUIRED = ["--model", "someone/model", "--prompt", "a fox", "--quiet"]


class Started(Exception):
    """The command found nothing wrong."""


def start(*arguments, **settings):
    raise Started


def option_names(command, without=()):
    """The names of all options of a command."""
    params = typer.main.get_command(_commands.app).commands[command].params
    return sorted({name for param in params for name in param.opts} - set(without))


def nonsense(dice, names, maximum=5):
    """A few options, mostly with a value."""
    arguments = []
    for _ in range(dice.randint(1, maximum)):
        if dice.random() < 0.85:
            arguments.append(dice.choice(names))
        if dice.random() < 0.85:
            arguments.append(dice.choice(WORDS))
    return arguments


def refused(arguments, capsys):
    """Whether a command refused its arguments, in the way it should."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            status = main(arguments)
    except Started:
        return False
    message = capsys.readouterr().err
    assert status == 2, (arguments, status, message)
    assert "Traceback" not in message, (arguments, message)
    if "─ Error ─" not in message:  # the box of the parser
        assert message.startswith("tiltjax: "), (arguments, message)
        assert message.rstrip("\n").count("\n") == 0, (arguments, message)
    return True


def test_the_demonstration_refuses_nonsense(capsys, tmp_path, monkeypatch):
    names = option_names("demo", without=["--list"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_truth", start)
    refusals = [refused(["demo", *nonsense(random.Random(seed), names)], capsys) for seed in SEEDS]
    assert sum(refusals) > len(SEEDS) / 2
    assert list(tmp_path.iterdir()) == []
    # Each value for each option, with nothing else wrong.
    for name in names:
        for word in WORDS:
            refused(["demo", name, word], capsys)
    assert not refused(["demo"], capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num", "many"],
        ["--num", "9"],
        ["--steps", "0"],
        ["--seed", "-1"],
        ["--seed", "4294967296"],
    ],
)
def test_numbers_out_of_range_are_refused_by_the_parser(arguments, capsys):
    assert refused(["demo", *arguments], capsys)


@pytest.mark.slow
def test_images_refuse_nonsense(capsys, tmp_path, monkeypatch):
    names = option_names("images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "_make", start)
    refusals = [
        refused(["images", *nonsense(random.Random(seed), names)], capsys) for seed in SEEDS
    ]
    assert sum(refusals) > len(SEEDS) / 2
    assert not refused(["images", *REQUIRED], capsys)
    for name in names:
        for word in WORDS:
            refused(["images", *REQUIRED, name, word], capsys)


def test_images_are_refused_before_weights_are_read(capsys, tmp_path, monkeypatch):
    """Past the parser: a few values for every option of a model that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "located", start)
    for i, name in enumerate(option_names("images", without=["--model", "--quiet"])):
        for j, word in enumerate(random.Random(i).sample(WORDS, 6)):
            # Each in a folder of its own, as settings that change are refused; not in one outside
            # of this test's.
            folder = ["--output", word.lstrip("./") if name == "--output" else f"{i} {j}"]
            value = [] if name == "--output" else [name, word]
            refused(["images", *REQUIRED, *folder, *value], capsys)


def test_memory_that_lacks_and_interruptions_are_messages(capsys, monkeypatch):
    def lacking(options, say):
        raise MemoryError("8 GiB are needed")

    def interrupted(options, say):
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "_make", lacking)
    assert refused(["images", *REQUIRED], capsys)
    monkeypatch.setattr(images, "_make", interrupted)
    assert main(["images", *REQUIRED]) == 130
    assert "the same command continues from here" in capsys.readouterr().err


def test_the_names_on_offer_are_those_that_run():
    assert sorted(get_args(_commands._Method)) == sorted(images.METHODS)
    assert sorted(get_args(_commands._Reward)) == sorted(images.REWARDS)


def test_help_and_version(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    main([])
    assert {"demo", "images"} <= set(capsys.readouterr().out.split())
    for command in ("demo", "images"):
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in option_names(command))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tiltjax {tj.__version__}\n"


def test_a_command_imports_what_it_uses():
    code = """
import sys
from tiltjax.cli import main
early = {"typer", "rich", "tqdm", "flax", "optax", "matplotlib", "theory"} & set(sys.modules)
assert not early, early
assert main(["demo", "--list"]) == 0
assert "flax" not in sys.modules
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment.quick(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("named", [True, False])
def test_compiled_programs_are_kept_for_the_next_run(named, tmp_path):
    """In the folder for caches of the user, or where JAX is told to; only the command does so."""
    code = (
        "import sys, jax, tiltjax.cli; print(jax.config.jax_compilation_cache_dir); "
        "sys.argv = ['tiltjax', '--version']; tiltjax.cli.main(); "
        "print(jax.config.jax_compilation_cache_dir)"
    )
    variables = environment.quick() | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    if named:
        variables["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "own")
    run = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    before, _, after = run.stdout.splitlines()
    assert before == (variables["JAX_COMPILATION_CACHE_DIR"] if named else "None")
    if named:
        assert after == before
    else:
        assert after.startswith(str(tmp_path))
        assert after.endswith("programs")
