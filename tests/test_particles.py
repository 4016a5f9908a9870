"""Weighted populations. Tiers: exact (float64, 1e-10), statistical (5 standard errors)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
