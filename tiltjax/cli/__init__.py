"""The command `tiltjax`: `tiltjax demo` and `tiltjax images`."""

from collections.abc import Sequence

__all__ = ["main"]


def _keep_programs() -> None:
    """Keep what the command compiles in the user's folder for caches: the next run reads it. The
    process is the command's own; a folder that the user names for JAX is used instead.
    """
    import jax
    import platformdirs

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = platformdirs.user_cache_path("tiltjax") / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 after a message about what was wrong, or 130
    when interrupted.

    **Arguments:** `arguments`, by default those of the process.
    """
    import typer

    from tiltjax.cli._commands import app

    if arguments is None:
        _keep_programs()
    try:
        typer.main.get_command(app)(arguments, prog_name="tiltjax")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
