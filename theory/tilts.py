r"""The tilt of a Gaussian mixture by a quadratic reward, in closed form.

For `r(x) = r_0 + <g, x - y> - (x - y)^T H (x - y)`, a component `w N(mu, S)` and the scale l, with `M = I + 2 l S H`,

    mean        y + M^-1 (mu - y) + l S~ g
    covariance  S~ = M^-1 S
    log-weight  log w + l r_0 - logdet(M)/2 - l (mu - y)^T H M^-1 (mu - y) + l <g, M^-1 (mu - y)> + l^2 g^T S~ g / 2

and `log Z = log E[exp(l r(X))]` is the log-sum-exp of the log-weights. `S` may be singular and H indefinite, as long as the
eigenvalues of M, which are real, are positive; otherwise the tilt has no finite mass. For one `Quadratic` nothing large cancels
(y is its own maximiser and g = 0); for a sum, y is the first term's.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs, linalg, rewards
from tiltjax.mixtures import GaussianMixture, check_mixture


class QuadraticForm(NamedTuple):
    """`r(x) = value + <gradient, x - center> - (x - center)^T matrix (x - center)`."""

    matrix: Array
    center: Array
    gradient: Array
    value: Array


def quadratic_form(reward: rewards.Reward, dim: int) -> QuadraticForm:
    """The coefficients of a quadratic reward on `R^dim`: `Quadratic`, `Linear`, their sums and multiples.

    **Raises:** `ValueError` for any other reward, naming it.
    """
    dim = inputs.count(dim, "dim")
    matrix, centers = _parts(reward, dim)
    center = centers[0] if centers else jnp.zeros(dim, matrix.dtype)
    if center.shape != (dim,):
        raise ValueError(f"the prior lives in {dim} dimensions, the reward on states of shape {center.shape}")
    value, gradient = _value_and_slope(reward, center)
    return QuadraticForm(matrix, center, gradient, value)


@eqx.filter_jit
def _value_and_slope(reward: rewards.Reward, x: Array) -> tuple[Array, Array]:
    return jax.value_and_grad(reward)(x)


def is_quadratic(reward: rewards.Reward) -> bool:
    """Whether `tilt` has a closed form for this reward."""
    match reward:
        case rewards.Sum():
            return all(is_quadratic(term) for term in reward.terms)
        case rewards.Scaled():
            return is_quadratic(reward.reward)
    return isinstance(reward, rewards.Quadratic | rewards.Linear)


def _parts(reward: rewards.Reward, dim: int) -> tuple[Array, list[Array]]:
    """The matrix H of a reward, and the centres of its quadratic terms."""
    match reward:
        case rewards.Quadratic():
            return reward.matrix(), [reward.target]
        case rewards.Linear():
            return jnp.zeros((dim, dim), reward.direction.dtype), []
        case rewards.Scaled():
            matrix, centers = _parts(reward.reward, dim)
            return reward.factor * matrix, centers
        case rewards.Sum():
            matrices, centers = zip(*(_parts(term, dim) for term in reward.terms), strict=True)
            return functools.reduce(jnp.add, matrices), [center for group in centers for center in group]
    raise ValueError(
        f"reward: no closed form for the tilt by {type(reward).__name__}: Quadratic, Linear, their sums and multiples have one. In one or "
        "two dimensions use theory.quadrature.tilt."
    )


class Tilt(eqx.Module):
    """A tilted mixture: `mixture`, the normalised law; `log_norm`, `log E[exp(scale * r(X))]` under the prior."""

    mixture: GaussianMixture
    log_norm: Array

    def sample(self, key: Array, num: int) -> Array:
        """`num` independent draws, `(num, d)`."""
        return self.mixture.sample(key, num)

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point."""
        return self.mixture.log_prob(x)


def tilt(prior: GaussianMixture, reward: rewards.Reward, scale: float | Array) -> Tilt:
    """The law `rho(x) exp(scale * r(x)) / Z` and `log Z`.

    **Arguments:** `prior`, K components in d dimensions, covariances singular or not; `reward`, quadratic; `scale >= 0`.

    **Raises:** `ValueError` for a reward without closed form, or where the tilt has no finite mass.
    """
    check_mixture(prior, "prior")
    scale = inputs.nonnegative(scale, "scale").astype(prior.means.dtype)
    form = inputs.cast(quadratic_form(rewards.as_reward(reward), prior.dim), prior.means.dtype)
    return _tilt(prior, form, scale)


def expected_reward(mixture: GaussianMixture, reward: rewards.Reward) -> Array:
    """`E[r(X)]` for a quadratic reward: `sum_k w_k (r(mu_k) - tr(H S_k))`. **Raises:** `ValueError` for another reward."""
    check_mixture(mixture, "mixture")
    form = quadratic_form(rewards.as_reward(reward), mixture.dim)
    return mixture.weights @ (jax.vmap(reward)(mixture.means) - jnp.einsum("ij,kji->k", form.matrix, mixture.covs))


def _tilt(prior: GaussianMixture, form: QuadraticForm, scale: Array) -> Tilt:
    _check_mass(prior, form, scale)
    return _tilted(prior, form, scale)


@eqx.filter_jit
def _tilted(prior: GaussianMixture, form: QuadraticForm, scale: Array) -> Tilt:
    eye = jnp.eye(prior.dim, dtype=prior.means.dtype)

    def component(log_weight: Array, mean: Array, cov: Array) -> tuple[Array, Array, Array]:
        matrix = eye + 2 * scale * cov @ form.matrix
        inverse = jnp.linalg.inv(matrix)
        offset = mean - form.center
        moved = inverse @ offset
        tilted = inverse @ cov
        tilted = (tilted + tilted.T) / 2
        log_weight = log_weight - jnp.linalg.slogdet(matrix)[1] / 2 - scale * offset @ form.matrix @ moved
        log_weight = log_weight + scale * form.gradient @ (moved + scale * tilted @ form.gradient / 2)
        return log_weight, form.center + moved + scale * tilted @ form.gradient, tilted

    log_weights, means, covs = jax.vmap(component)(prior.log_weights, prior.means, prior.covs)
    mixture = prior.replace(log_weights, means, covs)
    return Tilt(mixture, jax.nn.logsumexp(log_weights) + scale * form.value)


def _check_mass(prior: GaussianMixture, form: QuadraticForm, scale: Array) -> None:
    if not inputs.concrete((prior, form, scale)):
        return
    matrices = np.eye(prior.dim) + 2 * float(scale) * np.asarray(prior.covs) @ np.asarray(form.matrix)
    smallest = np.linalg.eigvals(matrices).real.min(axis=1)
    if np.any(smallest <= 0):
        k = int(np.argmin(smallest))
        raise ValueError(
            f"the tilt has no finite mass: I + 2 scale S H has the eigenvalue {smallest[k]:g} for component {k}, and needs positive "
            f"ones. The reward grows faster than the prior decays: lower scale (got {float(scale):g}) or bound the reward."
        )


def common_axes(cov: Array, matrix: Array) -> Array:
    """A basis, in columns, that diagonalises two commuting matrices: eigenvectors of a generic combination of them."""
    size = lambda matrix: jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.finfo(matrix.dtype).tiny)
    return jnp.linalg.eigh(cov / size(cov) + matrix / size(matrix) / jnp.pi)[1]


def bures(mean: Array, cov: Array, other_mean: Array, other_cov: Array) -> Array:
    """`W2^2` between `N(m, S)` and `N(n, T)`: `|m - n|^2 + tr S + tr T - 2 tr (T^{1/2} S T^{1/2})^{1/2}`.

    The last trace is the sum of the singular values of `L^T M` for `S = L L^T`, `T = M M^T`, by triangular roots: singular covariances
    are as good as any. Its derivative is taken without that of the singular vectors, and is right where singular values coincide; where one
    is zero, W2^2 itself has a one-sided derivative only. Source: Dowson and Landau (1982).

    **Arguments:** `mean` and `other_mean` `(d,)`, `cov` and `other_cov` `(d, d)`. **Raises:** `ValueError` for other shapes.
    """
    mean, other_mean = inputs.floating(mean, "mean", 1), inputs.floating(other_mean, "other_mean", 1)
    cov, other_cov = inputs.floating(cov, "cov", 2), inputs.floating(other_cov, "other_cov", 2)
    d = mean.shape
    for name, part, shape in (("other_mean", other_mean, d), ("cov", cov, d + d), ("other_cov", other_cov, d + d)):
        if part.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, as mean has {d}, got {part.shape}")
    return _bures(mean, cov, other_mean, other_cov)


@jax.jit
def _bures(mean: Array, cov: Array, other_mean: Array, other_cov: Array) -> Array:
    shared = _nuclear_norm(linalg.square_root(cov).T @ linalg.square_root(other_cov))
    return jnp.sum((mean - other_mean) ** 2) + jnp.trace(cov) + jnp.trace(other_cov) - 2 * shared


@jax.custom_jvp
def _nuclear_norm(matrix: Array) -> Array:
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False))


@_nuclear_norm.defjvp
def _nuclear_norm_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    left, values, right = jnp.linalg.svd(primals[0], full_matrices=False)
    return jnp.sum(values), jnp.sum((left @ right) * tangents[0])
