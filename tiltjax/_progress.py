"""Progress bars by tqdm: one line for each running sampler.

The compiled loop calls Python with its step index. A tick only moves a bar forward, so the order of
callbacks, repeats under rematerialization and one call per batch element under `vmap` are harmless.
Bars are off by default, because a callback costs a round trip to Python per step.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks

_INTERVAL = 0.1  # seconds between two redraws
_DELAY = 0.5  # seconds before a bar appears; a shorter run shows no bar
_running: dict[int, "_Bar"] = {}
_numbers = itertools.count()


class Ticker(eqx.Module):
    """The compiled side of a bar: call `tick(step)` after each step. If `number` is None, there is
    no bar.
    """

    number: Array | None

    def tick(self, step: Array) -> None:
        if self.number is not None:
            jax.debug.callback(_advance, self.number, step)


@contextmanager
def bar(title: str, total: int, *, enabled: bool) -> Iterator[Ticker]:
    """A bar over `total` steps for the duration of the block. `enabled=False` costs nothing."""
    if not _checks.flag(enabled, "progress"):
        yield Ticker(None)
        return
    number = next(_numbers)
    with meter(title, total) as running:
        _running[number] = running
        try:
            yield Ticker(jnp.asarray(number, jnp.int32))
            jax.effects_barrier()
            running.update(total)
        finally:
            del _running[number]


@contextmanager
def meter(title: str, total: int) -> Iterator["_Bar"]:
    """A bar for a loop in Python: call `update(done, note)` before each of `total` stages."""
    running = _Bar(title, total)
    try:
        yield running
    finally:
        running.close()


def _advance(number: Array, step: Array) -> None:
    # A program that still runs on the device may tick a bar that an error has closed. The last tick
    # may come first, because it may depend on no result, so only the end of the block completes
    # the bar.
    running = _running.get(int(number))
    done = max(int(step) + 1, 0)
    if running is not None and done < running.total:
        running.update(done)


class _Bar:
    def __init__(self, title: str, total: int):
        self.title, self.total = title, total
        self.start, self.line, self.lock = time.monotonic(), None, threading.Lock()

    def update(self, done: int, note: str = "") -> None:
        with self.lock:
            if self.line is None:
                self.line = self._line(done, note)
            else:
                self.line.n = max(self.line.n, done)
                self.line.set_postfix_str(note, refresh=False)
                self.line.update(0)

    def _line(self, done: int, note: str) -> Any:
        # The line is made at the first tick, because the time of compilation would distort the
        # estimate of the remaining time.
        from tqdm import tqdm

        return tqdm(
            desc=self.title,
            total=self.total,
            initial=done,
            postfix=note,
            unit="step",
            delay=max(0.0, self.start + _DELAY - time.monotonic()),
            mininterval=_INTERVAL,
            miniters=0,
            dynamic_ncols=True,
            disable=jax.process_index() > 0,  # all processes of a cluster run the same program
        )

    def close(self) -> None:
        if self.line is not None:
            self.line.close()
