"""The environment of the tests' own process and of those that they start."""

import os

# XLA compiles in a third of the time with these flags, and its programs run nearly as fast.
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
)

# What one process of a run has compiled the others read.
SHARED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}


def quick(devices: int = 0) -> dict[str, str]:
    """`os.environ` of a process that compiles quickly, with `devices` virtual devices if not 0."""
    if not devices:
        return os.environ | SHARED | {"XLA_FLAGS": FLAGS}
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    platform = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | SHARED | {"XLA_FLAGS": flags} | platform
