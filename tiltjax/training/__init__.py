r"""Training and fine-tuning.

| function | |
|---|---|
| `fit` | train a velocity, noise or denoising network on data |
| `finetune` | train a model to sample a tilt, with or without gradients of the reward |
| `minimize` | the loop of both, for any random loss; `adamw` is its optimizer |
| `training.lora` | low-rank adapters |
| `training.networks` | a small velocity network |
"""

import importlib
from typing import TYPE_CHECKING, Any

from tiltjax.training._finetune import Objective, Rollout, finetune, policy_gradient, reparametrized
from tiltjax.training._fit import fit, loss, uniform
from tiltjax.training._loop import Curve, Fit, adamw, minimize, schedule
from tiltjax.training._parameters import split_parameters

if TYPE_CHECKING:
    from tiltjax.training import lora, networks


def __getattr__(name: str) -> Any:
    # Both import Flax, which takes as long to import as JAX, so they are imported on first use.
    if name in ("lora", "networks"):
        return importlib.import_module(f"tiltjax.training.{name}")
    raise AttributeError(f"module 'tiltjax.training' has no attribute {name!r}")


__all__ = [
    "fit",
    "loss",
    "uniform",
    "finetune",
    "Objective",
    "Rollout",
    "reparametrized",
    "policy_gradient",
    "minimize",
    "Fit",
    "Curve",
    "adamw",
    "schedule",
    "split_parameters",
    "lora",
    "networks",
]
