"""Checks of populations, arrays `(num, *shape)` or `Particles`, that are arguments of functions.

A population must consist of real, finite numbers, with at least one sample of at least one number.
Log-weights must be one number per sample, not all -inf. Values are checked only outside of `jit`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree
from tiltjax.particles import Particles


def states(value: Any, name: str) -> tuple[Array, Array | None]:
    """Samples as `(num, d)`, in at least float32, and normalized weights, `None` if they are known
    to be equal.
    """
    x, log_weights = unpack(value, name)
    x = jnp.asarray(x).reshape(len(x), -1)
    x = x.astype(
        np.promote_types(
            x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float), np.float32
        )
    )
    return x, None if log_weights is None else jax.nn.softmax(log_weights.astype(x.dtype))


def pair(x: Any, y: Any, name: str = "y") -> tuple[Array, Array | None, Array, Array | None]:
    """`states` of both, in one dimension and one dtype. `name` is the name of the second."""
    (x, weights_x), (y, weights_y) = states(x, "x"), states(y, name)
    same_dimension(x, y, name)
    return _pytree.cast((x, weights_x, y, weights_y), np.promote_types(x.dtype, y.dtype))


def unpack(value: Any, name: str) -> tuple[Array | np.ndarray, Array | None]:
    """The samples, unchanged, and the log-weights, `None` if they are known to be equal. Both are
    checked.
    """
    log_weights, is_particles = None, isinstance(value, Particles)
    if is_particles:
        value, log_weights = value.x, value.log_weights
        if log_weights.shape != (len(value),):
            raise ValueError(
                f"{name}.log_weights must have shape ({len(value)},), got {log_weights.shape}"
            )
        if _checks.concrete(log_weights) and len(log_weights):
            read = np.asarray(log_weights, np.float64)
            if not np.isfinite(read.max()):  # NaN if any of them is
                raise ValueError(
                    f"{name}.log_weights must be finite or -inf, not all -inf: their maximum is "
                    f"{read.max()}"
                )
            log_weights = None if np.ptp(read) == 0 else log_weights
    x = value if isinstance(value, jax.Array) else _checks.native(np.asarray(value))
    if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(
            f"{name} must hold real numbers, got {type(value).__name__} of dtype {x.dtype}"
        )
    of_numbers = is_particles and x.ndim == 1  # states of shape (), which have one number each
    if x.ndim < 2 and not of_numbers:
        hint = f": for samples on the line pass {name}[:, None]" if x.ndim == 1 else ""
        raise ValueError(
            f"{name} must be samples of shape (num, d) or (num, *shape), got shape {x.shape}{hint}"
        )
    if x.size == 0:
        raise ValueError(
            f"{name} must hold at least one sample of at least one number, got shape {x.shape}"
        )
    if _checks.concrete(x):
        failed = ~np.isfinite(np.asarray(x).reshape(len(x), -1)).all(axis=1)
        if failed.any():
            raise ValueError(
                f"{name} must be finite: {failed.sum()} of {len(x)} samples hold NaN or infinity, "
                f"the first at index {failed.argmax()}"
            )
    return x, log_weights


def same_dimension(x: Any, y: Any, name: str = "y") -> None:
    """Raise a `ValueError` for points `(n, d)` and `(m, e)` of different dimensions."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x and {name} must have one dimension, got d = {x.shape[1]} and d = {y.shape[1]}"
        )


def at_least_two(x: Array, weights: Array | None, name: str) -> None:
    """Raise a `ValueError` for populations without two distinct samples of positive weight."""
    alone = weights is not None and _checks.concrete(weights) and np.max(np.asarray(weights)) == 1
    if len(x) < 2 or alone:
        got = "one that carries all of the weight" if alone else f"{len(x)}"
        raise ValueError(
            f"{name} must hold at least two samples, because pairs are needed, got {got}"
        )


def or_equal(weights: Array | None, x: Array) -> Array:
    """The weights as an array, also if they are equal."""
    return jnp.full(len(x), 1 / len(x), x.dtype) if weights is None else weights
