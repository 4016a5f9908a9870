"""Image models in Flax, with rewards."""

from tiltjax.images import flux, folders, loading, networks, prompts, rewards, shapes

__all__ = [
    "flux",
    "folders",
    "loading",
    "networks",
    "prompts",
    "rewards",
    "shapes",
]
