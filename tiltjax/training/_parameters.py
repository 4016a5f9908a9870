r"""What a network is to its training: arrays that are trained, by name, and the rest.

    parameters, frame = split_parameters(network)    `{"layers.0.kernel": ...}`, and the rest
    frame.network(parameters)      the network again, with other arrays if need be

Of Flax modules, of Equinox modules, and of any other pytree alike. Flax is not imported here: only
who has done so can have an object of it.
"""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from tiltjax import _pytree
from tiltjax._pytree import in_training_mode


class Frame(_pytree.Foreign):
    """A network without the arrays that are trained; built by `split_parameters`."""

    rest: list
    static: tuple = eqx.field(static=True)
    names: tuple[str | None, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def network(self, parameters: dict[str, Array]) -> Any:
        """The network with these parameters."""
        leaves = []
        for name, array, still in zip(self.names, self.rest, self.static, strict=True):
            leaves.append(
                parameters[name] if name is not None else still if array is None else array
            )
        return jax.tree.unflatten(self.treedef, leaves)


def split_parameters(network: PyTree) -> tuple[dict[str, Array], Frame]:
    """The trained arrays of a network by the names of their places, and what is left.

    Trained are the `nnx.Param`s of Flax modules, and all floating arrays of everything else:
    Equinox modules, the parameters in a `jax.tree_util.Partial(fn, params)`.

    **Raises:** `ValueError` for a network without any, in training mode, or with one array in two
    places or of less than 32 bits.
    """
    _refuse_training_mode(network)
    flags = []
    nnx = sys.modules.get("flax.nnx")
    is_variable = lambda node: nnx is not None and isinstance(node, nnx.Variable)
    for node in jax.tree.leaves(network, is_leaf=is_variable):
        still = nnx is not None and is_variable(node) and not isinstance(node, nnx.Param)
        flags += [eqx.is_inexact_array(leaf) and not still for leaf in jax.tree.leaves(node)]
    located, treedef = jax.tree_util.tree_flatten_with_path(network)
    places = [
        jax.tree_util.keystr(where, simple=True, separator=".").removesuffix(".value")
        for where, _ in located
    ]
    names = tuple(place if flag else None for place, flag in zip(places, flags, strict=True))
    leaves = [leaf for _, leaf in located]
    parameters = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name is not None}
    if not parameters:
        raise ValueError(
            f"{type(network).__name__} has no parameters to train: pass a module, or "
            "jax.tree_util.Partial(fn, params)"
        )
    seen: dict[int, str] = {}
    for name, leaf in parameters.items():
        if (twin := seen.setdefault(id(leaf), name)) != name:
            raise ValueError(
                f"{twin} and {name} are one array, and would be trained apart: use it in one place "
                "of the network, or copy it"
            )
        if jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"parameters must have at least 32 bits, got {leaf.dtype} in {name}: small updates "
                "are lost in fewer. The network may "
                "compute in any precision, such as nnx.Linear(..., dtype=jnp.bfloat16)"
            )
    rest = [
        leaf if eqx.is_array(leaf) and name is None else None
        for leaf, name in zip(leaves, names, strict=True)
    ]
    static = tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves)
    return parameters, Frame(rest, static, names, treedef)


def _refuse_training_mode(network: PyTree) -> None:
    if (nnx := sys.modules.get("flax.nnx")) is None:
        return
    is_module = lambda node: isinstance(node, nnx.Module)
    for whole in filter(is_module, jax.tree.leaves(network, is_leaf=is_module)):
        if (part := in_training_mode(whole)) is not None:
            raise ValueError(
                f"{part} is in training mode: dropout and running statistics change a module while "
                "it is called, and a training step here "
                "is a function of its parameters alone. Call .eval() on the network first"
            )
