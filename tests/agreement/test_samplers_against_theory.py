"""The samplers against theory: what `sample` returns is what the closed forms say. Tier:
statistical.

Every comparison is of means and covariances against an exact value, in computed standard errors of
independent particles; where the truth is a limit of small steps, the step-size term is computed by
the affine recursion and added.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import theory
import tiltjax as tj

SIGMAS = 5.0
pytestmark = pytest.mark.optimized  # it runs for longer than it compiles


def single(prior):
    """For a model of states in single precision: rounding is far below a standard error, and a run
    costs half.
    """
    return tj._pytree.cast(prior, jnp.float32)


def assert_moments(x, law, slack_mean=0.0, slack_cov=0.0):
    """Mean and covariance of Gaussian samples within five standard errors (plus a computed slack)
    of a one-component law.
    """
    x = np.asarray(x, np.float64)
    n, (mean, cov) = len(x), (np.asarray(law.means[0]), np.asarray(law.covs[0]))
    error_mean = np.sqrt(np.diag(cov) / n)
    error_cov = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / n)
    assert np.all(np.abs(np.mean(x, axis=0) - mean) < SIGMAS * error_mean + slack_mean)
    assert np.all(np.abs(np.cov(x.T).reshape(cov.shape) - cov) < SIGMAS * error_cov + slack_cov)


def step_size_term(field, times):
    """How far the law at these steps is from its limit, by the recursion alone: twice its change
    when every step is halved.

    (The draws' variance is of first order in the step, so one halving leaves as much again.) Small
    beside the law itself.
    """
    middles = (times[1:] + times[:-1]) / 2
    fine = jnp.sort(jnp.concatenate([times, middles]))
    coarse, fine = (theory.discrete_law(field, times=grid) for grid in (times, fine))
    mean, cov = (
        2 * np.abs(coarse.means[0] - fine.means[0]),
        2 * np.abs(coarse.covs[0] - fine.covs[0]),
    )
    spread = np.sqrt(np.diag(field.prior.covs[0]))
    assert np.all(mean < 0.02 * spread)
    assert np.all(cov < 0.02 * np.outer(spread, spread))
    return mean, cov


def commuting(d):
    """An anisotropic prior off the origin, whose axes are not the coordinates', and a reward that
    commutes with it.
    """
    if d == 1:
        return tj.GaussianMixture([1.0], [[0.7]], [[[0.6]]]), tj.rewards.Quadratic([2.0])
    rotation = np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0]
    cov = rotation @ np.diag(np.linspace(0.3, 0.9, d)) @ rotation.T
    cov = (cov + cov.T) / 2
    return tj.GaussianMixture([1.0], [np.linspace(-1, 1, d)], [cov]), tj.rewards.Quadratic(
        np.linspace(2, 0, d)
    )


def general(d=2):
    """Covariance and reward matrices that do not commute, and a linear term."""
    prior = tj.GaussianMixture([1.0], [[1.0, -0.5]], [[[0.6, 0.3], [0.3, 0.8]]])
    reward = tj.rewards.Quadratic(
        [0.5, 2.0], weight=[[1.0, 0.2], [0.2, 0.5]]
    ) + tj.rewards.LinearReward([0.3, 0.0])
    return prior, reward


METHODS = {
    "plug-in": (lambda m, r, s: tj.PlugIn(tj.Exact(m), r, s), theory.plug_in_field),
    "damped": (
        lambda m, r, s: tj.PlugIn(tj.Exact(m), r, tj.Damped(s, 0.8)),
        lambda p, r, s, interpolant: theory.plug_in_field(p, r, tj.Damped(s, 0.8), interpolant),
    ),
    "dps": (tj.dps, theory.dps_field),
    "Laplace": (tj.Laplace, theory.doob_field),
    "Doob": (None, theory.doob_field),
}


SOLVERS = (tj.Euler(), tj.Heun(), tj.Heun(share_draw=True), tj.Ancestral(), tj.Ancestral(0.4))
WIDE = tj.Linear(1.6)
ROWS = (
    [("plug-in", solver, interpolant) for solver in SOLVERS for interpolant in (tj.Linear(), WIDE)]
    + [(method, tj.Heun(), WIDE) for method in METHODS if method != "plug-in"]
    + [(method, tj.Ancestral(0.4), WIDE) for method in METHODS if method != "plug-in"]
    + [(method, tj.Euler(), WIDE) for method in ("damped", "dps")]
)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "solver", "interpolant"), ROWS)
def test_a_guided_sampler_has_its_discrete_law(method, solver, interpolant):
    prior, reward = general()
    model, scale, times = tj.Analytic(single(prior), interpolant), 1.5, jnp.linspace(1e-3, 1, 13)
    build, field = METHODS[method]
    if method == "Doob":
        guidance = tj.Doob(model, theory.log_h(prior, reward, scale, interpolant))
    else:
        guidance = build(model, reward, scale)
    x = tj.sample(jax.random.key(1), model, guidance, num=100_000, times=times, solver=solver).x
    assert_moments(
        x, theory.discrete_law(field(prior, reward, scale, interpolant), times=times, solver=solver)
    )


FLOWS = {"wide": WIDE, "VP": tj.interpolants.VP(), "trigonometric": contracts.Trigonometric()}


@pytest.mark.parametrize(
    ("name", "solver", "inner_steps", "size"),
    [
        ("wide", tj.Ancestral(0.0), 20, 1.0),
        ("VP", tj.Euler(), 20, 1.0),
        ("VP", tj.Heun(), 7, 1e-3),
        ("trigonometric", tj.Heun(), 7, 1.0),
    ],
)
def test_a_run_of_fmrg_is_the_affine_map_of_its_discrete_law(name, solver, inner_steps, size):
    """Exact: three points of the noise show the map, at any numbers of outer and inner steps."""
    (one, reward), interpolant = general(), FLOWS[name]
    prior = tj.GaussianMixture([1.0], size * one.means, size**2 * one.covs)
    model, scale = tj.Analytic(prior, interpolant), 1.5
    guidance = tj.fmrg(model, reward, scale, inner_steps=inner_steps)
    times = model.grid(16)
    noise = jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2)])
    start = model.start(times[0], noise, model.denoise_batch(times[0], noise))
    ends = tj.sample(
        jax.random.key(1), model, guidance, num=3, times=times, solver=solver, start=start
    ).x
    matrix = interpolant.sigma(times[0]) * (ends[1:] - ends[:1]).T
    field = theory.fmrg_field(prior, reward, scale, interpolant, inner_steps=inner_steps)
    law = theory.discrete_law(field, times=times, solver=solver)
    np.testing.assert_allclose(law.means[0], ends[0], rtol=1e-9, atol=1e-10 * size)
    np.testing.assert_allclose(law.covs[0], matrix @ matrix.T, rtol=1e-8, atol=1e-10 * size**2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"), [("wide", 50), ("VP", 16), ("VP", 100), ("trigonometric", 16)]
)
def test_samples_of_fmrg_have_their_discrete_law(name, steps):
    prior, reward = general()
    model, scale = tj.Analytic(single(prior), FLOWS[name]), 0.5
    x = tj.sample(
        jax.random.key(5), model, tj.fmrg(model, reward, scale), num=100_000, steps=steps
    ).x
    field = theory.fmrg_field(prior, reward, scale, FLOWS[name])
    assert_moments(x, theory.discrete_law(field, times=model.grid(steps)))


@pytest.mark.parametrize("end", [0.8, 0.999])
def test_runs_that_end_before_one_have_their_discrete_law(end):
    prior, reward = general()
    times = jnp.linspace(1e-3, end, 20)
    x = tj.sample(
        jax.random.key(2),
        tj.Analytic(prior),
        tj.dps(tj.Analytic(prior), reward, 1.0),
        num=20_000,
        times=times,
    ).x
    assert_moments(x, theory.discrete_law(theory.dps_field(prior, reward, 1.0), times=times))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d", "scale", "method"),
    [(1, 2.0, "dps"), (2, 0.3, "plug-in"), (2, 2.0, "plug-in"), (5, 1.0, "plug-in")],
)
def test_one_draw_has_dawsons_law(d, scale, method):
    prior, reward = commuting(d)
    times = jnp.linspace(1e-3, 1, 101)
    build, field = METHODS[method]
    law = theory.plug_in_law(prior, reward, scale)
    model = tj.Analytic(single(prior))
    num = (
        10_000 if d < 5 else 3000
    )  # what goes to LAPACK, one matrix after the other, takes its time
    x = tj.sample(jax.random.key(3), model, build(model, reward, scale), num=num, times=times).x
    assert_moments(x, law, *step_size_term(field(prior, reward, scale), times))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("s2", "scale", "y", "mean"),
    [(0.5, 3.0, 2.5, 0.0), (4.0, 0.2, -3.0, 1.0), (0.1, 2.0, 1.0, -2.0)],
)
def test_damping_samples_the_tilt_of_a_gaussian(s2, scale, y, mean):
    prior = tj.GaussianMixture([1.0], [[mean, 0.5]], [s2 * np.eye(2)])
    reward, law = tj.rewards.Quadratic([y, 0.0]), tj.Damped(scale, s2**0.5)
    times = jnp.linspace(1e-3, 1, 101)
    tilt = theory.tilt(prior, reward, scale).mixture
    slack = step_size_term(theory.plug_in_field(prior, reward, law), times)
    model = tj.Analytic(single(prior))
    # Glass as well as exact draws: its inner steps leave the mean alone and narrow the draws, which
    # the mean guidance ignores.
    for posterior in (tj.Exact(model), tj.Glass(model)):
        x = tj.sample(
            jax.random.key(4), model, tj.PlugIn(posterior, reward, law), num=10_000, times=times
        ).x
        assert_moments(x, tilt, *slack)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scale", "closer", "in_the_limit"),
    [
        (0.5, 1.0, "plug-in", "plug-in"),
        (4.0, 0.1, "fmrg", "fmrg"),
        # The fresh draws widen the samples of plug-in by O(1 / N).
        (16.0, 0.1, "plug-in", "fmrg"),
    ],
)
def test_samples_of_fmrg_and_plug_in_cross_as_predicted(width, scale, closer, in_the_limit):
    """Entries of the tables of docs/evidence/accuracy.md."""
    prior = tj.GaussianMixture([1.0], [[0.0, 0.0]], [width**2 * np.eye(2)])
    reward, steps = tj.rewards.Quadratic([0.0, 2.5]), 100
    tilt, model = theory.tilt(prior, reward, scale).mixture, tj.Analytic(prior)
    far = lambda mean, cov: float(theory.bures(mean, cov, tilt.means[0], tilt.covs[0])) ** 0.5
    methods = {
        "plug-in": (tj.PlugIn(tj.Exact(model), reward, scale), theory.plug_in_field),
        "fmrg": (tj.fmrg(model, reward, scale), theory.fmrg_field),
    }
    limits = {"plug-in": theory.plug_in_law, "fmrg": theory.fmrg_law}
    measured, predicted = {}, {}
    for name, (guidance, field) in methods.items():
        x = tj.sample(jax.random.key(6), model, guidance, num=20_000, steps=steps).x
        assert_moments(x, theory.discrete_law(field(prior, reward, scale), times=model.grid(steps)))
        measured[name] = far(jnp.mean(x, axis=0), jnp.cov(x.T))
        law = limits[name](prior, reward, scale)
        predicted[name] = far(law.means[0], law.covs[0])
    assert min(measured, key=measured.get) == closer
    assert min(predicted, key=predicted.get) == in_the_limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "interpolant"),
    [(name, tj.Linear()) for name in ("gaussian", "quadratic", "noniso", "unequal", "uncentered")]
    + [("noniso", WIDE)],
)
def test_tilted_and_doob_sample_the_tilt_within_and_between_modes(name, interpolant):
    problem = tj.problems.get(name)
    truth = theory.tilt(problem.prior, problem.reward, problem.scale)
    model, num, times = tj.Analytic(problem.prior, interpolant), 20_000, jnp.linspace(1e-4, 1, 101)
    tilted = tj.Tilted(model, problem.reward, problem.scale)
    doob = tj.Doob(model, theory.log_h(problem.prior, problem.reward, problem.scale, interpolant))
    statistics = {
        "x": lambda x: x,
        "squares": lambda x: x**2,
        "product": lambda x: x[:1] * x[1:],
        "masses": lambda x: jax.nn.softmax(truth.mixture.component_log_probs(x)),
    }
    mean = truth.mixture.mean()
    second = truth.mixture.cov() + jnp.outer(mean, mean)
    expected = {
        "x": mean,
        "squares": jnp.diagonal(second),
        "product": second[0, 1:],
        "masses": truth.mixture.weights,
    }
    for guidance, start in ((None, tilted), (doob, model)):
        x = tj.sample(jax.random.key(6), start, guidance, num=num, times=times).x
        # The step-size term: the same flow (same noise) at half the steps, to second order.
        coarse = tj.sample(jax.random.key(6), start, guidance, num=num, times=times[::2]).x
        for label, statistic in statistics.items():
            values, rough = jax.vmap(statistic)(x), jax.vmap(statistic)(coarse)
            steps = np.abs(np.mean(values, axis=0) - np.mean(rough, axis=0))
            error = np.std(values, axis=0) / np.sqrt(num)
            assert np.all(
                np.abs(np.mean(values, axis=0) - expected[label]) < SIGMAS * error + steps + 1e-12
            ), label


@pytest.mark.slow
def test_best_of_n_chooses_the_mode_that_plug_in_cannot():
    problem, groups = tj.problems.step(), 4000
    model = tj.Analytic(problem.prior)
    for guidance in (None, tj.PlugIn(tj.Glass(model), problem.reward, problem.scale)):
        particles = tj.sample(jax.random.key(7), model, guidance, num=16 * groups, steps=20)
        for n in (1, 2, 4, 8, 16):
            chosen = np.asarray(tj.best_of_n(particles, problem.reward, n).x[:groups, 0]) >= 0
            expected = 1 - 0.5**n
            error = np.sqrt(expected * (1 - expected) / groups)
            # A rounding below 1 / groups is what a finite number of groups can show at n = 16.
            assert abs(np.mean(chosen) - expected) < SIGMAS * error + 0.5 / groups


@pytest.mark.slow
def test_softmax_of_n_tends_to_the_tilt():
    problem, n, groups = tj.problems.bump(), 64, 4000
    particles = tj.sample(jax.random.key(8), tj.Analytic(problem.prior), num=n * groups, steps=20)
    chosen = tj.softmax_of_n(jax.random.key(9), particles, problem.reward, n, problem.scale)
    truth = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale)
    expected = float(truth.expect(lambda x: jnp.where(x[0] >= 0, 1.0, 0.0)))
    error = np.sqrt(expected * (1 - expected) / groups)
    # Self-normalized weights of n draws: a bias of order Var(W) / (n E[W]^2), computed on the
    # particles themselves.
    weights = np.exp(problem.scale * np.asarray(jax.vmap(problem.reward)(particles.x)))
    right = np.asarray(particles.x[:, 0] >= 0)
    bias = np.mean(weights**2 * (expected - right)) / (n * np.mean(weights) ** 2)
    assert (
        abs(np.mean(np.asarray(chosen.x[:, 0]) >= 0) - expected - bias) < SIGMAS * error + bias**2
    )


@pytest.mark.slow
@pytest.mark.parametrize("d", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_many_draws_have_their_law(d):
    # s^2 = .5, scale 3, y = 2.5 along the first coordinate; the dimension matters for k > 1.
    prior = tj.GaussianMixture([1.0], [np.zeros(d)], [0.5 * np.eye(d)])
    reward = tj.rewards.Quadratic(np.where(np.arange(d) == 0, 2.5, 0.0))
    model, num, k = tj.Analytic(single(prior)), 20_000, 4
    law = theory.plug_in_law(prior, reward, 3.0, k=k)
    mean, std = law.mean(), jnp.sqrt(jnp.diagonal(law.cov()))
    runs = {}
    for steps in (60, 120):
        guidance = tj.PlugIn(tj.Exact(model), reward, 3.0, k=k)
        x = tj.sample(jax.random.key(steps), model, guidance, num=num, steps=steps).x
        x = np.asarray(x, np.float64)
        runs[steps] = np.mean(x, axis=0), np.std(x, axis=0)
    # The draws' variance is of first order in the step; what is left after extrapolation is of
    # second.
    for i, (exact, unit) in enumerate(((mean, 1.0), (std, 2**-0.5))):
        limit = 2 * runs[120][i] - runs[60][i]
        error = np.sqrt(5) * unit * std / np.sqrt(num)  # of 2 A - B, independent
        assert np.all(np.abs(limit - exact) < SIGMAS * error + 2e-3)
