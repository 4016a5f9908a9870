"""The reward protocol, sums and multiples of rewards, and functions as rewards."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _pytree, _repr


class Reward(_repr.Printable):
    """The base class of rewards, which can be added and scaled. Subclasses define
    `__call__(x1) -> scalar`.
    """

    def __check_init__(self):
        _pytree.check_object(self)

    def __call__(self, x: Array) -> Array:
        raise NotImplementedError

    def conjugate(self) -> tuple[Array, Array]:
        """`(a, c)` with `r(x) = <a, x> - c |x|^2 / 2 + const`. `a` has the state's shape, `c` is a
        scalar.

        **Raises:** `ValueError` if the reward has no such form.
        """
        raise ValueError(
            f"{type(self).__name__} is not conjugate to Gaussian noise. Conjugate are only "
            "LinearReward, Quadratic with a scalar weight, and their sums and multiples. Use a "
            "guidance (Conjugate, PlugIn) for this reward."
        )

    def __add__(self, other: Any) -> "Reward":
        if isinstance(other, int) and other == 0:  # the start of the built-in sum
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
        return Scaled(self, 1 / _checks.finite(divisor, "a reward's divisor", 0))


class Sum(Reward):
    """The sum `r(x) = sum_i r_i(x)`, built by `+`."""

    terms: tuple[Reward, ...]

    def __call__(self, x: Array) -> Array:
        return functools.reduce(jnp.add, [term(x) for term in self.terms])

    def _call(self, **given: Any) -> str:
        return " + ".join(map(_repr.form, self.terms)).replace(" + -", " - ")

    def conjugate(self) -> tuple[Array, Array]:
        natural, precision = zip(*(term.conjugate() for term in self.terms), strict=True)
        return functools.reduce(jnp.add, natural), functools.reduce(jnp.add, precision)


class Scaled(Reward):
    """The multiple `factor * r(x)`, built by `*`. A negative factor makes a penalty."""

    reward: Reward
    factor: Array

    def __init__(self, reward: Reward, factor: float | Array):
        self.reward = reward
        self.factor = _checks.finite(factor, "a reward's factor", 0)

    def __call__(self, x: Array) -> Array:
        return self.factor * self.reward(x)

    def _call(self, **given: Any) -> str:
        reward = f"({self.reward})" if isinstance(self.reward, Sum) else _repr.form(self.reward)
        return f"{_repr.form(self.factor)} * {reward}"

    def conjugate(self) -> tuple[Array, Array]:
        a, c = self.reward.conjugate()
        return self.factor * a, self.factor * c


class Custom(Reward):
    """A function or module as a reward; built by `as_reward`.

    **Raises:** `TypeError` if the function does not return one floating number.
    """

    fn: _pytree.Function

    def _call(self, **given: Any) -> str:
        return _repr.form(self.fn)

    def __call__(self, x: Array) -> Array:
        try:
            result = self.fn(x)
        except Exception as error:
            if not _pytree.is_untraceable(error):
                raise
            raise TypeError(
                f"JAX cannot trace the reward ({type(error).__name__}): write it in jax.numpy, "
                "without float(), int() and if of its values, or wrap it, "
                "tiltjax.external.from_numpy(fn) for NumPy, tiltjax.external.from_torch(fn) for "
                "PyTorch, where fn gets a batch"
            ) from error
        if not isinstance(result, jax.Array | np.ndarray | float):
            raise TypeError(
                f"a reward must return one scalar for one sample, got {type(result).__name__}"
            )
        result = jnp.asarray(result)
        is_floating = jnp.issubdtype(result.dtype, jnp.floating)
        if not jnp.issubdtype(x.dtype, jnp.floating):  # tokens have no derivatives
            return result if is_floating else result.astype(float)
        if not is_floating:
            raise TypeError(
                f"a reward must return a floating number, got {result.dtype}, whose gradient is "
                "zero: cast it to float if only values are needed, as in best_of_n and softmax_of_n"
            )
        return result.astype(x.dtype)


def as_reward(reward: Callable, name: str = "reward") -> Reward:
    """The callable as a `Reward`, so that it can be traced, summed and scaled. A `Reward` is
    returned unchanged.
    """
    return reward if isinstance(reward, Reward) else Custom(_pytree.Function(reward, name))


def split_conjugate(
    reward: Reward, zero: tuple[Array, Array]
) -> tuple[Array, Array, Reward | None]:
    """`(a, c)` of the conjugate terms of a reward, and the sum of its other terms (`None` if there
    are no others). `zero` is `(a, c)` of no terms.
    """
    (natural, precision), rest = zero, None
    for term in _terms(reward):
        try:
            a, c = term.conjugate()
        except ValueError:  # not conjugate
            rest = term if rest is None else rest + term
            continue
        if a.shape != natural.shape:
            raise ValueError(
                f"the reward takes states of shape {a.shape}, but the states of the model have "
                f"shape {natural.shape}"
            )
        natural, precision = (
            natural + a.astype(natural.dtype),
            precision + c.astype(precision.dtype),
        )
    return natural, precision, rest


def _terms(reward: Reward) -> list[Reward]:
    """The terms of a sum, or of a multiple of a sum."""
    if isinstance(reward, Sum):
        return [part for term in reward.terms for part in _terms(term)]
    if isinstance(reward, Scaled):
        return [Scaled(part, reward.factor) for part in _terms(reward.reward)]
    return [reward]


def value(reward: Reward, x: Array) -> Array:
    """`reward(x)`. **Raises:** `ValueError` if the value is not one scalar."""
    try:
        result = reward(x)
    except Exception as error:
        error.add_note(
            f"Raised by the reward for one sample of shape {jnp.shape(x)}, not for a batch."
        )
        raise
    if result.shape != ():
        raise ValueError(
            f"a reward must return one scalar for one sample, got shape {result.shape} for a "
            f"sample of shape {x.shape}. Reduce it (jnp.sum, jnp.mean); batching over samples is "
            "automatic."
        )
    return result


def values(reward: Reward, x: Array) -> Array:
    """The rewards `(num,)` of the rows of `x` `(num, *shape)`.

    The function is not compiled, because variables in the closure of a user's function may change
    between two calls.
    """
    return _callbacks.run(jax.vmap(lambda x: value(reward, x)), x)


def check_same_shape(x: Array, other: Array, name: str) -> None:
    """Raise a `ValueError` if the sample's shape differs from that of the reward's array
    `other`.
    """
    if x.shape != other.shape:
        raise ValueError(
            f"the reward's {name} has shape {other.shape} but the sample has shape {x.shape}: make "
            "the shapes equal"
        )


class ValueOnly(Reward):
    """The reward with a derivative of zero, for weights, which need only values.

    `smc(key, model, dps(model, ValueOnly(reward), scale), num=n, proposal=proposals.Base())` steers
    by any reward, differentiable or not: unguided proposals use no gradient, and the weights are
    right for any proposal. Guidance by this reward alone has no effect.
    """

    reward: Reward

    def __init__(self, reward: Callable):
        self.reward = as_reward(reward)

    def __call__(self, x: Array) -> Array:
        return jax.lax.stop_gradient(self.reward(jax.lax.stop_gradient(x)))
