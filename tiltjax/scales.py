r"""Scale laws `lambda_t`: the strength of a reward at each time of a guidance.

Guidance estimates `∇ log E[exp(scale * r(X_1)) | X_t = x]`. An estimate from one draw at full scale
is too large, because it ignores the uncertainty of `X_1`. For a Gaussian prior `N(mu, s^2 I)` and
`r(x) = -|x - y|^2`, the exact correction is a smaller scale,

    lambda_t = scale / (1 + 2 scale v_t),      v_t = Var(X_1 | X_t) = 1 / (1/s^2 + snr_t).

With this scale one draw samples the tilt itself: the damping schedule of Dandapanthula and Boffi
(arXiv 2606.02884).

A law is called as `law(key, snr, t, x)`. The gradient of `log h` holds its value constant, because
a derivative through an x-dependent damping makes guidance worse. A derivative of a whole run
includes it. `law.final` is the scale at t = 1, which defines the target.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _linalg, _repr
from tiltjax.models import Model, check_mean


class Scale(_repr.Printable):
    """A scale law. Subclasses define `final` and `__call__(key, snr, t, x) -> scalar`."""

    final: eqx.AbstractVar[Array]

    def __call__(self, key: Array, snr: Array, t: Array, x: Array) -> Array:
        raise NotImplementedError

    def _call(self, **given: Any) -> str:
        return _repr.call(self, scale=self.final, **given)


class Constant(Scale):
    """`lambda_t = scale`. **Arguments:** `scale >= 0`, an inverse temperature in units of 1 /
    reward.
    """

    final: Array

    def __init__(self, scale: float | Array):
        self.final = _checks.nonnegative(scale, "scale")

    def __call__(self, key: Array, snr: Array, t: Array, x: Array) -> Array:
        return self.final

    def _call(self, **given: Any) -> str:
        return _repr.form(self.final)

    def _text(self) -> str:
        return f"Constant({self._call()})"


class Damped(Scale):
    """`lambda_t = scale / (1 + 2 scale v_t)` with `v_t = sigma^2 / (1 + sigma^2 snr_t)`.

    Exact for a prior `N(mu, sigma^2 I)`, any interpolant, and the reward `-|x - y|^2` (multiply
    `scale` by the weight of a weighted reward). Otherwise it is a heuristic with one
    hyper-parameter.

    **Arguments:** `scale >= 0`; `sigma >= 0`, the prior's standard deviation, in the units of the
    data.
    """

    final: Array
    sigma: Array

    def __init__(self, scale: float | Array, sigma: float | Array):
        self.final = _checks.nonnegative(scale, "scale")
        self.sigma = _checks.nonnegative(sigma, "sigma")

    def __call__(self, key: Array, snr: Array, t: Array, x: Array) -> Array:
        return self.final / (1 + 2 * self.final * gaussian_variance(self.sigma, snr))


def gaussian_variance(sigma: Array, snr: Array) -> Array:
    """`v_t = sigma^2 / (1 + sigma^2 snr_t)`: the posterior variance of `N(mu, sigma^2)` at a
    signal-to-noise ratio.
    """
    # sigma = 0 gives 0, also at t = 1, where the snr is infinite.
    positive = sigma > 0
    return jnp.where(positive, 1 / (jnp.where(positive, sigma, 1.0) ** -2 + snr), 0.0)


class SelfDamped(Scale):
    """`lambda_t = scale / (1 + 2 scale v_t(x))` with the posterior variance of the model.

    `v_t(x) = (sigma_t^2 / alpha_t) tr(∂D/∂x) / d` (Tweedie's second identity), with the trace from
    one Hutchinson probe: one pullback through the denoiser, and no hyper-parameter. On one
    isotropic Gaussian it equals `Damped` with the right sigma. On mixtures, a scalar cannot
    represent the direction between modes, but `Laplace` can. If a learned Jacobian gives v < 0, v
    is set to 0.

    **Arguments:** `scale >= 0`; `model`.
    """

    final: Array
    model: Model

    def __init__(self, scale: float | Array, model: Model):
        check_mean(model, "SelfDamped(scale, model)")
        self.final = _checks.nonnegative(scale, "scale")
        self.model = model

    def __call__(self, key: Array, snr: Array, t: Array, x: Array) -> Array:
        _, slope = _linalg.hutchinson(key, lambda x: self.model.denoise(t, x), x)
        variance = jnp.maximum(self.model.interpolant.tweedie(t) * slope, 0)
        return self.final / (1 + 2 * self.final * variance)


def as_scale(scale: "float | Array | Scale") -> Scale:
    """`scale` itself if it is a law, else the constant law."""
    return scale if isinstance(scale, Scale) else Constant(scale)
