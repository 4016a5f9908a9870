"""Interpolants: parametrizations of one model are one model; noisy views add up. Tier: exact
(float64, 1e-10).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

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
def test_parametrizations_round_trip(path, t):
    t, x, denoised = jnp.asarray(t), state(0), state(1)
    noise, velocity = jax.jit(lambda *of: (path.noise(*of), path.velocity(*of)))(t, x, denoised)
    # Dividing by alpha (or by the Wronskian) magnifies rounding by |x| / alpha: relative to that,
    # nothing is lost.
    size = float(1 + jnp.max(jnp.abs(x)) / path.alpha(t) + 1 / path.sigma(t))
    chex.assert_trees_all_close(
        path.denoised_from_noise(t, x, noise), denoised, atol=1e-13 * size, rtol=0
    )
    chex.assert_trees_all_close(
        path.denoised_from_velocity(t, x, velocity), denoised, atol=1e-13 * size, rtol=0
    )
    score = path.score(t, x, denoised)
    chex.assert_trees_all_close(
        path.denoised_from_score(t, x, score), denoised, atol=1e-13 * size, rtol=0
    )
    v = path.alpha(t) * noise - path.sigma(t) * denoised
    chex.assert_trees_all_close(path.denoised_from_v(t, x, v), denoised, atol=1e-13 * size, rtol=0)
    chex.assert_trees_all_close(path.score(t, x, denoised) * path.sigma(t), -noise, rtol=1e-13)
    chex.assert_trees_all_close(path.alpha(t) * denoised + path.sigma(t) * noise, x, atol=TOLERANCE)


def test_a_velocity_network_is_read_right_even_at_the_noise_end(path):
    t, x, denoised = jnp.asarray(0.0), state(0), state(1)
    velocity = path.velocity(t, x, denoised)
    chex.assert_trees_all_close(
        path.denoised_from_velocity(t, x, velocity), denoised, atol=TOLERANCE
    )


def test_the_velocity_is_the_derivative_of_the_path(path):
    data, noise = state(0), state(1)
    for t in TIMES:
        x, velocity = jax.jvp(
            lambda t: path.alpha(t) * data + path.sigma(t) * noise,
            (jnp.asarray(t),),
            (jnp.ones(()),),
        )
        # Given both ends the denoiser is the data.
        chex.assert_trees_all_close(
            path.velocity(jnp.asarray(t), x, data), velocity, rtol=1e-9, atol=TOLERANCE
        )


def test_time_inverts_snr_including_both_ends(path):
    t = jnp.linspace(0.0, 1.0, 41)
    back = jax.jit(jax.vmap(lambda t: path.time(path.snr(t))))(t)
    chex.assert_trees_all_close(back, t, atol=TOLERANCE)
    assert float(path.time(jnp.asarray(jnp.inf))) == 1.0
    assert np.isinf(float(path.snr(jnp.asarray(1.0))))
    lowest, highest = path.snr_range()
    assert float(path.snr(jnp.asarray(0.0))) == pytest.approx(float(lowest), rel=1e-12)
    assert float(lowest) < float(highest)
    # Pure noise is the start of a path, or infinitely long before it.
    assert float(path.time(jnp.asarray(0.0))) == (0.0 if lowest == 0 else -np.inf)


SINGLE = {
    "linear": tj.Linear(1.3),
    "vp": tj.VP(),
    "vp, one rate": tj.VP(3.0, 3.0),
    "ddpm": tj.DiscreteVP(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
    "stable diffusion": tj.DiscreteVP(
        np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    ),
    "two levels": tj.DiscreteVP([0.9, 0.1]),
    "ve": tj.VE(),
    "ve, AlphaFold": tj.VE(4e-4 * 16, 160 * 16, sigma_data=16),
}
LATEST = 0.99  # of VE, whose sigma is 1e-14 sigma_max there; the slope of its snr overflows later


def single_times(name, t):
    """The times in single precision at which the snr of the interpolant is finite, and 1."""
    t = t.astype(jnp.float32)
    return t[(t < LATEST) | (t == 1)] if name.startswith("ve") else t


@pytest.mark.parametrize("name", SINGLE)
def test_time_inverts_snr_in_single_precision(name):
    path = tj._pytree.cast(SINGLE[name], jnp.float32)
    t = jnp.concatenate([jnp.linspace(0.0, 1.0, 1001), 1 - jnp.logspace(-7, -1, 100)])
    t = single_times(name, t)
    back = jax.jit(jax.vmap(lambda t: path.time(path.snr(t))))(t)
    assert back.dtype == jnp.float32
    # A handful of roundings of numbers below one: division, square, root, two reciprocals.
    chex.assert_trees_all_close(back, t, atol=8 * np.finfo(np.float32).eps, rtol=0)
    if (
        name != "linear"
    ):  # whose snr knows alpha no better than t; a variance-preserving one knows 1 - t relatively
        chex.assert_trees_all_close(1 - back, 1 - t, rtol=16 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("name", SINGLE)
def test_nothing_is_nan_between_the_ends_in_single_precision(name):
    path = tj._pytree.cast(SINGLE[name], jnp.float32)
    t = jnp.concatenate([jnp.linspace(0.01, 0.999, 100), 1 - jnp.logspace(-7, -1, 50)])
    t = jnp.append(t.astype(jnp.float32), jnp.float32(1) - jnp.finfo(jnp.float32).epsneg)
    t = single_times(name, t)
    x = jnp.ones((), jnp.float32)

    def everything(t):
        snr, slope = jax.value_and_grad(path.snr)(t)
        return (
            path.velocity(t, x, 0.5 * x),
            path.diffusion(t),
            path.tweedie(t),
            snr,
            slope * jax.grad(path.time)(snr),
        )

    velocity, diffusion, tweedie, snr, one = jax.jit(jax.vmap(everything))(t)
    assert np.all(np.isfinite(velocity))
    assert np.all(np.stack([diffusion, tweedie, snr]) > 0)
    assert np.all(np.isfinite(snr))
    chex.assert_trees_all_close(
        one, jnp.ones_like(one), rtol=1e-4
    )  # dt/dsnr dsnr/dt, each of some 1e-6


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
        expected = (
            2
            * path.sigma(t)
            * (path.sigma(t) * slope(path.alpha, t) / path.alpha(t) - slope(path.sigma, t))
        )
        assert np.isclose(
            path.diffusion(t), expected, rtol=1e-7
        )  # central differences: step^2 and eps / step
    start, end = (float(path.diffusion(jnp.asarray(t))) for t in (0.0, 1.0))
    if path.alpha(jnp.asarray(0.0)) == 0:
        assert (start, end) == (np.inf, 0.0)
    else:
        assert 0 <= end < start < np.inf


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_score_and_tweedie_agree_with_the_density_of_a_mixture(path, t):
    mixture, x, t = contracts.planar(), jnp.asarray([0.3, -0.8]), jnp.asarray(t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    noisy = tj.GaussianMixture(
        mixture.weights,
        alpha * mixture.means,
        alpha**2 * mixture.covs + sigma**2 * jnp.eye(2)[None],
    )
    denoise = lambda x: mixture.denoise(alpha, sigma, x)
    chex.assert_trees_all_close(
        path.score(t, x, denoise(x)),
        jax.grad(noisy.log_prob)(x),
        rtol=TOLERANCE,
        atol=1e-9 + 1e-15 / float(sigma) ** 2,  # the rounding of x - D
    )
    _, cov = contracts.np_moments(
        *contracts.np_condition(mixture, float(alpha), float(sigma), np.asarray(x))
    )
    chex.assert_trees_all_close(
        path.tweedie(t) * jax.jacobian(denoise)(x), cov, rtol=1e-9, atol=TOLERANCE
    )


def test_the_velocity_of_a_gaussian_moves_along_its_closed_form_flow(path):
    mean, std = jnp.asarray([0.7]), 0.6
    mixture = contracts.gaussian([0.7], [[std**2]])
    width = lambda t: jnp.sqrt(path.sigma(t) ** 2 + (path.alpha(t) * std) ** 2)
    flow = lambda t, x: path.alpha(t) * mean + width(t) * x
    for t in TIMES:
        x, moving = jax.jvp(
            lambda t: flow(t, jnp.asarray([1.3])), (jnp.asarray(t),), (jnp.ones(()),)
        )
        denoised = mixture.denoise(path.alpha(t), path.sigma(t), x)
        chex.assert_trees_all_close(
            path.velocity(jnp.asarray(t), x, denoised), moving, rtol=1e-9, atol=TOLERANCE
        )


def test_two_views_are_one_view(path):
    """The posterior given two Gaussian views equals the posterior at the one time and state that
    `observe` names.
    """
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


# Variance-preserving paths.


@pytest.mark.parametrize("rates", [(0.1, 20.0), (0.5, 3.0), (2.0, 2.0)])
def test_vp_closed_forms(rates):
    path, (low, high) = tj.VP(*rates), rates
    for t in (0.0, *TIMES, -0.3):
        s = 1 - t
        b = low * s + (high - low) * s**2 / 2
        t = jnp.asarray(t)
        assert np.isclose(path.alpha(t), np.exp(-b / 2), rtol=1e-14)
        assert np.isclose(path.sigma(t) ** 2, -np.expm1(-b), rtol=1e-14)
        assert np.isclose(path.snr(t), 1 / np.expm1(b), rtol=1e-12)
        assert np.isclose(path.diffusion(t), low + (high - low) * s, rtol=1e-12)
    assert path.diffusion(jnp.asarray(1.0)) == low  # although sigma' is infinite there


BETAS = np.linspace(1e-4, 0.02, 1000)


def test_a_table_is_met_at_its_levels_and_smooth_between_them():
    table = np.cumprod(1 - BETAS)
    path, levels = tj.DiscreteVP(table), jnp.arange(1000.0)
    t = path.clock(levels)
    assert (float(t[0]), float(t[-1])) == (1 - 1e-3, 0.0)
    chex.assert_trees_all_close(path.index(t), levels, atol=1e-9)
    alpha, sigma, snr = jax.jit(jax.vmap(lambda t: (path.alpha(t), path.sigma(t), path.snr(t))))(t)
    chex.assert_trees_all_close(alpha**2, table, rtol=1e-13)
    chex.assert_trees_all_close(sigma**2, 1 - table, rtol=1e-11)
    low, high = path.snr_range()
    chex.assert_trees_all_close((high, low), (snr[0], snr[-1]), rtol=1e-10)
    # Its noise rate is positive everywhere and the same from both sides of a level; a level's share
    # of it is nearly that of training.
    rate = jax.jit(jax.vmap(path.diffusion))
    chex.assert_trees_all_close(rate(t - 1e-10), rate(t + 1e-10), rtol=1e-6)
    assert np.all(rate(jnp.linspace(-0.5, 1.0, 20_000)) > 0)
    chex.assert_trees_all_close(rate(path.clock(levels[5:] - 0.5)), 1000 * BETAS[5:], rtol=0.02)


def test_beyond_a_table_the_noise_rate_is_constant_and_the_snr_goes_on_falling():
    path = tj.DiscreteVP([0.9, 0.5, 0.1])
    rate = jax.jit(jax.vmap(path.diffusion))(path.clock(jnp.asarray([0.0, -0.5, -1.0])))
    chex.assert_trees_all_close(rate, jnp.full(3, -3 * np.log(0.9)))
    t = jnp.linspace(-3.0, 0.0, 100)
    snr, back = jax.jit(jax.vmap(lambda t: (path.snr(t), path.time(path.snr(t)))))(t)
    assert np.all(np.diff(snr) > 0)
    chex.assert_trees_all_close(back, t, atol=1e-9)


def test_a_table_of_a_path_is_that_path_to_third_order():
    path, t = tj.VP(), jnp.linspace(0.02, 0.9, 500)

    def error(n):
        table = tj.DiscreteVP(jax.jit(jax.vmap(path.alpha))(1 - (np.arange(n) + 1) / n) ** 2)
        return np.abs(
            np.log(jax.jit(jax.vmap(table.snr))(t) / jax.jit(jax.vmap(path.snr))(t))
        ).max()

    assert abs(contracts.slope([error(n) for n in (100, 200, 400)]) - 3) < 0.3


# Variance-exploding paths.


def published_levels(low, high, rho, n):
    """Karras et al. (2022), eq. 5."""
    i = np.arange(n)
    return (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


@pytest.mark.parametrize("given", [(0.002, 80.0, 7.0), (4e-4 * 16, 160 * 16, 7.0), (0.1, 5.0, 3.0)])
def test_equal_steps_of_ve_are_the_published_noise_levels(given):
    path = tj.VE(*given)
    end = 1 - (given[0] / given[1]) ** (1 / given[2])
    times = path.default_times(18)
    assert (float(times[0]), float(times[-1])) == (0.0, 1.0)
    np.testing.assert_allclose(times[:-1], np.linspace(0, end, 18), rtol=1e-14)
    np.testing.assert_allclose(path.sigma(times[:-1]), published_levels(*given, 18), rtol=1e-12)
    low, high = path.snr_range()
    np.testing.assert_allclose((low, high), (given[1] ** -2, given[0] ** -2), rtol=1e-14)
    np.testing.assert_allclose(path.snr(jnp.asarray(end)), high, rtol=1e-12)
    np.testing.assert_allclose(path.time(jnp.stack([low, high])), [0, end], atol=1e-14)


def test_ve_closed_forms():
    path = tj.VE(0.002, 80.0, 3.0)
    for t in map(jnp.asarray, TIMES):
        sigma = 80 * (1 - t) ** 3
        assert (float(path.alpha(t)), float(path.sigma(jnp.asarray(1.0)))) == (1.0, 0.0)
        assert np.isclose(path.diffusion(t), 2 * sigma * 240 * (1 - t) ** 2, rtol=1e-12)
        assert np.isclose(path.tweedie(t), sigma**2, rtol=1e-12)


def test_the_width_that_defaults_assume_for_data_is_that_of_the_noise_except_for_ve():
    for name, path in PATHS.items():
        expected = 0.5 if name == "ve" else float(path.sigma(jnp.asarray(0.0)))
        assert float(path.data_scale()) == expected
    assert tj._pytree.cast(tj.VP(), jnp.float32).data_scale().dtype == jnp.float32
    assert tj._pytree.cast(PATHS["discrete vp"], jnp.float32).data_scale().dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tj.VP(2.0, 1.0), r"beta_max.*must not be below beta_min.*got 1 < 2"),
        (lambda: tj.VP(0.0), "beta_min must be positive"),
        (lambda: tj.DiscreteVP([0.5]), r"N >= 2 levels.*got shape \(1,\)"),
        (
            lambda: tj.DiscreteVP([0.1, 0.9]),
            r"decrease strictly.*got \[0\.1, \.\.\., 0\.9\]: reverse",
        ),
        (lambda: tj.DiscreteVP([0.9, 0.5, 0.0]), "leave out a last level that is 0"),
        (lambda: tj.DiscreteVP([0.9, np.nan, 0.1]), "decrease strictly"),
        (lambda: tj.VE(2.0, 1.0), "sigma_min.*must be below sigma_max.*got 2 >= 1"),
        (lambda: tj.VE(0.0), "sigma_min must be positive"),
        (lambda: tj.VE(rho=0.5), r"rho must lie in \[1, inf\), got 0\.5"),
        (lambda: tj.VE(sigma_data=-1.0), "sigma_data must not be negative"),
    ],
)
def test_schedules_that_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()
