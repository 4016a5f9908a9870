r"""The law of plug-in guidance with any finite number k of draws, at a cost that does not grow with
k.

The prior is one Gaussian of covariance `s^2 I` and the reward is `-h |x - y|^2`. Lengths are
measured from the prior's mean, in units of s. The mean guidance of
`h^ = (1/k) sum_i exp(scale r(X_i))` is a flow. Its clock `w = sqrt(1 - v/s^2)`, with v the
posterior variance, runs from 0 to 1 and is the same for any interpolant with `alpha_0 = 0`. Its
state `z = x / sqrt(Var X_t)` starts from N(0, I) and ends at the sample:

    dz/dw = -2 a phi (w z - y),    a = scale h s^2,

because `w z` is the posterior mean m, and because by symmetry the expected weighted mean G of the
draws satisfies `G - y = phi (m - y)`. The shrinkage phi is 1 at k = 1 (the end of the flow is then
Dawson's integral), and `1 / (1 + 2 q)` at k = infinity (the tilt), with `q = a (1 - w^2)`.

**The shrinkage.** Let `X_i` be the draws, `u_i = q |X_i - y|^2 / v`, `W_i = exp(-u_i)`. From
`1/T = ∫ exp(-s T) ds`,

    E[sum_i W_i (X_i - y) / sum_i W_i] = k ∫_0^∞ E[W (X - y) e^{-s W}] E[e^{-s W}]^{k-1} ds.

Here `|X - y|^2 / v` is noncentral chi-square of d degrees (with density `p_d` of its root). Stein's
identity turns `E[(X - y) f(|X - y|)]` into `(m - y) E f` under d + 2 degrees. With `s = e^tau`,

    phi = k ∫ f_{d+2}(tau) (1 - ∫_{-∞}^tau f_d)^{k-1} dtau,  f_n(tau) = E_n[kappa(tau - u)],
        kappa(x) = exp(x - e^x):

Here f_d is the density of u plus Gumbel noise, and a softmax selects the least of these k sums.
Both integrals use Gauss-Legendre panels. The panels in tau are graded from the left tail, over the
unit scale of kappa, to the scale of u; those in u cover only the range where kappa is not
negligible. For each k and d, phi is a smooth function of q and `p = sqrt(q) |m - y| / sqrt(v)`, and
is interpolated by Chebyshev polynomials in `log(1 + 2 q)` and `log(1 + p^2)`. By axial symmetry the
state has two coordinates in any dimension: the coordinate along y and the radius across.

The limits k = 1 and k = infinity are the plug-in law and the tilt of `theory.flow_laws`, which
gives the source of the flow.
"""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array

from theory._solve import end_of
from tiltjax import _checks

_REACH = 9.5  # standard deviations of a normal vector's length, on either side of its typical value
# Largest scale * h * s^2: above it the explicit solver needs more than a few thousand steps.
_MAX_STRENGTH = 1.001e4
# Nodes of (the interpolant in q, in p, panels of tau, nodes of a panel, nodes of u): the usual
# rule, and a coarser rule for the error.
_FINE, _COARSE = (36, 56, 30, 14, 52), (28, 42, 24, 12, 44)


class DrawsLaw(eqx.Module):
    """The law of the samples of plug-in guidance with k draws, for one Gaussian, in the limit of
    small steps. It is not Gaussian for k > 1.

    The law is the push-forward of N(0, I) by `transport`. It has `mean`, `cov`, `sample` and
    `log_prob` as a mixture has, and `quantile` on the line. `plug_in_law` builds it. The
    law has no closed form; `error` estimates the error of the quadrature.

    The prior is `N(mu, s^2 I)` and the reward is `-h |x - y|^2`. Derivatives come from an
    interpolation of the shrinkage phi (`theory.many_draws`), with errors of about 1e-6. First
    derivatives work in either mode, second derivatives and those of `log_prob` in reverse mode. At
    `y = mu` in more than one dimension, the derivatives by y and mu are right only along the first
    axis.

    **Fields:** `center` `(d,)`, the prior's mean mu; the scalars `std`, which is s, and
    `strength = scale h s^2`; `distance`, that of y from mu in units of s, along `axis` `(d,)`.
    """

    center: Array
    std: Array
    strength: Array
    distance: Array
    axis: Array
    table: Array
    k: int | Array

    @property
    def dim(self) -> int:
        """The dimension d."""
        return len(self.center)

    @property
    def target(self) -> Array:
        """The reward's maximizer y, `(d,)`."""
        return self.center + self.std * self.distance * self.axis

    def mean(self) -> Array:
        """`E[X]`, shape `(d,)`."""
        return self.mean_and_cov()[0]

    def cov(self) -> Array:
        """`Cov(X)`, shape `(d, d)`, with one variance along `y - mu` and one variance across."""
        return self.mean_and_cov()[1]

    def mean_and_cov(self) -> tuple[Array, Array]:
        """The mean `(d,)` and the covariance `(d, d)`, from one solution of the flow."""
        mean, along, across = self._moments(self.table)
        outer = jnp.outer(self.axis, self.axis)
        cov = along * outer + across * (jnp.eye(self.dim, dtype=outer.dtype) - outer)
        return self.center + self.std * mean * self.axis, self.std**2 * cov

    def error(self) -> tuple[Array, Array]:
        """Estimates of the errors of `mean` (any coordinate) and of `cov` (any entry): the changes
        under a rule with 3/4 of the nodes.
        """
        count = jnp.asarray(self.k, self.strength.dtype)
        coarse = self._moments(_table(count, self.dim, self.strength, self.distance, _COARSE))
        fine = self._moments(self.table)
        change = [jnp.abs(one - other) for one, other in zip(fine, coarse, strict=True)]
        return self.std * change[0], self.std**2 * jnp.maximum(change[1], change[2])

    def transport(self, z: Array) -> Array:
        """The point `(d,)` of this law to which the guided flow carries the point z `(d,)` of N(0,
        I).
        """
        along = self.axis @ z
        rest = z - along * self.axis
        end, factor = self._flow(self.table, along[None], jnp.sum(rest**2)[None])
        return self.center + self.std * (end[0] * self.axis + factor[0] * rest)

    def sample(self, key: Array, num: int) -> Array:
        """`num` independent draws, `(num, d)`."""
        start = jax.random.normal(
            _checks.key(key), (_checks.count(num, "num"), self.dim), self.std.dtype
        )
        return self.center[None] + self.std * self._transport_rows(start)

    def quantile(self, level: Array) -> Array:
        """The point below which the law has mass `level`, on the line: the image of the normal
        quantile under the flow.

        **Raises:** `ValueError` for more than one dimension.
        """
        if self.dim != 1:
            raise ValueError(
                f"quantiles need a law on the line, got dimension {self.dim}: use sample or cov"
            )
        return self.transport(jax.scipy.special.ndtri(jnp.asarray(level, self.std.dtype))[None])[0]

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point. The flow is traced back, and its divergence
        `-2 a w (d phi + p dphi/dp)` is integrated (symbols as in `theory.many_draws`).

        For `scale h s^2` in the thousands the law is almost a point in double precision, and this
        method does not resolve its density.
        """
        state = (x - self.center) / self.std
        along = self.axis @ state
        square = jnp.sum((state - along * self.axis) ** 2)

        def drift(
            w: Array, y: tuple[Array, Array, Array], args: None
        ) -> tuple[Array, Array, Array]:
            offset = w * y[0] - self.distance
            p2 = self.strength * (offset**2 + (w * y[1]) ** 2 * square)
            phi, slope = jax.jvp(
                lambda p2: _interpolate(_row(self.table, self.strength, w), self._log_reach(), p2),
                (p2,),
                (p2,),
            )
            rate = -2 * self.strength
            return (
                rate * phi * offset,
                rate * phi * w * y[1],
                rate * w * (self.dim * phi + 2 * slope),
            )

        begin = along, jnp.ones_like(along), jnp.zeros_like(along)
        start, factor, volume = _solve(drift, begin, 1.0, 0.0)
        normal = -(start**2 + factor**2 * square + self.dim * jnp.log(2 * jnp.pi)) / 2
        # The flow runs backwards, so `volume` is minus its log-determinant.
        return normal + volume - self.dim * jnp.log(self.std)

    def _transport_rows(self, start: Array) -> Array:
        along = start @ self.axis
        rest = start - along[:, None] * self.axis[None]
        end, factor = self._flow(self.table, along, jnp.sum(rest**2, axis=1))
        return end[:, None] * self.axis[None] + factor[:, None] * rest

    def _moments(self, table: Array) -> tuple[Array, Array, Array]:
        """Mean along the axis, and variances along and across, of `(x - mu) / s`."""
        line = np.linspace(-8.5, 8.5, 57)
        line_weight = np.exp(-(line**2) / 2)
        if self.dim == 1:
            radius, radius_weight = np.zeros(1), np.ones(1)
        else:
            middle = np.sqrt(self.dim - 1)
            low = max(0.0, middle - 8.5)
            node, radius_weight = np.polynomial.legendre.leggauss(32)
            radius = low + (node + 1) / 2 * (middle + 8.5 - low)
            log_radius_weight = (self.dim - 2) * np.log(radius) - radius**2 / 2
            radius_weight = radius_weight * np.exp(log_radius_weight - log_radius_weight.max())
        weight = np.outer(line_weight / line_weight.sum(), radius_weight / radius_weight.sum())
        grid = [
            jnp.asarray(part.reshape(-1), self.std.dtype)
            for part in np.meshgrid(line, radius**2, indexing="ij")
        ]
        mass = jnp.asarray(weight.reshape(-1), self.std.dtype)
        end, factor = self._flow(table, *grid)
        mean = mass @ end
        return mean, mass @ (end - mean) ** 2, mass @ (factor**2 * grid[1]) / max(self.dim - 1, 1)

    def _flow(self, table: Array, along: Array, square: Array) -> tuple[Array, Array]:
        """Ends of the flow from points with coordinate `along` and squared radius `square`: the
        final coordinate, and the factor of the radius.
        """
        return _flow(table, self._log_reach(), along, self.strength, self.distance, square)

    def _log_reach(self) -> Array:
        return _log_reach(self.dim, self.strength, self.distance)


def check_strength(variance: Array, strength: Array, k: int | Array) -> None:
    """Raise a `ValueError` for arguments that `draws_law` does not cover."""
    if _checks.concrete((strength, variance)):
        a, s2 = float(np.asarray(strength)), float(np.asarray(variance))
        if not a <= _MAX_STRENGTH:
            raise ValueError(
                f"the law of k = {k} draws needs scale * h * s^2 <= 1e4, got {a:.3g}: lower the "
                "scale"
            )
        if not (a > 0 and s2 > 0):
            raise ValueError(
                f"the law of k = {k} draws needs a positive scale, curvature h and variance, got "
                f"scale * h * s^2 = {a:g}. For a linear reward the law is known only for k = 1."
            )


def draws_law(
    center: Array, variance: Array, target: Array, strength: Array, k: int | Array
) -> DrawsLaw:
    """The law for a prior `N(center, variance I)`, a reward with maximizer `target`,
    `strength = scale h s^2`, and k draws per step.

    Call `check_strength` first: this function does not check its arguments.
    """
    d, std = len(center), jnp.sqrt(variance)
    offset = (target - center) / std
    square = offset @ offset
    apart = square > 0
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), offset[0])
    first = jnp.zeros(d, center.dtype).at[0].set(1)
    axis = jnp.where(apart, offset / jnp.where(apart, distance, 1.0), first)
    table = _table(jnp.asarray(k, strength.dtype), d, strength, distance, _FINE)
    return DrawsLaw(center, std, strength, distance, axis, table, k)


@jax.jit
def draws_moments(
    center: Array, variance: Array, target: Array, strength: Array, k: Array
) -> tuple[Array, Array]:
    """Mean `(d,)` and covariance `(d, d)` of `draws_law`, by one compiled program for any k."""
    return draws_law(center, variance, target, strength, k).mean_and_cov()


@jax.custom_jvp
@jax.jit
def _flow(
    table: Array, log_reach: Array, along: Array, strength: Array, distance: Array, square: Array
) -> tuple[Array, Array]:
    drift = lambda w, y, args: _velocity(table, log_reach, w, y, (strength, distance, square))
    return _solve(drift, (along, jnp.ones_like(along)), 0.0, 1.0)


@_flow.defjvp
@jax.jit
def _flow_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    # Each point has four inputs and two outputs. Their slopes are integrated with the state, so
    # that no step is stored. The slope by the strength is taken in its logarithm: the plain slope
    # falls with the square of the strength, below the resolution of the solver.
    table, log_reach, along, *parameters = primals
    strength, distance, square = parameters
    unit_vectors = jnp.eye(4, dtype=along.dtype)
    scales = strength, jnp.ones_like(distance), jnp.ones_like(square)
    pairs = zip(unit_vectors[1:], scales, strict=True)
    directions = [jnp.multiply.outer(vector, scale) for vector, scale in pairs]

    def drift(w: Array, y: tuple, args: None) -> tuple:
        state, slopes = y
        velocity, tangent_map = jax.linearize(
            lambda *at: _velocity(table, log_reach, w, *at), state, parameters
        )
        return velocity, jax.vmap(tangent_map)(slopes, directions)

    one, first = jnp.ones_like(along), jnp.multiply.outer(unit_vectors[0], jnp.ones_like(along))
    end, slopes = _solve(drift, ((along, one), (first, jnp.zeros_like(first))), 0.0, 1.0)
    weights = tangents[2], tangents[3] / strength, *tangents[4:]
    combine = lambda slope: sum(each * weight for each, weight in zip(slope, weights, strict=True))
    return end, jax.tree.map(combine, slopes)


def _velocity(
    table: Array,
    log_reach: Array,
    w: Array,
    state: tuple[Array, Array],
    parameters: Sequence[Array],
) -> tuple[Array, Array]:
    (along, factor), (strength, distance, square) = state, parameters
    offset = w * along - distance
    p2 = strength * (offset**2 + (w * factor) ** 2 * square)
    rate = -2 * strength * _interpolate(_row(table, strength, w), log_reach, p2)
    return rate * offset, rate * w * factor


def _row(table: Array, strength: Array, w: Array) -> Array:
    """The Chebyshev coefficients in p at time w."""
    place = jnp.log1p(2 * strength * (1 - w**2)) / jnp.log1p(2 * jax.lax.stop_gradient(strength))
    return _chebyshev(len(table), 2 * place - 1) @ jax.lax.stop_gradient(table)


def _solve(drift: Any, start: Any, begin: float, end: float) -> Any:
    like = jax.tree.leaves(start)[0].dtype
    tolerance = 1e-9 if like == jnp.float64 else 1e-5
    return end_of(drift, start, begin, end, tolerance, tolerance / 10)


def _chebyshev(count: int, x: Array) -> Array:
    """`T_0, ..., T_{count - 1}` at x, along a last axis."""
    rows = [jnp.ones_like(x), x]
    while len(rows) < count:
        rows.append(2 * x * rows[-1] - rows[-2])
    return jnp.stack(rows, axis=-1)


def _log_reach(d: int, strength: Array, distance: Array) -> Array:
    """The end of the interpolant's coordinate `log(1 + p^2)`. No trajectory from the bulk of the
    normal goes further.
    """
    strength, distance = jax.lax.stop_gradient((strength, distance))
    return jnp.log1p(strength * (distance + np.sqrt(d) + _REACH) ** 2)


def _interpolate(row: Array, log_reach: Array, p2: Array) -> Array:
    """phi at p^2, from Chebyshev coefficients. It is constant beyond their range, where the normal
    has no mass.
    """
    position = jnp.clip(2 * jnp.log1p(p2) / log_reach - 1, -1, 1)
    return jnp.exp(_chebyshev(len(row), position) @ row)


@functools.partial(jax.jit, static_argnames=("d", "nodes"))
def _table(k: Array, d: int, strength: Array, distance: Array, nodes: tuple[int, ...]) -> Array:
    """Chebyshev coefficients of log phi in `log(1 + 2 q)` and `log(1 + p^2)`, held constant under
    differentiation.

    phi is a function of q and p alone. The derivatives come from the interpolant in q and p and do
    not depend on its range.
    """
    k, strength, distance = jax.lax.stop_gradient((k, strength, distance))
    angles = [(np.arange(n) + 0.5) * np.pi / n for n in nodes[:2]]
    # Coefficients from values at the Chebyshev points, along each axis.
    to_coefficients = [2 / len(a) * np.cos(np.outer(np.arange(len(a)), a)) for a in angles]
    for matrix in to_coefficients:
        matrix[0] /= 2
    dtype = strength.dtype
    unit = [jnp.asarray((1 + np.cos(a)) / 2, dtype) for a in angles]
    q = jnp.expm1(unit[0] * jnp.log1p(2 * strength)) / 2
    p2 = jnp.expm1(unit[1] * _log_reach(d, strength, distance))
    values = jax.lax.map(lambda q: jax.vmap(lambda p2: shrinkage(q, p2, k, d, nodes))(p2), q)
    left, right = (jnp.asarray(matrix, dtype) for matrix in to_coefficients)
    return left @ jnp.log(values) @ right.T


@functools.partial(jax.jit, static_argnames=("d", "nodes"))
def shrinkage(q: Array, p2: Array, k: int | Array, d: int, nodes: tuple[int, ...] = _FINE) -> Array:
    """phi, the factor by which the weighted mean of k draws from `N(m, v I)` reduces `m - y`: 1 for
    k = 1 and `1 / (1 + 2 q)` for k = infinity. The draws have the weights `exp(-q |X - y|^2 / v)`.

    **Arguments:** `q = scale h v > 0` and `p2 = scale h |m - y|^2`, scalars; `k`; `d`.
    """
    return _integrate(d, nodes, q, p2, jnp.asarray(k, q.dtype))


def _integrate(d: int, nodes: tuple[int, ...], q: Array, p2: Array, k: Array) -> Array:
    dtype = q.dtype
    _, _, panels, per_panel, inner = nodes
    node, weight = (jnp.asarray(part, dtype) for part in np.polynomial.legendre.leggauss(inner))
    root = jnp.sqrt(q)
    delta2 = p2 / q
    # e = sqrt(u) = sqrt(q) |X - y| / sqrt(v). The length of a normal vector stays within _REACH of
    # its typical value.
    typical = jnp.sqrt(delta2 + d - 1)
    low, high = root * jnp.maximum(typical - _REACH, 1e-12), root * (typical + _REACH)
    span = (high - low) * (high + low)
    left = 37 + jnp.log(k)
    lower = 2 * panels // 5
    edges = jnp.concatenate([
        -left * jnp.asarray(np.linspace(1, 0, lower + 1)[:-1], dtype),
        jnp.expm1(jnp.linspace(0, 1, panels - lower + 1, dtype=dtype) * jnp.log1p(span + 4)),
    ])  # fmt: skip
    panel_node, panel_weight, to_node = (jnp.asarray(part, dtype) for part in _panel(per_panel))
    half = (edges[1:] - edges[:-1]) / 2
    tau = edges[:-1, None] + half[:, None] * (
        1 + panel_node[None]
    )  # measured from the lower end of u, which does not change a softmax

    def densities(tau: Array) -> tuple[Array, Array]:
        # Outside of this interval kappa(tau - u) is below e^-25 of its peak.
        a, b = (jnp.sqrt(low**2 + jnp.clip(tau + shift, 0, span)) for shift in (-3.7, 25.0))
        e = a + (b - a) * (1 + node) / 2
        lag = tau - (e - low) * (e + low)
        r, delta = e / root, jnp.sqrt(p2) / root
        z = r * delta
        kernel = (
            (b - a)
            / 2
            * weight
            * jnp.exp(lag - jnp.exp(lag) - (r - delta) ** 2 / 2 + (d - 1) * jnp.log(r))
            / root
        )
        return jnp.sum(kernel * jnp.exp(_log_bessel(d, z))), jnp.sum(
            kernel * r**2 * jnp.exp(_log_bessel(d + 2, z))
        )

    f, f_next = jax.vmap(jax.vmap(densities))(tau)
    mass = half * (f @ panel_weight)
    cumulative = jnp.cumsum(mass)[:, None] - mass[:, None] + half[:, None] * (f @ to_node.T)
    survival = jnp.exp((k - 1) * jnp.log1p(-jnp.clip(cumulative, 0, 1 - jnp.finfo(dtype).eps)))
    return k * jnp.sum(half * ((f_next * survival) @ panel_weight))


@functools.cache
def _panel(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [-1, 1], and the matrix that integrates from -1 to each
    node.
    """
    node, weight = np.polynomial.legendre.leggauss(count)
    vander = np.polynomial.legendre.legvander(node, count - 1)
    integrals = [
        np.polynomial.legendre.legval(node, np.polynomial.legendre.legint(row, lbnd=-1))
        for row in np.eye(count)
    ]
    return node, weight, np.stack(integrals, axis=1) @ np.linalg.inv(vander)


def _log_bessel(d: int, z: Array) -> Array:
    """`log(e^-z z^-nu I_nu(z))` with `nu = d/2 - 1`. The density of a noncentral chi is
    `r^{d-1} exp(-(r - delta)^2 / 2)` times this function at `z = r delta`.
    """
    if d == 1:
        return jnp.log1p(jnp.exp(-2 * z)) - np.log(2 * np.pi) / 2
    if d == 3:
        small = z < 1e-5
        safe = jnp.where(small, 1.0, z)
        return (
            jnp.where(small, -z, jnp.log(-jnp.expm1(-2 * safe) / (2 * safe)))
            + np.log(2 / np.pi) / 2
        )
    row, top = _bessel_table(d)
    scaled = jnp.log1p(z / (d / 2))
    # Clenshaw's recurrence entry by entry fuses into one kernel; a matrix of polynomials would be
    # stored in memory.
    x, last, before = jnp.clip(2 * scaled / top - 1, -1, 1), jnp.zeros_like(z), jnp.zeros_like(z)
    for coefficient in row[:0:-1]:
        last, before = 2 * x * last - before + float(coefficient), last
    near = float(row[0]) + x * last - before - (d - 1) / 2 * scaled
    # Hankel's expansion beyond the table.
    large = jnp.maximum(z, d / 2 * np.expm1(top))
    odd = [((d - 2) ** 2 - n**2) / (8 * large) for n in (1, 3, 5, 7)]
    series = 1 - odd[0] * (1 - odd[1] / 2 * (1 - odd[2] / 3 * (1 - odd[3] / 4)))
    far = jnp.log(series) - (d - 1) / 2 * jnp.log(large) - np.log(2 * np.pi) / 2
    return jnp.where(scaled < top, near, far)


@functools.cache
def _bessel_table(d: int) -> tuple[np.ndarray, float]:
    """Chebyshev coefficients of `log(e^-z z^-nu I_nu(z)) + (nu + 1/2) log(1 + 2 z / d)` in
    `log(1 + 2 z / d)`, up to z = 5000 d.

    The integral in `I_nu(z) = (z/2)^nu / (sqrt(pi) Gamma(nu + 1/2)) J` with
    `J = ∫_{-1}^1 (1 - c^2)^{nu - 1/2} e^{z c} dc` uses the trapezoidal rule in the logit of
    `(1 - c) / 2`.
    """
    nu, top, count = d / 2 - 1, float(np.log1p(1e4)), 44
    angle = (np.arange(count) + 0.5) * np.pi / count
    scaled = top * (1 + np.cos(angle)) / 2
    z = np.expm1(scaled) * d / 2
    logit = np.linspace(-90, 90, 3601)
    log_far, log_near = (
        -np.logaddexp(0, -logit),
        -np.logaddexp(0, logit),
    )  # of (1 - c)/2 and (1 + c)/2
    exponent = (nu + 0.5) * (np.log(4) + log_far + log_near)[None] - 2 * z[:, None] * np.exp(
        log_far
    )[None]
    peak = exponent.max(axis=1)
    # dc = 2 (1-c)/2 (1+c)/2 dlogit, one factor (1 - c^2) / 2 of the exponent above.
    log_integral = peak + np.log(
        np.exp(exponent - peak[:, None]).sum(axis=1) * (logit[1] - logit[0]) / 2
    )
    values = (
        log_integral
        - nu * np.log(2)
        - np.log(np.pi) / 2
        - scipy.special.gammaln(nu + 0.5)
        + (nu + 0.5) * scaled
    )
    matrix = 2 / count * np.cos(np.outer(np.arange(count), angle))
    matrix[0] /= 2
    return matrix @ values, top
