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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory import quadrature
from theory.tilts import QuadraticForm, quadratic_form
from tiltjax import inputs, linalg, rewards, scales, solvers
from tiltjax.interpolants import Interpolant, Linear
from tiltjax.mixtures import GaussianMixture

_W, _ONE_MINUS_W, _WEIGHTS = quadrature.unit_interval()


def plug_in_law(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array | scales.Scale, *, k: int = 1
) -> GaussianMixture:
    """The law of the plug-in guided flow with k = 1 fresh posterior draw, at a constant or a damped scale.

    `scale` is a number or the law that the guidance was given: `Damped(scale, sigma)` with any sigma, right or wrong. For one
    Gaussian and a quadratic reward this is also the law of DPS.

    For a mixture the law of each component is exact and the prior's weights are kept: what happens if the draws of `X_1` stay in
    one component as x moves, or in the limit of far modes at a fixed number of steps. It ignores the push that draws receive where
    two modes compete, so it says nothing of masses between near modes.

    **Raises:** `ValueError` for k > 1, a reward that is not quadratic, one that is convex along a direction, or covariances that
    do not commute with the reward's matrix.
    """
    if inputs.count(k, "k") != 1:
        raise ValueError(f"this closed form is that of k = 1, got k = {k}")
    law = inputs.cast(scales.as_scale(scale), prior.means.dtype)
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


class AffineField(eqx.Module):
    """A guided denoiser that is affine in x and Gaussian in its draw: `D~ = A_t x + c_t + N_t z`, `z ~ N(0, I)`.

    Built by `plug_in_field`, `dps_field`, `doob_field` and `fmrg_field`, for one Gaussian and a quadratic reward with any H.
    """

    prior: GaussianMixture
    form: QuadraticForm
    law: scales.Scale
    interpolant: Interpolant
    pull: Callable = eqx.field(static=True)

    def at(self, t: Array) -> tuple[Array, Array, Array]:
        """`(A_t, c_t, N_t)`: `(d, d)`, `(d,)` and `(d, 2 d)`."""
        path, mean, cov = self.interpolant, self.prior.means[0], self.prior.covs[0]
        alpha, sigma = path.alpha(t), path.sigma(t)
        eye = jnp.eye(len(mean), dtype=mean.dtype)
        gain = alpha * jnp.linalg.solve(alpha**2 * cov + sigma**2 * eye, cov).T
        # A posterior draw is D + (I - alpha gain) S^(1/2) z_1 - sigma gain z_0: prior noise, corrected for what the view shows.
        draw = jnp.concatenate([(eye - alpha * gain) @ linalg.square_root(cov), -sigma * gain], axis=1)
        offset = mean - alpha * gain @ mean
        strength = self.law(jax.random.key(0), path.snr(t), t, mean)
        matrix, move, noise = self.pull(path, t, self.form, strength, mean, cov, gain, offset, draw)
        return gain + matrix, offset + move, noise


def plug_in_field(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array | scales.Scale,
    interpolant: Interpolant | None = None,
) -> AffineField:
    """Plug-in guidance with one draw of the `Exact` posterior: `D~ = D + lambda_t P ∇r(X_1)`, `X_1 ~ N(D, P)`."""
    return _affine(prior, reward, scale, interpolant, _pull_at_draw)


def dps_field(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array | scales.Scale,
    interpolant: Interpolant | None = None,
) -> AffineField:
    """Guidance at the denoiser: `D~ = D + lambda_t P ∇r(D)`."""
    return _affine(prior, reward, scale, interpolant, _pull_at_mean)


def doob_field(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array, interpolant: Interpolant | None = None
) -> AffineField:
    """The exact guidance, which is also Laplace's for concave rewards: `D~ = D + scale P (I + 2 scale H P)^-1 ∇r(D)`."""
    return _affine(prior, reward, inputs.nonnegative(scale, "scale"), interpolant, _pull_exactly)


def fmrg_field(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array, interpolant: Interpolant | None = None
) -> AffineField:
    """Flow-map reward guidance with the exact flow map `mu + S^(1/2) C^(-1/2) (x - alpha mu)`."""
    return _affine(prior, reward, scale, interpolant, _pull_at_end)


def _affine(prior, reward, scale, interpolant, pull) -> AffineField:
    if len(prior.log_weights) != 1:
        raise ValueError(f"a guided flow is affine for one Gaussian only, got a mixture of {len(prior.log_weights)}")
    law = scales.as_scale(scale)
    if not isinstance(law, scales.Constant | scales.Damped):
        raise ValueError(
            f"no recursion for the scale law {type(law).__name__}: Constant and Damped depend on time alone"
        )
    interpolant = Linear() if interpolant is None else interpolant
    form = quadratic_form(rewards.as_reward(reward), prior.dim)
    return inputs.cast(AffineField(prior, form, law, interpolant, pull), prior.means.dtype)


def _gradient(form: QuadraticForm, matrix: Array, offset: Array) -> tuple[Array, Array]:
    """`∇r(matrix x + offset)` as an affine function of x."""
    return -2 * form.matrix @ matrix, form.gradient - 2 * form.matrix @ (offset - form.center)


def _pull_at_mean(path, t, form, strength, mean, cov, gain, offset, draw):
    slope, constant = _gradient(form, gain, offset)
    posterior = draw @ draw.T
    return strength * posterior @ slope, strength * posterior @ constant, jnp.zeros_like(draw)


def _pull_at_draw(path, t, form, strength, mean, cov, gain, offset, draw):
    matrix, move, _ = _pull_at_mean(path, t, form, strength, mean, cov, gain, offset, draw)
    return matrix, move, -2 * strength * (draw @ draw.T) @ form.matrix @ draw


def _pull_exactly(path, t, form, strength, mean, cov, gain, offset, draw):
    matrix, move, noise = _pull_at_mean(path, t, form, strength, mean, cov, gain, offset, draw)
    damp = jnp.linalg.inv(jnp.eye(len(mean), dtype=mean.dtype) + 2 * strength * draw @ draw.T @ form.matrix)
    return damp @ matrix, damp @ move, noise


def _pull_at_end(path, t, form, strength, mean, cov, gain, offset, draw):
    alpha, sigma = path.alpha(t), path.sigma(t)
    s2, axes = jnp.linalg.eigh(cov)
    flow = (axes * jnp.sqrt(jnp.maximum(s2, 0) / (alpha**2 * s2 + sigma**2))[None]) @ axes.T
    slope, constant = _gradient(form, flow, mean - alpha * flow @ mean)
    # The drift is b + strength * flow^T ∇r: as a move of the denoiser, that is tweedie * 2 / g^2.
    factor = strength * path.tweedie(t) * 2 / path.diffusion(t)
    return factor * flow @ slope, factor * flow @ constant, jnp.zeros_like(draw)


def discrete_law(field: AffineField, *, times: Array, solver: solvers.Solver | None = None) -> GaussianMixture:
    """The exact Gaussian law of what `tiltjax.sample` returns on the grid `times`: mean and covariance at any number of steps.

    Every step is affine in the state plus independent Gaussian noise from the draws, `x' = A x + c + B z`, so the two moments
    follow a linear recursion: no simulation, no limit. Start: `N(0, sigma_0^2 I)` at `times[0]`.

    **Arguments:** `field`; `times`, increasing, ending anywhere up to 1; `solver`, `Euler()`, `Heun(share_draw)` or
    `Ancestral(eta)`.
    """
    solver = solvers.Heun() if solver is None else solver
    times = inputs.time_grid(times, None).astype(field.prior.means.dtype)
    path, d = field.interpolant, field.prior.dim
    eye, zero = jnp.eye(d, dtype=times.dtype), jnp.zeros(d, times.dtype)

    def velocity(t: Array) -> tuple[Array, Array, Array]:
        matrix, move, noise = field.at(t)
        return (
            path.velocity(t, eye, matrix),
            path.velocity(t, zero, move),
            path.velocity(t, jnp.zeros_like(noise), noise),
        )

    def euler(t: Array, u: Array) -> tuple[Array, Array, Array]:
        slope, move, noise = velocity(t)
        return eye + (u - t) * slope, (u - t) * move, (u - t) * noise

    def heun(t: Array, u: Array) -> tuple[Array, Array, Array]:
        dt = u - t
        first, move, noise = velocity(t)
        second, move_u, noise_u = velocity(u)
        carried = noise + dt * second @ noise
        together = [carried + noise_u, jnp.zeros_like(noise)] if share_draw else [carried, noise_u]
        matrix = eye + dt / 2 * (first + second @ (eye + dt * first))
        return matrix, dt / 2 * (move + move_u + dt * second @ move), dt / 2 * jnp.concatenate(together, axis=1)

    def ancestral(t: Array, u: Array) -> tuple[Array, Array, Array]:
        matrix, move, noise = field.at(t)
        rho = path.alpha(t) * path.sigma(u) / (path.alpha(u) * path.sigma(t))
        variance = eta**2 * path.sigma(u) ** 2 * (1 - rho**2)
        keep = jnp.sqrt(path.sigma(u) ** 2 - variance) / path.sigma(t)
        gain = path.alpha(u) - keep * path.alpha(t)
        return (
            keep * eye + gain * matrix,
            gain * move,
            jnp.concatenate([gain * noise, jnp.sqrt(variance) * eye], axis=1),
        )

    match solver:
        case solvers.Euler():
            regular = euler
        case solvers.Heun(share_draw=share_draw):
            regular = heun
        case solvers.Ancestral():
            regular, eta = ancestral, solver.eta.astype(times.dtype)
        case _:
            raise ValueError(f"no recursion for {type(solver).__name__}: Euler, Heun and Ancestral have one")

    def moved(moments: tuple[Array, Array], transition: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        (mean, cov), (matrix, move, spread) = moments, transition
        return matrix @ mean + move, matrix @ cov @ matrix.T + spread @ spread.T

    def advance(moments: tuple[Array, Array], interval: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        t, u = interval
        # As the solvers do: a step to t = 1 jumps to the denoiser, where the field has no value any more.
        step = lambda: moved(moments, regular(t, u))
        return jax.lax.cond(u < 1, step, lambda: moved(moments, field.at(t))), None

    moments = zero, path.sigma(times[0]) ** 2 * eye
    (mean, cov), _ = jax.lax.scan(advance, moments, (times[:-1], times[1:]))
    return field.prior.replace(field.prior.log_weights, mean[None], ((cov + cov.T) / 2)[None])
