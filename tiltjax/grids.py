"""Time grids: the increasing times of a run, from noise (0) to data (1)."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _pytree
from tiltjax._checks import concrete, count, finite

_TABLE = 4096  # the entries of the table from which the times of narrow data are interpolated


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
    that of the noise. For wide data the grid is that of data of 10 times the noise, in terms of snr
    times variance. For narrow data see `_narrow`.

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
        if factor < 1:
            inner = _narrow(interpolant, width, times[0], steps).astype(dtype)
        else:
            scaled = lambda t: interpolant.time(interpolant.snr(t) / factor**2)
            inner = np.array(jax.vmap(scaled)(times[:-1]).astype(dtype))
        inner[0] = min(inner[0], float(times[0]))
        if not np.all(np.diff(inner) > 0) or not 0 <= inner[0] <= inner[-1] < 1:
            raise ValueError(
                f"data of standard deviation {width:.3g} has no grid in {inner.dtype}: multiply "
                "the data by a constant, so that its standard deviation is about one"
            )
        return jnp.append(inner, jnp.ones((), inner.dtype))


def _narrow(interpolant: Any, width: float, start: Array, steps: int) -> np.ndarray:
    """The `steps` times, from `start` to the jump to t = 1, for data much narrower than the noise:
    equal steps of

        t / 4 - log(sigma_t) / 2 + 1 / (1 + nu_t) / 4,    nu_t = sigma_t / (alpha_t width),

    where each of the three terms is scaled to [0, 1]. The first follows `alpha_t`. The second keeps
    `sigma_u / sigma_t` of a step away from 0, as long as the state is a point and noise, where
    `sigma_t` may bend (`VP`). The third resolves the data where it shows. The jump is at
    `nu_t = 0.1`.
    """
    lowest, highest = interpolant.snr(start), (10 / width) ** 2
    snr = jnp.geomspace(lowest, highest, _TABLE, dtype=start.dtype)
    t = jax.vmap(interpolant.time)(snr)
    parts = t, -jnp.log(jax.vmap(interpolant.sigma)(t)), 1 / (1 + jax.lax.rsqrt(snr) / width)
    with np.errstate(invalid="ignore"):  # of times that cannot be told from 1 in this precision
        progress = sum(
            share * (part - part[0]) / (part[-1] - part[0])
            for share, part in zip((0.25, 0.5, 0.25), np.asarray(parts, np.float64), strict=True)
        )
    return np.interp(np.linspace(0, 1, steps), progress, t)


def beyond(width: float | None, base: float) -> float:
    """The factor by which the width of data is outside of 0.1 to 10 times `base`, the width of the
    noise; 1 inside, and if the width is zero or not known.
    """
    relative = width / base if width else 1.0
    return relative / float(np.clip(relative, 0.1, 10.0))
