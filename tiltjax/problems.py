r"""Named problems with known answers. This module contains data only.

| name | prior | reward | scale |
|---|---|---|---|
| `gaussian` | N(0, I/2) | `-abs(x - (0, 2.5))^2` | 3 |
| `quadratic` | modes ±(2.5, 0), covariance I/2, equal weights | the same | 3 |
| `noniso` | the same modes with correlated coordinates, off-diagonals ±.25 | the same | 3 |
| `unequal` | the modes of `quadratic` with weights .2, .8 | the same | 3 |
| `uncentered` | modes (-4, 0), (1, 0), covariance I/2, equal weights | the same | 3 |
| `double_well` | the prior of `quadratic` | `DoubleWell` | 3 |
| `step` | modes ±3 on the line, variance 1 | `StepReward(10)` | 5 |
| `bump` | the same | `exp(-(x - 3)^2 / 2)` | 5 |

The six problems in the plane and the two problems on the line come from Dandapanthula and Boffi
(arXiv 2606.02884).
"""

from typing import NamedTuple

import jax.numpy as jnp

from tiltjax import rewards
from tiltjax.mixtures import GaussianMixture


class Problem(NamedTuple):
    """A prior, a reward and a scale, with known values.

    - `sigma`: the damping width in the paper, the standard deviation of a mode.
    - `log_norm`: the log normalizing constant `log E[exp(scale * r(X))]` under the prior, to the
      digits shown.
    - `bounds`: `((low, high), ...)`, the region to plot.
    """

    name: str
    prior: GaussianMixture
    reward: rewards.Reward
    scale: float
    sigma: float
    log_norm: float
    bounds: tuple[tuple[float, float], ...]


_PLANE = ((-5.0, 5.0), (-2.5, 4.0))
_LINE = ((-6.5, 6.5),)
_HALF = [[0.5, 0.0], [0.0, 0.5]]


def _plane(
    name: str, weights, means, covs, log_norm: float, reward: rewards.Reward | None = None
) -> Problem:
    reward = rewards.Quadratic([0.0, 2.5]) if reward is None else reward
    return Problem(
        name, GaussianMixture(weights, means, covs), reward, 3.0, 0.5**0.5, log_norm, _PLANE
    )


def gaussian() -> Problem:
    """One Gaussian, where every law is known in closed form."""
    return _plane("gaussian", [1.0], [[0.0, 0.0]], [_HALF], -6.0738)


def quadratic() -> Problem:
    """Two far modes of equal weight and a reward between them."""
    return _plane("quadratic", [0.5, 0.5], [[-2.5, 0.0], [2.5, 0.0]], [_HALF, _HALF], -10.7613)


def noniso() -> Problem:
    """Two modes with correlated coordinates, of opposite sign."""
    covs = [[[0.5, 0.25], [0.25, 0.5]], [[0.5, -0.25], [-0.25, 0.5]]]
    return _plane("noniso", [0.5, 0.5], [[-2.5, 0.0], [2.5, 0.0]], covs, -8.1287)


def unequal() -> Problem:
    """Two modes of weights .2 and .8."""
    return _plane("unequal", [0.2, 0.8], [[-2.5, 0.0], [2.5, 0.0]], [_HALF, _HALF], -10.7613)


def uncentered() -> Problem:
    """A far mode and a near mode: the tilt gives the far mode almost no mass."""
    return _plane("uncentered", [0.5, 0.5], [[-4.0, 0.0], [1.0, 0.0]], [_HALF, _HALF], -7.5169)


def double_well() -> Problem:
    """A quartic reward whose maxima lie off the modes."""
    problem = quadratic()
    return problem._replace(name="double_well", reward=rewards.DoubleWell(), log_norm=12.0643)


def step() -> Problem:
    """A reward without a gradient: only selection can choose the mode."""
    reward = rewards.StepReward(10.0)
    return Problem("step", _two_modes(), reward, 5.0, 1.0, -0.6931, _LINE)


def bump() -> Problem:
    """A bounded reward on the right mode: the left mode has 1.528% of the mass of the tilt."""
    return Problem("bump", _two_modes(), rewards.Bump([3.0], 1.0), 5.0, 1.0, 3.4881, _LINE)


def _two_modes() -> GaussianMixture:
    return GaussianMixture([0.5, 0.5], [[-3.0], [3.0]], jnp.ones((2, 1, 1)))


NAMES = ("gaussian", "quadratic", "noniso", "unequal", "uncentered", "double_well", "step", "bump")


def get(name: str) -> Problem:
    """The problem called `name`. **Raises:** `ValueError` that lists the names if there is no such
    problem.
    """
    if name not in NAMES:
        raise ValueError(f"unknown problem {name!r}: choose one of {', '.join(NAMES)}")
    return globals()[name]()
