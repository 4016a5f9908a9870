"""The end of a flow, by an adaptive Runge-Kutta method."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
from jaxtyping import Array


def end_of(
    field: Callable,
    start: Any,
    begin: float | Array,
    end: float | Array,
    rtol: float | Array,
    atol: float | Array,
) -> Any:
    """The solution at `end` of `dy/dt = field(t, y, None)` from `start` at `begin`, trees of
    arrays. Either direction of time is possible. **Raises:** `RuntimeError` where the flow is too
    stiff.
    """
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        begin,
        end,
        None,
        start,
        max_steps=1 << 15,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
    )
    return jax.tree.map(lambda leaf: leaf[0], solution.ys)
