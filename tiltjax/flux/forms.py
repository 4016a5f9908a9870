r"""The forms in which weights of the FLUX.1 transformer are published, made into the one that its module is named after.

| function | |
|---|---|
| `diffusers(state_dict)` | the single-file form: queries, keys, values (and the feed-forward layer) in one matrix, the last modulation as (shift, scale) |
| `dual(state_dict)` | a network of one time as one of two, both embedders the same: where a flow map starts |
| `merged(state_dict, adapters, scale)` | `W + scale * (alpha / rank) B A` for low-rank adapters (LoRA), in either form, with the second embedder |

All are views: an array is read, cut and added to when it is asked for. What is not known keeps its name, and is an unused key where the module is
built. Adapters that find no matrix are errors at once. Reference: Hu et al. (arXiv 2106.09685), LoRA.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tiltjax.flux.weights import View, shape_of

_EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    **{
        f"{theirs}.{layer}": f"time_text_embed.{ours}.{linear}"
        for theirs, ours in _EMBEDDERS.items()
        for layer, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_DOUBLE: dict[str, Any] = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE: dict[str, Any] = {
    "modulation.lin": "norm.linear",
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_BLOCKS = {"double_blocks": ("transformer_blocks", _DOUBLE), "single_blocks": ("single_transformer_blocks", _SINGLE)}
_LEAVES = {"weight": "weight", "bias": "bias", "scale": "weight"}
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


def diffusers(state_dict: Mapping[str, Any]) -> View:
    """The weights under the names of `FluxTransformer2DModel`, whichever of both forms they have."""
    parts = {}
    for key in state_dict:
        name = key.removeprefix("model.diffusion_model.")
        module, _, leaf = name.rpartition(".")
        targets = _targets(module)
        read, shape = _reader(state_dict, key), shape_of(state_dict, key)
        if targets is None or leaf not in _LEAVES:
            parts[name] = shape, read
        elif targets == ("norm_out.linear",):
            parts[f"norm_out.linear.{leaf}"] = shape, lambda read=read: np.concatenate(np.split(read(), 2)[::-1])
        else:
            # Queries, keys and values are of one size; what is left after them is the feed-forward layer's, four times that.
            unit = shape[0] // (7 if len(targets) == 4 else len(targets))
            for i, target in enumerate(targets):
                rows = slice(i * unit, (i + 1) * unit if i < 3 and i + 1 < len(targets) else shape[0])
                cut = (len(range(*rows.indices(shape[0]))), *shape[1:])
                parts[f"{target}.{_LEAVES[leaf]}"] = cut, lambda read=read, rows=rows: read()[rows]
    return View(parts)


def renamed(state_dict: Mapping[str, Any], rename: Callable[[str], str]) -> View:
    """The arrays under other names."""
    return View({rename(key): (shape_of(state_dict, key), _reader(state_dict, key)) for key in state_dict})


def dual(state_dict: Mapping[str, Any]) -> View:
    """The weights of a network of one time, with its embedders twice."""
    parts, prefix = {}, "time_text_embed."
    for key in state_dict:
        rest = key.removeprefix(prefix)
        names = [f"{prefix}{which}_embedder.{rest}" for which in ("original", "second")] if key != rest else [key]
        parts |= dict.fromkeys(names, (shape_of(state_dict, key), _reader(state_dict, key)))
    return View(parts)


def is_dual(adapters: Mapping[str, Any]) -> bool:
    """Whether adapters are those of a flow map, which add to the second embedder of a network of two times."""
    return any("second_embedder" in key for key in adapters)


def merged(state_dict: Mapping[str, Any], adapters: Mapping[str, Any], scale: float = 1.0) -> View:
    """The weights with low-rank adapters added.

    **Arguments:** `state_dict`, under the names of `FluxTransformer2DModel`, with two embedders (`dual`) for those of a flow map; `adapters`, pairs of
    `lora_A`, `lora_B` or `lora_down`, `lora_up` of (out, rank) and (rank, in), with or without `alpha`, by dotted or underscored names of either
    form; `scale`, of all of them.

    **Raises:** `ValueError`, with the names, for adapters of other modules or shapes, without their other half, or of another kind.
    """
    shifts = diffusers(_shifts(adapters, state_dict))
    strange = [
        f"{name} {shift[0]}"
        for name, shift in shifts.parts.items()
        if name not in state_dict or shape_of(state_dict, name) != shift[0]
    ]
    if strange:
        raise ValueError(
            f"{len(strange)} of {len(shifts)} adapters fit no matrix of this network: {', '.join(strange[:8])}. Adapters of a flow map need "
            "the second embedder, forms.dual(state_dict)"
        )

    def added(key: str) -> np.ndarray:
        array = np.asarray(state_dict[key])
        return (array.astype(np.float32) + np.float32(scale) * shifts[key]).astype(array.dtype)

    parts = {}
    for key in state_dict:
        parts[key] = (
            shape_of(state_dict, key),
            (lambda key=key: added(key)) if key in shifts else _reader(state_dict, key),
        )
    return View(parts)


def _shifts(adapters: Mapping[str, Any], state_dict: Mapping[str, Any]) -> View:
    """`(alpha / rank) B A` under the names of the weights that they are added to, in the form that the adapters are in."""
    flat = {key.rpartition(".")[0].replace(".", "_"): key.rpartition(".")[0] for key in state_dict}
    found: dict[str, dict[str, str]] = {}
    strange = []
    for key in adapters:
        suffix = next((suffix for suffix in _FACTORS if key.endswith(f".{suffix}")), None)
        if suffix is None:
            strange.append(key)
        else:
            found.setdefault(key.removesuffix(f".{suffix}"), {})[_FACTORS[suffix]] = key
    strange += [keys for factors in found.values() if not {"down", "up"} <= factors.keys() for keys in factors.values()]
    if strange:
        raise ValueError(
            f"{len(strange)} keys are no adapters, or lack their other half: {', '.join(sorted(strange)[:8])}; expected pairs lora_A and "
            "lora_B, or lora_down and lora_up, with or without alpha"
        )
    parts = {}
    for module, factors in found.items():
        (rank, n), (m, other) = shape_of(adapters, factors["down"]), shape_of(adapters, factors["up"])
        if rank != other:
            raise ValueError(f"the adapters of {module} have ranks {rank} and {other}")

        def shift(factors=factors, rank=rank) -> np.ndarray:
            down, up = (np.asarray(adapters[factors[each]]).astype(np.float32) for each in ("down", "up"))
            alpha = float(np.asarray(adapters[factors["alpha"]]).astype(np.float32)) if "alpha" in factors else rank
            return alpha / rank * (up @ down)

        parts[f"{_dotted(module, flat)}.weight"] = (m, n), shift
    return View(parts)


def _dotted(module: str, flat: Mapping[str, str]) -> str:
    """The dotted name of a module from one that may be prefixed, and may have underscores for dots."""
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    if "." in module or module in flat.values():
        return module
    if (known := flat.get(module) or {name.replace(".", "_"): name for name in _OUTSIDE}.get(module)) is not None:
        return known
    if match := re.fullmatch(r"(double_blocks|single_blocks)_(\d+)_(.+)", module):
        kind, i, rest = match.groups()
        rest = {name.replace(".", "_"): name for name in _BLOCKS[kind][1]}.get(rest, rest)
        return f"{kind}.{i}.{rest}"
    return module


def _targets(module: str) -> tuple[str, ...] | None:
    """The modules of `FluxTransformer2DModel` that one of the single-file form holds, in its order; None for one of another form."""
    if module in _OUTSIDE:
        return (_OUTSIDE[module],)
    kind, _, rest = module.partition(".")
    i, _, rest = rest.partition(".")
    if kind not in _BLOCKS or rest not in _BLOCKS[kind][1]:
        return None
    blocks, table = _BLOCKS[kind]
    targets = table[rest] if isinstance(table[rest], tuple) else (table[rest],)
    return tuple(f"{blocks}.{i}.{target}" for target in targets)


def _reader(state_dict: Mapping[str, Any], key: str) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(state_dict[key])
