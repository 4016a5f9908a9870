"""Which methods sample the right squares of a checkerboard, and at what cost?

The prior is the exact model of the checkerboard, the reward a bump of width 1.5, the scale 10.
Reported are the mean reward and the covariance trace of the samples, against those of the tilt by
quadrature. The cost is in denoiser calls and pullbacks for each sample of the output, including the
samples that best-of-n discards.

The plug-in rows use the published setting (200 Euler steps from t = 0, 50 GLASS steps), once with
the right noise scale sqrt(3), and once as published. The published code assumes unit noise in the
posterior draws and in the gain of the guidance. Published numbers: Dandapanthula and Boffi (arXiv
2606.02884), with a learned network.

With `--network CHECKPOINT` every method uses the network of `training.py`, trained for 10,000 steps
or read from the checkpoint. There are then fewer settings, and fewer samples in the plug-in rows,
as published. Outside of its training data a network is arbitrary. A guidance that evaluates the
network there moves samples out further: without a bound, one percent of `Conjugate`'s samples
diverge. The network's denoiser is therefore clipped to the square of the data. The clip is left out
for methods that differentiate the network, because it has no gradient.

    python -m benchmarks.accuracy.checkerboard [--quick] [--network CHECKPOINT]
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tiltjax as tj
from benchmarks import common
from benchmarks.training import training

REWARD, SCALE = tj.rewards.Bump([0.5, 0.5], 1.5), 10.0
WITHIN = 0.01, 0.04  # tolerances for the tilt: of its mean reward, of its trace


class UnitNoise(tj.Model):
    """A model's denoiser and start on an interpolant that assumes unit noise."""

    board: tj.Model
    interpolant: tj.interpolants.Interpolant
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(self, board: tj.Model):
        self.board, self.interpolant = board, tj.Linear(1.0)
        self.shape, self.dtype = board.shape, board.dtype

    def denoise(self, t, x):
        return self.board.denoise(t, x)

    def initial(self, key, t):
        return self.board.initial(key, t)


def bounded(network: Any, t: jax.Array, x: jax.Array) -> jax.Array:
    """A velocity network's denoiser, clipped to the data's square, which contains every posterior
    mean.
    """
    path = tj.models.Checkerboard().interpolant
    return jnp.clip(jax.vmap(path.denoised_from_velocity)(t, x, network(t, x)), -3.0, 3.0)


class Row(NamedTuple):
    """A method: `samples(seed, num)` returns about `num` samples; the costs are denoiser calls and
    pullbacks for each of them.
    """

    name: str
    samples: Callable
    calls: int
    pullbacks: int
    published: tuple[float, float] | None = None


def exact() -> tuple[float, float, float]:
    """Mean reward, covariance trace and log Z of the tilt, by Gauss-Legendre on each square."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, w = (nodes + 1) / 2, weights / 2
    corners = [(i, j) for i in range(-3, 3) for j in range(-3, 3) if (i + j) % 2 == 0]
    points = np.concatenate(
        [np.stack(np.meshgrid(i + u, j + u, indexing="ij"), -1).reshape(-1, 2) for i, j in corners]
    )
    rewards = np.exp(-np.sum((points - 0.5) ** 2, axis=1) / (2 * 1.5**2))
    mass = np.tile(np.outer(w, w).ravel(), len(corners)) / len(corners) * np.exp(SCALE * rewards)
    norm = mass.sum()
    mean = mass @ points / norm
    return (
        mass @ rewards / norm,
        mass @ np.sum((points - mean) ** 2, axis=1) / norm,
        float(np.log(norm)),
    )


def summary(x) -> tuple[tuple[float, float], tuple[float, float]]:
    """The mean reward and the covariance trace, each with its standard error."""
    x = np.asarray(x, np.float64)
    rewards = np.exp(-np.sum((x - 0.5) ** 2, axis=1) / (2 * 1.5**2))
    squares = np.sum((x - x.mean(axis=0)) ** 2, axis=1)
    error = lambda values: values.std(ddof=1) / np.sqrt(len(values))
    return (rewards.mean(), error(rewards)), (
        squares.mean() * len(x) / (len(x) - 1),
        error(squares),
    )


def plug_in_rows(model: tj.Model, label: str) -> list[Row]:
    steps, inner = 200, 50
    # The published first step is at t = 0, but evaluates the guidance at the second time, where
    # this run starts.
    times = jnp.linspace(0.0, 1.0, steps + 1)[1:]

    @functools.cache
    def run(damped: bool, k: int, num: int):
        scale = tj.Damped(SCALE, 0.2) if damped else SCALE
        guidance = tj.PlugIn(tj.Glass(model, inner_steps=inner), REWARD, scale, k=k)
        return tj.sample(
            jax.random.key(7),
            model,
            guidance,
            num=num,
            times=times,
            solver=tj.Euler(),
            chunk_size=500,
        )

    def row(name, published, *, damped=False, k=1, n=1):
        def samples(seed, num):
            # One run provides all groups.
            return tj.best_of_n(run(damped, k, num if k > 1 else 4 * num), REWARD, n).x[:num]

        cost = n * common.plug_in_calls(inner, k) * (steps - 1)
        return Row(f"{name}, {label}", samples, cost, cost, published)

    return [
        row("plug-in k = 1", (0.764, 1.930)),
        row("plug-in k = 8", (0.804, 1.397), k=8),
        row("best-of-2 of plug-in", (0.914, 0.520), n=2),
        row("best-of-4 of plug-in", (0.978, 0.107), n=4),
        row("best-of-4 of damped (.2)", (0.920, 0.429), damped=True, n=4),
    ]


def guided_row(
    board: tj.Model,
    name: str,
    guidance: tj.guidance.Guidance | None,
    steps: int,
    calls: int,
    pulls: int,
):
    def samples(seed, num):
        return tj.sample(jax.random.key(seed), board, guidance, num=num, steps=steps).x

    evaluations = 2 * steps - 1
    return Row(f"{name}, {steps} Heun steps", samples, calls * evaluations, pulls * evaluations)


def softmax_row(board: tj.Model, n: int) -> Row:
    def samples(seed, num):
        run = tj.sample(jax.random.key(seed), board, num=n * num, steps=20, chunk_size=20_000)
        return tj.softmax_of_n(jax.random.key(seed + 1), run, REWARD, n, SCALE).x

    return Row(f"softmax-of-{n}, unguided, 20 Heun steps", samples, 39 * n, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="without the plug-in rows, 2,000 samples"
    )
    parser.add_argument(
        "--keep-plug-in",
        action="store_true",
        help="take the plug-in rows, the slow ones, from the last results",
    )
    parser.add_argument("--network", type=Path, help="with the learned network of this checkpoint")
    args = parser.parse_args()
    law = board = raw = tj.models.Checkerboard()
    if args.network is not None:
        network = training.velocity(
            law, 300 if args.quick else 10_000, None if args.quick else args.network
        ).average
        raw = tj.from_velocity(network, shape=law.shape, batched=True, interpolant=law.interpolant)
        board = tj.from_denoiser(
            bounded, network, shape=law.shape, batched=True, interpolant=law.interpolant
        )
    file = "checkerboard" if args.network is None else "checkerboard_network"
    reward, trace, log_norm = exact()
    print(
        f"the tilt: mean reward {reward:.4f}, covariance trace {trace:.4f}, log Z {log_norm:.4f}\n",
        flush=True,
    )

    variance = tj.calibrate(jax.random.key(1), board, budget=2**18)
    conjugate = lambda **settings: tj.Conjugate(board, REWARD, SCALE, variance=variance, **settings)
    many, few = (
        (2000, 0) if args.quick else (20_000, 500) if args.network is None else (10_000, 200)
    )
    grids = (10, 15, 20, 30, 60) if args.network is None else (20, 60)
    rows = [
        (
            many,
            Row(
                "exact samples of the base",
                lambda seed, num: law.sample(jax.random.key(seed), num),
                0,
                0,
            ),
        )
    ]
    settings = {
        "Conjugate": conjugate(),
        "Conjugate, 4 draws, keep = 0": conjugate(smoothing=0.0),
        "Conjugate, 2 draws": conjugate(draws=2),
    }
    for name, guidance in settings.items():
        rows += [(many, guided_row(board, name, guidance, steps, 2, 0)) for steps in grids]
    rows.append(
        (
            many,
            guided_row(
                board, "Conjugate, 4 anisotropic draws", conjugate(anisotropic=True), 60, 4, 0
            ),
        )
    )
    rows.append((many, guided_row(raw, "Laplace", tj.Laplace(raw, REWARD, SCALE), 60, 1, 2)))
    rows.append((many, guided_row(raw, "DPS", tj.dps(raw, REWARD, SCALE), 60, 1, 1)))
    rows += [(many, softmax_row(board, n)) for n in (4, 16)]
    if few and not args.keep_plug_in:
        if args.network is None:
            rows += [(few, row) for row in plug_in_rows(raw, "base scale respected")]
        rows += [(few, row) for row in plug_in_rows(UnitNoise(raw), "as published")]

    table, failed = [], {}
    for num, row in rows:
        try:
            x = row.samples(7, num)
        except FloatingPointError as error:  # a network evaluated outside of its data
            failed[row.name] = str(error)
            print(f"{row.name:52s} {error}", flush=True)
            continue
        lost = int(np.sum(~np.all(np.isfinite(np.asarray(x)), axis=1)))
        (mean, mean_error), (spread, spread_error) = summary(x)
        off = mean / reward - 1, spread / trace - 1
        result = {
            "num": len(x),
            "calls": row.calls,
            "pullbacks": row.pullbacks,
            "published": row.published,
        }
        result |= {
            "mean_reward": (mean, mean_error),
            "trace": (spread, spread_error),
            "not_finite": lost,
        }
        result["is_tilt"] = bool(abs(off[0]) < WITHIN[0] and abs(off[1]) < WITHIN[1])
        table.append({"method": row.name, "commit": common.COMMIT, **result})
        print(
            f"{row.name:52s} {mean:.4f} ± {mean_error:.4f} ({off[0]:+6.2%})  {spread:.4f} ± "
            f"{spread_error:.4f} ({off[1]:+7.2%})  "
            f"{row.calls:6d} calls, {row.pullbacks:6d} pullbacks"
            f"{'  within' if result['is_tilt'] else ''}",
            flush=True,
        )

    if args.keep_plug_in:
        last = json.loads((common.RESULTS / f"{file}.json").read_text())["rows"]
        table += [row for row in last if row["method"] not in {new["method"] for new in table}]

    cost = lambda row: row["calls"] + row["pullbacks"]
    hits = sorted((row for row in table if row["is_tilt"]), key=cost)
    print(
        f"\n| method | mean reward ({reward:.4f}) | covariance trace ({trace:.4f}) | denoiser "
        "calls | pullbacks | published |"
    )
    print("|---|---|---|---|---|---|")
    for row in table:
        published = "" if row["published"] is None else "{:.3f} / {:.3f}".format(*row["published"])
        print(
            f"| {row['method']} | {row['mean_reward'][0]:.3f} ± {row['mean_reward'][1]:.3f} | "
            f"{row['trace'][0]:.3f} ± "
            f"{row['trace'][1]:.3f} | {row['calls']:,} | {row['pullbacks']:,} | {published} |"
        )
    if hits:
        print(
            f"\nThe cheapest within 1% and 4%: {hits[0]['method']}, {cost(hits[0])} calls and "
            "pullbacks a sample."
        )
    if not args.quick:
        truth = {"mean_reward": reward, "trace": trace, "log_norm": log_norm}
        common.write(file, {"truth": truth, "failed": failed, "rows": table})


if __name__ == "__main__":
    main()
