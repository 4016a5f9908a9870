r"""theory: closed forms and quadrature for reward-tilted Gaussian mixtures.

What a sampler should produce (`tilt`, `log_h`), and what it will: guided flows in the limit of small steps (`plug_in_law`, `sde_law`,
`fmrg_law`) and at any number of them (`discrete_law`), selection (`best_of_n`, `softmax_of_n`), and what importance weights make of
a guided diffusion (`path_law`). Nothing here runs a sampler; laws of guided flows come back as `tiltjax.GaussianMixture`, except that
of more than one draw (`DrawsLaw`).
"""

from theory import quadrature
from theory.bias import fmrg_law, plug_in_law, sde_law
from theory.discrete import AffineField, discrete_law, doob_field, dps_field, fmrg_field, plug_in_field
from theory.doob import log_h, marginal
from theory.draws import DrawsLaw
from theory.paths import PathLaw, path_law, path_limit
from theory.selection import Selected, best_of_n, matching_n, softmax_of_n
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
    "best_of_n",
    "softmax_of_n",
    "matching_n",
    "Selected",
    "path_law",
    "path_limit",
    "PathLaw",
    "quadrature",
]
