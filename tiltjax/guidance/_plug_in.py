"""The plug-in estimate of `log h` from posterior draws, and the published methods DPS and FMRG."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, rewards, scales
from tiltjax.guidance._base import Estimate, Guidance
from tiltjax.guidance.wrappers import Unscaled
from tiltjax.models import Model
from tiltjax.posteriors import FlowMap, Posterior, Tweedie


class PlugIn(Guidance):
    """`h^(x) = (1/k) sum_i exp(lambda_t r(X_1^(i)(x)))` with k fresh posterior draws,
    differentiated through the draws.

    This is the most common estimator. Its gradient is the gradient of a softmax over draws. For
    small k it therefore follows the reward of typical draws instead of the tilt: it overshoots the
    reward's maximizer, loses spread (`theory.plug_in_law`) and cannot choose between modes. The
    bias is of order 1/k. For one Gaussian and k = 1, the scale `Damped` removes the bias.

    **Arguments:** `posterior`; `reward`, any function of one sample; `scale`, a number or a law;
    `k >= 1` draws. A posterior that is a point, such as `Tweedie`, needs only one draw.

    **Raises:** `TypeError` if `posterior` is not a `Posterior`, `ValueError` for `k < 1`. Source:
    Dandapanthula and Boffi (arXiv 2606.02884).
    """

    posterior: Posterior
    reward: rewards.Reward
    scale: scales.Scale
    k: int = eqx.field(static=True)

    def __init__(
        self,
        posterior: Posterior,
        reward: Callable,
        scale: float | Array | scales.Scale = 1.0,
        *,
        k: int = 1,
    ):
        _checks.instance(
            posterior, Posterior, "posterior", "use Glass(model), Exact(model) or Tweedie(model)"
        )
        self.posterior = posterior
        self.reward = rewards.as_reward(reward)
        self.scale = scales.as_scale(scale)
        self.k = _checks.count(k, "k")

    @property
    def model(self) -> Model:
        return self.posterior.model

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        interpolant = self.model.interpolant
        # `fold_in` instead of `split`: the compiler drops the key of a scale law without draws.
        key_scale, key_draws = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        # Outside of `log_h`, whose gradient in x then holds the scale constant. A derivative of a
        # whole run includes how the scale depends on x.
        scale = self.scale(key_scale, interpolant.snr(t), t, x)

        def log_h(x: Array) -> tuple[Array, Array]:
            # The step needs D(x), and a draw may need it too. One network call serves the step,
            # the draw and the gradient of the draw.
            denoised = self.model.denoise(t, x)
            draws = self.posterior.draws(key_draws, t, x, self.k, denoised)
            tilts = jax.vmap(lambda x1: scale * rewards.value(self.reward, x1))(draws)
            return jax.nn.logsumexp(tilts) - jnp.log(self.k), denoised

        (value, denoised), score = jax.value_and_grad(log_h, has_aux=True)(x)
        return Estimate.from_score(interpolant, t, denoised, value, score), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale.final * rewards.value(self.reward, x1)


def dps(model: Model, reward: Callable, scale: float | Array | scales.Scale = 1.0) -> PlugIn:
    """Diffusion posterior sampling: `log h = scale * r(D_t(x))`, the plug-in estimate at the
    posterior mean.

    The drift gains the term `(g_t^2 / 2) scale ∇ r(D_t(x))`. The samples have the law of `PlugIn`
    with k = 1 only for one Gaussian and a quadratic reward.

    **Arguments:** as in `PlugIn`. Source: Chung et al. (arXiv 2209.14687).
    """
    return PlugIn(Tweedie(model), reward, scale)


def fmrg(
    model: Model,
    reward: Callable,
    scale: float | Array | scales.Scale = 1.0,
    *,
    inner_steps: int = 20,
) -> Unscaled:
    """Flow-map reward guidance: the drift `b_t + scale ∇ r(X_{t,1}(x))`, where `X_{t,1}` is the end
    of the probability flow.

    The gradient is not multiplied by `g_t^2 / 2`, so this is not an h-transform. For one Gaussian,
    `theory.fmrg_law` is the law of the samples. **Arguments:** as in `PlugIn`; `inner_steps` of the
    inner `FlowMap`.

    Source: Dandapanthula and Boffi (arXiv 2606.02884).
    """
    return Unscaled(PlugIn(FlowMap(model, inner_steps), reward, scale))
