"""Distances between mixtures against assignments by enumeration, quantiles on the line, and finite
differences. Tier: exact.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import scipy.stats

import theory
import tiltjax as tj


def mixture(key, k, d, weights=None):
    keys = jax.random.split(jax.random.key(key), 2)
    root = jax.random.normal(keys[0], (k, d, d)) / 2
    weights = np.full(k, 1 / k) if weights is None else weights
    covs = jnp.einsum("kij,klj->kil", root, root) + 0.1 * jnp.eye(d)[None]
    return tj.GaussianMixture(weights, 2 * jax.random.normal(keys[1], (k, d)), covs)


def cost(one, i, other, j):
    """The squared Bures distance by matrix square roots."""
    m, s, n, t = (
        np.asarray(part) for part in (one.means[i], one.covs[i], other.means[j], other.covs[j])
    )
    root = scipy.linalg.sqrtm(s)
    return np.sum((m - n) ** 2) + np.trace(s + t - 2 * scipy.linalg.sqrtm(root @ t @ root).real)


def test_one_component_each_is_the_bures_distance_from_both_sides():
    one, other = mixture(0, 1, 2), mixture(1, 1, 2)
    got = theory.w2_bounds(one, other)
    np.testing.assert_allclose([got.lower, got.upper], np.sqrt(cost(one, 0, other, 0)), rtol=1e-12)
    np.testing.assert_allclose(got.plan, [[1.0]], rtol=1e-12)


def test_equal_weights_are_the_best_assignment():
    one, other = mixture(2, 4, 2), mixture(3, 4, 2)
    best = min(
        sum(cost(one, i, other, j) for i, j in enumerate(order)) / 4
        for order in itertools.permutations(range(4))
    )
    np.testing.assert_allclose(theory.w2_bounds(one, other).upper, np.sqrt(best), rtol=1e-12)


def test_the_plan_has_the_weights_as_marginals_and_is_optimal_by_duality():
    one, other = mixture(4, 4, 2, [0.2, 0.3, 0.4, 0.1]), mixture(5, 4, 2, [0.1, 0.45, 0.15, 0.3])
    got = theory.w2_bounds(one, other)
    np.testing.assert_allclose(got.plan.sum(axis=1), one.weights, atol=1e-14)
    np.testing.assert_allclose(got.plan.sum(axis=0), other.weights, atol=1e-14)
    costs = np.array([[cost(one, i, other, j) for j in range(4)] for i in range(4)])
    np.testing.assert_allclose(got.upper**2, np.sum(got.plan * costs), rtol=1e-12)
    # No cycle of exchanges between used entries lowers the cost (c-monotonicity).
    used = np.argwhere(np.asarray(got.plan) > 1e-12)
    for size in (2, 3):
        for cycle in itertools.permutations(range(len(used)), size):
            rows, columns = used[list(cycle)].T
            assert np.sum(costs[rows, columns]) <= np.sum(costs[rows, np.roll(columns, 1)]) + 1e-12


def test_the_distance_on_the_line_is_between_the_bounds():
    one = tj.GaussianMixture([0.3, 0.7], [[-2.0], [1.5]], [[[0.4]], [[0.9]]])
    other = tj.GaussianMixture([0.6, 0.4], [[-1.0], [2.5]], [[[0.7]], [[0.3]]])

    def grid(m):
        x = np.linspace(-12, 12, 200_001)
        z = (x[:, None] - np.asarray(m.means[:, 0])) / np.sqrt(np.asarray(m.covs[:, 0, 0]))
        return x, scipy.stats.norm.cdf(z) @ np.asarray(m.weights)

    level = (np.arange(400_000) + 0.5) / 400_000
    gap = np.interp(level, *grid(one)[::-1]) - np.interp(level, *grid(other)[::-1])
    exact = np.sqrt(np.mean(gap**2))
    got = theory.w2_bounds(one, other)
    assert got.lower + 0.01 < exact < got.upper - 0.01
    same = theory.w2_bounds(one, one)
    assert same.lower < 1e-7
    assert same.upper < 1e-7


def test_bounds_compile_map_and_differentiate():
    one, other = mixture(6, 2, 2, [0.35, 0.65]), mixture(7, 3, 2, [0.2, 0.5, 0.3])

    def bounds(logits, shift, stretch):
        moved = one.replace(logits, one.means + shift[None], one.covs * stretch)
        got = theory.w2_bounds(moved, other)
        return jnp.stack([got.lower, got.upper])

    point = jnp.array([0.1, 0.7]), jnp.array([0.3, -0.2]), jnp.asarray(1.2)
    direction, step = (jnp.array([0.4, -0.3]), jnp.array([1.0, 0.5]), jnp.asarray(0.2)), 1e-5
    jacobian = jax.jit(jax.jacrev(bounds, argnums=(0, 1, 2)))(*point)
    along = sum(j.reshape(2, -1) @ d.reshape(-1) for j, d in zip(jacobian, direction, strict=True))
    ends = [jnp.stack([x + step * d, x - step * d]) for x, d in zip(point, direction, strict=True)]
    up, down = jax.jit(jax.vmap(bounds))(*ends)
    np.testing.assert_allclose(along, (up - down) / (2 * step), rtol=1e-7)


def test_overlap_is_the_bhattacharyya_coefficient():
    pair = tj.GaussianMixture([0.2, 0.8], [[-0.5], [1.0]], [[[0.4]], [[1.3]]])
    p, q = (scipy.stats.norm(m, np.sqrt(v)).pdf for m, v in ((-0.5, 0.4), (1.0, 1.3)))
    expected = scipy.integrate.quad(lambda x: np.sqrt(p(x) * q(x)), -10, 10, epsabs=1e-12)[0]
    np.testing.assert_allclose(theory.overlap(pair), expected, rtol=1e-9)
    flat = jnp.asarray([[1.0, 0.0], [0.0, 0.0]])
    singular = tj.GaussianMixture([0.5, 0.5], [[0.0, 1.0], [2.0, 1.0]], jnp.stack([flat, flat]))
    np.testing.assert_allclose(theory.overlap(singular), np.exp(-0.5), rtol=1e-9)
    assert theory.overlap(tj.GaussianMixture([0.5, 0.5], [[0.0], [1.0]], jnp.zeros((2, 1, 1)))) == 0
    assert theory.overlap(tj.problems.gaussian().prior) == 0


def test_the_named_mixtures_are_far_enough_apart_for_laws_by_component():
    # Six standard deviations apart or more, where the laws warn below 4.9.
    got = {name: theory.overlap(tj.problems.get(name).prior) for name in tj.problems.NAMES}
    assert max(got.values()) < 0.02
    np.testing.assert_allclose(got["quadratic"], np.exp(-6.25), rtol=1e-9)
    np.testing.assert_allclose(got["bump"], np.exp(-4.5), rtol=1e-9)


def test_laws_by_component_warn_of_near_components():
    near = tj.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], jnp.ones((2, 1, 1)))
    with pytest.warns(UserWarning, match=r"overlap by 0\.607.*mean_drift_law"):
        theory.plug_in_law(near, tj.rewards.Quadratic([0.0]), 1.0)


def test_a_linear_program_that_is_not_solved_is_an_error(monkeypatch):
    stopped = functools.partial(scipy.optimize.linprog, options={"maxiter": 0})
    monkeypatch.setattr(scipy.optimize, "linprog", stopped)
    with pytest.raises(
        (ValueError, jax.errors.JaxRuntimeError), match=r"the transport plan failed: .*limit"
    ):
        theory.w2_bounds(mixture(2, 4, 2), mixture(3, 4, 2))


def test_mixtures_of_different_dimensions_are_refused():
    with pytest.raises(ValueError, match="got 1 and 2"):
        theory.w2_bounds(mixture(0, 1, 1), mixture(0, 1, 2))
