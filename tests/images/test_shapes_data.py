"""The images of the tiny model, their captions, and the rules that read them.

Tier: exact; the rules are judged on images whose scenes are known.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.images import shapes
from tiltjax.images.shapes import Scene


def images(n, seed=0):
    scenes = shapes.scenes(jax.random.key(seed), n)
    drawn = jax.jit(jax.vmap(shapes.draw))(jax.random.split(jax.random.key(seed + 1), n), *scenes)
    return shapes.all_named(scenes), np.asarray(drawn)


SCENES, DRAWN = images(600)


def test_captions_say_what_they_are_told():
    assert (
        shapes.caption(Scene("circle", "red", "top left", "blue"))
        == "a red circle in the top left on a blue background"
    )
    assert shapes.caption(Scene("square", "orange")) == "an orange square"
    assert shapes.caption(Scene(background="orange")) == "a shape on an orange background"
    with pytest.raises(ValueError, match="knows circle, square, triangle, got 'star'"):
        shapes.caption(Scene("star"))
    with pytest.raises(
        ValueError, match="an image shows a shape, a color, a place and a background"
    ):
        shapes.numbered(Scene("circle"))


def test_scenes_are_all_alike_likely_and_show_something():
    scenes = shapes.scenes(jax.random.key(3), 20_000)
    assert not np.any(np.asarray(scenes.color) == np.asarray(scenes.background))
    for numbers, m in zip(scenes, (3, 8, 5, 8), strict=True):
        counts = np.bincount(np.asarray(numbers), minlength=m)
        assert len(counts) == m
        # Five standard deviations of a count.
        assert np.all(np.abs(counts - 20_000 / m) < 5 * np.sqrt(20_000 / m))
    scene = Scene("triangle", "white", "bottom right", "purple")
    assert shapes.named(shapes.numbered(scene)) == scene


def test_every_scene_is_read_from_its_image():
    assert DRAWN.shape == (600, 32, 32, 3)
    assert DRAWN.dtype == np.float32
    assert DRAWN.min() >= 0
    assert DRAWN.max() <= 1
    assert [shapes.read(image) for image in DRAWN] == SCENES


def test_what_is_read_survives_noise_and_blur():
    noise = np.random.default_rng(0).normal(0, 0.05, DRAWN.shape)
    blurred = (
        sum(np.roll(DRAWN, shift, axis) for shift in (-1, 1) for axis in (1, 2)) / 8 + DRAWN / 2
    )
    right = np.mean(
        [shapes.read(image) == scene for image, scene in zip(blurred + noise, SCENES, strict=True)]
    )
    assert right > 0.95


def test_each_word_follows_its_own_part_of_the_image():
    scene, image = SCENES[0], DRAWN[0]
    # Turned over, top is bottom, and nothing else changes but what a triangle is.
    words = {"top": "bottom", "bottom": "top"}
    place = " ".join(words.get(word, word) for word in scene.place.split())
    assert shapes.read(image[::-1])[1:] == (scene.color, place, scene.background)
    plain = np.broadcast_to(image[0, 0], image.shape)
    assert shapes.read(plain) is None
    speck = np.array(plain)
    speck[10:12, 10:12] = 1 - speck[10:12, 10:12]
    assert shapes.read(speck) is None
    with pytest.raises(ValueError, match=r"expected one image \(32, 32, 3\)"):
        shapes.read(np.zeros((16, 16, 3)))


def test_a_silhouette_has_the_area_and_the_middle_it_is_said_to_have():
    y, x = np.mgrid[-40:40:0.1, -40:40:0.1]
    for name, outline in zip(shapes.SHAPES, shapes._outlines(y, x, 20.0, np), strict=True):
        inside = outline < 0
        assert inside.sum() * 0.01 == pytest.approx(shapes._AREAS[name] * 400, rel=5e-3)
        assert abs(y[inside].mean()) < 0.1
        assert abs(x[inside].mean()) < 0.1


def test_drawing_is_one_program_for_all_scenes():
    one = jax.jit(shapes.draw)
    for scene in (
        Scene("circle", "red", "middle", "black"),
        Scene("square", "white", "top left", "green"),
    ):
        assert shapes.read(one(jax.random.key(0), *shapes.numbered(scene))) == scene
    assert one._cache_size() == 1
    assert jnp.issubdtype(one(jax.random.key(1), *shapes.numbered(scene)).dtype, jnp.float32)


def test_a_caption_is_parsed_back():
    parts = [(None, *known) for known in (shapes.SHAPES, shapes.COLORS, shapes.PLACES)]
    for scene in itertools.starmap(Scene, itertools.product(*parts, (None, "red", "white"))):
        assert shapes.parsed(shapes.caption(scene)) == scene
        assert shapes.unknown_words(shapes.caption(scene)) == []
    assert shapes.parsed("A Square.") == Scene("square")
    assert shapes.unknown_words("a dog and a Circle, a dog") == ["dog", "and"]


def test_an_image_follows_what_is_said_and_no_more():
    for scene, image in zip(SCENES[:20], DRAWN, strict=False):
        assert shapes.follows(image, scene)
        assert shapes.follows(image, Scene(place=scene.place))
        assert not shapes.follows(image, scene._replace(color=scene.background))
    assert not shapes.follows(np.zeros((32, 32, 3)), Scene())
