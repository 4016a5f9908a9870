"""Positive-definite solves, written out entry by entry when the matrix is small.

    A = L L^T,  half_logdet = sum_j log L_jj,  half_solve: y = L^-1 b,  |y|^2 = b^T A^-1 b,
        back_solve: L^-T y

Compilers vectorize over particles only what is elementwise: a reduction over an axis of length two
costs more than the arithmetic in it. So a matrix of up to `UNROLL` rows is a nested list of scalars
here, and its factorization is straight-line arithmetic that fuses with whatever surrounds it.
Larger matrices go to LAPACK.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

UNROLL = 4
# A single program where a function is called by itself, and a part of the caller's program inside a
# `jit`.
_inline_jit = functools.partial(jax.jit, inline=True)
Entries = Any  # an array, or nested lists of scalars where the matrix is small


def entries(array: Array) -> list[Array]:
    """A small array as the list of its entries, a larger one as the only member of a list: what
    elementwise code is written on.

    In a loop that ends with an array of two entries, stacked, all that leads to them is computed
    twice and by scalars.
    """
    return list(jnp.unstack(array.reshape(-1))) if 0 < array.size <= UNROLL else [array]


def array(entries: list[Array], shape: tuple[int, ...]) -> Array:
    """The array of this shape that `entries` has taken apart."""
    return jnp.stack(entries).reshape(shape) if 0 < math.prod(shape) <= UNROLL else entries[0]


def inner(a: Array, b: Array) -> Array:
    """`<a, b>` over all entries of arrays; small ones written out, as a reduction over a short axis
    becomes a call to a library.
    """
    return functools.reduce(jnp.add, map(jnp.sum, entries(a * b)))


def cholesky(matrix: Array) -> Entries:
    """The lower factor of a symmetric positive-definite `(d, d)` matrix, to be handed to
    `half_solve` and `back_solve`.

    Not positive definite gives NaN, as in `jnp.linalg.cholesky`. For small d the diagonal holds
    reciprocals.
    """
    return _small_cholesky(matrix) if matrix.shape[-1] <= UNROLL else jnp.linalg.cholesky(matrix)


@_inline_jit
def _small_cholesky(matrix: Array) -> list[list]:
    d = matrix.shape[-1]
    lower: list = [[None] * d for _ in range(d)]
    for j in range(d):
        pivot = matrix[j, j] - sum(lower[j][m] ** 2 for m in range(j))
        lower[j][j] = jax.lax.rsqrt(pivot)
        for i in range(j + 1, d):
            lower[i][j] = (matrix[i, j] - sum(lower[i][m] * lower[j][m] for m in range(j))) * lower[
                j
            ][j]
    return lower


@_inline_jit
def half_logdet(lower: Entries) -> Array:
    """Half the log-determinant of the factored matrix."""
    if isinstance(lower, list):
        return -functools.reduce(jnp.add, [jnp.log(row[j]) for j, row in enumerate(lower)])
    return jnp.sum(jnp.log(jnp.diagonal(lower)))


@_inline_jit
def half_solve(lower: Entries, b: Entries) -> Entries:
    """`L^-1 b`, whose squared length is `b^T A^-1 b`. Lists in, lists out."""
    if not isinstance(lower, list):
        return jax.scipy.linalg.solve_triangular(lower, b, lower=True)
    y: list = []
    for i, row in enumerate(lower):
        y.append((b[i] - sum(row[m] * y[m] for m in range(i))) * row[i])
    return y


@_inline_jit
def back_solve(lower: Entries, y: Entries) -> Entries:
    """`L^-T y`."""
    if not isinstance(lower, list):
        return jax.scipy.linalg.solve_triangular(lower, y, lower=True, trans=1)
    d = len(lower)
    x: list = [None] * d
    for i in reversed(range(d)):
        x[i] = (y[i] - sum(lower[m][i] * x[m] for m in range(i + 1, d))) * lower[i][i]
    return x


def inverse_factor(lower: list[list]) -> list[list]:
    """The entries of `L^-1`, a lower triangle, for the factor of a small matrix."""
    inverse: list = []
    for i, row in enumerate(lower):
        below = [-sum(row[m] * inverse[m][j] for m in range(j, i)) * row[i] for j in range(i)]
        inverse.append([*below, row[i]])
    return inverse


def rows(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A tree of arrays with one leading axis as one matrix of each dtype, of which a loop reads a
    row at once; and what makes a tree of a row.
    """
    leaves, structure = jax.tree.flatten(tree)
    kinds = {
        leaf.dtype: [i for i, other in enumerate(leaves) if other.dtype == leaf.dtype]
        for leaf in leaves
    }
    flat = lambda leaf: leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))
    matrices = {
        str(kind): jnp.concatenate([flat(leaves[i]) for i in members], axis=1)
        for kind, members in kinds.items()
    }

    def back(row: dict[str, Array]) -> Any:
        found = list(leaves)
        for kind, members in kinds.items():
            ends = np.cumsum([math.prod(leaves[i].shape[1:]) for i in members])[:-1]
            for i, part in zip(members, jnp.split(row[str(kind)], ends), strict=True):
                found[i] = part.reshape(leaves[i].shape[1:])
        return structure.unflatten(found)

    return matrices, back


def solve(matrix: Array, b: Array) -> Array:
    """`A^-1 b` for a symmetric positive-definite `(d, d)` matrix."""
    lower = cholesky(matrix)
    return jnp.asarray(
        back_solve(lower, half_solve(lower, jnp.unstack(b) if isinstance(lower, list) else b))
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def spectral(fn: Callable[[Array], Array], matrix: Array) -> Array:
    """`V diag(fn(lambda)) V^T` for a symmetric matrix `V diag(lambda) V^T`.

    Differentiable where eigenvalues coincide, unlike `eigh`: by divided differences of `fn`
    (Daleckii and Krein).
    """
    values, axes = jnp.linalg.eigh(matrix)
    return (axes * fn(values)[None]) @ axes.T


@spectral.defjvp
def _spectral_jvp(fn, primals, tangents):
    (matrix,), (tangent,) = primals, tangents
    values, axes = jnp.linalg.eigh(matrix)
    image, slope = jax.jvp(fn, (values,), (jnp.ones_like(values),))
    gap = values[:, None] - values[None, :]
    close = jnp.abs(gap) <= jnp.sqrt(jnp.finfo(matrix.dtype).eps) * jnp.max(jnp.abs(values))
    ratio = (image[:, None] - image[None, :]) / jnp.where(close, 1.0, gap)
    rates = jnp.where(close, (slope[:, None] + slope[None, :]) / 2, ratio)
    return (axes * image[None]) @ axes.T, axes @ (rates * (axes.T @ tangent @ axes)) @ axes.T


def square_root(matrix: Array) -> Array:
    """A lower-triangular `L` with `L L^T = matrix`, for symmetric positive *semi*-definite
    matrices.

    A pivot that is zero to the rounding of its own entry, or negative, closes its column: point
    masses and flat directions are exact, gradients stay finite where an eigendecomposition's would
    not, and `L L^T` is positive semi-definite whatever came in.
    """
    return _square_root(matrix, unrolled=matrix.shape[-1] <= UNROLL)


@functools.partial(_inline_jit, static_argnames="unrolled")
def _square_root(matrix: Array, unrolled: bool) -> Array:
    d = matrix.shape[-1]
    floor = d * jnp.finfo(matrix.dtype).eps * jnp.abs(jnp.diagonal(matrix))

    def column(rest: Array, j: Array | int) -> tuple[Array, Array]:
        pivot = rest[j, j]
        positive = pivot > floor[j]
        scaled = rest[:, j] * jax.lax.rsqrt(jnp.where(positive, pivot, 1.0))
        col = jnp.where(positive & (jnp.arange(d) >= j), scaled, 0.0)
        return rest - col[:, None] * col[None, :], col

    if not unrolled:
        return jax.lax.scan(column, matrix, jnp.arange(d))[1].T
    columns = []
    for j in range(d):
        matrix, col = column(matrix, j)
        columns.append(col)
    return jnp.stack(columns, axis=1)


def hutchinson(key: Array, fn: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """`fn(x)`, and an unbiased estimate of `tr(∂fn/∂x) / d` from one random vector of signs: one
    pullback.
    """
    probe = jax.random.rademacher(key, x.shape, x.dtype)
    value, pullback = jax.vjp(fn, x)
    return value, jnp.sum(probe * pullback(probe)[0]) / x.size
