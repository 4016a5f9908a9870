"""Weights that nobody has to store: every parameter is made from its published name, so that a fixture holds inputs and answers alone.

No parameter is what a network starts with: a norm that does not scale, or a bias of zero, would hide that it is not used.
"""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "flux"


def weights(shapes: Mapping[str, tuple[int, ...]], dtype=np.float32) -> dict[str, np.ndarray]:
    """A state dict of these names and shapes, the same everywhere: an array depends on its name and shape alone."""
    return {name: weight(name, tuple(shape)).astype(dtype) for name, shape in shapes.items()}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter, float64: of the size that keeps activations near 1."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if name.endswith("bias"):
        return 0.1 * noise
    if len(shape) < 2:
        return 1 + 0.1 * noise  # the scale of a norm
    if any(table in name for table in ("embedding", "embed_tokens", "shared", "relative_attention_bias")):
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
        f"largest difference {worst:.3g}, allowed {tolerance:.3g}, of values up to {np.abs(expected).max():.3g}"
    )
    return worst


def draws(seed, **shapes):
    """Named float32 normal arrays."""
    return {
        name: np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=shape).astype(np.float32)
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
    """Two samples of a 4 x 3 picture at unequal times; `cotangent` is what the output is contracted with for a gradient."""
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
