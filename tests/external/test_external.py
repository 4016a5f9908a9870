"""Rewards on the host: what they are asked, what they answer, how they fail. Tier: exact (float64,
1e-10).
"""

import concurrent.futures
import http.server
import json
import subprocess
import sys
import threading
import time
import urllib.request
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj
from tiltjax import _callbacks

TARGET = np.array(contracts.TARGET)
INSIDE = lambda x: -jnp.sum((x - jnp.asarray(TARGET, x.dtype)) ** 2)
KEY = jax.random.key(3)
POINTS = np.random.default_rng(0).normal(size=(6, 2))


def values(x):
    return -np.sum((x - TARGET) ** 2, axis=tuple(range(1, x.ndim)))


def values_and_gradients(x):
    return values(x), -2 * (x - TARGET)


def watched(fn):
    """`fn`, and the shapes of the batches that it was asked for."""
    shapes = []

    def watching(x):
        shapes.append(x.shape)
        return fn(x)

    return watching, shapes


def stored(path):
    """The arrays of a file."""
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model():
    """A standard Gaussian, as cheap to compile as can be."""
    return tj.from_denoiser(
        lambda t, x: t * x / (t**2 + (1 - t) ** 2), shape=(2,), dtype=jnp.float64
    )


@pytest.fixture
def with_gradient():
    return tj.external.from_numpy(values, value_and_grad=values_and_gradients)


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (lambda r: lambda x: jax.vmap(r)(x), [(6, 2)]),
        (lambda r: jax.jit(jax.vmap(r)), [(6, 2)]),
        (
            lambda r: jax.jit(lambda x: jax.vmap(jax.vmap(r))(x.reshape(3, 2, 2)).reshape(6)),
            [(6, 2)],
        ),
        (lambda r: jax.jit(lambda x: jax.lax.map(r, x, batch_size=4)), [(4, 2), (2, 2)]),
        (lambda r: jax.jit(lambda x: jax.lax.scan(lambda c, x: (c, r(x)), 0, x)[1]), [(1, 2)] * 6),
        (lambda r: lambda x: jnp.stack([r(row) for row in x]), [(1, 2)] * 6),
    ],
    ids=("vmap", "jit", "nested", "chunks", "scan", "one by one"),
)
def test_a_batch_arrives_whole(transform, shapes):
    fn, seen = watched(values)
    answered = transform(tj.external.from_numpy(fn))(jnp.asarray(POINTS))
    np.testing.assert_allclose(answered, values(POINTS), atol=1e-12)
    assert seen == shapes


def test_chunks_and_single_samples():
    fn, seen = watched(values)
    np.testing.assert_allclose(
        jax.vmap(tj.external.from_numpy(fn, chunk_size=4))(jnp.asarray(POINTS)),
        values(POINTS),
        atol=1e-12,
    )
    assert seen == [(4, 2), (2, 2)]
    one, seen = watched(lambda x: -np.sum((x - TARGET) ** 2))
    np.testing.assert_allclose(
        jax.vmap(tj.external.from_numpy(one, batched=False))(jnp.asarray(POINTS)),
        values(POINTS),
        atol=1e-12,
    )
    assert seen == [(2,)] * 6
    single = tj.external.from_numpy(
        one, value_and_grad=lambda x: (one(x), -2 * (x - TARGET)), batched=False
    )
    np.testing.assert_allclose(
        jax.vmap(jax.grad(single))(jnp.asarray(POINTS)), -2 * (POINTS - TARGET), atol=1e-12
    )


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_the_state_keeps_its_dtype(dtype):
    given = []
    fn = lambda x: (given.append(x.dtype), values(x))[1]
    reward = tj.external.from_numpy(fn, value_and_grad=values_and_gradients)
    x = jnp.asarray(POINTS[0], dtype)
    value, gradient = jax.value_and_grad(reward)(x)
    assert reward(x).dtype == value.dtype == gradient.dtype == dtype
    assert given == [np.float64 if dtype == jnp.float64 else np.float32]
    assert abs(float(value) - values(np.asarray(x, float)[None])[0]) < 8 * float(
        jnp.finfo(dtype).eps
    )


def test_value_and_gradient_are_one_call(with_gradient):
    fn, seen = watched(values)
    both, seen_both = watched(values_and_gradients)
    reward = tj.external.from_numpy(fn, value_and_grad=both)
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(reward)))(jnp.asarray(POINTS))
    np.testing.assert_allclose(value, values(POINTS), atol=1e-12)
    np.testing.assert_allclose(gradient, -2 * (POINTS - TARGET), atol=1e-12)
    assert (seen, seen_both) == ([], [(6, 2)])
    forward = jax.jvp(with_gradient, (jnp.asarray(POINTS[0]),), (jnp.ones(2),))[1]
    np.testing.assert_allclose(forward, np.sum(-2 * (POINTS[0] - TARGET)), atol=1e-12)
    total = 2 * with_gradient - tj.rewards.LinearReward([1.0, 2.0])
    np.testing.assert_allclose(
        jax.grad(total)(jnp.asarray(POINTS[0])), -4 * (POINTS[0] - TARGET) - [1, 2], atol=1e-12
    )


def test_what_is_not_there_is_refused_while_tracing(model, with_gradient):
    plain = tj.external.from_numpy(values)
    with pytest.raises(
        ValueError,
        match=r"'values' has no gradient: give value_and_grad=.*best_of_n.*ValueOnly.*Base",
    ):
        tj.sample(KEY, model, tj.PlugIn(tj.Tweedie(model), plain), num=2, steps=2)
    with pytest.raises(ValueError, match="has no gradient"):
        plain.evaluate(POINTS, gradient=True)
    with pytest.raises(ValueError, match=r"no second derivatives.*Laplace"):
        tj.sample(KEY, model, tj.Laplace(model, with_gradient), num=2, steps=2)


GUIDANCES = {
    "plug-in": lambda model, reward: tj.PlugIn(tj.Tweedie(model), reward, 1.5, k=3),
    "dps": lambda model, reward: tj.dps(model, reward, 1.5),
    "conjugate": lambda model, reward: tj.Conjugate(
        model, reward, 1.5, variance=lambda snr: 1 / (2 + snr)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [("plug-in", None), ("conjugate", None), ("dps", 3)])
def test_a_run_is_that_of_the_same_reward_in_jax(model, with_gradient, name, batch):
    run = lambda reward: (
        tj.sample(KEY, model, GUIDANCES[name](model, reward), num=8, steps=4, chunk_size=batch).x
    )
    np.testing.assert_allclose(run(with_gradient), run(INSIDE), atol=1e-10)


def test_weights_need_values_alone(model):
    fn, seen = watched(values)
    settings = {
        "num": 8,
        "steps": 4,
        "proposal": tj.weighted.proposals.Base(),
        "ess_threshold": 1.0,
    }
    steered = tj.smc(
        KEY, model, tj.dps(model, tj.rewards.ValueOnly(tj.external.from_numpy(fn)), 0.5), **settings
    )
    assert seen == [(8, 2)] * 4  # three twists, and the reward itself
    expected = tj.smc(KEY, model, tj.dps(model, INSIDE, 0.5), **settings)
    np.testing.assert_allclose(steered.x, expected.x, atol=1e-10)
    np.testing.assert_allclose(steered.log_norm, expected.log_norm, atol=1e-10)


def test_audits_and_selection(model, with_gradient):
    report = tj.audit(KEY, model, tj.dps(model, with_gradient, 0.5), num=100, steps=3)
    np.testing.assert_allclose(
        report.mean_reward.value, 0.5 * values(np.asarray(report.particles.x)).mean(), atol=1e-10
    )
    assert 0 < report.ess_fraction < 1
    particles = tj.sample(KEY, model, num=8, steps=2)
    reward = tj.external.from_numpy(values)
    np.testing.assert_array_equal(
        tj.best_of_n(particles, reward, 4).x, tj.best_of_n(particles, INSIDE, 4).x
    )
    chosen = [tj.softmax_of_n(KEY, particles, one, 4, 1.0).x for one in (reward, INSIDE)]
    np.testing.assert_array_equal(*chosen)


def test_only_values():
    reward = tj.rewards.ValueOnly(INSIDE)
    value, gradient = jax.value_and_grad(reward)(jnp.asarray(POINTS[0]))
    np.testing.assert_allclose(value, values(POINTS[:1])[0])
    np.testing.assert_array_equal(gradient, 0)


def test_an_equal_reward_compiles_once():
    fn, traces = contracts.traced(lambda reward, x: jax.vmap(reward)(x))
    run = eqx.filter_jit(fn)
    for _ in range(3):
        run(tj.external.from_numpy(values, timeout=5.0), jnp.asarray(POINTS))
    assert len(traces) == 1


def test_sharded_over_one_device(model, with_gradient):
    mesh = jax.make_mesh((1,), ("particles",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("particles"))
    run = lambda **how: tj.sample(KEY, model, tj.dps(model, with_gradient), num=4, steps=2, **how).x
    np.testing.assert_allclose(run(sharding=sharding), run(), atol=1e-12)


def test_the_way_of_other_devices():
    callback = tj.external._callback.Callback(
        tj.external.from_numpy(values), "values", (1,), (((), jnp.dtype(float)),)
    )
    call = lambda x: jax.pure_callback(
        callback.of_arrays, (jax.ShapeDtypeStruct((), x.dtype),), x, vmap_method="expand_dims"
    )
    np.testing.assert_allclose(
        jax.jit(jax.vmap(call))(jnp.asarray(POINTS))[0], values(POINTS), atol=1e-12
    )


def test_one_core_does_not_wait_for_itself():
    # Arrays above 100 kB, two calls that do not wait for each other: with jax.pure_callback this
    # never ends.
    program = """
import os
if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, tiltjax as tj
reward = tj.external.from_numpy(lambda x: x.sum(1))
@jax.jit
def run(x):
    def step(c, _):
        a, b = jax.vmap(reward)(c), jax.lax.map(reward, 2 * c, batch_size=128)
        c = jnp.tanh(c + 1e-3 * (a + b)[:, None])
        return jnp.tanh(c + 1e-6 * (c @ c.T).sum()), None
    return jax.lax.scan(step, x, None, length=5)[0].sum()
jax.block_until_ready([run(jnp.full((256, 12288), 0.01) * i) for i in range(4)])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr


# Failures.


def failing(after, error):
    """`values`, until that many calls were answered."""
    calls = []

    def fn(x):
        calls.append(len(x))
        if len(calls) > after:
            raise error
        return values(x)

    return fn


class Unavailable(Exception):
    pass


@pytest.mark.parametrize(
    "error", [Unavailable("503: no more"), KeyError("score"), RuntimeError(), OSError(5, "wire")]
)
@pytest.mark.parametrize("within", ["sample", "best_of_n", "own jit"])
def test_an_error_comes_out_as_itself(model, error, within):
    fn = failing(1, error)
    reward = tj.external.from_numpy(fn, value_and_grad=lambda x: (fn(x), 0 * x), name="judge")
    runs = {
        "sample": lambda: tj.sample(KEY, model, tj.dps(model, reward), num=4, steps=3),
        "best_of_n": lambda: [
            tj.best_of_n(tj.sample(KEY, model, num=4, steps=1), reward, 2) for _ in range(2)
        ],
        "own jit": lambda: [
            jax.jit(jax.vmap(reward))(jnp.asarray(POINTS)).block_until_ready() for _ in range(2)
        ],
    }
    with pytest.raises(type(error)) as caught, tj.external.failures():
        runs[within]()
    assert caught.value is error
    assert "Raised by the external reward 'judge' for a batch of shape" in caught.value.__notes__[0]


def test_without_failures_the_message_is_there(model):
    reward = tj.external.from_numpy(failing(0, Unavailable("503: no more")))
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match=r"Unavailable: 503: no more"
    ):
        jax.jit(jax.vmap(reward))(jnp.asarray(POINTS)).block_until_ready()
    with pytest.raises(Unavailable):  # the verbs do it for you
        tj.best_of_n(tj.sample(KEY, model, num=4, steps=1), reward, 2)
    with pytest.raises(ZeroDivisionError), tj.external.failures():
        raise ZeroDivisionError  # of something else

    @tj.external.failures()
    def fail():
        return jax.vmap(reward)(jnp.asarray(POINTS))

    with pytest.raises(Unavailable):
        fail()


WRONG = {
    "shape": (
        lambda x: x,
        ValueError,
        r"values of shape \(6, 2\), expected \(6,\) for an input of shape \(6, 2\)",
    ),
    "scalar": (lambda x: 1.0, ValueError, r"values of shape \(\), expected \(6,\)"),
    "text": (lambda x: ["good"] * len(x), TypeError, r"values of dtype <U4, expected real numbers"),
    "none": (lambda x: None, TypeError, "values of dtype object"),
    "truth": (lambda x: x[:, 0] > 0, TypeError, "values of dtype bool"),
    "nan": (
        lambda x: np.where(x[:, 0] > 0, np.nan, 0),
        FloatingPointError,
        "NaN or .inf for . of 6 samples",
    ),
    "inf": (
        lambda x: np.full(len(x), np.inf),
        FloatingPointError,
        "'<lambda>' returned values with NaN or .inf for 6 of 6",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_refused(name):
    fn, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        tj.external.from_numpy(fn).evaluate(POINTS)
    with pytest.raises(error, match=message), tj.external.failures():
        jax.jit(jax.vmap(tj.external.from_numpy(fn)))(jnp.asarray(POINTS)).block_until_ready()


@pytest.mark.parametrize(
    ("both", "error", "message"),
    [
        (values, TypeError, r"must return \(values, gradients\), got ndarray"),
        (
            lambda x: (values(x), values(x)),
            ValueError,
            r"gradients of shape \(6,\), expected \(6, 2\)",
        ),
        (lambda x: (values(x), x * np.nan), FloatingPointError, "gradients with NaN for 6 of 6"),
    ],
)
def test_wrong_gradients_are_refused(both, error, message):
    with pytest.raises(error, match=message):
        tj.external.from_numpy(values, value_and_grad=both).evaluate(POINTS, gradient=True)


def test_what_an_answer_may_be():
    excluded = tj.external.from_numpy(lambda x: np.full(len(x), -np.inf))
    assert excluded.evaluate(POINTS)[0][0] == -np.inf
    assert tj.external.from_numpy(lambda x: [1] * len(x)).evaluate(POINTS)[0].dtype == np.float64
    lost = np.where([[True], [False]], np.nan, POINTS[:2])  # a model's NaN is not the reward's
    assert np.isnan(tj.external.from_numpy(values).evaluate(lost)[0]).tolist() == [True, False]


def test_a_function_may_write_into_its_argument():
    x = jnp.asarray(POINTS)

    def careless(batch):
        batch[...] = 0
        return values(batch)

    record = tj.external.Record()
    jax.vmap(tj.external.from_numpy(careless, record=record))(x)
    np.testing.assert_array_equal(x, POINTS)
    np.testing.assert_array_equal(record.x, POINTS)


def test_retries_wait_longer_each_time(monkeypatch):
    waited = []
    monkeypatch.setattr("tiltjax.external._attempts.time.sleep", waited.append)
    calls = []

    def flaky(x):
        calls.append(1)
        if len(calls) < 4:
            raise ConnectionError("try again")
        return values(x)

    answered = jax.vmap(tj.external.from_numpy(flaky, retries=3, backoff=0.5))(jnp.asarray(POINTS))
    np.testing.assert_allclose(answered, values(POINTS), atol=1e-12)
    assert waited == [0.5, 1.0, 2.0]
    calls.clear()
    with pytest.raises(ConnectionError, match="try again"), tj.external.failures():
        jax.vmap(tj.external.from_numpy(flaky, retries=2))(jnp.asarray(POINTS)).block_until_ready()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"value_and_grad": 3}, TypeError, "value_and_grad: expected a callable, got int"),
        ({"batched": False, "chunk_size": 3}, ValueError, "one sample per call: leave out chunk"),
        ({"retries": -1}, ValueError, "retries must be at least 0, got -1"),
        ({"timeout": 0}, ValueError, r"timeout must lie in \(0, inf\), got 0"),
    ],
)
def test_settings_that_make_no_sense(settings, error, message):
    with pytest.raises(error, match=message):
        tj.external.from_numpy(values, **settings)


def test_without_pytorch_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        tj.external.from_torch(values)


# A service.


@pytest.fixture
def service():
    """The address of a reward on this machine, and a switch that makes it hang."""
    hang, end = threading.Event(), threading.Event()

    class Judge(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            batch = np.array(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if hang.is_set():
                end.wait(20)
                return
            reply = json.dumps(values(batch).tolist()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", hang
    end.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_service_judges_and_then_hangs(model, service, tmp_path):
    address, hang = service

    def judge(x):
        request = urllib.request.Request(address, json.dumps(x.tolist()).encode())
        try:
            with urllib.request.urlopen(request) as reply:
                return np.array(json.load(reply))
        except OSError:
            return np.zeros(len(x))  # a call that was left behind, when the service ends

    record = tj.external.Record(tmp_path / "queries.npz")
    reward = tj.external.from_numpy(judge, timeout=5.0, chunk_size=4, record=record)
    particles = tj.sample(KEY, model, num=8, steps=2)
    best = tj.best_of_n(particles, reward, 4)
    np.testing.assert_array_equal(best.x, tj.best_of_n(particles, INSIDE, 4).x)
    assert (record.calls, len(record)) == (2, 8)

    hang.set()
    hanging = tj.external.from_numpy(
        judge, timeout=0.2, chunk_size=4, retries=1, backoff=0.0, record=record
    )
    start = time.monotonic()
    message = r"'judge' did not return within 0.2 s for a batch of 4, 2 times: increase timeout="
    with pytest.raises(TimeoutError, match=message) as caught, tj.external.failures():
        tj.best_of_n(particles, hanging, 4)
    assert time.monotonic() - start < 5
    assert "8 evaluated samples are in" in caught.value.__notes__[1]
    saved = stored(record.path)
    np.testing.assert_array_equal(saved["x"], particles.x)
    np.testing.assert_allclose(saved["values"], values(np.asarray(particles.x)), atol=1e-12)


# What is left when it dies.


def test_finished_particles_are_saved_when_a_reward_dies(model, tmp_path):
    record = tj.external.Record(tmp_path / "new" / "queries.npz")
    particles = tj.sample(KEY, model, num=12, steps=2)
    reward = tj.external.from_numpy(
        failing(2, Unavailable("the budget is spent")), chunk_size=4, record=record
    )
    with pytest.raises(Unavailable, match="the budget is spent"), tj.external.failures():
        tj.best_of_n(particles, reward, 4)
    saved = stored(record.path)
    np.testing.assert_array_equal(saved["x"], particles.x[:8])
    np.testing.assert_allclose(saved["values"], values(saved["x"]), atol=1e-12)


def test_finished_runs_are_saved_when_a_reward_dies(model, tmp_path):
    path, finished = tmp_path / "queries.npz", []
    fn = failing(7, Unavailable("the budget is spent"))
    reward = tj.rewards.ValueOnly(tj.external.from_numpy(fn, record=tj.external.Record(path)))

    def run(seed):
        settings = {"num": 4, "steps": 3, "proposal": tj.weighted.proposals.Base()}
        finished.append(
            tj.smc(jax.random.key(seed), model, tj.dps(model, reward, 0.1), **settings).x
        )

    with pytest.raises(Unavailable), tj.external.failures():
        list(map(run, range(4)))
    assert len(finished) == 2
    saved = stored(path)
    assert len(saved["x"]) == 7 * 4
    ends = [
        np.flatnonzero(np.all(np.isclose(saved["x"], x, rtol=0, atol=1e-12), axis=1))
        for x in np.concatenate(finished)
    ]
    assert all(len(rows) for rows in ends)


def test_a_record_saves_while_it_goes(tmp_path):
    record = tj.external.Record(tmp_path / "queries.npz", every=0.0)
    reward = tj.external.from_numpy(values, record=record)
    assert (len(record), record.x.shape, record.values.shape) == (0, (0,), (0,))
    for n in (2, 3):
        jax.vmap(reward)(jnp.asarray(POINTS[:n])).block_until_ready()
        assert len(stored(record.path)["values"]) == len(record)
    np.testing.assert_array_equal(record.x, np.concatenate([POINTS[:2], POINTS[:3]]))
    assert record.calls == 2
    assert [path.name for path in tmp_path.iterdir()] == ["queries.npz"]
    with pytest.raises(ValueError, match="no path"):
        tj.external.Record().save()
    with pytest.raises(ValueError, match=r"npz file, got 'queries\.csv'"):
        tj.external.Record("queries.csv")


@pytest.mark.parametrize(
    "error",
    [StopIteration(), RuntimeError(), ValueError("\0 \ud800 ü\nsecond line"), KeyError("k")],
)
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_any_error_is_raised_as_itself(error, timeout):
    def broken(x):
        raise error

    particles = tj.Particles(jnp.zeros((4, 2)), jnp.zeros(4))
    with pytest.raises(type(error)) as caught:
        tj.best_of_n(particles, tj.external.from_numpy(broken, timeout=timeout), 2)
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        particles.mean(tj.external.from_numpy(broken, timeout=timeout))
    assert caught.value is error


def test_an_error_of_something_else_stays_what_it_is():
    def empty(x):
        raise RuntimeError

    def other(x):
        raise KeyError("RuntimeError of another function")

    particles = tj.Particles(jnp.zeros((4, 2)), jnp.zeros(4))
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(jax.jit(tj.external.from_numpy(empty))(jnp.zeros(2)))
    out = jax.ShapeDtypeStruct((), jnp.float64)
    reward = lambda x: jax.pure_callback(other, out, x, vmap_method="sequential")
    with pytest.raises(jax.errors.JaxRuntimeError, match="KeyError"):
        tj.best_of_n(particles, reward, 2)


def test_errors_that_nobody_collects_are_not_kept_forever():
    class Lost(Exception):
        pass

    first = Lost()
    kept = weakref.ref(first)
    _callbacks.outside(first)
    del first
    assert kept() is not None
    for _ in range(1000):
        _callbacks.outside(Lost())
    assert kept() is None


def test_threads_get_their_own_errors():
    particles = tj.Particles(jnp.zeros((4, 2)), jnp.zeros(4))

    def run(name):
        class Own(Exception):
            pass

        def broken(x):
            raise Own("the same text")

        reward, found = tj.external.from_numpy(broken), []
        for _ in range(20):
            try:
                tj.best_of_n(particles, reward, 2)
            except Exception as error:
                found.append(type(error) is Own)
        return found

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for found in pool.map(run, "ab"):
            assert found == [True] * 20
