"""Pytrees of a user's functions and networks, casts of pytrees, and comparisons."""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from tiltjax import _checks, _repr
from tiltjax._captured import captured, in_library, is_flax, is_torch
from tiltjax._checks import concrete, function

T = TypeVar("T")


class KeepsDtype(_repr.Printable):
    """A module whose arrays keep their dtype: `cast` does not change them."""

    _copies: ClassVar[bool] = True  # it does not share modules that training changes in place


class Function(KeepsDtype):
    """A user's callable as a pytree: its arrays are leaves, everything else is static.

    A plain function has no arrays. It is compared by identity: another function object causes a new
    trace, another value of a global variable does not. A Flax NNX or Equinox module, its bound
    method, and a `functools.partial` of it contribute the parameters as leaves, so that a change of
    them causes no new trace.
    """

    arrays: list
    static: tuple = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def __init__(self, fn: Callable, name: str = "fn"):
        function(fn, name)
        if is_torch(getattr(fn, "__self__", fn)):
            raise TypeError(
                f"{name}: JAX cannot trace a PyTorch module, got "
                f"{type(getattr(fn, '__self__', fn)).__name__}: wrap it, "
                "tiltjax.external.from_torch(module.eval()), with batched=True for a network"
            )
        # The object of a method is a part, so that the arrays of a module are also leaves of
        # module.method.
        parts = (fn.__func__, fn.__self__) if inspect.ismethod(fn) else (opened(fn),)
        refuse_outside(parts)
        refuse_training_mode(parts)
        leaves, self.treedef = jax.tree.flatten(parts)
        leaves = [_numbers(leaf) for leaf in leaves]
        self.arrays = [leaf if eqx.is_array(leaf) else None for leaf in leaves]
        self.static = tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves)
        try:
            hash((self.static, self.treedef))
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

    # Copies and pickles hold a tree in the place of the tree definition, because Equinox compares a
    # sentinel in the definition by identity.

    def __getstate__(self) -> dict[str, Any]:
        places = jax.tree.unflatten(self.treedef, range(len(self.static)))
        return vars(self) | {"treedef": places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"treedef": jax.tree.structure(state["treedef"])})


def opened(tree: T) -> T:
    """`tree` with every bound method and `functools.partial` of a network as a
    `jax.tree_util.Partial`, which is called in the same way and whose arrays are leaves.
    """

    def convert(node: Any) -> Any:
        if isinstance(node, types.MethodType) and _has_arrays(node.__self__):
            return Partial(node.__func__, opened(node.__self__))
        if isinstance(node, functools.partial) and (
            isinstance(node, Partial) or _has_arrays((node.func, node.args, node.keywords))
        ):
            args, keywords = opened((node.args, node.keywords))
            if _has_arrays(node.func):
                return Partial(_apply, opened(node.func), *args, **keywords)
            return Partial(node.func, *args, **keywords)
        return _checks.native(node)

    return jax.tree.map(convert, tree, is_leaf=_is_partial)


def _apply(fn: Callable, *args: Any, **keywords: Any) -> Any:
    return fn(*args, **keywords)


def _is_partial(node: Any) -> bool:
    return isinstance(node, functools.partial | types.MethodType)


def _has_arrays(tree: Any) -> bool:
    """Whether a tree has arrays of JAX, also in the methods and partial functions in it."""

    def of_leaf(leaf: Any) -> bool:
        if isinstance(leaf, functools.partial):
            return _has_arrays((leaf.func, leaf.args, leaf.keywords))
        if isinstance(leaf, types.MethodType):
            return _has_arrays(leaf.__self__)
        return eqx.is_array(leaf)

    return any(map(of_leaf, jax.tree.leaves(tree, is_leaf=_is_partial)))


def _numbers(leaf: Any) -> Any:
    is_numbers = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc"
    return jnp.asarray(leaf) if is_numbers else leaf


def refuse_outside(tree: Any) -> None:
    """Raise a `TypeError` for a Flax module that the functions in a tree use besides the arrays of
    the tree. It would be compiled with its current weights, and would not change after training.
    """
    for where, value in captured(*_functions(tree)):
        if is_flax(value):
            name = where.rpartition(".")[2]
            name = name if name.isidentifier() else "network"
            raise TypeError(
                f"the function uses the Flax module {where!r} from outside, so changes of its "
                "weights have no effect. Pass the module itself, or pass it as an argument, "
                f"jax.tree_util.Partial(lambda {name}, *args: ..., {name}); for a model use "
                f"from_velocity(lambda {name}, t, x: ..., {name}, shape=...)"
            )


def _functions(tree: Any) -> Iterator[Any]:
    """The functions, classes and objects in a tree that are not arrays, also those in its static
    parts.
    """
    special = lambda node: isinstance(node, Partial | eqx.Module)
    for node in jax.tree.leaves(tree, is_leaf=special):
        if isinstance(node, Partial):
            yield from _functions((node.func, node.args, node.keywords))
        elif isinstance(node, KeepsDtype):
            continue
        elif isinstance(node, eqx.Module):
            yield type(node)
            yield from _functions(tuple(vars(node).values()))
        elif not eqx.is_array(node):
            yield node


def check_object(module: eqx.Module) -> None:
    """Refuse modules in training mode in an object, and Flax modules from outside in the methods of
    its class.
    """
    refuse_training_mode(module)
    classes = [each for each in type(module).__mro__ if not in_library(each.__module__)]
    entries = [entry for each in classes for entry in vars(each).values()]
    refuse_outside([entry for entry in entries if inspect.isfunction(entry)])


def is_untraceable(error: Exception) -> bool:
    """Whether an error comes from a function that JAX cannot trace: one of NumPy or PyTorch, or one
    that reads values by `float`, `int` or `if`.
    """
    kinds = (
        jax.errors.TracerArrayConversionError,
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerIntegerConversionError,
    )
    return isinstance(error, kinds) or (
        isinstance(error, TypeError) and "must be Tensor, not" in str(error)
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


def refuse_training_mode(tree: Any) -> None:
    """Raise a `ValueError` for a Flax module in training mode anywhere in a tree."""
    if (nnx := sys.modules.get("flax.nnx")) is None:
        return
    is_module = lambda node: isinstance(node, nnx.Module)
    for module in filter(is_module, jax.tree.leaves(tree, is_leaf=is_module)):
        if (part := in_training_mode(module)) is not None:
            raise ValueError(
                f"{part} is in training mode and would change while it samples: call .eval() on "
                "the network first"
            )


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
