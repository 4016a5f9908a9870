"""What a user hands in, checked once: callables, numbers, keys, counts, times.

Two rules decide when a mistake is found. *Structure* (types, shapes, keys, counts) is checked whenever Python
runs, also while tracing. *Values* (signs, finiteness, order) are checked where they are concrete, which is at
construction: a value that is traced by the caller's own `jit`, `vmap` or `grad` passes through unread.

Every message says what was got, what was expected, and how to fix it.
"""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

T = TypeVar("T")

# What a constructor takes for an array.
Numbers = Array | np.ndarray | float | Sequence[Any]


class Foreign(eqx.Module):
    """What a user brought along: verbs leave the dtype of its arrays alone (`cast`)."""


class Function(Foreign):
    """A user's callable as a pytree: its arrays are leaves, everything else is static.

    A bare function has no arrays and is told apart by identity (a new function object is a new trace); a Flax NNX
    or Equinox module contributes its parameters as leaves, so that changing them traces nothing anew.
    """

    arrays: list
    static: tuple = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def __init__(self, fn: Callable, name: str = "fn"):
        function(fn, name)
        _refuse_captured_modules(fn)
        # A method brings its object along: the arrays of a module are arguments also through module.method.
        parts = (fn.__func__, fn.__self__) if inspect.ismethod(fn) else (fn,)
        leaves, self.treedef = jax.tree.flatten(parts)
        is_array = [eqx.is_array(leaf) for leaf in leaves]
        self.arrays = [leaf if keep else None for leaf, keep in zip(leaves, is_array, strict=True)]
        self.static = tuple(None if keep else leaf for leaf, keep in zip(leaves, is_array, strict=True))
        try:
            hash(self.static)
        except TypeError:
            raise TypeError(
                f"a callable must be hashable to be compiled, got an unhashable {type(fn).__name__}: "
                "wrap it in a function, or make it an equinox.Module or a flax.nnx.Module"
            ) from None

    def __call__(self, *args: Any) -> Any:
        pairs = zip(self.arrays, self.static, strict=True)
        leaves = [static if array is None else array for array, static in pairs]
        fn, *bound = jax.tree.unflatten(self.treedef, leaves)
        return fn(*bound, *args)


def _refuse_captured_modules(fn: Callable) -> None:
    """A Flax module that a function merely closes over would be compiled in as it is now, and stay so after training."""
    if not inspect.isfunction(fn) or "flax.nnx" not in sys.modules:
        return
    captured = inspect.getclosurevars(fn)
    for name, value in {**captured.nonlocals, **captured.globals}.items():
        if isinstance(value, sys.modules["flax.nnx"].Module):
            raise TypeError(
                f"the function uses the Flax module {name!r} from outside, and would not see its weights change: pass the module "
                f"itself, or as an argument, jax.tree_util.Partial(lambda {name}, *args: ..., {name}); models also take "
                f"from_velocity(lambda {name}, t, x: ..., {name}, shape=...)"
            )


def cast(tree: T, dtype: Any) -> T:
    """Every floating array of `tree` in `dtype`, except inside `Foreign`: networks keep their own."""

    def convert(leaf: Any) -> Any:
        floating = eqx.is_inexact_array(leaf) and not jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(convert, tree, is_leaf=lambda node: isinstance(node, Foreign))


def concrete(value: Any) -> bool:
    """Whether the values can be read now (no leaf is being traced). Read them with NumPy: inside someone's `jit`, an operation of
    JAX on a concrete array is traced all the same."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def same(a: Any, b: Any) -> bool:
    """Whether two pytrees have one structure and, where they can be read, equal arrays (to single precision)."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    if not concrete((a, b)):
        return True

    def equal(x: Any, y: Any) -> bool:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # such as the streams of a Flax module
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return np.shape(x) == np.shape(y) and np.allclose(np.asarray(x), np.asarray(y), rtol=1e-6)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x is y or equal(x, y) for x, y in pairs)


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
    """`jnp.asarray`, which compiles a program for each new shape, without one for plain numbers. A copy: what the caller does to its own
    array afterwards is not seen."""
    mine = type(value) is np.ndarray or isinstance(value, np.generic)
    if not mine and not _written(value):
        return jnp.asarray(value)
    array = np.array(value)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8 or not array.dtype.isnative:  # JAX says what is wrong
        return jnp.asarray(value)
    # JAX's integers may be too short for a number that a float holds.
    return jax.device_put(array if mine and array.dtype.kind == "f" else array.astype(jnp.result_type(float)))


def _written(value: Any) -> bool:
    """Whether a number, or nested lists of them, is made of Python's own."""
    if isinstance(value, list | tuple):
        return all(map(_written, value))
    return type(value) in (int, float, bool)


def finite(value: Any, name: str, ndim: int | tuple[int, ...] | None = None) -> Array:
    """`floating`, with every entry finite where that can be read."""
    array = floating(value, name, ndim)
    if concrete(array) and not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite, got {np.asarray(array)}")
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


def instance(value: Any, kind: type, name: str, hint: str) -> None:
    """Refuse what is no `kind`, saying what would be."""
    if not isinstance(value, kind):
        got = f"the class {value.__name__} itself" if isinstance(value, type) else type(value).__name__
        got = f"{got} {value!r}" if isinstance(value, str | int | float) else got
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {got}: {hint}")


def function(value: Any, name: str) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, got {type(value).__name__}: pass a function or a module")


def flag(value: Any, name: str) -> bool:
    """True or False, and nothing that is merely taken for it."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return bool(value)


def number(value: Any, name: str) -> float:
    """One number that is read now, as a Python float; NaN and infinity are for the caller to judge."""
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return float(value)  # an array made of it inside of someone's jit would be traced
    array = floating(value, name, 0)
    if not concrete(array):
        raise TypeError(f"{name} must be a number that can be read, got one that is traced: it is not swept in one run")
    return float(np.asarray(array))


def file_name(value: Any, name: str) -> str | os.PathLike:
    """The name of a file: neither an open one nor a number, which `open` would take for one."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"{name} must be the name of a file, got {type(value).__name__}: pass a string or a pathlib.Path"
        )
    return value


def float_dtype(value: Any, of: str, why: str = "") -> np.dtype:
    """The `dtype` of something, floating and of at least 32 bits; by default JAX's float."""
    try:
        dtype = jnp.dtype(jnp.result_type(float) if value is None else value)
    except TypeError:
        raise TypeError(f"dtype, that of the {of}, must be one such as jnp.float32, got {value!r}") from None
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise ValueError(f"dtype, that of the {of}, must be a floating dtype of at least 32 bits, got {dtype}{why}")
    return dtype


def state_dtype(dtype: Any) -> np.dtype:
    """The dtype of states: floating, of at least 32 bits, by default JAX's float. **Raises:** `ValueError`, `TypeError` for another."""
    why = ": steps near t = 1 are lost in fewer. The network may compute in any precision of its own."
    return float_dtype(dtype, "states", why)


def spread_over(sharding: Any, shape: tuple[int, ...], name: str) -> None:
    """Refuse what is neither a sharding nor `None`, and one that does not divide `shape`, the first entry of which is called `name`:
    the partitioner would leave the whole on every device."""
    if sharding is None:
        return
    instance(sharding, jax.sharding.Sharding, "sharding", "such as jax.sharding.NamedSharding(mesh, spec)")
    auto_axes(sharding)
    if (error := _indivisible(sharding, shape)) is None:
        return
    # The parts are the least number that can be divided; no other has a whole multiple of rows on each of them.
    parts = next((n for n in range(1, sharding.num_devices + 1) if not _indivisible(sharding, (n, *shape[1:]))), 0)
    if not parts:  # another axis of the state is at fault, or the sharding has more axes than it
        raise ValueError(f"an array of shape {shape} cannot be divided by {sharding}: {error}")
    below = shape[0] // parts * parts
    near = f"{below} or {below + parts}" if below else f"{parts}"
    raise ValueError(
        f"{name} = {shape[0]} cannot be divided over {parts} devices, each of which would hold all of them: take {near}"
    )


def auto_axes(sharding: jax.sharding.Sharding) -> None:
    """Refuse a mesh with axes that are not left to the partitioner."""
    mesh = getattr(sharding, "mesh", None)
    if mesh is not None and any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        names = ", ".join(f'"{name}"' for name in mesh.axis_names)
        raise ValueError(
            f"the axes of the mesh must be Auto, got {mesh.axis_types}: jax.make_mesh({tuple(mesh.axis_sizes)}, ({names},), "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})"
        )


def replicated(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    """The same on every device of the mesh."""
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _indivisible(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> ValueError | None:
    try:
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding.check_compatible_aval(shape)  # that there are as many axes
        sharding.shard_shape(shape)
    except ValueError as error:
        return error
    return None


def held(array: Any) -> np.ndarray:
    """The entries of an array that this process holds, in one row: all of them, unless they are spread over several hosts."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.concatenate([np.ravel(shard.data) for shard in array.addressable_shards])
    return np.ravel(np.asarray(array))


def home(array: Any) -> np.ndarray:
    """The whole of an array, on every host that asks; if several hold it, all of them have to."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def count(value: Any, name: str) -> int:
    """A whole number of at least one, as a Python int (it decides shapes)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def typed_key(key: Any) -> Array:
    """A single typed PRNG key."""
    how = "pass jax.random.key(seed) as the first argument"
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        legacy = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32
        got = "an old-style uint32 key" if legacy else f"{type(key).__name__}"
        raise TypeError(f"expected a typed PRNG key, got {got}: {how}")
    if key.shape != ():
        raise ValueError(f"expected one key, got an array of keys of shape {key.shape}: {how}")
    return key


def time_grid(times: Any, steps: int | None) -> Array:
    """The times of a run, increasing inside [0, 1]: the given ones, or `linspace(1e-3, 1, steps + 1)` with 100 steps by default."""
    if not concrete(times):
        return _time_grid(times, steps)
    with jax.ensure_compile_time_eval():  # so that they can be read inside of someone's jit
        return _time_grid(times, steps)


def _time_grid(times: Any, steps: int | None) -> Array:
    if times is None:
        grid = np.linspace(1e-3, 1.0, count(100 if steps is None else steps, "steps") + 1)
        return jax.device_put(grid.astype(jnp.result_type(float)))
    if steps is not None:
        raise ValueError(
            f"give steps or times, not both, got steps = {steps} and times: the times say how many steps there are"
        )
    times = finite(times, "times", 1)
    if len(times) < 2:
        raise ValueError(f"times must hold at least a start and an end, got {len(times)} entries")
    if concrete(times):
        values = np.asarray(times)
        if values[0] < 0 or values[-1] > 1:
            raise ValueError(f"times must lie in [0, 1], got [{values.min():g}, {values.max():g}]")
        if not np.all(np.diff(values) > 0):
            raise ValueError(f"times must increase strictly from noise (0) to data (1), got {values}")
    return times
