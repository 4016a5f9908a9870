"""Weighted populations. Tiers: exact (float64, 1e-10), statistical (5 standard errors)."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from tiltjax.particles import CAUSES, Failures, Particles, Trace, unweighted
from tiltjax.samplers import best_of_n

X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2)))
LOG_WEIGHTS = jnp.asarray([-2.0, 0.5, 1.0, -jnp.inf, 3.0, 0.0, -1.0])


def weights():
    w = np.exp(np.asarray(LOG_WEIGHTS))
    return w / w.sum()


@pytest.mark.parametrize("shift", [0.0, 800.0, -800.0])
def test_weights_mean_and_ess(shift):
    particles, w = Particles(X, LOG_WEIGHTS + shift), weights()
    chex.assert_trees_all_close(particles.weights, w, rtol=1e-10)
    chex.assert_trees_all_close(particles.ess, 1 / np.sum(w**2), rtol=1e-10)
    chex.assert_trees_all_close(particles.mean(), w @ np.asarray(X), rtol=1e-10)
    chex.assert_trees_all_close(
        particles.mean(lambda x: x[0] ** 2), w @ np.asarray(X)[:, 0] ** 2, rtol=1e-10
    )
    assert len(particles) == 7


def test_arrays_of_any_byte_order_and_whole_log_weights_are_read():
    x, whole = np.asarray(X)[:3], np.asarray([0, 1, -1])
    usual = Particles(jnp.asarray(x), jnp.asarray(whole, jnp.float64), log_prob=jnp.zeros(3))
    foreign = Particles(x.astype(">f8"), whole.astype(">i8"), log_prob=np.zeros(3, ">f8"))
    for found in (foreign, Particles(x, jnp.asarray(whole)), Particles(x, whole.astype(">f8"))):
        chex.assert_trees_all_close(found.mean(), usual.mean(), rtol=1e-12)
        chex.assert_trees_all_close(found.ess, usual.ess, rtol=1e-12)
    counts = Particles(np.arange(3), whole)  # integers with integers for weights
    chex.assert_trees_all_close(counts.mean(), usual.weights @ jnp.arange(3.0), rtol=1e-12)
    chex.assert_trees_all_close(foreign.resample(jax.random.key(0)).shape, (3, 2))


def test_several_runs_have_an_effective_sample_size_each_and_no_common_mean():
    runs = jax.vmap(lambda shift: Particles(X + shift, shift * LOG_WEIGHTS, shift))(jnp.arange(3.0))
    one = lambda i: jax.tree.map(lambda leaf: leaf[i], runs)
    chex.assert_trees_all_close(runs.ess, jnp.stack([one(i).ess for i in range(3)]), rtol=1e-12)
    for call in (runs.mean, runs.standard_error, runs.interval, runs.log_norm_interval):
        with pytest.raises(ValueError, match=r"several runs: take one, jax\.tree\.map"):
            call()
    with pytest.raises(ValueError, match="several runs: take one"):
        _ = runs.num_roots


def test_an_unweighted_population():
    particles = unweighted(X)
    chex.assert_trees_all_close(particles.ess, 7.0, rtol=1e-12)
    assert particles.log_norm is None
    assert unweighted(X.astype(jnp.float32)).log_weights.dtype == jnp.float32
    assert unweighted(X.astype(jnp.bfloat16)).log_weights.dtype == jnp.float32


@pytest.mark.parametrize("num", [1, 5, 7, 200])
def test_systematic_counts_are_within_one_of_their_expectation(num):
    chosen = np.asarray(Particles(X, LOG_WEIGHTS).resample(jax.random.key(num), num))
    assert chosen.shape == (num, 2)
    counts = np.array([np.sum(np.all(chosen == x, axis=1)) for x in np.asarray(X)])
    assert counts.sum() == num
    expected = num * weights()
    assert np.all(counts >= np.floor(expected - 1e-9))
    assert np.all(counts <= np.ceil(expected + 1e-9))


def test_resampling_is_unbiased_and_exchangeable():
    particles = Particles(X, LOG_WEIGHTS)
    keys = jax.random.split(jax.random.key(0), 4000)
    first = np.asarray(jax.jit(jax.vmap(lambda key: particles.resample(key, 3)[0]))(keys))
    counts = np.array([np.mean(np.all(first == x, axis=1)) for x in np.asarray(X)])
    expected = weights()
    standard = np.sqrt(expected * (1 - expected) / len(keys))
    assert np.all(np.abs(counts - expected) <= 5 * standard)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("where", [0, 3, 6])
def test_one_particle_with_all_the_weight(where, dtype):
    log_weights = jnp.full(7, -jnp.inf, dtype).at[where].set(-3.0)
    chosen = Particles(X.astype(dtype), log_weights).resample(jax.random.key(1), 50)
    chex.assert_trees_all_equal(chosen, jnp.broadcast_to(X.astype(dtype)[where][None], (50, 2)))


def test_many_single_precision_weights_never_pick_one_without_weight():
    """A float32 cumulative sum of 1e5 equal weights does not end at one; the last particles, of no
    weight, stay out.
    """
    n = 100_000
    log_weights = jnp.zeros(n + 10, jnp.float32).at[n:].set(-jnp.inf)
    x = jnp.arange(n + 10, dtype=jnp.float32)[:, None]
    chosen = Particles(x, log_weights).resample(jax.random.key(0), n)
    assert float(chosen.max()) < n


def test_resampling_keeps_single_precision():
    assert Particles(X.astype(jnp.float32), LOG_WEIGHTS.astype(jnp.float32)).resample(
        jax.random.key(0)
    ).shape == (7, 2)


@pytest.mark.parametrize("cause", CAUSES)
def test_a_trace_names_the_first_failed_step_and_its_cause(cause):
    now, later = jnp.arange(5) == 2, jnp.arange(5) == 3
    failed = Failures.of(**{cause: now}).then(Failures.of(**dict.fromkeys(CAUSES, later)))
    assert [bool(getattr(failed, name)[2]) for name in CAUSES] == [name == cause for name in CAUSES]
    trace = Trace(jnp.linspace(0.0, 1.0, 6), failed)
    with pytest.raises(FloatingPointError) as error:
        trace.check()
    assert "step 2 of 5, from t = 0.4" in str(error.value)
    assert CAUSES[cause] in str(error.value)
    Trace(trace.times, Failures.of(**{cause: jnp.zeros(5, bool)})).check()
    with pytest.raises(ValueError, match="trace is that of several runs"):
        jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), trace).check()


def test_a_trace_that_cannot_be_read_is_checked_by_the_caller():
    trace = Trace(jnp.linspace(0.0, 1.0, 6), Failures.of(shift=jnp.arange(5) == 2))

    def checked(trace):
        trace.check()
        return trace

    with pytest.raises(FloatingPointError, match="step 2 of 5"):
        jax.jit(checked)(trace).check()


def test_particles_without_a_record_of_ancestors_are_their_own_roots():
    x, failed = jnp.zeros((4, 2)), Failures.of(shift=jnp.zeros(1, bool))
    record = lambda roots: Particles(x, jnp.zeros(4), trace=Trace(jnp.ones(2), failed, roots=roots))
    assert int(unweighted(x).num_roots) == int(record(None).num_roots) == 4
    assert int(record(jnp.asarray([1, 1, 3, 1])).num_roots) == 2


def test_a_population_is_a_pytree():
    particles = Particles(X, LOG_WEIGHTS, jnp.asarray(1.0))
    doubled = jax.jit(lambda p: jax.tree.map(lambda leaf: 2 * leaf, p))(particles)
    chex.assert_trees_all_equal(doubled.x, 2 * X)


def test_means_of_conditions_and_counts_are_numbers():
    particles = Particles(
        jnp.asarray([[-1.0], [1.0], [2.0], [3.0]]), jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    )
    for fn in (lambda x: x[0] > 0, lambda x: jnp.sum(x > 0)):
        np.testing.assert_allclose(particles.mean(fn), 0.6, rtol=1e-12)
        np.testing.assert_allclose(
            particles.standard_error(fn), np.sqrt(0.16 * 0.36 + 0.16 * 0.14), rtol=1e-12
        )
    with pytest.raises(ValueError, match="weighted"):
        best_of_n(particles, lambda x: x[0], 2)


def test_a_particle_without_weight_contributes_nothing_also_if_its_value_is_infinite():
    particles = Particles(jnp.array([[1.0], [2.0], [9.0]]), jnp.array([0.0, 0.0, -jnp.inf]))
    allowed = lambda x: jnp.where(x[0] < 5, x[0], -jnp.inf)
    assert float(particles.mean(allowed)) == 1.5
    assert abs(float(particles.standard_error(allowed)) - 0.125**0.5) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e7])
def test_the_effective_sample_size_does_not_depend_on_a_common_offset(offset, dtype):
    assert abs(float(particles_of(jnp.zeros(100), offset, dtype).ess) - 100) < 1e-3
    uneven = particles_of(jnp.where(jnp.arange(100) < 50, 0.0, -jnp.inf), offset, dtype)
    assert abs(float(uneven.ess) - 50) < 1e-3


def particles_of(log_weights, offset, dtype):
    log_weights = (log_weights + offset).astype(dtype)
    return Particles(jnp.zeros((len(log_weights), 1), dtype), log_weights)


# Intervals: four particles, with the probability .6 of x > 0.
FOUR = jnp.asarray([[-1.0], [1.0], [2.0], [3.0]])
LOG_FOUR = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
# The sums of the residuals: of the condition x > 0, and of x.
SUMS = {
    None: ([-0.24, 0.12, 0.08, 0.04], [-0.4 * 1.6, 0.3 * 0.4, 0.2 * 1.4, 0.1 * 2.4]),
    (2, 2, 1, 1): ([-0.12, 0.12], [-0.52, 0.52]),
    (3, 0, 0, 0): ([-0.24, 0.24], [-0.64, 0.64]),
}


def descending(x, log_weights, roots=None):
    trace = Trace(jnp.linspace(0.0, 1.0, 3), Failures.none())
    if roots is not None:
        trace = Trace(trace.times, trace.failed, roots=jnp.asarray(roots))
    return Particles(jnp.asarray(x), jnp.asarray(log_weights), jnp.asarray(0.5), trace)


def quietly(method, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(method(*args, **options))


@pytest.mark.parametrize("roots", SUMS)
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_by_hand(roots, level):
    particles = descending(FOUR, LOG_FOUR, roots)
    for fn, mean, sums in zip(
        (lambda x: x[0] > 0, lambda x: x[0]), (0.6, 0.6), SUMS[roots], strict=True
    ):
        s = np.array(sums)
        support = np.sum(s**2) ** 2 / np.sum(s**4)
        half = stats.t.ppf((1 + level) / 2, support) * np.sqrt(np.sum(s**2))
        ends = np.array([mean - half, mean + half])
        if fn(FOUR[0]).dtype == bool:
            ends = expit(logit(mean) + np.array([-half, half]) / (mean * (1 - mean)))
        np.testing.assert_allclose(particles.support(fn), support, rtol=1e-10)
        np.testing.assert_allclose(quietly(particles.interval, fn, level), ends, rtol=1e-10)
    # Of values in {0, 1}, and of entries.
    number = lambda x: jnp.where(x > 0, 1.0, 0.0)
    both = lambda x: jnp.stack([x[0], (x[0] > 0).astype(float)])
    of = lambda fn: quietly(particles.interval, fn, level)
    np.testing.assert_allclose(of(number)[:, 0], of(lambda x: x[0] > 0), rtol=1e-12)
    np.testing.assert_allclose(of(both)[:, 0], of(None)[:, 0], rtol=1e-12)
    np.testing.assert_allclose(of(both)[:, 1], of(lambda x: x[0] > 0), rtol=1e-12)
    s = np.array([0.4, 0.3, 0.2, 0.1])
    s = (s if roots is None else np.bincount(roots, s, 4)) - 0.25
    half = stats.t.ppf((1 + level) / 2, np.sum(s**2) ** 2 / np.sum(s**4)) * np.sqrt(np.sum(s**2))
    ends = quietly(particles.log_norm_interval, level)
    np.testing.assert_allclose(ends, [0.5 - half, 0.5 + half], rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_the_interval_of_the_complement_is_the_mirror_image(dtype, offset):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(60, 1)), dtype)
    log_weights = jnp.asarray(np.round(3 * rng.normal(size=60)) + offset, dtype)
    for roots in (None, rng.integers(12, size=60)):
        particles = descending(x, log_weights, roots)
        for bound in (-9.0, -1.0, 0.0, 1.5, 9.0):
            low, high = quietly(particles.interval, lambda x, b=bound: x[0] < b)
            mirrored = quietly(particles.interval, lambda x, b=bound: x[0] >= b)
            np.testing.assert_allclose(
                [low, high], 1 - mirrored[::-1], atol=100 * float(jnp.finfo(dtype).eps)
            )
            assert 0 <= low < high <= 1
            assert low.dtype == dtype


def test_an_event_of_no_particle_or_all_has_the_interval_of_independent_trials():
    """With equal weights, that of Clopper and Pearson; otherwise with the effective number of
    initial particles.
    """
    low, high = quietly(unweighted(X).interval, lambda x: x[0] > 100)
    np.testing.assert_allclose([low, high], [0, 1 - 0.025 ** (1 / 7)], rtol=1e-12)
    for roots, num in ((None, 1 / 0.3), ((0, 0, 1, 1), 1 / 0.58), ((0, 0, 0, 0), 1)):
        particles = descending(FOUR, LOG_FOUR, roots)
        none = quietly(particles.interval, lambda x: x[0] > 100, 0.9)
        every = quietly(particles.interval, lambda x: x[0] < 100, 0.9)
        np.testing.assert_allclose(none, [0, 1 - 0.05 ** (1 / num)], rtol=1e-12)
        np.testing.assert_allclose(every, [0.05 ** (1 / num), 1], rtol=1e-12)
        assert float(particles.support(lambda x: x[0] > 100)) == (num == 1)


def test_one_initial_particle_says_nothing():
    alone = (
        descending(FOUR, LOG_FOUR, (2, 2, 2, 2)),
        descending(FOUR, jnp.asarray([0.0, 1.0, -jnp.inf, -jnp.inf]), (2, 2, 1, 0)),
        Particles(FOUR[:1], LOG_FOUR[:1], jnp.asarray(0.5)),
    )
    for particles in alone:
        assert np.isinf(particles.standard_error()).all()
        assert float(particles.support(lambda x: x[0])) == 1
        np.testing.assert_array_equal(quietly(particles.interval), [[-np.inf], [np.inf]])
        np.testing.assert_array_equal(quietly(particles.log_norm_interval), [-np.inf, np.inf])
    low, high = quietly(alone[0].interval, lambda x: x[0] > 0)
    assert (low, high) == (0, 1)


def test_intervals_of_infinite_values_nan_and_tokens():
    particles = descending(jnp.append(FOUR, 9), jnp.append(LOG_FOUR, -jnp.inf))
    allowed = lambda x: jnp.where(x < 5, x, -jnp.inf)
    ends = quietly(descending(FOUR, LOG_FOUR).interval)[:, 0]
    np.testing.assert_allclose(quietly(particles.interval, allowed), ends, rtol=1e-12)
    broken = lambda x: jnp.where(x > 2, jnp.nan, x)
    assert np.isnan([*particles.interval(broken), particles.support(broken)]).all()
    tokens = descending(FOUR.astype(int) % 2, LOG_FOUR)
    ends = quietly(descending(FOUR, LOG_FOUR).interval, lambda x: x % 2 == 1)
    np.testing.assert_allclose(quietly(tokens.interval), ends, rtol=1e-12)


def test_digits_of_a_common_offset_and_of_small_weights_remain():
    particles = descending(jnp.float32(FOUR) + 2**23, jnp.float32(LOG_FOUR))
    np.testing.assert_allclose(particles.support(), descending(FOUR, LOG_FOUR).support(), rtol=1e-5)
    rare = descending(jnp.float32(FOUR), jnp.asarray([0, 0, -60, -60], jnp.float32))
    np.testing.assert_allclose(rare.support(lambda x: x[0] > 1), 4, rtol=1e-5)


def test_an_interval_warns_of_a_small_support_at_the_line_of_the_user():
    x = jnp.arange(1000.0)[:, None]
    with pytest.warns(UserWarning, match="support of 15 initial particles") as warned:
        unweighted(x).interval(lambda x: x[0] < 15)
    assert warned[0].filename == __file__
    unweighted(x).interval(lambda x: x[0] < 20)
    unweighted(x).interval(lambda x: x)
    with pytest.warns(UserWarning, match="support of 15"):
        unweighted(x).interval(lambda x: jnp.stack([x[0] < 15, x[0] < 200]))


def test_intervals_are_numbers():
    particles = descending(FOUR, LOG_FOUR)
    support = jax.jit(lambda p: p.support())(particles)
    np.testing.assert_allclose(support, particles.support(), rtol=1e-12)
    for call in (lambda p: p.interval(), lambda p: p.log_norm_interval()):
        with pytest.raises(ValueError, match="outside of jit, vmap and grad"):
            jax.jit(call)(particles)
    with pytest.raises(ValueError, match="level must lie in"):
        particles.interval(level=95)
    with pytest.raises(ValueError, match="do not estimate a normalizing constant"):
        unweighted(X).log_norm_interval()


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_intervals_cover_as_often_as_their_level(p):
    """The descendants of 300 initial particles have the event together, with the probability p, and
    another value and weights in common.
    """
    rng, runs, num = np.random.default_rng(0), 300, 300
    covered = []
    for _ in range(runs):
        sizes = rng.multinomial(3 * num, np.full(num, 1 / num))
        roots = np.repeat(np.arange(num), sizes)
        event, value = rng.random(num) < p, rng.exponential(size=num)
        x = np.stack([event, value], 1)[roots]
        log_weights = (
            (rng.normal(size=num) - 0.5)[roots] - np.log(sizes[roots]) + 0.1 * value[roots]
        )
        particles = descending(x, log_weights, roots)
        low, high = quietly(particles.interval)
        right = np.array([p, 1 / 0.9])
        covered.append((low <= right) & (right <= high))
    share, error = np.mean(covered, axis=0), np.sqrt(0.95 * 0.05 / runs)
    assert np.all(np.abs(share - 0.95) < 5 * error)
