r"""theory: closed forms and quadrature for reward-tilted Gaussian mixtures.

What a sampler should produce (`tilt`, `log_h`), and what it will: guided flows in the limit of
small steps (`plug_in_law`, `sde_law`, `fmrg_law`; on the line also between modes, `mean_drift_law`)
and at any number of them (`discrete_law`), selection (`best_of_n`, `softmax_of_n`), and what
importance weights make of a guided diffusion (`path_law`). Of sequences of tokens all is enumerated
(`token_tilt`). How far apart two mixtures are: `w2_bounds`. `log Z` from mean rewards, computed or
measured: `thermodynamic_integral`, `thermodynamic_bracket`. All of it together: `recommend`, the
method predicted closest to the tilt within a budget. Nothing here runs a sampler; laws of guided
flows come back as `tiltjax.GaussianMixture`, except that of more than one draw (`DrawsLaw`) and
that of a mean drift (`MeanDriftLaw`).
"""

from theory import quadrature, tokens
from theory.distances import W2Bounds, bures, overlap, w2_bounds
from theory.finite_steps import (
    AffineField,
    discrete_law,
    doob_field,
    dps_field,
    fmrg_field,
    plug_in_field,
)
from theory.flow_laws import fmrg_law, plug_in_law, sde_law
from theory.many_draws import DrawsLaw
from theory.mean_drift import MeanDriftLaw, doob_drift, dps_drift, mean_drift_law, plug_in_drift
from theory.path_weights import PathLaw, path_law, path_limit
from theory.planner import Option, Plan, matching_k, recommend
from theory.selection import Selected, best_of_n, matching_n, softmax_of_n
from theory.tilts import (
    LogNorm,
    Tilt,
    expected_reward,
    is_quadratic,
    log_h,
    marginal,
    quadratic_form,
    thermodynamic_bracket,
    thermodynamic_integral,
    tilt,
)
from theory.tokens import TokenLaw, pair_log_norm, token_log_h, token_tilt

__all__ = [
    # What a sampler should produce.
    "tilt",
    "Tilt",
    "log_h",
    "marginal",
    "expected_reward",
    "is_quadratic",
    "quadratic_form",
    # log Z from mean rewards.
    "thermodynamic_integral",
    "thermodynamic_bracket",
    "LogNorm",
    # Guided flows and diffusions, in the limit of small steps.
    "plug_in_law",
    "DrawsLaw",
    "fmrg_law",
    "sde_law",
    "mean_drift_law",
    "MeanDriftLaw",
    "plug_in_drift",
    "dps_drift",
    "doob_drift",
    # Guided samplers at any number of steps.
    "discrete_law",
    "AffineField",
    "plug_in_field",
    "dps_field",
    "doob_field",
    "fmrg_field",
    # Selection.
    "best_of_n",
    "softmax_of_n",
    "matching_n",
    "Selected",
    # Importance weights of a guided diffusion.
    "path_law",
    "path_limit",
    "PathLaw",
    # Distances.
    "w2_bounds",
    "W2Bounds",
    "bures",
    "overlap",
    # Which method within a budget.
    "recommend",
    "Plan",
    "Option",
    "matching_k",
    # Sequences of tokens.
    "token_tilt",
    "TokenLaw",
    "token_log_h",
    "pair_log_norm",
    # Namespaces.
    "quadrature",
    "tokens",
]
