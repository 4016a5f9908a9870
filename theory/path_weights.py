r"""The law of the importance weights of a guided chain: its divergence from the tilted chain, and
the effective sample size.

A base chain P takes the steps `N(m_j(x), s_j^2 I)` of `tiltjax.Ancestral(eta)`. The guided chain Q
takes the same steps with the guided denoiser, `N(m_j(x) + delta_j, s_j^2 I)`. A trajectory of Q has
the weight

    log w = scale r(x_N) + sum_j [ -<delta_j, xi_j> / s_j - |delta_j|^2 / (2 s_j^2) ],
        x_{j+1} = m_j + delta_j + s_j xi_j

and, with P* the chain P tilted by its end and `Z_N = E_P[exp(scale r(x_N))]`,

    E_Q[w] = Z_N,  KL(Q | P*) = log Z_N - E_Q[log w],
        effective sample size / n -> Z_N^2 / E_Q[w^2].

`KL(Q | P*)` is an upper bound of the divergence of the ends, `KL(Q_1 | tilt)`: it may be positive
even if Q ends exactly in the tilt. The step to t = 1 has no variance. It is therefore not guided,
since no trajectory of Q would otherwise be possible under P. In `tiltjax.sample` the last step is
guided. `Z_N` is the constant of the chain, O(1 / N) from the continuous one.

**The recursions** hold for one Gaussian and a quadratic reward, where `delta = E x + e + N z` and z
is the guidance's own draw. The moments of Q are computed forward, and the second moment of the
weight backward. With `V_N = exp(2 scale r)` and all Gaussians collected,

    V_j(x) = E_z[ exp(|delta|^2 / s^2) E_xi[ V_{j+1}(m(x) - delta + s xi) ] ],
        E_Q[w^2] = E[V_0(x_0)],

is the exponential of a quadratic function at every j, as long as it is finite. Let K be the
curvature of `-log V`. V is infinite once `I + s^2 K`, or the corresponding matrix for z, is not
positive definite.

**Small steps** (`path_limit`). For the mean guidance of the memoryless diffusion, in the
eigen-directions of `theory.flow_laws`, with the clock `tau = s^2 - Var(X_1 | X_t)` and m the
denoiser, `dm = -2 scale h (m - y) dtau + dW`. Hence
`log w = -scale h y^2 - a + 2 (scale h)^2 ∫ (m - y)^2 dtau`. Its exponential moment is the Laplace
transform of an integrated squared Gaussian process (Cameron and Martin), which is infinite for
`a >= 3 pi / 8`.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory import finite_steps, flow_laws, tilts
from theory.finite_steps import AffineField
from theory.tilts import QuadraticForm
from tiltjax import _checks, _pytree, grids, rewards, solvers
from tiltjax.mixtures import GaussianMixture, check_mixture


class PathLaw(eqx.Module):
    """Properties of the weights of a guided chain, all scalars; built by `path_law` and
    `path_limit`.

    - `log_norm`: `log Z_N` of the chain.
    - `evidence_bound`: `E_Q[log w]`. It is `-inf`, and `kl` is `inf`, if the chain exceeds the
      range of floating-point numbers.
    - `kl`: `KL(Q | P*) = log_norm - evidence_bound`.
    - `log_second_moment`: `log E_Q[w^2]`, `inf` if the weights have infinite variance.
    - `ess`: `Z_N^2 / E_Q[w^2]`, the effective fraction of n independent trajectories for large n; 0
      if the weights have infinite variance.
    - `floor`: the smallest `kl` of any guidance from the same start, `log Z_N - E[log h_0(X_0)]`; 0
      for a memoryless chain.
    """

    log_norm: Array
    evidence_bound: Array
    kl: Array
    log_second_moment: Array
    ess: Array
    floor: Array


class _Exponential(eqx.Module):
    """`exp(constant + <linear, x> - x^T curvature x / 2)`. `finite` is whether all integrals so far
    were finite.
    """

    constant: Array
    linear: Array
    curvature: Array
    finite: Array

    def smoothed(self, variance: Array) -> "_Exponential":
        """`E[V(y + sqrt(variance) xi)]` as a function of y."""
        eye = jnp.eye(len(self.linear), dtype=self.linear.dtype)
        matrix, finite = _positive(eye + variance * self.curvature, self.finite)
        inverse = jnp.linalg.inv(matrix)
        constant = (
            self.constant
            - jnp.linalg.slogdet(matrix)[1] / 2
            + variance * self.linear @ inverse @ self.linear / 2
        )
        curvature = self.curvature @ inverse
        return _Exponential(constant, inverse @ self.linear, (curvature + curvature.T) / 2, finite)

    def composed(self, matrix: Array, offset: Array) -> "_Exponential":
        """`V(matrix x + offset)` as a function of x."""
        constant = self.constant + self.linear @ offset - offset @ self.curvature @ offset / 2
        linear = matrix.T @ (self.linear - self.curvature @ offset)
        return _Exponential(constant, linear, matrix.T @ self.curvature @ matrix, self.finite)

    def marginal(self, dim: int) -> "_Exponential":
        """The expectation over all but the first `dim` variables, which are standard normal."""
        rest = self.curvature[dim:, dim:]
        matrix, finite = _positive(jnp.eye(len(rest), dtype=rest.dtype) + rest, self.finite)
        inverse = jnp.linalg.inv(matrix)
        cross, rest_linear = self.curvature[:dim, dim:], self.linear[dim:]
        constant = self.constant - jnp.linalg.slogdet(matrix)[1] / 2
        constant = constant + rest_linear @ inverse @ rest_linear / 2
        curvature = self.curvature[:dim, :dim] - cross @ inverse @ cross.T
        return _Exponential(
            constant, self.linear[:dim] - cross @ inverse @ rest_linear, curvature, finite
        )


def _positive(matrix: Array, finite: Array) -> tuple[Array, Array]:
    """`matrix`, and whether it and all earlier matrices are positive definite. If not, the identity
    replaces `matrix`, so that the computation can continue.
    """
    finite &= jnp.linalg.eigvalsh(jax.lax.stop_gradient(matrix))[0] > 0
    return jnp.where(finite, matrix, jnp.eye(len(matrix), dtype=matrix.dtype)), finite


def path_law(
    field: AffineField, *, times: Array, solver: solvers.Ancestral | None = None
) -> PathLaw:
    """The law of the weights of the guided chain of `Ancestral(eta)` on the grid `times`, at any
    number of steps, by recursion.

    Both chains start from the unguided `alpha D(x) + x`, `x ~ N(0, sigma^2 I)`, at `times[0]`.
    `plug_in_field` takes a fresh draw at every step, and the weight accounts for the draw. The
    target is the tilt at the scale `field.law.final`.

    **Arguments:** `field`, from `plug_in_field`, `dps_field`, `doob_field` or `fmrg_field`;
    `times`, increasing; `solver`, with eta > 0 (default `Ancestral()`).

    **Raises:** `ValueError` for a solver without noise, which has no weights, and for a tilt
    without finite mass.
    """
    _checks.instance(field, AffineField, "field", "such as plug_in_field(prior, reward, scale)")
    solver = ancestral(solver)
    dtype = field.prior.means.dtype
    times = grids.time_grid(_checks.finite(times, "times", 1), None).astype(dtype)
    law, base_end = _path_law(field, times, solver.eta.astype(dtype))
    tilts.check_mass(base_end, field.form, field.law.final)
    return law


def ancestral(solver: solvers.Ancestral | None) -> solvers.Ancestral:
    """The solver of a weighted chain. **Raises:** `ValueError` for a solver without noise."""
    solver = solvers.Ancestral() if solver is None else solver
    if not isinstance(solver, solvers.Ancestral):
        raise ValueError(
            "the weights need a solver with noise: solver must be Ancestral, got "
            f"{type(solver).__name__}"
        )
    if _checks.concrete(solver.eta) and np.asarray(solver.eta) == 0:
        raise ValueError(
            "at eta = 0 the chain has no noise, so it has no weights: use Ancestral(eta) with "
            "eta > 0"
        )
    return solver


@eqx.filter_jit
def _path_law(field: AffineField, times: Array, eta: Array) -> tuple[PathLaw, GaussianMixture]:
    """`path_law`, and the law of the end of the base chain."""
    form, scale, noise = field.form, field.law.final, field.interpolant.sigma(times[0]) ** 2
    first = finite_steps.start_step(field.unguided(), times[0])
    one_step = lambda interval: chain_step(field, eta, *interval)
    steps = jax.lax.map(one_step, (times[:-1], times[1:]))
    moments, _ = jax.lax.scan(
        lambda moments, step: (forward(moments, step), None), _start(first, noise), steps
    )
    base_end = moments.base_end(field.prior, noise)
    log_norm = tilts.tilt_by_form(base_end, form, scale).log_norm
    bound = evidence_bound(form, scale, moments)
    value, _ = jax.lax.scan(
        lambda value, step: (backward(value, step), None),
        _exponential(form, 2 * scale),
        steps,
        reverse=True,
    )
    second = value.composed(first.matrix, first.constant).smoothed(noise)
    log_second = jnp.where(second.finite, second.constant, jnp.inf)
    ess = jnp.where(second.finite, jnp.exp(2 * log_norm - second.constant), 0.0)
    floor = log_norm - expected_log_h(form, scale, moments, noise)
    return PathLaw(log_norm, bound, log_norm - bound, log_second, ess, floor), base_end


class Step(NamedTuple):
    """One step of both chains. The base chain's mean is `matrix x + constant`, the guidance's shift
    is `delta = shift_matrix x + shift_constant + noise z`, and `variance` is `s^2`, 0 in the last
    step.
    """

    matrix: Array
    constant: Array
    shift_matrix: Array
    shift_constant: Array
    noise: Array
    variance: Array


class Moments(NamedTuple):
    """The state of the forward recursion: `mean` and `cov` of Q; `cost`, the sum of
    `E_Q|delta|^2 / (2 s^2)`; and the law of the base chain given the noise x_0 of its start,
    `N(response x_0 + base_mean, base_cov)`.
    """

    mean: Array
    cov: Array
    cost: Array
    base_mean: Array
    base_cov: Array
    response: Array

    def base_end(self, prior: GaussianMixture, noise: Array) -> GaussianMixture:
        """The law of the end of the base chain, if `x_0 ~ N(0, noise I)`."""
        cov = self.base_cov + noise * self.response @ self.response.T
        return prior.replace(prior.log_weights, self.base_mean[None], ((cov + cov.T) / 2)[None])


def _start(first: finite_steps.Affine, noise: Array) -> Moments:
    matrix, mean = first.matrix, first.constant
    zero, nothing = jnp.zeros((), mean.dtype), jnp.zeros_like(matrix)
    return Moments(mean, noise * matrix @ matrix.T, zero, mean, nothing, matrix)


def chain_step(field: AffineField, eta: Array, t: Array, u: Array) -> Step:
    """The step from t to u. A step to u = 1 jumps to the denoiser, unguided."""
    base = field.unguided().at(t)
    matrix, constant = base.matrix, base.constant

    def guided() -> Step:
        denoiser = field.at(t)
        decay, gain, variance = finite_steps.ancestral_step(field.interpolant, t, u, eta)
        return Step(
            decay * jnp.eye(len(matrix), dtype=matrix.dtype) + gain * matrix,
            gain * constant,
            gain * (denoiser.matrix - matrix),
            gain * (denoiser.constant - constant),
            gain * denoiser.noise,
            variance,
        )

    def jump() -> Step:
        shift, shift_constant, noise = jax.tree.map(jnp.zeros_like, base)
        return Step(matrix, constant, shift, shift_constant, noise, jnp.zeros((), matrix.dtype))

    return jax.lax.cond(u < 1, guided, jump)


def forward(moments: Moments, step: Step) -> Moments:
    """The moments after a step."""
    mean, cov = moments.mean, moments.cov
    matrix, noise, variance = step.matrix, step.noise, step.variance
    eye = jnp.eye(len(mean), dtype=mean.dtype)
    delta = step.shift_matrix @ mean + step.shift_constant
    size = (
        delta @ delta + jnp.sum((step.shift_matrix @ cov) * step.shift_matrix) + jnp.sum(noise**2)
    )
    twice = jnp.where(variance > 0, 2 * variance, 1.0)  # a step without noise is not guided
    guided = matrix + step.shift_matrix
    return Moments(
        mean=matrix @ mean + step.constant + delta,
        cov=guided @ cov @ guided.T + noise @ noise.T + variance * eye,
        cost=moments.cost + jnp.where(variance > 0, size / twice, 0.0),
        base_mean=matrix @ moments.base_mean + step.constant,
        base_cov=matrix @ moments.base_cov @ matrix.T + variance * eye,
        response=matrix @ moments.response,
    )


def evidence_bound(form: QuadraticForm, scale: Array, moments: Moments) -> Array:
    """`E_Q[log w] = scale E_Q[r(x_N)] - cost`."""
    mean, cov, cost = moments.mean, moments.cov, moments.cost
    bound = scale * (_value(form, mean) - jnp.sum(form.matrix * cov)) - cost
    # A chain whose steps are too long for stiff guidance exceeds the floating-point range.
    return jnp.where(jnp.isfinite(jnp.sum(mean) + jnp.sum(cov) + cost), bound, -jnp.inf)


def backward(value: _Exponential, step: Step) -> _Exponential:
    """`V_j` from `V_{j+1}`."""
    # As a function of (x, z): V at the mean minus delta, then the cost of delta.
    value = value.smoothed(step.variance).composed(
        jnp.concatenate([step.matrix - step.shift_matrix, -step.noise], axis=1),
        step.constant - step.shift_constant,
    )
    noisy, shift = step.variance > 0, step.shift_constant
    cost = jnp.where(noisy, 2 / jnp.where(noisy, step.variance, 1.0), 0.0)
    shift_matrix = jnp.concatenate([step.shift_matrix, step.noise], axis=1)
    with_cost = _Exponential(
        value.constant + cost * shift @ shift / 2,
        value.linear + cost * shift_matrix.T @ shift,
        value.curvature - cost * shift_matrix.T @ shift_matrix,
        value.finite,
    )
    return with_cost.marginal(len(step.matrix))


def expected_log_h(form: QuadraticForm, scale: Array, moments: Moments, noise: Array) -> Array:
    """`E log h_0(x_0)` for `x_0 ~ N(0, noise I)`, where `h_0`, the tilted end of the base chain
    given `x_0`, is the exponential of a quadratic function of `x_0`.
    """
    base_cov, response = moments.base_cov, moments.response
    eye = jnp.eye(len(base_cov), dtype=base_cov.dtype)
    log_h = _exponential(form, scale)
    spread = jnp.linalg.inv(eye + base_cov @ log_h.curvature)
    log_h = log_h.composed(eye, moments.base_mean)
    curvature = log_h.curvature @ spread
    expected = (
        log_h.constant
        + jnp.linalg.slogdet(spread)[1] / 2
        + log_h.linear @ spread @ base_cov @ log_h.linear / 2
    )
    return expected - noise * jnp.sum((curvature @ response) * response) / 2


def path_limit(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array, *, fresh: bool = False
) -> PathLaw:
    """`path_law` of eta = 1 in the limit of small steps, in closed form, for guidance at the
    denoiser (`dps_field`).

    In each common eigen-direction of S and H, with `a = scale h s^2` and y the reward's maximizer
    measured from the mean,

        KL
            [a - log(1 + 2a)] / 2 + (1 - e^{-4a}) / 8
                + scale h y^2 [(1 + e^{-4a}) / 2 - 1 / (1 + 2a)]
        E[w^2] e^{-scale h y^2 (1 + tan q) - a} / sqrt(cos 2a + sin 2a),  q = pi / 4 - 2a,
            a < 3 pi / 8.

    If `fresh` is True, the guidance is `plug_in_field`, with one new draw per step. The law of the
    ends is the same, but in each direction KL is larger by `a^2` and the effective sample size is
    smaller by the factor `e^{2 a^2}`.

    **Raises:** `ValueError` for a mixture, for S and H that do not commute (not checked if they are
    traced), and as `theory.plug_in_law`.
    """
    check_mixture(prior, "prior")
    fresh = _checks.flag(fresh, "fresh")
    if len(prior.log_weights) != 1:
        raise ValueError(
            "this closed form needs one Gaussian, got a mixture of "
            f"{len(prior.log_weights)} components"
        )
    dtype = prior.means.dtype
    scale = _checks.nonnegative(scale, "scale").astype(dtype)
    form = _pytree.cast(tilts.quadratic_form(rewards.as_reward(reward), prior.dim), dtype)
    flow_laws.check_domain(prior, form, scale)
    if _checks.concrete((prior.covs, form.matrix)) and not flow_laws.commute(
        prior.covs, form.matrix
    ):
        raise ValueError(
            "this closed form needs a covariance that commutes with the reward's matrix H. Use "
            "path_law with many steps instead."
        )
    mean, cov = prior.means[0], prior.covs[0]
    # The terms in y need a basis. The other terms are functions of scale S^(1/2) H S^(1/2).
    axes = flow_laws.common_axes(cov, form.matrix)
    s2 = jnp.maximum(jnp.einsum("ij,ik,kj->j", axes, cov, axes), 0)
    a = scale * s2 * jnp.einsum("ij,ik,kj->j", axes, form.matrix, axes)
    # scale h y^2 = strength / a. This form is finite also where h = 0 and y is infinite.
    strength = (
        scale**2 * s2 * (axes.T @ (form.matrix @ (form.center - mean) + form.gradient / 2)) ** 2
    )
    log_norm = tilts.tilt_by_form(prior, form, scale).log_norm
    kl = jnp.sum(_spread_cost(a) + strength * _mean_cost(a))
    finite = jnp.all(a < 3 * jnp.pi / 8)
    inside = jnp.where(a < 3 * jnp.pi / 8, a, 0.5)
    log_ess = jnp.sum(
        inside - jnp.log1p(2 * inside) + jnp.log(jnp.cos(2 * inside) + jnp.sin(2 * inside)) / 2
        + strength * _mean_loss(inside)
    )  # fmt: skip
    if fresh:
        kl, log_ess = kl + jnp.sum(a**2), log_ess - 2 * jnp.sum(inside**2)
    log_second = jnp.where(finite, 2 * log_norm - log_ess, jnp.inf)
    ess = jnp.where(finite, jnp.exp(log_ess), 0.0)
    return PathLaw(log_norm, log_norm - kl, kl, log_second, ess, jnp.zeros_like(kl))


def _value(form: QuadraticForm, x: Array) -> Array:
    offset = x - form.center
    return form.value + form.gradient @ offset - offset @ form.matrix @ offset


def _exponential(form: QuadraticForm, scale: Array) -> _Exponential:
    """`exp(scale * r)`."""
    zero = jnp.zeros_like(form.center)
    linear = scale * (form.gradient + 2 * form.matrix @ form.center)
    return _Exponential(
        scale * _value(form, zero), linear, 2 * scale * form.matrix, jnp.asarray(True)
    )


def _with_series(a: Array, series: list[float], lowest: int, closed) -> Array:
    """`closed(a)`, and for small a, where the closed form cancels, its power series from
    `a^lowest`.
    """
    small = a < 0.05
    x = jnp.where(small, a, 0.0)
    terms = [c * x ** (lowest + i) for i, c in enumerate(series)]
    return jnp.where(small, sum(terms[1:], terms[0]), closed(jnp.where(small, 1.0, a)))


def _spread_cost(a: Array) -> Array:
    """`[a - log(1 + 2a)] / 2 + (1 - e^{-4a}) / 8`, which is of fourth order in a."""
    factorial = np.cumprod(np.arange(1.0, 21.0))
    series = [(-1) ** n * (2**n / (2 * n) - 4**n / (8 * factorial[n - 1])) for n in range(4, 20)]
    return _with_series(a, series, 4, lambda a: (a - jnp.log1p(2 * a)) / 2 - jnp.expm1(-4 * a) / 8)


def _mean_cost(a: Array) -> Array:
    """`[(1 + e^{-4a}) / 2 - 1 / (1 + 2a)] / a`, which is of second order in a."""
    factorial = np.cumprod(np.arange(1.0, 21.0))
    series = [(-1) ** n * (4**n / (2 * factorial[n - 1]) - 2**n) for n in range(3, 19)]
    return _with_series(a, series, 2, lambda a: ((1 + jnp.exp(-4 * a)) / 2 - 1 / (1 + 2 * a)) / a)


def _mean_loss(a: Array) -> Array:
    """`[1 + tan(pi / 4 - 2a) - 2 / (1 + 2a)] / a`, which is of second order in a."""
    return _with_series(
        a, _MEAN_LOSS, 2, lambda a: (1 + jnp.tan(jnp.pi / 4 - 2 * a) - 2 / (1 + 2 * a)) / a
    )


def _tangent_series(terms: int) -> list[float]:
    # f = tan(pi / 4 - x) solves f' = -(1 + f^2), f(0) = 1. The result is its coefficients, in
    # x = 2a, minus those of 2 / (1 + x) - 1.
    f = [1.0]
    for n in range(terms + 2):
        square = sum(f[i] * f[n - i] for i in range(n + 1))
        f.append(-(square + (n == 0)) / (n + 1))
    return [(f[n] - 2 * (-1) ** n) * 2.0**n for n in range(3, terms + 3)]


_MEAN_LOSS = _tangent_series(18)
