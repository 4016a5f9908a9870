"""Particles: a weighted population, which every verb returns or takes.

Weights are log-weights: added, never multiplied, unnormalised. A population that nothing has weighed has equal ones and
no normalising constant.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs

CULPRITS = (
    "the model's denoiser is not finite, here or where the guidance asked it (for a fitted reward: look at its gradient, too)",
    "the guidance's log_h is NaN or +inf: look at the reward's value",
    "the guidance's pull is not finite: look at the reward's gradient",
    "the state left the finite numbers in the solver's step: look at the times, the scale, and Adaptive's tolerance and max_steps",
)


class Trace(eqx.Module):
    """What happened on the way.

    `times`: `(steps + 1,)`. `bad`: `(steps, 4)`, whether in a step any particle met each of `CULPRITS`. `path`: the states at
    `times`, `(steps + 1, num, *shape)`, or `None` if they were not kept.
    """

    times: Array
    bad: Array
    path: Array | None = None

    def check(self) -> None:
        """Raise `FloatingPointError` naming the first bad step and its culprit, if there is one."""
        if not inputs.concrete(self.bad) or not np.any(np.asarray(self.bad)):
            return
        bad = np.asarray(self.bad)
        step = int(np.argmax(bad.any(axis=1)))
        what = CULPRITS[int(np.argmax(bad[step]))]
        raise FloatingPointError(
            f"sampling failed in step {step} of {len(bad)}, from t = {float(self.times[step]):.4g}: {what}"
        )


class Particles(eqx.Module):
    """A weighted population.

    - `x`: `(num, *shape)`.
    - `log_weights`: `(num,)`, unnormalised.
    - `log_norm`: the estimate of the log normalising constant, or `None` if nothing was weighed.
    - `trace`: how it came about, or `None`.
    """

    x: Array
    log_weights: Array
    log_norm: Array | None = None
    trace: Trace | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def weights(self) -> Array:
        """Normalised weights, `(num,)`."""
        return jax.nn.softmax(self.log_weights)

    @property
    def ess(self) -> Array:
        """The effective sample size `(sum w)^2 / sum w^2`, between 1 and `num`."""
        return jnp.exp(2 * jax.nn.logsumexp(self.log_weights) - jax.nn.logsumexp(2 * self.log_weights))

    def mean(self, fn=None) -> Array:
        """The weighted mean of `fn(x)` over the population (of x itself by default)."""
        values = self.x if fn is None else jax.vmap(fn)(self.x)
        return jnp.tensordot(self.weights.astype(values.dtype), values, axes=1)

    def resample(self, key: Array, num: int | None = None) -> Array:
        """`num` unweighted samples, `(num, *shape)`: systematic resampling in random order."""
        key_offset, key_order = jax.random.split(inputs.typed_key(key))
        num = len(self) if num is None else inputs.count(num, "num")
        weights = self.weights
        offsets = (jnp.arange(num, dtype=weights.dtype) + jax.random.uniform(key_offset, (), weights.dtype)) / num
        cumulative = jnp.cumsum(weights)
        ancestors = jnp.searchsorted(cumulative / cumulative[-1], offsets, side="right")
        ancestors = jnp.minimum(ancestors, len(self) - 1)
        return self.x[jax.random.permutation(key_order, ancestors)]


def unweighted(x: Array, trace: Trace | None = None) -> Particles:
    """A population that nothing has weighed."""
    dtype = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    return Particles(x, jnp.zeros(x.shape[0], dtype), None, trace)
