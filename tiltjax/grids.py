"""Time grids: the increasing times of a run, from noise (0) to data (1)."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _pytree
from tiltjax._checks import concrete, count, finite


def time_grid(times: Any, steps: int | None) -> Array:
    """The times of a run, increasing inside [0, 1]: the given `times`, or
    `linspace(1e-3, 1, steps + 1)` with 100 steps by default. **Raises:** `ValueError`.
    """
    if not concrete(times):
        return _time_grid(times, steps)
    with jax.ensure_compile_time_eval():  # so that the times can be read inside a caller's jit
        return _time_grid(times, steps)


def _time_grid(times: Any, steps: int | None) -> Array:
    if times is None:
        grid = np.linspace(1e-3, 1.0, count(100 if steps is None else steps, "steps") + 1)
        return jax.device_put(grid.astype(jnp.result_type(float)))
    if steps is not None:
        raise ValueError(
            f"give steps or times, not both, got steps = {steps} and times: leave out steps, as "
            "the times determine their number"
        )
    times = finite(times, "times", 1)
    if len(times) < 2:
        raise ValueError(f"times must hold at least a start and an end, got {len(times)} entries")
    if concrete(times):
        values = np.asarray(times)
        if values[0] < 0 or values[-1] > 1:
            raise ValueError(f"times must lie in [0, 1], got [{values.min():g}, {values.max():g}]")
        if not np.all(np.diff(values) > 0):
            raise ValueError(
                f"times must increase strictly from noise (0) to data (1), got {values}"
            )
    return times


def of_width(interpolant: Any, width: float | None, steps: int, dtype: Any) -> Array:
    """The default times of a run for data of standard deviation `width`: those of data of unit
    width, `time_grid(None, steps)`, unless the width is known and not between 0.1 and 10 times
    that of the noise. Then the grid is that of data in this range, in terms of snr times variance,
    and starts at 1e-3 or earlier. For narrow data, up to a quarter of the steps are before it.

    **Raises:** `ValueError` if the times are not distinct in `dtype`.
    """
    times = time_grid(None, steps)
    if not width or not concrete(interpolant):
        return times
    with jax.ensure_compile_time_eval():
        interpolant = _pytree.cast(interpolant, times.dtype)
        factor = beyond(width, float(interpolant.sigma(jnp.zeros((), times.dtype))))
        if factor == 1:
            return times
        scaled = jax.vmap(lambda t: interpolant.time(interpolant.snr(t) / factor**2))
        inner = np.array(scaled(times[:-1]).astype(dtype))
        early, late = float(times[0]), float(inner[0])
        # Narrow data does not show before `late`, but the flow bends until then.
        ahead = min(math.ceil((late - early) * steps), steps // 4)
        if ahead > 0:
            inner = np.array(scaled(time_grid(None, steps - ahead)[:-1]).astype(dtype))
            inner = np.append(np.linspace(early, late, ahead, endpoint=False, dtype=dtype), inner)
        inner[0] = min(inner[0], early)
        if not np.all(np.diff(inner) > 0) or not 0 <= inner[0] <= inner[-1] < 1:
            raise ValueError(
                f"data of standard deviation {width:.3g} has no grid in {inner.dtype}: multiply "
                "the data by a constant, so that its standard deviation is about one"
            )
        return jnp.append(inner, jnp.ones((), inner.dtype))


def beyond(width: float | None, base: float) -> float:
    """The factor by which the width of data is outside of 0.1 to 10 times `base`, the width of the
    noise; 1 inside, and if the width is zero or not known.
    """
    relative = width / base if width else 1.0
    return relative / float(np.clip(relative, 0.1, 10.0))
