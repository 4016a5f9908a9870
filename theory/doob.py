r"""Doob's h-function of a mixture: `log h_t(x) = log E[exp(scale * r(X_1)) | X_t = x]`, exactly.

Given `X_t = x` the data are again a mixture (`GaussianMixture.condition`), so log h is the log normalising constant of *its* tilt.
At t = 0 it is log Z for every x (if `alpha_0 = 0`), at t = 1 it is `scale * r(x)`, and `p_t h_t / Z` is the law of the tilt
noised to time t.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory import quadrature, tilts
from tiltjax import inputs, rewards
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.mixtures import GaussianMixture, check_mixture


class LogH(eqx.Module):
    """`log h` as a function of `(t, x)`; built by `log_h`."""

    prior: GaussianMixture
    reward: rewards.Reward
    scale: Array
    interpolant: Interpolant

    def __call__(self, t: Array, x: Array) -> Array:
        law = inputs.cast(self, x.dtype)
        posterior = law.prior.condition(law.interpolant.alpha(t), law.interpolant.sigma(t), x)
        if tilts.is_quadratic(law.reward):
            return tilts.tilt(posterior, law.reward, law.scale).log_norm
        if isinstance(law.reward, rewards.Step):
            return _log_h_step(posterior, law.reward, law.scale)
        return quadrature.log_norm(posterior, law.reward, law.scale)


def log_h(
    prior: GaussianMixture, reward: rewards.Reward, scale: float | Array, interpolant: Interpolant | None = None
) -> LogH:
    """`log h` for a mixture prior, a function `(t, x) -> scalar` to be given to `tiltjax.Doob`.

    Closed form for quadratic rewards and for `Step`; for any other, Gaussian quadrature around each component of the posterior, in
    one or two dimensions (`theory.quadrature.log_norm`).

    **Raises:** `ValueError` for a reward without closed form in more than two dimensions.
    """
    check_mixture(prior, "prior")
    reward = rewards.as_reward(reward)
    closed = tilts.is_quadratic(reward) or isinstance(reward, rewards.Step)
    if not closed and prior.dim > 2:
        raise ValueError(
            f"log h has no closed form for {type(reward).__name__}, and quadrature covers one or two dimensions, not {prior.dim}: "
            "estimate it with PlugIn and many draws, or Laplace"
        )
    scale = inputs.nonnegative(scale, "scale")
    if not closed and inputs.concrete((prior, reward, scale)):
        _check_resolution(prior, reward, scale)
    return LogH(prior, reward, scale, or_linear(interpolant))


def _check_resolution(prior: GaussianMixture, reward: rewards.Reward, scale: Array) -> None:
    # The prior is the widest posterior there is: nodes that are enough for it are enough at every time.
    r, scale = inputs.cast((reward, scale), prior.means.dtype)
    nodes = (401, 41)[prior.dim - 1]
    usual, fine = (float(quadrature.log_norm(prior, r, scale, nodes=n)) for n in (nodes, 2 * nodes - 1))
    if not abs(usual - fine) < 1e-3:
        raise ValueError(
            f"quadrature does not resolve this reward at scale {float(scale):g}: log h changes from {usual:.6g} to {fine:.6g} with twice the "
            "nodes. Lower the scale."
        )


def marginal(mixture: GaussianMixture, t: float | Array, interpolant: Interpolant | None = None) -> GaussianMixture:
    """The law of `alpha_t X_1 + sigma_t X_0` for `X_1` from `mixture`: of a tilt, the tilted marginal `p_t h_t / Z`. **Raises:** `ValueError` for a t outside [0, 1]."""
    check_mixture(mixture, "mixture")
    interpolant = or_linear(interpolant)
    t = inputs.finite(t, "t", 0).astype(mixture.means.dtype)
    if inputs.concrete(t) and not 0 <= float(np.asarray(t)) <= 1:
        raise ValueError(f"t must lie in [0, 1], got {float(t):g}")
    alpha, sigma = interpolant.alpha(t), interpolant.sigma(t)
    noise = sigma**2 * jnp.eye(mixture.dim, dtype=mixture.means.dtype)
    return mixture.replace(mixture.log_weights, alpha * mixture.means, alpha**2 * mixture.covs + noise[None])


def _log_h_step(posterior: GaussianMixture, reward: rewards.Step, scale: Array) -> Array:
    # <n, X> is Gaussian in each component: log(P(above) + exp(-scale height) P(below)).
    mean = posterior.means @ reward.normal - reward.offset
    std = jnp.sqrt(jnp.einsum("i,kij,j->k", reward.normal, posterior.covs, reward.normal))
    z = mean / jnp.where(std > 0, std, 1.0)
    z = jnp.where(std > 0, z, jnp.where(mean >= 0, jnp.inf, -jnp.inf))
    above, below = jax.scipy.special.log_ndtr(z), jax.scipy.special.log_ndtr(-z) - scale * reward.height
    return jax.nn.logsumexp(posterior.log_weights + jnp.logaddexp(above, below))
