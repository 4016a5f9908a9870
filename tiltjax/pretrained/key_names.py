r"""Key names of published FLUX.1 transformers, converted to the names of our module.

| function | |
|---|---|
| `diffusers(state_dict)` | from the single-file form |
| `dual(state_dict)` | from one time to two, with equal embedders: the start of a flow map |

The single-file form has queries, keys, values (and the feed-forward layer) in one matrix, and the
last modulation as (shift, scale).

All results are views: an array is read and cut when it is used. An unknown key keeps its name, and
is reported as unused when the module is built.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tiltjax.pretrained.state_dicts import View, reader, shape_of

_EMBEDDERS = {
    "time_in": "timestep_embedder",
    "guidance_in": "guidance_embedder",
    "vector_in": "text_embedder",
}
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
_BLOCKS = {
    "double_blocks": ("transformer_blocks", _DOUBLE),
    "single_blocks": ("single_transformer_blocks", _SINGLE),
}
_LEAVES = {"weight": "weight", "bias": "bias", "scale": "weight"}


def diffusers(state_dict: Mapping[str, Any]) -> View:
    """The weights, from either form, under the names of `FluxTransformer2DModel`."""
    parts = {}
    for key in state_dict:
        name = key.removeprefix("model.diffusion_model.")
        module, _, leaf = name.rpartition(".")
        targets = _targets(module)
        read, shape = reader(state_dict, key), shape_of(state_dict, key)
        if targets is None or leaf not in _LEAVES:
            parts[name] = shape, read
        elif targets == ("norm_out.linear",):
            parts[f"norm_out.linear.{leaf}"] = (
                shape,
                lambda *index, read=read: np.concatenate(np.split(read(), 2)[::-1])[index],
            )
        else:
            # Queries, keys and values have the same size. The remaining rows are those of the
            # feed-forward layer, four times that size.
            unit = shape[0] // (7 if len(targets) == 4 else len(targets))
            for i, target in enumerate(targets):
                rows = slice(
                    i * unit, (i + 1) * unit if i < 3 and i + 1 < len(targets) else shape[0]
                )
                cut = (len(range(*rows.indices(shape[0]))), *shape[1:])
                parts[f"{target}.{_LEAVES[leaf]}"] = (
                    cut,
                    lambda *index, read=read, rows=rows: read(rows)[index],
                )
    return View(parts)


def renamed(state_dict: Mapping[str, Any], rename: Callable[[str], str]) -> View:
    """The arrays under other names."""
    return View(
        {rename(key): (shape_of(state_dict, key), reader(state_dict, key)) for key in state_dict}
    )


def dual(state_dict: Mapping[str, Any]) -> View:
    """The weights of a network of one time, with two copies of its embedders."""
    parts, prefix = {}, "time_text_embed."
    for key in state_dict:
        rest = key.removeprefix(prefix)
        names = (
            [f"{prefix}{which}_embedder.{rest}" for which in ("original", "second")]
            if key != rest
            else [key]
        )
        parts |= dict.fromkeys(names, (shape_of(state_dict, key), reader(state_dict, key)))
    return View(parts)


def is_dual(adapters: Mapping[str, Any]) -> bool:
    """Whether the adapters are those of a flow map, with a second embedder for a second time."""
    return any("second_embedder" in key for key in adapters)


def _targets(module: str) -> tuple[str, ...] | None:
    """The modules of `FluxTransformer2DModel` in one module of the single-file form, in order; None
    for a module of another form.
    """
    if module in _OUTSIDE:
        return (_OUTSIDE[module],)
    kind, _, rest = module.partition(".")
    i, _, rest = rest.partition(".")
    if kind not in _BLOCKS or rest not in _BLOCKS[kind][1]:
        return None
    blocks, table = _BLOCKS[kind]
    targets = table[rest] if isinstance(table[rest], tuple) else (table[rest],)
    return tuple(f"{blocks}.{i}.{target}" for target in targets)
