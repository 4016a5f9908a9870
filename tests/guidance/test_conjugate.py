"""Variational conjugate tilting: exact where it must be, calibrated, and better than the plug-in.
Tiers: exact, statistical.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import theory
import tiltjax as tj
from tiltjax.guidance import Variance, _conjugate
from tiltjax.samplers import _calibrate

MODEL = tj.Analytic(contracts.planar(), tj.Linear(1.3))
KEY, T, X = jax.random.key(0), jnp.asarray(0.4), jnp.asarray([0.3, -0.8])


@pytest.mark.parametrize(
    "reward",
    [
        tj.rewards.Quadratic([0.5, 1.0], 0.7),
        tj.rewards.LinearReward([0.4, -1.0]),
        2 * tj.rewards.Quadratic([0.5, 1.0]) + tj.rewards.LinearReward([1.0, 0.0]),
    ],
)
def test_conjugate_rewards_are_tilted_exactly_at_once(reward):
    guidance = tj.Conjugate(MODEL, reward, 1.5)
    estimate, state = guidance(KEY, T, X, guidance.init(X))
    np.testing.assert_allclose(
        estimate.tilted, tj.Tilted(MODEL, reward, 1.5).denoise(T, X), rtol=1e-12
    )
    assert guidance.variance is None  # nothing to calibrate
    np.testing.assert_array_equal(state.natural, 0)


def test_only_the_terms_without_conjugate_form_are_fitted():
    quadratic, bump = tj.rewards.Quadratic([0.5, 1.0]), tj.rewards.Bump([0.0, 1.0])
    guidance = tj.Conjugate(MODEL, quadratic + bump, 1.5, variance=lambda snr: 1 / (1 + snr))
    assert guidance.remainder is bump
    np.testing.assert_allclose(guidance.precision, 2.0)
    np.testing.assert_allclose(guidance.log_tilt(X), 1.5 * (quadratic(X) + bump(X)), rtol=1e-12)


def test_steins_identity_gives_gradient_and_curvature_of_a_quadratic_in_the_mean():
    """Hidden from the exact route, a quadratic is fitted: with many draws `(a, c)` tends to
    `(2 l h y, 2 l h)`.
    """
    h, y, draws = 0.7, jnp.asarray([0.5, 1.0]), 20_000
    guidance = tj.Conjugate(
        MODEL,
        lambda x: -h * jnp.sum((x - y) ** 2),
        1.5,
        draws=draws,
        variance=lambda snr: 1 / (1 + snr),
    )
    _, fit = guidance(KEY, T, X, guidance.init(X))
    a, c = fit.natural, fit.precision
    # c = 2 l h |eps|^2 / (draws d) over draws / 2 independent vectors of d = 2: its standard error.
    error = 2 * 1.5 * h * np.sqrt(2 / draws)
    assert abs(float(c) - 2 * 1.5 * h) < 5 * error
    assert np.all(np.abs(a - 2 * 1.5 * h * y) < 5 * error * (1 + np.abs(a)))


def test_calibration_measures_the_posterior_variance():
    s2, num = 0.6, 4096
    model = tj.Analytic(contracts.gaussian([0.3, -0.2], s2 * np.eye(2)), tj.Linear(1.4))
    data = model.mixture.sample(jax.random.key(1), num)
    table = tj.calibrate(jax.random.key(2), model, budget=24 * num, data=data)
    snr = jnp.exp(table.log_snr)
    ratio = jnp.exp(table.log_variance) / (s2 / (1 + s2 * snr))
    assert np.all(np.abs(ratio - 1) < 5 * np.sqrt(2 / (2 * num)))
    between = jnp.sqrt(snr[10] * snr[11])
    np.testing.assert_allclose(
        table(between), np.exp((table.log_variance[10] + table.log_variance[11]) / 2), rtol=1e-10
    )
    assert table(snr[0]) == jnp.exp(table.log_variance[0])


def test_a_network_needs_its_variance_a_function_a_number_a_table_or_a_probe():
    network = tj.from_denoiser(
        lambda t, x: MODEL.denoise(t, x), shape=(2,), interpolant=MODEL.interpolant
    )
    bump = tj.rewards.Bump([0.0, 1.0])
    named = r"needs variance=.*function of the snr.*number.*calibrate\(key, model\).*Probe\(\)"
    with pytest.raises(ValueError, match=named):
        tj.Conjugate(network, bump)
    table = tj.calibrate(KEY, network, levels=8, data=MODEL.mixture.sample(KEY, 64))
    for variance in (table, lambda snr: 1 / (1 + snr), 0.5, jnp.asarray(2), tj.guidance.Probe()):
        guidance = tj.Conjugate(network, bump, variance=variance)
        assert np.all(np.isfinite(guidance(KEY, T, X, guidance.init(X))[0].tilted))
    assert tj.Conjugate(network, tj.rewards.Quadratic([0.0, 1.0])).variance is None


def test_the_table_of_a_mixture_is_its_own_posterior_variance():
    table = tj.Conjugate(MODEL, tj.rewards.Bump([0.0, 1.0])).variance
    np.testing.assert_allclose(
        jnp.exp(table.log_snr[jnp.asarray([0, -1])]) * 1.3**2, [1e-7, 1e7], rtol=1e-8
    )
    np.testing.assert_allclose(
        jnp.exp(table.log_variance[24]),
        MODEL.posterior_variance(jnp.exp(table.log_snr[24])),
        rtol=1e-10,
    )


def test_a_table_that_does_not_reach_is_reported():
    short = Variance(jnp.log(jnp.asarray([1.0, 10.0])), jnp.zeros(2))
    with pytest.raises(FloatingPointError, match="step 0"):
        tj.sample(
            KEY,
            MODEL,
            tj.Conjugate(MODEL, tj.rewards.Bump([0.0, 1.0]), 2.0, variance=short),
            num=3,
            steps=4,
        )


@pytest.mark.slow
def test_a_bump_on_far_modes_is_tilted_better_than_by_the_plug_in():
    problem, num = tj.problems.bump(), 4000
    model, truth = tj.Analytic(problem.prior), 0.98472
    share = {}
    for name, guidance in {
        "conjugate": tj.Conjugate(model, problem.reward, problem.scale, iterations=8),
        "plug-in": tj.PlugIn(tj.Glass(model), problem.reward, problem.scale),
    }.items():
        share[name] = float(
            np.mean(np.asarray(tj.sample(KEY, model, guidance, num=num, steps=50).x[:, 0]) >= 0)
        )
    error = np.sqrt(truth * (1 - truth) / num)
    assert abs(share["conjugate"] - truth) + 5 * error < abs(share["plug-in"] - truth)


def test_log_h_is_exact_for_conjugate_rewards_on_a_mixture():
    reward = 0.8 * tj.rewards.Quadratic([0.5, 1.0], 0.7) + tj.rewards.LinearReward([1.0, -0.4])
    guidance = tj.Conjugate(MODEL, reward, 1.5)
    estimate, _ = guidance(KEY, T, X, guidance.init(X))
    exact = theory.log_h(MODEL.mixture, reward, 1.5, MODEL.interpolant)
    np.testing.assert_allclose(estimate.log_h, exact(T, X), rtol=1e-10)
    convex = tj.Conjugate(MODEL, tj.rewards.LinearReward([1.0, 0.0]))
    assert convex(KEY, T, X, convex.init(X))[0].log_h.dtype == jnp.float64


@pytest.mark.slow
@pytest.mark.parametrize("anisotropic", [False, True])
def test_stiff_rewards_do_not_blow_up(anisotropic):
    """Ten times stiffer along one axis than along the other, and hidden from the exact route:
    without the restraint the loop of `a` and z grows to 1e15.
    """
    prior = tj.problems.quadratic().prior
    model, stiff, y = tj.Analytic(prior), jnp.asarray([4.0, 0.2]), jnp.asarray([0.5, 1.5])
    guidance = tj.Conjugate(
        model, lambda x: -jnp.sum(stiff * (x - y) ** 2), anisotropic=anisotropic
    )
    truth = theory.tilt(prior, tj.rewards.Quadratic(y, jnp.diag(stiff)), 1.0)
    num = 500
    x = tj.sample(KEY, model, guidance, num=num, steps=40).x
    floor = tj.metrics.wasserstein(
        truth.sample(jax.random.key(1), num), truth.sample(jax.random.key(2), num)
    )
    assert tj.metrics.wasserstein(x, truth.sample(jax.random.key(3), num)) < 2.5 * floor


@pytest.mark.slow
def test_a_curved_ridge_is_followed():
    """The stiffest direction turns with the state here."""
    prior = tj.problems.quadratic().prior
    model, reward, num = tj.Analytic(prior), lambda x: -((x[1] - 0.5 * jnp.sin(2 * x[0])) ** 2), 500
    truth = theory.quadrature.tilt(prior, reward, 4.0)
    x = tj.sample(KEY, model, tj.Conjugate(model, reward, 4.0), num=num, steps=50).x
    mean = float(np.mean(jax.vmap(reward)(x)))
    assert abs(mean / float(truth.expect(reward)) - 1) < 0.25


def test_draws_along_the_responses_see_the_curvature_between_modes():
    """At an undecided state the posterior is wide between the modes alone: the fitted curvature is
    the reward's along that direction.
    """
    model = tj.Analytic(tj.problems.quadratic().prior)
    curvature, state, t = jnp.asarray([3.0, 0.4]), jnp.zeros(2), jnp.asarray(0.05)
    reward = lambda x: -jnp.sum(curvature * x**2) / 2
    fit = {}
    for anisotropic in (False, True):
        guidance = tj.Conjugate(
            model, reward, draws=2000, anisotropic=anisotropic, variance=lambda snr: 1 / (0.3 + snr)
        )
        _, memory = guidance(KEY, t, state, guidance.init(state))
        fit[anisotropic] = float(memory.precision)
    assert abs(fit[False] - 1.7) < 0.2
    assert abs(fit[True] - 3.0) < 0.1


def test_the_most_concave_direction_is_found():
    """Not the one of largest curvature, which is convex here."""
    curvature = jnp.asarray([-6.0, 1.0, 4.0])
    model = tj.Analytic(contracts.gaussian(np.zeros(3), np.eye(3)))
    guidance = tj.Conjugate(
        model,
        lambda x: -jnp.sum(curvature * x**2) / 2,
        0.1,
        iterations=60,
        variance=lambda snr: 1 / (1 + snr),
    )
    state = jnp.asarray([1.0, 0.5, 0.2])
    _, fit = guidance(KEY, T, state, guidance.init(state))
    np.testing.assert_allclose(jnp.abs(fit.stiff), [0, 0, 1], atol=1e-3)


@pytest.mark.slow
def test_the_table_stays_where_the_network_was_trained():
    path = tj.DiscreteVP(np.cumprod(1 - np.linspace(1e-3, 0.2, 40)))
    model = tj.Analytic(contracts.planar(), path)
    table = tj.calibrate(KEY, model, levels=8)
    np.testing.assert_allclose(
        jnp.exp(table.log_snr[jnp.asarray([0, -1])]), jnp.stack(path.snr_range()), rtol=1e-10
    )
    ahead = tj.Tilted(tj.models.Rescheduled(model), tj.rewards.Quadratic([0.0, 1.0]), 2.0)
    table = tj.calibrate(KEY, ahead, levels=8, data=jnp.zeros((64, 2)))
    np.testing.assert_allclose(jnp.exp(table.log_snr[-1]), path.snr_range()[1] - 4, rtol=1e-10)


@pytest.mark.slow
def test_a_run_that_asks_beyond_the_table_says_so():
    path = tj.DiscreteVP(np.cumprod(1 - np.linspace(0.05, 0.4, 20)))
    model = tj.Analytic(contracts.planar(), path)
    guidance = tj.Conjugate(model, tj.rewards.Bump([0.0, 1.0], 0.3), 10.0)
    levels = model.grid_at(path.clock(jnp.arange(19.0, -1.0, -1.0)))
    with pytest.raises(FloatingPointError, match=r"the model.s denoiser is not finite"):
        tj.sample(KEY, model, guidance, num=20, times=levels)
    # Of eight keys tried, one to seven ask beyond the table where runs go on closer to the data,
    # none where they jump from here.
    x = tj.sample(KEY, model, guidance, num=20, times=levels.at[-16].set(1.0)[:-15]).x
    assert np.all(np.isfinite(x))


def test_calibration_averages_the_posterior_variance_of_a_mixture():
    """`E Var(X_1 | X_t)`, by quadrature over x, of two modes that the noise first hides and then
    tells apart.
    """
    mixture = tj.GaussianMixture([0.3, 0.7], [[-2.0], [1.0]], [[[0.4]], [[0.2]]])
    model, num = tj.Analytic(mixture), 4000
    table = tj.calibrate(
        jax.random.key(2),
        model,
        budget=29 * num,
        levels=29,
        data=mixture.sample(jax.random.key(1), num),
    )
    grid = jnp.linspace(-12, 12, 4001)[:, None]

    @jax.jit
    def moments(snr):
        """First and second moment of `(X_1 - D)^2`, the second as if each posterior were
        Gaussian.
        """
        t = model.interpolant.time(snr)
        law = theory.marginal(mixture, t)
        states = grid * (model.interpolant.alpha(t) + model.interpolant.sigma(t))
        density = jnp.exp(jax.vmap(law.log_prob)(states))
        posterior = jax.vmap(lambda x: model.posterior(t, x).cov()[0, 0])(states)
        return jnp.sum(density * posterior) / jnp.sum(density), jnp.sum(
            density * 3 * posterior**2
        ) / jnp.sum(density)

    for level in range(32, 113, 16):  # snr from 1e-3 on, every fourth level
        exact, square = moments(jnp.exp(table.log_snr[level]))
        measured = jnp.exp(table.log_variance[level])
        assert abs(float(measured - exact)) < 5 * float(jnp.sqrt((square - exact**2) / num))


class Counted(tj.Model):
    """A model that counts the evaluations of its network."""

    calls: list = eqx.field(static=True)
    interpolant: tj.Linear
    shape = (2,)
    dtype = jnp.dtype("float64")

    def denoise(self, t, x):
        jax.debug.callback(lambda x: self.calls.append(x), x)  # once for each state
        return MODEL.denoise(t, x)


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_calibration_evaluates_the_network_as_often_as_its_budget_allows(given):
    model = Counted([], MODEL.interpolant)
    data = MODEL.mixture.sample(KEY, 1000) if given else None
    tj.calibrate(KEY, model, data=data)
    jax.effects_barrier()
    assert 4000 < len(model.calls) <= 4096


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["quadratic", "nine dimensions"])
def test_the_default_calibration_is_as_accurate_as_it_says(problem):
    """The mean over levels of the relative error, root mean square over keys."""
    prior, stated = tj.problems.get("quadratic").prior, 0.05
    if problem == "nine dimensions":
        prior, stated = contracts.random_mixture(4, 9), 0.04
    model = tj.Analytic(prior)
    log_snr = jnp.linspace(-9, 9, 37)
    exact = jax.lax.map(lambda q: model.posterior_variance(jnp.exp(q)), log_snr)
    errors = [
        jax.vmap(tj.calibrate(jax.random.key(seed), model))(jnp.exp(log_snr)) / exact - 1
        for seed in range(8)
    ]
    size = np.sqrt(np.mean(np.square(errors), axis=0))
    assert size.mean() < 1.3 * stated
    assert size.max() < 0.2
    assert size[-1] < 0.005  # all but the noise's own variance


def test_between_levels_the_table_of_a_gaussian_is_exact():
    s2 = 0.6
    log_snr = jnp.linspace(-9.0, 9.0, 5)
    table = _calibrate.refined(log_snr, 1 / (1 / s2 + jnp.exp(log_snr)))
    exact = 1 / (1 / s2 + jnp.exp(table.log_snr))
    np.testing.assert_allclose(jnp.exp(table.log_variance), exact, rtol=1e-10)


def test_balanced_noise_leaves_the_variance_of_the_data_alone():
    """The error of one isotropic Gaussian at snr q is `|x - m - sqrt(q) s^2 noise|^2` but for a
    factor.
    """
    data = 1 + jax.random.normal(KEY, (20, 3))
    noise = _calibrate.balanced(jax.random.normal(jax.random.key(1), data.shape), data)
    centered = data - jnp.mean(data, axis=0, keepdims=True)
    mean_square = jnp.mean((centered - 0.7 * noise) ** 2)
    np.testing.assert_allclose(mean_square, jnp.mean(centered**2) + 0.49, rtol=1e-12)


@pytest.mark.slow
def test_a_probe_measures_the_variance_at_the_state():
    """Of one isotropic Gaussian every probe is exact, and the fit of a stiff reward as with the
    right table.
    """
    s2 = 0.6
    model = tj.Analytic(contracts.gaussian([0.3, -0.2], s2 * np.eye(2)))
    reward, draws = lambda x: -jnp.sum(x**2), 2000
    settings = {"draws": draws, "iterations": 2}
    probed = tj.Conjugate(model, reward, variance=tj.guidance.Probe(), **settings)
    tabled = tj.Conjugate(model, reward, variance=lambda snr: 1 / (1 / s2 + snr), **settings)
    a, _ = probed(KEY, T, X, probed.init(X))
    b, _ = tabled(KEY, T, X, tabled.init(X))
    np.testing.assert_allclose(a.tilted, b.tilted, rtol=1e-8)
    x = tj.sample(
        KEY, model, tj.Conjugate(model, reward, variance=tj.guidance.Probe()), num=2000, steps=30
    ).x
    np.testing.assert_allclose(np.var(x, axis=0), 1 / (1 / s2 + 2), rtol=5 * np.sqrt(2 / 2000))


@pytest.mark.slow
def test_a_number_is_the_variance_of_isotropic_data():
    """Exact for one isotropic Gaussian, in its table and in what is sampled with it."""
    s2, reward = 0.6, lambda x: -jnp.sum(x**2)
    model = tj.Analytic(contracts.gaussian([0.3, -0.2], s2 * np.eye(2)))
    variance = tj.Conjugate(model, reward, variance=s2).variance
    snr = jnp.logspace(-6, 6, 9)
    exact = [model.posterior_variance(q) for q in snr]
    np.testing.assert_allclose(jax.vmap(variance)(snr), exact, rtol=1e-12)
    x = tj.sample(KEY, model, tj.Conjugate(model, reward, variance=s2), num=2000, steps=30).x
    np.testing.assert_allclose(np.var(x, axis=0), 1 / (1 / s2 + 2), rtol=5 * np.sqrt(2 / 2000))


def _steps(variance, c=0.0, slope=0.0):
    """A fit of precision c at the origin of the line, the posterior there, and an expansion."""
    one = jnp.ones(1)
    fit = _conjugate.Fit(0 * one, 0 * one, jnp.asarray(c), jnp.asarray(1.0), one)
    posterior = _conjugate.Gaussian(0 * one, jnp.asarray(variance))
    return fit, posterior, _conjugate.Expansion(slope * one, 0 * one, 0 * one)


def test_a_fit_that_sees_no_curvature_widens_by_two_at_most():
    """It had the precision `1 / v`, of which `c - c'` is lost."""
    fit, posterior, _ = _steps(0.2, c=4.5)
    new = _conjugate.keep_precision(fit._replace(fitted=jnp.zeros(())), fit, posterior)
    width = 1 / np.sqrt(1 / 0.2 + new.precision - 4.5)
    np.testing.assert_allclose(width, 2 * np.sqrt(0.2), rtol=1e-12)
    sharper = fit._replace(fitted=jnp.asarray(9.0))
    assert _conjugate.keep_precision(sharper, fit, posterior).precision == 9


def test_the_damped_loop_ends_in_one_iteration():
    """On the line with `z = v a / (1 + v c)`, gradient `-k (z - y)`: however stiff, the slope at
    the fixed point follows from any other.
    """
    v, k, y = 0.5, 40.0, 1.3
    fit, posterior, _ = _steps(v)
    for start in (-1.0, 7.0):
        z = v * start  # a = slope, as c = 0
        fraction = _conjugate.damping_fraction(fit, v * k)
        expansion = _conjugate.Expansion(-k * (z - y) * jnp.ones(1), jnp.ones(1), jnp.ones(1))
        before = fit._replace(slope=start * jnp.ones(1))
        after = _conjugate.move(before, fraction, posterior._replace(mean=z), expansion)
        np.testing.assert_allclose(after.slope, k * y / (1 + k * v), rtol=1e-12)
    first = fit._replace(spread=jnp.zeros(()))
    assert _conjugate.damping_fraction(first, v * k) == 1


def test_a_trusted_move_ends_two_widths_away():
    v, slope = 0.3, 50.0
    fit, posterior, expansion = _steps(v, slope=slope)
    fraction = _conjugate.trust_fraction(fit, fit, posterior, expansion)
    np.testing.assert_allclose(fraction * slope * v, 2 * np.sqrt(v), rtol=1e-12)


def test_the_draws_expand_a_quadratic_exactly():
    curvature, posterior = jnp.asarray([3.0, 0.4]), _conjugate.Gaussian(X, jnp.asarray(0.7))
    gradient = lambda x: -curvature * (x - 1)
    w = jnp.asarray([[0.3, -0.2], [1.0, 2.0], [-0.1, 0.5]])
    draws, stiff = _conjugate.Draws(w, jnp.sum(w**2) / (3 * 0.7)), jnp.asarray([0.6, 0.8])
    expansion = _conjugate.expand(gradient, posterior, draws, stiff)
    np.testing.assert_allclose(expansion.slope, gradient(X), rtol=1e-12)
    np.testing.assert_allclose(expansion.bent, curvature[None] * w, rtol=1e-12)
    np.testing.assert_allclose(expansion.bent_stiff, curvature * stiff, rtol=1e-12)
    c = _conjugate.curvature(posterior, draws, expansion) / draws.spread
    np.testing.assert_allclose(c, jnp.sum(curvature[None] * w**2) / jnp.sum(w**2), rtol=1e-12)


def test_a_multiple_of_a_sum_is_split_too():
    quadratic, other = (
        tj.rewards.Quadratic([0.5, 1.0]),
        tj.rewards.as_reward(lambda x: -jnp.abs(x[0])),
    )
    one = tj.Conjugate(
        MODEL, 2 * (quadratic + 3 * (quadratic + other)), variance=lambda snr: 1 / (1 + snr)
    )
    assert one.precision == 16
    np.testing.assert_allclose(one.remainder(X), 6 * other(X), rtol=1e-12)


@pytest.mark.slow
def test_a_kink_at_a_large_scale_is_found_and_kept():
    """The draws of a fit that has jumped over the kink see no curvature: forgetting at once, it
    would leave for good.
    """
    prior = tj.GaussianMixture([0.5, 0.5], [[-2.5], [2.5]], [[[0.5]], [[0.5]]])
    model, reward, num = tj.Analytic(prior), lambda x: -jnp.abs(x[0] - 1), 1000
    truth = theory.quadrature.tilt(prior, reward, 20.0)
    x = tj.sample(KEY, model, tj.Conjugate(model, reward, 20.0), num=num, steps=50).x
    spread = float(jnp.sqrt(truth.expect(lambda x: (x[0] - 1) ** 2)))
    assert np.sqrt(np.mean((np.asarray(x) - 1) ** 2)) < 1.5 * spread


@pytest.mark.slow
def test_it_can_be_differentiated_where_the_reward_is_flat():
    reward = lambda x: jnp.clip(x[0], -1.0, 1.0)
    table = lambda snr: 1 / (1 + snr)
    mean = lambda scale: jnp.mean(
        tj.sample(KEY, MODEL, tj.Conjugate(MODEL, reward, scale, variance=table), num=8, steps=6).x
    )
    assert np.isfinite(jax.grad(mean)(1.0))


def test_toward_a_tilted_model_is_that_model():
    reward = tj.rewards.Quadratic([0.5, 1.0])
    tilted = tj.Tilted(MODEL, reward, 1.5)
    guidance = tj.guidance.toward(MODEL, tilted, reward, 1.5)
    a = tj.sample(KEY, MODEL, guidance, num=5, steps=6).x
    np.testing.assert_allclose(a, tj.sample(KEY, tilted, num=5, steps=6).x, rtol=1e-10)
    np.testing.assert_allclose(guidance.log_tilt(X), 1.5 * reward(X), rtol=1e-12)


@pytest.mark.slow
def test_batches_and_single_precision():
    reward = tj.rewards.Bump([0.0, 1.0])
    guidance = tj.Conjugate(MODEL, reward, 2.0, variance=lambda snr: 1 / (1 + snr))
    whole = tj.sample(KEY, MODEL, guidance, num=7, steps=5).x
    np.testing.assert_allclose(
        tj.sample(KEY, MODEL, guidance, num=7, steps=5, chunk_size=3).x, whole, rtol=1e-9, atol=1e-9
    )
    single = tj.Analytic(contracts.planar(jnp.float32))
    x = tj.sample(KEY, single, tj.Conjugate(single, reward, 2.0), num=5, steps=5).x
    assert x.dtype == jnp.float32
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tj.Conjugate(MODEL, tj.rewards.Bump([0.0, 1.0]), draws=3), "must be even, got 3"),
        (
            lambda: tj.Conjugate(MODEL, tj.rewards.Bump([0.0, 1.0]), smoothing=1.0),
            r"smoothing must lie in \[0, 1\), got 1",
        ),
        (
            lambda: tj.Conjugate(MODEL, tj.rewards.Bump([0.0, 1.0]), iterations=0),
            "iterations must be at least 1",
        ),
        (
            lambda: tj.Conjugate(MODEL, -1 * tj.rewards.Quadratic([0.0, 1.0])),
            r"is convex \(c = -2 < 0\)",
        ),
        (
            lambda: tj.Conjugate(MODEL, tj.rewards.Quadratic([2.0])),
            r"states of shape \(1,\), but .* have shape \(2,\)",
        ),
        (
            lambda: tj.Conjugate(MODEL, tj.rewards.Bump([0.0, 1.0]), variance=0.0),
            "variance must be positive, got 0",
        ),
        (lambda: tj.calibrate(KEY, MODEL, levels=1), "levels must be at least 2"),
        (lambda: tj.calibrate(KEY, MODEL, budget=46), "budget must be at least 49, got 46"),
        (
            lambda: tj.calibrate(KEY, MODEL, data=jnp.zeros((4, 2)), chunk_size=-3),
            "chunk_size must be at least 1",
        ),
        (
            lambda: tj.calibrate(KEY, MODEL, data=jnp.zeros((10, 3))),
            r"shape \(2,\), got an array of shape \(10, 3\)",
        ),
        (
            lambda: tj.guidance.toward(
                MODEL, tj.Analytic(contracts.planar()), tj.rewards.LinearReward([1.0, 0.0])
            ),
            "states and the interpolant",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("variance", [True, tj.guidance.Probe, tj.Linear()])
def test_a_variance_is_a_number_a_function_or_a_probe(variance):
    network = tj.from_denoiser(lambda t, x: 0.5 * x, shape=(2,))
    with pytest.raises(TypeError, match=r"calibrate\(key, model\).*Probe\(\).*got"):
        tj.Conjugate(network, lambda x: jnp.sum(x**3), variance=variance)
