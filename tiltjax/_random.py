"""Draws that keep the probability of rare events in single precision.

JAX's uniform numbers in single precision are multiples of 2^-23. A Gumbel variable of one such
number is at most 16, so that `jax.random.categorical` draws a token of probability p too seldom, by
a fraction of about `2^-24 / p`. Among 50,000 tokens that are most of them. Two numbers per Gumbel
variable keep probabilities down to 1e-14. They take less than twice the time of a draw, which is
little beside the network that computes the probabilities.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def categorical(
    key: Array, logits: Array, axis: int = -1, shape: tuple[int, ...] | None = None
) -> Array:
    """`jax.random.categorical`, also right for rare events in single precision or less."""
    if jnp.finfo(logits.dtype).bits < 32:
        logits = logits.astype(jnp.float32)
    return jax.random.categorical(key, logits, axis, shape, mode=_mode(logits.dtype))


def gumbel(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """`jax.random.gumbel` with its upper tail, also in single precision."""
    return jax.random.gumbel(key, shape, dtype, mode=_mode(dtype))


def _mode(dtype: Any) -> str:
    return "low" if jnp.finfo(dtype).bits > 32 else "high"  # in double precision, 2^-52 is enough
