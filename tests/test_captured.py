"""What functions use from outside: modules that would be compiled with old weights are refused,
others are not. Dropout in training mode is found wherever a module is.

Tier: exact.
"""

import functools
import types
import unittest.mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiltjax as tj
from tiltjax import _captured, rewards

KEY = jax.random.key(0)


class Net(nnx.Module):
    """A network of two numbers with a dropout, or a reward."""

    def __init__(self, rate=0.0):
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(1))

    def __call__(self, t, x):
        return self.dropout(self.linear(x))

    def score(self, x):
        return jnp.sum(self.dropout(self.linear(x)))


class Wrapper:
    """An object that is no pytree."""

    def __init__(self, net):
        self.net, self.calls = net, 0

    def __call__(self, t, x):
        self.calls += 1
        return self.velocity(t, x)

    def velocity(self, t, x):
        return self.inside(t, x)

    @property
    def inside(self):
        return self.net

    def score(self, x):
        return self.net.score(x)


class Slots:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, t, x):
        return self.net(t, x)


class Holder(eqx.Module):
    """A pytree with a network, and a function that is not a part of it."""

    net: Net
    fn: object = eqx.field(static=True, default=None)

    def __call__(self, t, x):
        return self.net(t, x) if self.fn is None else self.fn(t, x)


def with_default(net):
    def call(t, x, net=net):
        return net(t, x)

    return call


def in_module(net):
    module = types.ModuleType("mine")
    module.net = net
    return lambda t, x: module.net(t, x)


def of_helper(net):
    helper = lambda t, x: {"a": [net]}["a"][0](t, x)
    return lambda t, x: jax.jit(helper)(t, x)


# With weights that a change of the module would not reach.
OUTSIDE = {
    "closure": lambda net: lambda t, x: net(t, x),
    "inner function": lambda net: lambda t, x: (lambda x: net(t, x))(x),
    "dictionary": lambda net: (lambda nets: lambda t, x: nets["a"][0](t, x))({"a": [net]}),
    "default argument": with_default,
    "module": in_module,
    "helper": of_helper,
    "jit": lambda net: jax.jit(lambda t, x: net(t, x)),
    "vmap": lambda net: jax.vmap(net),
    "object": Wrapper,
    "method of an object": lambda net: Wrapper(net).velocity,
    "slots": Slots,
    "partial object": lambda net: functools.partial(Wrapper(net)),
    "function of an object": lambda net: (lambda w: lambda t, x: w(t, x))(Wrapper(net)),
    "function of a method": lambda net: (lambda m: lambda t, x: m(t, x))(net.__call__),
    "function of a partial": lambda net: (lambda p: lambda t, x: p(t, x))(functools.partial(net)),
    "function of a pytree": lambda net: (lambda h: lambda t, x: h(t, x))(Holder(net)),
    "static field": lambda net: Holder(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda t, x: net(t, x)),
    "variable": lambda net: (lambda w: lambda t, x: w[...] @ x)(net.linear.kernel),
}
# With weights that are arguments of the compiled program.
INSIDE = {
    "module": lambda net: net,
    "method": lambda net: net.__call__,
    "partial": lambda net: functools.partial(lambda net, t, x: net(t, x), net),
    "keyword": lambda net: functools.partial(lambda t, x, net: net(t, x), net=net),
    "nested": lambda net: functools.partial(functools.partial(net)),
    "partial method": lambda net: functools.partial(net.__call__),
    "Partial": jax.tree_util.Partial,
    "Partial of a method": lambda net: jax.tree_util.Partial(net.__call__),
    "pytree": Holder,
    "method of a pytree": lambda net: Holder(net).__call__,
}
# Ways to pass a network.
first, of_part = (lambda fn, t, x: fn(t, x)), (lambda p, t, x: p["a"][0](t, x))
AS = {
    "function": lambda fn: tj.from_velocity(fn, shape=(2,), dtype=jnp.float64),
    "parameter": lambda fn: tj.from_velocity(first, fn, shape=(2,), dtype=jnp.float64),
    "part of parameters": lambda fn: tj.from_velocity(
        of_part, {"a": (fn,)}, shape=(2,), dtype=jnp.float64
    ),
    "reward": lambda fn: rewards.as_reward(
        jax.tree_util.Partial(lambda fn, x: fn(jnp.ones(()), x)[0], fn)
    ),
}


@pytest.mark.parametrize("way", AS)
@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.filterwarnings("ignore:(?s).*JAX-transformed callable")
def test_a_module_that_a_function_uses_from_outside_is_refused(name, way):
    with pytest.raises(TypeError, match=r"uses the Flax module .* from outside.*Partial"):
        AS[way](OUTSIDE[name](Net()))


@pytest.mark.parametrize("name", INSIDE)
def test_the_weights_of_a_module_are_those_at_the_time_when_the_model_is_built(name):
    @jax.jit
    def velocity(model):
        traces.append(1)
        return model.velocity(jnp.asarray(0.5), jnp.ones(2))

    for way in AS.keys() - {"reward"}:
        net, traces = Net(), []
        net.eval()
        fn = INSIDE[name](net)
        found = []
        for factor in (1.0, 2.0):
            net.linear.kernel[...] = factor * jnp.eye(2)
            model = AS[way](fn)
            found.append(velocity(model))
        net.linear.kernel[...] = jnp.zeros((2, 2))
        found.append(velocity(model))
        np.testing.assert_allclose(found, [[1, 1], [2, 2], [2, 2]], rtol=1e-9)
        assert len(traces) == 1, way


@pytest.mark.parametrize("way", AS)
@pytest.mark.parametrize("name", INSIDE)
def test_dropout_in_training_mode_is_found_everywhere(name, way):
    net = Net(0.5)
    with pytest.raises(ValueError, match=r"Dropout.*in training mode .*\.eval\(\)"):
        AS[way](INSIDE[name](net))
    net.eval()
    AS[way](INSIDE[name](net))


def test_rewards_of_modules():
    model = tj.from_denoiser(lambda t, x: x * t, shape=(2,))
    for reward in (lambda net: net.score, lambda net: functools.partial(Net.score, net)):
        net = Net(0.5)
        with pytest.raises(ValueError, match="training mode"):
            tj.dps(model, reward(net))
        net.eval()
        fn, found = reward(net), []
        for factor in (1.0, 2.0):
            net.linear.kernel[...] = factor * jnp.eye(2)
            found.append(jax.jit(lambda reward, x: reward(x))(rewards.as_reward(fn), jnp.ones(2)))
        np.testing.assert_allclose(found, [2, 4], rtol=1e-9)
        with pytest.raises(TypeError, match=r"Flax module '.*net' from outside"):
            tj.dps(model, Wrapper(net).score)

    class Mine(rewards.Reward):
        net: Net

        def __call__(self, x):
            return self.net.score(x)

    with pytest.raises(ValueError, match="training mode"):
        Mine(Net(0.5))
    net = Net()
    net.eval()

    class Hidden(rewards.Reward):
        def __call__(self, x):
            return net.score(x)

    with pytest.raises(TypeError, match="Flax module 'net' from outside"):
        Hidden()

    class MyModel(tj.Model):
        net: Net
        interpolant: tj.Linear
        shape: tuple = (2,)
        dtype: object = jnp.float64

        def denoise(self, t, x):
            return self.net(t, x)

    with pytest.raises(ValueError, match="training mode"):
        MyModel(Net(0.5), tj.Linear())


# What is not used from outside.


class Experiment:
    """An object with a network, of which one method does not use it."""

    def __init__(self, net):
        self.net, self.target = net, jnp.ones(2)

    def velocity(self, t, x):
        return x - self.target

    def train(self):
        return self.net


def test_a_module_that_a_function_does_not_use_is_accepted(monkeypatch):
    net = Net()
    monkeypatch.setitem(globals(), "linear", net)
    net.eval()
    attribute = lambda net, t, x: net.linear(x)
    tj.from_velocity(attribute, net, shape=(2,), dtype=jnp.float64)
    mine = Experiment(net)
    for fn in (mine.velocity, lambda t, x: mine.velocity(t, x)):
        tj.from_velocity(fn, shape=(2,), dtype=jnp.float64)


def test_the_search_ends():
    loop = [unittest.mock.MagicMock()]
    loop.append(loop)
    nested = None
    for _ in range(10_000):
        nested = [nested]
    assert _captured.captured(lambda x: (loop[0].net(x), nested, unwritten)) == []
    unwritten = None


network = None


def global_net(t, x):
    return (lambda: network)()(t, x)


class WithGlobal(eqx.Module):
    def __call__(self, t, x):
        return global_net(t, x)


def test_global_variables_and_arguments_of_helpers_are_found(monkeypatch):
    monkeypatch.setitem(globals(), "network", Net())
    helper = lambda holder, t, x: holder.net(t, x)
    mine = Experiment(Net())
    for fn in (
        global_net,
        WithGlobal(),
        lambda t, x: helper(mine, t, x),
        functools.partial(helper, mine),
    ):
        with pytest.raises(TypeError, match=r"net.* from outside"):
            tj.from_velocity(fn, shape=(2,), dtype=jnp.float64)
