"""Shardings of the particle axis and of the batch: checks, placement, arrays of several hosts."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tiltjax import _checks
from tiltjax._checks import instance


def check_sharding(sharding: Any) -> None:
    """**Raises:** `TypeError` for what is not a `NamedSharding`, `ValueError` for a mesh whose axes
    are not Auto.
    """
    if sharding is None:
        return
    _checks.instance(
        sharding,
        jax.sharding.NamedSharding,
        "sharding",
        'NamedSharding(mesh, PartitionSpec("batch"))',
    )
    auto_axes(sharding)


def placed(tree: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """The arrays of a tree where a sharding has them; over several hosts each of them gives its own
    copy of the same values.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
            )
        if (
            isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        ):  # such as the parameters of an earlier fit
            return jax.device_put(leaf, sharding)
        own = np.asarray(leaf)
        return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])

    return jax.tree.map(place, tree)


def check_divides(sharding: Any, shape: tuple[int, ...], name: str) -> None:
    """Refuse what is neither a sharding nor `None`, and one that does not divide `shape`, the first
    entry of which is called `name`: the partitioner would leave the whole on every device.
    """
    if sharding is None:
        return
    instance(
        sharding,
        jax.sharding.Sharding,
        "sharding",
        "such as jax.sharding.NamedSharding(mesh, spec)",
    )
    auto_axes(sharding)
    if (error := _indivisible(sharding, shape)) is None:
        return
    # The parts are the least number that can be divided; no other has a whole multiple of rows on
    # each of them.
    parts = next(
        (
            n
            for n in range(1, sharding.num_devices + 1)
            if not _indivisible(sharding, (n, *shape[1:]))
        ),
        0,
    )
    if not parts:  # another axis of the state is at fault, or the sharding has more axes than it
        raise ValueError(f"an array of shape {shape} cannot be divided by {sharding}: {error}")
    below = shape[0] // parts * parts
    near = f"{below} or {below + parts}" if below else f"{parts}"
    raise ValueError(
        f"{name} = {shape[0]} cannot be divided over {parts} devices, each of which would hold all "
        f"of them: take {near}"
    )


def auto_axes(sharding: jax.sharding.Sharding) -> None:
    """Refuse a mesh with axes that are not left to the partitioner."""
    mesh = getattr(sharding, "mesh", None)
    if mesh is not None and any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        names = ", ".join(f'"{name}"' for name in mesh.axis_names)
        raise ValueError(
            f"the axes of the mesh must be Auto, got {mesh.axis_types}: "
            f"jax.make_mesh({tuple(mesh.axis_sizes)}, ({names},), "
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


def addressable(array: Any) -> np.ndarray:
    """The entries of an array that this process holds, in one row: all of them, unless they are
    spread over several hosts.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.concatenate([np.ravel(shard.data) for shard in array.addressable_shards])
    return np.ravel(np.asarray(array))


def gathered(array: Any) -> np.ndarray:
    """The whole of an array, on every host that asks; if several hold it, all of them have to."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
