"""`tiltjax images`, end to end on a small random model in the published layout.

Tier: exact (files, settings, messages).
"""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import flux_small as small
from PIL import Image

from tiltjax.cli import images, main
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

    def parse(*arguments):
        options = []
        monkeypatch.setattr(images, "run", options.append)
        assert main(["images", "--model", "x", "--prompt", "y", *arguments]) == 0
        return options[0]

    return parse


@pytest.mark.slow
def test_a_run_is_made_continued_and_not_made_again(folder, tmp_path, capsys):
    output = tmp_path / "images"
    guided = ("--reward", "brightness", "--region", "bottom", "--guided", 1)
    assert run(folder, output, *guided, "--images", 2) == 0
    first = {path.name: path.read_bytes() for path in sorted(output.glob("*.png"))}
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
    assert "1 of 2 images are there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in sorted(output.glob("*.png"))} == first
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
        images.METHODS[method](None, None, None, options)(jax.random.key(0))
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
    monkeypatch.setitem(
        images.REWARDS, "blueness", lambda options: lambda x: jax.numpy.sum(x) * np.nan
    )
    _simple(monkeypatch)
    assert run(folder, tmp_path / "out", "--method", "weighted") == 2
    assert "sampling failed in step 0 of 3, from t = 0.001" in capsys.readouterr().err


def test_without_pillow_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert run("x", tmp_path / "out") == 2
    assert "pip install 'tiltjax[images]'" in capsys.readouterr().err
