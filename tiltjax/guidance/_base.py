r"""Guidance: estimates of `log h_t(x) = log E[exp(scale * r(X_1)) | X_t = x]` and of its gradient.

Adding `∇ log h` to the score turns a sampler of `rho` into a sampler of the tilt
`rho exp(scale * r)` (Doob's h-transform). Every method here is a choice along four axes:

| guidance | posterior | draws | scale | gain |
|---|---|---|---|---|
| `Doob(model, log_h)` | exact, in closed form | | | 1 |
| `PlugIn(posterior, reward, scale, k)` | any | k | any law | 1 |
| `dps(model, reward, scale)` | `Tweedie` | 1 | any law | 1 |
| `fmrg(model, reward, scale)` | `FlowMap` | 1 | any law | `2 / g_t^2` |
| `Laplace(model, reward, scale)` | a Gaussian at the denoiser | | constant | 1 |
| `Conjugate(model, reward, scale)` | see its docstring | | constant | 1 |
| `Tuned(base, tuned, weight)` | a fine-tuned model: see its docstring | | | 1 |

`Clipped`, `Normalized`, `Unscaled` and the other classes of `tiltjax.guidance.wrappers` wrap any
guidance. In general, the samples of a guidance do not have the law of the tilt; `theory` gives the
difference.

A guidance is called as `guidance(key, t, x, state) -> (Estimate, state)` for one sample. One call
returns everything that shares network evaluations and draws. The sampler moves by the tilted
denoiser

    D~_t(x) = E[X_1 | X_t = x] under the tilt = D_t(x) + (sigma_t^2 / alpha_t) ∇ log h_t(x).

`log_tilt(x1)` is the exact `scale * r(x1)` at t = 1. `final_log_potential(x1, state)` is the sum of
the log-potentials of a complete weighted trajectory. It equals `log_tilt(x1)` unless the target is
not the tilt by a reward.

References: Dandapanthula and Boffi (arXiv 2606.02884), who also analyze FMRG, the unscaled flow-map
guidance; Chung et al. (arXiv 2209.14687, DPS).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _pytree, _repr
from tiltjax.interpolants import Interpolant
from tiltjax.models import Denoiser
from tiltjax.particles import Failures
from tiltjax.solvers import Solver


class Estimate(NamedTuple):
    """The estimates of one call of a guidance at a state `x` and time `t`.

    - `tilted`: the estimate of the tilted denoiser `D~_t(x)`, of the shape of `x`.
    - `denoised`: the unguided `D_t(x)`, or `None` if the guidance does not compute it (which would
      cost one more network call).
    - `log_h`: the estimate of `log h_t(x)`, a scalar, or `None` if the guidance only proposes.
    """

    tilted: Array
    denoised: Array | None = None
    log_h: Array | None = None

    @classmethod
    def from_score(
        cls, interpolant: Interpolant, t: Array, denoised: Array, log_h: Array | None, score: Array
    ) -> "Estimate":
        """An estimate from `score`, an estimate of `∇ log h_t(x)`; `t > 0`."""
        return cls(denoised + interpolant.tweedie(t) * score, denoised, log_h)

    def score(self, interpolant: Interpolant, t: Array) -> Array:
        """`∇ log h_t(x)`. **Raises:** as `shift`."""
        return self.shift() / interpolant.tweedie(t)

    def shift(self) -> Array:
        """`D~ - D`. **Raises:** `ValueError` if `denoised` is `None`."""
        if self.denoised is None:
            raise ValueError(
                "this guidance returns the tilted denoiser only, and a score also needs the "
                "unguided denoiser: return Estimate(tilted, denoised)"
            )
        return self.tilted - self.denoised


class Guidance(_repr.Printable):
    """An estimator of the tilt's h-function.

    Subclasses define `__call__`, `log_tilt` and the field `model`, the model that they guide. A
    guidance with memory also defines `init`. If the memory is the history of a trajectory rather
    than a warm start, the guidance also defines `needs_every_state`, `final_log_potential` and
    `check_run`.
    """

    _always = ("k", "iterations", "draws")

    model: eqx.AbstractVar[Denoiser]

    def __new__(cls, *args: Any, **kwargs: Any):
        # Equinox finds out later, with an error that names only the field.
        if "model" in cls.__abstractvars__:
            raise TypeError(
                f"{cls.__name__} has no field model, the model that it guides: declare "
                "`model: tiltjax.Model` in the class, and assign it if the class has an __init__"
            )
        return super().__new__(cls)

    def __check_init__(self):
        _pytree.check_object(self)

    @property
    def needs_every_state(self) -> bool:
        """Whether the guidance must be called at every state of a trajectory. `smc` then calls it
        at every step, also at steps without weighing.
        """
        return False

    @property
    def guides_start(self) -> bool:
        """Whether `tilted` estimates the mean of the tilt near t = 0, so that a run can start from
        it. Otherwise runs start from the unguided denoiser, which the estimate must contain.
        """
        return True

    @property
    def score_at_noise(self) -> Array | None:
        """The length of the score near t = 0, if it does not depend on the reward there. `smc` then
        checks that its noise is wide enough for it.
        """
        return None

    def init(self, x: Array) -> Any:
        """The initial memory of one trajectory; `()` for most guidances."""
        return ()

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be called: define __call__(self, key, t, x, state), "
            "which returns (Estimate, state)"
        )

    def log_tilt(self, x1: Array) -> Array:
        """`scale * r(x1)`, exactly: the value of `log h` at t = 1."""
        raise NotImplementedError(
            f"{type(self).__name__} has no log_tilt, which completes the weights at the end: "
            "define log_tilt(self, x1), which returns scale * r(x1)"
        )

    def final_log_potential(self, x1: Array, state: Any) -> Array:
        """The sum of all log-potentials of a trajectory that ends at `x1`, by default
        `log_tilt(x1)`. `state` is the memory after the last call.
        """
        return self.log_tilt(x1)

    def check_run(self, times: Array, weighted_solver: Solver | None = None) -> None:
        """Raise a `ValueError` if the guidance does not support these times or this noise.
        `weighted_solver` is the solver of a weighted run, `None` in `sample`.
        """


def check(guidance: Guidance, model: Denoiser, name: str = "guidance") -> None:
    """Check that `guidance` is a guidance of this model. **Raises:** `TypeError`, `ValueError`."""
    _checks.instance(
        guidance,
        Guidance,
        name,
        "use PlugIn, Conjugate, Laplace, Doob, dps or fmrg, or subclass tiltjax.guidance.Guidance",
    )
    if not _pytree.same(guidance.model, model):
        raise ValueError(
            f"the {name} is built on another model ({type(guidance.model).__name__}) than the one "
            f"to sample ({type(model).__name__}): build it on the same model object"
        )
    for part in _of_users(guidance):
        _check_result(part)


def _of_users(guidance: Guidance) -> list[Guidance]:
    """The guidances in a guidance whose classes are not of this library."""
    found = lambda node: isinstance(node, Guidance) and not _is_ours(node)
    return [node for node in jax.tree.leaves(guidance, is_leaf=found) if found(node)]


def _is_ours(guidance: Guidance) -> bool:
    return type(guidance).__module__.partition(".")[0] == "tiltjax"


def _check_result(guidance: Guidance) -> None:
    """Raise a `TypeError` if a call of the guidance does not return `(Estimate, state)`."""
    model = guidance.model
    t, x = (
        jax.ShapeDtypeStruct((), model.dtype),
        jax.ShapeDtypeStruct(model.shape, model.state_dtype),
    )

    def call(t: Array, x: Array) -> None:
        own = _pytree.cast(guidance, model.dtype)
        results.append(own(jax.random.key(0), t, x, own.init(x)))

    results: list[Any] = []
    try:
        jax.eval_shape(call, t, x)
    except Exception:  # the run raises it, with the frames of the run
        return
    (result,) = results
    pair = isinstance(result, tuple) and not isinstance(result, Estimate) and len(result) == 2
    if not (pair and isinstance(result[0], Estimate)):
        name = lambda value: "Array" if isinstance(value, Array) else type(value).__name__
        got = name(result)
        if pair:
            got = f"a pair of {name(result[0])} and {name(result[1])}"
        elif type(result) is tuple:
            got = f"a tuple of {len(result)}"
        raise TypeError(
            f"{type(guidance).__name__} must return (Estimate, state) from a call, got {got}: "
            "return Estimate(tilted, denoised, log_h), state, with the state that it was given if "
            "it has none"
        )


def failures(x: Array, estimate: Estimate) -> Failures:
    """The failures that an estimate at a state shows. A state that is not finite counts first,
    because it explains every later failure.
    """
    unguided = estimate.tilted if estimate.denoised is None else estimate.denoised
    wrong = lambda value: ~jnp.isfinite(value)
    # A denoiser of tokens has one axis more than the state.
    before = wrong(x).reshape(x.shape + (1,) * (unguided.ndim - x.ndim))
    # -inf is a valid log h: the state violates a constraint.
    log_h = False if estimate.log_h is None else ~(estimate.log_h < jnp.inf)
    return Failures.of(
        before, denoiser=wrong(unguided), log_h=log_h, shift=wrong(estimate.tilted)
    ).first()
