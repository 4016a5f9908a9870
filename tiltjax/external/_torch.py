"""Functions in PyTorch, with derivatives by `torch.autograd`."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tiltjax import _checks, _repr
from tiltjax.external._external import (
    External,
    refuse_training_mode,
    state_of,
    without_gradient,
)


class _Torch(External):
    """A function that prints as the call of `from_torch`."""

    def _call(self, **given: Any) -> str:
        text = super()._call(value_and_grad=None, vjp=None, **given)
        return f"from_torch{text.removeprefix(type(self).__name__)}"


def from_torch(fn: Callable, *, device: str = "cpu", **settings: Any) -> External:
    """A PyTorch function or module of a batch, as a reward `f(x)`, from `(n, *shape)` to `(n,)`, or
    as a network `f(t, x, ...)`, from times `(n,)` and states `(n, *shape)` to the shape of the
    states, with its derivatives by `torch.autograd`.

    ```
    unet = tj.external.from_torch(module.eval())            # module(level, x)
    path = tj.DiscreteVP(alphas_cumprod)
    model = tj.from_noise(
        lambda t, x: unet(path.index(t), x), shape=(4, 64, 64), interpolant=path, batched=True
    )
    ```

    Samples of a batch must not depend on each other: put modules in evaluation mode. A module gets
    its arguments in the dtype of its parameters. A function adapts other signatures:
    `from_torch(lambda t, x: unet(x, t).sample)`. A derivative of a network calls it again.

    **Arguments:** `fn`; `device`, the device of the batch, where the module must already be;
    `settings` of `from_numpy`: `output_shape`, `chunk_size`, `timeout`, `retries`, `backoff`,
    `record`, `name`.

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

    def forward(leaves: list) -> Any:
        # Tokens stay integers, as an embedding needs them, and their rewards stay real.
        moved = [leaf.to(device, dtype if leaf.is_floating_point() else None) for leaf in leaves]
        output = fn(*moved)
        if not isinstance(output, torch.Tensor):
            raise TypeError(
                f"a PyTorch {_kind(leaves)} must return a tensor, got {type(output).__name__}"
            )
        state = state_of(leaves)
        return output.to("cpu", state.dtype if state.is_floating_point() else torch.float64)

    def value(*args: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return forward([torch.from_numpy(arg) for arg in args]).numpy()

    differentiate = functools.partial(_differentiate, torch, forward, settings["name"])

    def value_and_grad(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, gradients = differentiate((x,), None)
        return values, gradients[0]

    def vjp(*args: np.ndarray) -> list[np.ndarray]:
        return differentiate(args[:-1], args[-1])[1]

    number = sum(leaf.numel() for leaf in fn.parameters()) if dtype is not None else 0
    value.__name__ = _repr.sized(getattr(fn, "__name__", type(fn).__name__), number)
    return _Torch(value, value_and_grad=value_and_grad, vjp=vjp, **settings)


def _kind(args: Any) -> str:
    return "reward" if len(args) == 1 else "network"


def _differentiate(
    torch: Any, forward: Callable, name: str, args: tuple, cotangent: np.ndarray | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output `forward(args)`, and the gradients with respect to the arguments of the sum of the
    output, or of its product with the cotangent.
    """
    with torch.enable_grad():
        leaves = [torch.from_numpy(arg) for arg in args]
        floating = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
        output, found = forward(leaves), {}
        if output.requires_grad:
            ones = cotangent is None
            weights = torch.ones_like(output) if ones else torch.from_numpy(cotangent)
            gradients = torch.autograd.grad(output, floating, weights, allow_unused=True)
            found = dict(zip(map(id, floating), gradients, strict=True))
    gradients = [found.get(id(leaf)) for leaf in leaves]
    if state_of(gradients) is None:
        kind = _kind(args)
        raise ValueError(
            f"the PyTorch {kind} {name!r} has no gradient, as a step has none, or a {kind} under "
            f"torch.no_grad() or .detach(): "
            + (without_gradient() if kind == "reward" else _METHODS)
        )
    zero = lambda arg, gradient: np.zeros_like(arg) if gradient is None else gradient.numpy()
    return output.detach().numpy(), [*map(zero, args, gradients)]


_METHODS = "use a method that does not differentiate the network, such as Conjugate or best_of_n"
