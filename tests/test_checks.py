"""Bad input: calls, the exception that each raises, and what its message must say (what it got,
how to fix it). Good input passes, also where its values cannot be read.

Tier: exact.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import contracts

import tiltjax as tj
from tiltjax import _checks, _pytree, models, posteriors, rewards, scales
from tiltjax.particles import Particles, unweighted
from tiltjax.weighted import potentials

KEY = jax.random.key(0)
EYE = np.eye(2)
MIXTURE = contracts.planar()
MODEL = tj.Analytic(MIXTURE)
LINE = tj.Analytic(contracts.gaussian([0.0], [[1.0]]))
NETWORK = tj.from_denoiser(lambda t, x: 0.5 * x, shape=(2,))
REWARD = rewards.Quadratic(contracts.TARGET)
GUIDED = tj.dps(MODEL, REWARD, 1.0)
TARGET, WEIGHT = jnp.zeros(2), jnp.eye(2)
POINTS = unweighted(jnp.ones((6, 2)))
WEIGHED = Particles(jnp.ones((6, 2)), jnp.zeros(6), jnp.asarray(0.0))


def mixture(cov):
    return tj.GaussianMixture([1.0], [[0.0, 0.0]], [cov])


def run(*args, **options):
    grid = {} if "times" in options else {"steps": 2}
    return tj.sample(*args, **({"num": 3} | grid | options))


def captured():
    network = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    return tj.from_velocity(lambda t, x: network(x), shape=(2,))


def in_training():
    network = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    return run(KEY, tj.from_velocity(lambda module, t, x: module(x), network, shape=(2,)))


class Returns(tj.guidance.Guidance):
    """A guidance whose calls return anything."""

    model: tj.Model
    result: object = eqx.field(static=True)

    def __call__(self, key, t, x, state):
        return self.result(tj.guidance.Estimate(x), state)

    def log_tilt(self, x1):
        return jnp.zeros(())


def returns(result, wrap=lambda guidance: guidance):
    return lambda: run(KEY, MODEL, wrap(Returns(MODEL, result)))


def of_batches(t, x):
    return x * t[:, None]


class Swapped(eqx.Module):
    weight: jax.Array

    def __call__(self, x, timestep):
        return self.weight * x


TORCH = torch.nn.Linear(2, 1).eval()


WRONG_VALUES = {
    "covariance not symmetric": (
        lambda: mixture([[1, 0.5], [0, 1]]),
        r"covs\[0\].*symmetric.*0\.5",
    ),
    "covariance not psd": (lambda: mixture([[1, 2], [2, 1]]), r"covs\[0\].*semi-definite.*-1"),
    "shapes of a mixture": (
        lambda: mixture(np.eye(3)),
        r"shapes disagree.*\(1, 2, 2\).*\(1, 3, 3\)",
    ),
    "weight negative": (
        lambda: tj.GaussianMixture([1.5, -0.5], [[0.0], [1.0]], [[[1.0]], [[1.0]]]),
        r"weights must not be negative, got \[ 1\.5 -0\.5\]",
    ),
    "no weight": (
        lambda: tj.GaussianMixture([0.0], [[0.0]], [[[1.0]]]),
        r"weights must have positive mass, got \[0\.\]",
    ),
    "scale negative": (
        lambda: tj.Laplace(MODEL, REWARD, -2),
        r"scale must not be negative, got -2",
    ),
    "scale infinite": (lambda: tj.Damped(np.inf, 1.0), r"scale must be finite, got inf"),
    "scale of a vector": (
        lambda: tj.dps(MODEL, REWARD, [1.0, 2.0]),
        r"scale must be 0-dimens.*\(2,\)",
    ),
    "eta above one": (lambda: tj.Ancestral(1.5), r"eta must lie in \[0, 1\], got 1\.5"),
    "no draws": (lambda: tj.PlugIn(tj.Exact(MODEL), REWARD, k=0), r"k must be at least 1, got 0"),
    "n that does not divide": (lambda: tj.best_of_n(POINTS, REWARD, 4), r"n = 4.*the 6.*4 or 8"),
    "weighted particles": (lambda: tj.best_of_n(WEIGHED, REWARD, 2), r"unweighted.*resample\(key"),
    "times decreasing": (
        lambda: run(KEY, MODEL, times=[0.1, 0.5, 0.4]),
        r"increase strictly from noise",
    ),
    "times of diffusers": (
        lambda: run(KEY, MODEL, times=[999, 500, 0]),
        r"noise \(0\) to|\[0, 1\]",
    ),
    "times outside": (
        lambda: run(KEY, MODEL, times=[0.5, 1.5]),
        r"times must lie in \[0, 1\], got \[0\.5, 1\.5\]",
    ),
    "times and steps": (
        lambda: run(KEY, MODEL, times=[0.5, 1.0], steps=3),
        r"steps or times, not both, got steps = 3.*leave out steps",
    ),
    "one time": (lambda: run(KEY, MODEL, times=[0.5]), r"start and an end, got 1"),
    "guided from zero": (
        lambda: run(KEY, MODEL, GUIDED, times=[0.0, 1.0]),
        r"start at t > 0.*1e-3",
    ),
    "many keys": (lambda: run(jax.random.split(KEY, 3), MODEL), r"one key, got an array.*\(3,\)"),
    "reward of a vector": (
        lambda: run(KEY, MODEL, tj.dps(MODEL, lambda x: x)),
        r"one scalar.*\(2,\)",
    ),
    "reward not conjugate": (
        lambda: tj.Tilted(MODEL, rewards.Bump([0.0, 0.0])),
        r"Bump is not conjugate",
    ),
    "reward of another shape": (
        lambda: tj.Tilted(MODEL, rewards.LinearReward([1.0])),
        r"\(1,\).*\(2,\)",
    ),
    "guidance of another model": (
        lambda: run(KEY, MODEL, tj.dps(LINE, rewards.Quadratic([0.0]))),
        r"built on another model.*same model object",
    ),
    "network of another shape": (
        lambda: run(KEY, tj.from_velocity(lambda t, x: x[:1], shape=(2,))),
        r"expected \(2,\).*got \(1,\).*batched=True",
    ),
    "batched forgotten": (
        lambda: run(KEY, tj.from_velocity(of_batches, shape=(2,))),
        r"one state of shape \(2,\) \(IndexError.*accepts a batch: pass batched=True",
    ),
    "batched for nothing": (
        lambda: run(
            KEY, tj.from_velocity(lambda t, x: jnp.append(x[1:], t), shape=(2,), batched=True)
        ),
        r"a batch of states \(.*accepts one state: leave out batched=True",
    ),
    "module in training mode": (in_training, r"training mode.*\.eval\(\)"),
    "dtype of integers": (
        lambda: tj.from_velocity(lambda t, x: x, shape=(2,), dtype=int),
        r"floating dtype of at least 32 bits, got int",
    ),
    "deterministic solver": (
        lambda: tj.smc(KEY, MODEL, GUIDED, num=3, steps=2, solver=tj.Heun()),
        r"deterministic|Ancestral",
    ),
    "network without a variance": (
        lambda: tj.Conjugate(NETWORK, lambda x: x[0], 1.0),
        r"variance.*calibrate\(key, model\).*Probe\(\)",
    ),
}
WRONG_TYPES = {
    "parameters x, t": (
        lambda: tj.from_velocity(lambda x, t: x, shape=(2,)),
        r"called as fn\(t, x\), but its parameters are named \(x, t\): swap them",
    ),
    "parameters w, x, t": (
        lambda: tj.from_noise(lambda w, x_t, time: x_t, jnp.ones(2), shape=(2,)),
        r"fn\(params, t, x\), but its parameters are named \(w, x_t, time\): swap them",
    ),
    "module of x, t": (
        lambda: tj.from_velocity(Swapped(jnp.ones(2)), shape=(2,)),
        r"named \(x, timestep\): swap",
    ),
    "swapped arguments": (
        lambda: run(KEY, tj.from_velocity(lambda y, s: jnp.append(y[1:], s), shape=(2,))),
        r"called as network\(t, x\) and fails \(IndexError.*accepts \(x, t\): swap",
    ),
    "swapped arguments of another shape": (
        lambda: run(KEY, tj.from_velocity(lambda y, s: 0.5 * y, shape=(2,))),
        r"fails \(it returns shape \(\)\), but accepts \(x, t\)",
    ),
    "PyTorch network": (
        lambda: tj.from_velocity(TORCH, shape=(2,)),
        r"cannot trace a PyTorch module, got Linear.*from_torch\(module.*batched=True",
    ),
    "PyTorch in a network": (
        lambda: run(KEY, tj.from_velocity(lambda t, x: TORCH(x), shape=(2,))),
        r"JAX cannot trace the network.*jax\.numpy",
    ),
    "NumPy network": (
        lambda: run(KEY, tj.from_velocity(lambda t, x: np.tanh(x), shape=(2,))),
        r"JAX cannot trace the network \(TracerArray.*jax\.numpy",
    ),
    "PyTorch reward": (lambda: tj.dps(MODEL, TORCH), r"reward.*PyTorch module.*from_torch\(module"),
    "method of a PyTorch reward": (lambda: tj.dps(MODEL, TORCH.forward), r"from_torch\(module"),
    "PyTorch in a reward": (
        lambda: run(KEY, MODEL, tj.dps(MODEL, lambda x: TORCH(x).sum())),
        r"JAX cannot trace the reward.*from_numpy\(fn\) for NumPy.*from_torch\(fn\) for PyTorch",
    ),
    "NumPy reward": (
        lambda: tj.best_of_n(POINTS, lambda x: np.linalg.norm(x), 2),
        r"JAX cannot trace the reward \(TracerArray.*from_numpy\(fn\)",
    ),
    "reward of Python numbers": (
        lambda: run(KEY, MODEL, tj.dps(MODEL, lambda x: float(x[0]))),
        r"JAX cannot trace the reward \(Concretization.*without float",
    ),
    "reward with a branch": (
        lambda: run(KEY, MODEL, tj.dps(MODEL, lambda x: x[0] if x[0] > 0 else -x[0])),
        r"JAX cannot trace the reward \(TracerBool.*and if of its values",
    ),
    "guidance of an array": (
        returns(lambda estimate, state: estimate.tilted),
        r"Returns must return \(Estimate, state\).*got Array",
    ),
    "guidance without a state": (returns(lambda estimate, state: estimate), "got Estimate"),
    "guidance of nothing": (returns(lambda estimate, state: None), "got NoneType: return Estim"),
    "guidance of arrays": (
        returns(lambda estimate, state: (estimate.tilted, state)),
        "got a pair of Array and tuple",
    ),
    "guidance of a triple": (
        returns(lambda estimate, state: (estimate, state, 0)),
        "got a tuple of 3",
    ),
    "guidance in a wrapper": (
        returns(
            lambda estimate, state: estimate,
            lambda guidance: tj.guidance.Clipped(guidance, 1.0),
        ),
        r"Returns must return \(Estimate, state\)",
    ),
    "draws fractional": (
        lambda: tj.PlugIn(tj.Exact(MODEL), REWARD, k=1.5),
        r"k must be a whole.*1\.5",
    ),
    "number as text": (lambda: run(KEY, MODEL, num="3"), r"num must be a whole number, got '3'"),
    "module in a closure": (captured, r"Flax module 'network'.*from_velocity"),
    "old-style key": (lambda: run(np.zeros(2, np.uint32), MODEL), r"old-style.*jax\.random\.key"),
    "a seed for a key": (
        lambda: run(0, MODEL),
        r"typed PRNG key, got int.*jax\.random\.key\(seed\)",
    ),
    "no key": (lambda: tj.sample(MODEL, GUIDED, num=3), r"typed PRNG key, got Analytic.*first arg"),
    "mixture for a model": (lambda: run(KEY, MIXTURE), r"got GaussianMixture.*Analytic"),
    "function for a model": (lambda: run(KEY, lambda t, x: x), r"got function.*from_velocity"),
    "reward for a guidance": (
        lambda: run(KEY, MODEL, REWARD),
        r"a Guidance, got Quadratic.*PlugIn",
    ),
    "model for a posterior": (
        lambda: tj.PlugIn(MODEL, REWARD),
        r"a Posterior, got Analytic.*Glass",
    ),
    "network for exact": (lambda: tj.Exact(NETWORK), r"an Analytic, got Network.*Glass"),
    "text for a solver": (lambda: run(KEY, MODEL, solver="heun"), r"Solver, got str"),
    "class for a solver": (lambda: run(KEY, MODEL, solver=tj.Heun), r"Solver, got.*class"),
    "array of points": (lambda: tj.best_of_n(POINTS.x, REWARD, 2), r"must be Particles.*Array"),
    "reward not callable": (lambda: tj.dps(MODEL, 3.0), r"expected a callable, got float"),
    "weights as text": (
        lambda: tj.GaussianMixture("half", [[0.0]], [EYE]),
        r"weights.*numbers.*str",
    ),
    "complex weights": (
        lambda: tj.GaussianMixture(np.asarray([1j]), [[0.0]], [[[1.0]]]),
        r"weights must be real numbers, got dtype complex",
    ),
    "complex weight": (
        lambda: tj.GaussianMixture(jnp.asarray([1j]), [[0.0]], [[[1.0]]]),
        r"weights must be real numbers, got dtype complex",
    ),
    "traced fraction": (
        lambda: jax.jit(potentials.ResampleFractions)(0.5),
        r"a concrete number, got a traced one: pass it from outside of jit",
    ),
    "number for a file": (lambda: POINTS.save(1), r"name of a file, got int: pass a string or"),
    "number for a shape": (
        lambda: tj.from_velocity(lambda t, x: x, shape=2),
        r"shape must be a tuple such as \(2,\).*got 2",
    ),
    "particles for a start": (
        lambda: run(KEY, MODEL, start=POINTS, times=[0.5, 1.0]),
        r"an array of states, got Particles: pass particles\.x",
    ),
    "flag as a number": (lambda: run(KEY, MODEL, save_trajectory=1), r"True or False, got 1"),
}
NOT_FINITE = {
    "reward NaN": (
        lambda: run(KEY, MODEL, tj.dps(MODEL, lambda x: np.nan * x[0])),
        r"step 0.*log_h is NaN.*reward",
    ),
    "reward NaN, selected": (
        lambda: tj.best_of_n(POINTS, lambda x: np.nan * x[0], 2),
        r"reward is NaN for 6 of 6",
    ),
}


def cases(table):
    return pytest.mark.parametrize(("call", "message"), table.values(), ids=table.keys())


@cases(WRONG_VALUES)
def test_a_wrong_value_says_what_was_got_and_how_to_fix_it(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


@cases(WRONG_TYPES)
def test_a_wrong_type_says_what_was_got_and_how_to_fix_it(call, message):
    with pytest.raises(TypeError, match=f"(?s){message}") as error:
        call()
    assert not isinstance(error.value, jax.errors.JAXTypeError)


@cases(NOT_FINITE)
def test_a_value_that_is_not_finite_names_its_source(call, message):
    with pytest.raises(FloatingPointError, match=f"(?s){message}"):
        call()


# What is right passes, also where nothing can be read.


def test_values_under_a_transformation_pass_unread_and_structure_is_still_checked():
    value = jax.jit(lambda scale: scales.Damped(scale, scale).final)(jnp.asarray(-1.0))
    assert float(value) == -1.0
    with pytest.raises(ValueError, match="0-dimensional"):
        jax.jit(lambda scale: scales.Damped(scale, 1.0).final)(jnp.ones(2))


CONCRETE = {
    "scale": lambda value: tj.Damped(value, 0.7).final,
    "base scale": lambda value: tj.Linear(value).base_scale,
    "eta": lambda value: tj.Ancestral(value).eta,
    "width": lambda value: rewards.Bump([0.0], value).width,
    "mixture": lambda value: tj.GaussianMixture(MIXTURE.weights, MIXTURE.means, MIXTURE.covs).means,
    "quadratic": lambda value: rewards.Quadratic(TARGET, WEIGHT).weight,
    "tilted": lambda value: tj.Tilted(MODEL, REWARD, value).natural,
}


@pytest.mark.parametrize("name", CONCRETE)
def test_concrete_arrays_may_be_used_inside_somebody_elses_jit(name):
    """An array closed over by a jitted function is concrete, and what is computed from it there is
    not.
    """
    value = jnp.asarray(0.5)
    inside = jax.jit(lambda zero: jnp.sum(CONCRETE[name](value)) + zero)(jnp.zeros(()))
    np.testing.assert_allclose(inside, np.sum(CONCRETE[name](value)), rtol=1e-10)


def test_times_closed_over_by_a_jitted_function():
    times = jnp.asarray([0.1, 0.5, 1.0])
    run = lambda key: tj.sample(key, MODEL, GUIDED, num=2, times=times).x
    np.testing.assert_allclose(jax.jit(run)(KEY), run(KEY), rtol=1e-9)


@pytest.mark.parametrize(
    "value", [3, 3.0, np.float32(3), np.asarray(3), jnp.asarray(3), jnp.asarray(3.0)], ids=repr
)
def test_numbers_of_every_kind_become_floating_leaves(value):
    law = tj.scales.Constant(value)
    assert jnp.issubdtype(law.final.dtype, jnp.floating)
    assert float(law.final) == 3.0


def test_numbers_of_every_kind_are_one_program():
    """An int, a float and an array trace the same: no weak types are left to tell them apart."""
    traces = []

    @jax.jit
    def use(law):
        traces.append(1)
        return law.final

    for value in (3, 3.0, np.asarray(2.0), jnp.asarray(2.0), True):
        use(tj.scales.Constant(value))
    assert len(traces) == 1


def test_counts_accept_numpy_integers():
    assert _checks.count(np.int64(3), "n") == 3
    assert type(_checks.count(np.int32(3), "n")) is int


@pytest.mark.parametrize("value", [np.float32(0.5), np.asarray(0.5), jnp.asarray(0.5)], ids=repr)
def test_arrays_of_one_number_are_numbers(value):
    number = _checks.number(value, "x", 0, 1)
    assert type(number) is float
    assert number == 0.5


def test_random_streams_are_compared_by_their_state():
    stream = lambda seed: {"rngs": jax.random.key(seed), "w": jnp.ones(2)}
    assert _pytree.same(stream(0), stream(0))
    assert not _pytree.same(stream(0), stream(1))


BIG = np.arange(8.0).reshape(4, 2) + 1
ENTRANCES = {
    "target": lambda x: rewards.Quadratic(x[0], np.eye(2).astype(x.dtype))(_checks.native(x[1])),
    "mixture": lambda x: tj.GaussianMixture(x[0], x[:2], np.stack([EYE] * 2).astype(x.dtype)).means,
    "start": lambda x: run(KEY, MODEL, num=4, times=[0.5, 1.0], start=x).x,
    "weights": lambda x: tj.resampling.systematic(KEY, x[:, 0]),
    "metric": lambda x: tj.metrics.sliced_wasserstein(KEY, x, x + 1),
    "distance": lambda x: tj.metrics.wasserstein(x, x + 1, weights_x=x[:, 0]),
    "integers": lambda x: tj.metrics.bootstrap(KEY, jnp.sum, x.astype(x.dtype.str[0] + "i4"))[1],
    "prompt": lambda x: (
        tj.tokens.MarkovChain(
            x[0], x[:2], 2, prompt=(x[0] - 1).astype(x.dtype.str[0] + "i4")
        ).prompt
    ),
    "parameters": lambda x: jax.jit(lambda net, *args: net(*args))(
        models.Net(lambda w, t, x: w[0] * x, x), *map(_checks.native, (x[0, 0], x[1]))
    ),
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_numbers_in_the_other_byte_order_are_the_same_numbers(name):
    for dtype in ("f8", "f4"):
        found, expected = (ENTRANCES[name](BIG.astype(order + dtype)) for order in "><")
        np.testing.assert_array_equal(found, expected)


def test_numbers_of_a_dtype_that_jax_lacks_are_refused():
    for wrong, name in ((np.ones(2, np.longdouble), "float128"), (np.array(["a"]), "<U1")):
        if wrong.dtype.itemsize > 8 or wrong.dtype.kind == "U":
            with pytest.raises(TypeError, match=rf"target .* of dtype {name}, .*astype\(float\)"):
                rewards.Quadratic(wrong)


def test_cast_leaves_networks_alone():
    tree = (jnp.ones(2), jnp.arange(2), _pytree.Function(lambda: 0), posteriors.Tweedie(MODEL))
    single = _pytree.cast(tree, jnp.float32)
    assert single[0].dtype == jnp.float32
    assert single[1].dtype == tree[1].dtype
    assert single[3].model.dtype == jnp.float32


def test_functions_are_told_apart_by_identity_and_by_their_arrays():
    f, g = (lambda x: x), (lambda x: x)
    structure = lambda fn: jax.tree.structure(_pytree.Function(fn))
    assert structure(f) == structure(f)
    assert structure(f) != structure(g)


def test_an_unhashable_callable_says_what_to_do():
    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return x[0]

    with pytest.raises(TypeError, match=r"hashable.*Unhashable.*equinox"):
        rewards.as_reward(Unhashable())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_done_to_an_array_afterwards_is_not_seen(dtype):
    memory = np.zeros(64 + 16, np.uint8)
    start = -memory.ctypes.data % 64  # as aligned as a device wants it
    mine = memory[start : start + 2 * np.dtype(dtype).itemsize].view(dtype)
    kept = _checks.floating(mine, "x")
    mine += 1
    np.testing.assert_array_equal(kept, 0)


def test_numbers_that_no_integer_of_the_device_holds_are_floats():
    with jax.enable_x64(False):
        assert float(_checks.floating(10**10, "x")) == 1e10
        np.testing.assert_array_equal(
            _checks.floating([2**63, 1], "x"), np.asarray([2.0**63, 1], np.float32)
        )
    with pytest.raises(TypeError, match="must be numbers, got MaskedArray"):
        _checks.floating(np.ma.array([1.0, 2.0], mask=[True, False]), "x")
    assert _checks.floating([jnp.float32(1), 2.0], "x").dtype == jnp.float32
