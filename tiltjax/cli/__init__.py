"""The command `tiltjax`: `tiltjax demo` and `tiltjax images`."""

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 after a message about what was wrong, or 130
    when interrupted.

    **Arguments:** `arguments`, by default those of the process.
    """
    import typer

    from tiltjax.cli._commands import app

    try:
        typer.main.get_command(app)(arguments, prog_name="tiltjax")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
