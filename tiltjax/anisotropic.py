r"""Exact tilts by anisotropic quadratic rewards: a mixture of conjugate tilts, sampled by Gibbs.

For a quadratic reward let `scale * r(x) = <a, x> - x^T L x / 2 + const` with L symmetric. Take `C >= lambda_max(L)` and `M = C I - L`, which
is positive semi-definite. Then (Hubbard and Stratonovich)

    exp(<a, x> - x^T L x / 2) = E_{xi ~ N(0, I)} exp(<a + M^(1/2) xi, x> - C |x|^2 / 2):

given xi the tilt is conjugate, one posterior draw of the model at precision C (`Glass`), and given x the auxiliary variable is Gaussian,
`xi | x ~ N(M^(1/2) x, I)`. Alternating the two samples the tilt exactly, for any model, up to the draw's own steps, without a gradient.

How many sweeps? Every particle is a chain of its own, so the correlation *across particles* between a sweep and an earlier one shows how
much of the earlier state is remembered. A run goes on until the state half-way is forgotten: until the largest correlation with it, over
coordinates, their squares and the reward, is within the noise of what independent states would show.

Reference: Moitra, Risteski and Rohatgi, *Steering diffusion models with quadratic rewards* (COLT 2026), for the decomposition.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs, linalg, rewards
from tiltjax.models import Model
from tiltjax.particles import Particles, unweighted
from tiltjax.posteriors import Glass

_BLOCK = 5  # sweeps between two looks at the correlation


class Mixing(NamedTuple):
    """What the diagnostic saw: `sweeps`, how many were run; `correlation`, the largest with the state half-way."""

    sweeps: int
    correlation: float


def gibbs(
    key: Array,
    model: Model,
    reward: Callable,
    scale: float | Array = 1.0,
    *,
    num: int,
    steps: int = 50,
    max_sweeps: int = 2000,
) -> tuple[Particles, Mixing]:
    """`num` particles of the tilt by a quadratic reward with any concave matrix, and how they mixed.

    **Arguments:** `key`; `model`, whose states have d entries, for a matrix of d x d; `reward`, quadratic (`rewards.Quadratic` with any weight, `rewards.Linear`, sums, or
    a function whose Hessian is constant); `steps` of the inner `Glass` flow; `max_sweeps`, where to give up.

    **Raises:** `ValueError` for a reward that is not quadratic, or not concave in any direction; `RuntimeError` if the chains still
    remember their start after `max_sweeps`.
    """
    key = inputs.typed_key(key)
    inputs.instance(model, Model, "model", "gibbs(key, model, reward, scale, num=1000)")
    num, max_sweeps = inputs.count(num, "num"), inputs.count(max_sweeps, "max_sweeps")
    glass, reward, natural, precision, root = _decompose(model, reward, scale, steps)

    key_start, key_sweeps = jax.random.split(key)
    x = _run(key_start, glass, natural, precision, root, jnp.zeros((num, *model.shape), model.dtype), 1)
    past, threshold = [x], 4 / np.sqrt(num)
    while True:
        block = len(past) - 1
        x = _run(jax.random.fold_in(key_sweeps, block), glass, natural, precision, root, x, _BLOCK)
        past.append(x)
        sweeps = _BLOCK * (block + 1)
        if not np.all(np.isfinite(np.asarray(x))):
            raise FloatingPointError(
                f"a state is not finite after {sweeps} sweeps: look at the network, the scale and the target"
            )
        correlation = _memory(reward, past[len(past) // 2], x)
        if correlation < threshold and block:
            return unweighted(x), Mixing(sweeps, correlation)
        if sweeps >= max_sweeps:
            raise RuntimeError(
                f"after {sweeps} sweeps the chains still remember where they were half-way (correlation {correlation:.2g}, noise "
                f"{threshold:.2g}): the matrix is too far from a multiple of the identity. Raise max_sweeps (got {max_sweeps})."
            )


def _decompose(model: Model, reward: Callable, scale: float | Array, steps: int):
    """`(glass, reward, a, C, M^(1/2))`."""
    scale = inputs.nonnegative(scale, "scale").astype(model.dtype)
    reward = inputs.cast(rewards.as_reward(reward), model.dtype)
    size = math.prod(model.shape)
    value = lambda entries: rewards.value(reward, entries.reshape(model.shape))
    origin, elsewhere = jnp.zeros(size, model.dtype), jnp.linspace(0.5, 1.5, size, dtype=model.dtype)
    hessian = jax.jit(jax.hessian(value))
    if not np.allclose(hessian(origin), hessian(elsewhere), rtol=1e-4, atol=1e-6):
        raise ValueError("gibbs takes quadratic rewards, got one whose Hessian is not constant: use Conjugate")
    curvature = -scale * hessian(origin)
    precision = jnp.max(jnp.linalg.eigvalsh(curvature))
    if not float(precision) > 0:
        raise ValueError("the reward is not concave in any direction: use Tilted for a linear one")
    natural = scale * jax.grad(value)(origin).reshape(model.shape)
    rest = precision * jnp.eye(size, dtype=model.dtype) - curvature
    root = linalg.spectral(lambda values: jnp.sqrt(jnp.maximum(values, 0)), rest)
    return Glass(inputs.cast(model, model.dtype), steps), reward, natural, precision, root


@eqx.filter_jit
def _run(key: Array, glass: Glass, natural: Array, precision: Array, root: Array, x: Array, sweeps: int) -> Array:
    path = glass.model.interpolant
    spread = lambda x: (root @ x.reshape(-1)).reshape(x.shape)

    def sweep(key: Array, x: Array) -> Array:
        key_xi, key_draw = jax.random.split(key)
        xi = spread(x) + jax.random.normal(key_xi, x.shape, x.dtype)
        return glass.draw(key_draw, *path.observe(precision, natural + spread(xi)))

    def advance(x: Array, key: Array) -> tuple[Array, None]:
        return jax.vmap(sweep)(jax.random.split(key, len(x)), x), None

    return jax.lax.scan(advance, x, jax.random.split(key, sweeps))[0]


def _memory(reward: rewards.Reward, before: Array, after: Array) -> float:
    """The largest correlation across particles between two sweeps, over coordinates, their squares and the reward."""

    def standardised(x: Array) -> np.ndarray:
        entries = np.asarray(x).reshape(len(x), -1)
        values = np.concatenate([entries, entries**2, jax.vmap(reward)(x)[:, None]], axis=1)
        centred = values - values.mean(axis=0)
        return centred / np.maximum(centred.std(axis=0), np.finfo(values.dtype).tiny)

    return float(np.abs(np.mean(standardised(before) * standardised(after), axis=0)).max())
