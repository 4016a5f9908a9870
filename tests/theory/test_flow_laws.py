"""Laws of guided flows against their ordinary differential equations, Dawson's integral, and each
other. Tier: exact, order.
"""

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import contracts

import theory
import tiltjax as tj


def line(s2, mean=0.0):
    return tj.GaussianMixture([1.0], [[mean]], [[[s2]]])


@pytest.mark.parametrize("a", [1e-6, 1e-3, 0.1, 0.85403, 1.5, 2.2559, 10.0, 100.0, 1e4])
def test_plug_in_law_is_dawsons_integral(a):
    law = theory.plug_in_law(line(0.5), tj.rewards.Quadratic([2.5]), a / 0.5)
    np.testing.assert_allclose(
        law.means[0, 0], 2 * np.sqrt(a) * scipy.special.dawsn(np.sqrt(a)) * 2.5, rtol=1e-10
    )
    np.testing.assert_allclose(law.covs[0, 0, 0], 0.5 * np.exp(-2 * a), rtol=1e-10)


def test_recorded_numbers():
    reward = tj.rewards.Quadratic([2.5])
    rows = [
        (0.5, 3.0, (3.0726, 0.15778), (2.4968, 0.000902)),
        (16.0, 0.1, (3.1130, 0.8076), (1.7885, 1.1384)),
    ]
    for s2, scale, plug_in, fmrg in rows:
        for law, (mean, std) in ((theory.plug_in_law, plug_in), (theory.fmrg_law, fmrg)):
            got = law(line(s2), reward, scale)
            assert np.isclose(got.means[0, 0], mean, atol=6e-5)
            assert np.isclose(np.sqrt(got.covs[0, 0, 0]), std, atol=6e-5)
    overshoot = [
        float(theory.plug_in_law(line(1.0), tj.rewards.Quadratic([1.0]), a).means[0, 0])
        for a in (0.85403, 2.2559)
    ]
    np.testing.assert_allclose(overshoot, [1.0, 1.28475], atol=1e-5)


@pytest.mark.parametrize("a", [1e-4, 0.3, 1.5, 50.0, 1e4])
def test_damping_of_the_right_width_is_the_tilt(a):
    s2, reward = 0.8, tj.rewards.Quadratic([2.0])
    law = theory.plug_in_law(line(s2, 0.4), reward, tj.Damped(a / s2, s2**0.5))
    tilt = theory.tilt(line(s2, 0.4), reward, a / s2).mixture
    np.testing.assert_allclose(law.means, tilt.means, rtol=1e-9)
    np.testing.assert_allclose(law.covs, tilt.covs, rtol=1e-9)


@pytest.mark.parametrize("s2", [0.0, 0.5, 16.0])
def test_damping_of_width_zero_is_no_damping(s2):
    damped = theory.plug_in_law(line(s2), tj.rewards.Quadratic([2.5]), tj.Damped(3.0, 0.0))
    plain = theory.plug_in_law(line(s2), tj.rewards.Quadratic([2.5]), 3.0)
    np.testing.assert_allclose(damped.means, plain.means, rtol=1e-10)
    np.testing.assert_allclose(damped.covs, plain.covs, rtol=1e-10)


def ode_law(field, s2, c0=1.0):
    """Mean and standard deviation at t = 1 of the affine flow of `field`, by an adaptive solver:
    nothing of `bias` but the field.
    """

    def drift(t, y, args):
        matrix, move, _ = field.at(t)
        slope = field.interpolant.velocity(t, jnp.ones((1, 1)), matrix)[0, 0]
        constant = field.interpolant.velocity(t, jnp.zeros(1), move)[0]
        return jnp.stack([slope * y[0] + constant, slope * y[1]])

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(drift), diffrax.Dopri8(), 1e-7, 1 - 1e-9, 1e-6, jnp.array([0.0, c0]),
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-13), max_steps=100_000,
    )  # fmt: skip
    return solution.ys[-1]


@pytest.mark.parametrize("c0", [1.0, 1.7])
@pytest.mark.parametrize(
    "scale", [0.7, tj.Damped(3.0, 0.3), tj.Damped(3.0, 1.5), tj.Damped(0.5, 0.9)]
)
def test_plug_in_law_solves_the_flow_for_any_damping_width_and_base(scale, c0):
    prior, reward = (
        line(0.5, 0.3),
        tj.rewards.Quadratic([2.0], weight=[0.8]) + tj.rewards.LinearReward([0.3]),
    )
    law = theory.plug_in_law(prior, reward, scale)
    mean, std = ode_law(theory.plug_in_field(prior, reward, scale, tj.Linear(c0)), 0.5, c0)
    np.testing.assert_allclose(law.means[0, 0], mean, atol=2e-6)
    np.testing.assert_allclose(np.sqrt(law.covs[0, 0, 0]), std, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("interpolant", [tj.Linear(), tj.Linear(1.7), contracts.Trigonometric()])
def test_fmrg_law_solves_the_flow(interpolant):
    prior, reward = (
        line(0.5, 0.3),
        tj.rewards.Quadratic([2.0], weight=[0.8]) + tj.rewards.LinearReward([0.3]),
    )
    law = theory.fmrg_law(prior, reward, 0.6, interpolant)
    mean, std = ode_law(
        theory.fmrg_field(prior, reward, 0.6, interpolant, inner_steps=None),
        0.5,
        interpolant.sigma(jnp.zeros(())),
    )
    np.testing.assert_allclose(law.means[0, 0], mean, atol=2e-6)
    np.testing.assert_allclose(np.sqrt(law.covs[0, 0, 0]), std, atol=2e-6)


def test_commuting_matrices_decouple_into_directions():
    rotation = np.linalg.qr(np.array([[1.0, 0.4, 0.2], [0.0, 1.0, -0.7], [0.5, 0.3, 1.0]]))[0]
    s2, h, target = np.array([0.3, 0.3, 1.2]), np.array([0.5, 1.5, 0.2]), np.array([1.0, -2.0, 0.5])
    prior = tj.GaussianMixture(
        [1.0], [rotation @ [0.1, 0.2, 0.3]], [rotation @ np.diag(s2) @ rotation.T]
    )
    reward = tj.rewards.Quadratic(rotation @ target, weight=rotation @ np.diag(h) @ rotation.T)
    for law in (theory.plug_in_law, theory.fmrg_law):
        got = law(prior, reward, 1.3)
        for i, (v, weight, y, mu) in enumerate(zip(s2, h, target, [0.1, 0.2, 0.3], strict=True)):
            one = law(line(v, mu), tj.rewards.Quadratic([y], weight=weight), 1.3)
            np.testing.assert_allclose((rotation.T @ got.means[0])[i], one.means[0, 0], rtol=1e-9)
            np.testing.assert_allclose(
                (rotation.T @ got.covs[0] @ rotation)[i, i], one.covs[0, 0, 0], rtol=1e-9
            )


@pytest.mark.slow
def test_fifty_dimensions_are_fifty_lines():
    rng = np.random.default_rng(0)
    s2, mean, target = rng.uniform(0.05, 2, 50), rng.normal(size=50), rng.normal(size=50)
    prior, reward = tj.GaussianMixture([1.0], [mean], [np.diag(s2)]), tj.rewards.Quadratic(target)
    for law in (theory.plug_in_law, theory.fmrg_law, theory.sde_law):
        got = law(prior, reward, 0.8)
        off = got.covs[0] - jnp.diag(jnp.diagonal(got.covs[0]))
        np.testing.assert_allclose(off, 0, atol=1e-14)
        for i in (0, 17, 49):
            one = law(line(s2[i], mean[i]), tj.rewards.Quadratic([target[i]]), 0.8)
            np.testing.assert_allclose(got.means[0, i], one.means[0, 0], rtol=1e-11)
            np.testing.assert_allclose(got.covs[0, i, i], one.covs[0, 0, 0], rtol=1e-11)
    tilt = theory.tilt(prior, reward, 0.8)
    parts = [
        theory.tilt(line(s2[i], mean[i]), tj.rewards.Quadratic([target[i]]), 0.8) for i in range(50)
    ]
    np.testing.assert_allclose(tilt.log_norm, sum(part.log_norm for part in parts), rtol=1e-12)


def test_laws_of_a_linear_reward_are_the_tilt():
    prior, reward = line(0.5, 0.3), tj.rewards.LinearReward([0.8])
    law, tilt = theory.plug_in_law(prior, reward, 2.0), theory.tilt(prior, reward, 2.0).mixture
    np.testing.assert_allclose(law.means, tilt.means, rtol=1e-12)
    np.testing.assert_allclose(law.covs, tilt.covs, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [tj.Euler(), tj.Heun(), tj.Heun(share_draw=True)])
def test_discrete_mean_converges_to_the_law_at_the_solvers_order(solver):
    prior, reward, start = line(0.5, 0.3), tj.rewards.Quadratic([2.0]), 0.2
    field = theory.dps_field(prior, reward, 1.0)
    limit = theory.discrete_law(field, times=jnp.linspace(start, 0.9, 20_001), solver=tj.Heun())
    counts = np.array([40, 80, 160, 320])
    errors = [
        abs(
            theory.discrete_law(field, times=jnp.linspace(start, 0.9, n + 1), solver=solver).means
            - limit.means
        )[0, 0]
        for n in counts
    ]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - solver.order) < 0.2


def test_draws_leave_twice_the_variance_when_heuns_stages_share_them():
    field = theory.plug_in_field(line(0.5), tj.rewards.Quadratic([2.5]), 1.0)
    times = jnp.linspace(1e-3, 1, 4001)
    limit = theory.plug_in_law(line(0.5), tj.rewards.Quadratic([2.5]), 1.0).covs[0, 0, 0]
    excess = {
        name: float(theory.discrete_law(field, times=times, solver=solver).covs[0, 0, 0] - limit)
        for name, solver in {
            "euler": tj.Euler(),
            "fresh": tj.Heun(),
            "shared": tj.Heun(share_draw=True),
        }.items()
    }
    noiseless = float(
        theory.discrete_law(
            theory.dps_field(line(0.5), tj.rewards.Quadratic([2.5]), 1.0), times=times
        ).covs[0, 0, 0]
    )
    assert np.isclose(
        excess["shared"], 2 * (excess["fresh"] - (noiseless - limit)) + noiseless - limit, rtol=0.01
    )


def test_the_stochastic_sampler_has_its_own_law():
    # Memoryless diffusion with the mean control: mean (1 - e^{-2a}) y, variance (1 - e^{-4a}) / (4
    # scale); no overshoot.
    scale, s2, y = 3.0, 0.5, 2.5
    a = scale * s2
    field = theory.dps_field(line(s2), tj.rewards.Quadratic([y]), scale)
    laws = [
        theory.discrete_law(field, times=jnp.linspace(1e-6, 1, n + 1), solver=tj.Ancestral())
        for n in (20_000, 40_000)
    ]
    mean = 2 * laws[1].means[0, 0] - laws[0].means[0, 0]  # Richardson: the error is of first order
    var = 2 * laws[1].covs[0, 0, 0] - laws[0].covs[0, 0, 0]
    np.testing.assert_allclose(
        [mean, var], [(1 - np.exp(-2 * a)) * y, (1 - np.exp(-4 * a)) / (4 * scale)], rtol=1e-4
    )


@pytest.mark.slow
def test_damping_and_doob_have_no_error_of_the_mean_at_any_number_of_steps():
    prior, reward = line(0.5), tj.rewards.Quadratic([2.5])
    tilt = theory.tilt(prior, reward, 3.0).mixture
    for steps in (5, 20, 80):
        times = jnp.linspace(1e-9, 1, steps + 1)
        damped = theory.discrete_law(
            theory.plug_in_field(prior, reward, tj.Damped(3.0, 0.5**0.5)), times=times
        )
        doob = theory.discrete_law(theory.doob_field(prior, reward, 3.0), times=times)
        np.testing.assert_allclose(damped.means, tilt.means, atol=1e-7)
        np.testing.assert_allclose(doob.means, tilt.means, atol=1e-7)


def test_the_recursion_is_the_same_inside_a_program():
    field = theory.plug_in_field(line(0.5), tj.rewards.Quadratic([2.5]), 1.0)
    grid = jnp.linspace(1e-3, 1, 9)
    inside = jax.jit(lambda field, times: theory.discrete_law(field, times=times))(field, grid)
    outside = theory.discrete_law(field, times=grid)
    np.testing.assert_allclose(inside.means, outside.means, rtol=1e-12)
    np.testing.assert_allclose(inside.covs, outside.covs, rtol=1e-12)


def test_laws_compile_map_and_differentiate():
    def mean(scale, s2, y):
        return theory.plug_in_law(
            line(s2), tj.rewards.Quadratic(jnp.reshape(y, (1,))), scale
        ).means[0, 0]

    scales = jnp.linspace(0.1, 5.0, 7)
    mapped = jax.jit(jax.vmap(mean, (0, None, None)))(scales, 0.5, 2.5)
    np.testing.assert_allclose(mapped, [mean(s, 0.5, 2.5) for s in scales], rtol=1e-12)
    gradient = jax.grad(mean, argnums=(0, 1, 2))(3.0, 0.5, 2.5)
    for i, step in enumerate(np.eye(3) * 1e-5):
        up, down = (mean(*(np.array([3.0, 0.5, 2.5]) + sign * step)) for sign in (1, -1))
        np.testing.assert_allclose(gradient[i], (up - down) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("scale", [3.0, tj.Damped(3.0, 0.4)])
def test_the_diffusions_law_solves_its_moment_equations(scale):
    prior, reward = line(0.5, 0.3), tj.rewards.Quadratic([2.0], weight=[0.8])
    law = theory.sde_law(prior, reward, scale)

    def strength(v):  # 1 / snr from the posterior variance, v = 1 / (1/s^2 + snr)
        if not isinstance(scale, tj.Damped):
            return 3.0
        return 3.0 / (1 + 6.0 / (1 / 0.16 + 1 / v - 1 / 0.5))

    def drift(tau, y, args):
        rate = 2 * 0.8 * strength(0.5 - tau)
        return jnp.stack([-rate * (y[0] - 2.0), 1 - 2 * rate * y[1]])

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(drift), diffrax.Dopri8(), 0.0, 0.5 - 1e-12, 1e-3, jnp.array([0.3, 0.0]),
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-13), max_steps=100_000,
    )  # fmt: skip
    np.testing.assert_allclose([law.means[0, 0], law.covs[0, 0, 0]], solution.ys[-1], rtol=1e-8)


@pytest.mark.parametrize("a", [1e-6, 0.3, 1.5, 100.0])
def test_the_diffusions_closed_forms(a):
    law = theory.sde_law(line(0.5), tj.rewards.Quadratic([2.5]), a / 0.5)
    np.testing.assert_allclose(law.means[0, 0], -np.expm1(-2 * a) * 2.5, rtol=1e-10)
    np.testing.assert_allclose(law.covs[0, 0, 0], -np.expm1(-4 * a) / (4 * a / 0.5), rtol=1e-9)
    right = theory.sde_law(line(0.5), tj.rewards.Quadratic([2.5]), tj.Damped(a / 0.5, 0.5**0.5))
    tilt = theory.tilt(line(0.5), tj.rewards.Quadratic([2.5]), a / 0.5).mixture
    np.testing.assert_allclose(right.means, tilt.means, rtol=1e-9)
    np.testing.assert_allclose(right.covs, tilt.covs, rtol=1e-9)


def test_what_a_mis_set_damping_costs():
    # Half the right sigma leaves part of plug-in's bias, twice is timid: the spread brackets the
    # tilt's.
    prior, reward, s = line(0.5), tj.rewards.Quadratic([2.5]), 0.5**0.5
    tilt = theory.tilt(prior, reward, 3.0).mixture
    narrow, wide = (
        theory.plug_in_law(prior, reward, tj.Damped(3.0, factor * s)) for factor in (0.5, 2.0)
    )
    np.testing.assert_allclose(
        [narrow.covs[0, 0, 0], wide.covs[0, 0, 0]],
        [
            ode_law(theory.plug_in_field(prior, reward, tj.Damped(3.0, f * s)), 0.5)[1] ** 2
            for f in (0.5, 2.0)
        ],
        rtol=1e-5,
    )
    assert narrow.covs[0, 0, 0] < tilt.covs[0, 0, 0] < wide.covs[0, 0, 0]


LAWS = {
    "tilt": lambda p, r, s: theory.tilt(p, r, s).mixture,
    "plug-in": theory.plug_in_law,
    "damped": lambda p, r, s: theory.plug_in_law(p, r, tj.Damped(s, 0.5)),
    "sde": theory.sde_law,
    "fmrg": theory.fmrg_law,
    "discrete": lambda p, r, s: theory.discrete_law(
        theory.plug_in_field(p, r, s), times=jnp.linspace(1e-3, 1, 6)
    ),
    "discrete fmrg": lambda p, r, s: theory.discrete_law(
        theory.fmrg_field(p, r, s), times=jnp.linspace(1e-3, 1, 6)
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*LAWS, "log_h"])
@pytest.mark.parametrize("cov", [0.5 * np.eye(2), np.array([[0.6, 0.2], [0.2, 0.5]])])
def test_gradients_are_right_also_where_eigenvalues_coincide(name, cov):
    weights = np.array([[0.3, -0.8], [0.5, 0.7]])

    def value(scale, target, cov):
        prior, reward = (
            tj.GaussianMixture([1.0], [[0.2, -0.3]], cov[None]),
            tj.rewards.Quadratic(target),
        )
        if name == "log_h":
            return theory.log_h(prior, reward, scale)(jnp.asarray(0.4), jnp.asarray([0.3, 0.9]))
        law = LAWS[name](prior, reward, scale)
        return jnp.sum(weights * law.covs[0]) + law.means[0] @ jnp.asarray([1.0, -2.0])

    point = jnp.asarray(1.3), jnp.asarray([1.0, 0.5]), jnp.asarray(cov)
    step = 1e-5
    moves = [
        (1.0, np.zeros(2), np.zeros((2, 2))),
        (0.0, np.array([0.7, -0.4]), np.zeros((2, 2))),
        (0.0, np.zeros(2), np.array([[0.3, 0.5], [0.5, -0.2]])),
    ]
    gradient, program = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*point), jax.jit(value)
    for move in moves:
        up, down = (
            program(*(x + sign * step * m for x, m in zip(point, move, strict=True)))
            for sign in (1, -1)
        )
        along = sum(np.sum(np.asarray(g) * m) for g, m in zip(gradient, move, strict=True))
        np.testing.assert_allclose(along, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_refusals_say_why_and_what_to_use():
    prior = tj.GaussianMixture([1.0], [[0.0, 0.0]], [[[0.5, 0.2], [0.2, 0.7]]])
    isotropic = tj.rewards.Quadratic([0.0, 1.0])
    with pytest.raises(ValueError, match=r"concave.*eigenvalue -1"):
        theory.fmrg_law(prior, tj.rewards.Quadratic([0.0, 1.0], weight=-1.0), 1.0)
    with pytest.raises(ValueError, match="DoubleWell"):
        theory.plug_in_law(prior, tj.rewards.DoubleWell(), 1.0)
    with pytest.raises(ValueError, match="mixture of 2"):
        theory.plug_in_field(tj.problems.quadratic().prior, isotropic, 1.0)
    own = tj.SelfDamped(1.0, tj.Analytic(prior))
    with pytest.raises(ValueError, match=r"SelfDamped has no recursion\. Use a number or Damped"):
        theory.plug_in_field(prior, isotropic, own)
    with pytest.raises(ValueError, match="SelfDamped has no closed form: use a number or Damped"):
        theory.plug_in_law(line(0.5), tj.rewards.Quadratic([0.0]), own)
    with pytest.raises(ValueError, match="Adaptive has no recursion: use Euler, Heun or Ancestral"):
        theory.discrete_law(
            theory.dps_field(prior, isotropic, 1.0),
            times=jnp.linspace(0.1, 1, 3),
            solver=tj.Adaptive(),
        )


def test_laws_beyond_the_quadratures_reach_are_refused():
    law = theory.plug_in_law(line(1.0), tj.rewards.Quadratic([2.5]), 9e5)
    np.testing.assert_allclose(law.means[0, 0], 2.5 + 2.5 / 1.8e6, rtol=1e-9)
    with pytest.raises(ValueError, match="beyond the range of the quadrature"):
        theory.plug_in_law(line(1.0), tj.rewards.Quadratic([2.5]), 2e6)


@pytest.mark.parametrize("solver", [tj.Euler(), tj.Heun(), tj.Ancestral(0.5)])
def test_ones_after_the_end_change_nothing_so_that_grids_of_any_length_share_a_program(solver):
    field = theory.plug_in_field(line(0.5), tj.rewards.Quadratic([2.5]), 1.0)
    grid = jnp.linspace(1e-3, 1, 5)
    law = lambda times: theory.discrete_law(field, times=times, solver=solver)
    longer = jax.jit(law)(jnp.append(grid, jnp.ones(3)))
    chex.assert_trees_all_close(longer, law(grid), rtol=1e-10)
