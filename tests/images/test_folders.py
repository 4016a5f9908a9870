"""Folders of images, and models that are read from folders. Tier: exact."""

import jax
import numpy as np
import pytest
from helpers import flux_small as small
from PIL import Image

from tiltjax.images import flux, folders, loading
from tiltjax.images.flux import _pipeline

PROMPT = "a red square on green"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("flux") / "model")


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
