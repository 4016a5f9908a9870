r"""theory: closed forms and quadrature for reward-tilted Gaussian mixtures.

What a sampler should produce (`tilt`, `log_h`), and what it will (`plug_in_law`, `sde_law`, `fmrg_law`, and at any number of steps
`discrete_law`). Nothing here runs a sampler; laws come back as `tiltjax.GaussianMixture`, except
that of more than one draw (`DrawsLaw`).
"""

from theory import quadrature
from theory.bias import fmrg_law, plug_in_law, sde_law
from theory.discrete import AffineField, discrete_law, doob_field, dps_field, fmrg_field, plug_in_field
from theory.doob import log_h, marginal
from theory.draws import DrawsLaw
from theory.tilts import Tilt, bures, expected_reward, is_quadratic, quadratic_form, tilt

__all__ = [
    "tilt",
    "Tilt",
    "bures",
    "expected_reward",
    "is_quadratic",
    "quadratic_form",
    "log_h",
    "marginal",
    "plug_in_law",
    "DrawsLaw",
    "fmrg_law",
    "sde_law",
    "discrete_law",
    "AffineField",
    "plug_in_field",
    "dps_field",
    "doob_field",
    "fmrg_field",
    "quadrature",
]
