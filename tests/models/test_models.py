"""Models: one law, however its network is parametrized, packed or batched.

Tier: exact (float64, 1e-10).
"""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import contracts

import tiltjax as tj
from tiltjax import rewards

TOLERANCE = 1e-10
X = jnp.asarray([0.3, -0.8])
PATHS = contracts.paths()
MIXTURE = contracts.planar()


def assert_close(a, b, tolerance=TOLERANCE):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


# Parametrizations.


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_every_parametrization_is_the_same_model(name):
    model, times = tj.Analytic(MIXTURE, PATHS[name]), (1e-3, 0.5, 0.99)
    options = {"shape": (2,), "interpolant": PATHS[name]}

    def v(t, x):  # in the notation of diffusion models, with alpha for the data
        path = PATHS[name]
        return path.alpha(t) * model.noise(t, x) - path.sigma(t) * model.denoise(t, x)

    networks = (
        tj.from_velocity(model.velocity, **options),
        tj.from_noise(model.noise, **options),
        tj.from_v(v, **options),
        tj.from_score(model.score, **options),
        tj.from_denoiser(model.denoise, **options),
    )

    @jax.jit
    def everything(t):
        return [
            (m.denoise(t, X), m.velocity(t, X), m.score(t, X), m.noise(t, X))
            for m in (model, *networks)
        ]

    for t in map(jnp.asarray, times):
        expected, *got = everything(t)
        # A noise network's denoiser divides a rounding error by alpha, the score its by sigma^2.
        size = float(1 / model.interpolant.alpha(t) + 1 / model.interpolant.sigma(t) ** 2)
        for values in got:
            chex.assert_trees_all_close(values, expected, rtol=TOLERANCE, atol=1e-13 * size)


def test_v_prediction_is_that_of_diffusion_models_and_not_the_velocity():
    """`DDPMScheduler.get_velocity` of diffusers is `sqrt(a) noise - sqrt(1 - a) sample` for
    `a = alphas_cumprod[i]`. Its schedulers read it as `sqrt(a) x - sqrt(1 - a) v`.
    """
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    vp = tj.DiscreteVP(table)
    sample, noise = np.asarray([0.3, -1.2]), np.asarray([0.8, 0.1])
    for level in (0, 500, 999):
        a, t = table[level], vp.clock(jnp.asarray(float(level)))
        x, v = (
            np.sqrt(a) * sample + np.sqrt(1 - a) * noise,
            np.sqrt(a) * noise - np.sqrt(1 - a) * sample,
        )
        options = {"shape": (2,), "interpolant": vp, "dtype": jnp.float64}
        read = tj.from_v(lambda t, x, v=v: jnp.asarray(v), **options).denoise(t, jnp.asarray(x))
        np.testing.assert_allclose(read, sample, atol=1e-9)
        np.testing.assert_allclose(read, np.sqrt(a) * x - np.sqrt(1 - a) * v, atol=1e-9)
        another = tj.from_velocity(lambda t, x, v=v: jnp.asarray(v), **options)
        if level:
            assert np.abs(another.denoise(t, jnp.asarray(x)) - sample).max() > 0.1
    with pytest.raises(TypeError, match="interpolant"):
        tj.from_v(lambda t, x: x, shape=(2,))  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"interpolant must be an Interpolant.*VP\(\)"):
        tj.from_v(lambda t, x: x, shape=(2,), interpolant=None)  # pyright: ignore
    assert str(tj.from_v(lambda t, x: x, shape=(2,), interpolant=tj.VP())).startswith("from_v(")


def test_the_analytic_denoiser_is_the_posterior_mean():
    model = tj.Analytic(MIXTURE, tj.Linear(1.7))
    weights, means, _ = contracts.np_condition(MIXTURE, 0.4, 0.6 * 1.7, np.asarray(X))
    assert_close(model.denoise(jnp.asarray(0.4), X), weights @ means)
    assert_close(model.posterior(jnp.asarray(0.4), X).mean(), weights @ means)
    assert model.shape == (2,)
    assert model.dtype == jnp.float64


@pytest.mark.parametrize("name", PATHS)
def test_the_start_is_the_noise_of_the_interpolant(name):
    model, t = tj.Analytic(MIXTURE, PATHS[name]), jnp.asarray(0.1)
    normal = jax.random.normal(jax.random.key(0), (2,), jnp.float64)
    assert_close(model.initial(jax.random.key(0), t), PATHS[name].sigma(t) * normal)


# Networks: functions with parameters, Equinox, Flax.


def affine(params, t, x):
    return params["w"] @ x + t * params["b"]


PARAMS = {"w": jnp.asarray([[0.5, 0.1], [-0.2, 0.3]]), "b": jnp.asarray([0.4, -0.1])}


class EquinoxNet(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(3, 2, 8, 1, activation=jax.nn.silu, key=key)

    def __call__(self, t, x):
        return self.mlp(jnp.append(x, t))


class FlaxNet(nnx.Module):
    def __init__(self, rngs, layer=None):
        self.first = nnx.Linear(3, 8, param_dtype=jnp.float64, dtype=jnp.float64, rngs=rngs)
        self.middle = layer
        self.last = nnx.Linear(8, 2, param_dtype=jnp.float64, dtype=jnp.float64, rngs=rngs)

    def __call__(self, t, x):
        hidden = jnp.tanh(self.first(jnp.append(x, t)))
        return self.last(hidden if self.middle is None else self.middle(hidden))


NETS = {
    "parameters": (affine, PARAMS),
    "closure": (lambda t, x: affine(PARAMS, t, x), None),
    "equinox": (EquinoxNet(jax.random.key(0)), None),
    "flax": (FlaxNet(nnx.Rngs(0)), None),
}


@pytest.mark.parametrize("name", NETS)
def test_networks_of_every_kind_travel_through_jit_and_give_their_own_output(name):
    fn, params = NETS[name]
    model, t = tj.from_denoiser(fn, params, shape=(2,)), jnp.asarray(0.4)
    expected = fn(t, X) if params is None else fn(params, t, X)
    assert_close(model.denoise(t, X), expected)
    # The model is an argument, of plain `jax.jit` too.
    assert_close(jax.jit(lambda model, x: model.denoise(t, x))(model, X), expected)
    assert_close(jax.jit(jax.vmap(lambda x: model.denoise(t, x)))(X[None]), expected[None])
    if name != "closure":
        assert sum(leaf.size for leaf in jax.tree.leaves(model) if eqx.is_inexact_array(leaf)) > 1


def test_new_parameters_trace_nothing_anew():
    fn, calls = contracts.traced(affine)
    denoise = jax.jit(lambda model, t, x: model.denoise(t, x))
    for factor in (1.0, 2.0, 3.0):
        params = jax.tree.map(lambda leaf, factor=factor: factor * leaf, PARAMS)
        got = denoise(tj.from_denoiser(fn, params, shape=(2,)), jnp.asarray(0.4), X)
        assert_close(got, affine(params, 0.4, X))
    assert len(calls) == 1


def test_new_weights_of_an_equinox_module_trace_nothing_anew():
    calls = []

    class Counting(EquinoxNet):
        def __call__(self, t, x):
            calls.append(1)
            return super().__call__(t, x)

    denoise = jax.jit(lambda model, x: model.denoise(jnp.asarray(0.4), x))
    results = [
        denoise(tj.from_denoiser(Counting(jax.random.key(seed)), shape=(2,)), X) for seed in (0, 1)
    ]
    assert not np.allclose(*results)
    assert len(calls) == 1


def test_parameters_are_differentiable_without_batching():
    loss = lambda params: jnp.sum(
        tj.from_denoiser(affine, params, shape=(2,)).denoise(jnp.asarray(0.4), X)
    )
    expected = {"w": jnp.broadcast_to(X, (2, 2)), "b": jnp.full(2, 0.4)}
    assert_close(jax.grad(loss)(PARAMS), expected)


def test_verbs_leave_the_networks_dtype_alone():
    """A float32 network, its parameters inside a module or beside a function, under a float64
    state.
    """
    seen = []

    def fn(params, t, x):
        seen.append(params["w"].dtype)
        return (params["w"] @ x.astype(params["w"].dtype)).astype(x.dtype)

    single = {"w": jnp.eye(2, dtype=jnp.float32)}
    run = lambda model: tj.sample(jax.random.key(0), model, num=2, steps=2, solver=tj.Euler())
    run(tj.from_denoiser(fn, single, shape=(2,)))
    assert set(seen) == {jnp.dtype("float32")}
    seen.clear()
    module = eqx.Partial(fn, single)
    run(tj.from_denoiser(module, shape=(2,)))
    assert set(seen) == {jnp.dtype("float32")}


def test_the_output_is_cast_to_the_states_dtype():
    model = tj.from_denoiser(lambda t, x: x.astype(jnp.bfloat16), shape=(2,), dtype=jnp.float32)
    assert model.denoise(0.5, X.astype(jnp.float32)).dtype == jnp.float32


# Batched networks.


class Recorder:
    """A batched denoiser of the planar mixture that writes down the shapes it is run with (not
    those it is traced with).
    """

    def __init__(self):
        self.shapes = []

    def __call__(self, t, x):
        jax.debug.callback(lambda t, x: self.shapes.append((t.shape, x.shape)), t, x)
        return jax.vmap(lambda t, x: MIXTURE.denoise(t, 1 - t, x))(t, x)


def batched(recorder=None):
    recorder = Recorder() if recorder is None else recorder
    return tj.from_denoiser(lambda t, x: recorder(t, x), shape=(2,), batched=True)


SINGLE = tj.from_denoiser(lambda t, x: MIXTURE.denoise(t, 1 - t, x), shape=(2,))
POINTS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
T = jnp.asarray(0.4)


@pytest.mark.slow
def test_a_batched_network_is_the_same_model():
    def values(model):
        value = lambda x: jnp.sum(jnp.sin(model.denoise(T, x)))
        return (
            model.denoise(T, X),
            jax.vmap(lambda x: model.denoise(T, x))(POINTS),
            jax.vmap(model.denoise)(jnp.linspace(0.1, 0.9, 5), POINTS),
            jax.vmap(jax.value_and_grad(value))(POINTS),
            jax.jacrev(lambda x: model.denoise(T, x))(X),
            jax.vmap(jax.jacrev(lambda x: model.denoise(T, x)))(POINTS),
            jax.grad(lambda t: jnp.sum(model.denoise(t, X)))(T),
        )

    assert_close(*jax.jit(lambda: (values(batched()), values(SINGLE)))())


@pytest.mark.slow
def test_nested_maps_are_rows():
    recorder = Recorder()
    over_draws = jax.vmap(lambda x, e: batched(recorder).denoise(T, x + e), (None, 0))
    got = jax.vmap(over_draws, (0, None))(POINTS, POINTS[:3])
    expected = jax.vmap(jax.vmap(lambda x, e: SINGLE.denoise(T, x + e), (None, 0)), (0, None))(
        POINTS, POINTS[:3]
    )
    assert_close(got, expected)
    jax.effects_barrier()
    assert recorder.shapes == [((15,), (15, 2))]


@pytest.mark.slow
def test_particles_times_draws_are_the_rows_of_one_call():
    """8 particles x 3 draws: every call of the network has 8 rows (the denoiser) or 24 (the draws),
    never an axis more.
    """
    recorder, num, k = Recorder(), 8, 3
    model = batched(recorder)
    guidance = tj.PlugIn(tj.Glass(model, inner_steps=2), rewards.Quadratic([0.0, 1.0]), k=k)
    tj.sample(jax.random.key(0), model, guidance, num=num, steps=2, solver=tj.Euler())
    jax.effects_barrier()
    assert set(recorder.shapes) == {((num,), (num, 2)), ((num * k,), (num * k, 2))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "guided",
    [
        lambda m: tj.Laplace(m, rewards.Bump([0.0, 1.0]), 3.0),
        lambda m: tj.PlugIn(tj.Glass(m, 3), rewards.Quadratic([0.0, 1.0]), 2.0, k=2),
        lambda m: tj.fmrg(m, rewards.Quadratic([0.0, 1.0]), 1.0, inner_steps=2),
    ],
    ids=("laplace", "plug-in", "fmrg"),
)
def test_guidances_work_through_batched_networks(guided):
    keys = jax.random.split(jax.random.key(0), 5)
    estimate = lambda m: jax.vmap(lambda k, x: guided(m)(k, T, x, ())[0])(keys, POINTS)
    assert_close(*jax.jit(lambda: (estimate(batched()), estimate(SINGLE)))())


def test_a_batched_network_with_parameters_and_modules():
    fn = lambda params, t, x: x @ params["w"].T + t[:, None] * params["b"][None]
    model = tj.from_denoiser(fn, PARAMS, shape=(2,), batched=True)
    expected = jax.vmap(lambda x: affine(PARAMS, T, x))(POINTS)
    assert_close(jax.vmap(lambda x: model.denoise(T, x))(POINTS), expected)


@pytest.mark.parametrize("place", ["module", "parameters"])
def test_a_batched_flax_module_differentiates_in_x(place):
    class Rows(FlaxNet):
        def __call__(self, t, x):
            return jax.vmap(super().__call__)(t, x)

    net, rows = FlaxNet(nnx.Rngs(1)), Rows(nnx.Rngs(1))
    apply = (rows, None) if place == "module" else (lambda net, t, x: net(t, x), rows)
    model = tj.from_denoiser(*apply, shape=(2,), batched=True)
    assert_close(
        jax.vmap(lambda x: model.denoise(T, x))(POINTS), jax.vmap(lambda x: net(T, x))(POINTS)
    )
    assert_close(jax.jacrev(lambda x: model.denoise(T, x))(X), jax.jacrev(lambda x: net(T, x))(X))


def test_a_batched_networks_parameters_cannot_be_differentiated_or_mapped_and_it_says_so():
    fn = lambda params, t, x: x @ params["w"].T
    model = lambda w: tj.from_denoiser(fn, {"w": w}, shape=(2,), batched=True)
    with pytest.raises(TypeError, match=r"not differentiable in its parameters.*batched=False"):
        jax.grad(lambda w: jnp.sum(model(w).denoise(T, X)))(PARAMS["w"])
    with pytest.raises(ValueError, match=r"cannot be vmapped over its parameters.*batched=False"):
        jax.vmap(lambda w: model(w).denoise(T, X))(jnp.stack([PARAMS["w"]] * 3))


# Errors.


@pytest.mark.parametrize(
    ("is_batched", "hint"), [(False, "batched=True"), (True, "batch of states")]
)
def test_a_wrong_output_shape_says_what_was_expected(is_batched, hint):
    model = tj.from_velocity(lambda t, x: x[..., :1], shape=(2,), batched=is_batched)
    with pytest.raises(ValueError, match=rf"expected .*got .*{hint}|{hint}.*got"):
        model.denoise(T, X)


def test_a_module_in_training_mode_is_refused_until_eval():
    for layer in (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0))):
        net = FlaxNet(nnx.Rngs(0), layer)
        with pytest.raises(ValueError, match=rf"{type(layer).__name__} \(middle\).*\.eval\(\)"):
            tj.from_velocity(net, shape=(2,))
        net.eval()
        tj.from_velocity(net, shape=(2,))


def test_a_module_in_training_mode_is_refused_as_parameters_too():
    net = FlaxNet(nnx.Rngs(0), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        tj.from_velocity(lambda net, t, x: net(t, x), net, shape=(2,))


def test_a_module_in_a_closure_is_refused_and_a_method_brings_its_weights():
    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.asarray(0.5))

        def field(self, t, x):
            return self.w[...] * x

    net = Net()
    with pytest.raises(TypeError, match=r"module .net. from outside.*from_velocity"):
        tj.from_velocity(lambda t, x: net.field(t, x), shape=(2,))
    with pytest.raises(TypeError, match="module 'net' from outside"):
        tj.rewards.as_reward(lambda x: jnp.sum(net.field(0.0, x)))
    x = jnp.ones(2)
    denoise = jax.jit(lambda model: model.denoise(jnp.asarray(0.5), x))
    before = denoise(tj.from_denoiser(net.field, shape=(2,)))
    net.w[...] = jnp.asarray(2.0)
    after = denoise(tj.from_denoiser(net.field, shape=(2,)))
    np.testing.assert_allclose((before, after), ([0.5, 0.5], [2.0, 2.0]))


def test_a_module_of_another_signature_is_refused_with_the_way_to_wrap_it():
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"called as fn\(t, x\).*lambda net, t, x"):
        tj.from_velocity(mlp, shape=(2,))
    model = tj.from_velocity(lambda mlp, t, x: mlp(jnp.append(x, t)), mlp, shape=(2,))
    assert model.denoise(jnp.asarray(0.5), jnp.ones(2)).shape == (2,)


@pytest.mark.parametrize("is_batched", [False, True])
def test_a_derivative_may_be_cut_behind_the_network(is_batched):
    @jax.custom_vjp
    def straight_through(x, denoised):
        return denoised

    straight_through.defvjp(lambda x, denoised: (denoised, None), lambda _, slope: (slope, None))
    model = tj.from_denoiser(lambda t, x: jnp.sin(x), shape=(2,), batched=is_batched)
    value = lambda x: jnp.sum(straight_through(x, model.denoise(T, x)))
    assert_close(value(X), jnp.sum(jnp.sin(X)))
    assert_close(jax.grad(value)(X), jnp.ones(2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_states_below_single_precision_are_refused(dtype):
    with pytest.raises(ValueError, match="at least 32 bits"):
        tj.from_velocity(lambda t, x: x, shape=(2,), dtype=dtype)


def test_a_network_with_random_streams_in_evaluation_mode_is_a_model_like_any_other():
    class Net(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(3))
            self.w = nnx.Param(jnp.asarray(0.5))

        def __call__(self, t, x):
            return self.dropout(self.w[...] * x)

    net = Net()
    net.eval()
    first, second = (tj.from_denoiser(net, shape=(2,)) for _ in range(2))
    x = tj.sample(
        jax.random.key(0), first, tj.dps(second, rewards.LinearReward([1.0, 0.0])), num=3, steps=3
    ).x
    assert np.all(np.isfinite(x))


@pytest.mark.slow
def test_what_is_prepared_for_all_times_is_the_denoiser():
    class Own(tj.Analytic):
        def denoise(self, t, x):
            return 7.0 * jnp.ones_like(x)

    analytic, reward = tj.Analytic(MIXTURE), rewards.Quadratic([0.5, 1.0])
    large = tj.Analytic(contracts.random_mixture(9, 2))
    network = tj.from_denoiser(analytic.denoise, shape=(2,))
    several = (
        analytic,
        large,
        network,
        tj.Tilted(analytic, reward, 0.7),
        tj.models.Rescheduled(analytic, tj.VP()),
        Own(MIXTURE),
    )
    times = jnp.asarray([0.1, 0.5, 0.9])
    for model in several:
        prepared = jax.jit(jax.vmap(lambda t, model=model: model.prepare(t)))(times)
        found = jax.jit(jax.vmap(lambda one, model=model: model.denoise_prepared(one, X)))(prepared)
        denoise = jax.jit(lambda t, model=model: model.denoise(t, X))
        assert_close(found, jnp.stack([denoise(t) for t in times]))
    assert_close(tj.FlowMap(Own(MIXTURE)).draw(jax.random.key(0), times[0], X), 7.0 * jnp.ones(2))
    for posterior in (tj.Glass, tj.FlowMap, tj.Exact):
        with pytest.raises(ValueError, match=r"states of shape \(2,\), got"):
            posterior(analytic).draw(jax.random.key(0), times[0], jnp.zeros(3))


@pytest.mark.slow
def test_a_model_may_prepare_arrays_of_any_dtype():
    class Levels(tj.Analytic):
        def prepare(self, t):
            return jnp.round(10 * t).astype(jnp.int32), t

        def denoise_prepared(self, prepared, x):
            level, t = prepared
            return self.denoise(t, x) + jnp.zeros(11)[level]

    model, key, t = Levels(MIXTURE), jax.random.key(1), jnp.asarray(0.3)
    for posterior in (tj.Glass, tj.FlowMap):
        assert_close(
            posterior(model).draw(key, t, X), posterior(tj.Analytic(MIXTURE)).draw(key, t, X)
        )


SNRS = np.geomspace(1e-7, 1e7, 8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("d", [1, 2, 9, 64])
def test_the_posterior_variance_of_one_gaussian_is_its_closed_form(d, dtype):
    s2 = 0.6
    model = tj.Analytic(contracts.gaussian(np.linspace(-2, 1, d), s2 * np.eye(d), dtype))
    found = jax.jit(lambda snr: jax.lax.map(model.posterior_variance, snr))(SNRS.astype(dtype))
    assert found.dtype == dtype
    rounding = 1e-10 if dtype == jnp.float64 else 2e-5
    np.testing.assert_allclose(found, s2 / (1 + s2 * SNRS), rtol=rounding)


@pytest.mark.parametrize("d", [1, 2, 9, 64])
def test_the_posterior_variance_of_a_mixture_is_that_of_random_states(d):
    num, mixture = 2000, contracts.random_mixture(3, d)
    model = tj.Analytic(mixture)
    data = mixture.sample(jax.random.key(1), num)
    noise = jax.random.normal(jax.random.key(2), data.shape)

    @jax.jit
    def both(snr):
        t = model.interpolant.time(snr)
        x = model.interpolant.alpha(t) * data + model.interpolant.sigma(t) * noise
        # One state after the other: large batches of LAPACK calls may wait for each other for ever.
        return model.posterior_variance(snr), jax.lax.map(
            lambda x: jnp.trace(model.posterior(t, x).cov()) / d, x
        )

    for snr in (1e-2, 1.0, 30.0):
        nodes, states = both(jnp.asarray(snr))
        error = float(jnp.std(states)) / np.sqrt(num)
        assert abs(float(nodes - jnp.mean(states))) < 5 * error + 0.01 * float(nodes)


def test_single_precision_has_the_posterior_variance_of_double():
    models = [tj.Analytic(contracts.planar(dtype)) for dtype in (jnp.float32, jnp.float64)]
    single, double = (
        jax.lax.map(model.posterior_variance, jnp.asarray(SNRS, model.dtype)) for model in models
    )
    np.testing.assert_allclose(single, double, rtol=1e-4)
