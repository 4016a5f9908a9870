"""Pytrees of a user's functions and networks, casts of pytrees, and comparisons."""

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tiltjax import _repr
from tiltjax._checks import concrete, function

T = TypeVar("T")


class KeepsDtype(_repr.Printable):
    """A module whose arrays keep their dtype: `cast` does not change them."""


class Function(KeepsDtype):
    """A user's callable as a pytree: its arrays are leaves, everything else is static.

    A plain function has no arrays and is compared by identity: a new function object causes a new
    trace. A Flax NNX or Equinox module contributes its parameters as leaves, so that a change of
    them causes no new trace.
    """

    arrays: list
    static: tuple = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def __init__(self, fn: Callable, name: str = "fn"):
        function(fn, name)
        _refuse_captured_modules(fn)
        # The object of a method is a part, so that the arrays of a module are also leaves of
        # module.method.
        parts = (fn.__func__, fn.__self__) if inspect.ismethod(fn) else (fn,)
        leaves, self.treedef = jax.tree.flatten(parts)
        self.arrays = [leaf if eqx.is_array(leaf) else None for leaf in leaves]
        self.static = tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves)
        try:
            hash(self.static)
        except TypeError:
            raise TypeError(
                f"a callable must be hashable, got an unhashable {type(fn).__name__}: wrap it in a "
                "function, or make it an equinox.Module or a flax.nnx.Module"
            ) from None

    def __call__(self, *args: Any) -> Any:
        fn, *bound = self.parts()
        return fn(*bound, *args)

    def _call(self, **given: Any) -> str:
        fn, *bound = self.parts()
        name = getattr(fn, "__qualname__" if bound else "__name__", type(fn).__name__)
        return _repr.network(name, self.arrays)

    def parts(self) -> tuple:
        """The callable, or the function and the object of a method."""
        pairs = zip(self.arrays, self.static, strict=True)
        leaves = [static if array is None else array for array, static in pairs]
        return jax.tree.unflatten(self.treedef, leaves)

    @classmethod
    def of(cls, fn: Callable, *bound: Any) -> "Function":
        """The inverse of `parts`."""
        return cls(types.MethodType(fn, *bound) if bound else fn)


def _refuse_captured_modules(fn: Callable) -> None:
    """Raise a `TypeError` for a function that captures a Flax module. The module would be compiled
    with its current weights, and would not change after training.
    """
    if not inspect.isfunction(fn) or "flax.nnx" not in sys.modules:
        return
    captured = inspect.getclosurevars(fn)
    for name, value in {**captured.nonlocals, **captured.globals}.items():
        if isinstance(value, sys.modules["flax.nnx"].Module):
            raise TypeError(
                f"the function uses the Flax module {name!r} from outside, so changes of its "
                "weights have no effect. Pass the module itself, or pass it as an argument, "
                f"jax.tree_util.Partial(lambda {name}, *args: ..., {name}); for a model use "
                f"from_velocity(lambda {name}, t, x: ..., {name}, shape=...)"
            )


def cast(tree: T, dtype: Any) -> T:
    """`tree` with every floating array in `dtype`, except for arrays inside a `KeepsDtype`, such as
    those of a network.
    """

    def convert(leaf: Any) -> Any:
        floating = eqx.is_inexact_array(leaf) and not jnp.issubdtype(
            leaf.dtype, jnp.complexfloating
        )
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(convert, tree, is_leaf=lambda node: isinstance(node, KeepsDtype))


def same(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure and, if they can be read, equal arrays (to single
    precision).
    """
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


def in_training_mode(network: Any) -> str | None:
    """The part of a Flax module that is in training mode, and thus changes when it is called;
    `None` if there is none.
    """
    for path, module in sys.modules["flax.nnx"].iter_modules(network):
        if (
            getattr(module, "deterministic", True) is False
            or getattr(module, "use_running_average", True) is False
        ):
            return f"{type(module).__name__} ({'/'.join(map(str, path)) or 'the module itself'})"
    return None
