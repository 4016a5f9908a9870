"""Small arrays written out entry by entry, and matrix functions without library calls.

    spectral  V diag(fn(lambda)) V^T        square_root  L L^T = A        solve  A^-1 b, logdet A

A call to LAPACK inside a loop over particles or times leaves the compiled program, and waits for
threads on a busy machine. The functions here are elementwise for use in such loops.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

UNROLL = 4  # the largest number of rows of a matrix, or entries of a state, that are written out
# A function with this decorator is one program if it is called directly, and a part of the caller's
# program inside a `jit`.
_inline_jit = functools.partial(jax.jit, inline=True)


class Entries:
    """A small array as an object array of its entries, with the arithmetic of arrays: `+ - * /`,
    indexing, `sum` and `max`. A pytree of scalars.

    Compilers vectorize over particles only elementwise code. A reduction over an axis of two
    entries costs more than its arithmetic, and each product of small matrices is a library call.
    Sums over entries are straight-line arithmetic that fuses with the surrounding code: three to
    four times faster for a mixture of two components in the plane.
    """

    __array_ufunc__ = None  # NumPy leaves operations with its arrays to this class

    def __init__(self, items: np.ndarray):
        self.items = items

    @property
    def shape(self) -> tuple[int, ...]:
        return self.items.shape

    def __getitem__(self, index: Any) -> "Entries":
        return Entries(_objects(self.items[index]))

    def sum(self, axis: int = -1) -> Any:
        with np.errstate(all="ignore"):  # as in `_elementwise`
            return _scalar_or_entries(np.add.reduce(self.items, axis=axis))

    def max(self) -> Array:
        return functools.reduce(jnp.maximum, self.items.flat)

    def map(self, fn: Callable[[Array], Array]) -> "Entries":
        return _elementwise(fn, self.items)

    def _with(self, operation: Callable, other: Any, reverse: bool = False) -> "Entries":
        pair = self.items, other.items if isinstance(other, Entries) else _objects(other)
        return _elementwise(operation, *(pair[::-1] if reverse else pair))

    def __add__(self, other: Any) -> "Entries":
        return self._with(operator.add, other)

    def __sub__(self, other: Any) -> "Entries":
        return self._with(operator.sub, other)

    def __mul__(self, other: Any) -> "Entries":
        return self._with(operator.mul, other)

    def __rsub__(self, other: Any) -> "Entries":
        return self._with(operator.sub, other, reverse=True)

    def __truediv__(self, other: Any) -> "Entries":
        return self._with(operator.truediv, other)

    __radd__, __rmul__ = __add__, __mul__


def _elementwise(fn: Callable, *items: np.ndarray) -> Entries:
    # After a loop NumPy reads the floating-point flags of the thread. Here they are those of JAX.
    with np.errstate(all="ignore"):
        return Entries(_objects(np.frompyfunc(fn, len(items), 1)(*items)))


def _objects(value: Any) -> Any:
    """An object array of one value. NumPy would otherwise convert a JAX scalar to a number."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value
    items = np.empty((), object)
    items[()] = value
    return items


def _scalar_or_entries(value: Any) -> Any:
    return Entries(value) if isinstance(value, np.ndarray) else value


def _from_leaves(shape: tuple[int, ...], leaves: Sequence[Any]) -> Entries:
    items = np.empty(shape, object)
    for index, leaf in zip(np.ndindex(shape), leaves, strict=True):
        items[index] = leaf
    return Entries(items)


jax.tree_util.register_pytree_node(Entries, lambda e: (list(e.items.flat), e.shape), _from_leaves)


def unrolled(array: Array) -> Entries:
    """The entries of an array."""
    return _from_leaves(array.shape, list(jnp.unstack(array.reshape(-1))))


def entries(array: Array) -> Any:
    """The entries of a small array; a larger array is returned unchanged. Elementwise code works on
    both.

    In a loop that ends with a stacked array of two entries, the compiler computes all inputs of
    this array twice and by scalars.
    """
    return unrolled(array) if 0 < array.size <= UNROLL else array


def array(entries: Any) -> Array:
    """The array of the output of `entries` or `unrolled`."""
    if not isinstance(entries, Entries):
        return entries
    return jnp.stack(list(entries.items.flat)).reshape(entries.shape)


def product(matrices: Any, vectors: Any) -> Any:
    """`A_k v_k` for `(K, d, e)` matrices and `(K, e)` vectors, arrays or entries."""
    if isinstance(matrices, Entries):
        return (matrices * vectors[:, None]).sum()
    return jnp.einsum("kij,kj->ki", matrices, vectors)


def softmax(x: Any) -> Any:
    """The softmax of a vector, an array or entries.

    It is relative to the largest entry without dropping the derivative of that entry, so the
    derivative of a large probability is as accurate as that of a small one.
    """
    if isinstance(x, Entries) and x.shape == (2,):
        return _from_leaves((2,), _softmax_of_two(*x.items))
    shifted: Any = x - x.max()
    masses = shifted.map(jnp.exp) if isinstance(shifted, Entries) else jnp.exp(shifted)
    return masses * (1 / masses.sum())


@jax.custom_jvp
def _softmax_of_two(one: Array, other: Array) -> tuple[Array, Array]:
    """The softmax of two numbers, computed from the smaller probability. The sign of this
    probability, also of a zero, tells which of the two numbers it belongs to.

    An exponential and a division each cost as much as the rest of a denoiser in the plane; this
    function needs one of each. All later values depend on this one number, so the compiler neither
    stores the exponential nor repeats it. The derivative is written out, because powers of
    `inverse` would overflow. The exponential itself stays finite: inside a loop, JAX takes second
    derivatives of these lines, and they would be NaN.
    """
    one_is_smaller = other > one
    gap = jnp.where(one_is_smaller, other - one, one - other)
    inverse = 1 + jnp.exp(jnp.minimum(gap, np.log(jnp.finfo(gap.dtype).max) - 0.1))
    smaller = 1 / jnp.where(one_is_smaller, inverse, -inverse)
    is_other = jnp.signbit(smaller)
    return jnp.where(is_other, 1 + smaller, smaller), jnp.where(is_other, -smaller, 1 - smaller)


@_softmax_of_two.defjvp
def _softmax_of_two_jvp(primals: tuple, tangents: tuple) -> tuple:
    probabilities = _softmax_of_two(*primals)
    tangent = probabilities[0] * probabilities[1] * (tangents[0] - tangents[1])
    return probabilities, (tangent, -tangent)


def inner(a: Array, b: Array) -> Array:
    """`<a, b>` over all entries of two arrays. Small arrays are written out, because a reduction
    over a short axis becomes a library call.
    """
    terms = entries(a * b)
    if isinstance(terms, Entries):
        return functools.reduce(jnp.add, terms.items.flat)
    return jnp.sum(terms)


@_inline_jit
def weighted_sum(weights: Array, values: Array) -> Array:
    """`sum_i w_i v_i` over the first axis of `values`, for a long axis, such as that of particles.

    A compiled sum adds in pairs. A product of matrices adds one term after another: in single
    precision it loses three digits over three million terms.
    """
    return jnp.sum(weights.reshape(-1, *[1] * (values.ndim - 1)) * values, axis=0)


def rows(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """One matrix for each dtype with all arrays of a tree, which have one leading axis: a loop then
    reads one row at a time. Also the function that makes a tree of a row.
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


def solve(matrix: Array, b: Array) -> tuple[Array, Array]:
    """`A^-1 B` and `log det(A) / 2` for `(d, d)` and `(d, m)` matrices, where A is symmetric and
    positive definite up to a scaling of its rows and columns.

    Gauss-Jordan elimination without exchanges of rows, which such matrices do not need: d
    elementwise updates. The second result is NaN if A is not positive definite.
    """
    return _solve(matrix, b, unrolled=matrix.shape[-1] <= UNROLL)


@functools.partial(_inline_jit, static_argnames="unrolled")
def _solve(matrix: Array, b: Array, unrolled: bool) -> tuple[Array, Array]:
    d = matrix.shape[-1]

    def eliminate(rest: Array, j: Array | int) -> tuple[Array, Array]:
        pivot = rest[j, j]
        row = (rest[j] / pivot)[None]
        return jnp.where((np.arange(d) == j)[:, None], row, rest - rest[:, j, None] * row), pivot

    rest, pivots = _loop(eliminate, jnp.concatenate([matrix, b], axis=1), d, unrolled)
    return rest[:, d:], jnp.sum(jnp.log(pivots)) / 2


def _loop(step: Callable, carry: Any, num: int, unrolled: bool) -> tuple[Any, Array]:
    """`jax.lax.scan` over `0, ..., num - 1`, or the same loop written out."""
    if not unrolled:
        return jax.lax.scan(step, carry, jnp.arange(num))
    outputs = []
    for j in range(num):
        carry, output = step(carry, j)
        outputs.append(output)
    return carry, jnp.stack(outputs)


def eigh(matrices: Array) -> tuple[Array, Array]:
    """The eigenvalues and eigenvectors of symmetric matrices `(K, d, d)`, not sorted.

    Small matrices use `rotations`, because JAX's first use of LAPACK imports SciPy, which takes a
    fifth of a second.
    """
    if matrices.shape[-1] <= UNROLL:
        return jax.vmap(rotations)(matrices)
    return jnp.linalg.eigh(matrices)


def recomposed(axes: Array, values: Array) -> Array:
    """`V diag(lambda) V^T` for `(K, d, d)` axes and `(K, d)` values.

    Small matrices use sums, because a product of matrices takes a fifth of a second to compile.
    """
    scaled = axes * values[:, None, :]
    if axes.shape[-1] <= UNROLL:
        return jnp.sum(scaled[:, :, None, :] * axes[:, None, :, :], axis=-1)
    return scaled @ jnp.swapaxes(axes, 1, 2)


@_inline_jit
def rotations(matrix: Array) -> tuple[Array, Array]:
    """The eigenvalues and eigenvectors of a symmetric `(d, d)` matrix, as from `jnp.linalg.eigh`
    but not sorted, with elementwise operations for loops over particles.

    Jacobi rotations: in each round of a tournament every row is paired with another row, and a
    rotation sets the entry that couples the two to zero. The number of sweeps is fixed, because
    convergence is quadratic.
    """
    d = matrix.shape[-1]
    eye = jnp.eye(d, dtype=matrix.dtype)
    if d == 1:
        return matrix[0], eye
    order = np.arange(d)

    def rotate(carry: tuple[Array, Array], partner: Any) -> tuple[tuple[Array, Array], None]:
        a, axes = carry
        a = (a + a.T) / 2  # two couplings that differ by rounding would not be one rotation
        diagonal, coupling = jnp.diagonal(a), a[order, partner]
        gap = diagonal[partner] - diagonal
        # The tangent of the angle, the smaller root. The partner has the negative tangent.
        sign = jnp.where((gap > 0) | ((gap == 0) & (order < partner)), 1.0, -1.0)
        length = jnp.abs(gap) + jnp.hypot(gap, 2 * coupling)
        rotates = (partner != order) & (coupling != 0)
        tan = jnp.where(rotates, sign * 2 * coupling / jnp.where(rotates, length, 1.0), 0.0)
        cos = jax.lax.rsqrt(1 + tan**2)
        sin = -tan * cos
        rows = lambda m: cos[:, None] * m + sin[:, None] * m[partner]
        return (rows(rows(a).T), rows(axes)), None

    if d == 2:
        a, axes = rotate((matrix, eye), order[::-1])[0]
    else:
        rounds = jnp.asarray(np.tile(_tournament(d), (_SWEEPS, 1)))
        (a, axes), _ = jax.lax.scan(rotate, (matrix, eye), rounds)
    return jnp.diagonal(a), axes.T


_SWEEPS = 10


def _tournament(d: int) -> np.ndarray:
    """The partner of each row in the rounds of a round robin of d rows, `(rounds, d)`. A row
    without a partner is its own partner.
    """
    n = d + d % 2
    rounds = []
    for shift in range(n - 1):
        circle = [0, *(1 + (np.arange(n - 1) + shift) % (n - 1))]
        partner = np.arange(n)
        for one, other in zip(circle[: n // 2], circle[: n // 2 - 1 : -1], strict=True):
            partner[one], partner[other] = other, one
        rounds.append(np.where(partner[:d] < d, partner[:d], np.arange(d)))
    return np.stack(rounds)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def spectral(
    fn: Callable[[Array], Array], matrix: Array, eigh: Callable = jnp.linalg.eigh
) -> Array:
    """`V diag(fn(lambda)) V^T` for a symmetric matrix `V diag(lambda) V^T`. Use `eigh=rotations` in
    a loop.

    Unlike `eigh`, it is differentiable where eigenvalues coincide: its derivative uses divided
    differences of `fn` (Daleckii and Krein).
    """
    values, axes = eigh(matrix)
    return (axes * fn(values)[None]) @ axes.T


@spectral.defjvp
def _spectral_jvp(fn, eigh, primals, tangents):
    (matrix,), (tangent,) = primals, tangents
    values, axes = eigh(matrix)
    image, slope = jax.jvp(fn, (values,), (jnp.ones_like(values),))
    gap = values[:, None] - values[None, :]
    close = jnp.abs(gap) <= jnp.sqrt(jnp.finfo(matrix.dtype).eps) * jnp.max(jnp.abs(values))
    ratio = (image[:, None] - image[None, :]) / jnp.where(close, 1.0, gap)
    rates = jnp.where(close, (slope[:, None] + slope[None, :]) / 2, ratio)
    return (axes * image[None]) @ axes.T, axes @ (rates * (axes.T @ tangent @ axes)) @ axes.T


def root(values: Array) -> Array:
    """The square root of numbers, 0 with derivative 0 where they are not positive."""
    positive = values > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, values, 1.0)), 0.0)


def square_root(matrix: Array) -> Array:
    """A lower-triangular `L` with `L L^T = matrix`, for symmetric positive *semi*-definite
    matrices.

    A pivot that is negative, or zero up to the rounding of its own entry, sets its column to zero.
    Point masses and flat directions are therefore exact, gradients are finite where those of an
    eigendecomposition are not, and `L L^T` is positive semi-definite for any input.
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

    return _loop(column, matrix, d, unrolled)[1].T


def hutchinson(key: Array, fn: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """`fn(x)`, and an unbiased estimate of `tr(∂fn/∂x) / d` from one random vector of signs, at the
    cost of one pullback.
    """
    probe = jax.random.rademacher(key, x.shape, x.dtype)
    value, pullback = jax.vjp(fn, x)
    return value, jnp.sum(probe * pullback(probe)[0]) / x.size
