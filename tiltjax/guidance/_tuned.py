"""A fine-tuned model as a guidance of its base model, with exact weights. The docstring of
`tiltjax.models._annealed` derives the weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg, rewards
from tiltjax.guidance._base import Estimate, Guidance
from tiltjax.models import Model, Weight, average, check_pair, weight_at, weight_schedule
from tiltjax.solvers import Ancestral, Solver


class TunedState(NamedTuple):
    """The memory of `Tuned` along a trajectory: the last time `t` and state `x`; both denoisers
    there, `base` and `tuned`, of the shape of `x`; and the scalar `log_ratio`, the log-density L of
    Q with respect to P so far.
    """

    t: Array
    x: Array
    base: Array
    tuned: Array
    log_ratio: Array


class Tuned(Guidance):
    """A fine-tuned (or conditional) model as a guidance of its base model, with a twist that makes
    weighted particles exact.

    Let p be the law of `base`, q the law of `tuned`, and g the value of `weight` at t = 1. The
    particles of `smc(key, base, Tuned(base, tuned, weight), num=n)` tend to the law `p^(1 - g) q^g`
    (normalized) as the number of particles grows and the steps shrink. `log_norm` tends to the log
    of the integral of `p^(1 - g) q^g`.

    With a `reward` the target is the tilt `p exp(scale * reward)`, which the tuned model
    approximates. The solver must be `Ancestral(1)`, because only its noise is memoryless. Under
    `sample` the particles move as under `Annealed(base, tuned, weight)`, and `log_h` has no
    meaning. `Tuned` is called at every state of a trajectory, even if the schedule does not weigh
    particles there. A call costs two denoiser calls.

    **Arguments:** `base`, `tuned`: models with the same states and interpolant; `weight`: as in
    `Annealed` (a function of t as an Equinox module), 1 by default. Any finite number is allowed.
    Outside [0, 1] the weights of particles may have heavy tails, and `p^(1 - g) q^g` must have a
    finite integral. `reward` and `scale >= 0`: of the tilt.

    **Raises:** `ValueError` for models that do not match, a weight that is not finite at some time,
    or a scale without a reward; `TypeError` for a plain function as the weight.
    """

    base: Model
    tuned: Model
    weight: Any
    reward: rewards.Reward | None
    scale: Array

    def __init__(
        self,
        base: Model,
        tuned: Model,
        weight: Weight = None,
        *,
        reward: Callable | None = None,
        scale: float | Array = 1.0,
    ):
        check_pair(base, tuned, "Tuned(base, tuned, weight)")
        self.base, self.tuned = base, tuned
        weight = 1.0 if weight is None else weight
        if callable(weight) and not isinstance(weight, eqx.Module):
            # A reward could pass as a weight: it also accepts a number, and Tuned accepts any
            # finite value.
            raise TypeError(
                "the third argument of Tuned is a weight, got "
                f"{getattr(weight, '__name__', type(weight).__name__)}: pass a reward by name, "
                "reward=; a weight is a number, power(p), step(f), or a function of t as an "
                "equinox.Module"
            )
        if callable(weight):
            self.weight = weight_schedule(weight, base.dtype)
        else:
            self.weight = _checks.finite(weight, "weight", 0)
        self.reward = None if reward is None else rewards.as_reward(reward)
        self.scale = _checks.nonnegative(scale, "scale")
        if reward is None and not (_checks.concrete(scale) and np.asarray(scale) == 1):
            raise ValueError(
                "scale multiplies a reward, but reward is None: pass reward=, or change weight"
            )

    @property
    def model(self) -> Model:
        return self.base

    @property
    def needs_every_state(self) -> bool:
        return True

    def check_run(self, times: Array, weighted_solver: Solver | None = None) -> None:
        """Raise a `ValueError` for times at which the tuned model was not trained, and for weighted
        runs with another noise than `Ancestral(1)`.
        """
        self.tuned.check_times(times)
        if weighted_solver is None:
            return
        eta = weighted_solver.eta if isinstance(weighted_solver, Ancestral) else None
        if eta is None or (_checks.concrete(eta) and np.asarray(eta) != 1):
            got = (
                f"Ancestral({float(np.asarray(eta)):g})"
                if eta is not None
                else type(weighted_solver).__name__
            )
            raise ValueError(
                "Tuned weighs particles by a density ratio that is exact only for memoryless "
                f"noise: use Ancestral(1), got {got}"
            )

    def init(self, x: Array) -> TunedState:
        """The memory before the first call. Its time is 1, so that the first call does not count as
        a step forward in time.
        """
        zero = jnp.zeros((), x.dtype)
        return TunedState(
            jnp.ones((), x.dtype), jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros_like(x), zero
        )

    def __call__(
        self, key: Array, t: Array, x: Array, state: TunedState
    ) -> tuple[Estimate, TunedState]:
        t = jnp.asarray(t, x.dtype)
        base, tuned = self.base.denoise(t, x), self.tuned.denoise(t, x)
        log_ratio = state.log_ratio + self._log_ratio_of_step(state, t, x)
        g = weight_at(self.weight, t)
        estimate = Estimate(average(g, base, tuned), base, g * log_ratio)
        return estimate, TunedState(t, x, base, tuned, log_ratio)

    def log_tilt(self, x1: Array) -> Array:
        if self.reward is None:
            raise ValueError(
                "this Tuned has no reward, and its target p^(1 - g) q^g is no tilt by a reward: "
                "pass reward= and scale="
            )
        return self.scale * rewards.value(self.reward, x1)

    def final_log_potential(self, x1: Array, state: TunedState) -> Array:
        if self.reward is not None:
            return self.log_tilt(x1)
        return weight_at(self.weight, jnp.ones_like(state.t)) * state.log_ratio

    def _log_ratio_of_step(self, last: TunedState, t: Array, x: Array) -> Array:
        """`log K_q / K_p` of the step from the last state to `(t, x)`; 0 if that is not a step
        forward, such as a stage of a flow solver.
        """
        later = t > last.t
        # A select evaluates both branches: without a step, any two valid times are good.
        kernel = Ancestral(jnp.ones_like(t)).kernel(
            self.base.interpolant, jnp.where(later, last.t, 0.25), jnp.where(later, t, 0.5)
        )
        moves = later & (
            kernel.std > 0
        )  # two times may be so close that rounding leaves no noise between them
        std = jnp.where(moves, kernel.std, 1.0)
        noise = (x - kernel.keep * last.x - kernel.gain * last.base) / std
        shift = kernel.gain * (last.tuned - last.base) / std
        return jnp.where(moves, _linalg.inner(shift, noise - shift / 2), 0.0)
