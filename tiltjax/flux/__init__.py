"""FLUX.1 in Flax: the latent flow model as a `Model` like any other, its parts, and their published weights.

    network = flux.load("transformer", "black-forest-labs/FLUX.1-dev", param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    network = flux.from_state_dict("transformer", arrays, config)          NumPy arrays by published names, the published JSON as a dictionary
    model   = flux.FluxModel(network, text, pooled, height=512, width=512, autoencoder=flux.load("autoencoder", folder))
    points  = tiltjax.sample(key, model, num=4, times=flux.times(28, 512, 512), solver=tiltjax.Euler())
    model   = flux.load_model(folder, "a red bird", height=512, width=512)      prompt and all parts, from a folder or the hub
    points  = tiltjax.sample(key, num=4, **flux.published(model, reward))        guided as published

`python -m tiltjax.flux` makes pictures.
"""

from tiltjax.flux import files, forms, loading, weights
from tiltjax.flux.loading import KINDS, from_state_dict, load
from tiltjax.flux.model import FluxModel, Lookahead, times
from tiltjax.flux.pipeline import load_model, schedule
from tiltjax.flux.published import published

__all__ = [
    "KINDS", "FluxModel", "Lookahead", "files", "forms", "from_state_dict", "load", "load_model", "loading", "published", "schedule",
    "times", "weights",
]  # fmt: skip
