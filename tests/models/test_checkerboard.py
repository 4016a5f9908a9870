"""The checkerboard's denoiser against independent quadrature, in both precisions. Tiers: exact,
statistical.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj

BOARD = tj.models.Checkerboard()
SQUARES = [(i - 3.0, j - 3.0) for i in range(6) for j in range(6) if (i + j) % 2 == 0]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)
DENOISE = jax.jit(lambda model, t, x: model.denoise(t, x))


def brute_force(alpha, sigma, x):
    """`E[X_1 | X_t = x]` by 400 x 400 Gauss-Legendre nodes in each of the 18 squares."""
    u = (NODES + 1) / 2
    log_view = lambda z, at: -((at - alpha * z) ** 2) / (2 * sigma**2)
    parts = [(log_view(a + u, x[0]), log_view(b + u, x[1]), a + u, b + u) for a, b in SQUARES]
    peak = max(p[0].max() + p[1].max() for p in parts)
    mass, mean = 0.0, np.zeros(2)
    for first, second, z1, z2 in parts:
        shift = (peak / 2,) * 2
        w1, w2 = WEIGHTS * np.exp(first - shift[0]), WEIGHTS * np.exp(second - shift[1])
        mass += w1.sum() * w2.sum()
        mean += np.array([(w1 @ z1) * w2.sum(), w1.sum() * (w2 @ z2)])
    return mean / mass


POINTS = [(0.3, 0.7), (0.3, -0.7), (1.2, 2.9), (-2.0, 4.0), (-3.3, -3.1), (0.0, 0.0)]


@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 0.8, 0.9, 0.93, 0.97])
def test_the_denoiser_matches_quadrature(t):
    alpha, sigma = t, (1 - t) * 3**0.5
    for point in POINTS:
        x = np.array(point) * max(t, 0.5)
        got = DENOISE(BOARD, jnp.asarray(t), jnp.asarray(x))
        np.testing.assert_allclose(got, brute_force(alpha, sigma, x), atol=1e-9)


@pytest.mark.parametrize("t", [1e-4, 1e-3, 0.1, 0.5, 0.8, 0.93, 0.97, 0.99, 0.999])
def test_single_precision_agrees_with_double(t):
    single = tj.models.Checkerboard(tj.Linear(jnp.asarray(3**0.5, jnp.float32)), dtype=jnp.float32)
    for point in POINTS:
        x = jnp.asarray(point, jnp.float32) * max(t, 0.5)
        precise = DENOISE(BOARD, jnp.asarray(np.float64(np.float32(t))), x.astype(jnp.float64))
        # Between squares the weights are exponentials of snr * distance^2: their rounding is that
        # times eps.
        room = 20 * np.finfo(np.float32).eps * (1 + float(BOARD.interpolant.snr(jnp.asarray(t))))
        np.testing.assert_allclose(
            DENOISE(single, jnp.asarray(t, jnp.float32), x), precise, atol=room
        )


@pytest.mark.slow
@pytest.mark.optimized
def test_samples_of_the_flow_lie_on_the_board_with_its_moments():
    x = tj.sample(jax.random.key(0), BOARD, num=4000, steps=200).x
    filled = np.asarray(jax.vmap(BOARD.log_prob)(x)) > -np.inf
    assert filled.mean() > 0.98  # the edges are blurred by the last steps
    exact = BOARD.sample(jax.random.key(1), 4000)
    assert np.all(np.asarray(jax.vmap(BOARD.log_prob)(exact)) > -np.inf)
    for values in (x, x**2, exact, exact**2):
        power = 1 if values is x or values is exact else 2
        mean, error = np.mean(values, axis=0), np.std(values, axis=0) / np.sqrt(len(values))
        assert np.all(np.abs(mean - (0.0 if power == 1 else 3.0)) < 5 * error)


def test_the_gradient_is_finite_at_every_time():
    slope = jax.jit(jax.vmap(jax.jacobian(BOARD.denoise, argnums=1), in_axes=(None, 0)))
    for t in (1e-3, 0.5, 0.9, 0.999):
        assert np.all(np.isfinite(slope(jnp.asarray(t), jnp.asarray(POINTS))))


@pytest.mark.parametrize("state", [[0.999, 0.001], [2.0005, -2.9995], [9.0, -40.0]])
def test_single_precision_near_and_beyond_corners(state):
    t = 0.9995
    double = eqx.filter_jit(tj.models.Checkerboard(dtype=jnp.float64).denoise)(
        jnp.asarray(t), jnp.asarray(state)
    )
    single = tj.models.Checkerboard(tj.Linear(jnp.float32(3**0.5)), dtype=jnp.float32)
    value = eqx.filter_jit(single.denoise)(jnp.float32(t), jnp.asarray(state, jnp.float32))
    np.testing.assert_allclose(value, double, atol=1e-4)
