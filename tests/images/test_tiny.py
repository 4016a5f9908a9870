"""The trained model that the package brings along: what it was trained for, it does.

Tier: statistical, against rules that `test_shapes_data` tests; keys are fixed.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flux_parts as parts
from PIL import Image

import tiltjax as tj
from tiltjax.cli import main
from tiltjax.images import flux, loading, prompts, rewards, shapes
from tiltjax.images.networks import clip

FOLDER = flux.located(flux.TINY)
SIZE = {"height": shapes.SIDE, "width": shapes.SIDE, "dtype": jnp.float32}
PROMPTS = [
    shapes.Scene("circle", "red", "top left", "blue"),
    shapes.Scene("triangle", "yellow", "bottom right", "purple"),
    shapes.Scene("square", "white", "middle", "black"),
    shapes.Scene("circle", "green", "bottom left", "orange"),
    shapes.Scene("square", "purple", "top right", "yellow"),
]


@pytest.fixture(scope="module")
def models():
    return [flux.load_model(flux.TINY, shapes.caption(scene), **SIZE) for scene in PROMPTS]


def read(model, points):
    images = np.clip(jax.jit(lambda model, x: model.decode(x))(model, points), 0, 1)
    return [shapes.read(image) for image in images]


def drawn(n, seed):
    scenes = shapes.scenes(jax.random.key(seed), n)
    images = jax.jit(jax.vmap(shapes.draw))(jax.random.split(jax.random.key(seed + 1), n), *scenes)
    return shapes.all_named(scenes), images


@pytest.mark.slow
def test_the_autoencoder_keeps_shapes_and_colors():
    scenes, images = drawn(200, 20)
    coder = loading.load("autoencoder", FOLDER)
    through = np.clip(jax.jit(lambda coder, x: coder.decode(coder.encode(x)))(coder, images), 0, 1)
    assert (
        np.mean([shapes.read(image) == scene for image, scene in zip(through, scenes, strict=True)])
        >= 0.97
    )
    error = np.mean((through - np.asarray(images)) ** 2, axis=(1, 2, 3))
    assert np.mean(-10 * np.log10(error)) > 30
    # The latents are what the flow's noise is measured by.
    latents = np.asarray(jax.jit(lambda coder, x: coder.encode(x))(coder, images))
    assert latents.std() == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(("steps", "leaps"), [(28, False), (4, True)])
def test_samples_show_what_the_prompt_says(models, steps, leaps):
    grid = jnp.linspace(1e-3, 1.0, steps + 1)
    right = []
    for number, (model, scene) in enumerate(zip(models, PROMPTS, strict=True)):
        leaping = model.leaping(grid) if leaps else model
        points = tj.sample(jax.random.key(number), leaping, num=20, times=grid, solver=tj.Euler()).x
        right += [
            [a == b for a, b in zip(scene, found or ["nothing"] * 4, strict=True)]
            for found in read(model, points)
        ]
    assert np.mean(right, axis=0).min() >= 0.9, dict(
        zip(scene._fields, np.mean(right, axis=0), strict=True)
    )


@pytest.mark.slow
def test_what_a_prompt_leaves_open_is_open():
    model = flux.load_model(flux.TINY, "a circle", **SIZE)
    grid = jnp.linspace(1e-3, 1.0, 9)
    points = tj.sample(
        jax.random.key(0), model.leaping(grid), num=60, times=grid, solver=tj.Euler()
    ).x
    found = [each for each in read(model, points) if each is not None]
    assert np.mean([each.shape == "circle" for each in found]) > 0.8
    # Of sixty draws from eight colors alike likely, seven at least are there but for one time in
    # ten thousand.
    assert len({each.background for each in found}) >= 6
    assert len({each.place for each in found}) == 5


@pytest.mark.slow
def test_the_map_is_the_flow_and_its_own_composition(models):
    model = models[0]
    x = jax.random.normal(jax.random.key(5), (8, *model.shape), jnp.float32)
    at = lambda t: jnp.asarray(t, jnp.float32)
    move = jax.jit(jax.vmap(lambda model, t, x, s: model.flow_map(t, x, s), (None, None, 0, None)))
    flow = tj.sample(
        jax.random.key(0),
        model,
        num=8,
        times=np.linspace(0.02, 1.0, 99),
        start=x,
        solver=tj.Euler(),
    ).x
    once = move(model, at(0.02), x, at(1.0))
    twice = move(model, at(0.4), move(model, at(0.02), x, at(0.4)), at(1.0))
    rms = lambda a: float(jnp.sqrt(jnp.mean(a**2)))
    assert rms(twice - flow) < 0.3 * rms(flow)
    assert rms(twice - flow) < rms(once - flow) < 0.5 * rms(flow)


@pytest.mark.slow
def test_clip_tells_captions_apart():
    scenes, images = drawn(64, 30)
    network, tokens = clip.load(FOLDER / "clip"), prompts.clip_tokenizer(FOLDER / "tokenizer", 16)
    ids = jnp.asarray(np.stack([tokens(shapes.caption(scene)) for scene in scenes]))
    similar = np.asarray(
        jax.jit(lambda network: network.image(images) @ network.text(ids).T)(network)
    )
    assert np.mean(similar.argmax(axis=1) == np.arange(64)) > 0.9
    reward = rewards.ClipScore(network, ids[3])
    assert float(reward(images[3])) == pytest.approx(
        similar[3, 3], abs=parts.rounding(network, similar)
    )
    # The text tower alone, which modulates the network, is the same.
    alone = loading.load("clip", FOLDER)
    parts.close_to_rounding(alone, alone.pooled(ids), network.text_model.pooled(ids))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plug-in", pytest.param("damped", marks=pytest.mark.slow)])
def test_guided_from_the_command_line(method, tmp_path, capsys):
    arguments = [
        "--model",
        "tiny",
        "--prompt",
        "a circle in the middle",
        "--reward",
        "blue",
        "--steps",
        "8",
        "--quiet",
    ]
    arguments += ["--method", method, "--images", "2", "--output", str(tmp_path)]
    assert main(["images", *arguments]) == 0
    assert "mean blue of 2 guided" in capsys.readouterr().out
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["height"] == 32
    image = np.asarray(Image.open(tmp_path / "0000.png"))
    assert image.shape == (32, 32, 3)
    assert image.std() > 5


@pytest.mark.nightly
@pytest.mark.optimized
@pytest.mark.parametrize("method", ["weighted", "plug-in"])
def test_the_defaults_raise_the_reward_and_keep_the_prompt(method, tmp_path):
    """By more than five standard errors of the difference of images with the same seeds."""
    num, prompt = 32, "a red circle in the middle"
    arguments = ["--model", "tiny", "--prompt", prompt, "--method", method, "--images", str(num)]
    assert main(["images", *arguments, "--quiet", "--output", str(tmp_path)]) == 0
    folders = tmp_path, tmp_path / "unguided"
    guided, unguided = (
        np.asarray(list(json.loads((folder / "rewards.json").read_text()).values()))
        for folder in folders
    )
    gain = guided - unguided
    assert gain.mean() > 5 * gain.std(ddof=1) / np.sqrt(num)
    scene = shapes.parsed(prompt)
    following = [
        sum(
            shapes.follows(np.asarray(Image.open(folder / f"{number:04d}.png")) / 255, scene)
            for number in range(num)
        )
        for folder in folders
    ]
    assert following[0] >= following[1] > 0.8 * num


@pytest.mark.slow
def test_its_clip_is_the_reward_clip(tmp_path, capsys):
    arguments = [
        "--model",
        "tiny",
        "--prompt",
        "a red circle",
        "--reward",
        "clip",
        "--method",
        "none",
        "--steps",
        "4",
    ]
    assert main(["images", *arguments, "--quiet", "--output", str(tmp_path)]) == 0
    assert "mean clip of 1 unguided" in capsys.readouterr().out
