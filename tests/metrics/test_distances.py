"""Distances and diversities against closed forms, brute force and independent routes to the same
number.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from tiltjax import metrics
from tiltjax.mixtures import GaussianMixture
from tiltjax.particles import Particles


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def weighted(x, weights):
    return Particles(x, jnp.log(weights) + 300.0, jnp.zeros(()))


WITHIN_FIVE = 5.0


# --- exact transport


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("pot", [True, False])
def test_a_shift_costs_its_length(d, pot, monkeypatch):
    if not pot:
        monkeypatch.setitem(sys.modules, "ot", None)
    x, shift = normal(0, 60, d), normal(1, d)
    assert metrics.wasserstein(x, x[::-1] + shift[None]) == pytest.approx(
        float(jnp.linalg.norm(shift)), abs=1e-12
    )
    assert metrics.wasserstein(x, x[::-1]) == 0


def test_both_solvers_agree(monkeypatch):
    x, y = normal(0, 150, 2), 0.1 * normal(1, 150, 2)
    with_pot = metrics.wasserstein(x, y)
    monkeypatch.setitem(sys.modules, "ot", None)
    assert metrics.wasserstein(x, y) == pytest.approx(with_pot, abs=1e-12)


def test_line_agrees_with_the_linear_program():
    """The sorted coupling against transport in the plane, where the line is one axis of two."""
    x, y, w, v = (
        normal(0, 40, 1),
        normal(1, 57, 1) ** 2,
        jax.random.uniform(jax.random.key(2), (40,)),
        np.arange(57),
    )
    plane = lambda z: jnp.pad(z, ((0, 0), (0, 1)))
    assert metrics.wasserstein(x, y) == pytest.approx(
        metrics.wasserstein(plane(x), plane(y)), abs=1e-12
    )
    assert metrics.wasserstein(x, y, w, v) == pytest.approx(
        metrics.wasserstein(plane(x), plane(y), w, v), abs=1e-12
    )


def test_line_agrees_with_the_integral_over_quantiles():
    x = np.array([[0.0], [1.0], [4.0]])
    y, w = np.array([[2.0], [-1.0]]), np.array([3.0, 1.0])
    quantile_x = lambda q: np.sort(x[:, 0])[min(int(q * 3), 2)]
    quantile_y = lambda q: -1.0 if q < 0.25 else 2.0
    squared, _ = integrate.quad(
        lambda q: (quantile_x(q) - quantile_y(q)) ** 2, 0, 1, points=[0.25, 1 / 3, 2 / 3]
    )
    assert metrics.wasserstein(x, y, weights_y=w) == pytest.approx(squared**0.5, abs=1e-12)
    # Gaussian quantiles at the middles of 10^5 pieces: W2(N(0, 1), N(1, 4))^2 = 1 + (2 - 1)^2.
    z = stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)[:, None]
    assert metrics.wasserstein(z, 1 + 2 * z[::-1]) == pytest.approx(
        (1 + np.mean(z**2)) ** 0.5, abs=1e-9
    )


@pytest.mark.parametrize("d", [1, 3])
def test_weights_are_repetitions(d):
    x, y, repeats = normal(0, 12, d), normal(1, 15, d), np.array([0, 1, 2, 3] * 3)
    expected = metrics.wasserstein(np.repeat(x, repeats, axis=0), y)
    assert metrics.wasserstein(x, y, weights_x=repeats) == pytest.approx(expected, abs=1e-12)
    assert metrics.wasserstein(weighted(x, repeats), y) == pytest.approx(expected, abs=1e-12)
    assert metrics.wasserstein(x, y) != pytest.approx(expected, abs=1e-3)


def test_trailing_axes_are_flattened():
    x, y = normal(0, 20, 2, 3), normal(1, 20, 2, 3)
    assert metrics.wasserstein(x, y) == metrics.wasserstein(x.reshape(20, 6), y.reshape(20, 6))


def test_host_distances_keep_double_precision_where_jax_does_not():
    x = 1e4 + np.arange(8.0)[:, None]
    with jax.enable_x64(False):
        assert metrics.wasserstein(x, x + 1e-7) == pytest.approx(1e-7, rel=1e-4)


def test_without_pot_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"pip install tiltjax\[transport\]"):
        metrics.wasserstein(normal(0, 3, 2), normal(1, 4, 2))


# --- sliced transport


def test_sliced_in_one_dimension_is_exact():
    key, x, y, w = jax.random.key(3), normal(0, 30, 1), normal(1, 45, 1), jnp.arange(1.0, 31.0)
    assert metrics.sliced_wasserstein(key, x, y, 3) == pytest.approx(
        metrics.wasserstein(x, y), abs=1e-12
    )
    exact = metrics.wasserstein(x, y, weights_x=w)
    assert metrics.sliced_wasserstein(key, weighted(x, w), y, 3) == pytest.approx(exact, abs=1e-7)


def test_sliced_of_a_shift():
    """E (u.s)^2 = |s|^2 / d with variance 2 (d - 1) / (d^2 (d + 2)) |s|^4."""
    x, shift, d, num = normal(0, 20, 3), jnp.array([[1.0, -2.0, 2.0]]), 3, 2000
    squared = metrics.sliced_wasserstein(jax.random.key(1), x, x + shift, num) ** 2
    error = 9 * (2 * (d - 1) / (d**2 * (d + 2)) / num) ** 0.5
    assert abs(squared - 9 / d) < WITHIN_FIVE * error


def test_sliced_weights_are_repetitions():
    key, x, y, repeats = (
        jax.random.key(0),
        normal(0, 20, 2),
        normal(1, 15, 2),
        np.array([0, 1, 2, 1] * 5),
    )
    expected = metrics.sliced_wasserstein(key, np.repeat(x, repeats, axis=0), y, 8)
    assert metrics.sliced_wasserstein(key, weighted(x, repeats), y, 8) == pytest.approx(
        float(expected), abs=1e-10
    )


# --- kernels


def brute_force_mmd(x, y, h):
    kernel = lambda a, b: np.exp(-np.sum((a[:, None] - b[None]) ** 2, -1) / (2 * h**2))
    off = lambda a: (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))
    return off(x) + off(y) - 2 * kernel(x, y).mean()


def test_mmd_is_the_double_sum():
    x, y = (
        normal(0, 300, 3) + 50,
        50.3 + 1.2 * normal(1, 270, 3),
    )  # more rows than a block holds, far from the origin
    assert metrics.mmd(x, y, 0.7) == pytest.approx(
        brute_force_mmd(np.asarray(x), np.asarray(y), 0.7), abs=1e-11
    )
    pooled = np.concatenate([x, y])
    median = np.median(
        np.linalg.norm(pooled[:, None] - pooled[None], axis=-1)[np.triu_indices(570, 1)]
    )
    assert metrics.mmd(x, y) == pytest.approx(
        brute_force_mmd(np.asarray(x), np.asarray(y), median), abs=1e-8
    )


@pytest.mark.parametrize(("apart", "bandwidth"), [(0.0, None), (300.0, 1.5)])
def test_mmd_of_points_far_from_zero_or_in_distant_modes_keeps_its_digits(apart, bandwidth):
    """In single precision, inner products of these points have errors of 1 to 10."""
    modes = 1e4 + apart * (np.arange(60) % 2)[:, None]
    x, y = (np.round(8 * np.asarray(normal(i, 60, 2))) / 8 + modes for i in range(2))
    narrow = metrics.mmd(x.astype(np.float32), y.astype(np.float32), bandwidth)
    assert narrow.dtype == np.float32
    assert narrow == pytest.approx(float(metrics.mmd(x, y, bandwidth)), abs=1e-5)


def test_mmd_of_normals_has_its_closed_form_and_of_one_law_is_zero():
    """E k for N(0, I) against N(s, I) with unit bandwidth in the plane: exp(-|s|^2 / 6) / 3."""
    x, y = normal(7, 2, 40, 300, 2)
    same = jax.lax.map(lambda pair: metrics.mmd(*pair, 1.0), (x, y))
    shifted = jax.lax.map(lambda pair: metrics.mmd(*pair, 1.0), (x, y + 1))
    assert abs(same.mean()) < WITHIN_FIVE * metrics.standard_error(same)
    assert abs(
        shifted.mean() - 2 / 3 * (1 - np.exp(-1 / 3))
    ) < WITHIN_FIVE * metrics.standard_error(shifted)
    assert shifted.mean() > 100 * metrics.standard_error(same)


def test_weighted_mmd_reweighs():
    """Weights that turn N(0, 1) into N(1, 1) bring the discrepancy from it down to nothing."""
    x, y = normal(0, 2000, 1), normal(1, 2000, 1) + 1
    tilted = Particles(x, x[:, 0])
    assert metrics.mmd(x, y, 1.0) > 0.1
    assert abs(metrics.mmd(tilted, y, 1.0)) < 3e-3
    assert metrics.mmd(Particles(x, jnp.full(2000, -7.0)), y, 1.0) == metrics.mmd(x, y, 1.0)


# --- modes


MIXTURE = GaussianMixture(
    [0.2, 0.5, 0.3], [[-20.0, 0.0], [0.0, 20.0], [20.0, 0.0]], jnp.stack([jnp.eye(2)] * 3)
)


def test_mode_weights_count_separated_modes():
    x = jnp.concatenate(
        [normal(0, 30, 2) + MIXTURE.means[:1], normal(1, 10, 2) + MIXTURE.means[2:]]
    )
    np.testing.assert_allclose(metrics.mode_weights(x, MIXTURE), [0.75, 0.0, 0.25], atol=1e-12)
    weights = jnp.concatenate([jnp.ones(30), jnp.full(10, 9.0)])
    np.testing.assert_allclose(
        metrics.mode_weights(weighted(x, weights), MIXTURE), [0.25, 0.0, 0.75], atol=1e-12
    )


def test_mode_weights_of_overlapping_modes_are_unbiased():
    near = GaussianMixture(MIXTURE.weights, MIXTURE.means / 20, MIXTURE.covs)
    x = near.sample(jax.random.key(0), 4000)
    responsibilities = jax.vmap(lambda point: jax.nn.softmax(near.component_log_probs(point)))(x)
    got = metrics.mode_weights(x, near)
    assert got.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(got, responsibilities.mean(0), atol=1e-12)
    assert jnp.all(
        jnp.abs(got - near.weights) < WITHIN_FIVE * metrics.standard_error(responsibilities)
    )


def test_mode_weights_refuse_point_masses():
    points = GaussianMixture([0.5, 0.5], [[0.0], [1.0]], jnp.zeros((2, 1, 1)))
    with pytest.raises(ValueError, match="nonsingular"):
        metrics.mode_weights(normal(0, 4, 1), points)


# --- errors of estimates


def test_standard_error_is_that_of_scipy():
    values = normal(0, 9, 20)
    np.testing.assert_allclose(
        metrics.standard_error(values), stats.sem(values, axis=0), rtol=1e-12
    )
    np.testing.assert_allclose(
        metrics.standard_error(values, axis=-1), stats.sem(values, axis=1), rtol=1e-12
    )


def test_bootstrap_of_a_mean_is_the_standard_error():
    """The bootstrap's own relative error is 1 / sqrt(2 num)."""
    x, num = normal(0, 500, 2) * jnp.array([[1.0, 10.0]]), 1000
    estimate, error = metrics.bootstrap(jax.random.key(1), lambda x: jnp.mean(x, axis=0), x, num)
    np.testing.assert_allclose(estimate, x.mean(0), rtol=1e-12)
    assert jnp.all(jnp.abs(error / metrics.standard_error(x) - 1) < WITHIN_FIVE / (2 * num) ** 0.5)


def test_bootstrap_loops_where_jax_cannot_trace():
    x = normal(0, 40, 1)
    on_host = lambda x: np.asarray(x).mean()
    estimate, error = metrics.bootstrap(jax.random.key(1), on_host, x, 20)
    traced = metrics.bootstrap(jax.random.key(1), jnp.mean, x, 20)
    np.testing.assert_allclose((estimate, error), traced, rtol=1e-12)
    truth = jnp.zeros((1, 1))
    _, error = metrics.bootstrap(jax.random.key(1), lambda x: metrics.wasserstein(x, truth), x, 20)
    _, traced = metrics.bootstrap(jax.random.key(1), lambda x: jnp.sqrt(jnp.mean(x**2)), x, 20)
    assert error == pytest.approx(float(traced), rel=1e-10)


def test_bootstrap_draws_a_tree_together():
    x = normal(0, 30)
    difference = lambda tree: jnp.mean(tree["a"] - tree["b"])
    estimate, error = metrics.bootstrap(jax.random.key(1), difference, {"a": x, "b": x})
    assert (estimate, error) == (0, 0)


# --- jit, gradients, precision


def test_mixed_precision_is_promoted():
    x, y = normal(0, 20, 2).astype(jnp.float32), normal(1, 15, 2)
    assert metrics.mmd(x, y).dtype == jnp.float64
    assert metrics.mmd(x.astype(jnp.bfloat16), y.astype(jnp.float16)).dtype == jnp.float32
    assert metrics.pairwise_diversity(np.array([[0], [2]])) == 2


JITTABLE = {
    "sliced": lambda x, y: metrics.sliced_wasserstein(jax.random.key(0), x, y, 8),
    "mmd": lambda x, y: metrics.mmd(x, y),
    "modes": lambda x, y: metrics.mode_weights(x, MIXTURE),
    "pairwise": lambda x, y: metrics.pairwise_diversity(x),
    "spectral": lambda x, y: metrics.spectral_diversity(x),
    "standard error": lambda x, y: metrics.standard_error(x.x if isinstance(x, Particles) else x),
}


@pytest.mark.parametrize("name", JITTABLE)
def test_jit_changes_nothing(name):
    fn, x, y = JITTABLE[name], normal(0, 20, 2), normal(1, 15, 2) + 1
    for first in (x, weighted(x, jnp.arange(1.0, 21.0))):
        np.testing.assert_allclose(jax.jit(fn)(first, y), fn(first, y), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", JITTABLE)
def test_single_precision_stays_single(name):
    fn, x, y = JITTABLE[name], normal(0, 20, 2), normal(1, 15, 2) + 1
    got = fn(x.astype(jnp.float32), y.astype(jnp.float32))
    assert got.dtype == (
        jnp.float64 if name == "modes" else jnp.float32
    )  # the mixture's own precision
    np.testing.assert_allclose(got, fn(x, y), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sliced", "mmd"])
def test_gradients_follow_differences(name):
    fn, x, y = JITTABLE[name], normal(0, 20, 2), normal(1, 15, 2) + 1
    along = normal(2, 20, 2)
    slope = jnp.vdot(jax.grad(fn)(x, y), along)
    step = 1e-5
    assert slope == pytest.approx(
        float((fn(x + step * along, y) - fn(x - step * along, y)) / (2 * step)), rel=1e-6
    )


# --- what is refused


BAD = {
    "one axis": (
        lambda: metrics.wasserstein(np.ones(3), np.ones((3, 1))),
        ValueError,
        r"pass x\[:, None\]",
    ),
    "scalar": (
        lambda: metrics.mmd(np.ones((3, 1)), 1.0),
        ValueError,
        r"y must be samples of shape",
    ),
    "dimensions": (
        lambda: metrics.wasserstein(np.ones((3, 1)), np.ones((3, 2))),
        ValueError,
        "d = 1 and d = 2",
    ),
    "mmd dimensions": (
        lambda: metrics.mmd(np.ones((3, 1)), np.ones((3, 2))),
        ValueError,
        "d = 1 and d = 2",
    ),
    "mixture dimension": (
        lambda: metrics.mode_weights(np.ones((3, 1)), MIXTURE),
        ValueError,
        "mixture has d = 2",
    ),
    "not a mixture": (
        lambda: metrics.mode_weights(np.ones((3, 1)), None),
        TypeError,
        "GaussianMixture, got NoneType",
    ),
    "empty": (
        lambda: metrics.pairwise_diversity(np.ones((0, 2))),
        ValueError,
        r"at least one sample.*\(0, 2\)",
    ),
    "nan": (
        lambda: metrics.wasserstein(np.array([[0.0], [np.nan]]), np.ones((1, 1))),
        ValueError,
        "1 of 2.*index 1",
    ),
    "inf": (
        lambda: metrics.spectral_diversity(jnp.array([[0.0], [jnp.inf]])),
        ValueError,
        "x must be finite",
    ),
    "text": (
        lambda: metrics.wasserstein([["a"]], np.ones((1, 1))),
        TypeError,
        "x must hold real numbers",
    ),
    "complex": (
        lambda: metrics.mmd(np.ones((2, 1), complex), np.ones((2, 1))),
        TypeError,
        "real numbers",
    ),
    "weights shape": (
        lambda: metrics.wasserstein(np.ones((3, 1)), np.ones((3, 1)), np.ones(2)),
        ValueError,
        r"\(3,\)",
    ),
    "negative": (
        lambda: metrics.wasserstein(np.ones((2, 1)), np.ones((2, 1)), None, [1.0, -1.0]),
        ValueError,
        "weights_y must be finite and nonnegative",
    ),
    "no mass": (
        lambda: metrics.wasserstein(np.ones((2, 1)), np.ones((2, 1)), [0.0, 0.0]),
        ValueError,
        "positive sum",
    ),
    "weights twice": (
        lambda: metrics.wasserstein(
            Particles(jnp.ones((2, 1)), jnp.zeros(2)), np.ones((2, 1)), np.ones(2)
        ),
        TypeError,
        "leave out weights_x",
    ),
    "log-weights": (
        lambda: metrics.wasserstein(
            Particles(jnp.ones((2, 1)), jnp.full(2, -jnp.inf)), np.ones((2, 1))
        ),
        ValueError,
        "not all -inf",
    ),
    "nan log-weights": (
        lambda: metrics.mmd(
            Particles(jnp.ones((2, 1)), jnp.array([0.0, jnp.nan])), np.ones((2, 1))
        ),
        ValueError,
        "x.log_weights must be finite",
    ),
    "log-weights shape": (
        lambda: metrics.pairwise_diversity(Particles(jnp.ones((2, 1)), jnp.zeros(3))),
        ValueError,
        r"\(2,\), got \(3,\)",
    ),
    "one sample": (
        lambda: metrics.mmd(np.ones((1, 1)), np.ones((2, 1))),
        ValueError,
        "x must hold at least two",
    ),
    "one weight": (
        lambda: metrics.pairwise_diversity(Particles(jnp.ones((2, 1)), jnp.array([0.0, -jnp.inf]))),
        ValueError,
        "carries all of the weight",
    ),
    "bandwidth": (
        lambda: metrics.mmd(np.ones((2, 1)), np.ones((2, 1)), 0.0),
        ValueError,
        "bandwidth must be positive",
    ),
    "no spread": (
        lambda: metrics.mmd(np.ones((2, 1)), np.ones((2, 1))),
        ValueError,
        "pass a positive bandwidth",
    ),
    "key": (
        lambda: metrics.sliced_wasserstein(0, np.ones((2, 1)), np.ones((2, 1))),
        TypeError,
        "typed PRNG key",
    ),
    "projections": (
        lambda: metrics.sliced_wasserstein(jax.random.key(0), np.ones((2, 1)), np.ones((2, 1)), 0),
        ValueError,
        "num_projections",
    ),
    "one value": (lambda: metrics.standard_error([1.0]), ValueError, "at least two values"),
    "axis": (lambda: metrics.standard_error([1.0, 2.0], axis=1), ValueError, "along axis 1"),
    "no axis": (
        lambda: metrics.standard_error([1.0, 2.0], axis=0.0),
        TypeError,
        r"axis must be an integer, got 0\.0",
    ),
    "nan value": (lambda: metrics.standard_error([1.0, np.nan]), ValueError, "finite"),
    "bootstrap num": (
        lambda: metrics.bootstrap(jax.random.key(0), jnp.mean, np.ones(3), 1),
        ValueError,
        "at least 2",
    ),
    "bootstrap one": (
        lambda: metrics.bootstrap(jax.random.key(0), jnp.mean, np.ones(1)),
        ValueError,
        "two samples",
    ),
    "bootstrap lengths": (
        lambda: metrics.bootstrap(jax.random.key(0), jnp.mean, (np.ones(3), np.ones(4))),
        ValueError,
        r"\[3, 4\]",
    ),
    "bootstrap nan": (
        lambda: metrics.bootstrap(jax.random.key(0), jnp.mean, np.array([1.0, np.nan])),
        ValueError,
        "x must be finite",
    ),
    "bootstrap particles": (
        lambda: metrics.bootstrap(
            jax.random.key(0), jnp.mean, Particles(jnp.ones((2, 1)), jnp.zeros(2))
        ),
        TypeError,
        "particles.resample",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_reason(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.optimized
def test_masses_of_a_million_points_sum_to_one_in_single_precision():
    """So does the mean of particles; a product of matrices gives 1.006 and 1.03."""
    mixture = GaussianMixture(
        np.float32([0.4, 0.6]), np.float32([[-2.0], [2.0]]), np.ones((2, 1, 1), np.float32)
    )
    for num in (1_000_000, 3_000_000):
        x = jax.random.normal(jax.random.key(0), (num, 1), jnp.float32)
        masses = metrics.mode_weights(x, mixture)
        assert masses.dtype == jnp.float32
        assert abs(float(jnp.sum(masses)) - 1) < 1e-6
    particles = Particles(1 + 0 * x, jax.random.normal(jax.random.key(1), (num,), jnp.float32))
    assert abs(float(particles.mean()[0]) - 1) < 1e-6


# --- samples of one number


def test_particles_of_numbers_are_points_of_the_line():
    x, y = normal(0, 40), normal(1, 40) + 1.0
    weights = jnp.linspace(0.1, 1.0, 40)
    measures = (
        metrics.wasserstein,
        metrics.mmd,
        lambda x, y: metrics.sliced_wasserstein(jax.random.key(0), x, y),
        lambda x, _: metrics.pairwise_diversity(x),
        lambda x, _: metrics.mode_weights(x, GaussianMixture([1.0], [[0.0]], [[[1.0]]])),
    )
    for measure in measures:
        numbers = measure(weighted(x, weights), Particles(y, jnp.zeros(40)))
        points = measure(weighted(x[:, None], weights), Particles(y[:, None], jnp.zeros(40)))
        np.testing.assert_array_equal(numbers, points)
    with pytest.raises(ValueError, match=r"for samples on the line pass x\[:, None\]"):
        metrics.mmd(x, y)
