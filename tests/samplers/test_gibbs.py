"""Anisotropic quadratic tilts by Gibbs against their closed form, with as many sweeps as the
diagnostic asks for. Tier: statistical.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import theory
import tiltjax as tj

KEY = jax.random.key(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight", "scale"),
    [([4.0, 1.0], 0.5), ([[1.0, 0.4], [0.4, 0.6]], 1.0), ([2.0, 0.0], 1.0)],
    ids=["diag", "full", "singular"],
)
def test_moments_are_those_of_the_exact_tilt(weight, scale):
    prior, num = (
        tj.GaussianMixture(
            [0.4, 0.6], [[-1.5, 0.0], [1.5, 0.0]], jnp.stack([0.5 * jnp.eye(2)] * 2)
        ),
        10_000,
    )
    reward = tj.rewards.Quadratic([0.3, 1.0], weight=weight) + tj.rewards.LinearReward([0.2, 0.0])
    truth = theory.tilt(prior, reward, scale).mixture
    statistics = lambda x: np.concatenate([x, x**2, x[:, :1] * x[:, 1:]], axis=1)
    particles = tj.gibbs(KEY, tj.Analytic(prior), reward, scale, num=num, steps=80)
    assert particles.mixing.correlation < 4 / np.sqrt(num)
    values = statistics(np.asarray(particles.x))
    second = truth.cov() + jnp.outer(truth.mean(), truth.mean())
    expected = np.concatenate([truth.mean(), jnp.diagonal(second), second[0, 1:]])
    assert np.all(np.abs(values.mean(axis=0) - expected) < 4 * values.std(axis=0) / np.sqrt(num))


@pytest.mark.slow
def test_stronger_anisotropy_asks_for_more_sweeps():
    model = tj.Analytic(contracts.planar())
    run = lambda weight: (
        tj.gibbs(
            KEY, model, tj.rewards.Quadratic([0.3, 1.0], [weight, 0.5]), num=2000, steps=10
        ).mixing
    )
    assert run(60.0).sweeps > run(1.0).sweeps


@pytest.mark.slow
def test_chains_that_do_not_mix_are_reported():
    reward = tj.rewards.Quadratic([0.3, 1.0], [5000.0, 0.5])
    with pytest.raises(RuntimeError, match="still correlated"):
        tj.gibbs(KEY, tj.Analytic(contracts.planar()), reward, num=2000, steps=5, max_sweeps=10)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (tj.rewards.Bump([0.0, 1.0]), "Hessian is not constant: use Conjugate"),
        (
            lambda x: -jnp.abs(x[0] - 3) - 0.1 * jnp.sum(x**2),
            "Hessian is not constant: use Conjugate",
        ),
        (
            lambda x: -jnp.sum(x**2) + 5 * jax.nn.relu(x[0] - 2),
            "Hessian is not constant: use Conjugate",
        ),
        (tj.rewards.LinearReward([0.0, 1.0]), "no concave direction.*: use Tilted"),
    ],
)
def test_other_rewards_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        tj.gibbs(KEY, tj.Analytic(contracts.planar()), reward, num=10, steps=5)


@pytest.mark.slow
def test_rounding_is_not_taken_for_a_kink():
    """A quadratic written out by hand, far from the origin and beside a large constant, in single
    precision.
    """
    dtype = jnp.float32
    prior = tj.GaussianMixture(
        jnp.ones(1, dtype), 100 * jnp.ones((1, 2), dtype), jnp.eye(2, dtype=dtype)[None]
    )
    center, weight = jnp.asarray([100.3, 99.0], dtype), jnp.asarray([1.0, 0.5], dtype)
    model = tj.Analytic(prior, tj.Linear(jnp.ones((), dtype)))
    particles = tj.gibbs(
        KEY, model, lambda x: 1e4 - jnp.sum(weight * (x - center) ** 2), num=500, steps=20
    )
    assert particles.x.dtype == dtype
    np.testing.assert_allclose(particles.x.mean(axis=0), [100.2, 99.5], atol=0.15)


@pytest.mark.parametrize("num", [1, 10])
def test_a_few_particles_are_mixed_as_well(num, tmp_path):
    prior = tj.GaussianMixture(
        [0.5, 0.5], [[-2.5, 0.0], [2.5, 0.0]], jnp.stack([0.5 * jnp.eye(2)] * 2)
    )
    particles = tj.gibbs(
        KEY, tj.Analytic(prior), tj.rewards.Quadratic([0.3, 1.0]), num=num, steps=5
    )
    assert particles.x.shape == (num, 2)
    assert particles.mixing.correlation < 0.25
    particles.save(tmp_path / "particles.npz")
    assert tj.Particles.load(tmp_path / "particles.npz").mixing == particles.mixing
    slow = tj.rewards.Quadratic([1.0, 0.0], [0.05, 5.0])
    with pytest.raises(RuntimeError, match="still correlated"):
        tj.gibbs(KEY, tj.Analytic(prior), slow, num=num, steps=5, max_sweeps=20)


@pytest.mark.slow
def test_the_spread_is_right_at_the_default_steps():
    """Two modes, 4 standard errors: with an inner draw of order 1 both variances are some 7 of them
    short.
    """
    prior = tj.GaussianMixture(
        [0.5, 0.5], [[-2.5, 0.0], [2.5, 0.0]], jnp.stack([0.5 * jnp.eye(2)] * 2)
    )
    reward, num = tj.rewards.Quadratic([0.3, 1.0], [2.0, 0.2]), 40_000
    truth = np.diagonal(theory.tilt(prior, reward, 1.0).mixture.cov())
    particles = tj.gibbs(KEY, tj.Analytic(prior), reward, num=num)
    squares = (np.asarray(particles.x) - np.asarray(particles.x).mean(axis=0)) ** 2
    assert np.all(np.abs(squares.mean(axis=0) - truth) < 4 * squares.std(axis=0) / np.sqrt(num))


def test_it_says_that_it_cannot_be_traced():
    model, reward = tj.Analytic(contracts.planar()), tj.rewards.Quadratic([0.3, 1.0], [1.0, 0.5])
    run = lambda key, scale: tj.gibbs(key, model, reward, scale, num=10, steps=2).x
    for traced in (
        jax.jit(run),
        jax.jit(lambda key, scale: run(KEY, 1.0)),
        jax.jacobian(run, argnums=1),
    ):
        with pytest.raises(TypeError, match="how many sweeps"):
            traced(KEY, 1.0)


@pytest.mark.slow
def test_a_tilt_without_finite_mass_is_reported():
    model = tj.Analytic(contracts.planar(jnp.float32), tj.Linear(jnp.float32(1)))
    with pytest.raises(FloatingPointError, match="no finite mass"):
        tj.gibbs(KEY, model, tj.rewards.Quadratic([0.3, 1.0], [1.0, -50.0]), num=10, steps=2)
