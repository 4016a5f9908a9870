"""Functions that run elsewhere (NumPy, PyTorch, a service) as rewards with derivatives."""

from tiltjax.external._host import External, Record, failures
from tiltjax.external._torch import from_torch

__all__ = [
    "Record",
    "External",
    "failures",
    "from_torch",
]
