r"""The exact law of selection among n independent draws.

With p the law of one draw and F the distribution function of its reward, the selected draw has the
density `p(x) g(r(x))`:

| rule | g(r) |
|---|---|
| best of n | `n F(r)^(n-1)`; at an atom of the reward's law `(F(r)^n - F(r-)^n) / (F(r) - F(r-))` |
| softmax of n | `n w ∫_0^∞ e^(-u w) E[e^(-u w(X))]^(n-1) du`, `w = e^(scale r)` |

All of these follow from the law of the reward (`theory._reward_laws`). Selection moves mass between
modes only as far as their rewards differ. The integral uses `1 / T = ∫ e^(-u T) du` for the
softmax's denominator T. In `log u` it is the probability that the reward, perturbed by Gumbel
noise, is the largest of n. The law is p at scale 0. It tends to the tilt of p as n grows, and to
the best of n for large scales.

The divergence of best-of-n from p is `log n - (n - 1) / n` for any p and r if the reward's law has
no atoms, and smaller with atoms. The divergence from the tilt is always
`KL(q | tilt) = KL(q | p) - scale E_q[r] + log Z`. References: Beirami et al., *Theoretical
guarantees on the best-of-n alignment policy* (arXiv 2401.01879), for the divergence; Dandapanthula
and Boffi (arXiv 2606.02884), for selection compared with guidance.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from theory import tilts
from theory._reward_laws import GridReward, RewardLaw, reward_law
from tiltjax import _checks, _pytree, rewards
from tiltjax.mixtures import GaussianMixture, check_mixture

# Nodes for Gumbel noise. The mass beyond them is less than 1e-15.
_GUMBEL = np.linspace(-4.0, 40.0, 441)
_MAX_DRAWS = 1e12


class Selected(eqx.Module):
    """The law of the draw that a selection among n draws chooses; built by `best_of_n` and
    `softmax_of_n`. Its density is `p(x) g(r(x))`, with p the law of one draw.

    **Fields:** `law`, the law of one draw's reward; `log_ratios`, the values of `log g` at the
    nodes of `law`, of the shape of `law.values`. All methods return scalars, except `masses` and
    `mixture`.
    """

    prior: GaussianMixture
    reward: rewards.Reward
    law: RewardLaw
    n: Array
    ratio: Callable[[Array], Array]
    log_ratios: Array

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point, relative to Lebesgue measure, also where the reward has
        atoms.
        """
        return self.prior.log_prob(x) + self._differentiable(
            self.ratio(rewards.value(self.reward, x))
        )

    def masses(self) -> Array:
        """The probabilities `(K,)` that the selected draw is from each component of the prior."""
        log_masses = jax.nn.logsumexp(
            self.law.log_masses + self._differentiable(self.log_ratios), axis=1
        )
        return jax.nn.softmax(log_masses)

    def mixture(self) -> GaussianMixture:
        """The mixture with the mass, mean and covariance of the selected draw in each component of
        the prior.

        **Raises:** `ValueError` for `StepReward`, which has no moments in closed form.
        """
        return _mixture(self.prior, self.law, self._differentiable(self.log_ratios))

    def expect_reward(self, fn: Callable[[Array], Array]) -> Array:
        """`E[fn(r)]` for the reward r of the selected draw."""
        return jnp.sum(self._probs() * jax.vmap(jax.vmap(fn))(self.law.values))

    def mean_reward(self) -> Array:
        """`E[r]` of the selected draw."""
        return jnp.sum(self._probs() * self.law.values)

    def reward_cdf(self, r: float | Array) -> Array:
        """`P(r(X) <= r)` for the selected draw X."""
        r = _checks.finite(r, "r", 0).astype(self.law.values.dtype)
        if isinstance(self.ratio, _Best):
            return jnp.exp(self.n * self.law.log_cdf(r)[0])
        values, cumulative = self._cumulative()
        if self.law.discrete:
            below = jnp.searchsorted(values, r, side="right")
            return jnp.where(below > 0, cumulative[jnp.maximum(below - 1, 0)], 0.0)
        # Interpolate between the middles of the steps.
        middles = cumulative - jnp.diff(cumulative, prepend=0) / 2
        return jnp.interp(r, values, middles, left=0.0, right=1.0)

    def reward_quantile(self, level: float | Array) -> Array:
        """The smallest r with `P(r(X) <= r) >= level`, for a level inside (0, 1)."""
        level = _checks.in_range(level, "level", 0, 1, closed="neither")
        level = level.astype(self.law.values.dtype)
        values, cumulative = self._cumulative()
        if self.law.discrete:
            return values[
                jnp.minimum(jnp.searchsorted(cumulative, level * cumulative[-1]), len(values) - 1)
            ]

        def bisect(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = low + (high - low) / 2
            enough = self.reward_cdf(middle) >= level
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        values = jax.lax.stop_gradient(values)
        return jax.lax.fori_loop(0, 100, bisect, (values[0], values[-1]))[1]

    def reward_log_prob(self, r: float | Array) -> Array:
        """The log-density of the selected draw's reward.

        **Raises:** `ValueError` if the density has no closed form.
        """
        r = _checks.finite(r, "r", 0).astype(self.law.values.dtype)
        return self.law.log_density(r) + self.ratio(r)

    def kl_to_base(self) -> Array:
        """`KL(q | p)`, with p the law of one draw."""
        if isinstance(self.ratio, _Best):
            return jnp.log(self.n) - (self.n - 1) / self.n
        return jnp.sum(self._probs() * self.log_ratios)

    def kl_to_tilt(self, scale: float | Array) -> Array:
        """`KL(q | tilt)`, where the tilt is that of p, `p exp(scale * r) / Z`."""
        scale = _checks.nonnegative(scale, "scale").astype(self.law.values.dtype)
        if self.law.discrete:
            log_norm = jax.nn.logsumexp(self.law.log_masses + scale * self.law.values)
        else:
            log_norm = tilts.tilt(self.prior, self.reward, scale).log_norm
        return self.kl_to_base() - scale * self.mean_reward() + log_norm

    def _probs(self) -> Array:
        # If only the order of the rewards counts, g is constant to first order, and no derivative
        # passes through it (Danskin).
        return _normalized(self.law.log_masses + self.log_ratios)

    def _cumulative(self) -> tuple[Array, Array]:
        values, probs = self.law.flat(self._probs())
        order = jnp.argsort(jax.lax.stop_gradient(values))
        return values[order], jnp.cumsum(probs[order])

    def _differentiable(self, log_ratio: Array) -> Array:
        if isinstance(self.law, GridReward) and isinstance(self.ratio, _Table):
            return _piecewise_constant(log_ratio, self.law.values)
        return log_ratio


def best_of_n(
    prior: GaussianMixture, reward: Callable, n: int, *, cells: int | None = None
) -> Selected:
    """The law of the best of n independent draws of `prior`.

    `prior` is the law of one draw: the base law, or the law of a guided sampler
    (`theory.plug_in_law`, `theory.discrete_law`). `LinearReward`, `StepReward`, and concave
    isotropic quadratic rewards with isotropic components have closed forms in any dimension. Other
    rewards need one or two dimensions, and a grid with `cells` cells in each
    (`theory._reward_laws`).

    The result is differentiable in the prior and in the reward. On a grid, masses and density have
    no derivative in the reward and raise an error.

    **Raises:** `ValueError` for more than two dimensions without a closed form, and for a grid that
    does not resolve the selected draw.
    """
    return _best(prior, reward, _draw_count(n), reward_law(prior, reward, cells=cells))


def softmax_of_n(
    prior: GaussianMixture,
    reward: Callable,
    n: int,
    scale: float | Array,
    *,
    cells: int | None = None,
) -> Selected:
    """The law of one of n independent draws of `prior`, chosen with probability proportional to
    `exp(scale * r)`.

    Priors and rewards are those of `best_of_n`. A grid has 3,000 cells on the line and 160 in each
    dimension of the plane.

    **Raises:** `ValueError` as `best_of_n`, and on a grid if `scale * r` varies too much from cell
    to cell.
    """
    check_mixture(prior, "prior")
    scale = _checks.nonnegative(scale, "scale").astype(prior.means.dtype)
    cells = {1: 3000, 2: 160}.get(prior.dim) if cells is None else _checks.count(cells, "cells")
    law = reward_law(prior, reward, cells=cells, nodes=4001)
    draws = _draw_count(n).astype(prior.means.dtype)
    reward = _pytree.cast(rewards.as_reward(reward), prior.means.dtype)
    ratio = _softmax_ratio(law, draws, scale)
    return _resolved(Selected(prior, reward, law, draws, ratio, _at_nodes(ratio, law.values)))


def matching_n(
    prior: GaussianMixture, reward: Callable, scale: float | Array, *, maximum: int = 10**6
) -> int:
    """The n for which best-of-n is nearest to the tilt at `scale`: the minimizer of
    `KL(best of n | tilt)` over `1 <= n <= maximum`.

    The search covers every n up to 32 and a geometric grid above, and then refines the best
    interval of the grid down to a single n. It assumes that the divergence has one minimum in that
    interval. The result is a Python int for `tiltjax.best_of_n`, so no argument may be traced.

    **Raises:** `ValueError` if the best n is `maximum`, and for traced arguments.
    """
    scale, maximum = _checks.nonnegative(scale, "scale"), _checks.count(maximum, "maximum")
    if not _checks.concrete((prior, scale)):
        raise ValueError(
            "matching_n returns a number of draws, a Python int: call it outside of jit, vmap and "
            "grad"
        )
    law = reward_law(prior, reward)

    @eqx.filter_jit
    def divergences(law: RewardLaw, counts: Array) -> Array:
        return jax.lax.map(lambda n: _best(prior, reward, n, law).kl_to_tilt(scale), counts)

    def best(counts: np.ndarray) -> int:
        values = np.asarray(divergences(law, jnp.asarray(counts, law.values.dtype)))
        return int(np.argmin(values))

    counts = np.unique(
        np.concatenate([np.arange(1, 33), np.geomspace(32, max(maximum, 33), 32)]).astype(np.int64)
    )
    counts = counts[counts <= maximum]
    while True:
        i = best(counts)
        low, high = counts[max(i - 1, 0)], counts[min(i + 1, len(counts) - 1)]
        if high - low <= 2:
            break
        counts = np.unique(np.linspace(low, high, 64).astype(np.int64))
    if counts[i] == maximum and maximum > 1:
        raise ValueError(
            f"the best n is at least maximum = {maximum}: selection needs about exp(KL) draws to "
            "reach this tilt. Guide the sampler first and match n to the remaining tilt, or raise "
            "maximum."
        )
    return int(counts[i])


def _draw_count(n: int) -> Array:
    n = _checks.count(n, "n")
    if n > _MAX_DRAWS:
        raise ValueError(
            f"n must be at most {_MAX_DRAWS:g}, got {n}: the tail of the reward's law is not "
            "resolved beyond that"
        )
    return jnp.asarray(float(n))


def _best(prior: GaussianMixture, reward: Callable, n: Array, law: RewardLaw) -> Selected:
    n = n.astype(prior.means.dtype)
    reward = _pytree.cast(rewards.as_reward(reward), prior.means.dtype)
    if law.discrete:
        ratio, log_ratios = _best_of_atoms(law, n)
    else:
        ratio = _Best(law, n)
        log_ratios = _at_nodes(ratio, law.values)
    return _resolved(Selected(prior, reward, law, n, ratio, log_ratios))


@eqx.filter_jit
def _mixture(prior: GaussianMixture, law: RewardLaw, log_ratios: Array) -> GaussianMixture:
    log_probs = law.log_masses + log_ratios
    return prior.replace(jax.nn.logsumexp(log_probs, axis=1), *law.moments(prior, log_probs))


@eqx.filter_jit
def _at_nodes(ratio: Callable[[Array], Array], values: Array) -> Array:
    # In batches, because every node meets all nodes of an integral. A batch is recomputed in the
    # backward pass: storing all of them would take gigabytes.
    return jax.lax.map(
        jax.checkpoint(lambda r: ratio(r)), values.reshape(-1), batch_size=256
    ).reshape(values.shape)


class _Best(eqx.Module):
    """`log g` of best-of-n, `log n + (n - 1) log F(r)`."""

    law: RewardLaw
    n: Array

    def __call__(self, r: Array) -> Array:
        return jnp.log(self.n) + (self.n - 1) * self.law.log_cdf(r)[0]


class _Table(eqx.Module):
    """`log g` given at increasing rewards, linear in between."""

    values: Array
    log_ratios: Array

    def __call__(self, r: Array) -> Array:
        return jnp.interp(r, self.values, self.log_ratios)


@eqx.filter_jit
def _best_of_atoms(law: RewardLaw, n: Array) -> tuple[_Table, Array]:
    """`log g`, `(F^n - F_-^n) / (F - F_-)` for every atom, as a table and in the order of the law.
    Atoms of equal reward, up to rounding, count as one.
    """
    values = jax.lax.stop_gradient(law.values[0])
    order = jnp.argsort(values)
    values = values[order]
    mass = jnp.exp(jax.nn.logsumexp(law.log_masses, axis=0))[order]
    gap = 16 * jnp.finfo(values.dtype).eps * jnp.abs(values[1:])
    group = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(jnp.diff(values) > gap)])
    # Atoms without mass get a tiny mass, because the formula divides by it.
    mass = jnp.maximum(mass / jnp.sum(mass), jnp.finfo(mass.dtype).tiny)
    f = jax.ops.segment_max(jnp.cumsum(mass), group, len(values))[group]
    # Use the atom's own mass: differences of cumulative masses lose the digits of small atoms.
    fraction = jnp.minimum(jax.ops.segment_sum(mass, group, len(values))[group] / f, 1.0)
    lowest = fraction > 1 - 4 * jnp.finfo(values.dtype).eps
    fraction = jnp.where(lowest, 0.5, fraction)
    rise = jnp.where(lowest, 0.0, jnp.log(-jnp.expm1(n * jnp.log1p(-fraction)) / fraction))
    log_ratios = (n - 1) * jnp.log(f) + rise
    return _Table(values, log_ratios), jnp.zeros_like(log_ratios).at[order].set(log_ratios)[None]


class _Soft(eqx.Module):
    """`log g` of softmax-of-n, `log n + log ∫ exp(a - e^a) phi^(n-1) dv` with `a = v + scale r`, by
    the trapezoidal rule in `v = log u`.
    """

    n: Array
    scale: Array
    v: Array
    log_phi: Array

    def __call__(self, r: Array) -> Array:
        a = self.v + self.scale * r
        # Beyond 7 the kernel is zero; the clip keeps its derivative from being 0 * inf.
        log_kernel = a - jnp.exp(jnp.minimum(a, 7.0))
        total = jax.nn.logsumexp(log_kernel + (self.n - 1) * self.log_phi)
        return jnp.log(self.n) + total + jnp.log(self.v[1] - self.v[0])


class _SoftAtoms(eqx.Module):
    """`log g` by the integral of `_Soft` in the variable `a`, for few atoms and any scale."""

    law: RewardLaw
    n: Array
    scale: Array

    def __call__(self, r: Array) -> Array:
        a = jnp.asarray(-_GUMBEL[::-1], r.dtype)
        masses = jnp.exp(jax.nn.logsumexp(self.law.log_masses, axis=0))
        log_phi = _log_phi(masses[None], a[:, None] + self.scale * (self.law.values - r))
        log_kernel = a - jnp.exp(a)
        return (
            jnp.log(self.n)
            + jax.nn.logsumexp(log_kernel + (self.n - 1) * log_phi)
            + jnp.log(a[1] - a[0])
        )


def _log_phi(masses: Array, a: Array) -> Array:
    """`log sum_j m_j exp(-e^(a_j))`, accurate enough near phi = 1 to be multiplied by n - 1."""
    inner = jnp.exp(jnp.minimum(a, 7.0))
    missing = jnp.sum(masses * -jnp.expm1(-inner), axis=-1)
    left = jnp.maximum(jnp.sum(masses * jnp.exp(-inner), axis=-1), jnp.finfo(masses.dtype).tiny)
    near = missing < 0.5
    return jnp.where(near, jnp.log1p(-jnp.where(near, missing, 0.0)), jnp.log(left))


class _Either(eqx.Module):
    """`log g` from one of two formulas; the values decide which of them is resolved."""

    first: Callable[[Array], Array]
    second: Callable[[Array], Array]
    use_first: Array

    def __call__(self, r: Array) -> Array:
        return jnp.where(self.use_first, self.first(r), self.second(r))


def _softmax_ratio(law: RewardLaw, n: Array, scale: Array) -> Callable[[Array], Array]:
    if law.discrete and not isinstance(law, GridReward):
        return _SoftAtoms(law, n, scale)
    soft, span, resolved = _soft(law, n, scale)
    if isinstance(law, GridReward):
        if _checks.concrete(resolved) and not bool(resolved):
            raise ValueError(
                f"the grid does not resolve a softmax at scale {float(scale):g}, where scale * r "
                f"varies by {float(span):.3g}: lower the scale, or use best_of_n, the limit of "
                "large scales"
            )
        return _Either(soft, _unresolved, resolved) if not _checks.concrete(resolved) else soft
    if _checks.concrete(resolved):
        return soft if bool(resolved) else _wide_softmax(law, n, scale)
    return _Either(soft, _wide_softmax(law, n, scale), resolved)


@eqx.filter_jit
def _soft(law: RewardLaw, n: Array, scale: Array) -> tuple[_Soft, Array, Array]:
    """The integral, the range of `scale * r`, and whether the nodes and the rewards are close
    enough for the integral.
    """
    values, masses = law.flat(jnp.exp(law.log_masses))
    fixed = jax.lax.stop_gradient((values, masses))
    # The range of u: from where the best reward matters to one in e^36 of n draws, to where the
    # worst reward no longer matters.
    best = jnp.max(jnp.where(fixed[1] > 0, fixed[0], -jnp.inf))
    worst = jnp.min(jnp.where(fixed[1] > 1e-16, fixed[0], jnp.inf))
    low = -scale * best - jnp.log(n) - 36.0
    v = jax.lax.stop_gradient(
        low + (-scale * worst + 5.0 - low) * jnp.linspace(0, 1, 4096, dtype=values.dtype)
    )
    log_phi = jax.checkpoint(lambda v: _log_phi(masses, v + scale * values))
    soft = _Soft(n, scale, v, jax.lax.map(log_phi, v, batch_size=32))
    resolved = v[1] - v[0] < 0.5
    if not isinstance(law, GridReward):
        bulk = jax.lax.stop_gradient(law.log_masses[:, 1:] > -37.0)
        step = jnp.max(
            jnp.where(bulk, jnp.abs(jnp.diff(jax.lax.stop_gradient(law.values), axis=1)), 0.0)
        )
        resolved &= scale * step < 1
    return soft, scale * (best - worst), resolved


@eqx.filter_jit
def _wide_softmax(law: RewardLaw, n: Array, scale: Array) -> _Table:
    """`log g` if `scale * r` has a much wider spread than the noise: `n E[F_Y(scale r + A)^(n-1)]`
    with `F_Y(y) = E[F((y - A') / scale)]`.

    A and A' are Gumbel noise, the softmax maximizes `scale r + A`, and F is smooth on the scale of
    the noise.
    """
    values = jnp.sort(law.values.reshape(-1))
    log_below, log_above = jax.lax.map(
        jax.checkpoint(lambda r: law.log_cdf(r)), values, batch_size=64
    )
    noise = jnp.asarray(_GUMBEL, values.dtype)
    weights = jnp.exp(-noise - jnp.exp(-noise)) * (noise[1] - noise[0])
    lags = jnp.asarray(
        np.concatenate([_GUMBEL[0] - _GUMBEL[::-1], _GUMBEL[1:] - _GUMBEL[0]]), values.dtype
    )
    # Row i holds F at r_i + (a - a') / scale, whose sum over a' is F_Y at scale r_i + a. Sums with
    # the same a - a' share one entry.
    shift = np.arange(len(noise))
    smooth = jnp.zeros((len(lags), len(noise)), values.dtype)
    smooth = smooth.at[len(noise) - 1 + shift[None] - shift[:, None], shift[None]].set(
        weights[:, None]
    )
    tiny = jnp.finfo(values.dtype).tiny

    def at(points: Array) -> Array:
        row = points[:, None] + lags[None] / jnp.maximum(scale, tiny)
        below = jnp.interp(row, values, jnp.exp(log_below), left=0.0, right=1.0) @ smooth
        above = jnp.interp(row, values, jnp.exp(log_above), left=1.0, right=0.0) @ smooth
        near = above < 0.5
        log_cdf = jnp.where(
            near, jnp.log1p(-jnp.where(near, above, 0.0)), jnp.log(jnp.maximum(below, tiny))
        )
        return jax.nn.logsumexp((n - 1) * log_cdf + jnp.log(weights)[None], axis=1)

    rows = jax.lax.map(jax.checkpoint(lambda r: at(r[None])[0]), values, batch_size=256)
    return _Table(values, jnp.log(n) + rows)


def _unresolved(r: Array) -> Array:
    return jnp.full_like(r, jnp.nan)


@jax.jit
def _normalized(log_weights: Array) -> Array:
    return jnp.exp(log_weights - jax.nn.logsumexp(log_weights))


def _resolved(selected: Selected) -> Selected:
    log_probs = selected.law.log_masses + selected.log_ratios
    if not _checks.concrete(log_probs):
        return selected
    log_probs = np.asarray(log_probs, np.float64)
    # Of two values of -inf, NumPy may warn, though the result is right; NaN is refused below.
    with np.errstate(invalid="ignore"):
        total = np.logaddexp.reduce(log_probs, axis=None)
        cells = np.exp(-np.logaddexp.reduce(2 * np.logaddexp.reduce(log_probs, axis=0)))
    if not abs(total) < 1e-3 or (isinstance(selected.law, GridReward) and cells < 100):
        raise ValueError(
            f"quadrature does not resolve the selected draw for n = {float(selected.n):g}: its "
            f"mass sums to {np.exp(total):.6g} over {cells:.3g} nodes. Use fewer draws, or "
            "increase cells."
        )
    return selected


@jax.custom_jvp
def _piecewise_constant(log_ratio: Array, values: Array) -> Array:
    """`log_ratio`. It raises an error when differentiated in the rewards, because on a grid only
    their order is used.
    """
    return log_ratio


def _refuse_rewards(primals, tangents):
    if not isinstance(tangents[1], SymbolicZero):
        raise ValueError(
            "masses and densities of best-of-n on a grid have no derivative in the reward, because "
            "only the order of the rewards counts. Use softmax_of_n at a large scale, or finite "
            "differences."
        )
    tangent = tangents[0]
    return primals[0], jnp.zeros_like(primals[0]) if isinstance(tangent, SymbolicZero) else tangent


_piecewise_constant.defjvp(_refuse_rewards, symbolic_zeros=True)
