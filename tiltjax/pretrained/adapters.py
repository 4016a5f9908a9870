r"""Low-rank adapters (LoRA) in published files, added to the weights of a network:

    W + scale * (alpha / rank) B A

The names may have either form, with or without the second embedder. An array is read and added to
when it is used. Adapters without a matching matrix raise an error at once. Reference: Hu et al.
(arXiv 2106.09685), LoRA.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tiltjax.pretrained.key_names import _BLOCKS, _OUTSIDE, diffusers
from tiltjax.pretrained.state_dicts import View, reader, shape_of

_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
)
_FACTORS = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
}


def merged(state_dict: Mapping[str, Any], adapters: Mapping[str, Any], scale: float = 1.0) -> View:
    """The weights with low-rank adapters added.

    **Arguments:** `state_dict`, with the names of `FluxTransformer2DModel`, and with two embedders
    (`dual`) for the adapters of a flow map; `adapters`, pairs of `lora_A`, `lora_B` or `lora_down`,
    `lora_up` of shapes (rank, in) and (out, rank), with or without `alpha`, with dotted or
    underscored names of either form; `scale` of all adapters.

    **Raises:** `ValueError`, with the names, for adapters of other modules or shapes, for half of a
    pair, and for keys that are not adapters.
    """
    shifts = diffusers(_shifts(adapters, state_dict))
    strange = [
        f"{name} {shift[0]}"
        for name, shift in shifts.parts.items()
        if name not in state_dict or shape_of(state_dict, name) != shift[0]
    ]
    if strange:
        raise ValueError(
            f"{len(strange)} of {len(shifts)} adapters match no matrix of this network: "
            f"{', '.join(strange[:8])}. For adapters of a flow map, add the second embedder with "
            "key_names.dual(state_dict)"
        )

    def added(key: str, *index: slice) -> np.ndarray:
        array = np.asarray(state_dict[key])
        total = array.astype(np.float32) + np.float32(scale) * shifts[key]
        return total.astype(array.dtype)[index]

    parts = {}
    for key in state_dict:
        read = partial(added, key) if key in shifts else reader(state_dict, key)
        parts[key] = shape_of(state_dict, key), read
    return View(parts)


def _shifts(adapters: Mapping[str, Any], state_dict: Mapping[str, Any]) -> View:
    """`(alpha / rank) B A` under the names of the adapted weights, in the form of the adapters'
    names.
    """
    flat = {key.rpartition(".")[0].replace(".", "_"): key.rpartition(".")[0] for key in state_dict}
    found: dict[str, dict[str, str]] = {}
    strange = []
    for key in adapters:
        suffix = next((suffix for suffix in _FACTORS if key.endswith(f".{suffix}")), None)
        if suffix is None:
            strange.append(key)
        else:
            found.setdefault(key.removesuffix(f".{suffix}"), {})[_FACTORS[suffix]] = key
    strange += [
        keys
        for factors in found.values()
        if not {"down", "up"} <= factors.keys()
        for keys in factors.values()
    ]
    if strange:
        raise ValueError(
            f"{len(strange)} keys are not adapters, or lack the other half of their pair: "
            f"{', '.join(sorted(strange)[:8])}; expected pairs lora_A and lora_B, or lora_down and "
            "lora_up, with or without alpha"
        )
    parts = {}
    for module, factors in found.items():
        rank, n = shape_of(adapters, factors["down"])
        m, other = shape_of(adapters, factors["up"])
        if rank != other:
            raise ValueError(f"the adapters of {module} have different ranks, {rank} and {other}")

        def product(*index: slice, factors=factors, rank=rank) -> np.ndarray:
            read = lambda factor: np.asarray(adapters[factors[factor]]).astype(np.float32)
            alpha = float(read("alpha")) if "alpha" in factors else rank
            return (alpha / rank * (read("up") @ read("down")))[index]

        parts[f"{_dotted(module, flat)}.weight"] = (m, n), product
    return View(parts)


def _dotted(module: str, flat: Mapping[str, str]) -> str:
    """The dotted name of a module from a name that may have a prefix, or underscores for dots."""
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    if "." in module or module in flat.values():
        return module
    outside = {name.replace(".", "_"): name for name in _OUTSIDE}
    if (known := flat.get(module) or outside.get(module)) is not None:
        return known
    if match := re.fullmatch(r"(double_blocks|single_blocks)_(\d+)_(.+)", module):
        kind, i, rest = match.groups()
        rest = {name.replace(".", "_"): name for name in _BLOCKS[kind][1]}.get(rest, rest)
        return f"{kind}.{i}.{rest}"
    return module
