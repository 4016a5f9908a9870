"""Laws where covariance and reward do not commute, against equations written another way, the
recursion, and the closed forms. Tier: exact.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from helpers import contracts

import theory
import tiltjax as tj
from theory import _moments

MEAN, TARGET = np.array([0.4, -0.3]), np.array([1.0, 2.0])
COV = np.array([[0.9, 0.35], [0.35, 0.4]])
MATRIX = np.array([[1.2, -0.5], [-0.5, 0.6]])
LINE = np.array([0.3, -0.2])
PRIOR = contracts.gaussian(MEAN, COV)
REWARD = tj.rewards.Quadratic(TARGET, weight=MATRIX) + tj.rewards.LinearReward(LINE)
LEVELS = tj.DiscreteVP(np.cumprod(1 - np.linspace(0.01, 0.6, 17)))


def ode(rhs, start, *, breaks=()):
    """The end of an equation on [0, 1], by scipy, restarted at `breaks`."""
    ends = [0.0, *breaks, 1.0]
    for begin, end in itertools.pairwise(ends):
        start = scipy.integrate.solve_ivp(
            rhs, (begin, end), start, "DOP853", rtol=1e-12, atol=1e-14
        ).y[:, -1]
    return start


def gradient(points):
    return LINE[:, None] - 2 * MATRIX @ (points - TARGET[:, None])


def strength(scale, snr):
    if not isinstance(scale, tj.Damped):
        return scale
    return float(scale.final) / (1 + 2 * float(scale.final) / (1 / float(scale.sigma) ** 2 + snr))


def moments_of_map(ends, mean, root):
    """Mean and covariance of an affine map of N(0, I), from the images of 0 and of the unit
    vectors.
    """
    slope = (ends[:, 1:] - ends[:, :1]) @ root
    return ends[:, 0] + (ends[:, 1:] - ends[:, :1]) @ mean, slope @ slope.T


def flow(scale):
    """The plug-in flow of three particles: on the trigonometric path, in the state itself, with the
    conditional covariance.
    """

    def rhs(t, x):
        angle = np.pi / 2 * t
        alpha, sigma = np.sin(angle), np.cos(angle)
        x = x.reshape(2, 3)
        noisy = np.linalg.inv(alpha**2 * COV + sigma**2 * np.eye(2))
        gain = alpha * COV @ noisy
        denoised = MEAN[:, None] + gain @ (x - alpha * MEAN[:, None])
        # sigma E~ + alpha D~, for the speed pi / 2: b = alpha' D + sigma' E, with E = (x - alpha D)
        # / sigma written without division.
        noise = sigma * noisy @ (x - alpha * MEAN[:, None])
        drift = sigma * denoised - alpha * noise
        guided = (
            strength(scale, (alpha / max(sigma, 1e-300)) ** 2)
            * sigma
            * COV
            @ noisy
            @ gradient(denoised)
        )
        return (np.pi / 2 * (drift + guided)).reshape(-1)

    starts = np.concatenate([np.zeros((2, 1)), np.eye(2)], axis=1)
    return moments_of_map(ode(rhs, starts.reshape(-1)).reshape(2, 3), np.zeros(2), np.eye(2))


def diffusion(scale):
    """Mean and covariance of the posterior mean, by their equations in `r = nu / (1 + nu)`, nu the
    precision of the view.
    """

    def rhs(r, y):
        nu = r / max(1 - r, 1e-300)
        # P^2 d nu: the view's precision nu added to the prior's, both times 1 - r.
        post = np.linalg.inv((1 - r) * np.linalg.inv(COV) + r * np.eye(2))
        square = post @ post
        slope = -2 * strength(scale, nu) * square @ MATRIX
        mean, cov = y[:2], y[2:].reshape(2, 2)
        move = strength(scale, nu) * square @ gradient(mean[:, None])[:, 0]
        return np.concatenate([move, (slope @ cov + cov @ slope.T + square).reshape(-1)])

    end = ode(rhs, np.concatenate([MEAN, np.zeros(4)]))
    return end[:2], end[2:].reshape(2, 2)


def flow_map(scale, interpolant, breaks=()):
    """The same three particles under flow-map guidance, in the image of the flow map, by roots from
    an eigendecomposition.
    """
    values, axes = np.linalg.eigh(COV)
    coefficients = jax.jit(lambda t: (interpolant.alpha(t), interpolant.sigma(t)))

    def rhs(t, z):
        alpha, sigma = map(float, coefficients(t))
        gain = axes @ np.diag(values / (alpha**2 * values + sigma**2)) @ axes.T
        return (scale * gain @ gradient(z.reshape(2, 3))).reshape(-1)

    alpha, sigma = map(float, coefficients(0.0))
    image = axes @ np.diag(np.sqrt(values / (alpha**2 * values + sigma**2))) @ axes.T
    starts = np.concatenate([np.zeros((2, 1)), np.eye(2)], axis=1)
    ends = ode(rhs, starts.reshape(-1), breaks=breaks).reshape(2, 3)
    # The start is alpha D(x) + x, with the unguided denoiser of slope `slope`.
    slope = alpha * image @ image
    return moments_of_map(
        ends, MEAN - alpha**2 * image @ slope @ MEAN, sigma * image @ (np.eye(2) + alpha * slope)
    )


@functools.cache
def witness(name):
    if name == "sde":
        return diffusion(1.3)
    if name in ("plug-in", "damped"):
        return flow(1.3 if name == "plug-in" else tj.Damped(1.3, 0.8))
    interpolant = INTERPOLANTS[name]
    breaks = (
        [float(LEVELS.clock(i)) for i in range(16, -1, -1)][1:] if interpolant is LEVELS else ()
    )
    return flow_map(0.6, interpolant, breaks)


INTERPOLANTS = {
    "linear": tj.Linear(1.7),
    "trigonometric": contracts.Trigonometric(0.6),
    "vp": tj.VP(),
    "levels": LEVELS,
}
LAWS = {
    "plug-in": lambda prior, reward: theory.plug_in_law(prior, reward, 1.3),
    "damped": lambda prior, reward: theory.plug_in_law(prior, reward, tj.Damped(1.3, 0.8)),
    "sde": lambda prior, reward: theory.sde_law(prior, reward, 1.3),
    **{
        name: lambda prior, reward, interpolant=interpolant: theory.fmrg_law(
            prior, reward, 0.6, interpolant
        )
        for name, interpolant in INTERPOLANTS.items()
    },
}


@pytest.mark.parametrize("name", LAWS)
def test_laws_solve_their_equations(name):
    law, (mean, cov) = LAWS[name](PRIOR, REWARD), witness(name)
    # Between the levels of a table there are only two derivatives for the quadrature to see.
    tolerance = 1e-6 if name == "levels" else 1e-10
    np.testing.assert_allclose(law.means[0], mean, rtol=0, atol=tolerance)
    np.testing.assert_allclose(law.covs[0], cov, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("variances", "strength"),
    [((0.5, 0.5), 1e-3), ((0.3, 1.2), 1.0), ((1e-6, 2.0), 30.0), ((0.0, 2.0), 4e5)],
)
def test_commuting_matrices_give_the_closed_forms(variances, strength):
    prior, reward = (
        contracts.gaussian(MEAN, np.diag(variances)),
        tj.rewards.Quadratic(TARGET, weight=[0.5, 1.0]),
    )
    form, scale = theory.quadratic_form(reward, 2), jnp.asarray(strength)
    damped, interpolant = tj.Damped(scale, 0.4), INTERPOLANTS["vp"]
    pairs = [
        (_moments.plug_in_moments(prior, form, damped), theory.plug_in_law(prior, reward, damped)),
        (_moments.sde_moments(prior, form, damped), theory.sde_law(prior, reward, damped)),
        (
            _moments.fmrg_moments(prior, form, scale, interpolant),
            theory.fmrg_law(prior, reward, scale, interpolant),
        ),
    ]
    for got, closed in pairs:
        np.testing.assert_allclose(got.means, closed.means, rtol=0, atol=2e-10)
        np.testing.assert_allclose(got.covs, closed.covs, rtol=0, atol=2e-11)


def extrapolated(field, solver, count, start=0.0):
    """The recursion at two numbers of steps and the error's first term removed."""
    laws = [
        theory.discrete_law(field, times=jnp.linspace(start, 1, n + 1), solver=solver)
        for n in (count, 2 * count)
    ]
    weight = 2**solver.order
    return [
        (weight * getattr(laws[1], x) - getattr(laws[0], x)) / (weight - 1)
        for x in ("means", "covs")
    ]


def test_runs_approach_the_laws():
    rows = [
        (theory.dps_field(PRIOR, REWARD, 1.3), tj.Euler(), LAWS["plug-in"], 1e-6),
        (theory.dps_field(PRIOR, REWARD, 1.3), tj.Ancestral(), LAWS["sde"], 5e-6),
    ]
    for field, solver, law, tolerance in rows:
        mean, cov = extrapolated(field, solver, 2000, 1e-9)
        limit = law(PRIOR, REWARD)
        np.testing.assert_allclose(mean, limit.means, rtol=0, atol=tolerance)
        np.testing.assert_allclose(cov, limit.covs, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp", "levels"])
def test_runs_on_paths_that_begin_with_data_approach_the_law_of_flow_map_guidance(name):
    prior = contracts.gaussian([2.0, -1.0], COV)
    reward = tj.rewards.Quadratic(TARGET, weight=[1.0, 0.4])
    law = theory.fmrg_law(prior, reward, 0.3, INTERPOLANTS[name])
    field = theory.fmrg_field(prior, reward, 0.3, INTERPOLANTS[name], inner_steps=None)
    mean, cov = extrapolated(field, tj.Euler(), 17 * 200)
    np.testing.assert_allclose(mean, law.means, rtol=0, atol=2e-5)
    np.testing.assert_allclose(cov, law.covs, rtol=0, atol=2e-5)


def test_data_at_the_start_shows_without_any_guidance():
    # F maps the start alpha_0 D(x) + x and not the marginal at t = 0, so that (alpha_0 F)^3 mu of
    # the mean is missing.
    alpha = float(LEVELS.alpha(jnp.asarray(0.0)))
    law = jax.jit(lambda p: theory.fmrg_law(p, tj.rewards.Quadratic([0.0]), 0.0, LEVELS))(
        contracts.gaussian([2.0], [[0.49]])
    )
    image = 0.7 / np.sqrt(0.49 * alpha**2 + 1 - alpha**2)
    np.testing.assert_allclose(law.means[0, 0], 2.0 * (1 - (alpha * image) ** 3), rtol=1e-12)
    spread = (1 - alpha**2) * image**2 * (1 + (alpha * image) ** 2) ** 2
    np.testing.assert_allclose(law.covs[0, 0, 0], spread, rtol=1e-12)
    assert alpha * image > 0.01


def test_every_component_of_a_mixture_has_its_own_law():
    near = contracts.planar()
    prior = near.replace(near.log_weights, 4 * near.means, near.covs)
    law = theory.plug_in_law(prior, tj.rewards.Quadratic(TARGET, weight=[1.0, 0.4]), 0.8)
    np.testing.assert_allclose(law.log_weights, prior.log_weights, rtol=1e-12)
    for i in range(2):
        one = theory.plug_in_law(
            contracts.gaussian(prior.means[i], prior.covs[i]),
            tj.rewards.Quadratic(TARGET, weight=[1.0, 0.4]),
            0.8,
        )
        np.testing.assert_allclose(law.means[i], one.means[0], rtol=1e-10)
        np.testing.assert_allclose(law.covs[i], one.covs[0], rtol=1e-10, atol=1e-14)


METHODS = {"plug-in": theory.plug_in_law, "sde": theory.sde_law, "fmrg": theory.fmrg_law}


@functools.cache
def programs(name):
    """A number made of a law, over a batch of arguments, and its gradient."""

    def value(scale, target, cov, matrix):
        law = METHODS[name](
            contracts.gaussian(MEAN, cov), tj.rewards.Quadratic(target, weight=matrix), scale
        )
        return jnp.sum(jnp.asarray([[0.3, -0.8], [0.5, 0.7]]) * law.covs[0]) + law.means[
            0
        ] @ jnp.asarray([1.0, -2.0])

    return jax.jit(jax.vmap(value)), jax.jit(jax.grad(value, argnums=(0, 1, 2, 3)))


# Flow-map guidance depends on the root of S, which has no derivative at the edge of the singular
# ones.
@pytest.mark.parametrize(
    ("name", "edge"),
    [("plug-in", False), ("plug-in", True), ("sde", False), ("sde", True), ("fmrg", False)],
)
def test_laws_compile_map_and_differentiate_in_every_direction(name, edge):
    program, slopes = programs(name)
    into = np.array([[0.3, 0.5], [0.5, 0.9]])
    zero, still = np.zeros((2, 2)), np.zeros(2)
    moves = [
        [0.4, np.array([0.7, -0.4]), zero, zero],
        [0.0, still, into, zero],
        [0.0, still, zero, into],
    ]
    # Also where S and H happen to commute, into directions in which they do not go on to; at the
    # edge, from one side.
    commuting = np.diag([1.0, 0.4])
    pairs = [(np.diag([0.7, 0.0]), commuting)] if edge else [(COV, MATRIX), (np.eye(2), commuting)]
    nodes = np.arange(9) - (0 if edge else 4)
    step = 2e-4 if edge else 1e-3
    for cov, matrix in pairs:
        point = [jnp.asarray(x) for x in (0.9, TARGET, cov, matrix)]
        shifts = [
            [x + k * step * m for x, m in zip(point, move, strict=True)]
            for move in moves
            for k in nodes
        ]
        values = np.asarray(
            program(*(jnp.stack(leaves) for leaves in zip(*shifts, strict=True)))
        ).reshape(3, 9)
        gradient = slopes(*point)
        for move, row in zip(moves, values, strict=True):
            along = sum(np.sum(np.asarray(g) * m) for g, m in zip(gradient, move, strict=True))
            degree = 4 if edge else 8
            slope = np.polyfit(nodes, row, degree)[-2] / step
            # At the edge the law is only three halves times differentiable.
            np.testing.assert_allclose(along, slope, atol=1e-3 if edge else 1e-6)


def test_laws_stay_in_single_precision_where_they_are_asked_there():
    single = tj.GaussianMixture(*(jnp.asarray(x, jnp.float32) for x in ([1.0], [MEAN], [COV])))
    law = theory.plug_in_law(single, REWARD, 1.3)
    assert law.means.dtype == jnp.float32
    np.testing.assert_allclose(law.means[0], witness("plug-in")[0], atol=1e-5)
    np.testing.assert_allclose(law.covs[0], witness("plug-in")[1], atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [(3.0, 0.1), (3.0, 0.3), (3.0, 1.0), (3.0, 3.0), (3.0, 10.0), (60.0, 0.1), (0.4, 10.0)],
)
def test_damping_of_any_width_has_the_law_of_its_integrals(scale, ratio):
    s2, width = 0.8, 0.8 * ratio**2

    def rhs(x, y):
        # From v = 0 on, in x = 1 - w with v = s^2 (1 - w^2), which takes away the root at the end.
        v = s2 * x * (2 - x)
        at = scale / (1 + 2 * scale / (1 / width + 1 / v - 1 / s2)) if v > 0 else scale
        return [2 * s2 * at * np.exp(-y[1]), 2 * s2 * (1 - x) * at]

    mean, spent = ode(rhs, [0.0, 0.0])
    plane = contracts.gaussian([0.0, 0.0], s2 * np.eye(2))
    law = theory.plug_in_law(plane, tj.rewards.Quadratic([1.0, -2.0]), tj.Damped(scale, width**0.5))
    np.testing.assert_allclose(law.means[0], [mean, -2 * mean], rtol=1e-8)
    np.testing.assert_allclose(law.covs[0, 0, 0], s2 * np.exp(-2 * spent), rtol=1e-8)


def test_the_table_of_what_a_mis_set_damping_costs():
    rows = [
        line.split("|")[1:-1]
        for line in theory.plug_in_law.__doc__.splitlines()
        if line.strip().startswith("| ")
    ]
    table = {float(row[0].split()[0]): [float(x) for x in row[1:]] for row in rows[1:]}
    assert list(table) == [0.0, 0.5, 0.7, 1.0, 1.4, 2.0]
    prior, reward, scale, sigma = tj.problems.gaussian()[1:5]
    tilt = theory.tilt(prior, reward, scale).mixture
    for ratio, row in table.items():
        law = theory.plug_in_law(prior, reward, tj.Damped(scale, ratio * sigma))
        cost = theory.bures(law.means[0], law.covs[0], tilt.means[0], tilt.covs[0])
        got = [law.means[0, 1], np.sqrt(law.covs[0, 1, 1]), np.sqrt(max(cost, 0.0))]
        np.testing.assert_allclose(row, got, atol=5.1e-4)


def test_more_than_one_draw_is_refused_with_what_to_do_instead():
    isotropic, plane = tj.rewards.Quadratic(TARGET), contracts.gaussian(MEAN, 0.5 * np.eye(2))
    with pytest.raises(ValueError, match=r"constant scale, got Damped.*k=1.*PlugIn\(..., k=4\)"):
        theory.plug_in_law(plane, isotropic, tj.Damped(1.0, 0.7), k=4)
    with pytest.raises(
        ValueError,
        match=r"mixture of 2 components. Pass one component, GaussianMixture.*PlugIn\(..., k=4\)",
    ):
        theory.plug_in_law(contracts.planar(), isotropic, 1.0, k=4)
    with pytest.raises(ValueError, match=r"isotropic covariance.*k=1.*PlugIn\(..., k=4\)"):
        theory.plug_in_law(PRIOR, isotropic, 1.0, k=4)
    with pytest.raises(ValueError, match=r"isotropic reward's matrix H.*k=1.*PlugIn\(..., k=4\)"):
        theory.plug_in_law(plane, tj.rewards.Quadratic(TARGET, weight=[1.0, 2.0]), 1.0, k=4)


@pytest.mark.parametrize(
    ("k", "error"),
    [
        (0, ValueError),
        (-3, ValueError),
        (2.5, TypeError),
        (2.0, TypeError),
        (True, TypeError),
        ("2", TypeError),
    ],
)
def test_numbers_of_draws_that_are_none(k, error):
    with pytest.raises(error, match=r"k must be (at least 1|a whole number), got"):
        theory.plug_in_law(PRIOR, REWARD, 1.0, k=k)


def test_scale_laws_without_a_law_are_refused():
    model = tj.Analytic(PRIOR)
    with pytest.raises(ValueError, match="SelfDamped"):
        theory.plug_in_law(PRIOR, REWARD, tj.SelfDamped(1.0, model))
