r"""What the networks of this package share: stacks of equal blocks, norms, attention, and how a
published configuration is read.

    h_{i+1} = block_i(h_i),  i < n

`stacked` builds the n blocks as one, every parameter with a leading axis n; `scanned` runs them. A
stack is compiled once whatever its depth. With `remat` only the h_i are saved for the
gradient, and each block is computed again.

    attention(q, k, v) = softmax(scale * q k^T + bias) v

The softmax is taken in float32 at least. Norms and attention are not Flax's and JAX's, which refuse
float64 and 16 bits under strict promotion of dtypes: `dot_product_attention` computes in float32
whatever it gets, and the group norm takes 4 to 16 times as long on a CPU.
 **Stacks hold no convolutions**: the gradients of their
kernels inside of `lax.scan` take XLA 6 to 9 times as long on a CPU as outside, so that networks of
convolutions are Python loops here; those to their input do not (`convolved`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tiltjax import _checks

M = TypeVar("M", bound=nnx.Module)
C = TypeVar("C")


def stacked(build: Callable[[nnx.Rngs], M], num: int, rngs: nnx.Rngs) -> M:
    """`num` independent modules `build(rngs)` as one, whose parameters have a leading axis."""
    return nnx.vmap(build)(rngs.split(num))


def scanned(
    blocks: nnx.Module, hidden: Array, call: Callable[[Any, Array], Array], *, remat: bool = False
) -> Array:
    """`hidden` through the blocks of a stack, one after the other; `call(block, hidden)` applies
    one.
    """
    graph, parameters = nnx.split(blocks)

    def body(hidden: Array, parameters: Any) -> tuple[Array, None]:
        return call(nnx.merge(graph, parameters), hidden), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, hidden, parameters)[0]


def wide(dtype: Any) -> Any:
    """The dtype in which sums over many terms are taken: float32 for anything shorter."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def standardized(
    x: Array, epsilon: float, axes: int | tuple[int, ...] = -1, *, center: bool = True
) -> Array:
    """`(x - mean) / sqrt(var + epsilon)` over these axes; with `center=False` the mean is taken for
    0.
    """
    if center:
        x -= jnp.mean(x, axis=axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + epsilon)


class Norm(nnx.Module):
    """`scale * (x - mean) / sqrt(var + epsilon) + bias` over the last axis, or over each of
    `groups` parts of it and all places of an image.

    With `center=False` without mean and bias: the RMS norm. Statistics are taken in float32 at
    least.

    **Arguments:** `n`, the size of the last axis; `groups`, for x of shape `(batch, H, W, n)`.
    """

    def __init__(
        self, n: int, *, epsilon: float, dtype: Any, groups: int | None = None, center: bool = True
    ):
        self.epsilon, self.groups, self.center = epsilon, groups, center
        self.scale = nnx.Param(jnp.ones(n, dtype))
        if center:
            self.bias = nnx.Param(jnp.zeros(n, dtype))

    def __call__(self, x: Array) -> Array:
        h = x.astype(wide(x.dtype))
        if self.groups is None:
            h = standardized(h, self.epsilon, center=self.center)
        else:
            # Places first, then the channels of a group: sums over both at once, of an image cut
            # into groups, are slow on a CPU.
            h -= _over_groups(jnp.mean(h, axis=(1, 2)), self.groups)
            power = jnp.mean(jnp.square(h), axis=(1, 2))
            h *= _over_groups(power, self.groups, lambda mean: jax.lax.rsqrt(mean + self.epsilon))
        over = lambda leaf: jnp.broadcast_to(leaf.get_value().astype(h.dtype), x.shape)
        h *= over(self.scale)
        return (h + over(self.bias) if self.center else h).astype(x.dtype)


def _over_groups(
    means: Array, groups: int, f: Callable[[Array], Array] = lambda mean: mean
) -> Array:
    """Of the channels' means `(batch, n)`, f of those of their groups, `(batch, 1, 1, n)`."""
    grouped = jnp.mean(means.reshape(len(means), groups, -1), axis=-1)
    return jnp.repeat(f(grouped), means.shape[-1] // groups, axis=-1)[:, None, None]


def convolved(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """A convolution as `nnx.Conv(conv_general_dilated=)` asks for it, whose gradient with respect
    to x is as fast inside of a loop as outside.

    Of odd sides and stride 1 padded to the same size, the gradient is the convolution with the
    kernel turned over. Written out, which is all that is done here, XLA runs it ten times as fast
    within `lax.scan` on a CPU. There is no forward mode. All else, other strides,
    paddings and numbers of axes, even sides, groups, dilation, precision, is left to JAX.

    **Arguments:** `x` `(batch, H, W, n)`, `kernel` `(h, w, n, m)`; the rest as in
    `jax.lax.conv_general_dilated`.
    """
    square = (
        x.ndim == 4
        and set(strides) == {1}
        and padding == "SAME"
        and all(side % 2 for side in kernel.shape[:2])
    )
    return (
        _same(x, kernel)
        if square and _plainly(x, kernel, **options)
        else jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    )


def _plainly(
    x: Array,
    kernel: Array,
    *,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    **rest: Any,
) -> bool:
    """Whether these options mean what `_plain` does."""
    dilated = {*(lhs_dilation or (1,)), *(rhs_dilation or (1,))} != {1}
    ours = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, _AXES)
    numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    return (
        not dilated
        and numbers == ours
        and feature_group_count == 1
        and all(value is None for value in rest.values())
    )


_AXES = ("NHWC", "HWIO", "NHWC")


def _plain(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_AXES)


def _same_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    of_kernel = jax.vjp(lambda kernel: _plain(x, kernel), kernel)[1](cotangent)[0]
    return _same(cotangent, kernel[::-1, ::-1].swapaxes(2, 3)), of_kernel


_same = jax.custom_vjp(_plain)
_same.defvjp(lambda x, kernel: (_same(x, kernel), (x, kernel)), _same_backward)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    bias: Array | None = None,
) -> Array:
    """`softmax(scale * q k^T + bias) v`, `(*lead, n, heads, d)`.

    **Arguments:** `q`, `(*lead, n, heads, d)`; `k` and `v`, `(*lead, m, heads, d)`; `bias`,
    `(heads or 1, n or 1, m)`: where it is `-inf`, a query does not see a key.
    """
    scores = jnp.einsum("...nhd,...mhd->...hnm", q, k, preferred_element_type=wide(q.dtype)) * scale
    if bias is not None:
        scores += jnp.broadcast_to(bias.astype(scores.dtype), scores.shape)
    return jnp.einsum("...hnm,...mhd->...nhd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def causal(n: int, dtype: Any) -> Array:
    """The bias, `(1, n, n)`, under which a token sees itself and those before it."""
    return jnp.where(jnp.tri(n, dtype=bool), jnp.zeros((), dtype), jnp.full((), -jnp.inf, dtype))[
        None
    ]


def configuration(
    kind: type[C],
    published: Mapping[str, Any],
    implied: Mapping[str, tuple[Any, ...]],
    **absent: Any,
) -> C:
    """A `Config` from a published JSON configuration.

    **Arguments:** `kind`, a dataclass whose fields are read by name; `published`, the JSON object;
    `implied`, settings that are not fields, as
    `{name: (values that are implemented, the first where the setting is absent)}`; `absent`, what
    the published class takes an absent field for, where that is not the default here (files may
    leave out what is their default). Everything else in the object says how the model was trained
    or used, and is left alone.

    **Raises:** `ValueError` for a setting that is not implemented, with its name.
    """
    published = absent | dict(published)
    for name, values in implied.items():
        value = published.get(name, values[0])
        value = tuple(value) if isinstance(value, list) else value
        if value not in values:
            raise ValueError(
                f"{name} = {value!r} is not implemented: this {kind.__qualname__} is for "
                f"{' or '.join(map(repr, values))}"
            )
    fields = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    found = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in published.items()
        if name in fields
    }
    return kind(**found)


def dtype_of(network: nnx.Module) -> Any:
    """The dtype that a network's parameters have, and in which it computes."""
    return jnp.result_type(*{leaf.dtype for leaf in jax.tree.leaves(nnx.state(network, nnx.Param))})


def check_ids(ids: Array, vocabulary: int) -> None:
    """Refuse what are no token ids `(*lead, n)`: another dtype, or, where they can be read, ids
    outside of the vocabulary.
    """
    if ids.ndim < 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"token ids must be whole numbers (..., n), got {ids.dtype} of shape {ids.shape}"
        )
    if not _checks.concrete(ids) or not ids.size:
        return
    read = np.asarray(ids)
    if read.min() < 0 or read.max() >= vocabulary:
        raise ValueError(
            f"token ids must lie in [0, {vocabulary}), got [{read.min()}, {read.max()}]: is this "
            "the tokenizer of this model?"
        )
