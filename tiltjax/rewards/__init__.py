r"""Rewards `r(x_1)`, to be maximized: those of known tilts, their algebra, several objectives.

`Quadratic`, `LinearReward`, `Bump`, `StepReward`, `DoubleWell`; sums and multiples of rewards and
functions by `+` and `*`; `as_reward(fn)`; `ValueOnly(reward)` declares a gradient of zero;
`rewards.objectives` for several.
"""

from tiltjax.rewards import objectives
from tiltjax.rewards._base import Custom, Reward, Scaled, Sum, ValueOnly, as_reward, value, values
from tiltjax.rewards._closed_form import Bump, DoubleWell, LinearReward, Quadratic, StepReward

__all__ = [
    "Reward",
    "Quadratic",
    "LinearReward",
    "Bump",
    "StepReward",
    "DoubleWell",
    "Sum",
    "Scaled",
    "Custom",
    "ValueOnly",
    "as_reward",
    "value",
    "values",
    "objectives",
]
