"""Weights that nobody has to store: every parameter is made from its published name, so that a
fixture holds inputs and answers alone.

No parameter is what a network starts with: a norm that does not scale, or a bias of zero, would
hide that it is not used.
"""

import gzip
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures" / "flux"


def weights(shapes: Mapping[str, tuple[int, ...]], dtype=np.float32) -> dict[str, np.ndarray]:
    """A state dict of these names and shapes, the same everywhere: an array depends on its name and
    shape alone.
    """
    return {name: weight(name, tuple(shape)).astype(dtype) for name, shape in shapes.items()}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter, float64: of the size that keeps activations near 1."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if name.endswith("bias"):
        return 0.1 * noise
    if len(shape) < 2:
        return 1 + 0.1 * noise  # the scale of a norm
    if any(
        table in name
        for table in ("embedding", "embed_tokens", "shared", "relative_attention_bias")
    ):
        return noise
    return noise / math.sqrt(math.prod(shape[1:]))


def stored(name: str) -> dict[str, np.ndarray]:
    """The inputs and the answers of the published implementation, `fixtures/flux/<name>.npz`."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return dict(arrays)


def close(got, expected, tolerance: float) -> float:
    """Refuse a difference above `tolerance`, absolute; the largest one there is."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"got shape {got.shape}, expected {expected.shape}"
    worst = float(np.abs(got - expected).max())
    assert worst <= tolerance, (
        f"largest difference {worst:.3g}, allowed {tolerance:.3g}, of values up to "
        f"{np.abs(expected).max():.3g}"
    )
    return worst


def draws(seed, **shapes):
    """Named float32 normal arrays."""
    return {
        name: np.random.default_rng([seed, zlib.crc32(name.encode())])
        .normal(size=shape)
        .astype(np.float32)
        for name, shape in shapes.items()
    }


# The transformer: small, every part there, heads that three axes of rotation divide.
_SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
TRANSFORMERS = {
    "dev": {**_SMALL, "guidance_embeds": True},
    "schnell": {**_SMALL, "guidance_embeds": False},
    "dual": {**_SMALL, "guidance_embeds": True, "dual_time": True},
}
GRID, TEXT_LENGTH = (4, 3), 5


def transformer_inputs(name):
    """Two samples of a 4 x 3 image at unequal times; `cotangent` is what the output is contracted
    with for a gradient.
    """
    config, n = TRANSFORMERS[name], GRID[0] * GRID[1]
    arrays = draws(
        1,
        tokens=(2, n, config["in_channels"]),
        text=(2, TEXT_LENGTH, config["joint_attention_dim"]),
        pooled=(2, config["pooled_projection_dim"]),
        cotangent=(2, n, config["in_channels"]),
    )
    sigma = [[0.83, 0.0], [0.21, 0.1]] if config.get("dual_time") else [0.83, 0.21]
    return arrays | {"sigma": np.float32(sigma), "guidance": np.float32([3.5, 1.0])}


# The configurations of FLUX.1-dev, as published.
CONFIGS = {
    "transformer": {
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    },
    "autoencoder": {
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 2,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    "clip": {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    "t5": {
        "d_ff": 10240,
        "d_kv": 64,
        "d_model": 4096,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "num_decoder_layers": 24,
        "num_heads": 64,
        "num_layers": 24,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "vocab_size": 32128,
    },
}


def keys():
    """Published names and shapes of FLUX.1-dev by kind; `single_file` are those of the transformer
    in its other form.
    """
    packed = (FIXTURES / "keys.json.gz").read_bytes()
    return {
        kind: {name: tuple(shape) for name, shape in sizes.items()}
        for kind, sizes in json.loads(gzip.decompress(packed)).items()
    }
