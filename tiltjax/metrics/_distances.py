r"""Distances between two populations, and the standard errors of measured numbers.

| number | definition | computed |
|---|---|---|
| `wasserstein` | `W2 = (min over couplings of E|X - Y|^2)^(1/2)` | NumPy, float64, exact |
| `sliced_wasserstein` | `(E W2(u.X, u.Y)^2)^(1/2)`, u uniform on the sphere | JAX, random u |
| `mmd` | `E k(X,X') + E k(Y,Y') - 2 E k(X,Y)`, Gaussian k | JAX, in blocks |
| `mode_weights` | `E P(component k \| X)` under a Gaussian mixture | JAX |
| `standard_error` | of a mean of independent values | JAX |
| `bootstrap` | of any statistic | JAX, or a loop in Python |

The measures of diversity are in `tiltjax.metrics` as well.

Populations are `(num, d)`, `(num, *shape)` with the trailing axes flattened, or `Particles`, with
their weights. Distances are in the units of the samples; `mmd`, a squared distance between kernel
means, has no unit.

Exact transport needs O(num^2) memory. Between samples of one law in dimension d > 4 it decreases no
faster than num^(-1/d): compare it with its value between two independent samples of the truth.

References: Bonneel et al. (2015) for sliced transport, Gretton et al. (2012) for `mmd`, Fournier
and Guillin (2015) for the rate.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from tiltjax import _checks, _linalg, _pytree
from tiltjax.metrics._populations import (
    at_least_two,
    or_equal,
    pair,
    same_dimension,
    states,
    unpack,
)
from tiltjax.mixtures import GaussianMixture, check_mixture
from tiltjax.particles import Particles

_ROWS = 256  # rows of a kernel matrix in memory at once
_NUMBERS = 2**22  # floats in memory at once where the block's size can be chosen
_MEDIAN_POINTS = 1024  # points of both sets from which the default bandwidth is computed


def wasserstein(
    x: ArrayLike | Particles,
    y: ArrayLike | Particles,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> float:
    """The exact 2-Wasserstein distance between two empirical laws, in float64.

    On the line the coupling is that of the quantiles, for any numbers and weights. Otherwise the
    distance is a linear program. If POT is installed, its network simplex solves the program (0.3
    to 0.7 s for 2000 points against 2000). Otherwise, for unweighted sets of the same size, the
    Hungarian method of SciPy gives the same value in up to ten times the time.

    **Arguments:**

    - `x`, `y`: `(n, *shape)` and `(m, *shape)`, or `Particles`.
    - `weights_x`, `weights_y`: `(n,)` and `(m,)`, nonnegative, not necessarily normalized; equal by
      default.

    **Raises:** `ValueError` for shapes that disagree, empty sets, samples that are not finite,
    negative weights; `TypeError` for weights next to `Particles`; `ImportError` if POT is needed
    and missing.
    """
    x, weights_x = _as_numpy(x, weights_x, "x")
    y, weights_y = _as_numpy(y, weights_y, "y")
    same_dimension(x, y)
    if x.shape[1] == 1:
        order_x, order_y = np.argsort(x[:, 0]), np.argsort(y[:, 0])
        mass_x = np.ones(len(x)) / len(x) if weights_x is None else weights_x
        mass_y = np.ones(len(y)) / len(y) if weights_y is None else weights_y
        at_x, at_y, mass = _quantiles(
            _cumulative(mass_x[order_x], np), _cumulative(mass_y[order_y], np), np
        )
        return float(np.sqrt(np.sum(mass * (x[order_x[at_x], 0] - y[order_y[at_y], 0]) ** 2)))
    from scipy.spatial.distance import cdist

    costs = cdist(x, y, "sqeuclidean")
    try:
        import ot
    except ImportError:
        if weights_x is None and weights_y is None and len(x) == len(y):
            from scipy.optimize import linear_sum_assignment

            return float(np.sqrt(np.mean(costs[linear_sum_assignment(costs)])))
        raise ImportError(
            "exact transport in more than one dimension, between weighted sets or sets of "
            "different sizes, needs POT: pip install tiltjax[transport] (or resample both sets to "
            "one size, or use sliced_wasserstein)"
        ) from None
    # By default POT stops at 100 000 pivots, and returns an unfinished result with only a warning.
    mass_x = np.full(len(x), 1 / len(x)) if weights_x is None else weights_x
    mass_y = np.full(len(y), 1 / len(y)) if weights_y is None else weights_y
    return float(np.sqrt(ot.emd2(mass_x, mass_y, costs, numItermax=2**62)))


def sliced_wasserstein(
    key: Array, x: ArrayLike | Particles, y: ArrayLike | Particles, num_projections: int = 128
) -> Array:
    """The sliced 2-Wasserstein distance, a scalar: the root of the mean of `W2^2` between the
    projections on random directions.

    For two copies of one set shifted by s it is `|s| / sqrt(d)`, up to the error of the directions,
    which decreases as `num_projections^(-1/2)`. It can be jitted and differentiated. Source:
    Bonneel et al. 2015, *Sliced and Radon Wasserstein barycenters of measures*.

    **Arguments:** `key`, a typed key for the directions; `x`, `y` as in `wasserstein`;
    `num_projections`, the number of directions.

    **Raises:** `ValueError` or `TypeError` for shapes that disagree, empty sets, samples that are
    not finite.
    """
    key, num_projections = _checks.key(key), _checks.count(num_projections, "num_projections")
    x, weights_x, y, weights_y = pair(x, y)
    return _sliced(key, x, y, weights_x, weights_y, num_projections)


@functools.partial(jax.jit, static_argnums=5)
def _sliced(key, x, y, weights_x, weights_y, num_projections) -> Array:
    # Drawn in single precision and then cast, so that the dtype of the samples does not change the
    # directions.
    directions = jax.random.normal(key, (num_projections, x.shape[1]), jnp.float32).astype(x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    if weights_x is None and weights_y is None:
        # The coupling of the ranks is the same in every direction, and exact in integers.
        n, m = len(x), len(y)
        rank_x, rank_y, counts = _quantiles(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n, np)
        mass = jnp.asarray(counts / (n * m), x.dtype)

        def squared(direction: Array) -> Array:
            along_x, along_y = jnp.sort(_project(x, direction)), jnp.sort(_project(y, direction))
            return jnp.sum(mass * (along_x[rank_x] - along_y[rank_y]) ** 2)

    else:
        weights_x, weights_y = or_equal(weights_x, x), or_equal(weights_y, y)

        def squared(direction: Array) -> Array:
            along_x, along_y = _project(x, direction), _project(y, direction)
            order_x, order_y = jnp.argsort(along_x), jnp.argsort(along_y)
            cumulative = _cumulative(weights_x[order_x], jnp), _cumulative(weights_y[order_y], jnp)
            at_x, at_y, mass = _quantiles(*cumulative, jnp)
            return jnp.sum(mass * (along_x[order_x[at_x]] - along_y[order_y[at_y]]) ** 2)

    found = jax.lax.map(squared, directions, batch_size=min(32, num_projections))
    return _linalg.root(jnp.mean(found))


def mmd(
    x: ArrayLike | Particles, y: ArrayLike | Particles, bandwidth: float | Array | None = None
) -> Array:
    """The unbiased squared maximum mean discrepancy, a scalar, with the kernel
    `k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2))`.

    It is `sum_{i != j} v_i v_j k(x_i, x_j) / (1 - sum v_i^2)`, plus the same for y, minus twice the
    mean of `k(x_i, y_j)`. The estimate is unbiased, so it is negative about half of the time if the
    laws agree; with self-normalized weights it is unbiased only to leading order. At most 256 rows
    of a kernel matrix are in memory at once. Source: Gretton et al. 2012, *A kernel two-sample
    test*, eq. 3.

    **Arguments:** `x`, `y` as in `wasserstein`, at least two samples each; `bandwidth`, in the
    units of the samples, by default the median distance, without weights, among up to 1024 points
    evenly spaced in x followed by y.

    **Raises:** `ValueError` as `wasserstein`, for a bandwidth that is not positive, and for sets of
    fewer than two points.
    """
    x, weights_x, y, weights_y = pair(x, y)
    at_least_two(x, weights_x, "x")
    at_least_two(y, weights_y, "y")
    if bandwidth is None:
        width = _median_distance(x, y)
        if _checks.concrete(width) and float(width) == 0:
            raise ValueError(
                "the median distance is 0 because most points coincide: pass a positive bandwidth"
            )
    else:
        width = _checks.positive(bandwidth, "bandwidth").astype(x.dtype)
    return _mmd(x, y, or_equal(weights_x, x), or_equal(weights_y, y), width)


@jax.jit
def _median_distance(x: Array, y: Array) -> Array:
    points = jnp.concatenate([x, y])
    num = min(len(points), _MEDIAN_POINTS)
    points = points[np.arange(num) * len(points) // num]
    squared = in_blocks(functools.partial(squared_distances, points), points, points)
    return jnp.sqrt(jnp.median(squared[np.triu_indices(num, 1)]))


@jax.jit
def _mmd(x, y, weights_x, weights_y, bandwidth) -> Array:
    def total(a: Array, b: Array, weights_a: Array, weights_b: Array) -> Array:
        row = lambda point: _linalg.weighted_sum(
            weights_b, jnp.exp(-squared_distances(b, point) / (2 * bandwidth**2))
        )
        return _linalg.weighted_sum(weights_a, in_blocks(row, a, b))

    def within(a: Array, weights: Array) -> Array:
        collision = jnp.sum(weights**2)
        return (total(a, a, weights, weights) - collision) / (1 - collision)

    return within(x, weights_x) + within(y, weights_y) - 2 * total(x, y, weights_x, weights_y)


def mode_weights(x: ArrayLike | Particles, mixture: GaussianMixture) -> Array:
    """The average responsibility `E P(k | X)` of every component, shape `(K,)`, summing to 1.

    Under the mixture itself its expectation is `mixture.weights`, for any overlap of the
    components.

    **Raises:** `ValueError` as `wasserstein`, for points of another dimension than the mixture's,
    and for a mixture with singular covariances, whose components have no density.
    """
    check_mixture(mixture, "mixture")
    points, weights = states(x, "x")
    if points.shape[1] != mixture.dim:
        raise ValueError(
            f"x has d = {points.shape[1]} but the mixture has d = {mixture.dim}: they must agree"
        )
    dtype = np.promote_types(points.dtype, mixture.means.dtype)
    found = _mode_weights(*_pytree.cast((points, or_equal(weights, points), mixture), dtype))
    if _checks.concrete(found) and not np.all(np.isfinite(found)):
        raise ValueError(
            f"responsibilities are not finite, got {np.asarray(found)}: the covariances must be "
            "nonsingular"
        )
    return found


@jax.jit
def _mode_weights(x: Array, weights: Array, mixture: GaussianMixture) -> Array:
    modes = jax.vmap(lambda point: jax.nn.softmax(mixture.component_log_probs(point)))
    return _linalg.weighted_sum(weights, modes(x))


def standard_error(values: ArrayLike, axis: int = 0) -> Array:
    """The standard error `std / sqrt(n)` (n - 1 in the variance) of the mean over `axis` of
    independent values.

    **Raises:** `ValueError` for fewer than two values and for values that are not finite.
    """
    values = _checks.finite(values, "values")
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise TypeError(f"axis must be an integer, got {axis!r}")
    if values.ndim == 0 or not -values.ndim <= axis < values.ndim or values.shape[axis] < 2:
        raise ValueError(
            f"a standard error needs at least two values along axis {axis}, got shape "
            f"{values.shape}"
        )
    return jnp.std(values, axis=axis, ddof=1) / values.shape[axis] ** 0.5


def bootstrap(key: Array, statistic: Callable, x: PyTree, num: int = 200) -> tuple[Array, Array]:
    """`statistic(x)` and its bootstrap standard error: the standard deviation over `num` sets drawn
    from x with replacement.

    Each set contains repeated samples, which changes statistics of pairs (`mmd`,
    `pairwise_diversity`) and of nearest neighbors: for them the error is only a guide. Source:
    Efron 1979, *Bootstrap methods: another look at the jackknife*.

    **Arguments:**

    - `statistic`: `x -> array`. It is vectorized if JAX can trace it, and otherwise (for example
      `wasserstein`) runs in a Python loop.
    - `x`: `(n, ...)`, or a pytree of arrays with one leading axis, drawn together.
    - `num`: the number of sets, at least 2.

    **Returns:** `(estimate, standard_error)`, both of the shape of `statistic(x)`.

    **Raises:** `TypeError` for `Particles`, because a resample by index would ignore their weights;
    `ValueError` for leading axes that disagree, fewer than two samples, `num` below 2.
    """
    key, num = _checks.key(key), _checks.count(num, "num")
    _checks.function(statistic, "statistic")
    if num < 2:
        raise ValueError(f"num must be at least 2 for a standard deviation, got {num}")
    if isinstance(x, Particles):
        raise TypeError(
            "x must be samples, got Particles: pass particles.resample(key), or particles.x if "
            "unweighted"
        )
    for leaf in jax.tree.leaves(x):
        _checks.finite(leaf, "x")  # integers pass the check, and keep their dtype
    x = jax.tree.map(
        lambda leaf: (
            _checks.finite(leaf, "x")
            if eqx.is_inexact_array_like(leaf)
            else jnp.asarray(_checks.native(leaf))
        ),
        x,
    )
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"x must have one leading axis of at least two samples, got lengths {sorted(lengths)}"
        )
    n = lengths.pop()
    draw = lambda key: jax.tree.map(lambda leaf: leaf[jax.random.randint(key, (n,), 0, n)], x)
    keys = jax.random.split(key, num)
    estimate = jnp.asarray(statistic(x))
    one = lambda key: jnp.asarray(statistic(draw(key)))
    size = sum(leaf.size for leaf in jax.tree.leaves(x))
    chunk_size = max(1, min(num, _NUMBERS // size))
    try:
        values = jax.lax.map(one, keys, batch_size=chunk_size)
    except jax.errors.JAXTypeError:  # the statistic reads values, as NumPy does
        values = jnp.stack([one(key) for key in keys])
    return estimate, jnp.std(values, axis=0, ddof=1)


def _project(x: Array, direction: Array) -> Array:
    return jnp.matmul(x, direction, precision="highest")


def squared_distances(points: Array, point: Array) -> Array:
    """`|x - point|^2` of each row x of `points`."""
    # Differences, because inner products lose the digits of points that are near each other and far
    # from the origin, such as those of one of two distant modes.
    return jnp.sum((points - point[None]) ** 2, axis=1)


def in_blocks(fn: Callable, x: Array, others: Array) -> Array:
    """`fn` of each row of x, in blocks whose differences from `others` fit into memory."""
    block = max(1, min(len(x), _ROWS, _NUMBERS // others.size))
    return jax.lax.map(fn, x, batch_size=block)


def _cumulative(mass, xp):
    """Cumulative weights that end at exactly 1."""
    cumulative = xp.cumsum(mass)
    return cumulative / cumulative[-1]


def _quantiles(cumulative_x, cumulative_y, xp):
    """The monotone coupling of two sorted sets: the pairs `(i, j)` of ranks that share mass, and
    their masses.
    """
    levels = xp.sort(xp.concatenate([cumulative_x, cumulative_y]))
    mass = levels - xp.concatenate([xp.zeros_like(levels[:1]), levels[:-1]])
    # The middle of a piece is inside the piece, even if its ends are rounded.
    middle = levels - mass / 2
    return xp.searchsorted(cumulative_x, middle), xp.searchsorted(cumulative_y, middle), mass


def _as_numpy(
    value: Any, weights: ArrayLike | None, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples as `(num, d)`, and normalized weights (`None` if equal), both in float64. Points
    without mass are dropped.
    """
    if isinstance(value, Particles) and weights is not None:
        raise TypeError(
            f"{name} is Particles, which have weights: leave out weights_{name}, or pass {name}.x"
        )
    x, log_weights = unpack(value, name)
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    if log_weights is not None:
        log_weights = np.asarray(log_weights, np.float64)
        weights = np.exp(log_weights - log_weights.max())
    if weights is None:
        return x, None
    weights = np.asarray(_checks.floating(weights, f"weights_{name}"), np.float64)
    if weights.shape != (len(x),):
        raise ValueError(
            f"weights_{name} must have shape ({len(x)},), one for each sample, got {weights.shape}"
        )
    if not (np.all(np.isfinite(weights)) and np.all(weights >= 0) and np.sum(weights) > 0):
        raise ValueError(
            f"weights_{name} must be finite and nonnegative with a positive sum, got {weights}"
        )
    positive = weights > 0
    return x[positive], weights[positive] / np.sum(weights[positive])
