"""Guidances made of guidances.

Tiers: exact (float64, against what each is defined by).
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
from tiltjax import rewards

KEY, T, X = jax.random.key(3), jnp.asarray(0.4), jnp.asarray([0.3, -0.8])
REWARD = rewards.Quadratic(contracts.TARGET)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)


class Noisy(tj.posteriors.Posterior):
    """Draws that differ, around a denoiser."""

    model: tj.Model

    def draw(self, key, t, x):
        return self.model.denoise(t, x) + 0.5 * jax.random.normal(key, x.shape, x.dtype)


def model(**options):
    """Something smooth that compiles fast: wrappers know nothing of laws."""
    return tj.from_denoiser(lambda t, x: jnp.tanh(x + t), shape=(2,), **options)


@eqx.filter_jit
def evaluate(guidance, t=T, key=KEY):
    return guidance(key, t, X, guidance.init(X))[0]


def score(guidance, t=T, key=KEY):
    return evaluate(guidance, t, key).score(guidance.model.interpolant, t)


def test_a_window_is_the_guidance_inside_and_the_model_outside():
    base = model()
    inner = tj.PlugIn(Noisy(base), REWARD, 2.0)
    window = tj.guidance.wrappers.Window(inner, 0.25, 0.5)
    for t in (0.25, 0.4):
        close(evaluate(window, jnp.asarray(t)), evaluate(inner, jnp.asarray(t)))
    for t in (0.2, 0.5, 0.9):
        denoised = base.denoise(jnp.asarray(t), X)
        close(
            evaluate(window, jnp.asarray(t)),
            tj.guidance.Estimate(denoised, denoised, jnp.zeros(())),
        )
    close(window.log_tilt(X), inner.log_tilt(X))


def test_outside_of_a_window_the_reward_is_not_evaluated():
    seen = []

    def reward(x):
        jax.debug.callback(lambda t: seen.append(float(t)), jnp.sum(x))
        return -jnp.sum(x**2)

    base, grid = model(), jnp.linspace(0.1, 1.0, 10)
    window = tj.guidance.wrappers.Window(tj.dps(base, reward), grid[2], grid[5])
    jax.block_until_ready(tj.sample(KEY, base, window, num=4, times=grid, solver=tj.Euler()).x)
    jax.effects_barrier()
    assert len(seen) == 4 * 3  # particles times guided steps


def test_a_guided_run_in_a_window_is_unguided_steps_around_a_guided_run():
    base, grid = model(), jnp.linspace(0.01, 1.0, 13)
    guidance = tj.dps(base, REWARD, 0.5)
    options = {"num": 5, "solver": tj.Euler()}
    whole = tj.sample(
        KEY, base, tj.guidance.wrappers.Window(guidance, grid[4], grid[8]), times=grid, **options
    )
    x = tj.sample(KEY, base, times=grid[:5], **options).x
    x = tj.sample(KEY, base, guidance, times=grid[4:9], start=x, **options).x
    close(whole.x, tj.sample(KEY, base, times=grid[8:], start=x, **options).x)


@pytest.mark.slow
def test_a_window_of_a_twist_keeps_the_normalizing_constant():
    """Weights are exact whatever is guided: the mean of `exp(log_norm)` over runs is that of
    unguided ones, within 5 standard errors.
    """
    base = model()
    twist = tj.dps(base, REWARD, 0.5)

    def norms(guidance, proposal):
        run = lambda key: tj.smc(key, base, guidance, num=16, steps=6, proposal=proposal).log_norm
        return np.exp(np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, 100))))

    values = (
        norms(twist, tj.weighted.proposals.Base()),
        norms(tj.guidance.wrappers.Window(twist, 0.3, 0.7), tj.weighted.proposals.Guided()),
    )
    spread = np.sqrt(sum(each.var(ddof=1) / len(each) for each in values))
    assert spread < 0.1 * values[0].mean()
    assert abs(values[0].mean() - values[1].mean()) < contracts.SIGMAS * spread


def test_a_cap_is_on_the_factor_in_the_drift():
    base = model(interpolant=tj.Linear(1.3))
    inner = tj.dps(base, REWARD, 2.0)
    for t in (0.05, 0.6):
        t = jnp.asarray(t)
        estimate, path = evaluate(tj.guidance.wrappers.GainCapped(inner, 4.0), t), base.interpolant
        extra = path.velocity(t, X, estimate.tilted) - base.velocity(t, X)
        gain = min(float(path.diffusion(t)) / 2, 4.0)
        close(extra, gain * score(inner, t))


def test_shortened_is_damped_with_the_length_for_a_scale():
    base, length, sigma = model(), 3.0, 0.7
    inner = tj.guidance.wrappers.Normalized(tj.dps(base, REWARD), length)
    law = tj.Damped(length, sigma)
    damped = law(KEY, base.interpolant.snr(T), T, X) / length
    close(score(tj.guidance.wrappers.NormDamped(inner, sigma)), damped * score(inner))
    plain = tj.dps(base, REWARD, 2.0)
    own = float(jnp.linalg.norm(score(plain)))
    variance = 1 / (1 / sigma**2 + (0.4 / 0.6) ** 2)
    close(
        score(tj.guidance.wrappers.NormDamped(plain, sigma)),
        score(plain) / (1 + 2 * own * variance),
    )
    close(score(tj.guidance.wrappers.NormDamped(plain, 0.0)), score(plain))
    flat = tj.guidance.wrappers.NormDamped(tj.dps(base, lambda x: 0.0 * jnp.sum(x)), 1.0)
    close(score(flat), jnp.zeros(2))


def test_averaged_draws_are_weighed_by_what_they_found():
    base, k = model(), 5
    inner = tj.guidance.wrappers.Normalized(tj.PlugIn(Noisy(base), REWARD, 2.0), 1.5)
    each = [evaluate(inner, T, key) for key in jax.random.split(KEY, k)]
    values = np.asarray([e.log_h for e in each])
    weights = np.exp(values - values.max()) / np.exp(values - values.max()).sum()
    estimate = evaluate(tj.guidance.wrappers.Averaged(inner, k))
    close(estimate.log_h, np.log(np.mean(np.exp(values))))
    close(
        estimate.score(base.interpolant, T),
        weights @ np.asarray([e.score(base.interpolant, T) for e in each]),
    )


def test_averaged_plug_ins_of_one_draw_are_the_plug_in_of_k():
    """The gradient of the log of a mean is the mean of gradients under the softmax."""
    base, k = model(), 4
    # The keys of the draws: a plug-in's first is its scale's.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(jax.random.split(KEY, k))
    log_h = lambda x: (
        jax.nn.logsumexp(jax.vmap(lambda key: 2.0 * REWARD(Noisy(base).draw(key, T, x)))(keys))
        - jnp.log(k)
    )

    value, gradient = jax.value_and_grad(log_h)(X)
    found = evaluate(tj.guidance.wrappers.Averaged(tj.PlugIn(Noisy(base), REWARD, 2.0), k))
    close((found.log_h, found.score(base.interpolant, T)), (value, gradient))


def test_wrappers_refuse_what_they_cannot_wrap():
    base = model()
    inner = tj.dps(base, REWARD)
    with pytest.raises(ValueError, match=r"start must be below stop, got \[0.5, 0.2\)"):
        tj.guidance.wrappers.Window(inner, 0.5, 0.2)
    for wrap in (
        lambda g: tj.guidance.wrappers.Window(g, 0.1),
        lambda g: tj.guidance.wrappers.GainCapped(g, 1.0),
        lambda g: tj.guidance.wrappers.Averaged(g, 2),
    ):
        with pytest.raises(TypeError, match="guidance must be a Guidance"):
            wrap(base)
    followed = tj.Tuned(base, tj.Tilted(base, REWARD, 1.0), reward=REWARD, scale=1.0)
    for wrap in (
        lambda g: tj.guidance.wrappers.Window(g, 0.1),
        lambda g: tj.guidance.wrappers.Averaged(g, 2),
    ):
        with pytest.raises(ValueError, match="every state of its own trajectory"):
            wrap(followed)
    proposes = tj.guidance.wrappers.Averaged(
        tj.Conjugate(base, lambda x: jnp.sum(jnp.sin(x)), variance=lambda snr: 1 / (1 + snr)), 2
    )
    with pytest.raises(ValueError, match="gives no log_h"):
        evaluate(proposes)


def test_smc_warns_of_a_score_of_fixed_length_near_the_noise():
    """log Z is -182 and less for the first three, where -3.8 is right; the cap mends it."""
    wrappers, base = tj.guidance.wrappers, tj.dps(model(), REWARD, 1.0)
    weighted = lambda guidance: tj.weighted.SMC(guidance.model, guidance, num=10, steps=50)
    long = wrappers.Normalized(base, 1.0)
    for guidance in (
        long,
        wrappers.Clipped(wrappers.Normalized(base, 10.0), 1.0),
        wrappers.Averaged(long, 2),
    ):
        with pytest.warns(UserWarning, match=r"21\.4 standard deviations .* GainCapped"):
            weighted(guidance)
    for guidance in (
        wrappers.Normalized(base, 0.1),
        wrappers.Clipped(base, 1.0),
        wrappers.GainCapped(wrappers.Averaged(long, 2), 1.0),
        wrappers.Window(long, 0.3),
        wrappers.Unscaled(long),
    ):
        weighted(guidance)
