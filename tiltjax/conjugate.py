r"""Variational conjugate tilting: a tilt for *any* reward, without differentiating the network.

A conjugate reward, `scale * r(x) = <a, x> - c |x|^2 / 2`, is tilted exactly by asking the denoiser at another time and state
(`tiltjax.Tilted`). Any other reward is replaced, at each state, by the conjugate one that matches its *expected* gradient and curvature
under a Gaussian `N(z, v I)` that stands for the tilted posterior of `X_1`:

    c = max(0, -scale E[tr ∇^2 r] / d),      a = scale E[∇r] + c z.

Then `z` is the tilted denoiser of `(a, c)`, one ordinary denoiser call, and `v = v(snr_t + c)` its mean squared error by coordinate.
By Stein's identity `E[tr ∇^2 r] = E[<eps, ∇r(z + sqrt(v) eps)>] / sqrt(v)`, so a few antithetic draws give both expectations with one
gradient of the reward each, at the data end. `(a, c)` is carried from step to step, so that one iteration a step follows its fixed
point; being drawn at random, it has a Monte Carlo error, which the steps average.

The derivation is this library's own: the conjugate tilt of `tiltjax.models`, with Stein's identity in place of a reward's form.

What breaks it: rewards with jumps (Stein's identity needs a weak derivative; `Step` has none and is not seen), far modes that the
Gaussian `N(z, v I)` does not reach, and strongly anisotropic rewards, whose curvature is averaged over directions.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs, rewards
from tiltjax.guidance import Estimate, Guidance
from tiltjax.models import Model
from tiltjax.sampling import sample


class Variance(eqx.Module):
    """A table of the denoiser's mean squared error a coordinate, `v(snr) = E|X_1 - D_t(X_t)|^2 / d`; built by `calibrate`.

    Linear in the logarithms between its entries; NaN outside their range, which a run reports.
    """

    log_snr: Array
    log_variance: Array

    def __call__(self, snr: Array) -> Array:
        return jnp.exp(jnp.interp(jnp.log(snr), self.log_snr, self.log_variance, left=jnp.nan, right=jnp.nan))


def calibrate(
    model: Model, key: Array, *, num: int = 4096, levels: int = 48, data: Array | None = None, batch: int | None = None
) -> Variance:
    """Measure `v(snr)`, once per model.

    **Arguments:** `model`; `num`, samples a level; `levels`, of snr, evenly spaced in its logarithm from 1e-7 to 1e7 times that of
    the noise's own variance; `data`, `(num, *shape)`, clean samples (drawn from the model by default); `batch`, as in `sample`.

    **Raises:** `ValueError` for data of another shape.
    """
    inputs.instance(model, Model, "model", "calibrate(model, key)")
    key_data, key_noise = jax.random.split(inputs.typed_key(key))
    if data is None:
        data = sample(key_data, model, num=inputs.count(num, "num"), batch=batch).x
    data = inputs.finite(data, "data").astype(model.dtype)
    if data.shape[1:] != model.shape:
        raise ValueError(f"data must hold states of shape {model.shape}, got an array of shape {data.shape}")
    return _calibrate(model, key_noise, data, inputs.count(levels, "levels"), batch or len(data))


@eqx.filter_jit
def _calibrate(model: Model, key: Array, data: Array, levels: int, batch: int) -> Variance:
    model = inputs.cast(model, model.dtype)
    path = model.interpolant
    base = path.sigma(jnp.zeros((), data.dtype))
    log_snr = jnp.asarray(np.linspace(np.log(1e-7), np.log(1e7), levels), data.dtype) - 2 * jnp.log(base)
    noise = jax.random.normal(key, data.shape, data.dtype)

    def level(log_snr: Array) -> Array:
        # A view of precision q: natural parameter q X_1 + sqrt(q) noise. The same noise at all levels keeps the table smooth.
        q = jnp.exp(log_snr)

        def error(pair: tuple[Array, Array]) -> Array:
            x, noise = pair
            return jnp.mean((x - model.denoise(*path.observe(q, q * x + jnp.sqrt(q) * noise))) ** 2)

        return jnp.mean(jax.lax.map(error, (data, noise), batch_size=batch))

    return Variance(log_snr, jnp.log(jax.lax.map(level, log_snr)))


class Conjugate(Guidance):
    """Variational conjugate tilting: guidance by the conjugate reward that fits `scale * r` at each state.

    The conjugate terms of a sum enter exactly, only the rest is fitted: a conjugate reward is tilted exactly. Costs `iterations + 1` denoiser calls and `iterations * draws` gradients of the
    reward an evaluation, and no derivative of the network.

    **Arguments:**

    - `model`; `reward`, differentiable almost everywhere and without jumps; `scale >= 0`.
    - `iterations`: refinements of `(a, c)` an evaluation, from the previous step's.
    - `draws`: an even number, antithetic pairs.
    - `keep`: the share of the previous `(a, c)` kept in each iteration, in [0, 1).
    - `variance`: `v(snr)`, from `calibrate(model, key)`, or any function; calibrated here by default.

    `log_h` is not estimated: to weigh particles, use this as a proposal beside another twist.
    """

    model: Model
    reward: rewards.Reward
    rest: rewards.Reward | None
    natural: Array
    precision: Array
    scale: Array
    variance: Any
    keep: Array
    iterations: int = eqx.field(static=True)
    draws: int = eqx.field(static=True)

    def __init__(
        self,
        model: Model,
        reward: Callable,
        scale: float | Array = 1.0,
        *,
        iterations: int = 1,
        draws: int = 4,
        keep: float | Array = 0.0,
        variance: Callable | None = None,
    ):
        inputs.instance(model, Model, "model", "Conjugate(model, reward, scale)")
        self.model = model
        self.reward = rewards.as_reward(reward)
        self.scale = inputs.nonnegative(scale, "scale")
        self.iterations = inputs.count(iterations, "iterations")
        self.draws = inputs.count(draws, "draws")
        if self.draws % 2:
            raise ValueError(f"draws come in antithetic pairs: draws must be even, got {draws}")
        self.keep = inputs.nonnegative(keep, "keep")
        if inputs.concrete(self.keep) and np.asarray(self.keep) >= 1:
            raise ValueError(f"keep must lie in [0, 1), got {float(self.keep):g}")
        zero = jnp.zeros((), model.dtype)
        self.natural, self.precision, self.rest = _split(self.reward, (jnp.zeros(model.shape, model.dtype), zero))
        if self.rest is not None and variance is None:
            variance = calibrate(model, jax.random.key(0))
        self.variance = variance if variance is None or isinstance(variance, eqx.Module) else inputs.Function(variance)

    def init(self, x: Array) -> tuple[Array, Array]:
        """`(a, c) = 0`: no tilt."""
        return jnp.zeros_like(x), jnp.zeros((), x.dtype)

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        path = self.model.interpolant
        snr = path.snr(t) + self.scale * self.precision
        natural = path.alpha(t) / path.sigma(t) ** 2 * x + self.scale * self.natural

        def denoised(state: tuple[Array, Array]) -> Array:
            a, c = state
            return self.model.denoise(*path.observe(snr + c, natural + a))

        rest = self.rest
        if rest is None:
            return Estimate(tilted=denoised(state)), state
        gradient = jax.grad(lambda x1: rewards.value(rest, x1))

        def refine(state: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
            z, spread = denoised(state), jnp.sqrt(self.variance(snr + state[1]))
            half = jax.random.normal(key, (self.draws // 2, *x.shape), x.dtype)
            eps = jnp.concatenate([half, -half])
            slopes = jax.vmap(lambda e: gradient(z + spread * e))(eps)
            slope = jnp.mean(slopes, axis=0)
            curvature = -jnp.sum(eps * slopes) / (eps.size * spread)
            c = jnp.maximum(self.scale * curvature, 0)
            fresh = self.scale * slope + c * z, c
            return jax.tree.map(lambda old, new: self.keep * old + (1 - self.keep) * new, state, fresh), None

        state, _ = jax.lax.scan(refine, state, jax.random.split(key, self.iterations))
        return Estimate(tilted=denoised(state)), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale * rewards.value(self.reward, x1)


def _split(reward: rewards.Reward, zero: tuple[Array, Array]) -> tuple[Array, Array, rewards.Reward | None]:
    """`(a, c)` of the conjugate terms of a reward, and the sum of the others, `None` if there are none."""
    terms = reward.terms if isinstance(reward, rewards.Sum) else (reward,)
    (natural, precision), rest = zero, None
    for term in terms:
        try:
            a, c = term.conjugate()
        except ValueError:  # not conjugate
            rest = term if rest is None else rest + term
        else:
            natural, precision = natural + a.astype(natural.dtype), precision + c.astype(precision.dtype)
    return natural, precision, rest


class Toward(Guidance):
    """Guidance by another model that is tilted already; built by `toward`."""

    model: Model
    tilted: Model
    reward: rewards.Reward
    scale: Array

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        return Estimate(tilted=self.tilted.denoise(t, x), denoised=self.model.denoise(t, x)), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale * rewards.value(self.reward, x1)


def toward(model: Model, tilted: Model, reward: Callable, scale: float | Array = 1.0) -> Toward:
    """A tilted model (`Tilted`, or a reward-fine-tuned network) as a guidance of the base `model`.

    **Arguments:** `model`; `tilted`, on the same path and states; `reward` and `scale`, what it is tilted by.
    """
    inputs.instance(model, Model, "model", "toward(model, tilted, reward, scale)")
    inputs.instance(tilted, Model, "tilted", "such as Tilted(model, reward, scale)")
    if model.shape != tilted.shape or not inputs.same(model.interpolant, tilted.interpolant):
        raise ValueError("the tilted model must have the states and the path of the base model")
    return Toward(model, tilted, rewards.as_reward(reward), inputs.nonnegative(scale, "scale"))
