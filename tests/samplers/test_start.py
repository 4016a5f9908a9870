"""The start of a run: data of any mean and width, and tilts far away, with default settings.

Tiers: statistical (5 standard errors of 20,000 samples; the slack is the error of 100 steps,
measured with 400).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import theory
import tiltjax as tj

KEY = jax.random.key(3)
NUM = 20_000


def model(mean, std, dtype=jnp.float64):
    return tj.Analytic(contracts.gaussian([mean], [[std**2]], dtype))


def assert_gaussian(x, mean, std):
    """Mean and standard deviation in units of the standard deviation."""
    z = (np.asarray(x, np.float64) - mean) / std
    assert abs(z.mean()) < 5 / np.sqrt(NUM) + 1e-3, z.mean()
    assert abs(z.std() - 1) < 5 / np.sqrt(2 * NUM) + 5e-3, z.std()


@pytest.mark.parametrize(
    ("mean", "std"),
    [(127, 60), (50, 1), (-3e4, 1), (0, 1e3), (1e6, 1e3), (0, 1e6), (2, 1e-3), (1, 1e-6)],
)
def test_data_of_any_mean_and_width_is_sampled(mean, std):
    assert_gaussian(tj.sample(KEY, model(mean, std), num=NUM).x, mean, std)


@pytest.mark.parametrize(
    ("interpolant", "std", "steps"),
    [
        (tj.VP(), 1e-2, 100),
        (tj.VP(), 1e-3, 200),
        (tj.VP(), 1e-5, 1000),
        (contracts.Trigonometric(), 1e-2, 100),
        (contracts.Trigonometric(), 1e-5, 100),
    ],
)
def test_narrow_data_is_sampled_on_an_interpolant_whose_flow_bends(interpolant, std, steps):
    """On VP, `sigma_t` falls by orders of magnitude in a last step of a grid with equal steps, and
    the mean was off by 1.7 standard deviations."""
    model = tj.Analytic(contracts.gaussian([3.0], [[std**2]]), interpolant)
    x = (np.asarray(tj.sample(KEY, model, num=2000, steps=steps).x) - 3.0) / std
    assert abs(x.mean()) < 5 / np.sqrt(2000) + 0.02
    assert x.std() == pytest.approx(1, abs=5 / np.sqrt(4000) + 0.02)


def test_two_narrow_modes_keep_their_masses_where_the_flow_bends():
    std = 1e-3
    mixture = tj.GaussianMixture([0.3, 0.7], [[3 - 3 * std], [3 + 3 * std]], [[[std**2]]] * 2)
    x = np.asarray(tj.sample(KEY, tj.Analytic(mixture, tj.VP()), num=2000, steps=200).x) - 3
    left = x[:, 0] < -np.log(0.7 / 0.3) * std / 6  # the modes are equally dense there
    assert np.mean(left) == pytest.approx(0.3, abs=5 * np.sqrt(0.3 * 0.7 / 2000) + 0.01)
    for mode, mean in ((x[left], -3 * std), (x[~left], 3 * std)):
        z = (mode - mean) / std
        assert abs(z.mean()) < 5 / np.sqrt(len(z)) + 0.02
        assert z.std() == pytest.approx(1, abs=5 / np.sqrt(2 * len(z)) + 0.02)


TABLE = tj.DiscreteVP(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


@pytest.mark.parametrize(
    ("interpolant", "std", "solver", "spread"),
    [
        (tj.VP(), 1e-5, tj.Heun(), 0.8),
        (tj.VP(), 1e-3, tj.Euler(), 1.2),
        (TABLE, 1e-3, tj.Ancestral(), 0.023),
    ],
)
def test_a_grid_too_coarse_for_narrow_data_is_refused(interpolant, std, solver, spread):
    model = tj.Analytic(contracts.gaussian([3.0], [[std**2]]), interpolant)
    with pytest.raises(ValueError, match=f"would be {spread} times as wide .* multiply the data"):
        tj.sample(KEY, model, num=2, solver=solver)
    # The times themselves are the caller's choice, and show that the number is right.
    x = np.asarray(tj.sample(KEY, model, num=2000, solver=solver, times=model.grid(100)).x)
    assert x.std() / std == pytest.approx(spread, rel=5 / np.sqrt(4000) + 0.03)


@pytest.mark.parametrize("std", [1e-3, 1e3])
def test_data_of_any_width_has_a_grid_of_one_step(std):
    times = model(0, std).grid(1)
    assert times.shape == (2,)
    assert 0 < times[0] <= 1e-3
    assert times[1] == 1


def test_single_precision_samples_wide_data_and_refuses_what_its_times_cannot_resolve():
    single = jnp.float32
    for mean, std in ((127, 60), (0, 1e6)):
        assert_gaussian(tj.sample(KEY, model(mean, std, single), num=NUM).x, mean, std)
    with pytest.raises(ValueError, match="no grid in float32: multiply the data"):
        tj.sample(KEY, model(0, 1e-7, single), num=2)


TARGET, SCALE = 100.0, 3.0
FAR = tj.rewards.Quadratic([TARGET])
# The tilt of N(0, 1) by scale * r: precision 1 + 2 * scale.
PRECISION = 1 + 2 * SCALE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tilted", "laplace", "doob"])
def test_a_tilt_a_hundred_deviations_away_is_sampled(method):
    prior = model(0, 1)
    guidance = {
        "tilted": lambda: None,
        "laplace": lambda: tj.Laplace(prior, FAR, SCALE),
        "doob": lambda: tj.Doob(prior, theory.log_h(prior.mixture, FAR, SCALE)),
    }[method]()
    sampled = tj.Tilted(prior, FAR, SCALE) if method == "tilted" else prior
    x = tj.sample(KEY, sampled, guidance, num=NUM).x
    assert_gaussian(x, 2 * SCALE * TARGET / PRECISION, PRECISION**-0.5)


@pytest.mark.slow
def test_weighted_runs_start_at_the_mean_of_the_data():
    """The estimate of the normalizing constant is that of the base chain, which starts there."""
    prior, reward = model(50, 1), tj.rewards.Quadratic([51.0])
    laplace = tj.Laplace(prior, reward, 0.5)
    norms = jax.vmap(
        lambda key: tj.smc(key, prior, laplace, num=200, steps=20, ess_threshold=0).log_norm
    )(jax.random.split(KEY, 100))
    field = theory.doob_field(prior.mixture, reward, 0.5)
    truth = theory.path_law(field, times=prior.grid(20)).log_norm
    ratio = np.exp(np.asarray(norms) - float(truth))
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / np.sqrt(len(ratio))
    assert ratio.std() < 0.1
    assert abs(float(truth) - float(theory.tilt(prior.mixture, reward, 0.5).log_norm)) < 0.05


@pytest.mark.parametrize(("mean", "width"), [(0, 1e3), (127, 60)])
def test_a_network_on_data_that_is_too_wide_is_refused(mean, width):
    wide = model(mean, width)
    network = tj.from_denoiser(lambda t, x: wide.denoise(t, x), shape=(1,))
    with pytest.raises(FloatingPointError, match="divide the data by its standard deviation"):
        tj.sample(KEY, network, num=100)
    laplace = tj.Laplace(network, tj.rewards.Quadratic([0.0]), 0.1)
    with pytest.raises(FloatingPointError, match="divide the data by its standard deviation"):
        tj.smc(KEY, network, laplace, num=100)


def test_times_that_start_earlier_sample_wide_data_of_a_network():
    wide = model(127, 60)
    network = tj.from_denoiser(lambda t, x: wide.denoise(t, x), shape=(1,))
    x = tj.sample(KEY, network, num=NUM, times=wide.grid(100)).x
    assert_gaussian(x, 127, 60)


@pytest.mark.parametrize("guide", [tj.dps, tj.Conjugate])
def test_a_guided_run_of_a_network_on_data_that_is_too_wide_is_refused(guide):
    wide = model(0, 1e3)
    network = tj.from_denoiser(lambda t, x: wide.denoise(t, x), shape=(1,))
    given = {"variance": 1e6} if guide is tj.Conjugate else {}
    bump = tj.rewards.Bump([1e3], 1e3)
    guidance = guide(network, bump, 1.0, **given)
    with pytest.raises(FloatingPointError, match=r"step 0 .* the data is too wide"):
        tj.sample(KEY, network, guidance, num=100, steps=2)


def test_the_density_of_a_network_on_data_that_is_too_wide_is_refused():
    wide = model(0, 1e3)
    network = tj.from_denoiser(lambda t, x: wide.denoise(t, x), shape=(1,))
    with pytest.raises(FloatingPointError, match="at the start: the data is too wide"):
        tj.sample_with_log_prob(KEY, network, num=100, steps=2)


NARROWING = tj.rewards.Quadratic([0.0], weight=[0.5e-6])  # for data of width 1,000


def test_gibbs_refuses_a_network_on_data_that_is_too_wide():
    wide = model(0, 1e3)
    network = tj.from_denoiser(lambda t, x: wide.denoise(t, x), shape=(1,))
    with pytest.raises(FloatingPointError, match="times as wide as the noise, too wide for 10"):
        tj.gibbs(KEY, network, NARROWING, 1.0, num=256, steps=10)


@pytest.mark.slow
def test_gibbs_knows_the_width_of_a_mixture():
    x = np.asarray(tj.gibbs(KEY, model(0, 1e3), NARROWING, 1.0, num=2000).x) / np.sqrt(0.5e6)
    assert abs(x.std() - 1) < 5 / np.sqrt(2 * 2000) + 0.02


@pytest.mark.parametrize("std", [1e-3, 1e3])
def test_the_inner_flow_of_a_posterior_has_the_width_of_the_data(std):
    """The flow map of a Gaussian stretches states to the data; a draw has the posterior's width."""
    known, t = model(0, std), jnp.asarray(1 / (1 + std))  # where the noise is as wide as the data
    x = jnp.full(1, t * std * np.sqrt(2))
    assert tj.FlowMap(known).draw(KEY, t, x)[0] / std == pytest.approx(1, abs=0.05)
    draws = tj.Glass(known, 50, order=2).draws(KEY, t, x, 4000)
    width = known.posterior(t, x).covs[0, 0, 0] ** 0.5
    assert draws.std() / width == pytest.approx(1, abs=0.07)


@pytest.mark.parametrize("std", [1e-3, 1e3])
def test_the_variance_table_of_a_mixture_covers_the_grid_of_its_width(std):
    known, levels = model(0, std), tj.calibrate(KEY, model(0, std), data=std * np.ones((9, 1)))
    snr = jax.vmap(known.interpolant.snr)(known.grid(100)[:-1])
    assert np.all(np.isfinite(jax.vmap(levels)(snr)))
    table = tj.Conjugate(known, tj.rewards.Bump([0.0], std), 1.0).variance
    np.testing.assert_allclose(jax.vmap(table)(snr), std**2 / (1 + snr * std**2), rtol=0.05)


def test_given_times_that_start_in_the_data_are_refused_with_the_latest_start():
    with pytest.raises(ValueError, match=r"start at t = 0\.00014 or earlier"):
        tj.sample(KEY, model(0, 1e4), num=2, times=jnp.linspace(1e-3, 1, 11))


def test_an_interpolant_that_never_reaches_noise_is_refused_with_the_remedy():
    levels = tj.DiscreteVP(np.cumprod(1 - np.full(100, 0.01)))
    data = tj.Analytic(contracts.gaussian([0.0], [[1.0]]), levels)
    with pytest.raises(ValueError, match=r"even at t = 0 .* Use Rescheduled\(model, Linear\(\)\)"):
        tj.sample(KEY, data, num=2, times=jnp.linspace(0, 1, 11))


@pytest.mark.slow
def test_guidances_that_are_no_mean_start_unguided():
    """Their score would move the start: that of `Normalized` by its whole length."""
    prior, reward = model(0, 1), tj.rewards.Quadratic([3.0])
    for guidance in (
        tj.fmrg(prior, reward, 1.0),
        tj.guidance.Normalized(tj.dps(prior, reward, 1.0), 1.0),
        tj.guidance.Averaged(
            tj.guidance.Normalized(tj.PlugIn(tj.Exact(prior), reward, 1.0), 1.0), 2
        ),
    ):
        run = lambda guidance: tj.sample(KEY, prior, guidance, num=5, steps=4, save_trajectory=True)
        first = [run(guidance).trace.trajectory[0] for guidance in (guidance, None)]
        np.testing.assert_allclose(*first, rtol=1e-12)
