"""Python functions inside compiled programs, with one flat batch per call and their own errors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array

from tiltjax import _callbacks


class Callback(NamedTuple):
    """`reward.evaluate(x, gradient)`, a function of NumPy arrays `(n, *shape)`, as a function of
    JAX arrays, whose leading axes become the batch.

    `rank` is the number of axes of one sample. Callbacks are compared by value, so that equal ones
    compile once.
    """

    reward: Any
    gradient: bool
    rank: int

    def __call__(self, x: Array) -> tuple[Array, ...]:
        return _compiled(self, x)

    def of_numpy(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """The result for any number of leading axes."""
        leading, shape = x.shape[: x.ndim - self.rank], x.shape[x.ndim - self.rank :]
        try:
            parts = self.reward.evaluate(x.reshape(-1, *shape), self.gradient)
        except BaseException as error:
            raise _callbacks.outside(error) from error
        return tuple(part.reshape(leading + part.shape[1:]) for part in parts)

    def into_buffers(self, _context: Any, out: tuple[Any, ...], x: Any) -> None:
        """Run on a CPU: read from and write to the memory of the program."""
        for buffer, part in zip(out, self.of_numpy(np.asarray(x).copy()), strict=True):
            np.asarray(buffer)[...] = part

    def of_arrays(self, x: Any) -> tuple[np.ndarray, ...]:
        """The result on other devices, for arrays that JAX has copied to the CPU."""
        return self.of_numpy(np.array(x))


def _program(callback: Callback, x: Array) -> tuple[Array, ...]:
    # NumPy lacks JAX's half precision. Rewards of tokens use JAX's default precision.
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    wide = x.astype(jnp.float32) if floating and jnp.finfo(x.dtype).bits < 32 else x
    dtype = wide.dtype if floating else jnp.dtype(jnp.result_type(float))
    value, gradient = jax.ShapeDtypeStruct((), dtype), jax.ShapeDtypeStruct(x.shape, dtype)
    out = (value, gradient) if callback.gradient else (value,)
    results = jax.lax.platform_dependent(
        wide,
        cpu=buffer_callback(callback.into_buffers, out, vmap_method="expand_dims"),
        default=lambda x: jax.pure_callback(callback.of_arrays, out, x, vmap_method="expand_dims"),
    )
    return tuple(result.astype(x.dtype) if floating else result for result in results)


_compiled = jax.jit(_program, static_argnums=0)
