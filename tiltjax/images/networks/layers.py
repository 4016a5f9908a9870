r"""Shared parts of the networks: stacks of equal blocks, norms, attention, and the reading of
published configurations.

    h_{i+1} = block_i(h_i),  i < n

`stacked` builds the n blocks as one, every parameter with a leading axis n; `scanned` runs them. A
stack of any depth is compiled once. With `remat` only the h_i are saved for the gradient, and each
block is computed again.

    attention(q, k, v) = softmax(scale * q k^T + bias) v

The softmax uses at least float32. Norms and attention are not those of Flax and JAX. Under strict
promotion of dtypes, those refuse float64 and 16 bits: `dot_product_attention` always computes in
float32. The group norm of Flax takes 4 to 16 times as long on a CPU.

**Stacks hold no convolutions.** On a CPU, XLA takes 6 to 9 times as long for the gradients by their
kernels inside `lax.scan` as outside. Networks of convolutions are therefore Python loops. The
gradients by the input are fast inside too (`convolved`).
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
    """`hidden` after the blocks of a stack, applied in order by `call(block, hidden)`."""
    graph, parameters = nnx.split(blocks)

    def body(hidden: Array, parameters: Any) -> tuple[Array, None]:
        return call(nnx.merge(graph, parameters), hidden), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, hidden, parameters)[0]


def wide(dtype: Any) -> Any:
    """The dtype of sums over many terms: float32 for shorter dtypes, otherwise `dtype`."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def standardized(
    x: Array, epsilon: float, axes: int | tuple[int, ...] = -1, *, center: bool = True
) -> Array:
    """`(x - mean) / sqrt(var + epsilon)` over these axes. With `center=False` the mean is taken as
    0.
    """
    if center:
        x -= jnp.mean(x, axis=axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + epsilon)


class Norm(nnx.Module):
    """`scale * (x - mean) / sqrt(var + epsilon) + bias`, over the last axis, or over all pixels of
    an image and each of `groups` parts of the last axis.

    With `center=False` there is no mean and no bias: the RMS norm. Statistics use at least float32.

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
            # First over pixels, then over the channels of a group: on a CPU, sums over both at once
            # are slow.
            h -= _over_groups(jnp.mean(h, axis=(1, 2)), self.groups)
            power = jnp.mean(jnp.square(h), axis=(1, 2))
            h *= _over_groups(power, self.groups, lambda mean: jax.lax.rsqrt(mean + self.epsilon))
        over = lambda leaf: jnp.broadcast_to(leaf.get_value().astype(h.dtype), x.shape)
        h *= over(self.scale)
        return (h + over(self.bias) if self.center else h).astype(x.dtype)


def _over_groups(
    means: Array, groups: int, f: Callable[[Array], Array] = lambda mean: mean
) -> Array:
    """f of the mean of each channel's group, `(batch, 1, 1, n)`, from channel means
    `(batch, n)`.
    """
    grouped = jnp.mean(means.reshape(len(means), groups, -1), axis=-1)
    return jnp.repeat(f(grouped), means.shape[-1] // groups, axis=-1)[:, None, None]


def convolved(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """A convolution for `nnx.Conv(conv_general_dilated=)` whose gradient by x is as fast inside of
    a loop as outside.

    For odd sides, stride 1 and "SAME" padding, the gradient by x is the convolution with the
    flipped kernel. This function only writes it out, which makes it ten times as fast within
    `lax.scan` on a CPU. It has no forward mode. All other cases (other strides, paddings and
    numbers of axes, even sides, groups, dilation, precision) use JAX's own gradient.

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
    """Whether `_plain` computes the convolution with these options."""
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
    """The values `softmax(scale * q k^T + bias) v`, `(*lead, n, heads, d)`.

    **Arguments:** `q`, `(*lead, n, heads, d)`; `k` and `v`, `(*lead, m, heads, d)`; `bias`,
    `(heads or 1, n or 1, m)`. A bias of `-inf` excludes a key for a query.
    """
    scores = jnp.einsum("...nhd,...mhd->...hnm", q, k, preferred_element_type=wide(q.dtype)) * scale
    if bias is not None:
        scores += jnp.broadcast_to(bias.astype(scores.dtype), scores.shape)
    return jnp.einsum("...hnm,...mhd->...nhd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def causal(n: int, dtype: Any) -> Array:
    """The bias, `(1, n, n)`, with which a token attends to itself and to the tokens before it."""
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
    `{name: (implemented values, the first for an absent setting)}`; `absent`, the values of absent
    fields in the published class where they differ from the defaults here (files may leave out the
    published class's defaults). Everything else in the object describes the training or the use of
    the model, and is ignored.

    **Raises:** `ValueError` for a setting that is not implemented, with its name.
    """
    published = absent | dict(published)
    for name, values in implied.items():
        value = published.get(name, values[0])
        value = tuple(value) if isinstance(value, list) else value
        if value not in values:
            raise ValueError(
                f"{name} = {value!r} is not implemented: {kind.__qualname__} needs "
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
    """The dtype of a network's parameters, in which the network computes."""
    return jnp.result_type(*{leaf.dtype for leaf in jax.tree.leaves(nnx.state(network, nnx.Param))})


def check_ids(ids: Array, vocabulary: int) -> None:
    """Raise a `TypeError` or `ValueError` for arrays that are not token ids `(*lead, n)`: another
    dtype, or ids outside of the vocabulary, if they are not traced.
    """
    if ids.ndim < 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"token ids must be integers (..., n), got {ids.dtype} of shape {ids.shape}"
        )
    if not _checks.concrete(ids) or not ids.size:
        return
    read = np.asarray(ids)
    if read.min() < 0 or read.max() >= vocabulary:
        raise ValueError(
            f"token ids must lie in [0, {vocabulary}), got [{read.min()}, {read.max()}]: use the "
            "tokenizer of this model"
        )
