r"""Checkpoints: a pytree of arrays in one file, to the last bit, with the settings it belongs to.

    write(file, settings, tree, step)                     all of the file or nothing of it
    tree, step = read(file, settings, like)      `like` says what is expected: names, shapes, dtypes

The file is a NumPy archive (`.npz`, no pickle): one array of bytes for each leaf, under the name of
its place in the tree, and a header in JSON,
`{"settings": ..., "step": ..., "arrays": {name: "float32(256, 256)"}}`. Bytes, because NumPy lacks
some dtypes of JAX.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_HEADER = "header"


def write_checkpoint(
    file: str | os.PathLike, settings: dict[str, Any], tree: Any, step: int
) -> None:
    """Replace `file` by a checkpoint after `step` steps, at once: a process that dies while it
    writes leaves the last one as it was.
    """
    arrays = {name: _plain(leaf) for name, leaf in _named(tree)}
    header = {
        "settings": settings,
        "step": step,
        "arrays": {name: _kind(array) for name, array in arrays.items()},
    }
    content: dict[str, Any] = {
        name: np.frombuffer(array.tobytes(), np.uint8) for name, array in arrays.items()
    }
    content[_HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    # In the same folder, as only there a rename is one act of the file system; of one name, so that
    # what a killed run left is written over.
    partial = Path(f"{os.fspath(file)}.partial")
    with open(partial, "wb") as stream:
        np.savez(stream, **content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def read_checkpoint(
    file: str | os.PathLike, settings: dict[str, Any], like: Any
) -> tuple[Any, int]:
    """The tree and step of a checkpoint, its leaves as those of `like`: JAX arrays, typed keys, or
    NumPy arrays that can be written to.

    **Raises:** `ValueError` for a file of something else, and, listing what differs, for one of
    other settings, names, shapes or dtypes.
    """
    path = os.fspath(file)
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            header = json.loads(archive[_HEADER].tobytes())
            found, kinds, step = header["settings"], header["arrays"], int(header["step"])
            raw = {name: archive[name].tobytes() for name in kinds}
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} holds no checkpoint: remove it, or name another file ({error})"
        ) from error
    expected = {name: _kind(_plain(leaf)) for name, leaf in _named(like)}
    # Through JSON as what was written: a tuple comes back as a list.
    differences = _differences(found, json.loads(json.dumps(settings))) + _differences(
        kinds, expected
    )
    if differences:
        shown = "; ".join(differences[:8]) + (
            f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        )
        raise ValueError(
            f"{path} is the checkpoint of another run: {shown}. Use the settings it was made with, "
            "remove it, or name another file"
        )
    leaves = [_restored(raw[name], leaf) for name, leaf in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), step


def digest(tree: Any) -> str:
    """A short print of all arrays of a tree: it tells other values apart, not everyone else's
    malice.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        array = _plain(leaf)
        total = zlib.crc32(array.tobytes(), zlib.crc32(_kind(array).encode(), total))
    return f"{total:08x}"


def callable_name(fn: Callable) -> str:
    """What a callable is called, by which a header tells functions apart."""
    fn = getattr(fn, "func", fn)
    return getattr(fn, "__qualname__", type(fn).__name__)


def _named(tree: Any) -> list[tuple[str, Any]]:
    located, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        (jax.tree_util.keystr(where, simple=True, separator="/"), leaf) for where, leaf in located
    ]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype.name}{array.shape}"


def _restored(raw: bytes, like: Any) -> Any:
    model = _plain(like)
    array = np.frombuffer(raw, model.dtype).reshape(model.shape).copy()
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array) if isinstance(like, jax.Array) else array


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    pairs = [
        (name, found.get(name, "nothing"), expected.get(name, "nothing"))
        for name in {**expected, **found}
    ]
    return [
        f"{name} is {there} in the file and {here} here"
        for name, there, here in pairs
        if there != here
    ]
