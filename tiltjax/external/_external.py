r"""Functions outside of JAX: a NumPy function, a PyTorch or ONNX network, a service.

    particles x draws --vmap--> one batch (n, *shape) --> fn --> values (n,)            r(x)
                                              value_and_grad --> values, gradients      r(x), ∇r(x)
    times (n,), states (n, *shape) --> fn --> outputs (n, *shape)                       D_t(x)

What `from_numpy`, `from_torch` and `from_onnx` return works inside compiled, vectorized and scanned
loops. At any depth of vectorization, the function gets one flat batch.

| call | meaning |
|---|---|
| `f(x)` | a reward: of one sample, one number. It can be added and scaled like any other |
| `f(t, x, ...)` | a network: an array of the shape of `x`; if `t` is `(n,)`, of a batch |

A network is used inside of the functions of a model, `from_velocity(f, shape=..., batched=True)`.
Methods need

| of the reward | methods |
|---|---|
| values only | selection; `fk_steering`, `svdd`; `smc` with `ValueOnly` and `proposals.Base()` |
| gradients | `PlugIn`, `dps`, `fmrg`, `Conjugate`: pass `value_and_grad`, or use `from_torch` |
| second derivatives | `Laplace`: not with these rewards |

| of the network | methods |
|---|---|
| values only | `Conjugate`; all methods that need only values of the reward |
| a vector-Jacobian product | `PlugIn`, `dps`, `fmrg`: pass `vjp`, or use `from_torch` |

The function must return the same value for the same sample, independent of the rest of the batch.
The number and the order of the calls are not guaranteed: a value that is not needed is not
computed, and a value that several devices need may be computed on each. A `Record` stores the
calls.

**Failures.** A function that raises, hangs, or returns arrays of another shape stops the run. The
functions of this library raise the original error. Your own program (`jax.jit`) raises a
`JaxRuntimeError` whose text contains the message; inside `with failures():` it raises the original
error. A `Record` with a file is saved when a run stops.

**Threads and memory.** On a CPU the function runs on the thread of the compiled program, on a copy
of its memory, which is the only copy of the batch. The function must not call JAX, because JAX may
then wait for the thread on which the function runs. (`jax.pure_callback` itself causes this
deadlock for arrays larger than 100 kB on a machine with one core. This module therefore uses
buffers.) On other devices, arrays go through the memory of the host.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree, _repr, rewards
from tiltjax._captured import captured, is_torch
from tiltjax.external._attempts import TimedOut, retry, within
from tiltjax.external._callback import Callback
from tiltjax.external._record import Record


class External(rewards.Reward):
    """A function outside of JAX, as a reward `f(x)` or as a network `f(t, x, ...)`; built by
    `from_numpy`, `from_torch` and `from_onnx`, whose arguments are its fields.

    Build it once: a new function or record makes a new `External`, which compiles again.

    **Raises:** in a run: the exception of the function; `TimeoutError`; `ValueError` for shapes,
    `TypeError` for dtypes; `FloatingPointError` for NaN and infinity (a reward of -inf excludes a
    sample); `ValueError` if a run needs a derivative that the function does not have.
    """

    fn: Callable = eqx.field(static=True)
    value_and_grad: Callable | None = eqx.field(static=True)
    vjp: Callable | None = eqx.field(static=True)
    output_shape: tuple[int, ...] | None = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)
    timeout: float | None = eqx.field(static=True)
    retries: int = eqx.field(static=True)
    backoff: float = eqx.field(static=True)
    record: Record | None = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __init__(
        self,
        fn: Callable,
        *,
        value_and_grad: Callable | None = None,
        vjp: Callable | None = None,
        output_shape: tuple[int, ...] | None = None,
        batched: bool = True,
        chunk_size: int | None = None,
        timeout: float | None = None,
        retries: int = 0,
        backoff: float = 1.0,
        record: Record | None = None,
        name: str | None = None,
    ):
        _checks.function(fn, "fn")
        refuse_training_mode(fn)
        for part, what in ((value_and_grad, "value_and_grad"), (vjp, "vjp")):
            if part is not None:
                _checks.function(part, what)
                refuse_training_mode(part)
        if record is not None:
            _checks.instance(record, Record, "record", "use Record('queries.npz')")
        if chunk_size is not None and not batched:
            raise ValueError("batched=False takes one sample per call: leave out chunk_size")
        self.fn, self.value_and_grad, self.vjp, self.record = fn, value_and_grad, vjp, record
        self.output_shape = (
            None
            if output_shape is None
            else tuple(_checks.count(n, "every entry of output_shape") for n in output_shape)
        )
        self.batched = _checks.flag(batched, "batched")
        self.chunk_size = None if chunk_size is None else _checks.count(chunk_size, "chunk_size")
        self.timeout = (
            None
            if timeout is None
            else _checks.number(timeout, "timeout", 0, math.inf, closed="neither")
        )
        self.retries = _checks.count(retries, "retries", 0)
        self.backoff = _checks.number(backoff, "backoff", 0)
        self.name = name or getattr(fn, "__name__", type(fn).__name__)

    def _call(self, **given: Any) -> str:
        return _repr.call(self, name=None, **given)

    def __call__(self, *args: Array) -> Array:
        if len(args) == 1 and self.output_shape is None:
            return _reward(self, *args)
        args = tuple(map(jnp.asarray, args))
        if self.record is not None:
            raise ValueError(f"a Record stores rewards, not the outputs of the {self._what(args)}")
        if len(args) == 1 or args[0].ndim == 0:
            return _network(self, *args)
        if args[0].ndim > 1 or any(arg.shape[:1] != args[0].shape for arg in args):
            shapes = ", ".join(str(arg.shape) for arg in args)
            raise ValueError(
                f"the {self._what(args)} needs one time of shape () and one sample of each other "
                f"argument, or times of shape (n,) and n samples, got shapes {shapes}"
            )
        return jax.vmap(lambda *args: _network(self, *args))(*args)

    def _what(self, args: tuple) -> str:
        reward = len(args) == 1 and self.output_shape is None
        return f"external {'reward' if reward else 'network'} {self.name!r}"

    def evaluate(self, *args: np.ndarray, gradient: bool = False) -> tuple[np.ndarray, ...]:
        """`(values,)` of a batch, `(n, *shape)` for each argument, as a run computes them, or
        `(values, gradients)` of a reward. Use it to test a function before a run.

        **Raises:** the errors that the class lists. An error of the function is raised unchanged.
        """
        return self.values_and_gradients(*args) if gradient else self.values(*args)

    def values(self, *args: np.ndarray) -> tuple[np.ndarray, ...]:
        """`(values,)` of a batch."""
        state = state_of(args)
        sample = _shape_of_output(self, [arg.shape[1:] for arg in args])
        kind = "values" if sample == () else "an output"
        check = lambda result, rows: (self._checked(result, kind, sample, rows, state),)
        return self._in_chunks(self.fn, args, check)

    def values_and_gradients(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """`(values, gradients)` of a batch, for a reward."""
        fn = self.value_and_grad
        if fn is None and self.vjp is not None:
            vjp = self.vjp
            fn = lambda x: (self.fn(x), vjp(x, np.ones(np.shape(x)[:1], x.dtype)))
        if fn is None:
            raise ValueError(_no_derivative(self, (x,)))

        def check(result: Any, rows: tuple) -> tuple[np.ndarray, ...]:
            if not (isinstance(result, tuple | list) and len(result) == 2):
                raise TypeError(
                    f"value_and_grad of {self.name!r} must return (values, gradients), got "
                    f"{type(result).__name__}"
                )
            values = self._checked(result[0], "values", (), rows, x)
            return values, self._checked(result[1], "gradients", x.shape[1:], rows, x)

        return self._in_chunks(fn, (x,), check)

    def pull_back(self, *args: np.ndarray) -> tuple[np.ndarray, ...]:
        """The products of cotangents with the Jacobian, for a network: of `(*inputs, cotangents)`
        the gradients with respect to the inputs of floating dtype. NaN stands for a gradient that
        `vjp` does not return.
        """
        *inputs, _ = args
        state = state_of(inputs)
        floating = [i for i, arg in enumerate(inputs) if arg.dtype.kind == "f"]

        def check(result: Any, rows: tuple) -> tuple[np.ndarray, ...]:
            if not isinstance(result, tuple | list):  # that of the state alone
                result = [result if arg is state else None for arg in inputs]
            if len(result) != len(inputs):
                raise TypeError(
                    f"vjp of {self.name!r} must return one gradient, that of the state, or one "
                    f"for each of its {len(inputs)} arguments, got {len(result)}"
                )
            unknown = lambda i: np.full(rows[i].shape, np.nan, inputs[i].dtype)
            return tuple(
                unknown(i)
                if result[i] is None
                else self._checked(result[i], "gradients", inputs[i].shape[1:], rows, inputs[i])
                for i in floating
            )

        return self._in_chunks(self.vjp, args, check)

    def _in_chunks(
        self, fn: Callable | None, args: tuple[np.ndarray, ...], check: Callable
    ) -> tuple[np.ndarray, ...]:
        assert fn is not None
        num = len(args[0])
        size = self.chunk_size or max(num, 1) if self.batched else 1
        chunks = []
        for start in range(0, max(num, 1), size):
            rows = tuple(arg[start : start + size] for arg in args)
            try:
                chunks.append(self._attempt(fn, rows, check))
            except BaseException as error:
                self._add_notes(error, rows)
                raise
            if self.record is not None:
                self.record.add(np.array(rows[0]), chunks[-1][0])
        if len(chunks) == 1:
            return chunks[0]
        return tuple(np.concatenate(parts) for parts in zip(*chunks, strict=True))

    def _attempt(self, fn: Callable, rows: tuple[np.ndarray, ...], check: Callable) -> tuple:
        def call() -> tuple[np.ndarray, ...]:
            # Copies, because the function may change them, and a call that timed out may still
            # read them.
            copies = [np.array(arg if self.batched else arg[0]) for arg in rows]
            return check(within(self.timeout, lambda: fn(*copies)), rows)

        try:
            return retry(call, self.retries, self.backoff)
        except TimedOut:
            times = f", {self.retries + 1} times" if self.retries else ""
            raise TimeoutError(
                f"the {self._what(rows)} did not return within {self.timeout:g} s for a batch of "
                f"{len(rows[0])}{times}: increase timeout=, lower chunk_size=, or check the service"
            ) from None

    def _add_notes(self, error: BaseException, rows: tuple[np.ndarray, ...]) -> None:
        shape = state_of(rows).shape
        error.add_note(f"Raised by the {self._what(rows)} for a batch of shape {shape}.")
        if self.record is not None and self.record.path is not None:
            self.record.save()
            error.add_note(f"{len(self.record)} evaluated samples are in {self.record.path}.")

    def _checked(
        self, part: Any, kind: str, sample: tuple[int, ...], rows: tuple, like: np.ndarray
    ) -> np.ndarray:
        """`part` as an array `(n, *sample)` of the dtype of `like`, if that is what it is."""
        array, state = np.asarray(part), state_of(rows)
        returned = f"the {self._what(rows)} returned {kind}"
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{returned} of dtype {array.dtype}, expected real numbers")
        num, of_input = len(state), state.shape[0 if self.batched else 1 :]
        expected = (num, *sample) if self.batched else sample
        if array.shape != expected:
            raise ValueError(
                f"{returned} of shape {array.shape}, expected {expected} for an input of shape "
                f"{of_input}" + ("" if self.batched else " (batched=False)")
            )
        dtype = like.dtype if like.dtype.kind == "f" else np.dtype(np.float64)
        array = array.reshape(num, *sample).astype(dtype, copy=False)
        with np.errstate(all="ignore"):
            if np.isfinite(np.vdot(array, array)):  # the usual case, in one pass
                return array
        # -inf excludes a sample from a reward. A gradient may be infinite.
        bad = {
            "values": np.isnan(array) | (array == np.inf),
            "gradients": np.isnan(array),
            "an output": ~np.isfinite(array),
        }[kind]
        # A state that is not finite is the error of the model, and the run reports it.
        finite = np.all(np.isfinite(state.reshape(num, -1)), axis=1)
        bad = np.any(bad.reshape(num, -1), axis=1) & finite
        if bad.any():
            what = {"values": "NaN or +inf", "gradients": "NaN", "an output": "NaN or infinity"}
            raise FloatingPointError(
                f"{returned} with {what[kind]} for {bad.sum()} of {num} samples"
            )
        return array


def state_of(args: Any) -> Any:
    """The state among the arguments `(x,)` or `(t, x, ...)`."""
    return args[min(1, len(args) - 1)]


def _shape_of_output(function: External, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the output for one sample, from the shapes of the arguments."""
    if function.output_shape is not None:
        return function.output_shape
    return () if len(shapes) == 1 else shapes[1]


def _is_floating(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _result_dtype(x: Array) -> Any:
    # Rewards of tokens use JAX's default precision.
    return x.dtype if _is_floating(x) else jnp.dtype(jnp.result_type(float))


def _call(function: External, method: str, args: tuple, *out: tuple) -> tuple[Array, ...]:
    return Callback(function, method, tuple(arg.ndim for arg in args), out)(*args)


# A reward: its value and gradient come from one call.


@jax.custom_jvp
def _reward(function: External, x: Array) -> Array:
    return _call(function, "values", (x,), ((), _result_dtype(x)))[0]


@_reward.defjvp
def _reward_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    function, x = primals
    if function.value_and_grad is None and function.vjp is None:
        raise ValueError(_no_derivative(function, (x,)))
    value, gradient = _value_and_grad(function, x)
    return value, jnp.sum(gradient * tangents[1])


@jax.custom_jvp
def _value_and_grad(function: External, x: Array) -> tuple[Array, ...]:
    dtype = _result_dtype(x)
    return _call(function, "values_and_gradients", (x,), ((), dtype), (x.shape, dtype))


@_value_and_grad.defjvp
def _value_and_grad_jvp(primals: tuple, tangents: tuple) -> tuple:
    raise ValueError(
        f"the external reward {primals[0].name!r} has no second derivatives, which Laplace needs: "
        "use PlugIn, dps or Conjugate, or write the reward in JAX"
    )


# A network: its derivative is a product with a cotangent.


@jax.custom_vjp
def _network(function: External, *args: Array) -> Array:
    shape = _shape_of_output(function, [arg.shape for arg in args])
    return _call(function, "values", args, (shape, _result_dtype(state_of(args))))[0]


def _network_forward(function: External, *args: Array) -> tuple[Array, Any]:
    if function.vjp is None:
        raise ValueError(_no_derivative(function, args))
    return _network(function, *args), (function, args)


def _network_backward(residuals: Any, cotangent: Array) -> tuple:
    function, args = residuals
    gradients = iter(_pull_back(function, args, cotangent))
    return None, *(next(gradients) if _is_floating(arg) else None for arg in args)


_network.defvjp(_network_forward, _network_backward)


@jax.custom_jvp
def _pull_back(function: External, args: tuple, cotangent: Array) -> tuple[Array, ...]:
    out = [(arg.shape, arg.dtype) for arg in args if _is_floating(arg)]
    return _call(function, "pull_back", (*args, cotangent), *out)


@_pull_back.defjvp
def _pull_back_jvp(primals: tuple, tangents: tuple) -> tuple:
    raise ValueError(
        f"the external network {primals[0].name!r} has no second derivatives: write it in JAX"
    )


def _no_derivative(function: External, args: tuple) -> str:
    if len(args) == 1 and function.output_shape is None:
        return (
            f"the external reward {function.name!r} has no gradient: give value_and_grad=, or "
            + without_gradient()
        )
    return (
        f"the external network {function.name!r} has no derivative: give vjp=, or use a method "
        "that does not differentiate the network: Conjugate, or one that needs no gradients at "
        "all, such as best_of_n, softmax_of_n and fk_steering"
    )


def from_numpy(fn: Callable, **settings: Any) -> External:
    """A Python function of NumPy arrays as a reward `f(x)` or a network `f(t, x, ...)`.

    ```
    def score(batch):                                # NumPy, (n, *shape) -> (n,)
        reply = requests.post(url, json=batch.tolist(), timeout=10)
        return np.asarray(reply.json())

    record = tj.external.Record("queries.npz")
    reward = tj.external.from_numpy(score, timeout=30, retries=2, record=record)
    best = tj.best_of_n(particles, reward, n=8)
    ```

    **Arguments:**

    - `fn`: of a batch. A reward takes `x` `(n, *shape)` and returns real numbers `(n,)`. A network
      takes times `(n,)`, states `(n, *shape)` and further arguments `(n, ...)`, and returns an
      array of the shape of the states. With `batched=False`, `fn` takes one sample. Arrays are
      copies in float32 or float64, which the function may change.
    - `value_and_grad(x) -> (values, gradients)`: both, `(n,)` and `(n, *shape)`, needed if the
      reward is differentiated.
    - `vjp(*args, cotangents) -> gradients`: the products of cotangents, of the shape of the output,
      with the Jacobian, needed if the network is differentiated: the gradient with respect to the
      state, or a tuple of one for each argument. A gradient that is `None` or is not returned
      counts as NaN.
    - `output_shape`: the shape of the output for one sample, if it is neither that of a reward nor
      that of a network, as for a decoder.
    - `chunk_size`: the largest number of samples in one call.
    - `timeout`: the time limit of a call, in seconds. After the limit the call counts as failed,
      but the function continues to run in its thread.
    - `retries`: the number of repetitions of a failed call, after `backoff`, `2 * backoff`,
      `4 * backoff`, ... seconds.
    - `record`: a `Record`, for rewards.
    - `name`: for messages; by default the name of the function.

    **Raises:** `ValueError` for a PyTorch or Flax module in training mode that `fn` is or uses; in
    a run, as `External`.
    """
    return External(fn, **settings)


def without_gradient() -> str:
    """The methods that need no gradient of a reward, for messages."""
    return (
        "use a method without gradients: best_of_n, softmax_of_n, fk_steering, svdd, or smc(key, "
        "model, dps(model, ValueOnly(reward), scale), proposal=proposals.Base(), num=...)"
    )


def refuse_training_mode(fn: Callable) -> None:
    """Raise a `ValueError` if a function is, or uses, a PyTorch or Flax module in training mode."""
    found = [module for _, module in captured(fn)]
    for module in filter(is_torch, found):
        if part := next((part for part in module.modules() if part.training), None):
            raise ValueError(
                f"{type(part).__name__} is in training mode, where samples of a batch may depend "
                "on each other: call .eval() first"
            )
    _pytree.refuse_training_mode(found)
