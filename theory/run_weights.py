r"""The importance weights of a guided chain on a mixture after N steps: the effective sample size
of `tiltjax.smc` without resampling, and the spread of its estimate of log Z.

`path_weights` has the closed form for one Gaussian. Here the base chain P takes the steps
`N(m, s^2 I)` of `tiltjax.Ancestral(eta)`, and the guided chain Q the steps `N(m + b, s^2 I)`, where
b is the shift of a field of `theory.runs`, which may be random and have a memory. A trajectory of Q
has the weight `w = exp(scale r(x_N)) P / Q`, and

    E_Q[w] = Z_N,      E_Q[w^2] = E_P[exp(2 scale r(x_N)) P / Q],
        effective sample size / n -> Z_N^2 / E_Q[w^2] = 1 / (1 + rho),
        Var[log Z of n trajectories] = rho / n + O(1 / n^2).

**A measurement.** The mean of `w^2` over trajectories of Q is a poor estimate of its expectation,
because its variance is the fourth moment of w, and because Q may miss the modes that matter. With
the tilted chain `P* = exp(scale r) P / Z_N`,

    E_Q[w^2] / Z_N^2 = E_{P*}[P* / Q] = E_R[exp(sum_j |d_j - b_j|^2 / s_j^2)],

where d is the shift of P* and R has the shift `2 d - b`. The first form needs one moment less, and
the second, whose exponent has no martingale, is of second order in `d - b`. On a mixture, d is
known up to the error of a step: it is the shift of `doob_denoiser`. Equal numbers of trajectories
are drawn from Q, P* and R, where `d - b` in R is cut off at two standard deviations of a step. Each
trajectory is weighed by the mean M of the three densities, so that `P / M` and `P / Q` are computed
without approximation (the balance heuristic of Veach and Guibas, SIGGRAPH 1995). Errors follow by
the delta method.

**Heavy tails.** If the weights have no finite variance, the measured second moment is too small,
and its error means nothing. Therefore a Pareto law is fitted to the tail of the terms of the second
moment (Vehtari et al., arXiv 1507.02646). From a shape of 0.7 on, the effective sample size is an
upper bound for n to infinity. A run of n trajectories may report a larger number, as long as it
does not contain the rare trajectories that matter: then its log Z is too small.

*One Gaussian* has its law in closed form (`path_law`). Of components with one covariance, each
alone has weights of the same finite or infinite variance. If it is infinite, it is so for the
mixture: far away in almost any direction, one component alone has mass, and the guidance is its
own. The converse does not hold.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory import finite_steps, runs
from theory.finite_steps import AffineField
from theory.path_weights import ancestral, path_law
from theory.push_forward import (
    Measured,
    doob_denoiser,
    dps_denoiser,
    laplace_denoiser,
    plug_in_denoiser,
)
from theory.runs import Deterministic, Field, Fit, Problem
from theory.tilts import check_mass
from tiltjax import _checks, _pytree, _repr, _tails, scales, solvers
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.mixtures import GaussianMixture

_CHAINS = GUIDED, TILTED, OVERSHOT = range(3)  # Q, P* and R
_COARSE = functools.partial(doob_denoiser, nodes=1)
_CUT = 2.0  # largest difference of the shifts of P* and R, in standard deviations of a step
_EXACT, _MEASURED = "law at these steps", "measured on trajectories"
_BOUND = "upper bound: the weights have a heavy tail"
_INFINITE = "law at these steps: the variance is infinite"
# What each denoiser is for one Gaussian and a quadratic reward.
_AFFINE = {
    dps_denoiser: finite_steps.shift_at_mean,
    plug_in_denoiser: finite_steps.shift_at_mean,
    laplace_denoiser: finite_steps.exact_shift,
    doob_denoiser: finite_steps.exact_shift,
}


class WeightLaw(_repr.Report):
    """The importance weights w of a guided chain, built by `weight_law`.

    - `log_norm`: `log Z_N = log E[w]` of the chain.
    - `ess`: `E[w]^2 / E[w^2]`, the effective sample size of n trajectories as a fraction of n, for
      large n; 0 if the weights have infinite variance.
    - `pareto_k`: the shape of the tail of the measured second moment; `-inf` without a measurement.
    - `basis`: whether `ess` is the law, a measurement, or an upper bound.
    """

    log_norm: Measured
    ess: Measured
    pareto_k: float
    basis: str

    def spread(self, n: int) -> Measured:
        """The standard deviation of log Z as estimated by n trajectories, `sqrt((1 / ess - 1) / n)`
        to leading order in 1 / n.
        """
        n = _checks.count(n, "n")
        ess, error = (float(part) for part in self.ess)
        if ess == 0:
            return Measured(jnp.asarray(np.inf), jnp.asarray(0.0))
        square = max(1 / ess - 1, 0.0) / n
        change = error / ess**2 / n
        value = np.sqrt(square)
        # Where the value is not larger than its error, the root is not linear.
        return Measured(jnp.asarray(value), jnp.asarray(np.sqrt(square + change) - value))

    def _title(self) -> str:
        return f"WeightLaw: {self.basis}"

    def _rows(self) -> dict[str, str]:
        text = lambda found: f"{float(found.value):.4g} ± {float(found.error):.2g}"
        most, least = ("at most ", "at least ") if self.basis == _BOUND else ("", "")
        return {
            "log Z": text(self.log_norm),
            "effective sample size / n": most + text(self.ess),
            "spread of log Z, n = 1000": least + text(self.spread(1000)),
            "Pareto k": f"{self.pareto_k:.2f}",
        }


class Trajectories(NamedTuple):
    """The ends `(n, d)` of trajectories, their `scale r(x_N)` `(n,)`, and `log P - log` of the
    densities of the chains Q, P* and R, `(3, n)`.
    """

    ends: Array
    log_tilts: Array
    log_ratios: Array

    @property
    def log_weights(self) -> Array:
        """`log w`, of trajectories of Q."""
        return self.log_tilts + self.log_ratios[GUIDED]


def weight_law(
    prior: GaussianMixture,
    reward: Callable,
    scale: float | Array | scales.Scale,
    field: Field,
    *,
    steps: int | None = None,
    times: Array | None = None,
    interpolant: Interpolant | None = None,
    solver: solvers.Ancestral | None = None,
    num: int = 4096,
    seed: int = 0,
) -> WeightLaw:
    """The effective sample size and the spread of log Z of `tiltjax.smc(..., ess_threshold=0)` with
    the guidance `field` after N steps.

    The target is the tilt by the final scale. The function cannot be traced. It takes about 5
    CPU-seconds to compile for each field and number of steps.

    **Arguments:** `prior`, `reward`, `scale`, `field` and `seed` as in `run_law`; `steps` or
    `times`, up to t = 1; `solver`, with eta > 0; `num`, the number of trajectories of each of three
    chains. For a reward that is not quadratic, in more than two dimensions, all trajectories are
    guided ones, so the error is larger.

    **Raises:** as `run_law` and `path_law`.
    """
    solver, law = ancestral(solver), runs.time_law(scale)
    runs.check_field(field)
    num, dtype, interpolant = _checks.count(num, "num"), prior.means.dtype, or_linear(interpolant)
    law, solver = _pytree.cast((law, solver), dtype)
    problem = runs.problem_of(prior, reward, interpolant)
    if not _checks.concrete((prior, problem.reward, law)):
        raise ValueError("weight_law judges the tail of its weights: call it outside of jit")
    if problem.form is not None:
        check_mass(prior, problem.form, law.final)
    times = runs.run_times(prior, interpolant, steps, times)
    if float(times[-1]) != 1:
        raise ValueError(f"weights are complete only at t = 1, got an end at {float(times[-1]):g}")
    alone = functools.partial(_one_component, problem, law, field, times, solver)
    if len(prior.log_weights) == 1 and (closed := alone()) is not None:
        return closed
    measured = _measured(problem, law, field, times, solver, num, seed)
    if measured.basis != _BOUND or not _same_covs(prior):
        return measured
    closed = alone()
    if closed is None or closed.ess.value > 0:
        return measured
    return WeightLaw(measured.log_norm, closed.ess, measured.pareto_k, _INFINITE)


def _one_component(
    problem: Problem, law: scales.Scale, field: Field, times: Array, solver: solvers.Ancestral
) -> WeightLaw | None:
    """The closed form for the first component alone; `None` if there is none."""
    shift = _AFFINE.get(field.denoiser) if isinstance(field, Deterministic) else None
    if shift is None or problem.form is None:
        return None
    prior = problem.prior
    one = prior.replace(jnp.zeros_like(prior.log_weights[:1]), prior.means[:1], prior.covs[:1])
    affine = AffineField(one, problem.form, law, problem.interpolant, shift)
    found = path_law(affine, times=times, solver=solver)
    zero = jnp.zeros_like(found.ess)
    basis = _EXACT if found.ess > 0 else _INFINITE
    return WeightLaw(Measured(found.log_norm, zero), Measured(found.ess, zero), -np.inf, basis)


def _same_covs(prior: GaussianMixture) -> bool:
    covs = np.asarray(prior.covs, np.float64)
    return bool(np.allclose(covs, covs[:1], rtol=1e-6, atol=0))


def _measured(
    problem: Problem,
    law: scales.Scale,
    field: Field,
    times: Array,
    solver: solvers.Ancestral,
    num: int,
    seed: int,
) -> WeightLaw:
    """The measurement with `num` trajectories of each chain."""

    def terms(chain: int) -> tuple[np.ndarray, np.ndarray]:
        """The logarithms of the terms of Z_N and of E_Q[w^2], `(num,)`."""
        key_start, key = jax.random.split(jax.random.fold_in(jax.random.key(seed), chain))
        start = jax.random.normal(key_start, (num, problem.prior.dim), times.dtype)
        which = jnp.asarray(chain)  # an array, so that one program serves all chains
        found = trajectories(problem, (field,), 0, law, times, solver.eta, which, start, key)
        _, tilts, ratios = (np.asarray(part, np.float64) for part in found)
        # log P / M, with the mean M of the densities.
        over_mean = np.log(len(ratios)) - np.logaddexp.reduce(-ratios)
        return tilts + over_mean, 2 * tilts + ratios[GUIDED] + over_mean

    first, second = (np.stack(part) for part in zip(*map(terms, _CHAINS), strict=True))
    # A trajectory beyond the range of floating-point numbers is impossible under P*.
    first, second = (np.where(np.isnan(part), -np.inf, part) for part in (first, second))
    log_norm, relative = _mean(first)
    log_second, relative_second = _mean(second)
    ess = min(float(np.exp(2 * log_norm - log_second)), 1.0)
    shape = _tails.pareto_shape(second.reshape(-1))
    basis = _MEASURED if shape < _tails.USABLE else _BOUND
    dtype = times.dtype
    measured = lambda value, error: Measured(jnp.asarray(value, dtype), jnp.asarray(error, dtype))
    return WeightLaw(
        measured(log_norm, _error(relative)),
        measured(ess, ess * _error(2 * relative - relative_second)),
        shape,
        basis,
    )


def _mean(logs: np.ndarray) -> tuple[float, np.ndarray]:
    """The logarithm of the mean, and all terms relative to the mean."""
    log_mean = float(np.logaddexp.reduce(logs, axis=None) - np.log(logs.size))
    return log_mean, np.exp(logs - log_mean)


def _error(terms: np.ndarray) -> float:
    """The standard error of the mean of terms `(chains, num)`, independent in each chain."""
    chains, num = terms.shape
    return float(np.sqrt(np.sum(np.var(terms, axis=1, ddof=1)) / num) / chains)


@eqx.filter_jit
def trajectories(
    problem: Problem,
    fields: tuple[Field, ...],
    index: int | Array,
    law: scales.Scale,
    times: Array,
    eta: Array,
    chain: int | Array,
    start: Array,
    key: Array,
) -> Trajectories:
    """Trajectories of Q, P* or R, as `chain` says, from the noise `start`, `(n, d)`, with the field
    of this index.
    """
    problem = problem._replace(prior=problem.prior.decomposed())
    interpolant, t = problem.interpolant, times[0]
    x = interpolant.sigma(t) * start
    x = x + interpolant.alpha(t) * jax.vmap(problem.denoise, (None, 0))(t, x)

    def step(state: tuple, interval: tuple) -> tuple[tuple, None]:
        (x, memory, log_ratios), (key, t, u) = state, interval
        key_field, key_noise = jax.random.split(key)
        decay, gain, variance = finite_steps.ancestral_step(interpolant, t, u, eta)
        std = jnp.sqrt(variance)
        strength = law(key, interpolant.snr(t), t, t)
        guided = runs.evaluate(problem, fields, index, strength, key_field, t, x, memory)
        base, tilted = _references(problem, law.final, t, x, guided.denoised)
        shifts = _shifts(gain / std * (guided.denoised - base), gain / std * (tilted - base))
        noise = shifts[chain] + jax.random.normal(key_noise, x.shape, x.dtype)
        moved = decay * x + gain * base + std * noise
        return (moved, guided.memory, log_ratios + _log_ratios(noise, shifts)), None

    state = x, jax.vmap(Fit.none)(x), jnp.zeros((len(_CHAINS), len(x)), x.dtype)
    keys = jax.random.split(key, len(times) - 2)
    (x, _, log_ratios), _ = jax.lax.scan(step, state, (keys, times[:-2], times[1:-1]))
    ends = jax.vmap(problem.denoise, (None, 0))(times[-2], x)
    return Trajectories(ends, law.final * jax.vmap(problem.reward)(ends), log_ratios)


def _references(
    problem: Problem, scale: Array, t: Array, x: Array, guided: Array
) -> tuple[Array, Array]:
    """The denoisers of P and of P* at the states `(n, d)`, the second by a coarse quadrature if the
    reward is not quadratic, or the guided denoiser if there is no quadrature.
    """
    doob = doob_denoiser if problem.form is not None else _COARSE
    alpha, sigma = problem.interpolant.alpha(t), problem.interpolant.sigma(t)

    def one(x: Array, guided: Array) -> tuple[Array, Array]:
        posterior = problem.prior.condition(alpha, sigma, x)
        known = problem.form is not None or len(x) <= 2
        return posterior.mean(), doob(posterior, problem.reward, scale) if known else guided

    return jax.vmap(one)(x, guided)


def _shifts(guided: Array, tilted: Array) -> Array:
    """The shifts of Q, P* and R in standard deviations of a step, `(3, n, d)`."""
    beyond = tilted - guided
    length = jnp.linalg.norm(beyond, axis=-1, keepdims=True)
    cut = jnp.minimum(1, _CUT / jnp.maximum(length, _CUT))
    return jnp.stack([guided, tilted, tilted + cut * beyond])


def _log_ratios(noise: Array, shifts: Array) -> Array:
    """`log P - log` of the densities of a step of each chain, `(3, n)`, for a step from the mean of
    P by `noise` standard deviations.
    """
    square = lambda z: jnp.sum(z**2, axis=-1) / 2
    return square(noise[None] - shifts) - square(noise)[None]
