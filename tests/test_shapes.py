"""States of any shape: an image is its pixels, for every guidance, posterior, scale law and solver,
in both precisions.

The law is `N(0, s^2 I)` on (4, 4, 3), by a denoiser that knows nothing of the shape; its tilt by a
quadratic reward is a Gaussian, so that the exact methods are judged by value, and all others by the
same model on the 48 pixels in a row. Tiers: exact (float64, 1e-9), statistical.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj

SHAPE, SIZE, STD, SCALE = (4, 4, 3), 48, 0.7, 1.5
KEY, T = jax.random.key(3), jnp.asarray(0.4)
Y = jnp.linspace(-1.0, 1.0, SIZE)
X = jnp.sin(jnp.arange(1.0, SIZE + 1))
TILTED_VARIANCE = 1 / (1 / STD**2 + 2 * SCALE)


def model(shape, dtype=jnp.float64):
    def denoiser(t, x):
        variance = jnp.asarray(STD**2, x.dtype)
        return t * variance / (t**2 * variance + (1 - t) ** 2) * x

    return tj.from_denoiser(denoiser, shape=shape, dtype=dtype)


def reward(shape):
    return tj.rewards.Quadratic(Y.reshape(shape))


def function(shape):
    """The same reward, with its form hidden."""
    return lambda x: -jnp.sum((x - Y.reshape(shape).astype(x.dtype)) ** 2)


def log_h(shape):
    """The exact h-function of the quadratic reward."""

    def value(t, x):
        variance, y = jnp.asarray(STD**2, x.dtype), Y.reshape(shape).astype(x.dtype)
        noisy = t**2 * variance + (1 - t) ** 2
        m, v = t * variance / noisy * x, variance * (1 - t) ** 2 / noisy
        return (
            -SCALE * jnp.sum((m - y) ** 2) / (1 + 2 * SCALE * v)
            - SIZE * jnp.log1p(2 * SCALE * v) / 2
        )

    return value


def table(snr):
    return STD**2 / (1 + STD**2 * snr)


POSTERIORS = {
    "tweedie": tj.Tweedie,
    "glass": lambda m: tj.Glass(m, 3),
    "flow map": lambda m: tj.FlowMap(m, 3),
    "renoise": lambda m: tj.posteriors.Renoise(m, 1.5, 3),
}
EXACT = {
    "doob": lambda m: tj.Doob(m, log_h(m.shape)),
    "damped": lambda m: tj.dps(m, reward(m.shape), tj.Damped(SCALE, STD)),
    "self-damped": lambda m: tj.dps(m, reward(m.shape), tj.SelfDamped(SCALE, m)),
    "laplace": lambda m: tj.Laplace(m, function(m.shape), SCALE),
    "conjugate": lambda m: tj.Conjugate(m, reward(m.shape), SCALE),
    "toward": lambda m: tj.guidance.toward(
        m, tj.Tilted(m, reward(m.shape), SCALE), reward(m.shape), SCALE
    ),
    "tuned": lambda m: tj.Tuned(
        m, tj.Tilted(m, reward(m.shape), SCALE), reward=reward(m.shape), scale=SCALE
    ),
}
GUIDANCES = (
    EXACT
    | {
        f"{name} draws": lambda m, p=p: tj.PlugIn(p(m), function(m.shape), SCALE, k=2)
        for name, p in POSTERIORS.items()
    }
    | {
        "fmrg": lambda m: tj.fmrg(m, reward(m.shape), SCALE, inner_steps=3),
        "clipped": lambda m: tj.guidance.wrappers.Clipped(tj.dps(m, reward(m.shape), SCALE), 0.5),
        "normalized": lambda m: tj.guidance.wrappers.Normalized(
            tj.dps(m, reward(m.shape), SCALE), 0.5
        ),
        "fitted": lambda m: tj.Conjugate(m, function(m.shape), SCALE, iterations=2, variance=table),
    }
)


def estimate(name, shape, dtype):
    guidance = tj._pytree.cast(GUIDANCES[name](model(shape, dtype)), dtype)
    t, x = T.astype(dtype), X.reshape(shape).astype(dtype)
    return guidance(KEY, t, x, guidance.init(x)), guidance.log_tilt(x)


def assert_single(tree, shape):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    assert shape in {leaf.shape for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("name", sorted(GUIDANCES.keys() - EXACT.keys()))
def test_an_image_is_its_pixels(name):
    image, pixels = jax.jit(
        lambda: [estimate(name, shape, jnp.float64) for shape in (SHAPE, (SIZE,))]
    )()
    assert image[0][0].tilted.shape == SHAPE
    for a, b in zip(jax.tree.leaves(image), jax.tree.leaves(pixels), strict=True):
        np.testing.assert_allclose(a.reshape(-1), b.reshape(-1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(image[1], -SCALE * np.sum((X - Y) ** 2), rtol=1e-10)
    assert_single(jax.eval_shape(lambda: estimate(name, SHAPE, jnp.float32)), SHAPE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_are_exact_on_images(name, dtype):
    """Against the denoiser of `N(2 l y v, v I)`, the tilt, at the same time and state."""
    v, mean, x = TILTED_VARIANCE, 2 * SCALE * TILTED_VARIANCE * np.asarray(Y), np.asarray(X)
    truth = mean + 0.4 * v / (0.4**2 * v + 0.6**2) * (x - 0.4 * mean)
    (estimated, _), tilt = jax.jit(lambda: estimate(name, SHAPE, dtype))()
    np.testing.assert_allclose(tilt, -SCALE * np.sum((X - Y) ** 2), rtol=1e-5)
    np.testing.assert_allclose(
        estimated.tilted, truth.reshape(SHAPE), atol=1e-9 if dtype == jnp.float64 else 1e-5
    )


SOLVERS = contracts.all_solvers()
STARTS = jax.random.normal(KEY, (3, SIZE))


def run(solver, shape, dtype):
    m = model(shape, dtype)
    guidance, start = tj.dps(m, reward(shape), tj.Damped(SCALE, STD)), STARTS.reshape(3, *shape)
    return tj.sample(
        KEY, m, guidance, num=3, times=[1e-3, 0.5, 1.0], start=start, solver=SOLVERS[solver]
    ).x


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_images_in_both_precisions(name):
    for dtype in (jnp.float32, jnp.float64):
        end = jax.eval_shape(lambda dtype=dtype: run(name, SHAPE, dtype))
        assert (end.shape, end.dtype) == ((3, *SHAPE), dtype)


def test_a_solver_with_noise_moves_an_image_as_its_pixels():
    image, pixels = (run("ancestral", shape, jnp.float64) for shape in (SHAPE, (SIZE,)))
    np.testing.assert_allclose(image.reshape(3, SIZE), pixels, rtol=1e-9, atol=1e-9)


def test_the_flow_of_images_is_that_of_the_tilt():
    """`Damped` is exact here, so that `Adaptive` follows the closed-form flow of the tilt."""
    mean, width = (
        2 * SCALE * TILTED_VARIANCE * np.asarray(Y),
        np.hypot(1 - 1e-3, 1e-3 * TILTED_VARIANCE**0.5),
    )
    truth = mean + TILTED_VARIANCE**0.5 / width * (np.asarray(STARTS) - 1e-3 * mean)
    np.testing.assert_allclose(
        run("adaptive", SHAPE, jnp.float32), truth.reshape(3, *SHAPE), atol=1e-3
    )


# Verbs.


@pytest.mark.slow
def test_gibbs_samples_an_anisotropic_tilt_of_images():
    """The weight differs from pixel to pixel: every pixel's tilt is a Gaussian of its own."""
    weight, num, steps = jnp.linspace(0.5, 1.5, SIZE).reshape(SHAPE), 500, 25
    y = Y.reshape(SHAPE)
    anisotropic = lambda x: -jnp.sum(weight.astype(x.dtype) * (x - y.astype(x.dtype)) ** 2)
    particles = tj.gibbs(KEY, model(SHAPE, jnp.float32), anisotropic, SCALE, num=num, steps=steps)
    assert particles.x.shape == (num, *SHAPE)
    assert particles.x.dtype == jnp.float32
    x = np.asarray(particles.x, np.float64)
    variance = 1 / (1 / STD**2 + 2 * SCALE * np.asarray(weight))
    mean = 2 * SCALE * np.asarray(weight) * variance * np.asarray(y)
    # Of 96 statistics none beyond 5 standard errors; a draw errs by one over its steps in spread.
    assert np.all(np.abs(x.mean(axis=0) - mean) < 5 * np.sqrt(variance / num))
    assert np.all(np.abs(x.var(axis=0) / variance - 1) < 5 * np.sqrt(2 / num) + 2 / steps)


def test_calibration_of_images():
    data = STD * jax.random.normal(KEY, (512, *SHAPE))
    measured = tj.calibrate(KEY, model(SHAPE, jnp.float32), budget=512 * 12, data=data, levels=12)
    ratio = np.exp(measured.log_variance) / table(np.exp(np.asarray(measured.log_snr)))
    assert measured.log_variance.dtype == jnp.float32
    assert np.all(np.abs(ratio - 1) < 5 * np.sqrt(2 / (512 * SIZE)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_selection_of_images(dtype):
    x = jax.random.normal(KEY, (12, *SHAPE), dtype)
    particles = tj.particles.unweighted(x)
    values = np.asarray(jax.vmap(function(SHAPE))(x)).reshape(4, 3)
    winners = np.arange(4) * 3 + values.argmax(axis=1)
    for chosen in (
        tj.best_of_n(particles, reward(SHAPE), 3),
        tj.softmax_of_n(
            KEY, particles, reward(SHAPE), 3, 1e4
        ),  # at this scale a softmax is a maximum
    ):
        np.testing.assert_array_equal(chosen.x, x[winners])
