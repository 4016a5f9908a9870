r"""Tempering: a factor of the twists, and of the shift of a guidance, at each time.

The factor b_t rises to one. Early in a run, where a twist is inaccurate, a small factor weakens the
selection. The target is the tilt for any factors.

| tempering | after step i, from 0 |
|---|---|
| `Exponential(gamma, steps)` | `min((1 + gamma)^i - 1, 1)` |
| `Polynomial(power, gamma)` | `min((gamma i)^power, 1)` |
| `AdaptiveTempering(ess)` | the largest factor that leaves the effective sample size `ess * num` |

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
    """Factors of the twists. Subclasses define `factors(steps)`, one factor for the state after
    each step. The last factor is 1.
    """

    def factors(self, steps: int) -> Array:
        raise NotImplementedError


class Exponential(Tempering):
    """`b_i = min((1 + gamma)^i - 1, 1)` after step i, from 0.

    **Arguments:** `gamma`, by default the smallest value for which the last factor is 1; `steps`,
    the number of steps for which `gamma` is meant. A run of N steps then has the same factors at
    the same fractions of the run, `(1 + gamma)^((steps - 1) / (N - 1)) - 1` in place of `gamma`.
    Without `steps`, `gamma` is used in a run of any length.

    **Raises:** `ValueError` in a run whose last factor is below 1.
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
    """`b_i = min((gamma i)^power, 1)` after step i, from 0.

    **Arguments:** `power`; `gamma`, by default the smallest value for which the last factor is 1.

    **Raises:** `ValueError` in a run whose last factor is below 1.
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
    """Each factor is the largest of 65 values between 0 and 1 that leaves an effective sample size
    of `ess * num`. If none does, it is the factor that leaves the largest effective sample size.

    The factor may fall again: early twists contain little information, agree, and allow any factor.
    For `Difference()` and proposals without `Children`; particles are resampled if the effective
    sample size is below `ess_threshold * num`, and `ess_threshold` must be above `ess`. The factors
    depend on the particles, but the normalizing constant stays unbiased.

    **Arguments:** `ess` in (0, 1).

    **Raises:** `ValueError` for an `ess` outside (0, 1).
    """

    ess: Array

    def __init__(self, ess: float | Array = 0.7):
        self.ess = _checks.in_range(ess, "ess", 0, 1, closed="neither")

    def choose(self, weigh: Callable[[Array], Array], num: int, dtype: Any) -> Array:
        """The factor, from the `num` log-weights `weigh(factor)` that a factor leads to."""
        factors = (jnp.arange(65, dtype=dtype) / 64) ** 2
        fractions = jax.lax.map(lambda factor: effective(weigh(factor)) / num, factors)
        enough = fractions >= self.ess.astype(dtype)
        largest = jnp.max(jnp.where(enough, factors, 0.0))
        return jnp.where(jnp.any(enough), largest, factors[jnp.argmax(fractions)])


def _complete(factors: Array, remedy: str) -> Array:
    """The factors with the last one set to exactly one, to which it is equal up to rounding. A
    single step is the last step.
    """
    if len(factors) == 1:
        return jnp.ones_like(factors)
    if _checks.concrete(factors) and not float(np.asarray(factors)[-1]) > 1 - 1e-3:
        raise ValueError(
            f"tempering must end at one, got {float(np.asarray(factors)[-1]):.3g} after "
            f"{len(factors)} steps: use {remedy}, or more steps"
        )
    return factors.at[-1].set(1.0)
