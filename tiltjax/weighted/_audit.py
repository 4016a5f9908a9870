r"""`audit`: are we really tilting?

A guided run draws trajectories from a chain Q, and wants them from P*, the base chain P tilted by
`exp(scale * r)` of its end. Each trajectory has a weight,

    log w = scale * r(x_1) + sum over steps of (log p - log q),

and the weights say the rest, with or without a known truth: with `Z = E_Q[w]`, the base chain's own
normalizing constant,

    evidence bound   E_Q[log w] <= log Z,
    path KL          KL(Q | P*) = log Z - E_Q[log w]  >=  KL(law of the samples | tilt),
    ESS fraction     (sum w)^2 / (n sum w^2)  ->  Z^2 / E_Q[w^2].

The divergence is that of whole trajectories: it bounds the error of the samples from above, and can
be large where they are right. The ESS fraction means something only if the weights have a variance:
few trajectories may carry most of Z, and be missing from the sample. The tail of the weights tells:
they are compared with a generalized Pareto law, whose shape `pareto_k` is 0 for light tails and 1/2
where the variance ends. From .7 on nothing that rests on averages of w can be trusted, whatever the
number of trajectories (Vehtari et al., arXiv 1507.02646).

No weights know of trajectories that are not drawn: those to a mode that is not visited, or those
that change their mind where a guidance with memory (`Conjugate`) commits to one of two modes early,
visits both, and misses log 2 of log Z with an ESS fraction of .9. `log_norm` that disagrees with
that of an audit of weaker guidance (or of scale 0, where it is 0) says that there are some.

What is judged is the guided *diffusion* (`Ancestral(eta)`, whose last jump is not guided): a flow
has no noise, and no trajectory of it is one of the base chain's. It uses the same guidance, but
this report is not about its output.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _repr, _sharding
from tiltjax.guidance import Guidance, check
from tiltjax.models import Denoiser
from tiltjax.particles import Particles, effective_numpy
from tiltjax.solvers import Ancestral, Solver
from tiltjax.weighted._smc import smc

RELIABLE, USABLE = 0.5, 0.7


class Estimated(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float

    def __repr__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


class Audit(_repr.Report):
    """What the weights of n guided trajectories say.

    - `particles`: the trajectories' ends with their log-weights; weighted means of them are
      estimates under the tilt.
    - `ess`: the effective sample size; `ess_fraction` is `ess / n`.
    - `log_norm`, `evidence_bound`, `path_kl`: with standard errors, in nats. That of `log_norm` is
      by linearization.
    - `pareto_k`: the shape of the weights' tail.
    - `mean_reward`: of the samples as they are, times scale; `tilted_reward`: of the weighted ones.
    - `sampler`: what was judged.
    """

    particles: Particles
    ess: float
    log_norm: Estimated
    evidence_bound: Estimated
    path_kl: Estimated
    pareto_k: float
    mean_reward: Estimated
    tilted_reward: Estimated
    sampler: str = eqx.field(static=True)

    @property
    def ess_fraction(self) -> float:
        """The effective sample size as a fraction of the samples."""
        return self.ess / len(self.particles)

    @property
    def reliable(self) -> bool:
        """Whether the weights' tail allows to trust the averages of this report."""
        return self.pareto_k < USABLE

    @property
    def verdict(self) -> str:
        """One line."""
        kl = self.path_kl.value
        if not self.reliable:
            return (
                f"Not known: the weights' tail is too heavy (Pareto k = {self.pareto_k:.2f}); the "
                "tilt has mass that these trajectories do not reach. "
                f"As far as they do, the path KL is about {kl:.2g} nats."
            )
        # Log-normal weights have a fraction of exp(-2 KL). Where the divergence says less, most
        # samples carry hardly any weight.
        good = min(self.ess_fraction, math.exp(-2 * max(kl, 0.0)))
        if good > 0.9:
            return f"Tilting: {self.ess_fraction:.0%} of the samples count, path KL {kl:.2g} nats."
        if good > 0.2:
            return (
                f"Nearly: {self.ess_fraction:.0%} of the samples count, path KL {kl:.2g} nats. "
                "Weighted, as smc does, they are the tilt as far as they reach."
            )
        return (
            f"Not tilting: {self.ess_fraction:.1%} of the samples count, path KL {kl:.2g} nats (an "
            "upper bound for the samples themselves). Damp, use Tilted, Conjugate or Laplace, or "
            "weigh by smc."
        )

    def _title(self) -> str:
        return self.verdict

    def _rows(self) -> dict[str, str]:
        return {
            "judged": self.sampler,
            "ESS fraction": f"{self.ess_fraction:.3g} ({self.ess:.4g} of {len(self.particles)})",
            "Pareto k of the tail": f"{self.pareto_k:.2f} (" + _tail(self.pareto_k) + ")",
            "log Z": str(self.log_norm),
            "evidence bound": str(self.evidence_bound),
            "path KL": f"{self.path_kl} nats",
            "scale * reward": f"{self.mean_reward} sampled, {self.tilted_reward} under the tilt",
        }


def audit(
    key: Array,
    model: Denoiser,
    guidance: Guidance,
    *,
    num: int,
    steps: int | None = None,
    times: Array | None = None,
    solver: Solver | None = None,
    chunk_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = False,
) -> Audit:
    """Weigh `num` guided trajectories, and report how far they are from the tilt.

    Any guidance of a reward will do, with `log_h` or without: weights need `guidance.log_tilt`
    alone. **Arguments:** as in `smc`. Not to be called under `jit`: a report is made of numbers.

    **Raises:** as `smc`; `ValueError` for fewer than 100 particles, of which no tail can be judged.
    """
    num = _checks.count(num, "num")
    if num < 100:
        raise ValueError(f"an audit needs 100 particles or more to judge a tail, got num={num}")
    _checks.instance(
        model, Denoiser, "model", "use Analytic, from_velocity, from_noise or from_denoiser"
    )
    check(guidance, model)
    # A guidance without a reward is refused now, not after the run.
    jax.eval_shape(guidance.log_tilt, jax.ShapeDtypeStruct(model.shape, model.state_dtype))
    particles = smc(
        key, model, guidance, num=num, steps=steps, times=times, solver=solver, ess_threshold=0.0,
        chunk_size=chunk_size, sharding=sharding, progress=progress,
    )  # fmt: skip
    if not _checks.concrete(particles):
        raise ValueError("an audit is a report of numbers: call it outside of jit, vmap and grad")
    rewards = _sharding.gathered(_rewards(guidance, particles.x, chunk_size or num)).astype(
        np.float64
    )
    assert particles.trace is not None
    solver = model.default_solver(Ancestral()) if solver is None else solver
    steps = len(particles.trace.times) - 1
    sampler = f"{type(guidance).__name__} on {type(solver).__name__}"
    return report(particles, rewards, f"{sampler}, {steps} steps, {num} particles")


@_callbacks.compiled
def _rewards(guidance: Guidance, x: Array, chunk_size: int) -> Array:
    return jax.lax.map(guidance.log_tilt, x, batch_size=chunk_size)


def report(particles: Particles, rewards: np.ndarray, sampler: str) -> Audit:
    """The audit of weighted particles with the rewards `scale * r` of their ends, `(n,)`."""
    log_weights = _sharding.gathered(particles.log_weights).astype(np.float64)
    n = len(log_weights)
    top = log_weights.max()
    weights = np.exp(log_weights - top)
    mean = weights.mean()
    relative = weights / mean  # of mean one
    log_norm = float(np.log(mean) + top)
    # A weight of zero: the tilt excludes what was sampled, and the divergence is infinite.
    bound = float(log_weights.mean())
    spread = lambda values: (
        float(np.std(values, ddof=1) / np.sqrt(n)) if np.all(np.isfinite(values)) else math.inf
    )
    tilted = (
        float(np.mean(relative * rewards))
        if np.all(np.isfinite(rewards))
        else float(np.sum(relative * np.where(relative > 0, rewards, 0.0)) / n)
    )
    centered = np.where(relative > 0, rewards - tilted, 0.0)
    return Audit(
        particles=particles,
        ess=float(effective_numpy(log_weights)),
        log_norm=Estimated(log_norm, spread(relative)),
        evidence_bound=Estimated(bound, spread(log_weights)),
        path_kl=Estimated(log_norm - bound, spread(relative - log_weights)),
        pareto_k=pareto_shape(log_weights),
        mean_reward=Estimated(float(rewards.mean()), spread(rewards)),
        tilted_reward=Estimated(tilted, spread(relative * centered)),
        sampler=sampler,
    )


def pareto_shape(log_weights: Array | np.ndarray) -> float:
    """The shape k of a generalized Pareto law fitted to the largest weights: their p-th moment is
    finite for p < 1/k.

    The largest `min(n / 5, 3 sqrt(n))` exceedances, by the estimator of Zhang and Stephens (2009),
    with the weak prior towards 1/2 of Vehtari et al. (arXiv 1507.02646). Equal weights have no
    tail: `-inf`.
    """
    log_weights = np.sort(np.asarray(log_weights, np.float64))
    n = len(log_weights)
    tail = int(np.ceil(min(n / 5, 3 * np.sqrt(n))))
    if tail < 5:
        raise ValueError(f"the tail of {n} weights cannot be judged: take 25 or more")
    weights = np.exp(log_weights - log_weights[-1])
    excess = weights[-tail:] - weights[-tail - 1]
    if excess[-1] <= 1e-12:
        return float("-inf")
    excess = np.maximum(excess, 1e-300)
    # Profile likelihood in theta = k / scale, averaged over a grid of its quantiles.
    count = 30 + int(np.sqrt(tail))
    quartile = excess[int(tail / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - np.sqrt(count / (np.arange(count) + 0.5))) / (3 * quartile)
    shapes = np.mean(np.log1p(-theta[:, None] * excess[None]), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = tail * (np.log(-theta / shapes) - shapes - 1)
    likelihood = np.where(np.isfinite(likelihood), likelihood, -np.inf)
    posterior = np.exp(likelihood - likelihood.max())
    best = float(np.sum(theta * posterior) / np.sum(posterior))
    shape = float(np.mean(np.log1p(-best * excess)))
    return (shape * tail + 0.5 * 10) / (tail + 10)


def _tail(shape: float) -> str:
    if shape < RELIABLE:
        return "the weights have a variance"
    return "slow, but usable" if shape < USABLE else "too heavy: averages are not to be trusted"
