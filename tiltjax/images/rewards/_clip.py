"""Rewards from CLIP: the similarity of an image and a prompt, and aesthetic predictors."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _pytree, rewards
from tiltjax.images.networks import layers
from tiltjax.images.networks.clip import CLIP
from tiltjax.images.rewards._pixels import _composed, _one_image


class ClipScore(rewards.Reward):
    """The similarity of an image and a prompt: the cosine of CLIP's vectors, in [-1, 1].

    With `scaled=True` the cosine is multiplied by the factor of the trained similarity. This is the
    score of CLIPs that were trained on human preferences, PickScore and HPS.

    **Arguments:** `clip`, a `networks.clip.CLIP`; `ids`, the prompt's `(n,)`, from its tokenizer;
    `scaled`.
    """

    embed_image: _pytree.Function
    text: Array
    factor: Array

    def __init__(self, clip: CLIP, ids: Any, *, scaled: bool = False):
        _checks.instance(clip, CLIP, "clip", "the reward needs both towers")
        ids = jnp.asarray(ids)
        if ids.ndim != 1:
            raise ValueError(f"ids must be those of one prompt, (n,), got shape {ids.shape}")
        self.embed_image, self.text = _pytree.Function(clip.image), clip.text(ids)
        self.factor = clip.temperature() if scaled else jnp.ones((), self.text.dtype)

    def __call__(self, x: Array) -> Array:
        cosine = jnp.sum(
            self.embed_image(_one_image(x)).astype(x.dtype) * self.text.astype(x.dtype)
        )
        return self.factor.astype(x.dtype) * cosine


class Aesthetic(rewards.Reward):
    """A rating `<w, f> + b` of the image's unit vector f, trained on human ratings of about 1 to
    10.

    **Arguments:** `clip`, the `networks.clip.CLIP` on which the head was trained (CLIP-L);
    `weights`, the head's published state dict: numbered linear layers (`layers.0.weight`,
    `layers.0.bias`, ...) or one layer (`weight`, `bias`). These heads have only dropout between
    their layers, so that they are one linear function.

    **Raises:** `ValueError` for layers whose shapes do not match each other or CLIP, or that do not
    give one number.
    """

    embed_image: _pytree.Function
    weight: Array
    bias: Array

    def __init__(self, clip: CLIP, weights: Mapping[str, Any]):
        _checks.instance(clip, CLIP, "clip", "the reward needs both towers")
        weight, bias = _composed(weights, clip.config.projection_dim)
        dtype = layers.dtype_of(clip)
        self.embed_image = _pytree.Function(clip.image)
        self.weight, self.bias = jnp.asarray(weight, dtype), jnp.asarray(bias, dtype)

    def __call__(self, x: Array) -> Array:
        features = self.embed_image(_one_image(x)).astype(x.dtype)
        return jnp.sum(features * self.weight.astype(x.dtype)) + self.bias.astype(x.dtype)
