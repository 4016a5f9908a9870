"""The tail of importance weights, by a generalized Pareto law for the largest of them."""

import numpy as np
from jaxtyping import Array

# Shapes below which weights have a finite variance, and below which averages are reliable.
RELIABLE, USABLE = 0.5, 0.7


def tail_length(n: int) -> int:
    """The number of the largest of n weights to which the generalized Pareto law is fitted."""
    return int(np.ceil(min(n / 5, 3 * np.sqrt(n))))


def pareto_shape(log_weights: Array | np.ndarray) -> float:
    """The shape k of a generalized Pareto law that is fitted to the largest weights. Moments of
    the weights of order p are finite for p < 1/k.

    The fit uses the `tail_length(n)` largest weights and the estimator of Zhang and Stephens
    (2009), with the weak prior towards 1/2 of Vehtari et al. (arXiv 1507.02646). For equal weights,
    which have no tail, the result is `-inf`.
    """
    log_weights = np.sort(np.asarray(log_weights, np.float64))
    n = len(log_weights)
    tail = tail_length(n)
    if tail < 5:
        raise ValueError(f"the tail of {n} weights cannot be judged: take 25 or more")
    weights = np.exp(log_weights - log_weights[-1])
    excess = weights[-tail:] - weights[-tail - 1]
    if excess[-1] <= 1e-12:
        return float("-inf")
    excess = np.maximum(excess, 1e-300)
    # The profile likelihood of theta = k / scale, averaged over a grid of quantiles.
    count = 30 + int(np.sqrt(tail))
    quartile = excess[int(tail / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - np.sqrt(count / (np.arange(count) + 0.5))) / (3 * quartile)
    shapes = np.mean(np.log1p(-theta[:, None] * excess[None]), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = tail * (np.log(-theta / shapes) - shapes - 1)
    likelihood = np.where(np.isfinite(likelihood), likelihood, -np.inf)
    posterior = np.exp(likelihood - likelihood.max())
    best = float(np.sum(theta * posterior) / np.sum(posterior))
    shape = float(np.mean(np.log1p(-best * excess)))
    return (shape * tail + 0.5 * 10) / (tail + 10)
