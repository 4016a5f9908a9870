"""The FLUX.1 transformer against what the published implementation says, stored, and against itself
under every option.

Tier: parity (to rounding in float32), exact (options, float64).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.contracts import on_eight_devices
from helpers.flux_fixtures import GRID, TEXT_LENGTH, TRANSFORMERS, close, stored, transformer_inputs
from helpers.flux_parts import close_to_rounding
from helpers.flux_parts import small_transformer as network

from tiltjax.images.networks import embeddings
from tiltjax.images.networks.transformer import Config, Transformer


def arguments(name, dtype=jnp.float32):
    inputs = {key: jnp.asarray(array, dtype) for key, array in transformer_inputs(name).items()}
    guidance = inputs["guidance"] if TRANSFORMERS[name]["guidance_embeds"] else None
    return (
        inputs["tokens"],
        (inputs["sigma"], inputs["text"], inputs["pooled"], guidance),
        inputs["cotangent"],
    )


@jax.jit
def call(net, *arrays):
    return net(*arrays, grid=GRID)


@jax.jit
def _both(net, tokens, rest, cotangent):
    output, pullback = jax.vjp(lambda x: net(x, *rest, grid=GRID), tokens)
    return output, pullback(cotangent.astype(output.dtype))[0]


def both(net, name, dtype=jnp.float32):
    """Output and gradient."""
    return _both(net, *arguments(name, dtype))


def block(stack, i):
    return jax.tree.map(lambda leaf: leaf[i], stack)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_output_and_gradient_are_the_published_ones(name):
    expected = stored(f"transformer_{name}")
    output, gradient = both(network(name), name)
    close_to_rounding(network(name), output, expected["output"])
    close_to_rounding(network(name), gradient, expected["gradient"])


def test_each_kind_of_block_is_the_published_one():
    expected = {key: jnp.asarray(array) for key, array in stored("transformer_dev").items()}
    net = network("dev")
    rotation = embeddings.rotations(net.config.axes_dims_rope, TEXT_LENGTH, GRID, jnp.float32)
    of = lambda kind, *parts: [expected[f"{kind}.{part}"] for part in parts]
    image, text, temb = of("transformer_blocks", "hidden_states", "encoder_hidden_states", "temb")
    apply = jax.jit(lambda block, *arrays: block(*arrays, rotation, "xla"))
    image, text = apply(block(net.transformer_blocks, 0), image, text, temb)
    double = net.transformer_blocks
    close_to_rounding(double, image, expected["transformer_blocks.image_out"])
    close_to_rounding(double, text, expected["transformer_blocks.text_out"])
    image, text, temb = of(
        "single_transformer_blocks", "hidden_states", "encoder_hidden_states", "temb"
    )
    both = apply(block(net.single_transformer_blocks, 0), jnp.concatenate([text, image], 1), temb)
    single, text, image = net.single_transformer_blocks, *jnp.split(both, [TEXT_LENGTH], axis=1)
    close_to_rounding(single, text, expected["single_transformer_blocks.text_out"])
    close_to_rounding(single, image, expected["single_transformer_blocks.image_out"])


def test_equal_embedders_at_equal_times_are_one_embedder():
    net, single = nnx.clone(network("dual")), network("dev")
    dual = net.time_text_embed
    dual.original_embedder = dual.second_embedder = single.time_text_embed
    for part in (
        "x_embedder",
        "context_embedder",
        "transformer_blocks",
        "single_transformer_blocks",
    ):
        setattr(net, part, getattr(single, part))
    net.norm_out, net.proj_out = single.norm_out, single.proj_out
    tokens, (sigma, *rest), _ = arguments("dev")
    pair = jnp.stack([sigma, sigma], axis=1)
    expected = call(single, tokens, sigma, *rest)
    close_to_rounding(net, call(net, tokens, pair, *rest), expected)


def manual(q, k, v):
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"remat": True, "attention": manual}, {"remat": jax.checkpoint_policies.dots_saveable}],
    ids=["remat and attention", "policy"],
)
def test_options_change_how_not_what(options):
    exact = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    plain, other = network("dev", **exact), network("dev", **exact, **options)
    for a, b in zip(both(plain, "dev", jnp.float64), both(other, "dev", jnp.float64), strict=True):
        close(a, b, 1e-11)


def test_the_program_is_as_long_for_many_blocks_as_for_few():
    def lines(n):
        config = dataclasses.replace(
            Config.from_json(TRANSFORMERS["dev"]), num_layers=n, num_single_layers=2 * n
        )
        net = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
        tokens, rest, _ = arguments("dev")
        return len(call.lower(net, tokens, *rest).as_text().splitlines())

    assert lines(2) == lines(19)


def test_blocks_are_applied_in_their_order():
    net = network("dev")
    swapped = nnx.clone(net)
    swapped.single_transformer_blocks = jax.tree.map(
        lambda leaf: leaf[::-1], net.single_transformer_blocks
    )
    tokens, rest, _ = arguments("dev")
    assert np.abs(call(net, tokens, *rest) - call(swapped, tokens, *rest)).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_is_within_two_percent_and_rounding_times_is_not():
    expected = stored("transformer_dev")["output"]
    error = lambda output: np.sqrt(
        np.mean((np.asarray(output, np.float32) - expected) ** 2) / np.mean(expected**2)
    )
    tokens, rest, _ = arguments("dev")
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    output = call(network("dev", **half), tokens, *rest)
    assert output.dtype == jnp.bfloat16
    assert error(output) < 0.02
    assert error(call(network("dev", **half, timestep_dtype=jnp.bfloat16), tokens, *rest)) > 0.02


def test_one_text_serves_a_batch():
    net = network("dev")
    tokens, (sigma, text, pooled, guidance), _ = arguments("dev")
    every = lambda array: jnp.repeat(array[:1], 2, axis=0)
    expected = call(net, tokens, sigma, every(text), every(pooled), guidance)
    close_to_rounding(net, call(net, tokens, sigma, text[:1], pooled[:1], guidance), expected)


def test_wrong_shapes_and_a_missing_guidance_are_errors():
    net = network("dev")
    tokens, (sigma, text, pooled, guidance), _ = arguments("dev")
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 12, 16\), expected \(2, 9, 16\)"):
        net(tokens, sigma, text, pooled, guidance, grid=(3, 3))
    with pytest.raises(ValueError, match=r"sigma has shape \(1,\), expected \(2,\)"):
        net(tokens, sigma[:1], text, pooled, guidance, grid=GRID)
    with pytest.raises(ValueError, match=r"text has shape \(2, 20\), expected \(2, 24\)"):
        net(tokens, sigma, text[..., :20], pooled, guidance, grid=GRID)
    with pytest.raises(ValueError, match="pass guidance"):
        net(tokens, sigma, text, pooled, grid=GRID)
    with pytest.raises(ValueError, match="guidance=None"):
        network("schnell")(tokens, sigma, text, pooled, guidance, grid=GRID)


def test_wrong_configurations_and_options_are_errors():
    with pytest.raises(ValueError, match="unknown num_layer;"):
        Config.from_json({"num_layer": 3})
    with pytest.raises(ValueError, match="add up to attention_head_dim = 128"):
        Config(axes_dims_rope=(16, 16, 16))
    with pytest.raises(ValueError, match="patch_size must be 1"):
        Config(patch_size=2)
    with pytest.raises(ValueError, match="attention must be"):
        network("dev", attention="flash")
    published = {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "axes_dims_rope": [16, 56, 56],
    }
    assert Config.from_json(published) == dataclasses.replace(Config(), guidance_embeds=False)


@pytest.mark.slow
def test_a_mesh_of_eight_gives_the_gradient_of_one_device():
    run = on_eight_devices("""
        import sys; sys.path[:0] = ["tests", "tests/images"]
        import jax
        from helpers.flux_fixtures import stored, weights
        from helpers.flux_parts import close_to_rounding
        from test_transformer import _both, arguments, network
        from tiltjax.images.networks import transformer
        from tiltjax.pretrained.state_dicts import from_state_dict, shapes
        axis_types = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=axis_types)
        plain = network("dev")
        published = weights(shapes(plain, transformer.RENAMES, transformer.STACKED))
        placed = from_state_dict(
            plain, published, renames=transformer.RENAMES, stacked=transformer.STACKED,
            sharding=transformer.sharded(mesh),
        )
        kernel = placed.transformer_blocks.ff.up.kernel
        assert kernel.sharding.spec == jax.P(None, "data", "model"), kernel.sharding
        assert kernel.addressable_shards[0].data.size * 8 == kernel.size
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(placed))
        each = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
        rows = jax.NamedSharding(mesh, jax.P("data"))
        tokens, rest, cotangent = jax.device_put(arguments("dev"), rows)
        output, gradient = _both(placed, tokens, rest, cotangent)
        expected = stored("transformer_dev")
        print(each / whole)
        close_to_rounding(plain, output, expected["output"])
        close_to_rounding(plain, gradient, expected["gradient"])
    """)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[0]) < 0.2  # of the bytes, on one device
