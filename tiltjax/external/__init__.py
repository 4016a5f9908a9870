r"""Functions that run outside of JAX, as rewards and networks: NumPy, PyTorch, ONNX, a service.

| name | |
|---|---|
| `from_numpy(fn)` | a Python function of a batch, with its derivative if it has one |
| `from_torch(fn)` | a PyTorch function or module, with derivatives by `torch.autograd` |
| `from_onnx(file, inputs=)` | a network in an ONNX file, values only |
| `External` | what these functions return |
| `Record` | every sample at which a reward was evaluated, with its value |
| `failures()` | a context in which the original error of a function is raised |
"""

from tiltjax._callbacks import failures
from tiltjax.external._external import External, from_numpy
from tiltjax.external._onnx import from_onnx
from tiltjax.external._record import Record
from tiltjax.external._torch import from_torch

__all__ = [
    "from_numpy",
    "from_torch",
    "from_onnx",
    "External",
    "Record",
    "failures",
]
