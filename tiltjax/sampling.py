r"""`sample`: follow a model, or a guided model, from noise to data.

    key --+-- start, i ---> x_0 = model.initial(key_i, t_0)                           one per particle
          +-- step, i ----> Streams(guidance, noise, second)                          three per particle and step, those that are used
    x_j --> guidance(key, t, x, state) -> Estimate.tilted = D~ --> solver.step --> x_{j+1}

Scan outside, vmap inside. A particle's randomness depends on its index and the key alone: more particles, other batches or
devices leave the first ones as they were.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import external, inputs
from tiltjax import progress as progress_bar
from tiltjax.guidance import Estimate, Guidance, check, check_start, failures
from tiltjax.models import Model
from tiltjax.particles import CULPRITS, Particles, Trace, as_tokens, unweighted
from tiltjax.solvers import Heun, Solver, Streams, Unmask


@external.failures()
def sample(
    key: Array,
    model: Model,
    guidance: Guidance | None = None,
    *,
    num: int,
    steps: int | None = None,
    solver: Solver | None = None,
    times: Array | None = None,
    batch: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    start: Array | None = None,
    save_path: bool = False,
    progress: bool = False,
) -> Particles:
    """`num` particles of `model`, tilted as far as `guidance` manages.

    **Arguments:**

    - `key`: a typed key, `jax.random.key(seed)`.
    - `model`: gives the interpolant, the state's shape and dtype and the starting law; without guidance, the denoiser.
    - `guidance`: gives the tilted denoiser. It must be built on the same model.
    - `steps` or `times`: equal steps on [1e-3, 1] (`model.grid`), by default as many as the solver names (100), or the increasing times
      themselves. A run that ends at t = 1 ends with a jump to the denoiser; one that ends earlier returns states at that time. Guided
      runs start at t > 0. For a network that knows certain noise levels only, `model.times` makes the grid.
    - `start`: states at `times[0]`, `(num, *shape)`, to continue from; without it a run starts from noise, and has to start
      where the state is all but noise.
    - `solver`: `Heun()` by default.
    - `batch`: how many particles are evaluated at once, if memory is short; the numbers stay the same to rounding.
    - `sharding`: a `jax.sharding.Sharding` of the particle axis, of a mesh whose axes are `Auto`; it has to divide `num`.
    - `save_path`: keep the states at all times in `trace.path`.
    - `progress`: show a bar.

    **Returns:** `Particles` with equal weights and `log_norm=None`.

    **Raises:** `ValueError` for times at which the network would be asked where it was not trained; `FloatingPointError` naming the first step with a NaN and its culprit (outside of `jit` only; inside,
    `particles.trace.bad` holds it).
    """
    key = inputs.typed_key(key)
    inputs.instance(model, Model, "model", "use Analytic, from_velocity, from_noise or from_denoiser")
    if guidance is not None:
        check(guidance, model)
    solver = fitting(model, solver, Heun())
    num, save_path = inputs.count(num, "num"), inputs.flag(save_path, "save_path")
    inputs.spread_over(sharding, (num, *model.shape), "num")
    batch = None if batch is None else min(inputs.count(batch, "batch"), num)
    if start is not None:
        if isinstance(start, Particles):
            raise TypeError("start takes states, an array, got Particles: pass particles.x")
        if times is None:
            raise ValueError("start needs times=, the first of which says when these states are")
        shape = (num, *model.shape)
        start = (
            as_tokens(start, "start", shape, model.denoised_shape[-1])
            if model.tokens
            else inputs.floating(start, "start")
        )
        if inputs.concrete(start) and not np.all(np.isfinite(inputs.held(start))):
            raise ValueError("start must be finite, got states with NaN or infinity")
        if start.shape != shape:
            raise ValueError(f"start must hold num states, shape {shape}, got {start.shape}")
    times = run_times(model, solver, steps, times, fresh=start is None)
    if guidance is not None:
        check_start(model, times)
        guidance.check_run(times)
    with progress_bar.bar("sampling", len(times) - 1, enabled=progress) as bar:
        particles = _sample(key, model, guidance, solver, times, start, bar, num, batch, sharding, save_path)
        if particles.trace is not None and inputs.concrete(particles):
            particles.trace.check()
    return particles


@eqx.filter_jit
def _sample(key, model, guidance, solver, times, start, bar, num, batch, sharding, save_path) -> Particles:
    model, guidance, solver, times, start = inputs.cast((model, guidance, solver, times, start), model.dtype)
    steps = len(times) - 1
    keys = jax.random.split(key, (steps + 1, 3))  # the first row is the start's
    over_particles = (
        jax.vmap if batch is None else lambda fn: lambda *args: jax.lax.map(lambda a: fn(*a), args, batch_size=batch)
    )
    indices = jnp.arange(num)

    initial = over_particles(lambda i: model.initial(jax.random.fold_in(keys[0, 0], i), times[0]))
    x = initial(indices) if start is None else start
    if sharding is not None:
        x = jax.lax.with_sharding_constraint(x, sharding)
    memory = jax.vmap(guidance.init)(x) if guidance is not None else ()

    def field(key: Array, t: Array, x: Array, state: Any) -> tuple[Array, Any]:
        memory, bad = state
        if guidance is None:
            estimate = Estimate(tilted=model.denoise(t, x))
        else:
            estimate, memory = guidance(key, t, x, memory)
        if estimate.tilted.shape != model.denoised_shape:
            raise ValueError(
                f"the guidance answers with shape {estimate.tilted.shape} for a state of shape {x.shape}: it must be built on "
                "the model that is sampled"
            )
        estimate = inputs.cast(estimate, model.dtype)
        # What follows a first failure in the same step is its consequence.
        return estimate.tilted, (memory, bad | (failures(x, estimate) & ~jnp.any(bad)))

    def advance(carry, scanned):
        x, memory = carry
        step, key_step, t, u = scanned

        def one(i: Array, x: Array, memory: Any) -> tuple[Array, Any, Array]:
            keys = Streams(*(jax.random.fold_in(stream, i) for stream in key_step))
            x, (memory, bad) = solver.step(
                keys, model.interpolant, field, t, u, x, (memory, jnp.zeros(len(CULPRITS), bool))
            )
            return x, memory, bad.at[3].set(~jnp.all(jnp.isfinite(x)))

        x, memory, bad = over_particles(one)(indices, x, memory)
        bar.tick(step)
        return (x, memory), (jnp.any(bad, axis=0), x if save_path else None)

    scanned = (jnp.arange(steps), keys[1:], times[:-1], times[1:])
    (end, _), (bad, path) = jax.lax.scan(advance, (x, memory), scanned)
    path = None if path is None else jnp.concatenate([x[None], path])
    return unweighted(end, Trace(times, bad, path))


def fitting(model: Model, solver: Solver | None, default: Solver) -> Solver:
    """The solver, or what is usual for states of this kind; one of the other kind is refused."""
    if solver is None:
        return Unmask() if model.tokens else default
    inputs.instance(solver, Solver, "solver", "such as tiltjax.Heun()")
    if model.tokens != isinstance(solver, Unmask):
        kind, remedy = ("tokens", "Unmask()") if model.tokens else ("numbers", f"{type(default).__name__}()")
        raise ValueError(
            f"the states of {type(model).__name__} are {kind}: {type(solver).__name__} moves others, use {remedy}"
        )
    return solver


def run_times(model: Model, solver: Solver, steps: int | None, times: Any, *, fresh: bool = True) -> Array:
    """The times of a run: those given, or the model's grid of so many steps, by default its own number of them or the solver's.

    **Raises:** `ValueError` where the network was not trained, and where a `fresh` run, one from noise, cannot start.
    """
    if times is None:
        usual = solver.steps if model.steps is None else model.steps
        times = model.grid(usual if steps is None else steps)
    else:
        times = inputs.time_grid(times, steps)
    if fresh:
        model.check_start(np.asarray(times)[0] if inputs.concrete(times) else times[0])
    model.check_times(times)
    return times
