r"""Low-rank adapters (LoRA) for any Flax NNX network, as a transformation of its weights.

    adapters = lora.init(key, network, rank)
        A: (..., n, rank), B: (..., rank, m) for every kernel W: (..., n, m)
    tuned    = lora.merge(network, adapters, scale)     W + scale * A B

B starts at zero, so that `merge` starts at the network itself. Everything is a pure function: train
`adapters` through `merge`; scale 0 is the base network, 1 the tuned one, anything between is LoRA
scaling, the usual way from one to the other (`tiltjax.Annealed` is the better one), and what
`merge` returns is an ordinary network without overhead. Reference: Hu et al. (arXiv 2106.09685).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tiltjax import _checks

# By the path of a kernel: its two factors.
Adapters = dict[tuple, tuple[Array, Array]]


def init(
    key: Array,
    network: nnx.Module,
    rank: int = 4,
    *,
    only: Callable[[tuple, Array], bool] | None = None,
) -> Adapters:
    """Adapters of rank `rank` for the kernels of a network: parameters of two axes or more, of
    which the last two are adapted.

    `only(path, kernel)`, if given, chooses among them. A `(*lead, n, rank)`, B `(*lead, rank, m)`
    for a kernel `(*lead, n, m)`. A is normal with variance `1 / n`, B is zero; both in the kernel's
    dtype, but in single precision where that has fewer bits: what is trained has to keep small
    updates.

    **Raises:** `ValueError` for a network without such a parameter, `TypeError` for what is no Flax
    module, or no function.
    """
    _checks.instance(
        network, nnx.Module, "network", "adapters are found in the state of Flax modules"
    )
    rank = _checks.count(rank, "rank")
    if only is not None:
        _checks.function(only, "only")
    kernels = {
        path: kernel
        for path, kernel in _parameters(network).items()
        if kernel.ndim >= 2
        and jnp.issubdtype(kernel.dtype, jnp.floating)
        and (only is None or only(path, kernel))
    }
    if not kernels:
        raise ValueError(
            f"{type(network).__name__} has no parameter of two axes or more to adapt"
            + ("" if only is None else " that only() chose")
        )
    keys = jax.random.split(_checks.key(key), len(kernels))
    adapters = {}
    for one, (path, kernel) in zip(keys, kernels.items(), strict=True):
        *lead, n, m = kernel.shape
        dtype = _wider(kernel.dtype, jnp.dtype(jnp.float32))
        a = jax.random.normal(one, (*lead, n, rank), dtype) / jnp.sqrt(jnp.asarray(n, dtype))
        adapters[path] = a, jnp.zeros((*lead, rank, m), dtype)
    return adapters


def merge(network: Any, adapters: Adapters, scale: float | Array = 1.0) -> Any:
    """A copy of the network with `W + scale * A B`, in W's dtype, for every adapted kernel;
    differentiable in the adapters and the scale.

    **Raises:** `ValueError` for adapters of another network, and a scale that is not one number;
    `TypeError` for what are no adapters, or no Flax module.
    """
    _checks.instance(
        network,
        nnx.Module,
        "network",
        "merge(network, adapters), the network that init made them for",
    )
    pair = lambda factors: isinstance(factors, tuple | list) and len(factors) == 2
    if not isinstance(adapters, dict) or not all(map(pair, adapters.values())):
        raise TypeError(
            "adapters must be the two factors of each kernel by its path, got "
            f"{type(adapters).__name__}: lora.init(key, network) makes them, "
            "and finetune(...).average is them again"
        )
    if jnp.shape(scale) != ():
        raise ValueError(f"scale is one number for all adapters, got shape {jnp.shape(scale)}")
    graph, state = nnx.split(network)
    flat = dict(nnx.to_flat_state(state))
    for path, (a, b) in adapters.items():
        kernel = flat.get(path)
        product = (*a.shape[:-1], b.shape[-1])
        if kernel is None or kernel.shape != product:
            where = "/".join(map(str, path))
            found = "is missing" if kernel is None else f"has shape {kernel.shape}, not {product}"
            raise ValueError(
                f"these adapters belong to another network: {where} {found} in "
                f"{type(network).__name__}"
            )
        shift, base = jnp.asarray(scale, a.dtype) * (a @ b), kernel.get_value()
        wide = _wider(base.dtype, shift.dtype)
        flat[path] = kernel.replace((base.astype(wide) + shift.astype(wide)).astype(base.dtype))
    return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))


def _wider(a: jnp.dtype, b: jnp.dtype) -> jnp.dtype:
    return max(a, b, key=lambda dtype: jnp.finfo(dtype).bits)


def _parameters(network: nnx.Module) -> dict[tuple, Array]:
    return {
        path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))
    }
