r"""Samples of a flow, with the log-density of their law.

A deterministic solver maps the initial noise of a run to a sample, `x_1 = F(x_0)`. The law of the
samples has the density

    log q(x_1) = log N(x_0; 0, sigma^2 I) - log |det F'(x_0)|,        sigma at the first time.

This is exact for any number of steps: q is the law of the solver's output, not of the flow that the
solver approximates. If the density of the target is known, the mean of `log q - log target` is the
divergence of q from the target, and the mean of `target / q` is a normalizing constant, without
weights and without noise, unlike in an `audit`. The d columns of `F'` are propagated through the
run together, so this is for small d.

F must be one-to-one. Where F folds, several starts have the same end, and q is a sum over these
starts, of which only one term is known. A mean of `base / q` above 1 shows a fold. A guidance that
draws at random folds at every step, and raises an error.

Reference: Papamakarios et al. (arXiv 1912.02762), densities by change of variables.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _progress, _pytree
from tiltjax.guidance import Guidance
from tiltjax.mixtures import decomposed
from tiltjax.models import Model, check_mean
from tiltjax.particles import CAUSES, Failures, Particles, unweighted
from tiltjax.samplers._sample import (
    Walk,
    check_noise,
    check_run,
    first_time,
    initial_noise,
    map_particles,
    noise_key,
    walk,
)
from tiltjax.solvers import Adaptive, Heun, Solver


def sample_with_log_prob(
    key: Array,
    model: Model,
    guidance: Guidance | None = None,
    *,
    num: int,
    steps: int | None = None,
    times: Array | None = None,
    solver: Solver | None = None,
    chunk_size: int | None = None,
) -> Particles:
    """The samples of `sample` with the same key, and the log-density of their law.

    **Arguments:** as in `sample`. **Returns:** `Particles` with `log_prob` `(num,)`.

    **Raises:** `ValueError` as in `sample`, for stochastic solvers (their samples are no function
    of the start), for `Adaptive` and networks with batched=True (both lack forward-mode
    derivatives), for guidances that draw at random, and for models that do not start from Gaussian
    noise; `FloatingPointError` for a density that is not finite, and for data that is too wide for
    this start.
    """
    key = _checks.key(key)
    check_mean(model, "use Analytic, from_velocity, from_noise or from_denoiser")
    run = check_run(
        model, guidance, num=num, steps=steps, times=times, solver=solver, usual_solver=Heun(),
        chunk_size=chunk_size,
    )  # fmt: skip
    if run.solver.stochastic or isinstance(run.solver, Adaptive):
        raise ValueError(
            f"{type(run.solver).__name__} has no density to follow: use Heun() or Euler(), or "
            "audit for a solver with noise"
        )
    if guidance is not None and _draws(model, guidance, run.times):
        raise ValueError(
            f"{type(guidance).__name__} draws at random, so one trajectory does not determine the "
            "density of its flow: use audit, or a guidance without draws"
        )
    from_noise = model.starts_denoised(first_time(run.times))
    checks = from_noise and model.width is None
    try:
        particles, wide = _density(key, model, guidance, *run, from_noise, checks)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise ValueError(
            "this run has no forward-mode derivatives, which the density needs: build the network "
            "in JAX, with batched=False"
        ) from error
    if _checks.concrete(wide) and np.asarray(wide.start):
        raise FloatingPointError(f"sampling failed at the start: {CAUSES['start']}")
    if _checks.concrete(particles) and np.any(
        failed := ~np.isfinite(np.asarray(particles.log_prob))
    ):
        raise FloatingPointError(
            f"{failed.sum()} of {run.num} log-densities are not finite, the first at sample "
            f"{failed.argmax()}: the flow is NaN or not invertible there"
        )
    return particles


def _draws(model: Model, guidance: Guidance, times: Array) -> bool:
    """Whether two keys give two estimates. For traced values: whether the estimate depends on the
    key.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    if _checks.concrete((model, guidance, times)):
        with jax.ensure_compile_time_eval():
            first, second = (np.asarray(_estimate(model, guidance, key, times)) for key in keys)
        return not np.array_equal(first, second, equal_nan=True)
    try:  # a result that is independent of the key has no axis of keys
        jax.eval_shape(
            jax.vmap(lambda key: _estimate(model, guidance, key, times), out_axes=None), keys
        )
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        return True
    return False


@_callbacks.compiled
def _estimate(model: Model, guidance: Guidance, key: Array, times: Array) -> Array:
    """The tilted denoiser of one state at the middle time of a run."""
    model, guidance, times = decomposed(_pytree.cast((model, guidance, times), model.dtype))
    x = model.initial(jax.random.key(0), times[0])
    return guidance(key, times[len(times) // 2 - 1], x, guidance.init(x))[0].tilted


@_callbacks.compiled
def _density(
    key, model, guidance, solver, times, num, chunk_size, from_noise, checks
) -> tuple[Particles, Failures]:
    model, guidance, solver, times = decomposed(
        _pytree.cast((model, guidance, solver, times), model.dtype)
    )
    setup = Walk(model, guidance, solver, times, None, from_noise)
    noises = initial_noise(noise_key(key), model, times[0], num, chunk_size)
    unguided = lambda noise: model.start(times[0], noise, model.denoise(times[0], noise))
    starts = map_particles(unguided, chunk_size)(noises) if checks else noises

    def one(noise: Array) -> tuple[Array, Array]:
        def run(flat: Array) -> tuple[Array, Array]:
            # The run is deterministic, so any key is good.
            x = walk(key, setup, flat.reshape(1, *model.shape), _progress.Ticker(None), False)[0][0]
            return x.reshape(-1), x

        slope, x = jax.jacfwd(run, has_aux=True)(noise.reshape(-1))
        return x, model.initial_log_prob(times[0], noise) - jnp.linalg.slogdet(slope)[1]

    x, log_prob = jax.lax.map(one, noises, batch_size=chunk_size or num)
    particles = eqx.tree_at(
        lambda particles: particles.log_prob,
        unweighted(x),
        log_prob,
        is_leaf=lambda leaf: leaf is None,
    )
    return particles, check_noise(jnp.asarray(checks), model.corruption, times[0], noises, starts)
