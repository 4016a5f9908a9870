r"""A small network that trains in minutes, for data of few dimensions.

`Velocity` is

    b(t, x) = W_d h_d + b_d,  h_0 = (x, cos(pi t), sin(pi t), ..., cos(K pi t), sin(K pi t)),
        h_{i+1} = silu(W_i h_i + b_i)

The network takes t through `frequencies = K` cosines and sines. `cos(pi t)` alone distinguishes all
times in [0, 1]. The higher frequencies let the output change quickly near the data, as the
posterior does. The training target decides whether the output is a velocity, a noise or a denoiser.
References: Tancik et al. (arXiv 2006.10739), Fourier features; Elfwing, Uchibe and Doya (arXiv
1702.03118), silu.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tiltjax import _checks


class Velocity(nnx.Module):
    """A multilayer perceptron `(t, x) -> array of the shape of x`, for one state or a batch of
    states.

    **Arguments:**

    - `shape`: of one state, such as `(2,)`; the entries of a state are the inputs.
    - `width`, `depth`: the units of a hidden layer, and the number of hidden layers.
    - `frequencies`: of the embedding of t, K above.
    - `dtype`: of the computation, such as `jnp.bfloat16`; by default the promotion of the dtypes of
      input and parameters. The output has the dtype of x.
    - `param_dtype`: of the parameters.
    - `rngs`: `nnx.Rngs(seed)`, for the initial weights.

    `t` has shape `(*lead,)` and `x` has shape `(*lead, *shape)`, so that the network works with and
    without `batched=True`; with it is faster.

    **Raises:** `ValueError` for other shapes.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 256,
        depth: int = 4,
        frequencies: int = 8,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not isinstance(shape, tuple | list):
            raise TypeError(
                f"shape must be a tuple, the shape of one state such as (2,), got {shape!r}"
            )
        self.shape = tuple(_checks.count(n, "every entry of shape") for n in shape)
        self.frequencies = _checks.count(frequencies, "frequencies")
        hidden = [_checks.count(width, "width")] * _checks.count(depth, "depth")
        size = math.prod(self.shape)
        layer = lambda n, m: nnx.Linear(n, m, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        first, *others = hidden
        self.layers = nnx.List([layer(n, first) for n in (size + 2 * self.frequencies, *others)])
        self.last = layer(first, size)

    def __call__(self, t: Array, x: Array) -> Array:
        lead, shape = x.shape[: x.ndim - len(self.shape)], x.shape[x.ndim - len(self.shape) :]
        if shape != self.shape or jnp.shape(t) != lead:
            raise ValueError(
                f"expected x of shape (*lead, {', '.join(map(str, self.shape))}) and t of shape "
                f"(*lead,), got {x.shape} and {jnp.shape(t)}"
            )
        multiples = math.pi * jnp.arange(1, self.frequencies + 1, dtype=x.dtype)
        phase = jnp.asarray(t, x.dtype)[..., None] * multiples.reshape(*[1] * len(lead), -1)
        hidden = jnp.concatenate([x.reshape(*lead, -1), jnp.cos(phase), jnp.sin(phase)], axis=-1)
        for layer in self.layers:
            hidden = nnx.silu(layer(hidden))
        return self.last(hidden).reshape(x.shape).astype(x.dtype)
