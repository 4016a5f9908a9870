"""The exact h-function against its definition. Tier: exact."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj

INTERPOLANTS = [tj.Linear(), tj.Linear(1.7)]


@pytest.mark.slow
@pytest.mark.parametrize("name", tj.problems.NAMES)
def test_log_h_is_log_norm_at_noise_and_the_reward_at_data(name):
    problem = tj.problems.get(name)
    log_h = eqx.filter_jit(theory.log_h(problem.prior, problem.reward, problem.scale))
    x = jnp.full(problem.prior.dim, 0.4)
    # 41 nodes a dimension resolve the quartic's tilt to 4e-5; everything else is closed, or far
    # better resolved.
    tolerance = 1e-4 if name == "double_well" else 1e-6
    truth = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale).log_norm
    assert np.isclose(log_h(jnp.zeros(()), x), truth, rtol=0, atol=tolerance)
    assert np.isclose(log_h(jnp.ones(()), x), problem.scale * problem.reward(x), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noniso", "step", "bump", "double_well"])
@pytest.mark.parametrize("interpolant", INTERPOLANTS)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_log_h_matches_a_conditional_expectation_on_a_grid(name, interpolant, t):
    problem = tj.problems.get(name)
    d = problem.prior.dim
    x = jnp.array([0.7, 1.1])[:d]
    grid = theory.quadrature.tilt(problem.prior, problem.reward, 0.0)
    t = jnp.asarray(t)
    log_view = -jnp.sum((x[None] - interpolant.alpha(t) * grid.centers) ** 2, axis=1) / (
        2 * interpolant.sigma(t) ** 2
    )
    log_posterior = grid.log_masses + log_view
    reward = problem.scale * jax.vmap(problem.reward)(grid.centers)
    expected = jax.nn.logsumexp(log_posterior + reward) - jax.nn.logsumexp(log_posterior)
    got = eqx.filter_jit(theory.log_h(problem.prior, problem.reward, problem.scale, interpolant))(
        t, x
    )
    assert np.isclose(got, expected, rtol=0, atol=1e-4 if name == "double_well" else 1e-6)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_the_tilted_marginal_is_p_times_h_over_z(interpolant):
    problem = tj.problems.noniso()
    tilt = theory.tilt(problem.prior, problem.reward, problem.scale)
    log_h = eqx.filter_jit(theory.log_h(problem.prior, problem.reward, problem.scale, interpolant))
    for t in (0.2, 0.6, 0.95):
        x = jnp.array([0.5, 0.8])
        left = theory.marginal(tilt.mixture, t, interpolant).log_prob(x)
        right = (
            theory.marginal(problem.prior, t, interpolant).log_prob(x)
            + log_h(jnp.asarray(t), x)
            - tilt.log_norm
        )
        assert np.isclose(left, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_the_gradient_of_log_h_moves_the_denoiser_to_the_tilted_one(interpolant):
    problem = tj.problems.quadratic()
    log_h = eqx.filter_jit(theory.log_h(problem.prior, problem.reward, problem.scale, interpolant))
    model = tj.Analytic(problem.prior, interpolant)
    tilted = tj.Analytic(
        theory.tilt(problem.prior, problem.reward, problem.scale).mixture, interpolant
    )
    conjugate = tj.Tilted(model, problem.reward, problem.scale)
    for t in (0.1, 0.5, 0.9):
        t, x = jnp.asarray(t), jnp.array([0.3, 0.9])
        moved = model.denoise(t, x) + interpolant.tweedie(t) * jax.grad(log_h, argnums=1)(t, x)
        np.testing.assert_allclose(moved, tilted.denoise(t, x), atol=1e-10)
        np.testing.assert_allclose(conjugate.denoise(t, x), tilted.denoise(t, x), atol=1e-10)


@pytest.mark.parametrize("separation", [3.0, 20.0])
def test_far_and_narrow_modes_have_finite_gradients(separation):
    covs = jnp.stack([jnp.eye(2) / 16] * 2)
    prior = tj.GaussianMixture([0.5, 0.5], [[-separation, 0.0], [separation, 0.0]], covs)
    for dtype in (jnp.float32, jnp.float64):
        log_h = theory.log_h(prior, tj.rewards.Quadratic([0.0, 1.0]), 3.0)
        value, score = jax.value_and_grad(log_h, argnums=1)(
            jnp.asarray(0.9, dtype), jnp.asarray([separation, 0.2], dtype)
        )
        assert np.isfinite(value)
        assert np.all(np.isfinite(score))


def test_multiples_and_sums_of_rewards_without_closed_form_go_to_quadrature():
    problem = tj.problems.bump()
    doubled = theory.log_h(problem.prior, 2 * problem.reward, problem.scale / 2)
    plain = theory.log_h(problem.prior, problem.reward, problem.scale)
    t, x = jnp.asarray(0.4), jnp.asarray([0.7])
    np.testing.assert_allclose(doubled(t, x), plain(t, x), rtol=1e-12)
    assert not theory.is_quadratic(2 * problem.reward + tj.rewards.LinearReward([1.0]))
    assert theory.is_quadratic(2 * tj.rewards.Quadratic([1.0]) + tj.rewards.LinearReward([1.0]))


def test_quadrature_says_where_it_does_not_resolve():
    problem, narrow = tj.problems.quadratic(), tj.rewards.Bump([2.5, 0.0])
    with pytest.raises(ValueError, match="does not resolve this reward at scale 1000"):
        theory.log_h(problem.prior, narrow, 1000.0)
    with pytest.raises(ValueError, match="does not resolve this tilt"):
        theory.quadrature.tilt(problem.prior, problem.reward, 1e6)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\], got 2"):
        theory.marginal(problem.prior, 2.0)
