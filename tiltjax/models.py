r"""Models: anything that knows `D_t(x) = E[X_1 | X_t = x]`.

| model | denoiser |
|---|---|
| `Analytic(mixture)` | closed form of a Gaussian mixture |
| `from_velocity`, `from_noise`, `from_denoiser` | a network: a function, a Flax NNX or an Equinox module |
| `Tilted(model, reward, scale)` | the model of `rho(x) exp(scale * r(x))`, exactly, for a conjugate reward |

**Conjugate tilts.** If `scale * r(x) = <a, x> - c |x|^2 / 2 + const`, the tilt multiplies the likelihood of a noisy view,
`exp(<alpha x / sigma^2, X_1> - snr |X_1|^2 / 2)`, by a factor of the same family. So the tilted posterior of `X_1` is
the *untilted* one given another view, of precision `snr_t + c` and natural parameter `alpha x / sigma^2 + a`, and

    D~_t(x) = D_{t*}(x*),    (t*, x*) = observe(snr_t + c, alpha_t x / sigma_t^2 + a):

one ordinary denoiser call, no derivative, and sampling the plain flow of `D~` samples the tilt, within modes and
between them. It holds for posterior means only: a denoiser under classifier-free guidance, or a thresholded one, is none.
(For linear rewards see also Moitra, Risteski and Rohatgi, *Steering diffusion models with quadratic rewards*, COLT 2026.)
"""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from tiltjax import inputs, rewards
from tiltjax.interpolants import Interpolant, Linear
from tiltjax.mixtures import GaussianMixture


class Model(eqx.Module):
    """A denoiser with its `interpolant`, and the `shape` and `dtype` of one state.

    Subclasses define `denoise(t, x)` for one sample.
    """

    interpolant: eqx.AbstractVar[Interpolant]
    shape: eqx.AbstractVar[tuple[int, ...]]
    dtype: eqx.AbstractVar[Any]

    def denoise(self, t: Array, x: Array) -> Array:
        """`E[X_1 | X_t = x]`, of the shape of `x`; `t` is a scalar in [0, 1)."""
        raise NotImplementedError

    def velocity(self, t: Array, x: Array) -> Array:
        """The drift of the probability flow."""
        return self.interpolant.velocity(t, x, self.denoise(t, x))

    def score(self, t: Array, x: Array) -> Array:
        """`∇ log p_t(x)`."""
        return self.interpolant.score(t, x, self.denoise(t, x))

    def noise(self, t: Array, x: Array) -> Array:
        """`E[X_0 | X_t = x]`."""
        return self.interpolant.noise(t, x, self.denoise(t, x))

    def check_start(self, t: Array) -> None:
        """Refuse to start sampling at t, with a `ValueError`, where the law of `X_t` is not known well enough for `initial`.

        `sigma_t X_0` is that law where the noise outweighs the data: `snr_t` times the noise's own variance below 2%.
        """
        if not inputs.concrete((t, self.interpolant)):
            return
        with jax.ensure_compile_time_eval():
            t = jnp.asarray(t)
            share = float(self.interpolant.snr(t) * self.interpolant.sigma(jnp.zeros_like(t)) ** 2)
        if share > 0.02:
            raise ValueError(
                f"a run from noise cannot start at t = {float(t):g}, where a share of {share:.2g} of the state is data: start "
                "earlier, at 1e-3 say, or pass the states at that time as start="
            )

    def initial(self, key: Array, t: Array) -> Array:
        """A starting state at the first time `t` of a run: `sigma_t X_0`, for which `alpha_t` must be negligible."""
        return self.interpolant.sigma(t) * jax.random.normal(key, self.shape, self.dtype)


class Analytic(Model):
    """The exact model of a Gaussian mixture.

    **Arguments:** `mixture`; `interpolant`, `Linear()` by default.
    """

    mixture: GaussianMixture
    interpolant: Interpolant

    def __init__(self, mixture: GaussianMixture, interpolant: Interpolant | None = None):
        inputs.instance(mixture, GaussianMixture, "mixture", "Analytic(mixture); use from_velocity for a network")
        self.mixture = mixture
        self.interpolant = _interpolant(interpolant)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.mixture.dim,)

    @property
    def dtype(self) -> Any:
        return self.mixture.means.dtype

    def denoise(self, t: Array, x: Array) -> Array:
        return self.mixture.denoise(self.interpolant.alpha(t), self.interpolant.sigma(t), x)

    def posterior(self, t: Array, x: Array) -> GaussianMixture:
        """The law of `X_1` given `X_t = x`."""
        return self.mixture.condition(self.interpolant.alpha(t), self.interpolant.sigma(t), x)


class Network(Model):
    """A network as a model; built by `from_velocity`, `from_noise` and `from_denoiser`."""

    net: "_Net"
    interpolant: Interpolant
    to_denoised: Callable = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def denoise(self, t: Array, x: Array) -> Array:
        t = jnp.asarray(t, x.dtype)
        if self.batched:
            output = _checked(_call_in_batches(self.net, t[None], x[None]), (1, *x.shape), self.batched)[0]
        else:
            output = _checked(self.net(t, x), x.shape, self.batched)
        return self.to_denoised(self.interpolant, t, x, output.astype(x.dtype))


def from_velocity(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> Network:
    """A model from a velocity network `b_t(x)`, such as flow matching trains.

    **Arguments:**

    - `fn`: `fn(t, x)`, or `fn(params, t, x)` if `params` is given: a function, a Flax NNX module or an Equinox module,
      returning the shape of `x`. Parameters travel as arguments of the compiled program, never as constants.
    - `shape`: the shape of one state, such as `(2,)` or `(16, 64, 64)`.
    - `batched`: if true, `fn` takes `t` of shape `(B,)` and `x` of shape `(B, *shape)`, and the particle axis (times the
      draws of a guidance) becomes its batch axis. Differentiable in x by reverse mode.
    - `interpolant`: what the network was trained with, `Linear()` by default.
    - `dtype`: of the states, JAX's default float unless given. The network's own dtype is left alone.

    **Raises:** `ValueError` for an output of the wrong shape, or a module in training mode.
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
    """A model from a noise network `E_t(x) = E[X_0 | X_t = x]`; arguments as in `from_velocity`.

    At small `alpha_t` the denoiser `(x - sigma E) / alpha` magnifies the network's error: start later if that shows.
    """
    return _network(fn, params, _from_noise, shape, batched, interpolant, dtype)


def from_denoiser(
    fn: Callable,
    params: PyTree = None,
    *,
    shape: tuple[int, ...],
    batched: bool = False,
    interpolant: Interpolant | None = None,
    dtype: Any = None,
) -> Network:
    """A model from a denoising network `D_t(x) = E[X_1 | X_t = x]`; arguments as in `from_velocity`."""
    return _network(fn, params, _from_denoiser, shape, batched, interpolant, dtype)


class Tilted(Model):
    """The model of `rho(x) exp(scale * r(x))` for a conjugate reward: exact, at one call of the inner denoiser.

    For `-l |x - y|^2` (c = 2 l) the inner model is asked at `snr_t + c`, later than the clock says. For linear rewards (c = 0) it is
    asked at the same time at a displaced state: at the start, t = eps, at `|x*|` about `scale |a| sigma^2 / eps`, far outside what
    a network was trained on, so that there "exact" is a statement about exact denoisers. For c < 0 the denoiser is right wherever
    `snr_t + c > 0`, but sampling has no closed-form start.

    **Arguments:** `model`; `reward`, `rewards.Linear`, `rewards.Quadratic` with a scalar weight, sums and multiples; `scale >= 0`.

    **Raises:** `ValueError` if the reward is not conjugate.
    """

    model: Model
    natural: Array
    precision: Array

    def __init__(self, model: Model, reward: rewards.Reward, scale: float | Array = 1.0):
        inputs.instance(model, Model, "model", "Tilted(model, reward, scale), with Analytic(mixture) for a mixture")
        scale = inputs.nonnegative(scale, "scale")
        natural, precision = rewards.as_reward(reward).conjugate()
        if natural.shape != model.shape:
            raise ValueError(f"the reward is one of states of shape {natural.shape}, the model's have {model.shape}")
        self.model = model
        self.natural = scale * natural
        self.precision = scale * precision

    @property
    def interpolant(self) -> Interpolant:
        return self.model.interpolant

    @property
    def shape(self) -> tuple[int, ...]:
        return self.model.shape

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    def denoise(self, t: Array, x: Array) -> Array:
        path = self.interpolant
        natural = path.alpha(t) / path.sigma(t) ** 2 * x + self.natural
        return self.model.denoise(*path.observe(path.snr(t) + self.precision, natural))

    def check_start(self, t: Array) -> None:
        self.model.check_start(t)
        if inputs.concrete(self.precision) and np.asarray(self.precision) < 0:
            raise ValueError(
                f"this reward is convex (c = {float(self.precision):g} < 0): the tilted law has no closed form at the noise "
                "end, so Tilted cannot start sampling there. Use it as a denoiser where snr_t + c > 0."
            )

    def initial(self, key: Array, t: Array) -> Array:
        return self.model.initial(key, t)


class _Net(inputs.Foreign):
    """A callable with its parameters, as one pytree."""

    fn: inputs.Function
    params: PyTree

    def __call__(self, t: Array, x: Array) -> Array:
        return self.fn(t, x) if self.params is None else self.fn(self.params, t, x)


def _network(fn, params, to_denoised, shape, batched, interpolant, dtype) -> Network:
    _refuse_training_mode(fn)
    _refuse_training_mode(params)
    if not isinstance(shape, tuple | list):
        raise TypeError(f"shape must be a tuple such as (2,), the shape of one state, got {shape!r}")
    shape = tuple(inputs.count(n, "every entry of shape") for n in shape)
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"dtype, that of the states, must be a floating dtype of at least 32 bits, got {dtype}: steps near t = 1 are lost in fewer. "
            "The network may compute in any precision of its own."
        )
    net = _Net(inputs.Function(fn), params)
    _check_signature(fn, params)
    return Network(
        net=net,
        interpolant=_interpolant(interpolant),
        to_denoised=to_denoised,
        batched=bool(batched),
        shape=shape,
        dtype=dtype,
    )


def _check_signature(fn: Callable, params: PyTree) -> None:
    names = ("t", "x") if params is None else ("params", "t", "x")
    try:
        inspect.signature(fn).bind(*names)
    except TypeError as error:
        raise TypeError(
            f"the network is called as fn({', '.join(names)}), which {type(fn).__name__} does not accept ({error}): wrap it, as in "
            "from_velocity(lambda net, t, x: net(...), net, shape=...)"
        ) from None
    except ValueError:  # a callable without a signature to read
        return


def _interpolant(interpolant: Interpolant | None) -> Interpolant:
    if interpolant is None:
        return Linear()
    inputs.instance(interpolant, Interpolant, "interpolant", "such as tiltjax.Linear(base_scale)")
    return interpolant


def _from_velocity(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_velocity(t, x, output)


def _from_noise(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return interpolant.denoised_from_noise(t, x, output)


def _from_denoiser(interpolant: Interpolant, t: Array, x: Array, output: Array) -> Array:
    return output


def _checked(output: Any, shape: tuple[int, ...], batched: bool) -> Array:
    got = getattr(output, "shape", None)
    if got != shape:
        what = f"a batch of states {shape[1:]}" if batched else f"a state of shape {shape}"
        hint = "" if batched else " (a network that wants a batch axis needs batched=True)"
        raise ValueError(
            f"the network must return the shape of its input: expected {shape} for {what}, got {got}{hint}"
        )
    return output


def _refuse_training_mode(fn: Any) -> None:
    if not any(cls.__module__.startswith("flax.nnx") for cls in type(fn).__mro__):
        return
    from flax import nnx

    for path, module in nnx.iter_modules(fn):
        if getattr(module, "deterministic", True) is False or getattr(module, "use_running_average", True) is False:
            name = "/".join(map(str, path)) or "the module itself"
            raise ValueError(
                f"{type(module).__name__} ({name}) is in training mode and would change its state while sampling: call "
                ".eval() on the network first"
            )


# A network that wants a batch, called from code for one sample. `custom_vmap` turns every `vmap` axis around the call
# into more rows of the batch instead of an axis the network's kernels have never seen; `custom_vjp` does the same for
# the pullback, because `custom_vmap` alone has no reverse mode.


@custom_vmap
def _forward(net: _Net, t: Array, x: Array) -> Array:
    return net(t, x)


@custom_vmap
def _pullback(net: _Net, t: Array, x: Array, cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(net, t, x)[1](cotangent)


def _as_rows(call: Callable) -> Callable:
    def rule(size, batched, net, *arrays):
        if any(jax.tree.leaves(batched[0])):
            raise ValueError(
                "a batched=True network cannot be vmapped over its parameters: use batched=False for ensembles"
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
def _call_in_batches(net: _Net, t: Array, x: Array) -> Array:
    return _forward(net, t, x)


def _call_forward(net, t, x):
    # By type: a Flax variable forwards unknown attributes to its array, so it would pass for anything.
    primal = lambda leaf: isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
    if any(leaf.perturbed for leaf in jax.tree.leaves(net, is_leaf=primal) if primal(leaf)):
        raise TypeError("a batched=True network is not differentiable in its parameters here: use batched=False")
    values = jax.tree.map(lambda leaf: leaf.value if primal(leaf) else leaf, (net, t, x), is_leaf=primal)
    return _forward(*values), values


def _call_backward(values, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    return None, *_pullback(*values, cotangent)


_call_in_batches.defvjp(_call_forward, _call_backward, symbolic_zeros=True)
