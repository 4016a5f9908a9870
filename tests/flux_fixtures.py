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
    if "embed" in name or "shared" in name or "relative_attention_bias" in name:
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
