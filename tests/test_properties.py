"""What holds exactly, whatever the numbers: searched for counterexamples by Hypothesis. Tier:
exact.

Numbers are drawn and shapes are few, so that one program serves all examples of a property. The
search is the same every time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts
from hypothesis import given, settings
from hypothesis import strategies as st

import theory
import tiltjax as tj
from tiltjax import resampling, rewards
from tiltjax.particles import Particles, unweighted, weight_dtype

K, D, NUM, STEPS = 3, 2, 4, 3
few = settings(derandomize=True, database=None, deadline=None, max_examples=8)
# A compiled run an example.
fewer = settings(few, max_examples=3)

seeds = st.integers(0, 2**31 - 1)
sizes = st.floats(1e-2, 1e2)
scales = st.floats(0.0, 4.0)
times = st.floats(0.02, 0.98)
close = functools.partial(np.testing.assert_allclose, rtol=1e-8)


def points(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def rotation(seed):
    return jnp.linalg.qr(points(seed, D, D))[0]


@st.composite
def mixtures(draw):
    """Three components in the plane, of any size and anywhere."""
    size, shift = draw(sizes), draw(st.floats(-5.0, 5.0))
    base = contracts.random_mixture(K, D, draw(seeds))
    return tj.GaussianMixture(base.weights, size * (base.means + shift), size**2 * base.covs)


def moved(mixture, matrix, shift):
    """The law of `matrix X + shift`."""
    covs = matrix @ mixture.covs @ matrix.T
    return tj.GaussianMixture(
        mixture.weights, mixture.means @ matrix.T + shift[None], (covs + covs.mT) / 2
    )


def unit(mixture):
    """The spread of a mixture, and points about it."""
    return jnp.sqrt(jnp.trace(mixture.cov()))


def reward_for(mixture, seed=0):
    """A quadratic one, of order one on the mixture."""
    return rewards.Quadratic(
        mixture.mean() + unit(mixture) * points(seed, D), 1 / unit(mixture) ** 2
    )


# Mixtures and their closed forms.


@jax.jit
def seen(mixture, t, x):
    """What a model, a tilt and h say."""
    path = tj.Linear()
    post = mixture.condition(path.alpha(t), path.sigma(t), x)
    return (
        mixture.log_prob(x),
        mixture.mean(),
        mixture.cov(),
        tj.Analytic(mixture).denoise(t, x),
        post.mean(),
        post.cov(),
    )


@few
@given(mixtures(), seeds, times, st.permutations(range(K)))
def test_components_have_no_order(mixture, seed, t, order):
    other = tj.GaussianMixture(
        *(part[np.asarray(order)] for part in (mixture.weights, mixture.means, mixture.covs))
    )
    x = mixture.mean() + unit(mixture) * points(seed, D)
    for a, b in zip(seen(mixture, t, x), seen(other, t, x), strict=True):
        close(a, b, atol=1e-9 * float(unit(mixture)) ** 2)


@few
@given(mixtures(), seeds, times)
def test_a_denoiser_turns_and_shifts_with_the_data(mixture, seed, t):
    q, shift = rotation(seed), unit(mixture) * points(seed, D)
    x = points(seed + 1, D) * unit(mixture)
    here = tj.Analytic(mixture).denoise(t, x)
    there = tj.Analytic(moved(mixture, q, shift)).denoise(t, q @ x + t * shift)
    close(there, q @ here + shift, atol=1e-8 * float(unit(mixture) + 1))


@few
@given(mixtures(), seeds, times, sizes)
def test_a_denoiser_grows_with_the_data_and_the_noise(mixture, seed, t, factor):
    x = points(seed, D) * unit(mixture)
    zero = jnp.zeros(D)
    there = tj.Analytic(moved(mixture, factor * jnp.eye(D), zero), tj.Linear(factor)).denoise(
        t, factor * x
    )
    close(
        there,
        factor * tj.Analytic(mixture).denoise(t, x),
        atol=1e-8 * factor * float(unit(mixture) + 1),
    )


@few
@given(mixtures(), seeds, scales, scales)
def test_tilts_add_up(mixture, seed, one, two):
    reward = reward_for(mixture, seed)
    first = theory.tilt(mixture, reward, one)
    second, both = theory.tilt(first.mixture, reward, two), theory.tilt(mixture, reward, one + two)
    close(first.log_norm + second.log_norm, both.log_norm, atol=1e-9)
    close(second.mixture.mean(), both.mixture.mean(), atol=1e-9 * float(unit(mixture)))
    close(second.mixture.cov(), both.mixture.cov(), atol=1e-9 * float(unit(mixture)) ** 2)


@few
@given(mixtures(), seeds, scales)
def test_a_tilt_turns_and_shifts_with_prior_and_reward(mixture, seed, scale):
    reward, q, shift = reward_for(mixture, seed), rotation(seed), unit(mixture) * points(seed, D)
    here = theory.tilt(mixture, reward, scale)
    there = theory.tilt(
        moved(mixture, q, shift), rewards.Quadratic(q @ reward.target + shift, reward.weight), scale
    )
    close(there.log_norm, here.log_norm, atol=1e-8)
    close(there.mixture.mean(), q @ here.mixture.mean() + shift, atol=1e-8 * float(unit(mixture)))


@few
@given(mixtures(), seeds, times)
def test_at_scale_zero_there_is_no_tilt(mixture, seed, t):
    reward, x = reward_for(mixture, seed), points(seed, D) * unit(mixture)
    tilt = theory.tilt(mixture, reward, 0.0)
    close(tilt.log_norm, 0, atol=1e-12)
    close(tilt.mixture.mean(), mixture.mean(), atol=1e-12 * float(unit(mixture)))
    close(theory.log_h(mixture, reward, 0.0)(jnp.asarray(t), x), 0, atol=1e-12)
    model = tj.Analytic(mixture)
    close(
        tj.Tilted(model, reward, 0.0).denoise(jnp.asarray(t), x),
        model.denoise(jnp.asarray(t), x),
        atol=1e-9,
    )


@few
@given(mixtures(), seeds, scales, times)
def test_single_precision_says_the_same(mixture, seed, scale, t):
    reward, x = reward_for(mixture, seed), mixture.mean() + points(seed, D) * unit(mixture)
    low = tj._pytree.cast((mixture, reward), jnp.float32)
    wide, narrow = theory.tilt(mixture, reward, scale), theory.tilt(*low, scale)
    assert narrow.log_norm.dtype == jnp.float32
    close(narrow.log_norm, wide.log_norm, rtol=1e-4, atol=1e-3)
    close(narrow.mixture.mean(), wide.mixture.mean(), rtol=1e-4, atol=1e-3 * float(unit(mixture)))
    model = tj._pytree.cast(tj.Analytic(low[0]), jnp.float32)
    here = model.denoise(jnp.asarray(t, jnp.float32), x.astype(jnp.float32))
    assert here.dtype == jnp.float32
    close(
        here,
        tj.Analytic(mixture).denoise(jnp.asarray(t), x),
        rtol=1e-3,
        atol=1e-3 * float(unit(mixture)),
    )


# Guidances.

GUIDANCES = {
    name: build
    for name, build in contracts.all_guidances().items()
    if name in ("plug-in, exact, k=3", "damped", "dps", "laplace", "clipped", "capped")
}


@functools.cache
def compiled(name):
    """One call at eight states by `vmap`, and how to make it one by one."""
    build = GUIDANCES[name]

    def one(scale, key, t, x):
        guidance = build(
            tj.Analytic(contracts.planar()), rewards.Quadratic(contracts.TARGET), scale
        )
        return guidance(key, t, x, guidance.init(x))[0]

    return jax.jit(one), jax.jit(jax.vmap(one, (None, 0, None, 0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDANCES)
@few
@given(seed=seeds, scale=scales, t=times)
def test_a_guidance_sees_one_state_at_a_time_and_at_scale_zero_nothing(name, seed, scale, t):
    alone, together = compiled(name)
    keys, x, t = jax.random.split(jax.random.key(seed), NUM), points(seed, NUM, D), jnp.asarray(t)
    batch = together(jnp.asarray(scale), keys, t, x)
    for i in range(NUM):
        for a, b in zip(alone(jnp.asarray(scale), keys[i], t, x[i]), batch, strict=True):
            close(a, b[i], atol=1e-10)
    none = together(jnp.zeros(()), keys, t, x)
    close(none.tilted, none.denoised, atol=1e-12)
    close(none.log_h, 0, atol=1e-12)


# Verbs.

MODEL = tj.Analytic(contracts.planar())
GOAL = rewards.Quadratic(contracts.TARGET)


def guided(scale):
    return tj.PlugIn(tj.Exact(MODEL), GOAL, jnp.asarray(scale))


@pytest.mark.slow
@fewer
@given(seeds, st.floats(0.1, 3.0))
def test_a_particle_depends_on_its_index_and_the_key_alone(seed, scale):
    run = lambda num, **over: (
        tj.sample(jax.random.key(seed), MODEL, guided(scale), num=num, steps=STEPS, **over).x
    )
    whole = run(5)
    np.testing.assert_array_equal(whole, run(5))
    close(run(3), whole[:3], atol=1e-10)
    close(run(5, chunk_size=2), whole, atol=1e-10)
    assert np.all(np.abs(whole - np.roll(whole, 1, axis=0)) > 0)
    assert np.all(
        np.asarray(tj.sample(jax.random.key(seed + 1), MODEL, guided(scale), num=5, steps=STEPS).x)
        != whole
    )


@pytest.mark.slow
@fewer
@given(seeds)
def test_without_a_scale_verbs_leave_the_base(seed):
    key, grid = jax.random.key(seed), {"num": NUM, "steps": STEPS}
    close(tj.sample(key, MODEL, guided(0.0), **grid).x, tj.sample(key, MODEL, **grid).x, atol=1e-10)
    particles = tj.smc(key, MODEL, guided(0.0), **grid)
    close(particles.log_norm, 0, atol=1e-12)
    close(particles.weights, 1 / NUM, atol=1e-12)
    # Neither weighs what is the same everywhere.
    constant = tj.smc(key, MODEL, tj.dps(MODEL, rewards.LinearReward(jnp.zeros(D)), 2.0), **grid)
    close(constant.log_norm, 0, atol=1e-12)


@pytest.mark.slow
@fewer
@given(seeds, st.floats(0.1, 3.0))
def test_compiled_by_the_caller_or_not(seed, scale):
    run = lambda key, scale: tj.smc(key, MODEL, guided(scale), num=NUM, steps=STEPS)
    inside, outside = (f(jax.random.key(seed), jnp.asarray(scale)) for f in (jax.jit(run), run))
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        close(a, b, atol=1e-9)


# Selection, resampling, rewards, files.


@few
@given(seeds, st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
def test_selection_knows_rewards_by_their_order(seed, factor, shift):
    particles = unweighted(points(seed, 6, D))
    best = tj.best_of_n(particles, GOAL, 3).x
    offset = rewards.as_reward(lambda x: factor * GOAL(x) + shift)
    np.testing.assert_array_equal(tj.best_of_n(particles, offset, 3).x, best)
    np.testing.assert_array_equal(tj.best_of_n(particles, GOAL, 1).x, particles.x)
    np.testing.assert_array_equal(
        tj.softmax_of_n(jax.random.key(seed), particles, GOAL, 1, 2.0).x, particles.x
    )
    cold = tj.softmax_of_n(jax.random.key(seed), particles, GOAL, 3, 1e9).x
    np.testing.assert_array_equal(cold, best)


@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic", "residual", "ssp"])
@few
@given(seed=seeds, spread=st.floats(0.0, 30.0), shift=st.floats(-1e3, 1e3))
def test_ancestors_do_not_see_the_normalization(scheme, seed, spread, shift):
    resample, log_weights = getattr(resampling, scheme), spread * points(seed, 7)
    ancestors = np.asarray(resample(jax.random.key(seed), log_weights, 5))
    assert ancestors.shape == (5,)
    assert ancestors.dtype == np.int32
    np.testing.assert_array_equal(resample(jax.random.key(seed), log_weights + shift, 5), ancestors)
    share = 5 * np.asarray(jax.nn.softmax(log_weights))
    counts = np.bincount(ancestors, minlength=7)
    if scheme in ("systematic", "ssp"):
        assert np.all((counts >= np.floor(share - 1e-9)) & (counts <= np.ceil(share + 1e-9)))
    if scheme == "residual":
        assert np.all(counts >= np.floor(share - 1e-9))


@few
@given(seeds, st.floats(-3.0, 3.0), st.floats(0.01, 5.0))
def test_the_algebra_of_rewards(seed, factor, weight):
    x, y, a = points(seed, 3, D)
    scalar, linear = rewards.Quadratic(y, weight), rewards.LinearReward(a)
    for other in (
        rewards.Quadratic(y, weight * jnp.ones(D)),
        rewards.Quadratic(y, weight * jnp.eye(D)),
    ):
        close(other(x), scalar(x), rtol=1e-12)
    both = factor * scalar - linear
    close(both(x), factor * scalar(x) - linear(x), rtol=1e-12, atol=1e-12)
    # Conjugate: what is left besides <a, x> - c |x|^2 / 2 does not depend on x.
    natural, precision = both.conjugate()
    rest = lambda x: both(x) - natural @ x + precision * x @ x / 2
    close(rest(x), rest(jnp.zeros(D)), atol=1e-10)


@few
@given(seeds, st.floats(-3.0, 3.0))
def test_distances_are_distances(seed, shift):
    x, y = points(seed, 6, D), points(seed + 1, 6, D)
    move = jnp.asarray([[shift, 2.0]])
    order = np.random.default_rng(seed).permutation(6)
    close(tj.metrics.wasserstein(x, y), tj.metrics.wasserstein(y[order], x[order[::-1]]))
    close(tj.metrics.wasserstein(x, x + move), np.hypot(shift, 2))
    close(tj.metrics.wasserstein(x + move, y + move), tj.metrics.wasserstein(x, y))
    key = jax.random.key(seed)
    assert tj.metrics.sliced_wasserstein(key, x, y, 16) <= tj.metrics.wasserstein(x, y) + 1e-12
    close(tj.metrics.mmd(x, y, 1.0), tj.metrics.mmd(y[order], x, 1.0), atol=1e-12)


@pytest.mark.parametrize("path", contracts.paths())
@few
@given(t=times, seed=seeds)
def test_a_view_is_a_time_and_a_state(path, t, seed):
    line, t, x = contracts.paths()[path], jnp.asarray(t), points(seed, D)
    close(line.time(line.snr(t)), t, rtol=1e-7)
    # Asked at its own precision a state is itself.
    alpha, sigma = line.alpha(t), line.sigma(t)
    again, state = line.observe(line.snr(t), alpha / sigma**2 * x)
    close(again, t, rtol=1e-7)
    close(state, x, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@few
@given(seed=seeds, shape=st.lists(st.integers(1, 3), min_size=1, max_size=3), weighed=st.booleans())
def test_particles_survive_a_file(tmp_path_factory, dtype, seed, shape, weighed):
    x = points(seed, 2, *shape).astype(dtype)
    log_weights = points(seed, 2).astype(weight_dtype(jnp.dtype(dtype)))
    particles = Particles(x, log_weights, log_weights[0]) if weighed else unweighted(x)
    file = tmp_path_factory.mktemp("particles") / "saved"
    particles.save(file)
    again = tj.Particles.load(file)
    assert jax.tree.structure(again) == jax.tree.structure(particles)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(particles), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))
