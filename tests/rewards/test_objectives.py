"""Objectives: sums that sweep, constraints that hold, fronts by hand. Tier: exact (float64, 1e-10),
but where it says statistical.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import theory
import tiltjax as tj
from tiltjax.rewards import objectives

A, B = tj.rewards.Quadratic([1.0, 0.0]), tj.rewards.LinearReward([0.0, 1.0])
POINTS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
KEY = jax.random.key(0)


def test_a_weighted_sum_is_the_sum():
    reward = objectives.weighted([A, B, lambda x: jnp.max(x)], [2.0, -1, 0.5])
    np.testing.assert_allclose(
        reward(POINTS[0]), 2 * A(POINTS[0]) - B(POINTS[0]) + 0.5 * jnp.max(POINTS[0]), atol=1e-12
    )
    natural, precision = objectives.weighted([A, B], [2.0, 3.0]).conjugate()
    np.testing.assert_allclose(natural, [4.0, 3.0])
    np.testing.assert_allclose(precision, 4.0)


def test_all_objectives_of_all_samples():
    table = objectives.values([A, B], POINTS)
    assert table.shape == (5, 2)
    np.testing.assert_allclose(table[3], [A(POINTS[3]), B(POINTS[3])], atol=1e-12)


def test_a_sweep_of_weights_compiles_once():
    model = tj.Analytic(contracts.gaussian([0.0, 0.0], np.eye(2)))
    fn, traces = contracts.traced(
        lambda weights: tj.Tilted(model, objectives.weighted([A, B], weights), 1.0).denoise(
            0.5, POINTS[0]
        )
    )
    run, sweep = eqx.filter_jit(fn), [[0.5, 0.5], [1.0, 0.0], [0.25, 2.0]]
    looped = [run(jnp.asarray(weights)) for weights in sweep]
    assert len(traces) == 1
    np.testing.assert_allclose(jax.vmap(fn)(jnp.asarray(sweep)), jnp.stack(looped), atol=1e-12)


def test_a_sweep_of_runs_compiles_the_network_once():
    denoise, traces = contracts.traced(lambda t, x: t * x / (t**2 + (1 - t) ** 2))
    model = tj.from_denoiser(denoise, shape=(2,), dtype=jnp.float64)
    run = lambda weights: (
        tj.sample(
            KEY, model, tj.dps(model, objectives.weighted([A, B], weights), 1.0), num=2, steps=2
        ).x
    )
    ends = [run([0.2, 0.8])]
    first = len(traces)
    ends += [run([w, 1 - w]) for w in (0.5, 0.9)]
    assert len(traces) == first
    assert not np.allclose(ends[0], ends[1])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_one_weight_an_objective(weights):
    with pytest.raises(ValueError, match=rf"got {len(weights)} weights for 2 objectives"):
        objectives.weighted([A, B], weights)


def test_constraints():
    bound = lambda x: x[0] - 0.5
    inside, outside = jnp.array([0.2, 3.0]), jnp.array([1.5, 3.0])
    soft, hard = objectives.Constraint(bound, 10.0), objectives.Constraint(bound)
    assert (
        float(soft(inside)),
        float(soft(outside)),
        float(hard(inside)),
        float(hard(outside)),
    ) == (
        0,
        -10,
        0,
        -np.inf,
    )
    np.testing.assert_array_equal(jax.grad(soft)(outside), [-10.0, 0.0])
    np.testing.assert_array_equal(jax.grad(hard)(outside), 0.0)
    assert hard(jnp.array([0.5, 0.0])) == 0  # the bound itself is allowed
    assert np.isnan(objectives.Constraint(lambda x: x[0] * jnp.nan)(inside))
    with pytest.raises(ValueError, match="penalty must be positive"):
        objectives.Constraint(bound, 0.0)


def test_selection_keeps_a_constraint():
    x = jnp.asarray([[0.0, 0.0], [1.0, 5.0], [0.1, 1.0], [2.0, 9.0]])
    kept = tj.best_of_n(
        tj.particles.unweighted(x, None), B + objectives.Constraint(lambda x: x[0] - 0.5), 2
    )
    np.testing.assert_array_equal(kept.x, x[jnp.array([0, 2])])


def test_weights_keep_a_constraint():
    """Statistical: a truncated normal law, whose mass and mean are known."""
    model = tj.Analytic(contracts.gaussian([0.0], [[1.0]]))
    twist = tj.dps(
        model, tj.rewards.ValueOnly(objectives.Constraint(lambda x: x[0])), 1.0
    )  # half of the mass
    settings = {
        "num": 4000,
        "steps": 20,
        "proposal": tj.weighted.proposals.Base(),
        "ess_threshold": 0.0,
    }
    kept = tj.smc(KEY, model, twist, **settings)
    assert kept.resample(jax.random.key(1), 1000).max() <= 0
    share = float(jnp.exp(kept.log_norm))
    assert abs(share - 0.5) < 5 * np.sqrt(0.25 / 4000)
    half = np.asarray(kept.x[:, 0])[np.asarray(kept.x[:, 0]) <= 0]
    np.testing.assert_allclose(kept.mean(lambda x: x[0]), half.mean(), atol=1e-10)


def test_the_front_by_hand():
    rows = [[0, 3], [1, 2], [1, 1], [2, 2], [3, 0], [3, 0], [0, 0], [-np.inf, 9]]
    assert objectives.front(rows).tolist() == [True, False, False, True, True, True, False, True]
    assert objectives.front([[1.0, 2.0, 3.0]]).tolist() == [True]


def test_the_front_is_what_nothing_dominates():
    rows = np.random.default_rng(1).integers(0, 6, size=(60, 3))
    dominated = [
        any(np.all(other >= row) and np.any(other > row) for other in rows) for row in rows
    ]
    np.testing.assert_array_equal(objectives.front(rows), ~np.array(dominated))
    assert 0 < sum(dominated) < 60


def test_the_dominated_area():
    assert objectives.hypervolume([[2, 1], [1, 2]], [0, 0]) == 3
    assert objectives.hypervolume([[2, 1], [1, 2], [1, 1], [-1, 9]], [0, 0]) == 3
    assert objectives.hypervolume([[2, 2], [2, 1], [3, 1]], [0, 0]) == 5
    assert objectives.hypervolume([[2, 2]], [2, 0]) == 0
    rows = np.random.default_rng(2).uniform(size=(20, 2))
    grid = (np.arange(400) + 0.5) / 400
    covered = (rows[:, 0, None, None] >= grid[:, None]) & (rows[:, 1, None, None] >= grid)
    assert abs(objectives.hypervolume(rows, [0, 0]) - covered.any(axis=0).mean()) < 2 / 400


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objectives.values([A, B], 0.5), r"x must hold samples.*got shape \(\)"),
        (lambda: objectives.front([1.0, 2.0]), r"\(samples, objectives\), got shape \(2,\)"),
        (lambda: objectives.front([[1.0, np.nan]]), "NaN in 1 of 1 rows"),
        (lambda: objectives.hypervolume([[1.0, 2.0, 3.0]], [0, 0, 0]), "two objectives"),
        (lambda: objectives.hypervolume([[1.0, 2.0]], [0]), "two objectives"),
    ],
)
def test_values_that_make_no_sense(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call", [lambda: objectives.values(A, POINTS), lambda: objectives.weighted(A, [1.0])]
)
def test_one_reward_is_no_list_of_objectives(call):
    with pytest.raises(TypeError, match="must be a list of rewards, got Quadratic"):
        call()


def test_the_walk_along_the_weights_is_the_gradient_of_log_z():
    prior, scale, step = contracts.planar(), 1.5, 1e-4
    tilts = jax.jit(jax.vmap(lambda w: theory.tilt(prior, objectives.weighted([A, B], w), scale)))
    at = np.array([0.3, 0.7])
    tilt = tilts(
        jnp.asarray([at, *(at + step * sign * axis for axis in np.eye(2) for sign in (1, -1))])
    )
    log_norm = np.asarray(tilt.log_norm)
    slopes = (log_norm[1::2] - log_norm[2::2]) / (2 * step * scale)
    means = [
        theory.expected_reward(jax.tree.map(lambda leaf: leaf[0], tilt.mixture), one)
        for one in (A, B)
    ]
    np.testing.assert_allclose(slopes, means, atol=1e-6)  # central differences, O(step^2)
    assert np.all(log_norm[1::2] + log_norm[2::2] > 2 * log_norm[0])  # convex
