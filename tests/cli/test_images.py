"""Pictures by the command line, end to end on a small random model in the published layout.

Tier: exact (files, settings, messages).
"""

import json
import sys

from helpers import flux_small as small
import jax
import numpy as np
import pytest
from PIL import Image

from tiltjax.cli import images
from tiltjax.images import flux, folders, loading
from tiltjax.images.flux import _pipeline
from tiltjax.images.networks import autoencoder, transformer

PROMPT = "a red square on green"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("flux") / "model")


def run(model, output, *more, prompt=PROMPT, size="16x8"):
    arguments = [
        "--model",
        str(model),
        "--output",
        str(output),
        "--prompt",
        prompt,
        "--size",
        size,
        "--steps",
        "3",
    ]
    return images.main([*arguments, "--quiet", *map(str, more)])


def test_a_batch_is_made_continued_and_not_made_again(folder, tmp_path, capsys):
    output = tmp_path / "pictures"
    guided = ("--reward", "brightness", "--region", "bottom", "--guided", 1)
    assert run(folder, output, *guided, "--images", 2) == 0
    first = {path.name: path.read_bytes() for path in sorted(output.glob("*.png"))}
    assert list(first) == ["0000.png", "0001.png"]
    picture = np.asarray(Image.open(output / "0000.png"))
    assert picture.shape == (16, 8, 3)
    assert picture.std() > 1
    kept = json.loads((output / "settings.json").read_text())
    assert kept["settings"]["prompt"] == PROMPT
    assert (kept["settings"]["height"], kept["settings"]["width"]) == (16, 8)
    assert kept["made"]["jax"] == jax.__version__
    rewards = json.loads((output / "rewards.json").read_text())
    # What is reported is the reward of the picture, to its 256 levels.
    half = picture.astype(float).mean(axis=-1) / 255
    assert rewards["0000"] == pytest.approx(half[8:].mean() - half[:8].mean(), abs=2 / 255)
    # One is lost: it alone is made, and is the same to the last bit.
    (output / "0001.png").unlink()
    stamp = (output / "0000.png").stat().st_mtime_ns
    capsys.readouterr()
    assert run(folder, output, *guided, "--images", 2) == 0
    assert "1 of 2 pictures are there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in sorted(output.glob("*.png"))} == first
    assert (output / "0000.png").stat().st_mtime_ns == stamp
    # Nothing is left to do: the model is not even looked for.
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
def test_every_other_method_makes_pictures(folder, tmp_path, method, monkeypatch):
    _simple(monkeypatch)
    monkeypatch.setattr(images, "_CALIBRATION", {"num": 2, "levels": 3})
    particles = ("--particles", 2) if method in ("best-of-n", "weighted") else ()
    assert run(folder, tmp_path, "--method", method, *particles) == 0
    assert json.loads((tmp_path / "rewards.json").read_text()).keys() == {"0000"}


def test_guided_methods_are_settings_of_the_published_one(monkeypatch):
    seen = []
    monkeypatch.setattr(
        images, "published", lambda model, reward, **settings: seen.append(settings)
    )
    options = images._parse(
        ["--model", "x", "--prompt", "y", "--particles", "3", "--sigma", "0.7", "--length", "0"]
    )
    for method in ("plug-in", "fmrg", "damped"):
        images.METHODS[method](None, None, None, options)
    plug_in, fmrg, damped = seen
    assert (plug_in["snr_factor"], plug_in["k"], plug_in["length"]) == (5.0, 3, None)
    assert fmrg == {**plug_in, "snr_factor": 1.0}
    assert damped == {**plug_in, "sigma": 0.7}


def test_every_reward_is_one_of_pictures(folder):
    picture = np.random.default_rng(0).uniform(size=(16, 8, 3))
    for name, make in images.REWARDS.items():
        options = images._parse(["--model", "x", "--prompt", "y", "--palette", "0.1,0.2,0.3"])
        options.model, options.height, options.width = folder, 16, 8
        if name == "clip":
            with pytest.raises(ValueError, match="needs --clip"):
                make(options)
        else:
            assert np.shape(make(options)(jax.numpy.asarray(picture))) == ()
    with pytest.raises(ValueError, match=r"--palette is one of autumn, .* got 'mud'"):
        images._color("mud")


def test_a_model_of_a_folder_is_its_parts(folder):
    options = {"height": 16, "width": 8, "dtype": jax.numpy.float32}
    model = flux.load_model(folder, PROMPT, **options)
    assert model.shape == (8, 4, 4)
    assert model.parts.text.shape == (small.TEXT_LENGTH, 24)
    network = loading.load("transformer", folder)
    for a, b in zip(
        jax.tree.leaves(model.parts.transformer), jax.tree.leaves(network), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    # The text is the prompt's: another prompt, another model.
    other = flux.load_model(folder, "a blue circle", **options)
    assert np.abs(np.asarray(other.parts.pooled - model.parts.pooled)).max() > 1e-3
    grid = np.asarray(flux.schedule(folder, model, 4))
    mu = 0.5 + 0.65 * (8 - 256) / (4096 - 256)
    np.testing.assert_allclose(1 - grid[1], np.exp(mu) / (np.exp(mu) + 1 / 0.75 - 1), rtol=1e-6)


def test_bad_input_is_a_sentence(folder, tmp_path, capsys, monkeypatch):
    def said(*more, model=folder, **options):
        assert run(model, tmp_path / "out", *more, **options) == 2
        return capsys.readouterr().err

    assert "multiples of 4, got 16 x 10" in said(size="16x10")
    (tmp_path / "empty" / "transformer").mkdir(parents=True)
    other = ("--output", tmp_path / "other")  # the folder of settings that were refused is theirs
    assert "lacks vae, text_encoder, text_encoder_2" in said(*other, model=tmp_path / "empty")
    assert "no name of the Hugging Face hub" in said(
        "--output", tmp_path / "a", model=tmp_path / "nowhere"
    )
    assert "--particles out" in said(
        "--output", tmp_path / "b", "--particles", 2, "--method", "none"
    )
    monkeypatch.setattr(images, "_host_memory", lambda: 10_000)
    message = said("--output", tmp_path / "c")
    assert "GiB are needed" in message
    assert "--remat" in message
    monkeypatch.setattr(_pipeline, "_WITH", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no tiny model"):
        flux.located("tiny")


def test_a_prompt_that_is_too_long_is_cut_with_a_word(folder, capsys):
    with pytest.warns(UserWarning, match=r"for CLIP, which reads 10: cut is 'circle blue'"):
        flux.encoded(folder, "a a a a a a a a a a circle blue", 16, jax.numpy.float32)


def test_a_gated_model_is_a_sentence(tmp_path, capsys, monkeypatch):
    def gated(name):
        raise PermissionError(f"{name} is a gated model: accept its licence")

    monkeypatch.setattr(pipeline.files, "located", gated)
    assert run("someone/model", tmp_path / "out") == 2
    assert "someone/model is a gated model" in capsys.readouterr().err


def test_pictures_that_are_none_are_not_written(tmp_path):
    book = folders.Album(tmp_path / "new", {"seed": 0}, {})
    picture = np.full((4, 4, 3), 0.5)
    with pytest.raises(FloatingPointError, match="picture 3: 1 of 48 values are not finite"):
        book.add(3, np.where(np.arange(48).reshape(4, 4, 3) == 5, np.nan, picture), 1.0)
    with pytest.raises(FloatingPointError, match="its reward is nan"):
        book.add(3, picture, float("nan"))
    assert book.missing(4) == [0, 1, 2, 3]
    book.add(3, 2 * picture, 1.5)
    assert np.asarray(Image.open(book.path(3))).min() == 255
    assert book.rewards == {3: 1.5}
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "0000.png").touch()
    with pytest.raises(ValueError, match=r"holds 0000\.png and no settings\.json"):
        folders.Album(tmp_path / "stray", {}, {})


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
    assert "pip install 'tiltjax[flux]'" in capsys.readouterr().err
