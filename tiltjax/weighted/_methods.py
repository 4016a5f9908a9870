"""Published methods as settings of `smc`: Feynman-Kac steering, DAS, TDS."""

from typing import Any

from jaxtyping import Array

from tiltjax import resampling
from tiltjax.weighted.potentials import Max, ResampleSchedule
from tiltjax.weighted.proposals import Base, Guided, Shifted
from tiltjax.weighted.tempering import Exponential


def fk_steering(**over: Any) -> dict[str, Any]:
    """Settings of Feynman-Kac steering: base proposals, `Max` potentials, multinomial resampling
    every 20 steps from the 20th to the 80th.

    As published for text to image (Singhal et al., arXiv 2501.06848), but for two faults of the
    code: the last potential completes the reward, and weights that no resampling used stay.
    `over`: settings of `smc` to replace.
    """
    return {
        "proposal": Base(),
        "potential": Max(),
        "resample": resampling.multinomial,
        "schedule": ResampleSchedule(20, start=20, stop=80),
        "ess_threshold": 1.0,
    } | over


def das(gamma: float | Array = 0.008, **over: Any) -> dict[str, Any]:
    """Settings of DAS: `Shifted` proposals, exponential tempering, ssp resampling below half of
    the effective sample size.

    As published for 100 steps (Kim et al., arXiv 2501.05803); every cache follows its ancestor,
    which the published code forgets of twists. `gamma` must let the tempering end: at least
    `2^(1 / (steps - 1)) - 1`. `over`: settings of `smc` to replace.
    """
    return {
        "proposal": Shifted(),
        "tempering": Exponential(gamma),
        "resample": resampling.ssp,
        "ess_threshold": 0.5,
    } | over


def tds(**over: Any) -> dict[str, Any]:
    """Settings of the twisted diffusion sampler: the kernel at the twisted denoiser, systematic
    resampling after every step.

    Wu et al. (arXiv 2306.17775). `over`: settings of `smc` to replace.
    """
    return {"proposal": Guided(), "resample": resampling.systematic, "ess_threshold": 1.0} | over
