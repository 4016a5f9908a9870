"""Low-rank adapters.

Tiers: exact (identities), statistical (that adapters alone can be trained).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiltjax as tj
from tiltjax import training
from tiltjax.training import lora


class Network(nnx.Module):
    def __init__(self, width=8, dtype=jnp.float32):
        make = lambda n, m, seed: nnx.Linear(n, m, rngs=nnx.Rngs(seed), param_dtype=dtype)
        self.first, self.rest = (
            make(3, width, 0),
            nnx.List([make(width, width, 1), make(width, 2, 2)]),
        )

    def __call__(self, t, x):
        y = jnp.tanh(self.first(jnp.append(x, t).astype(self.first.kernel.dtype)))
        return self.rest[1](jnp.tanh(self.rest[0](y)))


NETWORK = Network()
X = jnp.asarray([0.4, -1.1], jnp.float32)
T = jnp.asarray(0.3, jnp.float32)


def perturbed(adapters, seed=1):
    return {
        path: (a, jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), b.shape, b.dtype))
        for i, (path, (a, b)) in enumerate(adapters.items())
    }


def test_it_starts_at_the_network_and_scale_zero_is_the_network():
    adapters = lora.init(jax.random.key(0), NETWORK, 2)
    assert {path: (a.shape, b.shape) for path, (a, b) in adapters.items()} == {
        ("first", "kernel"): ((3, 2), (2, 8)),
        ("rest", 0, "kernel"): ((8, 2), (2, 8)),
        ("rest", 1, "kernel"): ((8, 2), (2, 2)),
    }
    np.testing.assert_array_equal(lora.merge(NETWORK, adapters)(T, X), NETWORK(T, X))
    np.testing.assert_array_equal(
        lora.merge(NETWORK, perturbed(adapters), 0.0)(T, X), NETWORK(T, X)
    )


def test_merging_adds_the_product_and_leaves_the_network_alone():
    adapters = perturbed(lora.init(jax.random.key(0), NETWORK, 2))
    before = np.asarray(NETWORK.first.kernel.get_value())
    merged = lora.merge(NETWORK, adapters, 0.5)
    a, b = adapters["first", "kernel"]
    np.testing.assert_allclose(merged.first.kernel.get_value(), before + 0.5 * a @ b, rtol=1e-6)
    np.testing.assert_array_equal(NETWORK.first.kernel.get_value(), before)
    np.testing.assert_array_equal(merged.first.bias.get_value(), NETWORK.first.bias.get_value())
    assert (
        np.linalg.matrix_rank(
            np.asarray(merged.rest[0].kernel.get_value() - NETWORK.rest[0].kernel.get_value()),
            tol=1e-4,
        )
        == 2
    )


def test_adapters_alone_are_trained():
    adapters = lora.init(jax.random.key(0), NETWORK, 2)
    x = jax.random.normal(jax.random.key(3), (64, 2), jnp.float32)

    @jax.jit
    def loss(adapters):
        merged = lora.merge(NETWORK, adapters)
        return jnp.mean((jax.vmap(lambda x: merged(T, x))(x) - jnp.ones(2, jnp.float32)[None]) ** 2)

    optimizer = optax.sgd(0.05)
    state, start = optimizer.init(adapters), loss(adapters)
    for _ in range(100):
        updates, state = optimizer.update(jax.grad(loss)(adapters), state)
        adapters = optax.apply_updates(adapters, updates)
    assert loss(adapters) < 0.2 * start


def test_the_scale_is_swept_without_tracing_again_and_models_take_the_result():
    adapters, traced = perturbed(lora.init(jax.random.key(0), NETWORK, 2)), []

    @jax.jit
    def run(scale):
        traced.append(0)
        model = tj.from_velocity(lora.merge(NETWORK, adapters, scale), shape=(2,))
        return model.velocity(T.astype(float), X.astype(float))

    values = [run(jnp.asarray(scale, jnp.float32)) for scale in (0.0, 0.5, 1.0)]
    assert len(traced) == 1
    np.testing.assert_allclose(values[0], NETWORK(T, X), atol=1e-6)
    assert np.abs(np.asarray(values[2] - values[0])).max() > 0.01


@pytest.mark.slow
def test_kernels_keep_their_dtype_and_adapters_can_be_trained():
    network = Network(dtype=jnp.bfloat16)
    adapters = lora.init(jax.random.key(0), network)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
    # Parameters of fewer bits would be refused.
    assert len(training.split_parameters(adapters)[0]) == 6
    for a, b in zip(
        *(jax.tree.leaves(one) for one in (lora.merge(network, adapters), network)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert lora.merge(network, perturbed(adapters), 0.5).first.kernel.dtype == jnp.bfloat16


def test_some_kernels_may_be_chosen():
    adapters = lora.init(
        jax.random.key(0),
        NETWORK,
        only=lambda path, kernel: path[0] == "rest" and kernel.shape[1] == 8,
    )
    assert list(adapters) == [("rest", 0, "kernel")]


@pytest.mark.parametrize("network", [lambda t, x: x, eqx.nn.Linear(2, 2, key=jax.random.key(0))])
def test_other_networks_are_refused(network):
    with pytest.raises(TypeError, match=r"network must be a Module, got .* a Flax module"):
        lora.init(jax.random.key(0), network)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: lora.init(jax.random.key(0), NETWORK, only="last"),
            "only: expected a callable, got str",
        ),
        (
            lambda: lora.merge(NETWORK, NETWORK),
            "path of each kernel to its two factors, got Network",
        ),
        (
            lambda: lora.merge(NETWORK, {("first", "kernel"): jnp.ones((3, 8))}),
            "path of each kernel to its two factors",
        ),
        (lambda: lora.merge(lambda t, x: x, {}), "network must be a Module, got function"),
    ],
)
def test_what_is_of_another_kind_is_refused(act, message):
    with pytest.raises(TypeError, match=message):
        act()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: lora.init(jax.random.key(0), NETWORK, 0), "rank"),
        (
            lambda: lora.init(jax.random.key(0), NETWORK, only=lambda path, kernel: False),
            "no parameter .* that only",
        ),
        (
            lambda: lora.merge(Network(16), lora.init(jax.random.key(0), NETWORK)),
            r"first/kernel has shape \(3, 16\), not \(3, 8\)",
        ),
        (
            lambda: lora.merge(NETWORK, lora.init(jax.random.key(0), NETWORK), jnp.ones(2)),
            "scale must be one number",
        ),
        (
            lambda: lora.merge(NETWORK.first, lora.init(jax.random.key(0), NETWORK)),
            "first/kernel is missing",
        ),
    ],
)
def test_what_does_not_fit_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
