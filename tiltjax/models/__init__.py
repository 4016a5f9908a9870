r"""Models of the base law, defined by their denoiser `D_t(x) = E[X_1 | X_t = x]`.

| model | |
|---|---|
| `Analytic(mixture)`, `Checkerboard()` | in closed form |
| `from_velocity`, `from_noise`, `from_v`, `from_score`, `from_edm`, `from_denoiser` | networks |
| `from_consistency`, `from_flow_map` | networks that jump along the probability flow |
| `Tilted(model, reward, scale)` | the exact tilt by a conjugate reward |
| `Rescheduled(model, interpolant)` | the same law on another interpolant |
| `Annealed(base, tuned, weight)` | between two models; `power` and `step` are weights |
| `cfg`, `geometric_mean`, `product`, `difference` | sums of the scores of several models |

`Model` is the base class of models with real-valued states. `Denoiser` is the base class of all
models, also of models of tokens.
"""

from tiltjax.models._analytic import Analytic
from tiltjax.models._annealed import (
    Annealed,
    Weight,
    average,
    check_pair,
    power,
    step,
    weight_at,
    weight_schedule,
)
from tiltjax.models._base import Denoiser, Model, check_mean
from tiltjax.models._checkerboard import SCALE, Checkerboard
from tiltjax.models._composed import Composed, cfg, difference, geometric_mean, product
from tiltjax.models._maps import (
    ConsistencyNetwork,
    FlowMapNetwork,
    from_consistency,
    from_flow_map,
)
from tiltjax.models._network import (
    Net,
    Network,
    call_network,
    from_denoiser,
    from_edm,
    from_noise,
    from_score,
    from_v,
    from_velocity,
)
from tiltjax.models._tilted import Rescheduled, Tilted

__all__ = [
    "Denoiser",
    "Model",
    "Analytic",
    "Checkerboard",
    "Network",
    "from_velocity",
    "from_noise",
    "from_v",
    "from_score",
    "from_edm",
    "from_denoiser",
    "from_consistency",
    "from_flow_map",
    "Tilted",
    "Rescheduled",
    "Annealed",
    "power",
    "step",
    "Composed",
    "cfg",
    "geometric_mean",
    "product",
    "difference",
]
