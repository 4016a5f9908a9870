r"""tiltjax: sample from `rho(x) exp(scale * r(x))`, for a flow or diffusion model `rho` and a reward `r`.

    model    = Analytic(mixture) | from_velocity(fn) | from_noise(fn) | from_denoiser(fn)     E[X_1 | X_t = x]
    reward   = any function of one sample, or tiltjax.rewards
    guidance = PlugIn(Glass(model), reward, scale=3.)                                        ∇ log E[exp(scale r(X_1)) | X_t = x]
    points   = sample(key, model, guidance, num=1000).x

Read in this order: models, rewards, what a guidance is made of, the guidances, the verbs. How far each method lands from the
tilt is predicted by the package `theory` and measured by `tiltjax.metrics`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tiltjax import (
    annealed,
    descent,
    finetuning,
    interpolants,
    metrics,
    objectives,
    plotting,
    potentials,
    problems,
    proposals,
    resampling,
    rewards,
    tempering,
    training,
)
from tiltjax.anisotropic import gibbs
from tiltjax.annealed import Annealed, Tuned
from tiltjax.audit import Audit, audit
from tiltjax.checkerboard import Checkerboard
from tiltjax.conjugate import Conjugate, Probe, calibrate, toward
from tiltjax.densities import Density, density
from tiltjax.discrete import Completions, MarkovChain, Masked, from_logits
from tiltjax.external import External, Record, ValueOnly, failures, from_torch
from tiltjax.finetuning import finetune
from tiltjax.flows import Flow, flow
from tiltjax.guidance import Clipped, Doob, Estimate, Guidance, Laplace, Normalized, PlugIn, Unscaled, dps, fmrg
from tiltjax.interpolants import VP, DiscreteVP, Interpolant, Linear
from tiltjax.mixtures import GaussianMixture
from tiltjax.models import Analytic, Model, from_denoiser, from_noise, from_velocity
from tiltjax.online import Search, optimise
from tiltjax.particles import Particles, load, save
from tiltjax.posteriors import Exact, FlowMap, Glass, Posterior, Renoise, Tweedie
from tiltjax.potentials import Every
from tiltjax.rewards import Reward
from tiltjax.sampling import sample
from tiltjax.scales import Constant, Damped, Scale, SelfDamped
from tiltjax.selection import best_of_n, softmax_of_n
from tiltjax.smc import das, fk_steering, smc, tds
from tiltjax.solvers import Adaptive, Ancestral, Euler, Heun, Solver, Unmask
from tiltjax.surrogates import Bootstrap, GaussianProcess, Surrogate
from tiltjax.tilted import Rescheduled, Tilted
from tiltjax.training import fit
from tiltjax.wrappers import Averaged, Capped, Shortened, Window

if TYPE_CHECKING:
    from tiltjax import lora, networks


def __getattr__(name: str) -> Any:
    # Made of Flax, which takes as long to import as all of this: who asks for one waits for it.
    if name in ("lora", "networks"):
        return importlib.import_module(f"tiltjax.{name}")
    raise AttributeError(f"module 'tiltjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    # models: what is known of the base law
    "Model",
    "Analytic",
    "GaussianMixture",
    "Checkerboard",
    "from_velocity",
    "from_noise",
    "from_denoiser",
    "Masked",
    "MarkovChain",
    "from_logits",
    "Tilted",
    "Rescheduled",
    "Annealed",
    "annealed",
    "lora",
    "Interpolant",
    "Linear",
    "VP",
    "DiscreteVP",
    "interpolants",
    "fit",
    "finetune",
    "training",
    "finetuning",
    "descent",
    "networks",
    # rewards: what is wanted
    "Reward",
    "rewards",
    "External",
    "from_torch",
    "Record",
    "failures",
    "ValueOnly",
    "objectives",
    # a guidance's parts: draws of X_1 given X_t, and how strongly they count
    "Posterior",
    "Exact",
    "Glass",
    "FlowMap",
    "Renoise",
    "Tweedie",
    "Scale",
    "Constant",
    "Damped",
    "SelfDamped",
    # guidances: estimates of log h and its gradient
    "Guidance",
    "Estimate",
    "Doob",
    "PlugIn",
    "Laplace",
    "dps",
    "fmrg",
    "Conjugate",
    "calibrate",
    "Probe",
    "toward",
    "Tuned",
    "Completions",
    "Clipped",
    "Normalized",
    "Unscaled",
    "Capped",
    "Shortened",
    "Averaged",
    "Window",
    # verbs
    "sample",
    "smc",
    "audit",
    "Audit",
    "density",
    "Density",
    "fk_steering",
    "das",
    "tds",
    "proposals",
    "potentials",
    "tempering",
    "resampling",
    "Every",
    "gibbs",
    "flow",
    "Flow",
    "Solver",
    "Euler",
    "Heun",
    "Ancestral",
    "Adaptive",
    "Unmask",
    "best_of_n",
    "softmax_of_n",
    "optimise",
    "Search",
    "Surrogate",
    "GaussianProcess",
    "Bootstrap",
    "Particles",
    "save",
    "load",
    # leaves: judge and show
    "metrics",
    "plotting",
    "problems",
]

__version__ = "0.1.0"
