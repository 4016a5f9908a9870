r"""Where published weights are, and how they are read: safetensors files, mapped into memory.

    8 bytes n, little endian | n bytes JSON {name: {"dtype", "shape", "data_offsets"}} | data

The format is simple enough to be read here: an array is a view of the file, which the operating
system reads when it is used and forgets when memory is short, so that the weights of a model are
never in host memory as a whole. bfloat16 is a NumPy dtype by `ml_dtypes`, which JAX brings along.

| folder of FLUX.1 | kind |
|---|---|
| `transformer`, `vae`, `text_encoder`, `text_encoder_2` | `transformer`, `autoencoder`, `clip`, `t5`: each a `config.json` and files, with an index where there are several |

Reference: the safetensors format, https://github.com/huggingface/safetensors.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tiltjax.pretrained.state_dicts import View

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt"]


def read(file: str | os.PathLike) -> View:
    """The arrays of one safetensors file, as views of it.

    **Raises:** `FileNotFoundError`; `ValueError` for a file that is cut off or something else, and
    for a dtype that is not supported.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as stream:
        size = path.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path} is no safetensors file, or was cut off: download it again")
        try:
            header = json.loads(stream.read(length))
            entries = {
                name: (e["dtype"], tuple(e["shape"]), tuple(e["data_offsets"]))
                for name, e in header.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is no safetensors file: its header cannot be read ({error!r})"
            ) from error
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    parts = {}
    for name, (kind, shape, (start, end)) in entries.items():
        if kind not in _DTYPES:
            raise ValueError(
                f"{path}: {name} is stored as {kind}, which is not supported; {', '.join(_DTYPES)} "
                "are"
            )
        dtype, start, end = np.dtype(_DTYPES[kind]), start + 8 + length, end + 8 + length
        if end > size or start < 8 + length or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{path}: {name} lies outside of the file, which was cut off: download it again"
            )

        def array(start=start, shape=shape, dtype=dtype) -> np.ndarray:
            return np.frombuffer(mapped, dtype, math.prod(shape), start).reshape(shape)

        parts[name] = shape, array
    return View(parts)


def write(file: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of these arrays."""
    header, place = {}, 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": (place, place := place + array.nbytes),
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that arrays start at a multiple of 8 bytes
    with open(file, "wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for array in arrays.values():
            stream.write(np.ascontiguousarray(array).tobytes())


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
            "'tiltjax[flux]'"
        ) from error
    try:
        return Path(
            hub.snapshot_download(
                name, allow_patterns=[f"*/{each}" for each in _WANTED] + ["model_index.json"]
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
