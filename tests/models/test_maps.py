"""Consistency functions, flow maps and distilled posteriors against Gaussians in closed form.
Tiers: exact (float64); statistics within five standard errors.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiltjax as tj

MEAN, WIDTH = np.array([0.7, -0.4]), 0.6
KEY = jax.random.key(0)
INTERPOLANTS = {"linear": tj.Linear(), "vp": tj.VP()}
REWARD, SCALE = tj.rewards.Quadratic([0.0, 1.0]), 1.5


def gaussian(interpolant):
    return tj.Analytic(tj.GaussianMixture([1.0], [MEAN], [WIDTH**2 * jnp.eye(2)]), interpolant)


def flow_map(interpolant):
    """`X_{t,u}(x)` of `N(MEAN, WIDTH^2 I)`: the flow moves quantiles to quantiles."""
    spread = lambda t: jnp.hypot(interpolant.alpha(t) * WIDTH, interpolant.sigma(t))

    def move(t, u, x):
        off = x - interpolant.alpha(t) * MEAN
        return interpolant.alpha(u) * MEAN + spread(u) / spread(t) * off

    return move


def consistency(interpolant, batched=False):
    move = flow_map(interpolant)
    one = lambda t, x: move(t, jnp.asarray(1.0, x.dtype), x)
    fn = jax.vmap(one) if batched else one
    return tj.models.from_consistency(fn, shape=(2,), interpolant=interpolant, batched=batched)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_a_flow_map_has_the_denoiser_of_its_law(name):
    interpolant = INTERPOLANTS[name]
    model = tj.models.from_flow_map(flow_map(interpolant), shape=(2,), interpolant=interpolant)
    x = jax.random.normal(KEY, (5, 2))
    for t in (0.2, 0.8):
        run = lambda model, t=t: jax.vmap(lambda x: model.denoise(jnp.asarray(t), x))(x)
        np.testing.assert_allclose(run(model), run(gaussian(interpolant)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_the_end_of_the_flow_is_one_call(name):
    interpolant = INTERPOLANTS[name]
    model = tj.models.from_flow_map(flow_map(interpolant), shape=(2,), interpolant=interpolant)
    t, x = jnp.asarray(0.3), jnp.array([0.5, -1.0])
    end = flow_map(interpolant)(t, jnp.asarray(1.0), x)
    for one in (model, consistency(interpolant)):
        np.testing.assert_allclose(tj.FlowMap(one).draw(KEY, t, x), end, rtol=0, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_the_end_of_the_flow_is_that_of_many_steps(name):
    interpolant = INTERPOLANTS[name]
    model = tj.models.from_flow_map(flow_map(interpolant), shape=(2,), interpolant=interpolant)
    t, x = jnp.asarray(0.3), jnp.array([0.5, -1.0])
    end = flow_map(interpolant)(t, jnp.asarray(1.0), x)
    many = tj.FlowMap(gaussian(interpolant), inner_steps=400).draw(KEY, t, x)
    np.testing.assert_allclose(many, end, rtol=0, atol=1e-4)
    guided = lambda model, steps: tj.PlugIn(tj.FlowMap(model, steps, floor=1e-5), REWARD, SCALE)
    run = lambda model, steps: tj.sample(KEY, model, guided(model, steps), num=4, steps=5).x
    np.testing.assert_allclose(run(model, 1), run(gaussian(interpolant), 4000), rtol=0, atol=1e-3)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_samples_of_any_number_of_steps_have_the_law(name, batched):
    model = consistency(INTERPOLANTS[name], batched)
    for steps in (1, 4):
        x = np.asarray(tj.sample(KEY, model, num=20_000, steps=steps).x)
        assert np.all(np.abs(x.mean(0) - MEAN) < 5 * WIDTH / np.sqrt(len(x)) + 1e-3)
        assert np.all(np.abs(x.var(0) / WIDTH**2 - 1) < 5 * np.sqrt(2 / len(x)) + 1e-3)


def transfer(interpolant, times, reward_mean, scale):
    """`log E[exp(-scale |x_N - y|^2)]` of the chain of `Consistency`, one Gaussian after another.
    `Quadratic` with weight one is `-|x - y|^2`.
    """
    spread = lambda t: np.hypot(interpolant.alpha(t) * WIDTH, interpolant.sigma(t))
    ratio = lambda t: WIDTH / spread(t)
    t = times[0]
    # The first state: alpha f(x) + sigma X_0 with x = sigma X_0, both of the same noise.
    alpha, sigma = float(interpolant.alpha(t)), float(interpolant.sigma(t))
    mean = alpha * (MEAN - ratio(t) * alpha * MEAN)
    deviation = alpha * ratio(t) * sigma + sigma
    for t, u in itertools.pairwise(times):
        a, s = float(interpolant.alpha(t)), ratio(t)
        mean, deviation = MEAN + s * (mean - a * MEAN), s * deviation
        mean = float(interpolant.alpha(u)) * mean
        deviation = np.hypot(float(interpolant.alpha(u)) * deviation, float(interpolant.sigma(u)))
    total = 1 + 2 * scale * deviation**2
    off = mean - np.asarray(reward_mean)
    return np.sum(-scale * off**2 / total - np.log(total) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", [tj.weighted.proposals.Base(), tj.weighted.proposals.Guided()])
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_log_z_is_unbiased(name, proposal):
    model = consistency(INTERPOLANTS[name])
    times = np.asarray(model.grid(4))
    scale = 0.4  # fresh noise forgets what f says: at larger scales weights are uneven
    expected = transfer(INTERPOLANTS[name], times, [0.0, 1.0], scale)
    guidance = tj.dps(model, REWARD, scale)
    run = lambda key: tj.smc(key, model, guidance, num=1000, steps=4, proposal=proposal).log_norm
    ratio = np.exp(np.asarray(jax.vmap(run)(jax.random.split(KEY, 100))) - expected)
    error = ratio.std() / np.sqrt(len(ratio))
    assert error < 0.05
    assert abs(ratio.mean() - 1) < 5 * error


def test_a_distilled_posterior_is_its_function():
    model = gaussian(tj.Linear())
    exact = tj.Exact(model)
    distilled = tj.posteriors.Distilled(model, lambda key, t, x: exact.draw(key, t, x))
    run = lambda posterior: (
        tj.sample(KEY, model, tj.PlugIn(posterior, REWARD, SCALE, k=2), num=4, steps=5).x
    )
    np.testing.assert_allclose(run(distilled), run(_one_by_one(model)), rtol=0, atol=1e-12)
    scaled = tj.posteriors.Distilled(model, lambda p, key, t, x: p * x, jnp.asarray(2.0))
    np.testing.assert_array_equal(scaled.draw(KEY, jnp.asarray(0.5), jnp.ones(2)), 2 * jnp.ones(2))
    wrong = tj.posteriors.Distilled(model, lambda key, t, x: x[0])
    with pytest.raises(ValueError, match=r"one draw of shape \(2,\), got \(\)"):
        wrong.draw(KEY, jnp.asarray(0.5), jnp.ones(2))


def _one_by_one(model):
    class OneByOne(tj.posteriors.Posterior):
        model: tj.Model

        def draw(self, key, t, x):
            return tj.Exact(self.model).draw(key, t, x)

    return OneByOne(model)


REFUSED = {
    "Tilted": lambda m: tj.Tilted(m, REWARD, 1.0),
    "Glass": lambda m: tj.Glass(m),
    "Laplace": lambda m: tj.Laplace(m, REWARD, 1.0),
    "Conjugate": lambda m: tj.Conjugate(m, REWARD, 1.0, variance=1.0),
    "calibrate": lambda m: tj.calibrate(KEY, m),
    "flow": lambda m: tj.flow(m, jnp.ones(2), 0.1, 1.0),
    "density": lambda m: tj.sample_with_log_prob(KEY, m, num=2),
    "gibbs": lambda m: tj.gibbs(KEY, m, REWARD, 1.0, num=4),
    "Rescheduled": lambda m: tj.models.Rescheduled(m, tj.Linear()),
    "cfg": lambda m: tj.models.cfg(m, m, 2.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_posterior_mean_refuses_a_consistency_function(name):
    with pytest.raises(ValueError, match="not the posterior mean that this method needs"):
        REFUSED[name](consistency(tj.Linear()))


def test_solvers_and_models_must_fit():
    with pytest.raises(ValueError, match="no denoiser for Heun: leave out solver"):
        tj.sample(KEY, consistency(tj.Linear()), num=2, solver=tj.Heun())
    with pytest.raises(ValueError, match="Consistency is the solver of consistency functions"):
        tj.sample(KEY, gaussian(tj.Linear()), num=2, solver=tj.solvers.Consistency())
