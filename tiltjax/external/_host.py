r"""Rewards outside of JAX: a NumPy function, a PyTorch network, a service on another machine.

    particles x draws --vmap--> one batch (n, *shape) --host--> fn --> values (n,)      r(x)
                                                            value_and_grad --> values, gradients
                                                                r(x), ∇r(x), in one call

`External(fn)` is a reward like any other: it adds, scales, and stands inside compiled, batched and
scanned loops. However deeply it is batched, `fn` sees one flat batch. What a method asks of it:

| asks for | methods |
|---|---|
| values alone | selection; `smc` with `ValueOnly` and `proposals.Base()`; `ess_threshold=0` |
| gradients | `PlugIn`, `dps`, `fmrg`, `Conjugate`: give `value_and_grad`, or use `from_torch` |
| second derivatives | `Laplace`: not with these rewards |

`fn` must be a function: the same answer for the same sample, whatever else is in the batch. How
often and in which order it is called is not promised, also not once for every use: an answer that
nothing needs is not asked for, and one that is needed on several devices may be asked for on each.
What it was asked for is written down by a `Record`.

**Failures.** A reward that raises, hangs, or answers with something else than n numbers stops the
run. JAX reports this as a `JaxRuntimeError` (or a `ValueError`) whose last lines are the message;
inside of `with failures():` the error comes out as what it was. When it stops, what was answered
until then is saved, if there is a `Record` with a path.

**Threads.** On a CPU the function runs on the thread of the compiled program, on a copy of its
memory, and must not call JAX: that can wait for the very thread it occupies. (`jax.pure_callback`
itself does so, where arrays are larger than 100 kB and the machine has one core; hence buffers
here.)
"""

import collections
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array

from tiltjax import _checks, rewards

_raised: collections.deque[BaseException] = collections.deque(
    maxlen=8
)  # for `failures`, the latest last


class Record:
    """Every sample that a reward answered for, with its value, in the order of the answers.

    `.x`, `(n, *shape)`; `.values`, `(n,)`; `.calls`, of the function; `len`, n. **Arguments:**
    `path` of an `.npz` file with `x` and `values`, written when the reward fails, after a call if
    `every` seconds have passed since the last time, and by `save()`.

    **Raises:** `ValueError` for a path that is no `.npz` file, and where `save()` has none.
    """

    def __init__(self, path: str | os.PathLike | None = None, every: float = 60.0):
        self.path = None if path is None else Path(_checks.file_name(path, "path"))
        if self.path is not None and self.path.suffix != ".npz":
            raise ValueError(f"path: a record is an .npz file, got {str(self.path)!r}")
        self.every, self.calls = float(_checks.nonnegative(every, "every")), 0
        self._x: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._lock, self._saved = threading.RLock(), time.monotonic()

    def __len__(self) -> int:
        return sum(map(len, self._values))

    @property
    def x(self) -> np.ndarray:
        """The samples."""
        with self._lock:
            return np.concatenate(self._x) if self._x else np.zeros(0)

    @property
    def values(self) -> np.ndarray:
        """Their rewards."""
        with self._lock:
            return np.concatenate(self._values) if self._values else np.zeros(0)

    def add(self, x: np.ndarray, values: np.ndarray) -> None:
        """One answered call."""
        with self._lock:
            self._x.append(x)
            self._values.append(values)
            self.calls += 1
            if self.path is not None and time.monotonic() - self._saved >= self.every:
                self.save()

    def save(self) -> None:
        """Write the file: all of it or nothing. **Raises:** `ValueError` without a path."""
        if self.path is None:
            raise ValueError("this record has no path: use Record('queries.npz')")
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial.npz")
            np.savez(partial, x=self.x, values=self.values)
            os.replace(partial, self.path)
            self._saved = time.monotonic()


class External(rewards.Reward):
    """A function on the host as a reward.

    ```
    def score(batch):                                # NumPy, (n, *shape) -> (n,)
        reply = requests.post(url, json=batch.tolist(), timeout=10)
        return np.asarray(reply.json())

    record = tj.external.Record("queries.npz")
    reward = tj.external.External(score, timeout=30, retries=2, record=record)
    best = tj.best_of_n(particles, reward, n=8)
    ```

    **Arguments:**

    - `fn(x) -> values`: a batch `(n, *shape)` to `(n,)` real numbers; with `batched=False` one
      sample to one number. `x` is float32 or float64, the function's own to keep or change.
    - `value_and_grad(x) -> (values, gradients)`: both at once, `(n,)` and `(n, *shape)`, where the
      reward has to be differentiated.
    - `chunk_size`: the most samples in one call.
    - `timeout`: seconds in which a call has to end; a call that does not is left behind in its
      thread.
    - `retries`: how often a call that failed is repeated, after `backoff`, `2 * backoff`,
      `4 * backoff`, ... seconds.
    - `record`: a `Record`.
    - `name`: for messages; the function's by default.

    Build it once: another function, or record, is another reward, and compiles anew.

    **Raises:** in the run that asks: what the function raised; `TimeoutError`; `ValueError` for
    shapes, `TypeError` for dtypes; `FloatingPointError` for NaN or +inf (-inf excludes a sample).
    Where a gradient is asked for that is not there, `ValueError`.
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
        for given, what in ((fn, "fn"), (value_and_grad, "value_and_grad")):
            if not callable(given) and (given is not None or what == "fn"):
                raise TypeError(
                    f"{what} must be a function of a NumPy array, got {type(given).__name__}"
                )
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be text, for messages, got {type(name).__name__}")
        batched = _checks.flag(batched, "batched")
        if chunk_size is not None and not batched:
            raise ValueError(
                f"batched=False asks for one sample a call: batch={chunk_size} has no meaning then"
            )
        if record is not None:
            _checks.instance(record, Record, "record", "use Record('queries.npz')")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries must be a whole number from 0 on, got {retries!r}")
        self.fn, self.value_and_grad, self.batched = fn, value_and_grad, batched
        self.chunk_size = None if chunk_size is None else _checks.count(chunk_size, "chunk_size")
        self.timeout = None if timeout is None else float(_checks.positive(timeout, "timeout"))
        self.retries, self.backoff = retries, float(_checks.nonnegative(backoff, "backoff"))
        self.record = record
        self.name = name or getattr(fn, "__name__", type(fn).__name__)

    def __call__(self, x: Array) -> Array:
        return _value(self, x)

    def answer(self, x: np.ndarray, gradient: bool = False) -> tuple[np.ndarray, ...]:
        """What the loops are told of a batch `(n, *shape)`: `(values,)`, or `(values, gradients)`.
        For trying a reward before a run.

        **Raises:** as the class says, each error as itself.
        """
        fn = self.value_and_grad if gradient else self.fn
        if fn is None:
            raise ValueError(_no_gradient(self))
        size = self.chunk_size or max(len(x), 1) if self.batched else 1
        parts = []
        for rows in np.split(x, range(size, len(x), size)):
            try:
                parts.append(self._insist(fn, rows, gradient))
            except BaseException as error:
                error.add_note(
                    f"Raised by the external reward {self.name!r} for a batch of shape "
                    f"{rows.shape}."
                )
                if self.record is not None and self.record.path is not None:
                    self.record.save()
                    error.add_note(
                        f"{len(self.record)} samples that it answered for are in "
                        f"{self.record.path}."
                    )
                raise
            if self.record is not None:
                self.record.add(rows, parts[-1][0])
        return tuple(np.concatenate(each) for each in zip(*parts, strict=True))

    def _insist(self, fn: Callable, x: np.ndarray, gradient: bool) -> tuple[np.ndarray, ...]:
        """The checked answer of one call, and of its repetitions if it fails."""
        for left in reversed(range(self.retries + 1)):
            given = (
                x.copy()
            )  # the function may write into it, and a call left behind may still read it
            try:
                result = _within(
                    self.timeout, lambda given=given: fn(given if self.batched else given[0])
                )
                return self._check(result, x, gradient)
            except _Late:
                if not left:
                    tried = f", {self.retries + 1} times" if self.retries else ""
                    raise TimeoutError(
                        f"the external reward {self.name!r} did not answer within {self.timeout:g} "
                        f"s for a batch of {len(x)}{tried}: "
                        "raise timeout=, lower chunk_size=, or look after the service"
                    ) from None
            except Exception:
                if not left:
                    raise
            time.sleep(self.backoff * 2 ** (self.retries - left))
        raise AssertionError("unreachable")

    def _check(self, result: Any, x: np.ndarray, gradient: bool) -> tuple[np.ndarray, ...]:
        if gradient and not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(
                f"value_and_grad of {self.name!r} must return (values, gradients), got "
                f"{type(result).__name__}"
            )
        names, shapes = ("values", "gradients"), (x.shape[:1], x.shape)
        checked = []
        for part, name, shape in zip(
            result if gradient else (result,), names, shapes, strict=False
        ):
            array = np.asarray(part)
            if array.dtype.kind not in "fiu":
                raise TypeError(
                    f"the external reward {self.name!r} returned {name} of dtype {array.dtype}, "
                    "expected real numbers"
                )
            expected = shape if self.batched else shape[1:]
            if array.shape != expected:
                raise ValueError(
                    f"the external reward {self.name!r} returned {name} of shape {array.shape}, "
                    f"expected {expected} for an input of shape "
                    f"{x.shape if self.batched else x.shape[1:]}"
                    + ("" if self.batched else " (batched=False)")
                )
            array = array.reshape(shape).astype(x.dtype if x.dtype.kind == "f" else np.float64)
            # A state that is not finite is the model's fault, which the run reports.
            wrong = np.isnan(array) | (array == np.inf) if name == "values" else np.isnan(array)
            wrong = np.any(wrong.reshape(len(x), -1), axis=1) & np.all(
                np.isfinite(x.reshape(len(x), -1)), axis=1
            )
            if wrong.any():
                what = "NaN or +inf" if name == "values" else "NaN"
                raise FloatingPointError(
                    f"the external reward {self.name!r} returned {name} with {what} for "
                    f"{wrong.sum()} of {len(x)} samples"
                )
            checked.append(array)
        return tuple(checked)


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """`with failures(): ...` or `@failures()`: an error of an external reward in a compiled program
    is raised as what it was.
    """
    try:
        yield
    except (
        jax.errors.JaxRuntimeError,
        ValueError,
    ) as error:  # which of them depends on JAX's way to the program
        for failure in reversed(_raised):
            name, text = type(failure).__name__, str(failure)
            if (f"{name}: {text}" if text else name) in str(error):
                _raised.remove(failure)
                raise failure from None
        raise


class _Late(Exception):
    """A call did not end in time."""


def _within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """`call()`, given up after some seconds: its thread cannot be ended, but neither does it keep
    the interpreter from ending.
    """
    if seconds is None:
        return call()
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise _Late from None
    if error is not None:
        raise error
    return result


class _Host(NamedTuple):
    """The host side of one call: leading axes, whatever their number, become one batch. Compared by
    value, so that it compiles once.
    """

    reward: External
    gradient: bool
    rank: int

    def answer(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        lead, shape = x.shape[: x.ndim - self.rank], x.shape[x.ndim - self.rank :]
        try:
            parts = self.reward.answer(x.reshape(-1, *shape), self.gradient)
        except BaseException as error:
            _raised.append(error)
            raise
        return tuple(part.reshape(lead + part.shape[1:]) for part in parts)

    def into_buffers(self, _context: Any, out: tuple[Any, ...], x: Any) -> None:
        for buffer, part in zip(out, self.answer(np.asarray(x).copy()), strict=True):
            np.asarray(buffer)[...] = part

    def on_the_cpu(self, x: Any) -> tuple[np.ndarray, ...]:
        return self.answer(np.array(x))


def _program(host: _Host, x: Array) -> tuple[Array, ...]:
    # Half precision is JAX's own affair. Tokens are valued in its default precision.
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    wide = x.astype(jnp.float32) if floating and jnp.finfo(x.dtype).bits < 32 else x
    kind = wide.dtype if floating else jnp.dtype(jnp.result_type(float))
    out = (jax.ShapeDtypeStruct((), kind), jax.ShapeDtypeStruct(x.shape, kind))[: 1 + host.gradient]
    results = jax.lax.platform_dependent(
        wide,
        cpu=buffer_callback(host.into_buffers, out, vmap_method="expand_dims"),
        default=lambda x: jax.pure_callback(host.on_the_cpu, out, x, vmap_method="expand_dims"),
    )
    return tuple(result.astype(x.dtype) if floating else result for result in results)


_ask = jax.jit(_program, static_argnums=0)


@jax.custom_jvp
def _value(reward: External, x: Array) -> Array:
    return _ask(_Host(reward, False, x.ndim), x)[0]


@_value.defjvp
def _value_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    reward, x = primals
    if reward.value_and_grad is None:
        raise ValueError(_no_gradient(reward))
    value, gradient = _both(reward, x)
    return value, jnp.sum(gradient * tangents[1])


@jax.custom_jvp
def _both(reward: External, x: Array) -> tuple[Array, ...]:
    return _ask(_Host(reward, True, x.ndim), x)


@_both.defjvp
def _both_jvp(primals: tuple, tangents: tuple) -> tuple:
    raise ValueError(
        f"the external reward {primals[0].name!r} has no second derivatives, as Laplace wants: use "
        "PlugIn, dps or Conjugate, or write the "
        "reward in JAX"
    )


def _no_gradient(reward: External) -> str:
    return (
        f"the external reward {reward.name!r} has no gradient: give value_and_grad=, or use what "
        "needs none: best_of_n, softmax_of_n, or "
        "smc(key, model, dps(model, ValueOnly(reward), scale), proposal=proposals.Base(), num=...)"
    )
