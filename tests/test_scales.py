"""Scale laws. Tier: exact (float64, 1e-10)."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj
from tiltjax import scales

LAWS = contracts.all_scales()
X = jnp.zeros(2)


def value(law, t, path=None):
    path, t = path or tj.Linear(), jnp.asarray(t)
    return law(jax.random.key(0), path.snr(t), t, X)


@pytest.mark.parametrize("name", LAWS)
def test_contract(name):
    law = LAWS[name](3.0)
    assert float(law.final) == 3.0
    for t in (0.0, 0.3, 0.999):
        assert value(law, t).shape == ()
        assert 0 < float(value(law, t)) <= 3.0
    chex.assert_trees_all_close(value(law, 1.0), law.final, rtol=1e-15)
    assert float(value(LAWS[name](0.0), 0.5)) == 0.0
    assert all(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(LAWS[name](3)))


@pytest.mark.parametrize("base", [1.0, 1.6])
@pytest.mark.parametrize("t", [1e-3, 0.4, 0.9])
def test_damped_is_the_posterior_variance_law(t, base):
    """`v_t` against the posterior covariance of the very Gaussian it is exact for."""
    scale, sigma, path = 3.0, 0.7, tj.Linear(base)
    _, _, covs = contracts.np_condition(
        contracts.gaussian([0.3], [[sigma**2]]), t, base * (1 - t), np.array([0.2])
    )
    expected = scale / (1 + 2 * scale * covs[0, 0, 0])
    chex.assert_trees_all_close(value(tj.Damped(scale, sigma), t, path), expected, rtol=1e-10)


def test_damped_without_width_is_constant():
    assert float(value(tj.Damped(3.0, 0.0), 0.2)) == float(value(tj.Damped(3.0, 0.0), 1.0)) == 3.0


def test_a_number_becomes_a_constant_and_a_law_stays_itself():
    law = tj.Damped(1.0, 2.0)
    assert scales.as_scale(law) is law
    assert isinstance(scales.as_scale(2), tj.scales.Constant)


def test_laws_can_be_swept():
    final = jax.vmap(lambda s: value(tj.Damped(s, 0.7), 0.5))(jnp.asarray([1.0, 2.0]))
    chex.assert_trees_all_close(
        final, jnp.stack([value(tj.Damped(s, 0.7), 0.5) for s in (1.0, 2.0)]), rtol=1e-15
    )
