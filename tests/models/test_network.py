"""Networks: one function of (t, x) however it is batched, and what of a network is trained.

Tier: exact.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiltjax as tj
from tiltjax import training
from tiltjax.training import networks


def velocity(shape=(2,), **settings):
    return networks.Velocity(shape, **({"width": 8, "depth": 2, "rngs": nnx.Rngs(0)} | settings))


X = jax.random.normal(jax.random.key(0), (5, 2), jnp.float32)
T = jnp.linspace(0.0, 1.0, 5, dtype=jnp.float32)


# The network.


def test_the_formula():
    network = velocity(frequencies=3)
    x, t = np.asarray(X[1], np.float64), float(T[1])
    k = np.pi * np.arange(1, 4)
    hidden = np.concatenate([x, np.cos(k * t), np.sin(k * t)])
    for layer in network.layers:
        hidden = hidden @ np.asarray(layer.kernel[...], np.float64) + np.asarray(
            layer.bias[...], np.float64
        )
        hidden = hidden / (1 + np.exp(-hidden))
    expected = hidden @ np.asarray(network.last.kernel[...], np.float64) + np.asarray(
        network.last.bias[...], np.float64
    )
    np.testing.assert_allclose(network(T[1], X[1]), expected, rtol=1e-5, atol=1e-6)


def test_the_published_size_by_default():
    network = networks.Velocity((2,), rngs=nnx.Rngs(0))
    sizes = [layer.kernel.shape for layer in (*network.layers, network.last)]
    assert sizes == [(2 + 16, 256), (256, 256), (256, 256), (256, 256), (256, 2)]


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_a_batch_is_its_rows(shape):
    network, x = velocity(shape), jax.random.normal(jax.random.key(1), (5, *shape), jnp.float32)
    batch = network(T, x)
    assert batch.shape == x.shape
    np.testing.assert_allclose(
        batch, jnp.stack([network(*row) for row in zip(T, x, strict=True)]), atol=1e-6
    )
    np.testing.assert_allclose(batch, jax.vmap(network)(T, x), atol=1e-6)


def test_models_of_it_agree():
    network, t, x = (
        velocity(param_dtype=jnp.float64),
        T[:-1].astype(jnp.float64),
        X[:-1].astype(jnp.float64),
    )
    for batched in (False, True):
        model = tj.from_velocity(network, shape=(2,), batched=batched)
        np.testing.assert_allclose(
            jax.vmap(model.velocity)(t, x), network(t, x), rtol=1e-10, atol=1e-10
        )


def test_half_precision_inside_single_outside():
    exact, half = velocity(), velocity(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    answer = half(T, X)
    assert answer.dtype == jnp.float32
    error = np.abs(np.asarray(answer - exact(T, X))).max()
    assert 1e-5 < error < 0.1 * float(jnp.abs(exact(T, X)).max())


def test_double_precision():
    network = velocity(param_dtype=jnp.float64)
    assert network(jnp.asarray(0.5), X[0].astype(jnp.float64)).dtype == jnp.float64


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x of shape \(\*lead, 2\)"):
        velocity()(T, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="t of shape"):
        velocity()(T[0], X)
    with pytest.raises(TypeError, match="such as"):
        velocity(2)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        velocity(depth=0)


# Its parameters.


class Mixed(nnx.Module):
    def __init__(self, twice=False):
        rngs = nnx.Rngs(0)
        self.layer = nnx.Linear(3, 2, rngs=rngs)
        self.again = self.layer if twice else nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, t, x):
        return self.drop(self.norm(self.again(self.layer(jnp.append(x, t)))))


def test_parameters_have_names_and_the_network_comes_back():
    network = Mixed()
    network.eval()
    parameters, template = training.split_parameters(network)
    assert set(parameters) == {
        f"{a}.{b}" for a in ("layer", "again") for b in ("kernel", "bias")
    } | {
        "norm.scale",
        "norm.bias",
    }
    x = jnp.ones(2, jnp.float32)
    np.testing.assert_array_equal(template.merge(parameters)(T[1], x), network(T[1], x))
    doubled = template.merge(jax.tree.map(lambda leaf: 2 * leaf, parameters))
    np.testing.assert_array_equal(doubled.layer.kernel[...], 2 * network.layer.kernel[...])
    np.testing.assert_array_equal(doubled.norm.var[...], network.norm.var[...])


def test_equinox_modules_and_functions():
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    for network in (mlp, jax.tree_util.Partial(lambda mlp, t, x: mlp(jnp.append(x, t)), mlp)):
        parameters, template = training.split_parameters(network)
        assert sorted(leaf.shape for leaf in parameters.values()) == [(2,), (2, 4), (4,), (4, 3)]
        assert jax.tree.structure(template.merge(parameters)) == jax.tree.structure(network)


def test_parameters_are_found_where_flax_was_never_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "flax.nnx")
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    parameters, template = training.split_parameters(mlp)
    assert set(parameters) == {f"layers.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    x = jnp.ones(3, mlp.layers[0].weight.dtype)
    np.testing.assert_array_equal(template.merge(parameters)(x), mlp(x))
    assert "flax.nnx" not in sys.modules


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match=r"(?s)training mode.*\.eval\(\)"):
        training.split_parameters(Mixed())
    with pytest.raises(ValueError, match="training mode"):
        training.split_parameters(jax.tree_util.Partial(lambda net, t, x: net(t, x), Mixed()))
    shared = Mixed(twice=True)
    shared.eval()
    with pytest.raises(ValueError, match="the same array"):
        training.split_parameters(shared)
    with pytest.raises(ValueError, match="no parameters"):
        training.split_parameters(lambda t, x: x)
    with pytest.raises(ValueError, match=r"at least 32 bits, got bfloat16 in last.bias"):
        training.split_parameters(velocity(param_dtype=jnp.bfloat16))


def test_an_error_of_the_network_itself_is_raised_unchanged():
    def broken(t, x):
        raise KeyError("mine")

    for batched in (False, True):
        model = tj.from_velocity(broken, shape=(2,), batched=batched)
        with pytest.raises(KeyError, match="mine"):
            model.denoise(jnp.asarray(0.5), jnp.ones(2))
    # This network accepts a state and a batch, so `batched` is not the reason.
    model = tj.from_velocity(velocity(param_dtype=jnp.float64), shape=(2,), batched=True)
    value = lambda model: jnp.sum(model.denoise(jnp.asarray(0.5), jnp.ones(2)))
    with pytest.raises(TypeError, match="not differentiable in its parameters"):
        eqx.filter_grad(value)(model)


@pytest.mark.slow
def test_guided_runs_of_a_network_come_out_alike_to_the_last_bit():
    # Also weighed, and traced anew: nothing but the key decides.
    net = tj.training.networks.Velocity((2,), width=16, depth=2, rngs=nnx.Rngs(0))
    reward = tj.rewards.Bump([0.5, 0.5], 1.0)

    def runs(net):
        model = tj.from_velocity(net, shape=(2,), batched=True, dtype=jnp.float32)
        glass = tj.Glass(model, inner_steps=2)
        guided = tj.sample(
            jax.random.key(1), model, tj.PlugIn(glass, reward, 2.0, k=2), num=8, steps=4
        )
        weighted = tj.smc(jax.random.key(1), model, tj.dps(model, reward, 2.0), num=8, steps=4)
        return np.asarray(guided.x), np.asarray(weighted.x), np.asarray(weighted.log_weights)

    another = jax.tree_util.Partial(lambda net, t, x: net(t, x), net)
    for a, b in zip(runs(net), runs(another), strict=True):
        np.testing.assert_array_equal(a, b)
