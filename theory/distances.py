r"""Distances between Gaussian mixtures, and overlaps between the components of one mixture.

**Distance.** W2 between two mixtures has no closed form. If the coupling must be a Gaussian
mixture, W2 becomes a small linear program between components whose costs are squared Bures
distances (Delon and Desolneux 2020, *A Wasserstein-type distance in the space of Gaussian mixture
models*):

    MW2^2 = min over P >= 0 of sum_kl P_kl W2^2(N(mu_k, S_k), N(nu_l, T_l)),    P 1 = w,  P^T 1 = v.

MW2 is an upper bound of W2, and equals W2 for one component each. The Bures distance between the
overall means and covariances is a lower bound (Gelbrich 1990): no coupling of laws with these
moments costs less.

**Derivatives.** By Danskin's theorem, the derivatives of `MW2^2` are those of the costs, weighted
by the optimal plan; the derivatives by the weights are the dual potentials. Where several plans are
optimal, only one-sided derivatives exist.

**Overlap.** The Bhattacharyya coefficient `∫ sqrt(p q)` of two Gaussians, with
`S = (S_p + S_q) / 2`, is `exp(-d^T S^-1 d / 8) (det S_p det S_q)^(1/4) / det(S)^(1/2)`. It is 1 for
equal Gaussians and .011 at six standard deviations. It is an upper bound of the shared mass
`∫ min(p, q)`.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array

from tiltjax import _checks, _linalg
from tiltjax.mixtures import GaussianMixture, check_mixture


def bures(mean: Array, cov: Array, other_mean: Array, other_cov: Array) -> Array:
    """`W2^2` between `N(m, S)` and `N(n, T)`:
    `|m - n|^2 + tr S + tr T - 2 tr (T^{1/2} S T^{1/2})^{1/2}`.

    The last trace is the sum of the singular values of `L^T M` for `S = L L^T`, `T = M M^T` with
    triangular L and M, which may be singular. The derivative needs no derivative of the singular
    vectors, and is right where singular values coincide. Where a singular value is zero, W2^2 has
    only a one-sided derivative. Source: Dowson and Landau (1982).

    **Arguments:** `mean` and `other_mean` `(d,)`, `cov` and `other_cov` `(d, d)`.

    **Raises:** `ValueError` for other shapes.
    """
    mean, cov = _checks.floating(mean, "mean", 1), _checks.floating(cov, "cov", 2)
    other_mean = _checks.floating(other_mean, "other_mean", 1)
    other_cov = _checks.floating(other_cov, "other_cov", 2)
    d = mean.shape
    _checks.shape(other_mean, d, "other_mean")
    _checks.shape(cov, d + d, "cov")
    _checks.shape(other_cov, d + d, "other_cov")
    return _bures(mean, cov, other_mean, other_cov)


@jax.jit
def _bures(mean: Array, cov: Array, other_mean: Array, other_cov: Array) -> Array:
    cross = _nuclear_norm(_linalg.square_root(cov).T @ _linalg.square_root(other_cov))
    return jnp.sum((mean - other_mean) ** 2) + jnp.trace(cov) + jnp.trace(other_cov) - 2 * cross


@jax.custom_jvp
def _nuclear_norm(matrix: Array) -> Array:
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False))


@_nuclear_norm.defjvp
def _nuclear_norm_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    left, values, right = jnp.linalg.svd(primals[0], full_matrices=False)
    return jnp.sum(values), jnp.sum((left @ right) * tangents[0])


class W2Bounds(NamedTuple):
    """`lower <= W2 <= upper`, and the optimal `plan` `(K, L)` of the upper bound, the mass that
    moves between components.
    """

    lower: Array
    upper: Array
    plan: Array


def w2_bounds(one: GaussianMixture, other: GaussianMixture) -> W2Bounds:
    """Bounds of W2 between two mixtures of K and L components: Gelbrich's lower bound and the upper
    bound MW2.

    The function works under `jit`, `vmap` and `grad`. Only the plan is computed outside of JAX,
    by an exact linear program. A distance of zero has no derivative; the function then returns the
    derivative zero.

    **Raises:** `ValueError` for mixtures of different dimensions.
    """
    check_mixture(one, "one")
    check_mixture(other, "other")
    if one.dim != other.dim:
        raise ValueError(
            f"mixtures need the same dimension for a distance, got {one.dim} and {other.dim}"
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
    fixed = jax.lax.stop_gradient((one.weights, other.weights, costs))
    shapes = tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in (costs.shape, costs.shape[:1], costs.shape[1:])
    )
    plan, source, sink = jax.pure_callback(_plan, shapes, *fixed, vmap_method="sequential")
    square = jnp.sum(plan * costs)
    # These terms are zero. Their derivatives are the dual potentials, the derivatives by weights.
    square += source @ (one.weights - fixed[0]) + sink @ (other.weights - fixed[1])
    lower = bures(one.mean(), one.cov(), other.mean(), other.cov())
    return W2Bounds(_linalg.root(lower), _linalg.root(square), plan)


def overlap(mixture: GaussianMixture) -> float:
    """The largest Bhattacharyya coefficient between two components, in [0, 1]; 0 for one component.
    It is computed outside of JAX.

    Components with the same singular covariance may overlap. Different point masses do not.
    """
    check_mixture(mixture, "mixture")
    means, covs = np.asarray(mixture.means, np.float64), np.asarray(mixture.covs, np.float64)
    first, second = np.triu_indices(len(means), 1)
    if len(first) == 0:
        return 0.0
    gap = means[first] - means[second]
    # A tiny widening, in units of each pair, makes singular covariances invertible.
    square_size = np.sum(gap**2, axis=1) + np.trace(covs[first] + covs[second], axis1=1, axis2=2)
    widening = (1e-12 * square_size + np.finfo(float).tiny)[:, None, None] * np.eye(mixture.dim)
    p, q = covs[first] + widening, covs[second] + widening
    middle = (p + q) / 2
    logdet = lambda matrix: np.linalg.slogdet(matrix)[1]
    quadratic = np.einsum("pi,pi->p", gap, np.linalg.solve(middle, gap[:, :, None])[:, :, 0])
    return float(np.exp(np.max(-quadratic / 8 + (logdet(p) + logdet(q)) / 4 - logdet(middle) / 2)))


def _plan(
    weights: np.ndarray, others: np.ndarray, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The optimal plan and its dual potentials."""
    dtype = np.asarray(costs).dtype
    weights, others, costs = (np.asarray(part, np.float64) for part in (weights, others, costs))
    weights, others = weights / weights.sum(), others / others.sum()
    k, n = costs.shape
    rows, columns = np.kron(np.eye(k), np.ones((1, n))), np.kron(np.ones((1, k)), np.eye(n))
    largest = max(np.abs(costs).max(), np.finfo(float).tiny)  # the solver's tolerances are absolute
    # One condition is redundant.
    conditions, masses = (
        np.concatenate([rows, columns])[:-1],
        np.concatenate([weights, others])[:-1],
    )
    solution = scipy.optimize.linprog(
        costs.reshape(-1) / largest, A_eq=conditions, b_eq=masses, method="highs-ds"
    )
    if solution.status != 0:
        raise RuntimeError(f"the linear program for the transport plan failed: {solution.message}")
    duals = np.append(solution.eqlin.marginals, 0.0) * largest
    return solution.x.reshape(k, n).astype(dtype), duals[:k].astype(dtype), duals[k:].astype(dtype)
