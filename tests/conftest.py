"""The strictest configuration there is: what passes here passes anywhere.

float64 is on (single precision is asked for explicitly where it is tested), implicit rank and dtype
promotion are errors, and so are warnings (pyproject.toml).
"""

import gc
import os
import random
import tempfile
from pathlib import Path
from unittest import mock

import jax
import pytest
from helpers.environment import quick

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # what is made while tests are collected
jax.config.update(
    "jax_traceback_in_locations_limit", 0
)  # no note of where each operation was written
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

with mock.patch.dict(os.environ, quick()):
    jax.block_until_ready(jax.jit(lambda: 0)())

# Every compiled program holds a few memory mappings, of which Linux grants a process 65,530
# (vm.max_map_count): one more, and the compiler dies of a segmentation fault. The whole suite in
# two processes comes close. One file of tests adds up to 9,000.
_MAPPINGS, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")

# What one process of a run has compiled the others read, those that tests start too. A folder named
# by JAX_COMPILATION_CACHE_DIR is kept: the next run then compiles only what has changed.
_SHARED = {
    "JAX_COMPILATION_CACHE_DIR": "",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def pytest_addoption(parser):
    parser.addoption(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="in an order decided by this seed: files, and the tests of each",
    )


def pytest_report_header(config):
    seed = config.getoption("--shuffle")
    return None if seed is None else f"order: --shuffle={seed}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Whole files in a random order, and so their tests: what a module shares is made once in any
    order.
    """
    seed = config.getoption("--shuffle")
    if seed is not None:
        files = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        dice = random.Random(seed)
        order = dice.sample(list(files.values()), len(files))
        items[:] = [item for tests in order for item in dice.sample(tests, len(tests))]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Collect garbage seldom: modules, programs and traces are many objects, and all reachable."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_configure(config):
    if not os.environ.get(
        "JAX_COMPILATION_CACHE_DIR"
    ):  # the first process of a run: its workers inherit
        folder = tempfile.TemporaryDirectory(prefix="tiltjax-programs-", ignore_cleanup_errors=True)
        environment = mock.patch.dict(
            os.environ, _SHARED | {"JAX_COMPILATION_CACHE_DIR": folder.name}
        )
        environment.start()
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(environment.stop)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _optimize(node: pytest.Item | pytest.Collector) -> None:
    jax.config.update(
        "jax_disable_most_optimizations", node.get_closest_marker("optimized") is None
    )


@pytest.fixture(autouse=True, scope="module")
def _programs(request):
    """Compile quickly rather than well, but for what is marked `optimized`; forget what was
    compiled when that is much.

    Most tests compile for longer than they run. The demo runs as users run it.
    """
    _optimize(request.node)
    yield
    if _LIMIT.exists() and _MAPPINGS.read_bytes().count(b"\n") > int(_LIMIT.read_text()) * 3 // 4:
        jax.clear_caches()
        gc.collect()  # some are held by cycles, such as those of errors' tracebacks


@pytest.fixture(autouse=True)
def _program(request):
    """The same of one test, which may be marked alone."""
    _optimize(request.node)
