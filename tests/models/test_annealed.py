"""Annealing between two models.

Tiers: exact (identities in float64), statistical (where a constant weight lands, against the affine
flow of Gaussians by SciPy).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import tiltjax as tj
from tiltjax import models

PRIOR = tj.GaussianMixture([0.3, 0.7], [[-2.0, 0.0], [2.0, 1.0]], 0.5 * jnp.stack([jnp.eye(2)] * 2))
BASE = tj.Analytic(PRIOR)
TUNED = tj.Tilted(BASE, tj.rewards.LinearReward([1.0, -1.0]), 1.0)
TIMES = jnp.linspace(0.05, 0.95, 7)
X = jax.random.normal(jax.random.key(0), (7, 2))


def denoised(model):
    return jax.vmap(model.denoise)(TIMES, X)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight", "share"),
    [
        (None, lambda t: t),
        (0.3, lambda t: 0.3 + 0 * t),
        (models.power(2.0), lambda t: t**2),
        (models.step(0.6), lambda t: np.where(t < 0.6, 0.0, 1.0)),
        (lambda t: jnp.sin(t) ** 2, lambda t: np.sin(t) ** 2),
    ],
    ids=["linear", "number", "power", "step", "function"],
)
def test_denoisers_and_scores_mix_alike(weight, share):
    model = tj.Annealed(BASE, TUNED, weight)
    g = share(np.asarray(TIMES))[:, None]
    np.testing.assert_allclose(
        denoised(model), (1 - g) * denoised(BASE) + g * denoised(TUNED), atol=1e-12
    )
    score = lambda model: np.asarray(jax.vmap(model.score)(TIMES, X))
    np.testing.assert_allclose(score(model), (1 - g) * score(BASE) + g * score(TUNED), atol=1e-10)


def test_two_equal_models_are_the_base_sampler_to_the_last_bit():
    model = tj.Annealed(BASE, BASE, models.power(2.0))
    draw = lambda model: tj.sample(jax.random.key(1), model, num=50, steps=20).x
    np.testing.assert_array_equal(draw(model), draw(BASE))


def test_in_single_precision_outside_of_a_run_and_by_batches():
    # Networks that want a batch can be trained through `denoise_batch` alone.
    build = lambda p: tj.from_denoiser(
        lambda p, t, x: p * x, p, shape=(2,), batched=True, dtype=jnp.float32
    )
    base, p = build(jnp.asarray(0.5, jnp.float32)), jnp.asarray(0.9, jnp.float32)
    t, x = jnp.asarray(0.5, jnp.float32), X.astype(jnp.float32)
    model = lambda p: tj.Annealed(base, build(p), models.power(2.0))
    np.testing.assert_allclose(model(p).denoise(t, x[0]), 0.6 * x[0], rtol=1e-6)
    value, slope = jax.value_and_grad(lambda p: jnp.sum(model(p).denoise_batch(t, x)))(p)
    np.testing.assert_allclose(value, 0.6 * x.sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, 0.25 * x.sum(), rtol=1e-5)


def test_the_weight_is_swept_without_tracing_again():
    traced = []

    @jax.jit
    def run(model):
        traced.append(0)
        return model.denoise(0.5, X[0])

    for p in (1.0, 2.0, 4.0):
        run(tj.Annealed(BASE, TUNED, models.power(p)))
    assert len(traced) == 1


def test_the_weight_is_differentiable():
    value = jax.jit(lambda p: tj.Annealed(BASE, TUNED, models.power(p)).denoise(0.5, X[0])[0])
    gap = (TUNED.denoise(jnp.asarray(0.5), X[0]) - BASE.denoise(jnp.asarray(0.5), X[0]))[0]
    np.testing.assert_allclose(jax.grad(value)(2.0), gap * 0.25 * np.log(0.5), rtol=1e-10)


def test_two_gaussians_land_where_their_affine_flow_does():
    laws = [(-1.0, 0.5), (2.0, 0.2)]
    base, tuned = (tj.Analytic(tj.GaussianMixture([1.0], [[m]], [[[v]]])) for m, v in laws)
    model = tj.Annealed(base, tuned, models.power(2.0))

    def mean_and_slope(t, y):
        # E[X_1 | x] = m + k (x - t m) for each of the two, and the velocity (D - x) / (1 - t).
        offset = slope = 0.0
        for g, (m, v) in zip((1 - t**2, t**2), laws, strict=True):
            k = t * v / (t**2 * v + (1 - t) ** 2)
            offset, slope = offset + g * (m - k * t * m), slope + g * k
        return [((slope - 1) * y[0] + offset) / (1 - t), (slope - 1) / (1 - t) * y[1]]

    mean, deviation = solve_ivp(
        mean_and_slope, (1e-3, 1 - 1e-6), [0.0, 1 - 1e-3], rtol=1e-9, atol=1e-12
    ).y[:, -1]
    num = 20_000
    x = np.asarray(tj.sample(jax.random.key(2), model, num=num, steps=200).x)[:, 0]
    assert abs(x.mean() - mean) < 5 * deviation / np.sqrt(num)
    assert abs(x.std() - deviation) < 5 * deviation / np.sqrt(2 * num)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tj.Annealed(BASE, tj.Analytic(PRIOR, tj.Linear(2.0))), "same interpolant"),
        (
            lambda: tj.Annealed(BASE, tj.Analytic(tj.GaussianMixture([1.0], [[0.0]], [[[1.0]]]))),
            "same states",
        ),
        (lambda: tj.Annealed(BASE, TUNED, 1.5), r"weight must lie in \[0, 1\], got 1.5"),
        (lambda: models.step(-0.1), "at"),
        (lambda: models.power(0.0), "p must"),
        (lambda: tj.Annealed(BASE, TUNED, lambda t: jnp.ones(2)).denoise(0.5, X[0]), "one number"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
