r"""The exact tilt of a Gaussian mixture: its law, Doob's h-function, and `log Z` by thermodynamic
integration.

**The tilt by a quadratic reward, in closed form.** For
`r(x) = r_0 + <g, x - y> - (x - y)^T H (x - y)`, a component `w N(mu, S)` and the scale l, with
`M = I + 2 l S H`,

    mean        y + M^-1 (mu - y) + l S~ g
    covariance  S~ = M^-1 S
    log-weight
        log w + l r_0 - logdet(M)/2 - l (mu - y)^T H M^-1 (mu - y)
            + l <g, M^-1 (mu - y)> + l^2 g^T S~ g / 2

The log-sum-exp of the log-weights is `log Z = log E[exp(l r(X))]`. `S` may be singular and H may be
indefinite. The eigenvalues of M are real and must be positive; otherwise the tilt has no finite
mass. For one `Quadratic`, y is its maximizer and g = 0, so that no large terms cancel. For a sum of
rewards, y is the maximizer of the first quadratic term.

**Doob's h-function**, `log h_t(x) = log E[exp(scale * r(X_1)) | X_t = x]`, exactly. The posterior
of `X_1` given `X_t = x` is again a mixture (`GaussianMixture.condition`), and log h is the log
normalizing constant of the posterior's tilt. At t = 0, log h is log Z for every x (if
`alpha_0 = 0`). At t = 1, log h is `scale * r(x)`. The law `p_t h_t / Z` is the tilt noised to time
t.

**Thermodynamic integration** gives `log Z` of any law whose tilted mean reward is known or
measured. With `Z(scale) = E[exp(scale r(X))]` under the prior, `log Z(0) = 0` and

    d log Z / d scale = E_scale[r],    d^2 log Z / d scale^2 = Var_scale(r) >= 0,

where E_scale is the expectation under the tilt. Hence `log Z(scale) = ∫_0^scale E_l[r] dl`
(Kirkwood 1935; Gelman and Meng 1998, *Simulating normalizing constants*: path sampling). By the
second equation `E_l[r]` does not decrease in l. The left Riemann sum on any grid of scales is
therefore a lower bound of `log Z`, and the right Riemann sum is an upper bound. Z must be finite
for all scales of the grid.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory import quadrature
from tiltjax import _checks, _linalg, _pytree, _repr, rewards
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.mixtures import GaussianMixture, check_mixture, decomposed


class QuadraticForm(NamedTuple):
    """A quadratic reward,
    `r(x) = value + <gradient, x - center> - (x - center)^T matrix (x - center)`.
    """

    matrix: Array
    center: Array
    gradient: Array
    value: Array


def quadratic_form(reward: rewards.Reward, dim: int) -> QuadraticForm:
    """The coefficients of a quadratic reward on `R^dim`, as a `QuadraticForm`. The reward is a
    `Quadratic`, a `LinearReward`, or a sum or multiple of these.

    **Raises:** `ValueError` for any other reward, and for a reward on another dimension.
    """
    dim = _checks.count(dim, "dim")
    matrix, centers = _matrix_and_centers(reward, dim)
    center = centers[0] if centers else jnp.zeros(dim, matrix.dtype)
    if center.shape != (dim,):
        raise ValueError(
            f"the prior has {dim} dimensions but the reward takes states of shape {center.shape}"
        )
    value, gradient = _value_and_gradient(reward, center)
    return QuadraticForm(matrix, center, gradient, value)


@eqx.filter_jit
def _value_and_gradient(reward: rewards.Reward, x: Array) -> tuple[Array, Array]:
    return jax.value_and_grad(reward)(x)


def is_quadratic(reward: rewards.Reward) -> bool:
    """Whether `tilt` has a closed form for this reward."""
    match reward:
        case rewards.Sum():
            return all(is_quadratic(term) for term in reward.terms)
        case rewards.Scaled():
            return is_quadratic(reward.reward)
    return isinstance(reward, rewards.Quadratic | rewards.LinearReward)


def _matrix_and_centers(reward: rewards.Reward, dim: int) -> tuple[Array, list[Array]]:
    """The matrix H of a reward, and the maximizers of its quadratic terms."""
    match reward:
        case rewards.Quadratic():
            return reward.matrix(), [reward.target]
        case rewards.LinearReward():
            return jnp.zeros((dim, dim), reward.direction.dtype), []
        case rewards.Scaled():
            matrix, centers = _matrix_and_centers(reward.reward, dim)
            return reward.factor * matrix, centers
        case rewards.Sum():
            parts = [_matrix_and_centers(term, dim) for term in reward.terms]
            matrix = functools.reduce(jnp.add, (matrix for matrix, _ in parts))
            return matrix, [center for _, centers in parts for center in centers]
    raise ValueError(
        f"the tilt by the reward {type(reward).__name__} has no closed form. Use Quadratic, "
        "LinearReward, their sums or their multiples; in one or two dimensions, "
        "theory.quadrature.tilt takes any reward. tiltjax.audit judges a method for any reward."
    )


class Tilt(_repr.Report):
    """A tilted mixture.

    **Fields:** `mixture`, the normalized law; `log_norm`, `log E[exp(scale * r(X))]` under the
    prior.
    """

    mixture: GaussianMixture
    log_norm: Array

    def _title(self) -> str:
        return f"Tilt: {_repr.form(self.mixture)}"

    def _rows(self) -> dict[str, str]:
        parts = {"log Z": self.log_norm, "log-weights": self.mixture.log_weights}
        return {name: _repr.form(part) for name, part in parts.items()}

    def sample(self, key: Array, num: int) -> Array:
        """`num` independent draws, `(num, d)`."""
        return self.mixture.sample(key, num)

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point."""
        return self.mixture.log_prob(x)


def tilt(prior: GaussianMixture, reward: rewards.Reward, scale: float | Array) -> Tilt:
    """The law `rho(x) exp(scale * r(x)) / Z` and `log Z`.

    **Arguments:** `prior`, K components in d dimensions, covariances may be singular; `reward`,
    quadratic; `scale >= 0`.

    **Raises:** `ValueError` for a reward without a closed form, and for a tilt without finite mass.
    """
    check_mixture(prior, "prior")
    scale = _checks.nonnegative(scale, "scale").astype(prior.means.dtype)
    form = _pytree.cast(quadratic_form(rewards.as_reward(reward), prior.dim), prior.means.dtype)
    return tilt_by_form(prior, form, scale)


def expected_reward(mixture: GaussianMixture, reward: rewards.Reward) -> Array:
    """`E[r(X)]` for a quadratic reward: `sum_k w_k (r(mu_k) - tr(H S_k))`, with the weights w_k,
    means mu_k and covariances S_k of the mixture, and the matrix H of the reward.

    **Raises:** `ValueError` for any other reward.
    """
    check_mixture(mixture, "mixture")
    form = quadratic_form(rewards.as_reward(reward), mixture.dim)
    return mixture.weights @ (
        jax.vmap(reward)(mixture.means) - jnp.einsum("ij,kji->k", form.matrix, mixture.covs)
    )


def prior_ess(prior: GaussianMixture, reward: rewards.Reward, scale: float | Array) -> Array:
    """The effective sample size of unguided samples with the weights `exp(scale r)`, as a fraction
    of their number n, for large n: `E[w]^2 / E[w^2] = Z(scale)^2 / Z(2 scale)`.

    With this fraction f, the estimate of log Z by n samples has the standard deviation
    `sqrt((1 / f - 1) / n)`, and a weighted mean needs about `1 / f` times as many samples as
    independent draws of the tilt.

    **Arguments:** as in `tilt`. **Raises:** `ValueError` as in `tilt`, and where the weights have
    no finite variance, because Z(2 scale) is infinite.

    Source: Kong 1992, *A note on importance sampling using standardized weights*.
    """
    scale = _checks.nonnegative(scale, "scale")
    once, twice = (tilt(prior, reward, factor * scale).log_norm for factor in (1, 2))
    return jnp.exp(2 * once - twice)


def tilt_by_form(prior: GaussianMixture, form: QuadraticForm, scale: Array) -> Tilt:
    """`tilt` for a reward given by its coefficients."""
    check_mass(prior, form, scale)
    return _tilt_by_form(prior, form, scale)


@eqx.filter_jit
def _tilt_by_form(prior: GaussianMixture, form: QuadraticForm, scale: Array) -> Tilt:
    prior = prior.decomposed()
    eye = jnp.eye(prior.dim, dtype=prior.means.dtype)

    def component(log_weight: Array, mean: Array, axes: Array, cov: Array) -> tuple:
        # In the eigenbasis of S, I + 2 scale S H is positive definite up to a scaling of its rows
        # and columns.
        matrix = axes.T @ form.matrix @ axes
        gradient, offset = axes.T @ form.gradient, axes.T @ (mean - form.center)
        inverse, half_logdet = _linalg.solve(eye + 2 * scale * cov @ matrix, eye)
        moved = inverse @ offset
        tilted = inverse @ cov
        tilted = (tilted + tilted.T) / 2
        log_weight = log_weight - half_logdet - scale * offset @ matrix @ moved
        log_weight = log_weight + scale * gradient @ (moved + scale * tilted @ gradient / 2)
        mean = form.center + axes @ (moved + scale * tilted @ gradient)
        return log_weight, mean, axes @ tilted @ axes.T

    axes, _, rotated, _ = prior.spectrum
    parts = prior.log_weights, prior.means, axes, rotated
    log_weights, means, covs = jax.vmap(component)(*parts)
    mixture = prior.replace(log_weights, means, covs)
    return Tilt(mixture, jax.nn.logsumexp(log_weights) + scale * form.value)


def check_mass(prior: GaussianMixture, form: QuadraticForm, scale: Array) -> None:
    """Raise a `ValueError` if the tilt has no finite mass."""
    if not _checks.concrete((prior, form, scale)):
        return
    matrices = np.eye(prior.dim) + 2 * float(scale) * np.asarray(prior.covs) @ np.asarray(
        form.matrix
    )
    smallest = np.linalg.eigvals(matrices).real.min(axis=1)
    if np.any(smallest <= 0):
        k = int(np.argmin(smallest))
        raise ValueError(
            f"the tilt has no finite mass: I + 2 scale S H has the eigenvalue {smallest[k]:g} for "
            f"component {k}, and all eigenvalues must be positive. Lower the scale (got "
            f"{float(scale):g}) or bound the reward."
        )


class LogH(_repr.Printable):
    """`log h` as a function of `(t, x)`; built by `log_h`."""

    prior: GaussianMixture
    reward: rewards.Reward
    scale: Array
    interpolant: Interpolant

    def __call__(self, t: Array, x: Array) -> Array:
        law = decomposed(_pytree.cast(self, x.dtype))
        posterior = law.prior.condition(law.interpolant.alpha(t), law.interpolant.sigma(t), x)
        if is_quadratic(law.reward):
            return tilt(posterior, law.reward, law.scale).log_norm
        if isinstance(law.reward, rewards.StepReward):
            return _log_h_step(posterior, law.reward, law.scale)
        return quadrature.log_norm(posterior, law.reward, law.scale)


def _log_h_step(posterior: GaussianMixture, reward: rewards.StepReward, scale: Array) -> Array:
    # <n, X> is Gaussian in each component: log(P(above) + exp(-scale height) P(below)).
    mean = posterior.means @ reward.normal - reward.offset
    std = jnp.sqrt(jnp.einsum("i,kij,j->k", reward.normal, posterior.covs, reward.normal))
    z = mean / jnp.where(std > 0, std, 1.0)
    z = jnp.where(std > 0, z, jnp.where(mean >= 0, jnp.inf, -jnp.inf))
    above, below = (
        jax.scipy.special.log_ndtr(z),
        jax.scipy.special.log_ndtr(-z) - scale * reward.height,
    )
    return jax.nn.logsumexp(posterior.log_weights + jnp.logaddexp(above, below))


def log_h(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array,
    interpolant: Interpolant | None = None,
) -> LogH:
    """`log h` for a mixture prior, as a function `(t, x) -> scalar` that `tiltjax.Doob` takes.

    Quadratic rewards and `StepReward` have a closed form. Any other reward needs one or two
    dimensions, and uses Gaussian quadrature around each component of the posterior
    (`theory.quadrature.log_norm`).

    **Raises:** `ValueError` for a reward without a closed form in more than two dimensions, and for
    a reward that the quadrature does not resolve.
    """
    check_mixture(prior, "prior")
    reward = rewards.as_reward(reward)
    closed = is_quadratic(reward) or isinstance(reward, rewards.StepReward)
    if not closed and prior.dim > 2:
        raise ValueError(
            f"log h has no closed form for {type(reward).__name__}, and quadrature covers one or "
            f"two dimensions, not {prior.dim}. Use PlugIn with many draws, or Laplace."
        )
    scale = _checks.nonnegative(scale, "scale")
    if not closed and _checks.concrete((prior, reward, scale)):
        _check_resolution(prior, reward, scale)
    return LogH(prior, reward, scale, or_linear(interpolant))


def _check_resolution(prior: GaussianMixture, reward: rewards.Reward, scale: Array) -> None:
    # The prior is the widest posterior: nodes that resolve it resolve the posterior at every time.
    r, scale = _pytree.cast((reward, scale), prior.means.dtype)
    nodes = (401, 41)[prior.dim - 1]
    usual, fine = (
        float(quadrature.log_norm(prior, r, scale, nodes=n)) for n in (nodes, 2 * nodes - 1)
    )
    if not abs(usual - fine) < 1e-3:
        raise ValueError(
            f"quadrature does not resolve this reward at scale {float(scale):g}: log h changes "
            f"from {usual:.6g} to {fine:.6g} with twice the nodes. Lower the scale."
        )


def marginal(
    mixture: GaussianMixture, t: float | Array, interpolant: Interpolant | None = None
) -> GaussianMixture:
    """The law of `alpha_t X_1 + sigma_t X_0` for `X_1` from `mixture`. If `mixture` is a tilt,
    the law is the tilted marginal `p_t h_t / Z`.

    **Raises:** `ValueError` for a t outside [0, 1].
    """
    check_mixture(mixture, "mixture")
    interpolant = or_linear(interpolant)
    t = _checks.in_range(t, "t", 0, 1).astype(mixture.means.dtype)
    alpha, sigma = interpolant.alpha(t), interpolant.sigma(t)
    noise = sigma**2 * jnp.eye(mixture.dim, dtype=mixture.means.dtype)
    return mixture.replace(
        mixture.log_weights, alpha * mixture.means, alpha**2 * mixture.covs + noise[None]
    )


def thermodynamic_integral(
    expected_reward: Callable[[Array], Array],
    scale: float | Array,
    *,
    nodes: int = 32,
    start: float | Array = 0.0,
) -> Array:
    """`log Z(scale) - log Z(start)`, where `log Z(0) = 0`, by Gauss-Legendre quadrature of
    `expected_reward(l) = E_l[r]`.

    `expected_reward` takes one scale and is traced once. Examples are
    `lambda l: theory.expected_reward(theory.tilt(prior, reward, l).mixture, reward)` and
    `theory.quadrature.tilt(prior, reward, l).expect(reward)`. For a smooth `E_l[r]` the error
    decreases geometrically in `nodes`; double `nodes` to estimate it. For strong tilts
    (`scale * variance` in the hundreds) `E_l[r]` varies most near 0: integrate in pieces, with
    `start`. The result is differentiable in `scale` (the derivative is `E_scale[r]`) and through
    `expected_reward`.

    **Raises:** `ValueError` for a scale or a start that is negative or not finite, for `nodes < 1`,
    and for an `expected_reward` that does not return one number.
    """
    _checks.function(expected_reward, "expected_reward")
    end = _checks.nonnegative(scale, "scale")
    begin = _checks.nonnegative(start, "start").astype(end.dtype)
    node, weight = np.polynomial.legendre.leggauss(_checks.count(nodes, "nodes"))
    width = end - begin
    scales = begin + width * jnp.asarray((1 + node) / 2, end.dtype)
    # One scale at a time: quadrature in the plane then holds one grid in memory.
    values = jax.lax.map(expected_reward, scales)
    if values.shape != (len(node),):
        raise ValueError(
            f"expected_reward must return one number for one scale, got shape {values.shape[1:]}"
        )
    return width * (jnp.asarray(weight / 2, values.dtype) @ values).astype(width.dtype)


class LogNorm(NamedTuple):
    """`log Z` from measured mean rewards: the estimate `value`, the bounds `lower` and `upper`, and
    the standard error of each.

    `value` is the trapezoidal rule, the mean of the two bounds. Without noise, `log Z` is in
    `[lower, upper]`. With noise, widen this interval by the standard errors of the bounds.
    """

    value: Array
    lower: Array
    upper: Array
    error: Array
    lower_error: Array
    upper_error: Array


def thermodynamic_bracket(
    scales: Array, expected_rewards: Array, standard_errors: Array | None = None
) -> LogNorm:
    """`log Z(scales[-1]) - log Z(scales[0])` and bounds of it, from mean rewards measured at
    increasing scales.

    **Arguments:** `scales` `(n,)`, n >= 2, increasing (from 0 for `log Z` itself);
    `expected_rewards` `(n,)`, the mean rewards of the tilt at each scale, from independent runs;
    `standard_errors` `(n,)` of the mean rewards, None for exact values.

    **Raises:** `ValueError` for shapes that disagree, scales that do not increase, negative errors,
    and mean rewards that decrease by more than five standard errors (exact values: by more than
    rounding). The mean reward of a tilt never decreases in the scale, so a decrease shows a
    sampler's bias.
    """
    scales = _checks.finite(scales, "scales", 1)
    values = _checks.finite(expected_rewards, "expected_rewards", 1).astype(scales.dtype)
    errors = (
        jnp.zeros_like(values)
        if standard_errors is None
        else _checks.finite(standard_errors, "standard_errors", 1)
    )
    errors = errors.astype(scales.dtype)
    if len(scales) < 2 or not scales.shape == values.shape == errors.shape:
        raise ValueError(
            "pass at least two scales, and one mean reward and error for each scale, got shapes "
            f"{scales.shape}, {values.shape} and {errors.shape}"
        )
    _check_measurements(scales, values, errors)
    steps = jnp.diff(scales)
    zero = jnp.zeros((1,), steps.dtype)
    left, right = jnp.concatenate([steps, zero]), jnp.concatenate([zero, steps])
    rules = jnp.stack([(left + right) / 2, left, right])
    sums, spreads = rules @ values, jnp.sqrt(rules**2 @ errors**2)
    return LogNorm(*sums, *spreads)


def _check_measurements(scales: Array, values: Array, errors: Array) -> None:
    if not _checks.concrete((scales, values, errors)):
        return
    scale, value, error = (np.asarray(part, np.float64) for part in (scales, values, errors))
    if np.any(np.diff(scale) <= 0) or scale[0] < 0:
        raise ValueError(f"scales must increase, and start at 0 or above, got {scale}")
    if np.any(error < 0):
        raise ValueError(f"standard errors must not be negative, got {error}")
    allowed = (
        5 * np.hypot(error[1:], error[:-1]) + 1e3 * np.finfo(scales.dtype).eps * np.abs(value).max()
    )
    fall = -np.diff(value) - allowed
    if np.any(fall > 0):
        i = int(np.argmax(fall))
        raise ValueError(
            f"the mean reward falls from {value[i]:g} at scale {scale[i]:g} to {value[i + 1]:g} at "
            f"{scale[i + 1]:g}, by more than its standard errors allow. The mean reward of a tilt "
            "never falls: the sampler is biased, or the standard errors are too small."
        )
