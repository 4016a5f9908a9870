"""Laws of guided flows between modes, in any dimension, against closed forms, the law on the line,
and samplers. Tier: exact up to the stated error of quasi-Monte Carlo, statistical for samplers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj
from benchmarks.accuracy import between_modes

DENOISERS = (
    theory.plug_in_denoiser,
    theory.dps_denoiser,
    theory.laplace_denoiser,
    theory.doob_denoiser,
)
CASES = between_modes.cases()


def close(measured, value, factor=5.0):
    """Whether a measured number is within `factor` of its own errors."""
    return np.all(np.abs(measured.value - value) <= factor * measured.error)


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_a_denoiser_is_that_of_the_guidance(denoiser):
    case = CASES["space"]
    model, x, t = tj.Analytic(case.prior), jnp.array([0.3, -0.2, 0.4]), jnp.asarray(0.45)
    reward, scale = case.reward, jnp.asarray(case.scale)
    mean_reward = lambda t, x: scale * theory.expected_reward(model.posterior(t, x), reward)
    guidance = {
        theory.plug_in_denoiser: tj.Doob(model, mean_reward),
        theory.dps_denoiser: tj.dps(model, reward, scale),
        theory.laplace_denoiser: tj.Laplace(model, reward, scale),
        theory.doob_denoiser: tj.Doob(model, theory.log_h(case.prior, reward, scale)),
    }[denoiser]

    @jax.jit
    def both(x):
        estimate, _ = guidance(jax.random.key(0), t, x, guidance.init(x))
        return denoiser(model.posterior(t, x), reward, scale), estimate.tilted

    np.testing.assert_allclose(*both(x), rtol=1e-9)


def test_the_denoiser_of_a_conjugate_reward_is_doobs():
    case = CASES["three"]
    model, reward = tj.Analytic(case.prior), tj.rewards.Quadratic([0.5, -1.0], 0.7)
    reward, t, x = reward + tj.rewards.LinearReward([0.3, 0.0]), jnp.asarray(0.45), jnp.ones(2)
    guidance, scale = tj.Conjugate(model, reward, 0.8), jnp.asarray(0.8)

    @jax.jit
    def both(x):
        estimate, _ = guidance(jax.random.key(0), t, x, guidance.init(x))
        return theory.doob_denoiser(model.posterior(t, x), reward, scale), estimate.tilted

    np.testing.assert_allclose(*both(x), rtol=1e-9)


@pytest.mark.parametrize("denoiser", [theory.plug_in_denoiser, theory.doob_denoiser])
def test_quadrature_agrees_with_the_closed_form(denoiser):
    case = CASES["flat"]
    posterior = tj.Analytic(case.prior).posterior(jnp.asarray(0.3), jnp.array([0.4, -0.1]))
    unknown = tj.rewards.as_reward(lambda x: case.reward(x))
    found, closed = (
        jax.jit(lambda scale, r=r: denoiser(posterior, r, scale))(jnp.asarray(0.4))
        for r in (unknown, case.reward)
    )
    np.testing.assert_allclose(found, closed, atol=1e-6)


@pytest.mark.slow
def test_doobs_law_is_the_tilt():
    case = CASES["three"]
    tilt = theory.tilt(case.prior, case.reward, case.scale).mixture
    law = theory.flow_law(
        case.prior, case.reward, case.scale, denoiser=theory.doob_denoiser, num=64
    )
    mean_error, cov_error = law.error()
    assert np.all(np.abs(law.mean() - tilt.mean()) < 5 * mean_error)
    assert np.all(np.abs(law.cov() - tilt.cov()) < 5 * cov_error)
    assert close(law.masses(lambda x: jax.nn.softmax(tilt.component_log_probs(x))), tilt.weights)
    far = law.wasserstein(tilt)
    assert far.value <= far.error
    x = tilt.sample(jax.random.key(0), 3)
    expected = jax.vmap(tilt.log_prob)(x)
    np.testing.assert_allclose(jax.vmap(law.log_prob)(x), expected, atol=1e-7)
    # Draws of the law, and a shift, which is the distance to a shifted copy.
    draws = law.sample(jax.random.key(1), 4000)
    noise = jnp.std(draws, axis=0) / len(draws) ** 0.5
    assert np.all(np.abs(jnp.mean(draws, axis=0) - tilt.mean()) < 5 * noise)
    moved = tilt.replace(tilt.log_weights, tilt.means + jnp.array([[0.6, 0.8]]), tilt.covs)
    assert close(law.wasserstein(moved), 1.0, 2.0)


@pytest.mark.slow
def test_one_gaussian_is_the_closed_form():
    prior = tj.GaussianMixture([1.0], [[0.3, -0.2]], [[[0.5, 0.2], [0.2, 0.8]]])
    reward = tj.rewards.Quadratic([2.0, 1.0], [[1.0, 0.2], [0.2, 0.5]])
    for scale in (2.0, tj.Damped(2.0, 0.6)):
        law, closed = (
            theory.flow_law(prior, reward, scale, num=64),
            theory.plug_in_law(prior, reward, scale),
        )
        mean_error, cov_error = law.error()
        assert np.all(np.abs(law.mean() - closed.means[0]) < 5 * mean_error)
        assert np.all(np.abs(law.cov() - closed.covs[0]) < 5 * cov_error)
        x = closed.sample(jax.random.key(0), 3)
        expected = jax.vmap(closed.log_prob)(x)
        np.testing.assert_allclose(jax.vmap(law.log_prob)(x), expected, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("denoiser", "drift"),
    [
        (theory.plug_in_denoiser, theory.plug_in_drift),
        (theory.dps_denoiser, theory.dps_drift),
        (theory.doob_denoiser, theory.doob_drift),
    ],
)
def test_on_the_line_the_law_is_that_of_quantiles(denoiser, drift):
    prior = tj.GaussianMixture([0.5, 0.5], [[3.0], [-3.0]], np.ones((2, 1, 1)))
    reward, scale = tj.rewards.Quadratic([1.5]), 1 / 9
    law = theory.flow_law(prior, reward, scale, denoiser=denoiser)
    line = theory.mean_drift_law(prior, reward, scale, drift=drift)
    found = law.masses(lambda x: jnp.array([x[0] < 0, x[0] >= 0]).astype(float))
    assert close(found, line.masses([0.0]))
    assert np.all(found.error < 1e-3)
    mean_error, cov_error = law.error()
    assert np.abs(law.mean()[0] - line.mean()) < 5 * mean_error[0]
    assert np.abs(law.cov()[0, 0] - line.var()) < 5 * cov_error[0, 0]
    z = jnp.array([-0.7, 0.4])
    expected = jax.vmap(line.transport)(z)
    np.testing.assert_allclose(jax.vmap(law.transport)(z[:, None])[:, 0], expected, atol=1e-7)


@pytest.mark.slow
@pytest.mark.optimized
def test_distances_on_the_named_problems():
    """Recorded: W2 of 2,000 samples of the mean drift, whose own error is about .02."""
    recorded = {
        "quadratic": (1.391, 0.232),
        "noniso": (1.573, 0.456),
        "unequal": (1.368, 0.318),
        "uncentered": (1.281, 0.828),
    }
    for name, numbers in recorded.items():
        p = tj.problems.get(name)
        tilt = theory.tilt(p.prior, p.reward, p.scale)
        for scale, number in zip((p.scale, tj.Damped(p.scale, 0.7)), numbers, strict=True):
            far = theory.flow_law(p.prior, p.reward, scale).wasserstein(tilt)
            assert far.error < 0.01
            assert abs(far.value - number) < 0.025


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["damped, mean", "DPS", "Laplace", "Conjugate"])
def test_samples_have_the_law(name, method):
    """Fewer samples than in the benchmark, `between_modes`."""
    case = CASES[name]
    denoiser, reward, scale, guidance = between_modes.methods(case)[method]
    law = theory.flow_law(case.prior, reward, scale, denoiser=denoiser)
    x = tj.sample(jax.random.key(1), guidance.model, guidance, num=5000, steps=100).x
    found = between_modes.deviations(law, x)
    assert max(found[part] for part in ("mean", "cov", "masses")) < 5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_weak_and_strong_tilts_are_finite(dtype):
    p = tj.problems.noniso()
    prior = jax.tree.map(lambda leaf: leaf.astype(dtype), p.prior)
    for denoiser in DENOISERS:
        for scale in (1e-3, 1.0, 1e3):
            law = theory.flow_law(prior, p.reward, scale, denoiser=denoiser, num=16)
            assert law.points.dtype == dtype
            assert np.all(np.isfinite(law.points))
        np.testing.assert_allclose(law.mean(), p.reward.target, atol=0.05)
    unguided = theory.flow_law(prior, p.reward, 0.0, num=64)
    x = jnp.asarray([0.4, -0.2], dtype)
    np.testing.assert_allclose(unguided.log_prob(x), prior.log_prob(x), atol=1e-4)
    far = unguided.wasserstein(prior)
    assert far.value <= far.error


@pytest.mark.slow
def test_the_law_compiles_maps_and_differentiates():
    case = CASES["three"]

    def end(scale, target):
        reward = tj.rewards.Quadratic(target)
        denoiser = theory.laplace_denoiser
        law = theory.flow_law(case.prior, reward, scale, denoiser=denoiser, num=4)
        return law.transport(jnp.array([0.3, -0.4]))[1]

    scales, targets = jnp.array([0.2, 0.2, 0.2]), jnp.tile(jnp.array([[0.5, 1.0]]), (3, 1))
    step = 1e-4 * jnp.array([0.0, 1.0, -1.0])
    derivatives = jax.jit(jax.vmap(jax.value_and_grad(end, (0, 1))))
    values, (by_scale, _) = derivatives(scales + step, targets)
    np.testing.assert_allclose(by_scale[0], (values[1] - values[2]) / 2e-4, rtol=1e-4)
    values, (_, by_target) = derivatives(scales, targets.at[:, 0].add(step))
    np.testing.assert_allclose(by_target[0, 0], (values[1] - values[2]) / 2e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.optimized
def test_rewards_without_closed_form_go_by_quadrature():
    p = tj.problems.double_well()
    law = theory.flow_law(p.prior, p.reward, 0.3, denoiser=theory.doob_denoiser, num=32)
    grid = theory.quadrature.tilt(p.prior, p.reward, 0.3, cells=400)
    mean_error, cov_error = law.error()
    assert np.all(np.abs(law.mean() - grid.mean()) < 5 * mean_error)
    assert np.all(np.abs(law.cov() - grid.cov()) < 5 * cov_error)


def test_refusals_say_why_and_what_to_use():
    p = tj.problems.quadratic()
    convex = tj.rewards.Quadratic([0.0, 1.0], [1.0, -0.1])
    with pytest.raises(ValueError, match="num must be a power of two and at least 4, got 100"):
        theory.flow_law(p.prior, p.reward, 1.0, num=100)
    with pytest.raises(ValueError, match=r"concave reward, but H has the eigenvalue -0\.1"):
        theory.flow_law(p.prior, convex, 1.0, denoiser=theory.laplace_denoiser)
    with pytest.raises(ValueError, match="the tilt has no finite mass"):
        theory.flow_law(p.prior, convex, 100.0, denoiser=theory.doob_denoiser)
    with pytest.raises(ValueError, match="laplace_denoiser takes quadratic rewards, got Bump"):
        theory.flow_law(p.prior, tj.rewards.Bump([0.0, 1.0]), 1.0, denoiser=theory.laplace_denoiser)
    with pytest.raises(ValueError, match="StepReward has gradient zero"):
        theory.flow_law(p.prior, tj.rewards.StepReward(1.0, [1.0, 0.0]), 1.0)
    with pytest.raises(TypeError, match=r"got ConjugateFit.*Use theory\.run_law"):
        theory.flow_law(p.prior, p.reward, 1.0, denoiser=theory.ConjugateFit())
    with pytest.raises(ValueError, match="the prior is one point"):
        theory.flow_law(tj.GaussianMixture([1.0], [[0.0]], [[[0.0]]]), p.reward, 1.0)
    with pytest.raises(ValueError, match="must be a number or Damped, got SelfDamped"):
        theory.flow_law(p.prior, p.reward, tj.SelfDamped(1.0, tj.Analytic(p.prior)))
    with pytest.raises(ValueError, match=r"does not resolve.*theory\.plug_in_denoiser, nodes=8"):
        theory.flow_law(p.prior, tj.rewards.Bump([2.5, 0.0], 0.1), 10.0)
    space = CASES["space"].prior
    with pytest.raises(ValueError, match="in one or two dimensions, got 3"):
        theory.flow_law(space, lambda x: -jnp.sum(x**4), 1.0)
