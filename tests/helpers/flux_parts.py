"""The parts of FLUX.1 in small: published configurations, inputs, and the networks of this package
on made-up weights.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import flux_fixtures as fixtures

from tiltjax.images.networks import autoencoder, clip, t5, transformer
from tiltjax.pretrained import state_dicts

AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
T5 = {
    "d_model": 24,
    "d_kv": 4,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 50,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
}
_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "bos_token_id": 48,
    "pad_token_id": 49,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def _clip(act: str, end: int) -> dict:
    text = {**_TEXT, "hidden_act": act, "eos_token_id": end}
    return {
        "text_config": text,
        "vision_config": {**_VISION, "hidden_act": act},
        "projection_dim": 20,
    }


# As OpenAI's files are, where 2 stands for the largest id, and as later ones.
CLIPS = {"legacy": _clip("quick_gelu", 2), "recent": _clip("gelu", 49)}
CLIP_IDS = np.asarray([[48, 5, 9, 49, 49, 49], [48, 7, 2, 8, 3, 49]], np.int32)
T5_IDS = np.random.default_rng(0).integers(0, 50, size=(2, 40), dtype=np.int32)
inputs = functools.partial(
    fixtures.draws, 2, latents=(2, 3, 4, 4), decoded=(2, 6, 8, 3), mean=(2, 3, 4, 4)
)


def images(*shape: int) -> np.ndarray:
    """Images in (0, 1), float32."""
    return (1 / (1 + np.exp(-fixtures.draws(3, pictures=shape)["pictures"]))).astype(np.float32)


def made(abstract, renames=None, stacked=()):
    """A network with the weights that its published names and shapes lead to."""
    state_dict = fixtures.weights(state_dicts.shapes(abstract, renames, stacked))
    return state_dicts.from_state_dict(abstract, state_dict, renames=renames, stacked=stacked)


@functools.cache
def small_autoencoder(**options) -> autoencoder.Autoencoder:
    config = autoencoder.Config.from_json(AUTOENCODER)
    return made(
        nnx.eval_shape(lambda: autoencoder.Autoencoder(config, **options, rngs=nnx.Rngs(0)))
    )


@functools.cache
def small_t5(**options) -> t5.T5:
    abstract = nnx.eval_shape(lambda: t5.T5(t5.Config.from_json(T5), **options, rngs=nnx.Rngs(0)))
    return made(abstract, t5.RENAMES, t5.STACKED)


@functools.cache
def small_transformer(name: str, **options) -> transformer.Transformer:
    config = transformer.Config.from_json(fixtures.TRANSFORMERS[name])
    abstract = nnx.eval_shape(lambda: transformer.Transformer(config, **options, rngs=nnx.Rngs(0)))
    return made(abstract, transformer.RENAMES, transformer.STACKED)


@functools.cache
def small_clip(name: str = "legacy", **options) -> clip.CLIP:
    config = clip.Config.from_json(CLIPS[name])
    return made(
        nnx.eval_shape(lambda: clip.CLIP(config, **options, rngs=nnx.Rngs(0))), stacked=clip.STACKED
    )


close, stored = fixtures.close, fixtures.stored


def rounding(network: nnx.Module, expected) -> float:
    """The difference between two computations of a network in single precision that rounding
    explains: eps times the root of the number of terms that are added up on the way, each with a
    random error, times the largest value.
    """
    leaves = jax.tree.leaves(nnx.state(network, nnx.Param))
    terms = sum(math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else leaf.size for leaf in leaves)
    return float(np.finfo(np.float32).eps * math.sqrt(terms) * np.abs(np.asarray(expected)).max())


def close_to_rounding(network: nnx.Module, got, expected) -> float:
    """Refuse a difference that rounding in single precision does not explain."""
    return close(got, expected, rounding(network, expected))


def as_jax(tree: dict[str, np.ndarray], dtype=jnp.float32) -> dict:
    return {name: jnp.asarray(array, dtype) for name, array in tree.items()}
