"""Guidances: estimates of `log h` and of its gradient."""

from tiltjax.guidance._base import Estimate, Guidance, check, failures
from tiltjax.guidance._conjugate import Conjugate, Fit, Probe, Toward, Variance, toward
from tiltjax.guidance._doob import Doob
from tiltjax.guidance._laplace import Laplace
from tiltjax.guidance._plug_in import PlugIn, dps, fmrg
from tiltjax.guidance._tuned import Seen, Tuned
from tiltjax.guidance.wrappers import (
    Averaged,
    Clipped,
    GainCapped,
    Normalized,
    NormDamped,
    Unscaled,
    Window,
    Wrapper,
)

__all__ = [
    "Estimate",
    "Guidance",
    "check",
    "failures",
    "Doob",
    "PlugIn",
    "dps",
    "fmrg",
    "Laplace",
    "Variance",
    "Probe",
    "Fit",
    "Conjugate",
    "Toward",
    "toward",
    "Seen",
    "Tuned",
    "Wrapper",
    "Clipped",
    "Normalized",
    "Unscaled",
    "Window",
    "GainCapped",
    "NormDamped",
    "Averaged",
]
