r"""Time grids: the increasing times of a run, from noise (0) to data (1).

The public functions return `times` for `sample(..., times=)` from published schedules of noise
levels. All end with the jump to the denoiser at t = 1.

| grid | noise levels `sigma / alpha`, or indices of the table of a `DiscreteVP` |
|---|---|
| `karras(interpolant, steps, rho=7)` | evenly spaced in `level^(1 / rho)` |
| `exponential(interpolant, steps)` | evenly spaced in `log level` |
| `leading(interpolant, steps, offset)` | `i (N // steps) + offset` |
| `trailing(interpolant, steps)` | `round(N - i N / steps) - 1` |
| `linspace(interpolant, steps)` | rounded `linspace(0, N - 1, steps)` |

The last three are `timestep_spacing` of the schedulers of diffusers.

References: Karras et al. (arXiv 2206.00364, eq. 5); Lin et al. (arXiv 2305.08891), for the three
spacings.
"""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree
from tiltjax._checks import concrete, count, finite
from tiltjax.interpolants import DiscreteVP, Interpolant

_TABLE = 4096  # the entries of the table from which the times of narrow data are interpolated


def time_grid(times: Any, steps: int | None) -> Array:
    """The times of a run, increasing inside [0, 1]: the given `times`, or
    `linspace(1e-3, 1, steps + 1)` with 100 steps by default. **Raises:** `ValueError`.
    """
    if not concrete(times):
        return _time_grid(times, steps)
    with jax.ensure_compile_time_eval():  # so that the times can be read inside a caller's jit
        return _time_grid(times, steps)


def karras(
    interpolant: Interpolant,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> Array:
    """The times at which `sigma / alpha` falls from `sigma_max` to `sigma_min` evenly in
    `(sigma / alpha)^(1 / rho)`, and 1.

    **Arguments:** `interpolant`, with values that are not traced. `steps`, the number of levels
    before t = 1. `sigma_min`, `sigma_max`: by default the levels of the network's training
    (`Interpolant.snr_range`). Where these have no end, `sigma_max` is the level at t = 1e-3 and
    `sigma_min` is 0.004 times `interpolant.data_scale()`, as 0.002 is for EDM. `rho > 0`.

    **Returns:** `(steps + 1,)`. With one step, the only level is `sigma_max`.

    **Raises:** `ValueError` for levels in the wrong order, or outside of those of the interpolant.
    Source: Karras et al. (arXiv 2206.00364, eq. 5).
    """
    power = 1 / _checks.number(rho, "rho", 0, closed="neither")
    high, low = _ends(interpolant, sigma_min, sigma_max)
    fractions = np.linspace(0, 1, count(steps, "steps"))
    return _at_levels(interpolant, (high**power + fractions * (low**power - high**power)) ** rho)


def exponential(
    interpolant: Interpolant,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """The times at which `sigma / alpha` falls from `sigma_max` to `sigma_min` by a constant
    factor, and 1; arguments and errors as in `karras`.
    """
    high, low = _ends(interpolant, sigma_min, sigma_max)
    fractions = np.linspace(0, 1, count(steps, "steps"))
    return _at_levels(interpolant, high * (low / high) ** fractions)


def leading(interpolant: DiscreteVP, steps: int, *, offset: int = 1) -> Array:
    """The times of the levels `i (N // steps) + offset` for i from `steps - 1` down to 0, and 1.

    For 100 of 1000 levels these are 991, 981, ..., 1. Stable Diffusion samples so. The run starts
    below the noisiest level.

    **Arguments:** `interpolant`, a `DiscreteVP` of N levels; `steps`; `offset >= 0`, `steps_offset`
    of diffusers. **Returns:** `(steps + 1,)`. **Raises:** `ValueError` for levels that are not in
    the table.
    """
    levels = _table_size(interpolant, steps)
    indices = np.arange(steps) * (levels // steps) + count(offset, "offset", 0)
    if indices[-1] >= levels:
        raise ValueError(
            f"the noisiest index would be {indices[-1]}, but the table has {levels} levels, with "
            f"indices up to {levels - 1}: lower offset = {offset} or steps = {steps}"
        )
    return _at_indices(interpolant, indices[::-1])


def trailing(interpolant: DiscreteVP, steps: int) -> Array:
    """The times of the levels `round(N - i N / steps) - 1` for i from 0 to `steps - 1`, and 1.

    For 100 of 1000 levels these are 999, 989, ..., 9. The run starts at the noisiest level.

    **Arguments:** as in `leading`.
    """
    levels = _table_size(interpolant, steps)
    return _at_indices(interpolant, np.round(np.arange(levels, 0, -levels / steps))[:steps] - 1)


def linspace(interpolant: DiscreteVP, steps: int) -> Array:
    """The times of the levels `linspace(N - 1, 0, steps)`, rounded, and 1.

    **Arguments:** as in `leading`; at least two steps.
    """
    levels = _table_size(interpolant, count(steps, "steps", 2))
    return _at_indices(interpolant, np.round(np.linspace(0, levels - 1, steps))[::-1])


def _table_size(interpolant: DiscreteVP, steps: int) -> int:
    how = "such as DiscreteVP(alphas_cumprod); use karras or exponential for another interpolant"
    _checks.instance(interpolant, DiscreteVP, "interpolant", how)
    levels = len(interpolant.noise_level)
    if count(steps, "steps") > levels:
        raise ValueError(f"steps must be at most {levels}, the number of levels, got {steps}")
    return levels


def _at_indices(interpolant: DiscreteVP, indices: np.ndarray) -> Array:
    clock: Any = interpolant.clock  # of NumPy numbers, in double precision
    times = np.append(clock(indices.astype(np.float64)), 1.0)
    return jax.device_put(times.astype(jnp.result_type(float)))


def _ends(
    interpolant: Interpolant, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """The highest and the lowest level of a grid."""
    _checks.instance(interpolant, Interpolant, "interpolant", "such as tiltjax.VE()")
    if not concrete(interpolant):
        raise TypeError("interpolant must have concrete values: make the grid outside of jit")
    with jax.ensure_compile_time_eval():
        interpolant = _pytree.cast(interpolant, jnp.result_type(float))
        noisiest, cleanest = (
            float(snr) ** -0.5 if snr > 0 else math.inf for snr in interpolant.snr_range()
        )
        usual = (
            float(interpolant.snr(jnp.asarray(1e-3))) ** -0.5,
            4e-3 * float(interpolant.data_scale()),
        )
    high = usual[0] if math.isinf(noisiest) else noisiest
    low = cleanest or usual[1]
    high = (
        high
        if sigma_max is None
        else _checks.number(sigma_max, "sigma_max", 0, noisiest * (1 + 1e-6), closed="right")
    )
    low = low if sigma_min is None else _checks.number(sigma_min, "sigma_min", 0, closed="neither")
    if not low < high:
        raise ValueError(f"sigma_min must be below sigma_max, got {low:g} >= {high:g}")
    return high, low


def _at_levels(interpolant: Interpolant, levels: np.ndarray) -> Array:
    """The times at which `sigma / alpha` has these values, and 1."""
    with jax.ensure_compile_time_eval():
        interpolant = _pytree.cast(interpolant, jnp.result_type(float))
        snr = jnp.asarray(levels**-2.0, jnp.result_type(float))
        # Rounding may put the noisiest level slightly before t = 0.
        times = jnp.maximum(jax.vmap(interpolant.time)(snr), 0.0)
        return jnp.append(times, jnp.ones((), times.dtype))


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
    """The default times of a run for data of standard deviation `width`: those of the interpolant
    (`default_times`), or else those of data of unit width, `time_grid(None, steps)`, unless the
    width is known and not between 0.1 and 10 times `interpolant.data_scale()`. For wide data the
    grid is that of data of 10 times this scale, in terms of snr times variance. For narrow data see
    `_narrow`.

    **Raises:** `ValueError` if the times are not distinct in `dtype`, or the data is not wider than
    the noise at the last of the interpolant's times.
    """
    if (times := _own_times(interpolant, width, count(steps, "steps"))) is not None:
        return times
    times = time_grid(None, steps)
    if not width or not concrete(interpolant):
        return times
    with jax.ensure_compile_time_eval():
        interpolant = _pytree.cast(interpolant, times.dtype)
        factor = beyond(width, float(interpolant.data_scale()))
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


def _own_times(interpolant: Any, width: float | None, steps: int) -> Array | None:
    """`interpolant.default_times(steps)`, in JAX's default float."""
    if not concrete(interpolant):
        return interpolant.default_times(steps)
    with jax.ensure_compile_time_eval():
        interpolant = _pytree.cast(interpolant, jnp.result_type(float))
        times = interpolant.default_times(steps)
        if times is None or not width or steps == 1:
            return times
        last = float(interpolant.snr(times[-2])) ** -0.5
    if width < 10 * last:
        raise ValueError(
            f"data of standard deviation {width:.3g} is not 10 times as wide as {last:.3g}, the "
            f"last noise level of {interpolant}: lower that level, or multiply the data by a "
            "constant"
        )
    return times


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
    """The factor by which the width of data is outside of 0.1 to 10 times `base`, the scale of
    data of unknown width (`Interpolant.data_scale`); 1 inside, and if the width is zero or not
    known.
    """
    relative = width / base if width else 1.0
    return relative / float(np.clip(relative, 0.1, 10.0))
