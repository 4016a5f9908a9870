"""The plug-in estimate of `log h` by posterior draws, and the published methods DPS and FMRG."""

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

    The estimator in common use. Its gradient is that of a softmax over draws, so for small k it
    follows the reward of typical draws instead of the tilt: it overshoots the reward's maximizer
    and loses spread (`theory.plug_in_law`), and it cannot choose between modes. Bias of order 1/k;
    the damped scale removes it at k = 1 for one Gaussian.

    **Arguments:** `posterior`; `reward`, any function of one sample; `scale`, a number or a law;
    `k >= 1` draws, where one is enough of a point like `Tweedie`.

    **Raises:** `TypeError` for what is no posterior, `ValueError` for `k < 1`. Source:
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
        # Apart, not split: a law that draws nothing has its key never hashed.
        key_scale, key_draws = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        scale = self.scale(key_scale, interpolant.snr(t), t, jax.lax.stop_gradient(x))

        def log_h(x: Array) -> tuple[Array, Array]:
            # Of the network, the step needs D(x) and a draw may: one call serves both, and the
            # gradient of the draw.
            denoised = self.model.denoise(t, x)
            draws = self.posterior.draws(key_draws, t, x, self.k, denoised)
            tilts = jax.vmap(lambda x1: scale * rewards.value(self.reward, x1))(draws)
            return jax.nn.logsumexp(tilts) - jnp.log(self.k), denoised

        (value, denoised), score = jax.value_and_grad(log_h, has_aux=True)(x)
        return Estimate.from_score(interpolant, t, denoised, value, score), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale.final * self.reward(x1)


def dps(model: Model, reward: Callable, scale: float | Array | scales.Scale = 1.0) -> PlugIn:
    """Diffusion posterior sampling: `log h = scale * r(D_t(x))`, the plug-in at the posterior's
    mean.

    In the drift form `(g_t^2 / 2) scale ∇ r(D_t(x))`. For one Gaussian and a quadratic reward it
    has the law of `PlugIn` with k = 1, for anything else it has not.

    Source: Chung et al. (arXiv 2209.14687).
    """
    return PlugIn(Tweedie(model), reward, scale)


def fmrg(
    model: Model,
    reward: Callable,
    scale: float | Array | scales.Scale = 1.0,
    *,
    inner_steps: int = 20,
) -> Unscaled:
    """Flow-map reward guidance: the drift `b_t + scale ∇ r(X_{t,1}(x))`, `X_{t,1}` the flow's own
    end-point.

    The gradient is not multiplied by `g_t^2 / 2`, so it is no h-transform; what it samples for one
    Gaussian is `theory.fmrg_law`. **Arguments:** as in `PlugIn`; `inner_steps` of the inner
    `FlowMap`.

    Source: Dandapanthula and Boffi (arXiv 2606.02884).
    """
    return Unscaled(PlugIn(FlowMap(model, inner_steps), reward, scale))
