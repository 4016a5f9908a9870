r"""The exact law of a discretized guided sampler, at any number of steps.

    x' = A x + c + B z,  z ~ N(0, I):      mean' = A mean + c,      cov' = A cov A^T + B B^T

For one Gaussian, a quadratic reward and k = 1 draw, the guided denoiser is affine in the state and
Gaussian in the draw, `D~ = A_t x + c_t + N_t z` (`AffineField`). So is every step of Euler, Heun
and the ancestral kernel. The mean and covariance of the samples follow a linear recursion
(`discrete_law`). The recursion needs no simulation, no limit of small steps, and no condition on
the matrices.

The guidances are those of Dandapanthula and Boffi (arXiv 2606.02884). The recursion holds for any
affine guidance.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory.tilts import QuadraticForm, quadratic_form
from tiltjax import _checks, _linalg, _pytree, grids, rewards, scales, solvers
from tiltjax.interpolants import Interpolant, or_linear, start_of
from tiltjax.mixtures import GaussianMixture, check_mixture

_FLOOR = 1e-3  # of a flow map before its jump


class Affine(NamedTuple):
    """`matrix x + constant + noise z` with `z ~ N(0, I)`: a denoiser, a velocity, or a step."""

    matrix: Array
    constant: Array
    noise: Array


class Moments(NamedTuple):
    """The mean `(d,)` and the covariance `(d, d)` of a Gaussian state."""

    mean: Array
    cov: Array

    def after(self, step: Affine) -> "Moments":
        """The moments after a step whose noise is independent of the state."""
        matrix, constant, noise = step
        return Moments(
            matrix @ self.mean + constant, matrix @ self.cov @ matrix.T + noise @ noise.T
        )


class AffineField(eqx.Module):
    """A guided denoiser that is affine in x and Gaussian in its draw: `D~ = A_t x + c_t + N_t z`,
    `z ~ N(0, I)`.

    `plug_in_field`, `dps_field`, `doob_field` and `fmrg_field` build it, for one Gaussian and a
    quadratic reward with any H. `guides_start` says from which denoiser a run starts, from the
    guided or the unguided one, as in `tiltjax.guidance.Guidance`.
    """

    prior: GaussianMixture
    form: QuadraticForm
    law: scales.Scale
    interpolant: Interpolant
    shift: Callable = eqx.field(static=True)
    guides_start: bool = eqx.field(static=True, default=True)

    def unguided(self) -> "AffineField":
        """The field without guidance."""
        no_scale = scales.Constant(jnp.zeros((), self.prior.means.dtype))
        return AffineField(self.prior, self.form, no_scale, self.interpolant, shift_at_mean)

    def at(self, t: Array) -> Affine:
        """`(A_t, c_t, N_t)`: `(d, d)`, `(d,)` and `(d, 2 d)`."""
        interpolant, mean, cov = self.interpolant, self.prior.means[0], self.prior.covs[0]
        alpha, sigma = interpolant.alpha(t), interpolant.sigma(t)
        eye = jnp.eye(len(mean), dtype=mean.dtype)
        gain = alpha * jnp.linalg.solve(alpha**2 * cov + sigma**2 * eye, cov).T
        # A posterior draw is D + (I - alpha gain) S^(1/2) z_1 - sigma gain z_0: prior noise,
        # corrected by the information on X_1 in x.
        draw = jnp.concatenate(
            [(eye - alpha * gain) @ _linalg.square_root(cov), -sigma * gain], axis=1
        )
        offset = mean - alpha * gain @ mean
        strength = self.law(jax.random.key(0), interpolant.snr(t), t, mean)
        matrix, constant, noise = self.shift(
            interpolant, t, self.form, strength, mean, cov, gain, offset, draw
        )
        return Affine(gain + matrix, offset + constant, noise)


def plug_in_field(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array | scales.Scale,
    interpolant: Interpolant | None = None,
) -> AffineField:
    """The field of plug-in guidance with one draw of the `Exact` posterior:
    `D~ = D + lambda_t P ∇r(X_1)`, `X_1 ~ N(D, P)`.

    **Raises:** `ValueError` for a mixture, a reward that is not quadratic, and a scale law that
    does not depend on time alone.
    """
    return _affine(prior, reward, scale, interpolant, shift_at_draw)


def dps_field(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array | scales.Scale,
    interpolant: Interpolant | None = None,
) -> AffineField:
    """The field of guidance at the denoiser, `D~ = D + lambda_t P ∇r(D)`.

    **Raises:** as `plug_in_field`.
    """
    return _affine(prior, reward, scale, interpolant, shift_at_mean)


def doob_field(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array,
    interpolant: Interpolant | None = None,
) -> AffineField:
    """The field of the exact guidance, which for concave rewards is also that of `Laplace`:
    `D~ = D + scale P (I + 2 scale H P)^-1 ∇r(D)`.

    **Raises:** as `plug_in_field`.
    """
    return _affine(prior, reward, _checks.nonnegative(scale, "scale"), interpolant, exact_shift)


def fmrg_field(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float | Array,
    interpolant: Interpolant | None = None,
    *,
    inner_steps: int | None = 20,
) -> AffineField:
    """The field of flow-map reward guidance,
    `D~ = D + (2 sigma^2 / (alpha g^2)) scale ∇ r(X_{t,1})`.

    **Arguments:** `inner_steps` of the inner flow, which is that of `fmrg`, also in its default.
    With None the flow map is exact, `mu + S^(1/2) C^(-1/2) (x - alpha mu)`, as in `fmrg_law`.

    **Raises:** as `plug_in_field`.
    """
    steps = None if inner_steps is None else _checks.count(inner_steps, "inner_steps")
    field = _affine(prior, reward, scale, interpolant, ShiftAtEnd(steps))
    shift = ShiftAtEnd(steps, _floor_of(field.prior, field.interpolant))
    # The shift is no estimate of the tilt's mean, so runs start unguided.
    return AffineField(field.prior, field.form, field.law, field.interpolant, shift, False)


def _floor_of(prior: GaussianMixture, interpolant: Interpolant) -> float:
    """The ratio of noise to data, over that of the start, at which `FlowMap` jumps to the denoiser:
    1e-3, and less for narrow data.
    """
    if not _checks.concrete((prior, interpolant)):
        return _FLOOR
    noise = start_of(interpolant, np.zeros(()), prior.means.dtype)[2]
    return _FLOOR * min(grids.beyond(prior.width, noise), 1.0)


def _affine(prior, reward, scale, interpolant, shift) -> AffineField:
    check_mixture(prior, "prior")
    if len(prior.log_weights) != 1:
        raise ValueError(
            "a guided flow is affine for one Gaussian only, got a mixture of "
            f"{len(prior.log_weights)} components"
        )
    law = scales.as_scale(scale)
    if not isinstance(law, scales.Constant | scales.Damped):
        raise ValueError(
            f"the scale law {type(law).__name__} has no recursion. Use a number or Damped, which "
            "depend on time alone."
        )
    interpolant = or_linear(interpolant)
    form = quadratic_form(rewards.as_reward(reward), prior.dim)
    return _pytree.cast(AffineField(prior, form, law, interpolant, shift), prior.means.dtype)


def _gradient(form: QuadraticForm, matrix: Array, offset: Array) -> tuple[Array, Array]:
    """`∇r(matrix x + offset)` as an affine function of x."""
    return -2 * form.matrix @ matrix, form.gradient - 2 * form.matrix @ (offset - form.center)


def shift_at_mean(interpolant, t, form, strength, mean, cov, gain, offset, draw):
    """The shift of the denoiser by `lambda_t P ∇r(D)`, as its `(matrix, constant, noise)`."""
    slope, constant = _gradient(form, gain, offset)
    posterior = draw @ draw.T
    return strength * posterior @ slope, strength * posterior @ constant, jnp.zeros_like(draw)


def shift_at_draw(interpolant, t, form, strength, mean, cov, gain, offset, draw):
    """The shift of the denoiser by the gradient at one posterior draw, `lambda_t P ∇r(X_1)`."""
    matrix, constant, _ = shift_at_mean(
        interpolant, t, form, strength, mean, cov, gain, offset, draw
    )
    return matrix, constant, -2 * strength * (draw @ draw.T) @ form.matrix @ draw


def exact_shift(interpolant, t, form, strength, mean, cov, gain, offset, draw):
    """The shift to the tilted posterior's mean."""
    matrix, constant, noise = shift_at_mean(
        interpolant, t, form, strength, mean, cov, gain, offset, draw
    )
    damping = jnp.linalg.inv(
        jnp.eye(len(mean), dtype=mean.dtype) + 2 * strength * draw @ draw.T @ form.matrix
    )
    return damping @ matrix, damping @ constant, noise


class ShiftAtEnd(NamedTuple):
    """The shift by the reward's gradient at the end of the flow map: the exact flow map, or the one
    with `inner_steps` steps down to `floor` times the noise at the start.
    """

    inner_steps: int | None = None
    floor: float = _FLOOR

    def __call__(self, interpolant, t, form, strength, mean, cov, gain, offset, draw):
        alpha = interpolant.alpha(t)
        if self.inner_steps is None:
            flow = _flow_map(cov, alpha, interpolant.sigma(t))
        else:
            flow = _flow_map_in_steps(cov, interpolant, t, self.inner_steps, self.floor)
        slope, constant = _gradient(form, flow, mean - alpha * flow @ mean)
        # The drift is b + strength * flow^T ∇r; as a shift of the denoiser, that is
        # tweedie * 2 / g^2.
        factor = strength * interpolant.tweedie(t) * 2 / interpolant.diffusion(t)
        return factor * flow.T @ slope, factor * flow.T @ constant, jnp.zeros_like(draw)


def _flow_map(cov: Array, alpha: Array, sigma: Array) -> Array:
    """The matrix F of the exact flow map, `X_{t,1}(x) = mu + F (x - alpha mu)`."""
    # First S C^-1, by a solve. Its root is then a function of one matrix, differentiable where
    # eigenvalues coincide.
    ratio = jnp.linalg.solve(alpha**2 * cov + sigma**2 * jnp.eye(len(cov), dtype=cov.dtype), cov)
    return _linalg.spectral(_linalg.root, (ratio + ratio.T) / 2)


def _flow_map_in_steps(
    cov: Array, interpolant: Interpolant, t: Array, steps: int, floor: float
) -> Array:
    """The matrix F of the flow map by Heun steps and a jump to the denoiser, as in
    `tiltjax.FlowMap`. With `u = (x - alpha mu) / sigma` and `kappa = alpha / sigma`, the flow is
    `du/dkappa = W u`, where `W u`, `W = kappa S (kappa^2 S + I)^-1`, is the denoiser minus mu.
    """
    eye = jnp.eye(len(cov), dtype=cov.dtype)
    kappa_of = lambda t: interpolant.alpha(t) / interpolant.sigma(t)
    denoiser = lambda kappa: kappa * jnp.linalg.solve(kappa**2 * cov + eye, cov).T
    last = kappa_of(interpolant.time((floor * interpolant.sigma(jnp.zeros_like(t))) ** -2))
    kappa = kappa_of(t)
    kappas = kappa * jnp.maximum(last / kappa, 1) ** (jnp.arange(steps + 1, dtype=t.dtype) / steps)
    denoisers = jax.vmap(denoiser)(kappas)

    def step(flow: Array, interval: tuple[Array, ...]) -> tuple[Array, None]:
        length, at_start, at_end = interval
        first = at_start @ flow
        return flow + length / 2 * (first + at_end @ (flow + length * first)), None

    flow, _ = jax.lax.scan(step, eye, (jnp.diff(kappas), denoisers[:-1], denoisers[1:]))
    return denoisers[-1] @ flow / interpolant.sigma(t)


def ancestral_step(
    interpolant: Interpolant, t: Array, u: Array, eta: Array
) -> tuple[Array, Array, Array]:
    """Coefficients of x and of the denoiser in the mean of a step of `Ancestral(eta)`, and the
    variance of the step.
    """
    alpha, sigma = interpolant.alpha, interpolant.sigma
    rho = alpha(t) * sigma(u) / (alpha(u) * sigma(t))
    variance = eta**2 * sigma(u) ** 2 * (1 - rho**2)
    # The root of sigma_u^2 - variance, written without the difference: at t = 0 the difference is
    # zero, and rounding could make it negative.
    decay = sigma(u) * jnp.sqrt(1 - eta**2 + (eta * rho) ** 2) / sigma(t)
    return decay, alpha(u) - decay * alpha(t), variance


def discrete_law(
    field: AffineField, *, times: Array, solver: solvers.Solver | None = None
) -> GaussianMixture:
    """The exact Gaussian law of the samples of `tiltjax.sample` on the grid `times`, at any number
    of steps.

    Every step is affine in the state, plus independent Gaussian noise from the draws,
    `x' = A x + c + B z`. The mean and the covariance follow a linear recursion from the start
    `alpha D~(x) + x`, `x ~ N(0, sigma^2 I)`, at `times[0]`.

    **Arguments:** `field`; `times`, increasing, with any last time up to 1; `solver`, `Euler()`,
    `Heun(share_draw)` (default `Heun()`) or `Ancestral(eta)`.

    **Raises:** `ValueError` for a solver without a recursion, and for times that do not increase
    inside [0, 1].
    """
    _checks.instance(field, AffineField, "field", "such as plug_in_field(prior, reward, scale)")
    solver = solvers.Heun() if solver is None else solver
    _checks.instance(solver, solvers.Solver, "solver", "use Euler, Heun or Ancestral")
    times = grids.time_grid(_checks.finite(times, "times", 1), None).astype(field.prior.means.dtype)
    # Traced arguments are part of the caller's program, which is compiled already.
    return (_compiled if _checks.concrete((field, times, solver)) else _recursion)(
        field, times, solver
    )


def _recursion(field: AffineField, times: Array, solver: solvers.Solver) -> GaussianMixture:
    interpolant = field.interpolant
    step = functools.partial(_step_of(solver, times.dtype), interpolant)
    start = _start(field, times[0])
    # The field is computed once for each time: the end of a step is the start of the next one. The
    # value at t = 1 is a placeholder and is not used.
    fields = jax.vmap(field.at)(jnp.where(times < 1, times, times[0]))
    at_t, at_u = jax.tree.map(lambda x: x[:-1], fields), jax.tree.map(lambda x: x[1:], fields)
    advance = lambda moments, interval: (_advance(step, moments, *interval), None)
    (mean, cov), _ = jax.lax.scan(advance, start, (times[:-1], times[1:], at_t, at_u))
    return field.prior.replace(field.prior.log_weights, mean[None], ((cov + cov.T) / 2)[None])


_compiled = eqx.filter_jit(_recursion)


def _start(field: AffineField, t: Array) -> Moments:
    """The law of the first state of `tiltjax.sample`."""
    dtype = t.dtype
    noise = Moments(
        jnp.zeros(field.prior.dim, dtype),
        field.interpolant.sigma(t) ** 2 * jnp.eye(field.prior.dim, dtype=dtype),
    )
    return noise.after(start_step(field if field.guides_start else field.unguided(), t))


def start_step(field: AffineField, t: Array) -> Affine:
    """The step from the noise to the first state of a run, `x + alpha D~(x)`."""
    matrix, constant, noise = field.at(t)
    alpha, eye = field.interpolant.alpha(t), jnp.eye(len(matrix), dtype=matrix.dtype)
    return Affine(eye + alpha * matrix, alpha * constant, alpha * noise)


def _advance(
    step: Callable, moments: Moments, t: Array, u: Array, at_t: Affine, at_u: Affine
) -> Moments:
    """The moments after a step from t to u, as the solvers take it. A step to t = 1 jumps to the
    denoiser, because the field has no value at t = 1.
    """
    inner = lambda: moments.after(step(t, u, at_t, at_u))
    # At t = 1 another step changes nothing, so traced grids can be padded with ones to equal
    # length.
    jump = lambda: jax.tree.map(
        lambda new, old: jnp.where(t < 1, new, old), moments.after(at_t), moments
    )
    return jax.lax.cond(u < 1, inner, jump)


def _step_of(solver: solvers.Solver, dtype: Any) -> Callable:
    """A solver's step, as a function `(interpolant, t, u, at_t, at_u) -> Affine`."""
    match solver:
        case solvers.Euler():
            return euler_step
        case solvers.Heun(share_draw=share_draw):
            return functools.partial(heun_step, share_draw)
        case solvers.Ancestral():
            return functools.partial(_noisy_step, solver.eta.astype(dtype))
    raise ValueError(
        f"the solver {type(solver).__name__} has no recursion: use Euler, Heun or Ancestral"
    )


def euler(interpolant: Interpolant, s: Array, t: Array, u: Array, denoiser: Affine) -> Affine:
    """`Interpolant.advance` of an affine denoiser at the time s."""
    matrix, constant, noise = denoiser
    advance = functools.partial(interpolant.advance, s, t, u)
    return Affine(
        advance(jnp.eye(len(matrix), dtype=matrix.dtype), matrix),
        advance(jnp.zeros_like(constant), constant),
        advance(jnp.zeros_like(noise), noise),
    )


def euler_step(interpolant: Interpolant, t: Array, u: Array, at_t: Affine, at_u: Affine) -> Affine:
    """The step of Euler, `x + (u - t) b_t(x)`."""
    return euler(interpolant, t, t, u, at_t)


def heun_step(
    share_draw: bool, interpolant: Interpolant, t: Array, u: Array, at_t: Affine, at_u: Affine
) -> Affine:
    """The step of Heun, `x + (u - t) (b_t(x) + b_u(x')) / 2` with `x'` from Euler. The draws of
    both velocities stand side by side in the noise; a shared draw is the same in both.
    """
    # The mean of the state and of the end of two Euler steps.
    first, constant, noise = euler(interpolant, t, t, u, at_t)
    second, constant_u, noise_u = euler(interpolant, u, t, u, at_u)
    eye, noise_t = jnp.eye(len(first), dtype=first.dtype), second @ noise
    draws = [noise_t + noise_u, jnp.zeros_like(noise)] if share_draw else [noise_t, noise_u]
    return Affine(
        (eye + second @ first) / 2,
        (second @ constant + constant_u) / 2,
        jnp.concatenate(draws, axis=1) / 2,
    )


def _noisy_step(
    eta: Array, interpolant: Interpolant, t: Array, u: Array, at_t: Affine, at_u: Affine
) -> Affine:
    """The step of `Ancestral(eta)`, whose noise stands beside that of the draw."""
    matrix, constant, noise = at_t
    decay, gain, variance = ancestral_step(interpolant, t, u, eta)
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    return Affine(
        decay * eye + gain * matrix,
        gain * constant,
        jnp.concatenate([gain * noise, jnp.sqrt(variance) * eye], axis=1),
    )
