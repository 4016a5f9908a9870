"""Figures as files: all of it or nothing."""

import contextlib
import io
import os
import uuid
from pathlib import Path
from typing import Any

_FORMATS = ("png", "pdf", "svg")


def save(figure: Any, path: str | os.PathLike, dpi: int = 160) -> Path:
    """Write a figure as `.png`, `.pdf` or `.svg`: either the whole file appears, or nothing changes.

    **Returns:** the path. **Raises:** as `target`.
    """
    path = target(path)
    folder = path.parent
    content = io.BytesIO()  # what cannot be drawn fails here, before any file exists
    figure.savefig(content, format=path.suffix.lower().removeprefix("."), dpi=dpi)
    temporary = folder / f".{path.stem}-{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(content.getbuffer())
        os.replace(temporary, path)
    except PermissionError as error:
        raise PermissionError(f"the folder {str(folder)!r} is not writable: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def target(path: str | os.PathLike) -> Path:
    """The path, if `save` could write there now: what a long computation asks before it starts.

    **Raises:** `ValueError` for a suffix other than `.png`, `.pdf` and `.svg`; `FileNotFoundError`, `NotADirectoryError`,
    `IsADirectoryError` or `PermissionError` for a place that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower().removeprefix(".") not in _FORMATS:
        raise ValueError(f"cannot write {str(path)!r}: the name must end in .png, .pdf or .svg")
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(f"the folder {str(folder)!r} does not exist: create it first")
    if not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is not a folder")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the name of a file")
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(f"the folder {str(folder)!r} is not writable: {error.strerror}") from error
    return path
