"""What a caller may do around the library: look for NaN, use other keys, map, run threads, pickle,
and add a constant to a reward.

Tier: exact (float64, rounding).
"""

import concurrent.futures
import copy
import pickle

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import contracts

import theory
import tiltjax as tj
from tiltjax import weighted

KEY = jax.random.key(0)
TARGET = [0.5, 1.0]


class Velocity(eqx.Module):
    """The velocity of Gaussian data of standard deviation `width`."""

    width: jax.Array

    def __call__(self, t, x):
        variance = self.width**2
        return (t * (1 + variance) - 1) / (t**2 * variance + (1 - t) ** 2) * x


class Flax(nnx.Module):
    def __init__(self, dtype=jnp.float64):
        self.layer = nnx.Linear(2, 2, param_dtype=dtype, rngs=nnx.Rngs(0))

    def __call__(self, t, x):
        return t * self.layer(x)


def mixture(dtype=jnp.float64):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), contracts.planar())


def analytic(dtype=jnp.float64):
    return tj.Analytic(mixture(dtype))


def network(dtype=jnp.float64):
    return tj.from_velocity(Velocity(jnp.asarray(0.9, dtype)), shape=(2,), dtype=dtype)


def flax_network(dtype=jnp.float64):
    return tj.from_velocity(Flax(dtype), shape=(2,), dtype=dtype)


def quadratic(x):
    return -0.3 * jnp.sum((x - jnp.asarray(TARGET, x.dtype)) ** 2)


def logistic(x):
    return jax.nn.log_sigmoid(2 * (x[0] + x[1]))


def half(x):
    return jnp.where(x[0] > 0, 0.0, -jnp.inf).astype(x.dtype)


GUIDANCES = {
    "dps": lambda model, scale, reward=logistic: tj.dps(model, reward, scale),
    "laplace": lambda model, scale, reward=logistic: tj.Laplace(model, reward, scale),
    "plug-in": lambda model, scale, reward=logistic: tj.PlugIn(
        tj.Glass(model, 2), reward, scale, k=2
    ),
    "damped": lambda model, scale, reward=logistic: tj.PlugIn(
        tj.FlowMap(model, 2), reward, tj.Damped(scale, 0.6)
    ),
    "self-damped": lambda model, scale, reward=logistic: tj.PlugIn(
        tj.Glass(model, 2), reward, tj.SelfDamped(scale, model)
    ),
    "conjugate": lambda model, scale, reward=logistic: tj.Conjugate(
        model, reward, scale, variance=1.0
    ),
    "fmrg": lambda model, scale, reward=logistic: tj.fmrg(model, reward, scale),
    "clipped": lambda model, scale, reward=logistic: tj.guidance.Clipped(
        tj.dps(model, reward, scale), 1.0
    ),
}


def guided(name, model=analytic):
    def run(key, dtype, scale):
        base = model(dtype)
        return tj.sample(key, base, GUIDANCES[name](base, scale), num=3, steps=3).x

    return run


def solved(solver, interpolant=None, model=None):
    def run(key, dtype, scale):
        base = tj.Analytic(mixture(dtype), interpolant) if model is None else model(dtype)
        return tj.sample(key, base, num=3, steps=3, solver=solver).x

    return run


def tilted(interpolant=None, model=None):
    def run(key, dtype, scale):
        base = tj.Analytic(mixture(dtype), interpolant) if model is None else model(dtype)
        reward = tj.rewards.Quadratic(jnp.asarray(TARGET, dtype), 0.7)
        return tj.sample(key, tj.Tilted(base, reward, scale), num=3, steps=4).x

    return run


def weighted_run(guidance="laplace", **parts):
    def run(key, dtype, scale):
        base = analytic(dtype)
        particles = tj.smc(key, base, GUIDANCES[guidance](base, scale), num=8, steps=4, **parts)
        return particles.x, particles.log_weights, particles.log_norm

    return run


def published(method):
    def run(key, dtype, scale):
        particles = method(key, analytic(dtype), logistic, scale=scale, num=8, steps=6)
        return particles.x, particles.log_norm

    return run


def selected(select):
    def run(key, dtype, scale):
        return select(key, tj.sample(key, analytic(dtype), num=6, steps=2), scale).x

    return run


def token_run(key, dtype, scale):
    chain = tj.tokens.MarkovChain(jnp.asarray([0.6, 0.4], dtype), np.full((2, 2), 0.5, dtype), 3)
    guidance = tj.tokens.Completions(chain, lambda x: jnp.mean(x == 1, dtype=dtype), scale)
    particles = tj.smc(key, chain, guidance, num=8)
    return particles.x, particles.log_norm


def derivative(key, dtype, scale):
    def end(scale):
        base = analytic(dtype)
        return jnp.sum(tj.sample(key, base, GUIDANCES["laplace"](base, scale), num=2, steps=3).x)

    return jax.grad(end)(jnp.asarray(scale, dtype))


# Functions of (key, dtype, scale).
VERBS = {
    **{f"sample, {name}": guided(name) for name in GUIDANCES},
    "sample, network": guided("laplace", network),
    "sample, Flax": guided("dps", flax_network),
    "euler": solved(tj.Euler()),
    "ancestral": solved(tj.Ancestral(0.5), tj.VP()),
    "adaptive": solved(tj.Adaptive()),
    "tilted": tilted(),
    "tilted, VP": tilted(tj.VP()),
    "heun, VE": solved(tj.Heun(), tj.VE()),
    "tilted, VE": tilted(tj.VE()),
    "tilted, network": tilted(model=network),
    "smc": weighted_run(),
    "smc, children": weighted_run(proposal=weighted.proposals.Children(2)),
    "smc, max": weighted_run(potential=weighted.potentials.Max()),
    "smc, adaptive": weighted_run(
        tempering=weighted.tempering.AdaptiveTempering(), ess_threshold=1.0
    ),
    "fk_steering": published(tj.fk_steering),
    "das": published(tj.das),
    "tds": published(tj.tds),
    "svdd": published(tj.svdd),
    "best_of_n": selected(lambda key, particles, scale: tj.best_of_n(particles, logistic, 2)),
    "softmax_of_n": selected(
        lambda key, particles, scale: tj.softmax_of_n(key, particles, logistic, 2, scale)
    ),
    "log_prob": lambda key, dtype, scale: (
        tj.sample_with_log_prob(key, analytic(dtype), num=2, steps=2).log_prob
    ),
    "flow": lambda key, dtype, scale: tj.flow(
        analytic(dtype), jnp.ones(2, dtype) * jnp.asarray(scale, dtype), 1e-3, 1.0
    )(0.5),
    "tokens": token_run,
    "gradient": derivative,
}
# Functions that return reports or train, which no transformation takes.
WHOLE = {
    "audit": lambda key, dtype, scale: tj.audit(
        key, analytic(dtype), GUIDANCES["laplace"](analytic(dtype), scale), num=100, steps=3
    ).particles.log_weights,
    "gibbs": lambda key, dtype, scale: tj.gibbs(
        key, analytic(dtype), tj.rewards.Quadratic(TARGET, weight=[0.3, 0.6]), scale, num=4
    ).x,
    "calibrate": lambda key, dtype, scale: tj.calibrate(key, network(dtype), budget=128)(
        jnp.ones((), dtype)
    ),
    "optimize": lambda key, dtype, scale: tj.optimize(
        key, analytic(dtype), lambda x: -np.sum(x**2, axis=1), scale=scale, rounds=2, queries=4,
        num=8,
    ).x,
    "fit": lambda key, dtype, scale: tj.fit(
        key, Velocity(jnp.asarray(0.9, dtype)), np.ones((8, 2), dtype), steps=2
    ).network.width,
    "finetune": lambda key, dtype, scale: tj.finetune(
        key, Velocity(jnp.asarray(0.9, dtype)), network(dtype), quadratic, scale, steps=2,
        batch_size=4, times=jnp.linspace(1e-3, 1, 4),
        model=lambda net: tj.from_velocity(net, shape=(2,), dtype=dtype),
    ).network.width,
    "recommend": lambda key, dtype, scale: theory.recommend(
        mixture(dtype), tj.rewards.Quadratic(TARGET), scale, 50.0
    ).options[0].cost,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", VERBS | WHOLE)
def test_no_nan_on_the_way_in_either_precision(name, dtype):
    with jax.debug_nans(True):
        found = (VERBS | WHOLE)[name](KEY, jnp.dtype(dtype), 1.0)
    for leaf in jax.tree.leaves(found):
        leaf = np.asarray(leaf)
        assert np.all(np.isfinite(leaf))
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype in (dtype, np.float64)


@pytest.mark.nightly
@pytest.mark.parametrize("name", VERBS)
def test_mapped_over_keys_and_scales_it_is_the_loop(name):
    keys, scales = jax.random.split(KEY, 2), jnp.asarray([0.5, 2.0])
    run = lambda key, scale: VERBS[name](key, jnp.float64, scale)
    mapped = jax.vmap(run)(keys, scales)
    looped = [run(*each) for each in zip(keys, scales, strict=True)]
    chex.assert_trees_all_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *looped), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_keys_keep_the_first_particles_for_any_number_and_batch(impl):
    key, model = jax.random.key(0, impl=impl), analytic()
    plug_in = GUIDANCES["plug-in"](model, 1.0)
    run = lambda num, **batch: tj.sample(key, model, plug_in, num=num, steps=2, **batch).x
    few = run(3)
    np.testing.assert_allclose(run(7)[:3], few, rtol=1e-9)
    np.testing.assert_allclose(run(3, chunk_size=1), few, rtol=1e-9)
    assert len(np.unique(np.asarray(few))) == few.size


@pytest.mark.nightly
def test_two_threads_find_what_one_does():
    names = ["sample, laplace", "smc", "tokens", "flow"]
    run = lambda name: VERBS[name](KEY, jnp.float64, 1.0)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, names * 2))
    for found, name in zip(together, names * 2, strict=True):
        chex.assert_trees_all_equal(found, run(name))


COPIES = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("model", [analytic, network, flax_network])
def test_copies_of_models_guidances_and_particles_are_as_good(model, how):
    base = model()
    guidance = tj.Laplace(base, logistic, 1.0)
    expected = tj.sample(KEY, base, guidance, num=3, steps=2)
    base, guidance = COPIES[how]((base, guidance))
    found = tj.sample(KEY, base, guidance, num=3, steps=2)
    chex.assert_trees_all_equal(found.x, expected.x)
    particles = COPIES[how](tj.smc(KEY, base, guidance, num=8, steps=3))
    again = tj.smc(KEY, base, guidance, num=8, steps=3)
    chex.assert_trees_all_equal(particles, again)
    assert particles.ess == again.ess
    for half in eqx.partition(base, eqx.is_array):
        assert jax.tree.structure(COPIES[how](half)) == jax.tree.structure(half)


# A constant added to the reward.


@pytest.mark.slow
@pytest.mark.parametrize("offset", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("name", GUIDANCES)
def test_an_offset_of_the_reward_changes_samples_by_rounding_only(name, offset):
    model = analytic()

    def run(offset):
        guidance = GUIDANCES[name](model, 1.5, lambda x: logistic(x) + offset)
        return np.asarray(tj.sample(KEY, model, guidance, num=5, steps=3).x)

    # Half a unit in the last place of the offset, times the gain of a run.
    np.testing.assert_allclose(run(offset), run(0.0), rtol=0, atol=1e3 * offset * 2.0**-53)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [1e3, 1e5, 1e7])
@pytest.mark.parametrize(
    ("name", "threshold"),
    [("dps", 1.0), ("laplace", 0.0), ("laplace", 1.0), ("plug-in", 1.0), ("conjugate", 0.0)],
)
def test_an_offset_of_the_reward_moves_log_norm_by_scale_times_it(name, offset, threshold):
    model, scale = analytic(), 1.5

    def run(offset):
        guidance = GUIDANCES[name](model, scale, lambda x: logistic(x) + offset)
        return tj.smc(KEY, model, guidance, num=16, steps=4, ess_threshold=threshold)

    rounding = 1e3 * scale * offset * 2.0**-53
    plain, shifted = run(0.0), run(offset)
    np.testing.assert_allclose(shifted.x, plain.x, rtol=0, atol=rounding)
    np.testing.assert_allclose(shifted.weights, plain.weights, rtol=0, atol=rounding)
    np.testing.assert_allclose(
        shifted.log_norm - scale * offset, plain.log_norm, rtol=0, atol=rounding
    )


@pytest.mark.slow
@pytest.mark.parametrize("offset", [-1e3, 1e3])
@pytest.mark.parametrize("potential", ["Max", "Sum", "Immediate"])
def test_an_offset_of_the_reward_is_the_same_for_all_particles_under_every_potential(
    potential, offset
):
    """At 1e3, the last step takes much of log Z back from all particles, which is no warning."""
    model = analytic()
    parts = {"potential": getattr(weighted.potentials, potential)(), "ess_threshold": 1.0}

    def run(offset):
        guidance = GUIDANCES["dps"](model, 1.0, lambda x: logistic(x) + offset)
        return tj.smc(KEY, model, guidance, num=16, steps=4, **parts)

    plain, shifted = run(0.0), run(offset)
    np.testing.assert_allclose(shifted.x, plain.x, rtol=0, atol=1e-9)
    np.testing.assert_allclose(shifted.weights, plain.weights, rtol=0, atol=1e-9)
    np.testing.assert_allclose(shifted.log_norm - offset, plain.log_norm, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("name", ["dps", "laplace", "plug-in", "damped"])
def test_an_offset_in_single_precision_changes_a_run_by_the_rounding_of_the_reward(name, offset):
    """Without resampling: rounding may choose another ancestor."""
    model, scale = analytic(jnp.float32), 1.5

    def run(offset):
        guidance = GUIDANCES[name](model, scale, lambda x: logistic(x) + offset)
        return tj.smc(KEY, model, guidance, num=16, steps=4, ess_threshold=0.0)

    rounding = 4 * scale * offset * 2.0**-24  # of the few values that enter a weight
    plain, shifted = run(0.0), run(offset)
    np.testing.assert_allclose(shifted.x, plain.x, rtol=0, atol=rounding)
    np.testing.assert_allclose(shifted.weights, plain.weights, rtol=0, atol=rounding)
    found = float(shifted.log_norm) - scale * offset
    np.testing.assert_allclose(found, float(plain.log_norm), rtol=0, atol=rounding)
