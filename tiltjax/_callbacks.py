"""Compiled programs that call Python functions and raise the original errors of these functions."""

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

_LIMIT = 64  # the number of stored errors
_errors: collections.OrderedDict[int, BaseException] = collections.OrderedDict()
_numbers, _lock = itertools.count(1), threading.Lock()


class RaisedOutside(Exception):
    """A substitute for an error of a Python function inside a program. JAX passes on only its text,
    which contains the number by which `failures` finds the original error.
    """


def outside(error: BaseException) -> RaisedOutside:
    """An error to raise in place of `error`, which is stored."""
    with _lock:
        number = next(_numbers)
        _errors[number] = error
        if len(_errors) > _LIMIT:
            _errors.popitem(last=False)
    text = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()
    return RaisedOutside(f"{text} (error {number})".replace("\0", "\\0"))


class failures(contextlib.ContextDecorator):
    """`with failures(): ...` or `@failures()`: raise the original error of an external reward in a
    compiled program.
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
    """`program(*args)`, complete when `run` returns. An error of a Python function inside the
    program is raised in its original form.
    """
    with failures():
        results = program(*args, **options)
        return jax.block_until_ready(results) if _checks.concrete(results) else results


def compiled(fn: Callable) -> Callable:
    """`eqx.filter_jit(fn)`, called through `run`."""
    program = eqx.filter_jit(fn)
    return functools.wraps(fn)(lambda *args, **options: run(program, *args, **options))
