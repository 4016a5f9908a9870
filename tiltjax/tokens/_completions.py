"""A gradient-free guidance of token models: rewards of random completions."""

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
    """`log h` as the mean of `exp(scale r)` over `k` completions, each position drawn by itself;
    gradient-free.

    With `proposal_weight` > 0 it also proposes (`Guided()`): the tilted denoiser is the mixture,
    with weights `1 - proposal_weight` and `proposal_weight`, of the model's and of the completions
    weighed by `exp(scale r)`, which estimates the posterior mean of the tilt by k draws.

    **Arguments:** `model`, of tokens; `reward(x1) -> scalar` of integers `(length,)`; `scale`; `k`;
    `proposal_weight` in [0, 1): at 1 tokens that no completion has could never be proposed.

    **Raises:** `ValueError` for a `proposal_weight` outside [0, 1); `TypeError` for what is no
    model of tokens.
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
        # Where every completion has the reward -inf all have the same weight.
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
