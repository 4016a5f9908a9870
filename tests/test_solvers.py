"""One step, and many, of each solver on a Gaussian whose flow is known.

Tiers: exact (float64, 1e-10), order (slope within 0.2 of the order the class promises), statistical
(5 standard errors).
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import contracts

import tiltjax as tj

SOLVERS = contracts.all_solvers()
STD, MEAN = 0.6, 0.7
KEYS = tj.solvers.Streams(*jax.random.split(jax.random.key(0), 3))
PATHS = {
    "linear": tj.Linear(),
    "base 1.7": tj.Linear(1.7),
    "trigonometric": contracts.Trigonometric(),
    "ve": tj.VE(),
}


def model(path=None):
    return tj.Analytic(contracts.gaussian([MEAN], [[STD**2]]), path or tj.Linear())


def field(model):
    return lambda key, t, x, state: (model.denoise(t, x), state)


def flow(path, t, u, x):
    """The closed-form flow of one Gaussian from t to u."""
    width = lambda t: np.sqrt(
        float(path.sigma(jnp.asarray(t))) ** 2 + (float(path.alpha(jnp.asarray(t))) * STD) ** 2
    )
    mean = lambda t: float(path.alpha(jnp.asarray(t))) * MEAN
    return mean(u) + width(u) / width(t) * (np.asarray(x) - mean(t))


def run(solver, model, times, x):
    """The same steps `sample` takes, for given starts."""

    def step(x, pair):
        advance = lambda x: solver.step(KEYS, model.interpolant, field(model), *pair, x, ())[0]
        return jax.vmap(advance)(x), None

    return jax.jit(lambda: jax.lax.scan(step, x, (times[:-1], times[1:]))[0])()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["euler", "heun", "ddim"])
def test_orders_on_the_flow_of_a_gaussian(name, path):
    solver, gaussian = SOLVERS[name], model(PATHS[path])
    start = jnp.asarray([[-1.0], [0.3], [1.6]])
    truth = flow(gaussian.interpolant, 0.1, 0.9, start)
    errors = [
        np.abs(
            np.asarray(run(solver, gaussian, jnp.linspace(0.1, 0.9, n + 1), start)) - truth
        ).max()
        for n in (32, 64, 128)
    ]
    assert abs(contracts.slope(errors) - solver.order) < 0.2, errors


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_orders_survive_the_jump_at_the_end(name):
    """The last step jumps to the denoiser, an error of second order in it: the promised order holds
    up to t = 1.
    """
    solver, start = SOLVERS[name], jnp.asarray([[-1.0], [0.3], [1.6]])
    truth = flow(tj.Linear(), 0.1, 1.0, start)
    errors = [
        np.abs(np.asarray(run(solver, model(), jnp.linspace(0.1, 1.0, n + 1), start)) - truth).max()
        for n in (32, 64, 128)
    ]
    assert abs(contracts.slope(errors) - solver.order) < 0.2, errors


def test_ddim_is_euler_on_the_straight_path():
    start, times = jnp.asarray([[-1.0], [0.3]]), jnp.linspace(0.1, 1.0, 8)
    for path in (tj.Linear(), tj.Linear(1.7)):
        results = [run(SOLVERS[name], model(path), times, start) for name in ("ddim", "euler")]
        chex.assert_trees_all_close(*results, rtol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "adaptive"])
def test_the_last_step_jumps_to_the_denoiser(name, path):
    gaussian, x = model(PATHS[path]), jnp.asarray([0.4])
    end, _ = jax.jit(
        lambda: SOLVERS[name].step(KEYS, gaussian.interpolant, field(gaussian), 0.8, 1.0, x, ())
    )()
    chex.assert_trees_all_close(end, gaussian.denoise(0.8, x), rtol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_ancestral_kernel_is_affine_with_the_published_mean_and_variance(eta, path):
    """One step against the closed form `alpha_u D + sqrt(sigma_u^2 - S2) E + sqrt(S2) xi`."""
    gaussian, t, u, x = model(PATHS[path]), 0.4, 0.7, jnp.asarray([0.4])
    p = PATHS[path]
    alpha, sigma = (
        (lambda t: float(p.alpha(jnp.asarray(t)))),
        (lambda t: float(p.sigma(jnp.asarray(t)))),
    )
    rho = alpha(t) * sigma(u) / (alpha(u) * sigma(t))
    variance = eta**2 * sigma(u) ** 2 * (1 - rho**2)
    d = float(gaussian.denoise(jnp.asarray(t), x)[0])
    mean = alpha(u) * d + np.sqrt(sigma(u) ** 2 - variance) * (0.4 - alpha(t) * d) / sigma(t)
    xi = float(jax.random.normal(KEYS.noise, (1,), jnp.float64)[0])
    solver = tj.Ancestral(eta)
    moved, _ = solver.step(KEYS, p, field(gaussian), jnp.asarray(t), jnp.asarray(u), x, ())
    chex.assert_trees_all_close(moved[0], mean + np.sqrt(variance) * xi, rtol=1e-10)


def test_the_ancestral_kernel_keeps_its_digits_near_the_noise():
    # What is kept of the noise at eta = 1 is sigma_u rho, 1e-4 here: as sqrt(sigma_u^2 - S2) it
    # would be off by as much in float32.
    path, solver = tj._pytree.cast((tj.Linear(), tj.Ancestral()), jnp.float32)
    t, u = jnp.asarray(1e-4, jnp.float32), jnp.asarray(0.5, jnp.float32)
    nothing = lambda key, t, x, state: (0 * x, state)
    ends = [
        solver.step(KEYS, path, nothing, t, u, jnp.asarray([x], jnp.float32), ())[0]
        for x in (1e3, -1e3)
    ]
    kept = float((ends[0] - ends[1])[0]) / 2e3
    np.testing.assert_allclose(kept, 0.5 * (1e-4 / (1 - 1e-4)) / (1 - 1e-4), rtol=1e-5)


def test_ancestral_reproduces_the_marginal():
    """The eta = 1 kernel of a *point mass* is exact at any number of steps; of a Gaussian as steps
    grow (order 1).
    """
    point = tj.Analytic(contracts.gaussian([MEAN], [[0.0]]))
    times = jnp.asarray([0.0, 0.3, 0.6])
    x = tj.sample(jax.random.key(1), point, num=4000, times=times, solver=tj.Ancestral()).x
    contracts.assert_moments(x, np.array([0.6 * MEAN]), np.array([[0.4**2]]))

    variance = []
    for n in (32, 64, 128):
        # The kernel is affine: the variance follows from its slope and its noise, exactly.
        times, v = np.linspace(0.0, 1.0, n + 1), 1.0
        for t, u in itertools.pairwise(times):
            solver, gaussian = tj.Ancestral(), model()
            rho2 = (t * (1 - u) / (u * (1 - t))) ** 2
            s2 = (1 - u) ** 2 * (1 - rho2)
            gain = t * STD**2 / ((t * STD) ** 2 + (1 - t) ** 2)
            slope = u * gain + np.sqrt((1 - u) ** 2 - s2) * (1 - t * gain) / (1 - t)
            v = slope**2 * v + s2
            if n == 32 and 0.4 < t < 0.43:
                step = jax.jacobian(
                    lambda x, g=gaussian, t=t, u=u, s=solver: s.step(
                        KEYS, g.interpolant, field(g), t, u, x, ()
                    )[0]
                )
                chex.assert_trees_all_close(step(jnp.asarray([0.2]))[0, 0], slope, rtol=1e-10)
        variance.append(v)
    errors = np.abs(np.array(variance) - STD**2)
    assert abs(contracts.slope(errors) - tj.Ancestral.order) < 0.2, errors
    x = tj.sample(
        jax.random.key(2), model(), num=4000, times=jnp.linspace(0, 1, 33), solver=tj.Ancestral()
    ).x
    contracts.assert_mean(
        (np.asarray(x) - np.asarray(x).mean()) ** 2, variance[0], slack=5 * variance[0] / 4000
    )


def test_the_first_step_may_start_at_zero():
    for name in SOLVERS:
        gaussian, x = model(), jnp.asarray([0.4])
        moved, _ = SOLVERS[name].step(KEYS, gaussian.interpolant, field(gaussian), 0.0, 0.1, x, ())
        assert np.all(np.isfinite(moved)), name


def test_state_is_threaded_through_every_stage():
    count = lambda key, t, x, state: (x, state + 1)
    for name, stages in {"euler": 1, "heun": 2, "ancestral": 1}.items():
        step = lambda u, s=SOLVERS[name]: s.step(
            KEYS, tj.Linear(), count, 0.4, u, jnp.zeros(1), jnp.zeros((), jnp.int32)
        )
        assert int(step(0.5)[1]) == stages
        assert int(step(1.0)[1]) == 1


def test_what_the_classes_promise():
    kinds = (tj.Euler, tj.Heun, tj.Ancestral, tj.Adaptive)
    assert [kind.order for kind in kinds] == [1, 2, 1, 5]
    assert [kind.stochastic for kind in kinds] == [False, False, True, False]


# To a tolerance.

LINE = tj.GaussianMixture([0.3, 0.7], [[-1.5], [1.0]], [[[0.2]], [[0.05]]])


def distribution(path, t, x):
    """The distribution function and density of `X_t`, on the line: the flow of one dimension
    carries quantiles to quantiles.
    """
    weights, means, covs = contracts.np_fields(LINE)
    alpha, sigma = float(path.alpha(jnp.asarray(t))), float(path.sigma(jnp.asarray(t)))
    laws = scipy.stats.norm(alpha * means[:, 0], np.hypot(alpha * np.sqrt(covs[:, 0, 0]), sigma))
    return laws.cdf(x[:, None]) @ weights, laws.pdf(x[:, None]) @ weights


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_adaptive_follows_the_flow_of_a_mixture_to_its_tolerance(path):
    """One program for all tolerances; through an inner time and up to t = 1, where the floor's own
    error is of second order.
    """
    mixture, start = tj.Analytic(LINE, PATHS[path]), jnp.linspace(-1.4, 1.7, 8)[:, None]
    sample = lambda solver: tj.sample(
        jax.random.key(0),
        mixture,
        num=8,
        times=[0.2, 0.7, 1.0],
        start=start,
        solver=solver,
        save_trajectory=True,
    ).trace.trajectory[1:, :, 0]
    before, _ = distribution(PATHS[path], 0.2, np.asarray(start[:, 0]))
    for tolerance in (1e-4, 1e-6, 1e-8):
        for t, x in zip(
            (0.7, 1.0), sample(tj.Adaptive(tolerance, tolerance, floor=1e-5)), strict=True
        ):
            after, density = distribution(PATHS[path], t, np.asarray(x))
            # Between the modes a flow spreads errors by the ratio of the densities.
            error = np.abs(after - before) / np.maximum(density, 0.05)
            assert error.max() < 50 * tolerance, (tolerance, t)
    coarse, _ = distribution(
        PATHS[path], 1.0, np.asarray(sample(tj.Adaptive(1e-2, 1e-2, floor=1e-5)))[1]
    )
    assert np.abs(coarse - before).max() > 1e-6  # the tolerance is what decides


def constant(key, t, x, state):
    """A field that is one random point, and counts what of its memory is kept."""
    return jax.random.normal(key, x.shape, x.dtype), state + 1


@pytest.mark.parametrize("u", [0.8, 1.0])
def test_adaptive_holds_the_draw_over_a_step_and_updates_the_memory_once(u):
    path, x, point = tj.Linear(1.7), jnp.asarray([0.4]), jax.random.normal(KEYS.guidance, (1,))
    step = lambda t, u: tj.Adaptive(1e-9, 1e-9).step(
        KEYS, path, constant, t, u, x, jnp.zeros((), jnp.int32)
    )
    end, memory = step(jnp.asarray(0.3), jnp.asarray(u))
    keep = (1 - u) / (1 - 0.3)  # of a constant denoiser x / sigma is linear in alpha / sigma
    chex.assert_trees_all_close(end, keep * x + (u - 0.3 * keep) * point, rtol=1e-7)
    assert int(memory) == 1


@pytest.mark.slow
def test_adaptive_says_what_failed():
    """One program: a network that is NaN past a time, and a tolerance that three steps cannot
    meet.
    """
    network = lambda limit: tj.from_denoiser(
        lambda limit, t, x: jnp.where(t > limit, jnp.nan, jnp.sin(5 * x)),
        jnp.asarray(limit),
        shape=(2,),
    )
    run = lambda limit, steps: tj.sample(
        jax.random.key(0),
        network(limit),
        num=3,
        times=[1e-3, 0.5, 1.0],
        solver=tj.Adaptive(1e-9, max_steps=steps),
    )
    with pytest.raises(
        FloatingPointError,
        match=r"step 0 of 2.* solver's step: .*Adaptive's tolerance and max_steps",
    ):
        run(2.0, 3)
    with pytest.raises(FloatingPointError, match=r"step 1 of 2.*denoiser is not finite"):
        run(0.6, 400)


@pytest.mark.slow
def test_adaptive_differentiates_in_reverse():
    """The flow of one Gaussian is affine, with the slope `width(u) / width(t)`."""
    gaussian = model(tj.Linear(1.7))
    run = lambda x: tj.Adaptive(1e-8, 1e-8).step(
        KEYS, gaussian.interpolant, field(gaussian), jnp.asarray(0.1), jnp.asarray(0.9), x, ()
    )[0]
    slope = flow(tj.Linear(1.7), 0.1, 0.9, 1.0) - flow(tj.Linear(1.7), 0.1, 0.9, 0.0)
    chex.assert_trees_all_close(
        jax.jacrev(run)(jnp.asarray([0.4])), jnp.asarray([[slope]]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0}, "rtol must be positive, got 0"),
        ({"atol": -1.0}, "atol must not be negative"),
        ({"floor": 1.0}, r"floor must lie in \(0, 1\), got 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
    ],
)
def test_adaptive_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tj.Adaptive(**options)
