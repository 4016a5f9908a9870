"""Thermodynamic integration against closed forms and quadrature of log Z. Tier: exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj


def closed_form(problem):
    return lambda scale: theory.expected_reward(
        theory.tilt(problem.prior, problem.reward, scale).mixture, problem.reward
    )


def test_the_integral_is_the_closed_form():
    problem = tj.problems.noniso()
    curve = closed_form(problem)
    got = theory.thermodynamic_integral(curve, problem.scale, nodes=48)
    exact = theory.tilt(problem.prior, problem.reward, problem.scale).log_norm
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-10)
    pieces = theory.thermodynamic_integral(curve, 1.0, nodes=48)
    pieces += theory.thermodynamic_integral(curve, 3.0, start=1.0, nodes=48)
    np.testing.assert_allclose(pieces, exact, rtol=0, atol=1e-10)


def test_the_integral_covers_rewards_without_closed_form():
    problem = tj.problems.double_well()
    mean = lambda scale: theory.quadrature.tilt(
        problem.prior, problem.reward, scale, cells=120
    ).expect(problem.reward)
    got = theory.thermodynamic_integral(mean, problem.scale, nodes=40)
    grid = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale, cells=200)
    np.testing.assert_allclose(got, grid.log_norm, rtol=0, atol=1e-7)
    assert np.isclose(got, problem.log_norm, rtol=0, atol=6e-5)


def test_the_integral_compiles_and_its_derivative_is_the_mean_reward():
    curve = closed_form(tj.problems.quadratic())
    integral = jax.jit(lambda scale: theory.thermodynamic_integral(curve, scale))
    np.testing.assert_allclose(jax.grad(integral)(2.0), curve(2.0), rtol=1e-9)
    # The bracket's derivative by a mean reward is its weight in the trapezoidal rule.
    scales, values = jnp.asarray([0.0, 1.0, 3.0]), jnp.asarray([-2.0, -1.0, -0.5])
    value = jax.jit(lambda values: theory.thermodynamic_bracket(scales, values).value)
    np.testing.assert_allclose(jax.grad(value)(values), [0.5, 1.5, 1.0], rtol=1e-12)


def test_the_bracket_holds_the_truth_and_closes_with_the_grid():
    problem = tj.problems.unequal()
    finest = jnp.linspace(0, 3, 33)
    curve = jax.jit(jax.vmap(closed_form(problem)))(finest)
    truth = float(theory.tilt(problem.prior, problem.reward, 3.0).log_norm)
    widths = []
    for every in (8, 4, 2, 1):
        scales, values = finest[::every], curve[::every]
        got = theory.thermodynamic_bracket(scales, values)
        assert got.lower <= truth <= got.upper
        assert got.error == got.lower_error == got.upper_error == 0
        np.testing.assert_allclose(got.value, np.trapezoid(values, scales), rtol=1e-12)
        widths.append(float(got.upper - got.lower))
    np.testing.assert_allclose(
        np.array(widths[:-1]) / widths[1:], 2.0, rtol=1e-9
    )  # (b - a) / n times the curve's rise


def test_standard_errors_are_those_of_repeated_measurement():
    rng = np.random.default_rng(0)
    scales, errors = np.array([0.0, 0.5, 1.5, 3.0]), np.array([0.02, 0.05, 0.01, 0.03])
    values = np.array([-5.0, -3.0, -2.0, -1.0])
    got = theory.thermodynamic_bracket(scales, values, errors)
    noisy = values + errors * rng.normal(size=(200_000, 4))
    steps = np.diff(scales)
    for name, sums in {
        "error": np.trapezoid(noisy, scales, axis=1),
        "lower_error": noisy[:, :-1] @ steps,
        "upper_error": noisy[:, 1:] @ steps,
    }.items():
        np.testing.assert_allclose(getattr(got, name), sums.std(), rtol=0.01)


def test_refusals_say_why():
    with pytest.raises(ValueError, match=r"falls from -1 at scale 0 to -2 at 1"):
        theory.thermodynamic_bracket(
            np.array([0.0, 1.0]), np.array([-1.0, -2.0]), np.array([0.1, 0.1])
        )
    theory.thermodynamic_bracket(np.array([0.0, 1.0]), np.array([-1.0, -1.1]), np.array([0.1, 0.1]))
    with pytest.raises(ValueError, match="scales must increase"):
        theory.thermodynamic_bracket(np.array([0.0, 0.0]), np.array([-1.0, -1.0]))
    with pytest.raises(ValueError, match=r"errors must not be negative, got \[ 0\.1 -0\.1\]"):
        theory.thermodynamic_bracket(
            np.array([0.0, 1.0]), np.array([-1.0, -1.0]), np.array([0.1, -0.1])
        )
    with pytest.raises(ValueError, match="at least two scales"):
        theory.thermodynamic_bracket(np.array([0.0, 1.0]), np.array([-1.0]))
    with pytest.raises(ValueError, match="must not be negative"):
        theory.thermodynamic_integral(lambda scale: scale, -1.0)
    with pytest.raises(ValueError, match="one number for one scale"):
        theory.thermodynamic_integral(lambda scale: jnp.stack([scale, scale]), 1.0)
