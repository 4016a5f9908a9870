"""Rewards on images: by hand, against stored answers of the published CLIP, and against PyTorch.

Tiers: exact (1e-12 in float64); parity.
"""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import flux_parts as parts

import tiltjax as tj
from tiltjax.images import rewards
from tiltjax.images.networks import clip
from tiltjax.images.rewards import _pixels
from tiltjax.pretrained import files, state_dicts

IMAGE = jnp.asarray(parts.images(6, 8, 3), jnp.float64)
SQUARES = jnp.asarray(parts.images(2, 8, 8, 3), jnp.float64)
EXPECTED = parts.stored("clip_legacy")
IDS = parts.CLIP_IDS


def everything():
    """Every reward that is one of images of any size."""
    return {
        "blueness": rewards.blueness,
        "blue_minus_red_green": rewards.blue_minus_red_green,
        "blue_minus_half_red_green": rewards.blue_minus_half_red_green,
        "symmetry": rewards.symmetry,
        "antisymmetry": rewards.antisymmetry,
        "rotation": rewards.rotation,
        "MaskedBrightness": rewards.MaskedBrightness(rewards.bottom_half(6, 8)),
        "Palette": rewards.Palette(rewards.PALETTES["ocean"]),
    }


def by_hand(x):
    red, green, blue = np.moveaxis(x, -1, 0)
    mirrored = np.stack([row[::-1] for row in x])
    bright = x.sum(-1) / 3
    return {
        "blueness": blue.mean(),
        "blue_minus_red_green": blue.mean() - red.mean() - green.mean(),
        "blue_minus_half_red_green": blue.mean() - red.mean() / 2 - green.mean() / 2,
        "symmetry": -np.mean((x - mirrored) ** 2),
        "antisymmetry": np.mean((x - mirrored) ** 2),
        "rotation": -np.mean((x - np.rot90(x, 2)) ** 2),
        "MaskedBrightness": bright[3:].mean() - bright[:3].mean(),
        "Palette": -np.sum((x.mean((0, 1)) - [0.2, 0.4, 0.7]) ** 2),
    }


@pytest.mark.parametrize("name", everything())
def test_values_by_hand_and_gradients_by_differences(name):
    reward = everything()[name]
    np.testing.assert_allclose(reward(IMAGE), by_hand(np.asarray(IMAGE))[name], rtol=0, atol=1e-12)
    direction = jnp.asarray(parts.images(7, 6, 8, 3)[0], jnp.float64)
    slope = jnp.vdot(jax.grad(reward)(IMAGE), direction)
    step = 1e-4
    difference = (reward(IMAGE + step * direction) - reward(IMAGE - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=0, atol=1e-10)  # all are quadratic at most
    assert reward(IMAGE.astype(jnp.float32)).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"one image \(height, width, 3\), got shape \(6, 8\)"):
        reward(IMAGE[..., 0])


def test_extremes():
    plane = lambda *color: jnp.broadcast_to(jnp.asarray(color, jnp.float64), (6, 8, 3))
    rewards = everything()
    assert [
        float(rewards["blue_minus_red_green"](plane(*c))) for c in ((0, 0, 1), (1, 1, 1), (1, 1, 0))
    ] == [1, -1, -2]
    assert abs(rewards["blue_minus_half_red_green"](plane(0.3, 0.3, 0.3))) < 1e-15
    assert rewards["symmetry"](plane(0, 1, 0.5)) == rewards["rotation"](plane(0, 1, 0.5)) == 0
    split = plane(0, 0, 0).at[:, 4:].set(1.0)
    assert rewards["antisymmetry"](split) == 1
    assert rewards["MaskedBrightness"](plane(0, 0, 0).at[3:].set(1.0)) == 1


def test_the_three_regions():
    regions = {
        region: getattr(_pixels, region)(100, 200)
        for region in ("top_right_circle", "center_circle", "bottom_half")
    }
    assert {region: mask.shape for region, mask in regions.items()} == dict.fromkeys(
        regions, (100, 200)
    )
    where = {region: np.argwhere(mask).mean(0).tolist() for region, mask in regions.items()}
    assert where == {
        "top_right_circle": [25, 150],
        "center_circle": [50, 100],
        "bottom_half": [74.5, 99.5],
    }
    for region, radius in (("top_right_circle", 18), ("center_circle", 20)):
        rows = np.flatnonzero(regions[region].any(axis=1))
        assert len(rows) == 2 * radius - 1  # the rim itself is outside
        assert abs(regions[region].sum() - np.pi * radius**2) < 2 * np.pi * radius
    assert rewards.bottom_half(5, 2).sum(axis=1).tolist() == [0, 0, 2, 2, 2]


def test_masks_and_palettes_that_are_none():
    for mask in (np.zeros((4, 4)), np.ones((4, 4)), 2 * rewards.bottom_half(4, 4)):
        with pytest.raises(ValueError, match="some pixels inside and some outside"):
            rewards.MaskedBrightness(mask)
    with pytest.raises(ValueError, match=r"size \(6, 8\) but the mask has size \(4, 4\)"):
        rewards.MaskedBrightness(rewards.bottom_half(4, 4))(IMAGE)
    with pytest.raises(
        ValueError, match=r"\(red, green, blue\) must have shape \(3,\), got \(4,\)"
    ):
        rewards.Palette([0.1, 0.2, 0.3, 0.4])


def test_decoded_is_the_reward_of_the_image_that_a_file_would_hold():
    decode = lambda z: 2 * z - 0.5
    z = jnp.asarray([[[0.1, 0.5, 0.9]]])
    plain, open_ended = (
        rewards.Decoded(decode, rewards.blueness, clip=clip) for clip in (True, False)
    )
    assert plain.image(z).tolist() == [[[0, 0.5, 1]]]
    assert (float(plain(z)), float(open_ended(z))) == (1, 1.3)
    assert (float(jax.grad(plain)(z)[0, 0, 2]), float(jax.grad(open_ended)(z)[0, 0, 2])) == (0, 2)
    both = plain + 2 * rewards.Decoded(decode, rewards.Palette([0, 0.5, 1.0]))
    assert float(both(z)) == 1
    with pytest.raises(ValueError, match="one scalar"):
        rewards.Decoded(decode, lambda image: image)(z)


@pytest.mark.slow
def test_decoded_through_the_autoencoder_follows_its_weights_and_guides():
    network = parts.small_autoencoder()
    reward = rewards.Decoded(network.decode, rewards.blue_minus_red_green)
    z = jnp.asarray(parts.inputs()["latents"])
    rewarded = jax.jit(jax.vmap(reward))
    values = rewarded(z)
    assert values.dtype == jnp.float32
    stored = np.clip(parts.stored("autoencoder")["decoded"], 0, 1)
    by_pixels = [by_hand(one)["blue_minus_red_green"] for one in stored]
    # A sum of three means of values of about one: its error is that of one value at most.
    parts.close(values, by_pixels, 3 * parts.rounding(network.decoder, stored))
    arrays = [leaf.shape for leaf in jax.tree.leaves(reward)]
    assert (
        3,
        3,
        8,
        3,
    ) in arrays  # the last convolution is an argument of a compiled program, not a constant in it

    model = tj.from_denoiser(
        lambda t, x: t * x / (t**2 + (1 - t) ** 2), shape=(3, 4, 4), dtype=jnp.float32
    )
    free = tj.sample(jax.random.key(0), model, num=2, steps=2).x
    guided = tj.sample(
        jax.random.key(0), model, tj.dps(model, reward, 5.0), num=2, steps=2, solver=tj.Euler()
    ).x
    assert np.all(np.asarray(rewarded(guided)) > np.asarray(rewarded(free)))


scored = jax.jit(lambda score, x: jax.vmap(jax.value_and_grad(score))(x))


@pytest.mark.parametrize("scaled", [False, True])
def test_the_score_of_a_prompt_is_the_published_similarity(scaled):
    network = parts.small_clip(param_dtype=jnp.float64)
    expected, gradient = EXPECTED["similarity"], EXPECTED["similarity_gradient"]
    factor = 1 if scaled else np.exp(float(network.logit_scale.get_value()))
    for i, ids in enumerate(IDS):
        values, slopes = scored(rewards.ClipScore(network, ids, scaled=scaled), SQUARES)
        np.testing.assert_allclose(values, expected[:, i] / factor, rtol=0, atol=1e-12)
        np.testing.assert_allclose(slopes[i], gradient[i] / factor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", parts.CLIPS)
def test_unit_vectors_in_single_precision(name):
    expected = parts.stored(f"clip_{name}")
    both = jax.jit(lambda network, ids, images: (network.text(ids), network.image(images)))
    network = parts.small_clip(name)
    text, image = both(network, jnp.asarray(IDS), SQUARES.astype(jnp.float32))
    parts.close_to_rounding(network, text, expected["text"])
    parts.close_to_rounding(network, image, expected["image"])


def test_a_whole_clip_from_a_folder(tmp_path):
    network = parts.small_clip("recent")
    arrays = state_dicts.to_state_dict(network, stacked=clip.STACKED)
    arrays["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    files.write(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(parts.CLIPS["recent"]))
    again = clip.load(tmp_path, param_dtype=jnp.float64)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(network), strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(jnp.float64))
    with pytest.raises(ValueError, match=r"1 missing: visual_projection\.weight"):
        clip.from_state_dict(
            {k: v for k, v in arrays.items() if k != "visual_projection.weight"},
            parts.CLIPS["recent"],
        )


def test_a_network_keeps_its_dtype_within_a_reward():
    score = rewards.ClipScore(parts.small_clip(), IDS[0])
    cast = tj._pytree.cast(score, jnp.float64)
    assert cast.text.dtype == jnp.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(cast.embed_image)} == {np.dtype(np.float32)}
    assert [
        jax.eval_shape(score, SQUARES[0].astype(dtype)).dtype for dtype in (np.float32, np.float64)
    ] == ["f4", "f8"]


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (33, 21), (5, 5), (8, 8)])
def test_images_are_prepared_for_clip_as_pytorch_would(shape):
    image = parts.images(1, *shape, 3).astype(np.float64)
    size = 8
    scaled = [max(size, size * side // min(shape)) for side in shape]
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(0, 3, 1, 2), scaled, mode="bicubic", antialias=True
    )
    top, left = ((side - size) // 2 for side in scaled)
    expected = resized[..., top : top + size, left : left + size].permute(0, 2, 3, 1).numpy()
    expected = (expected - clip.MEAN) / clip.STD
    np.testing.assert_allclose(
        clip.preprocess(jnp.asarray(image), size), expected, rtol=0, atol=1e-12
    )


def test_the_published_head_of_many_layers_is_one_linear_function():
    network = parts.small_clip(param_dtype=jnp.float64)
    linear, drop = torch.nn.Linear, torch.nn.Dropout
    head = torch.nn.Sequential(
        linear(20, 16),
        drop(),
        linear(16, 8),
        drop(),
        linear(8, 4),
        drop(),
        linear(4, 4),
        linear(4, 1),
    )
    head = head.double().eval()
    state_dict = {
        f"layers.{name}": array.detach().numpy() for name, array in head.state_dict().items()
    }
    reward = rewards.Aesthetic(network, state_dict)
    with torch.no_grad():
        expected = head(torch.from_numpy(EXPECTED["image"]))[:, 0].numpy()
    rated = jax.jit(lambda reward, x: jax.vmap(reward)(x))
    np.testing.assert_allclose(rated(reward, SQUARES), expected, rtol=0, atol=1e-12)
    alone = rewards.Aesthetic(network, {"weight": np.ones((1, 20)), "bias": np.full(1, 5.0)})
    np.testing.assert_allclose(
        rated(alone, SQUARES), EXPECTED["image"].sum(axis=1) + 5, rtol=0, atol=1e-12
    )


def test_scores_that_are_none():
    network = parts.small_clip()
    with pytest.raises(TypeError, match="clip must be a CLIP"):
        rewards.ClipScore(network.text_model, IDS[0])
    with pytest.raises(ValueError, match="those of one prompt"):
        rewards.ClipScore(network, IDS)
    with pytest.raises(ValueError, match=r"takes images \(..., 8, 8, 3\)"):
        network.vision_model(jnp.zeros((6, 8, 3)))
    for head, message in (
        ({"weight": np.ones((1, 3)), "bias": np.ones(1)}, "an input of size 20"),
        ({"weight": np.ones((2, 20)), "bias": np.ones(2)}, "must give one number, got 2"),
        ({"0.weight": np.ones((1, 20))}, "a weight and a bias"),
    ):
        with pytest.raises(ValueError, match=message):
            rewards.Aesthetic(network, head)


# What stands for the models of two packages, by the interfaces that are used of them.


class Blip(torch.nn.Module):
    """`visual_encoder` and `text_encoder` of ImageReward's network."""

    def __init__(self):
        super().__init__()
        self.embed_image, self.read = torch.nn.Conv2d(3, 4, 32, 32), torch.nn.Embedding(100, 4)

    def visual_encoder(self, images):
        return self.embed_image(images).flatten(2).mT

    def text_encoder(
        self, ids, *, attention_mask, encoder_hidden_states, encoder_attention_mask, return_dict
    ):
        assert return_dict
        assert encoder_attention_mask.shape == encoder_hidden_states.shape[:2]
        words = self.read(ids) * attention_mask[..., None]
        attended = torch.softmax(words @ encoder_hidden_states.mT, -1) @ encoder_hidden_states
        return types.SimpleNamespace(last_hidden_state=torch.tanh(words + attended))

    def tokenizer(
        self, prompt, padding=False, truncation=False, max_length=None, return_tensors=None
    ):
        ids = [ord(c) % 100 for c in prompt]
        if padding == "max_length":
            mask = [1] * len(ids[:max_length]) + [0] * (max_length - len(ids))
            ids = ids[:max_length] + [0] * (max_length - len(ids))
            ids, mask = torch.tensor([ids]), torch.tensor([mask])
            found = types.SimpleNamespace(input_ids=ids, attention_mask=mask)
            found.to = lambda device: found
            return found
        return types.SimpleNamespace(input_ids=ids)


class ImageReward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blip, self.mlp = Blip(), torch.nn.Linear(4, 1)
        self.mean, self.std = 0.2, 1.5


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.mark.usefixtures("seeded")
def test_image_reward_is_the_standardized_score_with_its_gradient():
    model = ImageReward().double().eval()
    reward = rewards.image_reward("a bird", model)
    x = jnp.asarray(parts.images(2, 224, 224, 3), jnp.float64)
    values, gradients = jax.vmap(jax.value_and_grad(reward))(x)
    images = torch.from_numpy(np.array(x)).requires_grad_()
    standard = (images - torch.tensor(clip.MEAN, dtype=torch.float64)) / torch.tensor(
        clip.STD, dtype=torch.float64
    )
    patches = model.blip.visual_encoder(standard.permute(0, 3, 1, 2))
    text = model.blip.tokenizer("a bird", "max_length", True, 35)
    states = model.blip.text_encoder(
        text.input_ids,
        attention_mask=text.attention_mask,
        encoder_hidden_states=patches,
        encoder_attention_mask=torch.ones(2, 49),
        return_dict=True,
    )
    expected = (model.mlp(states.last_hidden_state[:, 0])[:, 0] - 0.2) / 1.5
    expected.sum().backward()
    np.testing.assert_allclose(values, expected.detach(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradients, images.grad, rtol=0, atol=1e-14)
    assert reward.name == "ImageReward"
    assert jnp.isfinite(reward(jnp.asarray(parts.images(20, 30, 3))))


def test_without_the_packages(monkeypatch):
    for package, message in (("ImageReward", "image-reward"), ("torch", "PyTorch")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"needs .*{message}"):
            rewards.image_reward("a bird")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="needs Pillow"):
        rewards.yes_or_no("?", Judge().eval(), Processor(), size=(8, 16))


def test_image_reward_says_what_is_cut_or_wrong():
    with pytest.raises(ValueError, match="training mode"):
        rewards.image_reward("a bird", ImageReward())
    with pytest.warns(UserWarning, match="takes 35 tokens"):
        reward = rewards.image_reward("a" * 36, ImageReward().eval())
    with pytest.raises(ValueError, match="use Decoded on latents"):
        reward.evaluate(np.zeros((1, 4, 4, 16)))


class Processor:
    """Patches of 4 pixels in groups of 2 x 2, whatever the image."""

    image_processor = types.SimpleNamespace(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=(0.5, 0.4, 0.3),
        image_std=(0.2, 0.3, 0.4),
    )

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        (message,) = messages
        assert (message["role"], [part["type"] for part in message["content"]]) == (
            "user",
            ["image", "text"],
        )
        return message["content"][1]["text"]

    def __call__(self, text, images, return_tensors):
        assert images[0].size == (16, 8)  # width first
        return {
            "input_ids": torch.tensor([[ord(c) % 50 for c in text[0]]]),
            "image_grid_thw": torch.tensor([[1, 2, 4]]),
            "pixel_values": None,
        }

    def tokenizer(self, answer, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(input_ids=[{"Yes": 7, "No": 9, "Never": 9}[answer]])


class Judge(torch.nn.Module):
    """A visual language model: the last logits of the mean of what it reads and sees."""

    def __init__(self):
        super().__init__()
        self.read, self.embed_image = torch.nn.Embedding(50, 12), torch.nn.Linear(3 * 2 * 16, 12)
        self.patches = None

    def forward(self, input_ids, pixel_values, image_grid_thw, use_cache):
        assert not use_cache
        n = len(input_ids)
        assert image_grid_thw.tolist() == [[1, 2, 4]] * n
        self.patches = pixel_values
        patches = torch.tanh(self.embed_image(pixel_values)).reshape(n, 8, 12)
        ranks = torch.arange(1, 9, dtype=patches.dtype)[:, None]
        return types.SimpleNamespace(
            logits=(self.read(input_ids) + (ranks * patches).mean(1, keepdim=True))
        )


@pytest.mark.usefixtures("seeded")
def test_yes_or_no_is_the_log_odds_with_its_gradient():
    model = Judge().double().eval()
    reward = rewards.yes_or_no("Is it blue?", model, Processor(), size=(8, 16))
    x = jnp.asarray(parts.images(2, 8, 16, 3), jnp.float64)
    values = jax.vmap(reward)(x)
    # A group of 2 x 2 patches at a time, in each row by row; a patch holds channels, frames, rows,
    # columns.
    info = Processor.image_processor
    standard = (np.asarray(x) - info.image_mean) / info.image_std
    corners = [(0, 0), (0, 4), (4, 0), (4, 4), (0, 8), (0, 12), (4, 8), (4, 12)]
    patches = [
        np.moveaxis(one[i : i + 4, j : j + 4], -1, 0) for one in standard for i, j in corners
    ]
    expected = np.stack([np.repeat(patch[:, None], 2, axis=1).ravel() for patch in patches])
    np.testing.assert_allclose(model.patches.detach(), expected, rtol=0, atol=1e-12)
    logits = model(
        torch.tensor([[ord("?") % 50]] * 2),
        torch.from_numpy(expected),
        torch.tensor([[1, 2, 4]] * 2),
        False,
    )
    logits = logits.logits[:, -1].detach()
    np.testing.assert_allclose(values, logits[:, 7] - logits[:, 9], rtol=0, atol=1e-12)

    direction, step = jnp.asarray(parts.images(5, 8, 16, 3)[0], jnp.float64), 1e-5
    slope = jnp.vdot(jax.grad(reward)(x[0]), direction)
    difference = (reward(x[0] + step * direction) - reward(x[0] - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-7)


def test_questions_that_are_none():
    with pytest.raises(ValueError, match="must differ in their first token"):
        rewards.yes_or_no("?", Judge().eval(), Processor(), size=(8, 16), answers=("No", "Never"))
    with pytest.raises(ValueError, match="training mode"):
        rewards.yes_or_no("?", Judge(), Processor(), size=(8, 16))
