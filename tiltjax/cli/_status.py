"""What a command does now, and for how long it has run, on the standard error stream.

In a terminal this is one line, whose clock moves. Elsewhere, as in a log file, each phase prints
one line when it begins.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Status(Protocol):
    """Says what the command does from now on."""

    def __call__(self, phase: str) -> None: ...


@contextmanager
def status(*, quiet: bool = False) -> Iterator[Status]:
    """A `Status` for the duration of the block. `quiet` shows nothing."""
    start = time.monotonic()
    if quiet:
        yield lambda phase: None
    elif not sys.stderr.isatty():
        yield lambda phase: print(
            f"{time.monotonic() - start:6.1f} s  {phase}", file=sys.stderr, flush=True
        )
    else:
        from rich import console, progress

        columns = (
            progress.SpinnerColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.description}"),
        )
        # Output that goes to a file or a pipe must not be redirected to the terminal.
        with progress.Progress(
            *columns,
            console=console.Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        ) as line:
            task = line.add_task("starting", total=None)
            yield lambda phase: line.update(task, description=phase)
