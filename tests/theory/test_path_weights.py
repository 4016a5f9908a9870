"""Path measures of guided chains against one big Gaussian over all their noise. Tier: exact; limits
by their order.
"""

import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import theory
import tiltjax as tj

MEAN, COV = np.array([0.3, -0.4]), np.array([[0.5, 0.2], [0.2, 0.8]])
TARGET, WEIGHT = np.array([1.0, 0.5]), np.array([[1.0, 0.3], [0.3, 0.6]])
PLANE = tj.GaussianMixture([1.0], MEAN[None], COV[None])
REWARD = tj.rewards.Quadratic(TARGET, WEIGHT)
FIELDS = {"dps": theory.dps_field, "plug_in": theory.plug_in_field, "doob": theory.doob_field}


def line(s2, mean=0.0):
    return tj.GaussianMixture([1.0], [[mean]], [[[s2]]])


def witness(kind, scale, times, eta, c0):
    """`(log Z_N, E_Q[log w], log E_Q[w^2])` from the covariance of everything random at once:
    NumPy, no recursion over moments.
    """
    d, steps = len(MEAN), len(times) - 1
    size = d * (1 + 2 * steps)  # x_0, the noise and the draw of every step, all standard normal
    unit = np.eye(size).reshape(1 + 2 * steps, d, size)
    eye = np.eye(d)

    def run(guided):
        """`x_N` and log w as functions of the noise: affine `(matrix, offset)`, quadratic
        `(constant, linear, curvature)`.
        """
        x, t = c0 * (1 - times[0]) * unit[0], times[0]
        slope = t * COV @ np.linalg.inv(t**2 * COV + (c0 * (1 - t)) ** 2 * eye)
        x, x0 = x + t * slope @ x, t * (MEAN - t * slope @ MEAN)
        quad = [0.0, np.zeros(size), np.zeros((size, size))]
        for j, (t, u) in enumerate(itertools.pairwise(times)):
            sigma_t, sigma_u = c0 * (1 - t), c0 * (1 - u)
            both = t**2 * COV + sigma_t**2 * eye
            slope = t * COV @ np.linalg.inv(both)
            post = sigma_t**2 * COV @ np.linalg.inv(both)
            den, den0 = slope @ x, MEAN + slope @ (x0 - t * MEAN)
            if u == 1:
                x, x0 = den, den0
                continue
            at, at0 = den, den0 - TARGET
            if kind == "plug_in":
                at = at + np.linalg.cholesky(post) @ unit[1 + steps + j]
            gain = -2 * scale * post @ WEIGHT
            if kind == "doob":
                gain = -2 * scale * np.linalg.inv(eye + 2 * scale * post @ WEIGHT) @ post @ WEIGHT
            s2 = eta**2 * (sigma_u**2 - (t * sigma_u**2 / (u * sigma_t)) ** 2)
            back = np.sqrt(sigma_u**2 - s2) / sigma_t
            x, x0 = u * den + back * (x - t * den), u * den0 + back * (x0 - t * den0)
            xi = np.sqrt(s2) * unit[1 + j]
            if guided:
                delta, delta0 = (u - back * t) * gain @ at, (u - back * t) * gain @ at0
                x, x0 = x + delta, x0 + delta0
                # -<delta, s xi> / s^2 - |delta|^2 / (2 s^2)
                quad[0] -= delta0 @ delta0 / (2 * s2)
                quad[1] -= (delta.T @ delta0 + xi.T @ delta0) / s2
                quad[2] += (delta.T @ delta + delta.T @ xi + xi.T @ delta) / s2
            x = x + xi
        off = x0 - TARGET
        quad[0] -= scale * off @ WEIGHT @ off
        quad[1] -= 2 * scale * x.T @ WEIGHT @ off
        quad[2] += 2 * scale * x.T @ WEIGHT @ x
        return quad

    def log_mean_exp(factor, quad):
        constant, linear, curvature = (factor * part for part in quad)
        matrix = np.eye(size) + curvature
        if np.linalg.eigvalsh(matrix)[0] <= 0:
            return np.inf
        return (
            constant
            - np.linalg.slogdet(matrix)[1] / 2
            + linear @ np.linalg.solve(matrix, linear) / 2
        )

    weight = run(True)
    np.testing.assert_allclose(log_mean_exp(1, weight), log_mean_exp(1, run(False)), rtol=1e-9)
    return log_mean_exp(1, run(False)), weight[0] - np.trace(weight[2]) / 2, log_mean_exp(2, weight)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize(("eta", "c0", "start"), [(1.0, 1.0, 0.0), (0.6, 1.7, 0.05)])
@pytest.mark.parametrize("scale", [0.2, 0.5, 5.0])
def test_the_recursion_is_the_joint_gaussian_of_the_whole_path(kind, eta, c0, start, scale):
    times = np.append(np.linspace(start, 0.95, 8), 1.0)
    log_norm, bound, second = witness(kind, scale, times, eta, c0)
    law = theory.path_law(
        FIELDS[kind](PLANE, REWARD, scale, tj.Linear(c0)),
        times=jnp.asarray(times),
        solver=tj.Ancestral(eta),
    )
    np.testing.assert_allclose(law.log_norm, log_norm, rtol=1e-9)
    np.testing.assert_allclose(law.evidence_bound, bound, rtol=1e-9)
    np.testing.assert_allclose(law.kl, log_norm - bound, rtol=1e-8)
    np.testing.assert_allclose(law.log_second_moment, second, rtol=1e-8)
    np.testing.assert_allclose(law.ess, np.exp(2 * log_norm - second), rtol=1e-7)
    assert 0 <= law.ess <= 1
    assert law.floor <= law.kl + 1e-12


def test_the_examples_have_both_finite_and_infinite_variance():
    times = np.append(np.linspace(0.0, 0.95, 8), 1.0)
    assert np.isfinite(witness("dps", 0.2, times, 1.0, 1.0)[2])
    assert witness("dps", 5.0, times, 1.0, 1.0)[2] == np.inf


def test_a_grid_that_ends_before_the_data_weighs_its_own_end():
    law = theory.path_law(
        theory.dps_field(line(0.5), tj.rewards.Quadratic([1.0]), 0.3), times=jnp.array([0.2, 0.9])
    )
    s2 = 0.01 * (1 - (0.2 * 0.1 / (0.9 * 0.8)) ** 2)
    back = np.sqrt(0.01 - s2) / 0.8
    slope = 0.2 * 0.5 / (0.04 * 0.5 + 0.64)
    start = 0.64 * (1 + 0.2 * slope) ** 2
    var = (0.9 * slope + back * (1 - 0.2 * slope)) ** 2 * start + s2
    np.testing.assert_allclose(
        law.log_norm, -np.log(1 + 0.6 * var) / 2 - 0.3 / (1 + 0.6 * var), rtol=1e-12
    )


@pytest.mark.slow
def test_recorded_numbers():
    field = theory.dps_field(line(0.5), tj.rewards.Quadratic([2.5]), 3.0)
    law = theory.path_law(field, times=jnp.linspace(0, 1, 201))
    assert np.isclose(law.log_norm, -5.4713, atol=6e-5)
    assert np.isclose(
        theory.path_limit(line(0.5), tj.rewards.Quadratic([2.5]), 3.0).log_norm, -5.3806, atol=6e-5
    )
    problem = tj.problems.gaussian()
    for eta, floor in ((0.7, 0.025), (0.5, 0.35), (0.3, 2.3)):
        doob = theory.doob_field(problem.prior, problem.reward, 3.0)
        law = theory.path_law(doob, times=jnp.linspace(0, 1, 101), solver=tj.Ancestral(eta))
        assert np.isclose(law.floor, floor, rtol=0.03)
    memoryless = theory.path_law(
        theory.dps_field(problem.prior, problem.reward, 3.0), times=jnp.linspace(0, 1, 101)
    )
    assert np.isclose(memoryless.floor, 0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("scale", [0.7, 3.0])
def test_small_steps_tend_to_the_closed_form(fresh, scale):
    # Two directions, one of them beyond 3 pi / 8 at the last scale, and a linear part of the
    # reward.
    prior = tj.GaussianMixture([1.0], [[0.1, 0.3]], np.diag([0.5, 0.2])[None])
    reward = tj.rewards.Quadratic([0.8, -0.4], weight=[0.9, 0.6]) + tj.rewards.LinearReward(
        [0.1, 0.2]
    )
    field = (theory.plug_in_field if fresh else theory.dps_field)(prior, reward, scale)
    limit = theory.path_limit(prior, reward, scale, fresh=fresh)
    coarse, fine = (theory.path_law(field, times=jnp.linspace(0, 1, n + 1)) for n in (500, 1000))
    assert (scale == 3.0) == (limit.ess == 0) == (fine.ess == 0)
    for name in ("log_norm", "kl", "evidence_bound", "ess"):
        a, b, exact = (float(getattr(law, name)) for law in (coarse, fine, limit))
        assert abs(2 * b - a - exact) < 6e-3 * abs(exact) + 1e-5, name
        assert abs(b - exact) < 0.02 * abs(exact) + 1e-4


def test_the_closed_form_keeps_its_digits_at_small_scales_and_for_linear_rewards():
    for a in (1e-6, 1e-3, 0.04, 0.06, 1.1):
        got = theory.path_limit(line(1.0), tj.rewards.Quadratic([1.5]), a)
        with mpmath.workdps(50):
            b, y2 = mpmath.mpf(a), mpmath.mpf(1.5) ** 2
            kl = (b - mpmath.log(1 + 2 * b)) / 2 + (1 - mpmath.exp(-4 * b)) / 8
            kl += b * y2 * ((1 + mpmath.exp(-4 * b)) / 2 - 1 / (1 + 2 * b))
            q = mpmath.pi / 4 - 2 * b
            log_ess = b - mpmath.log(1 + 2 * b) + b * y2 * (1 + mpmath.tan(q) - 2 / (1 + 2 * b))
            log_ess -= mpmath.log(mpmath.cos(mpmath.pi / 4) / mpmath.cos(q)) / 2
        np.testing.assert_allclose(float(got.kl), float(kl), rtol=1e-11)
        np.testing.assert_allclose(float(got.ess), float(mpmath.exp(log_ess)), rtol=1e-12)
    linear = theory.path_limit(line(1.0), tj.rewards.LinearReward([1.0]), 2.0)
    np.testing.assert_allclose(
        [linear.kl, linear.ess, linear.log_norm], [0.0, 1.0, 2.0], atol=1e-14
    )


def test_the_tails_end_where_they_should():
    edge = 3 * np.pi / 8
    for a, finite in ((edge - 1e-3, True), (edge + 1e-3, False)):
        limit = theory.path_limit(line(1.0), tj.rewards.Quadratic([0.0]), a)
        assert bool(np.isfinite(limit.log_second_moment)) == finite
        assert (limit.ess > 0) == finite
    times = jnp.linspace(0, 1, 1001)
    for a, finite in ((edge - 0.02, True), (edge + 0.02, False)):
        law = theory.path_law(
            theory.dps_field(line(1.0), tj.rewards.Quadratic([0.0]), a), times=times
        )
        assert (law.ess > 0) == finite


def test_exact_guidance_has_weights_of_no_variance_in_the_limit():
    field = theory.doob_field(line(0.5), tj.rewards.Quadratic([2.5]), 3.0)
    laws = [theory.path_law(field, times=jnp.linspace(0, 1, n + 1)) for n in (500, 1000)]
    assert laws[1].kl < 0.02
    assert laws[0].kl > 1.8 * laws[1].kl
    # Damping with a fresh draw has the tilt's law and still [log(1 + 2a) - 2a / (1 + 2a)] / 2 of
    # divergence between paths.
    damped = theory.plug_in_field(line(0.5), tj.rewards.Quadratic([2.5]), tj.Damped(3.0, 0.5**0.5))
    a, b = (float(theory.path_law(damped, times=jnp.linspace(0, 1, n + 1)).kl) for n in (500, 1000))
    np.testing.assert_allclose(2 * b - a, (np.log(4) - 0.75) / 2, rtol=5e-3)


@pytest.mark.slow
def test_laws_compile_map_and_differentiate_at_every_scale():
    times = jnp.linspace(0, 1, 41)

    @jax.jit
    def law(scale, y):
        return theory.path_law(
            theory.dps_field(line(0.5), tj.rewards.Quadratic(y[None]), scale), times=times
        )

    extremes = jnp.asarray([1e-6, 0.1, 0.6, 3.0, 100.0, 1e4])
    mapped = jax.jit(jax.vmap(law, (0, None)))(extremes, jnp.asarray(2.5))
    assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(mapped))
    assert np.all(np.asarray(mapped.ess)[3:] == 0)
    assert np.all(np.asarray(mapped.log_second_moment)[3:] == np.inf)
    np.testing.assert_allclose(mapped.kl[2], law(0.6, jnp.asarray(2.5)).kl, rtol=1e-12)
    for name in ("kl", "ess", "log_second_moment"):
        fn = lambda scale, y, name=name: getattr(law(scale, y), name)
        got = jax.jit(jax.grad(fn, argnums=(0, 1)))(0.6, jnp.asarray(2.5))
        for i, step in enumerate(np.eye(2) * 1e-5):
            up, down = (fn(0.6 + s * step[0], jnp.asarray(2.5 + s * step[1])) for s in (1, -1))
            np.testing.assert_allclose(got[i], (up - down) / 2e-5, rtol=1e-5)
    limits = jax.jit(
        jax.vmap(lambda s: theory.path_limit(line(0.5), tj.rewards.Quadratic([2.5]), s))
    )(extremes)
    assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(limits))
    slope = jax.grad(lambda s: theory.path_limit(line(0.5), tj.rewards.Quadratic([2.5]), s).ess)
    assert np.isfinite(slope(0.05))
    assert slope(4.0) == 0


def test_refusals_say_why_and_what_to_use():
    field, times = theory.dps_field(PLANE, REWARD, 1.0), jnp.linspace(0, 1, 5)
    with pytest.raises(ValueError, match=r"must be Ancestral, got Heun"):
        theory.path_law(field, times=times, solver=tj.Heun())
    with pytest.raises(ValueError, match=r"eta = 0.*has no weights"):
        theory.path_law(field, times=times, solver=tj.Ancestral(0.0))
    with pytest.raises(ValueError, match="mixture of 2"):
        theory.path_limit(tj.problems.quadratic().prior, tj.problems.quadratic().reward, 1.0)
    with pytest.raises(ValueError, match="needs a covariance that commutes"):
        theory.path_limit(PLANE, tj.rewards.Quadratic(TARGET, [2.0, 1.0]), 1.0)
    with pytest.raises(ValueError, match="Bump"):
        theory.path_limit(PLANE, tj.rewards.Bump(TARGET), 1.0)
