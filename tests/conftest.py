"""Tests run in float64. Implicit promotion of rank or dtype is an error, and so is a warning."""

import gc
import os
import random
import tempfile
from pathlib import Path

import pytest
from helpers import environment

# Most tests compile for longer than they run. A run keeps its programs in one folder, which its
# workers and the processes that tests start inherit, and which a user may name.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _FOLDER = tempfile.TemporaryDirectory(prefix="tiltjax-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _FOLDER.name
os.environ |= environment.quick()  # JAX reads it when it is imported

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)

# Linux grants a process this number of memory mappings, of which every program holds a few.
_MAPPINGS, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def pytest_addoption(parser):
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="files, and the tests of each, in random order"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("nightly") is not None:
            item.add_marker("slow")
    seed = config.getoption("--shuffle")
    if seed is not None:
        rank = lambda name: random.Random(f"{seed} {name}").random()
        items.sort(key=lambda item: (rank(item.path), rank(item.nodeid)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Collect garbage seldom: a tenth of the time goes into it otherwise."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    optimized = item.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture(autouse=True, scope="module")
def _programs():
    """Forget the compiled programs when their memory mappings come near to the limit."""
    yield
    if _LIMIT.exists() and _MAPPINGS.read_bytes().count(b"\n") > int(_LIMIT.read_text()) * 3 // 4:
        jax.clear_caches()
        gc.collect()
