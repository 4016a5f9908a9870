r"""`flow`: the trajectory of one state under the probability flow, toward data or back to noise.

    trajectory = flow(model, x, 1e-3, 1.0)      from noise to data
    trajectory = flow(model, x1, 1.0, 1e-3)     the noise of a sample: encoding
    trajectory(t)                               the state at any time between, without the network

`solvers.Adaptive` solves the flow and interpolates it to fourth order. The last part, up to t = 1,
is a jump: the denoiser is held constant there. Backward from t = 1, the denoiser of this part is
the sample itself.

Reference: Song et al. (arXiv 2011.13456), the probability flow.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree
from tiltjax.guidance import Guidance, check
from tiltjax.interpolants import Interpolant
from tiltjax.mixtures import decomposed
from tiltjax.models import Model, check_mean
from tiltjax.solvers import Adaptive, FlowSegment


class Flow(eqx.Module):
    """A trajectory `t -> X_t` between the times `t0` and `t1`, in either order; built by `flow`.

    `trajectory(t)` takes a scalar and returns a state. **Raises:** `ValueError` for a t that is not
    between these times.
    """

    t0: Array
    t1: Array
    segment: FlowSegment
    last: Array
    edge: Array
    denoised: Array

    def __call__(self, t: float | Array) -> Array:
        """The state at time `t`. **Raises:** `ValueError` for a `t` outside of `t0` and `t1`; for a
        traced `t`, the state is NaN there.
        """
        t = _checks.floating(t, "t", 0).astype(self.edge.dtype)
        low, high = jnp.minimum(self.t0, self.t1), jnp.maximum(self.t0, self.t1)
        inside = (t >= low) & (t <= high)
        if _checks.concrete(inside) and not np.asarray(inside):
            raise ValueError(
                f"the trajectory runs from t = {float(self.t0):g} to {float(self.t1):g}, got t = "
                f"{float(t):g}: pass a time between them"
            )
        interpolant = self.segment.circle.interpolant
        ratio = interpolant.sigma(t) / interpolant.sigma(self.last)
        gain = interpolant.alpha(t) - interpolant.alpha(self.last) * ratio
        tail = ratio * self.edge + gain * self.denoised
        x = jnp.where(t > self.last, tail, self.segment(jnp.minimum(t, self.last)))
        return jnp.where(inside, x, jnp.nan)


def flow(
    model: Model,
    x: Array,
    t0: float | Array,
    t1: float | Array,
    guidance: Guidance | None = None,
    *,
    key: Array | None = None,
    solver: Adaptive | None = None,
) -> Flow:
    """The trajectory of the state `x` from time `t0` to `t1`, which may be earlier or later.

    `flow` takes one state; use `jax.vmap(lambda x: flow(model, x, 1e-3, 1.0)(0.5))` for a batch.
    The trajectory takes the memory of `solver.max_steps` steps.

    **Arguments:** `model`; `x`, of its shape; `t0`, `t1` in [0, 1], both above 0 with a guidance;
    `guidance`, on the same model and without memory; `key`, the randomness of the guidance, with
    one draw for the whole trajectory; `solver`, `Adaptive()` by default.

    **Raises:** `ValueError` for states, times or guidances that do not match; `FloatingPointError`
    if the solver fails (outside of `jit`; inside, the trajectory is NaN).
    """
    check_mean(model, "use Analytic, from_velocity, from_noise or from_denoiser")
    solver = Adaptive() if solver is None else solver
    _checks.instance(solver, Adaptive, "solver", "other solvers have no continuous trajectory")
    x = _checks.finite(x, "x").astype(model.dtype)
    if x.shape != model.shape:
        raise ValueError(
            f"x must be one state, of shape {model.shape}, got {x.shape}: vmap flow over a batch"
        )
    times = [_checks.finite(t, name, 0).astype(model.dtype) for t, name in ((t0, "t0"), (t1, "t1"))]
    if _checks.concrete(times):
        low, high = sorted(float(t) for t in times)
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"t0 and t1 must be two times in [0, 1], got {float(times[0]):g} and "
                f"{float(times[1]):g}"
            )
        if guidance is not None and low == 0:
            raise ValueError(
                "a guided trajectory must stay at t > 0 (its gain sigma^2 / alpha is infinite at "
                "t = 0)"
            )
    if guidance is not None:
        check(guidance, model)
        if jax.tree.leaves(jax.eval_shape(guidance.init, x)):
            raise ValueError(
                f"{type(guidance).__name__} has a memory of its last step, so it is no function of "
                "(t, x): use sample(..., solver=Adaptive(), save_trajectory=True)"
            )
        if key is None:
            raise ValueError(
                "a guided trajectory needs key=, for the draws of its guidance, got None: pass "
                "key=jax.random.key(seed)"
            )
        key = _checks.key(key)
    trajectory, success = _flow(model, x, times[0], times[1], guidance, key, solver)
    if _checks.concrete(success) and not np.asarray(success):
        raise FloatingPointError(
            f"the trajectory from t = {float(times[0]):g} to {float(times[1]):g} could not be "
            f"solved in {solver.max_steps} steps to rtol = {float(solver.rtol):g}: raise rtol or "
            f"max_steps, and check that the denoiser is finite and smooth in {model.dtype}"
        )
    return trajectory


@eqx.filter_jit
def _flow(
    model: Model,
    x: Array,
    t0: Array,
    t1: Array,
    guidance: Guidance | None,
    key: Any,
    solver: Adaptive,
) -> tuple[Flow, Array]:
    model, guidance, solver = decomposed(_pytree.cast((model, guidance, solver), model.dtype))
    interpolant: Interpolant = model.interpolant

    def field(t: Array, x: Array) -> Array:
        if guidance is None:
            return model.denoise(t, x)
        return guidance(key, t, x, guidance.init(x))[0].tilted

    low, high = jnp.minimum(t0, t1), jnp.maximum(t0, t1)
    last = jnp.where(high < 1, high, jnp.maximum(solver.last(interpolant), low))
    forward = t0 < t1
    # alpha x is the mean of X_last given X_1 = x. Its error is of second order, like the error of
    # the jump.
    start = jnp.where(t0 < 1, x, interpolant.alpha(last) * x)
    begin, end = jnp.minimum(t0, last), jnp.minimum(t1, last)
    segment = solver.solve(interpolant, field, begin, end, start, dense=True)
    edge = jnp.where(forward, segment.end, start)
    denoised = jnp.where(forward, field(last, edge), x)
    return Flow(t0, t1, segment, last, edge, denoised), segment.success
