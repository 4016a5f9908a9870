r"""Samples of a flow, with the log-density of the law that they come from.

A deterministic solver maps the noise that a run starts from to its sample, `x_1 = F(x_0)`, and the
law of the samples has the density

    log q(x_1) = log N(x_0; 0, sigma^2 I) - log |det F'(x_0)|,        sigma that of the first time,

exactly, whatever the number of steps: it is the law of what the solver makes, not of the flow it
approximates. Where the density of the target is known, the mean of `log q - log target` is the
divergence of the two, and the mean of `target / q` a normalizing constant; no weights and no noise
are needed, which an `audit` is made of. The d columns of `F'` are pushed through the run together:
this is for small d.

F has to be one-to-one. Where it folds, several starts have the same end and q is a sum over them,
one term of which is known: a mean of `base / q` above 1 shows it. A guidance that draws at random
folds at every step, and is refused.

Reference: Papamakarios et al. (arXiv 1912.02762), densities by change of variables.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _pytree
from tiltjax.guidance import Guidance
from tiltjax.mixtures import decomposed
from tiltjax.models import Model
from tiltjax.particles import Particles, unweighted
from tiltjax.samplers._sample import check_run, sample, start_key
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
    """The samples that `sample` draws with the same key, and the log-density of their law.

    Arguments as in `sample`. **Returns:** `Particles` with `log_prob` `(num,)`.

    **Raises:** `ValueError` as in `sample`, for stochastic solvers (their samples are no function
    of the start), for `Adaptive` (without forward derivatives) and networks with batched=True
    (likewise), for guidances that draw at random, and for models that do not start from Gaussian
    noise; `FloatingPointError` for a density that is not finite.
    """
    key = _checks.key(key)
    _checks.instance(
        model, Model, "model", "use Analytic, from_velocity, from_noise or from_denoiser"
    )
    run = check_run(
        model, guidance, num=num, steps=steps, times=times, solver=solver, usual_solver=Heun(),
        chunk_size=chunk_size,
    )  # fmt: skip
    if run.solver.stochastic or isinstance(run.solver, Adaptive):
        raise ValueError(
            f"{type(run.solver).__name__} has no density to follow: use Heun() or Euler(); noise "
            "is weighed by audit"
        )
    if guidance is not None and _draws(model, guidance, run.times):
        raise ValueError(
            f"{type(guidance).__name__} draws at random, and one trajectory does not determine "
            "the density of its flow: use audit, or a guidance without draws"
        )
    try:
        particles = _density(key, model, guidance, *run)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise ValueError(
            "this run has no forward derivatives, which a density is made of: a network needs "
            "batched=False here"
        ) from error
    if _checks.concrete(particles) and np.any(
        failed := ~np.isfinite(np.asarray(particles.log_prob))
    ):
        raise FloatingPointError(
            f"{failed.sum()} of {run.num} log-densities are not finite, the first that of sample "
            f"{failed.argmax()}: the flow is not invertible there, or NaN"
        )
    return particles


def _draws(model: Model, guidance: Guidance, times: Array) -> bool:
    """Whether two keys give two estimates; where values are being traced, whether an estimate is
    computed from the key.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    if _checks.concrete((model, guidance, times)):
        with jax.ensure_compile_time_eval():
            first, second = (np.asarray(_estimate(model, guidance, key, times)) for key in keys)
        return not np.array_equal(first, second, equal_nan=True)
    try:  # what no key touches has no axis of keys
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
    """The tilted denoiser of one state in the middle of a run."""
    model, guidance, times = decomposed(_pytree.cast((model, guidance, times), model.dtype))
    x = model.initial(jax.random.key(0), times[0])
    return guidance(key, times[len(times) // 2 - 1], x, guidance.init(x))[0].tilted


@_callbacks.compiled
def _density(key, model, guidance, solver, times, num, chunk_size) -> Particles:
    model, guidance, solver, times = decomposed(
        _pytree.cast((model, guidance, solver, times), model.dtype)
    )
    key_start = start_key(key)

    def one(i: Array) -> tuple[Array, Array]:
        start = model.initial(jax.random.fold_in(key_start, i), times[0])

        def run(flat: Array) -> tuple[Array, Array]:
            start = flat.reshape(1, *model.shape)
            # Nothing of the run is random: any key will do.
            x = sample(key, model, guidance, num=1, times=times, start=start, solver=solver).x[0]
            return x.reshape(-1), x

        slope, x = jax.jacfwd(run, has_aux=True)(start.reshape(-1))
        return x, model.initial_log_prob(times[0], start) - jnp.linalg.slogdet(slope)[1]

    x, log_prob = jax.lax.map(one, jnp.arange(num), batch_size=chunk_size or num)
    return eqx.tree_at(
        lambda particles: particles.log_prob,
        unweighted(x),
        log_prob,
        is_leaf=lambda leaf: leaf is None,
    )
