r"""A user's network `fn(t, x)` as a pytree and as a model.

All code around a network is written for one sample and vmapped. A network with `batched=True` is
called with one row for each element of the surrounding `vmap`s, in the forward and in the backward
pass, so its kernels never get an additional axis.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from tiltjax import _checks, _pytree, _repr
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.models._base import Model
from tiltjax.solvers import Consistency, Solver


class Net(_pytree.KeepsDtype):
    """A callable `fn(t, x)` or `fn(params, t, x)` with its parameters, as one pytree."""

    fn: _pytree.Function
    params: PyTree

    def __init__(self, fn: Callable, params: PyTree = None):
        params = _pytree.opened(params)
        _pytree.refuse_outside(params)
        _pytree.refuse_training_mode(params)
        self.fn, self.params = _pytree.Function(fn), params
        _check_signature(fn, params)

    def _call(self, **given: Any) -> str:
        name = _repr.form(self.fn)
        return name if self.params is None else _repr.network(name, self.params)

    def __call__(self, t: Array, x: Array) -> Array:
        return self.fn(t, x) if self.params is None else self.fn(self.params, t, x)


def call_network(net: Net, t: Array, x: Array, shape: tuple[int, ...], batched: bool) -> Array:
    """The output of a network, of `shape`, for one sample. A batched network is called with one row
    for each element of the surrounding `vmap`s.
    """
    if batched:
        call = lambda: _call_in_batches(net, t[None], x[None])
        return _checked(net, call, (1, *shape), x, batched)[0]
    return _checked(net, lambda: net(t, x), shape, x, batched)


_TIMES, _STATES = ("t", "time", "times", "timestep", "timesteps"), ("x", "x_t", "xt")


def _check_signature(fn: Callable, params: PyTree) -> None:
    names = ("t", "x") if params is None else ("params", "t", "x")
    call = f"fn({', '.join(names)})"
    try:
        signature = inspect.signature(fn)
        bound = signature.bind(*names).arguments
    except TypeError as error:
        raise TypeError(
            f"the network is called as {call}, which {type(fn).__name__} does not accept "
            f"({error}): wrap it, as in from_velocity(lambda net, t, x: net(...), net, shape=...)"
        ) from None
    except ValueError:  # the callable has no readable signature
        return
    places = {value: name for name, value in bound.items() if isinstance(value, str)}
    if places.get("t") in _STATES and places.get("x") in _TIMES:
        raise TypeError(
            f"the network is called as {call}, but its parameters are named "
            f"({', '.join(places[name] for name in names)}): {_SWAP}"
        )


_ROWS = 3  # of a trial batch, unlike a number that a slice would return by chance
_SWAP = "swap them, as in from_velocity(lambda net, t, x: net(x, t), net, shape=...)"


def _checked(
    net: Net, call: Callable[[], Any], shape: tuple[int, ...], x: Array, batched: bool
) -> Array:
    """The output of a network, `call()`, if it has `shape`; `x` is one state.

    **Raises:** `ValueError` for another shape, and for a network of batches that is called with one
    state, or the reverse; `TypeError` for a network of `(x, t)`, and for one that JAX cannot trace.
    """
    try:
        output = call()
    except Exception as error:
        _explain(net, shape, x, batched, f"{type(error).__name__}: {error}".split("\n")[0])
        if _pytree.is_untraceable(error):
            raise TypeError(
                f"JAX cannot trace the network ({type(error).__name__}): write it in jax.numpy; "
                "NumPy, PyTorch and ONNX run through tiltjax.external, such as from_torch(module)"
            ) from error
        raise
    got = getattr(output, "shape", None)
    if got != shape:
        _explain(net, shape, x, batched, f"it returns shape {got}")
        state = x.shape
        what = f"a batch of states {state}" if batched else f"a state of shape {state}"
        hint = "" if batched else " (a network that wants a batch axis needs batched=True)"
        rule = "the shape of its input: expected" if shape[int(batched) :] == state else "the shape"
        raise ValueError(f"the network must return {rule} {shape} for {what}, got {got}{hint}")
    return output


def _explain(net: Net, shape: tuple[int, ...], x: Array, batched: bool, failure: str) -> None:
    """Raise an error that names what is wrong with a network that failed, if another call of it
    returns the right shape.
    """
    time = jax.ShapeDtypeStruct((), x.dtype)
    state = jax.ShapeDtypeStruct(x.shape, x.dtype)
    add = lambda one: jax.ShapeDtypeStruct((_ROWS, *one.shape), one.dtype)
    one, rows = (time, state), (add(time), add(state))
    shape = shape[1:] if batched else shape

    def works(args: tuple, shape: tuple[int, ...]) -> bool:
        try:
            return getattr(jax.eval_shape(net, *args), "shape", None) == shape
        except Exception:
            return False

    if works(rows, (_ROWS, *shape)) if batched else works(one, shape):
        return  # the failure has another reason
    how = "a batch of states" if batched else f"one state of shape {x.shape}"
    if works(one, shape) if batched else works(rows, (_ROWS, *shape)):
        raise ValueError(
            f"the network fails for {how} ({failure}), but accepts "
            + ("one state: leave out batched=True" if batched else "a batch: pass batched=True")
        )
    swapped = [(args[::-1], result) for args, result in ((one, shape), (rows, (_ROWS, *shape)))]
    if any(works(*each) for each in swapped):
        raise TypeError(
            f"the network is called as network(t, x) and fails ({failure}), but accepts (x, t): "
            + _SWAP
        )


# A call of a batched network from code for one sample. `custom_vmap` turns every surrounding `vmap`
# axis into rows of the batch, so that the network's kernels get no additional axis. `custom_vjp`
# does the same for the pullback, because `custom_vmap` alone has no reverse mode.


@custom_vmap
def _forward(net: Net, t: Array, x: Array) -> Array:
    return net(t, x)


@custom_vmap
def _pullback(net: Net, t: Array, x: Array, cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(net, t, x)[1](cotangent)


def _as_rows(call: Callable) -> Callable:
    def rule(size, batched, net, *arrays):
        if any(jax.tree.leaves(batched[0])):
            raise ValueError(
                "a batched=True network cannot be vmapped over its parameters: use batched=False "
                "for ensembles"
            )

        def rows(array, is_batched):
            array = array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        output = call(net, *map(rows, arrays, batched[1:]))
        split = jax.tree.map(lambda out: out.reshape(size, -1, *out.shape[1:]), output)
        return split, jax.tree.map(lambda _: True, split)

    return rule


_forward.def_vmap(_as_rows(_forward))
_pullback.def_vmap(_as_rows(_pullback))


@jax.custom_vjp
def _call_in_batches(net: Net, t: Array, x: Array) -> Array:
    return _forward(net, t, x)


def _call_forward(net, t, x):
    # Test the type, because a Flax variable forwards unknown attributes to its array and would pass
    # any test of attributes.
    primal = lambda leaf: isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
    if any(leaf.perturbed for leaf in jax.tree.leaves(net, is_leaf=primal) if primal(leaf)):
        raise TypeError(
            "a batched=True network is not differentiable in its parameters here: use "
            "batched=False, or Model.denoise_batch"
        )
    values = jax.tree.map(
        lambda leaf: leaf.value if primal(leaf) else leaf, (net, t, x), is_leaf=primal
    )
    return _forward(*values), values


def _call_backward(values, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    return None, *_pullback(*values, cotangent)


_call_in_batches.defvjp(_call_forward, _call_backward, symbolic_zeros=True)


class Network(Model):
    """A network as a model; built by `from_velocity`, `from_noise`, `from_v`, `from_denoiser`."""

    net: Net
    interpolant: Interpolant
    to_denoised: Callable = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def _call(self, **given: Any) -> str:
        maker = _MAKERS[self.to_denoised]
        return _repr.call(self, maker, **{"fn": self.net, "shape": None, "dtype": None} | given)

    def denoise(self, t: Array, x: Array) -> Array:
        t = jnp.asarray(t, x.dtype)
        output = call_network(self.net, t, x, x.shape, self.batched)
        return self.to_denoised(self.interpolant, t, x, output.astype(x.dtype))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        if not self.batched:
            return super().denoise_batch(t, x)
        t = jnp.asarray(t, x.dtype)
        call = lambda: self.net(jnp.broadcast_to(t, len(x)), x)
        output = _checked(self.net, call, x.shape, x[0], True).astype(x.dtype)
        to_denoised = lambda x, output: self.to_denoised(self.interpolant, t, x, output)
        return jax.vmap(to_denoised)(x, output)


def from_velocity(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> Network:
    """A model from a velocity network `b_t(x) = E[dX_t/dt | X_t = x]`, as flow matching trains it.

    With `X_t = alpha_t X_1 + sigma_t X_0` this is `E[alpha_t' X_1 + sigma_t' X_0 | X_t = x]`, the
    derivative along the time of the interpolant. The v-prediction of diffusion models is another
    quantity: use `from_v`.

    **Arguments:**

    - `fn`: `fn(t, x)`, or `fn(params, t, x)` if `params` is given: a function, a Flax NNX module or
      an Equinox module that returns the shape of `x`. Parameters are arguments of the compiled
      program, not constants.
    - `shape`: the shape of one state, such as `(2,)` or `(16, 64, 64)`.
    - `batched`: if true, `fn` takes `t` of shape `(B,)` and `x` of shape `(B, *shape)`, and the
      particle axis (times the draws of a guidance) becomes the batch axis. Such a network is
      differentiable in x by reverse mode only.
    - `interpolant`: the interpolant of the network's training, `Linear()` by default.
    - `dtype`: of the states, JAX's default float by default. The network keeps its own dtype.

    The velocity must be that of a posterior mean. Classifier-free guidance and thresholding change
    it: plain sampling then runs, but tilts, posteriors and guidances use identities that do not
    hold.

    **Raises:** `ValueError` for an output of the wrong shape, or a module in training mode;
    `TypeError` for a function with another signature.
    """
    return _network(fn, params, _from_velocity, shape, batched, interpolant, dtype)


def from_noise(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> Network:
    """A model from a noise network `E_t(x) = E[X_0 | X_t = x]`; arguments and conditions as in
    `from_velocity`.

    At small `alpha_t` the denoiser `(x - sigma E) / alpha` magnifies the error of the network. If
    this error shows, start later. For a network that takes the index of a noise level instead of t,
    use `interpolants.DiscreteVP`.
    """
    return _network(fn, params, _from_noise, shape, batched, interpolant, dtype)


def from_v(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant,
    dtype: Any = None,
) -> Network:
    """A model from a network of v-prediction, `v_t(x) = E[alpha_t X_0 - sigma_t X_1 | X_t = x]`,
    where X_0 is the noise and X_1 the data; arguments and conditions as in `from_velocity`.

    This is `v = alpha eps - sigma x_0` of diffusion models in their notation, with noise eps and
    data x_0, and `v_prediction` of diffusers. The denoiser is
    `(alpha x - sigma v) / (alpha^2 + sigma^2)`, which is finite at all times. The `interpolant`
    must be given, `VP()` or the `DiscreteVP` of the noise levels in training, for which
    `alpha^2 + sigma^2 = 1`. Source: Salimans and Ho (arXiv 2202.00512).
    """
    how = "such as tiltjax.VP(), or the DiscreteVP of the network's noise levels"
    _checks.instance(interpolant, Interpolant, "interpolant", how)
    return _network(fn, params, _from_v, shape, batched, interpolant, dtype)


def from_denoiser(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> Network:
    """A model from a denoising network `D_t(x) = E[X_1 | X_t = x]`; arguments and conditions as in
    `from_velocity`.
    """
    return _network(fn, params, _from_denoiser, shape, batched, interpolant, dtype)


class ConsistencyNetwork(Network):
    """A consistency function as a model; built by `from_consistency`. Its `denoise` is the end of a
    trajectory, `f_t(x)`, which is not a posterior mean.
    """

    is_mean: ClassVar[bool] = False
    steps: ClassVar[int | None] = 4

    def _call(self, **given: Any) -> str:
        return _repr.call(self, from_consistency, **{"fn": self.net, "shape": None} | given)

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

    def _call(self, **given: Any) -> str:
        return _repr.call(self, from_flow_map, **{"fn": self.net.fn, "shape": None} | given)

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
    return _network(
        fn, params, _from_denoiser, shape, batched, interpolant, dtype, ConsistencyNetwork
    )


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
    return _network(call, None, _from_velocity, shape, False, interpolant, dtype, FlowMapNetwork)


def _of_pair(fn: Callable, times: Array, x: Array) -> Array:
    return fn(times[0], times[1], x)


def _network(fn, params, to_denoised, shape, batched, interpolant, dtype, kind=Network) -> Any:
    if not isinstance(shape, tuple | list):
        raise TypeError(
            f"shape must be a tuple such as (2,), the shape of one state, got {shape!r}"
        )
    shape = tuple(_checks.count(n, "every entry of shape") for n in shape)
    return kind(
        net=Net(fn, params),
        interpolant=or_linear(interpolant),
        to_denoised=to_denoised,
        batched=_checks.flag(batched, "batched"),
        shape=shape,
        dtype=_checks.state_dtype(dtype),
    )


def _from_velocity(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_velocity(t, x, output)


def _from_noise(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_noise(t, x, output)


def _from_v(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_v(t, x, output)


def _from_denoiser(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return output


_MAKERS: dict[Callable, Callable] = {
    _from_velocity: from_velocity,
    _from_noise: from_noise,
    _from_v: from_v,
    _from_denoiser: from_denoiser,
}
