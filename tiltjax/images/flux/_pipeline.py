r"""A model for one prompt, from a folder in the layout of the published FLUX.1. The text is encoded
first, then the encoders are freed and the network is loaded.

    folder/  model_index.json  transformer/  vae/  text_encoder/  text_encoder_2/
             tokenizer/  tokenizer_2/  scheduler/

    model  = load_model("black-forest-labs/FLUX.1-dev", "a red bird", height=512, width=512)
    grid   = schedule("black-forest-labs/FLUX.1-dev", model, 28)
    particles = tiltjax.sample(key, model, num=1, times=grid, solver=tiltjax.Euler())

A name is a local folder, a name of the Hugging Face hub, or `TINY`, a small trained model in the
package, in the same layout. Sizes, missing folders and memory are checked before weights are read.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks
from tiltjax.images import loading, prompts
from tiltjax.images.flux._model import (
    FACTOR,
    FluxModel,
    Memory,
    check_memory,
    latent_shape,
    memory,
    times,
)
from tiltjax.images.networks import autoencoder, clip, transformer
from tiltjax.pretrained import files, key_names, state_dicts

TINY = "tiny"
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_BUNDLED = Path(__file__).parents[1] / TINY


def located(name: str | os.PathLike) -> Path:
    """The folder of a model, with all of its parts.

    **Raises:** `FileNotFoundError` with the missing parts, and as `files.located`.
    """
    if os.fspath(name) == TINY:
        if not _BUNDLED.is_dir():
            raise FileNotFoundError(
                f"this copy of tiltjax has no {TINY} model ({_BUNDLED}): pass a folder or a model"
            )
        return _BUNDLED
    folder = files.located(name)
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: expected a folder in the layout of FLUX.1 as "
            f"published, with {', '.join(PARTS)}, got {found}"
        )
    return folder


def usual_size(name: str | os.PathLike) -> int:
    """The default side of an image: 512, or the autoencoder's training size if that is smaller."""
    return min(512, files.configuration(located(name) / "vae").get("sample_size", 512))


def needed_memory(
    config: transformer.Config, height: int, width: int, factor: int, **settings: Any
) -> Memory:
    """The result of `memory` for an image, with an autoencoder of any factor."""
    rows, columns, _ = latent_shape(config, height, width, factor)
    return memory(config, rows * FACTOR, columns * FACTOR, **settings)


def load_model(
    name: str | os.PathLike,
    prompt: str,
    *,
    height: int,
    width: int,
    guidance: float | None = None,
    adapters: str | os.PathLike | None = None,
    dtype: Any = jnp.bfloat16,
    remat: bool = False,
    attention: Any = "xla",
    chunk_size: int = 1,
    gradient: bool = True,
    sharding: state_dicts.Placement | None = None,
    available: int | None = None,
) -> FluxModel:
    """The model of one prompt. A prompt that is too long is cut, with a warning that quotes the
    removed part.

    **Arguments:** `name`, a folder, a name of the hub, or `TINY`; `prompt`; `height` and `width` of
    the image; `guidance`, the distilled scale, as in `FluxModel`; `adapters`, a file as in
    `loading.load`, for the transformer and the text encoders; `dtype` of parameters and
    computation; `remat`, `attention`, `sharding` of the transformer; `chunk_size`, the number of
    states evaluated at once, and `gradient`, whether a gradient is computed, both for the estimate
    of memory; `available`, bytes, if JAX does not report them.

    **Raises:** `ValueError` for sizes; `FileNotFoundError`, `PermissionError` and `ImportError` of
    `located`; `MemoryError` with the needed memory and ways to reduce it.
    """
    folder = located(name)
    published = files.configuration(folder / "transformer")
    adapted = {} if adapters is None else loading.adapters_by_kind(adapters)
    dual = bool(published.get("dual_time")) or key_names.is_dual(adapted.get("transformer", {}))
    config = transformer.Config.from_json({**published, "dual_time": dual})
    factor = autoencoder.Config.from_json(files.configuration(folder / "vae")).factor
    length = _text_length(folder, config)
    needed = needed_memory(
        config,
        height,
        width,
        factor,
        chunk_size=chunk_size,
        length=length,
        itemsize=jnp.dtype(dtype).itemsize,
        gradient=gradient,
        remat=remat,
        fused=attention != "xla",
    )
    check_memory(needed, available)
    states, pooled = encoded(folder, prompt, length, dtype, adapted)
    options = {"dtype": dtype, "param_dtype": dtype, "remat": remat, "attention": attention}
    network = loading.load(
        "transformer", folder, adapters=adapted.get("transformer"), sharding=sharding, **options
    )
    coder = loading.load("autoencoder", folder)
    return FluxModel(
        network, states, pooled, height=height, width=width, guidance=guidance, autoencoder=coder
    )


def encoded(
    folder: Path,
    prompt: str,
    length: int,
    dtype: Any,
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Array, Array]:
    """The T5 states and the pooled CLIP state of a prompt; the encoders are freed afterwards.
    `adapters` of `clip` and of `t5` are merged into them.
    """
    adapted = adapters or {}
    positions = clip.TextConfig.from_json(
        files.configuration(folder / "text_encoder")
    ).max_position_embeddings
    clip_tokenizer = prompts.clip_tokenizer(folder / "tokenizer", positions)
    t5_tokenizer = prompts.t5_tokenizer(folder / "tokenizer_2", length)
    encoders = {
        kind: loading.load(kind, folder, adapters=adapted.get(kind), param_dtype=dtype)
        for kind in ("clip", "t5")
    }
    return jax.block_until_ready(
        prompts.embed(prompt, **encoders, clip_tokenizer=clip_tokenizer, t5_tokenizer=t5_tokenizer)
    )


def schedule(
    name: str | os.PathLike, model: FluxModel, steps: int, *, start: float = 1e-3
) -> Array:
    """The grid of a model's own scheduler, for `sample(..., times=)`, `(steps + 1,)`, increasing to
    1. It is shifted by the number of tokens, or by a fixed factor.

    **Raises:** as `times`.
    """
    file = located(name) / "scheduler" / "scheduler_config.json"
    settings: Mapping[str, Any] = (
        json.loads(file.read_text()) if file.is_file() else {"use_dynamic_shifting": True}
    )
    rows, columns, _ = model.shape
    if settings.get("use_dynamic_shifting", False):
        few, many = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
        low, high = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
        mu = low + (high - low) * (rows * columns / 4 - few) / (many - few)
    else:
        mu = math.log(settings.get("shift", 1.0))
    return times(steps, rows * FACTOR, columns * FACTOR, start=start, mu=mu)


def _text_length(folder: Path, config: transformer.Config) -> int:
    """The number of tokens for T5: its tokenizer's limit, or the length in the networks'
    training.
    """
    usual = prompts.T5_LENGTH if config.guidance_embeds else prompts.T5_LENGTH // 2
    file = folder / "tokenizer_2" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    longest = settings.get("model_max_length", usual)
    # A tokenizer without a limit has a number such as 1e30 here.
    if longest > prompts.T5_LENGTH:
        return usual
    return _checks.count(int(longest), "model_max_length")
