r"""tiltjax: sample from `rho(x) exp(scale * r(x))`, for a flow or diffusion model `rho` and a
reward `r`.

    model  = Analytic(mixture) | from_velocity(fn) | from_noise(fn) | from_v(fn) | from_denoiser(fn)
        E[X_1 | X_t = x]
    reward   = any function of one sample, or tiltjax.rewards
    guidance = PlugIn(Glass(model), reward, scale=3.)      ∇ log E[exp(scale r(X_1)) | X_t = x]
    samples  = sample(key, model, guidance, num=1000).x

The names below are the names that most programs need. All other names are in the packages at the
end of the list. The package `theory` predicts how far each method lands from the tilt.
`tiltjax.metrics` measures this distance.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tiltjax import (
    external,
    grids,
    guidance,
    interpolants,
    metrics,
    models,
    plotting,
    posteriors,
    problems,
    resampling,
    rewards,
    samplers,
    scales,
    search,
    solvers,
    tokens,
    training,
    weighted,
)
from tiltjax.guidance import Conjugate, Doob, Laplace, PlugIn, Tuned, dps, fmrg
from tiltjax.interpolants import VE, VP, DiscreteVP, Linear
from tiltjax.mixtures import GaussianMixture
from tiltjax.models import (
    Analytic,
    Annealed,
    Model,
    Tilted,
    from_denoiser,
    from_edm,
    from_noise,
    from_score,
    from_v,
    from_velocity,
)
from tiltjax.particles import Particles
from tiltjax.plotting import plot
from tiltjax.posteriors import Exact, FlowMap, Glass, Tweedie
from tiltjax.samplers import (
    best_of_n,
    calibrate,
    flow,
    gibbs,
    sample,
    sample_with_log_prob,
    softmax_of_n,
)
from tiltjax.scales import Damped, SelfDamped
from tiltjax.search import optimize
from tiltjax.solvers import Adaptive, Ancestral, Euler, Heun
from tiltjax.training import finetune, fit
from tiltjax.weighted import audit, das, fk_steering, smc, svdd, tds

if TYPE_CHECKING:
    from tiltjax import images, pretrained

__all__ = [
    # models: the denoiser of the base law
    "Model",
    "Analytic",
    "GaussianMixture",
    "from_velocity",
    "from_noise",
    "from_v",
    "from_score",
    "from_edm",
    "from_denoiser",
    "Tilted",
    "Annealed",
    "Linear",
    "VP",
    "DiscreteVP",
    "VE",
    # guidance: estimates of log h and of its gradient
    "PlugIn",
    "Laplace",
    "Conjugate",
    "Doob",
    "Tuned",
    "dps",
    "fmrg",
    "Exact",
    "Glass",
    "FlowMap",
    "Tweedie",
    "Damped",
    "SelfDamped",
    # samplers and their solvers
    "sample",
    "sample_with_log_prob",
    "flow",
    "gibbs",
    "best_of_n",
    "softmax_of_n",
    "calibrate",
    "smc",
    "fk_steering",
    "das",
    "tds",
    "svdd",
    "audit",
    "optimize",
    "fit",
    "finetune",
    "Particles",
    "plot",
    "Heun",
    "Euler",
    "Ancestral",
    "Adaptive",
    # packages
    "external",
    "grids",
    "guidance",
    "images",
    "interpolants",
    "metrics",
    "models",
    "plotting",
    "posteriors",
    "pretrained",
    "problems",
    "resampling",
    "rewards",
    "samplers",
    "scales",
    "search",
    "solvers",
    "tokens",
    "training",
    "weighted",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Both packages import Flax, which takes as long as importing JAX, so they load on first use.
    if name in ("images", "pretrained"):
        return importlib.import_module(f"tiltjax.{name}")
    raise AttributeError(f"module 'tiltjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
