"""How often do the intervals of weighted particles contain the right value?

Three modes with unequal covariances and a quadratic reward whose tilt leaves .05 of the mass to one
of them: 100 steps, 2,000 and 200 particles, 300 runs of each method. The right values are those of
the chain of 100 steps, by one run of `Laplace` with a million particles. For the probabilities of
three events, four means and log Z, the results have

    covered      the runs whose 95% interval contains the right value,
    normal       the same for `mean ± 1.96 standard_error`,
    warned       the runs that warn, because the support is below 20,
    silent       the runs that neither cover nor warn,
    error        the root mean square of `standard_error` over the standard deviation of the runs,
    width        the median width over the spread of the runs (from quantile .025 to quantile .975),
    support      the median support.

    python -m benchmarks.weighted.intervals [--quick]
"""

import argparse
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import tiltjax as tj
from benchmarks import common
from tiltjax.particles import Particles

SCALE, STEPS, SIZES, RUNS, MANY = 0.7, 100, (2000, 200), 300, 2**20
FEW = 20  # the support below which an interval warns
PRIOR = tj.GaussianMixture(
    weights=[0.4, 0.35, 0.25],
    means=[[-2, 0], [2, 0.5], [0, 2.5]],
    covs=[[[0.6, 0.2], [0.2, 0.3]], [[0.3, -0.1], [-0.1, 0.5]], [[0.2, 0], [0, 0.2]]],
)
MODEL, REWARD = tj.Analytic(PRIOR), tj.rewards.Quadratic([0.5, 1])
EVENTS: dict[str, Callable] = {
    "P(x_1 < -1)": lambda x: x[0] < -1,
    "P(x_1 > 1)": lambda x: x[0] > 1,
    "P(x_2 > 2.5)": lambda x: x[1] > 2.5,
}
MEANS: dict[str, Callable] = {
    "E x_1": lambda x: x[0],
    "E x_2": lambda x: x[1],
    "E of the squared norm": lambda x: jnp.sum(x**2),
    "E of the reward": REWARD,
}
GROUPS = [lambda x, of=of: jnp.stack([fn(x) for fn in of.values()]) for of in (EVENTS, MEANS)]
NAMES = (*EVENTS, *MEANS, "log Z")

# (key, num) -> Particles
METHODS: dict[str, Callable[[jax.Array, int], Particles]] = {
    "smc, Laplace": lambda key, num: tj.smc(
        key, MODEL, tj.Laplace(MODEL, REWARD, SCALE), num=num, steps=STEPS
    ),
    "smc, dps": lambda key, num: tj.smc(
        key, MODEL, tj.dps(MODEL, REWARD, SCALE), num=num, steps=STEPS
    ),
    "das": lambda key, num: tj.das(key, MODEL, REWARD, scale=SCALE, num=num, steps=STEPS),
    "tds": lambda key, num: tj.tds(key, MODEL, REWARD, scale=SCALE, num=num, steps=STEPS),
    "fk_steering": lambda key, num: tj.fk_steering(
        key, MODEL, REWARD, scale=SCALE, num=num, steps=STEPS
    ),
}


def right_values(num: int) -> tuple[np.ndarray, np.ndarray]:
    """The right values in the order of `NAMES`, and their standard errors."""
    guidance = tj.Laplace(MODEL, REWARD, SCALE)
    key = jax.random.key(1)
    many = tj.smc(key, MODEL, guidance, num=num, steps=STEPS, chunk_size=2**14)
    values, errors = [], []
    for group in GROUPS:
        values += list(np.asarray(many.mean(group)))
        errors += list(np.asarray(many.standard_error(group)))
    low, high = many.log_norm_interval()
    return np.array([*values, many.log_norm]), np.array([*errors, (high - low) / 3.92])


def judge(particles: Particles) -> np.ndarray:
    """The estimates, their standard errors, both ends of the intervals and the supports, in the
    order of `NAMES`: `(5, 8)`.
    """
    of = particles
    columns = [
        [of.mean(fn), of.standard_error(fn), *of.interval(fn), of.support(fn)] for fn in GROUPS
    ]
    assert particles.trace is not None
    weights, roots = np.asarray(particles.weights, np.float64), np.asarray(particles.trace.roots)
    squares = (np.bincount(roots, weights, len(weights)) - 1 / len(weights)) ** 2
    error, support = np.sqrt(squares.sum()), squares.sum() ** 2 / np.sum(squares**2)
    log_norm = [particles.log_norm, error, *particles.log_norm_interval(), support]
    return np.concatenate([*columns, np.reshape(log_norm, (5, 1))], axis=1)


def coverage(found: np.ndarray, right: np.ndarray) -> dict:
    """The measurements of one statistic, from `(runs, 5)` of `judge`."""
    value, error, low, high, support = found.T
    covered, warned = (low <= right) & (right <= high), support < FEW
    spread = np.diff(np.quantile(value, [0.025, 0.975]))[0]
    return {
        "covered": float(covered.mean()),
        "normal": float(np.mean(np.abs(value - right) <= 1.96 * error)),
        "warned": float(warned.mean()),
        "silent": float(np.mean(~covered & ~warned)),
        "error": float(np.sqrt(np.mean(error**2)) / value.std()),
        "width": float(np.median(high - low) / spread),
        "support": float(np.median(support)),
        "bias": float((value.mean() - right) / value.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="20 runs")
    args = parser.parse_args()
    runs, many = (20, 2**14) if args.quick else (RUNS, MANY)
    warnings.simplefilter("ignore")  # the supports say which intervals warn
    right, errors = right_values(many)
    truth = dict(zip(NAMES, np.stack([right, errors], 1).tolist(), strict=True))
    print(truth, flush=True)
    table: dict[str, dict[str, dict]] = {}
    keys = jax.random.split(jax.random.key(0), runs)
    begun = common.cpu_seconds()
    for size in SIZES:
        for name, method in METHODS.items():
            run = functools.partial(method, num=size)
            particles = jax.jit(lambda keys, run=run: jax.lax.map(run, keys))(keys)
            each = (jax.tree.map(lambda leaf, i=i: leaf[i], particles) for i in range(runs))
            found = np.stack([judge(one) for one in each])
            row = {of: coverage(found[:, :, i], right[i]) for i, of in enumerate(NAMES)}
            table.setdefault(str(size), {})[name] = row
            print(f"\n{size} particles, {name}: {common.cpu_seconds() - begun:.0f} CPU-s")
            for of, cell in row.items():
                print(
                    f"{of:24}", *(f"{key} {value:.3f}" for key, value in cell.items()), flush=True
                )
    if not args.quick:
        common.write("intervals", {"runs": runs, "right": truth, "table": table})


if __name__ == "__main__":
    main()
