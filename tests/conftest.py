"""The strictest configuration there is: what passes here passes anywhere.

float64 is on (single precision is asked for explicitly where it is tested), implicit rank and dtype promotion are
errors, and so are warnings (pyproject.toml).
"""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Every compiled program holds a few memory mappings, of which Linux grants a process 65,530 (vm.max_map_count): one more, and the
# compiler dies of a segmentation fault. The whole suite in two processes comes close.
_MAPPINGS = Path("/proc/self/maps")
_MANY = 30_000


@pytest.fixture(autouse=True, scope="module")
def _programs(request):
    """Compile quickly rather than well, but for modules that say `OPTIMISED = True`; forget what was compiled when that is much.

    Most tests compile for longer than they run. The demo and the snippet of README run as users run them.
    """
    quickly = not getattr(request.module, "OPTIMISED", False)
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()
