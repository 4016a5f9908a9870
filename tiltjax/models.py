r"""Models: anything that knows `D_t(x) = E[X_1 | X_t = x]`.

| model | denoiser |
|---|---|
| `Analytic(mixture)` | closed form of a Gaussian mixture |
| `from_velocity`, `from_noise`, `from_denoiser` | a network: a function, a Flax NNX or an Equinox module |
| `Tilted(model, reward, scale)`, `Rescheduled(model, interpolant)` | another model, asked at another time and state: `tiltjax.tilted` |

What is said of a model holds for posterior means. A network under classifier-free guidance, or a thresholded one, is none: then
`Tilted`, `Rescheduled` and the posteriors sample something else.
Reference: Efron (2011), *Tweedie's formula and selection bias*, for what a denoiser knows of the score.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from tiltjax import inputs
from tiltjax.interpolants import Interpolant, or_linear, seen
from tiltjax.mixtures import GaussianMixture, is_small, noisy_components, posterior_mean
from tiltjax.nets import Net, ask, checked

_ROUNDING = 1e-5  # of an snr, relatively


class Model(eqx.Module):
    """A denoiser with its `interpolant`, and the `shape` and `dtype` of one state.

    Subclasses define `denoise(t, x)` for one sample.
    """

    interpolant: eqx.AbstractVar[Interpolant]
    shape: eqx.AbstractVar[tuple[int, ...]]
    dtype: eqx.AbstractVar[Any]

    # Whether states are tokens, and how many steps a run takes by default (None: as many as its solver names).
    tokens: ClassVar[bool] = False
    steps: ClassVar[int | None] = None

    @property
    def denoised_shape(self) -> tuple[int, ...]:
        """Of what `denoise` returns: `shape`, but for tokens."""
        return self.shape

    def denoise(self, t: Array, x: Array) -> Array:
        """`E[X_1 | X_t = x]`, of the shape of `x`; `t` is a scalar in [0, 1)."""
        raise NotImplementedError

    def velocity(self, t: Array, x: Array) -> Array:
        """The drift of the probability flow."""
        return self.interpolant.velocity(t, x, self.denoise(t, x))

    def score(self, t: Array, x: Array) -> Array:
        """`∇ log p_t(x)`."""
        return self.interpolant.score(t, x, self.denoise(t, x))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        """`denoise` of states `(n, *shape)` at one time; differentiable also in the parameters of a network that wants a batch."""
        return jax.vmap(lambda x: self.denoise(t, x))(x)

    def noise(self, t: Array, x: Array) -> Array:
        """`E[X_0 | X_t = x]`."""
        return self.interpolant.noise(t, x, self.denoise(t, x))

    def prepare(self, t: Array) -> Any:
        """What of `D_t(x)` does not depend on x, a tree of arrays: a loop over times finds it for all of them before it starts."""
        return t

    def denoise_prepared(self, prepared: Any, x: Array) -> Array:
        """`D_t(x)`, of what `prepare(t)` has returned."""
        return self.denoise(prepared, x)

    def check_start(self, t: Array) -> None:
        """Refuse to start sampling at t, with a `ValueError`, where the law of `X_t` is not known well enough for `initial`.

        `sigma_t X_0` is that law where the noise outweighs the data: `snr_t` times the noise's own variance below 2%.
        """
        if not inputs.concrete((t, self.interpolant)):
            return
        share = seen(self.interpolant, t, self.dtype)[1]
        if share > 0.02:
            raise ValueError(
                f"a run from noise cannot start at t = {float(t):g}, where a share of {share:.2g} of the state is data: start "
                "earlier, at 1e-3 say, or pass the states at that time as start="
            )

    def asks(self) -> tuple[Interpolant, Array | float]:
        """`(path, ahead)`: at time t the network at the bottom of this model is asked where `path` has the snr `snr_t + ahead`."""
        return self.interpolant, 0.0

    def _asks_anywhere(self) -> bool:
        """Whether no time can be wrong: a network of this very path, trained on all of it."""
        path, ahead = self.asks()
        itself = path is self.interpolant and isinstance(ahead, float) and ahead == 0
        return itself and type(path).snr_range is Interpolant.snr_range

    def check_times(self, times: Array) -> None:
        """Refuse, with a `ValueError`, times below 1 at which the network would be asked where it was not trained."""
        if not inputs.concrete((self, times)) or self._asks_anywhere():
            return
        with jax.ensure_compile_time_eval():
            snr, lowest, highest, start, end = map(np.asarray, _asked(self, times))
        # Near t = 1 an snr takes more rounding, 1 / (1 - t) of a time's, and levels are far apart.
        early, late = snr < (1 - _ROUNDING) * lowest, snr > 1.001 * highest
        outside = (early | late) & (np.asarray(times) < 1)
        if not np.any(outside):
            return
        first = np.argmax(outside)
        where = (
            f"at t = {np.asarray(times)[first]:g} the network would be asked at snr = {snr[first]:.4g}, and was trained from "
            f"{lowest:.4g} to {highest:.4g}: "
        )
        if early[first]:
            raise ValueError(f"{where}start at t = {np.ceil(1e6 * start) / 1e6:g} or later")
        if not end > 0:
            raise ValueError(f"{where}this tilt is narrower than the cleanest noise level, lower the scale")
        raise ValueError(
            f"{where}end the grid at t = {np.floor(1e6 * end) / 1e6:g} and jump from there, times=[..., 1.0]"
        )

    def grid(self, steps: int) -> Array:
        """The default grid, equal steps on [1e-3, 1]; where the network was trained on less, on that, with a jump to 1 at the end."""
        times = inputs.time_grid(None, steps)
        if not inputs.concrete(self) or self._asks_anywhere():
            return times
        with jax.ensure_compile_time_eval():
            snr, lowest, highest, start, end = map(np.asarray, _asked(self, times))
            early, late = 0 <= snr[0] < lowest, snr[-2] > highest
            start = max(np.ceil(1e6 * start) / 1e6, 1e-3) if early else 1e-3
            end = min(np.floor(1e6 * end) / 1e6, 1 - (1 - start) / steps) if late else 1 - (1 - start) / steps
            # Where nothing is left, or the tilt is a convex one, the checks say so.
            usable = (early or late) and (steps == 1 or start < end)
            return jnp.append(jnp.linspace(start, end, steps), 1.0) if usable else times

    def times(self, inner_times: inputs.Numbers) -> Array:
        """The grid, for `sample(..., times=)`, on which the network is asked at the given times of its own path, and at no others.

        For networks that know certain noise levels only: `model.times(path.clock(levels))` with a `DiscreteVP`. They are the times at
        which `snr_t + ahead` is the network's snr, and 1 at the end, the jump to the denoiser.

        **Arguments:** `inner_times`, increasing, below 1. **Raises:** `ValueError` for those at which this model never asks.
        """
        inner_times = inputs.finite(inner_times, "inner_times", 1)
        times, snr, lowest, earliest = _outer_times(self, inner_times)
        if inputs.concrete(times):
            never = (np.asarray(snr) < (1 - _ROUNDING) * np.asarray(lowest)) | (np.asarray(inner_times) >= 1)
            if np.any(never):
                raise ValueError(
                    f"inner_times must lie in [{float(earliest):.6g}, 1), where the network's snr is at least {float(lowest):.4g} "
                    f"(the final 1 is added here), got {np.asarray(inner_times)[never]}: leave those out"
                )
        return jnp.append(times, jnp.ones((), times.dtype))

    def initial(self, key: Array, t: Array) -> Array:
        """A starting state at the first time `t` of a run: `sigma_t X_0`, for which `alpha_t` must be negligible."""
        return self.interpolant.sigma(t) * jax.random.normal(key, self.shape, self.dtype)

    def initial_log_prob(self, t: Array, x: Array) -> Array:
        """The log-density at `x` of the law that `initial(key, t)` draws from. **Raises:** `ValueError` where that law is not known."""
        if type(self).initial is not Model.initial:
            raise ValueError(
                f"{type(self).__name__} starts from a law of its own, whose density is not known here: its initial_log_prob must say it"
            )
        sigma = self.interpolant.sigma(t)
        return jnp.sum(jax.scipy.stats.norm.logpdf(x / sigma) - jnp.log(sigma))


@eqx.filter_jit
def _asked(model: Model, times: Array) -> tuple[Array, ...]:
    """The snr at which the network is asked, the range on which it was trained, and that range in times of the model."""
    model, times = inputs.cast((model, times), model.dtype)
    own, (path, ahead) = model.interpolant, model.asks()
    lowest, highest = path.snr_range()
    return jax.vmap(own.snr)(times) + ahead, lowest, highest, own.time(lowest - ahead), own.time(highest - ahead)


@eqx.filter_jit
def _outer_times(model: Model, inner: Array) -> tuple[Array, ...]:
    """The model's times for those of its network, the snr of these, the least one it asks at, and the time of that."""
    model, inner = inputs.cast((model, inner), model.dtype)
    own, (path, ahead) = model.interpolant, model.asks()
    start = own.snr(jnp.zeros((), inner.dtype))
    snr = jax.vmap(path.snr)(inner)
    # A level that is the start itself may come out a rounding error before it.
    times = jnp.maximum(jax.vmap(own.time)(jnp.maximum(snr - ahead, start)), 0)
    return times, snr, start + ahead, path.time(start + ahead)


class Analytic(Model):
    """The exact model of a Gaussian mixture.

    **Arguments:** `mixture`; `interpolant`, `Linear()` by default.
    """

    mixture: GaussianMixture
    interpolant: Interpolant

    def __init__(self, mixture: GaussianMixture, interpolant: Interpolant | None = None):
        inputs.instance(mixture, GaussianMixture, "mixture", "Analytic(mixture); use from_velocity for a network")
        self.mixture = mixture
        self.interpolant = or_linear(interpolant)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.mixture.dim,)

    @property
    def dtype(self) -> Any:
        return self.mixture.means.dtype

    def denoise(self, t: Array, x: Array) -> Array:
        return self.mixture.denoise(self.interpolant.alpha(t), self.interpolant.sigma(t), x)

    def prepare(self, t: Array) -> Any:
        path = self.interpolant
        return noisy_components(self.mixture, path.alpha(t), path.sigma(t)) if self._prepares else t

    def denoise_prepared(self, prepared: Any, x: Array) -> Array:
        return posterior_mean(prepared, x) if self._prepares else self.denoise(prepared, x)

    @property
    def _prepares(self) -> bool:
        return is_small(self.mixture) and type(self).denoise is Analytic.denoise  # a subclass may know another one

    def posterior(self, t: Array, x: Array) -> GaussianMixture:
        """The law of `X_1` given `X_t = x`."""
        return self.mixture.condition(self.interpolant.alpha(t), self.interpolant.sigma(t), x)


class Network(Model):
    """A network as a model; built by `from_velocity`, `from_noise` and `from_denoiser`."""

    net: Net
    interpolant: Interpolant
    to_denoised: Callable = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def denoise(self, t: Array, x: Array) -> Array:
        t = jnp.asarray(t, x.dtype)
        output = ask(self.net, t, x, x.shape, self.batched)
        return self.to_denoised(self.interpolant, t, x, output.astype(x.dtype))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        if not self.batched:
            return super().denoise_batch(t, x)
        t = jnp.asarray(t, x.dtype)
        output = checked(self.net(jnp.broadcast_to(t, len(x)), x), x.shape, x.shape[1:], True).astype(x.dtype)
        return jax.vmap(lambda x, output: self.to_denoised(self.interpolant, t, x, output))(x, output)


def from_velocity(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> Network:
    """A model from a velocity network `b_t(x)`, such as flow matching trains.

    **Arguments:**

    - `fn`: `fn(t, x)`, or `fn(params, t, x)` if `params` is given: a function, a Flax NNX module or an Equinox module, returning the shape of `x`. Parameters travel as arguments of the compiled program, never as constants.
    - `shape`: the shape of one state, such as `(2,)` or `(16, 64, 64)`.
    - `batched`: if true, `fn` takes `t` of shape `(B,)` and `x` of shape `(B, *shape)`, and the particle axis (times the draws of a guidance) becomes its batch axis. Differentiable in x by reverse mode.
    - `interpolant`: what the network was trained with, `Linear()` by default.
    - `dtype`: of the states, JAX's default float unless given. The network's own dtype is left alone.

    The velocity is that of a posterior mean. One changed by classifier-free guidance or by thresholding is not: plain sampling runs, but tilts, posteriors and guidances rest on identities it does not satisfy.

    **Raises:** `ValueError` for an output of the wrong shape, or a module in training mode.
    """
    return _network(fn, params, _from_velocity, shape, batched, interpolant, dtype)


def from_noise(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> Network:
    """A model from a noise network `E_t(x) = E[X_0 | X_t = x]`; arguments and conditions as in `from_velocity`.

    At small `alpha_t` the denoiser `(x - sigma E) / alpha` magnifies the network's error: start later if that shows. A network that wants the index of a noise level instead of t: `interpolants.DiscreteVP`.
    """
    return _network(fn, params, _from_noise, shape, batched, interpolant, dtype)


def from_denoiser(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> Network:
    """A model from a denoising network `D_t(x) = E[X_1 | X_t = x]`; arguments and conditions as in `from_velocity`."""
    return _network(fn, params, _from_denoiser, shape, batched, interpolant, dtype)


def _network(fn, params, to_denoised, shape, batched, interpolant, dtype) -> Network:
    if not isinstance(shape, tuple | list):
        raise TypeError(f"shape must be a tuple such as (2,), the shape of one state, got {shape!r}")
    shape = tuple(inputs.count(n, "every entry of shape") for n in shape)
    return Network(
        net=Net(fn, params),
        interpolant=or_linear(interpolant),
        to_denoised=to_denoised,
        batched=inputs.flag(batched, "batched"),
        shape=shape,
        dtype=inputs.state_dtype(dtype),
    )


def _from_velocity(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_velocity(t, x, output)


def _from_noise(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_noise(t, x, output)


def _from_denoiser(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return output
