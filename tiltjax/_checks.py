"""Checks of arguments: numbers, counts, flags, keys, functions.

*Structure* (types, shapes, keys, counts) is checked whenever Python runs, also while JAX traces.
*Values* (signs, finiteness, ranges) are checked where they are concrete, which is at construction:
a value that the caller's own `jit`, `vmap` or `grad` traces passes unread.

Every message says what was expected, what was passed, and how to fix it.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# What a constructor takes for an array.
Numbers = Array | np.ndarray | float | Sequence[Any]


def concrete(value: Any) -> bool:
    """Whether the values can be read now: no leaf is being traced. Read them with NumPy, as inside
    a `jit` an operation of JAX on a concrete array is traced all the same.
    """
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def floating(value: Any, name: str, ndim: int | tuple[int, ...] | None = None) -> Array:
    """`value` as a floating array (integers become floats), with its rank checked."""
    try:
        array = _on_device(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be numbers, got {type(value).__name__}: {error}") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        if not (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_):
            raise TypeError(f"{name} must be real numbers, got dtype {array.dtype}")
        array = array.astype(jnp.result_type(float))
    if getattr(array, "weak_type", False):  # else 3.0 and jnp.float32(3.0) would be two programs
        array = jax.lax.convert_element_type(array, array.dtype)
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and array.ndim not in allowed:
        expected = " or ".join(f"{n}-dimensional" for n in allowed)
        raise ValueError(f"{name} must be {expected}, got shape {array.shape}")
    return array


def _on_device(value: Any) -> Array:
    """`jnp.asarray` of a copy; for NumPy arrays and Python's numbers without the program that
    `jnp.asarray` compiles for each new shape.
    """
    is_numpy = type(value) is np.ndarray or isinstance(value, np.generic)
    if not is_numpy and not _is_plain(value):
        return jnp.asarray(value)
    array = np.array(value)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8 or not array.dtype.isnative:
        return jnp.asarray(value)  # JAX says what is wrong
    if not (is_numpy and array.dtype.kind == "f"):
        # JAX's integers may be too short for a number that a float holds.
        array = array.astype(jnp.result_type(float))
    return jax.device_put(array)


def _is_plain(value: Any) -> bool:
    """Whether the value is one of Python's numbers, or nested lists of them."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in (int, float, bool)


def finite(value: Any, name: str, ndim: int | tuple[int, ...] | None = None) -> Array:
    """`floating`, with every entry finite where that can be read."""
    array = floating(value, name, ndim)
    if concrete(array) and not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite, got {np.asarray(array)}")
    return array


def in_range(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, *, closed: str = "both"
) -> Array:
    """A finite scalar between `low` and `high`; `closed` says which ends belong to the range:
    "both", "left", "right", "neither".
    """
    array = finite(value, name, 0)
    if concrete(array):
        _require_range(float(np.asarray(array)), name, low, high, closed)
    return array


def nonnegative(value: Any, name: str) -> Array:
    """A finite scalar that is not negative."""
    array = finite(value, name, 0)
    if concrete(array) and np.asarray(array) < 0:
        raise ValueError(f"{name} must not be negative, got {float(array):g}")
    return array


def positive(value: Any, name: str) -> Array:
    """A finite scalar above zero."""
    array = nonnegative(value, name)
    if concrete(array) and np.asarray(array) == 0:
        raise ValueError(f"{name} must be positive, got 0")
    return array


def shape(array: Any, expected: tuple[int, ...], name: str) -> None:
    """Refuse an array of another shape than `expected`."""
    if array.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")


def _require_range(value: float, name: str, low: float, high: float, closed: str) -> None:
    above = value >= low if closed in ("both", "left") else value > low
    below = value <= high if closed in ("both", "right") else value < high
    if not (above and below):
        left = "[" if closed in ("both", "left") else "("
        right = "]" if closed in ("both", "right") and high < math.inf else ")"
        raise ValueError(f"{name} must lie in {left}{low:g}, {high:g}{right}, got {value:g}")


def instance(value: Any, kind: type, name: str, hint: str) -> None:
    """Refuse what is no `kind`; `hint` says how to make one."""
    if not isinstance(value, kind):
        got = type(value).__name__
        if isinstance(value, type):
            got = f"the class {value.__name__} itself"
        elif isinstance(value, str | int | float):
            got = f"{got} {value!r}"
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {got}: {hint}")


def function(value: Any, name: str) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise TypeError(
            f"{name}: expected a callable, got {type(value).__name__}: pass a function or a module"
        )


def flag(value: Any, name: str) -> bool:
    """True or False; 0, 1 and arrays are refused."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        )
    return bool(value)


def number(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, *, closed: str = "both"
) -> float:
    """One number that is read now, as a Python float, between `low` and `high` as in `in_range`;
    NaN lies in no range but the default one.
    """
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        result = float(value)  # in double precision, and never traced
    else:
        array = floating(value, name, 0)
        if not concrete(array):
            raise TypeError(
                f"{name} must be a number that can be read, got one that is traced: it is not "
                "swept in one run"
            )
        result = float(np.asarray(array))
    if (low, high) != (-math.inf, math.inf):
        _require_range(result, name, low, high, closed)
    return result


def file_name(value: Any, name: str) -> str | os.PathLike:
    """The name of a file. An open file, and a number, which `open` accepts, are refused."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"{name} must be the name of a file, got {type(value).__name__}: pass a string or a "
            "pathlib.Path"
        )
    return value


def float_dtype(value: Any, of: str, why: str = "") -> np.dtype:
    """A dtype, floating and of at least 32 bits, by default JAX's float; `of` names what has it."""
    try:
        dtype = jnp.dtype(jnp.result_type(float) if value is None else value)
    except TypeError:
        raise TypeError(
            f"dtype, that of the {of}, must be one such as jnp.float32, got {value!r}"
        ) from None
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"dtype, that of the {of}, must be a floating dtype of at least 32 bits, got "
            f"{dtype}{why}"
        )
    return dtype


def state_dtype(dtype: Any) -> np.dtype:
    """The dtype of states: floating, of at least 32 bits, by default JAX's float. **Raises:**
    `ValueError`, `TypeError` for another.
    """
    why = (
        ": steps near t = 1 are lost in fewer. The network may compute in any precision of its own."
    )
    return float_dtype(dtype, "states", why)


def count(value: Any, name: str, at_least: int = 1) -> int:
    """A whole number of at least `at_least`, as a Python int, such as one that decides a shape."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name} must be a whole number, got {value!r} of type {type(value).__name__}"
        )
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def key(key: Any) -> Array:
    """A single typed PRNG key."""
    how = "pass jax.random.key(seed) as the first argument"
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        legacy = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32
        got = "an old-style uint32 key" if legacy else f"{type(key).__name__}"
        raise TypeError(f"expected a typed PRNG key, got {got}: {how}")
    if key.shape != ():
        raise ValueError(f"expected one key, got an array of keys of shape {key.shape}: {how}")
    return key
