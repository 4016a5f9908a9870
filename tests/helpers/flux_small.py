"""A FLUX.1 in small whose parameters are made up: as a model, and as a folder laid out like the
published one.
"""

import functools
import json

import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import flux_parts as parts
from helpers.flux_fixtures import TRANSFORMERS, draws, weights

from tiltjax.images import flux
from tiltjax.images.networks import autoencoder, clip, t5, transformer
from tiltjax.pretrained import files
from tiltjax.pretrained.state_dicts import from_state_dict, shapes

HEIGHT, WIDTH = 16, 8
TEXT_LENGTH = 12
WORDS = ("a", "red", "blue", "square", "circle", "on", "green")


@functools.cache
def network(name="dual", dtype=jnp.float64):
    """A transformer of `flux_fixtures.TRANSFORMERS`."""
    config = transformer.Config.from_json(TRANSFORMERS[name])
    options = {"dtype": dtype, "param_dtype": dtype}
    abstract = nnx.eval_shape(lambda: transformer.Transformer(config, **options, rngs=nnx.Rngs(0)))
    published = weights(shapes(abstract, transformer.RENAMES, transformer.STACKED))
    return from_state_dict(
        abstract, published, renames=transformer.RENAMES, stacked=transformer.STACKED
    )


def model(name="dual", dtype=jnp.float64, **options):
    """A model of images `(16, 8, 3)`: 4 x 2 tokens, the autoencoder's factor being 2."""
    found = draws(2, text=(5, 24), pooled=(20,))
    text, pooled = (jnp.asarray(found[key], dtype) for key in ("text", "pooled"))
    coder = parts.small_autoencoder(param_dtype=dtype)
    options = {"height": HEIGHT, "width": WIDTH, "dtype": dtype, "autoencoder": coder, **options}
    return flux.FluxModel(network(name, dtype), text, pooled, **options)


def folder(path, name="dual", **config):
    """The published layout: `model_index.json`, a configuration and weights for each part,
    tokenizers of a few words, the scheduler.
    """
    joined = TRANSFORMERS[name]["joint_attention_dim"]
    encoders = {
        "t5": {**parts.T5, "d_model": joined, "vocab_size": len(WORDS) + 3},
        "clip": {
            **parts.CLIPS["recent"]["text_config"],
            "hidden_size": TRANSFORMERS[name]["pooled_projection_dim"],
            "vocab_size": len(WORDS) + 3,
            "eos_token_id": 1,
        },
    }
    parts_of = {
        "transformer": ("transformer", {**TRANSFORMERS[name], **config}),
        "autoencoder": ("vae", parts.AUTOENCODER),
        "clip": ("text_encoder", encoders["clip"]),
        "t5": ("text_encoder_2", encoders["t5"]),
    }
    modules = {
        "transformer": (
            transformer.Transformer,
            transformer.Config,
            transformer.RENAMES,
            transformer.STACKED,
        ),
        "autoencoder": (autoencoder.Autoencoder, autoencoder.Config, None, ()),
        "clip": (clip.Text, clip.TextConfig, None, clip.STACKED),
        "t5": (t5.T5, t5.Config, t5.RENAMES, t5.STACKED),
    }
    for kind, (directory, settings) in parts_of.items():
        module, reader, renames, stacked = modules[kind]
        abstract = nnx.eval_shape(lambda: module(reader.from_json(settings), rngs=nnx.Rngs(0)))  # noqa: B023
        (path / directory).mkdir(parents=True)
        (path / directory / "config.json").write_text(json.dumps(settings))
        files.write(
            path / directory / "model.safetensors",
            weights(shapes(abstract, renames, stacked), np.float32),
        )
    for directory, special in (
        ("tokenizer", ("<|startoftext|>", "<|endoftext|>")),
        ("tokenizer_2", ("<pad>", "</s>")),
    ):
        (path / directory).mkdir()
        names = [*special, "<unk>", *WORDS]
        (path / directory / "tokenizer.json").write_text(json.dumps(_words(names)))
    (path / "tokenizer_2" / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": TEXT_LENGTH})
    )
    (path / "scheduler").mkdir()
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "shift": 3.0,
    }
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return path


def _words(names):
    """A `tokenizer.json` of whole words, as the package tokenizers reads it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {name: i for i, name in enumerate(names)},
            "unk_token": "<unk>",
        },
    }
