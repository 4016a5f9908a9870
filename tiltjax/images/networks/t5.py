r"""The T5 encoder, from token ids to the states that are the text input of FLUX.1.

    h_0 = E[ids],    n = rmsnorm(h)
    h <- h + O softmax(q k^T + b_{j - i}) v,    h <- h + W_o (gelu(W_0 n) * W_1 n)

q, k, v are linear in n, all layers share the bias b of the first, and the scores are not divided by
sqrt(d). b_{j - i} depends on the distance only through its bucket. Half of the buckets are single
distances; the others grow geometrically up to `max_distance`. Positions before and after have
different buckets. Padding is not masked, as in the training of FLUX.1.

Attributes have the names of the published parameters (`tiltjax.pretrained.state_dicts`). Reference:
Raffel et al., arXiv 1910.10683; gated gelu: Shazeer, arXiv 2002.05202.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tiltjax.images.networks import layers

RENAMES = {
    "encoder.relative_attention_bias": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    )
}
STACKED = ("encoder.block",)
TIED = "encoder.embed_tokens.weight"  # a second copy of `shared.weight` in some files


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of an encoder, by default those of the encoder of T5-XXL 1.1 in FLUX.1."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, published: Mapping[str, Any]) -> "Config":
        """The sizes from the published `config.json`.

        **Raises:** `ValueError` for a setting that is not implemented.
        """
        # If it is absent, the published classes take it as "relu".
        if (found := published.get("feed_forward_proj", "relu")) != "gated-gelu":
            raise ValueError(
                f"feed_forward_proj = {found!r} is not implemented: T5 1.1 needs 'gated-gelu'"
            )
        absent = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
        return layers.configuration(cls, published, {"is_decoder": (False,)}, **absent)


class T5(nnx.Module):
    """The encoder, from token ids `(*lead, n)` to states `(*lead, n, d_model)`.

    **Arguments:** `config`; `remat`, to save for a gradient only the states between layers;
    `param_dtype`, of the parameters and the computation; `rngs`, for the initial weights.
    """

    def __init__(
        self, config: Config, *, remat: bool = False, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.shared = nnx.Embed(
            config.vocab_size, config.d_model, dtype=param_dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.encoder = Encoder(config, bool(remat), param_dtype, rngs)

    def __call__(self, ids: Array) -> Array:
        layers.check_ids(ids, self.config.vocab_size)
        return self.encoder(self.shared(ids))


class Encoder(nnx.Module):
    """All layers, and the norm after the last layer."""

    def __init__(self, config: Config, remat: bool, dtype: Any, rngs: nnx.Rngs):
        self.config, self.remat = config, remat
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.block = layers.stacked(
            lambda rngs: Block(config, dtype, rngs), config.num_layers, rngs
        )
        self.final_layer_norm = _norm(config, dtype)

    def __call__(self, hidden: Array) -> Array:
        config = self.config
        bucket = buckets(
            hidden.shape[-2],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        bias = jnp.moveaxis(self.relative_attention_bias(jnp.asarray(bucket)), -1, 0)
        hidden = layers.scanned(
            self.block, hidden, lambda block, hidden: block(hidden, bias), remat=self.remat
        )
        return self.final_layer_norm(hidden)


class Block(nnx.Module):
    """Attention, then the gated network. Both are residual."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        self.layer: Any = nnx.List(
            [_Attention(config, dtype, rngs), _FeedForward(config, dtype, rngs)]
        )

    def __call__(self, hidden: Array, bias: Array) -> Array:
        hidden = self.layer[0](hidden, bias)
        return self.layer[1](hidden)


class _Attention(nnx.Module):
    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        self.SelfAttention = _Heads(config, dtype, rngs)
        self.layer_norm = _norm(config, dtype)

    def __call__(self, hidden: Array, bias: Array) -> Array:
        return hidden + self.SelfAttention(self.layer_norm(hidden), bias)


class _Heads(nnx.Module):
    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        self.shape = (config.num_heads, config.d_kv)
        inner = math.prod(self.shape)
        self.q, self.k, self.v = (_linear(config.d_model, inner, dtype, rngs) for _ in range(3))
        self.o = _linear(inner, config.d_model, dtype, rngs)

    def __call__(self, n: Array, bias: Array) -> Array:
        q, k, v = (
            project(n).reshape(*n.shape[:-1], *self.shape) for project in (self.q, self.k, self.v)
        )
        return self.o(layers.attention(q, k, v, scale=1.0, bias=bias).reshape(*n.shape[:-1], -1))


class _FeedForward(nnx.Module):
    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        self.DenseReluDense = _Gated(config, dtype, rngs)
        self.layer_norm = _norm(config, dtype)

    def __call__(self, hidden: Array) -> Array:
        return hidden + self.DenseReluDense(self.layer_norm(hidden))


class _Gated(nnx.Module):
    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        self.wi_0, self.wi_1 = (_linear(config.d_model, config.d_ff, dtype, rngs) for _ in range(2))
        self.wo = _linear(config.d_ff, config.d_model, dtype, rngs)

    def __call__(self, n: Array) -> Array:
        return self.wo(nnx.gelu(self.wi_0(n), approximate=True) * self.wi_1(n))


def buckets(n: int, num: int, farthest: int) -> np.ndarray:
    """The bucket of every pair of positions `(from, to)`, `(n, n)` int32, out of `num`. Distances
    of at least `farthest` share the last bucket.
    """
    places = np.arange(n, dtype=np.int32)
    offset = places[None, :] - places[:, None]
    distance, half = np.abs(offset), num // 2
    near = half // 2
    # In float32, as published: some distances are on an edge, where rounding decides.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(near)) / np.float32(
        math.log(farthest / near)
    )
    far = np.minimum(near + (ratio * np.float32(half - near)).astype(np.int32), half - 1)
    return np.where(distance < near, distance, far) + half * (offset > 0).astype(np.int32)


def _linear(n: int, m: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(n, m, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _norm(config: Config, dtype: Any) -> layers.Norm:
    return layers.Norm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, center=False)
