"""The law of k draws against brute-force quadrature in NumPy, and recorded simulations. Tier: exact
(its own error estimates).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import theory
import tiltjax as tj
from theory import many_draws

pytestmark = pytest.mark.optimized  # it runs for longer than it compiles


def law(k, scale=3.0, s2=0.5, y=2.5, d=1, mean=0.0):
    target = np.zeros(d)
    target[0] = y
    prior = tj.GaussianMixture([1.0], np.full((1, d), mean), [s2 * np.eye(d)])
    return theory.plug_in_law(prior, tj.rewards.Quadratic(target), scale, k=k)


def weighted_mean(delta, q, k, nodes=1201):
    """`E[sum W_i r_i / sum W_i]` for `r_i ~ N(delta, 1)`, `W = exp(-q r^2)`: trapezoids in r and in
    log s, deltas in a column.
    """
    z, dz = np.linspace(-9, 9, nodes, retstep=True)
    r = delta[:, None] + z
    u = q * r**2
    u -= u.min(axis=1, keepdims=True)
    mass = np.exp(-(z**2) / 2) * dz / np.sqrt(2 * np.pi)
    total = np.zeros_like(delta)
    step = 0.2
    for tau in np.arange(-np.log(k) - 36, u.max() + 4, step):
        race = np.minimum(tau - u, 10.0)
        survival = mass * np.exp(-np.exp(race))
        total += (
            step * k * (survival * np.exp(race) * r).sum(axis=1) * survival.sum(axis=1) ** (k - 1)
        )
        if survival.sum(axis=1).max() ** (k - 1) < 1e-12:
            break
    return total


@pytest.mark.parametrize(
    ("q", "p2", "k"),
    [
        (0.75, 3.0, 2),
        (0.75, 3.0, 8),
        (1e-3, 3.0, 100),
        (0.01, 300.0, 64),
        (2.0, 50.0, 10_000),
        (10.0, 3.0, 8),
        (20.0, 0.1, 1000),
    ],
)  # fmt: skip
def test_the_shrinkage_on_the_line_is_the_one_integral_formula(q, p2, k):
    delta = np.sqrt(p2 / q)
    got = many_draws.shrinkage(jnp.asarray(q), jnp.asarray(p2), k, 1)
    np.testing.assert_allclose(got * delta, weighted_mean(np.array([delta]), q, k)[0], rtol=2e-7)


def test_recorded_shrinkages():
    # Posterior mean 1, standard deviation 1/2, scale 3, y = 0.
    got = [
        float(many_draws.shrinkage(jnp.asarray(0.75), jnp.asarray(3.0), k, 1))
        for k in (1, 2, 8, 10_000)
    ]
    np.testing.assert_allclose(got, [1.0, 0.74852, 0.47912, 0.40005], atol=6e-6)


@pytest.mark.slow
@pytest.mark.parametrize("d", [1, 2, 3, 5, 20, 50])
def test_the_shrinkage_in_more_dimensions_is_an_expectation_over_pairs_of_draws(d):
    # k = 2: W_1 / (W_1 + W_2) = sigmoid(u_2 - u_1). One coordinate by a trapezoid, the rest
    # chi-square, for each of two draws.
    q, delta = 0.6, 1.3
    z, dz = np.linspace(-8, 8, 61, retstep=True)
    mass = np.exp(-(z**2) / 2) * dz / np.sqrt(2 * np.pi)
    if d == 1:
        rest, weight_across = np.zeros(1), np.ones(1)
    else:
        rest, weight_across = np.polynomial.legendre.leggauss(80)
        rest = (np.sqrt(d) + 7) * (rest + 1) / 2
        weight_across = weight_across * np.exp((d - 2) * np.log(rest) - rest**2 / 2)
        weight_across /= weight_across.sum()
    along = np.repeat(delta + z, len(rest))
    weight = np.outer(mass, weight_across).ravel()
    u = q * (along**2 + np.tile(rest**2, len(z)))
    got = 2 * (weight * along) @ (scipy.special.expit(u[None, :] - u[:, None]) @ weight)
    phi = many_draws.shrinkage(jnp.asarray(q), jnp.asarray(q * delta**2), 2, d)
    np.testing.assert_allclose(phi * delta, got, rtol=1e-7 if d <= 20 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "scale", "y"), [pytest.param(2, 3.0, 2.5, marks=pytest.mark.slow), (64, 0.8, -1.5)]
)
def test_moments_and_quantiles_on_the_line_solve_the_flow(k, scale, y):
    s = 0.5**0.5
    a, target = scale * 0.5, y / s
    start = np.linspace(-6, 6, 17)

    def drift(z, w):
        left = 1 - w**2
        return (
            -2
            * a
            * np.sqrt(left)
            * weighted_mean((w * z - target) / np.sqrt(left), a * left, k, nodes=181)
        )

    # Runge-Kutta of order 4, not to the end: the last step by its start.
    grid, z = np.linspace(0, 1 - 1e-9, 17), start
    for w, u in itertools.pairwise(grid):
        h = u - w
        k1 = drift(z, w)
        k2 = drift(z + h / 2 * k1, w + h / 2)
        k3 = drift(z + h / 2 * k2, w + h / 2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + drift(z + h * k3, u))
    ends, mass = z * s, np.exp(-(start**2) / 2)
    mass /= mass.sum()
    got = law(k, scale, y=y)
    error_mean, error_cov = (float(e) for e in got.error())
    assert max(error_mean, error_cov) < 1e-4
    assert abs(got.mean()[0] - mass @ ends) < 2e-5 + error_mean
    assert abs(got.cov()[0, 0] - mass @ (ends - mass @ ends) ** 2) < 2e-5 + error_cov
    inner = slice(5, 13, 3)
    quantiles = jax.vmap(got.quantile)(scipy.special.ndtr(start[inner]))
    np.testing.assert_allclose(quantiles, ends[inner], atol=1e-4)


@pytest.mark.slow
def test_the_recorded_simulations():
    # Mean and standard deviation along y, and across it, of simulated guided flows: s^2 = .5, scale
    # 3, y = 2.5, to about three digits.
    for k, mean, std in ((2, 2.862, 0.200), (64, 2.08, 0.275)):
        got = law(k)
        np.testing.assert_allclose([got.mean()[0], got.cov()[0, 0] ** 0.5], [mean, std], atol=3e-3)
    for k, mean, along, across in ((64, 2.117, 0.275, 0.328),):
        got = law(k, d=2)
        spread = np.sqrt(np.diag(got.cov()))
        np.testing.assert_allclose([got.mean()[0], *spread], [mean, along, across], atol=7e-3)


@pytest.mark.slow
@pytest.mark.parametrize("a", [1e-6, 1.0, 1e4])
def test_every_k_lies_between_one_draw_and_the_tilt_at_any_strength(a):
    one = theory.plug_in_law(
        tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]]), tj.rewards.Quadratic([2.0]), a
    )
    laws = [law(k, a, 1.0, 2.0) for k in (2, 10_000)]
    means, spreads = (
        [float(one.mean()[0]) for one in laws],
        [float(one.cov()[0, 0]) for one in laws],
    )
    slack = 3e-3 + 1e-9
    assert np.all(np.isfinite(means + spreads))
    assert spreads[0] >= float(one.covs[0, 0, 0]) - 1e-9
    assert np.all(np.diff(spreads) >= -1e-9)
    assert spreads[-1] <= 1 / (1 + 2 * a) + slack
    if a <= 1:  # beyond, the mean is no longer monotone in k
        assert np.all(np.diff([float(one.means[0, 0]), *means]) <= 1e-9)
    assert abs(means[-1] - 2 * 2 * a / (1 + 2 * a)) < max(0.02, 3e-3) * min(1, a) + slack


@pytest.mark.slow
def test_density_transport_and_sampling_are_of_one_law():
    d = 3
    got = law(8, d=d, mean=0.3)
    z = jnp.linspace(-1.0, 0.8, d)
    x, push = jax.linearize(got.transport, z)
    transpose = jax.linear_transpose(push, z)
    jacobian, backward = (
        jax.vmap(fn, out_axes=axis)(jnp.eye(d))
        for fn, axis in ((push, 1), (lambda y: transpose(y)[0], 0))
    )
    np.testing.assert_allclose(backward, jacobian, rtol=1e-12, atol=1e-12)
    normal = -jnp.sum(z**2) / 2 - d / 2 * jnp.log(2 * jnp.pi)
    np.testing.assert_allclose(got.log_prob(x), normal - jnp.linalg.slogdet(jacobian)[1], rtol=1e-6)
    x = got.sample(jax.random.key(0), 4000)
    error = 5 * np.sqrt(np.diag(got.cov()) / len(x))
    assert np.all(np.abs(np.mean(x, axis=0) - got.mean()) < error)


@pytest.mark.nightly
def test_the_law_compiles_maps_and_differentiates():
    def moments(scale, s2, y):
        prior = tj.GaussianMixture([1.0], [[0.1, 0.0]], s2 * jnp.eye(2)[None])
        mean, cov = theory.plug_in_law(
            prior, tj.rewards.Quadratic(jnp.stack([y, 0.0])), scale, k=4
        ).mean_and_cov()
        return jnp.stack([mean[0], cov[0, 0], cov[1, 1]])

    slopes, points = (
        jax.jit(jax.jacrev(moments, argnums=(0, 1, 2))),
        np.array([[3.0, 0.5, 2.5], [3.0, 0.5, 0.1]]),
    )
    along = np.array(
        [[0.7, 0.1, -0.5], [0.0, 0.0, 1.0]]
    )  # the second at the prior's mean, towards which the axis has no direction
    ends = np.stack([points + 1e-4 * along, points - 1e-4 * along]).reshape(4, 3)
    up, down = np.asarray(jax.jit(jax.vmap(moments))(*jnp.asarray(ends.T))).reshape(2, 2, 3)
    for i, point in enumerate(points):
        parts = along[i][:, None] * np.stack(slopes(*point))
        if i == 0:
            assert np.all(
                np.abs(parts).min(0) > 1e-2 * np.abs(parts).max(0)
            )  # none is too small to be missed
        np.testing.assert_allclose(
            parts.sum(0), (up - down)[i] / 2e-4, rtol=1e-5, atol=(0, 1e-7)[i]
        )


@pytest.mark.nightly
def test_the_log_density_differentiates():
    def log_prob(scale, x):
        prior = tj.GaussianMixture([1.0], [[0.1]], [[[0.5]]])
        return theory.plug_in_law(prior, tj.rewards.Quadratic([2.5]), scale, k=4).log_prob(x[None])

    compiled, point = jax.jit(log_prob), np.array([3.0, 2.1])
    slopes = jax.jit(jax.grad(log_prob, argnums=(0, 1)))(*point)
    for slope, step in zip(slopes, 1e-4 * np.eye(2), strict=True):
        expected = (compiled(*(point + step)) - compiled(*(point - step))) / 2e-4
        np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_refusals_say_why():
    plane = tj.GaussianMixture([1.0], [[0.0, 0.0]], [[[0.5, 0.0], [0.0, 0.7]]])
    with pytest.raises(ValueError, match="isotropic covariance"):
        theory.plug_in_law(plane, tj.rewards.Quadratic([0.0, 1.0]), 1.0, k=3)
    with pytest.raises(ValueError, match="mixture of 2"):
        theory.plug_in_law(
            tj.problems.quadratic().prior, tj.rewards.Quadratic([0.0, 1.0]), 1.0, k=3
        )
    with pytest.raises(ValueError, match="constant scale, got Damped"):
        law(2, tj.Damped(1.0, 1.0))
    with pytest.raises(ValueError, match="<= 1e4, got"):
        law(2, 1e6)
    with pytest.raises(ValueError, match="positive scale"):
        law(2, 0.0)
    with pytest.raises(ValueError, match="quantiles need a law on the line"):
        law(2, d=2).quantile(0.5)
