"""The text encoders, CLIP and the tokenizers against `transformers`, live; the stored answers
against what it says today.

Run by `make test-parity`, in an environment of its own.
"""

import json
import random

import flux_parts_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from helpers import flux_parts as parts
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiltjax.images import prompts, rewards
from tiltjax.images.networks import clip, t5
from tiltjax.images.rewards import _torch
from tiltjax.pretrained import state_dicts

SHAPES = lambda model: {name: tuple(array.shape) for name, array in model.state_dict().items()}


def block(stack, i):
    """One of the blocks of a stack."""
    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], state))


def test_names_and_shapes():
    model, _ = reference.t5_model()
    expected = SHAPES(model)
    assert expected.pop(t5.TIED) == expected["shared.weight"]
    assert state_dicts.shapes(parts.small_t5(), t5.RENAMES, t5.STACKED) == expected
    for name in parts.CLIPS:
        whole, network = SHAPES(reference.clip_model(name)[0]), parts.small_clip(name)
        assert state_dicts.shapes(network, stacked=clip.STACKED) == whole
        tower = {
            key.removeprefix("text_model."): shape
            for key, shape in whole.items()
            if key.startswith("text_model.")
        }
        assert state_dicts.shapes(network.text_model, stacked=clip.STACKED) == tower
        alone = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**parts.CLIPS[name]["text_config"])
        )
        assert SHAPES(alone) == tower


def test_what_a_file_leaves_out_is_the_default_of_the_published_class():
    with torch.device("meta"):
        published = transformers.CLIPModel(transformers.CLIPConfig())
        encoder = transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu"))
    build = lambda network, config: nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))
    assert state_dicts.shapes(
        build(clip.CLIP, clip.Config.from_json({})), stacked=clip.STACKED
    ) == SHAPES(published)
    ours = build(t5.T5, t5.Config.from_json({"feed_forward_proj": "gated-gelu"}))
    assert state_dicts.shapes(ours, t5.RENAMES, t5.STACKED) | {t5.TIED: (32128, 512)} == SHAPES(
        encoder
    )
    assert clip.TextConfig.from_json({}).eos_token_id == transformers.CLIPTextConfig().eos_token_id


def test_t5_whole_in_single_precision_and_block_by_block():
    model, _ = reference.t5_model()
    network = parts.small_t5()
    states = jax.jit(network)(jnp.asarray(parts.T5_IDS))
    parts.close_to_rounding(network, states, reference.t5()["states"])
    rng = np.random.default_rng(0)
    x, bias = (
        rng.normal(size=(2, 7, 24)).astype(np.float32),
        rng.normal(size=(4, 7, 7)).astype(np.float32),
    )
    for i, theirs in enumerate(model.encoder.block):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(x), position_bias=torch.from_numpy(bias)[None])[0]
        ours = block(network.encoder.block, i)
        parts.close_to_rounding(ours, ours(jnp.asarray(x), jnp.asarray(bias)), expected)


@pytest.mark.parametrize("sizes", [(32, 128), (16, 20), (8, 64)], ids=str)
def test_buckets(sizes):
    attention = reference.t5_model()[0].encoder.block[0].layer[0].SelfAttention
    offsets = torch.arange(700)[None] - torch.arange(700)[:, None]
    expected = attention._relative_position_bucket(offsets, True, *sizes)
    np.testing.assert_array_equal(t5.buckets(700, *sizes), expected)


@pytest.mark.parametrize("name", parts.CLIPS)
def test_clip_whole_in_single_precision_and_block_by_block(name):
    model, _ = reference.clip_model(name)
    network, expected = parts.small_clip(name), reference.clip(name)
    ids, images = jnp.asarray(parts.CLIP_IDS), jnp.asarray(parts.images(2, 8, 8, 3))

    def similarity(images):
        both = network.temperature() * network.image(images) @ network.text(ids).T
        return jnp.trace(both), both

    gradient, values = jax.jit(jax.grad(similarity, has_aux=True))(images)
    parts.close_to_rounding(network, values, expected["similarity"])
    parts.close_to_rounding(network, gradient, expected["similarity_gradient"])
    tower = network.text_model
    parts.close_to_rounding(tower, tower(ids), expected["states"])
    parts.close_to_rounding(tower, tower.pooled(ids), expected["pooled"])
    x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    for i, theirs in enumerate(model.vision_model.encoder.layers):
        with torch.no_grad():
            out = theirs(torch.from_numpy(x), attention_mask=None)
        out = out[0] if isinstance(out, tuple) else out
        ours = block(network.vision_model.encoder.layers, i)
        parts.close_to_rounding(ours, ours(jnp.asarray(x), None), out)


@pytest.mark.parametrize("name", ["t5", *(f"clip_{name}" for name in parts.CLIPS)])
def test_stored_answers_are_those_of_today(name):
    found, expected = parts.stored(name), reference.ALL[name](dtype=torch.float64)
    assert found.keys() == expected.keys()
    for part, array in expected.items():
        parts.close(found[part], array, 1e-12)


# Tokenizers: small vocabularies, built offline; the same text, the same ids.

WORDS = [
    "a red bird",
    "Two  BLUE fish\n",
    "don't, I'll; we've 1984 x2!",
    "naïve café Ünïcode — ½ ☃",
    "",
    " ",
    "<|endoftext|>b",
    "a_b(c)",
]


def sentences():
    """What is above, and noise of letters, signs and spaces."""
    generator = random.Random(0)
    letters = "abcdeBIRDS'étñß0123456789 \t_-.,!?()/<|>中文é☃"
    return WORDS + [
        "".join(generator.choices(letters, k=generator.randrange(1, 9))) for _ in range(200)
    ]


@pytest.fixture
def clip_folder(tmp_path):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_ = list(bytes_to_unicode().values())
    merges = [
        ("b", "i"),
        ("r", "d</w>"),
        ("bi", "rd</w>"),
        ("r", "e"),
        ("re", "d</w>"),
        ("l", "l</w>"),
        ("'", "ll</w>"),
    ]
    pieces = [*bytes_, *(f"{piece}</w>" for piece in bytes_), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    )
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "<|endoftext|>"}})
    )
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    return tmp_path, theirs


def ids_of(theirs, prompt, length):
    return theirs(prompt, padding="max_length", max_length=length, truncation=True).input_ids


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_clip_tokenizer_from_its_vocabulary_and_from_one_file(clip_folder, tmp_path):
    folder, theirs = clip_folder
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    for ours in (
        prompts.clip_tokenizer(folder, 20),
        prompts.clip_tokenizer(tmp_path / "saved", 20),
    ):
        for prompt in sentences():
            assert ours(prompt).tolist() == ids_of(theirs, prompt, 20), prompt
    with pytest.warns(UserWarning, match=r"5 tokens for CLIP, which reads 3: 'fg' is cut"):
        prompts.clip_tokenizer(folder, 5)("cd e fg")


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_t5_tokenizer(tmp_path):
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        "▁a",
        "▁red",
        "▁bird",
        "b",
        "i",
        "r",
        "d",
        "e",
        "s",
        "a",
        ",",
        "1",
        "▁b",
    ]
    theirs = transformers.T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0
    )
    theirs.save_pretrained(tmp_path)
    ours = prompts.t5_tokenizer(tmp_path, 12)
    for prompt in sentences():
        assert ours(prompt).tolist() == ids_of(theirs, prompt, 12), prompt
    with pytest.warns(UserWarning, match="3 tokens for T5, which reads 2: 'bird' is cut"):
        assert prompts.t5_tokenizer(tmp_path, 3)("a red bird").tolist() == [4, 5, 1]


# A small model of the kind that answers questions about images.


class Processor:
    """The published image processor; a tokenizer of letters."""

    def __init__(self, token: int):
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=4096
        )
        self.token = token

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return messages[0]["content"][1]["text"]

    def __call__(self, text, images, return_tensors):
        found = self.image_processor(images=images, return_tensors=return_tensors)
        places = int(found["image_grid_thw"].prod()) // 4
        ids = [[1, *[self.token] * places, 2, *(3 + ord(c) % 20 for c in text[0])]]
        kinds = [[int(i == self.token) for i in ids[0]]]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(1, len(ids[0]), dtype=torch.long),
            "mm_token_type_ids": torch.tensor(kinds),
            **found,
        }

    def tokenizer(self, answer, add_special_tokens):
        return type("Found", (), {"input_ids": [{"Yes": 4, "No": 5}[answer]]})


@pytest.fixture(scope="module")
def vision_language():
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 40,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=30,
        vision_start_token_id=1,
        vision_end_token_id=2,
        video_token_id=31,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def test_patches_are_those_of_the_published_processor():
    processor = Processor(30).image_processor
    levels = np.random.default_rng(0).integers(0, 256, size=(2, 16, 24, 3), dtype=np.uint8)
    found = processor(images=[Image.fromarray(one) for one in levels], return_tensors="pt")
    ours = _torch._patches(
        torch.from_numpy(levels / 255).float().permute(0, 3, 1, 2),
        processor,
        tuple(found["image_grid_thw"][0].tolist()),
    )
    parts.close(ours, found["pixel_values"], 1e-5)


def test_yes_or_no_of_a_published_architecture(vision_language):
    processor = Processor(30)
    reward = rewards.yes_or_no("is it blue?", vision_language, processor, size=(16, 24))
    x = jnp.asarray(parts.images(2, 16, 24, 3))
    values, gradients = jax.vmap(jax.value_and_grad(reward))(x)
    for one, value in zip(np.asarray(x), np.asarray(values), strict=True):
        # The published way, which rounds the image to 256 levels.
        image = Image.fromarray(np.round(255 * one).astype(np.uint8))
        with torch.no_grad():
            logits = vision_language(**processor(["is it blue?"], [image], "pt")).logits[0, -1]
        assert abs(value - float(logits[4] - logits[5])) < 2e-3 * float(logits.std())
    step = 1e-2 * gradients[0] / jnp.linalg.norm(gradients[0])
    slope = float(reward(x[0] + step) - reward(x[0] - step)) / 2e-2
    np.testing.assert_allclose(slope, jnp.linalg.norm(gradients[0]), rtol=0.02)
