r"""Quadrature in one and two dimensions, an independent check of every closed form.

The module has three rules, for three kinds of integrands:

- `tilt`: a midpoint grid over the prior's bulk, for laws, moments and masses of any reward. The
  error is exponentially small for smooth rewards, O(cell) at a jump.
- `log_norm`: the trapezoidal rule in each component's standard coordinates on [-8, 8]^d, for
  `log E[exp(scale * r(X))]` of a mixture with components of any width. It is spectrally accurate
  while the nodes resolve `exp(scale * r)`.
- `unit_interval`: tanh-sinh nodes on [0, 1], for the integrals of `theory.flow_laws`, whose
  integrands vary on all scales at the ends.

Reference: Takahasi and Mori (1974), double exponential formulas.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg, _pytree, _repr, rewards
from tiltjax.mixtures import GaussianMixture, check_mixture


class GridTilt(_repr.Report):
    """A tilted law on a grid of cells: `centers` `(m, d)`, `log_masses` `(m,)`, `cell` `(d,)`,
    `log_norm`.
    """

    prior: GaussianMixture
    reward: rewards.Reward
    scale: Array
    centers: Array
    log_masses: Array
    cell: Array
    log_norm: Array

    def _title(self) -> str:
        return f"GridTilt: {self.centers.shape[0]} cells in R^{self.centers.shape[1]}"

    def _rows(self) -> dict[str, str]:
        return {"log Z": _repr.form(self.log_norm)}

    def expect(self, fn: Callable[[Array], Array]) -> Array:
        """`E[fn(X)]` under the tilt, for `fn` of one point."""
        values = jax.vmap(fn)(self.centers)
        masses = jnp.exp(self.log_masses)  # in single precision they do not sum exactly to one
        return _linalg.weighted_sum(masses / jnp.sum(masses), values.astype(masses.dtype))

    def mean(self) -> Array:
        """`E[X]`, shape `(d,)`."""
        # Relative to one center, so that a mean far from the origin has the rounding of one number.
        center = self.centers[jnp.argmax(self.log_masses)]
        return center + self.expect(lambda x: x - center)

    def cov(self) -> Array:
        """`Cov(X)`, shape `(d, d)`."""
        mean = self.mean()
        return self.expect(lambda x: jnp.outer(x - mean, x - mean))

    def sample(self, key: Array, num: int) -> Array:
        """`num` draws, `(num, d)`: a cell by its mass, then a uniform point in the cell."""
        key_cell, key_inside = jax.random.split(_checks.key(key))
        num = _checks.count(num, "num")
        masses = jnp.exp(self.log_masses)
        # The rounding of a sum must not give a mass to a cell that has none.
        cumulative = jax.lax.cummax(jnp.where(masses > 0, jnp.cumsum(masses), 0))
        level = jax.random.uniform(key_cell, (num,), cumulative.dtype) * cumulative[-1]
        index = jnp.minimum(jnp.searchsorted(cumulative, level, side="right"), len(cumulative) - 1)
        inside = jax.random.uniform(key_inside, (num, len(self.cell)), self.cell.dtype, -0.5, 0.5)
        return self.centers[index] + inside * self.cell[None]

    def log_prob(self, x: Array) -> Array:
        """The log-density at one point."""
        return self.prior.log_prob(x) + self.scale * self.reward(x) - self.log_norm


def tilt(
    prior: GaussianMixture,
    reward: Callable,
    scale: float | Array,
    *,
    cells: int | None = None,
    reach: float = 9.0,
) -> GridTilt:
    """The tilt by any reward in one or two dimensions, on a grid over all components' means ±
    `reach` standard deviations.

    **Arguments:** `prior`; `reward`, any function of one state; `scale >= 0`; `cells` in each
    dimension (default 100,000 on the line, 800 in the plane; an even number puts an edge at the
    middle of a symmetric prior); `reach`.

    **Raises:** `ValueError` for more than two dimensions, and for a tilt that the grid does not
    resolve.
    """
    check_mixture(prior, "prior")
    d = prior.dim
    if d > 2:
        raise ValueError(
            f"quadrature covers one or two dimensions, got {d}: use theory.tilt where a closed "
            "form exists"
        )
    cells = (100_000, 800)[d - 1] if cells is None else _checks.count(cells, "cells")
    scale = _checks.nonnegative(scale, "scale").astype(prior.means.dtype)
    r = _pytree.cast(rewards.as_reward(reward), prior.means.dtype)
    grid = _grid_tilt(
        prior, r, scale, _checks.positive(reach, "reach").astype(prior.means.dtype), cells
    )
    if _checks.concrete(grid.log_masses):
        effective = float(np.exp(-np.logaddexp.reduce(2 * np.asarray(grid.log_masses, np.float64))))
        if not effective > 100:
            raise ValueError(
                f"the grid does not resolve this tilt: its mass is in {effective:.3g} cells of "
                f"{cells}^{d}. Lower the scale (got {float(scale):g}), or increase cells."
            )
    return grid


@eqx.filter_jit
def _grid_tilt(
    prior: GaussianMixture, r: rewards.Reward, scale: Array, reach: Array, cells: int
) -> GridTilt:
    spread = reach * jnp.sqrt(jnp.diagonal(prior.covs, axis1=1, axis2=2))
    low, high = jnp.min(prior.means - spread, axis=0), jnp.max(prior.means + spread, axis=0)
    cell = (high - low) / cells
    middles = jnp.arange(cells, dtype=low.dtype) + 0.5
    axes = [low[i] + cell[i] * middles for i in range(prior.dim)]
    centers = jnp.stack([grid.reshape(-1) for grid in jnp.meshgrid(*axes, indexing="ij")], axis=-1)
    log_masses = (
        jax.vmap(prior.log_prob)(centers)
        + scale * rewards.values(r, centers)
        + jnp.sum(jnp.log(cell))
    )
    log_norm, log_masses = jax.nn.logsumexp(log_masses), jax.nn.log_softmax(log_masses)
    return GridTilt(prior, r, scale, centers, log_masses, cell, log_norm)


def log_norm(
    mixture: GaussianMixture,
    reward: Callable,
    scale: float | Array,
    *,
    nodes: int | None = None,
    reach: float = 8.0,
) -> Array:
    """`log E[exp(scale * r(X))]` for `X ~ mixture` in one or two dimensions, differentiable in the
    mixture.

    **Arguments:** `mixture`; `reward`; `scale`; `nodes` in each dimension (default 401 on the line,
    41 in the plane) over ± `reach` standard deviations.

    **Raises:** `ValueError` for more than two dimensions.
    """
    check_mixture(mixture, "mixture")
    r = _pytree.cast(rewards.as_reward(reward), mixture.means.dtype)
    reach = _checks.number(reach, "reach", 0, np.inf, closed="neither")
    d, scale = mixture.dim, _checks.finite(scale, "scale", 0).astype(mixture.means.dtype)
    if d > 2:
        raise ValueError(f"quadrature covers one or two dimensions, got {d}")
    nodes = (401, 41)[d - 1] if nodes is None else _checks.count(nodes, "nodes", 2)
    axis = np.linspace(-reach, reach, nodes)
    points = np.stack(
        [grid.reshape(-1) for grid in np.meshgrid(*[axis] * d, indexing="ij")], axis=-1
    )
    weights = jnp.asarray(
        -np.sum(points**2, axis=1) / 2 + d * np.log((axis[1] - axis[0]) / np.sqrt(2 * np.pi))
    )
    weights, points = weights.astype(mixture.means.dtype), jnp.asarray(points, mixture.means.dtype)

    def component(mean: Array, cov: Array) -> Array:
        states = mean[None] + points @ _linalg.square_root(cov).T
        return jax.nn.logsumexp(weights + scale * rewards.values(r, states))

    return jax.nn.logsumexp(mixture.log_weights + jax.vmap(component)(mixture.means, mixture.covs))


def unit_interval(levels: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tanh-sinh nodes `w` in (0, 1), their distances `1 - w` from the right end without
    cancellation, and their weights.
    """
    tau = np.linspace(-3.6, 3.6, 2 * levels + 1)
    argument = np.pi * np.sinh(tau)
    left, right = 1 / (1 + np.exp(-argument)), 1 / (1 + np.exp(argument))
    return left, right, np.pi * np.cosh(tau) * left * right * (tau[1] - tau[0])
