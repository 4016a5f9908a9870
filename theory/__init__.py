r"""theory: closed forms and quadrature for reward-tilted Gaussian mixtures.

- `tilt`, `log_h`: the law that a sampler should produce.
- `plug_in_law`, `sde_law`, `fmrg_law`, `mean_drift_law`: the laws that guided flows and diffusions
  produce in the limit of small steps. `mean_drift_law` also covers transport between modes, on the
  line.
- `flow_law`: the same on mixtures in any dimension, as points with an error, also for DPS and
  Laplace.
- `discrete_law`: the law of a guided sampler at any number of steps.
- `run_law`: the same on a mixture, as points, with the draws of the guidance; `selected_law`:
  selection among them.
- `best_of_n`, `softmax_of_n`: the laws that selection produces.
- `prior_ess`, `path_law`, `weight_law`: the effective sample size of weighted samples, without
  guidance, of a guided diffusion from one Gaussian, and of a guided chain on a mixture.
- `token_tilt`: the tilt of a law of token sequences, by enumeration.
- `w2_bounds`: bounds of the distance between two mixtures.
- `thermodynamic_integral`, `thermodynamic_bracket`: `log Z` from computed or measured mean rewards.
- `fit_mixture`: a Gaussian mixture for samples of a model without a closed form.
- `recommend`: the method with the smallest predicted distance to the tilt within a budget.

Nothing here runs a sampler of `tiltjax`: `run_law` has its own steps, in closed forms. The law of a
guided flow is a `tiltjax.GaussianMixture`, except for more than one draw (`DrawsLaw`), for a mean
drift (`MeanDriftLaw`) and between modes (`FlowLaw`, `PointLaw`).
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
from theory.fitting import fit_mixture
from theory.flow_laws import fmrg_law, plug_in_law, sde_law
from theory.many_draws import DrawsLaw
from theory.mean_drift import MeanDriftLaw, doob_drift, dps_drift, mean_drift_law, plug_in_drift
from theory.path_weights import PathLaw, path_law, path_limit
from theory.planner import Option, Plan, matching_k, recommend
from theory.push_forward import (
    FlowLaw,
    Measured,
    PointLaw,
    doob_denoiser,
    dps_denoiser,
    flow_law,
    laplace_denoiser,
    plug_in_denoiser,
)
from theory.run_weights import WeightLaw, weight_law
from theory.runs import (
    ConjugateFit,
    Deterministic,
    FlowMapEnd,
    PlugInDraws,
    Unguided,
    run_law,
    selected_law,
)
from theory.selection import Selected, best_of_n, matching_n, softmax_of_n
from theory.tilts import (
    LogNorm,
    Tilt,
    expected_reward,
    is_quadratic,
    log_h,
    marginal,
    prior_ess,
    quadratic_form,
    thermodynamic_bracket,
    thermodynamic_integral,
    tilt,
)
from theory.tokens import TokenLaw, pair_log_norm, token_log_h, token_tilt

__all__ = [
    # The law that a sampler should produce.
    "tilt",
    "Tilt",
    "log_h",
    "marginal",
    "expected_reward",
    "is_quadratic",
    "quadratic_form",
    # A mixture for samples.
    "fit_mixture",
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
    # The same on mixtures in any dimension.
    "flow_law",
    "FlowLaw",
    "PointLaw",
    "Measured",
    "plug_in_denoiser",
    "dps_denoiser",
    "laplace_denoiser",
    "doob_denoiser",
    # Guided samplers at any number of steps.
    "discrete_law",
    "AffineField",
    "plug_in_field",
    "dps_field",
    "doob_field",
    "fmrg_field",
    # The same on mixtures, as points.
    "run_law",
    "PlugInDraws",
    "FlowMapEnd",
    "ConjugateFit",
    "Deterministic",
    "Unguided",
    "selected_law",
    # Selection.
    "best_of_n",
    "softmax_of_n",
    "matching_n",
    "Selected",
    # Importance weights of unguided samples, and of a guided diffusion.
    "prior_ess",
    "path_law",
    "path_limit",
    "PathLaw",
    "weight_law",
    "WeightLaw",
    # Distances.
    "w2_bounds",
    "W2Bounds",
    "bures",
    "overlap",
    # The best method within a budget.
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
