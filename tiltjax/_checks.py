"""Checks of arguments: numbers, counts, flags, keys, functions.

*Structure* (types, shapes, keys, counts) is checked whenever Python runs, also while JAX traces.
*Values* (signs, finiteness, ranges) are checked if they are concrete, as at construction. Values
that a `jit`, `vmap` or `grad` of the caller traces are not checked.

Every message says what was expected, what was passed, and how to fix it.
"""

import functools
import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# What a constructor accepts as an array.
Numbers = Array | np.ndarray | float | Sequence[Any]


def concrete(value: Any) -> bool:
    """Whether the values can be read now, because no leaf is traced. Read them with NumPy: inside a
    `jit`, JAX traces operations on concrete arrays too.
    """
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def floating(value: Any, name: str, ndim: int | tuple[int, ...] | None = None) -> Array:
    """`value` as a floating array (integers become floats), with its rank checked."""
    try:
        array = _on_device(value)
    except (TypeError, ValueError, OverflowError) as error:
        got = f"{name} must be numbers, got {type(value).__name__}"
        if type(value) is np.ndarray:
            raise TypeError(
                f"{got} of dtype {value.dtype}, which JAX does not have: convert it by "
                ".astype(float)"
            ) from None
        raise TypeError(f"{got}: {error}") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        if not (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_):
            raise TypeError(f"{name} must be real numbers, got dtype {array.dtype}")
        array = array.astype(jnp.result_type(float))
    if getattr(array, "weak_type", False):  # else 3.0 and jnp.float32(3.0) compile two programs
        array = jax.lax.convert_element_type(array, array.dtype)
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and array.ndim not in allowed:
        expected = " or ".join(f"{n}-dimensional" for n in allowed)
        raise ValueError(f"{name} must be {expected}, got shape {array.shape}")
    return array


def _on_device(value: Any) -> Array:
    """`jnp.asarray` of a copy. For NumPy arrays and Python numbers it avoids the program that
    `jnp.asarray` compiles for each new shape.
    """
    is_numpy = type(value) is np.ndarray or isinstance(value, np.generic)
    value = native(value)
    if not is_numpy and not _is_plain(value):
        return jnp.asarray(value)
    array = np.array(value)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        return jnp.asarray(value)  # JAX explains what is wrong
    if not (is_numpy and array.dtype.kind == "f"):
        # JAX's integers may be too short for a number that a float can represent.
        array = array.astype(jnp.result_type(float))
    return jax.device_put(array)


def native(value: Any) -> Any:
    """A NumPy array or number in the byte order of this machine, the only one that JAX has; other
    values unchanged. FITS and IDX files, for example, hold big-endian numbers.
    """
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value


def _is_plain(value: Any) -> bool:
    """Whether the value is a Python number, or a nested list of Python numbers."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in (int, float, bool)


def finite(value: Any, name: str, ndim: int | tuple[int, ...] | None = None) -> Array:
    """`floating`, with a check that every entry is finite, if the entries can be read."""
    array = floating(value, name, ndim)
    if concrete(array) and not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite, got {np.asarray(array)}")
    return array


def in_range(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, *, closed: str = "both"
) -> Array:
    """A finite scalar between `low` and `high`. `closed` names the ends that belong to the range:
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
    """Raise a `ValueError` if the shape of an array is not `expected`."""
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
    """Raise a `TypeError` if `value` is not a `kind`; `hint` tells how to make one."""
    if not isinstance(value, kind):
        got = type(value).__name__
        if isinstance(value, type):
            got = f"the class {value.__name__} itself"
        elif isinstance(value, str | int | float):
            got = f"{got} {value!r}"
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {got}: {hint}")


def function(value: Any, name: str) -> None:
    """Raise a `TypeError` if `value` is not callable."""
    if not callable(value):
        raise TypeError(
            f"{name}: expected a callable, got {type(value).__name__}: pass a function or a module"
        )


def flag(value: Any, name: str) -> bool:
    """True or False. **Raises:** `TypeError` for other values, also for 0, 1 and arrays."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        )
    return bool(value)


def number(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, *, closed: str = "both"
) -> float:
    """A concrete number as a Python float, between `low` and `high` as in `in_range`. NaN lies in
    no range except the default range.
    """
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        result = float(value)  # in double precision, and never traced
    else:
        array = floating(value, name, 0)
        if not concrete(array):
            raise TypeError(
                f"{name} must be a concrete number, got a traced one: pass it from outside of jit, "
                "vmap and grad"
            )
        result = float(np.asarray(array))
    if (low, high) != (-math.inf, math.inf):
        _require_range(result, name, low, high, closed)
    return result


def file_name(value: Any, name: str) -> str | os.PathLike:
    """The name of a file. **Raises:** `TypeError` for an open file, or for a number, which `open`
    would accept.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"{name} must be the name of a file, got {type(value).__name__}: pass a string or a "
            "pathlib.Path"
        )
    return value


def float_dtype(value: Any, of: str, why: str = "") -> np.dtype:
    """A floating dtype of at least 32 bits, by default JAX's float; `of` names its owner in
    messages.
    """
    try:
        dtype = jnp.dtype(jnp.result_type(float) if value is None else value)
    except TypeError:
        raise TypeError(
            f"the dtype of the {of} must be a dtype such as jnp.float32, got {value!r}"
        ) from None
    dtype = dtype if dtype.isnative else dtype.newbyteorder("=")
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"the dtype of the {of} must be a floating dtype of at least 32 bits, got {dtype}{why}"
        )
    return dtype


def state_dtype(dtype: Any) -> np.dtype:
    """The dtype of states: floating, of at least 32 bits, by default JAX's float. **Raises:**
    `ValueError`, `TypeError` for other dtypes.
    """
    why = ", as fewer bits lose the steps near t = 1. The network may compute in its own precision."
    return float_dtype(dtype, "states", why)


def count(value: Any, name: str, at_least: int = 1) -> int:
    """A whole number of at least `at_least`, as a Python int, for values that decide shapes or
    loops.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name} must be a whole number, got {value!r} of type {type(value).__name__}"
        )
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


_THREEFRY = "threefry2x32"


def key(key: Any) -> Array:
    """A single typed PRNG key, of threefry. The numbers of other implementations (`rbg`) depend on
    how many keys are mapped over, so such a key is the seed of a threefry key.
    """
    how = "pass jax.random.key(seed) as the first argument"
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        legacy = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32
        got = "an old-style uint32 key" if legacy else f"{type(key).__name__}"
        raise TypeError(f"expected a typed PRNG key, got {got}: {how}")
    if key.shape != ():
        raise ValueError(f"expected one key, got an array of keys of shape {key.shape}: {how}")
    if str(jax.random.key_impl(key)) == _THREEFRY:
        return key
    words = jax.random.key_data(key)
    first = jax.random.wrap_key_data(words[:2], impl=_THREEFRY)
    return functools.reduce(jax.random.fold_in, words[2:], first)


def warn(message: str) -> None:
    """A `UserWarning` that points to the line of the user, the first caller outside of the
    library.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].split(".")[0] in _PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


_PACKAGES = ("tiltjax", "theory", "equinox")  # equinox calls the methods of its modules
