r"""The law of `r(X)` for a mixture, from which the laws of selection follow.

| reward | prior | law of `r(X)` |
|---|---|---|
| `LinearReward`, sums of it | any, any dimension | a mixture of normals |
| `StepReward` | any, any dimension | two atoms |
| quadratic, `H = h I`, h > 0 | isotropic components | `c - h s^2 Q`, noncentral chi-square |
| any other | one or two dimensions | by quadrature on a grid of cells |

Every law has nodes, `values` `(K or 1, m)` and `log_masses` `(K, m)`: an expectation over component
k, times the component's weight, is a sum over row k. Each component has its own nodes, so that
modes of very different widths are all resolved.

**The noncentral chi-square law** of m degrees, in terms of the distance `rho = sqrt(Q)` and the
offset `delta`. One coordinate c is along the offset and m - 1 coordinates are across:
`P(rho <= q) = ∫ phi(c - delta) P(chi^2_{m-1} <= q^2 - c^2) dc`. Tanh-sinh nodes resolve the root at
`c = ±q`.
For m = 1 the law is elementary.

Reference: Johnson, Kotz and Balakrishnan, *Continuous Univariate Distributions* 2 (1995), chapter
29.
"""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf, erfc, gammainc, gammaincc, gammaln, log_ndtr, ndtr
from jaxtyping import Array

from theory import quadrature, tilts
from tiltjax import _checks, _pytree, rewards
from tiltjax.mixtures import GaussianMixture, check_mixture

_HALF_LOG_2PI = np.log(2 * np.pi) / 2
_W, _ONE_MINUS_W, _WEIGHTS = quadrature.unit_interval(80)
# Beyond this many standard deviations lies less mass than 10^12 draws would find.
_REACH = 9.0


class RewardLaw(eqx.Module):
    """The law of `r(X)`: quadrature nodes, and the log-probabilities `log_cdf`."""

    values: eqx.AbstractVar[Array]
    log_masses: eqx.AbstractVar[Array]
    discrete: ClassVar[bool]

    def log_cdf(self, r: Array) -> tuple[Array, Array]:
        """`(log P(r(X) <= r), log P(r(X) > r))` at one r."""
        raise NotImplementedError

    def log_density(self, r: Array) -> Array:
        """The log-density of `r(X)` at one r."""
        raise ValueError(
            f"the law {type(self).__name__} of this reward has no density in closed form: use "
            "reward_cdf"
        )

    def moments(self, prior: GaussianMixture, log_probs: Array) -> tuple[Array, Array]:
        """Means `(K, d)` and covariances `(K, d, d)` of X in each component, when the reward's
        nodes have the log-probabilities `log_probs` `(K, m)`.
        """
        raise ValueError(
            f"the moments have no closed form for {type(self).__name__}, a reward with finitely "
            "many values"
        )

    def flat(self, masses: Array) -> tuple[Array, Array]:
        """The values `(m',)`, and for each value the sum of the masses `(K, m)`, `(m',)`."""
        if len(self.values) == 1:
            return self.values[0], jnp.sum(masses, axis=0)
        return self.values.reshape(-1), masses.reshape(-1)


class NormalReward(RewardLaw):
    """The law of `<slope, X>` plus a constant, `sum_k w_k N(means_k, stds_k^2)`."""

    log_weights: Array
    means: Array
    stds: Array
    slope: Array
    values: Array
    log_masses: Array
    discrete: ClassVar[bool] = False

    def __init__(
        self, log_weights: Array, means: Array, stds: Array, slope: Array, nodes: int = 1441
    ):
        z = jnp.linspace(-_REACH, _REACH, nodes, dtype=means.dtype)
        self.log_weights, self.means, self.stds, self.slope = log_weights, means, stds, slope
        self.values = means[:, None] + stds[:, None] * z[None]
        log_mass = -(z**2) / 2 - _HALF_LOG_2PI + jnp.log(z[1] - z[0])
        self.log_masses = log_weights[:, None] + log_mass[None]

    def log_cdf(self, r: Array) -> tuple[Array, Array]:
        z = (r - self.means) / self.stds
        return _both(
            jax.nn.logsumexp(self.log_weights + log_ndtr(z)),
            jax.nn.logsumexp(self.log_weights + log_ndtr(-z)),
        )

    def log_density(self, r: Array) -> Array:
        z = (r - self.means) / self.stds
        return jax.nn.logsumexp(self.log_weights - z**2 / 2 - _HALF_LOG_2PI - jnp.log(self.stds))

    def moments(self, prior: GaussianMixture, log_probs: Array) -> tuple[Array, Array]:
        # X = mu + (S slope / std) z + an independent rest, where z is the standardized reward.
        z = (self.values - self.means[:, None]) / self.stds[:, None]
        probs = jax.nn.softmax(log_probs, axis=1)
        first = jnp.sum(probs * z, axis=1)
        second = jnp.sum(probs * (z - first[:, None]) ** 2, axis=1)
        along = prior.covs @ self.slope / self.stds[:, None]
        covs = prior.covs + (second - 1)[:, None, None] * along[:, :, None] * along[:, None]
        return prior.means + first[:, None] * along, covs


class ChiReward(RewardLaw):
    """`sum_k w_k law(top - unit_k Q_k)`, where `Q_k` is noncentral chi-square of `degrees` degrees
    and noncentrality `offsets_k^2`.

    The reward has its maximum, `top`, at `center`.
    """

    log_weights: Array
    top: Array
    center: Array
    units: Array
    offsets: Array
    values: Array
    log_masses: Array
    degrees: int = eqx.field(static=True)
    discrete: ClassVar[bool] = False

    def __init__(
        self,
        log_weights: Array,
        top: Array,
        center: Array,
        units: Array,
        offsets: Array,
        degrees: int,
        nodes: int = 1441,
    ):
        self.log_weights, self.top, self.center, self.units = log_weights, top, center, units
        self.offsets, self.degrees = offsets, degrees

        def component(log_weight: Array, unit: Array, offset: Array) -> tuple[Array, Array]:
            # rho = log(1 + e^y): geometric nodes towards rho = 0, where best-of-n concentrates, and
            # uniform nodes in the bulk.
            reach = _REACH + np.sqrt(degrees)
            center = jax.lax.stop_gradient(offset)
            low = jnp.where(center > reach + 1, center - reach, -40.0)
            y = low + (center + reach - low) * jnp.linspace(0, 1, nodes, dtype=unit.dtype)
            rho = jax.nn.softplus(y)
            log_mass = (
                _log_chi_density(rho, offset, degrees)
                + jax.nn.log_sigmoid(y)
                + jnp.log(y[1] - y[0])
            )
            return top - unit * rho**2, log_weight + log_mass

        self.values, self.log_masses = jax.vmap(component)(log_weights, units, offsets)

    def log_cdf(self, r: Array) -> tuple[Array, Array]:
        rho = self._rho(r)
        below, above = jax.vmap(lambda q, delta: _chi_tails(q, delta, self.degrees))(
            rho, self.offsets
        )
        # A large distance means a small reward.
        return _both(
            jax.nn.logsumexp(self.log_weights + above), jax.nn.logsumexp(self.log_weights + below)
        )

    def log_density(self, r: Array) -> Array:
        rho = self._rho(r)
        log_density = jax.vmap(lambda q, delta: _log_chi_density(q, delta, self.degrees))(
            rho, self.offsets
        )
        inside = jax.nn.logsumexp(self.log_weights + log_density - jnp.log(2 * rho * self.units))
        return jnp.where(r < self.top, inside, -jnp.inf)

    def moments(self, prior: GaussianMixture, log_probs: Array) -> tuple[Array, Array]:
        # In standard units, X at the distance rho from the center has the coordinate c towards the
        # component's mean. Around this axis the law is rotationally symmetric.
        probs = jax.nn.softmax(log_probs, axis=1)
        rho = jnp.sqrt((self.top - self.values) / self.units[:, None])
        first, second = jax.vmap(lambda rho, delta: _coordinate(rho, delta, self.degrees))(
            rho, self.offsets
        )
        mean = jnp.sum(probs * first, axis=1)
        along = jnp.sum(probs * second, axis=1) - mean**2
        across = jnp.sum(probs * (rho**2 - second), axis=1) / max(self.degrees - 1, 1)
        s2 = prior.covs[:, 0, 0]
        offset = prior.means - self.center[None]
        is_off_center = self.offsets > 0
        axis = offset / jnp.where(is_off_center, self.offsets * jnp.sqrt(s2), 1.0)[:, None]
        axis = jnp.where(is_off_center[:, None], axis, jnp.zeros_like(axis).at[:, 0].set(1))
        outer = axis[:, :, None] * axis[:, None]
        eye = jnp.eye(prior.dim, dtype=outer.dtype)[None]
        covs = along[:, None, None] * outer + across[:, None, None] * (eye - outer)
        return self.center[None] + (jnp.sqrt(s2) * mean)[:, None] * axis, s2[:, None, None] * covs

    def _rho(self, r: Array) -> Array:
        depth = jnp.where(r < self.top, self.top - r, jnp.finfo(self.top.dtype).tiny)
        return jnp.sqrt(depth / self.units)


class AtomReward(RewardLaw):
    """Finitely many increasing values, `values` `(1, m)`, with masses `log_masses` `(K, m)` in
    every component.
    """

    values: Array
    log_masses: Array
    discrete: ClassVar[bool] = True

    def log_cdf(self, r: Array) -> tuple[Array, Array]:
        below = jnp.where(self.values <= r, self.log_masses, -jnp.inf)
        above = jnp.where(self.values > r, self.log_masses, -jnp.inf)
        return jax.nn.logsumexp(below), jax.nn.logsumexp(above)


class GridReward(RewardLaw):
    """The reward on a grid of cells with centers `(m, d)`. Every cell is an atom, and cells of
    equal reward form one atom.
    """

    values: Array
    log_masses: Array
    centers: Array
    discrete: ClassVar[bool] = True

    def log_cdf(self, r: Array) -> tuple[Array, Array]:
        total = jax.nn.logsumexp(self.log_masses, axis=0)
        below = jax.nn.logsumexp(jnp.where(self.values[0] <= r, total, -jnp.inf))
        return below, jax.nn.logsumexp(jnp.where(self.values[0] > r, total, -jnp.inf))

    def moments(self, prior: GaussianMixture, log_probs: Array) -> tuple[Array, Array]:
        probs = jax.nn.softmax(log_probs, axis=1)
        means = probs @ self.centers
        second = jnp.einsum("km,mi,mj->kij", probs, self.centers, self.centers)
        return means, second - means[:, :, None] * means[:, None]


def reward_law(
    prior: GaussianMixture, reward: Callable, *, cells: int | None = None, nodes: int = 1441
) -> RewardLaw:
    """The law of `r(X)` for `X ~ prior`: in closed form where one exists, else on a grid of `cells`
    cells in each dimension. `nodes` is the number of nodes in each component.

    Traced covariances count as not isotropic, except in one dimension.

    **Raises:** `ValueError` for more than two dimensions without a closed form, for a reward that
    does not vary over a component, and for a reward that is not finite on the grid.
    """
    check_mixture(prior, "prior")
    reward = _pytree.cast(rewards.as_reward(reward), prior.means.dtype)
    cells = None if cells is None else _checks.count(cells, "cells")
    d, dtype = prior.dim, prior.means.dtype
    if isinstance(reward, rewards.StepReward):
        return _step(prior, reward)
    if tilts.is_quadratic(reward):
        form = _pytree.cast(tilts.quadratic_form(reward, d), dtype)
        if _is_linear(reward):
            law = _normal_law(prior, form, nodes)
            _check_spread(law.stds)
            return law
        if _isotropic_reward(reward, d) and _isotropic_prior(prior) and _concave(reward, d):
            law = _chi_law(prior, form, nodes)
            _check_spread(law.units)
            return law
    if d > 2:
        raise ValueError(
            f"the law of {type(reward).__name__} under this prior has no closed form, and "
            f"quadrature covers one or two dimensions, not {d}. Use LinearReward, StepReward, or "
            "Quadratic with a scalar weight > 0 and isotropic components. Otherwise estimate the "
            "law from samples, with tiltjax.best_of_n and tiltjax.metrics."
        )
    nothing = rewards.LinearReward(jnp.zeros_like(prior.means[0]))  # only the cells are needed
    law = _grid_law(prior, reward, quadrature.tilt(prior, nothing, 0.0, cells=cells))
    if _checks.concrete(law.values) and not np.all(np.isfinite(law.values)):
        raise ValueError("the reward is not finite everywhere on the grid: bound it (jnp.clip)")
    return law


@eqx.filter_jit
def _normal_law(prior: GaussianMixture, form: tilts.QuadraticForm, nodes: int) -> NormalReward:
    spread = jnp.einsum("i,kij,j->k", form.gradient, prior.covs, form.gradient)
    means = form.value + (prior.means - form.center[None]) @ form.gradient
    return NormalReward(prior.log_weights, means, jnp.sqrt(spread), form.gradient, nodes)


@eqx.filter_jit
def _chi_law(prior: GaussianMixture, form: tilts.QuadraticForm, nodes: int) -> ChiReward:
    h, s2 = form.matrix[0, 0], prior.covs[:, 0, 0]
    center = form.center + form.gradient / (2 * h)
    top = form.value + form.gradient @ form.gradient / (4 * h)
    # The square root has no derivative at 0. It is set to 0, as the square's derivative is 0 there.
    square = jnp.sum((prior.means - center[None]) ** 2, axis=1) / s2
    offsets = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return ChiReward(prior.log_weights, top, center, h * s2, offsets, prior.dim, nodes)


@eqx.filter_jit
def _grid_law(
    prior: GaussianMixture, reward: rewards.Reward, grid: quadrature.GridTilt
) -> GridReward:
    centers = jax.lax.stop_gradient(
        grid.centers
    )  # the integral does not depend on the position of its nodes
    log_masses = jax.vmap(prior.component_log_probs)(centers).T + jnp.sum(
        jnp.log(jax.lax.stop_gradient(grid.cell))
    )
    values = rewards.values(reward, centers)
    return GridReward(values[None], log_masses - jax.nn.logsumexp(log_masses), centers)


def _step(prior: GaussianMixture, reward: rewards.StepReward) -> AtomReward:
    spread = jnp.einsum("i,kij,j->k", reward.normal, prior.covs, reward.normal)
    _check_spread(spread)
    z = (prior.means @ reward.normal - reward.offset) / jnp.sqrt(spread)
    sides = jnp.stack([-reward.height, jnp.zeros_like(reward.height)])
    log_masses = prior.log_weights[:, None] + jnp.stack([log_ndtr(-z), log_ndtr(z)], axis=1)
    if _checks.concrete(reward.height) and np.asarray(reward.height) <= 0:
        raise ValueError(
            f"selection by StepReward needs a height > 0, got {float(reward.height):g}: reverse "
            "the normal"
        )
    return AtomReward(sides[None], log_masses)


def _both(log_below: Array, log_above: Array) -> tuple[Array, Array]:
    """Two complementary log-probabilities, the larger computed from the smaller, so that `n log F`
    keeps its digits for F near 1.
    """

    def other(log_p: Array, small: Array) -> Array:
        use = small < np.log(0.5)
        return jnp.where(use, jnp.log1p(-jnp.exp(jnp.where(use, small, -1.0))), log_p)

    return other(log_below, log_above), other(log_above, log_below)


def _axis(rho: Array, delta: Array) -> tuple[Array, Array, Array]:
    """Nodes c in `[-rho, rho]` where `phi(c - delta)` has mass, `rho^2 - c^2` without cancellation,
    and quadrature weights times phi.
    """
    dtype = rho.dtype
    low, high = jnp.clip(delta - _REACH, -rho, rho), jnp.clip(delta + _REACH, -rho, rho)
    width = high - low
    w, v = jnp.asarray(_W, dtype), jnp.asarray(_ONE_MINUS_W, dtype)
    c = low + width * w
    rest = ((rho - high) + width * v) * ((rho + low) + width * w)
    weights = (
        width * jnp.asarray(_WEIGHTS, dtype) * jnp.exp(-((c - delta) ** 2) / 2 - _HALF_LOG_2PI)
    )
    return c, rest, weights


def _safe_log(x: Array) -> Array:
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


def _chi_tails(rho: Array, delta: Array, degrees: int) -> tuple[Array, Array]:
    """`(log P(chi <= rho), log P(chi > rho))` of the noncentral chi law."""
    if degrees == 1:
        # Phi(rho - delta) - Phi(-rho - delta), as an integral over [-rho, rho], which is accurate
        # in relative terms for the smallest rho.
        _, _, weights = _axis(rho, delta)
        return _safe_log(jnp.sum(weights)), jnp.logaddexp(
            log_ndtr(delta - rho), log_ndtr(-delta - rho)
        )
    _, rest, weights = _axis(rho, delta)
    half_rest = jnp.maximum(rest, jnp.finfo(rest.dtype).tiny) / 2
    if degrees <= 3:  # elementary functions compile much faster
        root = jnp.sqrt(half_rest)
        near, far = (
            (erf(root), erfc(root))
            if degrees == 2
            else (-jnp.expm1(-half_rest), jnp.exp(-half_rest))
        )
    else:
        half = jnp.asarray((degrees - 1) / 2, rho.dtype)
        near, far = gammainc(half, half_rest), gammaincc(half, half_rest)
    inside = jnp.sum(weights * near)
    outside = jnp.sum(weights * far) + ndtr(delta - rho) + ndtr(-delta - rho)
    return _safe_log(inside), _safe_log(outside)


def _coordinate(rho: Array, delta: Array, degrees: int) -> tuple[Array, Array]:
    """`E[c | rho]` and `E[c^2 | rho]` at an array of distances, where c is the coordinate along the
    offset delta.
    """
    if degrees == 1:
        return rho * jnp.tanh(delta * rho), rho**2

    def one(q: Array) -> tuple[Array, Array]:
        c, rest, weights = _axis(q, delta)
        rest = jnp.maximum(rest, jnp.finfo(rest.dtype).tiny)
        weights = jax.nn.softmax(_safe_log(weights) + (degrees - 3) / 2 * jnp.log(rest) - rest / 2)
        return weights @ c, weights @ c**2

    return jax.vmap(one)(rho)


def _log_chi_density(rho: Array, delta: Array, degrees: int) -> Array:
    """The log-density of the noncentral chi law at an array of distances."""
    if degrees == 1:
        return jnp.logaddexp(-((rho - delta) ** 2) / 2, -((rho + delta) ** 2) / 2) - _HALF_LOG_2PI
    half = (degrees - 1) / 2

    def one(q: Array) -> Array:
        _, rest, weights = _axis(q, delta)
        rest = jnp.maximum(rest, jnp.finfo(rest.dtype).tiny)
        log_chi2 = (half - 1) * jnp.log(rest) - rest / 2 - gammaln(half) - half * np.log(2)
        return jax.nn.logsumexp(_safe_log(weights) + log_chi2) + jnp.log(2 * q)

    return jax.vmap(one)(rho) if rho.ndim else one(rho)


def _is_linear(reward: rewards.Reward) -> bool:
    match reward:
        case rewards.Sum():
            return all(_is_linear(term) for term in reward.terms)
        case rewards.Scaled():
            return _is_linear(reward.reward)
    return isinstance(reward, rewards.LinearReward)


def _isotropic_reward(reward: rewards.Reward, dim: int) -> bool:
    if dim == 1:
        return True
    try:
        reward.conjugate()
    except ValueError:
        return False
    return True


def _isotropic_prior(prior: GaussianMixture) -> bool:
    if prior.dim == 1:
        return True
    if not _checks.concrete(prior.covs):
        return False
    covs = np.asarray(prior.covs, np.float64)
    excess = np.abs(covs - covs[:, :1, :1] * np.eye(prior.dim)).max(axis=(1, 2))
    return bool(np.all(excess <= 1e-6 * np.abs(covs).max(axis=(1, 2))))


def _concave(reward: rewards.Reward, dim: int) -> bool:
    # Weights are read where possible, also inside jit. A traced weight is taken to be positive.
    with jax.ensure_compile_time_eval():
        matrix = tilts.quadratic_form(reward, dim).matrix
    return not _checks.concrete(matrix) or bool(np.asarray(matrix)[0, 0] > 0)


def _check_spread(spread: Array) -> None:
    if _checks.concrete(spread) and not np.all(np.asarray(spread) > 0):
        k = int(np.argmin(np.asarray(spread)))
        raise ValueError(
            f"the reward does not vary over component {k}, so selection has no effect there. Give "
            "the component a variance along the reward, or the reward a slope."
        )
