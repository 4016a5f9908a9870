r"""Embeddings of times and positions by cosines and sines.

    time        (cos(w_i t), sin(w_i t)),  w_i = 10000^(-i / 128),  i < 128
    position    the pair (2i, 2i + 1) of a head is rotated by p w_i,  w_i = 10000^(-2i / d)

Here t is 1000 sigma, or 1000 times a guidance scale, and d entries of a head belong to one axis of
the position.

A position is (0, row, column) for an image token and (0, 0, 0) for a text token. Angles are float64
in NumPy; cosines and sines are at least float32.

Reference: Vaswani et al. (arXiv 1706.03762); Su et al. (arXiv 2104.09864), rotations.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax.images.networks.layers import wide

FREQUENCIES = 128  # of a time
_LONGEST = 10_000.0  # longest wavelength, divided by 2 pi


def of_time(value: Array) -> Array:
    """Cosines and sines of `(batch,)` numbers, `(batch, 256)`."""
    dtype = wide(value.dtype)
    # Rounded as in the published code, in single precision: for 1000 times a time, the last digits
    # of a frequency matter.
    exponents = (
        np.float32(-np.log(_LONGEST))
        * np.arange(FREQUENCIES, dtype=np.float32)
        / np.float32(FREQUENCIES)
    )
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = value.astype(dtype)[:, None] * jnp.asarray(frequencies, dtype)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotations(
    axes: Sequence[int], length: int, grid: tuple[int, int], dtype: Any
) -> tuple[Array, Array]:
    """The cosines and sines, `(length + rows * columns, 1, d / 2)`, that rotate the pairs of each
    token.

    **Arguments:** `axes`, the number of entries of a head for each axis of a position; `length` of
    the text; `grid`, rows and columns. The constants of the program are one table for rows and one
    for columns, not one for every token.
    """
    rows, columns = grid
    parts = []
    for axis, (d, n) in enumerate(zip(axes, (1, rows, columns), strict=True)):
        angles = np.outer(np.arange(n), _LONGEST ** -(np.arange(0, d, 2) / d))
        parts.append(angles.reshape([n if i == axis else 1 for i in range(3)] + [d // 2]))

    def table(wave: Callable) -> Array:
        shape = lambda part: (rows, columns, part.shape[-1])
        image = [
            jnp.broadcast_to(jnp.asarray(wave(part)[0], wide(dtype)), shape(part)) for part in parts
        ]
        image = jnp.concatenate(image, axis=-1).reshape(rows * columns, -1)
        text = jnp.full((length, image.shape[-1]), wave(0.0), wide(dtype))
        return jnp.concatenate([text, image])[:, None]

    return table(np.cos), table(np.sin)


def rotated(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Queries or keys, `(batch, tokens, heads, d)`, with their pairs rotated. The computation uses
    the dtype of the rotation.
    """
    cos, sin = (table[None] for table in rotation)
    pairs = x.astype(cos.dtype).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
