r"""Models, defined by their denoiser `D_t(x) = E[X_1 | X_t = x]`.

| model | denoiser |
|---|---|
| `Analytic(mixture)` | closed form of a Gaussian mixture |
| `from_velocity`, `from_noise`, `from_v`, `from_score`, `from_edm`, `from_denoiser` | a network |
| `Tilted(model, reward, scale)`, `Rescheduled(model, interpolant)` | that of another model |

All statements about models assume that the denoiser is a posterior mean. A network under
classifier-free guidance or with thresholding is not a posterior mean; `Tilted`, `Rescheduled` and
the posteriors then sample another law. Reference: Efron (2011), *Tweedie's formula and selection
bias*, for the relation between denoiser and score.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree, _repr, _sharding, grids
from tiltjax.interpolants import Interpolant, start_of
from tiltjax.solvers import Consistency, Solver, Streams

_ROUNDING = 1e-5  # the relative rounding of an snr
_NOT_NOISE = 0.02  # the fraction of data from which on a state is not noise
_MOST_LOST = 0.05  # the fraction of the standard deviation of narrow data that a grid may change


class Denoiser(_repr.Printable):
    """The interface between samplers and models: `Model` for real-valued states, `tokens.Masked`
    for tokens.

    Subclasses define `denoise(t, x)`, `corruption` and `initial`, and the `shape` and `dtype` of
    one state. Models whose noise is not yet a first state also define `start`.
    """

    shape: eqx.AbstractVar[tuple[int, ...]]
    dtype: eqx.AbstractVar[Any]

    _chosen = {"interpolant": "Linear()"}

    # The default number of steps of a run. None: the default of the solver.
    steps: ClassVar[int | None] = None

    def __check_init__(self):
        _pytree.check_object(self)

    @property
    def corruption(self) -> Any:
        """The law of `X_t` given `X_1`, which a step of a solver reverses: an `Interpolant` or
        `tokens.Masking`.
        """
        raise NotImplementedError

    def _call(self, **given: Any) -> str:
        return _repr.call(self, **{"dtype": None} | given)

    def _text(self) -> str:
        states = f"states {self.shape} {jnp.dtype(self.state_dtype)}"
        return f"{self._call(interpolant=None)} on {_repr.form(self.corruption)}, {states}"

    @property
    def denoised_shape(self) -> tuple[int, ...]:
        """The shape of the output of `denoise`."""
        return self.shape

    @property
    def width(self) -> float | None:
        """The standard deviation of the data, the root of the mean variance of a coordinate, or
        `None` if it is not known.
        """
        return None

    @property
    def state_dtype(self) -> Any:
        """The dtype of a state; `dtype` is the dtype of the output of `denoise`."""
        return self.dtype

    def denoise(self, t: Array, x: Array) -> Array:
        """`E[X_1 | X_t = x]`; `t` is a scalar in [0, 1)."""
        raise NotImplementedError

    def initial(self, key: Array, t: Array) -> Array:
        """The noise of a state at the first time `t` of a run."""
        raise NotImplementedError

    def start(self, t: Array, noise: Array, denoised: Array) -> Array:
        """The first state of a run, from the noise `initial(key, t)` and the denoiser there. Runs
        call it only if `starts_denoised(t)`; otherwise the noise is the first state.
        """
        raise NotImplementedError

    def starts_denoised(self, t: Array) -> bool:
        """Whether the first state of a run, at time t, depends on the denoiser."""
        return False

    def default_solver(self, usual: Solver) -> Solver:
        """The solver of a run without `solver`; `usual` is the default of the sampler."""
        return usual

    def check_solver(self, solver: Solver) -> None:
        """Raise a `ValueError` for a solver that does not fit the model."""

    def as_states(self, value: Any, name: str, leading: tuple[int, ...]) -> Array:
        """The states `(*leading, *shape)` that a user passed. **Raises:** `ValueError` for another
        shape or invalid values.
        """
        states = _checks.floating(value, name)
        if _checks.concrete(states) and not np.all(np.isfinite(_sharding.addressable(states))):
            raise ValueError(f"{name} must be finite, got states with NaN or infinity")
        if states.shape != (*leading, *self.shape):
            raise ValueError(
                f"{name} must be states of shape {(*leading, *self.shape)}, got {states.shape}"
            )
        return states

    def grid(self, steps: int) -> Array:
        """The default grid with `steps` steps, `(steps + 1,)`."""
        return grids.time_grid(None, steps)

    def check_start(self, t: Array) -> None:
        """Raise a `ValueError` if the law of `X_t` is not known, so that sampling cannot start at
        t.
        """

    def check_guided_start(self, t: Array) -> None:
        """Raise a `ValueError` if no guidance is finite at t."""

    def check_times(self, times: Array) -> None:
        """Raise a `ValueError` for times at which the denoiser of the model is not known."""

    def check_grid(self, solver: Solver, times: Array) -> None:
        """Raise a `ValueError` if steps of `solver` on the default grid are too long for data of a
        known width.
        """


class Model(Denoiser):
    """A denoiser of real-valued states, with an `interpolant`.

    Subclasses define `denoise(t, x)` for one sample, of the shape of `x`, and the fields
    `interpolant`, `shape` and `dtype`.
    """

    interpolant: eqx.AbstractVar[Interpolant]

    # Whether `denoise` returns the posterior mean, as most methods assume.
    is_mean: ClassVar[bool] = True

    @property
    def corruption(self) -> Interpolant:
        return self.interpolant

    def check_solver(self, solver: Solver) -> None:
        if isinstance(solver, Consistency):
            raise ValueError(
                f"Consistency is the solver of consistency functions, but {type(self).__name__} "
                "has a denoiser: use Ancestral(), Euler() or Heun()"
            )

    def endpoint(self, t: Array, x: Array) -> Array | None:
        """The end `X_{t,1}(x)` of the probability flow from x, if the model knows it in one call,
        else `None`.
        """
        return None

    def velocity(self, t: Array, x: Array) -> Array:
        """The drift of the probability flow."""
        return self.interpolant.velocity(t, x, self.denoise(t, x))

    def score(self, t: Array, x: Array) -> Array:
        """`∇ log p_t(x)`."""
        return self.interpolant.score(t, x, self.denoise(t, x))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        """`denoise` of states `(n, *shape)` at one time. It is also differentiable in the
        parameters of a network with `batched=True`.
        """
        return jax.vmap(lambda x: self.denoise(t, x))(x)

    def noise(self, t: Array, x: Array) -> Array:
        """`E[X_0 | X_t = x]`."""
        return self.interpolant.noise(t, x, self.denoise(t, x))

    @property
    def stretch(self) -> float:
        """The factor by which the `width` of the data is outside of 0.1 to 10 times the
        `data_scale` of the interpolant; 1 inside, and if the width is not known.
        """
        if self.width is None or not _checks.concrete(self.interpolant):
            return 1.0
        return grids.beyond(self.width, start_of(self.interpolant, np.zeros(()), self.dtype)[2])

    def prepare(self, t: Array) -> Any:
        """The part of `D_t(x)` that does not depend on x, a tree of arrays. A loop over times
        computes it for all times before it starts.
        """
        return t

    def denoise_prepared(self, prepared: Any, x: Array) -> Array:
        """`D_t(x)` from the output of `prepare(t)`."""
        return self.denoise(prepared, x)

    def check_start(self, t: Array) -> None:
        """Raise a `ValueError` if the law of `X_t` is not close enough to the law of `start`.

        `start` is accurate if the noise dominates the data, that is if `snr_t` times the variance
        of the data is at most 2%. Here data has the width of `interpolant.data_scale()`, unless its
        `width` is known and not between 0.1 and 10 times that, or, for `VE`, larger.
        """
        if not _checks.concrete((t, self.interpolant)):
            return
        snr, base = start_of(self.interpolant, t, self.dtype)[1:]
        width = base * grids.beyond(self.width, base)
        if self.interpolant.default_times(1) is not None:  # whose start is the same for all widths
            width = max(width, self.width or 0.0)
        variance = width**2
        if snr * variance <= _NOT_NOISE:
            return
        share = f"a fraction of {snr * variance / (1 + snr * variance):.2g} of the variance is data"
        lowest = start_of(self.interpolant, np.zeros_like(t), self.dtype)[1]
        if lowest * variance > _NOT_NOISE:
            raise ValueError(
                f"a run of {type(self.interpolant).__name__} cannot start from noise: even at t = "
                f"{'0' if snr == lowest else f'{float(t):g}'} {share}. Use Rescheduled(model, "
                "Linear()), or pass states as start="
            )
        with jax.ensure_compile_time_eval():
            latest = float(self.interpolant.time(jnp.asarray(_NOT_NOISE / variance, self.dtype)))
        raise ValueError(
            f"a run from noise cannot start at t = {float(t):g}, where {share}: start at "
            f"t = {latest:.2g} or earlier, or pass the states at that time as start="
        )

    def check_grid(self, solver: Solver, times: Array) -> None:
        """Raise a `ValueError` if Gaussian data of this width, much narrower than the noise, loses
        or gains more than 5% of its standard deviation on the grid. Not checked are runs of one
        step, a jump, and tilts of a network with a table of noise levels, whose last jump no
        other grid shortens.
        """
        known = self.width is not None and _checks.concrete((self, solver, times))
        interpolant, added = self.network_query()
        levels = type(interpolant).snr_range is not Interpolant.snr_range
        if not known or self.stretch >= 1 or len(times) == 2:
            return
        if levels and not (isinstance(added, float) and added == 0):
            return
        with jax.ensure_compile_time_eval():
            spread = float(_spread(self, solver, times, jnp.asarray(self.width)))
        if not abs(spread - 1) <= _MOST_LOST:
            raise ValueError(
                f"samples of data of standard deviation {self.width:.3g} would be {spread:.2g} "
                f"times as wide as the data after {len(times) - 1} steps of "
                f"{type(solver).__name__} on {type(self.interpolant).__name__}: multiply the data "
                "by a constant, so that its standard deviation is about one, or take more steps"
            )

    def check_guided_start(self, t: Array) -> None:
        """Raise a `ValueError` if `alpha_t = 0`, because a guidance moves the state by
        `sigma^2 / alpha` times a score.
        """
        if (
            _checks.concrete((t, self.interpolant))
            and start_of(self.interpolant, t, self.dtype)[0] == 0
        ):
            raise ValueError(
                f"a guided run must start at t > 0, got t = {float(t):g}, where its gain "
                "sigma^2 / alpha is infinite: try 1e-3"
            )

    def network_query(self) -> tuple[Interpolant, Array | float]:
        """`(interpolant, added)`: at time t this model calls its network at the snr `snr_t + added`
        of the network's `interpolant`.
        """
        return self.interpolant, 0.0

    def _trained_everywhere(self) -> bool:
        """Whether every time is valid: the network has this interpolant and was trained on all of
        it.
        """
        interpolant, added = self.network_query()
        itself = interpolant is self.interpolant and isinstance(added, float) and added == 0
        return itself and type(interpolant).snr_range is Interpolant.snr_range

    def check_times(self, times: Array) -> None:
        """Raise a `ValueError` for times below 1 at which the network would be called outside of
        its training range.
        """
        if not _checks.concrete((self, times)) or self._trained_everywhere():
            return
        with jax.ensure_compile_time_eval():
            snr, lowest, highest, start, end = map(np.asarray, _network_snr(self, times))
        # Near t = 1 an snr has more rounding, 1 / (1 - t) times that of t, and levels are far
        # apart.
        early, late = snr < (1 - _ROUNDING) * lowest, snr > 1.001 * highest
        outside = (early | late) & (np.asarray(times) < 1)
        if not np.any(outside):
            return
        first = np.argmax(outside)
        where = (
            f"at t = {np.asarray(times)[first]:g} the network would be called at snr = "
            f"{snr[first]:.4g}, but was trained from {lowest:.4g} to {highest:.4g}: "
        )
        if early[first]:
            raise ValueError(f"{where}start at t = {np.ceil(1e6 * start) / 1e6:g} or later")
        if not end > 0:
            raise ValueError(
                f"{where}lower the scale, as this tilt is narrower than the cleanest noise level"
            )
        raise ValueError(
            f"{where}end the grid at t = {np.floor(1e6 * end) / 1e6:g} and jump from there, "
            "times=[..., 1.0]"
        )

    def grid(self, steps: int) -> Array:
        """The default grid, equal steps on [1e-3, 1], or the `default_times` of the interpolant
        (`VE`). If the network was trained on less, the grid covers only the training range and ends
        with a jump to 1.

        If the `width` of the data is known and is not between 0.1 and 10 times
        `interpolant.data_scale()`, the grid is made for it: that of data of 10 times this scale in
        terms of snr times variance, or, for narrow data, short steps in `log sigma_t` until the
        data shows. The grid of `VE` does not depend on the width.
        """
        times = grids.of_width(self.interpolant, self.width, steps, self.dtype)
        if not _checks.concrete(self) or self._trained_everywhere():
            return times
        with jax.ensure_compile_time_eval():
            snr, lowest, highest, start, end = map(np.asarray, _network_snr(self, times))
            early = 0 <= snr[0] < (1 - _ROUNDING) * lowest
            late = snr[-2] > (1 + _ROUNDING) * highest
            first = min(float(times[0]), 1e-3)
            start = max(np.ceil(1e6 * start) / 1e6, first) if early else first
            usual = 1 - (1 - start) / steps
            if self.interpolant.default_times(steps) is not None:
                usual = float(times[-2])
            end = min(np.floor(1e6 * end) / 1e6, usual) if late else usual
            # If no times are left, or the tilt is convex, the checks raise an error later.
            usable = (early or late) and (steps == 1 or start < end)
            return jnp.append(jnp.linspace(start, end, steps), 1.0) if usable else times

    def grid_at(self, network_times: _checks.Numbers) -> Array:
        """The grid, for `sample(..., times=)`, on which the network is called exactly at the given
        times of its own interpolant.

        Use it for networks that accept only certain noise levels:
        `model.grid_at(interpolant.clock(levels))` with a `DiscreteVP`. The grid consists of the
        times at which `snr_t + added` is the network's snr, and of 1 at the end, the jump to the
        denoiser.

        **Arguments:** `network_times`, increasing, below 1. **Raises:** `ValueError` for times at
        which this model never calls its network.
        """
        network_times = _checks.finite(network_times, "network_times", 1)
        times, snr, lowest, earliest = _own_times(self, network_times)
        if _checks.concrete(times):
            never = (np.asarray(snr) < (1 - _ROUNDING) * np.asarray(lowest)) | (
                np.asarray(network_times) >= 1
            )
            if np.any(never):
                raise ValueError(
                    f"network_times must lie in [{float(earliest):.6g}, 1), where the network's "
                    f"snr is at least {float(lowest):.4g} (grid_at appends the final 1), got "
                    f"{np.asarray(network_times)[never]}: leave these times out"
                )
        return jnp.append(times, jnp.ones((), times.dtype))

    def initial(self, key: Array, t: Array) -> Array:
        """The noise of a state at the first time `t` of a run: `sigma_t X_0`."""
        return self.interpolant.sigma(t) * jax.random.normal(key, self.shape, self.dtype)

    def start(self, t: Array, noise: Array, denoised: Array) -> Array:
        """`alpha_t D~_t(x) + sigma_t X_0` with `x = sigma_t X_0`, the `noise`, and `denoised`, the
        denoiser `D~_t(x)` that the run follows.

        The mean of `X_t` is `alpha_t E[X_1]`, which the noise alone lacks. The error of the mean
        and of the covariance is of order `alpha_t^2 Var X_1 / sigma_t^2`.
        """
        return noise + self.interpolant.alpha(t) * denoised

    def starts_denoised(self, t: Array) -> bool:
        """False if it is known that `alpha_t = 0`."""
        known = _checks.concrete((t, self.interpolant))
        return not known or start_of(self.interpolant, t, self.dtype)[0] != 0

    def initial_log_prob(self, t: Array, x: Array) -> Array:
        """The log-density at `x` of the law of `initial(key, t)`. **Raises:** `ValueError` if that
        law is not known.
        """
        if type(self).initial is not Model.initial:
            raise ValueError(
                f"{type(self).__name__} starts from a law of its own, whose density is not known: "
                "define its initial_log_prob"
            )
        sigma = self.interpolant.sigma(t)
        return jnp.sum(jax.scipy.stats.norm.logpdf(x / sigma) - jnp.log(sigma))


@eqx.filter_jit
def _spread(model: Model, solver: Solver, times: Array, width: Array) -> Array:
    """The standard deviation of samples of `N(0, width^2)`, in units of `width`: of a deterministic
    solver, the end of its run from one standard deviation of noise; of others, what a jump from the
    last state but one leaves.
    """
    model, solver, times, width = _pytree.cast((model, solver, times, width), model.dtype)
    interpolant, keys = model.interpolant, Streams(*jax.random.split(jax.random.key(0), 3))

    def shown(t: Array) -> Array:
        ratio = interpolant.snr(t) * width**2
        return ratio / (1 + ratio)

    def field(key: Array, t: Array, x: Array, state: Any) -> tuple[Array, Any]:
        return shown(t) / interpolant.alpha(t) * x, state

    if solver.stochastic:
        return jnp.sqrt(shown(times[-2]))

    def advance(x: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        t, u = ends
        return solver.step(keys, interpolant, field, t, u, x, ())[0], None

    start = interpolant.sigma(times[0])
    end, _ = jax.lax.scan(advance, start, (times[:-1], times[1:]))
    return end / width


@eqx.filter_jit
def _network_snr(model: Model, times: Array) -> tuple[Array, ...]:
    """The snr at which the network is called, the range on which it was trained, and that range in
    times of the model.
    """
    model, times = _pytree.cast((model, times), model.dtype)
    own, (interpolant, added) = model.interpolant, model.network_query()
    lowest, highest = interpolant.snr_range()
    return (
        jax.vmap(own.snr)(times) + added,
        lowest,
        highest,
        own.time(jnp.maximum(lowest - added, 0)),
        own.time(jnp.maximum(highest - added, 0)),
    )


@eqx.filter_jit
def _own_times(model: Model, network_times: Array) -> tuple[Array, ...]:
    """The model's times for the times of its network, the snr of these times, the smallest snr at
    which the model calls the network, and the network's time at this snr.
    """
    model, network_times = _pytree.cast((model, network_times), model.dtype)
    own, (interpolant, added) = model.interpolant, model.network_query()
    start = own.snr(jnp.zeros((), network_times.dtype))
    snr = jax.vmap(interpolant.snr)(network_times)
    # Rounding may put a level that is the start slightly before the start.
    times = jnp.maximum(jax.vmap(own.time)(jnp.maximum(snr - added, start)), 0)
    return times, snr, start + added, interpolant.time(start + added)


def check_mean(model: Any, how: str, name: str = "model") -> None:
    """Raise a `TypeError` for an object that is not a model, and a `ValueError` for a model whose
    output is not a posterior mean; `how` is a correct call.
    """
    _checks.instance(model, Model, name, how)
    if not model.is_mean:
        raise ValueError(
            f"{type(model).__name__} returns the end of a trajectory, not the posterior mean that "
            "this method needs: use sample, smc, fk_steering, dps, PlugIn(Tweedie(model), ...), "
            "best_of_n or softmax_of_n, or a model with a denoiser"
        )
