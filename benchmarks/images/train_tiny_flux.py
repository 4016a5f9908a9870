"""Can a FLUX.1 of a five-thousandth of the size be trained on two cores within an hour, and do its
images match their captions?

    python -m benchmarks.images.train_tiny_flux [--output FOLDER] [--quick]

The benchmark trains the small model of the package, with the classes of FLUX.1, on images of
`tiltjax.images.shapes`. There are four stages, and each is evaluated before the next begins. A
stage that is already in the folder is continued from its files.

| stage | loss | evaluation |
|---|---|---|
| `autoencoder` | squared error + 1e-4 of the latents' divergence from noise | `read` of images |
| `clip` | contrastive loss of images and captions | the most similar of 64 captions |
| `velocity` | flow matching at equal times, with T5 | `read` of samples by 28 steps of Euler |
| `flow_map` | half as before; half: one step is two steps | the same by 4 steps, and by 1 |

The network and the encoders are written in the published layout of FLUX.1, as 16-bit numbers. The
steps of a stage share one learning-rate schedule: a tenth of them increasing, then a cosine decay.
References: Jordan et al. (2024), Muon; Frans et al. (arXiv 2410.12557) and Boffi et al. (arXiv
2505.18825), self-distilled maps.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tiltjax as tj
from benchmarks import common
from tiltjax import training
from tiltjax.images import flux, loading, prompts, shapes
from tiltjax.images.networks import autoencoder, clip, t5, transformer
from tiltjax.pretrained import files, state_dicts
from tiltjax.training import split_parameters

PLACE = Path(shapes.__file__).parent / flux.TINY
LENGTH = 16  # tokens of a caption, for both encoders
LATENTS = 8
IMAGES = 1 << 15
SIDE = shapes.SIDE // 4
GRID = (SIDE // 2, SIDE // 2)
UNSAID = 0.1
COUNTS = tuple(len(words) for words in (shapes.SHAPES, shapes.COLORS, shapes.PLACES, shapes.COLORS))
STEPS = {"autoencoder": 2000, "clip": 700, "velocity": 2200, "flow_map": 1000}
QUICK = {"autoencoder": 4, "clip": 4, "velocity": 4, "flow_map": 4}
BATCHES = {"autoencoder": 64, "clip": 256, "velocity": 128, "flow_map": 128}
RATES = {"autoencoder": 0.02, "clip": 0.01, "velocity": 0.02, "flow_map": 0.01}

AUTOENCODER = autoencoder.Config(
    latent_channels=LATENTS, block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8,
    scaling_factor=1.0, shift_factor=0.0,
)  # fmt: skip
VELOCITY = transformer.Config(
    in_channels=4 * LATENTS,
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    guidance_embeds=False,
    axes_dims_rope=(8, 12, 12),
    dual_time=True,
)
WORDS = (
    "a",
    "an",
    "in",
    "the",
    "on",
    "background",
    "shape",
    "top",
    "bottom",
    "left",
    "right",
    "middle",
)
WORDS += (*shapes.SHAPES, *shapes.COLORS)
SPECIAL = {
    "tokenizer": ("<|startoftext|>", "<|endoftext|>", "<unk>"),
    "tokenizer_2": ("<pad>", "</s>", "<unk>"),
}
VOCABULARY = len(WORDS) + 3
T5 = t5.Config(
    vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
    relative_attention_num_buckets=16, relative_attention_max_distance=LENGTH,
)  # fmt: skip
_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP = clip.Config(
    clip.TextConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, eos_token_id=1, **_TOWER
    ),
    clip.VisionConfig(image_size=shapes.SIDE, patch_size=8, **_TOWER),
    projection_dim=32,
)


def muon(name, steps):
    """The optimizer: Muon on matrices, including those of convolutions and stacked blocks, and Adam
    on the rest. The learning rate increases for a tenth of the steps, then follows a cosine.
    """
    rate = training.schedule(RATES[name], steps, max(steps // 10, 1))
    axes = {2: ((0,), 1), 3: ((1,), 2), 4: ((0, 1, 2), 3)}
    numbers = optax.contrib.MuonDimensionNumbers

    def which(parameters):
        inner = lambda path: "kernel" in path
        return {
            path: numbers(*axes[leaf.ndim]) if inner(path) and leaf.ndim > 1 else None
            for path, leaf in parameters.items()
        }

    adam = lambda count: 0.1 * rate(count)
    rule = optax.contrib.muon(
        rate, adam_b2=0.99, adam_learning_rate=adam, muon_weight_dimension_numbers=which
    )
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def images(key, n):
    """Scenes and the images of the scenes."""
    found = shapes.scenes(key, n)
    keys = jax.random.split(jax.random.fold_in(key, 1), n)
    return found, jax.vmap(shapes.draw)(keys, *found)


def partly(key, scenes, sparse=False):
    """Scenes in which some words are left out, at random; if `sparse`, every other word in half of
    the scenes. The number of a missing word is the one after the last word.
    """
    key_words, key_scenes = jax.random.split(key)
    often = jax.random.bernoulli(key_scenes, 0.5, scenes.shape.shape)
    unsaid = jnp.where(often, 0.5, 0.0) if sparse else jnp.full(often.shape, UNSAID)
    said = jax.random.bernoulli(key_words, 1 - unsaid, (4, len(often)))
    return shapes.Numbers(
        *(jnp.where(say, n, m) for say, n, m in zip(said, scenes, COUNTS, strict=True))
    )


def captions(of):
    """The token ids of all captions, with every word given or left out, of shape
    `(shapes + 1, colors + 1, places + 1, colors + 1, LENGTH)`.
    """
    table = np.zeros((*(n + 1 for n in COUNTS), LENGTH), np.int32)
    words = [
        [*known, None] for known in (shapes.SHAPES, shapes.COLORS, shapes.PLACES, shapes.COLORS)
    ]
    for at in np.ndindex(*table.shape[:-1]):
        scene = shapes.Scene(*(known[i] for known, i in zip(words, at, strict=True)))
        table[at] = of(shapes.caption(scene))
    return jnp.asarray(table)


class Contrast(eqx.Module):
    """The contrastive loss: `-log` of the probability of a caption's images, and of an image's
    captions, within a batch.
    """

    ids: jax.Array

    def __call__(self, network, key):
        key_images, key_words = jax.random.split(key)
        scenes, shown = images(key_images, BATCHES["clip"])
        said = partly(key_words, scenes)
        logits = network.temperature() * network.text(self.ids[said]) @ network.image(shown).T
        fits = jnp.ones(logits.shape, bool)
        for words, depicted, m in zip(said, scenes, COUNTS, strict=True):
            fits &= (words[:, None] == m) | (words[:, None] == depicted[None])
        contrast = lambda axis: jnp.mean(
            jax.nn.logsumexp(logits, axis)
            - jax.nn.logsumexp(jnp.where(fits, logits, -jnp.inf), axis)
        )
        return contrast(0) + contrast(1)


class Matching(eqx.Module):
    """The flow-matching loss at equal times, on latents that are computed once. With `maps`, half
    of the batch has the loss of maps through an intermediate time.
    """

    ids: jax.Array
    pooled: jax.Array
    latents: jax.Array
    scenes: shapes.Numbers
    maps: bool = eqx.field(static=True)

    def __call__(self, networks, key):
        velocity, encoder = networks
        keys = jax.random.split(key, 6)
        n = BATCHES["velocity"]
        which = jax.random.randint(keys[0], (n,), 0, IMAGES)
        said = partly(
            keys[1], shapes.Numbers(*(numbers[which] for numbers in self.scenes)), sparse=self.maps
        )
        data, pooled = self.latents[which].astype(jnp.float32), self.pooled[said]
        states = encoder(self.ids[said])
        noise = jax.random.normal(keys[2], data.shape)
        start = jax.nn.sigmoid(jax.random.normal(keys[3], (n,)))
        call = lambda x, start, end, rows: velocity(
            x, jnp.stack([start, end], axis=1), states[rows], pooled[rows], grid=GRID
        )
        if not self.maps:
            mix = start[:, None, None]
            output = call(mix * noise + (1 - mix) * data, start, start, slice(None))
            return jnp.mean((output - (noise - data)) ** 2)
        half, at = slice(None, n // 2), slice(n // 2, None)
        # From any time, often the noise, to any time, often the data.
        ends = jax.random.uniform(keys[4], (2, n // 2))
        often = jax.random.bernoulli(keys[5], jnp.asarray([[0.3], [0.5]]), (2, n // 2))
        above, below = jnp.where(often, jnp.asarray([[1.0], [0.0]]), jnp.sort(ends, axis=0)[::-1])
        between = below + (above - below) * jax.random.uniform(
            keys[4], (n // 2,), minval=0.25, maxval=0.75
        )
        start = start.at[at].set(above)
        mix = start[:, None, None]
        x = mix * noise + (1 - mix) * data
        place = lambda time: time[:, None, None]
        still = jax.lax.stop_gradient
        first = still(call(x[at], above, between, at))
        second = still(call(x[at] - place(above - between) * first, between, below, at))
        fraction = place((above - between) / jnp.maximum(above - below, 1e-3))
        target = jnp.concatenate([(noise - data)[half], fraction * first + (1 - fraction) * second])
        output = call(x, start, jnp.concatenate([start[half], below]), slice(None))
        return jnp.mean((output - target) ** 2)


def train_autoencoder(steps, folder):
    """The autoencoder's weights, with the mean and the width of the latents in its configuration.
    The loop is in Python, because XLA on a CPU is slow for convolutions in loops.
    """
    start, template = split_parameters(autoencoder.Autoencoder(AUTOENCODER, rngs=nnx.Rngs(0)))
    rule = muon("autoencoder", steps)

    def loss(arrays, key):
        key_images, key_noise = jax.random.split(key)
        network, (_, data) = template.merge(arrays), images(key_images, BATCHES["autoencoder"])
        mean, log_variance = network.moments(data)
        latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(key_noise, mean.shape)
        shape = jnp.any(jnp.abs(data - data[:, :1, :1]) > 0.02, axis=-1, keepdims=True)
        error = jnp.mean(jnp.where(shape, 4.0, 1.0) * (2 * (network.decode(latents) - data)) ** 2)
        return error + 1e-4 * jnp.mean(0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance))

    @jax.jit
    def step(arrays, average, memory, key, k):
        value, slope = jax.value_and_grad(loss)(arrays, key)
        change, memory = rule.update(slope, memory, arrays)
        arrays = optax.apply_updates(arrays, change)
        decay = jnp.minimum(0.995, (1 + k) / (10 + k))
        return (
            arrays,
            jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), average, arrays),
            memory,
            value,
        )

    arrays, average, memory, key = start, start, rule.init(start), jax.random.key(1)
    for k in range(steps):
        arrays, average, memory, value = step(
            arrays, average, memory, jax.random.fold_in(key, k), float(k)
        )
        if k % 100 == 99:
            print(f"autoencoder {k + 1}/{steps}: {float(value):.5f}", flush=True)
    network = template.merge(average)
    found, _ = jax.jit(network.moments)(images(jax.random.key(2), 1024)[1])
    save(
        folder / "vae",
        network,
        {
            "_class_name": "AutoencoderKL",
            "block_out_channels": AUTOENCODER.block_out_channels,
            "latent_channels": LATENTS,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": shapes.SIDE,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "scaling_factor": float(1 / found.std()),
            "shift_factor": float(found.mean()),
        },
    )


def save(folder, network, config, renames=None, stacked=()):
    """Write one part in the published layout, as 16-bit numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = state_dicts.to_state_dict(network, renames, stacked)
    files.write(
        folder / "model.safetensors",
        {name: np.asarray(array, np.float16) for name, array in arrays.items()},
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_tokenizers(folder):
    """Write tokenizers of whole lower-case words, for both encoders."""
    for name, special in SPECIAL.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        vocabulary = {word: i for i, word in enumerate((*special, *WORDS))}
        content = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        }
        (folder / name / "tokenizer.json").write_text(json.dumps(content, indent=1) + "\n")
        names = {
            "eos_token": special[1],
            "pad_token": special[0] if name == "tokenizer_2" else special[1],
        }
        names |= {"bos_token": special[0]} if name == "tokenizer" else {"model_max_length": LENGTH}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "use_dynamic_shifting": False,
                "shift": 1.0,
            },
            indent=1,
        )
        + "\n"
    )
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline"}, indent=1) + "\n"
    )


def train_clip(steps, folder):
    """Train both CLIP towers: FLUX.1 uses the text tower, a reward may use both."""
    ids = captions(prompts.clip_tokenizer(folder / "tokenizer", LENGTH))
    start = clip.CLIP(CLIP, rngs=nnx.Rngs(1))
    found = training.minimize(
        jax.random.key(3),
        start,
        Contrast(ids),
        steps=steps,
        optimizer=muon("clip", steps),
        ema=0.99,
    )
    tower = {**_TOWER, "hidden_act": "quick_gelu"}
    words = {
        **tower,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {**tower, "image_size": shapes.SIDE, "patch_size": 8}
    both = {
        "_class_name": "CLIPModel",
        "text_config": words,
        "vision_config": vision,
        "projection_dim": CLIP.projection_dim,
    }
    save(folder / "clip", found.average, both, stacked=clip.STACKED)
    save(
        folder / "text_encoder",
        found.average.text_model,
        {"_class_name": "CLIPTextModel", **words},
        stacked=clip.STACKED,
    )


def matching(folder, maps):
    """The loss of the last two stages, with latents of `images` drawn once, and the CLIP states of
    all captions.
    """
    coder, reader = loading.load("autoencoder", folder), loading.load("clip", folder)
    encode = jax.jit(
        lambda key, coder: [
            found := images(key, 256),
            coder.encode(found[1], key).astype(jnp.float16),
        ]
    )
    drawn = [encode(key, coder) for key in jax.random.split(jax.random.key(4), IMAGES // 256)]
    scenes, latents = jax.tree.map(
        lambda *parts: jnp.concatenate(parts), *[(found[0], latent) for found, latent in drawn]
    )
    ids = captions(prompts.clip_tokenizer(folder / "tokenizer", LENGTH))
    pooled = jax.jit(reader.pooled)(ids.reshape(-1, LENGTH)).reshape(*ids.shape[:-1], -1)
    words = captions(prompts.t5_tokenizer(folder / "tokenizer_2", LENGTH))
    return Matching(words, pooled, flux.packed(latents), scenes, maps)


def train_velocity(steps, folder):
    """Train the velocity, from random weights, together with its T5."""
    start = transformer.Transformer(VELOCITY, rngs=nnx.Rngs(2)), t5.T5(T5, rngs=nnx.Rngs(3))
    train_networks(
        "velocity", jax.random.key(5), start, matching(folder, False), steps, folder, ema=0.998
    )


def train_flow_map(steps, folder):
    """Train maps between any two times, from the velocity."""
    start = loading.load("transformer", folder), loading.load("t5", folder)
    train_networks(
        "flow_map", jax.random.key(6), start, matching(folder, True), steps, folder, ema=0.995
    )


def train_networks(name, key, start, loss, steps, folder, ema):
    """The common part of the last two stages: minimize, then write the transformer and T5."""
    rule = muon(name, steps)
    found = training.minimize(key, start, loss, steps=steps, optimizer=rule, ema=ema, progress=True)
    write_networks(folder, found.average)


def write_networks(folder, networks):
    velocity, encoder = networks
    config = {
        name: value
        for name, value in dataclasses.asdict(VELOCITY).items()
        if name != "out_channels"
    }
    save(
        folder / "transformer",
        velocity,
        {"_class_name": "FluxTransformer2DModel", **config},
        transformer.RENAMES,
        transformer.STACKED,
    )
    config = {
        "_class_name": "T5EncoderModel",
        **dataclasses.asdict(T5),
        "feed_forward_proj": "gated-gelu",
        "is_decoder": False,
    }
    save(folder / "text_encoder_2", encoder, config, t5.RENAMES, t5.STACKED)


def agreement(wanted, found):
    """The fraction of images in which `read` finds each word of the scene, and all words."""
    same = np.asarray(
        [
            [have is not None and a == b for a, b in zip(want, have or want, strict=True)]
            for want, have in zip(wanted, found, strict=True)
        ]
    )
    return dict(
        zip(
            (*shapes.Scene._fields, "all"),
            [*same.mean(axis=0), same.all(axis=1).mean()],
            strict=True,
        )
    )


def evaluate_autoencoder(folder, n):
    """The peak signal-to-noise ratio of images after the autoencoder, and the agreement of what
    `read` finds in them.
    """
    coder = loading.load("autoencoder", folder)
    scenes, drawn = images(jax.random.key(7), n)
    through = np.clip(jax.jit(lambda x, coder: coder.decode(coder.encode(x)))(drawn, coder), 0, 1)
    error = np.mean((through - np.asarray(drawn)) ** 2, axis=(1, 2, 3))
    return {
        "psnr": float(np.mean(-10 * np.log10(error))),
        **agreement(shapes.all_named(scenes), map(shapes.read, through)),
    }


def evaluate_clip(folder, n):
    """The fraction of images whose caption is the most similar of 64; the other 63 are of other
    scenes.
    """
    network, tokens = (
        clip.load(folder / "clip"),
        prompts.clip_tokenizer(folder / "tokenizer", LENGTH),
    )
    scenes, drawn = images(jax.random.key(8), n)
    ids = np.stack([tokens(shapes.caption(scene)) for scene in shapes.all_named(scenes)])
    similar = np.asarray(
        jax.jit(lambda network: network.image(drawn) @ network.text(jnp.asarray(ids)).T)(network)
    )
    found = [
        row[i] >= row[np.r_[i, (i + 1 + np.arange(63)) % n]].max() for i, row in enumerate(similar)
    ]
    return {"most_similar_of_64": float(np.mean(found))}


def evaluate_samples(folder, num, each, steps, leap):
    """The agreement of samples with `num` captions of whole scenes, `each` samples per caption."""
    velocity, coder = loading.load("transformer", folder), loading.load("autoencoder", folder)
    encoders = {"clip": loading.load("clip", folder), "t5": loading.load("t5", folder)}
    encoders |= {"clip_tokenizer": prompts.clip_tokenizer(folder / "tokenizer", LENGTH)}
    encoders |= {"t5_tokenizer": prompts.t5_tokenizer(folder / "tokenizer_2", LENGTH)}
    grid, wanted, found = (
        jnp.linspace(1e-3, 1.0, steps + 1),
        shapes.all_named(shapes.scenes(jax.random.key(9), num)),
        [],
    )
    decode = jax.jit(lambda model, x: jnp.clip(model.decode(x), 0, 1))
    for number, scene in enumerate(wanted):
        states, pooled = prompts.embed(shapes.caption(scene), **encoders)
        model = flux.FluxModel(
            velocity, states, pooled, height=shapes.SIDE, width=shapes.SIDE, autoencoder=coder
        )
        key = jax.random.fold_in(jax.random.key(10), number)
        drawn = tj.sample(
            key, model.leaping(grid) if leap else model, num=each, times=grid, solver=tj.Euler()
        ).x
        found += [shapes.read(image) for image in np.asarray(decode(model, drawn))]
    return agreement([scene for scene in wanted for _ in range(each)], found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the model (the package's own; with --quick one that is deleted)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of each stage, to see that it runs"
    )
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        train(settings.output or (Path(scratch) if settings.quick else PLACE), settings.quick)


def train(folder, quick):
    """Train every stage that is missing in the folder, and return the results of all stages."""
    steps, n = QUICK if quick else STEPS, 64 if quick else 1000
    write_tokenizers(folder)
    stages = {
        "autoencoder": (train_autoencoder, lambda: evaluate_autoencoder(folder, n)),
        "clip": (train_clip, lambda: evaluate_clip(folder, n)),
        "velocity": (train_velocity, lambda: evaluate_samples(folder, n // 4, 4, 28, False)),
        "flow_map": (train_flow_map, lambda: evaluate_maps(folder, n)),
    }
    record = folder / "trained.json"
    results = json.loads(record.read_text()) if record.is_file() else {}
    for name, (fit, evaluate) in stages.items():
        if name not in results:
            wall, cpu = time.perf_counter(), common.cpu_seconds()
            fit(steps[name], folder)
            seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": common.cpu_seconds() - cpu}
            results[name] = {"steps": steps[name], "batch": BATCHES[name], **seconds, **evaluate()}
            record.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results[name]), flush=True)
    results["bytes"] = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if not quick:
        common.write("train_tiny_flux", results)


def evaluate_maps(folder, n):
    """The evaluation of samples from one network, by its velocity and by its maps in few steps."""
    return {
        "velocity_28_steps": evaluate_samples(folder, n // 4, 4, 28, False),
        "map_4_steps": evaluate_samples(folder, n // 4, 4, 4, True),
        "map_1_step": evaluate_samples(folder, n // 4, 4, 1, True),
    }


if __name__ == "__main__":
    main()
