r"""Models that evaluate another model at another time and state: `Tilted` and `Rescheduled`.

On any interpolant, a noisy state determines the likelihood of `X_1` by its natural parameters,
`exp(<alpha x / sigma^2, X_1> - snr |X_1|^2 / 2)`. A model on one interpolant is therefore also a
model on any other interpolant (`Rescheduled`):

    D^new_t(x) = D_{t*}(x*),  (t*, x*) = observe(snr_t, alpha_t x / sigma_t^2),
        alpha, sigma and snr of the new interpolant.

**Conjugate tilts.** If `scale * r(x) = <a, x> - c |x|^2 / 2 + const`, the tilt multiplies this
likelihood by a factor of the same form. The tilted posterior of `X_1` is then the *untilted*
posterior for another likelihood, of precision `snr_t + c` and natural parameter
`alpha x / sigma^2 + a`, and

    D~_t(x) = D_{t*}(x*),    (t*, x*) = observe(snr_t + c, alpha_t x / sigma_t^2 + a).

This is one ordinary denoiser call without a derivative. The plain flow of `D~` samples the tilt,
with the right law within modes and the right weights of modes. Both identities hold for posterior
means only, not for a denoiser under classifier-free guidance or with thresholding. (For linear
rewards see also Moitra, Risteski and Rohatgi, *Steering diffusion models with quadratic rewards*,
COLT 2026.)

**Diffusion models.** A variance-preserving interpolant has data in its first state, `alpha_0 > 0`,
and the start of a run is not exactly the law of that state. For a tilt that is one Gaussian
`N(m, s^2)`, the mean at the end is off by `-F^3 m` with
`F = alpha_0 s / sqrt(alpha_0^2 s^2 + sigma_0^2)`. An interpolant that starts from pure noise has no
such error,

    Tilted(Rescheduled(model, Linear()), reward, scale),

and if `c` is at least the network's lowest snr, the network is never called on noisier states than
in its training. For a network with a table of levels, the grid `grid_at(interpolant.clock(levels))`
calls the network at these levels only. The grid starts at the first level whose snr is at least c.
If c is that snr, this level is pure noise, at t = 0. Otherwise the start ignores some data, with
the error above, which grows with the distance of the level from c.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree, rewards
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.models._base import Model, check_mean


class Rescheduled(Model):
    """The same law on another interpolant: `model`, evaluated at the time and state of its own
    interpolant with the same natural parameters.

    This is exact for posterior means, not for a denoiser under classifier-free guidance or with
    thresholding. The result is a model like any other: to sample, to tilt, to guide. The network is
    evaluated at `snr_t` of the new interpolant; `sample` raises an error for times outside of its
    training range.

    **Arguments:** `model`; `interpolant`, the new interpolant, `Linear()` by default.
    """

    model: Model
    interpolant: Interpolant

    def __init__(self, model: Model, interpolant: Interpolant | None = None):
        check_mean(
            model,
            "Rescheduled(model, interpolant), with Analytic(mixture) for a mixture",
        )
        self.model = model
        self.interpolant = or_linear(interpolant)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.model.shape

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    @property
    def width(self) -> float | None:
        return self.model.width

    def denoise(self, t: Array, x: Array) -> Array:
        return self.model.denoise(*self._query(t, x))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        return self.model.denoise_batch(*self._query(t, x))

    def _query(self, t: Array, x: Array) -> tuple[Array, Array]:
        """`(t*, x*)`, for one state or a batch of states."""
        new = self.interpolant
        return self.model.interpolant.observe(new.snr(t), new.alpha(t) / new.sigma(t) ** 2 * x)

    def network_query(self) -> tuple[Interpolant, Array | float]:
        return self.model.network_query()


class Tilted(Model):
    """The model of `rho(x) exp(scale * r(x))` for a conjugate reward: exact, with one call of the
    inner denoiser.

    For `-l |x - y|^2` (c = 2 l) the inner model is evaluated at `snr_t + c`, later than t. For
    linear rewards (c = 0) it is evaluated at t, at a shifted state. At the start, t = eps, this
    state has the norm `|x*|` of about `scale |a| sigma^2 / eps`, far outside of a network's
    training data, so the result is exact only for exact denoisers. For c < 0 the denoiser is right
    wherever `snr_t + c > 0`, but sampling has no closed-form start. Reschedule a diffusion model
    first (see above).

    **Arguments:** `model`; `reward`, `LinearReward`, `rewards.Quadratic` with a scalar weight, sums
    and multiples; `scale >= 0`.

    **Raises:** `ValueError` if the reward is not conjugate.
    """

    model: Model
    natural: Array
    precision: Array

    def __init__(self, model: Model, reward: rewards.Reward, scale: float | Array = 1.0):
        check_mean(
            model,
            "Tilted(model, reward, scale), with Analytic(mixture) for a mixture",
        )
        scale = _checks.nonnegative(scale, "scale")
        reward, scale = _pytree.cast((rewards.as_reward(reward), scale), model.dtype)
        natural, precision = reward.conjugate()
        if natural.shape != model.shape:
            raise ValueError(
                f"the reward takes states of shape {natural.shape}, but the states of the model "
                f"have shape {model.shape}"
            )
        self.model = model
        self.natural = scale * natural
        self.precision = scale * precision

    def _call(self, **given: Any) -> str:
        return super()._call(natural=self.natural, precision=self.precision, **given)

    @property
    def interpolant(self) -> Interpolant:
        return self.model.interpolant

    @property
    def shape(self) -> tuple[int, ...]:
        return self.model.shape

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    @property
    def width(self) -> float | None:
        width = self.model.width
        if not width or not _checks.concrete(self.precision):
            return width
        shrinkage = 1 + width**2 * np.asarray(self.precision, np.float64)
        return float(width / np.sqrt(shrinkage)) if shrinkage > 1 else width

    def denoise(self, t: Array, x: Array) -> Array:
        return self.model.denoise(*self._query(t, x))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        return self.model.denoise_batch(*self._query(t, x))

    def _query(self, t: Array, x: Array) -> tuple[Array, Array]:
        """`(t*, x*)`, for one state or a batch of states."""
        interpolant = self.interpolant
        likelihood = interpolant.alpha(t) / interpolant.sigma(t) ** 2 * x
        natural = likelihood + jnp.broadcast_to(self.natural, x.shape)
        return interpolant.observe(interpolant.snr(t) + self.precision, natural)

    def network_query(self) -> tuple[Interpolant, Array | float]:
        interpolant, added = self.model.network_query()
        return interpolant, added + self.precision

    def check_start(self, t: Array) -> None:
        self.model.check_start(t)
        if _checks.concrete(self.precision) and np.asarray(self.precision) < 0:
            raise ValueError(
                f"this reward is convex (c = {float(self.precision):g} < 0): the tilted law has no "
                "closed form near t = 0, so Tilted cannot start sampling there. Use it as a "
                "denoiser at times with snr_t + c > 0."
            )

    def initial(self, key: Array, t: Array) -> Array:
        return self.model.initial(key, t)

    def initial_log_prob(self, t: Array, x: Array) -> Array:
        return self.model.initial_log_prob(t, x)
