r"""`sample`: follow a model, or a guided model, from noise to data.

    key --+-- start, i ---> x_0 = model.initial(key_i, t_0)      one per particle
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
      a run starts from noise, at a time at which the state is almost pure noise.
    - `solver`: `Heun()` by default.
    - `chunk_size`: the number of particles that are evaluated at once, to save memory. The results
      agree to rounding.
    - `sharding`: a `jax.sharding.Sharding` of the particle axis, on a mesh with `Auto` axes. It
      must divide `num`.
    - `save_trajectory`: store the states at all times in `trace.trajectory`.
    - `progress`: show a progress bar.

    **Returns:** `Particles` with equal weights and `log_norm=None`.

    **Raises:** `ValueError` for times at which the network was not trained; `FloatingPointError`
    that names the first step with a NaN and its cause (only outside of `jit`; inside,
    `particles.trace.failed` contains it).
    """
    key = _checks.key(key)
    save_trajectory = _checks.flag(save_trajectory, "save_trajectory")
    run = check_run(
        model, guidance, num=num, steps=steps, times=times, solver=solver, usual_solver=Heun(),
        chunk_size=chunk_size, from_noise=start is None,
    )  # fmt: skip
    _sharding.check_divides(sharding, (run.num, *model.shape), "num")
    start = None if start is None else _check_start(start, model, run.num, times)
    with _progress.bar("sampling", len(run.times) - 1, enabled=progress) as bar:
        particles = _sample(
            key, model, guidance, run.solver, run.times, start, bar, run.num, run.chunk_size,
            sharding, save_trajectory,
        )  # fmt: skip
        if particles.trace is not None and _checks.concrete(particles):
            particles.trace.check()
    return particles


class State(NamedTuple):
    """The state before a step: the states `x`, `(num, *shape)`, and the guidance's memory of each
    trajectory.
    """

    x: Array
    memory: Any


@_callbacks.compiled
def _sample(
    key, model, guidance, solver, times, start, bar, num, chunk_size, sharding, save_trajectory
) -> Particles:
    model, guidance, solver, times, start = decomposed(
        _pytree.cast((model, guidance, solver, times, start), model.dtype)
    )
    step = functools.partial(_step, model, guidance, solver, chunk_size)

    def advance(state: State, row: tuple) -> tuple[State, tuple]:
        number, t, u = row
        state, failed = step(_streams(key, number), t, u, state)
        bar.tick(number)
        return state, (failed, state.x if save_trajectory else None)

    x = initial_states(start_key(key), model, times[0], num, chunk_size) if start is None else start
    state = _start(x, guidance, sharding)
    rows = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    end, (failed, states) = jax.lax.scan(advance, state, rows)
    trajectory = None if states is None else jnp.concatenate([state.x[None], states])
    return unweighted(end.x, Trace(times, failed, trajectory))


def _start(x: Array, guidance: Guidance | None, sharding: jax.sharding.Sharding | None) -> State:
    """The state of a run that starts at `x`."""
    if sharding is not None:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return State(x, () if guidance is None else jax.vmap(guidance.init)(x))


def _step(
    model: Denoiser,
    guidance: Guidance | None,
    solver: Solver,
    chunk_size: int | None,
    keys: Streams,
    t: Array,
    u: Array,
    state: State,
) -> tuple[State, Failures]:
    """The state at time u of all particles, from the state at time t, and the first failure of any
    particle.
    """
    field = functools.partial(_field, model, guidance)

    def move(i: Array, x: Array, memory: Any) -> tuple[Array, Any, Failures]:
        streams = Streams(*(jax.random.fold_in(stream, i) for stream in keys))
        x, (memory, failed) = solver.step(
            streams, model.corruption, field, t, u, x, (memory, Failures.none())
        )
        return x, memory, failed.then(Failures.of(state=~jnp.all(jnp.isfinite(x))))

    indices = jnp.arange(len(state.x))
    x, memory, failed = map_particles(move, chunk_size)(indices, state.x, state.memory)
    return State(x, memory), failed.first()


def _field(
    model: Denoiser,
    guidance: Guidance | None,
    key: Array,
    t: Array,
    x: Array,
    state: tuple[Any, Failures],
) -> tuple[Array, tuple[Any, Failures]]:
    """The denoiser of a run: guided if there is a guidance, else the denoiser of the model."""
    memory, failed = state
    estimate, memory = evaluate(model, guidance, key, t, x, memory)
    return estimate.tilted, (memory, failed.then(failures(x, estimate)))


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


def initial_states(
    key: Array, model: Denoiser, t: Array, num: int, chunk_size: int | None
) -> Array:
    """The starting states of a run, `(num, *shape)`."""
    initial = lambda i: model.initial(jax.random.fold_in(key, i), t)
    return map_particles(initial, chunk_size)(jnp.arange(num))


def map_particles(fn: Callable, chunk_size: int | None) -> Callable:
    """`fn` of one particle as a function of all particles: of all at once, or of `chunk_size` at a
    time.
    """
    if chunk_size is None:
        return jax.vmap(fn)
    return lambda *args: jax.lax.map(lambda one: fn(*one), args, batch_size=chunk_size)


def start_key(key: Array) -> Array:
    """The key of all starting states. The index i is folded in for particle i."""
    return jax.random.fold_in(key, 0)


def _streams(key: Array, number: Array) -> Streams:
    """The keys of a step. Hashing them one by one in the loop compiles faster than hashing all at
    once.
    """
    first = 3 * (number + 1)
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
        model.check_guided_start(_first(times))
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
    return solver


def resolve_times(
    model: Denoiser, solver: Solver, steps: int | None, times: Any, *, from_noise: bool = True
) -> Array:
    """The times of a run: `times`, or the model's grid of `steps` steps. The default number of
    steps is that of the model, or else that of the solver.

    **Raises:** `ValueError` for times at which the network was not trained, and for a first time at
    which a run `from_noise` cannot start.
    """
    if times is None:
        usual = solver.steps if model.steps is None else model.steps
        times = model.grid(usual if steps is None else steps)
    else:
        times = grids.time_grid(times, steps)
    if from_noise:
        model.check_start(_first(times))
    model.check_times(times)
    return times


def _first(times: Array) -> Array:
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
