r"""The images of the tiny model: one colored shape on a colored background, captions for them, and
rules that tell what an image shows.

    image = B + (F - B) clip(1/2 - d, 0, 1)

    scene = Scene("circle", "red", "top left", "blue")
    caption(scene) == "a red circle in the top left on a blue background"
    image = draw(key, *numbered(scene));   read(image) == scene

d is the signed distance to the outline in pixels. B and F are colors near two of `COLORS`.

A caption may leave out any part of a scene: `Scene(shape="circle")` is "a circle". The model draws
at random what a prompt leaves out, so a reward can choose it.

The rules of `read`: The color of the background is the median along the border of the image. The
shape covers the pixels whose color differs from it by more than half of the largest difference. The
color of the shape is the median of the pixels that differ most. The place is that nearest to the
centroid. The shape's name is the one whose outline, with the same centroid and area, overlaps most.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks

SIDE = 32
SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.90, 0.20),
    "green": (0.15, 0.62, 0.25),
    "blue": (0.15, 0.25, 0.85),
    "purple": (0.55, 0.18, 0.65),
    "white": (0.94, 0.94, 0.94),
    "black": (0.07, 0.07, 0.07),
}
# Rows and columns of the centers, in pixels.
PLACES = {
    "top left": (9.5, 9.5),
    "top right": (9.5, 22.5),
    "bottom left": (22.5, 9.5),
    "bottom right": (22.5, 22.5),
    "middle": (16.0, 16.0),
}
_RADII, _JITTER, _SHADE = (5.0, 6.5), 1.0, 0.03
_TRIANGLE, _SQUARE = 1.25, 0.886  # distance from the center to a corner, and to a side, in radii
_AREAS = {
    "circle": math.pi,
    "square": 4 * _SQUARE**2,
    "triangle": 0.75 * math.sqrt(3) * _TRIANGLE**2,
}
# A smaller difference from the background, in RGB, does not count as a shape.
_VISIBLE = 0.2


class Scene(NamedTuple):
    """What an image shows, or what a caption says. `None` stands for a part that is left out."""

    shape: str | None = None
    color: str | None = None
    place: str | None = None
    background: str | None = None


class Numbers(NamedTuple):
    """A scene as integers `(...)`: the indices of its words in `SHAPES`, `COLORS`, `PLACES` and
    `COLORS`.
    """

    shape: Array
    color: Array
    place: Array
    background: Array


def caption(scene: Scene) -> str:
    """The sentence for a scene, without the parts that are left out. **Raises:** `ValueError` for a
    word that the tiny model does not know.
    """
    for word, known in zip(scene, (SHAPES, COLORS, PLACES, COLORS), strict=True):
        if word is not None and word not in known:
            raise ValueError(f"the tiny model knows {', '.join(known)}, got {word!r}")
    thing = " ".join(word for word in (scene.color, scene.shape or "shape") if word)
    where = f" in the {scene.place}" if scene.place else ""
    return f"{_article(thing)} {thing}{where}" + (
        f" on {_article(scene.background)} {scene.background} background"
        if scene.background
        else ""
    )


def parsed(prompt: str) -> Scene:
    """The scene that a sentence describes, the inverse of `caption`. A part that the sentence does
    not mention is `None`.
    """
    sentence = " ".join(_letters(prompt))
    kinds, colors, places = ("|".join(known) for known in (SHAPES, COLORS, PLACES))

    def found(pattern: str) -> str | None:
        match = re.search(rf"\b{pattern}\b", sentence)
        return None if match is None else match[1]

    return Scene(
        found(f"({kinds})"),
        found(f"({colors}) (?:{kinds}|shape)"),
        found(f"({places})"),
        found(f"({colors}) background"),
    )


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that occur in no caption, each once."""
    grammar = ["a", "an", "in", "the", "on", "background", "shape"]
    known = {*grammar, *SHAPES, *COLORS, *" ".join(PLACES).split()}
    return [word for word in dict.fromkeys(_letters(prompt)) if word not in known]


def follows(image: Array | np.ndarray, scene: Scene) -> bool:
    """Whether an image shows every part of a scene that is not left out."""
    shown = read(image)
    return shown is not None and all(
        said in (None, found) for said, found in zip(scene, shown, strict=True)
    )


def _letters(prompt: str) -> list[str]:
    """The words of a prompt, in lower case."""
    return re.findall(r"\w+", prompt.lower())


def _article(word: str) -> str:
    return "an" if word.startswith("o") else "a"


def numbered(scene: Scene) -> Numbers:
    """A complete scene as integers. **Raises:** `ValueError` for a scene with a part left out."""
    caption(scene)
    words = [word for word in scene if word is not None]
    if len(words) < len(scene):
        raise ValueError(f"an image shows a shape, a color, a place and a background, got {scene}")
    found = (known.index(word) for known, word in zip(_words(), words, strict=True))
    return Numbers(*(jnp.asarray(number, jnp.int32) for number in found))


def _words() -> tuple[list[str], ...]:
    return list(SHAPES), list(COLORS), list(PLACES), list(COLORS)


def named(numbers: Numbers) -> Scene:
    """The inverse of `numbered`, for one scene."""
    return Scene(*(known[int(number)] for known, number in zip(_words(), numbers, strict=True)))


def all_named(numbers: Numbers) -> list[Scene]:
    """A list of scenes from integers `(n,)`, as `named` for one scene."""
    return [named(Numbers(*each)) for each in zip(*map(np.asarray, numbers), strict=True)]


def scenes(key: Array, n: int) -> Numbers:
    """Random scenes `(n,)`, all equally likely. A shape never has the color of its background."""
    keys = jax.random.split(_checks.key(key), 4)
    each = lambda key, m: jax.random.randint(key, (n,), 0, m, jnp.int32)
    color = each(keys[1], len(COLORS))
    background = (color + 1 + each(keys[3], len(COLORS) - 1)) % len(COLORS)
    return Numbers(each(keys[0], len(SHAPES)), color, each(keys[2], len(PLACES)), background)


def draw(key: Array, shape: Array, color: Array, place: Array, background: Array) -> Array:
    """An image of one scene, given as integers: `(SIDE, SIDE, 3)` in [0, 1], float32. The radius,
    the exact place and the shades of the colors are random.
    """
    key_radius, key_place, key_shade = jax.random.split(key, 3)
    radius = jax.random.uniform(key_radius, (), jnp.float32, *_RADII)
    palette, places = (
        jnp.asarray([*COLORS.values()], jnp.float32),
        jnp.asarray([*PLACES.values()], jnp.float32),
    )
    center = places[place] + jax.random.uniform(key_place, (2,), jnp.float32, -_JITTER, _JITTER)
    shades = jnp.stack([palette[background], palette[color]])
    back, front = jnp.clip(
        shades + _SHADE * jax.random.normal(key_shade, (2, 3), jnp.float32), 0, 1
    )
    y, x = jnp.meshgrid(*(jnp.arange(SIDE, dtype=jnp.float32) + 0.5,) * 2, indexing="ij")
    distances = jnp.stack(_outlines(y - center[0], x - center[1], radius, jnp))
    cover = jnp.clip(0.5 - distances[shape], 0, 1)[..., None]
    lay = lambda shade: jnp.broadcast_to(shade, (SIDE, SIDE, 3))
    return lay(back) + cover * lay(front - back)


def _outlines(y, x, radius, numpy):
    """Signed distances to the outlines of `SHAPES` with their centroids at the origin. y increases
    downward.
    """
    circle = numpy.sqrt(y**2 + x**2) - radius
    square = numpy.maximum(abs(y), abs(x)) - _SQUARE * radius
    # Each side has half the distance of a corner from the center.
    side = 0.5 * _TRIANGLE * radius
    slanted = 0.5 * math.sqrt(3) * abs(x) - 0.5 * y
    return circle, square, numpy.maximum(y, slanted) - side


def read(image: Array | np.ndarray) -> Scene | None:
    """What an image shows, by the rules above, or `None` if nothing differs from the background.
    **Raises:** `ValueError` for an image of another size.
    """
    pixels = np.clip(np.asarray(image, np.float64), 0, 1)
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"expected one image ({SIDE}, {SIDE}, 3), got shape {pixels.shape}")
    frame = np.ones((SIDE, SIDE), bool)
    frame[2:-2, 2:-2] = False
    back = np.median(pixels[frame], axis=0)
    distance = np.linalg.norm(pixels - back, axis=-1)
    # Without the seven largest, so that a single speck does not count.
    largest = np.sort(distance, axis=None)[-8]
    if largest < _VISIBLE:
        return None
    inside = distance > largest / 2
    front = np.median(pixels[distance > 0.75 * largest], axis=0)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    center, area = (y[inside].mean(), x[inside].mean()), inside.sum()
    nearest = lambda point, table: min(table, key=lambda name: math.dist(point, table[name]))

    def overlap(shape: str) -> float:
        radius = math.sqrt(area / _AREAS[shape])
        silhouette = _outlines(y - center[0], x - center[1], radius, np)[SHAPES.index(shape)] < 0
        return (silhouette & inside).sum() / (silhouette | inside).sum()

    return Scene(
        max(SHAPES, key=overlap),
        nearest(front, COLORS),
        nearest(center, PLACES),
        nearest(back, COLORS),
    )
