r"""Exact tilts by anisotropic quadratic rewards: a mixture of conjugate tilts, sampled by Gibbs.

For a quadratic reward let `scale * r(x) = <a, x> - x^T L x / 2 + const` with L symmetric. Take
`C >= lambda_max(L)` and `M = C I - L`, which is positive semi-definite. Then (Hubbard and
Stratonovich)

    exp(<a, x> - x^T L x / 2) = E_{xi ~ N(0, I)} exp(<a + M^(1/2) xi, x> - C |x|^2 / 2).

Given xi, the tilt is conjugate: one posterior draw of the model at precision C (`Glass`). Given x,
the auxiliary variable is Gaussian, `xi | x ~ N(M^(1/2) x, I)`. Alternating the two draws samples
the tilt for any model, without a gradient. The only error comes from the steps of the posterior
draw. It is O(1 / steps^2) (`Glass` of order 2), and slow mixing magnifies it.

**Number of sweeps.** Every particle is a separate chain, so the correlation *across particles*
between a sweep and an earlier sweep measures how much the chains still depend on the earlier state.
A run stops when the state is independent of the state halfway through the run: when the largest
correlation with it, over coordinates, their squares and the reward, is within the noise of
independent states.

Reference: Moitra, Risteski and Rohatgi, *Steering diffusion models with quadratic rewards* (COLT
2026), for the decomposition.
"""

import dataclasses
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg, _pytree, rewards
from tiltjax.mixtures import decomposed
from tiltjax.models import Model, check_mean
from tiltjax.particles import Mixing, Particles, unweighted
from tiltjax.posteriors import Glass

_BLOCK = 5  # sweeps between two estimates of the correlation
# The least number of chains: four standard errors of a correlation are then 1/4. With fewer chains,
# no correlation would be significant.
_CHAINS = 256
# The largest width of the states for one step, in units of the noise. At this width the standard
# deviation of a draw is 5% too small; that of much wider data comes out near 1.3.
_WIDEST = 0.6
_NOT_QUADRATIC = (
    "gibbs needs a quadratic reward, got one whose Hessian is not constant: use Conjugate"
)


def gibbs(
    key: Array,
    model: Model,
    reward: Callable,
    scale: float | Array = 1.0,
    *,
    num: int,
    steps: int = 50,
    max_sweeps: int = 2000,
) -> Particles:
    """`num` particles of the tilt by a quadratic reward with any matrix that has a concave
    direction; `particles.mixing` reports how the chains mixed.

    **Arguments:** `key`; `model`, whose states have d entries, for a matrix of d x d; `reward`,
    quadratic (`rewards.Quadratic` with any weight, `rewards.LinearReward`, sums, or a function with
    a constant Hessian); `num`, of which at least 256 are always run, because mixing is measured
    across particles; `steps` of the inner `Glass` flow, of order 2; `max_sweeps`, the largest
    number of sweeps.

    Do not use it inside `jit`, `vmap` or `grad`: the number of sweeps depends on values.

    **Raises:** `ValueError` for a reward that is not quadratic on the particles and around them, or
    that has no concave direction; `RuntimeError` if the chains still depend on their start after
    `max_sweeps`; `FloatingPointError` if a state is not finite, as happens if the tilt has no
    finite mass, and if the data of a network is too wide for the steps; `TypeError` under a
    transformation of JAX.
    """
    key = _checks.key(key)
    check_mean(model, "gibbs(key, model, reward, scale, num=1000)")
    num, max_sweeps = _checks.count(num, "num"), _checks.count(max_sweeps, "max_sweeps")
    reward, gradient, hessian = _fit(key, model, reward, scale)
    glass, natural, precision, root = _decompose(model, gradient, hessian, steps)

    chains = max(num, _CHAINS)
    key_start, key_sweeps = jax.random.split(key)
    x = _run(
        key_start,
        glass,
        natural,
        precision,
        root,
        jnp.zeros((chains, *model.shape), model.dtype),
        1,
    )
    middle = x.mean(axis=0, keepdims=True)
    _require_quadratic(reward, middle + 3 * (x - middle))
    history, threshold = [x], 4 / np.sqrt(chains)
    while True:
        block = len(history) - 1
        x = _run(jax.random.fold_in(key_sweeps, block), glass, natural, precision, root, x, _BLOCK)
        history.append(x)
        sweeps = _BLOCK * (block + 1)
        if not np.all(np.isfinite(np.asarray(x))):
            raise FloatingPointError(
                f"a state is not finite after {sweeps} sweeps. The tilt may have no finite mass, "
                "if the reward is more convex than the model's log-density is concave: lower the "
                "scale, or check the network and the target"
            )
        _require_quadratic(reward, x)
        correlation = _correlation(reward, history[len(history) // 2], x)
        if correlation < threshold and block:
            _check_width(glass, precision, x)
            return dataclasses.replace(unweighted(x[:num]), mixing=Mixing(sweeps, correlation))
        if sweeps >= max_sweeps:
            raise RuntimeError(
                f"after {sweeps} sweeps the chains are still correlated with their states halfway "
                f"(correlation {correlation:.2g}, noise {threshold:.2g}), because the matrix is "
                f"far from a multiple of the identity: raise max_sweeps (got {max_sweeps})"
            )


def _fit(
    key: Array, model: Model, reward: Callable, scale: float | Array
) -> tuple[rewards.Reward, Array, Array]:
    """The reward, and of `scale * reward` the gradient at the origin and the Hessian."""
    scale = _checks.nonnegative(scale, "scale").astype(model.dtype)
    reward = _pytree.cast(rewards.as_reward(reward), model.dtype)
    size = math.prod(model.shape)
    value = lambda entries: rewards.value(reward, entries.reshape(model.shape))
    origin, elsewhere = (
        jnp.zeros(size, model.dtype),
        jnp.linspace(0.5, 1.5, size, dtype=model.dtype),
    )
    hessian = jax.jit(jax.hessian(value))
    found = hessian(origin)
    if not _checks.concrete((key, model, scale, found)):
        raise TypeError(
            "gibbs cannot run inside jit, vmap or grad, because values decide how many sweeps it "
            "runs: call it outside of them"
        )
    if not np.allclose(found, hessian(elsewhere), rtol=1e-4, atol=1e-6):
        raise ValueError(_NOT_QUADRATIC)
    return reward, scale * jax.grad(value)(origin), scale * found


@eqx.filter_jit
def _misfit(reward: rewards.Reward, x: Array) -> tuple[Array, Array]:
    """The distances between the rewards of `x` and their second-order expansion at the origin, and
    the distances that rounding allows.
    """
    value = lambda entries: rewards.value(reward, entries.reshape(x.shape[1:]))
    entries = x.reshape(len(x), -1)
    origin = jnp.zeros_like(entries[0])
    constant, linear = value(origin), entries @ jax.grad(value)(origin)
    square = jnp.sum(entries @ jax.hessian(value)(origin) * entries, axis=1) / 2
    values = jax.vmap(value)(entries)
    rounding = 100 * jnp.finfo(x.dtype).eps * (jnp.abs(constant) + jnp.abs(values)) + 1e-6
    return jnp.abs(values - constant - linear - square), rounding + 1e-4 * (
        jnp.abs(linear) + jnp.abs(square)
    )


def _require_quadratic(reward: rewards.Reward, x: Array) -> None:
    """Raise a `ValueError` if the values of a reward are not those of one quadratic. Comparing two
    Hessians does not detect a kink.
    """
    misfit, allowed = map(np.asarray, _misfit(reward, x))
    if np.any((misfit > allowed) & np.isfinite(misfit)):
        raise ValueError(_NOT_QUADRATIC)


def _decompose(
    model: Model, gradient: Array, hessian: Array, steps: int
) -> tuple[Glass, Array, Array, Array]:
    """`(glass, a, C, M^(1/2))`."""
    precision = jnp.max(jnp.linalg.eigvalsh(-hessian))
    if not float(precision) > 0:
        raise ValueError(
            f"the reward has no concave direction, the largest eigenvalue of its -Hessian is "
            f"{float(precision):g}: use Tilted for a linear reward"
        )
    rest = precision * jnp.eye(len(hessian), dtype=model.dtype) + hessian
    root = _linalg.spectral(lambda values: jnp.sqrt(jnp.maximum(values, 0)), rest)
    return (
        Glass(_pytree.cast(model, model.dtype), steps, order=2),
        gradient.reshape(model.shape),
        precision,
        root,
    )


@eqx.filter_jit
def _run(
    key: Array, glass: Glass, natural: Array, precision: Array, root: Array, x: Array, sweeps: int
) -> Array:
    glass, interpolant = decomposed(glass), glass.model.interpolant
    spread = lambda x: (root @ x.reshape(-1)).reshape(x.shape)

    def sweep(key: Array, x: Array) -> Array:
        key_xi, key_draw = jax.random.split(key)
        xi = spread(x) + jax.random.normal(key_xi, x.shape, x.dtype)
        return glass.draw(key_draw, *interpolant.observe(precision, natural + spread(xi)))

    def advance(x: Array, key: Array) -> tuple[Array, None]:
        return jax.vmap(sweep)(jax.random.split(key, len(x)), x), None

    return jax.lax.scan(advance, x, jax.random.split(key, sweeps))[0]


def _check_width(glass: Glass, precision: Array, x: Array) -> None:
    """Raise a `FloatingPointError` if the states are so wide that the first step of the inner flow
    passes by all noise. Its draws are then too narrow, of any number of sweeps.
    """
    interpolant = glass.model.interpolant
    noise = interpolant.data_scale() * glass.widening.astype(x.dtype)
    width = float(jnp.sqrt(jnp.mean(jnp.var(x, axis=0)) * (precision + noise**-2)))
    if width > _WIDEST * glass.inner_steps:
        raise FloatingPointError(
            f"the samples are {width:.3g} times as wide as the noise, too wide for "
            f"{glass.inner_steps} steps: divide the data by its standard deviation, or raise steps"
        )


def _correlation(reward: rewards.Reward, before: Array, after: Array) -> float:
    """The largest correlation across particles between two sweeps, over coordinates, their squares
    and the reward.
    """

    def standardized(x: Array) -> np.ndarray:
        entries = np.asarray(x).reshape(len(x), -1)
        values = np.concatenate([entries, entries**2, jax.vmap(reward)(x)[:, None]], axis=1)
        centered = values - values.mean(axis=0)
        return centered / np.maximum(centered.std(axis=0), np.finfo(values.dtype).tiny)

    with np.errstate(over="ignore", invalid="ignore"):  # a run without finite mass may overflow
        return float(np.abs(np.mean(standardized(before) * standardized(after), axis=0)).max())
