r"""Solvers: one step of a sampler, from time t to u.

Every solver integrates a *field*: the denoiser `D~` of the law that is sampled. This is the model's
own `D`, or `D~ = D + (sigma_t^2 / alpha_t) ∇ log h` under guidance. Its probability flow has the
drift `b + (g_t^2 / 2) ∇ log h`.

| solver | step | order |
|---|---|---|
| `Euler()` | `x + (u - t) b~_t(x)` (`VE`: a step in sigma) | 1 |
| `Heun(share_draw)` | trapezoid over two stages | 2 |
| `Ancestral(eta)` | `alpha_u D~ + sigma_u sqrt(1 - eta^2 + eta^2 rho^2) E~ + sqrt(S2) xi` | 1 |
| `Consistency()` | `alpha_u f + sigma_u xi`, f a consistency function instead of `D~` | exact |
| `Adaptive(rtol, atol)` | as many Runge-Kutta steps as the tolerance needs | 5 |
| `tokens.Unmask(even)` | tokens: some of the masked tokens are drawn from `D~` | 1 |

with `E~ = (x - alpha_t D~) / sigma_t`, `S2 = eta^2 sigma_u^2 (1 - rho^2)`,
`rho = alpha_t sigma_u / (alpha_u sigma_t)`. With eta = 1, `Ancestral` is the ancestral (DDPM)
kernel of the reversed process; with eta = 0 it is DDIM. A step to t = 1 is a jump to `D~`.
`Adaptive` jumps only at the end of such a step, from a noise-to-data ratio of `floor`.

References: Song et al. (arXiv 2011.13456), the probability flow; Ho, Jain and Abbeel
(arXiv 2006.11239, DDPM); Song, Meng and Ermon (arXiv 2010.02502, DDIM); Song, Dhariwal, Chen and
Sutskever (arXiv 2303.01469, consistency models).
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _linalg, _repr
from tiltjax.interpolants import Interpolant


class Streams(NamedTuple):
    """The random keys of one particle in one step: for the guidance, for the noise of the solver,
    and for the second stage.
    """

    guidance: Array
    noise: Array
    second: Array


class Kernel(NamedTuple):
    """One Gaussian step, `N(keep x + gain D, std^2 I)`; scalars. `tweedie` is
    `sigma_t^2 / alpha_t`. A guided proposal moves the mean by `response` times `D~ - D`.
    """

    keep: Array
    gain: Array
    std: Array
    tweedie: Array
    eta: Array
    response: Array

    def propose(
        self, key: Array, x: Array, denoised: Array, shift: Array | None
    ) -> tuple[Array, Array]:
        """A draw from q, this kernel p with its mean shifted, and `log p - log q` at the draw,
        computed without a difference of densities.
        """
        noise = jax.random.normal(key, x.shape, x.dtype)
        moved = self.keep * x + self.gain * denoised + self.std * noise
        if shift is None:
            return moved, jnp.zeros((), x.dtype)
        scaled = shift / self.std
        return moved + shift, -_linalg.inner(scaled, noise + scaled / 2)


# (key, t, x, state) -> (D~, state)
Field = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


class Solver(_repr.Printable):
    """One step for one sample. Subclasses define `step`, `stochastic` and `order`, the weak order
    of the mean of the step.

    `steps` is the default number of steps of a run.
    """

    stochastic: ClassVar[bool]
    order: ClassVar[int]
    corruption: ClassVar[type] = Interpolant
    steps: ClassVar[int] = 100

    def step(
        self,
        keys: Streams,
        interpolant: Interpolant,
        field: Field,
        t: Array,
        u: Array,
        x: Array,
        state: Any,
    ) -> tuple[Array, Any]:
        """The state at `u`, and the memory of the guidance. Before its first step, a run calls
        `step` with `u = t`, for the field at the noise; then only the memory is used.
        """
        raise NotImplementedError


class Euler(Solver):
    """The explicit Euler step of the probability flow."""

    stochastic = False
    order = 1

    def step(self, keys, interpolant, field, t, u, x, state):
        denoised, state = field(keys.guidance, t, x, state)
        moved = interpolant.advance(t, t, u, x, denoised)
        return jnp.where(u < 1, moved, denoised), state


class Heun(Solver):
    """The trapezoidal step of the probability flow, with two evaluations of the field.

    **Arguments:** `share_draw`: whether the second stage uses the posterior draws of the first
    stage. Fresh draws (the default) halve the variance that comes from the draws.
    """

    share_draw: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        _checks.flag(self.share_draw, "share_draw")

    stochastic = False
    order = 2

    def step(self, keys, interpolant, field, t, u, x, state):
        # The trapezoidal step is the mean of x and the end of two Euler steps by u - t, one from t
        # and one from u. The two steps are a loop, so that the field, which is most of a program,
        # is compiled once.
        def euler(carry, stage):
            key, s = stage

            def move(x, state):
                denoised, state = field(key, s, x, state)
                moved = interpolant.advance(s, t, u, x, denoised)
                return jnp.where(u < 1, moved, denoised), state

            # A branch, not a select: the field has no value at t = 1. All particles have the same
            # u, so vmap keeps the branch.
            return jax.lax.cond(s < 1, move, lambda *carry: carry, *carry), None

        keys = jnp.stack([keys.guidance, keys.guidance if self.share_draw else keys.second])
        (beyond, state), _ = jax.lax.scan(euler, (x, state), (keys, jnp.stack([t, u])))
        return jnp.where(u < 1, (x + beyond) / 2, beyond), state


class Stochastic(Solver):
    """A step that is a draw from a kernel, which a weighted run can shift and weigh. Subclasses
    define `kernel`, and `finish` if the last step is not a jump to the denoiser.
    """

    stochastic = True
    order = 1

    def kernel(self, interpolant: Interpolant, t: Array, u: Array) -> Any:
        """The kernel of the step from t to u."""
        raise NotImplementedError

    def finish(self, key: Array, x: Array, denoised: Array) -> Array:
        """The state after the last step of a weighted run, to t = 1, from the unguided denoiser: by
        default the denoiser, without noise.
        """
        return denoised

    def step(self, keys, interpolant, field, t, u, x, state):
        denoised, state = field(keys.guidance, t, x, state)
        return self.kernel(interpolant, t, u).propose(keys.noise, x, denoised, None)[0], state


class Ancestral(Stochastic):
    """The Gaussian kernel of one step. **Arguments:** `eta` in [0, 1], the noise: 1 for ancestral
    (DDPM), 0 for deterministic (DDIM).
    """

    eta: Array

    def __init__(self, eta: float | Array = 1.0):
        self.eta = _checks.in_range(eta, "eta", 0, 1)

    def kernel(self, interpolant: Interpolant, t: Array, u: Array) -> Kernel:
        """The kernel of the step from t to u."""
        sigma_t, sigma_u = interpolant.sigma(t), interpolant.sigma(u)
        rho = interpolant.alpha(t) * sigma_u / (interpolant.alpha(u) * sigma_t)
        # sqrt(sigma_u^2 - S2) / sigma_t, as a sum: near t = 0, where rho is small, the difference
        # would be only rounding.
        keep = sigma_u * jnp.sqrt(1 - self.eta**2 + (self.eta * rho) ** 2) / sigma_t
        std = self.eta * sigma_u * jnp.sqrt(1 - rho**2)
        gain = interpolant.alpha(u) - keep * interpolant.alpha(t)
        return Kernel(keep, gain, std, interpolant.tweedie(t), self.eta, response=gain)


class Consistency(Stochastic):
    """The kernel `N(alpha_u f(x), sigma_u^2 I)`: to the end of the trajectory, and back by fresh
    noise. It is the step of multistep consistency sampling (Song et al., arXiv 2303.01469,
    algorithm 1) and of latent consistency models (arXiv 2310.04378), for models of
    `from_consistency`.

    For the exact consistency function, each step keeps the law of `X_t`.
    """

    def kernel(self, interpolant: Interpolant, t: Array, u: Array) -> Kernel:
        """The kernel of the step from t to u."""
        one, std, tweedie = jnp.ones_like(t), interpolant.sigma(u), interpolant.tweedie(t)
        # f does not change by tweedie ∇ log h, as a denoiser does: the noise answers, as in a step
        # from a tilted Gaussian, by its variance times ∇ log h.
        response = std**2 / tweedie
        return Kernel(0 * one, interpolant.alpha(u), std, tweedie, one, response)


class Adaptive(Solver):
    """The probability flow to a tolerance, by Tsitouras' pair of orders 5 and 4 with step-size
    control (Diffrax).

    The flow is solved on a circle, on which all interpolants are alike. With
    `c = interpolant.data_scale()`, which is `sigma_0` except for `VE`, `r = hypot(sigma, c alpha)`
    and the angle `phi = arctan(sigma / (c alpha))`, which falls from pi / 2 (noise) to 0 (data),

        y = x / r = sin(phi) X_0 + cos(phi) X_1 / c,      dy/dphi = cos(phi) E~ - sin(phi) D~ / c,

    with y of unit size and no singularity at either end. A step to t = 1 is solved until
    `tan(phi) = floor` and then jumps to `D~`, with an error of second order in `floor`.

    The tolerance assumes a deterministic field. The *draws* of a random guidance are therefore
    fixed during a step, which the solver may divide; more steps are more draws. The *memory* of a
    guidance is also fixed during a step, and updated once at its end.

    Reverse-mode gradients are the exact gradients of the computation (checkpointed: memory grows
    with the logarithm of `max_steps`). There are no forward-mode gradients. A step that fails, or
    takes more than `max_steps` internal steps, ends in NaN, which a run reports.

    **Arguments:** `rtol`, `atol`, the error allowed in each internal step, relative and absolute
    for y; `max_steps`; `floor` in (0, 1).
    """

    rtol: Array
    atol: Array
    floor: Array
    max_steps: int = eqx.field(static=True)

    stochastic = False
    order = 5
    steps = 20

    def __init__(
        self,
        rtol: float | Array = 1e-5,
        atol: float | Array = 1e-6,
        *,
        max_steps: int = 500,
        floor: float | Array = 1e-3,
    ):
        self.rtol = _checks.positive(rtol, "rtol")
        self.atol = _checks.positive(atol, "atol")
        self.floor = _checks.in_range(floor, "floor", 0, 1, closed="neither")
        self.max_steps = _checks.count(max_steps, "max_steps")

    def last(self, interpolant: Interpolant) -> Array:
        """The time from which a step to t = 1 jumps."""
        return interpolant.time((self.floor * interpolant.data_scale()) ** -2)

    def solve(
        self,
        interpolant: Interpolant,
        denoise: Callable,
        t: Array,
        u: Array,
        x: Array,
        *,
        dense: bool = False,
    ) -> "FlowSegment":
        """The flow of the field `denoise(t, x)` from t to u, backward if u < t. Neither time may be
        1. Only a `dense` flow can be called.
        """
        import diffrax  # here, because it makes `import tiltjax` a third slower

        circle = _Circle(interpolant, interpolant.data_scale())

        def dy_dphi(phi: Any, y: Any, args: Any) -> Array:
            s = circle.time(phi)
            r = circle.radius(s)
            denoised = denoise(s, r * y)
            noise = interpolant.noise(s, r * y, denoised)
            cos_phi = circle.base * interpolant.alpha(s) / r
            sin_phi_over_c = interpolant.sigma(s) / (r * circle.base)
            return cos_phi * noise - sin_phi_over_c * denoised

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(dy_dphi),
            diffrax.Tsit5(),
            t0=circle.angle(t),
            t1=circle.angle(u),
            dt0=None,
            y0=x / circle.radius(t),
            saveat=diffrax.SaveAt(t1=True, dense=dense),
            # No step can be smaller than the rounding of the angle. If the field is NaN, this bound
            # ends the solve.
            stepsize_controller=diffrax.PIDController(
                self.rtol, self.atol, dtmin=float(jnp.finfo(x.dtype).eps), force_dtmin=False
            ),
            max_steps=self.max_steps,
            throw=False,
        )
        ys: Any = solution.ys
        success = solution.result == diffrax.RESULTS.successful
        return FlowSegment(circle, circle.radius(u) * ys[0], success, solution.interpolation)

    def step(self, keys, interpolant, field, t, u, x, state):
        end = jnp.where(u < 1, u, jnp.maximum(t, self.last(interpolant)))
        denoise = lambda s, x: field(keys.guidance, s, x, state)[0]
        flow = self.solve(interpolant, denoise, t, end, x)
        # If the solver failed, the field is evaluated at the previous state, to find the cause.
        denoised, state = field(keys.guidance, end, jnp.where(flow.success, flow.end, x), state)
        return jnp.where(flow.success, jnp.where(u < 1, flow.end, denoised), jnp.nan), state


class _Circle(eqx.Module):
    """The coordinates in which `Adaptive` solves; `base` is c."""

    interpolant: Interpolant
    base: Array

    def angle(self, t: Array) -> Array:
        return jnp.arctan2(self.interpolant.sigma(t), self.base * self.interpolant.alpha(t))

    def radius(self, t: Array) -> Array:
        return jnp.hypot(self.interpolant.sigma(t), self.base * self.interpolant.alpha(t))

    def time(self, phi: Array) -> Array:
        return self.interpolant.time((self.base * jnp.tan(phi)) ** -2)


class FlowSegment(eqx.Module):
    """A piece of the probability flow: the state `end` at its end and, if it is dense, the state
    `t -> x` at any time.

    If the solver failed, `success` is false, `end` is arbitrary, and the states are NaN.
    """

    circle: _Circle
    end: Array
    success: Array
    interpolation: Any

    def __call__(self, t: Array) -> Array:
        """The state at a time t of the piece."""
        y = self.interpolation.evaluate(self.circle.angle(t))
        return jnp.where(self.success, self.circle.radius(t) * y, jnp.nan)
