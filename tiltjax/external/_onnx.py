"""Networks in ONNX files, run by ONNX Runtime."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tiltjax import _checks
from tiltjax.external._external import External

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def from_onnx(
    model: Any, *, inputs: Sequence[str], output: str | None = None, **settings: Any
) -> External:
    """A network in an ONNX file as a reward `f(x)` or as a network `f(t, x, ...)`. ONNX Runtime
    computes values only, so that methods which differentiate the network refuse it.

    ```
    unet = tj.external.from_onnx("unet.onnx", inputs=("sigma", "noisy"), output="denoised")
    path = tj.VE()
    model = tj.from_denoiser(
        lambda t, x: unet(path.sigma(t), x), shape=(1, 128, 128), interpolant=path, batched=True
    )
    ```

    Arguments are converted to the dtypes of the file. Numbers `(n,)` get the axes of length one
    that the file declares. A file with a fixed batch gets chunks of this size; the last chunk is
    filled with copies of its last sample.

    **Arguments:** `model`, a file or an `onnxruntime.InferenceSession`; `inputs`, the names of the
    arguments in their order, which must be all inputs of the file; `output`, the name of the
    result, by default the only one; `settings` of `from_numpy`.

    **Raises:** `ImportError` without ONNX Runtime; `FileNotFoundError`; `ValueError` for other
    names, and for inputs without a batch axis; `TypeError` for inputs that are not numbers; in a
    run, as `External`.
    """
    session = model if hasattr(model, "get_inputs") else _session(model)
    declared = {item.name: item for item in session.get_inputs()}
    names = [inputs] if isinstance(inputs, str) else [*inputs]
    if sorted(names) != sorted(declared):
        raise ValueError(
            f"inputs must name the inputs of the ONNX network, {sorted(declared)}, in the order of "
            f"the arguments, got {names}"
        )
    outputs = [item.name for item in session.get_outputs()]
    output = outputs[0] if output is None and len(outputs) == 1 else output
    if output not in outputs:
        raise ValueError(f"output must be one of {outputs}, got {output!r}")
    items = [declared[name] for name in names]
    sizes = {_batch_of(item) for item in items} - {None}
    if len(sizes) > 1:
        raise ValueError(f"the inputs of the ONNX network have batches of different sizes, {sizes}")
    size = sizes.pop() if sizes else None

    def run(*args: np.ndarray) -> np.ndarray:
        num = len(args[0])
        feeds = {
            item.name: _fed(arg, item, size or num) for arg, item in zip(args, items, strict=True)
        }
        return session.run([output], feeds)[0][:num]

    if size is not None:
        settings["chunk_size"] = min(settings.get("chunk_size") or size, size)
    return External(run, name=settings.pop("name", output), **settings)


def _session(model: Any) -> Any:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("from_onnx needs ONNX Runtime: pip install onnxruntime") from error
    path = os.fspath(_checks.file_name(model, "model"))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"model: there is no file {path!r}")
    return onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())


def _batch_of(item: Any) -> int | None:
    """The fixed number of samples of an input, or `None`."""
    if item.type not in _DTYPES:
        raise TypeError(f"input {item.name!r} of the ONNX network is a {item.type}, not of numbers")
    if not item.shape:
        raise ValueError(
            f"input {item.name!r} of the ONNX network has no batch axis, but each sample has its "
            "own: export the network with one"
        )
    return item.shape[0] if isinstance(item.shape[0], int) else None


def _fed(arg: np.ndarray, item: Any, num: int) -> np.ndarray:
    """`num` rows of the declared dtype and number of axes."""
    ones = len(item.shape) - arg.ndim
    if ones > 0 and all(n == 1 or not isinstance(n, int) for n in item.shape[arg.ndim :]):
        arg = arg.reshape(arg.shape + (1,) * ones)
    fill = np.repeat(arg[-1:], num - len(arg), axis=0)
    arg = np.concatenate([arg, fill]) if len(fill) else arg
    return arg.astype(_DTYPES[item.type], copy=False)
