"""Does `theory.recommend` rank methods on Gaussian mixtures as their samples do?

Five mixtures of three to five rotated, unequal modes, one of them with a singular covariance, have
near and far targets. Every option of the plan is run with its steps and its settings, and W2 to the
tilt is measured on 1,000 samples. The sampling floor is subtracted as in the prediction: W2^2
within two sets of samples, and within two sets of the tilt, each count half. A pair of methods
whose measured W2 differ by more than 20%, and by more than two errors of both, is in the wrong
order if the predicted order is another. A second table has one damped draw on the named problems,
with 49 steps as published.

    python -m benchmarks.accuracy.recommended [--quick]
"""

import argparse
import itertools
import re
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common
from benchmarks.accuracy.between_modes import rotated

NAMED = {"quadratic": 0.256, "noniso": 0.282, "unequal": 0.295, "uncentered": 0.958}
BUDGET = 1000


class Case(NamedTuple):
    """A prior, a reward and a scale."""

    prior: tj.GaussianMixture
    reward: tj.rewards.Reward
    scale: float


class Distance(NamedTuple):
    """W2 without its floor, and its standard error."""

    w2: float
    error: float


def cases() -> dict[str, Case]:
    """The mixtures, and an anisotropic reward on the third."""
    plane = lambda weights, means, covs, reward, scale: Case(
        tj.GaussianMixture(weights, means, np.stack(covs)), reward, scale
    )
    quadratic = tj.rewards.Quadratic
    return {
        "three modes, near target": plane(
            [0.5, 0.3, 0.2],
            [[-2.0, 0.5], [1.5, 1.5], [0.5, -2.0]],
            [rotated(0.4, 1.0, 0.4), rotated(-0.7, 0.8, 0.3), rotated(1.3, 0.9, 0.5)],
            quadratic([0.3, 0.4]),
            0.6,
        ),
        "three modes, far target": plane(
            [0.2, 0.5, 0.3],
            [[-2.5, -0.5], [2.0, 0.0], [0.0, 2.0]],
            [rotated(0.9, 0.8, 0.3), rotated(-0.3, 0.7, 0.5), rotated(2.0, 0.6, 0.4)],
            quadratic([-4.0, 4.0]),
            0.4,
        ),
        "four modes, anisotropic": plane(
            [0.4, 0.1, 0.2, 0.3],
            [[-3.0, 1.0], [3.0, 2.0], [2.0, -2.0], [-1.0, -3.0]],
            [
                rotated(1.0, 0.8, 0.4),
                rotated(0.2, 0.6, 0.5),
                rotated(-0.5, 1.0, 0.3),
                rotated(2.0, 0.7, 0.6),
            ],
            quadratic([1.0, 0.5], weight=rotated(0.6, 1.0, 0.6)),
            0.5,
        ),
        "four modes, one singular": plane(
            [0.3, 0.3, 0.25, 0.15],
            [[-1.5, -1.5], [1.5, -1.0], [1.0, 1.8], [-1.2, 1.5]],
            [
                rotated(0.3, 0.9, 0.0),
                rotated(1.2, 0.7, 0.3),
                rotated(-0.4, 0.8, 0.4),
                rotated(0.8, 0.5, 0.4),
            ],
            quadratic([0.0, 2.5]),
            1.0,
        ),
        "five modes": plane(
            [0.3, 0.25, 0.2, 0.15, 0.1],
            [[0.0, 0.0], [3.0, 0.5], [-2.5, 1.5], [0.5, -3.0], [-1.5, -2.0]],
            [
                rotated(0.5, 0.6, 0.4),
                rotated(1.5, 0.9, 0.3),
                rotated(-0.6, 0.8, 0.5),
                rotated(0.1, 1.0, 0.3),
                rotated(2.2, 0.5, 0.5),
            ],
            quadratic([2.0, 2.0]),
            0.8,
        ),
    }


def run(case: Case, option: theory.Option) -> Callable[[jax.Array, int], jax.Array]:
    """The samples of an option as a function of a key and their number."""
    model, steps = tj.Analytic(case.prior), option.steps
    names: dict[str, Any] = {**vars(tj), "model": model, "reward": case.reward}
    one_of = re.match(r"one of (\d+) weighted paths, ", option.method)
    method = option.method[one_of.end() :] if one_of else option.method
    call = lambda **given: eval(method, names | given)

    def samples(key: jax.Array, num: int) -> jax.Array:
        if option.method == "no guidance":
            return tj.sample(key, model, num=num, steps=steps).x
        if option.method.startswith("Tilted"):
            return tj.sample(key, call(), num=num, steps=steps).x
        if one_of:
            n, keys = int(one_of[1]), jax.random.split(key)
            with warnings.catch_warnings(action="ignore"):  # about a low effective sample size
                found = tj.smc(keys[0], model, call(), num=num * n, steps=steps, ess_threshold=0)
            chosen = jax.random.categorical(keys[1], found.log_weights.reshape(num, n))
            return found.x.reshape(num, n, -1)[jnp.arange(num), chosen]
        if "particles" not in option.method:
            return tj.sample(key, model, call(), num=num, steps=steps).x
        n = round(option.cost / (2 * steps - 1))
        key, other = jax.random.split(key)
        return call(key=other, particles=tj.sample(key, model, num=num * n, steps=steps)).x

    return samples


def distance(draw: Callable, exact: Callable, num: int, sets: int) -> Distance:
    """W2 between two laws given by samplers, without its floor."""
    keys = lambda seed: jax.random.split(jax.random.key(seed), sets)
    x, y = ([fn(key, num) for key in keys(seed)] for seed, fn in enumerate((draw, exact)))
    square = lambda a, b: tj.metrics.wasserstein(a, b) ** 2
    squares = lambda a, b: np.array([square(*pair) for pair in zip(a, b, strict=True)])
    within = lambda z: squares(z, z[1:] + z[:1])
    found = squares(x, y) - (within(x) + within(y)) / 2
    w2 = float(np.sqrt(max(np.mean(found), 0)))
    error = float(np.std(found, ddof=1) / np.sqrt(sets))
    return Distance(w2, float(np.sqrt(w2**2 + error)) - w2)


def compare(case: Case, budget: float, num: int, sets: int) -> dict[str, Any]:
    """The predicted and the measured W2 of all options, and how they disagree."""
    begun = time.perf_counter()
    plan = theory.recommend(case.prior, case.reward, case.scale, budget)
    seconds = time.perf_counter() - begun
    exact = lambda key, num: plan.tilt.sample(key, num)
    rows = []
    for option in plan.options:
        measured = distance(run(case, option), exact, num, sets)
        rows.append(
            {
                "method": option.method,
                "steps": option.steps,
                "predicted": [option.error, option.spread],
                "measured": list(measured),
            }
        )
        print(
            f"  {option.method:52s} {option.steps:4d} {option.error:8.3f} ± {option.spread:.3f} "
            f"{measured.w2:8.3f} ± {measured.error:.3f}",
            flush=True,
        )
    return {"rows": rows, "seconds": seconds, **disagreement(rows)}


def disagreement(rows: list[dict[str, Any]]) -> dict[str, int]:
    """`pairs`: of methods whose measured W2 differ by more than 20%, and by more than two errors of
    both; `wrong`: those of them that are predicted in another order; `off`: methods whose measured
    W2 is not within 15% of the prediction and the errors of both.
    """
    pairs = wrong = 0
    for a, b in itertools.combinations(rows, 2):
        low, high = sorted((a, b), key=lambda row: row["measured"][0])
        (least, error), (most, other) = low["measured"], high["measured"]
        if most > 1.2 * least and most > least + 2 * (error + other):
            pairs += 1
            wrong += high["predicted"][0] < low["predicted"][0]
    off = sum(
        abs(row["predicted"][0] - row["measured"][0])
        > 0.15 * row["measured"][0] + row["predicted"][1] + row["measured"][1]
        for row in rows
    )
    return {"pairs": pairs, "wrong": wrong, "off": off}


def damped(name: str) -> dict[str, Any]:
    """One damped draw on a named problem, with the published steps."""
    problem = tj.problems.get(name)
    times = jnp.linspace(0.001, 0.999, 50)
    scale = tj.Damped(problem.scale, problem.sigma)
    law = theory.run_law(
        problem.prior, problem.reward, scale, theory.PlugInDraws(1), times=times, num=512
    )
    found = law.wasserstein(theory.tilt(problem.prior, problem.reward, problem.scale))
    return {"predicted": [float(found.value), float(found.error)], "published": NAMED[name]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one mixture, 250 samples, two sets")
    args = parser.parse_args()
    num, sets, budget = (250, 2, 100) if args.quick else (1000, 4, BUDGET)
    table = {}
    for name, case in itertools.islice(cases().items(), 1 if args.quick else None):
        print(f"{name}: method, steps, predicted, measured", flush=True)
        table[name] = compare(case, budget, num, sets)
        found = table[name]
        print(
            f"  {found['seconds']:.1f} s; of {found['pairs']} pairs {found['wrong']} in the wrong "
            f"order; {found['off']} of {len(found['rows'])} off",
            flush=True,
        )
    named = {name: damped(name) for name in itertools.islice(NAMED, 1 if args.quick else None)}
    for name, row in named.items():
        print(f"damped on {name}: predicted {row['predicted']}, published {row['published']}")
    if not args.quick:
        found = {"num": num, "sets": sets, "budget": budget, "table": table, "damped": named}
        common.write("recommended", found)


if __name__ == "__main__":
    main()
