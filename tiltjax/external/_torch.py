"""Rewards in PyTorch, with gradients by `torch.autograd`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tiltjax import _checks
from tiltjax.external._external import External


def from_torch(fn: Callable, *, device: str = "cpu", **settings: Any) -> External:
    """A PyTorch function or module, from a batch `(n, *shape)` to `(n,)`, as a reward with its
    gradient by `torch.autograd`.

    Samples of a batch must not depend on each other: put modules in evaluation mode. A module gets
    its batch in the dtype of its parameters. On the CPU the samples share the memory of the tensor.

    **Arguments:** `fn`; `device`, the device of the batch, where the module must already be;
    `settings` of `External`: `chunk_size`, `timeout`, `retries`, `backoff`, `record`, `name`.

    **Raises:** `ImportError` without PyTorch; `ValueError` for a module in training mode, or
    another device; in a run, as `External`.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("from_torch needs PyTorch: pip install torch") from error
    _checks.function(fn, "fn")
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be a device of PyTorch, such as 'cuda:0', got {device!r}: {error}"
        ) from None
    dtype = None
    if isinstance(fn, torch.nn.Module):
        if fn.training:
            raise ValueError(
                f"{type(fn).__name__} is in training mode, where samples of a batch may depend on "
                "each other: call .eval() first"
            )
        dtype = next((leaf.dtype for leaf in fn.parameters() if leaf.is_floating_point()), None)

    def forward(leaf: Any) -> Any:
        # Tokens stay integers, as an embedding needs them, and their rewards stay real.
        floating = leaf.is_floating_point()
        values = fn(leaf.to(device=device, dtype=dtype if floating else None))
        if not isinstance(values, torch.Tensor):
            raise TypeError(f"a PyTorch reward must return a tensor, got {type(values).__name__}")
        return values.to("cpu", leaf.dtype if floating else torch.float64)

    def value(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return forward(torch.from_numpy(x)).numpy()

    def value_and_grad(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.enable_grad():
            leaf = torch.from_numpy(x).requires_grad_()
            values = forward(leaf)
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach().numpy(), gradient.numpy()

    settings = {"name": getattr(fn, "__name__", type(fn).__name__)} | settings
    return External(value, value_and_grad=value_and_grad, **settings)
