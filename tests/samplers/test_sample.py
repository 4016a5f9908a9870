"""`sample`: what must not change the numbers, what must, what is traced, what is reported.

Tiers: exact (float64, 1e-9 between batchings), statistical (5 standard errors).
"""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj
from tiltjax import rewards, solvers
from tiltjax.particles import CAUSES

KEY = jax.random.key(0)
MODEL = tj.Analytic(contracts.planar())
REWARD = rewards.Quadratic(contracts.TARGET)
ONE = tj.Analytic(contracts.gaussian([0.3, -0.2], [[0.5, 0.2], [0.2, 0.4]]))
GUIDED = tj.PlugIn(tj.Glass(ONE, 2), REWARD, 2.0, k=2)


# What must not change the numbers.


@functools.cache
def run_in_batches(batch):
    return tj.sample(
        KEY, ONE, GUIDED, num=9, steps=4, chunk_size=batch, solver=tj.Euler(), save_trajectory=True
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_batches_change_nothing(batch):
    together, batched = run_in_batches(None), run_in_batches(batch)
    chex.assert_trees_all_close(batched.x, together.x, rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(batched.trace, together.trace, rtol=1e-9, atol=1e-9)


def test_more_particles_leave_the_first_as_they_were():
    few, many = (
        tj.sample(KEY, ONE, GUIDED, num=n, steps=4, solver=tj.Ancestral()).x for n in (200, 300)
    )
    # Equal to rounding: another batch size may be vectorized otherwise.
    chex.assert_trees_all_close(many[:200], few, rtol=1e-9, atol=1e-9)


def test_one_key_one_result():
    run = lambda seed: tj.sample(jax.random.key(seed), ONE, GUIDED, num=5, steps=3).x
    chex.assert_trees_all_equal(run(0), run(0))
    assert not np.any(np.asarray(run(0)) == np.asarray(run(1)))
    assert len(np.unique(np.asarray(run(0)))) == 10


def test_inside_jit_and_with_models_and_guidances_as_arguments():
    expected = tj.sample(KEY, ONE, GUIDED, num=5, steps=3).x
    closed = jax.jit(lambda key: tj.sample(key, ONE, GUIDED, num=5, steps=3).x)(KEY)
    parts = jax.jit(tj.sample, static_argnames=("num", "steps"))(KEY, ONE, GUIDED, num=5, steps=3)
    chex.assert_trees_all_close(closed, expected, rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(parts.x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_over_eight_devices_as_on_one():
    """In a process of its own: the number of devices is fixed when JAX starts."""
    script = """
        import jax, numpy as np
        jax.config.update("jax_enable_x64", True)
        import tiltjax as tj
        assert len(jax.devices()) == 8
        mesh = jax.make_mesh((8,), ("particles",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("particles"))
        prior = tj.GaussianMixture([.5, .5], [[-1., 0.], [1., 0.]], np.stack([np.eye(2)] * 2))
        model = tj.Analytic(prior)
        guidance = tj.PlugIn(tj.Glass(model, 3), tj.rewards.Quadratic([0., 1.]), 2., k=2)
        key = jax.random.key(0)
        run = lambda mesh: tj.sample(key, model, guidance, num=16, steps=3, sharding=mesh)
        one, eight = run(None), run(sharding)
        assert len(eight.x.sharding.device_set) == 8, eight.x.sharding
        assert {shard.data.shape for shard in eight.x.addressable_shards} == {(2, 2)}
        np.testing.assert_allclose(eight.x, one.x, rtol=1e-9, atol=1e-9)
        twist = tj.dps(model, tj.rewards.Quadratic([0., 1.]), .5)
        settings = {"num": 16, "steps": 4, "ess_threshold": 1.}
        weigh = lambda mesh: tj.smc(key, model, twist, sharding=mesh, **settings)
        one, eight = weigh(None), weigh(sharding)
        assert np.any(one.trace.resampled)
        np.testing.assert_allclose(eight.x, one.x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(eight.log_norm, one.log_norm, rtol=1e-9)
        print("equal")
    """
    done = contracts.on_eight_devices(script)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


# Times, paths, dtypes.


def test_trajectories_have_their_shape_and_ends():
    particles = tj.sample(KEY, MODEL, num=3, steps=4, save_trajectory=True)
    assert particles.trace.trajectory.shape == (5, 3, 2)
    chex.assert_trees_all_equal(particles.trace.trajectory[-1], particles.x)
    chex.assert_trees_all_close(particles.trace.times, jnp.linspace(1e-3, 1.0, 5), rtol=1e-14)
    assert particles.log_norm is None
    chex.assert_trees_all_equal(particles.log_weights, jnp.zeros(3))
    assert tj.sample(KEY, MODEL, num=3, steps=4).trace.trajectory is None


def test_times_may_be_given_and_may_end_early():
    times = jnp.asarray([0.0, 0.2, 0.5, 0.7])
    early = tj.sample(KEY, MODEL, num=3, times=times, save_trajectory=True)
    chex.assert_trees_all_equal(early.trace.times, times)
    late = tj.sample(KEY, MODEL, num=3, times=jnp.append(times, 1.0), save_trajectory=True)
    chex.assert_trees_all_close(
        late.trace.trajectory[:4], early.trace.trajectory, rtol=1e-9, atol=1e-9
    )
    jump = jax.vmap(lambda x: MODEL.denoise(times[-1], x))(early.x)
    chex.assert_trees_all_close(late.x, jump, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("end", [0.5, 1.0])
def test_the_unguided_law_at_any_end(end):
    """Statistical, with the change of the same noise from 25 to 50 steps as the discretization's
    size.
    """
    run = lambda steps: tj.sample(KEY, MODEL, num=5000, times=jnp.linspace(1e-3, end, steps + 1)).x
    coarse, fine = np.asarray(run(25)), np.asarray(run(50))
    mean, cov = contracts.np_moments(*contracts.np_fields(MODEL.mixture))
    slack = max(
        np.abs(coarse.mean(0) - fine.mean(0)).max(), np.abs(np.cov(coarse.T) - np.cov(fine.T)).max()
    )
    assert slack < 0.02
    contracts.assert_moments(fine, end * mean, end**2 * cov + (1 - end) ** 2 * np.eye(2), slack)


@pytest.mark.slow
def test_the_exact_h_function_samples_the_tilt():
    """Statistical, with twice the change from half the steps as discretization."""
    guidance = contracts.all_guidances()["doob"](MODEL, REWARD, 2.0)
    run = lambda steps: np.asarray(
        tj.sample(KEY, MODEL, guidance, num=2000, steps=steps, solver=tj.Ancestral()).x
    )
    coarse, fine = run(30), run(60)
    truth = contracts.np_tilt(MODEL.mixture, 4.0 * np.asarray(contracts.TARGET), 4.0 * np.eye(2))
    slack = 2 * max(
        np.abs(coarse.mean(0) - fine.mean(0)).max(), np.abs(np.cov(coarse.T) - np.cov(fine.T)).max()
    )
    contracts.assert_moments(fine, *contracts.np_moments(*truth), slack)


@pytest.mark.parametrize(
    ("solver", "dtype"),
    [(solver, jnp.float32) for solver in contracts.all_solvers()] + [("heun", jnp.float64)],
)
def test_the_dtype_is_the_models_in_every_leaf(solver, dtype):
    """With x64 on, a scale and a reward in float64, and the model in either precision."""
    model = tj.Analytic(contracts.gaussian([0.3, -0.2], np.eye(2), dtype))
    guidance = tj.PlugIn(tj.Tweedie(model), REWARD, tj.Damped(2.0, 0.7))
    solver = contracts.all_solvers()[solver]
    particles = tj.sample(KEY, model, guidance, num=2, steps=2, solver=solver, save_trajectory=True)
    floating = {leaf.dtype for leaf in jax.tree.leaves(particles) if eqx.is_inexact_array(leaf)}
    assert floating == {jnp.dtype(dtype)}
    assert particles.trace.failed.number.dtype == jnp.int32


@pytest.mark.parametrize("name", ["doob", "plug-in, exact, k=3"])
def test_guidances_run_in_single_precision(name):
    model = tj.Analytic(contracts.planar(jnp.float32))
    guidance = contracts.all_guidances()[name](model, REWARD, 2.0)
    x = tj.sample(KEY, model, guidance, num=2, steps=2, solver=tj.Euler()).x
    assert x.dtype == jnp.float32
    assert np.all(np.isfinite(x))


# Keys.


class Keys(tj.Model):
    """A model whose initial state is the key it was given."""

    interpolant: tj.interpolants.Interpolant
    shape = (6,)
    dtype = jnp.dtype("float64")

    def denoise(self, t, x):
        return x

    def initial(self, key, t):
        return jnp.tile(jax.random.key_data(key).astype(jnp.float64), 3)


class Recording(solvers.Solver):
    """A solver whose state is the keys it was given."""

    stochastic = True
    order = 1

    def step(self, keys, interpolant, field, t, u, x, state):
        return jnp.concatenate([jax.random.key_data(key) for key in keys]).astype(x.dtype), state


@pytest.mark.parametrize("batch", [None, 2])
def test_all_keys_of_a_run_differ(batch):
    """Over particles, steps, streams and starts: 32-bit words are exact in float64."""
    num, steps = 5, 4
    trajectory = tj.sample(
        KEY,
        Keys(tj.Linear()),
        num=num,
        steps=steps,
        solver=Recording(),
        save_trajectory=True,
        chunk_size=batch,
    ).trace.trajectory
    starts = np.asarray(trajectory[0])[:, :2]
    streams = np.asarray(trajectory[1:]).reshape(-1, 2)
    assert len(starts) == num
    assert len(streams) == num * steps * 3
    assert len(np.unique(np.concatenate([starts, streams]), axis=0)) == num + num * steps * 3
    again = tj.sample(
        KEY, Keys(tj.Linear()), num=2 * num, steps=steps, solver=Recording(), save_trajectory=True
    ).trace.trajectory
    chex.assert_trees_all_equal(again[:, :num], trajectory)


def record(solver):
    """The keys of all posterior draws and scale laws of a run of 4 particles, 3 steps and k = 2."""
    seen = {"draw": [], "scale": []}

    def note(what, key):
        jax.debug.callback(
            lambda data: seen[what].append(tuple(np.asarray(data).tolist())),
            jax.random.key_data(key),
        )

    class Draws(tj.posteriors.Posterior):
        model: tj.Model

        def draw(self, key, t, x):
            note("draw", key)
            return x

    class Law(tj.scales.Scale):
        final: jax.Array

        def __call__(self, key, snr, t, x):
            note("scale", key)
            return self.final

    guidance = tj.PlugIn(Draws(MODEL), REWARD, Law(jnp.asarray(0.1)), k=2)
    tj.sample(KEY, MODEL, guidance, num=4, steps=3, solver=solver)
    jax.effects_barrier()
    return seen


@pytest.mark.parametrize(
    ("solver", "stages", "distinct"),
    [(tj.Euler(), 4, 4), (tj.Heun(), 7, 7), (tj.Heun(share_draw=True), 7, 4)],
    ids=("euler", "heun", "shared"),
)
def test_fresh_draws_use_fresh_keys_and_shared_ones_the_same(solver, stages, distinct):
    """The start and three steps are four first stages and, for Heun, three second ones: the last
    step jumps.
    """
    seen = record(solver)
    assert len(seen["draw"]) == 4 * stages * 2
    assert len(seen["scale"]) == 4 * stages
    assert len(set(seen["draw"])) == 4 * distinct * 2
    assert len(set(seen["scale"])) == 4 * distinct
    assert not set(seen["draw"]) & set(seen["scale"])


# Tracing.


def test_sweeping_numbers_traces_nothing_anew():
    reward, calls = contracts.traced(lambda x: -jnp.sum((x - 1.0) ** 2))
    prior = MODEL.mixture

    def run(
        *,
        seed=0,
        scale=1.0,
        sigma=0.7,
        target=0.0,
        times=(0.1, 0.5, 1.0),
        means=prior.means,
        base=1.0,
    ):
        model = tj.Analytic(tj.GaussianMixture(prior.weights, means, prior.covs), tj.Linear(base))
        total = rewards.as_reward(reward) + rewards.Quadratic([target, 0.0])
        guidance = tj.guidance.wrappers.Clipped(
            tj.PlugIn(tj.Tweedie(model), total, tj.Damped(scale, sigma)), 10.0
        )
        return tj.sample(jax.random.key(seed), model, guidance, num=2, times=times).x

    base, first = np.asarray(run()), len(calls)
    assert first > 0
    for change in (
        {"seed": 1},
        {"scale": 2.5},
        {"sigma": 0.2},
        {"target": 1.0},
        {"times": (0.05, 0.6, 1.0)},
        {"times": jnp.asarray([0.05, 0.6, 1.0])},
        {"means": prior.means + 1.0},
        {"base": 2.0},
    ):
        assert not np.array_equal(run(**change), base), change
        assert len(calls) == first, f"{change} traced again"
    run(times=(0.1, 0.5, 0.7, 1.0))
    assert len(calls) > first  # the counter does count


@functools.cache  # shared, so that the sweeps over one noun share a compilation
def counted_network():
    network, calls = contracts.traced(lambda t, x: jnp.tanh(x) * (1 - t))
    return tj.from_denoiser(network, shape=(2,)), calls


def table(variance):
    return tj.guidance.Variance(
        jnp.log(jnp.asarray([1e-8, 1e8])), jnp.log(jnp.asarray([variance, 1e-9]))
    )


def fitted(m, *, target=1.0, scale=1.0, keep=0.1, variance=1.0):
    return tj.Conjugate(
        m, rewards.Bump([target, 0.0]), scale, smoothing=keep, variance=table(variance)
    )


# What may be swept, as functions `(model, value) -> (guidance, solver)`; the sweep is over two
# floats.
SWEEPS = {
    "conjugate, target": (lambda m, v: (fitted(m, target=v), tj.Euler()), (0.5, 1.0)),
    "conjugate, scale": (lambda m, v: (fitted(m, scale=v), tj.Euler()), (0.5, 1)),
    "conjugate, keep": (lambda m, v: (fitted(m, keep=v), tj.Euler()), (0.0, 0.5)),
    "conjugate, variance": (lambda m, v: (fitted(m, variance=v), tj.Euler()), (0.5, 1.0)),
    "renoise": (
        lambda m, v: (tj.PlugIn(tj.posteriors.Renoise(m, v, 2), REWARD), tj.Euler()),
        (1.5, 3),
    ),
    "self-damped": (lambda m, v: (tj.dps(m, REWARD, tj.SelfDamped(v, m)), tj.Euler()), (0.5, 1)),
    "normalized": (
        lambda m, v: (tj.guidance.wrappers.Normalized(tj.dps(m, REWARD), v), tj.Euler()),
        (0.5, 1),
    ),
    "clipped": (
        lambda m, v: (tj.guidance.wrappers.Clipped(tj.dps(m, REWARD), v), tj.Euler()),
        (0.05, 0.1),
    ),
    "toward": (
        lambda m, v: (tj.guidance.toward(m, tj.Tilted(m, REWARD, v), REWARD, v), tj.Euler()),
        (0.5, 1),
    ),
    "eta": (lambda m, v: (None, tj.Ancestral(v)), (0.5, 1)),
    "rtol": (lambda m, v: (None, tj.Adaptive(v, 1e-3)), (1e-2, 1e-4)),
    "atol": (lambda m, v: (None, tj.Adaptive(1e-3, v)), (1e-1, 1e-4)),
    "floor": (lambda m, v: (None, tj.Adaptive(floor=v)), (0.3, 0.1)),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_one_trace_a_sweep(name):
    model, calls = counted_network()
    build, (first, second) = SWEEPS[name]

    def run(value):
        guidance, solver = build(model, value)
        return np.asarray(
            tj.sample(KEY, model, guidance, num=2, times=[0.01, 0.5, 1.0], solver=solver).x
        )

    once, traces = run(first), len(calls)
    for value in (
        second,
        jnp.asarray(float(second)),
    ):  # as a Python number, whole or not, and as an array
        assert not np.array_equal(run(value), once), "what is swept changes nothing"
        assert len(calls) == traces > 0, f"{name} traced again"


def test_one_trace_a_sweep_of_the_checkerboards_path():
    calls = []

    class Counted(tj.Linear):
        def alpha(self, t):
            calls.append(1)
            return super().alpha(t)

    def run(base):
        start, times = jnp.asarray([[0.3, -0.8]]), [0.1, 0.5]
        model = tj.models.Checkerboard(Counted(base))
        return np.asarray(
            tj.sample(KEY, model, num=1, times=times, start=start, solver=tj.Euler()).x
        )

    once, traces = run(1.5), len(calls)
    assert not np.array_equal(run(2.0), once)
    assert len(calls) == traces > 0


def test_one_trace_a_sweep_of_gibbs():
    model, calls = counted_network()

    def run(target, scale):
        reward = rewards.Quadratic([target, 0.0], [1.0, 0.8])
        return np.asarray(tj.gibbs(KEY, model, reward, scale, num=200, steps=2).x)

    once, traces = run(0.5, 1.0), len(calls)
    for target, scale in ((1.0, 1.0), (0.5, 2), (0.5, jnp.asarray(0.7))):
        assert not np.array_equal(run(target, scale), once)
        assert len(calls) == traces > 0


SCALED = {
    "constant": lambda scale: tj.dps(ONE, REWARD, scale),
    "damped": lambda scale: tj.PlugIn(tj.Tweedie(ONE), REWARD, tj.Damped(scale, 0.7)),
    "laplace": lambda scale: tj.Laplace(ONE, REWARD, scale),
    "tilted": lambda scale: tj.Tilted(ONE, REWARD, scale),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_vmap_and_grad_over_the_scale(name):
    """Laws are held constant under differentiation in x; their parameters are the user's to
    differentiate.
    """

    @jax.jit
    def mean(scale):
        thing = SCALED[name](scale)
        parts = (thing,) if name == "tilted" else (ONE, thing)
        return jnp.mean(tj.sample(KEY, *parts, num=4, steps=3, solver=tj.Euler()).x)

    scales, step = jnp.asarray([0.5, 2.0]), 1e-5
    chex.assert_trees_all_close(
        jax.vmap(mean)(scales), jnp.stack([mean(s) for s in scales]), rtol=1e-9
    )
    numeric = (mean(2.0 + step) - mean(2.0 - step)) / (2 * step)
    chex.assert_trees_all_close(jax.grad(mean)(2.0), numeric, rtol=1e-6)


# Numbers that are not.


def failing(case):
    t_bad = 0.45
    if case == "network":
        return tj.from_denoiser(
            lambda t, x: jnp.where(t > t_bad, jnp.nan, 0.5 * x), shape=(2,)
        ), None
    network = tj.from_denoiser(lambda t, x: 0.5 * x, shape=(2,))
    if case == "network, guided":
        broken, _ = failing("network")
        return broken, tj.dps(broken, REWARD)
    if case == "reward":
        return network, tj.dps(network, lambda x: jnp.nan * jnp.sum(x))
    if case == "gradient":
        return network, tj.dps(network, lambda x: jnp.sum(jnp.sqrt(0.0 * x)))
    raise AssertionError(case)


# Euler on nine steps from .1 to 1: the first at which t > .45 is the fourth (.5).
FAILURES = {
    "network": (4, 0, "denoiser is not finite"),
    "network, guided": (4, 0, "denoiser is not finite"),
    "reward": (0, 1, r"log_h is NaN or \+inf: look at the reward's value"),
    "gradient": (0, 2, "shift of the denoiser is not finite: look at the reward's gradient"),
}
GRID = jnp.linspace(0.1, 1.0, 10)


@pytest.mark.parametrize("case", FAILURES)
def test_a_nan_is_reported_with_its_first_step_and_cause(case):
    (model, guidance), (step, cause, message) = failing(case), FAILURES[case]
    run = lambda key, times=GRID: tj.sample(
        key, model, guidance, num=3, times=times, solver=tj.Euler()
    )
    with pytest.raises(
        FloatingPointError, match=rf"step {step} of 9, from t = 0\.{step + 1}: .*{message}"
    ):
        run(KEY)
    # Inside jit nothing is raised.
    failed = jax.jit(lambda key, times: run(key, times).trace.failed)(KEY, GRID)
    failed = np.stack([getattr(failed, name) for name in CAUSES], axis=1)
    assert int(np.argmax(failed.any(axis=1))) == step
    assert int(np.argmax(failed[step])) == cause


def test_the_cause_is_the_first_also_when_a_second_stage_follows():
    """Heun's second stage sees the NaN that the first one made: the blame stays with the reward."""
    model, guidance = failing("reward")
    with pytest.raises(
        FloatingPointError, match=r"log_h is NaN or \+inf: look at the reward's value"
    ):
        tj.sample(KEY, model, guidance, num=3, times=GRID, solver=tj.Heun())


def test_one_bad_particle_among_many_is_found():
    model = tj.from_denoiser(lambda t, x: jnp.where(x[0] > 1.0, jnp.inf, 0.5 * x), shape=(2,))
    with pytest.raises(FloatingPointError, match="denoiser"):
        tj.sample(KEY, model, num=100, steps=3, chunk_size=7)


def test_minus_infinity_is_a_reward():
    """A hard constraint has `log h = -inf` where it is violated; only NaN is an error there."""
    reward = lambda x: jnp.where(x[0] > 1e6, 0.0, -jnp.inf)
    particles = tj.sample(KEY, ONE, tj.dps(ONE, reward), num=3, steps=2, solver=tj.Euler())
    assert not np.any(particles.trace.failed.log_h)


# Starts.


def test_a_run_continues_from_given_states():
    times = jnp.linspace(1e-3, 1, 11)
    whole = tj.sample(KEY, MODEL, num=4, times=times, save_trajectory=True)
    rest = tj.sample(KEY, MODEL, num=4, times=times[4:], start=whole.trace.trajectory[4])
    chex.assert_trees_all_close(
        rest.x, whole.x, rtol=1e-12, atol=1e-12
    )  # the unguided flow has no randomness of its own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": [0.3, 0.6, 1.0]}, r"cannot start at t = 0\.3.*start="),
        ({"start": jnp.zeros((3, 2)), "times": [0.5, 1.0]}, r"shape \(4, 2\), got \(3, 2\)"),
        ({"start": jnp.full((4, 2), jnp.nan), "times": [0.5, 1.0]}, "start must be finite"),
        ({"start": jnp.zeros((4, 2))}, "start needs times="),
    ],
)
def test_starts_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        tj.sample(KEY, MODEL, num=4, **options)


def test_a_guidance_of_another_shape_is_refused():
    class First(tj.guidance.Guidance):
        model: tj.models.Model

        def __call__(self, key, t, x, state):
            return tj.guidance.Estimate(self.model.denoise(t, x)[:1]), state

    with pytest.raises(ValueError, match=r"shape \(1,\) for a state of shape \(2,\): build it on"):
        tj.sample(KEY, MODEL, First(MODEL), num=4)


def test_a_guidance_of_another_model_is_refused():
    tilted = tj.Tilted(MODEL, rewards.Quadratic([0.5, 1.0]), 1.0)
    with pytest.raises(
        ValueError, match=r"another model \(Analytic\) than the one to sample \(Tilted\)"
    ):
        tj.sample(KEY, tilted, tj.dps(MODEL, rewards.LinearReward([1.0, 0.0])), num=4)
