"""One throttled progress bar for one scan.

The compiled loop calls back to the host with its step index; the host keeps one line per running
verb. A tick only ever moves a bar forward, so the order of callbacks, repeats under
rematerialization and one call per batch element under `vmap` do no harm. Off by default: a callback
costs a host round trip per step.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks

_WIDTH = 24
_INTERVAL = 0.1  # seconds between two redraws
_DELAY = 0.5  # seconds before a bar appears: what is over by then needs none
_running: dict[int, "_Bar"] = {}
_numbers = itertools.count()


class Ticker(eqx.Module):
    """The compiled side of a bar: `tick(step)` after each step. Without a number it does nothing."""

    number: Array | None

    def tick(self, step: Array) -> None:
        if self.number is not None:
            jax.debug.callback(_advance, self.number, step)


@contextmanager
def bar(title: str, total: int, *, enabled: bool) -> Iterator[Ticker]:
    """A bar over `total` steps for the duration of the block; `enabled=False` costs nothing."""
    if not _checks.flag(enabled, "progress"):
        yield Ticker(None)
        return
    number = next(_numbers)
    _running[number] = _Bar(title, total)
    try:
        yield Ticker(jnp.asarray(number, jnp.int32))
        jax.effects_barrier()
        _running[number].draw(final=True)
    finally:
        _running.pop(number).close()


@contextmanager
def meter(title: str, total: int) -> Iterator["_Bar"]:
    """A bar for a loop on the host: `update(done, note)` before each of `total` stages."""
    running = _Bar(title, total)
    try:
        yield running
        running.draw(final=True)
    finally:
        running.close()


def _advance(number: Array, step: Array) -> None:
    # A bar that was closed by an error may still be ticked by what is left running on the device.
    if (running := _running.get(int(number))) is not None:
        running.update(int(step) + 1)


class _Bar:
    def __init__(self, title: str, total: int):
        self.title, self.total, self.done, self.note, self.shown = title, total, 0, "", False
        self.start = self.last = time.monotonic()
        self.first: tuple[float, int] | None = None  # compilation is over with the first tick

    def update(self, done: int, note: str = "") -> None:
        self.done, self.note = max(self.done, done), note
        now = time.monotonic()
        self.first = self.first or (now, done)
        if now - self.start > _DELAY and now - self.last > _INTERVAL:
            self.last = now
            self.draw()

    def draw(self, final: bool = False) -> None:
        # Of several hosts, which all run the same program, the first one shows it.
        if (final and not self.shown) or jax.process_index() > 0:
            return
        now = time.monotonic()
        filled = _WIDTH * self.done // self.total
        line = f"{self.title} |{'█' * filled}{'·' * (_WIDTH - filled)}| {self.done}/{self.total}, {now - self.start:.1f} s"
        since, done = self.first or (now, self.done)
        if not final and self.done > done:
            line += f", {(now - since) / (self.done - done) * (self.total - self.done):.0f} s left"
        sys.stderr.write(f"\r\x1b[K{line}{self.note and f', {self.note}'}")
        sys.stderr.flush()
        self.shown = True

    def close(self) -> None:
        if self.shown:
            sys.stderr.write("\n")
            sys.stderr.flush()
