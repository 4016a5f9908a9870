"""Rewards: closed forms, the algebra of rewards, several objectives."""

from tiltjax.rewards import objectives
from tiltjax.rewards._base import Custom, Reward, Scaled, Sum, ValueOnly, as_reward, value, values
from tiltjax.rewards._closed_form import Bump, DoubleWell, LinearReward, Quadratic, StepReward

__all__ = [
    "Reward",
    "Sum",
    "Scaled",
    "Custom",
    "as_reward",
    "value",
    "values",
    "ValueOnly",
    "Quadratic",
    "LinearReward",
    "Bump",
    "StepReward",
    "DoubleWell",
    "objectives",
]
