r"""Between a base model and one that was fine-tuned on a reward: `Annealed`, a model, and `Tuned`, a guidance whose weights make it exact.

With the share `g(t)` of the tuned model, rising from 0 (noise) to 1 (data),

    D = (1 - g) D_base + g D_tuned,

and velocities, scores and noises mix alike: at each time the score is that of `p_t^(1 - g) q_t^g`, p being the law of the base model, q that of the
tuned one. Early on, where modes are chosen, the base model speaks, which knows all of them; late, where details are, the tuned one. Annealed
importance guidance (AIG, arXiv 2409.06493) is `Annealed` with

| weight | g(t) | in the published code |
|---|---|---|
| `power(p)` | `t^p` | `linear` (p = 1), `power_2`, `power_4` |
| `step(f)` | 0 before f, then 1 | `step_0.6` |
| a number | itself, at all times | |

The marginals of such a sampler are not those geometric means, and no reward is involved: where it lands is between the two, and no more is promised.
Each evaluation asks both models.

**Weights.** Let P and Q be the chains of the two models under `Ancestral(1)`, from the same noise. That noise is memoryless: reversed, both are the
same noising chain, so that the density of a path is that of its last state,

    L_t = log dQ/dP (x_0, ..., x_t) = log q_t(x_t) / p_t(x_t),

and it adds up from the kernels of the steps, of means m_p, m_q and variance s^2, with no divergence and no further network call:

    L_u - L_t = log K_q / K_p (x_u | x_t) = <m_q - m_p, x_u - (m_p + m_q) / 2> / s^2.

`Tuned` proposes by D and is the twist `V_t = g(t) L_t`. The geometric mean of two Gaussian kernels is the kernel at D, up to a factor, so that a step weighs

    log w_u - log w_t = -g_t (1 - g_t) |m_q - m_p|^2 / (2 s^2) + (g_u - g_t) L_u
    d log w           = -(g_t^2 / 2) g (1 - g) |∇log q - ∇log p|^2 dt + g' L dt        (small steps; in the first g_t^2 the diffusion),

and weighted particles are `p_t^(1 - g) q_t^g` at each time, up to its integral, whose log at `g(1)` is `log_norm`. For a constant g this is the
Feynman-Kac corrector of geometric means (Skreta et al., arXiv 2503.02819); at g = 1 and g = 0 the chains of the two models, without weights. A
share beyond [0, 1] extrapolates: with an unconditional base and a conditional `tuned`, g > 1 is classifier-free guidance, corrected. No step of a
constant share in [0, 1] weighs more than 1; beyond, all weigh at least 1, without a bound, and weights may have heavy tails.

Which schedule leads to `g(1)` is a matter of variance and of the laws on the way: the potentials of a path add up to `g(1) L`, and with `g(1) = 1`, as in
the table, the weighted end is that of the chain Q. What finite steps cost: a kernel of variance s^2 leaves out how `X_1` varies given `X_t`, so that
L strays from `log q_t / p_t` by about the square root of a step, and the end, `E_P[exp(g(1) L) ...]` exactly, is off the geometric mean by the order of one.

**With a reward** the same object is an amortised proposal: the pull is the tuned model's, and the twist is the value function it has learned. At the optimum of
KL-regularised fine-tuning q is the tilt, and `L_t = log h_t(x_t) - log Z` along each path; weights are then even, and say otherwise how
far from the tilt the tuned model is (`audit`). The target is the tilt of the base, whatever was learned.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs, linalg, rewards
from tiltjax.guidance import Estimate, Guidance
from tiltjax.interpolants import Interpolant
from tiltjax.models import Model
from tiltjax.solvers import Ancestral, Solver

_LOOKS = 1000  # at how many times of a default run a schedule is tried


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
    """The base model before time `at`, the tuned one from then on. `at` is a scalar."""
    return Step(_share(at, "at"))


Weight = Callable[[Array], Array] | float | Array | None


class Annealed(Model):
    """`(1 - g(t)) D_base + g(t) D_tuned`: a model like any other, to sample, to guide, to tilt.

    Asked at another time than the sampler's, as `Tilted` and `Glass` do, it answers with the weight of that time.

    **Arguments:** `base`, `tuned`: models of the same states on the same path; `weight`: `power(p)` (by default of 1) or `step(f)`, any function of
    t with values in [0, 1], or a number. **Raises:** `ValueError` for models that do not fit together, or a weight that is no share at some time.
    """

    base: Model
    tuned: Model
    weight: Any

    def __init__(self, base: Model, tuned: Model, weight: Weight = None):
        check_pair(base, tuned, "Annealed")
        self.base, self.tuned = base, tuned
        weight = Power(jnp.ones(())) if weight is None else weight
        self.weight = _schedule(weight, base.dtype, share=True) if callable(weight) else _share(weight, "weight")

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
        return _mix(_at(self.weight, t), self.base.denoise(t, x), self.tuned.denoise(t, x))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        t = jnp.asarray(t, self.dtype)
        return _mix(_at(self.weight, t), self.base.denoise_batch(t, x), self.tuned.denoise_batch(t, x))


class Seen(NamedTuple):
    """What `Tuned` remembers of a path: its last time `t` and state `x`, both denoisers there, `base` and `tuned`, of the shape of `x`, and
    the scalar `log_ratio`, L, the log-density of Q against P so far."""

    t: Array
    x: Array
    base: Array
    tuned: Array
    log_ratio: Array


class Tuned(Guidance):
    """A fine-tuned (or conditional) model as a guidance of its base, with the twist that makes weighted particles exact.

    `smc(key, base, Tuned(base, tuned, weight), num=n)` is `p^(1 - g) q^g` at `g(1)`, for any `weight`, and `log_norm` the log of its integral, as
    particles are added and steps made small; with a `reward` it is the tilt `p exp(scale * reward)`, of which the tuned model is a guess. Only
    `Ancestral(1)` will do, whose noise is memoryless. Under `sample` it moves as `Annealed(base, tuned, weight)` does, and `log_h` says nothing.
    It sees every state of a path, also where a schedule weighs nothing: two denoiser calls for each.

    **Arguments:** `base`, `tuned`: models of the same states on the same path; `weight`: as in `Annealed` (a function of t as an Equinox module), by default 1,
    and any finite number, also outside [0, 1], where the weights of particles may have heavy tails and `p^(1 - g) q^g` must have an integral;
    `reward` and `scale >= 0`: of the tilt. **Raises:** `ValueError` for models that do not fit together, a weight that is not finite at some time, a scale without a reward;
    `TypeError` for a function in the place of the weight.
    """

    base: Model
    tuned: Model
    weight: Any
    reward: rewards.Reward | None
    scale: Array

    def __init__(
        self,
        base: Model,
        tuned: Model,
        weight: Weight = None,
        *,
        reward: Callable | None = None,
        scale: float | Array = 1.0,
    ):
        check_pair(base, tuned, "Tuned")
        self.base, self.tuned = base, tuned
        weight = 1.0 if weight is None else weight
        if callable(weight) and not isinstance(weight, eqx.Module):
            # A reward would do as one: it takes a number, too, and Tuned any finite answer.
            raise TypeError(
                f"the third argument of Tuned is a weight, got {getattr(weight, '__name__', type(weight).__name__)}: a reward goes by name, "
                "reward=; a weight is a number, power(p), step(f), or a function of t as an equinox.Module"
            )
        self.weight = (
            _schedule(weight, base.dtype, share=False) if callable(weight) else inputs.finite(weight, "weight", 0)
        )
        self.reward = None if reward is None else rewards.as_reward(reward)
        self.scale = inputs.nonnegative(scale, "scale")
        if reward is None and not (inputs.concrete(scale) and np.asarray(scale) == 1):
            raise ValueError("scale multiplies a reward, and there is none: give reward=, or change weight")

    @property
    def model(self) -> Model:
        return self.base

    @property
    def follows(self) -> bool:
        return True

    def check_run(self, times: Array, weighs: Solver | None = None) -> None:
        """Refuse times at which the tuned model was not trained, and weighted runs whose noise is not `Ancestral(1)`'s."""
        self.tuned.check_times(times)
        if weighs is None:
            return
        eta = weighs.eta if isinstance(weighs, Ancestral) else None
        if eta is None or (inputs.concrete(eta) and np.asarray(eta) != 1):
            got = f"Ancestral({float(np.asarray(eta)):g})" if eta is not None else type(weighs).__name__
            raise ValueError(
                f"Tuned weighs by the ratio of two models' densities, which paths tell under memoryless noise alone: use Ancestral(1), got {got}"
            )

    def init(self, x: Array) -> Seen:
        """Nothing is seen yet: no state comes after t = 1."""
        zero = jnp.zeros((), x.dtype)
        return Seen(jnp.ones((), x.dtype), jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros_like(x), zero)

    def __call__(self, key: Array, t: Array, x: Array, state: Seen) -> tuple[Estimate, Seen]:
        t = jnp.asarray(t, x.dtype)
        base, tuned = self.base.denoise(t, x), self.tuned.denoise(t, x)
        log_ratio = state.log_ratio + self._gained(state, t, x)
        share = _at(self.weight, t)
        return Estimate(_mix(share, base, tuned), base, share * log_ratio), Seen(t, x, base, tuned, log_ratio)

    def log_tilt(self, x1: Array) -> Array:
        if self.reward is None:
            raise ValueError(
                "this Tuned is no tilt by a reward, its target p^(1 - g) q^g has no scale * r(x): give reward= and scale="
            )
        return self.scale * rewards.value(self.reward, x1)

    def final(self, x1: Array, state: Seen) -> Array:
        if self.reward is not None:
            return self.log_tilt(x1)
        return _at(self.weight, jnp.ones_like(state.t)) * state.log_ratio

    def _gained(self, seen: Seen, t: Array, x: Array) -> Array:
        """`log K_q / K_p` of the step from what was seen to `(t, x)`; 0 where that is no step forward, as in stages of a flow's solver."""
        later = t > seen.t
        # Any two times will do where there was no step: both sides of a select need a value.
        kernel = Ancestral(jnp.ones_like(t)).kernel(
            self.base.interpolant, jnp.where(later, seen.t, 0.25), jnp.where(later, t, 0.5)
        )
        moves = later & (kernel.std > 0)  # times so close that rounding leaves no noise between them
        std = jnp.where(moves, kernel.std, 1.0)
        noise = (x - kernel.keep * seen.x - kernel.gain * seen.base) / std
        shift = kernel.gain * (seen.tuned - seen.base) / std
        return jnp.where(moves, linalg.inner(shift, noise - shift / 2), 0.0)


def check_pair(base: Model, tuned: Model, name: str) -> None:
    """Refuse, with a `ValueError` for `name`, two models that are not of the same states on the same path."""
    inputs.instance(base, Model, "base", f"{name}(base, tuned, weight)")
    inputs.instance(tuned, Model, "tuned", f"{name}(base, tuned, weight)")
    if base.tokens or tuned.tokens:
        raise ValueError(f"{name} mixes denoisers of numbers: models of tokens have other marginals in between")
    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise ValueError(
            f"base and tuned must be models of the same states, got {base.shape} of {base.dtype} and {tuned.shape} of {tuned.dtype}"
        )
    if not inputs.same(base.interpolant, tuned.interpolant):
        raise ValueError(
            f"base and tuned must be on the same path, got {base.interpolant} and {tuned.interpolant}: "
            "Rescheduled(tuned, base.interpolant) is the tuned one on the other's"
        )


def _mix(share: Array, base: Array, tuned: Array) -> Array:
    # In this form one of two equal models is returned to the last bit.
    return base + share * (tuned - base)


def _at(weight: Any, t: Array) -> Array:
    value = jnp.asarray(inputs.cast(weight, t.dtype)(t) if callable(weight) else weight, t.dtype)
    if value.shape != ():
        raise ValueError(f"a weight is one number at one time, got shape {value.shape}")
    return value


def _share(value: float | Array, name: str) -> Array:
    value = inputs.nonnegative(value, name)
    if inputs.concrete(value) and np.asarray(value) > 1:
        raise ValueError(f"{name} is a share, a number in [0, 1], got {float(value):g}")
    return value


def _schedule(weight: Callable, dtype: Any, *, share: bool) -> eqx.Module:
    """A function of t as a module, tried at the times of a fine run if its values can be read: finite, and in [0, 1] if it is to be a share."""
    if isinstance(weight, rewards.Reward | type):
        what = f"the class {weight.__name__}" if isinstance(weight, type) else f"the reward {type(weight).__name__}"
        raise TypeError(
            f"weight must be a number or a function of t, got {what}: use power(p) or step(f), and reward= for a reward"
        )
    module = weight if isinstance(weight, eqx.Module) else inputs.Function(weight, "weight")
    if not inputs.concrete(module):
        return module
    with jax.ensure_compile_time_eval():
        times = jnp.linspace(1e-3, 1.0, _LOOKS, dtype=dtype)
        values = jax.vmap(lambda t: _at(module, t))(times)
    if not inputs.concrete(values):  # a function of something that is being traced
        return module
    values, slack = np.asarray(values), 8 * float(jnp.finfo(dtype).eps) if share else np.inf
    wrong = ~np.isfinite(values) | (values < -slack) | (values > 1 + slack)
    if np.any(wrong):
        first = int(np.argmax(wrong))
        rule = "a share, in [0, 1] (Tuned takes others, and weighs them)" if share else "a finite number"
        raise ValueError(f"weight(t) must be {rule}, got {values[first]:g} at t = {float(times[first]):.4g}")
    return module
