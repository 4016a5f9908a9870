"""Small positive-definite solves, and roots of singular matrices, against NumPy. Tier: exact
(float64, 1e-10).
"""

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


@pytest.mark.parametrize("d", DIMENSIONS)
def test_solves_and_determinants(d):
    matrix, b = positive(d), np.random.default_rng(1).normal(size=d)
    factor = _linalg.cholesky(jnp.asarray(matrix))
    assert isinstance(factor, list) == (d <= _linalg.UNROLL)
    half = _linalg.half_solve(factor, jnp.asarray(b))
    solved = jnp.asarray(_linalg.back_solve(factor, half))
    chex.assert_trees_all_close(solved, np.linalg.solve(matrix, b), rtol=1e-10)
    chex.assert_trees_all_close(
        jnp.sum(jnp.asarray(half) ** 2), b @ np.linalg.solve(matrix, b), rtol=1e-10
    )
    chex.assert_trees_all_close(
        _linalg.half_logdet(factor), np.linalg.slogdet(matrix)[1] / 2, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_the_unrolled_path_equals_lapack(d, monkeypatch):
    matrix, b = jnp.asarray(positive(d, 2)), jnp.asarray(np.random.default_rng(3).normal(size=d))

    def everything():
        factor = _linalg.cholesky(matrix)
        half = _linalg.half_solve(factor, b)
        return (
            jnp.asarray(half),
            jnp.asarray(_linalg.back_solve(factor, half)),
            _linalg.half_logdet(factor),
        )

    small = everything()
    monkeypatch.setattr(_linalg, "UNROLL", 0)
    assert not isinstance(_linalg.cholesky(matrix), list)
    chex.assert_trees_all_close(small, everything(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("d", [2, 5])
def test_an_indefinite_matrix_gives_nan_not_a_number(d):
    factor = _linalg.cholesky(-jnp.eye(d))
    assert np.all(np.isnan(_linalg.half_logdet(factor)))


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
    for matrix in (jnp.eye(d), jnp.diag(jnp.arange(1.0, d + 1)), jnp.eye(d).at[0, 0].set(-1.0)):
        value, slope = jax.jvp(lambda a: _linalg.spectral(jnp.exp, a), (matrix,), (tangent,))
        np.testing.assert_allclose(value, jax.scipy.linalg.expm(matrix), rtol=1e-10, atol=1e-12)
        step = 1e-5
        up, down = (jax.scipy.linalg.expm(matrix + sign * step * tangent) for sign in (1, -1))
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)
