r"""`smc`: the guided sampler with weights, asymptotically exact for any guidance.

    x_t, estimate --> proposal --> x_u, log p/q --> twist V_u(x_u)
        --> log w += log p/q + A_u - A_t --> resample, if the weights are uneven

The base chain takes the steps of `Ancestral(eta)` and ends with the jump to the denoiser, which is
not guided: it has no noise to weigh. With `Z_N = E[exp(scale * r(x_N))]` of this chain, and N the
number of steps,

    E[exp(log_norm)] = Z_N
        for any number of particles, guidance, twist, potential, tempering and resampling,

and weighted means tend to those of the chain's tilt as particles are added. A guidance is thus
judged by how even its weights are (`ess`), not trusted. What a run is made of:
`tiltjax.weighted.proposals`, `tiltjax.weighted.potentials`, `tiltjax.weighted.tempering`,
`tiltjax.resampling`.

| published method | here |
|---|---|
| FK (arXiv 2501.06848) | `smc(key, model, dps(model, reward, scale), num=n, **fk_steering())` |
| DAS (arXiv 2501.05803) | `smc(key, model, dps(model, reward, scale), num=n, **das())` |
| TDS (arXiv 2306.17775) | `smc(key, model, dps(model, reward, scale), num=n, **tds())` |
"""

import math
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _progress, _pytree, _sharding, external, resampling
from tiltjax.guidance import Estimate, Guidance, failure_flags
from tiltjax.mixtures import decomposed
from tiltjax.models import Denoiser
from tiltjax.particles import FAILURES, Particles, Trace, effective, weight_dtype
from tiltjax.samplers import check_run, map_particles
from tiltjax.solvers import Ancestral, Solver
from tiltjax.weighted.potentials import Difference, Potential, ResampleSchedule
from tiltjax.weighted.proposals import Guided, Proposal
from tiltjax.weighted.tempering import AdaptiveTempering, Tempering

_FEW = 0.05


@external.failures()
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
    schedule: ResampleSchedule | None = None,
    ess_threshold: float = 0.5,
    solver: Solver | None = None,
    chunk_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = False,
) -> Particles:
    """`num` weighted particles of the tilt, with an unbiased estimate of its normalizing constant.

    **Arguments:**

    - `key`, `model`, `num`, `steps` or `times`, `chunk_size`, `sharding`, `progress`: as in
      `sample`; the run has to end at t = 1.
    - `guidance`: proposes by its shift, and weighs by its `log_h` unless `twist`, another guidance
      of the same model, does.
    - `proposal`: `Guided()` by default; `Base()`, `Shifted()`, `Children(m)`.
    - `potential`: `Difference()` by default; `Max()`, `Sum()`, `Immediate()`.
    - `tempering`: none by default; `Exponential()`, `Polynomial()`, `AdaptiveTempering()`.
    - `resample`: of `tiltjax.resampling`; `schedule`: after which steps; `ess_threshold`: below
      which effective sample size, as a fraction of `num` (0: never, and no twist is needed then;
      1: always).
    - `solver`: `Ancestral(eta)` with eta > 0: only noise can be weighed; 1 for `Tuned`.

    **Returns:** `Particles` with `log_weights` and `log_norm`. `trace` holds the effective sample
    size, the tempering and whether particles were resampled after each step;
    `particles.standard_error(fn)` rests on its genealogy.

    **Raises:** `ValueError` for a deterministic solver, a guidance without `log_h` and no twist,
    thresholds, windows and temperings that make no sense; `FloatingPointError` naming the first
    step with a NaN, or where all weights are zero. Warns where the effective sample size ends below
    5% of `num`: estimates rest on few particles then.
    """
    key = _checks.key(key)
    proposal = Guided() if proposal is None else proposal
    potential = Difference() if potential is None else potential
    schedule = ResampleSchedule() if schedule is None else schedule
    _checks.instance(proposal, Proposal, "proposal", "such as proposals.Guided()")
    _checks.instance(potential, Potential, "potential", "such as potentials.Difference()")
    _checks.instance(schedule, ResampleSchedule, "schedule", "use ResampleSchedule(n, start, stop)")
    _checks.function(resample, "resample")
    threshold = _checks.number(ess_threshold, "ess_threshold", 0, 1)
    _check_noise(solver)
    run = check_run(
        model, guidance, num=num, steps=steps, times=times, solver=solver,
        usual_solver=Ancestral(), chunk_size=chunk_size, weighted=True, twist=twist,
    )  # fmt: skip
    _sharding.check_divides(sharding, (run.num,), "num")  # weights have the particle axis alone
    if _checks.concrete(run.times) and float(np.asarray(run.times)[-1]) != 1:
        raise ValueError(
            "weights are complete at t = 1 only: times must end there, got "
            f"{float(np.asarray(run.times)[-1]):g}"
        )
    if tempering is not None:
        _check_tempering(tempering, proposal, potential, threshold)
    steps = len(run.times) - 1
    weighs = threshold > 0 or proposal.num_children > 1
    weighs_at = schedule.steps(steps) if weighs else np.zeros(steps, bool)
    factors = jnp.ones(steps)
    if tempering is not None and not isinstance(tempering, AdaptiveTempering):
        factors = tempering.factors(steps)
    settings = _Settings(proposal, potential, tempering, resample, threshold)
    with _progress.bar("weighing", steps, enabled=progress) as bar:
        particles = _smc(
            key, model, guidance, twist, settings, run.solver, run.times, factors,
            tuple(weighs_at.tolist()), bar, run.num, run.chunk_size, sharding,
        )  # fmt: skip
        if _checks.concrete(particles):
            assert particles.trace is not None
            particles.trace.check()
            if threshold > 0:
                _warn(particles)
    return particles


class _Settings(NamedTuple):
    proposal: Proposal
    potential: Potential
    tempering: Tempering | None
    resample: resampling.Resampler
    threshold: float


class _Particle(NamedTuple):
    """All that a particle inherits; `root` is the index of its ancestor at the start."""

    x: Array
    denoised: Array
    guidance_shift: Array
    applied: Array
    history: Any
    memory: Any
    root: Array


def _check_noise(solver: Solver | None) -> None:
    if isinstance(solver, Solver) and not solver.stochastic:
        raise ValueError(
            f"only the noise of a step can be weighed, {type(solver).__name__} has none: use "
            "Ancestral(eta) with eta > 0"
        )
    eta = solver.eta if isinstance(solver, Ancestral) else 1.0
    if _checks.concrete(eta) and np.asarray(eta) == 0:
        raise ValueError(
            "at eta = 0 a step has no noise and there is nothing to weigh: use Ancestral(eta) "
            "with eta > 0"
        )


def _check_tempering(
    tempering: Tempering, proposal: Proposal, potential: Potential, threshold: float
) -> None:
    _checks.instance(tempering, Tempering, "tempering", "such as tempering.Exponential()")
    if not isinstance(tempering, AdaptiveTempering):
        return
    if proposal.num_children > 1 or not isinstance(potential, Difference):
        raise ValueError(
            "AdaptiveTempering is for Difference() and proposals without Children: use a schedule"
        )
    if _checks.concrete(tempering.ess) and threshold <= float(tempering.ess):
        raise ValueError(
            f"AdaptiveTempering({float(tempering.ess):g}) needs ess_threshold above it, such as 1, "
            f"got {threshold:g}: particles that keep uneven weights leave no room"
        )


@eqx.filter_jit
def _smc(
    key,
    model,
    guidance,
    twist,
    settings,
    solver,
    times,
    factors,
    weighs_at,
    bar,
    num,
    chunk_size,
    sharding,
) -> Particles:
    model, guidance, twist, solver, times = decomposed(
        _pytree.cast((model, guidance, twist, solver, times), model.dtype)
    )
    proposal, potential, tempering, resample, threshold = settings
    dtype = model.dtype
    log_dtype = weight_dtype(dtype)
    steps = len(times) - 1
    over_particles = lambda fn: map_particles(fn, chunk_size)
    factors = factors.astype(log_dtype)
    # A proposal that is not guided evaluates its guidance at no state, unless the guidance needs
    # every state.
    uses_guidance = proposal.guided or guidance.needs_every_state
    twisting, separate = (
        guidance if twist is None else twist,
        twist is not None or not uses_guidance,
    )

    unguided = lambda t, x: model.denoise(t, x).astype(dtype)

    def estimated(
        guide: Guidance, key: Array, t: Array, x: Array, memory: Any, weighing: bool
    ) -> tuple[Array, ...]:
        """D, D~ - D, log h (0 unless `weighing`) and the memory of a guidance."""
        estimate, memory = guide(key, t, x, memory)
        estimate = _pytree.cast(estimate, dtype)
        if estimate.tilted.shape != model.denoised_shape:
            raise ValueError(
                f"the guidance returns a denoiser of shape {estimate.tilted.shape} for a state of "
                f"shape {x.shape}"
            )
        if weighing and estimate.log_h is None:
            raise ValueError(
                f"{type(guide).__name__} has no log_h to weigh particles by: give twist=, such as "
                "Laplace(model, reward, scale) or dps(model, reward, scale), or weigh at the end "
                "alone, ess_threshold=0"
            )
        # The base chain needs the unguided denoiser.
        denoised = unguided(t, x) if estimate.denoised is None else estimate.denoised
        log_h = 0.0 if estimate.log_h is None or not weighing else estimate.log_h
        return denoised, estimate.tilted - denoised, jnp.asarray(log_h, log_dtype), memory

    def evaluate(
        key_guidance: Array, key_twist: Array, t: Array, x: Array, memory: Any, weigh: Array
    ) -> tuple[Array, Array, Array, Any, Array]:
        """At a new state: D, D~ - D, log h (if it is to be weighed), memories, failures."""
        of_guidance, of_twist = memory
        if uses_guidance:
            weighing = not separate and any(weighs_at[:-1])
            denoised, guidance_shift, log_h, of_guidance = estimated(
                guidance, key_guidance, t, x, of_guidance, weighing
            )
            base = lambda: denoised
        else:
            base = lambda: unguided(t, x)
            guidance_shift, log_h = jnp.zeros(model.denoised_shape, dtype), jnp.zeros((), log_dtype)
        if separate:
            # The twist is evaluated only where it counts, unless it needs every state.
            def with_twist(of_twist: Any) -> tuple[Array, Array, Any]:
                denoised, _, log_h, of_twist = estimated(twisting, key_twist, t, x, of_twist, True)
                return (base() if uses_guidance else denoised), log_h, of_twist

            without_twist = lambda of_twist: (base(), log_h, of_twist)
            denoised, log_h, of_twist = jax.lax.cond(
                weigh | twisting.needs_every_state, with_twist, without_twist, of_twist
            )
        else:
            denoised = base()
        failed = failure_flags(x, Estimate(denoised + guidance_shift, denoised, log_h))
        return denoised, guidance_shift, log_h, (of_guidance, of_twist), failed

    def start(i: Array) -> _Particle:
        x = model.initial(particle_key(keys[0, 1], i), times[0])
        memory = guidance.init(x), twisting.init(x) if separate else ()
        unknown = jnp.zeros(model.denoised_shape, dtype)
        return _Particle(x, unknown, unknown, jnp.zeros((), log_dtype), potential.init(), memory, i)

    def advance(carry, scanned):
        particles, log_weights, log_norm, factor = carry
        step, (key_step, key_resample), t, u, weigh, tempering_factor = scanned

        def child(key: Array, particle: _Particle) -> tuple[_Particle, Array, Array, Array]:
            key_noise, key_guidance, key_twist = jax.random.split(key, 3)

            def move() -> tuple[Array, Array]:
                kernel = solver.kernel(model.corruption, t, u)
                shift = proposal.shift(kernel, factor.astype(dtype) * particle.guidance_shift)
                x, log_ratio = kernel.propose(key_noise, particle.x, particle.denoised, shift)
                return x, log_ratio.astype(log_dtype)

            stay = lambda: (particle.x, jnp.zeros((), log_dtype))
            x, log_ratio = jax.lax.cond(step < 0, stay, move)
            denoised, guidance_shift, value, memory, failed = evaluate(
                key_guidance, key_twist, u, x, particle.memory, weigh
            )
            moved = particle._replace(
                x=x, denoised=denoised, guidance_shift=guidance_shift, memory=memory
            )
            return moved, value, log_ratio, failed

        def apply(particle: _Particle, value: Array, factor: Array) -> tuple[Array, Any]:
            # A twist of -inf is not believed before the end: what it excludes too early may yet be
            # allowed. Any number is unbiased.
            counts = weigh & (value > -jnp.inf)
            value = jnp.where(counts, factor * jnp.where(counts, value, 0.0), 0.0)
            applied, history = potential(particle.applied, particle.history, value)
            choose = lambda new, old: jnp.where(counts, new, old)
            history = jax.tree.map(choose, history, particle.history)
            return choose(applied, particle.applied), history

        def propagate(i: Array, particle: _Particle) -> tuple[_Particle, Array, Array, Array]:
            key = particle_key(key_step, i)
            if proposal.num_children == 1:
                return child(key, particle)
            key_choice, *keys = jax.random.split(key, proposal.num_children + 1)
            moved, value, log_ratio, failed = jax.vmap(lambda key: child(key, particle))(
                jnp.stack(keys)
            )
            gain = log_ratio + jax.vmap(
                lambda value: increment(
                    apply(particle, value, tempering_factor)[0], particle.applied
                )
            )(value)
            chosen = jax.random.categorical(key_choice, gain)
            # The chosen one's own gain is added below: what is carried is the mean of all.
            log_ratio = (
                log_ratio[chosen]
                + jax.nn.logsumexp(gain)
                - math.log(proposal.num_children)
                - gain[chosen]
            )
            moved, value = jax.tree.map(lambda leaf: leaf[chosen], (moved, value))
            return moved, value, log_ratio, jnp.any(failed, axis=0)

        moved, value, log_ratio, failed = over_particles(propagate)(jnp.arange(num), particles)
        log_weights = log_weights + log_ratio
        if isinstance(tempering, AdaptiveTempering):
            # Many sums of the weights, one of which is chosen: exchanged once, too.
            known = moved.applied, moved.history, value, log_weights
            applied, history, values, sums = jax.tree.map(
                lambda array: replicate(array, sharding), known
            )
            candidates = moved._replace(applied=applied, history=history)
            gain = lambda one, value, factor: apply(one, value, factor)[0] - one.applied
            weigh_by = lambda factor: (
                sums + jax.vmap(gain, in_axes=(0, 0, None))(candidates, values, factor)
            )
            tempering_factor = jnp.where(weigh, tempering.choose(weigh_by, num, log_dtype), factor)
        applied, history = jax.vmap(lambda one, value: apply(one, value, tempering_factor))(
            moved, value
        )
        log_weights = log_weights + increment(applied, moved.applied)
        moved = moved._replace(applied=applied, history=history)
        # One exchange of the weights instead of one for each sum of them, and sums that are the
        # same on any number of devices.
        all_log_weights = replicate(log_weights, sharding)
        ess = effective(all_log_weights)
        uneven = weigh & (ess < threshold * num) if threshold > 0 else jnp.zeros((), bool)

        def renew(moved, log_weights, log_norm):
            ancestors = replicate(resample(key_resample, all_log_weights), sharding)
            log_norm = log_norm + jax.nn.logsumexp(all_log_weights) - math.log(num)
            return inherit(moved, ancestors), jnp.zeros_like(log_weights), log_norm

        unchanged = lambda *state: state
        # Weights that are not finite stay, for the report.
        moved, log_weights, log_norm = jax.lax.cond(
            uneven & jnp.isfinite(ess), renew, unchanged, moved, log_weights, log_norm
        )
        failed = jnp.any(failed, axis=0)
        failed = failed.at[4].set(~jnp.any(failed) & ~jnp.isfinite(ess))
        bar.tick(step)
        carry = moved, log_weights, log_norm, tempering_factor
        return carry, (failed, ess, tempering_factor, uneven)

    inner, indices = steps - 1, jnp.arange(num)
    # Of particles and of resampling, at each step; the first row draws and evaluates the start.
    keys = jax.random.split(key, (steps + 1, 2))
    particles = over_particles(start)(indices)
    if sharding is not None:
        particles = jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), particles
        )
    # The first evaluation, at the start, is a step that does not move: so the program contains each
    # guidance once.
    before = jnp.ones((), log_dtype) if tempering is None else jnp.zeros((), log_dtype)
    carry = particles, jnp.zeros(num, log_dtype), jnp.zeros((), log_dtype), before
    scanned = (
        jnp.arange(-1, inner), keys[:steps], jnp.concatenate([times[:1], times[:-2]]), times[:-1],
        jnp.asarray((False, *weighs_at[:inner])), jnp.concatenate([before[None], factors[:inner]]),
    )  # fmt: skip
    (particles, log_weights, log_norm, _), (failed, *per_step) = jax.lax.scan(
        advance, carry, scanned
    )
    ess, tempered, resampled = (leaf[1:] for leaf in per_step)

    # The last step jumps to the denoiser, and completes the reward (or what a guidance has of its
    # own to complete).
    finish = lambda i, particle: solver.finish(
        particle_key(keys[steps, 0], i), particle.x, particle.denoised
    )
    x = over_particles(finish)(indices, particles)
    log_tilt = over_particles(guidance.final_log_potential)(x, particles.memory[0]).astype(
        log_dtype
    )
    log_weights = log_weights + increment(log_tilt, particles.applied)
    all_log_weights = replicate(log_weights, sharding)
    log_norm = log_norm + jax.nn.logsumexp(all_log_weights) - math.log(num)
    last = effective(all_log_weights)
    failed_at_end = (
        jnp.zeros(len(FAILURES), bool)
        .at[1]
        .set(jnp.any(jnp.isnan(log_tilt) | (log_tilt == jnp.inf)))
    )
    failed_at_end = failed_at_end.at[4].set(~jnp.any(failed_at_end) & ~jnp.isfinite(last))
    # What fails at the start counts as a failure of the first step.
    failed = jnp.concatenate([failed, failed_at_end[None]])
    failed = failed[1:].at[0].set(failed[0] | failed[1])
    trace = Trace(
        times,
        failed,
        ess=jnp.append(ess, last),
        tempering=jnp.append(tempered, 1),
        resampled=jnp.append(resampled, False),
        roots=particles.root,
    )
    return Particles(x, log_weights, log_norm, trace)


def inherit(particles: _Particle, ancestors: Array) -> _Particle:
    """The next generation: everything that a particle carries is its ancestor's."""
    return jax.tree.map(lambda leaf: leaf[ancestors], particles)


def replicate(array: Array, sharding: jax.sharding.Sharding | None) -> Array:
    """The whole of an array on every device of a mesh."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return array
    return jax.lax.with_sharding_constraint(array, _sharding.replicated(sharding))


def particle_key(key_step: Array, i: Array) -> Array:
    """The key of particle i in one step."""
    return jax.random.fold_in(key_step, i)


def increment(new: Array, old: Array) -> Array:
    """`new - old` of log-weights: what was zero stays zero."""
    excluded = old == -jnp.inf
    return jnp.where(excluded, -jnp.inf, new - jnp.where(excluded, 0.0, old))


def _warn(particles: Particles) -> None:
    fraction = float(particles.ess) / len(particles)
    if fraction < _FEW:
        warnings.warn(
            f"the effective sample size of {len(particles)} particles is a fraction of "
            f"{fraction:.2g}: estimates rest on few of them. A twist closer to log h helps most: "
            "Laplace(model, reward, scale) for small states, the exact Doob(model, log_h) where it "
            "is known; then more steps, more particles, tempering, a smaller scale",
            stacklevel=3,
        )
