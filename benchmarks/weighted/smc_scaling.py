"""What do weights cost, and does the weighted loop scale to a million particles?

The weighted loop and `sample` run alternately in one process, with the same guidance, solver and
steps (`Ancestral`, the same number of denoiser calls and gradients through them). Run times exclude
compilation. The models are the mixture in closed form, whose call takes only tens of nanoseconds,
and networks of two layers. A second table has the cost per particle and the peak memory of the
weighted loop from a thousand to a million particles, in a fresh process for each row.

    python -m benchmarks.weighted.smc_scaling [--quick]
"""

import argparse
import json
import statistics
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp

import tiltjax as tj
from benchmarks import common

STEPS = 50


WIDTHS = (0, 64, 256)  # of the network; 0: the mixture in closed form


def problem(width: int = 0):
    chosen = tj.problems.quadratic()
    model = tj.Analytic(chosen.prior)
    if width:
        mlp = eqx.nn.MLP(3, 2, width, 2, key=jax.random.key(0))
        model = tj.from_velocity(lambda mlp, t, x: mlp(jnp.append(x, t)), mlp, shape=(2,))
    return model, tj.dps(model, chosen.reward, chosen.scale)


def ratio(width: int, num: int, steps: int, repeats: int) -> dict:
    """The weighted over the unweighted run time, run alternately."""
    model, guidance = problem(width)
    table = {"none resampled": 0.0, "below half": 0.5, "every step": 1.0}
    runs = {
        name: lambda seed, gate=gate: (
            tj.smc(
                jax.random.key(seed), model, guidance, num=num, steps=steps, ess_threshold=gate
            ).x
        )
        for name, gate in table.items()
    }
    runs["sample"] = lambda seed: (
        tj.sample(
            jax.random.key(seed), model, guidance, num=num, steps=steps, solver=tj.Ancestral()
        ).x
    )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run(0))
    for seed in range(1, repeats + 1):
        for name, run in runs.items():
            start = common.cpu_seconds()
            jax.block_until_ready(run(seed))
            seconds[name].append(common.cpu_seconds() - start)
    base = statistics.median(seconds["sample"])
    return {
        name: {"cpu": statistics.median(s), "ratio": statistics.median(s) / base}
        for name, s in seconds.items()
    }


def measure(num: int) -> None:
    model, guidance = problem()
    timing = common.timed(
        lambda seed: tj.smc(jax.random.key(seed), model, guidance, num=num, steps=STEPS).x,
        repeats=1 if num > 10**5 else 3,
    )
    peak = common.peak_gb()
    print(json.dumps({"num": num, "peak_gb": peak, **timing._asdict()}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="up to 10,000 particles")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "the effective sample size")
    if args.row:
        return measure(args.row)
    ratios = {}
    print(
        "| model | sample, CPU-s | none resampled | below half | every step "
        "|\n|---|---|---|---|---|"
    )
    for width in WIDTHS[: 2 if args.quick else 3]:
        # Wide networks are slow, and fewer steps and repetitions suffice.
        found = ratio(
            width,
            10_000 if args.quick else 100_000,
            STEPS if width < 256 else 10,
            3 if width else 7,
        )
        name = f"network, 2 x {width}" if width else "mixture"
        ratios[name] = found
        cells = " | ".join(
            f"{found[gate]['ratio']:.2f}" for gate in ("none resampled", "below half", "every step")
        )
        print(f"| {name} | {found['sample']['cpu']:.2f} | {cells} |", flush=True)
    rows = []
    print(
        "\n| particles | run, s | CPU-s | microseconds a particle | peak memory, GB "
        "|\n|---|---|---|---|---|"
    )
    for num in (1000, 10_000) if args.quick else (1000, 10_000, 100_000, 1_000_000):
        out = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--row", str(num)],
            capture_output=True,
            text=True,
            check=True,
        )
        row = json.loads(out.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"| {num:,} | {row['run_wall']:.2f} | {row['run_cpu']:.2f} "
            f"| {1e6 * row['run_cpu'] / num:.1f} | {row['peak_gb']:.2f} |",
            flush=True,
        )
    if not args.quick:
        common.write("smc_scaling", {"ratios": ratios, "rows": rows})
    return None


if __name__ == "__main__":
    main()
