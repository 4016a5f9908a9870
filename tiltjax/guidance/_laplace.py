"""The Laplace approximation of `log h`: a Gaussian posterior and a quadratic reward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _linalg, rewards
from tiltjax.guidance._base import Estimate, Guidance
from tiltjax.models import Model, check_mean


class Laplace(Guidance):
    """Laplace's approximation of h at the denoiser, with the posterior covariance of the model.

    With `m = D_t(x)`, `J = ∂D/∂x`, `P = (sigma^2 / alpha) J` (Tweedie's second identity;
    symmetrized, because a learned Jacobian is not symmetric) and the curvature `H = -∇^2 r(m)`,

        log h = scale r(m) - logdet(I + scale P H) / 2 + scale^2 g^T (I + scale P H)^-1 P g / 2,
            g = ∇r(m)
        score = J^T (I + scale H P)^-1 scale g.

    Beyond a kink, or where r saturates, the mode `m + P u` of this quadratic model, with the score
    `J^T u`, is too far away. The step to it is therefore shortened by the factor s in (0, 1] that
    maximizes `scale r(m + s P u) - s^2 u^T P u / 2`. The score is multiplied by s, and `log h` is
    at most this maximum `- logdet(I + scale P H) / 2`, so it never exceeds `scale max r`. For a
    concave quadratic reward s is 1.

    The score holds J and H fixed, because differentiating through them gives worse results. The
    approximation is exact for a Gaussian prior and a concave quadratic reward with any matrices. On
    mixtures it beats any scalar damping. Convex directions of the reward are treated as flat (H is
    projected onto the positive semi-definite cone), because the integral may diverge otherwise.
    Directions in which a learned Jacobian makes P negative are treated as known exactly
    (`_linalg.square_root`).

    One evaluation costs one denoiser call and d pullbacks for states of size d, and the Hessian and
    twenty more gradients of the reward, so this guidance is for low-dimensional states.

    **Arguments:** `model`; `reward`, twice differentiable; `scale >= 0`.
    """

    model: Model
    reward: rewards.Reward
    scale: Array

    def __init__(self, model: Model, reward: Callable, scale: float | Array = 1.0):
        check_mean(model, "Laplace(model, reward, scale)")
        self.model = model
        self.reward = rewards.as_reward(reward)
        self.scale = _checks.nonnegative(scale, "scale")

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        shape, size = x.shape, x.size
        denoise = lambda x: self.model.denoise(t, x.reshape(shape)).reshape(size)
        reward = lambda m: rewards.value(self.reward, m.reshape(shape))

        mean, pullback = jax.vjp(denoise, x.reshape(size))
        jacobian = jax.vmap(lambda row: pullback(row)[0])(jnp.eye(size, dtype=x.dtype))
        tweedie = self.model.interpolant.tweedie(t)
        root_cov = _linalg.square_root(tweedie * (jacobian + jacobian.T) / 2)

        value, gradient = jax.value_and_grad(reward)(mean)
        # With root root^T = H, the matrix I + root^T P root is symmetric, but I + H P is not.
        concave = _linalg.spectral(jax.nn.relu, -jax.hessian(reward)(mean), _linalg.rotations)
        root = _linalg.square_root(concave)
        factor = root.T @ root_cov
        cov_gradient = root_cov @ (root_cov.T @ gradient)
        system = jnp.eye(size, dtype=x.dtype) + self.scale * factor @ factor.T
        solved, half_logdet = _linalg.solve(system, (root.T @ cov_gradient)[:, None])
        damped = self.scale * (gradient - self.scale * root @ solved[:, 0])
        # The mode of the quadratic model is `mean + move`; the mode of the reward may be nearer.
        move = root_cov @ (root_cov.T @ damped)
        along = lambda s: self.scale * reward(mean + s * move) - s**2 * damped @ move / 2
        step = _maximizer(along, value.dtype)
        quadratic = self.scale * value + self.scale * damped @ cov_gradient / 2
        reached = along(step)
        log_h = jnp.where(reached < quadratic, reached, quadratic) - half_logdet
        damped = step * damped
        # The shift is tweedie * J^T damped, with the Jacobian that is not symmetrized.
        return Estimate(
            (mean + tweedie * jacobian.T @ damped).reshape(shape), mean.reshape(shape), log_h
        ), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale * rewards.value(self.reward, x1)


_STEPS = 16  # of the search for a mode


def _maximizer(fn: Callable[[Array], Array], dtype: Any) -> Array:
    """The place in (0, 1] of the maximum of a concave `fn`; 1 if `fn` still rises there. Its
    derivative is that of the solution of `fn' = 0`, not of the search.
    """
    slope, one = jax.grad(fn), jnp.ones((), dtype)

    def newton(place: Array, _: None) -> tuple[Array, None]:
        rise, curvature = jax.jvp(slope, (place,), (one,))
        move = rise / jnp.where(curvature < 0, curvature, -jnp.inf)
        # At a kink Newton's step leads out of the bracket.
        return jnp.clip(place - move, low, high), None

    (low, high), place, inside = _search(slope, dtype)
    place, _ = jax.lax.scan(newton, place, None, length=2)
    place, inside = jax.lax.stop_gradient((place, inside))
    rise, curvature = jax.lax.stop_gradient(jax.jvp(slope, (place,), (one,)))
    inside &= curvature < 0
    return jnp.where(inside, place + (rise - slope(place)) / jnp.where(inside, curvature, 1.0), one)


def _search(slope: Callable[[Array], Array], dtype: Any) -> tuple[tuple, Array, Array]:
    """The zero of a decreasing `slope` in (0, 1), by false position (Illinois): the bracket, the
    zero, and whether there is one. The zero is exact for a line.
    """
    ends = jnp.zeros((), dtype), jnp.ones((), dtype)
    slopes = jax.vmap(slope)(jnp.stack(ends))

    def crossing(left: tuple[Array, Array], right: tuple[Array, Array]) -> Array:
        (a, rise), (b, fall) = left, right
        return a + (b - a) * rise / jnp.where(rise > fall, rise - fall, jnp.inf)

    def narrow(bracket: tuple, _: None) -> tuple[tuple, None]:
        (a, rise), (b, fall) = bracket
        place = crossing(*bracket)
        found = slope(place)
        # The slope of an end that stays is halved, so that it does not stay for long.
        above, below = ((place, found), (b, fall / 2)), ((a, rise / 2), (place, found))
        return jax.tree.map(lambda new, old: jnp.where(found > 0, new, old), above, below), None

    start = tuple(zip(ends, slopes, strict=True))
    bracket, _ = jax.lax.scan(narrow, start, None, length=_STEPS)
    (low, _), (high, _) = bracket
    return (low, high), crossing(*bracket), (slopes[0] > 0) & (slopes[1] < 0)
