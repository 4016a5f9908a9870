"""A gradient-free guidance of token models by the rewards of random completions."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, rewards
from tiltjax.guidance import Estimate, Guidance
from tiltjax.tokens._models import Masked


class Completions(Guidance):
    """`log h` as the log of the mean of `exp(scale r)` over `k` completions, whose positions are
    drawn independently; gradient-free.

    With `proposal_weight` > 0 the guidance also changes the proposal (`Guided()`). The tilted
    denoiser is then a mixture of two laws, with weights `1 - proposal_weight` and
    `proposal_weight`: the model's denoiser, and the mean of the completions weighted by
    `exp(scale r)`, an estimate of the tilted posterior mean from k draws.

    **Arguments:** `model`, of tokens; `reward(x1) -> scalar` of integers `(length,)`; `scale`; `k`;
    `proposal_weight` in [0, 1). The value 1 is excluded, because tokens in no completion could then
    never be proposed.

    **Raises:** `ValueError` for a `proposal_weight` outside [0, 1); `TypeError` for a model that is
    not a token model.
    """

    model: Masked
    reward: rewards.Reward
    scale: Array
    proposal_weight: Array
    k: int = eqx.field(static=True)

    def __init__(
        self,
        model: Masked,
        reward: Callable,
        scale: float | Array = 1.0,
        *,
        k: int = 4,
        proposal_weight: float | Array = 0.0,
    ):
        _checks.instance(model, Masked, "model", "a model of tokens: MarkovChain or from_logits")
        self.model = model
        self.reward = rewards.as_reward(reward)
        self.scale = _checks.finite(scale, "scale", 0)
        self.proposal_weight = _checks.in_range(
            proposal_weight, "proposal_weight", 0, 1, closed="left"
        )
        self.k = _checks.count(k, "k")

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        denoised = self.model.denoise(t, x)
        drawn = jax.vmap(lambda key: self.model.complete(key, x, denoised))(
            jax.random.split(key, self.k)
        )
        values = jax.vmap(self.log_tilt)(drawn)
        log_h = jax.nn.logsumexp(values) - math.log(self.k)
        # If every completion has the reward -inf, all get the same weight.
        weights = jax.nn.softmax(jnp.where(log_h > -jnp.inf, values, 0.0))
        posterior_mean = jnp.einsum(
            "k,kiv->iv", weights, jax.nn.one_hot(drawn, self.model.vocab, dtype=weights.dtype)
        )
        shift = self.proposal_weight.astype(denoised.dtype) * (
            posterior_mean.astype(denoised.dtype) - denoised
        )
        return Estimate(denoised + shift, denoised, log_h), state

    def log_tilt(self, x1: Array) -> Array:
        value = rewards.value(self.reward, x1)
        return self.scale.astype(value.dtype) * value
