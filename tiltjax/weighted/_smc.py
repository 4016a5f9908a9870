r"""`smc`: the guided sampler with weights, exact for any guidance as the number of particles grows.

    propose    x_u from the shifted kernel q, and log p/q
    look       D, D~ - D and the twist V_u at x_u
    weigh      log w += log p/q + A_u - A_t
    resample   if the weights are uneven

The base chain takes the steps of `Ancestral(eta)`. Its last step is a jump to the unguided
denoiser, because a jump has no noise to weigh. With `Z_N = E[exp(scale * r(x_N))]` of this chain,
and N the number of steps,

    E[exp(log_norm)] = Z_N
        for any number of particles, guidance, twist, potential, tempering and resampling,

and weighted means tend to those of the chain's tilt as the number of particles grows. Exactness
alone is not useful: the number of particles that is enough depends on the guidance. A score of
length 1 from t = .001 on (`Normalized`) moves each particle by 21 standard deviations of the first
step's noise. `log_norm` is then -176 in a run of 500 particles where -3.8 is right, because the
mean of Z comes from very rare runs. Without resampling (`ess_threshold=0`), the effective sample
size (`ess`) at the end measures the quality of a guidance. After resampling, all particles may
share an error that `ess` does not show. A derivative of a run holds the ancestors constant, so it
is the derivative of `log_norm` only without resampling.

The parts of a run are in `tiltjax.weighted.proposals`, `tiltjax.weighted.potentials`,
`tiltjax.weighted.tempering` and `tiltjax.resampling`.

The loop can be written by hand, to record, to stop early, or to add a move:

    run = SMC(model, guidance, num=1000, steps=50)
    keys = run.keys(key)
    state, info = init(keys[0], run)
    for keys_step in keys[1:-1]:
        state, info = step(keys_step, run, state)
    particles = finish(keys[-1], run, state)      # those of smc(key, model, guidance, ...)
"""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import (
    _callbacks,
    _checks,
    _progress,
    _pytree,
    _random,
    _repr,
    _sharding,
    resampling,
)
from tiltjax.guidance import Estimate, Guidance, failures
from tiltjax.mixtures import decomposed
from tiltjax.models import Denoiser
from tiltjax.particles import Failures, Particles, Trace, effective, weight_dtype
from tiltjax.samplers import (
    check_noise,
    check_run,
    evaluate,
    first_time,
    initial_noise,
    map_particles,
    started,
)
from tiltjax.solvers import Ancestral, Solver
from tiltjax.weighted.potentials import Difference, Potential, ResampleSchedule, Schedule
from tiltjax.weighted.proposals import Guided, Proposal
from tiltjax.weighted.tempering import AdaptiveTempering, Tempering

_FEW = 0.05  # the fraction of the particles below which an effective sample size is worth a warning
_FAR = 3.0  # standard deviations of a step's noise, beyond which a move leaves few even weights
_UNDONE = 10.0  # the change of log Z in the last step, beyond a constant, worth a warning


class Particle(NamedTuple):
    """Everything that a particle inherits from its ancestor; leaves have a leading axis of `num`.

    - `x`; `denoised`, `shift`: D and `D~ - D` at x; `log_h`: the twist at x.
    - `applied`, `history`: the sum of the log-potentials so far, and the memory of the potential.
    - `memory`: the memories of the guidance and of the twist.
    - `root`: the index of the particle's ancestor at the start.
    """

    x: Array
    denoised: Array
    shift: Array
    log_h: Array
    applied: Array
    history: Any
    memory: Any
    root: Array


class State(NamedTuple):
    """Weighted particles before step `number`: `log_weights` `(num,)`; `log_norm`, the part from
    earlier resampling; and `tempering`, the factor of the guidance's shift.
    """

    number: Array
    particles: Particle
    log_weights: Array
    log_norm: Array
    tempering: Array


class Info(NamedTuple):
    """Diagnostics of a step: the failure `failed`; the effective sample size `ess` before
    resampling; the factor `tempering` of the twist; and whether the particles were `resampled`.
    """

    failed: Failures
    ess: Array
    tempering: Array
    resampled: Array


class _Step(NamedTuple):
    """One step from t to u, whether it `weighs`, and the factor of the twist. Step -2 evaluates the
    noise, and step -1 evaluates the start.
    """

    number: Array
    t: Array
    u: Array
    weighs: Array
    tempering: Array


class SMC(_repr.Report):
    """A weighted run, checked and complete: the input of `init`, `step` and `finish`.

    **Arguments:** the arguments of `smc`, except for the key and `progress`. **Raises:** as `smc`.

    `steps` is the number of steps; `times` are their times, `(steps + 1,)`.
    """

    model: Denoiser
    guidance: Guidance
    twist: Guidance | None
    proposal: Proposal
    potential: Potential
    tempering: Tempering | None
    solver: Any  # a Stochastic solver
    times: Array
    factors: Array
    weighs: tuple[bool, ...] = eqx.field(static=True)
    resample: resampling.Resampler = eqx.field(static=True)
    ess_threshold: float = eqx.field(static=True)
    num: int = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)
    sharding: jax.sharding.Sharding | None = eqx.field(static=True)
    first: int = eqx.field(static=True)  # the number of the first step, which evaluates the noise
    checks_noise: bool = eqx.field(static=True)

    def __init__(
        self,
        model: Denoiser,
        guidance: Guidance,
        *,
        num: int,
        steps: int | None = None,
        times: Array | None = None,
        twist: Guidance | None = None,
        proposal: Proposal | None = None,
        potential: Potential | None = None,
        tempering: Tempering | None = None,
        resample: resampling.Resampler = resampling.systematic,
        schedule: Schedule | None = None,
        ess_threshold: float = 0.5,
        solver: Solver | None = None,
        chunk_size: int | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ):
        self.proposal = Guided() if proposal is None else proposal
        self.potential = Difference() if potential is None else potential
        schedule = ResampleSchedule() if schedule is None else schedule
        _checks.instance(self.proposal, Proposal, "proposal", "such as proposals.Guided()")
        _checks.instance(self.potential, Potential, "potential", "such as potentials.Difference()")
        _checks.instance(schedule, Schedule, "schedule", "use ResampleSchedule(n, start, stop)")
        _checks.instance(guidance, Guidance, "guidance", "such as dps(model, reward, scale)")
        _checks.function(resample, "resample")
        self.ess_threshold = _checks.number(ess_threshold, "ess_threshold", 0, 1)
        _check_noise(solver)
        run = check_run(
            model, guidance, num=num, steps=steps, times=times, solver=solver,
            usual_solver=Ancestral(), chunk_size=chunk_size, weighted=True, twist=twist,
        )  # fmt: skip
        _sharding.check_divides(sharding, (run.num,), "num")  # weights have only the particle axis
        _check_end(run.times)
        self.solver, self.times, self.num, self.chunk_size = run
        self.model, self.guidance, self.twist = model, guidance, twist
        self.first = -2 if model.starts_denoised(first_time(self.times)) else -1
        self.checks_noise = self.first < -1 and model.width is None
        self.resample, self.sharding = resample, sharding
        weighs = self.ess_threshold > 0 or self.proposal.num_children > 1
        self.weighs = tuple(
            (schedule.steps(self.steps) if weighs else np.zeros(self.steps, bool)).tolist()
        )
        self.tempering = tempering
        if tempering is not None:
            _check_tempering(tempering, self.proposal, self.potential, self.ess_threshold)
        self.factors = jnp.ones(self.steps)
        if tempering is not None and not isinstance(tempering, AdaptiveTempering):
            self.factors = tempering.factors(self.steps)
        if self.proposal.guided:
            _check_first_move(self)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def _title(self) -> str:
        return f"SMC: {self.num} particles, {self.steps} steps, t = {_repr.span(self.times)}"

    def _rows(self) -> dict[str, str]:
        names = ("model", "guidance", "twist", "proposal", "potential", "tempering", "solver")
        parts = {name: getattr(self, name) for name in names}
        rows = {name: _repr.form(part) for name, part in parts.items() if part is not None}
        rows["resampling"] = (
            f"{_repr.form(self.resample)}, below {self.ess_threshold:.0%} effective sample size, "
            f"after {sum(self.weighs)} of {self.steps} steps"
        )
        return rows

    @property
    def proposing(self) -> Guidance | None:
        """The guidance, if it is evaluated at every state: if it proposes, or needs every state."""
        evaluated = self.proposal.guided or self.guidance.needs_every_state
        return self.guidance if evaluated else None

    @property
    def twisting(self) -> Guidance | None:
        """The guidance that is evaluated only for the twist: `twist`, or a guidance that does not
        propose. A guidance that is evaluated at every state is its own twist.
        """
        return self.guidance if self.twist is None and self.proposing is None else self.twist

    def memory(self, x: Array) -> tuple[Any, Any]:
        """The memories of the guidance and of the twist of a trajectory that starts at `x`."""
        return self.guidance.init(x), () if self.twisting is None else self.twisting.init(x)

    @property
    def log_dtype(self) -> Any:
        """The dtype of the log-weights."""
        return weight_dtype(self.model.dtype)

    def keys(self, key: Array) -> Array:
        """The keys of all steps, `(steps + 1, 2)`, with one column for the particles and one for
        resampling. The first row is for `init`, the last for `finish`.
        """
        return jax.random.split(_checks.key(key), (self.steps + 1, 2))

    def _ready(self) -> "SMC":
        """The run in the dtype of the model, for use inside one compiled program."""
        return decomposed(_pytree.cast(self, self.model.dtype))

    def _step(self, number: Array) -> _Step:
        moves = number >= 0
        before = jnp.ones_like if self.tempering is None else jnp.zeros_like
        here = jnp.maximum(number, 0)
        return _Step(
            number,
            self.times[here],
            self.times[jnp.maximum(number + 1, 0)],
            moves & jnp.asarray(self.weighs)[here],
            jnp.where(moves, self.factors[here], before(self.factors[0])),
        )


def smc(
    key: Array,
    model: Denoiser,
    guidance: Guidance,
    *,
    num: int,
    steps: int | None = None,
    times: Array | None = None,
    twist: Guidance | None = None,
    proposal: Proposal | None = None,
    potential: Potential | None = None,
    tempering: Tempering | None = None,
    resample: resampling.Resampler = resampling.systematic,
    schedule: Schedule | None = None,
    ess_threshold: float = 0.5,
    solver: Solver | None = None,
    chunk_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = False,
) -> Particles:
    """`num` weighted particles of the tilt, with an unbiased estimate of its normalizing constant.

    **Arguments:**

    - `key`, `model`, `num`, `steps` or `times`, `chunk_size`, `sharding`, `progress`: as in
      `sample`. The run must end at t = 1.
    - `guidance`: its shift proposes. Its `log_h` weighs, unless `twist`, another guidance of the
      same model, is passed.
    - `proposal`: `Guided()` by default; `Base()`, `Shifted()`, `Children(m)`.
    - `potential`: `Difference()` by default; `Max()`, `Sum()`, `Immediate()`.
    - `tempering`: none by default; `Exponential()`, `Polynomial()`, or
      `AdaptiveTempering()` with `ess_threshold=1`.
    - `resample`: a function of `tiltjax.resampling`.
    - `schedule`: the steps after which particles are weighed and may be resampled.
    - `ess_threshold`: the effective sample size below which particles are resampled, as a fraction
      of `num`. With 0 there is no resampling, and no twist is needed; with 1 there is resampling at
      every step of the schedule.
    - `solver`: `Ancestral(eta)` with eta > 0, because only noise can be weighed; eta = 1 for
      `Tuned`.

    **Returns:** `Particles` with `log_weights` and `log_norm`. `trace` contains the effective
    sample size, the tempering and whether particles were resampled after each step.
    `particles.interval(fn)` is a confidence interval, by the genealogy of the trace.

    **Raises:** `ValueError` for a deterministic solver, a guidance without `log_h` and no twist,
    and for thresholds, windows and temperings that do not match; `FloatingPointError` that names
    the first step with a NaN, or a step at which all weights are zero. Warns if the effective
    sample size at the end is below 5% of `num`, because estimates then depend on few particles; if
    the reward of the last step takes back what the twists promised, because particles were then
    resampled by wrong weights; and for a guidance that moves particles far at the first step.
    """
    key = _checks.key(key)
    run = SMC(
        model, guidance, num=num, steps=steps, times=times, twist=twist, proposal=proposal,
        potential=potential, tempering=tempering, resample=resample, schedule=schedule,
        ess_threshold=ess_threshold, solver=solver, chunk_size=chunk_size, sharding=sharding,
    )  # fmt: skip
    particles, change = simulate(key, run, progress)
    if _checks.concrete(particles):
        _warn(particles, change, run.potential)
    return particles


def simulate(key: Array, run: SMC, progress: bool) -> tuple[Particles, Array]:
    """The particles of a run, without a judgment of their weights, and the change of log Z in the
    last step beyond that of a constant twist. **Raises:** the run's failure.
    """
    with _progress.bar("weighing", run.steps, enabled=progress) as bar:
        particles, change = _smc(key, run, bar)
        if _checks.concrete(particles):
            assert particles.trace is not None
            particles.trace.check()
    return particles, change


@_callbacks.compiled
def init(keys: Array, run: SMC) -> tuple[State, Info]:
    """`num` particles at the start, evaluated there, with equal weights; `keys` is the first row of
    `run.keys(key)`. It raises no error; `info.failed` reports what was not finite.
    """
    run = run._ready()
    rows = jnp.broadcast_to(keys, (-run.first, *keys.shape))
    advance = lambda state, keys: _advance(keys, run, state)
    state, infos = jax.lax.scan(advance, _start(keys, run), rows)
    failed = functools.reduce(Failures.then, map(Failures, infos.failed.number))
    return state, jax.tree.map(lambda leaf: leaf[-1], infos)._replace(failed=failed)


def step(keys: Array, run: SMC, state: State) -> tuple[State, Info]:
    """The state after the next of the `run.steps - 1` steps with a kernel: propose, look, weigh,
    resample.

    **Raises:** `ValueError` if only `finish` remains.
    """
    if _checks.concrete(state.number) and int(state.number) >= run.steps - 1:
        raise ValueError(f"all {run.steps - 1} steps with a kernel are done: call finish")
    return _another(keys, run, state)


@_callbacks.compiled
def finish(keys: Array, run: SMC, state: State) -> Particles:
    """Particles at t = 1, with a `trace` of the last step. This step jumps to the unguided
    denoiser, because a jump has no noise to weigh, and completes the potentials. An early `finish`
    ends a run on the times until then and 1.
    """
    particles, info, _ = _finish(keys[0], run._ready(), state)
    info = jax.tree.map(lambda leaf: leaf[None], info)
    times = jnp.stack([run.times[state.number], run.times[-1]])
    return _traced(particles, times, info, state.particles.root)


@_callbacks.compiled
def _another(keys: Array, run: SMC, state: State) -> tuple[State, Info]:
    return _advance(keys, run._ready(), state)


@_callbacks.compiled
def _smc(key: Array, run: SMC, bar: _progress.Ticker) -> tuple[Particles, Array]:
    run = run._ready()
    keys = run.keys(key)

    def advance(state: State, keys: Array) -> tuple[State, tuple[Info, Array]]:
        bar.tick(state.number)
        state, info = _advance(keys, run, state)
        return state, (info, jnp.mean(state.particles.log_h))

    # Steps that evaluate the noise and the start are part of the loop, so that the program contains
    # each guidance once.
    still = -run.first  # steps
    keys = jnp.concatenate([keys[:1]] * (still - 1) + [keys])
    state, (infos, twists) = jax.lax.scan(advance, _start(keys[0], run), keys[:-1])
    particles, last, change = _finish(keys[-1, 0], run, state)
    change = change - _constant_change(run, infos.tempering[still:], twists[still:])
    infos = jax.tree.map(lambda leaves, leaf: jnp.append(leaves, leaf), infos, last)
    failed = infos.failed
    for _ in range(still):
        failed = started(failed)
    infos = jax.tree.map(lambda leaves: leaves[still:], infos)
    infos = infos._replace(failed=failed)
    return _traced(particles, run.times, infos, state.particles.root), change


def _start(keys: Array, run: SMC) -> State:
    """Particles at the noise of the first time, before their first evaluation."""
    x = initial_noise(keys[1], run.model, run.times[0], run.num, run.chunk_size)

    def particle(i: Array, x: Array) -> Particle:
        unknown = jnp.zeros(run.model.denoised_shape, run.model.dtype)
        zero = jnp.zeros((), run.log_dtype)
        return Particle(x, unknown, unknown, zero, zero, run.potential.init(), run.memory(x), i)

    particles = jax.vmap(particle)(jnp.arange(run.num), x)
    if run.sharding is not None:
        particles = jax.lax.with_sharding_constraint(particles, run.sharding)
    zero = jnp.zeros((), run.log_dtype)
    weights, number = jnp.zeros(run.num, zero.dtype), jnp.asarray(run.first)
    return State(number, particles, weights, zero, run._step(number).tempering)


def _advance(keys: Array, run: SMC, state: State) -> tuple[State, Info]:
    key_particles, key_resample = keys
    step = run._step(state.number)

    def move(i: Array, particle: Particle) -> tuple[Particle, Array, Failures]:
        return propagate(particle_key(key_particles, i), run, step, state.tempering, particle)

    particles, log_ratio, failed = map_particles(move, run.chunk_size)(
        jnp.arange(run.num), state.particles
    )
    failed = failed.first()
    if run.checks_noise:
        failed = failed.then(
            check_noise(
                step.number == -1, run.model.corruption, step.t, state.particles.x, particles.x
            )
        )
    state = weigh(run, step, state._replace(particles=particles), log_ratio)
    state, ess, resampled = resample(key_resample, run, step, state)
    failed = failed.then(Failures.of(weights=~jnp.isfinite(ess)))
    info = Info(failed, ess, state.tempering, resampled)
    return state._replace(number=state.number + 1), info


def particle_key(key_step: Array, i: Array) -> Array:
    """The key of particle i in one step."""
    return jax.random.fold_in(key_step, i)


def propagate(
    key: Array, run: SMC, step: _Step, tempering: Array, particle: Particle
) -> tuple[Particle, Array, Failures]:
    """One particle after a step, `log p/q` of its move, and its failures. The particle takes
    `propose` and `look`, or a choice among several children that take them.
    """

    def child(key: Array) -> tuple[Particle, Array, Failures]:
        key_noise, *keys = jax.random.split(key, 3)
        x, log_ratio = propose(key_noise, run, step, tempering, particle)
        memory = jax.tree.map(
            lambda first, kept: jnp.where(step.number < 0, first, kept),
            run.memory(x),
            particle.memory,
        )
        moved, failed = look(keys, run, step, particle._replace(x=x, memory=memory))
        return moved, log_ratio, failed

    num = run.proposal.num_children
    if num == 1:
        return child(key)
    key_choice, *keys = jax.random.split(key, num + 1)
    children, log_ratio, failed = jax.vmap(child)(jnp.stack(keys))
    children = children._replace(log_h=counted(children.log_h))
    apply = lambda child: apply_potential(run.potential, step.weighs, child, step.tempering)[0]
    gain = log_ratio + jax.vmap(lambda child: increment(apply(child), child.applied))(children)
    chosen = _random.categorical(key_choice, gain)
    # `weigh` adds the gain of the chosen child, but the weight must change by the mean gain.
    mean = jax.nn.logsumexp(gain) - math.log(num)
    moved = jax.tree.map(lambda leaf: leaf[chosen], children)
    return moved, log_ratio[chosen] + mean - gain[chosen], failed.first()


def propose(
    key: Array, run: SMC, step: _Step, tempering: Array, particle: Particle
) -> tuple[Array, Array]:
    """A state drawn from the shifted kernel, and `log p/q` there. Step -2 keeps the noise, and step
    -1 turns it into the start of a run without guidance.
    """

    def move() -> tuple[Array, Array]:
        kernel = run.solver.kernel(run.model.corruption, step.t, step.u)
        shift = run.proposal.shift(kernel, tempering.astype(run.model.dtype) * particle.shift)
        x, log_ratio = kernel.propose(key, particle.x, particle.denoised, shift)
        return x, log_ratio.astype(run.log_dtype)

    def begin() -> tuple[Array, Array]:
        x = particle.x
        if run.first < -1:
            start = run.model.start(step.t, x, particle.denoised)
            x = jnp.where(step.number == -1, start, x)
        return x, jnp.zeros((), run.log_dtype)

    return jax.lax.cond(step.number < 0, begin, move)


def look(keys: list[Array], run: SMC, step: _Step, particle: Particle) -> tuple[Particle, Failures]:
    """The particle after an evaluation of the guidance and the twist at its state, with D,
    `D~ - D`, log h and the memories; and its failures.
    """
    (key_guidance, key_twist), (of_guidance, of_twist) = keys, particle.memory
    t, x, weighing = step.u, particle.x, any(run.weighs[:-1])
    shift, log_h = jnp.zeros_like(particle.shift), jnp.zeros((), run.log_dtype)
    unguided = lambda: run.model.denoise(t, x).astype(run.model.dtype)
    if run.proposing is not None:
        denoised, shift, log_h, of_guidance = estimate(
            run, run.proposing, key_guidance, t, x, of_guidance, weighing and run.twisting is None
        )
        unguided = lambda: denoised
    if run.twisting is None:
        denoised = unguided()
    else:
        twist = run.twisting

        # The twist is evaluated only at steps that weigh, unless it needs every state.
        def twisted(memory: Any) -> tuple[Array, Array, Any]:
            of_twist, _, log_h, memory = estimate(run, twist, key_twist, t, x, memory, True)
            return of_twist if run.proposing is None else unguided(), log_h, memory

        denoised, log_h, of_twist = jax.lax.cond(
            step.weighs | twist.needs_every_state,
            twisted, lambda memory: (unguided(), log_h, memory), of_twist,
        )  # fmt: skip
    failed = failures(x, Estimate(denoised + shift, denoised, log_h))
    memory = of_guidance, of_twist
    return particle._replace(denoised=denoised, shift=shift, log_h=log_h, memory=memory), failed


def estimate(
    run: SMC, guidance: Guidance, key: Array, t: Array, x: Array, memory: Any, weighing: bool
) -> tuple[Array, Array, Array, Any]:
    """D, `D~ - D`, log h (0 unless `weighing`) and the memory of a guidance at a state."""
    found, memory = evaluate(run.model, guidance, key, t, x, memory)
    if weighing and found.log_h is None:
        raise ValueError(
            f"{type(guidance).__name__} has no log_h to weigh particles by: pass twist=, such as "
            "Laplace(model, reward, scale) or dps(model, reward, scale), or weigh only at the "
            "end, with ess_threshold=0"
        )
    # The base chain needs the unguided denoiser.
    unguided = lambda: run.model.denoise(t, x).astype(run.model.dtype)
    denoised = unguided() if found.denoised is None else found.denoised
    log_h = 0.0 if found.log_h is None or not weighing else found.log_h
    return denoised, found.tilted - denoised, jnp.asarray(log_h, run.log_dtype), memory


def weigh(run: SMC, step: _Step, state: State, log_ratio: Array) -> State:
    """The state after `log w += log p/q + A_u - A_t`, with the tempering of this step."""
    log_weights, particles = state.log_weights + log_ratio, state.particles
    if any(run.weighs[:-1]):
        particles = particles._replace(log_h=counted(particles.log_h))
    tempering = step.tempering
    if isinstance(run.tempering, AdaptiveTempering):
        chosen = choose_tempering(run, run.tempering, step, particles, log_weights)
        tempering = jnp.where(step.weighs, chosen, state.tempering)
    apply = lambda particle: apply_potential(run.potential, step.weighs, particle, tempering)
    applied, history = jax.vmap(apply)(particles)
    log_weights = log_weights + increment(applied, particles.applied)
    particles = particles._replace(applied=applied, history=history)
    return state._replace(particles=particles, log_weights=log_weights, tempering=tempering)


def choose_tempering(
    run: SMC, tempering: AdaptiveTempering, step: _Step, particles: Particle, log_weights: Array
) -> Array:
    """The factor of the twist that leaves the required effective sample size."""
    # The search computes many sums of the weights, so devices exchange the weights once before it.
    known = particles.applied, particles.history, particles.log_h, log_weights
    applied, history, log_h, log_weights = jax.tree.map(
        lambda array: replicate(array, run.sharding), known
    )
    particles = particles._replace(applied=applied, history=history, log_h=log_h)

    def weights(factor: Array) -> Array:
        gain = lambda particle: (
            apply_potential(run.potential, step.weighs, particle, factor)[0] - particle.applied
        )
        return log_weights + jax.vmap(gain)(particles)

    return tempering.choose(weights, run.num, run.log_dtype)


def counted(log_h: Array) -> Array:
    """The twists of several particles, with the lowest finite one in place of -inf, because a twist
    may exclude a state whose end is allowed. Any finite twist is unbiased. With the lowest one, a
    constant that is added to the reward does not change the weights. If all twists are -inf, they
    stay, and none counts.
    """
    finite = log_h > -jnp.inf
    lowest = jnp.min(jnp.where(finite, log_h, jnp.inf))
    return jnp.where(finite | (lowest == jnp.inf), log_h, lowest)


def apply_potential(
    potential: Potential, weighs: Array, particle: Particle, tempering: Array
) -> tuple[Array, Any]:
    """The sum of the log-potentials of a particle after a step, and the potential's memory."""
    # Where even `counted` leaves -inf, the twist does not count before the end.
    counts = weighs & (particle.log_h > -jnp.inf)
    value = jnp.where(counts, tempering * jnp.where(counts, particle.log_h, 0.0), 0.0)
    applied, history = potential(particle.applied, particle.history, value)
    choose = lambda new, old: jnp.where(counts, new, old)
    history = jax.tree.map(choose, history, particle.history)
    return choose(applied, particle.applied), history


def resample(key: Array, run: SMC, step: _Step, state: State) -> tuple[State, Array, Array]:
    """The state after resampling if the weights are uneven; the effective sample size; and whether
    the weights were uneven.
    """
    # Devices exchange the weights once instead of once per sum, and the sums are the same on any
    # number of devices.
    log_weights = replicate(state.log_weights, run.sharding)
    ess = effective(log_weights)

    def renew(state: State) -> State:
        ancestors = replicate(checked_ancestors(run, key, log_weights), run.sharding)
        log_norm = state.log_norm + jax.nn.logsumexp(log_weights) - math.log(run.num)
        return state._replace(
            particles=inherit(state.particles, ancestors),
            log_weights=jnp.zeros_like(log_weights),
            log_norm=log_norm,
        )

    threshold = run.ess_threshold
    uneven = step.weighs & (ess < threshold * run.num) if threshold > 0 else jnp.zeros((), bool)
    # Weights that are not finite stay unchanged, so that the report shows them.
    return jax.lax.cond(uneven & jnp.isfinite(ess), renew, lambda s: s, state), ess, uneven


def checked_ancestors(run: SMC, key: Array, log_weights: Array) -> Array:
    """The ancestors that the resampler returns. **Raises:** `ValueError` for another shape or
    dtype.
    """
    ancestors = run.resample(key, log_weights)
    if ancestors.shape != (run.num,) or not jnp.issubdtype(ancestors.dtype, jnp.integer):
        raise ValueError(
            f"the resampler must return integer ancestors of shape ({run.num},), got "
            f"{ancestors.dtype} of shape {ancestors.shape}"
        )
    return ancestors


def inherit(particles: Particle, ancestors: Array) -> Particle:
    """The next generation: every value of a particle comes from its ancestor."""
    return jax.tree.map(lambda leaf: leaf[ancestors], particles)


def _finish(key: Array, run: SMC, state: State) -> tuple[Particles, Info, Array]:
    """The particles at t = 1, the diagnostics of the last step, and its change of log Z."""
    particles = state.particles

    def end(i: Array, particle: Particle) -> tuple[Array, Array]:
        x = run.solver.finish(particle_key(key, i), particle.x, particle.denoised)
        log_potential = run.guidance.final_log_potential(x, particle.memory[0])
        return x, log_potential.astype(run.log_dtype)

    x, log_potential = map_particles(end, run.chunk_size)(jnp.arange(run.num), particles)
    log_weights = state.log_weights + increment(log_potential, particles.applied)
    all_log_weights = replicate(log_weights, run.sharding)
    total = jax.nn.logsumexp(all_log_weights)
    log_norm = state.log_norm + total - math.log(run.num)
    change = total - jax.nn.logsumexp(replicate(state.log_weights, run.sharding))
    ess = effective(all_log_weights)
    wrong = jnp.any(jnp.isnan(log_potential) | (log_potential == jnp.inf))
    failed = Failures.of(log_h=wrong, weights=~jnp.isfinite(ess))
    info = Info(failed, ess, jnp.ones((), run.log_dtype), jnp.zeros((), bool))
    return Particles(x, log_weights, log_norm), info, change


def _constant_change(run: SMC, tempering: Array, twists: Array) -> Array:
    """The change of log Z in the last step if the twist of all particles stayed at its mean at the
    first step that weighs: what a constant in the reward contributes. `tempering` and `twists`, the
    mean twist, are those of the steps with a kernel.
    """
    weighing = np.flatnonzero(run.weighs[:-1])
    if not len(weighing):
        return jnp.zeros((), run.log_dtype)
    first = twists[weighing[0]]
    first = jnp.where(jnp.isfinite(first), first, 0.0)

    def apply(carry: tuple[Array, Any], factor: Array) -> tuple[tuple[Array, Any], None]:
        applied, memory = run.potential(*carry, factor * first)
        return (applied, jax.tree.map(lambda leaf: leaf.astype(run.log_dtype), memory)), None

    memory = jax.tree.map(lambda leaf: leaf.astype(run.log_dtype), run.potential.init())
    start = jnp.zeros((), run.log_dtype), memory
    (applied, _), _ = jax.lax.scan(apply, start, tempering[weighing])
    return first - applied


def _traced(particles: Particles, times: Array, infos: Info, roots: Array) -> Particles:
    """The particles with a trace of the steps at `times`."""
    failed, ess, tempering, resampled = infos
    trace = Trace(times, failed, ess=ess, tempering=tempering, resampled=resampled, roots=roots)
    return Particles(particles.x, particles.log_weights, particles.log_norm, trace)


def _check_noise(solver: Solver | None) -> None:
    if isinstance(solver, Solver) and not solver.stochastic:
        raise ValueError(
            f"only the noise of a step can be weighed, but {type(solver).__name__} has none: use "
            "Ancestral(eta) with eta > 0"
        )
    eta = solver.eta if isinstance(solver, Ancestral) else 1.0
    if _checks.concrete(eta) and np.asarray(eta) == 0:
        raise ValueError(
            "a step with eta = 0 has no noise, so there is nothing to weigh: use Ancestral(eta) "
            "with eta > 0"
        )


def _check_end(times: Array) -> None:
    if _checks.concrete(times) and float(np.asarray(times)[-1]) != 1:
        raise ValueError(
            "weights are complete only at t = 1: times must end there, got an end at t = "
            f"{float(np.asarray(times)[-1]):g}"
        )


def _check_tempering(
    tempering: Tempering, proposal: Proposal, potential: Potential, threshold: float
) -> None:
    _checks.instance(tempering, Tempering, "tempering", "such as tempering.Exponential()")
    if not isinstance(tempering, AdaptiveTempering):
        return
    if proposal.num_children > 1 or not isinstance(potential, Difference):
        raise ValueError(
            "AdaptiveTempering is for Difference() and proposals without Children, got "
            f"{type(potential).__name__} and {type(proposal).__name__}: use Exponential or "
            "Polynomial"
        )
    if _checks.concrete(tempering.ess) and threshold <= float(tempering.ess):
        raise ValueError(
            f"AdaptiveTempering({float(tempering.ess):g}) needs ess_threshold above it, got "
            f"{threshold:g}: use a larger one, such as 1"
        )


def replicate(array: Array, sharding: jax.sharding.Sharding | None) -> Array:
    """The array, complete on every device of a mesh."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return array
    return jax.lax.with_sharding_constraint(array, _sharding.replicated(sharding))


def increment(new: Array, old: Array) -> Array:
    """`new - old` of log-weights; a weight of zero stays zero."""
    excluded = old == -jnp.inf
    return jnp.where(excluded, -jnp.inf, new - jnp.where(excluded, 0.0, old))


def _check_first_move(run: SMC) -> None:
    """Warn if a score of fixed length moves particles by many standard deviations of the noise."""
    length = run.guidance.score_at_noise
    if length is None or not _checks.concrete((length, run.times, run.model.corruption)):
        return
    with jax.ensure_compile_time_eval():
        times = run.times[:2].astype(run.model.dtype)
        solver, corruption, length = _pytree.cast(
            (run.solver, run.model.corruption, length), run.model.dtype
        )
        kernel = solver.kernel(corruption, *times)
        move = float(length * kernel.response * kernel.tweedie / kernel.std)
    if move > _FAR:
        _checks.warn(
            f"the first step moves every particle by {move:.3g} standard deviations of its noise, "
            "because the score has a fixed length, so log Z will be far too low: wrap the guidance "
            "in GainCapped, or start later"
        )


def _overstated(potential: Potential) -> str:
    """Why weights before the last step were too large, and the remedy."""
    if isinstance(potential, Difference):
        return (
            "The twist promises rewards that the particles do not reach: weigh only at the end, "
            "with ess_threshold=0, or use another twist."
        )
    return (
        f"{type(potential).__name__}() counts the twist once for each step that weighs, and the "
        "last step removes the excess: use potential=Difference(), or weigh at fewer steps "
        "(schedule=)."
    )


def _warn(particles: Particles, change: Array, potential: Potential) -> None:
    assert particles.trace is not None
    resampled = bool(np.any(np.asarray(particles.trace.resampled)))
    if resampled and float(change) < -_UNDONE:
        _checks.warn(
            f"the last step changes log Z by {float(change):.3g}, without what a constant reward "
            "changes, so particles were resampled by weights far from the final ones. "
            + _overstated(potential)
        )
    fraction = float(particles.ess) / len(particles)
    if fraction < _FEW:
        _checks.warn(
            f"the effective sample size of {len(particles)} particles is a fraction of "
            f"{fraction:.2g}, so estimates depend on few of them. Use a better proposal, such as "
            "Conjugate with ess_threshold=0; for a concave quadratic reward, Laplace(model, "
            "reward, scale); for tokens, more completions. A smaller scale helps, too."
        )
