"""The samples at which a reward was evaluated, in memory and in a file."""

import os
import threading
import time
from pathlib import Path

import numpy as np

from tiltjax import _checks


class Record:
    """Every sample at which a reward was evaluated, with its value, in the order of evaluation.

    The record has `.x`, `(n, *shape)`; `.values`, `(n,)`; `.calls`, the number of calls of the
    function; and the length n.

    **Arguments:** `path` of an `.npz` file for `x` and `values`. The file is written when the
    reward fails, after a call if `every` seconds have passed since the last time, and by `save()`.

    **Raises:** `ValueError` for a path that is not an `.npz` file, and for `save()` without a path.
    """

    def __init__(self, path: str | os.PathLike | None = None, every: float = 60.0):
        self.path = None if path is None else Path(_checks.file_name(path, "path"))
        if self.path is not None and self.path.suffix != ".npz":
            raise ValueError(f"path: a record must be an .npz file, got {str(self.path)!r}")
        self.every, self.calls = float(_checks.nonnegative(every, "every")), 0
        self._x: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._lock, self._saved = threading.RLock(), time.monotonic()

    def __len__(self) -> int:
        return sum(map(len, self._values))

    @property
    def x(self) -> np.ndarray:
        """The samples, `(n, *shape)`."""
        with self._lock:
            return np.concatenate(self._x) if self._x else np.zeros(0)

    @property
    def values(self) -> np.ndarray:
        """The rewards of the samples, `(n,)`."""
        with self._lock:
            return np.concatenate(self._values) if self._values else np.zeros(0)

    def add(self, x: np.ndarray, values: np.ndarray) -> None:
        """Store the samples and values of one call."""
        with self._lock:
            self._x.append(x)
            self._values.append(values)
            self.calls += 1
            if self.path is not None and time.monotonic() - self._saved >= self.every:
                self.save()

    def save(self) -> None:
        """Write the file, completely or not at all. **Raises:** `ValueError` without a path."""
        if self.path is None:
            raise ValueError("this record has no path: use Record('queries.npz')")
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial.npz")
            np.savez(partial, x=self.x, values=self.values)
            os.replace(partial, self.path)
            self._saved = time.monotonic()
