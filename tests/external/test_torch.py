"""PyTorch rewards against the same ones in JAX. Tier: parity (1e-10 in float64, 1e-6 of the largest
entry in float32).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tiltjax as tj

RNG = np.random.default_rng(0)
W, V, POINTS = RNG.normal(size=(16, 4)), RNG.normal(size=16), RNG.normal(size=(7, 4))
TOLERANCE = {jnp.float64: 1e-10, jnp.float32: 1e-6}


def in_torch(x):
    return torch.tanh(x @ torch.as_tensor(W, dtype=x.dtype).T) @ torch.as_tensor(
        V, dtype=x.dtype
    ) - (x**2).sum(1)


def in_jax(x):
    return jnp.tanh(jnp.asarray(W, x.dtype) @ x) @ jnp.asarray(V, x.dtype) - jnp.sum(x**2)


def network(dtype):
    layers = torch.nn.Linear(4, 16, bias=False), torch.nn.Tanh(), torch.nn.Linear(16, 1, bias=False)
    module = torch.nn.Sequential(*layers, torch.nn.Flatten(0)).to(dtype)
    with torch.no_grad():
        layers[0].weight.copy_(torch.as_tensor(W))
        layers[2].weight.copy_(torch.as_tensor(V[None]))
    return module.eval()


def close(got, expected, tolerance):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(dtype):
    x = jnp.asarray(POINTS, dtype)
    for transform in (jax.vmap, lambda fn: jax.jit(jax.vmap(fn))):
        value, gradient = transform(jax.value_and_grad(tj.external.from_torch(in_torch)))(x)
        expected = jax.vmap(jax.value_and_grad(in_jax))(x)
        assert value.dtype == gradient.dtype == dtype
        close(value, expected[0], TOLERANCE[dtype])
        close(gradient, expected[1], TOLERANCE[dtype])
        close(transform(tj.external.from_torch(in_torch))(x), expected[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_module_keeps_its_own_dtype(dtype):
    reward = tj.external.from_torch(network(torch.float32))
    plain = lambda x: in_jax(x) + jnp.sum(x**2)
    x = jnp.asarray(POINTS, dtype)
    value, gradient = jax.vmap(jax.value_and_grad(reward))(x)
    assert (reward.name, value.dtype, gradient.dtype) == ("Sequential", dtype, dtype)
    expected = jax.vmap(jax.value_and_grad(plain))(x)
    close(value, expected[0], 1e-6)
    close(gradient, expected[1], 1e-6)


def test_a_guided_run_is_that_of_the_same_reward_in_jax():
    model = tj.from_denoiser(
        lambda t, x: t * x / (t**2 + (1 - t) ** 2), shape=(4,), dtype=jnp.float64
    )
    run = lambda reward: (
        tj.sample(jax.random.key(0), model, tj.dps(model, reward, 0.5), num=5, steps=4).x
    )
    np.testing.assert_allclose(
        run(2 * tj.external.from_torch(in_torch, timeout=60)),
        run(2 * tj.rewards.as_reward(in_jax)),
        atol=1e-9,
    )


def test_settings_are_those_of_external():
    record = tj.external.Record()
    reward = tj.external.from_torch(in_torch, chunk_size=3, record=record, name="judge")
    jax.vmap(reward)(jnp.asarray(POINTS)).block_until_ready()
    assert (record.calls, len(record), reward.name) == (3, 7, "judge")


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
        tj.external.from_torch(network(torch.float64).train())
    with pytest.raises(TypeError, match="must return a tensor, got float"):
        tj.external.from_torch(lambda x: 1.0).evaluate(POINTS)
    with pytest.raises(ValueError, match=r"values of shape \(7, 4\), expected \(7,\)"):
        tj.external.from_torch(lambda x: x).evaluate(POINTS, gradient=True)


class Judge:
    def __init__(self, net):
        self.net = net

    def score(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    "hide",
    [
        lambda net: net.forward,
        lambda net: lambda x: net(x),
        lambda net: functools.partial(net),
        lambda net: (lambda nets: lambda x: nets["a"][0](x))({"a": [net]}),
        lambda net: Judge(net).score,
        lambda net: (lambda judge: lambda x: judge.score(x))(Judge(net)),
        lambda net: torch.nn.Sequential(torch.nn.Sequential().eval(), net),
    ],
    ids=("method", "closure", "partial", "dictionary", "object", "closure of an object", "part"),
)
def test_a_module_in_training_mode_is_found_everywhere(hide):
    for build in (tj.external.from_torch, tj.external.External):
        with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
            build(hide(network(torch.float64).train()))


def without_grad(x):
    with torch.no_grad():
        return x.sum(1)


WEIGHT = torch.ones((), dtype=torch.float64, requires_grad=True)
NO_GRADIENT = {
    "no_grad": without_grad,
    "step": lambda x: (x[:, 0] > 0).to(x.dtype),
    "detached": lambda x: WEIGHT * x.detach().sum(1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_GRADIENT)
def test_a_reward_without_a_gradient_says_which_methods_need_none(name):
    model = tj.from_denoiser(
        lambda t, x: t * x / (t**2 + (1 - t) ** 2), shape=(2,), dtype=jnp.float64
    )
    reward, key = tj.external.from_torch(NO_GRADIENT[name]), jax.random.key(0)
    for guidance in (tj.dps(model, reward), tj.PlugIn(tj.Glass(model), reward, k=2)):
        with pytest.raises(ValueError, match=r"has no gradient.*best_of_n.*fk_steering.*ValueOnly"):
            tj.sample(key, model, guidance, num=4, steps=2)
    samples = tj.sample(key, model, num=4, steps=2)
    tj.best_of_n(samples, reward, 2)
    tj.softmax_of_n(key, samples, reward, 2, 1.0)
    tj.fk_steering(key, model, reward, num=4, steps=10)
    tj.svdd(key, model, reward, num=4, steps=2, children=2)
    guidance = tj.dps(model, tj.rewards.ValueOnly(reward))
    tj.smc(key, model, guidance, num=4, steps=2, proposal=tj.weighted.proposals.Base())


def test_rewards_of_tokens_are_real_numbers_and_tokens_stay_integers():
    x = jnp.array([0, 1, 0, 1, 1, 0, 0, 0])
    share = tj.external.from_torch(lambda batch: batch.float().mean(1))
    assert float(share(x)) == 0.375
    torch.manual_seed(0)
    embedded = torch.nn.Sequential(
        torch.nn.Embedding(2, 3), torch.nn.Flatten(), torch.nn.Linear(24, 1), torch.nn.Flatten(0)
    ).eval()
    expected = float(embedded(torch.tensor([x.tolist()])).detach()[0])
    assert abs(float(tj.external.from_torch(embedded)(x)) - expected) < 1e-6


def test_weights_of_tokens_use_such_a_reward():
    """Four tokens that are 1 with probability 1/2: Z = ((1 + e^(1/4)) / 2)^4 for their mean."""
    chain = tj.tokens.MarkovChain([0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], length=4)
    share = tj.external.from_torch(lambda batch: batch.float().mean(1))
    guide = tj.tokens.Completions(chain, share, scale=1.0, k=2)
    log_norm = tj.smc(jax.random.key(0), chain, guide, num=2000, steps=4).log_norm
    assert abs(float(log_norm) - 4 * np.log((1 + np.exp(0.25)) / 2)) < 0.03


def test_it_prints_as_its_call_with_the_number_of_parameters():
    module = torch.nn.Sequential(torch.nn.Linear(784, 100), torch.nn.Linear(100, 1)).eval()
    reward = tj.external.from_torch(module, chunk_size=4)
    assert repr(reward) == "from_torch(Sequential of 78.6 k parameters, chunk_size=4)"
    assert repr(2 * tj.external.from_torch(in_torch)) == "2 * from_torch(in_torch)"
