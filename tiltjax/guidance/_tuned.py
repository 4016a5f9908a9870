"""A fine-tuned model as a guidance of its base model, with exact weights:
`tiltjax.models._annealed` has the mathematics.
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
    """What `Tuned` remembers of a path: its last time `t` and state `x`, both denoisers there,
    `base` and `tuned`, of the shape of `x`, and the scalar `log_ratio`, L, the log-density of Q
    against P so far.
    """

    t: Array
    x: Array
    base: Array
    tuned: Array
    log_ratio: Array


class Tuned(Guidance):
    """A fine-tuned (or conditional) model as a guidance of its base, with the twist that makes
    weighted particles exact.

    `smc(key, base, Tuned(base, tuned, weight), num=n)` is `p^(1 - g) q^g` at `g(1)`, for any
    `weight`, and `log_norm` the log of its integral, as particles are added and steps made small;
    with a `reward` it is the tilt `p exp(scale * reward)`, of which the tuned model is a guess.
    Only `Ancestral(1)` will do, whose noise is memoryless. Under `sample` it moves as
    `Annealed(base, tuned, weight)` does, and `log_h` says nothing. It sees every state of a path,
    also where a schedule weighs nothing: two denoiser calls for each.

    **Arguments:** `base`, `tuned`: models of the same states with the same interpolant; `weight`:
    as in `Annealed` (a function of t as an Equinox module), by default 1, and any finite number,
    also outside [0, 1], where the weights of particles may have heavy tails and `p^(1 - g) q^g`
    must have an integral; `reward` and `scale >= 0`: of the tilt. **Raises:** `ValueError` for
    models that do not fit together, a weight that is not finite at some time, a scale without a
    reward; `TypeError` for a function in the place of the weight.
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
        check_pair(base, tuned, "Tuned")
        self.base, self.tuned = base, tuned
        weight = 1.0 if weight is None else weight
        if callable(weight) and not isinstance(weight, eqx.Module):
            # A reward would do as one: it takes a number, too, and Tuned any finite answer.
            raise TypeError(
                "the third argument of Tuned is a weight, got "
                f"{getattr(weight, '__name__', type(weight).__name__)}: "
                "a reward goes by name, "
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
                "scale multiplies a reward, and there is none: give reward=, or change weight"
            )

    @property
    def model(self) -> Model:
        return self.base

    @property
    def needs_every_state(self) -> bool:
        return True

    def check_run(self, times: Array, weighted_solver: Solver | None = None) -> None:
        """Refuse times at which the tuned model was not trained, and weighted runs whose noise is
        not `Ancestral(1)`'s.
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
                "Tuned weighs by the ratio of two models' densities, which paths tell under "
                f"memoryless noise alone: use Ancestral(1), got {got}"
            )

    def init(self, x: Array) -> TunedState:
        """The memory before the first call: no state comes after t = 1."""
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
                "this Tuned is no tilt by a reward, its target p^(1 - g) q^g has no scale * r(x): "
                "give reward= and scale="
            )
        return self.scale * rewards.value(self.reward, x1)

    def final_log_potential(self, x1: Array, state: TunedState) -> Array:
        if self.reward is not None:
            return self.log_tilt(x1)
        return weight_at(self.weight, jnp.ones_like(state.t)) * state.log_ratio

    def _log_ratio_of_step(self, last: TunedState, t: Array, x: Array) -> Array:
        """`log K_q / K_p` of the step from the last state to `(t, x)`; 0 where that is no step
        forward, as in stages of a flow's solver.
        """
        later = t > last.t
        # Any two times will do where there was no step: both sides of a select need a value.
        kernel = Ancestral(jnp.ones_like(t)).kernel(
            self.base.interpolant, jnp.where(later, last.t, 0.25), jnp.where(later, t, 0.5)
        )
        moves = later & (
            kernel.std > 0
        )  # times so close that rounding leaves no noise between them
        std = jnp.where(moves, kernel.std, 1.0)
        noise = (x - kernel.keep * last.x - kernel.gain * last.base) / std
        shift = kernel.gain * (last.tuned - last.base) / std
        return jnp.where(moves, _linalg.inner(shift, noise - shift / 2), 0.0)
