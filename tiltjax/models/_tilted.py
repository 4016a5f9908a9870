r"""Models that are another model, asked at another time and state: `Tilted` and `Rescheduled`.

A noisy state says of `X_1` what its natural parameters say,
`exp(<alpha x / sigma^2, X_1> - snr |X_1|^2 / 2)`, on whichever path. So a model on one path is also
one on any other (`Rescheduled`):

    D^new_t(x) = D_{t*}(x*),  (t*, x*) = observe(snr_t, alpha_t x / sigma_t^2),
        alpha, sigma and snr those of the new path.

**Conjugate tilts.** If `scale * r(x) = <a, x> - c |x|^2 / 2 + const`, the tilt multiplies that
likelihood by a factor of the same family. So the tilted posterior of `X_1` is the *untilted* one
given another view, of precision `snr_t + c` and natural parameter `alpha x / sigma^2 + a`, and

    D~_t(x) = D_{t*}(x*),    (t*, x*) = observe(snr_t + c, alpha_t x / sigma_t^2 + a):

one ordinary denoiser call, no derivative, and sampling the plain flow of `D~` samples the tilt,
within modes and between them. Both hold for posterior means only: a denoiser under classifier-free
guidance, or a thresholded one, is none. (For linear rewards see also Moitra, Risteski and Rohatgi,
*Steering diffusion models with quadratic rewards*, COLT 2026.)

**Diffusion models.** A variance-preserving path starts with data in the state, `alpha_0 > 0`, and
its `N(0, sigma_0^2 I)` is not quite the law of `X_0` under a tilt: one Gaussian `N(m, s^2)` of a
tilt ends with its mean off by `-alpha_0 s m / sqrt(alpha_0^2 s^2 + sigma_0^2)`. On a path that
starts from pure noise nothing is off,

    Tilted(Rescheduled(model, Linear()), reward, scale),

and with `c` at least the network's lowest snr, it is asked nothing noisier than it was trained on.
A network that knows a table of levels is evaluated at these only on the grid
`grid_at(interpolant.clock(levels))`, which starts at the first level whose snr is at least c: in
pure noise, at t = 0, if c is that snr, and with data forgotten as above the further that level is
away.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, rewards
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.models._base import Model


class Rescheduled(Model):
    """The same law on another path: `model`, asked at the time and state of its own path that say
    as much.

    Exact for posterior means, which a denoiser under classifier-free guidance, or a thresholded
    one, is not. It is a model like any other: to sample, to tilt, to guide. The network is
    evaluated at `snr_t` of the new interpolant; `sample` refuses times at which that is outside of
    what it was trained on.

    **Arguments:** `model`; `interpolant`, the new path, `Linear()` by default.
    """

    model: Model
    interpolant: Interpolant

    def __init__(self, model: Model, interpolant: Interpolant | None = None):
        _checks.instance(
            model,
            Model,
            "model",
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

    def denoise(self, t: Array, x: Array) -> Array:
        return self.model.denoise(*self._query(t, x))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        return self.model.denoise_batch(*self._query(t, x))

    def _query(self, t: Array, x: Array) -> tuple[Array, Array]:
        """`(t*, x*)`, for one state or a batch of them."""
        new = self.interpolant
        return self.model.interpolant.observe(new.snr(t), new.alpha(t) / new.sigma(t) ** 2 * x)

    def network_query(self) -> tuple[Interpolant, Array | float]:
        return self.model.network_query()


class Tilted(Model):
    """The model of `rho(x) exp(scale * r(x))` for a conjugate reward: exact, at one call of the
    inner denoiser.

    For `-l |x - y|^2` (c = 2 l) the inner model is evaluated at `snr_t + c`, later than t. For
    linear rewards (c = 0) it is evaluated at t, at a displaced state: at the start, t = eps, at
    `|x*|` about `scale |a| sigma^2 / eps`, far outside what a network was trained on, so that there
    "exact" is a statement about exact denoisers. For c < 0 the denoiser is right wherever
    `snr_t + c > 0`, but sampling has no closed-form start. A diffusion model is better
    rescheduled first (see above).

    **Arguments:** `model`; `reward`, `LinearReward`, `rewards.Quadratic` with a scalar weight,
    sums and multiples; `scale >= 0`.

    **Raises:** `ValueError` if the reward is not conjugate.
    """

    model: Model
    natural: Array
    precision: Array

    def __init__(self, model: Model, reward: rewards.Reward, scale: float | Array = 1.0):
        _checks.instance(
            model,
            Model,
            "model",
            "Tilted(model, reward, scale), with Analytic(mixture) for a mixture",
        )
        scale = _checks.nonnegative(scale, "scale")
        natural, precision = rewards.as_reward(reward).conjugate()
        if natural.shape != model.shape:
            raise ValueError(
                f"the reward is one of states of shape {natural.shape}, the model's have "
                f"{model.shape}"
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

    def denoise(self, t: Array, x: Array) -> Array:
        return self.model.denoise(*self._query(t, x))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        return self.model.denoise_batch(*self._query(t, x))

    def _query(self, t: Array, x: Array) -> tuple[Array, Array]:
        """`(t*, x*)`, for one state or a batch of them."""
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
                "closed form at the noise "
                "end, so Tilted cannot start sampling there. Use it as a denoiser where snr_t + c "
                "> 0."
            )

    def initial(self, key: Array, t: Array) -> Array:
        return self.model.initial(key, t)

    def initial_log_prob(self, t: Array, x: Array) -> Array:
        return self.model.initial_log_prob(t, x)
