"""Mixtures fitted to samples. Tier: statistics, within five standard errors."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import theory
import tiltjax as tj
from theory import fitting

KEY = jax.random.key(0)
TRUTH = tj.GaussianMixture(
    [0.5, 0.3, 0.2],
    [[-3.0, 0.0], [3.0, 1.0], [0.0, 4.0]],
    [[[1.0, 0.5], [0.5, 0.6]], [[0.4, -0.2], [-0.2, 0.9]], [[0.2, 0.0], [0.0, 0.2]]],
)


@pytest.mark.parametrize(("shift", "unit"), [(0.0, 1.0), (1e4, 1e-3), (-3.0, 1e5)])
def test_separate_modes_are_found_within_their_errors(shift, unit):
    num = 20_000
    fit = theory.fit_mixture(shift + unit * TRUTH.sample(KEY, num), 3)
    order = np.argsort(-np.asarray(fit.weights))
    np.testing.assert_allclose(fit.weights[order], TRUTH.weights, atol=5 * (0.25 / num) ** 0.5)
    means = (np.asarray(fit.means)[order] - shift) / unit
    errors = np.sqrt(np.asarray(jnp.diagonal(TRUTH.covs, axis1=1, axis2=2)) / (0.2 * num))
    np.testing.assert_array_less(np.abs(means - TRUTH.means), 5 * errors)
    covs = np.asarray(fit.covs)[order] / unit**2
    np.testing.assert_allclose(covs, TRUTH.covs, atol=5 * (2 / (0.2 * num)) ** 0.5)


def test_one_component_has_the_moments_of_the_samples():
    x = np.asarray(TRUTH.sample(KEY, 500))
    fit = theory.fit_mixture(x, 1)
    np.testing.assert_allclose(fit.means[0], x.mean(0), rtol=1e-12)
    floor = 1e-6 * x.var(0).mean() * np.eye(2)
    np.testing.assert_allclose(fit.covs[0], np.cov(x.T, bias=True) + floor, rtol=1e-10)


def test_a_seed_gives_one_fit():
    x = TRUTH.sample(KEY, 200)
    fit, again = (theory.fit_mixture(x, 2, seed=1) for _ in range(2))
    np.testing.assert_array_equal(fit.covs, again.covs)


def test_what_cannot_be_fitted_is_refused(monkeypatch):
    x = TRUTH.sample(KEY, 8)
    with pytest.raises(ValueError, match="need at least 9 samples, got 8"):
        theory.fit_mixture(x, 3)
    with pytest.raises(ValueError, match="all samples are equal"):
        theory.fit_mixture(jnp.ones((9, 2)), 1)
    with pytest.raises(ValueError, match="samples must be finite"):
        theory.fit_mixture(x.at[0].set(jnp.nan), 1)
    with pytest.raises(ValueError, match="samples must be 2-dimensional"):
        theory.fit_mixture(x[0], 1)
    with pytest.raises(TypeError, match="samples must be numbers, got Particles"):
        theory.fit_mixture(tj.Particles(x=x, log_weights=jnp.arange(8.0)), 1)
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(ImportError, match="pip install tiltjax\\[fit\\]"):
        theory.fit_mixture(x, 1)


def test_a_fit_that_has_not_converged_warns(monkeypatch):
    monkeypatch.setattr(fitting, "_ITERATIONS", 1)
    with pytest.warns(UserWarning, match="did not converge with 3 components"):
        theory.fit_mixture(TRUTH.sample(KEY, 500), 3)


def test_more_components_than_clusters_warn_or_fit():
    x = jnp.repeat(jnp.asarray([[0.0, 0.0], [1.0, 2.0]]), 20, axis=0)
    fit = theory.fit_mixture(x, 3)
    np.testing.assert_allclose(fit.mean(), [0.5, 1.0], atol=1e-6)


@pytest.mark.nightly
def test_a_plan_for_samples_is_the_plan_for_their_law():
    prior, reward = contracts.gaussian([0.5, -1.0], [[1.0, 0.3], [0.3, 0.5]]), [1.0, 1.0]
    fit = theory.fit_mixture(prior.sample(KEY, 50_000), 1)
    plans = [
        theory.recommend(law, tj.rewards.Quadratic(reward), 1.0, 40, inner_steps=4)
        for law in (prior, fit)
    ]
    found, expected = ({o.method.split(",")[0]: o.error for o in p.options} for p in plans)
    assert found.keys() == expected.keys()
    for method in expected:
        np.testing.assert_allclose(found[method], expected[method], rtol=0.1, atol=0.02)
