"""FLUX.1 as a model: one time convention, particles as a batch, the published grid, memory.

Tier: exact (identities against the network itself, float64), statistical for samples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.contracts import traced
from helpers.flux_fixtures import close, draws, stored
from helpers.flux_parts import small_transformer as network

import tiltjax as tj
from tiltjax.images import flux
from tiltjax.images.flux import FluxModel, Lookahead, packed, unpacked
from tiltjax.images.networks import autoencoder, layers
from tiltjax.images.networks.transformer import Config, Transformer

HEIGHT, WIDTH = 64, 48  # 4 x 3 tokens
WIDE = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def texts(dtype=jnp.float64):
    found = draws(2, text=(5, 24), pooled=(20,))
    return jnp.asarray(found["text"], dtype), jnp.asarray(found["pooled"], dtype)


def made(name="dev", **options):
    options = {"height": HEIGHT, "width": WIDTH, "dtype": jnp.float64, **options}
    return FluxModel(network(name, **WIDE), *texts(), **options)


def states(n, shape=(8, 6, 4)):
    return jnp.asarray(draws(3, x=(n, *shape))["x"], jnp.float64)


@jax.jit
def velocity(net, x, sigma, guidance):
    """What the network itself says of one state."""
    text, pooled = texts()
    strength = jnp.asarray([guidance])
    tokens = net(
        packed(x[None]), jnp.asarray(sigma)[None], text[None], pooled[None], strength, grid=(4, 3)
    )
    return unpacked(tokens, 8, 6)[0]


def test_packing_is_the_published_one_and_has_an_inverse():
    x = states(2)
    tokens = packed(x)
    assert tokens.shape == (2, 12, 16)
    # The token of row 1, column 2 holds a 2 x 2 patch, channel by channel.
    np.testing.assert_array_equal(
        tokens[1, 1 * 3 + 2].reshape(4, 2, 2), x[1, 2:4, 4:6].transpose(2, 0, 1)
    )
    np.testing.assert_array_equal(unpacked(tokens, 8, 6), x)


def test_the_denoiser_is_x_less_sigma_times_the_velocity():
    flow, x = made(guidance=2.0), states(1)[0]
    expected = velocity(network("dev", **WIDE), x, 0.7, 2.0)
    found = jax.jit(
        lambda flow: (flow.denoise(jnp.float64(0.3), x), flow.velocity(jnp.float64(0.3), x))
    )(flow)
    close(found[0], x - 0.7 * expected, 1e-12)
    # The drift of the flow in this library's time is against it.
    close(found[1], -expected, 1e-11)


def _scores(q, k, v):
    """A kernel as a user may bring one."""
    return layers.attention(q, k, v, scale=q.shape[-1] ** -0.5)


@pytest.mark.slow
def test_particles_are_rows_of_one_batch_for_kernels_that_need_it():
    net, x, t = network("dev", **WIDE, attention=_scores), states(3), jnp.asarray([0.2, 0.5, 0.9])
    flow = FluxModel(net, *texts(), height=HEIGHT, width=WIDTH, dtype=jnp.float64)
    gradient = jax.grad(lambda t, x: jnp.sum(flow.denoise(t, x) ** 2), argnums=1)
    # Attention is that of three samples of 3 heads and 17 tokens, not three times that of one:
    # forward and backward.
    program = jax.jit(jax.vmap(gradient)).lower(t, x).as_text()
    assert "tensor<3x3x17x17xf64>" in program
    assert "1x3x17x17" not in program
    one = jax.jit(lambda t, x: flow.denoise(t, x))
    alone = jnp.stack([one(*each) for each in zip(t, x, strict=True)])
    close(jax.jit(jax.vmap(one))(t, x), alone, 1e-11)
    # Left to `vmap`, JAX's own operations say the same.
    left = made()
    close(
        jax.jit(jax.vmap(gradient))(t, x),
        jax.jit(jax.vmap(jax.grad(lambda t, x: jnp.sum(left.denoise(t, x) ** 2), argnums=1)))(t, x),
        1e-10,
    )


def test_the_text_and_the_guidance_are_arguments_of_the_program():
    call, calls = traced(lambda flow, x: flow.denoise(jnp.float64(0.5), x))
    call, x = jax.jit(call), states(1)[0]
    text, pooled = texts()
    net = network("dev", **WIDE)
    first = call(FluxModel(net, text, pooled, height=HEIGHT, width=WIDTH, dtype=jnp.float64), x)
    other = call(
        FluxModel(net, -text, pooled, height=HEIGHT, width=WIDTH, guidance=1.0, dtype=jnp.float64),
        x,
    )
    assert len(calls) == 1
    assert np.abs(first - other).max() > 1e-3


def test_a_flow_map_at_equal_times_is_the_identity_and_its_rate_the_velocity():
    flow, x, t = made("dual"), states(1)[0], jnp.float64(0.4)
    call = jax.jit(lambda s: flow.flow_map(t, x, s))
    np.testing.assert_array_equal(call(t), x)
    step = 1e-7  # against waves that turn 1000 times as fast as time
    rate = (call(t + step) - call(t - step)) / (2 * step)
    close(rate, -velocity(network("dual", **WIDE), x, [0.6, 0.6], 3.5), 1e-6)


def test_a_flow_map_is_one_call_of_the_network_with_both_times():
    flow, x = made("dual", guidance=1.0), states(1)[0]
    expected = velocity(network("dual", **WIDE), x, [0.8, 0.0], 1.0)
    close(jax.jit(lambda flow: flow.flow_map(jnp.float64(0.2), x))(flow), x - 0.8 * expected, 1e-12)
    with pytest.raises(ValueError, match="adapters of a flow map"):
        made().flow_map(jnp.float64(0.2), x)


@pytest.mark.slow
def test_lookahead_forgets_as_much_as_it_says():
    flow, x, t, key = made("dual"), states(1)[0], jnp.float64(0.5), jax.random.key(0)
    np.testing.assert_allclose(
        jax.jit(lambda: Lookahead(flow).draw(key, t, x))(),
        jax.jit(lambda: flow.flow_map(t, x))(),
        atol=1e-12,
    )
    interpolant = flow.interpolant
    s = interpolant.time(interpolant.snr(t) / 5.0)
    assert float(s) == pytest.approx(0.5 / (0.5 + 5**0.5 * 0.5))
    # At a network that answers zero the map is the identity, and what is left is the noisier state
    # itself.
    still = FluxModel(
        jax.tree.map(jnp.zeros_like, network("dual", **WIDE)),
        *texts(),
        height=HEIGHT,
        width=WIDTH,
        dtype=jnp.float64,
    )
    noisy = jax.jit(lambda flow: Lookahead(flow, 5.0).draw(key, t, x))(still) - s / t * x
    spread = np.sqrt((1 - s) ** 2 - (s / t * 0.5) ** 2)
    np.testing.assert_allclose(noisy, spread * jax.random.normal(key, x.shape, x.dtype), atol=1e-12)
    with pytest.raises(ValueError, match=r"snr_factor must lie in \[1, "):
        Lookahead(flow, 0.5)
    with pytest.raises(ValueError, match="one time"):
        Lookahead(made())


@functools.cache
def coder():
    config = autoencoder.Config(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    return autoencoder.Autoencoder(config, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_verbs_run_on_it_and_images_come_out():
    flow = FluxModel(
        network("dual"), *texts(jnp.float32), height=HEIGHT, width=WIDTH, autoencoder=coder()
    )
    reward = lambda x: -jnp.mean(x**2)
    guided = tj.PlugIn(Lookahead(flow, 1.1), reward, scale=1.0, k=2)
    grid = flux.times(2, HEIGHT, WIDTH)
    found = tj.sample(jax.random.key(0), flow, guided, num=3, times=grid, solver=tj.Euler())
    assert found.x.shape == (3, 8, 6, 4)
    assert found.x.dtype == jnp.float32
    images = jax.jit(lambda flow, x: flow.decode(x))(flow, found.x)
    assert images.shape == (3, HEIGHT, WIDTH, 3)
    assert jax.eval_shape(flow.encode, images).shape == found.x.shape
    with pytest.raises(ValueError, match="has no autoencoder"):
        made().decode(found.x)


def test_the_grid_is_the_published_one():
    expected = stored("times")
    for size in (512, 1024):
        for steps in (4, 28):
            found = 1 - np.asarray(flux.times(steps, size, size, start=0.0))
            np.testing.assert_allclose(found, expected[f"{size}_{steps}"], atol=1e-7)
    np.testing.assert_allclose(
        flux.times(4, 512, 512, mu=0.0, start=0.0), [0, 0.25, 0.5, 0.75, 1], atol=1e-12
    )
    assert flux.times(4, 512, 512)[0] == 1e-3
    with pytest.raises(ValueError, match="use a smaller start"):
        flux.times(28, 512, 512, start=0.5)


@pytest.mark.slow
def test_the_full_size_lowers_without_memory():
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "remat": True}
    net = nnx.eval_shape(lambda: Transformer(Config(), **options, rngs=nnx.Rngs(0)))
    array = jax.ShapeDtypeStruct

    def gradient(net, text, pooled, x):
        flow = FluxModel(net, text, pooled, height=512, width=512)
        return jax.vmap(jax.grad(lambda x: jnp.sum(flow.denoise(jnp.float32(0.5), x) ** 2)))(x)

    text, pooled = array((512, 4096), jnp.bfloat16), array((768,), jnp.bfloat16)
    lowered = jax.jit(gradient).lower(net, text, pooled, array((2, 64, 64, 16), jnp.float32))
    assert jax.tree.leaves(lowered.out_info)[0].shape == (2, 64, 64, 16)
    # One block of each kind, forward and backward, not 57.
    assert len(lowered.as_text()) < 1_000_000


def test_wrong_sizes_and_texts_are_errors():
    with pytest.raises(ValueError, match=r"multiples of 16, got 500 x 512: use.* 496 x 512"):
        made(height=500, width=512)
    with pytest.raises(ValueError, match="multiples of 16"):
        flux.times(4, 512, 500)
    net, (text, pooled) = network("dev", **WIDE), texts()
    size = {"height": HEIGHT, "width": WIDTH}
    with pytest.raises(ValueError, match="text must have 24 entries"):
        FluxModel(net, text[:, :20], pooled, **size)
    with pytest.raises(ValueError, match="text must be finite"):
        FluxModel(net, text.at[0, 0].set(jnp.nan), pooled, **size)
    with pytest.raises(ValueError, match="no guidance embedding"):
        made("schnell", guidance=3.5)
    published = nnx.eval_shape(
        lambda: autoencoder.Autoencoder(autoencoder.Config(), rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match="latents of 4 channels, but the autoencoder has 16"):
        made(autoencoder=published)
    with pytest.raises(TypeError, match="transformer must be a Transformer"):
        FluxModel(coder(), text, pooled, **size)


def test_memory_is_that_of_the_parameters_and_says_what_reduces_it():
    needed = flux.memory(Config(), 512, 512)
    assert needed.parameters == 2 * 11_901_408_320
    # Less with remat, less without a gradient, more with larger images and with scores that are
    # saved.
    rest = [
        flux.memory(Config(), 512, 512, gradient=False),
        flux.memory(Config(), 512, 512, remat=True),
        needed,
        flux.memory(Config(), 1024, 1024),
        flux.memory(Config(), 1024, 1024, fused=False),
    ]
    assert sorted(rest) == rest
    flux.check_memory(needed, needed.total)
    with pytest.raises(
        MemoryError, match=r"about 39\.2 GiB are needed, 22\.2 GiB for parameters .*remat=True"
    ):
        flux.check_memory(needed, needed.total - 1)
    flux.check_memory(needed)  # a CPU does not say how much it has
