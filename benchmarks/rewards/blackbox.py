"""With 192 queries of a reward, how far below the optimum is the best query?

The data have eight modes of unit width on a ring in six dimensions (in a randomly rotated plane).
The reward is observed with noise of .05. It has a peak of height 1 at two widths from a mode, and a
broad peak of height .6 on the other side. Queries are made in batches of 16, by best-of-n (all
queries from the model), by steering with a surrogate that is fitted once to 64 draws of the model,
and by two optimistic searches that learn after each batch. Reported over twenty seeds are the
simple regret (of the noiseless reward) after 64, 128 and 192 queries, and the share of seeds that
reach the high peak (regret below .1).

    python -m benchmarks.rewards.blackbox [--quick] [--figure FILE]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import tiltjax as tj
from benchmarks import common

DIMENSIONS, MODES, NOISE, BATCH = 6, 8, 0.05, 16


def problem() -> tuple[tj.Model, tj.rewards.Reward, float]:
    """The model, the noiseless reward, and its largest value."""
    angles = 2 * np.pi * np.arange(MODES) / MODES
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(DIMENSIONS, 2)))[0]
    ring = 6 * np.stack([np.cos(angles), np.sin(angles)], 1) @ turn.T
    prior = tj.GaussianMixture(np.ones(MODES), ring, np.stack([np.eye(DIMENSIONS)] * MODES))
    away = rng.normal(size=DIMENSIONS)
    peak = ring[2] + 2 * away / np.linalg.norm(away)
    high, low = tj.rewards.Bump(peak, 2.5), 0.6 * tj.rewards.Bump(ring[6], 4.0)
    reward = high + low
    # The two peaks hardly overlap, so gradient ascent from the high peak finds the maximum.
    x = jnp.asarray(peak)
    for _ in range(200):
        x = x + 0.1 * jax.grad(lambda x: reward(x))(x)
    return tj.Analytic(prior), reward, float(reward(x))


def run(method: str, seed: int, rounds: int) -> np.ndarray:
    """The regret after each query."""
    model, reward, optimum = problem()
    clean = jax.jit(jax.vmap(reward))
    rng = np.random.default_rng(seed)

    def query(x):
        return np.asarray(clean(x)) + NOISE * rng.normal(size=len(x))

    key = jax.random.key(seed)
    settings = {"scale": 20.0, "steps": 20, "num": 128, "batch": BATCH}
    if method == "best of n":
        x = tj.sample(key, model, num=rounds * BATCH).x
    elif method == "surrogate of 64":
        first = tj.optimize(key, model, query, rounds=4, **settings | {"guide": unguided})
        guidance = tj.dps(model, first.surrogate, settings["scale"])
        rest = [
            tj.smc(jax.random.key(1000 * seed + j), model, guidance, num=128, steps=20).resample(
                jax.random.key(j), BATCH
            )
            for j in range(4, rounds)
        ]
        x = np.concatenate([first.x, *rest])
    else:
        surrogate = (
            tj.search.surrogates.GaussianProcess()
            if method == "Gaussian process"
            else tj.search.surrogates.Bootstrap()
        )
        x = tj.optimize(key, model, query, surrogate, rounds=rounds, **settings).x
    return optimum - np.maximum.accumulate(np.asarray(clean(x)))


def unguided(model, reward, scale):
    return tj.dps(model, reward, 0.0)


METHODS = ("best of n", "surrogate of 64", "Gaussian process", "bootstrap")


def figure(curves: dict[str, np.ndarray], file: str) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (name, rows), color in zip(
        curves.items(), ("0.6", "tab:orange", "tab:blue", "tab:green"), strict=True
    ):
        queries = 1 + np.arange(rows.shape[1])
        axes.plot(queries, rows.mean(0), color=color, label=name)
        error = rows.std(0, ddof=1) / np.sqrt(len(rows))
        axes.fill_between(
            queries, rows.mean(0) - error, rows.mean(0) + error, color=color, alpha=0.2, lw=0
        )
    axes.set(xlabel="queries", ylabel="regret of the best so far", xlim=(1, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    fig.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, few rounds")
    parser.add_argument("--figure", help="write the regret curves")
    args = parser.parse_args()
    seeds, rounds = (2, 6) if args.quick else (20, 12)
    curves, table = {}, {}
    marks = [4 * BATCH - 1, 8 * BATCH - 1, 12 * BATCH - 1]
    print(
        "| queries | " + " | ".join(str(m + 1) for m in marks) + " | found |\n|---|---|---|---|---|"
    )
    for method in METHODS:
        rows = np.stack([run(method, seed, rounds) for seed in range(seeds)])
        curves[method] = rows
        at = [m for m in marks if m < rows.shape[1]]
        error = rows.std(0, ddof=1) / np.sqrt(len(rows))
        table[method] = {
            "regret": {str(m + 1): [float(rows[:, m].mean()), float(error[m])] for m in at},
            "found": float(np.mean(rows[:, -1] < 0.1)),
        }
        cells = [f"{rows[:, m].mean():.3f} ± {error[m]:.3f}" for m in at]
        print(
            f"| {method} | " + " | ".join(cells) + f" | {np.mean(rows[:, -1] < 0.1):.2f} |",
            flush=True,
        )
    if args.figure:
        figure(curves, args.figure)
    if not args.quick:
        common.write("blackbox", {"seeds": seeds, "rounds": rounds, "table": table})


if __name__ == "__main__":
    main()
