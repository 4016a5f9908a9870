"""Networks in bfloat16 under states in float32: the network keeps its own precision, everything
around it that of the states.

Tier: exact, to the rounding of bfloat16 (8 bits: 2^-8) where the network's precision shows.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiltjax as tj

HALF, EPS = jnp.bfloat16, 2.0**-8
KEY, T, X = jax.random.key(0), jnp.asarray(0.4, jnp.float32), jnp.asarray([0.3, -0.8], jnp.float32)
TARGET = jnp.asarray([0.5, 1.0], jnp.float32)


class Net(nnx.Module):
    """A velocity network with parameters and computation in one dtype, for one state or for rows of
    them.
    """

    def __init__(self, dtype):
        options = {"param_dtype": dtype, "dtype": dtype, "rngs": nnx.Rngs(0)}
        self.first, self.last = nnx.Linear(3, 16, **options), nnx.Linear(16, 2, **options)

    def __call__(self, t, x):
        return self.last(jnp.tanh(self.first(jnp.concatenate([x, t[..., None]], axis=-1))))


NET = Net(HALF)


def model(batched, dtype=HALF):
    """The same parameters, already rounded, computed with in either precision."""
    net = Net(dtype)
    parameters = jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(NET, nnx.Param))
    nnx.update(net, parameters)
    return tj.from_velocity(net, shape=(2,), batched=batched, dtype=jnp.float32)


def reward(x):
    return -jnp.sum((x - TARGET) ** 2)


def table(snr):
    return 1 / (1 + snr)


GUIDANCES = {
    "plug-in": lambda m: tj.PlugIn(tj.Glass(m, 2), reward, 0.5),
    "conjugate": lambda m: tj.Conjugate(m, reward, 0.5, variance=table),
}


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", GUIDANCES)
def test_an_estimate_is_rounded_as_the_network_and_not_more(name, batched):
    """Of a plug-in also the gradient, through the network."""

    def call(m):
        guidance = tj._pytree.cast(GUIDANCES[name](m), jnp.float32)
        return guidance(KEY, T, X, guidance.init(X))[0].tilted, guidance.model.denoise(T, X)

    half, single = jax.jit(call)(model(batched)), jax.jit(call)(model(batched, jnp.float32))
    assert {leaf.dtype for leaf in half} == {jnp.dtype(jnp.float32)}
    for a, b in zip(half, single, strict=True):
        assert 0 < np.abs(a - b).max() < 4 * EPS
    assert np.abs(half[0] - half[1]).max() > 20 * EPS  # the pull is much larger than the rounding


RUNS = {
    "alone": lambda: (model(False), None, tj.Heun()),
    "plug-in": lambda: (model(True), lambda m: tj.dps(m, reward, 0.5), tj.Euler()),
    "conjugate": lambda: (model(True), GUIDANCES["conjugate"], tj.Euler()),
    # To a tolerance not finer than the network's own rounding, which no step size can resolve.
    "adaptive": lambda: (model(True), None, tj.Adaptive(1e-2, 1e-2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_states_stay_in_single_precision_around_a_network_in_half(name):
    m, guidance, solver = RUNS[name]()
    assert {leaf.dtype for leaf in jax.tree.leaves(m.net) if eqx.is_inexact_array(leaf)} == {
        jnp.dtype(HALF)
    }
    particles = tj.sample(
        KEY, m, None if guidance is None else guidance(m), num=3, steps=4, solver=solver
    )
    floating = {leaf.dtype for leaf in jax.tree.leaves(particles) if eqx.is_inexact_array(leaf)}
    assert floating == {jnp.dtype(jnp.float32)}
    assert np.all(np.isfinite(particles.x))
    assert np.any(
        particles.x != particles.x.astype(HALF).astype(jnp.float32)
    )  # no state is rounded to half
