"""On the mixture toys of DAS with the exact score, do settings of one loop reach the targets, and
why
does the published loop miss them?

The toys are nine modes on a square with the reward -x^2/100 - y^2, and eight modes on a circle with
the reward -x^2 - (y - 1)^2/10, at scale 1. The noise levels are those of DDPM (1,000, betas from
1e-4 to .02), with 100 ancestral steps. There are independent runs of 100 particles, of which ten
are used. Reported are the mean reward with its standard error over runs (or over points, if there
are no runs), and the earth mover's distance (Euclidean, by exact assignment) of 500 points to 500
of the target, mean and standard deviation over twenty subsets, with its floor.

`published` is the mean reward of Kim et al. (arXiv 2501.05803) with a learned score, read from the
notebooks' figures, which show no distances. The published loop has two faults, and `notebook`
repeats it with the exact score. First, resampling passes on states and noise predictions, but
neither the denoised states, which make up most of the next mean, nor guidance and twists. Second,
the last weights are 0/0, so that the last resampling is skipped. The table also has the loop
without these faults. Guidance with a shift of `∇ r(D)`, not multiplied by the step's variance, is
the baseline of that paper.

    python -m benchmarks.weighted.toys [--quick]
"""

import argparse
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import theory
import tiltjax as tj
from benchmarks import common
from tiltjax.particles import effective

LEVELS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SQUARE = [[x, y] for x in (-4.0, 0.0, 4.0) for y in (-4.0, 0.0, 4.0)]
CIRCLE = [[4 * np.cos(a), 4 * np.sin(a)] for a in np.arange(8) * np.pi / 4]
TOYS = {
    "nine modes": (SQUARE, tj.rewards.Quadratic([0.0, 0.0], weight=[0.01, 1.0])),
    "eight modes": (CIRCLE, tj.rewards.Quadratic([0.0, 1.0], weight=[1.0, 0.1])),
}
PUBLISHED = {  # the last column is the swiss roll's, of `toys_learned.py`
    "target (floor)": (-0.29, -1.34, -0.72),
    "base": (-10.40, -9.15, -3.26),
    "guided by ∇ r(D), no weights": (-337.67, -406.79, -926.80),
    "DAS, both faults": (-0.21, -1.44, -0.50),
}
STEPS, KEPT, GAMMA = 100, 10, 0.008


def grid(path: tj.DiscreteVP) -> jax.Array:
    """The times of a run."""
    return jnp.append(path.clock(jnp.asarray(np.linspace(999, 0, STEPS))), 1.0)


class Unscaled(tj.weighted.proposals.Proposal):
    """The base kernel's mean plus `∇ log h`, independent of the step's variance."""

    def shift(self, kernel, pull):
        return pull / kernel.tweedie


def notebook(key, model, reward, times, num: int, descends: bool, weighs_last: bool):
    """The loop of DAS as in its notebooks, with and without the faults of resampling and of the
    last weights.

    The last step has variance zero. It therefore moves nothing, unless the states and noise
    predictions of a particle come from another particle than its denoised states.
    """
    path, gathered = (
        model.interpolant,
        lambda tree, ancestors: jax.tree.map(lambda leaf: leaf[ancestors], tree),
    )
    key_initial, key_run = jax.random.split(key)
    x = jax.vmap(lambda key: model.initial(key, times[0]))(jax.random.split(key_initial, num))
    zeros = jnp.zeros(num)

    def advance(carry, scanned):
        x, log_weights, before = carry
        key, t, u, factor = scanned
        key_resample, key_noise = jax.random.split(key)
        denoised = jax.vmap(lambda x: model.denoise(t, x))(x)
        noise = (x - path.alpha(t) * denoised) / path.sigma(t)
        value, slope = jax.vmap(jax.value_and_grad(lambda x: factor * reward(model.denoise(t, x))))(
            x
        )
        log_weights = log_weights + value - before
        uneven = effective(log_weights) < 0.5 * num
        ancestors = jnp.where(
            uneven, tj.resampling.ssp(key_resample, log_weights), jnp.arange(num, dtype=jnp.int32)
        )
        x, noise = gathered((x, noise), ancestors)
        if descends:
            denoised, slope, value = gathered((denoised, slope, value), ancestors)
        log_weights = jnp.where(uneven, 0.0, log_weights)
        kernel = tj.Ancestral().kernel(path, t, u)
        xi = jax.random.normal(key_noise, x.shape)
        mean = path.alpha(u) * denoised + kernel.keep * path.sigma(t) * noise
        x = mean + kernel.std**2 * slope + kernel.std * xi
        ratio = (
            -kernel.std * jnp.sum(slope * xi, axis=1)
            - kernel.std**2 * jnp.sum(slope**2, axis=1) / 2
        )
        return (x, log_weights + ratio, value), uneven

    # The step from level 0 ends at level 0.
    ends = jnp.append(times[1:-1], times[-2])
    factors = jnp.minimum(jnp.expm1(jnp.arange(STEPS) * np.log1p(GAMMA)), 1.0)
    scanned = (jax.random.split(key_run, STEPS), times[:-1], ends, factors)
    (x, log_weights, value), _ = jax.lax.scan(advance, (x, zeros, zeros), scanned)
    log_weights = log_weights + jax.vmap(reward)(x) - value
    return tj.Particles(x, log_weights if weighs_last else zeros)


def mover(x: np.ndarray, y: np.ndarray) -> float:
    """The mean Euclidean distance of an optimal assignment."""
    cost = cdist(x, y)
    return float(cost[linear_sum_assignment(cost)].mean())


def judged(points, *, reward, target: np.ndarray, rng: np.random.Generator) -> dict:
    """The mean reward and EMD of points `(runs, n, d)`."""
    points = np.asarray(points)
    means = np.asarray(jax.vmap(jax.vmap(reward))(points)).mean(axis=1)
    flat = points.reshape(-1, points.shape[-1])
    draws = lambda x: x[rng.integers(len(x), size=500)]
    distances = [mover(draws(flat), draws(target)) for _ in range(20)]
    return {
        "reward": [float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))],
        "emd": [float(np.mean(distances)), float(np.std(distances))],
    }


def methods(model: tj.Model, reward: tj.rewards.Reward, times) -> dict:
    """Functions of a key, each of which returns a run of weighted particles."""
    laplace = tj.Laplace(model, reward, 1.0)
    run = lambda method, num=100, **settings: (
        lambda key: method(key, model, reward, num=num, times=times, **settings)
    )
    loop = lambda **kept: lambda key: notebook(key, model, reward, times, 100, **kept)
    return {
        "DAS, both faults": loop(descends=False, weighs_last=False),
        "DAS, caches forgotten": loop(descends=False, weighs_last=True),
        "DAS, last weights lost": loop(descends=True, weighs_last=False),
        "DAS, neither fault": loop(descends=True, weighs_last=True),
        "DAS": run(tj.das, gamma=GAMMA),
        "DAS without gradient": run(tj.das, gamma=GAMMA, proposal=tj.weighted.proposals.Base()),
        "DAS, 10 particles": run(tj.das, num=10, gamma=GAMMA),
        "TDS": run(tj.tds),
        "FK steering": run(tj.fk_steering),
        "FK steering, difference": run(
            tj.fk_steering, potential=tj.weighted.potentials.Difference()
        ),
        "Laplace twist": lambda key: tj.smc(key, model, laplace, num=100, times=times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few runs")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "the effective sample size")
    runs = 20 if args.quick else 300
    path = tj.DiscreteVP(LEVELS)
    times = grid(path)
    table: dict[str, dict] = {}
    for place, (toy, (means, reward)) in enumerate(TOYS.items()):
        prior = tj.GaussianMixture(
            np.ones(len(means)), means, 0.3 * np.stack([np.eye(2)] * len(means))
        )
        model = tj.Analytic(prior, path)
        truth = theory.tilt(prior, reward, 1.0)
        target = np.asarray(truth.sample(jax.random.key(1), 10_000))
        judge = functools.partial(
            judged, reward=reward, target=target, rng=np.random.default_rng(0)
        )

        rows: dict[str, dict] = {
            "target (floor)": judge(truth.sample(jax.random.key(2), 10_000)[:, None])
        }
        rows["target (floor)"]["reward"] = [
            float(theory.expected_reward(truth.mixture, reward)),
            0.0,
        ]
        size = {"num": runs * KEPT, "times": times}
        rows["base"] = judge(
            tj.sample(jax.random.key(3), model, solver=tj.Ancestral(), **size).x[:, None]
        )
        for name, proposal in {
            "guided, no weights": tj.weighted.proposals.Shifted(),
            "guided by ∇ r(D), no weights": Unscaled(),
        }.items():
            guided = tj.smc(
                jax.random.key(3),
                model,
                tj.dps(model, reward, 1.0),
                proposal=proposal,
                ess_threshold=0.0,
                **size,
            )
            rows[name] = judge(guided.x[:, None])
        for name, run in methods(model, reward, times).items():

            def one(key, run=run):
                key_run, key_keep = jax.random.split(key)
                return run(key_run).resample(key_keep, KEPT)

            rows[name] = judge(
                jax.lax.map(one, jax.random.split(jax.random.key(4), runs), batch_size=50)
            )
        for name, row in rows.items():
            row["published"] = PUBLISHED[name][place] if name in PUBLISHED else None
        table[toy] = rows
        print(f"\n{toy}\n| | mean reward | EMD | published reward |\n|---|---|---|---|")
        for name, row in rows.items():
            (mean, error), (emd, spread), published = row["reward"], row["emd"], row["published"]
            print(
                f"| {name} | {mean:.3f} ± {error:.3f} | {emd:.2f} ± {spread:.2f} "
                f"| {published or ''} |",
                flush=True,
            )
    if not args.quick:
        common.write("toys", {"runs": runs, "table": table})


if __name__ == "__main__":
    main()
