"""Draws of `X_1` given `X_t = x`. Tiers: exact (float64, 1e-10), order (slope within 0.2),
statistical (5 standard errors).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj

POSTERIORS = contracts.all_posteriors()
MODEL = tj.Analytic(contracts.planar())
X = jnp.asarray([0.1, -0.3])
STD, MEAN = 0.6, 0.7
PATHS = {
    "linear": tj.Linear(),
    "base 1.7": tj.Linear(1.7),
    "trigonometric": contracts.Trigonometric(),
    "ve": tj.VE(),
}


def line(path):
    return tj.Analytic(contracts.gaussian([MEAN], [[STD**2]]), path)


def moments(path, t, x=X, mixture=MODEL.mixture):
    t = jnp.asarray(t)
    return contracts.np_moments(
        *contracts.np_condition(mixture, float(path.alpha(t)), float(path.sigma(t)), np.asarray(x))
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", POSTERIORS)
def test_contract(name, dtype):
    model = tj.Analytic(contracts.planar(dtype), tj.Linear(jnp.ones((), dtype)))
    draw = jax.jit(
        lambda x: POSTERIORS[name](model).draw(jax.random.key(0), jnp.asarray(0.4, dtype), x)
    )
    value, jacobian = jax.jit(lambda x: (draw(x), jax.jacobian(draw)(x)))(X.astype(dtype))
    assert value.shape == (2,)
    assert value.dtype == jacobian.dtype == dtype
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(jacobian))
    step = 1e-5 * np.eye(2)
    if dtype == jnp.float64:  # reparametrized: the derivative is that of the draw at a fixed key
        numeric = np.stack([(draw(X + e) - draw(X - e)) / 2e-5 for e in step], axis=1)
        chex.assert_trees_all_close(jacobian, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*POSTERIORS, "renoise"])
def test_several_draws_are_as_many_independent_ones(name):
    """A single one is `draw`'s, also with the denoiser at hand; many have its moments, and of three
    none has to do with another.
    """
    all_of = POSTERIORS | {"renoise": lambda model: tj.posteriors.Renoise(model, 3.0, 5)}
    posterior, t, num = all_of[name](MODEL), jnp.asarray(0.4), 5000

    @jax.jit
    def run(keys):
        single = lambda x: posterior.draws(keys[0], t, x, 1, MODEL.denoise(t, x))[0]
        draw = lambda x: posterior.draw(keys[0], t, x)
        one = [(of(X), jax.jacobian(of)(X)) for of in (single, draw)]
        apart = jax.vmap(lambda key: posterior.draw(key, t, X))(keys)
        threes = jax.vmap(lambda key: posterior.draws(key, t, X, 3))(keys)
        return one, apart, posterior.draws(keys[1], t, X, num), threes

    (single, draw), apart, many, threes = jax.tree.map(
        np.asarray, run(jax.random.split(jax.random.key(5), num))
    )
    chex.assert_trees_all_close(single, draw, rtol=1e-12, atol=1e-12)
    assert many.shape == apart.shape == (num, 2)
    if np.all(apart == apart[0]):  # a point, whatever the key
        np.testing.assert_array_equal(many, apart)
        return
    for of in (lambda x: x, lambda x: (x - apart.mean(0)) ** 2):
        error = np.sqrt((of(many).var(axis=0) + of(apart).var(axis=0)) / num)
        assert np.all(np.abs(of(many).mean(axis=0) - of(apart).mean(axis=0)) < 5 * error)
    threes = threes - threes.mean(axis=0)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.all(
            np.abs(threes[:, i].T @ threes[:, j])
            < 5 * np.sqrt((threes[:, i] ** 2).T @ threes[:, j] ** 2)
        )


@pytest.mark.slow
@pytest.mark.parametrize("base", [tj.Glass, tj.Exact, tj.Tweedie, tj.FlowMap])
def test_a_draw_of_ones_own_is_what_several_are_made_of(base):
    class Clamped(base):
        def draw(self, key, t, x):
            return jnp.clip(super().draw(key, t, x), -0.1, 0.1)

    draws = jax.jit(
        lambda: Clamped(MODEL).draws(jax.random.key(0), jnp.asarray(0.4), X, 4, jnp.zeros(2))
    )()
    assert np.all(np.abs(draws) <= 0.1)
    guidance = tj.PlugIn(Clamped(MODEL), tj.rewards.LinearReward([1.0, 1.0]), 1.0, k=3)
    assert (
        abs(jax.jit(lambda: guidance(jax.random.key(0), jnp.asarray(0.4), X, ())[0].log_h)()) <= 0.2
    )


@pytest.mark.parametrize("base", [tj.Glass, tj.Exact, tj.Tweedie, tj.FlowMap])
def test_no_draws_are_refused(base):
    with pytest.raises(ValueError, match="k must be at least 1"):
        base(MODEL).draws(jax.random.key(0), jnp.asarray(0.4), X, 0)


@pytest.mark.parametrize("name", POSTERIORS)
def test_draws_near_the_data_end_stay_near_x(name):
    """At t = .9995 the posterior is within some 1 - t of x / t."""
    t = jnp.asarray(0.9995)
    draw = jax.jit(jax.vmap(lambda key: POSTERIORS[name](MODEL).draw(key, t, X)))(
        jax.random.split(jax.random.key(0), 20)
    )
    assert np.all(np.abs(np.asarray(draw) - np.asarray(X / t)) < 6 * 5e-4)


# Exact.


@pytest.mark.slow
@pytest.mark.parametrize("t", [0.05, 0.6])
def test_exact_draws_have_the_posteriors_moments(t):
    for path in (tj.Linear(), tj.Linear(1.7)):
        model = tj.Analytic(MODEL.mixture, path)
        draw = jax.vmap(lambda key, m=model: tj.Exact(m).draw(key, jnp.asarray(t), X))
        draws = jax.jit(draw)(jax.random.split(jax.random.key(1), 20_000))
        contracts.assert_moments(draws, *moments(path, t))


def test_the_derivative_of_an_exact_draw_of_one_gaussian_is_the_denoisers():
    model = tj.Analytic(contracts.gaussian([0.2, -0.1], [[0.5, 0.2], [0.2, 0.4]]), tj.Linear(1.3))
    t = jnp.asarray(0.4)
    got = jax.jit(jax.jacobian(lambda x: tj.Exact(model).draw(jax.random.key(3), t, x)))(X)
    chex.assert_trees_all_close(got, jax.jacobian(lambda x: model.denoise(t, x))(X), rtol=1e-10)


def test_exact_draws_of_point_masses_are_the_points():
    model = tj.Analytic(
        tj.GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], np.zeros((2, 2, 2)))
    )
    draws = jax.jit(jax.vmap(lambda key: tj.Exact(model).draw(key, jnp.asarray(0.3), X)))(
        jax.random.split(jax.random.key(0), 50)
    )
    assert set(map(tuple, np.asarray(draws).tolist())) == {(-1.0, 0.0), (1.0, 0.0)}


# Glass.


def glass_as_affine_map(path, steps, t, monkeypatch, order=1):
    """Mean and standard deviation of a draw for one Gaussian, exactly: it is affine in its one
    normal variable.
    """

    def at(z):
        monkeypatch.setattr(
            jax.random, "normal", lambda key, shape=(), dtype=float: jnp.full(shape, z, dtype)
        )
        draw = jax.jit(
            lambda x: tj.Glass(line(path), steps, order).draw(jax.random.key(0), jnp.asarray(t), x)
        )
        return float(draw(jnp.asarray([0.4]))[0])

    low, middle, high = at(-1.0), at(0.0), at(1.0)
    assert abs(low + high - 2 * middle) < 1e-12
    return middle, high - middle


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("path", "t"), [("linear", 0.05), ("base 1.7", 0.5), ("trigonometric", 0.9)]
)
def test_glass_is_of_its_order_in_its_spread(path, t, order, monkeypatch):
    mean, cov = moments(PATHS[path], t, np.array([0.4]), line(PATHS[path]).mixture)
    results = [
        glass_as_affine_map(PATHS[path], steps, t, monkeypatch, order) for steps in (32, 64, 128)
    ]
    errors = [abs(std - np.sqrt(cov[0, 0])) for _, std in results]
    assert abs(contracts.slope(errors) - order) < 0.2, errors
    # For one Gaussian the mean is right at any number of steps: the inner denoiser's mean never
    # leaves it.
    assert all(abs(m - mean[0]) < 1e-10 for m, _ in results)


@pytest.mark.parametrize("path", ["base 1.7"])
def test_glass_converges_to_the_posterior_of_a_mixture(path):
    """Statistical, plus twice the change of the same draws from 80 to 160 steps: what a first-order
    method has left.
    """
    model, t = tj.Analytic(MODEL.mixture, PATHS[path]), jnp.asarray(0.5)
    keys = jax.random.split(jax.random.key(4), 8000)
    draws = lambda steps: np.asarray(
        jax.jit(jax.vmap(lambda key: tj.Glass(model, steps).draw(key, t, X)))(keys)
    )
    coarse, fine = draws(80), draws(160)
    slack = 2 * max(
        np.abs(coarse.mean(0) - fine.mean(0)).max(), np.abs(np.cov(coarse.T) - np.cov(fine.T)).max()
    )
    assert slack < 0.05
    contracts.assert_moments(fine, *moments(PATHS[path], 0.5), slack)


@pytest.mark.parametrize("order", [1, 2])
def test_glass_of_a_point_mass_is_exact_in_one_step(order):
    model = tj.Analytic(contracts.gaussian([0.2, -0.1], np.zeros((2, 2))))
    for steps in (1, 5):
        glass = tj.Glass(model, steps, order)
        draw = jax.jit(lambda x, glass=glass: glass.draw(jax.random.key(0), jnp.asarray(0.3), x))(X)
        chex.assert_trees_all_close(draw, jnp.asarray([0.2, -0.1]), rtol=1e-10)


def test_glass_refuses_other_orders():
    with pytest.raises(ValueError, match=r"order must lie in \[1, 2\], got 3"):
        tj.Glass(MODEL, order=3)


@pytest.mark.parametrize(("steps", "order"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_glass_asks_the_network_steps_times(steps, order):
    calls = []

    def denoise(t, x):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return MODEL.denoise(t, x)

    tj.Glass(tj.from_denoiser(denoise, shape=(2,)), steps, order).draw(
        jax.random.key(0), jnp.asarray(0.3), X
    )
    jax.effects_barrier()
    assert len(calls) == steps
    assert min(calls) == 0.3  # it always knows at least as much as x says


# FlowMap and Tweedie.


def flow_end(path, t, x):
    t = jnp.asarray(t)
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    return MEAN + STD / np.sqrt(sigma**2 + (alpha * STD) ** 2) * (x - alpha * MEAN)


@pytest.mark.parametrize(
    ("path", "t"), [("linear", 0.05), ("base 1.7", 0.5), ("trigonometric", 0.3)]
)
def test_the_flow_map_is_of_second_order(path, t):
    truth, model = flow_end(PATHS[path], t, 1.4), line(PATHS[path])
    end = lambda x, steps: tj.FlowMap(model, steps).draw(jax.random.key(0), jnp.asarray(t), x)
    ends = lambda steps: jax.jit(end, static_argnums=1)(jnp.asarray([1.4]), steps)
    errors = [abs(float(ends(steps)[0]) - truth) for steps in (20, 40, 80)]
    assert abs(contracts.slope(errors) - 2) < 0.2, errors


@pytest.mark.parametrize("t", [0.9, 0.999, 0.9999])
def test_the_flow_map_near_the_data_end(t):
    """Where the noise is already below the floor it is one jump to the denoiser, exact to (1 -
    t)^2.
    """
    path, floor = tj.Linear(), 1e-3
    end = tj.FlowMap(line(path), 40, floor).draw(
        jax.random.key(0), jnp.asarray(t), jnp.asarray([1.4])
    )
    # The jump's own error is the noise left, squared, over the prior's variance (times the
    # standardized state, below 2), and Heun's is below it: 40 steps over log(sigma_t / floor) <=
    # 4.7.
    assert (
        abs(float(end[0]) - flow_end(path, t, 1.4))
        < 2 * (max(1 - t, floor) if t > 0.99 else 5e-3) ** 2 / STD**2
    )


def test_tweedie_is_the_denoiser_and_draws_nothing():
    t = jnp.asarray(0.4)
    draws = [tj.Tweedie(MODEL).draw(jax.random.key(seed), t, X) for seed in (0, 1)]
    chex.assert_trees_all_equal(draws[0], draws[1], MODEL.denoise(t, X))


@pytest.mark.slow
def test_renoising_by_nothing_is_the_flow_map_and_by_much_forgets_the_state():
    t, model = (
        jnp.asarray(0.5),
        tj.Analytic(contracts.gaussian([0.2, -0.4], [[0.5, 0.2], [0.2, 0.4]]), tj.Linear(1.3)),
    )
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-10, atol=1e-10)
    close(
        tj.posteriors.Renoise(model, 1.0, 8).draw(jax.random.key(0), t, X),
        tj.FlowMap(model, 8).draw(jax.random.key(0), t, X),
    )
    far = tj.posteriors.Renoise(model, 1e6, 40)
    draws = jax.jit(jax.vmap(lambda key: far.draw(key, t, X)))(
        jax.random.split(jax.random.key(1), 4000)
    )
    mean, cov = np.mean(draws, axis=0), np.cov(np.asarray(draws).T)
    assert np.all(
        np.abs(mean - model.mixture.mean()) < 5 * np.sqrt(np.diag(cov) / 4000) + 2e-3
    )  # 1e-3 of X is still known
    # The flow map of second order in 40 steps over six decades of snr: compare with twice as many.
    finer = jax.jit(jax.vmap(lambda key: tj.posteriors.Renoise(model, 1e6, 80).draw(key, t, X)))(
        jax.random.split(jax.random.key(1), 4000)
    )
    steps = np.abs(np.cov(np.asarray(finer).T) - cov)
    error = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / 4000)
    assert np.all(np.abs(cov - model.mixture.cov()) < 5 * error + 2 * steps)
    assert np.all(steps < 0.05)


def test_renoising_cannot_remove_noise():
    with pytest.raises(ValueError, match=r"snr_factor must lie in \[1, inf\), got 0\.5"):
        tj.posteriors.Renoise(tj.Analytic(contracts.planar()), 0.5)


def test_second_derivatives_of_a_flow_map_are_finite_far_from_the_data():
    """There one component has probability zero, and its exponential must not overflow."""
    flow = tj.FlowMap(tj.Analytic(contracts.planar()), 3)
    end = lambda x: jnp.sum(flow.draw(jax.random.key(0), jnp.asarray(0.4), x))
    hessian = jax.jit(jax.jacrev(jax.grad(end)))(jnp.asarray([30.0, -20.0]))
    assert np.all(np.isfinite(hessian))
    assert np.abs(hessian).max() < 1e-12  # the flow of one Gaussian is linear
