r"""One step of a sampler, from time t to u.

All of them move a *field*: the denoiser `D~` of the law that is sampled, which is the model's own `D`, or under guidance
`D~ = D + (sigma_t^2 / alpha_t) ∇ log h`. Its probability flow has the drift `b + (g_t^2 / 2) ∇ log h`.

| solver | step | order |
|---|---|---|
| `Euler()` | `x + (u - t) b~_t(x)` | 1 |
| `Heun(share_draw)` | trapezoid over two stages | 2 |
| `Ancestral(eta)` | `alpha_u D~ + sqrt(sigma_u^2 - S2) E~ + sqrt(S2) xi` | 1 |

with `E~ = (x - alpha_t D~) / sigma_t`, `S2 = eta^2 sigma_u^2 (1 - rho^2)`, `rho = alpha_t sigma_u / (alpha_u sigma_t)`: eta = 1
is the ancestral (DDPM) kernel of the reversed process, eta = 0 DDIM. A step to t = 1 jumps to `D~` whatever the solver.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs
from tiltjax.interpolants import Interpolant


class Streams(NamedTuple):
    """The random keys of one particle in one step: for the guidance, the solver's noise, and the second stage."""

    guidance: Array
    noise: Array
    second: Array


# (key, t, x, state) -> (D~, state)
Field = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


class Solver(eqx.Module):
    """One step for one sample; subclasses define `step`, `stochastic` and the weak `order` of their mean."""

    stochastic: ClassVar[bool]
    order: ClassVar[int]

    def step(
        self, keys: Streams, interpolant: Interpolant, field: Field, t: Array, u: Array, x: Array, state: Any
    ) -> tuple[Array, Any]:
        """The state at `u`, and the guidance's memory."""
        raise NotImplementedError


class Euler(Solver):
    """The explicit Euler step of the probability flow."""

    stochastic = False
    order = 1

    def step(self, keys, interpolant, field, t, u, x, state):
        denoised, state = field(keys.guidance, t, x, state)
        moved = x + (u - t) * interpolant.velocity(t, x, denoised)
        return jnp.where(u < 1, moved, denoised), state


class Heun(Solver):
    """The trapezoidal step of the probability flow, two evaluations of the field.

    **Arguments:** `share_draw`: whether the second stage reuses the first's posterior draws. Fresh ones (the default) halve
    the variance that the draws leave behind.
    """

    share_draw: bool = eqx.field(static=True, default=False)

    stochastic = False
    order = 2

    def step(self, keys, interpolant, field, t, u, x, state):
        denoised, state = field(keys.guidance, t, x, state)
        first = interpolant.velocity(t, x, denoised)

        def trapezoid(state):
            key = keys.guidance if self.share_draw else keys.second
            predicted = x + (u - t) * first
            second_denoised, state = field(key, u, predicted, state)
            second = interpolant.velocity(u, predicted, second_denoised)
            return x + (u - t) * (first + second) / 2, state

        # The field has no value at t = 1, and u is the same for all particles: a branch, not a select.
        return jax.lax.cond(u < 1, trapezoid, lambda state: (denoised, state), state)


class Ancestral(Solver):
    """The Gaussian kernel of one step. **Arguments:** `eta >= 0`, the noise: 1 ancestral (DDPM), 0 deterministic (DDIM)."""

    eta: Array

    stochastic = True
    order = 1

    def __init__(self, eta: float | Array = 1.0):
        self.eta = inputs.nonnegative(eta, "eta")
        if inputs.concrete(self.eta) and np.asarray(self.eta) > 1:
            raise ValueError(f"eta must lie in [0, 1], got {float(self.eta):g}")

    def step(self, keys, interpolant, field, t, u, x, state):
        denoised, state = field(keys.guidance, t, x, state)
        sigma_t, sigma_u = interpolant.sigma(t), interpolant.sigma(u)
        rho = interpolant.alpha(t) * sigma_u / (interpolant.alpha(u) * sigma_t)
        variance = self.eta**2 * sigma_u**2 * (1 - rho**2)
        mean = interpolant.alpha(u) * denoised + jnp.sqrt(sigma_u**2 - variance) * interpolant.noise(t, x, denoised)
        return mean + jnp.sqrt(variance) * jax.random.normal(keys.noise, x.shape, x.dtype), state
