"""Diversities against closed forms of Gaussians and circles, brute force and laws that hold for any
distribution.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from tiltjax import metrics
from tiltjax.particles import Particles


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def weighted(x, weights):
    return Particles(x, jnp.log(weights) + 300.0, jnp.zeros(()))


WITHIN_FIVE = 5.0
SPREAD = np.array([3.0, 0.2, 1.5, 1.0])


def test_pairwise_diversity_is_the_mean_distance():
    x = normal(0, 70, 4)
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(70, 1)]
    assert metrics.pairwise_diversity(x) == pytest.approx(distances.mean(), abs=1e-12)
    assert metrics.pairwise_diversity(jnp.array([[0.0], [3.0]])) == 3
    assert metrics.pairwise_diversity(jnp.ones((5, 2))) == 0
    assert metrics.pairwise_diversity(weighted(x, jnp.arange(70) < 2)) == pytest.approx(
        distances[0], abs=1e-12
    )


def test_spectral_diversity_counts_directions():
    corners = jnp.concatenate([jnp.eye(5), -jnp.eye(5)])
    assert metrics.spectral_diversity(corners) == pytest.approx(5, abs=1e-12)
    assert metrics.spectral_diversity(
        corners * jnp.array([[1.0, 1.0, 0.0, 0.0, 0.0]])
    ) == pytest.approx(2, abs=1e-12)
    assert metrics.spectral_diversity(
        jnp.arange(10.0)[:, None] * jnp.arange(5.0)[None]
    ) == pytest.approx(1, abs=1e-9)
    assert metrics.spectral_diversity(jnp.full((10, 5), 0.1)) == 0
    x = normal(0, 50, 3) * jnp.array([[1.0, 2.0, 5.0]])
    values = np.linalg.eigvalsh(np.cov(x.T))
    expected = np.exp(stats.entropy(values / values.sum()))
    assert metrics.spectral_diversity(7 * x + 3) == pytest.approx(expected, abs=1e-10)
    repeated = jnp.concatenate([x[:25], x[:25]])
    got = metrics.spectral_diversity(weighted(x, jnp.arange(50) < 25))
    assert got == pytest.approx(float(metrics.spectral_diversity(repeated)), abs=1e-10)


# --- directions


def test_cosine_diversity_is_the_mean_over_pairs():
    x, weights = np.asarray(normal(0, 40, 3)), np.arange(1.0, 41.0)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows, columns = np.triu_indices(40, 1)
    pairs = 1 - np.sum(units[rows] * units[columns], axis=1)
    assert metrics.cosine_diversity(x) == pytest.approx(pairs.mean(), abs=1e-12)
    expected = np.average(pairs, weights=weights[rows] * weights[columns])
    assert metrics.cosine_diversity(weighted(jnp.asarray(x), weights)) == pytest.approx(
        expected, abs=1e-12
    )
    assert metrics.cosine_diversity(x * weights[:, None]) == pytest.approx(
        pairs.mean(), abs=1e-12
    )  # lengths say nothing
    assert metrics.cosine_diversity(jnp.full((5, 2), 0.1)) == pytest.approx(0, abs=1e-30)
    assert metrics.cosine_diversity(jnp.array([[2.0, 0.0], [-1.0, 0.0]])) == pytest.approx(
        2, abs=1e-12
    )


def test_cosine_diversity_of_a_normal_angle():
    """`E exp(i a) = exp(i m - s^2 / 2)`, and so `1 - exp(-s^2)`."""
    s, sets = 0.7, 200
    angle = 0.4 + s * normal(1, sets, 100)
    values = jax.vmap(lambda a: metrics.cosine_diversity(jnp.stack([jnp.cos(a), jnp.sin(a)], 1)))(
        angle
    )
    off = values.mean() + jnp.expm1(-(s**2))
    assert abs(off) < WITHIN_FIVE * metrics.standard_error(values) < 0.02


# --- spectra


def test_truncated_entropy_is_that_of_the_largest_variances():
    x = normal(0, 60, 4) * SPREAD[None]
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    for k in (1, 3, 4):
        expected = k / 2 * np.log(2 * np.pi * np.e) + np.log(values[:k]).sum() / 2
        assert metrics.truncated_entropy(x, k) == pytest.approx(expected, abs=1e-10)
    whole = stats.multivariate_normal(np.zeros(4), np.cov(x.T)).entropy()
    assert metrics.truncated_entropy(x, 4) == pytest.approx(whole, abs=1e-10)
    assert metrics.truncated_entropy(3 * x + 5, 2) == pytest.approx(
        float(metrics.truncated_entropy(x, 2)) + 2 * np.log(3), abs=1e-10
    )
    # Whole weights are repetitions, but for the one that is unbiased: 1 - sum v^2 in place of 1 - 1
    # / n.
    counts = jnp.arange(60) % 3
    repeated = jnp.repeat(x, counts, axis=0, total_repeat_length=60)
    unbiased = np.log((1 - 1 / 60) / (1 - float(jnp.sum(counts**2)) / 60**2))
    expected = float(metrics.truncated_entropy(repeated, 3)) + 3 / 2 * unbiased
    assert metrics.truncated_entropy(weighted(x, counts), 3) == pytest.approx(expected, abs=1e-10)


def test_truncated_entropy_of_gaussian_samples_is_wisharts():
    """`E log det` of a sample covariance:
    `log det C + sum_i digamma((n - i) / 2) - d log((n - 1) / 2)`.
    """
    n, d, sets = 12, 4, 400
    values = jax.vmap(lambda z: metrics.truncated_entropy(z, d))(
        normal(2, sets, n, d) * SPREAD[None, None]
    )
    truth = stats.multivariate_normal(np.zeros(d), np.diag(SPREAD**2)).entropy()
    bias = (special.digamma((n - np.arange(1, d + 1)) / 2).sum() - d * np.log((n - 1) / 2)) / 2
    off = float(values.mean()) - truth - bias
    assert abs(off) < WITHIN_FIVE * metrics.standard_error(values) < abs(bias) / 2


def test_a_direction_without_variance_has_no_entropy():
    x = normal(0, 30, 3) @ jnp.array([[1.0, 0.3, 0.3], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert jnp.isfinite(metrics.truncated_entropy(x, 2))
    assert metrics.truncated_entropy(x, 3) == -jnp.inf


def test_spectral_distance_compares_sorted_variances():
    x, y = normal(0, 50, 4) * SPREAD[None], normal(1, 70, 4)
    spectrum = lambda x: np.sort(np.linalg.eigvalsh(np.cov(x.T)))
    expected = np.linalg.norm(spectrum(x) - spectrum(y))
    assert metrics.spectral_distance(x, y) == pytest.approx(expected, abs=1e-10)
    turn = np.linalg.qr(normal(2, 4, 4))[0]
    assert metrics.spectral_distance(x, x @ turn + 7) == pytest.approx(0, abs=1e-10)
    assert metrics.spectral_distance(x, 2 * x) == pytest.approx(
        3 * np.linalg.norm(spectrum(x)), abs=1e-10
    )
    assert expected <= np.linalg.norm(np.cov(x.T) - np.cov(y.T))
    few = jnp.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])  # two points of variance 2 along one axis
    assert metrics.spectral_distance(few, 0 * few) == pytest.approx(2, abs=1e-12)


# --- nearest neighbors


def brute(x, base, k):
    """Recall and coverage from the whole matrices of distances."""
    between = lambda a, b: np.linalg.norm(np.asarray(a)[:, None] - np.asarray(b)[None], axis=-1)
    balls_x, balls_base = (
        np.sort(between(x, x), axis=1)[:, k],
        np.sort(between(base, base), axis=1)[:, k],
    )
    reached = between(base, x)
    return np.mean((reached <= balls_x[None]).any(axis=1)), np.mean(
        (reached <= balls_base[:, None]).any(axis=1)
    )


@pytest.mark.parametrize("k", [1, 4])
def test_recall_and_coverage_are_their_definitions(k):
    x, base = 0.6 * normal(0, 45, 3) + 0.3, normal(1, 60, 3)
    expected = brute(x, base, k)
    assert 0.05 < expected[1] < 0.95
    got = metrics.recall(x, base, k), metrics.coverage(x, base, k)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    equal = weighted(x, jnp.ones(45)), weighted(base, jnp.ones(60))
    np.testing.assert_allclose(
        (metrics.recall(*equal, k), metrics.coverage(*equal, k)), expected, atol=1e-12
    )


def test_recall_and_coverage_on_a_line():
    x, base = jnp.arange(4.0)[:, None], jnp.array([[-1.0], [3.5], [4.5], [10.0]])
    assert metrics.recall(x, base, 1) == 0.5  # the balls fill [-1, 4]
    assert (
        metrics.coverage(x, base, 1) == 0.5
    )  # out to 4.5, 1, 1 and 5.5, for distances 1, .5, 1.5 and 7
    assert metrics.coverage(x[:1], base, 1) == 0.25


@pytest.mark.parametrize(("n", "m", "k"), [(50, 50, 5), (30, 60, 3)])
def test_coverage_between_two_sets_of_one_law_is_known(n, m, k):
    """A base point is missed if its k nearest among the other base points and the samples are all
    of the base.
    """
    sets = 300
    values = jax.vmap(lambda x, y: metrics.coverage(x, y, k))(
        normal(3, sets, n, 2) ** 3, normal(4, sets, m, 2) ** 3
    )
    missed = special.binom(m - 1, k) / special.binom(n + m - 1, k)
    off = float(values.mean()) - (1 - missed)
    assert abs(off) < WITHIN_FIVE * metrics.standard_error(values) < 0.03


def test_a_lost_mode_is_lost_to_both():
    base = normal(0, 200, 2) + jnp.where(jnp.arange(200) < 60, 50.0, 0.0)[:, None]
    kept = normal(1, 200, 2)
    both = normal(1, 200, 2) + jnp.where(jnp.arange(200) < 60, 50.0, 0.0)[:, None]
    for measure in (metrics.recall, metrics.coverage):
        assert measure(both, base) > 0.85
        assert 0.85 * 0.7 < measure(kept, base) <= 0.7


# --- jit, precision, refusals

CALLS = {
    "cosine": lambda x, y: metrics.cosine_diversity(x),
    "entropy": lambda x, y: metrics.truncated_entropy(x, 2),
    "distance": lambda x, y: metrics.spectral_distance(x, y),
    "recall": lambda x, y: metrics.recall(x, y),
    "coverage": lambda x, y: metrics.coverage(x, y),
}


@pytest.mark.parametrize("name", CALLS)
def test_jit_changes_nothing_and_single_precision_stays_single(name):
    fn, x, y = CALLS[name], normal(0, 20, 2), normal(1, 15, 2) + 1
    np.testing.assert_allclose(jax.jit(fn)(x, y), fn(x, y), rtol=1e-10)
    got = fn(x.astype(jnp.float32), y.astype(jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, fn(x, y), rtol=2e-5)


ONES = np.ones((3, 2))
UNEVEN = Particles(normal(0, 9, 2), jnp.arange(9.0))
BAD = {
    "no direction": (
        lambda: metrics.cosine_diversity(np.eye(3)[:, :2]),
        ValueError,
        "origin.* 1 of 3 samples are",
    ),
    "few samples": (
        lambda: metrics.truncated_entropy(normal(0, 16, 30)),
        ValueError,
        "16 samples have no entropy in k = 20",
    ),
    "few with weight": (
        lambda: metrics.truncated_entropy(weighted(normal(0, 9, 4), jnp.arange(9) < 3), 3),
        ValueError,
        "3 samples with weight",
    ),
    "few directions": (
        lambda: metrics.truncated_entropy(ONES, 3),
        ValueError,
        "d = 2, got k = 3",
    ),
    "no k": (lambda: metrics.truncated_entropy(ONES, 0), ValueError, "k must be"),
    "dimensions": (
        lambda: metrics.spectral_distance(ONES, np.ones((3, 1))),
        ValueError,
        "d = 2 and d = 1",
    ),
    "one sample": (
        lambda: metrics.spectral_distance(ONES, np.ones((1, 2))),
        ValueError,
        "y must hold at least two",
    ),
    "neighbors of x": (
        lambda: metrics.recall(ONES, normal(0, 9, 2)),
        ValueError,
        "k = 3 samples, x has 3",
    ),
    "neighbors of base": (
        lambda: metrics.coverage(normal(0, 9, 2), ONES),
        ValueError,
        "k = 5 samples, base has 3",
    ),
    "weighted x": (lambda: metrics.recall(UNEVEN, UNEVEN.x), TypeError, r"pass x.resample\(key\)"),
    "weighted base": (
        lambda: metrics.coverage(UNEVEN.x, UNEVEN),
        TypeError,
        r"pass base.resample\(key\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_reason(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_gradients_are_finite_where_points_coincide():
    """A root has no derivative at zero: of a pair of equal points it is taken as zero."""
    x = jax.random.normal(jax.random.key(0), (5, 2))
    doubled = jnp.concatenate([x, x])
    for points in (x, doubled):
        gradient = jax.grad(metrics.pairwise_diversity)(points)
        assert bool(jnp.all(jnp.isfinite(gradient)))
    step = 1e-6 * jnp.zeros_like(x).at[1, 0].set(1.0)
    slope = (metrics.pairwise_diversity(x + step) - metrics.pairwise_diversity(x - step)) / 2e-6
    assert abs(float(slope - jax.grad(metrics.pairwise_diversity)(x)[1, 0])) < 1e-8
    distance = lambda y: metrics.sliced_wasserstein(jax.random.key(1), x, y)
    assert bool(jnp.all(jax.grad(distance)(x) == 0))
