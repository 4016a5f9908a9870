r"""Rewards that run outside of JAX: a NumPy function, a PyTorch module, a service.

| name | |
|---|---|
| `External(fn)` | a Python function of a batch, with its gradient where it has one |
| `from_torch(fn)` | a PyTorch function or module, with the gradient of `torch.autograd` |
| `Record` | every sample that a reward was evaluated at, with its value |
| `failures()` | within it, an error of a reward is raised as itself |
"""

from tiltjax.external._host import External, Record, failures
from tiltjax.external._torch import from_torch

__all__ = [
    "External",
    "from_torch",
    "Record",
    "failures",
]
