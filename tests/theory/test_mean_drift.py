"""Laws of mean drifts against the flow in the linear interpolant's time, exact tilts, and closed
forms. Tier: exact.

The witness `trace` solves `dx/dt = b + (g^2 / 2) ∇ log h` with SciPy, its gradient by a complex
step: it shares neither clock nor derivatives nor solver with what it judges.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import theory
import tiltjax as tj
from theory import mean_drift


def modes(mu):
    """Two modes, and the reward and scale that favor the right one by a factor e^2."""
    prior = tj.GaussianMixture([0.5, 0.5], [[mu], [-mu]], np.ones((2, 1, 1)))
    return prior, tj.rewards.Quadratic([mu / 2]), 1 / mu**2


def posterior(mu, t, x):
    """Weights, means and variance of the components, given X_t = x, for `modes`."""
    width = t**2 + (1 - t) ** 2
    centers = np.array([mu, -mu])
    log_weights = -((x - t * centers) ** 2) / (2 * width)
    weights = np.exp(log_weights - np.max(log_weights.real))
    return weights / weights.sum(), centers + t * (x - t * centers) / width, (1 - t) ** 2 / width


def trace(mu, log_h, start):
    """Where the flow guided by `∇ log_h(weights, means, variance)` ends."""

    def drift(t, x):
        weights, means, _ = posterior(mu, t, x[0])
        slope = np.imag(log_h(*posterior(mu, t, x[0] + 1e-30j))) / 1e-30
        return [(weights @ means - x[0]) / (1 - t) + (1 - t) / t * slope]

    return scipy.integrate.solve_ivp(
        drift, (1e-7, 1 - 1e-7), [start], method="DOP853", rtol=1e-10, atol=1e-12
    ).y[0, -1]


def plug_in(mu):
    return lambda p, m, v: -p @ ((m - mu / 2) ** 2 + v) / mu**2


def dps(mu):
    return lambda p, m, v: -((p @ m - mu / 2) ** 2) / mu**2


CASES = [
    (theory.plug_in_drift, plug_in, (0.9026, 0.8733, 0.8652)),
    (theory.dps_drift, dps, (0.9736, 0.9646, 0.9617)),
    (theory.doob_drift, None, (0.8373, 0.8693, 0.8779)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("drift", "witness", "recorded"), CASES)
def test_masses_of_modes_and_where_the_flow_parts(drift, witness, recorded):
    for mu, mass in zip((3.0, 6.0, 12.0), recorded, strict=True):
        law = theory.mean_drift_law(*modes(mu), drift=drift)
        right = float(law.masses([0.0])[1])
        assert np.isclose(right, mass, atol=6e-5)
        if witness is not None:
            parting = scipy.stats.norm.isf(right)
            left, right = (trace(mu, witness(mu), parting + sign * 1e-5) for sign in (-1, 1))
            assert left < 0 < right


@pytest.mark.slow
def test_points_of_the_law_are_ends_of_the_flow():
    law = theory.mean_drift_law(*modes(3.0))
    starts = np.array([-2.5, -1.4, -1.0, 0.3, 2.0])
    ends = [trace(3.0, plug_in(3.0), start) for start in starts]
    np.testing.assert_allclose(
        np.cumsum(law.masses(ends))[:-1], scipy.stats.norm.cdf(starts), atol=1e-6
    )


@pytest.mark.slow
def test_doobs_drift_samples_the_tilt():
    prior, reward, scale = modes(3.0)
    law, tilt = (
        theory.mean_drift_law(prior, reward, scale, drift=theory.doob_drift),
        theory.tilt(prior, reward, scale),
    )
    np.testing.assert_allclose(law.mean(), tilt.mixture.mean()[0], atol=1e-6)
    np.testing.assert_allclose(law.var(), tilt.mixture.cov()[0, 0], atol=1e-6)
    estimates = law.error()
    actual = abs(law.mean() - tilt.mixture.mean()[0]), abs(law.var() - tilt.mixture.cov()[0, 0])
    assert all(true < estimate < 1e-5 for true, estimate in zip(actual, estimates, strict=True))
    edges = np.array([-4.0, -2.0, -0.5, 1.0, 3.0, 6.0])
    std, weights = np.sqrt(tilt.mixture.covs[:, 0, 0]), np.asarray(tilt.mixture.weights)
    below = (
        scipy.stats.norm.cdf((edges[:, None] - np.asarray(tilt.mixture.means[:, 0])) / std)
        @ weights
    )
    np.testing.assert_allclose(np.cumsum(law.masses(edges))[:-1], below, atol=1e-8)
    assert law.wasserstein(tilt) < 5e-5
    x = jnp.array([-3.0, 0.2, 2.5])
    expected = [tilt.log_prob(point[None]) for point in x]
    np.testing.assert_allclose(jax.vmap(law.log_prob)(x), expected, atol=1e-6)
    # To a shifted copy the distance is the shift.
    moved = tilt.mixture.replace(
        tilt.mixture.log_weights, tilt.mixture.means + 0.7, tilt.mixture.covs
    )
    np.testing.assert_allclose(law.wasserstein(moved), 0.7, atol=1e-4)


@pytest.mark.slow
def test_one_gaussian_is_the_closed_form_for_any_damping():
    prior, reward = tj.GaussianMixture([1.0], [[0.3]], [[[0.5]]]), tj.rewards.Quadratic([2.5])
    for scale in (tj.Damped(3.0, 0.4), tj.Damped(1.0, 1.5)):
        law, closed = (
            theory.mean_drift_law(prior, reward, scale),
            theory.plug_in_law(prior, reward, scale),
        )
        np.testing.assert_allclose(law.mean(), closed.means[0, 0], atol=1e-7)
        np.testing.assert_allclose(law.var(), closed.covs[0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(
        law.quantile(0.9), scipy.stats.norm.ppf(0.9, law.mean(), law.var() ** 0.5), atol=1e-7
    )
    assert np.all(np.isclose(law.cdf(law.quantile(0.2)), 0.2, atol=1e-8))
    with pytest.raises(ValueError, match=r"edges must increase, got \[1\. 0\.\]"):
        law.masses([1.0, 0.0])


@pytest.mark.slow
@pytest.mark.optimized
def test_rewards_without_closed_form_go_by_quadrature():
    problem = tj.problems.bump()
    law = theory.mean_drift_law(problem.prior, problem.reward, problem.scale)
    parting = scipy.stats.norm.isf(law.masses([0.0])[1])

    def log_h(p, m, v):  # E exp(-(X - 3)^2 / 2) = exp(-(m - 3)^2 / (2 (1 + v))) / sqrt(1 + v)
        return problem.scale * p @ np.exp(-((m - 3) ** 2) / (2 * (1 + v))) / np.sqrt(1 + v)

    left, right = (trace(3.0, log_h, parting + sign * 1e-5) for sign in (-1, 1))
    assert left < 0 < right
    tilted = theory.mean_drift_law(
        problem.prior, problem.reward, problem.scale, drift=theory.doob_drift
    )
    grid = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale, cells=20_000)
    exact = grid.expect(lambda x: jnp.where(x[0] >= 0, 1.0, 0.0))
    np.testing.assert_allclose(tilted.masses([0.0])[1], exact, atol=1e-8)
    np.testing.assert_allclose(tilted.mean(), grid.mean()[0], atol=1e-6)
    assert tilted.wasserstein(grid) < 2e-4


@pytest.mark.slow
def test_the_law_compiles_maps_and_its_masses_differentiate():
    prior, reward, _ = modes(3.0)
    law = lambda scale: theory.mean_drift_law(prior, reward, scale)
    up, down = law(0.1 + 1e-4).masses([0.0])[0], law(0.1 - 1e-4).masses([0.0])[0]
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(lambda scale: law(scale).cdf(0.0))))(
        jnp.array([0.1, 0.1001])
    )
    np.testing.assert_allclose(values[1], up, rtol=1e-7)
    np.testing.assert_allclose(slopes[0], (up - down) / 2e-4, rtol=1e-4)


def test_refusals_say_why_and_what_to_use():
    prior, reward, scale = modes(3.0)
    with pytest.raises(ValueError, match=r"StepReward has gradient zero.*not change the prior"):
        theory.mean_drift_law(prior, 2.0 * tj.rewards.StepReward(1.0) + reward, scale)
    with pytest.raises(ValueError, match="got dimension 2"):
        theory.mean_drift_law(tj.problems.quadratic().prior, tj.rewards.Quadratic([0.0, 1.0]), 1.0)
    with pytest.raises(ValueError, match="positive variance"):
        theory.mean_drift_law(tj.GaussianMixture([1.0], [[0.0]], [[[0.0]]]), reward, scale)
    with pytest.raises(ValueError, match="must be a number or Damped, got SelfDamped"):
        theory.mean_drift_law(prior, reward, tj.SelfDamped(scale, tj.Analytic(prior)))


@pytest.mark.slow
def test_quantiles_are_of_laws_on_the_line():
    plane = tj.problems.quadratic()
    grid = theory.quadrature.tilt(plane.prior, plane.reward, 0.1, cells=50)
    for law in (plane.prior, theory.tilt(plane.prior, plane.reward, 0.1), grid):
        with pytest.raises(ValueError, match="expected a law on the line, got dimension 2"):
            mean_drift.quantile_curve(law)
    with pytest.raises(TypeError, match=r"on the line \(GaussianMixture, Tilt, .*got ndarray"):
        mean_drift.quantile_curve(np.zeros(3))
