r"""The checkerboard: a law with sharp edges and many modes, with a denoiser in closed form.

The data are uniform on the 18 unit squares of `[-3, 3]^2` on which `floor(x + 3) + floor(y + 3)` is
even. Given `X_t = x`, the coordinates are independent truncated Gaussians within each square. With
the masses `w_i` and means `m_i` of the six unit intervals of each coordinate,

    D = sum_ij B_ij w_i w'_j (m_i, m'_j) / sum_ij B_ij w_i w'_j,      B_ij = 1 where i + j is even.

The mass and mean of an interval are integrals of `exp(eta z - snr z^2 / 2)`. If this Gaussian is
wide compared with the interval, Gauss-Legendre nodes give the integrals. If it is narrow, the
normal distribution function gives them. Each form is exact to rounding in its range, also in single
precision, and neither subtracts large numbers.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.models._base import Model

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_EDGES = np.arange(-3.0, 3.0)  # left ends of the intervals
_BOARD = np.add.outer(np.arange(6), np.arange(6)) % 2 == 0
_WIDE = (
    64.0  # the largest snr at which 24 nodes per interval are exact: a standard deviation of 1/8
)
SCALE = float(np.sqrt(3.0))  # the standard deviation of a coordinate, uniform on [-3, 3]


class Checkerboard(Model):
    """The exact model of the checkerboard.

    **Arguments:** `interpolant`, by default `Linear(base_scale=sqrt(3))`, whose noise is as wide as
    the data; `dtype` of the states.
    """

    interpolant: Interpolant
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(self, interpolant: Interpolant | None = None, dtype: Any = None):
        self.interpolant = or_linear(interpolant, SCALE)
        self.shape = (2,)
        self.dtype = _checks.float_dtype(dtype, "states")

    def denoise(self, t: Array, x: Array) -> Array:
        snr = self.interpolant.snr(t)
        natural = self.interpolant.alpha(t) / self.interpolant.sigma(t) ** 2 * x
        (masses, means), (masses_, means_) = (
            _intervals(snr, eta) for eta in (natural[0], natural[1])
        )
        # In logarithms: far from the filled squares every product of masses underflows.
        logits = jnp.where(jnp.asarray(_BOARD), masses[:, None] + masses_[None, :], -jnp.inf)
        weights = jax.nn.softmax(logits, axis=(0, 1))
        return jnp.stack([jnp.sum(weights, axis=1) @ means, jnp.sum(weights, axis=0) @ means_])

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point: `-log 18` on the filled squares, `-inf` elsewhere."""
        cell = jnp.floor(x + 3)
        filled = jnp.all((cell >= 0) & (cell < 6)) & (jnp.mod(jnp.sum(cell), 2) == 0)
        return jnp.where(filled, -jnp.log(18.0).astype(x.dtype), -jnp.inf)

    def sample(self, key: Array, num: int) -> Array:
        """`num` exact samples, `(num, 2)`."""
        key_square, key_inside = jax.random.split(key)
        rows, columns = np.nonzero(_BOARD)
        corner = jnp.asarray(np.stack([rows, columns], axis=1) - 3.0, self.dtype)
        square = jax.random.randint(key_square, (num,), 0, len(rows))
        return corner[square] + jax.random.uniform(key_inside, (num, 2), self.dtype)


def _intervals(snr: Array, eta: Array) -> tuple[Array, Array]:
    """Log-masses (up to one constant) and means of `exp(eta z - snr z^2 / 2)` on the six intervals,
    each `(6,)`.
    """
    left = jnp.asarray(_EDGES, eta.dtype)

    # The wide case: z = left + u, and the exponent relative to its largest value on the nodes.
    u = jnp.asarray((_NODES + 1) / 2, eta.dtype)
    z = left[:, None] + u[None, :]
    wide = jnp.minimum(snr, _WIDE)
    exponent = eta * z - wide * z**2 / 2
    peak = jax.lax.stop_gradient(jnp.max(exponent, axis=1))  # it cancels
    terms = jnp.asarray(_WEIGHTS, eta.dtype)[None, :] * jnp.exp(exponent - peak[:, None])
    total = jnp.sum(terms, axis=1)
    wide_mass, wide_mean = (
        peak + jnp.log(total / 2),
        left + jnp.sum(terms * u[None, :], axis=1) / total,
    )

    # The narrow case: standardized ends, reflected so that both lie in the left tail or around 0.
    narrow = jnp.maximum(snr, _WIDE)
    root = jnp.sqrt(narrow)
    lower, upper = (left - eta / narrow) * root, (left + 1 - eta / narrow) * root
    flip = lower + upper > 0
    low, high = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    log_high = jax.scipy.special.log_ndtr(high)
    gap = jnp.minimum(jax.scipy.special.log_ndtr(low) - log_high, -jnp.finfo(eta.dtype).tiny)
    log_mass = log_high + jnp.log(-jnp.expm1(gap))
    # E[Z] = (phi(low) - phi(high)) / mass, clipped to the interval, as rounding may leave it.
    density = lambda z: jnp.exp(-(z**2) / 2 - jnp.log(2 * jnp.pi) / 2 - log_mass)
    mean = jnp.clip(density(low) - density(high), low, high)
    mean = jnp.where(flip, -mean, mean)
    narrow_mean = jnp.clip((mean / root) + eta / narrow, left, left + 1)

    is_wide = snr <= _WIDE
    # The narrow mass omits the common term of all intervals of a coordinate,
    # `eta^2 / (2 snr) + log(2 pi / snr) / 2`, which would cost digits.
    masses = jnp.where(is_wide, wide_mass, log_mass)
    return masses, jnp.where(is_wide, wide_mean, narrow_mean)
