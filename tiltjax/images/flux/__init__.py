"""FLUX.1: the model, its pipeline, and guided sampling as published.

`load_model` reads a model for one prompt. `FluxModel` is built from the parts that
`tiltjax.images.loading` reads. `published` samples with the published guidance.
"""

from tiltjax.images.flux._model import (
    FACTOR,
    FluxModel,
    Lookahead,
    Memory,
    Parts,
    check_memory,
    latent_shape,
    memory,
    packed,
    times,
    unpacked,
)
from tiltjax.images.flux._pipeline import (
    PARTS,
    TINY,
    encoded,
    load_model,
    located,
    needed_memory,
    schedule,
    usual_size,
)
from tiltjax.images.flux._published import published, published_guidance

__all__ = [
    "FACTOR",
    "Parts",
    "FluxModel",
    "Lookahead",
    "times",
    "latent_shape",
    "packed",
    "unpacked",
    "Memory",
    "memory",
    "check_memory",
    "TINY",
    "PARTS",
    "located",
    "usual_size",
    "needed_memory",
    "load_model",
    "encoded",
    "schedule",
    "published",
    "published_guidance",
]
