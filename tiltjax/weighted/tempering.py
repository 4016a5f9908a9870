r"""Tempering: by what factor twists, and the shift of a guidance, count at each time.

The factor b_t rises to one: early on, where a twist knows little, it selects less. The target is
the tilt whatever the factors are.

| tempering | after step i, from 0 |
|---|---|
| `Exponential(gamma, steps)` | `min((1 + gamma)^i - 1, 1)` |
| `Polynomial(power, gamma)` | `min((gamma i)^power, 1)` |
| `AdaptiveTempering(ess)` | the largest that leaves the effective sample size `ess * num` |

Reference: Kim et al. (arXiv 2501.05803), for the first two.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _repr
from tiltjax.particles import effective


class Tempering(_repr.Printable):
    """By what factor twists count; subclasses define `factors(steps)`, one for the state after each
    step, the last of them 1.
    """

    def factors(self, steps: int) -> Array:
        raise NotImplementedError


class Exponential(Tempering):
    """`b_i = min((1 + gamma)^i - 1, 1)` after step i, from 0.

    **Arguments:** `gamma`, by default the one that gets there in time; `steps`, for how many steps
    `gamma` is meant: a run of N steps reaches the same factors at the same fractions of its way, as
    `(1 + gamma)^((steps - 1) / (N - 1)) - 1` does. By default `gamma` is that of any run.
    """

    gamma: Array | None
    steps: int | None = eqx.field(static=True)

    def __init__(self, gamma: float | Array | None = None, steps: int | None = None):
        self.gamma = None if gamma is None else _checks.positive(gamma, "gamma")
        self.steps = None if steps is None else _checks.count(steps, "steps", 2)

    def factors(self, steps: int) -> Array:
        least = 2 ** (1 / max(steps - 1, 1)) - 1
        rate = jnp.log1p(least if self.gamma is None else self.gamma)
        if self.steps is not None:
            rate = rate * ((self.steps - 1) / max(steps - 1, 1))
        factors = jnp.minimum(jnp.expm1(jnp.arange(steps, dtype=float) * rate), 1.0)
        return _complete(factors, f"gamma of at least {least:.3g}")


class Polynomial(Tempering):
    """`b_i = min((gamma i)^power, 1)` after step i, from 0. **Arguments:** `power`; `gamma`, by
    default the one that gets there in time.
    """

    power: Array
    gamma: Array | None

    def __init__(self, power: float | Array = 1.0, gamma: float | Array | None = None):
        self.power = _checks.positive(power, "power")
        self.gamma = None if gamma is None else _checks.positive(gamma, "gamma")

    def factors(self, steps: int) -> Array:
        least = 1 / max(steps - 1, 1)
        gamma = least if self.gamma is None else self.gamma
        return _complete(
            jnp.minimum((gamma * jnp.arange(steps, dtype=float)) ** self.power, 1.0),
            f"gamma of at least {least:.3g}",
        )


class AdaptiveTempering(Tempering):
    """Each factor is the largest of 65 between 0 and 1 that leaves an effective sample size of
    `ess * num`; else the one that leaves most.

    It may fall again: twists that agree early on, when they know nothing, allow any factor. For
    `Difference()` and proposals without `Children`, resampled as soon as the effective sample size
    is below `ess_threshold * num`, `ess_threshold > ess`. That the factors depend on the particles
    leaves the normalizing constant unbiased. **Arguments:** `ess` in (0, 1).

    **Raises:** `ValueError` for an `ess` outside (0, 1).
    """

    ess: Array

    def __init__(self, ess: float | Array = 0.7):
        self.ess = _checks.in_range(ess, "ess", 0, 1, closed="neither")

    def choose(self, weigh: Callable[[Array], Array], num: int, dtype: Any) -> Array:
        """The factor, from the `num` log-weights `weigh(factor)` that it would leave."""
        factors = (jnp.arange(65, dtype=dtype) / 64) ** 2
        fractions = jax.lax.map(lambda factor: effective(weigh(factor)) / num, factors)
        enough = fractions >= self.ess.astype(dtype)
        largest = jnp.max(jnp.where(enough, factors, 0.0))
        return jnp.where(jnp.any(enough), largest, factors[jnp.argmax(fractions)])


def _complete(factors: Array, remedy: str) -> Array:
    """Exactly one at the end, up to the rounding of a power; a single step is the end."""
    if len(factors) == 1:
        return jnp.ones_like(factors)
    if _checks.concrete(factors) and not float(np.asarray(factors)[-1]) > 1 - 1e-3:
        raise ValueError(
            f"tempering must end at one, this one ends at {float(np.asarray(factors)[-1]):.3g} "
            f"after {len(factors)} steps: take {remedy}, or more steps"
        )
    return factors.at[-1].set(1.0)
