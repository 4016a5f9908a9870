r"""Where published weights are, and how they are read: safetensors files, by the library of that
name.

A file is mapped into memory, and an array is copied when it is used: the weights of a model are
never in memory as a whole beside the model itself. bfloat16 is a NumPy dtype by `ml_dtypes`, which
JAX brings along; the library has no 8-bit floats in NumPy.

A published model is a folder with one folder for each of its networks: a `config.json` and files,
with an index where there are several.

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
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt"]


def read(file: str | os.PathLike) -> View:
    """The arrays of one safetensors file; an array is read when it is used.

    **Raises:** `FileNotFoundError`; `ValueError` for a file that is cut off or something else, and
    for a dtype that NumPy does not have.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        opened = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, or was cut off ({error}): download it again"
        ) from error
    parts = {}
    for name in opened.keys():  # noqa: SIM118  no mapping
        entry = opened.get_slice(name)
        if (dtype := entry.get_dtype()) not in _DTYPES:
            raise ValueError(
                f"{path}: {name} is stored as {dtype}, which is not supported; "
                f"{', '.join(_DTYPES)} are"
            )
        parts[name] = tuple(entry.get_shape()), partial(_array, opened, name)
    return View(parts)


def _array(opened: safe_open, name: str, *index: slice) -> np.ndarray:
    return opened.get_slice(name)[index] if index else opened.get_tensor(name)


def write(file: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of these arrays."""
    # `save_file` writes the memory of an array that is transposed as if it were not.
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, file)


def read_folder(folder: str | os.PathLike) -> View:
    """The arrays of all safetensors files of a folder: those that its index lists, or the only one.

    **Raises:** `FileNotFoundError` for a folder without them, or without one that its index lists;
    `ValueError` where it is not clear which.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path}: expected a folder with safetensors files"
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
            raise ValueError(
                f"{indices[0]} lists keys that are not where it says: {', '.join(astray[:8])}"
            )
        return View({key: opened[name].parts[key] for key, name in weight_map.items()})
    if len(files) == 1 and not indices:
        return read(files[0])
    there = ", ".join(sorted(each.name for each in path.iterdir())[:8]) or "nothing"
    if not files:
        raise FileNotFoundError(f"{path} holds no safetensors files, but {there}")
    raise ValueError(
        f"{path} holds {len(files)} safetensors files and {len(indices)} indices: which ones "
        "belong together is not clear "
        f"({there}); keep one variant, or read one file"
    )


def configuration(folder: str | os.PathLike) -> dict[str, Any]:
    """The published `config.json` of a folder. **Raises:** `FileNotFoundError`, `ValueError`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: expected a folder as FLUX.1 is published, with a config.json for "
            "each part"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def located(model: str | os.PathLike) -> Path:
    """The local folder of a model: the folder itself, or a copy of `"owner/name"` from the Hugging
    Face hub (downloaded once, about 34 GB).

    **Raises:** `FileNotFoundError` if there is neither; `PermissionError` for a model that has to
    be asked for; `ImportError` without `huggingface_hub`.
    """
    path = Path(model)
    if path.is_dir():
        return path
    name = os.fspath(model)
    if path.is_absolute() or name.count("/") != 1 or name.startswith((".", "~")):
        raise FileNotFoundError(
            f"there is no folder {name}, and this is no name of the Hugging Face hub such as "
            "black-forest-labs/FLUX.1-dev"
        )
    try:
        import huggingface_hub as hub  # pyright: ignore[reportMissingImports]
        from huggingface_hub import errors  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"there is no folder {name}; to look for it on the Hugging Face hub: pip install "
            "'tiltjax[images]'"
        ) from error
    try:
        return Path(
            hub.snapshot_download(
                name, allow_patterns=[f"*/{each}" for each in _PATTERNS] + ["model_index.json"]
            )
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name} is a gated model: accept its licence at https://huggingface.co/{name}, then "
            "log in (hf auth login, or a token in "
            "HF_TOKEN), or pass the folder of a copy"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the Hugging Face hub has no such model that this "
            "account may see: check the name, or log in"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name}, no downloaded copy, and the Hugging Face hub cannot be "
            "reached"
        ) from error
