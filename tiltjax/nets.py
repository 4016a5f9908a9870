r"""A user's network `fn(t, x)` as a pytree, and its answer for one sample, alone or as a row of a batch.

Everything around a network is written for one sample and vmapped. One that wants a batch is called with as many rows as the `vmap`s around
the call make, forwards and backwards: its kernels never see another axis.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from tiltjax import inputs, trainable


class Net(inputs.Foreign):
    """A callable `fn(t, x)` or `fn(params, t, x)` with its parameters, as one pytree."""

    fn: inputs.Function
    params: PyTree

    def __init__(self, fn: Callable, params: PyTree = None):
        _refuse_training_mode(fn)
        _refuse_training_mode(params)
        self.fn, self.params = inputs.Function(fn), params
        _check_signature(fn, params)

    def __call__(self, t: Array, x: Array) -> Array:
        return self.fn(t, x) if self.params is None else self.fn(self.params, t, x)


def ask(net: Net, t: Array, x: Array, shape: tuple[int, ...], batched: bool) -> Array:
    """The answer of a network, of `shape`, for one sample; one that wants a batch gets as many rows as `vmap`s around this make."""
    if batched:
        return checked(_call_in_batches(net, t[None], x[None]), (1, *shape), x.shape, batched)[0]
    return checked(net(t, x), shape, x.shape, batched)


def _check_signature(fn: Callable, params: PyTree) -> None:
    names = ("t", "x") if params is None else ("params", "t", "x")
    try:
        inspect.signature(fn).bind(*names)
    except TypeError as error:
        raise TypeError(
            f"the network is called as fn({', '.join(names)}), which {type(fn).__name__} does not accept ({error}): wrap it, as in "
            "from_velocity(lambda net, t, x: net(...), net, shape=...)"
        ) from None
    except ValueError:  # a callable without a signature to read
        return


def checked(output: Any, shape: tuple[int, ...], state: tuple[int, ...], batched: bool) -> Array:
    """What a network has returned, if it is of `shape`. **Raises:** `ValueError` if not."""
    got = getattr(output, "shape", None)
    if got != shape:
        what = f"a batch of states {state}" if batched else f"a state of shape {state}"
        hint = "" if batched else " (a network that wants a batch axis needs batched=True)"
        rule = "the shape of its input: expected" if shape[int(batched) :] == state else "the shape"
        raise ValueError(f"the network must return {rule} {shape} for {what}, got {got}{hint}")
    return output


def _refuse_training_mode(fn: Any) -> None:
    if not any(cls.__module__.startswith("flax.nnx") for cls in type(fn).__mro__):
        return
    if (part := trainable.in_training_mode(fn)) is not None:
        raise ValueError(
            f"{part} is in training mode and would change its state while sampling: call .eval() on the network first"
        )


# A network that wants a batch, called from code for one sample. `custom_vmap` turns every `vmap` axis around the call
# into more rows of the batch instead of an axis the network's kernels have never seen; `custom_vjp` does the same for
# the pullback, because `custom_vmap` alone has no reverse mode.


@custom_vmap
def _forward(net: Net, t: Array, x: Array) -> Array:
    return net(t, x)


@custom_vmap
def _pullback(net: Net, t: Array, x: Array, cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(net, t, x)[1](cotangent)


def _as_rows(call: Callable) -> Callable:
    def rule(size, batched, net, *arrays):
        if any(jax.tree.leaves(batched[0])):
            raise ValueError(
                "a batched=True network cannot be vmapped over its parameters: use batched=False for ensembles"
            )

        def rows(array, is_batched):
            array = array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        output = call(net, *map(rows, arrays, batched[1:]))
        split = jax.tree.map(lambda out: out.reshape(size, -1, *out.shape[1:]), output)
        return split, jax.tree.map(lambda _: True, split)

    return rule


_forward.def_vmap(_as_rows(_forward))
_pullback.def_vmap(_as_rows(_pullback))


@jax.custom_vjp
def _call_in_batches(net: Net, t: Array, x: Array) -> Array:
    return _forward(net, t, x)


def _call_forward(net, t, x):
    # By type: a Flax variable forwards unknown attributes to its array, so it would pass for anything.
    primal = lambda leaf: isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
    if any(leaf.perturbed for leaf in jax.tree.leaves(net, is_leaf=primal) if primal(leaf)):
        raise TypeError(
            "a batched=True network is not differentiable in its parameters here: use batched=False, or Model.denoise_batch"
        )
    values = jax.tree.map(lambda leaf: leaf.value if primal(leaf) else leaf, (net, t, x), is_leaf=primal)
    return _forward(*values), values


def _call_backward(values, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    return None, *_pullback(*values, cotangent)


_call_in_batches.defvjp(_call_forward, _call_backward, symbolic_zeros=True)
