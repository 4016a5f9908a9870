r"""Networks: one small enough to train in minutes, for data of few dimensions, and what any of them is to its training.

`Velocity` is

    b(t, x) = W_d h_d + b_d,     h_0 = (x, cos(pi t), sin(pi t), ..., cos(K pi t), sin(K pi t)),     h_{i+1} = silu(W_i h_i + b_i)

Of t the network sees `frequencies = K` cosines and sines: `cos(pi t)` alone tells all times in [0, 1] apart, the faster ones let the answer
change quickly near the data, where the posterior does. What the output stands for, a velocity, a noise or a denoiser, is decided by what
it is trained on. References: Tancik et al. (arXiv 2006.10739), Fourier features; Elfwing, Uchibe and Doya (arXiv 1702.03118), silu.

    parameters, frame = taken_apart(network)           the trained arrays by name, `{"layers.0.kernel": ...}`, and the rest
    frame.network(parameters)                          the network again, with other arrays if need be
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from tiltjax import inputs


class Velocity(nnx.Module):
    """A multilayer perceptron `(t, x) -> array of the shape of x`, for one state or for a batch of them.

    **Arguments:**

    - `shape`: of one state, such as `(2,)`; its entries are the inputs, in a row.
    - `width`, `depth`: units of a hidden layer, and how many of these there are.
    - `frequencies`: of the embedding of t, K above.
    - `dtype`: what it computes in, such as `jnp.bfloat16`; by default what its input and parameters promote to. The answer has that of x.
    - `param_dtype`: of the parameters.
    - `rngs`: `nnx.Rngs(seed)`, for the initial weights.

    Called with `t` of shape `(*lead,)` and `x` of shape `(*lead, *shape)`: under `batched=True`, which is the faster, and without.
    **Raises:** `ValueError` for other shapes.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 256,
        depth: int = 4,
        frequencies: int = 8,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not isinstance(shape, tuple | list):
            raise TypeError(f"shape must be a tuple such as (2,), the shape of one state, got {shape!r}")
        self.shape = tuple(inputs.count(n, "every entry of shape") for n in shape)
        self.frequencies = inputs.count(frequencies, "frequencies")
        hidden = [inputs.count(width, "width")] * inputs.count(depth, "depth")
        size = math.prod(self.shape)
        layer = lambda n, m: nnx.Linear(n, m, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        first, *others = hidden
        self.layers = nnx.List([layer(n, first) for n in (size + 2 * self.frequencies, *others)])
        self.last = layer(first, size)

    def __call__(self, t: Array, x: Array) -> Array:
        lead, shape = x.shape[: x.ndim - len(self.shape)], x.shape[x.ndim - len(self.shape) :]
        if shape != self.shape or jnp.shape(t) != lead:
            raise ValueError(
                f"expected x of shape (*lead, {', '.join(map(str, self.shape))}) and t of shape (*lead,), got {x.shape} and {jnp.shape(t)}"
            )
        multiples = math.pi * jnp.arange(1, self.frequencies + 1, dtype=x.dtype)
        phase = jnp.asarray(t, x.dtype)[..., None] * multiples.reshape(*[1] * len(lead), -1)
        hidden = jnp.concatenate([x.reshape(*lead, -1), jnp.cos(phase), jnp.sin(phase)], axis=-1)
        for layer in self.layers:
            hidden = nnx.silu(layer(hidden))
        return self.last(hidden).reshape(x.shape).astype(x.dtype)


class Frame(inputs.Foreign):
    """A network without the arrays that are trained; built by `taken_apart`."""

    rest: list
    static: tuple = eqx.field(static=True)
    names: tuple[str | None, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def network(self, parameters: dict[str, Array]) -> Any:
        """The network with these parameters."""
        leaves = []
        for name, array, still in zip(self.names, self.rest, self.static, strict=True):
            leaves.append(parameters[name] if name is not None else still if array is None else array)
        return jax.tree.unflatten(self.treedef, leaves)


def taken_apart(network: PyTree) -> tuple[dict[str, Array], Frame]:
    """The trained arrays of a network by the names of their places, and what is left.

    Trained are the `nnx.Param`s of Flax modules, and all floating arrays of everything else: Equinox modules, the parameters in a
    `jax.tree_util.Partial(fn, params)`.

    **Raises:** `ValueError` for a network without any, in training mode, or with one array in two places or of less than 32 bits.
    """
    _refuse_training_mode(network)
    flags = []
    for node in jax.tree.leaves(network, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        still = isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param)
        flags += [eqx.is_inexact_array(leaf) and not still for leaf in jax.tree.leaves(node)]
    located, treedef = jax.tree_util.tree_flatten_with_path(network)
    places = [jax.tree_util.keystr(where, simple=True, separator=".").removesuffix(".value") for where, _ in located]
    names = tuple(place if flag else None for place, flag in zip(places, flags, strict=True))
    leaves = [leaf for _, leaf in located]
    parameters = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name is not None}
    if not parameters:
        raise ValueError(
            f"{type(network).__name__} has no parameters to train: pass a module, or jax.tree_util.Partial(fn, params)"
        )
    seen: dict[int, str] = {}
    for name, leaf in parameters.items():
        if (twin := seen.setdefault(id(leaf), name)) != name:
            raise ValueError(
                f"{twin} and {name} are one array, and would be trained apart: use it in one place of the network, or copy it"
            )
        if jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"parameters must have at least 32 bits, got {leaf.dtype} in {name}: small updates are lost in fewer. The network may "
                "compute in any precision, such as nnx.Linear(..., dtype=jnp.bfloat16)"
            )
    rest = [leaf if eqx.is_array(leaf) and name is None else None for leaf, name in zip(leaves, names, strict=True)]
    static = tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves)
    return parameters, Frame(rest, static, names, treedef)


def in_training_mode(network: Any) -> str | None:
    """Which part of a Flax module is in training mode, and changes while it is called; `None` if none is."""
    for path, module in nnx.iter_modules(network):
        if getattr(module, "deterministic", True) is False or getattr(module, "use_running_average", True) is False:
            return f"{type(module).__name__} ({'/'.join(map(str, path)) or 'the module itself'})"
    return None


def _refuse_training_mode(network: PyTree) -> None:
    is_module = lambda node: isinstance(node, nnx.Module)
    for whole in filter(is_module, jax.tree.leaves(network, is_leaf=is_module)):
        if (part := in_training_mode(whole)) is not None:
            raise ValueError(
                f"{part} is in training mode: dropout and running statistics change a module while it is called, and a training step here "
                "is a function of its parameters alone. Call .eval() on the network first"
            )
