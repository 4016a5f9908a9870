"""How fast is FLUX.1-dev, guided and unguided, compared with the fastest matrix product of the
device?

    python -m benchmarks.images.flux_speed [--sizes 512 1024] [--attention cudnn] [--remat]
        [--peer] [--quick]

The network has two times, and random weights in bfloat16; nothing is downloaded. The ceiling is a
product of two bfloat16 matrices of side 8192, timed in the same run. Operations are counted from
shapes: two for each weight and token, and four n^2 d for the scores and values of n tokens of width
d in every block. For a gradient to the latents, including the forward pass, the operations of
weights count twice and those of attention three times. An image takes 28 steps and is decoded. A
guided image follows the published setting, with one draw for 5 of its steps. `--peer` times the
forward pass of `diffusers` in the same run, if it and PyTorch with a device are installed.
`--quick` runs a small network at 64 x 64 pixels as a test, and writes no numbers.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tiltjax as tj
from benchmarks import common
from tiltjax.images import flux, rewards
from tiltjax.images.networks import autoencoder, transformer

LENGTH = 512
STEPS, REPEATS = 28, 5
SMALL = transformer.Config(
    in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
    joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12), dual_time=True,
)  # fmt: skip
SMALL_CODER = autoencoder.Config(
    block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8
)


def seconds(call, repeats=REPEATS):
    """The wall seconds of the first call, mostly compilation, and the median of later calls."""
    walls = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call(jax.random.key(seed)))
        walls.append(time.perf_counter() - start)
    return walls[0], statistics.median(walls[1:])


def ceiling(side):
    """The operations per second of a large product in bfloat16."""
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * side**3 / seconds(lambda key: product(a, b), 20)[1]


def operations(config, tokens):
    """The operations of a forward pass over this number of text and image tokens, and those of a
    forward pass with a gradient to its input.
    """
    d = config.width
    double, single = config.num_layers, config.num_single_layers
    weights, attention = (
        2 * tokens * 12 * d * d * (double + single),
        4 * tokens**2 * d * (double + single),
    )
    return weights + attention, 2 * weights + 3 * attention


def networks(config, coder, settings):
    """A model with random weights on the device, and a random text."""
    options = {
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.bfloat16,
        "remat": settings.remat,
        "attention": settings.attention,
    }
    # One program, so that no second copy of a parameter remains.
    network = jax.jit(lambda: transformer.Transformer(config, **options, rngs=nnx.Rngs(0)))()
    decoder = jax.jit(
        lambda: autoencoder.Autoencoder(coder, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    )()
    text = jax.random.normal(jax.random.key(2), (LENGTH, config.joint_attention_dim), jnp.bfloat16)
    pooled = jax.random.normal(jax.random.key(3), (config.pooled_projection_dim,), jnp.bfloat16)
    return lambda size: flux.FluxModel(
        network, text, pooled, height=size, width=size, autoencoder=decoder
    )


def measured(model, size, top):
    """A row of the table."""
    config, batch = model.parts.transformer.config, jax.vmap
    tokens = int(np.prod(model.shape[:2])) // 4 + LENGTH
    x = jax.random.normal(jax.random.key(4), (1, *model.shape))
    t = jnp.asarray(0.4)
    forward = jax.jit(lambda model, x: batch(model.denoise, (None, 0))(t, x))
    # The gradient of a sum of squares, including the forward pass, as in a guidance.
    pulled = jax.jit(
        lambda model, x: jax.grad(lambda x: jnp.sum(batch(model.denoise, (None, 0))(t, x) ** 2))(x)
    )
    decode = jax.jit(lambda model, x: jnp.clip(model.decode(x), 0, 1))
    grid = flux.times(STEPS, size, size)
    plain = {"model": model.leaping(grid), "times": grid, "solver": tj.Euler()}
    work, with_gradient = operations(config, tokens)
    rows = {
        "forward": (lambda key: forward(model, x), work),
        "gradient": (lambda key: pulled(model, x), with_gradient),
        "decode": (lambda key: decode(model, x), None),
        "image": (lambda key: decode(model, tj.sample(key, num=1, **plain).x), STEPS * work),
        "guided_image": (
            lambda key: decode(model, flux.published(key, model, rewards.blueness, grid=grid).x),
            STEPS * work + 5 * with_gradient,
        ),
    }
    found = {}
    for name, (call, count) in rows.items():
        first, later = seconds(call)
        found[name] = {"first_s": first, "s": later}
        if count is not None:
            found[name] |= {
                "tflops": count / later / 1e12,
                "fraction_of_ceiling": count / later / top,
            }
        print(
            f"{size:>5} {name:>14} {later:9.4f} s   first {first:6.1f} s   "
            f"{found[name].get('fraction_of_ceiling', float('nan')):6.1%} of the ceiling",
            flush=True,
        )
    return {
        "size": size,
        "tokens": tokens,
        "tflop_forward": work / 1e12,
        **found,
        "peak_gb": peak_gb(),
    }


def peak_gb():
    """The peak memory of the device since the process began, or of the process if it is unknown."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else common.peak_gb()


def peer(config, sizes):
    """The seconds of a forward pass of the published class in bfloat16, with random weights."""
    try:
        import torch
        from diffusers import FluxTransformer2DModel
    except ImportError as error:
        return {"absent": str(error)}
    if not torch.cuda.is_available():
        return {"absent": "PyTorch sees no device"}
    names = (
        "num_layers",
        "num_single_layers",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
    )
    with torch.device("cuda"):
        network = (
            FluxTransformer2DModel(**{name: getattr(config, name) for name in names})
            .to(torch.bfloat16)
            .eval()
        )
    found = {}
    for size in sizes:
        n = (size // 16) ** 2
        make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        inputs = {
            "hidden_states": make(1, n, config.in_channels),
            "encoder_hidden_states": make(1, LENGTH, config.joint_attention_dim),
            "pooled_projections": make(1, config.pooled_projection_dim),
            "timestep": make(1).abs(),
            "guidance": make(1).abs(),
            "img_ids": torch.zeros(n, 3, device="cuda"),
            "txt_ids": torch.zeros(LENGTH, 3, device="cuda"),
        }
        walls = []
        with torch.no_grad():
            for _ in range(REPEATS + 1):
                torch.cuda.synchronize()
                start = time.perf_counter()
                network(**inputs)
                torch.cuda.synchronize()
                walls.append(time.perf_counter() - start)
        found[str(size)] = statistics.median(walls[1:])
    return found


def main():
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument(
        "--attention",
        choices=("xla", "cudnn"),
        default="cudnn" if jax.default_backend() == "gpu" else "xla",
    )
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--quick", action="store_true")
    settings = parser.parse_args()
    if jax.default_backend() == "cpu" and not settings.quick:
        print("this needs an accelerator: nothing is measured here (--quick runs a small network)")
        return
    config = SMALL if settings.quick else transformer.Config(dual_time=True)
    coder = SMALL_CODER if settings.quick else autoencoder.Config()
    sizes = [64] if settings.quick else settings.sizes
    if not settings.quick:
        largest = max(sizes)
        flux.check_memory(
            flux.memory(
                config, largest, largest, remat=settings.remat, fused=settings.attention != "xla"
            )
        )
    top = ceiling(512 if settings.quick else 8192)
    print(f"a large product: {top / 1e12:.2f} TFLOP/s on {jax.devices()[0].device_kind}")
    at = networks(config, coder, settings)
    rows = [measured(at(size), size, top) for size in sizes]
    results = {"settings": vars(settings), "ceiling_tflops": top / 1e12, "rows": rows}
    if settings.peer:
        results["diffusers_forward_s"] = peer(config, sizes)
        print("diffusers, forward:", results["diffusers_forward_s"])
    if not settings.quick:
        common.write("flux_speed", results)


if __name__ == "__main__":
    main()
