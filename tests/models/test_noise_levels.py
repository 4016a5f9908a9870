"""Networks of a noise level, on `VE`: every parameterization is the closed form, and every method
is right with its default settings.

Tiers: exact; statistical (five standard errors).
"""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import contracts

import theory
import tiltjax as tj
from theory import finite_steps

KEY = jax.random.key(0)
EDM, FOLD = tj.VE(), tj.VE(4e-4 * 16, 160 * 16, sigma_data=16)
LINE = tj.GaussianMixture([0.3, 0.7], [[-0.6, 0.1], [0.4, -0.2]], [0.02 * jnp.eye(2)] * 2)
MODEL = tj.Analytic(LINE, EDM)
REWARD = tj.rewards.Quadratic([0.2, 0.3])
SCALE = 2.0
TILT = theory.tilt(LINE, REWARD, SCALE).mixture
TIMES = [0.0, 1e-3, 0.3, 0.6, 0.77]
# The variance of data is too large by this fraction after 40 steps of Heun's method, at most:
# `finite_steps.discrete_law` for widths from 0.1 to 2 (test_the_law_of_a_run_is_predicted).
WIDENED = 0.035


def raw(model):
    """The raw network F of EDM for a closed-form denoiser, as a function (c_noise, c_in x)."""
    width = float(model.interpolant.sigma_data)

    def network(c_noise, scaled):
        s = jnp.exp(4 * c_noise)
        total = jnp.sqrt(s**2 + width**2)
        x = scaled * total
        denoised = model.mixture.denoise(jnp.ones_like(s), s, x)
        return (denoised - (width / total) ** 2 * x) * total / (s * width)

    return network


def parameterizations(model):
    """The same denoiser from every kind of network."""
    path = model.interpolant
    of = {"shape": model.shape, "interpolant": path, "dtype": jnp.float64}
    by_level = lambda s, x: model.mixture.denoise(jnp.ones_like(s), s, x)
    return {
        "denoiser": tj.from_denoiser(lambda t, x: by_level(path.sigma(t), x), **of),
        "noise": tj.from_noise(model.noise, **of),
        "score": tj.from_score(model.score, **of),
        "velocity": tj.from_velocity(model.velocity, **of),
        "edm": tj.from_edm(raw(model), **of),
    }


# Parameterizations.


@pytest.mark.parametrize("path", [EDM, FOLD], ids=["edm", "alphafold"])
def test_every_parameterization_is_the_same_denoiser(path):
    scale = float(path.sigma_data) / 0.5
    mixture = tj.GaussianMixture(LINE.weights, scale * LINE.means, scale**2 * LINE.covs)
    model = tj.Analytic(mixture, path)
    models = parameterizations(model)
    x = scale * jnp.asarray([0.2, -0.1])
    everything = lambda t, x: {name: one.denoise(t, x) for name, one in models.items()}
    everything = jax.jit(everything)
    for t in map(jnp.asarray, TIMES):
        # A state of the size of X_t; the noise is subtracted from it, which loses its last digits.
        noisy = x + path.sigma(t) * jnp.asarray([0.7, -1.1])
        expected = model.denoise(t, noisy)
        size = scale + float(path.sigma(t))
        for name, denoised in everything(t, noisy).items():
            np.testing.assert_allclose(
                denoised, expected, rtol=1e-12, atol=1e-14 * size, err_msg=name
            )


def test_the_coefficients_of_edm():
    path, s = EDM, 1.7
    t = path.time(jnp.asarray(s**-2))
    got = []

    def network(c_noise, x):
        got.append((c_noise, x))
        return jnp.asarray([3.0, -1.0])

    denoised = tj.from_edm(network, shape=(2,)).denoise(t, jnp.asarray([0.4, 2.0]))
    (c_noise, scaled), *_ = got
    total = s**2 + 0.5**2
    np.testing.assert_allclose(c_noise, math.log(s) / 4, rtol=1e-12)
    np.testing.assert_allclose(scaled, np.array([0.4, 2.0]) / math.sqrt(total), rtol=1e-12)
    expected = 0.25 / total * np.array([0.4, 2.0])
    expected += s * 0.5 / math.sqrt(total) * np.array([3.0, -1.0])
    np.testing.assert_allclose(denoised, expected, rtol=1e-12)


class Flax(nnx.Module):
    def __init__(self, dtype):
        self.weight = nnx.Param(jnp.asarray([[0.3, -0.2], [0.1, 0.5]], dtype))
        self.dtype = dtype

    def __call__(self, c_noise, x):
        y = x.astype(self.dtype) @ self.weight[...]
        return y * jnp.cos(c_noise).astype(self.dtype)[..., None]


class Equinox(eqx.Module):
    weight: jax.Array

    def __call__(self, c_noise, x):
        y = x.astype(self.weight.dtype) @ self.weight
        return y * jnp.cos(c_noise).astype(self.weight.dtype)[..., None]


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["flax", "equinox"])
def test_raw_networks_of_any_precision_one_by_one_and_in_batches(kind, dtype):
    network = Flax(dtype) if kind == "flax" else Equinox(Flax(dtype).weight[...])
    state = jnp.float64 if dtype == jnp.float64 else jnp.float32
    path = tj._pytree.cast(EDM, state)
    one, many = (
        tj.from_edm(network, shape=(2,), batched=batched, interpolant=path, dtype=state)
        for batched in (False, True)
    )
    t, x = jnp.asarray(0.3, state), jnp.asarray([[3.0, 1.0], [-20.0, 5.0]], state)
    each = jax.vmap(lambda x: one.denoise(t, x))(x)
    assert each.dtype == state
    rtol = 4 * float(jnp.finfo(dtype).eps)
    rows = jax.vmap(lambda x: many.denoise(t, x))(x)
    for other in (one.denoise_batch(t, x), many.denoise_batch(t, x), rows):
        np.testing.assert_allclose(other, each, rtol=rtol, atol=rtol)
    gradient = jax.vmap(jax.grad(lambda x: jnp.sum(many.denoise(t, x))))(x)
    assert gradient.dtype == state
    assert np.all(np.isfinite(gradient))


def test_what_a_network_of_a_noise_level_needs():
    with pytest.raises(TypeError, match=r"interpolant must be a VE, got VP.*Rescheduled"):
        tj.from_edm(lambda c, x: x, shape=(2,), interpolant=tj.VP())  # pyright: ignore
    with pytest.raises(TypeError, match=r"interpolant must be an Interpolant.*VE"):
        tj.from_score(lambda t, x: x, shape=(2,), interpolant=None)  # pyright: ignore
    assert str(tj.from_edm(lambda c, x: x, shape=(2,))).startswith("from_edm(")
    assert str(tj.from_score(lambda t, x: x, shape=(2,), interpolant=EDM)).startswith("from_score(")
    other = tj.models.Rescheduled(parameterizations(MODEL)["edm"], tj.VP())
    truth = tj.Analytic(LINE, tj.VP())
    t, x = jnp.asarray(0.4), jnp.asarray([0.3, -0.5])
    np.testing.assert_allclose(other.denoise(t, x), truth.denoise(t, x), rtol=1e-10)


# Runs with default settings.


def test_the_default_times_are_the_published_levels():
    for model in (MODEL, *parameterizations(MODEL).values()):
        times = model.grid(18)
        np.testing.assert_array_equal(times, EDM.default_times(18))
        model.check_times(times)
        model.check_start(np.asarray(times)[0])
    # A tilt calls the network at a later level, and its times end earlier.
    tilted = tj.Tilted(parameterizations(MODEL)["edm"], REWARD, 1e4)
    times = tilted.grid(18)
    tilted.check_times(times)
    assert float(times[0]) == 0
    assert 0.7 < float(times[-2]) < 0.9999 * float(EDM.default_times(18)[-2])
    with pytest.raises(
        ValueError, match=r"0\.007.* is not 10 times as wide as 0\.002, the last noise"
    ):
        tj.Tilted(MODEL, REWARD, 1e4).grid(18)
    with pytest.raises(ValueError, match=r"end the grid at t = 0\.7799"):
        tj.sample(KEY, MODEL, num=2, times=jnp.linspace(0, 1, 20))
    wide = lambda width: tj.Analytic(contracts.gaussian([0.0], [[width**2]]), EDM)
    wide(11.0).check_start(np.zeros(()))
    with pytest.raises(ValueError, match=r"a run of VE cannot start from noise"):
        wide(12.0).check_start(np.zeros(()))
    traced = jax.jit(lambda path: tj.Analytic(LINE, path).grid(18))(EDM)
    np.testing.assert_allclose(traced, EDM.default_times(18), rtol=1e-12)


def test_heun_is_the_deterministic_sampler_of_the_paper():
    """Karras et al. (2022), algorithm 1, in its own variables."""
    steps, x = 12, jnp.asarray([[40.0, -30.0], [-7.0, 100.0]])
    times = MODEL.grid(steps)
    got = tj.sample(KEY, MODEL, num=2, times=times, start=x).x
    levels = [float(EDM.sigma(t)) for t in times]
    denoise = jax.jit(jax.vmap(lambda s, x: LINE.denoise(jnp.ones(()), s, x), (None, 0)))
    for s, lower in itertools.pairwise(levels):
        d = (x - denoise(s, x)) / s
        ahead = x + (lower - s) * d
        if lower > 0:
            d = (d + (ahead - denoise(lower, ahead)) / lower) / 2
        x = x + (lower - s) * d
    np.testing.assert_allclose(got, x, rtol=1e-10)


@pytest.mark.parametrize("solver", [tj.Heun(), tj.Euler(), tj.Ancestral()], ids=str)
def test_the_law_of_a_run_is_predicted(solver):
    prior = contracts.gaussian([0.4], [[0.25]])
    field = finite_steps.dps_field(prior, tj.rewards.Quadratic([0.0]), 0.5, EDM)
    model = tj.Analytic(prior, EDM)
    guidance = tj.dps(model, tj.rewards.Quadratic([0.0]), 0.5)
    law = finite_steps.discrete_law(field, times=model.grid(10), solver=solver)
    x = tj.sample(KEY, model, guidance, num=4000, steps=10, solver=solver).x
    contracts.assert_moments(x, *(np.asarray(part[0]) for part in (law.means, law.covs)))
    if isinstance(solver, tj.Heun):
        for width in (0.1, 0.5, 2.0):
            prior = contracts.gaussian([0.4], [[width**2]])
            field = finite_steps.dps_field(prior, tj.rewards.Quadratic([0.0]), 0.0, EDM)
            times = tj.Analytic(prior, EDM).grid(40)
            excess = finite_steps.discrete_law(field, times=times).covs[0, 0, 0] / width**2 - 1
            assert 0 < excess < WIDENED


def check_law(x, mixture, slack=WIDENED):
    mean, cov = np.asarray(mixture.mean()), np.asarray(mixture.cov())
    contracts.assert_moments(x, mean, cov, slack * np.trace(cov))
    masses = jax.vmap(lambda x: mixture.condition(jnp.ones(()), jnp.asarray(1e-3), x).weights)(x)
    contracts.assert_mean(masses, np.asarray(mixture.weights))


@pytest.mark.parametrize("name", ["closed form", "edm", "score", "alphafold"])
def test_unguided_samples(name):
    mixture, model = LINE, MODEL
    if name == "alphafold":
        mixture = tj.GaussianMixture(LINE.weights, 32 * LINE.means, 32**2 * LINE.covs)
        model = tj.Analytic(mixture, FOLD)
    elif name != "closed form":
        model = parameterizations(MODEL)[name]
    check_law(tj.sample(KEY, model, num=2000, steps=40).x, mixture)


BELL = contracts.gaussian([0.3, -0.2], np.diag([0.3, 0.15]))


def bell():
    return parameterizations(tj.Analytic(BELL, EDM))["edm"]


@pytest.mark.slow
def test_an_exact_tilt_of_both_modes():
    tilted = tj.Tilted(parameterizations(MODEL)["edm"], REWARD, SCALE)
    check_law(tj.sample(KEY, tilted, num=2000, steps=40).x, TILT)


@pytest.mark.slow
def test_guidances_with_default_settings():
    tilt = theory.tilt(BELL, REWARD, SCALE).mixture
    plug_in = theory.plug_in_law(BELL, REWARD, SCALE)
    table = tj.calibrate(jax.random.key(1), bell())
    reward = lambda x: REWARD(x)  # whose form is not known
    cases = {
        "laplace": (tj.Laplace(bell(), REWARD, SCALE), tilt),
        "conjugate": (tj.Conjugate(bell(), reward, SCALE, variance=table), tilt),
        "conjugate, its table": (tj.Conjugate(tj.Analytic(BELL, EDM), reward, SCALE), tilt),
        "plug-in": (tj.PlugIn(tj.Glass(bell()), REWARD, SCALE), plug_in),
    }
    for guidance, law in cases.values():
        x = tj.sample(KEY, guidance.model, guidance, num=4000).x
        contracts.assert_moments(x, np.asarray(law.mean()), np.asarray(law.cov()), 0.02)


@pytest.mark.slow
def test_weighted_runs_have_the_normalizing_constant():
    # The expectation under the law of unguided runs, which after 40 steps is narrower than LINE.
    base = tj.sample(jax.random.key(1), MODEL, num=20_000, steps=40, solver=tj.Ancestral()).x
    tilts = np.exp(SCALE * np.asarray(jax.vmap(REWARD)(base)))
    guidance = tj.Laplace(MODEL, REWARD, SCALE)
    runs = jax.vmap(lambda key: tj.smc(key, MODEL, guidance, num=64, steps=40).log_norm)
    found = np.asarray(runs(jax.random.split(KEY, 64)))
    error = contracts.SIGMAS * tilts.std() / len(tilts) ** 0.5
    contracts.assert_mean(np.exp(found), tilts.mean(), error)


@pytest.mark.slow
def test_densities_of_samples():
    found = tj.sample_with_log_prob(KEY, MODEL, num=500, steps=100)
    x = tj.sample(KEY, MODEL, num=500, steps=100).x
    np.testing.assert_allclose(found.x, x, rtol=1e-9)
    ratio = jnp.exp(jax.vmap(LINE.log_prob)(found.x) - found.log_prob)
    contracts.assert_mean(ratio, 1.0)


@pytest.mark.slow
def test_flows_and_posteriors_and_sweeps():
    flow = tj.flow(bell(), jnp.asarray([60.0, -30.0]), 0.0, 1.0)
    at = lambda t: np.sqrt(float(EDM.sigma(jnp.asarray(t))) ** 2 + np.array([0.3, 0.15]))
    mean = np.array([0.3, -0.2])
    end = mean + at(1.0) / at(0.0) * (np.array([60.0, -30.0]) - mean)
    np.testing.assert_allclose(flow(1.0), end, atol=2e-3)
    inside = mean + at(0.5) / at(0.0) * (np.array([60.0, -30.0]) - mean)
    np.testing.assert_allclose(flow(0.5), inside, atol=2e-3)
    t, x = jnp.asarray(0.5), jnp.asarray([0.8, -0.4])
    ahead = mean + at(1.0) / at(0.5) * (np.asarray(x) - mean)
    np.testing.assert_allclose(tj.FlowMap(bell(), 40).draw(KEY, t, x), ahead, atol=2e-3)
    sample = tj.sample(KEY, bell(), num=1000, solver=tj.Adaptive()).x
    contracts.assert_moments(sample, mean, np.diag([0.3, 0.15]), 2e-3)
    weight = tj.rewards.Quadratic([0.2, 0.3], weight=[0.5, 2.0])
    law = theory.tilt(BELL, weight, SCALE).mixture
    x = tj.gibbs(KEY, bell(), weight, SCALE, num=2000).x
    contracts.assert_moments(x, np.asarray(law.mean()), np.asarray(law.cov()), 0.01)


# Theory.


@pytest.mark.slow
def test_theory_of_runs():
    plug_in = theory.run_law(BELL, REWARD, SCALE, theory.PlugInDraws(1), steps=30, interpolant=EDM)
    model = tj.Analytic(BELL, EDM)
    x = tj.sample(KEY, model, tj.PlugIn(tj.Glass(model), REWARD, SCALE), num=4000, steps=30).x
    contracts.assert_moments(x, np.asarray(plug_in.mean()), np.asarray(plug_in.cov()), 5e-3)


def test_the_law_of_flow_map_guidance_is_refused():
    # It depends on the clock, of which runs on VE leave out the end.
    with pytest.raises(ValueError, match=r"VE.*run_law"):
        theory.fmrg_law(BELL, REWARD, 0.5, EDM)
