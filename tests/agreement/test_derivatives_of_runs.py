"""Derivatives of whole runs against finite differences. Tier: exact (float64, to the error of the
differences).

What is held constant inside of a guidance must not be constant in a derivative around it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj
from tiltjax.guidance import wrappers

TARGET = jnp.asarray(contracts.TARGET)
GUIDANCES = contracts.all_guidances() | {
    "self-damped, exact": lambda model, reward, scale: tj.PlugIn(
        tj.Exact(model), reward, tj.SelfDamped(scale, model)
    ),
    "self-damped, glass": lambda model, reward, scale: tj.PlugIn(
        tj.Glass(model, 3), reward, tj.SelfDamped(scale, model), k=2
    ),
    "self-damped, dps": lambda model, reward, scale: tj.dps(
        model, reward, tj.SelfDamped(scale, model)
    ),
    "renoise": lambda model, reward, scale: tj.PlugIn(
        tj.posteriors.Renoise(model, 2.0, 3), reward, scale
    ),
    "normalized": lambda model, reward, scale: wrappers.Normalized(
        tj.dps(model, reward, scale), 1.0
    ),
    "conjugate": lambda model, reward, scale: tj.Conjugate(
        model, reward, scale, variance=lambda snr: 1 / (1 + snr)
    ),
}
# At full gain, eight steps with a flow map leave the data, and no finite difference is accurate.
del GUIDANCES["plug-in, flow map"]
FIRST = ("plug-in, glass, k=2", "dps", "laplace", "self-damped, exact", "conjugate", "tuned")


def problem(s):
    """A model, a reward and a scale that all change with `s`."""
    planar = contracts.planar()
    mixture = tj.GaussianMixture(
        jax.nn.softmax(planar.log_weights + s * jnp.asarray([0.5, -0.3])),
        planar.means * (1.1 + 0.4 * s),
        planar.covs + s * jnp.asarray([[0.1, 0.03], [0.03, -0.02]])[None],
    )
    return tj.Analytic(mixture), tj.rewards.Quadratic(TARGET * (1 + s)), 0.8 + s


def assert_derivative(fn, step=1e-5):
    fn_and_slope = jax.jit(jax.value_and_grad(fn))
    slope = fn_and_slope(jnp.asarray(0.0))[1]
    above, below = (fn_and_slope(jnp.asarray(s))[0] for s in (step, -step))
    np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name in FIRST else pytest.param(name, marks=pytest.mark.nightly)
        for name in GUIDANCES
    ],
)
def test_a_guided_run(name):
    def value(s):
        model, reward, scale = problem(s)
        guidance = GUIDANCES[name](model, reward, scale)
        solver = tj.Ancestral() if name == "tuned" else tj.Euler()
        x = tj.sample(jax.random.key(0), model, guidance, num=4, steps=8, solver=solver).x
        return jnp.mean(jnp.sum(x**2 + x, axis=1))

    assert_derivative(value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dps", "self-damped, exact", "laplace", "tuned"])
def test_a_weighted_run_without_resampling(name):
    def value(s):
        model, reward, scale = problem(s)
        guidance = GUIDANCES[name](model, reward, scale)
        particles = tj.smc(jax.random.key(0), model, guidance, num=8, steps=8, ess_threshold=0)
        return particles.log_norm + jnp.sum(particles.mean())

    assert_derivative(value)
