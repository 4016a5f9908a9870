"""The density of what a flow makes: against an affine flow (exact) and the identity
`E_q[p / q] = 1` (statistical).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theory
import tiltjax as tj

KEY = jax.random.key(0)
MIXTURE = tj.GaussianMixture(
    [0.4, 0.6], [[-1.5, 0.0], [1.5, 0.5]], 0.4 * jnp.stack([jnp.eye(2)] * 2)
)
MODEL = tj.Analytic(MIXTURE)
REWARD = tj.rewards.Quadratic([0.5, 1.0], weight=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [tj.Heun(), tj.Euler()], ids=["heun", "euler"])
def test_an_affine_flow_makes_a_gaussian(solver):
    # The map of a coordinate of the noise is x -> a x + b: two points tell it, and with it the law
    # of seven coarse steps.
    gaussian = tj.GaussianMixture([1.0], [[1.0, -2.0]], [jnp.diag(jnp.asarray([0.5, 0.9]))])
    model, run = tj.Analytic(gaussian), {"times": jnp.linspace(0.01, 1.0, 8), "solver": solver}
    noise = jnp.asarray([[0.0, 0.0], [1.0, 1.0]])
    start = noise + 0.01 * jax.vmap(lambda x: model.denoise(jnp.asarray(0.01), x))(noise)
    ends = tj.sample(KEY, model, num=2, start=start, **run).x
    slope, sigma = np.asarray(ends[1] - ends[0]), 0.99
    got = tj.sample_with_log_prob(KEY, model, num=20, **run)
    law = tj.GaussianMixture([1.0], ends[:1], [jnp.diag(jnp.asarray((slope * sigma) ** 2))])
    np.testing.assert_allclose(got.log_prob, jax.vmap(law.log_prob)(got.x), atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "guided", "tilted"])
def test_importance_weights_have_mean_one(name):
    model = tj.Tilted(MODEL, REWARD, 2.0) if name == "tilted" else MODEL
    guidance = tj.Laplace(MODEL, REWARD, 2.0) if name == "guided" else None
    num = 2000
    drawn = tj.sample_with_log_prob(KEY, model, guidance, num=num, steps=12)
    x, log_prob = drawn.x, drawn.log_prob
    truth = MIXTURE if name == "base" else theory.tilt(MIXTURE, REWARD, 2.0).mixture
    ratio = np.exp(np.asarray(jax.vmap(truth.log_prob)(x) - log_prob))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(num)
    assert ratio.std() / np.sqrt(num) < 0.1
    assert np.mean(np.log(ratio)) < 0


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_samples_are_those_of_sample(chunk_size):
    settings = {"num": 8, "steps": 6, "solver": tj.Euler(), "chunk_size": chunk_size}
    guidance = tj.Laplace(MODEL, REWARD, 2.0)
    drawn = tj.sample_with_log_prob(KEY, MODEL, guidance, **settings)
    np.testing.assert_allclose(drawn.x, tj.sample(KEY, MODEL, guidance, **settings).x, atol=1e-12)
    assert drawn.log_prob.shape == (8,)


def test_what_has_no_density_is_refused():
    with pytest.raises(ValueError, match="no density to follow"):
        tj.sample_with_log_prob(KEY, MODEL, num=2, solver=tj.Ancestral())
    with pytest.raises(ValueError, match="no density to follow"):
        tj.sample_with_log_prob(KEY, MODEL, num=2, solver=tj.Adaptive())
    with pytest.raises(ValueError, match="draws at random"):
        tj.sample_with_log_prob(KEY, MODEL, tj.PlugIn(tj.Exact(MODEL), REWARD, 2.0), num=2)
    rows = tj.from_denoiser(lambda t, x: x, shape=(2,), batched=True)
    with pytest.raises(ValueError, match="batched=False"):
        tj.sample_with_log_prob(KEY, rows, num=2)
    levels = tj.DiscreteVP(np.cumprod(1 - np.linspace(0.01, 0.6, 17)))
    network = tj.from_noise(lambda t, x: x, shape=(2,), interpolant=levels)
    with pytest.raises(ValueError, match="end the grid at t"):
        tj.sample_with_log_prob(
            KEY,
            network,
            num=2,
            times=jnp.append(levels.clock(jnp.arange(16.0, -1.0, -2.0)), 0.9999),
        )
    with pytest.raises(ValueError, match="must start at t > 0"):
        tj.sample_with_log_prob(
            KEY, MODEL, tj.Laplace(MODEL, REWARD), num=2, times=jnp.asarray([0.0, 0.5, 1.0])
        )
    constant = tj.from_denoiser(lambda t, x: jnp.zeros_like(x), shape=(2,))
    with pytest.raises(FloatingPointError, match="3 of 3 log-densities"):
        tj.sample_with_log_prob(KEY, constant, num=3, steps=4)


@pytest.mark.slow
def test_the_strength_of_a_guidance_may_be_traced():
    run = lambda scale: (
        tj.sample_with_log_prob(KEY, MODEL, tj.dps(MODEL, REWARD, scale), num=2, steps=3).log_prob
    )
    np.testing.assert_allclose(jax.jit(run)(2.0), run(2.0), rtol=1e-10)


@pytest.mark.slow
def test_a_guidance_that_draws_is_refused_also_where_it_is_traced():
    run = jax.jit(
        lambda scale, guidance: (
            tj.sample_with_log_prob(KEY, MODEL, guidance(scale), num=2, steps=3).log_prob
        ),
        static_argnums=1,
    )
    for guidance in (
        lambda s: tj.PlugIn(tj.Glass(MODEL, 2), REWARD, s),
        lambda s: tj.Conjugate(
            MODEL, tj.rewards.Bump(jnp.ones(2)), s, variance=lambda snr: 1 / (2 + snr)
        ),
    ):
        with pytest.raises(ValueError, match="draws at random"):
            run(2.0, guidance)
    for guidance in (
        lambda s: tj.Laplace(MODEL, REWARD, s),
        lambda s: tj.fmrg(MODEL, REWARD, s, inner_steps=2),
    ):
        assert np.all(np.isfinite(run(0.1, guidance)))


def test_an_error_of_the_reward_stays_what_it_is():
    def untyped(x):
        raise TypeError("a sum of text and numbers")

    with pytest.raises(TypeError, match="a sum of text and numbers"):
        tj.sample_with_log_prob(KEY, MODEL, tj.dps(MODEL, untyped, 1.0), num=2, steps=3)
    network = tj.from_denoiser(lambda t, x: untyped(x), shape=(2,))
    with pytest.raises(TypeError, match="a sum of text and numbers"):
        tj.sample_with_log_prob(KEY, network, num=2, steps=3)
    vector = lambda scale: tj.dps(MODEL, lambda x: x, scale)
    with pytest.raises(ValueError, match=r"one scalar for one sample, got shape \(2,\)"):
        jax.jit(lambda s: tj.sample_with_log_prob(KEY, MODEL, vector(s), num=2, steps=3).x)(1.0)


@pytest.mark.slow
def test_a_model_with_a_start_of_its_own_says_its_density_or_is_refused():
    class Shifted(tj.models.Analytic):
        def initial(self, key, t):
            return super().initial(key, t) + 1.0

    class Known(Shifted):
        def initial_log_prob(self, t, x):
            return tj.Analytic(MIXTURE).initial_log_prob(t, x - 1.0)

    with pytest.raises(ValueError, match="Shifted starts from a law of its own"):
        tj.sample_with_log_prob(KEY, Shifted(MIXTURE), num=2, steps=3)
    drawn = tj.sample_with_log_prob(KEY, tj.Tilted(Known(MIXTURE), REWARD, 2.0), num=2000, steps=12)
    x, log_prob = drawn.x, drawn.log_prob
    ratio = np.exp(
        np.asarray(jax.vmap(theory.tilt(MIXTURE, REWARD, 2.0).mixture.log_prob)(x) - log_prob)
    )
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(2000)


def test_an_external_failure_comes_out_as_what_it_was():
    def broken(x):
        raise OSError("no route to the host")

    reward = tj.external.from_numpy(broken, value_and_grad=broken)
    with pytest.raises(OSError, match="no route"):
        tj.sample_with_log_prob(KEY, MODEL, tj.dps(MODEL, reward), num=2, steps=3)
