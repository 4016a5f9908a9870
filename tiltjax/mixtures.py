r"""Gaussian mixtures: the laws for which every quantity in this library has a closed form.

For `X_1 ~ sum_k w_k N(mu_k, S_k)` and a noisy observation `x = alpha X_1 + sigma X_0` the posterior
of `X_1` is again a mixture. With `C_k = alpha^2 S_k + sigma^2 I` and the residual
`e_k = x - alpha mu_k`,

    weights      w_k N(x; alpha mu_k, C_k) / p(x)
    means        m_k = mu_k + A_k e_k,  A_k = alpha S_k C_k^-1
    covariances  sigma^2 S_k C_k^-1        (S_k and C_k commute).

With these weights p_k, the posterior mean D has the derivative

    ∂D/∂x = sum_k p_k (A_k + (alpha / sigma^2) (m_k - D) (m_k - D)^T).

These formulas contain no difference of large numbers at either end of time, and `S_k` may be
singular as long as sigma > 0.

**One decomposition.** With `S_k = V_k diag(lambda_k) V_k^T`, all formulas are elementwise in the
coordinates `V_k^T e_k`, at every time. `GaussianMixture.decomposed` computes the decomposition at
the start of a compiled program, so that no loop over particles or times calls LAPACK. The
derivative of the decomposition would be infinite where eigenvalues coincide, as they do for
isotropic priors. So `V_k` and `lambda_k` are constants, and derivatives with respect to `S_k` pass
through `R_k = V_k^T S_k V_k`, a matrix whose value is diagonal. `C_k^-1` is the solution of a
linear system, and is differentiated as such.
"""

from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg, _pytree, _random, _repr

_UNROLL = 40  # the largest K d^2 at which a formula is written out in entries; at 200 it is slower

Numbers = Any  # an array, or `_linalg.Entries` of a small one
T = TypeVar("T")


class Spectrum(NamedTuple):
    """`S_k = V_k R_k V_k^T`, with constant axes V_k and a matrix R_k equal to `diag(values)`, of
    shapes `(K, d, d)`, `(K, d)`, `(K, d, d)`; `covs` are the decomposed S_k.
    """

    axes: Array
    values: Array
    rotated: Array
    covs: Array


class View(NamedTuple):
    """The part of a mixture's posteriors that depends on `alpha` and `sigma`, but not on the state.

    `log_weights`: `log w_k - log det(C_k) / 2`; `centers`: `alpha mu_k`; `data`: `alpha^2`;
    `noise`: `sigma^2`; `inverse`: the diagonal of `C_k^-1` along the axes; `gains`: A_k; `slope`:
    `alpha / sigma^2`.
    """

    log_weights: Numbers
    centers: Numbers
    data: Array
    noise: Array
    inverse: Numbers
    gains: Numbers
    slope: Array


class _Constants(NamedTuple):
    """The part that depends neither on the state nor on `alpha` and `sigma`: the means, `V_k^T` and
    R_k.
    """

    means: Numbers
    to_axes: Numbers
    rotated: Numbers


class GaussianMixture(_repr.Printable):
    """`sum_k w_k N(mu_k, S_k)` on `R^d`.

    **Arguments:**

    - `weights`: `(K,)`, non-negative, proportional to the probabilities; normalized at
      construction.
    - `means`: `(K, d)`.
    - `covs`: `(K, d, d)`, symmetric positive semi-definite. Singular covariances (point masses) are
      allowed.

    **Raises:** `ValueError` for negative weights or no mass, shapes that do not match, covariances
    that are not symmetric or not positive semi-definite.
    """

    log_weights: Array
    means: Array
    covs: Array
    _spectrum: Spectrum | None

    def __init__(self, weights: _checks.Numbers, means: _checks.Numbers, covs: _checks.Numbers):
        weights = _checks.finite(weights, "weights", 1)
        means = _checks.finite(means, "means", 2)
        covs = _checks.finite(covs, "covs", 3)
        k, d = means.shape
        if weights.shape != (k,) or covs.shape != (k, d, d):
            raise ValueError(
                f"shapes disagree: means of shape {means.shape} are K = {k} components in d = {d}, "
                f"so weights must have shape ({k},) and covs ({k}, {d}, {d}), got {weights.shape} "
                f"and {covs.shape}"
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
        self._spectrum = None  # `decomposed` sets it: here it would be wrong after a change of covs

    def _call(self, **given: Any) -> str:
        return f"GaussianMixture of {self.means.shape[-2]} in R^{self.dim}"

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.means.shape[-1]

    @property
    def weights(self) -> Array:
        """The probabilities of the components, `(K,)`."""
        return jnp.exp(self.log_weights)

    def replace(self, log_weights: Array, means: Array, covs: Array) -> "GaussianMixture":
        """A mixture of new parts without checks: log-weights are normalized, and the other parts
        must be valid.
        """
        return self._replace(jax.nn.log_softmax(log_weights), means, covs, None)

    def _replace(self, *parts: Any) -> "GaussianMixture":
        where = lambda m: (m.log_weights, m.means, m.covs, m._spectrum)
        return eqx.tree_at(where, self, parts, is_leaf=lambda leaf: leaf is None)

    def decomposed(self) -> "GaussianMixture":
        """The same mixture with the eigendecomposition of its covariances, for use inside one
        compiled program.
        """
        if self._is_decomposed:
            return self
        return self._replace(self.log_weights, self.means, self.covs, self.spectrum)

    @property
    def _is_decomposed(self) -> bool:
        # By identity: after a replacement of `covs`, or inside a derivative with respect to them, a
        # new decomposition is needed.
        return self._spectrum is not None and self._spectrum.covs is self.covs

    @property
    def spectrum(self) -> Spectrum:
        """The eigendecomposition of the covariances."""
        if self._spectrum is not None and self._is_decomposed:
            return self._spectrum
        values, axes = _linalg.eigh(jax.lax.stop_gradient(self.covs))
        values = jnp.maximum(values, 0)
        return Spectrum(axes, values, _rotated(values, axes, self.covs), self.covs)

    def mean(self) -> Array:
        """`E[X]`, shape `(d,)`."""
        return _linalg.weighted_sum(self.weights, self.means)

    def cov(self) -> Array:
        """`Cov(X)`, shape `(d, d)`: within components plus between them."""
        spread = self.means - self.mean()[None]
        return _linalg.weighted_sum(
            self.weights, self.covs + spread[:, :, None] * spread[:, None, :]
        )

    @property
    def width(self) -> float | None:
        """The root of the mean variance of a coordinate, `sqrt(tr Cov(X) / d)`, as a Python number,
        or `None` if the mixture is traced.
        """
        if not _checks.concrete(self):
            return None
        # By NumPy, because every run asks for it, and JAX would compile it.
        parts = self.log_weights, self.means, self.covs
        log_weights, means, covs = (np.asarray(part, np.float64) for part in parts)
        weights = np.exp(log_weights - np.max(log_weights))
        weights /= np.sum(weights)
        between = np.sum((means - weights @ means) ** 2, axis=1)
        within = np.trace(covs, axis1=1, axis2=2)
        return float(np.sqrt(weights @ (within + between) / self.dim))

    def sample(self, key: Array, num: int) -> Array:
        """`num` independent draws, shape `(num, d)`."""
        return self._sample(_checks.key(key), _checks.count(num, "num"))

    @eqx.filter_jit
    def _sample(self, key: Array, num: int) -> Array:
        key_component, key_normal = jax.random.split(key)
        component = _random.categorical(key_component, self.log_weights, shape=(num,))
        normal = jax.random.normal(key_normal, (num, self.dim), self.means.dtype)
        roots = jax.vmap(_linalg.square_root)(self.covs)
        return self.means[component] + jnp.einsum("nij,nj->ni", roots[component], normal)

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point `x` of shape `(d,)`. The covariances must be positive
        definite.
        """
        return jax.nn.logsumexp(self.component_log_probs(x))

    def component_log_probs(self, x: Array) -> Array:
        """`log w_k + log N(x; mu_k, S_k)`, shape `(K,)`: their `softmax` is the probability of each
        component.
        """
        one, zero = jnp.ones((), self.means.dtype), jnp.zeros((), self.means.dtype)
        return self._at(one, zero, x)[0] - self.dim / 2 * jnp.log(2 * jnp.pi)

    def condition(self, alpha: Array, sigma: Array, x: Array) -> "GaussianMixture":
        """The law of `X_1` given `alpha X_1 + sigma X_0 = x`, for scalars `alpha`, `sigma > 0` and
        `x` of shape `(d,)`.
        """
        mixture = self.decomposed()
        log_weights, means = mixture._at(alpha, sigma, x)
        axes, values, rotated, _ = mixture.spectrum
        noise = jnp.asarray(sigma, self.means.dtype) ** 2
        data = jnp.asarray(alpha, self.means.dtype) ** 2
        covs = noise * _recomposed_ratio(axes, rotated, values, data, noise)
        covs = (covs + jnp.swapaxes(covs, 1, 2)) / 2
        # The posterior covariances have the same axes. The spectrum is only set if it was set here.
        spectrum = None
        if self._is_decomposed:
            ratio = noise * _ratio(rotated, values, data, noise)
            spectrum = Spectrum(axes, noise * values / (data * values + noise), ratio, covs)
        return self._replace(jax.nn.log_softmax(log_weights), means, covs, spectrum)

    def denoise(self, alpha: Array, sigma: Array, x: Array) -> Array:
        """`E[X_1 | alpha X_1 + sigma X_0 = x]`, shape `(d,)`: the mean of `condition`."""
        mixture = self.decomposed()
        return mixture.denoise_view(mixture.view(alpha, sigma), x)

    def view(self, alpha: Array, sigma: Array) -> View:
        """The part of `denoise` that depends on `alpha` and `sigma`, but not on the state: a tree
        of arrays.
        """
        axes, values, rotated, _ = self.spectrum
        dtype = self.means.dtype
        alpha, sigma = jnp.asarray(alpha, dtype), jnp.asarray(sigma, dtype)
        data, noise = alpha**2, sigma**2
        ratio = _recomposed_ratio(axes, rotated, values, data, noise)
        view = View(
            self.log_weights - _half_logdet(rotated, values, data, noise),
            alpha * self.means,
            data,
            noise,
            1 / (data * values + noise),
            alpha * ratio,
            alpha / noise,
        )
        return jax.tree.map(lambda leaf: self._entries(leaf) if leaf.ndim else leaf, view)

    def denoise_view(self, view: View, x: Array) -> Array:
        """`denoise` from the output of `view(alpha, sigma)`."""
        check_state(x, self.dim)
        return _linalg.array(_posterior_mean(view, self._constants(), self._entries(x)))

    def log_mean_exp(self, natural: Array, precision: Array) -> Array:
        """`log E exp(<natural, X> - precision |X|^2 / 2)`, for `natural` of shape `(d,)` and a
        scalar `precision`; NaN if it is infinite.

        With `b = natural - precision mu`, a component gives `<natural, mu> - precision |mu|^2 / 2 +
        <b, S K b> / 2 - log det(K^-1) / 2`, where `K^-1 = I + precision S`.
        """
        axes, values, rotated, _ = self.spectrum
        one = jnp.ones_like(precision)
        shift = natural[None] - precision * self.means
        along = _linalg.product(jnp.swapaxes(axes, 1, 2), shift)
        gain = _linalg.product(_ratio(rotated, values, precision, one), along)
        log_means = self.means @ natural - precision * jnp.sum(self.means**2, axis=1) / 2
        log_means = log_means + jnp.sum(along * gain, axis=1) / 2
        log_means = log_means - _half_logdet(rotated, values, precision, one)
        return jax.nn.logsumexp(self.log_weights + log_means)

    def _at(self, alpha: Any, sigma: Any, x: Array) -> tuple[Array, Array]:
        """Log-weights `(K,)`, up to `-d/2 log 2 pi`, and posterior means `(K, d)`."""
        check_state(x, self.dim)
        mixture = self.decomposed()
        view, constants = mixture.view(alpha, sigma), mixture._constants()
        log_weights, means = _conditioned(view, constants, mixture._entries(x))
        return _linalg.array(log_weights), _linalg.array(means)

    def _constants(self) -> _Constants:
        axes, _, rotated, _ = self.spectrum
        constants = _Constants(self.means, jnp.swapaxes(axes, 1, 2), rotated)
        return _Constants(*map(self._entries, constants))

    def _entries(self, array: Array) -> Numbers:
        """The entries of an array if the mixture is small, else the array."""
        small = self.means.size * self.dim <= _UNROLL
        return _linalg.unrolled(array) if small else array


def decomposed(tree: T) -> T:
    """A tree in which all mixtures are `decomposed`. Call it at the start of a compiled program."""
    is_mixture = lambda node: isinstance(node, GaussianMixture)

    def convert(node: Any) -> Any:
        if is_mixture(node):
            return node.decomposed()
        if isinstance(node, _pytree.Function):  # such as `theory.log_h(prior, reward)`
            parts = node.parts()
            if any(map(is_mixture, jax.tree.leaves(parts, is_leaf=is_mixture))):
                return _pytree.Function.of(*decomposed(parts))
        return node

    special = lambda node: is_mixture(node) or isinstance(node, _pytree.Function)
    return jax.tree.map(convert, tree, is_leaf=special)


def _diagonal(values: Array) -> Array:
    return values[:, :, None] * jnp.eye(values.shape[1], dtype=values.dtype)[None]


@jax.custom_jvp
def _rotated(values: Array, axes: Array, covs: Array) -> Array:
    """`axes^T covs axes`, which is diagonal. Its derivative by `covs` is not diagonal."""
    return _diagonal(values)


@_rotated.defjvp
def _rotated_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    axes = primals[1]
    # Called again, so that the value keeps its derivative at the next order.
    return _rotated(*primals), jnp.swapaxes(axes, 1, 2) @ tangents[2] @ axes


# Functions of C = data R + noise I for R = diag(values), `(K, d, d)`. Their values are elementwise,
# and they have derivatives of any order in all directions of R.


def _noisy(rotated: Array, data: Array, noise: Array) -> Array:
    return data * rotated + noise * jnp.eye(rotated.shape[-1], dtype=rotated.dtype)[None]


@jax.custom_jvp
def _inverse(rotated: Array, values: Array, data: Array, noise: Array) -> Array:
    """`C^-1`."""
    return _diagonal(1 / (data * values + noise))


@_inverse.defjvp
def _inverse_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    inverse = _inverse(*primals)
    return inverse, -inverse @ _noisy_tangent(primals, tangents) @ inverse


@jax.custom_jvp
def _ratio(rotated: Array, values: Array, data: Array, noise: Array) -> Array:
    """`R C^-1`."""
    return _diagonal(values / (data * values + noise))


@_ratio.defjvp
def _ratio_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # The term of dR is `noise C^-1 dR C^-1`; the product rule has a difference of large numbers.
    inverse, ratio = _inverse(*primals), _ratio(*primals)
    rotated, _, _, noise = primals
    of_rotated, _, of_data, of_noise = tangents
    moved = noise * inverse @ of_rotated - ratio @ _noisy(rotated, of_data, of_noise)
    return ratio, moved @ inverse


@jax.custom_jvp
def _recomposed_ratio(
    axes: Array, rotated: Array, values: Array, data: Array, noise: Array
) -> Array:
    """`S C^-1` in the coordinates of the states, `V R C^-1 V^T`."""
    return _linalg.recomposed(axes, values / (data * values + noise))


@_recomposed_ratio.defjvp
def _recomposed_ratio_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    axes = primals[0]
    tangent = jax.jvp(_ratio, primals[1:], tangents[1:])[1]
    return _recomposed_ratio(*primals), axes @ tangent @ jnp.swapaxes(axes, 1, 2)


@jax.custom_jvp
def _half_logdet(rotated: Array, values: Array, data: Array, noise: Array) -> Array:
    """`log det(C) / 2`, `(K,)`."""
    return jnp.sum(jnp.log(data * values + noise), axis=-1) / 2


@_half_logdet.defjvp
def _half_logdet_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    tangent = jnp.einsum("kij,kji->k", _inverse(*primals), _noisy_tangent(primals, tangents)) / 2
    return _half_logdet(*primals), tangent


def _noisy_tangent(primals: tuple, tangents: tuple) -> Array:
    rotated, _, data, _ = primals
    of_rotated, _, of_data, of_noise = tangents
    return data * of_rotated + _noisy(rotated, of_data, of_noise)


def _conditioned(view: View, constants: _Constants, x: Numbers) -> tuple[Numbers, Numbers]:
    """The log-weights of the posterior, not normalized, and the means m_k of its components."""
    residuals = x[None] - view.centers
    along = _linalg.product(constants.to_axes, residuals)
    # The value is `inverse * along`, and the derivative is the derivative of a linear system in R.
    whitened = jax.lax.custom_linear_solve(
        lambda y: view.data * _linalg.product(constants.rotated, y) + view.noise * y,
        along,
        lambda _, b: view.inverse * b,
        symmetric=True,
    )
    log_weights = view.log_weights - (along * whitened).sum(-1) * 0.5
    return log_weights, constants.means + _linalg.product(view.gains, residuals)


def _plain_mean(view: View, constants: _Constants, x: Numbers) -> Numbers:
    log_weights, means = _conditioned(view, constants, x)
    return means[0] if log_weights.shape == (1,) else _mixed(_linalg.softmax(log_weights), means)


# The posterior mean. With automatic differentiation, a loop stores about thirty numbers per call
# for the backward pass. The derivative in the state, which guidance needs most often, therefore has
# the closed form of the module docstring: one product by A_k per direction, or a symmetric matrix
# of a few numbers for a small mixture. For one Gaussian the derivative is the same at all states.
_posterior_mean = eqx.filter_custom_jvp(_plain_mean)


@_posterior_mean.def_jvp
def _posterior_mean_jvp(primals, tangents):
    view, constants, x = primals
    *of_mixture, of_x = tangents
    if of_x is None or view.log_weights.shape == (1,) or jax.tree.leaves(of_mixture):
        return eqx.filter_jvp(_plain_mean, primals, tangents)
    log_weights, means = _conditioned(view, constants, x)
    p = _linalg.softmax(log_weights)
    mean = _mixed(p, means)
    apart = means - mean[None]
    if not isinstance(x, _linalg.Entries):
        within = _mixed(p, jnp.einsum("kij,j->ki", view.gains, of_x))
        return mean, within + view.slope * ((p * (apart @ of_x)) @ apart)
    i, j = np.triu_indices(x.shape[0])
    upper = _mixed(p, view.gains[:, i, j] + view.slope * (apart[:, i] * apart[:, j]))
    where = np.zeros((x.shape[0],) * 2, int)
    where[i, j] = where[j, i] = np.arange(len(i))
    return mean, (upper[where] * of_x[None]).sum()


def _mixed(p: Numbers, values: Numbers) -> Numbers:
    """`sum_k p_k v_k`."""
    return (p[:, None] * values).sum(0) if isinstance(p, _linalg.Entries) else p @ values


def check_mixture(value: Any, name: str) -> None:
    """Raise a `TypeError` if `value` is not a mixture."""
    _checks.instance(
        value, GaussianMixture, name, "build it by tiltjax.GaussianMixture(weights, means, covs)"
    )


def check_state(x: Array, dim: int) -> None:
    """Raise a `ValueError` if the shape of a state is not `(dim,)`."""
    if x.shape != (dim,):
        raise ValueError(
            f"this mixture needs states of shape ({dim},), got a state of shape {x.shape}"
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
                f"covs[{index}] must be positive semi-definite, got the smallest eigenvalue "
                f"{smallest:g} in {cov.tolist()}"
            )
