r"""Rewards of one image `(H, W, 3)` in [0, 1], and of the image of a latent.

| reward | r(x) |
|---|---|
| `blueness` | mean of B |
| `blue_minus_red_green`, `blue_minus_half_red_green` | mean of B - R - G, of B - (R + G) / 2 |
| `MaskedBrightness(mask)` | mean brightness inside of the mask, minus outside |
| `symmetry`, `antisymmetry` | minus, plus the mean of (x - its mirror image)^2 |
| `rotation` | minus the mean of (x - x rotated by 180 degrees)^2 |
| `Palette(color)` | minus the squared distance of the mean color from a color |
| `ClipScore(clip, ids)` | cosine of image and prompt; `scaled=True`: PickScore, HPS |
| `Aesthetic(clip, weights)` | a linear function of the image's unit vector |
| `Decoded(decode, reward)` | any of these, of the decoded image of a latent |

    reward = Decoded(autoencoder.decode, 2 * MaskedBrightness(bottom_half(512, 512)) + blueness)

`image_reward` and `yes_or_no` are rewards in PyTorch. References: Kirstain et al., arXiv
2305.01569 (PickScore); Wu et al., arXiv 2306.09341 (HPS); Hessel et al., arXiv 2104.08718 (CLIP
score); Schuhmann et al., arXiv 2210.08402 (the aesthetic predictor of LAION).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree, rewards

PALETTES = {
    "autumn": (0.78, 0.42, 0.18),
    "ocean": (0.20, 0.40, 0.70),
    "rose": (0.90, 0.55, 0.70),
    "forest": (0.18, 0.50, 0.28),
    "gray": (0.50, 0.50, 0.50),
}


def blueness(image: Array) -> Array:
    """The mean of the blue channel, in [0, 1]. White has the same value as blue."""
    return jnp.mean(_one_image(image)[..., 2])


def blue_minus_red_green(image: Array) -> Array:
    """The mean of `B - R - G`, in [-2, 1]: high for blue, low for bright images."""
    red, green, blue = _channels(image)
    return jnp.mean(blue - red - green)


def blue_minus_half_red_green(image: Array) -> Array:
    """The mean of `B - (R + G) / 2`, in [-1, 1]: zero for every gray."""
    red, green, blue = _channels(image)
    return jnp.mean(blue - (red + green) / 2)


def symmetry(image: Array) -> Array:
    """Minus the mean squared difference from the left-right mirror image; at most 0."""
    return -antisymmetry(image)


def antisymmetry(image: Array) -> Array:
    """The mean squared difference from the left-right mirror image, in [0, 1]."""
    return jnp.mean((_one_image(image) - image[:, ::-1]) ** 2)


def rotation(image: Array) -> Array:
    """Minus the mean squared difference from the image rotated by 180 degrees; at most 0."""
    return -jnp.mean((_one_image(image) - image[::-1, ::-1]) ** 2)


class MaskedBrightness(rewards.Reward):
    """The mean of all channels inside a mask minus the mean outside, in [-1, 1].

    **Arguments:** `mask`, `(H, W)`, true (or a weight up to 1) inside: `top_right_circle`,
    `center_circle`, `bottom_half`, or any other.

    **Raises:** `ValueError` for a mask without an inside or an outside, and for an image of another
    size.
    """

    mask: Array

    def __init__(self, mask: _checks.Numbers):
        self.mask = _checks.finite(mask, "mask", 2)
        if _checks.concrete(self.mask):
            values = np.asarray(self.mask)
            if values.min() < 0 or values.max() > 1 or not 0 < values.mean() < 1:
                raise ValueError(
                    "a mask must lie in [0, 1], with some pixels inside and some outside, got "
                    f"values in [{values.min():g}, {values.max():g}] of mean {values.mean():g}"
                )

    def __call__(self, x: Array) -> Array:
        brightness = jnp.mean(_one_image(x), axis=-1)
        if brightness.shape != self.mask.shape:
            raise ValueError(
                f"the image has size {brightness.shape} but the mask has size {self.mask.shape}: "
                "make a mask of the image's size"
            )
        inside = self.mask.astype(x.dtype)
        mean = lambda weight: jnp.sum(weight * brightness) / jnp.sum(weight)
        return mean(inside) - mean(1 - inside)


def top_right_circle(height: int, width: int) -> np.ndarray:
    """A mask `(H, W)`: a disc at the center of the top right quarter, with a radius of 18% of the
    shorter side.
    """
    return _disc(height, width, 0.25, 0.75, 0.18)


def center_circle(height: int, width: int) -> np.ndarray:
    """A mask `(H, W)`: a disc at the center, with a radius of 20% of the shorter side."""
    return _disc(height, width, 0.5, 0.5, 0.20)


def bottom_half(height: int, width: int) -> np.ndarray:
    """A mask `(H, W)`: the lower half, for odd heights with the middle row."""
    return np.broadcast_to(np.arange(height)[:, None] >= height // 2, (height, width)).astype(float)


def _disc(height: int, width: int, down: float, right: float, radius: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    middle, reach = (int(down * height), int(right * width)), int(radius * min(height, width))
    return ((y - middle[0]) ** 2 + (x - middle[1]) ** 2 < reach**2).astype(float)


class Palette(rewards.Reward):
    """Minus the squared distance of the image's mean color from `color`, `(3,)` in [0, 1], such as
    `PALETTES["ocean"]`; at most 0.
    """

    color: Array

    def __init__(self, color: _checks.Numbers):
        self.color = _checks.finite(color, "color", 1)
        _checks.shape(self.color, (3,), "color (red, green, blue)")

    def __call__(self, x: Array) -> Array:
        return -jnp.sum((jnp.mean(_one_image(x), axis=(0, 1)) - self.color.astype(x.dtype)) ** 2)


class Decoded(rewards.Reward):
    """A reward on images as a reward on latents, `r(decode(z))`, differentiable in z.

    The image is clipped to [0, 1], as in a file, because a decoder overshoots. The gradient is zero
    in clipped pixels. `clip=False` also rewards overshoots, and keeps the gradient everywhere.

    **Arguments:** `decode(z) -> x`, from `(h, w, c)` to `(H, W, 3)`, such as the method
    `autoencoder.decode`; `reward`, of an image; `clip`.
    """

    decode: _pytree.Function
    reward: rewards.Reward
    clip: bool = eqx.field(static=True)

    def __init__(self, decode: Callable, reward: Callable, *, clip: bool = True):
        self.decode, self.reward = _pytree.Function(decode), rewards.as_reward(reward)
        self.clip = _checks.flag(clip, "clip")

    def image(self, z: Array) -> Array:
        """The image of a latent, which the reward takes."""
        image = self.decode(z)
        return jnp.clip(image, 0, 1) if self.clip else image

    def __call__(self, x: Array) -> Array:
        return rewards.value(self.reward, self.image(x)).astype(x.dtype)


def _composed(state_dict: Mapping[str, Any], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear layers, in the order of the numbers in their names, as one vector `(width,)` and a
    scalar, in float64.
    """
    number = lambda name: [int(digits) for digits in re.findall(r"\d+", name)]
    stems = sorted({name.rpartition(".")[0] for name in state_dict}, key=number)
    total, offset = np.eye(width), np.zeros(width)
    for stem in stems:
        dot = f"{stem}." if stem else ""
        if any(f"{dot}{leaf}" not in state_dict for leaf in ("weight", "bias")):
            raise ValueError(
                f"every layer of the head needs a weight and a bias, got {sorted(state_dict)}"
            )
        weight, bias = (
            np.asarray(state_dict[f"{dot}{leaf}"], np.float64) for leaf in ("weight", "bias")
        )
        if weight.ndim != 2 or weight.shape[1] != len(offset) or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"layer {stem or 'weight'!r} has shapes {weight.shape} and {bias.shape}, which do "
                f"not match an input of size {len(offset)}"
            )
        total, offset = weight @ total, weight @ offset + bias
    if len(offset) != 1:
        raise ValueError(f"the last layer of the head must give one number, got {len(offset)}")
    return total[0], offset[0]


def _one_image(x: Array) -> Array:
    if x.ndim != 3 or x.shape[-1] != 3:
        raise ValueError(
            f"expected one image (height, width, 3), got shape {x.shape}: for a reward on latents "
            "use Decoded(decode, reward)"
        )
    return x


def _channels(x: Array) -> tuple[Array, Array, Array]:
    x = _one_image(x)
    return x[..., 0], x[..., 1], x[..., 2]
