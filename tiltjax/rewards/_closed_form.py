r"""Rewards `r(x_1) -> scalar` of one clean sample whose tilts are known.

Any callable is a reward. The tilts `rho(x) exp(scale * r(x))` of the classes here are known, and so
are the tilts of their sums and multiples: `2 * Quadratic(y) + LinearReward(a)` is again a reward.

| reward | r(x) | conjugate to Gaussian noise |
|---|---|---|
| `Quadratic` | `-(x - y)^T H (x - y)` | if H is a multiple of the identity |
| `LinearReward` | `<a, x>` | yes |
| `Bump` | `exp(-abs(x - y)^2 / (2 w^2))` | no |
| `StepReward` | 0 where `<n, x> >= b`, else `-height` | no |
| `DoubleWell` | `-(x_1^4 - 12.5 x_1^2) / 8 - (x_2 - 0.4 x_1)^2` | no |

A reward is *conjugate* if `scale * r(x) = <a, x> - c |x|^2 / 2 + const`. Its exponential is then
the likelihood of one more Gaussian observation of the sample, and `tiltjax.Tilted` samples the tilt
exactly, for any model.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg
from tiltjax.rewards._base import Reward, check_same_shape


class Quadratic(Reward):
    """`r(x) = -(x - y)^T H (x - y)`.

    **Arguments:** `target`, y, of the state's shape; `weight`, H: a scalar h for `H = h I` (any
    state shape), or, for vectors of dimension d, a `(d,)` diagonal or a symmetric `(d, d)` matrix.
    H may be indefinite.

    **Raises:** `ValueError` for a weight of another shape, or a matrix that is not symmetric.
    """

    target: Array
    weight: Array

    def __init__(self, target: _checks.Numbers, weight: _checks.Numbers = 1.0):
        self.target = _checks.finite(target, "target")
        self.weight = _checks.finite(weight, "weight", (0, 1, 2))
        d = self.target.shape
        if self.weight.ndim and (len(d) != 1 or self.weight.shape not in (d, d + d)):
            raise ValueError(
                f"weight must be a scalar, ({d[0] if d else 1},) or square to match target {d}, "
                f"got {self.weight.shape}"
            )
        if self.weight.ndim == 2 and _checks.concrete(self.weight):
            h = np.asarray(self.weight)
            if not np.allclose(h, h.T, rtol=1e-5, atol=1e-7 * np.abs(h).max()):
                raise ValueError(f"weight must be symmetric, got {h.tolist()}: use (H + H.T) / 2")

    def __call__(self, x: Array) -> Array:
        check_same_shape(x, self.target, "target")
        residual = x - self.target
        weighted = self.weight @ residual if self.weight.ndim == 2 else self.weight * residual
        return -_linalg.inner(residual, weighted)

    def conjugate(self) -> tuple[Array, Array]:
        if self.weight.ndim:
            raise ValueError(
                f"Quadratic with a weight of shape {self.weight.shape} is not conjugate to "
                "Gaussian noise: only a multiple of the identity is. Pass a scalar weight, or use "
                "a guidance (Conjugate, PlugIn), or gibbs, which is exact."
            )
        return 2 * self.weight * self.target, 2 * self.weight

    def matrix(self) -> Array:
        """H as a `(d, d)` matrix, for vector-valued states."""
        if self.target.ndim != 1:
            raise ValueError(f"H is a matrix only for vectors, got a target {self.target.shape}")
        if self.weight.ndim == 2:
            return self.weight
        return jnp.diag(jnp.broadcast_to(self.weight, self.target.shape))


class LinearReward(Reward):
    """`r(x) = <a, x>`. **Arguments:** `direction`, a, of the state's shape."""

    direction: Array

    def __init__(self, direction: _checks.Numbers):
        self.direction = _checks.finite(direction, "direction")

    def __call__(self, x: Array) -> Array:
        check_same_shape(x, self.direction, "direction")
        return _linalg.inner(self.direction, x)

    def conjugate(self) -> tuple[Array, Array]:
        return self.direction, jnp.zeros((), self.direction.dtype)


class Bump(Reward):
    """`r(x) = exp(-|x - y|^2 / (2 w^2))`.

    **Arguments:** `target`, y, of the state's shape; `width`, w > 0, a length in the data's units.
    """

    target: Array
    width: Array

    def __init__(self, target: _checks.Numbers, width: float | Array = 1.0):
        self.target = _checks.finite(target, "target")
        self.width = _checks.positive(width, "width")

    def __call__(self, x: Array) -> Array:
        check_same_shape(x, self.target, "target")
        residual = x - self.target
        return jnp.exp(-_linalg.inner(residual, residual) / (2 * self.width**2))


class StepReward(Reward):
    """`r(x) = 0` where `<n, x> >= b`, else `-height`: a reward whose gradient is zero.

    **Arguments:** `height`; `normal`, n, of the state's shape (default: the one coordinate of a
    `(1,)` state); `offset`, b.
    """

    height: Array
    normal: Array
    offset: Array

    def __init__(
        self, height: float | Array, normal: _checks.Numbers = (1.0,), offset: float | Array = 0.0
    ):
        self.height = _checks.finite(height, "height", 0)
        self.normal = _checks.finite(normal, "normal")
        self.offset = _checks.finite(offset, "offset", 0)

    def __call__(self, x: Array) -> Array:
        check_same_shape(x, self.normal, "normal")
        return jnp.where(
            _linalg.inner(self.normal, x) >= self.offset, jnp.zeros_like(self.height), -self.height
        )


class DoubleWell(Reward):
    """`r(x) = -(x_1^4 - 12.5 x_1^2) / 8 - (x_2 - 0.4 x_1)^2` on the plane, with two maxima at
    `±(2.5, 1)`.
    """

    def __call__(self, x: Array) -> Array:
        if x.shape != (2,):
            raise ValueError(
                f"DoubleWell is a reward on the plane and needs states of shape (2,), got {x.shape}"
            )
        return -(x[0] ** 4 - 12.5 * x[0] ** 2) / 8 - (x[1] - 0.4 * x[0]) ** 2
