"""Records of every benchmark: device, versions, commit, and run times.

CPU seconds are the user and system time of this process, separately for compilation and runs. The
time of a run is the median of its repetitions.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.measures import cpu_seconds as cpu_seconds
from benchmarks.measures import peak_gb as peak_gb

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """The seconds of the first call (mostly compilation), and the medians of later calls."""

    first_wall: float
    run_wall: float
    run_cpu: float


def timed(call: Callable[[int], Any], repeats: int = 5) -> Timing:
    """The times of `call(seed)`: once for compilation, then `repeats` times with other seeds."""
    start = time.perf_counter()
    jax.block_until_ready(call(0))
    first = time.perf_counter() - start
    walls, cpus = [], []
    for seed in range(1, repeats + 1):
        wall, cpu = time.perf_counter(), cpu_seconds()
        jax.block_until_ready(call(seed))
        walls.append(time.perf_counter() - wall)
        cpus.append(cpu_seconds() - cpu)
    return Timing(first, statistics.median(walls), statistics.median(cpus))


def _commit() -> str:
    root = Path(__file__).parent.parent
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=root, capture_output=True, text=True, check=False
    )
    changed = git("diff", "--quiet", "HEAD", "--", "tiltjax", "theory").returncode != 0
    return (git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown") + (
        " with changes" if changed else ""
    )


# The commit of the imported code, even if the checkout changes during a long run.
COMMIT = _commit()


def environment() -> dict[str, Any]:
    """The device, the versions and the commit."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": device.platform,
        "processor": processor(),
        "cores": _cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": COMMIT,
    }


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plug_in_calls(steps: int, k: int) -> int:
    """The denoiser calls, and the equal number of pullbacks, of one evaluation of plug-in with k
    GLASS draws of `steps` steps. All draws share their first call with the guidance.
    """
    return 1 + k * (steps - 1)


def write(name: str, results: dict[str, Any]) -> Path:
    """Write `results` with the environment as `results/<name>.json`, and print its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
    print(f"\nwritten: {path}")
    return path
