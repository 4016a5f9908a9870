r"""Interpolants: how noise becomes data, and the one Gaussian identity everything else rests on.

Time runs from noise (t = 0) to data (t = 1) along

    X_t = alpha_t X_1 + sigma_t X_0,    X_0 ~ N(0, I).

A model is known through its denoiser `D_t(x) = E[X_1 | X_t = x]`; every other parametrisation is affine in it:

    noise     E = (x - alpha D) / sigma
    score     s = (alpha D - x) / sigma^2
    velocity  b = alpha' D + sigma' E.

The *natural parameters* of a noisy view of `X_1` are its precision `snr_t = alpha^2 / sigma^2` and
`eta = alpha x / sigma^2`: the likelihood of `X_1` is `exp(<eta, X_1> - snr |X_1|^2 / 2)`. Independent Gaussian views
add up in these coordinates, and whatever the sum is, it is again a view at *some* time: `observe`. Posterior
sampling, conjugate tilts and renoising are all this one call.

Reference: Albergo, Boffi and Vanden-Eijnden, *Stochastic interpolants* (arXiv 2303.08797); Lipman et al. (arXiv
2210.02747). The memoryless diffusion `g^2 = 2 sigma (sigma alpha'/alpha - sigma')` is that of Domingo-Enrich et al.
(arXiv 2409.08861).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import inputs


class Interpolant(eqx.Module):
    """A path `X_t = alpha_t X_1 + sigma_t X_0`: subclasses give `alpha`, `sigma` and `time`.

    All times and snr values are scalars; states have any shape. Nothing here evaluates a model.
    """

    def alpha(self, t: Array) -> Array:
        """The coefficient of the data."""
        raise NotImplementedError

    def sigma(self, t: Array) -> Array:
        """The standard deviation of the noise."""
        raise NotImplementedError

    def time(self, snr: Array) -> Array:
        """The time whose signal-to-noise ratio `alpha^2 / sigma^2` is `snr`: the inverse of `snr`."""
        raise NotImplementedError

    def snr(self, t: Array) -> Array:
        """`alpha_t^2 / sigma_t^2`: the precision of `X_t` as a view of `X_1`; infinite at t = 1."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def diffusion(self, t: Array) -> Array:
        """`g_t^2`, the memoryless squared diffusion coefficient; infinite where `alpha_t = 0`."""
        return 2 * self._speed(t) * self.sigma(t) / self.alpha(t)

    def noise(self, t: Array, x: Array, denoised: Array) -> Array:
        """`E[X_0 | X_t = x]`."""
        return (x - self.alpha(t) * denoised) / self.sigma(t)

    def score(self, t: Array, x: Array, denoised: Array) -> Array:
        """`∇ log p_t(x)`."""
        return -self.noise(t, x, denoised) / self.sigma(t)

    def velocity(self, t: Array, x: Array, denoised: Array) -> Array:
        """The drift `b_t(x)` of the probability flow."""
        return jax.grad(self.alpha)(t) * denoised + jax.grad(self.sigma)(t) * self.noise(t, x, denoised)

    def denoised_from_noise(self, t: Array, x: Array, noise: Array) -> Array:
        """The denoiser of a noise prediction; singular where `alpha_t = 0`."""
        return (x - self.sigma(t) * noise) / self.alpha(t)

    def denoised_from_velocity(self, t: Array, x: Array, velocity: Array) -> Array:
        """The denoiser of a velocity."""
        return (self.sigma(t) * velocity - jax.grad(self.sigma)(t) * x) / self._speed(t)

    def tweedie(self, t: Array) -> Array:
        """`sigma_t^2 / alpha_t`, the factor of Tweedie's identities.

        `Cov(X_1 | X_t = x) = tweedie * ∂D/∂x`, and a gradient `∇ log h` moves the denoiser by `tweedie * ∇ log h`.
        """
        return self.sigma(t) ** 2 / self.alpha(t)

    def observe(self, precision: Array, natural: Array) -> tuple[Array, Array]:
        """The time and state at which the model has seen exactly this much.

        A likelihood `exp(<natural, X_1> - precision |X_1|^2 / 2)` is that of `X_{t*} = x*` with
        `snr_{t*} = precision` and `x* = alpha_{t*} natural / precision`, so that the posterior of `X_1` given any
        sum of Gaussian views is the posterior given one noisy state.

        **Arguments:** `precision`, a positive scalar; `natural`, of the state's shape. **Returns:** `(t*, x*)`.
        """
        t = self.time(precision)
        return t, self.alpha(t) / precision * natural

    def _speed(self, t: Array) -> Array:
        """`sigma alpha' - sigma' alpha`, the Wronskian of the path."""
        return self.sigma(t) * jax.grad(self.alpha)(t) - jax.grad(self.sigma)(t) * self.alpha(t)


class Linear(Interpolant):
    """`alpha_t = t`, `sigma_t = (1 - t) * base_scale`: flow matching, rectified flow.

    **Arguments:** `base_scale`, the standard deviation `c_0` of the noise `N(0, c_0^2 I)` that sampling starts from.
    """

    base_scale: Array

    def __init__(self, base_scale: float | Array = 1.0):
        self.base_scale = inputs.positive(base_scale, "base_scale")

    def alpha(self, t: Array) -> Array:
        return 1.0 * t

    def sigma(self, t: Array) -> Array:
        return (1 - t) * self.base_scale

    def time(self, snr: Array) -> Array:
        # 1 / (1 + 1/x) rather than x / (1 + x): right at both ends, snr = 0 and snr = inf.
        return 1 / (1 + 1 / (self.base_scale * jnp.sqrt(snr)))
