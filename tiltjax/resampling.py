r"""Resampling: how often each particle continues.

A scheme maps log-weights `(n,)` to int32 ancestors `(num,)`: particle i of the next generation
descends from `ancestors[i]`. All schemes are unbiased: with normalized weights W_i, particle i is
chosen `num W_i` times on average. With the schemes that are marked in the last column, particle i
is chosen either `floor(num W_i)` or `ceil(num W_i)` times.

| scheme | the points u_j that are looked up in the cumulative weights | floor or ceil |
|---|---|---|
| `multinomial` | independent, uniform | |
| `stratified` | `(j + U_j) / num` | |
| `systematic` | `(j + U) / num`, one U | yes |
| `residual` | `floor(num W_i)` copies each, the rest multinomial | at least floor |
| `ssp` | none: pairs of particles exchange their fractions until one is whole | yes |

Floor and ceil hold up to the rounding of the cumulative weights. With a million particles in single
precision, a few hundred of them have one offspring more or less. Weights need not be normalized;
`-inf` is a weight of zero. Ancestors are in no particular order. References: Chopin and
Papaspiliopoulos, *An Introduction to Sequential Monte Carlo*, chapter 9; Gerber, Chopin and
Whiteley (2019) for ssp.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks

# (key, log_weights, num) -> ancestors
Resampler = Callable[..., Array]


def multinomial(key: Array, log_weights: Array, num: int | None = None) -> Array:
    """Ancestors `(num,)` of independent draws, from `log_weights` `(n,)`. This scheme has the
    largest variance, and most theorems assume it.

    **Arguments:** `key`; `log_weights`; `num`, by default n. **Raises:** `ValueError` for
    log-weights of another rank, with NaN or inf, or all -inf.
    """
    key, (log_weights, num) = _checks.key(key), _checked(log_weights, num)
    # Normalized partial sums of exponentials are ordered uniforms, without sorting.
    gaps = jnp.cumsum(jax.random.exponential(key, (num + 1,), log_weights.dtype))
    return _look_up(log_weights, gaps[:-1] / gaps[-1])


def stratified(key: Array, log_weights: Array, num: int | None = None) -> Array:
    """Ancestors with one random point in each of `num` equal strata. Arguments and shapes as in
    `multinomial`.
    """
    log_weights, num = _checked(log_weights, num)
    offsets = jax.random.uniform(_checks.key(key), (num,), log_weights.dtype)
    return _counted(log_weights, offsets, num)


def systematic(key: Array, log_weights: Array, num: int | None = None) -> Array:
    """Ancestors with the same point in each of `num` equal strata. Arguments and shapes as in
    `multinomial`.
    """
    log_weights, num = _checked(log_weights, num)
    offset = jax.random.uniform(_checks.key(key), (), log_weights.dtype)
    return _counted(log_weights, offset, num)


def residual(key: Array, log_weights: Array, num: int | None = None) -> Array:
    """Ancestors with whole copies first and the rest multinomial. Arguments and shapes as in
    `multinomial`.
    """
    log_weights, num = _checked(log_weights, num)
    whole, fraction = _split(log_weights, num)
    # Not the ordered points of `multinomial`: each point must be uniform by itself, because only
    # some of the points are used.
    drawn = _look_up(
        jnp.log(fraction), jax.random.uniform(_checks.key(key), (num,), fraction.dtype)
    )
    first = jnp.cumsum(whole, dtype=jnp.int32)
    slot = jnp.arange(num, dtype=jnp.int32)
    copies = jnp.searchsorted(first, slot, side="right")
    # The whole copies fill the first slots, and draws fill the rest.
    return jnp.where(
        slot < first[-1], jnp.minimum(copies, len(whole) - 1), drawn[num - 1 - slot]
    ).astype(jnp.int32)


def ssp(key: Array, log_weights: Array, num: int | None = None) -> Array:
    """Ancestors by Srinivasan's process: pairs of particles trade their fractional offspring until
    one of the two is whole. Sequential. Arguments and shapes as in `multinomial`.
    """
    log_weights, num = _checked(log_weights, num)
    whole, fraction = _split(log_weights, num)
    uniforms = jax.random.uniform(_checks.key(key), (len(whole),), fraction.dtype)

    def trade(
        carry: tuple[Array, Array], particle: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        # Particle i has the fraction f, particle j has g. One of the two ends at 0 or 1; the other
        # particle continues to the next trade.
        i, f = carry
        j, g, uniform = particle
        total = f + g
        over = total > 1
        # The probabilities keep the means: the winner gets mass 1, or `total` if that is less.
        to_i = uniform < jnp.where(over, (1 - g) / (2 - total), f / jnp.maximum(total, 1e-30))
        winner, loser = jnp.where(to_i, i, j), jnp.where(to_i, j, i)
        # Above one, the winner is complete and the loser continues with the rest. Below one, the
        # loser has nothing and the winner continues with the total.
        complete = jnp.where(over, winner, -1)
        return (jnp.where(over, loser, winner), jnp.where(over, total - 1, total)), complete

    index = jnp.arange(len(whole), dtype=jnp.int32)
    start = index[0], fraction[0]
    (last, left), complete = jax.lax.scan(trade, start, (index[1:], fraction[1:], uniforms[1:]))
    # The fractions sum to a whole number, so the last fraction is 0 or 1 up to rounding.
    complete = jnp.append(complete, jnp.where(left > 0.5, last, -1))
    counts = whole + jnp.zeros_like(whole).at[jnp.where(complete < 0, len(whole), complete)].add(
        1, mode="drop"
    )
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    ancestors = jnp.searchsorted(ends, jnp.arange(num, dtype=jnp.int32), side="right")
    return jnp.minimum(ancestors, len(whole) - 1).astype(jnp.int32)


def _checked(log_weights: Array, num: int | None) -> tuple[Array, int]:
    """The log-weights as an array, and the number of ancestors."""
    log_weights = _checks.floating(log_weights, "log_weights")
    if jnp.finfo(log_weights.dtype).bits < 32:  # too narrow for sums of many weights
        log_weights = log_weights.astype(jnp.float32)
    if log_weights.ndim != 1 or not len(log_weights):
        raise ValueError(
            f"log_weights must be one number per particle, got shape {log_weights.shape}"
        )
    if _checks.concrete(log_weights):
        largest = np.asarray(log_weights).max()  # NaN if any log-weight is NaN
        if not np.isfinite(largest):
            raise ValueError(
                f"log_weights must be finite or -inf, not all -inf: their maximum is {largest}"
            )
    return log_weights, len(log_weights) if num is None else _checks.count(num, "num")


def _weights(log_weights: Array) -> Array:
    """Weights relative to the largest weight, to avoid overflow."""
    return jnp.exp(log_weights - jnp.max(log_weights))


@jax.jit  # outside a program, each of the many operations of the scans would compile separately
def _cumulative(log_weights: Array) -> Array:
    """Partial sums of the weights. A weight of zero adds exactly nothing, whatever the rounding of
    the sums.
    """
    weights = _weights(log_weights)
    sums = jax.lax.associative_scan(jnp.add, weights)
    return jax.lax.associative_scan(jnp.maximum, jnp.where(weights > 0, sums, 0.0))


@functools.partial(jax.jit, static_argnames="num")
def _counted(log_weights: Array, offsets: Array, num: int) -> Array:
    """The particles at the points `(j + offset_j) / num`, with one offset or `num` of them."""
    cumulative = _cumulative(log_weights)
    # The points below a cumulative weight can be counted, one in each stratum, which is faster than
    # a search for each point, and keeps the digits of the offsets. The total weight is above all
    # points, whatever the rounding of the product.
    scaled = cumulative * (num / cumulative[-1])
    whole = jnp.floor(scaled)
    stratum = jnp.clip(whole, 0, num - 1).astype(jnp.int32)
    offset = jnp.broadcast_to(offsets, (num,))[stratum]
    below = whole + jnp.where(scaled - whole > offset, 1, 0)
    ends = jnp.where(cumulative == cumulative[-1], num, jnp.clip(below, 0, num)).astype(jnp.int32)
    passed = jnp.zeros(num + 1, jnp.int32).at[ends].add(1)
    ancestors = jax.lax.associative_scan(jnp.add, passed[:num])
    return jnp.minimum(ancestors, len(log_weights) - 1)


@jax.jit
def _look_up(log_weights: Array, points: Array) -> Array:
    cumulative = _cumulative(log_weights)
    # Points are below one, but their product with the total may round up to the total. The last
    # particle with positive weight gets such points.
    total = jnp.nextafter(cumulative[-1], jnp.zeros_like(cumulative[-1]))
    ancestors = jnp.searchsorted(
        cumulative, jnp.minimum(points * cumulative[-1], total), side="right"
    )
    return jnp.minimum(ancestors, len(cumulative) - 1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="num")
def _split(log_weights: Array, num: int) -> tuple[Array, Array]:
    """The whole part and the fraction of the expected offspring."""
    weights = _weights(log_weights)
    expected = num * (weights / jnp.sum(weights))
    # Rounding may leave a whole number slightly too small.
    whole = jnp.floor(expected * (1 + 8 * jnp.finfo(expected.dtype).eps))
    return whole.astype(jnp.int32), jnp.maximum(expected - whole, 0.0)
