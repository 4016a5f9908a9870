"""Is the normalizing constant unbiased for every combination of the parts of a weighted run?

The cells are all sensible combinations of guidance, proposal, potential, gate (schedule and
threshold), tempering and resampling, on `quadratic` at scale .3 with 8 particles and 20 steps. The
truth is Z of the stepped base chain, by its transfer operator on a grid. It needs no sampler and no
limit. For each cell, with the mean of `exp(log_norm) / Z` over independent runs,

    z = (mean - 1) / its standard error.

Potentials that accumulate along a trajectory resample only twice, because the variance of their
weights otherwise grows without bound. `Adaptive` tempering is for `Difference` and proposals
without children, and needs a threshold above its share. The number of runs of a cell brings the
relative standard error below 6% and the largest run below 5% of the sum; a pilot of 250 other runs
decides it. Cells that still miss these bounds are counted, not repeated, because a repetition would
discard large runs. Parts that a compiled program can select by number (guidance, potential,
resampling, a table of factors, guided proposals) are its arguments. Each kind has one size: 2
draws, 2 children, `Exponential`.

    python -m benchmarks.weighted.unbiased [--quick]
"""

import argparse
import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tiltjax as tj
from benchmarks import common
from tiltjax import resampling
from tiltjax.guidance import Guidance
from tiltjax.weighted import potentials, proposals, tempering

SCALE, STEPS, NUM, CHUNK, MOST = 0.3, 20, 8, 250, 64
ERROR, LARGEST = 0.06, 0.05
SCHEMES = (
    resampling.multinomial,
    resampling.stratified,
    resampling.systematic,
    resampling.residual,
    resampling.ssp,
)
EACH, TWICE = (
    tj.weighted.potentials.ResampleSchedule(),
    tj.weighted.potentials.ResampleSchedule(6, start=5, stop=11),
)
GATES = {
    "each step, below .5": (EACH, 0.5),
    "each step, always": (EACH, 1.0),
    "twice, below .5": (TWICE, 0.5),
    "twice, always": (TWICE, 1.0),
}
KINDS = (potentials.Difference(), potentials.Max(), potentials.Sum(), potentials.Immediate())
MOVES = (proposals.Guided(), proposals.Shifted())


class AnyScheme(eqx.Module):
    """The resampling scheme number `which`."""

    which: jax.Array

    def __call__(self, key, log_weights, num=None):
        return jax.lax.switch(
            self.which, [lambda k, w, s=s: s(k, w) for s in SCHEMES], key, log_weights
        )


class AnyGuidance(Guidance):
    """The guidance number `which`; no guidance has memory."""

    model: tj.Model
    parts: tuple[Guidance, ...]
    which: jax.Array

    def __call__(self, key, t, x, state):
        ask = lambda part: lambda key, t, x: part(key, t, x, state)[0]
        return jax.lax.switch(self.which, [ask(part) for part in self.parts], key, t, x), state

    def log_tilt(self, x1):
        return self.parts[0].log_tilt(x1)


class AnyMove(proposals.Proposal):
    """The guided proposal number `which`."""

    which: jax.Array

    def shift(self, kernel, pull):
        return jnp.stack([move.shift(kernel, pull) for move in MOVES])[self.which]


class AnyPotential(potentials.Potential):
    """The potential number `which`, with the memories of all potentials."""

    which: jax.Array

    def init(self):
        return tuple(kind.init() for kind in KINDS)

    def __call__(self, applied, memory, value):
        found = [kind(applied, held, value) for kind, held in zip(KINDS, memory, strict=True)]
        return jnp.stack([total for total, _ in found])[self.which], tuple(
            held for _, held in found
        )


def chain_log_norm() -> float:
    """`log E[exp(scale r)]` at the end of the base chain, for two modes ±2.5 along the first
    coordinate, with independent coordinates.
    """
    times, grid = np.linspace(1e-3, 1, STEPS + 1), np.linspace(-9, 9, 1801)
    cell, total = grid[1] - grid[0], 0.0
    for mode, target in ((2.5, 0.0), (0.0, 2.5)):

        def denoise(t, mode=mode):
            variance = 0.5 * t**2 + (1 - t) ** 2
            return (
                0.5 * t * grid + (1 - t) ** 2 * mode * np.tanh(t * mode * grid / variance)
            ) / variance

        value = np.exp(-SCALE * (denoise(times[-2]) - target) ** 2)
        for t, u in zip(times[-3::-1], times[-2:0:-1], strict=True):
            rho = t * (1 - u) / (u * (1 - t))
            keep = rho * (1 - u) / (1 - t)
            mean, s2 = keep * grid + (u - keep * t) * denoise(t), (1 - u) ** 2 * (1 - rho**2)
            value = (
                np.exp(-((grid - mean[:, None]) ** 2) / (2 * s2))
                @ value
                * cell
                / np.sqrt(2 * np.pi * s2)
            )
        width = 1 - times[0]
        total += np.log(
            np.exp(-((grid / width) ** 2) / 2) @ value * cell / (width * np.sqrt(2 * np.pi))
        )
    return float(total)


def guidances() -> dict[str, Guidance]:
    problem = tj.problems.quadratic()
    model, reward = tj.Analytic(problem.prior), problem.reward
    return {
        "DPS": tj.dps(model, reward, SCALE),
        "2 draws": tj.PlugIn(tj.Exact(model), reward, SCALE, k=2),
        "Laplace": tj.Laplace(model, reward, SCALE),
    }


# The parts that make a program: proposals by kind, gates, temperings.
KINDS_OF_MOVE = {
    "Base": lambda which: proposals.Base(),
    "guided": AnyMove,
    "Children(2)": lambda which: proposals.Children(2),
    "Children(2), guided": lambda which: proposals.Children(2, AnyMove(which)),
}
NAMES_OF_MOVE = {
    "Base": ("Base",),
    "guided": ("Guided", "Shifted"),
    "Children(2)": ("Children(2)",),
    "Children(2), guided": ("Children(2, Guided)", "Children(2, Shifted)"),
}


def programs() -> list[tuple[str, str, str]]:
    every = itertools.product(KINDS_OF_MOVE, GATES, ("none", "Exponential", "Adaptive"))
    adapts = lambda move, gate: move in ("Base", "guided") and GATES[gate][1] == 1.0
    return [row for row in every if row[2] != "Adaptive" or adapts(*row[:2])]


def compiled(guides: tuple[Guidance, ...], move: str, gate: str, temper: str):
    """A function from a number to a chunk of ratios to Z, of one compiled program."""
    model, (schedule, threshold) = guides[0].model, GATES[gate]
    over = {
        "none": None,
        "Exponential": tempering.Exponential(),
        "Adaptive": tempering.AdaptiveTempering(0.6),
    }[temper]

    @jax.jit
    def chunk(number, guide, moves, kind, scheme):
        guidance = AnyGuidance(model, guides, guide)
        potential = AnyPotential(kind) if temper != "Adaptive" else potentials.Difference()
        settings = {
            "proposal": KINDS_OF_MOVE[move](moves),
            "resample": AnyScheme(scheme),
            "tempering": over,
        }
        run = lambda key: (
            tj.smc(
                key,
                model,
                guidance,
                num=NUM,
                steps=STEPS,
                schedule=schedule,
                ess_threshold=threshold,
                potential=potential,
                **settings,
            ).log_norm
        )
        return jax.vmap(run)(jax.random.split(jax.random.fold_in(jax.random.key(0), number), CHUNK))

    return chunk


def runs_for(pilot: np.ndarray) -> int:
    """The number of chunks that a cell needs, from a pilot. A large run of the pilot counts as one
    run of that size in each chunk.
    """
    spread, top = pilot.std(ddof=1) / pilot.mean(), pilot.max() / pilot.sum()
    return int(
        np.clip(math.ceil(max((spread / (0.7 * ERROR)) ** 2 / CHUNK, 2 * top / LARGEST)), 1, MOST)
    )


def judge(sample, chunks: int, first: int) -> dict:
    """The statistics of a cell; `sample(i)` is chunk number i of ratios to the truth."""
    ratio = np.concatenate([sample(first + i) for i in range(chunks)])
    error, largest = ratio.std(ddof=1) / np.sqrt(len(ratio)), ratio.max() / ratio.sum()
    return {
        "runs": len(ratio),
        "mean": float(ratio.mean()),
        "error": float(error),
        "largest": float(largest),
        "held": bool(error <= ERROR and largest <= LARGEST),
        "z": float((ratio.mean() - 1) / error),
    }


def cells_of(
    number: int, program: tuple[str, str, str], guides: dict[str, Guidance], truth: float
) -> list[dict]:
    """All cells of program `number`."""
    move, gate, temper = program
    chunk, cells = compiled(tuple(guides.values()), move, gate, temper), []
    adds_up = temper != "Adaptive" and GATES[gate][0] is TWICE
    for (guide, guidance), (which, name), kind in itertools.product(
        enumerate(guides), enumerate(NAMES_OF_MOVE[move]), range(len(KINDS) if adds_up else 1)
    ):

        def ratios(i, scheme, guide=guide, which=which, kind=kind):
            return np.exp(np.asarray(chunk(i, guide, which, kind, scheme), np.float64) - truth)

        first = lambda: (number * 128 + len(cells)) << 12  # of the keys of a cell
        needed = runs_for(ratios(first(), 0))
        for scheme, function in enumerate(SCHEMES):
            result = judge(
                lambda i, scheme=scheme, ratios=ratios: ratios(i, scheme), needed, first() + 1
            )
            parts = {
                "guidance": guidance,
                "proposal": name,
                "potential": type(KINDS[kind]).__name__,
                "gate": gate,
            }
            cells.append(parts | {"tempering": temper, "resampling": function.__name__} | result)
    return cells


def summary(cells: list[dict]) -> dict:
    """The statistics of z over cells. `pooled` is the mean ratio with equal weights: weights by the
    errors would favor cells with low estimates.
    """
    z, errors = np.array([cell["z"] for cell in cells]), np.array([cell["error"] for cell in cells])
    return {
        "cells": len(cells),
        "mean": float(z.mean()),
        "sd": float(z.std(ddof=1)),
        "max": float(np.abs(z).max()),
        "above_2": float(np.mean(np.abs(z) > 2)),
        "above_3": float(np.mean(np.abs(z) > 3)),
        "pooled": [
            float(np.mean([cell["mean"] for cell in cells])),
            float(np.sqrt(np.sum(errors**2)) / len(cells)),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="four programs")
    args = parser.parse_args()
    truth, begun, cells = chain_log_norm(), time.perf_counter(), []
    guides = guidances()
    chosen = programs()[:: 12 if args.quick else 1]
    with ThreadPoolExecutor(2) as pool:  # one compiles while another runs
        work = [
            pool.submit(cells_of, number, program, guides, truth)
            for number, program in enumerate(chosen)
        ]
        for done, found in enumerate(work):
            cells += found.result()
            took = time.perf_counter() - begun
            print(
                f"{done + 1} of {len(chosen)} programs, {len(cells)} cells, {took:.0f} s",
                flush=True,
            )
    axes = ("guidance", "proposal", "potential", "gate", "tempering", "resampling")
    by_axis = {
        axis: {
            value: summary([c for c in cells if c[axis] == value])
            for value in dict.fromkeys(c[axis] for c in cells)
        }
        for axis in axes
    }
    by_axis["all"] = {"": summary(cells)}
    print(
        "\n| axis | | cells | mean z | sd z | max abs z | > 2 | > 3 | mean of exp(log_norm) / Z "
        "|\n|---|---|---|---|---|---|---|---|---|"
    )
    for axis, rows in by_axis.items():
        for value, row in rows.items():
            print(
                f"| {axis} | {value} | {row['cells']} | {row['mean']:+.2f} | {row['sd']:.2f} | "
                f"{row['max']:.2f} | {row['above_2']:.1%} | "
                f"{row['above_3']:.2%} | {row['pooled'][0]:.4f} ± {row['pooled'][1]:.4f} |"
            )
    missed = [cell for cell in cells if not cell["held"]]
    runs = sum(cell["runs"] for cell in cells)
    print(
        f"\n{len(chosen)} programs, {len(cells)} cells, {runs:,} runs; error or largest run too "
        f"large in {len(missed)}:"
    )
    for cell in [*missed, *sorted(cells, key=lambda cell: -abs(cell["z"]))[:10]]:
        print(cell)
    if not args.quick:
        extremes = sorted(cells, key=lambda cell: -abs(cell["z"]))[:20]
        found = {
            "log_norm": truth,
            "programs": len(chosen),
            "runs": runs,
            "axes": by_axis,
            "missed": missed,
            "extremes": extremes,
            "z": [round(cell["z"], 3) for cell in cells],
            "seconds": time.perf_counter() - begun,
        }
        common.write("unbiased", found)


if __name__ == "__main__":
    main()
