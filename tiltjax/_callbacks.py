"""Compiled programs that call Python functions: an error of such a function is raised as itself."""

import collections
import contextlib
import functools
import itertools
import re
import threading
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from tiltjax import _checks

_LIMIT = 64  # errors that are kept
_errors: collections.OrderedDict[int, BaseException] = collections.OrderedDict()
_numbers, _lock = itertools.count(1), threading.Lock()


class RaisedOutside(Exception):
    """In the place of an error that a Python function has raised inside of a program: JAX passes on
    its text alone, which holds the number by which `failures` finds the error itself.
    """


def outside(error: BaseException) -> RaisedOutside:
    """Keep the error of a Python function; what to raise in its place."""
    with _lock:
        number = next(_numbers)
        _errors[number] = error
        if len(_errors) > _LIMIT:
            _errors.popitem(last=False)
    text = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()
    return RaisedOutside(f"{text} (error {number})".replace("\0", "\\0"))


class failures(contextlib.ContextDecorator):
    """`with failures(): ...` or `@failures()`: an error of an external reward in a compiled program
    is raised as itself.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: Any, _traceback: Any) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError):  # JAX raises either
            numbers = re.findall(r"RaisedOutside: .*?\(error (\d+)\)", str(error), re.DOTALL)
            with _lock:
                found = [cause for number in numbers if (cause := _errors.pop(int(number), None))]
            if found:
                raise found[0] from None


def run(program: Callable, *args: Any, **options: Any) -> Any:
    """`program(*args)`, whose results are there when it returns; what a Python function inside of
    it raises is raised as itself.
    """
    with failures():
        results = program(*args, **options)
        return jax.block_until_ready(results) if _checks.concrete(results) else results


def compiled(fn: Callable) -> Callable:
    """`eqx.filter_jit(fn)`, called by `run`."""
    program = eqx.filter_jit(fn)
    return functools.wraps(fn)(lambda *args, **options: run(program, *args, **options))
