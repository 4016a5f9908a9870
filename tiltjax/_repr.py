"""How objects print: as the call that makes them, or as a title with a few rows.

    PlugIn(Exact(Analytic(GaussianMixture of 2 in R^2)), Quadratic([0, 2.5]), scale=3, k=1)

    Particles: 2048 of shape (2,), float32
    effective sample size  1534 (75%)
    log Z                  -1.204

`Printable` is the base class of the first kind, `Report` of the second. NumPy reads the arrays, so
that nothing is compiled. An array that cannot be read, as inside `jit`, prints as its dtype and
shape.
"""

import dataclasses
import html
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

_WIDTH = 300  # characters of a line
_ITEMS = 6  # entries of a vector or of a list that are printed in full
_MATRIX = 9  # entries of a matrix that is printed


class Printable(eqx.Module):
    """A module that prints as the call that makes it.

    Subclasses may define `_call(**given)`, the text of the object as an argument of another call,
    and `_text()`, what `repr` returns, by default the same. An optional argument is left out if it
    has its default, or prints as `_chosen` says, which is what the constructor takes for `None`.
    The names in `_always` are never left out.
    """

    _chosen: ClassVar[Mapping[str, str]] = {}
    _always: ClassVar[tuple[str, ...]] = ()

    def _call(self, **given: Any) -> str:
        return call(self, **given)

    def _text(self) -> str:
        return self._call()

    def __repr__(self) -> str:
        # Leaves may be anything: JAX itself builds modules of booleans and of `object()`.
        try:
            return "\n".join(map(_shorten, self._text().splitlines()))
        except Exception:
            return f"{type(self).__name__}(...)"


class Report(Printable):
    """A module that prints as a title and rows, in a notebook as a table. Subclasses define
    `_title()` and `_rows()`.
    """

    def _title(self) -> str:
        raise NotImplementedError

    def _rows(self) -> dict[str, str]:
        raise NotImplementedError

    def _call(self, **given: Any) -> str:
        return self._title()

    def _text(self) -> str:
        rows = self._rows()
        width = max(map(len, rows), default=0)
        return "\n".join([self._title(), *(f"{name:{width}}  {rows[name]}" for name in rows)])

    def _repr_html_(self) -> str:
        try:
            return table(self._title(), self._rows().items())
        except Exception:
            return html.escape(repr(self))


def call(noun: Any, maker: Callable | None = None, **given: Any) -> str:
    """`Name(noun, [1, 2], k=3)`: the call of the constructor, or of the function `maker`.

    The arguments are the fields of `noun` with the names of the parameters, and `given`; what is
    `None` is left out. Scalars and optional arguments are printed with their names.
    """
    values = {field.name: getattr(noun, field.name) for field in dataclasses.fields(noun)} | given
    parameters = inspect.signature(maker or type(noun).__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    arguments, named = [], False
    for name in dict.fromkeys([*parameters, *given]):
        if (value := values.get(name)) is None:
            continue
        text, default = form(value), defaults.get(name)
        required = default is inspect.Parameter.empty
        usual = not required and text == noun._chosen.get(name, form(default))
        if usual and name not in noun._always:
            continue
        scalar = isinstance(value, int | float) or getattr(value, "shape", None) == ()
        named = named or scalar or not required
        arguments.append(f"{name}={text}" if named else text)
    return f"{(maker or type(noun)).__name__}({', '.join(arguments)})"


def form(value: Any) -> str:
    """The text of an argument."""
    if isinstance(value, Printable):
        return value._call()
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, int | str | None):
        return repr(value)
    if isinstance(value, tuple | list):
        items = [form(item) for item in value]
        if len(items) > _ITEMS:
            items[2:-2] = ["..."]
        return f"({', '.join(items)})" if isinstance(value, tuple) else f"[{', '.join(items)}]"
    return getattr(value, "__name__", None) or network(type(value).__name__, value)


def network(name: str, tree: Any) -> str:
    """`name` with the number of floating numbers in a tree, such as "Velocity of 7.1 M
    parameters".
    """
    floating = lambda leaf: jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating)
    number = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree) if floating(leaf))
    return sized(name, number)


def sized(name: str, number: int) -> str:
    """`name` with a number of parameters, if there are any."""
    return f"{name} of {_count(number)} parameter{'s' * (number != 1)}" if number else name


def read(array: Any) -> np.ndarray | None:
    """The numbers of an array, in a dtype of NumPy's own; `None` if they cannot be read here."""
    unreadable = (
        array is None
        or isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct)
        or jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        or (isinstance(array, jax.Array) and (array.is_deleted() or not array.is_fully_addressable))
    )
    if unreadable:
        return None
    numbers = np.asarray(array)
    narrow = jnp.issubdtype(numbers.dtype, jnp.floating) and numbers.dtype.kind != "f"
    return numbers.astype(np.float32) if narrow else numbers


def span(array: Any, spec: str = ".4g") -> str:
    """An array as "low to high", or as its only value."""
    numbers = read(array)
    if numbers is None or not numbers.size:
        return _array(array)
    low, high = format(numbers.min(), spec), format(numbers.max(), spec)
    return low if low == high else f"{low} to {high}"


def table(title: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table for notebooks, in the colors of its page."""
    cell = lambda tag, text: f'<{tag} style="text-align: left">{html.escape(text)}</{tag}>'
    line = lambda row, *tags: "<tr>" + "".join(map(cell, tags, row)) + "</tr>"
    body = [line(row, "th", *["td"] * (len(row) - 1)) for row in rows]
    first = [line(head, *["th"] * len(head))] if head else []
    caption = f'<caption style="text-align: left">{html.escape(title)}</caption>'
    return f"<table>{caption}{''.join(first + body)}</table>"


def _array(array: Any) -> str:
    numbers = read(array)
    if numbers is None or numbers.ndim > 2 or (numbers.ndim == 2 and numbers.size > _MATRIX):
        return f"{array.dtype}[{','.join(map(str, array.shape))}]"
    formatter: Any = {"float_kind": "{:.4g}".format}
    summary = np.array2string(
        numbers, separator=", ", threshold=_ITEMS, edgeitems=2, formatter=formatter
    )
    return " ".join(summary.split())


def _count(number: float) -> str:
    """A number with one decimal and its unit."""
    thousands = 0
    while number >= 999.95 and thousands < 3:
        number, thousands = number / 1000, thousands + 1
    return f"{number:.1f}".removesuffix(".0") + ("", " k", " M", " B")[thousands]


def _shorten(line: str) -> str:
    """A long line without its middle."""
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 60]} ... {line[-55:]}"
