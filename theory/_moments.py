r"""Laws of guided flows whose covariance S and reward matrix H do not commute, by linear
differential equations.

The prior is one Gaussian `N(mu, S)`, the reward is quadratic, and the guidance is the mean guidance
of one draw. Let `kappa = alpha / sigma`, and let `P = S (I + kappa^2 S)^-1` be the posterior
covariance. The noisy state in units of its noise, `xi = (x - alpha mu) / sigma`, and the posterior
mean, `m = mu + kappa P xi`, obey for any interpolant

    flow  d xi / d kappa = kappa P xi + lambda P ∇r(m),  xi(0) ~ N(0, I),  x_1 = mu + lim xi / kappa
    diffusion    d m = lambda P^2 ∇r(m) d(kappa^2) + P dB_(kappa^2),    m(0) = mu,    x_1 = lim m

where the second equation is that of the memoryless diffusion. Flow-map guidance uses the
interpolant's own clock. In the coordinate `z = X_{t,1}(x) - mu`, in which the flow map is the
identity, and with `C = alpha^2 S + sigma^2 I`,

    flow map  d z / dt = scale S C^-1 ∇r(mu + z),
        z(0) ~ N(-alpha_0^3 R^(3/2) mu, sigma_0^2 R (I + alpha_0^2 R)^2),    R = S C_0^-1

for the start of a run, `alpha_0 D(x) + x` with `x ~ N(0, sigma_0^2 I)`. All three equations have
the form `dv = (A v + f) dl + N dB_l`. With `Psi(l)`, the propagator from l to the end, the state at
the end has

    mean = Psi_0 E[v_0] + ∫ Psi f dl,    covariance = Psi_0 Cov[v_0] Psi_0^T + ∫ Psi N N^T Psi^T dl.

**Numerics.** S enters only through rational functions, except for the shift of the start's mean.
The derivatives are therefore right for singular S (except for the flow map, whose law is then a
function of the root of S) and for equal eigenvalues. `Psi` solves `dPsi/dl = -Psi A` backwards from
the end, by six-stage Radau IIA collocation (order 11, no bound on the step where the guidance is
stiff), and the integrals use the same nodes. The clock l is `log kappa`, or `log t / (1-t)` for the
flow map: on this clock, boundary layers of any strength have unit width. The clock is cut off where
the remainder is below rounding. The steps are fixed, so that everything compiles, vectorizes and
differentiates in both modes.

Reference: Hairer and Wanner, *Solving Ordinary Differential Equations II* (1996), for the
collocation.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory.tilts import QuadraticForm
from tiltjax import _linalg, scales
from tiltjax.interpolants import Interpolant
from tiltjax.mixtures import GaussianMixture

_STAGES = 6
_WIDTH = 0.5  # of a panel, in units of the logarithmic clock
_EARLIEST, _LATEST = -36.0, 36.0  # times outside change a mean by exp(-36) = 2e-16


def _radau(stages: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in (0, 1] and coefficients of the Radau IIA method. The last row of coefficients holds
    the weights.
    """
    legendre = np.polynomial.legendre
    nodes = (legendre.legroots([0.0] * (stages - 1) + [-1.0, 1.0]) + 1) / 2
    powers = nodes[:, None] ** np.arange(stages)
    return nodes, nodes[:, None] * powers / np.arange(1, stages + 1) @ np.linalg.inv(powers)


_NODES, _COEFFICIENTS = _radau(_STAGES)
_PANELS = round((_LATEST - _EARLIEST) / _WIDTH)
# Panels from the end backwards, and the nodes of each panel.
_CLOCK = _LATEST - _WIDTH * (np.arange(_PANELS)[:, None] + _NODES)
_WEIGHTS = np.broadcast_to(_WIDTH * _COEFFICIENTS[-1], _CLOCK.shape).reshape(-1)


def plug_in_moments(
    prior: GaussianMixture, form: QuadraticForm, law: scales.Scale
) -> GaussianMixture:
    """The law of the plug-in guided flow with one draw, component by component, for any S and H.

    This is the general form of `theory.plug_in_law`, which prefers a closed form where one exists.

    **Arguments:** `prior`; `form`, the reward's coefficients (`theory.quadratic_form`), H positive
    semi-definite; `law`, `Constant` or `Damped`. **Raises:** `ValueError` for another scale law.
    """
    return _components(_plug_in, prior, form, _by_snr(law), jnp.finfo(prior.covs.dtype).eps)


def sde_moments(prior: GaussianMixture, form: QuadraticForm, law: scales.Scale) -> GaussianMixture:
    """The law of the plug-in guided memoryless diffusion with one draw. Arguments: as in
    `plug_in_moments`.
    """
    return _components(_sde, prior, form, _by_snr(law), jnp.finfo(prior.covs.dtype).eps)


def fmrg_moments(
    prior: GaussianMixture, form: QuadraticForm, scale: Array, interpolant: Interpolant
) -> GaussianMixture:
    """The law of flow-map reward guidance from the start of a run, on one interpolant.
    Other arguments: as in `plug_in_moments`.
    """
    return _components(_fmrg, prior, form, (scale, interpolant), 0.0)


def _by_snr(law: scales.Scale) -> scales.Scale:
    if not isinstance(law, scales.Constant | scales.Damped):
        raise ValueError(
            f"no law is known for the scale law {type(law).__name__}. Use a number or Damped: they "
            "depend on time alone."
        )
    return law


@eqx.filter_jit
def _components(
    method: Callable, prior: GaussianMixture, form: QuadraticForm, guidance, floor
) -> GaussianMixture:
    def component(mean: Array, cov: Array) -> tuple[Array, Array]:
        # The eigenvectors of S are held constant. In this basis S is exactly diagonal and
        # nonnegative, so S (I + kappa^2 S)^-1 has no pole at any kappa and keeps its derivatives.
        axes = jnp.linalg.eigh(jax.lax.stop_gradient(cov))[1]
        rotated = axes.T @ cov @ axes
        differentiable = rotated - jax.lax.stop_gradient(rotated)
        variances = jax.lax.stop_gradient(jnp.diagonal(rotated))
        # The clock ends before it distinguishes a direction of zero variance from one whose
        # variance is rounding, and the derivatives of the two cases differ. Such a direction gets
        # `floor` times the largest variance. The guidance does not change this variance, and it is
        # subtracted again below.
        raised = jnp.maximum(variances, floor * jnp.max(variances))
        s = jnp.diag(raised) + differentiable
        half_gradient = axes.T @ (form.matrix @ (form.center - mean) + form.gradient / 2)
        h = axes.T @ form.matrix @ axes
        shift, spread = method(axes.T @ mean, s, h, half_gradient, guidance)
        spread = axes @ (spread - jnp.diag(raised - jnp.maximum(variances, 0))) @ axes.T
        return mean + axes @ shift, (spread + spread.T) / 2

    means, covs = jax.vmap(component)(prior.means, prior.covs)
    return prior.replace(prior.log_weights, means, covs)


def _plug_in(mean, s, h, half_gradient, law):
    # The state is xi / sqrt(1 + kappa^2 / c^2), of unit size at both ends, with c = 1 / (a typical
    # standard deviation).
    c, kappa = _kappa(s)
    weight = (kappa / c) ** 2 / (1 + (kappa / c) ** 2)
    posterior = _ratio(s, kappa**2, jnp.ones_like(kappa))
    strength = 2 * _strength(law, kappa)
    snr_posterior = kappa[:, None, None] ** 2 * posterior
    slope = snr_posterior - weight[:, None, None] * jnp.eye(len(s), dtype=s.dtype)[None]
    slope -= strength[:, None, None] * posterior @ h @ snr_posterior
    size = strength * kappa / jnp.sqrt(1 + (kappa / c) ** 2)
    force = size[:, None] * (posterior @ half_gradient)
    start, to_end = _propagator(slope)
    return _integral(to_end @ force[..., None])[:, 0] / c, start @ start.T / c**2


def _sde(mean, s, h, half_gradient, law):
    _, kappa = _kappa(s)
    posterior = _ratio(s, kappa**2, jnp.ones_like(kappa))
    strength = (4 * _strength(law, kappa) * kappa**2)[:, None, None]
    square = posterior @ posterior
    _, to_end = _propagator(-strength * square @ h)
    noise = jnp.sqrt(2 * kappa**2)[:, None, None] * to_end @ posterior
    mean = _integral(strength * to_end @ square @ half_gradient[:, None])[:, 0]
    return mean, _integral(noise @ noise.mT)


def _fmrg(mean, s, h, half_gradient, guidance):
    scale, interpolant = guidance
    clock = jnp.asarray(_CLOCK.reshape(-1), s.dtype)
    rate = 2 * scale * jax.nn.sigmoid(clock) * jax.nn.sigmoid(-clock)
    # Stop short of t = 1, where a direction of zero variance would give 0 / 0. The rate is zero to
    # rounding there.
    times = jnp.minimum(jax.nn.sigmoid(clock), 1 - jnp.finfo(s.dtype).eps)
    alpha, sigma = jax.vmap(interpolant.alpha)(times), jax.vmap(interpolant.sigma)(times)
    gain = rate[:, None, None] * _ratio(s, alpha**2, sigma**2)
    start, to_end = _propagator(-gain @ h)
    start_mean, start_cov = start_of_flow_map(mean, s, interpolant)
    shift = _integral(to_end @ gain @ half_gradient[:, None])[:, 0]
    return start @ start_mean + shift, start @ start_cov @ start.T


def start_of_flow_map(mean: Array, cov: Array, interpolant: Interpolant) -> tuple[Array, Array]:
    """Mean and covariance of `X_{0,1}(y) - mu` for `y = alpha_0 D(x) + x`, `x ~ N(0, sigma_0^2 I)`.
    They are zero and S if `alpha_0 = 0`.
    """
    zero = jnp.zeros((), cov.dtype)
    alpha, sigma = interpolant.alpha(zero), interpolant.sigma(zero)
    ratio = _ratio(cov, (alpha**2)[None], (sigma**2)[None])[0]
    ratio = (ratio + ratio.T) / 2
    root = lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)
    snr, eye = alpha**2 * ratio, jnp.eye(len(ratio), dtype=ratio.dtype)
    shift = -alpha * _linalg.spectral(root, ratio) @ snr @ mean
    return shift, sigma**2 * (eye + snr) @ ratio @ (eye + snr)


def _kappa(s: Array) -> tuple[Array, Array]:
    """`c = 1 / (a typical standard deviation)`, held constant, and `kappa` on the nodes."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.diagonal(s)))
    c = jax.lax.rsqrt(jnp.where(largest > 0, largest, 1.0))
    return c, c * jnp.exp(jnp.asarray(_CLOCK.reshape(-1), s.dtype))


def _noisy(s: Array, data: Array, noise: Array) -> Array:
    eye = jnp.eye(len(s), dtype=s.dtype)
    return data[:, None, None] * s[None] + noise[:, None, None] * eye[None]


@jax.custom_jvp
def _ratio(s: Array, data: Array, noise: Array) -> Array:
    """`S (data S + noise I)^-1`, batched over the coefficients `data` and `noise`."""
    return jnp.linalg.solve(_noisy(s, data, noise), s[None])


@_ratio.defjvp
def _ratio_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (s, data, noise), (ds, ddata, dnoise) = primals, tangents
    # The derivative is computed as `noise W dS W`. The product rule gives the difference of two
    # terms that agree in all digits late in the clock.
    inverse = jnp.linalg.inv(_noisy(s, data, noise))
    change = noise[:, None, None] * inverse @ ds - inverse @ s @ _noisy(s, ddata, dnoise)
    return _ratio(s, data, noise), change @ inverse


def _strength(law: scales.Scale, kappa: Array) -> Array:
    unused = jnp.zeros((), kappa.dtype)
    return jax.vmap(lambda snr: law(jax.random.key(0), snr, unused, unused))(kappa**2)


def _propagator(slope: Array) -> tuple[Array, Array]:
    """`Psi` of `dv = A v dl`: from the first time of the clock to the end, and from every node to
    the end. A is given on the nodes.
    """
    d = slope.shape[-1]
    slope = slope.reshape(_PANELS, _STAGES, d, d)
    coefficients = jnp.asarray(_WIDTH * _COEFFICIENTS, slope.dtype)
    # The transpose G of Psi has dG/d(-l) = A^T G; its stages X_i = G + h sum_j a_ij A_j^T X_j.
    system = -jnp.einsum("ij,pjlk->pikjl", coefficients, slope).reshape(
        _PANELS, _STAGES * d, _STAGES * d
    )
    system += jnp.eye(_STAGES * d, dtype=slope.dtype)[None]
    identity = jnp.tile(jnp.eye(d, dtype=slope.dtype), (_STAGES, 1))
    stages = jax.vmap(lambda matrix: jnp.linalg.solve(matrix, identity))(system).reshape(
        _PANELS, _STAGES, d, d
    )

    def panel(end: Array, stages: Array) -> tuple[Array, Array]:
        to_end = stages @ end
        return to_end[-1], to_end

    first, to_end = jax.lax.scan(panel, jnp.eye(d, dtype=slope.dtype), stages)
    return first.T, to_end.reshape(-1, d, d).mT


def _integral(values: Array) -> Array:
    return jnp.tensordot(jnp.asarray(_WEIGHTS, values.dtype), values, axes=1)
