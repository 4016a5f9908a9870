"""Time grids: the increasing times of a run, from noise (0) to data (1)."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

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
