"""Small positive-definite solves, and roots of singular matrices, against NumPy. Tier: exact
(float64, 1e-10).
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax import _linalg

DIMENSIONS = (1, 2, 3, 4, 5, 7)


def positive(d, seed=0):
    root = np.random.default_rng(seed).normal(size=(d, d))
    return root @ root.T + 0.3 * np.eye(d)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (5,), (2, 2), (3, 2), (0,)])
def test_inner_products(shape):
    a, b = np.random.default_rng(0).normal(size=(2, *shape))
    chex.assert_trees_all_close(
        _linalg.inner(jnp.asarray(a), jnp.asarray(b)), np.sum(a * b), rtol=1e-12
    )
    chex.assert_trees_all_close(
        jax.grad(_linalg.inner)(jnp.asarray(a), jnp.asarray(b)), b, rtol=1e-12
    )


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 2), (3, 1, 2)])
def test_entries_are_an_array(shape):
    a, b = np.random.default_rng(0).uniform(0.5, 2, size=(2, *shape))
    x, y = _linalg.unrolled(jnp.asarray(a)), _linalg.unrolled(jnp.asarray(b))
    got = [x + y, x - 2.0, 2.0 - x, jnp.float64(3) * x / y, x[None], x[..., 0], x.sum()]
    expected = [a + b, a - 2, 2 - a, 3 * a / b, a[None], a[..., 0], a.sum(-1)]
    got = [_linalg.array(part) for part in got]
    chex.assert_trees_all_close(got, expected, rtol=1e-15)
    chex.assert_trees_all_close(x.max(), a.max(), rtol=0)
    mapped = jax.jit(lambda e: jax.tree.map(jnp.exp, e))(x)
    chex.assert_trees_all_close(_linalg.array(mapped), np.exp(a), rtol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("taken_apart", [_linalg.unrolled, lambda array: array])
def test_softmax_and_its_derivatives(num, taken_apart):
    x = np.random.default_rng(num).normal(size=num)
    ours = lambda x: _linalg.array(_linalg.softmax(taken_apart(x)))
    for way in (lambda fn: fn, jax.jacfwd, jax.jacrev, lambda fn: jax.jacfwd(jax.jacrev(fn))):
        chex.assert_trees_all_close(way(ours)(x), way(jax.nn.softmax)(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_solves_and_determinants(d):
    matrix, b = positive(d), np.random.default_rng(1).normal(size=(d, 2))
    solved, half_logdet = _linalg.solve(jnp.asarray(matrix), jnp.asarray(b))
    chex.assert_trees_all_close(solved, np.linalg.solve(matrix, b), rtol=1e-10)
    chex.assert_trees_all_close(
        half_logdet, np.linalg.slogdet(matrix)[1] / 2, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("d", DIMENSIONS)
def test_solves_of_what_is_positive_definite_up_to_a_scaling(d):
    scaling = np.geomspace(1e-8, 1e8, d)
    matrix, b = np.eye(d) + scaling[:, None] * positive(d), np.eye(d)
    solved, half_logdet = _linalg.solve(jnp.asarray(matrix), jnp.asarray(b))
    exact = np.linalg.solve(np.diag(1 / scaling) + positive(d), np.diag(1 / scaling))
    chex.assert_trees_all_close(solved, exact, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(half_logdet, np.linalg.slogdet(matrix)[1] / 2, rtol=1e-10)


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_the_unrolled_path_equals_the_loop(d, monkeypatch):
    matrix, b = jnp.asarray(positive(d, 2)), np.random.default_rng(3).normal(size=(d, 1))
    small = _linalg.solve(matrix, jnp.asarray(b))
    monkeypatch.setattr(_linalg, "UNROLL", 0)
    chex.assert_trees_all_close(
        small, _linalg.solve(matrix, jnp.asarray(b)), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("d", [2, 5])
def test_an_indefinite_matrix_gives_nan_not_a_number(d):
    assert np.isnan(_linalg.solve(-jnp.eye(d), jnp.zeros((d, 1)))[1])


@pytest.mark.parametrize("d", [1, 2, 3, 6, 9, 24])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_rotations_diagonalize(d, dtype):
    eps, eye = float(jnp.finfo(dtype).eps), np.eye(d)
    root = np.random.default_rng(d).normal(size=(d, d))
    flat = np.outer(root[0], root[0])
    cases = [root + root.T, flat, -flat, eye, np.zeros((d, d)), np.diag(root[0]), np.ones((d, d))]
    # Symmetric up to rounding, with couplings of opposite signs.
    matrices = jnp.asarray(np.stack([*cases, 1e-12 * flat + eye, eye + 1e-18 * root]), dtype)
    values, axes = jax.jit(jax.vmap(_linalg.rotations))(matrices)
    for matrix, value, axis in zip(*map(np.float64, (matrices, values, axes)), strict=True):
        size = np.abs(matrix).max()
        np.testing.assert_allclose(axis @ axis.T, eye, atol=50 * d * eps)
        np.testing.assert_allclose(axis * value @ axis.T, matrix, atol=50 * d * eps * size)
        expected = np.linalg.eigvalsh(matrix)
        np.testing.assert_allclose(np.sort(value), expected, atol=50 * d * eps * size)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_square_root_of_singular_matrices(rank, dtype):
    d, eps = 3, float(jnp.finfo(dtype).eps)
    root = np.random.default_rng(rank).normal(size=(d, rank)) if rank else np.zeros((d, 0))
    matrix = jnp.asarray(root @ root.T, dtype)
    lower = _linalg.square_root(matrix)
    assert lower.dtype == dtype
    chex.assert_trees_all_close(jnp.triu(lower, 1), jnp.zeros((d, d), dtype), atol=0)
    # A closed pivot is one below d eps max(diag): what it drops is at most its square root per
    # entry off the diagonal.
    size = float(jnp.max(jnp.abs(matrix)))
    chex.assert_trees_all_close(lower @ lower.T, matrix, atol=2 * d * eps * size, rtol=0)


def test_square_root_closes_flat_directions_exactly():
    lower = _linalg.square_root(jnp.diag(jnp.asarray([0.0, 4.0, 0.0])))
    chex.assert_trees_all_equal(lower, jnp.diag(jnp.asarray([0.0, 2.0, 0.0])))
    # The columns of a rank-one matrix after the first are closed, not filled with rounding errors.
    v = jnp.asarray([1.0, 1 / 3, -0.7])
    assert np.all(np.asarray(_linalg.square_root(jnp.outer(v, v)))[:, 1:] == 0)


@pytest.mark.parametrize(
    "matrix", [np.zeros((2, 2)), np.diag([1.0, 0.0]), np.eye(2), np.ones((2, 2))], ids=str
)
def test_square_root_has_finite_gradients(matrix):
    gradient = jax.jacobian(_linalg.square_root)(jnp.asarray(matrix))
    assert np.all(np.isfinite(gradient))


def test_square_root_equals_cholesky_with_its_gradient_where_both_exist():
    matrix = jnp.asarray(positive(3))
    chex.assert_trees_all_close(_linalg.square_root(matrix), np.linalg.cholesky(matrix), rtol=1e-10)
    direction = jnp.asarray(positive(3, 5))
    pushed = lambda fn: jax.jvp(fn, (matrix,), (direction,))[1]
    chex.assert_trees_all_close(
        pushed(_linalg.square_root), pushed(jnp.linalg.cholesky), rtol=1e-9, atol=1e-10
    )


def test_square_root_keeps_small_directions_in_single_precision():
    matrix = jnp.diag(jnp.asarray([1.0, 1e-7], jnp.float32))
    np.testing.assert_allclose(_linalg.square_root(matrix), jnp.sqrt(matrix), rtol=1e-6)


def test_square_root_closes_negative_directions():
    np.testing.assert_allclose(
        _linalg.square_root(jnp.diag(jnp.asarray([-2.0, 4.0]))), np.diag([0.0, 2.0])
    )


@pytest.mark.parametrize("d", [2, 6])
def test_spectral_functions_and_their_derivatives_where_eigenvalues_coincide(d):
    tangent = np.random.default_rng(0).normal(size=(d, d))
    tangent = jnp.asarray(tangent + tangent.T)
    matrices = (jnp.eye(d), jnp.diag(jnp.arange(1.0, d + 1)), jnp.eye(d).at[0, 0].set(-1.0))
    for matrix, eigh in itertools.product(matrices, (jnp.linalg.eigh, _linalg.rotations)):
        value, slope = jax.jvp(lambda a: _linalg.spectral(jnp.exp, a, eigh), (matrix,), (tangent,))  # noqa: B023
        np.testing.assert_allclose(value, jax.scipy.linalg.expm(matrix), rtol=1e-10, atol=1e-12)
        step = 1e-5
        up, down = (jax.scipy.linalg.expm(matrix + sign * step * tangent) for sign in (1, -1))
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.optimized
def test_a_long_weighted_sum_keeps_single_precision():
    """Of three million terms; a product of matrices is 1e-3 off."""
    rng = np.random.default_rng(0)
    weights = np.exp(rng.normal(size=3_000_000)).astype(np.float32)
    values = rng.random((len(weights), 3)).astype(np.float32)
    expected = weights.astype(float) @ values.astype(float)
    jitted = jax.jit(_linalg.weighted_sum)(jnp.asarray(weights), jnp.asarray(values))
    direct = _linalg.weighted_sum(jnp.asarray(weights), jnp.asarray(values[:, 0]))
    assert jitted.dtype == jnp.float32
    np.testing.assert_allclose(jitted, expected, rtol=1e-6)
    np.testing.assert_allclose(direct, expected[0], rtol=1e-6)
    rows = _linalg.weighted_sum(jnp.asarray([2.0, 3.0]), jnp.arange(8.0).reshape(2, 2, 2))
    np.testing.assert_array_equal(rows, [[12.0, 17.0], [22.0, 27.0]])
