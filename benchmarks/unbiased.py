"""Is the normalising constant unbiased whatever a weighted run is made of?

Every combination that makes sense of guidance, proposal, potential, gate (schedule and threshold), tempering and resampling, on `quadratic` at scale .3
with 8 particles and 20 steps. The truth is Z of the stepped base chain, by its transfer operator on a grid: no sampler, no limit. For each cell, with
the mean of `exp(log_norm) / Z` over independent runs,

    z = (mean - 1) / its standard error.

Potentials that add up along a path count twice on the way, as their weights' variance grows without bound otherwise; `Adaptive` tempering is for
`Difference` and proposals without children, and needs a threshold above its share. As many runs a cell as bring the relative standard error below
6% and the largest run below 5% of the sum, decided by 250 others; a cell that misses is run again, with other keys and four times as many. Guidances,
resampling schemes and tables of factors are arguments of one compiled program, the rest makes one each. One draw a state is left out: its weights
have tails that ask for tens of thousands of runs a cell.

    python benchmarks/unbiased.py [--quick]
"""

import argparse
import itertools
import math
import time

import common
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tiltjax as tj
from tiltjax import potentials, proposals, resampling, tempering
from tiltjax.guidance import Guidance

SCALE, STEPS, NUM, CHUNK, MOST = 0.3, 20, 8, 250, 64
ERROR, LARGEST = 0.06, 0.05
SCHEMES = (resampling.multinomial, resampling.stratified, resampling.systematic, resampling.residual, resampling.ssp)
EACH, TWICE = tj.Every(), tj.Every(6, start=5, stop=11)
GATES = {
    "each step, below .5": (EACH, 0.5),
    "each step, always": (EACH, 1.0),
    "twice, below .5": (TWICE, 0.5),
    "twice, always": (TWICE, 1.0),
}
TABLES = {"Exponential": tempering.Exponential(), "Polynomial": tempering.Polynomial(1.0)}


class Chosen(eqx.Module):
    """The resampling scheme of number `which`."""

    which: jax.Array

    def __call__(self, key, log_weights, num=None):
        return jax.lax.switch(self.which, [lambda k, w, s=s: s(k, w) for s in SCHEMES], key, log_weights)


class Any(Guidance):
    """The guidance of number `which`; none of them has memory."""

    model: tj.Model
    parts: tuple[Guidance, ...]
    which: jax.Array

    def __call__(self, key, t, x, state):
        ask = lambda part: lambda key, t, x: part(key, t, x, state)[0]
        return jax.lax.switch(self.which, [ask(part) for part in self.parts], key, t, x), state

    def log_tilt(self, x1):
        return self.parts[0].log_tilt(x1)


class Given(tempering.Tempering):
    """The factors of a table."""

    table: jax.Array

    def factors(self, steps):
        return self.table


def chain_log_norm() -> float:
    """`log E[exp(scale r)]` at the end of the base chain for two modes ±2.5 along the first coordinate: the coordinates are independent."""
    times, grid = np.linspace(1e-3, 1, STEPS + 1), np.linspace(-9, 9, 1801)
    cell, total = grid[1] - grid[0], 0.0
    for mode, target in ((2.5, 0.0), (0.0, 2.5)):

        def denoise(t, mode=mode):
            variance = 0.5 * t**2 + (1 - t) ** 2
            return (0.5 * t * grid + (1 - t) ** 2 * mode * np.tanh(t * mode * grid / variance)) / variance

        value = np.exp(-SCALE * (denoise(times[-2]) - target) ** 2)
        for t, u in zip(times[-3::-1], times[-2:0:-1], strict=True):
            rho = t * (1 - u) / (u * (1 - t))
            keep = rho * (1 - u) / (1 - t)
            mean, s2 = keep * grid + (u - keep * t) * denoise(t), (1 - u) ** 2 * (1 - rho**2)
            value = np.exp(-((grid - mean[:, None]) ** 2) / (2 * s2)) @ value * cell / np.sqrt(2 * np.pi * s2)
        width = 1 - times[0]
        total += np.log(np.exp(-((grid / width) ** 2) / 2) @ value * cell / (width * np.sqrt(2 * np.pi)))
    return float(total)


def guidances() -> dict[str, Guidance]:
    problem = tj.problems.quadratic()
    model, reward = tj.Analytic(problem.prior), problem.reward
    draws = tj.Exact(model)
    return {
        "DPS": tj.dps(model, reward, SCALE),
        "2 draws": tj.PlugIn(draws, reward, SCALE, k=2),
        "4 draws": tj.PlugIn(draws, reward, SCALE, k=4),
        "Laplace": tj.Laplace(model, reward, SCALE),
    }


def programs(quick: bool) -> list[tuple[dict[str, str], dict, list[str]]]:
    """Names of a program's parts, its settings, and the temperings that it takes as arguments."""
    moves = {
        "Base": proposals.Base(),
        "Guided": proposals.Guided(),
        "Shifted": proposals.Shifted(),
        "Children(3)": proposals.Children(3),
        "Children(2, Guided)": proposals.Children(2, proposals.Guided()),
    }
    kinds = (potentials.Difference(), potentials.Max(), potentials.Sum(), potentials.Immediate())
    found = []
    for (move, proposal), potential, (gate, (schedule, threshold)), temper in itertools.product(
        moves.items(), kinds, GATES.items(), ("none", "table", "Adaptive")
    ):
        telescopes = isinstance(potential, potentials.Difference)
        if not telescopes and schedule is EACH:
            continue
        if temper == "Adaptive" and not (telescopes and proposal.tries == 1 and threshold > 0.6):
            continue
        names = {"proposal": move, "potential": type(potential).__name__, "gate": gate}
        settings = {"proposal": proposal, "potential": potential, "schedule": schedule, "ess_threshold": threshold}
        if temper == "Adaptive":
            settings["tempering"] = tempering.Adaptive(0.6)
        found.append((names, settings, list(TABLES) if temper == "table" else [temper]))
    return found[:: len(found) // 4] if quick else found


def judge(sample, number: int) -> dict:
    """`sample(i)` is a chunk of ratios to the truth, by number."""
    pilot = sample(number << 16)
    spread = pilot.std(ddof=1) / pilot.mean()
    chunks = int(np.clip(math.ceil((spread / (0.75 * ERROR)) ** 2 / CHUNK), 2, MOST))
    start = (number << 16) + 1
    while True:
        ratio = np.concatenate([sample(start + i) for i in range(chunks)])
        error, largest = ratio.std(ddof=1) / np.sqrt(len(ratio)), ratio.max() / ratio.sum()
        held = bool(error <= ERROR and largest <= LARGEST)
        if held or 4 * chunks > MOST:
            return {
                "runs": len(ratio), "mean": float(ratio.mean()), "error": float(error), "largest": float(largest),
                "held": held, "z": float((ratio.mean() - 1) / error),
            }  # fmt: skip
        start, chunks = start + chunks, 4 * chunks


def summary(cells: list[dict]) -> dict:
    """Of z over cells; `pooled` is the mean ratio of all, each cell alike: weights by their errors would favour cells that came out low."""
    z, errors = np.array([cell["z"] for cell in cells]), np.array([cell["error"] for cell in cells])
    return {
        "cells": len(cells),
        "mean": float(z.mean()),
        "sd": float(z.std(ddof=1)),
        "max": float(np.abs(z).max()),
        "above_2": float(np.mean(np.abs(z) > 2)),
        "above_3": float(np.mean(np.abs(z) > 3)),
        "pooled": [float(np.mean([cell["mean"] for cell in cells])), float(np.sqrt(np.sum(errors**2)) / len(cells))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four programs")
    args = parser.parse_args()
    truth, begun, cells = chain_log_norm(), time.perf_counter(), []
    tables = {name: temper.factors(STEPS) for name, temper in TABLES.items()}
    chosen, guides = programs(args.quick), guidances()
    model = guides["DPS"].model
    for done, (names, settings, temperings) in enumerate(chosen):

        @jax.jit
        def chunk(number, guide, scheme, table, settings=settings, tabled=temperings[0] in TABLES):
            guidance = Any(model, tuple(guides.values()), guide)
            over = settings | ({"tempering": Given(table)} if tabled else {})
            run = lambda key: (
                tj.smc(key, model, guidance, num=NUM, steps=STEPS, resample=Chosen(scheme), **over).log_norm
            )
            return jax.vmap(run)(jax.random.split(jax.random.fold_in(jax.random.key(0), number), CHUNK))

        for (guide, guidance), (which, scheme), temper in itertools.product(
            enumerate(guides), enumerate(SCHEMES), temperings
        ):
            numbers = guide, which, tables.get(temper, jnp.ones(STEPS))
            sample = lambda i, chunk=chunk, numbers=numbers: np.exp(np.asarray(chunk(i, *numbers), np.float64) - truth)
            cell = {"guidance": guidance, **names, "tempering": temper, "resampling": scheme.__name__}
            cells.append(cell | judge(sample, len(cells)))
        jax.clear_caches()
        if done % 10 == 0 or args.quick:
            took = time.perf_counter() - begun
            print(f"{done + 1} of {len(chosen)} programs, {len(cells)} cells, {took:.0f} s", flush=True)
    axes = ("guidance", "proposal", "potential", "gate", "tempering", "resampling")
    by_axis = {
        axis: {
            value: summary([c for c in cells if c[axis] == value]) for value in dict.fromkeys(c[axis] for c in cells)
        }
        for axis in axes
    }
    by_axis["all"] = {"": summary(cells)}
    print(
        "\n| axis | | cells | mean z | sd z | max abs z | > 2 | > 3 | mean of exp(log_norm) / Z |\n|---|---|---|---|---|---|---|---|---|"
    )
    for axis, rows in by_axis.items():
        for value, row in rows.items():
            print(
                f"| {axis} | {value} | {row['cells']} | {row['mean']:+.2f} | {row['sd']:.2f} | {row['max']:.2f} | {row['above_2']:.1%} | "
                f"{row['above_3']:.2%} | {row['pooled'][0]:.4f} ± {row['pooled'][1]:.4f} |"
            )
    missed = [cell for cell in cells if not cell["held"]]
    runs = sum(cell["runs"] for cell in cells)
    print(
        f"\n{len(chosen)} programs, {len(cells)} cells, {runs:,} runs; error or largest run too large in {len(missed)}:"
    )
    for cell in [*missed, *sorted(cells, key=lambda cell: -abs(cell["z"]))[:10]]:
        print(cell)
    if not args.quick:
        extremes = sorted(cells, key=lambda cell: -abs(cell["z"]))[:20]
        found = {
            "log_norm": truth, "programs": len(chosen), "runs": runs, "axes": by_axis, "missed": missed, "extremes": extremes,
            "z": [round(cell["z"], 3) for cell in cells], "seconds": time.perf_counter() - begun,
        }  # fmt: skip
        print(f"\nwritten: {common.write('unbiased', found)}")


if __name__ == "__main__":
    main()
