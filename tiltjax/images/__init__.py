"""Image models in Flax with their published weights, prompts, and rewards of images.

`flux` is FLUX.1 as a model: `flux.load_model` reads it, `flux.published` samples as published.
"""

from tiltjax.images import flux, folders, loading, networks, prompts, rewards, shapes, sheets
from tiltjax.images.flux import FluxModel, Lookahead

__all__ = [
    "FluxModel",
    "Lookahead",
    "flux",
    "rewards",
    "prompts",
    "networks",
    "loading",
    "folders",
    "shapes",
    "sheets",
]
