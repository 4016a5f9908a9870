r"""`Annealed`: between a base model and one that was fine-tuned on a reward, by time.

With the share `g(t)` of the tuned model, rising from 0 (noise) to 1 (data),

    D = (1 - g) D_base + g D_tuned,

and velocities, scores and noises mix alike: at each time the score is that of `p_base^(1 - g) p_tuned^g`. Early on, where modes are chosen, the
base model speaks, which knows all of them; late, where details are, the tuned one. Annealed importance guidance (AIG, arXiv 2409.06493) is this
with

| weight | g(t) | in the published code |
|---|---|---|
| `power(p)` | `t^p` | `linear` (p = 1), `power_2`, `power_4` |
| `step(f)` | 0 before f, then 1 | `step_0.6` |
| a number | itself, at all times | |

The marginals of such a sampler are not those geometric means, and no reward is involved: where it lands is between the two, and no more is promised.
Each evaluation asks both models.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs
from tiltjax.interpolants import Interpolant
from tiltjax.models import Model


class Power(eqx.Module):
    """`t^p`; what `power` builds."""

    p: Array

    def __call__(self, t: Array) -> Array:
        return t**self.p


class Step(eqx.Module):
    """0 before `at`, then 1; what `step` builds."""

    at: Array

    def __call__(self, t: Array) -> Array:
        return jnp.where(t < self.at, jnp.zeros_like(t), jnp.ones_like(t))


def power(p: float | Array = 2.0) -> Power:
    """The weight `t^p`, p > 0: the larger, the longer the base model speaks."""
    return Power(inputs.positive(p, "p"))


def step(at: float | Array = 0.6) -> Step:
    """The base model before time `at`, the tuned one from then on."""
    return Step(_share(at, "at"))


class Annealed(Model):
    """`(1 - g(t)) D_base + g(t) D_tuned`: a model like any other, to sample, to guide, to tilt.

    Asked at another time than the sampler's, as `Tilted` and `Glass` do, it answers with the weight of that time.

    **Arguments:** `base`, `tuned`: models of the same states on the same path; `weight`: `power(p)` or `step(f)`, any function of t with values in
    [0, 1], or a number. **Raises:** `ValueError` for models that do not fit together.
    """

    base: Model
    tuned: Model
    weight: Any

    def __init__(self, base: Model, tuned: Model, weight: Callable[[Array], Array] | float | Array | None = None):
        inputs.instance(base, Model, "base", "Annealed(base, tuned, weight)")
        inputs.instance(tuned, Model, "tuned", "Annealed(base, tuned, weight)")
        if base.tokens or tuned.tokens:
            raise ValueError("Annealed mixes denoisers of numbers: models of tokens have other marginals in between")
        if base.shape != tuned.shape or base.dtype != tuned.dtype:
            raise ValueError(
                f"base and tuned must be models of the same states, got {base.shape} of {base.dtype} and {tuned.shape} of {tuned.dtype}"
            )
        if not inputs.same(base.interpolant, tuned.interpolant):
            raise ValueError(
                f"base and tuned must be on the same path, got {base.interpolant} and {tuned.interpolant}: "
                "Rescheduled(tuned, base.interpolant) is the tuned one on the other's"
            )
        self.base, self.tuned = base, tuned
        if callable(weight):
            self.weight = weight if isinstance(weight, eqx.Module) else inputs.Function(weight)
        else:
            self.weight = Power(jnp.ones(())) if weight is None else _share(weight, "weight")

    @property
    def interpolant(self) -> Interpolant:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.interpolant

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def asks(self) -> tuple[Interpolant, Array | float]:
        return self.base.asks()

    def check_times(self, times: Array) -> None:
        self.base.check_times(times)
        self.tuned.check_times(times)

    def denoise(self, t: Array, x: Array) -> Array:
        t = jnp.asarray(t, self.dtype)
        weight = jnp.asarray(self.weight(t) if callable(self.weight) else self.weight, self.dtype)
        if weight.shape != ():
            raise ValueError(f"a weight is one number at one time, got shape {weight.shape}")
        base, tuned = self.base.denoise(t, x), self.tuned.denoise(t, x)
        # In this form one of two equal models is returned to the last bit.
        return base + weight * (tuned - base)


def _share(value: float | Array, name: str) -> Array:
    value = inputs.nonnegative(value, name)
    if inputs.concrete(value) and np.asarray(value) > 1:
        raise ValueError(f"{name} is a share, a number in [0, 1], got {float(value):g}")
    return value
