"""Compiled programs that call Python functions: an error of such a function is raised as itself."""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax

from tiltjax import _checks

_errors: collections.deque[BaseException] = collections.deque(maxlen=8)  # the latest last


def remember(error: BaseException) -> None:
    """Keep an error that a Python function raises inside of a program."""
    _errors.append(error)


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """`with failures(): ...` or `@failures()`: an error of an external reward in a compiled program
    is raised as itself.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX raises either
        for cause in reversed(_errors):
            name, text = type(cause).__name__, str(cause)
            if (f"{name}: {text}" if text else name) in str(error):
                _errors.remove(cause)
                raise cause from None
        raise


def run(program: Callable, *args: Any) -> Any:
    """`program(*args)`, whose results are there when it returns; what a Python function inside of
    it raises is raised as itself.
    """
    with failures():
        results = program(*args)
        return jax.block_until_ready(results) if _checks.concrete(results) else results


def compiled(fn: Callable) -> Callable:
    """`eqx.filter_jit(fn)`, called by `run`."""
    program = eqx.filter_jit(fn)
    return functools.wraps(fn)(lambda *args: run(program, *args))
