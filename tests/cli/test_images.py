"""`tiltjax images`, end to end on a small random model in the published layout.

Tier: exact (files, settings, messages).
"""

import json
import re
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import flux_small as small
from PIL import Image

from tiltjax.cli import _usual, images, main
from tiltjax.images import flux
from tiltjax.images.networks import autoencoder, transformer
from tiltjax.pretrained import files

PROMPT = "a red square on green"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("flux") / "model")


def run(model, output, *more, size="16x8"):
    options = {"--model": model, "--output": output, "--prompt": PROMPT, "--size": size}
    arguments = [str(word) for option in options.items() for word in option]
    return main(["images", *arguments, "--steps", "3", "--quiet", *map(str, more)])


@pytest.fixture
def parse(monkeypatch):
    """The options that a command line sets."""

    def parse(*arguments, model="x"):
        calls = []
        monkeypatch.setattr(images, "run", lambda options, say: calls.append(options))
        assert main(["images", "--model", model, "--prompt", "y", "--quiet", *arguments]) == 0
        _usual.complete(calls[0])
        return calls[0]

    return parse


@pytest.mark.slow
def test_a_run_is_made_continued_and_not_made_again(folder, tmp_path, capsys):
    output = tmp_path / "images"
    guided = ("--reward", "brightness", "--region", "bottom", "--guided", 1)
    assert run(folder, output, *guided, "--images", 2) == 0
    numbered = lambda: sorted(output.glob("[0-9]*.png"))
    first = {path.name: path.read_bytes() for path in numbered()}
    assert list(first) == ["0000.png", "0001.png"]
    image = np.asarray(Image.open(output / "0000.png"))
    assert image.shape == (16, 8, 3)
    assert image.std() > 1
    stored = json.loads((output / "settings.json").read_text())
    assert stored["settings"]["prompt"] == PROMPT
    assert (stored["settings"]["height"], stored["settings"]["width"]) == (16, 8)
    assert stored["made"]["jax"] == jax.__version__
    rewards = json.loads((output / "rewards.json").read_text())
    # What is reported is the reward of the image, to its 256 levels.
    half = image.astype(float).mean(axis=-1) / 255
    assert rewards["0000"] == pytest.approx(half[8:].mean() - half[:8].mean(), abs=2 / 255)
    # One is lost: it alone is made, and is the same to the last bit.
    (output / "0001.png").unlink()
    time_written = (output / "0000.png").stat().st_mtime_ns
    capsys.readouterr()
    assert run(folder, output, *guided, "--images", 2) == 0
    assert "1 of 2 images exist already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in numbered()} == first
    assert (output / "0000.png").stat().st_mtime_ns == time_written
    # Nothing is left to do: the model is not even searched for.
    assert run(folder, output, *guided, "--images", 1) == 0
    assert run(folder, output, *guided, "--seed", 1) == 2
    assert "other settings (seed 0, now 1)" in capsys.readouterr().err


def _simple(monkeypatch):
    """Networks that compile at once: what is tested is around them."""
    flat = lambda coder, x: jax.numpy.repeat(
        jax.numpy.repeat(x[..., :3] / 4 + 0.5, 2, axis=-3), 2, axis=-2
    )
    monkeypatch.setattr(autoencoder.Autoencoder, "decode", flat)
    monkeypatch.setattr(
        transformer.Transformer, "__call__", lambda net, tokens, *rest, **grid: 0.5 * tokens
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "best-of-n", "conjugate", "weighted"])
def test_every_other_method_makes_images(folder, tmp_path, method, monkeypatch):
    _simple(monkeypatch)
    monkeypatch.setattr(images, "_CALIBRATION", {"num": 2, "levels": 3})
    particles = ("--particles", 2) if method in ("best-of-n", "weighted") else ()
    assert run(folder, tmp_path, "--method", method, *particles) == 0
    assert json.loads((tmp_path / "rewards.json").read_text()).keys() == {"0000"}


def test_guided_methods_are_settings_of_the_published_one(parse, monkeypatch):
    calls = []

    def published(key, model, reward, **settings):
        calls.append(settings)
        return SimpleNamespace(x=[None])

    monkeypatch.setattr(flux, "published", published)
    options = parse("--particles", "3", "--sigma", "0.7", "--length", "0")
    for method in ("plug-in", "fmrg", "damped"):
        job = images.Job(None, None, None, options, print)
        assert images.METHODS[method](job)(jax.random.key(0)) == (None, None)
    plug_in, fmrg, damped = calls
    assert (plug_in["snr_factor"], plug_in["k"], plug_in["length"]) == (5.0, 3, None)
    assert fmrg == {**plug_in, "snr_factor": 1.0}
    assert damped == {**plug_in, "sigma": 0.7}


def test_every_reward_is_one_of_images(folder, parse):
    image = np.random.default_rng(0).uniform(size=(16, 8, 3))
    for name, make in images.REWARDS.items():
        options = parse("--palette", "0.1,0.2,0.3")
        options.model, options.height, options.width = folder, 16, 8
        if name == "clip":
            with pytest.raises(ValueError, match="needs --clip"):
                make(options)
        else:
            assert np.shape(make(options)(jax.numpy.asarray(image))) == ()
    with pytest.raises(ValueError, match=r"--palette must be one of autumn, .* got 'mud'"):
        images._color("mud")


def test_bad_input_gets_a_message(folder, tmp_path, capsys, monkeypatch):
    def message(*more, model=folder, **options):
        assert run(model, tmp_path / "out", *more, **options) == 2
        return capsys.readouterr().err

    assert "multiples of 4, got 16 x 10" in message(size="16x10")
    (tmp_path / "empty" / "transformer").mkdir(parents=True)
    other = ("--output", tmp_path / "other")  # the folder of settings that were refused is theirs
    assert "lacks vae, text_encoder, text_encoder_2" in message(*other, model=tmp_path / "empty")
    assert "not of the form of the Hugging Face hub" in message(
        "--output", tmp_path / "a", model=tmp_path / "nowhere"
    )
    assert "--particles out" in message(
        "--output", tmp_path / "b", "--particles", 2, "--method", "none"
    )
    monkeypatch.setattr(images, "_system_memory", lambda: 10_000)
    text = message("--output", tmp_path / "c")
    assert "GiB are needed" in text
    assert "--remat" in text


def test_a_gated_model_gets_a_message(tmp_path, capsys, monkeypatch):
    def gated(name):
        raise PermissionError(f"{name} is a gated model: accept its license")

    monkeypatch.setattr(files, "located", gated)
    assert run("someone/model", tmp_path / "out") == 2
    assert "someone/model is a gated model" in capsys.readouterr().err


def test_a_nan_is_named_by_step_and_cause(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(images.REWARDS, "blue", lambda options: lambda x: jax.numpy.sum(x) * np.nan)
    _simple(monkeypatch)
    assert run(folder, tmp_path / "out", "--method", "weighted") == 2
    assert "sampling failed in step 0 of 3, from t = 0.001" in capsys.readouterr().err


def test_without_pillow_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert run("x", tmp_path / "out") == 2
    assert "pip install 'tiltjax[images]'" in capsys.readouterr().err


def test_the_defaults_are_those_of_the_model_and_the_method(parse):
    flux_usual = parse()
    assert (flux_usual.steps, flux_usual.length, flux_usual.particles) == (28, 10.0, 1)
    assert (flux_usual.scale, flux_usual.sigma, flux_usual.compare) == (1.0, 1.0, False)
    assert parse("--method", "weighted").particles > 1
    assert parse("--method", "weighted", model="tiny").particles > 1
    assert parse(model="tiny").compare
    assert not parse("--method", "none", model="tiny").compare
    for name in images.REWARDS:
        assert parse("--reward", name, model="tiny").scale > 1
    given = parse("--scale", "2", "--length", "0", "--no-compare", model="tiny")
    assert (given.scale, given.length, given.compare) == (2.0, 0.0, False)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("tiny", ("--size", "64"), "32 x 32 pixels, and images of 64 x 64 .*: leave --size out"),
        ("tiny", ("--prompt", "a red DOG, a house"), "does not know 'dog', 'house': use a prompt"),
        ("tiny", ("--method", "weighted", "--particles", "1"), "use more --particles, such as"),
        ("x", ("--method", "best-of-n", "--particles", "1"), "use more --particles, such as"),
    ],
)
def test_options_without_their_effect_get_a_warning(
    model, arguments, message, tmp_path, capsys, monkeypatch
):
    def stop(options):
        raise ValueError("stop")

    monkeypatch.setattr(images, "_series", stop)
    monkeypatch.setattr(flux, "usual_size", lambda model: 32)
    words = ["--model", model, "--prompt", "a red circle", "--output", str(tmp_path), *arguments]
    assert main(["images", *words, "--quiet"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert main(["images", *words[:6], "--quiet"]) == 2
    assert capsys.readouterr().err == "tiltjax: stop\n"


@pytest.mark.slow
def test_guided_and_unguided_images_are_compared(folder, tmp_path, capsys, monkeypatch):
    _simple(monkeypatch)
    options = ("--method", "best-of-n", "--particles", 2, "--images", 2)
    assert run(folder, tmp_path, *options, "--compare") == 0
    out = capsys.readouterr().out
    assert "of 2 unguided: " in out
    assert "of 2 guided: " in out
    rewards = [
        json.loads((place / "rewards.json").read_text())
        for place in (tmp_path, tmp_path / "unguided")
    ]
    assert all(guided >= base for guided, base in zip(*(r.values() for r in rewards), strict=True))
    sheet = Image.open(tmp_path / "sheet.png")
    # The unguided images are those of the method none, with the same seed.
    assert run(folder, tmp_path / "none", "--method", "none", "--images", 2, "--no-sheet") == 0
    for name in ("0000.png", "0001.png"):
        same = (tmp_path / "none" / name).read_bytes()
        assert (tmp_path / "unguided" / name).read_bytes() == same
    assert not (tmp_path / "none" / "sheet.png").exists()
    # A run that has nothing to do writes the same sheet.
    assert run(folder, tmp_path, *options, "--compare") == 0
    assert Image.open(tmp_path / "sheet.png") == sheet


@pytest.mark.slow
def test_weighted_runs_tell_their_effective_sample_size(folder, tmp_path, capsys, monkeypatch):
    _simple(monkeypatch)
    assert run(folder, tmp_path, "--method", "weighted", "--particles", 3) == 0
    (size,) = re.findall(r"effective sample size of 3 particles: (\S+) on", capsys.readouterr().out)
    assert 1 <= float(size) <= 3


def test_a_log_file_gets_few_lines(folder, tmp_path, capsys, monkeypatch):
    _simple(monkeypatch)
    options = {"--model": folder, "--output": tmp_path, "--prompt": PROMPT, "--size": "16x8"}
    arguments = [str(word) for option in options.items() for word in option]
    assert main(["images", *arguments, "--steps", "3", "--method", "none", "--images", "3"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" s  ")[1] for line in lines] == [
        "starting",
        "reading the model",
        "compiling and sampling unguided images",
        "sampling unguided images",
    ]
