"""Selection among finished samples. Tiers: exact (against NumPy), statistical (5 standard
errors).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import tiltjax as tj
from tiltjax.particles import unweighted

REWARD = tj.rewards.LinearReward([1.0, 0.0])


def population(num=24, seed=0):
    return unweighted(jnp.asarray(np.random.default_rng(seed).normal(size=(num, 2))))


@pytest.mark.parametrize("n", [1, 2, 6, 24])
def test_best_of_n_takes_the_best_of_each_group(n):
    particles = population()
    x = np.asarray(particles.x)
    groups = x.reshape(-1, n, 2)
    expected = np.stack([group[np.argmax(group[:, 0])] for group in groups])
    best = tj.best_of_n(particles, REWARD, n)
    chex.assert_trees_all_equal(best.x, expected)
    assert best.log_norm is None
    assert best.log_weights.shape == (24 // n,)


def test_ties_go_to_the_first():
    x = jnp.asarray([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    chex.assert_trees_all_equal(tj.best_of_n(unweighted(x), REWARD, 2).x, x[jnp.asarray([0, 2])])


def test_best_of_n_of_normals_has_the_law_of_a_maximum():
    particles = unweighted(jax.random.normal(jax.random.key(3), (8000, 2), jnp.float64))
    best = np.asarray(tj.best_of_n(particles, REWARD, 4).x)
    # The fourth power of a uniform is the maximum's law: Phi(max)^4 is uniform; the other
    # coordinate is untouched.
    uniform = stats.norm.cdf(best[:, 0]) ** 4
    for power in (1, 2):
        error = abs(np.mean(uniform**power) - 1 / (power + 1))
        assert error < 5 * np.std(uniform**power) / np.sqrt(len(best))
    assert abs(best[:, 1].mean()) < 5 / np.sqrt(len(best))


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_softmax_of_n_picks_in_proportion(scale):
    values = np.array([0.0, 1.0, -0.5])
    groups = 20_000
    x = jnp.asarray(np.tile(np.stack([values, np.arange(3.0)], axis=1), (groups, 1)))
    chosen = np.asarray(tj.softmax_of_n(jax.random.key(0), unweighted(x), REWARD, 3, scale).x[:, 1])
    expected = np.exp(scale * values) / np.exp(scale * values).sum()
    counts = np.bincount(chosen.astype(int), minlength=3) / groups
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected * (1 - expected) / groups))


def test_softmax_of_n_at_a_large_scale_is_best_of_n():
    particles = population()
    chosen = tj.softmax_of_n(jax.random.key(0), particles, REWARD, 4, 1e12)
    chex.assert_trees_all_equal(chosen.x, tj.best_of_n(particles, REWARD, 4).x)


def test_softmax_groups_are_independent_and_keyed():
    particles = population(240)
    draw = lambda seed: np.asarray(
        tj.softmax_of_n(jax.random.key(seed), particles, REWARD, 2, 0.1).x
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    first = np.isin(draw(0)[:, 0], np.asarray(particles.x)[::2, 0])
    assert 0 < first.sum() < len(first)


def test_a_bare_function_and_states_of_any_shape():
    x = jnp.arange(24.0).reshape(4, 3, 2)
    best = tj.best_of_n(unweighted(x), lambda x: -jnp.sum(x), 2)
    chex.assert_trees_all_equal(best.x, x[::2])


def test_inside_jit():
    particles = population()
    inside = jax.jit(lambda p: tj.best_of_n(p, REWARD, 4).x)(particles)
    chex.assert_trees_all_equal(inside, tj.best_of_n(particles, REWARD, 4).x)


def test_infinite_rewards_are_ordered_and_nan_is_refused():
    x = jnp.asarray([[-jnp.inf, 0.0], [1.0, 1.0]])
    chex.assert_trees_all_equal(tj.best_of_n(unweighted(x), lambda x: x[0], 2).x, x[1:])
    with pytest.raises(FloatingPointError, match="the reward is NaN for 1 of 2 particles"):
        tj.best_of_n(unweighted(x.at[0, 0].set(jnp.nan)), lambda x: x[0], 2)


def test_a_group_without_an_allowed_candidate_is_refused():
    """No winner violates a constraint silently."""
    particles = unweighted(jnp.asarray([[-1.0], [-2.0], [-3.0], [4.0]]))
    wall = lambda x: jnp.where(x[0] > 0, x[0], -jnp.inf)
    assert tj.best_of_n(particles, wall, 4).x == 4
    for select in (tj.best_of_n, lambda *args: tj.softmax_of_n(jax.random.key(0), *args, 1.0)):
        with pytest.raises(FloatingPointError, match="in 1 of 2 groups every candidate has the re"):
            select(particles, wall, 2)


def test_softmax_never_chooses_what_is_forbidden():
    x = jax.random.normal(jax.random.key(0), (400, 1))
    particles = tj.Particles(x, jnp.zeros(400))
    wall = lambda x: jnp.where(x[0] > 0, 0.0, -jnp.inf)
    groups = np.asarray(x[:, 0]).reshape(-1, 8).max(axis=1) > 0
    assert groups.all()
    for scale in (0.0, 1.0, 1e36):
        assert np.all(
            np.asarray(tj.softmax_of_n(jax.random.key(1), particles, wall, 8, scale).x) > 0
        )
    with pytest.raises(FloatingPointError, match="every candidate has the reward -inf"):
        tj.softmax_of_n(jax.random.key(1), particles, lambda x: -jnp.inf * jnp.ones(()), 8, 1.0)
    with pytest.raises(FloatingPointError, match=r"a candidate has the reward \+inf"):
        tj.softmax_of_n(jax.random.key(1), particles, lambda x: jnp.inf * (x[0] + 9), 8, 1.0)


def test_softmax_at_overwhelming_scales_is_the_best():
    particles = tj.Particles(jax.random.normal(jax.random.key(0), (64, 1)), jnp.zeros(64))
    reward = lambda x: 1e3 * jnp.abs(x[0]) + 1e3
    a, b = (
        tj.softmax_of_n(jax.random.key(1), particles, reward, 4, 1e300),
        tj.best_of_n(particles, reward, 4),
    )
    np.testing.assert_array_equal(a.x, b.x)
