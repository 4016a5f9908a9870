r"""Low-rank adapters (LoRA) for any Flax NNX network.

    adapters = lora.init(key, network, rank)
        A: (..., n, rank), B: (..., rank, m) for every kernel W: (..., n, m)
    tuned    = lora.merge(network, adapters, scale)     W + scale * A B

B starts at zero, so that `merge` first returns the network itself. All functions are pure: train
`adapters` through `merge`. Scale 0 is the base network and scale 1 is the tuned network. Values in
between (LoRA scaling) are the usual interpolation between the two, but `tiltjax.Annealed` is
better. `merge` returns an ordinary network without overhead. Reference: Hu et al. (arXiv
2106.09685).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tiltjax import _checks

# The two factors of each kernel, by the path of the kernel.
Adapters = dict[tuple, tuple[Array, Array]]


def init(
    key: Array,
    network: nnx.Module,
    rank: int = 4,
    *,
    only: Callable[[tuple, Array], bool] | None = None,
) -> Adapters:
    """Adapters of rank `rank` for the kernels of a network, `(A, B)` by the path of the kernel.

    Kernels are the parameters of at least two axes, and their last two axes are adapted.
    `only(path, kernel)`, if given, selects among them. A kernel `(*lead, n, m)` gets A
    `(*lead, n, rank)`, normal with variance `1 / n`, and B `(*lead, rank, m)`, zero. Both have the
    kernel's dtype, or single precision if the kernel's dtype has fewer bits, because training makes
    small updates.

    **Raises:** `ValueError` for a network without such a parameter; `TypeError` for a network that
    is not a Flax module, and for an `only` that is not a function.
    """
    _checks.instance(network, nnx.Module, "network", "adapters need the state of a Flax module")
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
            f"{type(network).__name__} has no parameter of at least two axes"
            + ("" if only is None else " that only() selects")
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
    `TypeError` for other objects than adapters and Flax modules.
    """
    _checks.instance(
        network,
        nnx.Module,
        "network",
        "use merge(network, adapters) with the network of init(key, network)",
    )
    pair = lambda factors: isinstance(factors, tuple | list) and len(factors) == 2
    if not isinstance(adapters, dict) or not all(map(pair, adapters.values())):
        raise TypeError(
            "adapters must be a dictionary from the path of each kernel to its two factors, got "
            f"{type(adapters).__name__}: use lora.init(key, network), or "
            "finetune(...).average"
        )
    if jnp.shape(scale) != ():
        raise ValueError(f"scale must be one number for all adapters, got shape {jnp.shape(scale)}")
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
