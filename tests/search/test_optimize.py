"""Searching with few queries: what is asked, how often, and whether it pays.

Tiers: exact (counts, order, repeatability), statistical (regret against draws of the model, over
seeds).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj
from tiltjax.search._optimize import _distinct

MODEL = tj.Analytic(tj.GaussianMixture([1.0], jnp.zeros((1, 4)), jnp.eye(4)[None]))
PEAK = np.array([2.0, -1.5, 1.0, 0.0])
SETTINGS = {"scale": 10.0, "rounds": 6, "queries": 8, "num": 64, "steps": 15}


def query(x):
    return np.exp(-((np.asarray(x) - PEAK) ** 2).sum(1) / 8)


def search(seed=0, **over):
    return tj.optimize(jax.random.key(seed), MODEL, query, **SETTINGS | over)


@pytest.mark.slow
def test_every_round_asks_once_and_all_is_kept():
    asked = []

    def spy(x):
        asked.append(x)
        return query(x)

    found = tj.optimize(jax.random.key(0), MODEL, spy, **SETTINGS)
    assert [x.shape for x in asked] == [(8, 4)] * 6
    np.testing.assert_array_equal(found.x, np.concatenate(asked))
    np.testing.assert_allclose(found.values, query(found.x), rtol=1e-12)
    np.testing.assert_array_equal(found.rounds, np.repeat(np.arange(6), 8))
    np.testing.assert_array_equal(found.best, found.x[np.argmax(found.values)])
    regret = found.regret(1.0)
    assert regret.shape == (48,)
    assert np.all(np.diff(regret) <= 0)
    np.testing.assert_allclose(regret[-1], 1 - found.values.max(), rtol=1e-12)
    again = search()
    np.testing.assert_array_equal(again.x, found.x)


@pytest.mark.slow
def test_it_beats_draws_of_the_model_at_equal_queries():
    gains = []
    for seed in range(6):
        drawn = query(tj.sample(jax.random.key(100 + seed), MODEL, num=48, steps=30).x)
        gains.append((1 - drawn.max()) - search(seed).regret(1.0)[-1])
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    assert np.mean(gains) > 3 * error


@pytest.mark.slow
def test_another_guide_and_surrogate_run():
    found = search(
        surrogate=tj.search.surrogates.Bootstrap(2, steps=30), guide=tj.Laplace, rounds=2
    )
    assert np.all(np.isfinite(found.values))


def test_a_round_asks_for_states_once_where_it_can():
    x = jnp.asarray([[0.0], [0.0], [1.0], [2.0], [2.0]])
    few = np.asarray(_distinct(jax.random.key(0), x, jnp.zeros(5), 3))
    assert sorted(few[:, 0]) == [0.0, 1.0, 2.0]
    assert len(_distinct(jax.random.key(0), x, jnp.zeros(5), 5)) == 5
    # By weight: the state of nearly all of it comes first, copies counted together.
    first = [
        float(
            _distinct(jax.random.key(i), x, jnp.log(jnp.asarray([0.3, 0.3, 0.1, 0.15, 0.15])), 1)[
                0, 0
            ]
        )
        for i in range(400)
    ]
    share = np.mean(np.asarray(first) == 0.0)
    assert abs(share - 0.6) < 5 * np.sqrt(0.6 * 0.4 / 400)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"num": 4}, "num must be at least queries = "),
        ({"rounds": 0}, "rounds"),
        ({"surrogate": "ucb"}, "GaussianProcess"),
        (
            {"earlier": tj.search.Search(np.zeros((1, 3)), np.zeros(1), np.zeros(1, int), None)},
            r"states of shape \(\d,\), got \(3,\)",
        ),
    ],
)
def test_bad_settings_are_refused(over, message):
    with pytest.raises((ValueError, TypeError), match=message):
        search(**over)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.sum(1) * 1j, "real numbers"),
        (lambda x: np.full(len(x), "good"), "real numbers"),
        (lambda x: np.zeros(3), "8 values for 8 states, got shape"),
        (lambda x: np.full(len(x), np.nan), "got 8 of 8 that are not"),
    ],
)
def test_bad_answers_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        tj.optimize(jax.random.key(0), MODEL, answer, **SETTINGS)


@pytest.mark.slow
def test_a_search_goes_on_where_it_failed():
    calls = []

    def fragile(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise RuntimeError("the lamp went out")
        return query(x)

    with pytest.raises(RuntimeError, match="the lamp went out") as caught:
        tj.optimize(jax.random.key(0), MODEL, fragile, **SETTINGS)
    found = caught.value.search
    np.testing.assert_allclose(found.values, query(found.x), rtol=1e-12)
    assert len(found.values) == 16
    more = tj.optimize(jax.random.key(1), MODEL, query, **SETTINGS | {"rounds": 2}, earlier=found)
    np.testing.assert_array_equal(more.x[:16], found.x)
    np.testing.assert_array_equal(more.rounds, np.repeat(np.arange(4), 8))


def test_values_without_noise_on_a_line_in_single_precision_are_no_trouble():
    single = lambda values: jnp.asarray(values, jnp.float32)
    prior = tj.GaussianMixture(
        single([0.5, 0.5]), single([[-2.0], [2.0]]), single([[[0.3]], [[0.3]]])
    )
    settings = {"scale": 2.0, "rounds": 3, "queries": 16, "num": 64, "steps": 20}
    found = tj.optimize(
        jax.random.key(0), tj.Analytic(prior), lambda x: -np.abs(x[:, 0] - 2), **settings
    )
    assert found.x.dtype == np.float32
    assert found.regret(0.0)[-1] < 0.05


def test_tokens_are_refused():
    with pytest.raises(TypeError, match="must be a Model, got MarkovChain"):
        tj.optimize(
            jax.random.key(0),
            tj.tokens.MarkovChain([0.5, 0.5], jnp.full((2, 2), 0.5), 3),
            query,
            **SETTINGS,
        )
