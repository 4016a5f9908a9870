r"""Fine-tuning: a network that samples the tilt by itself.

A tuned model D' runs the chain of the base model: the same kernels `N(keep x + gain D, std^2 I)`
with D' in the place of D (see `tiltjax.solvers`), and the base model's last jump. Its trajectories
have the law Q, those of the base chain the law P. Training maximizes their reward, and keeps Q
close to P:

    maximize  E_Q[r(x_1)] - KL(Q | P) / scale,
        KL(Q | P) = E_Q sum over steps of |gain (D' - D)|^2 / (2 std^2).

The maximum is `log Z / scale`, reached by `dP exp(scale r) / Z` alone. At eta = 1 the end of a
trajectory does not depend on the noise at its start, and the ends have the law
`rho exp(scale r) / Z`. The objective is below its maximum by `KL(Q | tilt) / scale`: where log Z is
known, the loss says how far the network is from the tilt.

A reward of -inf, which `smc` takes, is refused here: the tilt has no mass there, but Gaussian steps
of any network have, and `E_Q[r]` is -inf for all.

Without the divergence, `scale = inf`, the maximum is a point mass where the reward is largest:
only an early stop keeps a network from collapsing on it. The weight 1 / (2 std^2) of a step belongs
to the divergence; without it, as in published code, the optimum is no tilt.

| objective | gradient | needs |
|---|---|---|
| `reparametrized(last_steps)` | of trajectories as functions of noise | a reward with a gradient |
| `policy_gradient` | `sum A ∇ log K(x_u \| x_t)`, A the advantage | values of the reward only |

Both have the mean `∇ objective`; `reparametrized` if it goes through all steps. Through the last K
steps only it is DRaFT-K: the gradients of divergence and reward then come from these steps alone. A
step of the policy gradient uses new trajectories, so it needs no ratios of densities and no
clipping of them.

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

_INSTEAD = "give excluded samples a finite penalty, and leave -inf to the weights of smc"


class Rollout(eqx.Module):
    """How `num` trajectories of a model are run and scored: the base model, the reward of their
    ends, the times, and the weight `kl_weight = 1 / scale` of the divergence from the base chain.
    """

    base: Model
    reward: rewards.Reward
    kl_weight: Array
    times: Array
    num: int = eqx.field(static=True)
    regularized: bool = eqx.field(static=True)

    def start(self, key: Array) -> Array:
        """The first states, `(num, *shape)`."""
        first = lambda key: self.base.initial(key, self.times[0])
        return jax.vmap(first)(jax.random.split(key, self.num))

    def steps(self, key: Array) -> tuple[Array, Array, Array]:
        """The beginning, the end and the key of each step before the last jump."""
        return self.times[:-2], self.times[1:-1], jax.random.split(key, len(self.times) - 2)

    def noise(self, key: Array) -> Array:
        """The noise of one step."""
        return jax.random.normal(key, (self.num, *self.base.shape), self.base.dtype)

    def step(
        self, model: Model, t: Array, u: Array, x: Array, noise: Array
    ) -> tuple[Array, Array, Kernel, Array]:
        """From t to u: the next states, the weighted divergences `(num,)`, the kernel, and the
        denoiser of the tuned model.
        """
        kernel = Ancestral().kernel(self.base.interpolant, t, u)
        tuned = model.denoise_batch(t, x)
        divergence = jnp.zeros(self.num, x.dtype)
        if self.regularized:
            shift = kernel.gain / kernel.std * (tuned - self.base.denoise_batch(t, x))
            divergence = self.kl_weight * jnp.sum(shift.reshape(self.num, -1) ** 2, axis=1) / 2
        return kernel.keep * x + kernel.gain * tuned + kernel.std * noise, divergence, kernel, tuned

    def ends(self, x: Array) -> Array:
        """The last jump, from `times[-2]`."""
        return self.base.denoise_batch(self.times[-2], x)

    def end_rewards(self, x: Array) -> Array:
        """The rewards of the ends of trajectories that are at `times[-2]`, `(num,)`."""
        value = lambda x: rewards.value(self.reward, x)
        return jax.vmap(value)(self.ends(x)).astype(x.dtype)


class Objective(eqx.Module):
    """How the objective is estimated; subclasses define `__call__(rollout, model, key)`, a scalar
    that gradient descent minimizes.
    """

    def __call__(self, rollout: Rollout, model: Model, key: Array) -> Array:
        """Minus the objective, from `rollout.num` trajectories of the model."""
        raise NotImplementedError


class Reparametrized(Objective):
    """`reparametrized`."""

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
        # The backward pass computes each step again: it stores the states only, whatever the
        # network.
        (x, total), _ = jax.lax.scan(jax.checkpoint(advance(model)), carry, late)
        return -jnp.mean(rollout.end_rewards(x) - total)


class PolicyGradient(Objective):
    """`policy_gradient`."""

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
            # log K(x_u | x_t) moves with D' by <noise, gain dD'> / std.
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
    """What each step of each trajectory still earns, less the mean of the other trajectories,
    `(steps, num)`.
    """
    # Earlier divergences do not depend on a step; its own has a gradient of its own.
    later = jnp.cumsum(divergences[::-1], axis=0)[::-1] - divergences
    earned = values[None] - later
    baseline = (jnp.sum(earned, axis=1, keepdims=True) - earned) / (len(values) - 1)
    return jax.lax.stop_gradient(earned - baseline)


def reparametrized(last_steps: int | None = None) -> Reparametrized:
    """Backpropagation through the last `last_steps` steps of the chain, all of them by default:
    DRaFT, and with one step ReFL.
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
    """Train a network such that the base model's chain, run with it, samples `rho exp(scale r)` as
    closely as the network can.

    ```
    build = lambda network: tj.from_velocity(network, shape=(2,))
    fit = tj.finetune(key, network, build(network), reward, scale=3.0, model=build, steps=500)
    tuned = tj.Tuned(base, build(fit.average), reward=reward, scale=3.0)
    report = tj.audit(key, base, tuned, num=1000)  # how far it is from the tilt
    ```

    **Arguments:**

    - `key`: decides the trajectories.
    - `network`: what is trained, from where it is: the base model's own network, or any pytree of
      parameters, such as adapters of it with
      `model=jax.tree_util.Partial(build, network)`, where `build(network, adapters)` returns
      `from_velocity(lora.merge(network, adapters), shape=...)`.
    - `base`: the model to stay close to, left as it is. `reward`: any function of one sample,
      finite at all of them.
    - `scale`: of the tilt; a higher one allows more divergence, `math.inf` any: then nothing but
      `steps` ends the collapse on the best sample.
    - `model`: makes a model of the network, of the same states and interpolant as the base.
    - `objective`: `reparametrized(last_steps)`, by default through all steps, or `policy_gradient`.
    - `batch_size`: trajectories in a training step.
    - `times`: of the chain, increasing to 1, by default `base.grid(50)`. The fewer, the cheaper,
      and the less like the base model.
    - `learning_rate`, by default 1e-4, `optimizer`, `ema`, `checkpoint`, `checkpoint_every`,
      `progress`: as in `fit`. Rewards and models of one name are told apart by their arrays.

    **Returns:** `Fit(network, average, curve)`; the curve's loss is minus the objective, and never
    below `-log Z / scale` but for the batch's noise.

    **Raises:** `ValueError` for models that do not fit together, tokens, times that do not end at
    1, and a reward without gradient where one is needed, or -inf there; `FloatingPointError` naming
    the step whose loss is not finite.
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
    """The trajectories of a training step."""
    times = resolve_times(base, Ancestral(), 50 if times is None else None, times)
    if len(times) < 3 or float(np.asarray(times)[-1]) != 1:
        raise ValueError(
            f"times must make two steps or more, and end at 1, got {np.asarray(times)}"
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
    """Add to a loss that is not finite what of the reward may be the cause."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error}. The mean of {reward} is maximized, which has to be finite at every sample: "
            f"{_INSTEAD}"
        ) from None


def _settings(loss: _Loss, scale: float, names: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint records about a run."""
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
        raise ValueError("policy_gradient compares trajectories: batch_size must be at least 2")
    return objective


def _check_models(base: Model, model: Callable, network: Any) -> _pytree.Function:
    """What makes a model of a network, after a try that it fits the base."""
    how = "use Analytic, from_velocity, from_noise or from_denoiser"
    _checks.instance(base, Model, "base", how)
    build = _pytree.Function(model, "model")
    tuned = build(network)
    how = "model= is a function that makes a model of the network, such as from_velocity"
    _checks.instance(tuned, Model, "model(network)", how)
    check_pair(base, tuned, "finetune")
    return build


def _check_gradient(rollout: Rollout, name: str, key: Array) -> None:
    values, gradients = map(np.asarray, _reward_gradients(rollout, key))
    if np.any(excluded := values == -np.inf):
        raise ValueError(
            f"{name} is -inf at {excluded.sum()} of {rollout.num} samples of the base model. "
            "finetune maximizes its mean, which is then -inf for every network, as Gaussian steps "
            f"reach everything: {_INSTEAD}"
        )
    if not np.any(gradients):
        raise ValueError(
            f"the reward has no gradient at any of {rollout.num} samples of the base model, which "
            "reparametrized() needs: use objective=tiltjax.training.policy_gradient, which needs "
            "values only"
        )


@_callbacks.compiled
def _reward_gradients(rollout: Rollout, key: Array) -> tuple[Array, Array]:
    """The reward and its gradient at the ends of base trajectories."""
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
