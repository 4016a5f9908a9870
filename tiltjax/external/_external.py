r"""Rewards outside of JAX: a NumPy function, a PyTorch network, a service on another machine.

    particles x draws --vmap--> one batch (n, *shape) --> fn --> values (n,)            r(x)
                                              value_and_grad --> values, gradients      r(x), ∇r(x)

`External(fn)` is a reward like any other. It can be added and scaled, and it works inside compiled,
vectorized and scanned loops. At any depth of vectorization, `fn` gets one flat batch. Methods need

| of the reward | methods |
|---|---|
| values only | selection; `fk_steering`, `svdd`; `smc` with `ValueOnly` and `proposals.Base()` |
| gradients | `PlugIn`, `dps`, `fmrg`, `Conjugate`: pass `value_and_grad`, or use `from_torch` |
| second derivatives | `Laplace`: not with these rewards |

`fn` must return the same value for the same sample, independent of the rest of the batch. The
number and the order of the calls are not guaranteed: a value that is not needed is not computed,
and a value that several devices need may be computed on each. A `Record` stores the calls.

**Failures.** A reward that raises, hangs, or does not return n numbers stops the run. The functions
of this library raise the original error. Your own program (`jax.jit`) raises a `JaxRuntimeError`
whose text contains the message; inside `with failures():` it raises the original error. A `Record`
with a file is saved when a run stops.

**Threads.** On a CPU the function runs on the thread of the compiled program, on a copy of its
memory. The function must not call JAX, because JAX may then wait for the thread on which the
function runs. (`jax.pure_callback` itself causes this deadlock for arrays larger than 100 kB on a
machine with one core. This module therefore uses buffers.)
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
    """A Python function of NumPy arrays as a reward.

    ```
    def score(batch):                                # NumPy, (n, *shape) -> (n,)
        reply = requests.post(url, json=batch.tolist(), timeout=10)
        return np.asarray(reply.json())

    record = tj.external.Record("queries.npz")
    reward = tj.external.External(score, timeout=30, retries=2, record=record)
    best = tj.best_of_n(particles, reward, n=8)
    ```

    **Arguments:**

    - `fn(x) -> values`: from a batch `(n, *shape)` to real numbers `(n,)`; with `batched=False`
      from one sample to one number. `x` is a copy in float32 or float64, which the function may
      change.
    - `value_and_grad(x) -> (values, gradients)`: both, `(n,)` and `(n, *shape)`, needed if the
      reward is differentiated.
    - `chunk_size`: the largest number of samples in one call.
    - `timeout`: the time limit of a call, in seconds. After the limit the call counts as failed,
      but the function continues to run in its thread.
    - `retries`: the number of repetitions of a failed call, after `backoff`, `2 * backoff`,
      `4 * backoff`, ... seconds.
    - `record`: a `Record`.
    - `name`: for messages; by default the name of the function.

    Build the reward once: a new function or record makes a new reward, which compiles again.

    **Raises:** `ValueError` for a PyTorch or Flax module in training mode that `fn` is or uses; in
    a run: the exception of the function; `TimeoutError`; `ValueError` for shapes, `TypeError` for
    dtypes; `FloatingPointError` for NaN or +inf (-inf excludes a sample); `ValueError` if a run
    needs a gradient and there is no `value_and_grad`.
    """

    fn: Callable = eqx.field(static=True)
    value_and_grad: Callable | None = eqx.field(static=True)
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
        if value_and_grad is not None:
            _checks.function(value_and_grad, "value_and_grad")
            refuse_training_mode(value_and_grad)
        if record is not None:
            _checks.instance(record, Record, "record", "use Record('queries.npz')")
        if chunk_size is not None and not batched:
            raise ValueError("batched=False takes one sample per call: leave out chunk_size")
        self.fn, self.value_and_grad, self.record = fn, value_and_grad, record
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

    def __call__(self, x: Array) -> Array:
        return _value(self, x)

    def evaluate(self, x: np.ndarray, gradient: bool = False) -> tuple[np.ndarray, ...]:
        """`(values,)` or `(values, gradients)` of a batch `(n, *shape)`, as a run computes them.
        Use it to test a reward before a run.

        **Raises:** the errors that the class lists. An error of the function is raised unchanged.
        """
        fn = self.value_and_grad if gradient else self.fn
        if fn is None:
            raise ValueError(_no_gradient(self))
        size = self.chunk_size or max(len(x), 1) if self.batched else 1
        chunks = []
        for rows in np.split(x, range(size, len(x), size)):
            try:
                chunks.append(self._evaluate_chunk(fn, rows, gradient))
            except BaseException as error:
                self._add_notes(error, rows.shape)
                raise
            if self.record is not None:
                self.record.add(rows, chunks[-1][0])
        return tuple(np.concatenate(parts) for parts in zip(*chunks, strict=True))

    def _evaluate_chunk(self, fn: Callable, x: np.ndarray, gradient: bool) -> tuple:
        def call() -> tuple[np.ndarray, ...]:
            # A copy, because the function may change it, and a call that timed out may still read
            # it.
            copy = x.copy()
            result = within(self.timeout, lambda: fn(copy if self.batched else copy[0]))
            return self._check(result, x, gradient)

        try:
            return retry(call, self.retries, self.backoff)
        except TimedOut:
            times = f", {self.retries + 1} times" if self.retries else ""
            raise TimeoutError(
                f"the external reward {self.name!r} did not return within {self.timeout:g} s for a "
                f"batch of {len(x)}{times}: increase timeout=, lower chunk_size=, or check the "
                "service"
            ) from None

    def _add_notes(self, error: BaseException, shape: tuple[int, ...]) -> None:
        error.add_note(f"Raised by the external reward {self.name!r} for a batch of shape {shape}.")
        if self.record is not None and self.record.path is not None:
            self.record.save()
            error.add_note(f"{len(self.record)} evaluated samples are in {self.record.path}.")

    def _check(self, result: Any, x: np.ndarray, gradient: bool) -> tuple[np.ndarray, ...]:
        if not gradient:
            return (self._check_part(result, "values", x.shape[:1], x),)
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(
                f"value_and_grad of {self.name!r} must return (values, gradients), got "
                f"{type(result).__name__}"
            )
        values = self._check_part(result[0], "values", x.shape[:1], x)
        return values, self._check_part(result[1], "gradients", x.shape, x)

    def _check_part(
        self, part: Any, name: str, shape: tuple[int, ...], x: np.ndarray
    ) -> np.ndarray:
        array = np.asarray(part)
        returned = f"the external reward {self.name!r} returned {name}"
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{returned} of dtype {array.dtype}, expected real numbers")
        expected, of_input = (shape, x.shape) if self.batched else (shape[1:], x.shape[1:])
        if array.shape != expected:
            raise ValueError(
                f"{returned} of shape {array.shape}, expected {expected} for an input of shape "
                f"{of_input}" + ("" if self.batched else " (batched=False)")
            )
        array = array.reshape(shape).astype(x.dtype if x.dtype.kind == "f" else np.float64)
        wrong = np.isnan(array) | ((array == np.inf) & (name == "values"))
        # A state that is not finite is the error of the model, and the run reports it.
        finite = np.all(np.isfinite(x.reshape(len(x), -1)), axis=1)
        wrong = np.any(wrong.reshape(len(x), -1), axis=1) & finite
        if wrong.any():
            what = "NaN or +inf" if name == "values" else "NaN"
            raise FloatingPointError(
                f"{returned} with {what} for {wrong.sum()} of {len(x)} samples"
            )
        return array


@jax.custom_jvp
def _value(reward: External, x: Array) -> Array:
    return Callback(reward, False, x.ndim)(x)[0]


@_value.defjvp
def _value_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    reward, x = primals
    if reward.value_and_grad is None:
        raise ValueError(_no_gradient(reward))
    value, gradient = _value_and_grad(reward, x)
    return value, jnp.sum(gradient * tangents[1])


@jax.custom_jvp
def _value_and_grad(reward: External, x: Array) -> tuple[Array, ...]:
    return Callback(reward, True, x.ndim)(x)


@_value_and_grad.defjvp
def _value_and_grad_jvp(primals: tuple, tangents: tuple) -> tuple:
    raise ValueError(
        f"the external reward {primals[0].name!r} has no second derivatives, which Laplace needs: "
        "use PlugIn, dps or Conjugate, or write the reward in JAX"
    )


def _no_gradient(reward: External) -> str:
    return (
        f"the external reward {reward.name!r} has no gradient: give value_and_grad=, or "
        + without_gradient()
    )


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
