"""Is the cost linear and the memory constant up to a million particles?

Plug-in guidance with k = 1 runs on the two-mode quadratic mixture with 49 Heun steps and
`chunk_size=10_000`. Each row has a fresh process, so that the peak memory is that of the row.

    python -m benchmarks.speed.many_particles [--quick]
"""

import argparse
import json
import subprocess
import sys

import jax
import jax.numpy as jnp

import tiltjax as tj
from benchmarks import common


def measure(num: int) -> None:
    problem = tj.problems.quadratic()
    model = tj.Analytic(problem.prior)
    guidance, times = (
        tj.PlugIn(tj.Glass(model), problem.reward, problem.scale),
        jnp.linspace(0.001, 0.999, 50),
    )
    timing = common.timed(
        lambda seed: (
            tj.sample(
                jax.random.key(seed), model, guidance, num=num, times=times, chunk_size=10_000
            ).x
        ),
        repeats=1,
    )
    peak = common.peak_gb()
    print(json.dumps({"num": num, "peak_gb": peak, **timing._asdict()}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="up to 100,000 particles")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return measure(args.row)
    rows = []
    print(
        "| particles | run, s | CPU-s | microseconds a particle | peak memory, GB "
        "|\n|---|---|---|---|---|"
    )
    for num in (10_000, 100_000) if args.quick else (10_000, 100_000, 1_000_000):
        out = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--row", str(num)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        row = json.loads(out.splitlines()[-1])
        rows.append(row)
        print(
            f"| {num:,} | {row['run_wall']:.2f} | {row['run_cpu']:.2f} "
            f"| {1e6 * row['run_cpu'] / num:.1f} | {row['peak_gb']:.2f} |",
            flush=True,
        )
    if not args.quick:
        common.write("many_particles", {"rows": rows})
    return None


if __name__ == "__main__":
    main()
