"""Laws of runs on mixtures, as points: fields are those of the guidances, one Gaussian has its
closed form, selection its own, and samplers have the law. Tier: exact for fields and weights,
statistical for laws.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj
from benchmarks.accuracy import recommended
from theory import runs

CASE = recommended.cases()["four modes, anisotropic"]
T, X = 0.4, (0.3, -0.2)


class SameNoise(tj.Glass):
    """`Glass` with the random numbers of `PlugInDraws`."""

    def draws(self, key, t, x, k, denoised=None):
        noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        draw = lambda i: self._flow(noise(i), t, x, self.model.denoise(t, x))
        return jax.vmap(draw)(jnp.arange(k))


@functools.cache
def problem():
    return runs.problem_of(CASE.prior, CASE.reward, tj.Linear())


def evaluate(guidance, field, key_of=lambda key: key):
    """The denoisers of a guidance and of a field at one state."""
    t, x, key, shared = jnp.asarray(T), jnp.asarray(X), jax.random.key(3), problem()

    @jax.jit
    def both(scale):
        estimate, _ = guidance(scale)(key, t, x, guidance(scale).init(x))
        return estimate.tilted, field(shared, scale, key_of(key), t, x, runs.Fit.none(x))

    return both(jnp.asarray(CASE.scale))


@pytest.mark.parametrize("k", [1, 3])
def test_plug_in_draws_are_those_of_glass(k):
    posterior = SameNoise(tj.Analytic(CASE.prior), 4)
    guidance = lambda scale: tj.PlugIn(posterior, CASE.reward, scale, k=k)
    draws = lambda key: jax.random.fold_in(key, 1)
    tilted, found = evaluate(guidance, theory.PlugInDraws(k, 4), draws)
    np.testing.assert_allclose(found.denoised, tilted, rtol=1e-10)


def test_the_end_of_a_flow_map_is_that_of_fmrg():
    model = tj.Analytic(CASE.prior)
    guidance = lambda scale: tj.fmrg(model, CASE.reward, scale, inner_steps=5)
    tilted, found = evaluate(guidance, theory.FlowMapEnd(5))
    np.testing.assert_allclose(found.denoised, tilted, rtol=1e-10)
    np.testing.assert_allclose(found.start, model.denoise(jnp.asarray(T), jnp.asarray(X)))


NEAR = tj.rewards.Bump([1.0, 1.0], 1.5)
FITTED = {
    "anisotropic": (CASE.reward, CASE.scale),
    "not quadratic": (3 * NEAR, 1.0),
    "partly conjugate": (NEAR + tj.rewards.Quadratic([0.5, 0.0], 0.1), 2.0),
}


@pytest.mark.parametrize("name", FITTED)
def test_a_conjugate_fit_is_that_of_the_guidance(name):
    """Over several times: the fit is carried."""
    (reward, scale), x = FITTED[name], jnp.asarray(X)
    shared = runs.problem_of(CASE.prior, reward, tj.Linear())
    variance = lambda snr: shared.variance(snr)
    guidance = tj.Conjugate(tj.Analytic(CASE.prior), reward, scale, variance=variance)
    state, fit = guidance.init(x), runs.Fit.none(x)
    of_guidance = jax.jit(lambda *state: guidance(*state))
    of_field = jax.jit(lambda *state: runs.ConjugateFit()(shared, jnp.asarray(scale), *state))
    for i in range(6):
        key, t = jax.random.key(i), jnp.asarray(T + i * 0.05)
        estimate, state = of_guidance(key, t, x, state)
        draws = jax.random.split(jax.random.split(key, 1)[0])[0]
        found = of_field(draws, t, x, fit)
        fit = found.memory
        np.testing.assert_allclose(found.denoised, estimate.tilted, rtol=1e-9)
        np.testing.assert_allclose(fit.precision, state.precision, rtol=1e-9)
        np.testing.assert_allclose(fit.stiff, state.stiff, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_conjugate_run_of_any_reward_is_that_of_the_sampler():
    prior, steps = tj.problems.get("quadratic").prior, 20
    reward = 4 * NEAR
    law = theory.run_law(prior, reward, 1.0, theory.ConjugateFit(), steps=steps, num=2048)
    model = tj.Analytic(prior)
    guidance = tj.Conjugate(model, reward, 1.0)
    x = tj.sample(jax.random.key(0), model, guidance, num=100_000, steps=steps).x
    statistics = lambda x: jnp.concatenate([x, x**2, (x[:1] > 0)], dtype=x.dtype)
    expected = np.asarray(jax.vmap(statistics)(x))
    found = law.estimate(lambda x: jnp.mean(jax.vmap(statistics)(x), axis=0))
    error = np.hypot(found.error, expected.std(0) / len(expected) ** 0.5)
    assert np.all(np.abs(found.value - expected.mean(0)) < 5 * error)
    # Far from the prior, and not the tilt.
    assert expected[:, -1].mean() > 0.6


@pytest.mark.parametrize(
    ("field", "affine"),
    [
        (theory.Deterministic(theory.dps_denoiser), theory.dps_field),
        (theory.PlugInDraws(1, 30), theory.plug_in_field),
    ],
)
def test_one_gaussian_has_its_closed_form(field, affine):
    case = tj.problems.get("gaussian")
    times = jnp.linspace(1e-3, 1, 7)
    exact = theory.discrete_law(affine(case.prior, case.reward, 1.0), times=times)
    law = theory.run_law(case.prior, case.reward, 1.0, field, times=times, num=64)
    mean, cov = law.error()
    assert np.all(np.abs(law.mean() - exact.mean()) < 5 * mean + 1e-9)
    # A draw of 30 inner steps has not quite the spread of an exact draw.
    assert np.all(np.abs(law.cov() - exact.cov()) < 5 * cov + 0.02)


def test_the_best_of_n_is_that_of_all_groups():
    values = np.array([0.3, -1.0, 2.0, 0.3, 0.7])
    found = runs._best_of(values, 3)
    groups = values[np.stack(np.meshgrid(*[np.arange(5)] * 3), -1).reshape(-1, 3)]
    best = np.max(groups, axis=1)
    shared = np.array([np.mean(best == value) / np.sum(values == value) for value in values])
    np.testing.assert_allclose(found, shared)


def test_systematic_indices_are_as_often_as_their_weights():
    weights, x = np.array([0.5, 0.0, 2.0, 1.5]), np.array([[0.0], [3.0], [1.0], [-1.0]])
    counts = np.bincount(runs._systematic(x, weights, 8, 0.3), minlength=4)
    np.testing.assert_allclose(counts, 8 * weights / 4)
    counts = np.bincount(runs._systematic(x, weights, 8, 0.3)[:4], minlength=4)
    assert np.all(np.abs(counts - weights) < 1)


@pytest.mark.parametrize("scale", [None, pytest.param(1.5, marks=pytest.mark.slow)])
def test_selection_is_that_of_quadrature(scale):
    prior = tj.GaussianMixture([0.3, 0.7], [[-1.0], [1.5]], [[[0.4]], [[0.2]]])
    reward = tj.rewards.Quadratic([0.5])
    law = theory.PointLaw(prior, runs.mixture_points(prior, 1024))
    found = theory.selected_law(law, reward, 6, scale)
    if scale is None:
        exact = theory.best_of_n(prior, reward, 6)
    else:
        exact = theory.softmax_of_n(prior, reward, 6, scale)
    for power in (1, 2):
        moment = found.estimate(lambda x, power=power: jnp.mean(x**power))
        components = exact.mixture()
        mean, cov = components.mean()[0], components.cov()[0, 0]
        expected = mean if power == 1 else cov + mean**2
        assert abs(moment.value - expected) < 5 * moment.error + 2e-3


@pytest.mark.slow
def test_a_law_has_a_derivative():
    """The derivative of the mean, as a difference."""
    times, field = jnp.linspace(1e-3, 1, 4), theory.PlugInDraws(2, 2)

    @jax.jit
    def mean(scale):
        return theory.run_law(CASE.prior, CASE.reward, scale, field, times=times, num=4).mean()[0]

    at, step = jnp.asarray(0.1), 1e-5
    slope = (mean(at + step) - mean(at - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(mean)(at), slope, rtol=1e-5)


def test_refusals_say_why():
    model = tj.Analytic(CASE.prior)
    with pytest.raises(ValueError, match="a number or Damped"):
        theory.run_law(
            CASE.prior, CASE.reward, tj.scales.SelfDamped(1.0, model), theory.Unguided(), steps=2
        )
    with pytest.raises(TypeError, match="PlugInDraws"):
        theory.run_law(CASE.prior, CASE.reward, 1.0, theory.dps_denoiser, steps=2)
    field = theory.Deterministic(theory.laplace_denoiser)
    with pytest.raises(ValueError, match="no closed form"):
        theory.run_law(CASE.prior, lambda x: x[0], 1.0, field, steps=2)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("four modes, one singular", marks=pytest.mark.nightly),
        "four modes, anisotropic",
    ],
)
def test_the_order_of_a_plan_is_that_of_samples(name):
    found = recommended.compare(recommended.cases()[name], budget=100, num=500, sets=2)
    assert found["pairs"] > 20
    assert found["wrong"] == 0
    assert found["off"] == 0


@pytest.mark.slow
@pytest.mark.optimized
def test_one_damped_draw_is_as_far_as_published():
    for name in ("quadratic", "uncentered"):
        found = recommended.damped(name)
        (w2, error), published = found["predicted"], found["published"]
        floor = 0.07  # of the published number
        assert abs(np.hypot(w2, floor) - published) < 0.15 * published + error
