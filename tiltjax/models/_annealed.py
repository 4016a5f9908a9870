r"""Models between a base model and a model that was fine-tuned on a reward: `Annealed`, a model,
and `Tuned`, a guidance with exact weights.

With the weight `g(t)` of the tuned model, which rises from 0 (noise) to 1 (data),

    D = (1 - g) D_base + g D_tuned,

and velocities, scores and noises mix in the same way. At each time the score is the score of
`p_t^(1 - g) q_t^g`, where p is the law of the base model and q the law of the tuned model. Early
times, at which modes are chosen, use the base model, which covers all modes. Late times, at which
details form, use the tuned model. Annealed importance guidance (AIG, arXiv 2409.06493) is
`Annealed` with

| weight | g(t) | in the published code |
|---|---|---|
| `power(p)` | `t^p` | `linear` (p = 1), `power_2`, `power_4` |
| `step(f)` | 0 before f, then 1 | `step_0.6` |
| a number | itself, at all times | |

The marginals of this sampler are not these geometric means, and no reward is involved. Its samples
lie between the two models, without a further guarantee. Each evaluation calls both models.

**Weights.** Let P and Q be the chains of the two models under `Ancestral(1)`, from the same noise.
This noise is memoryless: reversed, both chains are the same noising chain. The density ratio of a
trajectory is therefore the ratio at its last state,

    L_t = log dQ/dP (x_0, ..., x_t) = log q_t(x_t) / p_t(x_t).

It is a sum over the kernels of the steps, with means m_p, m_q and variance s^2, and needs no
divergence and no further network call:

    L_u - L_t = log K_q / K_p (x_u | x_t) = <m_q - m_p, x_u - (m_p + m_q) / 2> / s^2.

`Tuned` proposes by D and has the twist `V_t = g(t) L_t`. Up to a factor, the geometric mean of two
Gaussian kernels is the kernel at D, so a step changes the log-weight by

    log w_u - log w_t = -g_t (1 - g_t) |m_q - m_p|^2 / (2 s^2) + (g_u - g_t) L_u
    d log w  = -(g_t^2 / 2) g (1 - g) |∇log q - ∇log p|^2 dt + g' L dt
        (small steps; the first g_t^2 is the diffusion coefficient),

and weighted particles have the law `p_t^(1 - g) q_t^g` at each time, up to its integral. `log_norm`
is the log of this integral at `g(1)`. For a constant g this is the Feynman-Kac corrector of
geometric means (Skreta et al., arXiv 2503.02819). For g = 1 and g = 0 it is the chain of one model,
without weights. A weight outside [0, 1] extrapolates: with an unconditional base and a conditional
`tuned`, g > 1 is classifier-free guidance with a correction. With a constant weight in [0, 1],
every step multiplies the weight by at most 1. Outside [0, 1], every step multiplies it by at least
1, without an upper bound, and weights may have heavy tails.

The schedule that leads to `g(1)` changes the variance and the intermediate laws: the potentials of
a trajectory add up to `g(1) L`. With `g(1) = 1`, as in the table, the weighted particles at the end
have the law of the chain Q. The error of finite steps: a kernel of variance s^2 ignores the
variance of `X_1` given `X_t`, so L differs from `log q_t / p_t` by about the square root of a step.
The weighted law at the end is exactly `E_P[exp(g(1) L) ...]`, which differs from the geometric mean
by the order of one step.

**With a reward** the same object is an amortized proposal: the shift comes from the tuned model,
and the twist is the value function that this model has learned. At the optimum of KL-regularized
fine-tuning, q is the tilt, and `L_t = log h_t(x_t) - log Z` along each trajectory. The weights are
then even. Otherwise they measure the distance of the tuned model from the tilt (`audit`). The
target is always the tilt of the base.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree, _repr, rewards
from tiltjax.interpolants import Interpolant
from tiltjax.models._base import Model, check_mean

_CHECKED_TIMES = 1000  # at which a weight schedule is evaluated


class PowerWeight(_repr.Printable):
    """`t^p`; built by `power`."""

    p: Array

    def _call(self, **given: Any) -> str:
        return _repr.call(self, power, **given)

    def __call__(self, t: Array) -> Array:
        return t**self.p


class StepWeight(_repr.Printable):
    """0 before `at`, then 1; built by `step`."""

    at: Array

    def _call(self, **given: Any) -> str:
        return _repr.call(self, step, **given)

    def __call__(self, t: Array) -> Array:
        return jnp.where(t < self.at, jnp.zeros_like(t), jnp.ones_like(t))


def power(p: float | Array = 2.0) -> PowerWeight:
    """The weight `t^p`, p > 0. A larger p gives the base model more time."""
    return PowerWeight(_checks.positive(p, "p"))


def step(at: float | Array = 0.6) -> StepWeight:
    """The weight `g(t)` that is 0 before the time `at` and 1 from then on: the base model first,
    then the tuned model. `at` is a scalar in [0, 1].
    """
    return StepWeight(_checks.in_range(at, "at", 0, 1))


Weight = Callable[[Array], Array] | float | Array | None


class Annealed(Model):
    """`(1 - g(t)) D_base + g(t) D_tuned`: a model like any other, to sample, to guide, to tilt.

    `Tilted` and `Glass` evaluate it at other times than the time of the sampler; the weight is then
    the weight at those times.

    **Arguments:** `base`, `tuned`: models with the same states and interpolant; `weight`:
    `power(p)` (by default `power(1)`) or `step(f)`, any function of t with values in [0, 1], or a
    number.

    **Raises:** `ValueError` for models that do not match, or a weight outside [0, 1] at some time.
    """

    base: Model
    tuned: Model
    weight: Any

    def __init__(self, base: Model, tuned: Model, weight: Weight = None):
        check_pair(base, tuned, "Annealed(base, tuned, weight)")
        self.base, self.tuned = base, tuned
        weight = PowerWeight(jnp.ones(())) if weight is None else weight
        if callable(weight):
            self.weight = weight_schedule(weight, base.dtype, unit_range=True)
        else:
            self.weight = _checks.in_range(weight, "weight", 0, 1)

    @property
    def interpolant(self) -> Interpolant:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.interpolant

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def network_query(self) -> tuple[Interpolant, Array | float]:
        return self.base.network_query()

    def check_times(self, times: Array) -> None:
        self.base.check_times(times)
        self.tuned.check_times(times)

    def denoise(self, t: Array, x: Array) -> Array:
        t = jnp.asarray(t, self.dtype)
        return average(weight_at(self.weight, t), self.base.denoise(t, x), self.tuned.denoise(t, x))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        t = jnp.asarray(t, self.dtype)
        return average(
            weight_at(self.weight, t), self.base.denoise_batch(t, x), self.tuned.denoise_batch(t, x)
        )


def check_pair(
    base: Model, tuned: Model, how: str, first: str = "base", second: str = "tuned"
) -> None:
    """Raise a `ValueError` if two models, `first` and `second`, have different states or
    interpolants, and a `TypeError` for other objects; `how` is the call that needs them.
    """
    check_mean(base, how, first)
    check_mean(tuned, how, second)
    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise ValueError(
            f"{first} and {second} must have the same states, got {base.shape} of {base.dtype} and "
            f"{tuned.shape} of {tuned.dtype}"
        )
    if not _pytree.same(base.interpolant, tuned.interpolant):
        raise ValueError(
            f"{first} and {second} must have the same interpolant, got {base.interpolant} and "
            f"{tuned.interpolant}: use Rescheduled({second}, {first}.interpolant)"
        )


def average(weight: Array, base: Array, tuned: Array) -> Array:
    """`(1 - weight) base + weight tuned`."""
    # In this form the average of two equal models is exact to the last bit.
    return base + weight * (tuned - base)


def weight_at(weight: Any, t: Array) -> Array:
    """The weight at time t, a scalar. **Raises:** `ValueError` for another shape."""
    value = jnp.asarray(_pytree.cast(weight, t.dtype)(t) if callable(weight) else weight, t.dtype)
    if value.shape != ():
        raise ValueError(f"a weight must be one number at one time, got shape {value.shape}")
    return value


def weight_schedule(weight: Callable, dtype: Any, *, unit_range: bool = False) -> eqx.Module:
    """A function of t as a module. If its values can be read, they are checked on a fine grid of
    times: finite, and in [0, 1] if `unit_range`. **Raises:** `TypeError`, `ValueError`.
    """
    if isinstance(weight, rewards.Reward | type):
        what = (
            f"the class {weight.__name__}"
            if isinstance(weight, type)
            else f"the reward {type(weight).__name__}"
        )
        raise TypeError(
            f"weight must be a number or a function of t, got {what}: use power(p) or step(f), and "
            "reward= for a reward"
        )
    module = weight if isinstance(weight, eqx.Module) else _pytree.Function(weight, "weight")
    if not _checks.concrete(module):
        return module
    with jax.ensure_compile_time_eval():
        times = jnp.linspace(1e-3, 1.0, _CHECKED_TIMES, dtype=dtype)
        values = jax.vmap(lambda t: weight_at(module, t))(times)
    if not _checks.concrete(values):  # the function depends on a traced value
        return module
    values, slack = np.asarray(values), 8 * float(jnp.finfo(dtype).eps) if unit_range else np.inf
    wrong = ~np.isfinite(values) | (values < -slack) | (values > 1 + slack)
    if np.any(wrong):
        first = int(np.argmax(wrong))
        rule = "in [0, 1] (Tuned accepts any number)" if unit_range else "a finite number"
        raise ValueError(
            f"weight(t) must be {rule}, got {values[first]:g} at t = {float(times[first]):.4g}"
        )
    return module
