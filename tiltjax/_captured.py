"""The modules of Flax and PyTorch that a function uses besides its arguments: in its closure, in
global variables, default arguments, attributes of objects, and in the functions that it calls.

A compiled program contains them as constants, although training changes them in place, so that they
must be refused. Arrays and numbers are not searched for: as everywhere in JAX, a global variable
that gets another array has no effect on a function object that is already compiled.
"""

import contextlib
import dis
import functools
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import equinox as eqx
import jax
import numpy as np

_DATA = (bool, int, float, complex, str, bytes, type(None), np.generic, np.ndarray, jax.Array)


def captured(*objects: Any) -> list[tuple[str, Any]]:
    """The modules that these functions and objects are or use, and the names where they are.

    Of an object, a class or a Python module those attributes count whose names occur in the code
    that was found. The search is thus repeated until it finds no new names.
    """
    names, before, found = {"__call__", "__wrapped__"}, 0, []
    while before < len(names):
        before, found = len(names), _search(objects, names)
    return found


def is_flax(value: Any) -> bool:
    """Whether the value is a Flax NNX module or variable, which training changes in place."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module | nnx.Variable)


def is_torch(value: Any) -> bool:
    """Whether the value is a PyTorch module."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


@functools.cache
def in_library(module: str) -> bool:
    """Whether a Python module, by its full name, is of this library, the standard library or an
    installed package, whose global variables and attributes are not searched.
    """
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    installed = {"site-packages", "dist-packages"} & set(PurePath(file).parts)
    ours = module.partition(".")[0] in ("tiltjax", *sys.stdlib_module_names)
    return module != "__main__" and (ours or bool(installed))


def _search(objects: tuple, names: set[str]) -> list[tuple[str, Any]]:
    """The modules that can be reached by attributes of these names; adds to the names."""
    found, seen = [], {}
    todo = [(getattr(value, "__name__", type(value).__name__), value) for value in objects]
    for where, value in todo:  # which grows
        if id(value) in seen or isinstance(value, _DATA):
            continue
        seen[id(value)] = value
        if is_flax(value) or is_torch(value):
            found.append((where, value))
            continue
        if isinstance(value, types.FunctionType):
            todo += _variables(value, names)
        todo += [(where, part) for part in _parts(value)]
        todo += _attributes(where, value, names)
    return found


def _parts(value: Any) -> list:
    """What a container or a wrapper of a function consists of."""
    match value:
        case functools.partial():
            return [value.func, value.args, value.keywords]
        case types.MethodType() | staticmethod() | classmethod():
            return [value.__func__, getattr(value, "__self__", None)]
        case property():
            return [value.fget]
        case Mapping():
            return list(value.values())
        case list() | tuple() | set() | frozenset():
            return list(value)
    return []


def _attributes(where: str, value: Any, names: set[str]) -> Iterator[tuple[str, Any]]:
    """The attributes of an object and of its classes; no code of the object runs."""
    cls = value if isinstance(value, type) else type(value)
    module = value.__name__ if isinstance(value, types.ModuleType) else cls.__module__
    wanted = {"__wrapped__"} if in_library(str(module)) else names
    own = getattr(value, "__dict__", {})
    if isinstance(value, eqx.Module) and not getattr(value, "_copies", False):
        wanted = wanted | own.keys()
    for space in (own, *map(vars, cls.__mro__)):
        for name in sorted(wanted & space.keys()):
            is_slot = isinstance(space[name], types.MemberDescriptorType)
            item = getattr(value, name, None) if is_slot else space[name]
            yield where if name.startswith("__") else f"{where}.{name}", item


def _variables(fn: types.FunctionType, names: set[str]) -> Iterator[tuple[str, Any]]:
    """The variables and default arguments that a function uses; adds the names in its code."""
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents
    positional = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    yield from zip(positional[::-1], (fn.__defaults__ or ())[::-1], strict=False)
    yield from (fn.__kwdefaults__ or {}).items()
    codes = [] if in_library(fn.__globals__.get("__name__", "")) else [fn.__code__]
    for code in codes:  # which grows by the functions inside
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        names.update(code.co_names)
        # `co_names` has the global variables and the attributes.
        steps = dis.get_instructions(code)
        loaded = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        yield from ((name, fn.__globals__[name]) for name in loaded & fn.__globals__.keys())
