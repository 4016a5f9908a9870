"""Composed models against densities in closed form. Tier: exact (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj

COV = jnp.array([[0.5, 0.2], [0.2, 0.8]])
X = jax.random.normal(jax.random.key(0), (5, 2), jnp.float64)
LINEAR, VP = tj.Linear(1.3), tj.VP()


def gaussian(mean, cov=COV, interpolant=LINEAR):
    return tj.Analytic(tj.GaussianMixture([1.0], [mean], [cov]), interpolant)


def mixture(seed, interpolant=LINEAR):
    means = np.random.default_rng(seed).normal(size=(3, 2))
    return tj.Analytic(tj.GaussianMixture([0.2, 0.3, 0.5], means, [0.3 * COV] * 3), interpolant)


def noised(model, t):
    """The law of `X_t` of an analytic model on `Linear`."""
    a, s, law = model.interpolant.alpha(t), model.interpolant.sigma(t), model.mixture
    return tj.GaussianMixture(law.weights, a * law.means, a**2 * law.covs + s**2 * jnp.eye(2)[None])


A, B, C = (mixture(seed) for seed in range(3))
COMPOSED = {
    "cfg": (tj.models.cfg(A, B, 3.0), (A, B), (3.0, -2.0)),
    "geometric_mean": (tj.models.geometric_mean([A, B]), (A, B), (0.5, 0.5)),
    "weights": (tj.models.geometric_mean([A, B, C], [0.2, 1.3, -0.5]), (A, B, C), (0.2, 1.3, -0.5)),
    "product": (tj.models.product([A, B], shared=C), (A, B, C), (1.0, 1.0, -1.0)),
    "difference": (tj.models.difference(A, B, 0.7), (A, B), (1.7, -0.7)),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_the_score_is_that_of_the_product_of_the_noised_laws(name):
    model, parts, weights = COMPOSED[name]
    t = jnp.asarray(0.4)
    laws = [noised(part, t) for part in parts]
    log_prob = lambda x: sum(w * law.log_prob(x) for w, law in zip(weights, laws, strict=True))
    expected = jax.vmap(jax.grad(log_prob))(X)
    np.testing.assert_allclose(
        jax.vmap(lambda x: model.score(t, x))(X), expected, rtol=0, atol=1e-11
    )
    np.testing.assert_allclose(
        model.denoise_batch(t, X), jax.vmap(lambda x: model.denoise(t, x))(X), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("interpolant", [LINEAR, VP])
def test_gaussians_of_one_covariance_compose_to_such_a_gaussian(interpolant):
    a, b = np.array([1.0, -0.5]), np.array([0.2, 0.7])
    make = lambda mean: gaussian(mean, interpolant=interpolant)
    model = tj.models.cfg(make(a), make(b), 2.5)
    expected = make(b + 2.5 * (a - b))
    for t in (0.1, 0.7):
        run = lambda model, t=t: jax.vmap(lambda x: model.denoise(jnp.asarray(t), x))(X)
        np.testing.assert_allclose(run(model), run(expected), rtol=0, atol=1e-11)
    run = lambda model: tj.sample(jax.random.key(1), model, num=4, steps=6).x
    np.testing.assert_allclose(run(model), run(expected), rtol=0, atol=1e-10)


def test_equal_models_are_the_model_to_the_last_bit():
    for model in (tj.models.cfg(A, A, 7.5), tj.models.product([A, A, A], shared=A)):
        np.testing.assert_array_equal(
            model.denoise_batch(jnp.asarray(0.3), X), A.denoise_batch(jnp.asarray(0.3), X)
        )


def test_a_sweep_of_scales_is_differentiable_and_vectorized():
    denoised = lambda scale: tj.models.cfg(A, B, scale).denoise(jnp.asarray(0.3), X[0])
    scales = jnp.linspace(0.0, 4.0, 3)
    slope = A.denoise(jnp.asarray(0.3), X[0]) - B.denoise(jnp.asarray(0.3), X[0])
    np.testing.assert_allclose(
        jax.vmap(jax.jacfwd(denoised))(scales), jnp.broadcast_to(slope, (3, 2)), rtol=0, atol=1e-12
    )


def test_selection_tilts_the_law_of_the_samples():
    model = tj.models.cfg(gaussian([1.0, 0.0]), gaussian([0.0, 0.0]), 2.0)  # N((2, 0), COV)
    reward = tj.rewards.LinearReward([0.0, 1.0])
    samples = tj.sample(jax.random.key(2), model, num=64 * 500, steps=20)
    chosen = tj.softmax_of_n(jax.random.key(3), samples, reward, n=64, scale=1.0)
    mean = np.asarray(chosen.x.mean(0))
    error = np.sqrt(np.diag(np.asarray(COV)) / len(chosen.x))
    expected = np.array([2.0, 0.0]) + np.asarray(COV) @ [0.0, 1.0]
    assert np.all(np.abs(mean - expected) < 5 * error + 0.03)  # n = 64: a bias of a few hundredths


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"models\[0\] and models\[1\] must have the same interp"):
        tj.models.cfg(A, mixture(1, VP), 2.0)
    with pytest.raises(ValueError, match="add up to 1, got 2"):
        tj.models.geometric_mean([A, B], [1.0, 1.0])
    with pytest.raises(ValueError, match="weights must be 2 numbers"):
        tj.models.geometric_mean([A, B], [1.0])
    with pytest.raises(ValueError, match="at least one model"):
        tj.models.geometric_mean([])
    with pytest.raises(ValueError, match="weight"):
        tj.models.difference(A, B, -1.0)
    with pytest.raises(TypeError, match=r"models\[1\]"):
        tj.models.product([A, lambda t, x: x], shared=B)
