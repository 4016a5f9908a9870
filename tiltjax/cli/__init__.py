"""The command `tiltjax`: `tiltjax demo` and `tiltjax images`."""

from collections.abc import Sequence

__all__ = ["main"]


def _keep_programs() -> None:
    """Keep compiled programs in the user's cache folder, where the next run finds them. The process
    belongs to the command, so its settings may change. A folder that the user has named for JAX is
    used instead.
    """
    import jax
    import platformdirs

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = platformdirs.user_cache_path("tiltjax") / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status: 0 after success, 2 after an error message, 130
    after an interruption.

    **Arguments:** `arguments` of the command, by default those of the process.
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
