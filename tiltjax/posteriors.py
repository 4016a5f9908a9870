r"""Posterior samplers: draws of `X_1 | X_t = x`, differentiable in x.

| posterior | a draw | law |
|---|---|---|
| `Exact(model)` | closed form of a mixture | exact; the derivative holds the component fixed |
| `Glass(model, inner_steps)` | a flow with the same network | exact as steps grow |
| `FlowMap(model, inner_steps)` | the end of the probability flow from x | a point, not a law |
| `Renoise(model, snr_factor, inner_steps)` | the flow from a noisier state | in between |
| `Tweedie(model)` | the denoiser | a point: the mean |
| `Distilled(model, fn)` | `fn(key, t, x)`, one call of a trained network | that of `fn` |

**Glass.** The posterior of `X_1` given `X_t = x` is the prior tilted by one Gaussian likelihood, so
its denoiser is the model's denoiser at another time and state (`Interpolant.observe`, and
`tiltjax.models`). The flow of this denoiser from noise draws from the posterior: Holderrieth et al.
(arXiv 2602.05993, GLASS flows). The noise of this inner flow is a free choice. It has the width of
the posterior of data of standard deviation `base_scale`, `1 / sqrt(snr_t + base^-2)`, so that the
same steps resolve the flow at every time. If the width of the data is known and more than 10 times
that of the noise, the inner noise is wider by the same factor.

Both inner flows use the exponential form of the probability flow,
`d(x / sigma) = D d(alpha / sigma)`. This form is exact for a constant denoiser and has no
singularity at t = 1, for any interpolant.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg, _pytree, _random, _repr
from tiltjax.interpolants import Interpolant
from tiltjax.mixtures import check_state, decomposed
from tiltjax.models import Analytic, Model, check_mean

_MODEL_HINT = (
    "use Analytic(mixture) for a mixture; guide tokens, which have no posterior of numbers, by "
    "tokens.Completions(model, reward, scale)"
)


class Posterior(_repr.Printable):
    """A sampler of `X_1 | X_t = x` for a model. Subclasses define `draw(key, t, x)` for one sample,
    and `draws` if several draws can share work.
    """

    _always = ("inner_steps",)

    model: eqx.AbstractVar[Model]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # An inherited `draws` would not match the `draw` of the subclass.
        if "draw" in vars(cls) and "draws" not in vars(cls):
            cls.draws = Posterior.draws

    def draw(self, key: Array, t: Array, x: Array) -> Array:
        """One draw, of the shape of `x`, reparametrized and thus differentiable in `x`."""
        raise NotImplementedError

    def draws(self, key: Array, t: Array, x: Array, k: int, denoised: Array | None = None) -> Array:
        """k independent draws, `(k, *x.shape)`; `draws(..., 1)[0]` is `draw(...)`.

        **Arguments:** `denoised`, `D_t(x)` as a function of x, if it is known already. A posterior
        that needs it then saves one network call.

        **Raises:** `ValueError` for `k < 1`.
        """
        k = _checks.count(k, "k")
        keys = key[None] if k == 1 else jax.random.split(key, k)
        return jax.vmap(lambda key: self.draw(key, t, x))(keys)


class Tweedie(Posterior):
    """The posterior mean `D_t(x)`: the draw of DPS. **Arguments:** `model`."""

    model: Model

    def __init__(self, model: Model):
        _checks.instance(model, Model, "model", _MODEL_HINT)
        self.model = model

    def draw(self, key: Array, t: Array, x: Array) -> Array:
        return self.model.denoise(t, x)

    def draws(self, key: Array, t: Array, x: Array, k: int, denoised: Array | None = None) -> Array:
        denoised = self.draw(key, t, x) if denoised is None else denoised
        return jnp.broadcast_to(denoised, (_checks.count(k, "k"), *denoised.shape))


class Exact(Posterior):
    """Draws from the posterior of a mixture in closed form. **Arguments:** `model`, an `Analytic`
    model.

    For one Gaussian, the derivative in x is the derivative of the posterior mean. For several
    components, a draw chooses a component, and the derivative holds this choice fixed. The law of
    the draws is exact, but the derivative ignores how x changes the weights of the components. The
    derivative of `Glass` includes this change.

    A draw uses Matheron's rule. It draws data X_1' and noise X_0' from the prior and returns
    `X_1' + K (x - alpha_t X_1' - sigma_t X_0')`, where K is the gain, the matrix of the regression
    of X_1 on X_t. No posterior covariance is factored.
    """

    model: Analytic

    def __init__(self, model: Analytic):
        _checks.instance(
            model, Analytic, "model", "Exact(Analytic(mixture)); use Glass for any other model"
        )
        self.model = model

    def draw(self, key: Array, t: Array, x: Array) -> Array:
        return Exact.draws(self, key, t, x, 1)[0]

    def draws(self, key: Array, t: Array, x: Array, k: int, denoised: Array | None = None) -> Array:
        k = _checks.count(k, "k")
        mixture, interpolant = self.model.mixture, self.model.interpolant
        alpha, sigma = interpolant.alpha(t), interpolant.sigma(t)
        key_component, key_data, key_noise = jax.random.split(key, 3)
        check_state(x, mixture.dim)
        gains = _linalg.array(mixture.view(alpha, sigma).gains)
        parts = mixture.means, gains, jax.vmap(_linalg.square_root)(mixture.covs)
        normal = lambda key: jax.random.normal(key, (k, *x.shape), x.dtype)

        def correct(part: tuple[Array, Array, Array], data: Array, noise: Array) -> Array:
            mean, gain, root = part
            data = mean + root @ data
            return data + gain @ (x - alpha * data - sigma * noise)

        if len(mixture.means) == 1:  # the same matrices for all particles and draws
            only = jax.tree.map(lambda part: part[0], parts)
            return jax.vmap(correct, (None, 0, 0))(only, normal(key_data), normal(key_noise))
        log_weights = jax.lax.stop_gradient(self.model.posterior(t, x).log_weights)
        chosen = _random.categorical(key_component, log_weights, shape=(k,))
        return jax.vmap(correct)(
            jax.tree.map(lambda part: part[chosen], parts), normal(key_data), normal(key_noise)
        )


class Glass(Posterior):
    """Draws by a flow with the model's own denoiser.

    The error of a draw's spread is O(1 / steps^order), at the same number of calls. With order 1
    the denoiser is constant over a step. With order 2 it is extrapolated linearly from the previous
    step (Adams and Bashforth, in the exponential form). The first call is the denoiser at `(t, x)`
    itself, which a guidance also needs and shares.

    **Arguments:** `model`; `inner_steps`, the denoiser calls per draw; `order`, 1 or 2.

    **Raises:** `ValueError` for `inner_steps < 1` or another order. Source: Holderrieth et al.
    (arXiv 2602.05993).
    """

    model: Model
    widening: Array
    inner_steps: int = eqx.field(static=True)
    order: int = eqx.field(static=True)

    def __init__(self, model: Model, inner_steps: int = 20, order: int = 1):
        check_mean(model, _MODEL_HINT)
        self.model = model
        self.widening = _checks.floating(max(model.stretch, 1.0), "widening")
        self.inner_steps = _checks.count(inner_steps, "inner_steps")
        self.order = _checks.count(order, "order")
        _checks.number(order, "order", 1, 2)

    def draw(self, key: Array, t: Array, x: Array) -> Array:
        return Glass.draws(self, key, t, x, 1)[0]

    def draws(self, key: Array, t: Array, x: Array, k: int, denoised: Array | None = None) -> Array:
        k = _checks.count(k, "k")
        denoised = self.model.denoise(t, x) if denoised is None else denoised
        # Each draw has its own copy of the state. The derivative in a common state would be a sum
        # over draws at every step of the flow.
        noises = jax.random.normal(key, (k, *x.shape), x.dtype)
        states = jnp.broadcast_to(x, (k, *x.shape))
        return jax.vmap(lambda xi, x: self._flow(xi, t, x, denoised))(noises, states)

    def _flow(self, xi: Array, t: Array, x: Array, denoised: Array) -> Array:
        """The end of the inner flow that starts from the noise `width * xi`."""
        model, interpolant = decomposed(self.model), self.model.interpolant
        precision = interpolant.snr(t)
        natural = _linalg.entries(interpolant.alpha(t) / interpolant.sigma(t) ** 2 * x)
        base = interpolant.data_scale() * self.widening.astype(x.dtype)
        width = 1 / jnp.sqrt(precision + base**-2)
        remaining, steps = _glass_steps(model, precision, width, self.inner_steps, x.dtype)
        rows, from_row = _linalg.rows(steps)

        def advance(z: Any, remaining: Array, denoised: Any) -> Any:
            return remaining * z + (1 - remaining) * denoised

        def step(carry: tuple[Any, Any], row: Array) -> tuple[tuple[Any, Any], None]:
            (z, previous), now = carry, from_row(row)
            state = _linalg.array(now.of_natural * natural + now.of_z * z)
            denoised = _linalg.entries(model.denoise_prepared(now.prepared, state))
            z = advance(z, now.remaining, denoised)
            if self.order == 2:
                z = z + now.extrapolate * (denoised - previous)
            return (z, denoised), None

        start, first = _linalg.entries(width * xi), _linalg.entries(denoised)
        (end, _), _ = jax.lax.scan(step, (advance(start, remaining, first), first), rows)
        return _linalg.array(end)


class Distilled(Posterior):
    """Draws of a network that was trained to draw from the posterior in one call, such as a diamond
    map (Holderrieth et al., arXiv 2602.05993), or that jumps to the end of the flow, such as the
    distilled student of `model`.

    **Arguments:** `model`; `fn(key, t, x)`, or `fn(params, key, t, x)` if `params` is given: one
    draw, of the shape of x, reparametrized: differentiable in x at a fixed key. The law of the
    draws is that of `fn`, whatever it is.

    **Raises:** `TypeError` for a `fn` that is not callable.
    """

    model: Model
    fn: _pytree.Function
    params: Any

    def __init__(self, model: Model, fn: Callable, params: Any = None):
        _checks.instance(model, Model, "model", _MODEL_HINT)
        self.model, self.fn, self.params = model, _pytree.Function(fn), _pytree.opened(params)

    def draw(self, key: Array, t: Array, x: Array) -> Array:
        leading = () if self.params is None else (self.params,)
        drawn = self.fn(*leading, key, t, x)
        if getattr(drawn, "shape", None) != x.shape:
            raise ValueError(
                f"fn of Distilled must return one draw of shape {x.shape}, got "
                f"{getattr(drawn, 'shape', type(drawn).__name__)}"
            )
        return drawn.astype(x.dtype)


class _GlassStep(NamedTuple):
    """A step of the inner flow from s, along `Z_s = s X_1 + (1 - s) width noise`.

    - `prepared`: the model at the time of the combined likelihood of `X_t` and `Z_s`.
    - `of_natural`, `of_z`: the coefficients of the state at that time, `of_natural eta + of_z z`,
      with eta the natural parameter of `X_t`.
    - `remaining`: the factor that the step applies to `z - D`.
    - `extrapolate`: the contribution of a denoiser that is linear in s, in units of its change over
      a step.
    """

    prepared: Any
    of_natural: Array
    of_z: Array
    remaining: Array
    extrapolate: Array


def _glass_steps(
    model: Model, precision: Array, width: Array, num: int, dtype: Any
) -> tuple[Array, _GlassStep]:
    """`remaining` of the first of `num` steps, whose denoiser is known, and the other steps."""
    s = jnp.arange(num, dtype=dtype) / num
    remaining = (1 - s - 1 / num) / (1 - s)
    noise = ((1 - s[1:]) * width) ** 2
    precisions = precision + s[1:] ** 2 / noise
    times, of_natural = jax.vmap(model.interpolant.observe)(precisions, jnp.ones_like(precisions))
    # With m steps to go: 1 + (m - 1) log((m - 1) / m).
    left = np.arange(num - 1, 0, -1)
    extrapolate = jnp.asarray(1 + (left - 1) * np.log(np.maximum(left - 1, 1) / left), dtype)
    # The coefficients are computed for all steps at once, to save operations inside the loop.
    prepared = jax.vmap(model.prepare)(times)
    of_z = of_natural * s[1:] / noise
    return remaining[0], _GlassStep(prepared, of_natural, of_z, remaining[1:], extrapolate)


class FlowMap(Posterior):
    """The end of the unguided probability flow from x: `X_{t,1}(x)`. **Arguments:** `model`;
    `inner_steps`, of second order; `floor` in (0, 1).

    Heun steps, uniform in the logarithm of `sigma / alpha` down to `floor` times its value for the
    noise, then one jump to the denoiser: 2 `inner_steps` + 1 denoiser calls. For t > 0, where this
    logarithm is finite. If the width of the data is known and less than 0.1 times that of the
    noise, the jump is later by the same factor. A model of `from_flow_map` or `from_consistency`
    returns the end in one call.

    **Raises:** `ValueError` for a `floor` outside (0, 1).
    """

    model: Model
    narrowing: Array
    inner_steps: int = eqx.field(static=True)
    floor: float = eqx.field(static=True)

    def __init__(self, model: Model, inner_steps: int = 20, floor: float = 1e-3):
        _checks.instance(model, Model, "model", _MODEL_HINT)
        self.model = model
        self.narrowing = _checks.floating(min(model.stretch, 1.0), "narrowing")
        self.inner_steps = _checks.count(inner_steps, "inner_steps")
        self.floor = _checks.number(floor, "floor", 0, 1, closed="neither")

    def draw(self, key: Array, t: Array, x: Array) -> Array:
        end = self.model.endpoint(t, x)
        return self._flow(t, x) if end is None else end

    def _flow(self, t: Array, x: Array) -> Array:
        model, times = decomposed(self.model), self._times(t, x.dtype)
        # A correction and the next prediction are at the same time.
        which = (np.arange(2 * self.inner_steps + 1) + 1) // 2
        prepared = jax.tree.map(lambda leaf: leaf[which], jax.vmap(model.prepare)(times))
        rows, from_row = _linalg.rows((prepared, *_heun_weights(model.interpolant, times).T))

        def stage(carry: tuple[Any, Any], row: Array) -> tuple[tuple[Any, Any], None]:
            x, previous = carry
            prepared, of_x, of_new, of_old = from_row(row)
            denoised = _linalg.entries(model.denoise_prepared(prepared, _linalg.array(x)))
            return (of_x * x + of_new * denoised + of_old * previous, denoised), None

        start = _linalg.entries(x)
        carry = start, jax.tree.map(jnp.zeros_like, start)
        (end, _), _ = jax.lax.scan(stage, carry, rows)
        return _linalg.array(end)

    def _times(self, t: Array, dtype: Any) -> Array:
        """The times from t on, `(inner_steps + 1,)`, evenly spaced in the logarithm of
        `sigma / alpha`.
        """
        interpolant = self.model.interpolant
        base = interpolant.data_scale() * self.narrowing.astype(dtype)
        last = interpolant.time((1 / (self.floor * base)) ** 2)
        noise_ratio = interpolant.sigma(t) / interpolant.alpha(t)
        ratio = jnp.minimum(interpolant.sigma(last) / interpolant.alpha(last) / noise_ratio, 1.0)
        exponent = jnp.arange(1, self.inner_steps + 1, dtype=dtype) / self.inner_steps
        grid = jax.vmap(interpolant.time)((noise_ratio * ratio**exponent) ** -2)
        return jnp.concatenate([t[None], grid])


def _heun_weights(interpolant: Interpolant, times: Array) -> Array:
    """Heun's method between n + 1 times and the jump at the end, as weights of the state, of its
    denoiser and of the previous denoiser, `(2 n + 1, 3)`. In this form it is one loop, in which the
    network is compiled once.
    """
    sigma, alpha = jax.vmap(interpolant.sigma)(times), jax.vmap(interpolant.alpha)(times)
    # A prediction is `contraction * x + gain * D`.
    contraction = sigma[1:] / sigma[:-1]
    gain = alpha[1:] - alpha[:-1] * contraction
    zero, one = jnp.zeros_like(gain), jnp.ones_like(gain)
    predict = jnp.stack([contraction, gain, zero], axis=1)
    correct = jnp.stack([one, gain / 2, -gain / 2], axis=1)
    jump = jnp.asarray([[0.0, 1.0, 0.0]], times.dtype)
    return jnp.concatenate([jnp.stack([predict, correct], axis=1).reshape(-1, 3), jump])


class Renoise(Posterior):
    """The end of the flow from a noisier state: noise is added until the snr has fallen by
    `snr_factor`, and `FlowMap` starts there.

    `x_s = (alpha_s / alpha_t) x + sqrt(sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2) xi` at the time
    s with `snr_s = snr_t / snr_factor`, the forward noising of `X_t`. With a factor of 1 it is
    `FlowMap`; for an infinite factor it does not depend on x. Its law is not the posterior: see
    Holderrieth et al. (arXiv 2602.05993, weighted diamond maps).

    **Arguments:** `model`; `snr_factor >= 1`; `inner_steps` of the inner `FlowMap`.

    **Raises:** `ValueError` for a factor below 1.
    """

    model: Model
    snr_factor: Array
    inner_steps: int = eqx.field(static=True)

    def __init__(self, model: Model, snr_factor: float | Array, inner_steps: int = 20):
        _checks.instance(model, Model, "model", _MODEL_HINT)
        self.model = model
        self.snr_factor = _checks.in_range(snr_factor, "snr_factor", 1)
        self.inner_steps = _checks.count(inner_steps, "inner_steps")

    def draw(self, key: Array, t: Array, x: Array) -> Array:
        interpolant = self.model.interpolant
        s = interpolant.time(interpolant.snr(t) / self.snr_factor)
        ratio = interpolant.alpha(s) / interpolant.alpha(t)
        # sqrt(sigma_s^2 - ratio^2 sigma_t^2), without a difference of large numbers.
        std = interpolant.sigma(s) * jnp.sqrt(1 - 1 / self.snr_factor)
        noisy = ratio * x + std * jax.random.normal(key, x.shape, x.dtype)
        return FlowMap(self.model, self.inner_steps).draw(key, s, noisy)
