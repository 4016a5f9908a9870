r"""Networks that jump along the probability flow: consistency functions and flow maps.

    flow map     X_{t,u}(x), the state at u of the trajectory through x at t
    consistency  f_t(x) = X_{t,1}(x)
    velocity     b_t(x) = ∂_u X_{t,u}(x) at u = t

A flow map has the denoiser of its law by its velocity. A consistency function has none: it is a
sample, not a posterior mean.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from tiltjax import _pytree
from tiltjax.interpolants import Interpolant
from tiltjax.models._network import DENOISER, VELOCITY, Network, build, call_network
from tiltjax.solvers import Consistency, Solver


class ConsistencyNetwork(Network):
    """A consistency function as a model; built by `from_consistency`. Its `denoise` is the end of a
    trajectory, `f_t(x)`, which is not a posterior mean.
    """

    is_mean: ClassVar[bool] = False
    steps: ClassVar[int | None] = 4

    def default_solver(self, usual: Solver) -> Solver:
        return Consistency()

    def check_solver(self, solver: Solver) -> None:
        if not isinstance(solver, Consistency):
            raise ValueError(
                f"a consistency function has no denoiser for {type(solver).__name__}: leave out "
                "solver, for Consistency()"
            )

    def endpoint(self, t: Array, x: Array) -> Array:
        return self.denoise(t, x)

    def grid(self, steps: int) -> Array:
        # The cleanest level of the usual grid would change nothing.
        times = super().grid(steps + 1)
        return jnp.concatenate([times[:-2], times[-1:]])


class FlowMapNetwork(Network):
    """A flow map as a model; built by `from_flow_map`."""

    def denoise(self, t: Array, x: Array) -> Array:
        t = jnp.asarray(t, x.dtype)
        along = lambda u: self._map(t, u, x)
        velocity = jax.jvp(along, (t,), (jnp.ones_like(t),))[1]
        return self.interpolant.denoised_from_velocity(t, x, velocity)

    def endpoint(self, t: Array, x: Array) -> Array:
        return self._map(t, jnp.ones_like(t), x)

    def _map(self, t: Array, u: Array, x: Array) -> Array:
        return call_network(self.net, jnp.stack([t, u]), x, x.shape, False).astype(x.dtype)


def from_consistency(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> ConsistencyNetwork:
    """A model from a consistency function `f_t(x)`, the end at t = 1 of the trajectory of the
    probability flow through x at t; arguments and conditions as in `from_velocity`.

    Runs take the steps of `solvers.Consistency`, four by default. In weighted runs, the reward at
    `f_t(x)` is the twist, as `fk_steering` has it. `f_t(x)` is not a posterior mean: methods that
    need one (`Tilted`, `Glass`, `Laplace`, `Conjugate`, `flow`, densities) refuse the model.

    Source: Song, Dhariwal, Chen and Sutskever (arXiv 2303.01469).
    """
    kind = DENOISER._replace(maker=from_consistency)
    return build(fn, params, kind, shape, batched, interpolant, dtype, ConsistencyNetwork)


def from_flow_map(
    fn: Callable,
    *,
    shape: tuple[int, ...],
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> FlowMapNetwork:
    """A model from a flow map `fn(t, u, x) = X_{t,u}(x)`, the state at u of the trajectory of the
    probability flow through x at t.

    The velocity is the derivative in u at u = t, by forward mode. `FlowMap(model)`, and so `fmrg`,
    takes the end `X_{t,1}(x)` from one call.

    **Arguments:** `fn(t, u, x)` of one sample, differentiable in u, with `fn(t, t, x) = x`: a
    function, a Flax NNX or an Equinox module; the others as in `from_velocity`.

    **Raises:** as `from_velocity`. Source: Boffi, Albergo and Vanden-Eijnden (arXiv 2406.07507).
    """
    call = jax.tree_util.Partial(_of_pair, _pytree.Function(fn))
    kind = VELOCITY._replace(maker=from_flow_map)
    return build(call, None, kind, shape, False, interpolant, dtype, FlowMapNetwork)


def _of_pair(fn: Callable, times: Array, x: Array) -> Array:
    return fn(times[0], times[1], x)
