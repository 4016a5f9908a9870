r"""Files of published weights: their location, and their arrays, in the safetensors format.

A file is mapped into memory, and an array is copied when it is used. The weights of a model are
therefore never in memory as a whole in addition to the model. bfloat16 is a NumPy dtype by
`ml_dtypes`, a dependency of JAX; the safetensors library does not support 8-bit floats in NumPy.

A published model is a folder with one folder for each network. A network's folder has a
`config.json` and safetensors files, with an index if there are several files.

Reference: the safetensors format, https://github.com/huggingface/safetensors.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tiltjax.pretrained.state_dicts import View

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_ADAPTER_CONFIG = "adapter_config.json"
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt"]


def read(file: str | os.PathLike) -> View:
    """The arrays of one safetensors file. An array is read when it is used.

    The `metadata` of the result are the texts in the header of the file, and the content of the
    file `adapter_config.json` beside it under this name, which PEFT writes for adapters.

    **Raises:** `FileNotFoundError` for a missing file; `ValueError` for a truncated file, a file of
    another format, and a dtype that NumPy does not have.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"the file {path} does not exist")
    try:
        opened = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is truncated ({error}): download it again"
        ) from error
    parts = {}
    for name in opened.keys():  # noqa: SIM118  no mapping
        entry = opened.get_slice(name)
        if (dtype := entry.get_dtype()) not in _DTYPES:
            raise ValueError(
                f"{path}: {name} has the unsupported dtype {dtype}; supported are "
                f"{', '.join(_DTYPES)}"
            )
        parts[name] = tuple(entry.get_shape()), partial(_array, opened, name)
    metadata = dict(opened.metadata() or {})
    if (beside := path.parent / _ADAPTER_CONFIG).is_file():
        metadata[_ADAPTER_CONFIG] = beside.read_text()
    return View(parts, metadata)


def _array(opened: safe_open, name: str, *index: slice) -> np.ndarray:
    return opened.get_slice(name)[index] if index else opened.get_tensor(name)


def write(file: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file of these arrays."""
    # `save_file` writes the memory of a transposed array without the transposition.
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, file)


def read_folder(folder: str | os.PathLike) -> View:
    """The arrays of all safetensors files of a folder: the files in its index, or the only file.

    **Raises:** `FileNotFoundError` for a folder without such files, or without a file of its index;
    `ValueError` for several files without one index, and for keys that are not in the file of the
    index.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"the folder {path} does not exist: expected a folder with safetensors files"
        )
    indices, files = (
        sorted(path.glob("*.safetensors.index.json")),
        sorted(path.glob("*.safetensors")),
    )
    if len(indices) == 1:
        weight_map = json.loads(indices[0].read_text())["weight_map"]
        if missing := sorted(
            name for name in set(weight_map.values()) if not (path / name).is_file()
        ):
            raise FileNotFoundError(
                f"{path} lacks {', '.join(missing)}, listed in {indices[0].name}: download it again"
            )
        opened = {name: read(path / name) for name in sorted(set(weight_map.values()))}
        if astray := [key for key, name in weight_map.items() if key not in opened[name]]:
            raise ValueError(f"{indices[0]} lists keys in the wrong file: {', '.join(astray[:8])}")
        return View({key: opened[name].parts[key] for key, name in weight_map.items()})
    if len(files) == 1 and not indices:
        return read(files[0])
    there = ", ".join(sorted(each.name for each in path.iterdir())[:8]) or "nothing"
    if not files:
        raise FileNotFoundError(f"{path} holds no safetensors files, only {there}")
    raise ValueError(
        f"{path} holds {len(files)} safetensors files and {len(indices)} indices ({there}), so "
        "that it is ambiguous which files belong together: keep one variant, or read one file"
    )


def configuration(folder: str | os.PathLike) -> dict[str, Any]:
    """The published `config.json` of a folder. **Raises:** `FileNotFoundError`, `ValueError`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: expected a folder in the layout of the published FLUX.1, with "
            "a config.json for each part"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def located(model: str | os.PathLike) -> Path:
    """The local folder of a model: `model` itself if it is a folder, or a copy of `"owner/name"`
    from the Hugging Face hub (downloaded once, about 34 GB).

    **Raises:** `FileNotFoundError` if neither exists; `PermissionError` for a gated model without
    access; `ImportError` without `huggingface_hub`.
    """
    path = Path(model)
    if path.is_dir():
        return path
    name = os.fspath(model)
    if path.is_absolute() or name.count("/") != 1 or name.startswith((".", "~")):
        raise FileNotFoundError(
            f"the folder {name} does not exist, and the name is not of the form of the Hugging "
            "Face hub, such as black-forest-labs/FLUX.1-dev"
        )
    try:
        import huggingface_hub as hub  # pyright: ignore[reportMissingImports]
        from huggingface_hub import errors  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"the folder {name} does not exist; to download it from the Hugging Face hub: pip "
            "install 'tiltjax[images]'"
        ) from error
    try:
        return Path(
            hub.snapshot_download(
                name, allow_patterns=[f"*/{each}" for each in _PATTERNS] + ["model_index.json"]
            )
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name} is a gated model: accept its license at https://huggingface.co/{name}, then "
            "log in (hf auth login, or a token in HF_TOKEN), or pass the folder of a copy"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the folder {name} does not exist, and the Hugging Face hub has no model of this name "
            "that your account can access: check the name, or log in"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"the folder {name} does not exist, there is no downloaded copy, and the Hugging Face "
            "hub cannot be reached"
        ) from error
