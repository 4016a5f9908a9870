"""The CPU seconds and the peak memory of a process. This module does not use JAX or git, so that
any process can import it.
"""

import resource
from pathlib import Path


def cpu_seconds() -> float:
    """User and system seconds of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_gb() -> float:
    """The largest resident memory of this process in GB. If possible it is read for this program
    alone (`ru_maxrss` includes the process that started it).
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return float(lines["VmHWM"].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
