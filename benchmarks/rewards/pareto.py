"""For two competing rewards, does each method follow the exact front as the weights change?

The prior has two modes in the plane (`problems.quadratic`). The rewards
`r_1 = -|x - (-1.5, 1.5)|^2` and `r_2 = -|x - (2, -1)|^2 / 2` are combined to `w r_1 + (1 - w) r_2`
at nine weights, scale 1. The exact tilts have closed mean rewards. They are compared with the
measured mean rewards, and W2 to each tilt is given over its floor (1,500 samples, 50 Heun steps).
`Conjugate` takes the sum as a black box. A point beyond the front is not better than the front: it
is further from the base law than the tilt, as W2 shows. Every method compiles once for all weights.

    python -m benchmarks.rewards.pareto [--quick]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common

SCALE, STEPS = 1.0, 50
OBJECTIVES = tj.rewards.Quadratic([-1.5, 1.5]), tj.rewards.Quadratic([2.0, -1.0], 0.5)
FIGURE = Path(__file__).parents[2] / "docs" / "pareto.png"
STYLE = {
    "Tilted": ("#0072B2", "o"),
    "Conjugate": ("#007A5E", "s"),
    "damped plug-in": ("#E69F00", "^"),
    "plug-in": ("#D55E00", "v"),
    "best-of-4": ("#CC79A7", "D"),
    "best-of-16": ("#6B6B6B", "P"),
}


class Opaque(eqx.Module):
    """A reward that hides its form; its weights stay leaves."""

    reward: tj.rewards.Reward

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.reward(x)


def methods(model: tj.Analytic, num: int) -> dict[str, Callable]:
    """Functions `(key, reward) -> (num, 2)`."""
    variance = tj.calibrate(jax.random.key(0), model, budget=2**18)
    run = lambda key, model, guidance=None, n=1: tj.sample(
        key, model, guidance, num=n * num, steps=STEPS
    )
    return {
        "Tilted": lambda key, reward: run(key, tj.Tilted(model, reward, SCALE)).x,
        "Conjugate": lambda key, reward: (
            run(key, model, tj.Conjugate(model, Opaque(reward), SCALE, variance=variance)).x
        ),
        "damped plug-in": lambda key, reward: (
            run(
                key,
                model,
                tj.PlugIn(tj.Exact(model), reward, tj.Damped(SCALE, tj.problems.quadratic().sigma)),
            ).x
        ),
        "plug-in": lambda key, reward: run(key, model, tj.PlugIn(tj.Exact(model), reward, SCALE)).x,
        "best-of-4": lambda key, reward: tj.best_of_n(run(key, model, n=4), reward, 4).x,
        "best-of-16": lambda key, reward: tj.best_of_n(run(key, model, n=16), reward, 16).x,
    }


def exact(prior: tj.GaussianMixture, w: jax.Array) -> tuple[theory.Tilt, list[float]]:
    tilt = theory.tilt(
        prior, tj.rewards.objectives.weighted(OBJECTIVES, jnp.stack([w, 1 - w])), SCALE
    )
    return tilt, [float(theory.expected_reward(tilt.mixture, one)) for one in OBJECTIVES]


def figure(curve: np.ndarray, rows: list[dict], base: list[float]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10.5, 4.3), layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.plot(*curve.T, color="#222222", lw=1.6, zorder=1, label="exact tilts")
    left.plot(*base, marker="*", color="#222222", ms=11, ls="", label="unguided")
    weights = [row["w"] for row in rows]
    for name, (color, marker) in STYLE.items():
        cells = [row["methods"][name] for row in rows]
        means = np.array([cell["mean"] for cell in cells])
        hollow = {
            "color": color,
            "marker": marker,
            "ms": 5.5,
            "mfc": "white" if name != "Tilted" else color,
            "mew": 1.3,
        }
        left.plot(*means.T, lw=0.7, label=name, **hollow)
        right.plot(
            weights,
            [cell["w2"] / row["floor"] for cell, row in zip(cells, rows, strict=True)],
            lw=0.9,
            label=name,
            **hollow,
        )
    left.set(
        xlabel="mean of $r_1$",
        ylabel="mean of $r_2$",
        title="where each method stands between two rewards",
    )
    right.set(
        xlabel="weight $w$ of $r_1$",
        yscale="log",
        title="how far its samples are from that tilt: $W_2$ / floor",
    )
    right.axhline(1, color="#222222", lw=1.6)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10.5)
    tj.plotting.save(drawn, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="three weights, few samples, nothing written"
    )
    quick = parser.parse_args().quick
    num, weights = (100, np.linspace(0, 1, 3)) if quick else (1500, np.linspace(0, 1, 9))
    prior = tj.problems.quadratic().prior
    model = tj.Analytic(prior)
    base = [float(theory.expected_reward(prior, one)) for one in OBJECTIVES]
    rows, runs = [], methods(model, num)
    print("| w | exact means | floor | method | means | W2 / floor |\n|---|---|---|---|---|---|")
    for i, w in enumerate(weights):
        tilt, means = exact(prior, jnp.asarray(w))
        truth = [tilt.sample(jax.random.key(seed), num) for seed in range(4)]
        floor = float(np.mean([tj.metrics.wasserstein(truth[0], other) for other in truth[1:]]))
        row: dict = {"w": float(w), "exact": means, "floor": floor, "methods": {}}
        for name, run in runs.items():
            x = run(jax.random.key(100 + i), tj.rewards.objectives.weighted(OBJECTIVES, [w, 1 - w]))
            values = np.asarray(tj.rewards.objectives.values(OBJECTIVES, x), np.float64)
            cell = {
                "mean": values.mean(axis=0).tolist(),
                "error": (values.std(axis=0, ddof=1) / np.sqrt(num)).tolist(),
                "w2": float(tj.metrics.wasserstein(x, truth[0])),
            }
            row["methods"][name] = cell
            shown = ", ".join(
                f"{mean:.2f} ± {error:.2f}"
                for mean, error in zip(cell["mean"], cell["error"], strict=True)
            )
            print(
                f"| {w:.3f} | {means[0]:.2f}, {means[1]:.2f} | {floor:.3f} | {name} | {shown} | "
                f"{cell['w2'] / floor:.2f} |",
                flush=True,
            )
        rows.append(row)
    # The value of each reward at the weight where only the other reward counts.
    corner = np.min([row["exact"] for row in rows], axis=0)
    area = lambda means: tj.rewards.objectives.hypervolume(means, corner)
    areas = {"exact": area([row["exact"] for row in rows])}
    areas |= {name: area([row["methods"][name]["mean"] for row in rows]) for name in runs}
    print(
        "\narea that the means dominate: "
        + ", ".join(f"{name} {value:.1f}" for name, value in areas.items())
    )
    if not quick:
        curve = np.array([exact(prior, jnp.asarray(w))[1] for w in np.linspace(0, 1, 41)])
        figure(curve, rows, base)
        results = {
            "scale": SCALE,
            "num": num,
            "steps": STEPS,
            "unguided": base,
            "rows": rows,
            "area": areas,
        }
        common.write("pareto", results)


if __name__ == "__main__":
    main()
