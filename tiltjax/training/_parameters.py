r"""The trained arrays of a network, by name, and the rest of the network.

    parameters, template = split_parameters(network)    `{"layers.0.kernel": ...}`, and the rest
    network = template.merge(parameters)                with these or other parameters

This works for Flax modules, Equinox modules and any other pytree. The module does not import Flax:
an object of Flax exists only if the program has imported Flax.
"""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from tiltjax import _pytree


class Template(_pytree.KeepsDtype):
    """A network without its trained arrays; made by `split_parameters`."""

    rest: PyTree
    names: tuple[str, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def merge(self, parameters: dict[str, Array]) -> Any:
        """The network with these parameters."""
        trained = jax.tree.unflatten(self.treedef, [parameters[name] for name in self.names])
        return eqx.combine(trained, self.rest)


def split_parameters(network: PyTree) -> tuple[dict[str, Array], Template]:
    """The trained arrays of a network, by the names of their places, and the rest of the network.

    The trained arrays are the `nnx.Param`s of Flax modules, and all floating arrays of everything
    else, such as Equinox modules and the parameters in a `jax.tree_util.Partial(fn, params)`.

    **Raises:** `ValueError` for a network without trained arrays, in training mode, with one array
    in two places, or with arrays of less than 32 bits.
    """
    _refuse_training_mode(network)
    trained, rest = eqx.partition(network, _is_trained(network))
    located, treedef = jax.tree_util.tree_flatten_with_path(trained)
    name = lambda where: jax.tree_util.keystr(where, simple=True, separator=".")
    parameters = {name(where).removesuffix(".value"): leaf for where, leaf in located}
    if not parameters:
        raise ValueError(
            f"{type(network).__name__} has no parameters to train: pass a module, or "
            "jax.tree_util.Partial(fn, params)"
        )
    _check_parameters(parameters)
    return parameters, Template(rest, tuple(parameters), treedef)


def _is_trained(network: PyTree) -> PyTree:
    """A tree with True for each leaf of the network that is trained."""
    nnx = sys.modules.get("flax.nnx")
    is_variable = lambda node: nnx is not None and isinstance(node, nnx.Variable)

    def flags(node: Any) -> Any:
        frozen = nnx is not None and is_variable(node) and not isinstance(node, nnx.Param)
        return jax.tree.map(lambda leaf: eqx.is_inexact_array(leaf) and not frozen, node)

    return jax.tree.map(flags, network, is_leaf=is_variable)


def _check_parameters(parameters: dict[str, Array]) -> None:
    names: dict[int, str] = {}
    for name, leaf in parameters.items():
        if (other := names.setdefault(id(leaf), name)) != name:
            raise ValueError(
                f"{other} and {name} are the same array, but training would make them differ: use "
                "the array in one place of the network, or copy it"
            )
        if jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"parameters must have at least 32 bits, got {leaf.dtype} in {name}, where small "
                "updates are lost. The network may compute in any precision, such as "
                "nnx.Linear(..., dtype=jnp.bfloat16)"
            )


def _refuse_training_mode(network: PyTree) -> None:
    if (nnx := sys.modules.get("flax.nnx")) is None:
        return
    is_module = lambda node: isinstance(node, nnx.Module)
    for module in filter(is_module, jax.tree.leaves(network, is_leaf=is_module)):
        if (part := _pytree.in_training_mode(module)) is not None:
            raise ValueError(
                f"{part} is in training mode, where dropout and running statistics change a "
                "module in each call, but a training step must be a function of the parameters "
                "alone: call .eval() on the network first"
            )
