"""Folders of images, and models that are read from folders. Tier: exact."""

import jax
import numpy as np
import pytest
from helpers import flux_small as small
from PIL import Image

from tiltjax.images import flux, folders, loading
from tiltjax.images.flux import _pipeline
from tiltjax.pretrained import files

PROMPT = "a red square on green"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("flux") / "model")


@pytest.mark.slow
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


@pytest.mark.slow
def test_adapters_of_a_file_reach_the_transformer_and_the_text_encoders(folder, tmp_path):
    options = {"height": 16, "width": 8, "dtype": jax.numpy.float32}
    names = {
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": ("text_encoder", "layers.0.mlp.fc1"),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": ("text_encoder_2", "SelfAttention.q"),
        "transformer.context_embedder": ("transformer", "context_embedder"),
    }
    low_rank = {}
    for name, (part, place) in names.items():
        weights = files.read_folder(folder / part)
        m, n = next(weights.shape(key) for key in weights if key.endswith(f"{place}.weight"))
        low_rank |= {f"{name}.lora_down.weight": np.ones((1, n), np.float32)}
        low_rank |= {f"{name}.lora_up.weight": np.linspace(-3, 3, m, dtype=np.float32)[:, None]}
        low_rank |= {f"{name}.alpha": np.ones(1, np.float32)}
    files.write(tmp_path / "lora.safetensors", low_rank)
    plain = flux.load_model(folder, PROMPT, **options)
    tuned = flux.load_model(folder, PROMPT, adapters=tmp_path / "lora.safetensors", **options)
    for before, after in (
        (plain.parts.text, tuned.parts.text),
        (plain.parts.pooled, tuned.parts.pooled),
        (
            plain.parts.transformer.context_embedder.kernel[...],
            tuned.parts.transformer.context_embedder.kernel[...],
        ),
    ):
        assert np.abs(np.asarray(after) - np.asarray(before)).max() > 1e-3
    with pytest.warns(UserWarning, match=r"6 arrays .* left out: add them by load\('clip'.*'t5'"):
        loading.load("transformer", folder, adapters=tmp_path / "lora.safetensors")
    # One file for one encoder leaves the others as they are.
    one = {key: array for key, array in low_rank.items() if key.startswith("lora_te3")}
    files.write(tmp_path / "one.safetensors", one)
    tuned = flux.load_model(folder, PROMPT, adapters=tmp_path / "one.safetensors", **options)
    np.testing.assert_array_equal(tuned.parts.pooled, plain.parts.pooled)
    np.testing.assert_array_equal(
        tuned.parts.text,
        flux.load_model(
            folder, PROMPT, adapters=tmp_path / "lora.safetensors", **options
        ).parts.text,
    )


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(folder):
    with pytest.warns(UserWarning, match=r"for CLIP, which reads 10: 'circle blue' is cut"):
        flux.encoded(folder, "a a a a a a a a a a circle blue", 16, jax.numpy.float32)


def test_a_copy_without_the_tiny_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(_pipeline, "_BUNDLED", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no tiny model"):
        flux.located("tiny")


def test_images_that_are_not_finite_are_not_written(tmp_path):
    folder = folders.ImageFolder(tmp_path / "new", {"seed": 0}, {})
    image = np.full((4, 4, 3), 0.5)
    with pytest.raises(FloatingPointError, match="image 3: 1 of 48 values are not finite"):
        folder.add(3, np.where(np.arange(48).reshape(4, 4, 3) == 5, np.nan, image), 1.0)
    with pytest.raises(FloatingPointError, match="its reward is nan"):
        folder.add(3, image, float("nan"))
    assert folder.missing(4) == [0, 1, 2, 3]
    folder.add(3, 2 * image, 1.5)
    assert np.asarray(Image.open(folder.path(3))).min() == 255
    assert folder.rewards == {3: 1.5}
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "0000.png").touch()
    with pytest.raises(ValueError, match=r"holds 0000\.png and no settings\.json"):
        folders.ImageFolder(tmp_path / "stray", {}, {})


def test_a_folder_is_free_until_its_first_image(tmp_path):
    folders.ImageFolder(tmp_path, {"size": 31}, {})
    folders.ImageFolder(tmp_path, {"size": 32}, {}).add(0, np.full((4, 4, 3), 0.5), 1.0)
    with pytest.raises(ValueError, match="size 32, now 31"):
        folders.ImageFolder(tmp_path, {"size": 31}, {})
