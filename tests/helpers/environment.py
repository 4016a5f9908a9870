"""The environment of processes that tests start."""

import os

# XLA compiles in a third of the time with these flags, and its programs run nearly as fast.
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
)


def quick(devices: int = 0) -> dict[str, str]:
    """`os.environ` of a process that compiles quickly, with `devices` virtual devices if there are
    to be several.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    if not devices:
        return os.environ | {"XLA_FLAGS": flags}
    flags += f" --xla_force_host_platform_device_count={devices}"
    fast = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | {"XLA_FLAGS": flags} | fast
