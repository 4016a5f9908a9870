r"""Interpolants: how noise becomes data, and the Gaussian identity that the library is built on.

Time runs from noise (t = 0) to data (t = 1) along

    X_t = alpha_t X_1 + sigma_t X_0,    X_0 ~ N(0, I).

| interpolant | alpha | sigma | trained by |
|---|---|---|---|
| `Linear(base_scale)` | `t` | `(1 - t) base_scale` | flow matching, rectified flow |
| `VP(beta_min, beta_max)` | `exp(-B_t / 2)` | `sqrt(1 - alpha^2)` | score matching |
| `DiscreteVP(alphas_cumprod)` | through a table | `sqrt(1 - alpha^2)` | DDPM, Stable Diffusion |
| `VE(sigma_min, sigma_max)` | `1` | `sigma_max (1 - t)^rho` | EDM, k-diffusion, AlphaFold 3 |

A model is defined by its denoiser `D_t(x) = E[X_1 | X_t = x]`. Every other parametrization is
affine in the denoiser:

    noise     E = (x - alpha D) / sigma
    score     s = (alpha D - x) / sigma^2
    velocity  b = alpha' D + sigma' E.

The *natural parameters* of a noisy observation of `X_1` are its precision
`snr_t = alpha^2 / sigma^2` and `eta = alpha x / sigma^2`: the likelihood of `X_1` is
`exp(<eta, X_1> - snr |X_1|^2 / 2)`. Independent Gaussian observations add up in these coordinates,
and their sum is again an observation at *some* time: `observe`. Posterior sampling, conjugate tilts
and renoising all use this one function.

References: Albergo, Boffi and Vanden-Eijnden, *Stochastic interpolants* (arXiv 2303.08797); Lipman
et al. (arXiv 2210.02747). The memoryless diffusion `g^2 = 2 sigma (sigma alpha'/alpha - sigma')`
comes from Domingo-Enrich et al. (arXiv 2409.08861). Variance preservation: Ho, Jain and Abbeel
(arXiv 2006.11239, DDPM); Song et al. (arXiv 2011.13456). Variance explosion: Karras et al. (arXiv
2206.00364, EDM).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _repr


class Interpolant(_repr.Printable):
    """`X_t = alpha_t X_1 + sigma_t X_0`. Subclasses define `alpha`, `sigma` and `time`.

    All times and snr values are scalars; states have any shape. No method evaluates a model.
    """

    def alpha(self, t: Array) -> Array:
        """The coefficient of the data."""
        raise NotImplementedError

    def sigma(self, t: Array) -> Array:
        """The standard deviation of the noise."""
        raise NotImplementedError

    def time(self, snr: Array) -> Array:
        """The time whose signal-to-noise ratio `alpha^2 / sigma^2` is `snr`: the inverse of
        `snr`.
        """
        raise NotImplementedError

    def snr(self, t: Array) -> Array:
        """`alpha_t^2 / sigma_t^2`: the precision of `X_t` as an observation of `X_1`; infinite at t
        = 1.
        """
        return (self.alpha(t) / self.sigma(t)) ** 2

    def snr_range(self) -> tuple[Array, Array]:
        """The lowest and the highest snr on which a network with this interpolant is trained: by
        default all values from t = 0 on.
        """
        lowest = self.snr(jnp.asarray(0.0))
        return lowest, jnp.full_like(lowest, jnp.inf)

    def call_range(self) -> tuple[Array, Array]:
        """The lowest and the highest snr at which a network with this interpolant can be called: by
        default those of its training.
        """
        return self.snr_range()

    def data_scale(self) -> Array:
        """The standard deviation that defaults assume for data of unknown width: by default that of
        the noise, `sigma_0`.
        """
        return jnp.asarray(self.sigma(0.0))  # pyright: ignore[reportArgumentType]

    def default_times(self, steps: int) -> Array | None:
        """The times of a run of this interpolant, `(steps + 1,)`, or `None` for equal steps on
        [1e-3, 1], scaled to the width of the data (`grids.of_width`).
        """
        return None

    def advance(self, s: Array, t: Array, u: Array, x: Array, denoised: Array) -> Array:
        """The state after Euler's step of the probability flow over the interval from t to u, with
        the drift at x and time s, one end of the interval: `x + (u - t) b_s(x)`.
        """
        return x + (u - t) * self.velocity(s, x, denoised)

    def diffusion(self, t: Array) -> Array:
        """`g_t^2`, the memoryless squared diffusion coefficient; infinite where `alpha_t = 0`."""
        return 2 * self._wronskian(t) * self.sigma(t) / self.alpha(t)

    def noise(self, t: Array, x: Array, denoised: Array) -> Array:
        """`E[X_0 | X_t = x]`."""
        return (x - self.alpha(t) * denoised) / self.sigma(t)

    def score(self, t: Array, x: Array, denoised: Array) -> Array:
        """`∇ log p_t(x)`."""
        return -self.noise(t, x, denoised) / self.sigma(t)

    def velocity(self, t: Array, x: Array, denoised: Array) -> Array:
        """The drift `b_t(x)` of the probability flow."""
        return jax.grad(self.alpha)(t) * denoised + jax.grad(self.sigma)(t) * self.noise(
            t, x, denoised
        )

    def denoised_from_noise(self, t: Array, x: Array, noise: Array) -> Array:
        """The denoiser from a noise prediction; singular where `alpha_t = 0`."""
        return (x - self.sigma(t) * noise) / self.alpha(t)

    def denoised_from_score(self, t: Array, x: Array, score: Array) -> Array:
        """The denoiser from a score, `(x + sigma^2 s) / alpha` (Tweedie's formula); singular where
        `alpha_t = 0`.
        """
        return (x + self.sigma(t) ** 2 * score) / self.alpha(t)

    def denoised_from_velocity(self, t: Array, x: Array, velocity: Array) -> Array:
        """The denoiser from a velocity."""
        return (self.sigma(t) * velocity - jax.grad(self.sigma)(t) * x) / self._wronskian(t)

    def denoised_from_v(self, t: Array, x: Array, v: Array) -> Array:
        """The denoiser from a prediction of `v = alpha X_0 - sigma X_1` (Salimans and Ho, arXiv
        2202.00512), which is not the velocity: `(alpha x - sigma v) / (alpha^2 + sigma^2)`.
        """
        alpha, sigma = self.alpha(t), self.sigma(t)
        return (alpha * x - sigma * v) / (alpha**2 + sigma**2)

    def tweedie(self, t: Array) -> Array:
        """`sigma_t^2 / alpha_t`, the factor of Tweedie's identities.

        `Cov(X_1 | X_t = x) = tweedie * ∂D/∂x`, and a gradient `∇ log h` moves the denoiser by
        `tweedie * ∇ log h`.
        """
        return self.sigma(t) ** 2 / self.alpha(t)

    def observe(self, precision: Array, natural: Array) -> tuple[Array, Array]:
        """The time and state with a given Gaussian likelihood of `X_1`.

        The likelihood `exp(<natural, X_1> - precision |X_1|^2 / 2)` is that of `X_{t*} = x*` with
        `snr_{t*} = precision` and `x* = alpha_{t*} natural / precision`. The posterior of `X_1`
        given any sum of Gaussian observations is therefore the posterior given one noisy state.

        **Arguments:** `precision`, a positive scalar; `natural`, of the state's shape. **Returns:**
        `(t*, x*)`.
        """
        t = self.time(precision)
        return t, self.alpha(t) / precision * natural

    def _wronskian(self, t: Array) -> Array:
        """`sigma alpha' - sigma' alpha`, the Wronskian."""
        return self.sigma(t) * jax.grad(self.alpha)(t) - jax.grad(self.sigma)(t) * self.alpha(t)


class Linear(Interpolant):
    """`alpha_t = t`, `sigma_t = (1 - t) * base_scale`: flow matching, rectified flow.

    **Arguments:** `base_scale`, the standard deviation `c_0` of the noise `N(0, c_0^2 I)` that
    sampling starts from.
    """

    base_scale: Array

    def __init__(self, base_scale: float | Array = 1.0):
        self.base_scale = _checks.positive(base_scale, "base_scale")

    def alpha(self, t: Array) -> Array:
        return 1.0 * t

    def sigma(self, t: Array) -> Array:
        return (1 - t) * self.base_scale

    def time(self, snr: Array) -> Array:
        # 1 / (1 + 1/x) instead of x / (1 + x) is right at both ends, snr = 0 and snr = inf.
        return 1 / (1 + 1 / (self.base_scale * jnp.sqrt(snr)))


class _VariancePreserving(Interpolant):
    """`alpha^2 + sigma^2 = 1`, defined by `B_t = -log alpha_t^2`, which falls to 0 at t = 1.
    Subclasses define `integrated_rate`, B, and `time_left`, its inverse.

    `g_t^2 = -dB/dt` is the noise rate `beta_t` of the literature. The state at t = 0 contains data:
    `alpha_0 > 0`.
    """

    def integrated_rate(self, t: Array) -> Array:
        """`B_t`, the integral of the noise rate from t to 1."""
        raise NotImplementedError

    def time_left(self, integral: Array) -> Array:
        """The `1 - t` at which `B_t` equals `integral`."""
        raise NotImplementedError

    def alpha(self, t: Array) -> Array:
        return jnp.exp(-self.integrated_rate(t) / 2)

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(-self.integrated_rate(t)))

    def time(self, snr: Array) -> Array:
        # snr = 1 / (e^B - 1).
        return 1 - self.time_left(jnp.log1p(1 / snr))

    def diffusion(self, t: Array) -> Array:
        # Without sigma', which is infinite at t = 1, because sigma falls like a square root there.
        return -jax.grad(self.integrated_rate)(t)


class VP(_VariancePreserving):
    """The variance-preserving interpolant with the noise rate
    `beta(s) = beta_min + (beta_max - beta_min) s`, `s = 1 - t`.

    `B_t = beta_min s + (beta_max - beta_min) s^2 / 2`, `alpha = exp(-B / 2)`,
    `sigma = sqrt(1 - exp(-B))`. The time of the literature is s. The formulas also hold for t < 0,
    where no network was trained.

    **Arguments:** `beta_min`, `beta_max`: the noise rates at the data and at the noise,
    `0 < beta_min <= beta_max`.

    **Raises:** `ValueError` for rates that are not positive or in the wrong order. Source: Song et
    al. (arXiv 2011.13456).
    """

    beta_min: Array
    beta_max: Array

    def __init__(self, beta_min: float | Array = 0.1, beta_max: float | Array = 20.0):
        self.beta_min = _checks.positive(beta_min, "beta_min")
        self.beta_max = _checks.positive(beta_max, "beta_max")
        ends = self.beta_min, self.beta_max
        if _checks.concrete(ends) and np.asarray(ends[1]) < np.asarray(ends[0]):
            raise ValueError(
                "beta_max, the noise rate at t = 0, must not be below beta_min, the noise rate at "
                f"t = 1, got {float(self.beta_max):g} < {float(self.beta_min):g}"
            )

    def integrated_rate(self, t: Array) -> Array:
        s = 1 - t
        return s * (self.beta_min + (self.beta_max - self.beta_min) * s / 2)

    def time_left(self, integral: Array) -> Array:
        # The root of a quadratic as a function of beta_min / B has no cancellation, and is right at
        # both ends, B = 0 and B = inf.
        ratio = self.beta_min / integral
        return 2 / (
            ratio + jnp.sqrt(ratio * (ratio + 2 * (self.beta_max - self.beta_min) / self.beta_min))
        )


class DiscreteVP(_VariancePreserving):
    """The interpolant of a network trained on a table of N noise levels,
    `alpha_i^2 = alphas_cumprod[i]`, with i = N - 1 the noisiest level.

    Time is linear in the level, `t = 1 - (i + 1) / N`: `clock(i)` is the time, and `index(t)` is
    the level, a float between levels. Level N - 1 is at t = 0, level 0 at `1 - 1 / N`. For a
    network that takes the level,

        vp = DiscreteVP(alphas_cumprod)
        model = from_noise(lambda t, x: net(vp.index(t), x), shape=..., interpolant=vp)

    At the levels, `alpha^2` is the value in the table. Between levels, `log snr` is a monotone
    rational quadratic spline (Gregory and Delbourgo 1982), with one continuous derivative and an
    inverse in closed form. Between level 0 and t = 1, where no network was trained, the noise rate
    is constant, as with one more level `alpha^2 = 1` at i = -1. A run goes from level 0 to t = 1 by
    a jump to the denoiser.

    `sample` raises an error for times beyond the table. `Glass` and `FlowMap` call the network at
    later times than their own time, and these times are not checked.

    **Arguments:** `alphas_cumprod`, `(N,)`, N >= 2 numbers (not traced), strictly decreasing inside
    (0, 1).

    **Raises:** `ValueError` for another table.
    """

    noise_level: Array
    slope: Array

    def __init__(self, alphas_cumprod: _checks.Numbers):
        # In NumPy, so that the logarithms are taken in double precision.
        table = np.asarray(alphas_cumprod)
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(
                "alphas_cumprod must be a table of N >= 2 levels, shape (N,), got shape "
                f"{table.shape}"
            )
        table = table.astype(np.float64)
        if not (np.all(np.diff(table) < 0) and table[0] < 1 and table[-1] > 0):
            raise ValueError(
                "alphas_cumprod must decrease strictly inside (0, 1), from the least to the most "
                f"noisy level, got [{table[0]:g}, ..., {table[-1]:g}]: reverse an increasing "
                "table; leave out a last level that is 0 (no index changes)"
            )
        level = np.log1p(-table) - np.log(table)
        chord = np.diff(level)
        rate = -np.log(table[0])  # B of level 0
        # The slopes: that of a constant noise rate at level 0, means of neighboring chords inside,
        # and at the noisy end the squared last chord over the last mean.
        first, middle = rate / (1 - table[0]), (chord[1:] + chord[:-1]) / 2
        last = chord[-1] ** 2 / middle[-1] if len(middle) else chord[-1]
        self.noise_level = _checks.floating(level, "alphas_cumprod")
        self.slope = _checks.floating(np.concatenate([[first], middle, [last]]), "alphas_cumprod")

    def _call(self, **given: Any) -> str:
        return _repr.call(self, levels=self.noise_level.shape[-1], **given)

    def clock(self, index: Array) -> Array:
        """The time of level `index`, `1 - (index + 1) / N`."""
        return 1 - (index + 1) / len(self.noise_level)

    def index(self, t: Array) -> Array:
        """The level at time t, `N (1 - t) - 1`: a float, which is a whole number up to rounding at
        the levels.
        """
        return len(self.noise_level) * (1 - t) - 1

    def snr_range(self) -> tuple[Array, Array]:
        return jnp.exp(-self.noise_level[-1]), jnp.exp(-self.noise_level[0])

    def integrated_rate(self, t: Array) -> Array:
        # Pieces are counted by u = i + 1 = N (1 - t), whose last operation is a product. A compiler
        # may round i, a product minus one, in two ways at two places. At a level, the piece and the
        # position in it would then disagree.
        n = len(self.noise_level)
        u = n * (1 - t)
        # Both sides of the select need a finite derivative, so their inputs are selected as well.
        inside = jnp.where(u < 1, 1.0, jnp.where(u > n, float(n), u))
        k = jnp.clip(jnp.floor(inside), 1, n - 1)
        xi = inside - k
        level, chord, left, right = self._piece(k.astype(int) - 1)
        bend = left + right - 2 * chord
        level += chord * xi * (chord * xi + left * (1 - xi)) / (chord + bend * xi * (1 - xi))
        level += self.slope[-1] * jnp.where(u > n, u - n, 0.0)
        # snr = e^-level, so that B = log(1 + e^level).
        return jnp.where(u < 1, self._first() * u, jax.nn.softplus(level))

    def time_left(self, integral: Array) -> Array:
        n, first = len(self.noise_level), self._first()
        level = jnp.log(jnp.expm1(jnp.where(integral < first, first, integral)))
        beyond = level > self.noise_level[-1]
        inside = jnp.where(beyond, self.noise_level[-1], level)
        k = jnp.clip(jnp.searchsorted(self.noise_level, inside, side="right") - 1, 0, n - 2)
        start, chord, left, right = self._piece(k)
        rise, bend = inside - start, left + right - 2 * chord
        b = chord * left - rise * bend
        xi = (
            2
            * chord
            * rise
            / (b + jnp.sqrt(b**2 + 4 * (chord * (chord - left) + rise * bend) * chord * rise))
        )
        i = (
            k.astype(xi.dtype)
            + xi
            + jnp.where(beyond, level - self.noise_level[-1], 0.0) / self.slope[-1]
        )
        return jnp.where(integral < first, integral / first, i + 1) / n

    def _first(self) -> Array:
        """B of level 0."""
        return jax.nn.softplus(self.noise_level[0])

    def _piece(self, k: Array) -> tuple[Array, Array, Array, Array]:
        """The piece between levels k and k + 1: `-log snr` at level k, the chord, and the slopes at
        both ends.
        """
        start, end = self.noise_level[k], self.noise_level[k + 1]
        return start, end - start, self.slope[k], self.slope[k + 1]


class VE(Interpolant):
    r"""The variance-exploding interpolant `X_t = X_1 + sigma_t X_0`,
    `sigma_t = sigma_max (1 - t)^rho`, of networks that take a noise level sigma: EDM, k-diffusion,
    AlphaFold 3, consistency models.

    Equal steps in t are the noise levels of Karras et al. (arXiv 2206.00364, eq. 5),

        sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,

    because `sigma^(1/rho)` is linear in t. Level `sigma_min` is at
    `t_end = 1 - (sigma_min / sigma_max)^(1/rho)`, 0.78 by default. The default times of a run are
    `linspace(0, t_end, n)`, where the levels are those above, and 1 at the end, the jump to the
    denoiser. `Euler` and `Heun` take steps in sigma, `x + (sigma_u - sigma_t) E_t(x)` with the
    noise prediction E. So `Heun` on these times is the deterministic sampler of that paper
    (algorithm 1), and `Euler` is DDIM.

    `sigma(t)` takes arrays: a batched network of a noise level is called as `net(x, ve.sigma(t))`.
    A run calls the network between `sigma_max` and `sigma_min` only. Posteriors and guidances that
    add a precision to the snr (`Glass`, `FlowMap`, `Conjugate`), and the solver `Adaptive`, also
    call it at lower levels, down to about `1e-3 sigma_data`.

    **Arguments:** `sigma_min`, `sigma_max`: the noise levels of a run, `0 < sigma_min < sigma_max`,
    between which the network was trained. `rho >= 1`: the larger, the more steps near the data.
    `sigma_data`: the standard deviation of the data, for the preconditioning of EDM (`from_edm`)
    and for all defaults for data of unknown width. AlphaFold 3 has
    `VE(4e-4 * 16, 160 * 16, sigma_data=16)`.

    **Raises:** `ValueError` for levels that are not positive or in the wrong order, and `rho < 1`.
    """

    sigma_min: Array
    sigma_max: Array
    rho: Array
    sigma_data: Array

    def __init__(
        self,
        sigma_min: float | Array = 0.002,
        sigma_max: float | Array = 80.0,
        rho: float | Array = 7.0,
        sigma_data: float | Array = 0.5,
    ):
        self.sigma_min = _checks.positive(sigma_min, "sigma_min")
        self.sigma_max = _checks.positive(sigma_max, "sigma_max")
        self.rho = _checks.in_range(rho, "rho", 1)
        self.sigma_data = _checks.positive(sigma_data, "sigma_data")
        ends = self.sigma_min, self.sigma_max
        if _checks.concrete(ends) and not np.asarray(ends[0]) < np.asarray(ends[1]):
            raise ValueError(
                "sigma_min, the noise level next to the data, must be below sigma_max, the noise "
                f"level of the start, got {float(self.sigma_min):g} >= {float(self.sigma_max):g}"
            )

    def alpha(self, t: Array) -> Array:
        return 1.0 + 0.0 * t

    def sigma(self, t: Array) -> Array:
        return self.sigma_max * (1 - t) ** self.rho

    def time(self, snr: Array) -> Array:
        return 1 - (self.sigma_max**2 * snr) ** (-0.5 / self.rho)

    def snr_range(self) -> tuple[Array, Array]:
        return self.sigma_max**-2, self.sigma_min**-2

    def call_range(self) -> tuple[Array, Array]:
        # A tenth of the least level of a run, for guidances that add a precision to the snr.
        return self.sigma_max**-2, 100 * self.sigma_min**-2

    def data_scale(self) -> Array:
        return self.sigma_data

    def default_times(self, steps: int) -> Array:
        dtype = self.sigma_max.dtype
        end = 1 - (self.sigma_min / self.sigma_max) ** (1 / self.rho)
        inner = end * jnp.arange(steps, dtype=dtype) / max(steps - 1, 1)
        return jnp.append(inner, jnp.ones((), dtype))

    def advance(self, s: Array, t: Array, u: Array, x: Array, denoised: Array) -> Array:
        # With alpha' = 0 the flow is dx = E dsigma. A step in sigma needs no slope of sigma, which
        # changes by a factor of more than two over one of 20 steps.
        return x + (self.sigma(u) - self.sigma(t)) * self.noise(s, x, denoised)


def or_linear(interpolant: Interpolant | None, base_scale: float = 1.0) -> Interpolant:
    """The interpolant, or `Linear(base_scale)` in place of `None`. **Raises:** `TypeError` for
    other values.
    """
    if interpolant is None:
        return Linear(base_scale)
    _checks.instance(interpolant, Interpolant, "interpolant", "such as tiltjax.Linear(base_scale)")
    return interpolant


def start_of(interpolant: Interpolant, t: Any, dtype: Any) -> tuple[float, float, float]:
    """`alpha_t`, `snr_t` and `data_scale()` as Python numbers, also inside a `jit`."""
    # With NumPy numbers, an interpolant that consists of arithmetic compiles nothing.
    leaves = lambda leaf: np.asarray(leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf)
    interpolant, t = jax.tree.map(leaves, interpolant), np.asarray(t, dtype)
    with jax.ensure_compile_time_eval(), np.errstate(divide="ignore"):
        scale = interpolant.data_scale()
        return float(interpolant.alpha(t)), float(interpolant.snr(t)), float(scale)
