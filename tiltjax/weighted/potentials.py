r"""Potentials: how weighted particles are weighed before t = 1, and at which steps.

A *twist* is an estimate of `log h_t(x)`, the log of the expected `exp(scale * r)` given the state.
Particles at time t carry A_t, the sum of the log-potentials that were applied so far. At t = 1 the
missing part is applied, so that on every trajectory

    sum of all log-potentials = scale * r(x_1).

The target is therefore the tilt for any potential and any twist, which change only the variance.
With V_t the twist and s the time before t,

| potential | A_t | |
|---|---|---|
| `Difference()` | `V_t` | the default: a weight changes by the change of the twist |
| `Max()` | `A_s + max(V_0, ..., V_t)` | favors trajectories with a high twist at one time |
| `Sum()` | `A_s + (V_0 + ... + V_t)` | favors trajectories with a high twist at many times |
| `Immediate()` | `A_s + V_t` | |

Reference: Singhal et al. (arXiv 2501.06848).
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _repr


class Potential(_repr.Printable):
    """How the sum of the applied log-potentials follows from the twist. Subclasses define
    `__call__(applied, memory, value)`.
    """

    def init(self) -> Any:
        """The memory of one trajectory before its first twist."""
        return ()

    def __call__(self, applied: Array, memory: Any, value: Array) -> tuple[Array, Any]:
        """The new sum of log-potentials and the new memory, for a twist of `value`; scalars."""
        raise NotImplementedError


class Difference(Potential):
    """`A_t = V_t`."""

    def __call__(self, applied, memory, value):
        return value, memory


class Max(Potential):
    """`A_t = A_s + max(V_0, ..., V_t)`."""

    def init(self):
        return jnp.asarray(-jnp.inf)

    def __call__(self, applied, memory, value):
        memory = jnp.maximum(memory.astype(value.dtype), value)
        return applied + memory, memory


class Sum(Potential):
    """`A_t = A_s + (V_0 + ... + V_t)`."""

    def init(self):
        return jnp.asarray(0.0)

    def __call__(self, applied, memory, value):
        memory = memory.astype(value.dtype) + value
        return applied + memory, memory


class Immediate(Potential):
    """`A_t = A_s + V_t`."""

    def __call__(self, applied, memory, value):
        return applied + value, memory


class Schedule(_repr.Printable):
    """The steps of a run after which particles are weighed and may be resampled. Subclasses define
    `steps(total)`, one boolean for each of `total` steps.
    """

    def steps(self, total: int) -> np.ndarray:
        raise NotImplementedError


class ResampleFractions(Schedule):
    """Weigh and resample after the steps nearest to these fractions of a run, such as
    `ResampleFractions(0.2, 0.4, 0.6, 0.8)`.

    **Raises:** `ValueError` without a fraction, or for a fraction outside (0, 1).
    """

    fractions: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, *fractions: float):
        if not fractions:
            raise ValueError("ResampleFractions got no fraction: pass one, ResampleFractions(0.5)")
        self.fractions = tuple(
            _checks.number(fraction, "a fraction of a run", 0, 1, closed="neither")
            for fraction in fractions
        )

    def _call(self, **given: Any) -> str:
        return f"ResampleFractions({', '.join(map(_repr.form, self.fractions))})"

    def steps(self, total: int) -> np.ndarray:
        chosen = np.zeros(total, bool)
        nearest = [round(fraction * total) for fraction in self.fractions]
        chosen[np.clip(nearest, 0, max(total - 2, 0))] = True  # no step follows the last step
        return chosen


class ResampleSchedule(Schedule):
    """Weigh and resample after the steps `start, start + n, ...` up to `stop` (inclusive; `None`:
    to the end). The last step always weighs.

    At other steps no twist is evaluated (except `Tuned`, which needs every state). The weights of a
    guided proposal accumulate at all steps.

    **Raises:** `ValueError` for a window without a step.
    """

    n: int = eqx.field(static=True, default=1)
    start: int = eqx.field(static=True, default=0)
    stop: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        _checks.count(self.n, "n")
        for name, step in (
            ("start", self.start),
            ("stop", self.start if self.stop is None else self.stop),
        ):
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise ValueError(f"{name} must be the index of a step, from 0, got {step!r}")
        if self.stop is not None and self.stop < self.start:
            raise ValueError(
                f"the window from step start = {self.start} to stop = {self.stop} holds no step: "
                "raise stop"
            )

    def steps(self, total: int) -> np.ndarray:
        """Which of `total` steps weigh, `(total,)`. **Raises:** `ValueError` for a window without a
        step before the last step.
        """
        index = np.arange(total)
        stop = total - 1 if self.stop is None else self.stop
        chosen = (index >= self.start) & (index <= stop) & ((index - self.start) % self.n == 0)
        if total > 1 and not np.any(chosen[:-1]):
            raise ValueError(
                f"no step to weigh at: {self} on {total} steps, numbered from 0. Use "
                "ResampleSchedule(1), or ess_threshold=0 to weigh only at the last step"
            )
        return chosen
