r"""`sample`: follow a model, or a guided model, from noise to data.

    key --+-- start, i ---> x_0 = model.initial(key_i, t_0)      one per particle
          +-- step, i ----> Streams(guidance, noise, second)
              three per particle and step, those that are used
    x_j --> guidance(key, t, x, state) -> Estimate.tilted = D~ --> solver.step --> x_{j+1}

Scan outside, vmap inside. A particle's randomness depends on its index and the key alone: more
particles, other batches or devices leave the first ones as they were.
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
    """`num` particles of `model`, tilted as far as `guidance` manages.

    **Arguments:**

    - `key`: a typed key, `jax.random.key(seed)`.
    - `model`: gives the interpolant, the state's shape and dtype and the starting law; without
      guidance, the denoiser.
    - `guidance`: gives the tilted denoiser. It must be built on the same model.
    - `steps` or `times`: equal steps on [1e-3, 1] (`model.grid`), by default as many as the solver
      names (100), or the increasing times themselves. A run that ends at t = 1 ends with a jump to
      the denoiser; one that ends earlier returns states at that time. Guided runs start at t > 0.
      For a network that knows certain noise levels only, `model.grid_at` makes the grid.
    - `start`: states at `times[0]`, `(num, *shape)`, to continue from; without it a run starts from
      noise, and has to start where the state is all but noise.
    - `solver`: `Heun()` by default.
    - `chunk_size`: how many particles are evaluated at once, if memory is short; the numbers stay
      the same to rounding.
    - `sharding`: a `jax.sharding.Sharding` of the particle axis, of a mesh whose axes are `Auto`;
      it has to divide `num`.
    - `save_trajectory`: keep the states at all times in `trace.trajectory`.
    - `progress`: show a bar.

    **Returns:** `Particles` with equal weights and `log_norm=None`.

    **Raises:** `ValueError` for times at which the network would be asked where it was not trained;
    `FloatingPointError` naming the first step with a NaN and its cause (outside of `jit` only;
    inside, `particles.trace.failed` holds it).
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
    """What a step starts from: the states `x`, `(num, *shape)`, and the memory of the guidance
    along each trajectory.
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
    """The state of a run that starts from `x`."""
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
    """All particles from time t to u, and what failed first for any of them."""
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
    """The denoiser that a run follows, guided where it is guided."""
    memory, failed = state
    estimate, memory = evaluate(model, guidance, key, t, x, memory)
    return estimate.tilted, (memory, failed.then(failures(x, estimate)))


def evaluate(
    model: Denoiser, guidance: Guidance | None, key: Array, t: Array, x: Array, memory: Any
) -> tuple[Estimate, Any]:
    """The estimate of a guidance, or the denoiser alone, in the dtype of the model; the memory."""
    if guidance is None:
        estimate = Estimate(tilted=model.denoise(t, x))
    else:
        estimate, memory = guidance(key, t, x, memory)
    if estimate.tilted.shape != model.denoised_shape:
        raise ValueError(
            f"the guidance returns a denoiser of shape {estimate.tilted.shape} for a state of "
            f"shape {x.shape}: build it on the model that is sampled"
        )
    return _pytree.cast(estimate, model.dtype), memory


def initial_states(
    key: Array, model: Denoiser, t: Array, num: int, chunk_size: int | None
) -> Array:
    """The starting states of a run, `(num, *shape)`."""
    initial = lambda i: model.initial(jax.random.fold_in(key, i), t)
    return map_particles(initial, chunk_size)(jnp.arange(num))


def map_particles(fn: Callable, chunk_size: int | None) -> Callable:
    """`fn` of one particle as a function of all: at once, or `chunk_size` at a time."""
    if chunk_size is None:
        return jax.vmap(fn)
    return lambda *args: jax.lax.map(lambda one: fn(*one), args, batch_size=chunk_size)


def start_key(key: Array) -> Array:
    """The key of all starting states; that of particle i is folded in."""
    return jax.random.fold_in(key, 0)


def _streams(key: Array, number: Array) -> Streams:
    """The keys of a step: hashed one by one in the loop, which compiles faster than all at once."""
    first = 3 * (number + 1)
    return Streams(*(jax.random.fold_in(key, first + stream) for stream in range(3)))


class Run(NamedTuple):
    """The settings that all runs have in common, checked and complete."""

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
    """The `Run` of a verb's arguments; `weighted` says that the noise of its steps is weighed.

    **Raises:** `TypeError`, `ValueError` for arguments that do not fit together.
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
    """The solver of a run, by default that of the model's states. **Raises:** `ValueError` for one
    that reverses another corruption.
    """
    default = model.default_solver(usual)
    if solver is None:
        return default
    _checks.instance(solver, Solver, "solver", "such as tiltjax.Heun()")
    if not isinstance(model.corruption, solver.corruption):
        raise ValueError(
            f"{type(solver).__name__} is a solver for {solver.corruption.__name__}, and "
            f"{type(model).__name__} has {type(model.corruption).__name__}: use "
            f"{type(default).__name__}()"
        )
    return solver


def resolve_times(
    model: Denoiser, solver: Solver, steps: int | None, times: Any, *, from_noise: bool = True
) -> Array:
    """The times of a run: `times`, or the model's grid of so many steps, by default the number of
    steps of the model or of the solver.

    **Raises:** `ValueError` where the network was not trained, and where a run `from_noise` cannot
    start.
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
    """The first time of a run, as a NumPy number where possible: inside of someone's `jit` an
    operation of JAX would be traced.
    """
    return np.asarray(times)[0] if _checks.concrete(times) else times[0]


def _check_start(start: Any, model: Denoiser, num: int, times: Any) -> Array:
    if isinstance(start, Particles):
        raise TypeError("start takes states, an array, got Particles: pass particles.x")
    if times is None:
        raise ValueError("start needs times=, the first of which is the time of these states")
    return model.as_states(start, "start", (num,))
