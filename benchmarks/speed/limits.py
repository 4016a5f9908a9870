"""How far is the time of guided sampling from the time of its denoiser evaluations alone?

A plug-in of k draws by GLASS of m steps must evaluate the denoiser, and pull a gradient back
through it, `1 + (m - 1) k` times for each particle and each evaluation of the guidance by the
solver, because all draws share their first evaluation. The floor is the time of these evaluations
alone, measured in the same run and with the same batch: a compiled loop that only evaluates the
denoiser and pulls back. The pullbacks run at once or at the end, and the rows are the first or the
last axis, whichever is fastest. All other work counts against the sampler: random numbers, GLASS's
own arithmetic, the reward, the log-sum-exp, the outer solver, and evaluations that are repeated to
save memory. Both are run alternately, and medians are compared, in wall and in CPU seconds. A ratio
below one means that the compiler optimizes the sampler's loop better than the bare loop.

The rows are mixtures in closed form (49 Heun steps, GLASS of 20; on the line 100 Euler steps, GLASS
of 50) with 2,000 particles, and a velocity network of 4 x 256 units with random weights (10 Euler
steps, GLASS of 50).

    python -m benchmarks.speed.limits [--quick]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

import tiltjax as tj
from benchmarks import common

WITHIN = 2.0
LOOP = 40  # evaluations in a bare run


class Row(NamedTuple):
    """A guided run; `looks` is the number of evaluations of the guidance by its solver."""

    name: str
    model: tj.Model
    reward: Any
    scale: float
    times: jax.Array
    solver: tj.solvers.Solver
    looks: int
    inner: int
    k: int


def rows(quick: bool) -> list[Row]:
    found = []
    heun, line = jnp.linspace(0.001, 0.999, 50), jnp.linspace(0.01, 1.0, 101)
    for name in ("quadratic",) if quick else ("gaussian", "quadratic", "noniso", "double_well"):
        problem = tj.problems.get(name)
        model = tj.Analytic(problem.prior)
        found += [
            Row(name, model, problem.reward, problem.scale, heun, tj.Heun(), 98, 20, k)
            for k in ((1,) if quick else (1, 8))
        ]
    problem = tj.problems.get("bump")
    found += [
        Row(
            "bump",
            tj.Analytic(problem.prior),
            problem.reward,
            problem.scale,
            line,
            tj.Euler(),
            100,
            50,
            k,
        )
        for k in (() if quick else (1, 8))
    ]
    board = tj.models.Checkerboard()
    network = tj.training.networks.Velocity(board.shape, rngs=nnx.Rngs(0))
    model = tj.from_velocity(
        network, shape=board.shape, batched=True, interpolant=board.interpolant
    )
    steps = 2 if quick else 10
    times, bump = jnp.linspace(0.02, 1.0, steps + 1), tj.rewards.Bump([0.5, 0.5], 1.5)
    found += [
        Row("network, 4 x 256", model, bump, 10.0, times, tj.Euler(), steps, 50, k)
        for k in ((1,) if quick else (1, 8))
    ]
    return found


def bare(model: tj.Model, num: int, chain: bool, axis: int = 0) -> Callable[[int], jax.Array]:
    """`LOOP` evaluations of the denoiser on `num` rows along axis 0 or 1, each with its pullback:
    at once, or back along the chain.
    """

    @eqx.filter_jit
    def run(model: tj.Model, x: jax.Array, times: jax.Array) -> jax.Array:
        rows = model.denoise_batch if axis == 0 else jax.vmap(model.denoise, (None, 1), 1)
        forward = lambda x, t: (0.5 * x + 0.5 * rows(t, x), None)

        def at_once(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            denoised, pullback = jax.vjp(lambda x: rows(t, x), x)
            return 0.5 * x + 0.1 * pullback(denoised)[0], None

        x = jnp.moveaxis(x, 0, axis)
        if chain:
            x = jax.grad(lambda x: jnp.sum(jax.lax.scan(forward, x, times)[0]))(x)
        else:
            x = jax.lax.scan(at_once, x, times)[0]
        return jnp.moveaxis(x, axis, 0)

    x, times = (
        jax.random.normal(jax.random.key(0), (num, *model.shape)),
        jnp.linspace(0.05, 0.95, LOOP),
    )
    return lambda seed: run(model, x + seed, times)


def in_turn(runs: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """The median wall and CPU seconds of each run."""
    for run in runs.values():
        jax.block_until_ready(run(0))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for seed in range(1, repeats + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), common.cpu_seconds()
            jax.block_until_ready(run(seed))
            found[name].append((time.perf_counter() - wall, common.cpu_seconds() - cpu))
    median = lambda values, i: statistics.median(value[i] for value in values)
    return {name: (median(values, 0), median(values, 1)) for name, values in found.items()}


def measure(row: Row, num: int, repeats: int) -> dict[str, Any]:
    guidance = tj.PlugIn(tj.Glass(row.model, inner_steps=row.inner), row.reward, row.scale, k=row.k)
    # The values of the noise do not affect the time.
    start = jax.random.normal(jax.random.key(9), (num, *row.model.shape))
    settings = {"num": num, "times": row.times, "solver": row.solver, "start": start}
    runs: dict[str, Callable[[int], Any]] = {
        "sample": lambda seed: tj.sample(jax.random.key(seed), row.model, guidance, **settings).x
    }
    sizes = {num, num * row.k}
    # A network fixes the axis of its rows, and a chain of it would have to be stored.
    ways = [(chain, axis) for chain in (False, True) for axis in (0, 1)]
    ways = ways if isinstance(row.model, tj.Analytic) else ways[:1]
    runs |= {f"{size} {way}": bare(row.model, size, *way) for size in sizes for way in ways}
    taken = in_turn(runs, repeats)
    result: dict[str, Any] = {
        "row": row.name,
        "k": row.k,
        "num": num,
        "evaluations": row.looks * common.plug_in_calls(row.inner, row.k),
    }
    for i, clock in enumerate(("wall", "cpu")):
        one, all_draws = (
            min(taken[f"{size} {way}"][i] for way in ways) / LOOP for size in (num, num * row.k)
        )
        floor = row.looks * (one + (row.inner - 1) * all_draws)
        took = taken["sample"][i]
        result |= {f"floor_{clock}": floor, f"run_{clock}": took, f"ratio_{clock}": took / floor}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="two rows with 500 particles; nothing is written"
    )
    args = parser.parse_args()
    num, repeats = (500, 2) if args.quick else (2000, 5)
    table = []
    print(
        "| denoiser | k | evaluations a sample | floor, s | sampling, s | ratio | floor, CPU-s | "
        "sampling, CPU-s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows(args.quick):
        found = measure(row, num, repeats)
        table.append(found)
        cells = " | ".join(
            f"{found[f'floor_{clock}']:.3g} | {found[f'run_{clock}']:.3g} | "
            f"{found[f'ratio_{clock}']:.2f}"
            for clock in ("wall", "cpu")
        )
        print(f"| {row.name} | {row.k} | {found['evaluations']:,} | {cells} |", flush=True)
    beyond = [
        f"{found['row']}, k = {found['k']}" for found in table if found["ratio_wall"] > WITHIN
    ]
    print(
        f"\nwithin {WITHIN:g} times the floor: {len(table) - len(beyond)} of {len(table)}; beyond "
        f"it: {'; '.join(beyond) or 'none'}"
    )
    if not args.quick:
        common.write("limits", {"within": WITHIN, "beyond": beyond, "rows": table})


if __name__ == "__main__":
    main()
