"""Flax networks of image models."""

from tiltjax.images.networks import autoencoder, clip, embeddings, layers, t5, transformer

__all__ = [
    "autoencoder",
    "clip",
    "embeddings",
    "layers",
    "t5",
    "transformer",
]
