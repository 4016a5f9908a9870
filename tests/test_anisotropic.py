"""Anisotropic quadratic tilts by Gibbs against their closed form, with as many sweeps as the diagnostic asks for. Tier: statistical."""

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("weight", "scale"),
    [([4.0, 1.0], 0.5), ([[1.0, 0.4], [0.4, 0.6]], 1.0), ([2.0, 0.0], 1.0)],
    ids=["diag", "full", "singular"],
)
def test_moments_are_those_of_the_exact_tilt(weight, scale):
    prior, num = tj.GaussianMixture([0.4, 0.6], [[-1.5, 0.0], [1.5, 0.0]], jnp.stack([0.5 * jnp.eye(2)] * 2)), 10_000
    reward = tj.rewards.Quadratic([0.3, 1.0], weight=weight) + tj.rewards.Linear([0.2, 0.0])
    truth = theory.tilt(prior, reward, scale).mixture
    statistics = lambda x: np.concatenate([x, x**2, x[:, :1] * x[:, 1:]], axis=1)
    means = {}
    for steps in (50, 100):  # the inner draw's spread errs by one over its steps
        particles, mixing = tj.gibbs(jax.random.key(steps), tj.Analytic(prior), reward, scale, num=num, steps=steps)
        values = statistics(np.asarray(particles.x))
        means[steps], errors = values.mean(axis=0), values.std(axis=0) / np.sqrt(num)
        assert mixing.correlation < 4 / np.sqrt(num)
    second = truth.cov() + jnp.outer(truth.mean(), truth.mean())
    expected = np.concatenate([truth.mean(), jnp.diagonal(second), second[0, 1:]])
    # Richardson in the inner steps: 2 A - B of two independent runs has a standard error sqrt(5) times as large.
    assert np.all(np.abs(2 * means[100] - means[50] - expected) < 4 * np.sqrt(5) * errors)


def test_stronger_anisotropy_asks_for_more_sweeps():
    model = tj.Analytic(contracts.planar())
    run = lambda weight: tj.gibbs(KEY, model, tj.rewards.Quadratic([0.3, 1.0], [weight, 0.5]), num=2000, steps=10)[1]
    assert run(60.0).sweeps > run(1.0).sweeps


def test_chains_that_do_not_mix_are_reported():
    reward = tj.rewards.Quadratic([0.3, 1.0], [5000.0, 0.5])
    with pytest.raises(RuntimeError, match="still remember"):
        tj.gibbs(KEY, tj.Analytic(contracts.planar()), reward, num=2000, steps=5, max_sweeps=10)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (tj.rewards.Bump([0.0, 1.0]), "Hessian is not constant: use Conjugate"),
        (tj.rewards.Linear([0.0, 1.0]), "not concave in any direction: use Tilted"),
    ],
)
def test_other_rewards_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        tj.gibbs(KEY, tj.Analytic(contracts.planar()), reward, num=10)
