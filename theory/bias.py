r"""What guided samplers really produce: laws of the guided flow, before it runs.

For a Gaussian prior `N(mu, S)` and a quadratic reward with H, in the common eigen-directions of S and H (standard deviation s,
curvature h, `a = scale h s^2`), measured from mu, with y the reward's maximiser:

| method | mean | standard deviation |
|---|---|---|
| the tilt | `2a / (1 + 2a) y` | `s / sqrt(1 + 2a)` |
| plug-in, k = 1, and DPS | `2 sqrt(a) F(sqrt(a)) y` (F: Dawson's integral) | `s exp(-a)` |
| damped plug-in of the right width | the tilt | the tilt |
| FMRG | `(1 - exp(-q)) y`, `q = 2 a ∫ dt / (sigma_t^2 + alpha_t^2 s^2)` | `s exp(-q)` |

These are the laws in the limit of small steps, where fresh draws average out; `discrete_law` is the law at any number of steps.

**Derivation.** With `u = x / sqrt(Var X_t)` and the posterior variance v as clock, running from `s^2` down to 0, the mean guidance
gives `du/dv = lambda(v) h (u - y / (s sqrt(1 - v/s^2)))` for any interpolant. So the spread is `s exp(-h ∫ lambda dv)` and the mean
`y h ∫ lambda(v) exp(-h ∫_0^v lambda) dv / sqrt(1 - v/s^2)`; a constant lambda gives Dawson's integral, and
`lambda = scale / (1 + 2 scale v)` the tilt. Theorem and overshoot: Dandapanthula and Boffi (arXiv 2606.02884).
"""

from collections.abc import Callable
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory import quadrature
from theory.draws import DrawsLaw, draws_law
from theory.tilts import QuadraticForm, quadratic_form
from tiltjax import inputs, rewards, scales
from tiltjax.interpolants import Interpolant, Linear
from tiltjax.mixtures import GaussianMixture

_W, _ONE_MINUS_W, _WEIGHTS = quadrature.unit_interval()


@overload
def plug_in_law(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array | scales.Scale, *, k: Literal[1] = 1
) -> GaussianMixture: ...


@overload
def plug_in_law(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array | scales.Scale, *, k: int
) -> GaussianMixture | DrawsLaw: ...


def plug_in_law(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array | scales.Scale, *, k: int = 1
) -> GaussianMixture | DrawsLaw:
    """The law of the plug-in guided flow with k fresh posterior draws.

    With k = 1 it is Gaussian, and comes back as a `GaussianMixture`. `scale` is then a number or the law that the guidance was given:
    `Damped(scale, sigma)` with any sigma, right or wrong. For one Gaussian and a quadratic reward this is also the law of DPS.

    With k > 1 it is not Gaussian, and comes back as a `DrawsLaw`, which has the same `mean`, `cov`, `sample` and `log_prob`, `quantile`
    and an `error`: for one Gaussian, isotropic if in more than one dimension, a reward `-h |x - y|^2` (plus a linear one), and a
    constant scale, `scale h s^2 <= 1e4`. The cost does not depend on k.

    For a mixture (k = 1) the law of each component is exact and the prior's weights are kept: what happens if the draws of `X_1` stay in
    one component as x moves, or in the limit of far modes at a fixed number of steps. It ignores the push that draws receive where
    two modes compete, so it says nothing of masses between near modes.

    **Raises:** `ValueError` outside of these, for a reward that is not quadratic, or one that is convex along a direction.
    """
    law = inputs.cast(scales.as_scale(scale), prior.means.dtype)
    if inputs.count(k, "k") > 1:
        return _draws(prior, reward, law, k)
    final = law.final

    def direction(s2: Array, h: Array) -> tuple[Array, Array]:
        fraction = jnp.asarray(_ONE_MINUS_W * (1 + _W), s2.dtype)  # v / s^2 = 1 - w^2
        v = s2 * fraction
        if isinstance(law, scales.Constant):
            local, spent, total = final, final * v, final * s2
        elif isinstance(law, scales.Damped):
            # The damping's own variance is v / (1 + beta v) with beta = 1/sigma^2 - 1/s^2. With gamma = beta + 2 scale the law is
            # scale (1 + beta v) / (1 + gamma v), whose integral needs (z - log(1 + z)) / z^2 at z = gamma v.
            width = jnp.maximum(law.sigma**2, jnp.finfo(s2.dtype).eps * s2)
            beta_v = (s2 / width - 1) * fraction
            local = final * (1 + beta_v) / (1 + beta_v + 2 * final * v)
            spent = final * (v - 2 * final * v**2 * _log_remainder(beta_v + 2 * final * v))
            total = final * (s2 - 2 * final * s2**2 * _log_remainder(s2 / width - 1 + 2 * final * s2))
        else:
            raise ValueError(f"no closed form for the scale law {type(law).__name__}: Constant and Damped have one")
        response = 2 * s2 * jnp.sum(jnp.asarray(_WEIGHTS, s2.dtype) * local * jnp.exp(-h * spent))
        return response, jnp.exp(-h * total)

    return _per_direction(prior, reward, final, direction)


def fmrg_law(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array, interpolant: Interpolant | None = None
) -> GaussianMixture:
    """The law of flow-map reward guidance, `dx/dt = b + scale ∇ r(X_{t,1}(x))`, with the exact flow map.

    The exponent is `pi scale h s / c_0` for `Linear(c_0)`, by quadrature for any other interpolant. For a mixture: as in
    `plug_in_law`. **Raises:** as `plug_in_law`.
    """
    interpolant = Linear() if interpolant is None else interpolant
    scale = inputs.nonnegative(scale, "scale").astype(prior.means.dtype)

    def direction(s2: Array, h: Array) -> tuple[Array, Array]:
        if isinstance(interpolant, Linear):
            clock = jnp.pi / 2 * jnp.sqrt(s2) / interpolant.base_scale.astype(s2.dtype)
        else:
            times = jnp.asarray(_W, s2.dtype)
            variance = jax.vmap(interpolant.sigma)(times) ** 2 + jax.vmap(interpolant.alpha)(times) ** 2 * s2
            clock = s2 * jnp.sum(jnp.asarray(_WEIGHTS, s2.dtype) / variance)
        exponent = 2 * scale * h * clock
        safe = jnp.where(exponent == 0, 1.0, exponent)
        return 2 * scale * clock * jnp.where(exponent == 0, 1.0, -jnp.expm1(-safe) / safe), jnp.exp(-exponent)

    return _per_direction(prior, reward, scale, direction)


def _per_direction(
    prior: GaussianMixture,
    reward: rewards.Reward,
    final: Array,
    direction: Callable[[Array, Array], tuple[Array, Array]],
) -> GaussianMixture:
    """Assemble a law from its action in each common eigen-direction: (mean per unit of `h (y - mu) + g / 2`, spread / s)."""
    form = inputs.cast(quadratic_form(rewards.as_reward(reward), prior.dim), prior.means.dtype)
    _check_domain(prior, form, final)

    def component(mean: Array, cov: Array) -> tuple[Array, Array]:
        # A basis that diagonalises both: eigenvectors of a generic combination of two commuting matrices.
        size = lambda matrix: jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.finfo(matrix.dtype).tiny)
        axes = jnp.linalg.eigh(cov / size(cov) + form.matrix / size(form.matrix) / jnp.pi)[1]
        s2 = jnp.maximum(jnp.einsum("ij,ik,kj->j", axes, cov, axes), 0)
        h = jnp.einsum("ij,ik,kj->j", axes, form.matrix, axes)
        # A direction without spread stays where it is; the formulas would divide by it.
        response, shrink = jax.vmap(direction)(jnp.where(s2 > 0, s2, 1.0), h)
        response = jnp.where(s2 > 0, response, 0.0)
        pull = axes.T @ (form.matrix @ (form.center - mean) + form.gradient / 2)
        return mean + axes @ (response * pull), (axes * (s2 * shrink**2)[None]) @ axes.T

    means, covs = jax.vmap(component)(prior.means, prior.covs)
    return prior.replace(prior.log_weights, means, covs)


def _check_domain(prior: GaussianMixture, form: QuadraticForm, final: Array) -> None:
    if not inputs.concrete((prior, form, final)):
        return
    covs, matrix = np.asarray(prior.covs, np.float64), np.asarray(form.matrix, np.float64)
    lowest = np.linalg.eigvalsh(matrix).min()
    if lowest < -1e-6 * np.abs(matrix).max():
        raise ValueError(f"this law needs a concave reward: H has the eigenvalue {lowest:g}. Use discrete_law instead.")
    strength = np.abs(covs).max() * np.abs(matrix).max() * float(np.asarray(final))
    if not strength < 1e6:
        raise ValueError(
            f"scale * h * s^2 = {strength:.3g} is beyond what the quadrature resolves (1e6): the law is a point there"
        )
    excess = np.abs(covs @ matrix - matrix @ covs).max(axis=(1, 2))
    if np.any(excess > 1e-5 * np.abs(covs).max() * np.abs(matrix).max()):
        raise ValueError(
            f"this law needs covariances that commute with the reward's matrix H; those of component {int(np.argmax(excess))} do not. "
            "Use discrete_law with many steps instead."
        )


def _log_remainder(z: Array) -> Array:
    """`(z - log(1 + z)) / z^2`, which is 1/2 at 0."""
    small = jnp.abs(z) < 1e-2
    safe = jnp.where(small, 1.0, z)
    series = sum((-z) ** n / (n + 2) for n in range(8))
    return jnp.where(small, series, (safe - jnp.log1p(safe)) / safe**2)


def _draws(prior: GaussianMixture, reward: rewards.Reward, law: scales.Scale, k: int) -> DrawsLaw:
    """The law of k > 1 draws, where `draws_law` has it."""
    if not isinstance(law, scales.Constant):
        raise ValueError(
            f"the law of k = {k} draws is known at a constant scale, got {type(law).__name__}: pass a number"
        )
    if len(prior.log_weights) != 1:
        raise ValueError(
            f"the law of k = {k} draws is known for one Gaussian, got a mixture of {len(prior.log_weights)}: ask for one component"
        )
    form = inputs.cast(quadratic_form(rewards.as_reward(reward), prior.dim), prior.means.dtype)
    mean, cov = prior.means[0], prior.covs[0]
    if inputs.concrete((cov, form.matrix)):
        for name, matrix in (("covariance", cov), ("reward's matrix H", form.matrix)):
            matrix = np.asarray(matrix, np.float64)
            excess = np.abs(matrix - matrix[0, 0] * np.eye(prior.dim)).max()
            if excess > 1e-6 * np.abs(matrix).max():
                raise ValueError(
                    f"the law of k = {k} draws needs an isotropic {name}, got {matrix.tolist()}: draws compete by their length, "
                    "which couples the directions"
                )
    variance, h = jnp.trace(cov) / prior.dim, jnp.trace(form.matrix) / prior.dim
    strength = law.final * h * variance
    target = form.center + form.gradient / (2 * jnp.where(h == 0, 1.0, h))
    return draws_law(mean, variance, target, strength, k)
