"""The exact model of a Gaussian mixture."""

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.mixtures import GaussianMixture
from tiltjax.models._base import Model

_NODES = 256  # per component


def _normal_nodes(num: int, dim: int) -> np.ndarray:
    """`num` quasi-random points of `N(0, I)`, `(num, dim)`, in pairs of opposite points, from the
    additive recurrence of the generalized golden ratio, the root of `phi^(dim + 1) = phi + 1`.
    """
    phi = 2.0
    for _ in range(32):
        phi = (1 + phi) ** (1 / (dim + 1))
    uniform = (0.5 + np.outer(np.arange(1, num // 2 + 1), phi ** -np.arange(1.0, dim + 1))) % 1
    half = np.vectorize(NormalDist().inv_cdf)(uniform)
    return np.concatenate([half, -half])


class Analytic(Model):
    """The exact model of a Gaussian mixture.

    **Arguments:** `mixture`; `interpolant`, `Linear()` by default.
    """

    mixture: GaussianMixture
    interpolant: Interpolant

    def __init__(self, mixture: GaussianMixture, interpolant: Interpolant | None = None):
        _checks.instance(
            mixture,
            GaussianMixture,
            "mixture",
            "Analytic(mixture); use from_velocity for a network",
        )
        self.mixture = mixture
        self.interpolant = or_linear(interpolant)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.mixture.dim,)

    @property
    def dtype(self) -> Any:
        return self.mixture.means.dtype

    @property
    def width(self) -> float | None:
        return self.mixture.width

    def denoise(self, t: Array, x: Array) -> Array:
        return self.mixture.denoise(self.interpolant.alpha(t), self.interpolant.sigma(t), x)

    def prepare(self, t: Array) -> Any:
        if not self._prepares:
            return t
        return self.mixture.view(self.interpolant.alpha(t), self.interpolant.sigma(t))

    def denoise_prepared(self, prepared: Any, x: Array) -> Array:
        if not self._prepares:
            return self.denoise(prepared, x)
        return self.mixture.denoise_view(prepared, x)

    def posterior_variance(self, snr: Array) -> Array:
        """The denoiser's mean squared error `E|X_1 - D_t(X_t)|^2 / d` at the signal-to-noise ratio
        `snr`, as `E tr Cov(X_1 | X_t) / d`.

        The expectation over `X_t` is the mean over quasi-random nodes of each component, so it
        needs no random key.
        """
        mixture, sigma, d = self.mixture.decomposed(), jax.lax.rsqrt(snr), self.mixture.dim
        nodes = jnp.asarray(_normal_nodes(_NODES, d), mixture.means.dtype)
        roots = jax.vmap(_linalg.square_root)(
            mixture.covs + sigma**2 * jnp.eye(d, dtype=nodes.dtype)[None]
        )

        def posterior(x: Array) -> GaussianMixture:
            return mixture.condition(jnp.ones_like(sigma), sigma, x)

        # The posterior covariances do not depend on the state.
        within = jnp.trace(posterior(mixture.means[0]).covs, axis1=1, axis2=2)

        def trace_of_cov(x: Array) -> Array:
            law = posterior(x)
            between = jnp.sum((law.means - law.mean()[None]) ** 2, axis=1)
            return law.weights @ (within + between)

        def component(weight: Array, mean: Array, root: Array) -> Array:
            return weight * jnp.mean(jax.vmap(lambda node: trace_of_cov(mean + root @ node))(nodes))

        return jnp.sum(jax.vmap(component)(mixture.weights, mixture.means, roots)) / d

    @property
    def _prepares(self) -> bool:
        # A subclass may define another denoiser.
        return type(self).denoise is Analytic.denoise

    def posterior(self, t: Array, x: Array) -> GaussianMixture:
        """The law of `X_1` given `X_t = x`."""
        return self.mixture.condition(self.interpolant.alpha(t), self.interpolant.sigma(t), x)
