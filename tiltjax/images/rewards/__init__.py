"""Rewards of images."""

from tiltjax.images.rewards._clip import Aesthetic, ClipScore
from tiltjax.images.rewards._pixels import (
    PALETTES,
    Decoded,
    MaskedBrightness,
    Palette,
    antisymmetry,
    blue_minus_half_red_green,
    blue_minus_red_green,
    blueness,
    bottom_half,
    center_circle,
    rotation,
    symmetry,
    top_right_circle,
)
from tiltjax.images.rewards._torch import image_reward, yes_or_no

__all__ = [
    "PALETTES",
    "blueness",
    "blue_minus_red_green",
    "blue_minus_half_red_green",
    "symmetry",
    "antisymmetry",
    "rotation",
    "MaskedBrightness",
    "top_right_circle",
    "center_circle",
    "bottom_half",
    "Palette",
    "Decoded",
    "ClipScore",
    "Aesthetic",
    "image_reward",
    "yes_or_no",
]
