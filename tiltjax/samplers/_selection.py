r"""Selection: choose among finished samples by their reward.

Particles form consecutive groups of n with one winner per group, so `num` samples give `num / n`.
Let p be the law of the particles and F the distribution function of their reward. Best-of-n has the
density `n F(r(x))^(n-1) p(x)` where F is continuous, and `p(x) (F(r)^n - F(r-)^n) / (F(r) - F(r-))`
at an atom `r = r(x)`. Best-of-n corrects the weights of modes, which gradients cannot do, and
overshoots the tilt for large n. The law of softmax-of-n tends to the tilt *of p* as n grows. For
unguided particles this is the tilt; guided particles are tilted twice.

Reference: Beirami et al. (arXiv 2401.01879), best-of-n. `theory.selection` has the laws of both.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree, _random, rewards
from tiltjax.particles import Particles, unweighted


def best_of_n(particles: Particles, reward: Callable, n: int) -> Particles:
    """The particle of largest reward in each consecutive group of `n`; of equal rewards, the first.

    **Raises:** `ValueError` if n does not divide the number of particles, or if the particles are
    weighted (`resample` weighted particles first); `FloatingPointError` for a reward that is NaN,
    or if a group has only rewards of -inf.
    """
    return _select(particles, reward, n, lambda values: jnp.argmax(values, axis=1))


def softmax_of_n(
    key: Array, particles: Particles, reward: Callable, n: int, scale: float | Array
) -> Particles:
    """One particle of each consecutive group of `n`, with probability proportional to
    `exp(scale * r)`.

    **Raises:** as `best_of_n`; `FloatingPointError` if a group has a reward of +inf.
    """
    key, scale = _checks.key(key), _checks.nonnegative(scale, "scale")

    def choose(values: Array) -> Array:
        best = jnp.max(values, axis=1, keepdims=True)
        if _checks.concrete(best) and (infinite := int(np.sum(np.asarray(best) == np.inf))):
            raise FloatingPointError(
                f"in {infinite} groups a candidate has the reward +inf, which has no softmax: "
                "bound the reward"
            )
        # Relative to the best of the group, to avoid 0 * inf at scale 0 and overflow at large
        # scales.
        logits = jnp.where(
            values == -jnp.inf, -jnp.inf, scale.astype(values.dtype) * (values - best)
        )
        return _random.categorical(key, logits, axis=1)

    return _select(particles, reward, n, choose)


def _select(
    particles: Particles, reward: Callable, n: int, choose: Callable[[Array], Array]
) -> Particles:
    n = _checks.count(n, "n")
    if not isinstance(particles, Particles):
        raise TypeError(
            f"particles must be Particles, got {type(particles).__name__}: pass the result of "
            "sample"
        )
    uneven = (
        _checks.concrete(particles.log_weights) and np.ptp(np.asarray(particles.log_weights)) > 0
    )
    if particles.log_norm is not None or uneven:
        raise ValueError(
            "selection needs unweighted particles, but these are weighted: use "
            "particles.resample(key, num) first"
        )
    num = len(particles)
    if num % n:
        fitting = " or ".join(str(total) for total in (num - num % n, num - num % n + n) if total)
        raise ValueError(
            f"groups of n = {n} must divide the {num} particles: sample {fitting} particles"
        )
    reward = _pytree.cast(rewards.as_reward(reward), particles.x.dtype)
    values = rewards.values(reward, particles.x).reshape(num // n, n)
    if _checks.concrete(values) and (missing := int(np.isnan(np.asarray(values)).sum())):
        raise FloatingPointError(
            f"the reward is NaN for {missing} of {num} particles: check the reward"
        )
    best = jnp.max(values, axis=1)
    if _checks.concrete(best) and (excluded := int(np.sum(np.asarray(best) == -np.inf))):
        raise FloatingPointError(
            f"in {excluded} of {num // n} groups every candidate has the reward -inf, so there is "
            "no winner: use larger groups, or a reward that is finite more often"
        )
    winners = jnp.arange(num // n) * n + choose(values)
    trace = particles.trace
    if trace is not None and trace.trajectory is not None:
        trace = eqx.tree_at(lambda trace: trace.trajectory, trace, trace.trajectory[:, winners])
    return unweighted(particles.x[winners], trace)
