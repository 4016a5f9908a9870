"""How fast does a network train, and how good is it after its training steps?

The velocity network of 4 x 256 units is trained on the checkerboard by flow matching, with batches
of 4096 new exact samples. Each number of steps is a separate run with its own schedule, by Muon at
a rate of .05, with times `1 - U^2`, which are denser where the squares have their edges. Reported
are steps and CPU-seconds per step, without compilation, and the arithmetic per second, next to that
of one bare product of 4096 x 256 by 256 x 256 matrices, which bounds it. Of 20,000 unguided
samples, the share in filled squares is compared with that of the exact denoiser at the same solver
steps (what that share lacks of 1 is the solver's error). The excess of the loss over the exact
model's loss on the same draws is the mean square of the velocity's error.

With `--reference CHECKOUT`, a checkout of the published PyTorch code
(github.com/sanjitdp/reward-guidance) in an environment with torch, matplotlib and tqdm, both codes
train alternately, three rounds each. They run in processes as a user starts them, and the seconds
per step are those of additional steps. The published network has a fifth hidden layer; ours has it
too in this comparison, and both use Adam. A run without the option keeps the last measurement. An
earlier record of the published code is 22.9 steps per second on two idle cores, possibly of another
machine.

    python -m benchmarks.training.training [--quick] [--steps 10000]
        [--reference CHECKOUT --python OTHER_PYTHON]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx

import tiltjax as tj
from benchmarks import common

BATCH = 4096
RECORDED = {
    "steps_per_second": 22.9,
    "what": "published PyTorch code, two idle cores, recorded earlier",
}
OURS = """
import sys, jax, tiltjax as tj
from flax import nnx
board = tj.models.Checkerboard()
network = tj.training.networks.Velocity(board.shape, depth=5, rngs=nnx.Rngs(0))
data = lambda key: board.sample(key, 4096)
tj.fit(jax.random.key(0), network, data, steps=int(sys.argv[1]),
       interpolant=board.interpolant, batched=True)
"""


def velocity(
    board: tj.models.Checkerboard, steps: int, checkpoint: Path | None = None
) -> tj.training.Fit:
    """The network of 4 x 256 units after this number of steps."""
    # A new function each time, so that every run compiles.
    data = lambda key: board.sample(key, BATCH)
    network = tj.training.networks.Velocity(board.shape, rngs=nnx.Rngs(0))
    rate = tj.training.schedule(0.05, steps, steps // 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(rate, adam_b2=0.99))
    settings = {
        "interpolant": board.interpolant,
        "batched": True,
        "progress": steps > 1,
        "checkpoint": checkpoint,
    }
    return tj.fit(
        jax.random.key(1),
        network,
        data,
        steps=steps,
        optimizer=optimizer,
        time_sampler=late,
        **settings,
    )


def late(key: jax.Array) -> jax.Array:
    """A time from a law with more times near the data."""
    return 1 - jax.random.uniform(key) ** 2


def gigaflops(network: tj.training.networks.Velocity) -> float:
    """The GFLOP of a step: forward, backward to the weights and, except for the first layer, to the
    input. Elementwise work is not counted.
    """
    sizes = [layer.kernel.size for layer in (*network.layers, network.last)]
    return 2 * BATCH * (3 * sum(sizes) - sizes[0]) / 1e9


def bare_product() -> float:
    """The GFLOP/s of one product of the hidden layers' size."""
    x, w = jnp.ones((BATCH, 256)), jnp.ones((256, 256))
    many = jax.jit(lambda x, w: jax.lax.fori_loop(0, 50, lambda _, x: x @ w * (1 / 256), x))
    timing = common.timed(lambda seed: many(x + seed, w))
    return 50 * 2 * BATCH * 256**2 / timing.run_wall / 1e9


def process(command: list[str], folder: Path) -> tuple[float, float]:
    """The wall and CPU seconds of a process."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        time.perf_counter() - wall,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def side_by_side(checkout: Path, python: str, steps: int, rounds: int = 3) -> dict:
    """The wall and CPU seconds per step of both codes, run alternately."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = lambda n: [
            python,
            str(checkout / "checkerboard" / "train.py"),
            "--num-steps",
            str(n),
            "--output-dir",
            f"{folder}/results",
        ]
        ours = lambda n: [sys.executable, "-c", OURS, str(n)]
        seconds: dict[str, list] = {"published": [], "tiltjax": []}
        for _ in range(rounds):
            for name, command, work in (
                ("published", theirs, checkout / "checkerboard"),
                ("tiltjax", ours, Path.cwd()),
            ):
                short, long = (process(command(n), work) for n in (20, 20 + steps))
                seconds[name].append([(b - a) / steps for a, b in zip(short, long, strict=True)])
                print(
                    f"{name}: {seconds[name][-1][0]:.4f} s a step, {seconds[name][-1][1]:.4f} "
                    "CPU-s",
                    flush=True,
                )
    median = lambda name, i: statistics.median(values[i] for values in seconds[name])
    results = {
        name: {"steps_per_second": 1 / median(name, 0), "cpu_seconds_per_step": median(name, 1)}
        for name in seconds
    }
    results["ratio"] = median("published", 0) / median("tiltjax", 0)
    results["ratio_cpu"] = median("published", 1) / median("tiltjax", 1)
    return {"commit": common.COMMIT, **results}


def share(
    board: tj.models.Checkerboard, model: tj.Model, num: int, steps: int
) -> tuple[float, float]:
    """The share of unguided samples in filled squares, with its standard error."""
    x = tj.sample(jax.random.key(3), model, num=num, steps=steps, chunk_size=2000).x
    inside = np.asarray(jax.vmap(board.log_prob)(x)) > -np.inf
    return float(inside.mean()), float(np.sqrt(inside.mean() * (1 - inside.mean()) / num))


def excess(
    board: tj.models.Checkerboard, network: tj.training.networks.Velocity, rounds: int
) -> tuple[float, float]:
    """The excess of the loss over the exact model's on the same draws, with its standard error."""

    @jax.jit
    def gap(network, key):
        key_data, key_loss = jax.random.split(key)
        x1 = board.sample(key_data, BATCH)
        of = lambda fn, batched: tj.training.loss(
            fn, key_loss, x1, interpolant=board.interpolant, batched=batched
        )
        return of(network, True) - of(board.velocity, False)

    gaps = np.asarray([gap(network, key) for key in jax.random.split(jax.random.key(4), rounds)])
    return float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="300 training steps, 2,000 samples; nothing is written"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=10_000,
        help="of the longest run; others have an eighth and a half",
    )
    parser.add_argument("--reference", type=Path, help="a checkout of the published code")
    parser.add_argument(
        "--python", default=sys.executable, help="of an environment in which it runs"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="where the longest run is kept, for benchmarks/accuracy/checkerboard.py --network",
    )
    args = parser.parse_args()
    last = common.RESULTS / "training.json"
    beside = json.loads(last.read_text())["side_by_side"] if last.exists() else None
    if args.reference is not None:
        beside = side_by_side(args.reference.absolute(), args.python, 50 if args.quick else 300)
        print(
            f"{beside['ratio']:.2f} times the steps a second, {beside['ratio_cpu']:.2f} times "
            "fewer CPU-seconds\n",
            flush=True,
        )
    runs = [300] if args.quick else [args.steps // 8, args.steps // 2, args.steps]
    num, solver_steps, rounds = (2000, 30, 10) if args.quick else (20_000, 60, 100)
    board = tj.models.Checkerboard()
    network = tj.training.networks.Velocity(board.shape, rngs=nnx.Rngs(0))
    work = gigaflops(network)

    def train(steps: int) -> tuple[tj.training.Fit, float, float]:
        wall, cpu = time.perf_counter(), common.cpu_seconds()
        fit = velocity(board, steps, args.checkpoint if steps == args.steps else None)
        return fit, time.perf_counter() - wall, common.cpu_seconds() - cpu

    train(1)  # leaves one-time work of the process out of all figures
    _, compile_wall, compile_cpu = train(1)
    product = bare_product()
    exact, exact_error = share(board, board, num, solver_steps)
    print(
        f"compilation {compile_wall:.1f} s; a step is {work:.2f} GFLOP; a bare product does "
        f"{product:.0f} GFLOP/s"
    )
    print(
        f"exact denoiser, {solver_steps} Heun steps: {exact:.2%} ± {exact_error:.2%} in filled "
        "squares\n",
        flush=True,
    )

    rows = []
    for steps in runs:
        fit, wall, cpu = train(steps)
        # The time of a one-step run is almost all compilation.
        speed, cpu_step = (steps - 1) / (wall - compile_wall), (cpu - compile_cpu) / (steps - 1)
        row = {
            "steps": steps,
            "steps_per_second": speed,
            "cpu_seconds_per_step": cpu_step,
            "gflops": speed * work,
        }
        for name, net in (("average", fit.average), ("last", fit.network)):
            model = tj.from_velocity(
                net, shape=board.shape, batched=True, interpolant=board.interpolant
            )
            row |= {
                f"share_{name}": share(board, model, num, solver_steps),
                f"excess_{name}": excess(board, net, rounds),
            }
        row["loss"] = float(fit.curve.loss[-max(steps // 20, 1) :].mean())
        rows.append(row)
        print(
            f"{steps} steps: {speed:.1f} steps/s, {cpu_step:.4f} CPU-s a step, loss "
            f"{row['loss']:.4f}",
            flush=True,
        )

    print(
        "\n| training steps | steps/s | CPU-s a step | GFLOP/s | in filled squares | last weights "
        "| mean square error of b |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['steps']:,} | {row['steps_per_second']:.1f} | "
            f"{row['cpu_seconds_per_step']:.4f} | {row['gflops']:.0f} | "
            f"{row['share_average'][0]:.1%} ± {row['share_average'][1]:.1%} | "
            f"{row['share_last'][0]:.1%} | "
            f"{row['excess_average'][0]:.4f} ± {row['excess_average'][1]:.4f} |"
        )
    print(f"| exact denoiser |  |  |  | {exact:.1%} ± {exact_error:.1%} |  | 0 |")
    if not args.quick:
        settings = {
            "batch": BATCH,
            "num": num,
            "solver_steps": solver_steps,
            "gigaflop_per_step": work,
        }
        results = {
            "settings": settings,
            "compile": {"wall": compile_wall, "cpu": compile_cpu},
            "bare_product": product,
        }
        results |= {
            "exact_share": (exact, exact_error),
            "recorded": RECORDED,
            "side_by_side": beside,
            "rows": rows,
        }
        common.write("training", results)


if __name__ == "__main__":
    main()
