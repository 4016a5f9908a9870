r"""`sample`: follow a model, or a guided model, from noise to data.

    key --+-- start, i ---> x_0 = alpha D~ + model.initial(key_i, t_0)      one per particle
          +-- step, i ----> Streams(guidance, noise, second)
              three per particle and step
    x_j --> guidance(key, t, x, state) -> Estimate.tilted = D~ --> solver.step --> x_{j+1}

The loop over steps is a scan, and the loop over particles inside it is a vmap. The randomness of a
particle depends only on its index and the key: more particles, other chunks or other devices do not
change the first particles.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _progress, _pytree, _sharding, grids
from tiltjax.guidance import Estimate, Guidance, check, failures
from tiltjax.mixtures import decomposed
from tiltjax.models import Denoiser
from tiltjax.particles import Failures, Particles, Trace, unweighted
from tiltjax.solvers import Heun, Solver, Streams

# Limits for data of unknown width: its fraction in the first state, and its width in units of the
# noise, at which the 100 equal steps of the default grid make a Gaussian 4% too narrow.
_MOST_DATA, _WIDEST = 0.1, 50.0
_USUAL_START = 0.999e-3  # up to rounding; a grid that starts earlier was made for such data


def sample(
    key: Array,
    model: Denoiser,
    guidance: Guidance | None = None,
    *,
    num: int,
    steps: int | None = None,
    solver: Solver | None = None,
    times: Array | None = None,
    chunk_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    start: Array | None = None,
    save_trajectory: bool = False,
    progress: bool = False,
) -> Particles:
    """`num` particles of `model`, tilted by `guidance`.

    **Arguments:**

    - `key`: a typed key, `jax.random.key(seed)`.
    - `model`: gives the interpolant, the shape and dtype of the state, the law of the start and,
      without guidance, the denoiser.
    - `guidance`: gives the tilted denoiser. It must be built on the same model.
    - `steps` or `times`: the number of equal steps on [1e-3, 1] (`model.grid`), or the increasing
      times themselves. The default number of steps depends on the solver (100 for most). A run that
      ends at t = 1 ends with a jump to the denoiser. A run that ends earlier returns states at that
      time. Guided runs start at t > 0. For a network with a table of noise levels, `model.grid_at`
      makes the grid.
    - `start`: states at `times[0]`, `(num, *shape)`, from which the run continues. Without `start`,
      a run starts at `alpha_t D~_t(x) + sigma_t X_0` with `x = sigma_t X_0`, at a time at which the
      state is almost pure noise. `D~` is the guided denoiser. For guidances that do not
      estimate the tilt's mean (`fmrg`, `Unscaled`, `Normalized`), it is the unguided denoiser.
    - `solver`: `Heun()` by default.
    - `chunk_size`: the number of particles that are evaluated at once, to save memory. The results
      agree to rounding.
    - `sharding`: a `jax.sharding.Sharding` of the particle axis, on a mesh with `Auto` axes.
      `num` must be a multiple of the number of shards.
    - `save_trajectory`: store the states at all times in `trace.trajectory`.
    - `progress`: show a progress bar.

    **Returns:** `Particles` with equal weights and `log_norm=None`.

    **Raises:** `ValueError` for times at which the network was not trained, and for a default grid
    that is too coarse for data of a known width much smaller than the noise; `FloatingPointError`
    that names the first step with a NaN and its cause, or says that the data is too wide for this
    start. Inside of `jit` no such error is raised: `particles.trace.failed` contains the failure.
    """
    key = _checks.key(key)
    save_trajectory = _checks.flag(save_trajectory, "save_trajectory")
    run = check_run(
        model, guidance, num=num, steps=steps, times=times, solver=solver, usual_solver=Heun(),
        chunk_size=chunk_size, from_noise=start is None,
    )  # fmt: skip
    _sharding.check_divides(sharding, (run.num, *model.shape), "num")
    start = None if start is None else _check_start(start, model, run.num, times)
    from_noise = start is None and model.starts_denoised(first_time(run.times))
    checks = from_noise and model.width is None
    with _progress.bar("sampling", len(run.times) - 1, enabled=progress) as bar:
        particles = _sample(
            key, model, guidance, run.solver, run.times, start, bar, run.num, run.chunk_size,
            from_noise, checks, sharding, save_trajectory,
        )  # fmt: skip
        if particles.trace is not None and _checks.concrete(particles):
            particles.trace.check()
    return particles


@_callbacks.compiled
def _sample(
    key, model, guidance, solver, times, start, bar, num, chunk_size, from_noise, checks, sharding,
    save_trajectory,
) -> Particles:  # fmt: skip
    model, guidance, solver, times, start = decomposed(
        _pytree.cast((model, guidance, solver, times, start), model.dtype)
    )
    if start is None:
        start = initial_noise(noise_key(key), model, times[0], num, chunk_size)
    if sharding is not None:
        start = jax.lax.with_sharding_constraint(start, sharding)
    run = Walk(model, guidance, solver, times, chunk_size, from_noise, checks)
    x, (failed, states) = walk(key, run, start, bar, save_trajectory)
    return unweighted(x, Trace(times, failed, states))


class State(NamedTuple):
    """The state before a step: the states `x`, `(num, *shape)`, and the guidance's memory of each
    trajectory.
    """

    x: Array
    memory: Any


class Last(NamedTuple):
    """The denoisers of the last evaluation of a run: the one from which the run starts, and the
    `unguided` one, or the guided one if the guidance does not compute the other.
    """

    start: Array
    unguided: Array


class Walk(NamedTuple):
    """A run inside of a compiled program. `from_noise`: whether it begins at noise, which a step
    before all others turns into the first states. `checks_noise`: whether this step checks that
    these states, without guidance, are still noise.
    """

    model: Denoiser
    guidance: Guidance | None
    solver: Solver
    times: Array
    chunk_size: int | None
    from_noise: bool
    checks_noise: bool = False

    def init(self, x: Array) -> Any:
        """The memory of a trajectory that starts at `x`."""
        return () if self.guidance is None else self.guidance.init(x)

    def unknown(self) -> Last | None:
        """The denoisers before the first evaluation; `None` if the run does not start from them."""
        if not self.from_noise:
            return None
        zero = jnp.zeros(self.model.denoised_shape, self.model.dtype)
        return Last(zero, zero)


def walk(
    key: Array, run: Walk, x: Array, bar: _progress.Ticker, save_trajectory: bool
) -> tuple[Array, tuple[Failures, Array | None]]:
    """The states at the end, the failures of the steps, and the states at all times."""

    def advance(state: State, number: Array) -> tuple[State, tuple]:
        state, failed = _step(_streams(key, number), run, number, state)
        bar.tick(number)
        return state, (failed, state.x if save_trajectory else None)

    # The step before all others is part of the loop, so that the program contains the field once.
    numbers = jnp.arange(-run.from_noise, len(run.times) - 1)
    end, (failed, states) = jax.lax.scan(advance, State(x, jax.vmap(run.init)(x)), numbers)
    if run.from_noise:
        failed = started(failed)
    elif save_trajectory:
        states = jnp.concatenate([x[None], states])
    return end.x, (failed, states)


def _step(keys: Streams, run: Walk, number: Array, state: State) -> tuple[State, Failures]:
    """The states of all particles after a step, and the first failure of any particle. Step -1
    makes the first states from noise.
    """
    t, u = run.times[jnp.maximum(number, 0)], run.times[number + 1]
    field = functools.partial(_field, run)

    def move(i: Array, x: Array, memory: Any) -> tuple[Array, Any, Failures, Array | None]:
        streams = Streams(*(jax.random.fold_in(stream, i) for stream in keys))
        moved, (memory, failed, last) = run.solver.step(
            streams, run.model.corruption, field, t, u, x, (memory, Failures.none(), run.unknown())
        )
        unguided = None
        if last is not None:
            # A step of length zero only evaluates the field.
            first = run.model.start(t, x, last.start)
            unguided = run.model.start(t, x, last.unguided) if run.checks_noise else None
            moved, memory = jax.tree.map(
                lambda first, moved: jnp.where(number < 0, first, moved),
                (first, run.init(first)),
                (moved, memory),
            )
        failed = failed.then(Failures.of(state=~jnp.all(jnp.isfinite(moved))))
        return moved, memory, failed, unguided

    indices = jnp.arange(len(state.x))
    x, memory, failed, unguided = map_particles(move, run.chunk_size)(
        indices, state.x, state.memory
    )
    failed = failed.first()
    if unguided is not None:
        failed = failed.then(check_noise(number < 0, run.model.corruption, t, state.x, unguided))
    return State(x, memory), failed


def _field(
    run: Walk, key: Array, t: Array, x: Array, state: tuple[Any, Failures, Last | None]
) -> tuple[Array, tuple[Any, Failures, Last | None]]:
    """The denoiser of a run: guided if there is a guidance, else the denoiser of the model. The
    state also holds the last denoisers, for the start of a run.
    """
    memory, failed, last = state
    estimate, memory = evaluate(run.model, run.guidance, key, t, x, memory)
    if last is not None:
        unguided = estimate.tilted if estimate.denoised is None else estimate.denoised
        guided = run.guidance is None or run.guidance.guides_start
        last = Last(estimate.tilted if guided else unguided, unguided)
    return estimate.tilted, (memory, failed.then(failures(x, estimate)), last)


def check_noise(begins: Array, interpolant: Any, t: Array, noise: Array, x: Array) -> Failures:
    """A failure of a step that `begins` a run at t, from `noise` to `x`, if the data is so wide
    that the state is not noise, or that equal steps are too long.
    """
    ratio = interpolant.alpha(t) / interpolant.sigma(t) * interpolant.data_scale()
    widest = jnp.where(t < _USUAL_START, jnp.inf, _WIDEST)
    most = jnp.minimum(_MOST_DATA, (widest * ratio) ** 2)

    def slope() -> Array:
        """That of the regression of the data on the noise, over particles and coordinates. It is
        the fraction of data in a Gaussian state.
        """
        data = x - noise
        return jnp.sum(noise * (data - jnp.mean(data, axis=0, keepdims=True))) / jnp.sum(noise**2)

    if len(x) == 1:
        return Failures.none()
    return Failures.of(start=jax.lax.cond(begins, lambda: slope() > most, lambda: False))


def started(failed: Failures) -> Failures:
    """The failures of the steps. A failure before the first step counts as one of it."""
    before, numbers = Failures(failed.number[0]), failed.number[1:]
    return Failures(numbers.at[0].set(before.then(Failures(numbers[0])).number))


def evaluate(
    model: Denoiser, guidance: Guidance | None, key: Array, t: Array, x: Array, memory: Any
) -> tuple[Estimate, Any]:
    """The estimate of a guidance, or the denoiser alone, in the dtype of the model; and the new
    memory.
    """
    if guidance is None:
        estimate = Estimate(tilted=model.denoise(t, x))
    else:
        estimate, memory = guidance(key, t, x, memory)
    if estimate.tilted.shape != model.denoised_shape:
        raise ValueError(
            f"the guidance returns a denoiser of shape {estimate.tilted.shape} for a state of "
            f"shape {x.shape}: build it on the model that you sample"
        )
    return _pytree.cast(estimate, model.dtype), memory


def initial_noise(key: Array, model: Denoiser, t: Array, num: int, chunk_size: int | None) -> Array:
    """The noise of the first states of a run, `(num, *shape)`."""
    initial = lambda i: model.initial(jax.random.fold_in(key, i), t)
    return map_particles(initial, chunk_size)(jnp.arange(num))


def map_particles(fn: Callable, chunk_size: int | None) -> Callable:
    """`fn` of one particle as a function of all particles: of all at once, or of `chunk_size` at a
    time.
    """
    if chunk_size is None:
        return jax.vmap(fn)
    return lambda *args: jax.lax.map(lambda one: fn(*one), args, batch_size=chunk_size)


def noise_key(key: Array) -> Array:
    """The key of the noise of all first states. The index i is folded in for particle i."""
    return jax.random.fold_in(key, 0)


def _streams(key: Array, number: Array) -> Streams:
    """The keys of a step. Hashing them one by one in the loop compiles faster than hashing all at
    once.
    """
    first = jnp.where(number < 0, -3, 3 * (number + 1))
    return Streams(*(jax.random.fold_in(key, first + stream) for stream in range(3)))


class Run(NamedTuple):
    """The settings that all runs share, checked and complete."""

    solver: Solver
    times: Array
    num: int
    chunk_size: int | None


def check_run(
    model: Denoiser,
    guidance: Guidance | None,
    *,
    num: int,
    steps: int | None,
    times: Any,
    solver: Solver | None,
    usual_solver: Solver,
    chunk_size: int | None,
    from_noise: bool = True,
    weighted: bool = False,
    twist: Guidance | None = None,
) -> Run:
    """The checked `Run` of a function's arguments. `weighted` is true if the noise of the steps is
    weighed.

    **Raises:** `TypeError`, `ValueError` for arguments that do not match.
    """
    _checks.instance(
        model, Denoiser, "model", "use Analytic, from_velocity, from_noise or from_denoiser"
    )
    guidances = {"guidance": guidance, "twist": twist}
    guidances = {name: one for name, one in guidances.items() if one is not None}
    for name, one in guidances.items():
        check(one, model, name)
    solver = _resolve_solver(model, solver, usual_solver)
    num = _checks.count(num, "num")
    if chunk_size is not None:
        chunk_size = min(_checks.count(chunk_size, "chunk_size"), num)
    times = resolve_times(model, solver, steps, times, from_noise=from_noise)
    if guidances:
        model.check_guided_start(first_time(times))
    for one in guidances.values():
        one.check_run(times, solver if weighted else None)
    return Run(solver, times, num, chunk_size)


def _resolve_solver(model: Denoiser, solver: Solver | None, usual: Solver) -> Solver:
    """The solver of a run, by default the solver for the model's states. **Raises:** `ValueError`
    for a solver of another corruption.
    """
    default = model.default_solver(usual)
    if solver is None:
        return default
    _checks.instance(solver, Solver, "solver", "such as tiltjax.Heun()")
    if not isinstance(model.corruption, solver.corruption):
        raise ValueError(
            f"{type(solver).__name__} is a solver for {solver.corruption.__name__}, but "
            f"{type(model).__name__} has {type(model.corruption).__name__}: use "
            f"{type(default).__name__}()"
        )
    model.check_solver(solver)
    return solver


def resolve_times(
    model: Denoiser, solver: Solver, steps: int | None, times: Any, *, from_noise: bool = True
) -> Array:
    """The times of a run: `times`, or the model's grid of `steps` steps. The default number of
    steps is that of the model, or else that of the solver.

    **Raises:** `ValueError` for times at which the network was not trained, for a first time at
    which a run `from_noise` cannot start, and for steps too long for narrow data.
    """
    if times is None:
        usual = solver.steps if model.steps is None else model.steps
        times = model.grid(usual if steps is None else steps)
        model.check_grid(solver, times)
    else:
        times = grids.time_grid(times, steps)
    if from_noise:
        model.check_start(first_time(times))
    model.check_times(times)
    return times


def first_time(times: Array) -> Array:
    """The first time of a run, as a NumPy number if possible, because JAX would trace an operation
    inside the caller's `jit`.
    """
    return np.asarray(times)[0] if _checks.concrete(times) else times[0]


def _check_start(start: Any, model: Denoiser, num: int, times: Any) -> Array:
    if isinstance(start, Particles):
        raise TypeError("start must be an array of states, got Particles: pass particles.x")
    if times is None:
        raise ValueError("start needs times=, got None: pass times that begin at the time of start")
    return model.as_states(start, "start", (num,))
