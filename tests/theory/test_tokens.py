"""Enumerated laws of tokens: against sums written out in NumPy, against each other, and against
transfer matrices.

Tier: exact, float64.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj
from theory import tokens

INITIAL = np.asarray([0.5, 0.3, 0.2])
TRANSITION = np.asarray([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.0, 0.7]])
SCALE = 0.7


def chain(length=4, prompt=None):
    return tj.tokens.MarkovChain(INITIAL, TRANSITION, length, prompt=prompt)


def reward(x):
    return jnp.sum(x == 1).astype(float) - 0.5 * jnp.where(x[0] == x[-1], 1.0, 0.0)


def written_out(length=4):
    """`{x: (P(x), r(x))}`, by loops."""
    found = {}
    for x in itertools.product(range(3), repeat=length):
        p = INITIAL[x[0]] * np.prod([TRANSITION[a, b] for a, b in itertools.pairwise(x)])
        found[x] = (p, x.count(1) - 0.5 * (x[0] == x[-1]))
    return found


def test_states_are_listed_in_order_and_found_again():
    states = tokens.token_states(3, 4)
    np.testing.assert_array_equal(states, list(itertools.product(range(3), repeat=4)))
    law = theory.token_tilt(chain(), reward, SCALE)
    np.testing.assert_array_equal(jax.vmap(law.index)(law.states), np.arange(81))


def test_the_tilt_is_the_sum_written_out():
    law, truth = theory.token_tilt(chain(), reward, SCALE), written_out()
    mass = np.asarray([p * np.exp(SCALE * r) for p, r in truth.values()])
    np.testing.assert_allclose(law.log_norm, np.log(mass.sum()), atol=1e-12)
    np.testing.assert_allclose(law.probs, mass / mass.sum(), atol=1e-12)
    mean = np.sum([m * r for m, (_, r) in zip(mass, truth.values(), strict=True)]) / mass.sum()
    np.testing.assert_allclose(law.expect(reward), mean, atol=1e-12)
    fraction = np.sum([m for m, x in zip(mass, truth, strict=True) if x[0] == 1]) / mass.sum()
    np.testing.assert_allclose(law.expect(lambda x: x[0] == 1), fraction, atol=1e-12)
    np.testing.assert_allclose(law.expect(lambda x: x).shape, (4,))


def test_the_derivative_of_log_norm_is_the_mean_reward():
    law = theory.token_tilt(chain(), reward, SCALE)
    slope = jax.grad(lambda scale: theory.token_tilt(chain(), reward, scale).log_norm)(SCALE)
    np.testing.assert_allclose(slope, law.expect(reward), atol=1e-12)


@pytest.mark.parametrize("x", [(3, 3, 3, 3), (1, 3, 3, 0), (3, 2, 3, 3), (0, 1, 2, 0)])
def test_log_h_is_the_conditional_mean_written_out(x):
    agree = [
        (p, r)
        for y, (p, r) in written_out().items()
        if all(a in (b, 3) for a, b in zip(x, y, strict=True))
    ]
    truth = np.log(sum(p * np.exp(SCALE * r) for p, r in agree) / sum(p for p, _ in agree))
    np.testing.assert_allclose(
        theory.token_log_h(chain(), reward, SCALE, jnp.asarray(x)), truth, atol=1e-12
    )


@pytest.mark.parametrize("prompt", [(3, 3, 3, 3), (1, 3, 3, 0), (3, 2, 3, 3), (0, 1, 2, 0)])
def test_the_tilt_given_a_prompt_is_the_sum_written_out(prompt):
    mass = np.asarray(
        [
            p * np.exp(SCALE * r) * all(a in (b, 3) for a, b in zip(prompt, x, strict=True))
            for x, (p, r) in written_out().items()
        ]
    )
    log_h = theory.token_log_h(chain(), reward, SCALE, jnp.asarray(prompt))
    for law in (
        theory.token_tilt(chain(), reward, SCALE, prompt=list(prompt)),
        theory.token_tilt(chain(prompt=prompt), reward, SCALE),  # the chain's own
    ):
        np.testing.assert_allclose(law.probs, mass / mass.sum(), atol=1e-12)
        np.testing.assert_allclose(law.log_norm, log_h, atol=1e-12)
    other = theory.token_tilt(chain(prompt=[3, 0, 3, 3]), reward, SCALE, prompt=prompt)
    np.testing.assert_allclose(other.probs, law.probs, atol=1e-12)


def test_log_h_is_a_martingale():
    """`h(x) = sum_v D(x)[i, v] h(x with v shown at i)`: what weights rest on."""
    model, x = chain(), jnp.asarray([3, 1, 3, 3])
    h = lambda x: np.exp(theory.token_log_h(model, reward, SCALE, x))
    denoised = np.asarray(model.denoise(jnp.asarray(0.0), x))
    for i in (0, 2, 3):
        parts = [p * h(x.at[i].set(v)) for v, p in enumerate(denoised[i]) if p > 0]
        np.testing.assert_allclose(sum(parts), h(x), atol=1e-12)


def test_marginals_and_their_product():
    law = theory.token_tilt(chain(), reward, SCALE)
    marginals = np.asarray(tokens.token_marginals(law, 3))
    np.testing.assert_allclose(marginals.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(marginals[0, 1], law.expect(lambda x: x[0] == 1), atol=1e-12)
    product = tokens.independent(law, 3)
    written = [np.prod([marginals[i, v] for i, v in enumerate(x)]) for x in written_out()]
    np.testing.assert_allclose(product.probs, written, atol=1e-12)
    np.testing.assert_allclose(tokens.token_marginals(product, 3), marginals, atol=1e-12)


@pytest.mark.slow
def test_transfer_matrices_agree_with_enumeration():
    rng = np.random.default_rng(0)
    single, pair = rng.normal(size=(5, 3)), rng.normal(size=(3, 3))
    total = lambda x: (
        jnp.sum(jnp.asarray(single)[jnp.arange(5), x]) + jnp.sum(jnp.asarray(pair)[x[:-1], x[1:]])
    )
    for scale in (0.0, 0.7, -2.0):
        truth = theory.token_tilt(chain(5), total, scale).log_norm
        np.testing.assert_allclose(
            theory.pair_log_norm(chain(5), single, pair, scale), truth, atol=1e-12
        )
    alone = lambda x: jnp.sum(jnp.asarray(single)[jnp.arange(5), x])
    np.testing.assert_allclose(
        theory.pair_log_norm(chain(5), single),
        theory.token_tilt(chain(5), alone).log_norm,
        atol=1e-12,
    )
    prompt = [3, 1, 3, 3, 2]
    for model, given in ((chain(5), prompt), (chain(5, prompt), None)):
        np.testing.assert_allclose(
            theory.pair_log_norm(model, single, pair, 0.7, prompt=given),
            theory.token_tilt(model, total, 0.7, prompt=given).log_norm,
            atol=1e-12,
        )
    # A reward that is the same everywhere moves nothing, at a length nobody could list.
    np.testing.assert_allclose(
        theory.pair_log_norm(chain(1000), np.full((1000, 3), 0.01)), 10, atol=1e-9
    )


def test_exclusions():
    barred = lambda x: jnp.where(x[0] == 1, 0.0, -jnp.inf)
    law = theory.token_tilt(chain(), barred, 1.0)
    np.testing.assert_allclose(law.log_norm, np.log(0.3), atol=1e-12)
    np.testing.assert_allclose(law.expect(lambda x: x[0] == 1), 1, atol=1e-12)
    np.testing.assert_allclose(theory.token_tilt(chain(), barred, 0.0).log_norm, 0, atol=1e-12)


def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match=r"3 tokens at 14 positions .* pair_log_norm"):
        theory.token_tilt(chain(14), reward)
    with pytest.raises(ValueError, match="probability zero"):
        theory.token_log_h(chain(), reward, 1.0, jnp.asarray([2, 1, 3, 3]))
    for tilted in (
        theory.token_tilt,
        lambda *args, **given: theory.pair_log_norm(chain(), np.zeros((4, 3)), **given),
    ):
        with pytest.raises(ValueError, match=r"prompt has probability zero .* \[2, 1, 3, 3\]"):
            tilted(chain(), reward, prompt=[2, 1, 3, 3])
        with pytest.raises(ValueError, match="prompt must hold 4 integers, 3 where"):
            tilted(chain(), reward, prompt=[2.0, 1.0, 3.0, 3.0])
    with pytest.raises(ValueError, match="x must hold 4 integers, 3 where"):
        theory.token_log_h(chain(), reward, 1.0, jnp.asarray([2, 1, 3]))
    with pytest.raises(ValueError, match="no finite mass"):
        theory.token_tilt(chain(), lambda x: -jnp.inf * jnp.ones(()))
    with pytest.raises(TypeError, match=r"Markov chain, such as tiltjax.*, got ndarray"):
        theory.token_tilt(TRANSITION, reward)
    with pytest.raises(TypeError, match=r"got None\. For log Z use token_tilt"):
        theory.token_log_h(chain(), reward, 1.0, None)
    with pytest.raises(ValueError, match="one scalar"):
        theory.token_tilt(chain(), lambda x: x.astype(float))
    with pytest.raises(ValueError, match=r"single must have shape \(4, 3\)"):
        theory.pair_log_norm(chain(), np.zeros((3, 3)))
