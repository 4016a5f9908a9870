r"""A user's network `fn(t, x)` as a pytree and as a model.

All code around a network is written for one sample and vmapped. A network with `batched=True` is
called with one row for each element of the surrounding `vmap`s, in the forward and in the backward
pass, so its kernels never get an additional axis.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from tiltjax import _checks, _pytree, _repr
from tiltjax.interpolants import VE, Interpolant, or_linear
from tiltjax.models._base import Model


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
                "NumPy and PyTorch run inside of rewards only (tiltjax.external)"
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
    """A network as a model; built by `from_velocity`, `from_noise`, `from_v`, `from_score`,
    `from_edm`, `from_denoiser`.
    """

    net: Net
    interpolant: Interpolant
    kind: "Parameterization" = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def _call(self, **given: Any) -> str:
        parts = {"fn": self.net, "shape": None, "dtype": None}
        return _repr.call(self, self.kind.maker, **parts | given)

    def denoise(self, t: Array, x: Array) -> Array:
        t = jnp.asarray(t, x.dtype)
        first, state = self.kind.inputs(self.interpolant, t, x)
        output = call_network(self.net, first, state, x.shape, self.batched)
        return self.kind.denoised(self.interpolant, t, x, output.astype(x.dtype))

    def denoise_batch(self, t: Array, x: Array) -> Array:
        if not self.batched:
            return super().denoise_batch(t, x)
        t = jnp.asarray(t, x.dtype)
        first, states = self.kind.inputs(self.interpolant, t, x)
        call = lambda: self.net(jnp.broadcast_to(first, len(x)), states)
        output = _checked(self.net, call, x.shape, x[0], True).astype(x.dtype)
        denoised = lambda x, output: self.kind.denoised(self.interpolant, t, x, output)
        return jax.vmap(denoised)(x, output)


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
    return build(fn, params, VELOCITY, shape, batched, interpolant, dtype)


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
    return build(fn, params, _NOISE, shape, batched, interpolant, dtype)


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
    return build(fn, params, _V, shape, batched, interpolant, dtype)


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

    A denoiser that takes a noise level instead of t, as the wrapped networks of EDM and k-diffusion
    and consistency models do, is `from_denoiser(lambda t, x: net(x, ve.sigma(t)), interpolant=ve,
    shape=...)` with a `VE`.
    """
    return build(fn, params, DENOISER, shape, batched, interpolant, dtype)


def from_score(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant,
    dtype: Any = None,
) -> Network:
    """A model from a score network `s_t(x) = ∇ log p_t(x)`, where `p_t` is the density of `X_t`;
    arguments and conditions as in `from_velocity`.

    The denoiser is `(x + sigma^2 s) / alpha` (Tweedie's formula). It is singular where `alpha = 0`,
    at t = 0 of `Linear`, and near there it magnifies the error of the network as `from_noise` does.
    With `VE` and `VP` it is finite at all times. The `interpolant` must be given. Source: Song et
    al. (arXiv 2011.13456).
    """
    how = "such as tiltjax.VE(sigma_min, sigma_max) or tiltjax.VP()"
    _checks.instance(interpolant, Interpolant, "interpolant", how)
    return build(fn, params, _SCORE, shape, batched, interpolant, dtype)


def from_edm(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: VE | None = None,
    dtype: Any = None,
) -> Network:
    """A model from a raw network F of EDM, called as `fn(c_noise, c_in x)`; arguments and
    conditions as in `from_velocity`.

    With the noise level s and the width of the data `d = interpolant.sigma_data`,

        D = c_skip x + c_out F(c_noise, c_in x),    c_skip = d^2 / (s^2 + d^2),
        c_out = s d / sqrt(s^2 + d^2),    c_in = 1 / sqrt(s^2 + d^2),    c_noise = log(s) / 4.

    If the network does this itself and returns D, use `from_denoiser`. AlphaFold 3 has
    `c_noise = log(s / d) / 4`: pass `lambda c_noise, x: net(c_noise - math.log(16) / 4, x)`.

    **Arguments:** `interpolant`, a `VE`, by default `VE()`, whose values are those of the paper.
    For another interpolant, reschedule the model: `models.Rescheduled(from_edm(...), interpolant)`.

    **Raises:** `TypeError` for an interpolant that is not a `VE`. Source: Karras et al. (arXiv
    2206.00364, table 1).
    """
    interpolant = VE() if interpolant is None else interpolant
    how = "reschedule for another one, models.Rescheduled(from_edm(...), interpolant)"
    _checks.instance(interpolant, VE, "interpolant", how)
    return build(fn, params, _EDM, shape, batched, interpolant, dtype)


def build(fn, params, kind, shape, batched, interpolant, dtype, cls: type = Network) -> Any:
    """The network as a model of the class `cls`, a subclass of `Network`."""
    if not isinstance(shape, tuple | list):
        raise TypeError(
            f"shape must be a tuple such as (2,), the shape of one state, got {shape!r}"
        )
    shape = tuple(_checks.count(n, "every entry of shape") for n in shape)
    return cls(
        net=Net(fn, params),
        interpolant=or_linear(interpolant),
        kind=kind,
        batched=_checks.flag(batched, "batched"),
        shape=shape,
        dtype=_checks.state_dtype(dtype),
    )


class Parameterization(NamedTuple):
    """What a network takes and returns: its public builder `maker`; its `inputs`, a function
    `(interpolant, t, x)`; and the denoiser, a function `(interpolant, t, x, output)`. The time is a
    scalar, and `inputs` also takes a batch of states.
    """

    maker: Callable
    inputs: Callable
    denoised: Callable


def _plain(interpolant: Interpolant, t: Array, x: Array) -> tuple[Array, Array]:
    return t, x


def _edm_inputs(interpolant: VE, t: Array, x: Array) -> tuple[Array, Array]:
    s = interpolant.sigma(t)
    return jnp.log(s) / 4, x * jax.lax.rsqrt(s**2 + interpolant.sigma_data**2)


def _edm_denoised(interpolant: VE, t: Array, x: Array, output: Array) -> Array:
    s, width = interpolant.sigma(t), interpolant.sigma_data
    square = s**2 + width**2
    return width**2 / square * x + s * width * jax.lax.rsqrt(square) * output


def _from_velocity(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_velocity(t, x, output)


def _from_noise(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_noise(t, x, output)


def _from_v(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_v(t, x, output)


def _from_score(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_score(t, x, output)


def _from_denoiser(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return output


VELOCITY = Parameterization(from_velocity, _plain, _from_velocity)
_NOISE = Parameterization(from_noise, _plain, _from_noise)
_V = Parameterization(from_v, _plain, _from_v)
_SCORE = Parameterization(from_score, _plain, _from_score)
DENOISER = Parameterization(from_denoiser, _plain, _from_denoiser)
_EDM = Parameterization(from_edm, _edm_inputs, _edm_denoised)
