"""Does the work of each device decrease with the number of devices, and how much data do they
exchange?

    python -m benchmarks.speed.devices [--quick]

A guided network runs on 1, 2, 4 and 8 virtual devices, each in a fresh process. The runs are
`sample`, and `smc` with resampling after every step, with the same total number of particles
(strong scaling) and with the same number on each device (weak scaling). For each program, the
compiler reports for one device the floating-point operations (the loop's body counted once), the
memory of arguments and buffers, and the collective operations of a step. `received` is the number
of bytes that a device then receives in a step by the ring algorithms. For k devices this is (k - 1)
/ k of the result of an all-gather or an all-to-all, twice that for an all-reduce, and all of a
permutation. Both branches of conditional resampling count. CPU-seconds are of one run, over all
devices. Virtual devices share the cores of one machine, so that wall times have no meaning here.

A second table predicts the share of time in exchange for 8 to 256 chips, from these counts and
published peak rates (`predicted`). None of these predictions was measured.
"""

import argparse
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import common

DEVICES = (1, 2, 4, 8)
TOTAL, EACH = 512, 64  # particles in all and on each device: on eight both are one program
STEPS, SHAPE, WIDTH = 6, 64, 256
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}


class Exchange(NamedTuple):
    """A collective operation of a program: its kind, the bytes of its result on a device, and the
    number of times it runs.
    """

    kind: str
    size: int
    times: int

    def received(self, devices: int) -> float:
        """The bytes that a device receives, by the ring algorithms."""
        around = (devices - 1) / devices
        share = {
            "all-reduce": 2 * around,
            "collective-permute": 1.0,
            "reduce-scatter": devices * around,
        }
        return self.times * self.size * share.get(self.kind, around)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation of a compiled program, and the name of its entry
    computation.
    """
    found: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, found[head[2]] = head[2], []
            entry = name if head[1] else entry
        elif name and line.startswith("  "):
            found[name].append(line)
    return found, entry


def exchanges(text: str) -> Iterator[Exchange]:
    """The collective operations of a compiled program. Those in loops are counted once per
    iteration.
    """
    found, entry = computations(text)

    @functools.cache
    def calls(name: str) -> tuple[tuple[str, int], ...]:
        called = []
        for line in found[name]:
            turns = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line)
            names = re.findall(
                r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)", line
            )
            names += [
                n.strip().lstrip("%")
                for b in re.findall(r"branch_computations=\{([^}]*)\}", line)
                for n in b.split(",")
            ]
            called += [
                (n, int(turns[1]) if turns and " while(" in line else 1)
                for n in names
                if n in found
            ]
        return tuple(called)

    def walk(name: str, times: int) -> Iterator[Exchange]:
        for line in found[name]:
            if one := re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line):
                yield Exchange(one[2], size(one[1]), times)
        for inner, turns in calls(name):
            yield from walk(inner, times * turns)

    return walk(entry, 1)


def size(shape: str) -> int:
    """The bytes of an array or a tuple in the notation of programs: `(f32[8,2]{1,0}, pred[])`."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(
        BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in arrays
    )


def programs(devices: int, quick: bool) -> Iterator[tuple[str, str, int]]:
    """The verb, the scaling and the number of particles of each program."""
    sizes = {TOTAL: "strong"} | ({} if quick else {EACH * devices: "weak"})
    if EACH * devices == TOTAL:
        sizes = {TOTAL: "both"}
    for num, scaling in sizes.items():
        for verb in ("sample", "smc"):
            yield verb, scaling, num


def measure(devices: int, quick: bool) -> None:
    """Measure the programs of one process, and print one row of JSON for each."""
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax  # the flags above are read when it is imported
    import jax.numpy as jnp

    import tiltjax as tj

    mesh = jax.make_mesh((devices,), ("particles",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("particles"))
    keys = jax.random.split(jax.random.key(0), 2)
    weights = [
        jax.random.normal(k, s) / 10
        for k, s in zip(keys, ((SHAPE, WIDTH), (WIDTH, SHAPE)), strict=True)
    ]
    network = lambda weights, t, x: jnp.tanh(x @ weights[0] + t) @ weights[1]
    verbs = {"sample": {"solver": tj.Ancestral()}, "smc": {"ess_threshold": 1.0}}

    def run(verb, num, key, weights):
        model = tj.from_velocity(network, weights, shape=(SHAPE,))
        guidance = tj.dps(model, tj.rewards.Quadratic(jnp.ones(SHAPE)), 0.1)
        return getattr(tj, verb)(
            key, model, guidance, num=num, steps=STEPS, sharding=sharding, **verbs[verb]
        ).x

    for verb, scaling, num in programs(devices, quick):
        program = (
            jax.jit(functools.partial(run, verb, num)).lower(jax.random.key(0), weights).compile()
        )
        memory, costs, text = program.memory_analysis(), program.cost_analysis(), program.as_text()
        assert memory is not None
        assert costs is not None
        assert text is not None
        loop = STEPS if verb == "sample" else STEPS - 1
        found = [one for one in exchanges(text) if one.times >= loop]
        seconds = []
        for seed in range(1 if quick else 4):
            begun = common.cpu_seconds()
            jax.block_until_ready(program(jax.random.key(seed), weights))
            seconds.append(common.cpu_seconds() - begun)
        kinds = {
            kind: some for kind in KINDS if (some := [one for one in found if one.kind == kind])
        }
        row = {
            "verb": verb,
            "scaling": scaling,
            "devices": devices,
            "num": num,
            "operations": costs["flops"],
            "argument_bytes": memory.argument_size_in_bytes,
            "buffer_bytes": memory.temp_size_in_bytes,
            "collectives_a_step": sum(one.times for one in found) / loop,
            "received_a_step": sum(one.received(devices) for one in found) / loop,
            "result_bytes_a_step": {
                kind: sum(one.times * one.size for one in some) / loop
                for kind, some in kinds.items()
            },
            "run_cpu": statistics.median(seconds[1:] or seconds),
        }
        print(json.dumps(row), flush=True)


def scaled(rows: list[dict[str, Any]]) -> str:
    """The measured values as a table, for one device."""
    head = (
        "| scaling | devices | particles | `sample`, Mflop | KiB | `smc`, Mflop | KiB | "
        "collectives a step | KiB received a step | CPU-ms, `sample` | `smc` |\n"
        f"|{'---|' * 11}"
    )
    lines = []
    for scaling in ("strong", "weak"):
        of = {(r["devices"], r["verb"]): r for r in rows if r["scaling"] in (scaling, "both")}
        for devices in sorted({devices for devices, _ in of}):
            plain, weighed = of[devices, "sample"], of[devices, "smc"]
            cells: list[Any] = [scaling, devices, plain["num"]]
            for row in (plain, weighed):
                cells += [
                    f"{row['operations'] / 1e6:.1f}",
                    f"{(row['argument_bytes'] + row['buffer_bytes']) / 1024:.0f}",
                ]
            cells += [
                f"{weighed['collectives_a_step']:.0f}",
                f"{weighed['received_a_step'] / 1024:.0f}",
            ]
            cells += [f"{1000 * row['run_cpu']:.0f}" for row in (plain, weighed)]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join([head, *lines])


class Chip(NamedTuple):
    """Published peak rates: bfloat16 operations per second; bytes per second in one direction
    between chips of a group; the number of chips of a group; and bytes per second in one direction
    from a chip to other groups.
    """

    operations: float
    link: float
    group: int
    network: float
    source: str

    def seconds(self, size: float, chips: int, times: int = 1) -> float:
        """The seconds of an all-gather with `size` bytes in all, or, with `times=2`, of an
        all-reduce: first between the groups, with a share for each chip, then inside the groups.
        """
        inside = min(chips, self.group)
        groups = chips / inside
        between = (groups - 1) / groups * size / (inside * self.network)
        return times * (between + (inside - 1) / inside * size / self.link)


CHIPS = {
    "H100": Chip(
        989e12,
        450e9,
        8,
        50e9,
        "NVIDIA H100 SXM data sheet: 1,979 Tflop/s with sparsity, NVLink 900 GB/s both ways; DGX "
        "H100 data sheet: a ConnectX-7 of 400 Gb/s for each of 8",
    ),
    "TPU v5p": Chip(
        459e12,
        600e9,
        8960,
        6.25e9,
        "Cloud TPU documentation, TPU v5p: 459 Tflop/s, ICI 1,200 GB/s both ways, DCN 50 Gb/s",
    ),
}
ON_PAPER = (8, 16, 32, 64, 128, 256)
TOYS = 10_000  # particles of the network above, on each chip
WIDE, TOKENS, LATENT = (
    3072,
    4096 + 512,
    4096 * 64 * 4,
)  # FLUX.1 at 1024 x 1024: its width, tokens of image and text, bytes of float32 latents
# Blocks of two streams and of one; the reductions over the chips of all blocks.
BLOCKS, REDUCTIONS = 19 + 38, 2 * 19 + 38
# Operations of a forward pass: two for each weight and token, four n^2 d for attention.
FORWARD = BLOCKS * (2 * TOKENS * 12 * WIDE**2 + 4 * TOKENS**2 * WIDE)


def predicted(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The share of a step's time in exchange, by chip, case and number of chips. Computation and
    exchange run at their peak rates, and do not overlap.
    """
    row = max((r for r in rows if r["verb"] == "smc"), key=lambda r: r["devices"])
    state = 4 * SHAPE
    gathered = row["result_bytes_a_step"]["all-gather"] / row["num"]  # of a particle
    # The copies of the state that a particle carries: x, its denoised state, its shift.
    states = gathered // state
    one = next(r for r in rows if r["verb"] == "sample" and r["devices"] == 1)
    work = one["operations"] / one["num"]
    latents = states * LATENT + gathered - states * state
    share = lambda exchange, compute: exchange / (exchange + compute)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, chip in CHIPS.items():
        cases = {
            "smc, FLUX.1": lambda n, c=chip: share(
                c.seconds(n * latents, n), FORWARD / c.operations
            ),
            "smc, toys": lambda n, c=chip: share(
                c.seconds(n * TOYS * gathered, n), TOYS * work / c.operations
            ),
            "tensor-parallel FLUX.1": lambda n, c=chip: share(
                REDUCTIONS * c.seconds(TOKENS * WIDE * 2, n, 2), FORWARD / n / c.operations
            ),
        }
        found[name] = {case: {str(n): of(n) for n in ON_PAPER} for case, of in cases.items()}
    return found


def on_paper(shares: dict[str, dict[str, dict[str, float]]]) -> str:
    """The predictions as a table."""
    columns = [(case, chip) for case in next(iter(shares.values())) for chip in shares]
    titles = " | ".join(f"{case}: {chip}" for case, chip in columns)
    head = f"| chips | {titles} |\n|{'---|' * (len(columns) + 1)}"
    lines = [
        f"| {n} | {' | '.join(f'{shares[chip][case][str(n)]:.1%}' for case, chip in columns)} |"
        for n in ON_PAPER
    ]
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one and eight devices; nothing is written"
    )
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return measure(args.row, args.quick)
    rows = []
    for devices in (1, 8) if args.quick else DEVICES:
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--row",
            str(devices),
            *(["--quick"] if args.quick else []),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += [json.loads(line) for line in done.stdout.splitlines()]
    shares = predicted(rows)
    print(f"{scaled(rows)}\n\nPredicted share of time in exchange:\n\n{on_paper(shares)}")
    if not args.quick:
        figures = {name: chip._asdict() for name, chip in CHIPS.items()}
        common.write("devices", {"rows": rows, "figures": figures, "predicted": shares})
    return None


if __name__ == "__main__":
    main()
