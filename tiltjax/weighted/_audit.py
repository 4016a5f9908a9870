r"""`audit`: how far a guided sampler is from the tilt, measured by importance weights.

A guided run draws trajectories from a Markov chain Q. The target is P*: the trajectories of the
base chain P, tilted by `exp(scale * r)` of their end. Each trajectory has the weight

    log w = scale * r(x_1) + sum over steps of (log p - log q).

The weights alone determine the following numbers; no exact solution is needed. Z is the normalizing
constant of P*, that of the base chain with these steps:

    evidence bound   E_Q[log w] <= log Z,
    path KL          KL(Q | P*) = log Z - E_Q[log w]  >=  KL(law of the samples | tilt),
    ESS fraction     (sum w)^2 / (n sum w^2)  ->  Z^2 / E_Q[w^2].

The path KL is the divergence of whole trajectories. It is an upper bound for the divergence of the
samples, and it can be large even if the samples are right.

The ESS fraction is meaningful only if the weights have a finite variance. Otherwise a few
trajectories carry most of Z, and the sample may not contain any of them. The tail of the weights
shows this: a generalized Pareto law is fitted to it, whose shape `pareto_k` is 0 for light tails
and reaches 1/2 where the variance becomes infinite. If `pareto_k` is 0.7 or larger, no average of w
is reliable at any number of trajectories (Vehtari et al., arXiv 1507.02646).

Weights contain no information on trajectories that were not drawn. Two examples: all trajectories
of a mode that is never visited; and trajectories that change from one mode to another late, if a
guidance with memory (`Conjugate`) chooses the mode early. The second example can visit both modes,
miss log 2 of log Z, and still have an ESS fraction of 0.9. A test for such omissions is to compare
`log_norm` with that of an audit of weaker guidance, or of scale 0, for which it is 0.

The audit judges the guided *diffusion*, `Ancestral(eta)`, whose last step is a jump to the
unguided denoiser. A flow has no noise, so its trajectories are not trajectories of the base chain.
A flow uses the same guidance, but this report does not describe its output.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _pytree, _repr, _sharding
from tiltjax._tails import RELIABLE, USABLE, pareto_shape
from tiltjax.guidance import Guidance, check
from tiltjax.models import Denoiser
from tiltjax.particles import Particles, effective_numpy
from tiltjax.solvers import Ancestral, Solver
from tiltjax.weighted._smc import SMC, simulate


class Estimated(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float

    def __repr__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


class Audit(_repr.Report):
    """The report of an audit of n guided trajectories.

    - `particles`: the ends of the trajectories with their log-weights. Their weighted means
      estimate expectations under the tilt.
    - `ess`: the effective sample size; `ess_fraction` is `ess / n`.
    - `log_norm`, `evidence_bound`, `path_kl`: estimates with standard errors, in nats. The standard
      error of `log_norm` is a linearization.
    - `pareto_k`: the shape of the generalized Pareto law that is fitted to the largest weights.
    - `mean_reward`: the mean of `scale * r` over the samples without weights.
    - `tilted_reward`: the weighted mean of `scale * r`, an estimate under the tilt.
    - `sampler`: the name of the guidance and the solver, and the size of the run.
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
        """The effective sample size divided by the number of samples."""
        return self.ess / len(self.particles)

    @property
    def reliable(self) -> bool:
        """Whether the tail of the weights is light enough for the averages of this report."""
        return self.pareto_k < USABLE

    @property
    def verdict(self) -> str:
        """The conclusion in one line."""
        kl = self.path_kl.value
        if not self.reliable:
            return (
                f"Not known: the weights' tail is too heavy (Pareto k = {self.pareto_k:.2f}). The "
                "tilt has mass where there are almost no trajectories. Without that mass the path "
                f"KL is about {kl:.2g} nats. Take more steps, or a damped scale, Tilted, Conjugate "
                "or Laplace."
            )
        # For log-normal weights the ESS fraction is exp(-2 KL). If exp(-2 KL) is much smaller than
        # the measured fraction, then most samples have almost no weight.
        good = min(self.ess_fraction, math.exp(-2 * max(kl, 0.0)))
        if good > 0.9:
            return (
                f"Tilting: the effective sample size is {self.ess_fraction:.0%}, path KL {kl:.2g} "
                "nats."
            )
        if good > 0.2:
            return (
                f"Nearly: the effective sample size is {self.ess_fraction:.0%}, path KL {kl:.2g} "
                "nats. smc corrects the rest by weights, in regions that the samples reach."
            )
        return (
            f"Not tilting: the effective sample size is {self.ess_fraction:.1%}, path KL {kl:.2g} "
            "nats (an upper bound for the KL of the samples). Take more steps, use a damped scale, "
            "Tilted, Conjugate, Laplace, or smc."
        )

    def _title(self) -> str:
        return self.verdict

    def _rows(self) -> dict[str, str]:
        # Where the tail is too heavy, weighted averages have no known error.
        unknown = lambda average: f"{average.value:.4g} (error not known)"
        shown = str if self.reliable else unknown
        tilted = shown(self.tilted_reward)
        return {
            "judged": self.sampler,
            "ESS fraction": f"{self.ess_fraction:.3g} ({self.ess:.4g} of {len(self.particles)})",
            "Pareto k of the tail": f"{self.pareto_k:.2f} (" + _tail(self.pareto_k) + ")",
            "log Z": shown(self.log_norm),
            "evidence bound": str(self.evidence_bound),
            "path KL": f"{shown(self.path_kl)} nats",
            "scale * reward": f"{self.mean_reward} sampled, {tilted} under the tilt",
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
    """A report of how far `num` guided trajectories are from the tilt.

    The guidance must have a reward; it need not have a `log_h`, because the weights only need
    `guidance.log_tilt`. **Arguments:** as in `smc`. The report consists of numbers, so `audit`
    cannot be called under `jit`.

    **Raises:** as `smc`; `ValueError` for fewer than 100 particles, which are too few to fit a
    tail.
    """
    num = _checks.count(num, "num")
    if num < 100:
        raise ValueError(f"an audit needs 100 particles or more to judge a tail, got num={num}")
    _checks.instance(
        model, Denoiser, "model", "use Analytic, from_velocity, from_noise or from_denoiser"
    )
    check(guidance, model)
    # A guidance without a reward raises its error here, before the run.
    cast = _pytree.cast(guidance, model.dtype)
    jax.eval_shape(cast.log_tilt, jax.ShapeDtypeStruct(model.shape, model.state_dtype))
    run = SMC(
        model, guidance, num=num, steps=steps, times=times, solver=solver, ess_threshold=0.0,
        chunk_size=chunk_size, sharding=sharding,
    )  # fmt: skip
    particles, _ = simulate(_checks.key(key), run, progress)
    if not _checks.concrete(particles):
        raise ValueError("an audit is a report of numbers: call it outside of jit, vmap and grad")
    rewards = _sharding.gathered(_rewards(cast, particles.x, chunk_size or num)).astype(np.float64)
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
    # -inf if a weight is zero: the tilt excludes a sample, and the divergence is infinite.
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


def _tail(shape: float) -> str:
    if shape < RELIABLE:
        return "the weights have a finite variance"
    return "slow, but usable" if shape < USABLE else "too heavy: averages are not reliable"
