r"""Checkpoints: a pytree of arrays in one file, bit by bit, with the settings of its run.

    write_checkpoint(file, settings, tree, step)            replaces the whole file, or nothing
    tree, step = read_checkpoint(file, settings, like)      `like` has the names, shapes and dtypes

The file is a NumPy archive (`.npz`, no pickle). It holds one array of bytes for each leaf, under
the name of the leaf's place in the tree, and a header in JSON,
`{"settings": ..., "step": ..., "arrays": {name: "float32(256, 256)"}}`. It holds bytes because
NumPy lacks some dtypes of JAX.

Orbax is not used here. It writes a folder of many files, takes several times as long for a small
network, removes an old checkpoint before it writes the new one of the same name, and does not
compare settings.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiltjax import _pytree

_HEADER = "header"


def write_checkpoint(
    file: str | os.PathLike, settings: dict[str, Any], tree: Any, step: int
) -> None:
    """Replace `file` by a checkpoint after `step` steps. The replacement is atomic: a process that
    dies while writing leaves the old file unchanged.
    """
    arrays = {name: _as_numpy(leaf) for name, leaf in _by_name(tree).items()}
    types = {name: _array_type(array) for name, array in arrays.items()}
    header = json.dumps({"settings": settings, "step": step, "arrays": types})
    content: dict[str, Any] = {name: array.tobytes() for name, array in arrays.items()}
    content[_HEADER] = header.encode()
    content = {name: np.frombuffer(raw, np.uint8) for name, raw in content.items()}
    # A rename is one operation of the file system only inside one folder. The name is always the
    # same, so that the file of a killed run is overwritten.
    partial = Path(f"{os.fspath(file)}.partial")
    with open(partial, "wb") as stream:
        np.savez(stream, **content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def read_checkpoint(
    file: str | os.PathLike, settings: dict[str, Any], like: Any
) -> tuple[Any, int]:
    """The tree and the step of a checkpoint. The leaves have the types of those of `like`: JAX
    arrays, typed keys, or writable NumPy arrays.

    **Raises:** `ValueError` for a file that is not a checkpoint, and for a checkpoint with other
    settings, names, shapes or dtypes, with a list of the differences.
    """
    path = os.fspath(file)
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            header = json.loads(archive[_HEADER].tobytes())
            found, types, step = header["settings"], header["arrays"], int(header["step"])
            raw = {name: archive[name].tobytes() for name in types}
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a checkpoint: remove it, or choose another file ({error})"
        ) from error
    named = _by_name(like)
    expected = {name: _array_type(_as_numpy(leaf)) for name, leaf in named.items()}
    # Settings pass through JSON like those in the file, where a tuple becomes a list.
    differences = _differences(found, json.loads(json.dumps(settings)))
    differences += _differences(types, expected)
    if differences:
        listed = "; ".join(differences[:8])
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ValueError(
            f"{path} is the checkpoint of another run: {listed}{more}. Use the settings of that "
            "run, remove the file, or choose another file"
        )
    leaves = [_restored(raw[name], leaf) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), step


def digest(tree: Any) -> str:
    """A short checksum of all arrays and numbers of a tree, to distinguish runs. Forged files
    can have the same.
    """
    total = 0
    for leaf in _leaves(tree):
        if isinstance(leaf, jax.Array | np.ndarray):
            array = _as_numpy(leaf)
            total = zlib.crc32(array.tobytes(), zlib.crc32(_array_type(array).encode(), total))
        elif isinstance(leaf, int | float | complex):
            total = zlib.crc32(repr(leaf).encode(), total)
    return f"{total:08x}"


def callable_name(fn: Callable) -> str:
    """The name of a callable, which distinguishes functions in a header."""
    fn = getattr(fn, "func", fn)
    return getattr(fn, "__qualname__", type(fn).__name__)


def _leaves(tree: Any) -> Iterator[Any]:
    """The leaves of a tree, and the numbers that are static in its functions."""
    is_function = lambda node: isinstance(node, _pytree.Function)
    for leaf in jax.tree.leaves(tree, is_leaf=is_function):
        if is_function(leaf):
            yield from _leaves(leaf.parts())
        else:
            yield leaf


def _by_name(tree: Any) -> dict[str, Any]:
    located, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = lambda where: jax.tree_util.keystr(where, simple=True, separator="/")
    return {name(where): leaf for where, leaf in located}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_numpy(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _array_type(array: np.ndarray) -> str:
    return f"{array.dtype.name}{array.shape}"


def _restored(raw: bytes, like: Any) -> Any:
    expected = _as_numpy(like)
    array = np.frombuffer(raw, expected.dtype).reshape(expected.shape).copy()
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array) if isinstance(like, jax.Array) else array


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    values = lambda name: (found.get(name, "nothing"), expected.get(name, "nothing"))
    return [
        f"{name} is {there} in the file and {here} here"
        for name in {**expected, **found}
        for there, here in [values(name)]
        if there != here
    ]
