r"""Guidances: estimates of `log h_t(x) = log E[exp(scale r(X_1)) | X_t = x]` and of its gradient.

| guidance | log h from |
|---|---|
| `Doob(model, log_h)` | its closed form |
| `PlugIn(posterior, reward, scale, k=)` | k draws of the posterior (`dps`, `fmrg`) |
| `Laplace(model, reward, scale)` | a Gaussian posterior and a quadratic reward |
| `Conjugate(model, reward, scale)` | a conjugate reward fitted at each state |
| `Tuned(base, tuned, weight)` | a fine-tuned model |
| `toward(model, tilted, reward, scale)` | none: the denoiser of a tilted model |

`guidance.wrappers` modifies a guidance: clipping, normalizing, windows, averages.
"""

from tiltjax.guidance import wrappers
from tiltjax.guidance._base import Estimate, Guidance, check, failures
from tiltjax.guidance._conjugate import Conjugate, Probe, Variance, log_snr_levels, toward
from tiltjax.guidance._doob import Doob
from tiltjax.guidance._laplace import Laplace
from tiltjax.guidance._plug_in import PlugIn, dps, fmrg
from tiltjax.guidance._tuned import Tuned
from tiltjax.guidance.wrappers import (
    Averaged,
    Clipped,
    GainCapped,
    Normalized,
    NormDamped,
    Unscaled,
    Window,
)

__all__ = [
    "Guidance",
    "Estimate",
    "Doob",
    "PlugIn",
    "dps",
    "fmrg",
    "Laplace",
    "Conjugate",
    "Probe",
    "Variance",
    "Tuned",
    "toward",
    "Clipped",
    "Normalized",
    "Unscaled",
    "GainCapped",
    "NormDamped",
    "Averaged",
    "Window",
    "wrappers",
]
