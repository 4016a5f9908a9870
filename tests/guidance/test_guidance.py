"""Guidances: one contract for all, and each against what defines it.

Tiers: exact (float64, 1e-10), order (bias of the plug-in against 1/k), all against closed forms in
NumPy.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj
from tiltjax import rewards

TOLERANCE = 1e-10
GUIDANCES, POSTERIORS = contracts.all_guidances(), contracts.all_posteriors()
SCALE = 2.0
KEY = jax.random.key(7)
T, X = jnp.asarray(0.4), jnp.asarray([0.3, -0.8])


def quadratic(dtype=jnp.float64):
    return rewards.Quadratic(jnp.asarray(contracts.TARGET, dtype), jnp.ones((), dtype))


def build(name, dtype=jnp.float64, path=None):
    model = tj.Analytic(contracts.planar(dtype), path or tj.Linear(jnp.ones((), dtype)))
    # As the verbs do: constants of a guidance follow the dtype of the states.
    return tj._pytree.cast(
        GUIDANCES[name](model, quadratic(dtype), jnp.asarray(SCALE, dtype)), dtype
    ), model


def assert_close(a, b, tolerance=TOLERANCE):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


LINE = tj.Linear()


# The contract.


@functools.cache
def compiled(name, dtype):
    """One program per guidance and precision, for all of the contract."""
    guidance, model = build(name, dtype)
    call = jax.jit(lambda g, m, t, x: (g(KEY, t, x, g.init(x)), g.log_tilt(x), m.denoise(t, x)))
    return lambda t, x: call(guidance, model, t, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", GUIDANCES)
def test_shapes_dtypes_and_the_unguided_denoiser(name, dtype):
    (estimate, after), tilt, denoised = compiled(name, dtype)(T.astype(dtype), X.astype(dtype))
    assert jax.tree.structure(after) == jax.tree.structure(build(name, dtype)[0].init(X))
    for leaf, shape in (
        (estimate.tilted, (2,)),
        (estimate.denoised, (2,)),
        (estimate.log_h, ()),
        (tilt, ()),
    ):
        assert leaf.shape == shape
        assert leaf.dtype == dtype
        assert np.all(np.isfinite(leaf))
    chex.assert_trees_all_close(estimate.denoised, denoised, rtol=8 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("name", GUIDANCES)
def test_the_tilt_at_the_data_end_is_exact(name):
    guidance, _ = build(name)
    for x in (X, jnp.asarray([2.0, 1.5])):
        assert_close(guidance.log_tilt(x), -SCALE * np.sum((np.asarray(x) - contracts.TARGET) ** 2))


BENT = ("laplace", "clipped", "unscaled", "capped", "shortened", "fmrg", "tuned")
GRADIENTS = [name for name in GUIDANCES if name not in BENT]


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_score_is_the_derivative_of_log_h_at_a_fixed_key(name):
    """By central differences: for Doob and the plug-ins the score is defined as that derivative."""
    call = lambda x: compiled(name, jnp.float64)(T, x)[0][0]
    step = 1e-5
    numeric = [
        (call(X + step * e).log_h - call(X - step * e).log_h) / (2 * step) for e in jnp.eye(2)
    ]
    # Central differences err by step^2 times a third derivative and by eps / step.
    chex.assert_trees_all_close(call(X).score(LINE, T), jnp.stack(numeric), rtol=1e-6, atol=1e-7)


def test_one_key_one_estimate():
    guidance, _ = build("plug-in, exact, k=3")
    call = jax.jit(lambda key: guidance(key, T, X, ())[0])
    chex.assert_trees_all_equal(call(KEY), call(KEY))
    assert float(call(KEY).log_h) != float(call(jax.random.key(8)).log_h)


# Laplace where a quadratic model of the reward is wrong.


def test_laplace_does_not_promise_more_than_a_bounded_reward_has():
    """`N(0, 1)`, `scale min(x, 0)` for x far below 0: `log h = -m^2 / (2 v)`, and the score
    `J |m| / v` leads to the kink, not beyond.
    """
    model = tj.Analytic(contracts.gaussian([0.0], [[1.0]]))
    guidance = tj.Laplace(model, lambda x: jnp.minimum(x[0], 0.0), 50.0)
    t, x = jnp.asarray(0.4), jnp.asarray([-1.0])
    jacobian = 0.4 / (0.4**2 + 0.6**2)
    mean, variance = -jacobian, 1 - 0.4 * jacobian
    estimate, _ = jax.jit(lambda x: guidance(jax.random.key(0), t, x, ()))(x)
    np.testing.assert_allclose(estimate.log_h, -(mean**2) / (2 * variance), rtol=0.05)
    score = estimate.score(model.interpolant, t)
    np.testing.assert_allclose(score, jacobian * abs(mean) / variance, rtol=0.05)


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_laplace_is_bounded_by_the_reward(scale):
    model = tj.Analytic(contracts.planar())
    reward = lambda x: jax.nn.log_sigmoid(4 * (x[0] + x[1] - 1))
    guidance = tj.Laplace(model, reward, scale)
    x = 3 * jax.random.normal(jax.random.key(0), (200, 2), float)
    log_h = jax.jit(
        jax.vmap(lambda t, x: guidance(jax.random.key(0), t, x, ())[0].log_h, (None, 0))
    )
    for t in (0.01, 0.3, 0.9):
        assert np.all(np.asarray(log_h(jnp.asarray(t), x)) <= 0)


# Doob and Laplace against closed forms.


def gaussian_h(mean, cov, t, base, x, y, h, scale):
    """`(log h, ∇ log h)` of one Gaussian and `-(x - y)^T H (x - y)`, dense NumPy."""
    d, sigma = len(mean), base * (1 - t)
    jacobian = t * cov @ np.linalg.inv(t**2 * cov + sigma**2 * np.eye(d))
    m = mean + jacobian @ (x - t * mean)
    p = cov - t * jacobian @ cov
    damped = np.linalg.inv(np.eye(d) + 2 * scale * h @ p)
    log_h = -0.5 * np.linalg.slogdet(np.eye(d) + 2 * scale * p @ h)[1] - scale * (
        m - y
    ) @ damped @ h @ (m - y)
    return log_h, -2 * scale * jacobian.T @ damped @ h @ (m - y)


COV = np.array([[0.8, 0.3, 0.1], [0.3, 0.5, -0.2], [0.1, -0.2, 0.4]])
WEIGHT = np.array([[1.5, -0.4, 0.2], [-0.4, 0.7, 0.3], [0.2, 0.3, 0.9]])
MEAN, Y, POINT = np.array([0.2, -0.5, 0.3]), np.array([1.0, 0.5, -1.0]), np.array([0.4, 0.1, -0.7])


@pytest.mark.parametrize("base", [1.0, 1.7])
@pytest.mark.parametrize("t", [1e-3, 0.5, 0.999])
def test_laplace_is_exact_for_a_gaussian_with_matrices_that_do_not_commute(t, base):
    assert np.abs(COV @ WEIGHT - WEIGHT @ COV).max() > 0.1
    model = tj.Analytic(contracts.gaussian(MEAN, COV), tj.Linear(base))
    guidance = tj.Laplace(model, rewards.Quadratic(Y, WEIGHT), 3.0)
    estimate, _ = jax.jit(lambda x: guidance(KEY, jnp.asarray(t), x, ()))(jnp.asarray(POINT))
    log_h, score = gaussian_h(MEAN, COV, t, base, POINT, Y, WEIGHT, 3.0)
    assert_close(
        (estimate.log_h, estimate.tilted - estimate.denoised),
        (log_h, (base * (1 - t)) ** 2 / t * score),
    )


def test_laplace_is_exact_for_a_linear_reward_and_a_singular_prior():
    cov = np.outer([1.0, 2.0, 0.0], [1.0, 2.0, 0.0])
    model, a = tj.Analytic(contracts.gaussian(MEAN, cov)), np.array([0.5, -1.0, 2.0])
    estimate, _ = jax.jit(lambda x: tj.Laplace(model, rewards.LinearReward(a), 2.0)(KEY, T, x, ()))(
        jnp.asarray(POINT)
    )
    _, means, covs = contracts.np_condition(contracts.gaussian(MEAN, cov), 0.4, 0.6, POINT)
    assert_close(estimate.log_h, 2.0 * a @ means[0] + 2.0 * a @ covs[0] @ a)


def test_laplace_of_an_image_is_laplace_of_its_pixels():
    flat = tj.from_denoiser(lambda t, x: jnp.tanh(x), shape=(4,))
    image = tj.from_denoiser(lambda t, x: jnp.tanh(x), shape=(2, 2))
    x = jnp.asarray([0.1, 0.2, -0.3, 0.4])
    reward = lambda x: -jnp.sum((x.reshape(-1) - 1.0) ** 4)
    a, _ = jax.jit(lambda x: tj.Laplace(flat, reward)(KEY, T, x, ()))(x)
    b, _ = jax.jit(lambda x: tj.Laplace(image, reward)(KEY, T, x, ()))(x.reshape(2, 2))
    assert_close(
        (a.denoised, a.log_h, a.tilted), (b.denoised.reshape(4), b.log_h, b.tilted.reshape(4))
    )


@pytest.mark.slow
@pytest.mark.parametrize("t", [1e-3, 0.2, 0.9])
def test_laplace_takes_convex_directions_as_flat(t):
    """Finite where `I + P H` would be singular, and in the convex direction what a linear reward
    would give.
    """
    cov, convex = np.diag([0.5, 0.5]), np.diag([-40.0, 1.0])
    model = tj.Analytic(contracts.gaussian([0.0, 0.0], cov))
    x = np.array([0.3, -0.8])
    estimate, _ = tj.Laplace(model, rewards.Quadratic([0.2, 1.0], convex), 3.0)(
        KEY, jnp.asarray(t), jnp.asarray(x), ()
    )
    jacobian = 0.5 * t / (0.5 * t**2 + (1 - t) ** 2)
    m = jacobian * x[0]
    assert np.isfinite(estimate.log_h)
    pull = (estimate.tilted - estimate.denoised) * t / (1 - t) ** 2
    assert_close(pull[0], jacobian * 3.0 * 80.0 * (m - 0.2), 1e-9)
    assert_close(
        pull[1],
        gaussian_h(np.zeros(2), cov, t, 1.0, x, np.array([0.2, 1.0]), np.diag([0.0, 1.0]), 3.0)[1][
            1
        ],
        1e-9,
    )


def test_doob_takes_a_function_and_differentiates_it():
    model = tj.Analytic(contracts.gaussian(MEAN, COV), tj.Linear(1.3))
    log_h = contracts.log_h(model.mixture, Y, WEIGHT, 3.0, model.interpolant)
    estimate, _ = jax.jit(lambda x: tj.Doob(model, log_h)(KEY, T, x, ()))(jnp.asarray(POINT))
    assert_close(
        (estimate.log_h, estimate.score(tj.Linear(1.3), T)),
        gaussian_h(MEAN, COV, 0.4, 1.3, POINT, Y, WEIGHT, 3.0),
    )


# Plug-ins.


@pytest.mark.slow
@pytest.mark.parametrize("name", POSTERIORS)
def test_the_plug_in_is_the_log_mean_of_the_draws_it_says(name):
    """k draws, equal weights in the mean: with one reward value per draw, `log h` says which draws
    it took.
    """
    model = tj.Analytic(contracts.planar())
    drawn = []

    class Watched(tj.posteriors.Posterior):
        model: tj.Model
        inner: tj.posteriors.Posterior

        def draw(self, key, t, x):
            value = self.inner.draw(key, t, x)
            jax.debug.callback(lambda v: drawn.append(np.asarray(v)), value)
            return value

    guidance = tj.PlugIn(Watched(model, POSTERIORS[name](model)), quadratic(), SCALE, k=3)
    value = jax.jit(lambda x: guidance(KEY, T, x, ())[0].log_h)(X)
    jax.effects_barrier()
    one, other = jax.jit(jax.vmap(lambda key: POSTERIORS[name](model).draw(key, T, X)))(
        jax.random.split(KEY)
    )
    assert len(drawn) == (
        1 if np.array_equal(one, other) else 3
    )  # a point is the same point for every key
    r = -np.sum((np.stack(drawn) - contracts.TARGET) ** 2, axis=1)
    assert_close(value, np.log(np.mean(np.exp(SCALE * r))))


def test_the_plug_in_converges_to_the_h_function():
    """Exact draws of one Gaussian: `h^` is an unbiased mean, so it lies within 5 of its standard
    errors of h.
    """
    mean, cov, h, scale = MEAN[:2], COV[:2, :2], np.eye(2), 0.5
    model, k = tj.Analytic(contracts.gaussian(mean, cov)), 40_000
    large = tj.PlugIn(tj.Exact(model), rewards.Quadratic(Y[:2]), scale, k=k)
    estimate, _ = jax.jit(lambda x: large(KEY, T, x, ()))(X)
    log_h, score = gaussian_h(mean, cov, 0.4, 1.0, np.asarray(X), Y[:2], h, scale)
    twice, _ = gaussian_h(mean, cov, 0.4, 1.0, np.asarray(X), Y[:2], h, 2 * scale)
    variance = np.exp(twice) - np.exp(2 * log_h)  # Var(exp(scale r)) = h_{2 scale} - h^2
    assert abs(np.exp(float(estimate.log_h)) - np.exp(log_h)) < contracts.SIGMAS * np.sqrt(
        variance / k
    )
    # The score is a ratio of means; its standard error from repeated runs of k / 40 draws.
    small = tj.PlugIn(tj.Exact(model), rewards.Quadratic(Y[:2]), scale, k=1000)
    runs = jax.jit(jax.vmap(lambda key: small(key, T, X, ())[0].score(LINE, T)))(
        jax.random.split(jax.random.key(1), 40)
    )
    standard = np.std(np.asarray(runs), axis=0, ddof=1) / np.sqrt(40)
    assert np.all(np.abs(np.asarray(estimate.score(LINE, T)) - score) < contracts.SIGMAS * standard)


def test_the_bias_of_the_plug_in_falls_like_one_over_k():
    """Order: E log h^ - log h = -Var(h^) / (2 h^2 k) + ..., measured with many keys at small
    variance.
    """
    model = tj.Analytic(contracts.gaussian([0.2], [[0.3]]))
    x, runs, scale = jnp.asarray([0.1]), 20_000, 0.8
    truth, _ = gaussian_h(
        np.array([0.2]),
        np.array([[0.3]]),
        0.4,
        1.0,
        np.asarray(x),
        np.array([0.9]),
        np.eye(1),
        scale,
    )
    twice, _ = gaussian_h(
        np.array([0.2]),
        np.array([[0.3]]),
        0.4,
        1.0,
        np.asarray(x),
        np.array([0.9]),
        np.eye(1),
        2 * scale,
    )
    spread = np.exp(twice - 2 * truth) - 1
    for k in (8, 32):
        guidance = tj.PlugIn(tj.Exact(model), rewards.Quadratic([0.9]), scale, k=k)
        values = jax.jit(jax.vmap(lambda key, g=guidance: g(key, T, x, ())[0].log_h))(
            jax.random.split(KEY, runs)
        )
        standard = float(jnp.std(values)) / np.sqrt(runs)
        # The next term of the expansion is smaller by about spread / k: that is the slack.
        assert (
            abs(float(jnp.mean(values)) - truth + spread / (2 * k))
            < 5 * standard + (spread / k) ** 2
        )


def test_dps_is_the_reward_of_the_denoiser():
    guidance, model = build("dps")
    value = lambda x: SCALE * quadratic()(model.denoise(T, x))
    estimate, _ = guidance(KEY, T, X, ())
    assert_close((estimate.log_h, estimate.score(LINE, T)), jax.value_and_grad(value)(X))


def test_fmrg_enters_the_drift_without_its_gain():
    guidance, model = build("fmrg", path=tj.Linear(1.4))
    path, flow = model.interpolant, tj.FlowMap(model, 4)
    estimate, _ = jax.jit(lambda x: guidance(KEY, T, x, ()))(X)
    gradient = jax.jit(jax.grad(lambda x: SCALE * quadratic()(flow.draw(KEY, T, x))))(X)
    drift = path.velocity(T, X, estimate.tilted)
    assert_close(drift, model.velocity(T, X) + gradient, 1e-9)
    assert_close(path.diffusion(T) / 2 * estimate.score(path, T), gradient, 1e-9)


def test_a_guided_denoiser_has_the_drift_that_tilting_requires():
    guidance, model = build("doob", path=tj.Linear(1.4))
    path = model.interpolant
    estimate, _ = guidance(KEY, T, X, ())
    drift = path.velocity(T, X, estimate.tilted)
    assert_close(
        drift, model.velocity(T, X) + path.diffusion(T) / 2 * estimate.score(path, T), 1e-9
    )


def test_a_scale_law_is_held_constant_under_differentiation():
    class Bending(tj.scales.Scale):
        final: jax.Array

        def __call__(self, key, snr, t, x):
            return self.final * jnp.sum(x**2)

    model = tj.Analytic(contracts.planar())
    bent = tj.PlugIn(tj.Tweedie(model), quadratic(), Bending(jnp.asarray(SCALE)))(KEY, T, X, ())[0]
    straight = tj.dps(model, quadratic(), SCALE * jnp.sum(X**2))(KEY, T, X, ())[0]
    assert_close((bent.log_h, bent.score(LINE, T)), (straight.log_h, straight.score(LINE, T)))


# Wrappers.


@pytest.mark.parametrize("limit", [1e-3, 0.7, 1e3])
def test_clipped_shortens_long_scores_and_leaves_short_ones(limit):
    inner, _ = build("laplace")
    plain, clipped = (
        inner(KEY, T, X, ())[0],
        tj.guidance.wrappers.Clipped(inner, limit)(KEY, T, X, ())[0],
    )
    norm = float(jnp.linalg.norm(plain.score(LINE, T)))
    if norm > limit:
        assert_close(jnp.linalg.norm(clipped.score(LINE, T)), limit)
        assert_close(clipped.score(LINE, T) / limit, plain.score(LINE, T) / norm)
    else:
        assert_close(clipped.score(LINE, T), plain.score(LINE, T))
    chex.assert_trees_all_equal((clipped.denoised, clipped.log_h), (plain.denoised, plain.log_h))


def test_clipping_zero_is_zero_with_a_finite_derivative():
    model = tj.Analytic(contracts.planar())
    flat = tj.guidance.wrappers.Clipped(tj.dps(model, lambda x: 0.0 * jnp.sum(x)), 1.0)
    chex.assert_trees_all_equal(flat(KEY, T, X, ())[0].score(LINE, T), jnp.zeros(2))


def test_wrappers_carry_the_memory_of_what_they_wrap():
    class Counting(tj.guidance.Guidance):
        model: tj.Model

        def init(self, x):
            return jnp.zeros((), jnp.int32)

        def __call__(self, key, t, x, state):
            return tj.guidance.Estimate(2 * x, x), state + 1

        def log_tilt(self, x1):
            return jnp.sum(x1)

    guidance = tj.guidance.wrappers.Clipped(
        tj.guidance.wrappers.Unscaled(Counting(tj.Analytic(contracts.planar()))), 1.0
    )
    estimate, state = guidance(KEY, T, X, guidance.init(X))
    assert int(state) == 1
    assert estimate.log_h is None
    assert_close(guidance.log_tilt(X), jnp.sum(X))


@pytest.mark.parametrize("name", ["doob", "damped", "laplace", "clipped", "unscaled"])
def test_guidances_are_pytrees_that_vmap_over_the_scale(name):
    def score(scale):
        model = tj.Analytic(contracts.planar())
        return GUIDANCES[name](model, quadratic(), scale)(KEY, T, X, ())[0].score(LINE, T)

    scales = jnp.asarray([0.5, 2.0])
    together, alone = jax.jit(lambda s: (jax.vmap(score)(s), score(s[1])))(scales)
    assert_close(together[1], alone)


def test_the_derivative_of_a_clipped_zero_is_finite():
    flat = tj.guidance.wrappers.Clipped(
        tj.dps(tj.Analytic(contracts.planar()), lambda x: 0.0 * jnp.sum(x)), 1.0
    )
    assert np.all(np.isfinite(jax.jacobian(lambda x: flat(KEY, T, x, ())[0].tilted)(X)))


def test_laplace_survives_a_network_whose_jacobian_is_negative():
    model = tj.from_denoiser(lambda t, x: -0.01 * x, shape=(2,))
    estimate, _ = tj.Laplace(model, rewards.Quadratic([0.0, 1.0]), 3.0)(
        KEY, jnp.asarray(1e-3), X, ()
    )
    # P is closed where it is negative: nothing is damped, and log h is the reward of the denoiser.
    assert_close(estimate.log_h, 3.0 * rewards.Quadratic([0.0, 1.0])(-0.01 * X))
    assert np.all(np.isfinite(estimate.tilted))


def test_a_score_needs_the_unguided_denoiser():
    with pytest.raises(ValueError, match=r"also needs the .*return Estimate\(tilted, denoised\)"):
        tj.guidance.Estimate(X).score(LINE, T)
    assert_close(tj.guidance.Estimate(X + 1.0, X).shift(), jnp.ones(2))


def test_doob_refuses_a_log_h_of_another_path():
    class Other(tj.rewards.Reward):
        interpolant: tj.interpolants.Interpolant

        def __call__(self, t, x):
            return jnp.sum(x)

    model = tj.Analytic(contracts.planar(), tj.Linear(1.7))
    with pytest.raises(ValueError, match="give both the same one"):
        tj.Doob(model, Other(tj.Linear()))
    tj.Doob(model, Other(tj.Linear(1.7)))


def test_normalized_scores_have_one_length_and_the_same_direction():
    inner, _ = build("laplace")
    plain, unit = (
        inner(KEY, T, X, ())[0].score(LINE, T),
        tj.guidance.wrappers.Normalized(inner, 2.5)(KEY, T, X, ())[0].score(LINE, T),
    )
    assert_close(jnp.linalg.norm(unit), 2.5)
    assert_close(unit / 2.5, plain / jnp.linalg.norm(plain))
    flat = tj.guidance.wrappers.Normalized(
        tj.dps(tj.Analytic(contracts.planar()), lambda x: 0.0 * jnp.sum(x)), 1.0
    )
    assert_close(flat(KEY, T, X, ())[0].score(LINE, T), jnp.zeros(2))


def test_self_damping_is_damping_of_the_right_width_on_one_gaussian():
    model = tj.Analytic(contracts.gaussian([0.3, -0.2], 0.6 * np.eye(2)), tj.Linear(1.4))
    for t in (1e-3, 0.4, 0.95):
        t = jnp.asarray(t)
        right, own = tj.Damped(3.0, 0.6**0.5), tj.SelfDamped(3.0, model)
        snr = model.interpolant.snr(t)
        assert_close(own(KEY, snr, t, X), right(KEY, snr, t, X))


def test_a_guided_step_at_the_denoiser_calls_the_network_once():
    model = tj.from_denoiser(lambda t, x: jnp.sin(x) * t, shape=(3,))
    guidance = tj.PlugIn(tj.Tweedie(model), lambda x: -jnp.sum(x**2), 2.0, k=3)
    step = lambda x: guidance(jax.random.key(0), jnp.asarray(0.3), x, guidance.init(x))
    program = str(jax.make_jaxpr(step)(jnp.ones(3)))
    assert (program.count("= sin "), program.count("= cos ")) == (1, 1)


def test_the_step_of_laplace_that_the_mode_of_the_reward_shortens_has_its_derivative():
    """Against finite differences, in the scale and the state, where a classifier saturates."""
    model = tj.Analytic(contracts.planar())
    reward = lambda x: jax.nn.log_sigmoid(4 * (x[0] + x[1] - 1))

    @jax.jit
    def found(scale, x):
        estimate, _ = tj.Laplace(model, reward, scale)(KEY, jnp.asarray(0.4), x, ())
        return jnp.sum(estimate.tilted) + estimate.log_h

    scale, x, step = jnp.asarray(2.0), jnp.asarray([-0.4, 0.1]), 1e-6
    slopes = jax.grad(found, argnums=(0, 1))(scale, x)
    by_scale = (found(scale + step, x) - found(scale - step, x)) / (2 * step)
    by_state = [(found(scale, x + e) - found(scale, x - e)) / (2 * step) for e in step * jnp.eye(2)]
    np.testing.assert_allclose(slopes[0], by_scale, rtol=1e-6)
    np.testing.assert_allclose(slopes[1], by_state, rtol=1e-6)
    forward = jax.jvp(lambda scale: found(scale, x), (scale,), (jnp.ones(()),))[1]
    np.testing.assert_allclose(forward, slopes[0], rtol=1e-9)


def test_an_own_class_without_a_model_or_a_call_says_what_is_missing():
    class Nameless(tj.guidance.Guidance):
        reward: rewards.Reward

    class Silent(tj.guidance.Guidance):
        model: tj.Model

    with pytest.raises(TypeError, match="Nameless has no field model, the model"):
        Nameless(quadratic())
    model = tj.Analytic(contracts.planar())
    with pytest.raises(NotImplementedError, match=r"define __call__\(self, key, t, x, state\)"):
        tj.sample(KEY, model, Silent(model), num=2, steps=2)
