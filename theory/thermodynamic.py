r"""`log Z` by thermodynamic integration, for any law whose tilted mean reward is known or measured.

With `Z(scale) = E[exp(scale r(X))]` under the prior, `log Z(0) = 0` and

    d log Z / d scale = E_scale[r],    d^2 log Z / d scale^2 = Var_scale(r) >= 0,

E_scale being the expectation under the tilt: `log Z(scale) = ∫_0^scale E_l[r] dl` (Kirkwood 1935; Gelman and Meng 1998, *Simulating
normalizing constants*: path sampling). The second line makes `E_l[r]` nondecreasing in l, so that left and right Riemann sums on any grid
of scales are below and above the truth: a bracket, not an error estimate. Z must be finite on all of the way.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs


def thermodynamic_integral(
    expected_reward: Callable[[Array], Array], scale: float | Array, *, nodes: int = 32, start: float | Array = 0.0
) -> Array:
    """`log Z(scale) - log Z(start)`, from `expected_reward(l) = E_l[r]`, by Gauss-Legendre nodes; `log Z(0) = 0`.

    `expected_reward` is called with one scale at a time and is traced once: `lambda l: theory.expected_reward(theory.tilt(prior, reward,
    l).mixture, reward)`, or `theory.quadrature.tilt(prior, reward, l).expect(reward)`. The error falls geometrically in `nodes` for a
    smooth `E_l[r]`; double them to see it. Strong tilts (`scale * variance` of hundreds) vary most near 0: integrate in pieces, by `start`.
    Differentiates in `scale` (the derivative is `E_scale[r]`) and through `expected_reward`.

    **Raises:** `ValueError` for a scale or a start that is negative or not finite, and for no nodes.
    """
    inputs.function(expected_reward, "expected_reward")
    end = inputs.nonnegative(scale, "scale")
    begin = inputs.nonnegative(start, "start").astype(end.dtype)
    node, weight = np.polynomial.legendre.leggauss(inputs.count(nodes, "nodes"))
    width = end - begin
    scales = begin + width * jnp.asarray((1 + node) / 2, end.dtype)
    # One after the other: quadrature in the plane needs the memory of one grid.
    values = jax.lax.map(expected_reward, scales)
    if values.shape != (len(node),):
        raise ValueError(f"expected_reward must return one number for one scale, got shape {values.shape[1:]}")
    return width * (jnp.asarray(weight / 2, values.dtype) @ values).astype(width.dtype)


class LogNorm(NamedTuple):
    """`log Z` from measured mean rewards: `value`, between `lower` and `upper`, each with its standard error.

    `value` is the trapezoidal rule, the middle of the two. Without noise the truth is in `[lower, upper]`; with it, in that interval widened
    by the standard errors of its ends.
    """

    value: Array
    lower: Array
    upper: Array
    error: Array
    lower_error: Array
    upper_error: Array


def thermodynamic_bracket(scales: Array, expected_rewards: Array, standard_errors: Array | None = None) -> LogNorm:
    """`log Z(scales[-1]) - log Z(scales[0])` from mean rewards measured at rising scales, and a bracket of it.

    **Arguments:** `scales` `(n,)`, n >= 2, rising (from 0 for `log Z` itself); `expected_rewards` `(n,)`, those of the tilt at each scale,
    from independent runs; `standard_errors` `(n,)`, theirs: none for exact values.

    **Raises:** `ValueError` for shapes that disagree, scales that do not rise, negative errors, and mean rewards that fall by more than
    five standard errors (or by more than rounding, if exact): those of a tilt never do, so these are a sampler's bias.
    """
    scales = inputs.finite(scales, "scales", 1)
    values = inputs.finite(expected_rewards, "expected_rewards", 1).astype(scales.dtype)
    errors = jnp.zeros_like(values) if standard_errors is None else inputs.finite(standard_errors, "standard_errors", 1)
    errors = errors.astype(scales.dtype)
    if len(scales) < 2 or not scales.shape == values.shape == errors.shape:
        raise ValueError(
            f"two scales or more, and one mean reward and error for each: got {scales.shape}, {values.shape} and {errors.shape}"
        )
    _check(scales, values, errors)
    steps = jnp.diff(scales)
    zero = jnp.zeros((1,), steps.dtype)
    left, right = jnp.concatenate([steps, zero]), jnp.concatenate([zero, steps])
    rules = jnp.stack([(left + right) / 2, left, right])
    sums, spreads = rules @ values, jnp.sqrt(rules**2 @ errors**2)
    return LogNorm(*sums, *spreads)


def _check(scales: Array, values: Array, errors: Array) -> None:
    if not inputs.concrete((scales, values, errors)):
        return
    scale, value, error = (np.asarray(part, np.float64) for part in (scales, values, errors))
    if np.any(np.diff(scale) <= 0) or scale[0] < 0:
        raise ValueError(f"scales must rise, from 0 or more, got {scale}")
    if np.any(error < 0):
        raise ValueError(f"standard errors must not be negative, got {error}")
    allowed = 5 * np.hypot(error[1:], error[:-1]) + 1e3 * np.finfo(scales.dtype).eps * np.abs(value).max()
    fall = -np.diff(value) - allowed
    if np.any(fall > 0):
        i = int(np.argmax(fall))
        raise ValueError(
            f"the mean reward falls from {value[i]:g} at scale {scale[i]:g} to {value[i + 1]:g} at {scale[i + 1]:g}, beyond its standard "
            "errors: that of the tilt never falls, so the measured laws are not the tilts (or their errors are too small)"
        )
