"""How close to the tilt is each method for rewards without a closed-form tilt, in 2 to 100
dimensions?

The prior has two modes at ±2.5 along the first coordinate, with variance 1/2 in every coordinate.
All rewards except the double well are sums over the coordinates, so that the tilt is a product of
laws on the line, known by quadrature in any dimension. The methods do not use this form. Reported
are the mass P(x_1 >= 0) of the right mode, and the root mean square over the coordinates of the W2
distances between marginals (exact on the line), with the floor between two exact samples. The
double well is folded by the sign of x_1.

    python -m benchmarks.rewards.any_reward [--quick]
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common

MODE, VARIANCE = 2.5, 0.5


def two_modes(t, x):
    """The denoiser of the prior on the interpolant `Linear()`, at the cost of one product."""
    noisy = t**2 * VARIANCE + (1 - t) ** 2
    gate = jnp.tanh(t * MODE * x[0] / noisy)
    return (t * VARIANCE / noisy * x).at[0].add((1 - t) ** 2 / noisy * MODE * gate)


class Problem(NamedTuple):
    """A reward that is a sum of `part(i, x_i)`, and its scale."""

    name: str
    dim: int
    part: Callable
    scale: float
    weights: np.ndarray | None = None

    def reward(self, x):
        index = jnp.arange(self.dim)
        return jnp.sum(jax.vmap(self.part)(index, x))

    def exact(self, key: jax.Array, num: int) -> jax.Array:
        """Exact samples of the tilt, `(num, dim)`."""
        keys = jax.random.split(key, self.dim)
        return jnp.stack([self.law(i).sample(keys[i], num)[:, 0] for i in range(self.dim)], axis=1)

    def law(self, i: int) -> theory.quadrature.GridTilt:
        """The law of coordinate i under the tilt."""
        means = [[-MODE], [MODE]] if i == 0 else [[0.0]]
        prior = tj.GaussianMixture(
            [1 / len(means)] * len(means), means, [[[VARIANCE]]] * len(means)
        )
        return theory.quadrature.tilt(prior, lambda x: self.part(i, x[0]), self.scale)


def problems(dims: tuple[int, ...]) -> list[Problem]:
    rows = []
    for dim in dims:
        stiff = jnp.asarray(np.geomspace(4.0, 0.1, dim), jnp.float32)
        target = jnp.where(jnp.arange(dim) == 0, 0.5, 1.5)
        quadratic = lambda w, target=target: lambda i, x: -w[i] * (x - target[i]) ** 2
        rows += [
            Problem("quadratic, stiff between modes", dim, quadratic(stiff), 1.0),
            Problem("quadratic, stiff across modes", dim, quadratic(stiff[::-1]), 1.0),
            Problem("kink, -|x - 1|", dim, lambda i, x: -jnp.abs(x - 1), 1.5),
            Problem(
                "plateau, clip(x_1, -1, 1)",
                dim,
                lambda i, x: jnp.where(i == 0, jnp.clip(x, -1, 1), 0.0),
                1.5,
            ),
        ]
    return rows


def marginal_w2(x, y) -> float:
    """The root mean square over the coordinates of W2 between samples of the same number."""
    return float(
        np.sqrt(np.mean((np.sort(np.asarray(x), axis=0) - np.sort(np.asarray(y), axis=0)) ** 2))
    )


def right_share(law: theory.quadrature.GridTilt) -> float:
    """The mass `P(x_1 >= 0)`."""
    return float(law.expect(lambda x: jnp.where(x[0] >= 0, 1.0, 0.0)))


def methods(model: tj.Model, reward: Callable, scale: float) -> dict[str, tj.guidance.Guidance]:
    glass, variance = (
        tj.Glass(model, inner_steps=20),
        tj.calibrate(jax.random.key(1), model, budget=2**18),
    )
    rows: dict[str, tj.guidance.Guidance] = {
        "plug-in": tj.PlugIn(glass, reward, scale),
        "damped": tj.PlugIn(glass, reward, tj.Damped(scale, VARIANCE**0.5)),
    }
    if model.shape[0] <= 10:  # Laplace pulls back along every coordinate
        rows["Laplace"] = tj.Laplace(model, reward, scale)
    rows["Conjugate"] = tj.Conjugate(model, reward, scale, variance=variance)
    rows["Conjugate, anisotropic"] = tj.Conjugate(
        model, reward, scale, variance=variance, anisotropic=True
    )
    return rows


def landed(
    model: tj.Model,
    reward: Callable,
    scale: float,
    exact,
    key,
    num: int,
    fold: Callable = lambda x: x,
) -> dict:
    """For each method the mass of the right mode and the marginal W2, `None` if the run failed."""
    results = {}
    for method, guidance in methods(model, reward, scale).items():
        try:
            x = tj.sample(key, model, guidance, num=num, steps=60).x
        except FloatingPointError:
            results[method] = None
        else:
            results[method] = {
                "share": float(np.mean(np.asarray(x[:, 0]) >= 0)),
                "w2": marginal_w2(fold(x), exact),
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1,000 samples, two dimensions")
    args = parser.parse_args()
    num, dims = (1000, (2,)) if args.quick else (4000, (2, 10, 100))
    table = []

    def report(name, dim, truth, floor, results):
        table.append(
            {"problem": name, "dim": dim, "share": truth, "floor": floor, "methods": results}
        )
        cells = "; ".join(
            f"{method} " + ("failed" if r is None else f"{r['share']:.3f} / {r['w2']:.3f}")
            for method, r in results.items()
        )
        print(f"d = {dim:3d}  {name:31s} tilt {truth:.4f} / floor {floor:.3f}: {cells}", flush=True)

    line = tj.problems.bump()
    law = theory.quadrature.tilt(line.prior, line.reward, line.scale)
    keys = jax.random.split(jax.random.key(5), 3)
    exact, again = law.sample(keys[0], num), law.sample(keys[1], num)
    results = landed(tj.Analytic(line.prior), line.reward, line.scale, exact, keys[2], num)
    report("bump on one of two far modes", 1, right_share(law), marginal_w2(exact, again), results)

    for problem in problems(dims):
        model = tj.from_denoiser(two_modes, shape=(problem.dim,))
        keys = jax.random.split(jax.random.key(7), 3)
        exact, again = problem.exact(keys[0], num), problem.exact(keys[1], num)
        results = landed(model, problem.reward, problem.scale, exact, keys[2], num)
        report(
            problem.name,
            problem.dim,
            right_share(problem.law(0)),
            marginal_w2(exact, again),
            results,
        )

    well = tj.problems.double_well()
    law = theory.quadrature.tilt(well.prior, well.reward, well.scale)
    fold = lambda x: np.asarray(x) * np.where(np.asarray(x[:, :1]) >= 0, 1, -1)
    keys = jax.random.split(jax.random.key(9), 3)
    exact, again = fold(law.sample(keys[0], num)), fold(law.sample(keys[1], num))
    results = landed(tj.Analytic(well.prior), well.reward, well.scale, exact, keys[2], num, fold)
    report("double well", 2, right_share(law), marginal_w2(exact, again), results)

    print("\n| reward | d | P(x_1 >= 0) | floor | " + " | ".join(table[0]["methods"]) + " |")
    print("|---|---|---|---|" + "---|" * len(table[0]["methods"]))
    for row in table:
        cells = []
        for method in table[0]["methods"]:
            cell = row["methods"].get(method, "-")
            cells.append(
                cell
                if cell == "-"
                else "not finite"
                if cell is None
                else f"{cell['share']:.3f} / {cell['w2']:.2f}"
            )
        print(
            f"| {row['problem']} | {row['dim']} | {row['share']:.3f} | {row['floor']:.2f} | "
            + " | ".join(cells)
            + " |"
        )
    if not args.quick:
        common.write("any_reward", {"num": num, "rows": table})


if __name__ == "__main__":
    main()
