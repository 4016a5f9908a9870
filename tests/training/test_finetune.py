"""Fine-tuning: gradients, the optimum, the collapse without a divergence.

Tiers: statistical (two independent estimators of one gradient, the loss against the exact
loss of the chain and its Z_N), exact (identities in float64).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import theory
import tiltjax as tj
from tiltjax import training
from tiltjax.training import lora

MEAN, VARIANCE, SCALE = 0.5, 0.8, 1.5
BASE = tj.Analytic(tj.GaussianMixture([1.0], [[MEAN]], [[[VARIANCE]]]))
REWARD = tj.rewards.Quadratic([1.5], weight=0.5)
KEY = jax.random.key(0)


@functools.cache
def chain_law(steps):
    """The weights of the chain with the tilt's denoiser at this number of steps: `log_norm` is
    log Z_N, and `evidence_bound` is the objective times the scale.
    """
    field = theory.doob_field(BASE.mixture, REWARD, SCALE)
    return theory.path_law(field, times=BASE.grid(steps))


def gaussian(parameters, offset=0.0):
    """The model of a Gaussian of this mean and log-variance: the tilt is one of them."""
    mixture = tj.GaussianMixture(
        jnp.ones(1),
        (parameters["mean"] + offset)[None],
        jnp.exp(parameters["log_variance"])[None, :, None],
    )
    return tj.Analytic(mixture)


START = {"mean": jnp.asarray([0.6]), "log_variance": jnp.asarray([-0.1])}
TILT = {"log_variance": math.log(VARIANCE / (1 + SCALE * VARIANCE))}
TILT["mean"] = math.exp(TILT["log_variance"]) * (MEAN / VARIANCE + SCALE * 1.5)


def rollout(num, steps=8, scale=SCALE):
    weight, regularized = jnp.asarray(1 / scale), scale < math.inf
    return training.Rollout(
        BASE, REWARD, weight, BASE.grid(steps), num=num, regularized=regularized
    )


@functools.cache
def slopes(objective, scale, runs=400):
    """Gradients of the loss of independent batches, `(runs, 2)`, and the losses."""
    one = jax.value_and_grad(lambda p, key: objective(rollout(50, scale=scale), gaussian(p), key))
    values, gradients = jax.jit(jax.vmap(lambda key: one(START, key)))(jax.random.split(KEY, runs))
    return np.concatenate([gradients[name] for name in START], axis=1), np.asarray(values)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [SCALE, math.inf])
def test_the_two_gradients_have_one_mean(scale):
    (a, values_a), (b, values_b) = (
        slopes(o, scale) for o in (training.reparametrized(), training.policy_gradient)
    )
    error = np.hypot(a.std(axis=0), b.std(axis=0)) / np.sqrt(len(a))
    assert np.all(np.abs(a.mean(axis=0) - b.mean(axis=0)) < 4 * error)
    assert np.all(np.abs(a.mean(axis=0)) > 8 * error)  # there is something to agree on
    assert abs(values_a.mean() - values_b.mean()) < 4 * np.hypot(
        values_a.std(), values_b.std()
    ) / np.sqrt(len(a))


@functools.cache
def trajectory_loss(last_steps=None, num=20):
    """The loss of one batch and its gradient, compiled once."""
    return jax.jit(
        jax.value_and_grad(
            lambda p: training.reparametrized(last_steps)(rollout(num), gaussian(p), KEY)
        )
    )


def test_the_gradient_through_the_trajectory_is_that_of_differences():
    got, step = trajectory_loss()(START)[1], 1e-5
    for name in START:
        moved = lambda sign, name=name: float(
            trajectory_loss()(START | {name: START[name] + sign * step})[0]
        )
        np.testing.assert_allclose(got[name][0], (moved(1) - moved(-1)) / (2 * step), rtol=1e-6)


def test_truncation_follows_the_last_steps_only():
    (value, whole), (_, all_of_it), (same, last) = (
        trajectory_loss(last_steps)(START) for last_steps in (None, 100, 1)
    )
    assert float(value) == pytest.approx(float(same), rel=1e-12)
    np.testing.assert_allclose(whole["mean"], all_of_it["mean"], rtol=1e-12)
    assert abs(float(last["mean"][0])) < 0.9 * abs(float(whole["mean"][0]))


def measured(parameters, steps, batches=20):
    """The loss of independent batches of 2,000 trajectories, and its standard error."""
    loss = jax.jit(
        lambda key: training.reparametrized()(rollout(2000, steps), gaussian(parameters), key)
    )
    values = np.asarray([loss(key) for key in jax.random.split(jax.random.key(3), batches)])
    return values.mean(), values.std(ddof=1) / math.sqrt(batches)


@pytest.mark.parametrize("steps", [8, 200])
def test_the_loss_is_that_of_theory_at_its_steps(steps):
    # With the tilt's own denoiser the loss is known at any number of steps. It comes to
    # -log Z_N / scale from above as steps get small.
    law, tilt = chain_law(steps), {name: jnp.asarray([TILT[name]]) for name in START}
    loss, error = measured(tilt, steps)
    assert abs(loss + law.evidence_bound / SCALE) < 5 * error
    if steps == 8:  # neither the bound nor the constant of the flow itself
        flow = theory.tilt(BASE.mixture, REWARD, SCALE).log_norm
        assert loss + law.log_norm / SCALE > 20 * error
        assert abs(law.log_norm - flow) / SCALE > 5 * error
    else:
        assert measured(START, steps, 5)[0] > loss + 0.1


@functools.cache
def tuned(scale=SCALE, objective=None, steps=200):
    settings = {
        "steps": steps,
        "batch_size": 64,
        "learning_rate": 0.03,
        "ema": 0.9,
        "times": BASE.grid(80),
    }
    return tj.finetune(
        KEY, START, BASE, REWARD, scale, model=gaussian, objective=objective, **settings
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [None, training.policy_gradient], ids=["reparametrized", "policy"]
)
def test_a_tuned_chain_samples_the_tilt(objective):
    fit = tuned(objective=objective)
    # The loss is between the bound for all chains and the loss of the tilt's own denoiser.
    law, (loss, error) = chain_law(80), measured(fit.average, 80)
    assert -law.log_norm / SCALE - 5 * error < loss < -law.evidence_bound / SCALE + 5 * error
    last = fit.curve.loss[-50:]
    assert abs(last.mean() - loss) < 5 * np.hypot(error, last.std() / math.sqrt(len(last)))
    assert fit.curve.loss[0] > loss + 0.1
    for name, value in TILT.items():
        assert float(fit.average[name][0]) == pytest.approx(value, abs=0.1)


@pytest.mark.slow
def test_without_the_divergence_it_collapses_on_the_best_sample():
    half, longer = (tuned(math.inf, steps=steps).network for steps in (50, 200))
    assert longer["log_variance"][0] < half["log_variance"][0] < START["log_variance"][0]
    assert longer["log_variance"][0] < TILT["log_variance"] - 0.7


@pytest.mark.slow
def test_networks_adapters_and_batches_are_trained():
    network = tj.training.networks.Velocity(
        (1,), width=8, depth=1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    build = lambda network, batched=False: tj.from_velocity(network, shape=(1,), batched=batched)
    base = build(network)
    settings = {"steps": 2, "batch_size": 4, "times": base.grid(4), "learning_rate": 1e-2}
    run = lambda trained, model: tj.finetune(
        KEY, trained, base, REWARD, SCALE, model=model, **settings
    )
    alone, together = (
        run(network, build),
        run(network, lambda network: build(network, batched=True)),
    )
    for a, b in zip(jax.tree.leaves(alone.network), jax.tree.leaves(together.network), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    adapters = lora.init(KEY, network, 2)
    got = run(
        adapters,
        jax.tree_util.Partial(
            lambda network, adapters: build(lora.merge(network, adapters)), network
        ),
    )
    assert all(np.any(np.asarray(b)) for _, b in got.network.values())


def test_a_reward_of_values_only_is_enough_for_the_policy_gradient():
    values = tj.external.from_numpy(lambda x: np.where(x[:, 0] > 1, 1.0, 0.0))
    settings = {"steps": 60, "batch_size": 128, "learning_rate": 0.02, "times": BASE.grid(10)}
    fit = tj.finetune(
        KEY,
        START,
        BASE,
        values,
        4.0,
        model=gaussian,
        objective=training.policy_gradient,
        **settings,
    )
    assert fit.curve.loss[-10:].mean() < fit.curve.loss[:10].mean() - 0.1


@pytest.mark.slow
def test_a_run_is_taken_up_again_and_another_one_is_refused(tmp_path):
    settings = {"model": gaussian, "steps": 6, "batch_size": 8, "times": BASE.grid(4), "ema": 0.5}
    run = lambda scale=SCALE, **more: tj.finetune(
        KEY, START, BASE, REWARD, scale, **(settings | more)
    )
    whole, file = run(), tmp_path / "run.npz"
    run(checkpoint=file, checkpoint_every=3)
    again = run(checkpoint=file, checkpoint_every=3)
    for a, b in zip(jax.tree.leaves(whole.average), jax.tree.leaves(again.average), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"another run: scale is 1\.5 in the file and 2\.0 here"):
        run(2.0, checkpoint=file)
    # Rewards and models of one name are told apart by their arrays: another target would be sought
    # from the middle of the run on.
    for match, reward, model in (
        ("reward is Quadratic .* in the file", tj.rewards.Quadratic([-1.5], weight=0.5), gaussian),
        (
            "model is gaussian .* in the file",
            REWARD,
            jax.tree_util.Partial(gaussian, offset=jnp.ones(1)),
        ),
        (
            "model is gaussian .* in the file",
            REWARD,
            jax.tree_util.Partial(gaussian, offset=1.0),
        ),
    ):
        with pytest.raises(ValueError, match=f"another run: {match}"):
            tj.finetune(
                KEY, START, BASE, reward, SCALE, checkpoint=file, **(settings | {"model": model})
            )


@pytest.mark.slow
def test_mistakes_are_named():
    run = lambda network=START, base=BASE, reward=REWARD, scale=SCALE, **settings: tj.finetune(
        KEY,
        network,
        base,
        reward,
        scale,
        **({"model": gaussian, "steps": 2, "batch_size": 4, "times": BASE.grid(4)} | settings),
    )
    other = tj.Analytic(BASE.mixture, tj.Linear(2.0))
    step = tj.rewards.StepReward(0.0)
    excluding = lambda x: jnp.where(x[0] > 0.5, x[0], -jnp.inf)
    excluding.__qualname__ = "excluding"
    for error, match, call in (
        (ValueError, "zero at all of 4 samples", lambda: run(reward=step)),
        (
            ValueError,
            "excluding is -inf at . of 4 samples .* a finite penalty",
            lambda: run(reward=excluding),
        ),
        (
            FloatingPointError,
            "failed in step 0 .* mean of excluding.* a finite penalty",
            lambda: run(reward=excluding, objective=training.policy_gradient),
        ),
        (ValueError, r"scale must lie in \(0, inf", lambda: run(scale=0.0)),
        (ValueError, r"scale must lie in \(0, inf", lambda: run(scale=math.nan)),
        (ValueError, "base and tuned must", lambda: run(base=other)),
        (ValueError, "end at 1", lambda: run(times=jnp.asarray([0.001, 0.5, 0.9]))),
        (ValueError, "at least two steps", lambda: run(times=jnp.asarray([0.001, 1.0]))),
        (
            ValueError,
            "batch_size >= 2",
            lambda: run(batch_size=1, objective=training.policy_gradient),
        ),
        (ValueError, "last_steps must", lambda: training.reparametrized(0)),
        (TypeError, "objective", lambda: run(objective="draft")),
        (TypeError, "base", lambda: run(base=START)),
        (
            TypeError,
            r"model\(network\) must be a Model, got dict",
            lambda: run(model=lambda network: network),
        ),
        (ValueError, "one scalar for one sample, got shape", lambda: run(reward=lambda x: x)),
        (
            ValueError,
            "one scalar for one sample, got shape",
            lambda: run(reward=lambda x: x, objective=training.policy_gradient),
        ),
        (
            TypeError,
            "base must be a Model, got MarkovChain",
            lambda: run(base=tj.tokens.MarkovChain([1.0, 1.0], jnp.ones((2, 2)), 3)),
        ),
        (
            FloatingPointError,
            "failed in step 0",
            lambda: run(reward=lambda x: jnp.sqrt(x[0] - 100)),
        ),
    ):
        with pytest.raises(error, match=match):
            call()
