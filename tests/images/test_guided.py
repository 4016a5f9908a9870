"""Guidance of FLUX.1 as published: one step against the algorithm written anew in float64, and what
it costs.

Tiers: exact (1e-10 in float64 against NumPy), counts of calls.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flux_small as small

import tiltjax as tj
from tiltjax.images import rewards
from tiltjax.images.flux import Lookahead, packed, published, published_guidance, times, unpacked
from tiltjax.images.networks import autoencoder, transformer
from tiltjax.solvers import Streams

KEY = jax.random.key(5)
STEPS = 6
REWARD = rewards.blue_minus_half_red_green


@functools.cache
def flow():
    return small.model()


# The network, the decoder and the reward's gradient at a latent: the parts that are not NumPy, each
# tested elsewhere against its published original.


@jax.jit
def velocity(model, x, start, end):
    """The network's velocity in its own time, from sigma to sigma."""
    parts = model.parts
    tokens = parts.transformer(
        packed(x[None]),
        jnp.stack([start, end])[None],
        parts.text[None],
        parts.pooled[None],
        parts.guidance[None],
        grid=(4, 2),
    )
    return unpacked(tokens, *x.shape[:2])[0]


@jax.jit
def ahead(model, x, noise, remaining, spread, sigma):
    """Reward and its gradient in x of what is decoded after the state was noised and looked ahead
    of.
    """

    def value(x):
        noisy = remaining * x + spread * noise
        end = noisy - sigma * velocity(model, noisy, sigma, jnp.zeros(()))
        return REWARD(jnp.clip(model.decode(end), 0, 1))

    return jax.value_and_grad(value)(x)


def step(x, sigma, sigma_next, noises, *, snr_factor, scale, length=None, damp=None, limit=20.0):
    """One guided step of the published pipeline, in its own time and sign: sigma falls, the
    velocity is noise less data.
    """
    root = np.sqrt(snr_factor)
    noisier = root * sigma / (root * sigma + 1 - sigma)
    remaining = (1 - noisier) / (1 - sigma)
    spread = np.sqrt(noisier**2 - remaining**2 * sigma**2)
    rewards, gradients = [], []
    for noise in noises:
        reward, gradient = map(np.asarray, ahead(flow(), x, noise, remaining, spread, noisier))
        gradient = (
            scale * gradient if length is None else length * gradient / np.sqrt((gradient**2).sum())
        )
        if damp is not None:
            own = np.sqrt((gradient**2).sum())
            variance = damp**2 * sigma**2 / (sigma**2 + (1 - sigma) ** 2 * damp**2)
            gradient = gradient / (1 + 2 * own * variance)
        rewards.append(float(reward))
        gradients.append(gradient)
    logits = scale * np.asarray(rewards)
    weights = np.exp(logits - logits.max())
    total = np.tensordot(weights / weights.sum(), np.asarray(gradients), 1)
    moved = (
        np.asarray(velocity(flow(), x, sigma, sigma_next)) - min(sigma / (1 - sigma), limit) * total
    )
    return x + (sigma_next - sigma) * moved


def draws(key, k, shape):
    """The noises of a run's first step: of particle 0, from the streams of the verb, whose first
    row is the start's.
    """
    streams = Streams(
        *(jax.random.fold_in(stream, 0) for stream in jax.random.split(key, (2, 3))[1])
    )
    keys = [streams.guidance] if k == 1 else jax.random.split(streams.guidance, k)
    # Of a plug-in's two keys the first is its scale's.
    return [
        np.asarray(jax.random.normal(jax.random.fold_in(each, 1), shape, jnp.float64))
        for each in keys
    ]


CASES = {
    "as published": {},
    "no noise is added": {"snr_factor": 1.0},
    "a divisor, damped": {"length": None, "scale": 1 / 0.03, "sigma": 0.4},
    "three particles, damped": {"k": 3, "scale": 30.0, "sigma": 0.4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_guided_step_is_the_published_one(name):
    # A low cap, so that it is met; without it the coefficient is the last case's.
    model, options, first = flow(), CASES[name], 1
    options = {"limit": 20.0 if "divisor" in name else 2.0, **options}
    grid = np.asarray(times(STEPS, 64, 32))
    start = np.random.default_rng(first).normal(size=model.shape)
    one_step = {"grid": grid[first : first + 2], "first": 0, "guided": 1, "start": start[None]}
    found = published(KEY, model, REWARD, **one_step, **options).x[0]
    known = {"snr_factor": 5.0, "scale": 1.0, "length": 10.0, **options}
    noises = draws(KEY, known.pop("k", 1), model.shape)
    expected = step(
        start, 1 - grid[first], 1 - grid[first + 1], noises, damp=known.pop("sigma", None), **known
    )
    np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max(), rtol=0)
    # A step that would pass unguided as well tells nothing.
    plain = start + (grid[first] - grid[first + 1]) * np.asarray(
        velocity(model, start, 1 - grid[first], 1 - grid[first + 1])
    )
    assert np.abs(expected - plain).max() > 1e-3
    assert (known["limit"] == 20.0) == ((1 - grid[1]) / grid[1] < known["limit"])


def test_a_guided_step_calls_the_network_once_and_once_for_all_particles(monkeypatch):
    """Forward passes of the network while a guided run takes place, each of all particles, or of
    all their draws.
    """
    calls, num, k = [], 2, 3
    model = small.model()
    monkeypatch.setattr(transformer.Transformer, "__call__", _recorded(calls))
    monkeypatch.setattr(autoencoder.Autoencoder, "decode", lambda coder, x: x[..., :3])
    jax.block_until_ready(published(KEY, model, REWARD, num=num, k=k, guided=2, steps=STEPS).x)
    jax.effects_barrier()
    # The start and every step call once, a guided step once more for the draws, and the pullback
    # has no forward pass of its own.
    assert calls == [1] * (1 + STEPS + 2)


def _recorded(calls):
    def call(self, tokens, *args, **kwargs):
        jax.debug.callback(lambda: calls.append(len(tokens)))
        return tokens * 0.1

    return call


def test_with_one_time_it_is_guided_at_the_denoiser():
    model = small.model("dev")
    grid = times(4, 64, 32)
    window = published_guidance(model, REWARD, grid, guided=9, sigma=0.5)
    assert (float(window.start), float(window.stop)) == (float(grid[1]), 1.0)
    with pytest.raises(ValueError, match="one time"):
        model.leaping(grid)


def test_the_steps_of_a_flow_map_are_the_map():
    model = flow()
    grid = times(3, 64, 32)
    x = jnp.asarray(np.random.default_rng(2).normal(size=model.shape))
    leaping = model.leaping(grid)
    found, expected = jax.jit(
        lambda leaping, model: (
            [leaping.denoise(grid[i], x) for i in (0, 2)],
            [model.flow_map(grid[i], x, grid[i + 1]) for i in (0, 2)],
        )
    )(leaping, model)
    for i, there, end in zip((0, 2), found, expected, strict=True):
        line = x + (grid[i + 1] - grid[i]) * (there - x) / (1 - grid[i])
        np.testing.assert_allclose(line, end, atol=1e-11)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-12)  # the last one ends at the data
    assert Lookahead(leaping).model is leaping


def test_wrong_settings_are_errors():
    model = flow()
    with pytest.raises(ValueError, match="first must be one of the steps 0 to 27, got 28"):
        published(KEY, model, REWARD, first=28)
    with pytest.raises(ValueError, match="guided must be at least 1"):
        published(KEY, model, REWARD, guided=0)
    with pytest.raises(TypeError, match="model must be a FluxModel"):
        published(KEY, tj.from_denoiser(lambda t, x: x, shape=(2,)), REWARD)
    bare = small.model(autoencoder=None, height=64, width=32)
    with pytest.raises(ValueError, match="has no autoencoder"):
        published(KEY, bare, REWARD, steps=2)
