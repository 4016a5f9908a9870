r"""Flax NNX modules from published PyTorch weights, by one rule for all modules.

The attributes of every module of tiltjax have the names of its published state dict, so that the
path of a parameter *is* its name:

| tiltjax | published |
|---|---|
| `kernel`, 2-D `(in, out)` | `weight`, transposed |
| `kernel`, 4-D `(height, width, in, out)` | `weight`, `(out, in, height, width)` |
| `scale`, `embedding` | `weight`, unchanged |
| any other name, such as `bias` | the same |
| `blocks.attn.to_q.kernel`, a stack with a leading axis | `blocks.0.attn.to_q.weight`, ... |

`renames` lists the paths that differ (`ff.net.0.proj`: a number cannot be an attribute), `stacked`
the paths that are stacks, and `ignored` the keys that may be unused. Any other key that is missing,
unused or of another shape is an error, so that no parameter keeps its initial value and no array is
dropped.

Every parameter is read, transposed and sent to its device or devices separately, a sharded one
shard by shard. Weights from files (`tiltjax.pretrained.files`) are never in memory as a whole in
addition to the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Module)
# For the number of axes of a published array, the axes of its kernel; and the inverse.
_TO_KERNEL = {2: (1, 0), 4: (2, 3, 1, 0)}
_FROM_KERNEL = {2: (1, 0), 4: (3, 2, 0, 1)}
_WEIGHT = ("kernel", "scale", "embedding")
_SHOWN = 8
# A function from the path and the array of a parameter to its sharding.
Placement = Callable[[tuple, Any], jax.sharding.Sharding | None]


class Entry(NamedTuple):
    """One parameter: its path, its array or abstract array, and its published names (one for each
    block of a stack). `is_stack` is whether it is a stack.
    """

    path: tuple
    leaf: Any
    names: tuple[str, ...]
    is_stack: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each published array in `names`."""
        shape = self.leaf.shape[1:] if self.is_stack else self.leaf.shape
        axes = _FROM_KERNEL.get(len(shape)) if self.path[-1] == "kernel" else None
        return shape if axes is None else tuple(shape[axis] for axis in axes)


def entries(
    network: nnx.Module, renames: Mapping[str, str] | None = None, stacked: Sequence[str] = ()
) -> list[Entry]:
    """The parameters of a module, or of an abstract one (`nnx.eval_shape`), with their published
    names and shapes.
    """
    found = []
    for path, variable in nnx.to_flat_state(nnx.state(network, nnx.Param)):
        leaf = variable.get_value()
        parts = [*map(str, path[:-1]), "weight" if path[-1] in _WEIGHT else str(path[-1])]
        stack = next(
            (prefix for prefix in stacked if ".".join(parts).startswith(f"{prefix}.")), None
        )
        if stack is None:
            names = (_renamed(".".join(parts), renames),)
        else:
            rest = ".".join(parts)[len(stack) :]
            names = tuple(_renamed(f"{stack}.{i}{rest}", renames) for i in range(leaf.shape[0]))
        found.append(Entry(path, leaf, names, stack is not None))
    return found


def shapes(
    network: nnx.Module, renames: Mapping[str, str] | None = None, stacked: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """The published names and shapes of a module's parameters."""
    return {
        name: entry.shape for entry in entries(network, renames, stacked) for name in entry.names
    }


def from_state_dict(
    abstract: M,
    state_dict: Mapping[str, Any],
    *,
    renames: Mapping[str, str] | None = None,
    stacked: Sequence[str] = (),
    ignored: Sequence[str] = (),
    sharding: Placement | None = None,
) -> M:
    """The module whose parameters are the arrays of `state_dict`.

    **Arguments:**

    - `abstract`: `nnx.eval_shape(lambda: Module(config, rngs=nnx.Rngs(0)))`, or a module whose
      parameters are replaced. Its dtypes are kept.
    - `state_dict`: NumPy arrays by published names. If the mapping has a method `shape(name)`, the
      shapes are found without reading arrays.
    - `renames`, `stacked`, `ignored`: as in the module's docstring. A rename applies to whole parts
      of a path, `{"to_out": "to_out.0"}`.
    - `sharding`: `sharding(path, array)`, the sharding of a parameter; by default JAX's default
      device.

    **Raises:** `ValueError` with the keys that are missing, unused or of another shape.
    """
    table = entries(abstract, renames, stacked)
    _check(type(abstract).__name__, table, state_dict, set(ignored))
    graph, state = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(state))
    for entry in table:
        value = _placed(
            entry, state_dict, None if sharding is None else sharding(entry.path, entry.leaf)
        )
        flat[entry.path] = flat[entry.path].replace(value)
    return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))


def to_state_dict(
    network: nnx.Module, renames: Mapping[str, str] | None = None, stacked: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The parameters of a module as NumPy arrays by published names: the inverse of
    `from_state_dict`.
    """
    arrays = {}
    for entry in entries(network, renames, stacked):
        whole = np.asarray(entry.leaf)
        for name, array in zip(entry.names, whole if entry.is_stack else [whole], strict=True):
            axes = _FROM_KERNEL.get(array.ndim) if entry.path[-1] == "kernel" else None
            arrays[name] = np.asarray(array if axes is None else array.transpose(axes), order="C")
    return arrays


class View(Mapping):
    """A state dict under other names, or of parts of another state dict: `{name: (shape, read)}`,
    where `read()` returns the array, and `read(*slices)` a part of it. `metadata` are the texts of
    a file in addition to its arrays.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[tuple[int, ...], Callable[..., np.ndarray]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.parts, self.metadata = parts, dict(metadata or {})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.parts[name][1]()

    def __contains__(self, name: object) -> bool:  # the default of Mapping would read the array
        return name in self.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one array, without reading it."""
        return self.parts[name][0]


def shape_of(state_dict: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The shape of one array of a state dict, without reading the array if possible."""
    shape = getattr(state_dict, "shape", None)
    return tuple(np.shape(state_dict[name]) if shape is None else shape(name))


def reader(state_dict: Mapping[str, Any], name: str) -> Callable[..., np.ndarray]:
    """The function that reads one array of a state dict, or a part of it by slices."""
    if isinstance(state_dict, View):
        return state_dict.parts[name][1]
    return lambda *index: np.asarray(state_dict[name])[index]


def _renamed(name: str, renames: Mapping[str, str] | None) -> str:
    # Dots at both ends, so that only whole parts of a path match.
    name = f".{name}."
    for ours, theirs in (renames or {}).items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name[1:-1]


def _check(
    module: str, table: list[Entry], state_dict: Mapping[str, Any], ignored: set[str]
) -> None:
    expected = {name: entry.shape for entry in table for name in entry.names}
    known = expected.keys() | ignored
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in state_dict]
    unused = [f"{name} {shape_of(state_dict, name)}" for name in state_dict if name not in known]
    shaped = [
        f"{name} has {found}, expected {shape}"
        for name, shape in expected.items()
        if name in state_dict and (found := shape_of(state_dict, name)) != shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}"
        for what, keys in (("missing", missing), ("unused", unused), ("of another shape", shaped))
        if keys
    ]
    if problems:
        raise ValueError(
            f"these weights do not match {module} with its {len(expected)} keys. "
            + "; ".join(problems)
            + ". Check that they belong to "
            "this configuration, and to this part of the model."
        )


def _placed(
    entry: Entry, state_dict: Mapping[str, Any], sharding: jax.sharding.Sharding | None
) -> jax.Array:
    shape, dtype = entry.leaf.shape, entry.leaf.dtype

    def read(name: str, index: Sequence[slice], shape: Sequence[int]) -> np.ndarray:
        axes = _TO_KERNEL.get(len(shape)) if entry.path[-1] == "kernel" else None
        whole = all(one.indices(n) == (0, n, 1) for one, n in zip(index, shape, strict=True))
        if axes is None:
            return reader(state_dict, name)(*(() if whole else index))
        published = [index[axes.index(axis)] for axis in range(len(shape))]
        return reader(state_dict, name)(*(() if whole else published)).transpose(axes)

    def part(index: Any) -> np.ndarray:
        # Read only the part that one device holds, and cast it.
        sizes = [len(range(*one.indices(n))) for one, n in zip(index, shape, strict=True)]
        buffer = np.empty(sizes, dtype)
        if not entry.is_stack:
            buffer[...] = read(entry.names[0], index, shape)
            return buffer
        for row, name in zip(buffer, entry.names[index[0]], strict=True):
            row[...] = read(name, index[1:], shape[1:])
        return buffer

    if sharding is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)
