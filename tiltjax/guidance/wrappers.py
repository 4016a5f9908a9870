r"""Guidances that wrap a guidance: its times, its strength, and the mean of several of its draws.

| wrapper | score | purpose |
|---|---|---|
| `Window(guidance, start, stop)` | unchanged for `start <= t < stop`, else zero | fewer calls |
| `GainCapped(guidance, limit)` | times `min(1, limit / (g_t^2 / 2))` | a bounded gain |
| `NormDamped(guidance, sigma)` | `s / (1 + 2 abs(s) v_t)` | `Damped` with `abs(s)` as scale |
| `Averaged(guidance, k)` | `sum_i w_i s_i`, `w` the softmax of `log h_i` | k draws |

`v_t = sigma^2 / (1 + sigma^2 snr_t)` is the posterior variance at time t for Gaussian data of
standard deviation sigma. Published pipelines for text-to-image models combine these wrappers with
`Normalized` (`tiltjax.images.flux.published`). All wrappers except `Averaged` are deviations from
the mathematics. Wrappers compose from the inside out: published pipelines first normalize a
gradient, then average it, then cap its gain.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg, scales
from tiltjax.guidance._base import Estimate, Guidance
from tiltjax.models import Model
from tiltjax.solvers import Solver


class Wrapper(Guidance):
    """A guidance that changes the estimate of another guidance and delegates all else to it."""

    guidance: eqx.AbstractVar[Guidance]

    def __check_init__(self) -> None:
        _checks.instance(
            self.guidance, Guidance, "guidance", f"{type(self).__name__} wraps one, such as PlugIn"
        )

    @property
    def model(self) -> Any:
        return self.guidance.model

    def init(self, x: Array) -> Any:
        return self.guidance.init(x)

    @property
    def needs_every_state(self) -> bool:
        return self.guidance.needs_every_state

    @property
    def guides_start(self) -> bool:
        return self.guidance.guides_start

    @property
    def score_at_noise(self) -> Array | None:
        return self.guidance.score_at_noise

    def log_tilt(self, x1: Array) -> Array:
        return self.guidance.log_tilt(x1)

    def final_log_potential(self, x1: Array, state: Any) -> Array:
        return self.guidance.final_log_potential(x1, state)

    def check_run(self, times: Array, weighted_solver: Solver | None = None) -> None:
        self.guidance.check_run(times, weighted_solver)


class Rescaled(Wrapper):
    """A guidance whose score is multiplied by `factor(t, estimate)`."""

    def __check_init__(self) -> None:
        if isinstance(self.guidance, Guidance) and not isinstance(self.model, Model):
            raise ValueError(
                f"{type(self).__name__} changes the length of a score, but the states of "
                f"{type(self.model).__name__} have none: use Window or a smaller scale"
            )

    def factor(self, t: Array, estimate: Estimate) -> Array:
        raise NotImplementedError

    def to_length(self, t: Array, estimate: Estimate, length: Array) -> Array:
        """The factor that scales the score to `length`. It is 1 for a zero score, with a finite
        derivative there.
        """
        score = estimate.score(self.model.interpolant, t)
        square = _linalg.inner(score, score)
        return jnp.where(
            square > 0, length * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 1.0
        )

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        estimate, state = self.guidance(key, t, x, state)
        change = (self.factor(t, estimate) - 1) * estimate.shift()
        return estimate._replace(tilted=estimate.tilted + change), state


class Clipped(Rescaled):
    """`guidance` with its score shortened to the length `limit` if it is longer. A deviation from
    the mathematics.

    **Arguments:** `guidance`, which must return the unguided denoiser; `limit > 0`.
    """

    guidance: Guidance
    limit: Array

    def __init__(self, guidance: Guidance, limit: float | Array):
        self.guidance = guidance
        self.limit = _checks.positive(limit, "limit")

    @property
    def score_at_noise(self) -> Array | None:
        length = self.guidance.score_at_noise
        return None if length is None else jnp.minimum(length, self.limit)

    def factor(self, t: Array, estimate: Estimate) -> Array:
        return jnp.minimum(self.to_length(t, estimate, self.limit), 1.0)


class Normalized(Rescaled):
    """`guidance` with its score scaled to the length `length`. A deviation from the mathematics.

    Published pipelines do this to remove the effect of the reward's scale: only the direction of
    the estimate of `∇ log h` is used. A zero score stays zero. Near t = 0, where `∇ log h` is
    small, a score of length 1 moves the denoiser by `sigma_t^2 / alpha_t`, which is 1,000 at
    t = .001. The proposals of `smc` then leave the law of the model, and its estimate of Z is near
    zero in every run: wrap the guidance in `GainCapped` there.

    **Arguments:** `guidance`, which must return the unguided denoiser; `length > 0`.
    """

    guidance: Guidance
    length: Array

    def __init__(self, guidance: Guidance, length: float | Array):
        self.guidance = guidance
        self.length = _checks.positive(length, "length")

    @property
    def guides_start(self) -> bool:
        return False

    @property
    def score_at_noise(self) -> Array | None:
        return self.length

    def factor(self, t: Array, estimate: Estimate) -> Array:
        return self.to_length(t, estimate, self.length)


class Unscaled(Rescaled):
    """`guidance` whose `∇ log h` enters the flow's drift without the factor `g_t^2 / 2` that
    tilting requires. `g_t^2` is the diffusion coefficient of the interpolant.

    **Arguments:** `guidance`, which must return the unguided denoiser.
    """

    guidance: Guidance

    def __init__(self, guidance: Guidance):
        self.guidance = guidance

    @property
    def guides_start(self) -> bool:
        return False

    @property
    def score_at_noise(self) -> Array | None:
        return None

    def factor(self, t: Array, estimate: Estimate) -> Array:
        return 2 / self.model.interpolant.diffusion(t)


class Window(Wrapper):
    """`guidance` at the times `start <= t < stop`. At other times there is no guidance, and neither
    the reward nor the draws are evaluated.

    Outside the window `log_h` is 0, a twist without information. Weights stay exact, because they
    end with `log_tilt`, but they become uneven. The memory does not change outside the window. The
    window `(times[i], times[j])` contains the steps i to j - 1 of a grid.

    **Arguments:** `guidance`; `0 <= start < stop <= 1`; with `stop = 1` the window lasts to the
    end.

    **Raises:** `ValueError` for a window that is empty or leaves [0, 1], or for a guidance that
    must be called at every state, such as `Tuned`.
    """

    guidance: Guidance
    start: Array
    stop: Array

    def __init__(self, guidance: Guidance, start: float | Array, stop: float | Array = 1.0):
        _check_memoryless(guidance, "Window")
        self.guidance = guidance
        self.start = _checks.in_range(start, "start", 0, 1, closed="left")
        self.stop = _checks.in_range(stop, "stop", 0, 1, closed="right")
        ends = self.start, self.stop
        if _checks.concrete(ends) and not np.asarray(self.start) < np.asarray(self.stop):
            raise ValueError(
                f"start must be below stop, got [{float(self.start):g}, {float(self.stop):g})"
            )

    @property
    def score_at_noise(self) -> Array | None:
        starts = not _checks.concrete(self.start) or np.asarray(self.start) == 0
        return self.guidance.score_at_noise if starts else None

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        shape, _ = jax.eval_shape(self.guidance, key, t, x, state)

        def unguided(state: Any) -> tuple[Estimate, Any]:
            denoised = self.model.denoise(t, x)
            log_h = None if shape.log_h is None else jnp.zeros((), shape.log_h.dtype)
            return Estimate(denoised, None if shape.denoised is None else denoised, log_h), state

        # The time is the same for all particles: under vmap a branch stays a branch.
        inside = (self.start <= t) & (t < self.stop)
        return jax.lax.cond(inside, lambda state: self.guidance(key, t, x, state), unguided, state)


class GainCapped(Rescaled):
    """`guidance` whose score enters the flow's drift with `min(g_t^2 / 2, limit)` instead of
    `g_t^2 / 2`, which is infinite at t = 0.

    **Arguments:** `guidance`, which must return the unguided denoiser; `limit > 0`.
    """

    guidance: Guidance
    limit: Array

    def __init__(self, guidance: Guidance, limit: float | Array):
        self.guidance = guidance
        self.limit = _checks.positive(limit, "limit")

    @property
    def score_at_noise(self) -> Array | None:
        return None

    def factor(self, t: Array, estimate: Estimate) -> Array:
        return jnp.minimum(2 * self.limit / self.model.interpolant.diffusion(t), 1.0)


class NormDamped(Rescaled):
    """`guidance` with its score s shortened to `s / (1 + 2 |s| v_t)`: the damping of `Damped`, with
    the length of the score in place of the scale.

    **Arguments:** `guidance`, which must return the unguided denoiser; `sigma >= 0`, the standard
    deviation of the data.
    """

    guidance: Guidance
    sigma: Array

    def __init__(self, guidance: Guidance, sigma: float | Array):
        self.guidance = guidance
        self.sigma = _checks.nonnegative(sigma, "sigma")

    def factor(self, t: Array, estimate: Estimate) -> Array:
        # `to_length` returns 1 / |s| with a safe derivative at zero, and |s|^2 / |s| is the length.
        inverse = self.to_length(t, estimate, jnp.ones((), estimate.tilted.dtype))
        score = estimate.score(self.model.interpolant, t)
        length = _linalg.inner(score, score) * inverse
        return 1 / (
            1 + 2 * length * scales.gaussian_variance(self.sigma, self.model.interpolant.snr(t))
        )


class Averaged(Wrapper):
    """The weighted mean of k independent draws of a random guidance:
    `log h = log mean exp(log h_i)`, `s = sum_i softmax(log h)_i s_i`.

    The average of a plug-in estimate with one draw is the plug-in estimate with k draws. The two
    differ if each draw is wrapped separately: `Averaged(Normalized(PlugIn(...), 10.), k)`
    normalizes every gradient before averaging. The k draws are rows of one network batch and share
    the unguided denoiser.

    **Arguments:** `guidance`, which must return `log_h` and the unguided denoiser; `k >= 1`.

    **Raises:** `ValueError` for a guidance that lacks one of these, or that must be called at every
    state, such as `Tuned`.
    """

    guidance: Guidance
    k: int = eqx.field(static=True)

    def __init__(self, guidance: Guidance, k: int):
        _check_memoryless(guidance, "Averaged")
        self.guidance = guidance
        self.k = _checks.count(k, "k")

    def init(self, x: Array) -> Any:
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (self.k, *leaf.shape)), self.guidance.init(x)
        )

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        # `vmap` does not repeat what is independent of the key, above all the unguided denoiser.
        def draw(key: Array, state: Any) -> tuple[Any, ...]:
            estimate, state = self.guidance(key, t, x, state)
            return *estimate, state

        keys = jax.random.split(key, self.k)
        tilted, denoised, log_hs, state = jax.vmap(draw, out_axes=(0, None, 0, 0))(keys, state)
        if log_hs is None or denoised is None:
            raise ValueError(
                f"{type(self.guidance).__name__} gives no log_h or no unguided denoiser, and "
                "Averaged needs both: use a guidance such as PlugIn"
            )
        weights = jax.nn.softmax(log_hs).astype(x.dtype)
        shift = jnp.tensordot(weights, tilted - denoised[None], 1)
        log_h = jax.nn.logsumexp(log_hs) - jnp.log(np.asarray(self.k, log_hs.dtype))
        return Estimate(denoised + shift, denoised, log_h), state

    def final_log_potential(self, x1: Array, state: Any) -> Array:
        return self.guidance.log_tilt(x1)


def _check_memoryless(guidance: Guidance, name: str) -> None:
    _checks.instance(guidance, Guidance, "guidance", f"{name} wraps one, such as PlugIn")
    if guidance.needs_every_state:
        raise ValueError(
            f"{type(guidance).__name__} needs every state of its own trajectory, and {name} would "
            f"interrupt or repeat it: use {type(guidance).__name__} without {name}"
        )
