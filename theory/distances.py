r"""How far apart Gaussian mixtures are, and how far apart the components of one.

**Distance.** Between two mixtures W2 has no closed form. Restricted to couplings that are
themselves Gaussian mixtures it is a small linear program between components, with the squared Bures
distances as costs (Delon and Desolneux 2020, *A Wasserstein-type distance in the space of Gaussian
mixture models*):

    MW2^2 = min over P >= 0 of sum_kl P_kl W2^2(N(mu_k, S_k), N(nu_l, T_l)),    P 1 = w,  P^T 1 = v.

It is an upper bound of W2, exact for one component each. The Bures distance of the overall means
and covariances is a lower one (Gelbrich 1990): no coupling of any laws with these moments costs
less.

**Derivatives.** By Danskin's theorem those of `MW2^2` are the costs' own, weighted by the optimal
plan, and for the weights the dual potentials; where several plans are optimal, it has one-sided
derivatives only.

**Overlap.** The Bhattacharyya coefficient `∫ sqrt(p q)` of two Gaussians, with
`S = (S_p + S_q) / 2`, is `exp(-d^T S^-1 d / 8) (det S_p det S_q)^(1/4) / det(S)^(1/2)`: 1 for equal
ones, .011 at six standard deviations, and an upper bound of how much of their mass is ambiguous
(`∫ min(p, q)`).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array

from theory.tilts import bures
from tiltjax.mixtures import GaussianMixture, check_mixture


class W2Bounds(NamedTuple):
    """`lower <= W2 <= upper`, and the `plan` `(K, L)` that the upper one moves between
    components.
    """

    lower: Array
    upper: Array
    plan: Array


def w2_bounds(one: GaussianMixture, other: GaussianMixture) -> W2Bounds:
    """Gelbrich's lower bound and MW2, an upper bound of W2 between two mixtures of K and L
    components in one dimension d.

    Compiles, maps and differentiates: only the plan is found on the host, by an exact linear
    program. Where a distance is zero it has no derivative, and zero is returned.

    **Raises:** `ValueError` for mixtures of different dimensions.
    """
    check_mixture(one, "one")
    check_mixture(other, "other")
    if one.dim != other.dim:
        raise ValueError(
            f"mixtures of different dimensions have no distance: got {one.dim} and {other.dim}"
        )
    return _bounds(one, other)


@eqx.filter_jit
def _bounds(one: GaussianMixture, other: GaussianMixture) -> W2Bounds:
    costs = jax.vmap(
        lambda mean, cov: jax.vmap(lambda to, shape: bures(mean, cov, to, shape))(
            other.means, other.covs
        )
    )(one.means, one.covs)
    dtype = costs.dtype
    held = jax.lax.stop_gradient((one.weights, other.weights, costs))
    shapes = tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in (costs.shape, costs.shape[:1], costs.shape[1:])
    )
    plan, source, sink = jax.pure_callback(_plan, shapes, *held, vmap_method="sequential")
    square = jnp.sum(plan * costs)
    # Zero in value: the dual potentials are the derivatives by the weights.
    square += source @ (one.weights - held[0]) + sink @ (other.weights - held[1])
    lower = bures(one.mean(), one.cov(), other.mean(), other.cov())
    return W2Bounds(_root(lower), _root(square), plan)


def overlap(mixture: GaussianMixture) -> float:
    """The largest Bhattacharyya coefficient between two components, in [0, 1]; 0 for one component.
    On the host.

    Components of one singular shape may overlap; different point masses do not.
    """
    check_mixture(mixture, "mixture")
    means, covs = np.asarray(mixture.means, np.float64), np.asarray(mixture.covs, np.float64)
    first, second = np.triu_indices(len(means), 1)
    if len(first) == 0:
        return 0.0
    gap = means[first] - means[second]
    # Singular covariances by a vanishing widening, in each pair's own units.
    size = np.sum(gap**2, axis=1) + np.trace(covs[first] + covs[second], axis1=1, axis2=2)
    widening = (1e-12 * size + np.finfo(float).tiny)[:, None, None] * np.eye(mixture.dim)
    p, q = covs[first] + widening, covs[second] + widening
    middle = (p + q) / 2
    logdet = lambda matrix: np.linalg.slogdet(matrix)[1]
    quadratic = np.einsum("pi,pi->p", gap, np.linalg.solve(middle, gap[:, :, None])[:, :, 0])
    return float(np.exp(np.max(-quadratic / 8 + (logdet(p) + logdet(q)) / 4 - logdet(middle) / 2)))


def _root(square: Array) -> Array:
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _plan(
    weights: np.ndarray, others: np.ndarray, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The optimal plan and its dual potentials."""
    dtype = np.asarray(costs).dtype
    weights, others, costs = (np.asarray(part, np.float64) for part in (weights, others, costs))
    weights, others = weights / weights.sum(), others / others.sum()
    k, n = costs.shape
    rows, columns = np.kron(np.eye(k), np.ones((1, n))), np.kron(np.ones((1, k)), np.eye(n))
    size = max(np.abs(costs).max(), np.finfo(float).tiny)  # the solver's tolerances are absolute
    # One condition follows from the others, and is left out.
    conditions, masses = (
        np.concatenate([rows, columns])[:-1],
        np.concatenate([weights, others])[:-1],
    )
    found = scipy.optimize.linprog(
        costs.reshape(-1) / size, A_eq=conditions, b_eq=masses, method="highs-ds"
    )
    if found.status != 0:
        raise RuntimeError(f"the transport plan was not found: {found.message}")
    duals = np.append(found.eqlin.marginals, 0.0) * size
    return found.x.reshape(k, n).astype(dtype), duals[:k].astype(dtype), duals[k:].astype(dtype)
