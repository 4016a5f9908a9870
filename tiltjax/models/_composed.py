r"""Models composed of several models on one interpolant.

    score     s = sum_i w_i s_i        that of prod_i p_{i,t}^{w_i} at each time t
    denoiser  D = sum_i w_i D_i,       sum_i w_i = 1

| model | weights | of |
|---|---|---|
| `cfg(conditional, unconditional, scale)` | `scale, 1 - scale` | classifier-free guidance |
| `geometric_mean(models, weights)` | any that add up to 1 | `prod_i p_i^{w_i}` |
| `product(models, shared)` | `1, ..., 1, 1 - n` | `shared prod_i (p_i / shared)`, n experts |
| `difference(model, other, weight)` | `1 + weight, -weight` | `p^(1 + weight) / q^weight` |

**What the samples are not.** The law of the samples is not the product at the end of the table. The
noised product is not the product of the noised laws, so the scores add up to the score of no
noising chain, except for one Gaussian each with equal covariances, or with weights 1 and 0. The
denoiser of a composed model is not a posterior mean, so that `Tilted`, `Glass`, `Rescheduled` and
`gibbs` sample another law than they say. Selection (`best_of_n`, `softmax_of_n`) and `smc` with
unguided proposals tilt the law of the samples, whatever it is. `Tuned` weighs a pair of models such
that particles have the law of the geometric mean.

Each evaluation calls all models. References: Ho and Salimans (arXiv 2207.12598, classifier-free
guidance); Liu et al. (arXiv 2206.01714, products of experts); Du et al. (arXiv 2302.11552, what the
sums of scores lack).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _repr
from tiltjax.interpolants import Interpolant
from tiltjax.models._annealed import check_pair
from tiltjax.models._base import Model


class Composed(Model):
    """`D = sum_i w_i D_i`; built by `cfg`, `geometric_mean`, `product` and `difference`."""

    models: tuple[Model, ...]
    weights: Array

    def __init__(self, models: tuple[Model, ...], weights: Array):
        for i, other in enumerate(models):
            how = "a model such as Analytic(mixture)"
            check_pair(models[0], other, how, "models[0]", f"models[{i}]")
        self.models, self.weights = models, weights

    def _call(self, **given: Any) -> str:
        return _repr.call(self, geometric_mean, **given)

    @property
    def interpolant(self) -> Interpolant:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.models[0].interpolant

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.models[0].shape

    @property
    def dtype(self) -> Any:
        return self.models[0].dtype

    def network_query(self) -> tuple[Interpolant, Array | float]:
        return self.models[0].network_query()

    def check_times(self, times: Array) -> None:
        for model in self.models:
            model.check_times(times)

    def denoise(self, t: Array, x: Array) -> Array:
        return self._sum([model.denoise(t, x) for model in self.models])

    def denoise_batch(self, t: Array, x: Array) -> Array:
        return self._sum([model.denoise_batch(t, x) for model in self.models])

    def _sum(self, denoised: list[Array]) -> Array:
        # The difference from the last model, so that equal models are exact to the last bit.
        *others, last = denoised
        weights = self.weights.astype(last.dtype)
        terms = [weight * (other - last) for weight, other in zip(weights, others, strict=False)]
        return functools.reduce(jnp.add, terms, last)


def cfg(conditional: Model, unconditional: Model, scale: float | Array) -> Composed:
    """Classifier-free guidance, `D = D_u + scale (D_c - D_u)`: 1 is the conditional model, 0 the
    unconditional one.

    **Arguments:** `conditional`, `unconditional`: models with the same states and interpolant;
    `scale`, a number.

    **Raises:** `ValueError` for models that do not match or a `scale` that is not finite.
    """
    scale = _checks.finite(scale, "scale", 0)
    return Composed((conditional, unconditional), jnp.stack([scale, 1 - scale]))


def geometric_mean(models: Sequence[Model], weights: _checks.Numbers | None = None) -> Composed:
    """Scores in proportion to `weights`, by default equal ones.

    **Arguments:** `models`, with the same states and interpolant; `weights`, `(n,)`, of any sign,
    that add up to 1.

    **Raises:** `ValueError` for models that do not match, and for weights of another number or sum.
    """
    models = tuple(models)
    if not models:
        raise ValueError("models: at least one model is needed, got none")
    if weights is None:
        weights = np.full(len(models), 1 / len(models))
    weights = _checks.finite(weights, "weights", 1)
    if weights.shape != (len(models),):
        raise ValueError(f"weights must be {len(models)} numbers, got shape {weights.shape}")
    if _checks.concrete(weights):
        total = float(np.asarray(weights, np.float64).sum())
        if abs(total - 1) > len(models) * float(jnp.finfo(weights.dtype).eps) * 8:
            raise ValueError(
                f"weights must add up to 1, got {total:g}: divide by what the models share, as "
                "product(models, shared) does"
            )
    return Composed(models, weights)


def product(models: Sequence[Model], shared: Model) -> Composed:
    """A product of experts, `D = D_shared + sum_i (D_i - D_shared)`: each of n conditional models
    moves the model that they `shared`, such as the unconditional one.

    **Arguments:** `models`, `shared`: with the same states and interpolant.

    **Raises:** `ValueError` for models that do not match.
    """
    models = (*models, shared)
    weights = np.append(np.ones(len(models) - 1), 2.0 - len(models))
    return Composed(models, _checks.floating(weights, "weights"))


def difference(model: Model, other: Model, weight: float | Array = 1.0) -> Composed:
    """A model away from another one, `D = D_model + weight (D_model - D_other)`: a negative prompt.

    **Arguments:** `model`, `other`: with the same states and interpolant; `weight >= 0`.

    **Raises:** `ValueError` for models that do not match or a negative weight.
    """
    weight = _checks.nonnegative(weight, "weight")
    return Composed((model, other), jnp.stack([1 + weight, -weight]))
