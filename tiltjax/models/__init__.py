"""Models of the base law: closed forms, networks, tilts and mixtures of models."""

from tiltjax.models._analytic import Analytic
from tiltjax.models._annealed import (
    Annealed,
    Power,
    Step,
    Weight,
    check_pair,
    mixed,
    power,
    step,
    weight_at,
    weight_schedule,
)
from tiltjax.models._base import Denoiser, Model
from tiltjax.models._checkerboard import SCALE, Checkerboard
from tiltjax.models._network import (
    Net,
    Network,
    ask,
    checked,
    from_denoiser,
    from_noise,
    from_velocity,
)
from tiltjax.models._tilted import Rescheduled, Tilted

__all__ = [
    "Denoiser",
    "Model",
    "Analytic",
    "Net",
    "ask",
    "checked",
    "Network",
    "from_velocity",
    "from_noise",
    "from_denoiser",
    "SCALE",
    "Checkerboard",
    "Rescheduled",
    "Tilted",
    "Power",
    "Step",
    "power",
    "step",
    "Weight",
    "Annealed",
    "check_pair",
    "mixed",
    "weight_at",
    "weight_schedule",
]
