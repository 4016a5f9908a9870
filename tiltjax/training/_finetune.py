r"""Fine-tuning: train a network so that it samples the tilt.

A tuned model D' runs the chain of the base model: the same kernels `N(keep x + gain D, std^2 I)`
with D' in place of D (see `tiltjax.solvers`), and the base model's last jump. The trajectories of
D' have the law Q, and those of the base model have the law P. Training maximizes their reward and
keeps Q close to P:

    maximize  E_Q[r(x_1)] - KL(Q | P) / scale,
        KL(Q | P) = E_Q sum over steps of |gain (D' - D)|^2 / (2 std^2).

The maximum over all Q is `log Z / scale`, reached only by `dP exp(scale r) / Z`. A chain of N
steps with the kernels' own variance comes to it as N grows. At eta = 1 the end of a
trajectory does not depend on the noise at its start, and the ends have the law
`rho exp(scale r) / Z`, where rho is the law of the ends of the base chain with its N steps, and Z
its normalizing constant Z_N. The maximum of the continuous flow is another: in one example 1.3125,
and 1.155 at 30 steps. Compare a loss with `log_norm` of `smc` on the same times, or for a Gaussian
with `theory.path_law(...).log_norm`. The objective is below its maximum by
`KL(Q | tilt) / scale`, so that the loss gives the distance to the tilt where log Z_N is known.

`smc` takes a reward of -inf, but `finetune` raises an error. The tilt has no mass where the reward
is -inf, but the Gaussian steps of any network reach every state, and `E_Q[r]` is -inf for every
network.

Without the divergence, `scale = inf`, the maximum is a point mass where the reward is largest. Only
an early stop then prevents the collapse of a network to that point. The weight 1 / (2 std^2) of a
step belongs to the divergence. Without this weight, as in published code, the optimum is not a
tilt.

| objective | gradient | needs |
|---|---|---|
| `reparametrized(last_steps)` | of trajectories as functions of noise | a reward with a gradient |
| `policy_gradient` | `sum A ∇ log K(x_u \| x_t)`, A the advantage | values of the reward only |

`policy_gradient` has the mean `∇ objective`, and so has `reparametrized` through all steps. Through
only the last K steps it is DRaFT-K: the gradients of divergence and reward then come only from
these steps. Each step of the policy gradient uses new trajectories, so it needs no ratios of
densities and no clipping.

References: Clark et al. (arXiv 2309.17400), DRaFT; Black et al. (arXiv 2305.13301), DDPO, and Fan
et al. (arXiv 2305.16381), with the divergence; Uehara et al. (arXiv 2402.15194), the tilt as its
optimum; Domingo-Enrich et al. (arXiv 2409.08861), why eta = 1.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _pytree, rewards
from tiltjax.mixtures import decomposed
from tiltjax.models import Model, check_pair
from tiltjax.samplers import resolve_times
from tiltjax.solvers import Ancestral, Kernel
from tiltjax.training._checkpoints import callable_name, digest
from tiltjax.training._loop import Fit, minimize

if TYPE_CHECKING:
    import optax

_INSTEAD = "give excluded samples a finite penalty, or use smc, which takes -inf"


class Rollout(eqx.Module):
    """The setting for `num` trajectories of a model: the base model, the reward of their ends, the
    times, and the weight `kl_weight = 1 / scale` of the divergence from the base chain.
    """

    base: Model
    reward: rewards.Reward
    kl_weight: Array
    times: Array
    num: int = eqx.field(static=True)
    regularized: bool = eqx.field(static=True)

    def start(self, key: Array) -> Array:
        """The first states, `(num, *shape)`."""
        t = self.times[0]
        noise = jax.vmap(lambda key: self.base.initial(key, t))(jax.random.split(key, self.num))
        return self.base.start(t, noise, self.base.denoise_batch(t, noise))

    def steps(self, key: Array) -> tuple[Array, Array, Array]:
        """The beginning, the end and the key of each step before the last jump."""
        return self.times[:-2], self.times[1:-1], jax.random.split(key, len(self.times) - 2)

    def noise(self, key: Array) -> Array:
        """The noise of one step."""
        return jax.random.normal(key, (self.num, *self.base.shape), self.base.dtype)

    def step(
        self, model: Model, t: Array, u: Array, x: Array, noise: Array
    ) -> tuple[Array, Array, Kernel, Array]:
        """The step from t to u: the next states, the weighted divergences `(num,)`, the kernel, and
        the denoiser of the tuned model.
        """
        kernel = Ancestral(jnp.ones_like(t)).kernel(self.base.interpolant, t, u)
        tuned = model.denoise_batch(t, x)
        divergence = jnp.zeros(self.num, x.dtype)
        if self.regularized:
            shift = kernel.gain / kernel.std * (tuned - self.base.denoise_batch(t, x))
            divergence = self.kl_weight * jnp.sum(shift.reshape(self.num, -1) ** 2, axis=1) / 2
        return kernel.keep * x + kernel.gain * tuned + kernel.std * noise, divergence, kernel, tuned

    def ends(self, x: Array) -> Array:
        """The ends `(num, *shape)`, by the last jump from `times[-2]`."""
        return self.base.denoise_batch(self.times[-2], x)

    def end_rewards(self, x: Array) -> Array:
        """The rewards `(num,)` of the ends of trajectories that are at `times[-2]`."""
        value = lambda x: rewards.value(self.reward, x)
        return jax.vmap(value)(self.ends(x)).astype(x.dtype)


class Objective(eqx.Module):
    """An estimator of the objective. Subclasses define `__call__(rollout, model, key)`, a scalar
    that gradient descent minimizes.
    """

    def __call__(self, rollout: Rollout, model: Model, key: Array) -> Array:
        """Minus the objective, from `rollout.num` trajectories of the model."""
        raise NotImplementedError


class Reparametrized(Objective):
    """The objective of `reparametrized`."""

    last_steps: int | None = eqx.field(static=True)

    def __call__(self, rollout, model, key):
        key_start, key_run = jax.random.split(key)
        steps = rollout.steps(key_run)
        num = len(rollout.times) - 2
        first = 0 if self.last_steps is None else max(num - self.last_steps, 0)

        def advance(model: Model):
            def step(carry, step):
                x, total = carry
                t, u, key = step
                x, divergence, *_ = rollout.step(model, t, u, x, rollout.noise(key))
                return (x, total + divergence), None

            return step

        carry = rollout.start(key_start), jnp.zeros(rollout.num, rollout.base.dtype)
        early, late = [part[:first] for part in steps], [part[first:] for part in steps]
        carry, _ = jax.lax.scan(advance(_stop_gradient(model)), carry, early)
        # The backward pass recomputes each step, so that only the states are stored, for any
        # network.
        (x, total), _ = jax.lax.scan(jax.checkpoint(advance(model)), carry, late)
        return -jnp.mean(rollout.end_rewards(x) - total)


class PolicyGradient(Objective):
    """The objective of `policy_gradient`."""

    def __call__(self, rollout, model, key):
        key_start, key_run = jax.random.split(key)
        steps = rollout.steps(key_run)

        def advance(x, step):
            t, u, key = step
            noise = rollout.noise(key)
            following, divergence, *_ = rollout.step(_stop_gradient(model), t, u, x, noise)
            return following, (x, noise, divergence)

        end, (states, noises, divergences) = jax.lax.scan(advance, rollout.start(key_start), steps)
        values = jax.lax.stop_gradient(rollout.end_rewards(end))
        advantages = _advantages(values, divergences)

        def score(total, step):
            t, u, x, noise, advantage = step
            _, divergence, kernel, tuned = rollout.step(model, t, u, x, noise)
            # The derivative of log K(x_u | x_t) by D' is <noise, gain dD'> / std.
            inner = jnp.sum((noise * tuned).reshape(rollout.num, -1), axis=1)
            log_kernel = kernel.gain / kernel.std * inner
            return total + jnp.mean(advantage * log_kernel - divergence), None

        total, _ = jax.lax.scan(
            jax.checkpoint(score),
            jnp.zeros((), rollout.base.dtype),
            (*steps[:2], states, noises, advantages),
        )
        objective = jnp.mean(values - jnp.sum(divergences, axis=0))
        return -(jax.lax.stop_gradient(objective - total) + total)


def _advantages(values: Array, divergences: Array) -> Array:
    """The future reward minus divergences of each step of each trajectory, minus the mean of the
    other trajectories, `(steps, num)`.
    """
    # Earlier divergences do not depend on a step, and its own divergence is differentiated
    # directly.
    later = jnp.cumsum(divergences[::-1], axis=0)[::-1] - divergences
    earned = values[None] - later
    baseline = (jnp.sum(earned, axis=1, keepdims=True) - earned) / (len(values) - 1)
    return jax.lax.stop_gradient(earned - baseline)


def reparametrized(last_steps: int | None = None) -> Reparametrized:
    """The objective by backpropagation through the last `last_steps` steps of the chain, by default
    through all: DRaFT, and ReFL with one step.
    """
    return Reparametrized(None if last_steps is None else _checks.count(last_steps, "last_steps"))


policy_gradient = PolicyGradient()


class _Loss(eqx.Module):
    """Minus the objective, as a function of the network and a key."""

    rollout: Rollout
    build: _pytree.Function
    objective: Objective

    def __call__(self, network: Any, key: Array) -> Array:
        model = _pytree.cast(self.build(network), self.rollout.base.dtype)
        return self.objective(*decomposed((self.rollout, model)), key)


def finetune(
    key: Array,
    network: Any,
    base: Model,
    reward: Callable,
    scale: float,
    *,
    model: Callable[[Any], Model],
    objective: Objective | None = None,
    steps: int,
    batch_size: int = 256,
    times: Array | None = None,
    learning_rate: float | None = None,
    optimizer: "optax.GradientTransformation | None" = None,
    ema: float = 0.99,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    progress: bool = False,
) -> Fit:
    """Train a network so that the base model's chain, run with the network, samples
    `rho exp(scale r)` as closely as the network can.

    ```
    build = lambda network: tj.from_velocity(network, shape=(2,))
    fit = tj.finetune(key, network, build(network), reward, scale=3.0, model=build, steps=500)
    tuned = tj.Tuned(base, build(fit.average), reward=reward, scale=3.0)
    report = tj.audit(key, base, tuned, num=1000)  # how far it is from the tilt
    ```

    **Arguments:**
    - `key`: determines the trajectories.
    - `network`: the network to train, and its initial weights: the base model's own network, or any
      pytree of parameters. For adapters of a network, pass
      `model=jax.tree_util.Partial(build, network)`, where `build(network, adapters)` returns
      `from_velocity(lora.merge(network, adapters), shape=...)`.
    - `base`: the model to stay close to; it is not changed. `reward`: any function of one sample,
      finite for all samples.
    - `scale`: of the tilt. A higher scale allows more divergence. With `math.inf` only the end of
      training, after `steps` steps, limits the collapse to the best sample.
    - `model`: a function from a network to a model, with the states and the interpolant of the
      base.
    - `objective`: `reparametrized(last_steps)`, by default with all steps, or `policy_gradient`.
    - `batch_size`: the number of trajectories in a training step.
    - `times`: of the chain, increasing to 1, by default `base.grid(50)`. Fewer times cost less, but
      change the base model's law more.
    - `learning_rate`, by default 1e-4, `optimizer`, `ema`, `checkpoint`, `checkpoint_every`,
      `progress`: as in `fit`. A checkpoint identifies rewards and models by their names and their
      arrays.

    **Returns:** `Fit(network, average, curve)`. The curve's loss is minus the objective, at least
    `-log Z_N / scale` up to the noise of the batch, with the Z_N of the base chain on `times`.

    **Raises:** `ValueError` for models that do not fit together, token models, times that do not
    end at 1, a reward without a gradient if the objective needs one, and then also for a reward of
    -inf; `FloatingPointError` for a loss that is not finite, with its step.
    """
    key = _checks.key(key)
    scale = _checks.number(scale, "scale", 0, math.inf, closed="right")
    batch_size = _checks.count(batch_size, "batch_size")
    objective = _check_objective(objective, batch_size)
    build = _check_models(base, model, network)
    rollout = _rollout(base, reward, scale, times, batch_size)
    name = callable_name(reward)
    if isinstance(objective, Reparametrized):
        _check_gradient(rollout, name, key)
    loss = _Loss(rollout, build, objective)
    settings = {}
    if checkpoint is not None:
        settings = _settings(loss, scale, {"reward": name, "model": callable_name(model)})
    if learning_rate is None and optimizer is None:
        learning_rate = 1e-4
    with _named_failure(name):
        return minimize(
            key,
            network,
            loss,
            steps=steps,
            learning_rate=learning_rate,
            optimizer=optimizer,
            ema=ema,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            settings=settings,
            progress=progress,
        )


def _rollout(base: Model, reward: Callable, scale: float, times: Array | None, num: int) -> Rollout:
    """The setting for the trajectories of a training step."""
    times = resolve_times(base, Ancestral(), 50 if times is None else None, times)
    if len(times) < 3 or float(np.asarray(times)[-1]) != 1:
        raise ValueError(
            f"times must make at least two steps and end at 1, got {np.asarray(times)}"
        )
    rollout = Rollout(
        base,
        rewards.as_reward(reward),
        jnp.asarray(1 / scale, base.dtype),
        times,
        num=num,
        regularized=scale < math.inf,
    )
    return _pytree.cast(rollout, base.dtype)


@contextmanager
def _named_failure(reward: str) -> Iterator[None]:
    """Add the likely cause in the reward to the error for a loss that is not finite."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error}. finetune maximizes the mean of {reward}, which must be finite at every "
            f"sample: {_INSTEAD}"
        ) from None


def _settings(loss: _Loss, scale: float, names: dict[str, str]) -> dict[str, Any]:
    """The settings that a checkpoint records about a run."""
    rollout = loss.rollout
    return {
        "scale": scale,
        "batch_size": rollout.num,
        "objective": f"{loss.objective} {digest(loss.objective)}",
        "reward": f"{names['reward']} {digest(rollout.reward)}",
        "model": f"{names['model']} {digest(loss.build)}",
        "base": f"{type(rollout.base).__name__} {digest(rollout.base)}",
        "times": digest(rollout.times),
    }


def _check_objective(objective: Objective | None, batch_size: int) -> Objective:
    objective = Reparametrized(None) if objective is None else objective
    how = "reparametrized(last_steps) or policy_gradient"
    _checks.instance(objective, Objective, "objective", how)
    if isinstance(objective, PolicyGradient) and batch_size < 2:
        raise ValueError(
            f"policy_gradient compares trajectories and needs batch_size >= 2, got {batch_size}"
        )
    return objective


def _check_models(base: Model, model: Callable, network: Any) -> _pytree.Function:
    """The function from a network to a model, after a check that the model fits the base."""
    how = "use Analytic, from_velocity, from_noise or from_denoiser"
    _checks.instance(base, Model, "base", how)
    build = _pytree.Function(model, "model")
    tuned = build(network)
    how = "model= must be a function from the network to a model, such as from_velocity"
    _checks.instance(tuned, Model, "model(network)", how)
    check_pair(base, tuned, "finetune(key, base, tuned, reward)")
    return build


def _check_gradient(rollout: Rollout, name: str, key: Array) -> None:
    values, gradients = map(np.asarray, _reward_gradients(rollout, key))
    if np.any(excluded := values == -np.inf):
        raise ValueError(
            f"{name} is -inf at {excluded.sum()} of {rollout.num} samples of the base model. "
            "finetune maximizes the mean reward, which is then -inf for every network, because "
            f"Gaussian steps reach every state: {_INSTEAD}"
        )
    if not np.any(gradients):
        raise ValueError(
            f"reparametrized() needs a reward with a gradient, but the gradient is zero at all of "
            f"{rollout.num} samples of the base model: use "
            "objective=tiltjax.training.policy_gradient, which needs only values"
        )


@_callbacks.compiled
def _reward_gradients(rollout: Rollout, key: Array) -> tuple[Array, Array]:
    """The rewards and their gradients at the ends of base trajectories."""
    rollout, (key_start, key_run) = decomposed(rollout), jax.random.split(key)

    def advance(x, step):
        t, u, key = step
        return rollout.step(rollout.base, t, u, x, rollout.noise(key))[0], None

    x, _ = jax.lax.scan(advance, rollout.start(key_start), rollout.steps(key_run))
    value = lambda x: rewards.value(rollout.reward, x)
    return jax.vmap(jax.value_and_grad(value))(rollout.ends(x))


def _stop_gradient(model: Model) -> Model:
    stop = lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf
    return jax.tree.map(stop, model)
