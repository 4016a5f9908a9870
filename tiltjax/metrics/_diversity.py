r"""Diversity: how spread a population is, and how much of a base law it still reaches.

| number | definition | weights |
|---|---|---|
| `pairwise_diversity` | `E|X - X'|` | count |
| `cosine_diversity` | `E[1 - <X, X'> / (|X| |X'|)]` | count |
| `spectral_diversity` | `exp(-sum p log p)`, normalized eigenvalues p of the covariance | count |
| `truncated_entropy` | `K/2 log(2 pi e) + 1/2 sum_{i <= K} log l_i`, of eigenvalues | count |
| `spectral_distance` | `(sum_i (l_i(x) - l_i(y))^2)^(1/2)`, l in falling order | count |
| `recall` | the fraction of the base inside the balls around samples | equal ones only |
| `coverage` | the fraction of the balls around the base that hold a sample | equal ones only |

Reward is bought with diversity, so that the two are read together (`plotting.frontier`).
Populations are as in `tiltjax.metrics`. Of images one measures features, whatever network gives
them: `recall(jax.vmap(features)(x), jax.vmap(features)(base))`.

The balls are those to the k-th nearest neighbor in the same set: existence ("is there a sample
within?") knows no weights, and so both refuse unequal ones. Between two sets of one law coverage
has, whatever the law,

    E = 1 - ((N - 1) ... (N - k)) / ((M + N - 1) ... (M + N - k)),      N of the base, M samples,

close to `1 - 2^-k` for N = M: read it next to that. Recall has no such formula: read it next to its
value for base samples.

References: Kim et al. (arXiv 2501.05803) for the truncated entropy and the cosine distance of CLIP
features; Kynkaanniemi et al. 2019 (arXiv 1904.06991), recall; Naeem et al. 2020 (arXiv 2002.09797),
coverage; Roy and Vetterli 2007, *The effective rank*.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from tiltjax import _checks
from tiltjax.metrics._populations import at_least_two, or_equal, pair, states
from tiltjax.particles import Particles

_NUMBERS = 2**22  # floats in memory at once


def pairwise_diversity(x: ArrayLike | Particles) -> Array:
    """The mean distance `sum_{i != j} v_i v_j |x_i - x_j| / (1 - sum v_i^2)` between two distinct
    samples, a scalar.

    **Raises:** `ValueError` for what is no population, and for fewer than two samples.
    """
    x, weights = states(x, "x")
    at_least_two(x, weights, "x")
    return _pairwise(x, or_equal(weights, x))


@jax.jit
def _pairwise(x: Array, weights: Array) -> Array:
    # Differences rather than inner products: the root would turn a rounding error of 1e-16 into
    # 1e-8.
    row = lambda point: jnp.sqrt(jnp.sum((x - point[None]) ** 2, axis=1)) @ weights
    rows = jax.lax.map(row, x, batch_size=max(1, min(len(x), _NUMBERS // x.size)))
    return weights @ rows / (1 - jnp.sum(weights**2))


def spectral_diversity(x: ArrayLike | Particles) -> Array:
    """The effective number of directions `exp(-sum_i p_i log p_i)`, `p_i = l_i / sum_j l_j`, `l`
    the covariance's eigenvalues.

    A scalar between 1 (all samples on a line) and `min(d, num - 1)` (equal variance in every
    direction); it does not change with scale, and samples that all coincide have 0. Source: Roy and
    Vetterli 2007, *The effective rank*, for the covariance.

    **Raises:** `ValueError` for what is no population, and for fewer than two samples.
    """
    x, weights = states(x, "x")
    at_least_two(x, weights, "x")
    return _spectral(x, or_equal(weights, x))


@jax.jit
def _spectral(x: Array, weights: Array) -> Array:
    values = _singular(x, weights) ** 2
    total = jnp.sum(values)
    fractions = values / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, jnp.exp(jnp.sum(jax.scipy.special.entr(fractions))), 0)


def cosine_diversity(x: ArrayLike | Particles) -> Array:
    """The mean of `1 - cos` of the angle between two distinct samples, a scalar: 0 if all point one
    way, 1 for independent directions.

    `sum_i v_i |u_i - m|^2 / (1 - sum v_i^2)` with `u_i = x_i / |x_i|` and m their mean: the same as
    over all pairs, in O(num).

    **Raises:** `ValueError` as `pairwise_diversity`, and for a sample at the origin, which has no
    direction.
    """
    x, weights = states(x, "x")
    at_least_two(x, weights, "x")
    lengths = jnp.linalg.norm(x, axis=1, keepdims=True)
    if _checks.concrete(lengths) and not np.all(lengths):
        raise ValueError(
            f"a direction needs a length, {np.sum(np.asarray(lengths) == 0)} of {len(x)} samples "
            "are 0"
        )
    return jnp.sum(_singular(x / lengths, or_equal(weights, x)) ** 2)


def truncated_entropy(x: ArrayLike | Particles, k: int = 20) -> Array:
    """The entropy `k/2 log(2 pi e) + 1/2 sum log l_i` of a Gaussian in the k directions of largest
    variance `l_i`, a scalar in nats.

    Of k = d features it is the entropy of a Gaussian with their covariance. Variances are the
    unbiased ones; their logarithms are biased downwards where num is not much larger than k:
    compare populations of one size. `-inf` where a variance is 0 to rounding.

    **Raises:** `ValueError` as `pairwise_diversity`; for k > d; and unless more than k samples have
    weight: the covariance of k has rank k - 1 at most, and the logarithm would be that of a
    rounding error.
    """
    x, weights = states(x, "x")
    k = _checks.count(k, "k")
    if k > x.shape[1]:
        raise ValueError(
            f"there are d = {x.shape[1]} directions, got k = {k}: take fewer, or more features"
        )
    num = np.count_nonzero(weights) if weights is not None and _checks.concrete(weights) else len(x)
    if num <= k:
        raise ValueError(
            f"x holds {num} samples with weight, which have a covariance of rank {num - 1} at "
            f"most, and no entropy in k = {k} directions: take more than k "
            "samples, or a smaller k"
        )
    values = _singular(x, or_equal(weights, x))
    rounding = jnp.finfo(x.dtype).eps * max(x.shape) * values[0]
    logs = jnp.where(values > rounding, jnp.log(jnp.where(values > rounding, values, 1)), -jnp.inf)
    return k / 2 * (math.log(2 * math.pi) + 1) + jnp.sum(logs[:k])


def spectral_distance(x: ArrayLike | Particles, y: ArrayLike | Particles) -> Array:
    """How differently two populations spread: the Euclidean distance of the falling eigenvalues of
    their (unbiased) covariances, a scalar.

    In squared units of the features. At most the Frobenius distance of the covariances (Hoffman and
    Wielandt); zero also where one population is the other one turned or moved. Jena et al. (arXiv
    2409.06493, annealed importance guidance) judge by a "spectral distance" whose formula could not
    be confirmed: this is a definition of its own, and not to be compared with their numbers.

    **Raises:** `ValueError` as `pairwise_diversity`, and for populations of two dimensions.
    """
    x, weights_x, y, weights_y = pair(x, y)
    at_least_two(x, weights_x, "x")
    at_least_two(y, weights_y, "y")

    def spectrum(x: Array, weights: Array | None) -> Array:
        values = _singular(x, or_equal(weights, x)) ** 2
        # Fewer samples than directions: the others have no variance.
        return jnp.pad(values, (0, x.shape[1] - len(values)))

    return jnp.linalg.norm(spectrum(x, weights_x) - spectrum(y, weights_y))


def recall(x: ArrayLike | Particles, base: ArrayLike | Particles, k: int = 3) -> Array:
    """The fraction of `base` that lies in a ball around a sample of x, out to its k-th nearest
    neighbor in x: what of the base x can produce.

    A scalar in [0, 1]. A sample far out has a large ball, and raises it: `coverage` has none of
    this, as its balls are the base's.

    **Arguments:** `x`, `(n, *shape)`; `base`, `(m, *shape)`; `k < n`. Time O(n (n + m) d), in
    blocks.

    **Raises:** `ValueError` as `pairwise_diversity`, for two dimensions and too few samples;
    `TypeError` for unequal weights.
    """
    x, base, k = _neighbors(x, base, k, "x")
    return _recall(x, base, k)


def coverage(x: ArrayLike | Particles, base: ArrayLike | Particles, k: int = 5) -> Array:
    """The fraction of `base` with a sample of x nearer than its own k-th nearest neighbor in the
    base: how much of the base is reached.

    A scalar in [0, 1]; of two sets of one law see above. **Arguments:** `x`, `(n, *shape)`; `base`,
    `(m, *shape)`; `k < m`. Time O(m (n + m) d), in blocks.

    **Raises:** as `recall`.
    """
    x, base, k = _neighbors(x, base, k, "base")
    return _coverage(x, base, k)


@jax.jit
def _singular(x: Array, weights: Array) -> Array:
    """Square roots of the eigenvalues of the unbiased covariance, `(min(num, d),)`, falling."""
    x = x - x[:1]  # exactly zero where all samples coincide, which a mean is not
    spread = jnp.sqrt(weights)[:, None] * (x - (weights @ x)[None])
    return jnp.linalg.svd(spread, compute_uv=False) / jnp.sqrt(1 - jnp.sum(weights**2))


def _neighbors(
    x: ArrayLike | Particles, base: ArrayLike | Particles, k: int, name: str
) -> tuple[Array, Array, int]:
    """Both sets, and a k that the one with the balls has neighbors for."""
    x, weights_x, base, weights_base = pair(x, base, "base")
    for weights, which in ((weights_x, "x"), (weights_base, "base")):
        if weights is not None:
            raise TypeError(
                f"nearest neighbors know no weights, and those of {which} are not known to be "
                f"equal: pass {which}.resample(key)"
            )
    k, num = _checks.count(k, "k"), len(x if name == "x" else base)
    if k >= num:
        raise ValueError(
            f"a k-th nearest neighbor needs more than k = {k} samples, {name} has {num}"
        )
    return x, base, k


def _squares(points: Array, point: Array) -> Array:
    return jnp.sum((points - point[None]) ** 2, axis=1)


def _rows(fn, x: Array, others: Array) -> Array:
    """`fn` of each row of x, so many at once as their differences from `others` allow."""
    return jax.lax.map(fn, x, batch_size=max(1, min(len(x), _NUMBERS // others.size)))


def _balls(x: Array, k: int) -> Array:
    """Squared distances to the k-th nearest other point. Each point is its own nearest, at exactly
    0.
    """
    return _rows(lambda point: -jax.lax.top_k(-_squares(x, point), k + 1)[0][k], x, x)


@functools.partial(jax.jit, static_argnums=2)
def _recall(x: Array, base: Array, k: int) -> Array:
    balls = _balls(x, k)
    return jnp.mean(
        _rows(lambda point: jnp.any(_squares(x, point) <= balls), base, x).astype(x.dtype)
    )


@functools.partial(jax.jit, static_argnums=2)
def _coverage(x: Array, base: Array, k: int) -> Array:
    nearest = _rows(lambda point: jnp.min(_squares(x, point)), base, x)
    return jnp.mean((nearest <= _balls(base, k)).astype(x.dtype))
