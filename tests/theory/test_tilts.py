"""Closed-form tilts against quadrature and high-precision arithmetic. Tier: exact."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.linalg

import theory
import tiltjax as tj


@pytest.mark.parametrize("name", ["gaussian", "quadratic", "noniso", "unequal", "uncentered"])
def test_tilt_of_named_problems_matches_quadrature(name):
    problem = tj.problems.get(name)
    exact = theory.tilt(problem.prior, problem.reward, problem.scale)
    grid = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale)
    assert np.isclose(exact.log_norm, grid.log_norm, rtol=0, atol=1e-10)
    assert np.isclose(exact.log_norm, problem.log_norm, rtol=0, atol=5e-5)
    np.testing.assert_allclose(exact.mixture.mean(), grid.mean(), atol=1e-10)
    np.testing.assert_allclose(exact.mixture.cov(), grid.cov(), atol=1e-10)
    x = jnp.array([0.3, 1.2])
    assert np.isclose(exact.log_prob(x), grid.log_prob(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["double_well", "step", "bump"])
def test_quadrature_reproduces_the_recorded_normalizing_constants(name):
    problem = tj.problems.get(name)
    grid = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale)
    assert np.isclose(grid.log_norm, problem.log_norm, rtol=0, atol=6e-5)


@pytest.mark.parametrize("method", [theory.quadrature.tilt, theory.quadrature.log_norm])
def test_quadrature_refuses_a_reward_that_is_no_number(method):
    """A reward of shape (1,) would broadcast against the weights of the nodes."""
    prior = tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]])
    with pytest.raises(ValueError, match=r"one scalar for one sample, got shape \(1,\)"):
        method(prior, lambda x: x, 1.0)


@pytest.mark.slow
def test_in_single_precision_a_grid_draws_no_cell_without_mass():
    """The rounding of a cumulative sum gave 4e-6 of the mass to cells of reward -inf."""
    single = lambda array: jnp.asarray(array, jnp.float32)
    prior = tj.GaussianMixture(single([1.0]), single(np.zeros((1, 2))), single(np.eye(2)[None]))
    wall = lambda x: jnp.where(x[1] < 0, 0.0, -jnp.inf).astype(x.dtype)
    grid = theory.quadrature.tilt(prior, wall, single(1.0))
    x = grid.sample(jax.random.key(0), 4_000_000)
    assert float(jnp.max(x[:, 1])) < float(grid.cell[1])


def test_in_single_precision_a_mean_far_from_the_origin_has_the_rounding_of_one_number():
    single = lambda array: jnp.asarray(array, jnp.float32)
    mean, std = 466.0, 0.0015
    prior = tj.GaussianMixture(single([1.0]), single([[mean]]), single([[[std**2]]]))
    found = theory.quadrature.tilt(prior, lambda x: 0 * x[0], single(1.0))
    assert abs(float(found.mean()[0]) - mean) <= np.spacing(np.float32(mean))
    assert float(found.cov()[0, 0]) == pytest.approx(std**2, rel=0.01)


def test_quadrature_of_one_node_is_refused():
    prior = tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]])
    with pytest.raises(ValueError, match="nodes must be at least 2"):
        theory.quadrature.log_norm(prior, lambda x: x[0], 1.0, nodes=1)


def test_double_well_and_bump_have_the_recorded_moments():
    problem = tj.problems.double_well()
    grid = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale)
    right = lambda fn: grid.expect(lambda x: jnp.where(x[0] > 0, 2 * fn(x), jnp.zeros_like(fn(x))))
    mean = right(lambda x: x)
    np.testing.assert_allclose(mean, [2.4428, 0.7328], atol=6e-5)
    np.testing.assert_allclose(right(lambda x: x**2) - mean**2, [0.0518, 0.1297], atol=6e-5)
    problem = tj.problems.bump()
    grid = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale)
    assert np.isclose(grid.expect(lambda x: jnp.where(x[0] >= 0, 1.0, 0.0)), 0.98472, atol=6e-6)


REWARDS = {
    "linear": tj.rewards.LinearReward([0.7, -0.3]),
    "diagonal": tj.rewards.Quadratic([0.5, 1.0], weight=[2.0, 0.5]),
    "matrix": tj.rewards.Quadratic([0.5, 1.0], weight=[[1.0, 0.4], [0.4, 0.6]]),
    "indefinite": tj.rewards.Quadratic([0.5, 1.0], weight=[[0.8, 0.0], [0.0, -0.3]]),
    "sum": tj.rewards.Quadratic([0.5, 1.0])
    + 2 * tj.rewards.LinearReward([0.1, 0.5])
    - tj.rewards.Quadratic([3.0, 0.0], 0.3),
    "flat": 0.0 * tj.rewards.Quadratic([1.0, 1.0]),
}


@pytest.mark.parametrize("name", REWARDS)
def test_every_quadratic_reward_matches_quadrature(name):
    prior = tj.GaussianMixture(
        [0.3, 0.7],
        [[-1.0, 0.5], [1.5, 0.0]],
        [[[0.5, 0.2], [0.2, 0.7]], [[0.4, -0.1], [-0.1, 0.3]]],
    )
    exact = theory.tilt(prior, REWARDS[name], 1.3)
    grid = theory.quadrature.tilt(prior, REWARDS[name], 1.3, reach=14.0)
    assert np.isclose(exact.log_norm, grid.log_norm, rtol=0, atol=1e-9)
    np.testing.assert_allclose(exact.mixture.mean(), grid.mean(), atol=1e-9)
    np.testing.assert_allclose(exact.mixture.cov(), grid.cov(), atol=1e-9)
    assert np.isclose(
        theory.expected_reward(exact.mixture, REWARDS[name]), grid.expect(REWARDS[name]), atol=1e-9
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_tilt_keeps_its_digits_at_extreme_scales(scale):
    mean, cov = np.array([0.3, -1.2]), np.array([[0.6, 0.25], [0.25, 0.9]])
    target, weight = np.array([2.0, 0.5]), np.array([[1.0, 0.3], [0.3, 0.4]])
    got = theory.tilt(
        tj.GaussianMixture([1.0], mean[None], cov[None]),
        tj.rewards.Quadratic(target, weight),
        scale,
    )
    with mpmath.workdps(60):
        m, s, y, h = (mpmath.matrix(a.tolist()) for a in (mean, cov, target, weight))
        big = mpmath.eye(2) + 2 * mpmath.mpf(scale) * s * h
        tilted_mean = y + big**-1 * (m - y)
        log_norm = (
            -mpmath.log(mpmath.det(big)) / 2
            - mpmath.mpf(scale) * ((m - y).T * h * (big**-1 * (m - y)))[0]
        )
        expected_mean = np.array([float(v) for v in tilted_mean])
        expected_cov = np.array((big**-1 * s).tolist(), dtype=float)
    np.testing.assert_allclose(got.mixture.means[0], expected_mean, rtol=1e-12)
    np.testing.assert_allclose(got.mixture.covs[0], expected_cov, rtol=1e-10)
    np.testing.assert_allclose(float(got.log_norm), float(log_norm), rtol=1e-12, atol=1e-15)


def test_point_masses_are_reweighted_by_their_reward():
    prior = tj.GaussianMixture([0.2, 0.8], [[0.0, 1.0], [2.0, 0.0]], jnp.zeros((2, 2, 2)))
    reward = tj.rewards.Quadratic([0.0, 0.0])
    got = theory.tilt(prior, reward, 0.5)
    expected = np.array([0.2 * np.exp(-0.5), 0.8 * np.exp(-2.0)])
    np.testing.assert_allclose(got.mixture.weights, expected / expected.sum(), rtol=1e-12)
    np.testing.assert_allclose(got.mixture.means, prior.means, atol=1e-15)
    np.testing.assert_allclose(float(got.log_norm), np.log(expected.sum()), rtol=1e-12)


def test_tilting_twice_is_tilting_once_by_the_sum():
    problem = tj.problems.noniso()
    other = tj.rewards.LinearReward([0.4, -0.2])
    once = theory.tilt(problem.prior, problem.reward + other, 2.0)
    first = theory.tilt(problem.prior, problem.reward, 2.0)
    twice = theory.tilt(first.mixture, other, 2.0)
    np.testing.assert_allclose(once.log_norm, first.log_norm + twice.log_norm, rtol=1e-12)
    np.testing.assert_allclose(once.mixture.means, twice.mixture.means, atol=1e-12)
    np.testing.assert_allclose(once.mixture.weights, twice.mixture.weights, atol=1e-12)


def test_log_norm_differentiates_to_the_expected_reward_even_for_isotropic_covariances():
    problem = tj.problems.quadratic()
    slope = jax.grad(lambda scale: theory.tilt(problem.prior, problem.reward, scale).log_norm)(3.0)
    expected = theory.expected_reward(
        theory.tilt(problem.prior, problem.reward, 3.0).mixture, problem.reward
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-10)
    by_cov = jax.grad(lambda prior: theory.tilt(prior, problem.reward, 3.0).log_norm)(problem.prior)
    assert np.all(np.isfinite(by_cov.covs))


def test_refusals_say_why_and_what_to_use():
    prior = tj.problems.quadratic().prior
    with pytest.raises(ValueError, match=r"eigenvalue -\d.*Lower the scale"):
        theory.tilt(prior, tj.rewards.Quadratic([0.0, 0.0], weight=-1.0), 2.0)
    with pytest.raises(ValueError, match=r"Bump.*theory\.quadrature\.tilt"):
        theory.tilt(prior, tj.rewards.Bump([0.0, 0.0]), 2.0)
    with pytest.raises(ValueError, match="must not be negative"):
        theory.tilt(prior, tj.rewards.Quadratic([0.0, 0.0]), -1.0)
    with pytest.raises(ValueError, match="2 dimensions"):
        theory.tilt(prior, tj.rewards.Quadratic([0.0, 0.0, 0.0]), 1.0)
    wide = tj.GaussianMixture([1.0], jnp.zeros((1, 3)), jnp.eye(3)[None])
    with pytest.raises(ValueError, match="one or two dimensions, got 3"):
        theory.quadrature.tilt(wide, tj.rewards.LinearReward([1.0, 0.0, 0.0]), 1.0)
    with pytest.raises(ValueError, match="one or two dimensions, got 3"):
        theory.quadrature.log_norm(wide, tj.rewards.LinearReward([1.0, 0.0, 0.0]), 1.0)
    with pytest.raises(ValueError, match=r"Bump.*not 3"):
        theory.log_h(wide, tj.rewards.Bump([1.0, 0.0, 0.0]), 1.0)


def test_bures_is_the_wasserstein_distance_of_gaussians():
    a, b = np.array([[0.6, 0.2], [0.2, 0.5]]), np.array([[1.2, -0.4], [-0.4, 0.9]])
    m, n = np.array([0.3, -1.0]), np.array([1.0, 0.5])
    root = scipy.linalg.sqrtm(a)
    expected = np.sum((m - n) ** 2) + np.trace(a + b - 2 * scipy.linalg.sqrtm(root @ b @ root).real)
    np.testing.assert_allclose(
        theory.bures(m, jnp.asarray(a), n, jnp.asarray(b)), expected, rtol=1e-12
    )
    # Singular covariances: a segment against a point, and against a parallel segment.
    flat = jnp.asarray([[4.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(theory.bures(m, flat, m, jnp.zeros((2, 2))), 4.0, rtol=1e-12)
    np.testing.assert_allclose(theory.bures(m, flat, m, flat / 4), 1.0, rtol=1e-12)
    # d/dt of W2^2(N(0, t I), N(0, I)) in two dimensions is 2 (1 - 1 / sqrt(t)): isotropic, where
    # singular values coincide.
    slope = jax.grad(lambda t: theory.bures(m, t * jnp.eye(2), m, jnp.eye(2)))(4.0)
    np.testing.assert_allclose(slope, 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", ["quadratic", "noniso", "uncentered"])
def test_the_effective_sample_size_of_unguided_samples(name):
    problem, scale, runs, num = tj.problems.get(name), 0.1, 500, 400
    fraction = theory.prior_ess(problem.prior, problem.reward, scale)
    x = problem.prior.sample(jax.random.key(0), runs * num)
    log_weights = scale * jax.vmap(problem.reward)(x)
    # E[w]^2 / E[w^2] by a ratio of means, whose error follows by the delta method.
    weights = np.exp(np.asarray(log_weights))
    ratio = weights.mean() ** 2 / np.mean(weights**2)
    influence = 2 * weights / weights.mean() - weights**2 / np.mean(weights**2)
    assert abs(ratio - fraction) < 5 * ratio * influence.std() / len(weights) ** 0.5
    # The spread of log Z over runs, to leading order in 1 / num.
    log_norms = jax.nn.logsumexp(log_weights.reshape(runs, num), axis=1) - np.log(num)
    predicted = np.sqrt((1 / fraction - 1) / num)
    assert abs(np.std(log_norms) / predicted - 1) < 5 / np.sqrt(2 * runs) + 1 / num**0.5


def test_the_effective_sample_size_sweeps_and_differentiates():
    problem = tj.problems.noniso()
    ess = lambda scale: theory.prior_ess(problem.prior, problem.reward, scale)
    fractions = jax.vmap(ess)(jnp.asarray([0.0, 1e-3, 1.0, 1e3]))
    assert np.isclose(fractions[0], 1)
    assert np.all(np.diff(fractions) < 0)
    assert np.isfinite(jax.grad(ess)(0.3))
    theory.tilt(problem.prior, -1 * problem.reward, 0.4)  # has a finite mass
    with pytest.raises(ValueError, match="no finite mass"):
        theory.prior_ess(problem.prior, -1 * problem.reward, 0.4)
