r"""Guidance: estimates of `log h_t(x) = log E[exp(scale * r(X_1)) | X_t = x]` and of its gradient.

Adding `∇ log h` to the score turns a sampler of `rho` into one of the tilt `rho exp(scale * r)`
(Doob's h-transform). Every method here is a choice along four axes:

| guidance | posterior | draws | scale | gain |
|---|---|---|---|---|
| `Doob(model, log_h)` | all of it, in closed form | | | 1 |
| `PlugIn(posterior, reward, scale, k)` | any | k | any law | 1 |
| `dps(model, reward, scale)` | `Tweedie` | 1 | any law | 1 |
| `fmrg(model, reward, scale)` | `FlowMap` | 1 | any law | `2 / g_t^2` |
| `Laplace(model, reward, scale)` | a Gaussian at the denoiser | | constant | 1 |
| `Conjugate(model, reward, scale)` | see its docstring | | constant | 1 |
| `Tuned(base, tuned, weight)` | a model that was fine-tuned: see its docstring | | | 1 |

and `Clipped`, `Normalized` and `Unscaled` wrap any of them, as do those of
`tiltjax.guidance.wrappers`. What they sample is not the tilt, in general: `theory` says by how
much.

A guidance is called as `guidance(key, t, x, state) -> (Estimate, state)` for one sample. One call
returns everything that shares network evaluations and draws; what moves a sampler is the tilted
denoiser

    D~_t(x) = E[X_1 | X_t = x] under the tilt = D_t(x) + (sigma_t^2 / alpha_t) ∇ log h_t(x).

`log_tilt(x1)` is the exact `scale * r(x1)` at the data end; `final_log_potential(x1, state)` is
what weighted trajectories are completed to, the same unless the target is not a reward's tilt.

References: Dandapanthula and Boffi (arXiv 2606.02884); Chung et al. (arXiv 2209.14687, DPS); FMRG
is the unscaled flow-map guidance analyzed in the first.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _pytree, _repr
from tiltjax.interpolants import Interpolant
from tiltjax.models import Denoiser
from tiltjax.particles import Failures
from tiltjax.solvers import Solver


class Estimate(NamedTuple):
    """What one call of a guidance knows of a state `x` at time `t`.

    - `tilted`: the estimate of the tilted denoiser `D~_t(x)`, of the shape of `x`.
    - `denoised`: the unguided `D_t(x)`, or `None` if the guidance has no need of it (it would cost
      one more network call).
    - `log_h`: the estimate of `log h_t(x)`, a scalar, or `None` if the guidance only proposes.

    **Raises:** `ValueError` where a score is asked of an estimate without `denoised`.
    """

    tilted: Array
    denoised: Array | None = None
    log_h: Array | None = None

    @classmethod
    def from_score(
        cls, interpolant: Interpolant, t: Array, denoised: Array, log_h: Array | None, score: Array
    ) -> "Estimate":
        """An estimate from `score`, that of `∇ log h_t(x)`; `t > 0`."""
        return cls(denoised + interpolant.tweedie(t) * score, denoised, log_h)

    def score(self, interpolant: Interpolant, t: Array) -> Array:
        """`∇ log h_t(x)`. **Raises:** as `shift`."""
        return self.shift() / interpolant.tweedie(t)

    def shift(self) -> Array:
        """`D~ - D`. **Raises:** `ValueError` where the unguided denoiser is not known."""
        if self.denoised is None:
            raise ValueError(
                "this guidance gives the tilted denoiser alone: the unguided one is needed for a "
                "score"
            )
        return self.tilted - self.denoised


class Guidance(_repr.Printable):
    """An estimator of the tilt's h-function.

    Subclasses define `__call__`, `log_tilt` and `model`, the one they guide; `init` if they have
    memory; and, if the memory is the history of a trajectory rather than a warm start,
    `needs_every_state`, `final_log_potential` and `check_run`.
    """

    _always = ("k", "iterations", "draws")

    model: eqx.AbstractVar[Denoiser]

    @property
    def needs_every_state(self) -> bool:
        """Whether the memory has to see every state of a path: `smc` then asks at each, also where
        nothing is weighed.
        """
        return False

    def init(self, x: Array) -> Any:
        """The memory carried along one trajectory, `()` for most."""
        return ()

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        raise NotImplementedError

    def log_tilt(self, x1: Array) -> Array:
        """`scale * r(x1)`, exactly: what `log h` is at t = 1."""
        raise NotImplementedError

    def final_log_potential(self, x1: Array, state: Any) -> Array:
        """The sum of all log-potentials of a trajectory that ends at `x1`, `log_tilt(x1)`; `state`
        is the memory after its last call.
        """
        return self.log_tilt(x1)

    def check_run(self, times: Array, weighted_solver: Solver | None = None) -> None:
        """Refuse, with a `ValueError`, times or a noise that do not suit; `weighted_solver` is the
        solver of a weighted run, `None` in `sample`.
        """


def check(guidance: Guidance, model: Denoiser, name: str = "guidance") -> None:
    """Refuse what is no guidance of this model."""
    _checks.instance(guidance, Guidance, name, "use PlugIn, Conjugate, Laplace, Doob, dps or fmrg")
    if not _pytree.same(guidance.model, model):
        raise ValueError(
            f"the {name} is built on another model ({type(guidance.model).__name__}) than the one "
            "to sample "
            f"({type(model).__name__}): build it on the same model object"
        )


def failures(x: Array, estimate: Estimate) -> Failures:
    """What an estimate at a state shows to have failed: a state that is not finite explains
    everything after it.
    """
    unguided = estimate.tilted if estimate.denoised is None else estimate.denoised
    wrong = lambda value: ~jnp.isfinite(value)
    # A denoiser of tokens has an axis more than its state.
    before = wrong(x).reshape(x.shape + (1,) * (unguided.ndim - x.ndim))
    failed = Failures.of(before, denoiser=wrong(unguided), shift=wrong(estimate.tilted)).first()
    if estimate.log_h is None:
        return failed
    # -inf is a value like any other: a constraint that is violated.
    log_h = Failures.of(log_h=~(estimate.log_h < jnp.inf))
    return Failures(jnp.maximum(failed.number, log_h.number))
