r"""The laws that guided samplers produce, computed without running the samplers.

The prior is Gaussian, `N(mu, S)`, the reward is quadratic with matrix H, and `alpha_0 = 0`. In each
common eigen-direction of S and H, let s be the standard deviation, h the curvature,
`a = scale h s^2`, and y the reward's maximizer, measured from mu:

| method | mean | standard deviation |
|---|---|---|
| the tilt | `2a / (1 + 2a) y` | `s / sqrt(1 + 2a)` |
| plug-in, k = 1, and DPS | `2 sqrt(a) F(sqrt(a)) y` (F: Dawson's integral) | `s exp(-a)` |
| damped plug-in of the right width | the tilt | the tilt |
| the diffusion, plug-in, k = 1 | `(1 - exp(-2a)) y` | `s sqrt((1 - exp(-4a)) / (4a))` |
| FMRG | `(1 - exp(-q)) y`, `q = 2 a ∫ dt / (sigma_t^2 + alpha_t^2 s^2)` | `s exp(-q)` |

Where S and H do not commute, there is no closed form, and `theory._moments` solves a linear
differential equation; the functions of this module choose the method. These are the laws in the
limit of small steps, where the noise of fresh draws averages out. `discrete_law` is the law at any
number of steps.

**Derivation.** Let `u = x / sqrt(Var X_t)`, and let the clock be the posterior variance v, which
decreases from `s^2` to 0. For any interpolant the mean guidance gives
`du/dv = lambda(v) h (u - y / (s sqrt(1 - v/s^2)))`. Hence the standard deviation is
`s exp(-h ∫ lambda dv)` and the mean is `y h ∫ lambda(v) exp(-h ∫_0^v lambda) dv / sqrt(1 - v/s^2)`.
A constant lambda gives Dawson's integral, and `lambda = scale / (1 + 2 scale v)` gives the tilt.
Source of the theorem and of the overshoot: Dandapanthula and Boffi (arXiv 2606.02884).
"""

from collections.abc import Callable
from typing import Literal, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from theory import _moments, quadrature
from theory.distances import overlap
from theory.many_draws import DrawsLaw, check_strength, draws_law
from theory.tilts import QuadraticForm, quadratic_form
from tiltjax import _checks, _pytree, rewards, scales
from tiltjax.interpolants import VE, Interpolant, Linear, or_linear
from tiltjax.mixtures import GaussianMixture, check_mixture

_W, _ONE_MINUS_W, _WEIGHTS = quadrature.unit_interval()
_MAX_OVERLAP = 0.05  # above this overlap, components are too close to be treated one by one


@overload
def plug_in_law(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array | scales.Scale,
    *,
    k: Literal[1] = 1,
) -> GaussianMixture:
    """One draw gives a Gaussian law."""


@overload
def plug_in_law(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array | scales.Scale, *, k: int
) -> GaussianMixture | DrawsLaw:
    """More than one draw gives a `DrawsLaw`."""


def plug_in_law(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array | scales.Scale,
    *,
    k: int = 1,
) -> GaussianMixture | DrawsLaw:
    """The law of the plug-in guided flow with k fresh posterior draws, on an interpolant with
    `alpha_0 = 0`.

    **One draw** (k = 1). The law is Gaussian in each component, a `GaussianMixture`. `scale` is a
    number or the scale law of the guidance: `Damped(scale, sigma)` with any sigma. For one Gaussian
    and a quadratic reward this is also the law of DPS.

    The error of a wrong sigma, for `tiltjax.problems.gaussian` (s^2 = 1/2, scale 3, maximizer at
    2.5; the tilt has mean 1.875 and spread .354):
    the tilt is mean 1.875, spread .354):

    | sigma / s | mean | spread | W2 to the tilt |
    |---|---|---|---|
    | 0 (no damping) | 3.073 | .158 | 1.229 |
    | 0.5 | 2.550 | .262 | .687 |
    | 0.7 | 2.232 | .308 | .363 |
    | 1 | 1.875 | .354 | 0 |
    | 1.4 | 1.599 | .386 | .280 |
    | 2 | 1.403 | .409 | .479 |

    **More draws** (k > 1). The law is not Gaussian; it is a `DrawsLaw`, with the same `mean`,
    `cov`, `sample` and `log_prob`, a `quantile` and an `error`. It needs one Gaussian (isotropic in
    more than one dimension), a reward `-h |x - y|^2` plus a linear reward, and a constant scale
    with `scale h s^2 <= 1e4`. The cost does not depend on k.

    **Mixtures** (k = 1). The law assumes a **frozen component**: the draws of `X_1` stay in one
    component as x moves. Then each component's law is exact and the prior's weights do not change.
    The assumption holds in the limit of far modes at a fixed number of steps. In reality, fresh
    draws also move particles between modes, by rare and large steps of the drift. Runs with few
    steps miss these events and runs with many steps meet them; on the line, `mean_drift_law` is the
    limit of many steps. For overlapping components the law of one component is not defined: a
    `UserWarning` is given above an `overlap` of .05 (modes closer than 4.9 standard deviations).

    The result is accurate to rounding where S and H commute, and to 1e-10 of the prior's spread
    elsewhere (`theory._moments`).

    **Raises:** `ValueError` for other priors and scales than these, for a reward that is not
    quadratic, and for a reward that is convex in some direction; `TypeError` for a k that is not an
    integer.
    """
    check_mixture(prior, "prior")
    law = _pytree.cast(scales.as_scale(scale), prior.means.dtype)
    if _checks.count(k, "k") > 1:
        return draws_law(*draws_parameters(prior, reward, law, k), k)

    direction = Partial(_plug_in_direction, law)
    return _law(
        prior, reward, law.final, direction, lambda form: _moments.plug_in_moments(prior, form, law)
    )


def _plug_in_direction(law: scales.Scale, s2: Array, h: Array) -> tuple[Array, Array, Array]:
    strength, integral, total = _clock(law, s2)
    response = 2 * s2 * jnp.sum(jnp.asarray(_WEIGHTS, s2.dtype) * strength * jnp.exp(-h * integral))
    return response, s2 * jnp.exp(-2 * h * total), jnp.zeros_like(s2)


def sde_law(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array | scales.Scale
) -> GaussianMixture:
    """The law of plug-in guidance of the memoryless diffusion (`Ancestral(1)`), k = 1, in the limit
    of small steps.

    In the clock `tau = s^2 - v` the posterior mean m follows
    `dm = -2 lambda h (m - y) dtau + dW_tau`. A constant scale gives the mean `(1 - e^{-2a}) y` and
    the variance `(1 - e^{-4a}) / (4 scale h)`: the diffusion does not overshoot, unlike the flow.
    The right damping again gives the tilt.

    **Arguments:** and **Raises:** as `plug_in_law` with k = 1, also for mixtures.
    """
    check_mixture(prior, "prior")
    law = _pytree.cast(scales.as_scale(scale), prior.means.dtype)

    direction = Partial(_sde_direction, law)
    return _law(
        prior, reward, law.final, direction, lambda form: _moments.sde_moments(prior, form, law)
    )


def _sde_direction(law: scales.Scale, s2: Array, h: Array) -> tuple[Array, Array, Array]:
    _, integral, total = _clock(law, s2)
    # dv = 2 s^2 w dw.
    variance = 2 * s2 * jnp.sum(jnp.asarray(_WEIGHTS * _W, s2.dtype) * jnp.exp(-4 * h * integral))
    return 2 * total * _relative(2 * h * total), variance, jnp.zeros_like(s2)


def _clock(law: scales.Scale, s2: Array) -> tuple[Array, Array, Array]:
    """`lambda(v)` and `∫_0^v lambda` on the nodes w, where `v = s^2 (1 - w^2)`, and the integral at
    `v = s^2`.
    """
    final = law.final
    fraction = jnp.asarray(_ONE_MINUS_W * (1 + _W), s2.dtype)  # v / s^2 = 1 - w^2
    v = s2 * fraction
    if isinstance(law, scales.Constant):
        return final * jnp.ones_like(v), final * v, final * s2
    if not isinstance(law, scales.Damped):
        raise ValueError(
            f"the scale law {type(law).__name__} has no closed form: use a number or Damped"
        )
    # The damping's own variance is v / (1 + beta v), with beta = 1/sigma^2 - 1/s^2. With gamma =
    # beta + 2 scale, the scale law is scale (1 + beta v) / (1 + gamma v), and its integral needs
    # (z - log(1 + z)) / z^2 at z = gamma v.
    width = jnp.maximum(law.sigma**2, jnp.finfo(s2.dtype).eps * s2)
    beta_v = (s2 / width - 1) * fraction
    strength = final * (1 + beta_v) / (1 + beta_v + 2 * final * v)
    integral = final * (v - 2 * final * v**2 * _log_remainder(beta_v + 2 * final * v))
    total = final * (s2 - 2 * final * s2**2 * _log_remainder(s2 / width - 1 + 2 * final * s2))
    return strength, integral, total


def fmrg_law(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array,
    interpolant: Interpolant | None = None,
) -> GaussianMixture:
    """The law of flow-map reward guidance, `dx/dt = b + scale ∇ r(X_{t,1}(x))`, with the exact flow
    map.

    Let s be the standard deviation of the prior, h the curvature of the reward and y its maximizer,
    measured from the prior's mean. The mean of the law is then `(1 - exp(-q)) y`, and the standard
    deviation is `s exp(-q)`. The exponent q is `pi scale h s / c_0` for `Linear(c_0)`. For any
    other interpolant, q is computed by quadrature.

    The law is the limit of small steps, with the exact flow map. With the 20 inner steps that
    `fmrg` takes by default, the standard deviation of samples is larger by 1.5% at q = .8 and by 6%
    at q = 2.6, for any number of outer steps. `discrete_law(fmrg_field(...))` is the law at any
    numbers of outer and inner steps.

    A run starts from the unguided `alpha_0 D(x) + x`, `x ~ N(0, sigma_0^2 I)`, as in
    `tiltjax.sample`. For `alpha_0 > 0` (`VP`, `DiscreteVP`) this is not exactly the law of `X_0`.
    The flow map then carries the start not to the prior but, with
    `F = s / sqrt(alpha_0^2 s^2 + sigma_0^2)`, to
    `N((1 - alpha_0^3 F^3) mu, sigma_0^2 F^2 (1 + alpha_0^2 F^2)^2)`. The mean changes by
    `-alpha_0^3 F^3 exp(-q) mu`, and the variance is `sigma_0^2 F^2 (1 + alpha_0^2 F^2)^2 exp(-2q)`.

    With `DiscreteVP` the law is that of the interpolant's continuous clock, between levels and from
    level 0 to t = 1. A run visits the N levels and jumps from level 0, so its law differs by O(1 /
    N), as for any run with N steps.

    For mixtures, see `plug_in_law`.

    **Raises:** as `plug_in_law`; `ValueError` for `VE`, whose runs jump to t = 1 from an early
    time, and so leave out a part of this guidance.
    """
    check_mixture(prior, "prior")
    interpolant = _pytree.cast(or_linear(interpolant), prior.means.dtype)
    if isinstance(interpolant, VE):
        raise ValueError(
            "a run on VE jumps to t = 1 from the level sigma_min, which leaves out the end of "
            "flow-map guidance, so fmrg_law does not hold for VE: use "
            "theory.run_law(..., theory.FlowMapEnd(), interpolant=), the law after N steps"
        )
    scale = _checks.nonnegative(scale, "scale").astype(prior.means.dtype)

    direction = Partial(_fmrg_direction, interpolant, scale)
    return _law(
        prior,
        reward,
        scale,
        direction,
        lambda form: _moments.fmrg_moments(prior, form, scale, interpolant),
    )


def _fmrg_direction(
    interpolant: Interpolant, scale: Array, s2: Array, h: Array
) -> tuple[Array, Array, Array]:
    if isinstance(interpolant, Linear):
        clock = jnp.pi / 2 * jnp.sqrt(s2) / interpolant.base_scale
    else:
        times = jnp.asarray(_W, s2.dtype)
        variance = (
            jax.vmap(interpolant.sigma)(times) ** 2 + jax.vmap(interpolant.alpha)(times) ** 2 * s2
        )
        clock = s2 * jnp.sum(jnp.asarray(_WEIGHTS, s2.dtype) / variance)
    exponent = 2 * scale * h * clock
    alpha, sigma = interpolant.alpha(jnp.zeros_like(s2)), interpolant.sigma(jnp.zeros_like(s2))
    image = s2 / (alpha**2 * s2 + sigma**2)
    snr = alpha**2 * image
    lost = alpha**3 * image * jnp.sqrt(image) * jnp.exp(-exponent)
    spread = sigma**2 * image * (1 + snr) ** 2 * jnp.exp(-2 * exponent)
    return 2 * scale * clock * _relative(exponent), spread, lost


def _law(
    prior: GaussianMixture,
    reward: rewards.Reward,
    final: Array,
    direction: Callable[[Array, Array], tuple[Array, Array, Array]],
    general: Callable[[QuadraticForm], GaussianMixture],
) -> GaussianMixture:
    """The closed form, by its action in each common eigen-direction, if S and H are known to
    commute, and `general` otherwise.

    A traced matrix is known to commute in one dimension, and with a concrete multiple of the
    identity. `general` is right whether or not the matrices commute, has all derivatives, and costs
    milliseconds.
    """
    form = _pytree.cast(quadratic_form(rewards.as_reward(reward), prior.dim), prior.means.dtype)
    check_domain(prior, form, final)
    _warn_of_overlap(prior)
    if commute(prior.covs, form.matrix):
        return _per_direction(prior, form, direction)
    return general(form)


def commute(covs: Array, matrix: Array) -> bool:
    """Whether every covariance is known to commute with the matrix, for all values of the traced
    arrays.
    """
    if len(matrix) == 1:
        return True

    def isotropic(matrices: Array) -> bool:
        if not _checks.concrete(matrices):
            return False
        values = np.asarray(matrices)
        return np.array_equal(values, values[..., :1, :1] * np.eye(values.shape[-1]))

    if isotropic(covs) or isotropic(matrix):
        return True
    if not _checks.concrete((covs, matrix)):
        return False
    covs_, matrix_ = np.asarray(covs, np.float64), np.asarray(matrix, np.float64)
    excess = np.abs(covs_ @ matrix_ - matrix_ @ covs_).max()
    rounding = 100 * len(matrix_) * np.finfo(covs.dtype).eps
    return bool(excess <= rounding * np.abs(covs_).max() * np.abs(matrix_).max())


@eqx.filter_jit
def _per_direction(
    prior: GaussianMixture,
    form: QuadraticForm,
    direction: Callable[[Array, Array], tuple[Array, Array, Array]],
) -> GaussianMixture:
    """The law from its action in each common eigen-direction, for matrices that commute.

    `direction(s^2, h)` gives the mean per unit of `h (y - mu) + g / 2`, the variance, and the loss
    of the mean per unit of mu.

    First derivatives by a matrix are right in every direction in which the two matrices keep
    commuting, also for equal eigenvalues: eigenvectors are held constant, and the effect of their
    rotation is given by divided differences (Daleckii and Krein). No other directions occur,
    because a traced matrix comes here only if the other matrix is a multiple of the identity
    (`commute`).
    """

    def law(s2: Array, h: Array) -> tuple[Array, Array, Array]:
        # A direction of zero variance does not move; the formulas would divide by its variance.
        parts = jax.vmap(direction)(jnp.where(s2 > 0, s2, 1.0), h)
        return jax.tree.map(lambda part: jnp.where(s2 > 0, part, 0.0), parts)

    def component(mean: Array, cov: Array) -> tuple[Array, Array]:
        axes = common_axes(jax.lax.stop_gradient(cov), jax.lax.stop_gradient(form.matrix))
        rotated = axes.T @ cov @ axes, axes.T @ form.matrix @ axes
        s2, h = jnp.maximum(jnp.diagonal(rotated[0]), 0), jnp.diagonal(rotated[1])
        values = law(s2, h)
        slopes = jax.lax.stop_gradient(_divided_differences(law, s2, h))
        response, spread, lost = (
            jnp.diag(value)
            + by_cov * _off_diagonal(rotated[0])
            + by_matrix * _off_diagonal(rotated[1])
            for value, by_cov, by_matrix in zip(values, *slopes, strict=True)
        )
        half_gradient = axes.T @ (form.matrix @ (form.center - mean) + form.gradient / 2)
        shift = response @ half_gradient - lost @ (axes.T @ mean)
        return mean + axes @ shift, axes @ spread @ axes.T

    means, covs = jax.vmap(component)(prior.means, prior.covs)
    return prior.replace(prior.log_weights, means, covs)


def common_axes(cov: Array, matrix: Array) -> Array:
    """A basis, in columns, that diagonalizes two commuting matrices: the eigenvectors of a generic
    combination.
    """
    norm = lambda matrix: jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.finfo(matrix.dtype).tiny)
    return jnp.linalg.eigh(cov / norm(cov) + matrix / norm(matrix) / jnp.pi)[1]


def _divided_differences(
    law: Callable, s2: Array, h: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """`(f_i - f_j) / (s_i^2 - s_j^2)` of each value of `law` where `h_i = h_j`, else 0, and the
    same with s^2 and h exchanged.
    """
    values = law(s2, h)
    _, by_cov = jax.jvp(lambda s2: law(s2, h), (s2,), (jnp.ones_like(s2),))
    _, by_matrix = jax.jvp(lambda h: law(s2, h), (h,), (jnp.ones_like(h),))
    tolerance = jnp.sqrt(jnp.finfo(s2.dtype).eps)

    def close(x: Array) -> tuple[Array, Array]:
        gap = x[:, None] - x[None]
        return gap, jnp.abs(gap) <= tolerance * jnp.max(jnp.abs(x))

    def ratios(x: Array, other: Array, slopes: tuple[Array, ...]) -> tuple[Array, ...]:
        (gap, same), equal = close(x), close(other)[1]
        quotient = lambda f: (f[:, None] - f[None]) / jnp.where(same, 1.0, gap)
        mean = lambda slope: (slope[:, None] + slope[None]) / 2
        parts = zip(values, slopes, strict=True)
        return tuple(
            jnp.where(equal, jnp.where(same, mean(slope), quotient(f)), 0.0) for f, slope in parts
        )

    return ratios(s2, h, by_cov), ratios(h, s2, by_matrix)


def _off_diagonal(matrix: Array) -> Array:
    """The off-diagonal part: zero up to rounding, with nonzero derivatives."""
    return (
        matrix
        - jax.lax.stop_gradient(matrix)
        - jnp.diag(jnp.diagonal(matrix - jax.lax.stop_gradient(matrix)))
    )


def check_domain(prior: GaussianMixture, form: QuadraticForm, final: Array) -> None:
    """Raise a `ValueError` for convex rewards and for scales beyond the quadrature."""
    if not _checks.concrete((prior, form, final)):
        return
    covs, matrix = np.asarray(prior.covs, np.float64), np.asarray(form.matrix, np.float64)
    lowest = np.linalg.eigvalsh(matrix).min()
    if lowest < -1e-6 * np.abs(matrix).max():
        raise ValueError(
            f"this law needs a concave reward, but H has the eigenvalue {lowest:g}. Use "
            "discrete_law instead."
        )
    strength = np.abs(covs).max() * np.abs(matrix).max() * float(np.asarray(final))
    if not strength < 1e6:
        raise ValueError(
            f"scale * h * s^2 = {strength:.3g} is beyond the range of the quadrature (1e6), where "
            "the law is almost a point: lower the scale"
        )


def _warn_of_overlap(prior: GaussianMixture) -> None:
    if not _checks.concrete(prior):
        return
    coefficient = overlap(prior)
    if coefficient > _MAX_OVERLAP:
        _checks.warn(
            "this law treats each component separately and keeps the prior's weights, but the "
            f"components overlap by {coefficient:.3f} (theory.overlap; at most {_MAX_OVERLAP:g} is "
            "small). Use theory.flow_law, or theory.mean_drift_law on the line."
        )


def _relative(x: Array) -> Array:
    """`(1 - e^-x) / x`, which is 1 at 0."""
    small = jnp.abs(x) < 1e-5
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1 - x / 2 + x**2 / 6, -jnp.expm1(-safe) / safe)


def _log_remainder(z: Array) -> Array:
    """`(z - log(1 + z)) / z^2`, which is 1/2 at 0."""
    small = jnp.abs(z) < 1e-2
    safe = jnp.where(small, 1.0, z)
    series = sum((-z) ** n / (n + 2) for n in range(8))
    return jnp.where(small, series, (safe - jnp.log1p(safe)) / safe**2)


def draws_parameters(
    prior: GaussianMixture, reward: rewards.Reward, law: scales.Scale, k: int
) -> tuple[Array, Array, Array, Array]:
    """The arguments `(center, variance, target, strength)` of `draws_law`.

    **Raises:** `ValueError` where the law of k > 1 draws is not known.
    """
    if not isinstance(law, scales.Constant):
        raise ValueError(
            f"the law of k = {k} draws is known only for a constant scale, got "
            f"{type(law).__name__}. Pass a number, use k=1 (which takes any Damped), or simulate: "
            f"tiltjax.sample with PlugIn(..., k={k})."
        )
    if len(prior.log_weights) != 1:
        raise ValueError(
            f"the law of k = {k} draws is known only for one Gaussian, got a mixture of "
            f"{len(prior.log_weights)} components. Pass one component, "
            "GaussianMixture([1.0], means[i][None], covs[i][None]), use k=1, or simulate: "
            f"tiltjax.sample with PlugIn(..., k={k})."
        )
    form = _pytree.cast(quadratic_form(rewards.as_reward(reward), prior.dim), prior.means.dtype)
    mean, cov = prior.means[0], prior.covs[0]
    if _checks.concrete((cov, form.matrix)):
        for name, matrix in (("covariance", cov), ("reward's matrix H", form.matrix)):
            matrix = np.asarray(matrix, np.float64)
            excess = np.abs(matrix - matrix[0, 0] * np.eye(prior.dim)).max()
            if excess > 1e-6 * np.abs(matrix).max():
                raise ValueError(
                    f"the law of k = {k} draws needs an isotropic {name}, got {matrix.tolist()}, "
                    "because the weights of the draws depend on their lengths and couple the "
                    "directions. Use k=1, which takes any matrix, or simulate: tiltjax.sample with "
                    f"PlugIn(..., k={k})."
                )
    variance, h = jnp.trace(cov) / prior.dim, jnp.trace(form.matrix) / prior.dim
    strength = law.final * h * variance
    target = form.center + form.gradient / (2 * jnp.where(h == 0, 1.0, h))
    check_strength(variance, strength, k)
    return mean, variance, target, strength
