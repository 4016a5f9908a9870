"""Models that ask another at another time and state: tilts and other paths against NumPy, and where
the network is asked.

Tiers: exact (float64, 1e-10), order (slope within 0.2), statistical (5 standard errors).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj
from tiltjax import rewards

TOLERANCE = 1e-10
KEY, T, X = jax.random.key(0), jnp.asarray(0.4), jnp.asarray([0.3, -0.8])
PATHS = contracts.paths()
MIXTURE = contracts.planar()


def assert_close(a, b, tolerance=TOLERANCE):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


# Conjugate tilts.

QUADRATIC = rewards.Quadratic([0.5, 1.0], 0.7)
LINEAR = rewards.LinearReward([1.0, -0.5])
CONJUGATE = {
    "quadratic": (QUADRATIC, 3.0),
    "linear": (LINEAR, 2.0),
    "sum": (QUADRATIC + LINEAR, 1.5),
    "scaled": (2 * QUADRATIC - 0.5 * LINEAR, 1.0),
    "no tilt": (QUADRATIC, 0.0),
    "convex": (rewards.Quadratic([0.5, 1.0], -0.1), 1.0),
}


def tilted_by_numpy(reward, scale, mixture=MIXTURE):
    """The exactly tilted mixture; the reward's linear and quadratic parts are read off its
    derivatives.
    """
    natural = scale * np.asarray(jax.grad(reward)(jnp.zeros(2)))
    precision = -scale * np.asarray(jax.hessian(reward)(jnp.zeros(2)))
    return tj.GaussianMixture(*contracts.np_tilt(mixture, natural, precision))


@pytest.mark.parametrize(
    "path",
    [tj.Linear(1.7), contracts.Trigonometric(), tj.VP()],
    ids=("linear", "trigonometric", "vp"),
)
@pytest.mark.parametrize("name", CONJUGATE)
def test_a_tilted_model_is_the_model_of_the_tilted_mixture(name, path):
    reward, scale = CONJUGATE[name]
    tilted = tj.Tilted(tj.Analytic(MIXTURE, path), reward, scale)
    truth = tj.Analytic(tilted_by_numpy(reward, scale), path)
    times = jnp.asarray([0.8, 0.9, 0.999]) if name == "convex" else jnp.asarray([1e-3, 0.5, 0.999])
    denoise = lambda model: jax.vmap(lambda t: model.denoise(t, X))(times)
    # At t = 1e-3 a linear reward asks the network at |x*| of order |a| / t: that much of the
    # precision is gone.
    assert_close(*jax.jit(lambda: (denoise(tilted), denoise(truth)))(), tolerance=1e-9)


def test_tilts_of_tilts_add_up():
    model = tj.Analytic(MIXTURE, tj.Linear(1.3))
    nested = tj.Tilted(tj.Tilted(model, QUADRATIC, 2.0), LINEAR, 0.5)
    assert_close(nested.denoise(T, X), tj.Tilted(model, 2 * QUADRATIC + 0.5 * LINEAR).denoise(T, X))


def test_a_tilted_network_and_states_of_any_shape():
    model = tj.from_denoiser(lambda t, x: 0.5 * x, shape=(2, 3))
    tilted = tj.Tilted(model, rewards.Quadratic(jnp.ones((2, 3))))
    assert tilted.denoise(T, jnp.ones((2, 3))).shape == (2, 3)
    assert tilted.shape == (2, 3)


def test_sampling_a_tilted_model_samples_the_tilt():
    """Statistical: at 5 standard errors, plus the change of the same draws from 20 to 40 steps as
    discretization.
    """
    tilted, truth = tj.Tilted(tj.Analytic(MIXTURE), QUADRATIC, 3.0), tilted_by_numpy(QUADRATIC, 3.0)
    coarse, fine = (
        np.asarray(tj.sample(jax.random.key(0), tilted, num=4000, steps=n).x) for n in (20, 40)
    )
    mean, cov = contracts.np_moments(*contracts.np_fields(truth))
    slack = max(
        np.abs(coarse.mean(0) - fine.mean(0)).max(), np.abs(np.cov(coarse.T) - np.cov(fine.T)).max()
    )
    assert slack < 0.02
    contracts.assert_moments(fine, mean, cov, slack)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=("plain", "jit"))
def test_a_convex_tilt_refuses_to_start(transform):
    tilted = tj.Tilted(tj.Analytic(MIXTURE), *CONJUGATE["convex"])
    with pytest.raises(ValueError, match=r"convex.*cannot start sampling"):
        transform(lambda key: tj.sample(key, tilted, num=2, steps=2).x)(jax.random.key(0))


# Other paths.


@pytest.mark.parametrize(
    ("old", "new"),
    [(old, "linear, base 1.7") for old in PATHS] + [("linear", "vp"), ("vp", "discrete vp")],
)
def test_a_rescheduled_model_is_the_model_on_the_other_path(old, new):
    rescheduled = tj.models.Rescheduled(tj.Analytic(MIXTURE, PATHS[old]), PATHS[new])
    truth, times = tj.Analytic(MIXTURE, PATHS[new]), jnp.asarray([0.02, 0.5, 0.97])
    denoise = lambda model: jax.vmap(lambda t: model.denoise(t, X))(times)
    assert_close(*jax.jit(lambda: (denoise(rescheduled), denoise(truth)))())
    assert (rescheduled.shape, rescheduled.dtype) == (truth.shape, truth.dtype)
    assert_close(rescheduled.initial(KEY, T), truth.initial(KEY, T))


def test_tilts_and_guidances_of_a_rescheduled_model():
    rescheduled, truth = tj.models.Rescheduled(tj.Analytic(MIXTURE, tj.VP())), tj.Analytic(MIXTURE)
    times = jnp.asarray([1e-3, 0.5, 0.99])
    tilted = tj.Tilted(rescheduled, QUADRATIC, 3.0)
    expected = tj.Analytic(tilted_by_numpy(QUADRATIC, 3.0))
    denoise = lambda model: jax.vmap(lambda t: model.denoise(t, X))(times)
    assert_close(*jax.jit(lambda: (denoise(tilted), denoise(expected)))(), 1e-9)
    # The other way round the clock is the same, and so is the model.
    outer = tj.models.Rescheduled(tj.Tilted(tj.Analytic(MIXTURE, tj.VP()), QUADRATIC, 3.0))
    assert_close(*jax.jit(lambda: (denoise(tilted), denoise(outer)))(), 1e-9)
    estimate = lambda model: tj.PlugIn(tj.Glass(model, 3), QUADRATIC, 2.0, k=2)(KEY, T, X, ())[0]
    assert_close(*jax.jit(lambda: (estimate(rescheduled), estimate(truth)))(), 1e-9)


# Sampling with a variance-preserving path. One coordinate, N(MEAN, STD^2), and a path with as much
# data in its noise as a start allows.

MEAN, STD = 2.0, 1.0
VISIBLE = tj.VP(0.1, 7.75)


def line(path):
    return tj.Analytic(contracts.gaussian([MEAN], [[STD**2]]), path)


def test_the_flow_of_a_gaussian_on_vp_is_its_closed_form_to_second_order():
    path = tj.VP()
    width = lambda t: float(
        jnp.sqrt(path.sigma(jnp.asarray(t)) ** 2 + (path.alpha(jnp.asarray(t)) * STD) ** 2)
    )
    alpha = lambda t: float(path.alpha(jnp.asarray(t)))
    start = jnp.asarray([[1.3]])
    truth = alpha(0.9) * MEAN + width(0.9) / width(0.0) * (1.3 - alpha(0.0) * MEAN)
    run = lambda n: (
        tj.sample(KEY, line(path), num=1, times=jnp.linspace(0, 0.9, n + 1), start=start).x
    )
    assert abs(contracts.slope([abs(float(run(n)[0, 0]) - truth) for n in (40, 80)]) - 2) < 0.2


def test_a_tilt_on_vp_starts_at_its_mean():
    """Statistical; discretized in 400 steps, a tenth of a standard error."""
    reward, scale, num = rewards.Quadratic([1.5]), 1.0, 10_000
    alpha, sigma = (float(part(jnp.asarray(0.0))) for part in (VISIBLE.alpha, VISIBLE.sigma))
    (_,), ((mean,),), (((variance,),),) = contracts.np_tilt(
        line(VISIBLE).mixture, scale * 2 * np.array([1.5]), 2 * np.eye(1)
    )
    std = np.sqrt(variance)
    kept = alpha * std / np.sqrt((alpha * std) ** 2 + sigma**2)
    assert abs(kept * mean) > 20 * std / np.sqrt(num)  # a start from N(0, sigma^2) can be seen
    direct = tj.sample(
        KEY, tj.Tilted(line(VISIBLE), reward, scale), num=num, times=jnp.linspace(0, 1, 401)
    ).x
    contracts.assert_mean(direct, mean - kept**3 * mean)
    tilted = tj.Tilted(tj.models.Rescheduled(line(VISIBLE)), reward, scale)
    contracts.assert_moments(
        tj.sample(KEY, tilted, num=num, steps=400).x, np.array([mean]), np.array([[variance]])
    )


# Where the network is asked.

LEVELS = 50
TABLE = np.cumprod(1 - np.linspace(0.003, 0.25, LEVELS))
DISCRETE = tj.DiscreteVP(TABLE)


# N(m, s^2 I) by its natural parameters, m / s^2 and 1 / s^2: so simple that these tests compile
# fast.
NATURAL, PRECISION = np.array([0.8, -0.5]), 1.6


def denoise(alpha, sigma, x, natural=NATURAL, precision=PRECISION):
    natural, precision = jnp.asarray(natural, x.dtype), jnp.asarray(precision, x.dtype)
    return (natural + alpha / sigma**2 * x) / (precision + (alpha / sigma) ** 2)


def network(dtype=jnp.float64, tolerance=1e-9):
    """That Gaussian as a noise network that knows whole levels of `TABLE` only, and answers NaN
    elsewhere.
    """
    path = tj._pytree.cast(DISCRETE, dtype)

    def noise(index, x):
        level = jnp.round(index)
        alpha = jnp.sqrt(jnp.asarray(TABLE, x.dtype)[level.astype(int)])
        sigma = jnp.sqrt(1 - alpha**2)
        known = (jnp.abs(index - level) < tolerance) & (level >= 0) & (level < LEVELS)
        return jnp.where(known, (x - alpha * denoise(alpha, sigma, x)) / sigma, jnp.nan)

    return tj.from_noise(
        lambda t, x: noise(path.index(t), x), shape=(2,), interpolant=path, dtype=dtype
    )


def usable(c):
    """The levels whose snr is at least c, from the noisiest."""
    return np.flatnonzero(c <= TABLE / (1 - TABLE))[::-1]


# c = 2 scale just below the snr of a level, so that a run starts in what is nearly noise.
SCALE = float(0.499 * TABLE[25] / (1 - TABLE[25]))
REWARD = rewards.Quadratic([0.5, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_network_of_levels_is_asked_at_whole_levels_only(dtype):
    rough = 1e-2 if dtype == jnp.float32 else 1e-9
    linear, net = tj.Linear(jnp.ones((), dtype)), network(dtype, rough)
    tilted = tj.Tilted(
        tj.models.Rescheduled(net, linear),
        tj._pytree.cast(REWARD, dtype),
        jnp.asarray(SCALE, dtype),
    )
    levels = usable(2 * SCALE)
    times = tilted.grid_at(net.interpolant.clock(jnp.asarray(levels, dtype)))
    assert levels[0] == 25
    assert (times.dtype, len(times), float(times[-1])) == (dtype, 27, 1.0)
    solver = tj.Heun() if dtype == jnp.float32 else tj.Euler()
    x = tj.sample(KEY, tilted, num=20, times=times, solver=solver).x  # a NaN would raise
    assert x.dtype == dtype
    # The same run with the exact denoiser of the tilt.
    target = 2 * SCALE * np.asarray(REWARD.target)
    exact = lambda t, x: denoise(t, 1 - t, x, NATURAL + target, PRECISION + 2 * SCALE)
    truth = tj.from_denoiser(exact, shape=(2,), dtype=dtype, interpolant=linear)
    assert_close(x, tj.sample(KEY, truth, num=20, times=times, solver=solver).x, rough)
    with pytest.raises(FloatingPointError, match="denoiser is not finite"):
        tj.sample(KEY, tilted, num=20, times=times.at[5].add(1e-3), solver=solver)


def test_untilted_the_levels_are_the_grid():
    levels = DISCRETE.clock(np.arange(LEVELS)[::-1])
    times = network().grid_at(levels)
    assert_close(times, np.append(np.arange(LEVELS) / LEVELS, 1.0))
    exact = lambda t, x: denoise(DISCRETE.alpha(t), DISCRETE.sigma(t), x)
    model = tj.from_denoiser(exact, shape=(2,), interpolant=DISCRETE)
    assert_close(jax.jit(lambda levels: network().grid_at(levels))(levels), times)
    run = lambda model: tj.sample(KEY, model, num=5, times=times, solver=tj.Ancestral(0.0)).x
    assert_close(run(network()), run(model), 1e-8)


def test_levels_at_which_a_tilt_never_asks_are_refused():
    tilted = tj.Tilted(tj.models.Rescheduled(network()), REWARD, SCALE)
    with pytest.raises(
        ValueError, match=r"network_times must lie in \[0\.4\d*, 1\).*got \[0\.46\]: leave"
    ):
        tilted.grid_at(DISCRETE.clock(np.array([26, 25, 3])))
    with pytest.raises(ValueError, match=r"got \[1\.\]: leave"):
        tilted.grid_at([0.6, 1.0])
    # On its own path the tilt starts with some data in the state, and so asks even later.
    assert len(tj.Tilted(network(), REWARD, SCALE).grid_at(DISCRETE.clock(np.array([24, 3])))) == 3
    with pytest.raises(ValueError, match=r"got \[0\.48\]: leave"):
        tj.Tilted(network(), REWARD, SCALE).grid_at(DISCRETE.clock(np.array([25, 3])))


GRID = {"times": [1e-3, 0.5, 0.9, 1.0]}
CLEANEST = float(TABLE[0] / (1 - TABLE[0]))  # 332
OUTSIDE = {
    "after the last level": (
        lambda net: net,
        {"times": [0.0, 0.99, 1.0]},
        r"t = 0\.99 .*end the grid at t = 0\.98 and jump.*times=",
    ),
    "tilted": (
        lambda net: tj.Tilted(net, REWARD, 100.0),
        {"times": [0.0, 0.97, 1.0]},
        r"t = 0\.97 .*end the grid at t = 0\.96",
    ),
    "tilted twice": (
        lambda net: tj.Tilted(tj.Tilted(tj.models.Rescheduled(net), REWARD, 80.0), REWARD, 80.0),
        {"times": [1e-3, 0.95, 1.0]},
        r"snr = 681.*end the grid at t = 0\.778",
    ),
    "a tilt too narrow": (
        lambda net: tj.Tilted(tj.models.Rescheduled(net), REWARD, 170.0),
        GRID,
        "lower the scale",
    ),
    "before the first level": (
        lambda net: tj.models.Rescheduled(net),
        GRID,
        r"t = 0\.001 .* start at t = 0\.03\d* or later",
    ),
    "convex": (
        lambda net: tj.Tilted(tj.models.Rescheduled(net), -1 * REWARD, 0.5),
        {"times": [0.4, 0.9, 1.0], "start": jnp.zeros((2, 2))},
        r"snr = -0\.55.*start at t = 0\.50\d* or later",
    ),
}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=("plain", "jit"))
@pytest.mark.parametrize("case", OUTSIDE)
def test_a_run_that_would_ask_a_network_where_it_was_not_trained_is_refused(case, transform):
    build, options, message = OUTSIDE[case]
    options = {name: np.asarray(value) for name, value in options.items()}
    model = build(network())
    with pytest.raises(ValueError, match=message):
        transform(lambda key: tj.sample(key, model, num=2, **options).x)(KEY)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=("plain", "jit"))
@pytest.mark.parametrize(
    ("build", "ends"),
    [
        (lambda net: net, (1e-3, 0.98)),
        (tj.models.Rescheduled, (0.0302, 0.948)),
        (lambda net: tj.Tilted(tj.models.Rescheduled(net), REWARD, 100.0), (1e-3, 0.92)),
    ],
    ids=("its own path", "rescheduled", "tilted"),
)
def test_the_default_grid_keeps_to_what_the_network_knows(build, ends, transform):
    model = build(tj.Analytic(MIXTURE, DISCRETE))
    times = model.grid(80)
    assert len(times) == 81
    assert times[-1] == 1
    np.testing.assert_allclose(times[jnp.asarray([0, -2])], ends, atol=2e-3)
    steps = np.diff(np.asarray(times[:-1]))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-5)
    assert np.all(np.isfinite(transform(lambda key: tj.sample(key, model, num=2, steps=80).x)(KEY)))


def test_the_grid_that_a_refusal_names_is_accepted():
    tilted = tj.Tilted(tj.models.Rescheduled(line(DISCRETE)), rewards.Quadratic([1.5]), 100.0)
    with pytest.raises(ValueError, match=r"end the grid at t = (0\.\d+)") as error:
        tj.sample(KEY, tilted, num=2, times=[1e-3, 0.95, 1.0])
    end = float(str(error.value).split("t = ")[2].split(" ")[0])
    assert np.isclose((end / (1 - end)) ** 2 + 200, CLEANEST, rtol=1e-3)
    assert tj.sample(KEY, tilted, num=2, times=[1e-3, end, 1.0]).x.shape == (2, 1)
    start = tj.models.Rescheduled(line(DISCRETE)).grid_at([0.0])[0]
    assert tj.sample(
        KEY, tj.models.Rescheduled(line(DISCRETE)), num=2, times=[float(start), 0.9, 1.0]
    ).x.shape == (2, 1)


def test_sweeping_schedules_and_scales_traces_nothing_anew():
    denoise, calls = contracts.traced(lambda t, x: 0.5 * x)

    def run(path, scale, times=(1e-3, 0.5, 1.0)):
        model = tj.Tilted(
            tj.models.Rescheduled(tj.from_denoiser(denoise, shape=(2,), interpolant=path)),
            REWARD,
            scale,
        )
        return tj.sample(KEY, model, num=2, times=times).x

    run(tj.VP(), 1.0)
    first = len(calls)
    run(tj.VP(0.2, 15.0), 2.0, (2e-3, 0.4, 1.0))
    assert len(calls) == first
    run(DISCRETE, 1.0)
    second = len(calls)
    run(tj.DiscreteVP(TABLE**1.1), 2.0)
    assert len(calls) == second > first


def test_the_clock_of_a_tilt_is_differentiable_in_its_scale():
    exact = lambda path: lambda t, x: denoise(path.alpha(t), path.sigma(t), x)

    def tilted(scale, path):
        model = tj.from_denoiser(exact(path), shape=(2,), interpolant=path)
        return tj.Tilted(tj.models.Rescheduled(model), REWARD, scale).denoise(T, X)

    expected = jax.jacfwd(
        lambda scale: denoise(
            T, 1 - T, X, NATURAL + 2 * scale * REWARD.target, PRECISION + 2 * scale
        )
    )(1.5)
    for path in (tj.VP(), DISCRETE):
        got = jax.jit(jax.jacfwd(tilted))(1.5, path)
        assert_close(got, expected)


def test_a_guided_run_may_start_at_zero_where_there_is_data_in_the_state():
    run = lambda path: tj.sample(
        KEY, line(path), tj.dps(line(path), rewards.Quadratic([1.5])), num=2, times=[0.0, 0.5, 1.0]
    )
    assert np.all(np.isfinite(run(tj.VP()).x))
    with pytest.raises(ValueError, match="guided run must start at t > 0"):
        run(tj.Linear())


def test_a_rescheduled_mixture_is_refused_with_the_way_to_wrap_it():
    with pytest.raises(TypeError, match=r"Model, got GaussianMixture.*Analytic"):
        tj.models.Rescheduled(MIXTURE)
    with pytest.raises(TypeError, match=r"Interpolant, got the class Linear itself"):
        tj.models.Rescheduled(line(DISCRETE), tj.Linear)


def test_batches_are_denoised_alike():
    x = jax.random.normal(jax.random.key(3), (4, 2))
    model = tj.Analytic(MIXTURE)
    for moved in (
        tj.Tilted(model, tj.rewards.Quadratic([0.5, 1.0]), 2.0),
        tj.models.Rescheduled(model, tj.Linear(2.0)),
        model,
    ):
        expected = jax.vmap(lambda x, moved=moved: moved.denoise(jnp.asarray(0.4), x))(x)
        np.testing.assert_allclose(moved.denoise_batch(jnp.asarray(0.4), x), expected, rtol=1e-12)
