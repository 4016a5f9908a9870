"""What a function uses besides its arguments: variables of its closure, global variables, default
arguments, attributes of objects, and what the functions that it calls use.

A compiled program contains these values as constants, and Python compares functions by identity.
`captured` finds them, so that a function with another value is another function for the compiler,
and so that modules that change in place can be refused.
"""

import dis
import functools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import numpy as np

# The globals of these packages do not change.
_PACKAGES = {
    *("diffrax", "equinox", "flax", "jax", "jaxlib", "jaxtyping", "lineax", "matplotlib"),
    *("ml_dtypes", "numpy", "optax", "optimistix", "pandas", "PIL", "pytest", "scipy"),
    *("sklearn", "theory", "tiltjax", "torch", "torchvision", "transformers", "typing_extensions"),
}
_LIBRARIES = _PACKAGES | set(sys.stdlib_module_names) - {"__main__"}
_NUMBERS = (bool, int, float, complex, str, bytes, np.generic, type(None))


class _Names(NamedTuple):
    """The names that code reads, and those that it also writes, such as counters."""

    variables: frozenset[str]
    attributes: frozenset[str]
    written: frozenset[str]


class Captured:
    """The captured values of a function, `(name, value)` each. Two are equal if they consist of the
    same objects and of equal numbers.
    """

    def __init__(self, values: list[tuple[str, Any]]):
        self.values = values
        self._key = tuple(_identity(value) for _, value in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Captured) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:  # without addresses, which differ from run to run
        return f"Captured({', '.join(name for name, _ in self.values)})"


def captured(*objects: Any) -> Captured:
    """The values that these functions and objects use. Of an object that is not called all
    attributes count.
    """
    found = _Search()
    for value in objects:
        found.visit(value, getattr(value, "__name__", type(value).__name__), None, False)
    return Captured(found.values)


def is_flax(value: Any) -> bool:
    """Whether the value is a Flax NNX module or variable, which training changes in place."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module | nnx.Variable)


def is_torch(value: Any) -> bool:
    """Whether the value is a PyTorch module."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _identity(value: Any) -> Any:
    if isinstance(value, np.generic):
        return type(value), value.tobytes()
    if isinstance(value, _NUMBERS):
        return type(value), repr(value)  # NaN equals NaN
    return id(value)


class _Search:
    """A walk through everything that can be reached; `values` in the order of the walk."""

    def __init__(self):
        self.values: list[tuple[str, Any]] = []
        self._seen: set[tuple[int, Any]] = set()
        self._alive: list[Any] = []  # so that no id is used twice

    def visit(self, value: Any, name: str, attributes: frozenset[str] | None, inside: bool) -> None:
        """Record a value and what can be reached from it. `attributes` are those that the code
        reads, `None` if all count. `inside` a container numbers are not recorded, because lists and
        dictionaries may be counters and logs.
        """
        if isinstance(value, _NUMBERS):
            if not inside:
                self.values.append((name, value))
            return
        if (id(value), attributes) in self._seen:
            return
        self._seen.add((id(value), attributes))
        self._alive.append(value)
        if inside and isinstance(value, jax.core.Tracer):  # in a log
            return
        if isinstance(value, jax.Array | np.ndarray) or is_flax(value) or is_torch(value):
            self.values.append((name, value))
        elif isinstance(value, types.ModuleType | type):
            self._namespace(value, name, attributes)
        elif isinstance(value, types.FunctionType):
            self.values.append((name, value))
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._method(value.__func__, value.__self__, name)
        elif isinstance(value, functools.partial):
            self.visit(value.func, name, None, inside)
            self.visit((value.args, value.keywords), name, None, True)
        elif isinstance(value, Mapping):
            for key, item in list(value.items()):
                self.visit(item, f"{name}[{key!r}]", attributes, True)
        elif isinstance(value, list | tuple | set | frozenset):
            for i, item in enumerate(list(value)):
                self.visit(item, f"{name}[{i}]", attributes, True)
        elif isinstance(value, eqx.Module):
            self.values.append((name, value))
            if not getattr(type(value), "_copies", False):
                for field, item in vars(value).items():
                    self.visit(item, f"{name}.{field}", None, True)
        elif (wrapped := _instance_value(value, "__wrapped__")) is not None:
            self.visit(wrapped, name, attributes, inside)
        elif not in_library(type(value).__module__):
            self.values.append((name, value))
            self._object(value, name, attributes)

    def _namespace(self, value: Any, name: str, attributes: frozenset[str] | None) -> None:
        """The attributes of a Python module or of a class that the code reads."""
        if in_library(value.__name__ if isinstance(value, types.ModuleType) else value.__module__):
            return
        for attribute in (attributes or frozenset()) & vars(value).keys():
            self.visit(vars(value)[attribute], f"{name}.{attribute}", attributes, False)

    def _function(self, fn: types.FunctionType) -> None:
        names = _names(fn.__code__)
        for name, value in _variables(fn, names):
            self.visit(value, name, names.attributes - names.written, False)
        if wrapped := vars(fn).get("__wrapped__"):
            self.visit(wrapped, fn.__name__, None, False)

    def _method(self, fn: Any, value: Any, name: str) -> None:
        """A function that is called as a method of an object."""
        if isinstance(fn, types.FunctionType):
            self._function(fn)
            names = _names(fn.__code__)
            self.visit(value, name, names.attributes - names.written, True)
        else:
            self.visit(value, name, None, True)

    def _object(self, value: Any, name: str, attributes: frozenset[str] | None) -> None:
        if attributes is None:
            found = vars(value).keys() if hasattr(value, "__dict__") else frozenset()
            attributes = frozenset(found)
        for attribute in sorted(attributes | {"__call__"}):
            where = f"{name}.{attribute}"
            if (item := _instance_value(value, attribute)) is not None:
                self.visit(item, where, attributes, False)
                continue
            item = next(
                (vars(c)[attribute] for c in type(value).__mro__ if attribute in vars(c)), 0
            )
            if isinstance(item, types.FunctionType | property | staticmethod | classmethod):
                fn = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
                if (id(value), fn) not in self._seen:
                    self._seen.add((id(value), fn))
                    self._method(fn, value, name)
            elif isinstance(item, types.MemberDescriptorType):
                self.visit(getattr(value, attribute, None), where, attributes, False)
            elif not isinstance(item, type):
                self.visit(item, where, attributes, True)


def _variables(fn: types.FunctionType, names: _Names) -> Iterator[tuple[str, Any]]:
    """The variables of the closure, the global variables and the default arguments of a function,
    without those that it writes.
    """
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if name not in names.written:
            yield name, content
    if not in_library(fn.__globals__.get("__name__", "")):
        for name in sorted(names.variables - names.written):
            if name in fn.__globals__:
                yield name, fn.__globals__[name]
    positional = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    defaults = fn.__defaults__ or ()
    yield from zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    yield from (fn.__kwdefaults__ or {}).items()


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> _Names:
    """The names in the code of a function and of the functions inside it."""
    variables, attributes, written = set(), set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            variables.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "STORE_ATTR", "STORE_DEREF"):
            written.add(instruction.argval)
    written -= set(code.co_cellvars)  # variables that this code makes
    for inner in filter(lambda const: isinstance(const, types.CodeType), code.co_consts):
        names = _names(inner)
        variables |= names.variables
        attributes |= names.attributes
        written |= names.written - set(code.co_cellvars)
    return _Names(frozenset(variables), frozenset(attributes), frozenset(written))


def _instance_value(value: Any, name: str) -> Any:
    """An attribute in the dictionary of an object, or `None`; nothing of the object runs."""
    try:
        return object.__getattribute__(value, "__dict__").get(name)
    except AttributeError:
        return None


def in_library(module: str) -> bool:
    """Whether a Python module, by its full name, belongs to a package of `_LIBRARIES`."""
    return module.partition(".")[0] in _LIBRARIES
