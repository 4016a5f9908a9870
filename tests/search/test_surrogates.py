"""Surrogates against independent posteriors and their own promises.

Tiers: exact (a Gaussian process against NumPy, masks against subsets, float64), statistical (what a
few queries teach of a smooth reward).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3))
Y = np.sin(X[:, 0]) + 0.5 * X[:, 1] + 0.01 * RNG.normal(size=24)


def fit(surrogate, x=X, y=Y, known=None, seed=0):
    known = np.ones(len(y), bool) if known is None else known
    return surrogate.fit(jax.random.key(seed), jnp.asarray(x), jnp.asarray(y), jnp.asarray(known))


@pytest.mark.slow
def test_the_posterior_is_that_of_a_gaussian_process():
    learned = fit(tj.search.surrogates.GaussianProcess(0.0))
    kernel = lambda a, b: np.exp(
        -((a[:, None] - b[None]) ** 2).sum(-1) / (2 * float(learned.square))
    )
    center, spread = Y.mean(), Y.std()
    noisy = kernel(X, X) + float(learned.noise) ** 2 * np.eye(len(X))
    at = RNG.normal(size=(5, 3))
    mean = center + spread * kernel(at, X) @ np.linalg.solve(noisy, (Y - center) / spread)
    explained = np.einsum("ij,ji->i", kernel(at, X), np.linalg.solve(noisy, kernel(X, at)))
    deviation = spread * np.sqrt(1 + float(learned.noise) ** 2 - explained)
    got = jax.vmap(learned.posterior)(jnp.asarray(at))
    np.testing.assert_allclose(got[0], mean, atol=1e-9)
    np.testing.assert_allclose(got[1], deviation, atol=1e-9)


def test_the_chosen_length_and_noise_have_the_largest_likelihood():
    learned = fit(tj.search.surrogates.GaussianProcess())
    squares = ((X[:, None] - X[None]) ** 2).sum(-1)
    y = (Y - Y.mean()) / Y.std()

    def log_likelihood(square, noise):
        cov = np.exp(-squares / (2 * square)) + noise**2 * np.eye(len(y))
        return -y @ np.linalg.solve(cov, y) / 2 - np.linalg.slogdet(cov)[1] / 2

    lengths, noises = np.array([0.05, 0.2, 0.5, 1.0, 2.0, 4.0]), (0.03, 0.1, 1.0)
    others = [
        log_likelihood(length**2 * squares.mean(), noise) for length in lengths for noise in noises
    ]
    assert log_likelihood(float(learned.square), float(learned.noise)) >= max(others) - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "surrogate",
    [tj.search.surrogates.GaussianProcess(), tj.search.surrogates.Bootstrap(2, steps=20)],
    ids=lambda s: type(s).__name__,
)
def test_rows_that_do_not_count_change_nothing(surrogate):
    known = np.arange(24) < 16
    nonsense = np.where(known[:, None], X, 1e3)
    a = fit(surrogate, known=known)
    b = fit(surrogate, nonsense, np.where(known, Y, -1e6), known)
    at = jnp.asarray([0.3, -0.2, 0.5])
    np.testing.assert_allclose(a(at), b(at), rtol=1e-9)


def test_a_bonus_is_largest_where_nothing_is_known():
    learned = fit(tj.search.surrogates.GaussianProcess(3.0))
    near, far = jnp.asarray(X[0]), jnp.full(3, 30.0)
    assert learned.posterior(far)[1] > 5 * learned.posterior(near)[1]
    np.testing.assert_allclose(
        learned(far), learned.posterior(far)[0] + 3 * learned.posterior(far)[1], rtol=1e-12
    )


@pytest.mark.slow
def test_heads_agree_where_queries_were_and_differ_elsewhere():
    learned = fit(tj.search.surrogates.Bootstrap(6, width=32, steps=300))
    seen = jax.vmap(learned.values)(jnp.asarray(X))
    unseen = jax.vmap(learned.values)(jnp.asarray(4 * X))
    assert np.mean((np.asarray(seen).mean(1) - Y) ** 2) < 0.1 * Y.var()
    assert np.asarray(unseen).std(1).mean() > 3 * np.asarray(seen).std(1).mean()
    np.testing.assert_allclose(learned(jnp.asarray(X[0])), np.asarray(seen)[0].max(), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "surrogate",
    [tj.search.surrogates.GaussianProcess(), tj.search.surrogates.Bootstrap(2, steps=5)],
    ids=lambda s: type(s).__name__,
)
def test_one_query_and_equal_values_are_no_trouble(surrogate):
    learned = fit(surrogate, y=np.ones(24), known=np.arange(24) < 1)
    value, slope = jax.value_and_grad(lambda x: learned(x))(jnp.asarray(X[0]))
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tj.search.surrogates.GaussianProcess(-1.0), "bonus"),
        (lambda: tj.search.surrogates.Bootstrap(0), "heads"),
        (lambda: tj.search.surrogates.Bootstrap(learning_rate=0.0), "learning_rate"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
