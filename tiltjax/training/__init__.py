"""Training and fine-tuning of networks."""

import importlib
from typing import Any

from tiltjax.training._finetune import (
    Chain,
    Objective,
    PolicyGradient,
    Reparametrized,
    finetune,
    policy_gradient,
    reparametrized,
)
from tiltjax.training._fit import fit, loss, uniform
from tiltjax.training._loop import Curve, Fit, adamw, minimize, schedule


def __getattr__(name: str) -> Any:
    # Flax takes as long to import as JAX: only the user of these modules waits for it.
    if name in ("lora", "networks"):
        return importlib.import_module(f"tiltjax.training.{name}")
    raise AttributeError(f"module 'tiltjax.training' has no attribute {name!r}")


__all__ = [
    "schedule",
    "adamw",
    "Curve",
    "Fit",
    "minimize",
    "uniform",
    "loss",
    "fit",
    "Chain",
    "Objective",
    "Reparametrized",
    "PolicyGradient",
    "reparametrized",
    "policy_gradient",
    "finetune",
    "lora",
    "networks",
]
