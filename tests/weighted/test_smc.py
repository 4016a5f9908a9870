"""`smc`: unbiased normalizing constants whatever it is made of, exact bookkeeping, errors that say
what to do.

The truth is the base chain's own normalizing constant, by a transfer operator on a grid
(`chain_log_norm`): no sampler, no limit.
"""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj
from tiltjax import resampling
from tiltjax.solvers import Kernel
from tiltjax.weighted import potentials, proposals, tempering

loop = sys.modules["tiltjax.weighted._smc"]
STEPS, NUM, SCALE, RUNS = 20, 8, 0.3, 4000
PROBLEM = tj.problems.get("quadratic")
MODEL = tj.Analytic(PROBLEM.prior)
REWARD = tj.rewards.Quadratic([0.0, 2.5])


def chain_log_norm(eta=1.0):
    """`log E[exp(scale r)]` at the end of the base chain for two modes ±2.5 along the first
    coordinate: the coordinates are independent.
    """
    times = np.linspace(1e-3, 1, STEPS + 1)
    grid = np.linspace(-9, 9, 1801)
    cell = grid[1] - grid[0]

    def denoise(t, x, mode):
        variance = 0.5 * t**2 + (1 - t) ** 2
        gain = 0.5 * t / variance
        if mode == 0:
            return gain * x
        middle = (1 - t) ** 2 / variance * mode
        return gain * x + middle * np.tanh(t * mode * x / variance)

    total = 0.0
    for mode, target in ((2.5, 0.0), (0.0, 2.5)):
        value = np.exp(-SCALE * (denoise(times[-2], grid, mode) - target) ** 2)
        for t, u in zip(times[-3::-1], times[-2:0:-1], strict=True):
            rho = t * (1 - u) / (u * (1 - t))
            s2 = eta**2 * (1 - u) ** 2 * (1 - rho**2)
            d = denoise(t, grid, mode)
            mean = u * d + np.sqrt((1 - u) ** 2 - s2) * (grid - t * d) / (1 - t)
            kernel = np.exp(-((grid[None] - mean[:, None]) ** 2) / (2 * s2)) / np.sqrt(
                2 * np.pi * s2
            )
            value = kernel @ value * cell
        start = (1 - times[0]) ** 2
        total += np.log(
            np.sum(np.exp(-(grid**2) / (2 * start)) / np.sqrt(2 * np.pi * start) * value) * cell
        )
    return total


def log_norms(guidance, runs=RUNS, seed=0, **settings):
    one = lambda key: tj.smc(key, MODEL, guidance, num=NUM, steps=STEPS, **settings).log_norm
    return np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(seed), runs)))


def deviation(values, truth):
    """How many standard errors the mean of `exp` is from the truth, its relative standard error,
    the largest run's part of the sum.
    """
    ratio = np.exp(values - truth)
    error = ratio.std(ddof=1) / np.sqrt(len(ratio))
    return (ratio.mean() - 1) / error, error, ratio.max() / ratio.sum()


DPS = tj.dps(MODEL, REWARD, SCALE)
DRAWS = tj.PlugIn(tj.Exact(MODEL), REWARD, SCALE)
DRAWS4 = tj.PlugIn(tj.Exact(MODEL), REWARD, SCALE, k=4)
LAPLACE = tj.Laplace(MODEL, REWARD, SCALE)
BASE, GUIDED, SHIFTED = proposals.Base(), proposals.Guided(), proposals.Shifted()
ADAPTIVE = tempering.AdaptiveTempering(0.6)
ETA_ONE = tj.Ancestral()
P, T, R = potentials, tempering, resampling

# Potentials that add up along a path have weights of enormous variance if they count at every step:
# they count twice here.
TWICE = {"schedule": tj.weighted.potentials.ResampleSchedule(6, start=5, stop=11)}
# Every pair of proposal, potential, resampling, gate, tempering and guidance occurs in some row.
ROWS = [
    (DPS, BASE, P.Difference(), R.systematic, 0.5, None, {}),
    (DPS, GUIDED, P.Max(), R.multinomial, 1.0, T.Exponential(), TWICE),
    (DPS, SHIFTED, P.Sum(), R.ssp, 0.5, T.Polynomial(2.0), TWICE),
    (DPS, proposals.Children(3), P.Immediate(), R.residual, 1.0, None, TWICE),
    (DPS, GUIDED, P.Difference(), R.stratified, 0.9, ADAPTIVE, {}),
    (DRAWS, BASE, P.Max(), R.ssp, 1.0, None, TWICE),
    (DRAWS, GUIDED, P.Difference(), R.residual, 0.5, T.Polynomial(1.0), {}),
    (DRAWS, SHIFTED, P.Immediate(), R.multinomial, 0.5, T.Exponential(), TWICE),
    (DRAWS, proposals.Children(2, GUIDED), P.Sum(), R.systematic, 1.0, T.Exponential(), TWICE),
    (DRAWS4, BASE, P.Immediate(), R.stratified, 0.5, T.Polynomial(1.0), TWICE),
    (DRAWS4, GUIDED, P.Sum(), R.multinomial, 0.5, None, TWICE),
    (DRAWS4, SHIFTED, P.Difference(), R.systematic, 1.0, ADAPTIVE, {}),
    (DRAWS4, proposals.Children(2), P.Max(), R.residual, 0.5, T.Polynomial(0.5), TWICE),
    (LAPLACE, BASE, P.Sum(), R.residual, 1.0, T.Exponential(), TWICE),
    (LAPLACE, GUIDED, P.Immediate(), R.ssp, 1.0, None, TWICE),
    (LAPLACE, SHIFTED, P.Max(), R.systematic, 0.5, None, TWICE),
    (LAPLACE, proposals.Children(2), P.Difference(), R.multinomial, 1.0, T.Polynomial(1.0), {}),
    (LAPLACE, GUIDED, P.Difference(), R.systematic, 0.0, None, {}),
    (DPS, BASE, P.Difference(), R.multinomial, 1.0, ADAPTIVE, {}),
    (
        DPS,
        BASE,
        P.Max(),
        R.multinomial,
        1.0,
        None,
        {"schedule": tj.weighted.potentials.ResampleSchedule(4, start=3, stop=15)},
    ),
    (
        DPS,
        GUIDED,
        P.Sum(),
        R.systematic,
        0.9,
        T.Exponential(),
        {"schedule": tj.weighted.potentials.ResampleSchedule(5, start=9)},
    ),
    (DRAWS, GUIDED, P.Difference(), R.systematic, 1.0, None, {"twist": LAPLACE}),
    (
        LAPLACE,
        GUIDED,
        P.Immediate(),
        R.stratified,
        1.0,
        T.Polynomial(2.0),
        {"twist": DRAWS4} | TWICE,
    ),
    (DPS, GUIDED, P.Difference(), R.ssp, 0.7, None, {"solver": tj.Ancestral(0.5)}),
    (
        LAPLACE,
        SHIFTED,
        P.Difference(),
        R.stratified,
        0.7,
        T.Exponential(),
        {"solver": tj.Ancestral(0.5)},
    ),
]


@pytest.fixture(scope="module")
def truths():
    return {eta: chain_log_norm(eta) for eta in (1.0, 0.5)}


# One row stays with the fast tests; one for each proposal and half of the rest are slow.
QUICK, SLOW = [17], [0, 2, 3, 4, *range(6, 25, 2)]


def _row(number):
    row = ROWS[number]
    heavy = any(guidance is DRAWS4 for guidance in (row[0], row[-1].get("twist")))
    marks = [pytest.mark.optimized] if heavy else []
    if number not in QUICK:
        marks += [pytest.mark.slow if number in SLOW else pytest.mark.nightly]
    return pytest.param(row, id="-".join(type(part).__name__ for part in row[:3]), marks=marks)


@pytest.mark.parametrize("row", [_row(number) for number in range(len(ROWS))])
def test_the_normalizing_constant_is_unbiased(row, truths):
    guidance, proposal, potential, scheme, threshold, temper, extra = row
    values = log_norms(
        guidance,
        proposal=proposal,
        potential=potential,
        resample=scheme,
        ess_threshold=threshold,
        tempering=temper,
        **extra,
    )
    off, error, largest = deviation(values, truths[0.5 if "solver" in extra else 1.0])
    assert error < 0.06
    assert largest < 0.05
    assert abs(off) < 4


def test_the_table_covers_pairs():
    """Of proposal kind x potential, potential x resampling, proposal kind x guidance, resampling x
    gate.
    """
    kinds = [
        (type(g).__name__, type(p).__name__, type(q).__name__, s.__name__, th)
        for g, p, q, s, th, *_ in ROWS
    ]
    for a, b in ((1, 2), (2, 3), (0, 1)):
        pairs = {(kind[a], kind[b]) for kind in kinds}
        assert len(pairs) >= 0.8 * len({kind[a] for kind in kinds}) * len(
            {kind[b] for kind in kinds}
        )


def fails(values, truth):
    off, error, largest = deviation(values, truth)
    return abs(off) >= 4 or error >= 0.06 or largest >= 0.05


def anew():
    """`DPS` by another function: no program that was compiled for one is used for another."""
    return tj.dps(MODEL, lambda x: REWARD(x), SCALE)


def test_a_twist_that_is_not_gathered_is_found(monkeypatch, truths):
    honest = loop.inherit
    monkeypatch.setattr(
        loop, "inherit", lambda moved, a: honest(moved, a)._replace(applied=moved.applied)
    )
    assert fails(log_norms(anew(), proposal=BASE, ess_threshold=1.0), truths[1.0])


@pytest.mark.slow
def test_a_weight_that_is_dropped_is_found(truths):
    class Forgetful(Kernel):
        def propose(self, key, x, denoised, shift):
            moved, log_ratio = super().propose(key, x, denoised, shift)
            return moved, jnp.zeros_like(log_ratio)

    class Careless(tj.Ancestral):
        def kernel(self, interpolant, t, u):
            return Forgetful(*super().kernel(interpolant, t, u))

    assert fails(log_norms(DPS, proposal=GUIDED, solver=Careless()), truths[1.0])


def test_keys_that_collide_are_found(monkeypatch, truths):
    # The same noise in every step of every run.
    monkeypatch.setattr(
        loop, "particle_key", lambda key_step, i: jax.random.fold_in(jax.random.key(0), i)
    )
    assert fails(log_norms(anew(), proposal=BASE, ess_threshold=1.0), truths[1.0])


def test_the_loop_by_hand_ends_where_it_has_to():
    run = tj.weighted.SMC(MODEL, DPS, num=NUM, steps=4)
    keys = run.keys(jax.random.key(0))
    state, _ = tj.weighted.init(keys[0], run)
    state, _ = tj.weighted.step(keys=keys[1], run=run, state=state)
    early = tj.weighted.finish(keys[-1], run, state)
    np.testing.assert_allclose(early.trace.times, [run.times[1], 1])
    for keys_step in keys[2:-1]:
        state, _ = tj.weighted.step(keys_step, run, state)
    with pytest.raises(ValueError, match="all 3 steps with a kernel are done: call finish"):
        tj.weighted.step(keys[-1], run, state)
    with pytest.raises(TypeError, match="guidance must be a Guidance"):
        tj.weighted.SMC(MODEL, None, num=NUM)
    with pytest.raises(TypeError, match="guide must be a function"):
        tj.tds(jax.random.key(0), MODEL, REWARD, num=NUM, guide=DPS)


@pytest.mark.slow
def test_without_resampling_weights_telescope():
    settings = {"num": 50, "steps": STEPS, "schedule": tj.weighted.potentials.ResampleSchedule(2)}
    run = lambda guidance, **kw: tj.smc(jax.random.key(1), MODEL, guidance, **settings | kw)
    # Children keep weighing: their choice is part of the proposal.
    base = run(DPS, proposal=BASE, ess_threshold=0.0)
    np.testing.assert_allclose(base.log_weights, jax.vmap(DPS.log_tilt)(base.x), atol=1e-12)
    plain = run(DPS, ess_threshold=0.0)
    # A threshold so low that nothing is resampled, but everything weighed.
    for potential in (P.Difference(), P.Sum()):
        weighed = run(DPS, potential=potential, ess_threshold=1e-6)
        np.testing.assert_allclose(weighed.log_weights, plain.log_weights, atol=1e-6)
        np.testing.assert_allclose(weighed.x, plain.x, atol=1e-12)
    for temper in (T.Polynomial(), T.Exponential()):
        weighed = run(DPS, proposal=BASE, tempering=temper, ess_threshold=1e-6)
        np.testing.assert_allclose(weighed.log_weights, base.log_weights, atol=1e-6)
    log_norm = jax.nn.logsumexp(plain.log_weights) - np.log(50)
    np.testing.assert_allclose(plain.log_norm, log_norm, atol=1e-12)
    assert not np.any(plain.trace.resampled)
    np.testing.assert_array_equal(plain.trace.roots, np.arange(50))


@pytest.mark.slow
def test_batches_jit_and_the_number_of_particles_change_nothing():
    run = lambda **kw: tj.smc(
        jax.random.key(2), MODEL, DPS, steps=STEPS, ess_threshold=0.9, **{"num": 30} | kw
    )
    whole = run()
    assert np.any(whole.trace.resampled)
    with_solver = jax.jit(lambda: run(solver=ETA_ONE))
    for other in (run(chunk_size=7), jax.jit(run)(), with_solver()):
        np.testing.assert_allclose(other.x, whole.x, atol=1e-9)
        np.testing.assert_allclose(other.log_norm, whole.log_norm, atol=1e-9)
    first = tj.smc(jax.random.key(2), MODEL, DPS, num=10, steps=STEPS, ess_threshold=0.0)
    more = tj.smc(jax.random.key(2), MODEL, DPS, num=30, steps=STEPS, ess_threshold=0.0)
    np.testing.assert_allclose(more.x[:10], first.x, atol=1e-12)


@pytest.mark.slow
def test_the_trace_says_what_happened():
    particles = tj.smc(
        jax.random.key(3),
        MODEL,
        DPS,
        num=200,
        steps=STEPS,
        proposal=BASE,
        tempering=T.Exponential(),
        ess_threshold=0.8,
        schedule=tj.weighted.potentials.ResampleSchedule(3, start=2, stop=14),
    )
    trace = particles.trace
    assert trace.ess.shape == trace.tempering.shape == trace.resampled.shape == (STEPS,)
    assert set(np.flatnonzero(trace.resampled)) <= {2, 5, 8, 11, 14}
    assert np.any(trace.resampled)
    assert np.all(np.diff(trace.tempering) >= 0)
    assert float(trace.tempering[-1]) == 1
    np.testing.assert_allclose(trace.ess[-1], particles.ess, rtol=1e-12)
    assert len(np.unique(trace.roots)) < 200
    adaptive = tj.smc(
        jax.random.key(3),
        MODEL,
        DPS,
        num=500,
        steps=STEPS,
        proposal=BASE,
        tempering=ADAPTIVE,
        ess_threshold=0.65,
    )
    fraction = np.asarray(adaptive.trace.ess)[:-1] / 500
    assert np.all(fraction > 0.55)


@pytest.mark.slow
def test_the_genealogys_standard_error_is_that_of_repeated_runs():
    def one(key):
        particles = tj.smc(
            key, MODEL, LAPLACE, num=200, steps=STEPS, proposal=BASE, ess_threshold=0.7
        )
        return particles.mean(), particles.standard_error()

    means, errors = jax.vmap(one)(jax.random.split(jax.random.key(4), 200))
    ratio = np.sqrt(np.mean(np.asarray(errors) ** 2, axis=0)) / np.std(np.asarray(means), axis=0)
    assert np.all((ratio > 0.75) & (ratio < 1.35))


@pytest.mark.slow
@pytest.mark.parametrize("drift", ["tilted", "conjugate"])
def test_drifts_that_weigh_nothing_take_any_twist(drift):
    scale = 1.0
    table = tj.calibrate(jax.random.key(0), MODEL)
    guidance = {
        "tilted": tj.guidance.toward(MODEL, tj.Tilted(MODEL, REWARD, scale), REWARD, scale),
        "conjugate": tj.Conjugate(MODEL, lambda x: REWARD(x), scale, variance=table),
    }[drift]
    twist = tj.Laplace(MODEL, REWARD, scale)
    particles = tj.smc(jax.random.key(5), MODEL, guidance, num=400, steps=60, twist=twist)
    assert float(particles.ess) > 100
    blind = tj.smc(jax.random.key(5), MODEL, twist, num=400, steps=60, proposal=BASE)
    gap = abs(float(particles.log_norm - blind.log_norm))
    assert gap < 0.5
    if drift == "conjugate":
        with pytest.raises(ValueError, match="no log_h to weigh particles by: pass twist="):
            tj.smc(jax.random.key(5), MODEL, guidance, num=10, steps=5)


@pytest.mark.slow
def test_single_precision_in_a_double_world_one_step_and_one_particle():
    prior = tj.GaussianMixture(
        *(jnp.asarray(part, jnp.float32) for part in ([1.0], [[0.0]], [[[1.0]]]))
    )
    model = tj.Analytic(prior)
    guidance = tj.dps(model, tj.rewards.Quadratic(jnp.ones(1, jnp.float32)), 1.0)
    for settings in (
        {"steps": 6},
        {"steps": 1},
        {"steps": 6, "potential": P.Sum(), "tempering": T.Exponential()},
    ):
        particles = tj.smc(
            jax.random.key(0), model, guidance, num=16, ess_threshold=1.0, **settings
        )
        assert (
            particles.x.dtype
            == particles.log_weights.dtype
            == particles.log_norm.dtype
            == jnp.float32
        )
    alone = tj.smc(jax.random.key(0), model, guidance, num=1, steps=3)
    assert np.isinf(alone.standard_error()).all()
    assert int(alone.num_roots) == 1


@pytest.mark.slow
def test_states_of_any_shape():
    model = tj.from_denoiser(lambda t, x: t * x / (t**2 + (1 - t) ** 2), shape=(2, 3, 1))
    guidance = tj.dps(model, lambda x: -jnp.sum((x - 1) ** 2), 0.2)
    particles = tj.smc(jax.random.key(0), model, guidance, num=50, steps=5, ess_threshold=1.0)
    assert particles.x.shape == (50, 2, 3, 1)
    assert particles.standard_error().shape == (2, 3, 1)


METHODS = {
    "fk_steering": (tj.fk_steering, {}),
    "das": (tj.das, {}),
    "das, gamma": (tj.das, {"gamma": 0.05}),
    "tds": (tj.tds, {}),
    "tds, ssp": (tj.tds, {"resample": R.ssp}),
    "svdd": (tj.svdd, {"children": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_published_methods_have_the_right_normalizing_constant(name, truths):
    method, settings = METHODS[name]
    run = lambda key: method(key, MODEL, REWARD, scale=SCALE, num=NUM, steps=STEPS, **settings)
    values = jax.vmap(lambda key: run(key).log_norm)(jax.random.split(jax.random.key(6), RUNS))
    score, _, _ = deviation(np.asarray(values), truths[1.0])
    assert abs(score) < 5


@pytest.mark.slow
def test_schedules_of_published_methods_scale_with_the_steps():
    key = jax.random.key(0)
    run = lambda method, steps: method(key, MODEL, REWARD, scale=SCALE, num=8, steps=steps).trace
    for steps in (2, 7, 12, 100):
        weighs = tj.weighted.SMC(
            MODEL, DPS, num=8, steps=steps, schedule=P.ResampleFractions(0.2, 0.4, 0.6, 0.8)
        ).weighs
        wanted = {min(round(steps * i / 5), steps - 2) for i in range(1, 5)}
        assert set(np.flatnonzero(weighs)) == wanted
        assert set(np.flatnonzero(run(tj.fk_steering, steps).resampled)) <= wanted
    np.testing.assert_allclose(run(tj.das, 100).tempering[:5], 1.008 ** np.arange(5) - 1)
    assert run(tj.das, 10).tempering[-2] == 1
    with pytest.raises(ValueError, match="tempering must end at one"):
        tj.das(key, MODEL, REWARD, scale=SCALE, num=8, steps=STEPS, gamma=0.008)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    "rule", [T.Exponential(), T.Exponential(0.008, 100), T.Polynomial(0.5)], ids=repr
)
def test_factors_rise_to_one_to_the_last_bit(rule, steps):
    factors = np.asarray(rule.factors(steps))
    assert factors.shape == (steps,)
    assert np.all(np.diff(factors) > 0)
    assert factors[-1] == 1
    assert factors[0] == (1 if steps == 1 else 0)


@pytest.mark.slow
def test_rewards_without_a_gradient_steer():
    """A jump has no gradient, and neither method asks for one."""
    jump = tj.external.from_numpy(lambda x: np.where(x[:, 0] > 0, 0.0, -2.0))
    for method in (tj.fk_steering, functools.partial(tj.svdd, children=3)):
        particles = method(jax.random.key(1), MODEL, jump, num=400, steps=STEPS)
        mass = particles.mean(lambda x: x[0] > 0)
        assert abs(mass - 1 / (1 + math.exp(-2))) < 5 * 0.5 / 400**0.5


@pytest.mark.parametrize(  # one evaluation, children, tempering, a twist
    "row", [0, *(pytest.param(row, marks=pytest.mark.slow) for row in (3, 4, 21))]
)
def test_the_loop_can_be_written_by_hand(row):
    guidance, proposal, potential, resample, threshold, temper, over = ROWS[row]
    settings = {
        "num": NUM, "steps": STEPS, "proposal": proposal, "potential": potential,
        "resample": resample, "ess_threshold": threshold, "tempering": temper,
    } | over  # fmt: skip
    key = jax.random.key(3)
    run = tj.weighted.SMC(MODEL, guidance, **settings)
    keys = run.keys(key)
    state, info = tj.weighted.init(keys[0], run)
    infos = [info]
    for keys_step in keys[1:-1]:
        state, info = tj.weighted.step(keys_step, run, state)
        infos.append(info)
    particles = tj.weighted.finish(keys[-1], run, state)
    expected = tj.smc(key, MODEL, guidance, **settings)
    np.testing.assert_allclose(particles.x, expected.x, rtol=1e-9)
    np.testing.assert_allclose(particles.log_weights, expected.log_weights, atol=1e-9)
    np.testing.assert_allclose(particles.log_norm, expected.log_norm, atol=1e-9)
    np.testing.assert_array_equal(particles.trace.roots, expected.trace.roots)
    ess = [float(info.ess) for info in infos[1:]] + [float(particles.ess)]
    np.testing.assert_allclose(ess, expected.trace.ess, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"proposal": proposals.Children(2)}])
def test_a_constant_of_the_reward_changes_no_weight_of_a_constrained_run(settings):
    def run(offset):
        reward = lambda x: jnp.where(x[0] > 0, jax.nn.log_sigmoid(x[1]) + offset, -jnp.inf)
        outside = tj.dps(MODEL, tj.rewards.ValueOnly(reward), 1.0)
        return tj.smc(
            jax.random.key(7), MODEL, outside, num=500, steps=STEPS, **{"proposal": BASE} | settings
        )

    plain = run(0.0)
    for offset in (-30.0, 30.0):
        shifted = run(offset)
        np.testing.assert_array_equal(shifted.trace.roots, plain.trace.roots)
        np.testing.assert_allclose(shifted.log_norm - offset, plain.log_norm, atol=1e-9)


@pytest.mark.slow
def test_constraints_and_failures_are_told():
    outside = tj.dps(MODEL, lambda x: jnp.where(x[0] > 0, 0.0, -jnp.inf), 1.0)
    # What the twist excludes too early is not excluded: half of the mass is allowed in the end,
    # whatever the settings.
    for settings in (
        {},
        {"proposal": proposals.Children(2)},
        {"tempering": T.Exponential()},
        {"potential": P.Max()},
    ):
        right = tj.smc(
            jax.random.key(7),
            MODEL,
            outside,
            num=2000,
            steps=STEPS,
            **{"proposal": BASE} | settings,
        )
        assert np.all(np.asarray(right.resample(jax.random.key(0)))[:, 0] > 0)
        assert abs(float(right.log_norm) - np.log(0.5)) < 0.2
    nowhere = tj.dps(MODEL, lambda x: jnp.where(x[0] > 1e6, 0.0, -jnp.inf), 1.0)
    with pytest.raises(FloatingPointError, match=r"step 19 .*no particle has a weight"):
        tj.smc(jax.random.key(7), MODEL, nowhere, num=20, steps=STEPS, proposal=BASE)
    broken = tj.dps(MODEL, lambda x: jnp.log(x[1]), 1.0)
    with pytest.raises(FloatingPointError, match="the reward's value"):
        tj.smc(jax.random.key(7), MODEL, broken, num=20, steps=STEPS, proposal=BASE)
    hard = tj.dps(MODEL, REWARD, 30.0)
    for threshold in (0, 1e-6):
        with pytest.warns(UserWarning, match="Laplace") as warned:
            tj.smc(jax.random.key(7), MODEL, hard, num=500, steps=STEPS, ess_threshold=threshold)
        assert warned[0].filename == __file__  # the line of the user
    assert not tj.audit(jax.random.key(7), MODEL, hard, num=500, steps=STEPS).reliable  # no warning


def test_a_last_step_that_undoes_the_twists_is_a_warning():
    """The twist promises a reward that the particles do not have."""
    twist = tj.dps(MODEL, lambda x: 30 * x[0], 1.0)
    with pytest.warns(UserWarning, match="effective sample size|log Z by -") as warned:
        tj.smc(jax.random.key(7), MODEL, DPS, num=200, steps=STEPS, twist=twist)
    assert str(warned[0].message).startswith("the last step changes log Z by -")
    assert "The twist promises" in str(warned[0].message)
    assert warned[0].filename == __file__
    # A reward is promised truly, but counted at several steps; a constant favors no particle.
    with pytest.warns(
        UserWarning, match=r"log Z by -.*Max\(\) counts the twist once for each step"
    ):
        tj.fk_steering(jax.random.key(7), MODEL, lambda x: 10.0 * x[0], num=20, steps=STEPS)
    tj.fk_steering(jax.random.key(7), MODEL, lambda x: 10.0 + 0 * x[0], num=20, steps=STEPS)


@pytest.mark.slow
@pytest.mark.optimized
def test_laplace_twists_of_a_bounded_reward():
    """Four rotated modes and a classifier: a twist that extrapolates its reward linearly has all
    mass in one mode, and log Z -277.
    """
    rotated = lambda a, e: (
        (r := np.asarray([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])) @ (np.diag(e) @ r.T)
    )
    prior = tj.GaussianMixture(
        [0.4, 0.3, 0.2, 0.1],
        [[-2.5, 0.0], [2.5, 0.5], [0.0, 3.0], [1.0, -3.0]],
        np.stack(
            [
                rotated(a, e)
                for a, e in zip(
                    (0.3, 1.0, 2.0, -0.5),
                    ((0.8, 0.1), (0.5, 0.3), (0.2, 0.6), (0.4, 0.05)),
                    strict=True,
                )
            ]
        ),
    )
    model = tj.Analytic(prior)
    twist = tj.Laplace(model, lambda x: jax.nn.log_sigmoid(4 * (x[0] + x[1] - 1)), 2.0)
    particles = tj.smc(jax.random.key(1), model, twist, num=4000, steps=100)
    masses = np.asarray(tj.metrics.mode_weights(particles, prior))
    np.testing.assert_allclose(masses, [0.001, 0.601, 0.398, 0.0], atol=0.05)
    assert abs(float(particles.log_norm) + 0.748) < 0.05
    assert float(particles.trace.ess.min()) > 2000


def test_bad_input_says_what_to_do():
    run = lambda guidance=DPS, **kw: tj.smc(
        jax.random.key(0), MODEL, guidance, **{"num": 10, "steps": 5} | kw
    )
    with pytest.raises(ValueError, match="only the noise of a step can be weighed, but Heun"):
        run(solver=tj.Heun())
    for wrong in (lambda key, w: w, lambda key, w: jnp.arange(3)):
        with pytest.raises(ValueError, match=r"integer ancestors of shape \(10,\), got"):
            run(resample=wrong)
    with pytest.raises(ValueError, match="eta = 0"):
        run(solver=tj.Ancestral(0.0))
    for threshold in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"ess_threshold must lie in \[0, 1\]"):
            run(ess_threshold=threshold)
    with pytest.raises(ValueError, match="no step to weigh at"):
        run(schedule=tj.weighted.potentials.ResampleSchedule(5, start=7))
    with pytest.raises(ValueError, match="holds no step"):
        tj.weighted.potentials.ResampleSchedule(5, start=7, stop=3)
    with pytest.raises(ValueError, match="tempering must end at one"):
        run(tempering=T.Polynomial(1.0, gamma=0.01))
    with pytest.raises(ValueError, match="AdaptiveTempering is for Difference"):
        run(tempering=T.AdaptiveTempering(), potential=P.Max(), ess_threshold=1.0)
    with pytest.raises(ValueError, match="needs ess_threshold above it"):
        run(tempering=T.AdaptiveTempering(0.7), ess_threshold=0.5)
    with pytest.raises(ValueError, match="times must end there"):
        run(steps=None, times=jnp.linspace(1e-3, 0.9, 5))
    with pytest.raises(ValueError, match="must start at t > 0"):
        run(steps=None, times=jnp.linspace(0, 1, 5))
    # On a table of levels t = 0 is a level like any other.
    interpolant = tj.DiscreteVP(np.cumprod(1 - np.linspace(0.01, 0.6, 17)))
    levels = tj.Analytic(PROBLEM.prior, interpolant)
    times = jnp.append(interpolant.clock(jnp.arange(16.0, -1.0, -2.0)), 1.0)
    assert np.isfinite(
        tj.smc(jax.random.key(0), levels, tj.dps(levels, REWARD, 0.1), num=10, times=times).log_norm
    )
    with pytest.raises(ValueError, match="another model"):
        run(twist=tj.dps(tj.Analytic(PROBLEM.prior, tj.Linear(2.0)), REWARD, 1.0))
    with pytest.raises(ValueError, match="got no fraction: pass one"):
        tj.weighted.potentials.ResampleFractions()
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match=f"index of a step, from 0, got {wrong}"):
            tj.weighted.potentials.ResampleSchedule(5, start=wrong)
    with pytest.raises(ValueError, match=r"got Children\(3\): use one Children with the product"):
        proposals.Children(2, proposals.Children(3))
    with pytest.raises(TypeError, match="proposal must be a Proposal"):
        run(proposal="base")
    with pytest.raises(ValueError, match="weighted"):
        tj.best_of_n(run(), REWARD, 2)
