"""Doob's h-transform for an h-function in closed form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _pytree
from tiltjax.guidance._base import Estimate, Guidance
from tiltjax.models import Model


class Doob(Guidance):
    """The exact h-function in closed form: the guided flow samples the tilt itself.

    **Arguments:** `model`; `log_h(t, x) -> scalar`, differentiable in x and valid up to t = 1, such
    as `theory.log_h(prior, reward, scale)`.

    **Raises:** `ValueError` for a `log_h` of another interpolant. Source: Doob (1957).
    """

    model: Model
    log_h: _pytree.Function

    def __init__(self, model: Model, log_h: Callable):
        _checks.instance(model, Model, "model", "Doob(model, log_h)")
        interpolant = getattr(log_h, "interpolant", model.interpolant)
        if _checks.concrete((interpolant, model.interpolant)) and not _pytree.same(
            interpolant, model.interpolant
        ):
            raise ValueError(
                f"log_h has the interpolant {interpolant}, the model has {model.interpolant}: "
                "give both the same one"
            )
        self.model = model
        self.log_h = _pytree.Function(log_h, "log_h")

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        log_h, score = jax.value_and_grad(self.log_h, argnums=1)(t, x)
        return Estimate.from_score(
            self.model.interpolant, t, self.model.denoise(t, x), log_h, score
        ), state

    def log_tilt(self, x1: Array) -> Array:
        return self.log_h(jnp.ones((), x1.dtype), x1)
