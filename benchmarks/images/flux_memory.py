"""How much memory does FLUX.1-dev need on each of 1, 2, 4 and 8 devices?

    python -m benchmarks.images.flux_memory [--size 512] [--particles 2] [--no-remat] [--quick]

Nothing is allocated. The network of 12 billion parameters is built abstractly, lowered and compiled
for virtual devices, and the compiler reports the memory of each device. Parameters are bfloat16 and
divided on both axes of the mesh (`transformer.sharded`); particles are divided on its axis `data`.

The memory of the parameters is exact on any machine. The memory of the computation is that of the
CPU's compiler. Its matrix products are float32, so that it first copies all parameters, with twice
their bytes; these copies are left out of `computed`. (A program compiled entirely in float32 has no
copies, and its remaining memory agrees.) Its attention saves the scores. `estimate` is
`flux.memory` for a GPU with fused attention.
"""

import argparse
import os
import time

DEVICES = 8
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks import common  # noqa: E402  the flags above are read when JAX is imported
from tiltjax.images import flux  # noqa: E402
from tiltjax.images.networks import transformer  # noqa: E402

GIB = 2**30
LENGTH = 512
# Devices on the axes (data, model).
MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}


def network(mesh, remat):
    """FLUX.1-dev as abstract arrays with their shardings."""
    config = transformer.Config()
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "remat": remat}
    abstract = nnx.eval_shape(lambda: transformer.Transformer(config, **options, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    place = transformer.sharded(mesh)

    def placed(path, variable):
        leaf = variable.get_value()
        return variable.replace(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path, leaf))
        )

    flat = [(path, placed(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def compiled(n, size, particles, remat, gradient):
    """The bytes of arguments and of buffers on one of n devices, and the seconds of tracing and
    lowering, and of compilation.
    """
    mesh = jax.make_mesh(
        MESHES[n],
        ("data", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:n],
    )
    net, grid = network(mesh, remat), (size // 16, size // 16)
    rows, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    array = lambda shape, dtype, where: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    arrays = (
        array((particles, grid[0] * grid[1], net.config.in_channels), jnp.float32, rows),
        array((particles,), jnp.float32, rows),
        array((1, LENGTH, net.config.joint_attention_dim), jnp.bfloat16, everywhere),
        array((1, net.config.pooled_projection_dim), jnp.bfloat16, everywhere),
        array((particles,), jnp.float32, rows),
    )

    def forward(net, tokens, *rest):
        return net(tokens, *rest, grid=grid).astype(jnp.float32)

    def pulled(net, tokens, *rest):
        return jax.grad(lambda x: jnp.sum(forward(net, x, *rest) ** 2))(tokens)

    start = time.perf_counter()
    lowered = jax.jit(pulled if gradient else forward, out_shardings=rows).lower(net, *arrays)
    middle = time.perf_counter()
    found = lowered.compile().memory_analysis()
    end = time.perf_counter()
    return found.argument_size_in_bytes, found.temp_size_in_bytes, middle - start, end - middle


def main():
    """Print the table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512, help="of the image")
    parser.add_argument("--particles", type=int, default=2)
    parser.add_argument(
        "--no-remat", action="store_true", help="save everything inside of a block for the gradient"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one and eight devices, without gradients; nothing is written",
    )
    settings = parser.parse_args()
    remat = not settings.no_remat
    estimate = lambda **more: flux.memory(
        transformer.Config(), settings.size, settings.size, chunk_size=settings.particles, **more
    )
    whole = estimate().parameters
    print(
        f"FLUX.1-dev, {whole // 2:,} parameters, {whole / GIB:.1f} GiB in bfloat16; "
        f"{settings.particles} particles of {settings.size} x {settings.size}"
    )
    print(
        f"{'devices':>7} {'mesh':>6} {'what':>9} {'arguments':>10} {'computed':>10} "
        f"{'estimate':>10}   GiB on each; lowering and compilation, s"
    )
    results = []
    meshes = {n: MESHES[n] for n in (1, 8)} if settings.quick else MESHES
    for n, shape in meshes.items():
        for gradient in (False,) if settings.quick else (False, True):
            arguments, buffers, lowering, compiling = compiled(
                n, settings.size, settings.particles, remat, gradient
            )
            computed = buffers - 2 * (whole // n)  # without the copies
            fused = estimate(gradient=gradient, remat=remat).activations / n
            what, mesh = "gradient" if gradient else "forward", f"{shape[0]} x {shape[1]}"
            print(
                f"{n:>7} {mesh:>6} {what:>9} {arguments / GIB:>10.2f} {computed / GIB:>10.2f} "
                f"{fused / GIB:>10.2f}"
                f"   {lowering:.1f} {compiling:.1f}",
                flush=True,
            )
            results.append(
                {
                    "devices": n,
                    "mesh": shape,
                    "gradient": gradient,
                    "argument_bytes": arguments,
                    "buffer_bytes": buffers,
                    "computed_bytes": computed,
                    "estimated_activation_bytes": int(fused),
                    "lowering_s": lowering,
                    "compiling_s": compiling,
                }
            )
    if not settings.quick:
        found = {name: value for name, value in vars(settings).items() if name != "quick"}
        common.write(
            "flux_memory", {"settings": found, "parameter_bytes": whole, "results": results}
        )


if __name__ == "__main__":
    main()
