"""Training: the loss against closed forms, the step against its formulas, whole runs against what
they should learn.

Tier: exact (formulas, bits), statistical (|estimate - truth| < 5 standard errors).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import contracts
from matplotlib.figure import Figure

import tiltjax as tj
from tiltjax import _progress, training

KEY = jax.random.key(0)
PATHS = contracts.paths()
MEAN, SPREAD = 0.7, 0.6
TARGETS = {
    "velocity": tj.from_velocity,
    "noise": tj.from_noise,
    "v": tj.from_v,
    "denoiser": tj.from_denoiser,
}


def network(seed=0, **settings):
    settings = {
        "width": 16,
        "depth": 2,
        "param_dtype": jnp.float64,
        "rngs": nnx.Rngs(seed),
    } | settings
    return tj.training.networks.Velocity((1,), **settings)


def gaussian(num, key=KEY):
    return MEAN + SPREAD * jax.random.normal(key, (num, 1))


# The loss.


def exact(target, path):
    """The minimizer of the loss for Gaussian data."""
    model = tj.Analytic(contracts.gaussian([MEAN], [[SPREAD**2]]), path)
    return {
        tj.from_velocity: model.velocity,
        tj.from_noise: model.noise,
        tj.from_v: lambda t, x: (
            path.alpha(t) * model.noise(t, x) - path.sigma(t) * model.denoise(t, x)
        ),
        tj.from_denoiser: model.denoise,
    }[target]


def least(target, path):
    """The mean of Var(Y | X_t) over t: of Y = p X_1 + q X_0 it is `det^2 / Var(X_t)` with the
    determinant of (Y, X_t).
    """
    nodes, weights = np.polynomial.legendre.leggauss(400)
    t = jnp.asarray((nodes + 1) / 2)
    alpha, sigma = (np.asarray(jax.vmap(fn)(t)) for fn in (path.alpha, path.sigma))
    slopes = (np.asarray(jax.vmap(jax.grad(fn))(t)) for fn in (path.alpha, path.sigma))
    p, q = {
        tj.from_velocity: lambda: slopes,
        tj.from_noise: lambda: (0, 1),
        tj.from_v: lambda: (-sigma, alpha),
        tj.from_denoiser: lambda: (1, 0),
    }[target]()
    determinant = SPREAD * (p * sigma - q * alpha)
    return np.sum(weights / 2 * determinant**2 / ((alpha * SPREAD) ** 2 + sigma**2))


CASES = [
    *[("linear, base 1.7", target) for target in TARGETS],
    *[
        ("trigonometric, base 0.6", "velocity"),
        ("vp", "noise"),
        ("vp", "v"),
        ("discrete vp", "denoiser"),
    ],
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "target"), CASES)
def test_the_least_loss_is_the_conditional_variance(path, target):
    """Statistical: at the exact network the loss is the mean conditional variance; elsewhere it is
    larger by the mean square.
    """
    path, target = PATHS[path], TARGETS[target]
    best, truth, shift = exact(target, path), least(target, path), 0.3

    @jax.jit
    def values(key):
        key_data, key_loss = jax.random.split(key)
        run = lambda fn: training.loss(
            fn, key_loss, gaussian(256, key_data), target=target, interpolant=path
        )
        return run(best), run(lambda t, x: best(t, x) + shift)

    at_best, beside = (np.asarray(v) for v in jax.lax.map(values, jax.random.split(KEY, 400)))
    error = at_best.std(ddof=1) / 20
    assert abs(at_best.mean() - truth) < 5 * error
    gap = beside - at_best
    assert abs(gap.mean() - shift**2) < 5 * gap.std(ddof=1) / 20
    assert 5 * error < 0.2 * truth


def test_the_least_loss_of_linear_paths():
    for width in (1.0, 1.7):
        np.testing.assert_allclose(
            least(tj.from_velocity, tj.Linear(width)), np.pi * SPREAD * width / 2, rtol=1e-10
        )


def test_batched_or_not_is_one_loss():
    x1, net = gaussian(8), network()
    values = [training.loss(net, KEY, x1, batched=batched) for batched in (False, True)]
    np.testing.assert_allclose(*values, rtol=1e-12)


@pytest.mark.slow
def test_times_follow_their_law():
    seen = []

    def net(t, x):
        seen.append(t)
        return x

    training.loss(net, KEY, gaussian(4000), batched=True)
    training.loss(
        net,
        KEY,
        gaussian(4000),
        batched=True,
        time_sampler=lambda key: jax.random.beta(key, 2.0, 1.0),
    )
    for t, mean, variance in zip(seen, (1 / 2, 2 / 3), (1 / 12, 1 / 18), strict=True):
        assert abs(float(t.mean()) - mean) < 5 * np.sqrt(variance / 4000)
        assert 0 <= t.min() <= t.max() <= 1
    assert len(np.unique(seen[0])) == 4000


@pytest.mark.slow
def test_a_gradient_flows_to_every_parameter():
    net = network()
    parameters, template = training.split_parameters(net)
    slope = jax.grad(lambda p: training.loss(template.merge(p), KEY, gaussian(32)))(parameters)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in slope.values())


def test_a_loss_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"velocity of VP is unbounded .* target=from_noise"):
        training.loss(network(), KEY, gaussian(4), interpolant=tj.VP())
    with pytest.raises(ValueError, match="target must be the function from_velocity"):
        training.loss(network(), KEY, gaussian(4), target="velocity")
    with pytest.raises(ValueError, match=r"expected \(4, 1\), got \(4, 2\)"):
        training.loss(lambda t, x: jnp.append(x, t), KEY, gaussian(4))
    with pytest.raises(ValueError, match="scalar for a key"):
        training.loss(
            network(), KEY, gaussian(4), time_sampler=lambda key: jax.random.uniform(key, (2,))
        )
    with pytest.raises(TypeError, match="interpolant must be an Interpolant"):
        training.loss(network(), KEY, gaussian(4), interpolant="linear")


# The step.


def test_the_schedule():
    rate = training.schedule(0.01, 100, 10)
    values = np.asarray([rate(k) for k in range(101)])
    np.testing.assert_allclose(values[:10], 0.001 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(
        values[10:], 0.005 * (1 + np.cos(np.pi * np.arange(91) / 90)), rtol=1e-5, atol=1e-9
    )
    assert values[99] > values[100] == 0
    np.testing.assert_allclose(training.schedule(0.01, 100, 0)(0), 0.01, rtol=1e-6)


def test_a_step_is_clipped_adam_with_decay_of_matrices():
    parameters = {"w": jnp.full((2, 2), 3.0), "b": jnp.full(2, 3.0)}
    rule = training.adamw(0.1, 10, warmup=0, clip=0.5, weight_decay=0.01)
    slope = {"w": jnp.full((2, 2), 30.0), "b": jnp.full(2, 40.0)}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = rule.update(slope, rule.init(parameters), parameters)
    # The first step of Adam is the sign, up to its epsilon.
    np.testing.assert_allclose(updates["b"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["w"], -0.1 * (1 + 0.01 * 3), rtol=1e-6)


def by_hand(rule, steps, ema, key=KEY):
    """The same run, step by step, in NumPy's order of things."""
    data, net = gaussian(50), network()
    parameters, template = training.split_parameters(net)
    average, memory, losses, norms = parameters, rule.init(parameters), [], []
    gradient = jax.jit(
        jax.value_and_grad(lambda p, key, x1: training.loss(template.merge(p), key, x1))
    )
    for k in range(steps):
        key_data, key_loss = jax.random.split(jax.random.fold_in(key, k))
        x1 = data[jax.random.randint(key_data, (16,), 0, 50)]
        value, slope = gradient(parameters, key_loss, x1)
        updates, memory = rule.update(slope, memory, parameters)
        parameters = optax.apply_updates(parameters, updates)
        keep = min(ema, (1 + k) / (10 + k))
        average = jax.tree.map(
            lambda a, w, keep=keep: keep * a + (1 - keep) * w, average, parameters
        )
        losses.append(value)
        norms.append(np.sqrt(sum(np.sum(np.asarray(leaf) ** 2) for leaf in slope.values())))
    return template.merge(parameters), template.merge(average), losses, norms


def test_a_run_is_its_steps():
    rule = optax.sgd(0.1)
    expected = by_hand(rule, 4, 0.2)
    got = training.fit(
        KEY, network(), gaussian(50), steps=4, batch_size=16, optimizer=rule, ema=0.2
    )
    # The curve and the average's factor are in single precision.
    for a, b in zip(got[:2], expected[:2], strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-6)
    for a, b in zip(got.curve, expected[2:], strict=True):
        np.testing.assert_allclose(a, np.asarray(b), rtol=2e-6)
    assert got.curve.loss.shape == got.curve.norm.shape == (4,)


def test_gradients_are_clipped_to_their_global_norm():
    """Plain descent by clipped gradients moves by rate times the clip."""
    rule = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    net = network()
    got = training.fit(KEY, net, gaussian(50), steps=1, batch_size=16, optimizer=rule)
    moves = [
        np.asarray(a - b)
        for a, b in zip(jax.tree.leaves(got.network), jax.tree.leaves(net), strict=True)
    ]
    assert got.curve.norm[0] > 0.01
    np.testing.assert_allclose(np.sqrt(sum(np.sum(move**2) for move in moves)), 0.01, rtol=1e-10)


def test_another_seed_compiles_nothing_anew():
    fn, traces = contracts.traced(lambda net, t, x: net(t, x))
    for seed in (0, 1):
        net = jax.tree_util.Partial(fn, network(seed))
        training.fit(jax.random.key(seed), net, gaussian(50, jax.random.key(seed)), steps=30)
        counts = len(traces)
        training.fit(jax.random.key(seed), net, gaussian(50, jax.random.key(seed)), steps=30)
        # Shapes are looked at once a call, without compiling.
        assert len(traces) == counts + 1
    assert counts == 4


def test_the_network_handed_in_stays_as_it_was():
    net = network()
    before = [np.array(leaf) for leaf in jax.tree.leaves(net)]
    got = training.fit(KEY, net, gaussian(50), steps=2)
    assert contracts.same_bits(net, before)
    assert isinstance(got.network, tj.training.networks.Velocity)
    assert not contracts.same_bits(got.network, before)


# Whole runs.


@pytest.mark.slow
def test_a_gaussian_is_learned():
    """Mean square of the velocity's error over the mean conditional variance: what is left after
    600 steps is below 1%.
    """
    net, sampler = network(width=32), lambda key: gaussian(256, key)
    got = training.fit(
        jax.random.key(1), net, sampler, steps=600, learning_rate=5e-3, ema=0.98, batched=True
    )
    best, least_loss = exact(tj.from_velocity, tj.Linear()), np.pi * SPREAD / 2
    t = jax.random.uniform(jax.random.key(2), (4000,))
    x = t[:, None] * gaussian(4000) + (1 - t[:, None]) * jax.random.normal(
        jax.random.key(3), (4000, 1)
    )
    error = np.mean(np.asarray(got.average(t, x) - jax.vmap(best)(t, x)) ** 2)
    assert error < 0.01 * least_loss
    last = got.curve.loss[-300:]
    assert abs(last.mean() - least_loss) < 5 * last.std(ddof=1) / np.sqrt(300) + 0.01 * least_loss
    samples = np.asarray(
        tj.sample(
            KEY, tj.from_velocity(got.average, shape=(1,), batched=True), num=2000, steps=20
        ).x
    )
    assert abs(samples.mean() - MEAN) < 0.05
    assert abs(samples.std() - SPREAD) < 0.05


KINDS = {
    "equinox": lambda: jax.tree_util.Partial(
        lambda mlp, t, x: mlp(jnp.append(x, t)), eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
    ),
    "function": lambda: jax.tree_util.Partial(
        lambda p, t, x: p["w"] * x + p["b"] * t, {"w": jnp.ones(1), "b": jnp.ones(1)}
    ),
    "half precision": lambda: network(param_dtype=jnp.float32, dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("name", KINDS)
def test_networks_of_every_kind_are_trained(name):
    dtype = jnp.float32 if name == "half precision" else jnp.float64
    net, data = KINDS[name](), gaussian(64).astype(dtype)
    got = training.fit(KEY, net, data, steps=40, learning_rate=0.02, target=tj.from_denoiser)
    assert got.curve.loss[-10:].mean() < got.curve.loss[:5].mean()
    assert jax.tree.structure(got.average) == jax.tree.structure(net)
    assert [leaf.dtype for leaf in jax.tree.leaves(got.network) if eqx.is_array(leaf)] == [
        leaf.dtype for leaf in jax.tree.leaves(net) if eqx.is_array(leaf)
    ]


def test_the_bar_shows_the_loss(capfd, monkeypatch):
    monkeypatch.setattr(_progress, "_DELAY", 0.0)
    monkeypatch.setattr(_progress, "_INTERVAL", 0.0)
    training.fit(KEY, network(), gaussian(50), steps=3)
    assert capfd.readouterr().err == ""
    training.fit(KEY, network(), gaussian(50), steps=3, progress=True)
    assert "3/3" in (shown := capfd.readouterr().err)
    assert "loss " in shown


def test_the_curve_draws_itself():
    figure = Figure()
    ax = figure.subplots()
    training.Curve(np.linspace(2, 1, 250), np.ones(250)).plot(ax)
    raw, means = ax.lines
    assert len(raw.get_xdata()) == 250
    np.testing.assert_allclose(means.get_ydata(), np.linspace(2, 1, 250).reshape(125, 2).mean(1))
    np.testing.assert_allclose(means.get_xdata()[:2], [1.5, 3.5])
    assert ax.get_yscale() == "log"
    training.Curve(np.linspace(1, -1, 10), np.ones(10)).plot(
        ax
    )  # minus an objective: a logarithm would hide half of it
    assert ax.get_yscale() == "linear"


# Errors.


def test_mistakes_are_named():
    net, data = network(), gaussian(50)
    fit = lambda net=net, data=data, steps=2, **settings: training.fit(
        KEY, net, data, steps=steps, **settings
    )
    bad = np.array(data)
    bad[[3, 7]] = np.nan
    for error, match, run in (
        (ValueError, "2 of 50 rows are not, the first is row 3", lambda: fit(data=bad)),
        (ValueError, r"shape \(n, \*shape\), got \(50,\)", lambda: fit(data=data[:, 0])),
        (ValueError, r"shape \(n, \*shape\), got \(0, 1\)", lambda: fit(data=data[:0])),
        (ValueError, "at least 32 bits, got bfloat16", lambda: fit(data=data.astype(jnp.bfloat16))),
        (ValueError, r"expected x of shape \(\*lead, 1\)", lambda: fit(data=jnp.ones((5, 2)))),
        (ValueError, "steps must be at least 1", lambda: fit(steps=0)),
        (TypeError, "steps must be a whole number", lambda: fit(steps=2.5)),
        (ValueError, "batch_size must be at least 1", lambda: fit(batch_size=0)),
        (
            ValueError,
            r"the sampler must return states of shape \(8, \*shape\)",
            lambda: fit(data=lambda key: gaussian(4, key), batch_size=8),
        ),
        (ValueError, "ema must lie", lambda: fit(ema=1.0)),
        (ValueError, r"learning_rate must lie in \(0, inf\)", lambda: fit(learning_rate=-1.0)),
        (
            ValueError,
            "pass learning_rate or optimizer",
            lambda: fit(learning_rate=1.0, optimizer=optax.sgd(1.0)),
        ),
        (TypeError, "optimizer must be", lambda: fit(optimizer=1e-3)),
        (ValueError, "checkpoint_every needs", lambda: fit(checkpoint_every=10)),
        (
            ValueError,
            "does not exist: create it",
            lambda: fit(checkpoint="/nowhere/at/all/run.npz"),
        ),
        (ValueError, "no parameters", lambda: fit(net=lambda t, x: x)),
        (TypeError, "the network is called as", lambda: fit(net=eqx.nn.Linear(1, 1, key=KEY))),
        (ValueError, "training mode", lambda: fit(net=nnx.Dropout(0.5, rngs=nnx.Rngs(0)))),
        (TypeError, "typed PRNG key", lambda: training.fit(0, net, data, steps=1)),
        (
            ValueError,
            r"the loss must return one floating number, got .*\(1,\)",
            lambda: training.minimize(KEY, net, lambda net, key: net(0.5, data[0]), steps=1),
        ),
        (
            ValueError,
            r"the loss must return one floating number, got .*int",
            lambda: training.minimize(KEY, net, lambda net, key: jnp.int32(1), steps=1),
        ),
        (ValueError, "warmup must lie", lambda: training.adamw(1e-3, 10, warmup=11)),
        (ValueError, "weight_decay must", lambda: training.adamw(1e-3, 10, weight_decay=-1.0)),
    ):
        with pytest.raises(error, match=match):
            run()


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    file = tmp_path / "run.npz"
    with pytest.raises(
        FloatingPointError, match=r"failed in step \d+ of 60: the loss is (inf|nan)"
    ):
        training.fit(
            KEY,
            network(),
            gaussian(50),
            steps=60,
            optimizer=optax.sgd(1e9),
            checkpoint=file,
            checkpoint_every=1,
        )

    def spoiled(key):
        x = gaussian(4, key)
        return jnp.where(jnp.all(key_bits(key) == key_bits(at)), jnp.nan, x)

    key_bits = jax.random.key_data
    at = jax.random.split(jax.random.fold_in(KEY, 5))[0]
    with pytest.raises(FloatingPointError, match="failed in step 5 of 9: the loss is nan"):
        training.fit(KEY, network(), spoiled, steps=9)
    # What was written before the failure is what was finite.
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files if "parameters" in name}
    assert arrays
    assert all(np.isfinite(array.view(np.float64)).all() for array in arrays.values())


# Devices.


@pytest.mark.slow
def test_over_eight_devices_as_on_one():
    """In a process of its own: the number of devices is fixed when JAX starts."""
    script = """
        import jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_enable_x64", True)
        from flax import nnx
        import tiltjax as tj
        assert len(jax.devices()) == 8
        P, Kind = jax.sharding.PartitionSpec, jax.sharding.AxisType
        Auto, Explicit = Kind.Auto, Kind.Explicit
        mesh = lambda kind: jax.make_mesh((8,), ("batch",), axis_types=(kind,))
        sharding = jax.sharding.NamedSharding(mesh(Auto), P("batch"))
        rows = []

        def watched(net, t, x):
            record = lambda sharding: rows.append(sharding.shard_shape(x.shape))
            jax.debug.inspect_array_sharding(x, callback=record)
            return net(t, x)

        network = tj.training.networks.Velocity(
            (2,), width=16, depth=1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        data = jax.random.normal(jax.random.key(1), (100, 2))
        partial = jax.tree_util.Partial(watched, network)
        settings = {"steps": 10, "batch_size": 64, "batched": True}
        one = tj.fit(jax.random.key(0), network, data, **settings)
        eight = tj.fit(jax.random.key(0), partial, data, sharding=sharding, **settings)
        assert (8, 2) in rows, rows
        for name in ("network", "average", "curve"):
            pairs = (jax.tree.leaves(getattr(fit, name)) for fit in (one, eight))
            for a, b in zip(*pairs, strict=True):
                assert not hasattr(b, "sharding") or len(b.sharding.device_set) == 8
                np.testing.assert_allclose(a, b, rtol=1e-6 if name == "curve" else 1e-8, atol=1e-12)
        for bad, batch, words in (
            (sharding, 12, "cannot be divided"),
            (jax.sharding.NamedSharding(mesh(Explicit), P("batch")), 64, "must be Auto"),
        ):
            try:
                tj.fit(jax.random.key(0), network, data, steps=1, batch_size=batch, sharding=bad)
            except ValueError as error:
                assert words in str(error), error
            else:
                raise AssertionError(words)
        print("equal")
    """
    done = contracts.on_eight_devices(script)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
