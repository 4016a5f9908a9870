"""The autoencoder against stored answers of the published one, and by itself.

Tiers: parity, to 1e-12 in float64 and to rounding (`flux_parts.rounding`) in float32; exact.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import flux_parts as parts

from tiltjax.images.networks import autoencoder
from tiltjax.pretrained import state_dicts

VALUES = parts.as_jax(parts.inputs())
IMAGES = jnp.asarray(parts.images(2, 6, 8, 3))
EXPECTED = parts.stored("autoencoder")


@pytest.fixture(scope="module")
def network():
    return parts.small_autoencoder()


def tolerance(network, expected, dtype):
    return parts.rounding(network, expected) if dtype == jnp.float32 else 1e-12


def decoded(network, latents, cotangent):
    def contracted(latents):
        images = network.decode(latents)
        return jnp.sum(images * cotangent), images

    return jax.grad(contracted, has_aux=True)(latents)


def encoded(network, images, cotangent):
    def contracted(images):
        mean, log_variance = network.moments(images)
        return jnp.sum(mean * cotangent), (mean, log_variance)

    return jax.grad(contracted, has_aux=True)(images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"param_dtype": jnp.float32},
        {"param_dtype": jnp.float64, "remat": True},
        {"param_dtype": jnp.float64, "chunk_size": 5},
    ],
    ids=["float32", "remat", "chunk_size"],
)
def test_images_and_gradients_are_the_published_ones(options):
    network = parts.small_autoencoder(**options)
    arguments = [VALUES[name].astype(options["param_dtype"]) for name in ("latents", "decoded")]
    gradient, images = jax.jit(decoded)(network, *arguments)
    assert images.dtype == gradient.dtype == options["param_dtype"]
    for found, name in ((images, "decoded"), (gradient, "decoded_gradient")):
        parts.close(found, EXPECTED[name], tolerance(network.decoder, EXPECTED[name], found.dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_moments_and_their_gradient_are_the_published_ones(dtype):
    network = parts.small_autoencoder(param_dtype=dtype)
    gradient, (mean, log_variance) = jax.jit(encoded)(
        network, IMAGES.astype(dtype), VALUES["mean"].astype(dtype)
    )
    found = {"mean": mean, "log_variance": log_variance, "mean_gradient": gradient}
    for name, array in found.items():
        parts.close(array, EXPECTED[name], tolerance(network.encoder, EXPECTED[name], dtype))


@pytest.mark.slow
def test_a_latent_is_the_scaled_mean_or_a_draw_about_it(network):
    key, x = jax.random.key(0), IMAGES[:1]
    got, draw = jax.jit(lambda network, x, key: (network.encode(x), network.encode(x, key)))(
        network, x, key
    )
    mean = (EXPECTED["mean"][:1] - 0.1159) * 0.3611
    parts.close_to_rounding(network.encoder, got, mean)
    noise = (np.asarray(draw) - mean) / 0.3611 / np.exp(EXPECTED["log_variance"][:1] / 2)
    # The error of a latent, divided by the smallest of the standard deviations that noise is.
    deviation = np.exp(EXPECTED["log_variance"][:1] / 2).min()
    allowed = 2 * parts.rounding(network.encoder, draw) / 0.3611 / deviation
    parts.close(noise, jax.random.normal(key, mean.shape, jnp.float32), allowed)
    with pytest.raises(TypeError, match="typed PRNG key"):
        network.encode(IMAGES, 0)


def test_one_image_is_a_row_of_a_batch(network):
    rows = jax.jit(lambda network, z: jax.vmap(network.decode)(z))(network, VALUES["latents"])
    parts.close_to_rounding(network.decoder, rows, EXPECTED["decoded"])
    single = jax.eval_shape(
        lambda z: network.encode(network.decode(z)[None, None]), VALUES["latents"][0]
    )
    assert single.shape == (1, 1, 3, 4, 4)


def test_it_computes_in_the_dtype_of_its_parameters_and_answers_in_that_of_its_input():
    narrow = jax.jit(lambda network, z: network.decode(z))(
        parts.small_autoencoder(param_dtype=jnp.bfloat16), VALUES["latents"]
    )
    assert narrow.dtype == jnp.float32
    difference = np.asarray(narrow) - EXPECTED["decoded"]
    assert (
        1e-4 < np.sqrt(np.mean(difference**2)) / np.sqrt(np.mean(EXPECTED["decoded"] ** 2)) < 0.02
    )


def test_remat_saves_less_and_chunks_hold_fewer_scores():
    def saved(network):
        pullback = jax.eval_shape(
            lambda z: jax.vjp(network.decode, z)[1], jnp.zeros((16, 16, 4), jnp.float32)
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert saved(parts.small_autoencoder(remat=True)) < 0.5 * saved(parts.small_autoencoder())

    def memory(network):
        attend = jax.grad(lambda x, attend: jnp.sum(attend(x)))
        x = jax.ShapeDtypeStruct((1, 16, 32, 16), jnp.float32)
        compiled = jax.jit(attend).lower(x, network.decoder.mid_block.attentions[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(parts.small_autoencoder(chunk_size=32)) < 0.25 * memory(parts.small_autoencoder())


def test_the_default_sizes_are_those_of_flux():
    abstract = nnx.eval_shape(
        lambda: autoencoder.Autoencoder(autoencoder.Config(), rngs=nnx.Rngs(0))
    )
    shapes = state_dicts.shapes(abstract)
    assert sum(map(np.prod, shapes.values())) == 83_819_683
    assert (len(shapes), abstract.config.factor) == (244, 8)
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    out = jax.eval_shape(
        lambda network, z: network.decode(z),
        abstract,
        jax.ShapeDtypeStruct((64, 64, 16), jnp.float32),
    )
    assert out.shape == (512, 512, 3)


def test_configurations():
    config = autoencoder.Config.from_json(parts.AUTOENCODER)
    assert config == autoencoder.Config(3, 3, 4, (8, 16), 1, 4, 0.3611, 0.1159)
    assert (
        autoencoder.Config.from_json({**parts.AUTOENCODER, "shift_factor": None}).shift_factor == 0
    )
    assert dataclasses.replace(config, block_out_channels=(8,)).factor == 1
    for name, value in (
        ("use_quant_conv", True),
        ("act_fn", "relu"),
        ("latents_mean", [0.0]),
        ("mid_block_add_attention", False),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 2),
    ):
        with pytest.raises(ValueError, match=f"{name} = .* is not implemented"):
            autoencoder.Config.from_json({**parts.AUTOENCODER, name: value})
    without = {
        name: value for name, value in parts.AUTOENCODER.items() if name != "use_post_quant_conv"
    }
    with pytest.raises(ValueError, match="use_post_quant_conv = True"):
        autoencoder.Config.from_json(without)


def test_what_it_refuses(network):
    with pytest.raises(ValueError, match=r"multiples of 2, got an image of 6 x 7"):
        network.encode(IMAGES[:, :, :7])
    with pytest.raises(ValueError, match=r"channels last, got \(3, 8, 6\)"):
        network.encode(IMAGES[0].T)
    with pytest.raises(ValueError, match=r"latents must be \(..., height, width, 4\)"):
        network.decode(VALUES["latents"][..., :3])
    bad = autoencoder.Config.from_json({**parts.AUTOENCODER, "norm_num_groups": 3})
    with pytest.raises(ValueError, match="8 channels must be a multiple of norm_num_groups = 3"):
        autoencoder.Autoencoder(bad, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        parts.small_autoencoder(chunk_size=0)


def test_the_single_file_form_has_other_names_and_convolutions_for_its_attention():
    theirs = {
        "encoder.conv_in.weight": "encoder.conv_in.weight",
        "encoder.down.1.block.0.norm1.weight": "encoder.down_blocks.1.resnets.0.norm1.weight",
        "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
        "encoder.mid.block_2.conv1.weight": "encoder.mid_block.resnets.1.conv1.weight",
        "encoder.mid.attn_1.norm.weight": "encoder.mid_block.attentions.0.group_norm.weight",
        "encoder.norm_out.bias": "encoder.conv_norm_out.bias",
        "decoder.mid.attn_1.q.weight": "decoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.to_out.0.bias",
        "decoder.up.0.block.1.nin_shortcut.weight": (
            "decoder.up_blocks.2.resnets.1.conv_shortcut.weight"
        ),
        "decoder.up.2.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
    }
    state_dict = {
        name: np.ones((2, 2, 1, 1)) if "attn" in name and "weight" in name else np.ones(2)
        for name in theirs
    }
    renamed = autoencoder.published(state_dict)
    assert list(renamed) == list(theirs.values())
    assert renamed["decoder.mid_block.attentions.0.to_q.weight"].shape == (2, 2)
    assert renamed.shape("decoder.mid_block.attentions.0.to_q.weight") == (2, 2)
    assert list(autoencoder.published(renamed)) == list(renamed)
