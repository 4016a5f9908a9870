"""Shardings of the particle axis and of the batch: checks, placement, arrays of several hosts."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from tiltjax import _checks


def check_sharding(sharding: Any) -> None:
    """Check a sharding or `None`. **Raises:** `TypeError` for other values than a `NamedSharding`,
    `ValueError` for a mesh whose axes are not Auto.
    """
    if sharding is None:
        return
    how = 'NamedSharding(mesh, PartitionSpec("batch"))'
    _checks.instance(sharding, jax.sharding.NamedSharding, "sharding", how)
    _check_auto_axes(sharding)


def placed(tree: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """A tree whose arrays are placed by a sharding; other leaves are unchanged. With several hosts,
    each host passes its own copy of the same values.
    """
    is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray)
    arrays, others = eqx.partition(tree, is_array)
    if sharding.is_fully_addressable:
        return eqx.combine(jax.device_put(arrays, sharding), others)

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)  # such as the parameters of an earlier fit
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return eqx.combine(jax.tree.map(place, arrays), others)


def check_divides(sharding: Any, shape: tuple[int, ...], name: str) -> None:
    """Check that `sharding` is `None` or a sharding that divides `shape`, whose first entry is
    called `name`. Otherwise the partitioner would put the whole array on every device. **Raises:**
    `TypeError`, `ValueError`.
    """
    if sharding is None:
        return
    how = "such as jax.sharding.NamedSharding(mesh, spec)"
    _checks.instance(sharding, jax.sharding.Sharding, "sharding", how)
    _check_auto_axes(sharding)
    if (error := _indivisible(sharding, shape)) is None:
        return
    # `parts` is the least number of rows that can be divided. All others are its multiples.
    sizes = range(1, sharding.num_devices + 1)
    parts = next((n for n in sizes if not _indivisible(sharding, (n, *shape[1:]))), 0)
    if not parts:  # the fault is another axis of the state, or too many axes of the sharding
        raise ValueError(f"an array of shape {shape} cannot be divided by {sharding}: {error}")
    below = shape[0] // parts * parts
    near = f"{below} or {below + parts}" if below else f"{parts}"
    raise ValueError(
        f"{name} = {shape[0]} cannot be divided over {parts} devices, so each device would hold "
        f"the whole array: take {near}"
    )


def _check_auto_axes(sharding: jax.sharding.Sharding) -> None:
    """Raise a `ValueError` for a mesh with axes that are not left to the partitioner."""
    mesh = getattr(sharding, "mesh", None)
    if mesh is not None and any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        names = ", ".join(f'"{name}"' for name in mesh.axis_names)
        raise ValueError(
            f"the axes of the mesh must be Auto, got {mesh.axis_types}: "
            f"jax.make_mesh({tuple(mesh.axis_sizes)}, ({names},), "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})"
        )


def replicated(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    """The sharding that puts the whole array on every device of the mesh."""
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _indivisible(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> ValueError | None:
    try:
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding.check_compatible_aval(shape)  # that there are as many axes
        sharding.shard_shape(shape)
    except ValueError as error:
        return error
    return None


def addressable(array: Any) -> np.ndarray:
    """The entries of an array that this process holds, as one row. These are all entries, unless
    the array is spread over several hosts.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.concatenate([np.ravel(shard.data) for shard in array.addressable_shards])
    return np.ravel(np.asarray(array))


def gathered(array: Any) -> np.ndarray:
    """The whole array. If it is spread over several hosts, all hosts must call this function."""
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    if not (whole or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
