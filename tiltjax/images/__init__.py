"""Image models in Flax with their published weights, prompts, and rewards of images.

`flux` holds FLUX.1 as a model: `flux.load_model` reads it, and `flux.published` samples it with
guidance as published. `shapes` describes the images of the small model that comes with tiltjax.
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
