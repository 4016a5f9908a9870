"""Rewards: values against NumPy, the algebra, conjugate forms. Tier: exact (float64, 1e-10)."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

from tiltjax import rewards

TOLERANCE = 1e-10
TARGET = np.array(contracts.TARGET)
REWARDS = contracts.all_rewards()
BY_HAND = {
    "quadratic": lambda x: -np.sum((x - TARGET) ** 2),
    "diagonal": lambda x: -((x - TARGET) ** 2 @ [2.0, 0.5]),
    "matrix": lambda x: -(x - TARGET) @ np.array([[2.0, 0.3], [0.3, 0.5]]) @ (x - TARGET),
    "linear": lambda x: x @ [1.0, -0.5],
    "bump": lambda x: np.exp(-np.sum((x - TARGET) ** 2) / (2 * 1.2**2)),
    "step": lambda x: 0.0 if x.sum() >= 0.3 else -2.0,
    "double well": lambda x: -0.125 * (x[0] ** 4 - 12.5 * x[0] ** 2) - (x[1] - 0.4 * x[0]) ** 2,
    "sum": lambda x: -2 * np.sum((x - TARGET) ** 2) - x @ [1.0, 2.0],
    "function": lambda x: np.sin(x.sum()),
}
POINTS = np.random.default_rng(0).normal(size=(4, 2))


def test_every_reward_is_checked_by_hand():
    assert set(BY_HAND) == set(REWARDS)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_values_and_dtypes(name, dtype):
    reward = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, REWARDS[name]
    )
    for x in POINTS:
        value = reward(jnp.asarray(x, dtype))
        assert value.shape == ()
        assert value.dtype == dtype
        expected = BY_HAND[name](np.asarray(jnp.asarray(x, dtype), float))
        # Single precision: the terms are at most some tens, a dozen roundings each.
        chex.assert_trees_all_close(
            value, jnp.asarray(expected, dtype), atol=200 * float(jnp.finfo(dtype).eps), rtol=0
        )


@pytest.mark.parametrize("name", ["quadratic", "linear", "sum"])
def test_a_conjugate_form_is_the_reward_up_to_a_constant(name):
    natural, precision = REWARDS[name].conjugate()
    form = lambda x: x @ np.asarray(natural) - float(precision) * x @ x / 2
    differences = [float(REWARDS[name](jnp.asarray(x))) - form(x) for x in POINTS]
    np.testing.assert_allclose(differences, differences[0], atol=TOLERANCE)
    assert natural.shape == (2,)
    assert precision.shape == ()


@pytest.mark.parametrize("name", ["diagonal", "matrix", "bump", "step", "double well", "function"])
def test_no_other_reward_claims_one(name):
    with pytest.raises(ValueError, match=r"not conjugate.*Conjugate"):
        REWARDS[name].conjugate()
    with pytest.raises(ValueError, match="not conjugate"):
        (REWARDS[name] + REWARDS["quadratic"]).conjugate()


def test_the_algebra():
    x = jnp.asarray(POINTS[0])
    a, b, fn = REWARDS["matrix"], REWARDS["linear"], lambda x: jnp.max(x)
    for reward, expected in [
        (a + b, a(x) + b(x)),
        (a - b, a(x) - b(x)),
        (2 * a, 2 * a(x)),
        (a * 2, 2 * a(x)),
        (-a, -a(x)),
        (a + fn, a(x) + fn(x)),
        (fn + a, a(x) + fn(x)),
        (a - fn, a(x) - fn(x)),
        (sum([a, b], start=rewards.LinearReward([0.0, 0.0])), a(x) + b(x)),
        (0.5 * (a + 2 * b) - b, 0.5 * a(x)),
    ]:
        assert isinstance(reward, rewards.Reward)
        chex.assert_trees_all_close(reward(x), expected, atol=TOLERANCE)


def test_a_quadratic_of_an_image():
    reward = rewards.Quadratic(jnp.ones((3, 4, 2)), 0.5)
    chex.assert_trees_all_close(reward(jnp.zeros((3, 4, 2))), jnp.asarray(-12.0), atol=TOLERANCE)
    assert reward.conjugate()[0].shape == (3, 4, 2)


@pytest.mark.parametrize(
    "weight", [2.0, [2.0, 0.5], [[2.0, 0.3], [0.3, 0.5]]], ids=("scalar", "diagonal", "matrix")
)
def test_gradients_are_minus_two_h(weight):
    reward, x = rewards.Quadratic(TARGET, weight), jnp.asarray(POINTS[1])
    if np.ndim(weight) != 1:
        expected = -2 * np.asarray(reward.matrix()) @ (POINTS[1] - TARGET)
    else:
        expected = -2 * np.array(weight) * (POINTS[1] - TARGET)
    chex.assert_trees_all_close(jax.grad(reward)(x), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (2.0, np.diag([2.0, 2.0])),
        ([2.0, 0.5], np.diag([2.0, 0.5])),
        (np.ones((2, 2)), np.ones((2, 2))),
    ],
    ids=("scalar", "diagonal", "matrix"),
)
def test_the_matrix_of_a_quadratic(weight, expected):
    matrix = rewards.Quadratic(TARGET, weight).matrix()
    chex.assert_trees_all_close(matrix, expected, atol=0)


def test_parameters_are_leaves_that_can_be_swept():
    x = jnp.asarray(POINTS[2])
    values = jax.vmap(lambda y: rewards.Quadratic(y)(x))(jnp.asarray(POINTS))
    chex.assert_trees_all_close(values, -np.sum((POINTS - POINTS[2]) ** 2, axis=1), atol=TOLERANCE)
    for factor in (2, 2.0, jnp.asarray(2)):
        assert eqx.is_inexact_array((factor * rewards.Quadratic([0.0, 0.0])).factor)


def test_rewards_divide_subtract_and_sum():
    a, b, x = (
        rewards.Quadratic([1.0, 0.0]),
        rewards.LinearReward([0.5, 2.0]),
        jnp.array([0.3, -0.7]),
    )
    fn = lambda x: jnp.sum(x)
    np.testing.assert_allclose((a / 2)(x), a(x) / 2)
    np.testing.assert_allclose(sum([a, b, b])(x), a(x) + 2 * b(x))
    np.testing.assert_allclose((fn - a)(x), jnp.sum(x) - a(x))
    np.testing.assert_allclose((a - fn)(x), a(x) - jnp.sum(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rewards.Quadratic(TARGET, [1.0, 2.0, 3.0]), r"a scalar, \(2,\) or.*got \(3,\)"),
        (lambda: rewards.Quadratic(np.ones((2, 2)), [1.0, 2.0]), r"target \(2, 2\), got \(2,\)"),
        (
            lambda: rewards.Quadratic(TARGET, [[1.0, 0.5], [0.0, 1.0]]),
            r"must be symmetric, got .*use \(H \+ H\.T\) / 2",
        ),
        (lambda: rewards.Quadratic(np.ones((2, 2))).matrix(), r"only for vectors, .*\(2, 2\)"),
        (lambda: rewards.DoubleWell()(jnp.ones(3)), r"states of shape \(2,\), got \(3,\)"),
        (
            lambda: rewards.LinearReward([1.0, 2.0])(jnp.ones(3)),
            r"direction has shape \(2,\) but the sample has shape \(3,\)",
        ),
    ],
)
def test_shapes_and_weights_that_make_no_reward_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("fn", "message"),
    [(lambda x: None, "got NoneType"), (lambda x: x[0] > 0, "floating number, got bool")],
)
def test_rewards_that_are_no_floating_number_are_refused(fn, message):
    with pytest.raises(TypeError, match=message):
        rewards.as_reward(fn)(jnp.ones(2))


def test_an_error_of_a_reward_says_that_it_got_one_sample():
    """A reward of a batch is the usual mistake."""
    reward = rewards.as_reward(lambda batch: jnp.sum(batch**2, axis=1))
    with pytest.raises(ValueError, match="axis 1") as raised:
        rewards.value(reward, jnp.ones(2))
    assert any("sample of shape (2,), not for a batch" in note for note in raised.value.__notes__)
