r"""Gaussian mixtures: the laws for which every quantity in this library is known exactly.

For `X_1 ~ sum_k w_k N(mu_k, S_k)` and a noisy view `x = alpha X_1 + sigma X_0` the posterior of
`X_1` is again a mixture. With `C_k = alpha^2 S_k + sigma^2 I` and the residual
`e_k = x - alpha mu_k`,

    weights      w_k N(x; alpha mu_k, C_k) / p(x)
    means        mu_k + alpha S_k C_k^-1 e_k
    covariances  sigma^2 S_k C_k^-1        (S_k and C_k commute).

and the derivative of its mean D is, with `A_k = alpha S_k C_k^-1`, `g_k = C_k^-1 e_k` and the means
m_k and weights p_k above,

    ∂D/∂x = sum_k p_k (A_k - (m_k - D) g_k^T).

No difference of large numbers appears at either end of time, and `S_k` may be singular as long as
sigma > 0. Everything goes through Cholesky factors of `C_k`: an eigendecomposition would be
reusable across times, but its gradient is NaN where eigenvalues coincide, which is where isotropic
priors live.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg

_UNROLL_COMPONENTS = 8


class GaussianMixture(eqx.Module):
    """`sum_k w_k N(mu_k, S_k)` on `R^d`.

    **Arguments:**

    - `weights`: `(K,)`, non-negative; proportional to the probabilities, normalized at
      construction.
    - `means`: `(K, d)`.
    - `covs`: `(K, d, d)`, symmetric positive semi-definite; singular ones (point masses) are
      allowed.

    **Raises:** `ValueError` for negative weights or no mass, shapes that disagree, covariances that
    are not symmetric or not positive semi-definite.
    """

    log_weights: Array
    means: Array
    covs: Array

    def __init__(self, weights: _checks.Numbers, means: _checks.Numbers, covs: _checks.Numbers):
        weights = _checks.finite(weights, "weights", 1)
        means = _checks.finite(means, "means", 2)
        covs = _checks.finite(covs, "covs", 3)
        k, d = means.shape
        if weights.shape != (k,) or covs.shape != (k, d, d):
            raise ValueError(
                f"shapes disagree: means {means.shape} say K = {k} components in d = {d}, so "
                f"weights must have shape ({k},) and covs ({k}, {d}, {d}); got {weights.shape} and "
                f"{covs.shape}"
            )
        if _checks.concrete(weights):
            if np.any(np.asarray(weights) < 0):
                raise ValueError(f"weights must not be negative, got {np.asarray(weights)}")
            if not np.sum(np.asarray(weights)) > 0:
                raise ValueError(f"weights must have positive mass, got {np.asarray(weights)}")
        if _checks.concrete(covs):
            _check_covariances(np.asarray(covs))
        dtype = jnp.result_type(weights, means, covs)
        if _checks.concrete(weights):  # in NumPy, which compiles nothing
            mass = np.asarray(weights, np.float64)
            with np.errstate(divide="ignore"):  # a weight of zero
                self.log_weights = jax.device_put(np.log(mass / mass.sum()).astype(dtype))
        else:
            self.log_weights = jnp.log(weights / jnp.sum(weights)).astype(dtype)
        self.means = means.astype(dtype)
        self.covs = covs.astype(dtype)

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.means.shape[-1]

    @property
    def weights(self) -> Array:
        """The probabilities of the components, `(K,)`."""
        return jnp.exp(self.log_weights)

    def replace(self, log_weights: Array, means: Array, covs: Array) -> "GaussianMixture":
        """Another mixture from parts that are right by construction: log-weights are normalized,
        nothing is checked.
        """
        parts = jax.nn.log_softmax(log_weights), means, covs
        return eqx.tree_at(lambda m: (m.log_weights, m.means, m.covs), self, parts)

    def mean(self) -> Array:
        """`E[X]`, shape `(d,)`."""
        return self.weights @ self.means

    def cov(self) -> Array:
        """`Cov(X)`, shape `(d, d)`: within components plus between them."""
        spread = self.means - self.mean()[None]
        return jnp.einsum(
            "k,kij->ij", self.weights, self.covs + spread[:, :, None] * spread[:, None, :]
        )

    def sample(self, key: Array, num: int) -> Array:
        """`num` independent draws, shape `(num, d)`."""
        return self._sample(_checks.key(key), _checks.count(num, "num"))

    @eqx.filter_jit
    def _sample(self, key: Array, num: int) -> Array:
        key_component, key_normal = jax.random.split(key)
        component = jax.random.categorical(key_component, self.log_weights, shape=(num,))
        normal = jax.random.normal(key_normal, (num, self.dim), self.means.dtype)
        roots = jax.vmap(_linalg.square_root)(self.covs)
        return self.means[component] + jnp.einsum("nij,nj->ni", roots[component], normal)

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point `x` of shape `(d,)`; the covariances must be positive
        definite.
        """
        return jax.nn.logsumexp(self.component_log_probs(x))

    def component_log_probs(self, x: Array) -> Array:
        """`log w_k + log N(x; mu_k, S_k)`, shape `(K,)`: their `softmax` is the probability of each
        component.
        """
        return self._view(1.0, 0.0, x)[0] - self.dim / 2 * jnp.log(2 * jnp.pi)

    def condition(self, alpha: Array, sigma: Array, x: Array) -> "GaussianMixture":
        """The law of `X_1` given `alpha X_1 + sigma X_0 = x`, for scalars `alpha`, `sigma > 0` and
        `x` of shape `(d,)`.
        """
        log_weights, means = self._view(alpha, sigma, x)
        eye = jnp.eye(self.dim, dtype=self.means.dtype)

        def posterior_cov(cov: Array) -> Array:
            # sigma^2 S C^-1, symmetric because S and C commute; symmetrized to the last bit.
            product = sigma**2 * jnp.linalg.solve(alpha**2 * cov + sigma**2 * eye, cov)
            return (product + product.T) / 2

        return self.replace(log_weights, means, jax.vmap(posterior_cov)(self.covs))

    def denoise(self, alpha: Array, sigma: Array, x: Array) -> Array:
        """`E[X_1 | alpha X_1 + sigma X_0 = x]`, shape `(d,)`: the mean of `condition`."""
        if is_small(self):
            return posterior_mean(noisy_components(self, alpha, sigma), x)
        log_weights, means = self._view(alpha, sigma, x)
        return jax.nn.softmax(log_weights) @ means

    def log_mean_exp(self, natural: Array, precision: Array) -> Array:
        """`log E exp(<natural, X> - precision |X|^2 / 2)`, for `natural` of shape `(d,)` and a
        scalar `precision`; NaN where infinite.

        With `b = natural - precision mu`, a component gives
        `<natural, mu> - precision |mu|^2 / 2 + <b, S K b> / 2 - log det(K^-1) / 2`, where
        `K^-1 = I + precision S`.
        """

        def component(mean: Array, cov: Array) -> Array:
            factor = jnp.linalg.cholesky(jnp.eye(self.dim, dtype=cov.dtype) + precision * cov)
            shift = natural - precision * mean
            gain = shift @ jax.scipy.linalg.cho_solve((factor, True), cov @ shift)
            return (
                natural @ mean
                - precision * jnp.sum(mean**2) / 2
                + gain / 2
                - jnp.sum(jnp.log(jnp.diag(factor)))
            )

        return jax.nn.logsumexp(self.log_weights + jax.vmap(component)(self.means, self.covs))

    def _view(self, alpha: Any, sigma: Any, x: Array) -> tuple[Array, Array]:
        """Log-weights `(K,)`, up to `-d/2 log 2 pi`, and posterior means `(K, d)`."""
        d = self.dim
        check_state(x, d)
        if is_small(self):
            views = _views(noisy_components(self, alpha, sigma), x)
            return jnp.stack([view.log_weight for view in views]), jnp.asarray(
                [view.mean for view in views]
            )

        def component(log_weight, mean, cov, noisy):
            factor = _linalg.cholesky(noisy)
            half = jnp.asarray(_linalg.half_solve(factor, x - alpha * mean))
            log_weight = log_weight - _linalg.half_logdet(factor) - jnp.sum(half**2) / 2
            return log_weight, mean + alpha * cov @ jnp.asarray(_linalg.back_solve(factor, half))

        noisy = alpha**2 * self.covs + (sigma**2 * jnp.eye(d, dtype=self.means.dtype))[None]
        return jax.vmap(component)(self.log_weights, self.means, self.covs, noisy)


class NoisyComponent(NamedTuple):
    """One component of a small mixture at one noise level, in entries: the part of its posterior
    that does not depend on the state.

    `log_weight`, less half of log det C_k; `mean` mu_k; `center` `alpha mu_k`; `inverse` of the
    Cholesky factor of C_k, a lower triangle; `slope` A_k.
    """

    log_weight: Array
    mean: list[Array]
    center: list[Array]
    inverse: list[list[Array]]
    slope: list[list[Array]]


class _View(NamedTuple):
    """The same at a state, in entries: `mean` is m_k, `half` is `L^-1 e_k`."""

    log_weight: Array
    mean: list[Array]
    half: list[Array]


def is_small(mixture: GaussianMixture) -> bool:
    """Whether a mixture is written out entry by entry."""
    k, d = mixture.means.shape
    return d <= _linalg.UNROLL and k <= _UNROLL_COMPONENTS


def noisy_components(mixture: GaussianMixture, alpha: Array, sigma: Array) -> list[NoisyComponent]:
    """What the posteriors of a small mixture need of `alpha` and `sigma`, whatever the state."""
    noise, d = sigma**2 * jnp.eye(mixture.dim, dtype=mixture.means.dtype), mixture.dim
    components = []
    for log_weight, mean, cov in zip(mixture.log_weights, mixture.means, mixture.covs, strict=True):
        factor = _linalg.cholesky(alpha**2 * cov + noise)
        # Row i is `alpha C^-1 S e_i`: what rounding does to it is then divided by sigma^2 only
        # where the state's residual is small.
        slope = [
            _linalg.back_solve(factor, _linalg.half_solve(factor, [cov[j, i] for j in range(d)]))
            for i in range(d)
        ]
        components.append(
            NoisyComponent(
                log_weight - _linalg.half_logdet(factor),
                [mean[i] for i in range(d)],
                [alpha * mean[i] for i in range(d)],
                _linalg.inverse_factor(factor),
                [[alpha * entry for entry in row] for row in slope],
            )
        )
    return components


def _residual(component: NoisyComponent, x: Array) -> list[Array]:
    """The residual e_k."""
    check_state(x, len(component.center))
    # The derivative of slices is a padding of each, at twice the cost of all the rest.
    return [entry - center for entry, center in zip(jnp.unstack(x), component.center, strict=True)]


def _component_mean(component: NoisyComponent, residual: list[Array]) -> list[Array]:
    """The posterior mean m_k, affine in the state."""
    return [
        mean + _dot(row, residual)
        for mean, row in zip(component.mean, component.slope, strict=True)
    ]


def _views(components: list[NoisyComponent], x: Array) -> list[_View]:
    views = []
    for component in components:
        residual = _residual(component, x)
        half = [_dot(row, residual) for row in component.inverse]
        log_weight = component.log_weight - sum(h**2 for h in half) / 2
        views.append(_View(log_weight, _component_mean(component, residual), half))
    return views


def _dot(row: list[Array], entries: list[Array]) -> Array:
    """The inner product of a row with as many of the first entries."""
    return functools.reduce(jnp.add, [a * b for a, b in zip(row, entries, strict=False)])


def _softmax(log_weights: list[Array]) -> list[Array]:
    """The softmax of scalars, by one division and, of two, one exponential: each costs as much as
    all the rest.
    """
    if len(log_weights) == 2:
        return list(_softmax_of_two(*log_weights))
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, log_weights))
    masses = [jnp.exp(log_weight - largest) for log_weight in log_weights]
    total = 1 / sum(masses[1:], masses[0])
    return [mass * total for mass in masses]


@jax.custom_jvp
def _softmax_of_two(one: Array, other: Array) -> tuple[Array, Array]:
    """The softmax of two numbers, by the smaller probability, whose sign, also that of a zero, says
    which of the two it is.

    As everything after it depends on this one number, the compiler neither stores the exponential
    nor repeats it. The derivative is written out, as powers of `inverse` would overflow.
    """
    one_is_smaller = other > one
    inverse = 1 + jnp.exp(jnp.where(one_is_smaller, other - one, one - other))
    smaller = 1 / jnp.where(one_is_smaller, inverse, -inverse)
    is_other = jnp.signbit(smaller)
    return jnp.where(is_other, 1 + smaller, smaller), jnp.where(is_other, -smaller, 1 - smaller)


@_softmax_of_two.defjvp
def _softmax_of_two_jvp(primals: tuple, tangents: tuple) -> tuple:
    probabilities = _softmax_of_two(*primals)
    tangent = probabilities[0] * probabilities[1] * (tangents[0] - tangents[1])
    return probabilities, (tangent, -tangent)


def _average(views: list[_View]) -> tuple[list[Array], list[Array]]:
    """The probability of each component, and the mean of all, in entries."""
    probabilities = _softmax([view.log_weight for view in views])
    d = len(views[0].mean)
    return probabilities, [_dot(probabilities, [view.mean[i] for view in views]) for i in range(d)]


def _plain_mean(components: list[NoisyComponent], x: Array) -> Array:
    if len(components) == 1:
        return jnp.stack(_component_mean(components[0], _residual(components[0], x)))
    return jnp.stack(_average(_views(components, x))[1])


# The posterior mean of a small mixture. Differentiated step by step, a scan stores some thirty
# numbers a call for the backward pass. The derivative in x, which guidance needs most often, is a
# symmetric matrix of a few numbers, and of one Gaussian the same for all states.
posterior_mean = eqx.filter_custom_jvp(_plain_mean)


@posterior_mean.def_jvp
def _posterior_mean_jvp(primals, tangents):
    components, x = primals
    of_components, of_x = tangents
    if of_x is None or len(components) == 1 or jax.tree.leaves(of_components):
        return eqx.filter_jvp(_plain_mean, primals, tangents)
    views, d = _views(components, x), len(x)
    probabilities, mean = _average(views)
    jacobian: list = [[0.0] * d for _ in range(d)]
    for probability, view, component in zip(probabilities, views, components, strict=True):
        for j in range(d):
            gain = sum(component.inverse[m][j] * view.half[m] for m in range(j, d))
            for i in range(j + 1):
                within = component.slope[i][j] - (view.mean[i] - mean[i]) * gain
                jacobian[i][j] += probability * within
    entries = jnp.unstack(of_x)
    rows = [[jacobian[min(i, j)][max(i, j)] for j in range(d)] for i in range(d)]
    tangent = [sum(row[j] * entries[j] for j in range(d)) for row in rows]
    return jnp.stack(mean), jnp.stack(tangent)


def check_mixture(value: Any, name: str) -> None:
    """Refuse, with a `TypeError`, what is no mixture."""
    _checks.instance(
        value, GaussianMixture, name, "build it by tiltjax.GaussianMixture(weights, means, covs)"
    )


def check_state(x: Array, dim: int) -> None:
    """Refuse, with a `ValueError`, a state whose shape is not `(dim,)`."""
    if x.shape != (dim,):
        raise ValueError(
            f"this mixture lives on states of shape ({dim},), got a state of shape {x.shape}"
        )


def _check_covariances(covs: np.ndarray) -> None:
    tolerance = (
        1e3
        * np.finfo(covs.dtype).eps
        * np.maximum(np.abs(covs).max(axis=(1, 2)), np.finfo(covs.dtype).tiny)
    )
    for index, (cov, small) in enumerate(zip(covs, tolerance, strict=True)):
        if np.abs(cov - cov.T).max() > small:
            raise ValueError(
                f"covs[{index}] must be symmetric, got {cov.tolist()}: use (S + S.T) / 2"
            )
        smallest = np.linalg.eigvalsh(cov).min()
        if smallest < -small:
            raise ValueError(
                f"covs[{index}] must be positive semi-definite, got smallest eigenvalue "
                f"{smallest:g} in {cov.tolist()}"
            )
