"""Python functions inside compiled programs, with one flat batch per call and their own errors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array

from tiltjax import _callbacks


class Callback(NamedTuple):
    """A method of an `External`, from NumPy arrays `(n, *shape)` to a tuple of them, as a function
    of JAX arrays, whose leading axes become the batch.

    `ranks` has the number of axes of one sample for each argument, `out` the shapes and dtypes of
    the results for one sample. Callbacks are compared by value, so that equal ones compile once.
    """

    function: Any
    method: str
    ranks: tuple[int, ...]
    out: tuple[tuple[tuple[int, ...], Any], ...]

    def __call__(self, *args: Array) -> tuple[Array, ...]:
        return _compiled(self, *args)

    def of_numpy(self, *args: np.ndarray) -> tuple[np.ndarray, ...]:
        """The results for any number of leading axes."""
        cuts = [arg.ndim - rank for arg, rank in zip(args, self.ranks, strict=True)]
        shapes = [(arg.shape[:cut], arg.shape[cut:]) for arg, cut in zip(args, cuts, strict=True)]
        leading = np.broadcast_shapes(*(before for before, _ in shapes))
        rows = [
            np.broadcast_to(arg, leading + shape).reshape(-1, *shape)
            for arg, (_, shape) in zip(args, shapes, strict=True)
        ]
        try:
            parts = getattr(self.function, self.method)(*rows)
        except BaseException as error:
            raise _callbacks.outside(error) from error
        return tuple(part.reshape(leading + part.shape[1:]) for part in parts)

    def into_buffers(self, _context: Any, out: tuple[Any, ...], *args: Any) -> None:
        """Run on a CPU: read from and write to the memory of the program."""
        for buffer, part in zip(out, self.of_numpy(*map(np.asarray, args)), strict=True):
            np.asarray(buffer)[...] = part

    def of_arrays(self, *args: Any) -> tuple[np.ndarray, ...]:
        """The results on other devices, for arrays that JAX has copied to the CPU."""
        return self.of_numpy(*map(np.asarray, args))


def host_dtype(dtype: Any) -> Any:
    """The dtype on the host of an array of this dtype: NumPy lacks JAX's half precision."""
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if half else dtype


def _program(callback: Callback, *args: Array) -> tuple[Array, ...]:
    wide = [arg.astype(host_dtype(arg.dtype)) for arg in args]
    out = tuple(jax.ShapeDtypeStruct(shape, host_dtype(dtype)) for shape, dtype in callback.out)
    results = jax.lax.platform_dependent(
        *wide,
        cpu=buffer_callback(callback.into_buffers, out, vmap_method="expand_dims"),
        default=lambda *x: jax.pure_callback(
            callback.of_arrays, out, *x, vmap_method="expand_dims"
        ),
    )
    dtypes = (dtype for _, dtype in callback.out)
    return tuple(result.astype(dtype) for result, dtype in zip(results, dtypes, strict=True))


_compiled = jax.jit(_program, static_argnums=0)
