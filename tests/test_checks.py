"""Bad input: one table of calls, the exception each raises, and what its message must say (what was
got, how to fix it).

Tier: exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contracts

import tiltjax as tj
from tiltjax import _checks, _pytree, posteriors, problems, rewards, scales
from tiltjax.particles import Particles, unweighted

KEY = jax.random.key(0)
EYE = np.eye(2)
MIXTURE = contracts.planar()
MODEL = tj.Analytic(MIXTURE)
NETWORK = tj.from_denoiser(lambda t, x: 0.5 * x, shape=(2,))
REWARD = rewards.Quadratic(contracts.TARGET)
GUIDED = tj.dps(MODEL, REWARD, 1.0)
TARGET, WEIGHT = jnp.zeros(2), jnp.eye(2)
POINTS = unweighted(jnp.ones((6, 2)))
WEIGHED = Particles(jnp.ones((6, 2)), jnp.zeros(6), jnp.asarray(0.0))
NAN, INF = float("nan"), float("inf")


class Vector(rewards.Reward):
    """A user's subclass that forgot to reduce."""

    def __call__(self, x):
        return x


LINE = tj.Analytic(contracts.gaussian([0.0], [[1.0]]))


def mixture(weights=(1.0,), means=((0.0, 0.0),), covs=(EYE,)):
    return lambda: tj.GaussianMixture(np.asarray(weights), np.asarray(means), np.asarray(covs))


def run(*args, **options):
    grid = {} if "times" in options else {"steps": 2}
    return lambda: tj.sample(*args, **({"num": 3} | grid | options))


def guided(reward):
    return run(KEY, MODEL, tj.dps(MODEL, reward, 1.0))


TABLE = {
    # mixtures
    "cov not symmetric": (
        mixture(covs=[[[1.0, 0.5], [0.0, 1.0]]]),
        ValueError,
        r"covs\[0\].*symmetric.*0\.5.*\(S \+ S\.T\)",
    ),
    "cov not psd": (
        mixture(covs=[[[1.0, 2.0], [2.0, 1.0]]]),
        ValueError,
        r"covs\[0\].*semi-definite.*eigenvalue -1",
    ),
    "cov nan": (mixture(covs=[[[NAN, 0.0], [0.0, 1.0]]]), ValueError, r"covs must be finite.*nan"),
    "weight negative": (
        mixture([-0.5, 1.5], np.zeros((2, 2)), [EYE, EYE]),
        ValueError,
        r"negative.*-0\.5",
    ),
    "weights without mass": (mixture([0.0]), ValueError, r"positive mass.*0"),
    "weights missing one": (
        mixture([1.0], np.zeros((2, 2)), [EYE, EYE]),
        ValueError,
        r"shapes disagree.*\(2,\).*got \(1,\)",
    ),
    "covs of another dimension": (
        mixture(covs=[np.eye(3)]),
        ValueError,
        r"shapes disagree.*\(1, 2, 2\).*\(1, 3, 3\)",
    ),
    "one mean as a vector": (
        mixture(means=[0.0, 0.0]),
        ValueError,
        r"means must be 2-dimensional.*\(2,\)",
    ),
    "one cov as a matrix": (mixture(covs=EYE), ValueError, r"covs must be 3-dimensional.*\(2, 2\)"),
    "weights as text": (
        lambda: tj.GaussianMixture("half", [[0.0]], [[[1.0]]]),
        TypeError,
        r"weights must be numbers.*str",
    ),
    "complex means": (mixture(means=[[1j, 0.0]]), TypeError, r"means must be real.*complex"),
    "ragged means": (
        lambda: tj.GaussianMixture([1, 1], [[0.0], [0.0, 1.0]], [EYE]),
        TypeError,
        r"means must be numbers",
    ),
    # rewards
    "reward returns a vector": (guided(lambda x: x), ValueError, r"one scalar.*\(2,\).*Reduce it"),
    "reward of one entry": (guided(lambda x: x[:1]), ValueError, r"one scalar.*\(1,\)"),
    "reward class returns a vector": (guided(Vector()), ValueError, r"one scalar.*\(2,\)"),
    "reward NaN": (
        guided(lambda x: NAN * x[0]),
        FloatingPointError,
        r"step 0.*log_h is NaN.*reward",
    ),
    "reward not callable": (
        lambda: tj.dps(MODEL, 3.0),
        TypeError,
        r"expected a callable, got float",
    ),
    "reward of another shape": (
        guided(rewards.Quadratic([0.0, 0.0, 0.0])),
        ValueError,
        r"\(2,\).*\(3,\)",
    ),
    "step of another shape": (
        guided(rewards.StepReward(1.0)),
        ValueError,
        r"\(2,\).*normal.*\(1,\)",
    ),
    "double well off the plane": (
        lambda: rewards.DoubleWell()(jnp.zeros(3)),
        ValueError,
        r"\(2,\), got \(3,\)",
    ),
    "weight not symmetric": (
        lambda: rewards.Quadratic([0.0, 0.0], [[1.0, 1.0], [0.0, 1.0]]),
        ValueError,
        r"symmetric.*\(H \+ H\.T\)",
    ),
    "weight of another shape": (
        lambda: rewards.Quadratic([0.0, 0.0], [1.0, 1.0, 1.0]),
        ValueError,
        r"\(2,\).*got \(3,\)",
    ),
    "width zero": (lambda: rewards.Bump([0.0], 0.0), ValueError, r"width must be positive, got 0"),
    "target nan": (
        lambda: rewards.Quadratic([NAN, 0.0]),
        ValueError,
        r"target must be finite.*nan",
    ),
    "factor as text": (lambda: "two" * REWARD, TypeError, r"factor must be numbers.*str"),
    "sum with a number": (lambda: REWARD + 1.0, TypeError, r"callable, got float"),
    # scales
    "scale negative": (
        lambda: tj.dps(MODEL, REWARD, -1.0),
        ValueError,
        r"scale must not be negative, got -1",
    ),
    "scale nan": (lambda: tj.dps(MODEL, REWARD, NAN), ValueError, r"scale must be finite, got nan"),
    "scale inf": (
        lambda: tj.Laplace(MODEL, REWARD, INF),
        ValueError,
        r"scale must be finite, got inf",
    ),
    "scale negative, laplace": (
        lambda: tj.Laplace(MODEL, REWARD, -2),
        ValueError,
        r"scale must not be negative, got -2",
    ),
    "scale negative, tilted": (
        lambda: tj.Tilted(MODEL, REWARD, -2.0),
        ValueError,
        r"scale must not be negative, got -2",
    ),
    "scale negative, softmax": (
        lambda: tj.softmax_of_n(KEY, POINTS, REWARD, 2, -1.0),
        ValueError,
        r"scale.*negative",
    ),
    "scale of a vector": (
        lambda: tj.dps(MODEL, REWARD, [1.0, 2.0]),
        ValueError,
        r"scale must be 0-dimensional.*\(2,\)",
    ),
    "sigma negative": (
        lambda: tj.Damped(1.0, -0.5),
        ValueError,
        r"sigma must not be negative, got -0\.5",
    ),
    "base scale zero": (lambda: tj.Linear(0.0), ValueError, r"base_scale must be positive, got 0"),
    "limit zero": (
        lambda: tj.guidance.wrappers.Clipped(GUIDED, 0.0),
        ValueError,
        r"limit must be positive",
    ),
    "eta above one": (lambda: tj.Ancestral(1.5), ValueError, r"eta must lie in \[0, 1\], got 1\.5"),
    "eta negative": (
        lambda: tj.Ancestral(-0.1),
        ValueError,
        r"eta must not be negative, got -0\.1",
    ),
    # counts
    "k zero": (
        lambda: tj.PlugIn(tj.Exact(MODEL), REWARD, k=0),
        ValueError,
        r"k must be at least 1, got 0",
    ),
    "k fractional": (
        lambda: tj.PlugIn(tj.Exact(MODEL), REWARD, k=1.5),
        TypeError,
        r"k must be a whole number, got 1\.5",
    ),
    "k true": (
        lambda: tj.PlugIn(tj.Exact(MODEL), REWARD, k=True),
        TypeError,
        r"k must be a whole number, got True",
    ),
    "inner steps zero": (
        lambda: tj.Glass(MODEL, 0),
        ValueError,
        r"steps must be at least 1, got 0",
    ),
    "flow steps zero": (
        lambda: tj.FlowMap(MODEL, 0),
        ValueError,
        r"steps must be at least 1, got 0",
    ),
    "steps zero": (run(KEY, MODEL, steps=0), ValueError, r"steps must be at least 1, got 0"),
    "steps fractional": (
        run(KEY, MODEL, steps=2.0),
        TypeError,
        r"steps must be a whole number, got 2\.0",
    ),
    "num zero": (run(KEY, MODEL, num=0), ValueError, r"num must be at least 1, got 0"),
    "num fractional": (
        run(KEY, MODEL, num=1e3),
        TypeError,
        r"num must be a whole number, got 1000\.0",
    ),
    "batch zero": (run(KEY, MODEL, batch=0), ValueError, r"batch must be at least 1, got 0"),
    "n zero": (lambda: tj.best_of_n(POINTS, REWARD, 0), ValueError, r"n must be at least 1, got 0"),
    "n that does not divide": (
        lambda: tj.best_of_n(POINTS, REWARD, 4),
        ValueError,
        r"n = 4 must divide the 6.*4 or 8",
    ),
    "n above the number": (
        lambda: tj.best_of_n(POINTS, REWARD, 7),
        ValueError,
        r"n = 7 must divide the 6 particles: sample 7 of them$",
    ),
    "draws of a mixture zero": (
        lambda: MIXTURE.sample(KEY, 0),
        ValueError,
        r"num must be at least 1, got 0",
    ),
    "resample to zero": (
        lambda: POINTS.resample(KEY, 0),
        ValueError,
        r"num must be at least 1, got 0",
    ),
    # times
    "times decreasing": (
        run(KEY, MODEL, times=[0.1, 0.5, 0.4]),
        ValueError,
        r"increase strictly from noise \(0\) to data",
    ),
    "times repeated": (run(KEY, MODEL, times=[0.1, 0.5, 0.5]), ValueError, r"increase strictly"),
    "times beyond one": (
        run(KEY, MODEL, times=[0.1, 1.5]),
        ValueError,
        r"lie in \[0, 1\], got \[0\.1, 1\.5\]",
    ),
    "times negative": (
        run(KEY, MODEL, times=[-0.1, 1.0]),
        ValueError,
        r"lie in \[0, 1\], got \[-0\.1, 1\]",
    ),
    "times of diffusers": (
        run(KEY, MODEL, times=[999, 500, 0]),
        ValueError,
        r"noise \(0\) to data \(1\)|lie in \[0, 1\]",
    ),
    "one time": (run(KEY, MODEL, times=[0.5]), ValueError, r"start and an end, got 1"),
    "times as a number": (run(KEY, MODEL, times=0.5), ValueError, r"times must be 1-dimensional"),
    "guided from zero": (
        run(KEY, MODEL, GUIDED, times=[0.0, 1.0]),
        ValueError,
        r"must start at t > 0.*1e-3",
    ),
    # keys
    "old-style key": (
        run(np.zeros(2, np.uint32), MODEL),
        TypeError,
        r"old-style uint32 key.*jax\.random\.key",
    ),
    "a seed for a key": (
        run(0, MODEL),
        TypeError,
        r"typed PRNG key, got int.*jax\.random\.key\(seed\)",
    ),
    "no key": (
        lambda: tj.sample(MODEL, GUIDED, num=3),
        TypeError,
        r"typed PRNG key, got Analytic.*first argument",
    ),
    "no key, unguided": (lambda: tj.sample(MODEL, num=3), TypeError, r"model|typed PRNG key"),
    "many keys": (
        run(jax.random.split(KEY, 3), MODEL),
        ValueError,
        r"one key, got an array of keys of shape \(3,\)",
    ),
    "no key, softmax": (
        lambda: tj.softmax_of_n(POINTS, REWARD, 2, 1.0, 1.0),
        TypeError,
        r"typed PRNG key, got Particles",
    ),
    "no key, mixture": (lambda: MIXTURE.sample(3, 5), TypeError, r"typed PRNG key, got int"),
    # selection
    "weighted particles": (
        lambda: tj.best_of_n(WEIGHED, REWARD, 2),
        ValueError,
        r"unweighted.*resample\(key, num\)",
    ),
    "weighted, softmax": (
        lambda: tj.softmax_of_n(KEY, WEIGHED, REWARD, 2, 1.0),
        ValueError,
        r"unweighted.*resample",
    ),
    "an array of points": (
        lambda: tj.best_of_n(POINTS.x, REWARD, 2),
        TypeError,
        r"expected Particles.*got .*Array",
    ),
    "reward NaN, selected": (
        lambda: tj.best_of_n(POINTS, lambda x: NAN * x[0], 2),
        FloatingPointError,
        r"reward is NaN for 6 of 6",
    ),
    # tilts
    "tilted bump": (
        lambda: tj.Tilted(MODEL, rewards.Bump([0.0, 0.0])),
        ValueError,
        r"Bump is not conjugate.*Conjugate",
    ),
    "tilted matrix": (
        lambda: tj.Tilted(MODEL, rewards.Quadratic([0.0, 0.0], EYE)),
        ValueError,
        r"\(2, 2\) is not conjugate",
    ),
    "tilted function": (
        lambda: tj.Tilted(MODEL, lambda x: x[0]),
        ValueError,
        r"not conjugate.*Linear, Quadratic",
    ),
    "tilted by another shape": (
        lambda: tj.Tilted(MODEL, rewards.LinearReward([1.0])),
        ValueError,
        r"\(1,\).*\(2,\)",
    ),
    # wrong types
    "mixture for a model": (
        run(KEY, MIXTURE),
        TypeError,
        r"model must be a Model, got GaussianMixture.*Analytic",
    ),
    "function for a model": (
        run(KEY, lambda t, x: x),
        TypeError,
        r"model must be a Model, got function.*from_velocity",
    ),
    "reward for a guidance": (
        run(KEY, MODEL, REWARD),
        TypeError,
        r"guidance must be a Guidance, got Quadratic.*PlugIn",
    ),
    "posterior for a guidance": (
        run(KEY, MODEL, tj.Exact(MODEL)),
        TypeError,
        r"guidance must be a Guidance, got Exact",
    ),
    "model for a posterior": (
        lambda: tj.PlugIn(MODEL, REWARD),
        TypeError,
        r"posterior must be a Posterior, got Analytic.*Glass",
    ),
    "network for exact": (
        lambda: tj.Exact(NETWORK),
        TypeError,
        r"model must be an Analytic, got Network.*Glass",
    ),
    "array for a mixture": (
        lambda: tj.Analytic(EYE),
        TypeError,
        r"mixture must be a GaussianMixture, got ndarray",
    ),
    "mixture for glass": (lambda: tj.Glass(MIXTURE), TypeError, r"Model, got GaussianMixture"),
    "mixture for flow map": (lambda: tj.FlowMap(MIXTURE), TypeError, r"Model, got GaussianMixture"),
    "mixture for tweedie": (lambda: tj.Tweedie(MIXTURE), TypeError, r"Model, got GaussianMixture"),
    "mixture for tilted": (
        lambda: tj.Tilted(MIXTURE, REWARD),
        TypeError,
        r"Model, got GaussianMixture",
    ),
    "mixture for laplace": (
        lambda: tj.Laplace(MIXTURE, REWARD),
        TypeError,
        r"Model, got GaussianMixture",
    ),
    "mixture for dps": (lambda: tj.dps(MIXTURE, REWARD), TypeError, r"Model, got GaussianMixture"),
    "mixture for fmrg": (
        lambda: tj.fmrg(MIXTURE, REWARD),
        TypeError,
        r"Model, got GaussianMixture",
    ),
    "mixture for doob": (
        lambda: tj.Doob(MIXTURE, lambda t, x: x[0]),
        TypeError,
        r"Model, got GaussianMixture",
    ),
    "reward for clipped": (
        lambda: tj.guidance.wrappers.Clipped(REWARD, 1.0),
        TypeError,
        r"Guidance, got Quadratic",
    ),
    "text for a solver": (run(KEY, MODEL, solver="heun"), TypeError, r"Solver, got str"),
    "guidance of another shape": (
        run(KEY, MODEL, tj.dps(LINE, rewards.Quadratic([0.0]))),
        ValueError,
        r"built on another model.*same model object",
    ),
    "state of another shape": (
        lambda: LINE.denoise(0.5, jnp.zeros(2)),
        ValueError,
        r"\(1,\).*\(2,\)|\(2,\).*\(1,\)",
    ),
    "class for a solver": (run(KEY, MODEL, solver=tj.Heun), TypeError, r"Solver, got"),
    "text for an interpolant": (
        lambda: tj.Analytic(MIXTURE, "linear"),
        TypeError,
        r"Interpolant, got str",
    ),
    "class for an interpolant": (
        lambda: tj.Analytic(MIXTURE, tj.Linear),
        TypeError,
        r"Interpolant, got",
    ),
    # networks
    "network of another shape": (
        run(KEY, tj.from_velocity(lambda t, x: x[:1], shape=(2,))),
        ValueError,
        r"expected \(2,\).*got \(1,\).*batched=True",
    ),
    "network not callable": (
        lambda: tj.from_velocity(3.0, shape=(2,)),
        TypeError,
        r"expected a callable, got float",
    ),
    "shape as a number": (lambda: tj.from_velocity(lambda t, x: x, shape=2), TypeError, r"shape"),
    "shape with a zero": (
        lambda: tj.from_velocity(lambda t, x: x, shape=(0,)),
        ValueError,
        r"shape must be at least 1",
    ),
    "dtype of integers": (
        lambda: tj.from_velocity(lambda t, x: x, shape=(2,), dtype=int),
        ValueError,
        r"floating dtype of at least 32 bits, got int",
    ),
    # the rest
    "unknown problem": (
        lambda: problems.get("banana"),
        ValueError,
        r"unknown problem 'banana'.*gaussian, quadratic",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_says_what_was_got_and_how_to_fix_it(name):
    call, exception, message = TABLE[name]
    with pytest.raises(exception, match=f"(?s){message}") as error:
        call()
    assert not isinstance(error.value, jax.errors.JAXTypeError), "a JAX error is not one of ours"


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
