r"""Functions that run outside of JAX: a NumPy function, a PyTorch module, a service.

| name | |
|---|---|
| `External(fn)` | a Python function of a batch as a reward, with its gradient if it has one |
| `from_torch(fn)` | a PyTorch function or module, with the gradient of `torch.autograd` |
| `Record` | every sample at which a reward was evaluated, with its value |
| `failures()` | a context in which the original error of a reward is raised |
"""

from tiltjax._callbacks import failures
from tiltjax.external._external import External
from tiltjax.external._record import Record
from tiltjax.external._torch import from_torch

__all__ = [
    "External",
    "from_torch",
    "Record",
    "failures",
]
