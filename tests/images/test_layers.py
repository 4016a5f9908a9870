"""`layers.convolved` is the convolution that `nnx.Conv` asks for, whatever it asks for. Tier: exact
(float64).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tiltjax.images.networks import layers

CASES = {
    "plain": {},
    "oblong": {"kernel_size": (1, 3)},
    "even": {"kernel_size": (2, 4)},
    "strides": {"strides": 2},
    "groups": {"feature_group_count": 2},
    "dilated kernel": {"kernel_dilation": 2},
    "dilated input": {"input_dilation": 2, "padding": ((1, 1), (1, 1))},
    "padded by numbers": {"padding": ((2, 0), (1, 1))},
    "without padding": {"padding": "VALID"},
    "circular": {"padding": "CIRCULAR"},
    "precise": {"precision": jax.lax.Precision.HIGHEST},
    "wide": {"preferred_element_type": jnp.float64},
    "line": {"kernel_size": (3,)},
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_jax(name):
    settings = {"kernel_size": (3, 3), "param_dtype": jnp.float64, **CASES[name]}
    shape = (2, *(6, 5)[: len(settings["kernel_size"])], 4)
    x = jax.random.normal(jax.random.key(0), shape)

    def of(**convolution):
        layer = nnx.Conv(4, 6, rngs=nnx.Rngs(1), **settings, **convolution)
        graph, parameters = nnx.split(layer)
        value = lambda parameters, x: jnp.sum(jnp.sin(nnx.merge(graph, parameters)(x)))
        gradient = jax.jit(jax.grad(value, argnums=(0, 1)))
        return layer(x), *jax.tree.leaves(gradient(parameters, x))

    for ours, theirs in zip(of(conv_general_dilated=layers.convolved), of(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_it_is_the_short_way_where_it_can_be():
    layer = nnx.Conv(4, 6, (3, 3), conv_general_dilated=layers.convolved, rngs=nnx.Rngs(1))
    program = str(jax.make_jaxpr(lambda x: layer(x))(jnp.zeros((1, 5, 5, 4), jnp.float32)))
    assert "custom_vjp" in program
