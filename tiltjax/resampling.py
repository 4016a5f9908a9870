r"""Resampling: which particles go on, and how often.

From log-weights `(n,)` to int32 ancestors `(num,)`, particle i of the next generation descending
from `ancestors[i]`. All of these are unbiased: with normalized weights W_i, particle i is chosen
`num W_i` times on average, and between `floor` and `ceil` of that for those that are marked.

| scheme | the points u_j that are looked up in the cumulative weights | floor or ceil |
|---|---|---|
| `multinomial` | independent, uniform | |
| `stratified` | `(j + U_j) / num` | |
| `systematic` | `(j + U) / num`, one U | yes |
| `residual` | `floor(num W_i)` copies each, the rest multinomial | at least floor |
| `ssp` | none: pairs of particles exchange their fractions until one is whole | yes |

Floor and ceil hold up to the rounding of the cumulative weights, of which a million in single
precision leave an offspring more or less to a few hundred. Weights need not be normalized; `-inf`
is a weight of zero. Ancestors come in no particular order. Reference: Chopin and Papaspiliopoulos,
*An Introduction to Sequential Monte Carlo*, chapter 9; Gerber, Chopin and Whiteley (2019) for ssp.
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
    """Independent draws. The most variable scheme, and the one that theorems are about.
    `log_weights` `(n,)`, ancestors `(num,)`.
    """
    key, (log_weights, num) = _checks.key(key), _checked(log_weights, num)
    # Ordered uniforms without sorting: normalized partial sums of exponentials.
    gaps = jnp.cumsum(jax.random.exponential(key, (num + 1,), log_weights.dtype))
    return _look_up(log_weights, gaps[:-1] / gaps[-1])


def stratified(key: Array, log_weights: Array, num: int | None = None) -> Array:
    """One point in each of `num` equal strata. Shapes as in `multinomial`."""
    log_weights, num = _checked(log_weights, num)
    offsets = jax.random.uniform(_checks.key(key), (num,), log_weights.dtype)
    return _look_up(log_weights, (jnp.arange(num, dtype=log_weights.dtype) + offsets) / num)


def systematic(key: Array, log_weights: Array, num: int | None = None) -> Array:
    """The same point in each of `num` equal strata. Shapes as in `multinomial`."""
    log_weights, num = _checked(log_weights, num)
    offset = jax.random.uniform(_checks.key(key), (), log_weights.dtype)
    return _counted(log_weights, offset, num)


def residual(key: Array, log_weights: Array, num: int | None = None) -> Array:
    """Whole copies first, the rest multinomially. Shapes as in `multinomial`."""
    log_weights, num = _checked(log_weights, num)
    whole, fraction = _split(log_weights, num)
    # Not the ordered points of `multinomial`: any of them, taken alone, must be uniform.
    drawn = _look_up(
        jnp.log(fraction), jax.random.uniform(_checks.key(key), (num,), fraction.dtype)
    )
    first = jnp.cumsum(whole, dtype=jnp.int32)
    slot = jnp.arange(num, dtype=jnp.int32)
    copies = jnp.searchsorted(first, slot, side="right")
    # The last slots are drawn: as many as whole copies leave.
    return jnp.where(
        slot < first[-1], jnp.minimum(copies, len(whole) - 1), drawn[num - 1 - slot]
    ).astype(jnp.int32)


def ssp(key: Array, log_weights: Array, num: int | None = None) -> Array:
    """Srinivasan's process: two particles at a time trade their fractional offspring until one of
    them is whole. Sequential.
    """
    log_weights, num = _checked(log_weights, num)
    whole, fraction = _split(log_weights, num)
    uniforms = jax.random.uniform(_checks.key(key), (len(whole),), fraction.dtype)

    def trade(
        carry: tuple[Array, Array], particle: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        # Particle i has the fraction f, particle j has g. One of them ends at 0 or 1; the other
        # goes on to the next trade.
        i, f = carry
        j, g, uniform = particle
        total = f + g
        over = total > 1
        # Mass 1 (or total, if less) goes to one of the two, so that the means stay.
        to_i = uniform < jnp.where(over, (1 - g) / (2 - total), f / jnp.maximum(total, 1e-30))
        winner, loser = jnp.where(to_i, i, j), jnp.where(to_i, j, i)
        # Over one: the winner is complete, the loser keeps what is left. Under: the loser has none,
        # the winner goes on with all of it.
        complete = jnp.where(over, winner, -1)
        return (jnp.where(over, loser, winner), jnp.where(over, total - 1, total)), complete

    index = jnp.arange(len(whole), dtype=jnp.int32)
    start = index[0], fraction[0]
    (last, left), complete = jax.lax.scan(trade, start, (index[1:], fraction[1:], uniforms[1:]))
    # Fractions sum to a whole number: what is left is 0 or 1 up to rounding.
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
    if log_weights.ndim != 1 or not len(log_weights):
        raise ValueError(
            f"log_weights must be one number a particle, got shape {log_weights.shape}"
        )
    if _checks.concrete(log_weights):
        largest = np.asarray(log_weights).max()  # NaN if any of them is
        if not np.isfinite(largest):
            raise ValueError(
                f"log_weights must be finite or -inf, not all -inf: their maximum is {largest}"
            )
    return log_weights, len(log_weights) if num is None else _checks.count(num, "num")


def _weights(log_weights: Array) -> Array:
    """Relative to the largest: nothing overflows, and a common factor does not matter."""
    return jnp.exp(log_weights - jnp.max(log_weights))


@jax.jit  # a scan of many operations, each of which would be compiled by itself
def _cumulative(log_weights: Array) -> Array:
    """Partial sums of the weights; those of zero add nothing at all, whatever the order of
    summation rounds to.
    """
    weights = _weights(log_weights)
    sums = jax.lax.associative_scan(jnp.add, weights)
    return jax.lax.associative_scan(jnp.maximum, jnp.where(weights > 0, sums, 0.0))


@functools.partial(jax.jit, static_argnames="num")
def _counted(log_weights: Array, offset: Array, num: int) -> Array:
    """The particles under the points `(j + offset) / num`."""
    cumulative = _cumulative(log_weights)
    # Equally spaced points below a cumulative weight can be counted, which is faster than to look
    # each of them up. The whole of the weight is above all of them, whatever is lost in the
    # product.
    scaled = cumulative * (num / cumulative[-1])
    below = jnp.floor(scaled) + jnp.where(scaled - jnp.floor(scaled) > offset, 1, 0)
    ends = jnp.where(cumulative == cumulative[-1], num, jnp.clip(below, 0, num)).astype(jnp.int32)
    passed = jnp.zeros(num + 1, jnp.int32).at[ends].add(1)
    ancestors = jax.lax.associative_scan(jnp.add, passed[:num])
    return jnp.minimum(ancestors, len(log_weights) - 1)


@jax.jit
def _look_up(log_weights: Array, points: Array) -> Array:
    cumulative = _cumulative(log_weights)
    # Points are below one, but their product with the total may round up to it: the last particle
    # with any weight takes those.
    total = jnp.nextafter(cumulative[-1], jnp.zeros_like(cumulative[-1]))
    ancestors = jnp.searchsorted(
        cumulative, jnp.minimum(points * cumulative[-1], total), side="right"
    )
    return jnp.minimum(ancestors, len(cumulative) - 1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="num")
def _split(log_weights: Array, num: int) -> tuple[Array, Array]:
    """Expected offspring as whole numbers and fractions."""
    weights = _weights(log_weights)
    expected = num * (weights / jnp.sum(weights))
    # A whole number that rounding left a little below itself is whole.
    whole = jnp.floor(expected * (1 + 8 * jnp.finfo(expected.dtype).eps))
    return whole.astype(jnp.int32), jnp.maximum(expected - whole, 0.0)
