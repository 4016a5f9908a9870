"""Rewards in PyTorch, with gradients by `torch.autograd`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tiltjax import _checks, _repr
from tiltjax.external._external import External, refuse_training_mode, without_gradient


class _Torch(External):
    """A reward that prints as the call of `from_torch`."""

    def _call(self, **given: Any) -> str:
        text = super()._call(value_and_grad=None, **given)
        return f"from_torch{text.removeprefix(type(self).__name__)}"


def from_torch(fn: Callable, *, device: str = "cpu", **settings: Any) -> External:
    """A PyTorch function or module, from a batch `(n, *shape)` to `(n,)`, as a reward with its
    gradient by `torch.autograd`.

    Samples of a batch must not depend on each other: put modules in evaluation mode. A module gets
    its batch in the dtype of its parameters. On the CPU the samples share the memory of the tensor.

    **Arguments:** `fn`; `device`, the device of the batch, where the module must already be;
    `settings` of `External`: `chunk_size`, `timeout`, `retries`, `backoff`, `record`, `name`.

    **Raises:** `ImportError` without PyTorch; `ValueError` for a module in training mode, also for
    one that `fn` uses from outside, or another device; in a run, as `External`, and `ValueError` if
    a run needs a gradient and the result does not depend on the samples by a derivative.
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
    refuse_training_mode(fn)
    dtype = None
    if isinstance(fn, torch.nn.Module):
        dtype = next((leaf.dtype for leaf in fn.parameters() if leaf.is_floating_point()), None)

    settings = {"name": getattr(fn, "__name__", type(fn).__name__)} | settings

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
            values, gradient = forward(leaf), None
            if values.requires_grad:
                (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
            if gradient is None:
                raise ValueError(
                    f"the PyTorch reward {settings['name']!r} has no gradient, as a step has none, "
                    "or a reward under torch.no_grad() or .detach(): " + without_gradient()
                )
        return values.detach().numpy(), gradient.numpy()

    number = sum(leaf.numel() for leaf in fn.parameters()) if dtype is not None else 0
    value.__name__ = _repr.sized(getattr(fn, "__name__", type(fn).__name__), number)
    return _Torch(value, value_and_grad=value_and_grad, **settings)
