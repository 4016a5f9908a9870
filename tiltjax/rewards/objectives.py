r"""Several objectives: weighted sums, constraints, and Pareto fronts.

A weighted sum of rewards is a reward, whose tilt is a compromise. As the weights vary, the mean
rewards

    w  ->  (E r_1, ..., E r_m) under rho(x) exp(scale * sum_i w_i r_i(x)) / Z

trace the front. They are the gradient of `log Z / scale` in w. `log Z` is convex in w, so the front
is the boundary of a convex set: no law with the same or a smaller divergence from rho has a larger
weighted mean reward.

| wanted | call |
|---|---|
| a compromise | `weighted([a, b], [0.3, 0.7])`: weights are traced, so a sweep compiles once |
| `g(x) <= 0`, with a penalty | `a + Constraint(g, penalty=10.)` |
| `g(x) <= 0`, always | `a + Constraint(g)` in `smc` with `ValueOnly`, or a selection |
| a comparison of laws | `values([a, b], particles)`, `front`, `hypervolume` |

Pareto fronts and dominated volumes: Zitzler and Thiele, IEEE Trans. Evolutionary Computation 3
(1999).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from tiltjax import _checks
from tiltjax.rewards._base import Reward, Scaled, Sum, as_reward, value
from tiltjax.rewards._base import values as reward_values


def weighted(objectives: Sequence[Callable], weights: _checks.Numbers) -> Reward:
    """The reward `sum_i w_i r_i(x)`, which is conjugate if all terms are.

    **Arguments:** `objectives`, m rewards; `weights`, `(m,)`, of any sign.

    **Raises:** `ValueError` for another number of weights.
    """
    _check_objectives(objectives)
    weights = _checks.finite(weights, "weights", 1)
    if not objectives or len(weights) != len(objectives):
        raise ValueError(
            f"pass one weight per objective, got {len(weights)} weights for {len(objectives)} "
            "objectives"
        )
    pairs = zip(objectives, weights, strict=True)
    return Sum(tuple(Scaled(as_reward(one, "objectives"), weight) for one, weight in pairs))


class Constraint(Reward):
    """`r(x) = -penalty * max(g(x), 0)`, zero where `g(x) <= 0` and a penalty for the violation
    elsewhere.

    Without `penalty` the reward is the limit of large penalties, `-inf` where `g(x) > 0`. This
    limit has no gradient. Use it in weights and selection, which discard such samples; in a
    guidance it would give NaN. Do not scale it by zero.

    **Arguments:** `bound`, g, a function of one sample; `penalty > 0`, in units of the reward per
    unit of g.
    """

    bound: Reward
    penalty: Array | None

    def __init__(self, bound: Callable, penalty: float | Array | None = None):
        self.bound = as_reward(bound, "bound")
        self.penalty = None if penalty is None else _checks.positive(penalty, "penalty")

    def __call__(self, x: Array) -> Array:
        if self.penalty is None:
            violation = value(self.bound, jax.lax.stop_gradient(x))
            # For NaN it is unknown whether the bound holds, so NaN is kept.
            return jnp.where(violation > 0, -jnp.inf, jnp.where(violation <= 0, 0.0, violation))
        return -self.penalty * jax.nn.relu(value(self.bound, x))


def _check_objectives(objectives: Sequence[Callable]) -> None:
    if not isinstance(objectives, tuple | list):
        raise TypeError(f"objectives must be a list of rewards, got {type(objectives).__name__}")


def values(objectives: Sequence[Callable], x: Array) -> Array:
    """The values `(n, m)` of m objectives at samples `(n, *shape)`, such as `particles.x`.

    **Raises:** `ValueError` for an `x` without rows.
    """
    _check_objectives(objectives)
    x = _checks.floating(x, "x") if not isinstance(x, jax.Array) else x
    if not x.ndim:
        raise ValueError(f"x must hold samples, shape (n, *shape), got shape {x.shape}")
    return jnp.stack([reward_values(as_reward(one, "objectives"), x) for one in objectives], 1)


def front(values: ArrayLike) -> np.ndarray:
    """Which rows of `(n, m)` no other row dominates, `(n,)` booleans. A row dominates if it is
    nowhere smaller and somewhere larger; equal rows do not dominate each other.

    The time is O(n^2 m). **Raises:** `ValueError` for another rank, or NaN.
    """
    rows = _rows(values)
    return np.array(
        [not np.any(np.all(rows >= row, axis=1) & np.any(rows > row, axis=1)) for row in rows]
    )


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """The area that two objectives `(n, 2)` dominate above `reference`, `(2,)`. A better front has
    a larger area.

    Points that are not above the reference in both objectives add nothing.

    **Raises:** `ValueError` for another shape, or NaN.
    """
    rows, corner = _rows(values), np.asarray(_checks.floating(reference, "reference"), np.float64)
    if rows.shape[1] != 2 or corner.shape != (2,):
        raise ValueError(
            "hypervolume needs two objectives, values (n, 2) and a reference (2,), got "
            f"{rows.shape} and {corner.shape}"
        )
    above = rows[np.all(rows > corner, axis=1)] - corner
    above = above[np.argsort(-above[:, 0], kind="stable")]
    height = np.maximum.accumulate(np.concatenate([[0.0], above[:, 1]]))
    return float(np.sum(above[:, 0] * np.diff(height)))


def _rows(values: ArrayLike) -> np.ndarray:
    rows = np.asarray(_checks.floating(values, "values"), np.float64)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"values must be (samples, objectives), got shape {rows.shape}")
    if np.isnan(rows).any():
        raise ValueError(
            f"values must not be NaN, got NaN in {np.isnan(rows).any(axis=1).sum()} of {len(rows)} "
            "rows"
        )
    return rows
