"""The autoencoder against `diffusers`, live: names, whole, block by block; the stored answers
against what it says today.

Run by `make test-parity`, in an environment of its own.
"""

import re

import flux_parts_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from flax import nnx
from helpers import flux_parts as parts

from tiltjax.images.networks import autoencoder
from tiltjax.pretrained import state_dicts

BLOCKS = {
    "encoder.conv_in": (6, 8, 3),
    "encoder.down_blocks.0": (6, 8, 8),
    "encoder.down_blocks.1": (6, 8, 8),
    "encoder.mid_block": (3, 4, 16),
    "encoder.mid_block.attentions.0": (3, 4, 16),
    "decoder.mid_block.resnets.1": (3, 4, 16),
    "decoder.up_blocks.0": (3, 4, 16),
    "decoder.up_blocks.1": (6, 8, 16),
    "decoder.conv_norm_out": (6, 8, 8),
}


@pytest.fixture(scope="module")
def theirs():
    return reference.autoencoder_model()


@pytest.fixture(scope="module")
def network():
    return parts.small_autoencoder()


def inside(network, path: str):
    for part in path.split("."):
        network = network[int(part)] if part.isdigit() else getattr(network, part)
    return network


def test_names_shapes_and_weights(theirs, network):
    model, state_dict = theirs
    assert state_dicts.shapes(network) == {
        name: tuple(array.shape) for name, array in model.state_dict().items()
    }
    for name, array in state_dicts.to_state_dict(network).items():
        np.testing.assert_array_equal(array, state_dict[name])


@pytest.mark.parametrize("path", BLOCKS)
def test_blocks_and_their_gradients(path, theirs, network):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *BLOCKS[path])).astype(np.float32)
    inputs = reference.first(x).requires_grad_()
    expected = inside(theirs[0], path)(inputs, *[None] * (".resnets." in path))  # no time
    probe = rng.normal(size=expected.shape).astype(np.float32)
    (expected * torch.from_numpy(probe)).sum().backward()
    block = inside(network, path)
    got, pullback = jax.jit(lambda x: jax.vjp(block, x))(jnp.asarray(x))
    gradient = pullback(jnp.asarray(probe.transpose(0, 2, 3, 1)))[0]
    parts.close_to_rounding(block, got, reference.last(expected))
    parts.close_to_rounding(block, gradient, reference.last(inputs.grad))


def test_the_whole_in_single_precision(network):
    expected, values = reference.autoencoder(), parts.as_jax(parts.inputs())
    decoded, pullback = jax.jit(lambda z: jax.vjp(network.decode, z))(values["latents"])
    gradient = pullback(values["decoded"])[0]
    parts.close_to_rounding(network.decoder, decoded, expected["decoded"])
    parts.close_to_rounding(network.decoder, gradient, expected["decoded_gradient"])
    images = jnp.asarray(parts.images(2, 6, 8, 3))
    mean, pullback, log_variance = jax.jit(lambda x: jax.vjp(network.moments, x, has_aux=True))(
        images
    )
    gradient = pullback(values["mean"])[0]
    parts.close_to_rounding(network.encoder, mean, expected["mean"])
    parts.close_to_rounding(network.encoder, log_variance, expected["log_variance"])
    parts.close_to_rounding(network.encoder, gradient, expected["mean_gradient"])


def test_stored_answers_are_those_of_today():
    found, expected = parts.stored("autoencoder"), reference.autoencoder(torch.float64)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        parts.close(found[name], array, 1e-12)


def original(name: str) -> str:
    """A published name in the single-file form, of two levels."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{1 - int(match[1])}", name)
    for theirs, ours in (
        (r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}"),
        (r"down_blocks", "down"),
        (r"resnets", "block"),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ):
        name = re.sub(theirs, ours, name)
    return name


def test_the_single_file_form(theirs):
    _, state_dict = theirs
    form = {
        original(name): array[..., None, None]
        if ".attentions." in name and array.ndim == 2
        else array
        for name, array in state_dict.items()
    }
    config = {name: value for name, value in parts.AUTOENCODER.items() if not name.startswith("_")}
    converted = convert_ldm_vae_checkpoint(
        {name: torch.from_numpy(array) for name, array in form.items()}, config
    )
    assert converted.keys() == state_dict.keys()  # the form is theirs
    ours = autoencoder.published(form)
    assert ours.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(ours[name], array)


def test_the_default_is_the_published_size():
    config = {
        **parts.AUTOENCODER,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    }
    config |= {"latent_channels": 16, "norm_num_groups": 32}
    config |= {
        f"{way}_block_types": [config[f"{way}_block_types"][0]] * 4 for way in ("down", "up")
    }
    assert autoencoder.Config.from_json(config) == autoencoder.Config()
    with torch.device("meta"):
        model = AutoencoderKL(
            **{name: value for name, value in config.items() if not name.startswith("_")}
        )
    expected = {name: tuple(array.shape) for name, array in model.state_dict().items()}
    assert (len(expected), sum(map(np.prod, expected.values()))) == (244, 83_819_683)


def test_what_a_file_leaves_out_is_the_default_of_the_published_class():
    without = {"use_quant_conv": False, "use_post_quant_conv": False}
    model, config = AutoencoderKL(**without), autoencoder.Config.from_json(without)
    abstract = nnx.eval_shape(lambda: autoencoder.Autoencoder(config, rngs=nnx.Rngs(0)))
    assert state_dicts.shapes(abstract) == {
        name: tuple(array.shape) for name, array in model.state_dict().items()
    }
    assert (config.scaling_factor, config.shift_factor) == (model.config.scaling_factor, 0)
