"""Named problems: their normalizing constants against quadrature. Tier: exact (to the digits
given).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

from tiltjax import problems


def density(problem, points):
    """The prior's density by NumPy."""
    total = 0.0
    for w, m, s in zip(*contracts.np_fields(problem.prior), strict=True):
        e = points - m
        quadratic = np.einsum("...i,ij,...j->...", e, np.linalg.inv(s), e)
        total = total + w * np.exp(-quadratic / 2) / np.sqrt(np.linalg.det(2 * np.pi * s))
    return total


def tilted(problem):
    """A grid and the tilt's unnormalized density on it; a trapezoid is spectrally accurate for
    smooth problems.
    """
    if problem.prior.dim == 1:
        axes = [np.linspace(-14.0, 14.0, 28_001)]
    else:
        axes = [np.linspace(-9.0, 9.0, 721), np.linspace(-7.0, 9.0, 641)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    reward = np.asarray(
        jax.jit(jax.vmap(problem.reward))(jnp.asarray(points.reshape(-1, len(axes))))
    )
    return axes, density(problem, points) * np.exp(
        problem.scale * reward.reshape(points.shape[:-1])
    )


def integral(axes, values):
    for axis in reversed(axes):
        values = np.trapezoid(values, axis, axis=-1)
    return float(values)


@pytest.mark.parametrize("name", [name for name in problems.NAMES if name not in ("step", "bump")])
def test_the_log_normalizer_to_its_four_digits(name):
    problem = problems.get(name)
    assert abs(np.log(integral(*tilted(problem))) - problem.log_norm) < 5.1e-5


def test_the_step_problem_is_symmetric():
    """By symmetry Z = (1 + exp(-lambda R)) / 2, which the grid's jump would only blur."""
    problem = problems.get("step")
    assert abs(np.log((1 + np.exp(-50.0)) / 2) - problem.log_norm) < 5.1e-5
    assert float(problem.reward(jnp.asarray([0.1]))) == 0.0
    assert float(problem.reward(jnp.asarray([-0.1]))) == -10.0


def test_the_bump_problem_keeps_what_its_docstring_says_on_the_left():
    (axis,), values = tilted(problems.get("bump"))
    left = np.trapezoid(values[axis <= 0], axis[axis <= 0]) / np.trapezoid(values, axis)
    assert abs(left - 0.01528) < 5.1e-6


@pytest.mark.parametrize("name", problems.NAMES)
def test_every_problem_is_whole(name):
    problem = problems.get(name)
    assert problem.name == name
    assert len(problem.bounds) == problem.prior.dim
    assert np.isfinite(problem.log_norm)
    assert problem.sigma > 0
    assert problem.reward(jnp.zeros(problem.prior.dim)).shape == ()
    # The bounds hold nearly all of the tilt: it is where one looks.
    axes, values = tilted(problem)
    for direction, (axis, (low, high)) in enumerate(zip(axes, problem.bounds, strict=True)):
        others = [a for i, a in enumerate(axes) if i != direction]
        marginal = values if not others else np.trapezoid(values, others[0], axis=1 - direction)
        inside = (axis >= low) & (axis <= high)
        assert np.trapezoid(marginal[inside], axis[inside]) / np.trapezoid(marginal, axis) > 0.99
