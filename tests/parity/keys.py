"""The published keys and shapes of FLUX.1-dev, from the published classes without memory for them.

    python tests/parity/keys.py        store them in `fixtures/flux/keys.json.gz`, for other tests

The single-file form is written down here as its authors' code has it, and proved by the converter
of `diffusers`, which takes every key and leaves none.
"""

import gzip
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from helpers.flux_fixtures import CONFIGS, FIXTURES
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel


def published():
    """Names and shapes by kind."""
    with torch.device("meta"):
        models = {
            "transformer": FluxTransformer2DModel(**CONFIGS["transformer"]),
            "autoencoder": AutoencoderKL(**CONFIGS["autoencoder"]),
            "clip": CLIPTextModel(CLIPTextConfig(**CONFIGS["clip"])),
            "t5": T5EncoderModel(T5Config(**CONFIGS["t5"])),
        }
        sizes = {
            kind: {key: list(a.shape) for key, a in model.state_dict().items()}
            for kind, model in models.items()
        }
        sizes["single_file"] = single_file(**CONFIGS["transformer"])
        converted = {key: torch.empty(shape) for key, shape in sizes["single_file"].items()}
        names = convert_flux_transformer_checkpoint_to_diffusers(converted)
    assert not converted, f"left over: {list(converted)}"
    assert {key: list(array.shape) for key, array in names.items()} == sizes["transformer"]
    return sizes


def single_file(
    *,
    num_layers,
    num_single_layers,
    joint_attention_dim,
    pooled_projection_dim,
    in_channels,
    guidance_embeds,
    **heads,
):
    """Names and shapes of `flux1-dev.safetensors`."""
    dim = heads["attention_head_dim"]
    width = dim * heads["num_attention_heads"]
    found = {}

    def linear(name, n, m):
        found[f"{name}.weight"], found[f"{name}.bias"] = [m, n], [m]

    linear("img_in", in_channels, width)
    linear("txt_in", joint_attention_dim, width)
    embedders = {"time_in": 256, "vector_in": pooled_projection_dim} | (
        {"guidance_in": 256} if guidance_embeds else {}
    )
    for name, n in embedders.items():
        linear(f"{name}.in_layer", n, width)
        linear(f"{name}.out_layer", width, width)
    for i in range(num_layers):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", width, 6 * width)
            linear(f"{block}_attn.qkv", width, 3 * width)
            linear(f"{block}_attn.proj", width, width)
            found[f"{block}_attn.norm.query_norm.scale"] = found[
                f"{block}_attn.norm.key_norm.scale"
            ] = [dim]
            linear(f"{block}_mlp.0", width, 4 * width)
            linear(f"{block}_mlp.2", 4 * width, width)
    for i in range(num_single_layers):
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", width, 3 * width)
        linear(f"{block}.linear1", width, 7 * width)
        linear(f"{block}.linear2", 5 * width, width)
        found[f"{block}.norm.query_norm.scale"] = found[f"{block}.norm.key_norm.scale"] = [dim]
    linear("final_layer.adaLN_modulation.1", width, 2 * width)
    linear("final_layer.linear", width, in_channels)
    return found


if __name__ == "__main__":
    packed = gzip.compress(json.dumps(published(), separators=(",", ":")).encode(), mtime=0)
    (FIXTURES / "keys.json.gz").write_bytes(packed)
    print({kind: len(keys) for kind, keys in published().items()}, len(packed))
