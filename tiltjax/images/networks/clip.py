r"""CLIP: the text tower, whose pooled state modulates FLUX.1, and the vision tower, for rewards.

    text       h_0 = E[ids] + P;   L causal layers;   norm;   the state at the end of the text
    image      h_0 = norm((class, patches) + P);   L layers;   the norm of the state at `class`
    layer      h <- h + attention(norm(h)),   h <- h + W_2 act(W_1 norm(h))
    similarity cos(V image, T text), V and T linear

| | activation | `eos_token_id` |
|---|---|---|
| CLIP-L of OpenAI, in FLUX.1 | `quick_gelu`, x sigmoid(1.702 x) | 2, read as the largest id |
| CLIP-H of LAION, under PickScore and HPS | `gelu`, exact | as above, or the id |

Attributes have the names of the published parameters (`tiltjax.pretrained.state_dicts`). Reference:
Radford et al., arXiv 2103.00020.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tiltjax import _checks
from tiltjax.images.networks import layers
from tiltjax.pretrained import files, state_dicts

STACKED = ("encoder.layers", "text_model.encoder.layers", "vision_model.encoder.layers")
_TABLES = tuple(
    f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")
)  # 0, 1, 2, ... in older files
_LEGACY_END = 2
_ACTIVATIONS = {
    "quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x),
    "gelu": lambda x: nnx.gelu(x, approximate=False),
}
# Mean and standard deviation, by channel, of the images on which CLIP was trained.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _check(config: Any) -> None:
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act = {config.hidden_act!r} is not implemented: use "
            f"{' or '.join(_ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size = {config.hidden_size} must be a multiple of num_attention_heads = "
            f"{config.num_attention_heads}"
        )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The sizes of a text tower, by default those of CLIP-L."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        _check(self)

    @classmethod
    def from_json(cls, published: Mapping[str, Any]) -> "TextConfig":
        """The sizes from the published `config.json` of a `CLIPTextModel`.

        **Raises:** `ValueError` for a setting that is not implemented.
        """
        absent = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
        return layers.configuration(cls, published, {}, **absent)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The sizes of a vision tower, by default those of CLIP-L."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        _check(self)

    @classmethod
    def from_json(cls, published: Mapping[str, Any]) -> "VisionConfig":
        """The sizes from the published JSON of a `CLIPVisionModel`.

        **Raises:** `ValueError` for a setting that is not implemented.
        """
        absent = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        }
        return layers.configuration(cls, published, {"num_channels": (3,)}, **absent, patch_size=32)


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of both towers and of their common space, by default those of CLIP-L."""

    text_config: TextConfig = TextConfig()
    vision_config: VisionConfig = VisionConfig()
    projection_dim: int = 768

    @classmethod
    def from_json(cls, published: Mapping[str, Any]) -> "Config":
        """The sizes from the published `config.json` of a `CLIPModel`.

        **Raises:** `ValueError` for a setting that is not implemented.
        """
        text = TextConfig.from_json(published.get("text_config") or {})
        vision = VisionConfig.from_json(published.get("vision_config") or {})
        return cls(text, vision, published.get("projection_dim", 512))


class Text(nnx.Module):
    """The text tower, `CLIPTextModel`, from token ids `(*lead, n)` to states `(*lead, n, d)`;
    `pooled` returns one state, `(*lead, d)`.

    **Arguments:** `config`; `remat`, to save for a gradient only the states between layers;
    `param_dtype`, of the parameters and the computation; `rngs`, for the initial weights.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        remat: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.embeddings = _TextEmbeddings(config, param_dtype, rngs)
        self.encoder = Encoder(config, bool(remat), param_dtype, rngs)
        self.final_layer_norm = _norm(config, param_dtype)

    def __call__(self, ids: Array) -> Array:
        layers.check_ids(ids, self.config.vocab_size)
        if (n := ids.shape[-1]) > self.config.max_position_embeddings:
            raise ValueError(
                f"CLIP takes {self.config.max_position_embeddings} tokens, got {n}: cut the prompt"
            )
        hidden = self.embeddings(ids)
        return self.final_layer_norm(self.encoder(hidden, layers.causal(n, hidden.dtype)))

    def pooled(self, ids: Array) -> Array:
        """The state at the first end-of-text token, `(*lead, d)`, which depends on the whole text
        but not on the padding after it.

        **Raises:** `ValueError` for a text without an end-of-text token, if the ids are not traced.
        """
        end = self.config.eos_token_id
        if (
            end != _LEGACY_END
            and _checks.concrete(ids)
            and not np.all(np.any(np.asarray(ids) == end, axis=-1))
        ):
            raise ValueError(
                f"a text has no end-of-text token {end}, whose state is the pooled state: append "
                "it, as a Tokenizer does"
            )
        # Older files have the value 2, which is not the end. There the end is the largest id of the
        # vocabulary.
        place = jnp.argmax(ids if end == _LEGACY_END else ids == end, axis=-1)
        states = self(ids)
        return jnp.take_along_axis(states, place[..., None, None], axis=-2)[..., 0, :]


class Vision(nnx.Module):
    """The vision tower, `CLIPVisionModel`, from images prepared by `preprocess`,
    `(*lead, s, s, 3)`, to states `(*lead, d)`.

    **Arguments:** as in `Text`.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        remat: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.embeddings = _VisionEmbeddings(config, param_dtype, rngs)
        self.pre_layrnorm = _norm(config, param_dtype)
        self.encoder = Encoder(config, bool(remat), param_dtype, rngs)
        self.post_layernorm = _norm(config, param_dtype)

    def __call__(self, images: Array) -> Array:
        size = self.config.image_size
        if images.shape[-3:] != (size, size, 3):
            raise ValueError(
                f"this tower takes images (..., {size}, {size}, 3), got {images.shape}: use "
                f"preprocess(images, {size})"
            )
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(hidden[..., 0, :])


class CLIP(nnx.Module):
    """Both towers, `CLIPModel`.

    **Arguments:** `config`; `remat`, `param_dtype` and `rngs` as in `Text`.
    """

    def __init__(
        self, config: Config, *, remat: bool = False, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        options = {"remat": remat, "param_dtype": param_dtype, "rngs": rngs}
        self.text_model = Text(config.text_config, **options)
        self.vision_model = Vision(config.vision_config, **options)
        linear = {"use_bias": False, "dtype": param_dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.text_projection = nnx.Linear(
            config.text_config.hidden_size, config.projection_dim, **linear
        )
        self.visual_projection = nnx.Linear(
            config.vision_config.hidden_size, config.projection_dim, **linear
        )
        self.logit_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), param_dtype))

    def text(self, ids: Array) -> Array:
        """The unit vectors of texts."""
        return _unit(self.text_projection(self.text_model.pooled(ids)))

    def image(self, images: Array) -> Array:
        """The unit vectors of images in [0, 1] of any size, in the dtype of the parameters."""
        images = preprocess(images, self.config.vision_config.image_size)
        return _unit(self.visual_projection(self.vision_model(images)))

    def temperature(self) -> Array:
        """The factor of the cosine in the trained similarity, `exp(logit_scale)`."""
        return jnp.exp(self.logit_scale.get_value())


def from_state_dict(
    state_dict: Mapping[str, Any], config: Mapping[str, Any], **options: Any
) -> CLIP:
    """Both towers with published weights, for rewards. (For the text tower of FLUX.1 use
    `loading.from_state_dict("clip", ...)`.)

    **Arguments:** `state_dict`, NumPy arrays by the names of `CLIPModel`; `config`, its published
    JSON; `options` of `CLIP`.

    **Raises:** `ValueError` for keys that are missing, unused or of another shape, and for another
    configuration.
    """
    settings = Config.from_json(config)
    abstract = nnx.eval_shape(lambda: CLIP(settings, **options, rngs=nnx.Rngs(0)))
    return state_dicts.from_state_dict(abstract, state_dict, stacked=STACKED, ignored=_TABLES)


def load(folder: str | os.PathLike, **options: Any) -> CLIP:
    """Both towers from a local folder with `config.json` and safetensors files, such as a copy of
    `openai/clip-vit-large-patch14`.

    **Raises:** `FileNotFoundError`, and as `from_state_dict`.
    """
    return from_state_dict(files.read_folder(folder), files.configuration(folder), **options)


def preprocess(images: Array, size: int) -> Array:
    """Images in [0, 1] prepared as in the training of CLIP: the shorter side is resized to `size`,
    the middle is cut out, and the channels are standardized.

    The interpolation is cubic with antialiasing, as published. The published code also rounds the
    result to 256 levels, which has no gradient and is left out here.
    """
    *lead, height, width, channels = images.shape
    if channels != 3:
        raise ValueError(
            f"images must be (..., height, width, 3), channels last, got {images.shape}"
        )
    shape = tuple(max(size, size * side // min(height, width)) for side in (height, width))
    if shape != (height, width):
        images = jax.image.resize(images, (*lead, *shape, 3), "cubic")
    top, left = ((side - size) // 2 for side in shape)
    images = images[..., top : top + size, left : left + size, :]
    mean, std = (
        jnp.broadcast_to(jnp.asarray(each, images.dtype), images.shape) for each in (MEAN, STD)
    )
    return (images - mean) / std


class Encoder(nnx.Module):
    """The layers of a tower."""

    def __init__(self, config: TextConfig | VisionConfig, remat: bool, dtype: Any, rngs: nnx.Rngs):
        self.remat = remat
        self.layers = layers.stacked(
            lambda rngs: Layer(config, dtype, rngs), config.num_hidden_layers, rngs
        )

    def __call__(self, hidden: Array, bias: Array | None = None) -> Array:
        return layers.scanned(
            self.layers, hidden, lambda layer, hidden: layer(hidden, bias), remat=self.remat
        )


class Layer(nnx.Module):
    """Attention, then two linear maps with an activation between them. Both are residual."""

    def __init__(self, config: TextConfig | VisionConfig, dtype: Any, rngs: nnx.Rngs):
        self.layer_norm1, self.self_attn = _norm(config, dtype), _Heads(config, dtype, rngs)
        self.layer_norm2, self.mlp = _norm(config, dtype), _Perceptron(config, dtype, rngs)

    def __call__(self, hidden: Array, bias: Array | None) -> Array:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), bias)
        return hidden + self.mlp(self.layer_norm2(hidden))


class _Heads(nnx.Module):
    def __init__(self, config: TextConfig | VisionConfig, dtype: Any, rngs: nnx.Rngs):
        n = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            _linear(n, n, dtype, rngs) for _ in range(4)
        )

    def __call__(self, n: Array, bias: Array | None) -> Array:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(n).reshape(*n.shape[:-1], self.heads, -1) for project in projections)
        return self.out_proj(
            layers.attention(q, k, v, scale=q.shape[-1] ** -0.5, bias=bias).reshape(n.shape)
        )


class _Perceptron(nnx.Module):
    def __init__(self, config: TextConfig | VisionConfig, dtype: Any, rngs: nnx.Rngs):
        self.act = _ACTIVATIONS[config.hidden_act]
        self.fc1 = _linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.fc2 = _linear(config.intermediate_size, config.hidden_size, dtype, rngs)

    def __call__(self, n: Array) -> Array:
        return self.fc2(self.act(self.fc1(n)))


class _TextEmbeddings(nnx.Module):
    def __init__(self, config: TextConfig, dtype: Any, rngs: nnx.Rngs):
        embed = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **embed)
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings, config.hidden_size, **embed
        )

    def __call__(self, ids: Array) -> Array:
        tokens = self.token_embedding(ids)
        places = self.position_embedding.embedding.get_value()[: ids.shape[-1]]
        return tokens + jnp.broadcast_to(places, tokens.shape)


class _VisionEmbeddings(nnx.Module):
    def __init__(self, config: VisionConfig, dtype: Any, rngs: nnx.Rngs):
        n, patch = config.hidden_size, (config.patch_size,) * 2
        embed = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.class_embedding = nnx.Param(
            jax.random.normal(rngs.params(), (n,), dtype) / math.sqrt(n)
        )
        self.patch_embedding = nnx.Conv(
            3, n, patch, strides=patch, padding="VALID", use_bias=False, **embed
        )
        self.position_embedding = nnx.Embed(
            (config.image_size // config.patch_size) ** 2 + 1, n, **embed
        )

    def __call__(self, images: Array) -> Array:
        first = self.class_embedding.get_value()
        patches = self.patch_embedding(images.astype(first.dtype))
        *lead, _, _, n = patches.shape
        tokens = jnp.concatenate(
            [jnp.broadcast_to(first, (*lead, 1, n)), patches.reshape(*lead, -1, n)], axis=-2
        )
        return tokens + jnp.broadcast_to(
            self.position_embedding.embedding.get_value(), tokens.shape
        )


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _linear(n: int, m: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(n, m, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _norm(config: TextConfig | VisionConfig, dtype: Any) -> layers.Norm:
    return layers.Norm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype)
