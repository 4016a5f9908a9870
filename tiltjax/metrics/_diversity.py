r"""Diversity: the spread of a population, and the part of a base law that a population reaches.

| number | definition | weights |
|---|---|---|
| `pairwise_diversity` | `E|X - X'|` | count |
| `cosine_diversity` | `E[1 - <X, X'> / (|X| |X'|)]` | count |
| `spectral_diversity` | `exp(-sum p log p)`, normalized eigenvalues p of the covariance | count |
| `truncated_entropy` | `K/2 log(2 pi e) + 1/2 sum_{i <= K} log l_i`, of eigenvalues | count |
| `spectral_distance` | `(sum_i (l_i(x) - l_i(y))^2)^(1/2)`, l in decreasing order | count |
| `recall` | the fraction of the base inside the balls around samples | equal ones only |
| `coverage` | the fraction of the balls around the base that hold a sample | equal ones only |

A higher reward usually costs diversity, so report both (`plotting.frontier`). Populations are as in
`tiltjax.metrics`. For images, measure the features of a network:
`recall(jax.vmap(features)(x), jax.vmap(features)(base))`.

The radius of a ball is the distance to the k-th nearest neighbor in the same set. Whether a ball
holds a sample does not depend on weights, so `recall` and `coverage` raise an error for unequal
weights. Between two sets of any one law the expected coverage is

    E = 1 - ((N - 1) ... (N - k)) / ((M + N - 1) ... (M + N - k)),      N of the base, M samples,

close to `1 - 2^-k` for N = M: compare the coverage with this value. Recall has no such formula:
compare it with its value for base samples.

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

from tiltjax import _checks, _linalg
from tiltjax.metrics._distances import in_blocks, squared_distances
from tiltjax.metrics._populations import at_least_two, or_equal, pair, states
from tiltjax.particles import Particles


def pairwise_diversity(x: ArrayLike | Particles) -> Array:
    """The mean distance `sum_{i != j} v_i v_j |x_i - x_j| / (1 - sum v_i^2)` between two distinct
    samples, a scalar.

    **Raises:** `ValueError` for arrays that are not a population, and for fewer than two samples.
    """
    x, weights = states(x, "x")
    at_least_two(x, weights, "x")
    return _pairwise(x, or_equal(weights, x))


@jax.jit
def _pairwise(x: Array, weights: Array) -> Array:
    row = lambda point: _linalg.weighted_sum(weights, _linalg.root(squared_distances(x, point)))
    return _linalg.weighted_sum(weights, in_blocks(row, x, x)) / (1 - jnp.sum(weights**2))


def spectral_diversity(x: ArrayLike | Particles) -> Array:
    """The effective number of directions `exp(-sum_i p_i log p_i)`, with `p_i = l_i / sum_j l_j`
    and `l` the eigenvalues of the covariance.

    It is a scalar between 1 (all samples on a line) and `min(d, num - 1)` (equal variance in every
    direction), and 0 if all samples coincide. It does not change with the scale of the samples.
    Source: Roy and Vetterli 2007, *The effective rank*, here of the covariance.

    **Raises:** `ValueError` for arrays that are not a population, and for fewer than two samples.
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
    """The mean of `1 - cos` of the angle between two distinct samples, a scalar: 0 if all samples
    have the same direction, 1 for independent directions.

    It is `sum_i v_i |u_i - m|^2 / (1 - sum v_i^2)` with `u_i = x_i / |x_i|` and m their mean. This
    equals the mean over all pairs, in O(num).

    **Raises:** `ValueError` as `pairwise_diversity`, and for a sample at the origin, which has no
    direction.
    """
    x, weights = states(x, "x")
    at_least_two(x, weights, "x")
    lengths = jnp.linalg.norm(x, axis=1, keepdims=True)
    if _checks.concrete(lengths) and not np.all(lengths):
        raise ValueError(
            "samples must not be at the origin, which has no direction, but "
            f"{np.sum(np.asarray(lengths) == 0)} of {len(x)} samples are"
        )
    return jnp.sum(_singular(x / lengths, or_equal(weights, x)) ** 2)


def truncated_entropy(x: ArrayLike | Particles, k: int = 20) -> Array:
    """The entropy `k/2 log(2 pi e) + 1/2 sum log l_i` of a Gaussian in the k directions of largest
    variance `l_i`, a scalar in nats.

    For k = d it is the entropy of a Gaussian with the covariance of the samples. The variances are
    unbiased. Their logarithms are biased downwards unless num is much larger than k, so compare
    populations of one size. The entropy is `-inf` if a variance is 0 up to rounding.

    **Raises:** `ValueError` as `pairwise_diversity`; for k > d; and for at most k samples with
    weight, because their covariance has rank k - 1 at most.
    """
    x, weights = states(x, "x")
    k = _checks.count(k, "k")
    if k > x.shape[1]:
        raise ValueError(
            f"k must be at most d = {x.shape[1]}, got k = {k}: use a smaller k or more features"
        )
    num = np.count_nonzero(weights) if weights is not None and _checks.concrete(weights) else len(x)
    if num <= k:
        raise ValueError(
            f"x holds {num} samples with weight, and {num} samples have no entropy in k = {k} "
            "directions: use more than k samples, or a smaller k"
        )
    values = _singular(x, or_equal(weights, x))
    rounding = jnp.finfo(x.dtype).eps * max(x.shape) * values[0]
    logs = jnp.where(values > rounding, jnp.log(jnp.where(values > rounding, values, 1)), -jnp.inf)
    return k / 2 * (math.log(2 * math.pi) + 1) + jnp.sum(logs[:k])


def spectral_distance(x: ArrayLike | Particles, y: ArrayLike | Particles) -> Array:
    """The Euclidean distance between the decreasing eigenvalues of the (unbiased) covariances of
    two populations, a scalar in squared units of the features.

    It is at most the Frobenius distance of the covariances (Hoffman and Wielandt), and zero also if
    one population is a rotated or shifted copy of the other. Jena et al. (arXiv 2409.06493,
    annealed importance guidance) use a "spectral distance" whose formula could not be confirmed.
    The definition here is therefore our own: do not compare it with their numbers.

    **Raises:** `ValueError` as `pairwise_diversity`, and for populations of different dimensions.
    """
    x, weights_x, y, weights_y = pair(x, y)
    at_least_two(x, weights_x, "x")
    at_least_two(y, weights_y, "y")

    def spectrum(x: Array, weights: Array | None) -> Array:
        values = _singular(x, or_equal(weights, x)) ** 2
        # With fewer samples than directions, the remaining variances are zero.
        return jnp.pad(values, (0, x.shape[1] - len(values)))

    return jnp.linalg.norm(spectrum(x, weights_x) - spectrum(y, weights_y))


def recall(x: ArrayLike | Particles, base: ArrayLike | Particles, k: int = 3) -> Array:
    """The fraction of `base` inside a ball around a sample of x, a scalar in [0, 1]: the part of
    the base that x can produce.

    The radius of a sample's ball is the distance to its k-th nearest neighbor in x. An outlier in x
    has a large ball, which increases the recall. `coverage` does not have this problem, because its
    balls are those of the base.

    **Arguments:** `x`, `(n, *shape)`; `base`, `(m, *shape)`; `k < n`. Time O(n (n + m) d), in
    blocks.

    **Raises:** `ValueError` as `pairwise_diversity`, for different dimensions and too few samples;
    `TypeError` for unequal weights.
    """
    x, base, k = _neighbors(x, base, k, "x")
    return _recall(x, base, k)


def coverage(x: ArrayLike | Particles, base: ArrayLike | Particles, k: int = 5) -> Array:
    """The fraction of `base` with a sample of x nearer than the k-th nearest neighbor in the base,
    a scalar in [0, 1]: the part of the base that x reaches.

    The module's docstring gives its expectation for two sets of one law.

    **Arguments:** `x`, `(n, *shape)`; `base`, `(m, *shape)`; `k < m`. Time O(m (n + m) d), in
    blocks.

    **Raises:** as `recall`.
    """
    x, base, k = _neighbors(x, base, k, "base")
    return _coverage(x, base, k)


@jax.jit
def _singular(x: Array, weights: Array) -> Array:
    """Square roots of the eigenvalues of the unbiased covariance, `(min(num, d),)`, decreasing."""
    x = x - x[:1]  # exactly zero if all samples coincide, unlike the difference from the mean
    spread = jnp.sqrt(weights)[:, None] * (x - _linalg.weighted_sum(weights, x)[None])
    return jnp.linalg.svd(spread, compute_uv=False) / jnp.sqrt(1 - jnp.sum(weights**2))


def _neighbors(
    x: ArrayLike | Particles, base: ArrayLike | Particles, k: int, name: str
) -> tuple[Array, Array, int]:
    """Both sets and k, after a check that the set named `name` has enough neighbors for
    its balls.
    """
    x, weights_x, base, weights_base = pair(x, base, "base")
    for weights, which in ((weights_x, "x"), (weights_base, "base")):
        if weights is not None:
            raise TypeError(
                f"nearest neighbors need equal weights, but those of {which} are unequal or "
                f"traced: pass {which}.resample(key)"
            )
    k, num = _checks.count(k, "k"), len(x if name == "x" else base)
    if k >= num:
        raise ValueError(
            f"a k-th nearest neighbor needs more than k = {k} samples, {name} has {num}"
        )
    return x, base, k


def _balls(x: Array, k: int) -> Array:
    """Squared distances to the k-th nearest other point. Each point is its own nearest neighbor, at
    exactly 0.
    """
    return in_blocks(lambda point: -jax.lax.top_k(-squared_distances(x, point), k + 1)[0][k], x, x)


@functools.partial(jax.jit, static_argnums=2)
def _recall(x: Array, base: Array, k: int) -> Array:
    balls = _balls(x, k)
    return jnp.mean(
        in_blocks(lambda point: jnp.any(squared_distances(x, point) <= balls), base, x).astype(
            x.dtype
        )
    )


@functools.partial(jax.jit, static_argnums=2)
def _coverage(x: Array, base: Array, k: int) -> Array:
    nearest = in_blocks(lambda point: jnp.min(squared_distances(x, point)), base, x)
    return jnp.mean((nearest <= _balls(base, k)).astype(x.dtype))
