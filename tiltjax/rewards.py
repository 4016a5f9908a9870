r"""Rewards: functions `r(x_1) -> scalar` of one clean sample, to be maximised.

Any callable is a reward. The classes here are those whose tilts `rho(x) exp(scale * r(x))` are known, and the algebra
that keeps them known: `2 * Quadratic(y) + Linear(a)` is again a reward.

| reward | r(x) | conjugate to Gaussian noise |
|---|---|---|
| `Quadratic` | `-(x - y)^T H (x - y)` | if H is a multiple of the identity |
| `Linear` | `<a, x>` | yes |
| `Bump` | `exp(-abs(x - y)^2 / (2 w^2))` | no |
| `Step` | 0 where `<n, x> >= b`, else `-height` | no |
| `DoubleWell` | `-(x_1^4 - 12.5 x_1^2) / 8 - (x_2 - 0.4 x_1)^2` | no |

A reward is *conjugate* if `scale * r(x) = <a, x> - c |x|^2 / 2 + const`: its exponential is then one more Gaussian view
of the sample, and `tiltjax.Tilted` samples the tilt exactly, for any model.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs, linalg


class Reward(eqx.Module):
    """A reward that can be added to others and scaled. Subclasses define `__call__(x1) -> scalar`."""

    def __call__(self, x: Array) -> Array:
        raise NotImplementedError

    def conjugate(self) -> tuple[Array, Array]:
        """`(a, c)` with `r(x) = <a, x> - c |x|^2 / 2 + const`; `a` has the state's shape, `c` is a scalar.

        **Raises:** `ValueError` if the reward has no such form.
        """
        raise ValueError(
            f"{type(self).__name__} is not conjugate to Gaussian noise: only Linear, Quadratic with a scalar weight, and "
            "their sums and multiples are. Use a guidance (Conjugate, PlugIn) for this reward."
        )

    def __add__(self, other: Any) -> "Reward":
        if isinstance(other, int) and other == 0:  # where the built-in sum starts
            return self
        terms = lambda reward: reward.terms if isinstance(reward, Sum) else (reward,)
        return Sum((*terms(self), *terms(as_reward(cast(Callable, other)))))

    __radd__ = __add__

    def __mul__(self, factor: Any) -> "Reward":
        return Scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> "Reward":
        return Scaled(self, -1.0)

    def __sub__(self, other: Callable) -> "Reward":
        return self + -as_reward(other)

    def __rsub__(self, other: Callable) -> "Reward":
        return -self + other

    def __truediv__(self, divisor: Any) -> "Reward":
        return Scaled(self, 1 / inputs.finite(divisor, "a reward's divisor", 0))


class Quadratic(Reward):
    """`r(x) = -(x - y)^T H (x - y)`.

    **Arguments:** `target`, y, of the state's shape; `weight`, H: a scalar h for `H = h I` (any state shape), or, for
    vectors of dimension d, a `(d,)` diagonal or a symmetric `(d, d)` matrix. H may be indefinite.

    **Raises:** `ValueError` for a weight of another shape, or a matrix that is not symmetric.
    """

    target: Array
    weight: Array

    def __init__(self, target: inputs.Numbers, weight: inputs.Numbers = 1.0):
        self.target = inputs.finite(target, "target")
        self.weight = inputs.finite(weight, "weight", (0, 1, 2))
        d = self.target.shape
        if self.weight.ndim and (len(d) != 1 or self.weight.shape not in (d, d + d)):
            raise ValueError(
                f"weight must be a scalar, ({d[0] if d else 1},) or square to match target {d}, got {self.weight.shape}"
            )
        if self.weight.ndim == 2 and inputs.concrete(self.weight):
            h = np.asarray(self.weight)
            if not np.allclose(h, h.T, rtol=1e-5, atol=1e-7 * np.abs(h).max()):
                raise ValueError(f"weight must be symmetric, got {h.tolist()}: use (H + H.T) / 2")

    def __call__(self, x: Array) -> Array:
        _same_shape(x, self.target, "target")
        residual = x - self.target
        weighted = self.weight @ residual if self.weight.ndim == 2 else self.weight * residual
        return -linalg.inner(residual, weighted)

    def conjugate(self) -> tuple[Array, Array]:
        if self.weight.ndim:
            raise ValueError(
                f"Quadratic with a weight of shape {self.weight.shape} is not conjugate to Gaussian noise: only a multiple "
                "of the identity is. Pass a scalar weight, or use a guidance (Conjugate, PlugIn), or gibbs, which is exact."
            )
        return 2 * self.weight * self.target, 2 * self.weight

    def matrix(self) -> Array:
        """H as a `(d, d)` matrix, for vector-valued states."""
        if self.target.ndim != 1:
            raise ValueError(f"the weight is a matrix only for vectors, got a target of shape {self.target.shape}")
        if self.weight.ndim == 2:
            return self.weight
        return jnp.diag(jnp.broadcast_to(self.weight, self.target.shape))


class Linear(Reward):
    """`r(x) = <a, x>`. **Arguments:** `direction`, a, of the state's shape."""

    direction: Array

    def __init__(self, direction: inputs.Numbers):
        self.direction = inputs.finite(direction, "direction")

    def __call__(self, x: Array) -> Array:
        _same_shape(x, self.direction, "direction")
        return linalg.inner(self.direction, x)

    def conjugate(self) -> tuple[Array, Array]:
        return self.direction, jnp.zeros((), self.direction.dtype)


class Bump(Reward):
    """`r(x) = exp(-|x - y|^2 / (2 w^2))`. **Arguments:** `target`, y, of the state's shape; `width`, w > 0, a length in the data's units."""

    target: Array
    width: Array

    def __init__(self, target: inputs.Numbers, width: float | Array = 1.0):
        self.target = inputs.finite(target, "target")
        self.width = inputs.positive(width, "width")

    def __call__(self, x: Array) -> Array:
        _same_shape(x, self.target, "target")
        residual = x - self.target
        return jnp.exp(-linalg.inner(residual, residual) / (2 * self.width**2))


class Step(Reward):
    """`r(x) = 0` where `<n, x> >= b`, else `-height`: a preference without a gradient.

    **Arguments:** `height`; `normal`, n, of the state's shape (default: the one coordinate of a `(1,)` state); `offset`, b.
    """

    height: Array
    normal: Array
    offset: Array

    def __init__(self, height: float | Array, normal: inputs.Numbers = (1.0,), offset: float | Array = 0.0):
        self.height = inputs.finite(height, "height", 0)
        self.normal = inputs.finite(normal, "normal")
        self.offset = inputs.finite(offset, "offset", 0)

    def __call__(self, x: Array) -> Array:
        _same_shape(x, self.normal, "normal")
        return jnp.where(linalg.inner(self.normal, x) >= self.offset, jnp.zeros_like(self.height), -self.height)


class DoubleWell(Reward):
    """`r(x) = -(x_1^4 - 12.5 x_1^2) / 8 - (x_2 - 0.4 x_1)^2` on the plane: two maxima, at `±(2.5, 1)`."""

    def __call__(self, x: Array) -> Array:
        if x.shape != (2,):
            raise ValueError(f"DoubleWell is a reward on the plane: expected a state of shape (2,), got {x.shape}")
        return -(x[0] ** 4 - 12.5 * x[0] ** 2) / 8 - (x[1] - 0.4 * x[0]) ** 2


class Sum(Reward):
    """`r(x) = sum_i r_i(x)`, what `+` builds."""

    terms: tuple[Reward, ...]

    def __call__(self, x: Array) -> Array:
        return functools.reduce(jnp.add, [term(x) for term in self.terms])

    def conjugate(self) -> tuple[Array, Array]:
        natural, precision = zip(*(term.conjugate() for term in self.terms), strict=True)
        return functools.reduce(jnp.add, natural), functools.reduce(jnp.add, precision)


class Scaled(Reward):
    """`factor * r(x)`, what `*` builds. The factor may be negative: a penalty."""

    reward: Reward
    factor: Array

    def __init__(self, reward: Reward, factor: float | Array):
        self.reward = reward
        self.factor = inputs.finite(factor, "a reward's factor", 0)

    def __call__(self, x: Array) -> Array:
        return self.factor * self.reward(x)

    def conjugate(self) -> tuple[Array, Array]:
        a, c = self.reward.conjugate()
        return self.factor * a, self.factor * c


class Custom(Reward):
    """Any function or module as a reward; what `as_reward` builds. **Raises:** `TypeError` for an answer that is not one floating number."""

    fn: inputs.Function

    def __call__(self, x: Array) -> Array:
        result = self.fn(x)
        if not isinstance(result, jax.Array | np.ndarray | float):
            raise TypeError(f"a reward must return one scalar for one sample, got {type(result).__name__}")
        result = jnp.asarray(result)
        if not jnp.issubdtype(
            x.dtype, jnp.floating
        ):  # tokens: nothing is differentiated, and counts are as good as any
            return result if jnp.issubdtype(result.dtype, jnp.floating) else result.astype(float)
        if not jnp.issubdtype(result.dtype, jnp.floating):
            raise TypeError(
                f"a reward must return a floating number, got {result.dtype}: cast it, if its gradient, zero, will not be asked for, as in "
                "best_of_n and softmax_of_n"
            )
        return result.astype(x.dtype)


def as_reward(reward: Callable, name: str = "reward") -> Reward:
    """`reward` itself if it is one, else the callable wrapped so that it can be traced, summed and scaled."""
    return reward if isinstance(reward, Reward) else Custom(inputs.Function(reward, name))


def value(reward: Reward, x: Array) -> Array:
    """`reward(x)`, refused with a `ValueError` if it is not one scalar."""
    result = reward(x)
    if result.shape != ():
        raise ValueError(
            f"a reward must return one scalar for one sample: got shape {result.shape} for a sample of shape {x.shape}. "
            "Reduce it (jnp.sum, jnp.mean); batching over samples is done for you."
        )
    return result


def values(reward: Reward, x: Array) -> Array:
    """The reward of each row of `x` `(num, *shape)`, `(num,)`.

    Not compiled by itself: what a function of a user's sees beside its argument may change between two calls.
    """
    return jax.vmap(lambda x: value(reward, x))(x)


def _same_shape(x: Array, other: Array, name: str) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"a sample of shape {x.shape} met a reward whose {name} has shape {other.shape}: make them equal"
        )
