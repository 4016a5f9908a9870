r"""Fine-tuning: a network that samples the tilt by itself.

A tuned model D' runs the base model's chain, the same kernels `N(keep x + gain D, std^2 I)` with D'
in the place of D (see `tiltjax.solvers`), and the base model's last jump. Its paths Q are trained
to be rewarded, and to stay close to those of the base chain, P:

    maximize  E_Q[r(x_1)] - KL(Q | P) / scale,
        KL(Q | P) = E_Q sum over steps of |gain (D' - D)|^2 / (2 std^2).

The maximum is `log Z / scale`, reached by `dP exp(scale r) / Z` alone; at eta = 1 the noise that a
path starts from is forgotten at its end, and the ends have the law `rho exp(scale r) / Z`. What the
objective lacks of its maximum is `KL(Q | tilt) / scale`: the loss says how far it is, where log Z
is known.

A reward of -inf, which smc takes, has no place here: the tilt has no mass there, but Gaussian steps
of any network have, and `E_Q[r]` is -inf for all.

Without the divergence, `scale = inf`, the maximum is a point mass where the reward is largest:
nothing but an early stop keeps a network from collapsing on it. The weight 1 / (2 std^2) of a step
belongs to the divergence; without it, as in published code, what is reached is no tilt.

| objective | gradient | needs |
|---|---|---|
| `reparametrized(through)` | of the path as a function of its noise | a reward with a gradient |
| `policy_gradient` | `sum A ∇ log K(x_u \| x_t)`, A the advantage | values of the reward only |

Both have the mean `∇ objective`, `reparametrized` if it goes through all steps. Through the last K
only it is DRaFT-K (K = 1 by default there): divergence and reward are then felt in these steps
alone. A step of the policy gradient is taken on new paths, so that ratios of densities, and their
clipping, have no part in it.

References: Clark et al. (arXiv 2309.17400), DRaFT; Black et al. (arXiv 2305.13301), DDPO, and Fan
et al. (arXiv 2305.16381), with the divergence; Uehara et al. (arXiv 2402.15194), the tilt as its
optimum; Domingo-Enrich et al. (arXiv 2409.08861), why eta = 1.
"""

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree, external, rewards
from tiltjax.models import Model, check_pair
from tiltjax.samplers import resolve_times
from tiltjax.solvers import Ancestral, Kernel
from tiltjax.training._checkpoints import callable_name, digest
from tiltjax.training._loop import Fit, minimize

if TYPE_CHECKING:
    import optax
_INSTEAD = "give what must not be a finite penalty, and leave -inf to the weights of smc"


class Chain(eqx.Module):
    """The base chain, the reward of its end, and the weight `cost = 1 / scale` of a divergence;
    `num` paths at a time.
    """

    base: Model
    reward: rewards.Reward
    cost: Array
    times: Array
    num: int = eqx.field(static=True)
    regularized: bool = eqx.field(static=True)

    def start(self, key: Array) -> Array:
        """The first states of `num` paths."""
        return jax.vmap(lambda key: self.base.initial(key, self.times[0]))(
            jax.random.split(key, self.num)
        )

    def step(
        self, model: Model, t: Array, u: Array, x: Array, noise: Array
    ) -> tuple[Array, Array, Kernel, Array]:
        """All paths from t to u: states, divergences `(num,)`, the kernel, and the tuned
        denoiser.
        """
        kernel = Ancestral().kernel(self.base.interpolant, t, u)
        tuned = model.denoise_batch(t, x)
        cost = jnp.zeros(self.num, x.dtype)
        if self.regularized:
            shift = kernel.gain / kernel.std * (tuned - self.base.denoise_batch(t, x))
            cost = self.cost * jnp.sum(shift.reshape(self.num, -1) ** 2, axis=1) / 2
        return kernel.keep * x + kernel.gain * tuned + kernel.std * noise, cost, kernel, tuned

    def finish(self, x: Array) -> Array:
        """The rewards of paths that are at `times[-2]`, `(num,)`."""
        value = lambda x: rewards.value(self.reward, x)
        return jax.vmap(value)(self.base.denoise_batch(self.times[-2], x)).astype(x.dtype)

    def noise(self, key: Array) -> Array:
        """That of a step."""
        return jax.random.normal(key, (self.num, *self.base.shape), self.base.dtype)


class Objective(eqx.Module):
    """How the objective is estimated; subclasses define `__call__(chain, model, key)`, a scalar
    whose gradient descent follows.
    """

    def __call__(self, chain: Chain, model: Model, key: Array) -> Array:
        """Minus the objective, from `chain.num` paths of the model."""
        raise NotImplementedError


class Reparametrized(Objective):
    """`reparametrized`."""

    through: int | None = eqx.field(static=True)

    def __call__(self, chain, model, key):
        key_start, key_run = jax.random.split(key)
        inner = len(chain.times) - 2
        scanned = chain.times[:-2], chain.times[1:-1], jax.random.split(key_run, inner)
        live = inner if self.through is None else min(self.through, inner)

        def advance(model: Model):
            def step(carry, scanned):
                x, total = carry
                t, u, key = scanned
                x, cost, *_ = chain.step(model, t, u, x, chain.noise(key))
                return (x, total + cost), None

            return step

        carry = chain.start(key_start), jnp.zeros(chain.num, chain.base.dtype)
        early, late = (
            jax.tree.map(part, scanned)
            for part in (lambda a: a[: inner - live], lambda a: a[inner - live :])
        )
        carry, _ = jax.lax.scan(advance(_still(model)), carry, early)
        # Each step again on the way back: a path's memory is its states, whatever the network.
        (x, total), _ = jax.lax.scan(jax.checkpoint(advance(model)), carry, late)
        return -jnp.mean(chain.finish(x) - total)


class PolicyGradient(Objective):
    """`policy_gradient`."""

    def __call__(self, chain, model, key):
        key_start, key_run = jax.random.split(key)
        scanned = (
            chain.times[:-2],
            chain.times[1:-1],
            jax.random.split(key_run, len(chain.times) - 2),
        )

        def roll(x, scanned):
            t, u, key = scanned
            noise = chain.noise(key)
            moved, cost, *_ = chain.step(_still(model), t, u, x, noise)
            return moved, (x, noise, cost)

        end, (states, noises, costs) = jax.lax.scan(roll, chain.start(key_start), scanned)
        values = jax.lax.stop_gradient(chain.finish(end))
        # What a step still earns: costs before it are not its doing, its own has a gradient of its
        # own.
        later = jnp.cumsum(costs[::-1], axis=0)[::-1] - costs
        earned = values[None] - later
        others = (jnp.sum(earned, axis=1, keepdims=True) - earned) / (chain.num - 1)
        advantage = jax.lax.stop_gradient(earned - others)

        def score(total, scanned):
            t, u, x, noise, advantage = scanned
            _, cost, kernel, tuned = chain.step(model, t, u, x, noise)
            # log K(x_u | x_t) moves with D' by <noise, gain dD'> / std.
            slope = (
                kernel.gain / kernel.std * jnp.sum((noise * tuned).reshape(chain.num, -1), axis=1)
            )
            return total + jnp.mean(advantage * slope - cost), None

        total, _ = jax.lax.scan(
            jax.checkpoint(score),
            jnp.zeros((), chain.base.dtype),
            (*scanned[:2], states, noises, advantage),
        )
        objective = jnp.mean(values - jnp.sum(costs, axis=0))
        return -(jax.lax.stop_gradient(objective - total) + total)


def reparametrized(through: int | None = None) -> Reparametrized:
    """Backpropagation through the last `through` steps of the chain, all of them by default: DRaFT,
    and with K = 1 ReFL's way.
    """
    return Reparametrized(None if through is None else _checks.count(through, "through"))


policy_gradient = PolicyGradient()


class _Loss(eqx.Module):
    """Minus the objective, as a function of the network and a key."""

    chain: Chain
    build: _pytree.Function
    objective: Objective

    def __call__(self, network: Any, key: Array) -> Array:
        model = _pytree.cast(self.build(network), self.chain.base.dtype)
        return self.objective(self.chain, model, key)


@external.failures()
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
    """Train a network until the base model's chain, run with it, samples `rho exp(scale r)`, as far
    as it can.

    ```
    build = lambda network: tj.from_velocity(network, shape=(2,))
    fit = tj.finetune(key, network, build(network), reward, scale=3.0, model=build, steps=500)
    tj.audit(key, base, tj.Tuned(base, build(fit.average), reward=reward, scale=3.0), num=1000)
        how far it came
    ```

    **Arguments:**

    - `key`: decides paths.
    - `network`: what is trained, from where it is: the base model's own network, or any pytree of
      parameters, such as adapters of it with
      `model=jax.tree_util.Partial(build, network)`, where `build(network, adapters)` returns
      `from_velocity(lora.merge(network, adapters), shape=...)`.
    - `base`: the model to stay close to, left as it is. `reward`: any function of one sample,
      finite at all of them.
    - `scale`: of the tilt; a higher one allows more divergence, `math.inf` any: then nothing but
      `steps` ends the collapse on the best sample.
    - `model`: what makes a model of the network, of the same states and on the same path as the
      base.
    - `objective`: `reparametrized(through)`, by default through all steps, or `policy_gradient`.
    - `batch_size`: paths in a step.
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
    _checks.instance(
        base, Model, "base", "use Analytic, from_velocity, from_noise or from_denoiser"
    )
    objective = Reparametrized(None) if objective is None else objective
    _checks.instance(
        objective, Objective, "objective", "reparametrized(through) or policy_gradient"
    )
    build = _pytree.Function(model, "model")
    tuned = build(network)
    _checks.instance(
        tuned,
        Model,
        "model(network)",
        "as model= give what makes a model of the network, such as from_velocity",
    )
    check_pair(base, tuned, "finetune")
    try:
        scale = float(scale)
    except (TypeError, ValueError):
        raise TypeError(
            f"scale must be one number, got {scale!r}: it is not swept in one run"
        ) from None
    if not scale > 0:
        raise ValueError(
            f"scale must be positive, or math.inf for no divergence at all, got {scale:g}"
        )
    batch_size = _checks.count(batch_size, "batch_size")
    if isinstance(objective, PolicyGradient) and batch_size < 2:
        raise ValueError("policy_gradient compares paths with each other: batch must be at least 2")
    times = resolve_times(base, Ancestral(), 50 if times is None else None, times)
    if len(times) < 3 or float(np.asarray(times)[-1]) != 1:
        raise ValueError(
            f"times must make two steps or more, and end at 1, got {np.asarray(times)}"
        )
    cost = jnp.asarray(1 / scale, base.dtype)
    chain = Chain(
        base, rewards.as_reward(reward), cost, times, num=batch_size, regularized=scale < math.inf
    )
    chain = _pytree.cast(chain, base.dtype)
    if isinstance(objective, Reparametrized):
        _check_gradient(chain, callable_name(reward), key)
    settings: dict[str, Any] = {}
    if checkpoint is not None:
        told = lambda name, tree: f"{name} {digest(eqx.filter(tree, eqx.is_array))}"
        settings = {
            "scale": scale,
            "batch_size": batch_size,
            "objective": told(objective, objective),
        }
        settings |= {
            "reward": told(callable_name(reward), chain.reward),
            "model": told(callable_name(model), build),
        }
        settings |= {"base": told(type(base).__name__, base), "times": digest(times)}
    if learning_rate is None and optimizer is None:
        learning_rate = 1e-4
    kept: dict[str, Any] = {
        "checkpoint": checkpoint,
        "checkpoint_every": checkpoint_every,
        "settings": settings,
        "progress": progress,
    }
    loss = _Loss(chain, build, objective)
    try:
        return minimize(
            key,
            network,
            loss,
            steps=steps,
            learning_rate=learning_rate,
            optimizer=optimizer,
            ema=ema,
            **kept,
        )
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error}. The mean of {callable_name(reward)} is maximized, which has to be finite at "
            f"every sample: {_INSTEAD}"
        ) from None


@eqx.filter_jit
def _looks(chain: Chain, key: Array) -> tuple[Array, Array]:
    """The reward and its slope at the ends of base paths."""
    key_start, key_run = jax.random.split(key)
    step = lambda x, scanned: (
        chain.step(chain.base, scanned[0], scanned[1], x, chain.noise(scanned[2]))[0],
        None,
    )
    keys = jax.random.split(key_run, len(chain.times) - 2)
    x, _ = jax.lax.scan(step, chain.start(key_start), (chain.times[:-2], chain.times[1:-1], keys))
    value = lambda x: rewards.value(chain.reward, x)
    return jax.vmap(jax.value_and_grad(value))(chain.base.denoise_batch(chain.times[-2], x))


def _check_gradient(chain: Chain, name: str, key: Array) -> None:
    values, slopes = map(np.asarray, _looks(chain, key))
    if np.any(excluded := values == -np.inf):
        raise ValueError(
            f"{name} is -inf at {excluded.sum()} of {chain.num} samples of the base model, and so "
            "is then its mean, which finetune "
            f"maximizes, for every network, as Gaussian steps reach everything: {_INSTEAD}"
        )
    if not np.any(slopes):
        raise ValueError(
            f"the reward has no gradient at any of {chain.num} samples of the base model, which "
            "reparametrized() needs: "
            "use objective=finetuning.policy_gradient, which asks for values only"
        )


def _still(model: Model) -> Model:
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, model
    )
