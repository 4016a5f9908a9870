r"""Rewards `r(x_1)`, to be maximized. Any function of one sample is a reward.

| name | |
|---|---|
| `Quadratic`, `LinearReward`, `Bump`, `StepReward`, `DoubleWell` | rewards with known tilts |
| `a + b`, `a - b`, `2 * a`, `a / 2` | sums and multiples, also of functions |
| `as_reward(fn)` | a function as a `Reward`, the base class |
| `ValueOnly(reward)` | the reward with a gradient of zero |
| `objectives` | several rewards: weighted sums, constraints, Pareto fronts |
"""

from tiltjax.rewards import objectives
from tiltjax.rewards._base import (
    Custom,
    Reward,
    Scaled,
    Sum,
    ValueOnly,
    as_reward,
    split_conjugate,
    value,
    values,
)
from tiltjax.rewards._closed_form import Bump, DoubleWell, LinearReward, Quadratic, StepReward

__all__ = [
    "Reward",
    "Quadratic",
    "LinearReward",
    "Bump",
    "StepReward",
    "DoubleWell",
    "ValueOnly",
    "as_reward",
    "objectives",
]
