"""Continuous trajectories against the closed-form flow of a Gaussian, forwards and back. Tier:
exact (to the solver's tolerance).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj

MEAN, STD, BASE = np.array([0.7, -0.3]), 0.6, 1.7
MODEL = tj.Analytic(contracts.gaussian(MEAN, STD**2 * np.eye(2)), tj.Linear(BASE))
X = jnp.asarray([0.4, -0.9])
FINE = tj.Adaptive(1e-9, 1e-9, floor=1e-5)
REWARD = tj.rewards.Quadratic(contracts.TARGET)
KEY = jax.random.key(0)


def truth(t, u, x, mean=MEAN, std=STD):
    """The flow from t to u."""
    width = lambda t: np.hypot(BASE * (1 - t), t * std)
    return u * mean + width(u) / width(t) * (np.asarray(x) - t * mean)


@pytest.mark.parametrize(
    ("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7), (0.7, 0.2), (0.999999, 1.0)]
)
def test_the_trajectory_is_the_flow_at_every_time_between(t0, t1):
    trajectory = tj.flow(MODEL, X, t0, t1, solver=FINE)
    for t in np.linspace(t0, t1, 7):
        # Between the solver's steps the interpolation is of fourth order.
        np.testing.assert_allclose(trajectory(t), truth(t0, t, X), atol=2e-7)
    np.testing.assert_allclose(trajectory(t0), X, rtol=1e-7)


def test_a_guided_trajectory_is_the_flow_of_the_tilt():
    """`Laplace` is exact for a Gaussian: the trajectory from t is that of the tilt, a narrower one
    elsewhere.
    """
    precision = 1 / STD**2 + 2 * 1.5
    mean = (MEAN / STD**2 + 2 * 1.5 * np.asarray(contracts.TARGET)) / precision
    guidance = tj.Laplace(MODEL, REWARD, 1.5)
    trajectory = tj.flow(MODEL, X, 1e-3, 1.0, guidance, key=KEY, solver=FINE)
    for t in (0.4, 1.0):
        np.testing.assert_allclose(
            trajectory(t), truth(1e-3, t, X, mean, precision**-0.5), atol=2e-7
        )


@pytest.mark.slow
def test_trajectories_are_mapped_compiled_and_differentiated():
    at = lambda x: jax.vmap(tj.flow(MODEL, x, 0.1, 1.0, solver=tj.Adaptive(1e-8, 1e-8)))(
        jnp.asarray([0.5, 1.0])
    )
    starts = jnp.stack([X, -X, 3 * X])
    expected = np.stack([[truth(0.1, t, x) for t in (0.5, 1.0)] for x in starts])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(at))(starts), expected, atol=1e-5
    )  # the default floor's error
    gradient = jax.jit(
        jax.grad(lambda x: tj.flow(MODEL, x, 0.1, 0.6, solver=tj.Adaptive(1e-8, 1e-8))(0.5)[0])
    )(X)
    slope = truth(0.1, 0.5, 1.0, 0.0) - truth(0.1, 0.5, 0.0, 0.0)
    np.testing.assert_allclose(gradient, [slope, 0.0], atol=1e-6)


def test_single_precision_stays_single():
    single = tj.Analytic(contracts.gaussian(MEAN, STD**2 * np.eye(2), jnp.float32), tj.Linear(BASE))
    end = tj.flow(single, X, 0.0, 1.0)(0.6)
    assert end.dtype == jnp.float32
    np.testing.assert_allclose(end, truth(0.0, 0.6, X), atol=1e-4)


def test_outside_of_the_trajectory():
    trajectory = tj.flow(MODEL, X, 0.7, 0.2, solver=FINE)
    with pytest.raises(ValueError, match=r"runs from t = 0\.7 to 0\.2, got t = 0\.1"):
        trajectory(0.1)
    assert np.all(np.isnan(jax.jit(lambda t: trajectory(t))(0.8)))


def test_a_trajectory_that_cannot_be_solved_is_reported():
    short = tj.Adaptive(1e-9, 1e-9, max_steps=2)
    with pytest.raises(FloatingPointError, match="could not be solved in 2 steps to rtol = 1e-09"):
        tj.flow(MODEL, X, 0.1, 1.0, solver=short)
    assert np.all(np.isnan(jax.jit(lambda x: tj.flow(MODEL, x, 0.1, 1.0, solver=short)(0.5))(X)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[None], 0.1, 1.0), {}, r"one state, of shape \(2,\), got \(1, 2\): vmap"),
        ((X, 0.1, 0.1), {}, r"two times in \[0, 1\], got 0\.1 and 0\.1"),
        ((X, 0.1, 1.5), {}, r"two times in \[0, 1\]"),
        ((X, 0.1, 1.0, tj.dps(MODEL, REWARD)), {}, "needs key="),
        ((X, 0.0, 1.0, tj.dps(MODEL, REWARD)), {"key": KEY}, "t > 0"),
        (
            (X, 0.1, 1.0, tj.Conjugate(MODEL, REWARD)),
            {"key": KEY},
            "Conjugate has a memory of its last step",
        ),
        ((X, 0.1, 1.0, tj.dps(tj.Tilted(MODEL, REWARD), REWARD)), {"key": KEY}, "another model"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        tj.flow(MODEL, *arguments, **options)


def test_only_an_adaptive_solver_has_a_trajectory():
    with pytest.raises(TypeError, match="solver must be an Adaptive, got Heun"):
        tj.flow(MODEL, X, 0.1, 1.0, solver=tj.Heun())
