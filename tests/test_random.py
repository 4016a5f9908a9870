"""Draws of rare events in single precision. Tiers: exact, statistical (fixed key)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj
from tiltjax import _random


@pytest.mark.slow
def test_the_tail_of_a_gumbel_variable_is_not_a_grid():
    """The largest of 2^24 variables are those of uniform numbers above `1 - 2^-12`. There, a grid
    of 2^-23 has 2,048 points.
    """
    drawn = jax.jit(lambda key: _random.gumbel(key, (2**24,), jnp.float32))(jax.random.key(0))
    largest = np.sort(np.asarray(drawn))[-4096:]
    assert drawn.dtype == jnp.float32
    assert len(np.unique(largest)) > 4000
    # exp(-G) is exponential, and uniform near zero.
    place = np.exp(-largest.astype(float)) * 2**12
    assert abs(place[place < 0.5].mean() - 0.25) < 5 * 0.5 / np.sqrt(12 * 2048)


def test_double_precision_keeps_the_numbers_of_jax():
    logits = jnp.asarray([0.0, -1.0, 0.5])
    assert logits.dtype == jnp.float64
    for got, expected in (
        (_random.categorical(jax.random.key(0), logits, shape=(50,)), {"shape": (50,)}),
        (_random.categorical(jax.random.key(0), logits[:, None], axis=0), {"axis": 0}),
    ):
        argument = logits if "shape" in expected else logits[:, None]
        assert np.array_equal(got, jax.random.categorical(jax.random.key(0), argument, **expected))


def test_half_precision_draws_in_single_precision():
    """bfloat16 has 128 uniform numbers, none of which would draw a probability of .002."""
    law = jnp.asarray([0.998, 0.002], jnp.bfloat16)
    drawn = _random.categorical(jax.random.key(0), jnp.log(law), shape=(50_000,))
    assert abs(float(jnp.mean(drawn == 1, dtype=float)) - 0.002) < 5 * np.sqrt(0.002 / 50_000)


def test_tokens_and_components_are_drawn_with_the_tail():
    """Both draws are those of `mode="high"`, which differ from the draws of `mode="low"`."""
    key, num = jax.random.key(1), 200
    high, low = (
        jax.random.categorical(key, jnp.zeros((num, 3), jnp.float32), mode=mode)
        for mode in ("high", "low")
    )
    assert not np.array_equal(high, low)
    even = jnp.full((num, 3), 1 / 3, jnp.float32)
    logits = lambda t, x: even
    model = tj.tokens.from_logits(logits, length=num, vocab=3, dtype=jnp.float32)
    assert np.array_equal(model.complete(key, model.prompt, even), high)
    points = np.arange(3, dtype=np.float32)[:, None]
    mixture = tj.GaussianMixture(
        np.full(3, 1 / 3, np.float32), points, np.zeros((3, 1, 1), np.float32)
    )
    component = jax.random.categorical(
        jax.random.split(key)[0], mixture.log_weights, shape=(num,), mode="high"
    )
    assert np.array_equal(mixture.sample(key, num)[:, 0], points[component, 0])


@pytest.mark.nightly
@pytest.mark.optimized
def test_rare_tokens_of_a_large_vocabulary_are_drawn():
    """Of 8,000 tokens 12 are rare; draws from 2^-23 uniform numbers would find one."""
    vocab, mass, length, runs = 50_000, 0.0015, 100, 80
    law = jnp.full(vocab, mass / (vocab - 1), jnp.float32).at[0].set(1 - mass)
    model = tj.tokens.from_logits(
        lambda t, x: jnp.broadcast_to(jnp.log(law), (length, vocab)),
        length=length, vocab=vocab, dtype=jnp.float32,
    )  # fmt: skip
    draw = lambda key: model.complete(key, model.prompt, model.denoise(jnp.zeros(()), model.prompt))
    keys = jax.random.split(jax.random.key(0), runs)
    tokens = jax.jit(lambda keys: jax.lax.map(draw, keys))(keys)
    expected = mass * length * runs
    assert abs(int(jnp.sum(tokens != 0)) - expected) < 3 * np.sqrt(expected)
