r"""The law of a flow guided by the *mean* drift, on the line, for any Gaussian mixture: inside
modes and between them.

A guided flow `dx/dt = b + (g^2 / 2) ∇ log h` whose guidance is random (fresh draws of X_1 at every
step) follows the mean of its drift in the limit of small steps. `plug_in_law` solves that flow for
one Gaussian; for a mixture it assumes that the draws never change component as x moves. This module
does not need that assumption. With `kappa = alpha / sigma` (the root of the signal-to-noise ratio)
and `u = x / sigma`,

    du/dkappa = M(u),    u = N(0, 1) at kappa = 0,    X_1 = lim u / kappa,

because `g^2 / 2 = kappa' sigma^3 / alpha` for the memoryless g, and because
`E[X_1 | x] + (sigma^2 / alpha) ∇ log h` is the guided denoiser M. The flow does not depend on the
interpolant. With `∂/∂x E[f(X_1) | x] = (alpha / sigma^2) Cov(f(X_1), X_1 | x)`,

| drift | M |
|---|---|
| `plug_in_drift`: `scale ∇ E[r(X_1) \| x]` | `E[X_1 \| x] + scale Cov(r(X_1), X_1 \| x)` |
| `dps_drift`: guidance `scale ∇ r(D(x))`, `D = E[X_1 \| x]` | `D + scale r'(D) Var(X_1 \| x)` |
| `doob_drift`: `∇ log E[e^(scale r) \| x]` | `E[X_1 e^(scale r) \| x] / E[e^(scale r) \| x]` |

For a mixture `Cov(r, X_1 | x) = sum_k p_k (v_k E_k[r'] + (m_k - D) E_k[r])`. The second term moves
mass between modes. It is large, but only in a narrow strip where no posterior weight `p_k` is near
0 or 1.

**Clock.** Let `kappa s = tan(theta)`, s the prior's standard deviation, and `x = cos(theta) u`.
Then x has unit variance and moves from N(0, 1) at theta = 0 to `X_1 / s` at theta = pi/2,

    dx/dtheta = (M / s - sin(theta) x) / cos(theta),

where for component k and `rho = s_k / s` the posterior mean contributes
`lag_k = cos(theta) (mu_k / s + sin(theta) x (rho^2 - 1)) / (cos(theta)^2 + sin(theta)^2 rho^2)`.
This form has no cancellation at either end.

A flow on the line is monotone. The flow therefore carries the normal's quantiles to the law's
quantiles, and the distribution function at a point follows from tracing that point back. The masses
of modes need no search for the separatrix.

Reference, for one Gaussian: Dandapanthula and Boffi (arXiv 2606.02884).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr, ndtri
from jaxtyping import Array

from theory._solve import end_of
from theory.quadrature import GridTilt
from theory.tilts import Tilt, is_quadratic
from tiltjax import _checks, _pytree, rewards, scales
from tiltjax.mixtures import GaussianMixture, check_mixture

_REACH = 8.5  # standard deviations of the start
# On the way back the drift is frozen beyond this value; some rewards would otherwise carry the
# state to infinity in finite time.
_FAR = 1e4
_FINE, _COARSE = (
    (257, 257, 73, 1.0),
    (193, 193, 55, 30.0),
)  # starts, ends, nodes of a reward's expectation, tolerance


class PointPosterior(eqx.Module):
    """The posterior of X_1 at one point, the argument of a drift, in a form without cancellation
    near the data.

    **Fields:** `weights`, `means` `(K,)` of the components; `unit = s cos(theta)`, a length that
    decreases to 0; `lag` `(K,)`, `(means - x sin(theta) s) / unit`; `spread` `(K,)`, the
    components' standard deviations over `unit`; `nodes` for expectations. A drift returns the lag
    of its guided denoiser, `(M - x sin(theta) s) / unit`; that of the unguided denoiser is
    `weights @ lag`.
    """

    weights: Array
    means: Array
    unit: Array
    lag: Array
    spread: Array
    nodes: int = eqx.field(static=True)

    def expect(self, fn: Callable[[Array], Array]) -> Array:
        """`E[fn(X_1)]` in each component, `(K,)`, for `fn` of one number, by the trapezoidal rule
        on ± 9 standard deviations.
        """
        z = np.linspace(-9, 9, self.nodes)
        weight = np.exp(-(z**2) / 2)
        z, weight = (jnp.asarray(part, self.lag.dtype) for part in (z, weight / weight.sum()))
        expectation = lambda mean, std: weight @ jax.vmap(lambda z: fn(mean + std * z))(z)
        return jax.vmap(expectation)(self.means, self.spread * self.unit)


Drift = Callable[[PointPosterior, rewards.Reward, Array], Array]


def plug_in_drift(posterior: PointPosterior, reward: rewards.Reward, scale: Array) -> Array:
    """The lag of `D + scale Cov(r(X_1), X_1 | x)`, the mean of plug-in guidance with one draw; a
    scalar, at one point.
    """
    r, slope = _scalar_reward(reward)
    if is_quadratic(reward):
        variance = (posterior.spread * posterior.unit) ** 2
        mean_slope = jax.vmap(slope)(posterior.means)
        value = jax.vmap(lambda m, v: r(m) + jax.grad(slope)(m) * v / 2)(posterior.means, variance)
    else:
        mean_slope, value = posterior.expect(slope), posterior.expect(r)
    base = posterior.weights @ posterior.lag
    return base + scale * posterior.weights @ (
        posterior.spread**2 * posterior.unit * mean_slope + (posterior.lag - base) * value
    )


def dps_drift(posterior: PointPosterior, reward: rewards.Reward, scale: Array) -> Array:
    """The lag of `D + scale r'(D) Var(X_1 | x)`, for the guidance `∇ r(D(x))`, the reward's
    gradient at the denoiser.
    """
    base = posterior.weights @ posterior.lag
    _, slope = _scalar_reward(reward)
    # In units of unit^2.
    variance = posterior.weights @ (posterior.spread**2 + (posterior.lag - base) ** 2)
    return base + scale * slope(posterior.weights @ posterior.means) * posterior.unit * variance


def doob_drift(posterior: PointPosterior, reward: rewards.Reward, scale: Array) -> Array:
    """The lag of the mean of the tilted posterior. The law of this drift is the tilt."""
    r, slope = _scalar_reward(reward)
    if is_quadratic(reward):
        variance = (posterior.spread * posterior.unit) ** 2
        gradient = jax.vmap(slope)(posterior.means)
        bend = jax.vmap(jax.grad(slope))(posterior.means)
        factor = 1 - scale * bend * variance
        gain = variance / factor * scale * gradient  # of a component's mean
        log_weight = (
            scale * jax.vmap(r)(posterior.means) - jnp.log(factor) / 2 + scale * gradient * gain / 2
        )
        moved = posterior.lag + posterior.spread**2 * posterior.unit / factor * scale * gradient
        return jax.nn.softmax(jnp.log(posterior.weights) + log_weight) @ moved
    # All nodes and components share one constant, so that exp(scale r) neither overflows nor
    # changes its ratios.
    z = jnp.linspace(-9.0, 9.0, posterior.nodes, dtype=posterior.lag.dtype)
    points = posterior.means[:, None] + (posterior.spread * posterior.unit)[:, None] * z[None]
    log_mass = (
        scale * jax.vmap(jax.vmap(r))(points)
        - (z**2)[None] / 2
        + jnp.log(posterior.weights)[:, None]
    )
    mass = jax.nn.softmax(log_mass.reshape(-1)).reshape(log_mass.shape)
    return jnp.sum(mass * (posterior.lag[:, None] + posterior.spread[:, None] * z[None]))


class MeanDriftLaw(eqx.Module):
    """The law of the samples of a flow with a given mean drift, on the line; built by
    `mean_drift_law`.

    `cdf`, `quantile`, `log_prob` and `masses` solve the flow for their points. Moments and
    `wasserstein` use a table of points, dense both in the normal's coordinate (for modes) and in x
    (for gaps between modes); `error` estimates the error of the table. Everything compiles and
    vectorizes. The reverse-mode derivatives of `cdf` and `quantile` are those of the solver; the
    derivatives of moments are right up to the table's error.
    """

    prior: GaussianMixture
    reward: rewards.Reward
    scale: scales.Scale
    unit: Array
    points: tuple[Array, Array, Array] | None
    drift: Drift = eqx.field(static=True)
    nodes: int = eqx.field(static=True)

    @property
    def dim(self) -> int:
        """The dimension, 1."""
        return 1

    def expect(self, fn: Callable[[Array], Array]) -> Array:
        """`E[fn(X)]`, for `fn` of one number, from the table. It is accurate for functions that are
        smooth inside the table's cells.
        """
        _, x, mass = self._table()
        return jnp.tensordot(mass, jax.vmap(fn)(x), axes=1) / jnp.sum(mass)

    def mean(self) -> Array:
        """`E[X]`, a scalar."""
        return self.expect(lambda x: x)

    def var(self) -> Array:
        """`Var(X)`, a scalar."""
        mean = self.mean()
        return self.expect(lambda x: (x - mean) ** 2)

    def error(self) -> tuple[Array, Array]:
        """Estimates of the errors of `mean` and `var`: the changes with 3/4 of the table, 3/4 of
        the nodes and 30 times the tolerance.
        """
        starts, ends, nodes, tolerance_factor = _COARSE
        nodes = self.nodes if is_quadratic(self.reward) else nodes * self.nodes // _FINE[2]
        points = _points(self, starts, ends, nodes, tolerance_factor)
        coarse = MeanDriftLaw(
            self.prior, self.reward, self.scale, self.unit, points, self.drift, self.nodes
        )
        return jnp.abs(self.mean() - coarse.mean()), jnp.abs(self.var() - coarse.var())

    def quantile(self, level: Array) -> Array:
        """The point below which the law has mass `level`, for one level in (0, 1)."""
        return self.transport(ndtri(jnp.asarray(level, self.unit.dtype)))

    def cdf(self, x: Array) -> Array:
        """`P(X <= x)`, for one number x."""
        return ndtr(self._trace_back(x)[0])

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point, a number or of shape `(1,)`, from the flow traced back and
        the integral of its divergence.
        """
        z, log_slope = self._trace_back(jnp.reshape(x, ()))
        return -(z**2) / 2 - np.log(2 * np.pi) / 2 - log_slope - jnp.log(self.unit)

    def masses(self, edges: _checks.Numbers) -> Array:
        """The masses `(n + 1,)` of the intervals between n increasing edges: `masses([c])[1]` is
        `P(X > c)`.

        **Raises:** `ValueError` for edges that do not increase.
        """
        edges = _checks.finite(edges, "edges", 1)
        if _checks.concrete(edges) and np.any(np.diff(np.asarray(edges)) <= 0):
            raise ValueError(f"edges must increase, got {np.asarray(edges)}")
        z, _ = _flow(self, edges.astype(self.unit.dtype) / self.unit, True, self.nodes, 1.0)
        infinite = jnp.full((1,), jnp.inf, z.dtype)
        return _interval_masses(jnp.concatenate([-infinite, z, infinite]))

    def transport(self, z: Array) -> Array:
        """The point of this law to which the guided flow carries the point z of N(0, 1)."""
        start = jnp.asarray(z, self.unit.dtype)[None]
        return self.unit * _flow(self, start, False, self.nodes, 1.0)[0][0]

    def sample(self, key: Array, num: int) -> Array:
        """`num` independent draws, `(num, 1)`."""
        start = jax.random.normal(_checks.key(key), (_checks.count(num, "num"),), self.unit.dtype)
        return self.unit * _flow(self, start, False, self.nodes, 1.0)[0][:, None]

    def wasserstein(self, other: "MeanDriftLaw | GaussianMixture | Tilt | GridTilt") -> Array:
        """W2 to another law on the line, by the quantile coupling `∫ (Q - Q')^2 dp`. Both quantile
        functions are piecewise linear, with errors of about 1e-4.
        """
        return _quantile_distance(*quantile_curve(self), *quantile_curve(other))

    def _table(self) -> tuple[Array, Array, Array]:
        assert self.points is not None  # None only while the table is being built
        return self.points

    def _trace_back(self, x: Array) -> tuple[Array, Array]:
        end = (jnp.asarray(x, self.unit.dtype) / self.unit)[None]
        z, log_slope = _flow(self, end, True, self.nodes, 1.0)
        return z[0], log_slope[0]


def mean_drift_law(
    prior: GaussianMixture,
    reward: Callable,
    scale: float | Array | scales.Scale,
    *,
    drift: Drift = plug_in_drift,
    nodes: int = _FINE[2],
) -> MeanDriftLaw:
    """The law of a flow guided by the mean of a random guidance, on the line, in the limit of small
    steps.

    For one Gaussian and a quadratic reward this is `plug_in_law`. Between modes it is the limit of
    plug-in guidance with fresh draws as the number of steps grows. The convergence is slow, because
    the drift that moves mass between modes comes from rare and very large draws of the guidance.

    **Arguments:** `prior`, a mixture on the line with positive variances; `reward`, smooth, on
    states of shape `(1,)`; `scale`, a number or `Damped`; `drift`, `plug_in_drift`, `dps_drift`,
    `doob_drift` or a function `(PointPosterior, reward, scale) -> lag`; `nodes` of the expectations
    of a reward that is not quadratic, by default a quarter of a posterior standard deviation apart.

    **Raises:** `ValueError` for more than one dimension, for a component without variance, for a
    scale law that does not depend on time alone, and for `StepReward`. The gradient of `StepReward`
    is zero: plug-in guidance with fresh draws and DPS do not change the prior. `RuntimeError` from
    the solver where the flow is too stiff (`scale h s^2` in the thousands; in single precision also
    points far outside of the law).
    """
    check_mixture(prior, "prior")
    _checks.function(drift, "drift")
    if prior.dim != 1:
        raise ValueError(
            f"the law of the mean drift is computed on the line, got dimension {prior.dim}: "
            "project the problem onto a line, or simulate"
        )
    law = _pytree.cast(scales.as_scale(scale), prior.means.dtype)
    if not isinstance(law, scales.Constant | scales.Damped):
        raise ValueError(f"the scale must be a number or Damped, got {type(law).__name__}")
    reward = _pytree.cast(rewards.as_reward(reward), prior.means.dtype)
    if has_step(reward):
        raise ValueError(
            "StepReward has gradient zero almost everywhere. With fresh draws, plug-in and DPS do "
            "not change the prior, and the gradient of E[r(X_1) | x] is not the mean of either. "
            "Use theory.quadrature.tilt for the tilt, or theory.best_of_n for selection."
        )
    if _checks.concrete(prior.covs) and not np.all(np.asarray(prior.covs) > 0):
        raise ValueError("every component needs a positive variance: give point masses a small one")
    nodes = _checks.count(nodes, "nodes")
    build = lambda points: MeanDriftLaw(
        prior, reward, law, jnp.sqrt(prior.cov()[0, 0]), points, drift, nodes
    )
    starts, ends, _, tolerance_factor = _FINE
    return build(_points(build(None), starts, ends, nodes, tolerance_factor))


def quantile_curve(law: Any) -> tuple[Array, Array]:
    """`(z, x)`, increasing: points `x` of a law on the line and `z = Phi^{-1}(P(X <= x))`, for a
    mixture, a tilt, or the law of a mean drift.

    **Raises:** `ValueError` for more than one dimension, `TypeError` for any other law.
    """
    law = law.mixture if isinstance(law, Tilt) else law
    if isinstance(law, MeanDriftLaw):
        return law._table()[:2]
    if not isinstance(law, GaussianMixture | GridTilt):
        raise TypeError(
            "expected a law on the line (GaussianMixture, Tilt, GridTilt, MeanDriftLaw), got "
            f"{type(law).__name__}"
        )
    if isinstance(law, GridTilt):
        if len(law.cell) != 1:
            raise ValueError(f"expected a law on the line, got dimension {len(law.cell)}")
        mass = jnp.exp(law.log_masses)
        below, above = jnp.cumsum(mass), jnp.cumsum(mass[::-1])[::-1]
        edges, log_below, log_above = (
            law.centers[:-1, 0] + law.cell / 2,
            jnp.log(below[:-1]),
            jnp.log(above[1:]),
        )
        return _normal_quantile(log_below, log_above), edges
    if law.dim != 1:
        raise ValueError(f"expected a law on the line, got dimension {law.dim}")
    return _mixture_curve(law)


@eqx.filter_jit
def _mixture_curve(law: GaussianMixture) -> tuple[Array, Array]:
    std = jnp.sqrt(law.covs[:, 0, 0])
    grid = jnp.linspace(-_REACH, _REACH, 1601, dtype=std.dtype)
    x = jnp.sort((law.means + std[:, None] * grid[None]).reshape(-1))
    z = (x[:, None] - law.means[None, :, 0]) / std[None]
    tail = lambda sign: jax.nn.logsumexp(law.log_weights[None] + log_ndtr(sign * z), axis=1)
    return _normal_quantile(tail(1), tail(-1)), x


@jax.jit
def _quantile_distance(z: Array, x: Array, z_other: Array, x_other: Array) -> Array:
    levels = jnp.sort(jnp.concatenate([z, z_other]))
    gap = jnp.interp(levels, z, x) - jnp.interp(levels, z_other, x_other)
    square = jnp.sum(
        _interval_masses(levels) * (gap[1:] ** 2 + gap[1:] * gap[:-1] + gap[:-1] ** 2) / 3
    )
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _interval_masses(z: Array) -> Array:
    """The normal masses between increasing points, as differences of the smaller tail."""
    low, high = z[:-1], z[1:]
    return jnp.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))


def _normal_quantile(log_below: Array, log_above: Array) -> Array:
    """The normal quantile of a probability, from the smaller tail."""
    least = np.log(np.finfo(log_below.dtype).tiny) + 1.0
    score = lambda log_p: ndtri(jnp.exp(jnp.clip(log_p, least, np.log(0.5))))
    return jnp.where(log_below < log_above, score(log_below), -score(log_above))


def _points(
    law: MeanDriftLaw, starts: int, ends: int, nodes: int, tolerance_factor: float
) -> tuple[Array, Array, Array]:
    """Quadrature points of the law: normal scores, positions, masses.

    The flow is computed, with its slope, from starts evenly spaced in z and back from ends evenly
    spaced in x. Between neighbors its graph is a cubic in z where it is flat, and a cubic in x
    where it is steep.
    """
    z = jnp.linspace(-_REACH, _REACH, starts, dtype=law.unit.dtype)
    x, log_slope = _flow(law, z, False, nodes, tolerance_factor)
    inner = jnp.linspace(x[0], x[-1], ends + 2, dtype=x.dtype)[1:-1]
    inner_z, inner_slope = _flow(law, inner, True, nodes, tolerance_factor)
    pairs = (x, inner), (z, inner_z), (log_slope, inner_slope)
    return _quadrature(*(jnp.concatenate(pair) for pair in pairs), law.unit)


@jax.jit
def _quadrature(x: Array, z: Array, log_slope: Array, unit: Array) -> tuple[Array, Array, Array]:
    """Normal scores, positions and masses of four Gauss-Legendre points per cell of the graph."""
    dtype = unit.dtype
    order = jnp.argsort(x)
    x, z, log_slope = x[order], z[order], jnp.clip(log_slope[order], -80, 80)
    dx, dz = jnp.diff(x)[:, None], jnp.diff(z)[:, None]
    node, weight = (jnp.asarray(part, dtype)[None] for part in np.polynomial.legendre.leggauss(4))
    tau, weight = (1 + node) / 2, weight / 2

    def cubic(values: Array, slopes: Array, width: Array) -> tuple[Array, Array]:
        """The Hermite cubic between neighbors at tau, and its derivative in tau."""
        rise = jnp.diff(values)[:, None]
        left, right = slopes[:-1, None] * width, slopes[1:, None] * width
        bend, turn = 3 * rise - 2 * left - right, left + right - 2 * rise
        return values[:-1, None] + tau * (left + tau * (bend + tau * turn)), left + tau * (
            2 * bend + 3 * tau * turn
        )

    steep = dx > dz
    # The branch that is not used must not overflow, so its slopes are bounded.
    over_z, _ = cubic(x, jnp.exp(jnp.minimum(log_slope, 20.0)), dz)
    over_x, rate = cubic(z, jnp.exp(jnp.minimum(-log_slope, 20.0)), dx)
    score = jnp.where(steep, over_x, z[:-1, None] + tau * dz)
    place = jnp.where(steep, x[:-1, None] + tau * dx, over_z)
    mass = jnp.where(steep, rate, dz) * weight * jnp.exp(-(score**2) / 2) / np.sqrt(2 * np.pi)
    return score.reshape(-1), unit * place.reshape(-1), mass.reshape(-1)


def _flow(
    law: MeanDriftLaw, start: Array, backwards: bool, nodes: int, tolerance_factor: float
) -> tuple[Array, Array]:
    """Ends of the flow from points `(n,)`, in units of s, and its log-slope `log dx/dz` there, in
    either direction.
    """
    tolerance = jnp.asarray(
        tolerance_factor * (1e-9 if start.dtype == jnp.float64 else 1e-5), start.dtype
    )
    # The times and the tolerance are arguments, so that both directions share one program.
    begin, end = (np.pi / 2, 0.0) if backwards else (0.0, np.pi / 2)
    times = jnp.asarray([begin, end], start.dtype)
    flow = MeanDriftLaw(law.prior, law.reward, law.scale, law.unit, None, law.drift, law.nodes)
    # Several points are padded to whole tables, to use a program that is already compiled.
    count = len(start)
    padding = -count % _FINE[0] if count > 1 else 0
    padded = jnp.concatenate([start, jnp.broadcast_to(start[:1], (padding,))])
    x, log_slope = (leaf[:count] for leaf in _solve(flow, padded, times, tolerance, nodes))
    return x, -log_slope if backwards else log_slope


@eqx.filter_jit
def _solve(
    law: MeanDriftLaw, start: Array, times: Array, tolerance: Array, nodes: int
) -> tuple[Array, Array]:
    prior, unit = law.prior, law.unit
    means, ratio = prior.means[:, 0] / unit, jnp.sqrt(prior.covs[:, 0, 0]) / unit

    far = jnp.where(times[0] > times[1], _FAR, jnp.inf)

    def rate(theta: Array, x: Array) -> Array:
        cos, sin = jnp.cos(theta), jnp.sin(theta)
        width = cos**2 + sin**2 * ratio**2
        x = jnp.clip(x, -far, far)
        weights = jax.nn.softmax(
            prior.log_weights - jnp.log(width) / 2 - (x - sin * means) ** 2 / (2 * width)
        )
        lag = cos * (means + sin * x * (ratio**2 - 1)) / width
        mean = unit * (cos**2 * means + sin * x * ratio**2) / width
        posterior = PointPosterior(weights, mean, unit * cos, lag, ratio / jnp.sqrt(width), nodes)
        return law.drift(posterior, law.reward, strength_at(law.scale, cos, sin / unit))

    def field(theta: Any, y: tuple[Array, Array], args: None) -> tuple[Array, Array]:
        return jax.jvp(lambda x: rate(theta, x), (y[0],), (jnp.ones_like(y[0]),))

    def one(start: Array) -> tuple[Array, Array]:
        state = start, jnp.zeros_like(start)
        return end_of(field, state, times[0], times[1], tolerance, tolerance / 10)

    return jax.vmap(one)(start)


def strength_at(law: scales.Scale, cos: Array, sin: Array) -> Array:
    """The scale law at `snr = (sin / cos)^2`, in a form that is finite at the end."""
    if not isinstance(law, scales.Damped):
        return law.final
    variance = (law.sigma * cos) ** 2 / (cos**2 + (law.sigma * sin) ** 2)
    return law.final / (1 + 2 * law.final * variance)


def _scalar_reward(
    reward: rewards.Reward,
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """The reward as a function of a number, and its derivative."""
    r = lambda x: rewards.value(reward, x[None])
    return r, jax.grad(r)


def has_step(reward: rewards.Reward) -> bool:
    """Whether a reward is, or contains, a `StepReward`."""
    match reward:
        case rewards.Sum():
            return any(has_step(term) for term in reward.terms)
        case rewards.Scaled():
            return has_step(reward.reward)
    return isinstance(reward, rewards.StepReward)
