"""Interpolants: parametrisations of one model are one model; noisy views add up. Tier: exact (float64, 1e-10)."""

import chex
import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj

PATHS = contracts.paths()
TIMES = (1e-3, 0.2, 0.5, 0.9, 0.999)
TOLERANCE = 1e-10


@pytest.fixture(params=PATHS, ids=str)
def path(request):
    return PATHS[request.param]


def state(seed, d=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=d))


@pytest.mark.parametrize("t", TIMES)
def test_parametrisations_round_trip(path, t):
    t, x, denoised = jnp.asarray(t), state(0), state(1)
    noise, velocity = path.noise(t, x, denoised), path.velocity(t, x, denoised)
    # Dividing by alpha (or by the Wronskian) magnifies rounding by |x| / alpha: relative to that, nothing is lost.
    size = float(1 + jnp.max(jnp.abs(x)) / path.alpha(t) + 1 / path.sigma(t))
    chex.assert_trees_all_close(path.denoised_from_noise(t, x, noise), denoised, atol=1e-13 * size, rtol=0)
    chex.assert_trees_all_close(path.denoised_from_velocity(t, x, velocity), denoised, atol=1e-13 * size, rtol=0)
    chex.assert_trees_all_close(path.score(t, x, denoised) * path.sigma(t), -noise, rtol=1e-13)
    chex.assert_trees_all_close(path.alpha(t) * denoised + path.sigma(t) * noise, x, atol=TOLERANCE)


def test_a_velocity_network_is_read_right_even_at_the_noise_end(path):
    t, x, denoised = jnp.asarray(0.0), state(0), state(1)
    velocity = path.velocity(t, x, denoised)
    chex.assert_trees_all_close(path.denoised_from_velocity(t, x, velocity), denoised, atol=TOLERANCE)


def test_the_velocity_is_the_derivative_of_the_path(path):
    data, noise = state(0), state(1)
    for t in TIMES:
        x, velocity = jax.jvp(
            lambda t: path.alpha(t) * data + path.sigma(t) * noise, (jnp.asarray(t),), (jnp.ones(()),)
        )
        # Given both ends the denoiser is the data.
        chex.assert_trees_all_close(path.velocity(jnp.asarray(t), x, data), velocity, rtol=1e-9, atol=TOLERANCE)


def test_time_inverts_snr_including_both_ends(path):
    t = jnp.linspace(0.0, 1.0, 41)
    back = jax.vmap(lambda t: path.time(path.snr(t)))(t)
    chex.assert_trees_all_close(back, t, atol=TOLERANCE)
    assert float(path.time(jnp.asarray(0.0))) == 0.0
    assert float(path.time(jnp.asarray(jnp.inf))) == 1.0
    assert float(path.snr(jnp.asarray(0.0))) == 0.0
    assert np.isinf(float(path.snr(jnp.asarray(1.0))))


def test_time_inverts_snr_in_single_precision():
    path = tj.Linear(jnp.asarray(1.3, jnp.float32))
    t = jnp.linspace(0.0, 1.0, 101, dtype=jnp.float32)
    back = jax.vmap(lambda t: path.time(path.snr(t)))(t)
    assert back.dtype == jnp.float32
    # A handful of roundings of numbers below one: division, square, root, two reciprocals.
    chex.assert_trees_all_close(back, t, atol=8 * np.finfo(np.float32).eps, rtol=0)


@pytest.mark.parametrize("base", [1.0, 1.7])
def test_linear_closed_forms(base):
    path = tj.Linear(base)
    for t in TIMES:
        t = jnp.asarray(t)
        assert np.isclose(path.diffusion(t), 2 * base**2 * (1 - t) / t, rtol=1e-12)
        assert np.isclose(path.tweedie(t), base**2 * (1 - t) ** 2 / t, rtol=1e-12)
        assert np.isclose(path.snr(t), t**2 / (base * (1 - t)) ** 2, rtol=1e-12)


def test_the_memoryless_diffusion_is_its_definition(path):
    def slope(f, t):
        step = 1e-6 * t * (1 - t)
        return (f(t + step) - f(t - step)) / (2 * step)

    for t in map(jnp.asarray, TIMES):
        expected = 2 * path.sigma(t) * (path.sigma(t) * slope(path.alpha, t) / path.alpha(t) - slope(path.sigma, t))
        assert np.isclose(path.diffusion(t), expected, rtol=1e-7)  # central differences: step^2 and eps / step
    assert np.isinf(path.diffusion(jnp.asarray(0.0)))
    assert float(path.diffusion(jnp.asarray(1.0))) == 0.0


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_score_and_tweedie_agree_with_the_density_of_a_mixture(path, t):
    mixture, x, t = contracts.planar(), jnp.asarray([0.3, -0.8]), jnp.asarray(t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    noisy = tj.GaussianMixture(
        mixture.weights, alpha * mixture.means, alpha**2 * mixture.covs + sigma**2 * jnp.eye(2)[None]
    )
    denoise = lambda x: mixture.denoise(alpha, sigma, x)
    chex.assert_trees_all_close(path.score(t, x, denoise(x)), jax.grad(noisy.log_prob)(x), rtol=TOLERANCE, atol=1e-9)
    _, cov = contracts.np_moments(*contracts.np_condition(mixture, float(alpha), float(sigma), np.asarray(x)))
    chex.assert_trees_all_close(path.tweedie(t) * jax.jacobian(denoise)(x), cov, rtol=1e-9, atol=TOLERANCE)


def test_the_velocity_of_a_gaussian_moves_along_its_closed_form_flow(path):
    mean, std = jnp.asarray([0.7]), 0.6
    mixture = contracts.gaussian([0.7], [[std**2]])
    width = lambda t: jnp.sqrt(path.sigma(t) ** 2 + (path.alpha(t) * std) ** 2)
    flow = lambda t, x: path.alpha(t) * mean + width(t) * x
    for t in TIMES:
        x, moving = jax.jvp(lambda t: flow(t, jnp.asarray([1.3])), (jnp.asarray(t),), (jnp.ones(()),))
        denoised = mixture.denoise(path.alpha(t), path.sigma(t), x)
        chex.assert_trees_all_close(path.velocity(jnp.asarray(t), x, denoised), moving, rtol=1e-9, atol=TOLERANCE)


def test_two_views_are_one_view(path):
    """The posterior given two Gaussian views equals the posterior at the one time and state that `observe` names."""
    mixture, rng = contracts.planar(), np.random.default_rng(3)
    views = [(jnp.asarray(t), jnp.asarray(rng.normal(size=2))) for t in (0.3, 0.6)]
    precision = sum(path.snr(t) for t, _ in views)
    natural = sum(path.alpha(t) / path.sigma(t) ** 2 * x for t, x in views)
    # Brute force: two views are the tilt of the prior by their likelihoods.
    expected = contracts.np_tilt(mixture, np.asarray(natural), float(precision) * np.eye(2))
    t, x = path.observe(precision, natural)
    got = mixture.condition(path.alpha(t), path.sigma(t), x)
    chex.assert_trees_all_close((got.weights, got.means, got.covs), expected, atol=TOLERANCE)


def test_one_view_observes_itself(path):
    for t in TIMES:
        t, x = jnp.asarray(t), state(5)
        natural = path.alpha(t) / path.sigma(t) ** 2 * x
        chex.assert_trees_all_close(path.observe(path.snr(t), natural), (t, x), rtol=TOLERANCE)


def test_states_of_any_shape(path):
    t, x = jnp.asarray(0.4), jnp.ones((2, 3, 4))
    for method in (path.noise, path.score, path.velocity):
        assert method(t, x, 2 * x).shape == x.shape


def test_base_scale_is_a_leaf_that_can_be_swept():
    snr = jax.vmap(lambda base: tj.Linear(base).snr(jnp.asarray(0.5)))(jnp.asarray([1.0, 2.0]))
    chex.assert_trees_all_close(snr, jnp.asarray([1.0, 0.25]), rtol=1e-14)
