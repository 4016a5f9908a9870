r"""Low-rank adapters (LoRA) in published files, added to the weights of a network:

    W + scale * (alpha / rank) B A

| function | |
|---|---|
| `merged(state_dict, adapters, scale)` | the weights with the adapters added |
| `part(adapters, name)` | the adapters of one network, of a file for several |

The factors of a convolution have its number of axes, (rank, in, height, width) and
(out, rank, 1, 1), and B A is the convolution by A and then by B.

`alpha` of a module is, in this order: the array `alpha` of the module; `lora_alpha`, or its entry
in `alpha_pattern`, in the metadata that diffusers writes into the header of the file
(`lora_adapter_metadata`); the same in `adapter_config.json`, which PEFT writes beside the file;
`ss_network_alpha` in the header; the rank, with a warning. If these settings have `use_rslora`, the
root of the rank replaces the rank.

The names may have either form, with or without the second embedder. An array is read and added to
when it is used. Adapters without a matching matrix raise an error at once. References: Hu et al.
(arXiv 2106.09685), LoRA; Kalajdzievski (arXiv 2312.03732), the root of the rank.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tiltjax import _checks
from tiltjax.pretrained.key_names import _BLOCKS, _OUTSIDE, diffusers
from tiltjax.pretrained.state_dicts import View, reader, shape_of

# The prefixes of the names of each network. They start with the names of its settings.
_PREFIXES = {
    "transformer": (
        "transformer.",
        "unet.",
        "model.diffusion_model.",
        "diffusion_model.",
        "lora_transformer_",
        "lora_unet_",
    ),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_", "lora_te3_"),
}
_FACTORS = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_linear_layer.down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
}
# The ends of names, or parts of them, of adapters of other kinds, which are not sums of B A.
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a middle factor",
}
_SHOWN = 8


def merged(state_dict: Mapping[str, Any], adapters: Mapping[str, Any], scale: float = 1.0) -> View:
    """The weights with low-rank adapters added. It warns if an alpha is not known.

    **Arguments:** `state_dict`, with the names of `FluxTransformer2DModel`, and with two embedders
    (`dual`) for the adapters of a flow map, or those of a text encoder; `adapters` of this network,
    pairs of `lora_A`, `lora_B` or `lora_down`, `lora_up` of shapes (rank, in) and (out, rank), or
    those of a convolution, with or without `alpha`, with dotted or underscored names of either
    form; `scale` of all adapters. If `adapters` come from `files.read`, the settings in the file
    and beside it are used; those of `dict(adapters)` are not.

    **Raises:** `ValueError`, with the names, for adapters of other modules or shapes, for half of a
    pair, for keys that are not adapters, and for settings of another rank.
    """
    found = parts(adapters)
    if len(found) > 1:
        numbers = ", ".join(f"{count} of the {name}" for name, count in found.items())
        raise ValueError(
            f"these adapters belong to several networks, {numbers}: pass those of one, "
            f"adapters.part(adapters, {next(iter(found))!r})"
        )
    shifts = diffusers(_shifts(adapters, state_dict))
    strange = [
        f"{name} {shift[0]}"
        for name, shift in shifts.parts.items()
        if name not in state_dict or _core(shape_of(state_dict, name)) != _core(shift[0])
    ]
    if strange:
        raise ValueError(
            f"{len(strange)} of {len(shifts)} adapters match no matrix of this network: "
            f"{', '.join(strange[:_SHOWN])}. For adapters of a flow map, add the second embedder "
            "with key_names.dual(state_dict)"
        )

    def added(key: str, *index: slice) -> np.ndarray:
        array = np.asarray(state_dict[key])
        total = array.astype(np.float32) + np.float32(scale) * shifts[key].reshape(array.shape)
        return total.astype(array.dtype)[index]

    views = {}
    for key in state_dict:
        read = partial(added, key) if key in shifts else reader(state_dict, key)
        views[key] = shape_of(state_dict, key), read
    return View(views)


def parts(adapters: Mapping[str, Any]) -> dict[str, int]:
    """The networks that the names of adapters mention, `transformer`, `text_encoder` or
    `text_encoder_2`, with the number of arrays of each. It is empty for names without prefixes.
    """
    found = [name for key in adapters if (name := _part(key)) is not None]
    return {name: found.count(name) for name in _PREFIXES if name in found}


def part(adapters: Mapping[str, Any], name: str) -> View:
    """The adapters of the network `name`: `transformer`, `text_encoder` or `text_encoder_2`. If no
    name mentions a network, all adapters.

    **Raises:** `ValueError` for another name, and if there are no such adapters.
    """
    if name not in _PREFIXES:
        raise ValueError(f"name must be one of {', '.join(_PREFIXES)}, got {name!r}")
    found = parts(adapters)
    if found and name not in found:
        raise ValueError(
            f"there are no adapters of the {name}, only of the {', the '.join(found)}: leave the "
            "adapters out here"
        )
    views = {
        key: (shape_of(adapters, key), reader(adapters, key))
        for key in adapters
        if _part(key) in (name, None)
    }
    return View(views, getattr(adapters, "metadata", {}))


def _part(key: str) -> str | None:
    """The network that the prefix of a name mentions, or `None`."""
    key = key.removeprefix("base_model.model.")
    return next((name for name, prefixes in _PREFIXES.items() if key.startswith(prefixes)), None)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array of weights without window axes of one entry at its end, so that a
    matrix and a convolution of one pixel are the same.
    """
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


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
    for part, kind in _OTHERS.items():
        if other := [key for key in strange if part in key.split(".")]:
            raise ValueError(
                f"these adapters are {kind}, as {other[0]} shows, which is not supported: merge "
                "them into the weights with the program that trained them, and load the weights"
            )
    strange += [
        keys
        for factors in found.values()
        if not {"down", "up"} <= factors.keys()
        for keys in factors.values()
    ]
    if strange:
        raise ValueError(
            f"{len(strange)} keys are not adapters, or lack the other half of their pair: "
            f"{', '.join(sorted(strange)[:_SHOWN])}; expected pairs lora_A and lora_B, or "
            "lora_down and lora_up, with or without alpha"
        )
    strengths = _strengths(adapters, found)
    views = {}
    for module, factors in found.items():
        down, up = shape_of(adapters, factors["down"]), shape_of(adapters, factors["up"])
        strength = strengths[module]

        def product(
            *index: slice, factors=factors, down=down, up=up, strength=strength
        ) -> np.ndarray:
            read = lambda factor: np.asarray(adapters[factors[factor]]).astype(np.float32)
            shift = read("up").reshape(up[:2]) @ read("down").reshape(down[0], -1)
            return (np.float32(strength) * shift).reshape(up[0], *down[1:])[index]

        views[f"{_dotted(module, flat)}.weight"] = (up[0], *down[1:]), product
    return View(views)


def _strengths(
    adapters: Mapping[str, Any], found: Mapping[str, Mapping[str, str]]
) -> dict[str, float]:
    """The factor `alpha / rank` of each module, with a warning if an alpha is not known."""
    known = _settings(getattr(adapters, "metadata", {}))
    only = next(iter(known.values())) if len(known) == 1 else {}
    strengths, assumed = {}, []
    for module, factors in found.items():
        rank = _rank(module, *(shape_of(adapters, factors[each]) for each in ("down", "up")))
        network = _part(module)
        settings = known.get(network) or known.get(None) or (only if network is None else {})
        if "alpha" in factors:
            alpha = np.asarray(adapters[factors["alpha"]]).astype(np.float64)
            if alpha.size != 1:
                raise ValueError(
                    f"{factors['alpha']} must be one number, got shape {alpha.shape}: split it "
                    "by modules"
                )
            strengths[module] = float(alpha.reshape(())) / rank
        elif "lora_alpha" in settings:
            strengths[module] = _strength(module, rank, settings)
        else:
            strengths[module] = 1.0
            assumed.append(module)
    if assumed:
        _checks.warn(
            f"{len(assumed)} of {len(found)} adapters have no alpha, neither as an array, nor in "
            "the header of a file, nor in an adapter_config.json beside it, so alpha = rank is "
            "assumed, a strength alpha / rank of 1. If they were trained with another alpha, "
            f"multiply scale by alpha / rank. The adapters: {', '.join(assumed[:2])}"
            f"{', ...' if len(assumed) > 2 else ''}"
        )
    return strengths


def _rank(module: str, down: tuple[int, ...], up: tuple[int, ...]) -> int:
    """The rank of a pair of factors of these shapes. **Raises:** `ValueError` for other shapes."""
    if min(len(down), len(up)) < 2 or any(n != 1 for n in up[2:]):
        raise ValueError(
            f"the factors of {module} must have shapes (rank, in) and (out, rank), or (rank, in, "
            f"height, width) and (out, rank, 1, 1) of a convolution, got {down} and {up}: multiply "
            "them into the weights yourself"
        )
    if down[0] != up[1]:
        raise ValueError(f"the adapters of {module} have different ranks, {down[0]} and {up[1]}")
    return down[0]


def _settings(metadata: Mapping[str, str]) -> dict[str | None, dict[str, Any]]:
    """The settings of the training of each network, under `None` those of a file for one network.
    Those in the header replace those of `adapter_config.json`.
    """
    found: dict[str | None, dict[str, Any]] = {}
    with contextlib.suppress(KeyError, ValueError):  # of kohya's scripts
        numbers = float(metadata["ss_network_alpha"]), int(metadata["ss_network_dim"])
        found[None] = dict(zip(("lora_alpha", "r"), numbers, strict=True))
    for source in ("adapter_config.json", "lora_adapter_metadata"):
        if source not in metadata:
            continue
        try:
            settings = dict(json.loads(metadata[source]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} of these adapters is no JSON dictionary: {error}") from None
        of_source: dict[str | None, dict[str, Any]] = {}
        for key, value in settings.items():
            network, _, name = key.rpartition(".")
            of_source.setdefault(_part(f"{network}."), {})[name] = value
        found |= of_source
    return found


def _strength(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """`alpha / rank` of a module by the settings of its training."""
    for option in ("use_dora", "fan_in_fan_out"):
        if settings.get(option):
            raise ValueError(
                f"the settings of these adapters have {option}, which is not supported: merge them "
                "into the weights with PEFT, and load the weights"
            )
    name = _without_prefix(module)
    of_module = lambda pattern, default: _matching(settings.get(pattern) or {}, name, default)
    expected = of_module("rank_pattern", settings.get("r"))
    if expected is not None and expected != rank:
        raise ValueError(
            f"{module} has rank {rank}, but its settings, in the header or in adapter_config.json, "
            f"have rank {expected}: to ignore these settings, pass dict(adapters) and their "
            "alpha / rank as scale"
        )
    alpha = float(of_module("alpha_pattern", settings["lora_alpha"]))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that a name, or the end of a name, matches, as in PEFT."""
    matches = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matches, default)


def _without_prefix(module: str) -> str:
    """The name of a module inside its network."""
    module = module.removeprefix("base_model.model.")
    for prefix in _PREFIXES.get(_part(module) or "", ()):
        module = module.removeprefix(prefix)
    return module


def _dotted(module: str, flat: Mapping[str, str]) -> str:
    """The dotted name of a module from a name that may have a prefix, or underscores for dots."""
    module = _without_prefix(module)
    known = set(flat.values())
    # Text encoders are published with and without this prefix.
    for name in (module, module.removeprefix("text_model."), f"text_model.{module}"):
        if name in known:
            return name
    if "." in module:
        return module
    outside = {name.replace(".", "_"): name for name in _OUTSIDE}
    for name in (module, module.removeprefix("text_model_"), f"text_model_{module}"):
        if (found := flat.get(name) or outside.get(name)) is not None:
            return found
    if match := re.fullmatch(r"(double_blocks|single_blocks)_(\d+)_(.+)", module):
        kind, i, rest = match.groups()
        rest = {name.replace(".", "_"): name for name in _BLOCKS[kind][1]}.get(rest, rest)
        return f"{kind}.{i}.{rest}"
    return module
